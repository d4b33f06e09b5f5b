//! A machine whose key the configuration names.

use crate::common::*;
use kiln_fleet::*;
use kiln_protocol::*;
use proptest::prelude::*;

fn pinned() -> Story {
    let mut s = Story::new();
    s.m.pin(Some(&key(1)));
    s
}

#[test]
fn only_the_named_key_may_claim_the_id() {
    let mut s = pinned();
    s.then(by(2, healthy(1, "x", 1, 1))).is(StateKind::Discovered);
    assert_eq!((&s.m.key, &s.m.strangers[..], s.m.facts.is_some()), (&None, &[key(2)][..], false));
    let said = "kiln.toml names the identity key of 00000000-0000-0000-0000-000000000001; another (020202020202…)";
    assert!(s.m.last_words.starts_with(said), "{}", s.m.last_words);
    s.then(by(2, healthy(1, "x", 2, 1)));
    assert_eq!(s.last, [], "a stranger that repeats itself is no news");
    s.approve().then(by(1, healthy(1, "a", 1, 1))).is(StateKind::Healthy);
    assert!(matches!(desire(&s.m, &key(1)), Desire::Run(_)));
    assert!(matches!(desire(&s.m, &key(2)), Desire::Wait(why) if why.contains("kiln.toml names")));
    // A person's clear does not go past the file.
    s.then(by(2, healthy(1, "y", 1, 1)));
    assert!(matches!(s.m.heard_key(key(2).as_str()), Err(Refusal::KeyStays { .. })));
    s.then(Event::Adopt(key(2)));
    assert_eq!((&s.m.key, &s.m.strangers[..]), (&Some(key(1)), &[key(2)][..]));
    s.then(Event::Clear);
    assert_eq!((&s.m.key, s.m.strangers.len()), (&Some(key(1)), 0));
}

#[test]
fn a_key_that_came_first_is_let_go_when_the_file_names_another() {
    let mut s = Story::good_on_1();
    s.m.pin(Some(&key(1)));
    assert_eq!(s.m.key, Some(key(1)), "its own stays");
    s.m.pin(Some(&key(2)));
    assert_eq!((&s.m.key, &s.m.strangers[..]), (&None, &[key(1)][..]));
    assert!(matches!(desire(&s.m, &key(1)), Desire::Wait(_)));
    s.then(by(1, healthy(1, "a", 9, 1)));
    assert_eq!(s.m.key, None);
    s.then(by(2, healthy(1, "b", 1, 1))).is(StateKind::Healthy);
    assert!(matches!(desire(&s.m, &key(2)), Desire::Run(_)));
    let mut back: Machine = serde_json::from_str(&serde_json::to_string(&s.m).unwrap()).unwrap();
    assert_eq!(back.pinned, None, "the file is read at each start");
    back.pin(None);
    assert_eq!(back.key, Some(key(2)), "without it the key that is bound stays bound");
}

#[test]
fn an_agent_that_knows_no_tpm_does_not_make_a_machine_another_without_saying_so() {
    let says = |key: u8, boot: &str, tpm: Option<TpmPresence>, storage: KeyStorage| {
        let mut report = healthy(1, boot, 1, 1);
        (report.machine.tpm, report.machine.key_storage) = (tpm, storage);
        by(key, report)
    };
    let ready = Some(TpmPresence::Ready);
    let mut s = Story::new();
    s.then(says(1, "a", ready, KeyStorage::Tpm)).approve();
    s.then(says(2, "b", None, KeyStorage::EfiVariable));
    let words = s.m.last_words.clone();
    assert!(words.contains("booted minimal/1, whose agent is too old") && words.contains("Do not clear"), "{words}");
    assert_eq!((&s.m.key, &s.m.strangers[..]), (&Some(key(1)), &[key(2)][..]));
    // Nowhere is a command made up that would put the weaker key in its place.
    let told = |s: &Story, k: u8| match desire(&s.m, &key(k)) {
        Desire::Wait(why) => why,
        Desire::Run(_) => panic!("a stranger runs nothing"),
    };
    for words in [told(&s, 2), s.m.other_keys_wait().unwrap()] {
        assert!(words.contains("switch its TPM on") && !words.contains("--key"), "{words}");
    }
    let stored: Machine = serde_json::from_str(&serde_json::to_string(&s.m).unwrap()).unwrap();
    assert_eq!(stored.without_tpm, [key(2)]);
    // Beside others it is named as what it is; and when it says that it has a TPM, it is like any other.
    s.then(says(5, "e", ready, KeyStorage::Tpm));
    let words = s.m.other_keys_wait().unwrap();
    assert!(words.contains("none of 0202020202020202 before its TPM was looked at"), "{words}");
    assert!(told(&s, 5).contains("kiln machine clear rack-1 --key 0505050505050505"), "{}", told(&s, 5));
    s.then(says(2, "f", ready, KeyStorage::Tpm));
    assert!(s.last == [Action::Save] && told(&s, 2).contains("--key 0202020202020202"), "{:?}", s.last);
    for off in [TpmPresence::Absent, TpmPresence::Unusable] {
        s.m.strangers.clear();
        s.then(says(4, "o", Some(off), KeyStorage::Ephemeral));
        assert!(s.m.last_words.contains("switch the TPM on"), "{}", s.m.last_words);
    }
    s.then(says(1, "c", ready, KeyStorage::Tpm));
    assert!(matches!(desire(&s.m, &key(1)), Desire::Run(_)), "its own key speaks again");
    // Another TPM, or a machine that never sealed its key: no such excuse.
    s.then(says(3, "d", ready, KeyStorage::Tpm));
    assert!(s.m.last_words.contains("firmware settings were erased"), "{}", s.m.last_words);
    let mut s = Story::good_on_1();
    s.then(says(2, "b", None, KeyStorage::EfiVariable));
    assert!(s.m.last_words.contains("firmware settings were erased"), "{}", s.m.last_words);
}

