//! A site on loopback for this crate's tests: real signed metadata, a real HTTP server, a real agent API over TLS. Small
//! releases, whose UKIs are PE files with parts that no processor would run.

pub mod director;
#[path = "../../../images/tests/namespace/mod.rs"]
pub mod namespace;
#[path = "../../../images/tests/oracle/mod.rs"]
pub mod oracle;
pub mod web;

use crate::flow::Flow;
use crate::journal::{Journal, JournalState, boot_id, monotonic_ms};
use crate::memory::Place;
use crate::verifier::{Servers, Verifier};
use jiff::{SignedDuration, Timestamp};
use kiln_protocol::{Firmware, KeyStorage, MachineFacts, ProtectionClass, RollbackMemory};
use kiln_release::certificate::{certificate_spki, spki_key_id};
use kiln_release::network::NetworkConfig;
use kiln_release::tuf::{RoleKeys, Root, RootRoles, Snapshot, TargetFile, TargetPath, Targets, TimestampRole};
use kiln_release::{
    AgentApi, Artifact, BootInfo, FilePolicy, HealthCheck, HealthKind, MANIFEST_TYPE, Manifest, Mode, PublicKey,
    SITE_TYPE, Signer, Site, SiteSettings, VerityParams, hex, sign_envelope, verity,
};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

pub const IMAGE: &str = "minimal";
const COMMAND_LINE: &str = "console=ttyS0 quiet";
/// Data blocks of every root: 2 MiB.
const BLOCKS: u64 = 512;

/// What a boot server serves, and the keys behind it.
pub struct TestSite {
    /// By path under the base URL.
    pub files: BTreeMap<String, Vec<u8>>,
    pub manifests: BTreeMap<u64, Manifest>,
    pub director: Signer,
    pub machine_key: [u8; 32],
    /// CA certificate, server certificate, server key, all PEM.
    pub tls: [String; 3],
    /// Another server's certificate and key, of the same CA.
    pub other_tls: [String; 2],
    /// What `site.json` names of the agent API's keys.
    agent_api_keys: Vec<String>,
    /// What a machine's service begins with of the same.
    pub known_keys: Vec<String>,
    trust_root: String,
    /// The release of class rescue; 0: none.
    rescue: u64,
    network: Option<NetworkConfig>,
}

/// Whole seconds, as TUF writes them.
pub fn now() -> Timestamp {
    Timestamp::from_second(Timestamp::now().as_second()).unwrap()
}

/// The operator, whose key no boot server holds.
pub fn operator() -> Signer {
    Signer::from_seed(&[8; 32])
}

/// The root hash of a release: its number, over and over.
pub fn root_hash(release: u64) -> String {
    format!("{release:02x}").repeat(32)
}

/// A port of this machine: in a namespace of the test's own at every address, else on loopback.
pub fn listen() -> (std::net::TcpListener, std::net::SocketAddr) {
    let own = std::env::var_os(namespace::INSIDE).is_some();
    let listener = std::net::TcpListener::bind(if own { "[::]:0" } else { "127.0.0.1:0" }).unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, (std::net::Ipv4Addr::LOCALHOST, port).into())
}

/// What is in memory of this program itself, which comes in from its file as it is needed, on one host more than on another; bytes.
pub fn from_files() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let kib = status.lines().find_map(|line| line.strip_prefix("RssFile:")?.trim().strip_suffix(" kB"));
    kib.unwrap().parse::<u64>().unwrap() << 10
}

/// Makes a program of this content. Another process writes it: what this one has open for writing is open in a child that another
/// test begins, too, until that executes its own program, and so long this one cannot be started (execve(2), ETXTBSY).
pub fn program(path: &Path, content: &[u8]) {
    let from = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(from.path(), content).unwrap();
    let done = Command::new("install").args(["-m", "755"]).args([from.path(), path]).status().unwrap();
    assert!(done.success(), "{}", path.display());
}

