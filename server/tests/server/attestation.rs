//! Proofs of a boot against a running `kiln serve`, by real TPMs in software: what is attested, and what fails and why.

use crate::common::*;
use hyper::StatusCode;
use kiln_protocol::tpm::command::{self, ANSWER_LIMIT, HEADER, answer_length};
use kiln_protocol::tpm::{Command, ENDORSEMENT, QUOTED, Template, qualifying_data};
use kiln_protocol::*;
use kiln_release::efi::certificate_list;
use kiln_release::{hex, measured as judged};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Stdio};
use std::time::Instant;

/// A software TPM, and firmware that measures into it and writes its log.
struct Chip {
    child: Child,
    dir: tempfile::TempDir,
    stream: UnixStream,
    log: Vec<u8>,
}

impl Drop for Chip {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    raw(&hex::sha256(bytes))
}

fn raw(text: &str) -> [u8; 32] {
    hex::decode(text).unwrap().try_into().unwrap()
}

fn start(dir: &std::path::Path) -> Option<(Child, UnixStream)> {
    let socket = dir.join("socket");
    let _ = std::fs::remove_file(&socket);
    let child = std::process::Command::new("swtpm")
        .args(["socket", "--tpm2", "--flags", "not-need-init,startup-clear", "--tpmstate"])
        .arg(format!("dir={}", dir.display()))
        .args(["--server", &format!("type=unixio,path={}", socket.display())])
        .stdin(Stdio::null())
        .spawn();
    let Ok(child) = child else {
        println!("skipped: swtpm is not installed (make setup)");
        return None;
    };
    let limit = Instant::now() + PATIENCE;
    loop {
        match UnixStream::connect(&socket) {
            Ok(stream) => return Some((child, stream)),
            Err(_) if Instant::now() < limit => std::thread::yield_now(),
            Err(error) => panic!("swtpm does not listen: {error}"),
        }
    }
}

impl Chip {
    fn new() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let (child, stream) = start(dir.path())?;
        Some(Self { child, dir, stream, log: Vec::new() })
    }

    /// Off and on again: PCRs are zero, the keys are the same.
    fn restart(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        (self.child, self.stream) = start(self.dir.path()).unwrap();
        self.log.clear();
    }

    fn run<T>(&mut self, command: &Command<T>) -> T {
        self.stream.write_all(command.bytes()).unwrap();
        let mut answer = [0; ANSWER_LIMIT];
        self.stream.read_exact(&mut answer[..HEADER]).unwrap();
        let length = answer_length(answer[..HEADER].try_into().unwrap());
        self.stream.read_exact(&mut answer[HEADER..length]).unwrap();
        command.answer(&answer[..length]).unwrap()
    }

    fn event(&mut self, pcr: u8, kind: u32, digest: [u8; 32], data: &[u8]) {
        self.run(&command::pcr_extend(pcr, &digest));
        self.log.extend(u32::from(pcr).to_le_bytes());
        self.log.extend([&kind.to_le_bytes()[..], &[1, 0, 0, 0, 0x0b, 0], &digest].concat());
        self.log.extend(u32::try_from(data.len()).unwrap().to_le_bytes());
        self.log.extend(data);
    }

    fn variable(&mut self, name: &str, content: &[u8]) {
        let units: Vec<u8> = name.encode_utf16().flat_map(u16::to_le_bytes).collect();
        let number = |n: usize| u64::try_from(n).unwrap().to_le_bytes();
        let data = [&[9; 16][..], &number(name.len()), &number(content.len()), &units, content].concat();
        self.event(7, 0x8000_0001, sha256(&data), &data);
    }

    /// Firmware, then the stub of this release.
    fn boot(&mut self, release: u64, firmware: &[u8], secure: u8) {
        let mut spec = b"Spec ID Event03\0".to_vec();
        spec.extend([0, 0, 0, 0, 0, 2, 0, 2, 1, 0, 0, 0, 0x0b, 0, 32, 0, 0]);
        self.log = [&[0; 4][..], &3_u32.to_le_bytes(), &[0; 20]].concat();
        self.log.extend(u32::try_from(spec.len()).unwrap().to_le_bytes());
        self.log.extend(spec);
        self.event(0, 8, sha256(firmware), b"firmware");
        self.variable("SecureBoot", &[secure]);
        self.variable("db", &certificate_list(b"site"));
        for pcr in [0, 1, 2, 3, 4, 7] {
            self.event(pcr, 4, sha256(&[0; 4]), &[0; 4]);
        }
        let measured = measured(release);
        self.event(4, 0x8000_0003, raw(&measured.uki), b"path");
        self.event(4, 0x8000_0003, raw(&measured.kernel), b"path");
        self.run(&command::pcr_extend(11, &sha256(format!("parts {release}").as_bytes())));
    }
}

async fn post(server: &Server, agent: &Agent, step: &Attestation) -> Answer {
    let body = serde_json::to_vec(step).unwrap();
    server.post_to(ATTESTATION_PATH, server.tls(Some(agent.identity())), body).await.unwrap()
}

