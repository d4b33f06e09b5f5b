//! What a call that waits for a second person names: machines, by their ids. A name can be another's when it is done.

use super::second::{Asked, MACHINES};
use super::{Control, Inner};
use crate::error::ControlError;
use kiln_protocol::MachineId;

/// A call as it is kept.
pub(super) struct Pinned {
    /// With its query.
    pub(super) path: String,
    pub(super) body: String,
    /// What its body or query called which machine, for whoever confirms.
    pub(super) named: Vec<(String, MachineId)>,
}

impl Control {
    /// The call, with ids in the place of names; and that it could be done now: nobody confirms what cannot be.
    pub(super) fn pinned(&self, asked: &Asked<'_>) -> Result<Pinned, ControlError> {
        let inner = self.lock();
        let mut named = Vec::new();
        let mut path = pinned_query(&inner, asked.path, &mut named)?;
        let mut old = None;
        if let Some(name) = asked.machine {
            let id = inner.resolve(name)?;
            path = path.replacen(&format!("{MACHINES}{name}/"), &format!("{MACHINES}{id}/"), 1);
            old = Some(id);
        }
        let mut body = asked.body.to_owned();
        if let (Some(old), Some((pinned, name, new))) = (&old, pinned_body(&inner, asked)?) {
            self.replacement(&inner, old, &new)?;
            body = pinned;
            named.push((name, new));
        }
        Ok(Pinned { path, body, named })
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

/// `kiln secret remove` says in its query whose secret it is.
fn pinned_query(inner: &Inner, path: &str, named: &mut Vec<(String, MachineId)>) -> Result<String, ControlError> {
    let Some((path, query)) = path.split_once('?') else { return Ok(path.to_owned()) };
    let mut pairs = Vec::new();
    for pair in query.split('&') {
        match pair.strip_prefix("machine=") {
            Some(name) => {
                let id = inner.resolve(name)?;
                pairs.push(format!("machine={id}"));
                named.push((name.to_owned(), id));
            }
            None => pairs.push(pair.to_owned()),
        }
    }
    Ok(format!("{path}?{}", pairs.join("&")))
}
