//! What survives: machines, their boots, hardware and assignment envelopes, the repository versions seen, address leases, and
//! the audit log. SQL that SQLite and PostgreSQL both understand, through sqlx's `Any`.
//!
//! One task writes. Everyone else sends it intents and waits for the commit of those that matter: whoever got an answer
//! finds it again after a crash. Intents that arrive together share a transaction.

mod schema;
mod stale;
mod writer;

use crate::audit::{Line, Record};
use crate::error::StoreError;
use kiln_fleet::{Boot, Entry, Hardware, Machine};
use kiln_protocol::{MachineId, RoleSettings};
use sqlx::any::{AnyConnectOptions, AnyPoolOptions, AnyRow};
use sqlx::{AnyPool, Row};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::Path;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{mpsc, oneshot};

/// An assignment envelope as it was signed.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Envelope {
    /// The text, byte for byte.
    pub text: String,
    /// The key it names.
    pub key: String,
    /// The role it names.
    pub role: String,
    /// What that selects.
    #[serde(default)]
    pub settings: RoleSettings,
    /// Its sequence.
    pub sequence: u64,
    /// When it expires, unix seconds.
    pub expires: i64,
}

/// A machine as stored.
#[derive(Debug)]
pub struct Stored {
    /// The machine with its boots.
    pub machine: Machine,
    /// Its envelope.
    pub envelope: Option<Envelope>,
}

/// What the writer is asked to do.
#[derive(Debug)]
pub(crate) enum Intent {
    Machine {
        id: String,
        doc: String,
        envelope: String,
        boots: Vec<(i64, String)>,
        oldest_boot: i64,
    },
    Forget {
        id: String,
    },
    Hardware {
        id: String,
        doc: String,
    },
    Expected {
        put: Vec<(String, String)>,
        gone: Vec<String>,
    },
    Seen(BTreeMap<MachineId, u64>),
    Note {
        key: String,
        value: String,
    },
    Erase {
        key: String,
    },
    Audit(Line),
    /// Nothing: what it comes with tells of this machine, and is done where what came of it before is.
    About {
        id: String,
    },
    /// Nothing: memory has of this machine again what the database has.
    PutBack {
        id: String,
    },
    /// Nothing: when it is done, so is all that came before.
    Settle,
}

impl Intent {
    /// It changes a row.
    fn writes(&self) -> bool {
        !matches!(self, Self::About { .. } | Self::PutBack { .. } | Self::Settle)
    }

    /// It only asks whether what came before is stored.
    fn asks(&self) -> bool {
        matches!(self, Self::About { .. })
    }
}

type Done = oneshot::Sender<Result<(), StoreError>>;

/// What is handed in at once.
struct Call {
    intents: Vec<Intent>,
    /// Calls of one section are stored together, or not at all; 0: of none.
    section: u64,
    done: Done,
}

thread_local! {
    /// The section that this thread is in. A guard is never kept across an await, so no other task sees it.
    static SECTION: Cell<u64> = const { Cell::new(0) };
}

/// What is handed in while it is held is one section.
pub(crate) struct Whole<'a> {
    _number: MutexGuard<'a, u64>,
}

impl Drop for Whole<'_> {
    fn drop(&mut self) {
        SECTION.set(0);
    }
}

/// The handle of the store.
#[derive(Debug, Clone)]
pub struct Store {
    pool: AnyPool,
    intents: mpsc::UnboundedSender<Call>,
    stale: stale::Stale,
    /// Number of the newest section.
    whole: Arc<Mutex<u64>>,
}

/// A commit that is under way.
#[derive(Debug)]
#[must_use = "an answer is given only after its commit"]
pub struct Commit(oneshot::Receiver<Result<(), StoreError>>);

impl Commit {
    /// Waits for it.
    pub async fn wait(self) -> Result<(), StoreError> {
        self.0.await.unwrap_or(Err(StoreError::Closed))
    }
}

