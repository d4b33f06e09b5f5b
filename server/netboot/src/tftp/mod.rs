//! TFTP as a server of read requests: RFC 1350 with options (2347), blksize (2348), timeout and tsize (2349) and
//! windowsize (7440).
//!
//! [`Request::parse`] reads the first packet, [`BootFile`] is the closed list of names served, [`Transfer`] is one
//! download. Not here: writing, netascii, multicast (RFC 2090), which no firmware uses.

mod file;
mod packet;
mod transfer;

pub use file::BootFile;
pub use packet::{Request, error_packet};
pub use transfer::{Action, Ending, Limits, Transfer};
