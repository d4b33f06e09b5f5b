//! Log-in with an identity provider: OpenID Connect's authorization code flow (Core 1.0, section 3.1) with PKCE (RFC 7636),
//! `state`, `nonce`, and the issuer in the answer (RFC 9207). What the provider says is bounded in size and time; its
//! keys are fetched anew when a token names one that is not known, at most once in a while. While it does not answer nobody
//! queues: what one log-in found out the others are told, and few wait at once.

mod token;

pub use token::{Expected, Jwks, Person, TokenError, verify};

use crate::access::Login;
use crate::config::Oidc;
use crate::error::OidcError;
use kiln_release::with_causes;
use reqwest::redirect::Policy;
use reqwest::{Certificate, Client, RequestBuilder, StatusCode, Url};
use ring::digest;
use serde::Deserialize;
use std::time::Duration;
use tokio::sync::{Mutex, Semaphore, SemaphorePermit};
use tokio::time::{Instant, timeout};

/// An answer of the provider is at most so long, and takes at most so long.
const MAX_ANSWER: usize = 256 << 10;
const ANSWER: Duration = Duration::from_secs(10);
/// Where nobody listens, that is known sooner.
const CONNECT: Duration = Duration::from_secs(5);
/// A provider that did not answer is asked again after so long.
pub(crate) const AGAIN: Duration = Duration::from_secs(5);
/// Log-ins that wait for it at once, and how long one takes at most: unknown keys, what it says of itself, keys, the token.
const AT_ONCE: usize = 32;
const WHOLE: Duration = Duration::from_secs(45);
/// What it says of itself is asked for again after so long.
const FRESH: Duration = Duration::from_secs(3600);
/// Unknown keys make its keys be asked for at most so often.
const KEYS_AGAIN: Duration = Duration::from_secs(10);

/// OpenID Connect Discovery 1.0, section 3, as far as it is used.
#[derive(Debug, Clone, Deserialize)]
struct Discovery {
    issuer: String,
    authorization_endpoint: String,
    token_endpoint: String,
    jwks_uri: String,
    #[serde(default)]
    authorization_response_iss_parameter_supported: bool,
}

#[derive(Debug, Clone)]
struct Known {
    discovery: Discovery,
    keys: Jwks,
    at: Instant,
}

/// What was found out of the provider.
#[derive(Debug, Default)]
struct Found {
    known: Option<Known>,
    /// It did not answer: until when it is left alone, and what happened.
    away: Option<(Instant, String)>,
}

/// The provider.
#[derive(Debug)]
pub struct Provider {
    config: Oidc,
    secret: Option<String>,
    http: Client,
    found: Mutex<Found>,
    waiting: Semaphore,
}

/// What the provider sent the browser back with.
#[derive(Debug, Default, Deserialize)]
pub struct Answer {
    /// The authorization code.
    pub code: Option<String>,
    /// What was sent along.
    pub state: Option<String>,
    /// Who answers.
    pub iss: Option<String>,
    /// Why there is no code.
    pub error: Option<String>,
}

/// RFC 3986's unreserved characters stay.
fn encode(text: &str) -> String {
    use std::fmt::Write;
    text.bytes().fold(String::new(), |mut out, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            write!(out, "%{byte:02X}").expect("writing to a String cannot fail");
        }
        out
    })
}

fn query(pairs: &[(&str, &str)]) -> String {
    pairs.iter().map(|(name, value)| format!("{name}={}", encode(value))).collect::<Vec<_>>().join("&")
}

impl Provider {
    /// Reads its files. Nothing is asked of it before somebody logs in: it may start after this server.
    pub fn new(config: Oidc) -> Result<Self, OidcError> {
        let fail = |what, reason: String| OidcError::Provider { what, reason };
        let read = |what, path: &std::path::Path| {
            std::fs::read(path).map_err(|e| fail(what, format!("{}: {e}", path.display())))
        };
        let mut builder = Client::builder().redirect(Policy::none()).timeout(ANSWER).connect_timeout(CONNECT);
        if let Some(path) = &config.ca {
            let pem = read("the CA", path)?;
            let all = Certificate::from_pem_bundle(&pem).map_err(|e| fail("the CA", with_causes(&e)))?;
            builder = builder.tls_certs_only(all);
        }
        let secret = match &config.client_secret_file {
            Some(path) => {
                let bytes = read("the client secret", path)?;
                Some(String::from_utf8_lossy(&bytes).trim().to_owned())
            }
            None => None,
        };
        let http = builder.build().map_err(|e| fail("the client", with_causes(&e)))?;
        Ok(Self { config, secret, http, found: Mutex::default(), waiting: Semaphore::new(AT_ONCE) })
    }

