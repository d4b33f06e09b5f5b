//! What the disk starts from: the loader's files and the UKIs on the EFI system partition, compared with what was signed once
//! the release is good, and daily from then on. Without Secure Boot firmware starts a UKI with a flipped byte like any other;
//! its kernel may die before the agent at every start, and of a good release nobody counts them.

use super::{Event, Proof, Service};
use crate::disk::machine::{self, MachineDisk, SharedDisk, on_disk_within};
use crate::error::{AgentError, Result};
use crate::verifier::Verifier;
use crate::{change, dbx};
use kiln_protocol::ReleaseId;
use kiln_protocol::slot::Content;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Mutex;

/// Between two looks.
const EVERY: Duration = Duration::from_secs(24 * 3600);
/// Behind one that left something wrong.
const AGAIN: Duration = Duration::from_secs(15 * 60);
/// Longest time for one thing that is asked of the disk: it reads two UKIs at most.
const READS: Duration = Duration::from_secs(120);
/// An event's kind.
const KIND: &str = "boot-files";

/// A look on its way: what was wrong.
pub(super) type Look = Pin<Box<dyn Future<Output = Vec<Wrong>>>>;

/// When the next look is due, and what the last one told.
#[derive(Default)]
pub(super) struct Files {
    next: Option<Instant>,
    told: BTreeSet<String>,
}

/// A file that was not as it was signed.
pub(super) struct Wrong {
    what: String,
    /// Why it still is; none once it is right again.
    because: Option<String>,
}

impl Wrong {
    fn words(&self) -> String {
        let what = &self.what;
        match &self.because {
            None => format!("{what} was not as it was signed: it is right again"),
            Some(reason) => format!("{what} is not as it was signed: {reason}"),
        }
    }
}

impl Service {
    /// If a look is due.
    pub(super) fn look_at_files(&mut self) -> Option<Look> {
        let disk = self.disk.clone().filter(|_| matches!(self.proven, Proof::Good))?;
        let (now, files) = (Instant::now(), &mut self.files);
        if files.next.is_some_and(|next| now < next) {
            return None;
        }
        files.next = Some(now + EVERY);
        let (verifier, here, folder) = (Rc::clone(&self.verifier), self.here.clone(), self.next.clone());
        Some(Box::pin(async move { look(&disk, &verifier, here, &folder).await }))
    }

    /// A look is over: the same again is told once.
    pub(super) fn saw_files(&mut self, wrong: &[Wrong]) -> Event {
        let left = wrong.iter().any(|wrong| wrong.because.is_some());
        self.files.next = Some(Instant::now() + if left { AGAIN } else { EVERY });
        let told: BTreeSet<String> = wrong.iter().map(Wrong::words).collect();
        let before = std::mem::replace(&mut self.files.told, told);
        let mut event = Event::Time;
        for words in self.files.told.difference(&before) {
            self.watch.keeper.note(KIND, true, words);
            event = Event::News;
        }
        event
    }
}

async fn look(disk: &SharedDisk, verifier: &Mutex<Verifier>, here: ReleaseId, folder: &Path) -> Vec<Wrong> {
    let mut wrong = Vec::new();
    let mut say = |what: String, because: Option<AgentError>| {
        wrong.push(Wrong { what, because: because.map(|error| format!("{error} ({})", error.kind())) });
    };
    match in_time(disk, move |disk| disk.put_loader_right(&here, &dbx::revoked()?)).await {
        Ok(files) => files.into_iter().for_each(|path| say(path.to_owned(), None)),
        Err(error) => say("the boot loader".to_owned(), Some(error)),
    }
    match in_time(disk, MachineDisk::wrong_ukis).await {
        Ok(releases) => {
            for content in releases {
                let what = format!("the UKI of {} on the disk", content.release);
                match fetch_anew(disk, verifier, content, folder).await {
                    // Its release was swept meanwhile: nothing is wrong.
                    Err(AgentError::Superseded) => {}
                    mended => say(what, mended.err()),
                }
            }
        }
        Err(error) => say("a UKI on the disk".to_owned(), Some(error)),
    }
    wrong
}

/// By what was kept of the release, verified anew.
async fn fetch_anew(disk: &SharedDisk, verifier: &Mutex<Verifier>, content: Content, folder: &Path) -> Result<()> {
    let root_hash = content.root_hash.clone();
    let record = in_time(disk, move |disk| disk.record(&root_hash)).await?;
    let (manifest, servers, rate) = {
        let mut verifier = verifier.lock().await;
        // An install may be about to write another.
        let (verified, _) = verifier.verify_record(&content.release, &record, false)?;
        (verified.manifest, verifier.servers.http.clone(), change::prefetch_rate(&verifier.boot))
    };
    if machine::content(&manifest)? != content {
        let reason = format!("what is kept there of {} is of another", content.release);
        return Err(AgentError::Format { path: "the state partition".into(), reason });
    }
    let path: PathBuf = folder.join("mended.efi");
    change::mend_uki(disk, &manifest, (servers.as_slice(), rate), &path, &Arc::default()).await
}

async fn in_time<T: Send + 'static>(
    disk: &SharedDisk,
    work: impl FnOnce(&mut MachineDisk) -> Result<T> + Send + 'static,
) -> Result<T> {
    on_disk_within(disk, "looking at what it starts from", READS, work).await
}
