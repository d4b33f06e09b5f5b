//! What PCR 7 comes to once a variable of Secure Boot is another: firmware measures it anew at the next start, and everything
//! else as before.

use super::judge::variable_data;
use super::{Log, extend, sha256};

/// PCR 7 at the next start, when the variable is `after`. None where the log does not explain PCR 7 as it is now, or does not
/// say that firmware measured the variable once, as `before`: then nothing is known of how it would measure it.
pub fn after_change(log: &Log<'_>, pcr7: &[u8; 32], name: &str, before: &[u8], after: &[u8]) -> Option<[u8; 32]> {
    if log.replay(7) != *pcr7 {
        return None;
    }
    let (mut value, mut found, mut settings) = ([0; 32], 0, true);
    for event in log.of(7) {
        // Behind the separator it is named as the authority that let a program in.
        settings &= event.digest != sha256(&[0; 4]);
        let digest = match variable_data(event).filter(|(is, _)| settings && is == name) {
            Some((_, content)) => {
                let head = event.data.strip_suffix(content)?;
                if content != before || sha256(event.data) != event.digest {
                    return None;
                }
                found += 1;
                let length = u64::try_from(after.len()).ok()?.to_le_bytes();
                sha256(&[head.get(..24)?, &length, head.get(32..)?, after].concat())
            }
            None => event.digest,
        };
        value = extend(&value, &digest);
    }
    (found == 1).then_some(value)
}
