//! The audit log's records as a chain: each holds the hash of itself and of the one before, so that none can be taken
//! out, put in or changed without changing all that follow. That the end was not cut off is shown by a head that was
//! handed out before: number and hash of the newest record, signed by the director.
//!
//! Here records become bytes and are checked; the store numbers and keeps them, in one transaction with what they tell of.

use kiln_protocol::{cut_at, printable};
use kiln_release::hex;
use serde::{Deserialize, Serialize};

/// `_type` of a signed head.
pub const HEAD_TYPE: &str = "kiln-audit-head";
/// Longest field, bytes: what others say is cut.
const MAX_FIELD: usize = 2_000;
/// How a record's hash is formed now. Records of form 1 were written before there were origin and result.
pub const FORM: u32 = 2;

/// One record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Counts from 1, without a gap.
    pub number: u64,
    /// Unix milliseconds.
    pub at: u64,
    /// Who: `uid 0`, `token ann`, `oidc ann@example.org`, `kiln.toml`, `kiln`, `the machine`, `nobody`.
    pub actor: String,
    /// From where: an address; empty on the boot server itself.
    #[serde(default)]
    pub origin: String,
    /// Which machine, if it is about one.
    pub machine: String,
    /// What was ordered or decided.
    pub what: String,
    /// `done`, or why not.
    #[serde(default)]
    pub result: String,
    /// How the hash is formed.
    #[serde(default = "first_form")]
    pub form: u32,
    /// SHA-256 over the predecessor's hash and this record, lower-case hex.
    pub hash: String,
}

fn first_form() -> u32 {
    1
}

/// What is written, before it has a number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Unix milliseconds.
    pub at: u64,
    /// Who.
    pub actor: String,
    /// From where.
    pub origin: String,
    /// Which machine.
    pub machine: String,
    /// What.
    pub what: String,
    /// What came of it.
    pub result: String,
}

impl Line {
    /// Of something done. `by` is who, or `WHO from WHERE` as [`crate::access::Caller`] writes it: no name that may act
    /// has a space in it.
    pub fn done(at: u64, by: &str, machine: &str, what: impl Into<String>) -> Self {
        let (actor, origin) = by.split_once(" from ").unwrap_or((by, ""));
        Self {
            at,
            actor: actor.to_owned(),
            origin: origin.to_owned(),
            machine: machine.to_owned(),
            what: what.into(),
            result: "done".to_owned(),
        }
    }

    /// The same of something that was not done.
    #[must_use]
    pub fn but(self, result: impl Into<String>) -> Self {
        Self { result: result.into(), ..self }
    }

    /// As the chain takes it: nothing in it that a terminal would obey, nothing long.
    pub(crate) fn follow(self, number: u64, before: &str) -> Record {
        let tame = |text: &str| printable(cut_at(text, MAX_FIELD));
        let mut record = Record {
            number,
            at: self.at,
            actor: tame(&self.actor),
            origin: tame(&self.origin),
            machine: tame(&self.machine),
            what: tame(&self.what),
            result: tame(&self.result),
            form: FORM,
            hash: String::new(),
        };
        record.hash = record.hash_after(before);
        record
    }
}

impl Record {
    /// Its hash, if `before` is its predecessor's; empty for the first.
    pub fn hash_after(&self, before: &str) -> String {
        // A JSON array of strings and numbers has one form: serde_json writes no spaces and always escapes alike.
        let bytes = if self.form == 1 {
            serde_json::to_vec(&(before, self.at, &self.actor, &self.machine, &self.what))
        } else {
            serde_json::to_vec(&(
                "kiln-audit",
                self.form,
                before,
                self.number,
                self.at,
                &self.actor,
                &self.origin,
                &self.machine,
                &self.what,
                &self.result,
            ))
        };
        hex::sha256(&bytes.expect("strings and numbers always become JSON"))
    }
}

/// Where the chain ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// Always [`HEAD_TYPE`].
    #[serde(rename = "_type")]
    pub type_: String,
    /// `1.0`.
    pub spec_version: String,
    /// The site's name.
    pub site: String,
    /// Number of the newest record; 0: there is none.
    pub number: u64,
    /// Its hash.
    pub hash: String,
    /// When this was said.
    pub at: jiff::Timestamp,
}

/// The first thing that is wrong with a chain.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum ChainError {
    #[error("record {expected} is missing: the one in its place is number {got}")]
    Gap { expected: u64, got: u64 },
    #[error("record {number} was changed, or is not the one that followed record {}", number - 1)]
    Hash { number: u64 },
    #[error("record {number} has form {form}, which this kiln does not know")]
    Form { number: u64, form: u32 },
    #[error("record {number} is of form 1 behind one of form {FORM}: no kiln wrote it")]
    OldForm { number: u64 },
    #[error("the log ends at record {got}; a head that was handed out names record {number}: its end was cut off")]
    Cut { number: u64, got: u64 },
    #[error("record {number} is not the one that a head that was handed out names: the log was rewritten")]
    Rewritten { number: u64 },
}

/// Checks a chain, record by record.
#[derive(Debug, Clone)]
pub struct Checker {
    number: u64,
    hash: String,
    form: u32,
    heads: Vec<(u64, String)>,
}

