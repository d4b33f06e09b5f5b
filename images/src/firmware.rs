//! Firmware that drivers load into their devices: which files the chosen modules name (`modinfo`, field `firmware`), and
//! where they are in the packages that a recipe's `firmware` names. The kernel looks for them below `/lib/firmware`
//! (Documentation/driver-api/firmware), before the root is there in the initramfs, afterwards in the root.

use crate::base::Base;
use crate::error::BuildError;
use crate::host;
use crate::recipe::Recipe;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};
use std::process::Command;

/// Where packages put firmware, and where the kernel finds it.
pub(crate) const FOLDER: &str = "/usr/lib/firmware";

/// The firmware of an image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Firmware {
    /// Name below [`FOLDER`] to bytes.
    pub(crate) files: BTreeMap<String, Vec<u8>>,
    /// Files that a module names and no package has: `module: name`.
    pub(crate) missing: Vec<String>,
}

impl Firmware {
    /// Of `modules`, files below the base's modules directory. Without packages in the recipe: none, and none missed.
    pub(crate) fn gather(recipe: &Recipe, base: &Base, modules: &[String]) -> Result<Self, BuildError> {
        if recipe.firmware.is_empty() {
            return Ok(Self::default());
        }
        let mut command = Command::new("modinfo");
        command.args(modules.iter().map(|module| base.modules().join(module)));
        let said = host::output(&mut command, "asking modules for the firmware they name", |_| ())?;
        Self::of(&named(&String::from_utf8_lossy(&said)), &base.firmware())
    }

    fn of(named: &BTreeSet<(String, String)>, folder: &Path) -> Result<Self, BuildError> {
        let mut firmware = Self::default();
        for (module, name) in named {
            let plain = Path::new(name).components().all(|part| matches!(part, Component::Normal(_)));
            // Packages have links from one name to another; the kernel is given what is behind them.
            match std::fs::read(folder.join(name)) {
                Ok(bytes) if plain => drop(firmware.files.insert(name.clone(), bytes)),
                Ok(_) => firmware.missing.push(format!("{module}: {name}")),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    firmware.missing.push(format!("{module}: {name}"));
                }
                Err(source) => return Err(BuildError::Read { path: folder.join(name), source }),
            }
        }
        Ok(firmware)
    }
}

/// (module, firmware) of what `modinfo FILE…` prints: a block for each file that begins with its name. Patterns
/// (`iwlwifi-*.ucode`) name no file.
fn named(said: &str) -> BTreeSet<(String, String)> {
    let (mut module, mut named) = (String::new(), BTreeSet::new());
    for (key, value) in said.lines().filter_map(|line| line.split_once(':')) {
        match key {
            "filename" => {
                let file = value.rsplit('/').next().unwrap_or(value);
                file.split('.').next().unwrap_or(file).clone_into(&mut module);
            }
            "firmware" if !value.contains(['*', '?']) => {
                named.insert((module.clone(), value.trim().to_owned()));
            }
            _ => {}
        }
    }
    named
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_modinfo_says_is_read_by_module() {
        let said = "filename:       /x/kernel/bnx2.ko.xz\nfirmware:       bnx2/a.fw\nfirmware:       bnx2/b.fw\n\
                    alias:          pci:v1\nfilename:       /x/tg3.ko\nfirmware:       tigon/tg3.bin\nfirmware:       t/*.bin\n";
        let pairs: Vec<(String, String)> = named(said).into_iter().collect();
        let pair = |module: &str, name: &str| (module.to_owned(), name.to_owned());
        assert_eq!(pairs, [pair("bnx2", "bnx2/a.fw"), pair("bnx2", "bnx2/b.fw"), pair("tg3", "tigon/tg3.bin")]);
    }

    #[test]
    fn what_is_there_is_taken_behind_links_and_what_is_not_is_named() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("bnx2")).unwrap();
        std::fs::write(dir.path().join("bnx2/real.fw"), b"bytes").unwrap();
        std::os::unix::fs::symlink("real.fw", dir.path().join("bnx2/a.fw")).unwrap();
        let wanted = ["bnx2/a.fw", "bnx2/gone.fw", "../etc/passwd"].map(|name| ("bnx2".to_owned(), name.to_owned()));
        let firmware = Firmware::of(&wanted.into(), dir.path()).unwrap();
        assert_eq!(firmware.files, BTreeMap::from([("bnx2/a.fw".to_owned(), b"bytes".to_vec())]));
        assert_eq!(firmware.missing, ["bnx2: ../etc/passwd", "bnx2: bnx2/gone.fw"]);
    }
}
