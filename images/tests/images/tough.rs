//! tough, AWS' implementation of TUF.
//!
//! tough is a program of its own (`images/tests/tough`), so that what it links stays out of the workspace. Where
//! `KILN_TOUGH` does not name it, the tests say so and pass, but not under `KILN_REGISTRIES`; `make oracle-tough` and `make
//! test-slow` build it and set that.

use crate::both_ways::Other;
use std::path::PathBuf;

/// The program.
pub fn tough() -> Option<PathBuf> {
    let named = std::env::var_os("KILN_TOUGH").map(PathBuf::from);
    if named.is_none() {
        crate::oracle::out_of_reach("KILN_TOUGH names no program; `make oracle-tough` builds it");
    }
    named
}

#[test]
fn tough_reads_what_kiln_publishes_and_kiln_reads_what_tough_writes() {
    let Some(tough) = tough() else { return };
    let refusal = "Signature threshold of 1 not met for role timestamp (0 valid signatures)";
    Other { program: &tough, arguments: &[], refusal }.reads_kiln_and_is_read();
}
