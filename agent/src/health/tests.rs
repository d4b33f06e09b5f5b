//! Each kind of check against what it looks at: listeners on loopback, programs in a folder that plays the verified root.

use super::*;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};
use tempfile::TempDir;

fn script(dir: &Path, name: &str, text: &str) -> String {
    let path = dir.join(name);
    crate::testing::program(&path, format!("#!/bin/sh\n{text}\n").as_bytes());
    path.to_str().unwrap().to_owned()
}

/// Answers every request with the status it holds.
fn web(status: &Arc<AtomicU16>) -> String {
    let (listener, status) = (TcpListener::bind("127.0.0.1:0").unwrap(), Arc::clone(status));
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut request = [0; 512];
            let n = stream.read(&mut request).unwrap_or(0);
            assert!(request[..n].starts_with(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1:"), "{request:?}");
            let _ = write!(stream, "HTTP/1.1 {} x\r\nContent-Length: 0\r\n\r\n", status.load(Ordering::Relaxed));
        }
    });
    address.to_string()
}

fn checks(dir: &TempDir, list: Vec<HealthCheck>) -> Checks {
    let probe = Probe { root: dir.path().to_owned(), ..Probe::new(|| Ok("aa".into()), dir.path().join("systemctl")) };
    Checks::new(list, "aa".into(), probe)
}

fn run(checks: &mut Checks) -> (Health, Vec<Turn>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(checks.run())
}

fn check(kind: HealthKind, target: &str) -> HealthCheck {
    HealthCheck { target: target.into(), ..HealthCheck::of(kind, 0) }
}

#[test]
fn every_kind_sees_what_it_looks_at() {
    let dir = tempfile::tempdir().unwrap();
    let status = Arc::new(AtomicU16::new(204));
    let address = web(&status);
    script(dir.path(), "systemctl", &format!("cat {}/unit", dir.path().display()));
    let file = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    file("unit", "active");
    let program = script(
        dir.path(),
        "check",
        &format!(
            "[ \"$1\" = deep ] || exit 9; [ -e {}/fine ] || {{ echo 'no database' >&2; exit 3; }}",
            dir.path().display()
        ),
    );
    file("fine", "");
    let deep = HealthCheck { arguments: vec!["deep".into()], ..check(HealthKind::Command, &program) };
    let least = |text: &str, check: HealthCheck| HealthCheck { limit: Threshold::parse(text), ..check };
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let tcp_address = tcp.local_addr().unwrap().to_string();
    let mut all = checks(
        &dir,
        vec![
            check(HealthKind::Unit, "web.service"),
            check(HealthKind::Http, &format!("http://{address}/healthz")),
            check(HealthKind::Tcp, &tcp_address),
            deep,
            least("1K", check(HealthKind::Memory, "")),
            least("1K", check(HealthKind::Disk, dir.path().to_str().unwrap())),
        ],
    );
    let (health, turns) = run(&mut all);
    assert_eq!((health.healthy, health.detail.as_str(), turns.len()), (true, "all checks pass", 7));

    // Each turns for its own reason, and back.
    let mut turn = |make: &dyn Fn(), words: &str, mend: &dyn Fn()| {
        make();
        let (health, turns) = run(&mut all);
        assert!(!health.healthy && health.detail.contains(words) && turns.len() == 1, "{words}: {health:?}");
        mend();
        assert!(run(&mut all).0.healthy, "{words}");
    };
    turn(&|| file("unit", "failed"), "web.service is failed", &|| file("unit", "active"));
    turn(&|| status.store(500, Ordering::Relaxed), &format!("http://{address}/healthz: status 500"), &|| {
        status.store(200, Ordering::Relaxed);
    });
    turn(&|| std::fs::remove_file(dir.path().join("fine")).unwrap(), "exit status: 3: no database", &|| {
        file("fine", "");
    });
    drop(tcp);
    let (health, _) = run(&mut all);
    assert!(health.detail.contains(&tcp_address) && health.detail.contains("refused"), "{health:?}");
}

