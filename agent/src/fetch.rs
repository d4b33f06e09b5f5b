//! Downloads over plain HTTP/1.1 from the boot server or any cache of it. Nothing that comes is trusted, and nothing
//! that comes slowly holds the agent: every transfer has a cap, a minimum rate and a deadline ([`Patience`]), and a broken
//! one goes on where it stopped (RFC 9110 §14).

mod place;

pub use place::Put;

use crate::error::{AgentError, FailureClass, Result};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{CONTENT_RANGE, HOST, RANGE};
use hyper::{Request, Response, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use kiln_release::{hex, with_causes};
use place::{Place, Storing};
use ring::digest::{Context, SHA256};
use std::fs::File;
use std::io::{Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// What a peer may cost in time. A transfer of n bytes ends after 2 × `answer` + `window` + n / `rate`, whatever the
/// peer does: a root of 33 MB after 68 minutes, a file of metadata after a minute and a half.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// For the connection, and again for the whole head of the answer.
    pub answer: Duration,
    /// The longest gap between two pieces of a body.
    pub gap: Duration,
    /// Bytes per second that a body must bring over every `window`.
    pub rate: u32,
    pub window: Duration,
    /// So many tries of one download must together bring what one window must; else they count as none.
    pub tries: u32,
    /// Most bytes per second that are taken; none: all that come.
    pub cap: Option<u64>,
}

/// The agent's.
pub const PATIENCE: Patience = Patience {
    answer: Duration::from_secs(10),
    gap: Duration::from_secs(15),
    rate: 8 * 1024,
    window: Duration::from_secs(30),
    tries: 8,
    cap: None,
};

/// The longest head of an answer, and the largest piece of a body held in memory.
const BUFFER: usize = 64 * 1024;
/// The most header fields of an answer.
const HEADERS: usize = 64;

impl Patience {
    /// When a transfer of `length` bytes ends at the latest, from its beginning.
    pub fn deadline(&self, length: u64) -> Duration {
        2 * self.answer + self.window + Duration::from_secs(length / u64::from(self.rate))
    }

    /// Bytes that every window must bring.
    fn least(&self) -> u64 {
        u64::try_from(self.window.as_millis()).unwrap_or(u64::MAX).saturating_mul(u64::from(self.rate)) / 1000
    }
}

/// One small document; `None` if the server does not have it (404).
pub async fn document(base: &str, path: &str, limit: u64) -> Result<Option<Vec<u8>>> {
    Documents::of(base).get(path, limit).await
}

/// Small documents of one server, one after the other over one connection for as long as that holds.
pub struct Documents<'a> {
    base: &'a str,
    patience: Patience,
    kept: Option<Connection>,
}

impl<'a> Documents<'a> {
    pub fn of(base: &'a str) -> Self {
        Self { base, patience: PATIENCE, kept: None }
    }

    /// A document; `None` if the server does not have it (404).
    pub async fn get(&mut self, path: &str, limit: u64) -> Result<Option<Vec<u8>>> {
        let (url, patience) = (join(self.base, path), self.patience);
        let mut body = Vec::new();
        let found = in_time(&patience, &url, limit, Instant::now(), async {
            let (response, connection) = self.ask(&url).await?;
            if response.status() == StatusCode::NOT_FOUND {
                return Ok(false);
            }
            let mut keep = |piece: &[u8]| {
                body.extend_from_slice(piece);
                Ok(None)
            };
            copy(&patience, &url, response, limit, StatusCode::OK, &mut keep).await?;
            // What was not read to its end is in the way of the next.
            self.kept = Some(connection);
            Ok(true)
        })
        .await?;
        Ok(found.then_some(body))
    }

    /// Over the connection that there is; a stale one is replaced once.
    async fn ask(&mut self, url: &str) -> Result<(Response<Incoming>, Connection)> {
        if let Some(kept) = self.kept.take().filter(|kept| !kept.sender.is_closed())
            && let Ok(answered) = kept.get(&self.patience, url, 0).await
        {
            return Ok(answered);
        }
        Connection::open(&self.patience, url).await?.get(&self.patience, url, 0).await
    }
}

/// What is signed about a file, and what to call it in an error.
#[derive(Debug, Clone)]
pub struct Expected {
    pub what: &'static str,
    pub sha256: String,
    pub length: u64,
}

/// A file that goes with its owner unless it is kept: what did not verify, and what is no longer wanted, leaves nothing.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
    kept: bool,
}

