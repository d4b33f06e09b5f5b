//! The base layer: Debian's packages as one tar, the kernel with its modules, and the UKI stub, made by mmdebstrap and
//! kept in the cache. A release is a small layer on top of it, so a second one costs no package work.
//!
//! The key of a cached base is what was asked for (suite, packages, kernel); what the mirror had at that time is
//! recorded in it, and `refresh` asks the mirror again.

use crate::error::BuildError;
use crate::firmware;
use crate::host::{self, Mirror, Rights};
use crate::progress::Steps;
use crate::recipe::Recipe;
use kiln_release::hex::sha256;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Grows when a base would be made in another way.
const FORMAT: u32 = 2;
/// Package of the UKI stub, and the stub in it.
const STUB_PACKAGE: &str = "systemd-boot-efi";
const STUB_PATH: &str = "usr/lib/systemd/boot/efi/linuxx64.efi.stub";
/// The loader of machines in disk mode, of the same package.
const LOADER_PATH: &str = "usr/lib/systemd/boot/efi/systemd-bootx64.efi";

/// What a base is: `base.json` in its folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BaseInfo {
    /// Key of what was asked for.
    pub(crate) key: String,
    /// SHA-256 over the mirror's signed indexes.
    pub(crate) index: String,
    /// Date of the newest index, seconds since the epoch: SOURCE_DATE_EPOCH.
    pub(crate) epoch: i64,
    /// The kernel's release, as `uname -r` says it.
    pub(crate) kernel_release: String,
    /// File names of the packages taken apart beside the root: kernel, stub, firmware.
    pub(crate) extra_packages: Vec<String>,
    /// SHA-256 of the root's tar.
    pub(crate) root_sha256: String,
    /// Its length.
    pub(crate) root_length: u64,
}

/// A base in the cache.
#[derive(Debug, Clone)]
pub(crate) struct Base {
    /// Its folder.
    pub(crate) folder: PathBuf,
    /// What it is.
    pub(crate) info: BaseInfo,
}

impl Base {
    pub(crate) fn root_tar(&self) -> PathBuf {
        self.folder.join("root.tar")
    }
    pub(crate) fn kernel(&self) -> PathBuf {
        self.folder.join("vmlinuz")
    }
    pub(crate) fn stub(&self) -> PathBuf {
        self.folder.join("linux.efi.stub")
    }
    pub(crate) fn loader(&self) -> PathBuf {
        self.folder.join("systemd-boot.efi")
    }
    /// `/lib/modules/VERSION`.
    pub(crate) fn modules(&self) -> PathBuf {
        self.folder.join("modules")
    }

    /// What the recipe's firmware packages have in `/lib/firmware`; not there without such packages.
    pub(crate) fn firmware(&self) -> PathBuf {
        self.folder.join("firmware")
    }

    /// The cached base for a recipe, if there is one.
    pub(crate) fn cached(recipe: &Recipe, cache: &Path) -> Option<Self> {
        let folder = folder(recipe, cache);
        let text = std::fs::read(folder.join("base.json")).ok()?;
        let info: BaseInfo = serde_json::from_slice(&text).ok()?;
        let base = Self { folder, info };
        let whole = base.root_tar().metadata().is_ok_and(|meta| meta.len() == base.info.root_length);
        (whole && base.info.key == key(recipe) && base.kernel().exists() && base.stub().exists()).then_some(base)
    }

    /// Makes it, with packages from the mirror of this machine's apt.
    pub(crate) fn make(recipe: &Recipe, cache: &Path, rights: Rights, steps: &mut Steps) -> Result<Self, BuildError> {
        let folder = folder(recipe, cache);
        let parent = folder.parent().expect("folder() joins two parts");
        make_folder(parent)?;
        let mirror = Mirror::of_host()?;
        // The mirror may move on between the reading of its date and mmdebstrap's own reading.
        for _ in 0..2 {
            let temp = tempfile::Builder::new().prefix(".new-").tempdir_in(parent);
            let temp = temp.map_err(BuildError::write(parent))?;
            let making = Making { recipe, cache, rights, mirror: &mirror, folder: temp.path() };
            if let Some(info) = making.run(steps)? {
                write(&temp.path().join("base.json"), &json(&info))?;
                std::fs::remove_dir_all(&folder).or_else(absent_is_fine).map_err(BuildError::write(&folder))?;
                std::fs::rename(temp.path(), &folder).map_err(BuildError::write(&folder))?;
                let _ = temp.keep();
                return Ok(Self { folder, info });
            }
        }
        Err(BuildError::MirrorMoved)
    }
}

