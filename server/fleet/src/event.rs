//! What can happen to a machine, and what follows.

use crate::attestation::{Left, Proven};
use crate::boots::StageAt;
use crate::classes::HardwareClass;
use crate::expected::Comparison;
use crate::hardware::HardwareEvent;
use crate::orders::MachineOrder;
use crate::way::Route;
use kiln_protocol::{KeyId, MachineId, OrderId, ReleaseId, Report, Sha256Hex};

/// A report that came over mutual TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reported {
    /// The key that the TLS handshake proved.
    pub key: KeyId,
    /// What it says.
    pub report: Report,
    /// Root hash of the release it says it runs, as the verified manifest has it; none if that release is not
    /// published here.
    pub published_root: Option<Sha256Hex>,
}

/// What can happen to a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Its hardware changed.
    Hardware(Vec<HardwareEvent>),
    /// An inventory says of which class its hardware is.
    Classed(HardwareClass),
    /// It was compared with the list of expected machines; none: there is no list any more.
    Compared(Option<Comparison>),
    /// Its firmware asked for an address and a boot program.
    Asked,
    /// Its firmware began to download the boot program of this release.
    Downloads(ReleaseId),
    /// Its firmware took more of the boot program, or of a loader before it.
    TakesBytes,
    /// The boot program was sent whole.
    Downloaded,
    /// Its agent reported.
    Report(Box<Reported>),
    /// What its TPM proved was checked.
    Proven(Box<Proven>),
    /// It goes by kexec, and said before what its kernel measured.
    Leaves(Box<Left>),
    /// A person accepts its TPM and firmware as they are now.
    AcceptTpm,
    /// A person, or the pre-loaded list, said what it is for.
    Approve {
        /// Its name.
        name: String,
        /// Its role.
        role: String,
        /// What it shall run.
        release: ReleaseId,
    },
    /// The pre-loaded list names it, and it cannot be approved as the list says.
    NotApproved {
        /// Why, and what to do.
        reason: String,
    },
    /// The pre-loaded list does not name it, or not any more.
    NotListed,
    /// A person ordered a release.
    Assign {
        /// Which.
        release: ReleaseId,
        /// How to get there.
        via: Route,
    },
    /// An operator ordered something that the director may not.
    Ordered(MachineOrder),
    /// It delivered a wipe's receipt, which was verified; these disks were not wiped.
    Wiped {
        /// By which order.
        order: OrderId,
        /// Which disks were not.
        failed: Vec<String>,
    },
    /// The fleet lets it reimage itself now.
    Granted,
    /// A person dealt with what held it.
    Clear,
    /// A person says that this key, which was heard under its id ([`crate::Machine::heard_key`]), is the machine's.
    Adopt(KeyId),
    /// A person takes it out of service.
    Retire,
    /// A person put another in its place.
    Replaced {
        /// Which.
        by: MachineId,
    },
    /// A person knows why it does not do its work: it holds nobody up until it is seen healthy again.
    Excuse {
        /// Why, for whoever looks next.
        reason: String,
    },
    /// Another machine reports with its identity key, and both live.
    KeyShared {
        /// The other.
        with: String,
    },
    /// Time passed.
    Tick,
    /// The server started and has heard nobody yet.
    ServerStarted,
}

/// What the caller does after a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Commit the machine before anybody hears of what happened.
    Save,
    /// Remove it.
    Forget,
    /// Its assignment is another: sign it, and drop the envelope kept.
    Sign,
    /// What is wanted of it, or of those who wait for it, may have changed: answer held reports.
    Wake,
    /// A step of its boot that is new: a line for the log.
    Stage(StageAt),
    /// A line for the log and for those who watch.
    Say {
        /// It needs a person's eye.
        warn: bool,
        /// The words.
        text: String,
    },
    /// A line for the audit log, which this server itself writes.
    Record(String),
}
