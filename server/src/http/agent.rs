//! The agent API: reports, and what machines are made of; log lines are beside it.

use super::agent_body::{Posted, bytes, json};
use super::api::ApiError;
use super::{App, Peer, text};
use crate::error::ControlError;
use crate::receipt::MAX_RECEIPT;
use axum::body::Body;
use axum::extract::{Extension, Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
use kiln_protocol::{
    ATTESTATION_PATH, CERTIFICATE_PATH, INTRODUCTION_PATH, INVENTORY_LIMIT, INVENTORY_PATH, InventoryReport, LOG_PATH,
    RECEIPT_PATH, REPORT_PATH, Report,
};

/// Longest report.
const MAX_REPORT: usize = 256 << 10;

/// The agent API.
pub fn router(app: App) -> Router {
    Router::new()
        .route(REPORT_PATH, post(report))
        .route(LOG_PATH, post(super::agent_log::log))
        .route(INTRODUCTION_PATH, post(super::agent_introduction::introduction))
        .route(ATTESTATION_PATH, post(super::agent_attestation::attestation))
        .route(CERTIFICATE_PATH, post(super::agent_certificate::certificate))
        .route(RECEIPT_PATH, post(receipt))
        .route(INVENTORY_PATH, post(inventory))
        .with_state(app)
}

async fn receipt(State(app): State<App>, Extension(peer): Extension<Peer>, request: Request<Body>) -> Response {
    let Posted { from, key, body, .. } = match bytes(&app, peer, request, MAX_RECEIPT, "receipt").await {
        Ok(posted) => posted,
        Err(refused) => return refused,
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
    let posted = match json::<Report>(&app, peer, request, MAX_REPORT, "report").await {
        Ok(posted) => posted,
        Err(refused) => return refused,
    };
    let Posted { from, to, key, body: report } = posted;
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
    let posted = match json::<InventoryReport>(&app, peer, request, INVENTORY_LIMIT, "inventory").await {
        Ok(posted) => posted,
        Err(refused) => return refused,
    };
    let Posted { from, key, body: report, .. } = posted;
    match app.control.inventory(&key, report).await {
        Ok(()) => Json(serde_json::json!({})).into_response(),
        Err(error) => {
            tracing::warn!(%from, %error, "an inventory was not taken");
            let words = format!("{error}\n");
            text(ApiError::from(error).status(), words)
        }
    }
}
