//! Network configurations: read from TOML, and signed into `site.json` by the keys of the top-level targets.

use crate::error::RecipeError;
use crate::signing::{Changed, change_site};
use crate::site_error::SiteError;
use jiff::Timestamp;
use kiln_release::network::NetworkConfig;
use std::path::Path;

/// Reads a configuration: `version` and `[[section]]`s. Keys that mean nothing are refused, and told by their path.
pub fn read_network(path: &Path, text: &str) -> Result<NetworkConfig, RecipeError> {
    let invalid = |line, column, message: String| RecipeError::Invalid { path: path.into(), line, column, message };
    let place = |error: &toml::de::Error| {
        let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
        (before.matches('\n').count() + 1, before.rsplit('\n').next().unwrap_or_default().chars().count() + 1)
    };
    let of_toml = |error: toml::de::Error| {
        let (line, column) = place(&error);
        invalid(line, column, error.message().trim().to_owned())
    };
    let config: NetworkConfig = toml::from_str(text).map_err(of_toml)?;
    let written: serde_json::Value = toml::from_str(text).map_err(of_toml)?;
    let read = serde_json::to_value(&config).expect("strings and numbers always become JSON");
    if let Some(key) = unknown_key(&written, &read) {
        let last = key.rsplit('.').next().unwrap_or(&key);
        let line = text.lines().position(|line| line.trim_start().starts_with(last)).map_or(1, |at| at + 1);
        return Err(invalid(line, 1, format!("unknown field `{key}`")));
    }
    config.check().map_err(|error| invalid(1, 1, error.to_string()))?;
    Ok(config)
}

/// The path of a key that was written and not read. What has its default value is written as nothing.
fn unknown_key(written: &serde_json::Value, read: &serde_json::Value) -> Option<String> {
    use serde_json::Value;
    match (written, read) {
        (Value::Object(written), Value::Object(read)) => written.iter().find_map(|(key, value)| match read.get(key) {
            Some(other) => unknown_key(value, other).map(|rest| format!("{key}.{rest}")),
            None if KEYS.contains(&key.as_str()) => None,
            None => Some(key.clone()),
        }),
        (Value::Array(written), Value::Array(read)) => {
            written.iter().zip(read).find_map(|(written, read)| unknown_key(written, read))
        }
        _ => None,
    }
}

/// Every key there is; one with its default value is left out where it is written again.
const KEYS: [&str; 21] = [
    "version",
    "section",
    "role",
    "machine",
    "mac",
    "link",
    "http_urls",
    "agent_urls",
    "name",
    "kind",
    "card",
    "on",
    "id",
    "mtu",
    "address",
    "gateway",
    "dns",
    "domain",
    "dhcp4",
    "slaac",
    "dhcp6",
];

/// Signs a configuration into the site's `site.json`. Its version must be above that of the one before.
pub fn sign_network(dir: &Path, config: NetworkConfig, now: Timestamp) -> Result<Changed, SiteError> {
    let version = config.version;
    let name = format!("network configuration {version}");
    change_site(dir, now, name, |document| {
        match &document.network {
            Some(old) if *old == config => return Ok(false),
            Some(old) if old.version >= version => {
                return Err(SiteError::NetworkVersion { old: old.version, new: version });
            }
            Some(_) | None => document.network = Some(config),
        }
        Ok(true)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "version = 3\n[[section]]\nrole = [\"db\"]\n[[section.link]]\nname = \"bond0\"\nkind = \"lacp\"\n\
        card = [\"any\"]\nmtu = 0\n[[section.link]]\nname = \"vlan10\"\nkind = \"vlan\"\non = \"bond0\"\nid = 10\ndhcp4 = true\n\
        dhcp6 = false\n";

    #[test]
    fn a_file_is_read_and_a_misspelt_key_refused_with_its_place() {
        let path = Path::new("net.toml");
        let config = read_network(path, TEXT).unwrap();
        assert_eq!((config.version, config.section[0].link.len(), config.section[0].link[1].dhcp4), (3, 2, true));
        for (from, to, expected) in [
            ("dhcp4", "dhpc4", "net.toml:14:1: unknown field `section.link.dhpc4`"),
            ("version = 3", "version = \"3\"", "net.toml:1:11:"),
            ("id = 10", "id = 0", "a VLAN's id is from 1 to 4094"),
            ("\"lacp\"", "\"lcap\"", "net.toml:6:8: unknown variant"),
        ] {
            let refused = read_network(path, &TEXT.replace(from, to)).unwrap_err().to_string();
            assert!(refused.contains(expected), "{refused}");
        }
    }
}
