//! The operator API, `/api/v1/`. Who may make which call is in `access::calls`.

use super::authorize::{Failure, caller};
use super::{App, Peer};
use crate::control::{LogQuery, Told, now_ms};
use crate::error::{
    AccessError, AttestationError, CertificateError, CodeError, ControlError, ExpectedError, LogError, SecretError,
    StoreError,
};
use crate::view::{ClassView, HardwareView, LogView, MachineView, OrderView, ReceiptView};
use axum::body::Bytes;
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{DefaultBodyLimit, Extension, Path, Query, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Json, Router};
use futures_util::stream::{self, Stream};
use kiln_fleet::{Refusal, Route};
use kiln_protocol::{ImageName, ReleaseId, Via};
use serde::Deserialize;
use serde_json::json;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::time::Duration;
use tokio::sync::broadcast::error::RecvError;

/// What may be read.
pub(super) fn reads() -> Router<App> {
    Router::new()
        .route("/api/v1/machines", get(machines))
        .route("/api/v1/machines/{machine}", get(machine))
        .route("/api/v1/machines/{machine}/receipts", get(receipts))
        .route("/api/v1/machines/{machine}/log", get(log))
        .route("/api/v1/machines/{machine}/inventory", get(inventory))
        .route("/api/v1/classes", get(classes))
        .route("/api/v1/status", get(status))
        .route("/api/v1/events", get(events))
}

async fn classes(State(app): State<App>) -> Json<Vec<ClassView>> {
    Json(app.control.classes())
}

/// What changes something, and what only those who may order read.
pub(super) fn changes() -> Router<App> {
    Router::new()
        .route("/api/v1/machines/{machine}/approve", post(approve))
        .route("/api/v1/machines/{machine}/assignment", put(assign))
        .route("/api/v1/machines/{machine}/clear", post(clear))
        .route("/api/v1/machines/{machine}/retire", post(retire))
        .route("/api/v1/machines/{machine}/replace", post(replace))
        .route("/api/v1/machines/{machine}/excuse", post(excuse))
        .route("/api/v1/machines/{machine}/accept", post(accept))
        .layer(DefaultBodyLimit::max(16 << 10))
        .route("/api/v1/orders", get(orders).post(submit).layer(DefaultBodyLimit::max(128 << 10)))
}

/// An error as the API gives it.
#[derive(Debug)]
pub struct ApiError(StatusCode, String);

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.0, Json(json!({ "error": self.1 }))).into_response();
        if self.0 == StatusCode::SERVICE_UNAVAILABLE {
            // The identity provider's: nothing else here is unavailable for a while.
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(crate::oidc::AGAIN.as_secs()));
        }
        response.extensions_mut().insert(Failure(self.1));
        response
    }
}

