//! One TCP connection that its client may not hold for nothing: a request must arrive, and an answer be taken, in time.
//!
//! Lies beneath TLS and HTTP. A client that waits for the server, as one whose report is held, has nothing to hurry
//! with.

use super::limits::Limits;
use axum::Router;
use axum::body::Body;
use axum::http::{Request, Response};
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::service::Service;
use hyper_util::service::TowerToHyperService;
use socket2::SockRef;
use std::convert::Infallible;
use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep_until};

/// Requests of one connection: their header was read; their answer was handed to the connection.
#[derive(Debug, Default)]
pub(super) struct Exchanges {
    begun: AtomicU64,
    ended: AtomicU64,
}

/// From a request's header to the last byte of its answer.
struct Exchange(Arc<Exchanges>);

impl Exchange {
    fn begin(exchanges: &Arc<Exchanges>) -> Self {
        exchanges.begun.fetch_add(1, Ordering::Relaxed);
        Self(exchanges.clone())
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.0.ended.fetch_add(1, Ordering::Relaxed);
    }
}

/// A router that tells its connection when a request is complete and when its answer is.
pub(super) struct Watched {
    inner: TowerToHyperService<Router>,
    exchanges: Arc<Exchanges>,
}

impl Watched {
    pub(super) fn new(router: Router, exchanges: Arc<Exchanges>) -> Self {
        Self { inner: TowerToHyperService::new(router), exchanges }
    }
}

impl Service<Request<Incoming>> for Watched {
    type Response = Response<Answer>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let exchange = Exchange::begin(&self.exchanges);
        let answer = self.inner.call(request);
        Box::pin(async move { Ok(answer.await?.map(|body| Answer { body, _exchange: exchange })) })
    }
}

/// An answer's body.
pub(super) struct Answer {
    body: Body,
    _exchange: Exchange,
}

impl hyper::body::Body for Answer {
    type Data = bytes::Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Bytes that wait for the client, and what it took of them since.
struct Window {
    end: Instant,
    taken: u64,
    /// When sending is tried although the kernel has not called.
    attempt: Pin<Box<Sleep>>,
}

/// A connection with its deadlines.
pub(super) struct Paced {
    stream: TcpStream,
    limits: Limits,
    exchanges: Arc<Exchanges>,
    /// Requests whose header was complete when it was last looked.
    complete: u64,
    /// When the header that is arriving must be complete.
    header: Option<Pin<Box<Sleep>>>,
    /// Only while the client does not take what there is.
    window: Option<Window>,
}

impl Paced {
    pub(super) fn new(stream: TcpStream, limits: Limits, exchanges: Arc<Exchanges>) -> Self {
        Self { stream, limits, exchanges, complete: 0, header: None, window: None }
    }

    /// From here on the first request is awaited.
    pub(super) fn await_request(&mut self) {
        self.header = Some(Box::pin(sleep_until(Instant::now() + self.limits.header)));
    }

    /// A header in time is no longer waited for.
    fn look(&mut self) {
        let begun = self.exchanges.begun.load(Ordering::Relaxed);
        if begun != self.complete {
            self.complete = begun;
            self.header = None;
        }
    }

    fn least(&self) -> u64 {
        u64::from(self.limits.min_rate) * self.limits.rate_window.as_millis().try_into().unwrap_or(u64::MAX) / 1000
    }

    /// Bytes went; `called` means that the kernel had room for a good part of them.
    fn took(&mut self, bytes: usize, all: bool, called: bool) -> io::Result<usize> {
        let (least, now) = (self.least(), Instant::now());
        if let Some(window) = &mut self.window {
            window.taken += bytes as u64;
            if now >= window.end && window.taken < least {
                return Err(self.too_slow());
            }
            if all && called {
                self.window = None;
            } else if now >= window.end {
                (window.end, window.taken) = (now + self.limits.rate_window, 0);
            }
        }
        Ok(bytes)
    }

    /// Nothing goes. The kernel calls when a third of its buffer is free, which at the lowest rate takes far longer
    /// than the window; so now and then sending is simply tried.
    fn blocked(
        &mut self,
        cx: &mut Context<'_>,
        length: usize,
        send: impl Fn(&SockRef<'_>) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        let (least, limits) = (self.least(), self.limits);
        let window = self.window.get_or_insert_with(|| {
            let now = Instant::now();
            let attempt = Box::pin(sleep_until(now + limits.rate_window / 4));
            Window { end: now + limits.rate_window, taken: 0, attempt }
        });
        while window.attempt.as_mut().poll(cx).is_ready() {
            let now = Instant::now();
            window.attempt.as_mut().reset(now + limits.rate_window / 4);
            match send(&SockRef::from(&self.stream)) {
                Ok(sent) => return Poll::Ready(self.took(sent, sent == length, false)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
            if now >= window.end {
                if window.taken < least {
                    return Poll::Ready(Err(self.too_slow()));
                }
                (window.end, window.taken) = (now + limits.rate_window, 0);
            }
        }
        Poll::Pending
    }

    fn too_slow(&self) -> io::Error {
        let Limits { min_rate, rate_window, .. } = self.limits;
        let text = format!("the client took less than {min_rate} bytes/s over {} s", rate_window.as_secs());
        io::Error::new(io::ErrorKind::TimedOut, text)
    }
}

impl AsyncRead for Paced {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.look();
        let before = buffer.filled().len();
        let busy = this.exchanges.ended.load(Ordering::Relaxed) != this.complete;
        match Pin::new(&mut this.stream).poll_read(cx, buffer) {
            Poll::Ready(Ok(())) => {
                if !busy && this.header.is_none() && buffer.filled().len() > before {
                    this.await_request();
                }
                Poll::Ready(Ok(()))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Pending => {
                let Some(deadline) = &mut this.header else { return Poll::Pending };
                std::task::ready!(deadline.as_mut().poll(cx));
                let text = format!("no whole request within {} s", this.limits.header.as_secs());
                Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, text)))
            }
        }
    }
}

impl AsyncWrite for Paced {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        match Pin::new(&mut this.stream).poll_write(cx, bytes) {
            Poll::Ready(Ok(sent)) => Poll::Ready(this.took(sent, sent == bytes.len(), true)),
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Pending => this.blocked(cx, bytes.len(), |socket| socket.send(bytes)),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let length = parts.iter().map(|part| part.len()).sum();
        match Pin::new(&mut this.stream).poll_write_vectored(cx, parts) {
            Poll::Ready(Ok(sent)) => Poll::Ready(this.took(sent, sent == length, true)),
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Pending => this.blocked(cx, length, |socket| socket.send_vectored(parts)),
        }
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}
