//! A boot server that is gone, under a service that has much to tell. In a process of its own, whose memory is nobody else's.

use super::*;
use crate::facts;
use crate::testing::from_files;
use kiln_protocol::{Intake, SPOOL_LIMIT};
use std::process::Command;
use std::sync::mpsc::RecvTimeoutError;
use tokio::net::TcpSocket;

const INSIDE: &str = "KILN_GONE_TEST_INSIDE";
/// Turns of a check while nobody answers, after which everything is full that has a bound.
const TURNS: u32 = 10_000;
/// Nobody answers for so long: three reports by then, which end 0, 2 and 6 s after the start, a fifth later at most, or, by news,
/// sooner.
const GONE: Duration = Duration::from_secs(11);

/// A check fails, passes, fails: an event each time.
fn turns(watch: &mut Watch, count: u32) {
    for number in 0..count {
        let good = number % 2 == 1;
        let words = if good { "" } else { "connection refused" }.to_owned();
        watch.turned(vec![Turn { name: "app".into(), good, words }]);
    }
}

/// Without the program itself.
fn resident() -> u64 {
    let all = facts::own_memory().expect("the kernel says what a process costs").rss_bytes;
    all.saturating_sub(from_files())
}

#[test]
fn a_server_that_is_gone_costs_no_memory_and_is_told_of_once() {
    if std::env::var_os(INSIDE).is_some() {
        return alone();
    }
    let name = "service::tests::gone::a_server_that_is_gone_costs_no_memory_and_is_told_of_once";
    let mut again = Command::new(std::env::current_exe().unwrap());
    let done = again.args(["--exact", name, "--nocapture"]).env(INSIDE, "1").output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    let last: Vec<&str> = said.lines().rev().take(20).collect();
    let out = String::from_utf8_lossy(&done.stdout);
    assert!(done.status.success() && out.contains("1 passed"), "{out}\n{last:#?}");
    let mut told: Vec<&str> = said.lines().filter(|line| line.contains("(server-unreachable)")).collect();
    told.sort_unstable();
    assert!(told.len() == 2 && told[0] != told[1], "one line for each server: {told:#?}");
    println!("{}", said.lines().filter(|line| line.contains("MiB")).collect::<String>());
}

fn alone() {
    let site = TestSite::new(1);
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::write(at("state"), "running").unwrap();
    program(&at("systemctl"), SYSTEMCTL.replace("DIR", dir.path().to_str().unwrap()).as_bytes());
    std::fs::create_dir(at("next")).unwrap();
    // A port on which nobody listens yet, by two addresses, and which nobody else can have meanwhile.
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("0.0.0.0:0".parse().unwrap()).unwrap();
    let port = socket.local_addr().unwrap().port();
    let servers = [format!("https://127.0.0.1:{port}"), format!("https://127.0.0.2:{port}")];
    let verifier = site.verifier(1, &[], &servers, &at("machine"));
    verifier.pins.set(&site.known_keys);
    let probe = Probe::new(|| Ok(root_hash(1)), at("systemctl"));
    let checks = Checks::new(site.manifests[&1].health.clone(), root_hash(1), probe);
    let (systemctl, next) = (at("systemctl"), at("next"));
    let (tell, told) = channel();
    std::thread::spawn(move || {
        let door = Door { systemctl, reboot: stays };
        let journal = journal(&verifier);
        let mut service = Service::new(verifier, journal, next, door).unwrap();
        turns(&mut service.watch, TURNS);
        let full = resident();
        turns(&mut service.watch, 4 * TURNS);
        tell.send((full, resident())).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        panic!("it left: {}", runtime.block_on(Box::pin(service.run(checks))));
    });
    let (full, fuller) = told.recv_timeout(2 * PATIENCE).unwrap();
    assert!(fuller < full + (1 << 20), "{full} bytes after {TURNS} events, {fuller} after {}", 5 * TURNS);
    assert_eq!(told.recv_timeout(GONE), Err(RecvTimeoutError::Timeout), "it goes on without a server");

    // Somebody answers, and something happens: that comes last.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let listener = runtime.block_on(async { socket.listen(16).unwrap().into_std().unwrap() });
    listener.set_nonblocking(false).unwrap();
    let begun = Instant::now();
    let director = Director::start_on((listener, ([127, 0, 0, 1], port).into()), &site, (1, 4, Via::Cold, false));
    std::fs::write(at("state"), "degraded").unwrap();
    let newest = u64::from(5 * TURNS) + 1;
    let events = |report: &Report| report.condition.as_ref().map(|c| c.spool.clone()).unwrap_or_default();
    let ends = |report: &Report| events(report).events.iter().any(|event| event.number == newest);
    director.wait("of the newest event", begun, PATIENCE, ends);

    // The server counts what there was no room for.
    let (mut intake, mut missed, mut taken) = (Intake::default(), 0, Vec::new());
    let heard = director.heard();
    for report in &heard {
        let (before, new) = intake.take(&events(report));
        missed += before;
        taken.extend(new.into_iter().map(|event| event.number));
    }
    assert_eq!(missed + taken.len() as u64, newest);
    assert!(taken.windows(2).all(|pair| pair[0] + 1 == pair[1]) && taken.last() == Some(&newest), "{taken:?}");
    // One more, if the last happened when some were delivered already.
    assert!((SPOOL_LIMIT..=SPOOL_LIMIT + 1).contains(&taken.len()), "{}", taken.len());
    let first = &heard[0];
    assert!(first.seq >= 4, "three reports or more had failed: {}", first.seq);
    let now = first.agent_memory.as_ref().unwrap().rss_bytes.saturating_sub(from_files());
    assert!(now < fuller + (8 << 20), "{fuller} bytes before it asked, {now} bytes then");
    eprintln!("resident: {} MiB with all full, {} MiB after {GONE:?} without a server", full >> 20, now >> 20);
}
