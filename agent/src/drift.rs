//! Looks whether the running system is what its release says: reads the kernel's tables, has
//! [`kiln_protocol::drift`] compare them with the manifest and with [`EXPECTED_PATH`] in the verified root. Only reads
//! files of /proc, /sys and memory; starts no program; everything it reads has an end.

use crate::coldplug::Process;
use crate::error::Result;
use crate::init::running_command_line;
use crate::plan;
use kiln_protocol::{Difference, DriftKind, Usage, drift};
use kiln_release::declared::{EXPECTED_PATH, users_of};
use kiln_release::{EXEC_PATH, ExecPolicy, Expected, Manifest};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{DirEntry, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{sleep, timeout};

/// Between two looks.
pub const EVERY: Duration = Duration::from_secs(20);
/// A look that takes longer is not waited for; what it sees counts when it comes.
const DEADLINE: Duration = Duration::from_secs(10);
/// Longest table that is read.
const TABLE: u64 = 1 << 20;
/// Most files in writable places, processes, or descriptors that one look goes through.
const FILES: usize = 20_000;
/// A clock that differs by more is drift: the answer's way and its holding are far below.
const CLOCK_MS: i64 = 10_000;
/// Units made at run time lie here.
const RUNTIME_UNITS: [&str; 3] = ["/run/systemd/system", "/run/systemd/transient", "/run/systemd/system.control"];
const SERVICES: &str = "/sys/fs/cgroup/system.slice";
/// What a block that dm-verity refused is told of.
const BLOCKS: &str = "the root's blocks";
const CORRUPTED: &str =
    "the kernel met a block of the root that is not as signed: it was altered, or its disk or memory fails";
/// Memory that no release declares and every system has.
const ALWAYS_WRITABLE: [&str; 2] = ["/run", "/dev/shm"];

/// What one look saw.
#[derive(Debug, Default)]
pub struct Seen {
    pub differences: Vec<Difference>,
    /// Of limited units: whether it needs a person, and a sentence.
    pub limits: Vec<(bool, String)>,
}

/// What the kernel says of the root.
#[derive(Clone, Copy)]
pub struct Root {
    /// The root hash in its table.
    pub hash: fn() -> Result<String>,
    /// Whether it met a block that is not as signed.
    pub is_corrupted: fn() -> Result<bool>,
}

/// What is looked for.
pub struct Looker {
    expected: std::result::Result<Expected, String>,
    /// Writable places whose programs the guard judges and tells of ([`crate::exec`]).
    guarded: Vec<String>,
    manifest: Manifest,
    root: Root,
    /// In front of every path: empty but in tests.
    place: PathBuf,
    usage: BTreeMap<String, Usage>,
    /// Who holds a socket, by its inode: looked for once.
    owners: BTreeMap<u64, Option<String>>,
    /// The agent's own processes of the initramfs, which no file system of the release has.
    own: Vec<Process>,
}

impl Looker {
    pub fn new(manifest: Manifest, root: Root, place: impl Into<PathBuf>) -> Self {
        let place = place.into();
        let expected = text(&at(&place, EXPECTED_PATH)).map_err(|e| format!("{EXPECTED_PATH}: {e}"));
        let expected =
            expected.and_then(|text| serde_json::from_str(&text).map_err(|e| format!("{EXPECTED_PATH}: {e}")));
        let policy = std::fs::read(at(&place, EXEC_PATH)).ok().and_then(|bytes| ExecPolicy::read(&bytes).ok());
        let guarded = policy.map(|policy| policy.rules.into_iter().map(|rule| rule.path).collect()).unwrap_or_default();
        Self {
            expected,
            guarded,
            manifest,
            root,
            place,
            usage: BTreeMap::new(),
            owners: BTreeMap::new(),
            own: Vec::new(),
        }
    }

    /// These are the agent's own.
    pub fn knowing(self, own: Vec<Process>) -> Self {
        Self { own, ..self }
    }

    /// One look; blocks. Sorted by kind and subject.
    pub fn look(&mut self) -> Seen {
        let mut out = Vec::new();
        let hash = (self.root.hash)().unwrap_or_else(|error| error.to_string());
        out.extend(drift::value(DriftKind::Root, "the kernel's root hash", &self.manifest.verity.root_hash, &hash));
        match (self.root.is_corrupted)() {
            Ok(false) => {}
            Ok(true) => out.push(drift::foreign(DriftKind::Root, BLOCKS, CORRUPTED)),
            Err(error) => out.push(drift::foreign(DriftKind::Unseen, BLOCKS, &error.to_string())),
        }
        let line = running_command_line();
        if !plan::command_line_is(&line, &self.manifest.command_line) {
            let what = "the kernel's command line";
            out.extend(drift::value(DriftKind::CommandLine, what, &self.manifest.command_line, &line));
        }
        let mut limits = Vec::new();
        match self.expected.clone() {
            Err(error) => out.push(drift::foreign(DriftKind::Unseen, EXPECTED_PATH, &error)),
            Ok(expected) => {
                self.compare(&expected, &mut out);
                limits = self.limits(&expected);
            }
        }
        out.sort();
        out.dedup_by(|a, b| a.kind == b.kind && a.what == b.what);
        Seen { differences: out, limits }
    }

    fn path(&self, path: &str) -> PathBuf {
        at(&self.place, path)
    }

    fn compare(&mut self, expected: &Expected, out: &mut Vec<Difference>) {
        let mut read = |path: &str| {
            text(&self.path(path)).unwrap_or_else(|error| {
                // A kernel without IPv6 has no table of it.
                if !path.ends_with('6') {
                    out.push(drift::foreign(DriftKind::Unseen, path, &format!("{path} cannot be read: {error}")));
                }
                String::new()
            })
        };
        let kernel = read("/proc/sys/kernel/osrelease");
        let modules = read("/proc/modules");
        let mounts = read("/proc/self/mountinfo");
        let users = users_of(&read("/etc/passwd"));
        let tables = ["tcp", "tcp6", "udp", "udp6"].map(|table| (table, read(&format!("/proc/net/{table}"))));
        out.extend(drift::value(DriftKind::Kernel, "the kernel", &expected.kernel, kernel.trim()));
        out.extend(drift::modules(&modules, &expected.modules));
        let writable: Vec<&str> = self.manifest.writable.iter().map(|mount| mount.path.as_str()).collect();
        out.extend(drift::mounts(&mounts, &writable, &self.guarded, &expected.mounts));
        out.extend(drift::users(&users, &expected.users));
        let mut declared = expected.listeners.clone();
        // The agent's own: it keeps the machine's lease.
        declared.push("udp/68".into());
        let found: Vec<_> =
            tables.iter().flat_map(|(table, text)| drift::listeners(text, &table[..3], &declared)).collect();
        self.owners.retain(|inode, _| found.iter().any(|listener| listener.inode == *inode));
        if found.iter().any(|listener| !self.owners.contains_key(&listener.inode)) {
            let owners = self.socket_owners();
            for listener in &found {
                self.owners.insert(listener.inode, owners.get(&listener.inode).cloned());
            }
        }
        for listener in &found {
            let owner = self.owners.get(&listener.inode).and_then(Option::as_deref);
            out.push(drift::listener(listener, owner));
        }
        self.units(expected, out);
        self.writable_programs(&writable, out);
        self.foreign_programs(expected, out);
    }

    fn units(&self, expected: &Expected, out: &mut Vec<Difference>) {
        let running: Vec<String> = self.groups().into_keys().filter(|name| kind_of(name) == "service").collect();
        out.extend(drift::services(&running, &expected.services));
        for folder in RUNTIME_UNITS {
            for entry in entries(&self.path(folder)).take(200) {
                let name = entry.file_name().to_string_lossy().into_owned();
                let text = format!("{name} lies in {folder}; the release has no unit there");
                out.push(drift::foreign(DriftKind::Unit, &name, &text));
            }
        }
    }

    /// Control groups of services and slices, by name.
    fn groups(&self) -> BTreeMap<String, PathBuf> {
        let mut found = BTreeMap::new();
        let mut folders = vec![(self.path(SERVICES), 0)];
        while let Some((folder, depth)) = folders.pop() {
            for entry in entries(&folder) {
                let name = entry.file_name().to_string_lossy().into_owned();
                if kind_of(&name) == "slice" && depth < 3 {
                    folders.push((entry.path(), depth + 1));
                }
                if matches!(kind_of(&name), "slice" | "service") && found.len() < FILES {
                    found.insert(name, entry.path());
                }
            }
        }
        found
    }

    /// Regular files that may be executed, where files may be written.
    fn writable_programs(&self, writable: &[&str], out: &mut Vec<Difference>) {
        let mut left = FILES;
        let unguarded = writable.iter().copied().filter(|top| !self.guarded.iter().any(|place| place == top));
        for top in unguarded.chain(ALWAYS_WRITABLE) {
            let Ok(device) = self.path(top).metadata().map(|m| m.dev()) else { continue };
            let mut folders = vec![self.path(top)];
            while let Some(folder) = folders.pop() {
                for entry in entries(&folder) {
                    if left == 0 {
                        let text = format!("more than {FILES} files lie in writable places: not all are looked at");
                        out.push(drift::foreign(DriftKind::Unseen, top, &text));
                        return;
                    }
                    left -= 1;
                    let Ok(kind) = entry.file_type() else { continue };
                    if !kind.is_dir() && !kind.is_file() {
                        continue;
                    }
                    let Ok(meta) = entry.metadata() else { continue };
                    if kind.is_dir() && meta.dev() == device {
                        folders.push(entry.path());
                    } else if kind.is_file() && meta.mode() & 0o111 != 0 {
                        let path = self.shown(&entry.path());
                        let text = format!("{path} may be executed and was not in the release");
                        out.push(drift::foreign(DriftKind::Executable, &path, &text));
                    }
                }
            }
        }
    }

    fn shown(&self, path: &Path) -> String {
        let path = path.to_string_lossy();
        path.strip_prefix(&*self.place.to_string_lossy()).unwrap_or(&path).to_owned()
    }

    /// Processes whose program is in no file system of the release.
    fn foreign_programs(&self, expected: &Expected, out: &mut Vec<Difference>) {
        let places = std::iter::once("/").chain(expected.mounts.iter().chain(&self.guarded).map(String::as_str));
        let devices: BTreeSet<u64> =
            places.filter_map(|path| self.path(path).metadata().ok()).map(|m| m.dev()).collect();
        for (process, folder) in self.processes() {
            // Kernel threads have none; a process may have ended meanwhile.
            let Ok(meta) = std::fs::metadata(folder.join("exe")) else { continue };
            if !devices.contains(&meta.dev()) && !self.is_own(process) {
                let program = std::fs::read_link(folder.join("exe")).unwrap_or_default();
                let text = format!("process {process} runs {}, which is not of the release", program.display());
                out.push(drift::foreign(DriftKind::Executable, &program.to_string_lossy(), &text));
            }
        }
    }

    /// One that waits for a device that hangs, and cannot be ended. Another with its number started later.
    fn is_own(&self, pid: u32) -> bool {
        self.own.iter().any(|own| own.pid == pid)
            && Process::of(&self.path("/proc"), pid).is_some_and(|process| self.own.contains(&process))
    }

    fn processes(&self) -> impl Iterator<Item = (u32, PathBuf)> + use<> {
        let number = |entry: DirEntry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path()));
        entries(&self.path("/proc")).filter_map(number).take(FILES)
    }

    /// Who holds which socket: `nc (pid 812)`, by the socket's inode.
    fn socket_owners(&self) -> BTreeMap<u64, String> {
        let mut owners = BTreeMap::new();
        let mut left = FILES;
        for (process, folder) in self.processes() {
            for descriptor in entries(&folder.join("fd")) {
                if left == 0 {
                    return owners;
                }
                left -= 1;
                let Ok(link) = std::fs::read_link(descriptor.path()) else { continue };
                let link = link.to_string_lossy();
                let inode = link.strip_prefix("socket:[").and_then(|rest| rest.strip_suffix(']'));
                if let Some(inode) = inode.and_then(|inode| inode.parse().ok()) {
                    let name = text(&folder.join("comm")).unwrap_or_default();
                    owners.entry(inode).or_insert_with(|| format!("{} (pid {process})", name.trim()));
                }
            }
        }
        owners
    }

    fn limits(&mut self, expected: &Expected) -> Vec<(bool, String)> {
        if expected.limits.is_empty() {
            return Vec::new();
        }
        let groups = self.groups();
        let file = |folder: &Path, name: &str| text(&folder.join(name)).unwrap_or_default();
        let mut told = Vec::new();
        let mut killed = false;
        for limit in &expected.limits {
            let Some(folder) = groups.get(&limit.unit) else { continue };
            let usage = self.usage.remove(&limit.unit).unwrap_or_default();
            let before = usage.killed();
            let (usage, more) = usage.look(&limit.unit, &file(folder, "memory.events"), &file(folder, "cpu.stat"));
            told.extend(more);
            killed |= usage.killed() > before;
            self.usage.insert(limit.unit.clone(), usage);
        }
        // A unit that was killed whole has a new group; the slice above it remembers.
        let above = self.path(SERVICES);
        let usage = self.usage.remove("").unwrap_or_default();
        let (usage, more) = usage.look("a service with a limit", &file(&above, "memory.events"), "");
        self.usage.insert(String::new(), usage);
        if !killed {
            told.extend(more);
        }
        told
    }
}

