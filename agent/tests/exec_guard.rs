//! Allow-listing as it runs: the real agent as supervisor and guard, a file system of the test's own, the real kernel.
//! Each test starts itself again in a mount namespace. It needs root, and a kernel that asks (fanotify(7)); elsewhere
//! it says so and does nothing.
#![allow(clippy::unwrap_used)]

use kiln_protocol::{ExecState, ExecVerdict};
use kiln_release::hex::sha256;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// Nothing here takes longer on any host.
const PATIENCE: Duration = Duration::from_secs(20);
const INSIDE: &str = "KILN_EXEC_TEST_INSIDE";

/// Whether this is the test itself, in its own mount namespace. If not, it has been run there.
fn inside(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    if !nix::unistd::geteuid().is_root() {
        eprintln!("{test} cannot run here: fanotify's permission events and mounts need root");
        return false;
    }
    let mut again = Command::new("unshare");
    again.args(["--mount", "--propagation", "private", "--"]).arg(std::env::current_exe().unwrap());
    again.args(["--exact", test, "--include-ignored", "--nocapture"]).env(INSIDE, "1");
    let done = again.output().unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success() && said.contains("1 passed"), "{said}");
    eprintln!("{said}");
    false
}

/// A guarded tmpfs.
struct Bed {
    dir: tempfile::TempDir,
    place: PathBuf,
    agent: Child,
    told: Receiver<ExecState>,
    last: ExecState,
}

impl Bed {
    /// With `allowed` in it, which the list names; none where the kernel does not ask.
    fn start(mode: &str, fail: &str, allowed: &[(&str, Vec<u8>)]) -> Option<Self> {
        Self::start_by_role(mode, fail, allowed, None, false)
    }

    /// The same where a role chooses, and the release permits it or not.
    fn start_by_role(
        mode: &str,
        fail: &str,
        allowed: &[(&str, Vec<u8>)],
        choice: Option<&str>,
        may_report: bool,
    ) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("place");
        std::fs::create_dir(&place).unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "noexec,nosuid,nodev,size=600M", "test"]).arg(&place);
        assert!(mount.status().unwrap().success());
        for (name, bytes) in allowed {
            put(&place.join(name), bytes);
        }
        let hashes: Vec<String> = allowed.iter().map(|(_, bytes)| sha256(bytes)).collect();
        let policy = serde_json::json!({ "_type": "kiln-exec", "spec_version": "1.0",
            "rules": [{ "path": place, "mode": mode, "fail": fail, "may_report": may_report, "allow": hashes }] });
        let file = dir.path().join("exec.json");
        std::fs::write(&file, policy.to_string()).unwrap();
        if let Some((name, _)) = allowed.first() {
            let refused = Command::new(place.join(name)).output().unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(13), "before it is guarded the place is noexec");
        }
        let program = std::env::var_os("KILN_AGENT").unwrap_or(env!("CARGO_BIN_EXE_kiln-agent").into());
        let mut agent = Command::new(program);
        agent
            .arg("exec")
            .arg(&file)
            .args(choice)
            .stdout(Stdio::piped())
            .stderr(File::create(dir.path().join("said")).unwrap());
        let mut agent = agent.spawn().unwrap();
        let (tell, told) = channel();
        let lines = BufReader::new(agent.stdout.take().unwrap()).lines();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let _ = tell.send(serde_json::from_str(&line).unwrap());
            }
        });
        let mut bed = Self { dir, place, agent, told, last: ExecState::default() };
        match bed.until(|state| state.running) {
            Ok(_) => Some(bed),
            Err(said) if said.contains("CONFIG_FANOTIFY_ACCESS_PERMISSIONS") => {
                eprintln!("this test cannot run here: {said}");
                None
            }
            Err(said) => panic!("{said}"),
        }
    }

    fn until(&mut self, so: impl Fn(&ExecState) -> bool) -> Result<ExecState, String> {
        let deadline = Instant::now() + PATIENCE;
        while !so(&self.last) {
            let Ok(state) = self.told.recv_timeout(deadline.saturating_duration_since(Instant::now())) else {
                let said = std::fs::read_to_string(self.dir.path().join("said")).unwrap_or_default();
                return Err(format!("{:#?}\n{said}", self.last));
            };
            self.last = state;
        }
        Ok(self.last.clone())
    }

    #[track_caller]
    fn wait(&mut self, so: impl Fn(&ExecState) -> bool) -> ExecState {
        self.until(so).unwrap_or_else(|said| panic!("{said}"))
    }

    fn run(&self, name: &str) -> std::io::Result<Output> {
        Command::new(self.place.join(name)).output()
    }

    #[track_caller]
    fn runs(&self, name: &str) {
        let done = self.run(name).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(done.status.success(), "{name}: {done:?}");
    }

    #[track_caller]
    fn is_denied(&self, name: &str) {
        let refused = self.run(name).expect_err("it started");
        assert_eq!(refused.raw_os_error(), Some(1), "{name}: {refused}");
    }

    fn put(&self, name: &str, bytes: &[u8]) {
        put(&self.place.join(name), bytes);
    }

    /// The guard's process.
    fn guard(&self) -> Pid {
        let parent = format!(" {} ", self.agent.id());
        let of = |entry: std::fs::DirEntry| {
            let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
            let (_, rest) = stat.rsplit_once(')')?;
            // " S PPID …"; one that was just killed is a zombie still.
            let alive = !rest.starts_with(" Z");
            (alive && rest[2..].starts_with(&parent)).then(|| entry.file_name().to_str()?.parse().ok()).flatten()
        };
        Pid::from_raw(std::fs::read_dir("/proc").unwrap().flatten().find_map(of).expect("a guard runs"))
    }

    fn guard_status(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.guard())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let _ = self.agent.kill();
        let _ = self.agent.wait();
        let _ = nix::mount::umount2(&self.place, nix::mount::MntFlags::MNT_DETACH);
    }
}

