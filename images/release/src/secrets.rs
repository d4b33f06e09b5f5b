//! The secrets that a release wants: names, owners, and the units that need them. Their values are nowhere in a release; a
//! machine that runs it is given those of its site that it declares, and no others.

use crate::declared::is_unit;
use serde::{Deserialize, Serialize};

/// Where a running system finds them, a file each, named as the secret is.
pub const SECRETS_PATH: &str = "/run/kiln/secrets";
/// Most secrets of a release.
pub const MAX_SECRETS: usize = 32;
/// Most units of a secret.
const MAX_UNITS: usize = 16;

/// One secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WantedSecret {
    /// What the site calls it.
    pub name: String,
    /// The user that may read its file; none: root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// Without it the machine is not healthy.
    #[serde(default = "yes", skip_serializing_if = "Clone::clone")]
    pub required: bool,
    /// Services that need it: started once all required secrets are there, reloaded or restarted when it is another.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub units: Vec<String>,
}

fn yes() -> bool {
    true
}

/// A file name without surprises: 1 to 63 of a-z, 0-9, `.`, `_` and `-`, a letter or digit first.
pub fn is_secret_name(name: &str) -> bool {
    (1..=63).contains(&name.len())
        && name.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        && name.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-'))
}

/// What useradd(8) takes for a user's name.
fn is_user(name: &str) -> bool {
    (1..=32).contains(&name.len())
        && name.starts_with(|c: char| c.is_ascii_lowercase() || c == '_')
        && name.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-'))
}

impl WantedSecret {
    /// What is wrong with it, if anything.
    pub fn check(&self) -> Result<(), &'static str> {
        let ensure = |holds: bool, reason| if holds { Ok(()) } else { Err(reason) };
        let name = "a secret's name is 1 to 63 of a-z, 0-9, `.`, `_` and `-`, beginning with a letter or digit";
        ensure(is_secret_name(&self.name), name)?;
        ensure(self.owner.as_deref().is_none_or(is_user), "a secret's owner is a user of the root, as \"postgres\"")?;
        let services = |unit: &String| is_unit(unit) && unit.ends_with(".service");
        let units = "a secret's units are at most 16 services";
        ensure(self.units.len() <= MAX_UNITS && self.units.iter().all(services), units)
    }
}

/// All of a release: names are there once, and not too many.
pub fn check_secrets(secrets: &[WantedSecret]) -> Result<(), (String, &'static str)> {
    if secrets.len() > MAX_SECRETS {
        return Err((secrets.len().to_string(), "at most 32 secrets"));
    }
    for (number, secret) in secrets.iter().enumerate() {
        secret.check().map_err(|reason| (secret.name.clone(), reason))?;
        if secrets[..number].iter().any(|other| other.name == secret.name) {
            return Err((secret.name.clone(), "two secrets have the same name"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_said_is_root_s_and_required() {
        let read: WantedSecret = serde_json::from_str(r#"{"name":"a"}"#).unwrap();
        assert_eq!((read.owner.as_deref(), read.required, read.units.len()), (None, true, 0));
        assert_eq!(serde_json::to_string(&read).unwrap(), r#"{"name":"a"}"#);
        let read: WantedSecret = serde_json::from_str(r#"{"name":"a","required":false}"#).unwrap();
        assert!(!read.required && serde_json::to_string(&read).unwrap().contains("false"));
        assert!(serde_json::from_str::<WantedSecret>(r#"{"name":"a","path":"/etc/shadow"}"#).is_err());
    }

    #[test]
    fn names_owners_and_units_have_their_form() {
        let of = |name: &str| WantedSecret { name: name.into(), owner: None, required: true, units: vec![] };
        let owner = |owner: &str| WantedSecret { owner: Some(owner.into()), ..of("a") };
        let unit = |unit: &str| WantedSecret { units: vec![unit.into()], ..of("a") };
        for good in [of("db-password"), owner("www-data"), owner("_chrony"), unit("db@1.service")] {
            assert_eq!(good.check(), Ok(()), "{good:?}");
        }
        for bad in [of("../x"), of(".x"), of(""), owner("0"), owner("a:b"), unit("x.mount"), unit("--now.service ")] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
        assert!(check_secrets(&[of("a"), of("b")]).is_ok());
        assert!(check_secrets(&[of("a"), of("a")]).is_err());
        assert!(check_secrets(&vec![of("a"); 33]).is_err());
    }
}
