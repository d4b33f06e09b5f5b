//! Orders that operators signed: checked as a machine would check them, kept, handed on, and what came of them. The list
//! is append-only; every order, and every receipt, is in the audit log.

use super::{Control, Inner, Pending, now_ms};
use crate::error::ControlError;
use crate::receipt;
use crate::view::{OrderView, OrderedView, ReceiptView};
use jiff::Timestamp;
use kiln_fleet::{Errand, Event, MachineOrder, Millis, OrderState};
use kiln_protocol::{
    KeyId, MachineId, ORDER_TYPE, Order, OrderAction, OrderId, Ordered, OrderedMachine, Via, check_order,
};
use kiln_release::Site;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Orders that may be in force at once.
const MAX_OPEN: usize = 1_000;
/// Orders and receipts that are shown.
const SHOWN: usize = 500;

/// An order as it was submitted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Submitted {
    /// The envelope, byte for byte.
    pub text: String,
    /// When it came.
    pub at: Millis,
    /// Who brought it.
    pub by: String,
    /// How to go to the release that it assigns.
    pub via: Via,
    /// Its document, read from the envelope when it was verified.
    pub order: Order,
}

/// A receipt as it came.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Kept {
    at: Millis,
    text: String,
}

fn order_note(id: &OrderId) -> String {
    format!("order/{id}")
}

fn receipt_notes(machine: &MachineId) -> String {
    format!("receipt/{machine}/")
}

/// The texts of orders in force.
pub(super) type Texts = BTreeMap<OrderId, String>;

impl Control {
    /// What is in force of what the store keeps.
    pub(super) async fn load_orders(store: &crate::store::Store, now: Millis) -> Result<Texts, ControlError> {
        let mut texts = Texts::new();
        for note in store.notes("order/").await? {
            match serde_json::from_str::<Submitted>(&note) {
                Ok(it) if expires(&it.order) > now => drop(texts.insert(it.order.id, it.text)),
                Ok(_) => {}
                Err(error) => tracing::warn!(%error, "an order in the store cannot be read"),
            }
        }
        Ok(texts)
    }

    /// Takes an order in, if it is one that its machines would take.
    pub async fn submit(&self, text: &str, via: Via, by: &str) -> Result<OrderView, ControlError> {
        self.look_again().await;
        let catalog = self.catalog();
        let order = read(&catalog.site, text.as_bytes())?;
        let errand = self.errand(&order, via)?;
        let at = now_ms();
        let submitted = Submitted { text: text.to_owned(), at, by: by.to_owned(), via, order: order.clone() };
        let pending = {
            let mut inner = self.lock();
            inner.order_texts.retain(|_, text| read(&catalog.site, text.as_bytes()).is_ok_and(|o| expires(&o) > at));
            if inner.order_texts.contains_key(&order.id) {
                return Err(ControlError::OrderKnown { order: order.id });
            }
            if inner.order_texts.len() >= MAX_OPEN {
                return Err(ControlError::TooManyOrders { limit: MAX_OPEN });
            }
            let mut ids = Vec::new();
            for machine in &order.machines {
                ids.push(self.check_machine(&inner, machine, &order, &errand)?);
            }
            let note = serde_json::to_string(&submitted).map_err(crate::error::StoreError::from)?;
            let mut pending = Pending::default();
            pending.commits.push(self.store.remember(order_note(&order.id), note));
            inner.order_texts.insert(order.id.clone(), text.to_owned());
            for id in &ids {
                let given = MachineOrder {
                    id: order.id.clone(),
                    errand: errand.clone(),
                    expires: expires(&order),
                    state: OrderState::Open,
                };
                self.step(&mut inner, id, Event::Ordered(given), at, &mut pending)?;
                if let Some(m) = inner.machines.get(id) {
                    let what = format!("order {}: {}, until {}", order.id, order.action, order.expires);
                    self.audit(&mut pending, m, by, what);
                }
            }
            pending
        };
        if let Err(error) = self.finish(pending).await {
            // Its machines were not told: it can be submitted again.
            self.lock().order_texts.remove(&order.id);
            let _ = self.store.erase(order_note(&order.id)).wait().await;
            return Err(error);
        }
        Ok(self.order_view(&submitted))
    }

    /// Every order that was submitted, the newest first.
    pub async fn orders(&self) -> Result<Vec<OrderView>, ControlError> {
        let notes = self.store.notes("order/").await?;
        let mut all: Vec<Submitted> = notes.iter().filter_map(|note| serde_json::from_str(note).ok()).collect();
        all.sort_by_key(|order| std::cmp::Reverse(order.at));
        all.truncate(SHOWN);
        Ok(all.iter().map(|submitted| self.order_view(submitted)).collect())
    }

    fn order_view(&self, submitted: &Submitted) -> OrderView {
        let inner = self.look();
        let order = &submitted.order;
        let machines = order.machines.iter().map(|machine| {
            let known = inner.machines.get(&machine.id);
            let state = known.and_then(|m| m.orders.iter().find(|o| o.id == order.id)).map(|o| o.state.to_string());
            OrderedView {
                id: machine.id.clone(),
                name: known.map_or_else(|| machine.id.to_string(), |m| m.title().to_owned()),
                state: state.unwrap_or_else(|| "no longer remembered".to_owned()),
            }
        });
        OrderView {
            id: order.id.clone(),
            action: order.action.to_string(),
            submitted_ms: i64::try_from(submitted.at).unwrap_or(i64::MAX),
            by: submitted.by.clone(),
            issued: order.issued,
            expires: order.expires,
            machines: machines.collect(),
        }
    }

