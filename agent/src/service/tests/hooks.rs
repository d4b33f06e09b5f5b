//! Hooks that hold a leave or let it go, and what is told of them and of checks while nobody hears.

use super::*;
use kiln_protocol::Intake;
use kiln_release::{Hook, HookKind, OnTimeout};
use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A site whose release 1 has hooks: programs in the machine's own folder, made when it is known.
struct Hooked {
    site: TestSite,
    programs: TempDir,
}

impl Hooked {
    /// Each hook: event, name, what its script does (`DIR` is a folder of its own), deadline, and what then.
    fn new(hooks: &[(&str, &str, &str, u64, OnTimeout)]) -> Self {
        let (mut site, programs) = (TestSite::new(2), tempfile::tempdir().unwrap());
        for (event, name, text, deadline, on_timeout) in hooks {
            let path = programs.path().join(name);
            let text = text.replace("DIR", programs.path().to_str().unwrap());
            program(&path, format!("#!/bin/sh\n{text}\n").as_bytes());
            let hook = Hook {
                name: (*name).into(),
                kind: HookKind::Command,
                target: path.to_str().unwrap().into(),
                arguments: vec![],
                deadline: *deadline,
                on_timeout: *on_timeout,
            };
            site.manifests.get_mut(&1).unwrap().hooks.entry((*event).into()).or_default().push(hook);
        }
        Self { site, programs }
    }

    fn there(&self, name: &str) -> bool {
        self.programs.path().join(name).exists()
    }

    fn put(&self, name: &str) {
        std::fs::write(self.programs.path().join(name), "").unwrap();
    }

    /// A healthy machine of release 1 with this order, and what was undrained at its start forgotten.
    fn start(&self, http: &str, order: Order) -> (Director, Machine) {
        let (begun, director) = (Instant::now(), Director::start(&self.site, order));
        let machine =
            Machine::start_in(&self.site, 1, http, &director.url, "running", || Ok(root_hash(1)), self.programs.path());
        director.wait("of health", begun, PATIENCE, healthy);
        (director, machine)
    }
}

fn draining(report: &Report) -> Option<String> {
    report.condition.as_ref().and_then(|c| c.draining.as_ref()).map(|d| format!("{} of {}, {}", d.number, d.of, d.hook))
}

/// Everything the server takes, in order.
fn taken(reports: &[Report]) -> (u64, Vec<String>) {
    let (mut intake, mut missed, mut texts) = (Intake::default(), 0, Vec::new());
    for report in reports {
        let Some(condition) = &report.condition else { continue };
        let (more, taken) = intake.take(&condition.spool);
        missed += more;
        texts.extend(taken.into_iter().map(|event| event.text));
    }
    (missed, texts)
}