impl TestSite {
    /// With releases 1 to `releases` of [`IMAGE`].
    pub fn new(releases: u64) -> Self {
        Self::make(releases, 0, None, false)
    }

    /// The same, and one of them is of class rescue.
    pub fn with_rescue(releases: u64, rescue: u64) -> Self {
        Self::make(releases, rescue, None, false)
    }

    /// With one release, and `site.json` names the key of the agent API's server.
    pub fn that_names_its_server() -> Self {
        Self::make(1, 0, None, true)
    }

    /// With a network configuration, whose version is that of all metadata.
    pub fn with_network(releases: u64, network: NetworkConfig) -> Self {
        Self::make(releases, 0, Some(network), false)
    }

    fn make(releases: u64, rescue: u64, network: Option<NetworkConfig>, named: bool) -> Self {
        let version = network.as_ref().map_or(1, |network| network.version);
        let key = |n: u8| Signer::from_seed(&[n; 32]);
        let [ca, certificate, private, other, others_key] = certificates();
        let agent_api_keys = if named { vec![server_key_id(&certificate)] } else { Vec::new() };
        let mut site = Self {
            files: BTreeMap::new(),
            manifests: BTreeMap::new(),
            director: key(6),
            machine_key: [7; 32],
            tls: [ca, certificate, private],
            other_tls: [other, others_key],
            agent_api_keys,
            known_keys: Vec::new(),
            trust_root: String::new(),
            rescue,
            network,
        };
        let expires = now() + SignedDuration::from_hours(24);
        let keys: Vec<PublicKey> = (1..=4).map(|n| key(n).public()).collect();
        let role = |n: usize| RoleKeys::new(&keys[n..=n], 1);
        let roles = RootRoles { root: role(0), timestamp: role(1), snapshot: role(2), targets: role(3) };
        site.trust_root = sign_envelope(&Root::new(1, expires, &keys, roles), &[&key(1)]).unwrap();

        let mut image = Targets::new(version, expires);
        for release in 1..=releases {
            let manifest = site.release(release);
            let bytes = serde_json::to_vec(&manifest).unwrap();
            image.targets.extend([site.target(&TargetPath::manifest(IMAGE, release).unwrap(), bytes)]);
            site.manifests.insert(release, manifest);
        }
        let mut top = Targets::new(version, expires);
        let document = serde_json::to_vec(&site.document()).unwrap();
        top.targets.extend([site.target(&TargetPath::site(), document)]);
        let paths = vec![format!("{IMAGE}/*/manifest.json")];
        top.delegate(&format!("image-{IMAGE}"), &[key(5).public()], 1, paths, true);

        let mut snapshot = Snapshot::new(version, expires);
        for (role, document, signer) in [("targets", top, key(4)), ("image-minimal", image, key(5))] {
            let text = sign_envelope(&document, &[&signer]).unwrap();
            snapshot.list(role, version, text.as_bytes());
            site.files.insert(format!("metadata/{version}.{role}.json"), text.into_bytes());
        }
        let snapshot = sign_envelope(&snapshot, &[&key(3)]).unwrap();
        let timestamp = TimestampRole::new(version, expires, version, snapshot.as_bytes());
        let timestamp = sign_envelope(&timestamp, &[&key(2)]).unwrap();
        site.files.insert(format!("metadata/{version}.snapshot.json"), snapshot.into_bytes());
        site.files.insert("metadata/timestamp.json".into(), timestamp.into_bytes());
        site
    }

    fn target(&mut self, path: &TargetPath, bytes: Vec<u8>) -> (String, TargetFile) {
        let listed = TargetFile::of(&bytes);
        let (folder, name) =
            path.as_str().rsplit_once('/').map_or((String::new(), path.as_str()), |(f, n)| (format!("{f}/"), n));
        self.files.insert(format!("targets/{folder}{}.{name}", hex::sha256(&bytes)), bytes);
        (path.as_str().to_owned(), listed)
    }

