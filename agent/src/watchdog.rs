//! The hardware watchdog: armed before any other driver is loaded, so that from then on a machine that hangs is restarted by
//! its own hardware. Source: Linux Documentation/watchdog/watchdog-api.rst and ABI/testing/sysfs-class-watchdog.
//!
//! It is armed by being opened, petted by being written to, and never disarmed: closing it without the magic character
//! leaves it running. So it runs through the hand-over to the image's init, through a restart and through a kexec (see
//! `coldplug`); the time-out covers each of these jumps. The petting is a task of the agent's own loop: an agent that
//! hangs is a machine that hangs.

use crate::error::{AgentError, Result};
use crate::sys;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

/// The longest time without a petting: a kexec with a slow kernel, or the image's init up to the agent's service.
const TIMEOUT_S: i32 = 180;
/// A kexec is not risked under a shorter one: from the last petting to the next kernel's agent it is on its own.
const KEXEC_S: i32 = 120;
const PET_EVERY: Duration = Duration::from_secs(15);
const DEVICE: &str = "/dev/watchdog0";
/// What the kernel says of it: `timeout` and `max_timeout`, in seconds.
const ATTRIBUTES: &str = "/sys/class/watchdog/watchdog0";

/// The one that this process armed.
static ARMED: OnceLock<File> = OnceLock::new();

/// Begins its time anew: for whoever holds up the agent's loop, for a time that has an end.
pub fn pet() {
    if let Some(mut device) = ARMED.get()
        && let Err(error) = device.write_all(b"\0")
    {
        eprintln!("kiln-agent: {DEVICE} cannot be petted: {error}; this machine will restart");
    }
}

/// An armed watchdog.
pub struct Watchdog {
    every: Duration,
}

fn attribute(name: &str) -> Option<i32> {
    std::fs::read_to_string(Path::new(ATTRIBUTES).join(name)).ok()?.trim().parse().ok()
}

/// Sets [`TIMEOUT_S`], or the longest time that this hardware takes.
fn set(max_timeout: Option<i32>, set: &mut dyn FnMut(i32) -> io::Result<i32>) -> io::Result<i32> {
    match (set(TIMEOUT_S), max_timeout) {
        (Err(_), Some(max)) if (1..TIMEOUT_S).contains(&max) => set(max),
        (done, Some(_) | None) => done,
    }
}

/// How often a watchdog of so many seconds is petted: two pettings may come late.
fn pause(seconds: Option<i32>) -> Duration {
    let seconds = seconds.and_then(|seconds| u64::try_from(seconds).ok()).filter(|seconds| *seconds > 0);
    seconds.map_or(PET_EVERY, |seconds| PET_EVERY.min(Duration::from_millis(seconds * 1000 / 3)))
}

/// Fails where the watchdog's time does not cover the jump of a kexec. A cold boot resets most of them with the machine.
pub fn covers_a_kexec() -> Result<()> {
    let timeout = if Watchdog::is_there() { attribute("timeout") } else { None };
    covers(timeout)
}

/// No watchdog, or one of which nobody knows, holds up nothing.
fn covers(timeout: Option<i32>) -> Result<()> {
    match timeout {
        Some(seconds) if (1..KEXEC_S).contains(&seconds) => Err(AgentError::ShortWatchdog { seconds, least: KEXEC_S }),
        Some(_) | None => Ok(()),
    }
}

impl Watchdog {
    /// Whether there is one.
    pub fn is_there() -> bool {
        Path::new(DEVICE).exists()
    }

