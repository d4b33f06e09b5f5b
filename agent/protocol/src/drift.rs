//! Drift: what the kernel's own tables say of a running system, compared with what its release says. Texts in,
//! differences out; whoever calls reads the files. Sources: proc_modules(5), proc_pid_mountinfo(5), proc_net_tcp(5),
//! systemd.unit(5).

use crate::condition::{Difference, DriftKind};

/// File systems that hold no files of anybody's, where systemd and the kernel put them.
const KERNELS_OWN: [&str; 18] = [
    "autofs",
    "binfmt_misc",
    "bpf",
    "cgroup2",
    "configfs",
    "debugfs",
    "devpts",
    "devtmpfs",
    "efivarfs",
    "fusectl",
    "hugetlbfs",
    "mqueue",
    "nsfs",
    "proc",
    "pstore",
    "ramfs",
    "securityfs",
    "sysfs",
];
/// Linux hands these ports to clients that did not ask for one (ip_local_port_range): a datagram socket on one of them is
/// somebody's question, not a service.
const CLIENT_PORTS: std::ops::RangeInclusive<u16> = 32_768..=60_999;

fn difference(kind: DriftKind, what: &str, text: &str) -> Difference {
    let cut = |text: &str, most: usize| text.chars().filter(|c| !c.is_control()).take(most).collect::<String>();
    Difference { kind, what: cut(what, 200), text: cut(text, 400) }
}

/// One thing that has one value.
pub fn value(kind: DriftKind, what: &str, expected: &str, got: &str) -> Option<Difference> {
    let text = || format!("{what} is {got:?}; the release says {expected:?}");
    (expected != got).then(|| difference(kind, what, &text()))
}

/// Something that is there and is not of the release: a path, a program.
pub fn foreign(kind: DriftKind, what: &str, text: &str) -> Difference {
    difference(kind, what, text)
}

/// `/proc/modules` against the names of the release's modules.
pub fn modules(loaded: &str, expected: &[String]) -> Vec<Difference> {
    let normal = |name: &str| name.replace('-', "_");
    let names = loaded.lines().filter_map(|line| line.split_whitespace().next()).map(normal);
    let unknown = names.filter(|name| !expected.iter().any(|known| normal(known) == *name));
    let text = |name: &str| format!("kernel module {name} is loaded; the release has none of that name");
    unknown.map(|name| difference(DriftKind::Module, &name, &text(&name))).collect()
}

/// A line of mountinfo.
struct Mount<'a> {
    at: String,
    options: &'a str,
    kind: &'a str,
    source: &'a str,
    of_all: &'a str,
}

impl<'a> Mount<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let (mount, kind) = line.split_once(" - ")?;
        let mut mount = mount.split(' ').skip(4);
        let (at, options) = (mount.next()?, mount.next()?);
        let mut kind = kind.split(' ');
        let (kind, source, of_all) = (kind.next()?, kind.next()?, kind.next().unwrap_or(""));
        Some(Self { at: unescaped(at), options, kind, source, of_all })
    }

    fn has(&self, option: &str) -> bool {
        self.options.split(',').chain(self.of_all.split(',')).any(|o| o == option)
    }
}

/// `\040` is a space.
fn unescaped(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, others)) = rest.split_first() {
        let octal = (*first == b'\\').then(|| others.get(..3)).flatten();
        let byte = octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        out.push(byte.unwrap_or(*first));
        rest = if byte.is_some() { &others[3..] } else { others };
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// `/proc/self/mountinfo` against the release's writable places, those of them that have an allow-list of programs and so
/// may execute, and the mounts it declares further.
pub fn mounts(mountinfo: &str, writable: &[&str], guarded: &[String], declared: &[String]) -> Vec<Difference> {
    let mut out = Vec::new();
    let mut say = |at: &str, text: String| out.push(difference(DriftKind::Mount, at, &text));
    let all: Vec<Mount<'_>> = mountinfo.lines().filter_map(Mount::parse).collect();
    for (number, mount) in all.iter().enumerate() {
        // What is mounted later over the same place hides it.
        if all[number + 1..].iter().any(|later| later.at == mount.at) && mount.at == "/" {
            continue;
        }
        let at = mount.at.as_str();
        let below = |tops: &[&str]| {
            tops.iter().any(|top| at.strip_prefix(top).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')))
        };
        if at == "/" {
            if !mount.has("ro") {
                say(at, format!("the root is mounted to be written to ({}, {})", mount.kind, mount.options));
            }
        } else if writable.contains(&at) {
            let wanted = usize::from(guarded.iter().any(|place| place == at));
            let missing: Vec<&str> =
                ["noexec", "nosuid", "nodev"][wanted..].iter().copied().filter(|option| !mount.has(option)).collect();
            if mount.kind != "tmpfs" {
                say(at, format!("{at} is of type {}; the release says tmpfs", mount.kind));
            } else if !missing.is_empty() {
                say(at, format!("{at} is mounted without {}", missing.join(", ")));
            }
        } else if (KERNELS_OWN.contains(&mount.kind) && below(&["/proc", "/sys", "/dev", "/run"]))
            || (mount.kind == "tmpfs" && (below(&["/run"]) || at == "/dev/shm" || at == "/etc/machine-id"))
            || declared.iter().any(|place| place == at)
        {
        } else {
            let (kind, source) = (mount.kind, mount.source);
            say(at, format!("{source} ({kind}) is mounted at {at}, which the release does not declare"));
        }
    }
    for place in writable.iter().filter(|place| !all.iter().any(|mount| mount.at == **place)) {
        say(place, format!("{place} is not mounted; the release says a tmpfs"));
    }
    out
}

/// A socket that something listens on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listener {
    /// `tcp/8080`.
    pub what: String,
    /// By which its owner is found.
    pub inode: u64,
}

/// `/proc/net/tcp`, `tcp6`, `udp` or `udp6`, without what is declared. `protocol` is `tcp` or `udp`.
pub fn listeners(table: &str, protocol: &str, declared: &[String]) -> Vec<Listener> {
    let state = if protocol == "tcp" { "0A" } else { "07" };
    let mut found = Vec::new();
    for line in table.lines().skip(1) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (Some(local), Some(is)) = (words.get(1), words.get(3)) else { continue };
        let port = local.rsplit(':').next().and_then(|port| u16::from_str_radix(port, 16).ok()).unwrap_or(0);
        if *is != state || (protocol == "udp" && CLIENT_PORTS.contains(&port)) {
            continue;
        }
        let what = format!("{protocol}/{port}");
        let known = declared.contains(&what) || found.iter().any(|other: &Listener| other.what == what);
        if !known {
            let inode = words.get(9).and_then(|inode| inode.parse().ok()).unwrap_or(0);
            found.push(Listener { what, inode });
        }
    }
    found
}

