//! The management controller's own network address, which only it knows: Get LAN Configuration Parameters (IPMI 2.0
//! §23.2, parameter 3) through the kernel's /dev/ipmi0.

use super::{Root, sysfs};
use crate::sys;
use kiln_protocol::Bmc;
use std::fs::OpenOptions;
use std::net::Ipv4Addr;

/// Channels that makers give to the network, the usual one first.
const CHANNELS: [u8; 4] = [1, 2, 8, 3];

/// What a controller says of one of its channels.
#[derive(Debug, PartialEq, Eq)]
enum Lan {
    /// It is no LAN channel, or the controller has none.
    None,
    /// It has no address yet.
    Unset,
    At(Ipv4Addr),
}

/// The answer to Get LAN Configuration Parameters, parameter 3: completion code, parameter revision, address.
fn lan_address(answer: &[u8]) -> Lan {
    match *answer {
        [0, _, a, b, c, d, ..] if [a, b, c, d] != [0; 4] => Lan::At([a, b, c, d].into()),
        [0, ..] => Lan::Unset,
        _ => Lan::None,
    }
}

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
                match sys::ipmi_command(&file, 0x0c, 0x02, &[channel, 3, 0, 0]).map(|answer| lan_address(&answer)) {
                    Ok(Lan::At(address)) => {
                        bmc.address = address.to_string();
                        bmc.note = format!("IPMI, LAN channel {channel}");
                        return;
                    }
                    Ok(Lan::Unset) => "its LAN channel has no address".clone_into(&mut last),
                    Ok(Lan::None) => {}
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_only_from_an_answer_that_has_one() {
        assert_eq!(lan_address(&[0, 0x11, 10, 0, 7, 21]), Lan::At([10, 0, 7, 21].into()));
        assert_eq!(lan_address(&[0, 0x11, 10, 0, 7, 21, 0xff]), Lan::At([10, 0, 7, 21].into()));
        for unset in [&[0, 0x11, 0, 0, 0, 0][..], &[0, 0x11, 10], &[0]] {
            assert_eq!(lan_address(unset), Lan::Unset, "{unset:?}");
        }
        // 0xc1: no such command; 0xcc: no such channel.
        for none in [&[0xc1][..], &[0xcc, 0x11, 10, 0, 7, 21], &[]] {
            assert_eq!(lan_address(none), Lan::None, "{none:?}");
        }
    }
}