impl Scratch {
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Leaves the file where it is.
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !self.kept
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            eprintln!("kiln-agent: {}: cannot be removed: {error}", self.path.display());
        }
    }
}

/// Where a download goes.
enum Out {
    /// Nowhere: it is only read.
    Nowhere,
    File(File, Scratch),
    Place(Place),
}

/// One download that can be resumed: the state over several tries. It may be dropped between two pieces and gone on
/// with, as each piece is hashed and stored before the next is waited for. Dropped in a disk's turn it begins anew.
pub struct Download {
    expected: Expected,
    patience: Patience,
    out: Out,
    hash: Context,
    received: u64,
    /// [`Self::received`] for others to read while it runs.
    meter: Arc<AtomicU64>,
    /// The most that was received when a try last counted as progress.
    mark: u64,
    tries: u32,
}

impl Download {
    /// To a file, or only to know that it can be had and is what was signed.
    pub fn new(expected: Expected, to: Option<&Path>, meter: &Arc<AtomicU64>) -> Result<Self> {
        let out = match to {
            None => Out::Nowhere,
            Some(path) => {
                let file = File::create(path).map_err(AgentError::file(path))?;
                Out::File(file, Scratch { path: path.to_owned(), kept: false })
            }
        };
        Ok(Self::to(expected, out, meter))
    }

    /// To a disk. It is not flushed.
    pub fn onto(expected: Expected, put: Put, meter: &Arc<AtomicU64>) -> Self {
        Self::to(expected, Out::Place(Place::of(put)), meter)
    }

    fn to(expected: Expected, out: Out, meter: &Arc<AtomicU64>) -> Self {
        let (hash, meter) = (Context::new(&SHA256), Arc::clone(meter));
        meter.store(0, Ordering::Relaxed);
        Self { expected, patience: PATIENCE, out, hash, received: 0, meter, mark: 0, tries: 0 }
    }

    /// With at most so many bytes per second, if any number is given.
    pub fn capped(mut self, cap: Option<u64>) -> Self {
        self.patience.cap = cap;
        self
    }

    /// Failed tries since the last that brought the download on. A try that moved a few bytes is none of those.
    pub fn tries(&self) -> u32 {
        self.tries
    }

    /// The file, when [`Self::run`] has succeeded.
    pub fn into_file(self) -> Option<Scratch> {
        match self.out {
            Out::File(_, scratch) => Some(scratch),
            Out::Nowhere | Out::Place(_) => None,
        }
    }

    /// Fetches what is missing and checks the whole. After a network error the next call, perhaps to another server, goes
    /// on behind the last byte; after any other it begins anew.
    pub async fn run(&mut self, base: &str) -> Result<()> {
        let begun_at = self.received;
        let Err(error) = self.fetch_rest(base).await else { return Ok(()) };
        if error.class() != FailureClass::Unreachable {
            self.begin_anew()?;
            self.tries += 1;
            return Err(error);
        }
        let brought = self.received > begun_at;
        if self.received >= self.mark.saturating_add(self.patience.least()) {
            (self.mark, self.tries) = (self.received, 0);
        }
        self.tries += 1;
        if brought && self.tries >= self.patience.tries {
            let (url, tries) = (self.url(base), self.tries);
            return Err(AgentError::NoProgress { url, tries, minimum: self.patience.least() });
        }
        Err(error)
    }

