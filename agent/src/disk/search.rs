//! Which disks there are, and what is on each. Each is looked at in a thread of its own, and has only so long: a dying
//! disk (a SATA one may take the kernel minutes for one sector) or a shelf of blank ones must hold up neither the boot nor
//! whoever pets the watchdog. A thread that is late is left behind; its reads end with the disk, or with a signal.

use super::DiskError;
use super::device::Device;
use super::layout::{Candidate, Found, look};
use crate::coldplug;
use std::path::Path;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};

pub(super) const BLOCKS: &str = "/sys/class/block";
/// No disks: memory, tapes, floppies, and what is made of other devices.
const NO_DISKS: [&str; 8] = ["loop", "ram", "zram", "dm-", "md", "sr", "fd", "nbd"];
/// So long a disk has to show what is on it: twice what the 1 152 reads of a blank spinning one take.
pub const LOOKS: Duration = Duration::from_secs(20);
const LOOKING: &str = "looking at it";
/// So long the one that is used has to be opened, and partitioned where it is new.
pub const OPENS: Duration = Duration::from_secs(60);
/// What is said of a disk that does not open in this time.
pub const OPENING: &str = "opening it";

/// Finds out what is on a disk.
type Look = Box<dyn FnOnce() -> Result<Found, DiskError> + Send>;

/// A disk that is to be looked at.
struct Disk {
    name: String,
    size: u64,
    look: Look,
}

/// A disk's attribute in sysfs, as a number.
fn attribute(blocks: &Path, name: &str, what: &str) -> Option<u64> {
    std::fs::read_to_string(blocks.join(name).join(what)).ok()?.trim().parse().ok()
}

/// The disks that the kernel shows in this folder of sysfs.
fn disks(blocks: &Path) -> impl Iterator<Item = String> {
    let entries = std::fs::read_dir(blocks).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(move |name| {
        let is = |what: &str| attribute(blocks, name, what).is_some_and(|value| value != 0);
        !NO_DISKS.iter().any(|prefix| name.starts_with(prefix))
            && !blocks.join(name).join("partition").exists()
            && is("size")
            && !is("removable")
            && !is("ro")
            // NVMe multipath shows each path besides the disk itself; it has no node.
            && !is("hidden")
    })
}

/// Every disk of this machine, looked at.
pub(super) async fn candidates(site: &str) -> Vec<Candidate> {
    let disks = disks(Path::new(BLOCKS)).map(|name| {
        let size = attribute(Path::new(BLOCKS), &name, "size").unwrap_or(0).saturating_mul(512);
        let (site, disk) = (site.to_owned(), name.clone());
        Disk { name, size, look: Box::new(move || what_is_on(&disk, &site)) }
    });
    look_at(disks.collect(), LOOKS).await
}

/// Those that failed, or gave no answer. What is only not Kiln's is nobody's affair.
pub(super) fn broken(disks: &[Candidate]) -> Vec<DiskError> {
    let failed = disks.iter().filter_map(|disk| disk.found.as_ref().err());
    failed.filter(|error| matches!(error, DiskError::Io { .. } | DiskError::Late { .. })).cloned().collect()
}

fn what_is_on(name: &str, site: &str) -> Result<Found, DiskError> {
    let sector =
        attribute(Path::new(BLOCKS), name, "queue/logical_block_size").and_then(|bytes| u32::try_from(bytes).ok());
    if let Some(bytes) = sector.filter(|bytes| *bytes != 512) {
        return Err(DiskError::SectorSize { disk: name.to_owned(), bytes });
    }
    let failed = |reason: String| DiskError::Io { disk: name.to_owned(), what: LOOKING, reason };
    let path = Path::new("/dev").join(name);
    // One that never answers is not even opened here: this process could not close it any more.
    coldplug::answers(&path);
    let device = Device::open(&path).map_err(|e| failed(e.to_string()))?;
    look(&device, site).map_err(|e| failed(e.to_string()))
}

