//! What a build needs of the machine it runs on: programs, a Debian mirror, the right to use many user ids. Looked at
//! first, so that a build stops before it has begun, with a sentence that says what to do.

use crate::error::BuildError;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Keys that sign Debian's archives.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// How much of a failed program's standard error is shown.
const LAST_LINES: usize = 15;

/// ENOSPC in the C locale.
const NO_SPACE: &str = "No space left on device";

/// Programs a build runs, and the Debian packages that hold them.
const PROGRAMS: [(&str, &str); 7] = [
    ("apt-get", "apt"),
    ("depmod", "kmod"),
    ("dpkg-deb", "dpkg"),
    ("mkfs.erofs", "erofs-utils"),
    ("mmdebstrap", "mmdebstrap"),
    ("tar", "tar"),
    ("xz", "xz-utils"),
];

/// How this user may build a root with many owners in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rights {
    /// As root.
    Root,
    /// In a user namespace with a range of subordinate ids.
    Namespace,
}

fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // An ordinary user's PATH often lacks the sbin folders.
    let more = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(more).map(|folder| folder.join(name)).find(|file| file.is_file())
}

/// Checks programs, keyring and rights.
pub(crate) fn check() -> Result<Rights, BuildError> {
    let rights = if effective_uid()? == 0 { Rights::Root } else { Rights::Namespace };
    let more = (rights == Rights::Namespace).then_some(("newuidmap", "uidmap"));
    let missing: Vec<_> = PROGRAMS.into_iter().chain(more).filter(|(name, _)| program(name).is_none()).collect();
    if !missing.is_empty() {
        let (programs, packages) = missing.into_iter().map(|(name, package)| (name.into(), package.into())).unzip();
        return Err(BuildError::MissingPrograms { programs, packages });
    }
    if !Path::new(KEYRING).exists() {
        return Err(BuildError::NoKeyring { path: KEYRING.into() });
    }
    if rights == Rights::Namespace {
        let user = std::env::var("USER").or_else(|_| std::env::var("LOGNAME")).unwrap_or_else(|_| "this user".into());
        for file in ["/etc/subuid", "/etc/subgid"] {
            let text = std::fs::read_to_string(file).unwrap_or_default();
            if !has_range(&text, &user, effective_uid()?) {
                return Err(BuildError::NoSubIds { user, detail: format!("{file} gives it no range of 65536") });
            }
        }
        let closed = std::fs::read_to_string("/proc/sys/kernel/unprivileged_userns_clone").unwrap_or_default();
        if closed.trim() == "0" {
            let detail = "kernel.unprivileged_userns_clone is 0, so it may make no user namespace".into();
            return Err(BuildError::NoSubIds { user, detail });
        }
    }
    Ok(rights)
}

/// subuid(5): `name-or-uid:first:count`.
fn has_range(text: &str, user: &str, uid: u32) -> bool {
    text.lines().any(|line| {
        let mut fields = line.split(':');
        let who = fields.next().unwrap_or_default();
        let count = fields.nth(1).and_then(|count| count.trim().parse::<u64>().ok());
        (who == user || who == uid.to_string()) && count.is_some_and(|count| count >= 65536)
    })
}

fn effective_uid() -> Result<u32, BuildError> {
    let path = PathBuf::from("/proc/self/status");
    let text = std::fs::read_to_string(&path).map_err(|source| BuildError::Read { path: path.clone(), source })?;
    let uid = text.lines().find_map(|line| line.strip_prefix("Uid:")?.split_whitespace().nth(1)?.parse().ok());
    uid.ok_or(BuildError::Read { path, source: std::io::Error::other("it has no Uid line") })
}

/// A Debian mirror, as this machine's apt names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mirror {
    /// The archive, without a slash at its end.
    pub(crate) archive: String,
    /// The security archive.
    pub(crate) security: Option<String>,
}

impl Mirror {
    /// Asks apt.
    pub(crate) fn of_host() -> Result<Self, BuildError> {
        let mut command = Command::new("apt-get");
        command.args(["indextargets", "--format", "$(CREATED_BY)|$(ORIGIN)|$(REPO_URI)"]);
        let output = output(&mut command, "asking for this machine's mirror", |_| ())?;
        Self::parse(&String::from_utf8_lossy(&output)).ok_or(BuildError::NoMirror)
    }

    fn parse(targets: &str) -> Option<Self> {
        let mut uris = Vec::new();
        for line in targets.lines() {
            let mut fields = line.splitn(3, '|');
            let (Some("Packages"), Some(origin), Some(uri)) = (fields.next(), fields.next(), fields.next()) else {
                continue;
            };
            let uri = uri.trim_end_matches('/');
            // Before the first `apt-get update` apt does not know the origin; then the address must tell.
            if origin == "Debian" || (origin.is_empty() && (uri.ends_with("/debian") || uri.ends_with("security"))) {
                uris.push(uri.to_owned());
            }
        }
        let (security, archive): (Vec<_>, Vec<_>) = uris.into_iter().partition(|uri| uri.ends_with("security"));
        Some(Self { archive: archive.into_iter().next()?, security: security.into_iter().next() })
    }

