//! What a recipe declares of a running release: `[[health]]`, `[[hook]]`, `[[limit]]`, `[drift]`. Raw tables in, checked
//! declarations out; every refusal names its place.

use crate::error::RecipeError;
use crate::recipe::{Source, bytes_of};
use kiln_release::declared::{self, HOOK_EVENTS, is_unit};
use kiln_release::secrets::check_secrets;
use kiln_release::{
    HealthCheck, HealthKind, Hook, HookKind, OnTimeout, Threshold, UnitLimit, WantedCertificate, WantedSecret,
};
use serde::Deserialize;
use std::collections::BTreeMap;
use toml::Spanned;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RawHealth {
    kind: Spanned<String>,
    #[serde(default)]
    soak: Option<Spanned<u64>>,
    name: Option<String>,
    unit: Option<Spanned<String>>,
    url: Option<Spanned<String>>,
    address: Option<Spanned<String>>,
    program: Option<Spanned<String>>,
    path: Option<Spanned<String>>,
    #[serde(default)]
    arguments: Vec<String>,
    least: Option<Spanned<String>>,
    most: Option<Spanned<String>>,
    deadline: Option<u64>,
    fail_after: Option<u32>,
    pass_after: Option<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RawHook {
    on: Spanned<String>,
    name: Spanned<String>,
    program: Option<String>,
    url: Option<String>,
    #[serde(default)]
    arguments: Vec<String>,
    deadline: Option<u64>,
    on_timeout: Option<Spanned<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RawLimit {
    unit: Spanned<String>,
    memory: Option<Spanned<String>>,
    cpu: Option<Spanned<String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct RawDrift {
    listen: Vec<Spanned<String>>,
    mounts: Vec<Spanned<String>>,
}

/// Everything of it, checked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Declared {
    /// Health checks.
    pub health: Vec<HealthCheck>,
    /// Hooks by event.
    pub hooks: BTreeMap<String, Vec<Hook>>,
    /// Limits of units.
    pub limits: Vec<UnitLimit>,
    /// Secrets.
    pub secrets: Vec<WantedSecret>,
    /// A certificate for the machine.
    pub certificate: Option<WantedCertificate>,
    /// Ports that may be listened on.
    pub listen: Vec<String>,
    /// Further places that may be mounted.
    pub mounts: Vec<String>,
}

/// Failures in a row after which a check over the network, or by a program, is believed: one lost packet is no verdict.
const USUAL_FAILURES: u32 = 3;
/// Seconds that a hook has, unless it says.
const USUAL_DRAIN: u64 = 300;

impl Declared {
    pub(crate) fn health(&mut self, raw: RawHealth, source: &Source<'_>) -> Result<(), RecipeError> {
        let span = raw.kind.span();
        let kind = HealthKind::ALL.into_iter().find(|kind| kind.as_str() == raw.kind.get_ref());
        let kind = kind.ok_or_else(|| {
            let all = HealthKind::ALL.map(HealthKind::as_str).join(", ");
            source.invalid(span.clone(), format!("a health check's kind is: {all}"))
        })?;
        let soak = raw.soak.as_ref().map_or(0, |soak| *soak.get_ref());
        if let Some(soak) = raw.soak.filter(|soak| *soak.get_ref() > 3600) {
            return Err(source.invalid(soak.span(), "soak is in seconds, at most 3600"));
        }
        let mut target = None;
        for (key, of, value) in [
            ("unit", HealthKind::Unit, raw.unit),
            ("url", HealthKind::Http, raw.url),
            ("address", HealthKind::Tcp, raw.address),
            ("program", HealthKind::Command, raw.program),
            ("path", HealthKind::Disk, raw.path),
        ] {
            match value {
                Some(value) if of == kind => target = Some(value),
                Some(value) => {
                    return Err(source.invalid(value.span(), format!("`{key}` is for kind = {:?}", of.as_str())));
                }
                None if of == kind => {
                    return Err(source.invalid(span, format!("kind = {:?} needs `{key}`", kind.as_str())));
                }
                None => {}
            }
        }
        let limit = match (kind, raw.least, raw.most) {
            (HealthKind::Memory | HealthKind::Disk, least, None) => least,
            (HealthKind::Time, None, most) => most,
            (_, None, None) => None,
            (_, Some(value), _) | (_, None, Some(value)) => {
                let words = "`least` is for kinds memory and disk, `most` for time";
                return Err(source.invalid(value.span(), words));
            }
        };
        let limit = match limit {
            None => None,
            Some(text) => {
                Some(Threshold::try_from(text.get_ref().clone()).map_err(|e| source.invalid(text.span(), e))?)
            }
        };
        let place = target.as_ref().map_or(span, Spanned::span);
        let usual = match kind {
            HealthKind::Http | HealthKind::Tcp | HealthKind::Command => USUAL_FAILURES,
            HealthKind::Systemd | HealthKind::Unit | HealthKind::Memory | HealthKind::Disk | HealthKind::Time => 1,
        };
        let plain = HealthCheck::of(kind, soak);
        self.health.push(HealthCheck {
            name: raw.name.unwrap_or_default(),
            target: target.map(Spanned::into_inner).unwrap_or_default(),
            arguments: raw.arguments,
            limit,
            deadline: raw.deadline.unwrap_or(plain.deadline),
            fail_after: raw.fail_after.unwrap_or(usual),
            pass_after: raw.pass_after.unwrap_or(plain.pass_after),
            ..plain
        });
        declared::check_all(&self.health).map_err(|(got, reason)| source.invalid(place, format!("{got}: {reason}")))
    }

    pub(crate) fn hook(&mut self, raw: RawHook, source: &Source<'_>) -> Result<(), RecipeError> {
        let event = raw.on.get_ref().clone();
        if !HOOK_EVENTS.contains(&event.as_str()) {
            let words = format!("a hook runs on: {}", HOOK_EVENTS.join(", "));
            return Err(source.invalid(raw.on.span(), words));
        }
        let (kind, target) = match (raw.program, raw.url) {
            (Some(program), None) => (HookKind::Command, program),
            (None, Some(url)) => (HookKind::Http, url),
            (Some(_), Some(_)) | (None, None) => {
                return Err(source.invalid(raw.name.span(), "a hook has either `program` or `url`"));
            }
        };
        let on_timeout = match raw.on_timeout {
            None => OnTimeout::default(),
            Some(word) => match word.get_ref().as_str() {
                "go" => OnTimeout::Go,
                "stay" => OnTimeout::Stay,
                _ => return Err(source.invalid(word.span(), "on_timeout is: go, stay")),
            },
        };
        let (place, name) = (raw.name.span(), raw.name.into_inner());
        let hooks = self.hooks.entry(event.clone()).or_default();
        hooks.push(Hook {
            name,
            kind,
            target,
            arguments: raw.arguments,
            deadline: raw.deadline.unwrap_or(USUAL_DRAIN),
            on_timeout,
        });
        let checked = declared::check_hooks(&event, hooks);
        checked.map_err(|(got, reason)| source.invalid(place, format!("{got}: {reason}")))
    }

    pub(crate) fn limit(&mut self, raw: RawLimit, source: &Source<'_>) -> Result<(), RecipeError> {
        let place = raw.unit.span();
        let limited = |unit: &str| is_unit(unit) && matches!(kind_of(unit), "service" | "slice");
        let unit = source.check(raw.unit, limited, "a systemd service's or slice's file name")?;
        let memory =
            match raw.memory {
                None => None,
                Some(text) => Some(bytes_of(text.get_ref()).filter(|bytes| *bytes >= 1 << 20).ok_or_else(|| {
                    source.invalid(text.span(), "memory is a number with K, M or G, at least \"1M\"")
                })?),
            };
        let cpu = match raw.cpu {
            None => None,
            Some(text) => {
                let percent = text.get_ref().strip_suffix('%').and_then(|number| number.parse().ok());
                Some(percent.filter(|percent| (1..=100_000).contains(percent)).ok_or_else(|| {
                    source
                        .invalid(text.span(), "cpu is a share of one processor, like \"50%\"; \"200%\" is two of them")
                })?)
            }
        };
        if memory.is_none() && cpu.is_none() {
            return Err(source.invalid(place, "a limit says `memory`, `cpu` or both"));
        }
        if self.limits.iter().any(|other| other.unit == unit) || self.limits.len() == 64 {
            return Err(source.invalid(place, format!("{unit} is limited twice, or is one of more than 64")));
        }
        self.limits.push(UnitLimit { unit, memory, cpu });
        Ok(())
    }

    pub(crate) fn secret(&mut self, secret: Spanned<WantedSecret>, source: &Source<'_>) -> Result<(), RecipeError> {
        let place = secret.span();
        self.secrets.push(secret.into_inner());
        check_secrets(&self.secrets)
            .map_err(|(got, reason)| source.invalid(place.clone(), format!("{got}: {reason}")))?;
        self.files_apart().map_err(|reason| source.invalid(place, reason))
    }

    /// Of a recipe that extends another it is the last that counts.
    pub(crate) fn certificate(
        &mut self,
        certificate: Spanned<WantedCertificate>,
        source: &Source<'_>,
    ) -> Result<(), RecipeError> {
        let place = certificate.span();
        self.certificate = Some(certificate.into_inner());
        self.files_apart().map_err(|reason| source.invalid(place, reason))
    }

    fn files_apart(&self) -> Result<(), &'static str> {
        self.certificate.as_ref().map_or(Ok(()), |certificate| certificate.check(&self.secrets))
    }

    pub(crate) fn drift(&mut self, raw: RawDrift, source: &Source<'_>) -> Result<(), RecipeError> {
        let port = |text: &str| {
            let number = text.strip_prefix("tcp/").or_else(|| text.strip_prefix("udp/"));
            number.and_then(|number| number.parse::<u16>().ok()).is_some_and(|port| port > 0)
        };
        self.listen.extend(source.check_all(raw.listen, port, "a port as \"tcp/443\" or \"udp/53\"")?);
        let mounts = source.check_all(raw.mounts, crate::recipe::is_root_path, "an absolute path without . or ..")?;
        self.mounts.extend(mounts);
        Ok(())
    }
}

/// The drop-in of a limit: systemd.resource-control(5). No MemoryHigh=: without swap, what only grows is slowed down there until it
/// stands still, and nothing ends or tells it; before MemoryMax= kills anything the kernel reclaims what it can as well.
pub(crate) fn drop_in(limit: &UnitLimit) -> (String, String) {
    let section = if kind_of(&limit.unit) == "slice" { "Slice" } else { "Service" };
    let memory = limit.memory.map(|most| format!("MemoryMax={most}\nMemorySwapMax=0\n"));
    let cpu = limit.cpu.map(|cpu| format!("CPUQuota={cpu}%\n"));
    let lines: String = memory.into_iter().chain(cpu).collect();
    (format!("/etc/systemd/system/{}.d/50-kiln-limit.conf", limit.unit), format!("[{section}]\n{lines}"))
}

/// `service` of `web.service`.
fn kind_of(unit: &str) -> &str {
    unit.rsplit('.').next().unwrap_or("")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_a_drop_in_of_its_unit() {
        let limit = |unit: &str, memory, cpu| drop_in(&UnitLimit { unit: unit.into(), memory, cpu });
        let (path, text) = limit("web.service", Some(1000), Some(150));
        assert_eq!(path, "/etc/systemd/system/web.service.d/50-kiln-limit.conf");
        assert_eq!(text, "[Service]\nMemoryMax=1000\nMemorySwapMax=0\nCPUQuota=150%\n");
        let (path, text) = limit("apps.slice", None, Some(10));
        assert_eq!(path, "/etc/systemd/system/apps.slice.d/50-kiln-limit.conf");
        assert_eq!(text, "[Slice]\nCPUQuota=10%\n");
    }
}
