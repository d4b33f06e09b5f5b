//! The lines that no server has confirmed yet: numbered, bounded, the oldest dropped first. Pure.

use kiln_protocol::{LOG_LINES, LOG_TEXT, LogLine, cut_at};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Bytes kept while no server answers: a whole boot's kernel log, several times over.
const KEEP: usize = 512 << 10;
/// Bytes of text in one batch: with the longest escapes still below the server's limit.
const BATCH: usize = 64 << 10;
/// What a line costs besides its text.
const OVERHEAD: usize = 64;

/// Unconfirmed lines.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Spool {
    lines: VecDeque<LogLine>,
    /// Number of the first of them.
    first: u64,
    bytes: usize,
    /// Lines below this number may have been sent by an agent before this one.
    old: u64,
}

impl Spool {
    pub const fn new() -> Self {
        Self { lines: VecDeque::new(), first: 0, bytes: 0, old: 0 }
    }

    pub fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    /// Adds a line. The oldest go where there is no room: their numbers are never sent, which says how many they were.
    pub fn push(&mut self, mut line: LogLine) {
        if line.text.len() > LOG_TEXT {
            line.text.truncate(cut_at(&line.text, LOG_TEXT).len());
        }
        self.bytes += line.text.len() + OVERHEAD;
        self.lines.push_back(line);
        while self.bytes > KEEP {
            self.drop_first();
        }
    }

    fn drop_first(&mut self) {
        if let Some(line) = self.lines.pop_front() {
            self.bytes -= line.text.len() + OVERHEAD;
            self.first += 1;
        }
    }

    /// The next batch: its first number, and its lines.
    pub fn batch(&self) -> (u64, Vec<LogLine>) {
        let mut bytes = 0;
        let fits = |line: &&LogLine| {
            bytes += line.text.len() + OVERHEAD;
            bytes <= BATCH
        };
        (self.first, self.lines.iter().take(LOG_LINES).take_while(fits).cloned().collect())
    }

    /// The server wants `next`: it has all before it.
    pub fn confirmed(&mut self, next: u64) {
        while self.first < next && !self.lines.is_empty() {
            self.drop_first();
        }
        self.first = self.first.max(next);
    }

    /// The server's first answer to this process wants `next`. Lines that were taken over and that it has are dropped;
    /// those that are new go on from its number.
    pub fn joined(&mut self, next: u64) {
        while self.first < next.min(self.old) && !self.lines.is_empty() {
            self.drop_first();
        }
        self.first = self.first.max(next);
    }

    /// As another process of this boot takes it over.
    pub fn handed_over(mut self) -> Self {
        self.old = self.first + self.lines.len() as u64;
        self
    }

    /// Takes over what came before; what was said meanwhile follows it.
    pub fn follow(&mut self, before: Self) {
        let since = std::mem::replace(self, before);
        for line in since.lines {
            self.push(line);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_protocol::LogSource;

    fn line(text: &str) -> LogLine {
        LogLine { source: LogSource::Agent, level: 6, at_us: 0, text: text.to_owned() }
    }

    fn with(range: std::ops::Range<u64>) -> Spool {
        let mut spool = Spool::new();
        for n in range {
            spool.push(line(&n.to_string()));
        }
        spool
    }

    fn texts(spool: &Spool) -> (u64, Vec<String>) {
        let (first, lines) = spool.batch();
        (first, lines.into_iter().map(|l| l.text).collect())
    }

    #[test]
    fn it_is_bounded_and_the_numbers_say_what_is_missing() {
        let mut spool = Spool::new();
        for n in 0..100_000_u64 {
            spool.push(line(&format!("{n:01000}")));
            assert!(spool.bytes <= KEEP);
        }
        let (first, lines) = spool.batch();
        assert_eq!(lines[0].text.parse::<u64>().unwrap(), first, "a line keeps its number");
        assert_eq!(first, 100_000 - spool.lines.len() as u64);
        assert!(lines.len() < 70 && serde_json::to_vec(&lines).unwrap().len() < kiln_protocol::LOG_LIMIT);
        let mut long = Spool::new();
        long.push(line(&"é".repeat(10_000)));
        assert_eq!(long.batch().1[0].text.len(), LOG_TEXT);
        let small = with(0..2000);
        assert_eq!(small.batch().1.len(), LOG_LINES);
    }

    #[test]
    fn what_is_not_confirmed_is_sent_again_under_its_number() {
        let mut spool = with(0..4);
        assert_eq!(texts(&spool).0, 0);
        spool.push(line("4"));
        // The reply to the first batch came, with others after it unsent.
        spool.confirmed(4);
        assert_eq!(texts(&spool), (4, vec!["4".to_owned()]));
        spool.confirmed(2);
        assert_eq!(texts(&spool).0, 4, "a late answer takes nothing back");
        spool.confirmed(5);
        assert!(spool.is_empty());
        spool.push(line("5"));
        assert_eq!(texts(&spool), (5, vec!["5".to_owned()]));
    }

    #[test]
    fn the_service_goes_on_where_the_initramfs_was() {
        // Sent by the initramfs: 0 to 3, of which the reply was lost.
        let mut service = with(0..0);
        service.push(line("new"));
        service.follow(with(0..4).handed_over());
        service.joined(4);
        assert_eq!(texts(&service), (4, vec!["new".to_owned()]));
        // A start of the service after one that was killed knows no numbers: the server's go on.
        let mut restarted = with(0..2);
        restarted.joined(90);
        assert_eq!(texts(&restarted), (90, vec!["0".to_owned(), "1".to_owned()]));
        // A server that knows nothing of this boot changes nothing.
        let mut spool = with(0..3).handed_over();
        spool.joined(0);
        assert_eq!(texts(&spool).0, 0);
    }
}
