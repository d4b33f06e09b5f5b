//! A boot in disk mode: the release in the slot starts, whatever the boot server says or does not say. The server is
//! asked first, for a while; what it wants else is done by the service of the running system, in its turn.

use crate::change::{NEXT, files};
use crate::coldplug::Drivers;
use crate::disk::machine::{self, MachineDisk, SharedDisk, boots, on_disk, on_disk_within, read_slot};
use crate::disk::record::Record;
use crate::disk::store::Starts;
use crate::disk::{DiskError, floor};
use crate::error::{AgentError, FailureClass, ROOT, Result, UKI};
use crate::fetch::{Download, Expected};
use crate::flow::Flow;
use crate::init;
use crate::kexec;
use crate::memory::Memory;
use crate::plan::{self, Plan};
use crate::uplink::Network;
use crate::verifier::{Verified, Verifier};
use kiln_protocol::slot::{Action, Content, Event, Fallback, Go, Label, SlotId, Slots};
use kiln_protocol::{Assignment, BootFirst, ReleaseId, Stage, Via};
use kiln_release::{Manifest, Mode};
use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

/// So long the boot server has, network and all, before the slot starts without it.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// And so long the trial of a newly signed network configuration, with the way back.
pub const ADOPTION: Duration = Duration::from_secs(90 + 60);

/// So long a boot that the network chose fetches the release that is assigned instead, before the slot starts.
pub const GOING: Duration = Duration::from_secs(15 * 60);

/// A disk that gives no answer within this does not count the start.
const COUNTS: Duration = Duration::from_secs(20);

/// The machine's disk in disk mode; one that cannot be used is told, and the release runs in memory.
pub async fn open_disk(flow: &mut Flow) -> Option<SharedDisk> {
    if flow.verifier.boot.site.mode == Mode::Disk && leaves_out(flow) {
        return None;
    }
    let boot = &flow.verifier.boot;
    match boot.site.mode {
        Mode::Ram => None,
        Mode::Disk => match MachineDisk::find(boot, flow.verifier.memory.lowest()).await {
            Ok((disk, broken)) => {
                let disk = SharedDisk::new(disk.beside(flow.verifier.place.clone()));
                println!("kiln-agent: disk {}", disk.describe());
                for error in broken {
                    flow.journal.failed(Stage::Modules, &error.into(), 1, Some(Duration::ZERO));
                }
                flow.verifier.held = held(&disk.slots());
                let memory = &mut flow.verifier.memory;
                if (memory.sequence, memory.order_base) == (0, 0) {
                    // The firmware's variables were erased; what the loader knows was assigned before that.
                    memory.order_base = disk.slots().disk.highest_sequence();
                }
                Some(disk)
            }
            Err(error) => {
                flow.journal.failed(Stage::Modules, &error, 1, Some(Duration::ZERO));
                None
            }
        },
    }
}

/// The images that lie in the slots.
pub fn held(slots: &Slots) -> Vec<String> {
    let entries = SlotId::BOTH.into_iter().flat_map(|slot| slots.disk.entries_of(slot));
    entries.map(|entry| entry.content.release.image.to_string()).collect()
}

/// Whether this boot leaves the disk alone, because the one before came to its end in it. Said, and forgotten before anything else
/// is done: the next boot tries the disk again, whatever becomes of this one.
fn leaves_out(flow: &mut Flow) -> bool {
    let Verifier { memory, place, .. } = &mut flow.verifier;
    let Some(disk) = memory.disk_hung.take() else { return false };
    if let Err(error) = place.remember(memory) {
        println!("kiln-agent: {disk} gave no answer, and is tried all the same: that would not be forgotten: {error}");
        return false;
    }
    flow.journal.failed(Stage::Modules, &DiskError::LeftOut { disk }.into(), 1, Some(Duration::ZERO));
    true
}

