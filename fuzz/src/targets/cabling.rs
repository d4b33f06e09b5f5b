//! What a machine finds out about itself: frames of switches, firmware's tables, the kernel's texts.

/// Texts that are shown and sent: short, and without what a terminal would act on.
fn clean(text: &str) {
    assert!(text.len() <= 64 && !text.contains(char::is_control), "{text:?}");
}

/// Frames of a switch.
pub mod lldp {
    use super::clean;
    use kiln_protocol::{Lldp, parse_lldp};

    /// It ends where a TLV does, and none of them is the end TLV.
    fn is_whole(mut data: &[u8]) -> bool {
        while let Some((header, after)) = data.split_first_chunk::<2>() {
            let length = usize::from(u16::from_be_bytes(*header) & 0x1ff);
            let Some(rest) = after.get(length..).filter(|_| header[0] > 1) else { return false };
            data = rest;
        }
        data.is_empty()
    }

    pub fn run(data: &[u8]) {
        match parse_lldp(data) {
            Ok(Lldp::Neighbour(neighbour, ttl)) => {
                assert!(ttl > 0);
                for text in [&neighbour.chassis, &neighbour.port, &neighbour.port_description, &neighbour.system_name] {
                    clean(text);
                }
                // Behind the end TLV: what pads the frame to its least length says nothing.
                if is_whole(data) {
                    let padded = [data, &[0, 0], &[0xff; 20]].concat();
                    assert_eq!(parse_lldp(&padded), parse_lldp(data));
                }
            }
            Ok(Lldp::Leaves) | Err(_) => {}
        }
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        let tlv = |kind: u8, value: &[u8]| {
            let header = u16::from(kind) << 9 | u16::try_from(value.len()).expect("short");
            [&header.to_be_bytes()[..], value].concat()
        };
        let head = [tlv(1, &[4, 0x52, 0x54, 0, 0xab, 0xcd, 0xef]), tlv(2, b"\x05Ethernet1/3")].concat();
        let rest = [tlv(4, b"to rack 7"), tlv(5, b"s1\0"), tlv(127, b"\0\x80\xc2\x01\0\x07"), tlv(0, b"")].concat();
        let address = [tlv(1, &[5, 1, 10, 0, 0, 1]), tlv(2, &[4, 2, 1, 2, 3]), tlv(3, &[0, 1])].concat();
        vec![[&head[..], &tlv(3, &[0, 120]), &rest].concat(), [head, tlv(3, &[0, 0])].concat(), address]
    }
}

/// Firmware's tables.
pub mod smbios {
    use super::clean;
    use kiln_protocol::parse_smbios;

    pub fn run(data: &[u8]) {
        let whole = parse_smbios(data);
        let (s, f) = (&whole.system, &whole.firmware);
        for text in [&s.manufacturer, &s.product, &s.serial, &s.asset_tag, &s.chassis, &f.vendor, &f.version, &f.date] {
            clean(text);
        }
        assert!(whole.dimms.len() + whole.cpus.len() <= 4096);
        for (number, dimm) in whole.dimms.iter().enumerate() {
            assert!(whole.dimms[..number].iter().all(|other| other.slot != dimm.slot), "two slots {:?}", dimm.slot);
        }
        // A table that is cut short: what was read before counts.
        let cut = parse_smbios(&data[..data.len() / 2]);
        assert!(whole.cpus.starts_with(&cut.cpus) && whole.dimms.starts_with(&cut.dimms));
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        let table = include_bytes!("../../../agent/protocol/tests/data/qemu-q35.dmi");
        vec![table.to_vec(), table[..table.len() / 3].to_vec(), vec![127, 4, 0, 0, 0, 0]]
    }
}

/// The kernel's and the system's texts, which programs of the image can shape. The first byte says which it is.
pub mod proc_text {
    use super::super::chosen;
    use kiln_protocol::{Usage, drift};
    use kiln_release::declared::users_of;

    pub fn run(data: &[u8]) {
        let Some((choice, rest)) = super::super::choice(data) else { return };
        let text = String::from_utf8_lossy(rest);
        let declared = ["tcp/22".to_owned(), "/srv".to_owned()];
        let differences = match choice % 5 {
            0 => drift::modules(&text, &["virtio_net".to_owned()]),
            1 => drift::mounts(&text, &["/var"], &declared, &declared),
            2 => {
                let found = drift::listeners(&text, "tcp", &declared);
                assert!(found.iter().all(|listener| listener.what != "tcp/22"), "what is declared is no drift");
                found.iter().map(|listener| drift::listener(listener, Some(&text))).collect()
            }
            3 => {
                let users = users_of(&text);
                assert!(users.is_sorted());
                assert!(drift::users(&users, &users).is_empty());
                drift::users(&users, &["root:0".to_owned()])
            }
            _ => {
                let (once, _) = Usage::default().look("x.service", &text, &text);
                let (again, told) = once.look("x.service", &text, &text);
                assert!(again == once && told.is_empty(), "nothing happened in between");
                Vec::new()
            }
        };
        for difference in differences {
            assert!(!difference.text.contains(char::is_control), "{difference:?}");
            assert!(!difference.what.contains(char::is_control), "{difference:?}");
        }
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        let mounts = "22 1 254:0 / / ro,relatime - erofs /dev/dm-0 ro\n\
            23 22 0:21 / /var rw,nosuid,nodev,noexec - tmpfs kiln rw\n\
            24 22 0:22 / /srv\\040x rw shared:1 - ext4 /dev/sda1 rw\n";
        let sockets = "  sl  local_address rem_address   st\n   0: 00000000:0016 00000000:0000 0A 0 0 0 0 0 1234 1\n   \
            1: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 99 1\n";
        let texts: [(u8, &str); 5] = [
            (0, "virtio_net 65536 0 - Live 0x0\nevil 4096 0 - Live 0x0 (OE)\n"),
            (1, mounts),
            (2, sockets),
            (3, "root:x:0:0:root:/root:/bin/bash\nx:y:1:1::/:\n"),
            (4, "oom_kill 3\nnr_periods 10\nnr_throttled 8\n"),
        ];
        texts.iter().flat_map(|(n, text)| chosen(*n, [text.as_bytes()])).collect()
    }
}
