//! Disk mode: a disk with an EFI system partition, two slots and a state partition. What goes where is decided by
//! `kiln_protocol::slot`; here it is written, each commit durable before the next. No file system is mounted: see
//! [`fat`].
//!
//! A disk that cannot be used costs a machine its slots, never its boot: [`DiskError`] says which, and it runs in
//! memory.

pub mod block;
pub mod boot_order;
pub mod data;
pub mod device;
pub mod fat;
pub mod floor;
pub mod gpt;
pub mod layout;
pub mod loader;
pub mod machine;
pub mod record;
pub mod search;
pub mod show;
pub mod store;
#[cfg(test)]
mod tests;
pub mod worker;

/// Why there is no disk to use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DiskError {
    #[error("no disk was found; the release runs in memory")]
    NoDisk,
    #[error(
        "{disk}, which this system runs from, is not in the machine any more, or the kernel gave it up: it restarts, and runs in memory without it"
    )]
    Gone { disk: String },
    #[error("the disk has {size} bytes, the layout that the release signs needs {needed}")]
    TooSmall { size: u64, needed: u64 },
    #[error("{disk} holds {what}: it is not touched; wipe = \"foreign\" in the recipe's [disk] allows it")]
    Foreign { disk: String, what: &'static str },
    #[error(
        "{disk} has logical sectors of {bytes} bytes; 512 are supported: reformat it to them (`nvme format --lbaf`, \
         `sg_format --size=512`) or use another disk"
    )]
    SectorSize { disk: String, bytes: u32 },
    #[error("{disk}: {what}: {reason}")]
    Io { disk: String, what: &'static str, reason: String },
    /// It gave no answer in its time, or ever: what is on it is not known.
    #[error("{disk}: {what}: {reason}")]
    Late { disk: String, what: &'static str, reason: String },
    #[error(
        "{disk} gave no answer while the boot before this one read its slot: this boot leaves it alone, and runs in memory. The \
         next one tries it again"
    )]
    LeftOut { disk: String },
    #[error(
        "the boot loader on {disk} does not know {release} as the next to start: a cold boot would lead elsewhere. It is put \
         there anew"
    )]
    NotTold { disk: String, release: String },
    #[error("slot on {disk} has {size} bytes, the root artifact {length}")]
    SlotTooSmall { disk: String, size: u64, length: u64 },
    #[error("what was read back from {disk} is not what was written: {reason}")]
    ReadBack { disk: String, reason: String },
    #[error(
        "{disk} was partitioned without a place for data: wipe it (`kiln machine wipe`), and it is made anew with one"
    )]
    NoData { disk: String },
    #[error(
        "the data on {disk} is encrypted under a key that this machine's TPM does not hold: it is another machine's disk, or \
         the TPM was cleared. It is not touched; `kiln machine wipe` gives it up"
    )]
    DataOfAnother { disk: String },
    #[error("{0}")]
    Refused(#[from] kiln_protocol::slot::Refusal),
}

impl DiskError {
    /// Every word that [`Self::kind`] gives.
    #[cfg(test)]
    pub const KINDS: &'static [&'static str] = &[
        "disk-none",
        "disk-too-small",
        "disk-foreign",
        "disk-unsupported-sector-size",
        "disk-io-error",
        "disk-left-out",
        "disk-loader-not-told",
        "disk-slot-too-small",
        "disk-read-back",
        "disk-no-data",
        "disk-data-other-key",
        "slot-refused",
    ];

    /// The stable word of `Failure::kind`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::NoDisk | Self::Gone { .. } => "disk-none",
            Self::TooSmall { .. } => "disk-too-small",
            Self::Foreign { .. } => "disk-foreign",
            Self::SectorSize { .. } => "disk-unsupported-sector-size",
            Self::Io { .. } | Self::Late { .. } => "disk-io-error",
            Self::LeftOut { .. } => "disk-left-out",
            Self::NotTold { .. } => "disk-loader-not-told",
            Self::SlotTooSmall { .. } => "disk-slot-too-small",
            Self::ReadBack { .. } => "disk-read-back",
            Self::NoData { .. } => "disk-no-data",
            Self::DataOfAnother { .. } => "disk-data-other-key",
            Self::Refused(_) => "slot-refused",
        }
    }

    /// This one, unless none was found so far but "no disk".
    fn or(self, other: Self) -> Self {
        if self == Self::NoDisk { other } else { self }
    }
}
