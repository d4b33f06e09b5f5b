//! Log-in of people for the web page: with a token, or with the identity provider. Over TLS only. A session is a
//! server-side record; the browser holds a random id in a cookie that no script reads and no other site's page sends.

use super::api::ApiError;
use super::authorize::{CSRF_HEADER, SESSION_COOKIE, cookie};
use super::{App, Peer};
use crate::access::{Caller, csrf_of};
use crate::error::{AccessError, OidcError};
use crate::oidc::Answer;
use axum::extract::rejection::JsonRejection;
use axum::extract::{Extension, Query, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::json;
use std::net::IpAddr;

/// The browser that began a log-in with the provider.
const LOGIN_COOKIE: &str = "__Host-kiln-login";

/// How people become known.
pub(super) fn router() -> Router<App> {
    Router::new()
        .route("/api/v1/session", get(session).post(with_token).delete(leave))
        .route("/login/oidc", get(begin))
        .route("/login/oidc/callback", get(callback))
}

/// Where people log in: the address, if it is encrypted. The caller was let in, so its own address stands in it.
fn place(caller: &Caller, tls: bool) -> Result<IpAddr, AccessError> {
    if !tls {
        return Err(AccessError::LogInNeedsTls);
    }
    caller.origin.parse().map_err(|_| AccessError::LogInNeedsTls)
}

/// What the listener said of the connection, beside who was let in on it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Encrypted(pub(super) bool);

async fn session(State(app): State<App>, Extension(peer): Extension<Peer>, headers: HeaderMap) -> Response {
    let caller = super::authorize::caller(&peer);
    let csrf = caller.is_session().then(|| cookie(&headers, SESSION_COOKIE).map(csrf_of)).flatten();
    let known = caller.role.map(|_| caller.name.clone());
    Json(json!({
        "name": known,
        "role": caller.role,
        "csrf": csrf,
        "csrf_header": CSRF_HEADER,
        "oidc": app.control.oidc.is_some(),
        "anonymous_reads": app.control.config.access.anonymous_reads,
    }))
    .into_response()
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct WithToken {
    token: String,
}

async fn with_token(
    State(app): State<App>,
    Extension(peer): Extension<Peer>,
    Extension(Encrypted(tls)): Extension<Encrypted>,
    headers: HeaderMap,
    body: Result<Json<WithToken>, JsonRejection>,
) -> Result<Response, ApiError> {
    let caller = super::authorize::caller(&peer);
    let from = place(&caller, tls)?;
    // Nobody is logged in as another by another site's page.
    let host = headers.get(header::HOST).and_then(|h| h.to_str().ok()).unwrap_or_default();
    if headers.get(header::ORIGIN).is_some_and(|origin| *origin != format!("https://{host}")) {
        return Err(AccessError::Forged.into());
    }
    let Json(WithToken { token }) = body?;
    let known = app.control.token_of(token.trim(), from, true)?;
    let id = app.control.session_with_token(&known).await?;
    Ok((StatusCode::OK, [(header::SET_COOKIE, set_cookie(SESSION_COOKIE, &id, None))], Json(json!({}))).into_response())
}

async fn leave(State(app): State<App>, Extension(peer): Extension<Peer>) -> Result<Response, ApiError> {
    app.control.session_end(&super::authorize::caller(&peer)).await?;
    let gone = set_cookie(SESSION_COOKIE, "", Some(0));
    Ok((StatusCode::OK, [(header::SET_COOKIE, gone)], Json(json!({}))).into_response())
}

/// Lax: a link to this page from elsewhere finds the person logged in; what changes something also needs the page's own
/// word. The prefix has the browser hold on to Secure, this host and this path.
fn set_cookie(name: &str, value: &str, seconds: Option<u32>) -> HeaderValue {
    let age = seconds.map_or_else(String::new, |s| format!("; Max-Age={s}"));
    let text = format!("{name}={value}; Path=/; Secure; HttpOnly; SameSite=Lax{age}");
    HeaderValue::from_str(&text).expect("names and hex digits are visible ASCII")
}

async fn begin(
    State(app): State<App>,
    Extension(peer): Extension<Peer>,
    Extension(Encrypted(tls)): Extension<Encrypted>,
) -> Result<Response, ApiError> {
    let from = place(&super::authorize::caller(&peer), tls)?;
    let (url, browser) = app.control.oidc_begin(from).await?;
    let url = HeaderValue::from_str(&url).map_err(|_| OidcError::Provider {
        what: "the discovery document",
        reason: "its authorization endpoint is no URL".into(),
    });
    let headers = [
        (header::LOCATION, url.map_err(AccessError::from)?),
        (header::SET_COOKIE, set_cookie(LOGIN_COOKIE, &browser, Some(600))),
    ];
    Ok((StatusCode::SEE_OTHER, headers).into_response())
}

async fn callback(
    State(app): State<App>,
    Extension(peer): Extension<Peer>,
    Extension(Encrypted(tls)): Extension<Encrypted>,
    headers: HeaderMap,
    Query(answer): Query<Answer>,
) -> Result<Response, ApiError> {
    let from = place(&super::authorize::caller(&peer), tls)?;
    let browser = cookie(&headers, LOGIN_COOKIE).unwrap_or_default();
    let id = app.control.oidc_end(from, browser, &answer).await?;
    let mut response = (StatusCode::SEE_OTHER, [(header::LOCATION, HeaderValue::from_static("/"))]).into_response();
    for cookie in [set_cookie(SESSION_COOKIE, &id, None), set_cookie(LOGIN_COOKIE, "", Some(0))] {
        response.headers_mut().append(header::SET_COOKIE, cookie);
    }
    Ok(response)
}

pub(super) fn status_of(e: &OidcError) -> StatusCode {
    match e {
        OidcError::None => StatusCode::NOT_FOUND,
        OidcError::Provider { .. } => StatusCode::BAD_GATEWAY,
        OidcError::Away { .. } | OidcError::Busy { .. } => StatusCode::SERVICE_UNAVAILABLE,
        OidcError::Refused(_) | OidcError::State | OidcError::Token(_) | OidcError::NoGroup { .. } => {
            StatusCode::FORBIDDEN
        }
    }
}
