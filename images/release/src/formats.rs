//! Kiln's own documents: the manifest, `site.json`, and the `boot.json` inside each initramfs.
//!
//! Hashes are lower-case hex SHA-256. Strings that become paths or TUF role names are checked by the reader
//! (`Manifest::check`, `BootInfo::check`), which is called only after the signature was verified.

use crate::declared::{HealthCheck, Hook};
use crate::network::NetworkConfig;
use crate::secrets::{WantedCertificate, WantedSecret};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// `_type` of a manifest.
pub const MANIFEST_TYPE: &str = "kiln-manifest";
/// `_type` of `site.json`.
pub const SITE_TYPE: &str = "kiln-site";
/// The name in the agent API's certificate: what a machine demands, whatever address it reached.
pub const AGENT_API_NAME: &str = "kiln-agent-api";
/// Where [`BootInfo`] lies in the initramfs.
pub const BOOT_PATH: &str = "/kiln/boot.json";
/// Where the initramfs agent leaves word for the agent in the booted system.
pub const HANDOFF_PATH: &str = "/run/kiln/handoff.json";

/// One byte string, named.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Artifact {
    /// SHA-256 of its bytes.
    pub sha256: String,
    /// Its length in bytes.
    pub length: u64,
}

/// How to set up dm-verity over the root artifact. SHA-256, format 1, data and hash blocks of 4096 bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerityParams {
    /// Root hash.
    pub root_hash: String,
    /// Salt, hex.
    pub salt: String,
    /// Data blocks of 4096 bytes: the erofs part, padded.
    pub data_blocks: u64,
    /// Byte offset of the verity superblock; the tree follows one block later.
    pub hash_offset: u64,
}

/// One tmpfs over the read-only root; always noexec, nosuid, nodev.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WritableMount {
    /// Absolute path of an existing directory.
    pub path: String,
    /// Size in bytes.
    pub size: u64,
}

/// What the release declares and a role may parameterise.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilePolicy {
    /// A command line that differs from the embedded one is refused (else it is only reported as drift).
    pub refuse_foreign_command_line: bool,
}

/// Names every byte that a release boots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`MANIFEST_TYPE`].
    #[serde(rename = "_type")]
    pub type_: String,
    /// `1.0`.
    pub spec_version: String,
    /// Image name.
    pub image: String,
    /// Release number, from 1.
    pub release: u64,
    /// `normal`, `rescue`, `acceptance` or `wipe`.
    pub class: String,
    /// `x86_64`, …
    pub architecture: String,
    /// Which hardware it is for; `generic` for all of the architecture.
    pub product: String,
    /// Seconds since the epoch that the build used for every time stamp (`SOURCE_DATE_EPOCH`).
    pub built: Timestamp,
    /// The UKI.
    pub uki: Artifact,
    /// Its `.linux`.
    pub kernel: Artifact,
    /// The copy of it that a kexec loads ([`crate::kexec`]); it is stored nowhere. None: the kernel itself is loaded, because nothing
    /// is signed for Secure Boot, or because it was built when the kernel in a UKI was signed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kexec_kernel: Option<Artifact>,
    /// Its `.initrd`.
    pub initramfs: Artifact,
    /// A further cpio, fetched and verified by the agent; none if the initramfs has all it needs.
    pub extra: Option<Artifact>,
    /// The root artifact: erofs, then verity superblock and tree.
    pub root: Artifact,
    /// dm-verity over it.
    pub verity: VerityParams,
    /// Its `.cmdline`, exactly.
    pub command_line: String,
    /// Policy.
    pub policy: FilePolicy,
    /// Hooks by event ([`crate::declared::HOOK_EVENTS`]), in the order they run; declared by the release, never by role
    /// data.
    pub hooks: BTreeMap<String, Vec<Hook>>,
    /// Health checks; all must hold.
    pub health: Vec<HealthCheck>,
    /// Writable places.
    pub writable: Vec<WritableMount>,
    /// Secrets that it wants; their values are the site's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<WantedSecret>,
    /// A certificate for the machine that runs it; none: it wants none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<WantedCertificate>,
    /// List of packages in the root.
    pub sbom: Option<Artifact>,
    /// What a TPM measures of it; none: built before Kiln predicted it, so that no machine is attested with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured: Option<Measured>,
    /// Whether a role may say that programs on no allow-list start and are told, of one place at least; none: built before
    /// manifests said so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role_may_report: Option<bool>,
}

