//! From the initramfs to another release than the one that it embeds.

use crate::change::{self, Otherwise};
use crate::error::{AgentError, FailureClass, Result};
use crate::flow::Flow;
use kiln_protocol::slot::Slots;
use kiln_protocol::{Assignment, Sha256Hex, Via};
use kiln_release::Mode;
use std::path::Path;

/// Where firmware leads after a restart of a boot whose root lies in no slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Again {
    /// To this UKI: firmware started it from the disk, where its entry still is.
    Here,
    /// There as well, by all that is known: it was started from a disk that gives no answer now, or on which no entry can be read
    /// that led here.
    Likely,
    /// Where firmware chooses anew. What came over the network was chosen by the network, whatever else lies on the disk.
    Anew,
}

impl Again {
    /// `slots` of the disk, if it answers; `via` is how this kernel was started.
    pub(super) fn of(from_disk: bool, via: Via, mode: Mode, slots: Option<&Slots>, root_hash: &Sha256Hex) -> Self {
        match (from_disk, slots) {
            (true, Some(slots)) if slots.disk.listed(root_hash).is_some() => Self::Here,
            // Firmware read what cannot be read here, or another disk.
            (true, Some(_)) if via == Via::Cold => Self::Likely,
            (true, None) if mode == Mode::Disk => Self::Likely,
            (true | false, Some(_) | None) => Self::Anew,
        }
    }

    /// Only a kexec leads on.
    pub(super) fn only_kexec(self) -> bool {
        match self {
            Self::Here | Self::Likely => true,
            Self::Anew => false,
        }
    }
}

/// How a boot goes on that is still here.
#[derive(Debug)]
pub(super) enum Onward {
    /// The firmware leads there.
    Restart,
    /// Nothing leads there, for this reason: what is here starts.
    Stay(AgentError),
}

