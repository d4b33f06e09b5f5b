//! What becomes of a machine's attestation over kexecs, by what its kernels measured into PCR 10, against a running `kiln serve` and
//! a real TPM in software.

use crate::common::chip::*;
use crate::common::*;
use kiln_protocol::tpm::command;
use kiln_protocol::*;
use kiln_release::measured::{cap, ima_unmeasured};
use kiln_release::{Crossing, Manifest, hex};

const CARRIED: &str = "attested at cold boot (minimal/2), carried by kexec";

/// What a kexec of a release loads, if it is the release's own.
fn crossing(release: u64) -> [u8; 32] {
    sha256(format!("crossing {release}").as_bytes())
}

/// A release as builders make them that predict kexecs.
fn publish(site: &TestSite, release: u64) -> Manifest {
    site.publish_as(release, |manifest| {
        let kexec = Crossing {
            with_root: Some(hex::encode(&crossing(release))),
            without_root: hex::sha256(format!("slot {release}").as_bytes()),
        };
        manifest.measured.as_mut().unwrap().kexec = Some(kexec);
    })
}

/// The word before a kexec.
async fn leaves(server: &Server, agent: &Agent, measured: &[u8]) -> Judged {
    let (machine, boot_id) = (machine_id(agent.n), boot_id(agent));
    judge(server, agent, &Attestation::Leave { machine, boot_id, measured: HexBytes(measured.to_vec()) }).await
}

/// PCR 11 takes the cap, and the next kernel starts, of which the server knows nothing.
fn jumps(agent: &mut Agent, chip: &mut Chip, to: &Manifest) {
    chip.run(&command::pcr_extend(11, &cap()));
    agent.restart(to);
    chip.kernel_starts();
}

struct Bed {
    chip: Chip,
    server: Server,
    agent: Agent,
    second: Manifest,
    third: Manifest,
    _site: TestSite,
}

/// A machine that firmware has started with release 2, and its kernel with the policy.
async fn bed() -> Option<Bed> {
    let mut chip = Chip::new()?;
    let site = TestSite::new();
    let (second, third) = (publish(&site, 2), publish(&site, 3));
    let server = Server::start(&site).await;
    let agent = Agent::new(1, &second);
    chip.boot(2, b"firmware", 1);
    chip.kernel_starts();
    Some(Bed { chip, server, agent, second, third, _site: site })
}

#[tokio::test]
async fn a_kexec_stays_attested_if_what_was_loaded_is_published_and_no_other() {
    let Some(Bed { mut chip, server, mut agent, second, third, _site }) = bed().await else { return };
    let judged = boots(&server, &mut agent, &mut chip).await;
    assert_eq!(judged.state, AttestationState::Attested, "{judged:?}");
    // There and back; the second kernel has lost the firmware's log.
    for (to, release, keeps_log) in [(&third, 3, true), (&second, 2, false)] {
        chip.kernel_loads(to, crossing(release));
        let judged = leaves(&server, &agent, &chip.measured).await;
        assert_eq!(judged.state, AttestationState::Attested, "{judged:?}");
        if !keeps_log {
            chip.log.clear();
        }
        jumps(&mut agent, &mut chip, to);
        let judged = boots(&server, &mut agent, &mut chip).await;
        assert_eq!((judged.state, judged.reason.as_str()), (AttestationState::Attested, CARRIED));
    }

    // Root in the running system loads the signed kernel with a foreign initramfs, and goes without a word.
    let foreign = sha256(b"the right initramfs, and one file more");
    let before = chip.measured.clone();
    chip.kernel_loads(&third, foreign);
    let told = chip.measured[before.len()..].to_vec();
    jumps(&mut agent, &mut chip, &third);
    let judged = boots(&server, &mut agent, &mut chip).await;
    assert_eq!(judged.state, AttestationState::Failed);
    assert!(judged.reason.starts_with("PCR 10 is "), "{judged:?}");
    // Nothing but the truth leads to that value, and the truth names it.
    chip.measured = [told, chip.measured.clone()].concat();
    let judged = prove(&server, &agent, &mut chip).await.0;
    assert_eq!(judged.state, AttestationState::Failed);
    let named = format!("measured the initramfs {} for a kexec", hex::encode(&foreign));
    assert!(judged.reason.contains(&named), "{judged:?}");
    let view = server.machine("rack-1").await;
    assert_eq!(view.protection, Some(ProtectionClass::Unprotected));
}

