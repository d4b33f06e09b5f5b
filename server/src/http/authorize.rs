//! Lets calls of the operator API in: who calls, whether its access role suffices, whether the call comes from the page
//! it says it comes from, and whether a second person is needed. What is refused here, or fails, is recorded.

use super::api::ApiError;
use super::login::Encrypted;
use super::{App, Peer, text};
use crate::access::calls::{self, Call, Kind};
use crate::access::{Caller, csrf_of};
use crate::audit::Line;
use crate::control::{Asked, MACHINES, MAX_PENDING_BODY, now_ms};
use crate::error::AccessError;
use axum::Json;
use axum::body::{Body, to_bytes};
use axum::extract::{MatchedPath, Request, State};
use axum::http::uri::PathAndQuery;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use kiln_release::hex;
use std::net::IpAddr;

/// The session's cookie. The prefix has browsers refuse it without Secure, or for another host or path (RFC 6265bis).
pub(super) const SESSION_COOKIE: &str = "__Host-kiln";
/// The header by which the page shows that it is this server's own.
pub(super) const CSRF_HEADER: &str = "x-kiln-csrf";

/// Why a call failed, for the audit log.
#[derive(Debug, Clone)]
pub(super) struct Failure(pub(super) String);

/// Every call of the operator API passes here. Its answers are for whoever called, and no page of another site reads them.
pub(super) async fn authorize(State(app): State<App>, request: Request, next: Next) -> Response {
    let mut answer = let_in(app, request, next).await;
    for (name, value) in [
        ("cache-control", "no-store"),
        ("x-content-type-options", "nosniff"),
        ("referrer-policy", "no-referrer"),
        ("cross-origin-resource-policy", "same-origin"),
        ("content-security-policy", "default-src 'none'; frame-ancestors 'none'"),
    ] {
        answer.headers_mut().insert(HeaderName::from_static(name), HeaderValue::from_static(value));
    }
    answer
}

async fn let_in(app: App, mut request: Request, next: Next) -> Response {
    let method = request.method().as_str().to_owned();
    let path = request.extensions().get::<MatchedPath>().map_or_else(String::new, |path| path.as_str().to_owned());
    let Some(call) = calls::find(&method, &path) else {
        return ApiError::from(AccessError::Unlisted { method, path }).into_response();
    };
    let Some(peer) = request.extensions().get::<Peer>().cloned() else {
        return text(StatusCode::FORBIDDEN, "nobody knows who calls\n");
    };
    let (caller, csrf) = match identify(&app, &peer, request.headers(), call) {
        Ok(known) => known,
        Err(error) => return ApiError::from(error).into_response(),
    };
    let uri = request.uri().path().to_owned();
    let refused = |error: AccessError| {
        // Whoever has no credential fills no log.
        if call.changes() && caller.role.is_some() {
            note(&app, &caller, &method, &uri, error.to_string());
        }
        ApiError::from(error).into_response()
    };
    if let Err(error) = may(&app, &caller, call) {
        return refused(error);
    }
    if let Some(csrf) = &csrf
        && call.method != "GET"
        && let Err(error) = own_page(request.headers(), csrf)
    {
        return refused(error);
    }
    let tls = matches!(peer, Peer::Tcp { tls: true, .. });
    request.extensions_mut().insert(Encrypted(tls));
    request.extensions_mut().insert(Peer::Person(caller.clone()));
    if !call.changes() {
        return next.run(request).await;
    }
    let request = match second_person(&app, &caller, call, &uri, request).await {
        Ok(request) => request,
        // Kept for a second person, which has its own record, or refused.
        Err(answer) => {
            record(&app, &caller, &method, &uri, &answer);
            return answer;
        }
    };
    let answer = next.run(request).await;
    record(&app, &caller, &method, &uri, &answer);
    answer
}

/// Who calls, and what the page must show, where a session is what it is known by.
fn identify(app: &App, peer: &Peer, headers: &HeaderMap, call: &Call) -> Result<(Caller, Option<String>), AccessError> {
    let (from, tls) = match peer {
        Peer::Unix { uid } => return Ok((Caller::local(*uid), None)),
        Peer::Person(caller) => return Ok((caller.clone(), None)),
        Peer::Tcp { from, tls, .. } => (from.ip(), *tls),
        // A machine's key opens the agent API, and nothing here.
        Peer::Machine { from, .. } => return Ok((Caller::nobody(from.ip()), None)),
    };
    if let Some(value) = headers.get(header::AUTHORIZATION) {
        let token = value.to_str().ok().and_then(|v| v.strip_prefix("Bearer ")).unwrap_or_default().trim();
        return Ok((app.control.token_of(token, from, tls || is_local(from))?, None));
    }
    if let Some(id) = cookie(headers, SESSION_COOKIE).filter(|_| tls) {
        match app.control.session_of(id, from) {
            Ok(caller) => return Ok((caller, Some(csrf_of(id)))),
            // An old cookie keeps nobody from what is open, nor from logging in again.
            Err(_) if matches!(call.kind, Kind::LogIn | Kind::Open) => {}
            Err(error) => return Err(error),
        }
    }
    Ok((Caller::nobody(from), None))
}

/// Of this host itself.
pub(super) fn is_local(address: IpAddr) -> bool {
    address.to_canonical().is_loopback()
}

/// A cookie's value, the first of that name.
pub(super) fn cookie<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let all = headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
    let mut pairs = all.flat_map(|value| value.split(';')).filter_map(|pair| pair.trim().split_once('='));
    pairs.find(|(key, _)| *key == name).map(|(_, value)| value)
}

