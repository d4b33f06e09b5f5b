//! Files that images are made of: PE programs, initramfs archives, tar archives, verity trees.

/// PE images, UKIs, and Authenticode.
pub mod pe {
    use kiln_images::uki::{Parts, assemble, realigned};
    use kiln_release::Signer;
    use kiln_release::authenticode::{digest, sign, strip};
    use kiln_release::certificate::self_signed_certificate;
    use kiln_release::kexec;
    use kiln_release::measured::pcr11;
    use kiln_release::pe::{Pe, Uki};
    use kiln_release::pkcs7::Certificate;
    use std::convert::Infallible;

    pub fn run(data: &[u8]) {
        let whole = Pe::parse(data);
        for length in [data.len() / 2, 512, 1024] {
            let head = data.get(..length).unwrap_or(data);
            if let Ok(pe) = Pe::parse_head(head, data.len()) {
                assert_eq!(Ok(&pe), whole.as_ref(), "the head alone says something else");
            }
        }
        let Ok(pe) = whole else {
            assert!(Uki::split(data).is_err() && digest(data).is_err() && strip(data).is_err());
            return;
        };
        for name in [".linux", ".initrd", ".cmdline", ".osrel", ".uname"] {
            if let Ok(place) = pe.place(name) {
                assert_eq!(pe.content(data, name), Ok(&data[place]), "{name}");
            }
        }
        if let Ok(uki) = Uki::split(data) {
            assert!(uki.linux.len() + uki.initrd.len() <= 2 * data.len());
        }
        let _ = pcr11(data);
        if let Ok(bare) = strip(data) {
            assert_eq!(strip(&bare).as_ref(), Ok(&bare), "a stripped image was not stripped");
            if let Ok(hash) = digest(data) {
                assert_eq!(digest(&bare), Ok(hash), "a signature counts in what it signs");
                resign(&bare);
            }
        }
        if let Ok(tidy) = realigned(data) {
            let again = Pe::parse(&tidy).expect("what was laid out anew is an image");
            assert_eq!(again.sections.len(), pe.sections.len());
        }
        if let Ok(copy) = kexec::copy(data, &[8; 16]) {
            let begin = u32::try_from(copy.len() - 16).expect("an image has less than 4 GiB");
            let changed = Pe { certificates: (begin, 16), ..pe.clone() };
            assert_eq!(Pe::parse(&copy), Ok(changed), "only what says that it is signed, and for nobody's firmware");
        }
        let parts = Parts {
            os_release: "ID=x\n",
            uname: "6",
            command_line: "quiet",
            sbat: "x,1\n",
            linux: b"L",
            kexec_signature: Some(&b"S"[..]),
            initrd: b"I",
        };
        if let Ok(uki) = assemble(data, &parts) {
            let split = Uki::split(&uki).expect("what was put together can be taken apart");
            assert_eq!((split.linux, split.initrd, split.command_line), (&b"L"[..], &b"I"[..], "quiet"));
            assert!(strip(data).is_err() || digest(&uki).is_ok(), "a UKI can be signed");
        }
    }

    /// A signature put on comes off again, and leaves the digest as it was.
    fn resign(bare: &[u8]) {
        let certificate = self_signed_certificate(&Signer::from_seed(&[5; 32]));
        let certificate = Certificate::parse(&certificate).expect("a certificate of our own");
        let Ok(signed) = sign(bare, &certificate, |_| Ok::<_, Infallible>(vec![9; 256])) else { return };
        let unsigned = strip(&signed).expect("what was signed is an image");
        assert_eq!(digest(&signed), digest(&unsigned));
        assert_eq!(unsigned.len(), bare.len().next_multiple_of(8), "only what fills up to eight bytes stays");
    }

