//! Commands, and how their answers are read (TPM 2.0 part 3; headers and authorisations: part 1, §18 and §19).

use super::public::sealed;
use super::quote::{QUOTED, selection};
use super::wire::{Reader, Writer};
use super::{AES, CFB, NULL, Quote, SHA256, Template, TpmError};
use std::marker::PhantomData;

const NO_SESSIONS: u16 = 0x8001;
const SESSIONS: u16 = 0x8002;
/// `TPM_RS_PW`.
const PASSWORD: u32 = 0x4000_0009;
/// `TPM_RH_NULL`.
const NO_HANDLE: u32 = 0x4000_0007;
/// `TPM_SE_POLICY`.
const POLICY: u8 = 1;
/// The longest answer that is read; a TPM's own limit is 4096.
pub const ANSWER_LIMIT: usize = 4096;
/// Length of an answer's header.
pub const HEADER: usize = 10;
/// Bytes that one NV command carries: what every TPM takes (`TPM_PT_NV_BUFFER_MAX` is at least 512).
pub const NV_CHUNK: usize = 512;

/// By what a handle may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Auth {
    /// The empty password.
    Password,
    /// A policy session; it ends with the command.
    Session(u32),
}

/// A command, and the reader of its answer.
pub struct Command<T> {
    bytes: Vec<u8>,
    name: &'static str,
    sessions: bool,
    read: fn(&mut Answer<'_>) -> Result<T, TpmError>,
    gives: PhantomData<fn() -> T>,
}

impl<T> std::fmt::Debug for Command<T> {
    // The bytes may be a secret that is to be sealed.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Command").field("name", &self.name).finish_non_exhaustive()
    }
}

/// What stands behind an answer's header.
struct Answer<'a> {
    rest: Reader<'a>,
    sessions: bool,
}

impl<'a> Answer<'a> {
    fn parameters(&mut self) -> Result<Reader<'a>, TpmError> {
        if !self.sessions {
            return Ok(Reader(std::mem::take(&mut self.rest.0)));
        }
        let length = self.rest.u32("length of the parameters")?;
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        self.rest.take(length, "parameters").map(Reader)
    }
}

