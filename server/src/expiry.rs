//! When the signed metadata ends: told 90, 30 and 7 days ahead, in the log, by the API and on the page.

use jiff::Timestamp;
use kiln_images::status::Nearness;
use kiln_release::tuf::Expiry;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// `kiln serve` signs it every hour; it is told of when that does not happen.
const TIMESTAMP: &str = "metadata/timestamp.json";

/// One file of the metadata.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpiryView {
    /// The TUF role.
    pub role: String,
    /// Its file.
    pub file: String,
    /// When it expires.
    pub expires: Timestamp,
    /// Whole days until then; below 0 afterwards.
    pub days_left: i64,
    /// What a person should know; none while the end is far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
}

fn nearness(expiry: &Expiry, now: Timestamp) -> Nearness {
    let nearness = Nearness::of(expiry.expires, now);
    let calm = expiry.file == TIMESTAMP && nearness != Nearness::Expired;
    if calm { Nearness::Far } else { nearness }
}

fn sentence(expiry: &Expiry, warning: &str) -> String {
    let what = if expiry.file == TIMESTAMP {
        "this server cannot sign it: see its log"
    } else {
        "`kiln trust renew` signs it anew"
    };
    format!("{} {warning} ({}): {what}", expiry.file, expiry.expires)
}

/// All of them, as the API gives them.
pub fn views(expiries: &[Expiry], now: Timestamp) -> Vec<ExpiryView> {
    let view = |expiry: &Expiry| ExpiryView {
        role: expiry.role.clone(),
        file: expiry.file.clone(),
        expires: expiry.expires,
        days_left: expiry.expires.duration_since(now).as_secs().div_euclid(24 * 3600),
        warning: nearness(expiry, now).warning().map(|warning| sentence(expiry, warning)),
    };
    expiries.iter().map(view).collect()
}

/// What the log was told of.
#[derive(Debug, Default)]
pub struct Told(BTreeMap<String, Nearness>);

impl Told {
    /// What it is to be told now: each step nearer once.
    pub fn news(&mut self, expiries: &[Expiry], now: Timestamp) -> Vec<String> {
        self.0.retain(|file, _| expiries.iter().any(|expiry| expiry.file == *file));
        let mut news = Vec::new();
        for expiry in expiries {
            let near = nearness(expiry, now);
            let before = self.0.insert(expiry.file.clone(), near).unwrap_or(Nearness::Far);
            if near > before
                && let Some(warning) = near.warning()
            {
                news.push(sentence(expiry, warning));
            }
        }
        news
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::SignedDuration;

    fn expiry(file: &str, expires: &str) -> Expiry {
        Expiry { role: "targets".into(), file: file.into(), expires: expires.parse().unwrap() }
    }

    #[test]
    fn each_step_nearer_is_told_once() {
        let expiries =
            [expiry("metadata/2.targets.json", "2026-06-01T00:00:00Z"), expiry(TIMESTAMP, "2026-03-02T00:00:00Z")];
        let end: Timestamp = "2026-06-01T00:00:00Z".parse().unwrap();
        let mut told = Told::default();
        let mut at = |days_before: i64| {
            let now = end - SignedDuration::from_hours(days_before * 24);
            told.news(&expiries[..1], now).len()
        };
        assert_eq!([91, 90, 89, 31, 30, 29, 8, 7, 1, 0, -1].map(&mut at), [0, 1, 0, 0, 1, 0, 0, 1, 0, 1, 0]);
        // Signed anew, and near again: it is told again.
        let renewed = [expiry("metadata/3.targets.json", "2026-07-01T00:00:00Z")];
        assert_eq!(told.news(&renewed, end).len(), 1);
        // A timestamp holds a day and is signed every hour: only its end is news.
        let now = "2026-03-01T12:00:00Z".parse().unwrap();
        let shown = views(&expiries, now);
        assert_eq!((shown[1].warning.clone(), shown[1].days_left), (None, 0));
        let shown = views(&expiries, "2026-03-02T00:00:00Z".parse().unwrap());
        assert!(shown[1].warning.as_ref().unwrap().contains("EXPIRED"));
        assert!(shown[0].warning.is_none());
        let week = views(&expiries, end - SignedDuration::from_hours(7 * 24));
        assert_eq!(
            week[0].warning.as_deref(),
            Some(
                "metadata/2.targets.json expires within 7 days (2026-06-01T00:00:00Z): `kiln trust renew` signs it anew"
            )
        );
    }
}
