//! What outlives a boot, and what does not.

use super::floors::FLOORS;
use super::orders::ORDERS;
use super::place::{KEY, efi_key};
use super::*;
use crate::disk::DiskError;
use crate::tpm::{Tpm, TpmFault};
use kiln_protocol::slot::Label;
use kiln_protocol::tpm::code::{NO_SUCH_HANDLE, NV_SPACE, NV_UNWRITTEN};
use kiln_protocol::{KeyStorage, ORDER_TYPE, Order, OrderAction, OrderError, RollbackMemory, SPEC_VERSION};
use kiln_release::tuf::SeenRole;
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::path::Path;

#[test]
fn boots_that_fail_to_verify_come_ever_slower_and_the_count_outlives_them() {
    let mut memory = Memory::default();
    assert!(!serde_json::to_string(&memory).unwrap().contains("failed_boots"));
    let mut pauses = Vec::new();
    for _ in 0..10 {
        pauses.push(memory.boot_failed().as_secs());
        memory = serde_json::from_str(&serde_json::to_string(&memory).unwrap()).unwrap();
    }
    assert_eq!(pauses, [0, 0, 0, 20, 40, 80, 160, 290, 290, 290]);
    memory.failed_boots = u32::MAX;
    assert_eq!(memory.boot_failed(), LONGEST_PAUSE);
}

#[test]
fn only_a_disk_that_gives_no_answer_is_left_alone_and_its_name_is_no_longer_than_a_name() {
    let mut memory = Memory::default();
    let broken = DiskError::Io { disk: "sda".into(), what: "reading", reason: "I/O error".into() };
    for error in [AgentError::from(broken), AgentError::from(DiskError::NoDisk), AgentError::NoServer] {
        assert!(!memory.disk_hangs(&error), "{error}");
    }
    assert!(!serde_json::to_string(&memory).unwrap().contains("disk_hung"));
    let late = |disk: &str| DiskError::Late { disk: disk.into(), what: "reading", reason: String::new() }.into();
    assert!(memory.disk_hangs(&late("nvme0n1")));
    let text = serde_json::to_string(&memory).unwrap();
    assert_eq!(serde_json::from_str::<Memory>(&text).unwrap().disk_hung.as_deref(), Some("nvme0n1"));
    assert!(memory.disk_hangs(&late(&"\"ä".repeat(1000))) && memory.disk_hangs(&late(&"x".repeat(1000))));
    assert_eq!(memory.disk_hung.map(|name| name.len()), Some(32));
}

#[test]
fn a_machine_that_cannot_count_its_failed_boots_rests_after_each() {
    let mut memory = Memory::default();
    let first = memory.boot_failed();
    assert_eq!(rest(first, true, 200), Duration::ZERO, "it counts: the first restarts at once");
    let all: Vec<u64> = (0..=u8::MAX).map(|jitter| rest(first, false, jitter).as_secs()).collect();
    assert_eq!((all[0], all[255]), (60, 290));
    assert!(all.iter().collect::<std::collections::BTreeSet<_>>().len() > 100, "{all:?}");
    // One whose memory fails later keeps what it had counted.
    assert_eq!(rest(Duration::from_secs(160), false, 0), Duration::from_secs(160));
    assert_eq!(Place::Boot("/run/kiln".into()).rollback_memory(), RollbackMemory::None);
}

#[test]
fn a_sealed_key_stays_the_machines_whatever_happens_to_its_tpm() {
    use KeyStorage::{EfiVariable, Ephemeral, Tpm};
    for (tpm, sealed, plain, storage) in [
        (true, false, false, Tpm),
        (true, true, false, Tpm),
        // An older agent was here in between, and left a key of its own.
        (true, true, true, Tpm),
        // Of a release before TPMs were used.
        (true, false, true, EfiVariable),
        (false, false, true, EfiVariable),
        (false, false, false, EfiVariable),
        // The TPM is off: nothing is written that would count once it is on again.
        (false, true, false, Ephemeral),
        (false, true, true, Ephemeral),
    ] {
        assert_eq!(efi_key(sealed, plain, tpm), storage, "{tpm} {sealed} {plain}");
    }
}

