//! What comes from a TPM, and from the firmware beside it.

/// Answers to commands.
pub mod tpm_answer {
    use kiln_protocol::tpm::command::{self, answer_length};
    use kiln_protocol::tpm::{Auth, Command, OWNER, Template, TpmError};

    const RAW: usize = 0x80;

    /// Hands bytes to one command's reader, and says how its answer begins and what came of it.
    fn ask<T: PartialEq + std::fmt::Debug>(command: &Command<T>, raw: bool, body: &[u8]) -> Result<(), TpmError> {
        let bytes = if raw {
            body.to_vec()
        } else {
            // The header that the body needs to be read at all: the tag is the command's own.
            let length = u32::try_from(10 + body.len()).expect("inputs are short");
            [&command.bytes()[..2], &length.to_be_bytes(), &[0; 4], body].concat()
        };
        let first = command.answer(&bytes);
        assert_eq!(command.answer(&bytes), first);
        if first.is_ok() {
            let header = *bytes.first_chunk::<10>().expect("an answer has a header");
            assert_eq!(answer_length(header), bytes.len());
            assert!(command.answer(&[&bytes[..], &[0]].concat()).is_err(), "a byte too many");
        }
        first.map(drop)
    }

    pub fn run(data: &[u8]) {
        let Some((choice, body)) = super::super::choice(data) else { return };
        let raw = choice & RAW != 0;
        let _ = match (choice & !RAW) % 12 {
            0 => ask(&command::get_random(8), raw, body),
            1 => ask(&command::pcr_read(11), raw, body),
            2 => ask(&command::create_primary(OWNER, Template::Storage), raw, body),
            3 => ask(&command::seal(1, b"secret", &[]), raw, body),
            4 => ask(&command::load(1, b"private", b"public"), raw, body),
            5 => ask(&command::unseal(1, Auth::Session(2)), raw, body),
            6 => ask(&command::start_policy(&[1; 16]), raw, body),
            7 => ask(&command::policy_secret(1, 2), raw, body),
            8 => ask(&command::quote(1, &[2; 32]), raw, body),
            9 => ask(&command::nv_size(3), raw, body),
            10 => ask(&command::pcr_extend(11, &[1; 32]), raw, body),
            _ => ask(&command::nv_read(3, 64, 0), raw, body),
        };
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        let sized = |bytes: &[u8]| [&u16::try_from(bytes.len()).expect("short").to_be_bytes()[..], bytes].concat();
        let session = |handle: &[u8], parameters: &[u8]| {
            let length = u32::try_from(parameters.len()).expect("short").to_be_bytes();
            [handle, &length, parameters, &[0, 0, 1, 0, 0]].concat()
        };
        let pcr = [&[0, 0, 0, 9, 0, 0, 0, 1, 0, 0x0b, 3, 0, 8, 0, 0, 0, 0, 1][..], &sized(&[7; 32])].concat();
        let two = [sized(b"private"), sized(b"public")].concat();
        let bodies: [(u8, Vec<u8>); 9] = [
            (0, sized(&[1; 8])),
            (1, pcr),
            (2, session(&[0x80, 0, 0, 1], &sized(&[3; 90]))),
            (3, session(&[], &two)),
            (4, session(&[0x80, 0, 0, 2], &sized(b"name"))),
            (5, session(&[], &sized(b"secret"))),
            (8, session(&[], &[sized(&[4; 100]), vec![0, 0x18, 0, 0x0b], sized(&[5; 32]), sized(&[6; 32])].concat())),
            (9, [sized(&[0, 0, 0, 3, 0, 0x0b, 0, 0, 0, 0, 0, 0, 0, 64]), sized(&[1; 34])].concat()),
            (11, session(&[], &sized(&[1; 64]))),
        ];
        let mut seeds: Vec<Vec<u8>> = bodies.iter().map(|(n, body)| [&[*n], body.as_slice()].concat()).collect();
        seeds.push([&[0x80, 0x80, 1, 0, 0, 0, 20, 0, 0, 0, 0][..], &sized(&[1; 8])].concat());
        seeds
    }
}

/// Quotes, signed by a key of the target's own so that what is signed is read.
pub mod tpm_quote {
    use kiln_protocol::tpm::{EccPoint, QUOTED, Quote, Template, name_of, spki_of};
    use ring::rand::SystemRandom;
    use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
    use std::sync::LazyLock;

