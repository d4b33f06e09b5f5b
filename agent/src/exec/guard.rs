//! The guard's process: reads events, answers from the cache or has the file hashed, and keeps its 100 ms.

use super::cache::{Cache, Look};
use super::due::{due, is_up, sleep_ms};
use super::hasher::{self, Job, RECORD, Told};
use super::lost::{self, Lost};
use super::rules::{self, Hash, Rule, Verdict, rule_of};
use super::{MOST_WAITING, Order, Said, answer, receive, send, wait};
use crate::error::{AgentError, Result};
use crate::sys::{self, FanEvent, Mark};
use kiln_protocol::{EXEC_PATH_LIMIT, ExecChoice, ExecVerdict};
use kiln_release::hex;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{PipeReader, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::mpsc::{Sender, channel};
use std::time::{Instant, SystemTime};

/// Longer files are not hashed: they would keep their writers waiting for the lease. They are answered by the rule's
/// `fail`.
const MOST_HASHED: u64 = 256 << 20;
/// Of the hasher's thread. All of it is locked.
const STACK: usize = 64 << 10;

/// Runs until the supervisor ends it: standard input is the fanotify group, standard output the supervisor's socket.
pub fn run(policy: &Path, choice: ExecChoice) -> Result<()> {
    let missing = || AgentError::Usage(format!("{}: no such file: the guard needs a policy", policy.display()));
    let policy = rules::read(policy, choice)?.ok_or_else(missing)?;
    let mut rules = Vec::new();
    for rule in &policy.rules {
        // Of a place that is not there the supervisor said so, and nothing can be executed there.
        if let Ok(device) = rules::device(rule) {
            rules.push(Rule::new(rule, device));
        }
    }
    drop(policy);
    let system = AgentError::system::<std::io::Error>;
    let group = std::io::stdin().as_fd().try_clone_to_owned().map_err(system("the fanotify group"))?;
    let control = std::io::stdout().as_fd().try_clone_to_owned().map_err(system("the supervisor's socket"))?;
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "-1000") {
        eprintln!("kiln-agent exec-guard: the kernel may end it when memory is short: {error}");
    }
    let (results, out) = std::io::pipe().map_err(system("a pipe"))?;
    sys::hold_in_memory().map_err(system("locking the guard in memory"))?;
    sys::open_nothing().map_err(system("sealing the guard"))?;
    let (jobs, given) = channel();
    let hasher = std::thread::Builder::new().stack_size(STACK).spawn(move || hasher::run(&given, out));
    hasher.map_err(system("starting the hasher"))?;
    let (cache, waiting, lost) = (Cache::default(), BTreeMap::new(), Lost::default());
    let guard = Guard { group, control, rules, results, jobs, cache, waiting, last: 0, lost };
    guard.serve().map_err(system("serving"))
}

struct Guard {
    group: OwnedFd,
    control: OwnedFd,
    rules: Vec<Rule>,
    results: PipeReader,
    jobs: Sender<Job>,
    cache: Cache,
    waiting: BTreeMap<u32, Waiting>,
    last: u32,
    lost: Lost,
}

/// A program that is hashed or told of.
struct Waiting {
    /// Holds the lease, if there is one, until it is closed.
    file: File,
    pid: i32,
    look: Look,
    due: Instant,
    is_written: bool,
    /// What was judged and told of, until it is noted.
    verdict: Option<Verdict>,
    answered: bool,
}

impl Waiting {
    /// Waits for the hash of this very file.
    fn is_same(&self, look: &Look) -> bool {
        self.verdict.is_none() && self.look == *look
    }
}

