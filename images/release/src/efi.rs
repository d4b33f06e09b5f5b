//! Secure Boot's variables (UEFI 2.10 §8.2.2, §32.4.1): signature lists, and the authenticated form in which firmware
//! takes a change of them. `kiln trust secureboot` writes them; the agent reads a machine's own.

use crate::pkcs7::{Certificate, Content, signed_data};
use jiff::civil::DateTime;

/// A GUID as it is stored: the first three fields little-endian.
pub type Guid = [u8; 16];

/// `EFI_GLOBAL_VARIABLE`, 8be4df61-93ca-11d2-aa0d-00e098032b8c: of PK and KEK.
pub const GLOBAL: Guid =
    [0x61, 0xdf, 0xe4, 0x8b, 0xca, 0x93, 0xd2, 0x11, 0xaa, 0x0d, 0x00, 0xe0, 0x98, 0x03, 0x2b, 0x8c];
/// `EFI_IMAGE_SECURITY_DATABASE_GUID`, d719b2cb-3d3a-4596-a3bc-dad00e67656f: of db and dbx.
pub const DATABASE: Guid =
    [0xcb, 0xb2, 0x19, 0xd7, 0x3a, 0x3d, 0x96, 0x45, 0xa3, 0xbc, 0xda, 0xd0, 0x0e, 0x67, 0x65, 0x6f];
/// `EFI_CERT_X509_GUID`, a5c059a1-94e4-4aa7-87b5-ab155c2bf072.
const X509: Guid = [0xa1, 0x59, 0xc0, 0xa5, 0xe4, 0x94, 0xa7, 0x4a, 0x87, 0xb5, 0xab, 0x15, 0x5c, 0x2b, 0xf0, 0x72];
/// `EFI_CERT_SHA256_GUID`, c1c41626-504c-4092-aca9-41f936934328.
const HASH: Guid = [0x26, 0x16, 0xc4, 0xc1, 0x4c, 0x50, 0x92, 0x40, 0xac, 0xa9, 0x41, 0xf9, 0x36, 0x93, 0x43, 0x28];
/// `EFI_CERT_TYPE_PKCS7_GUID`, 4aafd29d-68df-49ee-8aa9-347d375665a7.
const PKCS7: Guid = [0x9d, 0xd2, 0xaf, 0x4a, 0xdf, 0x68, 0xee, 0x49, 0x8a, 0xa9, 0x34, 0x7d, 0x37, 0x56, 0x65, 0xa7];
/// Kiln's own, 6b696c6e-0000-4000-8000-6b696c6e0002: the owner of what it writes into the lists.
pub const OWNER: Guid = [0x6e, 0x6c, 0x69, 0x6b, 0, 0, 0, 0x40, 0x80, 0, 0x6b, 0x69, 0x6c, 0x6e, 0, 2];

/// Non-volatile, boot-service and run-time access, time-based authentication.
pub const AUTHENTICATED: u32 = 0x27;
/// The same for a change that adds to what is there (`EFI_VARIABLE_APPEND_WRITE`).
pub const APPEND: u32 = 0x67;

