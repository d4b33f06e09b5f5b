//! The root artifact as a block device: a loop device over the file, dm-verity over that.
//! Source: Linux Documentation/admin-guide/device-mapper/verity.rst.

use crate::error::{AgentError, Result};
use crate::secureboot::{SIGNATURE_KEY, SecureBoot};
use crate::sys::{self, DmCommand};
use kiln_release::VerityParams;
use std::fs::{File, OpenOptions};

/// Name of the root's device.
pub const DEVICE: &str = "kiln-root";

/// Sets up the file `root` read-only under dm-verity with exactly `root_hash`; gives the device's path. The loop device
/// holds the file: its name may go.
pub fn open(root: &File, params: &VerityParams, root_hash: &str, boot: SecureBoot) -> Result<String> {
    let control_path = "/dev/loop-control";
    let control = File::open(control_path).map_err(AgentError::file(control_path))?;
    let number = sys::loop_get_free(&control).map_err(AgentError::system("finding a free loop device"))?;
    let loop_path = format!("/dev/loop{number}");
    let device = File::open(&loop_path).map_err(AgentError::file(&loop_path))?;
    sys::loop_bind(&device, root).map_err(AgentError::system(format!("binding the root artifact to {loop_path}")))?;

    open_device(&loop_path, params, root_hash, boot)
}

/// The same on a block device that holds the artifact from its first byte on: a slot. Where firmware vouches for the
/// site's key, the kernel itself checks the signature of the root hash, and refuses a wrong one.
pub fn open_device(device: &str, params: &VerityParams, root_hash: &str, boot: SecureBoot) -> Result<String> {
    let signature =
        if boot.offer_signature()? { format!(" 2 root_hash_sig_key_desc {SIGNATURE_KEY}") } else { String::new() };
    let control = mapper()?;
    let sectors = params.data_blocks * 8;
    let first_hash_block = params.hash_offset / 4096 + 1;
    let table = format!(
        "1 {device} {device} 4096 4096 {} {first_hash_block} sha256 {root_hash} {}{signature}",
        params.data_blocks, params.salt
    );
    let ask = |command, table: Option<(u64, &str, &str)>, what: &str| {
        sys::device_mapper(&control, command, DEVICE, table).map_err(AgentError::system(what))
    };
    ask(DmCommand::Create, None, "creating the device-mapper device")?;
    ask(DmCommand::Load, Some((sectors, "verity", &table)), "loading the dm-verity table")?;
    ask(DmCommand::Resume, None, "starting dm-verity")?;
    device_path(DEVICE)
}

/// The root hash in the kernel's table: what really runs.
pub fn running_root_hash() -> Result<String> {
    let table = sys::device_mapper(&mapper()?, DmCommand::Table, DEVICE, None)
        .map_err(AgentError::system("reading the dm-verity table"))?;
    // version, data device, hash device, block sizes, blocks, first hash block, algorithm, root hash, salt
    table.split_whitespace().nth(8).map(str::to_owned).ok_or_else(|| AgentError::Format {
        path: "/dev/mapper/control".into(),
        reason: format!("unexpected dm-verity table {table:?}"),
    })
}

/// Whether the kernel met a block of the root that is not as signed, since it was set up. It says so for as long as it runs.
pub fn is_corrupted() -> Result<bool> {
    let status = sys::device_mapper(&mapper()?, DmCommand::Status, DEVICE, None)
        .map_err(AgentError::system("reading dm-verity's status"))?;
    read_status(&status)
}

/// `V` (valid) or `C` (corrupted), and on newer kernels counts behind it (verity.rst, "Status").
fn read_status(status: &str) -> Result<bool> {
    match status.split_whitespace().next() {
        Some("V") => Ok(false),
        Some("C") => Ok(true),
        Some(_) | None => Err(AgentError::Format {
            path: "/dev/mapper/control".into(),
            reason: format!("unexpected dm-verity status {status:?}"),
        }),
    }
}

/// The door of device-mapper.
pub fn mapper() -> Result<File> {
    let path = "/dev/mapper/control";
    OpenOptions::new().read(true).write(true).open(path).map_err(AgentError::file(path))
}

/// A device-mapper device's node: devtmpfs names it by number, nothing makes /dev/mapper links here.
pub fn device_path(device: &str) -> Result<String> {
    let path = "/sys/class/block";
    for entry in std::fs::read_dir(path).map_err(AgentError::file(path))? {
        let entry = entry.map_err(AgentError::file(path))?;
        let name = std::fs::read_to_string(entry.path().join("dm/name")).unwrap_or_default();
        if name.trim() == device {
            return Ok(format!("/dev/{}", entry.file_name().to_string_lossy()));
        }
    }
    Err(AgentError::Format { path: path.into(), reason: format!("no device named {device}") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_verdict_is_one_letter() {
        for (status, corrupted) in [("V", false), ("C", true), ("V -", false), ("C 3", true)] {
            assert_eq!(read_status(status).unwrap(), corrupted, "{status}");
        }
        for status in ["", "0 8 linear", "corrupted"] {
            assert!(read_status(status).is_err(), "{status}");
        }
    }
}
