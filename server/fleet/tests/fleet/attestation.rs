//! What follows for a machine from what its TPM proved, or did not.

use crate::common::*;
use kiln_fleet::*;
use kiln_protocol::*;

fn hash(n: u8) -> Sha256Hex {
    format!("{n:02x}").repeat(32).parse().unwrap()
}

fn reports(boot: &str, seq: u64, tpm: TpmPresence) -> Event {
    let mut report = report(1, boot, seq, 1);
    report.machine.tpm = Some(tpm);
    by(1, report)
}

fn cold(boot: &str, firmware: [u8; 4]) -> ColdBoot {
    let firmware = firmware.map(hash);
    let boot_id = boot.to_owned();
    ColdBoot {
        boot_id,
        resets: 1,
        restarts: 0,
        release: rel(1),
        pcr11: hash(9),
        pcrs: Vec::new(),
        firmware,
        measures: false,
        others: false,
    }
}

fn proven(boot: &str, tpm: u8, firmware: [u8; 4]) -> Event {
    let booted = Ok(ProvenBoot { cold: cold(boot, firmware), carried: false, began: None });
    let option_roms = Some(vec![hash(firmware[2])]);
    let (key, boot_id, endorsement) = (key(1), boot.to_owned(), Some(hash(tpm)));
    Event::Proven(Box::new(Proven { key, boot_id, endorsement, option_roms, booted }))
}

fn gets_a_release(m: &Machine) -> bool {
    matches!(desire(m, &key(1)), Desire::Run(_))
}

#[test]
fn the_tpm_that_was_proven_is_pinned_at_approval_and_demanded_at_each_boot() {
    let mut s = Story::new();
    s.then(reports("a", 1, TpmPresence::Ready));
    assert!(s.m.wants_proof(&key(1)) && !s.m.wants_proof(&key(2)));
    s.then(proven("a", 7, [1, 2, 3, 4]));
    assert_eq!((s.m.attestation().0, s.m.protection()), (AttestationState::Attested, Some(ProtectionClass::Attested)));
    assert_eq!(s.m.attestations.pinned, None, "nobody has approved it");
    assert_eq!(s.m.attestations.option_roms, Some(vec![hash(3)]));
    s.approve();
    assert_eq!(s.m.attestations.pinned.as_ref().unwrap().endorsement, hash(7));
    assert!(gets_a_release(&s.m) && !s.m.wants_proof(&key(1)));

    // The next boot has proven nothing yet; the one that has no TPM never will.
    s.then(reports("b", 1, TpmPresence::Ready));
    assert!(!gets_a_release(&s.m) && s.m.wants_proof(&key(1)));
    s.then(reports("c", 1, TpmPresence::Absent));
    assert_eq!((s.m.attestation().0, gets_a_release(&s.m)), (AttestationState::Failed, false));
    // A proof of a boot that is over, and of another key.
    s.then(proven("b", 7, [1, 2, 3, 4]));
    assert!(!gets_a_release(&s.m));
    s.then(reports("d", 1, TpmPresence::Ready)).then(proven("d", 8, [1, 2, 3, 4]));
    assert!(s.m.attestation().1.starts_with("another TPM") && !gets_a_release(&s.m));
    s.then(Event::AcceptTpm);
    assert!(s.m.wants_proof(&key(1)));
    s.then(proven("d", 8, [1, 2, 3, 4]));
    assert_eq!(s.m.attestations.pinned.as_ref().unwrap().endorsement, hash(8));
    assert!(gets_a_release(&s.m));
}

#[test]
fn changed_firmware_fails_and_keeps_its_release_unless_the_role_demands_more() {
    let mut s = Story::new();
    s.then(reports("a", 1, TpmPresence::Ready)).approve().then(proven("a", 7, [1, 2, 3, 4]));
    s.then(reports("b", 1, TpmPresence::Ready)).then(proven("b", 7, [1, 5, 3, 6]));
    let (state, reason) = s.m.attestation();
    assert_eq!(state, AttestationState::Failed);
    assert!(reason.starts_with("firmware changed: its settings (PCR 1), their settings (PCR 3)"), "{reason}");
    assert_eq!(s.m.protection(), Some(ProtectionClass::Unprotected));
    assert!(gets_a_release(&s.m), "it is the machine; what it is given is the role's to say");
    s.m.attested_only = true;
    assert!(!gets_a_release(&s.m));
    let stored: Machine = serde_json::from_str(&serde_json::to_string(&s.m).unwrap()).unwrap();
    assert_eq!((stored.attestations, stored.attested_only), (s.m.attestations.clone(), false));
}

#[test]
fn a_machine_without_a_tpm_works_as_before() {
    let mut s = Story::good_on_1();
    assert_eq!((s.m.attestation().0, gets_a_release(&s.m)), (AttestationState::Unattested, true));
    s.then(reports("b", 1, TpmPresence::Absent));
    assert_eq!((s.m.attestation().0, gets_a_release(&s.m)), (AttestationState::NoTpm, true));
    s.m.attested_only = true;
    assert!(matches!(desire(&s.m, &key(1)), Desire::Wait(why) if why.contains("no-tpm")));
}

fn recorded(s: &Story) -> Vec<&str> {
    s.last
        .iter()
        .filter_map(|action| if let Action::Record(text) = action { Some(text.as_str()) } else { None })
        .collect()
}

