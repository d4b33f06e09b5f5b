//! What can go wrong, named for the step that failed and with what a person can do.

use kiln_fleet::access::AccessRole;
use kiln_images::SiteError;
use kiln_protocol::ReleaseId;
use kiln_release::Threshold;
use kiln_release::measured::{ForeignKexec, ImaError};
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

/// `kiln.toml` cannot be used.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum ConfigError {
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}: {reason}", path.display())]
    Invalid { path: PathBuf, reason: Box<ConfigError> },
    #[error("{0}")]
    Toml(String),
    #[error("{key}: {reason}")]
    Value { key: String, reason: String },
    #[error("{role:?} is no role; known are: {known}. Roles are [[role]] tables in kiln.toml")]
    UnknownRole { role: String, known: String },
}

/// The repository's metadata was not adopted.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum CatalogError {
    #[error(transparent)]
    Site(#[from] SiteError),
    #[error("a published release cannot be assigned: {0}")]
    Name(#[from] kiln_protocol::IdError),
    #[error("reading the repository was broken off: {0}")]
    Task(#[from] tokio::task::JoinError),
}

/// The database failed.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum StoreError {
    #[error("cannot open the database {}: {source}", path.display())]
    Open { path: PathBuf, source: sqlx::Error },
    #[error("database: {0}")]
    Sql(#[from] sqlx::Error),
    #[error(
        "the disk of the database is full: nothing of this was done, and what was stored before is kept. Free some room"
    )]
    Full,
    #[error(
        "what this machine did a moment ago could not be stored, so this was not done either: the machine is as it was \
         stored before. Try again"
    )]
    Unwritten,
    #[error("the database is of version {got}, this kiln knows {known}: it was written by a newer one")]
    TooNew { known: i64, got: i64 },
    #[error("the database's row for {id} cannot be read: {reason}")]
    Row { id: String, reason: String },
    #[error("the database writer is gone; the log says why")]
    Closed,
    #[error("a machine's record cannot be written as JSON: {0}")]
    Json(#[from] serde_json::Error),
}

impl StoreError {
    /// SQLite's code for a full disk is 13 (<https://sqlite.org/rescode.html#full>).
    pub(crate) fn or_full(self) -> Self {
        if let Self::Sql(sqlx::Error::Database(error)) = &self
            && error.code().as_deref() == Some("13")
        {
            return Self::Full;
        }
        self
    }

    /// The same for each who waited for one transaction.
    pub(crate) fn again(&self) -> Self {
        if matches!(self, Self::Full) { Self::Full } else { Self::Sql(sqlx::Error::Protocol(self.to_string())) }
    }
}

/// A machine's log is not kept, or not shown.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum LogError {
    #[error("a boot's id is 1 to 64 letters, digits or `-`")]
    BootId,
    #[error("{got} lines in one batch; at most {} are taken", kiln_protocol::LOG_LINES)]
    TooMany { got: usize },
    #[error("this key has not reported this boot: log lines come after the first report")]
    NotReported,
    #[error("there is no such boot of {machine}: `kiln machine show` lists them; --boot 0 is the newest")]
    NoBoot { machine: String },
    #[error("cannot keep log lines in {}: {source}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("cannot read log lines in {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("log lines were not looked at: {0}")]
    Task(tokio::task::JoinError),
}

/// No approval code, or not this one.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum CodeError {
    #[error("this key has not reported this machine: it introduces itself after its first report")]
    NotReported,
    #[error("nothing was committed to, or it was used: begin again")]
    NotCommitted,
    #[error("introductions come too fast: one in 2 s")]
    TooOften,
    #[error(transparent)]
    Introduction(#[from] kiln_protocol::IntroductionError),
    #[error("no random numbers on this host")]
    Random,
    #[error("online/agent-server.pem: {0}")]
    ServerKey(String),
    #[error("{0}")]
    Form(kiln_protocol::IdError),
    #[error("{machine} has no approval code now: it shows one while it waits and its agent is new enough")]
    None { machine: String },
    #[error(
        "that is not the code of {machine}: read it again from its screen. If they really differ, somebody stands between \
         the machine and this server: do not approve it ({left} tries left)"
    )]
    Wrong { machine: String, left: u32 },
    #[error("too many wrong codes for {machine}: try again in {minutes} min")]
    TooManyWrong { machine: String, minutes: u64 },
}

