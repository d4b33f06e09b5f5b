//! What the UKI writer writes, other readers of PE read back: goblin here, and the release crate's own.

use goblin::pe::PE;
use kiln_images::sealed::Passphrase;
use kiln_images::uki::{Parts, UkiError, assemble};
use kiln_images::{
    KEYS, SigningKey, SiteDir, SiteError, Unlock, encrypt_secure_boot, enroll, init_lab, init_secure_boot, publish_dbx,
    revoke,
};
use kiln_release::measured::measured;
use kiln_release::pe::{Pe, PeError, SECTION_ENTRY, Uki};
use kiln_release::{Artifact, Manifest, authenticode, efi, hex, kexec};
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::path::Path;

/// What a stub is made of.
#[derive(Debug, Clone)]
struct Stub {
    /// Name, content, and bytes of slack before it in the file (not a multiple of any alignment).
    sections: Vec<(String, Vec<u8>, usize)>,
    headers: usize,
    tail: Vec<u8>,
    signed: bool,
}

const OPTIONAL: usize = 0x98;

fn stub_bytes(stub: &Stub) -> Vec<u8> {
    let mut file = vec![0_u8; stub.headers];
    let put = |file: &mut Vec<u8>, at: usize, value: usize| {
        file[at..at + 4].copy_from_slice(&u32::try_from(value).unwrap().to_le_bytes());
    };
    file[..2].copy_from_slice(b"MZ");
    file[0x3c] = 0x80;
    file[0x80..0x84].copy_from_slice(b"PE\0\0");
    file[0x84..0x86].copy_from_slice(&0x8664_u16.to_le_bytes());
    file[0x86] = u8::try_from(stub.sections.len()).unwrap();
    file[0x94] = 240;
    file[0x96] = 0x2e;
    file[OPTIONAL..OPTIONAL + 2].copy_from_slice(&0x020b_u16.to_le_bytes());
    for (at, value) in [(32, 4096), (36, 512), (60, stub.headers), (108, 16)] {
        put(&mut file, OPTIONAL + at, value);
    }
    file[OPTIONAL + 68] = 10; // EFI application
    let mut address = 4096;
    for (number, (name, content, slack)) in stub.sections.iter().enumerate() {
        file.resize(file.len() + slack, 0);
        let entry = OPTIONAL + 240 + number * SECTION_ENTRY;
        let offset = file.len();
        file.extend_from_slice(content);
        file[entry..entry + name.len()].copy_from_slice(name.as_bytes());
        // CNT_INITIALIZED_DATA | MEM_READ
        for (at, value) in [(8, content.len()), (12, address), (16, content.len()), (20, offset), (36, 0x4000_0040)] {
            put(&mut file, entry + at, value);
        }
        address += content.len().next_multiple_of(4096);
    }
    put(&mut file, OPTIONAL + 56, address);
    if !stub.tail.is_empty() {
        let symbols = file.len();
        put(&mut file, 0x8c, symbols);
        put(&mut file, 0x90, 1);
        file.extend_from_slice(&stub.tail);
    }
    if stub.signed {
        let at = file.len();
        put(&mut file, OPTIONAL + 112 + 32, at);
        put(&mut file, OPTIONAL + 112 + 36, 8);
        file.extend_from_slice(&[8; 8]);
    }
    file
}

fn plain() -> Stub {
    let text = (".text".to_owned(), vec![0x90; 600], 0);
    let mut sbat = b"sbat,1,SBAT Version,sbat,1,-\nsystemd-stub,1,-,-,257,-\n".to_vec();
    sbat.resize(512, 0);
    Stub { sections: vec![text, (".sbat".into(), sbat, 0)], headers: 1536, tail: vec![], signed: false }
}

fn parts<'a>(linux: &'a [u8], initrd: &'a [u8]) -> Parts<'a> {
    Parts {
        os_release: "ID=debian\nIMAGE_VERSION=3\n",
        uname: "6.12.1-cloud-amd64",
        command_line: "console=ttyS0",
        sbat: "kiln.test,1,Kiln,test,3,-\n",
        linux,
        kexec_signature: None,
        initrd,
    }
}

/// The PE checksum as its definition has it: all words but the field's own, folded at the end, plus the length.
fn checksum(file: &[u8]) -> u64 {
    let field = OPTIONAL + 64;
    let word = |at: usize| u64::from(file[at]) | u64::from(file.get(at + 1).copied().unwrap_or(0)) << 8;
    let sum: u64 = (0..file.len()).step_by(2).filter(|at| !(field..field + 4).contains(at)).map(word).sum();
    let folded = if sum == 0 { 0 } else { (sum - 1) % 0xffff + 1 };
    folded + file.len() as u64
}

