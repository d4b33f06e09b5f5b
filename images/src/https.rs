//! A certificate for the operator API and the web page, made by the site's own CA: for a lab, and for a first day.

use crate::site::SiteDir;
use crate::site_error::SiteError;
use jiff::{SignedDuration, Timestamp};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};

/// Browsers refuse certificates that hold for longer than 398 days.
const LIFE: SignedDuration = SignedDuration::from_hours(397 * 24);

/// What the CA was made with, as far as what it signs shows it.
pub(crate) fn ca_params(site_name: &str) -> Result<CertificateParams, rcgen::Error> {
    let mut ca = CertificateParams::new(Vec::new())?;
    ca.distinguished_name.push(DnType::CommonName, format!("Kiln agent API CA of {site_name}"));
    ca.not_before = rcgen::date_time_ymd(2020, 1, 1);
    ca.not_after = rcgen::date_time_ymd(9999, 12, 31);
    ca.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    Ok(ca)
}

/// Chain (DER, the server's first) and private key (PKCS#8 DER, P-256: browsers take no Ed25519) for these names and
/// addresses, from `online/agent-ca.key`.
pub fn https_certificate(
    site: &SiteDir,
    names: &[String],
    now: Timestamp,
) -> Result<(Vec<Vec<u8>>, Vec<u8>), SiteError> {
    let fail = |error: rcgen::Error| SiteError::Certificate { reason: error.to_string() };
    let reason = |reason: &str| SiteError::Certificate { reason: reason.to_owned() };
    let ca_key = KeyPair::from_pem(&site.read_online("agent-ca.key")?).map_err(fail)?;
    let ca_pem = site.read_online("agent-ca.pem")?;
    let ca_der = kiln_release::hex::pem_decode("CERTIFICATE", &ca_pem)
        .ok_or_else(|| reason("online/agent-ca.pem is no PEM certificate"))?;
    let issuer = Issuer::new(ca_params(&site.name).map_err(fail)?, ca_key);

    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(fail)?;
    let mut server = CertificateParams::new(names).map_err(fail)?;
    server.distinguished_name.push(DnType::CommonName, names.first().map_or("kiln", String::as_str));
    let date = |at: Timestamp| {
        let date = at.to_zoned_datetime(jiff::tz::TimeZone::UTC).date();
        let part = |n: i8| u8::try_from(n).expect("months and days are positive");
        rcgen::date_time_ymd(date.year().into(), part(date.month()), part(date.day()))
    };
    // A day of grace for clocks that go behind.
    server.not_before = date(now - SignedDuration::from_hours(24));
    server.not_after = date(now + LIFE);
    server.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    server.use_authority_key_identifier_extension = true;
    let certificate = server.signed_by(&key, &issuer).map_err(fail)?;
    Ok((vec![certificate.der().to_vec(), ca_der], key.serialize_der()))
}
