//! On a real tmpfs: /dev/shm.

use super::*;
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

fn place() -> tempfile::TempDir {
    tempfile::Builder::new().tempdir_in("/dev/shm").unwrap()
}

fn keeper(place: &Path, wanted: &[WantedSecret]) -> Keeper {
    Keeper::at(place, Path::new("/etc/passwd"), wanted)
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
    assert_eq!(Keeper::at(dir.path(), Path::new("/"), &wanted).held(), keeper.held());
    std::fs::remove_file(dir.path().join("key")).unwrap();
    assert!(Keeper::at(dir.path(), Path::new("/"), &wanted).missing().unwrap().contains("the secret key"));

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
    let mut mine = Keeper::at(dir.path(), &passwd, &[secret("me")]);
    mine.put(&set(&[("a", 1, b"v")])).unwrap();
    assert_eq!(std::fs::metadata(dir.path().join("a")).unwrap().uid(), own.uid());
    let mut nobodys = Keeper::at(dir.path(), &passwd, &[secret("nobody-here")]);
    let error = nobodys.put(&set(&[("a", 2, b"v")])).unwrap_err().to_string();
    assert!(error.contains("no user nobody-here"), "{error}");
}

#[test]
fn nothing_is_put_where_a_disk_may_be() {
    // The kernel's own table of this process: no tmpfs, on any host.
    let mut keeper = Keeper::at(Path::new("/proc/self"), Path::new("/etc/passwd"), &[want("a", true, &[])]);
    let error = keeper.put(&set(&[("a", 1, b"value")])).unwrap_err();
    assert_eq!(error.kind(), "machine-secrets");
    assert!(!error.to_string().contains("value"));
}

#[test]
fn a_release_that_wants_none_says_none() {
    let keeper = keeper(Path::new("/nowhere"), &[]);
    assert_eq!((keeper.held(), keeper.missing()), (None, None));
}