impl<T> Command<T> {
    fn new(
        name: &'static str,
        code: u32,
        handles: &[u32],
        auths: &[Auth],
        parameters: &[u8],
        read: fn(&mut Answer<'_>) -> Result<T, TpmError>,
    ) -> Self {
        let mut body = Writer::default();
        for handle in handles {
            body = body.u32(*handle);
        }
        if !auths.is_empty() {
            let mut area = Writer::default();
            for auth in auths {
                let handle = match auth {
                    Auth::Password => PASSWORD,
                    Auth::Session(handle) => *handle,
                };
                area = area.u32(handle).sized(&[]).u8(0).sized(&[]);
            }
            let length = u32::try_from(area.0.len()).expect("at most three authorisations of nine bytes");
            body = body.u32(length).bytes(&area.0);
        }
        let body = body.bytes(parameters).0;
        let length = u32::try_from(HEADER + body.len()).expect("no command of 4 GiB is built");
        let tag = if auths.is_empty() { NO_SESSIONS } else { SESSIONS };
        let bytes = Writer::default().u16(tag).u32(length).u32(code).bytes(&body).0;
        Self { bytes, name, sessions: !auths.is_empty(), read, gives: PhantomData }
    }

    /// What the device is given.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Reads the answer, the header included.
    pub fn answer(&self, bytes: &[u8]) -> Result<T, TpmError> {
        let mut reader = Reader(bytes);
        let tag = reader.u16("tag")?;
        let length = reader.u32("length")?;
        let code = reader.u32("code")?;
        if usize::try_from(length) != Ok(bytes.len()) {
            return Err(TpmError::Unexpected { what: "its length" });
        }
        if code != 0 {
            return Err(TpmError::Refused { command: self.name, code });
        }
        if tag != if self.sessions { SESSIONS } else { NO_SESSIONS } {
            return Err(TpmError::Unexpected { what: "its tag" });
        }
        (self.read)(&mut Answer { rest: reader, sessions: self.sessions })
    }
}

/// How long the answer is, by its header.
pub fn answer_length(header: [u8; HEADER]) -> usize {
    let length = u32::from_be_bytes([header[2], header[3], header[4], header[5]]);
    usize::try_from(length).unwrap_or(usize::MAX)
}

/// The handle, of a command that gives one: it stands before the parameters' length.
fn handle(answer: &mut Answer<'_>) -> Result<u32, TpmError> {
    answer.rest.u32("handle")
}

fn nothing(answer: &mut Answer<'_>) -> Result<(), TpmError> {
    answer.parameters()?.end()
}

fn data(answer: &mut Answer<'_>) -> Result<Vec<u8>, TpmError> {
    let mut parameters = answer.parameters()?;
    let bytes = parameters.sized("data")?.to_vec();
    parameters.end()?;
    Ok(bytes)
}

/// Random bytes of the TPM's own; it may give fewer.
pub fn get_random(count: u16) -> Command<Vec<u8>> {
    Command::new("GetRandom", 0x17b, &[], &[], &count.to_be_bytes(), data)
}

/// The value of one PCR of the SHA-256 bank. A TPM without that bank gives none.
pub fn pcr_read(pcr: u8) -> Command<[u8; 32]> {
    Command::new("PCR_Read", 0x17e, &[], &[], &selection(&[pcr]), |answer| {
        let mut parameters = answer.parameters()?;
        let _updates = parameters.u32("update counter")?;
        let banks = parameters.u32("PCR selection")?;
        for _ in 0..banks.min(16) {
            let _bank = parameters.u16("bank")?;
            let length = parameters.u8("selection's length")?;
            parameters.take(usize::from(length), "selection")?;
        }
        if parameters.u32("number of digests")? != 1 {
            return Err(TpmError::Unexpected { what: "the number of PCR values: is the SHA-256 bank off?" });
        }
        let value = parameters.sized("PCR value")?;
        value.try_into().map_err(|_| TpmError::Unexpected { what: "the PCR's length" })
    })
}

/// Extends a PCR of the SHA-256 bank.
pub fn pcr_extend(pcr: u8, digest: &[u8; 32]) -> Command<()> {
    let parameters = Writer::default().u32(1).u16(SHA256).bytes(digest).0;
    Command::new("PCR_Extend", 0x182, &[u32::from(pcr)], &[Auth::Password], &parameters, nothing)
}

/// Makes a key of the hierarchy's seed: the same template gives the same key. Gives its handle and public area.
pub fn create_primary(hierarchy: u32, template: Template) -> Command<(u32, Vec<u8>)> {
    let no_secret = Writer::default().sized(&[]).sized(&[]).0;
    let parameters =
        Writer::default().sized(&no_secret).sized(&template.input()).sized(&[]).u32(0 /* no creation PCRs */).0;
    Command::new("CreatePrimary", 0x131, &[hierarchy], &[Auth::Password], &parameters, |answer| {
        let handle = handle(answer)?;
        Ok((handle, answer.parameters()?.sized("public area")?.to_vec()))
    })
}

/// Seals a secret of at most 128 bytes under a parent. Gives its private and public parts, for [`load`].
pub fn seal(parent: u32, secret: &[u8], policy: &[u8]) -> Command<(Vec<u8>, Vec<u8>)> {
    let sensitive = Writer::default().sized(&[]).sized(secret).0;
    let parameters = Writer::default().sized(&sensitive).sized(&sealed(policy)).sized(&[]).u32(0).0;
    Command::new("Create", 0x153, &[parent], &[Auth::Password], &parameters, |answer| {
        let mut parameters = answer.parameters()?;
        let private = parameters.sized("private part")?.to_vec();
        Ok((private, parameters.sized("public part")?.to_vec()))
    })
}

/// Loads what was sealed. Gives its handle.
pub fn load(parent: u32, private: &[u8], public: &[u8]) -> Command<u32> {
    let parameters = Writer::default().sized(private).sized(public).0;
    Command::new("Load", 0x157, &[parent], &[Auth::Password], &parameters, handle)
}

/// Gives the secret back.
pub fn unseal(item: u32, auth: Auth) -> Command<Vec<u8>> {
    Command::new("Unseal", 0x15e, &[item], &[auth], &[], data)
}

/// Begins a policy session. `nonce` has 16 to 32 bytes.
pub fn start_policy(nonce: &[u8]) -> Command<u32> {
    let parameters = Writer::default().sized(nonce).sized(&[]).u8(POLICY).u16(NULL).u16(SHA256).0;
    Command::new("StartAuthSession", 0x176, &[NO_HANDLE, NO_HANDLE], &[], &parameters, handle)
}

/// The session's policy: who knows the (empty) secret of this entity.
pub fn policy_secret(entity: u32, session: u32) -> Command<()> {
    let parameters = Writer::default().sized(&[]).sized(&[]).sized(&[]).u32(0).0;
    Command::new("PolicySecret", 0x151, &[entity, session], &[Auth::Password], &parameters, |answer| {
        // A ticket, which is not used.
        answer.parameters().map(drop)
    })
}

/// The session's policy: these PCRs as they are now.
pub fn policy_pcr(session: u32, pcrs: &[u8]) -> Command<()> {
    let parameters = Writer::default().sized(&[]).bytes(&selection(pcrs)).0;
    Command::new("PolicyPCR", 0x17f, &[session], &[], &parameters, nothing)
}

/// The session's policy: one command only.
pub fn policy_command_code(session: u32, code: u32) -> Command<()> {
    Command::new("PolicyCommandCode", 0x16c, &[session], &[], &code.to_be_bytes(), nothing)
}

/// What the session's policy has come to.
pub fn policy_digest(session: u32) -> Command<Vec<u8>> {
    Command::new("PolicyGetDigest", 0x189, &[session], &[], &[], data)
}

/// `TPM_CC_ActivateCredential`.
pub const ACTIVATE_CREDENTIAL: u32 = 0x147;

/// Takes the secret out of a credential, if it was made for this object, used by `auth`, and this endorsement key, whose policy
/// `session` has.
pub fn activate_credential(
    (object, auth): (u32, Auth),
    endorsement: u32,
    session: u32,
    id_object: &[u8],
    encrypted_secret: &[u8],
) -> Command<Vec<u8>> {
    let parameters = Writer::default().sized(id_object).sized(encrypted_secret).0;
    let auths = [auth, Auth::Session(session)];
    Command::new("ActivateCredential", ACTIVATE_CREDENTIAL, &[object, endorsement], &auths, &parameters, data)
}

/// Has the TPM sign [`QUOTED`] and these 32 bytes.
pub fn quote(attestation: u32, qualifying: &[u8; 32]) -> Command<Quote> {
    let parameters = Writer::default().sized(qualifying).u16(NULL).bytes(&selection(&QUOTED)).0;
    Command::new("Quote", 0x158, &[attestation], &[Auth::Password], &parameters, |answer| {
        let mut parameters = answer.parameters()?;
        let attest = parameters.sized("what is signed")?.to_vec();
        Ok(Quote { attest, signature: parameters.0.to_vec() })
    })
}

/// Ends a session, or forgets an object.
pub fn flush(handle: u32) -> Command<()> {
    Command::new("FlushContext", 0x165, &[], &[], &handle.to_be_bytes(), nothing)
}

// TPMA_NV (part 2, §13.4): written and read with the index's own (empty) password, no lock-out by wrong ones.
const NV_AUTH_WRITE: u32 = 1 << 2;
const NV_AUTH_READ: u32 = 1 << 18;
const NV_POLICY_READ: u32 = 1 << 19;
const NV_NO_DA: u32 = 1 << 25;

/// Makes an NV index of `size` bytes in the owner's name.
pub fn nv_define(index: u32, size: u16) -> Command<()> {
    let public = Writer::default().u32(index).u16(SHA256).u32(NV_AUTH_WRITE | NV_AUTH_READ | NV_NO_DA);
    let public = public.sized(&[]).u16(size).0;
    let parameters = Writer::default().sized(&[]).sized(&public).0;
    Command::new("NV_DefineSpace", 0x12a, &[super::OWNER], &[Auth::Password], &parameters, nothing)
}

/// The same, to be read under this policy only. Written by whoever may write others: what is read is what counts.
pub fn nv_define_bound(index: u32, size: u16, policy: &[u8]) -> Command<()> {
    let public = Writer::default().u32(index).u16(SHA256).u32(NV_AUTH_WRITE | NV_POLICY_READ | NV_NO_DA);
    let public = public.sized(policy).u16(size).0;
    let parameters = Writer::default().sized(&[]).sized(&public).0;
    Command::new("NV_DefineSpace", 0x12a, &[super::OWNER], &[Auth::Password], &parameters, nothing)
}

/// Removes an NV index of the owner's.
pub fn nv_undefine(index: u32) -> Command<()> {
    Command::new("NV_UndefineSpace", 0x122, &[super::OWNER, index], &[Auth::Password], &[], nothing)
}

/// Size of an NV index in bytes.
pub fn nv_size(index: u32) -> Command<u16> {
    Command::new("NV_ReadPublic", 0x169, &[index], &[], &[], |answer| {
        let mut parameters = answer.parameters()?;
        let mut public = Reader(parameters.sized("NV public area")?);
        let (_index, _hash) = (public.u32("NV index")?, public.u16("NV hash")?);
        let _attributes = public.u32("NV attributes")?;
        let _policy = public.sized("NV policy")?;
        public.u16("NV size")
    })
}

/// Writes at most [`NV_CHUNK`] bytes.
pub fn nv_write(index: u32, bytes: &[u8], offset: u16) -> Command<()> {
    let parameters = Writer::default().sized(bytes).u16(offset).0;
    Command::new("NV_Write", 0x137, &[index, index], &[Auth::Password], &parameters, nothing)
}

/// Reads at most [`NV_CHUNK`] bytes.
pub fn nv_read(index: u32, size: u16, offset: u16) -> Command<Vec<u8>> {
    nv_read_by(index, Auth::Password, size, offset)
}

/// The same of an index that has a policy.
pub fn nv_read_by(index: u32, auth: Auth, size: u16, offset: u16) -> Command<Vec<u8>> {
    let parameters = Writer::default().u16(size).u16(offset).0;
    Command::new("NV_Read", 0x14e, &[index, index], &[auth], &parameters, data)
}

/// Has the TPM itself wrap a secret for this loaded endorsement key and an object of this name: what a server does without
/// one. Gives credential and encrypted secret.
pub fn make_credential(endorsement: u32, secret: &[u8], name: &[u8]) -> Command<(Vec<u8>, Vec<u8>)> {
    let parameters = Writer::default().sized(secret).sized(name).0;
    Command::new("MakeCredential", 0x168, &[endorsement], &[], &parameters, |answer| {
        let mut parameters = answer.parameters()?;
        let id_object = parameters.sized("credential")?.to_vec();
        Ok((id_object, parameters.sized("encrypted secret")?.to_vec()))
    })
}

/// The symmetric algorithm that a credential is wrapped with: (algorithm, bits, mode), as the templates name it.
pub const WRAPPING: (u16, u16, u16) = (AES, 128, CFB);
