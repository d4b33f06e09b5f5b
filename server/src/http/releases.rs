//! What is published, `/api/v1/releases`, and what is about to be taken out.

use super::api::{ApiError, who};
use super::{App, Peer};
use crate::audit::Line;
use crate::catalog::Release;
use crate::control::now_ms;
use crate::view::ReleaseView;
use axum::extract::rejection::JsonRejection;
use axum::extract::{DefaultBodyLimit, Extension, Path, State};
use axum::routing::{get, post};
use axum::{Json, Router};
use kiln_protocol::{ImageName, ReleaseId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// What may be read.
pub(super) fn reads() -> Router<App> {
    Router::new().route("/api/v1/releases", get(list))
}

/// What changes something.
pub(super) fn changes() -> Router<App> {
    Router::new().route("/api/v1/releases/{image}/withhold", post(withhold).layer(DefaultBodyLimit::max(256 << 10)))
}

async fn list(State(app): State<App>) -> Json<Vec<ReleaseView>> {
    let uses = app.control.uses();
    let catalog = app.control.catalog();
    let view = |(id, release): (&ReleaseId, &Release)| {
        let used = uses.get(id).copied().unwrap_or_default();
        ReleaseView::of(&release.manifest, used.running, used.needed)
    };
    Json(catalog.releases.iter().map(view).collect())
}

/// Which releases of an image are to be taken out; and the answer: which of them machines need.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Numbers {
    /// Release numbers.
    pub(crate) releases: BTreeSet<u64>,
}

async fn withhold(
    State(app): State<App>,
    Extension(peer): Extension<Peer>,
    Path(image): Path<ImageName>,
    body: Result<Json<Numbers>, JsonRejection>,
) -> Result<Json<Numbers>, ApiError> {
    let Json(Numbers { releases }) = body?;
    let needed = app.control.withhold(&image, &releases);
    let going: Vec<String> = releases.difference(&needed).map(|n| format!("{image}/{n}")).collect();
    if !going.is_empty() {
        let what = format!("withheld, to be pruned: {}", going.join(", "));
        app.control.store.audit(Line::done(now_ms(), &who(&peer), "", what)).wait().await?;
    }
    Ok(Json(Numbers { releases: needed }))
}