/// A listener that is not declared, and who holds it, if that could be told.
pub fn listener(listener: &Listener, owner: Option<&str>) -> Difference {
    let what = &listener.what;
    let text = match owner {
        Some(owner) => format!("{owner} listens on {what}, which the release does not declare"),
        None => format!("something listens on {what}, which the release does not declare"),
    };
    difference(DriftKind::Listener, what, &text)
}

/// The system's users (`root:0`) against those that the release has.
pub fn users(got: &[String], expected: &[String]) -> Vec<Difference> {
    let say = |user: &String, text: &str| difference(DriftKind::User, user, &format!("user {user} {text}"));
    let more = got.iter().filter(|user| !expected.contains(user)).map(|user| say(user, "is not of the release"));
    let less = expected.iter().filter(|user| !got.contains(user)).map(|user| say(user, "is missing"));
    more.chain(less).collect()
}

/// Services that run, by their control groups' names, against those the release has.
pub fn services(running: &[String], expected: &[String]) -> Vec<Difference> {
    let known = |name: &String| {
        let template = name.split_once('@').and_then(|(before, after)| {
            let (_, kind) = after.rsplit_once('.')?;
            Some(format!("{before}@.{kind}"))
        });
        expected.contains(name) || template.is_some_and(|template| expected.contains(&template))
    };
    let text = |name: &str| format!("{name} runs; the release has no such unit");
    running.iter().filter(|name| !known(name)).map(|name| difference(DriftKind::Unit, name, &text(name))).collect()
}

/// What came and what went, by kind and subject; both are sorted lists.
pub fn turned<'a>(before: &'a [Difference], now: &'a [Difference]) -> (Vec<&'a Difference>, Vec<&'a Difference>) {
    let in_list = |list: &[Difference], d: &Difference| list.iter().any(|o| o.kind == d.kind && o.what == d.what);
    let came = now.iter().filter(|d| !in_list(before, d)).collect();
    (came, before.iter().filter(|d| !in_list(now, d)).collect())
}

/// What a unit with limits met, from its control group's counters (Linux Documentation/admin-guide/cgroup-v2.rst).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    killed: u64,
    periods: u64,
    throttled: u64,
    slowed: bool,
}

impl Usage {
    /// Processes that were killed at the memory limit, as counted last.
    #[must_use]
    pub fn killed(self) -> u64 {
        self.killed
    }

    /// From the texts of `memory.events` and `cpu.stat`. What is to be told: whether it needs a person, and a sentence.
    #[must_use]
    pub fn look(self, unit: &str, memory_events: &str, cpu_stat: &str) -> (Self, Vec<(bool, String)>) {
        let (killed, periods, throttled) =
            (field(memory_events, "oom_kill"), field(cpu_stat, "nr_periods"), field(cpu_stat, "nr_throttled"));
        // A unit that was started anew counts from 0.
        let more = |now: u64, before: u64| if now >= before { now - before } else { now };
        let mut told = Vec::new();
        let kills = more(killed, self.killed);
        if kills > 0 {
            told.push((true, format!("{unit}: {kills} process(es) killed at its memory limit")));
        }
        let (periods_more, throttled_more) = (more(periods, self.periods), more(throttled, self.throttled));
        let slowed = if periods_more == 0 { self.slowed } else { throttled_more.saturating_mul(2) >= periods_more };
        match (self.slowed, slowed) {
            (false, true) => told.push((
                true,
                format!("{unit}: held back by its CPU limit in {throttled_more} of {periods_more} periods"),
            )),
            (true, false) => told.push((false, format!("{unit}: no longer held back by its CPU limit"))),
            (false, false) | (true, true) => {}
        }
        (Self { killed, periods, throttled, slowed }, told)
    }
}

fn field(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.and_then(|number| number.trim().parse().ok()).unwrap_or(0)
}
