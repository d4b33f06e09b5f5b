//! Power cuts at every block write of a real machine: QEMU installs itself onto a disk and reimages itself into the other
//! slot, and every write and flush is recorded, the firmware's and the boot loader's own among them. The disk is made
//! again as it was at each cut, with what was not flushed kept, lost, torn or in another order; the agent's own reading
//! code, systemd-boot's rules and another's FAT reader (mtools) say what starts from it, and that it is whole. A sample of
//! the cut disks is really booted, and a QEMU is really killed at a sample of writes.

use crate::support::on_disk::{installed, rack};
use kiln_lab::console::Mark;
use kiln_lab::machine::{DISK_BYTES, Disk};
use kiln_lab::nbd::{Fault, Nbd, Step};
use kiln_lab::paths::Paths;
use kiln_lab::rack::{IDLE, LIMIT, Rack};
use kiln_lab::{site, testing};
use kiln_release::hex;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const NAME: &str = "rack-1";
const SECTOR: usize = 512;
/// Longer writes are cut into pieces of this.
const PIECE: usize = 64 << 10;
const LOADER: &str = "EFI/BOOT/BOOTX64.EFI";
/// Cuts that are decided at least.
const CUTS: usize = 500;
/// Cut disks that are really booted, over the three tests; `KILN_CUT_BOOTS` says another number. Each takes half a minute
/// and more.
const BOOTS: usize = 60;

/// Everything that was written to a disk, and when release 1 was good on it.
struct Story {
    steps: Vec<Step>,
    good: usize,
}

fn record(rack: &mut Rack) -> Story {
    let nbd = rack.machine(NAME).hold_disk(0).unwrap();
    nbd.record();
    let console = installed(rack);
    let good = nbd.count();
    rack.kiln(&["release", "publish", "disk/2"]).unwrap();
    let begun = console.mark();
    rack.kiln(&["assign", NAME, "disk/2", "--via", "cold"]).unwrap();
    rack.wait_healthy(NAME, 2).unwrap();
    console.wait_for("A Good disk/1, B Good disk/2", begun, IDLE).unwrap();
    rack.machine(NAME).power_off();
    let steps = nbd.recorded();
    let mut all = pieces(&steps[..good]);
    let behind = pieces(&steps[good..]);
    let good = all.len();
    all.extend(behind);
    Story { steps: all, good }
}

/// A long write is no unit: a disk does any part of it before the others.
fn pieces(steps: &[Step]) -> Vec<Step> {
    let cut = |step: &Step| match step {
        Step::Flush => vec![Step::Flush],
        Step::Write(at, bytes) => {
            let offsets = (*at..).step_by(PIECE);
            offsets.zip(bytes.chunks(PIECE)).map(|(at, piece)| Step::Write(at, piece.to_vec())).collect()
        }
    };
    steps.iter().flat_map(cut).collect()
}

/// What becomes of the writes behind the last flush.
#[derive(Debug, Clone, Copy)]
enum Unflushed {
    Kept,
    Lost,
    /// Each sector for itself, by a seeded coin: so later writes are there and earlier are not, and some are torn.
    Mixed,
}

/// How many steps are on the disk for certain.
fn flushed(steps: &[Step]) -> usize {
    steps.iter().rposition(|s| *s == Step::Flush).map_or(0, |at| at + 1)
}

/// A disk that is made as it was at one cut after the other.
struct Cutter<'a> {
    file: File,
    steps: &'a [Step],
    /// So many steps are in the file, all of them flushed.
    done: usize,
    undo: Vec<(u64, Vec<u8>)>,
    seed: u64,
}

impl<'a> Cutter<'a> {
    fn new(path: &Path, steps: &'a [Step]) -> Self {
        let file = File::options().read(true).write(true).create(true).truncate(true).open(path).unwrap();
        file.set_len(DISK_BYTES).unwrap();
        Self { file, steps, done: 0, undo: Vec::new(), seed: 0x9e37_79b9_7f4a_7c15 }
    }

    fn coin(&mut self) -> bool {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        self.seed & 1 == 1
    }

