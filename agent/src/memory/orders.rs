//! Operators' orders: none is done twice.

use super::Memory;
use jiff::Timestamp;
use kiln_protocol::{Order, OrderError, OrderMark};

/// Orders remembered until they expire: as many as a TPM's memory holds beside all else, each at its longest.
pub(super) const ORDERS: usize = 4;

/// The same time or up to a second later, in fewer letters.
fn whole(at: Timestamp) -> Timestamp {
    let second = at.as_second();
    let up = second.saturating_add(i64::from(at.subsec_nanosecond() > 0));
    Timestamp::from_second(up).or_else(|_| Timestamp::from_second(second)).unwrap_or(at)
}

impl Memory {
    /// What is remembered of this order. One that is not known and may have been forgotten counts as done.
    pub fn mark(&self, order: &Order) -> Option<OrderMark> {
        let forgotten = self.orders_until.is_some_and(|until| order.expires <= until);
        let done = forgotten.then_some(OrderMark { sequence: 0, expires: order.expires });
        self.orders.get(order.id.as_str()).copied().or(done)
    }

    /// Remembers that an order was taken under the assignment of this sequence; with 0 that it is done. One that cannot
    /// be remembered is not taken: it could be replayed. What is forgotten because it has expired by `now` has expired for good: an
    /// earlier time is not believed after a restart either, whatever the director says by then.
    pub fn take_order(&mut self, order: &Order, sequence: u64, now: Timestamp) -> Result<(), OrderError> {
        let is_kept = |id: &String, mark: &OrderMark| mark.expires > now || id == order.id.as_str();
        let gone = self.orders.iter().filter(|(id, mark)| !is_kept(id, mark)).map(|(_, mark)| mark.expires).max();
        if gone.is_some() {
            self.orders.retain(|id, mark| is_kept(id, mark));
            self.orders_until = self.orders_until.max(gone);
            self.time_floor = self.time_floor.max(Some(now));
        }
        if self.orders.len() >= ORDERS && !self.orders.contains_key(order.id.as_str()) {
            return Err(OrderError::MemoryFull { limit: ORDERS });
        }
        self.orders.insert(order.id.to_string(), OrderMark { sequence, expires: whole(order.expires) });
        Ok(())
    }
}
