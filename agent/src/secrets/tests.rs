//! On a real tmpfs: /dev/shm.

use super::*;
use kiln_protocol::{IssuedCertificate, Standing, possession};
use kiln_release::{CertificatePolicy, IDENTITY_NAME, MACHINE_CA_NAME, hex};
use ring::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use std::os::unix::fs::{MetadataExt, PermissionsExt};

fn want(name: &str, required: bool, units: &[&str]) -> WantedSecret {
    WantedSecret {
        name: name.into(),
        owner: None,
        required,
        units: units.iter().map(|unit| (*unit).to_owned()).collect(),
    }
}

fn set<'a>(list: &[(&str, u64, &'a [u8])]) -> SecretSet<'a> {
    SecretSet(list.iter().map(|(name, version, value)| (name.parse().unwrap(), (*version, *value))).collect())
}

pub(crate) fn place() -> tempfile::TempDir {
    tempfile::Builder::new().tempdir_in("/dev/shm").unwrap()
}

fn keeper(place: &Path, wanted: &[WantedSecret]) -> Keeper {
    Keeper::at(place, Path::new("/etc/passwd"), wanted, None)
}

#[test]
fn units_wait_for_all_that_is_required_and_hear_of_what_is_new() {
    let dir = place();
    let wanted =
        [want("db", true, &["app.service"]), want("key", true, &["web.service", "app.service"]), want("c", false, &[])];
    let mut keeper = keeper(dir.path(), &wanted);
    assert!(keeper.missing().unwrap().starts_with("the secret db has not come"));
    keeper.refuse("it is not attested".into());
    assert_eq!(keeper.missing().unwrap(), "the secret db has not come: it is not attested");

    // One of two, and one that the release does not want.
    assert_eq!(keeper.put(&set(&[("db", 3, b"first"), ("other", 4, b"x")])).unwrap(), Vec::<String>::new());
    assert!(keeper.missing().unwrap().starts_with("the secret key has not come: the server"));
    assert!(!dir.path().join("other").exists());
    let file = dir.path().join("db");
    assert_eq!(std::fs::read(&file).unwrap(), b"first");
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o7777, 0o400);

    assert_eq!(keeper.put(&set(&[("db", 3, b"first"), ("key", 5, b"k")])).unwrap(), ["app.service", "web.service"]);
    assert_eq!((keeper.missing(), keeper.held().unwrap().len()), (None, 2));
    // Rotation: those of what is new, and whoever has the old file open keeps the old value whole.
    let old = std::fs::File::open(&file).unwrap();
    assert_eq!(keeper.put(&set(&[("db", 9, b"second"), ("key", 5, b"k")])).unwrap(), ["app.service"]);
    assert_eq!((std::fs::read(&file).unwrap(), old.metadata().unwrap().len()), (b"second".to_vec(), 5));
    assert_eq!(keeper.put(&set(&[("db", 9, b"second"), ("key", 5, b"k")])).unwrap(), Vec::<String>::new());

    // A later start of the service knows what it holds; what was taken away is not held.
    assert_eq!(Keeper::at(dir.path(), Path::new("/"), &wanted, None).held(), keeper.held());
    std::fs::remove_file(dir.path().join("key")).unwrap();
    assert!(Keeper::at(dir.path(), Path::new("/"), &wanted, None).missing().unwrap().contains("the secret key"));

    // One that was removed goes, and then all.
    keeper.put(&set(&[("key", 5, b"k")])).unwrap();
    assert!(!file.exists() && keeper.missing().is_some());
    assert!(keeper.drop_all().unwrap() && !keeper.drop_all().unwrap());
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!((left, keeper.held().unwrap().len()), (vec![VERSIONS.into()], 0));
}

#[test]
fn an_owner_is_looked_up_in_the_root() {
    let dir = place();
    let passwd = dir.path().join("passwd");
    let own = std::fs::metadata(dir.path()).unwrap();
    std::fs::write(&passwd, format!("root:x:0:0::/:/x\nme:x:{}:{}::/:/x\n", own.uid(), own.gid())).unwrap();
    let secret = |owner: &str| WantedSecret { owner: Some(owner.into()), ..want("a", true, &[]) };
    let mut mine = Keeper::at(dir.path(), &passwd, &[secret("me")], None);
    mine.put(&set(&[("a", 1, b"v")])).unwrap();
    assert_eq!(std::fs::metadata(dir.path().join("a")).unwrap().uid(), own.uid());
    let mut nobodys = Keeper::at(dir.path(), &passwd, &[secret("nobody-here")], None);
    let error = nobodys.put(&set(&[("a", 2, b"v")])).unwrap_err().to_string();
    assert!(error.contains("no user nobody-here"), "{error}");
}

#[test]
fn nothing_is_put_where_a_disk_may_be() {
    // The kernel's own table of this process: no tmpfs, on any host.
    let mut keeper = Keeper::at(Path::new("/proc/self"), Path::new("/etc/passwd"), &[want("a", true, &[])], None);
    let error = keeper.put(&set(&[("a", 1, b"value")])).unwrap_err();
    assert_eq!(error.kind(), "machine-secrets");
    assert!(!error.to_string().contains("value"));
}

