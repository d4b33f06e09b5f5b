//! Who may have secrets.

use crate::common::*;
use kiln_fleet::*;
use kiln_protocol::*;

fn hash(n: u8) -> Sha256Hex {
    format!("{n:02x}").repeat(32).parse().unwrap()
}

/// Reports that this release runs, and holds these.
fn runs(boot: &str, seq: u64, release: u64, held: &SecretVersions) -> Event {
    let mut report = report(1, boot, seq, release);
    report.machine.tpm = Some(TpmPresence::Ready);
    report.running = Some(report.embedded.clone());
    report.secrets = Some(held.clone());
    by(1, report)
}

fn proven(boot: &str, release: u64, carried: bool) -> Event {
    let firmware = [1, 2, 3, 4].map(hash);
    let release = rel(release);
    let boot_id = boot.to_owned();
    let cold = ColdBoot {
        boot_id,
        resets: 1,
        restarts: 0,
        release,
        pcr11: hash(9),
        pcrs: Vec::new(),
        firmware,
        measures: false,
        others: false,
    };
    let booted = Ok(ProvenBoot { cold, carried, began: None });
    let (key, boot_id, endorsement, option_roms) = (key(1), boot.to_owned(), Some(hash(7)), None);
    Event::Proven(Box::new(Proven { key, boot_id, endorsement, option_roms, booted }))
}

fn versions(list: &[(&str, u64)]) -> SecretVersions {
    list.iter().map(|(name, version)| (name.parse().unwrap(), *version)).collect()
}

/// Every release may run.
fn open() -> Barred {
    Barred::default()
}

fn withheld(m: &Machine) -> String {
    m.secrets_withheld(&key(1), &open()).unwrap_or_default()
}

#[test]
fn only_a_proven_boot_in_service_may_have_them() {
    let (none, wanted) = (SecretVersions::new(), versions(&[("a", 1)]));
    let mut s = Story::new();
    s.then(runs("a", 1, 1, &none)).then(proven("a", 1, false));
    assert!(withheld(&s.m).contains("approve"), "{}", withheld(&s.m));
    s.approve();
    assert_eq!(s.m.secrets_withheld(&key(1), &open()), None);
    assert_eq!(s.m.secrets_word(&key(1), &wanted, &open()), Some(SecretsWord::Ask));
    assert!(s.m.secrets_withheld(&key(2), &open()).is_some() && s.m.secrets_word(&key(2), &wanted, &open()).is_none());
    // It holds them, holds an older one, and there are none any more.
    s.then(runs("a", 2, 1, &wanted));
    assert_eq!(s.m.secrets_word(&key(1), &wanted, &open()), None);
    assert_eq!(s.m.secrets_word(&key(1), &versions(&[("a", 2)]), &open()), Some(SecretsWord::Ask));
    assert_eq!(s.m.secrets_word(&key(1), &none, &open()), Some(SecretsWord::Drop));

    // In the next boot it holds none, and gets none before it has proven that one.
    let mut initramfs = report(1, "b", 1, 1);
    initramfs.machine.tpm = Some(TpmPresence::Ready);
    s.then(by(1, initramfs));
    assert_eq!((s.m.secrets.len(), s.m.secrets_word(&key(1), &wanted, &open())), (0, None));
    s.then(runs("b", 2, 1, &none));
    assert!(!withheld(&s.m).is_empty() && s.m.secrets_word(&key(1), &wanted, &open()).is_none());
    s.then(proven("b", 1, false));
    assert_eq!(withheld(&s.m), "");
    // Firmware started another release than the system says it is.
    s.then(runs("b", 3, 2, &none));
    assert!(withheld(&s.m).contains("firmware started minimal/1"), "{}", withheld(&s.m));
    s.then(runs("b", 4, 1, &none));
    s.m.key_revoked = true;
    assert!(withheld(&s.m).contains("revoked"));
    s.m.key_revoked = false;
    s.then(Event::Retire);
    assert!(withheld(&s.m).contains("out of service") && s.m.secrets_word(&key(1), &wanted, &open()).is_none());
    s.then(runs("b", 5, 1, &wanted));
    assert_eq!(s.m.secrets_word(&key(1), &none, &open()), Some(SecretsWord::Drop));
}

#[test]
fn a_cold_policy_withholds_from_a_kexec_and_orders_none() {
    let none = SecretVersions::new();
    for policy in [SecretsPolicy::Attested, SecretsPolicy::Cold] {
        let mut s = Story::new();
        s.then(runs("a", 1, 1, &none)).then(proven("a", 1, false));
        s.approve();
        s.m.secrets_policy = policy;
        assert_eq!(withheld(&s.m), "", "it booted through firmware");
        s.then(Event::Assign { release: rel(2), via: Via::Kexec.into() });
        let Desire::Run(assigned) = desire(&s.m, &key(1)) else { panic!("it is assigned") };
        assert_eq!(assigned.via, if policy == SecretsPolicy::Cold { Via::Cold } else { Via::Kexec });
        s.then(runs("b", 1, 2, &none)).then(proven("b", 1, true));
        assert_eq!(s.m.attestation().0, AttestationState::Attested);
        assert_eq!(withheld(&s.m).contains("cold boots"), policy == SecretsPolicy::Cold, "{}", withheld(&s.m));
    }
}

#[test]
fn a_release_that_it_shall_not_run_gets_none() {
    let none = SecretVersions::new();
    let mut s = Story::good_on_1();
    s.then(runs("a", 3, 1, &none)).then(proven("a", 1, false));
    let why = |s: &Story, barred: &Barred| s.m.secrets_withheld(&key(1), barred).unwrap_or_default();
    let floor = |release| Barred { floors: [("minimal".to_owned(), release)].into(), ..Barred::default() };
    let revoked = |release| Barred { revoked: [rel(release)].into(), ..Barred::default() };
    assert_eq!(why(&s, &open()), "");
    assert_eq!((why(&s, &floor(1)), why(&s, &revoked(2))), (String::new(), String::new()));
    assert!(why(&s, &floor(2)).contains("below the floor"), "{}", why(&s, &floor(2)));
    assert!(why(&s, &revoked(1)).contains("minimal/1 is revoked"), "{}", why(&s, &revoked(1)));
    let wanted = versions(&[("a", 1)]);
    assert_eq!(s.m.secrets_word(&key(1), &wanted, &open()), Some(SecretsWord::Ask));
    assert_eq!(s.m.secrets_word(&key(1), &wanted, &revoked(1)), None, "it is not asked to try");

    // The last good one still gets them while another is assigned; any other, however genuine, does not. In brackets: what
    // firmware started.
    s.assign(3, Via::Cold);
    let after = |running: u64, cold: u64, carried: bool| {
        let mut s = Story { m: s.m.clone(), now: s.now, last: Vec::new() };
        s.then(runs("b", 1, running, &none)).then(proven("b", cold, carried));
        s
    };
    for (running, cold, carried) in [(1, 1, false), (3, 3, false), (3, 1, true), (1, 1, true)] {
        assert_eq!(why(&after(running, cold, carried), &open()), "", "{running} ({cold})");
    }
    for carried in [false, true] {
        let s = after(2, 2, carried);
        assert!(why(&s, &open()).contains("neither assigned"), "{}", why(&s, &open()));
    }
    // By kexec from a release that is revoked: it could have started anything.
    let s = after(3, 1, true);
    assert!(why(&s, &revoked(1)).contains("minimal/1 is revoked"), "{}", why(&s, &revoked(1)));
    assert!(why(&s, &floor(2)).contains("below the floor"), "{}", why(&s, &floor(2)));
}
