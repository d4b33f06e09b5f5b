//! From a recipe to DIR/build/NAME/REL: reads the inputs, stops if nothing changed, else makes every part in turn.
//!
//! A finished release's folder is replaced whole, by renaming. Two builds on one cache wait for each other.

use crate::base::{Base, json, make_folder, read, write_as};
use crate::boot_keys::{SigningKey, Unlock};
use crate::error::BuildError;
use crate::firmware::Firmware;
use crate::progress::{Progress, Steps};
use crate::recipe::Recipe;
use crate::repository::Repository;
use crate::site::SiteDir;
use crate::{host, initramfs, root, sbom, secure_boot, tarball, uki};
use jiff::Timestamp;
use kiln_release::hex::sha256;
use kiln_release::measured::measured;
use kiln_release::{Artifact, BootInfo, Crossing, DiskSettings, MANIFEST_TYPE, Manifest, Measured, Mode, SiteSettings};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

/// Grows when the same inputs would give other bytes.
const FORMAT: u32 = 6;
/// What was built from what, in a release's folder.
const STAMP: &str = "build.json";

/// What to build, and from what.
#[derive(Debug, Clone)]
pub struct BuildOptions {
    /// The recipe's file.
    pub recipe: PathBuf,
    /// The site directory: its trust root, CA and name go into the initramfs.
    pub site_dir: PathBuf,
    /// Release number; none: one above the highest published.
    pub release: Option<u64>,
    /// The agent's binary, static.
    pub agent: PathBuf,
    /// Where packages and base layers are kept; shared by sites.
    pub cache: PathBuf,
    /// Ask the mirror again, even if there is a base layer for these packages.
    pub refresh: bool,
    /// Where machines look for the site.
    pub site_urls: SiteUrls,
    /// Sign nothing for Secure Boot.
    pub unsigned: bool,
    /// What is shown meanwhile.
    pub progress: Progress,
}

impl BuildOptions {
    /// The usual: next release, the site's own cache, addresses from DHCP.
    pub fn new(recipe: impl Into<PathBuf>, site_dir: impl Into<PathBuf>, agent: impl Into<PathBuf>) -> Self {
        let site_dir = site_dir.into();
        Self {
            recipe: recipe.into(),
            cache: site_dir.join("cache"),
            site_dir,
            release: None,
            agent: agent.into(),
            refresh: false,
            site_urls: SiteUrls::default(),
            unsigned: false,
            progress: Progress::auto(),
        }
    }
}

/// Addresses written into the initramfs; empty: machines ask DHCP.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SiteUrls {
    /// Base URLs of artifacts.
    pub http: Vec<String>,
    /// Base URLs of the agent API.
    pub agent: Vec<String>,
}

/// A built release.
#[derive(Debug, Clone)]
pub struct Built {
    /// Its manifest.
    pub manifest: Manifest,
    /// Its folder, DIR/build/NAME/REL.
    pub folder: PathBuf,
    /// False if it was there already, built from the same inputs.
    pub changed: bool,
    /// The packages it stands on, as mmdebstrap packed them.
    pub packages_tar: PathBuf,
}

/// File names in a release's folder, besides the manifest.
const FILES: [&str; 5] = ["kiln.efi", "kernel", "initramfs", "root", "sbom.json"];

#[derive(Debug, Serialize, Deserialize)]
struct Stamp {
    /// Digest of every input.
    input: String,
    /// What was made.
    files: BTreeMap<String, Artifact>,
}

/// Builds a release at a site whose key is not encrypted.
pub fn build(options: &BuildOptions) -> Result<Built, BuildError> {
    build_with(options, &mut Unlock::nobody())
}

