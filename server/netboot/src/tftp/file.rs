//! The names that TFTP serves: a closed list, so no path of a request ever reaches a file system.

use crate::TftpError;
use kiln_protocol::Sha256Hex;

/// A file of the boot server.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum BootFile {
    /// A release's UKI: `b/<sha256>/kiln.efi`.
    Uki(Sha256Hex),
    /// iPXE for BIOS: `undionly.kpxe`.
    Undionly,
    /// iPXE for UEFI: `snponly.efi`.
    Snponly,
    /// shim: `shimx64.efi`.
    Shim,
    /// What shim starts, which is iPXE: `grubx64.efi`, a name that is fixed in shim.
    AfterShim,
    /// What that iPXE runs before it asks anybody: `autoexec.ipxe`, made by this server.
    Autoexec,
}

impl BootFile {
    /// The name as it is offered, also the path under the server's HTTP root.
    pub fn path(&self) -> String {
        match self {
            Self::Uki(sha256) => format!("b/{sha256}/kiln.efi"),
            Self::Undionly => "undionly.kpxe".into(),
            Self::Snponly => "snponly.efi".into(),
            Self::Shim => "shimx64.efi".into(),
            Self::AfterShim => "grubx64.efi".into(),
            Self::Autoexec => "autoexec.ipxe".into(),
        }
    }

    /// Reads a request's name. Leading slashes and Windows' backslashes are firmware's habits; all else must match
    /// exactly.
    pub fn parse(name: &str) -> Result<Self, TftpError> {
        let name = name.replace('\\', "/");
        match name.trim_start_matches('/') {
            "undionly.kpxe" => Ok(Self::Undionly),
            "snponly.efi" => Ok(Self::Snponly),
            "shimx64.efi" => Ok(Self::Shim),
            "grubx64.efi" => Ok(Self::AfterShim),
            "autoexec.ipxe" => Ok(Self::Autoexec),
            other => {
                let hash = other.strip_prefix("b/").and_then(|rest| rest.strip_suffix("/kiln.efi"));
                hash.and_then(|h| h.parse().ok()).map(Self::Uki).ok_or(TftpError::NoSuchFile)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_listed_names_are_files() {
        let uki = BootFile::Uki("ab".repeat(32).parse().unwrap());
        let shim = [BootFile::Shim, BootFile::AfterShim, BootFile::Autoexec];
        for file in [uki, BootFile::Undionly, BootFile::Snponly].into_iter().chain(shim) {
            assert_eq!(BootFile::parse(&file.path()), Ok(file.clone()));
            assert_eq!(BootFile::parse(&format!("/{}", file.path())), Ok(file.clone()));
            assert_eq!(BootFile::parse(&file.path().replace('/', "\\")), Ok(file));
        }
        let hash = "ab".repeat(32);
        let up = format!("b/../b/{hash}/kiln.efi");
        let upper = format!("b/{}/kiln.efi", hash.to_uppercase());
        for bad in [
            "",
            "/",
            "../undionly.kpxe",
            "b//kiln.efi",
            "b/../../etc/passwd",
            "etc/passwd",
            &up,
            &upper,
            "UNDIONLY.KPXE",
        ] {
            assert_eq!(BootFile::parse(bad), Err(TftpError::NoSuchFile), "{bad}");
        }
    }
}
