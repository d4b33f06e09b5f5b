//! Which network card the firmware booted from: the MAC address in the device path of the boot option that `BootCurrent`
//! names (UEFI 2.10 §3.1.3 load options, §3.3 variables, §10.3.4.10 MAC address node). It only says which card is asked
//! first; nothing is trusted for it. BIOS has no such word.

use std::path::Path;

const EFIVARS: &str = "/sys/firmware/efi/efivars";
const GLOBAL: &str = "8be4df61-93ca-11d2-aa0d-00e098032b8c";
/// efivarfs puts a variable's attributes before its data.
const ATTRIBUTES: usize = 4;
/// Type and sub-type of the messaging node that holds a hardware address, and of the path's end.
const MAC_NODE: (u8, u8) = (0x03, 0x0b);
const END_NODE: u8 = 0x7f;

/// The card's MAC address; none where the firmware does not say, or booted from something else.
pub fn mac() -> Option<[u8; 6]> {
    let read = |name: &str| std::fs::read(Path::new(EFIVARS).join(format!("{name}-{GLOBAL}"))).ok();
    let current = read("BootCurrent")?;
    let number = u16::from_le_bytes(current.get(ATTRIBUTES..ATTRIBUTES + 2)?.try_into().ok()?);
    mac_of(read(&format!("Boot{number:04X}"))?.get(ATTRIBUTES..)?)
}

/// From an `EFI_LOAD_OPTION`: attributes, length of the device path, description, device path.
fn mac_of(option: &[u8]) -> Option<[u8; 6]> {
    let length = usize::from(u16::from_le_bytes(option.get(4..6)?.try_into().ok()?));
    let text = option.get(6..)?;
    let end = text.chunks_exact(2).position(|unit| unit == [0, 0])?;
    let mut path = text.get((end + 1) * 2..)?.get(..length)?;
    loop {
        let [kind, sub, low, high] = *path.first_chunk::<4>()?;
        let size = usize::from(u16::from_le_bytes([low, high]));
        if kind == END_NODE || size < 4 {
            return None;
        }
        let data = path.get(4..size)?;
        if (kind, sub) == MAC_NODE {
            return data.first_chunk::<6>().copied();
        }
        path = path.get(size..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn option(nodes: &[(u8, u8, &[u8])]) -> Vec<u8> {
        let mut path = Vec::new();
        for (kind, sub, data) in nodes {
            path.extend([*kind, *sub]);
            path.extend(u16::try_from(data.len() + 4).unwrap().to_le_bytes());
            path.extend(*data);
        }
        let mut option = vec![1, 0, 0, 0];
        option.extend(u16::try_from(path.len()).unwrap().to_le_bytes());
        option.extend("UEFI PXEv4".encode_utf16().chain([0]).flat_map(u16::to_le_bytes));
        option.extend(path);
        option.extend(b"optional data");
        option
    }

    #[test]
    fn the_address_is_in_the_path() {
        let mut card = [0_u8; 33];
        card[..6].copy_from_slice(&[0x52, 0x54, 0, 1, 2, 3]);
        let network =
            option(&[(2, 1, &[0; 8]), (1, 1, &[0, 2]), (3, 0x0b, &card), (3, 0x0c, &[0; 23]), (0x7f, 0xff, &[])]);
        assert_eq!(mac_of(&network), Some([0x52, 0x54, 0, 1, 2, 3]));
        let disk = option(&[(2, 1, &[0; 8]), (4, 1, &[0; 38]), (0x7f, 0xff, &[]), (3, 0x0b, &card)]);
        assert_eq!(mac_of(&disk), None, "nothing is read behind the end");
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            mac_of(&bytes);
        }

        #[test]
        fn a_cut_option_is_survived(cut in 0_usize..120) {
            let whole = option(&[(2, 1, &[0; 8]), (3, 0x0b, &[7; 33]), (0x7f, 0xff, &[])]);
            mac_of(&whole[..cut.min(whole.len())]);
        }
    }
}
