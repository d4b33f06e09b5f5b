//! Names, paths, addresses and numbers in their text forms.

use kiln_netboot::Mac;
use kiln_netboot::ipxe::script_url;
use kiln_protocol::slot::{Content, EntryName};
use kiln_protocol::{ApprovalCode, HexBytes, ImageName, KeyId, MachineId, ReleaseId, binary_size, printable};
use kiln_release::declared::{address, http_target, is_unit};
use kiln_release::network::{parse_address, parse_mac};
use kiln_release::tuf::{TargetPath, kept_file_name, kept_role, matches_pattern};
use kiln_release::{Threshold, hex, is_image_name};
use std::fmt::Display;
use std::str::FromStr;

/// What is read is written so that it is read as the same.
fn round<T: FromStr + Display + PartialEq + std::fmt::Debug>(text: &str) -> Option<T> {
    let value = text.parse::<T>().ok()?;
    let again = value.to_string().parse::<T>().ok();
    assert_eq!(again.as_ref(), Some(&value), "{text:?}");
    Some(value)
}

/// The slow, obvious definition of a delegation's pattern.
fn covers(pattern: &[char], path: &[char]) -> bool {
    match (pattern.split_first(), path.split_first()) {
        (None, None) => true,
        (Some(('*', rest)), other) => {
            covers(rest, path) || matches!(other, Some((c, tail)) if *c != '/' && covers(pattern, tail))
        }
        (Some((p, rest)), Some((c, tail))) => (p == c || (*p == '?' && *c != '/')) && covers(rest, tail),
        (Some(_), None) | (None, Some(_)) => false,
    }
}

/// All of them, over one text. A line break parts a pattern from a path.
pub mod names {
    use super::*;

    pub fn run(data: &[u8]) {
        let Ok(text) = std::str::from_utf8(data) else { return };
        assert!(!printable(text).contains(char::is_control));
        if let Some(name) = round::<EntryName>(text) {
            assert_eq!(name.to_string(), text, "one name for one entry");
        }
        if let Some(name) = round::<ImageName>(text) {
            assert!(is_image_name(name.as_str()) && !text.contains(['/', '.']));
        }
        assert_eq!(is_image_name(text), text.parse::<ImageName>().is_ok(), "two checks of one name");
        let _ = (round::<MachineId>(text), round::<KeyId>(text), round::<ReleaseId>(text), round::<ApprovalCode>(text));
        if let Some(mac) = round::<Mac>(text) {
            assert!(script_url("http://k", None, mac).is_ascii());
        }
        if let Some(mac) = parse_mac(text) {
            assert_eq!(text.parse(), Ok(Mac(mac)));
        }
        if let Some(content) = Content::of_entry_text(text) {
            assert_eq!(Content::of_entry_text(&content.entry_text(5)), Some(content));
        }
        if let Some(threshold) = Threshold::parse(text) {
            assert_eq!(Threshold::parse(&threshold.to_string()), Some(threshold));
        }
        if let Ok(bytes) = HexBytes::try_from(text.to_owned()) {
            assert_eq!((hex::decode(text), String::from(bytes.clone())), (Some(bytes.0), text.to_owned()));
        }
        if let Ok(path) = TargetPath::new(text) {
            assert!(!text.starts_with('/') && text.split('/').all(|part| part != ".."));
            assert_eq!(TargetPath::new(path.to_string()), Ok(path));
        }
        let kept = kept_file_name(text);
        assert!(!kept.contains('/') && kept.is_ascii());
        assert_eq!(kept_role(&kept).as_deref(), Some(text));
        if let Some(role) = kept_role(text) {
            assert_eq!(kept_file_name(&role), text, "one file for one role");
        }
        if let Some((target, path)) = http_target(text) {
            assert!(path.starts_with('/') && address(&target.to_string(), None) == Some(target));
        }
        if let Some((ip, prefix)) = parse_address(text) {
            assert_eq!(parse_address(&format!("{ip}/{prefix}")), Some((ip, prefix)));
        }
        assert!(!is_unit(text) || !text.contains(['/', '\n', ' ']), "{text:?} is no unit");
        if let Ok(bytes) = text.parse() {
            assert!(binary_size(bytes).len() < 12);
        }
        if let Some((pattern, path)) =
            text.split_once('\n').filter(|(pattern, path)| pattern.len() <= 12 && path.len() <= 16)
        {
            let (p, t): (Vec<char>, Vec<char>) = (pattern.chars().collect(), path.chars().collect());
            if pattern.is_ascii() && path.is_ascii() {
                assert_eq!(matches_pattern(pattern, path), covers(&p, &t), "{pattern:?} {path:?}");
            }
        }
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        let (hash, root) = ("ab".repeat(32), "cd".repeat(32));
        let entry = format!(
            "title Kiln minimal/2\nsort-key kiln\nversion 5\nefi /EFI/kiln/{hash}.efi\n# release minimal/2\n# root {root}\n"
        );
        let texts = [
            "kiln-5+2-1.conf",
            "kiln-5.failed",
            "minimal/2",
            "00000000-0000-0000-0000-000000000001",
            "ABCD-EFGH",
            "52:54:00:ab:00:01",
            "10%",
            "64M",
            "500ms",
            "00ff",
            "minimal/1/manifest.json",
            "odd%20role.json",
            "http://127.0.0.1:80/x",
            "10.0.0.7/24",
            "2001:db8::7/64",
            "web@1.service",
            "18446744073709551615",
            "*a*b*\nxaxbx",
            "a?/c*\nab/cd",
            &hash,
            &entry,
        ];
        texts.map(|text| text.as_bytes().to_vec()).to_vec()
    }
}
