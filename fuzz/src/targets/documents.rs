//! Kiln's own signed documents, as they are read once their signatures hold.

/// The first byte says which document it is.
pub mod document {
    use super::super::{chosen, stable};
    use kiln_release::network::NetworkConfig;
    use kiln_release::{AcceptancePlan, BootInfo, ExecPolicy, Expected, Manifest, Signer, Site};
    use serde_json::json;

    pub fn run(data: &[u8]) {
        let Some((choice, rest)) = super::super::choice(data) else { return };
        match choice % 6 {
            0 => {
                let Ok(manifest) = Manifest::read(rest, "minimal", 2) else { return };
                let again = Manifest::read(&stable(&manifest), "minimal", 2).expect("what was written can be read");
                assert_eq!(again, manifest);
                assert!(Manifest::read(rest, "minimal", 3).is_err() && Manifest::read(rest, "other", 2).is_err());
                let sectors = manifest.verity.sectors();
                assert!(sectors > 0 && !manifest.verity.table("/dev/a", "/dev/b").contains('\n'));
            }
            1 => {
                let Ok(site) = Site::read(rest) else { return };
                assert_eq!(Site::read(&stable(&site)).as_ref(), Ok(&site));
                assert!(site.director_keys().threshold() >= 1 && site.floor("minimal") >= 1);
            }
            2 => {
                let Ok(boot) = BootInfo::read(rest) else { return };
                assert_eq!(BootInfo::read(&stable(&boot)).as_ref(), Ok(&boot));
                assert!(!boot.command_line.contains(char::is_control));
            }
            3 => {
                let Ok(policy) = ExecPolicy::read(rest) else { return };
                assert_eq!(ExecPolicy::read(&stable(&policy)).as_ref(), Ok(&policy));
                assert_eq!(policy.clone().reported().reported(), policy.clone().reported());
            }
            4 => {
                let Ok(config) = serde_json::from_slice::<NetworkConfig>(rest) else { return };
                if config.check().is_ok() {
                    let again: NetworkConfig = serde_json::from_slice(&stable(&config)).expect("what was written");
                    assert_eq!((again.check(), &again), (Ok(()), &config));
                    let macs = ["52:54:00:00:00:01".to_owned()];
                    let _ = config.section_of(Some("web"), "00000000-0000-0000-0000-000000000001", &macs);
                }
            }
            _ => {
                if let Ok(plan) = serde_json::from_slice::<AcceptancePlan>(rest) {
                    let _ = stable(&plan);
                    assert!(plan.check().is_err() || plan.memory_percent <= 90);
                }
                if let Ok(expected) = serde_json::from_slice::<Expected>(rest) {
                    let _ = stable(&expected);
                }
            }
        }
    }

    fn is_read(choice: u8, rest: &[u8]) -> bool {
        match choice {
            0 => Manifest::read(rest, "minimal", 2).is_ok(),
            1 => Site::read(rest).is_ok(),
            2 => BootInfo::read(rest).is_ok(),
            3 => ExecPolicy::read(rest).is_ok(),
            4 => serde_json::from_slice::<NetworkConfig>(rest).is_ok_and(|config| config.check().is_ok()),
            _ => {
                serde_json::from_slice::<AcceptancePlan>(rest).is_ok()
                    || serde_json::from_slice::<Expected>(rest).is_ok()
            }
        }
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        let manifest = include_bytes!("../../../images/release/tests/golden/manifest.json");
        let mut rich: serde_json::Value = serde_json::from_slice(manifest).expect("JSON");
        let hash = "ab".repeat(32);
        rich["measured"] = json!({ "pcr11": hash, "uki": hash, "kernel": hash, "certificate": hash });
        rich["hooks"] = json!({ "drain": [{ "kind": "command", "name": "x", "target": "/usr/bin/x", "deadline": 5, "on_timeout": "go" }] });
        rich["health"] = json!([{ "kind": "http", "target": "http://127.0.0.1:80/", "soak": 5 },
            { "kind": "disk", "target": "/var", "limit": "10%", "soak": 1 }]);
        let key = |n: u8| Signer::from_seed(&[n; 32]).public();
        let network = json!({ "version": 1, "section": [{ "role": ["web"], "mac": ["52:54:00:00:00:01"], "link": [
            { "name": "b", "kind": "lacp", "card": ["any"], "dhcp4": true },
            { "name": "v", "kind": "vlan", "on": "b", "id": 7, "address": ["10.0.0.7/24"], "gateway": ["10.0.0.1"] }],
            "http_urls": ["http://kiln:8080"] }] });
        let site = json!({ "_type": "kiln-site", "spec_version": "1.0", "name": "lab",
            "directors": { key(1).id(): key(1).to_object() }, "director_threshold": 1,
            "operators": { key(2).id(): key(2).to_object() }, "operator_threshold": 1,
            "agent_api": { "ca_pem": "x" }, "floors": { "minimal": 2 }, "network": network,
            "dbx": { "update": { "sha256": hash, "length": 7 }, "revoked": [{ "digest": hash, "release": "minimal/1" }] } });
        let boot = json!({ "image": "minimal", "release": 2, "class": "normal", "architecture": "x86_64",
            "root_hash": hash, "command_line": "console=ttyS0", "built": "2026-03-01T12:00:00Z", "trust_root": "{}",
            "site": { "name": "lab", "http_urls": ["http://10.0.0.1:8080"], "agent_urls": ["https://10.0.0.1:8443"],
                "agent_api_ca_pem": "x", "mode": "disk", "disk": { "esp": 1, "slot": 2, "state": 3, "wipe": "never" } } });
        let exec = json!({ "_type": kiln_release::EXEC_TYPE, "spec_version": "1.0", "rules": [{ "path": "/srv", "mode": "enforce",
            "fail": "closed", "may_report": true, "allow": [hash] }] });
        let plan = json!({ "memory_seconds": 5, "memory_percent": 50, "disk_write_blank": true });
        let expected =
            json!({ "kernel": "6.12", "modules": ["virtio_net"], "services": ["x.service"], "users": ["root:0"] });
        let texts = [(0_u8, rich), (1, site), (2, boot), (3, exec), (4, network), (5, plan), (5, expected)];
        let useless: Vec<_> = texts.iter().filter(|(n, value)| !is_read(*n, value.to_string().as_bytes())).collect();
        assert!(useless.is_empty(), "seeds that are no such document lead nowhere: {useless:?}");
        let mut seeds = chosen(0, [&manifest[..]]);
        seeds.extend(texts.iter().flat_map(|(n, value)| chosen(*n, [value.to_string().as_bytes()])));
        seeds
    }
}
