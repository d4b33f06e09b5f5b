//! The operator API's client: the Unix socket of a site, or a server's read-only HTTP.

use super::At;
use super::error::CliError;
use kiln_release::with_causes;
use reqwest::{Method, Response, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::time::Duration;

/// Longest wait for an answer; an event stream has none.
const ANSWER: Duration = Duration::from_secs(20);

pub(super) struct Client {
    http: reqwest::Client,
    base: String,
    may_change: bool,
}

impl Client {
    pub(super) fn new(at: &At) -> Result<Self, CliError> {
        let builder = reqwest::Client::builder().connect_timeout(ANSWER);
        let (builder, base, may_change) = match (&at.site, &at.server) {
            (Some(site), _) => {
                let socket = site.join("state/kiln.sock");
                if !socket.exists() {
                    return Err(CliError::NoSocket(socket));
                }
                // The host part is not looked up: the socket is the address.
                (builder.unix_socket(socket), "http://kiln".to_owned(), true)
            }
            (None, server) => (builder, server.clone().unwrap_or_default().trim_end_matches('/').to_owned(), false),
        };
        let http = builder.build().map_err(|e| CliError::Request { url: base.clone(), reason: with_causes(&e) })?;
        Ok(Self { http, base, may_change })
    }

    pub(super) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, CliError> {
        let response = self.send(Method::GET, path, None::<&()>, Some(ANSWER)).await?;
        self.read(path, response).await
    }

    /// The same for an answer that the server may hold.
    pub(super) async fn get_slowly<T: DeserializeOwned>(&self, path: &str) -> Result<T, CliError> {
        let response = self.send(Method::GET, path, None::<&()>, Some(3 * ANSWER)).await?;
        self.read(path, response).await
    }

    pub(super) async fn change<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, CliError> {
        if !self.may_change {
            return Err(CliError::ReadOnly);
        }
        let response = self.send(method, path, Some(body), Some(ANSWER)).await?;
        self.read(path, response).await
    }

    /// Sends a file as it is.
    pub(super) async fn upload<T: DeserializeOwned>(
        &self,
        path: &str,
        kind: &'static str,
        bytes: Vec<u8>,
    ) -> Result<T, CliError> {
        if !self.may_change {
            return Err(CliError::ReadOnly);
        }
        let url = self.url(path);
        let request = self.http.post(&url).header(reqwest::header::CONTENT_TYPE, kind).body(bytes).timeout(3 * ANSWER);
        let response = self.answer(request, url).await?;
        self.read(path, response).await
    }

    /// The event stream, as it comes.
    pub(super) async fn stream(&self, path: &str) -> Result<Response, CliError> {
        self.send(Method::GET, path, None::<&()>, None).await
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
        limit: Option<Duration>,
    ) -> Result<Response, CliError> {
        let url = self.url(path);
        self.request(method, url, body, limit).await
    }

    /// The first root metadata of the site that the server serves: what every machine of it trusts.
    pub(super) async fn trust_root(&self) -> Result<Vec<u8>, CliError> {
        let url = format!("{}/metadata/1.root.json", self.base);
        let response = self.request(Method::GET, url.clone(), None::<&()>, Some(ANSWER)).await?;
        let bytes = response.bytes().await;
        Ok(bytes.map_err(|e| CliError::Request { url, reason: with_causes(&e) })?.to_vec())
    }

    async fn request(
        &self,
        method: Method,
        url: String,
        body: Option<&impl Serialize>,
        limit: Option<Duration>,
    ) -> Result<Response, CliError> {
        let mut request = self.http.request(method, &url);
        if let Some(body) = body {
            request = request.json(body);
        }
        if let Some(limit) = limit {
            request = request.timeout(limit);
        }
        self.answer(request, url).await
    }

    async fn answer(&self, request: reqwest::RequestBuilder, url: String) -> Result<Response, CliError> {
        let response =
            request.send().await.map_err(|e| CliError::Request { url: url.clone(), reason: with_causes(&e) })?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let text = response.text().await.unwrap_or_default();
        // A refusal is a sentence in {"error": …}.
        let sentence = serde_json::from_str::<serde_json::Value>(&text)
            .ok()
            .and_then(|v| v.get("error")?.as_str().map(str::to_owned));
        Err(match sentence {
            Some(message) => CliError::Refused { message },
            None if status == StatusCode::NOT_FOUND => CliError::Refused { message: format!("{url}: not found") },
            None => CliError::Request { url, reason: format!("answered {status}: {text}") },
        })
    }

    async fn read<T: DeserializeOwned>(&self, path: &str, response: Response) -> Result<T, CliError> {
        let bytes = response.bytes().await;
        let bytes = bytes.map_err(|e| CliError::Request { url: self.url(path), reason: with_causes(&e) })?;
        Ok(serde_json::from_slice(&bytes)?)
    }

    pub(super) fn url(&self, path: &str) -> String {
        format!("{}/api/v1/{path}", self.base)
    }
}