    /// Headers and the given sections, 512-aligned.
    fn image(sections: &[(&str, &[u8])], certificates: &[u8]) -> Vec<u8> {
        let mut file = vec![0; 1024];
        let put = |file: &mut Vec<u8>, at: usize, value: usize| {
            file[at..at + 4].copy_from_slice(&u32::try_from(value).expect("small").to_le_bytes());
        };
        file[..2].copy_from_slice(b"MZ");
        file[0x3c] = 0x40;
        file[0x40..0x44].copy_from_slice(b"PE\0\0");
        file[0x46] = u8::try_from(sections.len()).expect("few");
        file[0x54] = 240;
        let optional = 0x58;
        put(&mut file, optional, 0x020b);
        for (at, value) in [(32, 4096), (36, 512), (56, 4096 * (sections.len() + 1)), (60, 1024), (108, 16)] {
            put(&mut file, optional + at, value);
        }
        for (number, (name, content)) in sections.iter().enumerate() {
            let (entry, offset) = (optional + 240 + number * 40, file.len());
            file.extend_from_slice(content);
            file.resize(file.len().next_multiple_of(512), 0);
            file[entry..entry + name.len()].copy_from_slice(name.as_bytes());
            let raw = file.len() - offset;
            for (at, value) in [(8, content.len()), (12, 4096 * (number + 1)), (16, raw), (20, offset)] {
                put(&mut file, entry + at, value);
            }
        }
        if !certificates.is_empty() {
            let at = file.len();
            put(&mut file, optional + 144, at);
            put(&mut file, optional + 148, certificates.len());
            file.extend_from_slice(certificates);
        }
        file
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        let uki: [(&str, &[u8]); 6] = [
            (".text", &[0x90; 30]),
            (".osrel", b"ID=debian\n"),
            (".uname", b"6.12"),
            (".cmdline", b"quiet"),
            (".linux", &[1; 700]),
            (".initrd", &[2; 3]),
        ];
        let sbat: (&str, &[u8]) = (".sbat", b"sbat,1,SBAT Version,sbat,1,-\n\0\0\0\0");
        // A header that counts one directory too few for signatures.
        let mut four = image(&uki, &[]);
        four[0x58 + 108] = 4;
        // A section with nothing in the file, which lies behind all that is laid out anew.
        let mut behind = image(&[uki[0], (".bss", b"")], &[]);
        behind.resize(8192, 0);
        behind[0x58 + 240 + 40 + 20..][..4].copy_from_slice(&4096_u32.to_le_bytes());
        vec![image(&uki, &[]), image(&uki, &[8; 16]), image(&[uki[0], sbat], &[]), image(&uki[..1], &[]), four, behind]
    }
}

/// The builder's initramfs archive, read back by a reader that shares nothing with it.
pub mod cpio {
    use kiln_images::cpio::{Archive, Node};
    use std::collections::BTreeMap;

    /// Entry by path: mode with type, content.
    type Entries = BTreeMap<String, (u32, Vec<u8>)>;

    /// What the kernel's unpacker does (init/initramfs.c), for archives of one segment.
    fn unpack(mut rest: &[u8]) -> Entries {
        let mut entries = Entries::new();
        loop {
            assert_eq!(&rest[..6], b"070701");
            let field = |n: usize| {
                let text = std::str::from_utf8(&rest[6 + 8 * n..14 + 8 * n]).expect("ASCII");
                u32::from_str_radix(text, 16).expect("eight hex digits")
            };
            let (mode, size, name_size) = (field(1), field(6) as usize, field(11) as usize);
            let name = &rest[110..110 + name_size - 1];
            assert_eq!(rest[110 + name_size - 1], 0);
            let begin = (110 + name_size).next_multiple_of(4);
            let name = std::str::from_utf8(name).expect("paths are text").to_owned();
            if name == "TRAILER!!!" {
                assert!(rest[begin..].iter().all(|b| *b == 0), "something behind the trailer");
                return entries;
            }
            let content = rest[begin..begin + size].to_vec();
            if let Some((parent, _)) = name.rsplit_once('/') {
                assert_eq!(entries[parent].0 >> 12, 0o4, "{name}: its folder does not come before it");
            }
            assert!(entries.insert(name, (mode, content)).is_none(), "an entry twice");
            rest = &rest[(begin + size).next_multiple_of(4)..];
        }
    }

