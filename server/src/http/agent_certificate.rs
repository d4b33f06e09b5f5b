//! The agent API's certificates for machines.

use super::agent_body::{Posted, json};
use super::api::ApiError;
use super::{App, Peer, text};
use axum::Json;
use axum::body::Body;
use axum::extract::{Extension, Request, State};
use axum::response::{IntoResponse, Response};
use kiln_protocol::{CERTIFICATE_LIMIT, CertificateRequest};

pub(super) async fn certificate(
    State(app): State<App>,
    Extension(peer): Extension<Peer>,
    request: Request<Body>,
) -> Response {
    let posted = match json::<CertificateRequest>(&app, peer, request, CERTIFICATE_LIMIT, "certificate request").await {
        Ok(posted) => posted,
        Err(refused) => return refused,
    };
    let Posted { from, key, body: request, .. } = posted;
    match app.control.certify(&key, &request).await {
        Ok(answer) => Json(answer).into_response(),
        Err(error) => {
            tracing::warn!(%from, %error, "no certificate was issued");
            let words = format!("{error}\n");
            text(ApiError::from(error).status(), words)
        }
    }
}