#[test]
fn key_and_memory_outlive_the_process() {
    let dir = tempfile::tempdir().unwrap();
    let place = Place::Directory(dir.path().join("state"));
    let first = place.key().unwrap();
    assert!(first.lost.is_none());
    assert_eq!(place.key().unwrap().key.public_bytes(), first.key.public_bytes());
    let memory = Memory { sequence: 7, ..Memory::default() };
    place.remember(&memory).unwrap();
    assert_eq!(place.memory().unwrap(), memory);
    std::fs::write(place.path("Seen"), "not json").unwrap();
    assert_eq!(place.memory().unwrap_err().kind(), "machine-format", "a broken memory is not an empty one");
}

#[test]
fn a_key_that_was_cut_ends_no_boot_and_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let place = Place::Directory(dir.path().join("state"));
    let first = place.key().unwrap().key;
    for left in [0, 1, 31, 33] {
        std::fs::write(place.path(KEY), vec![7_u8; left]).unwrap();
        let Identity { key, lost } = place.key().unwrap();
        let lost = lost.expect("the machine has another key, and says why");
        assert_eq!(lost.kind(), "identity-lost");
        assert!(lost.to_string().contains(&format!("{left} bytes")), "{lost}");
        assert_ne!(key.public_bytes(), first.public_bytes());
        let again = place.key().unwrap();
        assert_eq!((again.key.public_bytes(), again.lost.is_none()), (key.public_bytes(), true), "told once");
    }
}

/// A machine's disk keeps its order over a new director, whose numbers begin anew.
#[test]
fn a_new_director_begins_behind_all_that_was_assigned_before() {
    let site = |key: &str| -> Site {
        serde_json::from_value(serde_json::json!({
            "_type": "kiln-site", "spec_version": "1.0", "name": "lab", "directors": {key: {}},
            "director_threshold": 1, "agent_api": {"ca_pem": ""}, "floors": {},
        }))
        .unwrap()
    };
    let mut memory = Memory::default();
    assert!(!memory.directed_by(&site("a")));
    (memory.sequence, memory.time_floor) = (7, Some("2099-01-01T00:00:00Z".parse().unwrap()));
    assert_eq!((memory.order(7), memory.sequence_of(7)), (7, Some(7)));
    assert!(!memory.directed_by(&site("a")));
    assert_eq!(memory.order(8), 8, "the same director");
    assert!(memory.time_floor.is_some());
    assert!(memory.directed_by(&site("b")));
    assert_eq!((memory.sequence, memory.order(1)), (0, 8), "lower than 7, and newer");
    assert_eq!(memory.time_floor, None, "what the old one said of the time");
    assert_eq!((memory.sequence_of(8), memory.sequence_of(7)), (Some(1), None));
}

#[test]
fn a_boot_that_is_not_given_its_data_restarts_once() {
    let mut memory = Memory::default();
    assert!(!memory.restart_for_data(false));
    assert!(!serde_json::to_string(&memory).unwrap().contains("restarted_for_data"));
    assert!(memory.restart_for_data(true));
    // It came by kexec again.
    let text = serde_json::to_string(&memory).unwrap();
    let mut memory: Memory = serde_json::from_str(&text).unwrap();
    assert!(!memory.restart_for_data(true) && !memory.restart_for_data(true));
    // After a boot through firmware it may once more.
    assert!(!memory.restart_for_data(false) && memory.restart_for_data(true));
}

fn remembers(sequence: u64, floor: u64) -> Memory {
    Memory { sequence, floors: [("minimal".to_owned(), floor)].into(), ..Memory::default() }
}

/// What becomes of what is stored while the system runs, and its service is started again.
#[test]
fn a_service_goes_on_with_what_was_remembered_last_whatever_becomes_of_what_is_stored() {
    let handed_over = remembers(3, 2);
    let newest = remembers(7, 3);
    let spoils: [fn(&Path) -> io::Result<()>; 5] = [
        |path| std::fs::write(path, ""),
        |path| std::fs::write(path, "{\"seen\":"),
        |path| std::fs::write(path, [0xff; 40]),
        |path| std::fs::rename(path, path.with_extension("gone")),
        // An older one, put back.
        |path| std::fs::write(path, serde_json::to_vec(&remembers(1, 1)).unwrap()),
    ];
    for spoil in spoils {
        let dir = tempfile::tempdir().unwrap();
        let place = Place::Directory(dir.path().join("state"));
        place.remember(&handed_over).unwrap();
        place.remember(&newest).unwrap();
        let Resumed { memory, spoilt } = place.resume(Some(&handed_over)).unwrap();
        assert!(memory == newest && spoilt.is_none(), "{spoilt:?}");

        spoil(&place.path("Seen")).unwrap();
        let Resumed { memory, spoilt } = place.resume(Some(&handed_over)).unwrap();
        assert_eq!((&memory, memory.floor("minimal")), (&newest, 3));
        assert_eq!(spoilt.expect("it is told").kind(), "machine-format");
        place.remember(&memory).unwrap();
        assert_eq!(place.memory().unwrap(), newest, "stored anew: the next boot can read it");
        assert!(place.resume(Some(&handed_over)).unwrap().spoilt.is_none(), "told once");
    }
}

