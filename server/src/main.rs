//! `kiln`: the boot server, and the operator's command line.

use std::process::ExitCode;

fn main() -> ExitCode {
    kiln_server::cli::main()
}
