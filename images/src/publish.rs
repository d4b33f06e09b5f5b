//! `kiln release publish`: a built release becomes a signed one.
//!
//! Everything is checked before anything is written, and the new metadata is run through the client before it is put
//! in place: artifacts first, then the files that name them, the snapshot, `timestamp.json` last. Killed anywhere, the
//! repository shows the old state or the new one; stopped by an error before the snapshot, it holds nothing new.

use crate::files::{Batch, PUBLIC, Pending};
use crate::prune::Record;
use crate::repository::newest_state;
use crate::signing::{Draft, Signing, Waiting, serve};
use crate::site::SiteDir;
use crate::site_error::SiteError;
use jiff::Timestamp;
use kiln_release::tuf::{Limits, TargetFile, TargetPath};
use kiln_release::verity::Checker;
use kiln_release::{Artifact, Manifest, hex, is_image_name};
use ring::digest::{Context, SHA256};
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

/// A publish that went well.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// The very same release was published before; nothing was written.
    pub already: bool,
    /// Machines see it now. False where the online key is not on this machine: `kiln serve` signs the timestamp then.
    pub served: bool,
    /// The image's list of releases is nearly as long as a machine reads.
    pub crowded: Option<Crowded>,
    /// People must sign first: nothing that machines are served has changed.
    pub waiting: Option<Waiting>,
}

/// A list of releases that has used up four fifths of its limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Crowded {
    /// Its length in bytes.
    pub bytes: u64,
    /// The longest that machines read.
    pub limit: u64,
}

impl Crowded {
    fn of(bytes: u64) -> Option<Self> {
        let limit = Limits::default().delegation;
        (bytes >= limit / 5 * 4).then_some(Self { bytes, limit })
    }
}

/// Publishes `build/IMAGE/RELEASE`.
pub fn publish(dir: impl AsRef<Path>, image: &str, release: u64, now: Timestamp) -> Result<Published, SiteError> {
    if !is_image_name(image) {
        return Err(SiteError::BadImageName { got: image.to_owned() });
    }
    let site = SiteDir::open(dir.as_ref())?;
    let _lock = site.lock_offline()?;

    let (_, bytes) = built_manifest(&site, image, release)?;
    let target = TargetPath::manifest(image, release).map_err(SiteError::metadata(&site))?;
    let manifest_sha256 = hex::sha256(&bytes);

    let state = newest_state(&site, now)?;
    if let Some(known) = state.targets.get(target.as_str()) {
        if known.sha256 != manifest_sha256 {
            return Err(SiteError::PublishedDiffers {
                release: format!("{image}/{release}"),
                published: known.sha256.clone(),
                built: manifest_sha256,
            });
        }
        // A publish that was killed, or found the disk full, may have left the timestamp to this one.
        return Ok(Published { already: true, served: serve(&site, now)?, crowded: None, waiting: None });
    }
    if let Some(request) = site.read_open_request()?
        && request.added_releases()?.contains(&(image.to_owned(), release))
    {
        let waiting = Some(Waiting::of(&site, &request, &request.lacking()?));
        return Ok(Published { already: false, served: false, crowded: None, waiting });
    }
    Record::read(&site)?.check_new(image, release)?;

    // Also before people are asked to sign it: what does not fit its manifest is found now. Without them it goes again.
    let mut batch = Batch::default();
    place_release(&site, image, release, &mut batch)?;
    let mut draft = Draft::on(&site, &state, now, format!("publish {image}/{release}"))?;
    draft.file(&target, &bytes);
    draft.image(image)?.targets.insert(target.to_string(), TargetFile::of(&bytes));
    match draft.sign()? {
        Signing::Complete(change) => {
            change.write(&site, batch)?;
            let crowded = Crowded::of(change.delegation);
            Ok(Published { already: false, served: serve(&site, now)?, crowded, waiting: None })
        }
        Signing::Open(waiting) => {
            Ok(Published { already: false, served: false, crowded: None, waiting: Some(waiting) })
        }
    }
}