    fn document(&self) -> Site {
        let director = self.director.public();
        Site {
            type_: SITE_TYPE.into(),
            spec_version: "1.0".into(),
            name: "test".into(),
            directors: [(director.id(), director.to_object())].into(),
            director_threshold: 1,
            operators: [(operator().public().id(), operator().public().to_object())].into(),
            operator_threshold: 1,
            agent_api: AgentApi { ca_pem: self.tls[0].clone(), keys: self.agent_api_keys.clone() },
            floors: BTreeMap::new(),
            network: self.network.clone(),
            dbx: None,
        }
    }

    fn class(&self, release: u64) -> &'static str {
        if release == self.rescue { "rescue" } else { "normal" }
    }

    fn artifact(&mut self, bytes: Vec<u8>) -> Artifact {
        let artifact = Artifact { sha256: hex::sha256(&bytes), length: bytes.len() as u64 };
        self.files.insert(format!("a/{}", artifact.sha256), bytes);
        artifact
    }

    fn release(&mut self, release: u64) -> Manifest {
        let byte = u8::try_from(release).unwrap();
        let (kernel, initramfs) = (vec![byte; 300_000], vec![byte ^ 0x55; 200_001]);
        let parts: [(&str, &[u8]); 3] =
            [(".cmdline", COMMAND_LINE.as_bytes()), (".linux", &kernel), (".initrd", &initramfs)];
        let uki = self.artifact(pe(&parts));
        let root = vec![byte; usize::try_from(BLOCKS * 4096 + verity::hash_area_length(BLOCKS)).unwrap()];
        let root = self.artifact(root);
        let named = |bytes: &[u8]| Artifact { sha256: hex::sha256(bytes), length: bytes.len() as u64 };
        Manifest {
            type_: MANIFEST_TYPE.into(),
            spec_version: "1.0".into(),
            image: IMAGE.into(),
            release,
            class: self.class(release).into(),
            architecture: crate::facts::architecture().to_string(),
            product: "generic".into(),
            built: now(),
            uki,
            kernel: named(&kernel),
            kexec_kernel: None,
            initramfs: named(&initramfs),
            extra: None,
            root,
            verity: VerityParams {
                root_hash: root_hash(release),
                salt: String::new(),
                data_blocks: BLOCKS,
                hash_offset: BLOCKS * 4096,
            },
            command_line: COMMAND_LINE.into(),
            policy: FilePolicy::default(),
            hooks: BTreeMap::new(),
            health: vec![HealthCheck::of(HealthKind::Systemd, 0)],
            writable: Vec::new(),
            sbom: None,
            secrets: vec![],
            certificate: None,
            measured: None,
            role_may_report: None,
        }
    }

    /// Where in the repository a release's UKI and root lie.
    pub fn paths(&self, release: u64) -> [String; 2] {
        let manifest = &self.manifests[&release];
        [&manifest.uki, &manifest.root].map(|artifact| format!("/a/{}", artifact.sha256))
    }

    /// A machine that booted `release`, keeping its key and memory in `state`.
    pub fn verifier(&self, release: u64, http: &[String], agent: &[String], state: &Path) -> Verifier {
        let boot = BootInfo {
            image: IMAGE.into(),
            release,
            class: self.class(release).into(),
            architecture: crate::facts::architecture().to_string(),
            root_hash: root_hash(release),
            command_line: COMMAND_LINE.into(),
            built: now(),
            site: SiteSettings {
                name: "test".into(),
                http_urls: http.to_vec(),
                agent_urls: agent.to_vec(),
                agent_api_ca_pem: self.tls[0].clone(),
                mode: Mode::Ram,
                disk: None,
                secure_boot: None,
                network: None,
            },
            trust_root: self.trust_root.clone(),
        };
        let place = Place::Directory(state.to_owned());
        let servers = Servers { http: http.to_vec(), agent: agent.to_vec() };
        let memory = place.memory().unwrap();
        Verifier::new(boot, place, Signer::from_seed(&self.machine_key), memory, servers, now())
    }
}

