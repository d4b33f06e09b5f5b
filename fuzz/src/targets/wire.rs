//! What agents post to the server, and what they read of its replies.

use super::{chosen, stable};
use kiln_protocol::{Report, printable};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Reads one kind of message; the same must come of it with a field that a later version added.
fn message<T: Serialize + DeserializeOwned>(data: &[u8]) -> Option<T> {
    let value: T = serde_json::from_slice(data).ok()?;
    let once = stable(&value);
    if let Ok(Value::Object(mut map)) = serde_json::from_slice::<Value>(data) {
        map.insert("added_later".to_owned(), Value::Bool(true));
        // A key given twice is two fields to serde and one to a map: such a text may be refused here.
        if let Ok(again) = serde_json::from_value::<T>(Value::Object(map.clone())) {
            map.remove("added_later");
            let plain: T = serde_json::from_value(Value::Object(map)).expect("a field more or less");
            assert_eq!(stable(&again), stable(&plain), "an unknown field is ignored");
        }
    }
    assert!(!once.is_empty());
    Some(value)
}

fn shown(text: &str) {
    let safe = printable(text);
    assert_eq!(printable(&safe), safe, "what is printable is printable");
    assert!(!safe.contains(char::is_control));
}

fn golden_report() -> String {
    let text = concat!(
        r#"{"boot_id":"b","seq":1,"machine":{"id":"00000000-0000-0000-0000-000000000001","macs":["52:54:00:00:00:01"],"#,
        r#""product":"p","serial":"","firmware":"uefi","arch":"x86_64","key_storage":"tpm","rollback_memory":"tpm-nv","#,
        r#""protection":"unprotected","memory_bytes":1,"tpm":"ready"},"nonce":"NONCE","#,
        r#""embedded":{"image":"minimal","release":1,"root_hash":"ROOT"},"running":{"image":"minimal","release":1,"#,
        r#""root_hash":"ROOT"},"stages":[{"stage":"root","state":"failed","kind":"k","message":"m","attempt":3,"at_ms":5},"#,
        r#"{"stage":"server","state":"waiting","reason":"r","at_ms":6},{"stage":"health","state":"done","at_ms":7}],"at_ms":9,"health":{"healthy":true,"detail":""},"prefetch":{"image":"minimal","release":2,"#,
        r#""sequence":3,"ready":false,"progress":{"received_bytes":7,"total_bytes":1000}},"fallback":{"release":"#,
        r#"{"image":"minimal","release":2},"sequence":5,"reason":"trial-tries-used-up"},"agent_memory":{"rss_bytes":3,"#,
        r#""peak_bytes":4},"exec":{"running":true,"restarts":1,"alarm":"killed","denied":2,"reported":3,"late":4,"#,
        r#""violations":[{"path":"/srv/x","verdict":"denied","ancestry":[{"pid":7,"comm":"sh","exe":"/usr/bin/sh"}],"#,
        r#""at_ms":5,"count":2}]},"dbx":{"update":"ROOT","dbx":"held","reason":"r"},"condition":{"drift":[{"kind":"#,
        r#""command-line","what":"w","text":"t"}],"drift_count":1,"draining":{"hook":"h","number":1,"of":2,"#,
        r#""since_ms":40000,"left_ms":5},"spool":{"id":"i","confirmed":2,"events":[{"number":3,"age_ms":9,"kind":"drift","#,
        r#""alarm":true,"text":"x"}]}},"acceptance":{"done":true,"doing":"","results":[{"test":"disk","part":"disk 1","#,
        r#""outcome":"failed","detail":"d","measures":{"read_mib_s":7}}]},"wait_s":0,"desired_etag":""}"#,
    );
    text.replace("NONCE", &"aa".repeat(32)).replace("ROOT", &"bb".repeat(32))
}

/// A report, and the server's record of a machine that sends two of them.
pub mod report {
    use super::*;
    use kiln_fleet::{Action, Event, Limits, Machine, Reported};
    use kiln_protocol::{Intake, KeyId};

    const NOW: u64 = 1_800_000_000_000;
    /// A report has at most 256 KiB; the record of a machine is kept in memory for each of a site's machines.
    const RECORD: usize = 512 << 10;

    fn reported(key: &KeyId, report: &Report) -> Event {
        let published_root = report.running.as_ref().map(|running| running.root_hash.clone());
        Event::Report(Box::new(Reported { key: key.clone(), report: report.clone(), published_root }))
    }

