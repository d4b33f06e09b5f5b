//! `kiln trust tuf-client`: the client of images/release against any TUF repository, with whole files kept in a folder.
//!
//! Its options are those of the TUF community's conformance suite (`make conformance`). Machines use the same client,
//! but keep versions instead of files.

use super::error::CliError;
use super::file;
use clap::{Args, Subcommand};
use jiff::Timestamp;
use kiln_release::tuf::{
    Client, ExpiryPolicy, Fetched, Limits, Request, Seen, TargetFile, TargetPath, kept_file_name, kept_role,
};
use kiln_release::with_causes;
use reqwest::StatusCode;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::runtime::Runtime;

const MIB: u64 = 1 << 20;
/// What a repository of any size may list: beside the limits of a machine only these are wider.
const TARGETS: u64 = 10 * MIB;
const TARGET: u64 = 64 * MIB;
/// Connecting, and every pause.
const PAUSE: Duration = Duration::from_secs(20);
/// A transfer has this and [`PAUSE`] for its whole length, bytes per second.
const SLOWEST: u64 = 64 << 10;

#[derive(Debug, Args)]
pub(super) struct TufClient {
    /// Where the trusted files are kept, each under its TUF role's name
    #[arg(long)]
    metadata_dir: PathBuf,
    /// Where the repository has its metadata
    #[arg(long)]
    metadata_url: Option<String>,
    /// A target to download; may be given more than once
    #[arg(long, allow_hyphen_values = true)]
    target_name: Vec<String>,
    /// Where the repository has its targets
    #[arg(long)]
    target_base_url: Option<String>,
    /// Where downloaded targets are kept
    #[arg(long)]
    target_dir: Option<PathBuf>,
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Trust this root
    Init {
        /// A root.json that came by a way you trust
        root: PathBuf,
    },
    /// Bring the top-level metadata up to date
    Refresh,
    /// Bring the metadata up to date and download the targets named, in this order
    Download,
}

pub(super) fn run(command: &TufClient, runtime: &Runtime) -> Result<(), CliError> {
    match &command.action {
        Action::Init { root } => init(&command.metadata_dir, root),
        Action::Refresh => runtime.block_on(update(command, Vec::new(), None)),
        Action::Download => {
            let dir = command.target_dir.as_deref().ok_or_else(|| missing("--target-dir"))?;
            let base = command.target_base_url.as_deref().ok_or_else(|| missing("--target-base-url"))?;
            if command.target_name.is_empty() {
                return Err(missing("--target-name"));
            }
            let wanted = command.target_name.iter().map(TargetPath::new).collect::<Result<Vec<_>, _>>()?;
            runtime.block_on(update(command, wanted, Some((dir, base))))
        }
    }
}

fn missing(option: &str) -> CliError {
    CliError::Refused { message: format!("tuf-client: {option} is needed for this") }
}

fn limits() -> Limits {
    Limits { targets: TARGETS, delegation: TARGETS, target: TARGET, ..Limits::default() }
}

fn init(dir: &Path, root: &Path) -> Result<(), CliError> {
    let bytes = file::read(root, limits().root)?;
    client(&bytes, Vec::new())?;
    fs::create_dir_all(dir).map_err(at(dir))?;
    write(&dir.join(kept_file_name("root")), &bytes)
}

fn client(root: &[u8], wanted: Vec<TargetPath>) -> Result<Client, CliError> {
    Ok(Client::new(root, Seen::default(), Timestamp::now(), limits(), ExpiryPolicy::Refuse, wanted)?)
}

async fn update(command: &TufClient, wanted: Vec<TargetPath>, targets: Option<(&Path, &str)>) -> Result<(), CliError> {
    let metadata_url = command.metadata_url.as_deref().ok_or_else(|| missing("--metadata-url"))?;
    let dir = &command.metadata_dir;
    let mut kept = kept(dir)?;
    let root = kept.remove("root").ok_or_else(|| CliError::NoTrustedRoot(dir.clone()))?;
    let mut client = client(&root, wanted)?.with_kept(kept);
    let http = reqwest::Client::builder().connect_timeout(PAUSE).read_timeout(PAUSE).build();
    let http = http.map_err(|e| CliError::Request { url: metadata_url.to_owned(), reason: with_causes(&e) })?;
    let mut written = BTreeSet::new();
    while let Request::Fetch { path, max_bytes, may_be_absent: _ } = client.next() {
        let here = targets.and_then(|(dir, _)| Some((dir, client.wanted_target()?)));
        let here = here.and_then(|(dir, (path, listed))| Some((path.to_string(), cached(dir, path, listed)?)));
        let fetched = match here {
            Some((path, bytes)) => {
                written.insert(path);
                Fetched::Bytes(bytes)
            }
            None => {
                let url = match (path.strip_prefix("metadata/"), path.strip_prefix("targets/"), targets) {
                    (None, Some(file), Some((_, base))) => format!("{}/{file}", base.trim_end_matches('/')),
                    (file, _, _) => format!("{}/{}", metadata_url.trim_end_matches('/'), file.unwrap_or(&path)),
                };
                fetch(&http, &url, max_bytes).await?
            }
        };
        let fed = client.feed(fetched);
        // Also what was accepted before an error is kept.
        for change in client.take_changes() {
            let file = dir.join(kept_file_name(&change.role));
            match change.bytes {
                Some(bytes) => write(&file, &bytes)?,
                None => fs::remove_file(&file).map_err(at(&file))?,
            }
        }
        fed?;
        if let Some((dir, _)) = targets {
            for (path, target) in client.targets() {
                if written.insert(path.clone()) {
                    fs::create_dir_all(dir).map_err(at(dir))?;
                    write(&target_file(dir, path), &target.bytes)?;
                }
            }
        }
    }
    client.finish()?;
    Ok(())
}

