//! Secure Boot as this machine's firmware has it, and what the kernel is given because of it: the signature of the root
//! hash and the IPE policy, which it believes only if the site's certificate is in db (its `.platform` keyring).
//! Sources: UEFI 2.10 §3.3, §32; Linux Documentation/admin-guide/LSM/ipe.rst, device-mapper/verity.rst, sysctl/vm.rst.

use crate::error::{AgentError, Result};
use crate::sys;
use kiln_protocol::ProtectionClass;
use kiln_release::efi::{Entry, entries};
use kiln_release::{IPE_POLICY_PATH, ROOT_SIGNATURE_PATH, hex};
use std::path::Path;

const EFIVARS: &str = "/sys/firmware/efi/efivars";
const GLOBAL: &str = "8be4df61-93ca-11d2-aa0d-00e098032b8c";
const DATABASE: &str = "d719b2cb-3d3a-4596-a3bc-dad00e67656f";
const SECURITYFS: &str = "/sys/kernel/security";
const IPE: &str = "/sys/kernel/security/ipe";
const MEMFD: &str = "/proc/sys/vm/memfd_noexec";
/// By which dm-verity finds the signature in this process's keyring.
pub const SIGNATURE_KEY: &str = "kiln:root-hash";

/// What firmware enforces.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SecureBoot {
    /// It checks signatures: Secure Boot on, setup mode off.
    on: bool,
    /// The site's certificate is in db.
    site: bool,
    /// Another certificate, or a kind of entry that could let anything run, is in db, or db is unreadable.
    others: bool,
}

impl SecureBoot {
    /// This machine's. `fingerprint` is the site's certificate's, as the running release embeds it.
    pub fn of_this_machine(fingerprint: Option<&str>) -> Self {
        Self::read(Path::new(EFIVARS), fingerprint)
    }

    fn read(variables: &Path, fingerprint: Option<&str>) -> Self {
        let value = |name: &str, vendor: &str| {
            let bytes = std::fs::read(variables.join(format!("{name}-{vendor}"))).ok()?;
            bytes.get(4..).map(<[u8]>::to_vec)
        };
        let is = |name: &str, wanted: u8| value(name, GLOBAL).is_some_and(|bytes| bytes == [wanted]);
        let db = value("db", DATABASE);
        let mut found = Self { on: is("SecureBoot", 1) && is("SetupMode", 0), site: false, others: false };
        for entry in db.as_deref().and_then(entries).unwrap_or_else(|| vec![Entry::Other]) {
            match entry {
                Entry::X509(der) if fingerprint == Some(hex::sha256(der).as_str()) => found.site = true,
                // Of one image each, as an option ROM's.
                Entry::Sha256(_) => {}
                Entry::X509(_) | Entry::Other => found.others = true,
            }
        }
        found
    }

    /// The machine's protection class, as far as firmware decides it.
    pub fn class(self) -> ProtectionClass {
        if self.on && self.site && !self.others { ProtectionClass::Enforced } else { ProtectionClass::Unprotected }
    }

    /// Whether the kernel believes what the site signed.
    pub fn vouches(self) -> bool {
        self.on && self.site
    }

    /// Puts the root hash's signature where dm-verity looks for it. True if there is one: the table must name it then.
    pub fn offer_signature(self) -> Result<bool> {
        let path = Path::new(ROOT_SIGNATURE_PATH);
        if !self.vouches() || !path.exists() {
            return Ok(false);
        }
        let signature = std::fs::read(path).map_err(AgentError::file(path))?;
        let key = std::ffi::CString::new(SIGNATURE_KEY).expect("a constant without NUL");
        sys::add_user_key(&key, &signature).map_err(AgentError::system("giving the kernel the root's signature"))?;
        Ok(true)
    }

    /// From here on only what the site signed is executed, as far as this kernel can enforce it.
    pub fn restrict(self) -> Result<()> {
        // Absent before Linux 6.3.
        if Path::new(MEMFD).exists() {
            std::fs::write(MEMFD, "2").map_err(AgentError::file(MEMFD))?;
        }
        let path = Path::new(IPE_POLICY_PATH);
        if !self.vouches() || !path.exists() {
            return Ok(());
        }
        if !Path::new(IPE).exists() {
            println!("kiln-agent: this kernel has no IPE: noexec mounts alone keep foreign programs from running");
            return Ok(());
        }
        let policy = std::fs::read(path).map_err(AgentError::file(path))?;
        let write = |file: &str, bytes: &[u8]| {
            let path = Path::new(IPE).join(file);
            std::fs::write(&path, bytes).map_err(AgentError::file(path))
        };
        write("new_policy", &policy)?;
        write("policies/kiln/active", b"1")?;
        write("enforce", b"1")?;
        let lockdown = std::fs::read_to_string(Path::new(SECURITYFS).join("lockdown")).unwrap_or_default();
        println!(
            "kiln-agent: IPE enforces that only a root signed by the site is executed; lockdown: {}",
            lockdown.trim()
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_release::efi::{certificate_list, digest_list};

    #[test]
    fn enforced_is_secure_boot_with_the_sites_certificate_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let set = |name: &str, vendor: &str, value: &[u8]| {
            let bytes = [&[7, 0, 0, 0], value].concat();
            std::fs::write(dir.path().join(format!("{name}-{vendor}")), bytes).unwrap();
        };
        let ours = hex::sha256(b"ours");
        let class = || SecureBoot::read(dir.path(), Some(&ours)).class();
        assert_eq!(class(), ProtectionClass::Unprotected, "no variables at all");
        let site = certificate_list(b"ours");
        let hashes = digest_list(&[[1; 32]]);
        for (secure, setup, db, enforced, vouches) in [
            (1, 0, site.clone(), true, true),
            (1, 0, [site.clone(), hashes.clone()].concat(), true, true),
            (0, 0, site.clone(), false, false),
            (1, 1, site.clone(), false, false),
            (1, 0, [site.clone(), certificate_list(b"Microsoft")].concat(), false, true),
            (1, 0, certificate_list(b"Microsoft"), false, false),
            (1, 0, hashes, false, false),
            (1, 0, Vec::new(), false, false),
            (1, 0, site[..site.len() - 1].to_vec(), false, false),
        ] {
            set("SecureBoot", GLOBAL, &[secure]);
            set("SetupMode", GLOBAL, &[setup]);
            set("db", DATABASE, &db);
            let found = SecureBoot::read(dir.path(), Some(&ours));
            assert_eq!((found.class() == ProtectionClass::Enforced, found.vouches()), (enforced, vouches), "{found:?}");
        }
        set("db", DATABASE, &site);
        assert_eq!(SecureBoot::read(dir.path(), None).class(), ProtectionClass::Unprotected, "an unsigned release");
        std::fs::remove_file(dir.path().join(format!("db-{DATABASE}"))).unwrap();
        assert_eq!(class(), ProtectionClass::Unprotected);
    }
}
