//! The key of the data partition: it lies in the TPM's own memory and nowhere else. The TPM gives it out in an initramfs only,
//! before the cap, with nothing added to its command line, and only under the Secure Boot state (keys, lists, on or off) in which
//! it was put there. Taken out of the memory it is gone: no disk holds a copy, sealed or not.
//!
//! A list of revoked boot programs changes that state. So that the key outlives it, a copy that asks for the initramfs alone
//! is put beside it before such a change, and bound to the state that it makes as soon as that is known. The next boot puts the
//! key under the new state and takes the copies away.

use super::{Result, Tpm, TpmFault};
use kiln_protocol::tpm::command;
use kiln_protocol::tpm::{Auth, code, pcr_policy};

/// Bytes of a key: two of AES-256, as XTS wants (IEEE 1619).
pub const DATA_KEY: usize = 64;

/// Owner-defined NV indices beside those of the versions seen.
const KEY: u32 = 0x0180_4b11;
const COPY: u32 = 0x0180_4b12;
const NEXT: u32 = 0x0180_4b13;
const PLACES: [u32; 3] = [KEY, COPY, NEXT];
/// What was added to the signed command line, or given to the boot beside the UKI.
const ADDED_PCR: u8 = 12;
/// Secure Boot, what was added, and the PCR that only the agent extends, when it leaves the initramfs.
const BOUND: &[u8] = &[7, ADDED_PCR, super::LEFT_PCR];
/// The two that are zero in every initramfs that is as it was signed.
const BOUND_COPY: &[u8] = &[ADDED_PCR, super::LEFT_PCR];
const SIZE: u16 = 64;

/// What a place gave.
enum Given {
    Key([u8; DATA_KEY]),
    /// There is none, or it was never written.
    Nothing,
    /// It is there, and not for this state.
    Locked,
}

impl Tpm {
    /// The key; none: there is none. A TPM that has it and does not give it out is an error: what the key opens is not lost.
    /// `vouches`: Secure Boot let this boot in under the site's key. Only such a boot installs lists, and only such a one takes
    /// over the copy that is bound to no state.
    pub fn data_key(&mut self, vouches: bool) -> Result<Option<[u8; DATA_KEY]>> {
        let key = self.given(KEY, BOUND)?;
        if let Given::Key(key) = key {
            self.remove_copies()?;
            return Ok(Some(key));
        }
        match (key, self.given(NEXT, BOUND)?, self.given(COPY, BOUND_COPY)?) {
            (_, Given::Key(key), _) => self.take_over(key),
            (_, _, Given::Key(key)) if vouches => self.take_over(key),
            (Given::Nothing, Given::Nothing, Given::Nothing) => Ok(None),
            (Given::Key(_) | Given::Locked | Given::Nothing, Given::Locked | Given::Nothing, _) => {
                let words = "it has the data's key and does not give it out: this kernel was started by kexec, something was \
                             added to its command line, or Secure Boot's state is another than the key was made under";
                Err(std::io::Error::other(words).into())
            }
        }
    }

    /// Secure Boot's state has changed as it was said: the key is bound to the new one.
    fn take_over(&mut self, key: [u8; DATA_KEY]) -> Result<Option<[u8; DATA_KEY]>> {
        self.put(KEY, BOUND, &key)?;
        self.remove_copies()?;
        Ok(Some(key))
    }

    fn remove_copies(&mut self) -> Result<()> {
        self.remove(NEXT)?;
        self.remove(COPY).map(drop)
    }

    /// Whether there is a key, for whatever state.
    pub fn has_data_key(&mut self) -> Result<bool> {
        for index in PLACES {
            match self.run(&command::nv_size(index)) {
                Ok(_) => return Ok(true),
                Err(fault) if is_missing(&fault) => {}
                Err(fault) => return Err(fault),
            }
        }
        Ok(false)
    }

    /// Puts a new key there. Only in an initramfs that firmware started.
    pub fn make_data_key(&mut self, key: &[u8; DATA_KEY]) -> Result<()> {
        self.put(KEY, BOUND, key)
    }

    /// Puts the copy there that outlives one change of Secure Boot's state: to PCR 7 as it will be, if that is known by now,
    /// else to no state at all. Their policies are those of an initramfs, worked out here: this boot is past it.
    pub fn carry_data_key(&mut self, key: &[u8; DATA_KEY], pcr7: Option<&[u8; 32]>) -> Result<()> {
        match pcr7 {
            None => {
                self.define(COPY, &pcr_policy(BOUND_COPY, &[[0; 32]; 2]))?;
                self.write_key(COPY, key)
            }
            Some(pcr7) => {
                self.define(NEXT, &pcr_policy(BOUND, &[*pcr7, [0; 32], [0; 32]]))?;
                self.write_key(NEXT, key)?;
                self.remove(COPY).map(drop)
            }
        }
    }