#[test]
fn a_machine_that_is_known_by_its_position_takes_a_new_key_only_there() {
    let says = |key: u8, boot: &str| {
        let mut report = healthy(1, boot, 1, 1);
        report.machine.key_storage = KeyStorage::Ephemeral;
        by(key, report)
    };
    let here = || Some("10.99.0.1 sw-7 eth1".to_owned());
    let mut s = Story::new();
    s.m.heard_at = here();
    s.then(says(1, "a")).approve();
    s.m.position = here();
    // The next boot, heard elsewhere or nowhere: it is somebody else's.
    for elsewhere in [None, Some("10.99.0.1 sw-7 eth2".to_owned())] {
        s.m.heard_at = elsewhere;
        s.then(says(2, "b"));
        assert_eq!((&s.m.key, &s.m.strangers[..]), (&Some(key(1)), &[key(2)][..]));
        assert!(s.m.last_words.contains("known by its position (10.99.0.1 sw-7 eth1)"), "{}", s.m.last_words);
        assert!(matches!(desire(&s.m, &key(2)), Desire::Wait(_)));
    }
    s.m.heard_at = here();
    s.then(says(3, "c"));
    assert_eq!(s.m.key, Some(key(3)), "heard at its place");
    let stays = s.m.heard_key(key(2).as_str()).unwrap_err().to_string();
    assert!(stays.contains("known by its position") && stays.contains("machine retire rack-1"), "{stays}");
    // A clear ends neither the place nor its key; and where two keys claim it, the next one comes from there.
    s.m.heard_at = None;
    s.then(says(2, "x")).then(Event::Clear).then(says(2, "x"));
    assert_eq!(s.m.key, Some(key(3)));
    let mut two = Story { m: s.m.clone(), now: s.now, last: vec![] };
    two.m.heard_at = here();
    two.then(says(1, "c")).is(StateKind::Quarantined).then(Event::Clear).is(StateKind::Approved);
    two.m.heard_at = None;
    two.then(says(2, "x")).is(StateKind::Approved);
    assert_eq!((&two.m.key, &two.m.strangers[..]), (&None, &[key(2)][..]));
    two.m.heard_at = here();
    two.then(says(1, "d")).is(StateKind::Healthy);
    assert_eq!(two.m.key, Some(key(1)));
    s.m.heard_at = here();
    let stored: Machine = serde_json::from_str(&serde_json::to_string(&s.m).unwrap()).unwrap();
    assert_eq!((stored.position, stored.heard_at), (here(), None));
    let withheld = s.m.secrets_withheld(&key(3), &Barred::default()).unwrap();
    assert!(withheld.contains("which proves no machine"), "{withheld}");
    s.then(Event::Retire);
    assert_eq!(s.m.position, None, "whatever stands there next is another machine");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn whatever_happens_no_other_key_gets_anything(
        events in proptest::collection::vec((any_event(), 0..400_000_u64), 1..60)
    ) {
        let mut m = pinned().m;
        let mut now = m.last_seen;
        for (event, pause) in events {
            now += pause;
            let other = matches!(&event, Event::Report(r) if r.key != key(1));
            let before = m.clone();
            let (after, _) = m.event(event, LIMITS, now);
            prop_assert!(after.key.as_ref().is_none_or(|k| *k == key(1)));
            prop_assert!(matches!(desire(&after, &key(2)), Desire::Wait(_)));
            if other {
                let (strangers, last_words) = (after.strangers.clone(), after.last_words.clone());
                prop_assert_eq!(&Machine { strangers, last_words, ..before }, &after);
            }
            m = after;
        }
    }
}

