//! The one task that writes.

use super::stale::Stale;
use super::{Call, Intent};
use crate::audit::Record;
use crate::error::StoreError;
use sqlx::any::AnyRow;
use sqlx::{AnyConnection, AnyPool, AssertSqlSafe, Row};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::mpsc;

/// Calls whose intents share a transaction, if so many wait.
const BATCH: usize = 256;
/// And with what was handed in together with them.
const LARGEST: usize = 16 * BATCH;

pub(super) async fn run(pool: AnyPool, mut inbox: mpsc::UnboundedReceiver<Call>, stale: Stale, whole: Arc<Mutex<u64>>) {
    let mut next = None;
    while let Some(calls) = gather(&mut inbox, &mut next, &whole).await {
        let taken = stale.judge(&calls);
        let wanted: Vec<&[Intent]> =
            calls.iter().zip(&taken).filter(|(_, taken)| **taken).map(|(call, _)| call.intents.as_slice()).collect();
        let writes = wanted.iter().copied().flatten().any(Intent::writes);
        let result = if writes { commit(&pool, &wanted).await } else { Ok(()) };
        if let Err(error) = &result {
            tracing::error!(%error, "the database was not written; nobody is told otherwise");
            // Before anybody hears of it. Whoever only asks has changed nothing.
            let changed: Vec<&[Intent]> =
                wanted.iter().copied().filter(|call| !call.iter().all(Intent::asks)).collect();
            stale.put(&changed);
        }
        for (call, taken) in calls.into_iter().zip(taken) {
            let _ = call.done.send(match (&result, taken) {
                (Ok(()) | Err(_), false) => Err(StoreError::Unwritten),
                (Ok(()), true) => Ok(()),
                // The transaction told of others.
                (Err(_), true) if call.intents.iter().all(Intent::asks) && stale.takes(&call.intents) => Ok(()),
                (Err(error), true) => Err(error.again()),
            });
        }
    }
    pool.close().await;
}

/// What is written next: all that waits, and no section in parts. None: all handles are gone.
async fn gather(
    inbox: &mut mpsc::UnboundedReceiver<Call>,
    next: &mut Option<Call>,
    whole: &Mutex<u64>,
) -> Option<Vec<Call>> {
    let mut batch: Vec<Call> = next.take().into_iter().collect();
    if batch.is_empty() && inbox.recv_many(&mut batch, BATCH).await == 0 {
        return None;
    }
    // Whoever hands in several is through with them.
    let _whole = whole.lock().unwrap_or_else(PoisonError::into_inner);
    // Calls of no section may lie between those of one.
    let mut section = batch.iter().rev().map(|call| call.section).find(|section| *section != 0).unwrap_or(0);
    while let Ok(call) = inbox.try_recv() {
        if batch.len() >= LARGEST && (section == 0 || (call.section != 0 && call.section != section)) {
            *next = Some(call);
            break;
        }
        if call.section != 0 {
            section = call.section;
        }
        batch.push(call);
    }
    Some(batch)
}

/// All of it or nothing. The transaction is begun and ended by its own statements: where the disk is full SQLite ends it by itself,
/// which sqlx does not see, and would then take the next one for a part of it and never commit that.
async fn commit(pool: &AnyPool, intents: &[&[Intent]]) -> Result<(), StoreError> {
    let mut db = pool.acquire().await?;
    let result = transaction(&mut db, intents).await;
    if result.is_err() {
        // It may be over already.
        let _ = sqlx::query("ROLLBACK").execute(&mut *db).await;
    }
    result.map_err(StoreError::or_full)
}

async fn transaction(db: &mut AnyConnection, intents: &[&[Intent]]) -> Result<(), StoreError> {
    sqlx::query("BEGIN").execute(&mut *db).await?;
    for call in intents {
        for intent in *call {
            write(db, intent).await?;
        }
    }
    sqlx::query("COMMIT").execute(&mut *db).await?;
    Ok(())
}