impl Store {
    /// Opens the database, brings it to this version, and starts its writer. The task ends when all handles are gone
    /// and everything is written.
    pub async fn open(path: &Path) -> Result<(Self, tokio::task::JoinHandle<()>), StoreError> {
        sqlx::any::install_default_drivers();
        let open = |source| StoreError::Open { path: path.to_owned(), source };
        let options = AnyConnectOptions::from_str(&format!("sqlite://{}?mode=rwc", path.display())).map_err(open)?;
        let pool = AnyPoolOptions::new().max_connections(1).connect_with(options).await.map_err(open)?;
        // WAL: readers and the writer do not wait for each other. FULL: a commit survives a power cut, too.
        for pragma in ["PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL", "PRAGMA busy_timeout = 5000"] {
            sqlx::query(pragma).execute(&pool).await.map_err(open)?;
        }
        schema::migrate(&pool).await?;
        let (intents, inbox) = mpsc::unbounded_channel();
        let (stale, whole) = (stale::Stale::default(), Arc::default());
        let task = tokio::spawn(writer::run(pool.clone(), inbox, stale.clone(), Arc::clone(&whole)));
        Ok((Self { pool, intents, stale, whole }, task))
    }

    /// Everything, at start.
    pub async fn load(&self) -> Result<BTreeMap<MachineId, Stored>, StoreError> {
        let mut machines = BTreeMap::new();
        for row in sqlx::query("SELECT id, doc, envelope, last_seen FROM machines").fetch_all(&self.pool).await? {
            let stored = stored(&row)?;
            machines.insert(stored.machine.id.clone(), stored);
        }
        for row in sqlx::query("SELECT machine, doc FROM boots ORDER BY machine, number").fetch_all(&self.pool).await? {
            let (id, boot) = boot(&row)?;
            if let Some(stored) = id.parse::<MachineId>().ok().and_then(|id| machines.get_mut(&id)) {
                stored.machine.boots.push_back(boot);
            }
        }
        Ok(machines)
    }

    /// One machine; none: there is no row of it.
    pub async fn machine(&self, id: &MachineId) -> Result<Option<Stored>, StoreError> {
        let row = sqlx::query("SELECT id, doc, envelope, last_seen FROM machines WHERE id = $1").bind(id.as_str());
        let Some(row) = row.fetch_optional(&self.pool).await? else { return Ok(None) };
        let mut stored = stored(&row)?;
        let boots = sqlx::query("SELECT machine, doc FROM boots WHERE machine = $1 ORDER BY number").bind(id.as_str());
        for row in boots.fetch_all(&self.pool).await? {
            stored.machine.boots.push_back(boot(&row)?.1);
        }
        Ok(Some(stored))
    }

    /// What a machine is made of.
    pub async fn hardware(&self, id: &MachineId) -> Result<Option<Hardware>, StoreError> {
        let row = sqlx::query("SELECT doc FROM hardware WHERE machine = $1").bind(id.as_str());
        let Some(row) = row.fetch_optional(&self.pool).await? else { return Ok(None) };
        let bad = |e: serde_json::Error| StoreError::Row { id: id.to_string(), reason: e.to_string() };
        serde_json::from_str(row.try_get("doc")?).map(Some).map_err(bad)
    }

    /// Keeps what a machine that is stored is made of: [`Hardware`] as JSON.
    pub(crate) fn save_hardware(&self, id: &MachineId, doc: String) -> Commit {
        self.send(Intent::Hardware { id: id.to_string(), doc })
    }

    /// The list of expected machines.
    pub async fn expected(&self) -> Result<Vec<Entry>, StoreError> {
        let rows = sqlx::query("SELECT name, doc FROM expected").fetch_all(&self.pool).await?;
        let read = |row: &AnyRow| {
            let id: String = row.try_get("name")?;
            let bad = |e: serde_json::Error| StoreError::Row { id: id.clone(), reason: e.to_string() };
            serde_json::from_str(row.try_get("doc")?).map_err(bad)
        };
        rows.iter().map(read).collect()
    }

