//! What a machine posts to the agent API, read in one way for all of it: who posts has proved a key that nobody took away,
//! and the body is bounded in length and time.

use super::{App, Peer, text};
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::Request;
use axum::http::StatusCode;
use axum::response::Response;
use kiln_protocol::{KeyId, cut_at, printable};
use serde::de::DeserializeOwned;
use std::net::SocketAddr;
use std::time::Duration;

/// A body takes at most so long to arrive.
const ARRIVAL: Duration = Duration::from_secs(15);

/// A machine that posts.
#[derive(Debug)]
pub(super) struct Posted<T> {
    /// Its address.
    pub(super) from: SocketAddr,
    /// The address it came to.
    pub(super) to: Option<SocketAddr>,
    /// The key that it proved.
    pub(super) key: KeyId,
    /// What it posted.
    pub(super) body: T,
}

/// The bytes of a body that has at most `limit`. `what` is what it should be, for people.
pub(super) async fn bytes(
    app: &App,
    peer: Peer,
    request: Request<Body>,
    limit: usize,
    what: &str,
) -> Result<Posted<Bytes>, Response> {
    let Peer::Machine { from, to, key } = peer else {
        let reason = format!("only machines that prove their key bring {what} here\n");
        return Err(text(StatusCode::FORBIDDEN, reason));
    };
    // Asked for each request: a connection that was there before the key was taken away is no better.
    if app.control.access.is_revoked(&key) {
        let reason = "this machine's identity key was revoked: it is not heard until it has another, and a person says \
                      that this one is its own\n";
        return Err(text(StatusCode::FORBIDDEN, reason));
    }
    match tokio::time::timeout(ARRIVAL, to_bytes(request.into_body(), limit)).await {
        Ok(Ok(body)) => Ok(Posted { from, to, key, body }),
        Ok(Err(_)) => {
            let reason = format!("{what}: at most {} KiB are taken\n", limit >> 10);
            Err(text(StatusCode::PAYLOAD_TOO_LARGE, reason))
        }
        Err(_) => {
            let reason = format!("{what}: nothing whole arrived within {} s\n", ARRIVAL.as_secs());
            Err(text(StatusCode::REQUEST_TIMEOUT, reason))
        }
    }
}

/// The same, read as JSON.
pub(super) async fn json<T: DeserializeOwned>(
    app: &App,
    peer: Peer,
    request: Request<Body>,
    limit: usize,
    what: &str,
) -> Result<Posted<T>, Response> {
    let Posted { from, to, key, body } = bytes(app, peer, request, limit, what).await?;
    match serde_json::from_slice(&body) {
        Ok(body) => Ok(Posted { from, to, key, body }),
        Err(e) => {
            // It quotes what was posted.
            let reason = printable(cut_at(&e.to_string(), 300));
            Err(text(StatusCode::BAD_REQUEST, format!("this is no {what}: {reason}\n")))
        }
    }
}