async fn write(db: &mut AnyConnection, intent: &Intent) -> Result<(), StoreError> {
    match intent {
        Intent::Machine { id, doc, envelope, boots, oldest_boot } => {
            sqlx::query(
                "INSERT INTO machines (id, doc, envelope, last_seen) VALUES ($1, $2, $3, 0) \
                 ON CONFLICT (id) DO UPDATE SET doc = excluded.doc, envelope = excluded.envelope",
            )
            .bind(id)
            .bind(doc)
            .bind(envelope)
            .execute(&mut *db)
            .await?;
            for (number, doc) in boots {
                sqlx::query(
                    "INSERT INTO boots (machine, number, doc) VALUES ($1, $2, $3) \
                     ON CONFLICT (machine, number) DO UPDATE SET doc = excluded.doc",
                )
                .bind(id)
                .bind(*number)
                .bind(doc)
                .execute(&mut *db)
                .await?;
            }
            // Too old, or taken back: a boot that turned out to be a stray packet.
            let newest = boots.first().map_or(i64::MAX, |(n, _)| *n);
            sqlx::query("DELETE FROM boots WHERE machine = $1 AND (number < $2 OR number > $3)")
                .bind(id)
                .bind(*oldest_boot)
                .bind(newest)
                .execute(&mut *db)
                .await?;
        }
        Intent::Forget { id } => {
            sqlx::query("DELETE FROM machines WHERE id = $1").bind(id).execute(&mut *db).await?;
            sqlx::query("DELETE FROM boots WHERE machine = $1").bind(id).execute(&mut *db).await?;
            sqlx::query("DELETE FROM hardware WHERE machine = $1").bind(id).execute(&mut *db).await?;
        }
        Intent::Hardware { id, doc } => {
            // Not of a machine that was forgotten meanwhile.
            sqlx::query(
                "INSERT INTO hardware (machine, doc) SELECT id, $2 FROM machines WHERE id = $1 \
                 ON CONFLICT (machine) DO UPDATE SET doc = excluded.doc",
            )
            .bind(id)
            .bind(doc)
            .execute(&mut *db)
            .await?;
        }
        Intent::Expected { put, gone } => expected(db, put, gone).await?,
        Intent::Seen(seen) => {
            for (id, at) in seen {
                sqlx::query("UPDATE machines SET last_seen = $2 WHERE id = $1")
                    .bind(id.as_str())
                    .bind(i64::try_from(*at).unwrap_or(i64::MAX))
                    .execute(&mut *db)
                    .await?;
            }
        }
        Intent::Note { key, value } => {
            sqlx::query(
                "INSERT INTO notes (name, value) VALUES ($1, $2) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
            )
            .bind(key)
            .bind(value)
            .execute(&mut *db)
            .await?;
        }
        Intent::Settle | Intent::About { .. } | Intent::PutBack { .. } => {}
        Intent::Erase { key } => {
            sqlx::query("DELETE FROM notes WHERE name = $1").bind(key).execute(&mut *db).await?;
        }
        Intent::Audit(line) => {
            let last = sqlx::query("SELECT number, hash FROM audit ORDER BY number DESC LIMIT 1")
                .fetch_optional(&mut *db)
                .await?;
            let (number, before) = match last {
                Some(row) => (row.try_get::<i64, _>("number")? + 1, row.try_get::<String, _>("hash")?),
                None => (1, String::new()),
            };
            let record = line.clone().follow(u64::try_from(number).unwrap_or(0), &before);
            sqlx::query(
                "INSERT INTO audit (number, at, actor, origin, machine, what, result, form, hash) \
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
            )
            .bind(number)
            .bind(i64::try_from(record.at).unwrap_or(i64::MAX))
            .bind(record.actor)
            .bind(record.origin)
            .bind(record.machine)
            .bind(record.what)
            .bind(record.result)
            .bind(i64::from(record.form))
            .bind(record.hash)
            .execute(&mut *db)
            .await?;
        }
    }
    Ok(())
}

/// Rows of one statement when a list is imported: one by one a long list would take seconds.
const ROWS: usize = 200;