    /// What it is to do, if what it names is published as it says.
    fn errand(&self, order: &Order, via: Via) -> Result<Errand, ControlError> {
        let OrderAction::Assign { class, .. } = &order.action else { return Ok(Errand::Wipe) };
        let Some(release) = order.release() else { return Ok(Errand::Wipe) };
        let catalog = self.catalog();
        let published =
            catalog.releases.get(&release).ok_or_else(|| ControlError::NoSuchRelease { release: release.clone() })?;
        if published.manifest.class != class.as_str() {
            let (ordered, is) = (class.to_string(), published.manifest.class.clone());
            return Err(ControlError::OrderClass { release, ordered, is });
        }
        let floor = catalog.site.floor(release.image.as_str());
        if release.release < floor {
            return Err(ControlError::BelowFloor { release, floor });
        }
        Ok(Errand::Run { release, class: *class, via })
    }

    fn check_machine(
        &self,
        inner: &Inner,
        ordered: &OrderedMachine,
        order: &Order,
        errand: &Errand,
    ) -> Result<MachineId, ControlError> {
        let unknown = || ControlError::NoSuchMachine(ordered.id.to_string());
        let machine = inner.machines.get(&ordered.id).ok_or_else(unknown)?;
        let key = machine.key.as_ref().ok_or_else(unknown)?;
        // As the machine will: an order that it would refuse is not taken to it.
        let storage = machine.facts.as_ref().map(|f| f.key_storage);
        let name_only = (storage == Some(kiln_protocol::KeyStorage::Ephemeral)).then_some(&ordered.id);
        let only = Order { machines: vec![ordered.clone()], ..order.clone() };
        check_order(&only, &Ordered { key, name_only, now: Timestamp::now(), mark: None, sequence: 0 })?;
        machine.check_order(errand)?;
        if let Errand::Run { release, .. } = errand {
            self.check_fits(inner, &ordered.id, release)?;
        }
        Ok(ordered.id.clone())
    }

    /// The order's text that goes with a reply to this key, if there is one.
    pub(super) fn order_for(inner: &Inner, id: &MachineId, key: &KeyId) -> Option<String> {
        let machine = inner.machines.get(id)?;
        let order = machine.open_order().filter(|_| machine.key.as_ref() == Some(key))?;
        inner.order_texts.get(&order.id).cloned()
    }

    /// A machine's receipt, over TLS by this key.
    pub async fn receive(&self, key: &KeyId, text: &str) -> Result<(), ControlError> {
        let receipt = receipt::verify(text.as_bytes())?;
        if receipt.key != *key {
            return Err(ControlError::ReceiptOfAnother { machine: receipt.machine.to_string() });
        }
        let pending = {
            let mut inner = self.lock();
            let known = inner.machines.get(&receipt.machine).filter(|m| m.key.as_ref() == Some(key));
            let order = known.and_then(|m| m.orders.iter().find(|order| order.id == receipt.order));
            if order.is_none_or(|order| order.errand != Errand::Wipe) {
                let (machine, order) = (receipt.machine.to_string(), receipt.order);
                return Err(ControlError::ReceiptWithoutOrder { machine, order });
            }
            let at = now_ms();
            let kept = serde_json::to_string(&Kept { at, text: text.to_owned() });
            let kept = kept.map_err(crate::error::StoreError::from)?;
            let failed = receipt::failed(&receipt);
            let mut pending = Pending::default();
            let name = format!("{}{}", receipt_notes(&receipt.machine), receipt.order);
            pending.commits.push(self.store.remember(name, kept));
            let event = Event::Wiped { order: receipt.order.clone(), failed: failed.clone() };
            self.step(&mut inner, &receipt.machine, event, at, &mut pending)?;
            if let Some(m) = inner.machines.get(&receipt.machine) {
                let wiped = receipt.disks.iter().filter(|d| d.outcome == kiln_protocol::WipeOutcome::Wiped).count();
                let what = format!("receipt of order {}: {wiped} disks wiped, {} not", receipt.order, failed.len());
                self.audit(&mut pending, m, "the machine", what);
            }
            pending
        };
        self.finish(pending).await
    }

    /// A machine's receipts, the newest first.
    pub async fn receipts(&self, machine: &str) -> Result<Vec<ReceiptView>, ControlError> {
        let id = self.look().resolve(machine)?;
        let notes = self.store.notes(&receipt_notes(&id)).await?;
        let mut all: Vec<Kept> = notes.iter().filter_map(|note| serde_json::from_str(note).ok()).collect();
        all.sort_by_key(|kept| std::cmp::Reverse(kept.at));
        all.truncate(SHOWN);
        let view = |kept: Kept| {
            let receipt = receipt::verify(kept.text.as_bytes())?;
            let received_ms = i64::try_from(kept.at).unwrap_or(i64::MAX);
            Ok(ReceiptView { received_ms, complete: receipt.is_complete(), receipt, text: kept.text })
        };
        all.into_iter().map(view).collect()
    }
}

fn expires(order: &Order) -> Millis {
    u64::try_from(order.expires.as_millisecond()).unwrap_or(0)
}

fn read(site: &Site, text: &[u8]) -> Result<Order, ControlError> {
    Ok(site.verify_operator::<Order>(text, ORDER_TYPE)?.0)
}
