//! What may not be linked in: I/O in the pure crates, and cryptography other than ring anywhere.
//!
//! The other half of the purity rule, what the sources may name, is each pure crate's clippy.toml.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
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

/// Files whose name ends so, below a folder; not what a build leaves.
fn files(folder: &Path, end: &str, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            files(&path, end, found);
        } else if path.extension().is_some_and(|is| is == end) {
            found.push(path);
        }
    }
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
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("agent/src");
    let mut all = Vec::new();
    files(&root, "rs", &mut all);
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

/// What the documents say is shown by a test is shown by one that there is. A test's name has three underscores or more and stands in
/// backquotes; one that ends with … is given by its beginning.
#[test]
fn every_test_that_the_documents_name_is_there() {
    /// Functions of the kernel, a system call, keys of a recipe.
    const NO_TEST: [&str; 5] = [
        "ima_add_template_entry",
        "network_lost_per_million",
        "open_by_handle_at",
        "refuse_foreign_command_line",
        "verify_pkcs7_message_sig",
    ];
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let (mut sources, mut documents) = (Vec::new(), Vec::new());
    files(root, "rs", &mut sources);
    files(&root.join("docs"), "md", &mut documents);
    let is_part = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    let mut there = BTreeSet::new();
    for file in sources {
        let text = std::fs::read_to_string(&file).unwrap();
        there.extend(text.match_indices("fn ").map(|(at, fun)| {
            let name = &text[at + fun.len()..];
            name[..name.find(|c: char| !is_part(c)).unwrap_or(name.len())].to_owned()
        }));
    }
    let (mut named, mut missing) = (0, Vec::new());
    for file in documents {
        let text = std::fs::read_to_string(&file).unwrap();
        for word in text.lines().flat_map(|line| line.split('`').skip(1).step_by(2)) {
            let name = word.rsplit("::").next().unwrap_or(word);
            let (name, beginning) = name.strip_suffix('…').map_or((name, false), |name| (name, true));
            if name.matches('_').count() < 3 || !name.chars().all(is_part) || NO_TEST.contains(&name) {
                continue;
            }
            named += 1;
            let found = if beginning { there.iter().any(|fun| fun.starts_with(name)) } else { there.contains(name) };
            if !found {
                missing.push(format!("{}: {word}", file.strip_prefix(root).unwrap().display()));
            }
        }
    }
    assert!(named > 80, "{named}");
    assert!(missing.is_empty(), "{missing:#?}");
}

/// Nothing is said to be stopped without a word of what is not.
#[test]
fn every_row_of_the_threat_model_says_what_remains() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("docs/threat-model.md");
    let text = std::fs::read_to_string(path).unwrap();
    let (mut in_table, mut rows) = (false, 0);
    for line in text.lines() {
        let Some(row) = line.strip_prefix("| ") else {
            in_table &= line.starts_with("|---");
            continue;
        };
        let cells: Vec<&str> = row.trim_end_matches('|').split(" | ").map(str::trim).collect();
        if cells.last() == Some(&"what remains") {
            in_table = true;
        } else if in_table {
            assert!(cells.len() == 4 && cells.iter().all(|cell| !cell.is_empty()), "{line}");
            rows += 1;
        }
    }
    assert!(rows > 60, "{rows}");
}
