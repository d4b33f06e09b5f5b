//! What a DHCP packet says about the machine that sent it.
//!
//! RFC 4578 (options 93, 94, 97), RFC 3004 (77), PXE 2.1 §2.2, UEFI §24.7.

use crate::ipxe::Features;
use crate::options::{HEADER, MAGIC, Options, code};
use crate::{Mac, PacketError};
use dhcproto::v4::Message;
use dhcproto::{Decodable, Decoder};
use kiln_protocol::{Architecture, Firmware, MachineId};
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::Ipv4Addr;

/// DHCP message types that a server reads (RFC 2132 §9.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MessageType {
    /// A client looks for servers.
    Discover,
    /// A client asks for what was offered, or to keep its address.
    Request,
    /// A client found its address in use.
    Decline,
    /// A client gives its address back.
    Release,
    /// A client has an address and asks for the rest.
    Inform,
}

/// Who asks, by option 60.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VendorClass {
    /// `PXEClient…`: firmware or iPXE that loads by TFTP.
    Pxe,
    /// `HTTPClient…`: UEFI HTTP Boot.
    Http,
    /// `KilnAgent`: Kiln's own agent in the initramfs.
    Agent,
    /// Anything else: an ordinary client.
    Other,
}

/// One entry of option 93: IANA's processor architecture types.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientArch {
    /// 0: x86 BIOS.
    Bios,
    /// 7 and 9: x86-64 UEFI. RFC 4578 gave 9 to x86-64, firmware settled on 7; both are sent.
    UefiX64,
    /// 11: arm64 UEFI.
    UefiArm64,
    /// 16: x86-64 UEFI, boots from HTTP.
    HttpX64,
    /// 19: arm64 UEFI, boots from HTTP.
    HttpArm64,
    /// Anything else: Kiln has no program for it.
    Unsupported(u16),
}

impl ClientArch {
    fn from_number(number: u16) -> Self {
        match number {
            0 => Self::Bios,
            7 | 9 => Self::UefiX64,
            11 => Self::UefiArm64,
            16 => Self::HttpX64,
            19 => Self::HttpArm64,
            other => Self::Unsupported(other),
        }
    }

    /// Kiln's architecture and the firmware's kind; none where Kiln has no program.
    pub fn machine(self) -> Option<(Architecture, Firmware)> {
        match self {
            Self::Bios => Some((Architecture::X86_64, Firmware::Bios)),
            Self::UefiX64 | Self::HttpX64 => Some((Architecture::X86_64, Firmware::Uefi)),
            Self::UefiArm64 | Self::HttpArm64 => Some((Architecture::Aarch64, Firmware::Uefi)),
            Self::Unsupported(_) => None,
        }
    }
}

/// A readable request: the header's fields and the options that matter to a boot server.
#[derive(Debug, Clone)]
pub struct Client {
    /// What the packet is.
    pub message_type: MessageType,
    /// Transaction id.
    pub xid: u32,
    /// The sender's Ethernet address.
    pub mac: Mac,
    /// The address it has, or 0.0.0.0.
    pub ciaddr: Ipv4Addr,
    /// The relay that passed it on, or 0.0.0.0.
    pub giaddr: Ipv4Addr,
    /// Who asks.
    pub vendor: VendorClass,
    /// Option 93's whole list, or the one architecture that option 60 names; empty if neither is there.
    pub archs: Vec<ClientArch>,
    /// The SMBIOS UUID of option 97, its first three fields little-endian as in the SMBIOS table: so EDK2 and iPXE send
    /// it.
    pub id: Option<MachineId>,
    /// The same bytes read in plain order, for firmware that sends RFC 9562's.
    pub id_plain: Option<MachineId>,
    /// It wants its answers broadcast. An iPXE does exactly when it has an address already: it was chained with a
    /// cached ACK.
    pub broadcast: bool,
    /// It is iPXE (option 77).
    pub is_ipxe: bool,
    /// What that iPXE can do (option 175).
    pub features: Features,
    /// The address it asks for (option 50).
    pub requested: Option<Ipv4Addr>,
    /// The server it speaks to (option 54).
    pub server_id: Option<Ipv4Addr>,
    /// Largest DHCP message it takes (option 57), at least 548.
    pub max_message: usize,
    pub(crate) message: Message,
    pub(crate) machine_id: Option<Vec<u8>>,
    pub(crate) relay_agent: Option<Vec<u8>>,
    pub(crate) boot_item: Option<[u8; 4]>,
}

