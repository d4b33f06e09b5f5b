//! The hardware watchdog: from the first drivers on, a machine that hangs is restarted by its own hardware. Source: Linux
//! Documentation/watchdog/watchdog-api.rst.
//!
//! It is armed by being opened, petted by being written to, and never disarmed: closing it without the magic character
//! leaves it running. So it runs through the hand-over to the image's init, through a restart and through a kexec (see
//! `coldplug`); the time-out covers each of these jumps. The petting is a task of the agent's own loop: an agent that
//! hangs is a machine that hangs.

use crate::sys;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::time::Duration;

/// The longest time without a petting: a kexec with a slow kernel, or the image's init up to the agent's service.
const TIMEOUT_S: i32 = 180;
const PET_EVERY: Duration = Duration::from_secs(15);
const DEVICE: &str = "/dev/watchdog0";

/// An armed watchdog.
pub struct Watchdog {
    device: File,
}

impl Watchdog {
    /// Arms it and says so; a machine without one is told of, and boots.
    pub fn arm() -> Option<Self> {
        if !Path::new(DEVICE).exists() {
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
        match sys::watchdog_timeout(&device, TIMEOUT_S) {
            Ok(seconds) => println!("kiln-agent: hardware watchdog: a hang of {seconds} s restarts this machine"),
            // Its own time-out holds; it may be too short for a jump, and then the machine restarts instead.
            Err(error) => println!("kiln-agent: hardware watchdog with a time-out of its own: {error}"),
        }
        Some(Self { device })
    }

    /// Pets it for as long as the agent's loop turns.
    pub async fn keep(mut self) {
        loop {
            if let Err(error) = self.device.write_all(b"\0") {
                eprintln!("kiln-agent: {DEVICE} cannot be petted: {error}; this machine will restart");
            }
            tokio::time::sleep(PET_EVERY).await;
        }
    }
}
