//! The server's readers that need nothing else of it: without its store and its sockets the targets build in a third of
//! the time. `server/tests/server/fuzzed.rs` has the crate's own in this place.
#![allow(dead_code, unreachable_pub)] // what only the rest of the server uses

#[path = "../../server/src/expected.rs"]
pub mod expected;
#[path = "../../server/src/oidc/token.rs"]
pub mod oidc;
