//! Secrets and data with real firmware, a software TPM and a real disk: what the processes' tests show of the server and of
//! the TPM, seen from inside the machine and from the disk.

use crate::secure_boot::secure;
use kiln_lab::api::MachineView;
use kiln_lab::console::Mark;
use kiln_lab::machine::{Disk, MachineSpec};
use kiln_lab::rack::{IDLE, Rack, RackOptions};
use kiln_lab::variables::{self, NetworkBoot};
use kiln_lab::{site, testing};
use kiln_protocol::Stage;
use std::path::Path;
use std::process::Command;

const NAME: &str = "rack-1";
const FIRST: &str = "correct horse battery staple 41";
const SECOND: &str = "wrong donkey capacitor paperclip 97";
/// What the service writes, put together here as there.
const KEPT: [&str; 2] = ["KILN-VAULT-KEEPS", "-3f9c1d70"];

fn set(rack: &Rack, value: &str) {
    let file = rack.paths().scratch.join("value");
    std::fs::write(&file, value).unwrap();
    rack.kiln(&["secret", "set", "db-password", "--role", "lab", "--file", file.to_str().unwrap()]).unwrap();
    std::fs::remove_file(file).unwrap();
}

/// What the service says of this secret: its hash, its file's mode and owner, its file system.
fn told(value: &str) -> String {
    let hash = kiln_release::hex::sha256(value.as_bytes());
    format!("KILN-VAULT secret {} 400 games tmpfs", &hash[..16])
}

/// None of them is in the file. grep passes over the holes of a disk's file.
fn has_none(file: &Path, pieces: &[&str]) {
    for piece in pieces {
        let found = Command::new("grep").env("LC_ALL", "C").args(["-qaF", "-e", piece]).arg(file).status().unwrap();
        assert_eq!(found.code(), Some(1), "{} has {piece:?} in clear, or cannot be read", file.display());
    }
}

/// Retired and wiped: its receipt says so, and nothing of the data is on its disk. Somebody who had taken a copy of the disk before puts
/// that back into the same machine: the TPM has no key for it any more.
fn is_decommissioned(rack: &mut Rack, clear: &[&str]) {
    rack.machine(NAME).power_off();
    let (disk, copy) = (rack.machine(NAME).disk(0), rack.paths().scratch.join("before-the-wipe"));
    let copied = Command::new("cp").arg("--sparse=always").arg(&disk).arg(&copy).status().unwrap();
    assert!(copied.success());
    let operator = rack.site.join("offline/operator.key").display().to_string();
    rack.kiln(&["machine", "wipe", NAME, "--all-disks", "--order-key", &operator]).unwrap();
    rack.machine(NAME).power_on().unwrap();
    let wiped = |v: &MachineView| v.boots.iter().any(|boot| boot.at(Stage::Wipe, "done").is_some());
    rack.wait(NAME, "a receipt", wiped).unwrap();
    let said = rack.machine(NAME).console().unwrap().since(Mark::default());
    assert!(said.contains("the key of this machine's data is destroyed"), "{said}");
    rack.machine(NAME).power_off();
    let receipt = rack.kiln(&["machine", "receipt", NAME]).unwrap();
    let row = receipt.lines().find(|line| line.contains("rack-1-disk0")).unwrap_or_else(|| panic!("{receipt}"));
    assert!(row.contains("wiped"), "{row}");
    has_none(&disk, clear);

    std::fs::rename(&copy, &disk).unwrap();
    rack.machine(NAME).power_on().unwrap();
    let console = rack.machine(NAME).console().unwrap().clone();
    console.wait_for("(disk-data-other-key)", Mark::default(), IDLE).unwrap();
    console.wait_for("| stage    Checks health", Mark::default(), IDLE).unwrap();
    let said = console.since(Mark::default());
    assert!(said.contains("the machine's data is not there"), "{said}");
    for word in ["the machine's data, under its TPM's key", "KILN-VAULT secret", "KILN-VAULT data"] {
        assert!(!said.contains(word), "{word:?} in {said}");
    }
}

