//! Against a real software TPM. Its socket carries the same commands and answers as the kernel's device, without a resource
//! manager: what is loaded is flushed here.

use super::*;
use crate::error::{AgentError, FailureClass};
use crate::memory::{Memory, Place, recalled};
use kiln_protocol::tpm::{OWNER, pcr_digest, pcr_policy, qualifying_data};
use std::cell::Cell;
use std::collections::VecDeque;
use std::io::{self, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

struct Software {
    child: Child,
    dir: tempfile::TempDir,
}

impl Drop for Software {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Software {
    /// None, with a line that says why, where swtpm is not installed.
    fn start() -> Option<(Self, Tpm)> {
        Self::start_bare().map(|(running, stream)| (running, Tpm::over(stream)))
    }

    /// With the line to it.
    fn start_bare() -> Option<(Self, UnixStream)> {
        let dir = tempfile::tempdir().unwrap();
        let (child, stream) = Self::on(dir.path())?;
        Some((Self { child, dir }, stream))
    }

    fn on(dir: &Path) -> Option<(Child, UnixStream)> {
        let socket = dir.join("tpm");
        let child = Command::new("swtpm")
            .args(["socket", "--tpm2", "--flags", "not-need-init,startup-clear", "--tpmstate"])
            .arg(format!("dir={}", dir.display()))
            .args(["--server", &format!("type=unixio,path={}", socket.display())])
            .stdin(Stdio::null())
            .spawn();
        let Ok(child) = child else {
            crate::testing::oracle::skipped("swtpm is not installed (make setup)");
            return None;
        };
        let limit = Instant::now() + Duration::from_secs(20);
        loop {
            match UnixStream::connect(&socket) {
                Ok(stream) => return Some((child, stream)),
                Err(_) if Instant::now() < limit => std::thread::yield_now(),
                Err(error) => panic!("swtpm does not listen: {error}"),
            }
        }
    }
}

#[test]
fn keys_are_the_same_at_each_making_and_a_quote_of_theirs_verifies() {
    let Some((_running, mut tpm)) = Software::start() else { return };
    assert_eq!(tpm.run(&command::get_random(16)).unwrap().len(), 16);
    let keys = tpm.keys().unwrap();
    let point = Template::Attestation.point(&keys.attestation_public).unwrap();
    Template::Endorsement.point(&keys.endorsement_public).unwrap();

    let nonce = "ab".repeat(32);
    let before = tpm.prove(&keys, &qualifying_data(&nonce, &nonce, "boot")).unwrap();
    let read = before.quote.verify(&point).unwrap();
    assert_eq!(read.qualifying, qualifying_data(&nonce, &nonce, "boot"));
    assert_eq!(read.pcr_digest, pcr_digest(before.pcrs.iter()));

    tpm.cap().unwrap();
    let after = tpm.prove(&keys, &[1; 32]).unwrap();
    let expected = measured::extend(&[0; 32], &measured::cap());
    let at = QUOTED.iter().position(|pcr| *pcr == UKI_PCR).unwrap();
    assert_eq!((before.pcrs[at], after.pcrs[at]), ([0; 32], expected));
    assert_eq!(after.quote.verify(&point).unwrap().pcr_digest, pcr_digest(after.pcrs.iter()));

    tpm.forget(&keys).unwrap();
    let again = tpm.keys().unwrap();
    assert_eq!(again.attestation_public, keys.attestation_public);
    assert_eq!(again.endorsement_public, keys.endorsement_public);
    // What is no credential is refused, and the session that it was for is gone: the TPM has few.
    for _ in 0..8 {
        let error = tpm.open_credential(&again, &[0; 68], &[0; 68]).unwrap_err();
        assert!(error.code().is_some(), "{error}");
    }
}

#[test]
fn what_is_sealed_to_pcrs_is_given_out_before_the_cap_and_not_after() {
    let Some((_running, mut tpm)) = Software::start() else { return };
    let (parent, _) = tpm.run(&command::create_primary(OWNER, Template::Storage)).unwrap();
    let policy = |tpm: &mut Tpm| {
        let session = tpm.run(&command::start_policy(&[7; 16])).unwrap();
        tpm.run(&command::policy_pcr(session, &[UKI_PCR])).unwrap();
        session
    };
    let session = policy(&mut tpm);
    let digest = tpm.run(&command::policy_digest(session)).unwrap();
    tpm.run(&command::flush(session)).unwrap();
    let (private, public) = tpm.run(&command::seal(parent, b"secret", &digest)).unwrap();
    let item = tpm.run(&command::load(parent, &private, &public)).unwrap();
    let session = policy(&mut tpm);
    assert_eq!(tpm.run(&command::unseal(item, Auth::Session(session))).unwrap(), b"secret");
    // Its password is empty, and does not do.
    assert!(tpm.run(&command::unseal(item, Auth::Password)).unwrap_err().code().is_some());
    tpm.cap().unwrap();
    let session = policy(&mut tpm);
    let refused = tpm.run(&command::unseal(item, Auth::Session(session))).unwrap_err();
    assert_eq!(refused.code(), Some(code::POLICY_FAIL));
}

#[test]
fn its_memory_keeps_the_last_of_two_writings_and_outlives_a_cut_between() {
    let Some((_running, mut tpm)) = Software::start() else { return };
    assert_eq!(tpm.run(&command::nv_size(0x0180_4b01)).unwrap_err().code(), Some(code::NO_SUCH_HANDLE));
    assert!(tpm.make_memory().unwrap());
    assert!(tpm.make_memory().unwrap());
    assert_eq!(tpm.recall().unwrap(), None);
    let texts: Vec<Vec<u8>> = (1..=5_u8).map(|n| vec![n; usize::from(n) * 300]).collect();
    for text in &texts {
        tpm.memorise(text).unwrap();
        assert_eq!(tpm.recall().unwrap().as_ref(), Some(text));
    }
    // The fifth lies in the first place. A sixth that was cut before its head was written leaves the fifth.
    tpm.run(&command::nv_write(0x0180_4b02, &[9; 100], 1024)).unwrap();
    assert_eq!(tpm.recall().unwrap().as_ref(), Some(&texts[4]));
    tpm.memorise(b"sixth").unwrap();
    assert_eq!(tpm.recall().unwrap().unwrap(), b"sixth");
    // Of a damaged one the older is believed.
    tpm.run(&command::nv_write(0x0180_4b02, b"x", 0)).unwrap();
    assert_eq!(tpm.recall().unwrap().as_ref(), Some(&texts[4]));
    assert!(tpm.memorise(&[0; 1600]).is_err(), "longer than a place");
}

/// An empty memory in its place would forget all that was seen.
#[test]
fn a_memory_that_was_spoilt_is_no_memory_that_was_never_written() {
    let Some((_running, mut tpm)) = Software::start() else { return };
    let (first, second) = (0x0180_4b01, 0x0180_4b02);
    assert!(tpm.make_memory().unwrap());
    assert_eq!(recalled(&mut tpm).unwrap(), None);
    // The first writing, cut before its head.
    tpm.run(&command::nv_write(first, &[9; 100], 1024)).unwrap();
    assert_eq!(recalled(&mut tpm).unwrap(), None);

    let memory = Memory { sequence: 7, ..Memory::default() };
    let bytes = serde_json::to_vec(&memory).unwrap();
    // A byte of what was written: once, and then twice.
    for places in [&[first][..], &[first, second]] {
        for _ in places {
            tpm.memorise(&bytes).unwrap();
        }
        for place in places {
            assert_eq!(recalled(&mut tpm).unwrap().as_ref(), Some(&memory));
            tpm.run(&command::nv_write(*place, b"x", 50)).unwrap();
        }
        let error = recalled(&mut tpm).unwrap_err();
        assert_eq!((error.kind(), error.class()), ("machine-format", FailureClass::Machine), "{error}");
    }
    // What is written then, on a person's word, is remembered.
    tpm.memorise(&bytes).unwrap();
    assert_eq!(recalled(&mut tpm).unwrap(), Some(memory));
}

#[test]
fn what_one_tpm_sealed_no_other_unseals() {
    let Some((_running, mut tpm)) = Software::start() else { return };
    let Some((_other_running, mut other)) = Software::start() else { return };
    let sealed = tpm.seal(&[42; 32]).unwrap();
    // More often than a TPM has room for: nothing stays loaded.
    for _ in 0..5 {
        assert_eq!(tpm.unseal(&sealed).unwrap(), [42; 32]);
    }
    for _ in 0..5 {
        assert!(other.unseal(&sealed).unwrap_err().is_refusal());
    }
    assert!(!sealed.windows(8).any(|piece| piece == [42; 8]));
    assert!(tpm.unseal(&sealed[..1]).is_err() && tpm.unseal(&[0xff, 0xff, 0]).is_err());
    assert_eq!(tpm.unseal(&sealed).unwrap(), [42; 32]);
}

#[test]
fn a_sealed_key_that_was_cut_ends_no_boot_and_is_told() {
    let Some((_running, mut tpm)) = Software::start() else { return };
    let dir = tempfile::tempdir().unwrap();
    let place = Place::Directory(dir.path().join("state"));
    let first = place.key_sealed_by(&mut tpm).unwrap();
    assert!(first.lost.is_none());
    let file = dir.path().join("state/sealed");
    let whole = std::fs::read(&file).unwrap();
    // An older agent's key lies beside it, and is not what a cut makes of this machine.
    let plain = place.key().unwrap().key;
    let mut known = vec![first.key.public_bytes(), plain.public_bytes()];
    let cut = [0, 1, 2, 3, whole.len() / 2, whole.len() - 1].map(|left| whole[..left].to_vec());
    let others = [vec![0xff; 3000], vec![0, 0, 0, 0], tpm.seal(&[1; 7]).unwrap()];
    for spoilt in cut.into_iter().chain(others) {
        std::fs::write(&file, &spoilt).unwrap();
        let made = place.key_sealed_by(&mut tpm).unwrap();
        let lost = made.lost.expect("the machine has another key, and says why");
        assert_eq!((lost.kind(), lost.class()), ("identity-lost", FailureClass::Machine));
        assert!(!known.contains(&made.key.public_bytes()), "{} bytes", spoilt.len());
        let again = place.key_sealed_by(&mut tpm).unwrap();
        assert_eq!((again.key.public_bytes(), again.lost.is_none()), (made.key.public_bytes(), true), "told once");
        known.push(made.key.public_bytes());
    }
    // What was cut and put back is the machine it was.
    std::fs::write(&file, &whole).unwrap();
    assert_eq!(place.key_sealed_by(&mut tpm).unwrap().key.public_bytes(), first.key.public_bytes());
}

impl Software {
    /// Off and on again: PCRs are zero, what lies in its memory stays.
    fn restart(&mut self) -> Tpm {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let socket = self.dir.path().join("tpm");
        let _ = std::fs::remove_file(&socket);
        let (child, stream) = Self::on(self.dir.path()).unwrap();
        self.child = child;
        Tpm::over(stream)
    }
}

#[test]
fn the_data_s_key_is_given_to_an_initramfs_under_its_secure_boot_state_and_to_nobody_once_it_is_destroyed() {
    let Some((mut running, mut tpm)) = Software::start() else { return };
    let secure_boot = |tpm: &mut Tpm, state: u8| tpm.run(&command::pcr_extend(7, &[state; 32])).unwrap();
    secure_boot(&mut tpm, 1);
    assert_eq!(tpm.data_key(true).unwrap(), None);
    let key: [u8; DATA_KEY] = std::array::from_fn(|n| u8::try_from(n).unwrap());
    tpm.make_data_key(&key).unwrap();
    // More often than a TPM has sessions.
    for _ in 0..5 {
        assert_eq!(tpm.data_key(true).unwrap(), Some(key));
    }
    // The running system, and a kernel that it starts by kexec, which caps once more.
    for _ in 0..2 {
        tpm.cap().unwrap();
        for _ in 0..5 {
            assert!(tpm.data_key(true).unwrap_err().to_string().contains("does not give it out"));
        }
        // It puts none there either: that one no other boot would be given.
        assert!(tpm.make_data_key(&[9; DATA_KEY]).unwrap_err().to_string().contains("started by kexec"));
    }
    // Nor does its password open it, which is empty.
    assert!(tpm.run(&command::nv_read(0x0180_4b11, 64, 0)).unwrap_err().code().is_some());
    let mut tpm = running.restart();
    secure_boot(&mut tpm, 1);
    assert_eq!(tpm.data_key(true).unwrap(), Some(key), "the next boot, of whatever release");

    // Another system: Secure Boot is off, or lets other keys in.
    let mut tpm = running.restart();
    secure_boot(&mut tpm, 2);
    assert!(tpm.data_key(true).is_err() && tpm.has_data_key().unwrap());
    // The release itself, with a word added to its command line: no key is given, and none is made.
    let mut tpm = running.restart();
    secure_boot(&mut tpm, 1);
    tpm.run(&command::pcr_extend(12, &[1; 32])).unwrap();
    assert!(tpm.data_key(true).unwrap_err().to_string().contains("does not give it out"));
    assert!(tpm.make_data_key(&[9; DATA_KEY]).unwrap_err().to_string().contains("command line"));
    // A list of revoked programs goes in, which the running system says beforehand.
    let mut tpm = running.restart();
    secure_boot(&mut tpm, 1);
    tpm.cap().unwrap();
    tpm.carry_data_key(&key, None).unwrap();
    assert!(tpm.data_key(true).is_err(), "not in this boot");
    let mut tpm = running.restart();
    secure_boot(&mut tpm, 3);
    tpm.run(&command::pcr_extend(12, &[1; 32])).unwrap();
    assert!(tpm.data_key(true).is_err(), "the copy is for a command line as it was signed, too");
    let mut tpm = running.restart();
    secure_boot(&mut tpm, 3);
    assert!(tpm.data_key(false).is_err(), "nothing says that the site let this boot in");
    assert_eq!(tpm.data_key(true).unwrap(), Some(key));
    assert!(tpm.run(&command::nv_size(0x0180_4b12)).is_err(), "the copy is gone");
    let mut tpm = running.restart();
    secure_boot(&mut tpm, 1);
    assert!(tpm.data_key(true).is_err(), "the state before");

    // Another list, and it is known what PCR 7 comes to: the copy is nobody else's, and the first one is gone at once.
    let mut tpm = running.restart();
    secure_boot(&mut tpm, 3);
    tpm.cap().unwrap();
    tpm.carry_data_key(&key, None).unwrap();
    let pcr7 = measured::extend(&[0; 32], &[4; 32]);
    tpm.carry_data_key(&key, Some(&pcr7)).unwrap();
    let mut tpm = running.restart();
    secure_boot(&mut tpm, 5);
    assert!(tpm.data_key(true).is_err(), "a thief's system, with the copy in hand");
    let mut tpm = running.restart();
    secure_boot(&mut tpm, 4);
    assert_eq!(tpm.data_key(true).unwrap(), Some(key));
    for copy in [0x0180_4b12, 0x0180_4b13] {
        assert!(tpm.run(&command::nv_size(copy)).is_err(), "{copy:x}");
    }
    // And one that did not go in: the copy is taken back, the key is as it was.
    let mut tpm = running.restart();
    secure_boot(&mut tpm, 4);
    tpm.carry_data_key(&key, None).unwrap();
    tpm.drop_data_key_copy().unwrap();
    assert!(tpm.run(&command::nv_size(0x0180_4b12)).is_err());
    assert_eq!(tpm.data_key(true).unwrap(), Some(key));

    let mut tpm = running.restart();
    secure_boot(&mut tpm, 4);
    assert!(tpm.has_data_key().unwrap());
    assert!(tpm.destroy_data_key().unwrap() && !tpm.destroy_data_key().unwrap());
    assert_eq!((tpm.data_key(true).unwrap(), tpm.has_data_key().unwrap()), (None, false));
    // A cut between making a place and writing it leaves no key.
    let bound = pcr_policy(&[7, 12, 15], &[pcr7, [0; 32], [0; 32]]);
    let unbound = pcr_policy(&[12, 15], &[[0; 32]; 2]);
    for (index, policy) in [(0x0180_4b11, bound), (0x0180_4b12, unbound), (0x0180_4b13, bound)] {
        tpm.run(&command::nv_define_bound(index, 64, &policy)).unwrap();
        assert_eq!(tpm.data_key(true).unwrap(), None, "{index:x}");
    }
    tpm.make_data_key(&key).unwrap();
    assert_eq!(tpm.data_key(true).unwrap(), Some(key));
}

#[test]
fn what_is_delivered_opens_in_this_state_only() {
    let Some((_running, mut tpm)) = Software::start() else { return };
    let keys = tpm.keys().unwrap();
    let proof = tpm.prove(&keys, &[1; 32]).unwrap();
    let delivery = tpm.delivery_key(&proof.pcrs).unwrap();
    let name = kiln_protocol::tpm::name_of(&delivery.public);
    let secret = [9; 32];
    let make = command::make_credential(keys.endorsement, &secret, &name);
    let (id_object, encrypted) = tpm.run(&make).unwrap();
    // More often than a TPM has sessions.
    for _ in 0..3 {
        assert_eq!(tpm.open_delivery(&keys, &delivery, &id_object, &encrypted).unwrap(), secret);
    }
    // Made for the attestation key it is no delivery; and no password does for the delivery key.
    let other =
        command::make_credential(keys.endorsement, &secret, &kiln_protocol::tpm::name_of(&keys.attestation_public));
    let (other_object, other_encrypted) = tpm.run(&other).unwrap();
    assert!(tpm.open_delivery(&keys, &delivery, &other_object, &other_encrypted).is_err());
    let by_password = tpm.activate((delivery.handle, Auth::Password), &keys, &id_object, &encrypted);
    assert!(by_password.unwrap_err().code().is_some());
    tpm.cap().unwrap();
    for _ in 0..5 {
        let refused = tpm.open_delivery(&keys, &delivery, &id_object, &encrypted).unwrap_err();
        assert_eq!(refused.code(), Some(code::POLICY_FAIL));
    }
}

/// What becomes of the next command that extends a PCR.
enum Fault {
    /// It does not reach the TPM.
    Busy,
    /// It is done, and its answer is lost.
    Lost,
}

/// The line to a TPM, with faults.
struct Flaky {
    stream: UnixStream,
    faults: Arc<Mutex<VecDeque<Fault>>>,
}

impl Read for Flaky {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.read(buffer)
    }
}

impl Write for Flaky {
    fn write(&mut self, command: &[u8]) -> io::Result<usize> {
        // TPM2_PCR_Extend, behind tag and size.
        let is_extension = command.get(6..10) == Some(&[0, 0, 1, 0x82][..]);
        match is_extension.then(|| self.faults.lock().unwrap().pop_front()).flatten() {
            None => self.stream.write_all(command).map(|()| command.len()),
            Some(Fault::Busy) => Err(ErrorKind::TimedOut.into()),
            Some(Fault::Lost) => {
                self.stream.write_all(command)?;
                let mut head = [0; 10];
                self.stream.read_exact(&mut head)?;
                let length = u32::from_be_bytes(head[2..6].try_into().unwrap()) as usize;
                self.stream.read_exact(&mut vec![0; length - head.len()])?;
                Err(ErrorKind::TimedOut.into())
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

#[test]
fn a_cap_is_tried_again_and_made_once() {
    let Some((_running, stream)) = Software::start_bare() else { return };
    let faults = Arc::new(Mutex::new(VecDeque::from([Fault::Lost, Fault::Busy, Fault::Lost])));
    let open = || -> Result<Option<Tpm>> {
        Ok(Some(Tpm::over(Flaky { stream: stream.try_clone()?, faults: Arc::clone(&faults) })))
    };
    leave(true, Duration::ZERO, open).unwrap();
    assert!(faults.lock().unwrap().is_empty(), "each of them was met");
    let mut tpm = Tpm::over(stream.try_clone().unwrap());
    let once = measured::extend(&[0; 32], &measured::cap());
    for pcr in [LEFT_PCR, UKI_PCR] {
        assert_eq!(tpm.run(&command::pcr_read(pcr)).unwrap(), once, "PCR {pcr}");
    }
    // Likewise the mark of a kernel that measures no kexec.
    let (pcr, mark) = (measured::IMA_PCR, measured::ima_unmeasured().0);
    faults.lock().unwrap().extend([Fault::Busy, Fault::Busy, Fault::Lost]);
    assert!(extended(pcr, &mark, Duration::ZERO, open).unwrap() && faults.lock().unwrap().is_empty());
    assert_eq!(tpm.run(&command::pcr_read(pcr)).unwrap(), measured::extend(&[0; 32], &mark));
    assert!(!extended(pcr, &mark, Duration::ZERO, || Ok(None)).unwrap(), "there is no TPM");
}

/// A TPM that gives no answer.
struct Dead;

impl Read for Dead {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        Err(ErrorKind::TimedOut.into())
    }
}

impl Write for Dead {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(ErrorKind::TimedOut.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_tpm_that_cannot_be_capped_ends_the_boot_of_an_image_with_data_or_secrets() {
    let opened = Cell::new(0);
    let dead = || -> Result<Option<Tpm>> {
        opened.set(opened.get() + 1);
        Ok(Some(Tpm::over(Dead)))
    };
    let error = AgentError::from(leave(true, Duration::ZERO, dead).unwrap_err());
    assert_eq!((error.kind(), opened.get()), ("machine-tpm", CAP_TRIES));
    leave(false, Duration::ZERO, dead).expect("there is nothing to be asked for");
    leave(true, Duration::ZERO, || Ok(None)).expect("there is no TPM to ask");
    let locked = || Err(io::Error::from(ErrorKind::PermissionDenied).into());
    assert!(leave(true, Duration::ZERO, locked).is_err(), "there is one, whatever became of its node");
    // Its node goes away between two tries: it is still there.
    let tries = Cell::new(0);
    let goes = || {
        tries.set(tries.get() + 1);
        Ok((tries.get() == 1).then(|| Tpm::over(Dead)))
    };
    assert!(leave(true, Duration::ZERO, goes).is_err());
}

/// A TPM that answers every command with this code.
struct Refuses(u32);

impl Read for Refuses {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // TPM_ST_NO_SESSIONS, the length.
        let answer = [&[0x80, 0x01, 0, 0, 0, 10][..], &self.0.to_be_bytes()].concat();
        buffer[..answer.len()].copy_from_slice(&answer);
        Ok(answer.len())
    }
}

impl Write for Refuses {
    fn write(&mut self, command: &[u8]) -> io::Result<usize> {
        Ok(command.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_tpm_that_does_nothing_keeps_no_boot_from_being_heard_and_one_that_refuses_the_cap_does() {
    let refuses = |code| closed(Duration::ZERO, || Ok(Some(Tpm::over(Refuses(code)))));
    refuses(0x101).expect("it is in failure mode");
    closed(Duration::ZERO, || Ok(Some(Tpm::over(Dead)))).expect("it gives no answer");
    closed(Duration::ZERO, || Ok(None)).expect("there is none");
    // Busy, in lock-out: it may give something out in a moment.
    for code in [0x922, 0x921] {
        assert_eq!(refuses(code).unwrap_err().code(), Some(code));
    }
    // One that answers again once the cap was given up.
    let opened = Cell::new(0);
    let wakes = || -> Result<Option<Tpm>> {
        opened.set(opened.get() + 1);
        Ok(Some(if opened.get() >= 2 * CAP_TRIES { Tpm::over(Refuses(0x922)) } else { Tpm::over(Dead) }))
    };
    assert!(closed(Duration::ZERO, wakes).is_err());
    assert_eq!(opened.get(), 2 * CAP_TRIES);
    // Its node cannot be opened, which says nothing of it.
    assert!(closed(Duration::ZERO, || Err(io::Error::from(ErrorKind::PermissionDenied).into())).is_err());

    // It answers, and takes no cap.
    let Some((_running, stream)) = Software::start_bare() else { return };
    let faults = Arc::new(Mutex::new((0..CAP_TRIES).map(|_| Fault::Busy).collect::<VecDeque<_>>()));
    let open = || -> Result<Option<Tpm>> {
        Ok(Some(Tpm::over(Flaky { stream: stream.try_clone()?, faults: Arc::clone(&faults) })))
    };
    assert!(closed(Duration::ZERO, open).is_err());
    assert!(faults.lock().unwrap().is_empty());
    closed(Duration::ZERO, open).expect("it takes the cap");
}
