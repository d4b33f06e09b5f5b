//! What a signer's machine, and whoever applies, refuse.

use super::{Ceremonial, PASSPHRASE, later};
use kiln_images::request::Request;
use kiln_images::sealed::{Passphrase, public_file, read_public};
use kiln_images::{SiteError, drop_request, raise_floor, sign_request};
use std::fs;

/// What a request says of the state before decides which differences are told.
#[test]
fn what_is_taken_away_is_told_or_nothing_is_signed() {
    let ceremonial = Ceremonial::finished();
    let site = &ceremonial.site;
    for release in [1, 2] {
        ceremonial.publish(release, later(1));
        let first: &[&str] = if release == 1 { &["targets-ann", "targets-bob"] } else { &[] };
        ceremonial.all_sign(&[first, &["image-ann", "image-bob", "snapshot-ann"]].concat(), later(1));
    }
    let prune = kiln_images::PruneOptions { image: "minimal".into(), keep: 1, grace: None, dry_run: false };
    let done = kiln_images::prune::<SiteError>(site, &prune, later(1), |_| Ok([].into())).unwrap();
    assert!(done.request.is_some());
    let good: serde_json::Value = serde_json::from_slice(&fs::read(ceremonial.carried()).unwrap()).unwrap();
    let bad = ceremonial.dir.path().join("bad.json");
    let write = |request: &serde_json::Value| fs::write(&bad, request.to_string()).unwrap();
    write(&good);
    let words = Request::read(&bad).unwrap().words(later(1)).unwrap().join("\n");
    assert!(words.contains("REMOVES minimal/1/manifest.json"), "{words}");
    let refused = |request: &serde_json::Value, reason: &str| {
        write(request);
        let read = Request::read(&bad);
        let told = read.and_then(|request| request.words(later(1))).unwrap_err();
        let signed = ceremonial.sign(&bad, "image-ann").unwrap_err();
        assert!([&told, &signed].iter().all(|error| error.to_string().contains(reason)), "{told}; {signed}");
    };
    // Without the list before, or with an older one that was signed all the same.
    let mut without = good.clone();
    without["base"].as_object_mut().unwrap().remove("image-minimal");
    refused(&without, "image-minimal version 3 shall replace nothing of it");
    let mut older = good.clone();
    older["base"]["image-minimal"] =
        fs::read_to_string(site.repo().join("metadata/1.image-minimal.json")).unwrap().into();
    refused(&older, "shall replace version 1 of it");
    // Two of a kind: one that is read, and one that is signed with it.
    let mut twice = good.clone();
    let documents = twice["documents"].as_array_mut().unwrap();
    documents.push(documents[0].clone());
    refused(&twice, "is in it twice");
    drop_request(&site.path).unwrap();
    // The same of the site's own object.
    assert!(raise_floor(&site.path, "minimal", 2, later(1)).unwrap().waiting.is_some());
    let mut floors: serde_json::Value = serde_json::from_slice(&fs::read(ceremonial.carried()).unwrap()).unwrap();
    floors["base"].as_object_mut().unwrap().remove("site.json");
    write(&floors);
    let told = Request::read(&bad).unwrap().words(later(1)).unwrap_err();
    assert!(told.to_string().contains("site.json before is not in the request"), "{told}");
}

