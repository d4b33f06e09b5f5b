//! The lab's site: made once with the real commands, copied for every rack.
//!
//! `target/lab/template` holds the trust, two built releases of `minimal`, the first one published. A rack works on a
//! copy, so that a test may damage it and every run of the lab begins with release 1.

use crate::command;
use crate::error::{AtPath, LabError};
use crate::machine::OVMF_VARS;
use crate::newer_qemu;
use crate::paths::Paths;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The image every rack boots.
pub const IMAGE: &str = "minimal";

/// Where the prepared site lies.
pub fn template(paths: &Paths) -> PathBuf {
    paths.lab.join("template")
}

/// The image that says on the console what it refuses; only tests boot it.
pub const PROBE: &str = "probe";
/// Release 3 of [`IMAGE`], whose kernel hangs.
pub const HANGS: &str = "hangs";
/// The same of [`SERVERS`].
pub const HANGS_SERVERS: &str = "hangs-servers";
/// The image with drivers for real hardware.
pub const SERVERS: &str = "servers";
/// The image of machines that live on their disk.
pub const DISK: &str = "disk";
/// The release of [`DISK`] that brings another boot loader than those before it, by a recipe of its own.
pub const OTHER_LOADER: u64 = 3;
/// That recipe.
const DISK_OTHER: &str = "disk-other";
/// What a machine that runs that release takes of its link for another, bytes a second.
pub const OTHER_PREFETCH_RATE: u64 = 1 << 20;
/// The same with a secret and with data.
pub const VAULT: &str = "vault";

/// The image that can be made to differ from its release.
pub const DRIFTS: &str = "drifts";
/// The image whose root loads a foreign initramfs.
pub const THIEF: &str = "thief";
/// The image with an allow-list of programs.
pub const EXEC: &str = "exec";

/// Makes the template, or finds it current, and release 1 of each further image in it. The builder's output goes to the
/// terminal.
pub fn prepare(paths: &Paths, further: &[String]) -> Result<(), LabError> {
    prepare_lab(paths)?;
    let site = template(paths);
    for recipe in further {
        // A recipe without a name of its own is a further release of the image it extends.
        let (image, release) = match recipe.as_str() {
            HANGS => (IMAGE, "3"),
            HANGS_SERVERS => (SERVERS, "3"),
            other => (other, "1"),
        };
        if !site.join(format!("build/{image}/{release}/manifest.json")).exists() {
            println!("lab: building {recipe}");
            build(paths, &site, recipe, release)?;
        }
    }
    if further.iter().any(|image| image == SERVERS) {
        newer_qemu::prepare(paths, &["igb"])?;
    }
    // The tests of these go from one release to another.
    for image in [DISK, VAULT, THIEF] {
        let built = || site.join(format!("build/{image}/2/manifest.json")).exists();
        if further.iter().any(|further| further == image) && !built() {
            println!("lab: building {image}/2");
            build(paths, &site, image, "2")?;
        }
    }
    let other = site.join(format!("build/{DISK}/{OTHER_LOADER}/manifest.json"));
    if further.iter().any(|further| further == DISK) && !other.exists() {
        println!("lab: building {DISK}/{OTHER_LOADER}, with another boot loader");
        build_from(paths, &site, DISK_OTHER, &OTHER_LOADER.to_string(), &with_other_loader(paths)?)?;
    }
    Ok(())
}

/// A cache whose base layers are the lab's, but for one digit of their boot loader's version: as a newer package would bring it.
fn with_other_loader(paths: &Paths) -> Result<PathBuf, LabError> {
    const VERSION: &[u8] = b"#### LoaderInfo: systemd-boot ";
    let (from, cache) = (paths.lab.join("cache/base"), paths.lab.join("cache-other-loader"));
    if cache.exists() {
        std::fs::remove_dir_all(&cache).at(&cache)?;
    }
    for base in std::fs::read_dir(&from).at(&from)? {
        let base = base.at(&from)?;
        let folder = cache.join("base").join(base.file_name());
        std::fs::create_dir_all(&folder).at(&folder)?;
        for part in std::fs::read_dir(base.path()).at(&from)? {
            let part = part.at(&from)?;
            let (path, to) = (part.path(), folder.join(part.file_name()));
            if part.file_name() != "systemd-boot.efi" {
                std::os::unix::fs::symlink(&path, &to).at(&to)?;
                continue;
            }
            let mut loader = std::fs::read(&path).at(&path)?;
            let digit = loader.windows(VERSION.len()).position(|window| window == VERSION).map(|at| at + VERSION.len());
            let digit = digit.and_then(|at| loader.get_mut(at)).filter(|digit| digit.is_ascii_digit());
            let Some(digit) = digit else {
                return Err(LabError::File { path, source: std::io::Error::other("it does not say its version") });
            };
            // 2 becomes 3.
            *digit ^= 1;
            std::fs::write(&to, loader).at(&to)?;
        }
    }
    Ok(cache)
}

fn build(paths: &Paths, site: &Path, recipe: &str, release: &str) -> Result<(), LabError> {
    build_from(paths, site, recipe, release, &paths.lab.join("cache"))
}

/// With base layers, or packages for them, from a cache.
fn build_from(paths: &Paths, site: &Path, recipe: &str, release: &str, cache: &Path) -> Result<(), LabError> {
    let recipe = text(&paths.repository.join(format!("images/recipes/{recipe}.toml")));
    let (site, agent, cache) = (text(site), text(&paths.agent), text(cache));
    let args = ["image", "build", &recipe, "--site", &site, "--release", release, "--agent", &agent, "--cache", &cache];
    kiln(paths, &args)
}

