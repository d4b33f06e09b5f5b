//! Commands that work on the site directory: no server needs to run.

use super::ask::{whom, withhold};
use super::client::Client;
use super::error::CliError;
use super::secret::{new_passphrase, passphrase};
use super::trust::{said, waits};
use super::{At, Build, Prune};
use crate::view::ReleaseView;
use clap::Subcommand;
use jiff::{SignedDuration, Span, SpanRelativeTo, Timestamp};
use kiln_images::sealed::ROUNDS;
use kiln_images::{BuildOptions, PruneOptions, Pruned, SiteDir, SiteError, SiteUrls, Unlock};
use kiln_protocol::{ImageName, ReleaseId, Sha256Hex};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use tokio::runtime::Runtime;

#[derive(Debug, Subcommand)]
pub(super) enum SecureBoot {
    /// Make the keys of a site that has none, encrypted with a passphrase; `kiln trust init --lab` makes those of a new one
    Init {
        /// The site directory, with offline/
        #[arg(long, env = "KILN_SITE")]
        site: PathBuf,
        /// Do not encrypt them: for tests, or where the medium itself is encrypted
        #[arg(long)]
        no_passphrase: bool,
        /// Read the passphrase from this file's first line instead of asking
        #[arg(long, conflicts_with = "no_passphrase")]
        passphrase_file: Option<PathBuf>,
    },
    /// Encrypt keys that lie there unencrypted
    Encrypt {
        /// The site directory, with offline/
        #[arg(long, env = "KILN_SITE")]
        site: PathBuf,
        /// Read the passphrase from this file's first line instead of asking
        #[arg(long)]
        passphrase_file: Option<PathBuf>,
    },
    /// Write what firmware takes: PK, KEK, db and dbx as .cer, .esl and .auth
    Enroll {
        /// The site directory, with offline/
        #[arg(long, env = "KILN_SITE")]
        site: PathBuf,
        /// Where to write; made if it is not there
        #[arg(long)]
        out: PathBuf,
        /// Also write OVMF_VARS.fd, this variable store with the keys enrolled
        #[arg(long)]
        ovmf_vars: Option<PathBuf>,
        /// Read the keys' passphrase from this file's first line instead of asking
        #[arg(long)]
        passphrase_file: Option<PathBuf>,
        /// Authenticode SHA-256 of an image that db names too: an option ROM of `kiln machine show` (repeatable)
        #[arg(long, value_name = "HASH", value_delimiter = ',')]
        allow: Vec<Sha256Hex>,
    },
    /// Sign a boot program of others, such as iPXE, for `[boot] snponly`: what it was signed with before is taken off
    Sign {
        /// The program: a PE file for UEFI
        program: PathBuf,
        /// The site directory, with offline/
        #[arg(long, env = "KILN_SITE")]
        site: PathBuf,
        /// Where to write it
        #[arg(long)]
        out: PathBuf,
        /// Read the key's passphrase from this file's first line instead of asking
        #[arg(long)]
        passphrase_file: Option<PathBuf>,
    },
}

pub(super) fn secure_boot(command: SecureBoot) -> Result<(), CliError> {
    match command {
        SecureBoot::Init { site, no_passphrase, passphrase_file } => {
            secure_boot_init(&site, no_passphrase, passphrase_file.as_deref())
        }
        SecureBoot::Encrypt { site, passphrase_file } => secure_boot_encrypt(&site, passphrase_file.as_deref()),
        SecureBoot::Enroll { site, out, ovmf_vars, passphrase_file, allow } => {
            enroll(&site, &out, ovmf_vars.as_deref(), &allow, passphrase_file.as_deref())
        }
        SecureBoot::Sign { program, site, out, passphrase_file } => {
            sign(&program, &site, &out, passphrase_file.as_deref())
        }
    }
}

/// Asks for the passphrase of an encrypted key, or reads it there.
fn unlock(from: Option<&Path>) -> Unlock<'_> {
    Unlock::by(move |key| {
        passphrase(from, key)
            .map_err(|error| SiteError::NoPassphrase { path: key.to_owned(), reason: error.to_string() })
    })
}

/// Where people hold the keys, one of Secure Boot that is not encrypted is named.
fn warn_of_plain(site: &SiteDir, unlock: &Unlock<'_>) -> Result<(), CliError> {
    if let Some(path) = unlock.plain().first()
        && !site.is_lab()?
    {
        eprintln!(
            "warning: {} is not encrypted: `kiln trust secureboot encrypt --site {}` does that",
            path.display(),
            site.path.display()
        );
    }
    Ok(())
}

pub(super) fn init(dir: &Path, name: &str) -> Result<(), CliError> {
    kiln_images::init_lab(dir, name, Timestamp::now())?;
    println!("site {name} is made in {}", dir.display());
    println!(
        "next: kiln image build RECIPE --site {0}; kiln release publish IMAGE/1 --site {0}; kiln serve --site {0}",
        dir.display()
    );
    Ok(())
}

