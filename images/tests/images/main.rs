//! Building and signing. One program, because each links the whole crate anew.
#![allow(clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;
#[path = "../oracle/mod.rs"]
mod oracle;

mod both_ways;
mod ceremony;
mod cpio;
mod differential;
mod prune;
mod python;
mod python_tuf;
mod recipes;
mod site;
mod tough;
mod uki;