    /// Lines `KIND MODE PATH CONTENT`; what cannot be added is left out, and the rest must be found again.
    pub fn run(data: &[u8]) {
        let mut archive = Archive::default();
        let mut expected = Entries::new();
        for line in data.split(|b| *b == b'\n').take(64) {
            let Ok(line) = std::str::from_utf8(line) else { continue };
            let mut words = line.splitn(4, ' ');
            let mut word = || words.next().unwrap_or_default();
            let (kind, mode, path, content) = (word(), word(), word(), word());
            let mode = u32::from_str_radix(mode, 8).unwrap_or(0o644);
            let (bits, node, bytes) = match kind {
                "d" => (0o040_000, Node::Directory, Vec::new()),
                "l" => (0o120_000, Node::Symlink(content.to_owned()), content.as_bytes().to_vec()),
                "c" => (0o020_000, Node::CharDevice { major: 5, minor: 1 }, Vec::new()),
                _ => (0o100_000, Node::File(content.as_bytes().to_vec()), content.as_bytes().to_vec()),
            };
            if archive.add(path, mode, node).is_ok() {
                for (end, _) in path.match_indices('/') {
                    expected.entry(path[..end].to_owned()).or_insert((0o040_755, Vec::new()));
                }
                expected.insert(path.to_owned(), (bits | (mode & 0o7777), bytes));
            }
        }
        assert_eq!(unpack(&archive.into_bytes(7)), expected);
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        let texts = [
            "f 755 init #!\nf 644 kiln/boot.json {}\nd 700 kiln\nl 777 bin usr/bin\nc 600 dev/console\n",
            "f 644 a/b/c x\nd 755 a\nf 644 a y\nf 644 TRAILER!!! z\nf 644 TRAILER!!!/z z\nf 644 ../x y\nf 4755 a/b/d \n",
        ];
        texts.map(|text| text.as_bytes().to_vec()).to_vec()
    }
}

/// Tar archives as layers.
pub mod tar {
    use kiln_images::tarball::{Added, Content, Entry, entries, layer};

    fn outline(entry: &Entry, archive: &[u8]) -> impl PartialEq + std::fmt::Debug + use<> {
        let Entry { path, kind, mode, uid, gid, xattrs, data, .. } = entry.clone();
        (path, kind, mode, uid, gid, xattrs, archive[data].to_vec())
    }

    pub fn run(data: &[u8]) {
        let Ok(read) = entries(data) else {
            assert!(layer(data, |_| false, &[]).is_err());
            return;
        };
        for entry in &read {
            assert!(entry.path.starts_with('/') && entry.data.end <= data.len());
        }
        let outlines =
            |archive: &[u8], all: &[Entry]| all.iter().map(|entry| outline(entry, archive)).collect::<Vec<_>>();
        if let Ok(copy) = layer(data, |_| false, &[]) {
            let again = entries(&copy).expect("a layer is an archive");
            assert_eq!(outlines(&copy, &again), outlines(data, &read), "nothing was changed");
        }
        let added = Added { path: "/usr/lib/kiln/x".into(), mode: 0o640, content: Content::File(b"new".to_vec()) };
        if let Ok(more) = layer(data, |entry| entry.path.starts_with("/tmp/"), &[added]) {
            let again = entries(&more).expect("a layer is an archive");
            let ours: Vec<_> = again.iter().filter(|entry| entry.path == "/usr/lib/kiln/x").collect();
            assert_eq!(ours.len(), 1);
            assert_eq!((&more[ours[0].data.clone()], ours[0].mode, ours[0].uid), (&b"new"[..], 0o640, 0));
            assert!(again.iter().all(|entry| !entry.path.starts_with("/tmp/")));
        }
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        let empty = vec![0; 1024];
        let add = |path: &str, content| Added { path: path.into(), mode: 0o755, content };
        let long = format!("/usr/{}/x", "long".repeat(40));
        let added = [
            add("/usr/bin/x", Content::File(b"#!/bin/sh\n".to_vec())),
            add("/bin", Content::Symlink("usr/bin".into())),
            add("/tmp/y", Content::Directory),
            add(&long, Content::File(vec![7; 600])),
        ];
        let whole = layer(&empty, |_| false, &added).expect("plain paths");
        vec![empty, whole.clone(), whole[..whole.len() - 1024].to_vec()]
    }
}

