//! A site with small releases in place of built ones.
#![allow(dead_code)]

use jiff::Timestamp;
use kiln_images::{SiteDir, init_lab};
use kiln_release::tuf::{Client, ExpiryPolicy, Fetched, Limits, Outcome, Request, Seen, Wanted};
use kiln_release::verity::{BLOCK, TreeBuilder};
use kiln_release::{Artifact, FilePolicy, HealthCheck, HealthKind, MANIFEST_TYPE, Manifest, VerityParams, hex};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// What `kiln image build` leaves, with small contents that differ from release to release.
pub fn build(site: &SiteDir, image: &str, release: u64, built: Timestamp) -> Manifest {
    let folder = site.build(image, release);
    fs::create_dir_all(&folder).unwrap();
    let mut builder = TreeBuilder::new(b"salt", [1; 16]).unwrap();
    let mut blocks = [1, 2, 3, 4, 5].map(|byte| [byte; BLOCK]);
    blocks[0][..8].copy_from_slice(&release.to_le_bytes());
    for block in &blocks {
        builder.push_block(block);
    }
    let tree = builder.finish().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        fs::write(folder.join(name), bytes).unwrap();
        Artifact { sha256: hex::sha256(bytes), length: bytes.len() as u64 }
    };
    let text = |what: &str| format!("{what} of {image}/{release}").into_bytes();
    let manifest = Manifest {
        type_: MANIFEST_TYPE.into(),
        spec_version: "1.0".into(),
        image: image.into(),
        release,
        class: "normal".into(),
        architecture: "x86_64".into(),
        product: "generic".into(),
        built,
        uki: file("kiln.efi", &text("uki")),
        kernel: file("kernel", &text("kernel")),
        kexec_kernel: None,
        initramfs: file("initramfs", &text("initramfs")),
        extra: None,
        root: file("root", &[blocks.concat(), tree.hash_area].concat()),
        verity: VerityParams {
            root_hash: hex::encode(&tree.root_hash),
            salt: hex::encode(b"salt"),
            data_blocks: 5,
            hash_offset: (5 * BLOCK) as u64,
        },
        command_line: "console=ttyS0".into(),
        policy: FilePolicy::default(),
        hooks: BTreeMap::new(),
        health: vec![HealthCheck::of(HealthKind::Systemd, 5)],
        writable: vec![],
        sbom: None,
        secrets: vec![],
        certificate: None,
        measured: None,
        role_may_report: None,
    };
    write_manifest(site, &manifest);
    manifest
}

pub fn write_manifest(site: &SiteDir, manifest: &Manifest) {
    let path = site.build(&manifest.image, manifest.release).join("manifest.json");
    fs::write(path, serde_json::to_vec_pretty(manifest).unwrap()).unwrap();
}

pub fn new_site(now: Timestamp) -> (tempfile::TempDir, SiteDir) {
    let dir = tempfile::tempdir().unwrap();
    let site = init_lab(dir.path(), "lab", now).unwrap();
    (dir, site)
}

/// Every file below a folder, by path.
pub fn files_below(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut out = BTreeMap::new();
    for entry in fs::read_dir(path).unwrap() {
        let entry = entry.unwrap().path();
        if entry.is_dir() {
            out.extend(files_below(&entry));
        } else {
            out.insert(entry.display().to_string(), fs::read(&entry).unwrap());
        }
    }
    out
}

/// The repository as machines are served it: from its first root and by the timestamp that is there.
pub fn served(site: &SiteDir, now: Timestamp) -> Outcome {
    let root = fs::read(site.metadata("1.root.json")).unwrap();
    let (limits, policy) = (Limits::default(), ExpiryPolicy::ReportStale);
    let mut client = Client::new(&root, Seen::default(), now, limits, policy, Wanted::All).unwrap();
    while let Request::Fetch { path, .. } = client.next() {
        client.feed(fs::read(site.repo().join(&path)).map_or(Fetched::Absent, Fetched::Bytes)).unwrap();
    }
    client.finish().unwrap()
}