impl Guard {
    fn serve(mut self) -> std::io::Result<()> {
        send(self.control.as_fd(), &Said::Ready)?;
        loop {
            let open = self.waiting.values().filter(|waiting| !waiting.answered);
            let ms = sleep_ms(open.map(|waiting| waiting.due), Instant::now());
            let of = [Some(self.control.as_fd()), Some(self.results.as_fd()), Some(self.group.as_fd())];
            let [control, results, group] = wait(of, ms);
            if control {
                match receive(self.control.as_fd())? {
                    Some(Order::Ping(number)) => self.say(&Said::Pong(number)),
                    Some(Order::Noted(id)) => self.noted(id),
                    None => {}
                }
            }
            if results {
                let mut record = [0; RECORD];
                self.results.read_exact(&mut record)?;
                self.hashed(&record);
            }
            if group {
                for event in sys::fanotify_read(self.group.as_fd())? {
                    self.event(event);
                }
            }
            self.answer_late();
        }
    }

    fn say(&mut self, said: &Said) {
        lost::say(self.control.as_fd(), &mut self.lost, said);
    }

    fn event(&mut self, event: FanEvent) {
        let Some(file) = event.file else {
            self.cache.forget_all();
            return;
        };
        let look = Look::at(&file);
        if event.mask & sys::FAN_OPEN_EXEC_PERM == 0 {
            match look {
                Ok(look) => self.cache.forget(look.place),
                Err(_) => self.cache.forget_all(),
            }
            return;
        }
        let due = due(Instant::now());
        let Ok(look) = look else { return self.cannot_judge(&file, event.pid, 0) };
        let known = self.cache.get(&look).filter(|_| !is_written(&file));
        let waiting = Waiting { file, pid: event.pid, look, due, is_written: false, verdict: None, answered: false };
        self.last = self.last.wrapping_add(1).max(1);
        let id = self.last;
        if let Some(hash) = known {
            return self.judge(id, waiting, &hash);
        }
        if self.waiting.len() >= MOST_WAITING || look.size > MOST_HASHED {
            return self.cannot_judge(&waiting.file, event.pid, look.place.0);
        }
        // Being read already: one reading is enough.
        let is_read = self.waiting.values().any(|other| other.is_same(&look));
        let is_given = || waiting.file.try_clone().is_ok_and(|file| self.jobs.send(Job { id, file }).is_ok());
        if is_read || is_given() {
            self.waiting.insert(id, waiting);
        } else {
            self.cannot_judge(&waiting.file, event.pid, look.place.0);
        }
    }

    /// Its hash is known: answers, or tells first.
    fn judge(&mut self, id: u32, mut waiting: Waiting, hash: &Hash) {
        let Some(rule) = rule_of(&self.rules, waiting.look.place.0) else {
            return self.answer(&waiting.file, false);
        };
        let verdict = rule.judge(hash);
        let Some(told) = verdict.tell else { return self.answer(&waiting.file, verdict.allow) };
        self.tell(id, &waiting.file, waiting.pid, Some(hash), told);
        if self.waiting.len() >= MOST_WAITING {
            return self.answer(&waiting.file, verdict.allow);
        }
        waiting.verdict = Some(verdict);
        self.waiting.insert(id, waiting);
    }

    fn cannot_judge(&mut self, file: &File, pid: i32, device: u64) {
        let verdict = rule_of(&self.rules, device).map(Rule::late);
        if let Some(told) = verdict.and_then(|verdict| verdict.tell) {
            self.tell(0, file, pid, None, told);
        }
        self.answer(file, verdict.is_some_and(|verdict| verdict.allow));
    }

    fn hashed(&mut self, record: &[u8; RECORD]) {
        let id = u32::from_ne_bytes([record[0], record[1], record[2], record[3]]);
        let hash: Hash = record[5..].try_into().expect("the rest of a record is a hash");
        match Told::of(record[4]) {
            Some(Told::Written) => {
                if let Some(look) = self.waiting.get(&id).map(|waiting| waiting.look) {
                    let same = self.waiting.values_mut().filter(|other| other.is_same(&look));
                    same.for_each(|other| other.is_written = true);
                }
            }
            Some(Told::Hashed) => {
                let Some(waiting) = self.waiting.remove(&id) else { return };
                self.keep(&waiting, hash);
                for (id, other) in self.take_same(&waiting.look) {
                    self.judge(id, other, &hash);
                }
                if !waiting.answered {
                    self.judge(id, waiting, &hash);
                }
            }
            Some(Told::Unreadable) | None => {
                let Some(look) = self.waiting.get(&id).map(|waiting| waiting.look) else { return };
                for (_, other) in self.take_same(&look) {
                    self.cannot_judge(&other.file, other.pid, other.look.place.0);
                }
            }
        }
    }