#[test]
fn changes_of_what_boots_can_promise_are_recorded_once_each() {
    let mut s = Story::new();
    s.then(reports("a", 1, TpmPresence::Ready)).then(proven("a", 7, [1, 2, 3, 4]));
    assert!(recorded(&s).is_empty(), "nobody approved it: it may be made up");
    s.approve();
    assert!(recorded(&s)[0].starts_with("boots are attested (attested): "), "{:?}", s.last);
    // The next boot has proven nothing yet: that is no news; nor is the same verdict again.
    s.then(reports("b", 1, TpmPresence::Ready));
    assert!(recorded(&s).is_empty());
    s.then(proven("b", 7, [1, 2, 3, 4]));
    assert!(recorded(&s).is_empty());
    s.then(reports("c", 1, TpmPresence::Ready)).then(proven("c", 7, [9, 2, 3, 4]));
    let text = "boots were attested (attested) and are failed (unprotected): firmware changed: firmware (PCR 0)";
    assert!(recorded(&s)[0].starts_with(text), "{:?}", s.last);
    // A person accepts it: that is known from the person's own record, and what follows is a change of what was recorded.
    s.then(Event::AcceptTpm).then(proven("c", 7, [9, 2, 3, 4]));
    assert!(recorded(&s)[0].starts_with("boots were failed (unprotected) and are attested"), "{:?}", s.last);
    // One that could prove something, and does not.
    s.then(reports("d", 1, TpmPresence::Ready));
    assert!(recorded(&s).is_empty());
    s.now += 10 * 60_000;
    s.then(reports("d", 2, TpmPresence::Ready));
    assert!(recorded(&s)[0].contains("are unattested (unprotected): its TPM has proven nothing"), "{:?}", s.last);
    let stored: Machine = serde_json::from_str(&serde_json::to_string(&s.m).unwrap()).unwrap();
    assert_eq!(stored.attestations, s.m.attestations, "it outlives the server");
}

#[test]
fn whoever_holds_a_machines_key_does_not_fill_the_audit_log() {
    let mut s = Story::good_on_1();
    let mut lines = 0;
    let says = |s: &mut Story, seq: u64, class| {
        let mut report = healthy(1, "a", seq, 1);
        report.machine.protection = class;
        s.then(by(1, report));
        recorded(s).len()
    };
    for seq in 3..203 {
        let class = if seq % 2 == 0 { ProtectionClass::Unprotected } else { ProtectionClass::Enforced };
        lines += says(&mut s, seq, class);
    }
    assert_eq!(lines, 10);
    s.now += 3_600_000;
    assert_eq!(says(&mut s, 300, ProtectionClass::Enforced), 1, "what it came to is recorded");
}

#[test]
fn a_word_before_a_kexec_is_kept_of_the_boot_that_goes_on_and_outlives_the_server() {
    let left = |boot: &str, loaded| Left { boot_id: boot.into(), pcr10: hash(5), measured: true, loaded };
    let mut s = Story::new();
    s.then(reports("a", 1, TpmPresence::Ready));
    s.then(Event::Leaves(Box::new(left("z", Ok(vec![rel(2)])))));
    assert_eq!(s.m.attestations.left, None, "that boot is over");
    s.then(Event::Leaves(Box::new(left("a", Ok(vec![rel(2)])))));
    assert_eq!(s.m.attestations.left, Some(left("a", Ok(vec![rel(2)]))));
    let bad = left("a", Err("a foreign initramfs".into()));
    s.then(Event::Leaves(Box::new(bad.clone())));
    let warns = |action: &Action| matches!(action, Action::Say { warn: true, text } if text == "a foreign initramfs");
    assert!(s.last.iter().any(warns), "{:?}", s.last);
    // What a person accepts is the machine as it is; what its kernels said stays.
    s.then(Event::AcceptTpm);
    let stored: Machine = serde_json::from_str(&serde_json::to_string(&s.m).unwrap()).unwrap();
    assert_eq!(stored.attestations.left, Some(bad));
}

#[test]
fn a_kexec_that_was_not_measured_is_said_to_be_so() {
    let began = |measured| Began { boot_id: "a".into(), pcr10: hash(5), measured };
    for (carried, began, words) in [
        (false, None, "under the site's key"),
        (false, Some(began(true)), "under the site's key"),
        (false, Some(began(false)), "its kernel measures no kexec"),
        (true, None, "carried by kexec, unmeasured"),
        (true, Some(began(false)), "carried by kexec, unmeasured"),
        (true, Some(began(true)), "carried by kexec"),
    ] {
        let mut s = Story::new();
        s.then(reports("a", 1, TpmPresence::Ready));
        let booted = Ok(ProvenBoot { cold: cold("a", [1, 2, 3, 4]), carried, began: began.clone() });
        let proven = Proven { key: key(1), boot_id: "a".into(), endorsement: Some(hash(7)), option_roms: None, booted };
        s.then(Event::Proven(Box::new(proven)));
        assert!(s.m.attestation().1.ends_with(words), "{:?}", s.m.attestation());
        assert_eq!(s.m.attestations.began, began);
    }
}

#[test]
fn who_else_may_sign_is_said_of_an_attested_boot() {
    let mut s = Story::new();
    s.then(reports("a", 1, TpmPresence::Ready));
    let cold = ColdBoot { others: true, ..cold("a", [1, 2, 3, 4]) };
    let booted = Ok(ProvenBoot { cold, carried: false, began: None });
    let proven = Proven { key: key(1), boot_id: "a".into(), endorsement: Some(hash(7)), option_roms: None, booted };
    s.then(Event::Proven(Box::new(proven)));
    let (state, reason) = s.m.attestation();
    assert_eq!(state, AttestationState::Attested);
    assert!(reason.ends_with("under the site's key; db lets in more than the site's key"), "{reason}");
}
