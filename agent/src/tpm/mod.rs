//! This machine's TPM: which keys it has, its quote, what the server's credential gives, and the cap that says that the
//! initramfs was left. What is said to it is `kiln_protocol::tpm`.

mod data_key;
mod device;
mod nv;
mod sealed;
#[cfg(test)]
mod tests;

pub use data_key::DATA_KEY;
pub use device::{Tpm, TpmFault};
#[cfg(test)]
pub use nv::room;
pub use sealed::is_whole;

use crate::memory::random;
use kiln_protocol::tpm::{Auth, DELIVERY, ENDORSEMENT, QUOTED, Quote, Template, delivery_policy};
use kiln_protocol::tpm::{code, command};
use kiln_protocol::{EVENT_LOG_LIMIT, TpmPresence};
use kiln_release::measured::{self, Log, after_change};
use std::io::Read;
use std::path::Path;
use std::time::Duration;

/// The PCR that names the UKI, and takes the cap.
const UKI_PCR: u8 = 11;
/// Extended by the agent alone, with the same cap: zero in every initramfs that firmware started, whatever the release.
const LEFT_PCR: u8 = 15;
/// How often the cap is tried, and the pause between: a TPM may be busy with itself.
const CAP_TRIES: u32 = 4;
const CAP_PAUSE: Duration = Duration::from_millis(250);
/// Where firmware's event log is (Linux Documentation/security/tpm/tpm_event_log.rst).
const EVENT_LOG: &str = "/sys/kernel/security/tpm0/binary_bios_measurements";

type Result<T> = std::result::Result<T, TpmFault>;

/// The keys that prove which TPM this is, made of its seeds anew at each boot.
#[derive(Debug)]
pub struct Keys {
    endorsement: u32,
    attestation: u32,
    /// Public areas.
    pub endorsement_public: Vec<u8>,
    pub attestation_public: Vec<u8>,
}

/// The key of one delivery of secrets.
#[derive(Debug)]
pub struct DeliveryKey {
    handle: u32,
    /// Public area.
    pub public: Vec<u8>,
}

/// A quote and what it is over.
#[derive(Debug)]
pub struct Proof {
    pub quote: Quote,
    pub pcrs: Vec<[u8; 32]>,
}

/// What there is of a TPM.
pub fn presence() -> TpmPresence {
    match Tpm::open() {
        Ok(None) => TpmPresence::Absent,
        Ok(Some(mut tpm)) => match tpm.run(&command::pcr_read(UKI_PCR)) {
            Ok(_) => TpmPresence::Ready,
            Err(_) => TpmPresence::Unusable,
        },
        Err(_) => TpmPresence::Unusable,
    }
}

/// From here on this boot is past its initramfs: what was sealed to the state before is no longer given out, and a quote says
/// so. `guards`: the image keeps data or wants secrets, so that a system under a TPM that was not capped could ask for what is
/// an initramfs's alone; then one that fails is an error. Elsewhere it costs no boot. Blocks.
pub fn leave_initramfs(guards: bool) -> Result<()> {
    leave(guards, CAP_PAUSE, Tpm::open)
}

fn leave(guards: bool, pause: Duration, open: impl Fn() -> Result<Option<Tpm>>) -> Result<()> {
    let mut after = [None; 2];
    let capped = patiently(pause, open, |tpm| tpm.cap_to(&mut after));
    match capped {
        Ok(true) => {
            println!("kiln-agent: PCR {UKI_PCR} is capped: the TPM gives out nothing of an initramfs's any more");
            Ok(())
        }
        Ok(false) => Ok(()),
        Err(error) => {
            println!("kiln-agent: PCR {UKI_PCR} could not be capped: {error}");
            if guards { Err(error) } else { Ok(()) }
        }
    }
}

/// The same before a byte is heard by what may be old code. One that cannot be capped as it does nothing at all is as good as capped:
/// there is nothing that it could be talked into giving out. Blocks.
pub fn close() -> Result<()> {
    closed(CAP_PAUSE, Tpm::open)
}

fn closed(pause: Duration, open: impl Fn() -> Result<Option<Tpm>>) -> Result<()> {
    let done = leave(true, pause, &open);
    if done.is_err() && does_nothing(pause, open) {
        println!("kiln-agent: this TPM fails, or does not answer: it gives out nothing either");
        return Ok(());
    }
    done
}

