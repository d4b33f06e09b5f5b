//! The key of the agent API's server: made with the site under its CA, and replaced after a boot server was stolen. Which keys
//! count, `site.json` says, so that one more certificate of the CA's is of no use to a thief who has its key.

use crate::files::{PUBLIC, SECRET, sync_folder, write_atomic};
use crate::https::ca_params;
use crate::keys::{Rotated, promote_all};
use crate::repository::newest_state;
use crate::signing::{Draft, finish, site_document};
use crate::site::SiteDir;
use crate::site_error::SiteError;
use jiff::Timestamp;
use kiln_release::certificate::{certificate_spki, spki_key_id};
use kiln_release::tuf::Outcome;
use kiln_release::{AGENT_API_NAME, hex};
use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose, Issuer, KeyPair, KeyUsagePurpose};
use std::fs;
use std::path::Path;

/// What `kiln trust rotate` calls it.
pub const AGENT_API: &str = "agent-api";
const KEY: &str = "agent-server.key";
const CERTIFICATE: &str = "agent-server.pem";

/// A server's key and certificate, PEM. The dates are wide open: a machine whose clock is wrong must be able to connect, and
/// which key counts is said by signed metadata, which expires.
pub(crate) fn new_server(issuer: &Issuer<'_, KeyPair>) -> Result<(String, String), SiteError> {
    let fail = |error: rcgen::Error| SiteError::Certificate { reason: error.to_string() };
    let key = KeyPair::generate_for(&rcgen::PKCS_ED25519).map_err(fail)?;
    let mut server = CertificateParams::new(vec![AGENT_API_NAME.to_owned()]).map_err(fail)?;
    server.distinguished_name.push(DnType::CommonName, AGENT_API_NAME);
    server.not_before = rcgen::date_time_ymd(2020, 1, 1);
    server.not_after = rcgen::date_time_ymd(9999, 12, 31);
    server.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    server.use_authority_key_identifier_extension = true;
    let certificate = server.signed_by(&key, issuer).map_err(fail)?;
    Ok((key.serialize_pem(), certificate.pem()))
}

/// Gives the agent API another key under its CA. Once the change is in force, machines hang up on any other.
pub fn rotate_agent_api(dir: &Path, now: Timestamp) -> Result<Rotated, SiteError> {
    let fail = |error: rcgen::Error| SiteError::Certificate { reason: error.to_string() };
    let site = SiteDir::open(dir)?;
    let _lock = site.lock_offline()?;
    let state = newest_state(&site, now)?;
    promote_all(&site, &state)?;
    let mut draft = Draft::on(&site, &state, now, "another key for the agent API".to_owned())?;
    let ca_key = KeyPair::from_pem(&site.read_online("agent-ca.key")?).map_err(fail)?;
    let (key, certificate) = new_server(&Issuer::new(ca_params(&site.name).map_err(fail)?, ca_key))?;
    let id = key_id(&certificate)?;
    write_atomic(&site.online(&next(KEY)), key.as_bytes(), SECRET)?;
    write_atomic(&site.online(&next(CERTIFICATE)), certificate.as_bytes(), PUBLIC)?;
    let mut document = draft.site_document()?;
    document.agent_api.keys = vec![id.clone()];
    draft.put_site(&document)?;
    let changed = finish(&site, draft, now)?;
    promote_all(&site, &newest_state(&site, now)?)?;
    Ok(Rotated { changed, keys: vec![id] })
}

fn next(file: &str) -> String {
    format!("{file}.next")
}

/// SHA-256 of a certificate's SPKI.
fn key_id(pem: &str) -> Result<String, SiteError> {
    let reason = |reason: String| SiteError::Certificate { reason };
    let der = hex::pem_decode("CERTIFICATE", pem).ok_or_else(|| reason("no PEM certificate".to_owned()))?;
    let spki = certificate_spki(&der).map_err(|error| reason(error.to_string()))?;
    Ok(spki_key_id(spki))
}

/// A new key that the site names takes the old one's place.
pub(crate) fn promote(site: &SiteDir, state: &Outcome) -> Result<(), SiteError> {
    let waiting = site.online(&next(CERTIFICATE));
    if !waiting.exists() {
        return Ok(());
    }
    let id = key_id(&site.read_online(&next(CERTIFICATE))?)?;
    if !site_document(site, state)?.agent_api.keys.contains(&id) {
        return Ok(());
    }
    // The certificate last: cut in between, this is done again.
    for file in [KEY, CERTIFICATE] {
        let (from, to) = (site.online(&next(file)), site.online(file));
        if from.exists() {
            fs::rename(&from, &to).map_err(SiteError::io("rename into place", &to))?;
        }
    }
    sync_folder(&waiting)
}
