//! One machine's way from its boot image to a verified release: find the server, ask it, fetch, and tell it of all. For
//! PID 1 and `kiln-agent stage`, which do one thing after the other; the running system's service does them side by side.

use crate::api::Api;
use crate::attest::{self, Proved};
use crate::change::{Prefetch, Ready};
use crate::error::{AgentError, FailureClass, Result};
use crate::fetch::{Download, Expected};
use crate::init::embedded;
use crate::journal::{Journal, JournalState};
use crate::memory::{Identity, Memory, Place, random};
use crate::retry::{self, Next};
use crate::verifier::{Answer, Servers, Verified, Verifier};
use crate::{console, facts, introduce, log};
use kiln_protocol::{Assignment, Stage, TpmPresence, Via};
use kiln_release::BootInfo;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::sleep;

/// So often the server hears of a long download.
pub const TELL_EVERY: Duration = Duration::from_secs(45);
/// Pause after which a given-up boot restarts the machine, so that a loop is slow and readable.
pub const RESTART_PAUSE: Duration = Duration::from_secs(10);

/// One machine on its way.
pub struct Flow {
    pub verifier: Verifier,
    pub journal: Journal,
    pub api: Option<Api>,
    /// At most so many tries of anything; `None`: as [`retry`] says.
    pub tries: Option<u32>,
    /// [`TELL_EVERY`].
    pub tell_every: Duration,
}

impl Flow {
    /// At its beginning, by what the boot image says and this machine remembers. Whether that may boot at all
    /// ([`Memory::may_boot`]) is for the caller to ask first: what is refused is told by such a flow as well.
    pub fn begin(
        boot: BootInfo,
        state: JournalState,
        place: Place,
        Identity { key, lost }: Identity,
        memory: Memory,
        tpm: Option<TpmPresence>,
    ) -> Result<Self> {
        let embedded = embedded(&boot)?;
        let now = memory.time_floor.map_or(boot.built, |t| t.max(boot.built));
        let mut machine = facts::read(place.key_storage(), place.rollback_memory())?;
        machine.tpm = tpm;
        let mut journal = Journal {
            state,
            machine,
            embedded,
            running: None,
            health: None,
            prefetch: None,
            fallback: None,
            condition: None,
        };
        if let Some(error) = lost {
            journal.failed(Stage::Start, &error, 1, Some(Duration::ZERO));
        }
        let servers = Servers { http: boot.site.http_urls.clone(), agent: boot.site.agent_urls.clone() };
        let verifier = Verifier::new(boot, place, key, memory, servers, now);
        Ok(Self { verifier, journal, api: None, tries: None, tell_every: TELL_EVERY })
    }

    /// After a failed try: tells the journal and, if it answers, the server; waits, or gives the error back.
    pub async fn after_failure(&mut self, stage: Stage, error: AgentError, attempt: u32) -> Result<()> {
        let class = error.class();
        self.after(stage, error, class, attempt).await
    }

    /// The same where what a server answered does not hold. A restart would not mend that, and a server must not be able
    /// to keep a machine restarting: it is asked for ever, with the pauses of one that gives no answer.
    pub async fn after_answer(&mut self, stage: Stage, error: AgentError, attempt: u32) -> Result<()> {
        let class = match error.class() {
            FailureClass::Verification | FailureClass::Unreachable => FailureClass::Unreachable,
            class @ (FailureClass::Machine | FailureClass::Usage) => class,
        };
        self.after(stage, error, class, attempt).await
    }

    async fn after(&mut self, stage: Stage, error: AgentError, class: FailureClass, attempt: u32) -> Result<()> {
        let jitter = random()?[0];
        let next = match self.tries {
            Some(tries) if attempt >= tries => Next::GiveUp,
            Some(_) | None => retry::next(class, attempt, jitter),
        };
        let pause = match next {
            Next::After(pause) => Some(pause),
            Next::GiveUp => None,
        };
        self.journal.failed(stage, &error, attempt, pause);
        self.report().await;
        match pause {
            Some(pause) => {
                sleep(pause).await;
                Ok(())
            }
            None => Err(error),
        }
    }

