//! `kiln release publish`: a built release becomes a signed one.
//!
//! Everything is checked before anything is written, and the new metadata is run through the client before it is put
//! in place: artifacts first, then the files that name them, `timestamp.json` last. Killed anywhere, the repository
//! shows the old state or the new one.

use crate::files::{PUBLIC, Pending, make_dir, write_atomic};
use crate::repository::{Memory, Overlay, Repository, newest_state, verify_snapshot};
use crate::site::{OFFLINE_LIFETIME, SiteDir, after, new_key, read_key, sign, write_key};
use crate::site_error::SiteError;
use jiff::{SignedDuration, Timestamp};
use kiln_release::tuf::{MetaFile, Outcome, Snapshot, TargetFile, TargetPath, Targets};
use kiln_release::verity::Checker;
use kiln_release::{Artifact, Manifest, Signer, hex, is_image_name};
use ring::digest::{Context, SHA256};
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

/// What is signed offline is signed anew when a publish finds less than this left of it.
const RENEW_BELOW: SignedDuration = SignedDuration::from_hours(180 * 24);

/// A publish that went well.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// The very same release was published before; nothing was written.
    pub already: bool,
    /// Machines see it now. False where the online key is not on this machine: `kiln serve` signs the timestamp then.
    pub served: bool,
}

/// Publishes `build/IMAGE/RELEASE`.
pub fn publish(dir: impl AsRef<Path>, image: &str, release: u64, now: Timestamp) -> Result<Published, SiteError> {
    if !is_image_name(image) {
        return Err(SiteError::BadImageName { got: image.to_owned() });
    }
    let site = SiteDir::open(dir.as_ref())?;
    let _lock = site.lock_offline()?;

    let build = site.build(image, release);
    let manifest_path = build.join("manifest.json");
    let bytes = fs::read(&manifest_path).map_err(SiteError::not_built("read", &manifest_path))?;
    let manifest = Manifest::read(&bytes, image, release).map_err(SiteError::format(manifest_path.clone()))?;
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
        return Ok(Published { already: true, served: serve(&site, now)? });
    }

    place_artifacts(&site, &build, &manifest)?;
    let name = format!("{manifest_sha256}.manifest.json");
    let folder = site.repo().join("targets").join(image).join(release.to_string());
    make_dir(&folder, 0o755)?;
    write_atomic(&folder.join(name), &bytes, PUBLIC)?;

    for (file, bytes) in &sign_release(&site, &state, image, &target, &bytes, now)? {
        write_atomic(&site.repo().join(file), bytes, PUBLIC)?;
    }
    Ok(Published { already: false, served: serve(&site, now)? })
}

/// Signs a timestamp over the newest snapshot, if its key is on this machine.
fn serve(site: &SiteDir, now: Timestamp) -> Result<bool, SiteError> {
    match site.timestamp_key() {
        Ok(key) => Repository::adopt(site, &key, &Memory::default(), now).map(|_| true),
        Err(SiteError::NoKey { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Delegation, targets where it changes, snapshot: signed, and verified as a machine would.
fn sign_release(
    site: &SiteDir,
    state: &Outcome,
    image: &str,
    target: &TargetPath,
    manifest: &[u8],
    now: Timestamp,
) -> Result<Overlay, SiteError> {
    let role = format!("image-{image}");
    let expires = after(now, OFFLINE_LIFETIME);
    let key = image_key(site, state, &role)?;
    let mut files = Overlay::new();
    let mut snapshot = Snapshot::new(state.snapshot.version + 1, expires);
    snapshot.meta.clone_from(&state.snapshot.meta);
    let mut add = |name: &str, version: u64, text: String| {
        snapshot.list(name, version, text.as_bytes());
        files.insert(format!("metadata/{version}.{name}.json"), text.into_bytes());
    };

    let mut delegation = state.roles.get(&role).cloned().unwrap_or_else(|| Targets::new(0, expires));
    delegation.version += 1;
    delegation.expires = Targets::new(0, expires).expires;
    delegation.targets.insert(target.to_string(), TargetFile::of(manifest));
    add(&role, delegation.version, sign(&role, &delegation, &[&key])?);

    if let Some(old) = state.roles.get(Targets::TYPE) {
        let mut top = old.clone();
        top.delegate(&role, &[key.public()], 1, vec![format!("{image}/*/manifest.json")], true);
        if top != *old || old.expires < after(now, RENEW_BELOW) {
            top.version += 1;
            top.expires = Targets::new(0, expires).expires;
            let key = read_key(&site.offline_key("targets"), "delegate to a new image")?;
            add(Targets::TYPE, top.version, sign(Targets::TYPE, &top, &[&key])?);
        }
    }

    let version = snapshot.version;
    let key = read_key(&site.offline_key("snapshot"), "sign the snapshot")?;
    let bytes = sign(Snapshot::TYPE, &snapshot, &[&key])?.into_bytes();
    files.insert(format!("metadata/{version}.snapshot.json"), bytes.clone());
    // Against the versions of the state before: what a machine that saw it would say.
    verify_snapshot(site, &files, MetaFile::of(version, &bytes), state.seen.clone(), now)?;
    Ok(files)
}

/// The image's key; made when the image is published for the first time.
fn image_key(site: &SiteDir, state: &Outcome, role: &str) -> Result<Signer, SiteError> {
    let path = site.offline_key(role);
    match read_key(&path, "sign releases of this image") {
        Err(SiteError::NoKey { .. }) if !state.roles.contains_key(role) => {
            let key = new_key()?;
            write_key(&path, &key)?;
            Ok(key)
        }
        other => other,
    }
}

fn place_artifacts(site: &SiteDir, build: &Path, manifest: &Manifest) -> Result<(), SiteError> {
    let mut verity = Checker::new(&manifest.verity)
        .map_err(|source| SiteError::Verity { path: build.join("manifest.json"), source })?;
    let root = build.join("root");
    place(&root, &manifest.root, &site.artifact(&manifest.root.sha256), |bytes| {
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
        place(&build.join(file), artifact, &site.artifact(&artifact.sha256), |_| Ok(()))?;
    }
    // Firmware asks for the UKI by a name that ends in .efi; the agent's kexec asks by hash alone.
    let program = site.boot_program(&manifest.uki.sha256);
    if !program.exists() {
        if let Some(folder) = program.parent() {
            make_dir(folder, 0o755)?;
        }
        let artifact = site.artifact(&manifest.uki.sha256);
        fs::hard_link(&artifact, &program).map_err(SiteError::io("link", &program))?;
    }
    Ok(())
}

/// Copies a built file into the repository. The bytes that are written are the ones that are hashed; a link would
/// share them with a later build.
fn place(
    from: &Path,
    artifact: &Artifact,
    to: &Path,
    mut also: impl FnMut(&[u8]) -> Result<(), SiteError>,
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
    pending.commit()
}
