//! The data partition: what an image keeps over reimages, encrypted under a key that lies in this machine's TPM alone
//! ([`crate::tpm`]). dm-crypt, aes-xts-plain64; ext4 on it, made by the image's own mke2fs.
//! Source: Linux Documentation/admin-guide/device-mapper/dm-crypt.rst.
//!
//! XTS hides what is written; it does not notice what somebody writes into the partition while the machine is off: without the
//! key that becomes noise, a block of 16 bytes at a time, and older content of a sector can be put back. Whoever had the machine in
//! hand can have put partition and key there (docs/adr/0017).

use super::DiskError;
use super::block::{Block, SECTOR};
use super::device::Device;
use super::layout::{Found, look};
use super::machine::MachineDisk;
use crate::error::{AgentError, Result};
use crate::sys::{self, DmCommand};
use crate::tpm::{DATA_KEY, Tpm};
use crate::verity;
use kiln_release::{DataSettings, hex};
use nix::mount::{MsFlags, mount};
use std::path::Path;
use std::process::{Command, Stdio};

/// Name of its device.
const DEVICE: &str = "kiln-data";
const KIND: &str = "aes-xts-plain64";
/// Modules that it needs and no device asks for. The kernel would ask a program for the ciphers; here is none.
pub const MODULES: [&str; 5] = ["aes_generic", "aesni_intel", "xts", "dm_crypt", "ext4"];
/// Before the encrypted part: whose it is.
const HEAD: u64 = 1 << 20;
const MAGIC: &[u8; 8] = b"KILNDAT1";

type Key = [u8; DATA_KEY];

/// Which key a partition was made under: its name only.
fn key_id(key: &Key) -> Vec<u8> {
    let named = [&b"kiln-data-id\0"[..], key].concat();
    let sum = ring::digest::digest(&ring::digest::SHA256, &named);
    [&MAGIC[..], &sum.as_ref()[..24]].concat()
}

fn forget(bytes: &mut [u8]) {
    bytes.fill(0);
    // Otherwise nobody would read what was written, and the compiler could leave it out.
    std::hint::black_box(bytes);
}

/// What becomes of the partition.
#[derive(Debug, PartialEq, Eq)]
enum Plan {
    /// It has a file system under this key.
    Open,
    /// Nothing of anybody's: a file system is made.
    Make,
    /// Under another key: nothing is touched.
    OfAnother,
}

/// `head` is the partition's beginning.
fn plan(head: &[u8], key: Option<&Key>) -> Plan {
    let named = head.starts_with(MAGIC);
    match key {
        Some(key) if head.starts_with(&key_id(key)) => Plan::Open,
        Some(_) | None if named => Plan::OfAnother,
        Some(_) | None => Plan::Make,
    }
}

/// Opens the partition and mounts it in the new root. In the initramfs only, before its cap. `vouches`: see [`Tpm::data_key`].
pub fn open(disk: &MachineDisk, settings: &DataSettings, root: &Path, vouches: bool) -> Result<()> {
    let range = disk.data().ok_or_else(|| DiskError::NoData { disk: disk.name().to_owned() })?;
    let partition = disk.partition(range.start)?;
    let mut device = Device::open(&partition)?;
    let mut head = vec![0; SECTOR];
    device.read_at(0, &mut head).map_err(AgentError::file(&partition))?;
    let mut tpm = Tpm::open()?.ok_or(AgentError::NoTpm)?;
    let known = tpm.data_key(vouches)?;
    let what = plan(&head, known.as_ref());
    let mut key = match (&what, known) {
        (Plan::OfAnother, _) | (Plan::Open, None) => {
            return Err(DiskError::DataOfAnother { disk: disk.name().to_owned() }.into());
        }
        (Plan::Open, Some(key)) => key,
        // Never under a key that was there before its partition: who has the machine in hand could have put it there.
        (Plan::Make, _) => {
            let [mut first, mut second] = [crate::memory::random()?, crate::memory::random()?];
            let mut key = [0; DATA_KEY];
            key[..32].copy_from_slice(&first);
            key[32..].copy_from_slice(&second);
            forget(&mut first);
            forget(&mut second);
            tpm.make_data_key(&key)?;
            key
        }
    };
    let opened = map(&partition, range.end - range.start, &key);
    let id = key_id(&key);
    forget(&mut key);
    let mapped = opened?;
    if what == Plan::Make {
        make(&mapped, root)?;
        head[..id.len()].copy_from_slice(&id);
        // Last: until it is there, the file system is made anew.
        device.write_at(0, &head).and_then(|()| device.flush()).map_err(AgentError::file(&partition))?;
    }
    let at = root.join(settings.path.trim_start_matches('/'));
    let flags = MsFlags::MS_NOEXEC | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some(mapped.as_str()), &at, Some("ext4"), flags, None::<&str>)
        .map_err(AgentError::system(format!("mounting the data at {}", settings.path)))?;
    println!("kiln-agent: {} holds the machine's data, under its TPM's key", settings.path);
    Ok(())
}

fn map(partition: &Path, length: u64, key: &Key) -> Result<String> {
    let control = verity::mapper()?;
    let mut digits = hex::encode(key);
    let mut table = format!("{KIND} {digits} 0 {} {}", partition.display(), HEAD / SECTOR as u64);
    let sectors = (length - HEAD) / SECTOR as u64;
    let ask = |command, table: Option<(u64, &str, &str)>, what: &str| {
        sys::device_mapper(&control, command, DEVICE, table).map_err(AgentError::system(what))
    };
    let done = ask(DmCommand::CreateWritable, None, "creating the data's device")
        .and_then(|_| ask(DmCommand::LoadWritable, Some((sectors, "crypt", &table)), "loading the dm-crypt table"))
        .and_then(|_| ask(DmCommand::Resume, None, "starting dm-crypt"));
    for text in [&mut digits, &mut table] {
        let mut bytes = std::mem::take(text).into_bytes();
        forget(&mut bytes);
    }
    done?;
    verity::device_path(DEVICE)
}

