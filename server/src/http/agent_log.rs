//! The agent API's second call: log lines.

use super::agent_body::{Posted, json};
use super::{App, Peer, text};
use crate::error::{ControlError, LogError};
use axum::Json;
use axum::body::Body;
use axum::extract::{Extension, Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use kiln_protocol::{LOG_LIMIT, LogBatch};

pub(super) async fn log(State(app): State<App>, Extension(peer): Extension<Peer>, request: Request<Body>) -> Response {
    let posted = match json::<LogBatch>(&app, peer, request, LOG_LIMIT, "batch of log lines").await {
        Ok(posted) => posted,
        Err(refused) => return refused,
    };
    let Posted { from, key, body: batch, .. } = posted;
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