/// Builds a release. Whom to ask for the key's passphrase is asked first.
pub fn build_with(options: &BuildOptions, unlock: &mut Unlock<'_>) -> Result<Built, BuildError> {
    let recipe = Recipe::load(&options.recipe)?;
    let site = SiteDir::open(&options.site_dir)?;
    let published = Repository::newest(&site, Timestamp::now())?;
    let agent = read_agent(&options.agent)?;
    let following = || published.highest(&recipe.name).map_or(1, |newest| newest.release.saturating_add(1));
    let release = options.release.unwrap_or_else(following);
    let agent_api_ca_pem = site.read_online("agent-ca.pem")?;
    let key = if options.unsigned { None } else { Some(SigningKey::open(&site, "db", unlock)?) };
    let settings = Settings { name: &site.name, agent_api_ca_pem, trust_root: published.trust_root, key };
    make_folder(&options.cache)?;
    let _lock = lock(&options.cache)?;

    let cached = if options.refresh { None } else { Base::cached(&recipe, &options.cache) };
    let folder = site.build(&recipe.name, release);
    let inputs = Inputs { recipe: &recipe, site: &settings, agent: &agent, release, urls: &options.site_urls };
    if let Some(base) = &cached
        && let Some(manifest) = unchanged(&folder, &inputs.digest(base))
    {
        return Ok(Built { manifest, folder, changed: false, packages_tar: base.root_tar() });
    }

    root::sweep(&options.cache);
    let rights = host::check()?;
    let mut steps = options.progress.start(if cached.is_some() { 5 } else { 8 });
    let base = match cached {
        Some(base) => base,
        None => Base::make(&recipe, &options.cache, rights, &mut steps)?,
    };
    let digest = inputs.digest(&base);
    if let Some(manifest) = unchanged(&folder, &digest) {
        steps.finish();
        return Ok(Built { manifest, folder, changed: false, packages_tar: base.root_tar() });
    }
    let parts = inputs.make(&base, rights, &options.cache, &mut steps)?;
    steps.next("Write the release");
    parts.write(&folder, digest)?;
    steps.finish();
    Ok(Built { manifest: parts.manifest, folder, changed: true, packages_tar: base.root_tar() })
}

/// What the site gives to every image.
struct Settings<'a> {
    name: &'a str,
    agent_api_ca_pem: String,
    trust_root: String,
    /// Signs for Secure Boot.
    key: Option<SigningKey>,
}

/// Everything that a release's bytes depend on, besides the base.
struct Inputs<'a> {
    recipe: &'a Recipe,
    site: &'a Settings<'a>,
    agent: &'a [u8],
    release: u64,
    urls: &'a SiteUrls,
}

/// A release's bytes.
struct Parts {
    manifest: Manifest,
    files: BTreeMap<&'static str, Vec<u8>>,
}

