//! dm-verity: superblock and hash tree as `veritysetup format` writes them. Format 1, SHA-256, data and hash blocks of
//! 4096 bytes, salt before the block. Source: cryptsetup's on-disk format and the kernel's
//! `Documentation/admin-guide/device-mapper/verity.rst`.
//!
//! The tree is built from a stream of blocks; its levels are kept in memory (1/127 of the data). No forward error
//! correction.

use crate::error::VerityError;
use crate::formats::VerityParams;
use crate::hex;
use ring::digest::{Context, SHA256};

/// Size of data and hash blocks.
pub const BLOCK: usize = 4096;
const BLOCK_U64: u64 = BLOCK as u64;
/// Hashes in one block of the tree.
const PER_BLOCK: usize = BLOCK / 32;
const MAX_SALT: usize = 256;

type Hash = [u8; 32];

fn hash_block(salt: &[u8], block: &[u8]) -> Hash {
    let mut context = Context::new(&SHA256);
    context.update(salt);
    context.update(block);
    context.finish().as_ref().try_into().expect("SHA-256 has 32 bytes")
}

/// The verity superblock, the first block of the hash area.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// For people; the kernel does not use it.
    pub uuid: [u8; 16],
    /// Number of data blocks.
    pub data_blocks: u64,
    /// Put before every block that is hashed.
    pub salt: Vec<u8>,
}

impl Superblock {
    /// Its block.
    pub fn to_block(&self) -> Result<[u8; BLOCK], VerityError> {
        if self.salt.len() > MAX_SALT {
            return Err(VerityError::SaltTooLong { got: self.salt.len() });
        }
        let salt_size = u16::try_from(self.salt.len()).expect("at most 256");
        let block_size = u32::try_from(BLOCK).expect("4096 fits");
        let mut block = [0u8; BLOCK];
        let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"verity\0\0");
        put(8, &1u32.to_le_bytes()); // superblock version
        put(12, &1u32.to_le_bytes()); // hash type 1: salt first, as the kernel's current format
        put(16, &self.uuid);
        put(32, b"sha256");
        put(64, &block_size.to_le_bytes());
        put(68, &block_size.to_le_bytes());
        put(72, &self.data_blocks.to_le_bytes());
        put(80, &salt_size.to_le_bytes());
        put(88, &self.salt);
        Ok(block)
    }

    /// Reads a superblock and demands the one form that Kiln writes: every byte has its one value.
    pub fn parse(block: &[u8; BLOCK]) -> Result<Self, VerityError> {
        let number = |at: usize| u32::from_le_bytes(block[at..at + 4].try_into().expect("four bytes"));
        let salt_size = usize::from(u16::from_le_bytes([block[80], block[81]]));
        let data_blocks = u64::from_le_bytes(block[72..80].try_into().expect("eight bytes"));
        if &block[..8] != b"verity\0\0" {
            let got = hex::encode(&block[..8]);
            return Err(VerityError::Superblock { field: "magic", expected: hex::encode(b"verity\0\0"), got });
        }
        for (field, at, expected) in
            [("version", 8, 1), ("hash type", 12, 1), ("data block size", 64, 4096), ("hash block size", 68, 4096)]
        {
            let got = number(at);
            if got != expected {
                let (expected, got) = (expected.to_string(), got.to_string());
                return Err(VerityError::Superblock { field, expected, got });
            }
        }
        if data_blocks == 0 {
            return Err(VerityError::NoData);
        }
        if salt_size > MAX_SALT {
            return Err(VerityError::SaltTooLong { got: salt_size });
        }
        let uuid = block[16..32].try_into().expect("sixteen bytes");
        let parsed = Self { uuid, data_blocks, salt: block[88..88 + salt_size].to_vec() };
        if parsed.to_block()? != *block {
            return Err(VerityError::Superblock {
                field: "algorithm or padding",
                expected: "sha256 and zeros".to_owned(),
                got: "something else".to_owned(),
            });
        }
        Ok(parsed)
    }
}

/// One level of the tree under construction: the block being filled, and the finished ones.
#[derive(Debug, Default, Clone)]
struct Level {
    bytes: Vec<u8>,
    hashes: u64,
}

