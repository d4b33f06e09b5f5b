//! What the site's machine CA signs: its own certificate, those of machines, and the list of those that were revoked. X.509 v3
//! and CRL v2 (RFC 5280) in DER, ECDSA on NIST P-256 with SHA-256 (RFC 5480, RFC 5758): what any TLS library of other
//! programs reads.
//!
//! The key itself is elsewhere: whoever calls brings a function that makes an ASN.1 signature of it. Serial numbers and times
//! are arguments. Nothing here verifies.

use crate::certificate::der;
use crate::key::Scheme;
use crate::spki;
use jiff::Timestamp;
use ring::digest::{SHA256, digest};

const INTEGER: u8 = 0x02;
const BIT_STRING: u8 = 0x03;
const OCTETS: u8 = 0x04;
const OID: u8 = 0x06;
const ENUMERATED: u8 = 0x0a;
const UTF8: u8 = 0x0c;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
/// `AlgorithmIdentifier` of ecdsa-with-SHA256 (RFC 5758 §3.2): without parameters.
const ECDSA_SHA256: [u8; 12] = [0x30, 10, 0x06, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2];
/// organizationName, commonName.
const ORGANIZATION: &[u8] = &[0x55, 4, 10];
const COMMON_NAME: &[u8] = &[0x55, 4, 3];
/// id-kp-clientAuth.
const CLIENT_AUTH: &[u8] = &[0x2b, 6, 1, 5, 5, 7, 3, 2];
/// Certificate and CRL extensions, by the last byte of id-ce.
const SUBJECT_KEY: u8 = 14;
const KEY_USAGE: u8 = 15;
const SUBJECT_NAMES: u8 = 17;
const BASIC: u8 = 19;
const CRL_NUMBER: u8 = 20;
const REASON: u8 = 21;
const AUTHORITY_KEY: u8 = 35;
const EXTENDED_USAGE: u8 = 37;
/// RFC 5280 §4.1.2.5: for a CA that holds until people take it out of their programs.
const NO_END: &[u8] = b"99991231235959Z";
const CA_BEGINS: &[u8] = b"200101000000Z";

/// Bytes of a serial number.
pub const SERIAL: usize = 16;
/// Bytes of a public key: an uncompressed point.
pub const POINT: usize = 65;

/// A serial number of 16 random bytes, positive and of that length whatever they are (RFC 5280 §4.1.2.2).
pub fn serial(mut random: [u8; SERIAL]) -> [u8; SERIAL] {
    random[0] = random[0] & 0x3f | 0x40;
    random
}

/// Why a certificate does not hold any more (RFC 5280 §5.3.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CrlReason {
    /// Whoever else may have the key.
    KeyCompromise = 1,
    /// It is another machine's, or has another key, by now.
    AffiliationChanged = 3,
    /// Newer ones are in its place.
    Superseded = 4,
    /// The machine is out of service.
    CessationOfOperation = 5,
}

/// One line of the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Revoked {
    /// Whose.
    pub serial: [u8; SERIAL],
    /// Since when.
    pub at: Timestamp,
    /// Why.
    pub reason: CrlReason,
}

/// What a machine's certificate says.
#[derive(Debug, Clone, Copy)]
pub struct MachineCertificate<'a> {
    /// See [`serial`].
    pub serial: [u8; SERIAL],
    /// The machine's name: the common name.
    pub name: &'a str,
    /// Its id: the URI `kiln:machine:ID` among the subject's other names.
    pub id: &'a str,
    /// Its public key.
    pub point: &'a [u8; POINT],
    /// From when on it holds.
    pub from: Timestamp,
    /// Until when.
    pub until: Timestamp,
}

/// The CA as what it signs names it.
#[derive(Debug, Clone, Copy)]
pub struct MachineCa<'a> {
    /// The site's name.
    pub site: &'a str,
    /// Its public key.
    pub point: &'a [u8; POINT],
}

