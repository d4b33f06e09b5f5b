//! FAT32, as much as a boot loader's partition needs: list, read, write whole files, rename, remove. Sources:
//! Microsoft's FAT specification 1.03, UEFI 2.10 §13.3.
//!
//! Own code, and no mount. The kernel's vfat gives no order between a file's data, the table and the directory; here
//! each change is a commit: what it needs is flushed first, then one sector of a directory makes it true. The crates at
//! hand write in any order and rename in two steps. It also saves the initramfs three modules.
//!
//! A partition may have been written by firmware or by anybody: every number is checked, every chain is bounded.
//!
//! Disks rot. Boot sector and table are there twice: what the first does not say, the second may, and both are the same
//! behind each opening. A chain that is broken in both costs its file, and no other.

mod format;
mod names;
mod tree;
mod write;

pub use format::format;

use super::block::{Block, SECTOR};
use names::{long_name, plain_name};
use std::collections::HashSet;
use std::io;
use tree::Tree;

const ENTRY: usize = 32;
const RESERVED: u32 = 32;
const END: u32 = 0x0fff_ffff;
/// From here on a value ends a chain.
const LAST: u32 = 0x0fff_fff8;
/// Where the boot sector's copy lies (FAT specification, BPB_BkBootSec), bytes.
const SPARE: u64 = 6 * SECTOR as u64;
/// FAT32 is what has at least so many clusters (FAT specification, "FAT Type Determination").
const LEAST_CLUSTERS: u32 = 65_525;
/// Directories are read to this depth, and of each so many entries.
const DEPTH: usize = 8;
const DIRECTORY_LIMIT: usize = 4096;
const ATTRIBUTE_DIRECTORY: u8 = 0x10;
const ATTRIBUTE_LONG_NAME: u8 = 0x0f;
const ATTRIBUTE_VOLUME: u8 = 0x08;
const DELETED: u8 = 0xe5;

fn bad(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Of a directory's entry.
fn cluster_of(entry: &[u8]) -> u32 {
    u32::from(u16_at(entry, 20)) << 16 | u32::from(u16_at(entry, 26))
}

/// Where things lie, in sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Geometry {
    reserved: u32,
    fats: u32,
    fat_sectors: u32,
    per_cluster: u32,
    clusters: u32,
    root: u32,
}

/// Something in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    pub name: String,
    pub directory: bool,
    pub size: u32,
    cluster: u32,
    /// Byte offsets on the partition of its directory entries, long name first.
    entries: Vec<u64>,
}

/// An open file system. The table is held in memory: half a MiB for 256 MiB.
pub struct Fat<B: Block> {
    disk: B,
    geometry: Geometry,
    table: Vec<u32>,
    /// Clusters at which a file's chain breaks off, or meets another's: as long as this is open they are neither given out nor
    /// given back.
    knots: HashSet<u32>,
}

impl<B: Block> Fat<B> {
    /// Opens it; space that nothing names, left by a power cut, is given back. Invalid data is where boot sector or directories
    /// say nothing that can be followed.
    pub fn open(disk: B) -> io::Result<Self> {
        let (geometry, spare) = find_geometry(&disk)?;
        let (mut copies, mut failed) = (Vec::new(), None);
        for copy in 0..geometry.fats {
            match read_table(&disk, geometry, copy) {
                Ok(table) => copies.push(table),
                Err(error) => failed = Some(error),
            }
        }
        // One that can be read is enough.
        let Some(table) = copies.first().cloned() else {
            return Err(failed.unwrap_or_else(|| bad("no copy of the table")));
        };
        let mut fat = Self { disk, geometry, table, knots: HashSet::new() };
        let tree = match (fat.choose(&copies), failed) {
            (tree, None) => {
                let tree = tree?;
                // Where the disk takes no writes: what is read goes by the table in memory, and what is written fails by itself.
                let _ = fat.settle(&tree.held, &copies);
                tree
            }
            // What the other says is not known: nothing is given back, and the file system is not taken for none.
            (tree, Some(error)) => tree.map_err(|_| error)?,
        };
        fat.knots = tree.knots;
        if let Some(boot) = spare {
            // Where the disk does not take it, the copy is enough for each opening.
            let _ = fat.disk.write_at(0, &boot).and_then(|()| fat.disk.flush());
        }
        Ok(fat)
    }

    /// The first copy of the table, which is taken already, or the next where fewer files are broken by that.
    fn choose(&mut self, copies: &[Vec<u32>]) -> io::Result<Tree> {
        let first = self.tree();
        let is_bad = match &first {
            Ok(tree) => tree.broken > 0,
            Err(error) => error.kind() == io::ErrorKind::InvalidData,
        };
        let Some(copy) = copies.get(1).filter(|_| is_bad) else { return first };
        self.table.clone_from(copy);
        match (first, self.tree()) {
            (Err(_), Ok(second)) => Ok(second),
            (Ok(first), Ok(second)) if second.broken < first.broken => Ok(second),
            (first, Ok(_) | Err(_)) => {
                self.table.clone_from(&copies[0]);
                first
            }
        }
    }