/// By the root's own program, which the initramfs runs by the root's own loader: nothing is mounted for it.
fn make(device: &str, root: &Path) -> Result<()> {
    let inside = |path: &str| root.join(path);
    let mut command = Command::new(inside("usr/lib64/ld-linux-x86-64.so.2"));
    command.arg("--library-path").arg(inside("usr/lib/x86_64-linux-gnu")).arg(inside("usr/sbin/mke2fs"));
    command.args(["-q", "-F", "-t", "ext4", "-m", "0", "-L", "kiln-data", device]);
    command.env_clear().env("MKE2FS_CONFIG", inside("etc/mke2fs.conf")).stdin(Stdio::null()).stdout(Stdio::null());
    let output = command.output().map_err(AgentError::system("running the root's mke2fs"))?;
    if output.status.success() {
        return Ok(());
    }
    let words: String = String::from_utf8_lossy(&output.stderr).chars().take(300).collect();
    Err(AgentError::system("making the data's file system")(std::io::Error::other(format!(
        "mke2fs: {}: {words}",
        output.status
    ))))
}

/// What became of the data's key before Secure Boot's state changes.
#[derive(Debug, PartialEq, Eq)]
pub enum Carried {
    /// There is none.
    NoKey,
    /// The next initramfs finds it.
    Over,
    /// It stays bound to the state of now, and the reason says why.
    Not(String),
}

/// Before Secure Boot's state changes: the key, as the kernel has it, goes where the next initramfs finds it. Afterwards once
/// more, bound to PCR 7 as it will be, where that is known.
pub fn carry_key(pcr7: Option<[u8; 32]>) -> Result<Carried> {
    let mut table = match sys::device_mapper(&verity::mapper()?, DmCommand::Table, DEVICE, None) {
        Ok(table) => table.into_bytes(),
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => return without_device(),
        Err(error) => return Err(AgentError::system("reading the data's dm-crypt table")(error)),
    };
    let key = table_key(&table);
    forget(&mut table);
    let mut key = key.ok_or_else(|| AgentError::Format {
        path: "/dev/mapper/control".into(),
        reason: "the data's table holds no key of 64 bytes".into(),
    })?;
    let carried = match Tpm::open() {
        Ok(Some(mut tpm)) => tpm.carry_data_key(&key, pcr7.as_ref()),
        Ok(None) => Err(std::io::Error::from(std::io::ErrorKind::NotFound).into()),
        Err(fault) => Err(fault),
    };
    forget(&mut key);
    Ok(match carried {
        Ok(()) => Carried::Over,
        Err(fault) => Carried::Not(fault.to_string()),
    })
}

fn table_key(table: &[u8]) -> Option<Key> {
    let digits = std::str::from_utf8(table).ok()?.split_whitespace().nth(1)?;
    let mut bytes = hex::decode(digits)?;
    let key = bytes.as_slice().try_into().ok();
    forget(&mut bytes);
    key
}

/// The partition is not open in this boot. Another boot may have put a key there.
fn without_device() -> Result<Carried> {
    let there = match Tpm::open()? {
        Some(mut tpm) => tpm.has_data_key()?,
        None => false,
    };
    Ok(if there {
        Carried::Not("the TPM has it, and the data is not open in this boot".into())
    } else {
        Carried::NoKey
    })
}

/// The state did not change.
pub fn drop_copy() -> Result<()> {
    match Tpm::open()? {
        Some(mut tpm) => Ok(tpm.drop_data_key_copy()?),
        None => Ok(()),
    }
}

/// Whether this disk has a place for this site's data.
pub fn lies_on(disk: &Path, site: &str) -> bool {
    let found = Device::open(disk).ok().and_then(|device| look(&device, site).ok());
    matches!(found, Some(Found::Ours(layout)) if layout.data().is_some())
}

/// What was on the data partition of this machine can be read by nobody any more. Whether there was a key.
pub fn destroy_key() -> Result<bool> {
    match Tpm::open()? {
        Some(mut tpm) => Ok(tpm.destroy_data_key()?),
        None => Ok(false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_of_another_key_is_not_touched() {
        let (mine, other) = ([1; DATA_KEY], [2; DATA_KEY]);
        let head = |key: &Key| [key_id(key), vec![0; 400]].concat();
        assert_eq!(plan(&head(&mine), Some(&mine)), Plan::Open);
        assert_eq!(plan(&head(&other), Some(&mine)), Plan::OfAnother);
        // The TPM was cleared, or the disk is another machine's.
        assert_eq!(plan(&head(&mine), None), Plan::OfAnother);
        // Cut while the file system was made, and a new disk.
        assert_eq!(plan(&[0; 512], Some(&mine)), Plan::Make);
        assert_eq!(plan(&[0; 512], None), Plan::Make);
        assert_eq!(plan(&[], None), Plan::Make);
        assert_eq!(table_key(format!("aes-xts-plain64 {} 0 8:5 2048", hex::encode(&mine)).as_bytes()), Some(mine));
        for other in
            ["", "aes-xts-plain64", "aes-xts-plain64 :64:logon:x 0 8:5 2048", "aes-xts-plain64 0101 0 8:5 2048"]
        {
            assert_eq!(table_key(other.as_bytes()), None, "{other}");
        }
        assert!(!head(&mine).windows(8).any(|piece| piece == [1; 8]), "its name is not it");
    }
}
