//! The management controller's own network address, which only it knows: Get LAN Configuration Parameters (IPMI 2.0
//! §23.2, parameter 3) through the kernel's /dev/ipmi0.

use super::{Root, sysfs};
use crate::sys;
use kiln_protocol::Bmc;
use std::fs::OpenOptions;
use std::net::Ipv4Addr;

/// Channels that makers give to the network, the usual one first.
const CHANNELS: [u8; 4] = [1, 2, 8, 3];

/// Fills in what SMBIOS does not say. An address that is not known has its reason in the note.
pub fn ask(root: &Root, bmc: &mut Bmc) {
    let platform = root.sys.join("bus/platform/devices");
    let ours = sysfs::names(&platform).unwrap_or_default().into_iter().find(|name| name.starts_with("ipmi_bmc"));
    if let Some(name) = ours {
        bmc.present = true;
        bmc.firmware = sysfs::text(&platform.join(name).join("firmware_revision"));
    }
    if !bmc.present || !bmc.address.is_empty() {
        return;
    }
    let why = match OpenOptions::new().read(true).write(true).open(root.dev.join("ipmi0")) {
        Err(error) => format!("no address: /dev/ipmi0: {error} (drivers ipmi_si, ipmi_devintf)"),
        Ok(file) => {
            let mut last = "it has no LAN channel".to_owned();
            for channel in CHANNELS {
                // Transport, Get LAN Configuration Parameters: completion code, revision, address.
                match sys::ipmi_command(&file, 0x0c, 0x02, &[channel, 3, 0, 0]) {
                    Ok(answer) => match answer[..] {
                        [0, _, a, b, c, d, ..] if [a, b, c, d] != [0; 4] => {
                            bmc.address = Ipv4Addr::from([a, b, c, d]).to_string();
                            bmc.note = format!("IPMI, LAN channel {channel}");
                            return;
                        }
                        [0, ..] => "its LAN channel has no address".clone_into(&mut last),
                        _ => {}
                    },
                    Err(error) => {
                        last = error.to_string();
                        break;
                    }
                }
            }
            format!("no address: {last}")
        }
    };
    let comma = if bmc.note.is_empty() { "" } else { "; " };
    bmc.note = format!("{}{comma}{why}", bmc.note);
}
