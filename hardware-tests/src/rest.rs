//! What the agent costs a machine that has nothing to do, by the words of the `exec` image's probe on its console: a look now
//! and then, of lines `KILN-REST <uptime> <line of /proc/PID/stat>`, one for each of the agent's processes, and `all` behind
//! the last. Times are the guest's (proc_pid_stat(5), in hundredths of a second). Nothing is read or waited for here.

use serde::Serialize;
use std::time::Duration;

/// How a look's lines begin.
pub const LOOK: &str = "KILN-REST ";
/// So old are service and guard before they count as at rest: their start and their first checks are over.
pub const SETTLED: Duration = Duration::from_secs(60);
/// Of a page of memory (x86_64).
const PAGE: u64 = 4096;

/// Over the whole time, of one core of the guest.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AtRest {
    pub seconds: f64,
    pub service_share: f64,
    pub guard_share: f64,
    /// Of the programs that the service ran to their end: health checks.
    pub ran_share: f64,
    /// Resident at its end.
    pub service_rss_bytes: u64,
    pub guard_rss_bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Process {
    id: u64,
    parent: u64,
    started: Duration,
    cpu: Duration,
    /// Of its children that ended.
    ran: Duration,
    rss_bytes: u64,
}

#[derive(Debug, Default)]
struct Look {
    at: Duration,
    processes: Vec<Process>,
}

fn hundredths(count: u64) -> Duration {
    Duration::from_millis(count.saturating_mul(10))
}

impl Process {
    fn of(stat: &str) -> Option<Self> {
        // The name may hold anything.
        let (id, rest) = stat.split_once(" (")?;
        let fields: Vec<&str> = rest.rsplit_once(") ")?.1.split(' ').collect();
        // By the manual's number; the first behind the name is the third.
        let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
        Some(Self {
            id: id.parse().ok()?,
            parent: field(4)?,
            started: hundredths(field(22)?),
            // A line that others have torn may hold any number.
            cpu: hundredths(field(14)?.saturating_add(field(15)?)),
            ran: hundredths(field(16)?.saturating_add(field(17)?)),
            rss_bytes: field(24)?.saturating_mul(PAGE),
        })
    }

    fn is(&self, other: &Self) -> bool {
        (self.id, self.started) == (other.id, other.started)
    }
}

impl Look {
    /// The service, which is systemd's child, and the guard, the first of its own. A child that is about to run another program
    /// has the agent's name as well, for a moment.
    fn service_and_guard(&self) -> Option<(&Process, &Process)> {
        let service = self.processes.iter().find(|process| process.parent == 1)?;
        let children = self.processes.iter().filter(|process| process.parent == service.id);
        Some((service, children.min_by_key(|process| process.started)?))
    }
}

/// Those that are whole. Other writers may tear a line: it is passed over.
fn looks(console: &str) -> Vec<Look> {
    let (mut all, mut open, mut at) = (Vec::new(), Look::default(), "");
    for line in console.lines().filter_map(|line| Some(line.split_once(LOOK)?.1)) {
        let Some((uptime, words)) = line.split_once(' ') else { continue };
        let Some(time) = uptime.parse::<f64>().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        else {
            continue;
        };
        if uptime != at {
            (open, at) = (Look { at: time, processes: Vec::new() }, uptime);
        }
        if words.trim_end() == "all" {
            all.push(std::mem::take(&mut open));
            at = "";
        } else {
            open.processes.extend(Process::of(words));
        }
    }
    all
}

