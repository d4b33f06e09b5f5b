//! Everything the server remembers of one machine.

use crate::acceptance::{AcceptanceRun, Demand};
use crate::attestation::Attestations;
use crate::bootloop::BootLoop;
use crate::boots::Boot;
use crate::classes::{HardwareClass, Proofs, ProvenBy};
use crate::clones::PastBoots;
use crate::condition::KnownCondition;
use crate::drift::{DriftPolicy, KnownDrift};
use crate::expected::Comparison;
use crate::grant::Limits;
use crate::held::HeldBoot;
use crate::orders::{Errand, MachineOrder};
use crate::secrets::SecretsPolicy;
use crate::state::{State, StateKind};
use crate::{FORGET_MS, LIVE_MS, Millis};
use kiln_protocol::{
    AgentMemory, ApprovalCode, DbxState, ExecState, Health, KeyId, MachineFacts, MachineId, OrderId, Prefetch,
    ReleaseId, RunningRelease, SecretVersions, Stage, StageState, Via,
};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

/// The one answer to "which release does this machine run".
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assigned {
    /// Which release.
    pub release: ReleaseId,
    /// Only ever grows for one machine.
    pub sequence: u64,
    /// How to get there.
    pub via: Via,
    /// By kexec only where that was shown to work: a person left the way to the server.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub auto: bool,
    /// The operator's order that it rests on, for a release that is not of class `normal`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub order: Option<OrderId>,
    /// Sequence from which on it has to have been put up; 0: none.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub rebuild: u64,
}

impl Assigned {
    /// What the server assigns by itself: through firmware, which needs nothing that was shown before.
    pub(crate) fn cold(release: ReleaseId, sequence: u64) -> Self {
        Self { release, sequence, via: Via::Cold, auto: false, order: None, rebuild: 0 }
    }
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde's signature
fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// A release this machine is not offered again until a person clears it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// Which.
    pub release: ReleaseId,
    /// Why.
    pub reason: String,
}