/// A journal of that machine that has nothing in it, as the service has one.
pub fn journal(verifier: &Verifier) -> Journal {
    let embedded = crate::init::embedded(&verifier.boot).unwrap();
    let machine = MachineFacts {
        id: "00000000-0000-0000-0000-000000000001".parse().unwrap(),
        macs: Vec::new(),
        product: "test".into(),
        serial: String::new(),
        firmware: Firmware::Uefi,
        arch: crate::facts::architecture(),
        key_storage: KeyStorage::File,
        rollback_memory: RollbackMemory::File,
        protection: ProtectionClass::Unprotected,
        memory_bytes: 1 << 30,
        tpm: None,
    };
    let state = JournalState::begin(boot_id().unwrap(), monotonic_ms());
    Journal {
        state,
        machine,
        running: Some(embedded.clone()),
        embedded,
        health: None,
        prefetch: None,
        fallback: None,
        condition: None,
    }
}

/// That machine in its initramfs, before it has found a server: at most so many tries of anything, and so often it tells of what takes
/// long.
pub fn flow(verifier: Verifier, tries: Option<u32>, tell_every: Duration) -> Flow {
    let journal = Journal { running: None, ..journal(&verifier) };
    Flow { verifier, journal, api: None, tries, tell_every }
}

/// A PE32+ file of headers and sections (Microsoft PE Format).
pub fn pe(sections: &[(&str, &[u8])]) -> Vec<u8> {
    let mut file = vec![0_u8; 512];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"MZ");
    put(0x3c, &[0x40]);
    put(0x40, b"PE\0\0");
    put(0x46, &[u8::try_from(sections.len()).unwrap()]);
    put(0x54, &[240]);
    let optional = 0x58;
    put(optional, &0x020b_u16.to_le_bytes());
    for (at, value) in [(32, 4096_u32), (36, 512), (56, 4096), (60, 512), (108, 16)] {
        put(optional + at, &value.to_le_bytes());
    }
    for (number, (name, content)) in sections.iter().enumerate() {
        let (entry, offset) = (optional + 240 + number * 40, file.len());
        file.extend_from_slice(content);
        file.resize(file.len().next_multiple_of(512), 0);
        let raw = file.len() - offset;
        file[entry..entry + name.len()].copy_from_slice(name.as_bytes());
        for (at, value) in [(8, content.len()), (12, 4096 * (number + 1)), (16, raw), (20, offset)] {
            file[entry + at..entry + at + 4].copy_from_slice(&u32::try_from(value).unwrap().to_le_bytes());
        }
    }
    file
}

/// SHA-256 of the SPKI of a certificate, PEM.
fn server_key_id(certificate: &str) -> String {
    let der = hex::pem_decode("CERTIFICATE", certificate).unwrap();
    spki_key_id(certificate_spki(&der).unwrap())
}

/// CA, and certificate and key of two servers.
fn certificates() -> [String; 5] {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, PKCS_ED25519};
    let params = |names: &[&str]| {
        let mut params = CertificateParams::new(names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>()).unwrap();
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(9999, 12, 31);
        params
    };
    let ca_key = KeyPair::generate_for(&PKCS_ED25519).unwrap();
    let mut ca = params(&[]);
    ca.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    let ca_pem = ca.self_signed(&ca_key).unwrap().pem();
    let issuer = Issuer::new(ca, ca_key);
    let server = || {
        let key = KeyPair::generate_for(&PKCS_ED25519).unwrap();
        let certificate = params(&[kiln_release::AGENT_API_NAME]).signed_by(&key, &issuer).unwrap();
        (certificate.pem(), key.serialize_pem())
    };
    let ((certificate, key), (other, others_key)) = (server(), server());
    [ca_pem, certificate, key, other, others_key]
}
