//! What a signature cannot say of Kiln's own documents: that their fields have their form and fit together.
//!
//! The readers take bytes whose signature was verified (a target of a finished TUF update), or the `boot.json` of the
//! initramfs the caller runs in. They are strict: floats and keys given twice are refused, unknown fields are not.

use crate::canonical::parse_strict;
use crate::declared;
use crate::envelope::{KeySet, Unverified};
use crate::error::{DirectorError, FormatError, OperatorError};
use crate::formats::{Artifact, BootInfo, DbxUpdate, MANIFEST_TYPE, Manifest, Measured, SITE_TYPE, Site};
use crate::hex;
use crate::key::{PublicKey, object_id};
use crate::network::NetworkConfig;
use crate::secrets::check_secrets;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// Longest statement of the director that is read: 64 KiB.
pub const MAX_DIRECTOR_STATEMENT: u64 = 64 << 10;

const CLASSES: [&str; 4] = ["normal", "rescue", "acceptance", "wipe"];
const ARCHITECTURES: [&str; 2] = ["x86_64", "aarch64"];
/// The kernel's own limit on x86_64; longer ones are cut silently.
const MAX_COMMAND_LINE: usize = 2047;

/// An image's name: it becomes a TUF role, a path and a file name.
pub fn is_image_name(name: &str) -> bool {
    (1..=32).contains(&name.len())
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'))
}

fn read<T: DeserializeOwned>(what: &'static str, bytes: &[u8]) -> Result<T, FormatError> {
    let value = parse_strict(bytes).map_err(|e| FormatError::Malformed { what, reason: e.to_string() })?;
    serde_json::from_value(value).map_err(|e| FormatError::Malformed { what, reason: e.to_string() })
}