/// Goes to the assigned release. `only_kexec`: the firmware would start the same UKI again. Where that one's kexec does not come
/// about, the machine is of more use with what it has, but not where the assigned release does not verify: whoever serves it altered
/// may have served this UKI as well, and must not choose what starts. Such a boot ends, told, as every other.
pub(super) async fn go(
    flow: &mut Flow,
    assignment: &Assignment,
    via: Via,
    only_kexec: bool,
    next: &Path,
) -> Result<Onward> {
    let (via, otherwise) = if only_kexec { (Via::Kexec, Otherwise::Kexec) } else { (via, Otherwise::Cold) };
    match change::now(flow, assignment, via, otherwise, next).await {
        Ok(()) if only_kexec => Ok(Onward::Stay(AgentError::NoWayOut)),
        Ok(()) => Ok(Onward::Restart),
        Err(AgentError::Superseded) => Err(AgentError::Superseded),
        Err(error) if only_kexec && error.class() != FailureClass::Verification => Ok(Onward::Stay(error)),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::director::Director;
    use crate::testing::{TestSite, flow, web};
    use crate::verifier::Answer;
    use kiln_protocol::StageState;
    use kiln_protocol::slot::{Content, Disk, Event, Go, Label};
    use std::collections::BTreeMap;
    use std::time::Duration;

    /// A machine in disk mode that booted release 1 and has no disk, on its way to release 2; the kinds of failure that its server
    /// heard of. Of the file at this path on the artifact server one byte is altered.
    async fn goes(
        site: &TestSite,
        altered: Option<&str>,
        only_kexec: bool,
        next: &Path,
    ) -> (Result<Onward>, Vec<String>) {
        Box::pin(goes_as(site, altered, only_kexec, next, |_| {})).await
    }

    /// The same, with something of its own.
    async fn goes_as(
        site: &TestSite,
        altered: Option<&str>,
        only_kexec: bool,
        next: &Path,
        is: impl FnOnce(&mut Flow),
    ) -> (Result<Onward>, Vec<String>) {
        let dir = tempfile::tempdir().unwrap();
        let mut files = site.files.clone();
        if let Some(path) = altered {
            files.get_mut(&path[1..]).unwrap()[0] ^= 1;
        }
        let (http, _hear) = web::honest(files, BTreeMap::new());
        let director = Director::start(site, (2, 5, Via::Cold, true));
        let mut verifier = site.verifier(1, &[http], std::slice::from_ref(&director.url), &dir.path().join("state"));
        verifier.boot.site.mode = Mode::Disk;
        let mut flow = flow(verifier, Some(1), Duration::from_secs(20));
        flow.find_server().await.unwrap();
        let here = flow.verifier.here().unwrap();
        let verified = flow.verifier.verify_metadata(&here).await.unwrap();
        let Answer::Assigned { assignment, via, .. } = flow.ask(&verified, 0).await.unwrap() else {
            panic!("it waits")
        };
        is(&mut flow);
        let gone = go(&mut flow, &assignment, via, only_kexec, next).await;
        let heard = director.heard();
        let failures = heard.iter().flat_map(|report| &report.stages).filter_map(|stage| match &stage.state {
            StageState::Failed(failure) => Some(failure.kind.clone()),
            StageState::Started | StageState::Done | StageState::Waiting { .. } => None,
        });
        (gone, failures.collect())
    }

    /// Its entry stands on the disk and its root is gone, as of a slot that rotted. The network that sends an old UKI must not choose
    /// what starts before the assigned release.
    #[test]
    fn what_the_network_chose_is_not_mended_before_the_assigned_release_although_its_entry_is_on_the_disk() {
        let root_hash = |release| -> Sha256Hex { crate::testing::root_hash(release).parse().unwrap() };
        let content = Content { release: "minimal/1".parse().unwrap(), root_hash: root_hash(1), uki: root_hash(0xa1) };
        let mut slots = Slots::new(Disk::default(), Vec::new());
        for event in [Event::Assign(content, 5, Go::Here(Via::Cold)), Event::Fetched, Event::Granted] {
            slots = slots.event(event).0;
        }
        slots.disk.labels = [None; 2];
        let of = |from_disk, release| Again::of(from_disk, Via::Kexec, Mode::Disk, Some(&slots), &root_hash(release));
        assert_eq!([of(true, 1), of(false, 1)], [Again::Here, Again::Anew]);
        assert_eq!([of(true, 2), of(false, 2)], [Again::Anew; 2], "the loader knows another");
        let none = |from_disk, mode| Again::of(from_disk, Via::Cold, mode, None, &root_hash(1));
        assert_eq!([none(true, Mode::Disk), none(false, Mode::Disk)], [Again::Likely, Again::Anew]);
        assert_eq!([none(true, Mode::Ram), none(false, Mode::Ram)], [Again::Anew; 2]);
        assert_eq!([Again::Here, Again::Likely, Again::Anew].map(Again::only_kexec), [true, true, false]);
    }

    /// The EFI system partition cannot be read, or firmware started another disk of Kiln's: a cold boot would lead here again, and again.
    #[test]
    fn what_firmware_started_from_a_disk_without_an_entry_that_can_be_read_is_left_by_kexec_alone() {
        let root_hash: Sha256Hex = crate::testing::root_hash(1).parse().unwrap();
        let slots = Slots::new(Disk { labels: [Some(Label::of(&root_hash)), None], ..Disk::default() }, Vec::new());
        let empty = Slots::new(Disk::default(), Vec::new());
        for slots in [&slots, &empty] {
            let of = |from_disk, via| Again::of(from_disk, via, Mode::Disk, Some(slots), &root_hash);
            assert_eq!(of(true, Via::Cold), Again::Likely);
            assert!(of(true, Via::Cold).only_kexec());
            assert_eq!(of(true, Via::Kexec), Again::Anew, "firmware did not choose this one");
            assert_eq!([of(false, Via::Cold), of(false, Via::Kexec)], [Again::Anew; 2], "the network did");
        }
    }

    /// The network chose the UKI that runs, and alters the release that is assigned.
    #[test]
    fn where_the_assigned_release_does_not_verify_the_boot_ends_also_without_a_disk() {
        let site = TestSite::new(2);
        let dir = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let [uki, root] = site.paths(2);
        for (path, kind) in [(&root, "root-hash-mismatch"), (&uki, "uki-hash-mismatch")] {
            for only_kexec in [false, true] {
                let (gone, heard) = runtime.block_on(goes(&site, Some(path.as_str()), only_kexec, dir.path()));
                let error = gone.expect_err("nothing of release 1 starts");
                assert_eq!((error.kind(), error.class()), (kind, FailureClass::Verification), "{error}");
                assert!(heard.iter().any(|told| told == kind), "{kind} was not told: {heard:?}");
                assert_eq!(dir.path().read_dir().unwrap().count(), 0, "nothing of release 2 stays");
            }
        }
    }

    /// Here no file can be made in the place where the next release goes.
    #[test]
    fn what_this_machine_cannot_do_keeps_it_where_only_a_kexec_leads_on() {
        let site = TestSite::new(2);
        let dir = tempfile::tempdir().unwrap();
        let no_folder = dir.path().join("file");
        std::fs::write(&no_folder, "").unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (gone, heard) = runtime.block_on(goes(&site, None, true, &no_folder));
        assert!(matches!(&gone, Ok(Onward::Stay(error)) if error.kind() == "machine-file"), "{gone:?}");
        assert!(heard.iter().any(|told| told == "machine-file"), "{heard:?}");
        let (gone, _) = runtime.block_on(goes(&site, None, false, &no_folder));
        assert_eq!(gone.expect_err("it restarts").kind(), "machine-file");
        // Through the firmware: the release was fetched once, and holds.
        let (gone, heard) = runtime.block_on(goes(&site, None, false, dir.path()));
        assert!(matches!(gone, Ok(Onward::Restart)), "{gone:?}");
        assert!(heard.is_empty(), "{heard:?}");
    }

    /// Each try ends in a reset, after which firmware starts the same UKI again.
    #[test]
    fn a_kexec_that_hangs_beside_a_disk_is_tried_three_times_for_an_assignment_and_then_what_is_here_starts() {
        let site = TestSite::new(2);
        let dir = tempfile::tempdir().unwrap();
        // Where it goes on, it ends in this.
        let no_folder = dir.path().join("file");
        std::fs::write(&no_folder, "").unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        // The assignment's sequence is 5.
        let goes_on = |hung: Option<&str>, only_kexec, tried: &[u64]| {
            let is = |flow: &mut Flow| {
                flow.journal.state.hung = hung.map(str::to_owned);
                for sequence in tried {
                    flow.verifier.memory.tries_kexec(*sequence);
                }
            };
            let (gone, heard) = runtime.block_on(goes_as(&site, None, only_kexec, &no_folder, is));
            let stays = match gone {
                Ok(Onward::Stay(error)) | Err(error) => error.kind(),
                Ok(Onward::Restart) => "restart",
            };
            let told = heard.iter().any(|kind| kind == "kexec-disk-hangs");
            assert_eq!(told, stays == "kexec-disk-hangs", "{heard:?}");
            stays == "machine-file"
        };
        let (hung, three) = (Some("vda"), [5; 3]);
        assert!(goes_on(hung, true, &[]) && goes_on(hung, true, &[5, 5]));
        assert!(!goes_on(hung, true, &three), "and that is told");
        assert!(goes_on(hung, true, &[4, 4, 4]) && goes_on(hung, true, &[5, 5, 5, 4]), "another assignment");
        assert!(goes_on(None, true, &three), "nothing hangs now");
        assert!(goes_on(hung, false, &three), "through the firmware");
    }
}