    /// What lies in a directory; none if it does not exist.
    pub fn list(&self, path: &str) -> io::Result<Option<Vec<Node>>> {
        self.directory(path)?.map(|cluster| self.nodes(cluster)).transpose()
    }

    /// Whether a file is there.
    pub fn find(&self, path: &str) -> io::Result<Option<Node>> {
        let (directory, name) = path.rsplit_once('/').unwrap_or(("", path));
        let nodes = self.list(directory)?.unwrap_or_default();
        Ok(nodes.into_iter().find(|node| node.name.eq_ignore_ascii_case(name)))
    }

    /// A file's bytes, at most `limit`; none if it does not exist.
    pub fn read(&self, path: &str, limit: u32) -> io::Result<Option<Vec<u8>>> {
        let mut bytes = Vec::new();
        let found = self.read_with(path, limit, &mut |piece| {
            bytes.extend_from_slice(piece);
            Ok(())
        })?;
        Ok(found.then_some(bytes))
    }

    /// The same in pieces; whether it exists.
    pub fn read_with(&self, path: &str, limit: u32, sink: &mut dyn FnMut(&[u8]) -> io::Result<()>) -> io::Result<bool> {
        let Some(node) = self.find(path)?.filter(|node| !node.directory) else { return Ok(false) };
        if node.size > limit {
            return Err(bad(format!("{path} has {} bytes; at most {limit} are read", node.size)));
        }
        let mut left = usize::try_from(node.size).unwrap_or(usize::MAX);
        let mut cluster = vec![0; self.cluster_bytes()];
        if left > 0 {
            for number in self.chain(node.cluster)? {
                let piece = left.min(cluster.len());
                self.disk.read_at(self.offset(number), &mut cluster)?;
                sink(&cluster[..piece])?;
                left -= piece;
            }
        }
        if left == 0 { Ok(true) } else { Err(bad(format!("{path} is shorter than its size"))) }
    }

    /// Whether all of a file's bytes have a place, by the table.
    pub fn is_whole(&self, file: &Node) -> bool {
        let enough = |chain: Vec<u32>| chain.len() * self.cluster_bytes() >= file.size as usize;
        file.size == 0 || self.chain(file.cluster).is_ok_and(enough)
    }

    fn is_cluster(&self, number: u32) -> bool {
        (2..self.geometry.clusters + 2).contains(&number)
    }

    fn cluster_bytes(&self) -> usize {
        self.geometry.per_cluster as usize * SECTOR
    }

    fn offset(&self, cluster: u32) -> u64 {
        let Geometry { reserved, fats, fat_sectors, per_cluster, .. } = self.geometry;
        let data = u64::from(reserved) + u64::from(fats) * u64::from(fat_sectors);
        (data + u64::from(cluster - 2) * u64::from(per_cluster)) * SECTOR as u64
    }

    fn chain(&self, first: u32) -> io::Result<Vec<u32>> {
        let (mut chain, mut next) = (Vec::new(), first);
        while self.is_cluster(next) {
            chain.push(next);
            if chain.len() > self.table.len() {
                return Err(bad("a chain of clusters without an end"));
            }
            next = self.table[next as usize];
        }
        if next >= LAST && !chain.is_empty() { Ok(chain) } else { Err(bad("a chain of clusters is broken")) }
    }

    fn directory(&self, path: &str) -> io::Result<Option<u32>> {
        let mut cluster = self.geometry.root;
        for part in path.split('/').filter(|part| !part.is_empty()) {
            let nodes = self.nodes(cluster)?;
            match nodes.into_iter().find(|node| node.directory && node.name.eq_ignore_ascii_case(part)) {
                Some(node) if node.cluster != 0 => cluster = node.cluster,
                Some(_) | None => return Ok(None),
            }
        }
        Ok(Some(cluster))
    }

    /// Every entry of a directory, as it lies on the disk, up to the end mark.
    fn raw(&self, directory: u32) -> io::Result<Vec<(u64, [u8; ENTRY])>> {
        let mut out = Vec::new();
        let mut bytes = vec![0; self.cluster_bytes()];
        for cluster in self.chain(directory)? {
            self.disk.read_at(self.offset(cluster), &mut bytes)?;
            for (number, entry) in bytes.chunks(ENTRY).enumerate() {
                if out.len() >= DIRECTORY_LIMIT {
                    return Err(bad("a directory of thousands of entries"));
                }
                let at = self.offset(cluster) + (number * ENTRY) as u64;
                out.push((at, entry.try_into().expect("a chunk of that length")));
            }
        }
        Ok(out)
    }