    /// Tells the server what it has not heard; if it does not hear now, the next report will.
    pub async fn report(&mut self) {
        self.verifier.say(&mut self.journal);
        if let Some(api) = &mut self.api
            && let Err(error) = self.journal.send(api, 0).await
        {
            println!("kiln-agent: report not delivered yet: {error}");
        }
    }

    /// Makes sure that the error that ends this boot is recorded and told.
    pub async fn give_up(&mut self, error: &AgentError) {
        if let Some((stage, false)) = self.journal.state.last {
            self.journal.failed(stage, error, 1, None);
        }
        self.report().await;
        log::sent().await;
    }

    /// Begins to send the log; the server has heard of this boot.
    pub fn ship_log(&self) -> Result<()> {
        log::ship(self.log_api()?, &self.journal.state.boot_id, &self.journal.machine.id);
        Ok(())
    }

    /// It goes on from the session of the reports, without a second look at certificates beside the metadata's.
    fn log_api(&self) -> Result<Api> {
        let Verifier { boot, key, clock, pins, servers, .. } = &self.verifier;
        match &self.api {
            Some(api) => Ok(api.another_of(&servers.agent)),
            None => Ok(Api::new(&servers.agent, &boot.site.agent_api_ca_pem, key, clock)?.pinned(pins)),
        }
    }

    /// Finds a server that answers a report.
    pub async fn find_server(&mut self) -> Result<()> {
        self.journal.started(Stage::Server);
        let mut attempt = 0;
        loop {
            attempt += 1;
            match self.try_servers().await {
                Ok(()) => break,
                Err(error) => self.after_failure(Stage::Server, error, attempt).await?,
            }
        }
        self.journal.done(Stage::Server);
        Ok(())
    }