/// Waits until a file tells that it is so.
pub(super) fn wait_until(what: &str, there: impl Fn() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !there() {
        assert!(Instant::now() < until, "{what}: not within {PATIENCE:?}");
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

/// Ends when somebody opens the FIFO to write.
const WAITS: &str = "echo $$ >DIR/began; read _ <DIR/end; exit 0";

#[test]
fn a_drain_hook_holds_the_leave_until_it_is_through_and_a_dead_server_changes_nothing() {
    let (go, stay) = (OnTimeout::Go, OnTimeout::Stay);
    let hooked = Hooked::new(&[
        ("drain", "first", ":", 60, stay),
        ("drain", "second", WAITS, 60, stay),
        ("undrain", "back", "echo x >>DIR/undrained", 60, go),
    ]);
    nix::unistd::mkfifo(&hooked.programs.path().join("end"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let (http, _hear) = web::honest(hooked.site.files.clone(), BTreeMap::new());
    let (director, machine) = hooked.start(&http, (1, 4, Via::Cold, false));
    wait_until("undrained when it came up healthy", || hooked.there("undrained"));
    let begun = Instant::now();
    director.order((2, 5, Via::Cold, true));
    let report =
        director.wait("of the second hook", begun, PATIENCE, |r| draining(r).is_some_and(|d| d.starts_with('2')));
    assert_eq!(draining(&report).as_deref(), Some("2 of 2, second"));
    assert!(healthy(&report), "it works on");
    director.line(Line::Dead);
    wait_until("the hook runs", || hooked.there("began"));
    assert!(machine.left.try_recv().is_err(), "it waits for its work");
    hooked.put("end");
    assert_eq!(machine.left.recv_timeout(PATIENCE).unwrap(), "reboot");
}

#[test]
fn a_leave_that_is_called_off_ends_the_hook_and_undrains() {
    let hooked = Hooked::new(&[
        ("drain", "slow", WAITS, 60, OnTimeout::Go),
        ("undrain", "back", "echo x >>DIR/undrained", 60, OnTimeout::Go),
    ]);
    nix::unistd::mkfifo(&hooked.programs.path().join("end"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let (http, _hear) = web::honest(hooked.site.files.clone(), BTreeMap::new());
    let (director, machine) = hooked.start(&http, (1, 4, Via::Cold, false));
    wait_until("undrained at the start", || hooked.there("undrained"));
    director.order((2, 5, Via::Cold, true));
    // The file is there before its line is in it.
    let began = || std::fs::read_to_string(hooked.programs.path().join("began")).unwrap_or_default();
    wait_until("the hook runs", || began().ends_with('\n'));
    let pid = began().trim().to_owned();
    std::fs::remove_file(hooked.programs.path().join("undrained")).unwrap();
    let begun = Instant::now();
    director.order((1, 6, Via::Cold, false));
    wait_until("undrained", || hooked.there("undrained"));
    wait_until("the hook is ended", || !Path::new(&format!("/proc/{pid}")).exists());
    let report = director.wait("of no prefetch", begun, PATIENCE, |r| r.prefetch.is_none() && draining(r).is_none());
    assert!(healthy(&report) && machine.left.try_recv().is_err());
}

#[test]
fn a_late_hook_lets_go_or_keeps_as_it_says_and_either_is_told() {
    for (on_timeout, words) in [(OnTimeout::Go, "going on without it"), (OnTimeout::Stay, "the machine stays")] {
        let hooked = Hooked::new(&[
            ("drain", "late", "exec tail -f /dev/null", 1, on_timeout),
            ("undrain", "back", "echo x >>DIR/undrained", 60, OnTimeout::Go),
        ]);
        let (http, _hear) = web::honest(hooked.site.files.clone(), BTreeMap::new());
        let (director, machine) = hooked.start(&http, (1, 4, Via::Cold, false));
        wait_until("undrained at the start", || hooked.there("undrained"));
        std::fs::remove_file(hooked.programs.path().join("undrained")).unwrap();
        let begun = Instant::now();
        director.order((2, 5, Via::Cold, true));
        let told = format!("drain hook late: late gave no answer in 1 s; {words}");
        director.wait(&told, begun, PATIENCE, |r| {
            r.condition.as_ref().is_some_and(|c| c.spool.events.iter().any(|e| e.text == told && e.alarm))
        });
        match on_timeout {
            OnTimeout::Go => assert_eq!(machine.left.recv_timeout(PATIENCE).unwrap(), "reboot"),
            OnTimeout::Stay => {
                director.wait("of the stage", begun, PATIENCE, |r| failed(r, Stage::Drain) == Some("drain-hook"));
                wait_until("undrained", || hooked.there("undrained"));
                assert!(machine.left.try_recv().is_err());
            }
        }
    }
}

#[test]
fn a_hook_by_http_is_asked_again_while_it_says_not_yet() {
    let (later, done, broken) = ("202 Accepted", "200 OK", "500 Internal Server Error");
    for (answers, words) in [
        (vec![later, later, done], "drain hook asks is through"),
        (vec![later, broken], "status 500; going on without it"),
    ] {
        let (asked, all) = (Arc::<AtomicUsize>::default(), answers.len());
        let count = Arc::clone(&asked);
        let (url, _heard) = web::serve(move |_, _, stream| {
            let answer = answers.get(count.fetch_add(1, Ordering::SeqCst)).unwrap_or(&broken);
            let _ = write!(stream, "HTTP/1.1 {answer}\r\nContent-Length: 0\r\n\r\n");
        });
        let mut hooked = Hooked::new(&[]);
        let hook = Hook {
            name: "asks".into(),
            kind: HookKind::Http,
            target: format!("{url}/drain"),
            arguments: vec![],
            deadline: 60,
            on_timeout: OnTimeout::Go,
        };
        hooked.site.manifests.get_mut(&1).unwrap().hooks.insert("drain".into(), vec![hook]);
        let (http, _hear) = web::honest(hooked.site.files.clone(), BTreeMap::new());
        let (director, machine) = hooked.start(&http, (1, 4, Via::Cold, false));
        let begun = Instant::now();
        director.order((2, 5, Via::Cold, true));
        director.wait(words, begun, PATIENCE, |r| {
            r.condition.as_ref().is_some_and(|c| c.spool.events.iter().any(|e| e.text.contains(words)))
        });
        assert_eq!(machine.left.recv_timeout(PATIENCE).unwrap(), "reboot");
        assert_eq!(asked.load(Ordering::SeqCst), all, "each answer was waited for, and no more were asked for");
    }
}

#[test]
fn what_happens_while_the_server_is_away_or_its_replies_are_lost_is_told_once_in_order() {
    let site = TestSite::new(1);
    let (http, _hear) = web::honest(site.files.clone(), BTreeMap::new());
    let (begun, director) = (Instant::now(), Director::start(&site, (1, 4, Via::Cold, false)));
    let machine = Machine::start(&site, 1, &http, &director.url, "running", || Ok(root_hash(1)));
    director.wait("of health", begun, PATIENCE, healthy);
    let spool = machine.dir.path().join("spool.json");
    let kept = |words: &str, times: usize| {
        let text = std::fs::read_to_string(&spool).unwrap_or_default();
        text.matches(words).count() == times
    };
    let turn = |to: &str, words: &str, times: usize| {
        machine.set_state(to);
        wait_until(words, || kept(words, times));
    };
    let (fails, passes) = ("check systemd fails", "check systemd passes again");
    director.line(Line::Dead);
    turn("degraded", fails, 1);
    turn("running", passes, 1);
    // They arrive, and the machine does not hear that they did.
    let begun = Instant::now();
    director.line(Line::LosesReplies);
    turn("degraded", fails, 2);
    turn("running", passes, 2);
    director
        .wait("that arrives", begun, PATIENCE, |r| r.condition.as_ref().is_some_and(|c| !c.spool.events.is_empty()));
    director.line(Line::Whole);
    machine.set_state("degraded");
    director.wait("of the last", begun, PATIENCE, |r| {
        r.condition.as_ref().is_some_and(|c| c.spool.events.iter().any(|e| e.number == 5))
    });
    director.wait("of nothing left", begun, PATIENCE, |r| {
        r.condition.as_ref().is_some_and(|c| c.spool.confirmed == 5 && c.spool.events.is_empty())
    });
    let (fails, passes) =
        ("check systemd fails: systemd is degraded; failed: broken.service", "check systemd passes again");
    assert_eq!(taken(&director.heard()), (0, [fails, passes, fails, passes, fails].map(str::to_owned).to_vec()));
}
