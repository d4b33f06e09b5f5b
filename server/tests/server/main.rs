//! The boot server's tests. One program, because each links the whole crate anew.
#![allow(clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;
#[path = "../../../images/tests/namespace/mod.rs"]
mod namespace;

mod access;
mod age;
mod agent_api;
mod approvers;
mod assign;
mod attestation;
mod audit;
mod certificates;
mod classes;
mod clones;
mod commits;
mod condition;
mod crowd;
mod disk_full;
mod expected;
mod fuzzed;
mod held_reports;
mod hostile;
mod http;
mod https;
mod introductions;
mod inventory;
mod kexecs;
mod limits;
mod logs;
mod oidc;
mod orders;
mod positions;
mod prune;
mod secrets;
mod trial;
mod trust;
mod web;
mod web_machine;
