//! Why a packet, a setting or a TFTP request is refused.

use std::net::Ipv4Addr;

/// A datagram that is not a DHCP request this server can read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum PacketError {
    #[error("DHCP packet has {got} bytes; the shortest is 241, the longest read is {max}", max = crate::options::MAX_PACKET)]
    Length { got: usize },
    #[error("not a request: op is {got}, expected 1")]
    NotARequest { got: u8 },
    #[error("no DHCP magic cookie: plain BOOTP or another protocol")]
    NotDhcp,
    #[error("hardware type {htype} with addresses of {hlen} bytes; only Ethernet (1, 6) is served")]
    Hardware { htype: u8, hlen: u8 },
    #[error("option {code} at byte {at} claims {claimed} bytes, {left} are left")]
    OptionCut { code: u8, at: usize, claimed: usize, left: usize },
    #[error("the options have no end mark: the packet was cut short")]
    NoEnd,
    #[error("option {code} has {got} bytes, expected {expected}")]
    OptionLength { code: u8, expected: &'static str, got: usize },
    #[error("no message type (option 53)")]
    NoMessageType,
    #[error("message type {got} is none that a server reads")]
    MessageType { got: u8 },
    #[error("header refused by the decoder: {reason}")]
    Header { reason: String },
}

/// A text that is not a MAC address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("MAC address: expected 52:54:00:00:00:01, got {got:?}")]
pub struct MacError {
    /// What was given, cut to 40 characters.
    pub got: String,
}

/// An address range that no lease table can be made of.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum RangeError {
    #[error("address range {start}-{end} ends before it begins")]
    Backwards { start: Ipv4Addr, end: Ipv4Addr },
    #[error("address range {start}-{end} holds {size} addresses; at most {max} are kept", max = crate::leases::MAX_ADDRESSES)]
    TooLarge { start: Ipv4Addr, end: Ipv4Addr, size: u64 },
    #[error("lease time {got} s: give at least 60")]
    LeaseTime { got: u32 },
}

/// A TFTP packet or request that is refused. [`TftpError::code`] is RFC 1350's error code for it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum TftpError {
    #[error("packet too short or not terminated")]
    Malformed,
    #[error("opcode {got} is no request")]
    NotARequest { got: u16 },
    #[error("this server is read-only")]
    WriteRefused,
    #[error("mode {got} is not served, use octet")]
    Mode { got: String },
    #[error("no such file")]
    NoSuchFile,
    #[error("server is busy, try again")]
    Busy,
}

impl TftpError {
    /// RFC 1350 §5's code.
    pub fn code(&self) -> u16 {
        match self {
            Self::NoSuchFile => 1,
            Self::WriteRefused => 2,
            Self::Malformed | Self::NotARequest { .. } => 4,
            Self::Mode { .. } | Self::Busy => 0,
        }
    }
}
