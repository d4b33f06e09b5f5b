//! A thread that writes to a console. One that takes nothing (a serial line with flow control, a journal that hangs) holds up
//! nobody: what it has no room for is passed over.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::{Duration, Instant};

/// Between two looks whether all was written.
const LOOK: Duration = Duration::from_millis(5);

/// The way to it.
pub struct Writer {
    texts: SyncSender<String>,
    /// How many are not written yet.
    waiting: Arc<AtomicUsize>,
}

impl Writer {
    /// With room for so many texts; none where there can be no thread.
    pub fn new(mut to: File, room: usize) -> Option<Self> {
        let (texts, taken) = sync_channel::<String>(room);
        let waiting = Arc::new(AtomicUsize::new(0));
        let left = Arc::clone(&waiting);
        let write = move || {
            for text in taken {
                // A console that is gone costs what was for it.
                let _ = to.write_all(text.as_bytes());
                left.fetch_sub(1, Ordering::Release);
            }
        };
        std::thread::Builder::new().spawn(write).ok()?;
        Some(Self { texts, waiting })
    }

    /// Whether there was room for it.
    pub fn put(&self, text: String) -> bool {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let has_room = self.texts.try_send(text).is_ok();
        if !has_room {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
        }
        has_room
    }

    #[cfg(test)]
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Acquire)
    }

    /// Waits until all of it was written, so long at most.
    pub fn drain(&self, patience: Duration) {
        let until = Instant::now() + patience;
        while self.waiting.load(Ordering::Acquire) > 0 && Instant::now() < until {
            std::thread::sleep(LOOK);
        }
    }
}
