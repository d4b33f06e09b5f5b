//! A machine's management controller with an address of its own: OpenIPMI's `ipmi_sim`, a program that QEMU's KCS interface
//! talks to. QEMU has one in itself, which has no LAN channel and so no address to be asked for.
//!
//! Nothing listens at the address: the agent asks for it by the machine's own bus, and so does the rack.

use crate::command;
use crate::console::{Console, Mark};
use crate::error::{AtPath, LabError};
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

/// The firmware's version that it says, as the kernel writes it.
pub const FIRMWARE: &str = "9.10";
/// It is ready within so long, on a loaded host too.
const PATIENCE: Duration = Duration::from_secs(30);

/// A machine's management controller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bmc {
    /// QEMU's own, which no network leads to.
    WithoutNetwork,
    /// One that says of its first LAN channel that it has this address.
    At(Ipv4Addr),
}

/// One of these that has power.
#[derive(Debug)]
pub struct Controller {
    child: Child,
    /// It ends when this is closed.
    _keyboard: ChildStdin,
    port: u16,
}

impl Controller {
    /// Gives it power. `dir` is the machine's; `machine` its number, of which one port of the rack's loopback is made.
    pub fn start(dir: &Path, machine: u8, address: Ipv4Addr) -> Result<Self, LabError> {
        let dir = dir.join("bmc");
        let state = dir.join("state");
        std::fs::create_dir_all(&state).at(&state)?;
        let port = 9000 + u16::from(machine);
        let lan = dir.join("lan");
        // ipmi_lan(5). The program is asked `get NAME`, and answers with a line.
        let configuration = format!(
            "name \"bmc\"\nset_working_mc 0x20\nstartlan 1\naddr 127.0.0.1 {port}\nlan_config_program \"sh '{}'\"\n\
             endlan\nserial kcs 127.0.0.1 {port} codec VM\n",
            lan.display()
        );
        let program = format!("for word; do [ \"$word\" != ip_addr ] || echo ip_addr:{address}; done\n");
        // ipmi_sim_cmd(5): device 0, revision 3, firmware 9.10, one that sensors, logs and a chassis could belong to.
        let commands =
            "mc_setbmc 0x20\nmc_add 0x20 0 no-device-sdrs 0x03 0x09 0x10 0x9f 0x1291 0xf02\nmc_enable 0x20\n";
        let (configuration_file, commands_file) = (dir.join("lan.conf"), dir.join("commands"));
        for (path, text) in [(&configuration_file, &*configuration), (&lan, &*program), (&commands_file, commands)] {
            std::fs::write(path, text).at(path)?;
        }
        let mut simulator = Command::new("ipmi_sim");
        simulator.arg("-c").arg(&configuration_file).arg("-f").arg(&commands_file).arg("-s").arg(&state);
        simulator.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child =
            simulator.spawn().map_err(|source| LabError::Spawn { command: command::shown(&simulator), source })?;
        let keyboard = child.stdin.take().expect("asked for above");
        let stdout = child.stdout.take().expect("asked for above");
        let stderr = child.stderr.take().expect("asked for above");
        let this = Self { child, _keyboard: keyboard, port };
        let said = Console::follow("ipmi_sim", &dir.join("log"), false, vec![Box::new(stdout), Box::new(stderr)])?;
        // It prompts once its ports are open and it has been told what it is.
        said.wait_for("> ", Mark::default(), PATIENCE)?;
        Ok(this)
    }

    /// QEMU's arguments for the wire to it.
    pub fn arguments(&self) -> [String; 2] {
        // That it connects again makes QEMU connect beside its start: a wire that is there before the interface to it ends QEMU 10
        // (hw/ipmi/ipmi_bmc_extern.c, chr_event, follows the interface's pointer).
        ["-chardev".into(), format!("socket,id=bmc-wire,host=127.0.0.1,port={},reconnect=1", self.port)]
    }
}

impl Bmc {
    /// QEMU's device for it; the wire of one with an address is among [`Controller::arguments`].
    pub(crate) fn device(self) -> &'static str {
        match self {
            Self::WithoutNetwork => "ipmi-bmc-sim,id=bmc",
            Self::At(_) => "ipmi-bmc-extern,id=bmc,chardev=bmc-wire",
        }
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
