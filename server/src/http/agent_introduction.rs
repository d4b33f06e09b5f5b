//! The agent API's introductions, and what a machine's screen shows of the server's knowledge.

use super::{App, Peer, text};
use crate::error::{CodeError, ControlError};
use axum::Json;
use axum::body::{Body, to_bytes};
use axum::extract::{Extension, Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use kiln_protocol::{About, INTRODUCTION_LIMIT, Introduction, KeyId, MachineId};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

/// A step takes at most so long to arrive.
const ARRIVAL: Duration = Duration::from_secs(15);

pub(super) async fn introduction(
    State(app): State<App>,
    Extension(peer): Extension<Peer>,
    request: Request<Body>,
) -> Response {
    let Peer::Machine { key, .. } = peer else {
        return text(StatusCode::FORBIDDEN, "only machines that prove their key introduce themselves\n");
    };
    let body = match tokio::time::timeout(ARRIVAL, to_bytes(request.into_body(), INTRODUCTION_LIMIT)).await {
        Ok(Ok(body)) => body,
        Ok(Err(_)) => return text(StatusCode::PAYLOAD_TOO_LARGE, "an introduction has at most 4 KiB\n"),
        Err(_) => return text(StatusCode::REQUEST_TIMEOUT, "the introduction did not arrive within 15 s\n"),
    };
    let step: Introduction = match serde_json::from_slice(&body) {
        Ok(step) => step,
        Err(e) => return text(StatusCode::BAD_REQUEST, format!("not an introduction: {e}\n")),
    };
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
