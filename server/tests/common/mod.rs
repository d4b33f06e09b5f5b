//! A real `kiln serve` on loopback with small releases in place of built ones, and machines that report to it.
#![allow(dead_code, unused_imports)]

mod agent;
pub mod chip;
#[path = "../../../images/tests/oracle/mod.rs"]
pub mod oracle;
mod server;
mod site;

pub use agent::*;
pub use server::*;
pub use site::*;

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::{HeaderMap, Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use kiln_images::{Memory, SiteDir, init_lab};
use kiln_protocol::*;
use kiln_release::certificate::self_signed_certificate;
use kiln_release::verity::{BLOCK, TreeBuilder};
use kiln_release::{
    Artifact, FilePolicy, HealthCheck, HealthKind, MANIFEST_TYPE, Manifest, Measured, Signer, VerityParams,
    WantedSecret, hex,
};
use kiln_server::catalog::Catalog;
use kiln_server::config::Config;
use kiln_server::control::Control;
use kiln_server::store::Store;
use kiln_server::view::MachineView;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject};
use rustls::{ClientConfig, RootCertStore};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

/// Nothing here takes so long unless it is broken.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The fleet's control without sockets and without a clock, on the site's real store and repository.
pub async fn control(test: &TestSite) -> (Arc<Control>, tokio::sync::watch::Sender<bool>) {
    let site = SiteDir::open(test.path()).unwrap();
    let (config, _) = Config::load(test.path(), None).unwrap();
    let _ = site.lock_state().unwrap();
    let (store, _writer) = Store::open(&site.database()).await.unwrap();
    let keys = site.timestamp_keys().unwrap();
    let catalog = Catalog::adopt(&site, &keys, &Memory::default(), Timestamp::now()).unwrap();
    let director = site.director_key(&catalog.site).unwrap();
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let control = Box::pin(Control::load(store, site, config, director, catalog, stopped)).await.unwrap();
    tokio::spawn(kiln_server::looks::looks(control.clone()));
    (control, stop)
}