proptest! {
    #[test]
    fn every_reader_finds_the_same_parts(
        sections in prop::collection::vec((prop::collection::vec(any::<u8>(), 1..5000), 0_usize..300), 1..5),
        slack in 0_usize..512,
        tail in prop::collection::vec(any::<u8>(), 0..40),
        linux in prop::collection::vec(any::<u8>(), 1..5000),
        initrd in prop::collection::vec(any::<u8>(), 1..5000),
    ) {
        let sections: Vec<_> = sections.into_iter().enumerate()
            .map(|(number, (content, slack))| (format!(".s{number}"), content, slack)).collect();
        let stub = Stub { sections, headers: 1536 + slack, tail, signed: false };
        let uki = assemble(&stub_bytes(&stub), &parts(&linux, &initrd)).unwrap();

        let split = Uki::split(&uki).unwrap();
        prop_assert_eq!((split.linux, split.initrd), (&linux[..], &initrd[..]));
        prop_assert_eq!(split.command_line, "console=ttyS0");
        prop_assert_eq!(split.uname, "6.12.1-cloud-amd64");

        let goblin = PE::parse(&uki).unwrap();
        let optional = goblin.header.optional_header.unwrap();
        let fields = optional.windows_fields;
        let mut address = 0;
        for (number, section) in goblin.sections.iter().enumerate() {
            let (begin, size) = (section.pointer_to_raw_data, section.size_of_raw_data);
            prop_assert_eq!(section.virtual_address % fields.section_alignment, 0);
            prop_assert_eq!((begin % fields.file_alignment, size % fields.file_alignment), (0, 0), "{}", number);
            prop_assert!(begin >= fields.size_of_headers);
            prop_assert!(section.virtual_address >= address, "sections overlap in memory");
            address = section.virtual_address + section.virtual_size;
            if let Some((name, content, _)) = stub.sections.get(number) {
                prop_assert_eq!(section.name().unwrap(), name.as_str());
                prop_assert_eq!(&uki[begin as usize..][..content.len()], &content[..], "the stub's own bytes stay");
            }
        }
        prop_assert_eq!(fields.size_of_image, address.next_multiple_of(fields.section_alignment));
        prop_assert_eq!(u64::from(fields.check_sum), checksum(&uki));
        prop_assert_eq!(goblin.header.coff_header.pointer_to_symbol_table, 0);
        prop_assert_eq!(uki.len() % fields.file_alignment as usize, 0);
    }
}

#[test]
fn the_stubs_sbat_grows_in_place() {
    let uki = assemble(&stub_bytes(&plain()), &parts(b"kernel", b"initrd")).unwrap();
    let pe = Pe::parse(&uki).unwrap();
    let sbat = std::str::from_utf8(pe.content(&uki, ".sbat").unwrap()).unwrap();
    assert_eq!(sbat, "sbat,1,SBAT Version,sbat,1,-\nsystemd-stub,1,-,-,257,-\nkiln.test,1,Kiln,test,3,-\n");
    let names: Vec<_> = pe.sections.iter().map(|section| section.name.as_str()).collect();
    assert_eq!(names, [".text", ".sbat", ".osrel", ".uname", ".cmdline", ".initrd", ".linux"]);
}

#[test]
fn stubs_that_cannot_carry_a_release_are_refused() {
    let try_it = |stub: &Stub| assemble(&stub_bytes(stub), &parts(b"k", b"i")).unwrap_err();
    assert_eq!(try_it(&Stub { signed: true, ..plain() }), UkiError::StubSigned);
    // The headers are rounded up to 512 bytes: room for one more entry.
    assert_eq!(try_it(&Stub { headers: 512 - 32, ..plain() }), UkiError::NoHeaderRoom { room: 1, needed: 5 });
    let mut again = plain();
    again.sections[0].0 = ".linux".into();
    assert_eq!(try_it(&again), UkiError::SectionExists { name: ".linux" });
    let mut full = plain();
    full.sections[1].1 = vec![b'x'; 512];
    assert_eq!(try_it(&full), UkiError::NoSbatRoom { room: 512, needed: 538 });
    let empty = assemble(&stub_bytes(&plain()), &parts(b"", b"i")).unwrap_err();
    assert_eq!(empty, UkiError::Empty { name: ".linux" });
}

