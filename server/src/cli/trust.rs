//! `kiln trust`: a site's keys and signed metadata. What signs works without a network, on a machine that sees no server;
//! what raises a floor asks the running server first.

use super::ask::{Ask, nobody_needs};
use super::error::CliError;
use super::output::print;
use super::secret::{consent, new_passphrase, passphrase};
use super::site::{NOT_SERVED, SecureBoot};
use super::{machine_ca, order, site, trust_status, tuf_client};
use clap::{Args, Subcommand};
use jiff::{SignedDuration, Timestamp};
use kiln_images::request::Request;
use kiln_images::sealed::{self, KeyFile, fingerprint};
use kiln_images::{Applied, Ceremony, Changed, RoleHolders, SignerMemory, SiteDir, SiteError, TakenAway, Waiting};
use kiln_protocol::{ImageName, ReleaseId};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use tokio::runtime::Runtime;

#[derive(Debug, Subcommand)]
pub(super) enum Trust {
    /// Make a site directory: a lab's, or one whose keys people hold
    Init(Init),
    /// Make a signer's key, encrypted with a passphrase: FILE is secret, FILE.pub is for `kiln trust init` and `rotate`
    Key {
        /// Where; it must not exist
        file: PathBuf,
        /// Do not encrypt it: for tests, or where the medium itself is encrypted
        #[arg(long)]
        no_passphrase: bool,
        /// Read the passphrase from this file's first line instead of asking
        #[arg(long, conflicts_with = "no_passphrase")]
        passphrase_file: Option<PathBuf>,
    },
    /// Print keys as people compare them on paper
    Fingerprint {
        /// Keys, or their FILE.pub
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// Show in plain words what a signing request asks for
    Show {
        /// The request
        file: PathBuf,
    },
    /// Show a signing request in plain words, then sign it; needs no network and no site directory
    Sign {
        /// The request; the signature is added to it
        file: PathBuf,
        /// The signer's key
        #[arg(long)]
        key: PathBuf,
        /// Read the passphrase from this file's first line instead of asking
        #[arg(long)]
        passphrase_file: Option<PathBuf>,
        /// The root's fingerprints were compared with those on paper: do not ask, at a key's first signature
        #[arg(long)]
        yes: bool,
        /// Sign although this key has signed another document of the same version: that request was given up
        #[arg(long)]
        instead: bool,
    },
    /// Take signatures into the site's open request; with the last one it goes live
    Apply {
        /// Signed copies of the request
        files: Vec<PathBuf>,
        #[command(flatten)]
        ask: Ask,
    },
    /// Give up the site's open request; machines have seen nothing of it
    Drop {
        /// The site directory, with offline/
        #[arg(long, env = "KILN_SITE")]
        site: PathBuf,
    },
    /// Give other keys to root, targets, snapshot, timestamp, director, agent-api or image-NAME
    Rotate {
        /// Whose keys
        role: String,
        /// N:FILE.pub,FILE.pub,…: so many of these keys must sign; online keys and a lab's are made here
        #[arg(long)]
        keys: Option<Holders>,
        /// The site directory, with offline/
        #[arg(long, env = "KILN_SITE")]
        site: PathBuf,
    },
    /// Give another key to the CA of machines' certificates: announce, switch, forget, in this order
    MachineCa {
        /// Which step
        #[arg(value_enum)]
        step: machine_ca::Step,
        /// The site directory, with online/
        #[arg(long, env = "KILN_SITE")]
        site: PathBuf,
    },
    /// Revoke a release (IMAGE/NUMBER: dbx names its boot program) or a key (its FILE.pub, or the start of its
    /// fingerprint: it signs nothing any more)
    Revoke {
        /// IMAGE/NUMBER, as minimal/2; or a key
        what: String,
        /// The site directory, with offline/
        #[arg(long, env = "KILN_SITE")]
        site: PathBuf,
        /// Read the passphrase of the KEK, which signs dbx, from this file's first line instead of asking
        #[arg(long)]
        passphrase_file: Option<PathBuf>,
    },
    /// Sign anew what is about to expire, with new dates and no other change
    #[command(visible_alias = "expire")]
    Renew {
        /// What expires within this time, as 90d
        #[arg(long, default_value = "90d", value_parser = site::grace)]
        within: SignedDuration,
        /// The site directory, with offline/
        #[arg(long, env = "KILN_SITE")]
        site: PathBuf,
    },
    /// Raise the floor of an image: no machine runs a lower release ever again
    Floor {
        /// The image, as minimal
        image: ImageName,
        /// Lowest release that may run
        #[arg(value_parser = clap::value_parser!(u64).range(1..))]
        floor: u64,
        #[command(flatten)]
        ask: Ask,
    },
    /// Every TUF role: version, dates, keys, who has signed; and what waits for signatures
    Status {
        /// The site directory
        #[arg(long, env = "KILN_SITE")]
        site: PathBuf,
        /// JSON instead of text
        #[arg(long)]
        json: bool,
    },
    /// Name the operators whose keys sign orders: made with `kiln order key`, kept off the boot server
    Operators {
        /// Public keys of all operators, as `kiln order key FILE` leaves them in FILE.pub
        #[arg(required = true)]
        keys: Vec<PathBuf>,
        /// So many of them must sign an order
        #[arg(long, default_value_t = 1)]
        threshold: u32,
        /// The site directory, with offline/
        #[arg(long, env = "KILN_SITE")]
        site: PathBuf,
    },
    /// Sign how machines are connected; each tries it at its next boot, and goes back if it loses the server
    Network {
        /// The configuration, TOML: see docs/operations.md
        file: PathBuf,
        /// The site directory, with offline/
        #[arg(long, env = "KILN_SITE")]
        site: PathBuf,
    },
    /// Read any TUF repository with Kiln's client, keeping its files in a folder: for interoperability tests
    TufClient(tuf_client::TufClient),
    /// Keys and files for Secure Boot
    #[command(subcommand, name = "secureboot")]
    SecureBoot(SecureBoot),
}

#[derive(Debug, Args)]
pub(super) struct Init {
    /// Threshold 1 and unencrypted keys: for a lab
    #[arg(long, conflicts_with = "keys", required_unless_present = "keys")]
    lab: bool,
    /// The site directory; it must not exist or be empty
    dir: PathBuf,
    /// The site's name
    #[arg(long, default_value = "lab")]
    name: String,
    /// ROLE=N:FILE.pub,FILE.pub,…, once for each of root, targets, snapshot and images, and for operators if there are
    /// any: so many of these keys must sign
    #[arg(long)]
    keys: Vec<RoleKeys>,
    /// So many days what they sign holds
    #[arg(long, default_value_t = 365, requires = "keys")]
    days: u32,
}

/// Public keys by file, and how many must sign.
#[derive(Debug, Clone)]
pub(super) struct Holders {
    threshold: u32,
    files: Vec<PathBuf>,
}

impl FromStr for Holders {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "expected N:FILE.pub,FILE.pub,…".to_owned();
        let (threshold, files) = text.split_once(':').ok_or_else(wrong)?;
        let files: Vec<PathBuf> = files.split(',').filter(|file| !file.is_empty()).map(PathBuf::from).collect();
        Ok(Self { threshold: threshold.parse().map_err(|_| wrong())?, files })
    }
}

