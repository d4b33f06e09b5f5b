//! The top layer: what makes a Debian root a Kiln root. A few small files over the packages: who the image is, the
//! agent and its unit, what may be written, and what may not start.
//!
//! Nothing on a read-only root is configured at run time, so what programs expect to write there points into /run.

use crate::base::json;
use crate::error::BuildError;
use crate::recipe::Recipe;
use crate::tarball::{Added, Content, Entry, Kind};
use kiln_release::{ACCEPTANCE_PATH, EXEC_PATH, WritableMount};
use std::collections::BTreeMap;

/// The agent in the root.
pub const AGENT_PATH: &str = "/usr/lib/kiln/kiln-agent";

/// The agent again, as systemd calls it last of all: a kernel that a disk keeps from leaving is reset (`agent/src/restart.rs`).
const SHUTDOWN_HOOK: &str = "/usr/lib/systemd/system-shutdown/kiln-agent";

const AGENT_UNIT: &str = "\
[Unit]
Description=Kiln agent: health, reports, reimaging
StartLimitIntervalSec=0

[Service]
Type=exec
ExecStart=/usr/lib/kiln/kiln-agent service
Restart=always
RestartSec=1
OOMScoreAdjust=-900
StandardOutput=journal+console
StandardError=journal+console
# Images keep the console to notices; what the agent says is for the person in front of it.
SyslogLevel=notice

[Install]
WantedBy=multi-user.target
";

/// Where an allow-list is: what starts after the agent finds its places guarded, and the fanotify group outlives the
/// service, so that nothing starts unjudged while it restarts (systemd.service(5), FileDescriptorStoreMax).
const EXEC_DROP_IN: &str = "\
[Service]
Type=notify
NotifyAccess=main
FileDescriptorStoreMax=1
";

/// The tests of an image of class `acceptance`: once in each boot, beside the agent, and the first to go when memory is
/// short.
const ACCEPTANCE_UNIT: &str = "\
[Unit]
Description=Acceptance run: memory, processors, disks, network
After=kiln-agent.service

[Service]
Type=exec
ExecStart=/usr/lib/kiln/kiln-agent acceptance
Nice=10
OOMScoreAdjust=900
OOMPolicy=continue
StandardOutput=journal+console
StandardError=journal+console
SyslogLevel=notice
";

/// A mount that stays until the machine goes.
const STAYS_DROP_IN: &str = "\
[Unit]
DefaultDependencies=no
";

/// In place of systemd's own, which starts a shell.
const EMERGENCY_UNIT: &str = "\
[Unit]
Description=Restart: the system could not come up
DefaultDependencies=no
Conflicts=shutdown.target
Before=shutdown.target

[Service]
Type=oneshot
StandardOutput=journal+console
ExecStart=echo \"The system could not come up. There is no shell here; the machine restarts in 60 seconds.\"
ExecStart=sleep 60
ExecStart=systemctl --force reboot
";

/// os-release(5) of this release: the base's, with image and number. They make two releases' roots differ.
pub(crate) fn os_release(base: &str, image: &str, release: u64) -> String {
    let kept = base.lines().filter(|line| !line.starts_with("IMAGE_ID=") && !line.starts_with("IMAGE_VERSION="));
    let text: String = kept.flat_map(|line| [line, "\n"]).collect();
    text + &format!("IMAGE_ID={image}\nIMAGE_VERSION={release}\n")
}