/// The site's keys, and a folder for what other tools are to look at.
fn site_with_keys() -> (tempfile::TempDir, SiteDir) {
    let dir = tempfile::tempdir().unwrap();
    let site = init_lab(dir.path(), "lab", "2026-03-01T12:00:00Z".parse().unwrap()).unwrap();
    (dir, site)
}

/// A key that is not encrypted.
fn open(site: &SiteDir, name: &str) -> Result<SigningKey, SiteError> {
    SigningKey::open(site, name, &mut Unlock::nobody())
}

fn tool(program: &str, args: &[&str]) -> Option<std::process::Output> {
    match std::process::Command::new(program).args(args).output() {
        Ok(output) => Some(output),
        Err(error) => {
            crate::oracle::skipped(&format!("{program}: {error}"));
            None
        }
    }
}

#[test]
fn other_tools_verify_what_is_signed_and_its_digest() {
    let (dir, site) = site_with_keys();
    let key = open(&site, "db").unwrap();
    let uki = assemble(&stub_bytes(&plain()), &parts(b"kernel", b"initrd")).unwrap();
    let signed = key.image(&uki, Path::new("uki")).unwrap();
    assert_eq!(signed, key.image(&uki, Path::new("uki")).unwrap(), "the same bytes give the same signature");
    assert_eq!(Uki::split(&signed).unwrap().linux, b"kernel");
    assert_eq!(authenticode::strip(&signed).unwrap(), uki);
    assert_eq!(authenticode::digest(&signed), authenticode::digest(&uki), "a signature is no part of it");
    assert!(matches!(key.image(&signed, Path::new("uki")), Err(SiteError::Image { source: PeError::Signed, .. })));
    assert_eq!(
        u64::from(PE::parse(&signed).unwrap().header.optional_header.unwrap().windows_fields.check_sum),
        checksum(&signed)
    );

    let path = |name: &str| dir.path().join(name).display().to_string();
    let pem = path("db.pem");
    let der = site.secure_boot("db.cer").display().to_string();
    if tool("openssl", &["x509", "-inform", "der", "-in", &der, "-out", &pem]).is_none() {
        return;
    }
    let verdict = |bytes: &[u8]| {
        std::fs::write(path("image"), bytes).unwrap();
        tool("sbverify", &["--cert", &pem, &path("image")]).map(|output| output.status.success())
    };
    for (bytes, good) in [(&signed, true), (&uki, false)] {
        assert!(verdict(bytes).is_none_or(|verdict| verdict == good));
    }
    for at in [700, uki.len() - 1] {
        let mut altered = signed.clone();
        altered[at] ^= 1;
        assert_ne!(authenticode::digest(&altered), authenticode::digest(&uki));
        assert!(verdict(&altered).is_none_or(|verdict| !verdict), "byte {at}");
    }
}

/// What the agent makes of a UKI for a kexec is what the site signed: another's tool takes it, and what firmware starts has no
/// signature.
#[test]
fn the_kernel_in_a_uki_is_bare_and_its_copy_for_a_kexec_is_signed() {
    let (dir, site) = site_with_keys();
    let key = open(&site, "db").unwrap();
    let kernel = [program(b"a kernel"), b"odd".to_vec()].concat();
    let made = key.kexec(&kernel, Path::new("kernel")).unwrap();
    assert_eq!(made, key.kexec(&kernel, Path::new("kernel")).unwrap(), "the same bytes give the same signature");
    let carried = Parts { kexec_signature: Some(&made.signature), ..parts(&kernel, b"initrd") };
    let uki = key.image(&assemble(&stub_bytes(&plain()), &carried).unwrap(), Path::new("uki")).unwrap();

    let pe = Pe::parse(&uki).unwrap();
    let (linux, signature) = (pe.content(&uki, ".linux").unwrap(), pe.content(&uki, kexec::SIGNATURE_SECTION).unwrap());
    assert!(linux == kernel);
    assert!(kexec::copy(linux, signature).unwrap() == made.copy);
    let subsystem = |file: &[u8]| PE::parse(file).unwrap().header.optional_header.unwrap().windows_fields.subsystem;
    assert_eq!((subsystem(linux), subsystem(&made.copy)), (10, 0));
    // What a TPM measures of the UKI does not depend on the section.
    let without = assemble(&stub_bytes(&plain()), &parts(&kernel, b"initrd")).unwrap();
    let pcr11 = |uki: &[u8]| measured(uki, &kernel, None, None).unwrap().pcr11;
    assert_eq!(pcr11(&uki), pcr11(&without));
    assert_eq!(measured(&uki, linux, None, None).unwrap().kernel, hex::encode(&authenticode::digest(&kernel).unwrap()));

    let path = |name: &str| dir.path().join(name).display().to_string();
    let (der, pem) = (site.secure_boot("db.cer").display().to_string(), path("db.pem"));
    if tool("openssl", &["x509", "-inform", "der", "-in", &der, "-out", &pem]).is_none() {
        return;
    }
    let mut started = made.copy.clone();
    started[OPTIONAL + 68] = 10;
    for (what, bytes, good) in [("copy", &made.copy, true), ("kernel", &kernel, false), ("started", &started, false)] {
        std::fs::write(path(what), bytes).unwrap();
        let verdict = tool("sbverify", &["--cert", &pem, &path(what)]).map(|output| output.status.success());
        assert!(verdict.is_none_or(|verdict| verdict == good), "{what}");
    }
}

