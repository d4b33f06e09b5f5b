use super::*;
use crate::formats::{Crossing, Manifest, Measured};
use crate::hex;
use proptest::prelude::*;
use std::collections::BTreeSet;

const LINE: &str = "console=ttyS0 ro";
const KERNEL: &[u8] = b"the kernel";

fn length(bytes: &[u8]) -> [u8; 4] {
    u32::try_from(bytes.len()).unwrap().to_le_bytes()
}

fn data(fields: &[&[u8]]) -> Vec<u8> {
    fields.iter().flat_map(|field| [&length(field)[..], *field].concat()).collect()
}

/// An entry as the kernel writes it, with a SHA-1 that nobody reads.
fn entry(template: &str, fields: &[&[u8]]) -> Vec<u8> {
    let (template, data) = (template.as_bytes(), data(fields));
    [&10_u32.to_le_bytes()[..], &[7; 20], &length(template), template, &length(&data), &data].concat()
}

/// A file in the default form of Debian's kernels, `ima-sig`, whose third field is empty.
fn file(sha256: [u8; 32], name: &str) -> Vec<u8> {
    entry("ima-sig", &[&[b"sha256:\0".as_slice(), &sha256].concat(), &[name.as_bytes(), &[0]].concat(), &[]])
}

fn aggregate() -> Vec<u8> {
    file([3; 32], "boot_aggregate")
}

fn initramfs(content: &[u8]) -> Vec<u8> {
    entry("ima-ngv2", &[&[b"ima:sha256:\0".as_slice(), &sha256(content)].concat(), b"memfd:kiln-initrd\0"])
}

fn line(text: &str) -> Vec<u8> {
    let digest = [b"sha256:\0".as_slice(), &sha256(text.as_bytes())].concat();
    entry("ima-buf", &[&digest, b"kexec-cmdline\0", text.as_bytes()])
}

/// What the kernel writes when this is loaded.
fn kexec(content: &[u8]) -> Vec<u8> {
    [file(sha256(KERNEL), "memfd:kiln-kernel"), initramfs(content), line(LINE)].concat()
}

fn crossing(release: u64, root: bool) -> Vec<u8> {
    format!("initramfs {release} {root}").into_bytes()
}

fn manifest(release: u64) -> Manifest {
    let kexec = Crossing {
        with_root: Some(hex::sha256(&crossing(release, true))),
        without_root: hex::sha256(&crossing(release, false)),
    };
    let measured = Measured {
        pcr11: String::new(),
        uki: String::new(),
        kernel: String::new(),
        loader: None,
        certificate: None,
        kexec: Some(kexec),
    };
    let artifact = |bytes: &[u8]| serde_json::json!({"sha256": hex::sha256(bytes), "length": bytes.len()});
    let json = serde_json::json!({
        "_type": "kiln-manifest", "spec_version": "1.0", "image": "minimal", "release": release, "class": "normal",
        "architecture": "x86_64", "product": "generic", "built": "2026-01-01T00:00:00Z",
        "uki": artifact(b"uki"), "kernel": artifact(KERNEL), "initramfs": artifact(b"initramfs"), "extra": null,
        "root": artifact(b"root"), "command_line": LINE,
        "verity": {"root_hash": "", "salt": "", "data_blocks": 1, "hash_offset": 4096},
        "policy": {"refuse_foreign_command_line": false}, "hooks": {}, "health": [], "writable": [], "sbom": null,
        "measured": measured,
    });
    serde_json::from_value(json).unwrap()
}

fn judged(list: &[u8]) -> Result<BTreeSet<u64>, ForeignKexec> {
    let manifests = [1, 2].map(|release| (release, manifest(release)));
    let releases = manifests.iter().map(|(release, manifest)| (*release, manifest)).collect::<Vec<_>>();
    loaded(&ImaList::read(list).unwrap(), &releases)
}

#[test]
fn a_list_replays_to_what_the_kernel_extended_and_every_byte_of_it_counts() {
    let whole = [aggregate(), kexec(&crossing(2, true))].concat();
    let list = ImaList::read(&whole).unwrap();
    // The digest is over the data alone, as the list has it (`ima_calc_field_array_hash_tfm`).
    let first = data(&[&[b"sha256:\0".as_slice(), &[3; 32]].concat(), b"boot_aggregate\0", &[]]);
    let mut value = extend(&[0; 32], &sha256(&first));
    assert_eq!(ImaList::read(&aggregate()).unwrap().replay([0; 32]), value);
    for entry in &list.0[1..] {
        value = extend(&value, &entry.digest);
    }
    assert_eq!((list.0.len(), list.replay([0; 32])), (4, value));
    assert!(list.is_extended() && !list.is_unmeasured());
    // A quote that is older than the list, and one of another list.
    assert!(list.explains([0; 32], &extend(&[0; 32], &sha256(&first))) && list.explains([0; 32], &value));
    assert!(!list.explains([0; 32], &[0; 32]) && !list.explains([1; 32], &value));
    for left_out in 0..4 {
        let mut less = list.clone();
        less.0.remove(left_out);
        assert!(!less.explains([0; 32], &value), "without entry {left_out}");
    }
}