/// What a machine's TPM measures when it boots a release. Hashes are SHA-256, lower-case hex.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Measured {
    /// PCR 11 in the initramfs.
    pub pcr11: String,
    /// Authenticode digest of the UKI, which firmware measures into PCR 4.
    pub uki: String,
    /// The same of the kernel inside: the stub lets firmware load it.
    pub kernel: String,
    /// The same of the boot loader that it puts on a disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loader: Option<String>,
    /// The site's Secure Boot certificate (DER); none: not signed for Secure Boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<String>,
    /// What a kexec of it loads as its initramfs. Its agent has kexecs measured, or says in PCR 10 that they are not; none: built
    /// before agents did so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kexec: Option<Crossing>,
}

/// SHA-256 of what a kexec of a release loads as its initramfs: its own, and the segment behind it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Crossing {
    /// With the root artifact, for memory; none: it has 4 GiB or more, and does not cross.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub with_root: Option<String>,
    /// For a release that lies in a slot.
    pub without_root: String,
}

/// The agent API as the site signs it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentApi {
    /// The CA that signs the agent API's server certificate, PEM.
    pub ca_pem: String,
    /// Its servers' keys that count, each as SHA-256 of its SPKI; none named: every one that the CA has signed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<String>,
}

/// `site.json`, a target of top-level targets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Site {
    /// [`SITE_TYPE`].
    #[serde(rename = "_type")]
    pub type_: String,
    /// `1.0`.
    pub spec_version: String,
    /// The site's name.
    pub name: String,
    /// Director keys by TUF key id, as TUF key objects.
    pub directors: BTreeMap<String, serde_json::Value>,
    /// How many distinct director keys must sign an assignment.
    pub director_threshold: u32,
    /// Operator keys by TUF key id, as TUF key objects; kept off the boot server. Without any, no machine takes an order.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub operators: BTreeMap<String, serde_json::Value>,
    /// How many distinct operator keys must sign an order.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub operator_threshold: u32,
    /// The agent API.
    pub agent_api: AgentApi,
    /// Lowest release that may run, by image. An image not named has floor 1.
    pub floors: BTreeMap<String, u64>,
    /// How machines are connected; none: as their boot images say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkConfig>,
    /// Boot programs that firmware shall never start again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dbx: Option<DbxUpdate>,
}

/// A change of the firmware's variable dbx (UEFI 2.10 §32.4.1): an append that the site's KEK has signed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DbxUpdate {
    /// The signed change, an artifact: `EFI_VARIABLE_AUTHENTICATION_2` and signature lists.
    pub update: Artifact,
    /// What it names.
    pub revoked: Vec<RevokedProgram>,
}

/// A boot program that is revoked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RevokedProgram {
    /// Authenticode digest of the UKI, SHA-256.
    pub digest: String,
    /// Whose it is, as `minimal/1`.
    pub release: String,
}

impl DbxUpdate {
    /// Longest change: firmware's own room for dbx is less.
    pub const LIMIT: u64 = 64 << 10;
    /// Most programs.
    pub const PROGRAMS: usize = 1000;
}

fn one() -> u32 {
    1
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde's signature
fn is_one(threshold: &u32) -> bool {
    *threshold == 1
}

/// Where the root goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Into memory.
    #[default]
    Ram,
    /// Into one of a disk's two slots, and the boot loader on it.
    Disk,
}

/// What becomes of a disk that holds something that is not Kiln's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WipePolicy {
    /// It is not touched.
    #[default]
    Never,
    /// It is partitioned anew, where no disk is blank or Kiln's already. What it held is lost.
    Foreign,
}

