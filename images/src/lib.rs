//! The image builder: from a recipe to a release's bytes.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod cpio;
pub mod error;
pub mod modules;
pub mod recipe;
pub mod tarball;
pub mod uki;

pub use error::{BuildError, RecipeError};
