//! A newer QEMU than the host's, for devices that the host's does not have yet.
//!
//! Debian 13's package is unpacked beside the lab's other things and run with its own libraries; nothing is installed.

use crate::command;
use crate::error::{AtPath, LabError};
use crate::machine::QEMU;
use crate::paths::Paths;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

const SUITE: &str = "trixie";

/// Whether a QEMU has a device. One that has not says so, and ends with 0 all the same.
fn has(qemu: &str, device: &str) -> bool {
    let help = command::run(qemu, ["-machine", "q35", "-device", &format!("{device},help")]);
    help.is_ok_and(|text| text.contains(&format!("{device} options:")))
}

fn folder(paths: &Paths) -> PathBuf {
    paths.lab.join(format!("qemu-{SUITE}"))
}

/// The program to start for a machine with this device: the host's own QEMU, else the one that [`prepare`] unpacked.
pub fn with(paths: &Paths, device: &str) -> Option<PathBuf> {
    let newer = folder(paths).join("run");
    [PathBuf::from(QEMU), newer].into_iter().find(|program| has(&program.to_string_lossy(), device))
}

/// Unpacks the newer QEMU, unless the host's has all of `devices` or it is there.
pub fn prepare(paths: &Paths, devices: &[&str]) -> Result<(), LabError> {
    let folder = folder(paths);
    if devices.iter().all(|device| has(QEMU, device)) || folder.join("run").exists() {
        return Ok(());
    }
    println!("lab: this QEMU lacks one of {}: unpacking that of {SUITE}", devices.join(", "));
    let fresh = folder.with_extension("new");
    if fresh.exists() {
        std::fs::remove_dir_all(&fresh).at(&fresh)?;
    }
    let (root, tar) = (fresh.join("root"), fresh.join("root.tar"));
    std::fs::create_dir_all(&root).at(&root)?;
    // A tar, because a user who is not root can have it made in a namespace and own what is unpacked.
    let (root_text, tar_text) = (root.display().to_string(), tar.display().to_string());
    let packages = "--include=qemu-system-x86,seabios,ipxe-qemu";
    command::run("mmdebstrap", ["--variant=extract", packages, "--architectures=amd64", SUITE, &tar_text])?;
    command::run("tar", ["-xf", &tar_text, "--no-same-owner", "--exclude=./dev/*", "-C", &root_text])?;
    std::fs::remove_file(&tar).at(&tar)?;
    let at = folder.join("root/usr").display().to_string();
    let libraries = format!("{at}/lib/x86_64-linux-gnu");
    // The loader by its name, because the program names the host's.
    let script = format!(
        "#!/bin/sh\nQEMU_MODULE_DIR={libraries}/qemu exec {at}/lib64/ld-linux-x86-64.so.2 --library-path {libraries} \
         {at}/bin/{QEMU} -L {at}/share/qemu -L {at}/share/seabios -L {at}/lib/ipxe/qemu \"$@\"\n"
    );
    let run = fresh.join("run");
    std::fs::write(&run, script).at(&run)?;
    std::fs::set_permissions(&run, std::fs::Permissions::from_mode(0o755)).at(&run)?;
    std::fs::rename(&fresh, &folder).at(&folder)
}