/// RFC 3046 §3.1, §3.2: sub-options of option 82.
const CIRCUIT_ID: u8 = 1;
const REMOTE_ID: u8 = 2;
/// Longest id that is taken for a part of a position.
const MAX_PART: usize = 64;

/// PXE 2.1 table 2-7: `PXE_BOOT_ITEM` in option 43.
pub(crate) const PXE_BOOT_ITEM: u8 = 71;

impl Client {
    /// Reads a packet. Never panics, whatever the bytes.
    pub fn parse(packet: &[u8]) -> Result<Self, PacketError> {
        let options = Options::read(packet)?;
        if packet[0] != 1 {
            return Err(PacketError::NotARequest { got: packet[0] });
        }
        if (packet[1], packet[2]) != (1, 6) {
            return Err(PacketError::Hardware { htype: packet[1], hlen: packet[2] });
        }
        let [kind] = options.fixed::<1>(code::MESSAGE_TYPE, "1")?.ok_or(PacketError::NoMessageType)?;
        let message_type = match kind {
            1 => MessageType::Discover,
            3 => MessageType::Request,
            4 => MessageType::Decline,
            7 => MessageType::Release,
            8 => MessageType::Inform,
            got => return Err(PacketError::MessageType { got }),
        };
        let message = decode_header(packet)?;
        let mut mac = [0; 6];
        mac.copy_from_slice(&packet[28..34]);
        let class = options.get(code::VENDOR_CLASS).unwrap_or_default();
        let machine_id = options.get(code::MACHINE_ID).filter(|v| v.len() == 17 && v[0] == 0);
        let uuid = machine_id
            .and_then(|v| <[u8; 16]>::try_from(&v[1..]).ok())
            .filter(|u| u.iter().any(|b| *b != 0) && u.iter().any(|b| *b != 0xff));
        let address = |code| -> Result<Option<Ipv4Addr>, PacketError> {
            Ok(options.fixed::<4>(code, "4")?.map(Ipv4Addr::from).filter(|a| !a.is_unspecified()))
        };
        let relay_agent = options.get(code::RELAY_AGENT);
        if let Some(long) = relay_agent.filter(|v| v.len() > 255) {
            // RFC 3046 §2.0: one option; it is echoed, so its length bounds the reply's.
            return Err(PacketError::OptionLength {
                code: code::RELAY_AGENT,
                expected: "at most 255",
                got: long.len(),
            });
        }
        let vendor_options = options.get(code::VENDOR_SPECIFIC).map(Options::read_encapsulated).unwrap_or_default();
        Ok(Self {
            message_type,
            xid: message.xid(),
            mac: Mac(mac),
            ciaddr: message.ciaddr(),
            giaddr: message.giaddr(),
            vendor: vendor_class(class),
            archs: architectures(options.get(code::ARCHITECTURE), class),
            id: uuid.map(|u| text_uuid(smbios_order(u))),
            id_plain: uuid.map(text_uuid),
            broadcast: message.flags().broadcast(),
            is_ipxe: options.get(code::USER_CLASS).is_some_and(is_ipxe_user_class),
            features: options.get(code::IPXE).map(Features::read).unwrap_or_default(),
            requested: address(code::REQUESTED_ADDRESS)?,
            server_id: address(code::SERVER_ID)?,
            max_message: options
                .fixed::<2>(code::MAX_SIZE, "2")?
                .map_or(548, |v| usize::from(u16::from_be_bytes(v)).saturating_sub(28).clamp(548, 1472)),
            machine_id: options.get(code::MACHINE_ID).filter(|v| v.len() <= 64).map(<[u8]>::to_vec),
            relay_agent: relay_agent.map(<[u8]>::to_vec),
            boot_item: vendor_options.fixed::<4>(PXE_BOOT_ITEM, "4").ok().flatten(),
            message,
        })
    }

    /// Where the packet entered the network, by the word of a relay of this list (RFC 3046): `RELAY REMOTE CIRCUIT`, the relay by
    /// its giaddr, `-` for a remote id that is not there. Without a relay that is trusted there is none: anybody can write
    /// option 82.
    pub fn position(&self, relays: &BTreeSet<Ipv4Addr>) -> Option<String> {
        let option = self.relay_agent.as_deref().filter(|_| relays.contains(&self.giaddr))?;
        let RelayIds { circuit, remote } = ids(option)?;
        let remote = remote.map_or(Some("-".to_owned()), part)?;
        Some(format!("{} {remote} {}", self.giaddr, part(circuit?)?))
    }

