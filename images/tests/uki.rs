//! What the UKI writer writes, other readers of PE read back: goblin here, and the release crate's own.
#![allow(clippy::unwrap_used)]

use goblin::pe::PE;
use kiln_images::uki::{Parts, UkiError, assemble};
use kiln_release::pe::{Pe, SECTION_ENTRY, Uki};
use proptest::prelude::*;

/// What a stub is made of.
#[derive(Debug, Clone)]
struct Stub {
    /// Name, content, and bytes of slack before it in the file (not a multiple of any alignment).
    sections: Vec<(String, Vec<u8>, usize)>,
    headers: usize,
    tail: Vec<u8>,
    signed: bool,
}

const OPTIONAL: usize = 0x98;

fn stub_bytes(stub: &Stub) -> Vec<u8> {
    let mut file = vec![0_u8; stub.headers];
    let put = |file: &mut Vec<u8>, at: usize, value: usize| {
        file[at..at + 4].copy_from_slice(&u32::try_from(value).unwrap().to_le_bytes());
    };
    file[..2].copy_from_slice(b"MZ");
    file[0x3c] = 0x80;
    file[0x80..0x84].copy_from_slice(b"PE\0\0");
    file[0x84..0x86].copy_from_slice(&0x8664_u16.to_le_bytes());
    file[0x86] = u8::try_from(stub.sections.len()).unwrap();
    file[0x94] = 240;
    file[0x96] = 0x2e;
    file[OPTIONAL..OPTIONAL + 2].copy_from_slice(&0x020b_u16.to_le_bytes());
    for (at, value) in [(32, 4096), (36, 512), (60, stub.headers), (108, 16)] {
        put(&mut file, OPTIONAL + at, value);
    }
    file[OPTIONAL + 68] = 10; // EFI application
    let mut address = 4096;
    for (number, (name, content, slack)) in stub.sections.iter().enumerate() {
        file.resize(file.len() + slack, 0);
        let entry = OPTIONAL + 240 + number * SECTION_ENTRY;
        let offset = file.len();
        file.extend_from_slice(content);
        file[entry..entry + name.len()].copy_from_slice(name.as_bytes());
        // CNT_INITIALIZED_DATA | MEM_READ
        for (at, value) in [(8, content.len()), (12, address), (16, content.len()), (20, offset), (36, 0x4000_0040)] {
            put(&mut file, entry + at, value);
        }
        address += content.len().next_multiple_of(4096);
    }
    put(&mut file, OPTIONAL + 56, address);
    if !stub.tail.is_empty() {
        let symbols = file.len();
        put(&mut file, 0x8c, symbols);
        put(&mut file, 0x90, 1);
        file.extend_from_slice(&stub.tail);
    }
    if stub.signed {
        let at = file.len();
        put(&mut file, OPTIONAL + 112 + 32, at);
        put(&mut file, OPTIONAL + 112 + 36, 8);
        file.extend_from_slice(&[8; 8]);
    }
    file
}

fn plain() -> Stub {
    let text = (".text".to_owned(), vec![0x90; 600], 0);
    let mut sbat = b"sbat,1,SBAT Version,sbat,1,-\nsystemd-stub,1,-,-,257,-\n".to_vec();
    sbat.resize(512, 0);
    Stub { sections: vec![text, (".sbat".into(), sbat, 0)], headers: 1536, tail: vec![], signed: false }
}

fn parts<'a>(linux: &'a [u8], initrd: &'a [u8]) -> Parts<'a> {
    Parts {
        os_release: "ID=debian\nIMAGE_VERSION=3\n",
        uname: "6.12.1-cloud-amd64",
        command_line: "console=ttyS0",
        sbat: "kiln.test,1,Kiln,test,3,-\n",
        linux,
        initrd,
    }
}

/// The PE checksum as its definition has it: all words but the field's own, folded at the end, plus the length.
fn checksum(file: &[u8]) -> u64 {
    let field = OPTIONAL + 64;
    let word = |at: usize| u64::from(file[at]) | u64::from(file.get(at + 1).copied().unwrap_or(0)) << 8;
    let sum: u64 = (0..file.len()).step_by(2).filter(|at| !(field..field + 4).contains(at)).map(word).sum();
    let folded = if sum == 0 { 0 } else { (sum - 1) % 0xffff + 1 };
    folded + file.len() as u64
}

