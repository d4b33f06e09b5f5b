//! Who is issued a certificate, and whose ends.

use crate::common::*;
use kiln_fleet::*;
use kiln_protocol::*;

const ANY: Option<CertificateDemand> = Some(CertificateDemand::Approved);
const ATTESTED: Option<CertificateDemand> = Some(CertificateDemand::Attested);

fn due(m: &Machine, declared: Option<CertificateDemand>) -> Result<(), CertificateRefusal> {
    m.certificate_due(&key(1), declared, &Barred::default())
}

fn kind(m: &Machine, declared: Option<CertificateDemand>) -> &'static str {
    due(m, declared).err().map_or("issued", |refusal| refusal.kind())
}

/// Of what was issued under its key and name.
fn ended(m: &Machine) -> Option<CertificateEnd> {
    m.certificate_ended(&key(1), Some("rack-1"))
}

fn wipe(expires: Millis) -> Event {
    let id: OrderId = "ab".repeat(16).parse().unwrap();
    Event::Ordered(MachineOrder { id, errand: Errand::Wipe, expires, state: OrderState::Open })
}

/// Its release 1 is good and runs.
fn at_work() -> Story {
    let mut s = Story::good_on_1();
    s.then(by(1, healthy(1, "a", 9, 1)));
    s
}

#[test]
fn a_machine_at_work_is_issued_one_where_its_release_wants_it() {
    let s = at_work();
    assert_eq!(due(&s.m, ANY), Ok(()));
    assert_eq!(kind(&s.m, None), "not-declared");
    assert!(due(&s.m, None).unwrap_err().to_string().contains("minimal/1 wants no certificate"));
    let other = s.m.certificate_due(&key(2), ANY, &Barred::default()).unwrap_err();
    assert_eq!(other.kind(), "not-in-service", "another key is not the machine's: {other}");
}

#[test]
fn nobody_else_is() {
    // Not approved.
    let mut s = Story::new();
    s.then(by(1, healthy(1, "a", 1, 1)));
    assert_eq!(kind(&s.m, ANY), "not-in-service");
    assert!(due(&s.m, ANY).unwrap_err().to_string().contains("approve"));
    // Still in its initramfs.
    let mut s = at_work();
    s.then(by(1, report(1, "b", 1, 1)));
    assert_eq!(kind(&s.m, ANY), "not-running");

    let mut s = at_work();
    s.m.key_revoked = true;
    assert_eq!(kind(&s.m, ANY), "key-revoked");
    let mut s = at_work();
    s.then(Event::Retire);
    assert_eq!(kind(&s.m, ANY), "not-in-service");
    let mut s = at_work();
    s.then(Event::KeyShared { with: "rack-2".into() });
    assert_eq!((s.m.state.kind, kind(&s.m, ANY)), (StateKind::Quarantined, "not-in-service"));
    let mut s = at_work();
    let until = s.now + 3_600_000;
    s.then(wipe(until));
    assert_eq!(kind(&s.m, ANY), "being-wiped");

    // Known by its name, or by its place.
    let mut s = at_work();
    s.m.position = Some("10.0.0.1 a b".into());
    assert_eq!(kind(&s.m, ANY), "name-only");
    let mut s = at_work();
    s.m.facts.as_mut().unwrap().key_storage = KeyStorage::Ephemeral;
    assert_eq!(kind(&s.m, ANY), "name-only");
}

#[test]
fn only_for_a_release_that_it_shall_run() {
    let mut s = at_work();
    let barred = |barred: Barred| s.m.certificate_due(&key(1), ANY, &barred).err().map(|refusal| refusal.kind());
    assert_eq!(barred(Barred { floors: [("minimal".to_owned(), 2)].into(), ..Barred::default() }), Some("barred"));
    assert_eq!(barred(Barred { revoked: [rel(1)].into(), ..Barred::default() }), Some("barred"));
    assert_eq!(barred(Barred { revoked: [rel(2)].into(), ..Barred::default() }), None);
    // The last good one while another is assigned, and that one; none besides.
    s.assign(3, Via::Cold);
    assert_eq!(kind(&s.m, ANY), "issued");
    let running = |s: &Story, release: u64| {
        let mut m = s.m.clone();
        m.running = Some(report(1, "b", 1, release).embedded);
        kind(&m, ANY)
    };
    assert_eq!((running(&s, 3), running(&s, 2)), ("issued", "another-release"));
}

