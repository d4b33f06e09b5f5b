//! HTTP: artifacts, metadata, the operator API and the web page, plain and over TLS; the agent API over mutual TLS; the
//! operator API for this host's own users on the Unix socket.

mod agent;
mod agent_attestation;
mod agent_body;
mod agent_certificate;
mod agent_introduction;
mod agent_log;
mod api;
mod authorize;
mod expected;
mod files;
mod https;
mod limits;
mod listen;
mod login;
mod pace;
mod people;
pub(crate) mod releases;
mod script;
mod secrets;
mod site;
pub mod tls;

pub use agent::router as agent_router;
pub use https::{Certificates, HttpsError, strict};
pub use limits::Limits;
pub use listen::{Listening, Peer, serve_https, serve_tcp, serve_tls, serve_unix};

use crate::control::Control;
use crate::net::BootNet;
use crate::web;
use axum::Router;
use axum::http::{HeaderValue, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use std::sync::Arc;

/// What the handlers share.
#[derive(Clone, Debug)]
pub struct App {
    /// The fleet.
    pub control: Arc<Control>,
    /// Which machine has which address.
    pub net: Option<BootNet>,
    /// What is listened on, for `/api/v1/status`.
    pub listening: Arc<std::sync::Mutex<Vec<Listening>>>,
}

/// The operator API, which each call enters by its access role.
fn operator_api(app: &App) -> Router<App> {
    let reads = api::reads().merge(expected::reads()).merge(releases::reads());
    people::guarded(reads.merge(changes()).merge(secrets::router()).merge(people::router()).merge(login::router()), app)
}

/// What may wait for a second person.
fn changes() -> Router<App> {
    api::changes().merge(expected::changes()).merge(releases::changes())
}

/// Everything that TCP serves, plain or over TLS.
pub fn public_router(app: App) -> Router {
    Router::new()
        .route("/", get(page))
        .route("/m/{machine}", get(page))
        .route("/app.js", get(page))
        .route("/actions.js", get(page))
        .route("/people.js", get(page))
        .route("/about.js", get(page))
        .route("/style.css", get(page))
        .route("/boot.ipxe", get(script::script))
        .merge(site::router())
        .merge(operator_api(&app))
        .fallback(files::serve)
        .with_state(app)
}

/// The web page's files.
async fn page(uri: Uri) -> Response {
    let Some(asset) = web::asset(uri.path()) else { return text(StatusCode::NOT_FOUND, "no such file\n") };
    let headers = [
        (header::CONTENT_TYPE, asset.content_type),
        (header::CONTENT_SECURITY_POLICY, web::CONTENT_SECURITY_POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
        (header::HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
        (header::HeaderName::from_static("permissions-policy"), "camera=(), geolocation=(), microphone=()"),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, asset.body).into_response()
}

/// Everything that the Unix socket serves.
pub fn socket_router(app: App) -> Router {
    operator_api(&app).fallback(api::not_found).with_state(app)
}

/// A plain-text answer.
pub(crate) fn text(status: StatusCode, body: impl Into<String>) -> Response {
    let mut response = (status, body.into()).into_response();
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}
