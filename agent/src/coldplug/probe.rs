//! What a driver does while it looks at its hardware, and how long it may take.
//!
//! virtio's disks have no time-out in the kernel, and their driver reads the partition table while it takes a device, one
//! device after the other: one that hangs would hide all behind it, also the one with the machine's slots. So the bus is
//! told not to offer them by itself, and each is offered by a process of its own (sysfs: `drivers_autoprobe`,
//! `drivers_probe`; Documentation/ABI/testing/sysfs-bus-…). SCSI, SATA and NVMe look at theirs side by side, and have time-outs.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// The driver of virtio's disks.
pub(super) const VIRTIO_DISKS: &str = "virtio_blk";
const VIRTIO: &str = "/sys/bus/virtio";
/// Device id of a disk (virtio 1.2 §5).
const DISK: &str = "0x0002";
/// What its work is called by.
pub(super) const A_DISK: &str = "disk ";
/// So long a disk has before the next is offered as well: those that work keep their order, and so their names.
const HEAD_START: Duration = Duration::from_millis(500);
/// So often whoever waits is called.
const TURN: Duration = Duration::from_secs(1);

/// Something that a thread does, which nothing ever waits for without a deadline.
pub(super) struct Work {
    what: String,
    done: Receiver<()>,
}

/// Begins it.
pub(super) fn beside(what: &str, work: impl FnOnce() + Send + 'static) -> Work {
    let (tell, done) = channel();
    let begun = std::thread::Builder::new().spawn(move || {
        work();
        // Nobody listens to what comes late.
        let _ = tell.send(());
    });
    if let Err(error) = begun {
        println!("kiln-agent: {what}: no thread for it: {error}");
    }
    Work { what: what.to_owned(), done }
}

impl Work {
    /// It has ended by then; one whose thread died, too.
    fn ends(&self, within: Duration) -> bool {
        match self.done.recv_timeout(within) {
            Ok(()) | Err(RecvTimeoutError::Disconnected) => true,
            Err(RecvTimeoutError::Timeout) => false,
        }
    }
}

/// Waits until all have ended, so long at most; gives back what did not. `each` is called every second.
pub(super) fn wait(works: Vec<Work>, patience: Duration, each: &mut dyn FnMut()) -> Vec<String> {
    let until = Instant::now() + patience;
    let mut late = Vec::new();
    for work in works {
        let ended = loop {
            let left = until.saturating_duration_since(Instant::now());
            if work.ends(left.min(TURN)) {
                break true;
            }
            each();
            if left.is_zero() {
                break false;
            }
        };
        if !ended {
            late.push(work.what);
        }
    }
    late
}

/// The disks of virtio, not offered to their driver yet.
pub(super) struct VirtioDisks {
    bus: PathBuf,
    held: bool,
}

impl VirtioDisks {
    /// From now on the bus offers no device by itself.
    pub(super) fn hold() -> Self {
        Self::of(Path::new(VIRTIO))
    }

    fn of(bus: &Path) -> Self {
        let held = std::fs::write(bus.join("drivers_autoprobe"), "0").is_ok();
        Self { bus: bus.to_owned(), held }
    }

    /// The driver is there: each disk is offered to it. Where the bus could not be told, it has them already.
    pub(super) fn look(self, offer: fn(&Path, &str)) -> Vec<Work> {
        if !self.held {
            return Vec::new();
        }
        if let Err(error) = std::fs::write(self.bus.join("drivers_autoprobe"), "1") {
            println!("kiln-agent: virtio's bus takes no new devices: {error}");
        }
        let mut begun = Vec::new();
        for device in self.disks() {
            let (probe, name) = (self.bus.join("drivers_probe"), device.clone());
            let work = beside(&format!("{A_DISK}{device}"), move || offer(&probe, &name));
            if !work.ends(HEAD_START) {
                begun.push(work);
            }
        }
        begun
    }

    /// Names of the disks that no driver has, in the bus's order.
    fn disks(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.bus.join("devices")).into_iter().flatten().flatten();
        let free = entries.filter(|entry| {
            let device = entry.path();
            let id = std::fs::read_to_string(device.join("device")).unwrap_or_default();
            id.trim() == DISK && !device.join("driver").exists()
        });
        let mut names: Vec<String> = free.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        // virtio10 stands behind virtio9.
        names.sort_by_key(|name| (name.len(), name.clone()));
        names
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_hangs_is_left_behind_and_told() {
        let (never, nothing) = channel::<()>();
        let hangs = beside("disk virtio1", move || _ = nothing.recv());
        let dies = beside("disk virtio2", || panic!("on purpose: its thread dies"));
        let mut turns = 0;
        let works = vec![hangs, beside("disk virtio3", || {}), dies];
        // Long enough for the others, on any host.
        assert_eq!(wait(works, Duration::from_secs(5), &mut || turns += 1), ["disk virtio1"]);
        assert!(turns >= 2, "whoever pets the watchdog is called: {turns}");
        drop(never);
    }

    /// A bus of files: a named pipe that nobody reads is a driver that hangs.
    #[test]
    fn each_disk_is_offered_by_itself_and_one_that_hangs_hides_no_other() {
        let bus = tempfile::tempdir().unwrap();
        let device = |name: &str, id: &str, driver: bool| {
            let device = bus.path().join("devices").join(name);
            std::fs::create_dir_all(&device).unwrap();
            std::fs::write(device.join("device"), format!("{id}\n")).unwrap();
            if driver {
                std::fs::create_dir(device.join("driver")).unwrap();
            }
        };
        for (name, id, driver) in [
            ("virtio10", "0x0002", false),
            ("virtio9", "0x0002", false),
            ("virtio1", "0x0001", false),
            ("virtio2", "0x0002", true),
        ] {
            device(name, id, driver);
        }
        let autoprobe = bus.path().join("drivers_autoprobe");
        std::fs::write(&autoprobe, "1").unwrap();
        let disks = VirtioDisks::of(bus.path());
        assert_eq!(std::fs::read_to_string(&autoprobe).unwrap(), "0", "the driver comes meanwhile");
        assert_eq!(disks.disks(), ["virtio9", "virtio10"]);
        nix::unistd::mkfifo(&bus.path().join("drivers_probe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let begun = disks.look(|probe, device| std::fs::write(probe, device).unwrap());
        assert_eq!(std::fs::read_to_string(&autoprobe).unwrap(), "1", "what is plugged in later is looked at");
        assert_eq!(wait(begun, Duration::from_millis(100), &mut || {}), ["disk virtio9", "disk virtio10"]);
        // Without such a bus there is nothing to do.
        assert!(VirtioDisks::of(&bus.path().join("absent")).look(|_, _| panic!("no disk")).is_empty());
    }
}
