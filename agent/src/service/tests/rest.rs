//! What the service costs while nothing happens, on this very host: a figure for docs/benchmarks.md, by `make bench`. An emulated
//! machine says of it only what emulation costs.

use super::*;
use crate::drift::{Looker, Root};
use crate::facts;
use kiln_release::Expected;
use kiln_release::declared::EXPECTED_PATH;
use std::os::unix::fs::symlink;

/// The name of its thread, which those that it starts have from it.
const SERVICE: &str = "kiln-rest";
/// So old it is when it counts as at rest.
const SETTLED: Duration = Duration::from_secs(60);
const REST: Duration = Duration::from_secs(180);

/// Processor time of the service's threads, also of those that ended: all but the others'.
fn cpu_ms() -> u64 {
    let of = |process: &str| facts::memory_of(process).and_then(|memory| memory.cpu_ms).unwrap();
    let threads = Path::new("/proc/self/task").read_dir().unwrap().flatten();
    let others = threads.filter(|thread| {
        let name = std::fs::read_to_string(thread.path().join("comm")).unwrap();
        name.trim() != SERVICE
    });
    let others: u64 = others.map(|thread| of(&format!("self/task/{}", thread.file_name().display()))).sum();
    of("self").saturating_sub(others)
}

/// It looks at this host for drift, where far more runs than in a machine, and says what it sees. It does not ship logs or keep an
/// inventory and its uplink: these wait.
#[test]
#[ignore = "a measurement of four minutes: make bench"]
fn what_the_service_costs_at_rest() {
    let site = TestSite::new(1);
    let director = Director::start(&site, (1, 4, Via::Cold, false));
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::write(at("state"), "running").unwrap();
    let systemctl = at("systemctl");
    let script = SYSTEMCTL.replace("DIR", dir.path().to_str().unwrap());
    program(&systemctl, script.as_bytes());
    std::fs::create_dir(at("next")).unwrap();
    // This host, and in front of it what a release expects.
    let host = at("host");
    let expected = host.join(EXPECTED_PATH.trim_start_matches('/'));
    std::fs::create_dir_all(expected.parent().unwrap()).unwrap();
    std::fs::write(expected, serde_json::to_vec(&Expected::default()).unwrap()).unwrap();
    for folder in ["proc", "sys", "run", "etc", "dev"] {
        symlink(Path::new("/").join(folder), host.join(folder)).unwrap();
    }

    let verifier = site.verifier(1, &[], std::slice::from_ref(&director.url), &at("machine"));
    let manifest = site.manifests[&1].clone();
    let checks = Checks::new(manifest.health.clone(), root_hash(1), Probe::new(|| Ok(root_hash(1)), systemctl.clone()));
    let (next, spool) = (at("next"), at("spool.json"));
    let serve = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().thread_name(SERVICE).build().unwrap();
        let root = Root { hash: || Ok(root_hash(1)), is_corrupted: || Ok(false) };
        let watch = Watch::new(Keeper::open(Some(&spool), None), manifest.hooks.clone(), "/");
        let journal = journal(&verifier);
        let mut service = Service::new(verifier, journal, next, Door { systemctl, reboot: stays }).unwrap();
        service.watch = watch.looking(Looker::new(manifest, root, host));
        panic!("it left: {}", runtime.block_on(Box::pin(service.run(checks))));
    };
    // Ends with the test.
    std::thread::Builder::new().name(SERVICE.into()).spawn(serve).unwrap();
    let looked = |report: &Report| report.condition.as_ref().is_some_and(|condition| condition.drift_count > 0);
    director.wait("of this host's drift", Instant::now(), PATIENCE, |report| healthy(report) && looked(report));

    // Time is what is measured.
    std::thread::sleep(SETTLED);
    let (begun, before, reports) = (Instant::now(), cpu_ms(), director.heard().len());
    std::thread::sleep(REST);
    let (ms, seconds) = (cpu_ms() - before, begun.elapsed().as_secs_f64());
    let reports = director.heard().len() - reports;
    assert!(reports > 0, "it lives");
    #[allow(clippy::cast_precision_loss)] // some hundred
    let share = ms as f64 / 1e3 / seconds;
    println!("the service at rest: {:.3} % of one core: {ms} ms in {seconds:.0} s, {reports} reports", share * 100.0);
    if let Some(path) = std::env::var_os("KILN_FIGURES").map(PathBuf::from) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let figures = serde_json::json!({ "cpu_share": share, "seconds": seconds, "reports": reports });
        std::fs::write(path, figures.to_string()).unwrap();
    }
}
