//! The look at this very host: what is put there is seen, what goes is seen to be gone. What a machine looks like is in
//! `agent/protocol/tests/drift.rs`.

use super::*;
use std::net::TcpListener;
use std::process::Command;
use std::time::Instant;

fn manifest() -> Manifest {
    crate::testing::TestSite::new(1).manifests.remove(&1).unwrap()
}

/// A look with this host as the release, as far as it can be said beforehand.
fn looker(place: &str) -> Looker {
    let root = Root { hash: || Ok(crate::testing::root_hash(1)), is_corrupted: || Ok(false) };
    let mut looker = Looker::new(manifest(), root, place);
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap().trim().to_owned();
    let users = users_of(&std::fs::read_to_string("/etc/passwd").unwrap());
    looker.expected = Ok(Expected { kernel, users, ..Expected::default() });
    looker
}

fn of(seen: &Seen, kind: DriftKind) -> Vec<&Difference> {
    seen.differences.iter().filter(|d| d.kind == kind).collect()
}

#[test]
fn a_listener_a_program_in_memory_and_its_process_are_seen_and_seen_to_go() {
    let mut looker = looker("");
    let before = looker.look();
    for kind in [DriftKind::Root, DriftKind::Kernel, DriftKind::User] {
        assert!(of(&before, kind).is_empty(), "{before:#?}");
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = format!("tcp/{}", listener.local_addr().unwrap().port());
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let program = dir.path().join("evil");
    crate::testing::program(&program, &std::fs::read("/bin/sleep").unwrap());
    let mut process = Command::new(&program).arg("600").spawn().unwrap();
    let program = program.to_str().unwrap();

    let seen = looker.look();
    let found =
        |what: &str| seen.differences.iter().find(|d| d.what == what).unwrap_or_else(|| panic!("{what}: {seen:#?}"));
    let told = found(&port);
    assert!(told.text.contains(&format!("(pid {}) listens on {port}", std::process::id())), "{told:?}");
    let told = of(&seen, DriftKind::Executable);
    let own = told.iter().find(|d| d.what == program).expect("the file, or its process");
    assert!(own.text.contains("may be executed") || own.text.contains(&format!("process {}", process.id())), "{own:?}");

    std::fs::remove_file(program).unwrap();
    let seen = looker.look();
    let gone = format!("{program} (deleted)");
    assert!(of(&seen, DriftKind::Executable).iter().any(|d| d.what == gone), "a process outlives its file: {seen:#?}");
    process.kill().unwrap();
    process.wait().unwrap();
    drop(listener);
    let seen = looker.look();
    assert!(!seen.differences.iter().any(|d| d.what == port || d.what == gone || d.what == program));
}

#[test]
fn what_the_agent_left_behind_is_no_drift_and_another_with_its_number_is() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let program = dir.path().join("init");
    crate::testing::program(&program, &std::fs::read("/bin/sleep").unwrap());
    let mut process = Command::new(&program).arg("600").spawn().unwrap();
    std::fs::remove_file(&program).unwrap();
    let gone = format!("{} (deleted)", program.display());
    let mut looker = looker("");
    let mut is_told = |own: Vec<Process>| {
        looker.own = own;
        of(&looker.look(), DriftKind::Executable).iter().any(|d| d.what == gone)
    };
    let own = Process::of(Path::new("/proc"), process.id()).unwrap();
    assert!(is_told(Vec::new()));
    assert!(!is_told(vec![own]));
    assert!(is_told(vec![Process { started: own.started + 1, ..own }]), "one that started at another time");
    assert!(is_told(vec![Process { pid: own.pid + 1, ..own }]));
    process.kill().unwrap();
    process.wait().unwrap();
}

#[test]
fn units_control_groups_and_limits_are_read_where_they_lie() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().to_str().unwrap().to_owned();
    let put = |path: &str, text: &str| {
        let path = dir.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    let group = "sys/fs/cgroup/system.slice";
    put(&format!("{group}/web.service/memory.events"), "oom_kill 0\n");
    put(&format!("{group}/web.service/cpu.stat"), "nr_periods 0\nnr_throttled 0\n");
    put(&format!("{group}/system-getty.slice/getty@tty1.service/cpu.stat"), "");
    put(&format!("{group}/memory.events"), "oom_kill 0\n");
    put("run/systemd/transient/run-u1.service", "[Service]\n");
    let mut looker = looker(&place);
    let expected = looker.expected.as_mut().unwrap();
    expected.services = vec!["web.service".into()];
    expected.limits =
        vec![kiln_release::UnitLimit { unit: "web.service".into(), memory: Some(1 << 20), cpu: Some(10) }];
    let seen = looker.look();
    let units: Vec<&str> = of(&seen, DriftKind::Unit).iter().map(|d| d.what.as_str()).collect();
    assert_eq!(units, ["getty@tty1.service", "run-u1.service"]);
    assert_eq!(seen.limits, []);
    // What cannot be read is said, not passed over.
    assert!(of(&seen, DriftKind::Unseen).iter().any(|d| d.what == "/proc/modules"), "{seen:#?}");

    // The service was killed whole and has a new group; the slice remembers.
    put(&format!("{group}/memory.events"), "oom_kill 1\n");
    assert_eq!(
        looker.look().limits,
        [(true, "a service with a limit: 1 process(es) killed at its memory limit".into())]
    );
    // So it does where another limit is met in the same look.
    put(&format!("{group}/memory.events"), "oom_kill 2\n");
    put(&format!("{group}/web.service/cpu.stat"), "nr_periods 10\nnr_throttled 9\n");
    let told: Vec<String> = looker.look().limits.into_iter().map(|(_, text)| text).collect();
    assert_eq!(
        told,
        [
            "web.service: held back by its CPU limit in 9 of 10 periods",
            "a service with a limit: 1 process(es) killed at its memory limit"
        ]
    );
    put(&format!("{group}/web.service/cpu.stat"), "nr_periods 20\nnr_throttled 9\n");
    looker.look();
    put(&format!("{group}/memory.events"), "oom_kill 3\n");
    put(&format!("{group}/web.service/memory.events"), "oom_kill 1\n");
    put(&format!("{group}/web.service/cpu.stat"), "nr_periods 30\nnr_throttled 18\n");
    let told: Vec<String> = looker.look().limits.into_iter().map(|(_, text)| text).collect();
    assert_eq!(
        told,
        [
            "web.service: 1 process(es) killed at its memory limit",
            "web.service: held back by its CPU limit in 9 of 10 periods"
        ]
    );
}

