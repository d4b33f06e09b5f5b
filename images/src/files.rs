//! Files that are whole or not there: written beside their place, synced, renamed.

use crate::site_error::SiteError;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Readable by its owner alone.
pub(crate) const SECRET: u32 = 0o600;
/// Readable by all.
pub(crate) const PUBLIC: u32 = 0o644;

pub(crate) fn make_dir(path: &Path, mode: u32) -> Result<(), SiteError> {
    fs::create_dir_all(path).map_err(SiteError::io("make directory", path))?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(SiteError::io("set the mode of", path))
}

fn beside(path: &Path) -> PathBuf {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    path.with_file_name(format!(".{name}.{}.new", std::process::id()))
}

/// A new file under another name; [`Pending::commit`] puts it in its place, dropping it removes it.
pub(crate) struct Pending {
    pub(crate) file: File,
    temporary: PathBuf,
    target: PathBuf,
    committed: bool,
}

impl Pending {
    pub(crate) fn create(target: &Path, mode: u32) -> Result<Self, SiteError> {
        let temporary = beside(target);
        // Left over from a process of the same number that was killed.
        let _ = fs::remove_file(&temporary);
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&temporary)
            .map_err(SiteError::io("create", target))?;
        Ok(Self { file, temporary, target: target.to_owned(), committed: false })
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), SiteError> {
        self.file.write_all(bytes).map_err(SiteError::io("write", &self.target))
    }

    fn commit(mut self) -> Result<(), SiteError> {
        self.file.sync_all().map_err(SiteError::io("sync", &self.target))?;
        fs::rename(&self.temporary, &self.target).map_err(SiteError::io("rename into place", &self.target))?;
        self.committed = true;
        sync_folder(&self.target)
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if !self.committed {
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// New files and folders that belong together. Dropped before [`Batch::keep`], they are gone again: what fails half
/// way, on a full disk say, leaves nothing. What was there before and was replaced stays.
#[derive(Default)]
pub(crate) struct Batch {
    new: Vec<PathBuf>,
}

impl Batch {
    /// A folder and those it lies in.
    pub(crate) fn folder(&mut self, path: &Path, mode: u32) -> Result<(), SiteError> {
        let missing: Vec<_> = path.ancestors().take_while(|folder| !folder.exists()).collect();
        for folder in missing.into_iter().rev() {
            self.new.push(folder.to_owned());
            make_dir(folder, mode)?;
        }
        Ok(())
    }

    /// Puts a file in its place.
    pub(crate) fn commit(&mut self, pending: Pending) -> Result<(), SiteError> {
        if !pending.target.exists() {
            self.new.push(pending.target.clone());
        }
        pending.commit()
    }

    pub(crate) fn write(&mut self, path: &Path, bytes: &[u8], mode: u32) -> Result<(), SiteError> {
        let mut pending = Pending::create(path, mode)?;
        pending.write(bytes)?;
        self.commit(pending)
    }

    /// Another name of a file; one that is there stays.
    pub(crate) fn link(&mut self, from: &Path, to: &Path) -> Result<(), SiteError> {
        if !to.exists() {
            fs::hard_link(from, to).map_err(SiteError::io("link", to))?;
            self.new.push(to.to_owned());
        }
        Ok(())
    }

    /// All of it stays.
    pub(crate) fn keep(mut self) {
        self.new.clear();
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        for path in self.new.iter().rev() {
            // A folder goes only if nothing of others is in it.
            let _ = fs::remove_file(path).or_else(|_| fs::remove_dir(path));
        }
    }
}

/// So that a rename outlives a power cut.
pub(crate) fn sync_folder(of: &Path) -> Result<(), SiteError> {
    match of.parent() {
        Some(folder) => {
            // Of a name without a folder: the one that the program was started in.
            let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
            File::open(folder).and_then(|folder| folder.sync_all()).map_err(SiteError::io("sync directory of", of))
        }
        None => Ok(()),
    }
}

pub(crate) fn write_atomic(path: &Path, bytes: &[u8], mode: u32) -> Result<(), SiteError> {
    let mut pending = Pending::create(path, mode)?;
    pending.write(bytes)?;
    pending.commit()
}

/// A new file; one that is there is not written over.
pub(crate) fn write_new(path: &Path, bytes: &[u8], mode: u32) -> Result<(), SiteError> {
    if path.exists() {
        return Err(SiteError::FileExists { path: path.to_owned() });
    }
    write_atomic(path, bytes, mode)
}

/// At most `max_bytes` and one more, so that a file beyond the cap is seen as such; `None` if there is none.
pub(crate) fn read_capped(path: &Path, max_bytes: u64) -> Result<Option<Vec<u8>>, SiteError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(SiteError::io("open", path)(error)),
    };
    let mut bytes = Vec::new();
    file.take(max_bytes.saturating_add(1)).read_to_end(&mut bytes).map_err(SiteError::io("read", path))?;
    Ok(Some(bytes))
}
