//! The virtual rack: real firmware, real PXE, the real programs, in namespaces of its own.
//!
//! `kiln` and `kiln-agent` are black boxes here, started as a site would start them. What the rack adds is machines
//! (QEMU with OVMF or SeaBIOS), a network, a site's own DHCP server, hands for power and cables, and patience with a
//! reason: everything waited for has a deadline that the guest's progress resets.
#![cfg_attr(test, allow(clippy::unwrap_used))]
#![allow(missing_docs)] // used by its own program and tests only

pub mod accel;
pub mod api;
pub mod bench;
pub mod bmc;
pub mod checks;
pub mod command;
pub mod console;
pub mod enclosure;
pub mod error;
pub mod forward;
pub mod golden;
pub mod live;
pub mod machine;
pub mod nbd;
pub mod net;
pub mod newer_qemu;
pub mod ntp;
pub mod paths;
pub mod qmp;
pub mod rack;
pub mod report;
pub mod rest;
pub mod server;
pub mod site;
mod spec;
pub mod story;
pub mod testing;
pub mod tpm;
pub mod trunk;
pub mod variables;
