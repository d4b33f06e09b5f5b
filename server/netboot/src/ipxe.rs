//! iPXE: what a client says it can do, and the script that boots Linux by HTTP.
//!
//! Option 175 is iPXE's own (`src/include/ipxe/features.h`, `dhcp.h` there): sub-options of one byte per feature.
//! Script syntax: a line per command, words split at blanks, `${…}` expanded. No quoting exists in it, so what cannot
//! be written safely is refused instead.

use crate::Mac;
use crate::options::Options;
use crate::tftp::BootFile;
use kiln_protocol::{MachineId, Sha256Hex};

/// Where the server answers with a script.
pub const SCRIPT_PATH: &str = "/boot.ipxe";

const FIRST_LINE: &str = "#!ipxe\n";
const FEATURE_HTTP: u8 = 19;
const FEATURE_BZIMAGE: u8 = 24;
const FEATURE_EFI: u8 = 36;

/// What option 175 announces.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Features {
    /// Downloads by HTTP.
    pub http: bool,
    /// Boots a Linux bzImage.
    pub bzimage: bool,
    /// Boots an EFI program.
    pub efi: bool,
}

impl Features {
    pub(crate) fn read(option: &[u8]) -> Self {
        let sub = Options::read_encapsulated(option);
        let has = |code| sub.get(code).is_some_and(|v| v.first().is_some_and(|n| *n != 0));
        Self { http: has(FEATURE_HTTP), bzimage: has(FEATURE_BZIMAGE), efi: has(FEATURE_EFI) }
    }

    /// HTTP and bzImage: the script works.
    pub fn can_boot_linux(self) -> bool {
        self.http && self.bzimage
    }

    /// HTTP and EFI programs: a UKI by URL works.
    pub fn can_boot_efi(self) -> bool {
        self.http && self.efi
    }
}

/// Why no script is made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} cannot be put into an iPXE script: it holds {bad:?}, and iPXE has no quoting")]
pub struct ScriptError {
    /// Which part.
    pub what: &'static str,
    /// The character.
    pub bad: char,
}

/// The address of this machine's script. Both values come as types, so nothing needs escaping.
pub fn script_url(base: &str, id: Option<&MachineId>, mac: Mac) -> String {
    match id {
        Some(id) => format!("{base}?uuid={id}&mac={mac}"),
        None => format!("{base}?mac={mac}"),
    }
}

/// The script that boots a release: kernel and initramfs by content address, the signed command line.
///
/// `initrd=initramfs` names the file for a kernel that iPXE starts through its EFI stub; BIOS ignores it.
pub fn boot_script(
    http: &str,
    kernel: &Sha256Hex,
    initramfs: &Sha256Hex,
    command_line: &str,
) -> Result<String, ScriptError> {
    check("the server's URL", http, |c| c.is_ascii_graphic() && c != '$')?;
    // iPXE splits at blanks and hands the kernel the words joined again, so blanks are safe; `${` would expand, `#`
    // begins a comment only at a line's start, `||` and `&&` alone between blanks are operators.
    check("the command line", command_line, |c| (c.is_ascii_graphic() || c == ' ') && !matches!(c, '$' | '|' | '&'))?;
    Ok(format!(
        "#!ipxe\n\
         kernel {http}/a/{kernel} {command_line} initrd=initramfs || goto failed\n\
         initrd --name initramfs {http}/a/{initramfs} || goto failed\n\
         boot || goto failed\n\
         :failed\n\
         echo Kiln: the boot program could not be loaded from {http}; trying again in 10 s\n\
         sleep 10\n\
         reboot\n"
    ))
}

/// What an iPXE runs that a UEFI machine got by TFTP: it asks for an address, and here for its script. So it needs nothing
/// of Kiln's DHCP: a site's own server may name no more than shim or iPXE.
pub fn autoexec_script(http: &str) -> Result<String, ScriptError> {
    check("the server's URL", http, |c| c.is_ascii_graphic() && c != '$')?;
    Ok(format!(
        "#!ipxe\n\
         dhcp || goto failed\n\
         chain {http}{SCRIPT_PATH}?uuid=${{uuid}}&mac=${{netX/mac}}&platform=${{platform}} || goto failed\n\
         :failed\n\
         echo Kiln: no script from {http}; trying again in 10 s\n\
         sleep 10\n\
         reboot\n"
    ))
}

