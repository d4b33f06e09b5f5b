//! The list of expected machines, `/api/v1/expected`.

use super::api::{ApiError, who};
use super::{App, Peer};
use crate::error::{ControlError, ExpectedError};
use crate::expected::{CSV_LIMIT, Format};
use crate::view::{ExpectedView, ExpectedWhole, ImportView};
use axum::body::Bytes;
use axum::extract::rejection::QueryRejection;
use axum::extract::{DefaultBodyLimit, Extension, Path, Query, State};
use axum::http::{HeaderMap, header};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use serde::Deserialize;

/// What may be read.
pub(super) fn reads() -> Router<App> {
    Router::new().route("/api/v1/expected", get(list)).route("/api/v1/expected/{machine}", get(one))
}

/// What changes something.
pub(super) fn changes() -> Router<App> {
    Router::new()
        .route("/api/v1/expected", post(import).layer(DefaultBodyLimit::max(CSV_LIMIT + 1)))
        .route("/api/v1/expected/{machine}", delete(remove))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Filter {
    #[serde(default)]
    differs: bool,
}

async fn list(
    State(app): State<App>,
    query: Result<Query<Filter>, QueryRejection>,
) -> Result<Json<ExpectedWhole>, ApiError> {
    let Query(Filter { differs }) = query?;
    Ok(Json(app.control.expected_list(differs)))
}

async fn one(State(app): State<App>, Path(machine): Path<String>) -> Result<Json<ExpectedView>, ApiError> {
    Ok(Json(app.control.expected_machine(&machine)?))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Import {
    #[serde(default)]
    dry_run: bool,
    #[serde(default)]
    replace: bool,
}

/// The body is the file; `Content-Type: application/toml` says that it is TOML, else it is CSV.
async fn import(
    State(app): State<App>,
    Extension(peer): Extension<Peer>,
    query: Result<Query<Import>, QueryRejection>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Json<ImportView>, ApiError> {
    let Query(Import { dry_run, replace }) = query?;
    let kind = headers.get(header::CONTENT_TYPE).map_or(&b""[..], |value| value.as_bytes());
    let format = if kind.starts_with(b"application/toml") { Format::Toml } else { Format::Csv };
    // To its end, also when whoever asked goes: what is stored and what is held stay the same.
    let import = async move { app.control.import_expected(body.to_vec(), format, replace, dry_run, &who(&peer)).await };
    Ok(Json(tokio::spawn(import).await.map_err(|e| ControlError::from(ExpectedError::Task(e)))??))
}

async fn remove(
    State(app): State<App>,
    Extension(peer): Extension<Peer>,
    Path(machine): Path<String>,
) -> Result<Json<ExpectedView>, ApiError> {
    let remove = async move { app.control.remove_expected(&machine, &who(&peer)).await };
    Ok(Json(tokio::spawn(remove).await.map_err(|e| ControlError::from(ExpectedError::Task(e)))??))
}
