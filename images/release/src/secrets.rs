//! The secrets that a release wants: names, owners, and the units that need them. Their values are nowhere in a release; a
//! machine that runs it is given those of its site that it declares, and no others. Likewise a certificate of the machine's
//! own, by which other programs know it.

use crate::declared::is_unit;
use serde::{Deserialize, Serialize};

/// Where a running system finds them, a file each, named as the secret is.
pub const SECRETS_PATH: &str = "/run/kiln/secrets";
/// Where it finds its machine's private key and certificate, in one file: neither is ever there without the other.
pub const IDENTITY_NAME: &str = "identity.pem";
/// And beside it the certificate of the CA that issued it.
pub const MACHINE_CA_NAME: &str = "machine-ca.pem";
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

/// To which machines the site issues a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CertificatePolicy {
    /// To each that is approved and in service.
    #[default]
    Approved,
    /// To those of them whose TPM has proven this boot.
    Attested,
}

/// A certificate for the machine that runs the release.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WantedCertificate {
    /// The user that may read key and certificate; none: root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// Without it the machine is not healthy.
    #[serde(default = "yes", skip_serializing_if = "Clone::clone")]
    pub required: bool,
    /// Services that need it: started once it and all required secrets are there, reloaded or restarted when it is another.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub units: Vec<String>,
    /// Which machines get one.
    #[serde(default)]
    pub policy: CertificatePolicy,
}

impl WantedCertificate {
    /// What is wrong with it, beside these secrets, if anything.
    pub fn check(&self, secrets: &[WantedSecret]) -> Result<(), &'static str> {
        let ensure = |holds: bool, reason| if holds { Ok(()) } else { Err(reason) };
        let owner = "a certificate's owner is a user of the root, as \"www-data\"";
        ensure(self.owner.as_deref().is_none_or(is_user), owner)?;
        ensure(are_services(&self.units), "a certificate's units are at most 16 services")?;
        let own = |secret: &WantedSecret| [IDENTITY_NAME, MACHINE_CA_NAME].contains(&secret.name.as_str());
        ensure(!secrets.iter().any(own), "the certificate's files are identity.pem and machine-ca.pem: no secret is")
    }
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
        ensure(are_services(&self.units), "a secret's units are at most 16 services")
    }
}

fn are_services(units: &[String]) -> bool {
    units.len() <= MAX_UNITS && units.iter().all(|unit| is_unit(unit) && unit.ends_with(".service"))
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
    fn a_certificate_is_for_approved_machines_unless_it_says_more() {
        let read = |text: &str| serde_json::from_str::<WantedCertificate>(text);
        let usual = read("{}").unwrap();
        assert!(usual.required && usual.owner.is_none() && usual.policy == CertificatePolicy::Approved);
        assert_eq!(serde_json::to_string(&usual).unwrap(), r#"{"policy":"approved"}"#);
        let strict = read(r#"{"owner":"www-data","units":["nginx.service"],"policy":"attested"}"#).unwrap();
        assert_eq!((strict.policy, strict.check(&[])), (CertificatePolicy::Attested, Ok(())));
        assert!(read(r#"{"policy":"anybody"}"#).is_err() && read(r#"{"name":"a"}"#).is_err());
        assert!(WantedCertificate { owner: Some("0".into()), ..usual.clone() }.check(&[]).is_err());
        assert!(WantedCertificate { units: vec!["x.mount".into()], ..usual.clone() }.check(&[]).is_err());
        let secret = |name: &str| WantedSecret { name: name.into(), owner: None, required: true, units: vec![] };
        assert!(usual.check(&[secret("a")]).is_ok() && usual.check(&[secret("a"), secret(IDENTITY_NAME)]).is_err());
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