/// The list of expected machines is not changed, or has no such machine.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum ExpectedError {
    #[error("{0}")]
    File(kiln_fleet::Flaws),
    #[error("{0:?} is not on the list of expected machines: `kiln expected list` shows all")]
    NotListed(String),
    #[error("the file was not read: {0}")]
    Task(tokio::task::JoinError),
}

/// A call of a person or program that is not let in, or not done.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum AccessError {
    #[error("{method} {path} has no entry in the table of access roles, so nobody may call it")]
    Unlisted { method: String, path: String },
    #[error(
        "this call needs the access role {needs}: show a token (`kiln token create`; --token-file) over https, or from this \
         host; or run the command on the boot server with --site, which uses the Unix socket {}", socket.display()
    )]
    Nobody { needs: AccessRole, socket: PathBuf },
    #[error("{who} has the access role {has}, and this call needs {needs}")]
    TooLow { who: String, has: AccessRole, needs: AccessRole },
    #[error(
        "{machine} is {state} (role {role}), and {who} has the access role {has}: a technician approves new machines only. An \
         {needs} moves this one into another role, renames it or brings it back: `kiln machine approve {machine} --role ROLE`"
    )]
    PlacedBefore {
        machine: String,
        state: kiln_fleet::StateKind,
        role: String,
        who: String,
        has: AccessRole,
        needs: AccessRole,
    },
    #[error(
        "a token came over an unencrypted connection, where others can read it: it is not looked at. Use https ([https] in \
         kiln.toml), revoke this token, and make another"
    )]
    InTheClear,
    #[error("this is no token of this site")]
    WrongToken,
    #[error("token {name} has expired: `kiln token create` makes another")]
    Expired { name: String },
    #[error("token {name} was revoked")]
    Revoked { name: String },
    #[error("too many wrong credentials from here, or for this account: try again in {seconds} s")]
    TooOften { seconds: u64 },
    #[error("{0:?} is no name of a token: 1 to 63 letters, digits, `-`, `.` or `_`, beginning with a letter or digit")]
    TokenName(String),
    #[error("there is a token {0} that still holds: revoke it, or take another name")]
    TokenTaken(String),
    #[error("a token holds from 5 minutes to {days} days ([access] token_max)")]
    Lifetime { days: u64 },
    #[error("there is no token {0} that still holds: `kiln token list` shows all")]
    NoSuchToken(String),
    #[error("{limit} tokens are kept, and all still hold: revoke some")]
    TooManyTokens { limit: usize },
    #[error("nothing waits under the id {0:?}: `kiln pending list` shows what does")]
    NoSuchProposal(String),
    #[error(transparent)]
    Proposal(#[from] kiln_fleet::access::ProposalRefusal),
    #[error("whoever asked for it may not ask for it any more ({reason}): it is not done")]
    ProposerGone { reason: String },
    #[error("{limit} actions wait for a second person: confirm or refuse some")]
    TooManyProposals { limit: usize },
    #[error("what asks for a second person has at most 128 KiB, and is text")]
    ProposalForm,
    #[error("the key {0} is revoked already")]
    RevokedBefore(kiln_protocol::KeyId),
    #[error("{0} has no identity key that could be revoked")]
    NoKey(String),
    #[error("the call does not come from this server's own page: Origin and the page's own header are checked")]
    Forged,
    #[error("people log in over https only: set [https] in kiln.toml")]
    LogInNeedsTls,
    #[error("log in again: the session is over")]
    SessionOver,
    #[error("no random numbers on this host")]
    Random,
    #[error(transparent)]
    Oidc(#[from] OidcError),
}

/// A log-in with the identity provider that failed.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum OidcError {
    #[error("there is no identity provider: [oidc] in kiln.toml names one")]
    None,
    #[error("{what} of the identity provider: {reason}")]
    Provider { what: &'static str, reason: String },
    #[error("the identity provider does not answer ({reason}): log in again in {seconds} s, or with a token")]
    Away { reason: String, seconds: u64 },
    #[error("{limit} log-ins wait for the identity provider already: log in again in {seconds} s, or with a token")]
    Busy { limit: usize, seconds: u64 },
    #[error("the identity provider refused the log-in: {0}")]
    Refused(String),
    #[error("this answer belongs to no log-in that this browser began here, or came too late: log in again")]
    State,
    #[error("the ID token is not accepted: {0}")]
    Token(#[from] crate::oidc::TokenError),
    #[error("{subject} is in no group that kiln.toml gives an access role ([oidc.roles])")]
    NoGroup { subject: String },
}

/// A proof by a TPM that is not taken, or not even looked at.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum AttestationError {
    #[error("this key has not reported this boot: proofs come after its first report")]
    NotReported,
    #[error("proofs come too fast: eight in a minute")]
    TooOften,
    #[error("nothing was asked, or it was answered: begin again")]
    NotAsked,
    #[error("{0}")]
    Key(kiln_protocol::tpm::TpmError),
    #[error("the endorsement key is no point of P-256")]
    Point,
    #[error("no random numbers on this host")]
    Random,
    #[error("this boot has proven nothing yet: what its kernel measured is judged from its proof on")]
    NotProven,
}

/// What PCR 10, or the list that explains it, says against a boot.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum KexecFault {
    #[error("the list of what its kernel measured cannot be read: {0}")]
    List(#[from] ImaError),
    #[error("{0}")]
    Foreign(#[from] ForeignKexec),
    #[error("its release has every kexec measured, and it shows no list of what its kernel measured")]
    NoList,
    #[error(
        "PCR 10 is {}…, and neither its kernel's list nor that and what the kernel before said explains it: something else was \
         loaded, or that kernel's word did not come. A cold boot begins anew",
        &quoted[..12]
    )]
    Pcr10 { quoted: String },
    #[error("a kexec started this kernel, and PCR 10 knows of none")]
    NotListed,
    #[error("the kernel before loaded something foreign: {0}")]
    Before(String),
    #[error("the kernel before loaded {loaded}, and this one's agent says that it is {says}")]
    Elsewhere { loaded: String, says: String },
}

