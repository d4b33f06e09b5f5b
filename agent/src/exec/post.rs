//! What the supervisor has to tell, and how the service hears that there is more.

use crate::facts;
use kiln_protocol::{AgentMemory, ExecState};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// What is told, and when there is more.
#[derive(Clone)]
pub struct Post(Arc<Shared>);

struct Shared {
    state: Mutex<ExecState>,
    news: Notify,
    /// The guard's process, 0 for none.
    guard: AtomicU32,
}

/// [`Post::news`], for ever if there is no list.
pub async fn news(post: Option<&Post>) {
    match post {
        Some(post) => post.news().await,
        None => std::future::pending().await,
    }
}

impl Post {
    pub(super) fn new() -> Self {
        Self(Arc::new(Shared { state: Mutex::default(), news: Notify::new(), guard: AtomicU32::new(0) }))
    }

    /// For the report.
    pub fn state(&self) -> ExecState {
        self.lock().clone()
    }

    /// Ends when something new is to be told.
    pub async fn news(&self) {
        self.0.news.notified().await;
    }

    /// The guard's process, 0 for none.
    pub(super) fn guarded_by(&self, process: u32) {
        self.0.guard.store(process, Ordering::Relaxed);
    }

    /// What the service costs, and the guard with it.
    pub fn with_guard(&self, service: Option<AgentMemory>) -> Option<AgentMemory> {
        let guard = facts::memory_of(&self.0.guard.load(Ordering::Relaxed).to_string());
        let Some((service, guard)) = service.zip(guard) else { return service };
        let both = |a: Option<u64>, b: Option<u64>| a.zip(b).map(|(a, b)| a + b);
        Some(AgentMemory {
            rss_bytes: service.rss_bytes + guard.rss_bytes,
            peak_bytes: service.peak_bytes + guard.peak_bytes,
            cpu_ms: both(service.cpu_ms, guard.cpu_ms),
            ran_ms: service.ran_ms,
        })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, ExecState> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn change(&self, change: impl FnOnce(&mut ExecState)) {
        change(&mut self.lock());
        self.0.news.notify_one();
    }

    pub(super) fn alarm(&self, words: &str) {
        eprintln!("kiln-agent: exec guard: {words}");
        self.change(|state| state.alarm = Some(words.chars().take(300).collect()));
    }
}
