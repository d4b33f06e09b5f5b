//! Which disk it is, its table, and what the programs that others use say of it.

use super::*;

fn candidate(name: &str, disk: &Recorded) -> Candidate {
    let found = look(disk, SITE);
    let failed = |e: io::Error| DiskError::Io { disk: name.into(), what: "reading it", reason: e.to_string() };
    Candidate { name: name.into(), size: SIZE, found: found.map_err(failed) }
}

#[test]
fn each_kind_of_disk_has_its_outcome() {
    let settings = settings();
    let never = |disks: Vec<Candidate>| choose(disks, &settings, SITE, None).map_err(|e| e.kind());
    let blank = Recorded::default();
    let ours = installed().disk().clone();
    let mut data = Recorded::default();
    data.write_at(40 * MIB, &vec![0x5a; 256 << 10]).unwrap();
    let mut begun = Recorded::default();
    begun.write_at(1024, b"a file system's first blocks").unwrap();
    let mut failing = Recorded { failing: Some(0..64), ..Recorded::default() };
    assert!(failing.write_at(0, &[0; 512]).is_err());

    assert_eq!(never(Vec::new()), Err("disk-none"));
    assert_eq!(never(vec![candidate("vda", &data)]), Err("disk-foreign"));
    assert_eq!(never(vec![candidate("vda", &begun)]), Err("disk-foreign"));
    assert_eq!(never(vec![candidate("vda", &failing)]), Err("disk-io-error"));
    let small = Candidate { size: MIB, ..candidate("vda", &blank) };
    assert_eq!(never(vec![small]), Err("disk-too-small"));
    // Two disks: Kiln's own before a blank one, a blank one before a failing or a full one.
    let both = never(vec![candidate("vda", &blank), candidate("vdb", &ours)]).unwrap();
    assert!(matches!(both, Choice::Use(name, _) if name == "vdb"));
    let spare = never(vec![candidate("vda", &failing), candidate("vdb", &data), candidate("vdc", &blank)]).unwrap();
    assert!(matches!(spare, Choice::Format(name, _) if name == "vdc"));
    // Only a signed word takes somebody's disk.
    let wipe = DiskSettings { wipe: WipePolicy::Foreign, ..settings.clone() };
    let taken = choose(vec![candidate("vda", &data)], &wipe, SITE, None).unwrap();
    assert!(matches!(taken, Choice::Format(name, _) if name == "vda"));
    // Another site's Kiln disk is somebody else's.
    assert_eq!(look(&ours, "another").unwrap(), Found::Foreign("another partition table"));
    // The disk that holds what is to run, whatever its name.
    let label = Some(Label::of(&release(1).content.root_hash));
    let (empty, _) = opened(Recorded::default());
    let two = vec![candidate("vda", empty.disk()), candidate("vdb", &ours)];
    assert!(matches!(choose(two, &settings, SITE, label).unwrap(), Choice::Use(name, _) if name == "vdb"));
}

/// Firmware names the loader by its partition's id: of two disks of a site in one machine it starts the one that was meant.
#[test]
fn two_disks_of_a_site_have_efi_system_partitions_of_different_names() {
    let made = |random: u8| {
        let mut layout = Layout::new(SIZE, &settings(), SITE).unwrap();
        layout.name_esp(&[random; 32]);
        let mut store = Store::open(Recorded::default(), layout.clone(), true, "test").unwrap();
        // A label is written with the whole table.
        store.perform(&Action::Label(SlotId::A, release(1).content), None).unwrap();
        let Found::Ours(found) = look(store.disk(), SITE).unwrap() else { panic!("it is ours") };
        assert_eq!(found.esp_address(), layout.esp_address());
        found.esp_address().3
    };
    let [one, two] = [0x5a, 0xff].map(made);
    // As text: 5a5a5a5a-5a5a-4a5a-9a5a-…, ffffffff-ffff-4fff-bfff-….
    assert_eq!((&one[6..9], &two[6..9]), (&[0x5a, 0x4a, 0x9a][..], &[0xff, 0x4f, 0xbf][..]));
    let earlier = installed();
    assert!(
        ![one, two].contains(&earlier.layout.esp_address().3),
        "a disk of an earlier agent keeps its own, and is ours"
    );
}

