//! Names in FAT directories: 8.3 entries, and the long names of VFAT before them (FAT specification, "FAT Long
//! Directory Entries").

use super::{ATTRIBUTE_LONG_NAME, ENTRY, u16_at};

pub(super) fn point(entry: &mut [u8; ENTRY], cluster: u32, size: u32) {
    let [c0, c1, c2, c3] = cluster.to_le_bytes();
    entry[20..22].copy_from_slice(&[c2, c3]);
    entry[26..28].copy_from_slice(&[c0, c1]);
    entry[28..32].copy_from_slice(&size.to_le_bytes());
}

pub(super) fn short_entry(name: &[u8; 11], attributes: u8, cluster: u32, size: u32) -> [u8; ENTRY] {
    let mut entry = [0; ENTRY];
    entry[..11].copy_from_slice(name);
    entry[11] = attributes;
    // 1980-01-01: no clock is trusted here, and 0 is no date.
    for at in [16, 18, 24] {
        entry[at..at + 2].copy_from_slice(&0x0021_u16.to_le_bytes());
    }
    point(&mut entry, cluster, size);
    entry
}

fn checksum(short: &[u8]) -> u8 {
    short[..11].iter().fold(0, |sum: u8, byte| sum.rotate_right(1).wrapping_add(*byte))
}

/// Offsets of a long-name entry's thirteen characters.
const CHARACTERS: [usize; 13] = [1, 3, 5, 7, 9, 14, 16, 18, 20, 22, 24, 28, 30];

/// The directory entries of a name: long ones, last part first, and the short one.
pub(super) fn entry_set(name: &str, short: &[u8; 11], attributes: u8, first: u32, size: u32) -> Vec<[u8; ENTRY]> {
    let mut set = Vec::new();
    if plain_name(short) != name {
        let units: Vec<u16> = name.encode_utf16().collect();
        let parts: Vec<&[u16]> = units.chunks(13).collect();
        for (number, part) in parts.iter().enumerate().rev() {
            let mut entry = [0; ENTRY];
            entry[0] = u8::try_from(number + 1).unwrap_or(0x3f) | if number + 1 == parts.len() { 0x40 } else { 0 };
            entry[11] = ATTRIBUTE_LONG_NAME;
            entry[13] = checksum(short);
            for (place, at) in CHARACTERS.into_iter().enumerate() {
                let unit = match place.cmp(&part.len()) {
                    std::cmp::Ordering::Less => part[place],
                    std::cmp::Ordering::Equal => 0,
                    std::cmp::Ordering::Greater => 0xffff,
                };
                entry[at..at + 2].copy_from_slice(&unit.to_le_bytes());
            }
            set.push(entry);
        }
    }
    set.push(short_entry(short, attributes, first, size));
    set
}

/// The long name before a short entry, if its parts belong together and to it.
pub(super) fn long_name(long: &[(u64, [u8; ENTRY])], short: &[u8; ENTRY]) -> Option<String> {
    let (_, first) = long.first()?;
    let right = |(number, (_, entry)): (usize, &(u64, [u8; ENTRY]))| {
        usize::from(entry[0] & 0x3f) == long.len() - number && entry[13] == checksum(short)
    };
    if first[0] & 0x40 == 0 || !long.iter().enumerate().all(right) {
        return None;
    }
    let units = long.iter().rev().flat_map(|(_, entry)| CHARACTERS.map(|at| u16_at(entry, at)));
    let units: Vec<u16> = units.take_while(|unit| *unit != 0).collect();
    Some(String::from_utf16_lossy(&units))
}

/// An 8.3 name; its bits for lower case (Windows NT's) are read.
pub(super) fn plain_name(entry: &[u8]) -> String {
    let text = |bytes: &[u8], lower: bool| {
        let text = String::from_utf8_lossy(bytes).trim_end().to_owned();
        if lower { text.to_lowercase() } else { text }
    };
    let case = entry.get(12).copied().unwrap_or(0);
    let (stem, suffix) = (text(&entry[..8], case & 0x08 != 0), text(&entry[8..11], case & 0x10 != 0));
    if suffix.is_empty() { stem } else { format!("{stem}.{suffix}") }
}

pub(super) fn padded<const N: usize>(text: &str) -> [u8; N] {
    let mut field = [b' '; N];
    text.bytes().zip(field.iter_mut()).for_each(|(byte, place)| *place = byte.to_ascii_uppercase());
    field
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_names_are_read_back_and_belong_to_their_entry() {
        let short = padded::<11>("0BADF00DCON");
        for name in ["kiln-5+3.conf", "kiln-5+2-1.conf", "a.b", "thirteen-char"] {
            let set = entry_set(name, &short, 0x20, 7, 9);
            let long: Vec<(u64, [u8; ENTRY])> = set[..set.len() - 1].iter().map(|entry| (0, *entry)).collect();
            let last = set.last().unwrap();
            assert_eq!(long_name(&long, last).as_deref(), Some(name));
            let mut other = *last;
            other[0] = b'X';
            assert_eq!(long_name(&long, &other), None, "another's long name is not taken");
        }
        assert_eq!(entry_set("BOOTX64.EFI", &padded::<11>("BOOTX64 EFI"), 0x20, 7, 9).len(), 1, "it needs none");
    }
}