#[test]
fn only_what_the_site_has_released_may_be_loaded() {
    let none = BTreeSet::new();
    assert_eq!(judged(&aggregate()), Ok(none.clone()));
    // A module has the same form as a kernel, and any content.
    let module = file([9; 32], "/lib/modules/6.1.0/kernel/fs/erofs/erofs.ko");
    assert_eq!(judged(&[aggregate(), module.clone()].concat()), Ok(none.clone()));
    for root in [true, false] {
        let list = [aggregate(), module.clone(), kexec(&crossing(2, root))].concat();
        assert_eq!(judged(&list), Ok(BTreeSet::from([2])));
    }
    // The right one and a small cpio behind it: what root in the running system would do.
    let foreign = [crossing(2, true), b"070701".to_vec()].concat();
    let error = judged(&[aggregate(), kexec(&foreign)].concat()).unwrap_err();
    assert_eq!((error.entry, error.what), (3, format!("the initramfs {}", hex::sha256(&foreign))));
    // A later load of the right one does not undo it.
    let list = [aggregate(), initramfs(&foreign), kexec(&crossing(2, true))].concat();
    assert_eq!(judged(&list).unwrap_err().entry, 2);
    // Nor does another name of the template, which is measured nowhere.
    let digest = [b"ima:sha256:\0".as_slice(), &sha256(&foreign)].concat();
    let renamed = entry("ima-sig", &[&digest, b"boot_aggregate\0"]);
    assert!(judged(&renamed).unwrap_err().what.contains("the initramfs"));

    let error = judged(&[aggregate(), line("console=ttyS0 ro init=/bin/sh")].concat()).unwrap_err();
    assert!(error.to_string().contains("the command line \"console=ttyS0 ro init=/bin/sh\""), "{error}");
    // Not whole: a kernel that is none of the release's.
    let other = [aggregate(), file([8; 32], "k"), initramfs(&crossing(2, true)), line(LINE)].concat();
    assert_eq!(judged(&other), Ok(none));
    // What no rule asks for: another hash, a violation, a form of its own.
    let sha1 = entry("ima-ng", &[&[b"sha1:\0".as_slice(), &[1; 20]].concat(), b"f\0"]);
    let mut violation = aggregate();
    violation[4..24].fill(0);
    for odd in [sha1, violation, entry("x", &[b"a"]), entry("x", &[]), entry("x", &[b"a", b"b", b"c", b"d"])] {
        assert!(judged(&odd).unwrap_err().what.contains("no rule"), "{odd:?}");
    }
}

/// The second release has another command line than the first.
fn judged_with(second: &str, list: &[u8]) -> Result<BTreeSet<u64>, ForeignKexec> {
    let (first, second) = (manifest(1), Manifest { command_line: second.to_owned(), ..manifest(2) });
    loaded(&ImaList::read(list).unwrap(), &[(1, &first), (2, &second)])
}

#[test]
fn a_command_line_is_bound_to_what_was_loaded_with_it() {
    let second = "console=ttyS0 rw";
    let kernel = file(sha256(KERNEL), "memfd:kiln-kernel");
    let [one, two] = [1, 2].map(|release| initramfs(&crossing(release, true)));
    let (own, other) = (line(LINE), line(second));
    let judged = |parts: &[&[u8]]| judged_with(second, &[aggregate(), kernel.clone(), parts.concat()].concat());
    assert_eq!(judged(&[&one, &own]), Ok(BTreeSet::from([1])));
    assert_eq!(judged(&[&two, &other]), Ok(BTreeSet::from([2])));
    // A module may be measured between the two.
    assert_eq!(judged(&[&one, &file([9; 32], "/lib/modules/erofs.ko"), &own]), Ok(BTreeSet::from([1])));
    // Another release's line: at once, or when it is loaded again, of which the kernel lists only what is new.
    for (parts, entry, what) in [
        (vec![&one, &other], 4, "the command line"),
        (vec![&one, &own, &other], 5, "the command line"),
        (vec![&one, &other, &own], 4, "the command line"),
        // No initramfs at all.
        (vec![&own], 3, "the command line"),
        // None, or an empty one: nothing of it is measured.
        (vec![&one], 3, "the initramfs"),
        (vec![&one, &two, &other], 3, "the initramfs"),
        // The second one's was listed before: the first was loaded with it, or with none.
        (vec![&two, &other, &one], 5, "the initramfs"),
    ] {
        let parts: Vec<&[u8]> = parts.into_iter().map(Vec::as_slice).collect();
        let error = judged(&parts).unwrap_err();
        assert!(error.entry == entry && error.what.starts_with(what), "{error}");
    }
    // Each with its own, and then, which is not listed any more, either with the other's.
    assert_eq!(judged(&[&one, &own, &two, &other]), Ok(BTreeSet::new()));
    // Where both have the same there is nothing to mix up, and it is listed once.
    let same = [aggregate(), kernel.clone(), one.clone(), own.clone(), two.clone()].concat();
    assert_eq!(judged_with(LINE, &same), Ok(BTreeSet::from([1, 2])));
}

