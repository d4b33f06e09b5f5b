//! Commands that work on the site directory: no server needs to run.

use super::Build;
use super::error::CliError;
use jiff::Timestamp;
use kiln_images::{BuildOptions, SiteUrls};
use kiln_protocol::ReleaseId;
use std::path::{Path, PathBuf};

pub(super) fn init(dir: &Path, name: &str) -> Result<(), CliError> {
    kiln_images::init_lab(dir, name, Timestamp::now())?;
    println!("site {name} is made in {}", dir.display());
    println!(
        "next: kiln image build RECIPE --site {0}; kiln release publish IMAGE/1 --site {0}; kiln serve --site {0}",
        dir.display()
    );
    Ok(())
}

pub(super) fn build(build: Build) -> Result<(), CliError> {
    let agent = match build.agent {
        Some(agent) => agent,
        None => beside_this_program("kiln-agent")?,
    };
    let usual = BuildOptions::new(build.recipe, build.site, agent);
    let options = BuildOptions {
        release: build.release,
        cache: build.cache.unwrap_or_else(|| usual.cache.clone()),
        refresh: build.refresh,
        site_urls: SiteUrls { http: build.http_url, agent: build.agent_url },
        ..usual
    };
    let built = kiln_images::build(&options)?;
    let done = if built.changed { "is built" } else { "is unchanged" };
    println!("{}/{} {done} in {}", built.manifest.image, built.manifest.release, built.folder.display());
    Ok(())
}

pub(super) fn publish(release: &ReleaseId, site: &Path) -> Result<(), CliError> {
    let done = kiln_images::publish(site, release.image.as_str(), release.release, Timestamp::now())?;
    let what = if done.already { "was published before, nothing changed" } else { "is published" };
    println!("{release} {what}; `kiln assign MACHINE {release}` gives it to a machine");
    if !done.served {
        println!("machines see it when `kiln serve` has signed the timestamp: its key is not on this machine");
    }
    Ok(())
}

fn beside_this_program(name: &str) -> Result<PathBuf, CliError> {
    let program = std::env::current_exe().map_err(CliError::Runtime)?;
    let path = program.with_file_name(name);
    if path.exists() { Ok(path) } else { Err(CliError::NoAgent(path)) }
}
