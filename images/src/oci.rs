//! The programs of a container image, for an allow-list: an OCI image layout beside the recipe (OCI image-spec 1.1,
//! image-layout.md, manifest.md, layer.md) is read, every blob is checked against its digest from the manifest's on, the
//! layers are laid over each other, and what is left that may be executed is hashed. So the digest of an image in a recipe
//! says which programs may start, and nothing is believed of the layout but what that digest commits to.

use crate::tarball::{self, Kind};
use kiln_release::hex::{is_sha256, sha256};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};

/// Longest manifest or configuration.
const DOCUMENT: u64 = 4 << 20;
/// Longest layer, as it is and unpacked.
const LAYER: u64 = 4 << 30;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    #[serde(default)]
    manifests: Option<Vec<Descriptor>>,
    #[serde(default)]
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Vec<Descriptor>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    media_type: String,
    digest: String,
    #[serde(default)]
    platform: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct Configuration {
    rootfs: RootFs,
}

#[derive(Deserialize)]
struct RootFs {
    diff_ids: Vec<String>,
}

/// SHA-256 of the programs of the image with this manifest digest (`sha256:…`), sorted; and the manifest's bytes. What is
/// wrong is said in a sentence.
pub(crate) fn programs(layout: &Path, digest: &str) -> Result<(Vec<String>, Vec<u8>), String> {
    let bytes = blob(layout, digest, DOCUMENT)?;
    let manifest: Manifest = json(&bytes, digest)?;
    if let Some(images) = manifest.manifests {
        let of = |d: &Descriptor| {
            let platform = d.platform.as_ref().map_or_else(String::new, |platform| format!(" {platform}"));
            format!("{}{platform}", d.digest)
        };
        let images: Vec<String> = images.iter().map(of).collect();
        return Err(format!("{digest} is an index: name one of its images: {}", images.join(", ")));
    }
    let config = manifest.config.ok_or_else(|| format!("{digest} is no image manifest: it has no config"))?;
    let config: Configuration = json(&blob(layout, &config.digest, DOCUMENT)?, &config.digest)?;
    let layers = manifest.layers.len();
    if layers != config.rootfs.diff_ids.len() {
        let ids = config.rootfs.diff_ids.len();
        return Err(format!("{digest} has {layers} layers, and its configuration names {ids}"));
    }
    let mut files = BTreeMap::new();
    for (layer, diff_id) in manifest.layers.iter().zip(&config.rootfs.diff_ids) {
        let tar = unpack(layer, blob(layout, &layer.digest, LAYER)?)?;
        let got = format!("sha256:{}", sha256(&tar));
        if got != *diff_id {
            return Err(format!("layer {} unpacks to {got}; the configuration says {diff_id}", layer.digest));
        }
        lay_over(&mut files, &tar).map_err(|what| format!("layer {}: {what}", layer.digest))?;
    }
    let programs: BTreeSet<String> = files.into_values().filter_map(|file| file.program.then_some(file.hash)).collect();
    Ok((programs.into_iter().collect(), bytes))
}

