//! A dm-verity root of no release, on a disk: with whose signature it may be executed is what a machine shows
//! (`images/recipes/probe.sh`). Its one program is the agent, which every image has as well. The signatures are openssl's, as the
//! kernel's Documentation/admin-guide/device-mapper/verity.rst makes them.

use kiln_lab::command;
use kiln_lab::paths::Paths;
use kiln_release::verity::{BLOCK, TreeBuilder};
use kiln_release::{VerityParams, hex};
use std::fmt::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

/// As the machine calls the disk: erofs from its first byte on, the tree behind.
const DEVICE: &str = "/dev/vda";
/// Where the disk says how to set it up: a table of device-mapper's, and each signature in base64 behind its name.
const SAYS: u64 = 64 << 20;
const SALT: &[u8] = b"of no release";

/// Writes it, signed by the Secure Boot key of each of these sites.
pub fn write(paths: &Paths, disk: &Path, sites: &[(&str, &Path)]) {
    let dir = paths.scratch.join("foreign-root");
    std::fs::create_dir(&dir).unwrap();
    std::fs::copy(&paths.agent, dir.join("kiln-agent")).unwrap();
    let image = paths.scratch.join("foreign-root.erofs");
    command::run("mkfs.erofs", [&image, &dir]).unwrap();
    let data = std::fs::read(&image).unwrap();
    let (blocks, []) = data.as_chunks::<BLOCK>() else { panic!("erofs has whole blocks") };
    let mut tree = TreeBuilder::new(SALT, [7; 16]).unwrap();
    blocks.iter().for_each(|block| tree.push_block(block));
    let tree = tree.finish().unwrap();
    let (root_hash, salt, data_blocks) = (hex::encode(&tree.root_hash), hex::encode(SALT), tree.data_blocks);
    let verity = VerityParams { root_hash, salt, data_blocks, hash_offset: data.len() as u64 };
    let mut says = format!("table 0 {} verity {}\n", verity.sectors(), verity.table(DEVICE, DEVICE));
    for (name, site) in sites {
        writeln!(says, "{name} {}", signature(paths, site, &verity.root_hash)).unwrap();
    }
    let disk = std::fs::OpenOptions::new().write(true).open(disk).unwrap();
    let whole = [&data[..], &tree.hash_area].concat();
    assert!(whole.len() as u64 <= SAYS);
    disk.write_all_at(&whole, 0).and_then(|()| disk.write_all_at(says.as_bytes(), SAYS)).unwrap();
}

fn signature(paths: &Paths, site: &Path, root_hash: &str) -> String {
    let [hash, signed] = ["hash", "p7s"].map(|end| paths.scratch.join(format!("foreign-root.{end}")));
    let keys = site.join("offline/secure-boot");
    std::fs::write(&hash, root_hash).unwrap();
    let mut sign = Command::new("openssl");
    sign.args(["smime", "-sign", "-nocerts", "-noattr", "-binary", "-outform", "DER", "-in"]).arg(&hash);
    sign.arg("-inkey").arg(keys.join("db.key")).arg("-signer").arg(keys.join("db.cer")).arg("-out").arg(&signed);
    command::run_command(&mut sign).unwrap();
    command::run_command(Command::new("openssl").args(["base64", "-A", "-in"]).arg(&signed)).unwrap().trim().to_owned()
}