impl Checker {
    /// From the first record on, against heads (number, hash) that were handed out.
    pub fn new(heads: Vec<(u64, String)>) -> Self {
        Self { number: 0, hash: String::new(), form: 1, heads }
    }

    /// The next record.
    pub fn take(&mut self, record: &Record) -> Result<(), ChainError> {
        let expected = self.number + 1;
        let number = record.number;
        if number != expected {
            return Err(ChainError::Gap { expected, got: number });
        }
        if !(1..=FORM).contains(&record.form) {
            return Err(ChainError::Form { number, form: record.form });
        }
        if record.form < self.form {
            return Err(ChainError::OldForm { number });
        }
        if record.hash != record.hash_after(&self.hash) {
            return Err(ChainError::Hash { number });
        }
        if self.heads.iter().any(|(at, hash)| *at == number && *hash != record.hash) {
            return Err(ChainError::Rewritten { number });
        }
        (self.number, self.form) = (number, record.form);
        self.hash.clone_from(&record.hash);
        Ok(())
    }

    /// There are no more. Gives number and hash of the last.
    pub fn end(self) -> Result<(u64, String), ChainError> {
        match self.heads.iter().map(|(at, _)| *at).max() {
            Some(number) if number > self.number => Err(ChainError::Cut { number, got: self.number }),
            Some(_) | None => Ok((self.number, self.hash)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(length: u64) -> Vec<Record> {
        let mut before = String::new();
        (1..=length)
            .map(|n| {
                let record = Line::done(n, "token ann from 10.0.0.1", "rack-1", format!("did {n}")).follow(n, &before);
                before.clone_from(&record.hash);
                record
            })
            .collect()
    }

    fn check(records: &[Record], heads: &[(u64, String)]) -> Result<(u64, String), ChainError> {
        let mut checker = Checker::new(heads.to_vec());
        records.iter().try_for_each(|r| checker.take(r))?;
        checker.end()
    }

    #[test]
    fn each_record_is_bound_to_all_before_it() {
        let whole = chain(20);
        assert_eq!(check(&whole, &[]).unwrap(), (20, whole[19].hash.clone()));
        let changes: [fn(&mut Record); 7] = [
            |r| r.at += 1,
            |r| r.actor.push('x'),
            |r| r.origin.clear(),
            |r| r.machine = "rack-2".into(),
            |r| r.what.push(' '),
            |r| r.result = "refused".into(),
            |r| r.form = 1,
        ];
        for (n, change) in changes.iter().enumerate() {
            let mut altered = whole.clone();
            change(&mut altered[7 + n]);
            let number = 8 + n as u64;
            let found = check(&altered, &[]).unwrap_err();
            assert!(
                matches!(found, ChainError::Hash { number: n } | ChainError::OldForm { number: n } if n == number),
                "{found}"
            );
        }
        let mut out = whole.clone();
        out.remove(4);
        assert_eq!(check(&out, &[]), Err(ChainError::Gap { expected: 5, got: 6 }));
        // Renumbered and hashed anew the record is sound; all that follow are not.
        let mut renumbered = out.clone();
        renumbered[4].number = 5;
        assert_eq!(check(&renumbered, &[]), Err(ChainError::Hash { number: 5 }));
        let mut swapped = whole.clone();
        swapped.swap(3, 4);
        assert_eq!(check(&swapped, &[]), Err(ChainError::Gap { expected: 4, got: 5 }));
    }

    #[test]
    fn a_head_that_was_handed_out_finds_a_cut_and_a_log_written_anew() {
        let whole = chain(20);
        let head = (15, whole[14].hash.clone());
        assert!(check(&whole, std::slice::from_ref(&head)).is_ok());
        assert_eq!(check(&whole[..12], std::slice::from_ref(&head)), Err(ChainError::Cut { number: 15, got: 12 }));
        assert_eq!(check(&[], std::slice::from_ref(&head)), Err(ChainError::Cut { number: 15, got: 0 }));
        let mut before = String::new();
        let anew: Vec<Record> = (1..=20)
            .map(|n| {
                let record = Line::done(n, "uid 0", "rack-1", "nothing happened").follow(n, &before);
                before.clone_from(&record.hash);
                record
            })
            .collect();
        assert!(check(&anew, &[]).is_ok(), "by itself it is sound");
        assert_eq!(check(&anew, &[head]), Err(ChainError::Rewritten { number: 15 }));
    }

    #[test]
    fn what_a_hostile_machine_says_stays_text() {
        let evil = format!("\x1b[2J\n{{\"number\":9}}\r\u{9b}31m\u{202e}{}", "A".repeat(10_000));
        let record = Line::done(1, &evil, &evil, evil.clone()).but(evil.clone()).follow(1, "");
        for field in [&record.actor, &record.machine, &record.what, &record.result] {
            assert!(!field.chars().any(char::is_control) && !field.contains('\u{202e}'), "{field}");
            assert!(field.len() <= MAX_FIELD * 10);
        }
        assert!(check(&[record], &[]).is_ok());
    }
}
