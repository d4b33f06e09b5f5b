//! `kiln trust machine-ca`: another key for the CA that signs machines' certificates, step by step.

use super::error::CliError;
use crate::ca_rotation::{announce, forget, switch};
use clap::ValueEnum;
use kiln_images::SiteDir;
use std::path::Path;

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Step {
    /// Make the next CA, and tell it beside the one that signs
    Announce,
    /// The next CA signs, and the one before is told beside it
    Switch,
    /// The CA before is told no more, and its key is removed
    Forget,
}

pub(super) fn run(step: Step, site: &Path) -> Result<(), CliError> {
    let site = SiteDir::open(site)?;
    let online = site.path.join("online");
    match step {
        Step::Announce => {
            announce(&online, &site.name)?;
            println!(
                "the next machine CA is made. Restart `kiln serve`: /site/machines.pem has both from then on. Once every program that \
                 verifies machines has fetched it, `kiln trust machine-ca switch`"
            );
        }
        Step::Switch => {
            switch(&online, &site.name)?;
            println!(
                "the next machine CA signs. Restart `kiln serve`: each machine is told to ask for another certificate, and what the CA \
                 before signed holds until it is over. Then, at the earliest after `[certificates] life`, `kiln trust machine-ca forget`"
            );
        }
        Step::Forget => {
            forget(&online)?;
            println!(
                "the machine CA before is gone. Restart `kiln serve`, and have every program fetch /site/machines.pem anew: one that \
                 does not goes on trusting it"
            );
        }
    }
    Ok(())
}
