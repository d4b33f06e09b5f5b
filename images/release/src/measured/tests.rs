use super::*;
use crate::efi::{certificate_list, digest_list};
use crate::formats::Measured;
use crate::hex;
use crate::pe::tests::image;
use proptest::prelude::*;
use std::collections::BTreeSet;

const PCRS: [u8; 9] = [0, 1, 2, 3, 4, 7, 10, 11, 12];
const UKI: [u8; 32] = [0xaa; 32];
const KERNEL: [u8; 32] = [0xbb; 32];

/// An event log as firmware writes it, and the PCRs that come of it.
#[derive(Clone)]
struct Machine {
    log: Vec<u8>,
    values: [[u8; 32]; 9],
}

impl Machine {
    fn new() -> Self {
        let mut spec = b"Spec ID Event03\0".to_vec();
        spec.extend([0, 0, 0, 0, 0, 2, 0, 2, 2, 0, 0, 0, 4, 0, 20, 0, 0x0b, 0, 32, 0, 0]);
        let mut log = [&[0; 4][..], &3_u32.to_le_bytes(), &[0; 20]].concat();
        log.extend(u32::try_from(spec.len()).unwrap().to_le_bytes());
        log.extend(spec);
        Self { log, values: [[0; 32]; 9] }
    }

    fn extend(&mut self, pcr: u8, digest: [u8; 32]) {
        let at = PCRS.iter().position(|p| *p == pcr).unwrap();
        self.values[at] = extend(&self.values[at], &digest);
    }

    fn event(&mut self, pcr: u8, kind: u32, digest: [u8; 32], data: &[u8]) -> &mut Self {
        self.extend(pcr, digest);
        self.log.extend(u32::from(pcr).to_le_bytes());
        self.log.extend(kind.to_le_bytes());
        self.log.extend([2, 0, 0, 0, 4, 0]);
        self.log.extend([0x11; 20]);
        self.log.extend([0x0b, 0]);
        self.log.extend(digest);
        self.log.extend(u32::try_from(data.len()).unwrap().to_le_bytes());
        self.log.extend(data);
        self
    }

    fn hashed(&mut self, pcr: u8, kind: u32, data: &[u8]) -> &mut Self {
        self.event(pcr, kind, sha256(data), data)
    }

    fn variable(&mut self, pcr: u8, kind: u32, name: &str, content: &[u8]) -> &mut Self {
        let data = variable(name, content);
        self.hashed(pcr, kind, &data)
    }

    /// One that boots the release as it should.
    fn honest(secure: u8, db: &[u8]) -> Self {
        let mut machine = Self::new();
        machine.hashed(0, 8, b"firmware").hashed(2, 0x8000_0004, b"option ROM").hashed(1, 1, b"settings");
        machine.variable(1, 0x8000_0002, "BootOrder", &[0, 0, 1, 0]);
        machine.variable(7, 0x8000_0001, "SecureBoot", &[secure]).variable(7, 0x8000_0001, "db", db);
        for pcr in [0, 1, 2, 3, 4, 7] {
            machine.hashed(pcr, 4, &[0; 4]);
        }
        machine.hashed(4, 0x8000_0007, b"Calling EFI Application from Boot Option");
        machine.event(4, 0x8000_0003, UKI, b"path").event(4, 0x8000_0003, KERNEL, b"path");
        machine.extend(11, [1; 32]);
        machine
    }

    fn quoted(&self) -> Quoted<'_> {
        Quoted { pcrs: &PCRS, values: &self.values }
    }

    fn judged(&self) -> Result<Booted, Finding> {
        judge(&read(&self.log, self.quoted())?, &release(), &BTreeSet::new())
    }
}

fn variable(name: &str, content: &[u8]) -> Vec<u8> {
    let units: Vec<u8> = name.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let number = |n: usize| u64::try_from(n).unwrap().to_le_bytes();
    [&[9; 16][..], &number(name.len()), &number(content.len()), &units, content].concat()
}

fn release() -> Measured {
    Measured {
        pcr11: hex::encode(&extend(&[0; 32], &[1; 32])),
        uki: hex::encode(&UKI),
        kernel: hex::encode(&KERNEL),
        loader: None,
        certificate: Some(hex::sha256(b"site")),
        kexec: None,
    }
}

fn honest() -> Machine {
    Machine::honest(1, &certificate_list(b"site"))
}

