//! What other programs need to know the site's machines by: the certificate of the CA, and the list of what it revoked. Public,
//! and signed, so that plain HTTP will do; by whom it is signed is compared once, when a program is told to trust it.

use super::{App, text};
use crate::error::{CertificateError, ControlError};
use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;

pub(super) fn router() -> Router<App> {
    Router::new()
        .route("/site/machines.pem", get(ca))
        .route("/site/machines.crl", get(list))
        .route("/site/machines.crl.pem", get(list_pem))
}

async fn ca(State(app): State<App>) -> Response {
    answer("application/pem-certificate-chain", app.control.machine_ca().await.map(Bytes::from))
}

/// DER, as RFC 2585 §4.2 has it.
async fn list(State(app): State<App>) -> Response {
    answer("application/pkix-crl", app.control.revoked_certificates().await.map(|list| list.der))
}

/// The same for programs that read PEM.
async fn list_pem(State(app): State<App>) -> Response {
    answer("application/x-pem-file", app.control.revoked_certificates().await.map(|list| list.pem))
}

fn answer(content_type: &'static str, made: Result<Bytes, CertificateError>) -> Response {
    match made {
        Ok(bytes) => {
            let headers = [
                (header::CONTENT_TYPE, HeaderValue::from_static(content_type)),
                // What was revoked since is in the next answer.
                (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
            ];
            (headers, Body::from(bytes)).into_response()
        }
        Err(error @ CertificateError::NoneWanted) => text(StatusCode::NOT_FOUND, format!("{error}\n")),
        Err(error) => {
            // That it cannot be opened was said when that was found.
            if !matches!(error, CertificateError::Ca(_)) {
                tracing::error!(%error, "the machine CA gives no answer");
            }
            let status = super::api::ApiError::from(ControlError::from(error)).status();
            text(status, "the machine CA gives no answer; the server's log says why\n")
        }
    }
}
