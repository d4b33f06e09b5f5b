//! `kiln.toml`: raw tables as written, checked into [`Config`]. Everything has a default; no file is needed.
//!
//! Unknown keys are refused with line and column, so that a misspelt limit is not a missing one.

mod access;
mod raw;

pub use access::{Access, Https, Oidc};

use crate::error::ConfigError;
use crate::http;
use crate::net::Shared;
use kiln_fleet::{DriftPolicy, Limits, SecretsPolicy};
use kiln_netboot::UefiProgram;
use kiln_protocol::{ImageName, KeyId, Least, MachineId, RoleSettings, printable};
use kiln_release::Threshold;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

/// The checked configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Where artifacts, the operator API and the web page are served unencrypted.
    pub http: SocketAddr,
    /// What its clients may take.
    pub http_limits: http::Limits,
    /// Where agents report.
    pub agent_api: SocketAddr,
    /// What its clients may take.
    pub agent_limits: http::Limits,
    /// DHCP.
    pub dhcp: Dhcp,
    /// Where TFTP is served.
    pub tftp: SocketAddr,
    /// Downloads by TFTP at once.
    pub tftp_transfers: usize,
    /// Downloads by TFTP at once of one address.
    pub tftp_per_address: usize,
    /// Addresses that the limit for one does not bind.
    pub tftp_shared: Shared,
    /// Where people reach the web page, without a slash at its end; none: where the machine reached the agent API.
    pub page_url: Option<String>,
    /// Bytes that the machines' logs may take.
    pub logs_total: u64,
    /// How long a machine's certificate holds, in milliseconds.
    pub certificate_life: u64,
    /// How machines boot.
    pub boot: Boot,
    /// The fleet's limits.
    pub limits: Limits,
    /// Roles by name.
    pub roles: BTreeMap<String, Role>,
    /// The age at which a role's machines are put up anew at the latest, in milliseconds.
    pub max_ages: BTreeMap<String, u64>,
    /// The pre-loaded list, by UUID.
    pub machines: BTreeMap<MachineId, Listed>,
    /// The same by serial number, as [`kiln_fleet::serial_key`] makes it.
    pub serials: BTreeMap<String, Listed>,
    /// Machines that are listed by where they are: [`kiln_netboot::Client::position`].
    pub positions: BTreeMap<String, Listed>,
    /// Who may call.
    pub access: Access,
    /// The operator API and the web page over TLS, if they are served so.
    pub https: Option<Https>,
    /// The identity provider, if there is one.
    pub oidc: Option<Oidc>,
}

/// DHCP settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dhcp {
    /// What is answered.
    pub mode: DhcpMode,
    /// Only on this interface; none: on every one with an address.
    pub interface: Option<String>,
    /// Relays whose option 82 counts, by their giaddr.
    pub relays: BTreeSet<Ipv4Addr>,
}

/// What the DHCP side answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DhcpMode {
    /// Boot programs, beside the site's own server.
    Proxy,
    /// Addresses too.
    Full(FullDhcp),
    /// Nothing.
    Off,
}

/// A full DHCP server's settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FullDhcp {
    /// First address given out.
    pub first: Ipv4Addr,
    /// Last one.
    pub last: Ipv4Addr,
    /// Default gateway.
    pub router: Option<Ipv4Addr>,
    /// Name servers.
    pub dns: Vec<Ipv4Addr>,
    /// How long a lease lasts, in seconds.
    pub lease_s: u32,
}

/// How machines boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Boot {
    /// This server's address in boot programs' URLs; none: the one a request came in on.
    pub address: Option<Ipv4Addr>,
    /// iPXE for BIOS machines.
    pub undionly: PathBuf,
    /// iPXE for UEFI machines.
    pub snponly: PathBuf,
    /// What UEFI PXE firmware is given.
    pub uefi: UefiProgram,
    /// shim for UEFI machines.
    pub shim: PathBuf,
    /// What an unknown machine is given, so that its agent can introduce itself.
    pub default_image: ImageName,
    /// Answer UEFI HTTP Boot.
    pub http_boot: bool,
}

