//! Downloads over plain HTTP/1.1 from the boot server or any cache of it. Nothing that comes is trusted; every
//! transfer has a cap, a minimum rate and a deadline, and a broken one goes on where it stopped (RFC 9110 §14).

use crate::error::{AgentError, Result};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::header::{CONTENT_RANGE, HOST, RANGE};
use hyper::{Request, Response, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use kiln_release::{hex, with_causes};
use ring::digest::{Context, SHA256};
use std::io::Write;
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Connecting, and waiting for the first byte of an answer.
const ANSWER: Duration = Duration::from_secs(10);
/// The longest gap between two pieces of a body.
const GAP: Duration = Duration::from_secs(15);
/// A transfer slower than this over [`RATE_WINDOW`] is given up: bytes per second.
const MIN_RATE: u64 = 8 * 1024;
const RATE_WINDOW: Duration = Duration::from_secs(30);

/// A small document; `None` if the server does not have it (404).
pub async fn document(base: &str, path: &str, limit: u64) -> Result<Option<Vec<u8>>> {
    let url = join(base, path);
    let response = get(&url, 0).await?;
    if response.status() == StatusCode::NOT_FOUND {
        return Ok(None);
    }
    let mut body = Vec::new();
    copy(&url, response, limit, StatusCode::OK, &mut |piece| {
        body.extend_from_slice(piece);
        Ok(())
    })
    .await?;
    Ok(Some(body))
}

/// What is signed about a file, and what to call it in an error.
#[derive(Debug, Clone, Copy)]
pub struct Expected<'a> {
    pub what: &'static str,
    pub sha256: &'a str,
    pub length: u64,
}

/// One download that can be resumed: the state over several tries.
pub struct Download<'a> {
    expected: Expected<'a>,
    hash: Context,
    done: u64,
}

impl<'a> Download<'a> {
    pub fn new(expected: Expected<'a>) -> Self {
        Self { expected, hash: Context::new(&SHA256), done: 0 }
    }

    /// Bytes received so far.
    pub fn received(&self) -> u64 {
        self.done
    }

    /// Fetches what is missing to `out`. On a network error the state stays, and the next call goes on behind the last
    /// byte; on any other the bytes are worthless.
    pub async fn run(&mut self, base: &str, out: &mut dyn Write) -> Result<()> {
        let Expected { what, sha256, length } = self.expected;
        if self.done < length {
            let url = join(base, &format!("a/{sha256}"));
            let response = get(&url, self.done).await?;
            let wanted = if self.done == 0 { StatusCode::OK } else { StatusCode::PARTIAL_CONTENT };
            if self.done > 0 && response.status() == StatusCode::PARTIAL_CONTENT {
                let range = response.headers().get(CONTENT_RANGE).and_then(|v| v.to_str().ok()).unwrap_or_default();
                if !range.starts_with(&format!("bytes {}-", self.done)) {
                    let reason = format!("asked for bytes from {}, was given {range:?}", self.done);
                    return Err(AgentError::Unreachable { url, reason });
                }
            }
            let (hash, done) = (&mut self.hash, &mut self.done);
            let begun_at = *done;
            let too_long = || AgentError::LengthMismatch { what, expected: length, got: length + 1 };
            copy(&url, response, length - begun_at, wanted, &mut |piece| {
                hash.update(piece);
                *done += piece.len() as u64;
                out.write_all(piece).map_err(AgentError::system(format!("storing the {what}")))
            })
            .await
            .map_err(|e| if matches!(e, AgentError::TooLong { .. }) { too_long() } else { e })?;
        }
        if self.done < length {
            return Err(AgentError::LengthMismatch { what, expected: length, got: self.done });
        }
        let got = hex::encode(self.hash.clone().finish().as_ref());
        if got != sha256 {
            return Err(AgentError::HashMismatch { what, expected: sha256.to_owned(), got });
        }
        Ok(())
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

/// Connects within [`ANSWER`].
pub async fn connect(url: &str, host: &str, port: u16) -> Result<TcpStream> {
    let unreachable = |reason: String| AgentError::Unreachable { url: url.to_owned(), reason };
    let stream = timeout(ANSWER, TcpStream::connect((host, port)))
        .await
        .map_err(|_| unreachable(format!("no connection within {} s", ANSWER.as_secs())))?
        .map_err(|e| unreachable(format!("cannot connect: {e}")))?;
    stream.set_nodelay(true).map_err(|e| unreachable(e.to_string()))?;
    Ok(stream)
}

async fn get(url: &str, from: u64) -> Result<Response<Incoming>> {
    let unreachable = |reason: String| AgentError::Unreachable { url: url.to_owned(), reason };
    let (uri, host, port) = authority(url, 80)?;
    let stream = connect(url, &host, port).await?;
    let exchange = async {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| unreachable(e.to_string()))?;
        tokio::spawn(connection);
        let path = uri.path_and_query().map_or("/", |p| p.as_str());
        let mut request = Request::get(path).header(HOST, format!("{host}:{port}"));
        if from > 0 {
            request = request.header(RANGE, format!("bytes={from}-"));
        }
        let request = request.body(Empty::<Bytes>::new()).map_err(|e| unreachable(e.to_string()))?;
        sender.send_request(request).await.map_err(|e| unreachable(e.to_string()))
    };
    timeout(ANSWER, exchange).await.map_err(|_| unreachable(format!("no answer within {} s", ANSWER.as_secs())))?
}

/// Feeds a body to `sink`, under cap, gap and rate.
async fn copy(
    url: &str,
    response: Response<Incoming>,
    limit: u64,
    wanted: StatusCode,
    sink: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let url = || url.to_owned();
    if response.status() != wanted {
        return Err(AgentError::HttpStatus { url: url(), status: response.status().as_u16() });
    }
    let mut body = response.into_body();
    let mut total = 0_u64;
    let (mut window_start, mut window_bytes) = (Instant::now(), 0_u64);
    loop {
        let frame = match timeout(GAP, body.frame()).await {
            Err(_) => return Err(AgentError::Stalled { url: url(), seconds: GAP.as_secs() }),
            Ok(None) => return Ok(()),
            Ok(Some(frame)) => frame.map_err(|e| AgentError::Unreachable { url: url(), reason: with_causes(&e) })?,
        };
        let Ok(piece) = frame.into_data() else { continue };
        total += piece.len() as u64;
        window_bytes += piece.len() as u64;
        if total > limit {
            return Err(AgentError::TooLong { url: url(), limit });
        }
        sink(&piece)?;
        let elapsed = window_start.elapsed();
        if elapsed >= RATE_WINDOW {
            if window_bytes < MIN_RATE * RATE_WINDOW.as_secs() {
                return Err(AgentError::TooSlow { url: url(), minimum: MIN_RATE, seconds: elapsed.as_secs() });
            }
            (window_start, window_bytes) = (Instant::now(), 0);
        }
    }
}
