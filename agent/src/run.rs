//! What checks and hooks call: programs of the verified root, and requests to this machine. Each ends when its caller's
//! deadline drops it, with all that it started; what may block in the kernel costs one thread, however long it hangs.

use kiln_release::declared::{address, http_target};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

/// Bytes of a failed program's words that are kept.
const WORDS: usize = 200;
/// What a program said before it ended is there within this time.
const LAST_WORDS: Duration = Duration::from_millis(100);

/// A result, or what is wrong, for people.
pub type Said<T> = Result<T, String>;

/// What may block goes through it one at a time: one that never comes back is waited for, not added to.
#[derive(Debug, Clone)]
pub struct Gate(Arc<Semaphore>);

impl Gate {
    pub fn new() -> Self {
        Self(Arc::new(Semaphore::new(1)))
    }

    /// Runs what the kernel may hold up beside the runtime.
    pub async fn beside<T: Send + 'static>(&self, what: &str, work: impl FnOnce() -> T + Send + 'static) -> Said<T> {
        let permit = Arc::clone(&self.0).try_acquire_owned();
        let permit = permit.map_err(|_| format!("{what}: an earlier check still hangs in the kernel"))?;
        let done = spawn_blocking(move || {
            let done = work();
            drop(permit);
            done
        });
        done.await.map_err(|e| format!("{what}: {e}"))
    }
}

/// The work's result within so many seconds.
pub async fn in_time<T>(what: &str, seconds: u64, work: impl Future<Output = Said<T>>) -> Said<T> {
    let late = |_| Err(format!("{what} gave no answer in {seconds} s"));
    timeout(Duration::from_secs(seconds), work).await.unwrap_or_else(late)
}

/// A program with its process group: dropped, all of it is killed.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            // An error says that nobody is left.
            let _ = killpg(group, Signal::SIGKILL);
        }
    }
}

/// Runs a program of the file system `root` to its end; anything but status 0 is a failure, with its first words.
pub async fn program(gate: &Gate, root: &Path, path: &str, arguments: &[String]) -> Said<()> {
    let (root, at, arguments) = (root.to_owned(), PathBuf::from(path), arguments.to_owned());
    // Starting a program reads it from the root, which can take as long as the root takes.
    let mut child = gate.beside(path, move || start(&root, &at, &arguments)).await??;
    let _group = Group(child.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw));
    let mut errors = child.stderr.take();
    let (mut words, mut piece) = (Vec::new(), [0; 512]);
    let status = loop {
        let Some(from) = &mut errors else { break child.wait().await };
        tokio::select! {
            biased;
            read = from.read(&mut piece) => match read {
                Ok(n @ 1..) => words.extend(piece[..n].iter().take(WORDS - words.len().min(WORDS))),
                Ok(0) | Err(_) => errors = None,
            },
            status = child.wait() => {
                // Its last words may lie in the pipe still; one that it started may keep the pipe open.
                if let Ok(Ok(n)) = timeout(LAST_WORDS, from.read(&mut piece)).await {
                    words.extend(piece[..n].iter().take(WORDS - words.len().min(WORDS)));
                }
                break status;
            }
        }
    };
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => {
            let words = String::from_utf8_lossy(&words);
            let words: String = words.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
            Err(format!("{path}: {status}{}{words}", if words.is_empty() { "" } else { ": " }))
        }
        Err(error) => Err(format!("{path}: {error}")),
    }
}

/// Only what lies in the verified root is run, whatever links lead elsewhere.
fn start(root: &Path, path: &Path, arguments: &[String]) -> Said<Child> {
    let said = |e: std::io::Error| format!("{} cannot be run: {e}", path.display());
    let real = path.canonicalize().map_err(said)?;
    let device = |path: &Path| path.metadata().map(|m| m.dev()).map_err(said);
    if device(&real)? != device(root)? || !real.starts_with(root) {
        return Err(format!("{} is not run: it is not in the verified root", path.display()));
    }
    let mut command = std::process::Command::new(real);
    command.args(arguments).env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").current_dir("/").process_group(0);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    Command::from(command).kill_on_drop(true).spawn().map_err(said)
}

/// Asks for a URL of this machine; the answer's status (RFC 9112 §4). Its body is not read.
pub async fn http(method: &str, url: &str) -> Said<u16> {
    let said = |e: std::io::Error| format!("{url}: {e}");
    let (address, path) = http_target(url).ok_or_else(|| format!("{url} is no address of this machine"))?;
    let mut stream = TcpStream::connect(address).await.map_err(said)?;
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: {address}\r\nUser-Agent: kiln-agent\r\nContent-Length: 0\r\n\
         Connection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.map_err(said)?;
    let mut head = Vec::new();
    while head.len() < 12 {
        let mut piece = [0; 64];
        match stream.read(&mut piece).await.map_err(said)? {
            0 => break,
            n => head.extend_from_slice(&piece[..n]),
        }
    }
    let status = head.strip_prefix(b"HTTP/1.").and_then(|rest| rest.get(2..5));
    let status = status.and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok());
    status.ok_or_else(|| format!("{url}: the answer is not HTTP/1"))
}

/// Connects, and no more.
pub async fn tcp(target: &str) -> Said<()> {
    let at = address(target, None).ok_or_else(|| format!("{target} is no address of this machine"))?;
    TcpStream::connect(at).await.map(drop).map_err(|e| format!("{target}: {e}"))
}
