//! What outlives a boot: the machine's identity key and the highest versions seen. What is remembered of them is here; where it is
//! kept, in [`place`].

mod copy;
mod floors;
mod hung;
mod orders;
mod place;
mod records;

pub use copy::Resumed;
#[cfg(test)]
pub use place::recalled;
pub use place::{Identity, Place, random, write_variable};

use crate::error::{AgentError, Result};
use jiff::Timestamp;
use kiln_protocol::{Assignment, OrderMark};
use kiln_release::tuf::Seen;
use kiln_release::{BootInfo, Site, hex};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;

/// The highest versions seen, and the time floor.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// TUF versions.
    pub seen: Seen,
    /// Highest assignment sequence.
    #[serde(default)]
    pub sequence: u64,
    /// No time before this is believed.
    #[serde(default)]
    pub time_floor: Option<Timestamp>,
    /// SHA-256 over the director's key ids, as the site signs them: a sequence counts only under the director that made
    /// it, so that a number driven to its end with a stolen key is forgotten when the key is replaced.
    #[serde(default)]
    pub director: String,
    /// How far the boot loader's order had come under the directors before this one: what this one assigns stands behind
    /// all of that, whatever its number is.
    #[serde(default)]
    pub order_base: u64,
    /// Lowest release that may run, by image: of those that this machine is, was or holds ([`floors`]).
    #[serde(default)]
    pub floors: BTreeMap<String, u64>,
    /// Boots in a row that ended because what was served did not verify.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub failed_boots: u32,
    /// The last boot of an image that keeps data was restarted through firmware, because a kexec had started it.
    #[serde(default, skip_serializing_if = "is_false")]
    pub restarted_for_data: bool,
    /// Operators' orders that were taken and have not expired, by id: none is done twice.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub orders: BTreeMap<String, OrderMark>,
    /// When the last of those that were forgotten expires. Another director may say an earlier time again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub orders_until: Option<Timestamp>,
    /// What may be kept on the state partition: release, by the beginning of its root hash, and the digest of what is kept of it
    /// ([`crate::disk::record::digest`]), the newest last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub records: Vec<(String, String)>,
    /// The disk that gave no answer and so ended the last boot: this one leaves it alone, once ([`hung`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_hung: Option<String>,
    /// Under which sequence a kexec was tried beside what gives no answer, and how often ([`hung`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kexecs: Option<(u64, u8)>,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde's signature
fn is_zero(number: &u32) -> bool {
    *number == 0
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde's signature
fn is_false(value: &bool) -> bool {
    !*value
}

/// So many boots may fail to verify before the pauses between them grow: as many as a trial has.
const QUICK_FAILURES: u32 = 3;
/// Longest pause between them, besides that of every restart.
const LONGEST_PAUSE: Duration = Duration::from_secs(290);

/// Shortest pause of a machine that cannot count them, and so much more at most.
const UNCOUNTED_PAUSE: Duration = Duration::from_secs(60);
const UNCOUNTED_MORE: Duration = Duration::from_secs(230);

/// How long a boot that did not verify rests before it restarts the machine. One that is not remembered may be the first or
/// the thousandth: it rests for one to five minutes, by chance, so that a rack does not come back in step. Whoever stands
/// before it reads the reason meanwhile; it verifies again at the next boot.
pub fn rest(counted: Duration, is_kept: bool, jitter: u8) -> Duration {
    if is_kept {
        return counted;
    }
    counted.max(UNCOUNTED_PAUSE + UNCOUNTED_MORE * u32::from(jitter) / u32::from(u8::MAX))
}

impl Memory {
    /// One more boot ended because what was served did not verify. So long it rests before it restarts: somebody on the
    /// network who serves nonsense gets a slow, told loop, and storage does not wear.
    pub fn boot_failed(&mut self) -> Duration {
        self.failed_boots = self.failed_boots.saturating_add(1);
        match self.failed_boots.checked_sub(QUICK_FAILURES).filter(|more| *more > 0) {
            None => Duration::ZERO,
            Some(more) => Duration::from_secs(10).saturating_mul(1 << more.min(16)).min(LONGEST_PAUSE),
        }
    }

    /// That this boot image is not below the floor of its image.
    pub fn may_boot(&self, boot: &BootInfo) -> Result<()> {
        let floor = self.floor(&boot.image);
        if boot.release < floor {
            return Err(AgentError::BelowFloor { image: boot.image.clone(), release: boot.release, floor });
        }
        Ok(())
    }

    /// Whether this boot restarts through firmware, because its kernel is `past` the state in which the TPM gives the data's
    /// key. Not twice in a row: firmware that leads here by kexec again would do so for ever.
    pub fn restart_for_data(&mut self, past: bool) -> bool {
        let restarted = std::mem::replace(&mut self.restarted_for_data, past);
        past && !restarted
    }

    /// Whose sequence numbers count from now on. With another director the time that the one before said is forgotten
    /// too: with a stolen key it can have been any up to the newest offline date. Orders stay known: operators signed them. True if
    /// something was forgotten.
    pub fn directed_by(&mut self, site: &Site) -> bool {
        let keys: Vec<&str> = site.directors.keys().map(String::as_str).collect();
        let director = hex::sha256(keys.join(",").as_bytes());
        if self.director != director {
            let replaced = !self.director.is_empty();
            if replaced {
                self.order_base = self.order_base.saturating_add(self.sequence);
                self.sequence = 0;
                self.time_floor = None;
            }
            self.director = director;
            return replaced;
        }
        false
    }

    /// Where an assignment of this director stands in the boot loader's order.
    pub fn order(&self, sequence: u64) -> u64 {
        self.order_base.saturating_add(sequence)
    }

    /// The sequence of the assignment that stands there, if this director made it.
    pub fn sequence_of(&self, order: u64) -> Option<u64> {
        order.checked_sub(self.order_base).filter(|sequence| *sequence > 0)
    }

    /// Takes over an accepted assignment's sequence.
    pub fn accept(&mut self, assignment: &Assignment) {
        self.sequence = self.sequence.max(assignment.sequence);
    }
}

#[cfg(test)]
mod tests;