/// A boot image below the floor: the disk must not start it for ever. No packet decides of it.
pub async fn leave_floor(flow: &Flow) {
    let boot = &flow.verifier.boot;
    if boot.site.mode == Mode::Ram {
        return;
    }
    match floor::leave(boot, flow.verifier.memory.lowest()).await {
        Ok(Some(release)) => println!("kiln-agent: {release}, which is good on the disk, is next"),
        Ok(None) => {
            println!("kiln-agent: no good release on the disk is at or above the floor: the network has to bring one");
        }
        Err(error) => println!("kiln-agent: the disk is not left for another release: {error} ({})", error.kind()),
    }
}

/// Writes the start that was begun as one, once. A power cut before this burns no try.
pub async fn count_start(disk: &SharedDisk) {
    let counted = on_disk_within(disk, "counting the start", COUNTS, |disk| {
        disk.hands_over();
        Ok(())
    });
    if let Err(error) = counted.await {
        println!("kiln-agent: the start is not counted: {error}");
    }
}

/// The same of a start that this machine ended before the hand-over: else the release would be started for ever, without safe
/// mode and without the other slot. What was served, or was not, says nothing of the release.
pub async fn count_failed(disk: &SharedDisk, error: &AgentError) {
    match error.class() {
        FailureClass::Machine => count_start(disk).await,
        FailureClass::Unreachable | FailureClass::Verification | FailureClass::Usage => {}
    }
}

/// What failed here, as the server knows it: by the sequence of the assignment, not by the loader's order.
pub fn fallback(memory: &Memory, disk: &SharedDisk) -> Option<Fallback> {
    let fallback = disk.slots().disk.fallback()?;
    let sequence = memory.sequence_of(fallback.sequence)?;
    Some(Fallback { sequence, ..fallback })
}

/// A trial that failed since the release in the slot was assigned: told at every boot until a newer one is good.
pub fn tell_fallback(flow: &mut Flow, disk: &SharedDisk) {
    if let Some(Fallback { release, reason, .. }) = disk.slots().disk.fallback() {
        let error = AgentError::FellBack { release: release.to_string(), reason };
        flow.journal.failed(Stage::Modules, &error, 1, Some(Duration::ZERO));
    }
    flow.journal.fallback = fallback(&flow.verifier.memory, disk);
}

/// The boot server's word on this boot: current metadata, and an assignment, which may name another release.
pub async fn ask(
    flow: &mut Flow,
    drivers: &mut Option<Drivers>,
    network: &mut Network,
) -> Result<(Verified, (Assignment, Via, Plan))> {
    network.connect(flow, drivers).await?;
    init::set_host_name(network, flow);
    flow.ship_log()?;
    let here = flow.verifier.here()?;
    let mut verified = init::metadata(flow, &here, Stage::Metadata).await?;
    may_run(flow, &verified)?;
    let assigned = init::wait_for_assignment(flow, &mut verified).await?;
    Ok((verified, assigned))
}

/// The same by what was kept of it.
pub async fn recorded(flow: &mut Flow, disk: &SharedDisk) -> Result<Verified> {
    let root_hash = flow.journal.embedded.root_hash.clone();
    let record = on_disk(disk, move |disk| disk.record(&root_hash)).await?;
    let here = flow.verifier.here()?;
    let (verified, assigned) = flow.verifier.verify_record(&here, &record, true)?;
    flow.verifier.settings = assigned.settings;
    if let Some((file, expires)) = verified.stale_at(flow.verifier.now) {
        println!("kiln-agent: metadata is stale: {file} expired at {expires}");
    }
    let servers = &mut flow.verifier.servers;
    // Behind what DHCP says now: without the boot server's own answer that is a guess.
    for (known, kept) in [(&mut servers.http, record.servers.http), (&mut servers.agent, record.servers.agent)] {
        let new: Vec<String> = kept.into_iter().filter(|url| !known.contains(url)).collect();
        known.extend(new);
    }
    may_run(flow, &verified)?;
    Ok(verified)
}

/// The same where nothing else is left to start by. What fails then counts, whatever it is: a record that rotted verifies no more
/// than one that was put there, and the other slot's may.
pub async fn only_recorded(flow: &mut Flow, disk: &SharedDisk) -> Result<Verified> {
    let verified = recorded(flow, disk).await;
    if verified.is_err() {
        count_start(disk).await;
    }
    verified
}

