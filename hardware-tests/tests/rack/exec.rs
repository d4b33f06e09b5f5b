//! Allow-listing on a machine of the rack: Debian's kernel, systemd, the agent as a service, and the server that is
//! told. What needs no machine is in `agent/tests/exec_guard.rs`.

use kiln_lab::api::MachineView;
use kiln_lab::console::Mark;
use kiln_lab::machine::{Firmware, MachineSpec};
use kiln_lab::rack::{IDLE, Rack, RackOptions};
use kiln_lab::variables::NetworkBoot;
use kiln_lab::{site, testing};
use kiln_protocol::ExecVerdict;
use std::time::{Duration, Instant};

const NAME: &str = "rack-1";
/// The server hears within a second (docs/exec-policy.md): a bound that no emulated machine on a busy host comes near.
const TOLD: Duration = Duration::from_secs(5);
/// What service and guard may ever have had in memory, bytes.
const AGENT_RSS: u64 = 12_000_000;

/// By its newest report, which has the most of each since that began.
fn costs_little(rack: &Rack) {
    let view: MachineView = serde_json::from_value(rack.get(&format!("/api/v1/machines/{NAME}")).unwrap()).unwrap();
    let memory = view.agent_memory.expect("each report says it");
    println!("service and guard: {} bytes, {} at most", memory.rss_bytes, memory.peak_bytes);
    assert!(memory.peak_bytes <= AGENT_RSS, "service and guard: {memory:?}");
}

/// From a guarded place only what the release lists starts, and the server is told who tried what else; a guard that is
/// killed, one that is stopped and a service that is killed are replaced, and nothing starts meanwhile that should not. Service and
/// guard never have more memory than the agent may.
#[test]
#[ignore = "slow: a boot and a long look at it; make test-slow"]
fn only_what_the_release_lists_starts_and_the_server_is_told() {
    testing::rack(|paths| {
        let spec = MachineSpec::new(1, Firmware::Uefi(NetworkBoot::Pxe));
        let mut options = RackOptions::scenario(paths, "exec", spec);
        options.image = site::EXEC.to_owned();
        let mut rack = Rack::start(paths, &options).unwrap();
        rack.kiln(&["release", "publish", "exec/1"]).unwrap();
        rack.machine(NAME).power_on().unwrap();
        let console = rack.machine(NAME).console().unwrap().clone();
        console.wait_for("KILN-EXEC foreign ", Mark::default(), IDLE).unwrap();
        let begun = Instant::now();
        let told = |path: &str| {
            let path = path.to_owned();
            move |v: &MachineView| {
                v.exec.as_ref().is_some_and(|exec| exec.violations.iter().any(|violation| violation.path == path))
            }
        };
        let view = rack.wait(NAME, "told of the denied program", told("/var/opt/foreign")).unwrap();
        let took = begun.elapsed();
        println!("the server knew {took:?} after the console");
        assert!(took < TOLD, "{took:?}");
        let exec = view.exec.unwrap();
        let violation = exec.violations.iter().find(|v| v.path == "/var/opt/foreign").unwrap();
        assert_eq!(violation.verdict, ExecVerdict::Denied);
        assert!(violation.sha256.is_some());
        let names: Vec<&str> = violation.ancestry.iter().map(|a| a.comm.as_str()).collect();
        assert!(names.contains(&"exec-probe") && names.last() == Some(&"systemd"), "{names:?}");

        rack.wait_healthy(NAME, 1).unwrap();
        costs_little(&rack);
        console.wait_for("KILN-EXEC done", Mark::default(), IDLE).unwrap();
        let said = console.since(Mark::default());
        let lines: Vec<&str> = said.lines().filter_map(|l| l.split_once("KILN-EXEC ").map(|(_, rest)| rest)).collect();
        for check in [
            "allowed",
            "foreign",
            "script",
            "interpreted",
            "loader",
            "mount",
            "cost",
            "memory",
            "killed",
            "replaced",
            "after-kill",
            "stopped",
            "replaced-too",
            "after-stop",
            "service-gone",
            "after-service",
        ] {
            assert!(lines.iter().any(|l| l.starts_with(&format!("{check} ok"))), "{check}: {lines:#?}");
        }
        assert!(!lines.iter().any(|l| l.contains(" fail ")), "{lines:#?}");
        println!("{lines:#?}");
        assert!(!said.contains("drift: /var/opt"), "what the guard judges is no drift");
        assert!(said.contains("it ended (signal: 9 (SIGKILL))"), "a killed guard is an alarm");
        assert!(said.contains("it gave no sign of life for"), "a stopped one, too");
        let shown = rack.kiln(&["machine", "show", NAME]).unwrap();
        assert!(shown.contains("allow-list   the guard runs") && shown.contains("/var/opt/foreign"), "{shown}");
        costs_little(&rack);
    });
}
