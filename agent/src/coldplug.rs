//! Loads the drivers that the machine's hardware asks for, and those that the boot itself needs. Each beside the boot, with a
//! deadline: a driver that looks at a device reads it, and a disk that hangs gives no answer, ever. The kernel cannot be
//! called back from that; it is left behind, told, and the boot goes on without the device.

mod alone;
mod probe;

pub use alone::{ALONE, Process, answers, left, main as alone};

use crate::error::{AgentError, Result};
use crate::modules::ModuleIndex;
use crate::{sys, watchdog};
use probe::{Work, beside};
use std::collections::HashSet;
use std::ffi::CStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What the boot needs whatever the hardware: loaded if the image has it, else it is built in.
const ALWAYS: [&str; 4] = ["efivarfs", "efi_pstore", "af_packet", "virtio_rng"];
/// What only the root needs.
const ROOT: [&str; 3] = ["loop", "dm_verity", "erofs"];
/// Modules that no device names, and whose company they belong to: the character device of a BMC.
const COMPANIONS: [(&str, &str); 2] = [("ipmi_si", "ipmi_devintf"), ("ipmi_ssif", "ipmi_devintf")];
/// Watchdogs of real and virtual machines, and what makes the devices of some of them: the LPC bridge and the SMBus
/// controller of Intel's chipsets.
const WATCHDOGS: [&str; 7] = ["i6300esb", "lpc_ich", "i2c_i801", "iTCO_wdt", "sp5100_tco", "wdat_wdt", "hpwdt"];
/// So long a driver has: as long as a disk has to show what is on it ([`crate::disk::search`]).
const PATIENCE: Duration = Duration::from_secs(20);
/// And so long, once a device hangs, each module has: the kernel may let it wait for that device as well, behind having looked
/// at its own (`do_init_module`, `async_synchronize_full`).
const BESIDE_A_HANG: Duration = Duration::from_secs(2);
/// So long what the root needs has, which is loaded beside the network.
const ROOT_PATIENCE: Duration = Duration::from_secs(60);
/// Rounds of looking: a bus driver makes devices appear that ask for more.
const ROUNDS: usize = 8;

/// What was loaded last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum After {
    /// The driver of a network card, for the first time.
    Card,
    /// Any other, or none.
    Driver,
}