    fn redirect_uri(&self) -> String {
        format!("{}/login/oidc/callback", self.config.url)
    }

    /// A place among those that wait.
    fn place(&self) -> Result<SemaphorePermit<'_>, OidcError> {
        self.waiting.try_acquire().map_err(|_| OidcError::Busy { limit: AT_ONCE, seconds: AGAIN.as_secs() })
    }

    /// Where the browser goes.
    pub async fn begin(&self, state: &str, nonce: &str, verifier: &str) -> Result<String, OidcError> {
        let _place = self.place()?;
        let known = timeout(WHOLE, self.known()).await.unwrap_or_else(|_| Err(too_long()))?;
        // RFC 7636, section 4.2.
        let challenge = token::to_base64url(digest::digest(&digest::SHA256, verifier.as_bytes()).as_ref());
        let redirect = self.redirect_uri();
        let pairs = query(&[
            ("response_type", "code"),
            ("client_id", &self.config.client_id),
            ("redirect_uri", &redirect),
            ("scope", &self.config.scopes.join(" ")),
            ("state", state),
            ("nonce", nonce),
            ("code_challenge", &challenge),
            ("code_challenge_method", "S256"),
        ]);
        let endpoint = &known.discovery.authorization_endpoint;
        let joint = if endpoint.contains('?') { '&' } else { '?' };
        Ok(format!("{endpoint}{joint}{pairs}"))
    }

    /// Who came back. The answer's `state` has been found to be this log-in's.
    pub async fn end(&self, login: &Login, answer: &Answer, now: i64) -> Result<Person, OidcError> {
        if let Some(error) = &answer.error {
            return Err(OidcError::Refused(error.chars().filter(char::is_ascii_graphic).take(64).collect()));
        }
        let _place = self.place()?;
        timeout(WHOLE, self.person(login, answer, now)).await.unwrap_or_else(|_| Err(too_long()))
    }

    async fn person(&self, login: &Login, answer: &Answer, now: i64) -> Result<Person, OidcError> {
        let known = self.known().await?;
        // RFC 9207, section 2.4: the answer of another provider is not exchanged with this one.
        match &answer.iss {
            Some(iss) if *iss != self.config.issuer => return Err(OidcError::State),
            None if known.discovery.authorization_response_iss_parameter_supported => return Err(OidcError::State),
            Some(_) | None => {}
        }
        let code = answer.code.as_deref().ok_or(OidcError::State)?;
        let id_token = self.exchange(&known.discovery, code, &login.verifier).await?;
        let expected = Expected {
            issuer: &self.config.issuer,
            client_id: &self.config.client_id,
            nonce: &login.nonce,
            groups_claim: &self.config.groups_claim,
            now,
        };
        match verify(&id_token, &known.keys, &expected) {
            // It may have a new key since. Whoever logs in waits until it may be asked again.
            Err(TokenError::UnknownKey(_)) => Ok(verify(&id_token, &self.newer(known.at).await?.keys, &expected)?),
            other => Ok(other?),
        }
    }

    /// What the provider says of itself, asked for after `old`.
    async fn newer(&self, old: Instant) -> Result<Known, OidcError> {
        tokio::time::sleep_until(old + KEYS_AGAIN).await;
        let mut found = self.found.lock().await;
        if found.known.as_ref().is_some_and(|known| known.at <= old) {
            found.known = None;
        }
        drop(found);
        self.known().await
    }

    async fn exchange(&self, discovery: &Discovery, code: &str, verifier: &str) -> Result<String, OidcError> {
        #[derive(Deserialize)]
        struct Tokens {
            id_token: String,
        }
        let redirect = self.redirect_uri();
        let mut pairs = vec![
            ("grant_type", "authorization_code"),
            ("code", code),
            ("redirect_uri", &redirect),
            ("code_verifier", verifier),
        ];
        if self.secret.is_none() {
            pairs.push(("client_id", &self.config.client_id));
        }
        let mut request = self.http.post(&discovery.token_endpoint);
        if let Some(secret) = &self.secret {
            // RFC 6749, section 2.3.1: both are form-encoded first.
            request = request.basic_auth(encode(&self.config.client_id), Some(encode(secret)));
        }
        let request = request.header("content-type", "application/x-www-form-urlencoded").body(query(&pairs));
        let bytes = fetch("the token", request).await?;
        let tokens: Result<Tokens, _> = serde_json::from_slice(&bytes);
        tokens.map(|t| t.id_token).map_err(|e| OidcError::Provider { what: "the token", reason: e.to_string() })
    }

    /// What it says of itself. One asks; those that come meanwhile wait, and are told what that one found.
    async fn known(&self) -> Result<Known, OidcError> {
        let mut found = self.found.lock().await;
        if let Some(known) = found.known.as_ref().filter(|known| known.at.elapsed() < FRESH) {
            return Ok(known.clone());
        }
        if let Some((until, reason)) = found.away.as_ref().filter(|(until, _)| Instant::now() < *until) {
            let seconds = until.duration_since(Instant::now()).as_secs() + 1;
            return Err(OidcError::Away { reason: reason.clone(), seconds });
        }
        match self.ask().await {
            Ok(known) => {
                *found = Found { known: Some(known.clone()), away: None };
                Ok(known)
            }
            Err(error) => {
                if let OidcError::Away { reason, .. } = &error {
                    found.away = Some((Instant::now() + AGAIN, reason.clone()));
                }
                Err(error)
            }
        }
    }

    async fn ask(&self) -> Result<Known, OidcError> {
        let wrong = |what, reason: String| OidcError::Provider { what, reason };
        let url = format!("{}/.well-known/openid-configuration", self.config.issuer.trim_end_matches('/'));
        let bytes = fetch("the discovery document", self.http.get(url)).await?;
        let discovery: Discovery =
            serde_json::from_slice(&bytes).map_err(|e| wrong("the discovery document", e.to_string()))?;
        // Discovery 1.0, section 4.3.
        if discovery.issuer != self.config.issuer {
            let got: String = discovery.issuer.chars().take(200).collect();
            return Err(wrong("the discovery document", format!("it is of {got:?}, not of {:?}", self.config.issuer)));
        }
        for endpoint in [&discovery.authorization_endpoint, &discovery.token_endpoint, &discovery.jwks_uri] {
            let secure = Url::parse(endpoint).is_ok_and(|url| {
                let local = matches!(url.host_str(), Some("127.0.0.1" | "[::1]" | "localhost"));
                url.scheme() == "https" || (url.scheme() == "http" && local)
            });
            if !secure || endpoint.contains('#') {
                let shown: String = endpoint.chars().take(200).collect();
                return Err(wrong("the discovery document", format!("{shown:?} is not https")));
            }
        }
        let keys = Jwks::parse(&fetch("the keys", self.http.get(&discovery.jwks_uri)).await?)?;
        Ok(Known { discovery, keys, at: Instant::now() })
    }
}

