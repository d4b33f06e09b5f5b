//! Another key for the site's machine CA, in steps that a person takes, so that no program refuses a machine meanwhile. The next
//! CA is announced: it is told beside the one that signs, for whoever verifies machines to fetch. Then it signs, and the one
//! before is told beside it with its list, until what that signed is over. Then that is forgotten.
//!
//! Files of the site's `online/` alone: a server reads them when it starts.

use crate::error::CertificateError;
use crate::machine_ca::{Ca, Which};
use std::fs::File;
use std::path::{Path, PathBuf};

fn file(path: &Path) -> impl FnOnce(std::io::Error) -> CertificateError + '_ {
    move |source| CertificateError::File { path: path.to_owned(), source }
}

fn rename(from: &Path, to: &Path) -> Result<(), CertificateError> {
    std::fs::rename(from, to).map_err(file(from))
}

fn sync(online: &Path) -> Result<(), CertificateError> {
    File::open(online).and_then(|folder| folder.sync_all()).map_err(file(online))
}

/// Makes the CA that follows, whole or not at all. Nothing is signed by it.
pub fn announce(online: &Path, site: &str) -> Result<(), CertificateError> {
    let (before, told) = Which::Before.files(online);
    if let Some(there) = [before, told].into_iter().find(|path| path.exists()) {
        return Err(CertificateError::StillTold(there));
    }
    if Ca::open(online, Which::Now, site)?.is_none() {
        return Err(CertificateError::NoneWanted);
    }
    // One that was cut short when it was made is completed by that.
    if Ca::open(online, Which::Next, site)?.is_some() {
        return Err(CertificateError::Announced(Which::Next.files(online).1));
    }
    Ca::make(online, Which::Next, site).map(drop)
}

/// The one that was announced signs from the server's next start on. Cut short, it is gone on with by the same command.
pub fn switch(online: &Path, site: &str) -> Result<(), CertificateError> {
    let [(key, pem), (next_key, next_pem), (before_key, before_pem)] =
        [Which::Now, Which::Next, Which::Before].map(|which| which.files(online));
    if !next_pem.exists() {
        return Err(CertificateError::NotAnnounced(next_pem));
    }
    if key.exists() && next_key.exists() {
        // Nothing was moved yet, and both must be whole.
        if before_key.exists() {
            return Err(CertificateError::StillTold(before_key));
        }
        for which in [Which::Now, Which::Next] {
            Ca::open(online, which, site)?.ok_or_else(|| CertificateError::NotAnnounced(which.files(online).1))?;
        }
    }
    // In this order there is always a file of the one that signs: a server that starts in between makes no other.
    if !before_key.exists() {
        rename(&key, &before_key)?;
    }
    if !key.exists() {
        rename(&next_key, &key)?;
    }
    if !before_pem.exists() {
        rename(&pem, &before_pem)?;
    }
    rename(&next_pem, &pem)?;
    sync(online)
}

/// The one before is told no more, and its key is gone: what it signed is refused.
pub fn forget(online: &Path) -> Result<(), CertificateError> {
    let (key, pem) = Which::Before.files(online);
    let there: Vec<PathBuf> = [&key, &pem].into_iter().filter(|path| path.exists()).cloned().collect();
    if there.is_empty() {
        return Err(CertificateError::NotAnnounced(key));
    }
    let (_, next) = Which::Next.files(online);
    if next.exists() {
        // A switch that was cut short.
        return Err(CertificateError::Announced(next));
    }
    for path in there {
        std::fs::remove_file(&path).map_err(file(&path))?;
    }
    sync(online)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_protocol::KeyId;

    fn id(online: &Path, which: Which) -> Option<KeyId> {
        Ca::open(online, which, "lab").unwrap().map(|ca| ca.id())
    }

    /// A site whose next CA is announced: which CA signs, and which follows.
    fn announced() -> (tempfile::TempDir, KeyId, KeyId) {
        let dir = tempfile::tempdir().unwrap();
        let online = dir.path();
        Ca::make(online, Which::Now, "lab").unwrap();
        announce(online, "lab").unwrap();
        let (now, next) = (id(online, Which::Now).unwrap(), id(online, Which::Next).unwrap());
        (dir, now, next)
    }

    #[test]
    fn each_step_has_its_turn_and_is_taken_once() {
        let empty = tempfile::tempdir().unwrap();
        assert!(matches!(announce(empty.path(), "lab"), Err(CertificateError::NoneWanted)));
        let (dir, old, new) = announced();
        let online = dir.path();
        assert_ne!(old, new);
        assert!(matches!(announce(online, "lab"), Err(CertificateError::Announced(_))));
        assert!(matches!(forget(online), Err(CertificateError::NotAnnounced(_))));
        switch(online, "lab").unwrap();
        let all = || [Which::Now, Which::Next, Which::Before].map(|which| id(online, which));
        assert_eq!(all(), [Some(new.clone()), None, Some(old.clone())]);
        assert!(matches!(switch(online, "lab"), Err(CertificateError::NotAnnounced(_))));
        assert!(matches!(announce(online, "lab"), Err(CertificateError::StillTold(_))));
        assert_eq!(all(), [Some(new.clone()), None, Some(old)]);
        forget(online).unwrap();
        assert_eq!(all(), [Some(new), None, None]);
        assert!(matches!(forget(online), Err(CertificateError::NotAnnounced(_))));
        announce(online, "lab").unwrap();
    }

    /// Cut behind each of its renames, also where a server starts on what is left, the same command goes on; nothing else
    /// makes it worse.
    #[test]
    fn a_switch_that_is_cut_short_is_gone_on_with() {
        for cut in 0..4 {
            for starts in [false, true] {
                let (dir, old, new) = announced();
                let online = dir.path();
                let [now, next, before] = [Which::Now, Which::Next, Which::Before].map(|which| which.files(online));
                let renames = [(&now.0, &before.0), (&next.0, &now.0), (&now.1, &before.1), (&next.1, &now.1)];
                for (from, to) in &renames[..cut] {
                    std::fs::rename(from, to).unwrap();
                }
                if starts {
                    // It completes a certificate that is missing beside its key, and makes no CA.
                    for which in [Which::Now, Which::Next, Which::Before] {
                        let opened = Ca::open(online, which, "lab");
                        assert!(which != Which::Now || !matches!(opened, Ok(None)), "{cut}");
                    }
                }
                if cut > 0 {
                    assert!(matches!(forget(online), Err(CertificateError::Announced(_))), "{cut}");
                }
                switch(online, "lab").unwrap();
                let all = [Which::Now, Which::Next, Which::Before].map(|which| id(online, which));
                assert_eq!(all, [Some(new), None, Some(old)], "{cut}, {starts}");
            }
        }
    }
}