pub(super) fn network(file: &Path, site: &Path) -> Result<(), CliError> {
    let text = std::fs::read_to_string(file).map_err(|source| CliError::Read { path: file.to_owned(), source })?;
    let config = kiln_images::read_network(file, &text).map_err(|error| CliError::Build(error.into()))?;
    let version = config.version;
    let done = kiln_images::sign_network(site, config, Timestamp::now())?;
    if done.waiting.is_none() {
        let what = if done.already { "was signed before, nothing changed" } else { "is signed" };
        println!("network configuration {version} {what}; each machine tries it at its next boot");
    }
    said(&done);
    Ok(())
}

fn secure_boot_init(dir: &Path, plain: bool, from: Option<&Path>) -> Result<(), CliError> {
    let site = SiteDir::open(dir)?;
    let passphrase = if plain { None } else { Some(new_passphrase(from)?) };
    kiln_images::init_secure_boot(&site, passphrase.as_ref(), ROUNDS)?;
    println!("Secure Boot keys are made in {}; releases built from now on are signed", site.secure_boot("").display());
    Ok(())
}

fn secure_boot_encrypt(dir: &Path, from: Option<&Path>) -> Result<(), CliError> {
    let site = SiteDir::open(dir)?;
    let done = kiln_images::encrypt_secure_boot(&site, &new_passphrase(from)?, ROUNDS)?;
    if done.is_empty() {
        println!("the keys in {} were encrypted before", site.secure_boot("").display());
        return Ok(());
    }
    for file in &done {
        println!("{} is encrypted", file.display());
    }
    println!("what lay there may still be in the disk's free space, and in backups");
    Ok(())
}

fn enroll(
    dir: &Path,
    out: &Path,
    ovmf: Option<&Path>,
    allow: &[Sha256Hex],
    from: Option<&Path>,
) -> Result<(), CliError> {
    let digest = |hash: &Sha256Hex| {
        let bytes = kiln_release::hex::decode(hash.as_str()).and_then(|bytes| <[u8; 32]>::try_from(bytes).ok());
        bytes.expect("64 hex digits are 32 bytes")
    };
    let allow = allow.iter().map(digest).collect();
    let (site, mut unlock) = (SiteDir::open(dir)?, unlock(from));
    let done = kiln_images::enroll(&site, out, ovmf, &allow, Timestamp::now(), &mut unlock)?;
    warn_of_plain(&site, &unlock)?;
    for file in &done.files {
        println!("{}", file.display());
    }
    if done.allowed > 0 {
        println!("db names {} images beside the site's certificate", done.allowed);
    }
    println!(
        "dbx names {} releases. In setup mode enroll db, KEK and PK, in this order: with PK the machine is the site's",
        done.revoked
    );
    Ok(())
}

fn sign(program: &Path, dir: &Path, out: &Path, from: Option<&Path>) -> Result<(), CliError> {
    let (site, mut unlock) = (SiteDir::open(dir)?, unlock(from));
    let sbat = kiln_images::sign_program(&site, program, out, &mut unlock)?;
    warn_of_plain(&site, &unlock)?;
    println!("{} is signed with the site's key", out.display());
    if !sbat {
        println!("it has no .sbat section: firmware starts it, shim does not");
    }
    Ok(())
}