/// A machine without its secret says which is missing. Set, it reaches a service of the image as a file of its user in memory; set
/// anew, too. What the service keeps outlives a reimage to the other slot, which goes through firmware whatever was asked
/// for. On the disk nothing of either is in clear. Retired, the machine forgets at once, and after a restart gets nothing;
/// its data it can still open, until it is wiped: then nothing of it is left to read.
#[test]
#[ignore = "slow: an install, a reimage, a wipe and three restarts; make test-slow"]
fn secrets_and_data_live_in_one_machine_and_end_with_it() {
    testing::rack(|paths| {
        let disks = vec![Disk::VirtioBlk];
        let spec = MachineSpec { tpm: true, disks, ..secure(paths, NetworkBoot::Pxe) };
        let mut options = RackOptions::scenario(paths, "secrets", spec);
        options.image = site::VAULT.to_owned();
        let mut rack = Rack::start(paths, &options).unwrap();
        rack.kiln(&["release", "publish", "vault/1"]).unwrap();
        rack.machine(NAME).power_on().unwrap();
        let waits = |v: &MachineView| {
            v.last_words.as_ref().is_some_and(|words| words.to_string().contains("the secret db-password has not come"))
        };
        rack.wait(NAME, "its secret is missing", waits).unwrap();
        let console = rack.machine(NAME).console().unwrap().clone();
        set(&rack, FIRST);
        rack.wait_healthy(NAME, 1).unwrap();
        console.wait_for(&told(FIRST), Mark::default(), IDLE).unwrap();
        console.wait_for("KILN-VAULT data 1 20000 ext4", Mark::default(), IDLE).unwrap();
        // Its own key and certificate, in one file of the service's user.
        console.wait_for("KILN-VAULT identity 400 games 2", Mark::default(), IDLE).unwrap();
        let shown = rack.kiln(&["machine", "show", NAME]).unwrap();
        let certificate = shown.lines().find(|line| line.starts_with("certificate ")).unwrap();
        let serial = certificate.split_whitespace().nth(2).unwrap().trim_end_matches(',');
        assert!(serial.len() == 32 && !certificate.contains("revoked"), "{certificate}");
        console.wait_for(&format!("holds a certificate, serial {serial}"), Mark::default(), IDLE).unwrap();

        set(&rack, SECOND);
        console.wait_for(&told(SECOND), Mark::default(), IDLE).unwrap();
        console.wait_for("KILN-VAULT data 2 20000 ext4", Mark::default(), IDLE).unwrap();

        rack.kiln(&["release", "publish", "vault/2"]).unwrap();
        let (resets, begun) = (rack.machine(NAME).resets(), console.mark());
        rack.kiln(&["assign", NAME, "vault/2", "--via", "kexec"]).unwrap();
        rack.wait_healthy(NAME, 2).unwrap();
        assert!(rack.machine(NAME).resets() > resets, "the TPM gives the data's key to a boot through firmware only");
        console.wait_for(&told(SECOND), begun, IDLE).unwrap();
        console.wait_for("KILN-VAULT data 3 20000 ext4", begun, IDLE).unwrap();

        // Out of service.
        rack.kiln(&["machine", "retire", NAME]).unwrap();
        console.wait_for("no secrets for this machine any more: they are forgotten", begun, IDLE).unwrap();
        let shown = rack.kiln(&["machine", "show", NAME]).unwrap();
        assert!(shown.contains("revoked: its machine is out of service"), "{shown}");
        rack.machine(NAME).power_off();
        let kept = KEPT.concat();
        let clear = [FIRST, SECOND, kept.as_str()];
        has_none(&rack.machine(NAME).disk(0), &clear);
        has_none(&rack.site.join("state/kiln.db"), &clear);
        for file in std::fs::read_dir(&options.consoles).unwrap() {
            let text = std::fs::read(file.unwrap().path()).unwrap();
            assert!(clear.iter().all(|piece| !text.windows(piece.len()).any(|window| window == piece.as_bytes())));
        }
        // It starts what it has; nothing of the secrets is in it, and none come.
        rack.machine(NAME).power_on().unwrap();
        let console = rack.machine(NAME).console().unwrap().clone();
        let begun = console.mark();
        console.wait_for("the machine's data, under its TPM's key", begun, IDLE).unwrap();
        // The server has answered by then, as its name in the status tells.
        console.wait_for("kiln: rack-1: BOOTING", begun, IDLE).unwrap();
        console.wait_for("| stage    Checks health", begun, IDLE).unwrap();
        assert!(!console.since(begun).contains("KILN-VAULT secret"));
        is_decommissioned(&mut rack, &clear);
    });
}

/// Switches it on with this change of its firmware's variables as they were kept; gives its view once its TPM has proven that boot.
fn boots_with(rack: &mut Rack, kept: &Path, change: impl FnOnce(&Path)) -> MachineView {
    rack.machine(NAME).power_off();
    let last = rack.view(NAME).and_then(|view| Some(view.boot()?.boot_id.clone()));
    let store = rack.machine(NAME).variable_store();
    std::fs::copy(kept, &store).unwrap();
    change(&store);
    rack.machine(NAME).power_on().unwrap();
    let proven = |view: &MachineView| {
        let proof = view.attestation.as_ref();
        view.boot().map(|boot| &boot.boot_id) != last.as_ref()
            && proof.is_some_and(|proof| !proof.reason.contains("its TPM has proven nothing in this boot yet"))
    };
    let view = rack.wait(NAME, "a proof of this boot", proven).unwrap();
    println!("{:?}", view.attestation);
    view
}

