//! The command line: `kiln`. Commands about machines and releases are clients of the operator API and never open the
//! store; `trust`, `image build`, `release publish` and `release prune` work on the site directory itself.

mod ask;
mod audit;
mod client;
mod error;
mod expected;
mod file;
mod fleet;
mod hardware;
mod log;
mod machine_ca;
mod order;
mod output;
mod people;
mod secret;
mod secrets;
mod show;
mod site;
mod table;
mod trust;
mod trust_status;
mod tuf_client;

use crate::serve::{LogFormat, ServeOptions};
use clap::{Args, Parser, Subcommand};
use error::CliError;
use jiff::SignedDuration;
use kiln_fleet::Route;
use kiln_protocol::{ImageName, ReleaseId};
pub(crate) use output::tame;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Debug, Parser)]
#[command(
    name = "kiln",
    version,
    about = "Bare-metal machines that are fired once and never patched",
    max_term_width = 110
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Keys and metadata of a site
    #[command(subcommand)]
    Trust(trust::Trust),
    /// Build images
    #[command(subcommand)]
    Image(Image),
    /// Publish and list releases
    #[command(subcommand)]
    Release(Release),
    /// Run the boot server: DHCP, TFTP, HTTP, agent API, operator API
    Serve(Serve),
    /// List, show, watch, approve machines
    #[command(subcommand)]
    Machine(Machine),
    /// Hardware classes, and how releases came up on them
    Classes {
        #[command(flatten)]
        at: At,
        /// JSON instead of a table
        #[arg(long)]
        json: bool,
    },
    /// The list of machines that shall come up, and in what those that came differ from it
    #[command(subcommand)]
    Expected(expected::Expected),
    /// Assign a release to a machine: it reimages itself when its turn comes
    Assign(Assign),
    /// Orders that only an operator's key can give: rescue releases, wipes
    #[command(subcommand)]
    Order(order::Order),
    /// Tokens of people and programs
    #[command(subcommand)]
    Token(people::Token),
    /// What machines need to know and nobody else: passwords, keys
    #[command(subcommand)]
    Secret(secrets::Secret),
    /// What waits for a second person
    #[command(subcommand)]
    Pending(people::Pending),
    /// Who did what, and whether the record of it is whole
    #[command(subcommand)]
    Audit(audit::Audit),
}

#[derive(Debug, Subcommand)]
enum Image {
    /// Build a release from a recipe into DIR/build/NAME/N
    Build(Build),
}

#[derive(Debug, Args)]
struct Build {
    /// The recipe, TOML
    recipe: PathBuf,
    /// The site directory
    #[arg(long, env = "KILN_SITE")]
    site: PathBuf,
    /// Release number [default: highest published + 1]
    #[arg(long)]
    release: Option<u64>,
    /// The static kiln-agent to put in [default: kiln-agent beside this program]
    #[arg(long)]
    agent: Option<PathBuf>,
    /// Where packages and layers are kept between builds [default: DIR/cache]
    #[arg(long)]
    cache: Option<PathBuf>,
    /// Ask the package mirror again, even if there is a layer for these packages
    #[arg(long)]
    refresh: bool,
    /// Sign nothing for Secure Boot: firmware that enforces it will refuse this release
    #[arg(long)]
    unsigned: bool,
    /// Read the passphrase of the site's Secure Boot key from this file's first line instead of asking
    #[arg(long)]
    passphrase_file: Option<PathBuf>,
    /// Base URL of artifacts, as http://10.0.0.1:8080; may be given more than once [default: ask DHCP]
    #[arg(long)]
    http_url: Vec<String>,
    /// Base URL of the agent API, as https://10.0.0.1:8443; may be given more than once [default: ask DHCP]
    #[arg(long)]
    agent_url: Vec<String>,
}

#[derive(Debug, Subcommand)]
enum Release {
    /// Sign a built release and put it into the repository
    Publish {
        /// IMAGE/NUMBER, as minimal/2
        release: ReleaseId,
        /// The site directory
        #[arg(long, env = "KILN_SITE")]
        site: PathBuf,
    },
    /// Take old releases out of an image's list, and later their artifacts out of the repository
    Prune(Prune),
    /// List published releases
    List {
        #[command(flatten)]
        at: At,
        /// JSON instead of a table
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Args)]
struct Prune {
    /// The image, as minimal
    image: ImageName,
    /// So many of its newest releases stay, and besides them those that a machine runs, shall run or would fall back to
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    keep: u32,
    #[command(flatten)]
    ask: ask::Ask,
    /// Delete artifacts whose release was taken out so long ago, as 0s, 12h or 7d [default: by an earlier prune]
    #[arg(long, value_parser = site::grace)]
    grace: Option<SignedDuration>,
    /// Only say which releases would be taken out
    #[arg(long)]
    dry_run: bool,
}