    /// The disk behind the first `count` steps. Cuts come in order.
    fn cut(&mut self, count: usize, unflushed: Unflushed) {
        for (at, bytes) in self.undo.drain(..).rev() {
            self.file.write_all_at(&bytes, at).unwrap();
        }
        let flushed = flushed(&self.steps[..count]);
        for step in &self.steps[self.done.min(flushed)..flushed] {
            if let Step::Write(at, bytes) = step {
                self.file.write_all_at(bytes, *at).unwrap();
            }
        }
        self.done = self.done.max(flushed);
        let steps = self.steps;
        for step in &steps[flushed..count] {
            let Step::Write(at, bytes) = step else { continue };
            for (number, sector) in bytes.chunks(SECTOR).enumerate() {
                let keep = match unflushed {
                    Unflushed::Kept => true,
                    Unflushed::Lost => false,
                    Unflushed::Mixed => self.coin(),
                };
                if keep {
                    let at = at + (number * SECTOR) as u64;
                    let mut old = vec![0; sector.len()];
                    self.file.read_exact_at(&mut old, at).unwrap();
                    self.undo.push((at, old));
                    self.file.write_all_at(sector, at).unwrap();
                }
            }
        }
    }
}

/// What starts from a disk.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Starts {
    /// The firmware finds no loader, or the loader no entry: the network is next.
    Network,
    /// This release's boot program, whose agent finds no whole root and asks the network.
    Mends(u64),
    /// This release.
    Release(u64),
}

/// Judges disks.
struct Judge {
    agent: PathBuf,
    scratch: PathBuf,
    /// Root artifacts by release: SHA-256 and length.
    roots: BTreeMap<u64, (String, usize)>,
    loader: String,
}

impl Judge {
    /// After the install: the loader on the disk is what every cut disk must have, if it has one.
    fn new(rack: &mut Rack) -> Self {
        let disk = rack.machine(NAME).disk(0);
        let root = |release| {
            let manifest = site::manifest_of(&rack.site, site::DISK, release).unwrap();
            let sha256 = manifest["root"]["sha256"].as_str().unwrap().to_owned();
            (release, (sha256, usize::try_from(manifest["root"]["length"].as_u64().unwrap()).unwrap()))
        };
        let roots = [root(1), root(2)].into();
        let paths = rack.paths();
        let (agent, scratch) = (paths.agent.clone(), paths.scratch.clone());
        let judge = Self { agent, scratch, roots, loader: String::new() };
        let loader = judge.file_on_esp(&disk, 1 << 20, LOADER).expect("the loader was installed");
        Self { loader, ..judge }
    }

    /// SHA-256 of a file on the ESP, read by mtools; none if it is not there, or cannot be read.
    fn file_on_esp(&self, disk: &Path, esp: u64, name: &str) -> Option<String> {
        let out = self.scratch.join("from-esp");
        let _ = std::fs::remove_file(&out);
        let image = format!("{}@@{esp}", disk.display());
        let done = Command::new("mcopy")
            .env("MTOOLS_SKIP_CHECK", "1")
            .args(["-n", "-i", &image, &format!("::/{name}")])
            .arg(&out)
            .output()
            .unwrap();
        (done.status.success()).then(|| hex::sha256(&std::fs::read(&out).unwrap()))
    }

    /// `kiln-agent disk`, and systemd-boot's rules on what it says.
    fn judge(&self, disk: &Path) -> Result<Starts, String> {
        let said = Command::new(&self.agent).arg("disk").arg(disk).arg("lab").output().unwrap();
        let text = String::from_utf8_lossy(&said.stdout).into_owned();
        if !said.status.success() {
            return Err(format!("the agent cannot read it: {}", String::from_utf8_lossy(&said.stderr)));
        }
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split(' ').collect()).collect();
        let Some(esp) = lines.iter().find(|l| l[0] == "ours").map(|l| l[2].parse::<u64>().unwrap()) else {
            // A disk that is no more than begun is nobody's. One that would be somebody else's is never touched again.
            return if text.starts_with("blank") { Ok(Starts::Network) } else { Err(text) };
        };
        let loader = self.file_on_esp(disk, esp, LOADER);
        if let Some(loader) = loader.as_ref().filter(|loader| **loader != self.loader) {
            return Err(format!("the boot loader is {loader}"));
        }
        if loader.is_some() && self.file_on_esp(disk, esp, "loader/loader.conf").is_none() {
            return Err("a loader without its settings and without entries goes into the firmware's setup".into());
        }
        // With no tries left: behind all others. Then the highest number. An entry without its UKI is none.
        let ukis: Vec<&str> = lines.iter().filter(|l| l[0] == "uki").map(|l| l[1]).collect();
        let entries = lines.iter().filter(|l| l[0] == "entry" && l[1].ends_with(".conf") && ukis.contains(&l[4]));
        let order = |name: &str| {
            let stem = name.trim_start_matches("kiln-").trim_end_matches(".conf");
            let (sequence, tries) = stem.split_once('+').map_or((stem, "1"), |(sequence, tries)| (sequence, tries));
            (!tries.starts_with('0'), sequence.parse::<u64>().unwrap())
        };
        let entry = match (entries.max_by_key(|l| order(l[1])), &loader) {
            (Some(entry), Some(_)) => entry,
            (Some(_) | None, None) => return Ok(Starts::Network),
            // The firmware is sent to the disk last of all.
            (None, Some(_)) => return Err(format!("a loader without anything to start:\n{text}")),
        };
        let (release, root_hash, uki) = (entry[2], entry[3], entry[4]);
        let number: u64 = release.strip_prefix("disk/").unwrap().parse().unwrap();
        let got = self.file_on_esp(disk, esp, &format!("EFI/kiln/{uki}.efi"));
        if got.as_deref() != Some(uki) {
            return Err(format!("the UKI of {release} is {got:?}:\n{text}"));
        }
        let Some(slot) = lines.iter().find(|l| l[0] == "slot" && l[4] != "-" && root_hash.starts_with(l[4])) else {
            return Ok(Starts::Mends(number));
        };
        let (sha256, length) = &self.roots[&number];
        let mut root = vec![0; *length];
        File::open(disk).unwrap().read_exact_at(&mut root, slot[2].parse().unwrap()).unwrap();
        if hex::sha256(&root) != *sha256 {
            return Err(format!("the root of {release} is not whole, and it has its label:\n{text}"));
        }
        // By this a start without a boot server is verified.
        if !lines.iter().any(|l| l[0] == "record" && l[1] == root_hash) {
            return Err(format!("nothing is kept of {release}, and the loader starts it:\n{text}"));
        }
        Ok(Starts::Release(number))
    }
}

