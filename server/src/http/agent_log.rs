//! The agent API's second call: log lines.

use super::{App, Peer, text};
use crate::error::{ControlError, LogError};
use axum::Json;
use axum::body::{Body, to_bytes};
use axum::extract::{Extension, Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use kiln_protocol::{LOG_LIMIT, LogBatch};
use std::time::Duration;

/// A batch takes at most so long to arrive.
const ARRIVAL: Duration = Duration::from_secs(15);

pub(super) async fn log(State(app): State<App>, Extension(peer): Extension<Peer>, request: Request<Body>) -> Response {
    let Peer::Machine { from, key, .. } = peer else {
        return text(StatusCode::FORBIDDEN, "only machines that prove their key send log lines\n");
    };
    let body = match tokio::time::timeout(ARRIVAL, to_bytes(request.into_body(), LOG_LIMIT)).await {
        Ok(Ok(body)) => body,
        Ok(Err(_)) => return text(StatusCode::PAYLOAD_TOO_LARGE, "a batch of log lines has at most 512 KiB\n"),
        Err(_) => return text(StatusCode::REQUEST_TIMEOUT, "the log lines did not arrive within 15 s\n"),
    };
    let batch: LogBatch = match serde_json::from_slice(&body) {
        Ok(batch) => batch,
        Err(e) => return text(StatusCode::BAD_REQUEST, format!("not a batch of log lines: {e}\n")),
    };
    match app.control.take_log(&key, batch).await {
        Ok(reply) => Json(reply).into_response(),
        Err(error) => {
            let status = if matches!(error, ControlError::Log(LogError::NotReported)) {
                StatusCode::CONFLICT
            } else if matches!(error, ControlError::Log(LogError::BootId | LogError::TooMany { .. })) {
                StatusCode::UNPROCESSABLE_ENTITY
            } else {
                tracing::warn!(%from, %error, "log lines were not kept");
                StatusCode::SERVICE_UNAVAILABLE
            };
            text(status, format!("{error}\n"))
        }
    }
}