    /// Changes the list of expected machines, all at once, and writes the record that tells of it.
    pub(crate) fn change_expected(
        &self,
        put: &[Entry],
        gone: Vec<String>,
        line: Option<Line>,
    ) -> Result<Commit, StoreError> {
        let row = |entry: &Entry| Ok((entry.key(), serde_json::to_string(entry)?));
        let put = put.iter().map(row).collect::<Result<_, StoreError>>()?;
        Ok(self.send_all([Intent::Expected { put, gone }].into_iter().chain(line.map(Intent::Audit)).collect()))
    }

    /// A remembered value.
    pub async fn note(&self, key: &str) -> Result<Option<String>, StoreError> {
        let row = sqlx::query("SELECT value FROM notes WHERE name = $1").bind(key).fetch_optional(&self.pool).await?;
        row.map(|r| r.try_get("value")).transpose().map_err(StoreError::from)
    }

    /// Remembered values whose key begins so.
    pub async fn notes(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        let rows = sqlx::query("SELECT value FROM notes WHERE name LIKE $1 || '%'").bind(prefix).fetch_all(&self.pool);
        rows.await?.iter().map(|r| r.try_get("value").map_err(StoreError::from)).collect()
    }

    /// The newest records of the audit log, newest first; all that was handed in before is among them.
    pub async fn audit_tail(&self, limit: i64) -> Result<Vec<Record>, StoreError> {
        self.send(Intent::Settle).wait().await?;
        writer::audit_tail(&self.pool, limit).await
    }

    /// The records behind a number, oldest first; all that was handed in before is among them.
    pub async fn audit_after(&self, after: u64, limit: i64) -> Result<Vec<Record>, StoreError> {
        self.send(Intent::Settle).wait().await?;
        writer::audit_after(&self.pool, after, limit).await
    }

    /// Remembers a value.
    pub fn remember(&self, key: impl Into<String>, value: impl Into<String>) -> Commit {
        self.send(Intent::Note { key: key.into(), value: value.into() })
    }

    /// Forgets a value.
    pub(crate) fn erase(&self, key: impl Into<String>) -> Commit {
        self.send(Intent::Erase { key: key.into() })
    }

    /// Writes a machine and its newest boots.
    pub(crate) fn save(&self, machine: &Machine, envelope: Option<&Envelope>) -> Result<Commit, StoreError> {
        let number = |b: &Boot| i64::try_from(b.number).unwrap_or(i64::MAX);
        // A step changes at most the two newest boots.
        let boots = machine.boots.iter().rev().take(2);
        let intent = Intent::Machine {
            id: machine.id.to_string(),
            doc: serde_json::to_string(machine)?,
            envelope: serde_json::to_string(&envelope)?,
            boots: boots.map(|b| Ok((number(b), serde_json::to_string(b)?))).collect::<Result<_, StoreError>>()?,
            oldest_boot: machine.boots.front().map_or(0, number),
        };
        Ok(self.send(intent))
    }

    pub(crate) fn forget(&self, id: &MachineId) -> Commit {
        self.send(Intent::Forget { id: id.to_string() })
    }

    /// Remembers a value that memory keeps beside a machine, and is put back with it where it could not be stored.
    pub(crate) fn remember_of(&self, id: &MachineId, key: String, value: String) -> Commit {
        self.send_all(vec![Intent::About { id: id.to_string() }, Intent::Note { key, value }])
    }

    /// Forgets such a value.
    pub(crate) fn erase_of(&self, id: &MachineId, key: String) -> Commit {
        self.send_all(vec![Intent::About { id: id.to_string() }, Intent::Erase { key }])
    }

    /// Last-seen times.
    pub(crate) fn seen(&self, seen: BTreeMap<MachineId, u64>) -> Commit {
        self.send(Intent::Seen(seen))
    }

    pub(crate) fn audit(&self, line: Line) -> Commit {
        self.send(Intent::Audit(line))
    }