/// What a role says: data, never code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Role {
    /// Its image.
    pub image: ImageName,
    /// Numbers for the health checks that the release declares, by the check's name.
    pub thresholds: BTreeMap<String, Threshold>,
    /// What becomes of its machines that differ from their release.
    pub drift: DriftPolicy,
    /// What is signed with its machines' assignments.
    pub settings: RoleSettings,
    /// New machines are held until they passed an acceptance run with these numbers; none: they are not.
    pub acceptance: Option<Least>,
    /// It gives releases only to boots that a TPM attests.
    pub attested: bool,
    /// What it demands of a boot before it gives secrets.
    pub secrets: SecretsPolicy,
}

impl Role {
    /// With nothing but an image.
    pub fn of(image: ImageName) -> Self {
        let (drift, settings) = (DriftPolicy::default(), RoleSettings::default());
        let secrets = SecretsPolicy::default();
        Self { image, thresholds: BTreeMap::new(), drift, settings, acceptance: None, attested: false, secrets }
    }
}

/// One line of the pre-loaded list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The name it gets.
    pub name: String,
    /// Its role.
    pub role: String,
    /// The only identity key that may report under its id, or claim its serial number; none: the first that does.
    pub key: Option<KeyId>,
    /// Its serial number, where that says which machine it is.
    pub serial: Option<String>,
}

impl Config {
    /// Reads a file. `None`: the site's own `kiln.toml` if there is one, else all defaults.
    pub fn load(site: &Path, file: Option<&Path>) -> Result<(Self, Option<PathBuf>), ConfigError> {
        let path = file.map_or_else(|| site.join("kiln.toml"), Path::to_owned);
        match std::fs::read_to_string(&path) {
            Ok(text) => Self::parse(&text)
                .map_err(|e| ConfigError::Invalid { path: path.clone(), reason: Box::new(e) })
                .map(|config| (config, Some(path))),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && file.is_none() => Ok((Self::default(), None)),
            Err(source) => Err(ConfigError::Read { path, source }),
        }
    }

    /// Reads the text of a file.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        // The message shows the line that is wrong, whatever is in it.
        let shown = |e: toml::de::Error| e.to_string().trim_end().lines().map(printable).collect::<Vec<_>>().join("\n");
        let raw: raw::Raw = toml::from_str(text).map_err(|e| ConfigError::Toml(shown(e)))?;
        Self::try_from(raw)
    }

    /// The only key that may report under this id, if the list names one.
    pub fn key_of(&self, id: &MachineId) -> Option<&KeyId> {
        self.machines.get(id)?.key.as_ref()
    }

    /// The only key that may report as this machine: by its id, or by the serial number under which the list approved it.
    pub fn key_of_known(&self, machine: &kiln_fleet::Machine) -> Option<&KeyId> {
        self.key_of(&machine.id).or_else(|| {
            let listed = self.listed(&machine.id, Some(&machine.facts.as_ref()?.serial))?;
            let approved = machine.state.kind.in_fleet() && machine.name.as_ref() == Some(&listed.name);
            listed.key.as_ref().filter(|_| approved)
        })
    }

    /// What the list says of a machine with this id and serial number. The id comes first.
    pub fn listed(&self, id: &MachineId, serial: Option<&str>) -> Option<&Listed> {
        self.machines.get(id).or_else(|| self.serials.get(&kiln_fleet::serial_key(serial?)?))
    }

    /// Tells a machine what its role says of its age, its drift, its boots, and of new hardware.
    pub fn rule(&self, machine: &mut kiln_fleet::Machine) {
        let role = machine.role.as_ref();
        machine.max_age = role.and_then(|role| self.max_ages.get(role)).copied();
        let role = role.and_then(|role| self.roles.get(role));
        machine.drift_policy = role.map(|role| role.drift).unwrap_or_default();
        let least = role.and_then(|role| role.acceptance);
        machine.demand = kiln_fleet::Demand { required: least.is_some(), least: least.unwrap_or_default() };
        machine.attested_only = role.is_some_and(|role| role.attested);
        machine.secrets_policy = role.map(|role| role.secrets).unwrap_or_default();
    }

    /// A role's image.
    pub fn image_of(&self, role: &str) -> Result<&ImageName, ConfigError> {
        self.roles.get(role).map(|role| &role.image).ok_or_else(|| ConfigError::UnknownRole {
            role: role.to_owned(),
            known: self.roles.keys().cloned().collect::<Vec<_>>().join(", "),
        })
    }
}

