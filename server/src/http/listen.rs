//! Accepting connections: TCP, TLS, Unix. Bounded in number, with deadlines, and ended gracefully.

use axum::Router;
use axum::extract::Extension;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use kiln_protocol::KeyId;
use kiln_release::certificate::certificate_key_id;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_rustls::TlsAcceptor;

/// Connections at once, each of TCP and TLS.
const MAX_CONNECTIONS: usize = 8_000;
/// A client that sends no request for so long is let go.
const IDLE: Duration = Duration::from_secs(75);
/// A TLS handshake takes at most so long.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Bytes that nobody acknowledges for so long end the connection: a machine that lost its power.
const UNACKNOWLEDGED: Duration = Duration::from_secs(60);
/// What runs gets so long to end.
const GRACE: Duration = Duration::from_secs(5);

/// Who is at the other end.
#[derive(Debug, Clone)]
pub enum Peer {
    /// Anybody.
    Tcp {
        /// Its address.
        from: SocketAddr,
        /// The address it came to.
        to: SocketAddr,
    },
    /// A machine that proved its key.
    Machine {
        /// Its address.
        from: SocketAddr,
        /// Its key id.
        key: KeyId,
    },
    /// A user of this host.
    Unix {
        /// By the kernel's word.
        uid: u32,
    },
}

/// One thing that is listened on.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Listening {
    /// What.
    pub what: String,
    /// Where.
    pub address: String,
    /// Why, for people.
    pub why: String,
}

/// Serves plain HTTP for ever, until told to stop.
pub async fn serve_tcp(listener: TcpListener, router: Router, stop: watch::Receiver<bool>) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let graceful = GracefulShutdown::new();
    while let Some((stream, from, slot)) = accept(&listener, &slots, &stop).await {
        let Ok(to) = stream.local_addr() else { continue };
        spawn(stream, router.clone(), Peer::Tcp { from, to }, &graceful, Some(slot));
    }
    end(graceful).await;
}

/// Serves the agent API for ever.
pub async fn serve_tls(listener: TcpListener, acceptor: TlsAcceptor, router: Router, stop: watch::Receiver<bool>) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let graceful = Arc::new(GracefulShutdown::new());
    while let Some((stream, from, slot)) = accept(&listener, &slots, &stop).await {
        let (acceptor, router, watcher) = (acceptor.clone(), router.clone(), graceful.watcher());
        tokio::spawn(async move {
            let Ok(Ok(stream)) = tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await else {
                tracing::debug!(%from, "TLS handshake failed");
                return;
            };
            let certificate = stream.get_ref().1.peer_certificates().and_then(|c| c.first());
            let key = certificate.and_then(|c| certificate_key_id(c).ok()).and_then(|k| k.parse::<KeyId>().ok());
            // The verifier let nobody in without a certificate that has a key id.
            let Some(key) = key else { return };
            let service = TowerToHyperService::new(router.layer(Extension(Peer::Machine { from, key })));
            let connection = builder().serve_connection(TokioIo::new(stream), service);
            let _ = watcher.watch(connection).await;
            drop(slot);
        });
    }
    if let Ok(graceful) = Arc::try_unwrap(graceful) {
        end(graceful).await;
    }
}

/// Serves the Unix socket for ever.
pub async fn serve_unix(listener: UnixListener, router: Router, mut stop: watch::Receiver<bool>) {
    let graceful = GracefulShutdown::new();
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stop.wait_for(|s| *s) => break,
        };
        match stream.and_then(|(stream, _)| stream.peer_cred().map(|cred| (stream, cred.uid()))) {
            Ok((stream, uid)) => spawn(stream, router.clone(), Peer::Unix { uid }, &graceful, None),
            Err(error) => pause(&error).await,
        }
    }
    end(graceful).await;
}

async fn accept(
    listener: &TcpListener,
    slots: &Arc<Semaphore>,
    stop: &watch::Receiver<bool>,
) -> Option<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
    let mut stop = stop.clone();
    loop {
        // Beyond the limit new clients wait in the kernel's queue.
        let slot = slots.clone().acquire_owned().await.ok()?;
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stop.wait_for(|s| *s) => return None,
        };
        match accepted {
            Ok((stream, from)) => {
                let _ = stream.set_nodelay(true);
                let socket = socket2::SockRef::from(&stream);
                let _ = socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED));
                let _ = socket.set_keepalive(true);
                return Some((stream, from, slot));
            }
            Err(error) => pause(&error).await,
        }
    }
}

/// Out of descriptors, or the client is gone already: not a reason to end, nor to spin.
async fn pause(error: &std::io::Error) {
    tracing::warn!(%error, "a connection could not be accepted");
    tokio::time::sleep(Duration::from_millis(50)).await;
}

fn builder() -> hyper::server::conn::http1::Builder {
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(IDLE).max_headers(64);
    builder
}

fn spawn<S>(stream: S, router: Router, peer: Peer, graceful: &GracefulShutdown, slot: Option<OwnedSemaphorePermit>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = TowerToHyperService::new(router.layer(Extension(peer)));
    let connection = graceful.watch(builder().serve_connection(TokioIo::new(stream), service));
    tokio::spawn(async move {
        let _ = connection.await;
        drop(slot);
    });
}

async fn end(graceful: GracefulShutdown) {
    if tokio::time::timeout(GRACE, graceful.shutdown()).await.is_err() {
        tracing::debug!("connections that did not end in time are cut");
    }
}