struct Check(&'static str);

impl Check {
    fn outline(&self, expected: &'static str, type_: &str, spec_version: &str) -> Result<(), FormatError> {
        if type_ != expected {
            return Err(FormatError::WrongType { what: self.0, expected, got: type_.to_owned() });
        }
        match spec_version.strip_prefix("1.").map(str::parse::<u32>) {
            Some(Ok(_)) => Ok(()),
            Some(Err(_)) | None => Err(FormatError::WrongSpecVersion { what: self.0, got: spec_version.to_owned() }),
        }
    }

    fn field(&self, field: &'static str, holds: bool, got: &str, reason: &'static str) -> Result<(), FormatError> {
        if holds { Ok(()) } else { Err(FormatError::BadField { what: self.0, field, got: got.to_owned(), reason }) }
    }

    fn identity(&self, image: &str, release: u64, class: &str, architecture: &str) -> Result<(), FormatError> {
        self.field("image", is_image_name(image), image, "1 to 32 of a-z, 0-9 and `-`, beginning with a letter")?;
        self.field("release", release > 0, &release.to_string(), "releases are numbered from 1")?;
        self.field("class", CLASSES.contains(&class), class, "normal, rescue, acceptance or wipe")?;
        self.field("architecture", ARCHITECTURES.contains(&architecture), architecture, "x86_64 or aarch64")
    }

    fn command_line(&self, line: &str) -> Result<(), FormatError> {
        let fits = line.len() <= MAX_COMMAND_LINE && line.bytes().all(|b| b == b' ' || b.is_ascii_graphic());
        self.field("command_line", fits, line, "at most 2047 printable ASCII characters")
    }

    fn keys(
        &self,
        (field, threshold_field): (&'static str, &'static str),
        keys: &BTreeMap<String, Value>,
        threshold: u32,
    ) -> Result<(), FormatError> {
        for (id, object) in keys {
            self.field(field, object_id(object) == *id, id, "it is not the key id of its key")?;
        }
        let usable = keys.values().filter_map(|object| PublicKey::from_object(object).ok()).collect::<BTreeSet<_>>();
        let number = usize::try_from(threshold).unwrap_or(usize::MAX);
        let reachable = number >= 1 && number <= usable.len();
        self.field(threshold_field, reachable, &threshold.to_string(), "from 1 to the number of usable keys")
    }

    fn artifact(&self, field: &'static str, artifact: &Artifact) -> Result<(), FormatError> {
        let got = format!("{} bytes of {}", artifact.length, artifact.sha256);
        let holds = hex::is_sha256(&artifact.sha256) && artifact.length > 0;
        self.field(field, holds, &got, "a length above 0 and a SHA-256 in lower-case hex")
    }
}

impl Measured {
    fn check(&self, check: &Check) -> Result<(), FormatError> {
        let with_root = self.kexec.as_ref().and_then(|kexec| kexec.with_root.as_ref());
        let without_root = self.kexec.as_ref().map(|kexec| &kexec.without_root);
        let optional = [
            ("measured.loader", self.loader.as_ref()),
            ("measured.certificate", self.certificate.as_ref()),
            ("measured.kexec.with_root", with_root),
            ("measured.kexec.without_root", without_root),
        ];
        let optional = optional.into_iter().filter_map(|(field, value)| Some((field, value?)));
        let all = [("measured.pcr11", &self.pcr11), ("measured.uki", &self.uki), ("measured.kernel", &self.kernel)];
        for (field, value) in all.into_iter().chain(optional) {
            check.field(field, hex::is_sha256(value), value, "a SHA-256 in lower-case hex")?;
        }
        Ok(())
    }
}

impl Manifest {
    /// Reads a verified target's bytes and checks them: [`Self::check`].
    pub fn read(bytes: &[u8], image: &str, release: u64) -> Result<Self, FormatError> {
        let manifest: Self = read("manifest", bytes)?;
        manifest.check(image, release)?;
        Ok(manifest)
    }

    /// Checks every field, and that it is the manifest of this release.
    pub fn check(&self, image: &str, release: u64) -> Result<(), FormatError> {
        let check = Check("manifest");
        check.outline(MANIFEST_TYPE, &self.type_, &self.spec_version)?;
        check.identity(&self.image, self.release, &self.class, &self.architecture)?;
        if self.image != image || self.release != release {
            let (expected, got) = (format!("{image}/{release}"), format!("{}/{}", self.image, self.release));
            return Err(FormatError::WrongRelease { expected, got });
        }
        if let Some(measured) = &self.measured {
            measured.check(&check)?;
        }
        let product = &self.product;
        let word =
            !product.is_empty() && product.len() <= 64 && product.bytes().all(|b| b == b' ' || b.is_ascii_graphic());
        check.field("product", word, product, "1 to 64 printable ASCII characters")?;
        for (field, artifact) in
            [("uki", &self.uki), ("kernel", &self.kernel), ("initramfs", &self.initramfs), ("root", &self.root)]
        {
            check.artifact(field, artifact)?;
        }
        self.kexec_kernel.iter().try_for_each(|artifact| check.artifact("kexec_kernel", artifact))?;
        self.extra.iter().try_for_each(|artifact| check.artifact("extra", artifact))?;
        self.sbom.iter().try_for_each(|artifact| check.artifact("sbom", artifact))?;
        self.verity
            .check(self.root.length)
            .map_err(|e| FormatError::Malformed { what: "manifest", reason: e.to_string() })?;
        check.command_line(&self.command_line)?;
        check.field(
            "health",
            !self.health.is_empty(),
            "nothing",
            "without a check no machine would ever be healthy",
        )?;
        check_secrets(&self.secrets).or_else(|(got, reason)| check.field("secrets", false, &got, reason))?;
        if let Some(certificate) = &self.certificate {
            certificate.check(&self.secrets).or_else(|reason| check.field("certificate", false, "it", reason))?;
        }
        declared::check_all(&self.health).or_else(|(got, reason)| check.field("health", false, &got, reason))?;
        for (event, hooks) in &self.hooks {
            declared::check_hooks(event, hooks).or_else(|(got, reason)| check.field("hooks", false, &got, reason))?;
        }
        for (i, mount) in self.writable.iter().enumerate() {
            let path = mount.path.as_str();
            let clean = path.len() > 1
                && path.strip_prefix('/').is_some_and(|rest| {
                    rest.split('/').all(|segment| !matches!(segment, "" | "." | "..") && !segment.contains('\0'))
                });
            check.field("writable.path", clean, path, "an absolute path without `.`, `..` and empty segments")?;
            let once = self.writable[..i].iter().all(|other| other.path != mount.path);
            check.field("writable.path", once, path, "listed twice")?;
            check.field("writable.size", mount.size >= 4096, &mount.size.to_string(), "at least 4096 bytes")?;
        }
        Ok(())
    }

    /// Whether it is of the very release that this boot program embeds. Called after [`Self::check`].
    pub fn matches_boot(&self, boot: &BootInfo) -> Result<(), FormatError> {
        let release = (self.release.to_string(), boot.release.to_string());
        for (field, got, expected) in [
            ("image", &self.image, &boot.image),
            ("release", &release.0, &release.1),
            ("class", &self.class, &boot.class),
            ("architecture", &self.architecture, &boot.architecture),
            ("verity.root_hash", &self.verity.root_hash, &boot.root_hash),
            ("command_line", &self.command_line, &boot.command_line),
        ] {
            if got != expected {
                return Err(FormatError::ForeignBoot { field, expected: expected.clone(), got: got.clone() });
            }
        }
        Ok(())
    }
}

impl BootInfo {
    /// Reads the `boot.json` of the running initramfs and checks it.
    pub fn read(bytes: &[u8]) -> Result<Self, FormatError> {
        let boot: Self = read("boot.json", bytes)?;
        boot.check()?;
        Ok(boot)
    }

    /// Checks every field; the trust root is checked where it is used, by the TUF client.
    pub fn check(&self) -> Result<(), FormatError> {
        let check = Check("boot.json");
        check.identity(&self.image, self.release, &self.class, &self.architecture)?;
        check.field("root_hash", hex::is_sha256(&self.root_hash), &self.root_hash, "64 lower-case hex digits")?;
        check.command_line(&self.command_line)?;
        let urls = |urls: &[String], schemes: &[&str]| {
            urls.iter()
                .find(|url| {
                    let rest = schemes.iter().find_map(|scheme| url.strip_prefix(scheme));
                    rest.is_none_or(|rest| {
                        rest.is_empty() || rest.ends_with('/') || !rest.bytes().all(|b| b.is_ascii_graphic())
                    })
                })
                .cloned()
        };
        if let Some(url) = urls(&self.site.http_urls, &["http://", "https://"]) {
            check.field("site.http_urls", false, &url, "http(s)://HOST[:PORT][/PATH] without a slash at its end")?;
        }
        if let Some(url) = urls(&self.site.agent_urls, &["https://"]) {
            check.field("site.agent_urls", false, &url, "https://HOST[:PORT][/PATH] without a slash at its end")?;
        }
        self.site.network.as_ref().map_or(Ok(()), NetworkConfig::check)
    }
}

impl Site {
    /// Reads a verified `site.json` and checks it.
    pub fn read(bytes: &[u8]) -> Result<Self, FormatError> {
        let site: Self = read("site.json", bytes)?;
        site.check()?;
        Ok(site)
    }

    /// Checks every field, and that the director's threshold can be reached.
    pub fn check(&self) -> Result<(), FormatError> {
        let check = Check("site.json");
        check.outline(SITE_TYPE, &self.type_, &self.spec_version)?;
        let name = &self.name;
        let word = !name.is_empty() && name.len() <= 64 && name.bytes().all(|b| b.is_ascii_graphic());
        check.field("name", word, name, "1 to 64 printable ASCII characters without space")?;
        check.keys(("directors", "director_threshold"), &self.directors, self.director_threshold)?;
        if !self.operators.is_empty() {
            check.keys(("operators", "operator_threshold"), &self.operators, self.operator_threshold)?;
            let usable = |objects: &BTreeMap<String, Value>| -> BTreeSet<PublicKey> {
                objects.values().filter_map(|object| PublicKey::from_object(object).ok()).collect()
            };
            let apart = usable(&self.operators).is_disjoint(&usable(&self.directors));
            check.field("operators", apart, "a director's key", "an operator's key is kept off the boot server")?;
        }
        let keys = &self.agent_api.keys;
        check.field("agent_api.keys", keys.len() <= 16, &keys.len().to_string(), "at most 16 keys")?;
        let bad = keys.iter().find(|key| !hex::is_sha256(key)).map(String::as_str);
        check.field("agent_api.keys", bad.is_none(), bad.unwrap_or_default(), "64 lower-case hex digits")?;
        for (image, floor) in &self.floors {
            check.field("floors", is_image_name(image), image, "not an image name")?;
            check.field("floors", *floor > 0, image, "floors start at 1")?;
        }
        if let Some(dbx) = &self.dbx {
            check.artifact("dbx.update", &dbx.update)?;
            let length = dbx.update.length;
            check.field("dbx.update", length <= DbxUpdate::LIMIT, &length.to_string(), "at most 64 KiB")?;
            let programs = dbx.revoked.len();
            let count = (1..=DbxUpdate::PROGRAMS).contains(&programs);
            check.field("dbx.revoked", count, &programs.to_string(), "from 1 to 1000 boot programs")?;
            let bad = dbx.revoked.iter().find(|program| !hex::is_sha256(&program.digest));
            check.field("dbx.revoked", bad.is_none(), "a digest", "64 lower-case hex digits")?;
        }
        self.network.as_ref().map_or(Ok(()), NetworkConfig::check)
    }

    /// Lowest release of an image that may run.
    pub fn floor(&self, image: &str) -> u64 {
        self.floors.get(image).copied().unwrap_or(1)
    }

    /// The director's keys.
    pub fn director_keys(&self) -> KeySet {
        KeySet::of_role(&self.directors, self.directors.keys(), self.director_threshold)
    }

    /// The operators' keys.
    pub fn operator_keys(&self) -> KeySet {
        KeySet::of_role(&self.operators, self.operators.keys(), self.operator_threshold)
    }

    /// Verifies an order and reads it. With it comes the SHA-256 of the bytes, by which a freshness reply names it. What
    /// it says is for the caller to check (kiln-protocol).
    pub fn verify_operator<T: DeserializeOwned>(
        &self,
        bytes: &[u8],
        expected: &'static str,
    ) -> Result<(T, String), OperatorError> {
        if self.operators.is_empty() {
            return Err(OperatorError::NoOperators);
        }
        let envelope = Unverified::<T>::parse(bytes, MAX_DIRECTOR_STATEMENT)?;
        let verified = envelope.verify_type(&self.operator_keys(), expected)?;
        let sha256 = verified.sha256.clone();
        Ok((verified.into_inner(), sha256))
    }

    /// Verifies an assignment or a freshness reply and reads it. With it comes the SHA-256 of the bytes, by which a
    /// freshness reply names an assignment. What it says is for the caller to check (kiln-protocol).
    pub fn verify_director<T: DeserializeOwned>(&self, bytes: &[u8]) -> Result<(T, String), DirectorError> {
        let verified = Unverified::<T>::parse(bytes, MAX_DIRECTOR_STATEMENT)?.verify(&self.director_keys())?;
        let sha256 = verified.sha256.clone();
        Ok((verified.into_inner(), sha256))
    }
}
