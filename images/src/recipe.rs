//! Recipes: the one TOML source of an image. What is read is raw text with places; what comes out is checked.
//!
//! A recipe may extend another (`extends = "minimal.toml"`): single values replace the other's, lists are added to it.

pub(crate) mod allow;
mod disk;
mod words;

use crate::declared::{Declared, RawDrift, RawHealth, RawHook, RawLimit};
use crate::error::RecipeError;
use crate::network::read_network;
pub use allow::ExecPlace;
use allow::RawExec;
use disk::RawDisk;
use kiln_release::network::NetworkConfig;
use kiln_release::{
    AcceptancePlan, DiskSettings, FilePolicy, WantedCertificate, WantedSecret, WritableMount, is_image_name,
};
use serde::Deserialize;
use std::ops::Range;
use std::path::{Path, PathBuf};
use toml::Spanned;
pub(crate) use words::{bytes_of, is_root_path};
use words::{is_class, is_command_line, is_module, is_name, is_package, is_unit};

/// How many recipes may extend each other.
const EXTENDS_LIMIT: usize = 4;
/// What the data partition needs of the kernel: the agent loads them by these names.
const DATA_MODULES: [&str; 5] = ["aes_generic", "aesni_intel", "dm_crypt", "ext4", "xts"];
/// What a recipe's command line is.
const COMMAND_LINE: &str = "one line of printable ASCII, exactly what the kernel gets, that says \
                            systemd.import_credentials=no (=yes takes credentials, as root's password, from firmware)";
/// Most bytes of noise in one file.
const MAX_NOISE: u64 = 1 << 20;

/// A file that a recipe puts into the root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecipeFile {
    /// Absolute path in the root.
    pub path: String,
    /// Permission bits.
    pub mode: u32,
    /// Its bytes.
    pub content: Vec<u8>,
}