    /// Those that wait for the hash of this file, without the ones that are answered already.
    fn take_same(&mut self, look: &Look) -> Vec<(u32, Waiting)> {
        let same = self.waiting.iter().filter(|(_, other)| other.is_same(look));
        let ids: Vec<u32> = same.map(|(id, _)| *id).collect();
        let taken = ids.into_iter().filter_map(|id| Some((id, self.waiting.remove(&id)?)));
        taken.filter(|(_, other)| !other.answered).collect()
    }

    /// Into the cache, while the lease is still held.
    fn keep(&mut self, waiting: &Waiting, hash: Hash) {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let same = Look::at(&waiting.file).is_ok_and(|look| look == waiting.look);
        if same
            && sys::fanotify_mark(self.group.as_fd(), Mark::File, waiting.file.as_fd()).is_ok()
            && self.cache.put(waiting.look, hash, now)
            && sys::fanotify_mark(self.group.as_fd(), Mark::ForgetFiles, waiting.file.as_fd()).is_err()
        {
            // Marks that stay cost an event each time their file is written, nothing else.
            eprintln!("kiln-agent exec-guard: the marks of earlier files cannot be taken away");
        }
    }

    /// The supervisor knows who wanted it.
    fn noted(&mut self, id: u32) {
        if self.waiting.get(&id).is_some_and(|waiting| waiting.verdict.is_some())
            && let Some(waiting) = self.waiting.remove(&id)
        {
            self.answer(&waiting.file, waiting.verdict.is_some_and(|verdict| verdict.allow));
        }
    }

    /// Whoever has waited 100 ms is answered, noted or not, hashed or not.
    fn answer_late(&mut self) {
        let now = Instant::now();
        let late = |waiting: &Waiting| !waiting.answered && is_up(waiting.due, now);
        let ids: Vec<u32> = self.waiting.iter().filter(|(_, w)| late(w)).map(|(id, _)| *id).collect();
        for id in ids {
            let Some(mut waiting) = self.waiting.remove(&id) else { continue };
            if let Some(verdict) = waiting.verdict {
                self.answer(&waiting.file, verdict.allow);
                continue;
            }
            let rule = rule_of(&self.rules, waiting.look.place.0);
            let verdict = rule.map(if waiting.is_written { Rule::being_written } else { Rule::late });
            if let Some(told) = verdict.and_then(|verdict| verdict.tell) {
                self.tell(0, &waiting.file, waiting.pid, None, told);
            }
            self.answer(&waiting.file, verdict.is_some_and(|verdict| verdict.allow));
            // Its hash is still to come, for the next time.
            waiting.answered = true;
            self.waiting.insert(id, waiting);
        }
    }

    fn tell(&mut self, id: u32, file: &File, pid: i32, hash: Option<&Hash>, verdict: ExecVerdict) {
        let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let path = link.map_or_else(|_| "?".into(), |path| path.to_string_lossy().into_owned());
        let from = path.char_indices().map(|(at, _)| at).find(|at| path.len() - at <= EXEC_PATH_LIMIT);
        let path = path[from.unwrap_or(0)..].to_owned();
        self.say(&Said::Judged { id, pid, path, sha256: hash.map(|hash| hex::encode(hash)), verdict });
    }

    fn answer(&self, file: &File, allow: bool) {
        answer(self.group.as_fd(), file.as_raw_fd(), allow);
    }
}

/// Somebody has it open for writing, so what was known of it is worth nothing. Else nobody will before it is closed.
fn is_written(file: &File) -> bool {
    sys::lease(file, true).is_err_and(|error| error.raw_os_error() == Some(nix::errno::Errno::EAGAIN as i32))
}