    /// The architecture to serve: the first of the list that Kiln has programs for, else the first.
    pub fn arch(&self) -> Option<ClientArch> {
        self.archs.iter().copied().find(|a| a.machine().is_some()).or_else(|| self.archs.first().copied())
    }
}

/// The two ids of option 82 that say where a machine is.
#[derive(Default)]
struct RelayIds<'a> {
    circuit: Option<&'a [u8]>,
    remote: Option<&'a [u8]>,
}

/// They, if the option is whole and has neither twice.
fn ids(option: &[u8]) -> Option<RelayIds<'_>> {
    let mut ids = RelayIds::default();
    let mut rest = option;
    while let [code, length, tail @ ..] = rest {
        let (value, after) = tail.split_at_checked(usize::from(*length))?;
        let again = match *code {
            CIRCUIT_ID => ids.circuit.replace(value),
            REMOTE_ID => ids.remote.replace(value),
            _ => None,
        };
        if again.is_some() {
            return None;
        }
        rest = after;
    }
    rest.is_empty().then_some(ids)
}

/// An id as people write it: its text, or its bytes as `0x…` where they are none, or could be taken for something else.
fn part(id: &[u8]) -> Option<String> {
    if id.is_empty() || id.len() > MAX_PART {
        return None;
    }
    let plain = id.iter().all(u8::is_ascii_graphic) && !id.starts_with(b"0x") && id != b"-";
    if plain {
        return String::from_utf8(id.to_vec()).ok();
    }
    let mut text = "0x".to_owned();
    for byte in id {
        write!(text, "{byte:02x}").expect("writing to a String cannot fail");
    }
    Some(text)
}

/// dhcproto reads the header, and of the options only the message type: the rest was read above.
fn decode_header(packet: &[u8]) -> Result<Message, PacketError> {
    let mut safe = packet[..HEADER - 4].to_vec();
    safe[44..236].fill(0); // sname and file: may hold overloaded options, and nothing that a request means
    safe.extend(MAGIC);
    safe.push(code::END);
    Message::decode(&mut Decoder::new(&safe)).map_err(|e| PacketError::Header { reason: e.to_string() })
}

fn vendor_class(class: &[u8]) -> VendorClass {
    // Old ROMs pad option 60 with NULs, so only the beginning counts.
    if class.starts_with(b"PXEClient") {
        VendorClass::Pxe
    } else if class.starts_with(b"HTTPClient") {
        VendorClass::Http
    } else if class.starts_with(kiln_protocol::VENDOR_CLASS.as_bytes()) {
        VendorClass::Agent
    } else {
        VendorClass::Other
    }
}

/// Option 93, else the number in `PXEClient:Arch:00007:UNDI:003016`.
fn architectures(option: Option<&[u8]>, class: &[u8]) -> Vec<ClientArch> {
    let listed: Vec<_> = option
        .unwrap_or_default()
        .as_chunks::<2>()
        .0
        .iter()
        .take(16)
        .map(|n| ClientArch::from_number(u16::from_be_bytes(*n)))
        .collect();
    if !listed.is_empty() {
        return listed;
    }
    std::str::from_utf8(class)
        .ok()
        .and_then(|text| text.split_once(":Arch:")?.1.get(..5)?.parse().ok())
        .map(ClientArch::from_number)
        .into_iter()
        .collect()
}

/// iPXE sends the four bytes bare, not RFC 3004's list of counted classes; both forms are read.
fn is_ipxe_user_class(value: &[u8]) -> bool {
    value == b"iPXE" || value == b"\x04iPXE"
}

fn smbios_order(u: [u8; 16]) -> [u8; 16] {
    let mut plain = u;
    plain[0..4].reverse();
    plain[4..6].reverse();
    plain[6..8].reverse();
    plain
}

fn text_uuid(bytes: [u8; 16]) -> MachineId {
    let mut text = String::with_capacity(36);
    for (i, byte) in bytes.iter().enumerate() {
        if matches!(i, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        write!(text, "{byte:02x}").expect("writing to a String cannot fail");
    }
    text.parse().expect("16 bytes in lower-case hex with dashes are a machine id")
}