/// What root gets by having a file measured as a module, which the kernel then refuses, before it is loaded for a kexec.
#[test]
fn an_initramfs_that_was_measured_as_a_file_before_is_none() {
    let (genuine, foreign) = (crossing(2, true), sha256(b"foreign"));
    let (kernel, hidden) = (file(sha256(KERNEL), "memfd:kiln-kernel"), file(foreign, "/run/x"));
    // Read already: of its loading the kernel lists the line alone, or nothing.
    let error = judged(&[aggregate(), hidden.clone(), kernel.clone(), line(LINE)].concat()).unwrap_err();
    assert!(error.entry == 4 && error.what.starts_with("the command line"), "{error}");
    assert_eq!(judged(&[aggregate(), hidden.clone(), kernel.clone()].concat()), Ok(BTreeSet::new()));
    // The right one was read, and what lies under its file system changed since: its hash is the one from before.
    let before = file(sha256(&genuine), "/run/x");
    let error = judged(&[aggregate(), before, kexec(&genuine)].concat()).unwrap_err();
    assert_eq!((error.entry, error.why), (2, "which is a release's initramfs, and read for something else"));
    // No word of a kexec: the next kernel goes on as the one before, and has begun with a word of its own.
    let next = [aggregate(), file([8; 32], "/lib/modules/erofs.ko")].concat();
    let error = judged(&[aggregate(), hidden, kernel, next].concat()).unwrap_err();
    assert!(error.entry == 4 && error.to_string().contains("another kernel has started since"), "{error}");
}

#[test]
fn a_kernel_that_measures_nothing_is_told_apart() {
    let (digest, mark) = ima_unmeasured();
    let whole = [aggregate(), mark.clone(), file([9; 32], "/lib/modules/erofs.ko")].concat();
    let list = ImaList::read(&whole).unwrap();
    assert!(list.is_unmeasured() && list.0[1].digest == digest);
    assert_eq!(judged(&whole), Ok(BTreeSet::new()));
    // It does not hide what was loaded.
    assert!(judged(&[mark, kexec(b"foreign")].concat()).is_err());
    // No TPM when the kernel started: it lists, and extends nothing.
    let list = file([0; 32], "boot_aggregate");
    assert!(!ImaList::read(&list).unwrap().is_extended());
    assert!(!ImaList::read(&file([1; 32], "init")).unwrap().is_extended() && !ImaList(Vec::new()).is_extended());
}

#[test]
fn a_list_that_is_cut_or_too_long_is_refused() {
    let whole = [aggregate(), kexec(&crossing(1, true))].concat();
    let parts = [aggregate(), file(sha256(KERNEL), "memfd:kiln-kernel"), initramfs(&crossing(1, true))];
    let ends: Vec<usize> = (1..=3).map(|count| parts[..count].concat().len()).collect();
    for cut in 1..whole.len() {
        let read = ImaList::read(&whole[..cut]);
        assert_eq!(read.is_ok(), ends.contains(&cut), "{cut}: {read:?}");
    }
    let mut other = whole.clone();
    other[0] = 11;
    assert_eq!(ImaList::read(&other), Err(ImaError::OtherPcr { entry: 1, pcr: 11 }));
    assert_eq!(ImaList::read(&entry(&"x".repeat(65), &[])), Err(ImaError::LongName(1)));
    let mut huge = aggregate();
    huge[35..39].fill(0xff);
    assert_eq!(ImaList::read(&huge), Err(ImaError::Short(1)));
    let one = entry("x", &[]);
    assert_eq!(ImaList::read(&one.repeat(2048)).unwrap().0.len(), 2048);
    assert_eq!(ImaList::read(&one.repeat(2049)), Err(ImaError::TooMany));
}

proptest! {
    /// Whatever a machine sends: reading it ends, and a changed byte of an entry's data is another value.
    #[test]
    fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        if let Ok(list) = ImaList::read(&bytes) {
            prop_assert!(list.0.len() * 32 <= bytes.len());
        }
    }

    #[test]
    fn a_changed_byte_is_another_value(at in 0_usize..1000, bit in 0_u8..8) {
        let whole = [aggregate(), kexec(&crossing(2, true))].concat();
        let value = ImaList::read(&whole).unwrap().replay([0; 32]);
        let mut changed = whole.clone();
        let at = at % changed.len();
        changed[at] ^= 1 << bit;
        if let Ok(list) = ImaList::read(&changed) {
            // The SHA-1 and the template's name are beside what is measured.
            let beside = list.replay([0; 32]) == value;
            prop_assert!(!beside || judged(&changed) == judged(&whole));
        }
    }
}
