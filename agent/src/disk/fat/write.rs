//! What changes a FAT32: each change is a commit, made true by one sector of a directory.

use super::super::block::{Block, SECTOR};
use super::names::{entry_set, padded, point, short_entry};
use super::{ATTRIBUTE_DIRECTORY, DELETED, END, ENTRY, Fat, Node, bad};
use std::collections::HashSet;
use std::io::{self, Read};

const PER_SECTOR: usize = SECTOR / ENTRY;
const ATTRIBUTE_ARCHIVE: u8 = 0x20;
/// A cluster that is not to be used.
const BAD: u32 = 0x0fff_fff7;

impl<B: Block> Fat<B> {
    /// Gives back what nothing names, and makes all copies of the table say the same: `copies` are as they were read.
    pub(super) fn settle(&mut self, held: &[bool], copies: &[Vec<u32>]) -> io::Result<()> {
        for (value, _) in self.table.iter_mut().zip(held).skip(2).filter(|(_, held)| !**held) {
            // Bad clusters stay marked.
            if *value != BAD {
                *value = 0;
            }
        }
        let differs = |c: &u32| copies.iter().any(|copy| copy[*c as usize] != self.table[*c as usize]);
        let mut sectors: Vec<u32> = (2..self.geometry.clusters + 2).filter(differs).map(|c| c / 128).collect();
        sectors.dedup();
        if sectors.is_empty() { Ok(()) } else { self.write_table(&sectors).and_then(|()| self.disk.flush()) }
    }

    /// Writes a file of `size` bytes, all of it or nothing: a file of that name is replaced in one sector, and its
    /// directory is made.
    pub fn write(&mut self, path: &str, size: u64, from: &mut dyn Read) -> io::Result<()> {
        let size = u32::try_from(size).map_err(|_| bad(format!("{path}: FAT32 holds files of less than 4 GiB")))?;
        let (directory, name) = path.rsplit_once('/').unwrap_or(("", path));
        let directory = self.make_directory(directory)?;
        let old = self.nodes(directory)?.into_iter().find(|node| node.name.eq_ignore_ascii_case(name));
        if old.as_ref().is_some_and(|node| node.directory) {
            return Err(bad(format!("{path} is a directory")));
        }
        let length = self.cluster_bytes();
        let clusters = self.allocate(u64::from(size).div_ceil(length as u64))?;
        let mut buffer = vec![0; length];
        let mut left = usize::try_from(size).unwrap_or(usize::MAX);
        for number in &clusters {
            let piece = left.min(length);
            from.read_exact(&mut buffer[..piece])?;
            buffer[piece..].fill(0);
            self.disk.write_at(self.offset(*number), &buffer)?;
            left -= piece;
        }
        self.link(&clusters)?;
        self.disk.flush()?;
        let first = clusters.first().copied().unwrap_or(0);
        match old {
            Some(node) => {
                let (at, mut entry) = self.short_entry(&node)?;
                point(&mut entry, first, size);
                entry[11] = ATTRIBUTE_ARCHIVE;
                self.disk.write_at(at, &entry)?;
                self.disk.flush()?;
                self.free(node.cluster)?;
            }
            None => self.add_entry(directory, name, ATTRIBUTE_ARCHIVE, first, size)?,
        }
        self.disk.flush()
    }