/// Whether the TPM is in failure mode or gives no answer, each time that it is asked for what it never refuses.
fn does_nothing(pause: Duration, open: impl Fn() -> Result<Option<Tpm>>) -> bool {
    (0..CAP_TRIES).all(|_| {
        std::thread::sleep(pause);
        // Without its node nothing is known of it.
        let Ok(Some(mut tpm)) = open() else { return false };
        match tpm.run(&command::pcr_read(UKI_PCR)) {
            Ok(_) | Err(TpmFault::Spoilt) => false,
            Err(TpmFault::Device(_)) => true,
            Err(fault @ TpmFault::Answer(_)) => fault.code() == Some(code::FAILURE),
        }
    })
}

/// Extends a PCR, as patiently as the cap is made. False: there is no TPM. Blocks.
pub fn extend(pcr: u8, digest: &[u8; 32]) -> Result<bool> {
    extended(pcr, digest, CAP_PAUSE, Tpm::open)
}

fn extended(pcr: u8, digest: &[u8; 32], pause: Duration, open: impl Fn() -> Result<Option<Tpm>>) -> Result<bool> {
    let mut after = None;
    patiently(pause, open, |tpm| tpm.extend_to(pcr, digest, &mut after))
}

/// Has a TPM do it, which may be busy with itself. False: there is none.
fn patiently(
    pause: Duration,
    open: impl Fn() -> Result<Option<Tpm>>,
    mut work: impl FnMut(&mut Tpm) -> Result<()>,
) -> Result<bool> {
    let mut tries = 1;
    loop {
        let done = match open() {
            Ok(Some(mut tpm)) => work(&mut tpm),
            Ok(None) if tries == 1 => return Ok(false),
            Ok(None) => Err(std::io::Error::from(std::io::ErrorKind::NotFound).into()),
            Err(error) => Err(error),
        };
        match done {
            Ok(()) => return Ok(true),
            Err(error) if tries == CAP_TRIES => return Err(error),
            Err(_) => tries += 1,
        }
        std::thread::sleep(pause);
    }
}

/// Whether a kexec started this kernel, as the TPM knows it. One that does not answer gives no key either.
pub fn is_past_initramfs() -> bool {
    match Tpm::open() {
        Ok(Some(mut tpm)) => tpm.is_past_initramfs().unwrap_or(false),
        Ok(None) | Err(_) => false,
    }
}

/// Firmware's event log; empty where the kernel has none, or one that is too long to be sent.
pub fn event_log() -> Vec<u8> {
    let mut log = Vec::new();
    let limit = EVENT_LOG_LIMIT as u64;
    let read = std::fs::File::open(Path::new(EVENT_LOG)).and_then(|file| file.take(limit + 1).read_to_end(&mut log));
    match read {
        Ok(length) if length <= EVENT_LOG_LIMIT => log,
        Ok(_) => {
            println!("kiln-agent: the firmware's event log is longer than {EVENT_LOG_LIMIT} bytes, and not sent");
            Vec::new()
        }
        Err(error) => {
            println!("kiln-agent: {EVENT_LOG}: {error}: firmware left no event log");
            Vec::new()
        }
    }
}

/// PCR 7 at the next start, now that firmware's list of revoked programs is `after` and was `before`; none where its event log
/// does not tell.
pub fn pcr7_with_dbx(before: &[u8], after: &[u8]) -> Option<[u8; 32]> {
    let log = event_log();
    let log = Log::read(&log).ok()?;
    let pcr7 = Tpm::open().ok()??.run(&command::pcr_read(7)).ok()?;
    after_change(&log, &pcr7, "dbx", before, after)
}

impl Tpm {
    /// Makes both keys.
    pub fn keys(&mut self) -> Result<Keys> {
        let (endorsement, endorsement_public) =
            self.run(&command::create_primary(ENDORSEMENT, Template::Endorsement))?;
        let (attestation, attestation_public) =
            self.run(&command::create_primary(ENDORSEMENT, Template::Attestation))?;
        Ok(Keys { endorsement, attestation, endorsement_public, attestation_public })
    }

    /// What a credential for these keys holds.
    pub fn open_credential(&mut self, keys: &Keys, id_object: &[u8], encrypted_secret: &[u8]) -> Result<Vec<u8>> {
        self.activate((keys.attestation, Auth::Password), keys, id_object, encrypted_secret)
    }

