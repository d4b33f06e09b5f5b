//! Making an empty FAT32 (FAT specification, "Boot Sector and BPB").

use super::super::block::{Block, SECTOR};
use super::names::padded;
use super::{ATTRIBUTE_VOLUME, END, LEAST_CLUSTERS, RESERVED, bad};
use std::io;

/// Makes an empty file system over the whole of `disk`.
pub fn format(disk: &mut dyn Block, serial: u32, label: &str) -> io::Result<()> {
    let sectors = u32::try_from(disk.size() / SECTOR as u64).map_err(|_| bad("a partition of 2 TiB or more"))?;
    let fits = |per_cluster: u32| {
        let mut fat_sectors = 1;
        loop {
            let clusters = sectors.checked_sub(RESERVED + 2 * fat_sectors)? / per_cluster;
            let needed = (clusters + 2).div_ceil(128);
            if needed <= fat_sectors {
                return (clusters >= LEAST_CLUSTERS + 16).then_some((fat_sectors, per_cluster));
            }
            fat_sectors = needed;
        }
    };
    let (fat_sectors, per_cluster) = [8, 4, 2, 1]
        .into_iter()
        .find_map(fits)
        .ok_or_else(|| bad(format!("{sectors} sectors are too few for FAT32: 34 MiB are needed")))?;
    let mut boot = [0; SECTOR];
    let mut put = |at: usize, bytes: &[u8]| boot[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &[0xeb, 0x58, 0x90]);
    put(3, b"KILN    ");
    put(11, &512_u16.to_le_bytes());
    put(13, &[u8::try_from(per_cluster).expect("at most 8")]);
    put(14, &u16::try_from(RESERVED).expect("32").to_le_bytes());
    put(16, &[2]);
    put(21, &[0xf8]);
    put(24, &[63, 0, 255, 0]);
    put(32, &sectors.to_le_bytes());
    put(36, &fat_sectors.to_le_bytes());
    put(44, &2_u32.to_le_bytes());
    put(48, &[1, 0, 6, 0]);
    put(64, &[0x80, 0, 0x29]);
    put(67, &serial.to_le_bytes());
    put(71, &padded::<11>(label));
    put(82, b"FAT32   ");
    put(510, &[0x55, 0xaa]);
    let mut info = [0; SECTOR];
    let mut put = |at: usize, bytes: &[u8]| info[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"RRaA");
    put(484, b"rrAa");
    // How much is free is not kept: unknown.
    put(488, &[0xff; 8]);
    put(510, &[0x55, 0xaa]);
    let zeros = vec![0; 64 * SECTOR];
    let meta = u64::from(RESERVED + 2 * fat_sectors + per_cluster) * SECTOR as u64;
    let mut at = 0;
    while at < meta {
        let piece = usize::try_from(meta - at).unwrap_or(usize::MAX).min(zeros.len());
        disk.write_at(at, &zeros[..piece])?;
        at += piece as u64;
    }
    let mut first = [0; SECTOR];
    for (cluster, value) in [0x0fff_fff8_u32, END, END].into_iter().enumerate() {
        first[cluster * 4..cluster * 4 + 4].copy_from_slice(&value.to_le_bytes());
    }
    for fat in 0..2 {
        disk.write_at(u64::from(RESERVED + fat * fat_sectors) * SECTOR as u64, &first)?;
    }
    let mut volume = [0; SECTOR];
    volume[..11].copy_from_slice(&padded::<11>(label));
    volume[11] = ATTRIBUTE_VOLUME;
    disk.write_at(u64::from(RESERVED + 2 * fat_sectors) * SECTOR as u64, &volume)?;
    disk.flush()?;
    // Last, so that a half-made file system is none.
    for copy in [0, 6] {
        disk.write_at((copy + 1) * SECTOR as u64, &info)?;
        disk.write_at(copy * SECTOR as u64, &boot)?;
    }
    disk.flush()
}