impl MachineCa<'_> {
    /// Its own certificate. The same but for the signature, whenever it is made.
    pub fn certificate<E>(&self, sign: impl FnOnce(&[u8]) -> Result<Vec<u8>, E>) -> Result<Vec<u8>, E> {
        let id = key_id(self.point);
        let mut number = [0; SERIAL];
        number.copy_from_slice(&id[..SERIAL]);
        let extensions = [
            // A CA, and none below it.
            extension(BASIC, true, &der(SEQUENCE, &[&[0x01, 1, 0xff], &[INTEGER, 1, 0]])),
            // keyCertSign, cRLSign.
            extension(KEY_USAGE, true, &[BIT_STRING, 2, 1, 0x06]),
            extension(SUBJECT_KEY, false, &der(OCTETS, &[&id])),
        ];
        let holds = der(SEQUENCE, &[&der(UTC_TIME, &[CA_BEGINS]), &der(GENERALIZED_TIME, &[NO_END])]);
        let tbs = tbs(&serial(number), &self.name(), &holds, &self.name(), self.point, &extensions.concat());
        signed(&tbs, sign)
    }

    /// A machine's certificate.
    pub fn issue<E>(
        &self,
        machine: &MachineCertificate<'_>,
        sign: impl FnOnce(&[u8]) -> Result<Vec<u8>, E>,
    ) -> Result<Vec<u8>, E> {
        let uri = format!("kiln:machine:{}", machine.id);
        let extensions = [
            extension(BASIC, true, &der(SEQUENCE, &[])),
            // digitalSignature.
            extension(KEY_USAGE, true, &[BIT_STRING, 2, 7, 0x80]),
            extension(EXTENDED_USAGE, false, &der(SEQUENCE, &[&der(OID, &[CLIENT_AUTH])])),
            extension(SUBJECT_NAMES, false, &der(SEQUENCE, &[&der(0x86, &[uri.as_bytes()])])),
            extension(SUBJECT_KEY, false, &der(OCTETS, &[&key_id(machine.point)])),
            self.authority(),
        ];
        let holds = der(SEQUENCE, &[&time(machine.from), &time(machine.until)]);
        let subject = name(&[(ORGANIZATION, self.site), (COMMON_NAME, machine.name)]);
        let tbs = tbs(&machine.serial, &self.name(), &holds, &subject, machine.point, &extensions.concat());
        signed(&tbs, sign)
    }

    /// The list of those that are revoked (RFC 5280 §5), whole. Its `number` grows from one list to the next.
    pub fn list<E>(
        &self,
        number: u64,
        made: Timestamp,
        next: Timestamp,
        revoked: &[Revoked],
        sign: impl FnOnce(&[u8]) -> Result<Vec<u8>, E>,
    ) -> Result<Vec<u8>, E> {
        let line = |revoked: &Revoked| {
            let reason = extension(REASON, false, &[ENUMERATED, 1, revoked.reason as u8]);
            der(SEQUENCE, &[&der(INTEGER, &[&revoked.serial]), &time(revoked.at), &der(SEQUENCE, &[&reason])])
        };
        let lines: Vec<u8> = revoked.iter().flat_map(line).collect();
        // RFC 5280 §5.1.2.6: without any the field is not there.
        let lines = if lines.is_empty() { lines } else { der(SEQUENCE, &[&lines]) };
        let extensions = [self.authority(), extension(CRL_NUMBER, false, &natural(number))].concat();
        let tbs = der(
            SEQUENCE,
            &[
                &[INTEGER, 1, 1], // v2
                &ECDSA_SHA256,
                &self.name(),
                &time(made),
                &time(next),
                &lines,
                &der(0xa0, &[&der(SEQUENCE, &[&extensions])]),
            ],
        );
        signed(&tbs, sign)
    }

    fn name(&self) -> Vec<u8> {
        name(&[(ORGANIZATION, self.site), (COMMON_NAME, "Kiln machine CA")])
    }

    fn authority(&self) -> Vec<u8> {
        extension(AUTHORITY_KEY, false, &der(SEQUENCE, &[&der(0x80, &[&key_id(self.point)])]))
    }
}

