//! The operator API's client: the Unix socket of a site, or a server over the network, with a token.

use super::At;
use super::error::CliError;
use crate::view::PendingView;
use kiln_images::SiteDir;
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
    token: Option<String>,
    /// Nobody on the way reads what is sent.
    private: bool,
}

#[derive(serde::Deserialize)]
struct Kept {
    pending: PendingView,
}

/// A token goes over an encrypted connection, or to this host itself.
fn may_show_token(base: &str) -> bool {
    let url = reqwest::Url::parse(base);
    url.is_ok_and(|url| {
        let local = url.host_str().is_some_and(|host| {
            let host = host.trim_matches(['[', ']']);
            host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.to_canonical().is_loopback())
        });
        url.scheme() == "https" || (url.scheme() == "http" && local)
    })
}

/// From the file that was named, else from the environment.
fn token(at: &At) -> Result<Option<String>, CliError> {
    match &at.token_file {
        Some(path) => {
            let text = std::fs::read_to_string(path);
            let text = text.map_err(|source| CliError::Read { path: path.clone(), source })?;
            Ok(Some(text.trim().to_owned()))
        }
        None => Ok(std::env::var("KILN_TOKEN").ok().map(|text| text.trim().to_owned()).filter(|text| !text.is_empty())),
    }
}

impl Client {
    pub(super) fn new(at: &At) -> Result<Self, CliError> {
        // A token goes where it was meant to, and not where an answer says.
        let builder = reqwest::Client::builder().connect_timeout(ANSWER).redirect(reqwest::redirect::Policy::none());
        let (builder, base, token, private) = match (&at.site, &at.server) {
            (Some(site), _) => {
                let socket = site.join("state/kiln.sock");
                if !socket.exists() {
                    return Err(CliError::NoSocket(socket));
                }
                // The host part is not looked up: the socket is the address.
                (builder.unix_socket(socket), "http://kiln".to_owned(), None, true)
            }
            (None, server) => {
                let base = server.clone().unwrap_or_default().trim_end_matches('/').to_owned();
                let token = token(at)?;
                if token.is_some() && !may_show_token(&base) {
                    return Err(CliError::TokenInTheClear(base));
                }
                let encrypted = reqwest::Url::parse(&base).is_ok_and(|url| url.scheme() == "https");
                (builder, base, token, encrypted)
            }
        };
        let fail = |e: reqwest::Error| CliError::Request { url: base.clone(), reason: with_causes(&e) };
        let builder = match &at.ca {
            Some(path) => {
                let pem = std::fs::read(path).map_err(|source| CliError::Read { path: path.clone(), source })?;
                builder.tls_certs_only(reqwest::Certificate::from_pem_bundle(&pem).map_err(fail)?)
            }
            None => builder,
        };
        let http = builder.build().map_err(fail)?;
        Ok(Self { http, base, token, private })
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
        let response = self.send(method, path, Some(body), Some(ANSWER)).await?;
        self.changed(path, response).await
    }

    /// What came of a change; it may wait for a second person.
    async fn changed<T: DeserializeOwned>(&self, path: &str, response: Response) -> Result<T, CliError> {
        if response.status() == StatusCode::ACCEPTED {
            let kept: Kept = self.read(path, response).await?;
            let PendingView { id, what, deadline_ms, .. } = kept.pending;
            let until = jiff::Timestamp::from_millisecond(deadline_ms).unwrap_or_default();
            return Err(CliError::Kept { id, what, until });
        }
        self.read(path, response).await
    }

    /// Sends a file as it is.
    pub(super) async fn upload<T: DeserializeOwned>(
        &self,
        path: &str,
        kind: &'static str,
        bytes: Vec<u8>,
    ) -> Result<T, CliError> {
        let url = self.url(path);
        let request = self.http.post(&url).header(reqwest::header::CONTENT_TYPE, kind).body(bytes).timeout(3 * ANSWER);
        let response = self.answer(request, url).await?;
        self.changed(path, response).await
    }

    /// Puts bytes as they are. They are a secret: nothing is sent where somebody could read it on the way.
    pub(super) async fn put<T: DeserializeOwned>(&self, path: &str, bytes: Vec<u8>) -> Result<T, CliError> {
        if !self.private {
            return Err(CliError::SecretInTheClear(self.base.clone()));
        }
        let url = self.url(path);
        let kind = "application/octet-stream";
        let request = self.http.put(&url).header(reqwest::header::CONTENT_TYPE, kind).body(bytes).timeout(ANSWER);
        let response = self.answer(request, url).await?;
        self.read(path, response).await
    }

    /// An answer that is text, as it is.
    pub(super) async fn get_text(&self, path: &str) -> Result<String, CliError> {
        let response = self.send(Method::GET, path, None::<&()>, Some(ANSWER)).await?;
        let text = response.text().await;
        text.map_err(|e| CliError::Request { url: self.url(path), reason: with_causes(&e) })
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
    async fn trust_root(&self) -> Result<Vec<u8>, CliError> {
        let url = format!("{}/metadata/1.root.json", self.base);
        let response = self.request(Method::GET, url.clone(), None::<&()>, Some(ANSWER)).await?;
        let bytes = response.bytes().await;
        Ok(bytes.map_err(|e| CliError::Request { url, reason: with_causes(&e) })?.to_vec())
    }

    /// That a server that was named serves this site: another's machines say nothing of it. The site's own is asked by
    /// its socket.
    pub(super) async fn is_of(&self, site: &SiteDir, at: &At) -> Result<(), CliError> {
        let Some(url) = &at.server else { return Ok(()) };
        let path = site.repo().join("metadata/1.root.json");
        let own = std::fs::read(&path).map_err(|source| CliError::Read { path, source })?;
        if self.trust_root().await? == own {
            return Ok(());
        }
        Err(CliError::OtherSite { url: url.clone(), site: site.path.clone() })
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
        let request = match &self.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        };
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

#[cfg(test)]
mod tests {
    use super::may_show_token;

    #[test]
    fn a_token_goes_over_tls_or_to_this_host() {
        for good in ["https://kiln.example", "http://127.0.0.1:8080", "http://[::1]:8080", "http://localhost:1"] {
            assert!(may_show_token(good), "{good}");
        }
        for bad in ["http://10.0.0.1:8080", "http://127.0.0.1.evil:80", "http://localhost.evil", "ftp://localhost", "x"]
        {
            assert!(!may_show_token(bad), "{bad}");
        }
        assert!(!may_show_token("http://127.0.0.1@evil/"), "the host is what follows the @");
    }
}
