//! Every call of the operator API, and the least access role that may make it. A call that is not here is not served
//! to anybody: `http::authorize` looks here before anything is done.

use kiln_fleet::access::AccessRole::{self, Admin, Operator, Technician, Viewer};

/// What a call does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It reads what anybody may read where `[access] anonymous = "read"`.
    Open,
    /// It reads what only those with the role may read.
    Read,
    /// It changes something. What it does writes its own record into the audit log, with the change; failure is recorded
    /// where calls are let in.
    Change,
    /// It is how somebody becomes known: anybody may make it.
    LogIn,
}

/// One call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// GET, POST, PUT or DELETE.
    pub method: &'static str,
    /// The route, as it is registered.
    pub path: &'static str,
    /// The least access role.
    pub least: AccessRole,
    /// What it does.
    pub kind: Kind,
    /// What `[access] four_eyes` calls it.
    pub action: &'static str,
}

impl Call {
    /// It changes something, so that it needs a credential, and its failure is recorded.
    pub fn changes(&self) -> bool {
        match self.kind {
            Kind::Change => true,
            Kind::Open | Kind::Read | Kind::LogIn => false,
        }
    }
}

const fn read(path: &'static str, least: AccessRole, kind: Kind) -> Call {
    Call { method: "GET", path, least, kind, action: "" }
}

const fn change(method: &'static str, path: &'static str, least: AccessRole, action: &'static str) -> Call {
    Call { method, path, least, kind: Kind::Change, action }
}

/// All of them.
pub const CALLS: &[Call] = &[
    read("/api/v1/machines", Viewer, Kind::Open),
    read("/api/v1/machines/{machine}", Viewer, Kind::Open),
    read("/api/v1/machines/{machine}/receipts", Viewer, Kind::Open),
    read("/api/v1/machines/{machine}/log", Technician, Kind::Open),
    read("/api/v1/machines/{machine}/inventory", Viewer, Kind::Open),
    read("/api/v1/releases", Viewer, Kind::Open),
    read("/api/v1/classes", Viewer, Kind::Open),
    read("/api/v1/status", Viewer, Kind::Open),
    read("/api/v1/events", Viewer, Kind::Open),
    read("/api/v1/roles", Viewer, Kind::Open),
    read("/api/v1/expected", Viewer, Kind::Open),
    read("/api/v1/expected/{machine}", Viewer, Kind::Open),
    read("/api/v1/orders", Operator, Kind::Read),
    read("/api/v1/audit", Operator, Kind::Read),
    read("/api/v1/audit/records", Operator, Kind::Read),
    read("/api/v1/audit/head", Operator, Kind::Read),
    read("/api/v1/pending", Technician, Kind::Read),
    read("/api/v1/secrets", Operator, Kind::Read),
    read("/api/v1/tokens", Admin, Kind::Read),
    // New ones. What was placed before is an operator's to move or to bring back: control::orders looks.
    change("POST", "/api/v1/machines/{machine}/approve", Technician, "approve"),
    change("POST", "/api/v1/machines/{machine}/excuse", Technician, "excuse"),
    change("PUT", "/api/v1/machines/{machine}/assignment", Operator, "assign"),
    change("POST", "/api/v1/machines/{machine}/clear", Operator, "clear"),
    change("POST", "/api/v1/machines/{machine}/accept", Operator, "accept"),
    change("POST", "/api/v1/machines/{machine}/retire", Operator, "retire"),
    change("POST", "/api/v1/machines/{machine}/replace", Operator, "replace"),
    change("POST", "/api/v1/machines/{machine}/revoke-key", Operator, "revoke-key"),
    change("POST", "/api/v1/expected", Operator, "expect"),
    change("DELETE", "/api/v1/expected/{machine}", Operator, "unexpect"),
    change("POST", "/api/v1/orders", Operator, "order"),
    change("PUT", "/api/v1/secrets/{name}", Operator, "secret-set"),
    change("DELETE", "/api/v1/secrets/{name}", Operator, "secret-remove"),
    change("POST", "/api/v1/releases/{image}/withhold", Operator, "prune"),
    change("POST", "/api/v1/tokens", Admin, "token"),
    change("POST", "/api/v1/tokens/{name}/revoke", Admin, "revoke-token"),
    // Whoever confirms needs the role of what is confirmed, too: control::access looks.
    change("POST", "/api/v1/pending/{id}/confirm", Technician, "confirm"),
    change("POST", "/api/v1/pending/{id}/refuse", Technician, "refuse"),
    read("/api/v1/session", Viewer, Kind::LogIn),
    Call { method: "POST", path: "/api/v1/session", least: Viewer, kind: Kind::LogIn, action: "log-in" },
    Call { method: "DELETE", path: "/api/v1/session", least: Viewer, kind: Kind::LogIn, action: "log-out" },
    read("/login/oidc", Viewer, Kind::LogIn),
    read("/login/oidc/callback", Viewer, Kind::LogIn),
];

/// The call of this method and route. HEAD is GET without its answer's body.
pub fn find(method: &str, path: &str) -> Option<&'static Call> {
    let method = if method == "HEAD" { "GET" } else { method };
    CALLS.iter().find(|call| call.method == method && call.path == path)
}

/// What `[access] four_eyes` may name: what changes something, but for the second person's own word, and for what sets a
/// secret, whose value would lie in the open until somebody confirms it.
pub fn four_eyes_actions() -> Vec<&'static str> {
    let all = CALLS.iter().filter(|call| call.changes()).map(|call| call.action);
    all.filter(|action| !matches!(*action, "confirm" | "refuse" | "secret-set")).chain(["admin-token"]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_call_is_there_once_and_each_change_has_a_name() {
        for (n, call) in CALLS.iter().enumerate() {
            assert!(CALLS[..n].iter().all(|c| (c.method, c.path) != (call.method, call.path)), "{call:?}");
            assert!(!call.changes() || !call.action.is_empty(), "{call:?}");
            assert!(call.changes() || call.method == "GET" || call.kind == Kind::LogIn, "{call:?}");
        }
        assert!(find("HEAD", "/api/v1/machines").is_some() && find("POST", "/api/v1/machines").is_none());
    }

    /// Routes are registered in these files; each must have its entry.
    #[test]
    fn each_route_of_the_sources_is_here() {
        let sources = [
            include_str!("../http/api.rs"),
            include_str!("../http/expected.rs"),
            include_str!("../http/releases.rs"),
            include_str!("../http/people.rs"),
            include_str!("../http/secrets.rs"),
            include_str!("../http/login.rs"),
        ];
        let mut found = 0;
        for source in sources {
            for piece in source.split(".route(\"").skip(1) {
                let (path, rest) = piece.split_once('"').unwrap();
                let handlers = rest.split_once('\n').map_or(rest, |(line, _)| line);
                for (word, method) in [("get(", "GET"), ("post(", "POST"), ("put(", "PUT"), ("delete(", "DELETE")] {
                    if handlers.contains(word) {
                        assert!(
                            find(method, path).is_some(),
                            "{method} {path} has no least access role in access/calls.rs"
                        );
                        found += 1;
                    }
                }
            }
        }
        assert_eq!(found, CALLS.len(), "an entry without a route");
    }
}