/// A checked recipe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recipe {
    /// Image name.
    pub name: String,
    /// Signed class of its releases.
    pub class: String,
    /// Which hardware it is for.
    pub product: String,
    /// Debian suite.
    pub suite: String,
    /// `x86_64`.
    pub architecture: String,
    /// Kernel package, or the metapackage that depends on it.
    pub kernel: String,
    /// Kernel command line, exactly.
    pub command_line: String,
    /// Packages in the root, sorted.
    pub packages: Vec<String>,
    /// Kernel modules in the initramfs.
    pub modules: Vec<String>,
    /// Packages with the firmware that these modules load.
    pub firmware: Vec<String>,
    /// Paths of the packages that are left out, with all that is below them; with a `*` at the end, all that begin so.
    pub exclude: Vec<String>,
    /// systemd units that may not start.
    pub mask: Vec<String>,
    /// systemd units that multi-user.target starts.
    pub enable: Vec<String>,
    /// Health checks, hooks, limits, and what is no drift.
    pub declared: Declared,
    /// tmpfs mounts.
    pub writable: Vec<WritableMount>,
    /// Allow-lists of programs in them.
    pub exec: Vec<ExecPlace>,
    /// Further files.
    pub files: Vec<RecipeFile>,
    /// What the release declares and a role may parameterise.
    pub policy: FilePolicy,
    /// How the disk is used, in disk mode; none: the root lives in memory.
    pub disk: Option<DiskSettings>,
    /// How machines are connected until the site signs a newer configuration; none: every card is asked.
    pub network: Option<NetworkConfig>,
    /// What is tested, in an image of class `acceptance`.
    pub acceptance: Option<AcceptancePlan>,
    /// Every file that was read for it, with its bytes: the build's input.
    pub sources: Vec<(PathBuf, Vec<u8>)>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Raw {
    extends: Option<Spanned<String>>,
    name: Option<Spanned<String>>,
    class: Option<Spanned<String>>,
    product: Option<Spanned<String>>,
    suite: Option<Spanned<String>>,
    architecture: Option<Spanned<String>>,
    kernel: Option<Spanned<String>>,
    command_line: Option<Spanned<String>>,
    packages: Vec<Spanned<String>>,
    modules: Vec<Spanned<String>>,
    firmware: Vec<Spanned<String>>,
    exclude: Vec<Spanned<String>>,
    mask: Vec<Spanned<String>>,
    enable: Vec<Spanned<String>>,
    health: Vec<RawHealth>,
    hook: Vec<RawHook>,
    limit: Vec<RawLimit>,
    secret: Vec<Spanned<WantedSecret>>,
    certificate: Option<Spanned<WantedCertificate>>,
    drift: Option<RawDrift>,
    writable: Vec<RawWritable>,
    exec: Vec<RawExec>,
    file: Vec<RawFile>,
    policy: Option<RawPolicy>,
    mode: Option<Spanned<String>>,
    disk: Option<Spanned<RawDisk>>,
    network: Option<Spanned<String>>,
    acceptance: Option<Spanned<AcceptancePlan>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawWritable {
    path: Spanned<String>,
    size: Spanned<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFile {
    path: Spanned<String>,
    mode: Option<Spanned<String>>,
    content: Option<Spanned<String>>,
    source: Option<Spanned<String>>,
    noise: Option<Spanned<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPolicy {
    refuse_foreign_command_line: bool,
}

impl Recipe {
    /// Reads and checks a recipe, and every file it names.
    pub fn load(path: &Path) -> Result<Self, RecipeError> {
        let mut recipe = Partial::default();
        recipe.add(path, 0)?;
        recipe.finish(path)
    }
}

/// A recipe of which parts may still be missing.
#[derive(Debug, Default)]
struct Partial {
    name: Option<String>,
    class: Option<String>,
    product: Option<String>,
    suite: Option<String>,
    architecture: Option<String>,
    kernel: Option<String>,
    command_line: Option<String>,
    packages: Vec<String>,
    modules: Vec<String>,
    firmware: Vec<String>,
    exclude: Vec<String>,
    mask: Vec<String>,
    enable: Vec<String>,
    declared: Declared,
    writable: Vec<WritableMount>,
    exec: Vec<ExecPlace>,
    files: Vec<RecipeFile>,
    policy: Option<FilePolicy>,
    disk_mode: Option<bool>,
    disk: Option<DiskSettings>,
    network: Option<NetworkConfig>,
    acceptance: Option<AcceptancePlan>,
    sources: Vec<(PathBuf, Vec<u8>)>,
}

/// One recipe file, to turn spans into places.
pub(crate) struct Source<'a> {
    path: &'a Path,
    text: &'a str,
}

impl Source<'_> {
    pub(crate) fn invalid(&self, span: Range<usize>, message: impl Into<String>) -> RecipeError {
        let before = self.text.get(..span.start).unwrap_or(self.text);
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or("").chars().count() + 1;
        RecipeError::Invalid { path: self.path.into(), line, column, message: message.into() }
    }

    /// Takes a string if `good`, else says what is allowed.
    pub(crate) fn check(
        &self,
        value: Spanned<String>,
        good: fn(&str) -> bool,
        allowed: &str,
    ) -> Result<String, RecipeError> {
        if good(value.get_ref()) {
            return Ok(value.into_inner());
        }
        Err(self.invalid(value.span(), format!("{:?} is not {allowed}", value.get_ref())))
    }

    pub(crate) fn check_all(
        &self,
        list: Vec<Spanned<String>>,
        good: fn(&str) -> bool,
        allowed: &str,
    ) -> Result<Vec<String>, RecipeError> {
        list.into_iter().map(|value| self.check(value, good, allowed)).collect()
    }
}

impl Partial {
    fn add(&mut self, path: &Path, depth: usize) -> Result<(), RecipeError> {
        if depth == EXTENDS_LIMIT {
            return Err(RecipeError::TooDeep { path: path.into(), limit: EXTENDS_LIMIT });
        }
        let bytes = read(path)?;
        let text = std::str::from_utf8(&bytes)
            .map_err(|error| RecipeError::Read { path: path.into(), detail: error.to_string() })?;
        let source = Source { path, text };
        let raw: Raw = toml::from_str(text)
            .map_err(|error| source.invalid(error.span().unwrap_or(0..0), error.message().trim()))?;
        let folder = path.parent().unwrap_or(Path::new("."));
        if let Some(other) = &raw.extends {
            self.add(&folder.join(other.get_ref()), depth + 1)?;
        }
        self.take(raw, &source, folder)?;
        self.sources.push((path.into(), bytes));
        Ok(())
    }

    fn take(&mut self, raw: Raw, source: &Source<'_>, folder: &Path) -> Result<(), RecipeError> {
        let single =
            |slot: &mut Option<String>, value: Option<Spanned<String>>, good: fn(&str) -> bool, allowed: &str| {
                if let Some(value) = value {
                    *slot = Some(source.check(value, good, allowed)?);
                }
                Ok::<_, RecipeError>(())
            };
        single(&mut self.name, raw.name, is_image_name, "an image name (a-z, 0-9, -; at most 32, a letter first)")?;
        single(&mut self.class, raw.class, is_class, "a class: normal, rescue, acceptance or wipe")?;
        single(&mut self.product, raw.product, is_name, "a product name (a-z, 0-9, -)")?;
        single(&mut self.suite, raw.suite, |suite| suite == "trixie", "a suite this builder knows: trixie")?;
        single(
            &mut self.architecture,
            raw.architecture,
            |name| name == "x86_64",
            "an architecture this builder knows: x86_64",
        )?;
        single(&mut self.kernel, raw.kernel, is_package, "a Debian package name")?;
        single(&mut self.command_line, raw.command_line, is_command_line, COMMAND_LINE)?;
        self.packages.extend(source.check_all(raw.packages, is_package, "a Debian package name")?);
        self.modules.extend(source.check_all(raw.modules, is_module, "a kernel module's name")?);
        self.firmware.extend(source.check_all(raw.firmware, is_package, "a Debian package name")?);
        self.exclude.extend(source.check_all(raw.exclude, is_root_path, "an absolute path without . or ..")?);
        self.mask.extend(source.check_all(raw.mask, is_unit, "a systemd unit's file name")?);
        self.enable.extend(source.check_all(raw.enable, is_unit, "a systemd unit's file name")?);
        for health in raw.health {
            self.declared.health(health, source)?;
        }
        for hook in raw.hook {
            self.declared.hook(hook, source)?;
        }
        for limit in raw.limit {
            self.declared.limit(limit, source)?;
        }
        for secret in raw.secret {
            self.declared.secret(secret, source)?;
        }
        if let Some(certificate) = raw.certificate {
            self.declared.certificate(certificate, source)?;
        }
        if let Some(drift) = raw.drift {
            self.declared.drift(drift, source)?;
        }
        for mount in raw.writable {
            let size = bytes_of(mount.size.get_ref())
                .ok_or_else(|| source.invalid(mount.size.span(), "a size is a number with K, M or G, like \"64M\""))?;
            let span = mount.path.span();
            let path = source.check(mount.path, is_root_path, "an absolute path without . or ..")?;
            let own = |place: &str| path == place || path.starts_with(&format!("{place}/"));
            if ["/run", "/dev", "/proc", "/sys"].into_iter().any(own) {
                return Err(source.invalid(span, format!("{path} is writable already, or the kernel's own")));
            }
            if self.writable.iter().any(|other| other.path == path) {
                return Err(source.invalid(span, format!("{path} is named twice")));
            }
            self.writable.push(WritableMount { path, size });
        }
        for exec in raw.exec {
            self.exec(exec, source, folder)?;
        }
        for file in raw.file {
            self.file(file, source, folder)?;
        }
        if let Some(policy) = raw.policy {
            self.policy = Some(FilePolicy { refuse_foreign_command_line: policy.refuse_foreign_command_line });
        }
        if let Some(mode) = raw.mode {
            let mode = source.check(mode, |mode| matches!(mode, "ram" | "disk"), "a mode: ram or disk")?;
            self.disk_mode = Some(mode == "disk");
        }
        if let Some(disk) = raw.disk {
            let span = disk.span();
            if self.disk_mode != Some(true) {
                return Err(source.invalid(span, "[disk] is for mode = \"disk\", which this recipe does not say"));
            }
            self.disk = Some(disk.into_inner().settings(source)?);
        }
        if let Some(plan) = raw.acceptance {
            plan.get_ref().check().map_err(|reason| source.invalid(plan.span(), reason))?;
            self.acceptance = Some(plan.into_inner());
        }
        if let Some(from) = raw.network {
            let from = folder.join(from.get_ref());
            let bytes = read(&from)?;
            self.network = Some(read_network(&from, &String::from_utf8_lossy(&bytes))?);
            self.sources.push((from, bytes));
        }
        Ok(())
    }

    fn file(&mut self, file: RawFile, source: &Source<'_>, folder: &Path) -> Result<(), RecipeError> {
        let span = file.path.span();
        let path = source.check(file.path, is_root_path, "an absolute path without . or ..")?;
        let mode = match file.mode {
            None => 0o644,
            Some(mode) => match u32::from_str_radix(mode.get_ref(), 8) {
                Ok(bits) if bits <= 0o7777 => bits,
                Ok(_) | Err(_) => return Err(source.invalid(mode.span(), "a mode is octal, like \"0644\"")),
            },
        };
        let mut content = match (file.content, file.source) {
            (Some(content), None) => content.into_inner().into_bytes(),
            (None, Some(from)) => {
                let from = folder.join(from.get_ref());
                let bytes = read(&from)?;
                self.sources.push((from, bytes.clone()));
                bytes
            }
            (Some(_), Some(_)) | (None, None) => {
                return Err(source.invalid(span, "a file has either `content` or `source`"));
            }
        };
        if let Some(size) = file.noise {
            let bytes = bytes_of(size.get_ref()).filter(|bytes| *bytes <= MAX_NOISE);
            let bytes =
                bytes.ok_or_else(|| source.invalid(size.span(), "noise is a number with K, or M, up to \"1M\""))?;
            content.extend(noise(&path, usize::try_from(bytes).expect("it is at most 1 MiB")));
        }
        self.files.push(RecipeFile { path, mode, content });
        Ok(())
    }

    fn finish(mut self, path: &Path) -> Result<Recipe, RecipeError> {
        let missing = |key, hint| move || RecipeError::Missing { path: path.into(), key, hint };
        let sorted = |mut list: Vec<String>| {
            list.sort();
            list.dedup();
            list
        };
        if self.declared.health.is_empty() {
            return Err(missing("[[health]]", "without a health check no release would ever be called healthy")());
        }
        self.check_places(path)?;
        let needy = self.declared.secrets.iter().flat_map(|secret| &secret.units);
        let needy = needy.chain(self.declared.certificate.iter().flat_map(|certificate| &certificate.units));
        if let Some(unit) = needy.into_iter().find(|unit| self.enable.contains(unit)) {
            return Err(RecipeError::Starts { path: path.into(), unit: unit.clone() });
        }
        let data = self.disk.as_ref().and_then(|disk| disk.data.as_ref()).map(|data| data.path.clone());
        if let Some(path) = data {
            // The kernel's modules and the program that make use of it.
            let packages = ["e2fsprogs"].map(str::to_owned);
            self.packages.extend(packages);
            self.modules.extend(DATA_MODULES.map(str::to_owned));
            self.declared.mounts.push(path);
        }
        let class = self.class.as_deref().unwrap_or("normal");
        if (class == "acceptance") != self.acceptance.is_some() {
            let hint = "an image of class acceptance, and no other, says what is tested and for how long";
            return Err(missing("[acceptance]", hint)());
        }
        Ok(Recipe {
            name: self.name.ok_or_else(missing("name", "it names the image"))?,
            class: self.class.unwrap_or_else(|| "normal".into()),
            product: self.product.unwrap_or_else(|| "generic".into()),
            suite: self.suite.ok_or_else(missing("suite", "it names the Debian suite"))?,
            architecture: self.architecture.ok_or_else(missing("architecture", "x86_64"))?,
            kernel: self.kernel.ok_or_else(missing("kernel", "it names the kernel's package"))?,
            command_line: self.command_line.ok_or_else(missing("command_line", COMMAND_LINE))?,
            packages: sorted(self.packages),
            modules: sorted(self.modules),
            firmware: sorted(self.firmware),
            exclude: sorted(self.exclude),
            mask: sorted(self.mask),
            enable: sorted(self.enable),
            declared: self.declared,
            writable: self.writable,
            exec: self.exec,
            files: self.files,
            policy: self.policy.unwrap_or_default(),
            network: self.network,
            acceptance: self.acceptance,
            disk: self.disk_mode.unwrap_or(false).then(|| self.disk.unwrap_or_default()),
            sources: self.sources,
        })
    }
}

fn read(path: &Path) -> Result<Vec<u8>, RecipeError> {
    std::fs::read(path).map_err(|error| RecipeError::Read { path: path.into(), detail: error.to_string() })
}

/// Bytes that no compression makes smaller, the same for the same path: what they are appended to stays where it is.
fn noise(path: &str, length: usize) -> Vec<u8> {
    let hash = |index: u64| ring::digest::digest(&ring::digest::SHA256, format!("noise {index} {path}").as_bytes());
    (0..).flat_map(|index| hash(index).as_ref().to_vec()).take(length).collect()
}
