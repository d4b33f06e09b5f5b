//! What a machine believes and why: metadata against the trust root in its boot image, the director's statements against
//! that metadata. PID 1, the running system's service and `kiln-agent stage` have this one way; none goes around it.

use crate::api::{Clock, Pins};
use crate::disk::machine::content;
use crate::disk::record::Record;
use crate::error::{AgentError, FailureClass, Result};
use crate::fetch::Documents;
use crate::journal::Journal;
use crate::memory::{Memory, Place};
use crate::plan::Currency;
use jiff::Timestamp;
use kiln_protocol::slot::Label;
use kiln_protocol::{
    Assignment, Class, Decision, Freshness, Grant, ImageName, KeyId, KeyStorage, Nonce, ORDER_TYPE, Order, OrderAction,
    OrderError, OrderGiven, Ordered, ReleaseId, Reply, RoleSettings, RollbackMemory, Running, Stage, Stale, Via,
    check_assignment, check_freshness, check_order,
};
use kiln_release::certificate::{spki_der, spki_key_id};
use kiln_release::tuf::{self, ExpiryPolicy, Fetched, Limits, Outcome, Request, TargetPath};
use kiln_release::{BootInfo, Manifest, Mode, Signer, Site, hex};
use std::collections::BTreeMap;
use std::time::Duration;

/// In the place of an assignment's sequence: a wipe that was taken and is not done. It is done again after a cut.
const WIPING: u64 = 1;

/// Where to look for the boot server.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
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
    /// The repository's files that it was verified with, by path; kept in disk mode alone.
    pub files: BTreeMap<String, String>,
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
    /// An operator orders a wipe, whatever else is wanted.
    Wipe(Order),
}

/// One machine's trust: which keys, what was seen, which time is believed.
pub struct Verifier {
    pub boot: BootInfo,
    pub place: Place,
    pub key: Signer,
    pub memory: Memory,
    pub servers: Servers,
    /// The newest time that is believed.
    pub now: Timestamp,
    /// The same for TLS.
    pub clock: Clock,
    /// The agent API's keys that count.
    pub pins: Pins,
    /// The assignment that was accepted last, as it came.
    pub accepted: Option<String>,
    /// What its role selects, as that assignment says.
    pub settings: RoleSettings,
    /// The operator's order that the accepted assignment rests on.
    pub order: Option<Order>,
    /// A wipe that was ordered, verified, and is to be done before anything else.
    pub wipe: Option<Order>,
    /// Sequence of the assignment under which what runs was fetched and verified.
    pub put_up: u64,
    /// What had expired of the metadata that was verified last, by the time that is believed now.
    pub stale: Option<Stale>,
    /// Images that lie in the slots, whose floors are remembered beside that of what runs.
    pub held: Vec<String>,
    /// What is remembered is stored, as far as it was tried in this boot.
    is_kept: bool,
    /// Why it is not, until that is told.
    unkept: Option<AgentError>,
    /// It is shown as stored.
    is_shown: bool,
}

impl Verifier {
    pub fn new(boot: BootInfo, place: Place, key: Signer, memory: Memory, servers: Servers, now: Timestamp) -> Self {
        let clock = Clock::at(now);
        Self {
            boot,
            place,
            key,
            memory,
            servers,
            now,
            clock,
            pins: Pins::default(),
            accepted: None,
            settings: RoleSettings::default(),
            order: None,
            wipe: None,
            put_up: u64::MAX,
            stale: None,
            held: Vec::new(),
            is_kept: true,
            unkept: None,
            is_shown: true,
        }
    }