    static RNG: LazyLock<SystemRandom> = LazyLock::new(SystemRandom::new);
    static KEY: LazyLock<(EcdsaKeyPair, EccPoint)> = LazyLock::new(|| {
        let made = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &*RNG).expect("a key");
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, made.as_ref(), &*RNG).expect("a key");
        let point = pair.public_key().as_ref();
        let half = |from: usize| point[from..from + 32].try_into().expect("32 bytes");
        let point = EccPoint { x: half(1), y: half(33) };
        (pair, point)
    });

    fn signed(attest: &[u8]) -> Quote {
        let signature = KEY.0.sign(&*RNG, attest).expect("a signature");
        let (r, s) = signature.as_ref().split_at(32);
        let signature = [&[0, 0x18, 0, 0x0b, 0, 32][..], r, &[0, 32], s].concat();
        Quote { attest: attest.to_vec(), signature }
    }

    /// The first byte says which of the three the rest is: what is signed, a signature, a public area.
    pub fn run(data: &[u8]) {
        let Some((choice, rest)) = super::super::choice(data) else { return };
        match choice % 3 {
            0 => {
                let quote = signed(rest);
                let Ok(attested) = quote.verify(&KEY.1) else { return };
                assert!(rest.starts_with(&[0xff, 0x54, 0x43, 0x47, 0x80, 0x18]), "what no restricted key signs");
                assert!(rest.ends_with(&attested.pcr_digest), "the digest is the end of what is signed");
                let q = &attested.qualifying;
                assert!(q.is_empty() || rest.windows(q.len()).any(|window| window == q.as_slice()));
                let other = EccPoint { x: KEY.1.y, y: KEY.1.x };
                assert!(quote.verify(&other).is_err(), "another key's");
            }
            1 => {
                let quote = Quote { attest: attest(), signature: rest.to_vec() };
                assert!(quote.verify(&KEY.1).is_err(), "a signature that nobody made");
            }
            _ => {
                let points: Vec<_> = [Template::Endorsement, Template::Attestation, Template::Storage]
                    .into_iter()
                    .filter_map(|template| template.point(rest).ok())
                    .collect();
                assert!(points.len() <= 1, "one public area is of two templates");
                for point in points {
                    assert_eq!((name_of(rest).len(), spki_of(&point).len()), (34, 91));
                }
            }
        }
    }

    fn attest() -> Vec<u8> {
        let mut bits = [0_u8; 3];
        for pcr in QUOTED {
            bits[usize::from(pcr / 8)] |= 1 << (pcr % 8);
        }
        let selection = [&[0, 0, 0, 1, 0, 0x0b, 3][..], &bits].concat();
        let head = [0xff, 0x54, 0x43, 0x47, 0x80, 0x18, 0, 2, 0xaa, 0xbb, 0, 32];
        [&head[..], &[7; 32], &[0; 8], &[0, 0, 0, 1, 0, 0, 0, 0, 1], &[0; 8], &selection, &[0, 32], &[9; 32]].concat()
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        let signature = [&[0, 0x18, 0, 0x0b, 0, 32][..], &[1; 32], &[0, 32], &[2; 32]].concat();
        // Made by swtpm 0.7.1.
        let area = "0023000b00050472000000100018000b00030010002065f02d5c443f912dbe334e924458db706944e8fe52a315876b67ecca770b520c002090768f302c045362895c9bd513eac97d891ff3edcb8ce0852a42efac29df24e9";
        let area = kiln_release::hex::decode(area).expect("hex");
        vec![
            [&[0], attest().as_slice()].concat(),
            [&[1], signature.as_slice()].concat(),
            [&[2], area.as_slice()].concat(),
        ]
    }
}

/// The firmware's event log, with a quote that agrees to it.
pub mod event_log {
    use kiln_release::efi::certificate_list;
    use kiln_release::measured::{Log, Quoted, extend, judge, read};
    use kiln_release::{Measured, hex};
    use ring::digest::{SHA256, digest};
    use std::collections::BTreeSet;

    const PCRS: [u8; 9] = [0, 1, 2, 3, 4, 7, 10, 11, 12];
    const UKI: [u8; 32] = [0xaa; 32];