    /// Gives a file another name of as many directory entries, in one sector: one write, and it has one of the two
    /// names.
    pub fn rename(&mut self, directory: &str, from: &str, to: &str) -> io::Result<()> {
        let Some(cluster) = self.directory(directory)? else { return Err(bad(format!("{directory} is not there"))) };
        let nodes = self.nodes(cluster)?;
        if nodes.iter().any(|node| node.name.eq_ignore_ascii_case(to)) {
            return Err(bad(format!("{directory}/{to} is there already")));
        }
        let node = nodes.iter().find(|node| node.name == from);
        let node = node.ok_or_else(|| bad(format!("{directory}/{from} is not there")))?;
        let set = entry_set(to, &short_name(to, self, cluster)?, ATTRIBUTE_ARCHIVE, node.cluster, node.size);
        let sectors: HashSet<u64> = node.entries.iter().map(|at| at / SECTOR as u64).collect();
        if set.len() != node.entries.len() || sectors.len() != 1 {
            return Err(bad(format!("{from} cannot become {to} in one write")));
        }
        let start = node.entries[0] / SECTOR as u64 * SECTOR as u64;
        let mut sector = [0; SECTOR];
        self.disk.read_at(start, &mut sector)?;
        for (at, entry) in node.entries.iter().zip(&set) {
            let at = usize::try_from(at - start).expect("within one sector");
            sector[at..at + ENTRY].copy_from_slice(entry);
        }
        self.disk.write_at(start, &sector)?;
        self.disk.flush()
    }

    /// Removes a file if it is there.
    pub fn remove(&mut self, path: &str) -> io::Result<()> {
        match self.find(path)?.filter(|node| !node.directory) {
            Some(node) => self.remove_name(&node),
            None => Ok(()),
        }
    }

    fn remove_name(&mut self, node: &Node) -> io::Result<()> {
        // The entry that counts first: a long name without it is nothing.
        for at in node.entries.iter().rev() {
            self.disk.write_at(at / SECTOR as u64 * SECTOR as u64, &self.sector_with_deleted(*at)?)?;
            self.disk.flush()?;
        }
        self.free(node.cluster)?;
        self.disk.flush()
    }

    fn sector_with_deleted(&self, at: u64) -> io::Result<[u8; SECTOR]> {
        let start = at / SECTOR as u64 * SECTOR as u64;
        let mut sector = [0; SECTOR];
        self.disk.read_at(start, &mut sector)?;
        sector[usize::try_from(at - start).expect("within one sector")] = DELETED;
        Ok(sector)
    }

    fn short_entry(&self, node: &Node) -> io::Result<(u64, [u8; ENTRY])> {
        let at = *node.entries.last().expect("every node has its short entry");
        let mut entry = [0; ENTRY];
        self.disk.read_at(at, &mut entry)?;
        Ok((at, entry))
    }

    fn make_directory(&mut self, path: &str) -> io::Result<u32> {
        let mut cluster = self.geometry.root;
        for part in path.split('/').filter(|part| !part.is_empty()) {
            let known = self.nodes(cluster)?.into_iter().filter(|node| node.name.eq_ignore_ascii_case(part));
            let (directories, files): (Vec<Node>, Vec<Node>) =
                known.partition(|node| node.directory && node.cluster != 0);
            // Firmware goes into no file: there is nothing for it below such a name, and it may hide a directory of the same.
            for file in files {
                self.remove_name(&file)?;
            }
            cluster = if let Some(node) = directories.first() {
                node.cluster
            } else {
                let new = self.allocate(1)?;
                let mut content = vec![0; self.cluster_bytes()];
                let parent = if cluster == self.geometry.root { 0 } else { cluster };
                for (number, (name, at)) in [(".", new[0]), ("..", parent)].into_iter().enumerate() {
                    let entry = short_entry(&padded(name), ATTRIBUTE_DIRECTORY, at, 0);
                    content[number * ENTRY..(number + 1) * ENTRY].copy_from_slice(&entry);
                }
                self.disk.write_at(self.offset(new[0]), &content)?;
                self.link(&new)?;
                self.disk.flush()?;
                self.add_entry(cluster, part, ATTRIBUTE_DIRECTORY, new[0], 0)?;
                new[0]
            };
        }
        Ok(cluster)
    }

