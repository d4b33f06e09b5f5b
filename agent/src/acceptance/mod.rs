//! The acceptance run of new hardware: `kiln-agent acceptance`, started by the image of class `acceptance` as a unit of its
//! own. Each test is a process of its own with a deadline: one that hangs in a driver is killed, one that takes the memory it
//! tests dies alone, and either is a result. A process that has said its results in one line is not waited for. The service reports what [`STATE`] says.

mod cpu;
mod disk;
mod echo;
mod memory;
mod network;

use crate::error::{AgentError, Result};
use kiln_protocol::{Acceptance, Least, Outcome, TestKind, TestResult};
use kiln_release::{ACCEPTANCE_PATH, AcceptancePlan};
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// How far the run is.
const STATE: &str = "/run/kiln/acceptance.json";
/// Longest plan, state, or output of a test, bytes.
const LIMIT: u64 = 1 << 20;
/// What a test may take beyond its time before it is killed: a hung disk answers after its driver's time-outs.
const GRACE: Duration = Duration::from_secs(90);
/// And what it has to say so, where a part of it hung until then.
const LAST_WORDS: Duration = Duration::from_secs(15);

fn plan() -> Result<AcceptancePlan> {
    let bytes = std::fs::read(ACCEPTANCE_PATH).map_err(AgentError::file(ACCEPTANCE_PATH))?;
    serde_json::from_slice(&bytes)
        .map_err(|e| AgentError::Format { path: ACCEPTANCE_PATH.into(), reason: e.to_string() })
}

fn seconds(plan: &AcceptancePlan, test: TestKind) -> Duration {
    Duration::from_secs(match test {
        TestKind::Memory => plan.memory_seconds,
        TestKind::Cpu => plan.cpu_seconds,
        TestKind::Disk => plan.disk_seconds,
        TestKind::Network => plan.network_seconds,
    })
}

/// `kiln-agent acceptance`: the whole run. `kiln-agent acceptance TEST`: one test, whose results are printed as JSON.
pub fn run(test: Option<String>) -> Result<()> {
    let plan = plan()?;
    if let Some(name) = test {
        let test = name.parse().map_err(|e: kiln_protocol::IdError| AgentError::Usage(e.to_string()))?;
        let results = one(&plan, test);
        std::println!("{}", serde_json::to_string(&results).expect("wire types always become JSON"));
        return Ok(());
    }
    let mut run = Acceptance::default();
    for test in TestKind::ALL {
        let within = seconds(&plan, *test) + GRACE + LAST_WORDS;
        run.doing = format!("tests {test}, at most {} s", within.as_secs());
        write(&run)?;
        std::println!("kiln-agent: acceptance: {}", run.doing);
        let found = process(*test, within);
        for result in &found {
            std::println!("kiln-agent: acceptance: {} {}: {}", result.part, result.outcome, result.detail);
        }
        run.results.extend(found);
    }
    (run.done, run.doing) = (true, String::new());
    run.tame();
    demand(&plan, &mut run);
    write(&run)
}

/// What the release asks at least; a role's own is the server's to look at.
fn demand(plan: &AcceptancePlan, run: &mut Acceptance) {
    let asked = |number: u64| (number > 0).then_some(number);
    let least = Least {
        disk_read_mib_s: asked(plan.least_disk_read_mib_s),
        network_mib_s: asked(plan.least_network_mib_s),
        link_mbit_s: asked(plan.least_link_mbit_s),
    };
    for result in &mut run.results {
        let alone = Acceptance { results: vec![result.clone()], ..Acceptance::default() };
        let short = alone.failures(least).into_iter().find(|text| text.ends_with("are asked for"));
        if let Some(words) = short.filter(|_| result.outcome == Outcome::Passed) {
            result.outcome = Outcome::Failed;
            words.strip_prefix(&format!("{}: ", result.part)).unwrap_or(&words).clone_into(&mut result.detail);
        }
    }
}

/// The run as the service reports it; none: this release is none of acceptance.
pub fn state() -> Option<Acceptance> {
    if !Path::new(ACCEPTANCE_PATH).exists() {
        return None;
    }
    let not_begun = Acceptance { doing: "the tests have not begun".into(), ..Acceptance::default() };
    let mut text = String::new();
    let read = std::fs::File::open(STATE).and_then(|file| file.take(LIMIT).read_to_string(&mut text));
    Some(read.ok().and_then(|_| serde_json::from_str(&text).ok()).unwrap_or(not_begun))
}

