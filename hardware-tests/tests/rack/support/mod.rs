//! The real agent as a process against the real boot server, in a network of their own, with a site to damage.

pub mod door;
pub mod esp;
pub mod files;
pub mod foreign_root;
pub mod hostile;
pub mod loss;
pub mod on_disk;
pub mod relay;

use kiln_lab::api::{self, MachineView};
use kiln_lab::error::LabError;
use kiln_lab::machine::{Firmware, MachineSpec};
use kiln_lab::paths::Paths;
use kiln_lab::server::{self, DhcpMode, Server};
use kiln_lab::{command, site};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where agents look: settings say where, never whom to trust.
pub const HTTP: &str = "http://127.0.0.1:8080";
/// The real boot server's agent API.
pub const AGENT_API: &str = "https://127.0.0.1:8443";

const BOOT_ID: &str = "/sys/boot_id";

/// A site, its boot server, and machines that are only an agent process.
pub struct Bench {
    pub paths: Paths,
    pub site: PathBuf,
    config: PathBuf,
    server: Option<Server>,
}

impl Bench {
    /// A copy of the prepared site with its boot server running.
    pub fn start(paths: &Paths) -> Self {
        let mut bench = Self::without_server(paths);
        bench.start_server();
        bench
    }

    /// Only the copy.
    pub fn without_server(paths: &Paths) -> Self {
        let site = paths.scratch.join("site");
        site::copy(paths, &site).unwrap();
        let config = paths.scratch.join("kiln.toml");
        let known: Vec<MachineSpec> = (1..=2).map(|n| MachineSpec::new(n, Firmware::Bios)).collect();
        let known: Vec<&MachineSpec> = known.iter().collect();
        std::fs::write(&config, server::config(DhcpMode::Off, site::IMAGE, &known, "", "")).unwrap();
        hide_hardware();
        Self { paths: paths.clone(), site, config, server: None }
    }

    pub fn start_server(&mut self) {
        self.try_start_server().unwrap();
    }

    pub fn try_start_server(&mut self) -> Result<(), LabError> {
        let log = self.paths.scratch.join("kiln-serve.log");
        self.server = Some(Server::start(&self.paths.kiln, &self.site, &self.config, &log, true)?);
        Ok(())
    }

    pub fn stop_server(&mut self) {
        if let Some(server) = self.server.take() {
            assert!(server.stop().unwrap(), "kiln serve did not end well");
        }
    }

    /// Machine `number`, off, booting `release` of the image.
    pub fn machine(&self, number: u8, release: u64) -> AgentMachine {
        let spec = MachineSpec::new(number, Firmware::Bios);
        let dir = self.paths.scratch.join(format!("agent-{number}-{release}"));
        std::fs::create_dir_all(&dir).unwrap();
        let boot = boot_info(&self.site, release);
        AgentMachine {
            spec,
            agent: self.paths.agent.clone(),
            state: self.paths.scratch.join(format!("state-{number}")),
            dir,
            boot,
        }
    }

    /// What the boot server knows of a machine.
    pub fn view(&self, machine: &AgentMachine) -> MachineView {
        let path = format!("/api/v1/machines/{}", machine.spec.uuid());
        let value = api::get(&self.site.join("state/kiln.sock"), &path).unwrap();
        serde_json::from_value(value).unwrap()
    }

    pub fn kiln(&self, args: &[&str]) -> String {
        let site = self.site.display().to_string();
        let args: Vec<&str> = args.iter().copied().chain(["--site", &site]).collect();
        site::kiln_quiet(&self.paths, &args).unwrap()
    }

    pub fn publish_second(&self) {
        self.kiln(&["release", "publish", "minimal/2"]);
    }

    /// A copy of the repository as it is now, and a server of its files. The boot server looks at its own every two seconds, and
    /// puts right what it signs itself.
    pub fn copy_repository(&self) -> (PathBuf, files::Files) {
        let copy = self.paths.scratch.join("copy");
        site::copy_tree(&self.site.join("repo"), &copy).unwrap();
        (copy.clone(), files::Files::serve(copy))
    }

    /// Newest metadata file of a TUF role.
    pub fn metadata(&self, role: &str) -> PathBuf {
        newest_metadata(&self.site, role)
    }

    /// The published manifest of a release.
    pub fn manifest(&self, release: u64) -> PathBuf {
        published(&self.site.join(format!("repo/targets/minimal/{release}")), ".manifest.json")
    }

    /// The root artifact of a built release, as HTTP serves it.
    pub fn root_artifact(&self, release: u64) -> PathBuf {
        let manifest = site::manifest(&self.site, release).unwrap();
        self.site.join("repo/a").join(manifest["root"]["sha256"].as_str().unwrap())
    }
}

/// The one file in a folder of targets whose name ends so.
pub fn published(dir: &Path, end: &str) -> PathBuf {
    let mut files = dir.read_dir().unwrap().flatten().map(|e| e.path());
    let found = files.find(|p| p.to_string_lossy().ends_with(end));
    found.unwrap_or_else(|| panic!("no target in {} ends with {end}", dir.display()))
}

/// N.ROLE.json with the highest N, or timestamp.json.
pub fn newest_metadata(site: &Path, role: &str) -> PathBuf {
    newest_in(&site.join("repo/metadata"), role)
}

