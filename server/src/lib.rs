//! The boot server and the operator's command line: `kiln`.
//!
//! `control` holds the fleet and decides, `store` persists it, `http` and `net` speak, `web` shows. The decisions
//! themselves are kiln-fleet's and kiln-netboot's; formats and their verification are kiln-release's.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]
#![allow(clippy::single_match_else)] // two branches of equal weight read best as two arms

pub mod access;
pub mod audit;
mod ca_rotation;
pub mod catalog;
pub mod cli;
pub mod config;
pub mod control;
mod credential;
pub mod error;
pub mod expected;
pub mod expiry;
pub mod http;
mod log;
pub mod logs;
pub mod looks;
mod machine_ca;
pub mod net;
pub mod oidc;
pub mod receipt;
pub mod serve;
pub mod store;
mod vault;
pub mod view;
pub mod web;