/// The value is systemd-measure's (252), for these four files and no phase. The order is the stub's, not the file's.
#[test]
fn pcr_11_is_what_systemd_measure_says() {
    let parts: [(&str, &[u8]); 5] = [
        (".osrel", b"os"),
        (".cmdline", b"quiet"),
        (".pcrsig", b"not measured"),
        (".initrd", b"init"),
        (".linux", b"linux"),
    ];
    let value = hex::encode(&pcr11(&image(&parts)).unwrap());
    assert_eq!(value, "bc0a0203874e056b3f66992561680ea94cb50a5e0a25efc81ef2cd6d01eff2e9");
    let twice = [parts[0], parts[0]];
    assert!(pcr11(&image(&twice)).is_err(), "which of two the stub takes is not ours to guess");
}

#[test]
fn a_machine_that_booted_its_release_is_attested_and_caps_count_kexecs() {
    let mut machine = honest();
    let booted = machine.judged().unwrap();
    assert_eq!(booted.caps, 0);
    for n in 1..4 {
        machine.extend(11, cap());
        assert_eq!(machine.judged().unwrap().caps, n);
    }
    machine.extend(11, [0; 32]);
    assert!(matches!(machine.judged(), Err(Finding::Fault(Fault::Pcr11 { .. }))));
}

#[test]
fn option_roms_are_listed_once_each_whatever_may_boot() {
    // Before the site's key is in db: nothing is attested yet, and the ROMs are known all the same.
    let mut machine = Machine::honest(0, b"");
    let roms = |machine: &Machine| read(&machine.log, machine.quoted()).unwrap().option_roms();
    let first = hex::encode(&sha256(b"option ROM"));
    assert_eq!(roms(&machine), std::slice::from_ref(&first));
    machine.event(2, 0x8000_0004, [7; 32], b"path").event(2, 0x8000_0004, [7; 32], b"another card of that kind");
    machine.event(2, 0x8000_0005, [8; 32], b"path");
    // Neither a table of PCR 2 nor a driver of PCR 0 is an option ROM.
    machine.event(2, 1, [9; 32], b"table").event(0, 0x8000_0004, [10; 32], b"driver");
    assert_eq!(roms(&machine), [first, hex::encode(&[7; 32]), hex::encode(&[8; 32])]);
    assert!(machine.judged().is_err());
    for n in 0..100 {
        machine.event(2, 0x8000_0004, [n; 32], b"");
    }
    assert_eq!(roms(&machine).len(), 64, "their number has an end");
}

#[test]
fn each_thing_that_is_not_the_release_is_named() {
    let fault = |machine: &Machine| match machine.judged().unwrap_err() {
        Finding::Fault(fault) => fault,
        Finding::Doubt(doubt) => panic!("only a doubt: {doubt}"),
    };
    let mut extra = honest();
    extra.extend(12, [5; 32]);
    assert_eq!(fault(&extra), Fault::Pcr12, "SMBIOS or ESP extras");

    let mut foreign = honest();
    foreign.event(4, 0x8000_0003, [0xcc; 32], b"");
    assert_eq!(fault(&foreign), Fault::ForeignProgram { digest: hex::encode(&[0xcc; 32]) });
    // Called a remark, or with the program's own bytes as its text.
    let program = [b"MZ\x90\0".as_slice(), &[7; 400]].concat();
    for kind in [0x8000_0007, 4] {
        let mut hidden = honest();
        hidden.event(4, kind, [0xcc; 32], b"Calling EFI Application from Boot Option");
        assert!(matches!(fault(&hidden), Fault::ForeignProgram { .. }));
        let mut hidden = honest();
        hidden.hashed(4, kind, &program);
        assert!(matches!(fault(&hidden), Fault::ForeignProgram { .. }));
    }

    let mut other = Machine::new();
    other.hashed(4, 4, &[0; 4]).event(4, 0x8000_0003, KERNEL, b"");
    assert_eq!(fault(&other), Fault::OtherUki);

    let mut altered = honest();
    altered.values[7] = extend(&[0; 32], &[2; 32]);
    assert!(matches!(fault(&altered), Fault::Pcr11 { .. }), "an altered command line or initramfs");
}