fn boot_id(agent: &Agent) -> String {
    format!("boot-{}-{}", agent.n, agent.boot)
}

/// Both steps, as the agent does them; what was shown is given back, so that it can be shown again.
async fn prove(server: &Server, agent: &Agent, chip: &mut Chip) -> (Judged, Attestation) {
    let (endorsement, endorsement_public) = chip.run(&command::create_primary(ENDORSEMENT, Template::Endorsement));
    let (attestation, attestation_public) = chip.run(&command::create_primary(ENDORSEMENT, Template::Attestation));
    let challenge = hello(server, agent, &endorsement_public, &attestation_public).await;
    let session = chip.run(&command::start_policy(&[5; 16]));
    chip.run(&command::policy_secret(ENDORSEMENT, session));
    let Challenge { nonce, id_object, encrypted_secret } = challenge;
    let activate = command::activate_credential(attestation, endorsement, session, &id_object.0, &encrypted_secret.0);
    let secret = chip.run(&activate);
    let qualifying = qualifying_data(nonce.as_str(), agent.key_id().as_str(), &boot_id(agent));
    let quote = chip.run(&command::quote(attestation, &qualifying));
    let pcrs = QUOTED.map(|pcr| hex::encode(&chip.run(&command::pcr_read(pcr))).parse().unwrap());
    chip.run(&command::flush(endorsement));
    chip.run(&command::flush(attestation));
    let shown = Attestation::Prove {
        machine: machine_id(agent.n),
        boot_id: boot_id(agent),
        secret: hex::encode(&secret).parse().unwrap(),
        pcrs: pcrs.to_vec(),
        quoted: HexBytes(quote.attest),
        signature: HexBytes(quote.signature),
        event_log: HexBytes(chip.log.clone()),
    };
    (judge(server, agent, &shown).await, shown)
}

async fn hello(server: &Server, agent: &Agent, endorsement: &[u8], attestation: &[u8]) -> Challenge {
    let step = Attestation::Hello {
        machine: machine_id(agent.n),
        boot_id: boot_id(agent),
        endorsement: HexBytes(endorsement.to_vec()),
        attestation: HexBytes(attestation.to_vec()),
    };
    let answer = post(server, agent, &step).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    serde_json::from_slice(&answer.body).unwrap()
}

async fn judge(server: &Server, agent: &Agent, shown: &Attestation) -> Judged {
    let answer = post(server, agent, shown).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    serde_json::from_slice(&answer.body).unwrap()
}

async fn report(server: &Server, agent: &mut Agent, tpm: TpmPresence) -> Reply {
    let mut report = agent.report();
    report.machine.tpm = Some(tpm);
    agent.send(server, &report).await
}

/// Boots, reports, proves.
async fn boots(server: &Server, agent: &mut Agent, chip: &mut Chip) -> Judged {
    let reply = report(server, agent, TpmPresence::Ready).await;
    assert!(reply.attest, "a new boot is asked");
    prove(server, agent, chip).await.0
}

#[tokio::test]
async fn a_machine_is_attested_boot_by_boot_and_over_a_kexec() {
    let Some(mut chip) = Chip::new() else { return };
    let site = TestSite::new();
    site.publish(2);
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    chip.boot(1, b"firmware 1", 1);
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

    // A kexec: another kernel, whose release firmware has not seen; the event log may be lost.
    chip.run(&command::pcr_extend(11, &judged::cap()));
    for log in [chip.log.clone(), Vec::new()] {
        chip.log = log;
        agent.restart(&site.manifest(2));
        let judged = boots(&server, &mut agent, &mut chip).await;
        assert_eq!(judged.state, AttestationState::Attested, "{judged:?}");
        assert_eq!(judged.reason, "attested at cold boot (minimal/1), carried by kexec");
        assert!(server.machine("rack-1").await.attestation.unwrap().carried);
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
    let new = chip.run(&command::activate_credential(attestation, endorsement, session, id_object, encrypted));
    chip.run(&command::flush(endorsement));
    chip.run(&command::flush(attestation));
    let Attestation::Prove { machine, pcrs, quoted, signature, event_log, .. } = old else { panic!("a proof") };
    let secret = hex::encode(&new).parse().unwrap();
    let replayed = Attestation::Prove { machine, boot_id: boot_id(&agent), secret, pcrs, quoted, signature, event_log };
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
    };
    let judged = judge(&server, &agent, &guess).await;
    assert_eq!(judged.state, AttestationState::Failed);
    assert!(judged.reason.contains("credential was not opened"), "{judged:?}");
    // An endorsement key of another kind is not taken at all, nor is another machine's word.
    let step = Attestation::Hello {
        machine: machine_id(1),
        boot_id: boot_id(&agent),
        endorsement: HexBytes(ak.clone()),
        attestation: HexBytes(ak),
    };
    assert_eq!(post(&server, &agent, &step).await.status, StatusCode::UNPROCESSABLE_ENTITY);
    let stranger = Agent { signer: Agent::new(2, &site.manifest(1)).signer, ..agent.clone() };
    assert_eq!(post(&server, &stranger, &guess).await.status, StatusCode::CONFLICT);
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
