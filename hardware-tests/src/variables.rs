//! Writes UEFI variables into OVMF's variable store while the machine is off: how the rack sets a boot order.
//!
//! OVMF tries PXE over IPv4 and IPv6 before HTTP Boot, which costs minutes of time-outs. An operator would set the boot
//! order in the firmware's menu; the rack writes the same variables (UEFI 2.10 §3.1.3, §3.3; layout of the store:
//! EDK2 MdeModulePkg `VariableFormat.h`, authenticated form). What it writes stands in place of a variable of that name.

use crate::error::{AtPath, LabError};
use std::path::Path;

/// `EFI_GLOBAL_VARIABLE`, 8be4df61-93ca-11d2-aa0d-00e098032b8c as stored.
const GLOBAL: [u8; 16] =
    [0x61, 0xdf, 0xe4, 0x8b, 0xca, 0x93, 0xd2, 0x11, 0xaa, 0x0d, 0x00, 0xe0, 0x98, 0x03, 0x2b, 0x8c];
/// `gEfiAuthenticatedVariableGuid`, aaf32c78-947b-439a-a180-2e144ec37792 as stored.
const AUTHENTICATED_STORE: [u8; 16] =
    [0x78, 0x2c, 0xf3, 0xaa, 0x7b, 0x94, 0x9a, 0x43, 0xa1, 0x80, 0x2e, 0x14, 0x4e, 0xc3, 0x77, 0x92];
const STORE_HEADER: usize = 28;
const VARIABLE_HEADER: usize = 60;
/// shim's own variables, 605dab50-e046-4300-abb6-3dd810dd8b23 as stored.
const SHIM: [u8; 16] = [0x50, 0xab, 0x5d, 0x60, 0x46, 0xe0, 0x00, 0x43, 0xab, 0xb6, 0x3d, 0xd8, 0x10, 0xdd, 0x8b, 0x23];
/// `EFI_IMAGE_SECURITY_DATABASE_GUID`, d719b2cb-3d3a-4596-a3bc-dad00e67656f as stored: of db.
const DATABASE: [u8; 16] =
    [0xcb, 0xb2, 0x19, 0xd7, 0x3a, 0x3d, 0x96, 0x45, 0xa3, 0xbc, 0xda, 0xd0, 0x0e, 0x67, 0x65, 0x6f];
/// `gEfiSecureBootEnableDisableGuid`, f0a30bc7-af08-4556-99c4-001009c93a44 as stored.
const ENABLE: [u8; 16] =
    [0xc7, 0x0b, 0xa3, 0xf0, 0x08, 0xaf, 0x56, 0x45, 0x99, 0xc4, 0x00, 0x10, 0x09, 0xc9, 0x3a, 0x44];
/// The agent's own variables, 6b696c6e-0000-4000-8000-6b696c6e0001 as stored.
const AGENT: [u8; 16] =
    [0x6e, 0x6c, 0x69, 0x6b, 0x00, 0x00, 0x00, 0x40, 0x80, 0x00, 0x6b, 0x69, 0x6c, 0x6e, 0x00, 0x01];
/// The bit that is cleared in the state of a variable that is none any more.
const DELETED: u8 = 0xfd;
/// Non-volatile, boot-service and run-time access.
const ATTRIBUTES: u32 = 7;
/// Without run-time access: shim believes no other.
const BOOT_ONLY: u32 = 3;
/// [`ATTRIBUTES`], and whoever writes it must sign that: the firmware asks no more when it finds it there.
const AUTHENTICATED: u32 = 0x27;

/// Which of the firmware's ways to the network comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NetworkBoot {
    /// PXE over IPv4.
    Pxe,
    /// HTTP Boot over IPv4; the address of the program comes by DHCP.
    Http,
}

