//! A disk, and at most one thread that works on it. Whoever wants something of the disk waits for its turn and for its answer,
//! and for each only so long. What a disk was asked cannot be taken back: a thread that hangs in the kernel keeps the turn, whoever
//! comes later is told so at once, and no second thread joins it. A disk that answers after all is worked on again.

use super::DiskError;
use super::search::in_time;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;
use tokio::sync::Mutex;
use tokio::time::timeout;

/// So long one commit has: longer than a disk takes to reset itself and try again.
pub const COMMIT: Duration = Duration::from_secs(60);
/// The slowest disk whose slot is read back to its end, bytes per second.
const SLOWEST: u64 = 4 << 20;
/// What is said to whoever finds another's work unanswered.
const BUSY: &str = "what it was asked before has no answer yet";

/// So long a disk has for work that reads so many bytes.
pub fn patience(bytes: u64) -> Duration {
    COMMIT + Duration::from_secs(bytes / SLOWEST)
}

/// What a disk is worked on by: its copies share the one turn.
pub struct Worker<T> {
    disk: Arc<str>,
    turn: Arc<Mutex<T>>,
    /// What it was asked last had no answer in its time.
    hangs: Arc<AtomicBool>,
}

impl<T> Clone for Worker<T> {
    fn clone(&self) -> Self {
        Self { disk: Arc::clone(&self.disk), turn: Arc::clone(&self.turn), hangs: Arc::clone(&self.hangs) }
    }
}

impl<T: Send + 'static> Worker<T> {
    pub fn new(disk: &str, of: T) -> Self {
        Self { disk: disk.into(), turn: Arc::new(Mutex::new(of)), hangs: Arc::default() }
    }

    /// The disk's name.
    pub fn name(&self) -> &str {
        &self.disk
    }

    /// Whether what it was asked last had no answer in its time.
    pub fn hangs(&self) -> bool {
        self.hangs.load(Ordering::Relaxed)
    }

    /// Works on it in a thread, when it is this one's turn. Late is not undone: what was begun may still come to its end.
    pub async fn run<R: Send + 'static>(
        &self,
        what: &'static str,
        patience: Duration,
        work: impl FnOnce(&mut T) -> R + Send + 'static,
    ) -> Result<R, DiskError> {
        let busy = || DiskError::Late { disk: self.disk.to_string(), what, reason: BUSY.to_owned() };
        let free = Arc::clone(&self.turn).try_lock_owned().ok();
        let mut turn = match free {
            Some(turn) => turn,
            None if self.hangs() => return Err(busy()),
            None => timeout(patience, Arc::clone(&self.turn).lock_owned()).await.map_err(|_| busy())?,
        };
        let done = in_time(&self.disk, what, patience, move || work(&mut turn)).await;
        self.hangs.store(done.is_err(), Ordering::Relaxed);
        done
    }
}

/// The same where there is no runtime, for what is asked once: no answer within this time is none.
pub fn answer_within<R: Send + 'static>(patience: Duration, work: impl FnOnce() -> R + Send + 'static) -> Option<R> {
    let (tell, told) = mpsc::channel();
    let begun = std::thread::Builder::new().spawn(move || {
        // Nobody listens to what comes late.
        let _ = tell.send(work());
    });
    begun.ok().and_then(|_| told.recv_timeout(patience).ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::sync::atomic::AtomicUsize;
    use tokio::sync::oneshot;

    /// Long enough for any host.
    const LONG: Duration = Duration::from_secs(60);
    const SHORT: Duration = Duration::from_millis(50);

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
    }

    /// The thread hangs in a read of a FIFO that nobody writes to: in the kernel, as with a disk.
    #[test]
    fn a_disk_that_hangs_has_one_thread_whatever_is_asked_of_it_and_is_used_again_when_it_answers() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let begun = Arc::new(AtomicUsize::new(0));
        runtime().block_on(async {
            let worker = Worker::new("sda", 0_u32);
            let (path, first) = (fifo.clone(), Arc::clone(&begun));
            let hung = worker.run("writing", Duration::from_secs(1), move |writes| {
                first.fetch_add(1, Ordering::SeqCst);
                let read = std::fs::read(path).unwrap();
                *writes += 1;
                read
            });
            let reason = "no answer within 1 s".to_owned();
            assert!(!worker.hangs());
            assert_eq!(hung.await, Err(DiskError::Late { disk: "sda".into(), what: "writing", reason }));
            // It has begun once the FIFO has its reader.
            let mut writer = std::fs::File::options().write(true).open(&fifo).unwrap();
            for _ in 0..1000 {
                let next = Arc::clone(&begun);
                let late = worker.clone().run("reading", LONG, move |_| next.fetch_add(1, Ordering::SeqCst)).await;
                assert_eq!(late.unwrap_err().to_string(), format!("sda: reading: {BUSY}"));
            }
            assert_eq!(begun.load(Ordering::SeqCst), 1, "no second thread was begun");
            assert!(worker.hangs());

            // It answers. Whoever waits from now on has the turn: until then each is told that it hangs.
            writer.write_all(b"at last").unwrap();
            drop(writer);
            let again = timeout(LONG, async {
                loop {
                    match worker.run("reading", LONG, |writes| *writes).await {
                        Ok(writes) => break writes,
                        Err(_) => tokio::task::yield_now().await,
                    }
                }
            });
            assert_eq!(again.await, Ok(1), "what was late came to its end");
            assert!(!worker.hangs());
        });
    }

    #[test]
    fn each_has_its_turn_and_what_lost_its_caller_is_not_begun() {
        runtime().block_on(async {
            let worker = Worker::new("sda", Vec::<u8>::new());
            let (go, wait) = mpsc::channel::<()>();
            let (begins, begun) = oneshot::channel();
            let slow = worker.clone();
            let slow = tokio::spawn(async move {
                let work = move |order: &mut Vec<u8>| {
                    begins.send(()).unwrap();
                    // The channel's end is what is waited for.
                    assert!(wait.recv().is_err());
                    order.push(1);
                };
                slow.run("reading back", LONG, work).await
            });
            begun.await.unwrap();
            // It waits for its turn, and no longer than it may.
            let late = worker.run("writing", SHORT, |order| order.push(2)).await;
            assert_eq!(late.unwrap_err().to_string(), format!("sda: writing: {BUSY}"));
            let waits = worker.clone();
            let waits = tokio::spawn(async move { waits.run("writing", LONG, |order| order.push(3)).await });
            drop(go);
            slow.await.unwrap().unwrap();
            waits.await.unwrap().unwrap();
            assert_eq!(worker.run("reading", LONG, |order| order.clone()).await, Ok(vec![1, 3]));
        });
    }

    #[test]
    fn what_is_asked_once_has_its_time_too() {
        let (_never, nothing) = mpsc::channel::<()>();
        assert_eq!(answer_within(SHORT, move || nothing.recv().is_ok()), None);
        assert_eq!(answer_within(LONG, || 7), Some(7));
    }

    #[test]
    fn a_slot_is_read_back_for_as_long_as_it_is_large() {
        assert_eq!((patience(0), patience(4 << 30)), (COMMIT, COMMIT + Duration::from_secs(1024)));
    }
}