/// At once or not at all: the service reads it whenever it reports.
fn write(run: &Acceptance) -> Result<()> {
    let next = format!("{STATE}.next");
    std::fs::write(&next, serde_json::to_vec(run).expect("wire types always become JSON"))
        .and_then(|()| std::fs::rename(&next, STATE))
        .map_err(AgentError::file(STATE))
}

fn one(plan: &AcceptancePlan, test: TestKind) -> Vec<TestResult> {
    let within = seconds(plan, test);
    match test {
        TestKind::Memory => memory::test(plan.memory_percent, within),
        TestKind::Cpu => cpu::test(within),
        TestKind::Disk => disk::test(plan, within),
        TestKind::Network => network::test(plan, within),
    }
}

/// A result, with what was measured.
fn result(
    test: TestKind,
    part: impl Into<String>,
    outcome: Outcome,
    detail: impl Into<String>,
    measures: &[(&str, u64)],
) -> TestResult {
    let measures = measures.iter().map(|(name, number)| ((*name).to_owned(), *number)).collect();
    TestResult { test, part: part.into(), outcome, detail: detail.into(), measures }
}

/// Runs one test as a process of its own.
fn process(test: TestKind, within: Duration) -> Vec<TestResult> {
    let failed = |detail: String| vec![result(test, test.as_str(), Outcome::Failed, detail, &[])];
    let command = Command::new("/proc/self/exe")
        .args(["acceptance", test.as_str()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn();
    let child = match command {
        Ok(child) => child,
        Err(error) => return failed(format!("the test could not be started: {error}")),
    };
    match output(child, within) {
        Ok(text) => serde_json::from_str(&text).unwrap_or_else(|e| failed(format!("the test said nothing: {e}"))),
        Err(reason) => failed(reason),
    }
}

/// The line that a process prints; it is killed when its time is over.
fn output(mut child: Child, within: Duration) -> std::result::Result<String, String> {
    let pipe = child.stdout.take().expect("it was asked for");
    let (said, heard) = mpsc::channel();
    std::thread::spawn(move || {
        let mut text = String::new();
        let read = BufReader::new(pipe.take(LIMIT)).read_line(&mut text).map(|_| text);
        // Nobody listens any more when the time was over.
        let _ = said.send(read);
    });
    let Ok(read) = heard.recv_timeout(within) else {
        // What hangs in a driver dies when the driver lets it go; it is not waited for.
        let _ = child.kill();
        return Err(format!("did not end within {} s: it hangs", within.as_secs()));
    };
    let text = read.map_err(|e| e.to_string())?;
    if text.ends_with('\n') {
        // With a thread in a disk that hangs it cannot end, and nothing waits for it.
        let _ = child.kill();
        return Ok(text);
    }
    let status = child.wait().map_err(|e| e.to_string())?;
    Err(format!("the test ended with {status}: the kernel's log says why"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Child {
        Command::new("sh").args(["-c", script]).stdout(Stdio::piped()).spawn().unwrap()
    }

    #[test]
    fn a_test_that_dies_or_hangs_is_a_result() {
        let within = Duration::from_secs(30);
        assert_eq!(output(shell("echo []"), within).unwrap(), "[]\n");
        assert_eq!(output(shell("echo []; exec sleep 1000"), within).unwrap(), "[]\n", "it need not end");
        assert!(output(shell("kill -9 $$"), within).unwrap_err().contains("signal: 9"));
        let hangs = output(shell("exec sleep 1000"), Duration::from_millis(20));
        assert_eq!(hangs.unwrap_err(), "did not end within 0 s: it hangs");
    }

    #[test]
    fn what_the_recipe_asks_is_the_parts_failure() {
        let part = result(TestKind::Disk, "disk vda", Outcome::Passed, "well", &[("read_mib_s", 7)]);
        let mut run = Acceptance { results: vec![part], ..Acceptance::default() };
        let plan = AcceptancePlan { least_disk_read_mib_s: 7, ..AcceptancePlan::default() };
        demand(&plan, &mut run);
        assert_eq!(run.results[0].outcome, Outcome::Passed);
        demand(&AcceptancePlan { least_disk_read_mib_s: 8, ..plan }, &mut run);
        let detail = run.results[0].detail.as_str();
        assert_eq!((run.results[0].outcome, detail), (Outcome::Failed, "it gave 7 MiB/s, at least 8 are asked for"));
    }
}
