//! What can happen to the service, and what it can be told to do.

use crate::error::FailureClass;
use kiln_protocol::{Grant, Health, ReleaseId, Stage, StageState};

/// Another release, as an assignment names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    pub release: ReleaseId,
    pub sequence: u64,
}

/// What the service claims to want of this machine, and whether it may leave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    pub target: Target,
    pub grant: Grant,
}

/// A reply, as far as it decides what comes next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub again_ms: u64,
    pub may_wait: bool,
    /// None: what runs is what is assigned, or nothing is.
    pub wanted: Option<Wanted>,
}

/// Why a step failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    pub stage: Stage,
    pub class: FailureClass,
    pub kind: String,
    pub message: String,
    /// The release came on before it failed: not one more failure in a row.
    pub moved: bool,
}

/// What can happen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A round of health checks is over.
    Checked(Health),
    /// A report was answered.
    Answered(Answer),
    /// It was not, and why.
    Unanswered(String),
    /// The release that [`Action::Fetch`] named is here and verified; a note for people about how it will be gone to.
    Fetched(Option<String>),
    /// [`Action::AskWhetherToGo`]: the grant and all it rests on are verified.
    MayGo,
    /// Either of the two failed.
    Failed(Trouble),
    /// [`Action::Drain`] is through, or a hook keeps the machine.
    Drained(Option<Trouble>),
    /// Something else that the server should hear at once.
    News,
    /// [`Action::Load`] is done, or could not be and a cold boot leads there as well.
    Loaded(Option<Trouble>),
    /// It could not be, and a cold boot would lead elsewhere.
    Stuck(Trouble),
    /// Time passed.
    Time,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Into the journal.
    Record(Stage, StageState),
    /// To the console, nowhere else.
    Say(String),
    /// Post a report that the server may hold for so many seconds.
    Report(u32),
    /// Let go of the held report.
    EndHold,
    /// Verify the newest reply's assignment, which claims this, and fetch what it names.
    Fetch(Target),
    /// Verify the newest reply anew: its grant, and that it is still this release.
    AskWhetherToGo(Target),
    /// Drop the running one of the two.
    CallOff,
    /// Drop what was fetched.
    Discard,
    /// Run the drain hooks, instead of what hooks run.
    Drain,
    /// Run the undrain hooks, instead of what hooks run.
    Undrain,
    /// Tell the disk's loader, and load the next kernel, for a kexec. Once that is done there is no way back.
    Load,
    /// Go, by cold boot if the kernel could not be loaded.
    Leave { cold: bool },
}