/// One report with any key makes a stranger. Whoever clears the machine did not mean that one, also where nothing else holds
/// it and the stranger spoke last.
#[test]
fn a_clear_that_names_no_key_makes_no_stranger_the_machine() {
    let failure = || Failure { kind: "machine-format".into(), message: "m".into(), attempt: 1, retry_in_ms: Some(1) };
    for what in ["nothing", "memory", "rests", "refused", "fell back", "revoked"] {
        let mut s = Story::good_on_1();
        match what {
            "nothing" => {}
            "memory" => {
                let mut r = report(1, "b", 1, 1);
                r.stages = vec![StageRecord { stage: Stage::Start, state: StageState::Failed(failure()), at_ms: 1 }];
                s.then(by(1, r));
            }
            "rests" => (s.m.boot_loop.rests_until, s.m.running) = (Some(s.now + LOOP_REST_MS), None),
            "refused" => s.m.refused.push(Refused { release: rel(3), reason: "r".into() }),
            "fell back" => s.m.fell_back = Some("f".into()),
            _ => s.m.key_revoked = true,
        }
        for n in 1..4 {
            s.then(by(2, report(1, "x", n, 1))).then(Event::Clear);
            assert_eq!((&s.m.key, &s.m.strangers[..]), (&Some(key(1)), &[key(2)][..]), "{what}");
            let told = "kiln machine clear rack-1 --key 0202020202020202`";
            let said = s.last.iter().any(|a| matches!(a, Action::Say { text, .. } if text.contains(told)));
            assert!(said, "{what}: {:?}", s.last);
        }
    }
}

#[test]
fn a_person_names_the_key_that_becomes_the_machines() {
    let mut s = Story::good_on_1();
    let refusal = |s: &Story, digits: &str| s.m.heard_key(digits).unwrap_err();
    assert_eq!(refusal(&s, &"02".repeat(8)), Refusal::NoOtherKey { machine: "rack-1".into() });
    s.then(by(2, report(1, "x", 1, 1)));
    // What its console shows is what a person types.
    let shown = match desire(&s.m, &key(2)) {
        Desire::Wait(why) => why.split_once("--key ").unwrap().1.trim_end_matches('`').to_owned(),
        Desire::Run(_) => panic!("a stranger runs nothing"),
    };
    assert_eq!(s.m.heard_key(&shown), Ok(key(2)));
    assert_eq!(s.m.heard_key(&"02".repeat(8)), Ok(key(2)));
    for short in ["", "02020202", "020202020202020", "020202020202020g", "0202020202020202-"] {
        assert!(matches!(refusal(&s, short), Refusal::KeyDigits { .. }), "{short}");
    }
    assert!(matches!(refusal(&s, &"01".repeat(9)), Refusal::KeyIsItsOwn { .. }));
    assert!(matches!(refusal(&s, &"03".repeat(8)), Refusal::NoSuchKey { heard, .. } if heard == "0202020202020202"));
    assert!(matches!(refusal(&s, &"02".repeat(33)), Refusal::NoSuchKey { .. }), "longer than any");

    // Another one whose fingerprint begins as the true one's: nothing is guessed.
    let like: KeyId = format!("{}{}", "ab".repeat(8), "03".repeat(24)).parse().unwrap();
    let true_one: KeyId = format!("{}{}", "ab".repeat(8), "04".repeat(24)).parse().unwrap();
    s.m.strangers = vec![like.clone(), true_one.clone()];
    let ambiguous = refusal(&s, &"AB".repeat(8));
    assert!(matches!(ambiguous, Refusal::AmbiguousKey { .. }));
    // What tells them apart is in the words, and so is what to run.
    let (said, begins) = (ambiguous.to_string(), "ab".repeat(8));
    for word in
        ["nothing is changed", "rack-1", &format!("{begins}03, {begins}04"), "`kiln machine clear rack-1 --key`"]
    {
        assert!(said.contains(word), "{word}: {said}");
    }
    assert_eq!(s.m.heard_key(&format!("{}04", "AB".repeat(8))), Ok(true_one.clone()));
    let words = s.m.other_keys_wait().unwrap();
    assert!(
        words.contains("2 other identity keys") && words.ends_with("abababababababab03, abababababababab04"),
        "{words}"
    );

    // It takes what held the machine with it; the others stay strangers, and the one before is one.
    s.m.refused.push(Refused { release: rel(3), reason: "r".into() });
    s.then(Event::Adopt(true_one.clone()));
    assert_eq!((&s.m.key, &s.m.strangers, s.m.refused.len()), (&Some(true_one.clone()), &vec![like], 0));
    assert!(s.last.contains(&Action::Save) && s.last.contains(&Action::Wake));
    assert!(matches!(desire(&s.m, &true_one), Desire::Run(_)));
    assert!(matches!(desire(&s.m, &key(1)), Desire::Wait(_)));
    s.then(by(1, healthy(1, "a", 9, 1)));
    assert_eq!((s.m.key.as_ref(), s.m.strangers.last()), (Some(&true_one), Some(&key(1))));
    let stored: Machine = serde_json::from_str(&serde_json::to_string(&s.m).unwrap()).unwrap();
    assert_eq!(stored.strangers, s.m.strangers);
}