/// The drivers of one kernel.
pub struct Drivers {
    dir: PathBuf,
    index: ModuleIndex,
    loaded: HashSet<String>,
    /// Loads [`ROOT`] meanwhile.
    beside: Option<Work>,
    /// What gave no answer in its time, and was not told yet.
    silent: Vec<AgentError>,
    patience: Duration,
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
        let (loaded, silent) = (HashSet::new(), Vec::new());
        Ok(Self { dir, index, loaded, beside: None, silent, patience: PATIENCE })
    }

    /// Loads the watchdogs of the devices present, and nothing else: what comes after them may hang.
    pub fn load_watchdogs(&mut self) {
        for _ in 0..ROUNDS {
            let before = self.loaded.len();
            for module in watchdogs(self.wanted()) {
                self.load(&module);
            }
            if self.loaded.len() == before {
                return;
            }
        }
    }

    /// Loads what is always needed. A driver that fails is told; the stage that needs it fails with its own reason.
    pub fn load_always(&mut self) {
        for module in ALWAYS {
            self.load(module);
        }
    }

    /// Begins to load what the root needs, while the network comes up and the boot server is asked.
    pub fn load_for_root(&mut self) {
        if self.hangs() {
            for module in ROOT {
                self.load(module);
            }
            return;
        }
        let orders: Vec<_> = ROOT
            .into_iter()
            .map(|module| {
                let order = self.index.load_order(module, &self.loaded);
                self.loaded.extend(order.iter().map(|(name, _)| name.clone()));
                (module, order)
            })
            .collect();
        let dir = self.dir.clone();
        self.beside = Some(beside("what the root needs", move || {
            for (module, order) in orders {
                insert(&dir, module, order);
            }
        }));
    }

    /// What gave no answer since this was asked last.
    pub fn silent(&mut self) -> Vec<AgentError> {
        std::mem::take(&mut self.silent)
    }

    /// Some device gave no answer.
    fn hangs(&self) -> bool {
        self.patience == BESIDE_A_HANG
    }

    /// Waits for what was begun; `each` is called every second meanwhile. Whether all of it ended.
    fn wait(&mut self, works: Vec<Work>, patience: Duration, each: &mut dyn FnMut()) -> bool {
        let late = probe::wait(works, patience, each);
        let ended = late.is_empty();
        for what in late {
            // Beside a hang a driver is late because of that; a disk is late by itself.
            if !self.hangs() || what.starts_with(probe::A_DISK) {
                let error = AgentError::DriverSilent { what, seconds: patience.as_secs() };
                println!("kiln-agent: {error}");
                self.silent.push(error);
            }
        }
        if !ended {
            self.patience = BESIDE_A_HANG;
        }
        ended
    }

    /// Waits until that is done, a minute at most, and pets the watchdog meanwhile; what did not load was told.
    pub fn settle(&mut self) {
        let Some(root) = self.beside.take() else { return };
        if !self.wait(vec![root], ROOT_PATIENCE, &mut watchdog::pet) {
            for module in ROOT {
                let order = self.index.load_order(module, &HashSet::new());
                self.insert_each(module, order, &mut watchdog::pet);
            }
        }
    }

    /// Loads what the devices present ask for, until nothing new is asked for. A driver that will not load is told and
    /// passed over: the machine may not need it. The watchdog is petted meanwhile: each has its time, and an end.
    pub fn coldplug(&mut self) {
        self.coldplug_and(&mut |_| watchdog::pet());
    }

    /// The same; `each` is called behind each driver, and every second while one takes longer. Network cards come first.
    pub fn coldplug_and(&mut self, each: &mut dyn FnMut(After)) {
        self.settle();
        for _ in 0..ROUNDS {
            let before = self.loaded.len();
            let (cards, others) = cards_first(&self.index, self.wanted());
            for module in cards {
                let known = self.loaded.contains(&module);
                self.load_and(&module, &mut || each(After::Driver));
                each(if known { After::Driver } else { After::Card });
            }
            for module in others {
                self.load_and(&module, &mut || each(After::Driver));
                each(After::Driver);
            }
            for (module, companion) in COMPANIONS {
                if self.loaded.contains(module) {
                    self.load(companion);
                }
            }
            if self.loaded.len() == before {
                return;
            }
        }
    }

    /// What the devices present ask for.
    fn wanted(&self) -> HashSet<String> {
        let aliases = aliases(Path::new("/sys"));
        aliases.iter().flat_map(|alias| self.index.matching(alias)).map(str::to_owned).collect()
    }

    /// Loads a module and what it needs.
    pub fn load(&mut self, module: &str) {
        self.load_and(module, &mut watchdog::pet);
    }

    fn load_and(&mut self, module: &str, each: &mut dyn FnMut()) {
        self.settle();
        let order = self.index.load_order(module, &self.loaded);
        if order.is_empty() {
            return;
        }
        self.loaded.extend(order.iter().map(|(name, _)| name.clone()));
        let disks = order.iter().any(|(name, _)| name == probe::VIRTIO_DISKS).then(probe::VirtioDisks::hold);
        if self.hangs() || !self.insert_in_time(module, order.clone(), each) {
            self.insert_each(module, order, each);
        }
        if let Some(disks) = disks {
            let begun = disks.look(alone::offer);
            self.wait(begun, self.patience, each);
        }
    }

    fn insert_in_time(&mut self, module: &str, order: Vec<(String, String)>, each: &mut dyn FnMut()) -> bool {
        let (dir, name) = (self.dir.clone(), module.to_owned());
        // A process costs more than a thread: only where something may hang.
        let alone = self.hangs() || order.iter().any(|(_, path)| alone::reads_disks(path));
        let inserted = beside(&format!("driver {module}"), move || {
            if alone { alone::insert_alone(&dir, &name, &order) } else { insert(&dir, &name, order) }
        });
        self.wait(vec![inserted], self.patience, each)
    }

    /// Beside a hang each is loaded by itself: one that does not come back stands before no other. What is there already
    /// costs nothing.
    fn insert_each(&mut self, module: &str, order: Vec<(String, String)>, each: &mut dyn FnMut()) {
        for one in order {
            self.insert_in_time(module, vec![one], each);
        }
    }
}

