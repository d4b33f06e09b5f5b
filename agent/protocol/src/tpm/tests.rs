use super::*;
use proptest::prelude::*;

fn bytes(hex: &str) -> Vec<u8> {
    crate::HexBytes::try_from(hex.to_owned()).unwrap().0
}

// Recorded with tpm2-tools 5.4 and swtpm 0.7.1: `tpm2_createprimary -C e -G ecc256:ecdsa-sha256:null` with the attributes of the
// template, `tpm2_createek -G ecc`, `tpm2_quote -q 6e6f6e6365` after `tpm2_pcrextend 11:sha256=1111…`.
const AK: &str = "0023000b00050472000000100018000b00030010002065f02d5c443f912dbe334e924458db706944e8fe52a315876b67ecca770b520c002090768f302c045362895c9bd513eac97d891ff3edcb8ce0852a42efac29df24e9";
const EK: &str = "0023000b000300b20020837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa00060080004300100003001000204b1aabaa29ad2251df695135da1bfa0d67ffdd62a272a327d87c7e47aa9f12ec0020d352b94ecda2b598f43322136c5e5fb950fc67f0610e452eda7f2cf7e8acba88";
const QUOTE: (&str, &str) = (
    "ff54434780180022000bc5e145ff5b01b83ad4f8ed2c45f06c7b3bdb0136b1478ed3d696bfa89c4a23e200056e6f6e6365000000000000047f000000010000000001201910230016363600000001000b039f1c000020356080a3c2787b0e3c9a9f2c2a7d32d9731c5be09a1aa9ca9edb1fcf915e18bb",
    "0018000b002075d404f5054091d38f822f7448575be1d38f31857a132a2acae7da5093045ba8002064461cbd9a57f2a8f8fee30e86db397a0a7590453073f9b7ff1da4d50171444c",
);
/// Of PCRs 16 and 23, which anyone resets.
const OTHER_PCRS: (&str, &str) = (
    "ff54434780180022000bc5e145ff5b01b83ad4f8ed2c45f06c7b3bdb0136b1478ed3d696bfa89c4a23e200056e6f6e6365000000000000056a000000010000000001201910230016363600000001000b030000810020f5a5fd42d16a20302798ef6ed309979b43003d2320d9f0e8ea9831a92759fb4b",
    "0018000b002095f2f436f07900316b73588c28493ae5b0224853baf3069957d3a3358d5f710900208af8ab24f46f6516dbadfeaa1f885d11481ac7b6ab792bd90355ebec7940fbda",
);

fn quoted((attest, signature): (&str, &str)) -> (Quote, EccPoint) {
    let quote = Quote { attest: bytes(attest), signature: bytes(signature) };
    (quote, Template::Attestation.point(&bytes(AK)).unwrap())
}

#[test]
fn a_command_is_the_bytes_of_the_specification() {
    // Part 3, §16.1: GetRandom of 8 bytes.
    assert_eq!(command::get_random(8).bytes(), bytes("80010000000c0000017b0008"));
    // §22.2, with an empty password.
    let digest = "11".repeat(32);
    let extend = format!("800200000041000001820000000b0000000940000009000000000000000001000b{digest}");
    assert_eq!(command::pcr_extend(11, &[0x11; 32]).bytes(), bytes(&extend));
    assert_eq!(quote::selection(&QUOTED), bytes("00000001000b039f1c00"));
}

#[test]
fn an_answer_is_read_only_as_what_was_asked_for() {
    let ask = command::get_random(4);
    assert_eq!(ask.answer(&bytes("800100000010000000000004aabbccdd")), Ok(vec![0xaa, 0xbb, 0xcc, 0xdd]));
    assert_eq!(
        ask.answer(&bytes("80010000000a00000101")),
        Err(TpmError::Refused { command: "GetRandom", code: 0x101 })
    );
    for (answer, error) in [
        ("8001", TpmError::Short { what: "length" }),
        ("800100000011000000000004aabbccdd", TpmError::Unexpected { what: "its length" }),
        ("800200000010000000000004aabbccdd", TpmError::Unexpected { what: "its tag" }),
        ("800100000010000000000005aabbccdd", TpmError::Short { what: "data" }),
        ("800100000011000000000004aabbccdd00", TpmError::Surplus(1)),
    ] {
        assert_eq!(ask.answer(&bytes(answer)), Err(error), "{answer}");
    }
}

