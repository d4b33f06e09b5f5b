//! The agent API's proofs of what machines booted.

use super::agent_body::{Posted, json};
use super::api::ApiError;
use super::{App, Peer, text};
use axum::Json;
use axum::body::Body;
use axum::extract::{Extension, Request, State};
use axum::response::{IntoResponse, Response};
use kiln_protocol::{ATTESTATION_LIMIT, Attestation};

pub(super) async fn attestation(
    State(app): State<App>,
    Extension(peer): Extension<Peer>,
    request: Request<Body>,
) -> Response {
    let posted = match json::<Attestation>(&app, peer, request, ATTESTATION_LIMIT, "proof").await {
        Ok(posted) => posted,
        Err(refused) => return refused,
    };
    let Posted { from, key, body: step, .. } = posted;
    match app.control.attest(&key, step).await {
        Ok(answer) => Json(answer).into_response(),
        Err(error) => {
            tracing::warn!(%from, %error, "a proof was not looked at");
            let words = format!("{error}\n");
            text(ApiError::from(error).status(), words)
        }
    }
}
