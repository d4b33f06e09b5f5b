//! Secrets: set, listed and removed by people, sealed in the store, and given to machines that have just proven what they
//! booted. Nothing here shows a value: names and versions are all that logs, answers and the audit log have.

mod survey;

use super::{Control, Inner, Pending, now_ms};
use crate::access::Caller;
use crate::audit::Line;
use crate::catalog::Catalog;
use crate::credential;
use crate::error::{ControlError, SecretError, StoreError};
use crate::store::{Commit, Store};
use crate::vault::{OVERHEAD, Vault, forget, seal_once};
use crate::view::SecretView;
use kiln_fleet::{Barred, Machine, Millis};
use kiln_protocol::tpm::{self, EccPoint, Template};
use kiln_protocol::{
    Delivered, HexBytes, KeyId, MachineId, Nonce, ReleaseId, SECRET_LIMIT, SECRETS_OF_A_MACHINE, SecretName, SecretSet,
    SecretVersions, bound_to,
};
use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use survey::Survey;

/// Secrets of a site.
const MAX_SECRETS: usize = 512;
/// The number that was given last. Its key is none that [`PREFIX`] finds.
const NEWEST: &str = "newest-secret";
const PREFIX: &str = "secret/";

/// For whom a secret is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SecretFor {
    /// All machines of a role.
    Role(String),
    /// One machine; it comes before the role's of the same name.
    Machine(MachineId),
}

impl SecretFor {
    fn place(&self) -> String {
        match self {
            Self::Role(role) => format!("role/{role}"),
            Self::Machine(id) => format!("machine/{id}"),
        }
    }

    /// For people.
    fn words(&self) -> String {
        match self {
            Self::Role(role) => format!("role {role}"),
            Self::Machine(id) => format!("machine {id}"),
        }
    }

    fn is_of(&self, machine: &Machine) -> bool {
        match self {
            Self::Role(role) => machine.role.as_ref() == Some(role),
            Self::Machine(id) => machine.id == *id,
        }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Kept {
    of: SecretFor,
    name: SecretName,
    /// Site-wide: no two values ever have the same ([`next_version`]).
    version: u64,
    at: Millis,
    by: String,
    sealed: HexBytes,
}

impl Kept {
    fn note(of: &SecretFor, name: &SecretName) -> String {
        format!("{PREFIX}{}/{name}", of.place())
    }

    /// What its value is bound to.
    fn place(of: &SecretFor, name: &SecretName, version: u64) -> Vec<u8> {
        format!("kiln-secret-1\0{}\0{name}\0{version}", of.place()).into_bytes()
    }

    fn length(&self) -> usize {
        self.sealed.0.len().saturating_sub(OVERHEAD)
    }
}

#[derive(Debug)]
struct Known {
    kept: BTreeMap<(SecretFor, SecretName), Kept>,
    newest: u64,
    vault: Option<Arc<Vault>>,
    /// What each machine was given last, in words and with its boot: the same again is no news.
    given: BTreeMap<MachineId, String>,
}

/// All of a site. Locked after the fleet, where both are.
#[derive(Debug)]
pub(super) struct Secrets {
    known: Mutex<Known>,
    /// Held by whoever changes one, until that is stored.
    changes: Arc<tokio::sync::Mutex<()>>,
    key: PathBuf,
}

impl Secrets {
    /// What the store holds.
    pub(super) async fn load(store: &Store, key: PathBuf) -> Result<Self, ControlError> {
        let bad = |e: serde_json::Error| StoreError::Row { id: PREFIX.to_owned(), reason: e.to_string() };
        let read = |note: String| serde_json::from_str::<Kept>(&note).map_err(bad);
        let kept = store.notes(PREFIX).await?.into_iter().map(read).collect::<Result<Vec<_>, _>>()?;
        let newest = store.note(NEWEST).await?.and_then(|text| text.parse().ok()).unwrap_or(0);
        let newest = kept.iter().map(|kept| kept.version).fold(newest, u64::max);
        // A key that is missing or cannot be read keeps the server from nothing but its secrets.
        let vault = Vault::open(&key).unwrap_or_else(|error| {
            tracing::error!(%error, "secrets are neither given nor taken");
            None
        });
        if vault.is_none() && !kept.is_empty() {
            tracing::error!("{} is missing: nobody is given the secrets that it sealed; restore it", key.display());
        }
        let kept = kept.into_iter().map(|kept| ((kept.of.clone(), kept.name.clone()), kept)).collect();
        let known = Known { kept, newest, vault: vault.map(Arc::new), given: BTreeMap::new() };
        Ok(Self { known: Mutex::new(known), changes: Arc::default(), key })
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().expect("no code panics under this lock")
    }

    /// The only one who changes something.
    async fn turn(&self) -> Turn {
        Arc::clone(&self.changes).lock_owned().await
    }

    /// Takes a change over once it is stored, also if whoever asked for it goes meanwhile: its connection may break. What is not
    /// stored is given to nobody, and nothing is lost for it.
    async fn when_stored(
        self: &Arc<Self>,
        turn: Turn,
        commit: Commit,
        change: impl FnOnce(&mut Known) + Send + 'static,
    ) -> Result<(), StoreError> {
        let secrets = Arc::clone(self);
        let stored = tokio::spawn(async move {
            commit.wait().await?;
            change(&mut secrets.lock());
            drop(turn);
            Ok::<(), StoreError>(())
        });
        stored.await.unwrap_or(Err(StoreError::Closed))
    }
}

/// See [`Secrets::turn`].
type Turn = tokio::sync::OwnedMutexGuard<()>;

impl Known {
    /// What there is for a machine whose release wants these.
    fn of<'a>(&'a self, machine: &Machine, wanted: &[SecretName]) -> BTreeMap<SecretName, &'a Kept> {
        let find = |of: SecretFor, name: &SecretName| self.kept.get(&(of, name.clone()));
        let one = |name: &SecretName| {
            let own = find(SecretFor::Machine(machine.id.clone()), name);
            let role = || find(SecretFor::Role(machine.role.clone()?), name);
            own.or_else(role).map(|kept| (name.clone(), kept))
        };
        wanted.iter().filter_map(one).collect()
    }
}

