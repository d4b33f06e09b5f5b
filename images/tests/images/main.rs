//! Building and signing. One program, because each links the whole crate anew.
#![allow(clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;

mod ceremony;
mod cpio;
mod prune;
mod python_tuf;
mod recipes;
mod site;
mod uki;
