//! Machines, reports and stories about them.
#![allow(dead_code, clippy::unwrap_used)]

use kiln_fleet::*;
use kiln_protocol::*;
use proptest::prelude::*;

pub const LIMIT: u32 = 3;
pub const LIMITS: Limits =
    Limits { max_unavailable: 1, trial_attempts: LIMIT, firmware_patience: FIRMWARE_PATIENCE_MS };

pub fn id(n: u8) -> MachineId {
    format!("00000000-0000-0000-0000-0000000000{n:02x}").parse().unwrap()
}
pub fn key(n: u8) -> KeyId {
    format!("{n:02x}").repeat(32).parse().unwrap()
}
pub fn root(release: u64) -> Sha256Hex {
    format!("{release:02x}").repeat(32).parse().unwrap()
}
pub fn rel(release: u64) -> ReleaseId {
    format!("minimal/{release}").parse().unwrap()
}

pub fn report(machine: u8, boot: &str, seq: u64, release: u64) -> Report {
    Report {
        boot_id: boot.into(),
        seq,
        machine: MachineFacts {
            id: id(machine),
            macs: vec!["52:54:00:00:00:01".into()],
            product: "QEMU".into(),
            serial: String::new(),
            firmware: Firmware::Uefi,
            arch: Architecture::X86_64,
            key_storage: KeyStorage::EfiVariable,
            rollback_memory: RollbackMemory::EfiVariable,
            protection: ProtectionClass::Unprotected,
            memory_bytes: 1 << 30,
            tpm: None,
        },
        nonce: "00".repeat(32).parse().unwrap(),
        embedded: RunningRelease { image: "minimal".parse().unwrap(), release, root_hash: root(release) },
        running: None,
        stages: vec![],
        at_ms: seq * 1000,
        health: None,
        prefetch: None,
        fallback: None,
        agent_memory: None,
        exec: None,
        dbx: None,
        condition: None,
        acceptance: None,
        secrets: None,
        stale: None,
        wait_s: 0,
        desired_etag: String::new(),
    }
}

pub fn healthy(machine: u8, boot: &str, seq: u64, release: u64) -> Report {
    let mut r = report(machine, boot, seq, release);
    r.running = Some(r.embedded.clone());
    r.health = Some(Health { healthy: true, detail: String::new() });
    r
}

/// Up, and a check fails.
pub fn unwell(machine: u8, boot: &str, seq: u64, release: u64) -> Report {
    let mut r = healthy(machine, boot, seq, release);
    r.health = Some(Health { healthy: false, detail: "systemd is degraded; failed: web.service".into() });
    r
}

/// The agent goes to the release that is assigned.
pub fn going(machine: u8, boot: &str, seq: u64, release: u64) -> Report {
    let mut r = healthy(machine, boot, seq, release);
    r.stages = vec![StageRecord { stage: Stage::Going, state: StageState::Started, at_ms: r.at_ms }];
    r
}

/// The agent in the initramfs restarts the machine.
pub fn gives_up(machine: u8, boot: &str, seq: u64, release: u64) -> Report {
    let mut r = report(machine, boot, seq, release);
    let failure = Failure { kind: "k".into(), message: "does not verify".into(), attempt: 3, retry_in_ms: None };
    r.stages = vec![StageRecord { stage: Stage::Root, state: StageState::Failed(failure), at_ms: r.at_ms }];
    r
}

pub fn by(k: u8, report: Report) -> Event {
    let published_root = report.running.as_ref().map(|r| root(r.release));
    Event::Report(Box::new(Reported { key: key(k), report, published_root }))
}

/// A machine under test, with its time.
pub struct Story {
    pub m: Machine,
    pub now: Millis,
    pub last: Vec<Action>,
}