/// One machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// SMBIOS UUID.
    pub id: MachineId,
    /// The name a person gave it.
    pub name: Option<String>,
    /// The name it had before it was retired, which is free since then.
    #[serde(default)]
    pub former_name: Option<String>,
    /// Its role.
    pub role: Option<String>,
    /// Where it stands.
    pub state: State,
    /// Its identity key, from its first report on.
    pub key: Option<KeyId>,
    /// The only key that may speak for it, where the configuration names one; not stored.
    #[serde(skip)]
    pub pinned: Option<KeyId>,
    /// A person took its key away: nobody who holds it is heard. Kept by the caller; not stored here.
    #[serde(skip)]
    pub key_revoked: bool,
    /// Why what is assigned to it is not signed for it, as the caller found when it was asked last; not stored.
    #[serde(skip)]
    pub unsigned: Option<String>,
    /// Where its packets enter the network, by which it was approved: only there a new key may speak for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub position: Option<String>,
    /// Where whoever reports under its id was heard lately, by a trusted relay. Kept by the caller; not stored.
    #[serde(skip)]
    pub heard_at: Option<String>,
    /// The key of the boot before, of a machine that makes a new one at each boot.
    pub previous_key: Option<KeyId>,
    /// Keys that reported under this id and are not the machine's, the first and then the newest last; at most [`crate::STRANGERS_KEPT`].
    /// [`crate::Event::Adopt`] makes one the machine's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub strangers: Vec<KeyId>,
    /// Of these, the keys of those that can use no TPM, by their own word, while the machine's own key is sealed in one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub without_tpm: Vec<KeyId>,
    /// A person ended its quarantine: in whichever boot its key speaks next, that is the machine's.
    #[serde(default)]
    pub any_boot: bool,
    /// The approval code of an introduction, and the key that introduced itself; not stored.
    #[serde(skip)]
    pub code: Option<(KeyId, ApprovalCode)>,
    /// What it says it is.
    pub facts: Option<MachineFacts>,
    /// What it shall run.
    pub assigned: Option<Assigned>,
    /// Releases that became healthy here in a boot that firmware began, the newest last; few.
    pub good: Vec<ReleaseId>,
    /// The release that was healthy here and that only a kexec has started so far: it is good once firmware has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub carried: Option<ReleaseId>,
    /// Under which sequence it left, and how: from its agent's word that it goes until its next boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left_by: Option<(u64, Via)>,
    /// Starts of a good release that were in vain.
    #[serde(default)]
    pub boot_loop: BootLoop,
    /// Lowest release of each image that may run, by the site's signed word; not stored.
    #[serde(skip)]
    pub floors: Arc<BTreeMap<String, u64>>,
    /// Releases that the repository holds and the site has not revoked: it goes back to no other; none: not known. Not stored.
    #[serde(skip)]
    pub fit: Option<Arc<BTreeSet<ReleaseId>>>,
    /// Releases quarantined for this machine.
    pub refused: Vec<Refused>,
    /// Boots of the assigned trial without *healthy*, counted from DISCOVER to download.
    pub attempts: u32,
    /// It asked for a boot program and has not begun to download one.
    pub asked: bool,
    /// By when the boot that goes on must have become healthy; kept while it is degraded, none once it was healthy.
    #[serde(default)]
    pub healthy_by: Option<Millis>,
    /// What its UKI embeds.
    pub embedded: Option<RunningRelease>,
    /// What runs, read back from its kernel; none before the hand-over.
    pub running: Option<RunningRelease>,
    /// Its own last judgement, in this boot.
    pub health: Option<Health>,
    /// How far it is with the next release.
    pub prefetch: Option<Prefetch>,
    /// What its agent costs, as it last said in this boot.
    #[serde(default)]
    pub agent_memory: Option<AgentMemory>,
    /// What its allow-list of programs says, in this boot.
    #[serde(default)]
    pub exec: Option<ExecState>,
    /// What its firmware has of the site's list of revoked boot programs, as it last said. It outlives its boots.
    #[serde(default)]
    pub dbx: Option<DbxState>,
    /// Drift, draining, and what happened on it.
    #[serde(default)]
    pub condition: KnownCondition,
    /// What the list of expected machines says of it; none: the site has no list, or nothing was compared yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub comparison: Option<Comparison>,
    /// Of which class its hardware is, by its newest inventory; none: none came that says it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class: Option<HardwareClass>,
    /// How it came up on which releases with this firmware, the newest last; at most [`crate::CAME_UP_KEPT`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub came_up: Vec<ProvenBy>,
    /// What the machines of its class have shown. Kept by the caller; not stored.
    #[serde(skip)]
    pub proofs: Arc<Proofs>,
    /// The newest acceptance run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub acceptance: Option<AcceptanceRun>,
    /// It was approved, and has neither passed an acceptance run nor worked in the fleet since; or it failed one.
    #[serde(default)]
    pub unproven: bool,
    /// What it shall run when its acceptance run is passed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub home: Option<ReleaseId>,
    /// What its role asks of new hardware, by the configuration; not stored.
    #[serde(skip)]
    pub demand: Demand,
    /// Sequence of the assignment it may leave for.
    pub granted: Option<u64>,
    /// Why it fell back, until a person clears it or assigns something.
    pub fell_back: Option<String>,
    /// Why a person excused its absence, until it does its work again.
    #[serde(default)]
    pub excused: Option<String>,
    /// The last thing it said that a person would want to read.
    pub last_words: String,
    /// Its last report, or packet.
    pub last_seen: Millis,
    /// When the agent of the newest boot reported last; none while it is silent, or after it said that it leaves.
    #[serde(default)]
    pub agent_seen: Option<Millis>,
    /// When its newest boot last reported, since the server started.
    #[serde(default)]
    pub reported: Option<Millis>,
    /// Firmware packets that came in its name while its agent spoke; at most [`crate::HELD_KEPT`] boots.
    #[serde(default)]
    pub held_packets: Vec<HeldBoot>,
    /// What its TPM proved.
    #[serde(default)]
    pub attestations: Attestations,
    /// Its role gives releases only to attested boots, by the configuration; not stored.
    #[serde(skip)]
    pub attested_only: bool,
    /// What its role demands before it gives secrets, by the configuration; not stored.
    #[serde(skip)]
    pub secrets_policy: SecretsPolicy,
    /// The secrets that it holds, by its own word.
    #[serde(default)]
    pub secrets: SecretVersions,
    /// The boot that ends when it is put up anew.
    #[serde(default)]
    pub rebuilding: Option<String>,
    /// Why it is put up anew: its age, its drift.
    #[serde(default = "crate::rebuild::age")]
    pub rebuild_for: String,
    /// What is remembered of its drift.
    #[serde(default)]
    pub drift: KnownDrift,
    /// What its role says of drift, by the configuration; not stored.
    #[serde(skip)]
    pub drift_policy: DriftPolicy,
    /// The age that its role allows, by the configuration; not stored.
    #[serde(skip)]
    pub max_age: Option<Millis>,
    /// Operators' orders that it was given, the newest last; at most [`crate::ORDERS_KEPT`].
    #[serde(default)]
    pub orders: VecDeque<MachineOrder>,
    /// Its boots, the newest last. Stored apart.
    #[serde(skip)]
    pub boots: VecDeque<Boot>,
    /// What is remembered of those before them, since the server started; not stored.
    #[serde(skip)]
    pub past: PastBoots,
}