    /// Remembers values, and writes the record that tells of them: all of it, or nothing.
    pub(crate) fn remember_all(&self, notes: impl IntoIterator<Item = (String, String)>, line: Line) -> Commit {
        let notes = notes.into_iter().map(|(key, value)| Intent::Note { key, value });
        self.send_all(notes.chain([Intent::Audit(line)]).collect())
    }

    /// The same of a value that is forgotten.
    pub(crate) fn erase_told(&self, key: String, line: Line) -> Commit {
        self.send_all(vec![Intent::Erase { key }, Intent::Audit(line)])
    }

    /// Values that are remembered, others that are forgotten, and the record that tells of it.
    pub(crate) fn change_told(&self, put: Vec<(String, String)>, gone: Vec<String>, line: Line) -> Commit {
        let put = put.into_iter().map(|(key, value)| Intent::Note { key, value });
        let gone = gone.into_iter().map(|key| Intent::Erase { key });
        self.send_all(gone.chain(put).chain([Intent::Audit(line)]).collect())
    }

    /// A record of a step of this machine, which is written where the step can be.
    pub(crate) fn audit_of(&self, id: &MachineId, line: Line) -> Commit {
        self.send_all(vec![Intent::About { id: id.to_string() }, Intent::Audit(line)])
    }

    /// Succeeds once all that was handed in of this machine before is stored. Handed in under the lock under which the machine
    /// is looked at: what is said of it then rests on nothing that a restart would not know.
    pub(crate) fn written(&self, id: &MachineId) -> Commit {
        self.send(Intent::About { id: id.to_string() })
    }

    /// Machines of which a commit failed: nothing of them is written until they are put back.
    pub(crate) fn unwritten(&self) -> Vec<MachineId> {
        self.stale.ids()
    }

    /// What is handed in while this is held shares a transaction: all of it is stored, or nothing. Not for long, and without a
    /// wait for the store.
    pub(crate) fn whole(&self) -> Whole<'_> {
        let mut number = self.whole.lock().unwrap_or_else(PoisonError::into_inner);
        *number += 1;
        SECTION.set(*number);
        Whole { _number: number }
    }

    /// Waits until the writer is through with what was handed in before, whatever came of it.
    pub(crate) async fn settle(&self) {
        let _ = self.send(Intent::Settle).wait().await;
    }

    /// Memory has of this machine what [`Store::machine`] gave.
    pub(crate) fn put_back(&self, id: &MachineId) -> Commit {
        // Whatever becomes of what it is handed in with.
        self.send_in(0, vec![Intent::PutBack { id: id.to_string() }])
    }

    fn send(&self, intent: Intent) -> Commit {
        self.send_all(vec![intent])
    }

    /// They share a transaction.
    fn send_all(&self, intents: Vec<Intent>) -> Commit {
        self.send_in(SECTION.get(), intents)
    }

    fn send_in(&self, section: u64, intents: Vec<Intent>) -> Commit {
        let (done, wait) = oneshot::channel();
        // If the writer is gone the sender is dropped, and the wait says so.
        let _ = self.intents.send(Call { intents, section, done });
        Commit(wait)
    }
}

fn stored(row: &AnyRow) -> Result<Stored, StoreError> {
    let id: String = row.try_get("id")?;
    let bad = |e: serde_json::Error| StoreError::Row { id: id.clone(), reason: e.to_string() };
    let mut machine: Machine = serde_json::from_str(row.try_get("doc")?).map_err(bad)?;
    machine.last_seen = u64::try_from(row.try_get::<i64, _>("last_seen")?).unwrap_or(0).max(machine.last_seen);
    let envelope: Option<Envelope> = serde_json::from_str(row.try_get("envelope")?).map_err(bad)?;
    Ok(Stored { machine, envelope })
}

/// A boot, and whose it is.
fn boot(row: &AnyRow) -> Result<(String, Boot), StoreError> {
    let id: String = row.try_get("machine")?;
    match serde_json::from_str(row.try_get("doc")?) {
        Ok(boot) => Ok((id, boot)),
        Err(e) => Err(StoreError::Row { id, reason: e.to_string() }),
    }
}