/// RFC 7093 §2, method 1: the first 160 bits of SHA-256 of the key.
fn key_id(point: &[u8; POINT]) -> [u8; 20] {
    let mut id = [0; 20];
    id.copy_from_slice(&digest(&SHA256, point).as_ref()[..20]);
    id
}

fn name(parts: &[(&[u8], &str)]) -> Vec<u8> {
    let mut out = Vec::new();
    for (id, text) in parts {
        let part = der(SEQUENCE, &[&der(OID, &[*id]), &der(UTF8, &[text.as_bytes()])]);
        out.extend(der(SET, &[&part]));
    }
    der(SEQUENCE, &[&out])
}

fn extension(id: u8, critical: bool, value: &[u8]) -> Vec<u8> {
    let flag: &[u8] = if critical { &[0x01, 1, 0xff] } else { &[] };
    der(SEQUENCE, &[&[OID, 3, 0x55, 0x1d, id], flag, &der(OCTETS, &[value])])
}

/// RFC 5280 §4.1.2.5: UTCTime through 2049, GeneralizedTime from 2050 on.
fn time(at: Timestamp) -> Vec<u8> {
    let text = at.strftime("%Y%m%d%H%M%SZ").to_string();
    if text.as_str() < "2050" {
        der(UTC_TIME, &[&text.as_bytes()[2..]])
    } else {
        der(GENERALIZED_TIME, &[text.as_bytes()])
    }
}

/// An INTEGER that is not negative, in the shortest form.
fn natural(number: u64) -> Vec<u8> {
    let bytes = number.to_be_bytes();
    let from = bytes.iter().position(|byte| *byte != 0).unwrap_or(bytes.len() - 1);
    let sign: &[u8] = if bytes[from] >= 0x80 { &[0] } else { &[] };
    der(INTEGER, &[sign, &bytes[from..]])
}

fn tbs(
    serial: &[u8; SERIAL],
    issuer: &[u8],
    holds: &[u8],
    subject: &[u8],
    point: &[u8; POINT],
    extensions: &[u8],
) -> Vec<u8> {
    der(
        SEQUENCE,
        &[
            &der(0xa0, &[&[INTEGER, 1, 2]]), // v3
            &der(INTEGER, &[serial]),
            &ECDSA_SHA256,
            issuer,
            holds,
            subject,
            &spki::encode(Scheme::EcdsaP256, point),
            &der(0xa3, &[&der(SEQUENCE, &[extensions])]),
        ],
    )
}