    /// The same of one server after the other, until one gives it. What was refused says more than what was silent.
    pub async fn run_any(&mut self, servers: &[String]) -> Result<()> {
        let mut last = AgentError::NoServer;
        for base in servers {
            match self.run(base).await {
                Ok(()) => return Ok(()),
                Err(error)
                    if error.class() == FailureClass::Unreachable && last.class() != FailureClass::Unreachable => {}
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    fn url(&self, base: &str) -> String {
        join(base, &format!("a/{}", self.expected.sha256))
    }

    fn begin_anew(&mut self) -> Result<()> {
        (self.hash, self.received) = (Context::new(&SHA256), 0);
        self.meter.store(0, Ordering::Relaxed);
        match &mut self.out {
            Out::Nowhere => {}
            Out::File(file, scratch) => {
                file.set_len(0).and_then(|()| file.rewind()).map_err(AgentError::file(scratch.path()))?;
            }
            Out::Place(place) => place.begin_anew(),
        }
        Ok(())
    }

    async fn fetch_rest(&mut self, base: &str) -> Result<()> {
        let Expected { what, length, .. } = self.expected;
        if let Out::Place(place) = &self.out
            && place.is_torn()
        {
            self.begin_anew()?;
        }
        if self.received < length {
            self.transfer(&self.url(base)).await?;
        }
        while let Out::Place(place) = &mut self.out
            && let Some(rest) = place.rest()
        {
            rest.await?;
        }
        if self.received < length {
            return Err(AgentError::LengthMismatch { what, expected: length, got: self.received });
        }
        let got = hex::encode(self.hash.clone().finish().as_ref());
        if got == self.expected.sha256 {
            Ok(())
        } else {
            Err(AgentError::HashMismatch { what, expected: self.expected.sha256.clone(), got })
        }
    }

    async fn transfer(&mut self, url: &str) -> Result<()> {
        let (patience, begun) = (self.patience, Instant::now());
        let (response, _open) = Connection::open(&patience, url).await?.get(&patience, url, self.received).await?;
        let mut wanted = if self.received == 0 { StatusCode::OK } else { StatusCode::PARTIAL_CONTENT };
        if self.received > 0 && response.status() == StatusCode::OK {
            // It knows no ranges (RFC 9110 §14.2 allows that): what it sends is the whole.
            self.begin_anew()?;
            wanted = StatusCode::OK;
        } else if self.received > 0 && response.status() == StatusCode::PARTIAL_CONTENT {
            let range = response.headers().get(CONTENT_RANGE).and_then(|v| v.to_str().ok()).unwrap_or_default();
            if !range.starts_with(&format!("bytes {}-", self.received)) {
                let reason = format!("asked for bytes from {}, was given {range:?}", self.received);
                return Err(AgentError::Unreachable { url: url.to_owned(), reason });
            }
        }
        let Expected { what, length, .. } = self.expected;
        let left = length - self.received;
        let (hash, received, meter, out) = (&mut self.hash, &mut self.received, &self.meter, &mut self.out);
        let mut take = |piece: &[u8]| {
            let storing = match out {
                Out::Nowhere => None,
                Out::File(file, _) => {
                    file.write_all(piece).map_err(AgentError::system(format!("storing the {what}")))?;
                    None
                }
                Out::Place(place) => place.take(piece),
            };
            hash.update(piece);
            *received += piece.len() as u64;
            meter.store(*received, Ordering::Relaxed);
            Ok(storing)
        };
        // Of what is left now: a server without ranges gets the time that the whole takes.
        let copied = copy(&patience, url, response, left, wanted, &mut take);
        match in_time(&patience, url, left, begun, copied).await {
            Err(AgentError::TooLong { .. }) => {
                Err(AgentError::LengthMismatch { what, expected: length, got: length + 1 })
            }
            other => other,
        }
    }
}

fn join(base: &str, path: &str) -> String {
    format!("{}/{path}", base.trim_end_matches('/'))
}

/// Host and port of an `http://` or `https://` URL.
pub fn authority(url: &str, default_port: u16) -> Result<(Uri, String, u16)> {
    let bad = |reason: &str| AgentError::Unreachable { url: url.to_owned(), reason: reason.to_owned() };
    let uri: Uri = url.parse().map_err(|e| bad(&format!("not a URL: {e}")))?;
    let host = uri.host().ok_or_else(|| bad("URL without a host"))?.trim_matches(['[', ']']).to_owned();
    let port = uri.port_u16().unwrap_or(default_port);
    Ok((uri, host, port))
}

/// Connects within [`Patience::answer`].
pub async fn connect(patience: &Patience, url: &str, host: &str, port: u16) -> Result<TcpStream> {
    let unreachable = |reason: String| AgentError::Unreachable { url: url.to_owned(), reason };
    let stream = timeout(patience.answer, TcpStream::connect((host, port)))
        .await
        .map_err(|_| unreachable(format!("no connection within {:?}", patience.answer)))?
        .map_err(|e| unreachable(format!("cannot connect: {e}")))?;
    stream.set_nodelay(true).map_err(|e| unreachable(e.to_string()))?;
    Ok(stream)
}

/// A client whose peer can make it hold no more than [`BUFFER`] of head or body.
pub fn client() -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder.max_buf_size(BUFFER).max_headers(HEADERS);
    builder
}

/// A connection's own task, ended with its owner: a transfer that nobody waits for holds no socket.
pub struct Open(JoinHandle<()>);

impl Open {
    /// Drives a connection until it ends or its owner goes.
    pub fn drive(connection: impl Future<Output = hyper::Result<()>> + Send + 'static) -> Self {
        // Its error reaches whoever waits for the answer, with more of a reason.
        Self(tokio::spawn(async { drop(connection.await) }))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The deadline of a transfer that began then, of which its gaps and windows are the finer part.
async fn in_time<T>(
    patience: &Patience,
    url: &str,
    length: u64,
    begun: Instant,
    transfer: impl Future<Output = Result<T>>,
) -> Result<T> {
    let deadline = patience.deadline(length);
    timeout(deadline.saturating_sub(begun.elapsed()), transfer)
        .await
        .unwrap_or_else(|_| Err(too_slow(patience, url, deadline)))
}

fn too_slow(patience: &Patience, url: &str, over: Duration) -> AgentError {
    AgentError::TooSlow { url: url.to_owned(), minimum: patience.rate.into(), seconds: over.as_secs() }
}

/// A connection to one server.
struct Connection {
    sender: SendRequest<Empty<Bytes>>,
    _open: Open,
}

impl Connection {
    async fn open(patience: &Patience, url: &str) -> Result<Self> {
        let unreachable = |reason: String| AgentError::Unreachable { url: url.to_owned(), reason };
        let (_, host, port) = authority(url, 80)?;
        let stream = connect(patience, url, &host, port).await?;
        let (sender, connection) =
            client().handshake(TokioIo::new(stream)).await.map_err(|e| unreachable(e.to_string()))?;
        Ok(Self { sender, _open: Open::drive(connection) })
    }

    /// Asks, from byte `from` on, and gives the connection back with the answer's head.
    async fn get(mut self, patience: &Patience, url: &str, from: u64) -> Result<(Response<Incoming>, Self)> {
        let unreachable = |reason: String| AgentError::Unreachable { url: url.to_owned(), reason };
        let (uri, host, port) = authority(url, 80)?;
        let path = uri.path_and_query().map_or("/", |p| p.as_str());
        let name = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
        let mut request = Request::get(path).header(HOST, name);
        if from > 0 {
            request = request.header(RANGE, format!("bytes={from}-"));
        }
        let request = request.body(Empty::<Bytes>::new()).map_err(|e| unreachable(e.to_string()))?;
        let late = |_| unreachable(format!("no answer within {:?}", patience.answer));
        let response = timeout(patience.answer, self.sender.send_request(request)).await.map_err(late)?;
        Ok((response.map_err(|e| unreachable(with_causes(&e)))?, self))
    }
}

/// Feeds a body to `sink`, under cap, gap and rate. What it gives back is waited for before the next piece.
async fn copy(
    patience: &Patience,
    url: &str,
    response: Response<Incoming>,
    limit: u64,
    wanted: StatusCode,
    sink: &mut dyn FnMut(&[u8]) -> Result<Option<Storing>>,
) -> Result<()> {
    let url_text = || url.to_owned();
    if response.status() != wanted {
        return Err(AgentError::HttpStatus { url: url_text(), status: response.status().as_u16() });
    }
    let mut body = response.into_body();
    let mut total = 0_u64;
    let begun = Instant::now();
    let (mut window_start, mut window_bytes) = (begun, 0_u64);
    loop {
        let frame = match timeout(patience.gap, body.frame()).await {
            Err(_) => return Err(AgentError::Stalled { url: url_text(), seconds: patience.gap.as_secs() }),
            Ok(None) => return Ok(()),
            Ok(Some(frame)) => {
                frame.map_err(|e| AgentError::Unreachable { url: url_text(), reason: with_causes(&e) })?
            }
        };
        let Ok(piece) = frame.into_data() else { continue };
        total += piece.len() as u64;
        window_bytes += piece.len() as u64;
        if total > limit {
            return Err(AgentError::TooLong { url: url_text(), limit });
        }
        if let Some(storing) = sink(&piece)? {
            storing.await?;
        }
        if let Some(cap) = patience.cap {
            let due = Duration::from_millis(total.saturating_mul(1000) / cap.max(1));
            tokio::time::sleep(due.saturating_sub(begun.elapsed())).await;
        }
        let elapsed = window_start.elapsed();
        if elapsed >= patience.window {
            if window_bytes < patience.least() {
                return Err(too_slow(patience, url, elapsed));
            }
            (window_start, window_bytes) = (Instant::now(), 0);
        }
    }
}

#[cfg(test)]
mod tests;