    /// (address, suite) of every index that a build of this suite reads.
    pub(crate) fn indexes(&self, suite: &str) -> Vec<(String, String)> {
        let mut all =
            vec![(self.archive.clone(), suite.to_owned()), (self.archive.clone(), format!("{suite}-updates"))];
        all.extend(self.security.iter().map(|security| (security.clone(), format!("{suite}-security"))));
        all
    }

    /// The same as lines of a sources.list. Most firmware is in a component of its own.
    pub(crate) fn sources(&self, suite: &str, firmware: bool) -> Vec<String> {
        let components = if firmware { "main non-free-firmware" } else { "main" };
        let line = |(uri, suite)| format!("deb [signed-by={KEYRING}] {uri} {suite} {components}");
        self.indexes(suite).into_iter().map(line).collect()
    }
}

/// Runs a program to its end and gives its standard output. Its standard error goes to `listen`, line by line.
pub(crate) fn output(
    command: &mut Command,
    doing: &'static str,
    listen: impl FnMut(&str),
) -> Result<Vec<u8>, BuildError> {
    let mut bytes = Vec::new();
    run(command.stdout(Stdio::piped()), doing, &[], listen, &mut bytes)?;
    Ok(bytes)
}

/// Runs a program with `input` as its standard input; its standard output goes where the command says, or into `into`
/// if it is piped.
pub(crate) fn run(
    command: &mut Command,
    doing: &'static str,
    input: &[u8],
    mut listen: impl FnMut(&str),
    into: &mut Vec<u8>,
) -> Result<(), BuildError> {
    let name = command.get_program().to_string_lossy().into_owned();
    let io = |source| BuildError::Read { path: PathBuf::from(&name), source };
    let stdin = if input.is_empty() { Stdio::null() } else { Stdio::piped() };
    let path = std::env::var("PATH").unwrap_or_default();
    let mut child = command
        .env("PATH", format!("{path}:/usr/sbin:/sbin"))
        .env("LC_ALL", "C.UTF-8")
        .stdin(stdin)
        .stderr(Stdio::piped())
        .spawn()
        .map_err(io)?;
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let (mut last, mut full) = (Vec::new(), None);
    std::thread::scope(|scope| {
        // A program that stops reading early says why on standard error; the broken pipe itself is of no interest.
        scope.spawn(move || stdin.map(|mut stdin| stdin.write_all(input)));
        let reader = scope.spawn(move || {
            let mut bytes = Vec::new();
            stdout.map(|mut stdout| stdout.read_to_end(&mut bytes)).transpose().map(|_| bytes)
        });
        for line in stderr.into_iter().flat_map(|stderr| BufReader::new(stderr).lines()).map_while(Result::ok) {
            listen(&line);
            tracing::trace!(program = name, "{line}");
            if full.is_none() && line.contains(NO_SPACE) {
                full = Some(line.clone());
            }
            if last.len() == LAST_LINES {
                last.remove(0);
            }
            last.push(line);
        }
        *into = reader.join().expect("the reader does not panic").map_err(io)?;
        Ok::<_, BuildError>(())
    })?;
    let status = child.wait().map_err(io)?;
    if status.success() {
        return Ok(());
    }
    if let Some(line) = full {
        return Err(BuildError::DiskFullInTool { doing, line });
    }
    Err(BuildError::Tool { program: name, doing, status: status.to_string(), last_words: last.join("\n") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirrors_come_from_apt() {
        let targets = "Packages||http://other.example/apt/\nPackages|Debian|http://m.example/debian/\n\
                       DEP-11|Debian|http://x.example/debian/\nPackages|Debian|http://m.example/debian-security/\n";
        let mirror = Mirror::parse(targets).unwrap();
        assert_eq!(mirror.archive, "http://m.example/debian");
        assert_eq!(mirror.sources("trixie", false).len(), 3);
        assert!(mirror.sources("trixie", true)[0].ends_with("trixie main non-free-firmware"));
        assert!(mirror.sources("trixie", false)[2].ends_with("http://m.example/debian-security trixie-security main"));
        assert_eq!(Mirror::parse("Packages||http://other.example/apt/\n"), None);
        let fresh = Mirror::parse("Packages||http://m.example/debian/\n").unwrap();
        assert_eq!(fresh.indexes("trixie").len(), 2);
    }

    #[test]
    fn subordinate_ids_are_found_by_name_or_number() {
        let text = "root:1:2\nada:100000:65536\n1001:200000:65536\n";
        assert!(has_range(text, "ada", 7));
        assert!(has_range(text, "bob", 1001));
        assert!(!has_range(text, "root", 0), "two ids are too few");
    }

    #[test]
    fn a_failed_program_is_named_with_its_last_words() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo ok; echo no such thing >&2; exit 3"]);
        let error = output(&mut command, "testing", |_| ()).unwrap_err().to_string();
        assert_eq!(error, "sh failed (exit status: 3) while testing; its last words:\nno such thing");
    }
}