    /// Whether the first entry there names this cluster itself.
    fn begins_directory(&self, cluster: u32) -> io::Result<bool> {
        let mut first = [0; SECTOR];
        if self.is_cluster(cluster) {
            self.disk.read_at(self.offset(cluster), &mut first)?;
        }
        Ok(first.starts_with(b".          ") && cluster_of(&first) == cluster)
    }

    fn nodes(&self, directory: u32) -> io::Result<Vec<Node>> {
        let mut nodes = Vec::new();
        let mut long: Vec<(u64, [u8; ENTRY])> = Vec::new();
        for (at, entry) in self.raw(directory)? {
            match (entry[0], entry[11]) {
                (0, _) => break,
                (DELETED, _) => long.clear(),
                (first, ATTRIBUTE_LONG_NAME) => {
                    // The last part comes first: what stood before it is the rest of a name that was removed.
                    if first & 0x40 != 0 {
                        long.clear();
                    }
                    long.push((at, entry));
                }
                (_, attributes) if attributes & ATTRIBUTE_VOLUME != 0 => long.clear(),
                (b'.', _) => long.clear(),
                (_, attributes) => {
                    let long = std::mem::take(&mut long);
                    let name = long_name(&long, &entry);
                    let entries = if name.is_some() { long.iter().map(|(at, _)| *at).collect() } else { Vec::new() };
                    let cluster = cluster_of(&entry);
                    let (directory, size) = (attributes & ATTRIBUTE_DIRECTORY != 0, u32_at(&entry, 28));
                    // A directory has no size, and firmware asks for none. What does not begin as one is a file that firmware would
                    // not read: its name is all that counts.
                    let is_neither = directory && size != 0 && !self.begins_directory(cluster)?;
                    nodes.push(Node {
                        name: name.unwrap_or_else(|| plain_name(&entry)),
                        directory: directory && !is_neither,
                        size,
                        cluster: if is_neither { 0 } else { cluster },
                        entries: entries.into_iter().chain([at]).collect(),
                    });
                }
            }
        }
        Ok(nodes)
    }
}

/// By the boot sector, or by its copy where that is none, or cannot be read; the copy is to be written over it then.
fn find_geometry<B: Block>(disk: &B) -> io::Result<(Geometry, Option<[u8; SECTOR]>)> {
    let mut boot = [0; SECTOR];
    let error = match disk.read_at(0, &mut boot).and_then(|()| geometry(&boot, disk.size())) {
        Ok(geometry) => return Ok((geometry, None)),
        Err(error) => error,
    };
    disk.read_at(SPARE, &mut boot)?;
    let geometry = geometry(&boot, disk.size()).map_err(|_| error)?;
    Ok((geometry, Some(boot)))
}

fn read_table<B: Block>(disk: &B, geometry: Geometry, copy: u32) -> io::Result<Vec<u32>> {
    let entries = usize::try_from(geometry.clusters).map_err(|_| bad("too many clusters"))? + 2;
    let mut bytes = vec![0; (entries * 4).next_multiple_of(SECTOR)];
    let sector = u64::from(geometry.reserved) + u64::from(copy) * u64::from(geometry.fat_sectors);
    disk.read_at(sector * SECTOR as u64, &mut bytes)?;
    Ok(bytes.chunks(4).take(entries).map(|c| u32_at(c, 0) & END).collect())
}

fn geometry(boot: &[u8; SECTOR], size: u64) -> io::Result<Geometry> {
    if u16_at(boot, 510) != 0xaa55 || u16_at(boot, 11) != 512 || u16_at(boot, 22) != 0 {
        return Err(bad("no FAT32 with sectors of 512 bytes"));
    }
    let (per_cluster, reserved, fats) = (u32::from(boot[13]), u32::from(u16_at(boot, 14)), u32::from(boot[16]));
    let (total, fat_sectors, root) = (u32_at(boot, 32), u32_at(boot, 36), u32_at(boot, 44));
    let data = u64::from(reserved) + u64::from(fats) * u64::from(fat_sectors);
    let sane = per_cluster.is_power_of_two() && per_cluster <= 128 && reserved > 0 && (1..=2).contains(&fats);
    let clusters = u64::from(total).checked_sub(data).map(|rest| rest / u64::from(per_cluster.max(1)));
    let clusters = clusters.and_then(|clusters| u32::try_from(clusters).ok());
    let clusters = clusters.filter(|clusters| {
        sane && u64::from(total) * SECTOR as u64 <= size
            && (LEAST_CLUSTERS..0x0fff_fff0).contains(clusters)
            && u64::from(fat_sectors) * 128 >= u64::from(*clusters) + 2
            && (2..clusters + 2).contains(&root)
    });
    let clusters = clusters.ok_or_else(|| bad("the FAT32's numbers do not fit each other"))?;
    Ok(Geometry { reserved, fats, fat_sectors, per_cluster, clusters, root })
}
