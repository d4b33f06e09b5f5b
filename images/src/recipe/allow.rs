//! `[[exec]]`: which programs may start from a place that can be written. What comes of it is a document in the root.

use super::{Partial, Recipe, RecipeError, Source, is_root_path, read};
use crate::error::BuildError;
use crate::oci;
use crate::tarball::{Entry, Kind};
use kiln_release::hex::{is_sha256, sha256};
use kiln_release::{ExecFail, ExecMode, ExecPolicy, ExecRule};
use serde::Deserialize;
use std::path::Path;
use toml::Spanned;

/// One place, as far as the recipe alone says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecPlace {
    /// With the hashes that the recipe says, and of files beside it.
    pub rule: ExecRule,
    /// Files of the root itself that may start from there, too.
    pub root_files: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawExec {
    path: Spanned<String>,
    mode: Option<Spanned<String>>,
    fail: Option<Spanned<String>>,
    #[serde(default)]
    role_may_report: bool,
    #[serde(default)]
    allow: Vec<Spanned<String>>,
    #[serde(default)]
    allow_files: Vec<Spanned<String>>,
    #[serde(default)]
    allow_images: Vec<Spanned<String>>,
}

impl Partial {
    pub(super) fn exec(&mut self, raw: RawExec, source: &Source<'_>, folder: &Path) -> Result<(), RecipeError> {
        let span = raw.path.span();
        let path = source.check(raw.path, is_root_path, "an absolute path without . or ..")?;
        if self.exec.iter().any(|other| other.rule.path == path) {
            return Err(source.invalid(span, format!("{path} has two allow-lists")));
        }
        let mode = match raw.mode.as_ref().map(|word| word.get_ref().as_str()) {
            None | Some("enforce") => ExecMode::Enforce,
            Some("report") => ExecMode::Report,
            Some(_) => return Err(source.invalid(raw.mode.map_or(span, |w| w.span()), "a mode is: enforce, report")),
        };
        let fail = match raw.fail.as_ref().map(|word| word.get_ref().as_str()) {
            None | Some("closed") => ExecFail::Closed,
            Some("open") => ExecFail::Open,
            Some(_) => return Err(source.invalid(raw.fail.map_or(span, |w| w.span()), "fail is: open, closed")),
        };
        let mut allow = source.check_all(raw.allow, is_sha256, "a SHA-256: 64 lower-case hex digits")?;
        let mut root_files = Vec::new();
        for file in raw.allow_files {
            if file.get_ref().starts_with('/') {
                root_files.push(source.check(file, is_root_path, "an absolute path without . or ..")?);
            } else {
                let from = folder.join(file.get_ref());
                let bytes = read(&from)?;
                allow.push(sha256(&bytes));
                self.sources.push((from, bytes));
            }
        }
        for image in raw.allow_images {
            let span = image.span();
            let wrong = |what: String| source.invalid(span.clone(), format!("{}: {what}", image.get_ref()));
            let parts = image.get_ref().split_once('@');
            let (layout, digest) =
                parts.ok_or_else(|| wrong("an image is LAYOUT@sha256:…, a folder and a manifest's digest".into()))?;
            let layout = folder.join(layout);
            let (programs, manifest) = oci::programs(&layout, digest).map_err(&wrong)?;
            allow.extend(programs);
            // Everything else of the image follows from its manifest.
            self.sources.push((layout.join(digest), manifest));
        }
        allow.sort();
        allow.dedup();
        self.exec.push(ExecPlace {
            rule: ExecRule { path, mode, fail, may_report: raw.role_may_report, allow },
            root_files,
        });
        Ok(())
    }

    /// A rule without a place of its own would be one for the read-only root.
    pub(super) fn check_places(&self, path: &Path) -> Result<(), RecipeError> {
        let alone = |place: &&ExecPlace| !self.writable.iter().any(|mount| mount.path == place.rule.path);
        match self.exec.iter().find(alone) {
            None => Ok(()),
            Some(_) => Err(RecipeError::Missing {
                path: path.into(),
                key: "[[writable]] with the path of an [[exec]]",
                hint: "an allow-list is for a writable place; from the root itself everything may start",
            }),
        }
    }
}

/// The document, if the recipe has a list. `base` is what the packages hold, in `tar`.
pub(crate) fn document(recipe: &Recipe, base: &[Entry], tar: &[u8]) -> Result<Option<Vec<u8>>, BuildError> {
    if recipe.exec.is_empty() {
        return Ok(None);
    }
    let mut rules = Vec::new();
    for place in &recipe.exec {
        let mut rule = place.rule.clone();
        for path in &place.root_files {
            let missing = || BuildError::NoSuchProgram { recipe: recipe.name.clone(), path: path.clone() };
            rule.allow.push(sha256(content(recipe, base, tar, path).ok_or_else(missing)?));
        }
        rule.allow.sort();
        rule.allow.dedup();
        rules.push(rule);
    }
    let policy = ExecPolicy::new(rules);
    policy.check().map_err(|error| BuildError::AllowList { recipe: recipe.name.clone(), detail: error.to_string() })?;
    Ok(Some(crate::base::json(&policy)))
}