/// All at once, so that together they take no longer than one may.
async fn look_at(disks: Vec<Disk>, patience: Duration) -> Vec<Candidate> {
    let begun = disks.into_iter().map(|Disk { name, size, look }| (name, size, beside(look)));
    // Collected before the first answer is waited for: this is what begins them.
    let begun: Vec<_> = begun.collect();
    let until = Instant::now() + patience;
    let mut candidates = Vec::new();
    for (name, size, answer) in begun {
        let found = heard(answer, until, patience, &name, LOOKING).await.flatten();
        candidates.push(Candidate { name, size, found });
    }
    candidates
}

/// Does `what` to a disk in a thread; one that takes longer than `patience` is no disk for this boot.
pub async fn in_time<T: Send + 'static>(
    disk: &str,
    what: &'static str,
    patience: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, DiskError> {
    heard(beside(work), Instant::now() + patience, patience, disk, what).await
}

/// Begins it in a thread that the runtime does not know: nothing ever waits for it to end.
fn beside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> oneshot::Receiver<T> {
    let (tell, told) = oneshot::channel();
    let begun = std::thread::Builder::new().spawn(move || {
        // Nobody listens to what comes late.
        let _ = tell.send(work());
    });
    if let Err(error) = begun {
        println!("kiln-agent: no thread for a disk: {error}");
    }
    told
}

async fn heard<T>(
    answer: oneshot::Receiver<T>,
    until: Instant,
    patience: Duration,
    disk: &str,
    what: &'static str,
) -> Result<T, DiskError> {
    let reason = match timeout_at(until, answer).await {
        Ok(Ok(answer)) => return Ok(answer),
        Ok(Err(_)) => "its thread ended without an answer".to_owned(),
        Err(_) => format!("no answer within {} s", patience.as_secs()),
    };
    Err(DiskError::Late { disk: disk.to_owned(), what, reason })
}

#[cfg(test)]
mod tests {
    use super::super::block::Block;
    use super::*;
    use std::io;
    use std::sync::{Arc, Barrier, Mutex, mpsc};

    /// A disk of zeros; each of its reads begins with this.
    struct Disturbed<F: Fn() -> io::Result<()>>(F);

    impl<F: Fn() -> io::Result<()>> Block for Disturbed<F> {
        fn size(&self) -> u64 {
            16 << 20
        }

        fn read_at(&self, _at: u64, bytes: &mut [u8]) -> io::Result<()> {
            bytes.fill(0);
            (self.0)()
        }

        fn write_at(&mut self, _at: u64, _bytes: &[u8]) -> io::Result<()> {
            Err(io::Error::other("nobody writes while looking"))
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn disk(name: &str, read: impl Fn() -> io::Result<()> + Send + 'static) -> Disk {
        let (name, disturbed) = (name.to_owned(), Disturbed(read));
        let disk = name.clone();
        let failed = move |e: io::Error| DiskError::Io { disk, what: LOOKING, reason: e.to_string() };
        Disk { name, size: disturbed.size(), look: Box::new(move || look(&disturbed, "lab").map_err(failed)) }
    }

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
    }

    #[test]
    fn what_is_no_disk_of_its_own_is_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let add = |name: &str, files: &[(&str, &str)]| {
            let folder = dir.path().join(name);
            std::fs::create_dir_all(&folder).unwrap();
            for (file, text) in
                [("size", "2048\n"), ("ro", "0\n"), ("removable", "0\n"), ("hidden", "0\n")].iter().chain(files)
            {
                std::fs::write(folder.join(file), text).unwrap();
            }
        };
        // With several paths to it, and their own names; an earlier kernel has no such attribute.
        add("nvme0n1", &[]);
        add("nvme0c0n1", &[("hidden", "1\n")]);
        add("nvme0c1n1", &[("hidden", "1\n")]);
        add("nvme0n1p1", &[("partition", "1\n")]);
        add("sda", &[]);
        std::fs::remove_file(dir.path().join("sda/hidden")).unwrap();
        add("sdb", &[("removable", "1\n")]);
        add("sdc", &[("ro", "1\n")]);
        add("sdd", &[("size", "0\n")]);
        for name in ["loop0", "ram0", "zram0", "dm-0", "md0", "sr0", "fd0", "nbd0"] {
            add(name, &[]);
        }
        let mut found: Vec<String> = disks(dir.path()).collect();
        found.sort();
        assert_eq!(found, ["nvme0n1", "sda"]);
        assert_eq!(disks(&dir.path().join("gone")).count(), 0);
    }

