//! A disk that hangs under the service.

use super::*;
use crate::disk::machine::{MachineDisk, SharedDisk, on_disk};
use kiln_protocol::slot::{SlotId, SlotState};
use tokio::sync::oneshot;
use tokio::time::timeout;

/// A service whose release is on trial on a disk, in a file.
fn on_trial(dir: &Path) -> (Service, SharedDisk) {
    on_trial_of(dir, &TestSite::new(1), &[], "https://127.0.0.1:9")
}

/// The same with servers.
fn on_trial_of(dir: &Path, site: &TestSite, http: &[String], agent: &str) -> (Service, SharedDisk) {
    let manifest = &site.manifests[&1];
    let uki = dir.join("uki");
    std::fs::write(&uki, &site.files[&site.paths(1)[0][1..]]).unwrap();
    let disk = SharedDisk::new(MachineDisk::on_trial(&dir.join("disk"), manifest, &uki));
    let verifier = site.verifier(1, http, &[agent.to_owned()], &dir.join("machine"));
    let journal = journal(&verifier);
    let door = Door { systemctl: "systemctl".into(), reboot: |_| unreachable!("nothing leaves") };
    let service = Service::new(verifier, journal, dir.join("next"), door).unwrap();
    (Service { disk: Some(disk.clone()), ..service }, disk)
}

/// Reports once, and keeps what is answered.
async fn hears(service: &mut Service) {
    let api = Rc::clone(&service.api);
    let mut api = api.lock().await;
    service.newest = Some(service.journal.send(&mut api, 0).await.unwrap());
}

/// The director has what runs put up anew.
async fn hears_of_a_rebuild(service: &mut Service, director: &Director) -> duty::Target {
    service.verifier.lock().await.put_up = 4;
    director.rebuild((1, 6, Via::Cold, true));
    hears(service).await;
    duty::Target { release: service.here.clone(), sequence: 6 }
}

fn state(disk: &SharedDisk) -> SlotState {
    disk.slots().disk.state(SlotId::A)
}

#[test]
fn a_disk_that_hangs_holds_up_no_look_and_hears_that_its_release_is_good_when_it_answers() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (mut service, disk) = on_trial(dir.path());
        assert_ne!(state(&disk), SlotState::Good);
        let (go, hangs) = hang(&disk).await;

        let mut proving = service.prove(true).expect("it is on trial");
        // The loop has its thread back at once, whatever the disk does; and nothing was written.
        assert!(timeout(Duration::from_millis(50), &mut proving).await.is_err());
        assert_ne!(state(&disk), SlotState::Good);

        drop(go);
        hangs.await.unwrap().unwrap();
        let told = proving.await;
        assert!(!service.proved(told), "it stays");
        assert_eq!(state(&disk), SlotState::Good);
        assert!(service.prove(true).is_none(), "said once");
    });
}

/// Holds the disk's only turn: as long as the first is there, it gives no answer.
async fn hang(disk: &SharedDisk) -> (std::sync::mpsc::Sender<()>, tokio::task::JoinHandle<Result<()>>) {
    let (go, wait) = channel::<()>();
    let (begins, begun) = oneshot::channel();
    let held = disk.clone();
    let hangs = tokio::spawn(async move {
        let work = move |_: &mut MachineDisk| {
            begins.send(()).unwrap();
            // The channel's end is what is waited for.
            assert!(wait.recv().is_err());
            Ok(())
        };
        on_disk(&held, work).await
    });
    begun.await.unwrap();
    (go, hangs)
}

#[test]
fn what_runs_is_read_back_for_a_rebuild_without_the_verifier_in_hand() {
    let (dir, site) = (tempfile::tempdir().unwrap(), TestSite::new(1));
    let (http, _hear) = web::honest(site.files.clone(), BTreeMap::new());
    let director = Director::start(&site, (1, 4, Via::Cold, true));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (mut service, disk) = on_trial_of(dir.path(), &site, &[http], &director.url);
        let target = hears_of_a_rebuild(&mut service, &director).await;
        let (go, hangs) = hang(&disk).await;

        let mut job = service.fetch(target);
        // It takes the verifier at its first turn, and gives it back before the disk has answered.
        let free = timeout(PATIENCE, async {
            loop {
                let waits = timeout(Duration::from_millis(20), &mut job).await;
                assert!(waits.is_err(), "it waits for its disk: {:?}", waits.map(|done| done.event));
                if service.verifier.try_lock().is_ok() {
                    break;
                }
            }
        });
        free.await.expect("orders and settings are verified meanwhile");

        drop(go);
        hangs.await.unwrap().unwrap();
        // Nothing was ever written to this slot.
        let Event::Fetched(Some(note)) = job.await.event else { panic!("it is not read back") };
        assert!(note.contains("the next boot fetches it anew"), "{note}");
    });
}

