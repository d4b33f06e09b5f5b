//! Reads PE32+ images far enough to take a UKI apart (Microsoft PE Format, "COFF File Header", "Optional Header",
//! "Section Table"; UAPI.5 Unified Kernel Image). Every offset is checked against the file. It neither maps an image
//! nor reads relocations, imports or signatures; who may boot a UKI is decided before it is parsed.

use std::ops::Range;

/// One section.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// Name, up to eight bytes.
    pub name: String,
    /// Address relative to the image base.
    pub virtual_address: u32,
    /// Its true length; what the file holds beyond it is padding.
    pub virtual_size: u32,
    /// Where it lies in the file.
    pub raw_offset: u32,
    /// How many bytes the file holds for it.
    pub raw_size: u32,
}

/// What the headers say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pe {
    /// File offset of the COFF header, behind `PE\0\0`.
    pub coff_offset: usize,
    /// File offset of the optional header.
    pub optional_offset: usize,
    /// File offset of the section table.
    pub table_offset: usize,
    /// Alignment of sections in memory.
    pub section_alignment: u32,
    /// Alignment of sections in the file.
    pub file_alignment: u32,
    /// Size of the image in memory.
    pub size_of_image: u32,
    /// Size of all headers in the file.
    pub size_of_headers: u32,
    /// Data directories that the optional header has (`NumberOfRvaAndSizes`).
    pub directories: u32,
    /// File offset and length of the attribute certificates (signatures); 0, 0 without.
    pub certificates: (u32, u32),
    /// The sections, in the table's order.
    pub sections: Vec<Section>,
}