/// A machine that ran another kernel would be another release: here its word is a file.
#[test]
fn another_kernel_another_command_line_and_a_foreign_module_are_named() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(dir.path().join("proc/sys/kernel")).unwrap();
    std::fs::write(dir.path().join("proc/sys/kernel/osrelease"), "6.1.0-other\n").unwrap();
    std::fs::write(dir.path().join("proc/modules"), "dm_verity 1 0 - Live 0x0\nforeign 1 0 - Live 0x0\n").unwrap();
    let mut looker = looker(dir.path().to_str().unwrap());
    let expected = looker.expected.as_mut().unwrap();
    (expected.kernel, expected.modules) = ("6.12.1".into(), vec!["dm-verity".into()]);
    let seen = looker.look();
    let kernel: Vec<&str> = of(&seen, DriftKind::Kernel).iter().map(|d| d.text.as_str()).collect();
    assert_eq!(kernel, ["the kernel is \"6.1.0-other\"; the release says \"6.12.1\""]);
    let modules: Vec<&str> = of(&seen, DriftKind::Module).iter().map(|d| d.what.as_str()).collect();
    assert_eq!(modules, ["foreign"]);
    // This host was started with its own.
    assert_eq!(of(&seen, DriftKind::CommandLine)[0].what, "the kernel's command line");
}

#[test]
fn programs_of_a_place_with_an_allow_list_are_its_guards_to_judge() {
    let dir = tempfile::tempdir().unwrap();
    for folder in ["srv", "tmp", "usr/lib/kiln"] {
        std::fs::create_dir_all(dir.path().join(folder)).unwrap();
    }
    for program in ["srv/tool", "tmp/tool"] {
        std::fs::copy("/bin/true", dir.path().join(program)).unwrap();
    }
    let (mode, fail) = (kiln_release::ExecMode::Enforce, kiln_release::ExecFail::Closed);
    let rule = kiln_release::ExecRule { path: "/srv".into(), mode, fail, may_report: false, allow: Vec::new() };
    let policy = serde_json::to_vec(&ExecPolicy::new(vec![rule])).unwrap();
    std::fs::write(dir.path().join(&EXEC_PATH[1..]), policy).unwrap();
    let mut looker = looker(dir.path().to_str().unwrap());
    looker.manifest.writable =
        ["/srv", "/tmp"].map(|path| kiln_release::WritableMount { path: path.into(), size: 4096 }).into();
    let seen = looker.look();
    let programs: Vec<&str> = of(&seen, DriftKind::Executable).iter().map(|d| d.what.as_str()).collect();
    assert_eq!(programs, ["/tmp/tool"]);
}

#[test]
fn without_a_word_of_the_release_there_is_nothing_to_compare_with_and_that_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let root = Root { hash: || Ok("00".into()), is_corrupted: || Ok(false) };
    let mut looker = Looker::new(manifest(), root, dir.path());
    let seen = looker.look();
    assert_eq!(of(&seen, DriftKind::Root)[0].what, "the kernel's root hash");
    assert_eq!(of(&seen, DriftKind::Unseen)[0].what, EXPECTED_PATH);
    assert_eq!(clock(Some(9_000)), None);
    assert_eq!(clock(Some(-75_000)).unwrap().text, "the clock is 75 s behind the boot server's");
}

#[test]
fn a_block_of_the_root_that_the_kernel_refused_is_told_and_so_is_a_kernel_that_does_not_say() {
    let mut looker = looker("");
    let before = looker.look();
    let about = |seen: &Seen| seen.differences.iter().find(|d| d.what == BLOCKS).cloned();
    assert_eq!(about(&before), None);
    looker.root.is_corrupted = || Ok(true);
    let told = about(&looker.look()).expect("the kernel's verdict");
    assert_eq!((told.kind, told.text.as_str()), (DriftKind::Root, CORRUPTED));
    looker.root.is_corrupted = || Err(crate::error::AgentError::NoServer);
    assert_eq!(about(&looker.look()).expect("it is not passed over").kind, DriftKind::Unseen);
}

/// What a look costs: printed, not judged.
#[test]
fn looks_are_counted() {
    let mut looker = looker("");
    looker.look();
    let ticks = || {
        let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
        let fields: Vec<u64> =
            stat.rsplit(')').next().unwrap().split_whitespace().skip(11).take(2).map(|f| f.parse().unwrap()).collect();
        fields[0] + fields[1]
    };
    let (begun, before) = (Instant::now(), ticks());
    for _ in 0..100 {
        looker.look();
    }
    eprintln!("100 looks: {} ms of processor time, {} ms", (ticks() - before) * 10, begun.elapsed().as_millis());
    assert!(looker.owners.len() < FILES, "what is remembered ends with what it is about");
}
