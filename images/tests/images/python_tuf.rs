//! The reference implementation of TUF.
//!
//! Where it cannot be installed (no Python, no network) the test says so and passes, but not under `KILN_REGISTRIES`.

use crate::both_ways::Other;
use crate::python::python;

#[test]
fn python_reads_what_kiln_publishes_and_kiln_reads_what_python_writes() {
    let Some(python) = python() else { return };
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/python_tuf.py");
    let refusal = "timestamp was signed by 0/1 keys";
    Other { program: &python, arguments: &[script], refusal }.reads_kiln_and_is_read();
}
