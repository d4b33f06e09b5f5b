//! Secure Boot variables in OVMF's variable store, written while no machine runs on it (layout: EDK2 MdePkg
//! `PiFirmwareVolume.h`, MdeModulePkg `VariableFormat.h`, authenticated form). For labs: real firmware is given the
//! `.auth` files.

use kiln_release::efi::{AUTHENTICATED, Guid};

/// `gEfiAuthenticatedVariableGuid`, aaf32c78-947b-439a-a180-2e144ec37792 as stored.
const STORE: Guid = [0x78, 0x2c, 0xf3, 0xaa, 0x7b, 0x94, 0x9a, 0x43, 0xa1, 0x80, 0x2e, 0x14, 0x4e, 0xc3, 0x77, 0x92];
const STORE_HEADER: usize = 28;
const VARIABLE_HEADER: usize = 60;
/// Where the volume's header says how long it is.
const VOLUME_HEADER_LENGTH: usize = 48;

/// The store with these variables behind those it has. One that has any of them already is refused.
pub(crate) fn enroll(
    mut store: Vec<u8>,
    variables: &[(&str, Guid, Vec<u8>)],
    time: [u8; 16],
) -> Result<Vec<u8>, &'static str> {
    let number = |store: &[u8], at: usize| -> Option<usize> {
        let bytes: [u8; 4] = store.get(at..at.checked_add(4)?)?.try_into().ok()?;
        usize::try_from(u32::from_le_bytes(bytes)).ok()
    };
    let base = number(&store, VOLUME_HEADER_LENGTH).ok_or("too short for a firmware volume")? & 0xffff;
    if store.get(base..base + STORE.len()) != Some(&STORE[..]) {
        return Err("it does not hold an authenticated variable store");
    }
    let size = number(&store, base + 16).ok_or("its header is cut")?;
    let end = base.saturating_add(size).min(store.len());
    let mut at = base + STORE_HEADER;
    while store.get(at..at + 2) == Some(&[0xaa, 0x55]) {
        let (Some(name), Some(data)) = (number(&store, at + 36), number(&store, at + 40)) else {
            return Err("a variable's header is cut");
        };
        let begin = at + VARIABLE_HEADER;
        let held = store.get(begin..begin.saturating_add(name)).ok_or("a variable's name is cut")?;
        if variables.iter().any(|(name, ..)| held == utf16(name)) {
            return Err("it has Secure Boot keys already");
        }
        at = begin.saturating_add(name).saturating_add(data).next_multiple_of(4);
    }
    for (name, vendor, value) in variables {
        let name = utf16(name);
        let length = |bytes: &[u8]| u32::try_from(bytes.len()).map(u32::to_le_bytes).map_err(|_| "a value is too long");
        let mut variable = vec![0xaa, 0x55, 0x3f, 0];
        variable.extend(AUTHENTICATED.to_le_bytes());
        variable.extend([0; 8]); // monotonic count
        variable.extend(time);
        variable.extend([0; 4]); // key index
        variable.extend(length(&name)?);
        variable.extend(length(value)?);
        variable.extend(vendor);
        variable.extend(&name);
        variable.extend(value);
        let place = store.get_mut(at..at + variable.len()).filter(|_| at + variable.len() <= end);
        place.ok_or("it is full")?.copy_from_slice(&variable);
        at = (at + variable.len()).next_multiple_of(4);
    }
    Ok(store)
}

fn utf16(text: &str) -> Vec<u8> {
    text.encode_utf16().chain([0]).flat_map(u16::to_le_bytes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_release::efi::DATABASE;

    #[test]
    fn a_store_takes_keys_once_and_only_a_store_does() {
        let mut empty = vec![0xff; 1024];
        empty[48..50].copy_from_slice(&72_u16.to_le_bytes());
        empty[72..88].copy_from_slice(&STORE);
        empty[88..92].copy_from_slice(&900_u32.to_le_bytes());
        let variables = [("db", DATABASE, vec![1, 2, 3]), ("dbx", DATABASE, vec![4])];
        let full = enroll(empty.clone(), &variables, [7; 16]).unwrap();
        let second = 72 + STORE_HEADER + (VARIABLE_HEADER + 6 + 3_usize).next_multiple_of(4);
        assert_eq!(full[second..second + 2], [0xaa, 0x55]);
        assert_eq!(full[second + 16..second + 32], [7; 16]);
        assert_eq!(full[second + VARIABLE_HEADER..second + VARIABLE_HEADER + 9], [b'd', 0, b'b', 0, b'x', 0, 0, 0, 4]);
        assert_eq!(enroll(full, &variables, [7; 16]), Err("it has Secure Boot keys already"));
        assert_eq!(enroll(empty, &[("db", DATABASE, vec![0; 900])], [7; 16]), Err("it is full"));
        assert!(enroll(vec![0; 64], &variables, [7; 16]).is_err());
    }
}