    /// Arms it and says so; a machine without one is told of, and boots.
    pub fn arm() -> Option<Self> {
        if !Self::is_there() {
            println!("kiln-agent: no hardware watchdog: if this machine hangs, a person must restart it");
            return None;
        }
        let device = match OpenOptions::new().write(true).open(DEVICE) {
            Ok(device) => device,
            Err(error) => {
                println!("kiln-agent: {DEVICE} cannot be opened: {error}; is another program watching?");
                return None;
            }
        };
        let timeout = set(attribute("max_timeout"), &mut |seconds| sys::watchdog_timeout(&device, seconds));
        // One that is too short for a jump restarts the machine instead.
        let seconds = match timeout {
            Ok(seconds) => {
                println!("kiln-agent: hardware watchdog: a hang of {seconds} s restarts this machine");
                Some(seconds)
            }
            Err(error) => {
                println!("kiln-agent: hardware watchdog with a time-out of its own: {error}");
                attribute("timeout")
            }
        };
        // What is closed goes on, unpetted: there is one.
        let _ = ARMED.set(device);
        Some(Self { every: pause(seconds) })
    }

    /// Pets it for as long as the agent's loop turns.
    pub async fn keep(self) {
        turn(self.every, pet).await;
    }
}

/// For as long as the loop turns that this is a task of.
async fn turn(every: Duration, pet: impl Fn()) {
    loop {
        pet();
        tokio::time::sleep(every).await;
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    /// A file in place of the device: grows by each petting of this process.
    pub(crate) fn petted() -> u64 {
        let length = |file: &File| file.metadata().unwrap().len();
        length(ARMED.get_or_init(|| tempfile::tempfile().unwrap()))
    }

    /// Hardware that takes at most so many seconds, and what was asked of it.
    fn asked(most: i32, known: Option<i32>) -> (io::Result<i32>, Vec<i32>) {
        let mut asked = Vec::new();
        let result = set(known, &mut |seconds| {
            asked.push(seconds);
            if seconds <= most { Ok(seconds) } else { Err(io::Error::from_raw_os_error(libc::EINVAL)) }
        });
        (result, asked)
    }

    #[test]
    fn hardware_that_refuses_the_time_gets_the_longest_that_it_takes() {
        for (most, known, set, tries) in [
            (600, Some(600), Some(180), vec![180]),
            (180, None, Some(180), vec![180]),
            (63, Some(63), Some(63), vec![180, 63]),
            // It says nothing, or what cannot be: its own time-out holds.
            (63, None, None, vec![180]),
            (63, Some(0), None, vec![180]),
            (63, Some(600), None, vec![180]),
        ] {
            let (result, asked) = asked(most, known);
            assert_eq!((result.ok(), asked), (set, tries), "{most} {known:?}");
        }
    }

    #[test]
    fn a_kexec_is_not_risked_under_a_short_one() {
        for (timeout, covered) in
            [(None, true), (Some(0), true), (Some(1), false), (Some(119), false), (Some(120), true), (Some(180), true)]
        {
            let kind = covers(timeout).err().map(|error| error.kind());
            assert_eq!(kind, (!covered).then_some("kexec-short-watchdog"), "{timeout:?}");
        }
    }

    #[test]
    fn it_is_petted_while_the_agents_loop_turns_and_not_while_that_hangs() {
        static PETTED: AtomicU32 = AtomicU32::new(0);
        const EVERY: Duration = Duration::from_millis(5);
        async fn until(count: u32) {
            while PETTED.load(Ordering::Relaxed) < count {
                tokio::time::sleep(EVERY).await;
            }
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let patience = Duration::from_secs(20);
            tokio::spawn(turn(EVERY, || {
                PETTED.fetch_add(1, Ordering::Relaxed);
            }));
            tokio::time::timeout(patience, until(20)).await.expect("the loop turns");
            let before = PETTED.load(Ordering::Relaxed);
            std::thread::sleep(20 * EVERY);
            assert_eq!(PETTED.load(Ordering::Relaxed), before, "the loop hung");
            tokio::time::timeout(patience, until(before + 20)).await.expect("the loop turns again");
        });
    }

    #[test]
    fn a_short_one_is_petted_more_often() {
        let seconds = |of: Option<i32>| pause(of).as_millis();
        assert_eq!((seconds(Some(180)), seconds(Some(45)), seconds(None)), (15_000, 15_000, 15_000));
        assert_eq!((seconds(Some(30)), seconds(Some(1)), seconds(Some(0))), (10_000, 333, 15_000));
    }
}