/// A good release that did not come up is read back whole, if what was kept of it says what it should be. Where its root
/// is rotten, this boot ends: the next starts another good release, or fetches the root anew. What only cannot be read may be what
/// nothing needs, and the boot goes on.
pub async fn read_back(flow: &mut Flow, disk: &SharedDisk) -> Result<()> {
    let Ok(Verified { manifest, .. }) = recorded(flow, disk).await else { return Ok(()) };
    println!("kiln-agent: the release in the slot did not come up: its root is read back");
    let root_hash = flow.journal.embedded.root_hash.clone();
    let read = read_slot(disk, manifest.root.length, move |disk| {
        let Some(slot) = disk.slots().disk.slot_of(&root_hash) else { return Ok(()) };
        let read = disk.verify(slot, &manifest).map_err(AgentError::of_whole_slot);
        if matches!(read, Err(AgentError::RootRotten { .. })) {
            disk.event(Event::Spoilt(slot), None)?;
        }
        read
    });
    match read.await {
        Err(error) if !matches!(error, AgentError::RootRotten { .. }) => {
            println!("kiln-agent: {error}");
            Ok(())
        }
        read => read,
    }
}

/// A good release that was started again and again and never became healthy is left for the other slot's, if that one is
/// good and whole. Whether the machine must restart: the loader then starts the other.
pub async fn leave_loop(flow: &mut Flow, disk: &SharedDisk, starts: Starts) -> bool {
    let boot = &flow.verifier.boot;
    let (root_hash, here) = (flow.journal.embedded.root_hash.clone(), format!("{}/{}", boot.image, boot.release));
    let Some((slot, other)) = machine::good_beside(&disk.slots(), &root_hash) else { return false };
    let release = other.release.clone();
    let left = match beside_is_whole(flow, disk, slot, other).await {
        Ok(()) => on_disk(disk, move |disk| disk.event(Event::Loops(slot.other()), None)).await,
        Err(error) => Err(error),
    };
    match left {
        Ok(rest) if rest.iter().any(|action| matches!(action, Action::Tell(_))) => {
            let times = starts.count;
            println!(
                "kiln-agent: {here} was started {times} times in a row and never became healthy: {release} is next"
            );
            true
        }
        // Without its UKI on the disk this one is not good there, and nothing was changed.
        Ok(_) => false,
        Err(error) => {
            println!("kiln-agent: {release} in the other slot is no way out: {error} ({})", error.kind());
            false
        }
    }
}

/// By what was kept of it, verified anew.
async fn beside_is_whole(flow: &mut Flow, disk: &SharedDisk, slot: SlotId, content: Content) -> Result<()> {
    let root_hash = content.root_hash.clone();
    let record = on_disk(disk, move |disk| disk.record(&root_hash)).await?;
    let (verified, _) = flow.verifier.verify_record(&content.release, &record, true)?;
    let manifest = verified.manifest;
    let is_it = machine::content(&manifest)? == content;
    read_slot(disk, manifest.root.length.saturating_add(manifest.uki.length), move |disk| {
        if is_it && disk.is_whole(slot, &manifest)? {
            return Ok(());
        }
        let reason = format!("what lies there is not {} as it was signed", content.release);
        Err(DiskError::ReadBack { disk: disk.name().to_owned(), reason }.into())
    })
    .await
}

/// What is checked of this boot image against its release, and of the image against the floor.
fn may_run(flow: &Flow, verified: &Verified) -> Result<()> {
    let boot = &flow.verifier.boot;
    verified.manifest.matches_boot(boot)?;
    flow.verifier.memory.may_boot(boot)?;
    plan::check_command_line(&verified.manifest, &boot.command_line, &init::running_command_line())
}