impl Holders {
    fn read(&self) -> Result<RoleHolders, SiteError> {
        let key = |file: &PathBuf| {
            // A key is called as its file is.
            let name = file.file_stem().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            Ok::<_, SiteError>((name.trim_end_matches(".key").to_owned(), sealed::read_public(file)?))
        };
        let keys = self.files.iter().map(key).collect::<Result<_, _>>()?;
        Ok(RoleHolders { threshold: self.threshold, keys })
    }
}

/// ROLE=….
#[derive(Debug, Clone)]
pub(super) struct RoleKeys {
    role: String,
    holders: Holders,
}

impl FromStr for RoleKeys {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (role, holders) = text.split_once('=').ok_or("expected ROLE=N:FILE.pub,FILE.pub,…")?;
        if !["root", "targets", "snapshot", "images", "operators"].contains(&role) {
            return Err(format!("{role} is none of root, targets, snapshot, images and operators"));
        }
        Ok(Self { role: role.to_owned(), holders: holders.parse()? })
    }
}

pub(super) fn run(command: Trust, runtime: impl Fn() -> Result<Runtime, CliError>) -> Result<(), CliError> {
    let now = Timestamp::now();
    match command {
        Trust::Init(init) => self::init(&init, now),
        Trust::Key { file, no_passphrase, passphrase_file } => key(&file, no_passphrase, passphrase_file.as_deref()),
        Trust::Fingerprint { files } => fingerprints(&files),
        Trust::Show { file } => print(&(Request::read(&file)?.words(now)?.join("\n") + "\n")),
        Trust::Sign { file, key, passphrase_file, yes, instead } => {
            sign(&file, &key, passphrase_file.as_deref(), yes, instead)
        }
        Trust::Apply { files, ask } => apply(&files, &ask, &runtime()?),
        Trust::Drop { site } => {
            let name = kiln_images::drop_request(&site)?;
            println!("{name} is given up; what machines are served has not changed");
            Ok(())
        }
        Trust::Rotate { role, keys: None, site } if role == kiln_images::AGENT_API => {
            let done = kiln_images::rotate_agent_api(&site, now)?;
            println!("the agent API has another key: {}", shown(&done.keys));
            said(&done.changed);
            println!("restart `kiln serve` as soon as that is in force: machines hang up on the old key");
            Ok(())
        }
        Trust::Rotate { role, keys, site } => {
            let holders = keys.as_ref().map(Holders::read).transpose()?;
            let done = kiln_images::rotate(&site, &role, holders.as_ref(), now)?;
            println!("{role} has other keys: {}", shown(&done.keys));
            said(&done.changed);
            Ok(())
        }
        Trust::MachineCa { step, site } => machine_ca::run(step, &site),
        Trust::Revoke { what, site, passphrase_file } => match what.parse::<ReleaseId>() {
            Ok(release) => site::revoke(&release, &site, passphrase_file.as_deref()),
            Err(_) => revoke_key(&what, &site, now),
        },
        Trust::Renew { within, site } => {
            let done = kiln_images::renew(&site, within, now)?;
            if done.changed.already {
                println!("nothing expires within {} days", within.as_hours() / 24);
                return Ok(());
            }
            println!("new dates for {}", done.roles.join(", "));
            said(&done.changed);
            Ok(())
        }
        Trust::Floor { image, floor, ask } => raise(&image, floor, &ask, &runtime()?),
        Trust::Status { site, json } => trust_status::status(&site, json, now, &runtime()?),
        Trust::Operators { keys, threshold, site } => order::operators(&keys, threshold, &site),
        Trust::Network { file, site } => site::network(&file, &site),
        Trust::TufClient(command) => tuf_client::run(&command, &runtime()?),
        Trust::SecureBoot(command) => site::secure_boot(command),
    }
}

