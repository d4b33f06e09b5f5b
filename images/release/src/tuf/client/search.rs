//! The search for targets through the delegations (5.6.7): which file it needs next.

use super::{Client, Listing, Step, Visit};
use crate::envelope::KeySet;
use crate::error::TufError;
use crate::tuf::model::Targets;
use crate::tuf::path::{TargetPath, delegates};
use std::collections::BTreeSet;

#[derive(Debug)]
pub(super) struct Search {
    /// `None`: every role is visited, and what they list is searched for afterwards.
    path: Option<TargetPath>,
    stack: Vec<Visit>,
    visited: BTreeSet<String>,
}

impl Client {
    /// Goes on until a file is needed: 5.6.7 for each wanted target, then nothing.
    pub(super) fn advance(&mut self) -> Result<(), TufError> {
        loop {
            let Some(mut search) = self.search.take() else {
                if self.listing == Listing::ToBeMade {
                    self.listing = Listing::Made;
                    self.search = Some(self.search_for(None));
                    continue;
                }
                match self.todo.pop_front() {
                    Some(path) if self.targets.contains_key(path.as_str()) => {}
                    Some(path) => self.search = Some(self.search_for(Some(path))),
                    None => {
                        self.step = Step::Done;
                        return Ok(());
                    }
                }
                continue;
            };
            let Some(visit) = search.stack.pop() else {
                self.end_search(search)?;
                continue;
            };
            // 5.6.7.1: a role visited before is skipped (a cycle), and there is a maximum.
            if search.visited.contains(&visit.role) {
                self.search = Some(search);
                continue;
            }
            if search.path.is_some() && search.visited.len() >= self.trust.limits.roles as usize {
                let path = search.path.map(String::from).unwrap_or_default();
                return Err(TufError::TooManyRoles { path, limit: self.trust.limits.roles });
            }
            let Some(loaded) = self.roles.get_mut(&visit.role) else {
                search.stack.push(visit.clone());
                self.search = Some(search);
                if self.use_kept_role(&visit) {
                    continue;
                }
                return self.fetch_role(visit);
            };
            // It may have been fetched on behalf of another role that delegates to it: these keys must hold too.
            if !loaded.checked.contains(&visit.keys) {
                if let Err(error) = loaded.envelope.check(&visit.keys) {
                    let version = loaded.document.version;
                    return Err(TufError::of_envelope(&self.trust.file_of(&visit.role, version), error));
                }
                loaded.checked.push(visit.keys);
            }
            search.visited.insert(visit.role.clone());
            if let Some((path, listed)) =
                search.path.as_ref().and_then(|path| Some((path, loaded.document.targets.get(path.as_str())?)))
            {
                let (path, listed) = (path.clone(), listed.clone());
                self.step = Step::Target { path, role: visit.role.clone(), listed: listed.clone() };
                if !["sha256", "sha512"].iter().any(|name| listed.hashes.contains_key(*name)) {
                    return Err(TufError::NoKnownHash { file: self.file(), role: visit.role });
                }
                return self.within_limit(Some(listed.length), self.trust.limits.target);
            }
            descend(&mut search, &loaded.document);
            self.search = Some(search);
        }
    }

    fn search_for(&self, path: Option<TargetPath>) -> Search {
        Search { path, stack: vec![self.top()], visited: BTreeSet::new() }
    }

    fn end_search(&mut self, search: Search) -> Result<(), TufError> {
        match search.path {
            Some(_) if self.listing == Listing::Made => {}
            Some(path) => return Err(TufError::TargetNotListed { path: path.into() }),
            None => {
                let names: BTreeSet<&String> =
                    self.roles.values().flat_map(|loaded| loaded.document.targets.keys()).collect();
                self.todo = names.into_iter().map(|name| TargetPath::new(name.clone())).collect::<Result<_, _>>()?;
            }
        }
        Ok(())
    }
}

/// 5.6.7.2: the delegations that cover the path, in order; a terminating one ends the search elsewhere.
fn descend(search: &mut Search, document: &Targets) {
    let Some(delegations) = &document.delegations else { return };
    let mut children = Vec::new();
    for role in &delegations.roles {
        if search.path.as_ref().is_none_or(|path| delegates(role, path.as_str())) {
            let keys = KeySet::of_role(&delegations.keys, &role.keyids, role.threshold);
            children.push(Visit { role: role.name.clone(), keys });
            if role.terminating && search.path.is_some() {
                search.stack.clear();
                break;
            }
        }
    }
    search.stack.extend(children.into_iter().rev());
}
