//! `[access]`, `[https]` and `[oidc]`: who may call, over what, and who says who somebody is.

use super::raw::bad;
use crate::access::calls;
use crate::error::ConfigError;
use kiln_fleet::access::AccessRole;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

/// Most groups that `[oidc.roles]` names.
const MAX_GROUPS: usize = 256;

/// Who may call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Access {
    /// Whoever reaches the port reads what [`calls::Kind::Open`] is.
    pub anonymous_reads: bool,
    /// How long a token holds, if its maker says nothing, in milliseconds.
    pub token_default: u64,
    /// How long it holds at most.
    pub token_max: u64,
    /// What needs a second person.
    pub four_eyes: BTreeSet<String>,
    /// So many machines a person assigns to alone in an hour; none: any number.
    pub assign_alone: Option<usize>,
    /// How long a second person has.
    pub pending: u64,
    /// A session of the web page that is not used for so long ends.
    pub session_idle: u64,
    /// It ends after so long in any case.
    pub session_max: u64,
}

/// The operator API and the web page over TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Https {
    /// Where.
    pub listen: SocketAddr,
    /// Certificate chain and key, PEM; none: made by this site's CA at each start.
    pub files: Option<(PathBuf, PathBuf)>,
    /// Names and addresses of a certificate that is made.
    pub names: Vec<String>,
}

