//! The fleet as the store holds it, at the server's start.

use super::{
    Control, Counts, Inner, Pending, attestation, certificates, crowd, expected, hardware, index, introductions,
    now_ms, positions, releases, secrets,
};
use crate::access::Access;
use crate::catalog::Catalog;
use crate::config::Config;
use crate::error::{AccessError, CodeError, ControlError};
use crate::logs::Logs;
use crate::oidc::Provider;
use crate::store::Store;
use kiln_fleet::{Classes, Event, Machine};
use kiln_images::SiteDir;
use kiln_protocol::{KeyId, MachineId};
use kiln_release::Signer;
use kiln_release::certificate::{certificate_spki, spki_key_id};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use std::collections::BTreeMap;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, RwLock};
use tokio::sync::{broadcast, watch};

impl Control {
    /// From what the store holds. `stop` turns true when the server is to end.
    pub async fn load(
        store: Store,
        site: SiteDir,
        config: Config,
        director: Signer,
        catalog: Catalog,
        stop: watch::Receiver<bool>,
    ) -> Result<Arc<Self>, ControlError> {
        let now = now_ms();
        let mut inner = Inner {
            machines: BTreeMap::new(),
            envelopes: BTreeMap::new(),
            macs: index::Macs::default(),
            names: index::Names::default(),
            keys: index::Keys::default(),
            missing: index::Missing::default(),
            classes: Classes::default(),
            seen: BTreeMap::new(),
            order_texts: Self::load_orders(&store, now).await?,
            crowd: crowd::Crowd::new(now),
            introductions: introductions::Introductions::default(),
            attestations: attestation::Questions::default(),
            positions: positions::Positions::default(),
            wrong: introductions::Wrong::default(),
            comparing: expected::Comparing::default(),
            withheld: releases::Withheld::default(),
        };
        let access = Access::load(&store).await?;
        let secrets = Arc::new(secrets::Secrets::load(&store, site.online("secrets.key")).await?);
        let certificates = certificates::Certificates::load(&store, &site).await?;
        let oidc = config.oidc.clone().map(Provider::new).transpose().map_err(AccessError::from)?;
        for (id, mut stored) in store.load().await? {
            furnish(&config, &access, &catalog, &mut stored.machine);
            let (mut machine, _) = stored.machine.event(Event::ServerStarted, config.limits, now);
            config.rule(&mut machine);
            inner.index(&machine);
            inner.machines.insert(id.clone(), machine);
            if let Some(envelope) = stored.envelope {
                inner.envelopes.insert(id, envelope);
            }
        }
        inner.tell_classes();
        let server_key = server_key(&site)?;
        let expected = expected::Expected::of(store.expected().await?);
        let logs = Arc::new(Logs::open(&site.path.join("state"), config.logs_total));
        let control = Arc::new(Self {
            inner: Mutex::new(inner),
            store,
            logs,
            server_key,
            site,
            config,
            director: RwLock::new(Arc::new(director)),
            catalog: RwLock::new(Arc::new(catalog)),
            told: broadcast::channel(1024).0,
            restoring: tokio::sync::Mutex::default(),
            changed: watch::channel(0).0,
            look_wanted: watch::channel(0).0,
            looked: watch::channel(0).0,
            hardware: hardware::HardwareLocks::default(),
            expected,
            access,
            secrets,
            certificates,
            oidc,
            held: AtomicUsize::new(0),
            counts: Counts::default(),
            started: now,
            stop,
        });
        control.tell_if_unnamed(&control.catalog());
        control.tell_passed_over(&control.catalog(), None);
        if let Err(error) = control.drop_old_list().await {
            tracing::error!(%error, "what an older kiln.toml said of machines was not dropped");
        }
        if let Err(error) = control.finish(control.end_all_certificates(now_ms())).await {
            tracing::error!(%error, "certificates that hold no more are not revoked yet; the server tries it again");
        }
        Ok(control)
    }

    /// Machines that nobody approved have nothing more of a list that does not name them: no name that another may be
    /// given, and no reason to wait that is gone.
    async fn drop_old_list(&self) -> Result<(), ControlError> {
        let pending = {
            let mut inner = self.lock();
            let (now, mut pending) = (now_ms(), Pending::default());
            let serial = |m: &Machine| m.facts.as_ref().map(|facts| facts.serial.clone());
            // By its position, where it is not heard yet; such a line gives no name before it approves.
            let placed = |m: &Machine| m.name.is_none() && !self.config.positions.is_empty();
            let listed = |m: &Machine| self.config.listed(&m.id, serial(m).as_deref()).is_some() || placed(m);
            let old = inner.machines.values().filter(|m| m.has_words_of_a_list() && !listed(m));
            let old: Vec<MachineId> = old.map(|m| m.id.clone()).collect();
            for id in old {
                self.step(&mut inner, &id, Event::NotListed, now, &mut pending)?;
            }
            pending
        };
        self.finish(pending).await
    }
}

/// What is not stored of a machine, and others know: which key the configuration names, whether its own was revoked, and the
/// site's floors, and what it can be given.
pub(super) fn furnish(config: &Config, access: &Access, catalog: &Catalog, machine: &mut Machine) {
    machine.floors = Arc::clone(&catalog.floors);
    machine.fit = Some(Arc::clone(&catalog.fit));
    let key = config.key_of_known(machine).cloned();
    machine.pin(key.as_ref());
    machine.key_revoked = machine.key.as_ref().is_some_and(|key| access.is_revoked(key));
}

/// Of the certificate that machines see.
fn server_key(site: &SiteDir) -> Result<KeyId, ControlError> {
    let pem = site.read_online("agent-server.pem").map_err(|e| CodeError::ServerKey(e.to_string()))?;
    let certificate =
        CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|e| CodeError::ServerKey(e.to_string()))?;
    let spki = certificate_spki(&certificate).map_err(|e| CodeError::ServerKey(e.to_string()))?;
    Ok(spki_key_id(spki).parse().expect("a SHA-256 in hex is a key id"))
}
