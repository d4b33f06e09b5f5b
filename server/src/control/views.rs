//! A machine as the operator API shows it.

use crate::view::{
    AssignedView, AttestationView, BootView, ConditionView, EventView, MachineView, ReleaseView, StageView,
    protection_words,
};
use kiln_fleet::{Boot, EventAt, KnownCondition, Machine, Millis, StageAt, StateKind};
use kiln_protocol::{ApprovalCode, Sha256Hex, StageState};
use kiln_release::Manifest;

fn signed(ms: Millis) -> i64 {
    i64::try_from(ms).unwrap_or(i64::MAX)
}

impl MachineView {
    /// Of a machine.
    pub fn of(m: &Machine) -> Self {
        let stage = m.stage();
        let current = m.current();
        let facts = m.facts.as_ref();
        let (protection, attestation) = (m.protection(), facts.map(|_| attestation(m)));
        // What it says of itself first; a machine that says nothing is described by the server.
        let last_words = if m.last_words.is_empty() { m.why() } else { m.last_words.clone() };
        Self {
            id: m.id.clone(),
            // A name that was freed may be another's.
            name: m.name.clone().unwrap_or_else(|| m.id.to_string()),
            role: m.role.clone(),
            state: m.state.kind.to_string(),
            reason: match &m.former_name {
                Some(name) => format!("{}; it was {name}", m.why()),
                None => m.why(),
            },
            stage: stage.map(|(s, _, _)| s),
            stage_label: stage.map_or("", |(s, _, _)| s.label()).to_owned(),
            stage_since_ms: stage.map_or(0, |(_, _, at)| signed(at)),
            image: current.map(|c| c.image.to_string()),
            release: current.map(|c| c.release),
            root_hash: m.running.as_ref().map(|c| Sha256Hex::to_string(&c.root_hash)),
            assigned: m.assigned.as_ref().map(|a| AssignedView {
                image: a.release.image.to_string(),
                release: a.release.release,
                sequence: a.sequence,
                via: m.leaves_by(),
                auto: a.auto,
            }),
            rebuild_due_ms: m.rebuild_due().map(signed),
            order: m.orders.back().map(|order| format!("{}: {}", order.id, order.state)),
            prefetch: m.prefetch.clone(),
            agent_memory: m.agent_memory,
            exec: m.exec.clone(),
            dbx: m.dbx.clone(),
            condition: condition(m),
            stale: m.condition.stale.clone(),
            comparison: m.comparison.clone(),
            acceptance: m.acceptance.clone(),
            awaits_acceptance: m.awaits_acceptance(),
            last_good: m.last_good().cloned(),
            needs: m.needs().into_iter().collect(),
            firmware: facts.map(|f| f.firmware),
            class: m.class.as_ref().map(ToString::to_string),
            key: m.key.clone(),
            other_key: m.strangers.last().cloned(),
            other_keys: m.strangers.clone(),
            other_keys_note: m.other_keys_wait(),
            code: code(m),
            key_storage: facts.map(|f| f.key_storage),
            position: m.position.clone(),
            rollback_memory: facts.map(|f| f.rollback_memory),
            protection,
            protection_words: protection_words(protection, attestation.as_ref()),
            secrets: m.secrets.clone(),
            // Who asks for one machine is told.
            certificate: None,
            attestation,
            product: facts.map_or_else(String::new, |f| f.product.clone()),
            serial: facts.map_or_else(String::new, |f| f.serial.clone()),
            macs: facts.map_or_else(Vec::new, |f| f.macs.clone()),
            memory_bytes: facts.map_or(0, |f| f.memory_bytes),
            last_words,
            last_seen_ms: signed(m.last_seen),
            boots: m.boots.iter().map(boot).collect(),
        }
    }
}

/// What its boot can promise and what was proven of it, for people.
pub(super) fn words_of(m: &Machine) -> String {
    protection_words(m.protection(), m.facts.as_ref().map(|_| attestation(m)).as_ref())
}

/// Of the key that would be approved, and only while it waits.
fn code(m: &Machine) -> Option<ApprovalCode> {
    let (of, code) = m.code.as_ref()?;
    (m.state.kind == StateKind::Discovered && m.key.as_ref() == Some(of)).then(|| code.clone())
}

fn attestation(m: &Machine) -> AttestationView {
    let (state, reason) = m.attestation();
    let proof = m.proof();
    AttestationView {
        state,
        reason,
        carried: proof.is_some_and(|proof| proof.carried),
        at_ms: proof.map(|proof| signed(proof.at)),
        endorsement: proof.and_then(|proof| proof.endorsement.clone()),
        approved_endorsement: m.attestations.pinned.as_ref().map(|pinned| pinned.endorsement.clone()),
        option_roms: m.attestations.option_roms.clone(),
    }
}

fn condition(m: &Machine) -> ConditionView {
    let known: &KnownCondition = &m.condition;
    let event =
        |e: &EventAt| EventView { at_ms: signed(e.at), kind: e.kind.clone(), alarm: e.alarm, text: e.text.clone() };
    ConditionView {
        drift: known.drift.clone(),
        drift_count: known.drift_count,
        drift_policy: m.drift_policy.to_string(),
        drift_note: m.drift_words(),
        draining: known.draining.clone(),
        events: known.events.iter().map(event).collect(),
    }
}

fn boot(b: &Boot) -> BootView {
    BootView {
        boot_id: b.boot_id.clone(),
        via: b.via,
        image: b.release.as_ref().map(|r| r.image.to_string()),
        release: b.release.as_ref().map(|r| r.release),
        started_ms: signed(b.started),
        stages: b.stages.iter().map(step).collect(),
    }
}

fn step(s: &StageAt) -> StageView {
    let (state, message, kind) = match &s.state {
        StageState::Started => ("started", None, None),
        StageState::Done => ("done", None, None),
        StageState::Failed(f) => ("failed", Some(f.message.clone()), Some(f.kind.clone())),
        StageState::Waiting { reason } => ("waiting", Some(reason.clone()), None),
    };
    StageView { stage: s.stage, state: state.to_owned(), at_ms: signed(s.at), agent_ms: s.agent_ms, kind, message }
}

impl ReleaseView {
    /// Of a manifest, how many machines run it, and how many need it.
    pub fn of(m: &Manifest, machines: u64, needed_by: u64) -> Self {
        Self {
            image: m.image.clone(),
            release: m.release,
            class: m.class.clone(),
            architecture: m.architecture.clone(),
            root_hash: m.verity.root_hash.clone(),
            root_bytes: m.root.length,
            uki_bytes: m.uki.length,
            built: m.built.to_string(),
            machines,
            needed_by,
        }
    }
}