    /// Secure Boot's state did not change: nobody needs the copy that every state is given.
    pub fn drop_data_key_copy(&mut self) -> Result<()> {
        self.remove(COPY).map(drop)
    }

    /// Takes it out: what it opened is gone. Whether there was one.
    pub fn destroy_data_key(&mut self) -> Result<bool> {
        let mut was = false;
        for index in PLACES {
            was |= self.remove(index)?;
        }
        Ok(was)
    }

    fn given(&mut self, index: u32, pcrs: &[u8]) -> Result<Given> {
        let session = self.policy(pcrs)?;
        let read = self.run(&command::nv_read_by(index, Auth::Session(session), SIZE, 0));
        if read.is_err() {
            // It ends with the command that uses it; this one was not done.
            let _ = self.run(&command::flush(session));
        }
        match read {
            Ok(bytes) => {
                let key = bytes.try_into().map_err(|_| std::io::Error::other("the data's key has another length"))?;
                Ok(Given::Key(key))
            }
            Err(fault) => match fault.code() {
                Some(code::NO_SUCH_HANDLE | code::NV_UNWRITTEN) => Ok(Given::Nothing),
                Some(code::POLICY_FAIL) => Ok(Given::Locked),
                Some(_) | None => Err(fault),
            },
        }
    }

    /// A session whose policy is these PCRs as they are now.
    fn policy(&mut self, pcrs: &[u8]) -> Result<u32> {
        let nonce = crate::memory::random().map_err(|e| std::io::Error::other(e.to_string()))?;
        let session = self.run(&command::start_policy(&nonce))?;
        match self.run(&command::policy_pcr(session, pcrs)) {
            Ok(()) => Ok(session),
            Err(fault) => {
                let _ = self.run(&command::flush(session));
                Err(fault)
            }
        }
    }

    /// What these PCRs come to in every initramfs that firmware starts under this state. A kernel that is past it is refused: what
    /// it put there no other boot would be given.
    fn initramfs_policy(&mut self, pcrs: &[u8]) -> Result<[u8; 32]> {
        if self.is_past_initramfs()? {
            return Err(std::io::Error::other("this kernel was started by kexec: restart through firmware").into());
        }
        if self.run(&command::pcr_read(ADDED_PCR))? != [0; 32] {
            let words =
                "something was added to this boot's signed command line: the data's key is for boots without that";
            return Err(std::io::Error::other(words).into());
        }
        let mut values = Vec::with_capacity(pcrs.len());
        for pcr in pcrs {
            values.push(if BOUND_COPY.contains(pcr) { [0; 32] } else { self.run(&command::pcr_read(*pcr))? });
        }
        Ok(pcr_policy(pcrs, &values))
    }

    /// Whether the initramfs that firmware started was left: this is the running system, or a kexec started this kernel.
    pub fn is_past_initramfs(&mut self) -> Result<bool> {
        Ok(self.run(&command::pcr_read(super::LEFT_PCR))? != [0; 32])
    }

    fn put(&mut self, index: u32, pcrs: &[u8], key: &[u8; DATA_KEY]) -> Result<()> {
        let policy = self.initramfs_policy(pcrs)?;
        self.define(index, &policy)?;
        self.write_key(index, key)?;
        match self.given(index, pcrs)? {
            Given::Key(read) if read == *key => Ok(()),
            Given::Key(_) | Given::Nothing | Given::Locked => {
                Err(std::io::Error::other("it does not give back the key that was put there").into())
            }
        }
    }

    fn define(&mut self, index: u32, policy: &[u8]) -> Result<()> {
        self.remove(index)?;
        self.run(&command::nv_define_bound(index, SIZE, policy))
    }

    fn write_key(&mut self, index: u32, key: &[u8; DATA_KEY]) -> Result<()> {
        self.run(&command::nv_write(index, key, 0))
    }

    fn remove(&mut self, index: u32) -> Result<bool> {
        match self.run(&command::nv_undefine(index)) {
            Ok(()) => Ok(true),
            // Undefine's first handle is the owner's: the index is its second.
            Err(fault) if is_missing(&fault) => Ok(false),
            Err(fault) => Err(fault),
        }
    }
}

fn is_missing(fault: &TpmFault) -> bool {
    matches!(fault.code(), Some(code::NO_SUCH_HANDLE | code::NO_SUCH_SECOND_HANDLE))
}