/// Makes the network card in PCI slot `slot` with address `mac` the first boot option of the store at `path`.
pub fn set_first_boot(path: &Path, way: NetworkBoot, slot: u8, mac: [u8; 6]) -> Result<(), LabError> {
    let mut store = std::fs::read(path).at(path)?;
    let wrong = |reason| LabError::VariableStore { path: path.to_owned(), reason };
    append(&mut store, (GLOBAL, ATTRIBUTES), "Boot0000", &load_option(way, slot, mac)).map_err(wrong)?;
    append(&mut store, (GLOBAL, ATTRIBUTES), "BootOrder", &[0, 0]).map_err(wrong)?;
    std::fs::write(path, store).at(path)
}

/// Enrols a list of certificates (`.esl`) as the machine owner's keys, as a person at its screen does by `MokManager`.
pub fn set_owner_keys(path: &Path, list: &[u8]) -> Result<(), LabError> {
    set(path, (SHIM, BOOT_ONLY), "MokList", list)
}

/// Switches Secure Boot off, as the firmware's setup does (EDK2 `AuthVariableLib.c`): all keys stay enrolled.
pub fn switch_secure_boot_off(path: &Path) -> Result<(), LabError> {
    set(path, (ENABLE, BOOT_ONLY), "SecureBootEnable", &[0])
}

/// Puts a list of certificates (`.esl`) in the place of db.
pub fn set_signers(path: &Path, list: &[u8]) -> Result<(), LabError> {
    set(path, (DATABASE, AUTHENTICATED), "db", list)
}

/// Gives the machine an identity key in clear, by its seed, as an agent without a TPM leaves it.
pub fn set_plain_identity(path: &Path, seed: &[u8; 32]) -> Result<(), LabError> {
    set(path, (AGENT, ATTRIBUTES), "KilnKey", seed)
}

fn set(path: &Path, kind: ([u8; 16], u32), name: &str, data: &[u8]) -> Result<(), LabError> {
    let mut store = std::fs::read(path).at(path)?;
    let wrong = |reason| LabError::VariableStore { path: path.to_owned(), reason };
    append(&mut store, kind, name, data).map_err(wrong)?;
    std::fs::write(path, store).at(path)
}

/// `EFI_LOAD_OPTION` with the device path the firmware itself gives this card.
fn load_option(way: NetworkBoot, slot: u8, mac: [u8; 6]) -> Vec<u8> {
    let mut path = Vec::new();
    node(&mut path, 0x02, 0x01, &[&0x0a03_41d0_u32.to_le_bytes()[..], &[0; 4]].concat()); // PciRoot(0)
    node(&mut path, 0x01, 0x01, &[0, slot]); // Pci(slot,0)
    let mut card = [0; 33];
    card[..6].copy_from_slice(&mac);
    card[32] = 1; // Ethernet
    node(&mut path, 0x03, 0x0b, &card); // MAC
    node(&mut path, 0x03, 0x0c, &[0; 23]); // IPv4, nothing fixed
    if way == NetworkBoot::Http {
        node(&mut path, 0x03, 0x18, &[]); // Uri(), to be had by DHCP
    }
    node(&mut path, 0x7f, 0xff, &[]);
    let mut option = 1_u32.to_le_bytes().to_vec(); // LOAD_OPTION_ACTIVE
    option.extend(u16::try_from(path.len()).expect("a few dozen bytes").to_le_bytes());
    option.extend(utf16("kiln rack"));
    option.extend(path);
    option
}

fn node(path: &mut Vec<u8>, kind: u8, sub: u8, data: &[u8]) {
    path.extend([kind, sub]);
    path.extend(u16::try_from(data.len() + 4).expect("a few dozen bytes").to_le_bytes());
    path.extend(data);
}

fn utf16(text: &str) -> Vec<u8> {
    text.encode_utf16().chain([0]).flat_map(u16::to_le_bytes).collect()
}

