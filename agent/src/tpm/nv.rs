//! The versions seen, in the TPM's own memory: two places that are written in turn, so that a cut leaves the older of the
//! two whole. An operating system with root's rights can erase them, as it can EFI variables; another disk, or erased firmware
//! settings, cannot. What is written wears: callers write what has changed only.

use super::{Result, Tpm, TpmFault};
use kiln_protocol::tpm::code;
use kiln_protocol::tpm::command::{self, NV_CHUNK};
use ring::digest::{SHA256, digest};

/// Owner-defined NV indices (TCG "Registry of Reserved TPM 2.0 Handles and Localities", §2.2.2: 0x01800000 to 0x01bfffff).
const PLACES: [u32; 2] = [0x0180_4b01, 0x0180_4b02];
/// Size of each; TPMs of PCs have 6 KiB and more in all, and take indices of 2048 bytes.
const SIZE: u16 = 1600;
const MAGIC: &[u8; 4] = b"KLN1";
/// Magic, counter, length, SHA-256 of counter and content.
const HEAD: usize = 4 + 8 + 2 + 32;

/// Bytes of content that a place holds.
pub fn room() -> usize {
    usize::from(SIZE) - HEAD
}

/// What became of a place.
enum Kept {
    Unwritten,
    /// `head`: the magic is there.
    Torn {
        head: bool,
    },
    Whole(Held),
}

/// What a place holds.
struct Held {
    counter: u64,
    content: Vec<u8>,
}

impl Tpm {
    /// Makes the places where they are missing. False: it has none, and takes none (it is full, or another owns it), so that nothing was
    /// ever remembered there, or somebody with root's rights has removed it. An error says nothing of what it remembers.
    pub fn make_memory(&mut self) -> Result<bool> {
        for (index, other) in [(PLACES[0], PLACES[1]), (PLACES[1], PLACES[0])] {
            if self.has(index)? {
                continue;
            }
            if let Err(fault) = self.run(&command::nv_define(index, SIZE)) {
                if self.has(other)? {
                    if !matches!(self.place(other)?, Kept::Unwritten) {
                        return Err(fault);
                    }
                    // There was room for one.
                    self.run(&command::nv_undefine(other))?;
                }
                println!("kiln-agent: the TPM has no place for versions: {fault}");
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn has(&mut self, index: u32) -> Result<bool> {
        match self.run(&command::nv_size(index)) {
            Ok(_) => Ok(true),
            Err(fault) if fault.code() == Some(code::NO_SUCH_HANDLE) => Ok(false),
            Err(fault) => Err(fault),
        }
    }

    /// What was written last; none: nothing yet. Of two places a cut leaves one whole; none that is, is somebody's work.
    pub fn recall(&mut self) -> Result<Option<Vec<u8>>> {
        let held = match [self.place(PLACES[0])?, self.place(PLACES[1])?] {
            [Kept::Whole(first), Kept::Whole(second)] if first.counter > second.counter => first,
            [Kept::Whole(held), Kept::Unwritten | Kept::Torn { .. }] | [_, Kept::Whole(held)] => held,
            // The second: the very first writing was cut, before its head.
            [Kept::Unwritten | Kept::Torn { head: false }, Kept::Unwritten] => return Ok(None),
            [Kept::Torn { head: true }, Kept::Unwritten] | [Kept::Unwritten | Kept::Torn { .. }, Kept::Torn { .. }] => {
                return Err(TpmFault::Spoilt);
            }
        };
        Ok(Some(held.content))
    }

    /// Writes beside what was written last.
    pub fn memorise(&mut self, content: &[u8]) -> Result<()> {
        let room = room();
        let length =
            u16::try_from(content.len()).ok().filter(|length| usize::from(*length) <= room).ok_or_else(|| {
                TpmFault::from(std::io::Error::other(format!(
                    "its memory holds {room} bytes, and {} are needed",
                    content.len()
                )))
            })?;
        let counters = [self.place(PLACES[0])?, self.place(PLACES[1])?].map(|kept| match kept {
            Kept::Whole(held) => held.counter,
            Kept::Unwritten | Kept::Torn { .. } => 0,
        });
        let index = if counters[0] <= counters[1] { PLACES[0] } else { PLACES[1] };
        let counter = (counters[0].max(counters[1]) + 1).to_be_bytes();
        let sum = digest(&SHA256, &[&counter, content].concat());
        let bytes = [&MAGIC[..], &counter, &length.to_be_bytes(), sum.as_ref(), content].concat();
        // The head last: until it is there, the place is not valid.
        let mut offset = bytes.len();
        for chunk in bytes.chunks(NV_CHUNK).rev() {
            offset -= chunk.len();
            let offset = u16::try_from(offset).expect("within the place");
            self.run(&command::nv_write(index, chunk, offset))?;
        }
        Ok(())
    }

    fn place(&mut self, index: u32) -> Result<Kept> {
        let mut bytes = Vec::with_capacity(usize::from(SIZE));
        let step = u16::try_from(NV_CHUNK).expect("512");
        for offset in (0..SIZE).step_by(NV_CHUNK) {
            match self.run(&command::nv_read(index, step.min(SIZE - offset), offset)) {
                Ok(chunk) => bytes.extend(chunk),
                Err(fault) if fault.code() == Some(code::NV_UNWRITTEN) => return Ok(Kept::Unwritten),
                Err(fault) => return Err(fault),
            }
        }
        Ok(held(&bytes).map_or_else(|| Kept::Torn { head: bytes.starts_with(MAGIC) }, Kept::Whole))
    }
}

fn held(bytes: &[u8]) -> Option<Held> {
    let (counter, rest) = bytes.strip_prefix(MAGIC)?.split_first_chunk::<8>()?;
    let (length, rest) = rest.split_first_chunk::<2>()?;
    let (sum, rest) = rest.split_first_chunk::<32>()?;
    let content = rest.get(..usize::from(u16::from_be_bytes(*length)))?;
    let whole = digest(&SHA256, &[&counter[..], content].concat()).as_ref() == sum;
    whole.then(|| Held { counter: u64::from_be_bytes(*counter), content: content.to_vec() })
}