/// A secret that is not kept, or not given.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum SecretError {
    #[error("{0}")]
    Name(kiln_protocol::IdError),
    #[error("a secret is for a role or for a machine: say which one of them")]
    ForWhom,
    #[error("a secret has 1 to {} bytes; this one has {got}", kiln_protocol::SECRET_LIMIT)]
    Length { got: usize },
    #[error("{limit} secrets are kept: remove some")]
    TooMany { limit: usize },
    #[error("all secrets of a machine have at most {} bytes together", kiln_protocol::SECRETS_OF_A_MACHINE)]
    Together,
    #[error("there is no secret {name} of {of}: `kiln secret list` shows all")]
    None { name: String, of: String },
    #[error("{}: {source}", path.display())]
    KeyFile { path: PathBuf, source: io::Error },
    #[error("{}: not a key of 64 hex digits", .0.display())]
    KeyForm(PathBuf),
    #[error("{} is missing, and secrets are kept that it sealed: restore it, or remove them all and set them anew", .0.display())]
    KeyMissing(PathBuf),
    #[error(
        "the secret {name} cannot be read from the database: it was altered, or sealed by another online/secrets.key"
    )]
    Unsealing { name: String },
    #[error("no random numbers on this host, or its cryptography fails")]
    Sealing,
    #[error("what it wants its secrets sealed to is no key of its TPM under the PCRs that it quoted")]
    DeliveryKey,
    #[error("{0}")]
    Withheld(String),
}