impl From<ControlError> for ApiError {
    fn from(e: ControlError) -> Self {
        let status = match &e {
            ControlError::NoSuchMachine(_) | ControlError::NoSuchRelease { .. } | ControlError::NoInventory(_) => {
                StatusCode::NOT_FOUND
            }
            ControlError::Ambiguous(_)
            | ControlError::BadName(_)
            | ControlError::BadReason
            | ControlError::Config(_)
            | ControlError::WrongClass { .. }
            | ControlError::WrongArchitecture { .. }
            | ControlError::Threshold { .. }
            | ControlError::BelowFloor { .. }
            | ControlError::Operator(_)
            | ControlError::Order(_)
            | ControlError::OrderClass { .. }
            | ControlError::Receipt(_)
            | ControlError::ReceiptOfAnother { .. }
            | ControlError::ReceiptWithoutOrder { .. }
            | ControlError::OtherImage { .. }
            | ControlError::NoReport { .. }
            | ControlError::Refused(Refusal::KeyDigits { .. })
            | ControlError::ForgetsKey { .. } => StatusCode::UNPROCESSABLE_ENTITY,
            ControlError::NothingPublished { .. }
            | ControlError::NameTaken(_)
            | ControlError::SerialClaimed { .. }
            | ControlError::SerialOfAnotherKey { .. }
            | ControlError::BeingPruned { .. }
            | ControlError::Refused(_)
            | ControlError::NoReportYet(_)
            | ControlError::Quarantined(_)
            | ControlError::OrderKnown { .. } => StatusCode::CONFLICT,
            ControlError::Access(e) => super::people::status_of(e),
            ControlError::Log(e) => log_status(e),
            ControlError::Code(e) => code_status(e),
            ControlError::Expected(e) => expected_status(e),
            ControlError::Attestation(e) => attestation_status(e),
            ControlError::Secret(e) => secret_status(e),
            ControlError::Certificate(e) => certificate_status(e),
            ControlError::NotItsKey(_) => StatusCode::FORBIDDEN,
            ControlError::TooLongForAStranger { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            ControlError::TooManyUnknown | ControlError::TooManyOrders { .. } => StatusCode::TOO_MANY_REQUESTS,
            ControlError::Store(StoreError::Full) => StatusCode::INSUFFICIENT_STORAGE,
            ControlError::Sign(_) | ControlError::Store(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self(status, e.to_string())
    }
}

fn log_status(e: &LogError) -> StatusCode {
    match e {
        LogError::NoBoot { .. } => StatusCode::NOT_FOUND,
        LogError::BootId | LogError::TooMany { .. } | LogError::NotReported => StatusCode::UNPROCESSABLE_ENTITY,
        LogError::Write { .. } | LogError::Read { .. } | LogError::Task(_) => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

fn expected_status(e: &ExpectedError) -> StatusCode {
    match e {
        ExpectedError::File(_) => StatusCode::UNPROCESSABLE_ENTITY,
        ExpectedError::NotListed(_) => StatusCode::NOT_FOUND,
        ExpectedError::Task(_) => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

fn attestation_status(e: &AttestationError) -> StatusCode {
    match e {
        AttestationError::TooOften => StatusCode::TOO_MANY_REQUESTS,
        AttestationError::NotReported | AttestationError::NotAsked | AttestationError::NotProven => {
            StatusCode::CONFLICT
        }
        AttestationError::Key(_) | AttestationError::Point => StatusCode::UNPROCESSABLE_ENTITY,
        AttestationError::Random => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

fn secret_status(e: &SecretError) -> StatusCode {
    match e {
        SecretError::Name(_) | SecretError::ForWhom | SecretError::Length { .. } => StatusCode::UNPROCESSABLE_ENTITY,
        SecretError::None { .. } => StatusCode::NOT_FOUND,
        SecretError::TooMany { .. } | SecretError::Together | SecretError::DeliveryKey | SecretError::Withheld(_) => {
            StatusCode::CONFLICT
        }
        SecretError::KeyFile { .. }
        | SecretError::KeyForm(_)
        | SecretError::KeyMissing(_)
        | SecretError::Unsealing { .. }
        | SecretError::Sealing => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

fn certificate_status(e: &CertificateError) -> StatusCode {
    match e {
        CertificateError::PublicKey | CertificateError::Possession => StatusCode::UNPROCESSABLE_ENTITY,
        CertificateError::NotReported | CertificateError::Refused(_) => StatusCode::CONFLICT,
        CertificateError::TooMany { .. } => StatusCode::TOO_MANY_REQUESTS,
        CertificateError::NoneWanted => StatusCode::NOT_FOUND,
        CertificateError::File { .. }
        | CertificateError::Form(_)
        | CertificateError::KeyMissing(_)
        | CertificateError::Announced(_)
        | CertificateError::NotAnnounced(_)
        | CertificateError::StillTold(_)
        | CertificateError::Signing
        | CertificateError::Ca(_) => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

fn code_status(e: &CodeError) -> StatusCode {
    match e {
        CodeError::TooManyWrong { .. } | CodeError::TooOften => StatusCode::TOO_MANY_REQUESTS,
        CodeError::Form(_) => StatusCode::UNPROCESSABLE_ENTITY,
        CodeError::Random | CodeError::ServerKey(_) => StatusCode::INTERNAL_SERVER_ERROR,
        CodeError::NotReported
        | CodeError::NotCommitted
        | CodeError::Introduction(_)
        | CodeError::None { .. }
        | CodeError::Wrong { .. } => StatusCode::CONFLICT,
    }
}

impl ApiError {
    pub(super) fn new(status: StatusCode, reason: String) -> Self {
        Self(status, reason)
    }

    /// What it answers with.
    pub(super) fn status(&self) -> StatusCode {
        self.0
    }
}

impl From<AccessError> for ApiError {
    fn from(e: AccessError) -> Self {
        ControlError::from(e).into()
    }
}

impl From<StoreError> for ApiError {
    fn from(e: StoreError) -> Self {
        ControlError::from(e).into()
    }
}

impl From<QueryRejection> for ApiError {
    fn from(e: QueryRejection) -> Self {
        Self(StatusCode::UNPROCESSABLE_ENTITY, e.body_text())
    }
}

impl From<JsonRejection> for ApiError {
    fn from(e: JsonRejection) -> Self {
        Self(StatusCode::UNPROCESSABLE_ENTITY, e.body_text())
    }
}

pub(super) async fn not_found() -> ApiError {
    ApiError(StatusCode::NOT_FOUND, "there is no such call; /api/v1/status shows what runs here".into())
}

async fn machines(State(app): State<App>) -> Json<Vec<MachineView>> {
    Json(app.control.views())
}

async fn machine(State(app): State<App>, Path(machine): Path<String>) -> Result<Json<MachineView>, ApiError> {
    Ok(Json(app.control.view(&machine)?))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Log {
    boot: Option<String>,
    after: Option<u64>,
    #[serde(default)]
    wait: bool,
}

async fn log(
    State(app): State<App>,
    Path(machine): Path<String>,
    query: Result<Query<Log>, QueryRejection>,
) -> Result<Json<LogView>, ApiError> {
    let Query(Log { boot, after, wait }) = query?;
    Ok(Json(app.control.show_log(&machine, LogQuery { boot, after, wait }).await?))
}

async fn inventory(State(app): State<App>, Path(machine): Path<String>) -> Result<Json<HardwareView>, ApiError> {
    Ok(Json(app.control.hardware_of(&machine).await?))
}

async fn status(State(app): State<App>) -> Response {
    let control = &app.control;
    let catalog = control.catalog();
    let mut states: BTreeMap<String, u64> = BTreeMap::new();
    for view in control.views() {
        *states.entry(view.state).or_default() += 1;
    }
    let listening = app.listening.lock().expect("no code panics under this lock").clone();
    Json(json!({
        "site": control.site.name,
        "version": env!("CARGO_PKG_VERSION"),
        "started_ms": control.started,
        "now_ms": now_ms(),
        "listening": listening,
        "machines": states,
        "releases": catalog.releases.len(),
        "snapshot": catalog.snapshot,
        "expiries": crate::expiry::views(&catalog.expiries, jiff::Timestamp::now()),
        "dbx": control.dbx(),
        "held_reports": control.held.load(std::sync::atomic::Ordering::Relaxed),
        "limits": { "max_unavailable": control.config.limits.max_unavailable,
                    "trial_attempts": control.config.limits.trial_attempts },
    }))
    .into_response()
}

/// What happens, as long as whoever reads it may: until the server ends, or what the reader was let in by.
async fn events(
    State(app): State<App>,
    Extension(peer): Extension<Peer>,
) -> Sse<impl Stream<Item = Result<Event, Infallible>>> {
    // Before the snapshot: what happens between the two is in both, and a view replaces its predecessor.
    let told = app.control.watch();
    let first = hello(&app);
    let stop = {
        let (app, reader) = (app.clone(), caller(&peer));
        Box::pin(async move {
            tokio::select! {
                () = app.control.stopped() => {}
                () = app.control.lapsed(&reader) => {}
            }
        })
    };
    let stream = stream::unfold((Some(first), told, app, stop), |(first, mut told, app, mut stop)| async {
        if let Some(first) = first {
            return Some((Ok(first), (None, told, app, stop)));
        }
        let event = tokio::select! {
            biased;
            () = &mut stop => return None,
            event = told.recv() => event,
        };
        let event = match event {
            Ok(Told::Machine(view)) => Event::default().event("machine").json_data(&*view),
            Ok(Told::Gone(id)) => Event::default().event("gone").json_data(json!({ "id": id })),
            // A reader that was too slow gets everything anew.
            Err(RecvError::Lagged(_)) => Ok(hello(&app)),
            Err(RecvError::Closed) => return None,
        };
        let event = event.unwrap_or_else(|e| Event::default().comment(e.to_string()));
        Some((Ok(event), (None, told, app, stop)))
    });
    Sse::new(stream).keep_alive(KeepAlive::new().interval(Duration::from_secs(15)))
}

fn hello(app: &App) -> Event {
    Event::default()
        .event("hello")
        .json_data(app.control.views())
        .unwrap_or_else(|e| Event::default().comment(e.to_string()))
}

pub(super) fn who(peer: &Peer) -> String {
    caller(peer).who()
}

/// Does this also where the caller hangs up meanwhile: a commit that fails is followed by what takes back the rest.
pub(super) async fn detached<T: Send + 'static>(
    act: impl Future<Output = Result<T, ControlError>> + Send + 'static,
) -> Result<T, ApiError> {
    match tokio::spawn(act).await {
        Ok(done) => Ok(done?),
        Err(error) => {
            Err(ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, format!("the call was broken off: {error}")))
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Approve {
    name: Option<String>,
    role: String,
    code: Option<String>,
}

async fn approve(
    State(app): State<App>,
    Extension(peer): Extension<Peer>,
    Path(machine): Path<String>,
    body: Result<Json<Approve>, JsonRejection>,
) -> Result<Json<MachineView>, ApiError> {
    let Json(order) = body?;
    let id = app.control.view(&machine)?.id;
    app.control.approve(id.as_str(), order.name.as_deref(), &order.role, order.code.as_deref(), &caller(&peer)).await?;
    Ok(Json(app.control.view(id.as_str())?))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Assign {
    image: ImageName,
    release: u64,
    via: Route,
}

async fn assign(
    State(app): State<App>,
    Extension(peer): Extension<Peer>,
    Path(machine): Path<String>,
    body: Result<Json<Assign>, JsonRejection>,
) -> Result<Json<MachineView>, ApiError> {
    let Json(order) = body?;
    let release = ReleaseId { image: order.image, release: order.release };
    app.control.assign(&machine, &release, order.via, &who(&peer)).await?;
    Ok(Json(app.control.view(&machine)?))
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Clear {
    /// The beginning of the fingerprint of another key, which is the machine's from now on.
    key: Option<String>,
}

/// Without a body, or a key in it, no other key becomes the machine's.
async fn clear(
    State(app): State<App>,
    Extension(peer): Extension<Peer>,
    Path(machine): Path<String>,
    body: Bytes,
) -> Result<Json<MachineView>, ApiError> {
    // It had no body before it had a key, whatever its Content-Type said.
    let bad = |e: serde_json::Error| ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, e.to_string());
    let order: Clear = if body.is_empty() { Clear::default() } else { serde_json::from_slice(&body).map_err(bad)? };
    app.control.clear(&machine, order.key.as_deref(), &who(&peer)).await?;
    Ok(Json(app.control.view(&machine)?))
}

async fn retire(
    State(app): State<App>,
    Extension(peer): Extension<Peer>,
    Path(machine): Path<String>,
) -> Result<Json<MachineView>, ApiError> {
    app.control.retire(&machine, &who(&peer)).await?;
    Ok(Json(app.control.view(&machine)?))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Excuse {
    reason: String,
}

async fn excuse(
    State(app): State<App>,
    Extension(peer): Extension<Peer>,
    Path(machine): Path<String>,
    body: Result<Json<Excuse>, JsonRejection>,
) -> Result<Json<MachineView>, ApiError> {
    let Json(order) = body?;
    app.control.excuse(&machine, &order.reason, &who(&peer)).await?;
    Ok(Json(app.control.view(&machine)?))
}

async fn accept(
    State(app): State<App>,
    Extension(peer): Extension<Peer>,
    Path(machine): Path<String>,
) -> Result<Json<MachineView>, ApiError> {
    app.control.accept_tpm(&machine, &who(&peer)).await?;
    Ok(Json(app.control.view(&machine)?))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Submit {
    /// The envelope, byte for byte.
    order: String,
    via: Via,
}

async fn submit(
    State(app): State<App>,
    Extension(peer): Extension<Peer>,
    body: Result<Json<Submit>, JsonRejection>,
) -> Result<Json<OrderView>, ApiError> {
    let Json(Submit { order, via }) = body?;
    let by = who(&peer);
    Ok(Json(detached(async move { app.control.submit(&order, via, &by).await }).await?))
}

async fn orders(State(app): State<App>) -> Result<Json<Vec<OrderView>>, ApiError> {
    Ok(Json(app.control.orders().await?))
}

async fn receipts(State(app): State<App>, Path(machine): Path<String>) -> Result<Json<Vec<ReceiptView>>, ApiError> {
    Ok(Json(app.control.receipts(&machine).await?))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Replace {
    /// Name or id of the new machine.
    with: String,
}

async fn replace(
    State(app): State<App>,
    Extension(peer): Extension<Peer>,
    Path(machine): Path<String>,
    body: Result<Json<Replace>, JsonRejection>,
) -> Result<Json<MachineView>, ApiError> {
    let Json(Replace { with }) = body?;
    let id = app.control.replace(&machine, &with, &who(&peer)).await?;
    Ok(Json(app.control.view(id.as_str())?))
}