    /// What is kept of a machine goes to terminals and pages.
    fn plain(value: &Value) {
        match value {
            Value::String(text) => assert!(!text.contains(char::is_control), "kept of a report: {text:?}"),
            Value::Array(items) => items.iter().for_each(plain),
            Value::Object(map) => map.values().for_each(plain),
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }

    pub fn run(data: &[u8]) {
        let Some(mut report) = message::<Report>(data) else { return };
        // As the server does with all that it takes.
        report.tame();
        let mut twice = report.clone();
        twice.tame();
        assert_eq!(twice, report, "cut to its bounds, it is cut again");
        let key: KeyId = "cd".repeat(32).parse().expect("a key id");
        let (limits, id) = (Limits::default(), report.machine.id.clone());
        let mut machine = Machine::discovered(id, NOW);
        let mut next = report.clone();
        next.seq = report.seq.saturating_add(1);
        let approve = Event::Approve { name: "m".into(), role: "r".into(), release: "minimal/2".parse().expect("one") };
        let later = NOW.saturating_add(60_000);
        for (event, now) in [
            (reported(&key, &report), NOW),
            (approve, NOW),
            (reported(&key, &next), later),
            (Event::Tick, later.saturating_add(3_600_000)),
            (reported(&key, &report), later.saturating_add(3_600_001)),
        ] {
            let (after, actions) = machine.event(event, limits, now);
            assert!(actions.len() < 1000, "{} actions of one event", actions.len());
            for action in &actions {
                if let Action::Say { text, .. } = action {
                    assert!(!text.contains(char::is_control), "a line for the log: {text:?}");
                }
            }
            let record = stable(&after);
            plain(&serde_json::from_slice(&record).expect("JSON"));
            assert!(record.len() < RECORD, "a record of {} bytes", record.len());
            // Boots are stored apart.
            let boots = serde_json::to_value(&after.boots).expect("JSON");
            plain(&boots);
            assert!(boots.to_string().len() < RECORD && after.boots.len() <= kiln_fleet::BOOTS_KEPT);
            machine = after;
        }
        if let Some(condition) = &report.condition {
            let mut intake = Intake::default();
            let (_, first) = intake.take(&condition.spool);
            let (missed, again) = intake.take(&condition.spool);
            assert!(again.is_empty() && missed == 0, "an event is taken once");
            assert!(first.windows(2).all(|pair| pair[0].number < pair[1].number), "in their order");
        }
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        let whole = golden_report();
        let mut small: Value = serde_json::from_str(&whole).expect("JSON");
        let map = small.as_object_mut().expect("an object");
        for name in ["running", "health", "prefetch", "fallback", "exec", "dbx", "condition", "acceptance"] {
            map.remove(name);
        }
        assert!(serde_json::from_str::<Report>(&whole).is_ok(), "a seed that is no report leads nowhere");
        vec![small.to_string().into_bytes(), whole.into_bytes()]
    }
}

/// Every other message between agent and server. The first byte says which.
pub mod wire {
    use super::*;
    use kiln_protocol::{
        ATTESTATION_LIMIT, Acceptance, Attestation, CertificateRequest, Challenge, DbxState, EVENT_LOG_LIMIT,
        ExecState, IMA_LIST_LIMIT, INVENTORY_LIMIT, Introduction, IntroductionReply, Inventory, InventoryReport,
        Judged, LogBatch, LogReply, Reply, cut_at,
    };

    fn tamed<T: Clone + PartialEq + std::fmt::Debug>(value: &T, tame: impl Fn(&mut T)) -> T {
        let mut once = value.clone();
        tame(&mut once);
        let mut twice = once.clone();
        tame(&mut twice);
        assert_eq!(once, twice, "cut to its bounds, it is cut again");
        once
    }

    pub fn run(data: &[u8]) {
        if let Some((choice, rest)) = super::super::choice(data) {
            take(choice, rest);
        }
    }