/// Makes sure that this release lies in a slot and that the loader starts it from there; says in which. A disk that gives no
/// answer is an error like any other. Where no entry can be read and no boot server wants this release, nothing is written:
/// firmware started it from there, and does again.
pub async fn install_here(flow: &mut Flow, verified: &Verified, disk: &SharedDisk) -> Result<SlotId> {
    let (manifest, via) = (verified.manifest.clone(), kexec::started_this());
    let content = machine::content(&manifest)?;
    let root_hash = content.root_hash.clone();
    let here = flow.verifier.here()?;
    // What was accepted may be the way to another release, which no kexec led to.
    let is_assigned = flow.verifier.accepted.as_deref().is_some_and(|accepted| assigns(accepted, &here));
    if !is_assigned && let Some(slot) = disk.unlisted(&root_hash) {
        println!("kiln-agent: {}: the EFI system partition stays as it is, and the release starts", disk.name());
        return Ok(slot);
    }
    let network_first = flow.verifier.settings.boot_first == BootFirst::Network;
    let started = on_disk(disk, move |disk| {
        let known = boots(disk.slots(), &root_hash);
        let rest = if known { disk.event(Event::Started(root_hash, via), None)? } else { Vec::new() };
        if known {
            disk.mend_loader(network_first);
        }
        Ok((disk.slots().running.as_ref().map(|running| running.slot), rest))
    });
    let mut record = Record {
        files: verified.files.clone(),
        assignment: flow.verifier.accepted.clone().unwrap_or_default(),
        servers: flow.verifier.servers.clone(),
    };
    if let (Some(slot), rest) = started.await? {
        if is_assigned && let Err(error) = renew_record(flow, disk, &manifest, record).await {
            println!("kiln-agent: what is kept of this release stays as it is: {error}");
        }
        for action in rest {
            if let Action::Tell(Fallback { release, reason, .. }) = action {
                let error = AgentError::FellBack { release: release.to_string(), reason };
                flow.journal.failed(Stage::Root, &error, 1, Some(Duration::ZERO));
            }
        }
        flow.journal.fallback = fallback(&flow.verifier.memory, disk);
        return Ok(slot);
    }
    // A release that the loader knows and whose root is gone comes back under the entry that it has.
    let known = disk.slots().disk.listed(&content.root_hash).map(|entry| entry.name.sequence);
    if !is_assigned {
        // It has no place of its own in the loader's order without one, and under the assigned release's that one could not come.
        known.ok_or(AgentError::Superseded)?;
        record = kept_before(flow, disk, &here, &content).await?.unwrap_or(record);
    }
    let [uki, _] = files(std::path::Path::new(NEXT));
    let signed = &manifest.uki;
    let expected = Expected { what: UKI, sha256: signed.sha256.clone(), length: signed.length };
    flow.fetch_to(Stage::Root, expected, &uki).await?;
    kexec::verify(&File::open(&uki).map_err(AgentError::file(&uki))?, &manifest)?;
    let order = known.unwrap_or(flow.verifier.memory.order(flow.verifier.memory.sequence));
    let assign = Event::Assign(content, order, Go::Here(via));
    let mut slot = None;
    for action in on_disk(disk, move |disk| disk.event(assign, None)).await? {
        if let Action::Fetch(to, _) | Action::Verify(to, _) = action {
            slot = Some(to);
        }
        if let Action::Fetch(to, _) = action {
            fetch_root(flow, &manifest, disk, to).await?;
        }
    }
    let slot = slot.ok_or(AgentError::Superseded)?;
    let slots = disk.slots().disk.labels;
    flow.verifier.expect_record(&manifest, &record.digest(), slots)?;
    let length = manifest.root.length.saturating_add(manifest.uki.length);
    read_slot(disk, length, move |disk| {
        disk.finish_install(slot, &manifest, &record, &uki)?;
        disk.keep_put_up(&machine::content(&manifest)?.root_hash, order)?;
        // What the loader starts, then the loader, then the firmware that starts the loader: whatever is cut, nothing points
        // to what is not there.
        disk.event(Event::Granted, None)?;
        disk.install_loader(network_first)?;
        std::fs::remove_file(&uki).map_err(AgentError::file(&uki))
    })
    .await?;
    Ok(slot)
}

/// What was kept of it, if that holds: by that it starts without a boot server, and not by an assignment of another release.
async fn kept_before(
    flow: &mut Flow,
    disk: &SharedDisk,
    here: &ReleaseId,
    content: &Content,
) -> Result<Option<Record>> {
    let root_hash = content.root_hash.clone();
    let kept = on_disk(disk, move |disk| Ok(disk.record(&root_hash).ok())).await?;
    Ok(kept.filter(|kept| flow.verifier.verify_record(here, kept, false).is_ok()))
}