/// Drivers of network cards, and all others; each in the order of their names, so that one boot is as the next.
fn cards_first(index: &ModuleIndex, wanted: HashSet<String>) -> (Vec<String>, Vec<String>) {
    let mut wanted: Vec<String> = wanted.into_iter().collect();
    wanted.sort_unstable();
    wanted.into_iter().partition(|module| index.is_network(module))
}

/// Those of them that are watchdogs, or lead to one.
fn watchdogs(mut wanted: HashSet<String>) -> HashSet<String> {
    wanted.retain(|module| WATCHDOGS.contains(&module.as_str()));
    wanted
}

/// What a module only would like to have, or another stands in for, may fail: the kernel decides when it comes to the
/// module itself.
fn insert(dir: &Path, module: &str, order: Vec<(String, String)>) {
    let (mut failed, mut itself) = (Vec::new(), true);
    for (name, relative) in order {
        let path = dir.join(relative);
        let loaded = File::open(&path).and_then(|file| {
            let compressed = path.extension().is_some_and(|e| e != "ko");
            sys::load_module(&file, compressed, parameters(&name))
        });
        if let Err(error) = loaded
            && error.raw_os_error() != Some(libc::EEXIST)
        {
            itself &= name != module;
            failed.push(format!("{name}: {error}"));
        }
    }
    if !itself {
        println!("kiln-agent: driver {module} does not load ({})", failed.join("; "));
    }
}

/// A watchdog that runs goes on through a restart and a kexec: the next kernel is watched from its first instruction
/// (watchdog-parameters.rst).
fn parameters(module: &str) -> &'static CStr {
    match module {
        "watchdog" => c"stop_on_reboot=0",
        // Else it makes a bond0 that nobody asked for.
        "bonding" => c"max_bonds=0",
        _ => c"",
    }
}

