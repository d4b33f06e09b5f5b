//! Puts a UKI together: systemd's stub, with the kernel, the initramfs and what they need as further PE sections
//! (UAPI.5 Unified Kernel Image). Layout as systemd's ukify does it: sections lie above everything the stub maps,
//! aligned to SectionAlignment in memory and FileAlignment in the file; the section table must fit into the headers.
//!
//! It does not sign (`kiln_release::authenticode` does), and takes no stub that is signed: a signature would be void.

use kiln_release::kexec::SIGNATURE_SECTION;
use kiln_release::pe::{CHECKSUM, Pe, PeError, SECTION_ENTRY, Section, checksum};

/// What goes into a UKI.
#[derive(Debug, Clone, Copy)]
pub struct Parts<'a> {
    /// `.osrel`
    pub os_release: &'a str,
    /// `.uname`
    pub uname: &'a str,
    /// `.cmdline`, without a line end.
    pub command_line: &'a str,
    /// Lines to add to the stub's `.sbat`; firmware does not read it, only shim does.
    pub sbat: &'a str,
    /// `.linux`
    pub linux: &'a [u8],
    /// `.kxsig`: the signature of the kernel's copy for a kexec; none where nothing is signed.
    pub kexec_signature: Option<&'a [u8]>,
    /// `.initrd`
    pub initrd: &'a [u8],
}

