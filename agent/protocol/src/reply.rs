//! The server's answer to a [`crate::Report`]: what it wants of the machine. Version 1, as in `wire`.

use crate::dbx::DbxOffer;
use crate::secrets::SecretsWord;
use crate::wire::Via;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The server's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// What the server wants of the machine.
    pub desired: Desired,
    /// Report again after so many milliseconds, ± 20 % of jitter by the agent.
    pub again_ms: u64,
    /// Whether the agent may ask to be held ([`crate::Report::wait_s`]).
    pub may_wait: bool,
    /// What the server says of the machine, for its screen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub about: Option<About>,
    /// The role's thresholds for health checks, for agents from before they were signed with the assignment
    /// ([`crate::RoleSettings::thresholds`]). No other reads them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub thresholds: BTreeMap<String, String>,
    /// The site's list of revoked boot programs, as long as the machine's firmware lacks it and may have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dbx: Option<DbxOffer>,
    /// The server has no proof of this boot and would take one: see [`crate::Attestation`].
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub attest: bool,
    /// What becomes of its secrets; none: it holds what it shall.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secrets: Option<SecretsWord>,
    /// It may have a certificate, and none that it was issued holds: see [`crate::CertificateRequest`].
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub certify: bool,
}

/// What a machine shows of itself that only the server knows. Nothing of it is believed in any decision.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// Its name; the id where nobody gave it one.
    pub name: String,
    /// URL of its page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub page: Option<String>,
    /// A person, or the pre-loaded list, has let it in.
    pub approved: bool,
    /// The server would show its approval code and has none: see [`crate::Introduction`].
    pub introduce: bool,
    /// Its protection class and how its boot stands beside it, in the words of every list; empty: a server from before.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub protection: String,
}

/// What the server wants of the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Desired {
    /// Changes exactly when the rest (but for freshness) does.
    pub etag: String,
    /// The decision.
    #[serde(flatten)]
    pub decision: Decision,
    /// An operator's order that this machine has not done yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub order: Option<OrderGiven>,
}

/// An operator's order, as the server hands it on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OrderGiven {
    /// Text of the order's envelope.
    pub order: String,
    /// Text of a freshness envelope over exactly these bytes: the director's clock, and that it is no old reply.
    pub freshness: String,
}

/// The server's decision for this machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "decision", rename_all = "lowercase")]
pub enum Decision {
    /// Nothing assigned: not approved yet, or quarantined.
    Wait {
        /// Why, in a sentence, and what a person can do.
        reason: String,
    },
    /// Assigned.
    Assigned {
        /// Text of the assignment envelope. The freshness reply's hash is over exactly these bytes.
        assignment: String,
        /// Text of the freshness envelope.
        freshness: String,
        /// How to leave, if another release runs.
        via: Via,
        /// Whether it may leave now.
        grant: Grant,
    },
}

/// The answer to "may I reimage myself now?".
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "grant", rename_all = "lowercase")]
pub enum Grant {
    /// Yes.
    Go,
    /// Not yet.
    Hold {
        /// Why, in a sentence.
        reason: String,
        /// When to expect a change, milliseconds from now, if known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        until_ms: Option<u64>,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes_of_version_1() {
        let reply = Reply {
            desired: Desired {
                etag: "7-hold".into(),
                decision: Decision::Assigned {
                    assignment: "{}".into(),
                    freshness: "{}".into(),
                    via: Via::Kexec,
                    grant: Grant::Hold { reason: "1 of 1 machines may be unavailable".into(), until_ms: None },
                },
                order: None,
            },
            again_ms: 30_000,
            may_wait: true,
            about: None,
            thresholds: BTreeMap::new(),
            dbx: None,
            attest: false,
            secrets: None,
            certify: false,
        };
        let golden = r#"{"desired":{"etag":"7-hold","decision":"assigned","assignment":"{}","freshness":"{}","via":"kexec","grant":{"grant":"hold","reason":"1 of 1 machines may be unavailable"}},"again_ms":30000,"may_wait":true}"#;
        assert_eq!(serde_json::to_string(&reply).unwrap(), golden);
        assert_eq!(serde_json::from_str::<Reply>(golden).unwrap(), reply);
        let newer = golden.replacen('{', r#"{"added_later":1,"#, 1);
        assert_eq!(serde_json::from_str::<Reply>(&newer).unwrap(), reply, "unknown fields are ignored");
        let (name, page) = ("rack-7".to_owned(), Some("http://10.0.0.1:8080/m/rack-7".to_owned()));
        let about = About { name, page, approved: false, introduce: true, protection: String::new() };
        let about = Reply { about: Some(about), ..reply.clone() };
        let more =
            r#","about":{"name":"rack-7","page":"http://10.0.0.1:8080/m/rack-7","approved":false,"introduce":true}}"#;
        let told = format!("{}{more}", golden.strip_suffix('}').unwrap());
        assert_eq!(serde_json::to_string(&about).unwrap(), told);
        assert_eq!(serde_json::from_str::<Reply>(&told).unwrap(), about);
        let with = told.replace(r#""introduce":true"#, r#""introduce":true,"protection":"attested""#);
        let promises = about.about.map(|about| About { protection: "attested".into(), ..about });
        let promises = Reply { about: promises, ..reply.clone() };
        assert_eq!(serde_json::to_string(&promises).unwrap(), with);
        assert_eq!(serde_json::from_str::<Reply>(&with).unwrap(), promises);
        let set = Reply { thresholds: [("disk./var".into(), "10%".into())].into(), ..reply.clone() };
        let with = golden.replace(r#""may_wait":true"#, r#""may_wait":true,"thresholds":{"disk./var":"10%"}"#);
        assert_eq!(serde_json::to_string(&set).unwrap(), with);
        assert_eq!(serde_json::from_str::<Reply>(&with).unwrap(), set);
        let asked = Reply { attest: true, ..reply.clone() };
        let with = golden.replace(r#""may_wait":true"#, r#""may_wait":true,"attest":true"#);
        assert_eq!(serde_json::to_string(&asked).unwrap(), with);
        assert_eq!(serde_json::from_str::<Reply>(&with).unwrap(), asked);
        let certified = Reply { certify: true, ..reply.clone() };
        let with = golden.replace(r#""may_wait":true"#, r#""may_wait":true,"certify":true"#);
        assert_eq!(serde_json::to_string(&certified).unwrap(), with);
        assert_eq!(serde_json::from_str::<Reply>(&with).unwrap(), certified);
        let order = Some(OrderGiven { order: "{}".into(), freshness: "{}".into() });
        let ordered = Reply { desired: Desired { order, ..reply.desired.clone() }, ..reply };
        let golden = golden.replace(r#"}},"again_ms""#, r#"},"order":{"order":"{}","freshness":"{}"}},"again_ms""#);
        assert_eq!(serde_json::to_string(&ordered).unwrap(), golden);
        assert_eq!(serde_json::from_str::<Reply>(&golden).unwrap(), ordered);
    }
}