    pub async fn try_servers(&mut self) -> Result<()> {
        let mut last = AgentError::NoServer;
        for url in &self.verifier.servers.agent {
            let ca = &self.verifier.boot.site.agent_api_ca_pem;
            let api = Api::new(std::slice::from_ref(url), ca, &self.verifier.key, &self.verifier.clock)?;
            let mut api = api.pinned(&self.verifier.pins);
            match self.journal.send(&mut api, 0).await {
                Ok((reply, _)) => {
                    console::server(url);
                    self.api = Some(api);
                    // Before anything may end this boot: what it booted is the reason, perhaps.
                    if reply.attest {
                        self.attest().await;
                    }
                    return Ok(());
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Asks the server and verifies what it answers: both signatures, the machine, the sequence, the nonce.
    pub async fn ask(&mut self, verified: &Verified, wait_s: u32) -> Result<Answer> {
        self.verifier.say(&mut self.journal);
        let api = self.api.as_mut().ok_or(AgentError::NoServer)?;
        let (mut reply, mut nonce) = self.journal.send(api, wait_s).await?;
        if reply.about.as_ref().is_some_and(|about| about.introduce) {
            self.introduce().await;
        }
        if reply.attest {
            self.attest().await;
            // What it waited for may have been this proof.
            let api = self.api.as_mut().ok_or(AgentError::NoServer)?;
            (reply, nonce) = self.journal.send(api, 0).await?;
        }
        self.verifier.check_reply(verified, reply, &nonce)
    }

    /// Proves to the server what was booted. Without it the machine is shown as not attested, and goes on.
    async fn attest(&mut self) {
        let Some(api) = &mut self.api else { return };
        let (key, journal) = (self.verifier.key_id(), &self.journal);
        match attest::prove(api, &journal.machine.id, &journal.state.boot_id, &key, false).await {
            Ok(Proved { judged, .. }) => println!("kiln-agent: {}: {}", judged.state, log::said(&judged.reason)),
            Err(error) => println!("kiln-agent: no proof of this boot: {error} ({})", error.kind()),
        }
    }

    /// Before a kexec, once the next kernel is loaded: whether the next boot is attested if this one is.
    pub async fn may_carry(&mut self) -> bool {
        if self.journal.machine.tpm != Some(TpmPresence::Ready) {
            return true;
        }
        let Some(api) = &mut self.api else { return false };
        attest::may_carry(api, &self.journal.machine.id, &self.journal.state.boot_id).await
    }

    /// Shows the approval code. Without it the machine waits as well, and is asked again with the next report.
    async fn introduce(&mut self) {
        let Some(api) = &mut self.api else { return };
        let key = self.verifier.key_id();
        match introduce::introduce(api, &self.journal.machine.id, &key).await {
            Ok(code) => {
                println!("kiln-agent: approval code {code}");
                console::code(&code);
            }
            Err(error) => println!("kiln-agent: no approval code: {error}"),
        }
    }

    /// Fetches an artifact to a file, going on after network errors from the next server; what does not verify is
    /// removed. `stage` names the wait.
    pub async fn fetch_to(&mut self, stage: Stage, expected: Expected, path: &Path) -> Result<()> {
        let download = Download::new(expected, Some(path), &Arc::default())?;
        if let Some(file) = self.run_download(stage, download).await?.into_file() {
            file.keep();
        }
        Ok(())
    }

    /// The same with any download.
    pub async fn run_download(&mut self, stage: Stage, mut download: Download) -> Result<Download> {
        let servers = self.verifier.servers.http.clone();
        for turn in 0.. {
            let base = servers.get(turn % servers.len().max(1)).ok_or(AgentError::NoServer)?;
            let done = tokio::select! {
                done = download.run(base) => done,
                never = keep_telling(&mut self.journal, &mut self.api, self.tell_every, None) => Err(never),
            };
            match done {
                Ok(()) => break,
                Err(error) => self.after_failure(stage, error, download.tries()).await?,
            }
        }
        Ok(download)
    }

    /// Fetches and verifies the assigned release, for a kexec into the directory `to`. Ends with
    /// [`AgentError::Superseded`] when the server's answers name another assignment.
    pub async fn prefetch(&mut self, assignment: &Assignment, via: Via, to: &Path) -> Result<Ready> {
        self.journal.started(Stage::Prefetch);
        let mut prefetch = Prefetch::new(assignment, via, to, Arc::default());
        let (mut attempt, sequence) = (0, Some(assignment.sequence));
        loop {
            let done = tokio::select! {
                done = prefetch.run(&mut self.verifier) => done,
                superseded = keep_telling(&mut self.journal, &mut self.api, self.tell_every, sequence) => {
                    return Err(superseded);
                }
            };
            match done {
                Ok(()) => break,
                Err(error) => {
                    attempt = if prefetch.moved() { 1 } else { attempt + 1 };
                    self.after_failure(Stage::Prefetch, error, attempt).await?;
                }
            }
        }
        self.journal.done(Stage::Prefetch);
        Ok(prefetch.into_ready().expect("a prefetch that has succeeded has all its parts"))
    }
}

/// Reports while something takes long. With `sequence` it ends once the server's answers claim another one.
async fn keep_telling(
    journal: &mut Journal,
    api: &mut Option<Api>,
    every: Duration,
    sequence: Option<u64>,
) -> AgentError {
    loop {
        sleep(every).await;
        let Some(api) = api else { continue };
        if let Err(error) = journal.send(api, 0).await {
            println!("kiln-agent: report not delivered yet: {error}");
        } else if sequence.is_some() && journal.state.sequence_hint != sequence {
            return AgentError::Superseded;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::director::Director;
    use crate::testing::web::{self, Gate, Happened};
    use crate::testing::{TestSite, flow};
    use kiln_protocol::StageState;
    use std::collections::BTreeMap;
    use std::sync::mpsc::Receiver;

    /// A machine in its initramfs that has found its server and asked it.
    async fn asked(site: &TestSite, http: &[String], director: &Director, state: &Path) -> (Flow, Assignment, Via) {
        let verifier = site.verifier(1, http, std::slice::from_ref(&director.url), state);
        let mut flow = flow(verifier, None, Duration::from_millis(100));
        flow.find_server().await.unwrap();
        let here = flow.verifier.here().unwrap();
        let verified = flow.verifier.verify_metadata(&here).await.unwrap();
        let Answer::Assigned { assignment, via, .. } = flow.ask(&verified, 0).await.unwrap() else {
            panic!("it waits")
        };
        (flow, assignment, via)
    }

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
    }

    fn gated(site: &TestSite, path: &str) -> (Arc<Gate>, String, Receiver<Happened>) {
        let gate = Arc::<Gate>::default();
        let (http, hear) = web::honest(site.files.clone(), [(path.to_owned(), (1000, Arc::clone(&gate)))].into());
        (gate, http, hear)
    }

    #[test]
    fn the_server_hears_of_a_long_download_and_the_next_server_is_asked() {
        let site = TestSite::new(1);
        let dir = tempfile::tempdir().unwrap();
        let [_, root] = site.paths(1);
        let (gate, good, hear) = gated(&site, &root);
        // It has the metadata, but no artifact.
        let metadata = site.files.iter().filter(|(path, _)| !path.starts_with("a/"));
        let (poor, _hear) = web::honest(metadata.map(|(p, f)| (p.clone(), f.clone())).collect(), BTreeMap::new());
        let director = Director::start(&site, (1, 1, Via::Cold, false));
        runtime().block_on(async {
            let (mut flow, ..) = asked(&site, &[poor, good], &director, &dir.path().join("state")).await;
            let manifest = &site.manifests[&1];
            let (sha256, length) = (manifest.root.sha256.clone(), manifest.root.length);
            let expected = Expected { what: crate::error::ROOT, sha256, length };
            let path = dir.path().join("root");
            let before = director.heard().len();
            let opened = tokio::task::spawn_blocking(move || {
                web::wait(&hear, Duration::from_secs(20), |h| matches!(h, Happened::Asked(path, _) if *path == root));
                let heard = director.heard().len();
                // Two reports more, while nothing comes.
                director.wait_for(heard + 2, Duration::from_secs(20));
                gate.open();
                director
            });
            flow.fetch_to(Stage::Root, expected, &path).await.unwrap();
            let director = opened.await.unwrap();
            assert_eq!(std::fs::read(&path).unwrap().len() as u64, length);
            let failed = |r: &kiln_protocol::Report| {
                r.stages.iter().any(|s| matches!(&s.state, StageState::Failed(f) if f.kind == "server-bad-status"))
            };
            assert!(director.heard()[before..].iter().any(failed), "the first server's fault was told");
        });
    }

    #[test]
    fn no_answer_of_a_server_ends_a_boot() {
        let site = TestSite::new(1);
        let dir = tempfile::tempdir().unwrap();
        let (http, _hear) = web::honest(site.files.clone(), BTreeMap::new());
        let director = Director::start(&site, (1, 5, Via::Cold, false));
        runtime().block_on(async {
            let state = dir.path().join("state");
            let (mut flow, ..) = asked(&site, &[http], &director, &state).await;
            let here = flow.verifier.here().unwrap();
            let mut verified = flow.verifier.verify_metadata(&here).await.unwrap();
            // Orders that no operator signed, again and again, more often than any step may fail.
            director.give(Some(r#"{"signatures":[],"signed":{"_type":"kiln-order"}}"#.to_owned()));
            let before = director.heard().len();
            let mended = std::thread::spawn(move || {
                let failed = |r: &kiln_protocol::Report| {
                    let of = |s: &kiln_protocol::StageRecord| match &s.state {
                        StageState::Failed(f) => (s.stage == Stage::Assignment).then_some((f.attempt, f.retry_in_ms)),
                        StageState::Started | StageState::Done | StageState::Waiting { .. } => None,
                    };
                    r.stages.iter().filter_map(of).any(|(attempt, retry)| attempt >= 3 && retry.is_some())
                };
                director.wait("of a third refusal", std::time::Instant::now(), Duration::from_secs(60), failed);
                director.give(None);
                director
            });
            let (assignment, _, plan) = crate::init::wait_for_assignment(&mut flow, &mut verified).await.unwrap();
            assert_eq!((assignment.sequence, plan), (5, crate::plan::Plan::Stay));
            assert!(mended.join().unwrap().heard().len() > before + 3);
        });
    }

    #[test]
    fn what_is_refused_of_metadata_that_is_read_anew_is_told() {
        let site = TestSite::new(1);
        let dir = tempfile::tempdir().unwrap();
        let (good, _hear) = web::honest(site.files.clone(), BTreeMap::new());
        let mut altered = site.files.clone();
        *altered.get_mut("metadata/timestamp.json").unwrap() = b"{}".to_vec();
        let (bad, _hear) = web::honest(altered, BTreeMap::new());
        let director = Director::start(&site, (1, 5, Via::Cold, false));
        runtime().block_on(async {
            let (mut flow, ..) = asked(&site, &[good], &director, &dir.path().join("state")).await;
            let here = flow.verifier.here().unwrap();
            let mut verified = flow.verifier.verify_metadata(&here).await.unwrap();
            flow.verifier.servers.http = vec![bad];
            // What makes it read metadata anew.
            director.give(Some(r#"{"signatures":[],"signed":{"_type":"kiln-order"}}"#.to_owned()));
            let told = std::thread::spawn(move || {
                let refused = |r: &kiln_protocol::Report| {
                    let of = |s: &kiln_protocol::StageRecord| match &s.state {
                        StageState::Failed(f) => (s.stage == Stage::Metadata).then(|| f.kind.clone()),
                        StageState::Started | StageState::Done | StageState::Waiting { .. } => None,
                    };
                    r.stages.iter().filter_map(of).any(|kind| kind.starts_with("metadata-"))
                };
                director.wait("of the refused metadata", std::time::Instant::now(), Duration::from_secs(60), refused);
                director.give(None);
                director
            });
            // What was verified before counts on.
            let (assignment, _, plan) = crate::init::wait_for_assignment(&mut flow, &mut verified).await.unwrap();
            assert_eq!((assignment.sequence, plan), (5, crate::plan::Plan::Stay));
            drop(told.join().unwrap());
        });
    }

    #[test]
    fn the_logs_connection_goes_on_from_the_session_of_the_reports() {
        let site = TestSite::new(1);
        let dir = tempfile::tempdir().unwrap();
        let (http, _hear) = web::honest(site.files.clone(), BTreeMap::new());
        let director = Director::start(&site, (1, 1, Via::Cold, false));
        runtime().block_on(async {
            let (mut flow, ..) = asked(&site, &[http], &director, &dir.path().join("state")).await;
            flow.verifier.servers.agent = vec!["https://127.0.0.1:9".into(), director.url.clone()];
            let mut api = flow.log_api().unwrap();
            assert_eq!(api.server(), director.url, "the server that answers comes first");
            let report = flow.journal.report(0).unwrap();
            api.report(&report).await.unwrap();
            assert_eq!(director.resumed(), [false, true]);
        });
    }

    #[test]
    fn another_assignment_ends_a_prefetch_and_leaves_nothing() {
        let site = TestSite::new(3);
        let dir = tempfile::tempdir().unwrap();
        let [uki, _] = site.paths(2);
        let (_gate, http, hear) = gated(&site, &uki);
        let director = Director::start(&site, (2, 5, Via::Kexec, true));
        runtime().block_on(async {
            let (mut flow, assignment, via) = asked(&site, &[http], &director, &dir.path().join("state")).await;
            let ordered = std::thread::spawn(move || {
                web::wait(&hear, Duration::from_secs(20), |h| *h == Happened::Asked(uki.clone(), 0));
                director.order((3, 6, Via::Kexec, true));
            });
            let to = dir.path().join("next");
            std::fs::create_dir(&to).unwrap();
            let error = flow.prefetch(&assignment, via, &to).await.unwrap_err();
            assert_eq!(error.kind(), "assignment-superseded");
            assert_eq!(to.read_dir().unwrap().count(), 0);
            ordered.join().unwrap();
        });
    }
}