fn built_manifest(site: &SiteDir, image: &str, release: u64) -> Result<(Manifest, Vec<u8>), SiteError> {
    let path = site.build(image, release).join("manifest.json");
    let bytes = fs::read(&path).map_err(SiteError::not_built("read", &path))?;
    let manifest = Manifest::read(&bytes, image, release).map_err(SiteError::format(path))?;
    Ok((manifest, bytes))
}

/// Puts a built release's artifacts into the repository, each checked against its manifest.
pub(crate) fn place_release(site: &SiteDir, image: &str, release: u64, batch: &mut Batch) -> Result<(), SiteError> {
    let (manifest, _) = built_manifest(site, image, release)?;
    place_artifacts(site, &site.build(image, release), &manifest, batch)
}

fn place_artifacts(site: &SiteDir, build: &Path, manifest: &Manifest, batch: &mut Batch) -> Result<(), SiteError> {
    let mut verity = Checker::new(&manifest.verity)
        .map_err(|source| SiteError::Verity { path: build.join("manifest.json"), source })?;
    let root = build.join("root");
    let mut place = |from: &Path, artifact: &Artifact, also: &mut dyn FnMut(&[u8]) -> Result<(), SiteError>| {
        place(from, artifact, &site.artifact(&artifact.sha256), also, batch)
    };
    place(&root, &manifest.root, &mut |bytes| {
        verity.push(bytes).map_err(|source| SiteError::Verity { path: root.clone(), source })
    })?;
    verity.finish().map_err(|source| SiteError::Verity { path: root.clone(), source })?;

    let others = [
        ("kernel", Some(&manifest.kernel)),
        ("initramfs", Some(&manifest.initramfs)),
        ("extra", manifest.extra.as_ref()),
        ("sbom.json", manifest.sbom.as_ref()),
        ("kiln.efi", Some(&manifest.uki)),
    ];
    for (file, artifact) in others.into_iter().filter_map(|(file, artifact)| Some((file, artifact?))) {
        place(&build.join(file), artifact, &mut |_| Ok(()))?;
    }
    // Firmware asks for the UKI by a name that ends in .efi; the agent's kexec asks by hash alone.
    let program = site.boot_program(&manifest.uki.sha256);
    if let Some(folder) = program.parent() {
        batch.folder(folder, 0o755)?;
    }
    batch.link(&site.artifact(&manifest.uki.sha256), &program)
}

/// Copies a built file into the repository. The bytes that are written are the ones that are hashed; a link would
/// share them with a later build.
fn place(
    from: &Path,
    artifact: &Artifact,
    to: &Path,
    also: &mut dyn FnMut(&[u8]) -> Result<(), SiteError>,
    batch: &mut Batch,
) -> Result<(), SiteError> {
    let mut input = File::open(from).map_err(SiteError::not_built("open", from))?;
    let mut pending = Pending::create(to, PUBLIC)?;
    let mut context = Context::new(&SHA256);
    let mut length = 0u64;
    let mut buffer = vec![0u8; 1 << 20];
    loop {
        let got = input.read(&mut buffer).map_err(SiteError::io("read", from))?;
        if got == 0 {
            break;
        }
        let bytes = &buffer[..got];
        context.update(bytes);
        length += got as u64;
        also(bytes)?;
        pending.write(bytes)?;
    }
    let got = (length, hex::encode(context.finish().as_ref()));
    if got != (artifact.length, artifact.sha256.clone()) {
        let show = |(length, sha256): (u64, String)| format!("{length} bytes with SHA-256 {sha256}");
        return Err(SiteError::ArtifactMismatch {
            path: from.to_owned(),
            expected: show((artifact.length, artifact.sha256.clone())),
            got: show(got),
        });
    }
    batch.commit(pending)
}