fn signed<E>(tbs: &[u8], sign: impl FnOnce(&[u8]) -> Result<Vec<u8>, E>) -> Result<Vec<u8>, E> {
    let signature = sign(tbs)?;
    Ok(der(SEQUENCE, &[tbs, &ECDSA_SHA256, &der(BIT_STRING, &[&[0], &signature])]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certificate::{certificate_spki, take};
    use std::convert::Infallible;

    const CA: MachineCa<'_> = MachineCa { site: "lab", point: &[4; POINT] };

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    /// Not a signature: what is signed is looked at here, by which key other programs verify elsewhere.
    fn sign() -> impl Fn(&[u8]) -> Result<Vec<u8>, Infallible> {
        |_| Ok(vec![7; 70])
    }

    fn holds(bytes: &[u8], piece: &[u8]) -> bool {
        bytes.windows(piece.len()).any(|window| window == piece)
    }

    #[test]
    fn a_certificate_says_the_machine_its_key_and_its_dates() {
        let point = [5; POINT];
        let machine = MachineCertificate {
            serial: serial([0xff; SERIAL]),
            name: "rack-1",
            id: "00000000-0000-0000-0000-000000000001",
            point: &point,
            from: at("2026-11-28T12:00:00Z"),
            until: at("2050-01-01T00:00:00Z"),
        };
        let Ok(made) = CA.issue(&machine, sign());
        assert_eq!(certificate_spki(&made).unwrap(), spki::encode(Scheme::EcdsaP256, &point));
        for piece in [
            &b"\x17\x0d261128120000Z\x18\x0f20500101000000Z"[..],
            &b"\x0c\x06rack-1"[..],
            &b"\x86\x31kiln:machine:00000000-0000-0000-0000-000000000001"[..],
            &b"\x02\x10\x7f\xff"[..],
            &der(OID, &[CLIENT_AUTH])[..],
            &key_id(CA.point)[..],
        ] {
            assert!(holds(&made, piece), "{piece:?}");
        }
        // Not a CA, and signed in its name.
        let Ok(own) = CA.certificate(sign());
        assert!(holds(&own, &CA.name()) && holds(&made, &CA.name()) && !holds(&made, &[0x01, 1, 0xff, INTEGER, 1, 0]));
        assert_eq!(CA.certificate(sign()), Ok(own));
    }

    #[test]
    fn a_list_has_a_line_for_each_and_none_is_no_field() {
        let (made, next) = (at("2026-11-28T12:00:00Z"), at("2026-11-29T12:00:00Z"));
        let line = |n: u8| Revoked { serial: serial([n; SERIAL]), at: made, reason: CrlReason::KeyCompromise };
        let fields = |list: &[u8]| {
            let mut rest = list;
            let (_, mut outer) = take(&mut rest, SEQUENCE).unwrap();
            let (_, mut tbs) = take(&mut outer, SEQUENCE).unwrap();
            for tag in [INTEGER, SEQUENCE, SEQUENCE, UTC_TIME, UTC_TIME] {
                take(&mut tbs, tag).unwrap();
            }
            let mut lines = take(&mut tbs, SEQUENCE).map_or(&[][..], |(_, lines)| lines);
            let mut count = 0;
            while let Some((_, mut line)) = take(&mut lines, SEQUENCE) {
                assert_eq!(take(&mut line, INTEGER).unwrap().1.len(), SERIAL);
                count += 1;
            }
            assert!(take(&mut tbs, 0xa0).is_some() && tbs.is_empty() && lines.is_empty());
            count
        };
        let Ok(none) = CA.list(1, made, next, &[], sign());
        assert_eq!(fields(&none), 0);
        let Ok(two) = CA.list(300, made, next, &[line(1), line(2)], sign());
        assert_eq!(fields(&two), 2);
        assert!(holds(&two, &[OID, 3, 0x55, 0x1d, REASON, OCTETS, 3, ENUMERATED, 1, 1]));
        assert!(holds(&two, &[CRL_NUMBER, OCTETS, 4, INTEGER, 2, 1, 44]));
    }

    #[test]
    fn numbers_and_lengths_have_their_shortest_form() {
        for (number, form) in
            [(0, vec![2, 1, 0]), (0x7f, vec![2, 1, 0x7f]), (0x80, vec![2, 2, 0, 0x80]), (0x1_0000, vec![2, 3, 1, 0, 0])]
        {
            assert_eq!(natural(number), form);
        }
        assert_eq!(natural(u64::MAX).len(), 11);
        for (length, head) in [
            (0x7f, vec![4, 0x7f]),
            (0x80, vec![4, 0x81, 0x80]),
            (0x100, vec![4, 0x82, 1, 0]),
            (0xffff, vec![4, 0x82, 0xff, 0xff]),
            (0x1_0000, vec![4, 0x83, 1, 0, 0]),
        ] {
            assert!(der(OCTETS, &[&vec![0; length]]).starts_with(&head), "{length}");
        }
    }

    #[test]
    fn serial_numbers_are_positive_and_of_one_length() {
        for byte in 0..=u8::MAX {
            let number = serial([byte; SERIAL]);
            assert!((0x40..0x80).contains(&number[0]) && number[1..] == [byte; SERIAL - 1]);
        }
    }
}