#[test]
fn a_log_that_lies_does_not_replay() {
    let machine = honest();
    for pcr in [0_u8, 1, 2, 3, 4, 7] {
        let mut lying = machine.clone();
        lying.extend(pcr, [3; 32]);
        match lying.judged().unwrap_err() {
            Finding::Fault(Fault::Replay { pcr: told, .. }) => assert_eq!(told, pcr),
            other @ (Finding::Doubt(_) | Finding::Fault(_)) => panic!("{other}"),
        }
    }
    // Secure Boot was off; the log says it was on, and that the true event was something else, later.
    let mut off = Machine::new();
    off.variable(7, 0x8000_0001, "SecureBoot", &[0]).hashed(7, 4, &[0; 4]);
    off.variable(7, 0x8000_0001, "SecureBoot", &[1]).hashed(7, 4, &[0; 4]);
    off.event(4, 0x8000_0003, UKI, b"").extend(11, [1; 32]);
    assert_eq!(off.judged(), Err(Doubt::SecureBootOff.into()));
    let mut twice = Machine::new();
    twice.variable(7, 0x8000_0001, "SecureBoot", &[1]).variable(7, 0x8000_0001, "SecureBoot", &[0]);
    twice.event(4, 0x8000_0003, UKI, b"").extend(11, [1; 32]);
    assert_eq!(twice.judged(), Err(Fault::Twice("SecureBoot").into()));
    let mut claimed = Machine::new();
    let data = variable("SecureBoot", &[1]);
    claimed.event(7, 0x8000_0001, sha256(&variable("SecureBoot", &[0])), &data);
    claimed.event(4, 0x8000_0003, UKI, b"").extend(11, [1; 32]);
    assert_eq!(claimed.judged(), Err(Fault::Variable("SecureBoot").into()));
}

#[test]
fn what_is_only_missing_is_a_doubt() {
    let site = certificate_list(b"site");
    assert_eq!(Machine::honest(0, &site).judged(), Err(Doubt::SecureBootOff.into()));
    let others = certificate_list(b"Microsoft");
    assert_eq!(Machine::honest(1, &others).judged(), Err(Doubt::SiteNotInDb.into()));
    // Who else may sign is told of a boot that is as it should be.
    for (db, told) in [
        (site.clone(), false),
        ([site.clone(), digest_list(&[[1; 32]])].concat(), false),
        ([site.clone(), others.clone()].concat(), true),
        ([others, site].concat(), true),
    ] {
        assert_eq!(Machine::honest(1, &db).judged().unwrap().others, told);
    }
    let mut none = honest();
    none.log.clear();
    assert_eq!(none.judged(), Err(Doubt::NoLog.into()));
    let unsigned = Measured { certificate: None, ..release() };
    let machine = honest();
    let evidence = read(&machine.log, machine.quoted()).unwrap();
    assert_eq!(judge(&evidence, &unsigned, &BTreeSet::new()), Err(Doubt::ReleaseUnsigned.into()));
    assert_eq!(evidence.programs(), [hex::encode(&UKI), hex::encode(&KERNEL)]);
}

#[test]
fn a_loader_of_the_site_may_stand_before_the_uki() {
    let mut machine = Machine::new();
    machine.variable(7, 0x8000_0001, "SecureBoot", &[1]).variable(7, 0x8000_0001, "db", &certificate_list(b"site"));
    machine.event(4, 0x8000_0003, [0xdd; 32], b"").event(4, 0x8000_0003, UKI, b"").extend(11, [1; 32]);
    assert!(matches!(machine.judged(), Err(Finding::Fault(Fault::ForeignProgram { .. }))));
    let evidence = read(&machine.log, machine.quoted()).unwrap();
    let loader = hex::encode(&[0xdd; 32]);
    judge(&evidence, &release(), &BTreeSet::from([loader.clone()])).unwrap();
    judge(&evidence, &Measured { loader: Some(loader), ..release() }, &BTreeSet::new()).unwrap();
}