/// The same in any folder of metadata.
pub fn newest_in(dir: &Path, role: &str) -> PathBuf {
    if role == "timestamp" {
        return dir.join("timestamp.json");
    }
    let end = format!(".{role}.json");
    let version = |p: &PathBuf| -> Option<u64> { p.file_name()?.to_str()?.strip_suffix(&end)?.parse().ok() };
    dir.read_dir()
        .unwrap()
        .flatten()
        .map(|e| e.path())
        .filter(|p| version(p).is_some())
        .max_by_key(version)
        .unwrap_or_else(|| panic!("no metadata of {role}"))
}

/// A machine that is only an agent process with its state.
pub struct AgentMachine {
    pub spec: MachineSpec,
    agent: PathBuf,
    /// Key and versions seen: what outlives a cold boot.
    pub state: PathBuf,
    dir: PathBuf,
    /// Its boot.json.
    pub boot: Value,
}

/// How one run of the agent ended.
#[derive(Debug)]
pub struct Ended {
    /// Exit status: 0 accepted, 10 unreachable, 20 verification, 30 machine.
    pub code: Option<i32>,
    /// The failure's stable word.
    pub kind: String,
    pub said: String,
    /// The root artifact it accepted.
    pub accepted: Option<PathBuf>,
}

impl AgentMachine {
    /// Sends it to another agent API than the real boot server's.
    pub fn look_at(&mut self, agent_url: &str) {
        self.boot["site"]["agent_urls"] = serde_json::json!([agent_url]);
    }

    /// Sends it to another artifact server than the real boot server's.
    pub fn fetch_from(&mut self, http_url: &str) {
        self.boot["site"]["http_urls"] = serde_json::json!([http_url]);
    }

    /// One boot, as far as `kiln-agent stage` goes.
    pub fn stage(&self) -> Ended {
        set_uuid(&self.spec.uuid());
        set_boot_id();
        let settings = self.dir.join("boot.json");
        let out = self.dir.join("out");
        let _ = std::fs::remove_dir_all(&out);
        std::fs::write(&settings, serde_json::to_vec(&self.boot).unwrap()).unwrap();
        let mut command = Command::new(&self.agent);
        command.arg("stage").arg("--settings").arg(&settings).arg("--state").arg(&self.state).arg("--out").arg(&out);
        command.args(["--tries", "1"]).stdin(Stdio::null());
        let done = command.output().unwrap_or_else(|e| panic!("{}: {e}", command::shown(&command)));
        let said = format!("{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
        let kind = said.trim_end().rsplit_once('(').and_then(|(_, k)| k.strip_suffix(')')).unwrap_or_default();
        let root = out.join("root");
        Ended { code: done.status.code(), kind: kind.to_owned(), accepted: root.exists().then_some(root), said }
    }

    /// The run must be refused by a check, with this kind, and accept nothing.
    #[track_caller]
    pub fn refuses(&self, kind: &str) -> Ended {
        let ended = self.stage();
        assert_eq!(ended.code, Some(20), "expected {kind}: {ended:#?}");
        assert_eq!(ended.kind, kind, "{ended:#?}");
        assert_eq!(ended.accepted, None, "{ended:#?}");
        ended
    }

    /// The run must be accepted, with the root of the release it embeds.
    #[track_caller]
    pub fn accepts(&self) -> Ended {
        let ended = self.stage();
        assert_eq!(ended.code, Some(0), "{ended:#?}");
        ended
    }
}

/// boot.json out of a built initramfs, its settings pointing at the bench.
fn boot_info(site: &Path, release: u64) -> Value {
    let initramfs = site.join(format!("build/minimal/{release}/initramfs"));
    let magic = std::fs::read(&initramfs).unwrap()[..4].to_vec();
    let unpack = match magic[..] {
        [0x28, 0xb5, 0x2f, 0xfd] => "zstd -dcq",
        [0xfd, b'7', b'z', b'X'] => "xz -dc",
        _ => "cat",
    };
    let script = format!(
        "{unpack} < {} | cpio --quiet -i --to-stdout kiln/boot.json /kiln/boot.json ./kiln/boot.json",
        initramfs.display()
    );
    let out = Command::new("sh").args(["-c", &script]).output().unwrap();
    let mut boot: Value = serde_json::from_slice(&out.stdout)
        .unwrap_or_else(|e| panic!("boot.json of release {release}: {e}: {}", String::from_utf8_lossy(&out.stderr)));
    boot["site"]["http_urls"] = serde_json::json!([HTTP]);
    boot["site"]["agent_urls"] = serde_json::json!([AGENT_API]);
    boot
}

/// Puts an empty tmpfs over /sys: the agent must see the machine a test gives it, not the host.
fn hide_hardware() {
    command::run("mount", ["-t", "tmpfs", "hardware", "/sys"]).unwrap();
    std::fs::create_dir_all("/sys/class/dmi/id").unwrap();
    std::fs::create_dir_all("/sys/class/net").unwrap();
}

/// Every run of the agent is a boot of its own; the kernel's boot id is the host's.
fn set_boot_id() {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/uuid").unwrap();
    std::fs::write(BOOT_ID, id).unwrap();
    command::run("mount", ["--bind", BOOT_ID, "/proc/sys/kernel/random/boot_id"]).unwrap();
}

fn set_uuid(uuid: &str) {
    std::fs::write("/sys/class/dmi/id/product_uuid", format!("{uuid}\n")).unwrap();
}