/// A file's bytes, of those that the root will have.
fn content<'a>(recipe: &'a Recipe, base: &[Entry], tar: &'a [u8], path: &str) -> Option<&'a [u8]> {
    if let Some(file) = recipe.files.iter().rev().find(|file| file.path == path) {
        return Some(&file.content);
    }
    let entry = base.iter().find(|entry| entry.path == path)?;
    match &entry.kind {
        Kind::File => tar.get(entry.data.clone()),
        Kind::Hardlink(target) => {
            let first = base.iter().find(|entry| entry.path == *target && entry.kind == Kind::File)?;
            tar.get(first.data.clone())
        }
        Kind::Directory
        | Kind::Symlink(_)
        | Kind::CharDevice(..)
        | Kind::BlockDevice(..)
        | Kind::Fifo
        | Kind::Other(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tarball::{self, Added, Content};

    fn load(exec: &str) -> Result<Recipe, RecipeError> {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("r.toml");
        let text = format!(
            "name = \"test\"\nsuite = \"trixie\"\narchitecture = \"x86_64\"\nkernel = \"linux-image-cloud-amd64\"\n\
             command_line = \"systemd.import_credentials=no\"\n[[health]]\nkind = \"systemd\"\nsoak = 5\n[[writable]]\npath = \"/srv\"\nsize = \
             \"1M\"\n[[file]]\npath = \"/usr/bin/own\"\ncontent = \"own\"\n[[exec]]\n{exec}"
        );
        std::fs::write(temp.path().join("tool"), "tool").unwrap();
        std::fs::write(&path, text).unwrap();
        Recipe::load(&path)
    }

    #[test]
    fn hashes_are_said_and_computed() {
        let said = "ab".repeat(32);
        let text = format!(
            "path = \"/srv\"\nfail = \"open\"\nallow = [\"{said}\"]\n\
             allow_files = [\"tool\", \"/usr/bin/own\", \"/usr/bin/true\", \"/usr/bin/also\"]\n"
        );
        let recipe = load(&text).unwrap();
        assert!(recipe.sources.iter().any(|(_, bytes)| bytes == b"tool"), "it is an input of the build");
        let file = |path: &str| Added { path: path.into(), mode: 0o755, content: Content::File(b"true".to_vec()) };
        let tar = tarball::layer(&[0; 1024], |_| false, &[file("/usr/bin/true"), file("/usr/bin/also")]).unwrap();
        let base = tarball::entries(&tar).unwrap();
        let document = document(&recipe, &base, &tar).unwrap().unwrap();
        let policy = ExecPolicy::read(&document).unwrap();
        let mut expected = vec![said, sha256(b"tool"), sha256(b"own"), sha256(b"true")];
        expected.sort();
        let [rule] = &policy.rules[..] else { panic!("{policy:?}") };
        assert_eq!((&rule.allow, rule.mode, rule.fail), (&expected, ExecMode::Enforce, ExecFail::Open));

        let recipe = load("path = \"/srv\"\nrole_may_report = true\nallow_files = [\"/usr/bin/none\"]\n").unwrap();
        assert!(recipe.exec[0].rule.may_report && !rule.may_report, "only where it is said");
        let error = super::document(&recipe, &base, &tar).unwrap_err().to_string();
        assert!(error.contains("/usr/bin/none"), "{error}");
        assert_eq!(super::document(&Recipe { exec: Vec::new(), ..recipe }, &base, &tar).unwrap(), None);
    }

    #[test]
    fn what_is_not_allowed_is_said() {
        for (text, part) in [
            ("path = \"srv\"", "16:8: \"srv\" is not an absolute path"),
            ("path = \"/srv\"\nmode = \"deny\"", "17:8: a mode is: enforce, report"),
            ("path = \"/srv\"\nfail = \"never\"", "17:8: fail is: open, closed"),
            ("path = \"/srv\"\nallow = [\"ABCD\"]", "17:10: \"ABCD\" is not a SHA-256"),
            ("path = \"/srv\"\n[[exec]]\npath = \"/srv\"", "18:8: /srv has two allow-lists"),
            ("path = \"/opt\"", "[[writable]] with the path of an [[exec]] is missing"),
            ("path = \"/srv\"\nallow_files = [\"nothing\"]", "cannot read recipe"),
            ("path = \"/srv\"\nallow_images = [\"app\"]", "17:17: app: an image is LAYOUT@sha256:…"),
            ("path = \"/srv\"\nallow_images = [\"app@latest\"]", "17:17: app@latest: \"latest\" is no digest"),
        ] {
            let error = load(text).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
