//! A disk as somebody with a screwdriver makes it: the site's own signed loader, and an entry that starts a kernel with an initramfs
//! of one's own. Made by other programs than the agent: sgdisk, mkfs.vfat, mtools. And what these read and write on the agent's disk.

use kiln_lab::command;
use kiln_release::newc::{Header, TRAILER, padding};
use std::path::Path;
use std::process::Command;

/// What the initramfs prints when it runs.
pub const WORD: &str = "KILN-FOREIGN-INIT";

/// Where the partition begins, in bytes; the agent's begins there too.
const BEGIN: u64 = 1 << 20;
const KIB: u32 = 64 << 10;

/// A program that prints [`WORD`], and then waits for a signal for ever: static, x86_64.
fn program() -> Vec<u8> {
    let text = format!("{WORD}\n");
    let length = u8::try_from(text.len()).unwrap();
    #[rustfmt::skip]
    let code = [
        0xb8, 1, 0, 0, 0,              // mov eax, SYS_write
        0xbf, 1, 0, 0, 0,              // mov edi, 1
        0x48, 0x8d, 0x35, 16, 0, 0, 0, // lea rsi, [rip + 16]
        0xba, length, 0, 0, 0,         // mov edx, length
        0x0f, 0x05,                    // syscall
        0xb8, 34, 0, 0, 0,             // mov eax, SYS_pause
        0x0f, 0x05,                    // syscall
        0xeb, 0xf7,                    // jmp to the second mov eax
    ];
    let (load, size) = (0x40_0000_u64, (120 + code.len() + text.len()) as u64);
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    // Entry, program headers, section headers; flags; sizes and counts.
    elf.extend([load + 120, 64, 0].into_iter().flat_map(u64::to_le_bytes));
    elf.extend([0; 4]);
    elf.extend([64_u16, 56, 1, 0, 0, 0].into_iter().flat_map(u16::to_le_bytes));
    // One program header: PT_LOAD, readable and executable.
    elf.extend([1_u32, 5].into_iter().flat_map(u32::to_le_bytes));
    elf.extend([0, load, load, size, size, 4096].into_iter().flat_map(u64::to_le_bytes));
    elf.extend(code);
    elf.extend(text.bytes());
    elf
}

/// An initramfs that has that program as `/evil`, and a console for it.
pub fn initramfs() -> Vec<u8> {
    let program = program();
    let size = u32::try_from(program.len()).unwrap();
    let mut out = Header { mode: 0o040_755, links: 2, ..Header::default() }.to_bytes("dev");
    out.extend(Header { mode: 0o020_600, links: 1, device: (5, 1), ..Header::default() }.to_bytes("dev/console"));
    out.extend(Header { mode: 0o100_755, links: 1, size, ..Header::default() }.to_bytes("evil"));
    out.extend(&program);
    out.extend(padding(u64::from(size)));
    out.extend(Header { links: 1, ..Header::default() }.to_bytes(TRAILER));
    out
}

/// Makes the disk anew: a partition table, and an EFI system partition with these files.
pub fn write(disk: &Path, scratch: &Path, files: &[(&str, &[u8])]) {
    let file = std::fs::File::create(disk).unwrap();
    file.set_len(kiln_lab::machine::DISK_BYTES).unwrap();
    drop(file);
    let image = disk.to_str().unwrap();
    let partition = format!("1:{}:+{KIB}K", BEGIN / 512);
    command::run("sgdisk", ["-n", &partition, "-t", "1:ef00", image]).unwrap();
    let (sector, blocks) = ((BEGIN / 512).to_string(), KIB.to_string());
    command::run("mkfs.vfat", ["-F", "32", "-s", "1", "--offset", &sector, image, &blocks]).unwrap();
    let image = format!("{image}@@{BEGIN}");
    let folders = ["::/EFI", "::/EFI/BOOT", "::/loader", "::/loader/entries"];
    command::run("mmd", ["-i", &image].into_iter().chain(folders)).unwrap();
    let from = scratch.join("to-esp");
    for (name, content) in files {
        std::fs::write(&from, content).unwrap();
        command::run_command(Command::new("mcopy").args(["-i", &image]).arg(&from).arg(format!("::/{name}"))).unwrap();
    }
}

/// A file of a disk's ESP. The machine is off.
pub fn read(disk: &Path, scratch: &Path, name: &str) -> Vec<u8> {
    let to = scratch.join("from-esp");
    let image = format!("{}@@{BEGIN}", disk.display());
    let mut mcopy = Command::new("mcopy");
    mcopy.args(["-n", "-i", &image]).arg(format!("::/{name}")).arg(&to);
    command::run_command(&mut mcopy).unwrap();
    std::fs::read(&to).unwrap()
}

/// Puts another file in the place of one on a disk's ESP. The machine is off.
pub fn replace(disk: &Path, scratch: &Path, name: &str, content: &[u8]) {
    let from = scratch.join("to-esp");
    std::fs::write(&from, content).unwrap();
    let image = format!("{}@@{BEGIN}", disk.display());
    let mut mcopy = Command::new("mcopy");
    mcopy.args(["-o", "-i", &image]).arg(&from).arg(format!("::/{name}"));
    command::run_command(&mut mcopy).unwrap();
    assert!(read(disk, scratch, name) == content, "{name} is replaced");
}