    /// The release that this UKI embeds.
    pub fn here(&self) -> Result<ReleaseId> {
        release_id(&self.boot.image, self.boot.release)
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
            vec![site_path, manifest_path],
        )?;
        // Also of an update that fails or is called off: what was verified up to there cannot be taken back.
        let role = format!("image-{}", release.image);
        let (mut files, keep) = (BTreeMap::new(), self.boot.site.mode == Mode::Disk);
        let fetched = fetch_all(base, &mut client, &mut |client, path, text| {
            self.memory.seen = client.seen().clone().narrowed(&["targets", &role]);
            if let Some(text) = text.filter(|_| keep) {
                files.insert(path.to_owned(), text);
            }
        })
        .await;
        self.keep();
        fetched?;
        let verified = self.take(client.finish()?, release, files)?;
        // Not of what was kept on a disk: that may be older than the key that the site's servers have now.
        self.pins.set(&verified.site.agent_api.keys);
        if self.memory.directed_by(&verified.site) {
            self.now = self.boot.built;
        }
        // Signed offline with the release: it is at least so late.
        self.move_clock(self.boot.built.max(verified.manifest.built));
        self.note_stale(&verified);
        self.keep();
        Ok(verified)
    }

    /// Verifies a release and its assignment by what was kept of them, without a boot server: the same checks, against
    /// the trust root in this boot image, but for those that only a server can answer (freshness) and those that look
    /// forward: versions may be lower than the highest seen, because the machine returns to what it was assigned, maybe by
    /// a director that was replaced since. The floor binds, and it must be what this machine kept of the release last: whoever has
    /// the disk has older ones too. It `settles` which one that is where several may lie there: not while one is being written.
    pub fn verify_record(
        &mut self,
        release: &ReleaseId,
        record: &Record,
        settles: bool,
    ) -> Result<(Verified, Assignment)> {
        let site_path = TargetPath::site();
        let manifest_path = TargetPath::manifest(release.image.as_str(), release.release)?;
        let mut client = tuf::Client::new(
            self.boot.trust_root.as_bytes(),
            tuf::Seen::default(),
            self.now,
            Limits::default(),
            ExpiryPolicy::ReportStale,
            vec![site_path, manifest_path],
        )?;
        while let Request::Fetch { path, max_bytes, may_be_absent } = client.next() {
            let kept = record.files.get(&path);
            client.feed(match kept {
                Some(text) if text.len() as u64 <= max_bytes => Fetched::Bytes(text.clone().into_bytes()),
                Some(_) => Fetched::TooLong,
                None if may_be_absent => Fetched::Absent,
                None => {
                    let reason = "it was not kept".to_owned();
                    return Err(AgentError::Format { path: path.into(), reason });
                }
            })?;
        }
        let verified = self.take(client.finish()?, release, record.files.clone())?;
        let (assigned, _) = verified.site.verify_director::<Assignment>(record.assignment.as_bytes())?;
        let key = self.key_id();
        let me = Running {
            key: &key,
            arch: crate::facts::architecture(),
            image: &release.image,
            highest_sequence: 0,
            floor: self.memory.floor(release.image.as_str()),
        };
        check_assignment(&assigned, &me)?;
        // An order's release is never put on a disk: only the boot server can hand on the order.
        if verified.manifest.class != Class::Normal.as_str() {
            return Err(AgentError::Class { release: release.to_string(), class: verified.manifest.class });
        }
        if assigned.release_id() != *release || assigned.manifest_sha256.as_str() != verified.manifest_sha256 {
            let (expected, got) = (verified.manifest_sha256, assigned.manifest_sha256.to_string());
            return Err(AgentError::ManifestMismatch { expected, got });
        }
        let (label, digest) = (Label::of(&content(&verified.manifest)?.root_hash), record.digest());
        let is_it = if settles {
            self.memory.found_record(&label, &digest)
        } else {
            self.memory.may_find_record(&label, &digest)
        };
        if !is_it {
            return Err(AgentError::OtherRecord { release: release.to_string() });
        }
        self.keep();
        self.note_stale(&verified);
        Ok((verified, assigned))
    }

    /// Before a record with this digest is written for a release: a boot without a server believes no other. `slots`: what they
    /// hold until then. Whether it is stored: else such a boot believes what was there before.
    pub fn expect_record(&mut self, manifest: &Manifest, digest: &str, slots: [Option<Label>; 2]) -> Result<bool> {
        let slots: Vec<Label> = slots.into_iter().flatten().collect();
        self.memory.expect_record(&Label::of(&content(manifest)?.root_hash), digest, &slots);
        Ok(self.keep())
    }

    /// Stores what is remembered, and says whether it is. A place that takes it no more (firmware's store is full, the TPM refuses)
    /// ends no boot: what was heard counts for this one, and its copy in /run for the service. What must not be done without a
    /// mark of it is not done ([`Self::take_order`]).
    pub fn keep(&mut self) -> bool {
        let stored = self.place.remember(&self.memory);
        let was_kept = std::mem::replace(&mut self.is_kept, stored.is_ok());
        if let (Err(error), true) = (stored, was_kept) {
            self.unkept = Some(error);
        }
        self.is_kept
    }

    /// Before a report: how old what was verified is, and whether it will be remembered. That it will not be is told once.
    pub fn say(&mut self, journal: &mut Journal) {
        journal.state.stale.clone_from(&self.stale);
        if self.is_shown != self.is_kept {
            self.is_shown = self.is_kept;
            let kept = self.is_kept.then(|| self.place.rollback_memory());
            journal.machine.rollback_memory = kept.unwrap_or(RollbackMemory::None);
        }
        if let Some(error) = self.unkept.take() {
            let stage = journal.state.last.map_or(Stage::Start, |(stage, _)| stage);
            journal.failed(stage, &error, 1, Some(Duration::ZERO));
        }
    }

    /// Remembers an order that is about to be followed. One whose mark is not stored is not followed, as it could be given again: the
    /// mark is taken back.
    fn take_order(&mut self, order: &Order, sequence: u64) -> Result<()> {
        if self.memory.orders.get(order.id.as_str()).is_some_and(|mark| mark.sequence == sequence) {
            return Ok(());
        }
        let before = self.memory.clone();
        self.memory.take_order(order, sequence, self.now)?;
        let Err(error) = self.place.remember(&self.memory) else { return Ok(()) };
        self.memory = before;
        // The copy as well.
        self.keep();
        Err(AgentError::OrderUnkept { reason: error.to_string() })
    }

    fn note_stale(&mut self, verified: &Verified) {
        self.stale = verified.stale_at(self.now).map(|(file, expires)| Stale { file, expires });
    }

    /// What a finished update says of the site and the release.
    fn take(&mut self, outcome: Outcome, release: &ReleaseId, files: BTreeMap<String, String>) -> Result<Verified> {
        let site_path = TargetPath::site();
        let manifest_path = TargetPath::manifest(release.image.as_str(), release.release)?;
        let site = Site::read(target(&outcome, &site_path)?)?;
        if site.agent_api.ca_pem.trim() != self.boot.site.agent_api_ca_pem.trim() {
            return Err(AgentError::AgentApiCa);
        }
        let manifest_bytes = target(&outcome, &manifest_path)?;
        let manifest = Manifest::read(manifest_bytes, release.image.as_str(), release.release)?;
        self.memory.hear_floors(&site.floors, [&self.boot.image, release.image.as_str()], &self.held);
        self.keep();
        let manifest_sha256 = hex::sha256(manifest_bytes);
        Ok(Verified { site, manifest, manifest_sha256, files, outcome })
    }

    /// Verifies a reply to a report that carried `nonce`.
    pub fn check_reply(&mut self, verified: &Verified, reply: Reply, nonce: &Nonce) -> Result<Answer> {
        self.order = None;
        let order = match reply.desired.order {
            Some(given) => Some(self.read_order(verified, &given, nonce)?),
            None => None,
        };
        if let Some(order) = order.as_ref().filter(|order| matches!(order.action, OrderAction::Wipe { .. })) {
            self.check_order(order, WIPING)?;
            self.take_order(order, WIPING)?;
            return Ok(Answer::Wipe(order.clone()));
        }
        let (assignment, freshness, via, grant) = match reply.desired.decision {
            Decision::Wait { reason } => return Ok(Answer::Wait(reason)),
            Decision::Assigned { assignment, freshness, via, grant } => (assignment, freshness, via, grant),
        };
        let (assigned, sha256) = verified.site.verify_director::<Assignment>(assignment.as_bytes())?;
        if let Some(order) = &order {
            self.check_order(order, assigned.sequence)?;
        }
        let order = order.filter(|order| order.release().as_ref() == Some(&assigned.release_id()));
        let key = self.key_id();
        // An order may name another image, and whoever runs an order's release may be sent home to any ordinary one.
        let free = order.is_some() || self.boot.class != Class::Normal.as_str();
        let image = if free { assigned.image.clone() } else { parse_image(&self.boot.image)? };
        let me = Running {
            key: &key,
            arch: crate::facts::architecture(),
            image: &image,
            highest_sequence: self.memory.sequence,
            // That of an image which this machine never was is remembered once it is sent there.
            floor: self.memory.floor(image.as_str()).max(verified.site.floor(image.as_str())),
        };
        check_assignment(&assigned, &me)?;
        let known = &verified.manifest;
        if assigned.release_id() == release_id(&known.image, known.release)? {
            if assigned.manifest_sha256.as_str() != verified.manifest_sha256 {
                let (expected, got) = (verified.manifest_sha256.clone(), assigned.manifest_sha256.to_string());
                return Err(AgentError::ManifestMismatch { expected, got });
            }
            may_run(order.as_ref(), known)?;
        }
        let (fresh, _) = verified.site.verify_director::<Freshness>(freshness.as_bytes())?;
        check_freshness(&fresh, nonce, &sha256.parse().expect("a SHA-256 in hex"))?;
        if let Some(order) = &order {
            self.take_order(order, assigned.sequence)?;
        }
        self.memory.hear_floors(&verified.site.floors, [&self.boot.image, image.as_str()], &self.held);
        self.memory.accept(&assigned);
        self.accepted = Some(assignment);
        self.settings.clone_from(&assigned.settings);
        self.order = order;
        self.move_clock(fresh.now.min(verified.outcome.offline_expires_newest));
        self.note_stale(verified);
        self.keep();
        Ok(Answer::Assigned { assignment: assigned, via, grant })
    }

    /// Key id of this machine's identity key.
    pub fn key_id(&self) -> KeyId {
        spki_key_id(&spki_der(&self.key)).parse().expect("a SHA-256 in hex is a key id")
    }

    /// An order that operators signed and that the director hands on now. The director's clock comes with it.
    fn read_order(&mut self, verified: &Verified, given: &OrderGiven, nonce: &Nonce) -> Result<Order> {
        let (order, sha256) = verified.site.verify_operator::<Order>(given.order.as_bytes(), ORDER_TYPE)?;
        let (fresh, _) = verified.site.verify_director::<Freshness>(given.freshness.as_bytes())?;
        check_freshness(&fresh, nonce, &sha256.parse().expect("a SHA-256 in hex"))?;
        self.move_clock(fresh.now.min(verified.outcome.offline_expires_newest));
        Ok(order)
    }

    fn check_order(&self, order: &Order, sequence: u64) -> Result<()> {
        // A machine that keeps a key answers to nothing else.
        let (storage, memory) = (self.place.key_storage(), self.place.rollback_memory());
        let name = match storage {
            KeyStorage::Ephemeral => Some(crate::facts::read(storage, memory)?.id),
            KeyStorage::Tpm | KeyStorage::EfiVariable | KeyStorage::File => None,
        };
        let (key, mark) = (self.key_id(), self.memory.mark(order));
        let me = Ordered { key: &key, name_only: name.as_ref(), now: self.now, mark, sequence };
        Ok(check_order(order, &me)?)
    }

    /// Whether this release may be started here: one that is not of class `normal` only by an operator's order.
    pub fn may_run(&self, manifest: &Manifest) -> Result<()> {
        may_run(self.order.as_ref(), manifest)
    }

    /// What is assigned now must not be put on a disk: the loader would start it again without the order.
    pub fn in_memory_only(&self) -> bool {
        let class = |order: &Order| match order.action {
            OrderAction::Assign { class, .. } => Some(class),
            OrderAction::Wipe { .. } => None,
        };
        self.order.as_ref().and_then(class).is_some_and(|class| class != Class::Normal)
    }

    /// A wipe is done: never again by this order.
    pub fn wiped(&mut self, order: &Order) -> Result<()> {
        self.take_order(order, 0)
    }

    /// Moves the time floor; it is persisted at most once a day, as storage wears.
    fn move_clock(&mut self, now: Timestamp) {
        if now <= self.now {
            return;
        }
        self.now = now;
        self.clock.set(now);
        let day = 24 * 60 * 60;
        if self.memory.time_floor.is_none_or(|old| now.as_second() - old.as_second() >= day) {
            self.memory.time_floor = Some(now);
        }
    }

    /// What is known of time, for [`crate::plan::decide`].
    pub fn currency(&self, verified: &Verified) -> Currency {
        Currency { now: self.now, stale: verified.stale_at(self.now) }
    }
}

