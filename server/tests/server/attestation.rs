//! Proofs of a boot against a running `kiln serve`, by real TPMs in software: what is attested, and what fails and why.

use crate::common::chip::*;
use crate::common::*;
use hyper::StatusCode;
use kiln_protocol::tpm::command;
use kiln_protocol::tpm::{Auth, ENDORSEMENT, Template};
use kiln_protocol::*;
use kiln_release::{Measured, hex, measured as judged};

#[tokio::test]
async fn a_machine_is_attested_boot_by_boot_and_over_a_kexec() {
    let Some(mut chip) = Chip::new() else { return };
    let site = TestSite::new();
    site.publish(2);
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    chip.boot(1, b"firmware 1", 1);
    chip.event(2, 0x8000_0004, [0x42; 32], b"the card's ROM");
    let judged = boots(&server, &mut agent, &mut chip).await;
    assert_eq!(judged.state, AttestationState::Attested, "{judged:?}");
    assert!(judged.reason.contains("minimal/1"), "{judged:?}");
    let reply = report(&server, &mut agent, TpmPresence::Ready).await;
    assert!(!reply.attest, "once is enough");
    assigned(&reply);
    let view = server.machine("rack-1").await;
    assert_eq!(view.protection, Some(ProtectionClass::Attested));
    let seen = view.attestation.unwrap();
    assert!(seen.endorsement.is_some() && seen.endorsement == seen.approved_endorsement && !seen.carried);
    let roms: Option<Vec<Sha256Hex>> = Some(vec!["42".repeat(32).parse().unwrap()]);
    assert_eq!(seen.option_roms, roms, "what `kiln trust secureboot enroll --allow` takes");

    // A kexec: another kernel, whose release firmware has not seen; the event log may be lost.
    chip.run(&command::pcr_extend(11, &judged::cap()));
    for log in [chip.log.clone(), Vec::new()] {
        chip.log = log;
        agent.restart(&site.manifest(2));
        let judged = boots(&server, &mut agent, &mut chip).await;
        assert_eq!(judged.state, AttestationState::Attested, "{judged:?}");
        // Built before agents had kexecs measured.
        assert_eq!(judged.reason, "attested at cold boot (minimal/1), carried by kexec, unmeasured");
        let seen = server.machine("rack-1").await.attestation.unwrap();
        assert!(seen.carried && seen.option_roms == roms, "a kernel that lost the log has the same cards: {seen:?}");
        chip.run(&command::pcr_extend(11, &judged::cap()));
    }
    // Something else was started in between.
    chip.run(&command::pcr_extend(11, &[7; 32]));
    agent.restart(&site.manifest(2));
    let judged = boots(&server, &mut agent, &mut chip).await;
    assert_eq!(judged.state, AttestationState::Failed);
    assert!(judged.reason.contains("PCR 11"), "{judged:?}");
    let view = server.machine("rack-1").await;
    assert_eq!(view.protection, Some(ProtectionClass::Unprotected));
    // What became of it is in the chained log: that it was attested, and from when on it was not.
    let audit = server.audit().await;
    let told: Vec<_> = audit.iter().filter(|r| r.what.starts_with("boots ")).collect();
    let (first, last) = (told[0], told[1]);
    assert!(told.len() == 2 && first.what.starts_with("boots are attested (attested): "), "{told:?}");
    assert!(last.what.starts_with("boots were attested (attested) and are failed (unprotected): "), "{last:?}");
    assert_eq!((last.actor.as_str(), last.machine.as_str()), ("kiln", "rack-1"));
}