/// Builds the tree from data blocks in order.
#[derive(Debug, Clone)]
pub struct TreeBuilder {
    salt: Vec<u8>,
    uuid: [u8; 16],
    data_blocks: u64,
    leaves: Level,
}

/// A finished tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    /// What the kernel is told.
    pub root_hash: Hash,
    /// Superblock, then the tree from its top level down.
    pub hash_area: Vec<u8>,
    /// Number of data blocks.
    pub data_blocks: u64,
}

impl TreeBuilder {
    /// With a salt of at most 256 bytes.
    pub fn new(salt: &[u8], uuid: [u8; 16]) -> Result<Self, VerityError> {
        if salt.len() > MAX_SALT {
            return Err(VerityError::SaltTooLong { got: salt.len() });
        }
        Ok(Self { salt: salt.to_vec(), uuid, data_blocks: 0, leaves: Level::default() })
    }

    /// The next data block.
    pub fn push_block(&mut self, block: &[u8; BLOCK]) {
        let hash = hash_block(&self.salt, block);
        self.leaves.bytes.extend_from_slice(&hash);
        self.leaves.hashes += 1;
        self.data_blocks += 1;
    }

    /// The tree over the blocks pushed so far.
    pub fn finish(self) -> Result<Tree, VerityError> {
        if self.data_blocks == 0 {
            return Err(VerityError::NoData);
        }
        let mut levels: Vec<Vec<u8>> = Vec::new();
        let mut hashes = self.leaves.bytes;
        // A level of one hash is the root hash itself and is not written.
        while hashes.len() > 32 {
            hashes.resize(hashes.len().div_ceil(BLOCK) * BLOCK, 0);
            let above = hashes.chunks_exact(BLOCK).flat_map(|block| hash_block(&self.salt, block)).collect();
            levels.push(std::mem::replace(&mut hashes, above));
        }
        let root_hash = hashes.as_slice().try_into().expect("the loop ends with one hash");
        let superblock = Superblock { uuid: self.uuid, data_blocks: self.data_blocks, salt: self.salt };
        let mut hash_area = superblock.to_block()?.to_vec();
        levels.iter().rev().for_each(|level| hash_area.extend_from_slice(level));
        Ok(Tree { root_hash, hash_area, data_blocks: self.data_blocks })
    }
}

/// Length in bytes of superblock and tree over so many data blocks.
pub fn hash_area_length(data_blocks: u64) -> u64 {
    let (mut blocks, mut total) = (data_blocks, 1);
    while blocks > 1 {
        blocks = blocks.div_ceil(PER_BLOCK as u64);
        total += blocks;
    }
    total * BLOCK_U64
}

impl VerityParams {
    /// Checks each field, and that data and hash area fill a root artifact of this length exactly.
    pub fn check(&self, root_length: u64) -> Result<(), VerityError> {
        let bad = |field, got: String, reason| Err(VerityError::BadParameter { field, got, reason });
        if !hex::is_sha256(&self.root_hash) {
            return bad("root_hash", self.root_hash.clone(), "64 lower-case hex digits are needed");
        }
        match hex::decode(&self.salt) {
            Some(salt) if salt.len() <= MAX_SALT && self.salt == self.salt.to_lowercase() => {}
            Some(_) | None => return bad("salt", self.salt.clone(), "lower-case hex of at most 256 bytes is needed"),
        }
        // 2^48 blocks are an exbibyte: far from any overflow below.
        if self.data_blocks == 0 || self.data_blocks > 1 << 48 {
            return bad("data_blocks", self.data_blocks.to_string(), "from 1 to 2^48");
        }
        if self.hash_offset != self.data_blocks * BLOCK_U64 {
            return bad("hash_offset", self.hash_offset.to_string(), "the hash area follows the data at once");
        }
        if root_length != self.hash_offset + hash_area_length(self.data_blocks) {
            return bad("length", root_length.to_string(), "the root artifact is data, superblock and tree, no more");
        }
        Ok(())
    }

    /// Salt as bytes.
    pub fn salt_bytes(&self) -> Result<Vec<u8>, VerityError> {
        hex::decode(&self.salt).ok_or_else(|| VerityError::BadParameter {
            field: "salt",
            got: self.salt.clone(),
            reason: "hex is needed",
        })
    }

