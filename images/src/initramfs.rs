//! The initramfs: the agent as /init, what it is to boot, and the kernel modules it may need before it has a root.

use crate::base::{Base, read};
use crate::cpio::{Archive, Node};
use crate::error::BuildError;
use crate::modules::{self, Index};
use crate::recipe::Recipe;
use kiln_release::BootInfo;

/// zstd's best ordinary level: its window of 8 MiB is the largest that every kernel's decompressor takes.
const LEVEL: i32 = 19;

/// Puts it together and compresses it.
pub(crate) fn make(
    recipe: &Recipe,
    base: &Base,
    boot: &BootInfo,
    agent: &[u8],
    epoch: i64,
) -> Result<Vec<u8>, BuildError> {
    let archive = contents(recipe, base, boot, agent)?;
    let cpio = archive.into_bytes(u32::try_from(epoch).unwrap_or(0));
    let mut bytes = zstd::bulk::compress(&cpio, LEVEL).map_err(BuildError::Compress)?;
    // A further cpio may be put behind it (a prefetched root, after kexec): the kernel looks for that at multiples of
    // 4.
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    Ok(bytes)
}

fn contents(recipe: &Recipe, base: &Base, boot: &BootInfo, agent: &[u8]) -> Result<Archive, BuildError> {
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

    if recipe.disk.is_some() {
        // The UKI's signature covers it; the agent puts it on the disk.
        add("kiln/systemd-boot.efi", 0o444, Node::File(read(&base.loader())?))?;
    }

    let text = |name: &str| read(&base.modules().join(name)).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    let index = Index {
        dep: text("modules.dep")?,
        alias: text("modules.alias")?,
        softdep: text("modules.softdep")?,
        builtin: text("modules.builtin")?,
    };
    let closure = modules::closure(&index, &recipe.modules, &recipe.kernel)?;
    let folder = format!("lib/modules/{}", base.info.kernel_release);
    for file in &closure.files {
        add(&format!("{folder}/{file}"), 0o644, Node::File(read(&base.modules().join(file))?))?;
    }
    for (name, text) in [
        ("modules.dep", closure.dep),
        ("modules.alias", closure.alias),
        ("modules.softdep", closure.softdep),
        ("modules.builtin", closure.builtin),
    ] {
        add(&format!("{folder}/{name}"), 0o644, Node::File(text.into_bytes()))?;
    }
    Ok(archive)
}