#[test]
fn without_its_copy_a_service_goes_on_with_what_was_handed_over_and_never_with_nothing() {
    let (handed_over, newest) = (remembers(3, 2), remembers(7, 3));
    let dir = tempfile::tempdir().unwrap();
    let place = Place::Directory(dir.path().join("state"));
    place.remember(&newest).unwrap();
    let (seen, copy) = (place.path("Seen"), dir.path().join("state/remembered.json"));
    std::fs::write(&copy, "spoilt as well").unwrap();
    let Resumed { memory, spoilt } = place.resume(Some(&handed_over)).unwrap();
    assert!(memory == newest && spoilt.is_none(), "what is stored can be read: {spoilt:?}");
    std::fs::remove_file(&copy).unwrap();
    for gone in [false, true] {
        let done = if gone { std::fs::remove_file(&seen) } else { std::fs::write(&seen, "spoilt") };
        done.unwrap();
        let Resumed { memory, spoilt } = place.resume(Some(&handed_over)).unwrap();
        assert!(memory == handed_over && spoilt.is_some());
    }
    // Handed over by an initramfs that knew nothing of this.
    std::fs::write(&seen, "spoilt").unwrap();
    assert_eq!(place.resume(None).unwrap_err().kind(), "machine-format", "a broken memory is not an empty one");
}

#[test]
fn the_copy_is_never_older_than_what_is_stored() {
    let dir = tempfile::tempdir().unwrap();
    let place = Place::Directory(dir.path().join("state"));
    place.remember(&remembers(3, 2)).unwrap();
    // No file can be put there any more: a folder has its name.
    let copy = dir.path().join("state/remembered.json");
    std::fs::remove_file(&copy).unwrap();
    std::fs::create_dir_all(copy.join("in the way")).unwrap();
    place.remember(&remembers(7, 3)).unwrap();
    assert_eq!(place.resume(None).unwrap().memory, remembers(7, 3));
}

/// An earlier release's initramfs that met a busy TPM remembered in the place beside it.
#[test]
fn a_copy_stands_in_for_no_other_place_but_the_tpms_for_what_is_beside_it() {
    let dir = tempfile::tempdir().unwrap();
    let beside = Place::Directory(dir.path().join("state"));
    let tpm = Place::Tpm(Box::new(beside.clone()));
    let written = |memory: &Memory| serde_json::to_vec(memory).unwrap();
    let (old, new) = (remembers(3, 2), remembers(7, 3));
    let copy = |name: &str| std::fs::read(dir.path().join("state").join(name)).ok();
    beside.remember(&old).unwrap();
    assert_eq!((copy("remembered.json"), copy("remembered-tpm.json")), (Some(written(&old)), None));
    tpm.keep_copy(&written(&new));
    assert_eq!(copy("remembered.json"), Some(written(&old)), "each has its own");
    assert_eq!(beside.resume(None).unwrap().memory, old);
    // A service whose TPM gives no answer any more goes on with what the TPM remembered.
    std::fs::remove_file(dir.path().join("state/remembered.json")).unwrap();
    assert_eq!(beside.resume(None).unwrap().memory, new);
}

fn signed_floors(images: usize, floor: u64) -> BTreeMap<String, u64> {
    (0..images).map(|n| (format!("{n:032}"), floor)).collect()
}