/// A blob that is what its name says.
fn blob(layout: &Path, digest: &str, limit: u64) -> Result<Vec<u8>, String> {
    let hex = digest.strip_prefix("sha256:").filter(|hex| is_sha256(hex));
    let hex = hex.ok_or_else(|| format!("{digest:?} is no digest of the form sha256:…"))?;
    let path = layout.join("blobs/sha256").join(hex);
    let file = std::fs::File::open(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let bytes = read(file, limit).map_err(|error| format!("{}: {error}", path.display()))?;
    let got = sha256(&bytes);
    if got == hex { Ok(bytes) } else { Err(format!("{}: its content has the digest sha256:{got}", path.display())) }
}

fn read(from: impl Read, limit: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.take(limit + 1).read_to_end(&mut bytes)?;
    let over = std::io::Error::other(format!("more than {limit} bytes"));
    if bytes.len() as u64 > limit { Err(over) } else { Ok(bytes) }
}

fn json<T: for<'a> Deserialize<'a>>(bytes: &[u8], digest: &str) -> Result<T, String> {
    serde_json::from_slice(bytes).map_err(|error| format!("{digest}: {error}"))
}

/// A layer's tar. Its media type says how it is packed; that it was unpacked rightly shows in its diff id.
fn unpack(layer: &Descriptor, bytes: Vec<u8>) -> Result<Vec<u8>, String> {
    let fail = |what: String| format!("layer {}: {what}", layer.digest);
    let kind = layer.media_type.rsplit(['.', '+']).next().unwrap_or_default();
    match kind {
        "tar" => Ok(bytes),
        "zstd" => {
            let reader = zstd::stream::read::Decoder::new(bytes.as_slice());
            reader.and_then(|reader| read(reader, LAYER)).map_err(|error| fail(error.to_string()))
        }
        "gzip" => gunzip(bytes).map_err(|error| fail(format!("gzip: {error}"))),
        _ => Err(fail(format!("{} is not a layer that this builder reads (tar, gzip, zstd)", layer.media_type))),
    }
}

/// By the host's gzip: what comes of it is checked like everything else.
fn gunzip(bytes: Vec<u8>) -> std::io::Result<Vec<u8>> {
    use std::io::Write;
    let mut command = Command::new("gzip");
    let mut child = command.args(["-d", "-c"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let (input, output) = (child.stdin.take(), child.stdout.take());
    // One that reads no more shows in its status and in the digest.
    let feed = std::thread::spawn(move || input.map(|mut input| input.write_all(&bytes)));
    let unpacked = output.map_or_else(|| Ok(Vec::new()), |output| read(output, LAYER));
    let _ = feed.join();
    let status = child.wait()?;
    if status.success() { unpacked } else { Err(std::io::Error::other(format!("it ended with {status}"))) }
}

#[derive(Clone)]
struct File {
    program: bool,
    hash: String,
}

/// Lays a layer over those before it: what it removes (layer.md, "Whiteouts") first, because that is of the layers below.
fn lay_over(files: &mut BTreeMap<String, File>, tar: &[u8]) -> Result<(), String> {
    let entries = tarball::entries(tar).map_err(|e| format!("{} at byte {}", e.what, e.offset))?;
    for entry in &entries {
        let (folder, name) = entry.path.rsplit_once('/').unwrap_or(("", entry.path.as_str()));
        if name == ".wh..wh..opq" {
            remove_below(files, folder);
        } else if let Some(name) = name.strip_prefix(".wh.") {
            let path = format!("{folder}/{name}");
            files.remove(&path);
            remove_below(files, &path);
        }
    }
    for entry in &entries {
        if entry.path.rsplit('/').next().is_some_and(|name| name.starts_with(".wh.")) {
            continue;
        }
        match &entry.kind {
            Kind::File => {
                let file = File { program: entry.mode & 0o111 != 0, hash: sha256(&tar[entry.data.clone()]) };
                remove_below(files, &entry.path);
                files.insert(entry.path.clone(), file);
            }
            Kind::Hardlink(to) => {
                let file = files.get(to).cloned().ok_or_else(|| format!("{} is a link to nothing", entry.path))?;
                files.insert(entry.path.clone(), file);
            }
            Kind::Directory => drop(files.remove(&entry.path)),
            Kind::Symlink(_) | Kind::CharDevice(..) | Kind::BlockDevice(..) | Kind::Fifo | Kind::Other(_) => {
                files.remove(&entry.path);
                remove_below(files, &entry.path);
            }
        }
    }
    Ok(())
}

fn remove_below(files: &mut BTreeMap<String, File>, folder: &str) {
    let folder = format!("{folder}/");
    files.retain(|path, _| !path.starts_with(&folder));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tarball::{Added, Content};
    use serde_json::json;

    fn tar(files: &[(&str, u32, &str)]) -> Vec<u8> {
        let added = files.iter().map(|(path, mode, text)| Added {
            path: (*path).to_owned(),
            mode: *mode,
            content: Content::File(text.as_bytes().to_vec()),
        });
        tarball::layer(&[0; 1024], |_| false, &added.collect::<Vec<_>>()).unwrap()
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("layer");
        std::fs::write(&path, bytes).unwrap();
        Command::new("gzip").arg("-c").arg(&path).output().unwrap().stdout
    }

    struct Layout(tempfile::TempDir);

    impl Layout {
        fn put(&self, bytes: &[u8]) -> String {
            let hex = sha256(bytes);
            std::fs::create_dir_all(self.0.path().join("blobs/sha256")).unwrap();
            std::fs::write(self.0.path().join("blobs/sha256").join(&hex), bytes).unwrap();
            format!("sha256:{hex}")
        }

        /// An image of these layers, packed so; its manifest's digest.
        fn image(&self, layers: &[(&str, Vec<u8>, Vec<u8>)]) -> String {
            let ids: Vec<String> = layers.iter().map(|(_, tar, _)| format!("sha256:{}", sha256(tar))).collect();
            let config = self.put(json!({ "rootfs": { "type": "layers", "diff_ids": ids } }).to_string().as_bytes());
            let of = |(kind, _, blob): &(&str, Vec<u8>, Vec<u8>)| {
                let kind = format!("application/vnd.oci.image.layer.v1.tar{kind}");
                json!({ "mediaType": kind, "digest": self.put(blob), "size": blob.len() })
            };
            let layers: Vec<serde_json::Value> = layers.iter().map(of).collect();
            let config = json!({ "mediaType": "application/vnd.oci.image.config.v1+json", "digest": config });
            self.put(json!({ "schemaVersion": 2, "config": config, "layers": layers }).to_string().as_bytes())
        }
    }

    fn hashes(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| sha256(text.as_bytes())).collect::<BTreeSet<_>>().into_iter().collect()
    }

    #[test]
    fn the_programs_of_all_layers_are_listed_but_those_that_a_later_one_removes() {
        let layout = Layout(tempfile::tempdir().unwrap());
        let low = tar(&[
            ("/bin/sh", 0o755, "sh"),
            ("/bin/gone", 0o755, "gone"),
            ("/etc/passwd", 0o644, "root"),
            ("/opt/old/tool", 0o755, "tool"),
            ("/usr/bin/app", 0o755, "app 1"),
            ("/var/cache/x", 0o755, "cached"),
        ]);
        let high = tar(&[
            ("/bin/.wh.gone", 0o644, ""),
            ("/opt/.wh.old", 0o644, ""),
            ("/usr/bin/app", 0o755, "app 2"),
            ("/var/cache/.wh..wh..opq", 0o644, ""),
            ("/var/cache/y", 0o711, "fresh"),
        ]);
        let zstd = zstd::stream::encode_all(high.as_slice(), 3).unwrap();
        let image = layout.image(&[("+gzip", low.clone(), gzip(&low)), ("+zstd", high.clone(), zstd)]);
        let (programs, manifest) = programs(layout.0.path(), &image).unwrap();
        assert_eq!(programs, hashes(&["sh", "app 2", "fresh"]));
        assert_eq!(format!("sha256:{}", sha256(&manifest)), image);
    }

    #[test]
    fn what_the_digest_does_not_commit_to_is_refused() {
        let layout = Layout(tempfile::tempdir().unwrap());
        let (layer, other) = (tar(&[("/a", 0o755, "a")]), tar(&[("/b", 0o755, "b")]));
        let refused = |digest: &str| programs(layout.0.path(), digest).unwrap_err();
        // A blob under another's name; a layer that unpacks to something else than the configuration says.
        let image = layout.image(&[("", layer.clone(), layer.clone())]);
        std::fs::write(layout.0.path().join("blobs/sha256").join(sha256(&layer)), &other).unwrap();
        assert!(refused(&image).contains("its content has the digest"), "{}", refused(&image));
        let swapped = layout.image(&[("", layer.clone(), other.clone())]);
        assert!(refused(&swapped).contains("the configuration says"), "{}", refused(&swapped));
        let torn = layout.image(&[("+gzip", layer.clone(), b"no gzip".to_vec())]);
        assert!(refused(&torn).contains("gzip"), "{}", refused(&torn));
        let strange = layout.image(&[("+xz", layer.clone(), other)]);
        assert!(refused(&strange).contains("not a layer that this builder reads"), "{}", refused(&strange));
        let index = json!({ "manifests": [{ "mediaType": "m", "digest": image, "platform": { "os": "linux" } }] });
        let index = layout.put(index.to_string().as_bytes());
        assert!(refused(&index).contains("is an index") && refused(&index).contains(&image), "{}", refused(&index));
        for digest in ["latest", "sha256:../../x", "sha512:00"] {
            assert!(refused(digest).contains("no digest"), "{}", refused(digest));
        }
        assert!(refused(&format!("sha256:{}", "0".repeat(64))).contains("No such file"));
    }
}