/// Which cuts: behind every step that is no part of a root artifact, and behind so many of the others that there are
/// [`CUTS`] at least.
fn cuts(steps: &[Step]) -> Vec<usize> {
    let bulk = |n: &usize| matches!(&steps[n - 1], Step::Write(_, bytes) if bytes.len() == PIECE);
    let (large, mut cuts): (Vec<usize>, Vec<usize>) = (1..=steps.len()).partition(bulk);
    let every = (large.len() / CUTS.saturating_sub(cuts.len()).max(100)).max(1);
    cuts.extend(large.into_iter().step_by(every));
    cuts.sort_unstable();
    cuts
}

const WAYS: [Unflushed; 3] = [Unflushed::Kept, Unflushed::Lost, Unflushed::Mixed];

/// Every write of an install and a reimage is cut, each in three ways.
#[test]
#[ignore = "slow: an install and a reimage that are recorded, 1 500 disks that are judged; make test-slow"]
fn what_starts_after_every_cut_is_whole() {
    testing::rack(|paths| {
        let mut rack = rack(paths, "cuts");
        let story = record(&mut rack);
        let judge = Judge::new(&mut rack);
        let work = paths.scratch.join("cut");
        let mut cutter = Cutter::new(&work, &story.steps);
        let cuts = cuts(&story.steps);
        assert!(cuts.len() >= CUTS, "{} cuts in {} steps", cuts.len(), story.steps.len());
        let mut outcomes: BTreeMap<(bool, Starts), usize> = BTreeMap::new();
        let (mut lost, mut same) = (None, 0);
        for count in &cuts {
            let flushed = flushed(&story.steps[..*count]);
            for unflushed in WAYS {
                // With all of it lost, every cut up to the next flush is the same disk.
                if matches!(unflushed, Unflushed::Lost) && lost.replace(flushed) == Some(flushed) {
                    same += 1;
                    continue;
                }
                cutter.cut(*count, unflushed);
                let good = *count >= story.good;
                let starts =
                    judge.judge(&work).unwrap_or_else(|why| panic!("cut behind {count}, {unflushed:?}: {why}"));
                let alone = matches!(starts, Starts::Release(_));
                assert!(alone || !good, "cut behind {count}, {unflushed:?}: {starts:?} although release 1 was good");
                *outcomes.entry((good, starts)).or_insert(0) += 1;
            }
        }
        let writes = story.steps.iter().filter(|s| **s != Step::Flush).count();
        println!(
            "{} steps, {writes} of them writes; {} cuts, each in 3 ways, {same} of them the same disk: {outcomes:?}",
            story.steps.len(),
            cuts.len()
        );
        assert!(outcomes.len() >= 4, "{outcomes:?}");
    });
}

fn boots() -> usize {
    let asked = std::env::var("KILN_CUT_BOOTS").ok();
    asked.map_or(BOOTS, |text| text.parse().expect("KILN_CUT_BOOTS is a number of boots")).max(2)
}