fn absent_is_fine(error: std::io::Error) -> std::io::Result<()> {
    if error.kind() == std::io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}

/// A base in the making.
struct Making<'a> {
    recipe: &'a Recipe,
    cache: &'a Path,
    rights: Rights,
    mirror: &'a Mirror,
    folder: &'a Path,
}

impl Making<'_> {
    /// None if the mirror changed meanwhile.
    fn run(&self, steps: &mut Steps) -> Result<Option<BaseInfo>, BuildError> {
        steps.next("Read the mirror's index");
        let (index, epoch) = self.read_index()?;
        steps.next("Install packages");
        let out = self.folder.join("out");
        make_folder(&out)?;
        self.mmdebstrap(&out, epoch, steps)?;
        let verified = read_files(&out, "InRelease")?;
        if digest_of(&verified) != index {
            return Ok(None);
        }
        steps.next("Take kernel and modules apart");
        let extra_packages = self.unpack(&out)?;
        let kernel_release = self.kernel_release()?;
        self.gather(&kernel_release)?;
        for rest in ["out", "unpacked", "lists"] {
            let path = self.folder.join(rest);
            std::fs::remove_dir_all(&path).map_err(BuildError::write(&path))?;
        }
        let root = read(&self.folder.join("root.tar"))?;
        Ok(Some(BaseInfo {
            key: key(self.recipe),
            index,
            epoch,
            kernel_release,
            extra_packages,
            root_sha256: sha256(&root),
            root_length: root.len() as u64,
        }))
    }

    /// Digest and newest date of the mirror's indexes. Not yet trusted: mmdebstrap's copy, whose signature apt has
    /// checked, must turn out to be the same.
    fn read_index(&self) -> Result<(String, i64), BuildError> {
        let folder = self.folder.join("lists");
        make_folder(&folder)?;
        let mut newest = None;
        let mut all = Vec::new();
        for (number, (uri, suite)) in self.mirror.indexes(&self.recipe.suite).into_iter().enumerate() {
            let path = folder.join(format!("{number}.InRelease"));
            let mut command = Command::new("/usr/lib/apt/apt-helper");
            // apt's own user may not write into the cache; the file is checked later anyway.
            command.args(["-o", "APT::Sandbox::User=root", "download-file"]);
            command.arg(format!("{uri}/dists/{suite}/InRelease")).arg(&path);
            host::output(&mut command, "reading the mirror's index", |_| ())?;
            let bytes = read(&path)?;
            let date = index_date(&String::from_utf8_lossy(&bytes)).ok_or(BuildError::IndexDate { path })?;
            newest = newest.max(Some(date));
            all.push(bytes);
        }
        Ok((digest_of(&all), newest.expect("every mirror has at least two indexes")))
    }

    fn mmdebstrap(&self, out: &Path, epoch: i64, steps: &Steps) -> Result<(), BuildError> {
        let debs = self.cache.join("debs");
        make_folder(&debs)?;
        let Recipe { kernel, suite, firmware, .. } = self.recipe;
        let (wants_firmware, firmware) = (!firmware.is_empty(), firmware.join(" "));
        // Beside the root, not in it: the kernel and the stub, as files; and the indexes that apt has verified.
        let beside = format!(
            "set -e; export APT_CONFIG=\"$MMDEBSTRAP_APT_CONFIG\"; mkdir \"$1/kiln-out\"; cd \"$1/kiln-out\"; \
             real=$(apt-cache depends {kernel} | sed -n 's/^ *Depends: \\(linux-image-.*\\)/\\1/p' | head -n 1); \
             apt-get -q -o APT::Sandbox::User=root download \"${{real:-{kernel}}}\" {STUB_PACKAGE} {firmware}; \
             cp \"$1\"/var/lib/apt/lists/*InRelease ."
        );
        let mut command = Command::new("mmdebstrap");
        command
            .env("SOURCE_DATE_EPOCH", epoch.to_string())
            .arg(match self.rights {
                Rights::Root => "--mode=root",
                Rights::Namespace => "--mode=unshare",
            })
            .args(["--variant=essential", "--format=tar", "--architectures=amd64"])
            .arg(format!("--include={}", self.recipe.packages.join(",")))
            .args(["--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/man/*"])
            .args(["--dpkgopt=path-exclude=/usr/share/locale/*", "--dpkgopt=path-exclude=/usr/share/info/*"])
            .args(["--aptopt=APT::Keep-Downloaded-Packages \"true\"", "--aptopt=Acquire::Retries \"3\""])
            .args(["--skip=download/empty", "--skip=essential/unlink"])
            .arg("--setup-hook=mkdir -p \"$1/var/cache/apt/archives\"")
            .arg(format!("--setup-hook=sync-in {} /var/cache/apt/archives", quoted(&debs)))
            .arg(format!("--essential-hook={beside}"))
            .arg(format!("--essential-hook=sync-out /kiln-out {}", quoted(out)))
            .arg("--essential-hook=rm -r \"$1/kiln-out\"")
            .arg(format!("--customize-hook=sync-out /var/cache/apt/archives {}", quoted(&debs)))
            .arg(suite)
            .arg(self.folder.join("root.tar"))
            .args(self.mirror.sources(suite, wants_firmware));
        host::output(&mut command, "installing the image's packages", |line| {
            if let Some(step) = line.strip_prefix("I: ") {
                steps.detail(step.trim_end_matches("..."));
            }
        })?;
        Ok(())
    }

    fn unpack(&self, out: &Path) -> Result<Vec<String>, BuildError> {
        let unpacked = self.folder.join("unpacked");
        make_folder(&unpacked)?;
        let mut names = Vec::new();
        for package in files_ending(out, ".deb")? {
            let mut command = Command::new("dpkg-deb");
            command.arg("--extract").arg(&package).arg(&unpacked);
            host::output(&mut command, "unpacking kernel, UKI stub and firmware", |_| ())?;
            names.push(package.file_name().unwrap_or_default().to_string_lossy().into_owned());
        }
        Ok(names)
    }

    fn kernel_release(&self) -> Result<String, BuildError> {
        let mut kernels = files_starting(&self.folder.join("unpacked/boot"), "vmlinuz-")?;
        kernels.pop().ok_or_else(|| self.lacks("/boot/vmlinuz-*", &self.recipe.kernel))
    }

    fn lacks(&self, path: &str, package: &str) -> BuildError {
        BuildError::PackageLacks { path: path.into(), suite: self.recipe.suite.clone(), package: package.into() }
    }

    /// Kernel, stub and modules to their places, with depmod's files.
    fn gather(&self, release: &str) -> Result<(), BuildError> {
        let unpacked = self.folder.join("unpacked");
        let take = |from: String, to: &str, package: &str| {
            std::fs::rename(unpacked.join(&from), self.folder.join(to))
                .map_err(|_| self.lacks(&format!("/{from}"), package))
        };
        take(format!("boot/vmlinuz-{release}"), "vmlinuz", &self.recipe.kernel)?;
        take(STUB_PATH.into(), "linux.efi.stub", STUB_PACKAGE)?;
        take(LOADER_PATH.into(), "systemd-boot.efi", STUB_PACKAGE)?;
        // depmod of Debian 12 looks only in /lib/modules.
        let link = unpacked.join("lib");
        if !link.exists() {
            std::os::unix::fs::symlink("usr/lib", &link).map_err(BuildError::write(&link))?;
        }
        let mut command = Command::new("depmod");
        command.arg("--basedir").arg(&unpacked).arg(release);
        host::output(&mut command, "finding out which modules need which", |_| ())?;
        take(format!("usr/lib/modules/{release}"), "modules", &self.recipe.kernel)?;
        match self.recipe.firmware.as_slice() {
            [] => Ok(()),
            packages => take(firmware::FOLDER[1..].into(), "firmware", &packages.join(", ")),
        }
    }
}

