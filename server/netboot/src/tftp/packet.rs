//! TFTP's packets (RFC 1350 §5, RFC 2347).

use crate::TftpError;

pub(crate) const OP_RRQ: u16 = 1;
pub(crate) const OP_WRQ: u16 = 2;
pub(crate) const OP_ACK: u16 = 4;
pub(crate) const OP_ERROR: u16 = 5;
const OP_OACK: u16 = 6;
/// Longest request read: RFC 2347 §1 allows 512 bytes.
const MAX_REQUEST: usize = 512;

/// A read request.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Request {
    /// The file's name as it came.
    pub name: String,
    /// RFC 2348, 8 to 65464; one outside is dropped as if not asked.
    pub blksize: Option<u16>,
    /// RFC 2349: the client wants to know the size.
    pub tsize: bool,
    /// RFC 2349: seconds, 1 to 255.
    pub timeout: Option<u8>,
    /// RFC 7440: blocks, from 1.
    pub windowsize: Option<u16>,
}

impl Request {
    /// Reads the first packet of a transfer. Unknown options are dropped (RFC 2347 §3).
    pub fn parse(packet: &[u8]) -> Result<Self, TftpError> {
        let opcode = opcode(packet).ok_or(TftpError::Malformed)?;
        match opcode {
            OP_RRQ => {}
            OP_WRQ => return Err(TftpError::WriteRefused),
            got => return Err(TftpError::NotARequest { got }),
        }
        if packet.len() > MAX_REQUEST {
            return Err(TftpError::Malformed);
        }
        let mut words = packet[2..].split_inclusive(|b| *b == 0).map(word);
        let mut next = || words.next().transpose();
        let name = next()?.filter(|n| !n.is_empty()).ok_or(TftpError::Malformed)?.to_owned();
        let mode = next()?.ok_or(TftpError::Malformed)?;
        if !mode.eq_ignore_ascii_case("octet") {
            return Err(TftpError::Mode { got: mode.chars().filter(char::is_ascii_graphic).take(20).collect() });
        }
        let mut request = Self { name, ..Self::default() };
        // The first of a repeated option counts (RFC 2347: each may be there once).
        while let Some(option) = next()? {
            let Some(value) = next()? else { break };
            let number = value.parse::<u64>().ok();
            let fits = |range: std::ops::RangeInclusive<u16>| {
                number.and_then(|n| u16::try_from(n).ok()).filter(|n| range.contains(n))
            };
            match option.to_ascii_lowercase().as_str() {
                "blksize" => request.blksize = request.blksize.or_else(|| fits(8..=65_464)),
                "tsize" => request.tsize |= number.is_some(),
                "timeout" => {
                    request.timeout = request.timeout.or_else(|| fits(1..=255).and_then(|n| n.try_into().ok()));
                }
                "windowsize" => request.windowsize = request.windowsize.or_else(|| fits(1..=65_535)),
                _ => {}
            }
        }
        Ok(request)
    }
}

fn word(bytes: &[u8]) -> Result<&str, TftpError> {
    let text = bytes.strip_suffix(&[0]).ok_or(TftpError::Malformed)?;
    std::str::from_utf8(text).map_err(|_| TftpError::Malformed)
}

pub(crate) fn opcode(packet: &[u8]) -> Option<u16> {
    packet.first_chunk::<2>().map(|b| u16::from_be_bytes(*b))
}

/// The two bytes after the opcode: a block number or an error code.
pub(crate) fn number(packet: &[u8]) -> Option<u16> {
    packet.get(2..4).map(|b| u16::from_be_bytes([b[0], b[1]]))
}

/// An ERROR packet. Its text is the error's own, which never names a path of this server.
pub fn error_packet(error: &TftpError) -> Vec<u8> {
    error_bytes(error.code(), &error.to_string())
}

pub(crate) fn error_bytes(code: u16, text: &str) -> Vec<u8> {
    let mut packet = OP_ERROR.to_be_bytes().to_vec();
    packet.extend(code.to_be_bytes());
    packet.extend(text.bytes().filter(|b| *b != 0));
    packet.push(0);
    packet
}

pub(crate) fn oack(options: &[(&str, u64)]) -> Vec<u8> {
    let mut packet = OP_OACK.to_be_bytes().to_vec();
    for (name, value) in options {
        packet.extend(name.bytes());
        packet.push(0);
        packet.extend(value.to_string().bytes());
        packet.push(0);
    }
    packet
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_as_firmware_sends_them() {
        // OVMF's probe, then its download; Debian's iPXE.
        let probe = Request::parse(b"\0\x01b/x\0octet\0tsize\x000\0blksize\x001468\0windowsize\x004\0").unwrap();
        assert_eq!(
            probe,
            Request { name: "b/x".into(), blksize: Some(1468), tsize: true, timeout: None, windowsize: Some(4) }
        );
        let ipxe = Request::parse(b"\0\x01undionly.kpxe\0OCTET\0BlkSize\x001432\0tsize\x000\0").unwrap();
        assert_eq!((ipxe.blksize, ipxe.tsize, ipxe.windowsize), (Some(1432), true, None));
        let plain = Request::parse(b"\0\x01a\0octet\0").unwrap();
        assert_eq!(plain, Request { name: "a".into(), ..Request::default() });
    }

    #[test]
    fn what_is_not_served_is_refused_by_its_own_code() {
        let code = |packet: &[u8]| Request::parse(packet).unwrap_err().code();
        assert_eq!(code(b"\0\x02a\0octet\0"), 2);
        assert_eq!(code(b"\0\x01a\0netascii\0"), 0);
        assert_eq!(code(b"\0\x03\0\x01data"), 4);
        assert_eq!(code(b"\0\x01a\0octet"), 4);
        assert_eq!(code(b"\0\x01\0octet\0"), 4);
        assert_eq!(code(b"\0"), 4);
        let ignored =
            Request::parse(b"\0\x01a\0octet\0blksize\x007\0timeout\x000\0windowsize\x000\0x\0y\0tsize\0").unwrap();
        assert_eq!(ignored, Request { name: "a".into(), ..Request::default() });
    }
}