#[test]
fn where_the_release_says_so_only_for_a_proven_boot() {
    let s = at_work();
    assert_eq!((kind(&s.m, ANY), kind(&s.m, ATTESTED)), ("issued", "not-attested"));
    let refusal = due(&s.m, ATTESTED).unwrap_err().to_string();
    assert!(refusal.starts_with("minimal/1 wants certificates for attested boots only"), "{refusal}");
    let mut s = at_work();
    let mut tells = healthy(1, "a", 10, 1);
    tells.machine.tpm = Some(TpmPresence::Ready);
    s.then(by(1, tells));
    assert_eq!(kind(&s.m, ATTESTED), "not-attested", "a TPM that has proven nothing");
    let hash = |n: u8| format!("{n:02x}").repeat(32).parse::<Sha256Hex>().unwrap();
    let cold = ColdBoot {
        boot_id: "a".into(),
        resets: 1,
        restarts: 0,
        release: rel(1),
        pcr11: hash(9),
        pcrs: Vec::new(),
        firmware: [1, 2, 3, 4].map(hash),
        measures: false,
        others: false,
    };
    let booted = Ok(ProvenBoot { cold, carried: false, began: None });
    let (endorsement, option_roms) = (Some(hash(7)), None);
    let proven = Proven { key: key(1), boot_id: "a".into(), endorsement, option_roms, booted };
    s.then(Event::Proven(Box::new(proven.clone())));
    assert_eq!((kind(&s.m, ATTESTED), ended(&s.m)), ("issued", None));
    // Its TPM is the one that it was approved with, and says that something else runs, or that something was added.
    let failed = Err((AttestationState::Failed, "PCR 12 is not the command line's".to_owned()));
    s.then(Event::Proven(Box::new(Proven { booted: failed, ..proven.clone() })));
    assert_eq!((kind(&s.m, ANY), kind(&s.m, ATTESTED)), ("attestation-failed", "attestation-failed"));
    assert_eq!(ended(&s.m), Some(CertificateEnd::Failed));
    s.then(Event::Proven(Box::new(proven)));
    assert_eq!((kind(&s.m, ANY), ended(&s.m)), ("issued", None), "a boot that is as it should be");
}

#[test]
fn what_was_issued_ends_with_what_it_rests_on() {
    let s = at_work();
    assert_eq!(ended(&s.m), None);
    assert_eq!(s.m.certificate_ended(&key(2), None), Some(CertificateEnd::OtherKey), "it was another key's");
    let after = |event: Event| {
        let mut s = at_work();
        s.then(event);
        ended(&s.m)
    };
    assert_eq!(after(Event::Retire), Some(CertificateEnd::OutOfService));
    assert_eq!(after(Event::KeyShared { with: "rack-2".into() }), Some(CertificateEnd::Quarantined));
    assert_eq!(after(wipe(u64::MAX)), Some(CertificateEnd::Wiped));
    assert_eq!(after(by(1, unwell(1, "a", 10, 1))), None, "it is unwell, and still itself");
    assert_eq!(after(Event::Assign { release: rel(3), via: Via::Cold.into() }), None);
    let mut s = at_work();
    s.m.key_revoked = true;
    assert_eq!(ended(&s.m), Some(CertificateEnd::KeyRevoked));
    // Its name is in it, and another machine's may be the same from then on. Where it is not known, nothing ends by it.
    let mut s = at_work();
    let named = |name: &str| Event::Approve { name: name.into(), role: "lab".into(), release: rel(1) };
    s.then(named("rack-1"));
    assert_eq!(ended(&s.m), None, "the name that it has");
    s.then(named("old-1"));
    assert_eq!(ended(&s.m), Some(CertificateEnd::OtherName));
    assert_eq!(s.m.certificate_ended(&key(1), None), None);
    // Its release does not matter: what it has it keeps until it is over.
    let mut s = at_work();
    s.then(by(1, report(1, "b", 1, 1)));
    assert_eq!(ended(&s.m), None);
}
