//! One machine of the rack: a QEMU process with real firmware, a network cable and a power button.

use crate::accel::Accelerator;
use crate::bmc::{Bmc, Controller};
use crate::command;
use crate::console::{Console, Mark};
use crate::error::{AtPath, LabError};
use crate::nbd::Nbd;
use crate::net;
use crate::qmp::{Event, Qmp};
pub use crate::spec::{DISK_BYTES, Disk, Firmware, HardwareWatchdog, MachineSpec, text};
use crate::tpm::SoftwareTpm;
use crate::trunk::{self, Trunk};
use crate::variables;
use serde_json::json;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

/// The host's QEMU.
pub const QEMU: &str = "qemu-system-x86_64";
const OVMF_CODE: &str = "/usr/share/OVMF/OVMF_CODE_4M.fd";
/// The variable store of a machine that nobody has set up.
pub const OVMF_VARS: &str = "/usr/share/OVMF/OVMF_VARS_4M.fd";
/// The firmware that enforces Secure Boot. It keeps its variables from the operating system, which takes SMM.
const OVMF_SECURE: &str = "/usr/share/OVMF/OVMF_CODE_4M.secboot.fd";
/// PCI slot of the network card.
const CARD_SLOT: u8 = 2;

/// A machine in the rack, on or off.
#[derive(Debug)]
pub struct Machine {
    /// What it is.
    pub spec: MachineSpec,
    dir: PathBuf,
    console_path: PathBuf,
    accelerator: Accelerator,
    power: Option<Power>,
    booted_before: bool,
    /// Disks that a test holds in its hand, by number.
    held: BTreeMap<usize, Arc<Nbd>>,
}

#[derive(Debug)]
struct Power {
    child: Child,
    qmp: Qmp,
    console: Arc<Console>,
    /// Its serial console's keyboard.
    keyboard: ChildStdin,
    /// Its TPM; goes with the power.
    _tpm: Option<SoftwareTpm>,
    /// Its management controller, if that is a program of its own. A real one would stay on.
    _controller: Option<Controller>,
}

fn disk_path(dir: &Path, number: usize) -> PathBuf {
    dir.join(format!("disk{number}.img"))
}

impl Machine {
    /// Puts it into the rack: its cable, its variable store. `scratch` and `consoles` exist.
    pub fn install(
        spec: MachineSpec,
        accelerator: Accelerator,
        scratch: &Path,
        consoles: &Path,
    ) -> Result<Self, LabError> {
        let dir = scratch.join(&spec.name);
        std::fs::create_dir_all(&dir).at(&dir)?;
        for (card, _) in spec.numbered_cards().filter(|_| !spec.trunk) {
            net::make_tap(&spec.tap_of(card))?;
        }
        for number in 0..spec.disks.len() {
            let path = disk_path(&dir, number);
            std::fs::File::create(&path).and_then(|file| file.set_len(DISK_BYTES)).at(&path)?;
        }
        let console_path = consoles.join(format!("{}.log", spec.name));
        let held = BTreeMap::new();
        let machine = Self { spec, dir, console_path, accelerator, power: None, booted_before: false, held };
        machine.set_up_firmware()?;
        Ok(machine)
    }

    fn set_up_firmware(&self) -> Result<(), LabError> {
        let Firmware::Uefi(way) = self.spec.firmware else { return Ok(()) };
        let (from, store) = (self.spec.keys.as_deref().unwrap_or(Path::new(OVMF_VARS)), self.variable_store());
        std::fs::copy(from, &store).at(from)?;
        variables::set_first_boot(&store, way, CARD_SLOT, self.spec.mac())
    }

    /// Erases its firmware's settings while it is off, and gives it these Secure Boot keys.
    pub fn set_keys(&mut self, keys: PathBuf) -> Result<(), LabError> {
        self.power_off();
        self.spec.keys = Some(keys);
        self.set_up_firmware()
    }