#[test]
fn what_is_altered_on_the_way_gets_no_signature_in() {
    let ceremonial = Ceremonial::finished();
    let site = &ceremonial.site;
    ceremonial.publish(1, later(1));
    let good = ceremonial.carried();
    let text = fs::read_to_string(&good).unwrap();
    let bad = ceremonial.dir.path().join("bad.json");
    let write = |text: &str| fs::write(&bad, text).unwrap();

    // A longer life, put in on the stick: its signatures are of another document.
    write(&text.replacen("\"expires\": \"2026-", "\"expires\": \"2036-", 1));
    ceremonial.sign(&bad, "image-ann").unwrap();
    let refused = ceremonial.apply(&bad, later(1)).unwrap_err();
    assert!(matches!(refused, SiteError::OtherRequest { .. }), "{refused}");
    // A manifest other than the one that is signed is not shown as if it were.
    write(&text.replace("console=ttyS0", "init=/bin/sh  "));
    assert!(Request::read(&bad).unwrap().words(later(1)).is_err());
    // A base that nobody signed could hide a difference.
    write(&text.replacen("\\\"version\\\":1", "\\\"version\\\":7", 1));
    assert!(Request::read(&bad).and_then(|request| request.words(later(1))).is_err());
    // A path out of the repository.
    write(&text.replace("metadata/1.image-minimal.json", "metadata/../../x"));
    assert!(Request::read(&bad).is_err());
    write(&text.replace("targets/minimal/1/", "targets/../../1/"));
    assert!(Request::read(&bad).is_err());
    // A forged signature is left out, and what was signed stays.
    ceremonial.sign(&good, "image-ann").unwrap();
    let signed = fs::read_to_string(&good).unwrap();
    let at = signed.find("\"sig\": \"").unwrap() + 8;
    let flipped = if &signed[at..=at] == "0" { "1" } else { "0" };
    write(&format!("{}{flipped}{}", &signed[..at], &signed[at + 1..]));
    let request = Request::read(&bad).unwrap();
    let mut open = site.read_open_request().unwrap().unwrap();
    assert_eq!(open.merge(&request).unwrap(), 0);
    assert_eq!(open.merge(&Request::read(&good).unwrap()).unwrap(), 1);
    // A stranger's key under a signer's name: the fingerprint that is shown would be that signer's.
    let stranger = Ceremonial::person(ceremonial.dir.path(), "other");
    let theirs = kiln_release::hex::encode(read_public(&public_file(&stranger)).unwrap().as_bytes());
    let anns = kiln_release::hex::encode(read_public(&public_file(&ceremonial.key("image-ann"))).unwrap().as_bytes());
    assert!(text.contains(&format!("\"public\": \"{anns}\"")));
    write(&text.replace(&format!("\"public\": \"{anns}\""), &format!("\"public\": \"{theirs}\"")));
    let refused = Request::read(&bad).unwrap_err();
    assert!(refused.to_string().contains("is not the key id of its key"), "{refused}");
    // Words cannot obey a terminal.
    write(&text.replace("\"name\": \"publish", "\"name\": \"\\u001b[2Jpublish"));
    let words = Request::read(&bad).unwrap().words(later(1)).unwrap().join("\n");
    assert!(!words.contains('\u{1b}') && words.contains("?[2Jpublish"), "{words}");
    // Nor turn a line round: a key's name could make another fingerprint of it.
    write(&text.replace("\"image-ann\"", "\"image-\u{202e}nna\""));
    let words = Request::read(&bad).unwrap().words(later(1)).unwrap().join("\n");
    assert!(!words.contains('\u{202e}') && words.contains("image-?nna"), "{words}");
    // Whoever has no part in it signs nothing.
    let stranger = Ceremonial::person(ceremonial.dir.path(), "stranger");
    let ask = || Ok::<_, SiteError>(Passphrase::of_line(PASSPHRASE));
    let refused = sign_request(&mut Request::read(&good).unwrap(), &good, &stranger, false, ask).unwrap_err();
    assert!(matches!(refused, SiteError::NotASigner { .. }), "{refused}");
}

/// The machine with the key remembers.
#[test]
fn a_key_signs_for_one_site_and_one_document_of_a_version() {
    let ceremonial = Ceremonial::finished();
    let site = &ceremonial.site;
    ceremonial.publish(1, later(1));
    let first = ceremonial.dir.path().join("first.json");
    fs::copy(site.open_request(), &first).unwrap();
    ceremonial.sign(&first, "image-ann").unwrap();
    drop_request(&site.path).unwrap();
    ceremonial.publish(2, later(2));
    let second = ceremonial.dir.path().join("second.json");
    fs::copy(site.open_request(), &second).unwrap();
    let refused = ceremonial.sign(&second, "image-ann").unwrap_err();
    assert!(matches!(refused, SiteError::SignedOther { version: 1, .. }), "{refused}");
    let ask = || Ok::<_, SiteError>(Passphrase::of_line(PASSPHRASE));
    sign_request(&mut Request::read(&second).unwrap(), &second, &ceremonial.key("image-ann"), true, ask).unwrap();
    for name in ["image-bob", "targets-ann", "targets-bob", "snapshot-ann"] {
        ceremonial.sign(&second, name).unwrap();
    }
    ceremonial.apply(&second, later(2)).unwrap();
    ceremonial.publish(3, later(3));
    ceremonial.all_sign(&["image-ann", "image-bob", "snapshot-ann"], later(3));
    // The old request again, once a newer version is signed.
    let refused = ceremonial.sign(&first, "image-ann").unwrap_err();
    assert!(matches!(refused, SiteError::SignedNewer { version: 1, last: 2, .. }), "{refused}");

    // Another site with the same people's keys, made by whoever writes requests.
    let other = Ceremonial::finished();
    other.publish(1, later(1));
    let mut request = Request::read(&other.carried()).unwrap();
    let forged = ceremonial.dir.path().join("forged.json");
    request.name = "publish minimal/4".into();
    request.write(&forged).unwrap();
    fs::copy(ceremonial.key("image-ann").with_extension("key.seen"), other.key("image-ann").with_extension("key.seen"))
        .unwrap();
    let refused = other.sign(&forged, "image-ann").unwrap_err();
    assert!(matches!(refused, SiteError::OtherRoot { .. }), "{refused}");
}

#[test]
fn a_wrong_passphrase_signs_nothing() {
    let ceremonial = Ceremonial::begin();
    let file = ceremonial.carried();
    let before = fs::read(&file).unwrap();
    let ask = || Ok::<_, SiteError>(Passphrase::of_line("not the passphrase"));
    let refused =
        sign_request(&mut Request::read(&file).unwrap(), &file, &ceremonial.key("root-ann"), false, ask).unwrap_err();
    assert!(matches!(refused, SiteError::WrongPassphrase { .. }), "{refused}");
    assert_eq!(fs::read(&file).unwrap(), before);
    assert!(!ceremonial.key("root-ann").with_extension("key.seen").exists());
}
