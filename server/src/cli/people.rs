//! `kiln token` and `kiln pending`: who may do what, and what waits for a second person.

use super::At;
use super::client::Client;
use super::error::CliError;
use super::output::{now_ms, pretty, print, segment, tame};
use super::site::grace;
use super::table::{ago, ahead, table};
use crate::view::{PendingView, TokenView};
use clap::Subcommand;
use jiff::SignedDuration;
use kiln_fleet::access::AccessRole;
use reqwest::Method;
use serde::Deserialize;
use serde_json::json;

#[derive(Debug, Subcommand)]
pub(super) enum Token {
    /// Make a token; it is printed once, on a line by itself
    Create {
        /// Whose it is
        name: String,
        /// What it may do: viewer, technician, operator, admin
        #[arg(long)]
        role: AccessRole,
        /// How long it holds, as 12h or 30d [default: kiln.toml's token_default]
        #[arg(long, value_parser = grace)]
        expires: Option<SignedDuration>,
        #[command(flatten)]
        at: At,
    },
    /// All tokens: what they may do, until when, when they were last used
    List {
        #[command(flatten)]
        at: At,
        /// JSON instead of a table
        #[arg(long)]
        json: bool,
    },
    /// End a token now, and the sessions that rest on it
    Revoke {
        /// Whose it is
        name: String,
        #[command(flatten)]
        at: At,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum Pending {
    /// What waits for a second person, or did
    List {
        #[command(flatten)]
        at: At,
        /// JSON instead of a table, with all that was asked for
        #[arg(long)]
        json: bool,
    },
    /// Be the second person: it is done now, once
    Confirm {
        /// Its id
        id: String,
        #[command(flatten)]
        at: At,
    },
    /// Say no, or take back what you asked for
    Refuse {
        /// Its id
        id: String,
        #[command(flatten)]
        at: At,
    },
}

#[derive(Debug, Deserialize)]
struct Made {
    token: TokenView,
    text: String,
}

#[derive(Debug, Deserialize)]
struct Confirmed {
    pending: PendingView,
    #[serde(default)]
    answer: serde_json::Value,
}

fn said(made: &Made) -> Result<(), CliError> {
    let (name, role) = (&made.token.name, made.token.role);
    eprintln!("token {name} ({role}), {}; it is shown only now:", ends(&made.token));
    print(&format!("{}\n", made.text))
}

fn ends(token: &TokenView) -> String {
    format!("ends {}", ahead(token.expires_ms, now_ms()))
}

pub(super) async fn token(command: Token) -> Result<(), CliError> {
    match command {
        Token::Create { name, role, expires, at } => {
            let lifetime = expires.map(|e| u64::try_from(e.as_millis()).unwrap_or(u64::MAX));
            let body = json!({ "name": name, "role": role, "lifetime_ms": lifetime });
            said(&Client::new(&at)?.change(Method::POST, "tokens", &body).await?)
        }
        Token::List { at, json } => {
            let tokens: Vec<TokenView> = Client::new(&at)?.get("tokens").await?;
            print(&if json { pretty(&tokens)? } else { token_table(&tokens, now_ms()) })
        }
        Token::Revoke { name, at } => {
            let path = format!("tokens/{}/revoke", segment(&name));
            let token: TokenView = Client::new(&at)?.change(Method::POST, &path, &json!({})).await?;
            print(&format!("token {} is {}\n", token.name, token.state))
        }
    }
}

fn token_table(tokens: &[TokenView], now_ms: i64) -> String {
    let rows: Vec<Vec<String>> = tokens
        .iter()
        .map(|t| {
            let used = t.used_ms.map_or_else(|| "never".to_owned(), |used| ago(used, now_ms));
            let expires = if t.state == "holds" { ahead(t.expires_ms, now_ms) } else { "-".to_owned() };
            vec![t.name.clone(), t.role.to_string(), t.state.clone(), expires, used, t.by.clone(), t.id.clone()]
        })
        .collect();
    table(&["NAME", "ROLE", "STATE", "EXPIRES", "USED", "MADE BY", "ID"], &rows)
}

pub(super) async fn pending(command: Pending) -> Result<(), CliError> {
    match command {
        Pending::List { at, json } => {
            let all: Vec<PendingView> = Client::new(&at)?.get("pending").await?;
            print(&if json { pretty(&all)? } else { pending_table(&all, now_ms()) })
        }
        Pending::Confirm { id, at } => {
            let path = format!("pending/{}/confirm", segment(&id));
            let done: Confirmed = Client::new(&at)?.change(Method::POST, &path, &json!({})).await?;
            eprintln!("{}", tame(&format!("{}: {}", done.pending.what, done.pending.state)));
            // Whoever confirms a token is the one who gets to see it.
            match serde_json::from_value::<Made>(done.answer) {
                Ok(made) => said(&made),
                Err(_) => Ok(()),
            }
        }
        Pending::Refuse { id, at } => {
            let path = format!("pending/{}/refuse", segment(&id));
            let refused: PendingView = Client::new(&at)?.change(Method::POST, &path, &json!({})).await?;
            print(&format!("{}: {}\n", refused.what, refused.state))
        }
    }
}

fn pending_table(all: &[PendingView], now_ms: i64) -> String {
    let rows: Vec<Vec<String>> = all
        .iter()
        .map(|p| {
            let until = if p.open { ahead(p.deadline_ms, now_ms) } else { "-".to_owned() };
            vec![p.id.clone(), p.by.clone(), ago(p.at_ms, now_ms), until, p.state.clone(), p.what.clone()]
        })
        .collect();
    table(&["ID", "ASKED BY", "WHEN", "ENDS", "STATE", "WHAT"], &rows)
}
