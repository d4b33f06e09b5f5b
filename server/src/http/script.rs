//! `/boot.ipxe`: the script for an iPXE client, by machine.

use super::{App, Peer, text};
use axum::extract::{Extension, Query, State};
use axum::http::StatusCode;
use axum::response::Response;
use kiln_netboot::{Mac, ipxe};
use kiln_protocol::{Architecture, MachineId, Sha256Hex};
use serde::Deserialize;
use std::net::IpAddr;

#[derive(Debug, Deserialize)]
pub(super) struct Who {
    uuid: Option<String>,
    mac: Option<String>,
    /// iPXE's own word: `efi`, or `pcbios`.
    platform: Option<String>,
}

pub(super) async fn script(
    State(app): State<App>,
    Extension(peer): Extension<Peer>,
    Query(who): Query<Who>,
) -> Response {
    let id = who.uuid.and_then(|u| u.to_ascii_lowercase().parse::<MachineId>().ok());
    let mac = who.mac.and_then(|m| m.parse::<Mac>().ok());
    let Peer::Tcp { to, .. } = peer else {
        return text(StatusCode::NOT_FOUND, "only over TCP\n");
    };
    if let (Some(net), Some(mac)) = (&app.net, mac) {
        net.script_fetched(mac);
    }
    let control = &app.control;
    let catalog = control.catalog();
    let machine = control.find(id.as_ref(), mac);
    let efi = who.platform.as_deref() == Some("efi");
    // BIOS machines are x86, and so are the UEFI machines that are given iPXE.
    let script = control
        .boot_release(machine.as_ref(), &catalog, Architecture::X86_64)
        .and_then(|(_, release)| {
            let address = control.config.boot.address.map_or_else(|| to.ip().to_canonical(), IpAddr::V4);
            let http = format!("http://{}", std::net::SocketAddr::new(address, to.port()));
            let hash = |text: &str| text.parse::<Sha256Hex>().map_err(|e| e.to_string());
            let m = &release.manifest;
            if efi {
                // Kernel and initramfs one by one would start what no signature covers.
                return ipxe::uki_script(&http, &hash(&m.uki.sha256)?).map_err(|e| e.to_string());
            }
            ipxe::boot_script(&http, &hash(&m.kernel.sha256)?, &hash(&m.initramfs.sha256)?, &m.command_line)
                .map_err(|e| e.to_string())
        })
        .unwrap_or_else(|reason| ipxe::wait_script(&reason));
    let script = match control.pause_before(machine.as_ref()) {
        Some((seconds, reason)) => ipxe::after_pause(&script, seconds, &reason),
        None => script,
    };
    text(StatusCode::OK, script)
}
