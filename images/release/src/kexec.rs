//! The copy of a release's kernel that carries the site's signature, so that `kexec_file_load(2)` takes it on a machine that is
//! locked down (docs/adr/0005).
//!
//! A kernel is a boot program of its own, and takes any initramfs and command line. So what is signed is a copy whose `Subsystem`
//! is none of EFI's: firmware loads no such image (UEFI 2.10 §2.1.1, §7.4.1), and the kernel that is asked to go there by kexec
//! does not read that field. A UKI has the kernel as it is, without a signature, and the copy's signature beside it.

use crate::formats::{Artifact, Manifest};
use crate::pe::{CERTIFICATES, CHECKSUM, Pe, PeError, SECURITY_DIRECTORY, SUBSYSTEM};

/// The section of a UKI that holds the copy's signature: the attribute certificates as they lie at its end. Neither the stub nor
/// firmware reads it, and it is measured nowhere.
pub const SIGNATURE_SECTION: &str = ".kxsig";

/// What the beginning of a kernel becomes. `head` is so much of it as its headers need, or more; the kernel has `length` bytes,
/// the signature `signature`, and behind the kernel come [`gap`] zeros, then the signature.
pub fn head(head: &[u8], length: usize, signature: usize) -> Result<Vec<u8>, PeError> {
    let pe = Pe::parse_head(head, length)?;
    if pe.certificates != (0, 0) {
        return Err(PeError::Signed);
    }
    if pe.directories <= SECURITY_DIRECTORY {
        return Err(PeError::NoCertificateDirectory);
    }
    let small = |value: usize| u32::try_from(value).map(u32::to_le_bytes).map_err(|_| PeError::NoCertificateDirectory);
    let (begin, signature) = (small(length + gap(length))?, small(signature)?);
    let mut copy = head.to_vec();
    // The reader has shown that the whole directory lies in the optional header, and that in what is at hand.
    let mut put = |at: usize, bytes: &[u8]| copy[pe.optional_offset + at..][..bytes.len()].copy_from_slice(bytes);
    // IMAGE_SUBSYSTEM_UNKNOWN.
    put(SUBSYSTEM, &[0; 2]);
    // No signature covers it, and who reads the copy does not read it: so that nothing but the head changes.
    put(CHECKSUM, &[0; 4]);
    if signature != [0; 4] {
        put(CERTIFICATES, &begin);
        put(CERTIFICATES + 4, &signature);
    }
    Ok(copy)
}

/// Zeros between a kernel of `length` bytes and its signature: that begins at a multiple of eight.
pub fn gap(length: usize) -> usize {
    length.next_multiple_of(8) - length
}

/// The whole copy of a kernel; without a signature (none, `&[]`) what is to be signed.
pub fn copy(kernel: &[u8], signature: &[u8]) -> Result<Vec<u8>, PeError> {
    let mut copy = head(kernel, kernel.len(), signature.len())?;
    copy.resize(kernel.len() + gap(kernel.len()), 0);
    copy.extend_from_slice(signature);
    Ok(copy)
}

impl Manifest {
    /// What a kexec of the release loads as its kernel.
    pub fn loaded_kernel(&self) -> &Artifact {
        self.kexec_kernel.as_ref().unwrap_or(&self.kernel)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authenticode::{digest, sign, signatures};
    use crate::certificate::self_signed_certificate;
    use crate::key::Signer;
    use crate::pe::tests::image;
    use crate::pkcs7::Certificate;
    use proptest::prelude::*;
    use std::convert::Infallible;

    /// A kernel as firmware starts it.
    fn kernel(text: &[u8], behind: &[u8]) -> Vec<u8> {
        let mut file = image(&[(".text", text)]);
        file[0x58 + SUBSYSTEM] = 10;
        file.extend_from_slice(behind);
        file
    }

    fn signed(file: &[u8]) -> Vec<u8> {
        let certificate = self_signed_certificate(&Signer::from_seed(&[5; 32]));
        let certificate = Certificate::parse(&certificate).unwrap();
        sign(file, &certificate, |_| Ok::<_, Infallible>(vec![9; 256])).unwrap()
    }

    proptest! {
        /// What is made of the kernel in a UKI is what was signed, to the byte but for the checksum, which nothing covers.
        #[test]
        fn the_copy_is_what_was_signed(
            text in prop::collection::vec(any::<u8>(), 1..3000),
            behind in prop::collection::vec(any::<u8>(), 0..40),
            known in 512_usize..4096,
        ) {
            let kernel = kernel(&text, &behind);
            let mut what_was_signed = signed(&copy(&kernel, &[]).unwrap());
            let signature = signatures(&what_was_signed).unwrap().to_vec();
            let made = copy(&kernel, &signature).unwrap();
            prop_assert_eq!(digest(&made), digest(&what_was_signed));
            what_was_signed[0x58 + CHECKSUM..][..4].fill(0);
            prop_assert!(made == what_was_signed);
            prop_assert!(digest(&made) != digest(&kernel), "another image for firmware and for dbx");
            // As the agent makes it, with only the beginning at hand.
            let known = known.min(kernel.len());
            let begin = head(&kernel[..known], kernel.len(), signature.len()).unwrap();
            let rest = [&kernel[known..], &vec![0; gap(kernel.len())], &signature].concat();
            prop_assert!([begin, rest].concat() == made);
        }

        #[test]
        fn no_kernel_makes_it_panic(at in 0_usize..512, value: u32, cut in 0_usize..2000) {
            let mut file = kernel(&[1; 700], &[]);
            let end = (at + 4).min(512);
            file[at..end].copy_from_slice(&value.to_le_bytes()[..end - at]);
            let _ = copy(&file, &[7; 16]);
            let _ = head(&file[..cut.min(file.len())], file.len(), 16);
        }
    }

    #[test]
    fn no_firmware_takes_it_for_its_own_and_a_signed_kernel_is_refused() {
        let kernel = kernel(b"text", &[]);
        let made = copy(&kernel, &[3; 24]).unwrap();
        let subsystem = |file: &[u8]| u16::from_le_bytes([file[0x58 + SUBSYSTEM], file[0x58 + SUBSYSTEM + 1]]);
        // EFI application, boot and run-time driver, ROM: 10 to 13.
        assert_eq!((subsystem(&kernel), subsystem(&made)), (10, 0));
        assert_eq!(copy(&made, &[3; 24]), Err(PeError::Signed));
        assert_eq!(copy(&signed(&kernel), &[3; 24]), Err(PeError::Signed));
        let mut four = kernel.clone();
        four[0x58 + 108] = 4;
        assert_eq!(copy(&four, &[3; 24]), Err(PeError::NoCertificateDirectory));
        assert!(head(&kernel[..0x60], kernel.len(), 24).is_err(), "headers that are not at hand");
    }
}