/// One entry of a signature list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry<'a> {
    /// A certificate, DER: what it signed may run.
    X509(&'a [u8]),
    /// The SHA-256 Authenticode digest of one image.
    Sha256(&'a [u8]),
    /// Another kind.
    Other,
}

/// A list of one certificate.
pub fn certificate_list(certificate: &[u8]) -> Vec<u8> {
    list(X509, certificate.len(), &[certificate])
}

/// A list of image digests.
pub fn digest_list(digests: &[[u8; 32]]) -> Vec<u8> {
    let digests: Vec<&[u8]> = digests.iter().map(<[u8; 32]>::as_slice).collect();
    list(HASH, 32, &digests)
}

/// `EFI_SIGNATURE_LIST` of entries of one size.
fn list(kind: Guid, size: usize, entries: &[&[u8]]) -> Vec<u8> {
    let small = |value: usize| u32::try_from(value).expect("a certificate, or a few hundred digests").to_le_bytes();
    let entry = 16 + size;
    let mut out = kind.to_vec();
    out.extend(small(28 + entries.len() * entry));
    out.extend(small(0));
    out.extend(small(entry));
    for content in entries {
        out.extend(OWNER);
        out.extend(*content);
    }
    out
}

/// Every entry of a variable's signature lists; none if they are malformed.
pub fn entries(mut lists: &[u8]) -> Option<Vec<Entry<'_>>> {
    let number = |at: usize, bytes: &[u8]| {
        let bytes: [u8; 4] = bytes.get(at..at + 4)?.try_into().ok()?;
        usize::try_from(u32::from_le_bytes(bytes)).ok()
    };
    let mut all = Vec::new();
    while !lists.is_empty() {
        let (size, header, entry) = (number(16, lists)?, number(20, lists)?, number(24, lists)?);
        let content = lists.get(28usize.checked_add(header)?..size)?;
        if entry <= 16 || content.len() % entry != 0 {
            return None;
        }
        for one in content.chunks_exact(entry).map(|one| &one[16..]) {
            all.push(match lists.get(..16) {
                Some(kind) if kind == X509 => Entry::X509(one),
                Some(kind) if kind == HASH => Entry::Sha256(one),
                Some(_) | None => Entry::Other,
            });
        }
        lists = &lists[size..];
    }
    Some(all)
}

/// `EFI_TIME`: to the second, UTC, all else zero as authenticated variables want it.
pub fn time(at: DateTime) -> [u8; 16] {
    let byte = |value: i8| u8::try_from(value).expect("parts of a date are not negative");
    let mut out = [0; 16];
    out[..2].copy_from_slice(&at.year().to_le_bytes());
    for (place, part) in out[2..7].iter_mut().zip([at.month(), at.day(), at.hour(), at.minute(), at.second()]) {
        *place = byte(part);
    }
    out
}

/// A change of an authenticated variable: `EFI_VARIABLE_AUTHENTICATION_2` and the value. Firmware takes it where `at`
/// is later than the value's it has, and the signer is one that may change it.
pub fn authenticated<E>(
    (name, vendor, attributes): (&str, Guid, u32),
    at: DateTime,
    value: &[u8],
    certificate: &Certificate<'_>,
    sign: impl FnOnce(&[u8]) -> Result<Vec<u8>, E>,
) -> Result<Vec<u8>, E> {
    let time = time(at);
    let mut message: Vec<u8> = name.encode_utf16().flat_map(u16::to_le_bytes).collect();
    message.extend(vendor);
    message.extend(attributes.to_le_bytes());
    message.extend(time);
    message.extend(value);
    let signature = signed_data(Content::Detached(&message), certificate, true, sign)?;
    let mut out = time.to_vec();
    out.extend(u32::try_from(24 + signature.len()).expect("a signature has a few KiB").to_le_bytes());
    out.extend([0, 2, 0xf1, 0x0e]);
    out.extend(PKCS7);
    out.extend(signature);
    out.extend(value);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_back_and_malformed_ones_are_refused() {
        let lists = [certificate_list(b"certificate"), digest_list(&[[1; 32], [2; 32]])].concat();
        let all = entries(&lists).unwrap();
        assert_eq!(all, [Entry::X509(b"certificate"), Entry::Sha256(&[1; 32]), Entry::Sha256(&[2; 32])]);
        assert_eq!(entries(&[]), Some(vec![]));
        for cut in 1..lists.len() {
            let whole = cut == certificate_list(b"certificate").len();
            assert_eq!(entries(&lists[..cut]).is_some(), whole, "cut at {cut}");
        }
        let mut endless = lists.clone();
        endless[16..20].fill(0);
        assert_eq!(entries(&endless), None, "a list of no length goes nowhere");
        let mut other = certificate_list(b"x");
        other[0] ^= 1;
        assert_eq!(entries(&other), Some(vec![Entry::Other]));
    }

    #[test]
    fn times_are_the_firmwares() {
        let at = jiff::civil::date(2026, 3, 9).at(13, 14, 15, 999);
        assert_eq!(time(at), [0xea, 0x07, 3, 9, 13, 14, 15, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    }
}