    /// Length of the dm-verity device in 512-byte sectors.
    pub fn sectors(&self) -> u64 {
        self.data_blocks * (BLOCK_U64 / 512)
    }

    /// Parameters of device-mapper's `verity` target; start 0 and [`Self::sectors`] go before them in a table line.
    /// The devices are paths or `major:minor`; both may be the same.
    pub fn table(&self, data_device: &str, hash_device: &str) -> String {
        let salt = if self.salt.is_empty() { "-" } else { &self.salt };
        format!(
            "1 {data_device} {hash_device} {BLOCK} {BLOCK} {} {} sha256 {} {salt}",
            self.data_blocks,
            self.hash_offset / BLOCK_U64 + 1,
            self.root_hash,
        )
    }
}

/// Recomputes the tree of a root artifact that is read from its start in pieces of any length, and compares it with
/// the signed parameters and with the tree in the artifact.
#[derive(Debug)]
pub struct Checker {
    params: VerityParams,
    builder: Option<TreeBuilder>,
    salt: Vec<u8>,
    partial: Vec<u8>,
    tree: Option<Tree>,
    /// Bytes of the hash area that were compared.
    compared: usize,
}

impl Checker {
    /// For an artifact with these parameters, which were checked.
    pub fn new(params: &VerityParams) -> Result<Self, VerityError> {
        let salt = params.salt_bytes()?;
        Ok(Self {
            builder: Some(TreeBuilder::new(&salt, [0; 16])?),
            params: params.clone(),
            salt,
            partial: Vec::with_capacity(BLOCK),
            tree: None,
            compared: 0,
        })
    }

    /// The next bytes.
    pub fn push(&mut self, mut bytes: &[u8]) -> Result<(), VerityError> {
        while !bytes.is_empty() {
            let (piece, rest) = bytes.split_at(bytes.len().min(BLOCK - self.partial.len()));
            self.partial.extend_from_slice(piece);
            bytes = rest;
            if let Ok(block) = <&[u8; BLOCK]>::try_from(self.partial.as_slice()) {
                let block = *block;
                self.partial.clear();
                self.block(&block)?;
            }
        }
        Ok(())
    }

    fn block(&mut self, block: &[u8; BLOCK]) -> Result<(), VerityError> {
        if let Some(builder) = &mut self.builder {
            builder.push_block(block);
            if builder.data_blocks == self.params.data_blocks {
                let tree = self.builder.take().expect("it is there").finish()?;
                let got = hex::encode(&tree.root_hash);
                if got != self.params.root_hash {
                    return Err(VerityError::RootMismatch { expected: self.params.root_hash.clone(), got });
                }
                self.tree = Some(tree);
            }
            return Ok(());
        }
        let mismatch = Err(VerityError::TreeMismatch { offset: self.compared as u64 });
        if self.compared == 0 {
            // The superblock's UUID is free, the rest is not.
            let superblock = Superblock::parse(block)?;
            if superblock.salt != self.salt || superblock.data_blocks != self.params.data_blocks {
                return mismatch;
            }
        } else {
            let expected = self.tree.as_ref().and_then(|tree| tree.hash_area.get(self.compared..self.compared + BLOCK));
            if expected != Some(&block[..]) {
                return mismatch;
            }
        }
        self.compared += BLOCK;
        Ok(())
    }