impl Machine {
    /// One that was just seen for the first time.
    pub fn discovered(id: MachineId, now: Millis) -> Self {
        let reason = format!(
            "nobody has approved it: run `kiln machine approve {id} --role ROLE`, or list it under [[machine]] in kiln.toml"
        );
        Self {
            id,
            name: None,
            former_name: None,
            role: None,
            state: State { kind: StateKind::Discovered, reason, since: now, deadline: Some(now + FORGET_MS) },
            key: None,
            pinned: None,
            key_revoked: false,
            unsigned: None,
            position: None,
            heard_at: None,
            previous_key: None,
            strangers: Vec::new(),
            without_tpm: Vec::new(),
            any_boot: false,
            code: None,
            facts: None,
            assigned: None,
            good: Vec::new(),
            carried: None,
            left_by: None,
            boot_loop: BootLoop::default(),
            floors: Arc::default(),
            fit: None,
            refused: Vec::new(),
            attempts: 0,
            asked: false,
            healthy_by: None,
            embedded: None,
            running: None,
            health: None,
            prefetch: None,
            agent_memory: None,
            exec: None,
            dbx: None,
            condition: KnownCondition::default(),
            comparison: None,
            class: None,
            came_up: Vec::new(),
            proofs: Arc::default(),
            acceptance: None,
            unproven: false,
            home: None,
            demand: Demand::default(),
            granted: None,
            fell_back: None,
            excused: None,
            last_words: String::new(),
            last_seen: now,
            agent_seen: None,
            reported: None,
            held_packets: Vec::new(),
            attestations: Attestations::default(),
            attested_only: false,
            secrets_policy: SecretsPolicy::default(),
            secrets: SecretVersions::new(),
            rebuilding: None,
            rebuild_for: crate::rebuild::age(),
            drift: KnownDrift::default(),
            drift_policy: DriftPolicy::default(),
            max_age: None,
            orders: VecDeque::new(),
            boots: VecDeque::new(),
            past: PastBoots::default(),
        }
    }

    /// Its name before people.
    pub fn title(&self) -> &str {
        self.name.as_deref().or(self.former_name.as_deref()).unwrap_or(self.id.as_str())
    }

    /// The newest release that became healthy here, is not quarantined and not below its floor, and that it can be given.
    pub fn last_good(&self) -> Option<&ReleaseId> {
        self.good.iter().rev().find(|r| self.may_go_back_to(r))
    }

    /// The same, also if the repository does not hold it any more, or the site revoked it: its own boot loader may have it.
    pub fn last_good_here(&self) -> Option<&ReleaseId> {
        self.good.iter().rev().find(|r| self.is_good_still(r))
    }

    fn is_good_still(&self, release: &ReleaseId) -> bool {
        let floor = self.floors.get(release.image.as_str()).copied().unwrap_or(1);
        release.release >= floor && !self.is_refused(release)
    }

    fn may_go_back_to(&self, release: &ReleaseId) -> bool {
        self.is_good_still(release) && self.fit.as_ref().is_none_or(|fit| fit.contains(release))
    }

    /// The same, if it is another than what is assigned: where it goes when that is given up.
    pub(crate) fn way_back(&self) -> Option<&ReleaseId> {
        let assigned = self.assigned.as_ref().map(|a| &a.release);
        self.good.iter().rev().find(|r| self.may_go_back_to(r) && Some(*r) != assigned)
    }

    /// It left for another release, by the last that was heard.
    pub(crate) fn is_reimaging(&self) -> bool {
        self.state.kind == StateKind::Reimaging
    }

    /// It was let go and has not said that it goes.
    pub(crate) fn may_leave_now(&self) -> bool {
        self.state.kind == StateKind::Draining
    }

    /// The release is quarantined for this machine.
    pub fn is_refused(&self, release: &ReleaseId) -> bool {
        self.refused.iter().any(|r| r.release == *release)
    }

    /// What is assigned has not been healthy here yet in a boot that firmware began.
    pub fn is_trial(&self) -> bool {
        self.assigned.as_ref().is_some_and(|a| !self.good.contains(&a.release))
    }

