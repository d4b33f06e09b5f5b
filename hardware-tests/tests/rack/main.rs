//! Everything that needs the rack's namespaces, in one program: boots wait for processors, silences for deadlines, so they
//! share the time. `cargo test -p kiln-lab --test rack -- --test-threads 32`; [`kiln_lab::testing`] limits what runs at once.
#![allow(clippy::unwrap_used)]

mod acceptance;
mod attacks;
mod boots;
mod chosen;
mod cleanup;
mod cloned;
mod cuts;
mod disk;
mod drift;
mod esp_files;
mod exec;
mod expired;
mod extras;
mod floor;
mod hanging;
mod hardware;
mod lying_dhcp;
mod measured;
mod network;
mod option_roms;
mod orders;
mod rescue;
mod revoked_loader;
mod rotten;
mod screen;
mod script;
mod secrets;
mod secure_boot;
mod shim;
mod silence;
mod stolen;
mod support;
mod thefts;
mod watchdog;