/// How far this machine's clock is from the boot server's, if it is too far.
pub fn clock(offset_ms: Option<i64>) -> Option<Difference> {
    let offset = offset_ms.filter(|offset| offset.abs() > CLOCK_MS)?;
    let side = if offset > 0 { "ahead of" } else { "behind" };
    let text = format!("the clock is {} s {side} the boot server's", offset.abs() / 1000);
    Some(drift::foreign(DriftKind::Clock, "clock", &text))
}

/// Who looks: at hand, or still at an earlier look.
pub enum Eye {
    Free(Box<Looker>),
    Busy(JoinHandle<(Box<Looker>, Seen)>),
    /// It ended in a panic: nothing is seen any more, and that is said.
    Blind,
}

/// A pause and a look.
pub async fn look(eye: Eye, pause: Duration) -> (Eye, Seen) {
    sleep(pause).await;
    let mut task = match eye {
        Eye::Free(mut looker) => spawn_blocking(move || {
            let seen = looker.look();
            (looker, seen)
        }),
        Eye::Busy(task) => task,
        Eye::Blind => return (Eye::Blind, unseen("the look at the system failed")),
    };
    match timeout(DEADLINE, &mut task).await {
        Ok(Ok((looker, seen))) => (Eye::Free(looker), seen),
        Ok(Err(error)) => (Eye::Blind, unseen(&format!("the look at the system failed: {error}"))),
        Err(_) => (Eye::Busy(task), unseen("the look at the system hangs in the kernel")),
    }
}

fn unseen(text: &str) -> Seen {
    Seen { differences: vec![drift::foreign(DriftKind::Unseen, "system", text)], limits: Vec::new() }
}

fn at(place: &Path, path: &str) -> PathBuf {
    if place.as_os_str().is_empty() { path.into() } else { place.join(path.trim_start_matches('/')) }
}

/// `service` of `web.service`.
fn kind_of(unit: &str) -> &str {
    unit.rsplit('.').next().unwrap_or("")
}

fn entries(folder: &Path) -> impl Iterator<Item = DirEntry> + use<> {
    std::fs::read_dir(folder).into_iter().flatten().flatten()
}

fn text(path: &Path) -> std::io::Result<String> {
    let mut bytes = Vec::new();
    File::open(path)?.take(TABLE).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests;