    /// Makes the key that secrets are delivered to: of use only while the PCRs are as these values, which were quoted, say.
    pub fn delivery_key(&mut self, quoted: &[[u8; 32]]) -> Result<DeliveryKey> {
        let policy = delivery_policy(quoted).ok_or_else(|| std::io::Error::other("its quote lacks PCRs"))?;
        let template = Template::Delivery(policy);
        let (handle, public) = self.run(&command::create_primary(ENDORSEMENT, template))?;
        Ok(DeliveryKey { handle, public })
    }

    /// What a credential for this key holds.
    pub fn open_delivery(
        &mut self,
        keys: &Keys,
        key: &DeliveryKey,
        id_object: &[u8],
        encrypted_secret: &[u8],
    ) -> Result<Vec<u8>> {
        let nonce = random().map_err(|e| std::io::Error::other(e.to_string()))?;
        let bound = self.run(&command::start_policy(&nonce))?;
        let opened = self
            .run(&command::policy_pcr(bound, &DELIVERY))
            .and_then(|()| self.run(&command::policy_command_code(bound, command::ACTIVATE_CREDENTIAL)))
            .and_then(|()| self.activate((key.handle, Auth::Session(bound)), keys, id_object, encrypted_secret));
        if opened.is_err() {
            let _ = self.run(&command::flush(bound));
        }
        opened
    }

    fn activate(
        &mut self,
        object: (u32, Auth),
        keys: &Keys,
        id_object: &[u8],
        encrypted_secret: &[u8],
    ) -> Result<Vec<u8>> {
        let nonce = random().map_err(|e| std::io::Error::other(e.to_string()))?;
        let session = self.run(&command::start_policy(&nonce))?;
        let opened = self.run(&command::policy_secret(ENDORSEMENT, session)).and_then(|()| {
            self.run(&command::activate_credential(object, keys.endorsement, session, id_object, encrypted_secret))
        });
        if opened.is_err() {
            // It ends with the command that uses it; this one was not done.
            let _ = self.run(&command::flush(session));
        }
        opened
    }

    /// Quotes. A PCR that is extended between the quote and the reading of its value would make the two differ: then it is
    /// done again.
    pub fn prove(&mut self, keys: &Keys, qualifying: &[u8; 32]) -> Result<Proof> {
        let mut before = self.pcrs()?;
        for _ in 0..3 {
            let quote = self.run(&command::quote(keys.attestation, qualifying))?;
            let after = self.pcrs()?;
            if after == before {
                return Ok(Proof { quote, pcrs: after });
            }
            before = after;
        }
        Err(std::io::Error::other("its PCRs change while they are quoted").into())
    }

    fn pcrs(&mut self) -> Result<Vec<[u8; 32]>> {
        QUOTED.iter().map(|pcr| self.run(&command::pcr_read(*pcr))).collect()
    }

    /// Forgets the keys, where no resource manager does.
    #[cfg(test)]
    pub fn forget(&mut self, keys: &Keys) -> Result<()> {
        self.run(&command::flush(keys.endorsement))?;
        self.run(&command::flush(keys.attestation))
    }

    /// Both caps, once: twice would be the cap of another kernel.
    fn cap_to(&mut self, after: &mut [Option<[u8; 32]>; 2]) -> Result<()> {
        // This one first: a cut between the two is an initramfs that is asked for nothing more.
        for (pcr, after) in [LEFT_PCR, UKI_PCR].into_iter().zip(after) {
            self.extend_to(pcr, &measured::cap(), after)?;
        }
        Ok(())
    }

    /// Extends a PCR, once. `after` is what it comes to, as far as an earlier try has found out: an extension whose answer was lost is
    /// not made twice.
    fn extend_to(&mut self, pcr: u8, digest: &[u8; 32], after: &mut Option<[u8; 32]>) -> Result<()> {
        let now = self.run(&command::pcr_read(pcr))?;
        let wanted = *after.get_or_insert_with(|| measured::extend(&now, digest));
        if now != wanted {
            self.run(&command::pcr_extend(pcr, digest))?;
        }
        Ok(())
    }

    /// As the agent does it when it leaves its initramfs.
    #[cfg(test)]
    pub fn cap(&mut self) -> Result<()> {
        self.cap_to(&mut [None; 2])
    }
}
