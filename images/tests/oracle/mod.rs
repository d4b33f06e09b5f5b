//! Other people's programs, asked for a second opinion. The crates that ask share this file.
#![allow(dead_code)] // each crate that shares it uses a part
#![allow(clippy::disallowed_methods, clippy::disallowed_types)] // the tests of pure crates ask as well

/// Set by `make test`, whose set-up installs those that are Debian's: what is missing then fails, lest a test pass that asked
/// nobody.
const ALL_THERE: &str = "KILN_ORACLES";
/// Set by `make test-slow`: what comes from PyPI, npm and crates.io must be there as well.
const REGISTRIES: &str = "KILN_REGISTRIES";
/// A file that takes a line for each test that was cut short: libtest shows nothing of tests that pass.
const SKIPS: &str = "KILN_SKIPS";

/// A test is cut short, because another program is not there.
#[track_caller]
pub fn skipped(why: &str) {
    assert!(std::env::var_os(ALL_THERE).is_none(), "{ALL_THERE} is set, and {why}");
    tell(why);
}

/// The same of what no set-up installs, because it comes from a registry of programs that may be out of reach.
#[track_caller]
pub fn out_of_reach(why: &str) {
    assert!(std::env::var_os(REGISTRIES).is_none(), "{REGISTRIES} is set, and {why}");
    tell(why);
}

/// The same for want of root, which no set-up can give to a test: `make test` is an ordinary user's as well.
pub fn unprivileged(why: &str) {
    tell(why);
}

fn tell(why: &str) {
    std::println!("skipped: {why}");
    let Some(path) = std::env::var_os(SKIPS) else { return };
    let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
    // In one piece: other tests write beside this one.
    let told = file.and_then(|mut file| std::io::Write::write_all(&mut file, format!("{why}\n").as_bytes()));
    told.expect("KILN_SKIPS names a file that can be written");
}
