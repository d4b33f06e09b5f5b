//! tough, AWS' implementation of TUF, as a program: it judges random repositories, reads what Kiln publishes, and writes
//! what Kiln shall read. `make oracle-tough` builds and runs it.

mod files;
mod judge;
mod write;

use files::Files;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Whatever went wrong, for a person.
type Failure = Box<dyn std::error::Error + Send + Sync>;

const USAGE: &str = "usage: kiln-tough judge            (cases and verdicts, one a line)
       kiln-tough read REPOSITORY ROOT TARGET...
       kiln-tough write FOLDER EXPIRES";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kiln-tough: {}", why(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    match arguments.as_slice() {
        ["judge"] => runtime.block_on(judge::run()),
        ["read", repository, root, targets @ ..] => {
            runtime.block_on(read(Path::new(repository), Path::new(root), targets))
        }
        ["write", folder, expires] => runtime.block_on(write::run(Path::new(folder), expires)),
        _ => Err(USAGE.into()),
    }
}

/// Updates from a folder and prints each target's text.
async fn read(repository: &Path, root: &Path, targets: &[&str]) -> Result<(), Failure> {
    let root = std::fs::read(root).map_err(|e| format!("{}: {e}", root.display()))?;
    let store = tempfile::tempdir()?;
    let repository = judge::load(&root, Files::Folder(PathBuf::from(repository)), store.path()).await?;
    for path in targets {
        let bytes = judge::target(&repository, path).await?.ok_or_else(|| format!("{path}: not listed"))?;
        println!("{}", String::from_utf8_lossy(&bytes).trim());
    }
    Ok(())
}

/// An error with all its causes, in one line.
fn why(error: &(dyn std::error::Error + 'static)) -> String {
    let mut words = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        words.push_str("; ");
        words.push_str(&error.to_string());
        cause = error.source();
    }
    words.replace('\n', " ")
}