    fn sha256(bytes: &[u8]) -> [u8; 32] {
        digest(&SHA256, bytes).as_ref().try_into().expect("32 bytes")
    }

    fn release() -> Measured {
        Measured {
            pcr11: hex::encode(&extend(&[0; 32], &[1; 32])),
            uki: hex::encode(&UKI),
            kernel: hex::encode(&[0xbb; 32]),
            loader: None,
            certificate: Some(hex::sha256(b"site")),
            kexec: None,
        }
    }

    pub fn run(data: &[u8]) {
        let Ok(log) = Log::read(data) else {
            assert!(data.is_empty() || read(data, Quoted { pcrs: &PCRS, values: &[[0; 32]; 9] }).is_err());
            return;
        };
        // The PCR values that this log explains, and a machine that booted the UKI with nothing added.
        let values = PCRS.map(|pcr| match pcr {
            11 => extend(&[0; 32], &[1; 32]),
            12 => [0; 32],
            pcr => log.replay(pcr),
        });
        let evidence = read(data, Quoted { pcrs: &PCRS, values: &values }).expect("the quote agrees to the log");
        let mut wrong = values;
        wrong[5][0] ^= 1;
        assert!(read(data, Quoted { pcrs: &PCRS, values: &wrong }).is_err(), "PCR 7 is not what the log says");
        let (release, loaders) = (release(), BTreeSet::new());
        let Ok(booted) = judge(&evidence, &release, &loaders) else { return };
        assert_eq!(booted.caps, 0);
        assert!(log.of(4).any(|event| event.digest == UKI), "attested without its UKI");
        let setting = log
            .of(7)
            .take_while(|event| event.digest != sha256(&[0; 4]))
            .any(|event| event.data.ends_with(&[1]) && sha256(event.data) == event.digest);
        assert!(setting, "attested without Secure Boot");
        let mut foreign = log.clone();
        foreign.events.push(kiln_release::measured::LogEvent { pcr: 4, kind: 0x8000_0003, digest: [3; 32], data: b"" });
        assert_ne!(foreign.replay(4), log.replay(4), "a program more, and the same value");
    }

    fn honest() -> Vec<u8> {
        let mut spec = b"Spec ID Event03\0".to_vec();
        spec.extend([0, 0, 0, 0, 0, 2, 0, 2, 2, 0, 0, 0, 4, 0, 20, 0, 0x0b, 0, 32, 0, 0]);
        let mut log = [&[0; 4][..], &3_u32.to_le_bytes(), &[0; 20]].concat();
        log.extend(u32::try_from(spec.len()).expect("small").to_le_bytes());
        log.extend(spec);
        let mut event = |pcr: u32, kind: u32, digest: [u8; 32], data: &[u8]| {
            log.extend(pcr.to_le_bytes());
            log.extend(kind.to_le_bytes());
            log.extend([2, 0, 0, 0, 4, 0]);
            log.extend([0x11; 20]);
            log.extend([0x0b, 0]);
            log.extend(digest);
            log.extend(u32::try_from(data.len()).expect("small").to_le_bytes());
            log.extend(data);
        };
        let variable = |name: &str, content: &[u8]| {
            let units: Vec<u8> = name.encode_utf16().flat_map(u16::to_le_bytes).collect();
            let number = |n: usize| (n as u64).to_le_bytes();
            [&[9; 16][..], &number(name.len()), &number(content.len()), &units, content].concat()
        };
        event(0, 8, sha256(b"firmware"), b"firmware");
        for (pcr, kind, name, content) in [
            (1, 0x8000_0002, "BootOrder", vec![0, 0, 1, 0]),
            (7, 0x8000_0001, "SecureBoot", vec![1]),
            (7, 0x8000_0001, "db", certificate_list(b"site")),
        ] {
            let data = variable(name, &content);
            event(pcr, kind, sha256(&data), &data);
        }
        for pcr in [0, 1, 2, 3, 4, 7] {
            event(pcr, 4, sha256(&[0; 4]), &[0; 4]);
        }
        event(4, 0x8000_0007, sha256(b"Calling EFI Application"), b"Calling EFI Application");
        event(4, 0x8000_0003, UKI, b"path");
        event(4, 0x8000_0003, [0xbb; 32], b"path");
        log
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        let whole = honest();
        vec![whole[..whole.len() / 2].to_vec(), whole[..69].to_vec(), whole]
    }
}
