//! The rack's time server: answers clients as RFC 5905 §7.3 says, with the host's own clock, and does nothing more. It calls
//! itself a primary server without an error, which is true of a machine whose hardware clock QEMU takes from the same clock.

use crate::error::LabError;
use std::net::{Ipv4Addr, UdpSocket};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Of a message without extensions.
const LENGTH: usize = 48;
/// Seconds from 1900, where its time begins, to 1970.
const UNIX: u64 = 2_208_988_800;
const PORT: u16 = 123;
const CLIENT: u8 = 3;
const SERVER: u8 = 4;
/// Of the clock, as a power of two of seconds: -20.
const PRECISION: u8 = 0xec;

/// Answers on this address as long as the process lives.
pub fn serve(address: Ipv4Addr) -> Result<(), LabError> {
    let socket = UdpSocket::bind((address, PORT))
        .map_err(|source| LabError::Enclosure { step: "open the time server's port", source })?;
    std::thread::spawn(move || {
        let mut request = [0; 512];
        while let Ok((length, client)) = socket.recv_from(&mut request) {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            if let Some(answer) = answer(&request[..length], now) {
                // A client that hears nothing asks again.
                let _ = socket.send_to(&answer, client);
            }
        }
    });
    Ok(())
}

/// The answer to a client's question, at a time since 1970; none to anything else.
fn answer(request: &[u8], now: Duration) -> Option<[u8; LENGTH]> {
    let asked = request.get(..LENGTH)?;
    if asked[0] & 7 != CLIENT {
        return None;
    }
    let mut out = [0; LENGTH];
    // No leap second; the client's version.
    out[0] = (asked[0] & 0b11_1000) | SERVER;
    (out[1], out[2], out[3]) = (1, asked[2], PRECISION);
    out[12..16].copy_from_slice(b"RACK");
    // The era is not part of it: its bits go over the edge.
    let stamp = ((now.as_secs() + UNIX) << 32) | ((u64::from(now.subsec_nanos()) << 32) / 1_000_000_000);
    for at in [16, 32, 40] {
        out[at..at + 8].copy_from_slice(&stamp.to_be_bytes());
    }
    // So the client knows its own question.
    out[24..32].copy_from_slice(&asked[40..]);
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_is_answered_with_the_time_and_with_itself() {
        let mut question = [0; LENGTH];
        question[0] = (4 << 3) | CLIENT;
        question[40..].copy_from_slice(b"question");
        // RFC 5905 §6: 1970 is second 2 208 988 800; half a second is the fraction's highest bit.
        let out = answer(&question, Duration::from_millis(1_500)).unwrap();
        assert_eq!((out[0], out[1]), ((4 << 3) | SERVER, 1));
        assert_eq!(out[24..32], *b"question");
        assert_eq!(out[40..], [0x83, 0xaa, 0x7e, 0x81, 0x80, 0, 0, 0]);
        assert_eq!(answer(&out, Duration::ZERO), None, "an answer is no question");
        assert_eq!(answer(&question[..47], Duration::ZERO), None);
    }
}