    /// Free clusters; they are taken only when [`Self::link`] says so.
    fn allocate(&self, count: u64) -> io::Result<Vec<u32>> {
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        let is_free = |c: &u32| self.table[*c as usize] == 0 && !self.knots.contains(c);
        let free: Vec<u32> = (2..self.geometry.clusters + 2).filter(is_free).take(count).collect();
        if free.len() == count {
            Ok(free)
        } else {
            Err(io::Error::new(io::ErrorKind::StorageFull, format!("{} of {count} clusters are free", free.len())))
        }
    }

    fn link(&mut self, clusters: &[u32]) -> io::Result<()> {
        let next = clusters.iter().skip(1).copied().chain([END]);
        let changes: Vec<(u32, u32)> = clusters.iter().copied().zip(next).collect();
        self.set(&changes)
    }

    fn free(&mut self, first: u32) -> io::Result<()> {
        // Of an empty file there is nothing. Of a chain that is broken, or another's as well, the next opening knows what nothing
        // names any more.
        match self.chain(first) {
            Ok(chain) if !chain.iter().any(|cluster| self.knots.contains(cluster)) => {
                let mut bytes = vec![0; self.cluster_bytes()];
                // What cannot be read would be the first to be given out again.
                let mut value = |c| if self.disk.read_at(self.offset(c), &mut bytes).is_ok() { 0 } else { BAD };
                let changes: Vec<(u32, u32)> = chain.into_iter().map(|cluster| (cluster, value(cluster))).collect();
                self.set(&changes)
            }
            Ok(_) | Err(_) => Ok(()),
        }
    }

    /// Changes the table, and writes what that changes of each copy.
    fn set(&mut self, changes: &[(u32, u32)]) -> io::Result<()> {
        for (cluster, value) in changes {
            self.table[*cluster as usize] = *value;
        }
        let mut sectors: Vec<u32> = changes.iter().map(|(cluster, _)| cluster / 128).collect();
        sectors.sort_unstable();
        sectors.dedup();
        self.write_table(&sectors)
    }

    fn write_table(&mut self, sectors: &[u32]) -> io::Result<()> {
        for sector in sectors {
            let mut bytes = [0; SECTOR];
            let values = self.table.iter().skip(*sector as usize * 128);
            bytes.chunks_mut(4).zip(values).for_each(|(place, value)| place.copy_from_slice(&value.to_le_bytes()));
            if *sector == 0 {
                bytes[..8].copy_from_slice(&[0xf8, 0xff, 0xff, 0x0f, 0xff, 0xff, 0xff, 0x0f]);
            }
            for copy in 0..self.geometry.fats {
                let at = self.geometry.reserved + copy * self.geometry.fat_sectors + sector;
                self.disk.write_at(u64::from(at) * SECTOR as u64, &bytes)?;
            }
        }
        Ok(())
    }

