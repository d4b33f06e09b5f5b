//! Wipes disks by an operator's order, in the initramfs, before anything of a disk is used. What came of each disk goes
//! into a receipt that the machine signs with its identity key and the server keeps.
//!
//! What the disk offers comes first: NVMe sanitise or format, secure discard, discard. That alone is not believed: every
//! byte is read back, and unless all are zeros, or all are ones, the disk is written over with zeros and read back again.
//! A disk counts as wiped only after such a reading. What firmware keeps from the host (spare cells, host protected areas)
//! is wiped by sanitise and format alone; the receipt says which method it was.

mod disks;
mod erase;
mod nvme;

use crate::disk::{data, search, worker};
use crate::error::{AgentError, Result};
use crate::flow::Flow;
use crate::memory::random;
use crate::retry::{self, Next};
use disks::Disk;
use erase::{GRACE, Meter, Pulse};
use kiln_protocol::{
    ORDER_DISKS, Order, OrderAction, RECEIPT_TYPE, Receipt, SPEC_VERSION, Stage, WipeMethod, WipeOutcome, WipedDisk,
};
use kiln_release::{hex, sign_envelope};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};

/// So often the server hears how far it is.
const TELL_EVERY: Duration = Duration::from_secs(15);
/// Disks wiped side by side.
const AT_ONCE: usize = 16;
/// So often it is looked whether one hangs.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// So often the TPM is asked to give up the data's key, and the pause between.
const KEY_TRIES: u32 = 5;
const KEY_PAUSE: Duration = Duration::from_secs(3);

/// Wipes, and delivers the receipt. Comes back when it is delivered: the machine then starts anew.
pub async fn obey(flow: &mut Flow, order: &Order) -> Result<()> {
    let OrderAction::Wipe { disks, method } = order.action.clone() else { return Ok(()) };
    let (meter, site) = (Arc::<Meter>::default(), flow.verifier.boot.site.name.clone());
    let metered = Arc::clone(&meter);
    let work = move || {
        let kept = give_up_data(&disks, &site);
        let mut report = wipe_all(&disks, method, &metered);
        if let Some(kept) = kept {
            kept.tell(&mut report);
        }
        report
    };
    carry_out(flow, order, &meter, work).await
}

/// The same by whatever does it.
async fn carry_out(
    flow: &mut Flow,
    order: &Order,
    meter: &Meter,
    work: impl FnOnce() -> Vec<WipedDisk> + Send + 'static,
) -> Result<()> {
    println!("kiln-agent: order {} is to {}", order.id, order.action);
    flow.journal.started(Stage::Wipe);
    flow.report().await;
    let (begun, mut work) = (Instant::now(), spawn_blocking(work));
    let done = loop {
        if let Ok(done) = timeout(TELL_EVERY, &mut work).await {
            break done;
        }
        flow.journal.waiting(Stage::Wipe, &meter.describe());
        flow.report().await;
    };
    let disks = done.map_err(|e| AgentError::system("wiping")(std::io::Error::other(e.to_string())))?;
    for disk in &disks {
        println!("kiln-agent: {} ({} {}): {}: {}", disk.name, disk.model, disk.serial, disk.outcome, disk.detail);
    }
    let receipt = Receipt {
        type_: RECEIPT_TYPE.into(),
        spec_version: SPEC_VERSION.into(),
        machine: flow.journal.machine.id.clone(),
        key: flow.verifier.key_id(),
        public_key: hex::encode(&flow.verifier.key.public_bytes()),
        order: order.id.clone(),
        disks,
        finished: flow.verifier.now,
        seconds: begun.elapsed().as_secs(),
    };
    let text = sign_envelope(&receipt, &[&flow.verifier.key])
        .map_err(|e| AgentError::system("signing the receipt")(std::io::Error::other(e.to_string())))?;
    deliver(flow, &text).await?;
    // Only now: a wipe whose receipt nobody has is done again after a restart.
    flow.verifier.wiped(order)?;
    flow.journal.done(Stage::Wipe);
    flow.report().await;
    Ok(())
}

