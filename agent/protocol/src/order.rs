//! What an operator alone can order: a release of a class that is not `normal`, or the wipe of disks. And the receipt
//! of a wipe, which the machine signs.
//!
//! Both travel in TUF's `{signed, signatures}` envelope over canonical JSON, like an assignment. An order is signed with
//! operator keys, which no boot server holds; it is carried to the server as a file, handed to the machine in a reply,
//! and checked by the machine. What is here is the signed part, and the checks that a signature cannot make.

use crate::SPEC_VERSION;
use crate::ids::{Class, ImageName, KeyId, MachineId, OrderId, ReleaseId, word_enum};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

use crate::ids::IdError;

/// `_type` of an order.
pub const ORDER_TYPE: &str = "kiln-order";
/// `_type` of a receipt.
pub const RECEIPT_TYPE: &str = "kiln-receipt";
/// Where a receipt is posted.
pub const RECEIPT_PATH: &str = "/agent/v1/receipt";
/// Most machines that one order names.
pub const ORDER_MACHINES: usize = 256;
/// Most disks that a wipe names, and that a receipt lists.
pub const ORDER_DISKS: usize = 256;

/// A machine that an order is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OrderedMachine {
    /// SMBIOS UUID.
    pub id: MachineId,
    /// Key id of its identity key. None: for a machine that has a new key at each boot; no other takes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<KeyId>,
}

word_enum! {
    /// How thoroughly disks are wiped. Either way every byte is read back at the end.
    WipeMethod {
        /// By what the disk itself offers (sanitise, format, secure discard, discard); what then still reads as
        /// anything but zeros or ones is written over.
        Best = "best",
        /// Written over with zeros in any case, after what the disk offers.
        Overwrite = "overwrite",
    }
}

/// What is ordered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "action", rename_all = "lowercase")]
pub enum OrderAction {
    /// Run this release, which is of this class.
    Assign {
        /// Which image.
        image: ImageName,
        /// Which release of it.
        release: u64,
        /// Its signed class.
        class: Class,
    },
    /// Wipe disks.
    Wipe {
        /// Serial numbers; empty: every disk that is not removable.
        disks: Vec<String>,
        /// How.
        method: WipeMethod,
    },
}

impl fmt::Display for OrderAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Assign { image, release, class } => write!(f, "run {image}/{release} of class {class}"),
            Self::Wipe { disks, .. } if disks.is_empty() => f.write_str("wipe all disks"),
            Self::Wipe { disks, .. } => write!(f, "wipe {}", disks.join(", ")),
        }
    }
}

/// An operator's order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// [`ORDER_TYPE`].
    #[serde(rename = "_type")]
    pub type_: String,
    /// [`SPEC_VERSION`].
    pub spec_version: String,
    /// Made at random for this order: each machine does it once.
    pub id: OrderId,
    /// For whom; at most [`ORDER_MACHINES`].
    pub machines: Vec<OrderedMachine>,
    /// What.
    #[serde(flatten)]
    pub action: OrderAction,
    /// When it was signed.
    pub issued: Timestamp,
    /// From then on it is not begun.
    pub expires: Timestamp,
}

impl Order {
    /// The release it assigns, if it assigns one.
    pub fn release(&self) -> Option<ReleaseId> {
        match &self.action {
            OrderAction::Assign { image, release, .. } => Some(ReleaseId { image: image.clone(), release: *release }),
            OrderAction::Wipe { .. } => None,
        }
    }

    /// It lets a machine run this release of this class.
    pub fn allows(&self, release: &ReleaseId, class: &str) -> bool {
        match &self.action {
            OrderAction::Assign { image, release: number, class: ordered } => {
                *image == release.image && *number == release.release && ordered.as_str() == class
            }
            OrderAction::Wipe { .. } => false,
        }
    }
}

/// What a machine remembers of an order it took. Written as an array, because a TPM's memory is small; serde reads an object of an
/// earlier agent's as well, and an earlier agent the array.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "(u64, Timestamp)")]
pub struct OrderMark {
    /// Sequence of the assignment it was taken under: with this one it may be taken again, after a restart. 0: it is
    /// done.
    pub sequence: u64,
    /// When it expires: no longer need it be remembered.
    pub expires: Timestamp,
}