#[test]
fn openssl_verifies_root_hash_policy_and_certificates() {
    let (dir, site) = site_with_keys();
    let key = open(&site, "db").unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (hash, policy) = ("ab".repeat(32), "policy_name=x policy_version=0.0.1\n");
    std::fs::write(path("hash"), &hash).unwrap();
    std::fs::write(path("other"), "cd".repeat(32)).unwrap();
    std::fs::write(path("detached"), key.detached(hash.as_bytes())).unwrap();
    std::fs::write(path("enclosing"), key.enclosing(policy.as_bytes())).unwrap();
    let cer = site.secure_boot("db.cer").display().to_string();
    let pem = path("db.pem");
    let Some(made) = tool("openssl", &["x509", "-inform", "der", "-in", &cer, "-out", &pem]) else { return };
    assert!(made.status.success());
    let verify = |file: &str, content: Option<&str>| {
        let mut args = vec!["smime", "-verify", "-binary", "-inform", "der", "-noverify", "-nointern"];
        let (file, content) = (path(file), content.map(path));
        args.extend(["-in", &file, "-certfile", &pem]);
        args.extend(content.iter().flat_map(|content| ["-content", content]));
        tool("openssl", &args).unwrap()
    };
    assert!(verify("detached", Some("hash")).status.success());
    assert!(!verify("detached", Some("other")).status.success());
    let enclosed = verify("enclosing", None);
    assert!(enclosed.status.success());
    assert_eq!(enclosed.stdout, policy.as_bytes());
    let text = tool("openssl", &["x509", "-in", &pem, "-noout", "-text"]).unwrap();
    let text = String::from_utf8_lossy(&text.stdout);
    assert!(text.contains("CN = Kiln Secure Boot db of lab") && text.contains("Public-Key: (2048 bit)"), "{text}");
    assert!(text.contains("Signature Algorithm: sha256WithRSAEncryption"), "{text}");
}

