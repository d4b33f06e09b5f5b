//! The initramfs: the agent as /init, what it is to boot, and the kernel modules it may need before it has a root.

use crate::base::{Base, read};
use crate::boot_keys::SigningKey;
use crate::cpio::{Archive, Node};
use crate::error::BuildError;
use crate::firmware::Firmware;
use crate::host;
use crate::modules::{self, Closure, Index};
use crate::recipe::Recipe;
use crate::uki;
use kiln_release::{BootInfo, IPE_POLICY_PATH, ROOT_SIGNATURE_PATH};
use std::path::Path;
use std::process::Command;

/// zstd's best ordinary level: its window of 8 MiB is the largest that every kernel's decompressor takes.
const LEVEL: i32 = 19;

/// What may be executed where the kernel enforces it (Linux Documentation/admin-guide/LSM/ipe.rst): this initramfs, and
/// a verity root whose hash the site signed. Memory that no file backs is denied as well.
const IPE_POLICY: &str = "\
policy_name=kiln policy_version=0.0.1
DEFAULT action=ALLOW
DEFAULT op=EXECUTE action=DENY
op=EXECUTE boot_verified=TRUE action=ALLOW
op=EXECUTE dmverity_signature=TRUE action=ALLOW
";

/// What carries a signature of the site's Secure Boot key besides kernel and UKI.
#[derive(Debug, Default)]
pub(crate) struct Signed {
    /// The boot loader of machines in disk mode; unsigned without a key.
    loader: Option<Vec<u8>>,
    root_hash: Option<Vec<u8>>,
    policy: Option<Vec<u8>>,
}

impl Signed {
    pub(crate) fn make(
        recipe: &Recipe,
        base: &Base,
        root_hash: &str,
        key: Option<&SigningKey>,
    ) -> Result<Self, BuildError> {
        let loader = match (&recipe.disk, key) {
            (None, _) => None,
            (Some(_), None) => Some(read(&base.loader())?),
            (Some(_), Some(key)) => Some(key.image(&uki::realigned(&read(&base.loader())?)?, &base.loader())?),
        };
        Ok(Self {
            loader,
            root_hash: key.map(|key| key.detached(root_hash.as_bytes())),
            policy: key.map(|key| key.enclosing(IPE_POLICY.as_bytes())),
        })
    }

    /// The boot loader for disks.
    pub(crate) fn loader(&self) -> Option<&[u8]> {
        self.loader.as_deref()
    }
}

/// Puts it together and compresses it.
pub(crate) fn make(
    recipe: &Recipe,
    base: &Base,
    boot: &BootInfo,
    agent: &[u8],
    signed: &Signed,
    firmware: &Firmware,
    epoch: i64,
) -> Result<Vec<u8>, BuildError> {
    let archive = contents(recipe, base, boot, agent, signed, firmware)?;
    let cpio = archive.into_bytes(u32::try_from(epoch).unwrap_or(0));
    let mut bytes = zstd::bulk::compress(&cpio, LEVEL).map_err(BuildError::Compress)?;
    // A further cpio may be put behind it (a prefetched root, after kexec): the kernel looks for that at multiples of
    // 4.
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    Ok(bytes)
}

/// The kernel modules of a recipe, with all they need.
pub(crate) fn closure(recipe: &Recipe, base: &Base) -> Result<Closure, BuildError> {
    let text = |name: &str| read(&base.modules().join(name)).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    let index = Index {
        dep: text("modules.dep")?,
        alias: text("modules.alias")?,
        softdep: text("modules.softdep")?,
        builtin: text("modules.builtin")?,
    };
    Ok(modules::closure(&index, &recipe.modules, &recipe.kernel)?)
}

fn plain(file: &str) -> &str {
    file.strip_suffix(".xz").unwrap_or(file)
}

/// A module as the kernel takes it at once: to unpack it there takes longer than all the rest of loading it, and the
/// initramfs is compressed as a whole anyway.
fn module(path: &Path) -> Result<Vec<u8>, BuildError> {
    if path.extension().is_none_or(|end| end != "xz") {
        return read(path);
    }
    let mut xz = Command::new("xz");
    host::output(xz.args(["--decompress", "--stdout"]).arg(path), "unpacking a kernel module", |_| ())
}

fn contents(
    recipe: &Recipe,
    base: &Base,
    boot: &BootInfo,
    agent: &[u8],
    signed: &Signed,
    firmware: &Firmware,
) -> Result<Archive, BuildError> {
    let mut archive = Archive::default();
    let mut add = |path: &str, mode: u32, node: Node| archive.add(path, mode, node).map_err(BuildError::Initramfs);
    for folder in ["dev", "newroot", "proc", "run", "sys"] {
        add(folder, 0o755, Node::Directory)?;
    }
    // The kernel opens it for /init before anything is mounted.
    add("dev/console", 0o600, Node::CharDevice { major: 5, minor: 1 })?;
    add("init", 0o755, Node::File(agent.to_vec()))?;
    let boot = serde_json::to_vec(boot).expect("plain structs have a JSON form");
    add("kiln/boot.json", 0o444, Node::File(boot))?;

    let Signed { loader, root_hash, policy } = signed;
    // The UKI's signature covers them; the agent puts the loader on the disk, and hands the others to the kernel.
    for (path, file) in
        [("/kiln/systemd-boot.efi", loader), (ROOT_SIGNATURE_PATH, root_hash), (IPE_POLICY_PATH, policy)]
    {
        if let Some(bytes) = file {
            add(&path[1..], 0o444, Node::File(bytes.clone()))?;
        }
    }

    let closure = closure(recipe, base)?;
    let folder = format!("lib/modules/{}", base.info.kernel_release);
    for file in &closure.files {
        add(&format!("{folder}/{}", plain(file)), 0o644, Node::File(module(&base.modules().join(file))?))?;
    }
    for (name, text) in [
        ("modules.dep", closure.dep.replace(".ko.xz", ".ko")),
        ("modules.alias", closure.alias),
        ("modules.softdep", closure.softdep),
        ("modules.builtin", closure.builtin),
    ] {
        add(&format!("{folder}/{name}"), 0o644, Node::File(text.into_bytes()))?;
    }
    for (name, bytes) in &firmware.files {
        add(&format!("lib/firmware/{name}"), 0o644, Node::File(bytes.clone()))?;
    }
    Ok(archive)
}
