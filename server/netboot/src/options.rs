//! DHCP's options as raw bytes, read by Kiln itself before dhcproto sees anything.
//!
//! Needed because dhcproto keeps only the first entry of option 93, re-encodes option 82 in its own order, takes a
//! packet cut inside its options for a shorter one, and asserts lengths only in debug builds. RFC 2131 §3, §4.1; RFC
//! 2132; RFC 3396.

use crate::PacketError;
use std::collections::BTreeMap;

/// Longest packet read. Ethernet's MTU is 1500; a client may announce more, none needs it for a request.
pub(crate) const MAX_PACKET: usize = 4096;
/// Bytes before the options: the BOOTP header and the magic cookie.
pub(crate) const HEADER: usize = 240;
/// RFC 2131 §3.
pub(crate) const MAGIC: [u8; 4] = [99, 130, 83, 99];
const SNAME: std::ops::Range<usize> = 44..108;
const FILE: std::ops::Range<usize> = 108..236;

/// Option numbers that are read or written here (RFC 2132, 3046, 4578, and iPXE's 175).
pub(crate) mod code {
    pub(crate) const PAD: u8 = 0;
    pub(crate) const VENDOR_SPECIFIC: u8 = 43;
    pub(crate) const REQUESTED_ADDRESS: u8 = 50;
    pub(crate) const OVERLOAD: u8 = 52;
    pub(crate) const MESSAGE_TYPE: u8 = 53;
    pub(crate) const SERVER_ID: u8 = 54;
    pub(crate) const MAX_SIZE: u8 = 57;
    pub(crate) const VENDOR_CLASS: u8 = 60;
    pub(crate) const USER_CLASS: u8 = 77;
    pub(crate) const RELAY_AGENT: u8 = 82;
    pub(crate) const ARCHITECTURE: u8 = 93;
    pub(crate) const MACHINE_ID: u8 = 97;
    pub(crate) const IPXE: u8 = 175;
    pub(crate) const END: u8 = 255;
}

/// A packet's options by number; parts of a split one joined (RFC 3396).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Options(BTreeMap<u8, Vec<u8>>);

impl Options {
    pub(crate) fn get(&self, code: u8) -> Option<&[u8]> {
        self.0.get(&code).map(Vec::as_slice)
    }

    /// The option as exactly `N` bytes; an error if it is there with another length.
    pub(crate) fn fixed<const N: usize>(
        &self,
        code: u8,
        expected: &'static str,
    ) -> Result<Option<[u8; N]>, PacketError> {
        self.get(code)
            .map(|v| v.try_into().map_err(|_| PacketError::OptionLength { code, expected, got: v.len() }))
            .transpose()
    }

    /// Reads all of a packet's options, those in the overloaded `file` and `sname` fields too (RFC 2132 §9.3).
    pub(crate) fn read(packet: &[u8]) -> Result<Self, PacketError> {
        if packet.len() <= HEADER || packet.len() > MAX_PACKET {
            return Err(PacketError::Length { got: packet.len() });
        }
        if packet[HEADER - 4..HEADER] != MAGIC {
            return Err(PacketError::NotDhcp);
        }
        let mut options = Self::default();
        if !options.read_area(&packet[HEADER..], HEADER)? {
            return Err(PacketError::NoEnd);
        }
        // RFC 3396 §5: the aggregate order is options, file, sname. A missing end mark in those is forgiven.
        let overload = options.fixed::<1>(code::OVERLOAD, "1")?.map_or(0, |[v]| v);
        if overload & 1 != 0 {
            options.read_area(&packet[FILE], FILE.start)?;
        }
        if overload & 2 != 0 {
            options.read_area(&packet[SNAME], SNAME.start)?;
        }
        Ok(options)
    }

    /// Reads sub-options, as options 43 and 175 hold: no magic, the end mark may be missing, a cut one ends the list.
    pub(crate) fn read_encapsulated(bytes: &[u8]) -> Self {
        let mut options = Self::default();
        let _ = options.read_area(bytes, 0);
        options
    }

    /// Whether an end mark was found.
    fn read_area(&mut self, area: &[u8], offset: usize) -> Result<bool, PacketError> {
        let mut at = 0;
        while let Some(&code) = area.get(at) {
            match code {
                code::PAD => at += 1,
                code::END => return Ok(true),
                _ => {
                    let cut = |claimed| PacketError::OptionCut {
                        code,
                        at: offset + at,
                        claimed,
                        left: area.len().saturating_sub(at + 2),
                    };
                    let length = usize::from(*area.get(at + 1).ok_or_else(|| cut(1))?);
                    let value = area.get(at + 2..at + 2 + length).ok_or_else(|| cut(length))?;
                    self.0.entry(code).or_default().extend_from_slice(value);
                    at += 2 + length;
                }
            }
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(options: &[u8]) -> Vec<u8> {
        let mut p = vec![0; HEADER - 4];
        p.extend(MAGIC);
        p.extend(options);
        p
    }

    #[test]
    fn split_options_are_joined_and_overloaded_fields_read() {
        let mut p = packet(&[43, 1, b'a', 53, 1, 1, 43, 2, b'b', b'c', 52, 1, 3, 255]);
        p[FILE.start..FILE.start + 4].copy_from_slice(&[60, 1, b'x', 255]);
        p[SNAME.start..SNAME.start + 4].copy_from_slice(&[60, 1, b'y', 255]);
        let options = Options::read(&p).unwrap();
        assert_eq!(options.get(43), Some(&b"abc"[..]));
        assert_eq!(options.get(60), Some(&b"xy"[..]));
    }

    #[test]
    fn cut_packets_are_refused_by_name() {
        assert_eq!(Options::read(&[0; 100]), Err(PacketError::Length { got: 100 }));
        assert_eq!(Options::read(&packet(&[53, 1, 1])), Err(PacketError::NoEnd));
        assert_eq!(
            Options::read(&packet(&[53, 4, 1])),
            Err(PacketError::OptionCut { code: 53, at: HEADER, claimed: 4, left: 1 })
        );
        assert_eq!(
            Options::read(&packet(&[53])),
            Err(PacketError::OptionCut { code: 53, at: HEADER, claimed: 1, left: 0 })
        );
        let mut bootp = packet(&[255]);
        bootp[HEADER - 1] = 0;
        assert_eq!(Options::read(&bootp), Err(PacketError::NotDhcp));
    }
}