/// Writes anew what is kept of the release that starts, by what the boot server has just said, where it is not what this machine
/// remembers: an earlier agent wrote it, or somebody else.
async fn renew_record(flow: &mut Flow, disk: &SharedDisk, manifest: &Manifest, record: Record) -> Result<()> {
    let root_hash = machine::content(manifest)?.root_hash;
    let (label, hash) = (Label::of(&root_hash), root_hash.clone());
    // What cannot be read is written anew as well.
    let (kept, slots) = on_disk(disk, move |disk| Ok((disk.record(&hash).ok(), disk.slots().disk.labels))).await?;
    if kept.is_some_and(|kept| flow.verifier.memory.has_record(&label, &kept.digest())) {
        return Ok(());
    }
    // One that a boot without a server would not believe must not take the place of one that it does.
    if !flow.verifier.expect_record(manifest, &record.digest(), slots)? {
        return Ok(());
    }
    on_disk(disk, move |disk| disk.keep_record(&root_hash, &record)).await
}

/// Whether this is an assignment of that release; it was verified when it came.
fn assigns(assignment: &str, release: &ReleaseId) -> bool {
    let signed = |text| serde_json::from_str::<serde_json::Value>(text).ok()?.get("signed").cloned();
    let assigned = signed(assignment).and_then(|signed| serde_json::from_value::<Assignment>(signed).ok());
    assigned.is_some_and(|assigned| assigned.release_id() == *release)
}

