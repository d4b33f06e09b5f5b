//! Log lines: who may write them, and how they are shown beside the stages of a boot.

use super::{Control, now_ms};
use crate::error::{ControlError, LogError};
use crate::logs::{Kept, Writer};
use crate::view::{LogEntry, LogView};
use kiln_fleet::{Boot, StateKind};
use kiln_protocol::{KeyId, LOG_LINES, LogBatch, LogReply, printable};
use std::sync::Arc;
use std::time::Duration;

/// Most lines of one answer.
const LINES: usize = 5_000;
/// Longest wait for a new line.
const WAIT: Duration = Duration::from_secs(25);

/// Behind a boot's id: what came under it while the machine was quarantined, from whichever of those that claim to be it.
const HELD: &str = "-held";

fn held(boot: &str) -> String {
    format!("{boot}{HELD}")
}

/// Which lines a person wants.
#[derive(Debug, Clone, Default)]
pub struct LogQuery {
    /// The boot's id, or how many boots back; none: the newest. With `-held` behind it, what came while it was quarantined.
    pub boot: Option<String>,
    /// Only lines with a higher number.
    pub after: Option<u64>,
    /// If there is none, wait for one.
    pub wait: bool,
}

fn signed(ms: u64) -> i64 {
    i64::try_from(ms).unwrap_or(i64::MAX)
}

impl Control {
    /// Keeps lines of a machine that has proved this key, of a boot that it has reported. While it is quarantined they are
    /// kept apart: they help to find the false one, and are not for it to put among those of the true one.
    pub async fn take_log(self: &Arc<Self>, key: &KeyId, mut batch: LogBatch) -> Result<LogReply, ControlError> {
        if batch.lines.len() > LOG_LINES {
            return Err(LogError::TooMany { got: batch.lines.len() }.into());
        }
        let writer = {
            let inner = self.lock();
            let machine = inner.machines.get(&batch.machine).filter(|m| m.key.as_ref() == Some(key));
            let machine = machine.ok_or(LogError::NotReported)?;
            let spoken = machine.boots.iter().filter(|b| !b.is_unclaimed()).map(|b| b.boot_id.as_str());
            let spoken: Vec<&str> = spoken.collect();
            if !spoken.contains(&batch.boot_id.as_str()) {
                return Err(LogError::NotReported.into());
            }
            let boots = spoken.iter().flat_map(|boot| [(*boot).to_owned(), held(boot)]).collect();
            let stranger = machine.state.kind == StateKind::Discovered;
            if machine.state.kind == StateKind::Quarantined {
                batch.boot_id = held(&batch.boot_id);
            }
            Writer { machine: machine.id.clone(), stranger, boots }
        };
        let control = Arc::clone(self);
        let append = move || control.logs.append(&writer, &batch, signed(now_ms()));
        let next = tokio::task::spawn_blocking(append).await.map_err(LogError::Task)??;
        Ok(LogReply { next })
    }

    /// One boot's log as people see it.
    pub async fn show_log(self: &Arc<Self>, name: &str, query: LogQuery) -> Result<LogView, ControlError> {
        let mut changes = self.logs.changes();
        let deadline = tokio::time::Instant::now() + WAIT;
        loop {
            changes.mark_unchanged();
            let view = self.read_log(name, &query).await?;
            if !query.wait || !view.entries.is_empty() {
                return Ok(view);
            }
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return Ok(view) },
                () = tokio::time::sleep_until(deadline) => return Ok(view),
                () = self.stopped() => return Ok(view),
            }
        }
    }

    async fn read_log(self: &Arc<Self>, name: &str, query: &LogQuery) -> Result<LogView, ControlError> {
        let (id, boot_id) = {
            let inner = self.lock();
            let id = inner.resolve(name)?;
            let boots = inner.machines.get(&id).map(|m| &m.boots);
            let mut spoken = boots.into_iter().flatten().rev().filter(|b| !b.is_unclaimed());
            let (wanted, apart) = match query.boot.as_deref().map(|text| (text, text.strip_suffix(HELD))) {
                Some((_, Some(boot))) => (Some(boot), true),
                Some((text, None)) => (Some(text), false),
                None => (None, false),
            };
            let chosen: Option<&Boot> = match wanted {
                None => spoken.next(),
                Some(text) => match text.parse::<usize>() {
                    Ok(back) => spoken.nth(back),
                    Err(_) => spoken.find(|b| b.boot_id == text),
                },
            };
            let boot = chosen.ok_or_else(|| LogError::NoBoot { machine: name.to_owned() })?;
            (id, if apart { held(&boot.boot_id) } else { boot.boot_id.clone() })
        };
        let (control, boot) = (Arc::clone(self), boot_id.clone());
        let read = move || control.logs.read(&id, &boot);
        let (zero, kept) = tokio::task::spawn_blocking(read).await.map_err(LogError::Task)??;
        Ok(view(boot_id, zero.unwrap_or_default(), kept, query.after))
    }
}

/// The lines behind `after`, with what is missing between them said in its place.
fn view(boot_id: String, zero_ms: i64, kept: Vec<Kept>, after: Option<u64>) -> LogView {
    let at = |us: u64| zero_ms.saturating_add(signed(us / 1000));
    let mut wanted = after.map_or(0, |n| n.saturating_add(1));
    let mut entries = Vec::new();
    for kept in kept.into_iter().filter(|k| after.is_none_or(|n| k.number > n)).take(LINES) {
        let (number, line) = (kept.number, kept.line);
        if number > wanted {
            let missing = number - wanted;
            let text = format!("{missing} lines are missing: there was no room for them");
            let (source, at_ms) = ("missing".to_owned(), at(line.at_us));
            entries.push(LogEntry { number: number - 1, at_ms, source, level: 4, text });
        }
        wanted = number + 1;
        let (source, at_ms) = (line.source.to_string(), at(line.at_us));
        entries.push(LogEntry { number, at_ms, source, level: line.level, text: printable(&line.text) });
    }
    LogView { boot_id, entries }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_protocol::{LogLine, LogSource};

    #[test]
    fn what_is_missing_is_said_in_its_place() {
        let kept = |number: u64| Kept {
            number,
            line: LogLine { source: LogSource::Kernel, level: 6, at_us: number * 1000, text: format!("{number}\n") },
        };
        let shown = |after| view("b".into(), 100, [3, 4, 9].map(kept).to_vec(), after).entries;
        let texts: Vec<String> = shown(None).into_iter().map(|e| e.text).collect();
        let missing = |n: u32| format!("{n} lines are missing: there was no room for them");
        assert_eq!(texts, [missing(3), "3\\u{a}".into(), "4\\u{a}".into(), missing(4), "9\\u{a}".into()]);
        assert_eq!(shown(Some(4)).iter().map(|e| (e.number, e.at_ms)).collect::<Vec<_>>(), [(8, 109), (9, 109)]);
        assert!(shown(Some(9)).is_empty());
    }
}