fn put(path: &Path, bytes: &[u8]) {
    std::fs::write(path, bytes).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

fn program(name: &str) -> Vec<u8> {
    std::fs::read(Path::new("/usr/bin").join(name)).unwrap()
}

/// The same program with other bytes behind it, which the kernel never looks at.
fn longer(mut bytes: Vec<u8>, by: usize) -> Vec<u8> {
    bytes.resize(bytes.len() + by, 0);
    bytes
}

fn list() -> Vec<(&'static str, Vec<u8>)> {
    vec![("true", program("true")), ("sleep", program("sleep"))]
}

#[test]
fn a_role_chooses_to_report_only_where_the_release_permits_it() {
    if !inside("a_role_chooses_to_report_only_where_the_release_permits_it") {
        return;
    }
    let (listed, other) = (program("true"), longer(program("true"), 1));
    let Some(mut bed) = Bed::start_by_role("enforce", "closed", &[("listed", listed.clone())], Some("report"), true)
    else {
        return;
    };
    bed.put("other", &other);
    bed.runs("other");
    let told = bed.wait(|state| state.reported > 0);
    assert_eq!((told.denied, told.alarm.clone()), (0, None), "{told:?}");
    drop(bed);
    let Some(mut bed) = Bed::start_by_role("enforce", "closed", &[("listed", listed)], Some("report"), false) else {
        return;
    };
    bed.put("other", &other);
    bed.is_denied("other");
    let told = bed.wait(|state| state.denied > 0);
    assert_eq!(told.reported, 0, "{told:?}");
    assert!(told.alarm.as_ref().is_some_and(|alarm| alarm.contains("does not permit")), "{told:?}");
}

#[test]
fn only_listed_programs_start_and_others_are_told_with_their_ancestry() {
    if !inside("only_listed_programs_start_and_others_are_told_with_their_ancestry") {
        return;
    }
    let Some(mut bed) = Bed::start("enforce", "closed", &list()) else { return };
    bed.runs("true");
    bed.put("foreign", &program("id"));
    let begun = Instant::now();
    bed.is_denied("foreign");
    let state = bed.wait(|state| state.denied > 0);
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    let [violation] = &state.violations[..] else { panic!("{state:#?}") };
    assert_eq!(violation.path, bed.place.join("foreign").to_str().unwrap());
    assert_eq!(violation.sha256.as_ref().unwrap().as_str(), sha256(&program("id")));
    assert_eq!(violation.verdict, ExecVerdict::Denied);
    let own = violation.ancestry.iter().find(|a| a.pid == std::process::id()).expect("this process wanted it");
    assert_eq!(own.exe, std::env::current_exe().unwrap().to_str().unwrap());
    // By other names, and as a program's interpreter line would have it.
    std::fs::hard_link(bed.place.join("true"), bed.place.join("also")).unwrap();
    bed.runs("also");
    std::fs::rename(bed.place.join("foreign"), bed.place.join("renamed")).unwrap();
    bed.is_denied("renamed");
    bed.put("script", b"#!/bin/sh\nexit 0\n");
    bed.is_denied("script");
    for _ in 0..50 {
        bed.is_denied("renamed");
    }
    let state = bed.wait(|state| state.denied >= 53);
    assert_eq!(state.violations.len(), 3, "the same again is counted: {state:#?}");
    assert_eq!((state.restarts, state.late, state.reported), (0, 0, 0), "{state:#?}");
    // Many others are bounded.
    for n in 0..40 {
        let name = format!("other-{n}");
        bed.put(&name, &longer(program("true"), n + 1));
        bed.is_denied(&name);
    }
    let state = bed.wait(|state| state.denied >= 93);
    assert_eq!(state.violations.len(), kiln_protocol::EXEC_VIOLATIONS);
}

#[test]
fn what_is_changed_after_it_was_allowed_is_judged_anew() {
    if !inside("what_is_changed_after_it_was_allowed_is_judged_anew") {
        return;
    }
    let Some(bed) = Bed::start("enforce", "closed", &list()) else { return };
    let path = bed.place.join("true");
    let good = program("true");
    let known = || {
        // Long enough to be kept in the cache.
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_millis(60) {
            bed.runs("true");
        }
    };
    known();
    let file = File::options().write(true).open(&path).unwrap();
    let refused = bed.run("true").unwrap_err().raw_os_error();
    assert!(matches!(refused, Some(1 | 26)), "while it is open for writing nothing starts: {refused:?}");
    drop(file);
    known();

    // One byte, the length and the time of change put back.
    let before = std::fs::metadata(&path).unwrap().modified().unwrap();
    let last = good.len() as u64 - 1;
    let change = |byte: u8| {
        let file = File::options().write(true).open(&path).unwrap();
        file.write_all_at(&[byte], last).unwrap();
        file.set_modified(before).unwrap();
    };
    change(good[good.len() - 1] ^ 1);
    bed.is_denied("true");
    change(good[good.len() - 1]);
    known();

    // Through a mapping: a tmpfs moves no time for that.
    let script =
        "import mmap, sys\nf = open(sys.argv[1], 'r+b')\nm = mmap.mmap(f.fileno(), 0)\nx = m[-1]\nm[-1] = x ^ 1\n";
    match Command::new("python3").args(["-c", script]).arg(&path).status() {
        Ok(done) => {
            assert!(done.success());
            bed.is_denied("true");
        }
        Err(error) => eprintln!("the change through a mapping is left out: python3: {error}"),
    }

    // Another file in its place.
    put(&bed.place.join("new"), &program("id"));
    std::fs::rename(bed.place.join("new"), &path).unwrap();
    bed.is_denied("true");
    put(&bed.place.join("new"), &good);
    std::fs::rename(bed.place.join("new"), &path).unwrap();
    bed.runs("true");
}

#[test]
fn a_rule_that_only_reports_lets_start_and_tells() {
    if !inside("a_rule_that_only_reports_lets_start_and_tells") {
        return;
    }
    let Some(mut bed) = Bed::start("report", "closed", &list()) else { return };
    bed.runs("true");
    bed.put("foreign", &program("id"));
    bed.runs("foreign");
    bed.runs("foreign");
    let state = bed.wait(|state| state.reported == 2);
    assert_eq!((state.denied, state.violations[0].count), (0, 2), "{state:#?}");
    assert!(state.violations[0].ancestry.iter().any(|a| a.pid == std::process::id()));
}

#[test]
fn a_killed_guard_is_replaced_and_told() {
    if !inside("a_killed_guard_is_replaced_and_told") {
        return;
    }
    let Some(mut bed) = Bed::start("enforce", "closed", &list()) else { return };
    bed.put("foreign", &program("id"));
    for time in 1..=3 {
        let guard = bed.guard();
        kill(guard, Signal::SIGKILL).unwrap();
        // At once: the kernel has the question kept until there is somebody to answer it, or policy denies it.
        bed.is_denied("foreign");
        let state = bed.wait(|state| state.running && state.restarts >= time);
        assert!(state.alarm.is_some(), "{state:#?}");
        assert_ne!(bed.guard(), guard);
        bed.runs("true");
        bed.is_denied("foreign");
    }
    let said = std::fs::read_to_string(bed.dir.path().join("said")).unwrap();
    assert!(said.contains("it ended (signal: 9 (SIGKILL))"), "{said}");
}

#[test]
fn a_stopped_guard_is_replaced_and_what_waits_for_it_is_judged() {
    if !inside("a_stopped_guard_is_replaced_and_what_waits_for_it_is_judged") {
        return;
    }
    for fail in ["closed", "open"] {
        let Some(mut bed) = Bed::start("enforce", fail, &list()) else { return };
        bed.put("foreign", &program("id"));
        let guard = bed.guard();
        kill(guard, Signal::SIGSTOP).unwrap();
        let begun = Instant::now();
        bed.is_denied("foreign");
        let waited = begun.elapsed();
        assert!(waited < Duration::from_secs(1), "{waited:?}");
        bed.runs("true");
        let state = bed.wait(|state| state.running && state.restarts == 1);
        assert!(state.alarm.unwrap().contains("no sign of life"));
        assert_ne!(bed.guard(), guard);
        eprintln!("fail = {fail}: a program that met a stopped guard waited {waited:?}");
    }
}

#[test]
fn what_takes_too_long_goes_by_the_rules_fail() {
    if !inside("what_takes_too_long_goes_by_the_rules_fail") {
        return;
    }
    // 250 MiB, nearly all of it a hole.
    let long = longer(program("true"), 250 << 20);
    for fail in ["closed", "open"] {
        let Some(mut bed) = Bed::start("enforce", fail, &list()) else { return };
        let put = |name: &str, last: u8| {
            let path = bed.place.join(name);
            put(&path, &program("true"));
            let file = File::options().write(true).open(path).unwrap();
            file.set_len(long.len() as u64).unwrap();
            file.write_all_at(&[last], long.len() as u64 - 1).unwrap();
        };
        put("long", 1);
        let begun = Instant::now();
        let done = bed.run("long");
        let waited = begun.elapsed();
        let state = bed.wait(|state| state.late + state.denied > 0);
        let [violation] = &state.violations[..] else { panic!("{state:#?}") };
        match fail {
            "closed" => {
                assert_eq!((done.unwrap_err().raw_os_error(), violation.verdict), (Some(1), ExecVerdict::LateDenied));
            }
            _ => assert!(done.is_ok() && violation.verdict == ExecVerdict::LateAllowed, "{violation:#?}"),
        }
        assert_eq!(violation.sha256, None);
        eprintln!("fail = {fail}: answered after {waited:?}");
        // It went on being read, and is known the next time.
        let begun = Instant::now();
        while bed.wait(|_| true).denied == 0 {
            assert!(begun.elapsed() < PATIENCE, "it is never known");
            let _ = bed.run("long");
            let _ = bed.until(|state| state.denied > 0 || state.late > 0);
            std::thread::yield_now();
            while let Ok(state) = bed.told.try_recv() {
                bed.last = state;
            }
        }
        bed.is_denied("long");
    }
}

#[test]
fn the_guard_is_locked_sealed_and_small() {
    if !inside("the_guard_is_locked_sealed_and_small") {
        return;
    }
    let Some(bed) = Bed::start("enforce", "closed", &list()) else { return };
    bed.runs("true");
    assert_eq!((bed.guard_status("Seccomp:"), bed.guard_status("NoNewPrivs:")), (2, 1));
    assert!(bed.guard_status("VmLck:") > 0, "it is locked in memory");
    let open = || {
        let links = std::fs::read_dir(format!("/proc/{}/fd", bed.guard())).unwrap().flatten();
        let mut targets: Vec<String> =
            links.map(|link| std::fs::read_link(link.path()).unwrap().to_string_lossy().into_owned()).collect();
        targets.sort();
        targets
    };
    let before = open();
    assert!(
        !before.iter().any(|target| target.starts_with(bed.dir.path().to_str().unwrap()) && !target.ends_with("/said")),
        "{before:?}"
    );
    for n in 0..2000_usize {
        if n % 20 == 0 {
            bed.put("other", &longer(program("true"), n + 1));
            bed.is_denied("other");
        }
        bed.runs("true");
    }
    assert_eq!(open(), before, "nothing stays open");
    eprintln!(
        "the guard's memory: {} kB resident, at most {} kB",
        bed.guard_status("VmRSS:"),
        bed.guard_status("VmHWM:")
    );
}

/// What docs/exec-policy.md says is not covered is not.
#[test]
fn what_is_not_covered() {
    if !inside("what_is_not_covered") {
        return;
    }
    let Some(mut bed) = Bed::start("enforce", "closed", &list()) else { return };
    let starts = |command: &mut Command| {
        let done = command.output().unwrap();
        assert!(done.status.success(), "{done:?}");
        String::from_utf8_lossy(&done.stdout).into_owned()
    };
    // A script that is read by an interpreter from elsewhere.
    bed.put("script", b"#!/bin/sh\necho interpreted\n");
    bed.is_denied("script");
    assert_eq!(starts(Command::new("/bin/sh").arg(bed.place.join("script"))), "interpreted\n");
    // A program that the dynamic loader from elsewhere maps.
    bed.put("foreign", &program("id"));
    bed.is_denied("foreign");
    let loader =
        ["/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1"].into_iter().find(|l| Path::new(l).exists());
    match loader {
        Some(loader) => assert!(starts(Command::new(loader).arg(bed.place.join("foreign"))).contains("uid=0")),
        None => eprintln!("the dynamic loader is left out: there is none"),
    }
    // Code that a program makes in memory, and a program that is only in memory.
    let made = "import ctypes, mmap\nm = mmap.mmap(-1, 4096, prot=7)\nm.write(b'\\xb8\\x2a\\0\\0\\0\\xc3')\n\
                f = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))\nprint(f())\n";
    let memory = "import os, sys\nf = os.memfd_create('x', 0)\nos.write(f, open(sys.argv[1], 'rb').read())\n\
                  os.execve(f, ['x'], {})\n";
    match Command::new("python3").arg("--version").output() {
        Ok(_) => {
            #[cfg(target_arch = "x86_64")]
            assert_eq!(starts(Command::new("python3").args(["-c", made])), "42\n");
            let said = starts(Command::new("python3").args(["-c", memory]).arg(bed.place.join("foreign")));
            assert!(said.contains("uid=0"), "{said}");
        }
        Err(error) => eprintln!("JIT and memfd are left out: python3: {error}"),
    }
    // A debugger's way into an allowed program.
    let mut allowed = Command::new(bed.place.join("sleep")).arg("60").spawn().unwrap();
    // Its parent goes on before the kernel has mapped it.
    let begun = Instant::now();
    let code = loop {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", allowed.id())).unwrap();
        if let Some(code) = maps.lines().find(|line| line.contains(" r-xp ") && line.ends_with("/sleep")) {
            break code.to_owned();
        }
        assert!(begun.elapsed() < PATIENCE, "it is never mapped: {maps}");
        std::thread::yield_now();
    };
    let at = u64::from_str_radix(code.split('-').next().unwrap(), 16).unwrap();
    let mem = File::options().read(true).write(true).open(format!("/proc/{}/mem", allowed.id())).unwrap();
    mem.write_all_at(&[0xcc; 64], at).unwrap();
    let mut back = [0; 64];
    mem.read_exact_at(&mut back, at).unwrap();
    assert_eq!(back, [0xcc; 64], "its code is another");
    allowed.kill().unwrap();
    allowed.wait().unwrap();
    let state = bed.wait(|state| state.denied == 2);
    assert_eq!(state.violations.len(), 2, "nothing of the rest was seen: {state:#?}");
}

/// A source file of 700 lines.
fn source(unit: usize) -> String {
    let mut text = String::from("#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n");
    for n in 0..70 {
        text.extend([format!(
            "int f{unit}_{n}(const char *s, int *out, int many) {{\n    int sum = {n};\n    for (int i = 0; i < many; i++) {{\n        \
             size_t length = strlen(s);\n        if (length > {n}) sum += s[i % length] * (i ^ {n});\n        else out[i & 7] -= sum;\n    \
             }}\n    if (sum < 0) fprintf(stderr, \"%d %s\\n\", sum, s);\n    return sum;\n}}\n"
        )]);
    }
    if unit == 0 {
        text += "int main(int n, char **words) { int out[8] = {0}; return f0_0(words[0], out, n) == 7; }\n";
    }
    text
}

/// Figures for docs/benchmarks.md, by `make bench`; also as JSON into the file that KILN_FIGURES names.
#[test]
#[ignore = "a measurement"]
fn what_it_costs() {
    if !inside("what_it_costs") {
        return;
    }
    let tools: Vec<(&str, Vec<u8>)> = ["gcc", "cc1", "as", "collect2", "ld"]
        .into_iter()
        .map(|tool| {
            let found = Command::new("gcc").arg(format!("-print-prog-name={tool}")).output().unwrap().stdout;
            let found = String::from_utf8(found).unwrap();
            let path = if found.contains('/') { PathBuf::from(found.trim()) } else { Path::new("/usr/bin").join(tool) };
            (tool, std::fs::read(path).unwrap())
        })
        .chain(list())
        .collect();
    let Some(bed) = Bed::start("enforce", "closed", &tools) else { return };
    let free = bed.dir.path().join("free");
    std::fs::create_dir(&free).unwrap();
    assert!(Command::new("mount").args(["-t", "tmpfs", "test"]).arg(&free).status().unwrap().success());
    for (name, bytes) in &tools {
        put(&free.join(name), bytes);
    }
    // Headers and start files are those of the host's gcc, whose programs were copied.
    let libgcc = Command::new("gcc").arg("-print-libgcc-file-name").output().unwrap().stdout;
    let libgcc = PathBuf::from(String::from_utf8(libgcc).unwrap().trim()).parent().unwrap().to_owned();
    let work = bed.dir.path().join("work");
    std::fs::create_dir(&work).unwrap();
    let units: Vec<String> = (0..4).map(|unit| format!("unit{unit}")).collect();
    for (number, unit) in units.iter().enumerate() {
        std::fs::write(work.join(format!("{unit}.c")), source(number)).unwrap();
    }
    let compile = |place: &Path| {
        let gcc = |arguments: &[String]| {
            let mut gcc = Command::new(place.join("gcc"));
            gcc.current_dir(&work).arg("-B").arg(format!("{}/", place.display()));
            gcc.arg("-B").arg(format!("{}/", libgcc.display())).arg("-O2");
            assert!(gcc.args(arguments).status().unwrap().success());
        };
        for unit in &units {
            gcc(&["-c".into(), format!("{unit}.c"), "-o".into(), format!("{unit}.o")]);
        }
        let objects: Vec<String> = units.iter().map(|unit| format!("{unit}.o")).collect();
        gcc(&[vec!["-o".into(), "program".into()], objects].concat());
    };
    let starts = |place: &Path| {
        for _ in 0..400 {
            assert!(Command::new(place.join("true")).status().unwrap().success());
        }
    };
    let seconds = |work: &dyn Fn(&Path), place: &Path| {
        let begun = Instant::now();
        work(place);
        begun.elapsed().as_secs_f64()
    };
    let mut figures = serde_json::Map::new();
    let works = [("start", "400 starts of true, each", 400.0), ("compile", "four files compiled and linked", 1.0)];
    for (n, (name, what, times)) in works.into_iter().enumerate() {
        let work: &dyn Fn(&Path) = if n == 0 { &starts } else { &compile };
        work(&bed.place);
        work(&free);
        // In turns, so that what else the host does meets both.
        let (mut with, mut without) = (Vec::new(), Vec::new());
        for _ in 0..9 {
            with.push(seconds(work, &bed.place) / times * 1e6);
            without.push(seconds(work, &free) / times * 1e6);
        }
        with.sort_by(f64::total_cmp);
        without.sort_by(f64::total_cmp);
        let (with, without) = (with[4], without[4]);
        let more = with / without - 1.0;
        eprintln!("{what}: {without:.0} µs, guarded {with:.0} µs: {:+.1} %", more * 100.0);
        figures.insert(name.into(), serde_json::json!({ "free_us": without, "guarded_us": with, "more": more }));
    }
    let (resident, most) = (bed.guard_status("VmRSS:"), bed.guard_status("VmHWM:"));
    eprintln!("guard: {resident} kB resident, {most} kB at most");
    figures.insert("guard".into(), serde_json::json!({ "rss_kib": resident, "peak_kib": most }));
    if let Some(path) = std::env::var_os("KILN_FIGURES").map(PathBuf::from) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, serde_json::Value::Object(figures).to_string()).unwrap();
    }
    let _ = nix::mount::umount2(&free, nix::mount::MntFlags::MNT_DETACH);
}