/// The kept files by role. What is no role's file, or longer than any may be, is left alone.
fn kept(dir: &Path) -> Result<BTreeMap<String, Vec<u8>>, CliError> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(dir).map_err(at(dir))? {
        let entry = entry.map_err(at(dir))?;
        let role = entry.file_name().to_str().and_then(kept_role);
        let short = entry.metadata().is_ok_and(|meta| meta.is_file() && meta.len() <= TARGETS);
        if let Some(role) = role.filter(|_| short) {
            files.insert(role, fs::read(entry.path()).map_err(at(&entry.path()))?);
        }
    }
    Ok(files)
}

/// One file for each target path, whatever the path.
fn target_file(dir: &Path, path: &str) -> PathBuf {
    let name = kept_file_name(path);
    dir.join(name.strip_suffix(".json").unwrap_or(&name))
}

/// A target that was downloaded before, if it is still the one that is listed.
fn cached(dir: &Path, path: &TargetPath, listed: &TargetFile) -> Option<Vec<u8>> {
    let file = target_file(dir, path.as_str());
    let same_length = fs::metadata(&file).is_ok_and(|meta| meta.len() == listed.length);
    if !same_length {
        return None;
    }
    fs::read(&file).ok().filter(|bytes| listed.is(bytes))
}

async fn fetch(http: &reqwest::Client, url: &str, max_bytes: u64) -> Result<Fetched, CliError> {
    let failed = |e: reqwest::Error| CliError::Request { url: url.to_owned(), reason: with_causes(&e) };
    let whole = PAUSE + Duration::from_secs(max_bytes / SLOWEST);
    let mut response = http.get(url).timeout(whole).send().await.map_err(failed)?;
    match response.status() {
        status if status.is_success() => {}
        // Object stores answer 403 for what they do not have.
        StatusCode::NOT_FOUND | StatusCode::FORBIDDEN => return Ok(Fetched::Absent),
        status => return Err(CliError::Request { url: url.to_owned(), reason: format!("answered {status}") }),
    }
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(failed)? {
        if (bytes.len() + chunk.len()) as u64 > max_bytes {
            return Ok(Fetched::TooLong);
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(Fetched::Bytes(bytes))
}

/// Whole or not at all.
fn write(path: &Path, bytes: &[u8]) -> Result<(), CliError> {
    // No role's and no target's file begins with a dot and a space.
    let beside = path.with_file_name(format!(". {}", std::process::id()));
    fs::write(&beside, bytes).map_err(at(&beside))?;
    fs::rename(&beside, path).map_err(at(path))
}

fn at(path: &Path) -> impl FnOnce(std::io::Error) -> CliError {
    let path = path.to_owned();
    move |source| CliError::File { path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The second column of docs/metadata.md.
    #[test]
    fn the_caps_are_the_documented_ones() {
        let Limits { root, root_chain, timestamp, snapshot, targets, delegation, target, roles } = limits();
        assert_eq!([root, timestamp, snapshot], [MIB; 3]);
        assert_eq!((targets, delegation, target), (10 * MIB, 10 * MIB, 64 * MIB));
        assert_eq!((root_chain, roles), (1024, 32));
        for row in [
            "| root, timestamp, snapshot | 1 MiB each | the same |",
            "| new roots in one update | 1 024 | the same |",
            "| top-level targets | 1 MiB | 10 MiB |",
            "| a delegated role (an image's) | 256 KiB | 10 MiB |",
            "| a target (manifest, `site.json`) | 256 KiB | 64 MiB |",
            "| roles visited in search of one target | 32 | the same |",
        ] {
            let documented = include_str!("../../../docs/metadata.md").lines().any(|line| line == row);
            assert!(documented, "docs/metadata.md has no row {row}");
        }
    }
}