#[test]
fn of_a_sites_floors_those_are_remembered_that_this_machine_has_a_use_for() {
    let names: Vec<String> = signed_floors(9, 1).into_keys().collect();
    let [one, two, three, four, five] = [0, 1, 2, 3, 4].map(|n| names[n].as_str());
    let mut memory = Memory::default();
    memory.hear_floors(&signed_floors(200, 3), [five, five], &[]);
    assert_eq!((memory.floors.len(), memory.floor(five), memory.floor(one)), (1, 3, 1));
    // Sent to another image, and on to a third: what it was counts on, and rises.
    memory.hear_floors(&signed_floors(200, 4), [five, four], &[]);
    memory.hear_floors(&signed_floors(200, 5), [four, three], &[]);
    assert_eq!([five, four, three].map(|image| memory.floor(image)), [5, 5, 5]);
    memory.hear_floors(&signed_floors(200, 2), [four, three], &[]);
    assert_eq!(memory.floor(four), 5, "none goes down");
    // There is no room for all that it ever was: what lies on its disk stays.
    memory.hear_floors(&signed_floors(200, 6), [three, two], &[five.to_owned(), three.to_owned()]);
    assert_eq!((memory.floors.len(), memory.floor(five), memory.floor(four)), (FLOORS, 6, 1));
    // Come over the network as neither of two slots, and sent on: one of those goes.
    memory.hear_floors(&signed_floors(200, 6), [two, one], &[five.to_owned(), three.to_owned()]);
    assert_eq!(memory.floors.len(), FLOORS);
    assert_eq!([one, two, five].map(|image| memory.floor(image)), [6, 6, 6]);
    // An earlier agent remembered them all.
    let mut earlier = Memory { floors: signed_floors(200, 7), ..Memory::default() };
    earlier.hear_floors(&signed_floors(200, 7), [one, one], &[five.to_owned()]);
    assert_eq!((earlier.floors.len(), earlier.floor(one), earlier.floor(five)), (FLOORS, 7, 7));
    // An image that no floor was signed for takes no room.
    let mut none = Memory::default();
    none.hear_floors(&BTreeMap::new(), [one, two], &[]);
    assert_eq!(none, Memory::default());
}

/// Every number at its longest, two signers of a role (more are not remembered), and a site that signs floors for 200 images.
#[test]
fn all_that_is_remembered_fits_into_a_tpm() {
    const SIGNERS: usize = 2;
    let late: Timestamp = "9999-12-30T20:59:59.123456789Z".parse().unwrap();
    let role = SeenRole { version: u64::MAX, keys: vec!["0".repeat(16); SIGNERS] };
    let image = |n: usize| format!("{n:032}");
    let mut memory = Memory {
        seen: Seen {
            root: u64::MAX,
            timestamp: Some(role.clone()),
            timestamp_snapshot: u64::MAX,
            snapshot: Some(role),
            roles: ["targets".to_owned(), format!("image-{}", image(0))].map(|name| (name, u64::MAX)).into(),
        },
        // Where sequences end.
        sequence: 1 << 48,
        time_floor: Some(late),
        director: "0".repeat(64),
        order_base: u64::MAX,
        failed_boots: u32::MAX,
        restarted_for_data: true,
        orders_until: Some(late),
        disk_hung: Some("x".repeat(32)),
        kexecs: Some((1 << 48, u8::MAX)),
        ..Memory::default()
    };
    let floors = signed_floors(200, u64::MAX);
    memory.hear_floors(&floors, [&image(0), &image(1)], &[2, 3].map(image));
    assert_eq!(memory.floors.len(), FLOORS);
    let order = |n: usize| Order {
        type_: ORDER_TYPE.into(),
        spec_version: SPEC_VERSION.into(),
        id: format!("{n:032x}").parse().unwrap(),
        machines: Vec::new(),
        action: OrderAction::Assign { image: "rescue".parse().unwrap(), release: 1, class: "rescue".parse().unwrap() },
        issued: late,
        expires: late,
    };
    let now = late - jiff::SignedDuration::from_secs(1);
    for n in 0..ORDERS {
        memory.take_order(&order(n), 1 << 48, now).unwrap();
    }
    assert_eq!(memory.take_order(&order(ORDERS), 1, now), Err(OrderError::MemoryFull { limit: ORDERS }));
    // Releases come and go, and no boot ever says which record lies on the disk.
    let labels = [1, 2, 3].map(|n| Label([n; 16]));
    let mut longest = 0;
    for n in 0..30 {
        memory.expect_record(&labels[n / 2 % 3], &format!("{n:032}"), &labels[..2]);
        longest = longest.max(serde_json::to_vec(&memory).unwrap().len());
    }
    assert!(longest <= crate::tpm::room(), "{longest} bytes, and {} fit", crate::tpm::room());
    assert!(longest > 1000, "it is the longest: {longest}");
    let text = serde_json::to_string(&memory).unwrap();
    assert_eq!(serde_json::from_str::<Memory>(&text).unwrap(), memory);
}

