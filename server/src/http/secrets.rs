//! The operator API's calls about secrets. A value comes as the body, as it is: nothing parses it, and no answer, log or error
//! has a part of it.

use super::api::ApiError;
use super::authorize::caller;
use super::{App, Peer};
use crate::view::SecretView;
use axum::body::Bytes;
use axum::extract::rejection::QueryRejection;
use axum::extract::{DefaultBodyLimit, Extension, Path, Query, State};
use axum::routing::{get, put};
use axum::{Json, Router};
use kiln_protocol::SECRET_LIMIT;
use serde::Deserialize;

pub(super) fn router() -> Router<App> {
    Router::new()
        .route("/api/v1/secrets", get(list))
        .route("/api/v1/secrets/{name}", put(set).delete(remove))
        // One more than is taken, so that whoever sends too much is told what is.
        .layer(DefaultBodyLimit::max(SECRET_LIMIT + 1))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct For {
    role: Option<String>,
    machine: Option<String>,
}

async fn list(State(app): State<App>) -> Json<Vec<SecretView>> {
    Json(app.control.secrets())
}

async fn set(
    State(app): State<App>,
    Extension(peer): Extension<Peer>,
    Path(name): Path<String>,
    query: Result<Query<For>, QueryRejection>,
    body: Bytes,
) -> Result<Json<SecretView>, ApiError> {
    let Query(For { role, machine }) = query?;
    let of = app.control.secret_for(role.as_deref(), machine.as_deref())?;
    Ok(Json(app.control.secret_set(&name, of, body.to_vec(), &caller(&peer)).await?))
}

async fn remove(
    State(app): State<App>,
    Extension(peer): Extension<Peer>,
    Path(name): Path<String>,
    query: Result<Query<For>, QueryRejection>,
) -> Result<Json<SecretView>, ApiError> {
    let Query(For { role, machine }) = query?;
    let of = app.control.secret_for(role.as_deref(), machine.as_deref())?;
    Ok(Json(app.control.secret_remove(&name, of, &caller(&peer)).await?))
}