#[test]
fn a_public_area_is_its_template_and_a_point_or_nothing() {
    for template in [Template::Endorsement, Template::Attestation, Template::Storage, Template::Delivery([3; 32])] {
        let input = template.input();
        let head = input.len() - if template == Template::Endorsement { 68 } else { 4 };
        let area = wire::Writer(input[..head].to_vec()).sized(&[7; 32]).sized(&[8; 31]).0;
        let point = template.point(&area).unwrap();
        assert_eq!((point.x, point.y[0], point.y[1]), ([7; 32], 0, 8), "a short number is padded in front");
        for other in [Template::Endorsement, Template::Attestation, Template::Storage, Template::Delivery([3; 32])] {
            assert_eq!(other.point(&area).is_ok(), other == template);
        }
        // Whatever bit of the template differs: an attestation key that is not restricted signs anything.
        for at in 0..head {
            let mut changed = area.clone();
            changed[at] ^= 1;
            assert!(template.point(&changed).is_err(), "{template:?}, byte {at}");
        }
        assert!(template.point(&[&area[..], &[0]].concat()).is_err());
        assert!(template.point(&wire::Writer(input[..head].to_vec()).sized(&[7; 33]).sized(&[8; 32]).0).is_err());
        assert!(template.point(&input[..head]).is_err());
    }
}

#[test]
fn what_another_program_made_is_read_as_it_was_meant() {
    let (quote, key) = quoted(QUOTE);
    let read = quote.verify(&key).unwrap();
    assert_eq!((read.qualifying.as_slice(), read.clock), (&b"nonce"[..], ClockInfo { resets: 1, restarts: 0 }));
    let eleven = ring::digest::digest(&ring::digest::SHA256, &[[0; 32], [0x11; 32]].concat());
    let eleven: [u8; 32] = eleven.as_ref().try_into().unwrap();
    let values = QUOTED.map(|pcr| if pcr == 11 { eleven } else { [0; 32] });
    assert_eq!(read.pcr_digest, pcr_digest(values.iter()));
    // The key's qualified name (TPM 2.0 Part 1, clause 16), by which the quote names its signer: a primary key of the
    // endorsement hierarchy.
    let hierarchy = 0x4000_000B_u32.to_be_bytes();
    let hash = ring::digest::digest(&ring::digest::SHA256, &[&hierarchy[..], &name_of(&bytes(AK))].concat());
    assert_eq!(quote.attest[8..42], [&[0, 0x0b], hash.as_ref()].concat());
    let endorsement = Template::Endorsement.point(&bytes(EK)).unwrap();
    assert_eq!(endorsement.x, bytes(&EK[EK.len() - 132..EK.len() - 68])[..]);
    assert!(Template::Attestation.point(&bytes(EK)).is_err());
}

#[test]
fn nothing_passes_but_the_quote_that_was_signed() {
    let (quote, key) = quoted(QUOTE);
    for at in 0..quote.attest.len() {
        let mut changed = quote.clone();
        changed.attest[at] ^= 1;
        assert_eq!(changed.verify(&key), Err(TpmError::BadSignature), "byte {at}");
    }
    let other = Template::Endorsement.point(&bytes(EK)).unwrap();
    assert_eq!(quote.verify(&other), Err(TpmError::BadSignature), "another key");
    let (other, key) = quoted(OTHER_PCRS);
    assert_eq!(other.verify(&key), Err(TpmError::Unexpected { what: "the PCR selection" }));
}

#[test]
fn qualifying_data_is_bound_to_each_of_its_parts() {
    let (a, b) = ("aa".repeat(32), "bb".repeat(32));
    let all = [
        qualifying_data(&a, &b, "boot"),
        qualifying_data(&b, &a, "boot"),
        qualifying_data(&a, &b, "boo"),
        qualifying_data(&a, &a, "boot"),
    ];
    for (i, one) in all.iter().enumerate() {
        assert!(all.iter().skip(i + 1).all(|other| other != one));
    }
}

proptest! {
    #[test]
    fn no_answer_makes_the_reader_panic(answer in prop::collection::vec(any::<u8>(), 0..200), sane in any::<bool>()) {
        let mut answer = answer;
        if sane && answer.len() >= 10 {
            let length = u32::try_from(answer.len()).unwrap().to_be_bytes();
            answer[..10].copy_from_slice(&[0x80, 2, length[0], length[1], length[2], length[3], 0, 0, 0, 0]);
        }
        let _ = command::get_random(1).answer(&answer);
        let _ = command::pcr_read(1).answer(&answer);
        let _ = command::create_primary(OWNER, Template::Storage).answer(&answer);
        let _ = command::seal(1, &[1], &[]).answer(&answer);
        let _ = command::nv_size(1).answer(&answer);
        let _ = command::quote(1, &[0; 32]).answer(&answer);
        let _ = Template::Attestation.point(&answer);
    }

    #[test]
    fn no_quote_makes_the_reader_panic(attest in prop::collection::vec(any::<u8>(), 0..120), signature in prop::collection::vec(any::<u8>(), 0..80)) {
        let key = EccPoint { x: [1; 32], y: [2; 32] };
        let verified = Quote { attest, signature }.verify(&key);
        prop_assert!(verified.is_err());
    }
}
