//! `kiln-agent`: PID 1 of the initramfs, then a service of the running system. See docs/boot-walkthrough.md.

#![cfg_attr(test, allow(clippy::unwrap_used))]

/// What the agent says goes to its console, and to the server with the kernel's lines: everywhere in this program.
macro_rules! println {
    ($($words:tt)*) => { $crate::log::say(format_args!($($words)*)) };
}
/// The same for what should not be.
macro_rules! eprintln {
    ($($words:tt)*) => { $crate::log::warn(format_args!($($words)*)) };
}

mod acceptance;
mod api;
mod attest;
mod change;
mod coldplug;
mod console;
mod dbx;
mod disk;
mod drift;
mod error;
mod exec;
mod facts;
mod fetch;
mod flow;
mod handoff;
mod health;
mod hooks;
mod ima;
mod init;
mod introduce;
mod inventory;
mod journal;
mod kexec;
mod local;
mod log;
mod memory;
mod modules;
mod mounts;
mod net;
mod plan;
mod restart;
mod retry;
mod run;
mod safe;
mod secrets;
mod secureboot;
mod service;
mod spool;
mod stage;
mod sys;
#[cfg(test)]
mod testing;
mod tls;
mod tpm;
mod uplink;
mod verifier;
mod verity;
mod watchdog;
mod wipe;

use error::{AgentError, Result};
use std::path::Path;
use std::process::ExitCode;

const USAGE: &str = "usage: kiln-agent stage --settings FILE --state DIR --out DIR [--tries N]
       kiln-agent disk FILE SITE
       kiln-agent service      (by the image's init)
       kiln-agent exec POLICY [report]  (try an allow-list on this machine)
       kiln-agent inventory [--listen SECONDS]
       kiln-agent acceptance   (by an image of class acceptance)
       kiln-agent --version
As PID 1 it boots the machine.";

fn main() -> ExitCode {
    if std::process::id() == 1 {
        init::run();
    }
    let is_hook = std::env::args_os().next().is_some_and(|me| Path::new(&me).starts_with(restart::HOOKS));
    let mut arguments = std::env::args().skip(1);
    let done: Result<()> = match arguments.next().as_deref() {
        way if is_hook => restart::hook(way),
        Some(restart::LAST_RESORT) => {
            restart::last_resort();
            Ok(())
        }
        Some(coldplug::ALONE) => coldplug::alone(arguments),
        Some("service") => service::run(),
        Some(name @ ("exec-guard" | "exec")) => {
            let policy = arguments.next().unwrap_or_default();
            let run = if name == "exec" { exec::watch_here } else { exec::guard::run };
            exec::choice(arguments.next().as_deref()).and_then(|choice| run(Path::new(&policy), choice))
        }
        Some("acceptance") => acceptance::run(arguments.next()),
        Some("inventory") => inventory::print(arguments),
        Some("stage") => stage::Options::parse(arguments).and_then(|options| stage::run(&options)),
        Some("disk") => match (arguments.next(), arguments.next()) {
            (Some(file), Some(site)) => disk::show::run(file.as_ref(), &site),
            _ => Err(AgentError::Usage(USAGE.into())),
        },
        Some("--version") => {
            std::println!("kiln-agent {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
        other => Err(AgentError::Usage(format!(
            "{}\n{USAGE}",
            other.map_or("no command".into(), |o| format!("unknown command {o}"))
        ))),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            std::eprintln!("kiln-agent: {error} ({})", error.kind());
            ExitCode::from(error.class().exit_code())
        }
    }
}
