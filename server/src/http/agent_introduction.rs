//! The agent API's introductions, and what a machine's screen shows of the server's knowledge.

use super::agent_body::{Posted, json};
use super::{App, Peer, text};
use crate::error::{CodeError, ControlError};
use axum::Json;
use axum::body::Body;
use axum::extract::{Extension, Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use kiln_protocol::{About, INTRODUCTION_LIMIT, Introduction, KeyId, MachineId};
use std::net::{IpAddr, SocketAddr};

pub(super) async fn introduction(
    State(app): State<App>,
    Extension(peer): Extension<Peer>,
    request: Request<Body>,
) -> Response {
    let posted = match json::<Introduction>(&app, peer, request, INTRODUCTION_LIMIT, "introduction").await {
        Ok(posted) => posted,
        Err(refused) => return refused,
    };
    let Posted { key, body: step, .. } = posted;
    match app.control.introduce(&key, &step) {
        Ok(reply) => Json(reply).into_response(),
        Err(error) => {
            let often = matches!(error, ControlError::Code(CodeError::TooOften));
            text(if often { StatusCode::TOO_MANY_REQUESTS } else { StatusCode::CONFLICT }, format!("{error}\n"))
        }
    }
}

/// For the screen of a machine that came to this address of the agent API.
pub(super) fn about(app: &App, id: &MachineId, key: &KeyId, to: Option<SocketAddr>) -> Option<About> {
    let about = app.control.about(id, key)?;
    let base = app.control.config.page_url.clone().or_else(|| {
        let listening = app.listening.lock().expect("no code panics under this lock");
        let http = listening.iter().find(|line| line.what == "HTTP")?;
        let port = http.address.parse::<SocketAddr>().ok()?.port();
        let host = match to?.ip() {
            IpAddr::V4(ip) => ip.to_string(),
            IpAddr::V6(ip) => ip.to_ipv4_mapped().map_or_else(|| format!("[{ip}]"), |ip| ip.to_string()),
        };
        Some(format!("http://{host}:{port}"))
    });
    let page = base.map(|base| format!("{base}/m/{}", about.name));
    Some(About { page, ..about })
}