/// The time in milliseconds, or the number behind the newest: also a database that was restored from a backup, and knows nothing of
/// what was given since, gives no number twice. It stays below 2^53, as JSON wants, for as long as clocks do.
fn next_version(newest: u64, now: Millis) -> u64 {
    now.max(newest + 1)
}

/// What the release that it runs wants; none: it is not known.
fn wants(machine: &Machine, catalog: &Catalog) -> Option<Vec<SecretName>> {
    let Some(running) = &machine.running else { return Some(Vec::new()) };
    let release = ReleaseId { image: running.image.clone(), release: running.release };
    let manifest = &catalog.releases.get(&release)?.manifest;
    let same = manifest.verity.root_hash == running.root_hash.as_str();
    same.then(|| manifest.secrets.iter().filter_map(|wanted| wanted.name.parse().ok()).collect())
}

/// Which releases the site has signed away.
pub(super) fn barred(catalog: &Catalog) -> Barred {
    let revoked = catalog.site.dbx.iter().flat_map(|list| &list.revoked);
    Barred {
        floors: catalog.site.floors.clone(),
        revoked: revoked.filter_map(|program| program.release.parse().ok()).collect(),
    }
}

impl Control {
    /// What a machine shall hold; none: nobody can say, so that it keeps what it has.
    fn wanted_secrets(&self, machine: &Machine, catalog: &Catalog) -> Option<SecretVersions> {
        if !machine.state.kind.in_fleet() {
            // It gets nothing, and what it has is to go.
            return Some(SecretVersions::new());
        }
        let wanted = wants(machine, catalog)?;
        let known = self.secrets.lock();
        Some(known.of(machine, &wanted).into_iter().map(|(name, kept)| (name, kept.version)).collect())
    }

    /// What the machine that proved this key is told of its secrets.
    pub(super) fn secrets_word(&self, id: &MachineId, key: &KeyId) -> Option<kiln_protocol::SecretsWord> {
        let catalog = self.catalog();
        let inner = self.look();
        let machine = inner.machines.get(id)?;
        machine.secrets_word(key, &self.wanted_secrets(machine, &catalog)?, &barred(&catalog))
    }

    /// Sets a secret, or gives it another value: machines get it at their next report.
    pub async fn secret_set(
        &self,
        name: &str,
        of: SecretFor,
        mut value: Vec<u8>,
        by: &Caller,
    ) -> Result<SecretView, ControlError> {
        let turn = self.secrets.turn().await;
        let sealed = self.seal_secret(name, of, &value, by);
        forget(&mut value);
        let (kept, commit) = sealed?;
        let key = (kept.of.clone(), kept.name.clone());
        let put = key.clone();
        self.secrets.when_stored(turn, commit, move |known| drop(known.kept.insert(put, kept))).await?;
        self.wake();
        self.secret_view(&key)
    }

