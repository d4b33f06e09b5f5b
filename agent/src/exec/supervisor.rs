//! The supervisor: owns the fanotify group, keeps a guard running on it, reads who wanted to execute what, and tells.
//!
//! The group outlives guards: while one is replaced, what is executed waits in the kernel's queue for the next. What
//! the old one had read and not answered is answered here, by policy. The group outlives the service, too, where
//! systemd keeps it (sd_notify(3), FDSTORE): else the kernel lets everything through from the service's end to its
//! next start.
//!
//! A place of the policy is mounted `noexec`; the supervisor takes that away when the place is guarded, not before.

use super::ancestry::ancestry;
use super::post::Post;
use super::rules::{self, Rule, rule_of};
use super::systemd::{STORED, notify, stored};
use super::watch::{Action, Event, Watch};
use super::{GUARD_FILES, Order, REPORT, Said, answer, ledger, receive, send, wait};
use crate::error::{AgentError, Result};
use crate::journal::monotonic_ms;
use crate::sys::{self, Mark};
use kiln_protocol::{ExecChoice, ExecVerdict, ExecViolation};
use kiln_release::ExecMode;
use nix::mount::{MsFlags, mount};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Between two lines on the console, milliseconds: who tries much shall not fill it.
const SAY_MS: u64 = 200;
/// Of the supervisor's thread.
const STACK: usize = 256 << 10;

/// The service's list, if its release has one. Where it cannot be guarded the agent goes on, the places stay noexec,
/// and the server is told.
pub fn serve(policy: &Path, choice: ExecChoice, started_ms: u64) -> Option<Post> {
    let program = std::env::current_exe().map_err(AgentError::file("/proc/self/exe"));
    let post = match program.and_then(|program| start(policy, &program, choice, started_ms)) {
        Ok(post) => post,
        Err(error) => {
            let post = Post::new();
            post.alarm(&format!("nothing is guarded, and nothing is executed there: {error} ({})", error.kind()));
            Some(post)
        }
    };
    if post.is_some()
        && let Err(errno) = notify("READY=1", None)
    {
        eprintln!("kiln-agent: systemd cannot be told that the service is ready: {errno}");
    }
    post
}

/// Guards what the policy names, if there is one, and comes back when it is guarded. Times of what is told are counted
/// from `started_ms`.
pub fn start(policy: &Path, program: &Path, choice: ExecChoice, started_ms: u64) -> Result<Option<Post>> {
    let Some(read) = rules::read(policy, choice)? else { return Ok(None) };
    let kept = stored();
    let is_kept = kept.is_some();
    let group = match kept {
        Some(group) => group,
        None => sys::fanotify_group().map_err(AgentError::system(
            "fanotify, which needs CAP_SYS_ADMIN and a kernel with CONFIG_FANOTIFY_ACCESS_PERMISSIONS",
        ))?,
    };
    let post = Post::new();
    if !is_kept && let Err(errno) = notify(&format!("FDSTORE=1\nFDNAME={STORED}\nFDPOLL=0"), Some(&group)) {
        post.alarm(&format!("systemd does not keep the fanotify group, so a restart lets everything start: {errno}"));
    }
    if choice == ExecChoice::Report
        && let Some(rule) = read.rules.iter().find(|rule| rule.mode == ExecMode::Enforce)
    {
        post.alarm(&format!("its role says `exec = \"report\"`, which the release does not permit for {}", rule.path));
    }
    let (mut rules, mut places) = (Vec::new(), Vec::new());
    for rule in &read.rules {
        let marked = rules::device(rule).and_then(|device| {
            let system = |what: &str| AgentError::system::<std::io::Error>(format!("{what} {}", rule.path));
            if rules.iter().any(|other: &Rule| other.device == device) {
                let reason = "another rule is for the same file system: which one should hold?".into();
                return Err(AgentError::Format { path: rule.path.clone().into(), reason });
            }
            let place = File::open(&rule.path).map_err(system("opening"))?;
            sys::fanotify_mark(group.as_fd(), Mark::FileSystem, place.as_fd()).map_err(system("marking"))?;
            Ok(device)
        });
        match marked {
            Ok(device) => {
                rules.push(Rule::new(&kiln_release::ExecRule { allow: Vec::new(), ..rule.clone() }, device));
                places.push(PathBuf::from(&rule.path));
            }
            // It stays noexec.
            Err(error) => post.alarm(&format!("{} is not guarded, and nothing is executed there: {error}", rule.path)),
        }
    }
    if rules.is_empty() {
        return Ok(Some(post));
    }
    let mut supervisor = Supervisor {
        group,
        rules,
        places,
        policy: policy.into(),
        program: program.into(),
        choice,
        started_ms,
        post: post.clone(),
        watch: Watch::new(),
        guard: None,
        was_up: false,
        said_at: 0,
    };
    if is_kept {
        // Of a guard that ended with the service.
        supervisor.orphans();
    }
    let (ready, is_ready) = std::sync::mpsc::channel();
    let thread = std::thread::Builder::new().name("exec-guard".into()).stack_size(STACK);
    thread.spawn(move || supervisor.run(&ready)).map_err(AgentError::system("starting the exec guard's supervisor"))?;
    // Without a guard the agent goes on; the places stay noexec until there is one.
    let _ = is_ready.recv_timeout(std::time::Duration::from_secs(5));
    Ok(Some(post))
}

