//! Kiln's own documents: which ones are refused, and golden bytes that a later version must still read.
#![allow(clippy::unwrap_used)]

use kiln_release::verity::hash_area_length;
use kiln_release::{
    AgentApi, Artifact, BootInfo, FilePolicy, HealthCheck, HealthKind, MANIFEST_TYPE, Manifest, Mode, SITE_TYPE,
    Signer, Site, SiteSettings, VerityParams, WritableMount, hex, sign_envelope,
};
use serde_json::{Value, json};
use std::collections::BTreeMap;

fn manifest() -> Manifest {
    let artifact = |name: &str, length: u64| Artifact { sha256: hex::sha256(name.as_bytes()), length };
    Manifest {
        type_: MANIFEST_TYPE.into(),
        spec_version: "1.0".into(),
        image: "minimal".into(),
        release: 2,
        class: "normal".into(),
        architecture: "x86_64".into(),
        product: "generic".into(),
        built: "2026-03-01T12:00:00Z".parse().unwrap(),
        uki: artifact("uki", 1),
        kernel: artifact("kernel", 2),
        kexec_kernel: None,
        initramfs: artifact("initramfs", 3),
        extra: None,
        root: artifact("root", 300 * 4096 + hash_area_length(300)),
        verity: VerityParams {
            root_hash: hex::sha256(b"root hash"),
            salt: "00ff".into(),
            data_blocks: 300,
            hash_offset: 300 * 4096,
        },
        command_line: "console=ttyS0 ro".into(),
        policy: FilePolicy::default(),
        hooks: BTreeMap::new(),
        health: vec![HealthCheck::of(HealthKind::Systemd, 5)],
        writable: vec![WritableMount { path: "/var/tmp".into(), size: 1 << 20 }],
        sbom: None,
        secrets: vec![],
        certificate: None,
        measured: None,
        role_may_report: None,
    }
}

fn boot() -> BootInfo {
    let manifest = manifest();
    BootInfo {
        image: manifest.image,
        release: manifest.release,
        class: manifest.class,
        architecture: manifest.architecture,
        root_hash: manifest.verity.root_hash,
        command_line: manifest.command_line,
        built: manifest.built,
        site: SiteSettings {
            name: "lab".into(),
            http_urls: vec!["http://10.0.0.1:8080".into()],
            agent_urls: vec!["https://[fd00::1]:8443".into()],
            agent_api_ca_pem: String::new(),
            mode: Mode::Ram,
            disk: None,
            secure_boot: None,
            network: None,
        },
        trust_root: "{}".into(),
    }
}

fn site() -> Site {
    let key = Signer::from_seed(&[1; 32]).public();
    Site {
        type_: SITE_TYPE.into(),
        spec_version: "1.0".into(),
        name: "lab".into(),
        directors: BTreeMap::from([(key.id(), key.to_object())]),
        director_threshold: 1,
        operators: BTreeMap::new(),
        operator_threshold: 1,
        agent_api: AgentApi { ca_pem: String::new(), keys: vec![] },
        floors: BTreeMap::from([("minimal".into(), 3)]),
        network: None,
        dbx: None,
    }
}

/// The document with one value replaced.
fn altered<T: serde::Serialize>(document: &T, pointer: &str, value: Value) -> Vec<u8> {
    let mut json = serde_json::to_value(document).unwrap();
    *json.pointer_mut(pointer).unwrap_or_else(|| panic!("no {pointer}")) = value;
    serde_json::to_vec(&json).unwrap()
}