#[test]
fn firmware_is_pinned_and_the_boot_order_is_not() {
    let pinned = |change: fn(&mut Machine)| {
        let mut machine = Machine::new();
        machine.hashed(0, 8, b"firmware").hashed(2, 0x8000_0004, b"option ROM");
        change(&mut machine);
        machine.variable(7, 0x8000_0001, "SecureBoot", &[1]).variable(7, 0x8000_0001, "db", &certificate_list(b"site"));
        machine.event(4, 0x8000_0003, UKI, b"").extend(11, [1; 32]);
        machine.judged().unwrap().firmware
    };
    let plain = pinned(|_| {});
    let option = [&[1, 0, 0, 0, 4, 0, b'x', 0, 0, 0][..], &[0x7f, 0xff, 4, 0]].concat();
    assert_eq!(
        plain,
        pinned(|m| {
            m.variable(1, 0x8000_0002, "BootOrder", &[1, 0]);
        })
    );
    assert_eq!(plain, {
        let mut machine = Machine::new();
        machine.hashed(0, 8, b"firmware").hashed(2, 0x8000_0004, b"option ROM");
        // EV_EFI_VARIABLE_BOOT: the digest is over the content alone.
        machine.event(1, 0x8000_0002, sha256(&option), &variable("Boot0001", &option));
        machine.variable(7, 0x8000_0001, "SecureBoot", &[1]).variable(7, 0x8000_0001, "db", &certificate_list(b"site"));
        machine.event(4, 0x8000_0003, UKI, b"").extend(11, [1; 32]);
        machine.judged().unwrap().firmware
    });
    for (pcr, changed) in [
        (
            0,
            pinned(|m| {
                m.hashed(0, 8, b"more");
            }),
        ),
        (
            1,
            pinned(|m| {
                m.hashed(1, 1, b"other settings");
            }),
        ),
        (
            1,
            pinned(|m| {
                m.event(1, 0x8000_0002, [4; 32], &variable("BootOrder", &[1, 0]));
            }),
        ),
        (
            1,
            pinned(|m| {
                m.variable(1, 0x8000_0002, "Setup", &[1, 0]);
            }),
        ),
        (
            0,
            pinned(|m| {
                m.variable(0, 0x8000_0002, "BootOrder", &[1, 0]);
            }),
        ),
        (
            2,
            pinned(|m| {
                m.hashed(2, 0x8000_0004, b"implant");
            }),
        ),
    ] {
        for at in 0..4 {
            assert_eq!(plain[at] == changed[at], at != pcr, "PCR {at} when {pcr} changes");
        }
    }
}

proptest! {
    #[test]
    fn no_log_makes_the_reader_panic(at in 0_usize..900, value: u32, cut in 0_usize..2000) {
        let mut machine = honest();
        let end = (at + 4).min(machine.log.len());
        if at < end {
            machine.log[at..end].copy_from_slice(&value.to_le_bytes()[..end - at]);
        }
        machine.log.truncate(cut);
        if let Ok(log) = Log::read(&machine.log) {
            for pcr in 0..24 {
                let _ = log.replay(pcr);
            }
        }
        let _ = machine.judged();
    }
}

/// One whose firmware has this dbx, and names db again for the program that it lets in.
fn with_dbx(dbx: &[u8]) -> Machine {
    let mut machine = Machine::new();
    machine.variable(7, 0x8000_0001, "SecureBoot", &[1]).variable(7, 0x8000_0001, "db", b"keys");
    machine.variable(7, 0x8000_0001, "dbx", dbx).hashed(7, 4, &[0; 4]).variable(7, 0x8000_00e0, "db", b"key");
    machine
}

#[test]
fn what_pcr_7_comes_to_with_another_dbx_is_what_the_next_start_measures() {
    let pcr7 = |machine: &Machine| machine.quoted().value(7).unwrap();
    for (before, after) in
        [("", "one"), ("one", "one and another"), ("one", "")].map(|(a, b)| (a.as_bytes(), b.as_bytes()))
    {
        let (now, next) = (with_dbx(before), with_dbx(after));
        let log = Log::read(&now.log).unwrap();
        assert_eq!(after_change(&log, &pcr7(&now), "dbx", before, after), Some(pcr7(&next)));
        // The log is not of this boot, the variable was another, or is none that was measured.
        assert_eq!(after_change(&log, &pcr7(&next), "dbx", before, after), None);
        assert_eq!(after_change(&log, &pcr7(&now), "dbx", b"other", after), None);
        assert_eq!(after_change(&log, &pcr7(&now), "dbr", before, after), None);
    }
    // Named twice, or only where it is no setting.
    let mut twice = Machine::new();
    twice.variable(7, 0x8000_0001, "dbx", b"one").variable(7, 0x8000_0001, "dbx", b"one").hashed(7, 4, &[0; 4]);
    let mut late = Machine::new();
    late.hashed(7, 4, &[0; 4]).variable(7, 0x8000_0001, "dbx", b"one");
    for machine in [twice, late] {
        let log = Log::read(&machine.log).unwrap();
        assert_eq!(after_change(&log, &pcr7(&machine), "dbx", b"one", b"two"), None);
    }
    // Its content is not what was measured.
    let mut false_word = Machine::new();
    false_word.event(7, 0x8000_0001, [5; 32], &variable("dbx", b"one"));
    let log = Log::read(&false_word.log).unwrap();
    assert_eq!(after_change(&log, &pcr7(&false_word), "dbx", b"one", b"two"), None);
}
