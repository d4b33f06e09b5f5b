//! Other people's programs, asked for a second opinion. The crates that ask share this file.
#![allow(dead_code)]

/// Set by `make test`, whose set-up installs them all: what is missing then fails, lest a test pass that asked nobody.
const ALL_THERE: &str = "KILN_ORACLES";

/// A test is cut short, because another program is not there.
#[track_caller]
pub fn skipped(why: &str) {
    assert!(std::env::var_os(ALL_THERE).is_none(), "{ALL_THERE} is set, and {why}");
    std::println!("skipped: {why}");
}
