//! What others, or a power cut, left in a directory.

use super::{ESP, Recorded, SECTOR, SIZE, Step};
use crate::disk::block::Part;
use crate::disk::fat::{self, Fat};

/// A removal that is cut leaves the first part of a long name; the next name takes the free place behind it.
#[test]
fn a_name_behind_the_rest_of_a_removed_one_is_read() {
    let (whole, before) = (0..SIZE, ESP.with(Clone::clone));
    let mut disk = before.clone();
    Fat::open(Part::new(&mut disk, &whole)).unwrap().remove("loader/entries/kiln-4.conf").unwrap();
    let flush = disk.steps.iter().position(|step| matches!(step, Step::Flush)).unwrap();
    let mut cut = Recorded::cut(&before, &disk.steps[..=flush], &mut || true);
    let mut fat = Fat::open(Part::new(&mut cut, &whole)).unwrap();
    assert_eq!(fat.find("loader/entries/kiln-4.conf").unwrap(), None, "its last entry is gone");
    fat.write("loader/entries/kiln-7.conf", 3, &mut &b"abc"[..]).unwrap();
    assert_eq!(fat.read("loader/entries/kiln-7.conf", 9).unwrap().as_deref(), Some(&b"abc"[..]));
}

/// Whatever lies behind the end of a directory is nothing, also when the end moves up to it.
#[test]
fn what_lies_behind_the_end_of_a_directory_stays_there() {
    let mut disk = Recorded::default();
    fat::format(&mut disk, 1, "TEST").unwrap();
    let boot = disk.sectors[&0];
    let root = 32 + 2 * u64::from(u32::from_le_bytes([boot[36], boot[37], boot[38], boot[39]]));
    assert!(boot[13] > 1, "the root directory has a second sector");
    let mut junk = [0; SECTOR];
    junk[..12].copy_from_slice(b"JUNK    BIN\x20");
    disk.sectors.insert(root + 1, junk);
    let mut fat = Fat::open(disk).unwrap();
    // The volume's label, one entry, and seven times two: the first sector is full.
    fat.write("A", 0, &mut &b""[..]).unwrap();
    for number in 0..7 {
        fat.write(&format!("kiln-{number}.conf"), 3, &mut &b"abc"[..]).unwrap();
    }
    let names: Vec<String> = fat.list("").unwrap().unwrap().into_iter().map(|node| node.name).collect();
    assert!(names.len() == 8 && !names.contains(&"JUNK.BIN".to_owned()), "{names:?}");
}