/// It may be Kiln's: with another table this machine would have two disks, and somebody one less.
#[test]
fn beside_a_disk_that_is_late_none_is_partitioned() {
    let never = settings();
    let foreign = DiskSettings { wipe: WipePolicy::Foreign, ..never.clone() };
    let blank = Recorded::default();
    let ours = installed().disk().clone();
    let mut data = Recorded::default();
    data.write_at(40 * MIB, &vec![0x5a; 256 << 10]).unwrap();
    let late = || {
        let error =
            DiskError::Late { disk: "sda".into(), what: "looking at it", reason: "no answer within 20 s".into() };
        Candidate { name: "sda".into(), size: SIZE, found: Err(error) }
    };
    for (settings, other) in [(&never, &blank), (&foreign, &blank), (&foreign, &data)] {
        assert!(matches!(choose(vec![candidate("sdb", other)], settings, SITE, None), Ok(Choice::Format(..))));
        let error = choose(vec![late(), candidate("sdb", other)], settings, SITE, None).unwrap_err();
        assert_eq!(error.kind(), "disk-io-error");
        let words = "sdb: not partitioned in this boot: sda: looking at it: no answer within 20 s";
        assert!(error.to_string().starts_with(words), "{error}");
    }
    assert_eq!(choose(vec![late()], &foreign, SITE, None).unwrap_err().kind(), "disk-io-error");
    // One that answers with an error may be Kiln's too: a blank disk is taken beside it, and nobody's data.
    let failing = || {
        let error = DiskError::Io { disk: "sda".into(), what: "looking at it", reason: "Input/output error".into() };
        Candidate { name: "sda".into(), size: SIZE, found: Err(error) }
    };
    for settings in [&never, &foreign] {
        let blank = choose(vec![failing(), candidate("sdb", &blank)], settings, SITE, None);
        assert!(matches!(blank, Ok(Choice::Format(name, _)) if name == "sdb"));
        assert!(choose(vec![failing(), candidate("sdb", &data)], settings, SITE, None).is_err());
    }
    // Its sectors tell what it is not.
    let other = Candidate { found: Err(DiskError::SectorSize { disk: "sda".into(), bytes: 4096 }), ..failing() };
    let taken = choose(vec![other, candidate("sdb", &data)], &foreign, SITE, None);
    assert!(matches!(taken, Ok(Choice::Format(name, _)) if name == "sdb"));
    // What is Kiln's is used, whatever another does.
    let used = choose(vec![late(), candidate("sdb", &ours)], &foreign, SITE, None).unwrap();
    assert!(matches!(used, Choice::Use(name, _) if name == "sdb"));
}

#[test]
fn a_table_with_one_copy_gone_is_read_from_the_other_and_mended() {
    let mut disk = installed().disk().clone();
    let table = Gpt::read(&disk).unwrap().unwrap();
    disk.write_at(SECTOR as u64, &[0; SECTOR]).unwrap();
    assert_eq!(Gpt::read(&disk).unwrap().as_ref(), Some(&table));
    table.write(&mut disk).unwrap();
    disk.write_at(SIZE - SECTOR as u64, &[0; SECTOR]).unwrap();
    assert_eq!(Gpt::read(&disk).unwrap().as_ref(), Some(&table));
    assert_eq!(gpt::end_usable(SIZE / SECTOR as u64), SIZE / SECTOR as u64 - 33);
}

/// A tool of somebody else's; none where it is not installed.
fn judge(program: &str, arguments: &[&str]) -> Option<(bool, String)> {
    let Ok(out) = Command::new(program).args(arguments).output() else {
        crate::testing::oracle::skipped(&format!("{program} is not installed"));
        return None;
    };
    let said = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    Some((out.status.success(), said))
}