/// For ever: without the receipt nobody knows that the disks are wiped.
async fn deliver(flow: &mut Flow, text: &str) -> Result<()> {
    let mut attempt = 0;
    loop {
        let error = match &mut flow.api {
            None => AgentError::NoServer,
            Some(api) => match api.receipt(text).await {
                Ok(()) => return Ok(()),
                Err(error) => error,
            },
        };
        attempt += 1;
        let pause = match retry::next(error.class(), attempt, random()?[0]) {
            Next::After(pause) => pause,
            Next::GiveUp => return Err(error),
        };
        flow.journal.failed(Stage::Wipe, &error, attempt, Some(pause));
        sleep(pause).await;
    }
}

/// A key that is still in the TPM although its disks are wiped.
struct Kept {
    disks: Vec<String>,
    why: String,
}

impl Kept {
    /// Such a disk does not count as wiped: what it keeps in some corner can be read.
    fn tell(&self, report: &mut [WipedDisk]) {
        for disk in report.iter_mut().filter(|disk| self.disks.contains(&disk.name)) {
            disk.outcome = WipeOutcome::Failed;
            disk.detail = format!("the key of its data is still in this machine's TPM: {}; {}", self.why, disk.detail);
        }
    }
}

/// First: whatever a disk keeps of the data in some corner, and wherever this is cut, nobody reads it. An order for other
/// disks leaves the data as it is.
fn give_up_data(serials: &[String], site: &str) -> Option<Kept> {
    let ordered = disks::all().into_iter().filter(|disk| disk.reason_to_skip(serials).is_none());
    let holds = |disk: &Disk| {
        let (path, site) = (disk.path(), site.to_owned());
        // One that hangs does not say; it will not be wiped either.
        worker::answer_within(search::LOOKS, move || data::lies_on(&path, &site)).unwrap_or(false)
    };
    let holders: Vec<String> = ordered.filter(holds).map(|disk| disk.name).collect();
    if !is_for_data(serials, &holders) {
        return None;
    }
    match tried(KEY_PAUSE, data::destroy_key) {
        Ok(true) => println!("kiln-agent: the key of this machine's data is destroyed"),
        Ok(false) => {}
        Err(error) => return Some(Kept { disks: holders, why: error.to_string() }),
    }
    None
}

/// An order that names no disk is for everything; one that names some, for the data if they hold it.
fn is_for_data(serials: &[String], holders: &[String]) -> bool {
    serials.is_empty() || !holders.is_empty()
}

/// A TPM may be busy, or say that it wants to be asked again.
fn tried<T>(pause: Duration, mut work: impl FnMut() -> Result<T>) -> Result<T> {
    for _ in 1..KEY_TRIES {
        match work() {
            Ok(done) => return Ok(done),
            Err(error) => println!("kiln-agent: the key of this machine's data is not destroyed: {error}"),
        }
        thread::sleep(pause);
    }
    work()
}

/// Every disk of this machine, and what became of it; besides them the ordered ones that it does not have.
fn wipe_all(serials: &[String], method: WipeMethod, meter: &Arc<Meter>) -> Vec<WipedDisk> {
    let (mut chosen, mut report) = (Vec::new(), Vec::new());
    for disk in disks::all() {
        match disk.reason_to_skip(serials) {
            None => chosen.push(disk),
            Some(reason) => report.push(disk.became(Vec::new(), WipeOutcome::Skipped, reason)),
        }
    }
    for serial in serials.iter().filter(|serial| !chosen.iter().any(|disk| disk.serial == **serial)) {
        report.push(Disk::missing(serial));
    }
    meter.expect(chosen.iter().map(|disk| disk.bytes).sum());
    // Name spaces of one NVMe controller one after the other: a sanitise is all of theirs.
    chosen.sort_by_key(Disk::controller);
    let groups: Vec<&[Disk]> = chosen.chunk_by(|a, b| a.controller() == b.controller()).collect();
    for wave in groups.chunks(AT_ONCE) {
        let meter = Arc::clone(meter);
        report.extend(side_by_side(wave, GRACE, move |disk, pulse| wipe(disk, method, &meter, pulse)));
    }
    report.sort_by(|a, b| a.name.cmp(&b.name));
    report.truncate(ORDER_DISKS);
    report
}