/// A certificate that is not issued, or a list that is not signed.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum CertificateError {
    #[error("a certificate is asked for with an uncompressed point of P-256, 65 bytes")]
    PublicKey,
    #[error("the request is not signed by the key that it names, for this machine, identity key and boot")]
    Possession,
    #[error("this key has not reported this boot: certificates come after its first report")]
    NotReported,
    #[error(
        "{limit} certificates of this machine are not over yet: it asks too often, and gets another in {minutes} min at the \
         earliest"
    )]
    TooMany { limit: usize, minutes: u64 },
    #[error(transparent)]
    Refused(#[from] kiln_fleet::CertificateRefusal),
    #[error("no release that is published here wants certificates for machines: there is no machine CA yet")]
    NoneWanted,
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("{}: not of this site's machine CA: restore key and certificate as they were", .0.display())]
    Form(PathBuf),
    #[error(
        "{} is missing, and programs trust what it signed: restore it. To begin anew, remove machine-ca.pem beside it, and give \
         the new one to all of them", .0.display()
    )]
    KeyMissing(PathBuf),
    #[error("{}: the next machine CA is announced: `kiln trust machine-ca switch` once programs have it", .0.display())]
    Announced(PathBuf),
    #[error("{} is not there: `kiln trust machine-ca announce`, then `switch`, then `forget`", .0.display())]
    NotAnnounced(PathBuf),
    #[error("{}: the machine CA before is still told: `kiln trust machine-ca forget` comes first", .0.display())]
    StillTold(PathBuf),
    #[error("no random numbers on this host, or its cryptography fails")]
    Signing,
    /// It cannot be opened or made; the log has said so, and it is tried again after a while.
    #[error("{0}")]
    Ca(Arc<CertificateError>),
}

