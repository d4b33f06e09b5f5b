//! What a release declares of its own running: health checks, hooks, and what a machine is compared with. Commands named
//! here are programs of the verified root; a role chooses numbers for what is declared and can name nothing.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};

/// Most health checks of a release.
pub const MAX_CHECKS: usize = 32;
/// Most hooks of an event.
pub const MAX_HOOKS: usize = 16;
/// Longest deadline of a hook, and of all of an event together, seconds.
pub const MAX_DRAIN: u64 = 7200;
/// Where [`Expected`] lies in the root.
pub const EXPECTED_PATH: &str = "/usr/lib/kiln/expected.json";

/// Kinds of health checks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HealthKind {
    /// `systemctl is-system-running` says `running`.
    Systemd,
    /// `systemctl is-active UNIT` says `active`.
    Unit,
    /// `GET` of an `http://` URL of this machine gives a status of 200 to 299.
    Http,
    /// A TCP connection to an address of this machine is accepted.
    Tcp,
    /// A program of the verified root ends with status 0.
    Command,
    /// So much memory is available.
    Memory,
    /// So much of a file system is free.
    Disk,
    /// The kernel calls its clock synchronised, and its error is small enough.
    Time,
}

impl HealthKind {
    /// Every kind, in order.
    pub const ALL: [Self; 8] =
        [Self::Systemd, Self::Unit, Self::Http, Self::Tcp, Self::Command, Self::Memory, Self::Disk, Self::Time];

    /// The word of it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Systemd => "systemd",
            Self::Unit => "unit",
            Self::Http => "http",
            Self::Tcp => "tcp",
            Self::Command => "command",
            Self::Memory => "memory",
            Self::Disk => "disk",
            Self::Time => "time",
        }
    }
}

/// A number that a check compares with: what a role may set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Threshold {
    /// Of the whole, 1 to 99: `10%`.
    Percent(u8),
    /// `64M`.
    Bytes(u64),
    /// `500ms`, `2s`.
    Millis(u64),
}

impl Threshold {
    /// Reads `10%`, `64M`, `500ms`.
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, unit) = text.split_at(digits);
        let number: u64 = number.parse().ok()?;
        match unit {
            "%" => u8::try_from(number).ok().filter(|n| (1..=99).contains(n)).map(Self::Percent),
            "ms" => Some(Self::Millis(number)),
            "s" => number.checked_mul(1000).map(Self::Millis),
            "K" => number.checked_mul(1 << 10).map(Self::Bytes),
            "M" => number.checked_mul(1 << 20).map(Self::Bytes),
            "G" => number.checked_mul(1 << 30).map(Self::Bytes),
            _ => None,
        }
        .filter(|t| !matches!(t, Self::Bytes(0) | Self::Millis(0)))
    }

    /// Whether a check of this kind can be given it.
    pub fn fits(self, kind: HealthKind) -> bool {
        match (kind, self) {
            (HealthKind::Memory | HealthKind::Disk, Self::Percent(_) | Self::Bytes(_))
            | (HealthKind::Time, Self::Millis(_)) => true,
            (HealthKind::Memory | HealthKind::Disk, Self::Millis(_))
            | (HealthKind::Time, Self::Percent(_) | Self::Bytes(_))
            | (
                HealthKind::Systemd | HealthKind::Unit | HealthKind::Http | HealthKind::Tcp | HealthKind::Command,
                Self::Percent(_) | Self::Bytes(_) | Self::Millis(_),
            ) => false,
        }
    }
}

impl fmt::Display for Threshold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Percent(n) => write!(f, "{n}%"),
            Self::Millis(n) => write!(f, "{n}ms"),
            Self::Bytes(n) if n % (1 << 30) == 0 => write!(f, "{}G", n >> 30),
            Self::Bytes(n) if n % (1 << 20) == 0 => write!(f, "{}M", n >> 20),
            Self::Bytes(n) => write!(f, "{}K", n >> 10),
        }
    }
}

impl TryFrom<String> for Threshold {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        let cut: String = text.chars().take(40).collect();
        Self::parse(&text).ok_or_else(|| format!("{cut:?} is no threshold: expected \"10%\", \"64M\" or \"500ms\""))
    }
}

impl From<Threshold> for String {
    fn from(threshold: Threshold) -> Self {
        threshold.to_string()
    }
}

/// One health check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HealthCheck {
    /// What is checked.
    pub kind: HealthKind,
    /// Seconds it must hold without a break.
    pub soak: u64,
    /// What thresholds and events call it; empty: [`Self::title`] makes one of kind and target.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// Unit, URL, address, program or path.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub target: String,
    /// A program's arguments.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub arguments: Vec<String>,
    /// Memory, disk: the least that must be free. Time: the most that the clock may be wrong. A role may set another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<Threshold>,
    /// Seconds after which a check without an answer has failed.
    #[serde(default = "usual_deadline", skip_serializing_if = "is_usual_deadline")]
    pub deadline: u64,
    /// Failures in a row that make a healthy machine unhealthy.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub fail_after: u32,
    /// Passes in a row before the check counts as good again.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub pass_after: u32,
}

