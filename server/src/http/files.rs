//! The repository's files by HTTP/1.1: GET and HEAD, one range (RFC 9110 §14), ETag, immutable caching of what is named
//! by its hash. Always with Content-Length, never chunked, never redirected: EDK2's HTTP boot needs that.
//!
//! Paths are not cleaned but matched: what does not have the exact form of a served file is not found. Several ranges
//! in one request are answered whole, which the RFC allows.

use super::{App, Peer, text};
use crate::net::PROGRESS;
use axum::body::Body;
use axum::extract::{Extension, State};
use axum::http::{HeaderMap, Method, Response, StatusCode, Uri, header};
use axum::response::IntoResponse;
use bytes::Bytes;
use hyper::body::{Frame, SizeHint};
use kiln_release::hex;
use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt, SeekFrom};

/// Read at a time.
const CHUNK: usize = 256 << 10;
/// Given to the connection at a time: what is asked for next says that the client has taken what came before, also one
/// that takes a few hundred bytes a second.
const PIECE: usize = 16 << 10;

/// A file of the repository.
#[derive(Debug, PartialEq, Eq)]
struct Served {
    path: PathBuf,
    content_type: &'static str,
    /// Its name holds its hash: it never changes.
    hash: Option<String>,
}

fn is_segment(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with('.')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
}

fn served(path: &str) -> Option<Served> {
    let parts: Vec<&str> = path.strip_prefix('/')?.split('/').collect();
    let json = |hash: Option<&str>| Some(("application/json", hash.map(str::to_owned)));
    let (content_type, hash) = match parts.as_slice() {
        ["a", hash] if hex::is_sha256(hash) => ("application/octet-stream", Some((*hash).to_owned())),
        ["b", hash, "kiln.efi"] if hex::is_sha256(hash) => ("application/efi", Some((*hash).to_owned())),
        ["metadata", name] if is_segment(name.strip_suffix(".json").unwrap_or_default()) => json(None)?,
        ["targets", middle @ .., name]
            if middle.len() <= 4 && middle.iter().all(|m| is_segment(m)) && is_segment(name) =>
        {
            json(name.split_once('.').map(|(hash, _)| hash).filter(|hash| hex::is_sha256(hash)))?
        }
        _ => return None,
    };
    Some(Served { path: parts.iter().collect(), content_type, hash })
}

#[derive(Debug, PartialEq, Eq)]
enum Range {
    Whole,
    Part { first: u64, last: u64 },
    Unsatisfiable,
}

/// RFC 9110 §14.1.2; what is malformed, or more than one range, is ignored as §14.2 says.
fn range(value: Option<&str>, length: u64) -> Range {
    let Some(spec) = value.and_then(|v| v.strip_prefix("bytes=")) else { return Range::Whole };
    let Some((first, last)) = spec.trim().split_once('-') else { return Range::Whole };
    match (first.parse::<u64>(), last.parse::<u64>(), first.is_empty(), last.is_empty()) {
        (Ok(first), _, _, true) if first < length => Range::Part { first, last: length - 1 },
        (Ok(first), Ok(last), _, _) if first <= last && first < length => {
            Range::Part { first, last: last.min(length - 1) }
        }
        (Ok(first), Ok(last), _, _) if first <= last => Range::Unsatisfiable,
        (Ok(_), _, _, true) | (Err(_), Ok(0), true, _) => Range::Unsatisfiable,
        (Err(_), Ok(_), true, _) if length == 0 => Range::Unsatisfiable,
        (Err(_), Ok(n), true, _) => Range::Part { first: length.saturating_sub(n), last: length - 1 },
        _ => Range::Whole,
    }
}

