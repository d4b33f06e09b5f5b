//! The tables, and how an older database becomes a newer one: one list of statements per version, only ever appended to.

use crate::error::StoreError;
use sqlx::{AnyPool, Row};

const VERSIONS: &[&[&str]] = &[
    FIRST,
    &["CREATE TABLE hardware (machine TEXT PRIMARY KEY, doc TEXT NOT NULL)"],
    &["CREATE TABLE expected (name TEXT PRIMARY KEY, doc TEXT NOT NULL)"],
    AUDIT_ORIGIN,
];

/// Where a call came from, what came of it, and how the record's hash is formed.
const AUDIT_ORIGIN: &[&str] = &[
    "ALTER TABLE audit ADD COLUMN origin TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE audit ADD COLUMN result TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE audit ADD COLUMN form BIGINT NOT NULL DEFAULT 1",
];

const FIRST: &[&str] = &[
    "CREATE TABLE machines (id TEXT PRIMARY KEY, doc TEXT NOT NULL, envelope TEXT NOT NULL, last_seen BIGINT NOT NULL)",
    "CREATE TABLE boots (machine TEXT NOT NULL, number BIGINT NOT NULL, doc TEXT NOT NULL, PRIMARY KEY (machine, number))",
    "CREATE TABLE notes (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE audit (number BIGINT PRIMARY KEY, at BIGINT NOT NULL, actor TEXT NOT NULL, machine TEXT NOT NULL, \
     what TEXT NOT NULL, hash TEXT NOT NULL)",
];

pub(super) async fn migrate(pool: &AnyPool) -> Result<(), StoreError> {
    sqlx::query("CREATE TABLE IF NOT EXISTS schema_version (version BIGINT NOT NULL)").execute(pool).await?;
    let row = sqlx::query("SELECT COALESCE(MAX(version), 0) AS version FROM schema_version").fetch_one(pool).await?;
    let got: i64 = row.try_get("version")?;
    let known = i64::try_from(VERSIONS.len()).unwrap_or(i64::MAX);
    if got > known {
        return Err(StoreError::TooNew { known, got });
    }
    for (version, statements) in (1_i64..).zip(VERSIONS) {
        if version <= got {
            continue;
        }
        let mut transaction = pool.begin().await?;
        for statement in *statements {
            sqlx::query(*statement).execute(&mut *transaction).await?;
        }
        sqlx::query("INSERT INTO schema_version (version) VALUES ($1)")
            .bind(version)
            .execute(&mut *transaction)
            .await?;
        transaction.commit().await?;
    }
    Ok(())
}