/// The same code on a file, and what others say of the result.
#[test]
fn others_programs_find_nothing_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::File::create(&path).unwrap().set_len(SIZE).unwrap();
    let (mut store, mut slots) = opened(Device::open(&path).unwrap());
    let loader = vec![0x5a; 100_000];
    store.install_loader(&loader).unwrap();
    let (first, second) = (release(1), release(2));
    for event in
        [Event::Assign(first.content.clone(), 4, Go::Here(Via::Cold)), Event::Fetched, Event::Granted, Event::Healthy]
    {
        slots = step(&mut store, slots, event, &first);
    }
    for event in [Event::Assign(second.content.clone(), 5, Go::Leave(Via::Cold)), Event::Fetched, Event::Granted] {
        slots = step(&mut store, slots, event, &second);
    }
    // Past the page cache, as the agent reads back.
    let uncached = store.disk().uncached().unwrap();
    let mut read = |at: u64, out: &mut [u8]| std::os::unix::fs::FileExt::read_exact_at(&uncached, out, at);
    store.verify_slot(SlotId::B, &second.verity, second.root.len() as u64, &mut read).unwrap();
    store.keep_record(&first.content.root_hash, b"{}").unwrap();
    let (esp, state) = (store.layout.esp(), store.layout.state());
    let disk = path.display().to_string();
    if let Some((_, said)) = judge("sgdisk", &["-v", &disk]) {
        assert!(said.contains("No problems found"), "{said}");
        let (_, said) = judge("sgdisk", &["-i", "2", &disk]).unwrap();
        let half = &first.content.root_hash.as_str()[..8].to_uppercase();
        assert!(said.contains(&format!("Partition unique GUID: {half}-")), "{said}");
    }
    for (name, range) in [("esp", esp), ("state", state)] {
        let part = dir.path().join(name);
        let mut bytes = vec![0; usize::try_from(range.end - range.start).unwrap()];
        store.disk().read_at(range.start, &mut bytes).unwrap();
        std::fs::write(&part, bytes).unwrap();
        if let Some((fine, said)) = judge("fsck.vfat", &["-n", "-v", &part.display().to_string()]) {
            assert!(fine, "{name}: {said}");
        }
    }
    let image = dir.path().join("esp").display().to_string();
    if let Some((fine, said)) = judge("mdir", &["-b", "-i", &image, "::/loader/entries"]) {
        assert!(fine && said.contains("kiln-4.conf") && said.contains("kiln-5+3.conf"), "{said}");
        let out = dir.path().join("out").display().to_string();
        judge("mcopy", &["-i", &image, "::/EFI/BOOT/BOOTX64.EFI", &out]).unwrap();
        assert!(std::fs::read(&out).unwrap() == loader);
    }
}

/// What a firmware does to a file's name, by another's hand: mtools renames, the agent reads on.
#[test]
fn names_written_by_others_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("fat");
    std::fs::File::create(&path).unwrap().set_len(40 * MIB).unwrap();
    fat::format(&mut Device::open(&path).unwrap(), 1, "TEST").unwrap();
    let mut fat = Fat::open(Device::open(&path).unwrap()).unwrap();
    for number in 0..40 {
        fat.write(&format!("loader/entries/kiln-{number}+3.conf"), 3, &mut &b"abc"[..]).unwrap();
    }
    drop(fat);
    let image = path.display().to_string();
    let Some((fine, said)) =
        judge("mren", &["-i", &image, "::/loader/entries/kiln-5+3.conf", "::/loader/entries/kiln-5+2-1.conf"])
    else {
        return;
    };
    assert!(fine, "{said}");
    let mut fat = Fat::open(Device::open(&path).unwrap()).unwrap();
    assert_eq!(fat.read("loader/entries/kiln-5+2-1.conf", 9).unwrap().as_deref(), Some(&b"abc"[..]));
    fat.write("loader/entries/kiln-5.conf", 3, &mut &b"xyz"[..]).unwrap();
    fat.remove("loader/entries/kiln-5+2-1.conf").unwrap();
    let names: Vec<String> = fat.list("loader/entries").unwrap().unwrap().into_iter().map(|n| n.name).collect();
    assert!(names.len() == 40 && names.contains(&"kiln-5.conf".to_owned()), "{names:?}");
    drop(fat);
    if let Some((fine, said)) = judge("fsck.vfat", &["-n", &image]) {
        assert!(fine, "{said}");
    }
}

#[test]
fn a_disk_has_a_place_for_data_where_its_image_keeps_some() {
    let keeps = |size| {
        let data = kiln_release::DataSettings { size, path: "/srv".into() };
        DiskSettings { data: Some(data), ..settings() }
    };
    let layout = Layout::new(300 * MIB, &keeps(20 * MIB), SITE).unwrap();
    let (state, data) = (layout.state(), layout.data().unwrap());
    assert_eq!((data.start, data.end - data.start), (state.end, 20 * MIB));
    // Read back from a disk it is ours, as one without is.
    for settings in [keeps(20 * MIB), settings()] {
        let layout = Layout::new(SIZE + 20 * MIB, &settings, SITE).unwrap();
        assert_eq!(Layout::of(layout.table.clone(), SITE), Some(layout.clone()));
        assert_eq!(layout.data().is_some(), settings.data.is_some());
        assert_eq!(Layout::of(layout.table, "another"), None);
    }
    assert!(matches!(Layout::new(SIZE, &keeps(200 * MIB), SITE), Err(DiskError::TooSmall { .. })));
}