/// Answers a request for a file of the repository.
pub(super) async fn serve(
    State(app): State<App>,
    Extension(peer): Extension<Peer>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
) -> Response<Body> {
    if method != Method::GET && method != Method::HEAD {
        if uri.path().starts_with("/api/") {
            return super::api::not_found().await.into_response();
        }
        let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n");
        response.headers_mut().insert(header::ALLOW, header::HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    let Some(file) = served(uri.path()) else { return text(StatusCode::NOT_FOUND, "no such file\n") };
    match answer(&app, peer, &method, &headers, &file).await {
        Ok(response) => response,
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            text(StatusCode::NOT_FOUND, "no such file\n")
        }
        Err(error) => {
            tracing::error!(path = uri.path(), %error, "a file of the repository cannot be read");
            text(StatusCode::INTERNAL_SERVER_ERROR, "the file cannot be read; the server's log says why\n")
        }
    }
}

async fn answer(
    app: &App,
    peer: Peer,
    method: &Method,
    headers: &HeaderMap,
    served: &Served,
) -> io::Result<Response<Body>> {
    let mut file = File::open(app.control.site.repo().join(&served.path)).await?;
    let metadata = file.metadata().await?;
    if !metadata.is_file() {
        return Err(io::ErrorKind::NotFound.into());
    }
    let length = metadata.len();
    let etag = match &served.hash {
        Some(hash) => format!("\"{hash}\""),
        None => {
            let modified = metadata.modified()?.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
            format!("\"{length:x}-{:x}\"", modified.as_nanos())
        }
    };
    let header_text = |name| headers.get(name).and_then(|v: &header::HeaderValue| v.to_str().ok());
    let cache = if served.hash.is_some() { "public, max-age=31536000, immutable" } else { "no-cache" };
    let response = Response::builder()
        .header(header::ETAG, &etag)
        .header(header::CACHE_CONTROL, cache)
        .header(header::ACCEPT_RANGES, "bytes");
    let build = |response: axum::http::response::Builder, body| {
        response.body(body).map_err(|e| io::Error::other(e.to_string()))
    };
    if header_text(header::IF_NONE_MATCH).is_some_and(|list| {
        list.trim() == "*" || list.split(',').any(|tag| tag.trim().trim_start_matches("W/") == etag)
    }) {
        return build(response.status(StatusCode::NOT_MODIFIED), Body::empty());
    }
    let asked = header_text(header::RANGE).filter(|_| header_text(header::IF_RANGE).is_none_or(|tag| tag == etag));
    let (status, first, count) = match range(asked, length) {
        Range::Whole => (StatusCode::OK, 0, length),
        Range::Part { first, last } => (StatusCode::PARTIAL_CONTENT, first, last - first + 1),
        Range::Unsatisfiable => {
            let response = response.status(StatusCode::RANGE_NOT_SATISFIABLE);
            return build(response.header(header::CONTENT_RANGE, format!("bytes */{length}")), Body::empty());
        }
    };
    let mut response =
        response.status(status).header(header::CONTENT_TYPE, served.content_type).header(header::CONTENT_LENGTH, count);
    if status == StatusCode::PARTIAL_CONTENT {
        response = response.header(header::CONTENT_RANGE, format!("bytes {first}-{}/{length}", first + count - 1));
    }
    if method == Method::HEAD {
        return build(response, Body::empty());
    }
    if first > 0 {
        file.seek(SeekFrom::Start(first)).await?;
    }
    let watch = served.hash.clone().filter(|_| served.path.starts_with("a") || served.path.starts_with("b"));
    let moves = watch.map(|hash| Tell { app: app.clone(), peer, hash });
    // Of one answer that holds all of it: two of a byte each are no download.
    let ended = moves.clone().filter(|_| first == 0 && count == length);
    if let Some(tell) = moves.as_ref().filter(|_| first == 0) {
        tell.say(Download::Begins);
    }
    let moves = moves.map(|tell| (tell, Instant::now()));
    build(response, Body::new(FileBody { state: Reading::Idle(file), left: count, moves, ended }))
}

/// Tells the fleet that a machine downloads its boot program.
#[derive(Clone)]
struct Tell {
    app: App,
    peer: Peer,
    hash: String,
}

#[derive(Clone, Copy)]
enum Download {
    Begins,
    Moves,
    Ends,
}

impl Tell {
    fn say(&self, what: Download) {
        let Peer::Tcp { from, .. } = self.peer else { return };
        let std::net::IpAddr::V4(address) = from.ip().to_canonical() else { return };
        let Some((mac, id)) = self.app.net.as_ref().and_then(|n| n.machine_at(address)) else { return };
        let (control, hash) = (self.app.control.clone(), self.hash.clone());
        tokio::spawn(async move {
            let recorded = match what {
                Download::Begins => control.downloads(Some(mac), id.as_ref(), &hash, false).await,
                Download::Moves => control.takes_bytes(Some(mac), id.as_ref(), Some(&hash)).await,
                Download::Ends => control.downloads(Some(mac), id.as_ref(), &hash, true).await,
            };
            if let Err(error) = recorded {
                tracing::warn!(%error, "a download was not recorded");
            }
        });
    }
}

type ReadResult = io::Result<(File, Bytes)>;

enum Reading {
    Idle(File),
    Busy(Pin<Box<dyn Future<Output = ReadResult> + Send>>),
    /// Read, and not yet given on.
    Rest(File, Bytes),
    Over,
}

/// A part of a file as a body of known length.
struct FileBody {
    state: Reading,
    left: u64,
    /// Whom to tell that it goes on, and when that was told last.
    moves: Option<(Tell, Instant)>,
    ended: Option<Tell>,
}

async fn read(mut file: File, count: usize) -> ReadResult {
    let mut buffer = bytes::BytesMut::with_capacity(count);
    while buffer.len() < count {
        let missing = count - buffer.len();
        let mut limited = (&mut file).take(missing as u64);
        if limited.read_buf(&mut buffer).await? == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file became shorter while it was sent"));
        }
    }
    Ok((file, buffer.freeze()))
}

