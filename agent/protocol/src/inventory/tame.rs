//! The bounds of an inventory: what firmware, disks and switches say of themselves is as long as they like.

use super::{Inventory, Unread};

/// Longest text in it, bytes.
const TEXT: usize = 64;
/// Longest sentence in it, bytes.
const SENTENCE: usize = 200;
/// Most CPU sockets, memory slots, PCI devices, disks and network interfaces kept.
const CPUS: usize = 64;
const DIMMS: usize = 256;
const PCI: usize = 1024;
const DISKS: usize = 256;
const NICS: usize = 128;

/// Trimmed, without characters that nobody sees, and cut to so many bytes.
pub(crate) fn clean(text: &str, limit: usize) -> String {
    let mut short = String::new();
    for c in text.chars().filter(|c| !c.is_control() && !is_direction(*c)) {
        // Blanks before the first word count neither way: they are not kept.
        if short.is_empty() && c.is_whitespace() {
            continue;
        }
        if short.len() + c.len_utf8() > limit {
            break;
        }
        short.push(c);
    }
    short.truncate(short.trim_end().len());
    short
}

/// Characters that turn the direction of what follows: they make a line say something else than it does (UAX #9).
fn is_direction(c: char) -> bool {
    matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

impl Inventory {
    /// Cuts everything to its bounds, and puts it in order, so that the same machine always gives the same bytes.
    #[must_use]
    pub fn tame(mut self) -> Self {
        let text = |t: &mut String| *t = clean(t, TEXT);
        let s = &mut self.system;
        for t in [&mut s.manufacturer, &mut s.product, &mut s.serial, &mut s.asset_tag, &mut s.chassis] {
            text(t);
        }
        text(&mut s.chassis_serial);
        let f = &mut self.firmware;
        [&mut f.vendor, &mut f.version, &mut f.date].into_iter().for_each(text);
        self.cpus.truncate(CPUS);
        self.dimms.truncate(DIMMS);
        self.pci.truncate(PCI);
        self.disks.truncate(DISKS);
        self.nics.truncate(NICS);
        self.unread.truncate(Unread::SECTIONS.len());
        for c in &mut self.cpus {
            [&mut c.socket, &mut c.model].into_iter().for_each(text);
        }
        for d in &mut self.dimms {
            let texts = [&mut d.slot, &mut d.kind, &mut d.manufacturer, &mut d.part, &mut d.serial];
            texts.into_iter().for_each(text);
        }
        for p in &mut self.pci {
            let short = |t: &mut String| *t = clean(t, 32);
            [&mut p.address, &mut p.id, &mut p.class, &mut p.driver].into_iter().for_each(short);
        }
        for d in &mut self.disks {
            let texts = [&mut d.name, &mut d.model, &mut d.serial, &mut d.transport, &mut d.driver, &mut d.pci];
            texts.into_iter().for_each(text);
            text(&mut d.firmware);
            if let Some(health) = &mut d.health {
                health.detail = clean(&health.detail, SENTENCE);
            }
        }
        for n in &mut self.nics {
            n.mac.make_ascii_lowercase();
            [&mut n.name, &mut n.mac, &mut n.driver, &mut n.pci, &mut n.firmware].into_iter().for_each(text);
            if let Some(to) = &mut n.neighbour {
                let texts = [&mut to.chassis, &mut to.port, &mut to.port_description, &mut to.system_name];
                texts.into_iter().for_each(text);
            }
        }
        let b = &mut self.bmc;
        [&mut b.address, &mut b.firmware].into_iter().for_each(text);
        b.note = clean(&b.note, SENTENCE);
        if let Some(tpm) = &mut self.tpm {
            text(&mut tpm.version);
        }
        for u in &mut self.unread {
            text(&mut u.section);
            u.reason = clean(&u.reason, SENTENCE);
        }
        self.pci.sort_by(|a, b| a.address.cmp(&b.address));
        self.disks.sort_by(|a, b| (a.name.len(), &a.name).cmp(&(b.name.len(), &b.name)));
        self.nics.sort_by(|a, b| a.name.cmp(&b.name));
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inventory::tests::full;
    use crate::inventory::{DiskHealth, INVENTORY_LIMIT};
    use proptest::prelude::*;

    #[test]
    fn the_largest_that_is_tame_fits_the_wire() {
        // Each becomes two bytes of JSON.
        let wide = "\\".repeat(1000);
        let mut big = full();
        let text = |t: &mut String| t.clone_from(&wide);
        for d in &mut big.disks {
            [&mut d.name, &mut d.model, &mut d.serial, &mut d.transport, &mut d.driver, &mut d.pci]
                .into_iter()
                .for_each(text);
            d.firmware.clone_from(&wide);
            d.health = Some(DiskHealth { passed: true, detail: wide.clone() });
        }
        big.disks = vec![big.disks[0].clone(); 2000];
        for n in &mut big.nics {
            [&mut n.name, &mut n.mac, &mut n.driver, &mut n.pci, &mut n.firmware].into_iter().for_each(text);
            let to = n.neighbour.as_mut().unwrap();
            [&mut to.chassis, &mut to.port, &mut to.port_description, &mut to.system_name].into_iter().for_each(text);
        }
        big.nics = vec![big.nics[0].clone(); 2000];
        let d = &mut big.dimms[0];
        [&mut d.slot, &mut d.kind, &mut d.manufacturer, &mut d.part, &mut d.serial].into_iter().for_each(text);
        big.dimms = vec![big.dimms[0].clone(); 2000];
        let p = &mut big.pci[0];
        [&mut p.address, &mut p.id, &mut p.class, &mut p.driver].into_iter().for_each(text);
        big.pci = vec![big.pci[0].clone(); 2000];
        let c = &mut big.cpus[0];
        [&mut c.socket, &mut c.model].into_iter().for_each(text);
        big.cpus = vec![big.cpus[0].clone(); 2000];
        let length = serde_json::to_vec(&big.tame()).unwrap().len();
        assert!((INVENTORY_LIMIT / 2..INVENTORY_LIMIT).contains(&length), "{length}");
    }

    proptest! {
        #[test]
        fn tame_is_final(text in "\\PC{0,300}", control in "[\\x00-\\x1f\u{202e}a]{0,20}") {
            let mut any = full();
            any.system.product = format!("{control}{text}{control}");
            any.disks[0].health = Some(DiskHealth { passed: false, detail: format!("{text}{control}") });
            let once = any.tame();
            prop_assert!(once.system.product.len() <= TEXT);
            prop_assert!(!once.system.product.chars().any(|c| c.is_control() || is_direction(c)));
            prop_assert_eq!(once.clone().tame(), once);
        }
    }
}
