//! Health checks, hooks and thresholds: what is allowed, and what the signed bytes look like.
#![allow(clippy::unwrap_used)]

use kiln_release::declared::{check_all, check_hooks, http_target};
use kiln_release::{HealthCheck, HealthKind, Hook, HookKind, OnTimeout, Threshold};

#[test]
fn checks_have_their_form_and_older_ones_stay_as_they_are() {
    let old = r#"{"kind":"systemd","soak":5}"#;
    let check: HealthCheck = serde_json::from_str(old).unwrap();
    assert_eq!(check, HealthCheck::of(HealthKind::Systemd, 5));
    assert_eq!(serde_json::to_string(&check).unwrap(), old);
    let disk = HealthCheck {
        target: "/var".into(),
        limit: Threshold::parse("10%"),
        deadline: 3,
        fail_after: 2,
        pass_after: 4,
        ..HealthCheck::of(HealthKind::Disk, 0)
    };
    let golden = r#"{"kind":"disk","soak":0,"target":"/var","limit":"10%","deadline":3,"fail_after":2,"pass_after":4}"#;
    assert_eq!(serde_json::to_string(&disk).unwrap(), golden);
    assert_eq!(serde_json::from_str::<HealthCheck>(golden).unwrap(), disk);
    assert_eq!((disk.title().as_str(), disk.check()), ("disk./var", Ok(())));
    assert_eq!(HealthCheck { name: "var".into(), ..disk }.title(), "var");
    let hook = Hook {
        name: "lb".into(),
        kind: HookKind::Http,
        target: "http://127.0.0.1/drain".into(),
        arguments: vec![],
        deadline: 300,
        on_timeout: OnTimeout::Stay,
    };
    let golden = r#"{"name":"lb","kind":"http","target":"http://127.0.0.1/drain","deadline":300,"on_timeout":"stay"}"#;
    assert_eq!(serde_json::to_string(&hook).unwrap(), golden);
    assert_eq!(serde_json::from_str::<Hook>(golden).unwrap(), hook);
}

#[test]
fn each_kind_takes_its_own_target_and_number() {
    use HealthKind::{Command, Disk, Http, Memory, Systemd, Tcp, Time, Unit};

    let check = |kind, target: &str, limit: Option<&str>| {
        let limit = limit.map(|text| Threshold::parse(text).unwrap());
        HealthCheck { target: target.into(), limit, ..HealthCheck::of(kind, 0) }.check()
    };
    for (kind, target, limit) in [
        (Systemd, "", None),
        (Unit, "web@1.service", None),
        (Http, "http://127.0.0.1:8080/healthz?x=1", None),
        (Http, "http://localhost/", None),
        (Tcp, "[::1]:5432", None),
        (Command, "/usr/lib/app/check", None),
        (Memory, "", Some("64M")),
        (Disk, "/var", Some("5%")),
        (Time, "", Some("2s")),
        (Time, "", None),
    ] {
        assert_eq!(check(kind, target, limit), Ok(()), "{kind:?} {target}");
    }
    for (kind, target, limit, words) in [
        (Systemd, "x", None, "no target"),
        (Unit, "web", None, "unit: the file name"),
        (Http, "https://127.0.0.1/", None, "http://IP"),
        (Http, "http://example.com/", None, "not looked up"),
        (Http, "http://127.0.0.1/a b", None, "without space"),
        (Tcp, "127.0.0.1", None, "IP:PORT"),
        (Command, "sh", None, "absolute path"),
        (Command, "/usr/../tmp/x", None, "without . or .."),
        (Memory, "", None, "least ="),
        (Disk, "/var", Some("5s"), "with a share or a size"),
        (Time, "", Some("5%"), "with a time"),
        (Tcp, "127.0.0.1:1", Some("5%"), "other kinds with nothing"),
    ] {
        let refused = check(kind, target, limit).unwrap_err();
        assert!(refused.contains(words), "{kind:?} {target}: {refused}");
    }
}

#[test]
fn numbers_are_read_and_written_alike_and_bounded() {
    for text in ["10%", "64M", "3G", "5K", "500ms"] {
        assert_eq!(Threshold::parse(text).unwrap().to_string(), text);
    }
    assert_eq!(Threshold::parse("2s"), Some(Threshold::Millis(2000)));
    for text in ["", "%", "0%", "100%", "-1%", "1.5%", "64", "0M", "20000000000000G", "10 %", "1h"] {
        assert_eq!(Threshold::parse(text), None, "{text}");
    }
    let refused = serde_json::from_str::<Threshold>("\"much\"").unwrap_err().to_string();
    assert!(refused.contains("expected \"10%\""), "{refused}");
}

#[test]
fn names_are_there_once_and_lists_end() {
    let check = HealthCheck::of(HealthKind::Systemd, 5);
    assert!(check_all(&[check.clone(), check.clone()]).unwrap_err().1.contains("same name"));
    let many = (0..33).map(|n| HealthCheck { name: n.to_string(), ..check.clone() }).collect::<Vec<_>>();
    assert!(check_all(&many).unwrap_err().1.contains("at most 32"));
    let hook = |name: &str, deadline| Hook {
        name: name.into(),
        kind: HookKind::Command,
        target: "/usr/bin/true".into(),
        arguments: vec![],
        deadline,
        on_timeout: OnTimeout::Go,
    };
    assert_eq!(check_hooks("drain", &[hook("a", 300), hook("b", 6900)]), Ok(()));
    for (event, hooks, words) in [
        ("boot", vec![], "drain, undrain"),
        ("drain", vec![hook("a", 1), hook("a", 1)], "same name"),
        ("drain", vec![hook("a", 7200), hook("b", 1)], "7200 s together"),
        ("undrain", vec![hook("a b", 1)], "without space"),
    ] {
        assert!(check_hooks(event, &hooks).unwrap_err().1.contains(words), "{words}");
    }
    assert_eq!(http_target("http://127.0.0.1:1/x").unwrap().1, "/x");
}
