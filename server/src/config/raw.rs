//! `kiln.toml` as it is written, and how it becomes a checked [`Config`].

use super::access::{RawAccess, RawHttps, RawOidc};
use super::{Boot, Config, Dhcp, DhcpMode, FullDhcp, Listed, Role, is_name};
use crate::error::ConfigError;
use crate::http;
use crate::net::{Shared, tftp};
use kiln_fleet::{DriftPolicy, Limits, SecretsPolicy, serial_key};
use kiln_netboot::UefiProgram;
use kiln_protocol::{BootFirst, ExecChoice, ImageName, KeyId, Least, MachineId, RoleSettings};
use kiln_release::Threshold;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Raw {
    http: RawListen,
    agent_api: RawListen,
    dhcp: RawDhcp,
    tftp: RawTftp,
    logs: RawLogs,
    certificates: RawCertificates,
    console: RawConsole,
    boot: RawBoot,
    fleet: RawFleet,
    role: Vec<RawRole>,
    machine: Vec<RawMachine>,
    access: RawAccess,
    https: Option<RawHttps>,
    oidc: Option<RawOidc>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawListen {
    listen: Option<SocketAddr>,
    max_connections: Option<usize>,
    max_per_address: Option<usize>,
    shared: Vec<String>,
    ipv6_client: Option<u8>,
    min_rate: Option<u32>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawTftp {
    listen: Option<SocketAddr>,
    max_transfers: Option<usize>,
    max_per_address: Option<usize>,
    shared: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawLogs {
    total_mib: Option<u64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawCertificates {
    life: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawConsole {
    page_url: Option<String>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RawMode {
    #[default]
    Proxy,
    Full,
    Off,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawDhcp {
    mode: RawMode,
    interface: Option<String>,
    relays: Vec<Ipv4Addr>,
    full: Option<RawFull>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFull {
    range: String,
    router: Option<Ipv4Addr>,
    #[serde(default)]
    dns: Vec<Ipv4Addr>,
    lease_s: Option<u32>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawBoot {
    address: Option<Ipv4Addr>,
    undionly: Option<PathBuf>,
    snponly: Option<PathBuf>,
    default_image: Option<String>,
    http_boot: Option<bool>,
    uefi: RawUefi,
    shim: Option<PathBuf>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RawUefi {
    #[default]
    Uki,
    Ipxe,
    Shim,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawFleet {
    max_unavailable: Option<usize>,
    trial_attempts: Option<u32>,
    firmware_patience: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRole {
    name: String,
    image: String,
    max_age: Option<String>,
    #[serde(default)]
    attested: bool,
    #[serde(default)]
    secrets: SecretsPolicy,
    #[serde(default)]
    boot_first: BootFirst,
    #[serde(default)]
    exec: ExecChoice,
    #[serde(default)]
    acceptance: RawAcceptance,
    acceptance_least: Option<Least>,
    #[serde(default)]
    drift: DriftPolicy,
    #[serde(default)]
    thresholds: BTreeMap<String, String>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RawAcceptance {
    #[default]
    None,
    Required,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawMachine {
    id: Option<String>,
    serial: Option<String>,
    position: Option<String>,
    name: String,
    role: String,
    key: Option<String>,
}

/// Most thresholds of a role.
const MAX_THRESHOLDS: usize = 32;

/// Numbers only: which of them the release declares is checked when it is assigned, and by the agent.
fn thresholds(role: &RawRole) -> Result<BTreeMap<String, Threshold>, ConfigError> {
    if role.thresholds.len() > MAX_THRESHOLDS {
        return Err(bad(&format!("role {}: thresholds", role.name), format!("at most {MAX_THRESHOLDS}")));
    }
    let read = |(name, text): (&String, &String)| {
        let key = || format!("role {}: thresholds.{name}", role.name);
        Threshold::try_from(text.clone()).map(|t| (name.clone(), t)).map_err(|e| bad(&key(), e))
    };
    role.thresholds.iter().map(read).collect()
}

pub(super) fn bad(key: &str, reason: impl std::fmt::Display) -> ConfigError {
    ConfigError::Value { key: key.to_owned(), reason: reason.to_string() }
}

const NAME: &str = "1 to 63 letters, digits, `-`, `.` or `_`, beginning with a letter or digit";

/// Whether a machine can be known by this position: a listed relay says it, and the machine has no other key.
fn position(text: &str, listed: &Listed, relays: &BTreeSet<Ipv4Addr>, mode: &DhcpMode) -> Result<(), String> {
    let form = "expected \"RELAY REMOTE CIRCUIT\" as the log says it, the relay by its address";
    let words: Vec<&str> = text.split(' ').collect();
    let [relay, remote, circuit] = words[..] else { return Err(format!("{text:?}: {form}")) };
    let is_part = |part: &str| (1..=130).contains(&part.len()) && part.bytes().all(|b| b.is_ascii_graphic());
    let relay: Ipv4Addr = relay.parse().map_err(|_| format!("{text:?}: {form}"))?;
    if !is_part(remote) || !is_part(circuit) {
        return Err(format!("{text:?}: {form}"));
    }
    if !relays.contains(&relay) {
        return Err(format!("{text:?}: {relay} is none of [dhcp] relays, so its word counts nothing"));
    }
    if listed.key.is_some() {
        return Err(format!("{}: a machine that is known by its position makes a key at each boot", listed.name));
    }
    match mode {
        DhcpMode::Proxy | DhcpMode::Full(_) => Ok(()),
        DhcpMode::Off => Err("with [dhcp] mode = \"off\" no relay is heard".to_owned()),
    }
}

/// Milliseconds of a time as a person writes it.
fn patience(text: &str) -> Result<u64, String> {
    let time: jiff::SignedDuration =
        text.parse().map_err(|_| format!("{text:?}: expected a time with its unit, as \"60s\" or \"2m\""))?;
    // Less is a busy network, more would outlast a boot's own deadline.
    u64::try_from(time.as_millis())
        .ok()
        .filter(|ms| (5_000..=300_000).contains(ms))
        .ok_or_else(|| format!("{text:?}: from 5s to 5m"))
}

/// The same of a machine's age; a day is 24 hours.
fn age(text: &str) -> Result<u64, String> {
    let hours = |n: u64| n * 3_600_000;
    let time = super::span_ms(text);
    let ms = time.ok_or_else(|| format!("{text:?}: expected a time in days or hours, as \"30d\" or \"12h\""))?;
    let within = (hours(1)..=hours(3650 * 24)).contains(&ms);
    if within { Ok(ms) } else { Err(format!("{text:?}: from 1h to 3650d")) }
}

/// The same of a certificate's life.
fn life(text: &str) -> Result<u64, String> {
    let hours = |n: u64| n * 3_600_000;
    let time = super::span_ms(text);
    let ms = time.ok_or_else(|| format!("{text:?}: expected a time in hours or days, as \"24h\" or \"7d\""))?;
    let within = (hours(1)..=hours(30 * 24)).contains(&ms);
    if within { Ok(ms) } else { Err(format!("{text:?}: from 1h to 30d")) }
}

impl RawListen {
    fn limits(&self, table: &str) -> Result<http::Limits, ConfigError> {
        let usual = http::Limits::default();
        let max_connections = self.max_connections.unwrap_or(usual.max_connections);
        let max_per_address = self.max_per_address.unwrap_or(usual.max_per_address.min(max_connections));
        shares(table, ("max_connections", max_connections), max_per_address)?;
        let ipv6_client = self.ipv6_client.unwrap_or(usual.ipv6_client);
        if !(32..=128).contains(&ipv6_client) {
            let reason = format!("{ipv6_client}: a prefix from 32 to 128, usually 64");
            return Err(bad(&format!("{table}.ipv6_client"), reason));
        }
        Ok(http::Limits {
            max_connections,
            max_per_address,
            shared: Shared::parse(&self.shared).map_err(|e| bad(&format!("{table}.shared"), e))?,
            ipv6_client,
            min_rate: self.min_rate.unwrap_or(usual.min_rate),
            ..usual
        })
    }
}

/// A number in all, and how many of them one address may have.
fn shares(table: &str, (key, all): (&str, usize), each: usize) -> Result<(), ConfigError> {
    if all == 0 || each == 0 {
        let key = if all == 0 { key } else { "max_per_address" };
        return Err(bad(&format!("{table}.{key}"), "with 0 nobody could ever be served"));
    }
    if each > all {
        let reason = format!("{each} for one address are more than the {all} of {key} for all");
        return Err(bad(&format!("{table}.max_per_address"), reason));
    }
    Ok(())
}

/// The pre-loaded list, by what says which machine is meant.
#[derive(Default)]
struct Preloaded {
    machines: BTreeMap<MachineId, Listed>,
    serials: BTreeMap<String, Listed>,
    positions: BTreeMap<String, Listed>,
}

fn preloaded(
    list: Vec<RawMachine>,
    roles: &BTreeMap<String, Role>,
    relays: &BTreeSet<Ipv4Addr>,
    mode: &DhcpMode,
) -> Result<Preloaded, ConfigError> {
    let Preloaded { mut machines, mut serials, mut positions } = Preloaded::default();
    for RawMachine { id, serial, position: place, name, role, key } in list {
        if !is_name(&name) {
            return Err(bad("machine.name", format!("{name:?}: {NAME}")));
        }
        if !roles.contains_key(&role) {
            let known = roles.keys().cloned().collect::<Vec<_>>().join(", ");
            return Err(bad("machine.role", format!("{role:?} is no [[role]]; known are: {known}")));
        }
        let others = || machines.values().chain(serials.values()).chain(positions.values());
        if others().any(|m| m.name == name) {
            return Err(bad("machine.name", format!("{name:?} is there twice")));
        }
        let key = match key {
            Some(text) => Some(text.to_ascii_lowercase().parse::<KeyId>().map_err(|e| bad("machine.key", e))?),
            None => None,
        };
        if let Some(other) = others().find(|m| key.is_some() && m.key == key) {
            let reason = format!("{} and {name} have the same: a key is one machine's", other.name);
            return Err(bad("machine.key", reason));
        }
        match (id, serial, place) {
            (Some(text), None, None) => {
                let id = text.to_ascii_lowercase().parse::<MachineId>().map_err(|e| bad("machine.id", e))?;
                if machines.insert(id, Listed { name, role, key, serial: None }).is_some() {
                    return Err(bad("machine.id", format!("{text:?} is there twice")));
                }
            }
            (None, Some(serial), None) => {
                let none = || bad("machine.serial", format!("{serial:?} is what boards have that were given none"));
                let compared = serial_key(&serial).ok_or_else(none)?;
                let listed = Listed { name, role, key, serial: Some(serial.clone()) };
                if serials.insert(compared, listed).is_some() {
                    return Err(bad("machine.serial", format!("{serial:?} is there twice")));
                }
            }
            (None, None, Some(place)) => {
                let listed = Listed { name, role, key, serial: None };
                position(&place, &listed, relays, mode).map_err(|e| bad("machine.position", e))?;
                if positions.insert(place.clone(), listed).is_some() {
                    return Err(bad("machine.position", format!("{place:?} is there twice")));
                }
            }
            (Some(_), Some(_), _) | (Some(_), _, Some(_)) | (_, Some(_), Some(_)) | (None, None, None) => {
                return Err(bad("machine", format!("{name}: expected `id`, `serial` or `position`, one of them")));
            }
        }
    }
    Ok(Preloaded { machines, serials, positions })
}

impl TryFrom<RawFull> for FullDhcp {
    type Error = ConfigError;
    fn try_from(raw: RawFull) -> Result<Self, ConfigError> {
        let range = |reason: &str| bad("dhcp.full.range", format!("{:?}: {reason}", raw.range));
        let form = "expected FIRST-LAST, as 10.0.0.100-10.0.0.200";
        let (first, last) = raw.range.split_once('-').ok_or_else(|| range(form))?;
        let first: Ipv4Addr = first.trim().parse().map_err(|_| range(form))?;
        let last: Ipv4Addr = last.trim().parse().map_err(|_| range(form))?;
        if last < first {
            return Err(range("the last address is below the first"));
        }
        let lease_s = raw.lease_s.unwrap_or(3600);
        if lease_s < 60 {
            return Err(bad("dhcp.full.lease_s", "leases last 60 s at least"));
        }
        Ok(Self { first, last, router: raw.router, dns: raw.dns, lease_s })
    }
}

impl TryFrom<Raw> for Config {
    type Error = ConfigError;
    fn try_from(raw: Raw) -> Result<Self, ConfigError> {
        let any = |port| SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port);
        let mode = match (raw.dhcp.mode, raw.dhcp.full) {
            (RawMode::Proxy, None) => DhcpMode::Proxy,
            (RawMode::Off, None) => DhcpMode::Off,
            (RawMode::Full, Some(full)) => DhcpMode::Full(full.try_into()?),
            (RawMode::Full, None) => {
                return Err(bad("dhcp.mode", "\"full\" needs a table [dhcp.full] with the range to give out"));
            }
            (RawMode::Proxy | RawMode::Off, Some(_)) => {
                return Err(bad("dhcp.full", "only with [dhcp] mode = \"full\""));
            }
        };
        let default_image: ImageName =
            raw.boot.default_image.as_deref().unwrap_or("minimal").parse().map_err(|e| bad("boot.default_image", e))?;
        let defaults = Limits::default();
        let limits = Limits {
            max_unavailable: raw.fleet.max_unavailable.unwrap_or(defaults.max_unavailable),
            trial_attempts: raw.fleet.trial_attempts.unwrap_or(defaults.trial_attempts),
            firmware_patience: match raw.fleet.firmware_patience {
                Some(text) => patience(&text).map_err(|e| bad("fleet.firmware_patience", e))?,
                None => defaults.firmware_patience,
            },
        };
        if limits.max_unavailable == 0 {
            return Err(bad("fleet.max_unavailable", "with 0 no machine could ever reimage itself"));
        }
        if limits.trial_attempts == 0 {
            return Err(bad("fleet.trial_attempts", "with 0 no new release could ever boot"));
        }
        let (mut roles, mut max_ages) = (BTreeMap::new(), BTreeMap::new());
        for role in raw.role {
            if !is_name(&role.name) {
                return Err(bad("role.name", format!("{:?}: {NAME}", role.name)));
            }
            let image = role.image.parse().map_err(|e| bad(&format!("role {}: image", role.name), e))?;
            if let Some(text) = &role.max_age {
                let age = age(text).map_err(|e| bad(&format!("role {}: max_age", role.name), e))?;
                max_ages.insert(role.name.clone(), age);
            }
            let thresholds = thresholds(&role)?;
            let signed = thresholds.iter().map(|(name, threshold)| (name.clone(), threshold.to_string())).collect();
            let settings = RoleSettings { boot_first: role.boot_first, exec: role.exec, thresholds: signed };
            let acceptance = match (role.acceptance, role.acceptance_least) {
                (RawAcceptance::Required, least) => Some(least.unwrap_or_default()),
                (RawAcceptance::None, None) => None,
                (RawAcceptance::None, Some(_)) => {
                    let key = format!("role {}: acceptance_least", role.name);
                    return Err(bad(&key, "only with acceptance = \"required\""));
                }
            };
            if roles
                .insert(
                    role.name.clone(),
                    Role {
                        image,
                        thresholds,
                        drift: role.drift,
                        settings,
                        acceptance,
                        attested: role.attested,
                        secrets: role.secrets,
                    },
                )
                .is_some()
            {
                return Err(bad("role.name", format!("{:?} is there twice", role.name)));
            }
        }
        if roles.is_empty() {
            roles.insert("default".to_owned(), Role::of(default_image.clone()));
        }
        let relays: BTreeSet<Ipv4Addr> = raw.dhcp.relays.into_iter().collect();
        let Preloaded { machines, serials, positions } = preloaded(raw.machine, &roles, &relays, &mode)?;
        let usual = tftp::Settings::default();
        let tftp_transfers = raw.tftp.max_transfers.unwrap_or(usual.max_transfers);
        let tftp_per_address = raw.tftp.max_per_address.unwrap_or(usual.max_per_address.min(tftp_transfers));
        shares("tftp", ("max_transfers", tftp_transfers), tftp_per_address)?;
        let total_mib = raw.logs.total_mib.unwrap_or(crate::logs::TOTAL >> 20);
        if !(64..=1 << 20).contains(&total_mib) {
            return Err(bad("logs.total_mib", format!("{total_mib}: from 64 to 1048576")));
        }
        let certificate_life = raw.certificates.life.as_deref().map_or(Ok(24 * 3_600_000), life);
        let certificate_life = certificate_life.map_err(|e| bad("certificates.life", e))?;
        let page_url = match raw.console.page_url {
            Some(url) => {
                let plain = url.bytes().all(|b| b.is_ascii_graphic()) && url.len() <= 60;
                if !plain || !(url.starts_with("http://") || url.starts_with("https://")) {
                    let form = "expected http://HOST or https://HOST, at most 60 characters: a QR code shows it";
                    return Err(bad("console.page_url", format!("{url:?}: {form}")));
                }
                Some(url.trim_end_matches('/').to_owned())
            }
            None => None,
        };
        Ok(Self {
            page_url,
            logs_total: total_mib << 20,
            certificate_life,
            http_limits: raw.http.limits("http")?,
            agent_limits: raw.agent_api.limits("agent_api")?,
            tftp_transfers,
            tftp_per_address,
            tftp_shared: Shared::parse(&raw.tftp.shared).map_err(|e| bad("tftp.shared", e))?,
            http: raw.http.listen.unwrap_or_else(|| any(8080)),
            agent_api: raw.agent_api.listen.unwrap_or_else(|| any(8443)),
            dhcp: Dhcp { mode, interface: raw.dhcp.interface, relays },
            tftp: raw.tftp.listen.unwrap_or_else(|| any(69)),
            boot: Boot {
                address: raw.boot.address,
                undionly: raw.boot.undionly.unwrap_or_else(|| "/usr/lib/ipxe/undionly.kpxe".into()),
                snponly: raw.boot.snponly.unwrap_or_else(|| "/usr/lib/ipxe/snponly.efi".into()),
                default_image,
                http_boot: raw.boot.http_boot.unwrap_or(true),
                uefi: match raw.boot.uefi {
                    RawUefi::Uki => UefiProgram::Uki,
                    RawUefi::Ipxe => UefiProgram::Ipxe,
                    RawUefi::Shim => UefiProgram::Shim,
                },
                shim: raw.boot.shim.unwrap_or_else(|| "/usr/lib/shim/shimx64.efi.signed".into()),
            },
            limits,
            roles,
            max_ages,
            machines,
            serials,
            positions,
            access: raw.access.try_into()?,
            https: raw.https.map(TryInto::try_into).transpose()?,
            oidc: raw.oidc.map(TryInto::try_into).transpose()?,
        })
    }
}