    /// After the last byte.
    pub fn finish(self) -> Result<(), VerityError> {
        let complete = self.tree.as_ref().is_some_and(|tree| tree.hash_area.len() == self.compared);
        if complete && self.partial.is_empty() {
            Ok(())
        } else {
            Err(VerityError::TreeMismatch { offset: self.compared as u64 })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn data(blocks: usize) -> Vec<[u8; BLOCK]> {
        (0..blocks).map(|i| std::array::from_fn(|j| u8::try_from((i * 31 + j) % 251).unwrap())).collect()
    }

    fn artifact(blocks: usize, salt: &[u8]) -> (VerityParams, Vec<u8>) {
        let mut builder = TreeBuilder::new(salt, [9; 16]).unwrap();
        let data = data(blocks);
        for block in &data {
            builder.push_block(block);
        }
        let tree = builder.finish().unwrap();
        let params = VerityParams {
            root_hash: hex::encode(&tree.root_hash),
            salt: hex::encode(salt),
            data_blocks: blocks as u64,
            hash_offset: (blocks * BLOCK) as u64,
        };
        (params, [data.concat(), tree.hash_area].concat())
    }

    #[test]
    fn lengths_agree_with_the_tree_itself() {
        for blocks in [1, 2, 127, 128, 129, 300] {
            let (params, bytes) = artifact(blocks, b"salt");
            params.check(bytes.len() as u64).unwrap();
            assert!(params.check(bytes.len() as u64 + 1).is_err());
        }
        // Levels of 128 and more blocks have a third level.
        assert_eq!(hash_area_length(128 * 128 + 1), (1 + 129 + 2 + 1) * BLOCK_U64);
        assert_eq!(hash_area_length(128 * 128), (1 + 128 + 1) * BLOCK_U64);
    }

    #[test]
    fn no_data_and_long_salts_are_refused() {
        assert_eq!(TreeBuilder::new(b"", [0; 16]).unwrap().finish().unwrap_err(), VerityError::NoData);
        assert!(matches!(TreeBuilder::new(&[0; 257], [0; 16]), Err(VerityError::SaltTooLong { got: 257 })));
    }

    #[test]
    fn the_table_is_what_the_kernel_reads() {
        let (params, _) = artifact(3, &[0xab, 0xcd]);
        assert_eq!(params.table("7:0", "7:0"), format!("1 7:0 7:0 4096 4096 3 4 sha256 {} abcd", params.root_hash));
        assert_eq!(params.sectors(), 24);
        let (unsalted, _) = artifact(1, b"");
        assert!(unsalted.table("a", "b").ends_with(" -"));
    }

    #[test]
    fn every_altered_superblock_byte_is_noticed() {
        let block = Superblock { uuid: [1; 16], data_blocks: 5, salt: vec![7; 32] }.to_block().unwrap();
        let parsed = Superblock::parse(&block).unwrap();
        for i in 0..BLOCK {
            let mut altered = block;
            altered[i] ^= 1;
            assert_ne!(Superblock::parse(&altered).ok(), Some(parsed.clone()), "byte {i}");
        }
    }

    fn run(params: &VerityParams, bytes: &[u8], piece: usize) -> Result<(), VerityError> {
        let mut checker = Checker::new(params)?;
        for piece in bytes.chunks(piece) {
            checker.push(piece)?;
        }
        checker.finish()
    }

    #[test]
    fn one_flipped_byte_is_noticed_wherever_it_is() {
        let (params, bytes) = artifact(130, b"s");
        run(&params, &bytes, 1000).unwrap();
        for (at, kind) in [
            (0, "verity-root-mismatch"),
            (130 * BLOCK - 1, "verity-root-mismatch"),
            (130 * BLOCK, "verity-superblock"),
            (131 * BLOCK, "verity-tree-mismatch"),
            (bytes.len() - 1, "verity-tree-mismatch"),
        ] {
            let mut altered = bytes.clone();
            altered[at] ^= 1;
            assert_eq!(run(&params, &altered, 4096).unwrap_err().kind(), kind, "byte {at}");
        }
        assert!(run(&params, &bytes[..bytes.len() - 1], 4096).is_err());
        assert!(run(&params, &[&bytes[..], &[0]].concat(), 4096).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn pieces_of_any_length_give_the_same_verdict(blocks in 1usize..140, piece in 1usize..9000, flip in any::<Option<u32>>()) {
            let (params, mut bytes) = artifact(blocks, b"pepper");
            if let Some(flip) = flip {
                let at = flip as usize % bytes.len();
                bytes[at] ^= 0x80;
                let uuid = blocks * BLOCK + 16..blocks * BLOCK + 32;
                prop_assert_eq!(run(&params, &bytes, piece).is_err(), !uuid.contains(&at));
            } else {
                prop_assert!(run(&params, &bytes, piece).is_ok());
            }
        }
    }
}