impl Inputs<'_> {
    fn digest(&self, base: &Base) -> String {
        let mut lines = vec![format!("format {FORMAT}"), format!("release {}", self.release)];
        lines.push(format!("base {}", sha256(&json(&base.info))));
        lines.push(format!("agent {}", sha256(self.agent)));
        // Contents, in the order they were read; where they lie does not matter.
        lines.extend(self.recipe.sources.iter().map(|(_, bytes)| format!("recipe {}", sha256(bytes))));
        let Settings { name, agent_api_ca_pem, trust_root, key } = self.site;
        for text in [name, agent_api_ca_pem.as_str(), trust_root] {
            lines.push(format!("site {}", sha256(text.as_bytes())));
        }
        lines.push(format!("secure boot {:?}", key.as_ref().map(SigningKey::fingerprint)));
        let SiteUrls { http, agent } = self.urls;
        lines.push(format!("urls {http:?} {agent:?}"));
        sha256(lines.join("\n").as_bytes())
    }

    fn make(&self, base: &Base, rights: host::Rights, cache: &Path, steps: &mut Steps) -> Result<Parts, BuildError> {
        let Recipe { name, class, architecture, .. } = self.recipe;
        let epoch = base.info.epoch;
        let built = Timestamp::from_second(epoch).map_err(|_| BuildError::IndexDate { path: base.folder.clone() })?;
        let identity = format!("{name}/{}", self.release);

        steps.next("Make the root file system");
        let firmware = Firmware::gather(self.recipe, base, &initramfs::closure(self.recipe, base)?.files)?;
        if !firmware.missing.is_empty() {
            let missing = firmware.missing.join("\n  ");
            steps.note(&format!("firmware that no package of `firmware` has, named by the module:\n  {missing}"));
        }
        let (tar, os_release) = root::tree(self.recipe, base, self.release, self.agent, &firmware)?;
        let root = root::artifact(&tar, &identity, epoch, rights, cache)?;
        let status = dpkg_status(&tar);
        let extra = &base.info.extra_packages;
        let sbom = sbom::make(name, self.release, &self.recipe.suite, &status, extra);

        steps.next("Pack the initramfs");
        let boot = BootInfo {
            image: name.clone(),
            release: self.release,
            class: class.clone(),
            architecture: architecture.clone(),
            root_hash: root.verity.root_hash.clone(),
            command_line: self.recipe.command_line.clone(),
            built,
            site: SiteSettings {
                name: self.site.name.to_owned(),
                http_urls: self.urls.http.clone(),
                agent_urls: self.urls.agent.clone(),
                agent_api_ca_pem: self.site.agent_api_ca_pem.clone(),
                mode: if self.recipe.disk.is_some() { Mode::Disk } else { Mode::Ram },
                disk: self.recipe.disk.clone(),
                secure_boot: self.site.key.as_ref().map(SigningKey::fingerprint),
                network: self.recipe.network.clone(),
            },
            trust_root: self.site.trust_root.clone(),
        };
        let signed = initramfs::Signed::make(self.recipe, base, &boot.root_hash, self.site.key.as_ref())?;
        let initramfs = initramfs::make(self.recipe, base, &boot, self.agent, &signed, &firmware, epoch)?;

        steps.next("Put the UKI together");
        let kernel = secure_boot::bare(&read(&base.kernel())?, &base.kernel())?;
        let kexec = self.site.key.as_ref().map(|key| key.kexec(&kernel, &base.kernel())).transpose()?;
        let uki = uki::assemble(
            &read(&base.stub())?,
            &uki::Parts {
                os_release: &os_release,
                uname: &base.info.kernel_release,
                command_line: &self.recipe.command_line,
                sbat: &format!("kiln.{name},1,Kiln,{name},{},-\n", self.release),
                linux: &kernel,
                kexec_signature: kexec.as_ref().map(|kexec| kexec.signature.as_slice()),
                initrd: &initramfs,
            },
        )?;

        let uki = match &self.site.key {
            Some(key) => key.image(&uki, Path::new("kiln.efi"))?,
            None => uki,
        };
        let certificate = self.site.key.as_ref().map(SigningKey::fingerprint);
        let measured =
            measured(&uki, &kernel, signed.loader(), certificate).map_err(|source| BuildError::Measured { source })?;
        let measured = Measured { kexec: Some(Crossing::of(&initramfs, &root.bytes)), ..measured };
        if let Some(disk) = &self.recipe.disk {
            fits(disk, uki.len() as u64, root.bytes.len() as u64)?;
        }

        steps.next("Write the manifest");
        let manifest = Manifest {
            type_: MANIFEST_TYPE.into(),
            spec_version: "1.0".into(),
            image: name.clone(),
            release: self.release,
            class: class.clone(),
            architecture: architecture.clone(),
            product: self.recipe.product.clone(),
            built,
            uki: named(&uki),
            kernel: named(&kernel),
            kexec_kernel: kexec.map(|kexec| named(&kexec.copy)),
            initramfs: named(&initramfs),
            extra: None,
            root: named(&root.bytes),
            verity: root.verity,
            command_line: self.recipe.command_line.clone(),
            policy: self.recipe.policy.clone(),
            hooks: self.recipe.declared.hooks.clone(),
            health: self.recipe.declared.health.clone(),
            writable: self.recipe.writable.clone(),
            secrets: self.recipe.declared.secrets.clone(),
            certificate: self.recipe.declared.certificate.clone(),
            sbom: Some(named(&sbom)),
            measured: Some(measured),
            role_may_report: Some(self.recipe.exec.iter().any(|place| place.rule.may_report)),
        };
        let files = FILES.into_iter().zip([uki, kernel, initramfs, root.bytes, sbom]).collect();
        Ok(Parts { manifest, files })
    }
}

