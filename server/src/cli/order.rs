//! Orders and receipts as files. What signs and what checks works without a server, on a machine that never sees one.

use super::client::Client;
use super::error::CliError;
use super::file;
use super::output::{now_ms, pretty, print, segment};
use super::table::{ago, table};
use super::{Assign, At, site};
use crate::receipt;
use crate::view::{MachineView, OrderView, ReceiptView, ReleaseView};
use clap::{Args, Subcommand};
use jiff::{SignedDuration, Timestamp};
use kiln_protocol::{
    Class, KeyId, KeyStorage, ORDER_TYPE, Order as Document, OrderAction, OrderedMachine, Receipt, ReleaseId,
    SPEC_VERSION, Via, WipeMethod,
};
use kiln_release::canonical::{canonical, parse_strict};
use kiln_release::{PublicKey, Signer, hex, sign_envelope};
use reqwest::Method;
use ring::rand::{SecureRandom, SystemRandom};
use serde_json::json;
use std::fmt::Write as _;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use tokio::runtime::Runtime;

#[derive(Debug, Subcommand)]
pub(super) enum Order {
    /// Make an operator's key: FILE is secret, FILE.pub is for `kiln trust operators`
    Key {
        /// Where; it must not exist
        file: PathBuf,
    },
    /// Sign an order into a file, which is carried to the boot server
    #[command(subcommand)]
    Sign(Sign),
    /// Add an operator's signature to an order
    Cosign {
        /// The order
        file: PathBuf,
        /// The operator's key
        #[arg(long)]
        key: PathBuf,
    },
    /// Hand an order to the boot server, which hands it to the machines it names
    Submit {
        /// The order
        file: PathBuf,
        /// How machines go to the release that it assigns: kexec or cold
        #[arg(long, default_value = "kexec")]
        via: Via,
        #[command(flatten)]
        at: At,
    },
    /// Every order that was submitted, and what came of it
    List {
        #[command(flatten)]
        at: At,
        /// JSON instead of a table
        #[arg(long)]
        json: bool,
    },
    /// Check a wipe's receipt, without a server; fails unless every disk that was ordered is wiped
    VerifyReceipt {
        /// The receipt
        file: PathBuf,
        /// The machine's key, as `kiln machine show` prints it: the receipt must be signed with it
        #[arg(long)]
        key: Option<KeyId>,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum Sign {
    /// Machines run a release that is not of class normal
    Assign {
        /// IMAGE/NUMBER, as rescue/2
        release: ReleaseId,
        /// The release's class: rescue, acceptance or wipe
        #[arg(long)]
        class: Class,
        #[command(flatten)]
        signing: Signing,
    },
    /// Machines wipe their disks
    Wipe {
        #[command(flatten)]
        disks: Disks,
        #[command(flatten)]
        signing: Signing,
    },
}

#[derive(Debug, Args)]
pub(super) struct Signing {
    /// For whom, as ID:KEY (`kiln machine show` prints both); a machine without a lasting key by ID alone
    #[arg(long, required = true)]
    machine: Vec<Named>,
    /// An operator's key; may be given more than once
    #[arg(long, required = true)]
    key: Vec<PathBuf>,
    /// How long it holds, as 4h or 2d; default: 24h, but 1h for a wipe of a machine that is named by ID alone
    #[arg(long, value_parser = site::grace)]
    expires: Option<SignedDuration>,
    /// The file to write
    #[arg(long)]
    out: PathBuf,
}

#[derive(Debug, Clone, Args)]
#[group(required = true)]
pub(super) struct Disks {
    /// Every disk that is not removable
    #[arg(long = "all-disks", conflicts_with = "disk")]
    all: bool,
    /// A disk's serial number; may be given more than once
    #[arg(long)]
    disk: Vec<String>,
    /// Write over every byte even where the disk erases itself
    #[arg(long)]
    overwrite: bool,
}

#[derive(Debug, Args)]
pub(super) struct Wipe {
    /// Name or id
    machine: String,
    /// A signed order (`kiln order sign wipe`)
    #[arg(long, conflicts_with_all = ["order_key", "all_disks", "disk", "overwrite"])]
    order: Option<PathBuf>,
    /// An operator's key, where it is at hand: the order is signed and submitted in one step
    #[arg(long, required_unless_present = "order")]
    order_key: Vec<PathBuf>,
    /// Every disk that is not removable
    #[arg(long, conflicts_with = "disk", required_unless_present_any = ["disk", "order"])]
    all_disks: bool,
    /// A disk's serial number; may be given more than once
    #[arg(long)]
    disk: Vec<String>,
    /// Write over every byte even where the disk erases itself
    #[arg(long)]
    overwrite: bool,
    /// How long the order holds, as 4h or 2d; default: 24h, but 1h for a machine without a lasting key
    #[arg(long, value_parser = site::grace)]
    expires: Option<SignedDuration>,
    #[command(flatten)]
    at: At,
}

/// ID or ID:KEY.
#[derive(Debug, Clone)]
pub(super) struct Named(OrderedMachine);

impl FromStr for Named {
    type Err = kiln_protocol::IdError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (id, key) = text.split_once(':').map_or((text, None), |(id, key)| (id, Some(key)));
        let key = key.map(|key| key.to_ascii_lowercase().parse()).transpose()?;
        Ok(Self(OrderedMachine { id: id.to_ascii_lowercase().parse()?, key }))
    }
}

pub(super) fn run(command: Order, runtime: impl Fn() -> Result<Runtime, CliError>) -> Result<(), CliError> {
    match command {
        Order::Key { file } => make_key(&file),
        Order::Sign(Sign::Assign { release, class, signing }) => {
            let action = OrderAction::Assign { image: release.image, release: release.release, class };
            sign_to_file(action, signing)
        }
        Order::Sign(Sign::Wipe { disks, signing }) => {
            sign_to_file(wipe_of(disks.all, disks.disk, disks.overwrite), signing)
        }
        Order::Cosign { file, key } => cosign(&file, &key),
        Order::Submit { file, via, at } => {
            let text = read(&file)?;
            runtime()?.block_on(submit(&at, &text, via))
        }
        Order::List { at, json } => runtime()?.block_on(list(&at, json)),
        Order::VerifyReceipt { file, key } => verify_receipt(&file, key.as_ref()),
    }
}

pub(super) fn operators(keys: &[PathBuf], threshold: u32, site: &Path) -> Result<(), CliError> {
    let keys = keys.iter().map(|path| public_key(path)).collect::<Result<Vec<_>, _>>()?;
    let done = kiln_images::name_operators(site, &keys, threshold, Timestamp::now())?;
    if done.waiting.is_none() {
        println!("orders need the signatures of {threshold} of {} operators from now on", keys.len());
    }
    super::trust::said(&done);
    Ok(())
}

/// In one step: the order is signed here and submitted.
pub(super) async fn wipe(wipe: Wipe) -> Result<(), CliError> {
    if let Some(file) = &wipe.order {
        return submit(&wipe.at, &read(file)?, Via::Cold).await;
    }
    let machine = machine(&wipe.at, &wipe.machine).await?;
    let action = wipe_of(wipe.all_disks, wipe.disk, wipe.overwrite);
    let text = sign(action, vec![machine], &wipe.order_key, wipe.expires)?;
    submit(&wipe.at, &text, Via::Cold).await
}

/// The same for a release.
pub(super) async fn assign(assign: &Assign) -> Result<(), CliError> {
    let releases: Vec<ReleaseView> = Client::new(&assign.at)?.get("releases").await?;
    let ReleaseId { image, release } = assign.release.clone();
    let published = releases.iter().find(|r| r.image == image.as_str() && r.release == release);
    let class = published.and_then(|r| r.class.parse().ok()).ok_or(CliError::NoRelease(assign.release.clone()))?;
    let machine = machine(&assign.at, &assign.machine).await?;
    let action = OrderAction::Assign { image, release, class };
    let text = sign(action, vec![machine], &assign.order_key, Some(assign.expires))?;
    submit(&assign.at, &text, assign.via.unproven()).await
}

pub(super) async fn receipt(at: &At, machine: &str, out: Option<&Path>) -> Result<(), CliError> {
    let path = format!("machines/{}/receipts", segment(machine));
    let receipts: Vec<ReceiptView> = Client::new(at)?.get(&path).await?;
    let newest = receipts.first().ok_or_else(|| CliError::NoReceipt(machine.to_owned()))?;
    // What the server shows is not believed: the file alone counts.
    let file = out.unwrap_or(Path::new("receipt"));
    let receipt = checked(file, newest.text.as_bytes())?;
    if let Some(out) = out {
        write(out, newest.text.as_bytes(), 0o644)?;
    }
    print(&show(&receipt))
}

async fn machine(at: &At, name: &str) -> Result<OrderedMachine, CliError> {
    let view: MachineView = Client::new(at)?.get(&format!("machines/{}", segment(name))).await?;
    let key = view.key.ok_or(CliError::NoIdentity(view.name))?;
    let lasting = view.key_storage != Some(KeyStorage::Ephemeral);
    Ok(OrderedMachine { id: view.id, key: lasting.then_some(key) })
}

async fn submit(at: &At, text: &str, via: Via) -> Result<(), CliError> {
    let body = json!({ "order": text, "via": via });
    let view: OrderView = Client::new(at)?.change(Method::POST, "orders", &body).await?;
    let names: Vec<&str> = view.machines.iter().map(|m| m.name.as_str()).collect();
    let text = format!("order {} is handed to {}: {}\n", view.id, names.join(", "), view.action);
    print(&text)
}

async fn list(at: &At, json: bool) -> Result<(), CliError> {
    let orders: Vec<OrderView> = Client::new(at)?.get("orders").await?;
    if json {
        return print(&pretty(&orders)?);
    }
    let now = now_ms();
    let rows = orders.iter().flat_map(|order| {
        order.machines.iter().map(move |machine| {
            vec![
                order.id.to_string(),
                ago(order.submitted_ms, now),
                order.by.clone(),
                order.action.clone(),
                machine.name.clone(),
                order.expires.to_string(),
                machine.state.clone(),
            ]
        })
    });
    print(&table(&["ORDER", "SUBMITTED", "BY", "WHAT", "MACHINE", "EXPIRES", "STATE"], &rows.collect::<Vec<_>>()))
}

fn wipe_of(all: bool, disks: Vec<String>, overwrite: bool) -> OrderAction {
    let method = if overwrite { WipeMethod::Overwrite } else { WipeMethod::Best };
    OrderAction::Wipe { disks: if all { Vec::new() } else { disks }, method }
}

/// How long an order holds if nobody says it. A machine without a lasting key forgets with each boot that it was wiped, and is
/// wiped in every boot in which a server gives it the order until that expires.
fn lasts(action: &OrderAction, machines: &[OrderedMachine]) -> SignedDuration {
    match action {
        OrderAction::Wipe { .. } if machines.iter().any(|machine| machine.key.is_none()) => {
            SignedDuration::from_hours(1)
        }
        OrderAction::Wipe { .. } | OrderAction::Assign { .. } => SignedDuration::from_hours(24),
    }
}

fn random<const N: usize>() -> Result<[u8; N], CliError> {
    let mut bytes = [0; N];
    let none = |_| CliError::Runtime(std::io::Error::other("the kernel gives no random numbers"));
    SystemRandom::new().fill(&mut bytes).map_err(none)?;
    Ok(bytes)
}

fn sign(
    action: OrderAction,
    machines: Vec<OrderedMachine>,
    keys: &[PathBuf],
    expires: Option<SignedDuration>,
) -> Result<String, CliError> {
    let holds = expires.unwrap_or_else(|| lasts(&action, &machines));
    let now = Timestamp::from_second(Timestamp::now().as_second()).unwrap_or_default();
    let order = Document {
        type_: ORDER_TYPE.into(),
        spec_version: SPEC_VERSION.into(),
        id: hex::encode(&random::<16>()?).parse().expect("16 bytes are 32 hex digits"),
        machines,
        action,
        issued: now,
        expires: now.saturating_add(holds).unwrap_or(Timestamp::MAX),
    };
    let keys = keys.iter().map(|path| secret_key(path)).collect::<Result<Vec<_>, _>>()?;
    Ok(sign_envelope(&order, &keys.iter().collect::<Vec<_>>())?)
}

fn sign_to_file(action: OrderAction, signing: Signing) -> Result<(), CliError> {
    let Signing { machine, key, expires, out } = signing;
    let what = action.to_string();
    let text = sign(action, machine.into_iter().map(|Named(machine)| machine).collect(), &key, expires)?;
    write(&out, text.as_bytes(), 0o644)?;
    println!("{} is to {what}: carry it to the boot server, `kiln order submit {0}`", out.display());
    Ok(())
}

fn cosign(file: &Path, key: &Path) -> Result<(), CliError> {
    let bad = |reason: String| CliError::NotAnOrder { path: file.to_owned(), reason };
    let mut envelope = parse_strict(read(file)?.as_bytes()).map_err(|e| bad(e.to_string()))?;
    let signed = envelope.get("signed").cloned().unwrap_or_default();
    let order: Document = serde_json::from_value(signed.clone()).map_err(|e| bad(e.to_string()))?;
    if order.type_ != ORDER_TYPE {
        return Err(bad(format!("_type is {:?}", order.type_)));
    }
    let signer = secret_key(key)?;
    let keyid = signer.public().id();
    let message = canonical(&signed).map_err(|e| bad(e.to_string()))?;
    let list = envelope.get_mut("signatures").and_then(serde_json::Value::as_array_mut);
    let list = list.ok_or_else(|| bad("no `signatures`".into()))?;
    list.retain(|signature| signature["keyid"] != keyid.as_str());
    list.push(json!({ "keyid": keyid, "sig": hex::encode(&signer.sign(&message)) }));
    let signatures = list.len();
    let text = format!("{envelope}\n");
    std::fs::write(file, text).map_err(|source| CliError::File { path: file.to_owned(), source })?;
    println!("{}: order {} is to {}; it has {signatures} signatures", file.display(), order.id, order.action);
    Ok(())
}

fn verify_receipt(file: &Path, key: Option<&KeyId>) -> Result<(), CliError> {
    let receipt = checked(file, read(file)?.as_bytes())?;
    if let Some(expected) = key.filter(|key| **key != receipt.key) {
        let (expected, got) = (expected.to_string(), receipt.key.to_string());
        return Err(CliError::ReceiptKey { path: file.to_owned(), expected, got });
    }
    print(&show(&receipt))?;
    if key.is_none() {
        println!("compare the key with the machine's, or give it with --key");
    }
    match receipt::failed(&receipt) {
        failed if failed.is_empty() => Ok(()),
        failed => Err(CliError::NotWiped(failed.join("; "))),
    }
}

fn checked(file: &Path, text: &[u8]) -> Result<Receipt, CliError> {
    receipt::verify(text).map_err(|source| CliError::Receipt { path: file.to_owned(), source })
}

fn show(receipt: &Receipt) -> String {
    let mut text = String::new();
    for (name, value) in [
        ("machine", receipt.machine.to_string()),
        ("key", receipt.key.to_string()),
        ("order", receipt.order.to_string()),
        ("finished", format!("{}, after {} s", receipt.finished, receipt.seconds)),
    ] {
        writeln!(text, "{name:<12} {value}").expect("writing to a String cannot fail");
    }
    let rows: Vec<Vec<String>> = receipt
        .disks
        .iter()
        .map(|disk| {
            let (outcome, methods) = (disk.outcome.to_string(), disk.methods.join(", "));
            let (bytes, detail) = (disk.bytes.to_string(), disk.detail.clone());
            vec![disk.name.clone(), disk.model.clone(), disk.serial.clone(), bytes, outcome, methods, detail]
        })
        .collect();
    text + &table(&["DISK", "MODEL", "SERIAL", "BYTES", "OUTCOME", "METHODS", "VERIFIED"], &rows)
}

fn make_key(file: &Path) -> Result<(), CliError> {
    let signer = Signer::from_seed(&random::<32>()?);
    write(file, signer.pkcs8_pem().as_bytes(), 0o600)?;
    let public = file.with_file_name(format!("{}.pub", file.file_name().unwrap_or_default().to_string_lossy()));
    write(&public, format!("{}\n", hex::encode(&signer.public_bytes())).as_bytes(), 0o644)?;
    println!(
        "{} is secret: keep it off the boot server. {} is for `kiln trust operators`",
        file.display(),
        public.display()
    );
    Ok(())
}

fn secret_key(path: &Path) -> Result<Signer, CliError> {
    let reason = |e: kiln_release::KeyError| CliError::NotAKey { path: path.to_owned(), reason: e.to_string() };
    Signer::from_pkcs8_pem(&read(path)?).map_err(reason)
}

fn public_key(path: &Path) -> Result<PublicKey, CliError> {
    let bytes = hex::decode(read(path)?.trim()).and_then(|bytes| <[u8; 32]>::try_from(bytes).ok());
    let reason = "not a public key of 64 hex digits, as `kiln order key` writes it".to_owned();
    bytes.map(PublicKey::ed25519).ok_or(CliError::NotAKey { path: path.to_owned(), reason })
}

/// Orders, receipts and keys are small.
fn read(path: &Path) -> Result<String, CliError> {
    file::read_text(path, receipt::MAX_RECEIPT as u64)
}

/// A new file; one that is there is not written over.
fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<(), CliError> {
    let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
    file.and_then(|mut f| f.write_all(bytes)).map_err(|source| CliError::File { path: path.to_owned(), source })
}