/// The verity superblock, and an artifact whose bytes were changed.
pub mod verity {
    use kiln_release::verity::{BLOCK, Checker, Superblock, TreeBuilder, hash_area_length};
    use kiln_release::{VerityError, VerityParams, hex};
    use std::ops::Range;
    use std::sync::LazyLock;

    const BLOCKS: usize = 3;
    const SALT: &[u8] = b"salt";
    /// The superblock's UUID is free.
    const UUID: Range<usize> = BLOCKS * BLOCK + 16..BLOCKS * BLOCK + 32;

    static ARTIFACT: LazyLock<(VerityParams, Vec<u8>)> = LazyLock::new(|| {
        let mut builder = TreeBuilder::new(SALT, [9; 16]).expect("a short salt");
        let data: Vec<u8> = (0..BLOCKS * BLOCK).map(|n| u8::try_from(n % 251).expect("small")).collect();
        for block in data.as_chunks::<BLOCK>().0 {
            builder.push_block(block);
        }
        let tree = builder.finish().expect("there is data");
        let params = VerityParams {
            root_hash: hex::encode(&tree.root_hash),
            salt: hex::encode(SALT),
            data_blocks: BLOCKS as u64,
            hash_offset: (BLOCKS * BLOCK) as u64,
        };
        (params, [data, tree.hash_area].concat())
    });

    fn check(artifact: &[u8], piece: usize) -> Result<(), VerityError> {
        let mut checker = Checker::new(&ARTIFACT.0)?;
        artifact.chunks(piece.max(1)).try_for_each(|piece| checker.push(piece))?;
        checker.finish()
    }

    /// A first byte of 0: a superblock and a number of blocks. Else changes of an artifact, three bytes each.
    pub fn run(data: &[u8]) {
        let Some((choice, rest)) = super::super::choice(data) else { return };
        if choice == 0 {
            if let Some(block) = rest.first_chunk::<BLOCK>()
                && let Ok(read) = Superblock::parse(block)
            {
                assert_eq!(read.to_block().as_ref(), Ok(block), "two blocks are one superblock");
            }
            if let Some(number) = rest.first_chunk::<8>() {
                let blocks = u64::from_le_bytes(*number) >> 16;
                let length = hash_area_length(blocks);
                assert!(length.is_multiple_of(BLOCK as u64) && length / (BLOCK as u64) <= 2 + blocks / 64);
                let params = VerityParams { data_blocks: blocks, hash_offset: blocks << 12, ..ARTIFACT.0.clone() };
                let whole = params.hash_offset + length;
                assert_eq!(params.check(whole).is_ok(), blocks > 0);
                assert!(params.check(whole + 1).is_err());
            }
            return;
        }
        let (_, good) = &*ARTIFACT;
        let mut artifact = good.clone();
        for change in rest.as_chunks::<3>().0.iter().take(8) {
            let at = usize::from(u16::from_le_bytes([change[0], change[1]])) % artifact.len();
            artifact[at] = change[2];
        }
        let cut = artifact.len() - usize::from(rest.len() % 5 == 4);
        artifact.truncate(cut);
        let same = artifact.len() == good.len()
            && artifact.iter().zip(good).enumerate().all(|(at, (a, b))| a == b || UUID.contains(&at));
        let verdict = check(&artifact, artifact.len());
        assert_eq!(verdict.is_ok(), same, "{verdict:?}");
        assert_eq!(check(&artifact, choice * 37), verdict, "in pieces, another verdict");
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        let superblock = &ARTIFACT.1[BLOCKS * BLOCK..(BLOCKS + 1) * BLOCK];
        let uuid = u16::try_from(UUID.start).expect("small").to_le_bytes();
        vec![
            [&[0], superblock].concat(),
            [&[0][..], &(300_u64 << 16).to_le_bytes()].concat(),
            vec![1],
            vec![100, uuid[0], uuid[1], 5],
            vec![7, 0, 0, 1, 0, 0x30, 1, 0, 0x40, 1],
            vec![7, 0, 0, 0, 0],
        ]
    }
}
