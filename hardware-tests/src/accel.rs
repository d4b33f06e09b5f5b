//! KVM or emulation: decided by running a guest, not by opening a device.
//!
//! On some hosts `/dev/kvm` opens and a boot sector runs, but a kernel hangs. So a real kernel must reach its end.

use crate::command;
use crate::error::{AtPath, LabError};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How QEMU runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// On the processor.
    Kvm,
    /// By translating them.
    Tcg,
}

/// Starting a kernel without a root takes a second on working KVM.
const PROBE: Duration = Duration::from_secs(10);

impl Accelerator {
    /// QEMU's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }

    /// QEMU's option for it.
    pub fn option(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            // Each store to a page that holds translated code goes by a slow path, also when that code is long dead: after
            // a kexec nearly all memory is such. A small buffer of translated code is emptied before that hurts; the
            // kernel after a kexec unpacks its 33 MB of initrd in 0.5 s with it, in 4 s with QEMU's own of 1 GiB.
            Self::Tcg => "tcg,tb-size=128",
        }
    }

    /// The processor it shows.
    pub fn cpu(self) -> &'static str {
        match self {
            Self::Kvm => "host",
            // Without the fast string instructions the kernel copies in words. TCG makes a `rep movsb` one store per byte,
            // each by its slow path where the page held translated code: after a kexec, unpacking 33 MB took 6.8 s.
            // AVX is slower than what programs do without it: SHA-256 comes to 18 MB/s with, to 34 MB/s without.
            Self::Tcg => "max,-erms,-fsrm,-avx,-avx2",
        }
    }

    /// Tries `kernel` under KVM: it must find no root and restart within a deadline. The answer is kept in `memory`
    /// until the host restarts. Returns the choice and the reason.
    pub fn probe(kernel: &Path, memory: &Path) -> Result<(Self, String), LabError> {
        if let Err(error) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
            return Ok((Self::Tcg, format!("/dev/kvm cannot be opened ({error})")));
        }
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let known = std::fs::read_to_string(memory).unwrap_or_default();
        let works = match known.trim().strip_prefix(boot.trim()).map(str::trim) {
            Some("works") => true,
            Some("hangs") => false,
            _ => {
                let works = kernel_restarts(kernel)?;
                let word = if works { "works" } else { "hangs" };
                std::fs::write(memory, format!("{} {word}\n", boot.trim())).at(memory)?;
                works
            }
        };
        Ok(if works {
            (Self::Kvm, "a kernel ran under KVM".into())
        } else {
            (Self::Tcg, format!("/dev/kvm opens, but a kernel hangs under it{}", why_it_hangs()))
        })
    }
}

/// What is known of it: PVM does without the processor's virtualisation and runs only kernels that are built for it, which
/// no distribution's are.
fn why_it_hangs() -> &'static str {
    if Path::new("/sys/module/kvm_pvm").exists() { " (it is PVM's: only kernels made for it run)" } else { "" }
}

fn kernel_restarts(kernel: &Path) -> Result<bool, LabError> {
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35", "-accel", "kvm"])
        .args(["-cpu", "host", "-m", "256M", "-no-reboot", "-append", "panic=-1", "-kernel"])
        .arg(kernel)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = qemu.spawn().map_err(|source| LabError::Spawn { command: command::shown(&qemu), source })?;
    let begun = Instant::now();
    while begun.elapsed() < PROBE {
        if let Ok(Some(status)) = child.try_wait() {
            return Ok(status.success());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let _ = child.kill();
    let _ = child.wait();
    Ok(false)
}