fn key(recipe: &Recipe) -> String {
    let Recipe { suite, architecture, packages, kernel, firmware, .. } = recipe;
    let firmware = firmware.join(" ");
    sha256(format!("{FORMAT}\n{suite}\n{architecture}\n{kernel}\n{}\n{firmware}", packages.join(" ")).as_bytes())
}

fn folder(recipe: &Recipe, cache: &Path) -> PathBuf {
    cache.join("base").join(&key(recipe)[..16])
}

/// One digest over files whose names and order do not matter.
fn digest_of(files: &[Vec<u8>]) -> String {
    let mut hashes: Vec<_> = files.iter().map(|bytes| sha256(bytes)).collect();
    hashes.sort();
    sha256(hashes.join("\n").as_bytes())
}

/// `Date: Sat, 21 Nov 2026 09:15:44 UTC` of a Release file.
fn index_date(text: &str) -> Option<i64> {
    let date = text.lines().find_map(|line| line.strip_prefix("Date: "))?;
    let date = date.trim().replace("UTC", "+0000");
    jiff::fmt::rfc2822::parse(&date).ok().map(|date| date.timestamp().as_second())
}

fn quoted(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', "'\\''"))
}

fn listing(folder: &Path) -> Result<Vec<PathBuf>, BuildError> {
    let fail = |source| BuildError::Read { path: folder.into(), source };
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(fail)? {
        paths.push(entry.map_err(fail)?.path());
    }
    paths.sort();
    Ok(paths)
}

