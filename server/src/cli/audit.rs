//! `kiln audit`: who did what, and whether the record of it is whole. `verify` needs no server: an export and the trust
//! root's site.json are enough.

use super::At;
use super::client::Client;
use super::error::CliError;
use super::file;
use super::output::{pretty, print};
use super::table::table;
use crate::audit::{Checker, HEAD_TYPE, Head, Record};
use clap::Subcommand;
use jiff::Timestamp;
use kiln_images::{Repository, SiteDir};
use std::path::{Path, PathBuf};

#[derive(Debug, Subcommand)]
pub(super) enum Audit {
    /// The newest records, newest first
    List {
        #[command(flatten)]
        at: At,
        /// JSON instead of a table
        #[arg(long)]
        json: bool,
    },
    /// All records, oldest first, a line of JSON each
    Export {
        /// Write them to this file instead of the terminal
        #[arg(long)]
        out: Option<PathBuf>,
        #[command(flatten)]
        at: At,
    },
    /// The newest record's number and hash, signed by the director: keep it elsewhere, and `verify --head` finds a log whose
    /// end was cut off
    Head {
        #[command(flatten)]
        at: At,
    },
    /// Check that no record was changed, put in or taken out
    Verify {
        /// An export, instead of the server's log
        #[arg(long)]
        file: Option<PathBuf>,
        /// A head that was handed out before, as `kiln audit head` printed it; may be given more than once
        #[arg(long)]
        head: Vec<PathBuf>,
        #[command(flatten)]
        at: At,
    },
}

pub(super) async fn audit(command: Audit) -> Result<(), CliError> {
    match command {
        Audit::List { at, json } => {
            let records: Vec<Record> = Client::new(&at)?.get("audit").await?;
            print(&if json { pretty(&records)? } else { list(&records) })
        }
        Audit::Export { out, at } => export(&at, out.as_deref()).await,
        Audit::Head { at } => print(&Client::new(&at)?.get_text("audit/head").await?),
        Audit::Verify { file, head, at } => verify(file.as_deref(), &head, &at).await,
    }
}

/// Hands each piece of the log to `take`, oldest first.
async fn pages(at: &At, mut take: impl FnMut(&[Record]) -> Result<(), CliError>) -> Result<(), CliError> {
    let client = Client::new(at)?;
    let mut after = 0;
    loop {
        let page: Vec<Record> = client.get(&format!("audit/records?after={after}")).await?;
        let Some(last) = page.last() else { return Ok(()) };
        if last.number <= after {
            return Err(CliError::Broken("the server gives the same records again".to_owned()));
        }
        after = last.number;
        take(&page)?;
    }
}

async fn export(at: &At, out: Option<&Path>) -> Result<(), CliError> {
    use std::io::Write;
    let fail = |path: &Path, source| CliError::File { path: path.to_owned(), source };
    let mut file = match out {
        Some(path) => Some((path, std::fs::File::create_new(path).map_err(|e| fail(path, e))?)),
        None => None,
    };
    let mut count = 0;
    pages(at, |page| {
        count += page.len();
        let mut text = String::new();
        for record in page {
            text.push_str(&serde_json::to_string(record)?);
            text.push('\n');
        }
        match &mut file {
            Some((path, file)) => file.write_all(text.as_bytes()).map_err(|e| fail(path, e)),
            None => print(&text),
        }
    })
    .await?;
    if let Some((path, file)) = file {
        file.sync_all().map_err(|e| fail(path, e))?;
        eprintln!("{count} records in {}", path.display());
    }
    Ok(())
}

async fn verify(file: Option<&Path>, heads: &[PathBuf], at: &At) -> Result<(), CliError> {
    let heads: Vec<(u64, String)> = heads.iter().map(|path| read_head(path, at)).collect::<Result<_, _>>()?;
    let count = heads.len();
    let mut checker = Checker::new(heads);
    let broken = |e: crate::audit::ChainError| CliError::Broken(e.to_string());
    match file {
        Some(path) => {
            let text = std::fs::read_to_string(path);
            let text = text.map_err(|source| CliError::Read { path: path.to_owned(), source })?;
            for (line, text) in text.lines().enumerate() {
                let record: Record = serde_json::from_str(text)
                    .map_err(|e| CliError::Broken(format!("line {} is no record: {e}", line + 1)))?;
                checker.take(&record).map_err(broken)?;
            }
        }
        None => pages(at, |page| page.iter().try_for_each(|record| checker.take(record).map_err(broken))).await?,
    }
    let (number, hash) = checker.end().map_err(broken)?;
    let against = match count {
        0 => "without a head that was handed out: that nothing was cut off at its end is not shown".to_owned(),
        n => format!("and agree with {n} heads that were handed out"),
    };
    print(&format!(
        "{number} records follow each other, {against}\nhead {number} {}\n",
        if hash.is_empty() { "-" } else { &hash }
    ))
}

/// Longest head that is read.
const HEAD_LIMIT: u64 = 64 << 10;

/// A head, if the site's director signed it.
fn read_head(path: &Path, at: &At) -> Result<(u64, String), CliError> {
    let bytes = file::read(path, HEAD_LIMIT)?;
    let wrong = |reason: String| CliError::Broken(format!("{}: {reason}", path.display()));
    let Some(dir) = &at.site else {
        return Err(wrong("whose director signed it is said by the site directory: use --site".to_owned()));
    };
    let site = Repository::newest(&SiteDir::open(dir)?, Timestamp::now())?.site;
    let (head, _) = site.verify_director::<Head>(&bytes).map_err(|e| wrong(e.to_string()))?;
    if head.type_ != HEAD_TYPE || head.site != site.name {
        return Err(wrong("it is no head of this site's audit log".to_owned()));
    }
    Ok((head.number, head.hash))
}

fn list(records: &[Record]) -> String {
    let time = |ms: u64| {
        let at = Timestamp::from_millisecond(i64::try_from(ms).unwrap_or(i64::MAX)).unwrap_or_default();
        at.strftime("%Y-%m-%d %H:%M:%S").to_string()
    };
    let rows: Vec<Vec<String>> = records
        .iter()
        .map(|r| {
            let who = if r.origin.is_empty() { r.actor.clone() } else { format!("{} from {}", r.actor, r.origin) };
            vec![r.number.to_string(), time(r.at), who, r.machine.clone(), r.what.clone(), r.result.clone()]
        })
        .collect();
    table(&["NUMBER", "TIME (UTC)", "WHO", "MACHINE", "WHAT", "RESULT"], &rows)
}
