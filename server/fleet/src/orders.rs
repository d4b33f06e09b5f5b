//! An operator's orders to one machine: what was handed to it, and what came of each. The signature is the machine's to
//! check; here is only what the server does about it.

use crate::Millis;
use crate::event::Action;
use crate::machine::{Assigned, Machine};
use crate::state::StateKind;
use crate::step::{save, wake};
use kiln_protocol::{Class, OrderId, ReleaseId, StageRecord, StageState, Via};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Orders remembered for each machine; all are in the list of orders.
pub const ORDERS_KEPT: usize = 8;

/// What an order is to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Errand {
    /// Run this release, of this class, and go there so.
    Run {
        /// Which.
        release: ReleaseId,
        /// Its class.
        class: Class,
        /// How to get there.
        via: Via,
    },
    /// Wipe disks.
    Wipe,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum OrderState {
    /// It is handed to the machine with each reply.
    Open,
    /// The machine refuses it, with these words. It is not handed on any more: a machine that refuses starts nothing.
    Refused {
        /// The typed reason, and a sentence.
        reason: String,
    },
    /// The release runs; or the disks are wiped, every one.
    Done,
    /// Disks were wiped, but not all.
    Failed {
        /// Which.
        reason: String,
    },
    /// Its time is over; nothing came of it, or the machine was sent home.
    Expired,
    /// Another assignment or order came before it was done, or after.
    Superseded,
}

impl fmt::Display for OrderState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Open => f.write_str("open"),
            Self::Refused { reason } => write!(f, "refused: {reason}"),
            Self::Done => f.write_str("done"),
            Self::Failed { reason } => write!(f, "failed: {reason}"),
            Self::Expired => f.write_str("expired"),
            Self::Superseded => f.write_str("superseded"),
        }
    }
}

/// An order that this machine was given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineOrder {
    /// Which.
    pub id: OrderId,
    /// What it is to do.
    pub errand: Errand,
    /// When it expires.
    pub expires: Millis,
    /// What came of it.
    #[serde(flatten)]
    pub state: OrderState,
}

impl MachineOrder {
    /// It may still be handed to the machine.
    pub fn is_open(&self) -> bool {
        match self.state {
            OrderState::Open => true,
            // A release that an order started needs it again at each start.
            OrderState::Done => matches!(self.errand, Errand::Run { .. }),
            OrderState::Refused { .. } | OrderState::Failed { .. } | OrderState::Expired | OrderState::Superseded => {
                false
            }
        }
    }
}

impl Machine {
    /// The order that goes with the next reply.
    pub fn open_order(&self) -> Option<&MachineOrder> {
        let newest = self.orders.back().filter(|order| order.is_open())?;
        match &newest.errand {
            Errand::Wipe => Some(newest),
            Errand::Run { .. } => self.follows(&newest.id).then_some(newest),
        }
    }

    /// What it shall run rests on this order.
    fn follows(&self, id: &OrderId) -> bool {
        self.assigned.as_ref().is_some_and(|a| a.order.as_ref() == Some(id))
    }

    pub(crate) fn ordered(&mut self, order: MachineOrder, now: Millis, out: &mut Vec<Action>) {
        if self.orders.iter().any(|known| known.id == order.id) {
            return; // submitted again
        }
        if let Errand::Run { release, class, via } = &order.errand {
            // An ordinary release needs no order at the machine: it stays assigned as any other.
            let by = (*class != Class::Normal).then(|| order.id.clone());
            let home = self.assigned.as_ref().filter(|a| a.order.is_none()).map(|a| a.release.clone());
            let ran = self.running.as_ref().is_some_and(|r| r.image == release.image && r.release == release.release);
            if !self.assign_by(release.clone(), *via, by, now, out) {
                return;
            }
            self.acceptance_ordered(home, *class, ran);
        }
        self.supersede_orders();
        self.orders.push_back(order);
        while self.orders.len() > ORDERS_KEPT {
            self.orders.pop_front();
        }
        wake(out);
        save(out);
    }

    /// What was ordered before is not handed on any more.
    pub(crate) fn supersede_orders(&mut self) {
        for order in self.orders.iter_mut().filter(|order| order.is_open()) {
            order.state = OrderState::Superseded;
        }
    }