/// The script that starts a release's UKI on a UEFI machine: firmware, or shim in its place, checks its signature.
pub fn uki_script(http: &str, uki: &Sha256Hex) -> Result<String, ScriptError> {
    check("the server's URL", http, |c| c.is_ascii_graphic() && c != '$')?;
    let path = BootFile::Uki(uki.clone()).path();
    Ok(format!(
        "#!ipxe\n\
         chain {http}/{path} || goto failed\n\
         :failed\n\
         echo Kiln: the boot program from {http} did not start; trying again in 10 s\n\
         sleep 10\n\
         reboot\n"
    ))
}

/// The script for a machine that must wait: says why, then starts over.
pub fn wait_script(reason: &str) -> String {
    format!("#!ipxe\necho Kiln: {}\nsleep 30\nreboot\n", said(reason))
}

/// The same script, after a pause; the screen says why.
pub fn after_pause(script: &str, seconds: u64, reason: &str) -> String {
    let rest = script.strip_prefix(FIRST_LINE).unwrap_or(script);
    format!("{FIRST_LINE}echo Kiln: in {seconds} s: {}\nsleep {seconds}\n{rest}", said(reason))
}

/// As a script can print it.
fn said(reason: &str) -> String {
    let tame = |c: char| (c.is_ascii_graphic() || c == ' ') && !matches!(c, '$' | '|' | '&');
    reason.chars().map(|c| if tame(c) { c } else { ' ' }).take(200).collect()
}

fn check(what: &'static str, text: &str, allowed: fn(char) -> bool) -> Result<(), ScriptError> {
    match text.chars().find(|c| !allowed(*c)) {
        Some(bad) => Err(ScriptError { what, bad }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_script_boots_by_content_address() {
        let kernel = "aa".repeat(32).parse().unwrap();
        let initramfs = "bb".repeat(32).parse().unwrap();
        let script = boot_script("http://10.77.0.1:8080", &kernel, &initramfs, "console=ttyS0 quiet").unwrap();
        let lines: Vec<_> = script.lines().collect();
        assert_eq!(lines[0], "#!ipxe");
        assert_eq!(
            lines[1],
            format!("kernel http://10.77.0.1:8080/a/{kernel} console=ttyS0 quiet initrd=initramfs || goto failed")
        );
        assert_eq!(lines[2], format!("initrd --name initramfs http://10.77.0.1:8080/a/{initramfs} || goto failed"));
    }

    #[test]
    fn a_uefi_machine_is_sent_to_its_script_and_from_there_to_its_uki() {
        let script = autoexec_script("http://10.77.0.1:8080").unwrap();
        let asks =
            "chain http://10.77.0.1:8080/boot.ipxe?uuid=${uuid}&mac=${netX/mac}&platform=${platform} || goto failed";
        assert_eq!(script.lines().take(3).collect::<Vec<_>>(), ["#!ipxe", "dhcp || goto failed", asks]);
        let hash: Sha256Hex = "aa".repeat(32).parse().unwrap();
        let script = uki_script("http://10.77.0.1:8080", &hash).unwrap();
        let chain = format!("chain http://10.77.0.1:8080/b/{hash}/kiln.efi || goto failed");
        assert_eq!(script.lines().nth(1), Some(chain.as_str()));
        assert!(!script.contains("initrd"), "a signature covers all that starts");
        assert!(autoexec_script("http://a b").is_err() && uki_script("http://${x}", &hash).is_err());
    }

    #[test]
    fn what_ipxe_would_interpret_is_refused() {
        let hash: Sha256Hex = "aa".repeat(32).parse().unwrap();
        for (line, bad) in
            [("a\nb", '\n'), ("x=${net0/mac}", '$'), ("a || shell", '|'), ("a && shell", '&'), ("é", 'é')]
        {
            let error = boot_script("http://h", &hash, &hash, line).unwrap_err();
            assert_eq!(error, ScriptError { what: "the command line", bad });
        }
        assert!(boot_script("http://h x", &hash, &hash, "").is_err());
        assert_eq!(wait_script("a\n${b}").lines().nth(1), Some("echo Kiln: a  {b}"));
        let script = after_pause(&uki_script("http://h", &hash).unwrap(), 20, "a\n${b}");
        assert_eq!(script.lines().take(3).collect::<Vec<_>>(), ["#!ipxe", "echo Kiln: in 20 s: a  {b}", "sleep 20"]);
        assert!(script.lines().nth(3).unwrap().starts_with("chain http://h/b/"), "{script}");
    }
}
