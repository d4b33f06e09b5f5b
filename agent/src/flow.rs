//! The way from a boot image to a verified release: find the server, verify metadata, verify the assignment, fetch and
//! verify what it names. PID 1, the running system's service and `kiln-agent stage` all go this way; none has a
//! way around a check.

use crate::api::Api;
use crate::error::{AgentError, FailureClass, Result};
use crate::fetch::{self, Download, Expected};
use crate::journal::Journal;
use crate::memory::{Memory, Place, random};
use crate::plan::Currency;
use crate::retry::{self, Next};
use jiff::Timestamp;
use kiln_protocol::{
    Assignment, Class, Decision, Freshness, Grant, ImageName, KeyId, Nonce, ReleaseId, Reply, Running, Stage, Via,
    check_assignment, check_freshness,
};
use kiln_release::certificate::{spki_der, spki_key_id};
use kiln_release::tuf::{self, ExpiryPolicy, Fetched, Limits, Outcome, Request, TargetPath};
use kiln_release::{BootInfo, Manifest, Signer, Site, hex};
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::Duration;
use tokio::time::timeout;

/// Where to look for the boot server.
#[derive(Debug, Clone, Default, serde::Serialize, serde::Deserialize)]
pub struct Servers {
    /// Base URLs of artifacts.
    pub http: Vec<String>,
    /// Base URLs of the agent API.
    pub agent: Vec<String>,
}

/// Metadata that verified.
pub struct Verified {
    pub site: Site,
    pub manifest: Manifest,
    /// SHA-256 of the manifest's bytes.
    pub manifest_sha256: String,
    outcome: Outcome,
}

impl Verified {
    /// The first file that has expired at `now`, and when.
    pub fn stale_at(&self, now: Timestamp) -> Option<(String, Timestamp)> {
        self.outcome.stale_at(now).into_iter().next().map(|e| (e.file, e.expires))
    }
}

/// What the server answered, verified.
#[allow(clippy::large_enum_variant)] // made once per report and taken apart at once
pub enum Answer {
    /// Nothing assigned: why.
    Wait(String),
    /// Assigned.
    Assigned { assignment: Assignment, via: Via, grant: Grant },
}

/// So often the server hears of a long download.
const TELL_EVERY: Duration = Duration::from_secs(45);
/// Tries of a download without a single byte before a running system's agent turns to its other duties.
const PREFETCH_TRIES: u32 = 3;
/// Pause after which a given-up boot restarts the machine, so that a loop is slow and readable.
pub const RESTART_PAUSE: Duration = Duration::from_secs(10);

/// One machine on its way.
pub struct Flow {
    pub boot: BootInfo,
    pub place: Place,
    pub key: Signer,
    pub memory: Memory,
    pub journal: Journal,
    pub servers: Servers,
    pub api: Option<Api>,
    /// At most so many tries of anything; `None`: as [`retry`] says.
    pub tries: Option<u32>,
    /// The newest time that is believed.
    pub now: Timestamp,
}

impl Flow {
    /// The release that this UKI embeds.
    pub fn here(&self) -> Result<ReleaseId> {
        release_id(&self.boot.image, self.boot.release)
    }

    /// After a failed try: tells the journal and, if it answers, the server; waits, or gives the error back.
    pub async fn after_failure(&mut self, stage: Stage, error: AgentError, attempt: u32) -> Result<()> {
        let jitter = random()?[0];
        let next = match self.tries {
            Some(tries) if attempt >= tries => Next::GiveUp,
            Some(_) | None => retry::next(error.class(), attempt, jitter),
        };
        let pause = match next {
            Next::After(pause) => Some(pause),
            Next::GiveUp => None,
        };
        self.journal.failed(stage, &error, attempt, pause);
        self.report().await;
        match pause {
            Some(pause) => {
                tokio::time::sleep(pause).await;
                Ok(())
            }
            None => Err(error),
        }
    }