    fn qemu(&self, monitor: &Path) -> Command {
        let spec = &self.spec;
        let mut qemu = Command::new(&spec.qemu);
        let mut arg = |words: &[&str]| {
            qemu.args(words);
        };
        arg(&["-name", &spec.name, "-nodefaults", "-no-user-config", "-display", "none"]);
        // graphics=off makes SeaBIOS speak on the serial line; OVMF does so by itself.
        let smm = if spec.keys.is_some() { "on" } else { "off" };
        arg(&["-machine", &format!("q35,graphics=off,smm={smm}"), "-accel", self.accelerator.option()]);
        arg(&["-cpu", self.accelerator.cpu(), "-smp", "1", "-m", &format!("{}M", spec.memory_mib)]);
        arg(&["-uuid", &spec.uuid()]);
        if let Some(clock) = spec.clock {
            arg(&["-rtc", &format!("base={clock}")]);
        }
        arg(&["-smbios", &format!("type=1,manufacturer=Kiln,product=Virtual rack machine,serial={}", spec.name)]);
        for text in &spec.smbios {
            arg(&["-smbios", &format!("type=11,value={text}")]);
        }
        arg(&["-chardev", "stdio,id=serial,signal=off", "-serial", "chardev:serial"]);
        arg(&["-qmp", &format!("unix:{},server=on,wait=off", monitor.display())]);
        for (card, model) in spec.numbered_cards() {
            let cable = if spec.trunk {
                let (here, there) = trunk::ends(&self.dir, card);
                trunk::netdev(&format!("cable{card}"), &here, &there)
            } else {
                format!("tap,id=cable{card},ifname={},script=no,downscript=no", spec.tap_of(card))
            };
            arg(&["-netdev", &cable]);
            let slot = if card == 0 { format!(",addr={CARD_SLOT:#x}") } else { String::new() };
            // QEMU's option ROMs are iPXE; without one the firmware's own network boot runs.
            let rom = match (spec.firmware, card) {
                (Firmware::Bios, 0) => "bootindex=1",
                (Firmware::Uefi(_), 1..) if spec.roms => "rombar=1",
                (Firmware::Bios | Firmware::Uefi(_), _) => "romfile=",
            };
            arg(&["-device", &format!("{model},netdev=cable{card},mac={}{slot},{rom}", text(spec.mac_of(card)))]);
        }
        for (number, disk) in spec.disks.iter().enumerate() {
            let place =
                self.held.get(&number).map_or(disk_path(&self.dir, number).display().to_string(), |nbd| nbd.url());
            arg(&["-drive", &format!("if=none,id=disk{number},format=raw,discard=unmap,file={place}")]);
            let (controller, device) = disk.devices(number);
            if let Some(controller) = controller {
                arg(&["-device", &controller]);
            }
            arg(&["-device", &format!("{device},drive=disk{number},serial={}-disk{number}", spec.name)]);
        }
        if let Firmware::Uefi(_) = spec.firmware {
            let code = if spec.keys.is_some() {
                arg(&["-global", "driver=cfi.pflash01,property=secure,value=on"]);
                arg(&["-global", "ICH9-LPC.disable_s3=1"]);
                OVMF_SECURE
            } else {
                OVMF_CODE
            };
            arg(&["-drive", &format!("if=pflash,format=raw,readonly=on,file={code}")]);
            arg(&["-drive", &format!("if=pflash,format=raw,file={}", self.variable_store().display())]);
        }
        arg(&["-device", "virtio-rng-pci"]);
        match spec.watchdog {
            HardwareWatchdog::I6300esb => arg(&["-device", "i6300esb"]),
            // QEMU straps it off.
            HardwareWatchdog::Itco => arg(&["-global", "ICH9-LPC.noreboot=off"]),
        }
        arg(&["-action", "watchdog=reset"]);
        if let Some(bmc) = spec.bmc {
            arg(&["-device", bmc.device(), "-device", "isa-ipmi-kcs,bmc=bmc"]);
        }
        if spec.screen {
            arg(&["-device", "VGA"]);
        }
        qemu
    }

    /// Puts a switch with trunk ports to the other ends of its cables.
    pub fn connect_trunk(&self) -> Result<Trunk, LabError> {
        let cables = u8::try_from(self.spec.cards.len()).expect("a handful of cards");
        Trunk::start(&self.dir, cables)
    }

    /// Pulls a cable, or puts it back: the card sees that its link is gone.
    pub fn set_cable(&self, card: u8, plugged: bool) -> Result<(), LabError> {
        let arguments = json!({ "name": format!("cable{card}"), "up": plugged });
        self.power()?.qmp.execute("set_link", &arguments).map(drop)
    }

    /// Pulls a disk out of its port ([`Disk::VirtioBlkAtPort`]): the system lets it go. It is there again when the machine is switched
    /// off and on.
    pub fn pull_disk(&self, number: usize) -> Result<(), LabError> {
        self.power()?.qmp.execute("device_del", &json!({ "id": format!("card{number}") })).map(drop)
    }

