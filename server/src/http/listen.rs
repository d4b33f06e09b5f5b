//! Accepting connections: TCP, TLS, Unix. Bounded in number and time, for all and for each address, and ended
//! gracefully.

use super::limits::{Gate, Limits, Ticket};
use super::pace::{Exchanges, Paced, Watched};
use crate::access::Caller;
use axum::Router;
use axum::extract::Extension;
use hyper::server::conn::http1::Builder;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use kiln_protocol::KeyId;
use kiln_release::certificate::certificate_key_id;
use rustls::ServerConnection;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;

/// So much may wait in the kernel for a client that takes its time.
const UNSENT: u32 = 64 << 10;
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
        /// Nobody between can read or change what it says.
        tls: bool,
    },
    /// A person or program that was let in.
    Person(Caller),
    /// A machine that proved its key.
    Machine {
        /// Its address.
        from: SocketAddr,
        /// The address it came to.
        to: Option<SocketAddr>,
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
pub async fn serve_tcp(listener: TcpListener, router: Router, limits: Limits, stop: watch::Receiver<bool>) {
    let gate = Gate::new("http", limits);
    let graceful = GracefulShutdown::new();
    while let Some((stream, from, ticket)) = accept(&listener, &gate, &stop).await {
        let Ok(to) = stream.local_addr() else { continue };
        let exchanges = Arc::new(Exchanges::default());
        let mut stream = Paced::new(stream, limits, exchanges.clone());
        stream.await_request();
        let service = Watched::new(router.clone().layer(Extension(Peer::Tcp { from, to, tls: false })), exchanges);
        let connection = graceful.watch(builder(&limits).serve_connection(TokioIo::new(stream), service));
        tokio::spawn(async move {
            ended(from, connection.await);
            drop(ticket);
        });
    }
    end(graceful).await;
}

/// Serves the agent API for ever.
pub async fn serve_tls(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    router: Router,
    limits: Limits,
    stop: watch::Receiver<bool>,
) {
    let machine = |from, to, tls: &ServerConnection| {
        let certificate = tls.peer_certificates().and_then(|c| c.first());
        // The verifier let nobody in without a certificate that has a key id.
        let key = certificate.and_then(|c| certificate_key_id(c).ok())?.parse::<KeyId>().ok()?;
        Some(Peer::Machine { from, to: Some(to), key })
    };
    over_tls(listener, acceptor, router, limits, ("agent_api", machine), stop).await;
}

/// Serves people and programs over TLS for ever.
pub async fn serve_https(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    router: Router,
    limits: Limits,
    stop: watch::Receiver<bool>,
) {
    let anybody = |from, to, _: &ServerConnection| Some(Peer::Tcp { from, to, tls: true });
    over_tls(listener, acceptor, router, limits, ("https", anybody), stop).await;
}

/// Who a TLS connection belongs to.
type Identify = fn(SocketAddr, SocketAddr, &ServerConnection) -> Option<Peer>;

async fn over_tls(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    router: Router,
    limits: Limits,
    (table, identify): (&'static str, Identify),
    stop: watch::Receiver<bool>,
) {
    let gate = Gate::new(table, limits);
    let graceful = Arc::new(GracefulShutdown::new());
    while let Some((stream, from, ticket)) = accept(&listener, &gate, &stop).await {
        let Ok(to) = stream.local_addr() else { continue };
        let (acceptor, router, watcher) = (acceptor.clone(), router.clone(), graceful.watcher());
        tokio::spawn(async move {
            let exchanges = Arc::new(Exchanges::default());
            let handshake = acceptor.accept(Paced::new(stream, limits, exchanges.clone()));
            let Ok(Ok(mut stream)) = tokio::time::timeout(limits.handshake, handshake).await else {
                tracing::debug!(%from, "TLS handshake failed");
                return;
            };
            let Some(peer) = identify(from, to, stream.get_ref().1) else { return };
            stream.get_mut().0.await_request();
            let service = Watched::new(router.layer(Extension(peer)), exchanges);
            let connection = builder(&limits).serve_connection(TokioIo::new(stream), service);
            ended(from, watcher.watch(connection).await);
            drop(ticket);
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
            Ok((stream, uid)) => {
                let service = TowerToHyperService::new(router.clone().layer(Extension(Peer::Unix { uid })));
                let connection = builder(&Limits::default()).serve_connection(TokioIo::new(stream), service);
                tokio::spawn(graceful.watch(connection));
            }
            Err(error) => pause(&error).await,
        }
    }
    end(graceful).await;
}

async fn accept(
    listener: &TcpListener,
    gate: &Gate,
    stop: &watch::Receiver<bool>,
) -> Option<(TcpStream, SocketAddr, Ticket)> {
    let mut stop = stop.clone();
    loop {
        // Beyond the limit new clients wait in the kernel's queue.
        let next = async {
            let slot = gate.room().await;
            listener.accept().await.map(|(stream, from)| (stream, from, slot))
        };
        let accepted = tokio::select! {
            accepted = next => accepted,
            _ = stop.wait_for(|s| *s) => return None,
        };
        match accepted {
            Ok((stream, from, slot)) => {
                let Some(ticket) = gate.admit(from.ip(), slot) else { continue };
                let _ = stream.set_nodelay(true);
                let socket = socket2::SockRef::from(&stream);
                let _ = socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED));
                // What is written is nearly on its way: a download's progress is the client's, not the kernel's memory's.
                let _ = socket.set_tcp_notsent_lowat(UNSENT);
                let _ = socket.set_keepalive(true);
                return Some((stream, from, ticket));
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

fn builder(limits: &Limits) -> Builder {
    let mut builder = Builder::new();
    // Counted from the end of one answer to the end of the next request's header, so that it bounds both.
    builder.timer(TokioTimer::new()).header_read_timeout(limits.idle).max_headers(64);
    builder
}

fn ended(from: SocketAddr, result: hyper::Result<()>) {
    if let Err(error) = result {
        tracing::debug!(%from, "a connection ended: {}", kiln_release::with_causes(&error));
    }
}

async fn end(graceful: GracefulShutdown) {
    if tokio::time::timeout(GRACE, graceful.shutdown()).await.is_err() {
        tracing::debug!("connections that did not end in time are cut");
    }
}