async fn expected(db: &mut AnyConnection, put: &[(String, String)], gone: &[String]) -> Result<(), StoreError> {
    for names in gone.chunks(ROWS) {
        let places: Vec<String> = (1..=names.len()).map(|n| format!("${n}")).collect();
        let sql = format!("DELETE FROM expected WHERE name IN ({})", places.join(", "));
        let query = names.iter().fold(sqlx::query(AssertSqlSafe(sql)), sqlx::query::Query::bind);
        query.execute(&mut *db).await?;
    }
    for rows in put.chunks(ROWS) {
        let places: Vec<String> = (0..rows.len()).map(|n| format!("(${}, ${})", 2 * n + 1, 2 * n + 2)).collect();
        let sql = format!(
            "INSERT INTO expected (name, doc) VALUES {} ON CONFLICT (name) DO UPDATE SET doc = excluded.doc",
            places.join(", ")
        );
        let query = sqlx::query(AssertSqlSafe(sql));
        let query = rows.iter().fold(query, |query, (name, doc)| query.bind(name).bind(doc));
        query.execute(&mut *db).await?;
    }
    Ok(())
}

const AUDIT: &str = "SELECT number, at, actor, origin, machine, what, result, form, hash FROM audit";

fn record(row: &AnyRow) -> Result<Record, StoreError> {
    let number = |name| row.try_get::<i64, _>(name).map(|n| u64::try_from(n).unwrap_or(0));
    Ok(Record {
        number: number("number")?,
        at: number("at")?,
        actor: row.try_get("actor")?,
        origin: row.try_get("origin")?,
        machine: row.try_get("machine")?,
        what: row.try_get("what")?,
        result: row.try_get("result")?,
        form: u32::try_from(number("form")?).unwrap_or(0),
        hash: row.try_get("hash")?,
    })
}

/// The newest records, newest first.
pub(super) async fn audit_tail(pool: &AnyPool, limit: i64) -> Result<Vec<Record>, StoreError> {
    let text = format!("{AUDIT} ORDER BY number DESC LIMIT $1");
    let rows = sqlx::query(AssertSqlSafe(text)).bind(limit).fetch_all(pool).await?;
    rows.iter().map(record).collect()
}

/// Records behind a number, oldest first.
pub(super) async fn audit_after(pool: &AnyPool, after: u64, limit: i64) -> Result<Vec<Record>, StoreError> {
    let text = format!("{AUDIT} WHERE number > $1 ORDER BY number LIMIT $2");
    let after = i64::try_from(after).unwrap_or(i64::MAX);
    let rows = sqlx::query(AssertSqlSafe(text)).bind(after).bind(limit).fetch_all(pool).await?;
    rows.iter().map(record).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Store;
    use kiln_fleet::Machine;
    use kiln_protocol::MachineId;
    use tokio::sync::oneshot;

    #[tokio::test]
    async fn whoever_asks_hears_of_a_step_that_was_not_stored_and_of_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let (store, _task) = Store::open(&dir.path().join("kiln.db")).await.unwrap();
        let refuses = "CREATE TRIGGER refuses BEFORE INSERT ON machines BEGIN SELECT RAISE(ABORT, 'no room'); END";
        sqlx::query(refuses).execute(&store.pool).await.unwrap();
        let id = |n: u8| format!("00000000-0000-0000-0000-0000000000{n:02x}").parse::<MachineId>().unwrap();
        let saved = store.save(&Machine::discovered(id(1), 1), None).unwrap();
        let (its_own, of_another) = (store.written(&id(1)), store.written(&id(2)));
        assert!(saved.wait().await.is_err() && its_own.wait().await.is_err());
        of_another.wait().await.unwrap();
        store.put_back(&id(1)).wait().await.unwrap();
        store.written(&id(1)).wait().await.unwrap();
    }

    #[tokio::test]
    async fn a_section_is_never_cut() {
        let (calls, mut inbox) = mpsc::unbounded_channel();
        let hand_in = |section| {
            let call = Call { intents: vec![Intent::Settle], section, done: oneshot::channel().0 };
            assert!(calls.send(call).is_ok());
        };
        // One that is longer than a transaction gets otherwise, with others' calls between; then the next.
        for _ in 0..LARGEST {
            hand_in(1);
        }
        for section in [0, 1, 0, 1, 2, 2] {
            hand_in(section);
        }
        let (mut next, whole) = (None, Mutex::new(0));
        let first = gather(&mut inbox, &mut next, &whole).await.unwrap();
        assert_eq!(first.len(), LARGEST + 4);
        let second = gather(&mut inbox, &mut next, &whole).await.unwrap();
        assert_eq!(second.iter().map(|call| call.section).collect::<Vec<_>>(), [2, 2]);
        drop(calls);
        assert!(gather(&mut inbox, &mut next, &whole).await.is_none());
    }
}
