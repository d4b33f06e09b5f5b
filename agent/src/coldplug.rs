//! Loads the drivers that the machine's hardware asks for, and those that the boot itself needs.

use crate::error::{AgentError, Result};
use crate::modules::ModuleIndex;
use crate::sys;
use std::collections::HashSet;
use std::fs::File;
use std::path::{Path, PathBuf};

/// What the boot needs whatever the hardware: loaded if the image has it, else it is built in.
const ALWAYS: [&str; 6] = ["efivarfs", "af_packet", "loop", "dm_verity", "erofs", "virtio_rng"];
/// Rounds of looking: a bus driver makes devices appear that ask for more.
const ROUNDS: usize = 8;

/// The drivers of one kernel.
pub struct Drivers {
    dir: PathBuf,
    index: ModuleIndex,
    loaded: HashSet<String>,
}

impl Drivers {
    /// Reads the index of the running kernel's modules.
    pub fn open() -> Result<Self> {
        let release = "/proc/sys/kernel/osrelease";
        let version = std::fs::read_to_string(release).map_err(AgentError::file(release))?;
        let dir = Path::new("/lib/modules").join(version.trim());
        let dep = dir.join("modules.dep");
        let dep = std::fs::read_to_string(&dep).map_err(AgentError::file(dep))?;
        // These two may be left out of an image whose modules have neither.
        let text = |name: &str| std::fs::read_to_string(dir.join(name)).unwrap_or_default();
        let index = ModuleIndex::parse(&dep, &text("modules.alias"), &text("modules.softdep"));
        Ok(Self { dir, index, loaded: HashSet::new() })
    }

    /// Loads what is always needed.
    pub fn load_always(&mut self) -> Result<()> {
        ALWAYS.iter().try_for_each(|module| self.load(module))
    }

    /// Loads what the devices present ask for, until nothing new is asked for. A driver that will not load is told and
    /// passed over: the machine may not need it.
    pub fn coldplug(&mut self) {
        for _ in 0..ROUNDS {
            let before = self.loaded.len();
            let mut aliases = HashSet::new();
            collect_aliases(Path::new("/sys/devices"), 0, &mut aliases);
            let wanted: HashSet<String> =
                aliases.iter().flat_map(|alias| self.index.matching(alias)).map(str::to_owned).collect();
            for module in wanted {
                if let Err(error) = self.load(&module) {
                    println!("kiln-agent: driver {module}: {error}");
                }
            }
            if self.loaded.len() == before {
                return;
            }
        }
    }

    fn load(&mut self, module: &str) -> Result<()> {
        for (name, relative) in self.index.load_order(module, &self.loaded) {
            let path = self.dir.join(relative);
            let file = File::open(&path).map_err(AgentError::file(&path))?;
            let compressed = path.extension().is_some_and(|e| e != "ko");
            match sys::load_module(&file, compressed) {
                Err(e) if e.raw_os_error() != Some(libc::EEXIST) => {
                    self.loaded.insert(name);
                    return Err(AgentError::file(path)(e));
                }
                Ok(()) | Err(_) => {
                    self.loaded.insert(name);
                }
            }
        }
        Ok(())
    }
}

fn collect_aliases(dir: &Path, depth: usize, aliases: &mut HashSet<String>) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let Ok(kind) = entry.file_type() else { continue };
        if kind.is_dir() && depth < 24 {
            collect_aliases(&entry.path(), depth + 1, aliases);
        } else if kind.is_file()
            && entry.file_name() == "modalias"
            && let Ok(text) = std::fs::read_to_string(entry.path())
            && !text.trim().is_empty()
        {
            aliases.insert(text.trim().to_owned());
        }
    }
}