#[test]
fn keys_are_made_once_and_are_their_owners_and_enrolment_has_every_form() {
    use std::os::unix::fs::PermissionsExt;
    let (dir, site) = site_with_keys();
    assert!(matches!(init_secure_boot(&site, None, 0), Err(SiteError::SecureBootKeyExists { .. })));
    let prints: BTreeSet<_> = KEYS.iter().map(|name| open(&site, name).unwrap().fingerprint()).collect();
    assert_eq!(prints.len(), 3, "three keys");
    for name in KEYS {
        let mode = std::fs::metadata(site.secure_boot(&format!("{name}.key"))).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    let out = dir.path().join("out");
    let now = "2026-03-01T12:00:00Z".parse().unwrap();
    let done = enroll(&site, &out, None, &BTreeSet::new(), now, &mut Unlock::nobody()).unwrap();
    assert_eq!((done.files.len(), done.revoked), (9, 0));
    for (name, signer) in [("PK", "PK"), ("KEK", "PK"), ("db", "KEK")] {
        let read = |end: &str| std::fs::read(out.join(format!("{name}.{end}"))).unwrap();
        let (cer, esl, auth) = (read("cer"), read("esl"), read("auth"));
        assert_eq!(efi::entries(&esl), Some(vec![efi::Entry::X509(&cer)]));
        assert!(auth.ends_with(&esl), "{name}: the value follows the signature");
        let signer = open(&site, signer).unwrap().certificate;
        assert!(auth.windows(signer.len()).any(|w| w == signer), "{name}: who signed it");
    }
    // A machine's option ROMs: db names them beside the certificate, and is signed with them.
    let allow = BTreeSet::from([[1; 32], [2; 32]]);
    let done = enroll(&site, &out, None, &allow, now, &mut Unlock::nobody()).unwrap();
    assert_eq!((done.files.len(), done.allowed), (9, 2));
    let read = |name: &str| std::fs::read(out.join(name)).unwrap();
    let (cer, esl) = (read("db.cer"), read("db.esl"));
    let expected = vec![efi::Entry::X509(&cer), efi::Entry::Sha256(&[1; 32]), efi::Entry::Sha256(&[2; 32])];
    assert_eq!(efi::entries(&esl), Some(expected));
    assert!(read("db.auth").ends_with(&esl));
    assert!(read("PK.esl").len() < esl.len(), "PK and KEK name keys alone");
    // Without its key nothing is signed, and the message says what to do.
    std::fs::remove_file(site.secure_boot("db.key")).unwrap();
    let error = open(&site, "db").unwrap_err().to_string();
    assert!(error.contains("kiln trust secureboot init") && error.contains("--unsigned"), "{error}");
    std::fs::write(site.secure_boot("db.key"), "nonsense").unwrap();
    assert!(matches!(open(&site, "db"), Err(SiteError::RsaKey { .. })));
}

/// A program that firmware starts, with this in it.
fn program(text: &[u8]) -> Vec<u8> {
    stub_bytes(&Stub {
        sections: vec![(".text".into(), text.repeat(64), 0)],
        headers: 512,
        tail: vec![],
        signed: false,
    })
}

/// A release of `minimal` with this kernel and this boot loader, which the site has signed. `bare`: the kernel in the UKI has no
/// signature, as they are built; else it has, as they were.
fn signed_release(site: &SiteDir, release: u64, kernel: &[u8], bare: bool, loader: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let key = open(site, "db").unwrap();
    let path = Path::new("image");
    let copy = key.kexec(kernel, path).unwrap();
    let linux = if bare { kernel.to_vec() } else { key.image(kernel, path).unwrap() };
    let initrd = format!("initrd {release}").into_bytes();
    let signature = bare.then_some(copy.signature.as_slice());
    let parts = Parts { kexec_signature: signature, ..parts(&linux, &initrd) };
    let uki = key.image(&assemble(&stub_bytes(&plain()), &parts).unwrap(), path).unwrap();
    let named = |bytes: &[u8]| Artifact { sha256: hex::sha256(bytes), length: bytes.len() as u64 };
    let manifest = Manifest {
        uki: named(&uki),
        kernel: named(&linux),
        kexec_kernel: bare.then(|| named(&copy.copy)),
        measured: Some(measured(&uki, &linux, Some(loader), Some(key.fingerprint())).unwrap()),
        ..crate::common::build(site, "minimal", release, "2026-03-01T12:00:00Z".parse().unwrap())
    };
    crate::common::write_manifest(site, &manifest);
    std::fs::write(site.build("minimal", release).join("kiln.efi"), &uki).unwrap();
    (uki, if bare { copy.copy } else { linux })
}

#[test]
fn a_revoked_release_is_named_in_dbx_once() {
    let (dir, site) = site_with_keys();
    let now = "2026-03-01T12:00:00Z".parse().unwrap();
    let (one, two, loaders) = (program(b"one"), program(b"two"), [program(b"loader a"), program(b"loader b")]);
    let (first, old_kernel) = signed_release(&site, 3, &one, false, &loaders[0]);
    let (second, _) = signed_release(&site, 4, &one, false, &loaders[0]);
    let (third, copy) = signed_release(&site, 5, &one, true, &loaders[0]);
    let (fourth, other_copy) = signed_release(&site, 6, &two, true, &loaders[1]);
    let path = site.build("minimal", 3).join("kiln.efi");
    std::fs::write(&path, &second).unwrap();
    let revoke = |release: u64| revoke(&site, "minimal", release, now);
    assert!(matches!(revoke(3), Err(SiteError::ArtifactMismatch { .. })), "another file");
    std::fs::write(&path, &first).unwrap();
    assert!(matches!(revoke(7), Err(SiteError::NotBuilt { .. })));

    let digest = |file: &[u8]| authenticode::digest(file).unwrap();
    let mut expected = Vec::new();
    let mut named = |release: u64, programs: &[&[u8]]| {
        assert!(revoke(release).unwrap());
        assert!(!revoke(release).unwrap(), "once");
        expected.extend(programs.iter().map(|program| digest(program)));
        let out = dir.path().join(format!("out{release}"));
        let done = enroll(&site, &out, None, &BTreeSet::new(), now, &mut Unlock::nobody()).unwrap();
        assert_eq!((done.files.len(), done.revoked), (11, usize::try_from(release).unwrap() - 2), "releases");
        let esl = std::fs::read(out.join("dbx.esl")).unwrap();
        let entries: Vec<_> = expected.iter().map(|digest| efi::Entry::Sha256(digest)).collect();
        assert_eq!(efi::entries(&esl), Some(entries), "{release}");
        assert!(std::fs::read(out.join("dbx.auth")).unwrap().ends_with(&esl));
    };
    named(3, &[&first]); // release 4 has the same signed kernel, and others the loader
    named(4, &[&second, &old_kernel]); // release 5 has that kernel without a signature
    named(5, &[&third, &copy, &loaders[0]]); // release 6 has others
    named(6, &[&fourth, &other_copy]); // the next build may have this loader
    let list = publish_dbx(&site, now, &mut Unlock::nobody()).unwrap();
    assert!(!list.already, "8 programs of 4 releases");

    std::fs::write(site.secure_boot("revoked"), "not a digest minimal/3\n").unwrap();
    let error = enroll(&site, &dir.path().join("out"), None, &BTreeSet::new(), now, &mut Unlock::nobody()).unwrap_err();
    assert!(matches!(error, SiteError::Revoked { line: 1, .. }), "{error}");
}

#[test]
fn encrypted_keys_sign_what_they_signed_before_for_whoever_has_the_passphrase() {
    let (dir, site) = site_with_keys();
    let now = "2026-03-01T12:00:00Z".parse().unwrap();
    let plain = open(&site, "db").unwrap();
    let (print, signed) = (plain.fingerprint(), plain.detached(b"a root hash"));
    let phrase = |text: &str| Passphrase::of_line(text);
    assert_eq!(encrypt_secure_boot(&site, &phrase("correct horse battery"), 10).unwrap().len(), 3);
    for name in KEYS {
        let text = std::fs::read_to_string(site.secure_boot(&format!("{name}.key"))).unwrap();
        assert!(text.contains("kiln-secure-boot-key") && !text.contains("PRIVATE KEY"), "{text}");
    }
    assert!(matches!(open(&site, "db"), Err(SiteError::Encrypted { .. })), "nobody is asked");
    assert_eq!(encrypt_secure_boot(&site, &phrase("another one altogether"), 10).unwrap().len(), 0, "once");

    // One question for all three; what is signed is the same, byte for byte.
    let mut asked = 0;
    let mut unlock = Unlock::by(|_| {
        asked += 1;
        Ok(phrase("correct horse battery"))
    });
    let key = SigningKey::open(&site, "db", &mut unlock).unwrap();
    assert_eq!((key.fingerprint(), key.detached(b"a root hash")), (print, signed));
    enroll(&site, &dir.path().join("out"), None, &BTreeSet::new(), now, &mut unlock).unwrap();
    assert!(unlock.plain().is_empty());
    drop(unlock);
    assert_eq!(asked, 1);

    let mut wrong = Unlock::by(|_| Ok(phrase("correct horse batterz")));
    let error = SigningKey::open(&site, "KEK", &mut wrong).unwrap_err();
    assert!(matches!(&error, SiteError::WrongPassphrase { path } if path.ends_with("KEK.key")), "{error}");
    // A key and a certificate that do not belong together.
    std::fs::copy(site.secure_boot("PK.cer"), site.secure_boot("db.cer")).unwrap();
    let mut right = Unlock::by(|_| Ok(phrase("correct horse battery")));
    assert!(matches!(SigningKey::open(&site, "db", &mut right), Err(SiteError::KeyFile { .. })));
    // New keys are encrypted from the beginning on; plain ones are named.
    std::fs::remove_dir_all(site.secure_boot("")).unwrap();
    init_secure_boot(&site, Some(&phrase("correct horse battery")), 10).unwrap();
    assert!(SigningKey::open(&site, "db", &mut right).is_ok() && right.plain().is_empty());
    let (_other, lab) = site_with_keys();
    SigningKey::open(&lab, "db", &mut right).unwrap();
    assert_eq!(right.plain(), [lab.secure_boot("db.key")]);
}
