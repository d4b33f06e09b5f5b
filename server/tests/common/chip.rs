//! A software TPM, firmware that measures into it, and an agent's proofs with it.

use super::*;
use kiln_protocol::tpm::command::{self, ANSWER_LIMIT, HEADER, answer_length};
use kiln_protocol::tpm::{
    Auth, Command, DELIVERY, ENDORSEMENT, QUOTED, Template, TpmError, delivery_policy, qualifying_data,
};
use kiln_release::efi::certificate_list;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Stdio};
use std::time::Instant;

/// A software TPM, and firmware that measures into it and writes its log.
pub struct Chip {
    child: Child,
    dir: tempfile::TempDir,
    stream: UnixStream,
    pub log: Vec<u8>,
    /// What the kernel that runs says that it measured.
    pub measured: Vec<u8>,
}

impl Drop for Chip {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    raw(&hex::sha256(bytes))
}

pub fn raw(text: &str) -> [u8; 32] {
    hex::decode(text).unwrap().try_into().unwrap()
}

pub fn start(dir: &Path) -> Option<(Child, UnixStream)> {
    let socket = dir.join("socket");
    let _ = fs::remove_file(&socket);
    let child = std::process::Command::new("swtpm")
        .args(["socket", "--tpm2", "--flags", "not-need-init,startup-clear", "--tpmstate"])
        .arg(format!("dir={}", dir.display()))
        .args(["--server", &format!("type=unixio,path={}", socket.display())])
        .stdin(Stdio::null())
        .spawn();
    let Ok(child) = child else {
        oracle::skipped("swtpm is not installed (make setup)");
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
    pub fn new() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let (child, stream) = start(dir.path())?;
        Some(Self { child, dir, stream, log: Vec::new(), measured: Vec::new() })
    }

    /// Off and on again: PCRs are zero, the keys are the same.
    pub fn restart(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        (self.child, self.stream) = start(self.dir.path()).unwrap();
        self.log.clear();
        self.measured.clear();
    }

    pub fn run<T>(&mut self, command: &Command<T>) -> T {
        self.try_run(command).unwrap()
    }

    pub fn try_run<T>(&mut self, command: &Command<T>) -> Result<T, TpmError> {
        self.stream.write_all(command.bytes()).unwrap();
        let mut answer = [0; ANSWER_LIMIT];
        self.stream.read_exact(&mut answer[..HEADER]).unwrap();
        let length = answer_length(answer[..HEADER].try_into().unwrap());
        self.stream.read_exact(&mut answer[HEADER..length]).unwrap();
        command.answer(&answer[..length])
    }

    pub fn event(&mut self, pcr: u8, kind: u32, digest: [u8; 32], data: &[u8]) {
        self.run(&command::pcr_extend(pcr, &digest));
        self.log.extend(u32::from(pcr).to_le_bytes());
        self.log.extend([&kind.to_le_bytes()[..], &[1, 0, 0, 0, 0x0b, 0], &digest].concat());
        self.log.extend(u32::try_from(data.len()).unwrap().to_le_bytes());
        self.log.extend(data);
    }

    pub fn variable(&mut self, name: &str, content: &[u8]) {
        let units: Vec<u8> = name.encode_utf16().flat_map(u16::to_le_bytes).collect();
        let number = |n: usize| u64::try_from(n).unwrap().to_le_bytes();
        let data = [&[9; 16][..], &number(name.len()), &number(content.len()), &units, content].concat();
        self.event(7, 0x8000_0001, sha256(&data), &data);
    }

    /// The kernel measures: PCR 10 is extended by the fields, and they are in its list.
    pub fn measures(&mut self, fields: &[&[u8]]) {
        let sized = |bytes: &[u8]| [&u32::try_from(bytes.len()).unwrap().to_le_bytes()[..], bytes].concat();
        let data: Vec<u8> = fields.iter().flat_map(|field| sized(field)).collect();
        self.run(&command::pcr_extend(10, &sha256(&data)));
        let entry = [&10_u32.to_le_bytes()[..], &[7; 20], &sized(b"ima"), &sized(&data)].concat();
        self.measured.extend(entry);
    }

    /// A kernel starts, under the policy: its first word, and a module.
    pub fn kernel_starts(&mut self) {
        self.measured.clear();
        for (name, content) in [("boot_aggregate", "PCRs"), ("/usr/lib/modules/a.ko", "module")] {
            let digest = [b"sha256:\0".as_slice(), &sha256(content.as_bytes())].concat();
            self.measures(&[&digest, format!("{name}\0").as_bytes(), &[]]);
        }
    }

    /// It loads a kernel for a kexec: the release's, with this as its initramfs.
    pub fn kernel_loads(&mut self, manifest: &Manifest, initramfs: [u8; 32]) {
        let digest = [b"sha256:\0".as_slice(), &raw(&manifest.loaded_kernel().sha256)].concat();
        self.measures(&[&digest, b"memfd:kiln-kernel\0", &[]]);
        self.measures(&[&[b"ima:sha256:\0".as_slice(), &initramfs].concat(), b"memfd:kiln-initrd\0"]);
        let line = manifest.command_line.as_bytes();
        self.measures(&[&[b"sha256:\0".as_slice(), &sha256(line)].concat(), b"kexec-cmdline\0", line]);
    }

    /// The key that secrets are delivered to, by the PCRs as they are now: its handle is flushed where it is not needed.
    pub fn delivery(&mut self) -> (u32, Vec<u8>) {
        let values: Vec<[u8; 32]> = QUOTED.iter().map(|pcr| self.run(&command::pcr_read(*pcr))).collect();
        let key = self.delivery_under(delivery_policy(&values).unwrap());
        self.run(&command::flush(key.0));
        key
    }

    fn delivery_under(&mut self, policy: [u8; 32]) -> (u32, Vec<u8>) {
        self.run(&command::create_primary(ENDORSEMENT, Template::Delivery(policy)))
    }

    /// Opens what was delivered to the key of this policy; the TPM's code where it refuses.
    pub fn open(&mut self, delivered: &Delivered, policy: [u8; 32]) -> Result<Vec<u8>, TpmError> {
        let (key, _) = self.delivery_under(policy);
        let (endorsement, _) = self.run(&command::create_primary(ENDORSEMENT, Template::Endorsement));
        let bound = self.run(&command::start_policy(&[6; 16]));
        self.run(&command::policy_pcr(bound, &DELIVERY));
        self.run(&command::policy_command_code(bound, command::ACTIVATE_CREDENTIAL));
        let session = self.run(&command::start_policy(&[5; 16]));
        self.run(&command::policy_secret(ENDORSEMENT, session));
        let Delivered { id_object, encrypted_secret, .. } = delivered;
        let object = (key, Auth::Session(bound));
        let opened = self.try_run(&command::activate_credential(
            object,
            endorsement,
            session,
            &id_object.0,
            &encrypted_secret.0,
        ));
        if opened.is_err() {
            self.run(&command::flush(bound));
            self.run(&command::flush(session));
        }
        self.run(&command::flush(key));
        self.run(&command::flush(endorsement));
        opened
    }

    /// Firmware, then the stub of this release.
    pub fn boot(&mut self, release: u64, firmware: &[u8], secure: u8) {
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

pub async fn post(server: &Server, agent: &Agent, step: &Attestation) -> Answer {
    let body = serde_json::to_vec(step).unwrap();
    server.post_to(ATTESTATION_PATH, server.tls(Some(agent.identity())), body).await.unwrap()
}

pub fn boot_id(agent: &Agent) -> String {
    format!("boot-{}-{}", agent.n, agent.boot)
}

/// Both steps, as the agent does them; what was shown is given back, so that it can be shown again.
pub async fn prove(server: &Server, agent: &Agent, chip: &mut Chip) -> (Judged, Attestation) {
    let (judged, shown, _) = prove_for(server, agent, chip, false).await;
    (judged, shown)
}

/// The same, and with `secrets` it asks for them: what else is needed to open them is given back.
pub async fn prove_for(server: &Server, agent: &Agent, chip: &mut Chip, secrets: bool) -> (Judged, Attestation, Nonce) {
    let delivery = secrets.then(|| HexBytes(chip.delivery().1));
    prove_as(server, agent, chip, delivery).await
}

/// The same with any delivery key.
pub async fn prove_as(
    server: &Server,
    agent: &Agent,
    chip: &mut Chip,
    delivery: Option<HexBytes>,
) -> (Judged, Attestation, Nonce) {
    let (endorsement, endorsement_public) = chip.run(&command::create_primary(ENDORSEMENT, Template::Endorsement));
    let (attestation, attestation_public) = chip.run(&command::create_primary(ENDORSEMENT, Template::Attestation));
    let challenge = hello(server, agent, &endorsement_public, &attestation_public).await;
    let session = chip.run(&command::start_policy(&[5; 16]));
    chip.run(&command::policy_secret(ENDORSEMENT, session));
    let Challenge { nonce, id_object, encrypted_secret } = challenge;
    let activate = command::activate_credential(
        (attestation, Auth::Password),
        endorsement,
        session,
        &id_object.0,
        &encrypted_secret.0,
    );
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
        measured: HexBytes(chip.measured.clone()),
        delivery,
    };
    (judge(server, agent, &shown).await, shown, nonce)
}

pub async fn hello(server: &Server, agent: &Agent, endorsement: &[u8], attestation: &[u8]) -> Challenge {
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

pub async fn judge(server: &Server, agent: &Agent, shown: &Attestation) -> Judged {
    let answer = post(server, agent, shown).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    serde_json::from_slice(&answer.body).unwrap()
}

pub async fn report(server: &Server, agent: &mut Agent, tpm: TpmPresence) -> Reply {
    let mut report = agent.report();
    report.machine.tpm = Some(tpm);
    agent.send(server, &report).await
}

/// Boots, reports, proves.
pub async fn boots(server: &Server, agent: &mut Agent, chip: &mut Chip) -> Judged {
    let reply = report(server, agent, TpmPresence::Ready).await;
    assert!(reply.attest, "a new boot is asked");
    prove(server, agent, chip).await.0
}
