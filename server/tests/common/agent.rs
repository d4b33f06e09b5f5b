//! Machines that report to a server, as far as it can tell.

use super::*;

/// A machine's agent, as far as the server can tell.
#[derive(Clone)]
pub struct Agent {
    pub n: u8,
    pub signer: Arc<Signer>,
    pub boot: u32,
    pub seq: u64,
    pub embedded: RunningRelease,
    pub storage: KeyStorage,
}

impl Agent {
    pub fn new(n: u8, manifest: &Manifest) -> Self {
        let embedded = running(manifest);
        let signer = Arc::new(Signer::from_seed(&[n; 32]));
        Self { n, signer, boot: 1, seq: 0, embedded, storage: KeyStorage::EfiVariable }
    }

    pub fn identity(&self) -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
        let key = PrivateKeyDer::Pkcs8(self.signer.pkcs8_der().into());
        (self_signed_certificate(&self.signer).into(), key)
    }

    pub fn key_id(&self) -> KeyId {
        kiln_release::certificate::certificate_key_id(&self_signed_certificate(&self.signer)).unwrap().parse().unwrap()
    }

    pub fn restart(&mut self, manifest: &Manifest) {
        self.boot += 1;
        self.seq = 0;
        self.embedded = running(manifest);
    }

    pub fn report(&mut self) -> Report {
        self.seq += 1;
        Report {
            boot_id: format!("boot-{}-{}", self.n, self.boot),
            seq: self.seq,
            machine: MachineFacts {
                id: machine_id(self.n),
                macs: vec![format!("52:54:00:00:00:{:02x}", self.n)],
                product: "Test".into(),
                serial: "1".into(),
                firmware: Firmware::Uefi,
                arch: Architecture::X86_64,
                key_storage: self.storage,
                rollback_memory: RollbackMemory::EfiVariable,
                protection: ProtectionClass::Unprotected,
                memory_bytes: 1 << 30,
                tpm: None,
            },
            nonce: format!("{:062x}{:02x}", self.seq, self.n).parse().unwrap(),
            embedded: self.embedded.clone(),
            running: None,
            stages: vec![StageRecord { stage: Stage::Start, state: StageState::Done, at_ms: 1 }],
            at_ms: self.seq * 10,
            health: None,
            prefetch: None,
            fallback: None,
            agent_memory: None,
            exec: None,
            dbx: None,
            condition: None,
            acceptance: None,
            secrets: None,
            stale: None,
            wait_s: 0,
            desired_etag: String::new(),
        }
    }

    pub fn healthy(&mut self) -> Report {
        let health = Some(Health { healthy: true, detail: String::new() });
        Report { running: Some(self.embedded.clone()), health, ..self.report() }
    }

    /// Healthy, and ready for the assignment of this sequence.
    pub fn ready(&mut self, release: u64, sequence: u64) -> Report {
        let image = self.embedded.image.clone();
        Report { prefetch: Some(Prefetch { image, release, sequence, ready: true, progress: None }), ..self.healthy() }
    }

    pub async fn send(&self, server: &Server, report: &Report) -> Reply {
        let body = serde_json::to_vec(report).unwrap();
        let answer = server.post(server.tls(Some(self.identity())), body).await.unwrap();
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
        serde_json::from_slice(&answer.body).unwrap()
    }
}

pub fn running(m: &Manifest) -> RunningRelease {
    RunningRelease {
        image: m.image.parse().unwrap(),
        release: m.release,
        root_hash: m.verity.root_hash.parse().unwrap(),
    }
}

/// What an assigned reply carries.
pub fn assigned(reply: &Reply) -> (&str, &str, &Grant) {
    match &reply.desired.decision {
        Decision::Assigned { assignment, freshness, via: _, grant } => (assignment, freshness, grant),
        Decision::Wait { reason } => panic!("must be assigned, but: {reason}"),
    }
}

pub fn waits(reply: &Reply) -> &str {
    match &reply.desired.decision {
        Decision::Wait { reason } => reason,
        Decision::Assigned { .. } => panic!("must wait"),
    }
}