/// Why a UKI cannot be put together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum UkiError {
    #[error("the UKI stub is not usable: {0}")]
    Stub(#[from] PeError),
    #[error("the UKI stub is signed; the unsigned one is needed")]
    StubSigned,
    #[error("the UKI stub already has a section {name}")]
    SectionExists { name: &'static str },
    #[error("{name} is empty")]
    Empty { name: &'static str },
    #[error("the stub's headers have room for {room} more sections; {needed} are needed")]
    NoHeaderRoom { room: usize, needed: usize },
    #[error("the stub's section .sbat holds {room} bytes; {needed} are needed")]
    NoSbatRoom { room: usize, needed: usize },
    #[error("the UKI would be larger than a PE image can be (4 GiB)")]
    TooBig,
}

const CODE: u32 = 0x6000_0020; // CNT_CODE | MEM_EXECUTE | MEM_READ
const DATA: u32 = 0x4000_0040; // CNT_INITIALIZED_DATA | MEM_READ

/// Puts the UKI together.
pub fn assemble(stub: &[u8], parts: &Parts<'_>) -> Result<Vec<u8>, UkiError> {
    let (mut file, mut pe) = tidy(stub)?;
    let mut added: Vec<(&'static str, &[u8], u32)> = Vec::from([
        (".osrel", parts.os_release.as_bytes(), DATA),
        (".uname", parts.uname.as_bytes(), DATA),
        (".cmdline", parts.command_line.as_bytes(), DATA),
        (".initrd", parts.initrd, DATA),
        (".linux", parts.linux, CODE),
    ]);
    if let Some(signature) = parts.kexec_signature {
        added.insert(0, (SIGNATURE_SECTION, signature, DATA));
    }
    let room = (index(pe.size_of_headers) - (pe.table_offset + pe.sections.len() * SECTION_ENTRY)) / SECTION_ENTRY;
    let needed = added.len() + usize::from(pe.sections.iter().all(|section| section.name != ".sbat"));
    if room < needed {
        return Err(UkiError::NoHeaderRoom { room, needed });
    }
    if let Some(number) = pe.sections.iter().position(|section| section.name == ".sbat") {
        grow_sbat(&mut file, &mut pe, number, parts.sbat)?;
    } else {
        let sbat =
            format!("sbat,1,SBAT Version,sbat,1,https://github.com/rhboot/shim/blob/main/SBAT.md\n{}", parts.sbat);
        append(&mut file, &mut pe, ".sbat", sbat.as_bytes(), DATA)?;
    }
    for (name, content, characteristics) in added {
        if content.is_empty() {
            return Err(UkiError::Empty { name });
        }
        if pe.sections.iter().any(|section| section.name == name) {
            return Err(UkiError::SectionExists { name });
        }
        append(&mut file, &mut pe, name, content, characteristics)?;
    }
    let count = u16::try_from(pe.sections.len()).map_err(|_| UkiError::TooBig)?;
    file[pe.coff_offset + 2..pe.coff_offset + 4].copy_from_slice(&count.to_le_bytes());
    put(&mut file, pe.optional_offset + 56, pe.size_of_image);
    put(&mut file, pe.optional_offset + 60, pe.size_of_headers);
    let sum = checksum(&file, pe.optional_offset + CHECKSUM);
    put(&mut file, pe.optional_offset + CHECKSUM, sum);
    Ok(file)
}

/// An image of another program, laid out so that it can be signed: sections one after the other, nothing behind them.
pub fn realigned(image: &[u8]) -> Result<Vec<u8>, UkiError> {
    let (mut file, pe) = tidy(image)?;
    put(&mut file, pe.optional_offset + 60, pe.size_of_headers);
    let sum = checksum(&file, pe.optional_offset + CHECKSUM);
    put(&mut file, pe.optional_offset + CHECKSUM, sum);
    Ok(file)
}

/// The stub with its sections' file positions aligned, and nothing behind the last one (a symbol table, for example).
/// Distributions' stubs have been stripped into positions that are not aligned, which firmware may refuse.
fn tidy(stub: &[u8]) -> Result<(Vec<u8>, Pe), UkiError> {
    let pe = Pe::parse(stub)?;
    if pe.certificates != (0, 0) {
        return Err(UkiError::StubSigned);
    }
    let align = index(pe.file_alignment);
    let headers = index(pe.size_of_headers).min(stub.len());
    let mut file = stub[..headers].to_vec();
    file.resize(headers.next_multiple_of(align), 0);
    let table_end = pe.table_offset + pe.sections.len() * SECTION_ENTRY;
    if table_end > headers {
        return Err(PeError::CutShort { what: "the section table", offset: table_end, length: headers }.into());
    }
    let mut tidy = Pe { size_of_headers: small(file.len())?, ..pe };
    let mut order: Vec<usize> = (0..tidy.sections.len()).collect();
    order.sort_by_key(|number| tidy.sections[*number].raw_offset);
    for number in order {
        let section = &mut tidy.sections[number];
        let entry = tidy.table_offset + number * SECTION_ENTRY;
        if section.raw_size == 0 {
            // Where it has nothing may lie behind what is kept.
            section.raw_offset = 0;
            put(&mut file, entry + 20, 0);
            continue;
        }
        let begin = index(section.raw_offset);
        let content = &stub[begin..begin + index(section.raw_size)];
        section.raw_offset = small(file.len())?;
        file.extend_from_slice(content);
        file.resize(file.len().next_multiple_of(align), 0);
        section.raw_size = small(file.len())? - section.raw_offset;
        put(&mut file, entry + 16, section.raw_size);
        put(&mut file, entry + 20, section.raw_offset);
    }
    // PointerToSymbolTable and NumberOfSymbols: cut off above.
    put(&mut file, tidy.coff_offset + 8, 0);
    put(&mut file, tidy.coff_offset + 12, 0);
    Ok((file, tidy))
}

/// Adds lines to the stub's own `.sbat`: in place, since a second section of that name would not be read.
fn grow_sbat(file: &mut [u8], pe: &mut Pe, number: usize, lines: &str) -> Result<(), UkiError> {
    let section = &mut pe.sections[number];
    let (old, room) = (index(section.virtual_size.min(section.raw_size)), index(section.raw_size));
    let begin = index(section.raw_offset);
    // Some stubs count their padding as content.
    let old = file[begin..begin + old].iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    let needed = old + lines.len();
    if needed > room {
        return Err(UkiError::NoSbatRoom { room, needed });
    }
    file[begin + old..begin + needed].copy_from_slice(lines.as_bytes());
    section.virtual_size = small(needed)?;
    let entry = pe.table_offset + number * SECTION_ENTRY;
    put(file, entry + 8, pe.sections[number].virtual_size);
    Ok(())
}

fn append(file: &mut Vec<u8>, pe: &mut Pe, name: &str, content: &[u8], characteristics: u32) -> Result<(), UkiError> {
    let up = |value: u32| value.checked_next_multiple_of(pe.section_alignment).ok_or(UkiError::TooBig);
    let ends = pe
        .sections
        .iter()
        .map(|section| section.virtual_address.checked_add(section.virtual_size.max(section.raw_size)));
    let top = ends.chain([Some(pe.size_of_image)]).try_fold(0, |top, end| end.map(|end| top.max(end)));
    let virtual_address = up(top.ok_or(UkiError::TooBig)?)?;
    let raw_offset = small(file.len())?;
    file.extend_from_slice(content);
    file.resize(file.len().next_multiple_of(index(pe.file_alignment)), 0);
    let section = Section {
        name: name.into(),
        virtual_address,
        virtual_size: small(content.len())?,
        raw_offset,
        raw_size: small(file.len())? - raw_offset,
    };
    let entry = pe.table_offset + pe.sections.len() * SECTION_ENTRY;
    file[entry..entry + SECTION_ENTRY].fill(0);
    file[entry..entry + name.len()].copy_from_slice(name.as_bytes());
    for (at, value) in [
        (8, section.virtual_size),
        (12, section.virtual_address),
        (16, section.raw_size),
        (20, section.raw_offset),
        (36, characteristics),
    ] {
        put(file, entry + at, value);
    }
    pe.size_of_image = up(virtual_address.checked_add(section.virtual_size).ok_or(UkiError::TooBig)?)?;
    pe.sections.push(section);
    Ok(())
}

fn put(file: &mut [u8], at: usize, value: u32) {
    file[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

fn index(value: u32) -> usize {
    usize::try_from(value).expect("the builder runs on machines of at least 32 bits")
}

fn small(value: usize) -> Result<u32, UkiError> {
    u32::try_from(value).map_err(|_| UkiError::TooBig)
}