#[tokio::test]
async fn an_old_quote_a_copied_key_and_another_tpm_prove_nothing() {
    let Some(mut chip) = Chip::new() else { return };
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    report(&server, &mut agent, TpmPresence::Ready).await;
    chip.boot(1, b"firmware", 1);
    let (judged, old) = prove(&server, &agent, &mut chip).await;
    assert_eq!(judged.state, AttestationState::Attested, "{judged:?}");
    assert_eq!(post(&server, &agent, &old).await.status, StatusCode::CONFLICT, "good once");

    // The quote of the boot before, with a secret that the TPM has just opened.
    agent.restart(&site.manifest(1));
    report(&server, &mut agent, TpmPresence::Ready).await;
    let (endorsement, ek) = chip.run(&command::create_primary(ENDORSEMENT, Template::Endorsement));
    let (attestation, ak) = chip.run(&command::create_primary(ENDORSEMENT, Template::Attestation));
    let challenge = hello(&server, &agent, &ek, &ak).await;
    let session = chip.run(&command::start_policy(&[5; 16]));
    chip.run(&command::policy_secret(ENDORSEMENT, session));
    let (id_object, encrypted) = (&challenge.id_object.0, &challenge.encrypted_secret.0);
    let new = chip.run(&command::activate_credential(
        (attestation, Auth::Password),
        endorsement,
        session,
        id_object,
        encrypted,
    ));
    chip.run(&command::flush(endorsement));
    chip.run(&command::flush(attestation));
    let Attestation::Prove { machine, pcrs, quoted, signature, event_log, measured, .. } = old else {
        panic!("a proof")
    };
    let secret = hex::encode(&new).parse().unwrap();
    let replayed = Attestation::Prove {
        machine,
        boot_id: boot_id(&agent),
        secret,
        pcrs,
        quoted,
        signature,
        event_log,
        measured,
        delivery: None,
    };
    let judged = judge(&server, &agent, &replayed).await;
    assert_eq!(judged.state, AttestationState::Failed);
    assert!(judged.reason.contains("not of this question"), "{judged:?}");

    // The machine's own TLS key on other hardware: without a TPM, and with another.
    agent.restart(&site.manifest(1));
    let reply = report(&server, &mut agent, TpmPresence::Absent).await;
    assert!(waits(&reply).contains("has not proven the TPM that rack-1 was approved with"), "{}", waits(&reply));
    assert_eq!(server.machine("rack-1").await.attestation.unwrap().state, AttestationState::Failed);
    let mut other = Chip::new().unwrap();
    other.boot(1, b"firmware", 1);
    agent.restart(&site.manifest(1));
    let judged = boots(&server, &mut agent, &mut other).await;
    assert_eq!(judged.state, AttestationState::Failed);
    assert!(judged.reason.starts_with("another TPM"), "{judged:?}");
    waits(&report(&server, &mut agent, TpmPresence::Ready).await);

    // A person knows that it was replaced.
    let answer = server.order("POST", "machines/rack-1/accept", serde_json::json!({})).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    let judged = boots(&server, &mut agent, &mut other).await;
    assert_eq!(judged.state, AttestationState::Attested, "{judged:?}");
    assigned(&report(&server, &mut agent, TpmPresence::Ready).await);
}

#[tokio::test]
async fn an_attestation_key_outside_the_tpm_opens_no_credential() {
    let Some(mut chip) = Chip::new() else { return };
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    report(&server, &mut agent, TpmPresence::Ready).await;
    let (_, ek) = chip.run(&command::create_primary(ENDORSEMENT, Template::Endorsement));
    let (_, mut ak) = chip.run(&command::create_primary(ENDORSEMENT, Template::Attestation));
    // Its last byte is the point's: a key of somebody's own, said to lie in this TPM.
    *ak.last_mut().unwrap() ^= 1;
    hello(&server, &agent, &ek, &ak).await;
    let guess = Attestation::Prove {
        machine: machine_id(1),
        boot_id: boot_id(&agent),
        secret: "00".repeat(32).parse().unwrap(),
        pcrs: Vec::new(),
        quoted: HexBytes::default(),
        signature: HexBytes::default(),
        event_log: HexBytes::default(),
        measured: HexBytes::default(),
        delivery: None,
    };
    let judged = judge(&server, &agent, &guess).await;
    assert_eq!(judged.state, AttestationState::Failed);
    assert!(judged.reason.contains("credential was not opened"), "{judged:?}");
    // An endorsement key of another kind is not taken at all, nor is another machine's word.
    let step = Attestation::Hello {
        machine: machine_id(1),
        boot_id: boot_id(&agent),
        endorsement: HexBytes(ak.clone()),
        attestation: HexBytes(ak.clone()),
    };
    assert_eq!(post(&server, &agent, &step).await.status, StatusCode::UNPROCESSABLE_ENTITY);
    let stranger = Agent { signer: Agent::new(2, &site.manifest(1)).signer, ..agent.clone() };
    assert_eq!(post(&server, &stranger, &guess).await.status, StatusCode::CONFLICT);
    // The same first step that the machine itself was asked for, by another key.
    let step = Attestation::Hello {
        machine: machine_id(1),
        boot_id: boot_id(&agent),
        endorsement: HexBytes(ek),
        attestation: HexBytes(ak),
    };
    let answer = post(&server, &stranger, &step).await;
    assert_eq!(answer.status, StatusCode::CONFLICT, "{}", answer.text());
}