/// Really boots the `part`th third of the sample: without a boot server where release 1 was good before the cut.
fn booted(paths: &Paths, part: usize) {
    let mut rack = rack(paths, &format!("cuts-{part}"));
    let story = record(&mut rack);
    let judge = Judge::new(&mut rack);
    let cuts = cuts(&story.steps);
    let disk = rack.machine(NAME).disk(0);
    // What the machine remembers at the end, its disk's records among it: each start begins with that.
    let (variables, kept) = (rack.machine(NAME).variable_store(), paths.scratch.join(format!("variables-{part}")));
    std::fs::copy(&variables, &kept).unwrap();
    let mut cutter = Cutter::new(&disk, &story.steps);
    let (boots, mut came_back) = (boots(), 0);
    for n in (0..boots).filter(|n| n % 3 == part) {
        let count = cuts[n * (cuts.len() - 1) / (boots - 1)];
        // What the machine wrote since the last cut goes.
        cutter = Cutter { seed: cutter.seed, ..Cutter::new(&disk, &story.steps) };
        cutter.cut(count, WAYS[n / 3 % 3]);
        let starts = judge.judge(&disk).unwrap_or_else(|why| panic!("cut behind {count}: {why}"));
        let alone = count >= story.good;
        if alone {
            std::fs::copy(&kept, &variables).unwrap();
            rack.kill_server();
        }
        rack.machine(NAME).power_on().unwrap();
        let console = rack.machine(NAME).console().unwrap().clone();
        console.wait_for("is healthy: vda: ", Mark::default(), IDLE).unwrap_or_else(|e| panic!("cut {count}: {e}"));
        let said = console.since(Mark::default());
        let by_itself = !said.contains("Start PXE") && said.contains("the release in the slot starts");
        assert!(by_itself || !alone, "cut {count}: it needed the network: {said}");
        came_back += 1;
        eprintln!("cut behind {count} of {}: {starts:?}, and it came back ({came_back})", story.steps.len());
        rack.machine(NAME).power_off();
        if alone {
            rack.start_server().unwrap();
        }
    }
}

/// The first third of the sample.
#[test]
#[ignore = "slow: an install, a reimage, and twenty boots; make test-slow"]
fn cut_disks_really_boot_one() {
    testing::rack(|paths| booted(paths, 0));
}

/// The second third.
#[test]
#[ignore = "slow: an install, a reimage, and twenty boots; make test-slow"]
fn cut_disks_really_boot_two() {
    testing::rack(|paths| booted(paths, 1));
}

/// The last third.
#[test]
#[ignore = "slow: an install, a reimage, and twenty boots; make test-slow"]
fn cut_disks_really_boot_three() {
    testing::rack(|paths| booted(paths, 2));
}

/// Switches it on and kills it at the write of this number; or lets it come to where its console says one of `ends`, if
/// it needs fewer. Whether it was killed. That it comes as far as either is what has to follow on the kill before.
fn killed_at(rack: &mut Rack, nbd: &Nbd, number: usize, ends: &[&str]) -> bool {
    nbd.set_fault(Fault::Hold(number));
    rack.machine(NAME).power_on().unwrap();
    let console = rack.machine(NAME).console().unwrap().clone();
    let begun = Instant::now();
    let killed = loop {
        if nbd.wait_held(Duration::from_secs(1)).is_ok() {
            break true;
        }
        let said = console.since(Mark::default());
        if ends.iter().any(|end| said.contains(end)) {
            break false;
        }
        let silence = console.last_change().max(begun).elapsed();
        assert!(silence < IDLE && begun.elapsed() < LIMIT, "write {number}: {}", console.last_words(20));
    };
    rack.machine(NAME).power_off();
    killed
}

/// Kills over all these tests, three in the install to one in the reimage; `KILN_KILLS` says another number. Each takes a
/// quarter of a minute and more. In parts, each of which ends within reach and can be run again alone.
const KILLS: usize = 500;
const PARTS: usize = 16;

fn kills() -> usize {
    let asked = std::env::var("KILN_KILLS").ok();
    asked.map_or(KILLS, |text| text.parse().expect("KILN_KILLS is a number of kills")).max(4 * PARTS)
}