impl Default for Config {
    fn default() -> Self {
        Self::try_from(raw::Raw::default()).expect("the defaults are valid; a test reads them")
    }
}

/// Milliseconds of a time as a person writes it, as `30m`, `12h` or `7d`; a day is 24 hours.
pub(crate) fn span_ms(text: &str) -> Option<u64> {
    let span: jiff::Span = text.parse().ok()?;
    let time = span.to_duration(jiff::SpanRelativeTo::days_are_24_hours()).ok()?;
    u64::try_from(time.as_millis()).ok()
}

/// A name a person types: no spaces, nothing a shell or a path would take apart.
pub fn is_name(name: &str) -> bool {
    (1..=63).contains(&name.len())
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'))
        // What is taken for an id names no other.
        && name.to_ascii_lowercase().parse::<MachineId>().is_err()
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_protocol::{BootFirst, ExecChoice};

    const ALL: &str = r#"
[http]
listen = "127.0.0.1:18080"
max_connections = 100
max_per_address = 10
shared = ["192.0.2.0/24"]
ipv6_client = 56
min_rate = 0
[agent_api]
listen = "127.0.0.1:18443"
max_per_address = 8000
[dhcp]
mode = "full"
interface = "br0"
[dhcp.full]
range = "10.0.0.100-10.0.0.200"
router = "10.0.0.1"
dns = ["10.0.0.1"]
lease_s = 600
[tftp]
listen = "0.0.0.0:69"
max_transfers = 50
max_per_address = 5
shared = ["192.0.2.1"]
[logs]
total_mib = 512
[certificates]
life = "12h"
[console]
page_url = "https://kiln.example:8000/"
[boot]
address = "10.77.0.1"
undionly = "/u"
snponly = "/s"
uefi = "shim"
shim = "/m"
default_image = "minimal"
http_boot = false
[fleet]
max_unavailable = 2
trial_attempts = 4
firmware_patience = "90s"
[[role]]
name = "lab"
image = "minimal"
max_age = "30d"
drift = "reimage"
boot_first = "network"
exec = "report"
secrets = "cold"
acceptance = "required"
[role.acceptance_least]
disk_read_mib_s = 200
[role.thresholds]
"disk./var" = "10%"
[[machine]]
id = "00000000-0000-0000-0000-00000000000A"
name = "rack-1"
role = "lab"
key = "ABABABABABABABABABABABABABABABABABABABABABABABABABABABABABABABAB"
"#;

    #[test]
    fn every_key_is_read() {
        let c = Config::parse(ALL).unwrap();
        assert_eq!(c.http.port(), 18080);
        let usual = http::Limits::default();
        let shared = Shared::parse(&["192.0.2.0/24".to_owned()]).unwrap();
        let few = http::Limits { max_connections: 100, max_per_address: 10, ..usual };
        let expected = http::Limits { shared, ipv6_client: 56, min_rate: 0, ..few };
        assert!(c.tftp_shared.contains("192.0.2.1".parse().unwrap()));
        assert_eq!(c.http_limits, expected);
        assert_eq!(c.agent_limits, http::Limits { max_per_address: 8000, ..usual });
        assert_eq!((c.logs_total, c.certificate_life), (512 << 20, 12 * 3_600_000));
        assert_eq!(c.page_url.as_deref(), Some("https://kiln.example:8000"));
        assert_eq!((c.tftp_transfers, c.tftp_per_address), (50, 5));
        assert!(
            matches!(&c.dhcp.mode, DhcpMode::Full(f) if f.lease_s == 600 && f.last == Ipv4Addr::new(10, 0, 0, 200))
        );
        assert_eq!(c.limits, Limits { max_unavailable: 2, trial_attempts: 4, firmware_patience: 90_000 });
        let id = "00000000-0000-0000-0000-00000000000a".parse().unwrap();
        let key = Some("ab".repeat(32).parse().unwrap());
        assert_eq!(c.machines[&id], Listed { name: "rack-1".into(), role: "lab".into(), key, serial: None });
        assert_eq!(c.roles["lab"].thresholds["disk./var"], Threshold::Percent(10));
        assert_eq!(c.roles["lab"].drift, DriftPolicy::Reimage);
        assert_eq!(c.roles["lab"].secrets, SecretsPolicy::Cold);
        let thresholds = c.roles["lab"].thresholds.iter().map(|(name, t)| (name.clone(), t.to_string())).collect();
        let settings = RoleSettings { boot_first: BootFirst::Network, exec: ExecChoice::Report, thresholds };
        assert_eq!(c.roles["lab"].settings, settings);
        let least = Least { disk_read_mib_s: Some(200), ..Least::default() };
        assert_eq!(c.roles["lab"].acceptance, Some(least));
        assert!(!c.boot.http_boot);
        assert_eq!((c.boot.uefi, c.boot.shim.as_path()), (UefiProgram::Shim, Path::new("/m")));
        assert_eq!(c.max_ages["lab"], 30 * 24 * 3_600_000);
    }

    #[test]
    fn no_file_is_a_file_of_defaults() {
        let c = Config::default();
        assert_eq!((c.http.port(), c.agent_api.port(), c.tftp.port()), (8080, 8443, 69));
        assert_eq!((c.dhcp.mode, c.limits), (DhcpMode::Proxy, Limits::default()));
        assert_eq!(c.certificate_life, 24 * 3_600_000);
        assert_eq!(c.roles.keys().collect::<Vec<_>>(), ["default"]);
    }

    #[test]
    fn mistakes_are_named() {
        let message = |text: &str| Config::parse(text).unwrap_err().to_string();
        let unknown = message("[http]\nlisten = \"0.0.0.0:1\"\nlisen = \"x\"\n");
        assert!(unknown.contains("line 3, column 1") && unknown.contains("lisen"), "{unknown}");
        let top = message("\n[htpp]\n");
        assert!(top.contains("line 2, column 2") && top.contains("htpp"), "{top}");
        let role = message("[[role]]\nname = \"a\"\nimage = \"minimal\"\nimgae = 1\n");
        assert!(role.contains("line 4, column 1"), "{role}");
        for (text, expected) in [
            ("[fleet]\nmax_unavailable = 0", "fleet.max_unavailable"),
            ("[http]\nmax_connections = 0", "http.max_connections"),
            ("[agent_api]\nmax_per_address = 0", "agent_api.max_per_address"),
            ("[agent_api]\nmax_per_address = 8001", "agent_api.max_per_address: 8001 for one address"),
            ("[http]\nshared = [\"ten\"]", "http.shared"),
            ("[tftp]\nshared = [\"10.0.0.0/40\"]", "tftp.shared"),
            ("[agent_api]\nipv6_client = 0", "agent_api.ipv6_client"),
            ("[tftp]\nmax_transfers = 3\nmax_per_address = 4", "tftp.max_per_address"),
            ("[console]\npage_url = \"kiln.example\"", "console.page_url: \"kiln.example\""),
            ("[logs]\ntotal_mib = 3", "logs.total_mib: 3"),
            ("[certificates]\nlife = \"59m\"", "certificates.life: \"59m\": from 1h to 30d"),
            ("[certificates]\nlife = \"31d\"", "certificates.life: \"31d\": from 1h to 30d"),
            ("[fleet]\ntrial_attempts = 0", "fleet.trial_attempts"),
            ("[boot]\nuefi = \"grub\"", "unknown variant `grub`, expected one of `uki`, `ipxe`, `shim`"),
            ("[fleet]\nfirmware_patience = \"soon\"", "fleet.firmware_patience: \"soon\": expected a time"),
            ("[fleet]\nfirmware_patience = \"60\"", "as \"60s\" or \"2m\""),
            ("[fleet]\nfirmware_patience = \"4s\"", "from 5s to 5m"),
            ("[fleet]\nfirmware_patience = \"-60s\"", "from 5s to 5m"),
            ("[fleet]\nfirmware_patience = \"301s\"", "from 5s to 5m"),
            ("[fleet]\nfirmware_patience = 60", "line 2"),
            ("[dhcp]\nmode = \"full\"", "[dhcp.full]"),
            ("[dhcp.full]\nrange = \"10.0.0.1-10.0.0.2\"", "mode = \"full\""),
            ("[dhcp]\nmode = \"full\"\n[dhcp.full]\nrange = \"10.0.0.9-10.0.0.2\"", "below the first"),
            ("[dhcp]\nmode = \"half\"", "line 2"),
            ("[[role]]\nname = \"a\"\nimage = \"../x\"", "role a: image"),
            ("[[role]]\nname = \"a\"\nimage = \"x\"\nmax_age = \"1 month\"", "role a: max_age: \"1 month\""),
            ("[[role]]\nname = \"a\"\nimage = \"x\"\nmax_age = \"5m\"", "from 1h to 3650d"),
            ("[[role]]\nname = \"a\"\nimage = \"x\"\ndrift = \"wipe\"", "line 4"),
            ("[[role]]\nname = \"a\"\nimage = \"x\"\nsecrets = \"enrolled\"", "line 4"),
            (
                "[[role]]\nname = \"a\"\nimage = \"x\"\n[role.thresholds]\nmemory = \"lots\"",
                "role a: thresholds.memory: \"lots\" is no threshold: expected \"10%\", \"64M\" or \"500ms\"",
            ),
            ("[[role]]\nname = \"a\"\nimage = \"x\"\nacceptance = \"maybe\"", "line 4"),
            (
                "[[role]]\nname = \"a\"\nimage = \"x\"\n[role.acceptance_least]\nlink_mbit_s = 1",
                "role a: acceptance_least: only with acceptance = \"required\"",
            ),
            ("[[role]]\nname = \"a b\"\nimage = \"x\"", "role.name"),
            ("[[machine]]\nid = \"x\"\nname = \"n\"\nrole = \"default\"", "machine.id"),
            ("[[machine]]\nname = \"n\"\nrole = \"default\"", "machine: n: expected `id`, `serial` or `position`"),
            (
                "[[machine]]\nserial = \"0000\"\nname = \"n\"\nrole = \"default\"",
                "machine.serial: \"0000\" is what boards have",
            ),
            (
                "[[machine]]\nserial = \"ab1\"\nname = \"n\"\nrole = \"default\"\n[[machine]]\nserial = \" AB1\"\nname = \"m\"\nrole = \"default\"",
                "machine.serial: \" AB1\" is there twice",
            ),
            (
                "[[machine]]\nid = \"00000000-0000-0000-0000-000000000001\"\nname = \"n\"\nrole = \"default\"\nkey = \"ab\"",
                "machine.key: key id: expected 64 lower-case hex digits, got \"ab\"",
            ),
            (
                "[[machine]]\nid = \"00000000-0000-0000-0000-000000000001\"\nname = \"n\"\nrole = \"db\"",
                "known are: default",
            ),
        ] {
            let got = message(text);
            assert!(got.contains(expected), "{text}: {got}");
        }
        let at =
            |dhcp: &str, more: &str| format!("[dhcp]\n{dhcp}\n[[machine]]\nname = \"n\"\nrole = \"default\"\n{more}\n");
        let (relays, place) = ("relays = [\"10.1.0.1\"]", "position = \"10.1.0.1 sw-7 eth1\"");
        let good = Config::parse(&at(relays, place)).unwrap();
        assert_eq!(good.positions["10.1.0.1 sw-7 eth1"].name, "n");
        let key = format!("{place}\nkey = \"{}\"", "ab".repeat(32));
        for (dhcp, more, expected) in [
            ("", place, "10.1.0.1 is none of [dhcp] relays"),
            (relays, "position = \"sw-7 eth1\"", "expected \"RELAY REMOTE CIRCUIT\""),
            (relays, "position = \"10.1.0.1  eth1\"", "expected \"RELAY REMOTE CIRCUIT\""),
            (relays, key.as_str(), "makes a key at each boot"),
            ("mode = \"off\"\nrelays = [\"10.1.0.1\"]", place, "no relay is heard"),
        ] {
            let got = message(&at(dhcp, more));
            assert!(got.contains("machine.position") && got.contains(expected), "{dhcp} {more}: {got}");
        }
        let again = format!("{}[[machine]]\nname = \"m\"\nrole = \"default\"\n{place}\n", at(relays, place));
        assert!(message(&again).contains("is there twice"));
        let twice = ALL.replace("ABAB", "abab").replace("00A\"", "00B\"").replace("rack-1", "rack-2");
        let second = &twice[twice.find("[[machine]]").unwrap()..];
        let got = message(&format!("{ALL}{second}"));
        assert!(got.contains("machine.key: rack-1 and rack-2 have the same"), "{got}");
    }
}