pub(super) fn revoke(release: &ReleaseId, dir: &Path, from: Option<&Path>) -> Result<(), CliError> {
    let (site, mut unlock) = (SiteDir::open(dir)?, unlock(from));
    let new = kiln_images::revoke(&site, release.image.as_str(), release.release, Timestamp::now())?;
    let what = if new { "is revoked" } else { "was revoked before" };
    println!("{release} {what}; a machine's firmware refuses it once its dbx names it");
    match kiln_images::publish_dbx(&site, Timestamp::now(), &mut unlock) {
        Ok(changed) => {
            warn_of_plain(&site, &unlock)?;
            println!(
                "machines put it into their firmware as soon as they need no revoked release: `kiln trust status`"
            );
            said(&changed);
            Ok(())
        }
        Err(SiteError::NoSecureBootKey { path }) => {
            println!(
                "{} is not here, so that machines are told nothing: `kiln trust secureboot enroll` makes dbx where it is",
                path.display()
            );
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

pub(super) fn build(build: Build) -> Result<(), CliError> {
    let agent = match build.agent {
        Some(agent) => agent,
        None => beside_this_program("kiln-agent")?,
    };
    let mut unlock = unlock(build.passphrase_file.as_deref());
    let usual = BuildOptions::new(build.recipe, build.site, agent);
    let options = BuildOptions {
        release: build.release,
        cache: build.cache.unwrap_or_else(|| usual.cache.clone()),
        refresh: build.refresh,
        site_urls: SiteUrls { http: build.http_url, agent: build.agent_url },
        unsigned: build.unsigned,
        ..usual
    };
    let built = kiln_images::build_with(&options, &mut unlock)?;
    warn_of_plain(&SiteDir::open(&options.site_dir)?, &unlock)?;
    let done = if built.changed { "is built" } else { "is unchanged" };
    println!("{}/{} {done} in {}", built.manifest.image, built.manifest.release, built.folder.display());
    Ok(())
}

pub(super) fn publish(release: &ReleaseId, site: &Path) -> Result<(), CliError> {
    let done = kiln_images::publish(site, release.image.as_str(), release.release, Timestamp::now())?;
    if waits(done.waiting.as_ref()) {
        return Ok(());
    }
    let what = if done.already { "was published before, nothing changed" } else { "is published" };
    println!("{release} {what}; `kiln assign MACHINE {release}` gives it to a machine");
    if !done.served {
        println!("{NOT_SERVED}");
    }
    if let Some(crowded) = done.crowded {
        eprintln!(
            "warning: the list of releases of {} has {} of at most {} KiB; `kiln release prune {} --keep N` takes \
             old ones out",
            release.image,
            crowded.bytes >> 10,
            crowded.limit >> 10,
            release.image
        );
    }
    Ok(())
}

pub(super) const NOT_SERVED: &str =
    "machines see it when `kiln serve` has signed the timestamp: its key is not on this machine";

/// A duration as `0s`, `12h` or `7d`, a day being 24 hours.
pub(super) fn grace(text: &str) -> Result<SignedDuration, String> {
    let span: Span = text.parse().map_err(|_| "expected a duration, as 0s, 12h or 7d".to_owned())?;
    let duration = span.to_duration(SpanRelativeTo::days_are_24_hours());
    let duration = duration.map_err(|_| "months and years have no fixed length: say it in days".to_owned())?;
    if duration.is_negative() { Err("a duration from 0 on".to_owned()) } else { Ok(duration) }
}

pub(super) fn prune(prune: Prune, runtime: &Runtime) -> Result<(), CliError> {
    let Prune { image, keep, ask: asked, grace, dry_run } = prune;
    let site = SiteDir::open(&asked.site)?;
    // The lock is held to the end: a server that starts meanwhile would not have been asked.
    let (ask, _alone) = whom(&asked)?;
    let options =
        PruneOptions { image: image.to_string(), keep: usize::try_from(keep).unwrap_or(usize::MAX), grace, dry_run };
    let needed = |going: &[u64]| match &ask {
        Some(at) => runtime.block_on(needed(at, &site, &image, going, dry_run)),
        None => Ok(BTreeSet::new()),
    };
    let done = kiln_images::prune::<CliError>(&site, &options, Timestamp::now(), needed)?;
    if waits(done.request.as_ref()) {
        return Ok(());
    }
    for line in pruned(&image, &done, dry_run) {
        println!("{line}");
    }
    Ok(())
}

/// Which of those that are to go machines need. The server gives the others to nobody from then on.
async fn needed(
    at: &At,
    site: &SiteDir,
    image: &ImageName,
    going: &[u64],
    dry_run: bool,
) -> Result<BTreeSet<u64>, CliError> {
    if !dry_run {
        return withhold(at, site, image, going).await;
    }
    let client = Client::new(at)?;
    client.is_of(site, at).await?;
    let releases: Vec<ReleaseView> = client.get("releases").await?;
    let needed = releases.into_iter().filter(|r| r.image == image.as_str() && r.needed_by > 0);
    Ok(needed.map(|r| r.release).collect())
}

fn pruned(image: &ImageName, done: &Pruned, dry_run: bool) -> Vec<String> {
    let list = |releases: &[u64]| {
        let names: Vec<String> = releases.iter().map(|release| format!("{image}/{release}")).collect();
        names.join(", ")
    };
    let mut lines = vec![match (done.removed.is_empty(), dry_run) {
        (true, _) => format!("no release of {image} is to be taken out"),
        (false, true) => format!("would be taken out: {}", list(&done.removed)),
        (false, false) => format!("no longer published: {}", list(&done.removed)),
    }];
    if !done.needed.is_empty() {
        lines.push(format!("stay because machines need them: {}", list(&done.needed)));
    }
    if dry_run {
        return lines;
    }
    if !done.served {
        lines.push(NOT_SERVED.to_owned());
    }
    let (files, bytes) = done.deleted;
    if files > 0 {
        lines.push(format!("{files} files deleted, {} KiB", bytes >> 10));
    }
    if done.waiting > 0 {
        lines.push(format!("artifacts of {} releases stay until a later prune, as --grace says", done.waiting));
    }
    lines
}

fn beside_this_program(name: &str) -> Result<PathBuf, CliError> {
    let program = std::env::current_exe().map_err(CliError::Runtime)?;
    let path = program.with_file_name(name);
    if path.exists() { Ok(path) } else { Err(CliError::NoAgent(path)) }
}