fn init(init: &Init, now: Timestamp) -> Result<(), CliError> {
    let Init { lab, dir, name, keys, days } = init;
    if *lab {
        return site::init(dir, name);
    }
    let mut by_role: BTreeMap<&str, RoleHolders> = BTreeMap::new();
    for RoleKeys { role, holders } in keys {
        if by_role.insert(role, holders.read()?).is_some() {
            return Err(CliError::RoleTwice(role.clone()));
        }
    }
    let mut take = |role: &'static str| by_role.remove(role).ok_or(CliError::RoleMissing(role));
    let ceremony = Ceremony {
        root: take("root")?,
        targets: take("targets")?,
        snapshot: take("snapshot")?,
        images: take("images")?,
        operators: by_role.remove("operators"),
        days: *days,
    };
    let (site, waiting) = kiln_images::init_site(dir, name, &ceremony, now)?;
    println!("site {name} is made in {}; its first metadata waits for signatures", site.path.display());
    print(&(Request::read(&waiting.file)?.words(now)?.join("\n") + "\n"))?;
    carry(&waiting);
    println!("Secure Boot keys are made where boot programs are built: `kiln trust secureboot init`");
    Ok(())
}

fn key(file: &Path, plain: bool, from: Option<&Path>) -> Result<(), CliError> {
    let passphrase = if plain { None } else { Some(new_passphrase(from)?) };
    let public = sealed::make_key(file, passphrase.as_ref(), sealed::ROUNDS)?;
    println!("{} is secret; {} is for everybody", file.display(), sealed::public_file(file).display());
    println!("fingerprint, to be kept on paper:\n{}", fingerprint(&public.id()));
    Ok(())
}