    /// Puts a name into a directory: all its entries in one sector, written at once.
    fn add_entry(&mut self, directory: u32, name: &str, attributes: u8, first: u32, size: u32) -> io::Result<()> {
        let short = short_name(name, self, directory)?;
        let set = entry_set(name, &short, attributes, first, size);
        if set.len() > PER_SECTOR {
            return Err(bad(format!("the name {name} is too long")));
        }
        let raw = self.raw(directory)?;
        // Behind the end mark all is free, whatever its bytes say.
        let end = raw.iter().position(|(_, entry)| entry[0] == 0).unwrap_or(raw.len());
        let free = |number: usize| number >= end || raw[number].1[0] == DELETED;
        let place = (0..raw.len() / PER_SECTOR).find_map(|sector| {
            let start = sector * PER_SECTOR;
            (start..=start + PER_SECTOR - set.len()).find(|from| (*from..from + set.len()).all(free))
        });
        let Some(place) = place else {
            let new = self.allocate(1)?;
            self.disk.write_at(self.offset(new[0]), &vec![0; self.cluster_bytes()])?;
            self.link(&new)?;
            self.disk.flush()?;
            let last = *self.chain(directory)?.last().expect("a chain is not empty");
            self.set(&[(last, new[0])])?;
            self.disk.flush()?;
            return self.add_entry(directory, name, attributes, first, size);
        };
        // Entries that are passed over must not look like the end.
        let gap = end..place.max(end);
        if !gap.is_empty() {
            let sectors: HashSet<u64> = gap.clone().map(|number| raw[number].0 / SECTOR as u64).collect();
            let target = raw[place].0 / SECTOR as u64;
            for sector in sectors.into_iter().filter(|sector| *sector != target) {
                self.fill_gap(sector, &raw, &gap)?;
            }
            self.disk.flush()?;
        }
        // What lies behind the end mark stays behind one, also where the name takes the rest of its sector.
        let next = place + set.len();
        if next > end
            && let Some((at, entry)) = raw.get(next)
            && at.is_multiple_of(SECTOR as u64)
            && entry[0] != 0
        {
            self.disk.write_at(*at, &[0; SECTOR])?;
            self.disk.flush()?;
        }
        let start = raw[place].0 / SECTOR as u64 * SECTOR as u64;
        let mut sector = [0; SECTOR];
        self.disk.read_at(start, &mut sector)?;
        for (number, (at, _)) in
            raw.iter().enumerate().filter(|(_, (at, _))| at / SECTOR as u64 == start / SECTOR as u64)
        {
            let at = usize::try_from(at - start).expect("within one sector");
            let piece = &mut sector[at..at + ENTRY];
            if let Some(entry) = number.checked_sub(place).and_then(|number| set.get(number)) {
                piece.copy_from_slice(entry);
            } else if gap.contains(&number) {
                piece.fill(0);
                piece[0] = DELETED;
            } else if number >= end {
                piece.fill(0);
            }
        }
        self.disk.write_at(start, &sector)?;
        self.disk.flush()
    }

    fn fill_gap(&mut self, sector: u64, raw: &[(u64, [u8; ENTRY])], gap: &std::ops::Range<usize>) -> io::Result<()> {
        let start = sector * SECTOR as u64;
        let mut bytes = [0; SECTOR];
        self.disk.read_at(start, &mut bytes)?;
        for number in gap.clone().filter(|number| raw[*number].0 / SECTOR as u64 == sector) {
            let at = usize::try_from(raw[number].0 - start).expect("within one sector");
            bytes[at..at + ENTRY].fill(0);
            bytes[at] = DELETED;
        }
        self.disk.write_at(start, &bytes)
    }
}

/// An 8.3 name that no other has: the name itself where it is one, else eight digits made of it.
fn short_name<B: Block>(name: &str, fat: &Fat<B>, directory: u32) -> io::Result<[u8; 11]> {
    let fits = |part: &str, length: usize| {
        part.len() <= length && part.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit())
    };
    let (stem, suffix) = name.rsplit_once('.').unwrap_or((name, ""));
    let join = |stem: &str, suffix: &str| {
        let mut short = [b' '; 11];
        short[..8].copy_from_slice(&padded::<8>(stem));
        short[8..].copy_from_slice(&padded::<3>(suffix));
        short
    };
    if !stem.is_empty() && fits(stem, 8) && fits(suffix, 3) {
        return Ok(join(stem, suffix));
    }
    let taken: HashSet<Vec<u8>> = fat.raw(directory)?.into_iter().map(|(_, entry)| entry[..11].to_vec()).collect();
    let suffix: String = suffix.chars().filter(char::is_ascii_alphanumeric).take(3).collect();
    for salt in 0..=u32::from(u16::MAX) {
        let sum = name.bytes().fold(0x811c_9dc5 ^ salt, |sum, b| (sum ^ u32::from(b)).wrapping_mul(0x0100_0193));
        let short = join(&format!("{sum:08X}"), &suffix);
        if !taken.contains(&short[..]) {
            return Ok(short);
        }
    }
    Err(bad("no short name is free"))
}
