//! The agent API: reports, and what machines are made of; log lines are beside it.

use super::api::ApiError;
use super::{App, Peer, text};
use crate::error::ControlError;
use crate::receipt::MAX_RECEIPT;
use axum::body::{Body, to_bytes};
use axum::extract::{Extension, Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
use kiln_protocol::{
    INTRODUCTION_PATH, INVENTORY_LIMIT, INVENTORY_PATH, InventoryReport, KeyId, LOG_PATH, RECEIPT_PATH, REPORT_PATH,
    Report,
};
use serde::de::DeserializeOwned;
use std::net::SocketAddr;
use std::time::Duration;

/// Longest report.
const MAX_REPORT: usize = 256 << 10;
/// A report takes at most so long to arrive.
const ARRIVAL: Duration = Duration::from_secs(15);

/// The agent API.
pub fn router(app: App) -> Router {
    Router::new()
        .route(REPORT_PATH, post(report))
        .route(LOG_PATH, post(super::agent_log::log))
        .route(INTRODUCTION_PATH, post(super::agent_introduction::introduction))
        .route(RECEIPT_PATH, post(receipt))
        .route(INVENTORY_PATH, post(inventory))
        .with_state(app)
}

async fn receipt(State(app): State<App>, Extension(peer): Extension<Peer>, request: Request<Body>) -> Response {
    let Peer::Machine { from, key, .. } = peer else {
        return text(StatusCode::FORBIDDEN, "only machines that prove their key bring receipts here\n");
    };
    let body = match tokio::time::timeout(ARRIVAL, to_bytes(request.into_body(), MAX_RECEIPT)).await {
        Ok(Ok(body)) => body,
        Ok(Err(_)) => return text(StatusCode::PAYLOAD_TOO_LARGE, "a receipt has at most 256 KiB\n"),
        Err(_) => return text(StatusCode::REQUEST_TIMEOUT, "the receipt did not arrive within 15 s\n"),
    };
    match app.control.receive(&key, &String::from_utf8_lossy(&body)).await {
        Ok(()) => text(StatusCode::OK, "kept\n"),
        Err(error) => {
            tracing::warn!(%from, %error, "a receipt was not taken");
            let lost = matches!(error, ControlError::Store(_));
            let status = if lost { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::UNPROCESSABLE_ENTITY };
            text(status, format!("{error}\n"))
        }
    }
}

async fn report(State(app): State<App>, Extension(peer): Extension<Peer>, request: Request<Body>) -> Response {
    let (from, to, key, report) = match read::<Report>(peer, request, MAX_REPORT, "report").await {
        Ok(read) => read,
        Err(refused) => return refused,
    };
    let id = report.machine.id.clone();
    match app.control.report(key.clone(), report).await {
        Ok(mut reply) => {
            reply.about = super::agent_introduction::about(&app, &id, &key, to);
            Json(reply).into_response()
        }
        Err(error) => {
            let crowded = matches!(error, ControlError::TooManyUnknown);
            let status = if crowded { StatusCode::TOO_MANY_REQUESTS } else { StatusCode::SERVICE_UNAVAILABLE };
            tracing::warn!(%from, %error, "a report was not answered");
            let mut response = text(status, format!("{error}\n"));
            response.headers_mut().insert(axum::http::header::RETRY_AFTER, axum::http::HeaderValue::from_static("30"));
            response
        }
    }
}

async fn inventory(State(app): State<App>, Extension(peer): Extension<Peer>, request: Request<Body>) -> Response {
    let (from, _, key, report) = match read::<InventoryReport>(peer, request, INVENTORY_LIMIT, "inventory").await {
        Ok(read) => read,
        Err(refused) => return refused,
    };
    match app.control.inventory(&key, report).await {
        Ok(()) => Json(serde_json::json!({})).into_response(),
        Err(error) => {
            tracing::warn!(%from, %error, "an inventory was not taken");
            let words = format!("{error}\n");
            text(ApiError::from(error).status(), words)
        }
    }
}

/// Where what a machine posted came from and went to, the key that the machine proved, and the thing itself.
async fn read<T: DeserializeOwned>(
    peer: Peer,
    request: Request<Body>,
    limit: usize,
    what: &str,
) -> Result<(SocketAddr, Option<SocketAddr>, KeyId, T), Response> {
    let Peer::Machine { from, to, key } = peer else {
        return Err(text(StatusCode::FORBIDDEN, "only machines that prove their key report here\n"));
    };
    let body = match tokio::time::timeout(ARRIVAL, to_bytes(request.into_body(), limit)).await {
        Ok(Ok(body)) => body,
        Ok(Err(_)) => {
            let reason = format!("the {what} has more than {} KiB\n", limit >> 10);
            return Err(text(StatusCode::PAYLOAD_TOO_LARGE, reason));
        }
        Err(_) => {
            let reason = format!("the {what} did not arrive within {} s\n", ARRIVAL.as_secs());
            return Err(text(StatusCode::REQUEST_TIMEOUT, reason));
        }
    };
    let read = serde_json::from_slice(&body);
    read.map(|read| (from, to, key, read)).map_err(|e| text(StatusCode::BAD_REQUEST, format!("no {what}: {e}\n")))
}