impl Story {
    pub fn new() -> Self {
        Self { m: Machine::discovered(id(1), 1_000_000), now: 1_000_000, last: vec![] }
    }
    pub fn then(&mut self, event: Event) -> &mut Self {
        self.now += 1_000;
        let (m, out) = self.m.clone().event(event, LIMITS, self.now);
        (self.m, self.last) = (m, out);
        self
    }
    pub fn wait(&mut self, ms: u64) -> &mut Self {
        self.now += ms;
        self.then(Event::Tick)
    }
    pub fn is(&mut self, kind: StateKind) -> &mut Self {
        assert_eq!(self.m.state.kind, kind, "{}", self.m.state.reason);
        self
    }
    pub fn approve(&mut self) -> &mut Self {
        self.then(Event::Approve { name: "rack-1".into(), role: "lab".into(), release: rel(1) })
    }
    pub fn good_on_1() -> Self {
        let mut s = Self::new();
        s.then(Event::Asked).then(Event::Downloads(rel(1))).then(Event::Downloaded);
        s.then(by(1, report(1, "a", 1, 1))).is(StateKind::Discovered).approve().is(StateKind::Booting);
        s.then(by(1, healthy(1, "a", 2, 1))).is(StateKind::Healthy);
        s
    }
    pub fn assign(&mut self, release: u64, via: Via) -> &mut Self {
        self.then(Event::Assign { release: rel(release), via: via.into() })
    }
    /// It reports so every 30 s, for so long; a tick comes whenever one is due.
    pub fn reports_for(&mut self, ms: u64, mut report: impl FnMut(u64) -> Report) -> &mut Self {
        let end = self.now + ms;
        while self.now < end {
            let seq = self.m.boots.back().map_or(1, |b| b.seq + 1);
            self.then(by(1, report(seq)));
            let next = (self.now + 29_000).min(end);
            while let Some(due) = self.m.due(LIMITS).filter(|due| *due <= next) {
                self.now = due - 1_000;
                self.then(Event::Tick);
            }
            self.now = next;
        }
        self
    }
    /// Its agent says that it goes.
    pub fn leaves(&mut self) -> &mut Self {
        let boot = self.m.boots.back().unwrap();
        let (boot, seq) = (boot.boot_id.clone(), boot.seq + 1);
        let release = self.m.current().unwrap().release;
        self.then(by(1, going(1, &boot, seq, release))).is(StateKind::Reimaging)
    }
    pub fn boots_trial(&mut self, release: u64) -> &mut Self {
        self.then(Event::Asked)
            .then(Event::Asked)
            .then(Event::Downloads(rel(release)))
            .then(Event::Downloads(rel(release)))
    }
}

pub fn any_stage() -> impl Strategy<Value = StageRecord> {
    (0..Stage::ALL.len(), 0..4_u8, any::<u64>()).prop_map(|(s, state, at_ms)| StageRecord {
        stage: Stage::ALL[s],
        state: match state {
            0 => StageState::Started,
            1 => StageState::Done,
            2 => StageState::Waiting { reason: "waits".into() },
            _ => StageState::Failed(Failure { kind: "k".into(), message: "m\n".into(), attempt: 1, retry_in_ms: None }),
        },
        at_ms,
    })
}

pub fn any_event() -> impl Strategy<Value = Event> {
    let release = 1..4_u64;
    let reports = (
        1..3_u8,
        0..6_u8,
        0..9_u64,
        release.clone(),
        any::<bool>(),
        any::<Option<bool>>(),
        any::<bool>(),
        proptest::collection::vec(any_stage(), 0..5),
        0..9_u64,
    )
        .prop_map(|(k, boot, seq, release, up, health, ephemeral, stages, sequence)| {
            let mut r = report(1, &format!("boot{boot}"), seq, release);
            r.stages = stages;
            r.health = health.map(|healthy| Health { healthy, detail: "says so".into() });
            if up {
                r.running = Some(r.embedded.clone());
            }
            if ephemeral {
                r.machine.key_storage = KeyStorage::Ephemeral;
            }
            let image = r.embedded.image.clone();
            r.prefetch = Some(Prefetch { image, release, sequence, ready: true, progress: None });
            by(k, r)
        });
    prop_oneof![
        4 => Just(Event::Asked),
        4 => release.clone().prop_map(|r| Event::Downloads(rel(r))),
        1 => Just(Event::Downloaded),
        1 => Just(Event::TakesBytes),
        8 => reports,
        2 => release.clone().prop_map(|r| Event::Approve { name: "n".into(), role: "r".into(), release: rel(r) }),
        3 => release.prop_map(|r| Event::Assign { release: rel(r), via: Via::Kexec.into() }),
        1 => Just(Event::Granted),
        1 => Just(Event::Clear),
        1 => Just(Event::Retire),
        1 => Just(Event::Excuse { reason: "away".into() }),
        2 => Just(Event::Tick),
        1 => Just(Event::ServerStarted),
    ]
}