impl Parts {
    /// Writes the folder beside its place, then puts it there.
    fn write(&self, folder: &Path, input: String) -> Result<(), BuildError> {
        let parent = folder.parent().expect("the folder's path was joined from three parts");
        make_folder(parent)?;
        let fail = || BuildError::write(folder);
        let temp = tempfile::Builder::new().prefix(".new-").tempdir_in(parent).map_err(fail())?;
        let manifest = json(&self.manifest);
        let mut files = BTreeMap::new();
        for (name, bytes) in self.files.iter().map(|(name, bytes)| (*name, bytes)).chain([("manifest.json", &manifest)])
        {
            write_as(&temp.path().join(name), &folder.join(name), bytes)?;
            files.insert(name.to_owned(), named(bytes));
        }
        write_as(&temp.path().join(STAMP), &folder.join(STAMP), &json(&Stamp { input, files }))?;
        // tempfile makes folders for their owner only; a release is no secret.
        std::fs::set_permissions(temp.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).map_err(fail())?;
        if folder.exists() {
            std::fs::remove_dir_all(folder).map_err(fail())?;
        }
        std::fs::rename(temp.path(), folder).map_err(fail())?;
        // Under that name it is no longer there to be removed.
        let _ = temp.keep();
        Ok(())
    }
}

/// The manifest, if the folder holds what these inputs give, byte for byte.
fn unchanged(folder: &Path, input: &str) -> Option<Manifest> {
    let stamp: Stamp = serde_json::from_slice(&std::fs::read(folder.join(STAMP)).ok()?).ok()?;
    if stamp.input != input {
        return None;
    }
    for (name, artifact) in &stamp.files {
        let whole = std::fs::read(folder.join(name)).is_ok_and(|bytes| named(&bytes) == *artifact);
        if !whole {
            return None;
        }
    }
    serde_json::from_slice(&std::fs::read(folder.join("manifest.json")).ok()?).ok()
}

fn named(bytes: &[u8]) -> Artifact {
    Artifact { sha256: sha256(bytes), length: bytes.len() as u64 }
}

/// Two UKIs, the loader and its files fit on the EFI system partition, and the root into a slot.
fn fits(disk: &DiskSettings, uki: u64, root: u64) -> Result<(), BuildError> {
    let esp = 2 * uki + (8 << 20);
    for (key, needed, has) in [("esp", esp, disk.esp), ("slot", root, disk.slot)] {
        if needed > has {
            return Err(BuildError::DiskTooSmall { key, needed, has });
        }
    }
    Ok(())
}

fn dpkg_status(tar: &[u8]) -> String {
    let entries = tarball::entries(tar).unwrap_or_default();
    let status = entries.iter().find(|entry| entry.path == "/var/lib/dpkg/status");
    status.map_or(String::new(), |entry| String::from_utf8_lossy(&tar[entry.data.clone()]).into_owned())
}

/// Held until it is dropped, also when the process is killed.
fn lock(cache: &Path) -> Result<File, BuildError> {
    let path = cache.join("lock");
    let file = File::options().create(true).append(true).open(&path);
    let file = file.and_then(|file| file.lock().map(|()| file));
    file.map_err(BuildError::write(&path))
}

fn read_agent(path: &Path) -> Result<Vec<u8>, BuildError> {
    let bytes = std::fs::read(path).map_err(|_| BuildError::NoAgent { path: path.into() })?;
    match not_static(&bytes) {
        None => Ok(bytes),
        Some(detail) => Err(BuildError::AgentNotStatic { path: path.into(), detail }),
    }
}

/// Why an ELF program cannot run without anything beside it.
fn not_static(elf: &[u8]) -> Option<&'static str> {
    let number = |at: usize, length: usize| {
        let bytes = elf.get(at..at.checked_add(length)?)?;
        Some(bytes.iter().rev().fold(0_usize, |sum, byte| sum << 8 | usize::from(*byte)))
    };
    // ELF64, little-endian; e_machine 62 is x86_64.
    if elf.get(..6) != Some(b"\x7fELF\x02\x01") || number(18, 2) != Some(62) {
        return Some("it is no x86_64 ELF file");
    }
    let (Some(table), Some(size), Some(count)) = (number(32, 8), number(54, 2), number(56, 2)) else {
        return Some("its header is cut short");
    };
    let types = (0..count).map(|entry| table.checked_add(entry * size).and_then(|at| number(at, 4)));
    // PT_INTERP
    types.into_iter().any(|kind| kind == Some(3)).then_some("it names a dynamic loader")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_static_programs_are_agents() {
        let this = std::fs::read("/proc/self/exe").unwrap();
        assert_eq!(not_static(&this), Some("it names a dynamic loader"), "tests are linked to glibc");
        assert!(not_static(b"#!/bin/sh\n").is_some());
        assert!(not_static(&this[..50]).is_some());
    }
}