    fn seal_secret(
        &self,
        name: &str,
        of: SecretFor,
        value: &[u8],
        by: &Caller,
    ) -> Result<(Kept, Commit), ControlError> {
        let name: SecretName = name.parse().map_err(SecretError::Name)?;
        if value.is_empty() || value.len() > SECRET_LIMIT {
            return Err(SecretError::Length { got: value.len() }.into());
        }
        let now = now_ms();
        let mut known = self.secrets.lock();
        let known = &mut *known;
        let key = (of, name);
        let (of, name) = &key;
        if !known.kept.contains_key(&key) && known.kept.len() >= MAX_SECRETS {
            return Err(SecretError::TooMany { limit: MAX_SECRETS }.into());
        }
        let beside = known.kept.iter().filter(|(other, _)| other.0 == *of && **other != key);
        if beside.map(|(_, kept)| kept.length()).sum::<usize>() + value.len() > SECRETS_OF_A_MACHINE {
            return Err(SecretError::Together.into());
        }
        let vault = match &known.vault {
            Some(vault) => Arc::clone(vault),
            // A second key beside values of a lost one would hide that they are lost.
            None if !known.kept.is_empty() => return Err(SecretError::KeyMissing(self.secrets.key.clone()).into()),
            None => {
                let found = Vault::open(&self.secrets.key)?;
                let vault = Arc::new(found.map_or_else(|| Vault::make(&self.secrets.key), Ok)?);
                known.vault = Some(Arc::clone(&vault));
                vault
            }
        };
        let version = next_version(known.newest, now);
        let sealed = HexBytes(vault.seal(&Kept::place(of, name, version), value)?);
        let kept = Kept { of: of.clone(), name: name.clone(), version, at: now, by: by.name.clone(), sealed };
        let note = serde_json::to_string(&kept).map_err(StoreError::from)?;
        let what = format!("set the secret {name} of {}: version {version}", of.words());
        let notes = [(NEWEST.to_owned(), version.to_string()), (Kept::note(of, name), note)];
        let commit = self.store.remember_all(notes, Line::done(now, &by.who(), "", what));
        // Also if it is not stored: no number is given twice.
        known.newest = version;
        Ok((kept, commit))
    }

    /// Removes a secret: machines that hold it forget it at their next report.
    pub async fn secret_remove(&self, name: &str, of: SecretFor, by: &Caller) -> Result<SecretView, ControlError> {
        let name: SecretName = name.parse().map_err(SecretError::Name)?;
        let key = (of, name);
        let turn = self.secrets.turn().await;
        let view = self.secret_view(&key)?;
        let (of, name) = &key;
        let what = format!("removed the secret {name} of {}: version {}", of.words(), view.version);
        let line = Line::done(now_ms(), &by.who(), "", what);
        let commit = self.store.erase_told(Kept::note(of, name), line);
        self.secrets.when_stored(turn, commit, move |known| drop(known.kept.remove(&key))).await?;
        self.wake();
        Ok(view)
    }

    /// For whom a secret shall be, by what a person says.
    pub fn secret_for(&self, role: Option<&str>, machine: Option<&str>) -> Result<SecretFor, ControlError> {
        match (role, machine) {
            (Some(role), None) => {
                self.config.image_of(role)?;
                Ok(SecretFor::Role(role.to_owned()))
            }
            (None, Some(machine)) => Ok(SecretFor::Machine(self.look().resolve(machine)?)),
            (Some(_), Some(_)) | (None, None) => Err(SecretError::ForWhom.into()),
        }
    }

    /// All secrets, by name: who may have them, and who holds which version.
    pub fn secrets(&self) -> Vec<SecretView> {
        let mut views = self.secret_views(None);
        views.sort_by(|a, b| (&a.name, &a.role, &a.machine).cmp(&(&b.name, &b.role, &b.machine)));
        views
    }

    fn secret_view(&self, key: &(SecretFor, SecretName)) -> Result<SecretView, ControlError> {
        let (of, name) = key;
        let none = || SecretError::None { name: name.to_string(), of: of.words() };
        Ok(self.secret_views(Some(key)).pop().ok_or_else(none)?)
    }

    /// All, or only one.
    fn secret_views(&self, only: Option<&(SecretFor, SecretName)>) -> Vec<SecretView> {
        let catalog = self.catalog();
        let barred = barred(&catalog);
        let inner = self.look();
        let known = self.secrets.lock();
        let concerned = |machine: &&Machine| only.is_none_or(|(of, _)| of.is_of(machine));
        let machines = inner.machines.values().filter(concerned);
        let survey = Survey::of(machines, known.kept.keys(), &barred, |machine| wants(machine, &catalog));
        let kept = known.kept.iter().filter(|(key, _)| only.is_none_or(|only| *key == only));
        kept.map(|(_, kept)| survey.view(kept)).collect()
    }
}