/// Why bytes are no PE image that this reader takes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum PeError {
    #[error("not a PE image: {what} at byte {offset}")]
    NotPe { what: &'static str, offset: usize },
    #[error("cut short: {what} at byte {offset} lies beyond the file's {length} bytes")]
    CutShort { what: &'static str, offset: usize, length: usize },
    #[error("not a PE32+ image: optional header magic {got:#06x}, expected 0x020b")]
    NotPe32Plus { got: u16 },
    #[error("{what} is {got}; a power of two is needed, of at least 512 or both alike, in the file of at most 65536")]
    BadAlignment { what: &'static str, got: u32 },
    #[error("section {index} has a name that is not ASCII")]
    BadName { index: usize },
    #[error("there is no section {name}")]
    NoSection { name: &'static str },
    #[error("there are {count} sections {name}; one is expected")]
    Ambiguous { name: &'static str, count: usize },
    #[error("section {name} is to hold {virtual_size} bytes, and the file has only {raw_size}")]
    Truncated { name: &'static str, virtual_size: u32, raw_size: u32 },
    #[error("section {name} is not UTF-8 text")]
    NotText { name: &'static str },
    #[error("its headers have no place for a signature")]
    NoCertificateDirectory,
    #[error("its signatures are not at its end")]
    CertificatesNotLast,
    #[error("it has {count} sections or parts that overlap or lie before the others' end")]
    Overlap { count: usize },
    #[error("it is signed already: strip the signature first")]
    Signed,
}

fn bytes<const N: usize>(file: &[u8], offset: usize, what: &'static str) -> Result<[u8; N], PeError> {
    let end = offset.checked_add(N);
    end.and_then(|end| file.get(offset..end)).and_then(|slice| slice.try_into().ok()).ok_or(PeError::CutShort {
        what,
        offset,
        length: file.len(),
    })
}

fn half(file: &[u8], offset: usize, what: &'static str) -> Result<u16, PeError> {
    bytes(file, offset, what).map(u16::from_le_bytes)
}

fn word(file: &[u8], offset: usize, what: &'static str) -> Result<u32, PeError> {
    bytes(file, offset, what).map(u32::from_le_bytes)
}

fn index(value: u32) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// Length of one entry of the section table.
pub const SECTION_ENTRY: usize = 40;
/// Data directory of the attribute certificates.
pub(crate) const SECURITY_DIRECTORY: u32 = 4;
/// Where in the optional header it is named.
pub const CERTIFICATES: usize = 112 + SECURITY_DIRECTORY as usize * 8;
/// Where in the optional header the checksum is.
pub const CHECKSUM: usize = 64;
/// Where in the optional header it says whose program it is: 10 to 13 are EFI's.
pub(crate) const SUBSYSTEM: usize = 68;

/// The PE checksum: 16-bit words added with end-around carry, the field itself (at `field`) left out, plus the file's
/// length.
pub fn checksum(file: &[u8], field: usize) -> u32 {
    let mut sum: u32 = 0;
    for (number, pair) in file.chunks(2).enumerate() {
        let at = number * 2;
        if at == field || at == field + 2 {
            continue;
        }
        sum += u32::from(u16::from_le_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let length = u32::try_from(file.len()).unwrap_or(u32::MAX);
    ((sum & 0xffff) + (sum >> 16)).wrapping_add(length)
}

impl Pe {
    /// Reads the headers. Every section's bytes are known to lie in the file afterwards.
    pub fn parse(file: &[u8]) -> Result<Self, PeError> {
        Self::parse_head(file, file.len())
    }

    /// The same for a file of `length` bytes of which only the beginning is at hand: a UKI need not be held in memory
    /// to be taken apart. Headers beyond that beginning are [`PeError::CutShort`].
    pub fn parse_head(file: &[u8], length: usize) -> Result<Self, PeError> {
        if bytes::<2>(file, 0, "the DOS header")? != *b"MZ" {
            return Err(PeError::NotPe { what: "no MZ", offset: 0 });
        }
        let signature = index(word(file, 0x3c, "the PE header's offset")?);
        if bytes::<4>(file, signature, "the PE signature")? != *b"PE\0\0" {
            return Err(PeError::NotPe { what: "no PE signature", offset: signature });
        }
        // `bytes` has shown that signature + 4 lies in the file, so small sums with it cannot overflow.
        let coff_offset = signature + 4;
        let count = usize::from(half(file, coff_offset + 2, "the number of sections")?);
        let optional_size = usize::from(half(file, coff_offset + 16, "the optional header's size")?);
        let optional_offset = coff_offset + 20;
        let magic = half(file, optional_offset, "the optional header")?;
        if magic != 0x020b {
            return Err(PeError::NotPe32Plus { got: magic });
        }
        let optional = |at: usize, what| {
            if at + 4 > optional_size {
                return Err(PeError::CutShort { what, offset: optional_offset + at, length: file.len() });
            }
            word(file, optional_offset + at, what)
        };
        let section_alignment = optional(32, "SectionAlignment")?;
        let file_alignment = optional(36, "FileAlignment")?;
        // PE format, "Optional Header Windows-Specific Fields": at least 512, or both the same and less than a page, as iPXE
        // has them (32). In the file at most 64 KiB: what is laid out anew grows by it.
        let least = if section_alignment == file_alignment { 1 } else { 512 };
        for (what, got, most) in
            [("SectionAlignment", section_alignment, u32::MAX), ("FileAlignment", file_alignment, 1 << 16)]
        {
            if !got.is_power_of_two() || got < least || got > most {
                return Err(PeError::BadAlignment { what, got });
            }
        }
        let directories = optional(108, "NumberOfRvaAndSizes")?;
        let certificates = if directories > SECURITY_DIRECTORY {
            let what = "the certificate directory";
            (optional(CERTIFICATES, what)?, optional(CERTIFICATES + 4, what)?)
        } else {
            (0, 0)
        };
        let table_offset = optional_offset + optional_size;
        let mut sections = Vec::with_capacity(count);
        for number in 0..count {
            let at = table_offset + number * SECTION_ENTRY;
            let name = bytes::<8>(file, at, "the section table")?;
            let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
            let name = std::str::from_utf8(&name[..end]).ok().filter(|name| name.is_ascii());
            let field = |offset| word(file, at + offset, "the section table");
            let section = Section {
                name: name.ok_or(PeError::BadName { index: number })?.to_owned(),
                virtual_size: field(8)?,
                virtual_address: field(12)?,
                raw_size: field(16)?,
                raw_offset: field(20)?,
            };
            let end = index(section.raw_offset).checked_add(index(section.raw_size));
            if end.is_none_or(|end| end > length) {
                let offset = index(section.raw_offset);
                return Err(PeError::CutShort { what: "a section's content", offset, length });
            }
            sections.push(section);
        }
        Ok(Self {
            coff_offset,
            optional_offset,
            table_offset,
            section_alignment,
            file_alignment,
            size_of_image: optional(56, "SizeOfImage")?,
            size_of_headers: optional(60, "SizeOfHeaders")?,
            directories,
            certificates,
            sections,
        })
    }

    /// Where in the file the content of the one section `name` lies, without padding.
    pub fn place(&self, name: &'static str) -> Result<Range<usize>, PeError> {
        let mut named = self.sections.iter().filter(|section| section.name == name);
        let section = named.next().ok_or(PeError::NoSection { name })?;
        let more = named.count();
        if more > 0 {
            return Err(PeError::Ambiguous { name, count: more + 1 });
        }
        let Section { virtual_size, raw_size, raw_offset, .. } = *section;
        if virtual_size > raw_size {
            return Err(PeError::Truncated { name, virtual_size, raw_size });
        }
        // `parse` has shown that the whole section lies in the file, so the sum cannot overflow.
        let begin = index(raw_offset);
        Ok(begin..begin + index(virtual_size))
    }

    /// The content of the one section `name`, without padding. `file` is what was parsed.
    pub fn content<'a>(&self, file: &'a [u8], name: &'static str) -> Result<&'a [u8], PeError> {
        let place = self.place(name)?;
        let offset = place.start;
        file.get(place).ok_or(PeError::CutShort { what: "a section's content", offset, length: file.len() })
    }
}

/// A UKI's parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Uki<'a> {
    /// `.linux`
    pub linux: &'a [u8],
    /// `.initrd`
    pub initrd: &'a [u8],
    /// `.cmdline`
    pub command_line: &'a str,
    /// `.osrel`
    pub os_release: &'a str,
    /// `.uname`
    pub uname: &'a str,
}

impl<'a> Uki<'a> {
    /// Takes a UKI apart.
    pub fn split(file: &'a [u8]) -> Result<Self, PeError> {
        let pe = Pe::parse(file)?;
        let text = |name| std::str::from_utf8(pe.content(file, name)?).map_err(|_| PeError::NotText { name });
        Ok(Self {
            linux: pe.content(file, ".linux")?,
            initrd: pe.content(file, ".initrd")?,
            command_line: text(".cmdline")?,
            os_release: text(".osrel")?,
            uname: text(".uname")?,
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A PE32+ file of headers and the given sections, 512-aligned.
    pub(crate) fn image(sections: &[(&str, &[u8])]) -> Vec<u8> {
        let mut file = vec![0_u8; 512];
        file[..2].copy_from_slice(b"MZ");
        file[0x3c] = 0x40;
        file[0x40..0x44].copy_from_slice(b"PE\0\0");
        file[0x46] = u8::try_from(sections.len()).unwrap();
        file[0x54] = 240;
        let optional = 0x58;
        file[optional..optional + 2].copy_from_slice(&0x020b_u16.to_le_bytes());
        for (at, value) in [(32, 4096_u32), (36, 512), (56, 4096), (60, 512), (108, 16)] {
            file[optional + at..optional + at + 4].copy_from_slice(&value.to_le_bytes());
        }
        for (number, (name, content)) in sections.iter().enumerate() {
            let entry = optional + 240 + number * SECTION_ENTRY;
            let offset = file.len();
            file.extend_from_slice(content);
            file.resize(file.len().next_multiple_of(512), 0);
            file[entry..entry + name.len()].copy_from_slice(name.as_bytes());
            let raw = file.len() - offset;
            for (at, value) in [(8, content.len()), (12, 4096 * (number + 1)), (16, raw), (20, offset)] {
                let value = u32::try_from(value).unwrap();
                file[entry + at..entry + at + 4].copy_from_slice(&value.to_le_bytes());
            }
        }
        file
    }

    const PARTS: [(&str, &[u8]); 5] = [
        (".osrel", b"ID=debian\n"),
        (".uname", b"6.12"),
        (".cmdline", b"quiet"),
        (".linux", &[1; 700]),
        (".initrd", &[2; 3]),
    ];

    #[test]
    fn a_uki_is_taken_apart_to_the_byte() {
        let file = image(&PARTS);
        let uki = Uki::split(&file).unwrap();
        assert_eq!((uki.linux, uki.initrd), (&[1_u8; 700][..], &[2_u8; 3][..]));
        assert_eq!((uki.command_line, uki.os_release, uki.uname), ("quiet", "ID=debian\n", "6.12"));
    }

    #[test]
    fn missing_and_doubled_sections_are_refused() {
        assert_eq!(Uki::split(&image(&PARTS[1..])), Err(PeError::NoSection { name: ".osrel" }));
        let mut twice = PARTS.to_vec();
        twice.truncate(4);
        twice[3] = (".cmdline", b"other");
        let file = image(&twice);
        let error = Pe::parse(&file).unwrap().content(&file, ".cmdline").unwrap_err();
        assert_eq!(error, PeError::Ambiguous { name: ".cmdline", count: 2 });
    }

    #[test]
    fn the_head_alone_says_where_the_parts_lie() {
        let file = image(&PARTS);
        let pe = Pe::parse_head(&file[..1024], file.len()).unwrap();
        assert_eq!(&file[pe.place(".linux").unwrap()], &[1; 700]);
        let offset = usize::try_from(pe.sections[4].raw_offset).unwrap();
        let error = Pe::parse_head(&file[..1024], offset + 511).unwrap_err();
        assert_eq!(error, PeError::CutShort { what: "a section's content", offset, length: offset + 511 });
        assert!(Pe::parse_head(&file[..0x58], file.len()).is_err(), "headers that are not at hand");
    }

    proptest! {
        #[test]
        fn every_cut_is_noticed(cut in 0_usize..3072) {
            let file = image(&PARTS);
            prop_assume!(cut < file.len());
            prop_assert!(Uki::split(&file[..cut]).is_err());
        }

        #[test]
        fn no_header_makes_the_reader_panic(at in 0_usize..512, value: u32) {
            let mut file = image(&PARTS);
            let end = (at + 4).min(512);
            file[at..end].copy_from_slice(&value.to_le_bytes()[..end - at]);
            let _ = Uki::split(&file);
        }
    }
}