fn usual_deadline() -> u64 {
    10
}

fn one() -> u32 {
    1
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde asks for this form
fn is_usual_deadline(deadline: &u64) -> bool {
    *deadline == usual_deadline()
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde asks for this form
fn is_one(count: &u32) -> bool {
    *count == 1
}

impl HealthCheck {
    /// Of this kind, with nothing but its soak said.
    pub fn of(kind: HealthKind, soak: u64) -> Self {
        Self {
            kind,
            soak,
            name: String::new(),
            target: String::new(),
            arguments: Vec::new(),
            limit: None,
            deadline: usual_deadline(),
            fail_after: 1,
            pass_after: 1,
        }
    }

    /// Its name: what is declared, else `disk./var`.
    pub fn title(&self) -> String {
        let kind = self.kind.as_str();
        match (self.name.is_empty(), self.target.is_empty()) {
            (false, _) => self.name.clone(),
            (true, true) => kind.to_owned(),
            (true, false) => format!("{kind}.{}", self.target),
        }
    }

    /// What is wrong with it, if anything.
    pub fn check(&self) -> Result<(), &'static str> {
        let ensure = |holds: bool, reason| if holds { Ok(()) } else { Err(reason) };
        ensure(self.soak <= 3600, "soak is in seconds, at most 3600")?;
        ensure((1..=60).contains(&self.deadline), "deadline is in seconds, 1 to 60")?;
        ensure((1..=100).contains(&self.fail_after), "fail_after is 1 to 100")?;
        ensure((1..=100).contains(&self.pass_after), "pass_after is 1 to 100")?;
        ensure(is_title(&self.title()), "a check's name is 1 to 100 printable characters without space")?;
        let bare = self.target.is_empty();
        match self.kind {
            HealthKind::Systemd => ensure(bare, "systemd takes no target")?,
            HealthKind::Memory => ensure(bare, "memory takes no target")?,
            HealthKind::Time => ensure(bare, "time takes no target")?,
            HealthKind::Unit => ensure(is_unit(&self.target), "unit: the file name of a systemd unit")?,
            HealthKind::Http => ensure(http_target(&self.target).is_some(), HTTP)?,
            HealthKind::Tcp => ensure(
                address(&self.target, None).is_some(),
                "address: IP:PORT of this machine, as 127.0.0.1:5432; names are not looked up",
            )?,
            HealthKind::Command => ensure(is_path(&self.target), PROGRAM)?,
            HealthKind::Disk => ensure(is_path(&self.target), "path: an absolute path without . or ..")?,
        }
        let is_command = self.kind == HealthKind::Command;
        ensure(is_command || self.arguments.is_empty(), "only a command takes arguments")?;
        ensure(are_arguments(&self.arguments), ARGUMENTS)?;
        match (self.kind, self.limit) {
            (_, Some(limit)) => ensure(
                limit.fits(self.kind),
                "memory and disk compare with a share or a size (\"10%\", \"64M\"), time with a time (\"500ms\"); \
                 other kinds with nothing",
            ),
            (HealthKind::Memory | HealthKind::Disk, None) => Err("say how much must be free: least = \"10%\""),
            (
                HealthKind::Systemd
                | HealthKind::Unit
                | HealthKind::Http
                | HealthKind::Tcp
                | HealthKind::Command
                | HealthKind::Time,
                None,
            ) => Ok(()),
        }
    }
}

const HTTP: &str = "url: http://IP[:PORT]/PATH of this machine, as http://127.0.0.1:8080/healthz; names but localhost are \
                    not looked up";
const PROGRAM: &str = "program: the absolute path of a program in the root, without . or ..";
const ARGUMENTS: &str = "at most 16 arguments of at most 256 printable characters";

/// When hooks run.
pub const HOOK_EVENTS: [&str; 2] = ["drain", "undrain"];

/// How a hook is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HookKind {
    /// A program of the verified root; it is through when it ends with status 0.
    Command,
    /// `POST` to an `http://` URL of this machine. 202: not yet, ask again; another of 200 to 299: through.
    Http,
}

/// What a hook decides that is not through at its deadline, or failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnTimeout {
    /// The machine leaves without it.
    #[default]
    Go,
    /// The machine stays, and tries again later.
    Stay,
}

/// One hook.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hook {
    /// What people see.
    pub name: String,
    /// How it is called.
    pub kind: HookKind,
    /// The program or the URL.
    pub target: String,
    /// A program's arguments.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub arguments: Vec<String>,
    /// Seconds it has.
    pub deadline: u64,
    /// What then.
    #[serde(default)]
    pub on_timeout: OnTimeout,
}