fn append(
    store: &mut [u8],
    (vendor, attributes): ([u8; 16], u32),
    name: &str,
    data: &[u8],
) -> Result<(), &'static str> {
    let u16_at = |s: &[u8], at: usize| s.get(at..at + 2).map(|b| usize::from(u16::from_le_bytes([b[0], b[1]])));
    let u32_at = |s: &[u8], at: usize| {
        s.get(at..at + 4).and_then(|b| usize::try_from(u32::from_le_bytes([b[0], b[1], b[2], b[3]])).ok())
    };
    let base = u16_at(store, 48).ok_or("too short for a firmware volume")?;
    if store.get(base..base + 16) != Some(&AUTHENTICATED_STORE[..]) {
        return Err("it does not hold an authenticated variable store");
    }
    let end = base + u32_at(store, base + 16).ok_or("the store's header is cut")?;
    let (mut at, name) = (base + STORE_HEADER, utf16(name));
    while u16_at(store, at) == Some(0x55aa) {
        let (Some(name_len), Some(data_len)) = (u32_at(store, at + 36), u32_at(store, at + 40)) else {
            return Err("a variable's header is cut");
        };
        let (start, header) = (at + VARIABLE_HEADER, &store[at..]);
        if header.get(44..VARIABLE_HEADER) == Some(&vendor[..]) && store.get(start..start + name_len) == Some(&name[..])
        {
            store[at + 2] &= DELETED;
        }
        at = (start + name_len + data_len).next_multiple_of(4);
    }
    let length = |bytes: &[u8]| u32::try_from(bytes.len()).expect("a few dozen bytes").to_le_bytes();
    let mut variable = vec![0xaa, 0x55, 0x3f, 0];
    variable.extend(attributes.to_le_bytes());
    variable.extend([0; 8 + 16 + 4]); // monotonic count, time stamp, key index
    variable.extend(length(&name));
    variable.extend(length(data));
    variable.extend(vendor);
    variable.extend(name);
    variable.extend(data);
    if at + variable.len() > end.min(store.len()) {
        return Err("it is full");
    }
    store[at..at + variable.len()].copy_from_slice(&variable);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn empty_store() -> Vec<u8> {
        let mut store = vec![0xff; 1024];
        store[48..50].copy_from_slice(&72_u16.to_le_bytes());
        store[72..88].copy_from_slice(&AUTHENTICATED_STORE);
        store[88..92].copy_from_slice(&900_u32.to_le_bytes());
        store
    }

    #[test]
    fn variables_follow_each_other_on_four_byte_bounds() {
        let mut store = empty_store();
        append(&mut store, (GLOBAL, ATTRIBUTES), "A", &[1]).unwrap();
        append(&mut store, (GLOBAL, ATTRIBUTES), "BootOrder", &[0, 0]).unwrap();
        let second = 72 + STORE_HEADER + (VARIABLE_HEADER + 4 + 1_usize).next_multiple_of(4);
        assert_eq!(store[second..second + 2], [0xaa, 0x55]);
        assert_eq!(store[second + VARIABLE_HEADER..second + VARIABLE_HEADER + 4], [b'B', 0, b'o', 0]);
    }

    #[test]
    fn a_variable_stands_in_place_of_the_one_before() {
        let mut store = empty_store();
        append(&mut store, (GLOBAL, ATTRIBUTES), "A", &[1]).unwrap();
        append(&mut store, (SHIM, ATTRIBUTES), "A", &[2]).unwrap();
        append(&mut store, (GLOBAL, ATTRIBUTES), "A", &[3]).unwrap();
        let each = (VARIABLE_HEADER + 4 + 1_usize).next_multiple_of(4);
        let states: Vec<u8> = (0..3).map(|n| store[72 + STORE_HEADER + n * each + 2]).collect();
        assert_eq!(states, [0x3d, 0x3f, 0x3f], "another vendor's stays");
    }

    #[test]
    fn what_is_not_a_store_or_is_full_is_refused() {
        assert!(append(&mut [0; 64], (GLOBAL, ATTRIBUTES), "A", &[]).is_err());
        let mut store = empty_store();
        assert_eq!(append(&mut store, (GLOBAL, ATTRIBUTES), "A", &[0; 2000]), Err("it is full"));
    }
}
