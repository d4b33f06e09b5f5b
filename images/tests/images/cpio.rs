//! What the cpio writer writes, GNU cpio reads back the same.

use kiln_images::cpio::{Archive, Node};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

fn extract(bytes: &[u8], into: &std::path::Path) {
    let file = into.join("../archive.cpio");
    std::fs::write(&file, bytes).unwrap();
    let status = Command::new("cpio")
        .args(["--extract", "--quiet", "--no-absolute-filenames"])
        .current_dir(into)
        .stdin(Stdio::from(std::fs::File::open(&file).unwrap()))
        .status()
        .expect("cpio is needed by this test: apt-get install cpio");
    assert!(status.success());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn gnu_cpio_extracts_the_same_tree(
        files in prop::collection::btree_map("d[a-c]/[a-z]{1,40}", (prop::collection::vec(any::<u8>(), 0..9000), 0o400_u32..0o777), 0..12),
        link in "[a-z/]{1,60}",
    ) {
        let mut archive = Archive::default();
        for (path, (bytes, mode)) in &files {
            archive.add(path, mode | 0o400, Node::File(bytes.clone())).unwrap();
        }
        archive.add("link", 0o777, Node::Symlink(link.clone())).unwrap();
        let bytes = archive.into_bytes(86_400);
        let temp = tempfile::tempdir().unwrap();
        let root = temp.path().join("root");
        std::fs::create_dir(&root).unwrap();
        extract(&bytes, &root);

        let target = std::fs::read_link(root.join("link")).unwrap();
        prop_assert_eq!(target.to_str().unwrap(), link.as_str());
        let mut found = BTreeMap::new();
        for directory in std::fs::read_dir(&root).unwrap().map(|entry| entry.unwrap().path()) {
            if directory.symlink_metadata().unwrap().is_dir() {
                for file in std::fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path()) {
                    let mode = file.metadata().unwrap().permissions().mode() & 0o7777;
                    let name = file.strip_prefix(&root).unwrap().to_str().unwrap().to_owned();
                    found.insert(name, (std::fs::read(&file).unwrap(), mode));
                }
            }
        }
        let expected: BTreeMap<_, _> = files.into_iter().map(|(path, (bytes, mode))| (path, (bytes, mode | 0o400))).collect();
        prop_assert_eq!(found, expected);
    }
}

#[test]
fn gnu_cpio_lists_devices_owners_and_times() {
    let mut archive = Archive::default();
    archive.add("dev/console", 0o600, Node::CharDevice { major: 5, minor: 1 }).unwrap();
    archive.add("init", 0o755, Node::File(b"x".to_vec())).unwrap();
    let temp = tempfile::tempdir().unwrap();
    let file = temp.path().join("a.cpio");
    std::fs::write(&file, archive.into_bytes(0)).unwrap();
    let output = Command::new("cpio")
        .args(["--list", "--verbose", "--numeric-uid-gid", "--quiet"])
        .env("TZ", "UTC")
        .env("LC_ALL", "C")
        .stdin(Stdio::from(std::fs::File::open(&file).unwrap()))
        .output()
        .unwrap();
    let lines: Vec<String> = String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect();
    assert_eq!(
        lines,
        [
            "drwxr-xr-x 2 0 0 0 Jan 1 1970 dev",
            "crw------- 1 0 0 5, 1 Jan 1 1970 dev/console",
            "-rwxr-xr-x 1 0 0 1 Jan 1 1970 init"
        ]
    );
}
