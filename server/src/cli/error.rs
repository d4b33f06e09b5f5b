//! What a command can fail with, as a person at a terminal needs it.

use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub(super) enum CliError {
    #[error("cannot start: {0}")]
    Runtime(std::io::Error),
    #[error(transparent)]
    Site(#[from] kiln_images::SiteError),
    #[error(transparent)]
    Build(#[from] kiln_images::BuildError),
    #[error(transparent)]
    Serve(#[from] crate::error::ServeError),
    #[error("{} is not there: is `kiln serve` running on this site?", .0.display())]
    NoSocket(PathBuf),
    #[error(
        "no `kiln serve` runs on {}, so nobody says which releases machines need: start it, name another with \
         --server, or say --without-server to keep the newest releases and nothing else",
        .0.display()
    )]
    NobodyToAsk(PathBuf),
    #[error("{url} serves another site than {}: what its machines need says nothing about this one", .site.display())]
    OtherSite { url: String, site: PathBuf },
    #[error("{}: {source}", .path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error(
        "{0} is not encrypted: a token would be shown to everybody on the way. Use https://, or --site on the boot server"
    )]
    TokenInTheClear(String),
    #[error(
        "{0} is not encrypted: the secret would be shown to everybody on the way, and nothing was sent. Use https://, or --site \
         on the boot server"
    )]
    SecretInTheClear(String),
    #[error("not done yet: another person confirms it until {until} with `kiln pending confirm {id}` ({what})")]
    Kept { id: String, what: String, until: jiff::Timestamp },
    #[error("the audit log is not whole: {0}")]
    Broken(String),
    #[error("machines need a release below the floor; move them up first:\n  {}", .0.join("\n  "))]
    BelowFloor(Vec<String>),
    #[error(
        "machines need by now what this request takes out: {}. Assign them newer releases and apply it again; or give it up \
         (`kiln trust drop`) and prune anew, which leaves those in",
        .0.join(", ")
    )]
    StillNeeded(Vec<String>),
    #[error("no terminal to ask at ({0}): name a file with --passphrase-file, or confirm with --yes")]
    NoTerminal(std::io::Error),
    #[error("a secret's value is read from --file or from standard input, as `kiln secret set NAME --role R < FILE`")]
    NoValue,
    #[error("the two passphrases differ: nothing was made")]
    PassphrasesDiffer,
    #[error("not confirmed: nothing was signed")]
    NotConfirmed,
    #[error("--keys names {0} twice")]
    RoleTwice(String),
    #[error("--keys {0}=N:FILE.pub,… is missing: each of root, targets, snapshot and images needs its signers")]
    RoleMissing(&'static str),
    #[error("{url}: {reason}")]
    Request { url: String, reason: String },
    #[error("{message}")]
    Refused { message: String },
    #[error("{}: nothing is imported\n{message}", path.display())]
    NotImported { path: PathBuf, message: String },
    #[error("no kiln-agent beside this program ({}): build it, or name it with --agent", .0.display())]
    NoAgent(PathBuf),
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: std::io::Error },
    #[error("{}: {reason}", path.display())]
    NotAKey { path: PathBuf, reason: String },
    #[error("{}: not an order: {reason}", path.display())]
    NotAnOrder { path: PathBuf, reason: String },
    #[error("{}: {source}", path.display())]
    Receipt { path: PathBuf, source: crate::receipt::ReceiptError },
    #[error(transparent)]
    MachineCa(#[from] crate::error::CertificateError),
    #[error("{}: signed by {got}, not by the machine's key {expected}", path.display())]
    ReceiptKey { path: PathBuf, expected: String, got: String },
    #[error("{0} has no receipt: it was not wiped, or has not delivered one yet (`kiln order list` says)")]
    NoReceipt(String),
    #[error("disks were not wiped: {0}")]
    NotWiped(String),
    #[error(transparent)]
    Tuf(#[from] kiln_release::TufError),
    #[error("{}: has no root.json: `tuf-client --metadata-dir DIR init ROOT` comes first", .0.display())]
    NoTrustedRoot(PathBuf),
    #[error("{}: more than {limit} bytes", path.display())]
    TooLong { path: PathBuf, limit: u64 },
    #[error("signing: {0}")]
    Sign(#[from] kiln_release::EnvelopeError),
    #[error("the machine {0} has not proven a key yet: it can be ordered nothing")]
    NoIdentity(String),
    #[error("there is no release {0} here: `kiln release list` shows what is published")]
    NoRelease(kiln_protocol::ReleaseId),
    #[error("writing the answer: {0}")]
    Output(std::io::Error),
    #[error("the answer is not what this kiln reads: {0}")]
    Answer(#[from] serde_json::Error),
}