fn files_ending(folder: &Path, end: &str) -> Result<Vec<PathBuf>, BuildError> {
    Ok(listing(folder)?.into_iter().filter(|path| path.to_string_lossy().ends_with(end)).collect())
}

/// What follows `start` in the names of a folder's files.
fn files_starting(folder: &Path, start: &str) -> Result<Vec<String>, BuildError> {
    let name = |path: PathBuf| path.file_name()?.to_str()?.strip_prefix(start).map(str::to_owned);
    Ok(listing(folder)?.into_iter().filter_map(name).collect())
}

fn read_files(folder: &Path, end: &str) -> Result<Vec<Vec<u8>>, BuildError> {
    files_ending(folder, end)?.iter().map(|path| read(path)).collect()
}

pub(crate) fn make_folder(path: &Path) -> Result<(), BuildError> {
    std::fs::create_dir_all(path).map_err(BuildError::write(path))
}

pub(crate) fn read(path: &Path) -> Result<Vec<u8>, BuildError> {
    std::fs::read(path).map_err(|source| BuildError::Read { path: path.into(), source })
}

pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<(), BuildError> {
    write_as(path, path, bytes)
}

/// Writes `place` under another name for now.
pub(crate) fn write_as(path: &Path, place: &Path, bytes: &[u8]) -> Result<(), BuildError> {
    std::fs::write(path, bytes).map_err(BuildError::write(place))
}

/// JSON for people, with a line end.
pub(crate) fn json(value: &impl Serialize) -> Vec<u8> {
    let mut text = serde_json::to_vec_pretty(value).expect("plain structs have a JSON form");
    text.push(b'\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_of_release_files_are_read() {
        let text = "-----BEGIN PGP SIGNED MESSAGE-----\nSuite: stable\nDate: Sat, 21 Nov 2026 09:15:44 UTC\nX: y\n";
        assert_eq!(index_date(text), Some(1_795_252_544));
        assert_eq!(index_date("Suite: stable\n"), None);
    }

    #[test]
    fn index_files_have_one_digest_in_any_order() {
        let (a, b) = (b"a".to_vec(), b"b".to_vec());
        assert_eq!(digest_of(&[a.clone(), b.clone()]), digest_of(&[b.clone(), a.clone()]));
        assert_ne!(digest_of(std::slice::from_ref(&a)), digest_of(&[a.clone(), b]));
    }
}