struct Supervisor {
    group: OwnedFd,
    /// Without hashes: for what nobody judges.
    rules: Vec<Rule>,
    /// Still noexec.
    places: Vec<PathBuf>,
    policy: PathBuf,
    program: PathBuf,
    choice: ExecChoice,
    started_ms: u64,
    post: Post,
    watch: Watch,
    guard: Option<(Child, OwnedFd)>,
    was_up: bool,
    /// The last line to the console.
    said_at: u64,
}

impl Supervisor {
    fn run(mut self, ready: &std::sync::mpsc::Sender<()>) {
        loop {
            let now = monotonic_ms();
            let socket = self.guard.as_ref().map(|(_, socket)| socket.as_fd());
            let group = self.watch.listens(now).then(|| self.group.as_fd());
            let [said, asked] = wait([socket, group], self.watch.wait(now));
            let mut events = Vec::new();
            while said && let Some((_, socket)) = &self.guard {
                match receive(socket.as_fd()) {
                    Ok(Some(Said::Ready)) => {
                        self.open_places();
                        let _ = ready.send(());
                        events.push(Event::Ready);
                    }
                    Ok(Some(Said::Pong(number))) => events.push(Event::Pong(number)),
                    Ok(Some(Said::Judged { id, pid, path, sha256, verdict })) => {
                        self.judged(pid, path, sha256.and_then(|hash| hash.parse().ok()), verdict);
                        if id != 0
                            && let Some((_, socket)) = &self.guard
                        {
                            // Not heard, it answers when its time is up.
                            let _ = send(socket.as_fd(), &Order::Noted(id));
                        }
                    }
                    Ok(Some(Said::Lost(lost))) => {
                        self.post.change(|state| lost.count(state));
                        self.post.alarm(&lost.describe());
                    }
                    Ok(None) => break,
                    Err(_) => {
                        events.push(Event::Died(self.end()));
                        break;
                    }
                }
            }
            if asked {
                events.push(Event::Asked);
            }
            if events.is_empty() {
                events.push(Event::Tick);
            }
            for event in events {
                self.step(event);
            }
        }
    }

    fn step(&mut self, event: Event) {
        let mut events = vec![event];
        while let Some(event) = events.pop() {
            let (watch, actions) = std::mem::replace(&mut self.watch, Watch::new()).event(event, monotonic_ms());
            self.watch = watch;
            for action in actions {
                match action {
                    Action::Spawn => {
                        if let Err(error) = self.spawn() {
                            events.push(Event::Died(format!("it cannot be started: {error}")));
                        }
                    }
                    Action::Kill => drop(self.end()),
                    Action::Ping(number) => {
                        if let Some((_, socket)) = &self.guard {
                            // A full or closed socket shows in what does not come back.
                            let _ = send(socket.as_fd(), &Order::Ping(number));
                        }
                    }
                    Action::Orphans => self.orphans(),
                    Action::Drain => self.drain(),
                    Action::Alarm(words) => self.post.alarm(&words),
                }
            }
        }
        let up = self.watch.is_up();
        if up != self.was_up {
            self.was_up = up;
            self.post.change(|state| state.running = up);
        }
    }

