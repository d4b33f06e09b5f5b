//! The fleet's decisions. One program, because each links the whole crate anew.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

#[path = "../common/mod.rs"]
mod common;

mod acceptance;
mod access;
mod age;
mod attestation;
mod bootloop;
mod certificate;
mod classes;
mod clones;
mod condition;
mod drift;
mod expected;
mod grant;
mod hardware;
mod held;
mod identity;
mod machine;
mod mute;
mod orders;
mod replace;
mod secrets;
mod silence;
mod trial;
mod vain;
mod way;