proptest! {
    #[test]
    fn every_reader_finds_the_same_parts(
        sections in prop::collection::vec((prop::collection::vec(any::<u8>(), 1..5000), 0_usize..300), 1..5),
        slack in 0_usize..512,
        tail in prop::collection::vec(any::<u8>(), 0..40),
        linux in prop::collection::vec(any::<u8>(), 1..5000),
        initrd in prop::collection::vec(any::<u8>(), 1..5000),
    ) {
        let sections: Vec<_> = sections.into_iter().enumerate()
            .map(|(number, (content, slack))| (format!(".s{number}"), content, slack)).collect();
        let stub = Stub { sections, headers: 1536 + slack, tail, signed: false };
        let uki = assemble(&stub_bytes(&stub), &parts(&linux, &initrd)).unwrap();

        let split = Uki::split(&uki).unwrap();
        prop_assert_eq!((split.linux, split.initrd), (&linux[..], &initrd[..]));
        prop_assert_eq!(split.command_line, "console=ttyS0");
        prop_assert_eq!(split.uname, "6.12.1-cloud-amd64");

        let goblin = PE::parse(&uki).unwrap();
        let optional = goblin.header.optional_header.unwrap();
        let fields = optional.windows_fields;
        let mut address = 0;
        for (number, section) in goblin.sections.iter().enumerate() {
            let (begin, size) = (section.pointer_to_raw_data, section.size_of_raw_data);
            prop_assert_eq!(section.virtual_address % fields.section_alignment, 0);
            prop_assert_eq!((begin % fields.file_alignment, size % fields.file_alignment), (0, 0), "{}", number);
            prop_assert!(begin >= fields.size_of_headers);
            prop_assert!(section.virtual_address >= address, "sections overlap in memory");
            address = section.virtual_address + section.virtual_size;
            if let Some((name, content, _)) = stub.sections.get(number) {
                prop_assert_eq!(section.name().unwrap(), name.as_str());
                prop_assert_eq!(&uki[begin as usize..][..content.len()], &content[..], "the stub's own bytes stay");
            }
        }
        prop_assert_eq!(fields.size_of_image, address.next_multiple_of(fields.section_alignment));
        prop_assert_eq!(u64::from(fields.check_sum), checksum(&uki));
        prop_assert_eq!(goblin.header.coff_header.pointer_to_symbol_table, 0);
        prop_assert_eq!(uki.len() % fields.file_alignment as usize, 0);
    }
}

#[test]
fn the_stubs_sbat_grows_in_place() {
    let uki = assemble(&stub_bytes(&plain()), &parts(b"kernel", b"initrd")).unwrap();
    let pe = Pe::parse(&uki).unwrap();
    let sbat = std::str::from_utf8(pe.content(&uki, ".sbat").unwrap()).unwrap();
    assert_eq!(sbat, "sbat,1,SBAT Version,sbat,1,-\nsystemd-stub,1,-,-,257,-\nkiln.test,1,Kiln,test,3,-\n");
    let names: Vec<_> = pe.sections.iter().map(|section| section.name.as_str()).collect();
    assert_eq!(names, [".text", ".sbat", ".osrel", ".uname", ".cmdline", ".initrd", ".linux"]);
}

#[test]
fn stubs_that_cannot_carry_a_release_are_refused() {
    let try_it = |stub: &Stub| assemble(&stub_bytes(stub), &parts(b"k", b"i")).unwrap_err();
    assert_eq!(try_it(&Stub { signed: true, ..plain() }), UkiError::StubSigned);
    // The headers are rounded up to 512 bytes: room for one more entry.
    assert_eq!(try_it(&Stub { headers: 512 - 32, ..plain() }), UkiError::NoHeaderRoom { room: 1, needed: 5 });
    let mut again = plain();
    again.sections[0].0 = ".linux".into();
    assert_eq!(try_it(&again), UkiError::SectionExists { name: ".linux" });
    let mut full = plain();
    full.sections[1].1 = vec![b'x'; 512];
    assert_eq!(try_it(&full), UkiError::NoSbatRoom { room: 512, needed: 538 });
    let empty = assemble(&stub_bytes(&plain()), &parts(b"", b"i")).unwrap_err();
    assert_eq!(empty, UkiError::Empty { name: ".linux" });
}