fn fingerprints(files: &[PathBuf]) -> Result<(), CliError> {
    for file in files {
        let public = match sealed::read_public(file) {
            Ok(public) => public,
            Err(_) => KeyFile::read(file)?.public()?,
        };
        println!("{}  {}", fingerprint(&public.id()), file.display());
    }
    Ok(())
}

fn sign(file: &Path, key: &Path, from: Option<&Path>, yes: bool, instead: bool) -> Result<(), CliError> {
    let mut request = Request::read(file)?;
    print(&(request.words(Timestamp::now())?.join("\n") + "\n"))?;
    if SignerMemory::read(key)?.is_new() {
        println!("\nThis key signs for the first time. Compare the fingerprints with those on paper:");
        print(&(request.anchor_words()?.join("\n") + "\n"))?;
        if !yes {
            consent("They are the same (type yes): ")?;
        }
    }
    println!();
    let roles = kiln_images::sign_request(&mut request, file, key, instead, || passphrase(from, key))?;
    println!("signed: {}", roles.join(", "));
    let lacking = request.lacking()?;
    if lacking.is_empty() {
        println!("{} has all its signatures: carry it to the site, `kiln trust apply FILE`", file.display());
    }
    for lacking in lacking {
        println!("{}", lacking.words(&request.names));
    }
    Ok(())
}

fn carry(waiting: &Waiting) {
    println!("{} waits for signatures; what machines are served has not changed", waiting.name);
    for lacking in &waiting.lacking {
        println!("  {lacking}");
    }
    println!(
        "carry {} to the signers: `kiln trust sign FILE --key KEY` adds one's signature; `kiln trust apply FILE` brings \
         it back",
        waiting.file.display()
    );
}

/// What became of a change.
pub(super) fn said(changed: &Changed) {
    match &changed.waiting {
        Some(waiting) => carry(waiting),
        None if !changed.served => println!("{NOT_SERVED}"),
        None => {}
    }
}

/// What became of a publish or a prune that may wait for people.
pub(super) fn waits(waiting: Option<&Waiting>) -> bool {
    waiting.inspect(|waiting| carry(waiting)).is_some()
}

fn apply(files: &[PathBuf], ask: &Ask, runtime: &Runtime) -> Result<(), CliError> {
    let site = SiteDir::open(&ask.site)?;
    let may = |away: &TakenAway| nobody_needs(&site, ask, away, runtime);
    match kiln_images::apply::<CliError, _>(&ask.site, files, Timestamp::now(), may)? {
        Applied::Waiting(waiting) => carry(&waiting),
        Applied::Done { name, served } => {
            println!("{name}: signed and in force");
            if !served {
                println!("{NOT_SERVED}");
            }
        }
    }
    Ok(())
}

fn revoke_key(what: &str, site: &Path, now: Timestamp) -> Result<(), CliError> {
    let file = Path::new(what);
    let key = if file.exists() { sealed::read_public(file)?.id() } else { what.replace(' ', "") };
    let done = kiln_images::revoke_key(site, &key, now)?;
    println!("the key is taken away; these sign from now on: {}", shown(&done.keys));
    said(&done.changed);
    Ok(())
}

fn shown(keys: &[String]) -> String {
    keys.iter().map(|id| fingerprint(id)).collect::<Vec<_>>().join(", ")
}

fn raise(image: &ImageName, floor: u64, ask: &Ask, runtime: &Runtime) -> Result<(), CliError> {
    let site = SiteDir::open(&ask.site)?;
    let away = TakenAway { floors: BTreeMap::from([(image.to_string(), floor)]), ..TakenAway::default() };
    let _alone = nobody_needs(&site, ask, &away, runtime)?;
    let changed = kiln_images::raise_floor(&ask.site, image.as_str(), floor, Timestamp::now())?;
    if changed.already {
        println!("the floor of {image} is {floor} already");
        return Ok(());
    }
    if changed.waiting.is_none() {
        println!("the floor of {image} is {floor}: no machine runs a lower release again");
    }
    said(&changed);
    Ok(())
}