    /// Tells the server what it has not heard; if it does not hear now, the next report will.
    pub async fn report(&mut self) {
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

    async fn try_servers(&mut self) -> Result<()> {
        let mut last = AgentError::NoServer;
        for url in self.servers.agent.clone() {
            let ca = &self.boot.site.agent_api_ca_pem;
            let mut api = Api::new(&url, ca, &self.key, self.now)?;
            match self.journal.send(&mut api, 0).await {
                Ok(_) => {
                    self.api = Some(api);
                    return Ok(());
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Verifies the repository's metadata for `release`, and remembers the versions seen.
    pub async fn verify_metadata(&mut self, release: &ReleaseId) -> Result<Verified> {
        let mut last = AgentError::NoServer;
        for url in self.servers.http.clone() {
            match self.refresh(&url, release).await {
                Ok(verified) => return Ok(verified),
                // A bad mirror must not hide a good one. If none is good, what was refused says more than what was silent.
                Err(error)
                    if error.class() == FailureClass::Unreachable && last.class() != FailureClass::Unreachable => {}
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    async fn refresh(&mut self, base: &str, release: &ReleaseId) -> Result<Verified> {
        let site_path = TargetPath::site();
        let manifest_path = TargetPath::manifest(release.image.as_str(), release.release)?;
        let mut client = tuf::Client::new(
            self.boot.trust_root.as_bytes(),
            self.memory.seen.clone(),
            self.now,
            Limits::default(),
            ExpiryPolicy::ReportStale,
            vec![site_path.clone(), manifest_path.clone()],
        )?;
        let fetched = fetch_all(base, &mut client).await;
        // Also of an update that failed: what was verified up to there cannot be taken back.
        let role = format!("image-{}", release.image);
        self.memory.seen = client.seen().clone().narrowed(&["targets", &role]);
        self.place.remember(&self.memory)?;
        fetched?;
        let outcome = client.finish()?;
        let site = Site::read(target(&outcome, &site_path)?)?;
        if site.agent_api.ca_pem.trim() != self.boot.site.agent_api_ca_pem.trim() {
            return Err(AgentError::AgentApiCa);
        }
        self.memory.directed_by(&site);
        let manifest_bytes = target(&outcome, &manifest_path)?;
        let manifest = Manifest::read(manifest_bytes, release.image.as_str(), release.release)?;
        // The other classes need an order signed by an operator, which no agent reads yet.
        if manifest.class != Class::Normal.as_str() {
            return Err(AgentError::Class { release: release.to_string(), class: manifest.class });
        }
        for (image, floor) in &site.floors {
            let known = self.memory.floors.entry(image.clone()).or_insert(1);
            *known = (*known).max(*floor);
        }
        self.place.remember(&self.memory)?;
        let manifest_sha256 = hex::sha256(manifest_bytes);
        Ok(Verified { site, manifest, manifest_sha256, outcome })
    }

    /// Asks the server and verifies what it answers: both signatures, the machine, the sequence, the nonce.
    pub async fn ask(&mut self, verified: &Verified, wait_s: u32) -> Result<Answer> {
        let api = self.api.as_mut().ok_or(AgentError::NoServer)?;
        let (reply, nonce) = self.journal.send(api, wait_s).await?;
        self.check_reply(verified, reply, &nonce)
    }

    /// Verifies a reply to a report that carried `nonce`.
    pub fn check_reply(&mut self, verified: &Verified, reply: Reply, nonce: &Nonce) -> Result<Answer> {
        let (assignment, freshness, via, grant) = match reply.desired.decision {
            Decision::Wait { reason } => return Ok(Answer::Wait(reason)),
            Decision::Assigned { assignment, freshness, via, grant } => (assignment, freshness, via, grant),
        };
        let (assigned, sha256) = verified.site.verify_director::<Assignment>(assignment.as_bytes())?;
        let key: KeyId = spki_key_id(&spki_der(&self.key)).parse().expect("a SHA-256 in hex is a key id");
        let image: ImageName = parse_image(&self.boot.image)?;
        let me = Running {
            key: &key,
            arch: crate::facts::architecture(),
            image: &image,
            highest_sequence: self.memory.sequence,
            floor: self.memory.floor(&self.boot.image),
        };
        check_assignment(&assigned, &me)?;
        let known = &verified.manifest;
        if assigned.release_id() == release_id(&known.image, known.release)?
            && assigned.manifest_sha256.as_str() != verified.manifest_sha256
        {
            let (expected, got) = (verified.manifest_sha256.clone(), assigned.manifest_sha256.to_string());
            return Err(AgentError::ManifestMismatch { expected, got });
        }
        let (fresh, _) = verified.site.verify_director::<Freshness>(freshness.as_bytes())?;
        check_freshness(&fresh, nonce, &sha256.parse().expect("a SHA-256 in hex"))?;
        self.memory.accept(&assigned);
        self.move_clock(fresh.now.min(verified.outcome.offline_expires_newest));
        self.place.remember(&self.memory)?;
        Ok(Answer::Assigned { assignment: assigned, via, grant })
    }

    /// Moves the time floor; it is persisted at most once a day, as storage wears.
    fn move_clock(&mut self, now: Timestamp) {
        if now <= self.now {
            return;
        }
        self.now = now;
        if let Some(api) = &self.api {
            api.set_time(now);
        }
        let day = 24 * 60 * 60;
        if self.memory.time_floor.is_none_or(|old| now.as_second() - old.as_second() >= day) {
            self.memory.time_floor = Some(now);
        }
    }

    /// What is known of time, for [`crate::plan::decide`].
    pub fn currency(&self, verified: &Verified) -> Currency {
        Currency { now: self.now, stale: verified.stale_at(self.now) }
    }

    /// Fetches an artifact to a file, going on after network errors from the next server; what fails its hash is
    /// removed. `stage` names the wait.
    pub async fn fetch_to(&mut self, stage: Stage, expected: Expected<'_>, path: &Path) -> Result<()> {
        let mut file = File::create(path).map_err(AgentError::file(path))?;
        let result = self.fetch_into(stage, expected, &mut file).await;
        if result.is_err() && path.exists() {
            std::fs::remove_file(path).map_err(AgentError::file(path))?;
        }
        result
    }

    /// The same into any writer. Through a long download the server hears of it; an assignment of another sequence
    /// ends the one that is no longer wanted.
    pub async fn fetch_into(&mut self, stage: Stage, expected: Expected<'_>, out: &mut dyn Write) -> Result<()> {
        let mut download = Download::new(expected);
        let sequence = self.journal.state.sequence_hint;
        let mut attempt = 0;
        let mut turn = 0;
        loop {
            if stage == Stage::Prefetch && self.journal.state.sequence_hint != sequence {
                return Err(AgentError::Superseded);
            }
            let before = download.received();
            let base = self.servers.http.get(turn % self.servers.http.len().max(1)).cloned();
            let base = base.ok_or(AgentError::NoServer)?;
            let error = match timeout(TELL_EVERY, download.run(&base, out)).await {
                // Cut between two pieces: it goes on behind the last one.
                Err(_) => {
                    self.report().await;
                    continue;
                }
                Ok(Ok(())) => return Ok(()),
                Ok(Err(error)) => error,
            };
            if error.class() != FailureClass::Unreachable {
                return Err(error);
            }
            // A try that moved bytes is progress: the count starts anew. The next server may be better.
            attempt = if download.received() > before { 1 } else { attempt + 1 };
            turn += 1;
            if stage == Stage::Prefetch && attempt >= PREFETCH_TRIES {
                return Err(error);
            }
            self.after_failure(stage, error, attempt).await?;
        }
    }
}

/// Feeds the client until it has all it wants.
async fn fetch_all(base: &str, client: &mut tuf::Client) -> Result<()> {
    loop {
        let Request::Fetch { path, max_bytes, may_be_absent } = client.next() else { return Ok(()) };
        let fetched = match fetch::document(base, &path, max_bytes).await {
            Ok(Some(bytes)) => Fetched::Bytes(bytes),
            Ok(None) if may_be_absent => Fetched::Absent,
            // A file that is listed but not there: a repository half copied, or one that hides it. Like no answer.
            Ok(None) => return Err(AgentError::HttpStatus { url: format!("{base}/{path}"), status: 404 }),
            Err(AgentError::TooLong { .. }) => Fetched::TooLong,
            Err(error) => return Err(error),
        };
        client.feed(fetched)?;
    }
}

fn target<'a>(outcome: &'a Outcome, path: &TargetPath) -> Result<&'a [u8]> {
    let found = outcome.targets.get(path.as_str());
    found.map(|t| t.bytes.as_slice()).ok_or_else(|| tuf::TufError::Missing { file: path.as_str().to_owned() }.into())
}

/// IMAGE/NUMBER of fields that were read from a signed document.
pub fn release_id(image: &str, release: u64) -> Result<ReleaseId> {
    Ok(ReleaseId { image: parse_image(image)?, release })
}

fn parse_image(image: &str) -> Result<ImageName> {
    image.parse().map_err(|e: kiln_protocol::IdError| AgentError::Format {
        path: kiln_release::BOOT_PATH.into(),
        reason: e.to_string(),
    })
}