/// Kills it at every [`PARTS`]th of `all` numbers of writes, from `part` on. A start that needed fewer writes than that
/// is no kill: `again` makes the disk as it was at the beginning, and the same number has its turn anew.
fn kill_at_each(rack: &mut Rack, (part, all): (usize, usize), writes: usize, ends: &[&str], again: impl Fn(&mut Rack)) {
    let mut starts = 0;
    let numbers: Vec<usize> = (part..all).step_by(PARTS).map(|n| n * writes / all).collect();
    for (done, number) in numbers.iter().enumerate() {
        loop {
            let nbd = rack.machine(NAME).hold_disk(0).unwrap();
            starts += 1;
            if killed_at(rack, &nbd, *number, ends) {
                break;
            }
            assert!(starts < 3 * (done + 2), "{done} kills in {starts} starts: it needs fewer writes than {writes}");
            again(rack);
        }
        eprintln!("{ends:?}: {} kills of {} in {starts} starts, of {writes} writes", done + 1, numbers.len());
    }
}

/// QEMU is killed at the Nth write itself of an install, N from the first write to the last, again and again on the one
/// disk: each start finds what the kill before left. Likewise while it reimages itself: there a trial that is cut off too
/// often is given up, as it should be, so either release may be the one that comes up in the end.
fn killed(paths: &Paths, part: usize) {
    let mut rack = rack(paths, &format!("killed-{part}"));
    let nbd = rack.machine(NAME).hold_disk(0).unwrap();
    nbd.record();
    rack.machine(NAME).power_on().unwrap();
    let console = rack.machine(NAME).console().unwrap().clone();
    let installed = "is healthy: vda: A Good disk/1";
    console.wait_for(installed, Mark::default(), IDLE).unwrap();
    rack.machine(NAME).power_off();
    let writes = nbd.recorded().iter().filter(|step| **step != Step::Flush).count();
    let blank = |rack: &mut Rack| rack.machine(NAME).set_disks(vec![Disk::VirtioBlk]).unwrap();
    blank(&mut rack);
    kill_at_each(&mut rack, (part, kills() * 3 / 4), writes, &[installed], blank);

    let nbd = rack.machine(NAME).hold_disk(0).unwrap();
    nbd.set_fault(Fault::None);
    rack.machine(NAME).power_on().unwrap();
    rack.wait_healthy(NAME, 1).unwrap();
    let console = rack.machine(NAME).console().unwrap().clone();
    console.wait_for(installed, Mark::default(), IDLE).unwrap();
    rack.machine(NAME).power_off();
    let (disk, before) = (rack.machine(NAME).disk(0), paths.scratch.join(format!("before-{part}")));
    std::fs::copy(&disk, &before).unwrap();
    rack.kiln(&["release", "publish", "disk/2"]).unwrap();
    rack.kiln(&["assign", NAME, "disk/2", "--via", "cold"]).unwrap();
    let as_before = |rack: &mut Rack| {
        std::fs::copy(&before, &disk).unwrap();
        // It may have fallen back from the release, and would not be offered it any more.
        let _ = rack.kiln(&["machine", "clear", NAME]);
        rack.kiln(&["assign", NAME, "disk/2", "--via", "cold"]).unwrap();
    };
    let ended = ["B Good disk/2", "B Failed disk/2"];
    kill_at_each(&mut rack, (part, kills() / 4), writes, &ended, as_before);
    let nbd = rack.machine(NAME).hold_disk(0).unwrap();
    nbd.set_fault(Fault::None);
    rack.machine(NAME).power_on().unwrap();
    let console = rack.machine(NAME).console().unwrap().clone();
    console.wait_for("is healthy: vda: ", Mark::default(), IDLE).unwrap();
}

macro_rules! kills {
    ($($test:ident $part:literal)*) => {$(
        #[test]
        #[ignore = "slow: some 40 boots; make test-slow"]
        fn $test() {
            testing::rack(|paths| killed(paths, $part));
        }
    )*};
}

kills! {
    a_machine_killed_at_its_nth_write_comes_back_01 0
    a_machine_killed_at_its_nth_write_comes_back_02 1
    a_machine_killed_at_its_nth_write_comes_back_03 2
    a_machine_killed_at_its_nth_write_comes_back_04 3
    a_machine_killed_at_its_nth_write_comes_back_05 4
    a_machine_killed_at_its_nth_write_comes_back_06 5
    a_machine_killed_at_its_nth_write_comes_back_07 6
    a_machine_killed_at_its_nth_write_comes_back_08 7
    a_machine_killed_at_its_nth_write_comes_back_09 8
    a_machine_killed_at_its_nth_write_comes_back_10 9
    a_machine_killed_at_its_nth_write_comes_back_11 10
    a_machine_killed_at_its_nth_write_comes_back_12 11
    a_machine_killed_at_its_nth_write_comes_back_13 12
    a_machine_killed_at_its_nth_write_comes_back_14 13
    a_machine_killed_at_its_nth_write_comes_back_15 14
    a_machine_killed_at_its_nth_write_comes_back_16 15
}