impl hyper::body::Body for FileBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        loop {
            match std::mem::replace(&mut self.state, Reading::Over) {
                Reading::Over => return Poll::Ready(None),
                Reading::Idle(_) if self.left == 0 => return Poll::Ready(None),
                Reading::Idle(file) => {
                    let count = usize::try_from(self.left).unwrap_or(CHUNK).min(CHUNK);
                    self.state = Reading::Busy(Box::pin(read(file, count)));
                }
                Reading::Busy(mut future) => match future.as_mut().poll(cx) {
                    Poll::Pending => {
                        self.state = Reading::Busy(future);
                        return Poll::Pending;
                    }
                    Poll::Ready(Err(e)) => return Poll::Ready(Some(Err(e))),
                    Poll::Ready(Ok((file, bytes))) => self.state = Reading::Rest(file, bytes),
                },
                Reading::Rest(file, mut bytes) => {
                    let piece = bytes.split_to(bytes.len().min(PIECE));
                    self.left -= piece.len() as u64;
                    self.state = if bytes.is_empty() { Reading::Idle(file) } else { Reading::Rest(file, bytes) };
                    if self.left == 0
                        && let Some(tell) = self.ended.take()
                    {
                        tell.say(Download::Ends);
                    } else if let Some((tell, told)) = &mut self.moves
                        && told.elapsed() >= PROGRESS
                    {
                        *told = Instant::now();
                        tell.say(Download::Moves);
                    }
                    return Poll::Ready(Some(Ok(Frame::data(piece))));
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_exact_forms_are_served() {
        let hash = "ab".repeat(32);
        let efi = served(&format!("/b/{hash}/kiln.efi")).unwrap();
        assert_eq!((efi.content_type, efi.hash.as_deref()), ("application/efi", Some(hash.as_str())));
        assert_eq!(served(&format!("/a/{hash}")).unwrap().path, PathBuf::from(format!("a/{hash}")));
        assert_eq!(served("/metadata/1.root.json").unwrap().hash, None);
        assert!(served(&format!("/targets/minimal/2/{hash}.manifest.json")).unwrap().hash.is_some());
        for bad in [
            "/",
            "/a/",
            "/a/abc",
            "/a/../a",
            "/metadata/",
            "/metadata/..",
            "/metadata/.x.json",
            "/metadata/a/b.json",
            "/metadata/x",
            "/targets/../offline/root.key",
            "/targets/%2e%2e/x.json",
            "/online/director.key",
            "//a",
            "/targets/a//b.json",
            "/state/kiln.db",
            "/a/AB",
            "/targets/.hidden",
            "/targets/x\0.json",
        ] {
            assert_eq!(served(bad), None, "{bad}");
        }
        assert_eq!(served(&format!("/b/{hash}/other.efi")), None);
        assert_eq!(served(&format!("/a/{hash}/x")), None);
    }

    #[tokio::test]
    async fn a_file_is_given_on_in_small_pieces_and_whole() {
        let content: Vec<u8> = (0..600_001_u32).map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1]).collect();
        let path = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(path.path(), &content).unwrap();
        let file = File::open(path.path()).await.unwrap();
        let left = content.len() as u64;
        let mut body = FileBody { state: Reading::Idle(file), left, moves: None, ended: None };
        let mut got = Vec::new();
        while let Some(frame) = std::future::poll_fn(|cx| hyper::body::Body::poll_frame(Pin::new(&mut body), cx)).await
        {
            let piece = frame.unwrap().into_data().unwrap();
            assert!(!piece.is_empty() && piece.len() <= PIECE, "{}", piece.len());
            got.extend_from_slice(&piece);
        }
        assert!(got == content && hyper::body::Body::is_end_stream(&body));
    }

    #[test]
    fn ranges() {
        let part = |first, last| Range::Part { first, last };
        for (value, expected) in [
            ("bytes=0-3", part(0, 3)),
            ("bytes=2-", part(2, 9)),
            ("bytes=-4", part(6, 9)),
            ("bytes=-40", part(0, 9)),
            ("bytes=5-99", part(5, 9)),
            ("bytes=10-", Range::Unsatisfiable),
            ("bytes=10-12", Range::Unsatisfiable),
            ("bytes=-0", Range::Unsatisfiable),
            ("bytes=4-2", Range::Whole),
            ("bytes=0-1,4-5", Range::Whole),
            ("lines=0-1", Range::Whole),
            ("bytes=-", Range::Whole),
        ] {
            assert_eq!(range(Some(value), 10), expected, "{value}");
        }
        assert_eq!(range(Some("bytes=-1"), 0), Range::Unsatisfiable);
        assert_eq!(range(None, 10), Range::Whole);
    }
}
