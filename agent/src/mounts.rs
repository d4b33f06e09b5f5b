//! What is mounted before anything else is done. All that can be written is noexec, nosuid and nodev, here and in the
//! running system, to which these mounts are moved.

use crate::error::{AgentError, Result};
use kiln_release::WritableMount;
use nix::mount::{MsFlags, mount};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// So many files that were given to a boot beside its UKI are told by name.
const TOLD: usize = 16;

/// The kernel's own file systems, and memory.
pub fn pseudo_filesystems() -> Result<()> {
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let all = [
        ("proc", "/proc", "proc", safe, None),
        ("sysfs", "/sys", "sysfs", safe, None),
        ("devtmpfs", "/dev", "devtmpfs", MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC, Some("mode=0755")),
        // systemd keeps what is mounted already; its own /run and /dev/shm would let programs run.
        ("tmpfs", "/dev/shm", "tmpfs", safe, Some("mode=1777")),
        ("tmpfs", "/run", "tmpfs", safe, Some("mode=0755")),
    ];
    for (source, target, kind, flags, data) in all {
        std::fs::create_dir_all(target).map_err(AgentError::file(target))?;
        mount(Some(source), target, Some(kind), flags, data)
            .map_err(AgentError::system(format!("mounting {target}")))?;
    }
    // Firmware's event log is here, and the doors of IPE and IMA. A kernel without it boots all the same.
    let securityfs = mount(Some("securityfs"), "/sys/kernel/security", Some("securityfs"), safe, None::<&str>);
    if let Err(error) = securityfs {
        println!("kiln-agent: mounting securityfs: {error}: no event log, no IPE");
    }
    std::fs::create_dir_all("/run/kiln").map_err(AgentError::file("/run/kiln"))?;
    // Where the resolver looks (resolv.conf(5)).
    std::fs::create_dir_all("/etc").map_err(AgentError::file("/etc"))?;
    std::os::unix::fs::symlink("/run/kiln/resolv.conf", "/etc/resolv.conf")
        .map_err(AgentError::file("/etc/resolv.conf"))?;
    for file in delete_extras(Path::new("/.extra"))? {
        println!("kiln-agent: {} was given to this boot beside its UKI: deleted, and not read", file.display());
    }
    Ok(())
}

/// systemd-stub adds files of the ESP here; they are not signed (systemd-stub(7)). What the UKI itself holds lies at the top;
/// what came from elsewhere lies in folders, and is named.
fn delete_extras(place: &Path) -> Result<Vec<PathBuf>> {
    if !place.exists() {
        return Ok(Vec::new());
    }
    let files = |folder: &Path| std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let folders = files(place).filter(|path| path.is_dir());
    let given: Vec<PathBuf> = folders.flat_map(|folder| files(&folder)).take(TOLD).collect();
    std::fs::remove_dir_all(place).map_err(AgentError::file(place))?;
    Ok(given)
}

/// Where a kernel before this one may have left its last lines; without it there is nothing to read.
pub fn pstore() {
    let target = "/sys/fs/pstore";
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    if Path::new(target).exists()
        && let Err(error) = mount(Some("pstore"), target, Some("pstore"), flags, None::<&str>)
    {
        println!("kiln-agent: pstore cannot be mounted: {error}");
    }
}

/// The release's writable places, in memory, in the root that is about to run. The image has units for them (and its own
/// init would mount the message queues): it finds them mounted, and starts no program for each. One that is not as the
/// builder made it, or that cannot be mounted here, is left to its unit.
pub fn writable(root: &Path, places: &[WritableMount]) {
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let queues = "/dev/mqueue";
    // A kernel without them is one more difference to whatever needs them, and none to the boot.
    if std::fs::create_dir_all(queues).is_ok() {
        let _ = mount(Some("mqueue"), queues, Some("mqueue"), safe, None::<&str>);
    }
    for WritableMount { path, size } in places {
        let inside = |place: &&WritableMount| path.strip_prefix(&place.path).is_some_and(|rest| rest.starts_with('/'));
        let target = root.join(path.trim_start_matches('/'));
        let is_itself = target.canonicalize().is_ok_and(|real| real == target);
        let Ok(meta) = std::fs::symlink_metadata(&target) else { continue };
        if !is_itself || !meta.is_dir() || places.iter().any(|place| inside(&place)) {
            continue;
        }
        let options = format!("mode={:04o},size={size}", meta.mode() & 0o7777);
        if let Err(error) = mount(Some("tmpfs"), &target, Some("tmpfs"), safe, Some(options.as_str())) {
            println!("kiln-agent: {path} is left to the image's init: {error}");
        }
    }
}

/// Mounted where the firmware has variables; without them the machine has no lasting identity, and says so.
pub fn efivars() {
    use std::os::unix::fs::PermissionsExt;
    let target = "/sys/firmware/efi/efivars";
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    if Path::new(target).exists()
        && !std::fs::read_to_string("/proc/mounts").unwrap_or_default().contains(target)
        && let Err(error) = mount(Some("efivarfs"), target, Some("efivarfs"), flags, None::<&str>)
    {
        println!("kiln-agent: EFI variables cannot be mounted: {error}");
    }
    // efivarfs makes its files readable by everybody; the identity key among them is root's alone.
    if Path::new(target).exists()
        && let Err(error) = std::fs::set_permissions(target, std::fs::Permissions::from_mode(0o700))
    {
        println!("kiln-agent: EFI variables stay readable by all users: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_given_beside_the_uki_is_deleted_and_told() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join(".extra");
        assert!(delete_extras(&place).unwrap().is_empty());
        let credential = place.join("credentials/x.cred");
        std::fs::create_dir_all(credential.parent().unwrap()).unwrap();
        std::fs::write(&credential, "somebody's").unwrap();
        // The stub's own, out of the UKI.
        std::fs::write(place.join("os-release"), "ID=kiln").unwrap();
        assert_eq!(delete_extras(&place).unwrap(), [credential]);
        assert!(!place.exists());
    }
}