#[test]
fn a_program_that_hangs_is_killed_with_all_it_started_and_holds_up_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let pids = dir.path().join("pids");
    // Its child keeps the pipe open; and a chatty one is not blocked.
    let hangs = script(
        dir.path(),
        "hangs",
        &format!("tail -f /dev/null & echo $! >{0}; echo $$ >>{0}; tail -f /dev/null", pids.display()),
    );
    let talks = script(dir.path(), "talks", "head -c 1000000 /dev/zero >&2; exit 4");
    // Long enough that its child has begun, on any host.
    let short = |target: &str| HealthCheck { deadline: 5, ..check(HealthKind::Command, target) };
    let begun = Instant::now();
    let (health, _) = run(&mut checks(&dir, vec![short(&hangs)]));
    assert_eq!(health.detail, format!("command.{hangs} gave no answer in 5 s"));
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    for pid in std::fs::read_to_string(&pids).unwrap().lines() {
        let until = Instant::now() + Duration::from_secs(10);
        let ended = || {
            // Its parent may be nobody who waits for it: then it is a zombie.
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.is_empty() || stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with(['Z', 'X']))
        };
        while !ended() {
            assert!(Instant::now() < until, "process {pid} goes on");
            std::thread::yield_now();
        }
    }
    let (health, _) = run(&mut checks(&dir, vec![short(&talks)]));
    assert!(health.detail.contains("exit status: 4"), "{health:?}");
}

#[test]
fn only_programs_of_the_verified_root_are_run() {
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("/bin/true", dir.path().join("link")).unwrap();
    for target in ["/bin/true", dir.path().join("link").to_str().unwrap()] {
        let (health, _) = run(&mut checks(&dir, vec![check(HealthKind::Command, target)]));
        assert_eq!(health.detail, format!("{target} is not run: it is not in the verified root"));
    }
    let (health, _) = run(&mut checks(&dir, vec![check(HealthKind::Command, "/no/where")]));
    assert!(health.detail.contains("/no/where cannot be run: No such file"), "{health:?}");
}

#[test]
fn a_role_sets_numbers_of_what_is_declared_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let memory = HealthCheck { limit: Threshold::parse("1K"), ..check(HealthKind::Memory, "") };
    let mut all = checks(&dir, vec![memory, check(HealthKind::Time, "")]);
    let set = |pairs: &[(&str, &str)]| pairs.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
    assert_eq!(all.set_thresholds(&set(&[("memory", "99%")])), Vec::<String>::new());
    let (health, _) = run(&mut all);
    assert!(health.detail.starts_with("memory: ") && health.detail.ends_with("99% is asked for"), "{health:?}");
    let refused = all.set_thresholds(&set(&[("disk./var", "10%"), ("memory", "500ms"), ("time", "5s")]));
    assert_eq!(
        refused,
        [
            "the role sets the threshold disk./var; this release declares: memory",
            "the role sets memory to \"500ms\", which that check cannot take",
            "the role sets time to \"5s\", which that check cannot take",
        ]
    );
    let refused = all.set_thresholds(&set(&[("disk./var", "10%"), ("memory", "500ms"), ("time", "5s")]));
    assert!(refused.is_empty(), "said once");
    let (health, _) = run(&mut all);
    assert!(!health.detail.starts_with("memory"), "the release's own number holds again: {health:?}");
}

#[test]
fn shares_sizes_and_clocks_are_compared() {
    let percent = Threshold::parse("25%");
    assert_eq!(enough("x", 25 << 20, 100 << 20, percent), Ok(()));
    assert_eq!(enough("x", 24 << 20, 100 << 20, percent).unwrap_err(), "x: 24 of 100 MiB are free; 25% is asked for");
    assert!(enough("x", 0, 0, Threshold::parse("1M")).is_err());
    assert!(clock(None, None).unwrap_err().contains("not synchronised"));
    assert_eq!(clock(Some(900_000), None), Ok(()));
    assert_eq!(clock(Some(500_000), Threshold::parse("500ms")), Ok(()));
    let late = clock(Some(501_000), Threshold::parse("500ms")).unwrap_err();
    assert_eq!(late, "the clock may be wrong by 501 ms; at most 500 ms are asked for");
    sys::clock_error().expect("this kernel says how wrong its clock is");
}