fn away(reason: String) -> OidcError {
    OidcError::Away { reason, seconds: AGAIN.as_secs() }
}

fn too_long() -> OidcError {
    away(format!("a log-in takes longer than {} s", WHOLE.as_secs()))
}

async fn fetch(what: &'static str, request: RequestBuilder) -> Result<Vec<u8>, OidcError> {
    let fail = |reason: String| OidcError::Provider { what, reason };
    let silent = |e: &reqwest::Error| away(format!("{what}: {}", with_causes(e)));
    let mut response = request.send().await.map_err(|e| silent(&e))?;
    let status = response.status();
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|e| silent(&e))? {
        if bytes.len() + chunk.len() > MAX_ANSWER {
            return Err(fail(format!("it is longer than {} KiB", MAX_ANSWER >> 10)));
        }
        bytes.extend_from_slice(&chunk);
    }
    if status == StatusCode::OK {
        return Ok(bytes);
    }
    let words: String = String::from_utf8_lossy(&bytes).chars().filter(|c| !c.is_control()).take(200).collect();
    let answered = format!("answered {status}: {words}");
    Err(if status.is_server_error() { away(format!("{what}: it {answered}")) } else { fail(answered) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_encoded() {
        assert_eq!(query(&[("a", "b c&d=é"), ("e", "~x-._")]), "a=b%20c%26d%3D%C3%A9&e=~x-._");
    }
}