    /// Whether it is such a message.
    fn take(choice: usize, rest: &[u8]) -> bool {
        match choice % 11 {
            0 => {
                let batch = message::<LogBatch>(rest);
                for line in batch.iter().flat_map(|batch| &batch.lines) {
                    shown(&line.text);
                    for max in [0, 1, 2, 3, 1024] {
                        let cut = cut_at(&line.text, max);
                        assert!(cut.len() <= max && line.text.starts_with(cut));
                    }
                }
                batch.is_some()
            }
            1 => message::<Introduction>(rest).is_some(),
            2 => {
                let step = message::<Attestation>(rest);
                if let Some(Attestation::Prove { event_log, .. }) = &step {
                    assert!(event_log.0.len() * 2 <= rest.len());
                    const { assert!((EVENT_LOG_LIMIT + IMA_LIST_LIMIT) * 2 < ATTESTATION_LIMIT) };
                }
                step.is_some()
            }
            3 => {
                let report = message::<InventoryReport>(rest);
                if let Some(report) = &report {
                    let tame = tamed(&report.inventory, |inventory: &mut Inventory| {
                        *inventory = std::mem::take(inventory).tame();
                    });
                    assert!(stable(&tame).len() < INVENTORY_LIMIT);
                }
                report.is_some()
            }
            4 => message::<Acceptance>(rest).map(|run| tamed(&run, Acceptance::tame)).is_some(),
            5 => message::<ExecState>(rest).map(|state| tamed(&state, ExecState::tame)).is_some(),
            6 => message::<DbxState>(rest).map(|state| tamed(&state, DbxState::tame)).is_some(),
            7 => message::<Reply>(rest).is_some(),
            8 => message::<Judged>(rest).map(|judged| shown(&judged.reason)).is_some(),
            9 => message::<CertificateRequest>(rest).is_some(),
            _ => {
                let (challenge, reply) = (message::<Challenge>(rest), message::<IntroductionReply>(rest));
                challenge.is_some() && reply.is_some() && message::<LogReply>(rest).is_some()
            }
        }
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        let id = "00000000-0000-0000-0000-000000000001";
        let (ab, cd) = ("ab".repeat(32), "cd".repeat(32));
        let report: Value = serde_json::from_str(&golden_report()).expect("JSON");
        let inventory = concat!(
            r#"{"machine":"ID","boot_id":"b","inventory":{"version":1,"system":{"manufacturer":"QEMU","serial":"S1"},"#,
            r#""firmware":{"vendor":"SeaBIOS","version":"1","date":"04/01/2014"},"cpus":[{"socket":"CPU 0","model":"m","#,
            r#""cores":2,"threads":4}],"dimms":[{"slot":"A1","bytes":1073741824,"type":"DDR4","mts":3200}],"#,
            r#""pci":[{"address":"0000:00:03.0","id":"8086:100e"}],"disks":[{"name":"nvme0n1","bytes":0,"#,
            r#""rotational":false,"health":{"passed":true,"detail":"1 % worn"}}],"nics":[{"name":"eth0","carrier":true,"#,
            r#""mbps":0,"neighbour":{"chassis":"","port":"3"}}],"bmc":{"present":true,"note":"n"},"#,
            r#""tpm":{"version":"2.0"},"memory_bytes":1073741824,"unread":[{"section":"pci","reason":"r"}]}}"#,
        );
        let texts: [(u8, String); 13] = [
            (0, format!(r#"{{"boot_id":"b","machine":"{id}","first":7,"at_us":9,"lines":[{{"source":"kernel","level":5,"at_us":0,"text":"Linux é\n"}}]}}"#)),
            (1, format!(r#"{{"step":"commit","machine":"{id}","commitment":"{ab}"}}"#)),
            (1, format!(r#"{{"step":"reveal","machine":"{id}","nonce":"{ab}"}}"#)),
            (2, format!(r#"{{"step":"hello","machine":"{id}","boot_id":"b","endorsement":"001f","attestation":"ff"}}"#)),
            (2, format!(r#"{{"step":"prove","machine":"{id}","boot_id":"b","secret":"{ab}","pcrs":["{cd}"],"quoted":"01","signature":"02","event_log":"0304"}}"#)),
            (3, inventory.replace("ID", id)),
            (4, report["acceptance"].to_string()),
            (5, report["exec"].to_string()),
            (6, report["dbx"].to_string()),
            (7, r#"{"desired":{"etag":"7","decision":"assigned","assignment":"{}","freshness":"{}","via":"kexec","grant":{"grant":"hold","reason":"r"},"order":{"order":"{}","freshness":"{}"}},"again_ms":30000,"may_wait":true,"about":{"name":"n","approved":false,"introduce":true},"thresholds":{"disk./var":"10%"},"attest":true}"#.into()),
            (8, r#"{"state":"no-tpm","reason":"r"}"#.into()),
            (9, format!(r#"{{"machine":"{id}","boot_id":"b","public_key":"04ff","proof":"30"}}"#)),
            (10, format!(r#"{{"nonce":"{ab}","id_object":"00","encrypted_secret":"01","next":8}}"#)),
        ];
        let useless: Vec<_> = texts.iter().filter(|(n, text)| !take(usize::from(*n), text.as_bytes())).collect();
        assert!(useless.is_empty(), "seeds that are no such message lead nowhere: {useless:?}");
        texts.iter().flat_map(|(n, text)| chosen(*n, [text.as_bytes()])).collect()
    }
}
