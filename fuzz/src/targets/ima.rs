//! What a kernel says that it measured.

/// The list, with a release that may be loaded for a kexec.
pub mod ima_list {
    use kiln_release::measured::{ImaList, ImaWhat, extend, ima_unmeasured, loaded};
    use kiln_release::{Manifest, hex};
    use ring::digest::{SHA256, digest};
    use serde_json::json;
    use std::sync::LazyLock;

    const LINE: &str = "console=ttyS0";
    const KERNEL: [u8; 32] = [0xbb; 32];
    const CROSSING: [u8; 32] = [0xcc; 32];

    static RELEASE: LazyLock<Manifest> = LazyLock::new(|| {
        let artifact = json!({"sha256": hex::encode(&KERNEL), "length": 1});
        let manifest = json!({
            "_type": "kiln-manifest", "spec_version": "1.0", "image": "minimal", "release": 1, "class": "normal",
            "architecture": "x86_64", "product": "generic", "built": "2026-01-01T00:00:00Z", "uki": artifact,
            "kernel": artifact, "initramfs": artifact, "extra": null, "root": artifact, "command_line": LINE,
            "verity": {"root_hash": "", "salt": "", "data_blocks": 1, "hash_offset": 4096},
            "policy": {"refuse_foreign_command_line": false}, "hooks": {}, "health": [], "writable": [], "sbom": null,
            "measured": {"pcr11": "", "uki": "", "kernel": "", "kexec": {"without_root": hex::encode(&CROSSING)}},
        });
        serde_json::from_value(manifest).expect("a manifest")
    });

    fn sized(bytes: &[u8]) -> Vec<u8> {
        [&u32::try_from(bytes.len()).expect("short").to_le_bytes()[..], bytes].concat()
    }

    fn entry(fields: &[&[u8]]) -> Vec<u8> {
        let data: Vec<u8> = fields.iter().flat_map(|field| sized(field)).collect();
        [&10_u32.to_le_bytes()[..], &[7; 20], &sized(b"ima"), &sized(&data)].concat()
    }

    fn file(sha256: [u8; 32], name: &[u8]) -> Vec<u8> {
        entry(&[&[b"sha256:\0".as_slice(), &sha256].concat(), name, &[]])
    }

    fn initramfs(sha256: [u8; 32]) -> Vec<u8> {
        entry(&[&[b"ima:sha256:\0".as_slice(), &sha256].concat(), b"memfd:kiln-initrd\0"])
    }

    fn line(text: &[u8]) -> Vec<u8> {
        let hash = digest(&SHA256, text);
        entry(&[&[b"sha256:\0".as_slice(), hash.as_ref()].concat(), b"kexec-cmdline\0", text])
    }

    pub fn run(data: &[u8]) {
        let Ok(list) = ImaList::read(data) else { return };
        assert!(list.0.len() * 32 <= data.len());
        let value = list.replay([0; 32]);
        assert_eq!(list.explains([0; 32], &value), !list.0.is_empty());
        if let Some((last, before)) = list.0.split_last() {
            assert_eq!(value, extend(&ImaList(before.to_vec()).replay([0; 32]), &last.digest));
        }
        let releases = [(1, &*RELEASE)];
        let has = |what: &dyn Fn(&ImaWhat<'_>) -> bool| list.0.iter().any(|entry| what(&entry.what));
        if let Ok(found) = loaded(&list, &releases) {
            let crossed = has(&|what| *what == ImaWhat::Initramfs { sha256: CROSSING });
            let kernel = has(&|what| matches!(what, ImaWhat::File { sha256, .. } if *sha256 == KERNEL));
            let lines = has(&|what| *what == ImaWhat::CommandLine(LINE.as_bytes()));
            assert_eq!(found.contains(&1), crossed && kernel && lines);
            assert!(!has(&|what| *what == ImaWhat::Other), "what no rule asks for is passed over");
            let disguised = |what: &ImaWhat<'_>| matches!(what, ImaWhat::File { sha256, .. } if *sha256 == CROSSING);
            assert!(!has(&disguised), "a release's initramfs passes for a module");
            let first = |what: &ImaWhat<'_>| matches!(what, ImaWhat::File { name: b"boot_aggregate\0", .. });
            assert!(!list.0.iter().skip(1).any(|entry| first(&entry.what)), "two kernels pass for one");
        }
        // Whatever came before it, a foreign initramfs is seen.
        for foreign in [initramfs([9; 32]), line(b"init=/bin/sh")] {
            let more = [data, &foreign].concat();
            let Ok(longer) = ImaList::read(&more) else { continue };
            assert!(loaded(&longer, &releases).is_err(), "something foreign is hidden");
            assert_ne!(longer.replay([0; 32]), value);
        }
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        let first = file([1; 32], b"boot_aggregate\0");
        let kexec = [file(KERNEL, b"memfd:kiln-kernel\0"), initramfs(CROSSING), line(LINE.as_bytes())].concat();
        let (_, mark) = ima_unmeasured();
        let second = [first.clone(), kexec.clone(), first.clone()].concat();
        let disguised = [first.clone(), file(CROSSING, b"/run/x\0"), kexec.clone()].concat();
        vec![
            first.clone(),
            [first.clone(), kexec.clone()].concat(),
            [first, mark, kexec].concat(),
            initramfs([9; 32]),
            second,
            disguised,
        ]
    }
}
