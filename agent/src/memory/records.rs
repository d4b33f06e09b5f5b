//! Which signed word lies on the state partition: a boot without a server believes no other.

use super::Memory;
use kiln_protocol::slot::Label;
use kiln_release::hex;

/// A release's name in [`Memory::records`]; what lies there is bound to the release by its own signatures.
fn record_name(release: &Label) -> String {
    hex::encode(&release.0[..4])
}

impl Memory {
    /// A record with this digest is about to be written for a release, and `slots` hold these. Until a boot has seen which lies there,
    /// it may be this one or the one before; what belongs to none of them is forgotten.
    pub fn expect_record(&mut self, release: &Label, digest: &str, slots: &[Label]) {
        let new = (record_name(release), digest.to_owned());
        let wanted: Vec<String> = slots.iter().map(record_name).collect();
        self.records.retain(|kept| *kept != new && (kept.0 == new.0 || wanted.contains(&kept.0)));
        let mut same = self.records.iter().enumerate().filter(|(_, kept)| kept.0 == new.0).map(|(n, _)| n);
        // Of several that were never written the newest counts.
        if let (Some(_), Some(unwritten)) = (same.next(), same.next()) {
            self.records.remove(unwritten);
        }
        self.records.push(new);
    }

    /// Whether this is what was written for the release.
    pub fn has_record(&self, release: &Label, digest: &str) -> bool {
        let name = record_name(release);
        self.records.iter().any(|kept| kept.0 == name && kept.1 == digest)
    }

    /// Whether this may lie on the disk, by what is remembered. A memory that has none, of an earlier agent, does not say.
    pub fn may_find_record(&self, release: &Label, digest: &str) -> bool {
        self.records.is_empty() || self.has_record(release, digest)
    }

    /// That this lies on the disk, and so no other that was to be written. A memory that has none, of an earlier agent, takes what it
    /// finds. False: it was not written here, or was replaced since.
    pub fn found_record(&mut self, release: &Label, digest: &str) -> bool {
        let name = record_name(release);
        if self.records.is_empty() {
            self.records.push((name, digest.to_owned()));
            return true;
        }
        let known = self.has_record(release, digest);
        if known {
            self.records.retain(|kept| kept.0 != name || kept.1 == digest);
        }
        known
    }
}