fn may(app: &App, caller: &Caller, call: &Call) -> Result<(), AccessError> {
    let open = match call.kind {
        Kind::LogIn => true,
        Kind::Open => app.control.config.access.anonymous_reads,
        Kind::Read | Kind::Change => false,
    };
    match caller.role {
        _ if open => Ok(()),
        Some(role) if role >= call.least => Ok(()),
        Some(has) => Err(AccessError::TooLow { who: caller.name.clone(), has, needs: call.least }),
        None => Err(AccessError::Nobody { needs: call.least, socket: app.control.site.socket() }),
    }
}

/// A browser sends the cookie along with what another site's page asks for; but that page can neither read the page's own
/// word nor choose the origin.
fn own_page(headers: &HeaderMap, csrf: &str) -> Result<(), AccessError> {
    let value = |name: &str| headers.get(name).and_then(|v| v.to_str().ok());
    let host = value("host").unwrap_or_default();
    let origin = value("origin").is_some_and(|origin| origin == format!("https://{host}"));
    let site = value("sec-fetch-site").is_none_or(|site| site == "same-origin");
    let word = value(CSRF_HEADER).is_some_and(|word| hex::sha256(word.as_bytes()) == hex::sha256(csrf.as_bytes()));
    if origin && site && word { Ok(()) } else { Err(AccessError::Forged) }
}

/// Keeps the call, if it needs a second person.
async fn second_person(
    app: &App,
    caller: &Caller,
    call: &'static Call,
    uri: &str,
    request: Request,
) -> Result<Request, Response> {
    if !app.control.may_need_second(call.action) {
        return Ok(request);
    }
    let (parts, body) = request.into_parts();
    let Ok(bytes) = to_bytes(body, MAX_PENDING_BODY).await else {
        return Err(ApiError::from(AccessError::ProposalForm).into_response());
    };
    let Ok(body) = std::str::from_utf8(&bytes) else {
        return Err(ApiError::from(AccessError::ProposalForm).into_response());
    };
    // The routes name a machine in one place only.
    let machine = uri.strip_prefix(MACHINES).and_then(|rest| rest.split('/').next());
    let path = parts.uri.path_and_query().map_or(uri, PathAndQuery::as_str);
    let content_type = parts.headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let asked = Asked { call, machine, path, content_type, body };
    if app.control.needs_second(caller, &asked) {
        return Err(match app.control.propose(caller, &asked).await {
            Ok(view) => (StatusCode::ACCEPTED, Json(serde_json::json!({ "pending": view }))).into_response(),
            Err(error) => ApiError::from(error).into_response(),
        });
    }
    Ok(Request::from_parts(parts, Body::from(bytes)))
}

/// What failed: what succeeds writes its own record, with the change.
fn record(app: &App, caller: &Caller, method: &str, uri: &str, answer: &Response) {
    if !answer.status().is_success() {
        let reason = answer.extensions().get::<Failure>().map_or_else(|| answer.status().to_string(), |f| f.0.clone());
        note(app, caller, method, uri, reason);
    }
}

/// Who was refused which call, and why; of a second person's word with what it was about.
fn note(app: &App, caller: &Caller, method: &str, uri: &str, reason: String) {
    let line = Line::done(now_ms(), &caller.who(), "", format!("{method} {uri}{}", app.control.about_pending(uri)));
    app.control.note_refused(caller, line.but(reason));
}

/// Whom a handler acts for.
pub(super) fn caller(peer: &Peer) -> Caller {
    match peer {
        Peer::Person(caller) => caller.clone(),
        Peer::Unix { uid } => Caller::local(*uid),
        Peer::Tcp { from, .. } | Peer::Machine { from, .. } => Caller::nobody(from.ip()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cookie_is_found_by_its_whole_name() {
        let mut headers = HeaderMap::new();
        headers.append(header::COOKIE, "a=b; __Host-kiln2=no; x__Host-kiln=no".parse().unwrap());
        assert_eq!(cookie(&headers, SESSION_COOKIE), None);
        headers.append(header::COOKIE, "c=d;__Host-kiln=yes; __Host-kiln=later".parse().unwrap());
        assert_eq!(cookie(&headers, SESSION_COOKIE), Some("yes"));
    }

    #[test]
    fn only_the_own_page_changes_something_with_a_session() {
        let session = "word";
        let headers = |pairs: &[(&'static str, &str)]| {
            pairs.iter().fold(HeaderMap::new(), |mut headers, (name, value)| {
                headers.insert(*name, value.parse().unwrap());
                headers
            })
        };
        let good = [("host", "kiln:8444"), ("origin", "https://kiln:8444"), (CSRF_HEADER, "word")];
        assert!(own_page(&headers(&good), session).is_ok());
        for (n, other) in
            [(1, "https://evil"), (1, "http://kiln:8444"), (1, "null"), (2, "guess"), (2, ""), (0, "evil")]
        {
            let mut bad = good;
            bad[n].1 = other;
            assert!(own_page(&headers(&bad), session).is_err(), "{bad:?}");
        }
        for n in 0..3 {
            let without: Vec<_> = good.iter().enumerate().filter(|(i, _)| *i != n).map(|(_, p)| *p).collect();
            assert!(own_page(&headers(&without), session).is_err(), "{without:?}");
        }
        let cross = [&good[..], &[("sec-fetch-site", "cross-site")]].concat();
        assert!(own_page(&headers(&cross), session).is_err());
    }
}
