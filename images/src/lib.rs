//! The image builder: from a recipe to a release's bytes.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod cpio;
pub mod error;
pub mod modules;
pub mod recipe;
pub mod tarball;
pub mod uki;

pub use error::{BuildError, RecipeError};

mod files;
mod publish;
mod repository;
mod site;
mod site_error;

pub use publish::{Published, publish};
pub use repository::{Director, Refreshed, Release, Repository, refresh_timestamp};
pub use site::{AGENT_API_NAME, OFFLINE_LIFETIME, SiteDir, TIMESTAMP_LIFETIME, init_lab, read_key};
pub use site_error::SiteError;
