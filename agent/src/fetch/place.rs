//! A download's place on a disk: what comes is gathered, and written in turns that somebody else makes.

use crate::error::Result;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Bytes on their way to a disk.
pub type Storing = Pin<Box<dyn Future<Output = Result<()>>>>;
/// Puts bytes at a place on a disk, counted from where that begins. It ends in its time, whatever the disk does.
pub type Put = Box<dyn Fn(u64, Vec<u8>) -> Storing>;

/// So much is gathered in memory for one turn of a disk.
const TURN: usize = 1 << 20;

/// A place on a disk.
pub(super) struct Place {
    put: Put,
    /// What waits for its turn, and where that begins.
    held: Vec<u8>,
    at: u64,
    /// A turn was begun and nobody waited for its end: what is on the disk is not known.
    torn: Arc<AtomicBool>,
}

impl Place {
    pub(super) fn of(put: Put) -> Self {
        Self { put, held: Vec::new(), at: 0, torn: Arc::default() }
    }

    pub(super) fn begin_anew(&mut self) {
        (self.held, self.at) = (Vec::new(), 0);
        self.torn.store(false, Ordering::Relaxed);
    }

    pub(super) fn is_torn(&self) -> bool {
        self.torn.load(Ordering::Relaxed)
    }

    /// What is left when all has come, a turn at a time.
    pub(super) fn rest(&mut self) -> Option<Storing> {
        (!self.held.is_empty()).then(|| self.store())
    }

    /// Takes bytes in. Where that fills a turn, it is to be waited for.
    pub(super) fn take(&mut self, piece: &[u8]) -> Option<Storing> {
        self.held.extend_from_slice(piece);
        (self.held.len() >= TURN).then(|| self.store())
    }

    /// One turn with what is held, or the first of it.
    fn store(&mut self) -> Storing {
        let rest = self.held.split_off(self.held.len().min(TURN));
        let piece = std::mem::replace(&mut self.held, rest);
        let at = self.at;
        self.at += piece.len() as u64;
        self.torn.store(true, Ordering::Relaxed);
        let (storing, torn) = ((self.put)(at, piece), Arc::clone(&self.torn));
        Box::pin(async move {
            storing.await?;
            torn.store(false, Ordering::Relaxed);
            Ok(())
        })
    }
}