/// What every device calls itself. Each is of a bus or of a class, but for a few that are the kernel's own (the processor):
/// there are far fewer of them than directories below /sys/devices, which this is called in front of every round of drivers.
fn aliases(sys: &Path) -> HashSet<String> {
    let below = |dir: PathBuf| std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let buses = below(sys.join("bus")).map(|bus| bus.join("devices"));
    let groups = buses.chain(below(sys.join("class"))).chain([sys.join("devices/system")]);
    let texts = groups.flat_map(below).filter_map(|device| std::fs::read_to_string(device.join("modalias")).ok());
    texts.map(|text| text.trim().to_owned()).filter(|alias| !alias.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines of Debian 13's modules.alias.
    const ALIAS: &str = "alias pci:v00008086d00002918sv*sd*bc*sc*i* lpc_ich\nalias platform:iTCO_wdt iTCO_wdt\n\
        alias pci:v00001022d0000790Bsv*sd*bc*sc*i* sp5100_tco\nalias pci:v00001022d0000790Bsv*sd*bc*sc*i* i2c_piix4\n\
        alias pci:v0000103Cd00003306sv*sd*bc*sc*i* hpwdt\nalias platform:wdat_wdt wdat_wdt\n\
        alias pci:v00008086d000010D3sv*sd*bc*sc*i* e1000e\n";

    /// It holds up the agent's loop, which pets otherwise.
    #[test]
    fn the_watchdog_is_petted_while_what_the_root_needs_is_waited_for() {
        let petted = watchdog::tests::petted;
        let before = petted();
        let root = beside("what the root needs", move || {
            while petted() == before {
                std::thread::park_timeout(Duration::from_millis(10));
            }
        });
        let index = ModuleIndex::parse("", "", "");
        let (loaded, silent) = (HashSet::new(), Vec::new());
        let dir = PathBuf::from("/nowhere");
        let mut drivers = Drivers { dir, index, loaded, beside: Some(root), silent, patience: PATIENCE };
        drivers.settle();
        assert!(petted() > before && drivers.silent().is_empty(), "it waited in vain");
    }

    #[test]
    fn network_cards_come_first() {
        let dep = "kernel/drivers/net/ethernet/intel/igb/igb.ko: kernel/drivers/i2c/algos/i2c-algo-bit.ko\n\
            kernel/drivers/i2c/algos/i2c-algo-bit.ko:\nkernel/drivers/net/virtio_net.ko:\nkernel/drivers/ata/ahci.ko:\n\
            kernel/drivers/scsi/megaraid/megaraid_sas.ko:\n";
        let index = ModuleIndex::parse(dep, "", "");
        let wanted = ["megaraid_sas", "virtio_net", "ahci", "igb", "built_in"].map(str::to_owned);
        let (cards, others) = cards_first(&index, HashSet::from(wanted));
        assert_eq!(
            (cards.as_slice(), others.as_slice()),
            (
                &["igb", "virtio_net"].map(str::to_owned)[..],
                &["ahci", "built_in", "megaraid_sas"].map(str::to_owned)[..]
            )
        );
    }

    #[test]
    fn devices_of_buses_and_classes_and_the_kernels_own_are_asked() {
        let dir = tempfile::tempdir().unwrap();
        let sys = dir.path();
        let device = |path: &str, alias: Option<&str>, link: Option<&str>| {
            let place = sys.join("devices").join(path);
            std::fs::create_dir_all(&place).unwrap();
            if let Some(alias) = alias {
                std::fs::write(place.join("modalias"), format!("{alias}\n")).unwrap();
            }
            if let Some(link) = link {
                let link = sys.join(link);
                std::fs::create_dir_all(link.parent().unwrap()).unwrap();
                std::os::unix::fs::symlink(place, link).unwrap();
            }
        };
        device("pci0/0000:00:02.0", Some("pci:card"), Some("bus/pci/devices/0000:00:02.0"));
        device("pci0/0000:00:02.0/virtio0", Some("virtio:d1"), Some("bus/virtio/devices/virtio0"));
        device("virtual/dmi/id", Some("dmi:id"), Some("class/dmi/id"));
        device("system/cpu", Some("cpu:type:x86"), None);
        device("platform/mute", Some(""), Some("bus/platform/devices/mute"));
        device("platform/none", None, Some("bus/platform/devices/none"));
        std::fs::write(sys.join("class/bonding_masters"), "").unwrap();
        let mut found: Vec<String> = aliases(sys).into_iter().collect();
        found.sort();
        assert_eq!(found, ["cpu:type:x86", "dmi:id", "pci:card", "virtio:d1"]);
    }

    /// Every modalias below `dir`, which is slow.
    fn walk(dir: &Path, found: &mut HashSet<String>) {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => walk(&entry.path(), found),
                Ok(kind) if kind.is_file() && entry.file_name() == "modalias" => {
                    let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
                    found.extend(Some(text.trim().to_owned()).filter(|alias| !alias.is_empty()));
                }
                Ok(_) | Err(_) => {}
            }
        }
    }

    #[test]
    fn no_device_of_this_machine_is_overlooked() {
        let mut all = HashSet::new();
        walk(Path::new("/sys/devices"), &mut all);
        assert_eq!(aliases(Path::new("/sys")), all);
    }

    #[test]
    fn only_watchdogs_and_what_leads_to_them_come_first() {
        let index = ModuleIndex::parse("", ALIAS, "");
        let first = |aliases: &[&str]| {
            let wanted = aliases.iter().flat_map(|alias| index.matching(alias)).map(str::to_owned).collect();
            let mut first: Vec<String> = watchdogs(wanted).into_iter().collect();
            first.sort();
            first
        };
        let device = |id: &str| format!("pci:{id}sv00001AF4sd00001100bc06sc01i00");
        let (bridge, card) = (device("v00008086d00002918"), device("v00008086d000010D3"));
        assert_eq!(first(&[&bridge, &card]), ["lpc_ich"]);
        assert_eq!(
            first(&[&bridge, &card, "platform:iTCO_wdt"]),
            ["iTCO_wdt", "lpc_ich"],
            "the bridge made its device"
        );
        assert_eq!(first(&[&device("v00001022d0000790B")]), ["sp5100_tco"]);
        assert_eq!(first(&[&device("v0000103Cd00003306"), "platform:wdat_wdt"]), ["hpwdt", "wdat_wdt"]);
    }
}
