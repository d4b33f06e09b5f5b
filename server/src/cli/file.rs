//! Files that a command is given, read whole and no longer than they may be.

use super::error::CliError;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// A file of at most `limit` bytes.
pub(super) fn read(path: &Path, limit: u64) -> Result<Vec<u8>, CliError> {
    let file = |source| CliError::File { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    File::open(path).and_then(|f| f.take(limit.saturating_add(1)).read_to_end(&mut bytes)).map_err(file)?;
    if bytes.len() as u64 > limit {
        return Err(CliError::TooLong { path: path.to_owned(), limit });
    }
    Ok(bytes)
}

/// The same, of text.
pub(super) fn read_text(path: &Path, limit: u64) -> Result<String, CliError> {
    String::from_utf8(read(path, limit)?).map_err(|_| {
        let source = std::io::Error::new(std::io::ErrorKind::InvalidData, "it is no UTF-8 text");
        CliError::File { path: path.to_owned(), source }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_longer_than_it_may_be_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "four").unwrap();
        assert_eq!(read_text(&path, 4).unwrap(), "four");
        assert!(matches!(read(&path, 3), Err(CliError::TooLong { limit: 3, .. })));
        std::fs::write(&path, [0xff]).unwrap();
        assert!(read_text(&path, 4).unwrap_err().to_string().contains("UTF-8"));
    }
}