    /// What its firmware is given to boot; none: what an unknown machine gets. Asking changes nothing: a trial that had
    /// its `limit` boots, those that are not confirmed yet included, is answered with the last-known-good release also
    /// before [`crate::Event::Asked`] assigns it. So is a good release whose agent never speaks (`mute.rs`).
    pub fn boot_release(&self, limit: u32) -> Option<&ReleaseId> {
        if !self.state.kind.in_fleet() {
            return None;
        }
        let assigned = self.assigned.as_ref().map(|a| &a.release);
        let attempts = self.attempts_if_believed() + u32::from(self.jumped());
        let spent = self.is_trial() && attempts >= limit;
        if spent { self.last_good().or(assigned) } else { self.in_its_place().or(assigned) }
    }

    /// It does its work: seen healthy, and nothing since says otherwise.
    pub fn is_available(&self) -> bool {
        match self.state.kind {
            StateKind::Healthy => true,
            StateKind::FellBack => self.says_healthy(),
            StateKind::Discovered
            | StateKind::Approved
            | StateKind::Booting
            | StateKind::Degraded
            | StateKind::Unreachable
            | StateKind::Draining
            | StateKind::Reimaging
            | StateKind::Quarantined
            | StateKind::Retired => false,
        }
    }

    /// It is one of those whose absence counts against the limit.
    pub fn counts(&self) -> bool {
        self.state.kind.in_fleet() && self.excused.is_none() && !self.awaits_acceptance()
    }

    /// It speaks, does not do its work, and is not let go: it stays where it is.
    pub(crate) fn is_up_unwell(&self) -> bool {
        let may_go = self.assigned.as_ref().is_some_and(|a| self.granted == Some(a.sequence));
        match self.state.kind {
            StateKind::Degraded | StateKind::FellBack => !may_go && !self.is_available(),
            StateKind::Discovered
            | StateKind::Approved
            | StateKind::Booting
            | StateKind::Healthy
            | StateKind::Unreachable
            | StateKind::Draining
            | StateKind::Reimaging
            | StateKind::Quarantined
            | StateKind::Retired => false,
        }
    }

    pub(crate) fn says_healthy(&self) -> bool {
        self.running.is_some() && self.health.as_ref().is_some_and(|h| h.healthy)
    }

    /// What runs, or failing that what its UKI embeds.
    pub fn current(&self) -> Option<&RunningRelease> {
        self.running.as_ref().or(self.embedded.as_ref())
    }

    /// Releases that it runs, or may come to without anybody's asking anew: what it is assigned, where it would go back to,
    /// and where an open order or a passed acceptance run takes it.
    pub fn needs(&self) -> BTreeSet<ReleaseId> {
        let current = self.current().map(|r| ReleaseId { image: r.image.clone(), release: r.release });
        let assigned = self.assigned.as_ref().map(|assigned| &assigned.release);
        let ordered = self.orders.iter().filter(|order| order.is_open()).filter_map(|order| match &order.errand {
            Errand::Run { release, .. } => Some(release),
            Errand::Wipe => None,
        });
        let known = [assigned, self.last_good(), self.home.as_ref()];
        known.into_iter().flatten().chain(ordered).cloned().chain(current).collect()
    }

    /// Runs (or boots) exactly what is assigned, put up as it should be.
    pub fn runs_assigned(&self) -> bool {
        if self.rebuilding.is_some() {
            return false;
        }
        match (self.current(), &self.assigned) {
            (Some(c), Some(a)) => c.image == a.release.image && c.release == a.release.release,
            (None, _) | (_, None) => false,
        }
    }

    /// When a [`crate::Event::Tick`] has something to do, if nothing happens before.
    pub fn due(&self, limits: Limits) -> Option<Millis> {
        let held = self.agent_seen.filter(|_| !self.held_packets.is_empty()).map(|heard| heard + LIVE_MS);
        let renewed = [self.rebuild_due(), self.drift_due()];
        let others = [self.state.deadline, held, self.given_up_at(), self.silent_at(limits), self.order_due()];
        others.into_iter().chain(renewed).chain([self.boot_loop.rests_until]).flatten().min()
    }

    /// The newest step that shows where it is, and since when.
    pub fn stage(&self) -> Option<(Stage, &StageState, Millis)> {
        self.boots.back().and_then(|b| b.stages.last()).map(|s| (s.stage, &s.state, s.at))
    }

    pub(crate) fn next_sequence(&self) -> u64 {
        self.assigned.as_ref().map_or(1, |a| a.sequence + 1)
    }
}

/// The words of a stage, if it says more than its label.
pub(crate) fn words(stage: Stage, state: &StageState) -> Option<String> {
    match state {
        StageState::Failed(f) => Some(crate::boots::cut(&format!("{}: {}", stage.label(), f.message))),
        StageState::Waiting { reason } => Some(crate::boots::cut(reason)),
        StageState::Started | StageState::Done => None,
    }
}