/// An order that is refused.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum ControlError {
    #[error("there is no machine {0:?}: `kiln machine list` shows all")]
    NoSuchMachine(String),
    #[error("{0:?} fits more than one machine: give the whole id")]
    Ambiguous(String),
    #[error("{release} is not published here: `kiln release list` shows what is")]
    NoSuchRelease { release: ReleaseId },
    #[error(
        "no release of {image} (class normal) that machines may have is published: build and publish one first{passed}"
    )]
    NothingPublished { image: String, passed: String },
    #[error(
        "{release} is of class {class}: the director may assign only class normal; sign an order for it (`kiln order \
         sign assign {release} --class {class}`)"
    )]
    WrongClass { release: ReleaseId, class: String },
    #[error("{release} is for {got}, {machine} is {expected}")]
    WrongArchitecture { machine: String, release: ReleaseId, expected: String, got: String },
    #[error(
        "role {role} sets the threshold {name} = {threshold}, and {release} declares: {known}; take it out of the role's \
         [role.thresholds] in kiln.toml, or build a release whose recipe declares it"
    )]
    Threshold { role: String, name: String, threshold: Threshold, release: ReleaseId, known: String },
    #[error(
        "role {role} says exec = \"report\", and {release} lets no role say so: take it out of the role in kiln.toml, or build a \
         release with role_may_report = true in an [[exec]] of its recipe"
    )]
    NoReport { role: String, release: ReleaseId },
    #[error(
        "the identity key of {machine} is sealed in its TPM, and the agent of {release} is older than Kiln's use of TPMs: it would \
         make another key, and the machine would be a stranger. Build the image anew and assign that release"
    )]
    ForgetsKey { machine: String, release: ReleaseId },
    #[error(
        "{release} is about to be taken out of the repository (`kiln release prune`): take another. If that prune was given up, \
         it can be assigned again in {minutes} min"
    )]
    BeingPruned { release: ReleaseId, minutes: u64 },
    #[error("{release} is below the floor {floor} that the release signers set for its image")]
    BelowFloor { release: ReleaseId, floor: u64 },
    #[error(
        "{machine} runs image {running}: another image comes only with another boot program, so say `--via cold` and restart it"
    )]
    OtherImage { machine: String, running: String },
    #[error("the name {0:?} is taken by another machine")]
    NameTaken(String),
    #[error(
        "serial number {serial} is also claimed by {machine}: approve the right one by hand (`kiln machine approve`)"
    )]
    SerialClaimed { serial: String, machine: String },
    #[error("kiln.toml names the identity key of the machine with serial number {serial}, and this one has another")]
    SerialOfAnotherKey { serial: String },
    #[error(
        "{0:?} is no name: 1 to 63 letters, digits, `-`, `.` or `_`, beginning with a letter or digit, and no UUID"
    )]
    BadName(String),
    #[error("a reason is one line of 1 to 200 characters")]
    BadReason,
    #[error("{0}")]
    Config(#[from] ConfigError),
    #[error("{0}")]
    Refused(#[from] kiln_fleet::Refusal),
    #[error("{0}")]
    Operator(#[from] kiln_release::OperatorError),
    #[error("{0}")]
    Order(#[from] kiln_protocol::OrderError),
    #[error("{release} is of class {is}, the order says {ordered}")]
    OrderClass { release: ReleaseId, ordered: String, is: String },
    #[error("order {order} was submitted before: `kiln order list` shows what came of it")]
    OrderKnown { order: kiln_protocol::OrderId },
    #[error("{limit} orders are in force: wait until some have expired")]
    TooManyOrders { limit: usize },
    #[error("receipt: {0}")]
    Receipt(#[from] crate::receipt::ReceiptError),
    #[error("the receipt of {machine} comes from a machine with another key")]
    ReceiptOfAnother { machine: String },
    #[error("no order {order} to wipe {machine} is known here")]
    ReceiptWithoutOrder { machine: String, order: kiln_protocol::OrderId },
    #[error(transparent)]
    Access(#[from] AccessError),
    #[error(transparent)]
    Log(#[from] LogError),
    #[error(transparent)]
    Code(#[from] CodeError),
    #[error(transparent)]
    Expected(#[from] ExpectedError),
    #[error(transparent)]
    Attestation(#[from] AttestationError),
    #[error(transparent)]
    Secret(#[from] SecretError),
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    #[error("too many unknown machines: approve or retire some")]
    TooManyUnknown,
    #[error("{0} has not reported yet: its report comes first")]
    NoReportYet(kiln_protocol::MachineId),
    #[error("the key that speaks is not {0}'s")]
    NotItsKey(String),
    #[error("{0} is quarantined: what it is made of is taken once a person has cleared it (`kiln machine clear {0}`)")]
    Quarantined(String),
    #[error("{machine} is not approved, and its inventory has {got} bytes of at most {limit}: approve it first")]
    TooLongForAStranger { machine: kiln_protocol::MachineId, got: usize, limit: usize },
    #[error(
        "nothing is known of {0}'s hardware yet: its agent says it when the release runs, if the release is new enough"
    )]
    NoInventory(String),
    #[error("cannot sign: {0}")]
    Sign(#[from] kiln_release::EnvelopeError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The server cannot start.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum ServeError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Site(#[from] SiteError),
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(
        "cannot listen on {address} for {what}: {source}. Is another server there? Set [{table}] listen in kiln.toml"
    )]
    Listen { what: &'static str, table: &'static str, address: SocketAddr, source: io::Error },
    #[error("cannot listen on {}: {source}", path.display())]
    Socket { path: PathBuf, source: io::Error },
    #[error("TLS of the agent API: {0}")]
    Tls(String),
    #[error("[https] in kiln.toml: {0}")]
    Https(#[from] crate::http::HttpsError),
    #[error("{what}: {reason}")]
    Net { what: &'static str, reason: String },
}
