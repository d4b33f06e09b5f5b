//! The operator API's calls about people and programs: tokens, second persons, the audit log, revoked identities.

use super::api::{ApiError, detached};
use super::authorize::{authorize, caller};
use super::{App, Peer};
use crate::audit::Record;
use crate::error::AccessError;
use crate::view::{MachineView, PendingView, TokenView};
use axum::body::{Body, to_bytes};
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{Extension, Path, Query, State};
use axum::http::{Request, StatusCode, header};
use axum::routing::{get, post};
use axum::{Json, Router};
use hyper::service::Service;
use hyper_util::service::TowerToHyperService;
use kiln_fleet::access::AccessRole;
use serde::Deserialize;
use serde_json::{Value, json};

/// Records of one answer at most.
const RECORDS: i64 = 1_000;
/// Longest answer of a confirmed call that is handed on.
const MAX_ANSWER: usize = 4 << 20;

/// Who may do what, and who did.
pub(super) fn router() -> Router<App> {
    Router::new()
        .route("/api/v1/tokens", get(tokens).post(create))
        .route("/api/v1/tokens/{name}/revoke", post(revoke))
        .route("/api/v1/pending", get(pending))
        .route("/api/v1/pending/{id}/confirm", post(confirm))
        .route("/api/v1/pending/{id}/refuse", post(refuse))
        .route("/api/v1/audit", get(audit))
        .route("/api/v1/audit/records", get(records))
        .route("/api/v1/audit/head", get(head))
        .route("/api/v1/roles", get(roles))
        .route("/api/v1/machines/{machine}/revoke-key", post(revoke_key))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Create {
    name: String,
    role: AccessRole,
    /// How long it holds.
    lifetime_ms: Option<u64>,
}

async fn create(
    State(app): State<App>,
    Extension(peer): Extension<Peer>,
    body: Result<Json<Create>, JsonRejection>,
) -> Result<Json<Value>, ApiError> {
    let Json(Create { name, role, lifetime_ms }) = body?;
    let by = caller(&peer);
    let made = detached(async move { app.control.token_create(&name, role, lifetime_ms, &by).await });
    let (token, text) = made.await?;
    Ok(Json(json!({ "token": token, "text": text })))
}

async fn tokens(State(app): State<App>) -> Json<Vec<TokenView>> {
    Json(app.control.tokens())
}

async fn revoke(
    State(app): State<App>,
    Extension(peer): Extension<Peer>,
    Path(name): Path<String>,
) -> Result<Json<TokenView>, ApiError> {
    let by = caller(&peer);
    Ok(Json(detached(async move { app.control.token_revoke(&name, &by).await }).await?))
}

async fn pending(State(app): State<App>) -> Json<Vec<PendingView>> {
    Json(app.control.pending())
}

/// Does what was asked for, as it was asked for, in the name of both.
async fn confirm(
    State(app): State<App>,
    Extension(peer): Extension<Peer>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let (kept, both) = app.control.confirm(&id, &caller(&peer)).await?;
    let request = Request::builder()
        .method(kept.method.as_str())
        .uri(&kept.path)
        .header(header::CONTENT_TYPE, &kept.content_type)
        .extension(Peer::Person(both))
        .body(Body::from(kept.body))
        .map_err(|_| AccessError::ProposalForm)?;
    let router = super::changes().merge(router()).with_state(app.clone());
    // A router never fails: its error type has no value.
    let Ok(answer) = TowerToHyperService::new(router).call(request).await;
    let status = answer.status();
    let bytes = to_bytes(answer.into_body(), MAX_ANSWER).await.unwrap_or_default();
    let answer: Value = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
    let outcome = match answer.get("error").and_then(Value::as_str) {
        Some(reason) => format!("not done: {reason}"),
        None if status.is_success() => "done".to_owned(),
        None => format!("not done: {status}"),
    };
    let view = app.control.confirmed(&id, outcome).await?;
    if status.is_success() {
        return Ok(Json(json!({ "pending": view, "answer": answer })));
    }
    Err(ApiError::new(status, view.state))
}

async fn refuse(
    State(app): State<App>,
    Extension(peer): Extension<Peer>,
    Path(id): Path<String>,
) -> Result<Json<PendingView>, ApiError> {
    Ok(Json(app.control.refuse(&id, &caller(&peer)).await?))
}

async fn audit(State(app): State<App>) -> Result<Json<Vec<Record>>, ApiError> {
    Ok(Json(app.control.store.audit_tail(200).await?))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct After {
    #[serde(default)]
    after: u64,
}

async fn records(
    State(app): State<App>,
    query: Result<Query<After>, QueryRejection>,
) -> Result<Json<Vec<Record>>, ApiError> {
    let Query(After { after }) = query?;
    Ok(Json(app.control.store.audit_after(after, RECORDS).await?))
}

/// The newest record's number and hash, signed by the director: whoever keeps it finds out whether the log's end was cut.
async fn head(State(app): State<App>) -> Result<String, ApiError> {
    Ok(app.control.audit_head().await?)
}

async fn roles(State(app): State<App>) -> Json<Vec<String>> {
    Json(app.control.config.roles.keys().cloned().collect())
}

async fn revoke_key(
    State(app): State<App>,
    Extension(peer): Extension<Peer>,
    Path(machine): Path<String>,
) -> Result<Json<MachineView>, ApiError> {
    let (control, by) = (app.control, caller(&peer).who());
    let revoked = detached(async move {
        let revoked = control.revoke_key(&machine, &by).await;
        revoked.and_then(|_| control.view(&machine))
    });
    Ok(Json(revoked.await?))
}

/// Lets calls in by [`authorize`].
pub(super) fn guarded(router: Router<App>, app: &App) -> Router<App> {
    router.route_layer(axum::middleware::from_fn_with_state(app.clone(), authorize))
}

/// What an error of access answers with.
pub(super) fn status_of(e: &AccessError) -> StatusCode {
    match e {
        AccessError::Unlisted { .. }
        | AccessError::Nobody { .. }
        | AccessError::TooLow { .. }
        | AccessError::PlacedBefore { .. }
        | AccessError::InTheClear
        | AccessError::ProposerGone { .. }
        | AccessError::Forged
        | AccessError::LogInNeedsTls => StatusCode::FORBIDDEN,
        AccessError::WrongToken
        | AccessError::Expired { .. }
        | AccessError::Revoked { .. }
        | AccessError::SessionOver => StatusCode::UNAUTHORIZED,
        AccessError::TooOften { .. } | AccessError::TooManyTokens { .. } | AccessError::TooManyProposals { .. } => {
            StatusCode::TOO_MANY_REQUESTS
        }
        AccessError::TokenName(_)
        | AccessError::Lifetime { .. }
        | AccessError::ProposalForm
        | AccessError::NoKey(_) => StatusCode::UNPROCESSABLE_ENTITY,
        AccessError::TokenTaken(_) | AccessError::Proposal(_) | AccessError::RevokedBefore(_) => StatusCode::CONFLICT,
        AccessError::NoSuchToken(_) | AccessError::NoSuchProposal(_) => StatusCode::NOT_FOUND,
        AccessError::Random => StatusCode::INTERNAL_SERVER_ERROR,
        AccessError::Oidc(e) => super::login::status_of(e),
    }
}
