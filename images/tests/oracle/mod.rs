//! Other people's programs, asked for a second opinion. The crates that ask share this file.
#![allow(dead_code)] // each crate that shares it uses a part

/// Set by `make test`, whose set-up installs those that are Debian's: what is missing then fails, lest a test pass that asked
/// nobody.
const ALL_THERE: &str = "KILN_ORACLES";

/// A test is cut short, because another program is not there.
#[track_caller]
pub fn skipped(why: &str) {
    assert!(std::env::var_os(ALL_THERE).is_none(), "{ALL_THERE} is set, and {why}");
    std::println!("skipped: {why}");
}

/// The same of what no set-up installs, because it comes from a registry of programs that may be out of reach.
pub fn out_of_reach(why: &str) {
    std::println!("skipped: {why}");
}
