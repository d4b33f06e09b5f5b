//! What PCR 11 and PCR 4 become when a UKI boots.

use super::{extend, sha256};
use crate::formats::Measured;
use crate::pe::{Pe, PeError};
use crate::{authenticode, hex};

/// The sections that systemd's stub measures, in its order (UAPI.5, "UKI TPM PCR measurements"). `.pcrsig` is not among
/// them. A UKI of Kiln's has one of each at most.
const SECTIONS: [&str; 13] = [
    ".linux", ".osrel", ".cmdline", ".initrd", ".ucode", ".splash", ".dtb", ".uname", ".sbat", ".pcrpkey", ".profile",
    ".dtbauto", ".hwids",
];

/// The value of PCR 11 in the initramfs of this UKI: of each section its name with a zero behind, then its content.
pub fn pcr11(uki: &[u8]) -> Result<[u8; 32], PeError> {
    let pe = Pe::parse(uki)?;
    let mut value = [0; 32];
    for name in SECTIONS {
        let content = match pe.content(uki, name) {
            Err(PeError::NoSection { .. }) => continue,
            content => content?,
        };
        value = extend(&value, &sha256(&[name.as_bytes(), &[0]].concat()));
        value = extend(&value, &sha256(content));
    }
    Ok(value)
}

/// What a manifest says of a UKI. `kernel` is the one inside, `loader` the boot loader that starts it from a disk;
/// `certificate` is the SHA-256 of the site's Secure Boot certificate.
pub fn measured(
    uki: &[u8],
    kernel: &[u8],
    loader: Option<&[u8]>,
    certificate: Option<String>,
) -> Result<Measured, PeError> {
    let name = |image: &[u8]| authenticode::digest(image).map(|digest| hex::encode(&digest));
    Ok(Measured {
        pcr11: hex::encode(&pcr11(uki)?),
        uki: name(uki)?,
        kernel: name(kernel)?,
        loader: loader.map(name).transpose()?,
        certificate,
        kexec: None,
    })
}