impl From<OrderMark> for (u64, Timestamp) {
    fn from(mark: OrderMark) -> Self {
        (mark.sequence, mark.expires)
    }
}

/// The machine that checks an order.
#[derive(Debug, Clone, Copy)]
pub struct Ordered<'a> {
    /// Its own key id.
    pub key: &'a KeyId,
    /// Its SMBIOS UUID, if it makes a new key at each boot: it then answers to that name.
    pub name_only: Option<&'a MachineId>,
    /// The newest time it believes.
    pub now: Timestamp,
    /// What it remembers of this order.
    pub mark: Option<OrderMark>,
    /// Sequence of the assignment that came with it; 0: none came.
    pub sequence: u64,
}

/// Why a validly signed order is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum OrderError {
    #[error("not an order: _type {got_type:?}, spec_version {got_version:?}; this agent reads {SPEC_VERSION}")]
    WrongType { got_type: String, got_version: String },
    #[error("order {order} names other machines, not this one with key {key}")]
    WrongMachine { order: OrderId, key: KeyId },
    #[error("order {order} expired at {expires}: have an operator sign another")]
    Expired { order: OrderId, expires: Timestamp },
    #[error("order {order} was done by this machine before: it is replayed")]
    Replayed { order: OrderId },
    #[error("{release} is of class {class}: it needs an order that an operator signed, and none for it came")]
    Missing { release: String, class: String },
    #[error("this machine remembers {limit} orders that have not expired: it takes another when one of them has")]
    MemoryFull { limit: usize },
}

impl OrderError {
    /// Every word that [`Self::kind`] can give.
    pub const KINDS: &'static [&'static str] = &[
        "order-wrong-type",
        "order-wrong-machine",
        "order-expired",
        "order-replayed",
        "order-missing",
        "order-memory-full",
    ];

    /// The stable kebab-case word of [`crate::Failure::kind`]; each begins with `order-`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::WrongType { .. } => "order-wrong-type",
            Self::WrongMachine { .. } => "order-wrong-machine",
            Self::Expired { .. } => "order-expired",
            Self::Replayed { .. } => "order-replayed",
            Self::Missing { .. } => "order-missing",
            Self::MemoryFull { .. } => "order-memory-full",
        }
    }
}

/// Checks what a signature cannot: that the order is for this machine, in force, and not done before.
pub fn check_order(order: &Order, me: &Ordered<'_>) -> Result<(), OrderError> {
    if order.type_ != ORDER_TYPE || order.spec_version != SPEC_VERSION {
        let (got_type, got_version) = (order.type_.clone(), order.spec_version.clone());
        return Err(OrderError::WrongType { got_type, got_version });
    }
    let mine = |machine: &OrderedMachine| match &machine.key {
        Some(key) => key == me.key,
        None => me.name_only == Some(&machine.id),
    };
    if !order.machines.iter().take(ORDER_MACHINES).any(mine) {
        return Err(OrderError::WrongMachine { order: order.id.clone(), key: me.key.clone() });
    }
    if order.expires <= me.now {
        return Err(OrderError::Expired { order: order.id.clone(), expires: order.expires });
    }
    match me.mark {
        Some(mark) if mark.sequence == 0 || mark.sequence != me.sequence => {
            Err(OrderError::Replayed { order: order.id.clone() })
        }
        Some(_) | None => Ok(()),
    }
}

word_enum! {
    /// What became of one disk.
    WipeOutcome {
        /// Every byte of it reads as zeros, or every byte as ones.
        Wiped = "wiped",
        /// It may still hold what it held.
        Failed = "failed",
        /// It was not to be wiped.
        Skipped = "skipped",
    }
}

/// One disk in a receipt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WipedDisk {
    /// The kernel's name for it: `nvme0n1`, `sda`.
    pub name: String,
    /// Model; empty if it has none.
    pub model: String,
    /// Serial number; empty if it has none.
    pub serial: String,
    /// Its size.
    pub bytes: u64,
    /// What was done, in order: `nvme-sanitize-block`, `nvme-format`, `secure-discard`, `discard`, `overwrite`.
    pub methods: Vec<String>,
    /// What became of it.
    pub outcome: WipeOutcome,
    /// How that was verified, or why it failed or was left out, in a sentence.
    pub detail: String,
}