fn prepare_lab(paths: &Paths) -> Result<(), LabError> {
    for program in [&paths.kiln, &paths.agent] {
        if !program.exists() {
            return Err(LabError::MissingProgram { path: program.clone() });
        }
    }
    let site = template(paths);
    let stamp_file = paths.lab.join("template.stamp");
    let stamp = stamp(paths)?;
    if std::fs::read_to_string(&stamp_file).is_ok_and(|known| known == stamp) {
        println!("lab: site with two releases of {IMAGE} is current ({})", site.display());
        return Ok(());
    }
    if site.exists() {
        std::fs::remove_dir_all(&site).at(&site)?;
    }
    let _ = std::fs::remove_file(&stamp_file);
    println!("lab: making a site and two releases of {IMAGE} in {}", site.display());
    kiln(paths, &["trust", "init", "--lab", &text(&site), "--name", "lab"])?;
    for release in ["1", "2"] {
        build(paths, &site, IMAGE, release)?;
    }
    publish(paths, &site, 1)?;
    std::fs::write(&stamp_file, stamp).at(&stamp_file)
}

/// A variable store with a site's Secure Boot keys, made by the real command in the new folder `out`.
pub fn enroll(paths: &Paths, site: &Path, out: &Path) -> Result<PathBuf, LabError> {
    enroll_allowing(paths, site, out, &[])
}

/// The same, and db names these images.
pub fn enroll_allowing(paths: &Paths, site: &Path, out: &Path, allow: &[String]) -> Result<PathBuf, LabError> {
    let (site, folder, allow) = (text(site), text(out), allow.join(","));
    let mut args = vec!["trust", "secureboot", "enroll", "--site", &site, "--out", &folder, "--ovmf-vars", OVMF_VARS];
    if !allow.is_empty() {
        args.extend(["--allow", &allow]);
    }
    kiln_quiet(paths, &args)?;
    Ok(out.join("OVMF_VARS.fd"))
}

/// Publishes a release with the real command.
pub fn publish(paths: &Paths, site: &Path, release: u64) -> Result<(), LabError> {
    kiln(paths, &["release", "publish", &format!("{IMAGE}/{release}"), "--site", &text(site)])
}

/// Runs an operator command, its output on the terminal.
pub fn kiln(paths: &Paths, args: &[&str]) -> Result<(), LabError> {
    let mut command = Command::new(&paths.kiln);
    command.args(args).stdin(Stdio::null());
    let shown = command::shown(&command);
    let status = command.status().map_err(|source| LabError::Spawn { command: shown.clone(), source })?;
    if status.success() {
        Ok(())
    } else {
        Err(LabError::Command { command: shown, status, output: "see its message above".into() })
    }
}

/// Runs an operator command and returns what it prints.
pub fn kiln_quiet(paths: &Paths, args: &[&str]) -> Result<String, LabError> {
    command::run_command(Command::new(&paths.kiln).args(args))
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// What the template depends on: the agent's bytes, and the sources of the builder and of the formats.
fn stamp(paths: &Paths) -> Result<String, LabError> {
    let mut hasher = DefaultHasher::new();
    std::fs::read(&paths.agent).at(&paths.agent)?.hash(&mut hasher);
    let mut files = Vec::new();
    for dir in ["images", "agent/protocol"] {
        list(&paths.repository.join(dir), &mut files)?;
    }
    files.sort();
    for file in files {
        file.hash(&mut hasher);
        std::fs::read(&file).at(&file)?.hash(&mut hasher);
    }
    Ok(format!("{:016x}\n", hasher.finish()))
}

fn list(dir: &Path, files: &mut Vec<PathBuf>) -> Result<(), LabError> {
    for entry in std::fs::read_dir(dir).at(dir)? {
        let path = entry.at(dir)?.path();
        if path.is_dir() {
            list(&path, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}

/// Copies the template to `to`, which must not exist.
pub fn copy(paths: &Paths, to: &Path) -> Result<(), LabError> {
    let from = template(paths);
    if !from.join("repo").exists() {
        return Err(LabError::MissingFile { path: from, package: "none: `kiln-lab prepare` makes it" });
    }
    copy_tree(&from, to)
}

/// Copies a directory, modes kept.
pub fn copy_tree(from: &Path, to: &Path) -> Result<(), LabError> {
    std::fs::create_dir_all(to).at(to)?;
    let mode = std::fs::metadata(from).at(from)?.permissions();
    for entry in std::fs::read_dir(from).at(from)? {
        let entry = entry.at(from)?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let kind = entry.file_type().at(&source)?;
        if kind.is_dir() {
            copy_tree(&source, &target)?;
        } else if kind.is_file() {
            std::fs::copy(&source, &target).at(&source)?;
        }
    }
    std::fs::set_permissions(to, mode).at(to)
}

/// Changes one byte of a file.
pub fn flip_byte(path: &Path, at: u64) -> Result<(), LabError> {
    let mut bytes = std::fs::read(path).at(path)?;
    let at = usize::try_from(at).unwrap_or(usize::MAX).min(bytes.len().saturating_sub(1));
    bytes[at] ^= 0x01;
    // A new file: a server that has the old one open must not see a mixture.
    let beside = path.with_extension("flipped");
    std::fs::write(&beside, bytes).at(&beside)?;
    std::fs::rename(&beside, path).at(path)
}

/// The manifest of a built release.
pub fn manifest(site: &Path, release: u64) -> Result<serde_json::Value, LabError> {
    manifest_of(site, IMAGE, release)
}

/// The same of any image.
pub fn manifest_of(site: &Path, image: &str, release: u64) -> Result<serde_json::Value, LabError> {
    let path = site.join(format!("build/{image}/{release}/manifest.json"));
    let bytes = std::fs::read(&path).at(&path)?;
    serde_json::from_slice(&bytes).map_err(|e| LabError::File { path, source: e.into() })
}