/// Each group in a thread of its own, of which nothing waits for the end: a disk that gives no answer has failed, and the
/// receipt says so beside what became of the others. `first` is how long each may take for its first answer.
fn side_by_side(
    groups: &[&[Disk]],
    first: Duration,
    work: impl Fn(&Disk, &Pulse) -> WipedDisk + Clone + Send + 'static,
) -> Vec<WipedDisk> {
    let (tell, told) = channel();
    let mut waited_for = Vec::new();
    for group in groups {
        let pulse = Arc::new(Pulse::new());
        pulse.may_take(first);
        let (disks, alive, tell, work) = (group.to_vec(), Arc::clone(&pulse), tell.clone(), work.clone());
        let begun = thread::Builder::new().spawn(move || {
            for disk in &disks {
                // Nobody listens to what comes late.
                let _ = tell.send(work(disk, &alive));
            }
        });
        if let Err(error) = begun {
            println!("kiln-agent: no thread to wipe a disk: {error}");
        }
        waited_for.push((*group, pulse));
    }
    drop(tell);
    let mut report: Vec<WipedDisk> = Vec::new();
    let is_told = |report: &[WipedDisk], disk: &Disk| report.iter().any(|told| told.name == disk.name);
    loop {
        let done =
            waited_for.iter().all(|(group, pulse)| pulse.is_late() || group.iter().all(|disk| is_told(&report, disk)));
        if done {
            break;
        }
        match told.recv_timeout(LOOK_EVERY) {
            Ok(wiped) => report.push(wiped),
            Err(RecvTimeoutError::Timeout) => {}
            // Each thread has ended.
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    for (group, pulse) in &waited_for {
        for disk in group.iter().filter(|disk| !is_told(&report, disk)).collect::<Vec<_>>() {
            let why =
                if pulse.is_late() { "it gave no answer: it hangs" } else { "the agent failed while it was wiped" };
            report.push(disk.became(Vec::new(), WipeOutcome::Failed, why.into()));
        }
    }
    report
}

fn wipe(disk: &Disk, method: WipeMethod, meter: &Meter, pulse: &Pulse) -> WipedDisk {
    let mut methods = Vec::new();
    match erase::erase(disk, method, &mut methods, meter, pulse) {
        Ok(how) => disk.became(methods, WipeOutcome::Wiped, how),
        Err(error) => disk.became(methods, WipeOutcome::Failed, error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::director::Director;
    use crate::testing::{TestSite, flow, now};
    use kiln_protocol::{ORDER_TYPE, OrderedMachine, StageState, Via};

    /// What fails here is no disk, which a receipt would tell of: the agent itself.
    #[test]
    fn a_wipe_that_comes_to_no_receipt_is_told_before_the_restart() {
        let site = TestSite::new(1);
        let dir = tempfile::tempdir().unwrap();
        let director = Director::start(&site, (1, 1, Via::Cold, false));
        let verifier = site.verifier(1, &[], std::slice::from_ref(&director.url), &dir.path().join("state"));
        let mut flow = flow(verifier, None, Duration::from_secs(20));
        let order = Order {
            type_: ORDER_TYPE.into(),
            spec_version: SPEC_VERSION.into(),
            id: "ab".repeat(16).parse().unwrap(),
            machines: vec![OrderedMachine { id: flow.journal.machine.id.clone(), key: None }],
            action: OrderAction::Wipe { disks: Vec::new(), method: WipeMethod::Best },
            issued: now(),
            expires: now() + jiff::SignedDuration::from_hours(1),
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            flow.find_server().await.unwrap();
            let error = carry_out(&mut flow, &order, &Meter::default(), || panic!("it fails")).await.unwrap_err();
            assert_eq!(error.kind(), "machine-system-call");
            flow.give_up(&error).await;
        });
        let heard = director.heard();
        let told = heard.iter().flat_map(|report| &report.stages).any(|record| {
            record.stage == Stage::Wipe && matches!(&record.state, StageState::Failed(f) if f.retry_in_ms.is_none())
        });
        assert!(told, "{heard:#?}");
        let order = order.id.as_str();
        assert!(!flow.verifier.memory.orders.contains_key(order), "it is done again after the restart");
    }

    #[test]
    fn the_data_s_key_goes_with_its_disk_and_with_no_other() {
        let (named, holders) = (["S1".to_owned()], ["sda".to_owned()]);
        assert!(is_for_data(&[], &holders) && is_for_data(&[], &[]) && is_for_data(&named, &holders));
        assert!(!is_for_data(&named, &[]));
    }

    fn disk(name: &str) -> Disk {
        Disk { name: name.into(), model: String::new(), serial: name.into(), bytes: 1, removable: false }
    }

    /// `sda` is opened like a disk and never answers: a FIFO that nobody writes to. Its controller's other one is behind it.
    #[test]
    fn a_disk_that_hangs_has_failed_and_the_receipt_has_the_others() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("sda");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let disks = ["sda", "sdb", "sdc", "sdd"].map(disk);
        let hangs = fifo.clone();
        let work = move |disk: &Disk, pulse: &Pulse| {
            if disk.name == "sda" {
                pulse.may_take(Duration::ZERO);
                drop(std::fs::read(&hangs));
            }
            disk.became(Vec::new(), WipeOutcome::Wiped, "zeros".into())
        };
        let report = side_by_side(&[&disks[..2], &disks[2..3], &disks[3..]], GRACE, work);
        let outcome = |name: &str| {
            let told: Vec<_> = report.iter().filter(|disk| disk.name == name).collect();
            assert_eq!(told.len(), 1, "{report:?}");
            (told[0].outcome, told[0].detail.clone())
        };
        for (name, wiped) in [("sda", false), ("sdb", false), ("sdc", true), ("sdd", true)] {
            let (expected, detail) = if wiped {
                (WipeOutcome::Wiped, "zeros")
            } else {
                (WipeOutcome::Failed, "it gave no answer: it hangs")
            };
            assert_eq!(outcome(name), (expected, detail.to_owned()), "{name}");
        }
        // Its thread ends with the test.
        std::fs::write(&fifo, "").unwrap();
    }

    #[test]
    fn a_disk_may_be_silent_for_as_long_as_its_command_may_take() {
        let pulse = Pulse::new();
        pulse.may_take(Duration::from_secs(3600));
        assert!(!pulse.is_late());
        pulse.may_take(Duration::ZERO);
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_millis(2) {
            thread::yield_now();
        }
        assert!(pulse.is_late());
    }

    #[test]
    fn a_disk_whose_key_stays_is_not_wiped() {
        let failed = || AgentError::system("asking the TPM")(std::io::Error::other("busy"));
        let mut asked = 0;
        let third = tried(Duration::ZERO, || {
            asked += 1;
            if asked < 3 { Err(failed()) } else { Ok(true) }
        });
        assert!(third.unwrap() && asked == 3);
        asked = 0;
        let never: Result<bool> = tried(Duration::ZERO, || {
            asked += 1;
            Err(failed())
        });
        assert_eq!(asked, KEY_TRIES);
        let kept = Kept { disks: vec!["sda".into()], why: never.unwrap_err().to_string() };
        let mut report = ["sda", "sdb"].map(|name| disk(name).became(Vec::new(), WipeOutcome::Wiped, "zeros".into()));
        kept.tell(&mut report);
        assert_eq!((report[0].outcome, report[1].outcome), (WipeOutcome::Failed, WipeOutcome::Wiped));
        assert!(report[0].detail.contains("still in this machine's TPM") && report[0].detail.contains("busy"));
        assert!(report[0].detail.ends_with("zeros") && report[1].detail == "zeros");
    }
}