fn may_run(order: Option<&Order>, manifest: &Manifest) -> Result<()> {
    let (release, class) = (release_id(&manifest.image, manifest.release)?, manifest.class.clone());
    let allowed = class == Class::Normal.as_str() || order.is_some_and(|order| order.allows(&release, &class));
    if allowed { Ok(()) } else { Err(OrderError::Missing { release: release.to_string(), class }.into()) }
}

/// Feeds the client until it has all it wants; `seen` is told after each file, and given it as text.
async fn fetch_all(
    base: &str,
    client: &mut tuf::Client,
    seen: &mut dyn FnMut(&tuf::Client, &str, Option<String>),
) -> Result<()> {
    let mut documents = Documents::of(base);
    loop {
        let Request::Fetch { path, max_bytes, may_be_absent } = client.next() else { return Ok(()) };
        let mut text = None;
        let fetched = match documents.get(&path, max_bytes).await {
            Ok(Some(bytes)) => {
                text = String::from_utf8(bytes.clone()).ok();
                Fetched::Bytes(bytes)
            }
            Ok(None) if may_be_absent => Fetched::Absent,
            // A file that is listed but not there: a repository half copied, or one that hides it. Like no answer.
            Ok(None) => return Err(AgentError::HttpStatus { url: format!("{base}/{path}"), status: 404 }),
            Err(AgentError::TooLong { .. }) => Fetched::TooLong,
            Err(error) => return Err(error),
        };
        let fed = client.feed(fetched);
        seen(client, &path, text);
        fed?;
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

#[cfg(test)]
mod tests;
