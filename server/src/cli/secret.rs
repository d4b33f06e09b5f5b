//! Passphrases, typed at the terminal without echo or read from a file.

use super::error::CliError;
use kiln_images::sealed::Passphrase;
use nix::sys::termios::{LocalFlags, SetArg, Termios, tcgetattr, tcsetattr};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;

/// Longest line that is read.
const MAX_LINE: u64 = 4 << 10;

/// A key's passphrase.
pub(super) fn passphrase(from: Option<&Path>, key: &Path) -> Result<Passphrase, CliError> {
    match from {
        Some(file) => of_file(file),
        None => Terminal::open()?.secret(&format!("passphrase of {}: ", key.display())),
    }
}

/// The passphrase of a new key: typed twice, and long enough.
pub(super) fn new_passphrase(from: Option<&Path>) -> Result<Passphrase, CliError> {
    if let Some(file) = from {
        return Ok(of_file(file)?.check_new()?);
    }
    let mut terminal = Terminal::open()?;
    let first = terminal.line("new passphrase: ", true)?;
    if first != terminal.line("the same again: ", true)? {
        return Err(CliError::PassphrasesDiffer);
    }
    Ok(Passphrase::of_line(&first).check_new()?)
}

/// A person says yes, or nothing is done.
pub(super) fn consent(prompt: &str) -> Result<(), CliError> {
    let said = Terminal::open()?.line(prompt, false)?;
    if said.trim() == "yes" { Ok(()) } else { Err(CliError::NotConfirmed) }
}

fn of_file(file: &Path) -> Result<Passphrase, CliError> {
    let failed = |source| CliError::File { path: file.to_owned(), source };
    let mut line = String::new();
    let mut reader = BufReader::new(std::io::Read::take(File::open(file).map_err(failed)?, MAX_LINE));
    reader.read_line(&mut line).map_err(failed)?;
    Ok(Passphrase::of_line(&line))
}

/// The terminal that started this program, whatever its input is.
struct Terminal {
    reader: BufReader<File>,
}

impl Terminal {
    fn open() -> Result<Self, CliError> {
        let file = OpenOptions::new().read(true).write(true).open("/dev/tty").map_err(CliError::NoTerminal)?;
        Ok(Self { reader: BufReader::new(file) })
    }

    fn secret(&mut self, prompt: &str) -> Result<Passphrase, CliError> {
        Ok(Passphrase::of_line(&self.line(prompt, true)?))
    }

    fn line(&mut self, prompt: &str, secret: bool) -> Result<String, CliError> {
        let mut file = self.reader.get_ref().try_clone().map_err(CliError::NoTerminal)?;
        write!(file, "{prompt}").map_err(CliError::NoTerminal)?;
        let silent = if secret { Some(Silent::new(file)?) } else { None };
        let mut line = String::new();
        self.reader.read_line(&mut line).map_err(CliError::NoTerminal)?;
        drop(silent);
        Ok(line)
    }
}

/// No echo while it lives.
struct Silent {
    file: File,
    before: Termios,
}

impl Silent {
    fn new(file: File) -> Result<Self, CliError> {
        let failed = |error: nix::errno::Errno| CliError::NoTerminal(error.into());
        let before = tcgetattr(&file).map_err(failed)?;
        let mut silent = before.clone();
        silent.local_flags.remove(LocalFlags::ECHO);
        tcsetattr(&file, SetArg::TCSAFLUSH, &silent).map_err(failed)?;
        Ok(Self { file, before })
    }
}

impl Drop for Silent {
    fn drop(&mut self) {
        let _ = tcsetattr(&self.file, SetArg::TCSAFLUSH, &self.before);
        let _ = writeln!(self.file);
    }
}
