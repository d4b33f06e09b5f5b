//! What a call that waits for a second person names: machines, by their ids. A name can be another's when it is done.

use super::second::{Asked, MACHINES};
use super::{Control, Inner};
use crate::access::Caller;
use crate::error::{AccessError, ControlError};
use axum::extract::Query;
use axum::http::Uri;
use kiln_fleet::access::AccessRole;
use kiln_protocol::{KeyId, MachineId};
use reqwest::Url;

/// A call as it is kept.
pub(super) struct Pinned {
    /// With its query.
    pub(super) path: String,
    pub(super) body: String,
    /// What its body or query called which machine, for whoever confirms.
    pub(super) named: Vec<(String, MachineId)>,
    /// The key that becomes the machine's, whole.
    pub(super) key: Option<KeyId>,
    /// The access role that both need.
    pub(super) least: AccessRole,
}

impl Control {
    /// The call, with ids in the place of names; and that it could be done now: nobody confirms what cannot be.
    pub(super) fn pinned(&self, by: &Caller, asked: &Asked<'_>) -> Result<Pinned, ControlError> {
        let inner = self.lock();
        let mut named = Vec::new();
        let mut path = pinned_query(&inner, asked.path, &mut named)?;
        let (mut old, mut least) = (None, asked.call.least);
        if let Some(name) = asked.machine {
            let id = inner.resolve(name)?;
            path = path.replacen(&format!("{MACHINES}{name}/"), &format!("{MACHINES}{id}/"), 1);
            if asked.call.action == "approve" {
                inner.check_approver(&id, by)?;
            }
            least = inner.least(asked.call, &id);
            old = Some(id);
        }
        let (mut body, mut key) = (asked.body.to_owned(), None);
        if let (Some(old), Some((pinned, name, new))) = (&old, pinned_body(&inner, asked)?) {
            self.replacement(&inner, old, &new)?;
            body = pinned;
            named.push((name, new));
        }
        if let Some(id) = &old
            && let Some((pinned, meant)) = self.pinned_key(&inner, id, asked)?
        {
            body = pinned;
            key = Some(meant);
        }
        Ok(Pinned { path, body, named, key, least })
    }

    /// `kiln machine clear --key` says in its body by its beginning which key is meant: another may begin so when it is done.
    fn pinned_key(
        &self,
        inner: &Inner,
        id: &MachineId,
        asked: &Asked<'_>,
    ) -> Result<Option<(String, KeyId)>, ControlError> {
        if asked.call.action != "clear" {
            return Ok(None);
        }
        let Ok(mut body) = serde_json::from_str::<serde_json::Value>(asked.body) else { return Ok(None) };
        let Some(digits) = body.get("key").and_then(|key| key.as_str()) else { return Ok(None) };
        let key = self.heard_key(inner, id, digits)?;
        body["key"] = key.as_str().into();
        Ok(Some((body.to_string(), key)))
    }
}

/// `kiln machine replace` says in its body which machine comes. What cannot be read is refused by the call itself.
fn pinned_body(inner: &Inner, asked: &Asked<'_>) -> Result<Option<(String, String, MachineId)>, ControlError> {
    if asked.call.action != "replace" {
        return Ok(None);
    }
    let Ok(mut body) = serde_json::from_str::<serde_json::Value>(asked.body) else { return Ok(None) };
    let Some(name) = body.get("with").and_then(|with| with.as_str()).map(str::to_owned) else { return Ok(None) };
    let id = inner.resolve(&name)?;
    body["with"] = id.as_str().into();
    Ok(Some((body.to_string(), name, id)))
}

/// `kiln secret remove` says in its query whose secret it is. The query is read as the call itself reads it, however it is
/// written, and what is kept is written anew.
fn pinned_query(inner: &Inner, path: &str, named: &mut Vec<(String, MachineId)>) -> Result<String, ControlError> {
    let Some((plain, _)) = path.split_once('?') else { return Ok(path.to_owned()) };
    let uri: Uri = path.parse().map_err(|_| AccessError::ProposalForm)?;
    let Query(pairs) = Query::<Vec<(String, String)>>::try_from_uri(&uri).map_err(|_| AccessError::ProposalForm)?;
    if pairs.is_empty() {
        return Ok(plain.to_owned());
    }
    let mut url = Url::parse("http://localhost/").expect("a constant URL");
    for (key, value) in pairs {
        if key == "machine" {
            let id = inner.resolve(&value)?;
            url.query_pairs_mut().append_pair(&key, id.as_str());
            named.push((value, id));
        } else {
            url.query_pairs_mut().append_pair(&key, &value);
        }
    }
    Ok(format!("{plain}?{}", url.query().unwrap_or_default()))
}
