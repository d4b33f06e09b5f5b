//! A day, as `2026-11-20`, at whose beginning (UTC) a machine is due. No clock and no time zone: the calendar alone
//! (proleptic Gregorian, counted by eras of 400 years).

use crate::Millis;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

const DAY_MS: Millis = 24 * 3_600_000;

/// Days since 1970-01-01.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Due(u32);

impl Due {
    /// The day of a moment.
    pub fn of(at: Millis) -> Self {
        Self(u32::try_from(at / DAY_MS).unwrap_or(u32::MAX))
    }

    /// Its beginning.
    pub fn at(self) -> Millis {
        Millis::from(self.0) * DAY_MS
    }

    fn from_parts(year: u64, month: u64, day: u64) -> Self {
        // The year begins in March, so that the leap day is its last.
        let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
        let (era, of_era) = (year / 400, year % 400);
        let of_year = (153 * month + 2) / 5 + day - 1;
        let days = era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year;
        Self(u32::try_from(days.saturating_sub(719_468)).unwrap_or(u32::MAX))
    }
}

impl fmt::Display for Due {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let days = u64::from(self.0) + 719_468;
        let (era, of_era) = (days / 146_097, days % 146_097);
        let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year + year / 4 - year / 100);
        let month = (5 * of_year + 2) / 153;
        let day = of_year - (153 * month + 2) / 5 + 1;
        let (year, month) = if month < 10 { (year, month + 3) } else { (year + 1, month - 9) };
        write!(f, "{:04}-{month:02}-{day:02}", era * 400 + year)
    }
}

/// A text that is no day.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no day: expected one from 1970 to 2199, as 2026-11-20")]
pub struct DayError(pub String);

impl FromStr for Due {
    type Err = DayError;
    fn from_str(text: &str) -> Result<Self, DayError> {
        let bad = || DayError(text.chars().take(40).collect());
        let plain = text.len() == 10 && text.bytes().enumerate().all(|(i, b)| matches!(i, 4 | 7) == (b == b'-'));
        let number = |range: std::ops::Range<usize>| text.get(range)?.parse::<u64>().ok();
        let (Some(year), Some(month), Some(day)) = (number(0..4), number(5..7), number(8..10)) else {
            return Err(bad());
        };
        if !plain || !(1970..2200).contains(&year) || month == 0 || day == 0 {
            return Err(bad());
        }
        let due = Self::from_parts(year, month, day);
        // A day that the month does not have comes back as another.
        if due.to_string() == text { Ok(due) } else { Err(bad()) }
    }
}

impl TryFrom<String> for Due {
    type Error = DayError;
    fn try_from(text: String) -> Result<Self, DayError> {
        text.parse()
    }
}

impl From<Due> for String {
    fn from(due: Due) -> String {
        due.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_day_is_one_after_the_one_before() {
        let mut before: Option<Due> = None;
        for days in 0..84_006_u32 {
            let due = Due(days);
            assert_eq!(due.to_string().parse::<Due>().unwrap(), due);
            assert!(before.is_none_or(|before| before.to_string() < due.to_string()));
            before = Some(due);
        }
        assert_eq!((Due(0).to_string(), Due(20_777).to_string()), ("1970-01-01".into(), "2026-11-20".into()));
        assert_eq!(Due(20_777).at(), 20_777 * 86_400_000);
    }

    #[test]
    fn what_is_no_day_is_refused() {
        for text in ["", "2026-02-30", "2026-13-01", "2026-1-1", "20.11.2026", "1969-12-31", "2200-01-01", "2026-+1-01"]
        {
            assert!(text.parse::<Due>().is_err(), "{text}");
        }
    }
}
