//! `kiln-agent`: PID 1 of the initramfs, then a service of the running system. See docs/boot-walkthrough.md.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod api;
mod change;
mod coldplug;
mod disk;
mod error;
mod facts;
mod fetch;
mod flow;
mod handoff;
mod health;
mod init;
mod inventory;
mod journal;
mod kexec;
mod local;
mod memory;
mod modules;
mod mounts;
mod net;
mod plan;
mod retry;
mod secureboot;
mod service;
mod stage;
mod sys;
#[cfg(test)]
mod testing;
mod verifier;
mod verity;
mod watchdog;
mod wipe;

use error::{AgentError, Result};
use std::process::ExitCode;

const USAGE: &str = "usage: kiln-agent stage --settings FILE --state DIR --out DIR [--tries N]
       kiln-agent service      (by the image's init)
       kiln-agent inventory [--listen SECONDS]
       kiln-agent --version
As PID 1 it boots the machine.";

fn main() -> ExitCode {
    if std::process::id() == 1 {
        init::run();
    }
    let mut arguments = std::env::args().skip(1);
    let done: Result<()> = match arguments.next().as_deref() {
        Some("service") => service::run(),
        Some("inventory") => inventory::print(arguments),
        Some("stage") => stage::Options::parse(arguments).and_then(|options| stage::run(&options)),
        Some("--version") => {
            println!("kiln-agent {}", env!("CARGO_PKG_VERSION"));
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
            eprintln!("kiln-agent: {error} ({})", error.kind());
            ExitCode::from(error.class().exit_code())
        }
    }
}