/// How a machine in disk mode uses its disk. Sizes are in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSettings {
    /// EFI system partition: the loader and two UKIs.
    pub esp: u64,
    /// Each of the two slots: one root artifact.
    pub slot: u64,
    /// State partition: what the agent keeps of each slot's signed metadata.
    pub state: u64,
    /// Whether a disk with somebody else's data may be taken.
    #[serde(default)]
    pub wipe: WipePolicy,
    /// Most bytes per second of a prefetch into the idle slot; none: as fast as it comes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefetch_rate: Option<u64>,
    /// What the image keeps over reimages; none: nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<DataSettings>,
}

/// A partition of the image's own, encrypted under a key that the machine's TPM holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataSettings {
    /// Bytes.
    pub size: u64,
    /// The directory of the root that it is mounted at.
    pub path: String,
}

impl DataSettings {
    /// Smallest: what ext4 and the partition's head take, and some room.
    pub const LEAST: u64 = 16 << 20;
}

impl DiskSettings {
    /// Smallest EFI system partition: FAT32 begins at 33 MiB.
    pub const LEAST_ESP: u64 = 64 << 20;
    /// Smallest slot.
    pub const LEAST_SLOT: u64 = 16 << 20;
    /// Smallest state partition: FAT32 begins at 33 MiB.
    pub const LEAST_STATE: u64 = 36 << 20;
    /// Slowest prefetch, bytes per second: below eight times the slowest that a server may be.
    pub const LEAST_RATE: u64 = 64 << 10;
}

impl Default for DiskSettings {
    /// For UKIs of up to 120 MiB and roots of up to 4 GiB.
    fn default() -> Self {
        Self {
            esp: 256 << 20,
            slot: 4 << 30,
            state: 64 << 20,
            wipe: WipePolicy::Never,
            prefetch_rate: None,
            data: None,
        }
    }
}

/// Site settings inside the initramfs. They say where to look; trust is in [`BootInfo::trust_root`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SiteSettings {
    /// The site's name.
    pub name: String,
    /// Base URLs of artifacts (`http://10.0.0.1:8080`), tried in order; empty: ask DHCP, then DNS.
    pub http_urls: Vec<String>,
    /// Base URLs of the agent API (`https://10.0.0.1:8443`), tried in order; empty: ask DHCP, then DNS.
    pub agent_urls: Vec<String>,
    /// CA of the agent API, PEM.
    pub agent_api_ca_pem: String,
    /// Where the root goes.
    #[serde(default)]
    pub mode: Mode,
    /// How the disk is used, in disk mode; none there: the default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<DiskSettings>,
    /// SHA-256 of the certificate (DER) that signs the site's boot programs, as it lies in a machine's db; none: this
    /// release is not signed for Secure Boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secure_boot: Option<String>,
    /// How machines are connected, until the site signs a newer configuration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkConfig>,
}

/// Where the initramfs has the signature of its root hash: PKCS #7, DER, detached, over the hash in hex.
pub const ROOT_SIGNATURE_PATH: &str = "/kiln/root.p7s";
/// Where it has the IPE policy: PKCS #7, DER, enclosing the text.
pub const IPE_POLICY_PATH: &str = "/kiln/ipe.p7b";

/// What this UKI is: [`BOOT_PATH`] in its initramfs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootInfo {
    /// Image name.
    pub image: String,
    /// Release number.
    pub release: u64,
    /// Signed class.
    pub class: String,
    /// Architecture.
    pub architecture: String,
    /// The only dm-verity root hash this UKI boots.
    pub root_hash: String,
    /// The command line this UKI embeds.
    pub command_line: String,
    /// When it was built: the first time floor.
    pub built: Timestamp,
    /// Where to look.
    pub site: SiteSettings,
    /// Text of the trusted TUF `root.json`, byte for byte.
    pub trust_root: String,
}