/// A disk may have its loader from another release than the one that it starts, but from none that was revoked.
#[tokio::test]
async fn the_loader_of_a_revoked_release_is_a_foreign_program() {
    let Some(mut chip) = Chip::new() else { return };
    let site = TestSite::new();
    let loader = [0x10; 32];
    site.publish_as(2, |manifest| {
        manifest.measured = Some(Measured { loader: Some(hex::encode(&loader)), ..measured(2) });
    });
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    chip.boot(1, b"firmware", 1);
    chip.event(4, 0x8000_0003, loader, b"path");
    let judged = boots(&server, &mut agent, &mut chip).await;
    assert_eq!(judged.state, AttestationState::Attested, "{judged:?}");

    let snapshot = site.snapshot();
    std::fs::write(site.site.secure_boot("revoked"), format!("{} minimal/2\n", "ab".repeat(32))).unwrap();
    kiln_images::publish_dbx(&site.site, jiff::Timestamp::now(), &mut kiln_images::Unlock::nobody()).unwrap();
    until(&server, |status| status["snapshot"].as_u64().unwrap() > snapshot).await;
    chip.restart();
    chip.boot(1, b"firmware", 1);
    chip.event(4, 0x8000_0003, loader, b"path");
    agent.restart(&site.manifest(1));
    let judged = boots(&server, &mut agent, &mut chip).await;
    assert_eq!(judged.state, AttestationState::Failed, "{judged:?}");
    assert!(judged.reason.contains("no boot program of this release (PCR 4)"), "{judged:?}");
}

#[tokio::test]
async fn changed_firmware_and_a_boot_without_secure_boot_are_told_apart() {
    let Some(mut chip) = Chip::new() else { return };
    let site = TestSite::new();
    let toml = std::fs::read_to_string(site.path().join("kiln.toml")).unwrap();
    let strict = toml.replace("name = \"lab\"\n", "name = \"lab\"\nattested = true\n");
    std::fs::write(site.path().join("kiln.toml"), strict).unwrap();
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    let reply = report(&server, &mut agent, TpmPresence::Ready).await;
    assert!(waits(&reply).contains("only to attested boots"), "{}", waits(&reply));
    chip.boot(1, b"firmware 1", 1);
    assert_eq!(prove(&server, &agent, &mut chip).await.0.state, AttestationState::Attested);
    assigned(&report(&server, &mut agent, TpmPresence::Ready).await);

    for (firmware, secure, release, state, words) in [
        (&b"firmware 2"[..], 1, 1, AttestationState::Failed, "firmware changed: firmware (PCR 0)"),
        (b"firmware 1", 0, 1, AttestationState::Unattested, "Secure Boot is off"),
        (b"firmware 1", 1, 7, AttestationState::Failed, "no release published here (PCR 4)"),
        (b"firmware 1", 1, 1, AttestationState::Attested, "minimal/1"),
    ] {
        chip.restart();
        chip.boot(release, firmware, secure);
        agent.restart(&site.manifest(1));
        let judged = boots(&server, &mut agent, &mut chip).await;
        assert_eq!(judged.state, state, "{judged:?}");
        assert!(judged.reason.contains(words), "{judged:?}");
        let reply = report(&server, &mut agent, TpmPresence::Ready).await;
        let given = matches!(reply.desired.decision, Decision::Assigned { .. });
        assert_eq!(given, state == AttestationState::Attested, "{judged:?}");
    }
    // Something was added to the command line.
    chip.run(&command::pcr_extend(12, &[1; 32]));
    agent.restart(&site.manifest(1));
    let judged = boots(&server, &mut agent, &mut chip).await;
    assert!(judged.reason.contains("PCR 12"), "{judged:?}");
}