    /// Copies what is on its screen now into a file, as a portable pixmap.
    pub fn picture(&self, to: &Path) -> Result<(), LabError> {
        self.power()?.qmp.execute("screendump", &json!({ "filename": to })).map(drop)
    }

    /// The characters in its VGA card's text memory, 80 to a row: the screen, and what was scrolled off it. What is not ASCII
    /// is a dot.
    pub fn text_memory(&self) -> Result<String, LabError> {
        let to = self.dir.join("text-memory");
        // IBM PC: 32 KiB from B8000, a character and its attributes each.
        let memory = json!({ "val": 0xb_8000, "size": 0x8000, "filename": to });
        self.power()?.qmp.execute("pmemsave", &memory)?;
        let cells = std::fs::read(&to).at(&to)?;
        let shown = |cell: &[u8]| if (b' '..=b'~').contains(&cell[0]) { char::from(cell[0]) } else { '.' };
        Ok(cells.chunks_exact(2).map(shown).collect())
    }

    /// From the next time it is switched on, a disk's every block goes through the test's hand.
    pub fn hold_disk(&mut self, number: usize) -> Result<Arc<Nbd>, LabError> {
        if let Some(nbd) = self.held.get(&number) {
            return Ok(Arc::clone(nbd));
        }
        let nbd = Arc::new(Nbd::serve(&disk_path(&self.dir, number), &self.dir.join(format!("disk{number}.nbd")))?);
        self.held.insert(number, Arc::clone(&nbd));
        Ok(nbd)
    }

    /// Takes its TPM out, or puts a new one in, while it is off.
    pub fn replace_tpm(&mut self, present: bool) -> Result<(), LabError> {
        self.power_off();
        let dir = self.dir.join("tpm");
        if dir.exists() {
            std::fs::remove_dir_all(&dir).at(&dir)?;
        }
        self.spec.tpm = present;
        Ok(())
    }

    /// Other disks, all of them blank, while it is off.
    pub fn set_disks(&mut self, disks: Vec<Disk>) -> Result<(), LabError> {
        self.power_off();
        for number in 0..disks.len() {
            let path = disk_path(&self.dir, number);
            std::fs::File::create(&path).and_then(|file| file.set_len(DISK_BYTES)).at(&path)?;
            let socket = self.dir.join(format!("disk{number}.nbd"));
            if socket.exists() {
                std::fs::remove_file(&socket).at(&socket)?;
            }
        }
        self.held.clear();
        self.spec.disks = disks;
        Ok(())
    }

    /// The file behind one of its disks.
    pub fn disk(&self, number: usize) -> PathBuf {
        disk_path(&self.dir, number)
    }

    /// Presses the power button of a machine that is off.
    pub fn power_on(&mut self) -> Result<(), LabError> {
        self.power_off();
        let monitor = self.dir.join("monitor");
        let _ = std::fs::remove_file(&monitor);
        let tpm = self.spec.tpm.then(|| SoftwareTpm::start(&self.dir.join("tpm"))).transpose()?;
        let controller = match self.spec.bmc {
            Some(Bmc::At(address)) => Some(Controller::start(&self.dir, self.spec.number, address)?),
            Some(Bmc::WithoutNetwork) | None => None,
        };
        let mut qemu = self.qemu(&monitor);
        qemu.args(tpm.iter().flat_map(SoftwareTpm::arguments));
        qemu.args(controller.iter().flat_map(Controller::arguments));
        qemu.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = qemu.spawn().map_err(|source| LabError::Spawn { command: command::shown(&qemu), source })?;
        let keyboard = child.stdin.take().expect("asked for above");
        let stdout = child.stdout.take().expect("asked for above");
        let stderr = child.stderr.take().expect("asked for above");
        let console = Console::follow(
            &self.spec.name,
            &self.console_path,
            self.booted_before,
            vec![Box::new(stdout), Box::new(stderr)],
        )?;
        self.booted_before = true;
        match Qmp::connect(&self.spec.name, &monitor) {
            Ok(qmp) => {
                self.power = Some(Power { child, qmp, console, keyboard, _tpm: tpm, _controller: controller });
                Ok(())
            }
            Err(error) => {
                let _ = child.kill();
                let status = child.wait().map_or_else(|e| e.to_string(), |s| s.to_string());
                let last_words = format!("{}; {error}", console.last_words(5));
                Err(LabError::Died { program: self.spec.name.clone(), status, last_words })
            }
        }
    }