impl Hook {
    /// What is wrong with it, if anything.
    pub fn check(&self) -> Result<(), &'static str> {
        let ensure = |holds: bool, reason| if holds { Ok(()) } else { Err(reason) };
        ensure(is_title(&self.name), "a hook's name is 1 to 100 printable characters without space")?;
        ensure((1..=MAX_DRAIN).contains(&self.deadline), "deadline is in seconds, 1 to 7200")?;
        match self.kind {
            HookKind::Command => ensure(is_path(&self.target), PROGRAM)?,
            HookKind::Http => ensure(http_target(&self.target).is_some() && self.arguments.is_empty(), HTTP)?,
        }
        ensure(are_arguments(&self.arguments), ARGUMENTS)
    }
}

/// Limits of one unit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnitLimit {
    /// `web.service`.
    pub unit: String,
    /// Most memory, bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<u64>,
    /// Most of one processor's time, percent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<u32>,
}

/// What a machine is compared with: [`EXPECTED_PATH`] in the root, covered by the root hash. Written by the builder.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Expected {
    /// `uname -r`.
    pub kernel: String,
    /// Kernel modules in the initramfs and in the root.
    pub modules: Vec<String>,
    /// Services in the root that are not masked.
    pub services: Vec<String>,
    /// Users, `root:0`.
    pub users: Vec<String>,
    /// Ports that may be listened on, `tcp/22`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub listeners: Vec<String>,
    /// Further places that may be mounted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mounts: Vec<String>,
    /// Limited units.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub limits: Vec<UnitLimit>,
}

/// Address and path of an `http://` URL that names this machine by address.
pub fn http_target(url: &str) -> Option<(SocketAddr, &str)> {
    let rest = url.strip_prefix("http://").filter(|_| url.len() <= 256)?;
    let (host, path) = rest.find('/').map_or((rest, "/"), |at| rest.split_at(at));
    let plain = path.bytes().all(|b| b.is_ascii_graphic());
    address(host, Some(80)).filter(|_| plain).map(|address| (address, path))
}

/// `IP:PORT`, `localhost:PORT`.
pub fn address(text: &str, usual_port: Option<u16>) -> Option<SocketAddr> {
    let here = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    if let Some(port) = text.strip_prefix("localhost:") {
        return port.parse().ok().map(here);
    }
    let whole = text.parse().ok();
    let bare = || usual_port.and_then(|port| Some(SocketAddr::from((text.parse::<std::net::IpAddr>().ok()?, port))));
    whole.or_else(bare).or_else(|| usual_port.filter(|_| text == "localhost").map(here))
}

/// The users of a passwd(5) as `root:0`, sorted.
pub fn users_of(passwd: &str) -> Vec<String> {
    let user = |line: &str| {
        let mut fields = line.split(':');
        Some(format!("{}:{}", fields.next()?, fields.nth(1)?))
    };
    let mut users: Vec<String> = passwd.lines().filter_map(user).collect();
    users.sort();
    users
}

fn is_title(text: &str) -> bool {
    (1..=100).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic())
}

fn is_path(text: &str) -> bool {
    let plain = |part: &str| !matches!(part, "" | "." | "..") && !part.contains(char::is_control);
    text.len() <= 256 && text.strip_prefix('/').is_some_and(|rest| rest.split('/').all(plain))
}

/// systemd.unit(5).
pub fn is_unit(text: &str) -> bool {
    let kinds = [".service", ".socket", ".timer", ".mount", ".automount", ".path", ".target", ".slice"];
    text.len() <= 100
        && kinds.iter().any(|kind| text.len() > kind.len() && text.ends_with(kind))
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "_-.@:\\".contains(c))
}

fn are_arguments(list: &[String]) -> bool {
    list.len() <= 16 && list.iter().all(|a| a.len() <= 256 && !a.contains(char::is_control))
}

/// The agent's and the builder's check of all of them: names are there once, and not too many.
pub fn check_all(checks: &[HealthCheck]) -> Result<(), (String, &'static str)> {
    if checks.len() > MAX_CHECKS {
        return Err((checks.len().to_string(), "at most 32 health checks"));
    }
    for (number, check) in checks.iter().enumerate() {
        check.check().map_err(|reason| (check.title(), reason))?;
        if checks[..number].iter().any(|other| other.title() == check.title()) {
            return Err((check.title(), "two health checks have the same name: give one another `name`"));
        }
    }
    Ok(())
}

/// The hooks of one event.
pub fn check_hooks(event: &str, hooks: &[Hook]) -> Result<(), (String, &'static str)> {
    if !HOOK_EVENTS.contains(&event) {
        return Err((event.to_owned(), "hooks run on: drain, undrain"));
    }
    if hooks.len() > MAX_HOOKS {
        return Err((event.to_owned(), "at most 16 hooks of an event"));
    }
    for (number, hook) in hooks.iter().enumerate() {
        hook.check().map_err(|reason| (hook.name.clone(), reason))?;
        if hooks[..number].iter().any(|other| other.name == hook.name) {
            return Err((hook.name.clone(), "two hooks of an event have the same name"));
        }
    }
    let all = hooks.iter().fold(0_u64, |sum, hook| sum.saturating_add(hook.deadline));
    if all > MAX_DRAIN {
        Err((event.to_owned(), "the deadlines of an event's hooks are at most 7200 s together"))
    } else {
        Ok(())
    }
}