    /// What the agent says of the order in its stages. Whether that is new.
    pub(crate) fn note_order(&mut self, stages: &[StageRecord], now: Millis, out: &mut Vec<Action>) -> bool {
        let ordered_runs = match self.orders.back().map(|order| &order.errand) {
            Some(Errand::Run { release, .. }) => {
                self.running.as_ref().is_some_and(|r| r.image == release.image && r.release == release.release)
            }
            Some(Errand::Wipe) | None => false,
        };
        let refused = stages.iter().rev().find_map(|record| match &record.state {
            StageState::Failed(f) if f.kind.starts_with("order-") => {
                Some(crate::boots::cut(&format!("{}: {}", f.kind, f.message)))
            }
            StageState::Failed(_) | StageState::Started | StageState::Done | StageState::Waiting { .. } => None,
        });
        let Some(order) = self.orders.back_mut().filter(|order| order.is_open()) else { return false };
        let (state, id) = match refused {
            Some(reason) => (OrderState::Refused { reason }, Some(order.id.clone())),
            None if ordered_runs => (OrderState::Done, None),
            None => return false,
        };
        let new = order.state != state;
        order.state = state;
        if let Some(id) = id {
            out.push(Action::Say { warn: true, text: format!("order {id} is refused by the machine") });
            wake(out);
            self.go_home(&id, "is refused", now, out);
        }
        new
    }

    /// What an order started is given up.
    pub(crate) fn order_failed(&mut self, reason: &str) {
        if let Some(order) = self.orders.back_mut().filter(|order| order.is_open()) {
            order.state = OrderState::Failed { reason: crate::boots::cut(reason) };
        }
    }

    /// A wipe's receipt came, verified. `failed`: the disks that were not wiped.
    pub(crate) fn wiped(&mut self, id: &OrderId, failed: &[String], out: &mut Vec<Action>) {
        let Some(order) = self.orders.iter_mut().find(|order| order.id == *id) else { return };
        (order.state, self.last_words) = if failed.is_empty() {
            (OrderState::Done, format!("disks wiped by order {id}"))
        } else {
            let reason = crate::boots::cut(&format!("not wiped: {}", failed.join(", ")));
            (OrderState::Failed { reason: reason.clone() }, reason)
        };
        let warn = !failed.is_empty();
        out.push(Action::Say { warn, text: self.last_words.clone() });
        wake(out);
        save(out);
    }

    /// Orders whose time is over. A machine that runs a release by one of them is sent home.
    pub(crate) fn expire_orders(&mut self, now: Millis, out: &mut Vec<Action>) {
        let Some(order) = self.orders.back_mut().filter(|order| order.is_open() && order.expires <= now) else {
            return;
        };
        order.state = OrderState::Expired;
        let id = order.id.clone();
        save(out);
        wake(out);
        self.go_home(&id, "has expired", now, out);
    }

    /// What ran by this order runs no more.
    fn go_home(&mut self, id: &OrderId, why: &str, now: Millis, out: &mut Vec<Action>) {
        if !self.follows(id) {
            return;
        }
        let title = self.title().to_owned();
        if let Some(release) = self.last_good().cloned() {
            let text = format!("order {id} {why}: it goes home to {release}");
            out.push(Action::Say { warn: true, text });
            self.assign_by(release, Via::Cold, None, now, out);
        } else {
            self.last_words =
                format!("order {id} {why}, and no earlier good release is known: run `kiln assign {title} NAME/N`");
            out.push(Action::Say { warn: true, text: self.last_words.clone() });
        }
    }

    /// When the next of them is over.
    pub(crate) fn order_due(&self) -> Option<Millis> {
        self.orders.back().filter(|order| order.is_open()).map(|order| order.expires)
    }

    /// Why an order cannot be given to this machine, if it cannot.
    pub fn check_order(&self, errand: &Errand) -> Result<(), crate::Refusal> {
        match errand {
            Errand::Run { release, .. } => self.check_assign(release),
            // Wiping is for machines that go as well as for those that came.
            Errand::Wipe => match self.state.kind {
                StateKind::Quarantined => Err(crate::Refusal::Held {
                    machine: self.title().to_owned(),
                    state: self.state.kind,
                    reason: self.state.reason.clone(),
                }),
                StateKind::Discovered
                | StateKind::Approved
                | StateKind::Booting
                | StateKind::Healthy
                | StateKind::Degraded
                | StateKind::Unreachable
                | StateKind::Draining
                | StateKind::Reimaging
                | StateKind::FellBack
                | StateKind::Retired => Ok(()),
            },
        }
    }

    /// This release is of a class that only an order starts, also while the machine is sent home from it: nothing to fall
    /// back to.
    pub(crate) fn came_by_order(&self, id: &ReleaseId) -> bool {
        let class = |order: &MachineOrder| match &order.errand {
            Errand::Run { release, class, .. } => (release == id).then_some(*class),
            Errand::Wipe => None,
        };
        self.orders.iter().rev().find_map(class).is_some_and(|class| class != Class::Normal)
    }

    /// A release that an operator ordered is no release to come back to.
    pub(crate) fn runs_by_order(&self) -> bool {
        self.runs_assigned() && self.assigned.as_ref().is_some_and(|a: &Assigned| a.order.is_some())
    }
}