/// Two copies of one identity were told apart by a person, who has the true one make another key.
#[test]
fn a_named_key_ends_a_quarantine_and_is_the_machines() {
    let mut s = Story::good_on_1();
    s.then(Event::KeyShared { with: "rack-9".into() }).is(StateKind::Quarantined);
    s.then(by(2, healthy(1, "x", 1, 1))).then(Event::Adopt(key(2))).is(StateKind::Approved);
    s.then(by(2, healthy(1, "x", 2, 1))).is(StateKind::Healthy);
    assert!(matches!(desire(&s.m, &key(2)), Desire::Run(_)));
    assert!(matches!(desire(&s.m, &key(1)), Desire::Wait(_)));
}

#[test]
fn strangers_are_few_said_once_and_those_that_speak_stay() {
    let mut s = Story::good_on_1();
    for n in 2..30 {
        s.then(by(n, report(1, "x", 1, 1)));
        assert!(s.last.contains(&Action::Save), "{n} is new");
        // The true one, whose settings were erased, speaks on between those that somebody makes up.
        s.then(by(2, report(1, "y", 1, 1)));
        assert_eq!(s.last, [], "said once");
        assert!(s.m.strangers.len() <= STRANGERS_KEPT && s.m.strangers.contains(&key(2)));
    }
    assert_eq!(s.m.strangers.len(), STRANGERS_KEPT);
    // Nor is the first driven out where it does not speak on, nor a later one that does.
    for n in 30..60 {
        s.then(by(n, report(1, "x", 1, 1))).then(by(30, report(1, "y", 1, 1)));
        assert!(s.m.strangers.contains(&key(2)) && s.m.strangers.contains(&key(30)), "{n}");
    }
}

/// What a machine remembers of versions is spoilt: its agent starts nothing until it hears of a newer assignment.
#[test]
fn a_cleared_machine_that_cannot_read_its_memory_hears_of_a_newer_assignment() {
    let mut s = Story::good_on_1();
    let sequence = |s: &Story| s.m.assigned.as_ref().unwrap().sequence;
    s.then(Event::Clear);
    assert_eq!(sequence(&s), 1, "nothing was wrong");
    let mut r = report(1, "b", 1, 1);
    let failure = Failure { kind: "machine-format".into(), message: "m".into(), attempt: 1, retry_in_ms: Some(1) };
    r.stages = vec![StageRecord { stage: Stage::Start, state: StageState::Failed(failure), at_ms: 1 }];
    s.then(by(1, r)).then(Event::Clear);
    assert_eq!((sequence(&s), &s.m.assigned.as_ref().unwrap().release), (2, &rel(1)));
    assert!(s.last.contains(&Action::Sign) && s.last.contains(&Action::Save) && s.last.contains(&Action::Wake));
    // Its next boot reads it again.
    s.then(by(1, report(1, "c", 1, 1))).then(Event::Clear);
    assert_eq!(sequence(&s), 2);
}

/// Its line in kiln.toml was taken out: what that line gave is dropped, and nothing of what a person gave.
#[test]
fn what_a_list_said_of_a_machine_goes_with_its_line() {
    let mut s = Story::new();
    s.m.name = Some("rack-1".into());
    s.then(by(1, report(1, "a", 1, 1)));
    s.then(Event::NotApproved { reason: "kiln.toml lists it as rack-1, and it is not approved: why".into() });
    assert!(s.m.has_words_of_a_list() && s.m.state.reason.contains("lists it"));
    s.then(Event::NotListed).is(StateKind::Discovered);
    assert_eq!((&s.m.name, &s.m.key), (&None, &Some(key(1))));
    assert!(s.m.state.reason.starts_with("nobody has approved it: run `kiln machine approve"), "{}", s.m.state.reason);
    assert!(s.last.contains(&Action::Save), "{:?}", s.last);
    s.then(Event::NotListed);
    assert_eq!(s.last, [], "once");
    s.approve();
    let before = s.m.clone();
    s.then(Event::NotListed);
    assert_eq!((&before, s.last.len()), (&s.m, 0), "a person named it");
}