/// Every entry of the top layer. `base` is what the packages hold, `exec` the allow-list.
pub(crate) fn layer(
    recipe: &Recipe,
    base: &[Entry],
    os_release: &str,
    agent: &[u8],
    exec: Option<&[u8]>,
) -> Result<Vec<Added>, BuildError> {
    let mut top = Top::default();
    top.file("/usr/lib/os-release", 0o644, os_release);
    top.file(AGENT_PATH, 0o755, agent);
    top.file("/usr/lib/systemd/system/kiln-agent.service", 0o644, AGENT_UNIT);
    top.enable("multi-user.target.wants", "kiln-agent.service", "/usr/lib/systemd/system");
    top.link(SHUTDOWN_HOOK, AGENT_PATH);
    top.file("/usr/lib/systemd/system/emergency.service", 0o644, EMERGENCY_UNIT);
    top.link("/etc/systemd/system/default.target", "/usr/lib/systemd/system/multi-user.target");

    // machine-id(5): an empty file is no first boot, and systemd binds /run/machine-id over it.
    top.file("/etc/machine-id", 0o444, "");
    // Else it would start a program at its stop to unmount that.
    top.file("/usr/lib/systemd/system/etc-machine\\x2did.mount.d/kiln.conf", 0o644, STAYS_DROP_IN);
    top.file("/etc/fstab", 0o644, "# The root is read-only; what may be written is in /etc/systemd/system/*.mount.\n");
    top.link("/etc/hostname", "/run/kiln/hostname");
    top.link("/etc/resolv.conf", "/run/kiln/resolv.conf");

    for unit in &recipe.mask {
        top.link(&format!("/etc/systemd/system/{unit}"), "/dev/null");
    }
    for unit in &recipe.enable {
        top.enable("multi-user.target.wants", unit, "/usr/lib/systemd/system");
    }
    for mount in &recipe.writable {
        let Some(mode) = directory_mode(base, &mount.path) else {
            let (recipe, path) = (recipe.name.clone(), mount.path.clone());
            return Err(BuildError::NoSuchDirectory { recipe, key: "[[writable]]", path });
        };
        let unit = unit_name(&mount.path);
        top.file(&format!("/etc/systemd/system/{unit}"), 0o644, mount_unit(mount, mode));
        top.enable("local-fs.target.requires", &unit, "/etc/systemd/system");
    }
    if let Some(data) = recipe.disk.as_ref().and_then(|disk| disk.data.as_ref())
        && directory_mode(base, &data.path).is_none()
    {
        let (recipe, path) = (recipe.name.clone(), data.path.clone());
        return Err(BuildError::NoSuchDirectory { recipe, key: "[disk] data_at", path });
    }
    if let Some(exec) = exec {
        top.file(EXEC_PATH, 0o644, exec);
        top.file("/usr/lib/systemd/system/kiln-agent.service.d/exec.conf", 0o644, EXEC_DROP_IN);
    }
    if let Some(plan) = &recipe.acceptance {
        top.file(ACCEPTANCE_PATH, 0o644, json(plan));
        top.file("/usr/lib/systemd/system/kiln-acceptance.service", 0o644, ACCEPTANCE_UNIT);
        top.enable("multi-user.target.wants", "kiln-acceptance.service", "/usr/lib/systemd/system");
    }
    for file in &recipe.files {
        top.file(&file.path, file.mode, &file.content);
    }
    Ok(top.entries.into_values().collect())
}

#[derive(Default)]
struct Top {
    entries: BTreeMap<String, Added>,
}

impl Top {
    fn add(&mut self, path: &str, mode: u32, content: Content) {
        self.entries.insert(path.into(), Added { path: path.into(), mode, content });
    }

    fn file(&mut self, path: &str, mode: u32, content: impl AsRef<[u8]>) {
        self.add(path, mode, Content::File(content.as_ref().to_vec()));
    }

    fn link(&mut self, path: &str, target: &str) {
        self.add(path, 0o777, Content::Symlink(target.into()));
    }

    fn enable(&mut self, by: &str, unit: &str, folder: &str) {
        self.link(&format!("/etc/systemd/system/{by}/{unit}"), &format!("{folder}/{unit}"));
    }
}

fn directory_mode(base: &[Entry], path: &str) -> Option<u32> {
    base.iter().find(|entry| entry.path == path && entry.kind == Kind::Directory).map(|entry| entry.mode)
}

/// The agent mounts it before the image's init runs; the unit is for whoever starts the root otherwise. It is not
/// unmounted at the end: it is memory, there is nothing to be written back, and the machine is away for as long.
fn mount_unit(mount: &WritableMount, mode: u32) -> String {
    let WritableMount { path, size } = mount;
    format!(
        "[Unit]\nDescription=Writable {path}, in memory\nDefaultDependencies=no\nBefore=local-fs.target\n\n\
         [Mount]\nWhat=tmpfs\nWhere={path}\nType=tmpfs\nOptions=mode={mode:04o},size={size},noexec,nosuid,nodev\n",
    )
}

/// systemd.unit(5), "String escaping for inclusion in unit names", for a path.
fn unit_name(path: &str) -> String {
    let escape = |(at, byte): (usize, u8)| match byte {
        b'/' => "-".to_owned(),
        b'.' if at == 0 => "\\x2e".to_owned(),
        _ if byte.is_ascii_alphanumeric() || b":_.".contains(&byte) => char::from(byte).to_string(),
        _ => format!("\\x{byte:02x}"),
    };
    path.trim_matches('/').bytes().enumerate().map(escape).collect::<String>() + ".mount"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unit_names_are_systemds() {
        assert_eq!(unit_name("/var/lib/systemd"), "var-lib-systemd.mount");
        assert_eq!(unit_name("/srv/a-b c"), "srv-a\\x2db\\x20c.mount");
        assert_eq!(unit_name("/.x"), "\\x2ex.mount");
    }

    #[test]
    fn os_release_names_the_release_once() {
        let once = os_release("ID=debian\nIMAGE_VERSION=1\n", "minimal", 7);
        assert_eq!(once, "ID=debian\nIMAGE_ID=minimal\nIMAGE_VERSION=7\n");
        assert_eq!(os_release(&once, "minimal", 7), once);
    }

    #[test]
    fn tmpfs_keeps_the_directorys_mode_and_bars_programs() {
        let unit = mount_unit(&WritableMount { path: "/tmp".into(), size: 4096 }, 0o1777);
        assert!(unit.contains("Options=mode=1777,size=4096,noexec,nosuid,nodev\n"), "{unit}");
    }
}