/// PCR 7 on real firmware. A machine that was approved while it was attested is started with Secure Boot switched off: its TPM says so,
/// and it is given neither its secret nor its data. With another site's certificate in db beside, firmware starts the release as
/// it was signed, so that its secret comes; that others may sign is said, and the data stays shut. With its variables as they were,
/// all is as it was.
#[test]
#[ignore = "slow: an install and three restarts; make test-slow"]
fn secure_boot_switched_off_or_opened_to_others_is_proven_and_shuts_what_the_tpm_keeps() {
    const SHUT: &str = "Secure Boot's state is another than the key was made under";
    const OPEN: &str = "the machine's data, under its TPM's key";
    testing::rack(|paths| {
        let spec = MachineSpec { tpm: true, disks: vec![Disk::VirtioBlk], ..secure(paths, NetworkBoot::Pxe) };
        let mut options = RackOptions::scenario(paths, "pcr-7", spec);
        options.image = site::VAULT.to_owned();
        let mut rack = Rack::start(paths, &options).unwrap();
        rack.kiln(&["release", "publish", "vault/1"]).unwrap();
        set(&rack, FIRST);
        rack.machine(NAME).power_on().unwrap();
        let view = rack.wait_healthy(NAME, 1).unwrap();
        let proof = |view: &MachineView| view.attestation.clone().unwrap();
        assert_eq!(proof(&view).state, "attested", "{view:#?}");
        assert!(proof(&view).reason.ends_with("under the site's key"), "{view:#?}");
        let console = rack.machine(NAME).console().unwrap().clone();
        console.wait_for(&told(FIRST), Mark::default(), IDLE).unwrap();
        console.wait_for("KILN-VAULT data 1 20000 ext4", Mark::default(), IDLE).unwrap();
        console.wait_for("A Good vault/1", Mark::default(), IDLE).unwrap();
        rack.machine(NAME).power_off();
        let kept = paths.scratch.join("variables");
        std::fs::copy(rack.machine(NAME).variable_store(), &kept).unwrap();

        let view = boots_with(&mut rack, &kept, |store| variables::switch_secure_boot_off(store).unwrap());
        assert_eq!((proof(&view).state.as_str(), proof(&view).reason.as_str()), ("unattested", "Secure Boot is off"));
        assert_eq!(view.protection.as_deref(), Some("unprotected"));
        let console = rack.machine(NAME).console().unwrap().clone();
        console.wait_for("| stage    Checks health", Mark::default(), IDLE).unwrap();
        let missing = |v: &MachineView| {
            v.last_words.as_ref().is_some_and(|words| words.to_string().contains("the secret db-password has not come"))
        };
        rack.wait(NAME, "its secret does not come", missing).unwrap();
        let said = console.since(Mark::default());
        assert!(said.contains("the machine's data is not there") && said.contains(SHUT), "{said}");
        assert!(!said.contains(OPEN) && !said.contains("KILN-VAULT"), "{said}");
        let shown = rack.kiln(&["machine", "show", NAME]).unwrap();
        assert!(shown.contains("unattested: Secure Boot is off"), "{shown}");
        let list = rack.kiln(&["secret", "list"]).unwrap();
        assert!(list.contains("0 of 1 machines hold it") && list.contains("Secure Boot is off"), "{list}");

        let other = paths.scratch.join("other");
        site::kiln_quiet(paths, &["trust", "init", "--lab", other.to_str().unwrap(), "--name", "other"]).unwrap();
        let folder = paths.scratch.join("other-keys");
        site::enroll(paths, &other, &folder).unwrap();
        // `secure` has written the site's own there.
        let lists = [paths.scratch.join("keys"), folder].map(|keys| std::fs::read(keys.join("db.esl")).unwrap());
        let view = boots_with(&mut rack, &kept, |store| variables::set_signers(store, &lists.concat()).unwrap());
        assert_eq!(proof(&view).state, "attested", "{view:#?}");
        assert!(proof(&view).reason.ends_with("; db lets in more than the site's key"), "{view:#?}");
        let console = rack.machine(NAME).console().unwrap().clone();
        console.wait_for(&told(FIRST), Mark::default(), IDLE).unwrap();
        let said = console.since(Mark::default());
        assert!(said.contains("the machine's data is not there") && said.contains(SHUT), "{said}");
        assert!(!said.contains(OPEN), "{said}");

        let view = boots_with(&mut rack, &kept, |_| {});
        assert_eq!(proof(&view).state, "attested", "{view:#?}");
        assert!(proof(&view).reason.ends_with("under the site's key"), "{view:#?}");
        rack.wait_healthy(NAME, 1).unwrap();
        let console = rack.machine(NAME).console().unwrap().clone();
        console.wait_for(&told(FIRST), Mark::default(), IDLE).unwrap();
        console.wait_for("KILN-VAULT data 2 20000 ext4", Mark::default(), IDLE).unwrap();
        assert!(console.since(Mark::default()).contains(OPEN));
    });
}
