//! What a rack needs of the host, checked before anything is started.

use crate::error::LabError;
use std::path::{Path, PathBuf};

const FILES: [(&str, &str); 9] = [
    ("/usr/bin/qemu-system-x86_64", "qemu-system-x86"),
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "ovmf"),
    ("/usr/share/OVMF/OVMF_CODE_4M.secboot.fd", "ovmf"),
    ("/usr/share/OVMF/OVMF_VARS_4M.fd", "ovmf"),
    ("/usr/share/seabios/bios-256k.bin", "seabios"),
    ("/usr/lib/ipxe/qemu/efi-virtio.rom", "ipxe-qemu"),
    ("/usr/lib/ipxe/undionly.kpxe", "ipxe"),
    ("/usr/sbin/dnsmasq", "dnsmasq-base"),
    ("/usr/bin/swtpm", "swtpm"),
];

/// Everything a rack needs that can be seen from outside the namespaces.
pub fn host() -> Result<(), LabError> {
    for (path, package) in FILES {
        if !Path::new(path).exists() {
            return Err(LabError::MissingFile { path: path.into(), package });
        }
    }
    std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .map_err(|source| LabError::NoTun { source })?;
    subordinate_ids()
}

/// An ordinary user's image build needs ranges in /etc/subuid and /etc/subgid.
fn subordinate_ids() -> Result<(), LabError> {
    let uid = nix::unistd::getuid();
    if uid.is_root() {
        return Ok(());
    }
    let name = nix::unistd::User::from_uid(uid).ok().flatten().map_or_else(|| uid.to_string(), |u| u.name);
    for file in ["/etc/subuid", "/etc/subgid"] {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        let owners: Vec<&str> = text.lines().filter_map(|l| l.split(':').next()).collect();
        if !owners.contains(&name.as_str()) && !owners.contains(&uid.to_string().as_str()) {
            return Err(LabError::NoSubordinateIds { user: name, file: PathBuf::from(file) });
        }
    }
    Ok(())
}