#[derive(Debug, Args)]
struct Serve {
    /// The site directory
    #[arg(long, env = "KILN_SITE")]
    site: PathBuf,
    /// Configuration [default: DIR/kiln.toml, if it is there]
    #[arg(long)]
    config: Option<PathBuf>,
    /// Log lines for people or as JSON [default: text on a terminal, else json]
    #[arg(long)]
    log: Option<LogFormat>,
}

/// Where the operator API is.
#[derive(Debug, Args)]
struct At {
    /// The site directory, on the boot server itself: its socket takes changes
    #[arg(long, env = "KILN_SITE", required_unless_present = "server", conflicts_with = "server")]
    site: Option<PathBuf>,
    /// The boot server's address, as https://10.0.0.1:8444; plain http is for reading, without a token
    #[arg(long, env = "KILN_SERVER")]
    server: Option<String>,
    /// A file with the token to show there; KILN_TOKEN may hold the token itself
    #[arg(long, env = "KILN_TOKEN_FILE")]
    token_file: Option<PathBuf>,
    /// The CA of its certificate, PEM: online/agent-ca.pem of a site that makes its own [default: this host's CAs]
    #[arg(long, env = "KILN_CA")]
    ca: Option<PathBuf>,
}

impl At {
    fn site(dir: PathBuf) -> Self {
        Self { site: Some(dir), server: None, token_file: None, ca: None }
    }
}

#[derive(Debug, Subcommand)]
enum Machine {
    /// All machines, a line each
    List {
        #[command(flatten)]
        at: At,
        /// JSON instead of a table
        #[arg(long)]
        json: bool,
    },
    /// One machine with its boots and stages
    Show {
        /// Name or id
        machine: String,
        #[command(flatten)]
        at: At,
        /// JSON instead of text
        #[arg(long)]
        json: bool,
    },
    /// What a machine is made of, and what changed
    Inventory {
        /// Name or id
        machine: String,
        #[command(flatten)]
        at: At,
        /// JSON instead of text
        #[arg(long)]
        json: bool,
    },
    /// One boot's log, the kernel's first line first, with the boot's stages between
    Log {
        /// Name or id
        machine: String,
        /// How many boots back: 0 is the newest
        #[arg(long, default_value_t = 0)]
        boot: u32,
        /// What came under that boot while the machine was quarantined: any of those that claim to be it may have said it
        #[arg(long)]
        held: bool,
        /// Go on with new lines until interrupted
        #[arg(long, conflicts_with = "json")]
        follow: bool,
        #[command(flatten)]
        at: At,
        /// JSON instead of text: the lines alone
        #[arg(long)]
        json: bool,
    },
    /// Print a line for each change, until interrupted
    Watch {
        /// Name or id [default: all]
        machine: Option<String>,
        #[command(flatten)]
        at: At,
        /// A line of JSON for each change
        #[arg(long)]
        json: bool,
    },
    /// Let a discovered machine in
    Approve {
        /// Name or id
        machine: String,
        /// Its role, one of kiln.toml's
        #[arg(long)]
        role: String,
        /// Its name from now on
        #[arg(long)]
        name: Option<String>,
        /// The code on its screen, as ABCD-EFGH: another one is refused
        #[arg(long)]
        code: Option<String>,
        #[command(flatten)]
        at: At,
    },
    /// Take a machine out of service: it gets nothing more until it is approved again
    Retire {
        /// Name or id
        machine: String,
        #[command(flatten)]
        at: At,
    },
    /// Accept a machine's TPM and firmware as they are now, after a change that you know of
    Accept {
        /// Name or id
        machine: String,
        #[command(flatten)]
        at: At,
    },
    /// Say why a machine is away: it holds no other machine up until it is healthy again
    Excuse {
        /// Name or id
        machine: String,
        /// Why, for whoever looks next
        #[arg(long)]
        reason: String,
        #[command(flatten)]
        at: At,
    },
    /// Put new hardware in the place of old: it gets the old one's name, role and release; the old one is retired
    Replace {
        /// Name or id of the old machine
        old: String,
        /// Id of the new machine, which has reported and is not approved
        new: String,
        #[command(flatten)]
        at: At,
    },
    /// Wipe a machine's disks, by an operator's order
    Wipe(order::Wipe),
    /// The signed receipt of a machine's last wipe
    Receipt {
        /// Name or id
        machine: String,
        /// Write the receipt itself to this file: `kiln order verify-receipt FILE` checks it anywhere
        #[arg(long)]
        out: Option<PathBuf>,
        #[command(flatten)]
        at: At,
    },
    /// Take a machine's identity key away: whoever holds it is not heard any more. It needs another, and `clear --key`
    RevokeKey {
        /// Name or id
        machine: String,
        #[command(flatten)]
        at: At,
    },
    /// Lift what holds a machine: a quarantine, a failed release, a boot loop. With --key, make another identity key that
    /// reported under its id the machine's
    Clear {
        /// Name or id
        machine: String,
        /// The beginning of that key's fingerprint, at least 16 hex digits, as the machine's console and `show` (other key)
        /// name it. Without it no other key is taken
        #[arg(long, value_name = "PREFIX")]
        key: Option<String>,
        #[command(flatten)]
        at: At,
    },
}

