//! Ethernet addresses in their one text form.

use crate::MacError;
use std::fmt;
use std::str::FromStr;

/// An Ethernet address, written `52:54:00:00:00:01`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let groups = self.0.map(|byte| format!("{byte:02x}"));
        f.pad(&groups.join(":"))
    }
}

impl FromStr for Mac {
    type Err = MacError;
    /// Reads two-digit groups between ':' or '-' (iPXE's `${net0/mac:hexhyp}`), in either case.
    fn from_str(text: &str) -> Result<Self, MacError> {
        let bad = || MacError { got: text.chars().take(40).collect() };
        let mut bytes = [0; 6];
        let mut groups = text.split([':', '-']);
        for byte in &mut bytes {
            let group =
                groups.next().filter(|g| g.len() == 2 && g.bytes().all(|b| b.is_ascii_hexdigit())).ok_or_else(bad)?;
            *byte = u8::from_str_radix(group, 16).map_err(|_| bad())?;
        }
        if groups.next().is_some() { Err(bad()) } else { Ok(Self(bytes)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_form_goes_both_ways() {
        let mac: Mac = "52:54:00:AB:00:01".parse().unwrap();
        assert_eq!(mac.to_string(), "52:54:00:ab:00:01");
        assert_eq!("52-54-00-ab-00-01".parse(), Ok(mac));
        for bad in [
            "",
            "52:54:00:ab:00",
            "52:54:00:ab:00:01:02",
            "52:54:00:ab:00:g1",
            "+2:54:00:ab:00:01",
            "525:4:00:ab:00:01",
        ] {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
    }
}