/// What a machine says of a wipe, signed with its identity key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receipt {
    /// [`RECEIPT_TYPE`].
    #[serde(rename = "_type")]
    pub type_: String,
    /// [`SPEC_VERSION`].
    pub spec_version: String,
    /// SMBIOS UUID.
    pub machine: MachineId,
    /// Key id of its identity key.
    pub key: KeyId,
    /// The 32 bytes of its public key, hex: whoever has this file alone can check the signature and the key id.
    pub public_key: String,
    /// The order.
    pub order: OrderId,
    /// Every disk that the machine has.
    pub disks: Vec<WipedDisk>,
    /// The newest time that the machine believed when the wipe ended.
    pub finished: Timestamp,
    /// How long the wipe took.
    pub seconds: u64,
}

impl Receipt {
    /// No disk failed, and at least one was wiped.
    pub fn is_complete(&self) -> bool {
        self.disks.iter().all(|disk| disk.outcome != WipeOutcome::Failed)
            && self.disks.iter().any(|disk| disk.outcome == WipeOutcome::Wiped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u8) -> MachineId {
        format!("00000000-0000-0000-0000-0000000000{n:02x}").parse().unwrap()
    }

    fn key(n: u8) -> KeyId {
        format!("{n:02x}").repeat(32).parse().unwrap()
    }

    fn order(action: OrderAction) -> Order {
        Order {
            type_: ORDER_TYPE.into(),
            spec_version: SPEC_VERSION.into(),
            id: "0123456789abcdef0123456789abcdef".parse().unwrap(),
            machines: vec![OrderedMachine { id: id(1), key: Some(key(0xaa)) }, OrderedMachine { id: id(2), key: None }],
            action,
            issued: "2026-01-01T00:00:00Z".parse().unwrap(),
            expires: "2026-01-02T00:00:00Z".parse().unwrap(),
        }
    }

    fn rescue() -> Order {
        order(OrderAction::Assign { image: "rescue".parse().unwrap(), release: 3, class: Class::Rescue })
    }

    #[test]
    fn golden_bytes() {
        let machines = r#""machines":[{"id":"00000000-0000-0000-0000-000000000001","key":"KEY"},{"id":"00000000-0000-0000-0000-000000000002"}]"#;
        let machines = machines.replace("KEY", &"aa".repeat(32));
        let golden = |action: &str| {
            format!(
                r#"{{"_type":"kiln-order","spec_version":"1.0","id":"0123456789abcdef0123456789abcdef",{machines},{action},"issued":"2026-01-01T00:00:00Z","expires":"2026-01-02T00:00:00Z"}}"#
            )
        };
        let wipe = order(OrderAction::Wipe { disks: vec!["S1".into()], method: WipeMethod::Best });
        for (order, action) in [
            (rescue(), r#""action":"assign","image":"rescue","release":3,"class":"rescue""#),
            (wipe, r#""action":"wipe","disks":["S1"],"method":"best""#),
        ] {
            assert_eq!(serde_json::to_string(&order).unwrap(), golden(action));
            assert_eq!(serde_json::from_str::<Order>(&golden(action)).unwrap(), order);
            let newer = golden(action).replacen('{', r#"{"added_later":1,"#, 1);
            assert_eq!(serde_json::from_str::<Order>(&newer).unwrap(), order, "unknown fields are ignored");
        }
        let unknown = golden(r#""action":"explode""#);
        assert!(serde_json::from_str::<Order>(&unknown).is_err(), "an action that is not known is none");
    }

    #[test]
    fn each_wrong_order_has_its_own_error() {
        let (mine, other, name) = (key(0xaa), key(0xbb), id(2));
        let now = "2026-01-01T12:00:00Z".parse().unwrap();
        let me = Ordered { key: &mine, name_only: None, now, mark: None, sequence: 7 };
        let kind = |order: &Order, me: &Ordered<'_>| check_order(order, me).map_err(|e| e.kind());
        assert_eq!(kind(&rescue(), &me), Ok(()));
        assert_eq!(kind(&rescue(), &Ordered { key: &other, ..me }), Err("order-wrong-machine"));
        let name_only = Ordered { key: &other, name_only: Some(&name), ..me };
        assert_eq!(kind(&rescue(), &name_only), Ok(()), "a machine whose key is new at each boot answers to its name");
        let first = id(1);
        let taken = Ordered { key: &other, name_only: Some(&first), ..me };
        assert_eq!(kind(&rescue(), &taken), Err("order-wrong-machine"), "where a key is named, a name is not enough");
        let late = "2026-01-02T00:00:00Z".parse().unwrap();
        assert_eq!(kind(&rescue(), &Ordered { now: late, ..me }), Err("order-expired"));
        let mark = |sequence| Some(OrderMark { sequence, expires: late });
        assert_eq!(kind(&rescue(), &Ordered { mark: mark(7), ..me }), Ok(()), "a restart under the same assignment");
        assert_eq!(kind(&rescue(), &Ordered { mark: mark(6), ..me }), Err("order-replayed"));
        assert_eq!(kind(&rescue(), &Ordered { mark: mark(0), ..me }), Err("order-replayed"));
        assert_eq!(kind(&rescue(), &Ordered { mark: mark(0), sequence: 0, ..me }), Err("order-replayed"));
        assert_eq!(kind(&Order { type_: "kiln-assignment".into(), ..rescue() }, &me), Err("order-wrong-type"));
        assert_eq!(kind(&Order { spec_version: "2.0".into(), ..rescue() }, &me), Err("order-wrong-type"));
        let all = [
            OrderError::Missing { release: String::new(), class: String::new() }.kind(),
            OrderError::MemoryFull { limit: 1 }.kind(),
            "order-wrong-machine",
            "order-expired",
            "order-replayed",
            "order-wrong-type",
        ];
        assert!(all.iter().all(|kind| OrderError::KINDS.contains(kind)) && all.len() == OrderError::KINDS.len());
    }

    #[test]
    fn an_order_allows_what_it_names_and_nothing_else() {
        let release: ReleaseId = "rescue/3".parse().unwrap();
        assert!(rescue().allows(&release, "rescue"));
        assert!(!rescue().allows(&release, "wipe"), "the class is part of the order");
        assert!(!rescue().allows(&"rescue/4".parse().unwrap(), "rescue"));
        assert!(!rescue().allows(&"minimal/3".parse().unwrap(), "rescue"));
        assert!(!order(OrderAction::Wipe { disks: vec![], method: WipeMethod::Best }).allows(&release, "rescue"));
    }

    #[test]
    fn a_receipt_with_a_failed_disk_or_with_none_is_not_complete() {
        let disk = |outcome| WipedDisk {
            name: "sda".into(),
            model: "M".into(),
            serial: "S".into(),
            bytes: 512,
            methods: vec!["overwrite".into()],
            outcome,
            detail: "d".into(),
        };
        let receipt = |outcomes: &[WipeOutcome]| Receipt {
            type_: RECEIPT_TYPE.into(),
            spec_version: SPEC_VERSION.into(),
            machine: id(1),
            key: key(1),
            public_key: "00".repeat(32),
            order: "0123456789abcdef0123456789abcdef".parse().unwrap(),
            disks: outcomes.iter().map(|outcome| disk(*outcome)).collect(),
            finished: "2026-01-01T00:00:00Z".parse().unwrap(),
            seconds: 9,
        };
        assert!(receipt(&[WipeOutcome::Wiped, WipeOutcome::Skipped]).is_complete());
        assert!(!receipt(&[WipeOutcome::Wiped, WipeOutcome::Failed]).is_complete());
        assert!(!receipt(&[WipeOutcome::Skipped]).is_complete() && !receipt(&[]).is_complete());
        let golden = r#"{"_type":"kiln-receipt","spec_version":"1.0","machine":"00000000-0000-0000-0000-000000000001","key":"K1","public_key":"P0","order":"0123456789abcdef0123456789abcdef","disks":[{"name":"sda","model":"M","serial":"S","bytes":512,"methods":["overwrite"],"outcome":"wiped","detail":"d"}],"finished":"2026-01-01T00:00:00Z","seconds":9}"#;
        let golden = golden.replace("K1", &"01".repeat(32)).replace("P0", &"00".repeat(32));
        assert_eq!(serde_json::to_string(&receipt(&[WipeOutcome::Wiped])).unwrap(), golden);
    }
}