/// The identity provider.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Oidc {
    /// Its issuer identifier.
    pub issuer: String,
    /// What it calls this server.
    pub client_id: String,
    /// File with the client's secret; none: a public client, with PKCE alone.
    pub client_secret_file: Option<PathBuf>,
    /// The claim that lists groups.
    pub groups_claim: String,
    /// What is asked for.
    pub scopes: Vec<String>,
    /// Where browsers reach this server.
    pub url: String,
    /// CA certificates of the provider, PEM; none: those of this host.
    pub ca: Option<PathBuf>,
    /// What a group's members may do.
    pub roles: BTreeMap<String, AccessRole>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RawAnonymous {
    #[default]
    Read,
    None,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawAccess {
    anonymous: RawAnonymous,
    token_default: Option<String>,
    token_max: Option<String>,
    four_eyes: Vec<String>,
    assign_alone: Option<usize>,
    pending: Option<String>,
    session_idle: Option<String>,
    session_max: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawHttps {
    listen: SocketAddr,
    certificate: Option<PathBuf>,
    key: Option<PathBuf>,
    #[serde(default)]
    names: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawOidc {
    issuer: String,
    client_id: String,
    client_secret_file: Option<PathBuf>,
    groups_claim: Option<String>,
    scopes: Option<Vec<String>>,
    url: String,
    ca: Option<PathBuf>,
    #[serde(default)]
    roles: BTreeMap<String, String>,
}

const MINUTE: u64 = 60_000;
const DAY: u64 = 24 * 60 * MINUTE;

/// A time within bounds, in milliseconds; a day is 24 hours.
fn time(key: &str, text: Option<&str>, usual: u64, (least, most): (u64, u64), form: &str) -> Result<u64, ConfigError> {
    let Some(text) = text else { return Ok(usual) };
    let ms = super::span_ms(text).filter(|ms| (least..=most).contains(ms));
    ms.ok_or_else(|| bad(key, format!("{text:?}: expected {form}, as \"30m\", \"12h\" or \"30d\"")))
}

impl TryFrom<RawAccess> for Access {
    type Error = ConfigError;
    fn try_from(raw: RawAccess) -> Result<Self, ConfigError> {
        let known = calls::four_eyes_actions();
        if let Some(other) = raw.four_eyes.iter().find(|action| !known.contains(&action.as_str())) {
            return Err(bad("access.four_eyes", format!("{other:?}; known are: {}", known.join(", "))));
        }
        let tokens = (5 * MINUTE, 1000 * DAY);
        let token_max = time("access.token_max", raw.token_max.as_deref(), 365 * DAY, tokens, "5m to 1000d")?;
        let usual = token_max.min(30 * DAY);
        let token_default = time("access.token_default", raw.token_default.as_deref(), usual, tokens, "5m to 1000d")?;
        if token_default > token_max {
            return Err(bad("access.token_default", "it is longer than access.token_max"));
        }
        let session_max =
            time("access.session_max", raw.session_max.as_deref(), 12 * 60 * MINUTE, (MINUTE, 30 * DAY), "1m to 30d")?;
        let session_idle = time(
            "access.session_idle",
            raw.session_idle.as_deref(),
            session_max.min(30 * MINUTE),
            (MINUTE, 30 * DAY),
            "1m to 30d",
        )?;
        if raw.assign_alone == Some(0) {
            return Err(bad("access.assign_alone", "0: say four_eyes = [\"assign\"] instead"));
        }
        Ok(Self {
            anonymous_reads: raw.anonymous == RawAnonymous::Read,
            token_default,
            token_max,
            four_eyes: raw.four_eyes.into_iter().collect(),
            assign_alone: raw.assign_alone,
            pending: time("access.pending", raw.pending.as_deref(), DAY, (MINUTE, 30 * DAY), "1m to 30d")?,
            session_idle,
            session_max,
        })
    }
}

impl TryFrom<RawHttps> for Https {
    type Error = ConfigError;
    fn try_from(raw: RawHttps) -> Result<Self, ConfigError> {
        let files = match (raw.certificate, raw.key) {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (None, None) => None,
            (Some(_), None) | (None, Some(_)) => {
                return Err(bad("https", "certificate and key belong together: name both, or neither"));
            }
        };
        if files.is_some() && !raw.names.is_empty() {
            return Err(bad("https.names", "only for a certificate that is made; the file's has its own"));
        }
        for name in &raw.names {
            let host = name.len() <= 253 && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-.".contains(&b));
            let reserved = name.eq_ignore_ascii_case(kiln_release::AGENT_API_NAME);
            if name.is_empty() || reserved || (!host && name.parse::<IpAddr>().is_err()) {
                return Err(bad("https.names", format!("{name:?}: expected a host name or an address of this server")));
            }
        }
        Ok(Self { listen: raw.listen, files, names: raw.names })
    }
}

/// `https://…`, or http to this host itself.
fn secure_url(key: &str, url: &str) -> Result<String, ConfigError> {
    let plain = url.len() <= 500 && url.bytes().all(|b| b.is_ascii_graphic() && !b"\"'<>\\?#".contains(&b));
    let local = ["http://127.0.0.1:", "http://[::1]:", "http://localhost:"].iter().any(|p| url.starts_with(p));
    if !plain || !(url.starts_with("https://") || local) {
        let form = "expected https://HOST; http only to this host itself, as http://127.0.0.1:9000";
        return Err(bad(key, format!("{url:?}: {form}")));
    }
    Ok(url.trim_end_matches('/').to_owned())
}

impl TryFrom<RawOidc> for Oidc {
    type Error = ConfigError;
    fn try_from(raw: RawOidc) -> Result<Self, ConfigError> {
        if raw.client_id.is_empty() {
            return Err(bad("oidc.client_id", "it is empty"));
        }
        if raw.roles.is_empty() || raw.roles.len() > MAX_GROUPS {
            let reason = format!("1 to {MAX_GROUPS} lines, as \"kiln-operators\" = \"operator\": others get nothing");
            return Err(bad("oidc.roles", reason));
        }
        if raw.scopes.as_ref().is_some_and(|scopes| !scopes.iter().any(|scope| scope == "openid")) {
            return Err(bad("oidc.scopes", "\"openid\" must be one of them: without it there is no ID token"));
        }
        let role = |(group, role): (String, String)| {
            role.parse().map(|role| (group.clone(), role)).map_err(|e| bad(&format!("oidc.roles.{group:?}"), e))
        };
        // Compared byte for byte with what the provider says (OpenID Connect Core 1.0, section 2), so not trimmed.
        secure_url("oidc.issuer", &raw.issuer)?;
        Ok(Self {
            issuer: raw.issuer,
            client_id: raw.client_id,
            client_secret_file: raw.client_secret_file,
            groups_claim: raw.groups_claim.unwrap_or_else(|| "groups".to_owned()),
            scopes: raw.scopes.unwrap_or_else(|| vec!["openid".to_owned()]),
            url: secure_url("oidc.url", &raw.url)?,
            ca: raw.ca,
            roles: raw.roles.into_iter().map(role).collect::<Result<_, _>>()?,
        })
    }
}

impl Oidc {
    /// What members of these groups may do: the most of it.
    pub fn role_of(&self, groups: &[String]) -> Option<AccessRole> {
        groups.iter().filter_map(|group| self.roles.get(group)).max().copied()
    }

    /// Changes exactly when what groups may do changes.
    pub fn mapping(&self) -> String {
        let text = serde_json::to_vec(&(&self.issuer, &self.client_id, &self.groups_claim, &self.roles));
        kiln_release::hex::sha256(&text.expect("strings always become JSON"))
    }
}

#[cfg(test)]
mod tests {
    use crate::config::Config;
    use kiln_fleet::access::AccessRole;

    const ALL: &str = r#"
[access]
anonymous = "none"
token_default = "7d"
token_max = "90d"
four_eyes = ["assign", "order", "admin-token"]
assign_alone = 5
pending = "2h"
session_idle = "10m"
session_max = "8h"
[https]
listen = "127.0.0.1:18444"
names = ["kiln.example", "10.0.0.1"]
[oidc]
issuer = "https://id.example/realm/"
client_id = "kiln"
client_secret_file = "/etc/kiln/secret"
groups_claim = "roles"
url = "https://kiln.example:8444/"
ca = "/etc/kiln/ca.pem"
[oidc.roles]
"kiln-admins" = "admin"
"rack staff" = "technician"
"#;

    #[test]
    fn every_key_is_read() {
        let c = Config::parse(ALL).unwrap();
        let day = 24 * 3_600_000;
        assert!(!c.access.anonymous_reads && c.access.four_eyes.contains("order"));
        assert_eq!((c.access.token_default, c.access.token_max, c.access.pending), (7 * day, 90 * day, 2 * 3_600_000));
        assert_eq!(
            (c.access.session_idle, c.access.session_max, c.access.assign_alone),
            (600_000, 8 * 3_600_000, Some(5))
        );
        assert_eq!(c.https.unwrap().names, ["kiln.example", "10.0.0.1"]);
        let oidc = c.oidc.unwrap();
        assert_eq!(
            (oidc.issuer.as_str(), oidc.url.as_str()),
            ("https://id.example/realm/", "https://kiln.example:8444")
        );
        let role = |groups: &[&str]| oidc.role_of(&groups.iter().map(|g| (*g).to_owned()).collect::<Vec<_>>());
        assert_eq!(role(&["x", "rack staff"]).map(AccessRole::as_str), Some("technician"));
        assert_eq!(role(&["rack staff", "kiln-admins"]).map(AccessRole::as_str), Some("admin"));
        assert_eq!(role(&["Kiln-Admins", ""]), None);
        let defaults = Config::default();
        assert!(defaults.access.anonymous_reads && defaults.https.is_none() && defaults.oidc.is_none());
    }

    #[test]
    fn mistakes_are_named() {
        let message = |text: &str| Config::parse(text).unwrap_err().to_string();
        let oidc = "[oidc]\nissuer = \"https://i\"\nclient_id = \"k\"\nurl = \"https://k\"\n";
        for (text, expected) in [
            ("[access]\nanonymous = \"all\"", "line 2"),
            ("[access]\nfour_eyes = [\"asign\"]", "access.four_eyes: \"asign\"; known are: approve"),
            ("[access]\ntoken_max = \"1m\"", "access.token_max: \"1m\""),
            ("[access]\ntoken_default = \"20d\"\ntoken_max = \"10d\"", "longer than access.token_max"),
            ("[access]\nassign_alone = 0", "access.assign_alone"),
            ("[https]\nlisten = \"127.0.0.1:1\"\ncertificate = \"c\"", "name both, or neither"),
            ("[https]\nlisten = \"127.0.0.1:1\"\nnames = [\"kiln agent\"]", "https.names: \"kiln agent\""),
            (
                &format!("{}[oidc.roles]\na = \"viewer\"", oidc.replace("https://i", "http://id.example")),
                "oidc.issuer: \"http://id.example\"",
            ),
            (oidc, "oidc.roles: 1 to 256"),
            (&format!("{oidc}[oidc.roles]\na = \"root\""), "\"root\" is no access role"),
        ] {
            let got = message(text);
            assert!(got.contains(expected), "{text}: {got}");
        }
        assert!(
            Config::parse(&oidc.replace("https://i", "http://127.0.0.1:9000"))
                .unwrap_err()
                .to_string()
                .contains("oidc.roles")
        );
        let reserved = format!("[https]\nlisten = \"127.0.0.1:1\"\nnames = [\"{}\"]", kiln_release::AGENT_API_NAME);
        assert!(message(&reserved).contains("https.names"));
    }
}