async fn fetch_root(flow: &mut Flow, manifest: &Manifest, disk: &SharedDisk, slot: SlotId) -> Result<()> {
    let length = manifest.root.length;
    let put = machine::place(disk, slot, length).await?;
    let expected = Expected { what: ROOT, sha256: manifest.root.sha256.clone(), length };
    let download = Download::onto(expected, put, &Arc::default());
    flow.run_download(Stage::Root, download).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{TestSite, flow, now, web};
    use crate::verifier::Servers;
    use jiff::SignedDuration;
    use kiln_protocol::{ASSIGNMENT_TYPE, BoundMachine, RoleSettings, SPEC_VERSION, StageState};
    use kiln_release::{hex, sign_envelope};
    use std::collections::BTreeMap;

    /// A machine's disk in a file, release 1 of the site good on it.
    fn good(site: &TestSite, dir: &std::path::Path) -> SharedDisk {
        SharedDisk::new(opened(site, dir))
    }

    fn opened(site: &TestSite, dir: &std::path::Path) -> MachineDisk {
        opened_with(site, 1, dir)
    }

    fn opened_with(site: &TestSite, release: u64, dir: &std::path::Path) -> MachineDisk {
        let (manifest, uki) = (&site.manifests[&release], dir.join("uki"));
        std::fs::write(&uki, &site.files[&site.paths(release)[0][1..]]).unwrap();
        let mut disk = MachineDisk::on_trial(&dir.join("disk"), manifest, &uki);
        disk.event(Event::Healthy, None).unwrap();
        disk
    }

    /// That machine in its initramfs: no boot server answers, and the repository's files are there.
    fn alone(site: &TestSite, state: &std::path::Path) -> Flow {
        let (http, _hear) = web::honest(site.files.clone(), BTreeMap::new());
        let mut verifier = site.verifier(1, &[http], &[], state);
        verifier.boot.site.mode = Mode::Disk;
        flow(verifier, Some(1), Duration::from_secs(20))
    }

    /// The director's statement that this machine runs this release.
    fn assignment(site: &TestSite, flow: &Flow, release: u64) -> String {
        let manifest = serde_json::to_vec(&site.manifests[&release]).unwrap();
        let assignment = Assignment {
            type_: ASSIGNMENT_TYPE.into(),
            spec_version: SPEC_VERSION.into(),
            machine: BoundMachine { id: flow.journal.machine.id.clone(), key: flow.verifier.key_id() },
            image: "minimal".parse().unwrap(),
            release,
            manifest_sha256: hex::sha256(&manifest).parse().unwrap(),
            role: "lab".into(),
            arch: crate::facts::architecture(),
            sequence: 6,
            rebuild: 0,
            settings: RoleSettings::default(),
            issued: now(),
            expires: now() + SignedDuration::from_hours(1),
        };
        sign_envelope(&assignment, &[&site.director]).unwrap()
    }

    /// Another release is assigned, and no kexec led there. What starts gets no place of that one in the loader's order, under which it
    /// could not come any more, and keeps what it starts by without a boot server.
    #[test]
    fn what_starts_on_the_way_to_another_release_stands_in_its_way_nowhere() {
        let (dir, site) = (tempfile::tempdir().unwrap(), TestSite::new(2));
        let mut flow = alone(&site, &dir.path().join("state"));
        let content = machine::content(&site.manifests[&1]).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let here = flow.verifier.here().unwrap();
            let verified = flow.verifier.verify_metadata(&here).await.unwrap();
            flow.verifier.accepted = Some(assignment(&site, &flow, 2));
            let beside = tempfile::tempdir().unwrap();
            let disk = SharedDisk::new(opened(&site, beside.path()).without_esp());
            assert_eq!(install_here(&mut flow, &verified, &disk).await.unwrap(), SlotId::A);
            assert!(disk.slots().disk.entries.is_empty(), "its EFI system partition is as it was");
            // The loader knows another release alone.
            let beside = tempfile::tempdir().unwrap();
            let disk = SharedDisk::new(opened_with(&site, 2, beside.path()).reopened(true));
            let before = disk.slots().disk;
            let error = install_here(&mut flow, &verified, &disk).await.unwrap_err();
            assert_eq!(error.kind(), "assignment-superseded");
            assert_eq!(disk.slots().disk, before);

            let disk = good(&site, dir.path());
            let labels = disk.slots().disk.labels;
            let files = verified.files.clone();
            let record = Record { files, assignment: assignment(&site, &flow, 1), servers: Servers::default() };
            flow.verifier.expect_record(&site.manifests[&1], &record.digest(), labels).unwrap();
            let (hash, kept) = (content.root_hash.clone(), record.clone());
            on_disk(&disk, move |disk| disk.keep_record(&hash, &kept)).await.unwrap();
            assert_eq!(kept_before(&mut flow, &disk, &here, &content).await.unwrap(), Some(record.clone()));
            // By another's assignment it starts nowhere.
            let other = Record { assignment: assignment(&site, &flow, 2), ..record };
            let hash = content.root_hash.clone();
            on_disk(&disk, move |disk| disk.keep_record(&hash, &other)).await.unwrap();
            assert_eq!(kept_before(&mut flow, &disk, &here, &content).await.unwrap(), None);
        });
    }

    /// Firmware started it from there. With a boot server's word it is installed anew, which is another matter.
    #[test]
    fn a_release_beside_an_esp_that_cannot_be_read_starts_from_its_slot_without_a_boot_server() {
        let (dir, site) = (tempfile::tempdir().unwrap(), TestSite::new(1));
        let mut flow = alone(&site, &dir.path().join("state"));
        let root_hash = machine::content(&site.manifests[&1]).unwrap().root_hash;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let beside = tempfile::tempdir().unwrap();
        let whole = good(&site, beside.path());
        assert!(boots(&whole.slots(), &root_hash));
        assert_eq!(whole.unlisted(&root_hash), None, "its entry can be read");
        let disk = SharedDisk::new(opened(&site, dir.path()).without_esp());
        assert!(!boots(&disk.slots(), &root_hash));
        assert_eq!(disk.unlisted(&root_hash), Some(SlotId::A));
        let other = crate::testing::root_hash(2).parse().unwrap();
        assert_eq!(disk.unlisted(&other), None, "it lies in no slot");
        runtime.block_on(async {
            let here = flow.verifier.here().unwrap();
            let verified = flow.verifier.verify_metadata(&here).await.unwrap();
            assert_eq!(flow.verifier.accepted, None);
            assert_eq!(install_here(&mut flow, &verified, &disk).await.unwrap(), SlotId::A);
        });
        assert!(disk.slots().disk.entries.is_empty(), "nothing is installed");
    }

    /// A byte of what was kept of the only good release is another, and no server answers.
    #[test]
    fn a_start_by_a_record_that_does_not_verify_counts() {
        let (dir, site) = (tempfile::tempdir().unwrap(), TestSite::new(1));
        let mut flow = alone(&site, &dir.path().join("state"));
        let disk = good(&site, dir.path());
        let root_hash = machine::content(&site.manifests[&1]).unwrap().root_hash;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let here = flow.verifier.here().unwrap();
            let files = flow.verifier.verify_metadata(&here).await.unwrap().files;
            let mut record = Record { files, assignment: String::new(), servers: Servers::default() };
            let part = record.files.values_mut().find(|text| text.contains("sha256")).unwrap();
            *part = part.replacen("sha256", "sha257", 1);
            let hash = root_hash.clone();
            on_disk(&disk, move |disk| disk.keep_record(&hash, &record)).await.unwrap();
            for counted in 0..2 {
                let hash = root_hash.clone();
                assert_eq!(on_disk(&disk, move |disk| Ok(disk.count_start(&hash, 7).count)).await.unwrap(), counted);
                let error = only_recorded(&mut flow, &disk).await.map(drop).unwrap_err();
                assert_eq!(error.class(), FailureClass::Verification, "{error}");
                // As the boot ends: not once more.
                count_failed(&disk, &error).await;
            }
        });
    }

    #[test]
    fn the_disk_in_which_the_last_boot_ended_is_left_alone_once_and_that_is_told() {
        let (dir, site) = (tempfile::tempdir().unwrap(), TestSite::new(1));
        let mut verifier = site.verifier(1, &[], &[], dir.path());
        verifier.boot.site.mode = Mode::Disk;
        let late = DiskError::Late { disk: "vda".into(), what: "mounting the root", reason: "no answer".into() };
        assert!(verifier.memory.disk_hangs(&late.into()));
        verifier.place.remember(&verifier.memory).unwrap();
        // The next boot.
        verifier.memory = verifier.place.memory().unwrap();
        let mut flow = flow(verifier, None, Duration::ZERO);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        // No disk of this host is looked at.
        assert!(runtime.block_on(open_disk(&mut flow)).is_none());
        let told = flow.journal.state.pending.iter().find_map(|record| match &record.state {
            StageState::Failed(failure) => Some((failure.kind.as_str(), failure.message.starts_with("vda "))),
            StageState::Started | StageState::Done | StageState::Waiting { .. } => None,
        });
        assert_eq!(told, Some(("disk-left-out", true)));
        assert_eq!(flow.journal.state.hung.as_deref(), Some("vda"), "nor is a kexec made beside it as if it answered");
        assert_eq!(flow.verifier.place.memory().unwrap().disk_hung, None, "the boot after this one tries it again");
        assert!(!leaves_out(&mut flow), "once");
    }

    #[test]
    fn a_good_release_that_this_machine_cannot_start_is_counted_and_one_that_is_cut_off_is_not() {
        let (dir, site) = (tempfile::tempdir().unwrap(), TestSite::new(1));
        let disk = good(&site, dir.path());
        let root_hash = machine::content(&site.manifests[&1]).unwrap().root_hash;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let begins = || {
            let root_hash = root_hash.clone();
            runtime.block_on(on_disk(&disk, move |disk| Ok(disk.count_start(&root_hash, 7).count))).unwrap()
        };
        assert_eq!(begins(), 0);
        assert_eq!(begins(), 0, "power that is cut before the hand-over burns no try");
        runtime.block_on(count_failed(&disk, &AgentError::NoServer));
        assert_eq!(begins(), 0, "what was not served says nothing of the release");
        runtime.block_on(count_failed(&disk, &AgentError::NoTpm));
        runtime.block_on(count_start(&disk));
        assert_eq!(begins(), 1, "once");
        runtime.block_on(count_start(&disk));
        assert_eq!(begins(), 2);
    }
}