    fn spawn(&mut self) -> std::io::Result<()> {
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        let mut command = Command::new(&self.program);
        command.arg("exec-guard").arg(&self.policy);
        if self.choice == ExecChoice::Report {
            command.arg(REPORT);
        }
        command.stdin(Stdio::from(self.group.try_clone()?)).stdout(Stdio::from(theirs));
        let child = command.spawn()?;
        self.post.guarded_by(child.id());
        self.guard = Some((child, ours));
        if self.places.is_empty() {
            self.post.change(|state| state.restarts += 1);
        }
        Ok(())
    }

    /// Ends the guard, if it has not ended by itself. How it ended.
    fn end(&mut self) -> String {
        let Some((mut child, _)) = self.guard.take() else { return "it was gone already".into() };
        self.post.guarded_by(0);
        let _ = child.kill();
        match child.wait() {
            Ok(status) => format!("it ended ({status})"),
            Err(error) => format!("it ended, and nobody knows how: {error}"),
        }
    }

    /// Takes `noexec` away from what is guarded now.
    fn open_places(&mut self) {
        for place in std::mem::take(&mut self.places) {
            let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
            if let Err(errno) = mount(None::<&str>, &place, None::<&str>, flags, None::<&str>) {
                self.post.alarm(&format!("{} stays noexec: {errno}", place.display()));
            }
        }
    }

    /// Answers what an ended guard had read. Which file system it was on is not known any more: the strictest rule
    /// holds.
    fn orphans(&mut self) {
        let allow = rule_of(&self.rules, u64::MAX).is_some_and(|rule| rule.late().allow);
        let count = (0..GUARD_FILES).filter(|number| answer(self.group.as_fd(), *number, allow)).count() as u64;
        if count > 0 {
            let done = if allow { "started unjudged" } else { "were denied" };
            self.post.change(|state| state.late += count);
            self.post.alarm(&format!("{count} programs that the guard was asked about {done} when it ended"));
        }
    }

    /// Answers what is asked while there is no guard. Never beside one: the kernel tells events by numbers that each
    /// process gives anew.
    fn drain(&mut self) {
        while let Ok(events) = sys::fanotify_read(self.group.as_fd())
            && !events.is_empty()
        {
            for event in events {
                let Some(file) = event.file.filter(|_| event.mask & sys::FAN_OPEN_EXEC_PERM != 0) else { continue };
                let device = file.metadata().map_or(u64::MAX, |found| found.dev());
                let verdict = rule_of(&self.rules, device).map(Rule::late);
                if let Some(told) = verdict.and_then(|verdict| verdict.tell) {
                    let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
                    let path = link.map_or_else(|_| "?".into(), |path| path.to_string_lossy().into_owned());
                    self.judged(event.pid, path, None, told);
                }
                answer(self.group.as_fd(), file.as_raw_fd(), verdict.is_some_and(|verdict| verdict.allow));
            }
        }
    }

    fn judged(&mut self, pid: i32, path: String, sha256: Option<kiln_protocol::Sha256Hex>, verdict: ExecVerdict) {
        let at_ms = monotonic_ms().saturating_sub(self.started_ms);
        let mut violation = ExecViolation { path, sha256, verdict, ancestry: Vec::new(), at_ms, count: 1 };
        if !ledger::knows(&self.post.lock(), &violation) {
            violation.ancestry = ancestry(Path::new("/proc"), pid);
            if at_ms >= self.said_at + SAY_MS {
                eprintln!("kiln-agent: allow-list: {}", violation.describe());
                self.said_at = at_ms;
            }
        }
        self.post.change(|state| ledger::note(state, violation));
    }
}
