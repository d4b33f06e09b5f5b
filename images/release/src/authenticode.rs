//! Authenticode signatures of PE images (Microsoft "Windows Authenticode Portable Executable Signature Format", 2008;
//! UEFI 2.10 §32.2.4): the digest, a signature put on, signatures taken off. Firmware checks a UKI by it, and
//! `kexec_file_load(2)` a kernel ([`crate::kexec`]).

use crate::certificate::der;
use crate::pe::{CERTIFICATES, CHECKSUM, Pe, PeError, SECURITY_DIRECTORY, checksum};
use crate::pkcs7::{Certificate, Content, SHA_256, enveloped, signed_data};
use ring::digest::{Context, SHA256};

/// SPC_INDIRECT_DATA_OBJID.
const INDIRECT_DATA: [u8; 12] = [0x06, 10, 0x2b, 6, 1, 4, 1, 0x82, 0x37, 2, 1, 4];
/// `SpcAttributeTypeAndOptionalValue` of SPC_PE_IMAGE_DATAOBJ: no flags, an empty file name.
const PE_IMAGE_DATA: [u8; 25] =
    [0x30, 0x17, 0x06, 10, 0x2b, 6, 1, 4, 1, 0x82, 0x37, 2, 1, 15, 0x30, 9, 3, 1, 0, 0xa0, 4, 0xa2, 2, 0x80, 0];
/// `WIN_CERTIFICATE`: revision 2.0, PKCS #7 signed data.
const REVISION_AND_TYPE: [u8; 4] = [0, 2, 2, 0];

/// Why an image could not be signed.
#[derive(Debug, PartialEq, Eq)]
pub enum SignError<E> {
    /// It is no image that can be signed.
    Image(PeError),
    /// The key did not sign.
    Key(E),
}

/// Offsets of what a signature changes, and where the signatures begin; the file's length without any.
struct Places {
    checksum: usize,
    directory: usize,
    headers: usize,
    end: usize,
}

fn places(file: &[u8], pe: &Pe) -> Result<Places, PeError> {
    let directory = pe.optional_offset + CERTIFICATES;
    let headers = index(pe.size_of_headers);
    // A reader passes over a directory that the headers do not count: a signature there would be none.
    if pe.directories <= SECURITY_DIRECTORY
        || directory + 8 > pe.table_offset
        || headers < pe.table_offset
        || headers > file.len()
    {
        return Err(PeError::NoCertificateDirectory);
    }
    let (begin, length) = (index(pe.certificates.0), index(pe.certificates.1));
    let end = if length == 0 { file.len() } else { begin };
    if length > 0 && (begin < headers || begin.checked_add(length) != Some(file.len())) {
        return Err(PeError::CertificatesNotLast);
    }
    Ok(Places { checksum: pe.optional_offset + CHECKSUM, directory, headers, end })
}

/// The digest that a signature covers, and that dbx names: all of the file but checksum, signatures and the entry that
/// names them.
pub fn digest(file: &[u8]) -> Result<[u8; 32], PeError> {
    let pe = Pe::parse(file)?;
    let Places { checksum, directory, headers, end } = places(file, &pe)?;
    let mut hash = Context::new(&SHA256);
    hash.update(&file[..checksum]);
    hash.update(&file[checksum + 4..directory]);
    hash.update(&file[directory + 8..headers]);
    // Sections in the order in which they lie in the file. What Kiln signs has them one after the other, so that this
    // is the rest of the file; a gap would be hashed differently by different readers.
    let mut sections: Vec<_> = pe.sections.iter().filter(|section| section.raw_size > 0).collect();
    sections.sort_by_key(|section| section.raw_offset);
    let mut at = headers;
    for section in &sections {
        if index(section.raw_offset) != at {
            return Err(PeError::Overlap { count: sections.len() });
        }
        at += index(section.raw_size);
    }
    if at > end {
        return Err(PeError::Overlap { count: sections.len() });
    }
    hash.update(&file[headers..end]);
    Ok(hash.finish().as_ref().try_into().expect("SHA-256 has 32 bytes"))
}

/// The image without its signatures; one without any stays as it is.
pub fn strip(file: &[u8]) -> Result<Vec<u8>, PeError> {
    let pe = Pe::parse(file)?;
    let Places { directory, end, .. } = places(file, &pe)?;
    let mut bare = file[..end].to_vec();
    bare[directory..directory + 8].fill(0);
    put_checksum(&mut bare, &pe);
    Ok(bare)
}

/// The signatures as they lie at the end of an image (`WIN_CERTIFICATE`s); nothing where it has none.
pub fn signatures(file: &[u8]) -> Result<&[u8], PeError> {
    let pe = Pe::parse(file)?;
    Ok(&file[places(file, &pe)?.end..])
}

/// The image with one signature. The certificate lies in it, as firmware wants it.
pub fn sign<E>(
    file: &[u8],
    certificate: &Certificate<'_>,
    key: impl FnOnce(&[u8]) -> Result<Vec<u8>, E>,
) -> Result<Vec<u8>, SignError<E>> {
    let pe = Pe::parse(file).map_err(SignError::Image)?;
    if pe.certificates != (0, 0) {
        return Err(SignError::Image(PeError::Signed));
    }
    let Places { directory, .. } = places(file, &pe).map_err(SignError::Image)?;
    let mut signed = file.to_vec();
    // The table of signatures begins at a multiple of eight; what fills the gap is signed.
    signed.resize(file.len().next_multiple_of(8), 0);
    let hash = digest(&signed).map_err(SignError::Image)?;
    let digest_info = der(0x30, &[&SHA_256, &der(0x04, &[&hash])]);
    let indirect = der(0x30, &[&PE_IMAGE_DATA, &digest_info]);
    let data =
        signed_data(Content::Typed(&INDIRECT_DATA, &indirect), certificate, true, key).map_err(SignError::Key)?;
    let pkcs7 = enveloped(&data);
    let small = |value: usize| u32::try_from(value).map_err(|_| SignError::Image(PeError::NoCertificateDirectory));
    // dwLength counts the padding (as signtool and sbsign do); DER itself says where the signature ends.
    let length = (8 + pkcs7.len()).next_multiple_of(8);
    let (begin, length) = (small(signed.len())?, small(length)?);
    signed.extend(length.to_le_bytes());
    signed.extend(REVISION_AND_TYPE);
    signed.extend(pkcs7);
    signed.resize(index(begin) + index(length), 0);
    signed[directory..directory + 4].copy_from_slice(&begin.to_le_bytes());
    signed[directory + 4..directory + 8].copy_from_slice(&length.to_le_bytes());
    put_checksum(&mut signed, &pe);
    Ok(signed)
}

fn put_checksum(file: &mut [u8], pe: &Pe) {
    let field = pe.optional_offset + CHECKSUM;
    let sum = checksum(file, field);
    file[field..field + 4].copy_from_slice(&sum.to_le_bytes());
}

fn index(value: u32) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}
