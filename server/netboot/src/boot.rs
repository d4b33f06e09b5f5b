//! The boot decision as data: what is asked of the caller, what it may answer, and what the client is offered then.

use crate::ipxe::{self, SCRIPT_PATH};
use crate::tftp::BootFile;
use crate::{Client, Mac, VendorClass};
use kiln_protocol::{Architecture, Firmware, MachineId, Sha256Hex};
use std::net::Ipv4Addr;

/// How the client can be booted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BootKind {
    /// UEFI firmware that loads a PE by TFTP.
    UefiPxe,
    /// UEFI firmware that loads a PE by HTTP.
    UefiHttp,
    /// A BIOS ROM that loads by TFTP and is no iPXE, or an iPXE that cannot go on by itself.
    BiosPxe,
    /// iPXE on BIOS that can fetch a kernel by HTTP.
    BiosIpxe,
    /// iPXE on UEFI that can fetch a PE by HTTP.
    UefiIpxe,
}

/// Asked for each boot client, at its DISCOVER and again at its REQUEST: asking must change nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootQuery {
    /// SMBIOS UUID in SMBIOS' byte order: what real firmware means.
    pub id: Option<MachineId>,
    /// The same bytes in plain order: try it where `id` names no known machine.
    pub id_plain: Option<MachineId>,
    /// The asking port's address.
    pub mac: Mac,
    /// The machine's architecture.
    pub arch: Architecture,
    /// BIOS or UEFI.
    pub firmware: Firmware,
    /// How it can be booted.
    pub kind: BootKind,
}

/// The caller's decision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BootAnswer {
    /// Boot this UKI. A BIOS machine cannot; it is answered as by [`BootAnswer::Ipxe`].
    Uki {
        /// Its hash: `b/<sha256>/kiln.efi`.
        sha256: Sha256Hex,
    },
    /// Go by iPXE: the script decides the release.
    Ipxe,
    /// Not now. The client gets no boot program and asks again.
    Wait {
        /// Why, in a sentence a person reads.
        reason: String,
    },
    /// Not Kiln's machine.
    Ignore,
}

/// What the client was offered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Offer {
    /// A file of this server's TFTP.
    Tftp(BootFile),
    /// A URL.
    Url(String),
    /// Where the agent finds its server.
    Location,
}

/// How this client can be booted; an error says why not, for people.
pub(crate) fn classify(client: &Client, http_boot: bool) -> Result<(Architecture, Firmware, BootKind), String> {
    let arch = client.arch().ok_or("it names no architecture (option 93)")?;
    let (machine, firmware) =
        arch.machine().ok_or_else(|| format!("there is no boot program for its architecture, {arch:?} (option 93)"))?;
    let kind = match (client.vendor, firmware, client.is_ipxe) {
        (VendorClass::Http, Firmware::Uefi, false) if http_boot => BootKind::UefiHttp,
        (VendorClass::Http, Firmware::Uefi, false) => return Err("HTTP Boot is off ([boot] http_boot = false)".into()),
        (VendorClass::Pxe | VendorClass::Http, Firmware::Uefi, true) if client.features.can_boot_efi() => {
            BootKind::UefiIpxe
        }
        (VendorClass::Pxe, Firmware::Uefi, _) => BootKind::UefiPxe,
        (VendorClass::Pxe | VendorClass::Http, Firmware::Bios, true) if client.features.can_boot_linux() => {
            BootKind::BiosIpxe
        }
        (VendorClass::Pxe, Firmware::Bios, _) => BootKind::BiosPxe,
        (VendorClass::Http, _, _) => return Err("this HTTP client is no UEFI firmware".into()),
        (VendorClass::Agent | VendorClass::Other, _, _) => return Err("it is no boot client".into()),
    };
    Ok((machine, firmware, kind))
}

/// Where this server's things are, as one client reaches them.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) address: Ipv4Addr,
    pub(crate) http_port: u16,
    pub(crate) agent_port: u16,
}

impl Place {
    pub(crate) fn http(&self) -> String {
        format!("http://{}:{}", self.address, self.http_port)
    }

    pub(crate) fn agent(&self) -> String {
        format!("https://{}:{}", self.address, self.agent_port)
    }

    pub(crate) fn script(&self, client: &Client) -> Offer {
        Offer::Url(ipxe::script_url(&format!("{}{SCRIPT_PATH}", self.http()), client.id.as_ref(), client.mac))
    }

    pub(crate) fn uki(&self, kind: BootKind, sha256: &Sha256Hex) -> Offer {
        let file = BootFile::Uki(sha256.clone());
        match kind {
            BootKind::UefiHttp | BootKind::UefiIpxe => Offer::Url(format!("{}/{}", self.http(), file.path())),
            BootKind::UefiPxe | BootKind::BiosPxe | BootKind::BiosIpxe => Offer::Tftp(file),
        }
    }
}