#[test]
fn an_order_that_an_earlier_agent_remembered_stays_remembered() {
    let id = "0".repeat(32);
    let told = |mark: &str| format!(r#"{{"seen":{{}},"orders":{{"{id}":{mark}}}}}"#);
    let [earlier, now] =
        [r#"{"sequence":7,"expires":"2099-01-01T00:00:00Z"}"#, r#"[7,"2099-01-01T00:00:00Z"]"#].map(told);
    let memory: Memory = serde_json::from_str(&earlier).unwrap();
    assert_eq!(memory.orders[&id].sequence, 7);
    assert_eq!(serde_json::from_str::<Memory>(&now).unwrap(), memory);
    assert!(serde_json::to_string(&memory).unwrap().contains(r#"[7,"2099-01-01T00:00:00Z"]"#));
}

/// What a TPM in a test answers; then it gives no answer any more.
struct Says(VecDeque<Said>);

#[derive(Clone, Copy)]
enum Said {
    Refused(u32),
    /// To `NV_UndefineSpace`.
    Done,
    /// To `NV_ReadPublic`: the index is there.
    Size,
}

impl Read for Says {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let (tag, code, body): (u16, u32, &[u8]) = match self.0.pop_front() {
            None => return Ok(0),
            Some(Said::Refused(code)) => (0x8001, code, &[]),
            Some(Said::Done) => (0x8002, 0, &[0; 4]),
            Some(Said::Size) => (0x8001, 0, &[0, 14, 1, 0x80, 0x4b, 1, 0, 0xb, 0, 0, 0, 0, 0, 0, 6, 0x40, 0, 0]),
        };
        let length = u32::try_from(10 + body.len()).unwrap().to_be_bytes();
        let answer = [&tag.to_be_bytes()[..], &length, &code.to_be_bytes(), body].concat();
        into[..answer.len()].copy_from_slice(&answer);
        Ok(answer.len())
    }
}

impl Write for Says {
    fn write(&mut self, command: &[u8]) -> io::Result<usize> {
        Ok(command.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn another_place_stands_in_for_a_tpm_only_where_that_says_that_it_keeps_nothing() {
    use Said::{Done, Refused, Size};
    /// Failure mode; busy; another's owner password.
    const OTHERS: [u32; 3] = [0x101, 0x922, 0x9a2];
    let dir = tempfile::tempdir().unwrap();
    let beside = || Place::Directory(dir.path().join("state"));
    let of = |said: &[Said]| Place::with(Ok(Some(Tpm::over(Says(said.iter().copied().collect())))), beside());
    let (none, full) = (Refused(NO_SUCH_HANDLE), Refused(NV_SPACE));
    // It has no place and takes none; it had room for one, and nothing was written there.
    let says_so: [&[Said]; 3] = [
        &[none, full, none],
        &[none, Refused(OTHERS[2]), none],
        &[Size, none, full, Size, Refused(NV_UNWRITTEN), Done],
    ];
    for said in says_so {
        assert_eq!(of(said).rollback_memory(), RollbackMemory::File);
    }
    assert_eq!(Place::with(Ok(None), beside()).rollback_memory(), RollbackMemory::File, "there is no TPM");
    // It has both.
    assert_eq!(of(&[Size, Size]).rollback_memory(), RollbackMemory::TpmNv);
    // It gives no answer, or none that says so: at once, at the second place, or when one of two is gone and the other is not empty.
    let mut unknown = vec![of(&[]), of(&[Size, none, full, Size, Refused(0x101)]), of(&[none, full, Refused(0x922)])];
    unknown.extend(OTHERS.iter().flat_map(|code| [of(&[Refused(*code)]), of(&[Size, Refused(*code)])]));
    unknown.push(Place::with(Err(TpmFault::from(io::Error::other("no answer"))), beside()));
    beside().remember(&remembers(3, 2)).unwrap();
    for place in unknown {
        assert_eq!(place.rollback_memory(), RollbackMemory::TpmNv);
        // Not what lies beside it: the boot begins as a stranger, and says so.
        let begun = crate::init::Begun::of(place, &dir.path().join("meanwhile")).unwrap();
        assert_eq!(begun.fault.map(|fault| fault.kind()), Some("machine-tpm"));
        assert_eq!(begun.memory, Memory::default());
    }
}