/// A machine that has just proven its boot, and asks for its secrets.
pub(super) struct Asks<'a> {
    pub(super) id: &'a MachineId,
    pub(super) key: &'a KeyId,
    pub(super) boot_id: &'a str,
    /// Of the proof.
    pub(super) nonce: &'a Nonce,
    /// Whose TPM opens the credential.
    pub(super) endorsement: &'a EccPoint,
    /// The quoted values, which the quote's signature covers.
    pub(super) pcrs: &'a [[u8; 32]],
    /// Public area of its delivery key.
    pub(super) delivery: &'a [u8],
}

impl Control {
    /// Seals a machine's secrets to it. The caller has verified its proof just now; here is asked whether it may have them.
    pub(super) fn deliver(
        &self,
        inner: &Inner,
        asks: &Asks<'_>,
        pending: &mut Pending,
    ) -> Result<Delivered, SecretError> {
        let machine = inner.machines.get(asks.id).ok_or(SecretError::Withheld("it was forgotten".into()))?;
        let catalog = self.catalog();
        if let Some(reason) = machine.secrets_withheld(asks.key, &barred(&catalog)) {
            return Err(SecretError::Withheld(reason));
        }
        // The area is its template with a policy that is worked out here: nothing that it says of itself is believed.
        let policy = tpm::delivery_policy(asks.pcrs).ok_or(SecretError::DeliveryKey)?;
        Template::Delivery(policy).point(asks.delivery).map_err(|_| SecretError::DeliveryKey)?;
        let wanted = wants(machine, &catalog).unwrap_or_default();
        let (set, names) = {
            let known = self.secrets.lock();
            let found = known.of(machine, &wanted);
            if found.is_empty() {
                return Err(SecretError::Withheld("there are none for it".into()));
            }
            let vault = known.vault.as_ref().ok_or_else(|| SecretError::KeyMissing(self.secrets.key.clone()))?;
            let mut values = BTreeMap::new();
            for (name, kept) in &found {
                let place = Kept::place(&kept.of, name, kept.version);
                let value = vault.unseal(&place, &kept.sealed.0);
                let value = value.ok_or_else(|| SecretError::Unsealing { name: name.to_string() })?;
                values.insert(name.clone(), (kept.version, value));
            }
            if values.values().map(|(_, value)| value.len()).sum::<usize>() > SECRETS_OF_A_MACHINE {
                return Err(SecretError::Together);
            }
            let set = SecretSet(values.iter().map(|(name, (n, value))| (name.clone(), (*n, &value[..]))).collect());
            let encoded = set.encode();
            let names: Vec<String> = values.iter().map(|(name, (n, _))| format!("{name} (version {n})")).collect();
            for (_, value) in values.values_mut() {
                forget(value);
            }
            (encoded, names)
        };
        let mut once = [0; 32];
        SystemRandom::new().fill(&mut once).map_err(|_| SecretError::Sealing)?;
        let credential = credential::wrap(&once, asks.endorsement, &tpm::name_of(asks.delivery));
        let sealed = seal_once(&once, &bound_to(asks.id, asks.boot_id, asks.nonce), set);
        forget(&mut once);
        let (credential, sealed) = (credential.map_err(|_| SecretError::Sealing)?, sealed?);
        let what = format!("was given the secrets {}", names.join(", "));
        let given = format!("{} {what}", asks.boot_id);
        let mut known = self.secrets.lock();
        known.given.retain(|id, _| inner.machines.contains_key(id));
        if known.given.insert(asks.id.clone(), given.clone()) != Some(given) {
            self.audit(pending, machine, "kiln", what);
        }
        drop(known);
        Ok(Delivered {
            id_object: HexBytes(credential.id_object),
            encrypted_secret: HexBytes(credential.encrypted_secret),
            sealed: HexBytes(sealed),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_only_grow_whatever_the_clock_says() {
        assert_eq!(next_version(0, 1_800_000_000_000), 1_800_000_000_000);
        assert_eq!(next_version(1_800_000_000_000, 1_800_000_000_000), 1_800_000_000_001, "twice in a millisecond");
        assert_eq!(next_version(1_800_000_000_000, 5), 1_800_000_000_001, "a clock that was set back");
    }
}
