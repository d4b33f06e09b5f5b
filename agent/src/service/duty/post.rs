//! When a report is due, and for how long the server may hold it.

use super::{Action, BREATH_MS, Duty, Millis, Post, Way};

/// Longest a report is held by the server, seconds.
pub(super) const HOLD_S: u32 = 50;
/// The same while a release is fetched: how far it is goes with each report.
const PROGRESS_S: u32 = 5;

impl Duty {
    /// The report, if it is due. While health may still change, reports are short; a healthy machine lets itself be
    /// held, and breaks the hold when there is news.
    pub(super) fn post(&mut self, now: Millis, out: &mut Vec<Action>) {
        let news = self.news && self.posted_at + BREATH_MS <= now;
        let due = match (&self.post, &self.way) {
            (Post::Due(_) | Post::Posted | Post::Held, Way::Gone) | (Post::Posted, _) => false,
            (Post::Due(at), _) => news || *at <= now,
            (Post::Held, _) => news,
        };
        if !due {
            return;
        }
        if self.post == Post::Held {
            out.push(Action::EndHold);
        }
        let hold = self.hold_s();
        (self.news, self.posted_at) = (false, now);
        self.post = if hold > 0 { Post::Held } else { Post::Posted };
        out.push(Action::Report(hold));
    }

    pub(super) fn hold_s(&self) -> u32 {
        if !self.is_healthy() || !self.may_wait {
            return 0;
        }
        match self.way {
            Way::Stays | Way::Rests { .. } | Way::Ready { .. } => HOLD_S,
            Way::Fetches { .. } | Way::Asks { .. } | Way::Drains { .. } | Way::Leaves { .. } | Way::Gone => PROGRESS_S,
        }
    }
}