/// It may be what nothing needs: the machine comes up anew by it, says so, and is not sent round again.
#[test]
fn a_root_that_cannot_be_read_back_is_put_up_anew_as_it_lies() {
    let (dir, site) = (tempfile::tempdir().unwrap(), TestSite::new(1));
    let (http, _hear) = web::honest(site.files.clone(), BTreeMap::new());
    let director = Director::start(&site, (1, 4, Via::Cold, true));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (mut service, disk) = on_trial_of(dir.path(), &site, &[http], &director.url);
        let target = hears_of_a_rebuild(&mut service, &director).await;
        // What is read past the cache comes from the path, and there is nothing.
        std::fs::rename(dir.path().join("disk"), dir.path().join("aside")).unwrap();
        std::fs::write(dir.path().join("disk"), "").unwrap();

        let Event::Fetched(Some(note)) = service.fetch(target).await.event else { panic!("it is given up") };
        assert!(note.contains("reading a slot back") && note.contains("starts as it lies"), "{note}");
        let root_hash = service.journal.embedded.root_hash.clone();
        let put_up = on_disk(&disk, move |disk| Ok((disk.put_up(&root_hash), disk.slots().disk.labels)));
        let (order, labels) = put_up.await.unwrap();
        assert_eq!(order, 6, "the same order is done");
        assert!(labels[0].is_some(), "its label stays");
    });
}

/// Firmware started what runs from there all the same: another release must not make it anew without what runs and without a loader.
#[test]
fn beside_an_esp_that_cannot_be_read_another_release_is_fetched_into_memory_and_gone_to_by_kexec() {
    let (dir, site) = (tempfile::tempdir().unwrap(), TestSite::new(2));
    let (http, _hear) = web::honest(site.files.clone(), BTreeMap::new());
    let director = Director::start(&site, (2, 6, Via::Cold, true));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (mut service, _) = on_trial_of(dir.path(), &site, &[http], &director.url);
        let aside = tempfile::tempdir().unwrap();
        let disk = MachineDisk::on_trial(&aside.path().join("disk"), &site.manifests[&1], &dir.path().join("uki"));
        service.disk = Some(SharedDisk::new(disk.without_esp()));
        let before = std::fs::read(aside.path().join("disk")).unwrap();
        std::fs::create_dir(dir.path().join("next")).unwrap();
        hears(&mut service).await;

        let target = duty::Target { release: "minimal/2".parse().unwrap(), sequence: 6 };
        let done = service.fetch(target).await;
        assert!(matches!(done.event, Event::Fetched(None)), "{:?}", done.event);
        let ready = done.ready.expect("it is fetched");
        assert_eq!(ready.via(), Via::Kexec);
        let after = std::fs::read(aside.path().join("disk")).unwrap();
        assert!(before == after, "nothing is written");
    });
}

#[test]
fn a_uki_is_put_back_only_for_a_release_that_the_loader_knows() {
    let (dir, site) = (tempfile::tempdir().unwrap(), TestSite::new(2));
    let uki = dir.path().join("uki");
    std::fs::write(&uki, &site.files[&site.paths(1)[0][1..]]).unwrap();
    let mut disk = MachineDisk::on_trial(&dir.path().join("disk"), &site.manifests[&1], &uki);
    let before = disk.slots().disk.clone();
    disk.mend_uki(&site.manifests[&1], &uki).unwrap();
    let swept = disk.mend_uki(&site.manifests[&2], &uki).unwrap_err();
    assert_eq!(swept.kind(), "assignment-superseded");
    assert!(disk.mend_uki(&site.manifests[&1], &dir.path().join("gone")).is_err());
    assert_eq!(disk.slots().disk, before, "what is there counts");
}