#[test]
fn a_manifest_is_read_and_each_bad_field_refused() {
    let bytes = serde_json::to_vec(&manifest()).unwrap();
    assert_eq!(Manifest::read(&bytes, "minimal", 2).unwrap(), manifest());
    for (pointer, value, kind) in [
        ("/_type", json!("kiln-site"), "format-wrong-type"),
        ("/spec_version", json!("2.0"), "format-wrong-spec-version"),
        ("/spec_version", json!("1"), "format-wrong-spec-version"),
        ("/image", json!("other"), "manifest-wrong-release"),
        ("/image", json!("../x"), "format-bad-field"),
        ("/release", json!(3), "manifest-wrong-release"),
        ("/release", json!(-1), "format-malformed"),
        ("/release", json!(2.0), "format-malformed"),
        ("/class", json!("root"), "format-bad-field"),
        ("/architecture", json!("z80"), "format-bad-field"),
        ("/product", json!(""), "format-bad-field"),
        ("/uki/sha256", json!("AB".repeat(32)), "format-bad-field"),
        ("/kernel/sha256", json!("../../etc/passwd"), "format-bad-field"),
        ("/initramfs/length", json!(0), "format-bad-field"),
        ("/root/length", json!(4096), "format-malformed"),
        ("/extra", json!({"sha256": "", "length": 1}), "format-bad-field"),
        ("/verity/root_hash", json!("00"), "format-malformed"),
        ("/verity/salt", json!("0"), "format-malformed"),
        ("/verity/salt", json!("00".repeat(257)), "format-malformed"),
        ("/verity/data_blocks", json!(0), "format-malformed"),
        ("/verity/data_blocks", json!(u64::MAX), "format-malformed"),
        ("/verity/hash_offset", json!(4096), "format-malformed"),
        ("/command_line", json!("a\nb"), "format-bad-field"),
        ("/command_line", json!("x".repeat(2048)), "format-bad-field"),
        ("/health", json!([]), "format-bad-field"),
        ("/health/0/kind", json!("script"), "format-malformed"),
        ("/writable/0/path", json!("/var/../etc"), "format-bad-field"),
        ("/writable/0/path", json!("/"), "format-bad-field"),
        ("/writable/0/path", json!("var"), "format-bad-field"),
        ("/writable/0/size", json!(0), "format-bad-field"),
    ] {
        let error = Manifest::read(&altered(&manifest(), pointer, value), "minimal", 2).unwrap_err();
        assert_eq!(error.kind(), kind, "{pointer}: {error}");
    }
    let twice = br#"{"_type":"kiln-manifest","_type":"kiln-manifest"}"#;
    assert!(Manifest::read(twice, "minimal", 2).unwrap_err().to_string().contains("given twice"));
}

#[test]
fn a_manifest_of_another_boot_is_refused() {
    manifest().matches_boot(&boot()).unwrap();
    for (pointer, value) in [
        ("/image", json!("other")),
        ("/release", json!(1)),
        ("/class", json!("rescue")),
        ("/architecture", json!("aarch64")),
        ("/root_hash", json!(hex::sha256(b"another"))),
        ("/command_line", json!("console=ttyS0 ro init=/bin/sh")),
    ] {
        let boot = BootInfo::read(&altered(&boot(), pointer, value)).unwrap();
        assert_eq!(manifest().matches_boot(&boot).unwrap_err().kind(), "manifest-not-of-this-boot", "{pointer}");
    }
}

#[test]
fn boot_info_is_checked() {
    BootInfo::read(&serde_json::to_vec(&boot()).unwrap()).unwrap();
    for (pointer, value) in [
        ("/image", json!("UPPER")),
        ("/release", json!(0)),
        ("/root_hash", json!("")),
        ("/site/http_urls/0", json!("ftp://10.0.0.1")),
        ("/site/http_urls/0", json!("http://10.0.0.1/")),
        ("/site/agent_urls/0", json!("http://10.0.0.1:8443")),
        ("/site/agent_urls/0", json!("https://")),
    ] {
        let error = BootInfo::read(&altered(&boot(), pointer, value)).unwrap_err();
        assert_eq!(error.kind(), "format-bad-field", "{pointer}: {error}");
    }
}

