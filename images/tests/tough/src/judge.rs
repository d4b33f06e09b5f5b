//! Judges TUF repositories: one JSON object a line in, one a line out, as `images/tests/images/differential/oracle.py`
//! does.

use crate::files::Files;
use crate::{Failure, why};
use aws_lc_rs::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use tough::error::Error;
use tough::{IntoVec as _, Repository, RepositoryLoader, TargetName};
use url::Url;

/// The same repository at later times; one client sees them all. Bytes are in hex.
#[derive(Deserialize)]
struct Case {
    root: String,
    states: Vec<BTreeMap<String, String>>,
    targets: Vec<String>,
}

/// What came of one state: each text is `ok`, `ok SHA256`, or why not.
#[derive(Serialize)]
struct Verdict {
    refresh: String,
    targets: BTreeMap<String, String>,
}

pub async fn run() -> Result<(), Failure> {
    for line in std::io::stdin().lines() {
        let verdicts = judge(&serde_json::from_str(&line?)?).await?;
        println!("{}", serde_json::to_string(&verdicts)?);
    }
    Ok(())
}

async fn judge(case: &Case) -> Result<Vec<Verdict>, Failure> {
    let memory = Path::new("/dev/shm");
    let store = if memory.is_dir() { tempfile::tempdir_in(memory)? } else { tempfile::tempdir()? };
    let root = hex::decode(&case.root)?;
    let mut verdicts = Vec::new();
    for state in &case.states {
        let mut files = BTreeMap::new();
        for (path, bytes) in state {
            files.insert(path.clone(), hex::decode(bytes)?);
        }
        verdicts.push(update(&root, Files::Memory(Arc::new(files)), store.path(), &case.targets).await?);
    }
    Ok(verdicts)
}

async fn update(root: &[u8], files: Files, store: &Path, paths: &[String]) -> Result<Verdict, Failure> {
    // tough keeps it once the four top-level roles are accepted, and never reads it: it tells whether that was so in an
    // update that failed later. Delegated roles are loaded all at once, whatever is wanted of them.
    let accepted = store.join("targets.json");
    if accepted.exists() {
        std::fs::remove_file(&accepted)?;
    }
    let mut targets = BTreeMap::new();
    match load(root, files, store).await {
        Ok(repository) => {
            for path in paths {
                let text = match target(&repository, path).await {
                    Ok(Some(bytes)) => format!("ok {}", hex::encode(digest(&SHA256, &bytes))),
                    Ok(None) => "not listed".to_owned(),
                    Err(error) => why(&error),
                };
                targets.insert(path.clone(), text);
            }
        }
        Err(error) if accepted.exists() => {
            let text = format!("delegations: {}", why(&error));
            targets.extend(paths.iter().map(|path| (path.clone(), text.clone())));
        }
        Err(error) => return Ok(Verdict { refresh: why(&error), targets }),
    }
    Ok(Verdict { refresh: "ok".to_owned(), targets })
}

/// One update; `store` is what the client keeps.
pub async fn load(root: &[u8], files: Files, store: &Path) -> Result<Repository, Error> {
    let base = |folder: &str| Url::parse(&format!("files:///{folder}/")).expect("a URL");
    RepositoryLoader::new(&root, base("metadata"), base("targets")).transport(files).datastore(store).load().await
}

/// The bytes of a target, if any role lists it.
pub async fn target(repository: &Repository, path: &str) -> Result<Option<Vec<u8>>, Error> {
    match repository.read_target(&TargetName::new(path)?).await? {
        Some(stream) => stream.into_vec().await.map(Some),
        None => Ok(None),
    }
}
