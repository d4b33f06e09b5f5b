//! What may not be linked in: I/O in the pure crates, and cryptography other than ring anywhere.
//!
//! The other half of the purity rule, what the sources may name, is each pure crate's clippy.toml.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::Command;

const PURE: [&str; 4] = ["kiln-protocol", "kiln-release", "kiln-netboot", "kiln-fleet"];
const IMPURE_CRATES: [&str; 8] = ["tokio", "mio", "socket2", "hyper", "reqwest", "sqlx", "axum", "nix"];
/// A second cryptography library doubles what must be trusted and kept patched.
const BANNED: [&str; 3] = ["aws-lc-sys", "aws-lc-rs", "openssl-sys"];

fn tree(args: &[&str]) -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let out = Command::new(env!("CARGO"))
        .args(["tree", "--locked", "--prefix", "none", "--format", "{p}"])
        .args(args)
        .current_dir(root)
        .output()
        .unwrap();
    assert!(out.status.success(), "cargo tree {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    let names: Vec<String> = String::from_utf8(out.stdout)
        .unwrap()
        .lines()
        .filter_map(|line| line.split_whitespace().next().map(str::to_owned))
        .collect();
    assert!(!names.is_empty(), "cargo tree {args:?} listed nothing");
    names
}

#[test]
fn pure_crates_link_no_io() {
    for crate_name in PURE {
        let names = tree(&["-e", "normal", "-p", crate_name]);
        assert_eq!(names[0], crate_name);
        let found: Vec<&String> = names.iter().filter(|n| IMPURE_CRATES.contains(&n.as_str())).collect();
        assert!(found.is_empty(), "{crate_name} is a pure crate, but links {found:?}");
    }
}

#[test]
fn no_crate_links_banned_cryptography() {
    let names = tree(&["--workspace", "-e", "normal,build", "--target", "all"]);
    for banned in BANNED {
        assert!(!names.iter().any(|n| n == banned), "{banned} is linked in: `cargo tree -i {banned}` says by whom");
    }
}

#[test]
fn every_pure_crate_has_its_list_of_disallowed_names() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    for dir in ["agent/protocol", "images/release", "server/netboot", "server/fleet"] {
        let list = std::fs::read_to_string(root.join(dir).join("clippy.toml")).unwrap();
        for name in ["std::time::Instant::now", "std::time::SystemTime::now", "jiff::Timestamp::now", "std::fs::read"] {
            assert!(list.contains(name), "{dir}/clippy.toml does not disallow {name}");
        }
        let lib = std::fs::read_to_string(root.join(dir).join("src/lib.rs")).unwrap();
        for attribute in ["#![forbid(unsafe_code)]", "#![deny(missing_docs)]"] {
            assert!(lib.contains(attribute), "{dir}/src/lib.rs lacks {attribute}");
        }
    }
}

/// No clock of a machine is believed: what decides, what verifies and TLS take the time floor. Those named here tell people
/// when something happened, or look how far the clock is off.
#[test]
fn nothing_that_decides_reads_the_clock() {
    const MAY: [&str; 4] = ["exec/guard.rs", "service/watch.rs", "spool.rs", "testing/mod.rs"];
    fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                sources(&path, found);
            } else if path.extension().is_some_and(|end| end == "rs") {
                found.push(path);
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("agent/src");
    let mut all = Vec::new();
    sources(&root, &mut all);
    assert!(all.len() > 80, "{all:?}");
    for file in all {
        let name = file.strip_prefix(&root).unwrap().display().to_string();
        let source = std::fs::read_to_string(&file).unwrap();
        for clock in ["Timestamp::now", "SystemTime", "Zoned::now", "CLOCK_REALTIME", "UnixTime::now"] {
            let reads = source.contains(clock);
            assert!(!reads || MAY.contains(&name.as_str()), "{name} reads the machine's clock: {clock}");
        }
    }
}
