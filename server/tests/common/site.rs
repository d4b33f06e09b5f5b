//! A site with small releases in place of built ones.

use super::*;

/// What `kiln image build` leaves.
pub fn build(site: &SiteDir, release: u64) -> Manifest {
    build_wanting(site, release, vec![])
}

/// A release that wants these secrets.
pub fn build_wanting(site: &SiteDir, release: u64, secrets: Vec<WantedSecret>) -> Manifest {
    let folder = site.build("minimal", release);
    fs::create_dir_all(&folder).unwrap();
    let mut tree = TreeBuilder::new(b"salt", [1; 16]).unwrap();
    let blocks = [[u8::try_from(release).unwrap(); BLOCK]; 3];
    for block in &blocks {
        tree.push_block(block);
    }
    let tree = tree.finish().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        fs::write(folder.join(name), bytes).unwrap();
        Artifact { sha256: hex::sha256(bytes), length: bytes.len() as u64 }
    };
    let text = |what: &str| format!("{what} of minimal/{release}").into_bytes();
    let manifest = Manifest {
        type_: MANIFEST_TYPE.into(),
        spec_version: "1.0".into(),
        image: "minimal".into(),
        release,
        class: "normal".into(),
        architecture: "x86_64".into(),
        product: "generic".into(),
        built: "2026-01-01T00:00:00Z".parse().unwrap(),
        uki: file("kiln.efi", &text("uki")),
        kernel: file("kernel", &text("kernel")),
        kexec_kernel: None,
        initramfs: file("initramfs", &text("initramfs")),
        extra: None,
        root: file("root", &[blocks.concat(), tree.hash_area].concat()),
        verity: VerityParams {
            root_hash: hex::encode(&tree.root_hash),
            salt: hex::encode(b"salt"),
            data_blocks: 3,
            hash_offset: (3 * BLOCK) as u64,
        },
        command_line: "console=ttyS0".into(),
        policy: FilePolicy::default(),
        hooks: BTreeMap::new(),
        health: vec![HealthCheck::of(HealthKind::Systemd, 5)],
        writable: vec![],
        sbom: None,
        secrets,
        certificate: None,
        measured: Some(measured(release)),
        role_may_report: Some(false),
    };
    fs::write(folder.join("manifest.json"), serde_json::to_vec_pretty(&manifest).unwrap()).unwrap();
    manifest
}

/// What a TPM measures of such a release.
pub fn measured(release: u64) -> Measured {
    let parts: [u8; 32] = hex::decode(&hex::sha256(format!("parts {release}").as_bytes())).unwrap().try_into().unwrap();
    let pcr11 = hex::encode(&kiln_release::measured::extend(&[0; 32], &parts));
    let [uki, kernel] = ["uki", "kernel"].map(|what| hex::sha256(format!("{what} {release}").as_bytes()));
    Measured { pcr11, uki, kernel, loader: None, certificate: Some(hex::sha256(b"site")), kexec: None }
}

pub struct TestSite {
    pub dir: tempfile::TempDir,
    pub site: SiteDir,
}

impl TestSite {
    /// With release 1 published, and machines 1 to 3 on the pre-loaded list.
    pub fn new() -> Self {
        let this = Self::made_by(|dir| init_lab(dir, "test", Timestamp::now()).unwrap());
        this.publish(1);
        this
    }

    /// With those machines, and as `init` makes it in an empty folder.
    pub fn made_by(init: impl FnOnce(&Path) -> SiteDir) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let site = init(dir.path());
        let this = Self { dir, site };
        let mut config = String::from(
            "[http]\nlisten = \"127.0.0.1:0\"\n[agent_api]\nlisten = \"127.0.0.1:0\"\n[dhcp]\nmode = \"off\"\n\
             [tftp]\nlisten = \"127.0.0.1:0\"\n[[role]]\nname = \"lab\"\nimage = \"minimal\"\n",
        );
        for n in 1..=3 {
            let _ = writeln!(config, "[[machine]]\nid = \"{}\"\nname = \"rack-{n}\"\nrole = \"lab\"", machine_id(n));
        }
        fs::write(this.path().join("kiln.toml"), config).unwrap();
        this
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// More of kiln.toml.
    pub fn configure(&self, more: &str) {
        let file = self.path().join("kiln.toml");
        let text = fs::read_to_string(&file).unwrap();
        fs::write(file, format!("{text}{more}\n")).unwrap();
    }

    /// The program on this site, or elsewhere: exit code, standard output, standard error.
    pub fn kiln(&self, arguments: &[&str]) -> (bool, String, String) {
        let mut kiln = Command::new(env!("CARGO_BIN_EXE_kiln"));
        let output = kiln.args(arguments).current_dir(self.path()).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.success(), text(&output.stdout), text(&output.stderr))
    }

    pub fn publish(&self, release: u64) -> Manifest {
        let manifest = build(&self.site, release);
        kiln_images::publish(self.path(), "minimal", release, Timestamp::now()).unwrap();
        manifest
    }

    pub fn publish_wanting(&self, release: u64, secrets: &[&str]) -> Manifest {
        let want = |name: &&str| WantedSecret { name: (*name).into(), owner: None, required: true, units: vec![] };
        let manifest = build_wanting(&self.site, release, secrets.iter().map(want).collect());
        kiln_images::publish(self.path(), "minimal", release, Timestamp::now()).unwrap();
        manifest
    }

    /// The same, with another manifest.
    pub fn publish_as(&self, release: u64, change: impl FnOnce(&mut Manifest)) -> Manifest {
        let mut manifest = build(&self.site, release);
        change(&mut manifest);
        let path = self.site.build("minimal", release).join("manifest.json");
        fs::write(path, serde_json::to_vec_pretty(&manifest).unwrap()).unwrap();
        kiln_images::publish(self.path(), "minimal", release, Timestamp::now()).unwrap();
        manifest
    }

    pub fn manifest(&self, release: u64) -> Manifest {
        let path = self.site.build("minimal", release).join("manifest.json");
        serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
    }

    pub fn signed_site(&self) -> kiln_release::Site {
        kiln_images::Repository::newest(&self.site, Timestamp::now()).unwrap().site
    }

    /// Version of the newest snapshot.
    pub fn snapshot(&self) -> u64 {
        kiln_images::Repository::newest(&self.site, Timestamp::now()).unwrap().snapshot
    }

    pub fn online(&self, name: &str) -> Vec<u8> {
        fs::read(self.path().join("online").join(name)).unwrap()
    }
}

pub fn machine_id(n: u8) -> MachineId {
    format!("00000000-0000-0000-0000-0000000000{n:02x}").parse().unwrap()
}
