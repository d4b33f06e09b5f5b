//! The agent's readers that need nothing else of it: the agent is a program, and no library.

#![allow(clippy::wildcard_enum_match_arm)] // as in the agent, over other crates' enums

#[path = "../../../agent/src/disk/block.rs"]
pub mod block;
#[path = "../../../agent/src/net/dhcp6_message.rs"]
pub mod dhcp6_message;
#[path = "../../../agent/src/net/dhcp_message.rs"]
pub mod dhcp_message;
#[path = "../../../agent/src/disk/fat/mod.rs"]
pub mod fat;
#[path = "../../../agent/src/disk/gpt.rs"]
pub mod gpt;