#[test]
fn a_release_that_wants_none_says_none() {
    let keeper = keeper(Path::new("/nowhere"), &[]);
    assert_eq!((keeper.held(), keeper.missing()), (None, None));
}

pub(crate) fn asked() -> (identity::NewKey, kiln_protocol::CertificateRequest) {
    let machine = "00000000-0000-0000-0000-000000000001".parse().unwrap();
    request(&machine, &"ab".repeat(32).parse().unwrap(), "boot").unwrap()
}

pub(crate) fn issued(certificate: &str) -> IssuedCertificate {
    IssuedCertificate { certificate: certificate.into(), ca: "CA\n".into(), serial: "40".into(), lasts_s: 100 }
}

#[test]
fn a_request_proves_the_key_that_it_names() {
    let ((_, one), (_, two)) = (asked(), asked());
    assert_ne!(one.public_key, two.public_key, "each is fresh");
    let identity = "ab".repeat(32).parse().unwrap();
    let key = UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, &one.public_key.0);
    let message = |boot_id| possession(&one.machine, &identity, boot_id, &one.public_key.0);
    key.verify(&message("boot"), &one.proof.0).unwrap();
    assert!(key.verify(&message("another"), &one.proof.0).is_err());
}

#[test]
fn key_and_certificate_come_together_and_stay_until_they_are_over() {
    let dir = place();
    let wanted = WantedCertificate {
        owner: None,
        required: true,
        units: vec!["web.service".into()],
        policy: CertificatePolicy::Approved,
    };
    let secrets = [want("db", true, &["app.service"])];
    let again = || Keeper::at(dir.path(), Path::new("/etc/passwd"), &secrets, Some(&wanted));
    let mut keeper = again();
    let file = dir.path().join(IDENTITY_NAME);
    assert_eq!(keeper.standing(0), Some(Standing::Over), "it is asked for");
    assert_eq!(keeper.put(&set(&[("db", 1, b"v")])).unwrap(), Vec::<String>::new(), "units wait for both");
    assert!(keeper.missing().unwrap().contains("certificate has not come: the server was not asked yet"));
    keeper.uncertified("nobody approved it (not-in-service)".into());
    assert!(keeper.missing().unwrap().ends_with("has not come: nobody approved it (not-in-service)"));

    let life = Life { issued: 1_000, expires: 101_000, jitter: 0 };
    let (key, request) = asked();
    assert_eq!(keeper.certify(&key, &issued("FIRST\n"), life).unwrap(), ["app.service", "web.service"]);
    assert_eq!((keeper.missing(), keeper.standing(1_000)), (None, Some(Standing::Fresh)));
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(text.ends_with("-----END PRIVATE KEY-----\nFIRST\n"), "{text}");
    let der = hex::pem_decode("PRIVATE KEY", &text).unwrap();
    assert!(der.windows(65).any(|piece| piece == request.public_key.0), "it is the key that was certified");
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode(&file), mode(&dir.path().join(MACHINE_CA_NAME))), (0o400, 0o444));

    // Renewed: one file takes the other's place, whole.
    let old = std::fs::File::open(&file).unwrap();
    let life = Life { issued: 51_000, expires: 151_000, jitter: 255 };
    assert_eq!(keeper.certify(&asked().0, &issued("SECOND\n"), life).unwrap(), ["web.service"]);
    assert!(std::fs::read_to_string(&file).unwrap().ends_with("SECOND\n"));
    assert_eq!(old.metadata().unwrap().len(), text.len() as u64);
    // A later start of the service knows how it stands.
    assert_eq!((again().standing(100_999), again().standing(120_000)), (Some(Standing::Fresh), Some(Standing::Renew)));

    // Refused from now on: it stays until it is over, and not longer.
    keeper.uncertified("retired (not-in-service)".into());
    assert!(!keeper.expire(150_999).unwrap() && file.exists() && keeper.missing().is_none());
    let old = std::fs::File::open(&file).unwrap();
    assert!(keeper.expire(151_000).unwrap() && !file.exists() && !keeper.expire(151_000).unwrap());
    // As the agent is; another user cannot open for writing what nobody may write.
    if nix::unistd::geteuid().is_root() {
        let mut left = Vec::new();
        std::io::Read::read_to_end(&mut &old, &mut left).unwrap();
        assert!(!left.is_empty() && left.iter().all(|byte| *byte == 0), "its pages are overwritten");
    }
    assert!(keeper.missing().unwrap().ends_with("has not come: retired (not-in-service)"));
    assert_eq!(again().standing(0), Some(Standing::Over));
}

#[test]
fn a_release_that_wants_no_certificate_is_given_none() {
    let dir = place();
    let mut keeper = keeper(dir.path(), &[]);
    assert_eq!(keeper.standing(0), None);
    let life = Life { issued: 0, expires: 1_000, jitter: 0 };
    assert!(keeper.certify(&asked().0, &issued("X"), life).unwrap().is_empty());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}