#[tokio::test]
async fn a_word_that_is_not_the_truth_is_found_out_by_the_next_kernel() {
    let Some(Bed { mut chip, server, mut agent, second, third, _site }) = bed().await else { return };
    // Before it has proven anything there is nothing to go on from.
    report(&server, &mut agent, TpmPresence::Ready).await;
    let step = Attestation::Leave {
        machine: machine_id(1),
        boot_id: boot_id(&agent),
        measured: HexBytes(chip.measured.clone()),
    };
    assert_eq!(post(&server, &agent, &step).await.status, hyper::StatusCode::CONFLICT);
    assert_eq!(prove(&server, &agent, &mut chip).await.0.state, AttestationState::Attested);
    // Another machine's key says it now: that is nobody's word.
    let stranger = Agent { signer: Agent::new(2, &second).signer, ..agent.clone() };
    assert_eq!(post(&server, &stranger, &step).await.status, hyper::StatusCode::CONFLICT);
    // It leaves out what it has loaded: a kexec would not be attested, and an honest agent does not make it.
    let before = chip.measured.clone();
    chip.kernel_loads(&third, crossing(3));
    let judged = leaves(&server, &agent, &before).await;
    assert_eq!(judged.state, AttestationState::Failed);
    // The truth mends it; but the kernel that comes is not the one that was loaded.
    assert_eq!(leaves(&server, &agent, &chip.measured).await.state, AttestationState::Attested);
    jumps(&mut agent, &mut chip, &second);
    let judged = boots(&server, &mut agent, &mut chip).await;
    assert_eq!(judged.state, AttestationState::Failed);
    assert!(judged.reason.contains("the kernel before loaded minimal/3"), "{judged:?}");

    // A cold boot begins anew; and a list of rubbish is no word.
    chip.restart();
    chip.boot(3, b"firmware", 1);
    chip.kernel_starts();
    agent.restart(&third);
    assert_eq!(boots(&server, &mut agent, &mut chip).await.state, AttestationState::Attested);
    let judged = leaves(&server, &agent, &[10, 0, 0]).await;
    assert!(judged.state == AttestationState::Failed && judged.reason.contains("cut short"), "{judged:?}");
    jumps(&mut agent, &mut chip, &third);
    let judged = boots(&server, &mut agent, &mut chip).await;
    assert_eq!(judged.state, AttestationState::Failed, "{judged:?}");
}

/// A file that was read as a module is listed as one, and as nothing else when it is loaded for a kexec.
#[tokio::test]
async fn an_initramfs_that_was_measured_as_a_module_carries_nobody() {
    let Some(Bed { mut chip, server, mut agent, third, _site, .. }) = bed().await else { return };
    let named = |sha256: [u8; 32]| [b"sha256:\0".as_slice(), &sha256].concat();
    for told in [true, false] {
        assert_eq!(boots(&server, &mut agent, &mut chip).await.state, AttestationState::Attested);
        chip.measures(&[&named(sha256(b"the right initramfs, and one file more")), b"/run/x\0", &[]]);
        chip.measures(&[&named(raw(&third.loaded_kernel().sha256)), b"/run/kernel\0", &[]]);
        let before = chip.measured.clone();
        if told {
            let judged = leaves(&server, &agent, &chip.measured).await;
            assert_eq!(judged.state, AttestationState::Failed, "{judged:?}");
            jumps(&mut agent, &mut chip, &third);
            let judged = boots(&server, &mut agent, &mut chip).await;
            assert_eq!(judged.state, AttestationState::Failed);
            assert!(judged.reason.contains("the kernel before loaded no release"), "{judged:?}");
            chip.restart();
            chip.boot(3, b"firmware", 1);
            chip.kernel_starts();
            agent.restart(&third);
        } else {
            // It says nothing, and passes for the boot that it was: with the cap that it had, and a list that goes on.
            chip.kernel_starts();
            chip.measured = [before, chip.measured.clone()].concat();
            let judged = prove(&server, &agent, &mut chip).await.0;
            assert_eq!(judged.state, AttestationState::Failed);
            assert!(judged.reason.contains("another kernel has started since"), "{judged:?}");
        }
    }
}

#[tokio::test]
async fn a_kernel_that_measures_nothing_is_shown_so_and_one_that_hides_its_list_fails() {
    let Some(Bed { mut chip, server, mut agent, second, third, _site }) = bed().await else { return };
    chip.measured.clear();
    let judged = boots(&server, &mut agent, &mut chip).await;
    assert_eq!(judged.state, AttestationState::Failed);
    assert!(judged.reason.contains("shows no list"), "{judged:?}");

    // No IMA in the kernel, say: the agent has said so before it left its initramfs.
    chip.restart();
    chip.boot(2, b"firmware", 1);
    let (digest, mark) = ima_unmeasured();
    chip.run(&command::pcr_extend(10, &digest));
    chip.measured = mark;
    agent.restart(&second);
    let judged = boots(&server, &mut agent, &mut chip).await;
    assert_eq!(judged.state, AttestationState::Attested, "{judged:?}");
    assert!(judged.reason.ends_with("its kernel measures no kexec"), "{judged:?}");
    assert_eq!(leaves(&server, &agent, &chip.measured).await.state, AttestationState::Attested);
    jumps(&mut agent, &mut chip, &third);
    let judged = boots(&server, &mut agent, &mut chip).await;
    assert_eq!((judged.state, judged.reason), (AttestationState::Attested, format!("{CARRIED}, unmeasured")));
    // The next kernel measures, and that of the one before stays so.
    chip.kernel_loads(&second, crossing(2));
    assert_eq!(leaves(&server, &agent, &chip.measured).await.state, AttestationState::Attested);
    jumps(&mut agent, &mut chip, &second);
    assert_eq!(boots(&server, &mut agent, &mut chip).await.reason, format!("{CARRIED}, unmeasured"));
}
