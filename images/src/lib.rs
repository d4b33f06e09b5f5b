//! The image builder: from a recipe to a release's bytes, `DIR/build/NAME/REL/{manifest.json, kiln.efi, kernel,
//! initramfs, root, sbom.json}`.
//!
//! Packages come from Debian's mirror by mmdebstrap, the file system from mkfs.erofs; the layers, the initramfs, the
//! module closure, the verity tree and the UKI are made here. The same inputs give the same bytes. UKI, the kernel's
//! copy for a kexec, boot loader, root hash and IPE policy are signed for Secure Boot when they are made; metadata is signed by
//! `publish`.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod base;
mod build;
pub mod cpio;
mod declared;
pub mod error;
mod expected;
mod host;
mod initramfs;
mod modules;
mod oci;
mod progress;
pub mod recipe;
mod root;
mod sbom;
pub mod tarball;
mod top;
pub mod uki;

pub use build::{BuildOptions, Built, SiteUrls, build, build_with};
pub use declared::Declared;
pub use error::{BuildError, RecipeError};
pub use progress::Progress;
pub use top::AGENT_PATH;

mod agent_api;
mod apply;
mod boot_keys;
mod ceremony;
mod files;
mod firmware;
mod floor;
mod https;
mod init;
mod keys;
mod network;
mod operators;
mod ovmf;
mod prune;
mod publish;
mod repository;
pub mod request;
mod revoke;
pub mod sealed;
mod secure_boot;
mod signer;
mod signers;
mod signing;
mod site;
mod site_error;
pub mod status;
mod words;

pub use agent_api::{AGENT_API, rotate_agent_api};
pub use apply::{Applied, TakenAway, apply, drop_request};
pub use boot_keys::{KEYS, KexecCopy, SigningKey, Unlock, encrypt_secure_boot, init_secure_boot};
pub use ceremony::{Ceremony, RoleHolders, init_site};
pub use floor::raise_floor;
pub use https::https_certificate;
pub use init::init_lab;
pub use keys::{Renewed, Rotated, renew, revoke_key, rotate};
pub use network::{read_network, sign_network};
pub use operators::name_operators;
pub use prune::{PruneOptions, Pruned, prune};
pub use publish::{Crowded, Published, publish};
pub use repository::{Memory, Release, Repository};
pub use revoke::{publish_dbx, revoke};
pub use secure_boot::{Enrolment, enroll, sign_program};
pub use signer::{SignerMemory, sign_request};
pub use signing::{Changed, Waiting};
pub use site::SiteDir;
pub use site_error::SiteError;