#[derive(Debug, Args)]
struct Assign {
    /// Name or id
    machine: String,
    /// IMAGE/NUMBER, as minimal/2
    release: ReleaseId,
    /// How it leaves the running release: kexec, cold, or auto: by kexec where its hardware class has come up on the release
    /// both ways
    #[arg(long, default_value = "kexec")]
    via: Route,
    /// An operator's key, for a release of another class than normal: the order is signed and submitted in one step. May
    /// be given more than once
    #[arg(long)]
    order_key: Vec<PathBuf>,
    /// How long that order holds, as 4h or 2d
    #[arg(long, default_value = "24h", value_parser = site::grace, requires = "order_key")]
    expires: SignedDuration,
    #[command(flatten)]
    at: At,
}

/// The program.
pub fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kiln: {}", tame(&error.to_string()));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<(), CliError> {
    // One provider for everything that speaks TLS; a second call would find it installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = || tokio::runtime::Runtime::new().map_err(CliError::Runtime);
    match cli.command {
        Command::Trust(command) => trust::run(command, runtime),
        Command::Order(command) => order::run(command, runtime),
        Command::Image(Image::Build(build)) => site::build(build),
        Command::Release(Release::Publish { release, site }) => site::publish(&release, &site),
        Command::Release(Release::Prune(prune)) => site::prune(prune, &runtime()?),
        Command::Release(Release::List { at, json }) => runtime()?.block_on(fleet::releases(&at, json)),
        Command::Serve(Serve { site, config, log }) => {
            Ok(runtime()?.block_on(crate::serve::serve(ServeOptions { site, config, log }))?)
        }
        Command::Token(token) => runtime()?.block_on(people::token(token)),
        Command::Secret(command) => runtime()?.block_on(secrets::secret(command)),
        Command::Pending(pending) => runtime()?.block_on(people::pending(pending)),
        Command::Audit(command) => runtime()?.block_on(audit::audit(command)),
        Command::Machine(machine) => runtime()?.block_on(fleet::machine(machine)),
        Command::Classes { at, json } => runtime()?.block_on(fleet::classes(&at, json)),
        Command::Expected(command) => runtime()?.block_on(expected::run(command)),
        Command::Assign(assign) => runtime()?.block_on(fleet::assign(&assign)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_prune_keeps_something_and_knows_days() {
        let parse = |more: &[&str]| {
            let command = ["kiln", "release", "prune", "minimal", "--site", "x"].iter().chain(more);
            let cli = Cli::try_parse_from(command)?;
            let Command::Release(Release::Prune(prune)) = cli.command else { panic!("{cli:?}") };
            Ok::<_, clap::Error>((prune.keep, prune.grace))
        };
        let grace = |text| parse(&["--keep", "2", "--grace", text]).ok().and_then(|(_, grace)| grace);
        assert_eq!(parse(&["--keep", "2"]).unwrap(), (2, None));
        assert_eq!(grace("7d"), Some(SignedDuration::from_hours(7 * 24)));
        assert_eq!(grace("0s"), Some(SignedDuration::ZERO));
        assert_eq!((grace("-1h"), grace("soon"), grace("2 months")), (None, None, None));
        assert!(parse(&["--keep", "0"]).is_err() && parse(&[]).is_err());
        assert!(parse(&["--keep", "1", "--without-server", "--server", "http://x"]).is_err());
    }

    #[test]
    fn a_machine_command_needs_a_place() {
        assert!(Cli::try_parse_from(["kiln", "machine", "list", "--site", "x"]).is_ok());
        assert!(Cli::try_parse_from(["kiln", "machine", "list", "--site", "x", "--server", "y"]).is_err());
        assert!(Cli::try_parse_from(["kiln", "assign", "m", "minimal", "--site", "x"]).is_err());
    }
}