#[test]
fn operators_are_others_than_the_directors_and_may_be_none() {
    let read = |site: &Site| Site::read(&serde_json::to_vec(site).unwrap());
    let keys = |seeds: &[u8]| -> BTreeMap<String, Value> {
        seeds.iter().map(|n| Signer::from_seed(&[*n; 32]).public()).map(|key| (key.id(), key.to_object())).collect()
    };
    let none = String::from_utf8(serde_json::to_vec(&site()).unwrap()).unwrap();
    assert!(!none.contains("operator"), "a site without operators is written as ever: {none}");
    let two = Site { operators: keys(&[2, 3]), operator_threshold: 2, ..site() };
    assert_eq!(read(&two).unwrap(), two);
    let refused = |site: &Site| read(site).unwrap_err().to_string();
    assert!(refused(&Site { operator_threshold: 3, ..two.clone() }).contains("operator_threshold"));
    assert!(refused(&Site { operator_threshold: 0, ..two.clone() }).contains("operator_threshold"));
    assert!(refused(&Site { operators: keys(&[1, 2]), ..two.clone() }).contains("off the boot server"));
    let statement = sign_envelope(&json!({ "_type": "x" }), &[&Signer::from_seed(&[2; 32])]).unwrap();
    let kind = |site: &Site| site.verify_operator::<Value>(statement.as_bytes(), "x").unwrap_err().kind();
    assert_eq!((kind(&two), kind(&site())), ("order-bad-signature", "order-no-operators"));
    let one = Site { operator_threshold: 1, ..two };
    assert!(one.verify_operator::<Value>(statement.as_bytes(), "x").is_ok());
    assert_eq!(one.verify_operator::<Value>(statement.as_bytes(), "y").unwrap_err().kind(), "order-not-an-order");
}

#[test]
fn a_site_is_checked() {
    let good = Site::read(&serde_json::to_vec(&site()).unwrap()).unwrap();
    assert_eq!((good.floor("minimal"), good.floor("other")), (3, 1));
    for (pointer, value) in [
        ("/name", json!("two words")),
        ("/director_threshold", json!(0)),
        ("/director_threshold", json!(2)),
        ("/directors", json!({})),
        ("/directors", json!({ "ab": Signer::from_seed(&[1; 32]).public().to_object() })),
        ("/floors/minimal", json!(0)),
        ("/floors", json!({ "../x": 1 })),
    ] {
        let error = Site::read(&altered(&site(), pointer, value)).unwrap_err();
        assert_eq!(error.kind(), "format-bad-field", "{pointer}: {error}");
    }
}

#[test]
fn only_the_director_signs_for_the_director() {
    let statement = json!({ "_type": "kiln-freshness", "now": "2026-03-01T12:00:00Z" });
    let sign = |seed: u8| sign_envelope(&statement, &[&Signer::from_seed(&[seed; 32])]).unwrap();
    let verify = |text: &str| site().verify_director::<Value>(text.as_bytes());
    let text = sign(1);
    assert_eq!(verify(&text).unwrap(), (statement.clone(), hex::sha256(text.as_bytes())));
    assert_eq!(verify(&sign(2)).unwrap_err().kind(), "director-bad-signature");
    // Under the director's key id.
    let id = |seed: u8| Signer::from_seed(&[seed; 32]).public().id();
    assert_eq!(verify(&sign(2).replace(&id(2), &id(1))).unwrap_err().kind(), "director-bad-signature");
    assert_eq!(verify(&format!("{text}{}", " ".repeat(64 << 10))).unwrap_err().kind(), "director-too-long");
    assert_eq!(verify("[]").unwrap_err().kind(), "director-malformed");
}

/// Golden: Ed25519 is deterministic, so the bytes are. Do not change this test: machines in the field read this form.
#[test]
fn the_envelope_has_its_golden_bytes() {
    let text = sign_envelope(&json!({ "b": [1, null, "ü\n\""], "a": true }), &[&Signer::from_seed(&[1; 32])]).unwrap();
    assert_eq!(text, include_str!("golden/envelope.json"));
}

/// Golden: the manifest's fields and their order-free form. Do not change this test.
#[test]
fn the_manifest_has_its_golden_form() {
    let golden: Value = serde_json::from_str(include_str!("golden/manifest.json")).unwrap();
    assert_eq!(serde_json::to_value(manifest()).unwrap(), golden);
}