/// The first time of at least `least` over which both were the same processes, and at rest; none yet.
pub fn at_rest(console: &str, least: Duration) -> Option<AtRest> {
    let all = looks(console);
    let between = |first: &Look, last: &Look| {
        let ((service, guard), (service_then, guard_then)) = (last.service_and_guard()?, first.service_and_guard()?);
        let time = last.at.checked_sub(first.at).filter(|time| *time >= least)?;
        let at_rest = |process: &Process| first.at >= process.started + SETTLED;
        let same = service.is(service_then) && guard.is(guard_then);
        if !same || !at_rest(service) || !at_rest(guard) {
            return None;
        }
        let share = |now: Duration, then: Duration| Some(now.checked_sub(then)?.as_secs_f64() / time.as_secs_f64());
        Some(AtRest {
            seconds: time.as_secs_f64(),
            service_share: share(service.cpu, service_then.cpu)?,
            guard_share: share(guard.cpu, guard_then.cpu)?,
            ran_share: share(service.ran, service_then.ran)?,
            service_rss_bytes: service.rss_bytes,
            guard_rss_bytes: guard.rss_bytes,
        })
    };
    all.iter().find_map(|last| all.iter().find_map(|first| between(first, last)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the kernel writes it: id, parent, times in hundredths, start, pages.
    fn stat(
        (id, parent): (u64, u64),
        [user, system, theirs, their_system]: [u64; 4],
        started: u64,
        pages: u64,
    ) -> String {
        format!(
            "{id} (kiln-agent) S {parent} {id} {id} 0 -1 4194560 811 4021 9 55 {user} {system} {theirs} {their_system} 20 0 3 0 \
             {started} 9134080 {pages} 18446744073709551615 1 1 0 0 0 0 0 4096 1088 0 0 0 17 0 0 0 0 0 0"
        )
    }

    fn look(uptime: &str, processes: &[String]) -> String {
        let lines = processes.iter().map(|process| format!("{LOOK}{uptime} {process}\n"));
        lines.chain([format!("{LOOK}{uptime} all\n")]).collect()
    }

    #[test]
    fn shares_are_those_of_the_same_two_processes_once_they_are_at_rest() {
        let service = |cpu, ran, pages| stat((1109, 1), [cpu, 10, ran, 5], 9050, pages);
        let guard = |cpu| stat((1110, 1109), [cpu, 0, 0, 0], 9060, 1000);
        // A program that the service is about to run.
        let forked = stat((1300, 1109), [0, 0, 0, 0], 31_000, 500);
        let old =
            look("85.00", &[stat((155, 1), [900, 0, 0, 0], 2100, 900), stat((1087, 155), [7, 0, 0, 0], 8400, 900)]);
        let young = look("105.00", &[service(100, 20, 900), guard(3)]);
        let first = look("160.00", &[service(120, 30, 900), guard(4)]);
        let torn = format!("{LOOK}[  200.1] x\n{LOOK}200.00 1109 (kiln-ag[  200.2] x\n{LOOK}200.00 all\n");
        let last = look("310.00", &[service(150, 150, 1024), forked, guard(10)]);
        let console = [old, young, first, torn, last].concat();
        let figures = at_rest(&console, Duration::from_secs(120)).unwrap();
        let close = |a: f64, b: f64| (a - b).abs() < 1e-9;
        assert!(close(figures.seconds, 150.0), "{figures:?}");
        assert!(close(figures.service_share, 0.3 / 150.0) && close(figures.guard_share, 0.06 / 150.0), "{figures:?}");
        assert!(close(figures.ran_share, 1.2 / 150.0), "{figures:?}");
        assert_eq!((figures.service_rss_bytes, figures.guard_rss_bytes), (4 << 20, 4_096_000));
        assert_eq!(at_rest(&console, Duration::from_secs(151)), None, "what is younger than a minute does not count");
    }

    #[test]
    fn a_process_that_was_replaced_is_not_measured() {
        let service = |started| stat((1109, 1), [100, 0, 0, 0], started, 900);
        let guard = |id| stat((id, 1109), [0, 0, 0, 0], 100, 900);
        let least = Duration::from_secs(120);
        let two =
            |first: &[String], last: &[String]| at_rest(&[look("100.00", first), look("300.00", last)].concat(), least);
        assert!(two(&[service(90), guard(7)], &[service(90), guard(7)]).is_some());
        assert_eq!(two(&[service(90), guard(7)], &[service(15_000), guard(7)]), None);
        assert_eq!(two(&[service(90), guard(7)], &[service(90), guard(8)]), None);
        assert_eq!(two(&[service(90)], &[service(90)]), None, "there is no guard");
        let open = look("300.00", &[service(90), guard(7)]).replace(" all", "");
        assert_eq!(
            at_rest(&(look("100.00", &[service(90), guard(7)]) + &open), least),
            None,
            "the last look is not over"
        );
    }
}
