//! Health verdicts: from single results of checks to "healthy" or not. A check counts as good after it passed
//! `pass_after` times in a row and for its soak time, and as bad after it failed `fail_after` times in a row: one lost
//! packet makes no machine unhealthy, one lucky answer none healthy.
//!
//! A step takes what every check found in one round and the time, and gives back the verdict and what turned. It runs
//! no check and looks at no clock.

use crate::wire::Health;

/// Milliseconds of a clock that only goes forward.
pub type Millis = u64;

/// How one check is judged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Its name, for people.
    pub name: String,
    /// So long it must pass without a break before it is good.
    pub soak_ms: Millis,
    /// Failures in a row after which a good one is bad.
    pub fail_after: u32,
    /// Passes in a row after which a bad one may be good.
    pub pass_after: u32,
}

/// What a check found: nothing wrong, or what, in a sentence.
pub type Found = Result<(), String>;

#[derive(Debug, Clone, PartialEq, Eq)]
enum Standing {
    /// Not good, or not good yet. `words` are of its last failure, none while it passes.
    Bad { passes: u32, since: Millis, words: Option<String> },
    /// Good; so many failures in a row are borne so far, the last with these words.
    Good { fails: u32, words: String },
}

/// A check that turned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turn {
    /// The check's name.
    pub name: String,
    /// It is good now.
    pub good: bool,
    /// Why it is bad; empty when it is good.
    pub words: String,
}

/// Every check and how it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    checks: Vec<(Rule, Standing)>,
}

impl Verdict {
    /// Nothing is good before it was seen to be.
    pub fn new(rules: Vec<Rule>) -> Self {
        let unseen = || Standing::Bad { passes: 0, since: 0, words: None };
        Self { checks: rules.into_iter().map(|rule| (rule, unseen())).collect() }
    }

    /// One more, behind the others.
    #[must_use]
    pub fn and(mut self, rule: Rule) -> Self {
        self.checks.push((rule, Standing::Bad { passes: 0, since: 0, words: None }));
        self
    }

    /// One round. `found` are the results in the order of the rules; a rule without one has failed.
    #[must_use]
    pub fn round(self, found: Vec<Found>, now: Millis) -> (Self, Health, Vec<Turn>) {
        let mut found = found.into_iter();
        let mut turns = Vec::new();
        let mut checks = Vec::with_capacity(self.checks.len());
        for (rule, standing) in self.checks {
            let result = found.next().unwrap_or_else(|| Err(format!("{} was not checked", rule.name)));
            let was_good = matches!(standing, Standing::Good { .. });
            let standing = step(&rule, standing, result, now);
            match (&standing, was_good) {
                (Standing::Good { .. }, false) => {
                    turns.push(Turn { name: rule.name.clone(), good: true, words: String::new() });
                }
                (Standing::Bad { words, .. }, true) => {
                    let words = words.clone().unwrap_or_default();
                    turns.push(Turn { name: rule.name.clone(), good: false, words });
                }
                (Standing::Good { .. }, true) | (Standing::Bad { .. }, false) => {}
            }
            checks.push((rule, standing));
        }
        let verdict = Self { checks };
        let health = verdict.health(now);
        (verdict, health, turns)
    }

    /// Whether every check passed when it was run last, soak or not: the machine does its work, which is not proven yet.
    pub fn all_pass(&self) -> bool {
        self.checks.iter().all(|(_, standing)| match standing {
            Standing::Bad { passes, words, .. } => *passes > 0 && words.is_none(),
            Standing::Good { fails, .. } => *fails == 0,
        })
    }

    fn health(&self, now: Millis) -> Health {
        let bad = |detail: String| Health { healthy: false, detail };
        let failing = self.checks.iter().find_map(|(_, standing)| match standing {
            Standing::Bad { words: Some(words), .. } => Some(words.clone()),
            Standing::Bad { words: None, .. } | Standing::Good { .. } => None,
        });
        if let Some(words) = failing {
            return bad(words);
        }
        let mut left = None;
        for (rule, standing) in &self.checks {
            match standing {
                Standing::Bad { passes, since, .. } if *passes > 0 => {
                    let soak = (since + rule.soak_ms).saturating_sub(now);
                    let more = rule.pass_after.saturating_sub(*passes);
                    left = left.max(Some((soak, more)));
                }
                Standing::Bad { .. } => return bad(format!("{} was not checked yet", rule.name)),
                Standing::Good { .. } => {}
            }
        }
        match left {
            Some((0, more)) => bad(format!("all checks pass; {more} more in a row are asked for")),
            Some((soak, _)) => bad(format!("all checks pass; {} s of soak left", soak.div_ceil(1000))),
            None => Health { healthy: true, detail: self.borne() },
        }
    }

    /// What a healthy machine says: also the failure that is borne.
    fn borne(&self) -> String {
        let borne = self.checks.iter().find_map(|(rule, standing)| match standing {
            Standing::Good { fails, words } if *fails > 0 => {
                Some(format!("all checks hold; failed {fails} of {} times in a row: {words}", rule.fail_after))
            }
            Standing::Good { .. } | Standing::Bad { .. } => None,
        });
        borne.unwrap_or_else(|| "all checks pass".into())
    }
}

fn step(rule: &Rule, standing: Standing, found: Found, now: Millis) -> Standing {
    match (standing, found) {
        (Standing::Good { .. }, Ok(())) => Standing::Good { fails: 0, words: String::new() },
        (Standing::Good { fails, .. }, Err(words)) => {
            let fails = fails.saturating_add(1);
            if fails >= rule.fail_after {
                Standing::Bad { passes: 0, since: now, words: Some(words) }
            } else {
                Standing::Good { fails, words }
            }
        }
        (Standing::Bad { passes, since, .. }, Ok(())) => {
            let since = if passes == 0 { now } else { since };
            let passes = passes.saturating_add(1);
            if passes >= rule.pass_after && now.saturating_sub(since) >= rule.soak_ms {
                Standing::Good { fails: 0, words: String::new() }
            } else {
                Standing::Bad { passes, since, words: None }
            }
        }
        (Standing::Bad { .. }, Err(words)) => Standing::Bad { passes: 0, since: now, words: Some(words) },
    }
}
