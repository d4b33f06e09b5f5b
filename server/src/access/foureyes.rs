//! A call that waits for a second person: as it was made, so that it is done later as it was asked for.

use super::Token;
use kiln_fleet::Millis;
use kiln_fleet::access::{AccessRole, Proposal};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// How the names of this host's own users begin.
pub(super) const LOCAL: &str = "uid ";
/// Proposals that are open at once.
pub(crate) const MAX_OPEN: usize = 100;
/// Proposals that are remembered; the oldest that are over are forgotten.
pub(crate) const MAX_KEPT: usize = 500;

/// A person whom the identity provider named, as it last did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asker {
    /// Its groups that the configuration knew.
    pub groups: Vec<String>,
    /// What the configuration made of groups then.
    pub mapping: String,
}

/// A proposal and its call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// What was asked for, and where it stands.
    pub proposal: Proposal,
    /// The least access role that it needs, of both.
    pub least: AccessRole,
    /// The token that asked, if it was one: if it does not hold any more, nothing is done in its name.
    pub token: Option<String>,
    /// What is known of the person who asked, if the identity provider named it.
    #[serde(default)]
    pub asker: Option<Asker>,
    /// The call's method.
    pub method: String,
    /// The call's path and query.
    pub path: String,
    /// What its body is.
    pub content_type: String,
    /// The call's body.
    pub body: String,
}

impl Kept {
    pub(crate) fn note(&self) -> String {
        format!("pending/{}", self.proposal.id)
    }
}

/// All who can act as this one: itself, and along the tokens by whose hand it has its own, each maker.
pub(crate) fn behind(name: &str, tokens: &BTreeMap<String, Token>) -> BTreeSet<String> {
    along(name, tokens, |token| std::iter::once(&token.by).chain(&token.second).chain(&token.behind).cloned().collect())
}

/// Those of whom each can act as this one without another's help: itself, and along tokens that one person made, each maker.
/// Not the users of the boot server's own host, by whose hand most people have their first token: they own it, and need none.
pub(crate) fn alone(name: &str, tokens: &BTreeMap<String, Token>) -> BTreeSet<String> {
    let mut all = along(name, tokens, |token| match token.second {
        Some(_) => Vec::new(),
        None => std::iter::once(&token.by).chain(&token.alone).cloned().collect(),
    });
    all.retain(|who| who == name || !who.starts_with(LOCAL));
    all
}

fn along(name: &str, tokens: &BTreeMap<String, Token>, makers: impl Fn(&Token) -> Vec<String>) -> BTreeSet<String> {
    let mut all = BTreeSet::from([name.to_owned()]);
    let mut next = vec![name.to_owned()];
    while let Some(name) = next.pop() {
        // A name may have been given more than once over time: each maker counts.
        for maker in tokens.values().filter(|token| token.actor() == name).flat_map(&makers) {
            if all.insert(maker.clone()) {
                next.push(maker);
            }
        }
    }
    all
}

/// Those that may be forgotten: over, and the oldest beyond what is kept.
pub(crate) fn surplus(kept: &BTreeMap<String, Kept>, now: Millis) -> Vec<String> {
    let mut over: Vec<_> =
        kept.values().filter(|k| !k.proposal.is_open(now)).map(|k| (k.proposal.at, &k.proposal.id)).collect();
    over.sort_unstable();
    over.into_iter().take(kept.len().saturating_sub(MAX_KEPT)).map(|(_, id)| id.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_made_a_token_can_act_as_its_holder() {
        let make = |name: &str, by: &str| Token::make(name, AccessRole::Admin, by, 0, 1).unwrap().0;
        let all = [make("ann", "uid 0"), make("doll", "token ann"), make("ben", "uid 0"), make("ring", "token ring")];
        let all: BTreeMap<String, Token> = all.into_iter().map(|t| (t.id.clone(), t)).collect();
        let names = |who| behind(who, &all).into_iter().collect::<Vec<_>>();
        assert_eq!(names("token doll"), ["token ann", "token doll", "uid 0"]);
        assert_eq!(names("token ben"), ["token ben", "uid 0"]);
        assert_eq!(names("token ring"), ["token ring"]);
        assert_eq!(names("oidc x"), ["oidc x"]);
        // Who stood behind a maker is known when the maker's own token is forgotten.
        let (mut doll, _) = Token::make("doll", AccessRole::Admin, "token ann", 0, 1).unwrap();
        doll.behind = behind("token ann", &all);
        let later = BTreeMap::from([(doll.id.clone(), doll)]);
        assert_eq!(behind("token doll", &later).into_iter().collect::<Vec<_>>(), ["token ann", "token doll", "uid 0"]);
    }

    #[test]
    fn whoever_made_two_tokens_alone_holds_both() {
        let make = |name: &str, by: &str| Token::make(name, AccessRole::Admin, by, 0, 1).unwrap().0;
        let mut together = make("cid", "token ann");
        together.second = Some("token ben".into());
        let all = [make("ann", "uid 0"), make("ben", "uid 0"), make("doll", "token ann"), make("toy", "token doll")];
        let all: BTreeMap<String, Token> = all.into_iter().chain([together]).map(|t| (t.id.clone(), t)).collect();
        let names = |who| alone(who, &all).into_iter().collect::<Vec<_>>();
        assert_eq!(names("token toy"), ["token ann", "token doll", "token toy"]);
        assert_eq!((names("token ben"), names("token cid")), (vec!["token ben".into()], vec!["token cid".into()]));
        assert_eq!(names("uid 0"), ["uid 0"]);
        // Also when the token between them is forgotten.
        let (mut toy, _) = Token::make("toy", AccessRole::Admin, "token doll", 0, 1).unwrap();
        toy.alone = alone("token doll", &all);
        let later = BTreeMap::from([(toy.id.clone(), toy)]);
        assert_eq!(
            alone("token toy", &later).into_iter().collect::<Vec<_>>(),
            ["token ann", "token doll", "token toy"]
        );
    }
}
