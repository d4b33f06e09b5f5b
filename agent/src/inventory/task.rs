//! Keeps the boot server's picture of this machine's hardware true: at the start, every ten minutes, and soon after a
//! switch named itself; sent only if it changed, or once a day for a server that forgot.

use super::{Neighbours, Root, json, take};
use crate::api::Api;
use kiln_protocol::{InventoryReport, MachineId};
use std::time::{Duration, Instant};
use tokio::task::spawn_blocking;
use tokio::time::sleep;

const EVERY: Duration = Duration::from_secs(600);
const AGAIN: Duration = Duration::from_secs(24 * 3600);
/// After a failed try.
const RETRY: Duration = Duration::from_secs(30);
/// Switches on other cables follow the first within so long; a switch that changes its mind all the time is heard at
/// this pace.
const SETTLE: Duration = Duration::from_secs(5);

/// What is known of the machine, and what the server has of that.
#[derive(Default)]
struct Known {
    looked: Option<Instant>,
    /// What was found then.
    text: Option<String>,
    sent: Option<(String, Instant)>,
    failed: Option<Instant>,
}

#[derive(Debug, PartialEq, Eq)]
enum Step {
    Look,
    Send,
    Wait(Duration),
}

impl Known {
    /// A server that is gone is tried with what is known: a look asks every disk, which is no work for each half minute of days.
    fn next(&self, now: Instant) -> Step {
        let left = |since: Option<Instant>, pause: Duration| {
            since.map(|at| pause.saturating_sub(now.saturating_duration_since(at))).filter(|left| !left.is_zero())
        };
        let Some(look) = left(self.looked, EVERY) else { return Step::Look };
        let has = |text: &String| {
            self.sent.as_ref().is_some_and(|(sent, at)| sent == text && left(Some(*at), AGAIN).is_some())
        };
        match (&self.text, left(self.failed, RETRY)) {
            (Some(text), None) if !has(text) => Step::Send,
            (Some(text), Some(retry)) if !has(text) => Step::Wait(retry.min(look)),
            (Some(_) | None, _) => Step::Wait(look),
        }
    }
}

/// Runs for ever.
pub async fn keep(mut api: Api, machine: MachineId, boot_id: String) {
    let neighbours = Neighbours::default();
    neighbours.listen();
    let mut known = Known::default();
    let mut found = None;
    loop {
        match (known.next(Instant::now()), &found) {
            (Step::Look, _) => {
                let heard = neighbours.clone();
                let looked = spawn_blocking(move || take(&Root::of_this_machine(), &heard)).await;
                known.looked = Some(Instant::now());
                if let Ok(inventory) = looked {
                    known.text = Some(json(&inventory));
                    found = Some(InventoryReport { machine: machine.clone(), boot_id: boot_id.clone(), inventory });
                }
            }
            (Step::Send, Some(report)) => match api.inventory(report).await {
                Ok(()) => {
                    known.failed = None;
                    known.sent = known.text.clone().map(|text| (text, Instant::now()));
                }
                Err(error) => {
                    if known.failed.is_none() {
                        eprintln!("kiln-agent: inventory not delivered: {error}");
                    }
                    known.failed = Some(Instant::now());
                }
            },
            (Step::Send, None) => known.text = None,
            (Step::Wait(pause), _) => tokio::select! {
                () = sleep(pause) => {}
                () = neighbours.news() => {
                    sleep(SETTLE).await;
                    known.looked = None;
                }
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_is_gone_is_tried_every_half_minute_and_the_disks_are_asked_every_ten() {
        let begun = Instant::now();
        let mut known = Known::default();
        let (mut now, mut looks, mut tries) = (begun, 0, 0);
        while now < begun + Duration::from_secs(3600) {
            match known.next(now) {
                Step::Look => {
                    looks += 1;
                    (known.looked, known.text) = (Some(now), Some("the same".to_owned()));
                }
                Step::Send => {
                    tries += 1;
                    known.failed = Some(now);
                }
                Step::Wait(pause) => now += pause,
            }
        }
        assert_eq!((looks, tries), (6, 120));
    }

    #[test]
    fn what_the_server_has_is_sent_once_a_day_and_what_changed_at_once() {
        let begun = Instant::now();
        let at = |seconds: u64| begun + Duration::from_secs(seconds);
        let known = |text: &str, looked: u64| Known {
            looked: Some(at(looked)),
            text: Some(text.to_owned()),
            sent: Some(("old".to_owned(), begun)),
            failed: None,
        };
        assert_eq!(known("old", 0).next(at(100)), Step::Wait(Duration::from_secs(500)));
        assert_eq!(known("old", 0).next(at(600)), Step::Look);
        assert_eq!(known("new", 600).next(at(600)), Step::Send);
        assert_eq!(known("old", 86_000).next(at(86_399)), Step::Wait(Duration::from_secs(201)));
        assert_eq!(known("old", 86_000).next(at(86_400)), Step::Send);
        // It could not be looked at all: what is known stays, and nothing turns without a pause.
        assert_eq!(Known { looked: Some(begun), ..Known::default() }.next(begun), Step::Wait(EVERY));
    }
}