    /// Cuts the power. Nothing is asked of the guest.
    pub fn power_off(&mut self) {
        if let Some(mut power) = self.power.take() {
            let _ = power.child.kill();
            let _ = power.child.wait();
        }
    }

    /// Whether it is on.
    pub fn is_on(&self) -> bool {
        self.power.is_some()
    }

    /// Fails with its last words if QEMU has ended by itself.
    pub fn check_running(&mut self) -> Result<(), LabError> {
        let Some(power) = &mut self.power else { return Ok(()) };
        match power.child.try_wait() {
            Ok(Some(status)) => Err(LabError::Died {
                program: self.spec.name.clone(),
                status: status.to_string(),
                last_words: power.console.last_words(8),
            }),
            Ok(None) | Err(_) => Ok(()),
        }
    }

    /// How often it went through reset since it was switched on.
    pub fn resets(&self) -> usize {
        self.power.as_ref().map_or(0, |p| p.qmp.count(Event::Reset))
    }

    /// Waits until it goes through reset once more than `before`.
    pub fn wait_reset(&self, before: usize, limit: Duration) -> Result<(), LabError> {
        self.power()?.qmp.wait_more(Event::Reset, before, limit)
    }

    /// How often its hardware watchdog ended a hang since it was switched on.
    pub fn hangs(&self) -> usize {
        self.power.as_ref().map_or(0, |p| p.qmp.count(Event::Watchdog))
    }

    /// Waits until it has ended one more than `before`.
    pub fn wait_hang(&self, before: usize, limit: Duration) -> Result<(), LabError> {
        self.power()?.qmp.wait_more(Event::Watchdog, before, limit)
    }

    /// Its serial console.
    pub fn console(&self) -> Result<&Arc<Console>, LabError> {
        Ok(&self.power()?.console)
    }

    /// Types a line on its serial console.
    pub fn type_line(&mut self, line: &str) -> Result<(), LabError> {
        self.type_bytes(format!("{line}\r").as_bytes())
    }

    /// Holds its serial line until its next reset, as a terminal does that is busy: whoever writes to that console waits.
    pub fn hold_line(&mut self) -> Result<(), LabError> {
        // XOFF, which Linux obeys on a console (termios(3), IXON). Until the line goes on the driver takes in a page (UART_XMIT_SIZE);
        // that is filled by the echo of what is typed behind it, as one line that does not end.
        let mut typed = vec![b'x'; 3 * 4096];
        typed[0] = 0x13;
        self.type_bytes(&typed)
    }

    /// The serial line goes on.
    pub fn let_line_go(&mut self) -> Result<(), LabError> {
        // XON.
        self.type_bytes(&[0x11])
    }

    fn type_bytes(&mut self, bytes: &[u8]) -> Result<(), LabError> {
        let Some(power) = &mut self.power else { return self.power().map(drop) };
        let typed = power.keyboard.write_all(bytes).and_then(|()| power.keyboard.flush());
        typed.at(&self.console_path)
    }

    /// The end of its console now.
    pub fn mark(&self) -> Mark {
        self.power.as_ref().map_or_else(Mark::default, |p| p.console.mark())
    }

    /// Loses every packet of this machine, or stops doing so. Its link stays up.
    pub fn set_connected(&self, connected: bool) -> Result<(), LabError> {
        net::set_connected(&self.spec.tap(), connected)
    }

    /// Limits what reaches the machine.
    pub fn set_slow(&self, kbit_s: u32) -> Result<(), LabError> {
        net::set_slow(&self.spec.tap(), kbit_s)
    }

    /// The file behind a disk, to be looked at or damaged while it is off.
    pub fn disk_file(&self, number: usize) -> PathBuf {
        disk_path(&self.dir, number)
    }

    /// The file behind its firmware's variables, to be copied while it is off.
    pub fn variable_store(&self) -> PathBuf {
        self.dir.join("variables.fd")
    }

    /// PID of its QEMU.
    pub fn pid(&self) -> Option<u32> {
        self.power.as_ref().map(|p| p.child.id())
    }

    fn power(&self) -> Result<&Power, LabError> {
        self.power.as_ref().ok_or_else(|| LabError::Died {
            program: self.spec.name.clone(),
            status: "it is switched off".into(),
            last_words: String::new(),
        })
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.power_off();
    }
}
