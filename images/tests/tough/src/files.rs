//! Where a repository's files come from.

use futures_util::stream;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use tough::{Bytes, Transport, TransportError, TransportErrorKind, TransportStream, async_trait};
use url::Url;

/// A repository's files by their paths under its base URL.
#[derive(Debug, Clone)]
pub enum Files {
    Memory(Arc<BTreeMap<String, Vec<u8>>>),
    Folder(PathBuf),
}

impl Files {
    fn get(&self, path: &str) -> Option<Vec<u8>> {
        match self {
            Self::Memory(files) => files.get(path).cloned(),
            Self::Folder(folder) => std::fs::read(folder.join(path)).ok(),
        }
    }
}

#[async_trait]
impl Transport for Files {
    async fn fetch(&self, url: Url) -> Result<TransportStream, TransportError> {
        let path = place(url.path().trim_start_matches('/'));
        let bytes = self.get(&path).ok_or_else(|| TransportError::new(TransportErrorKind::FileNotFound, &url))?;
        Ok(Box::pin(stream::iter([Ok(Bytes::from(bytes))])))
    }
}

/// Where TUF (§6.2) has what tough asks for: tough puts a target's hash before its whole path, `HASH.FOLDER/FILE`, and
/// the specification before its file name, `FOLDER/HASH.FILE`.
fn place(path: &str) -> String {
    let nested = || {
        let (hash, name) = path.strip_prefix("targets/")?.split_once('.')?;
        let (folder, file) = name.rsplit_once('/')?;
        let is_hash = hash.len() == 64 && hash.bytes().all(|b| b.is_ascii_hexdigit());
        is_hash.then(|| format!("targets/{folder}/{hash}.{file}"))
    };
    nested().unwrap_or_else(|| path.to_owned())
}