    #[test]
    fn a_disk_that_never_answers_costs_its_time_and_no_other_disk() {
        let (never, nothing) = mpsc::channel::<()>();
        let nothing = Mutex::new(nothing);
        let hangs = disk("sda", move || nothing.lock().unwrap().recv().map_err(io::Error::other));
        let broken = disk("sdb", || Err(io::Error::from_raw_os_error(libc::EIO)));
        let disks = vec![hangs, broken, disk("sdc", || Ok(()))];
        // Long enough for the two that answer, on any host.
        let found = runtime().block_on(look_at(disks, Duration::from_secs(5)));
        let [late, broken, blank] = &found[..] else { panic!("{found:?}") };
        let reason = "no answer within 5 s".to_owned();
        assert_eq!(late.found, Err(DiskError::Late { disk: "sda".into(), what: LOOKING, reason }));
        assert_eq!(late.found.clone().unwrap_err().to_string(), "sda: looking at it: no answer within 5 s");
        assert!(matches!(&broken.found, Err(DiskError::Io { disk, .. }) if disk == "sdb"), "{broken:?}");
        assert_eq!((&*blank.name, blank.size, &blank.found), ("sdc", 16 << 20, &Ok(Found::Blank)));
        let told: Vec<String> = super::broken(&found).iter().map(ToString::to_string).collect();
        assert!(told.len() == 2 && told[0].starts_with("sda: ") && told[1].starts_with("sdb: "), "{told:?}");
        drop(never);
    }

    #[test]
    fn all_are_looked_at_at_once() {
        // Each answers only once all three are asked.
        let all = Arc::new(Barrier::new(3));
        let disks = ["sda", "sdb", "sdc"].map(|name| {
            let (all, first) = (Arc::clone(&all), std::sync::Once::new());
            disk(name, move || {
                first.call_once(|| {
                    all.wait();
                });
                Ok(())
            })
        });
        let found = runtime().block_on(look_at(disks.into(), Duration::from_secs(60)));
        assert!(found.iter().all(|disk| disk.found == Ok(Found::Blank)), "{found:?}");
    }

    /// The task that lets the disk go stands for the one that pets the watchdog: one thread has both.
    #[test]
    fn the_runtime_turns_while_a_disk_is_looked_at_or_opened() {
        runtime().block_on(async {
            for opens in [false, true] {
                let (go, wait) = mpsc::channel::<()>();
                let turned = tokio::spawn(async move { drop(go) });
                let patience = Duration::from_secs(60);
                if opens {
                    // The channel's end is what is waited for.
                    let opened = in_time("sda", OPENING, patience, move || wait.recv().is_err()).await;
                    assert_eq!(opened, Ok(true));
                } else {
                    let wait = Mutex::new(wait);
                    let slow = disk("sda", move || {
                        assert!(wait.lock().unwrap().recv().is_err());
                        Ok(())
                    });
                    let found = look_at(vec![slow], patience).await;
                    assert_eq!(found[0].found, Ok(Found::Blank));
                }
                turned.await.unwrap();
            }
        });
    }

    #[test]
    fn a_thread_that_dies_is_an_answer_too() {
        let panics = move || -> u8 { panic!("on purpose: the disk's thread dies") };
        let died = runtime().block_on(in_time("sda", OPENING, Duration::from_secs(60), panics));
        let reason = "its thread ended without an answer".to_owned();
        assert_eq!(died, Err(DiskError::Late { disk: "sda".into(), what: OPENING, reason }));
    }
}
