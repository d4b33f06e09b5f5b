//! The shipped `minimal` recipe built for real, and looked at with other people's tools: fsck.erofs, veritysetup, a PE
//! reader, cpio, modprobe, and the kernel's own erofs against mmdebstrap's tar.
#![allow(clippy::unwrap_used)]

mod common;
mod namespace;
mod tree;

use kiln_images::recipe::Recipe;
use kiln_images::tarball::{self, Kind};
use kiln_images::{BuildError, BuildOptions, Built, Progress, build, publish};
use kiln_release::pe::Uki;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::SystemTime;
use tree::{Found, Mounted, Tree, walk};

/// Set for the child that builds again where no program can be found.
const CHILD: &str = "KILN_TEST_REBUILD";
/// Set for the child that builds where there is no room.
const NO_ROOM: &str = "KILN_TEST_NO_ROOM";

fn recipe() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes/minimal.toml")
}

/// The lab's own cache, so that packages are fetched once for both.
fn cache() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap().join("lab/cache")
}

/// The smallest static program: exit(0).
fn tiny_program() -> Vec<u8> {
    let code = [0x31, 0xff, 0xb8, 0x3c, 0, 0, 0, 0x0f, 0x05];
    let (load, size) = (0x40_0000_u64, 120 + code.len() as u64);
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    // Entry, program headers, section headers; flags; sizes and counts.
    elf.extend([load + 120, 64, 0].into_iter().flat_map(u64::to_le_bytes));
    elf.extend([0; 4]);
    elf.extend([64_u16, 56, 1, 0, 0, 0].into_iter().flat_map(u16::to_le_bytes));
    // One program header: PT_LOAD, readable and executable.
    elf.extend([1_u32, 5].into_iter().flat_map(u32::to_le_bytes));
    elf.extend([0, load, load, size, size, 4096].into_iter().flat_map(u64::to_le_bytes));
    elf.extend(code);
    elf
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).stderr(Stdio::piped()).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}; apt-get install its package"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn files_of(folder: &Path) -> BTreeMap<PathBuf, (Vec<u8>, SystemTime)> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries
        .map(|path| (path.clone(), (std::fs::read(&path).unwrap(), path.metadata().unwrap().modified().unwrap())))
        .collect()
}

/// One test, since every part needs the same build.
#[test]
fn the_minimal_image_is_what_other_tools_expect() {
    if let Ok(folder) = std::env::var(CHILD) {
        return rebuild_in_child(Path::new(&folder));
    }
    if let Ok(folder) = std::env::var(NO_ROOM) {
        return build_without_room(Path::new(&folder));
    }
    let (temp, site) = common::new_site(jiff::Timestamp::now());
    let agent = temp.path().join("agent");
    std::fs::write(&agent, tiny_program()).unwrap();
    let options =
        BuildOptions { cache: cache(), progress: Progress::Silent, ..BuildOptions::new(recipe(), &site.path, &agent) };
    let built = build(&options).unwrap_or_else(|error| panic!("{error}"));
    assert!(built.changed);
    assert_eq!(built.manifest.release, 1, "nothing is published");
    built.manifest.check("minimal", 1).unwrap();

    file_system_and_tree(&built);
    uki(&built);
    initramfs(&built, temp.path());
    list_of_packages(&built);
    files_are_the_packages(&built, temp.path());

    nothing_changed(&built, temp.path(), &site.path);
    the_same_inputs_give_the_same_bytes(&options, &built);
    a_full_disk_stops_a_build(temp.path());
    publish(&site.path, "minimal", 1, jiff::Timestamp::now()).unwrap();
    let second = build(&options).unwrap();
    assert_eq!(second.manifest.release, 2, "one above the published");
    assert_ne!(second.manifest.verity.root_hash, built.manifest.verity.root_hash);
    assert_eq!(second.manifest.kernel, built.manifest.kernel);
}

fn file_system_and_tree(built: &Built) {
    let root = built.folder.join("root");
    run("fsck.erofs", &[text(&root)]);
    let verity = &built.manifest.verity;
    let offset = format!("--hash-offset={}", verity.hash_offset);
    run("veritysetup", &["verify", &offset, text(&root), text(&root), &verity.root_hash]);
    // The check can fail: one bit of the data.
    let broken = built.folder.with_file_name("broken-root");
    let mut bytes = std::fs::read(&root).unwrap();
    bytes[4096 * 3] ^= 1;
    std::fs::write(&broken, bytes).unwrap();
    let refused = Command::new("veritysetup")
        .args(["verify", &offset, text(&broken), text(&broken), &verity.root_hash])
        .output()
        .unwrap();
    assert!(!refused.status.success());
    std::fs::remove_file(broken).unwrap();
}

fn uki(built: &Built) {
    let file = std::fs::read(built.folder.join("kiln.efi")).unwrap();
    let split = Uki::split(&file).unwrap();
    assert!(split.linux == std::fs::read(built.folder.join("kernel")).unwrap());
    assert!(split.initrd == std::fs::read(built.folder.join("initramfs")).unwrap());
    assert_eq!(split.command_line, built.manifest.command_line);
    assert!(split.os_release.ends_with("IMAGE_ID=minimal\nIMAGE_VERSION=1\n"), "{}", split.os_release);

    let pe = goblin::pe::PE::parse(&file).unwrap();
    let mut end = 0;
    for section in &pe.sections {
        let (name, begin) = (section.name().unwrap(), section.virtual_address);
        assert!(begin >= end && begin % 4096 == 0 && section.pointer_to_raw_data % 512 == 0, "{name}");
        end = begin + section.virtual_size;
    }
    let names: Vec<_> = pe.sections.iter().map(|section| section.name().unwrap()).collect();
    assert!(names.ends_with(&[".osrel", ".uname", ".cmdline", ".initrd", ".linux"]), "{names:?}");
    assert!(names.contains(&".sbat") && names.contains(&".text"), "{names:?}");
}

fn initramfs(built: &Built, temp: &Path) {
    let packed = built.folder.join("initramfs");
    assert!(packed.metadata().unwrap().len() <= 9 << 20, "the goal is 9 MB with an agent of 4 MB");
    let out = temp.join("initramfs");
    std::fs::create_dir(&out).unwrap();
    let mut frame = zstd::Decoder::new(std::fs::File::open(&packed).unwrap()).unwrap().single_frame();
    std::io::copy(&mut frame, &mut std::fs::File::create(temp.join("cpio")).unwrap()).unwrap();
    let unpacked = Command::new("cpio")
        .args(["--extract", "--quiet", "--no-absolute-filenames", "--nonmatching", "dev/console"])
        .current_dir(&out)
        .stdin(Stdio::from(std::fs::File::open(temp.join("cpio")).unwrap()))
        .status()
        .unwrap();
    assert!(unpacked.success());
    assert_eq!(std::fs::read(out.join("init")).unwrap(), tiny_program());
    let boot: kiln_release::BootInfo =
        serde_json::from_slice(&std::fs::read(out.join("kiln/boot.json")).unwrap()).unwrap();
    built.manifest.matches_boot(&boot).unwrap();
    assert!(boot.trust_root.contains("\"root\""));

    // modprobe agrees that every module named has all it needs.
    let version = std::fs::read_dir(out.join("lib/modules")).unwrap().next().unwrap().unwrap().file_name();
    let version = version.to_str().unwrap();
    run("depmod", &["--basedir", text(&out), "--errsyms", version]);
    for module in Recipe::load(&recipe()).unwrap().modules {
        let shown = run("modprobe", &["--dirname", text(&out), "--set-version", version, "--show-depends", &module]);
        for line in shown.lines().filter_map(|line| line.strip_prefix("insmod ")) {
            // Parameters may stand behind the file.
            let file = line.split_whitespace().next().unwrap();
            assert!(Path::new(file).exists(), "{module} needs {line}");
        }
    }
}

fn list_of_packages(built: &Built) {
    let list: serde_json::Value =
        serde_json::from_slice(&std::fs::read(built.folder.join("sbom.json")).unwrap()).unwrap();
    let names: Vec<_> = list["components"].as_array().unwrap().iter().map(|c| c["name"].as_str().unwrap()).collect();
    for name in ["libc6", "systemd", "systemd-boot-efi"] {
        assert!(names.contains(&name), "{name} in {names:?}");
    }
    assert!(names.iter().any(|name| name.starts_with("linux-image-")));
    assert!(!names.iter().any(|name| name.contains("initramfs-tools") || name.contains("networkd")));
}

/// Every file of the image is as mmdebstrap's tar has it, but for those that make it a Kiln image: read from the
/// image's bytes, which needs no rights, and by the kernel where it can be mounted.
fn files_are_the_packages(built: &Built, temp: &Path) {
    let image = built.folder.join("root");
    let bytes = std::fs::read(&image).unwrap();
    let found = tree::erofs::read(&bytes);
    match Mounted::new(&image, temp) {
        Ok(mounted) => assert_same(&walk(&mounted.path), &found),
        Err(reason) => eprintln!("not mounted, so that only its bytes were read: {reason}"),
    }
    let out = temp.join("extracted");
    run("fsck.erofs", &[&format!("--extract={}", text(&out)), "--no-preserve", text(&image)]);

    let recipe = Recipe::load(&recipe()).unwrap();
    let tar = std::fs::read(&built.packages_tar).unwrap();
    let entries = tarball::entries(&tar).unwrap();
    let emptied = ["/dev/", "/proc/", "/sys/", "/run/", "/tmp/", "/boot/"];
    let left_out = |path: &str| {
        emptied.iter().any(|start| path.starts_with(start))
            || recipe.exclude.iter().any(|place| match place.strip_suffix('*') {
                Some(start) => path.starts_with(start),
                None => format!("{path}/").starts_with(&format!("{place}/")),
            })
    };
    let ours = |path: &str| {
        path.starts_with("/etc/systemd/system/")
            || path.starts_with("/usr/lib/systemd/system/etc-machine\\x2did.mount.d")
            || path.starts_with("/usr/lib/kiln")
            || recipe.files.iter().any(|file| file.path.starts_with(path))
            || OURS.contains(&path)
    };
    let packages: Vec<_> = entries.into_iter().filter(|e| !left_out(&e.path) && !ours(&e.path)).collect();
    let (ours, theirs): (Tree, Tree) = found.into_iter().partition(|(path, _)| ours(path));
    assert!(theirs.len() > 1000);
    assert_same(&theirs, &as_tree(&packages));
    for (path, found) in &ours {
        let (owner, xattrs) = ((found.uid, found.gid), found.xattrs.len());
        assert_eq!((owner, xattrs, &found.first_name), ((0, 0), 0, path), "{path}");
    }
    for entry in packages.iter().filter(|entry| entry.kind == Kind::File) {
        let content = std::fs::read(out.join(&entry.path[1..])).unwrap();
        assert!(content == tar[entry.data.clone()], "content of {}", entry.path);
    }
    let some = |what: &str, holds: &dyn Fn(&Found) -> bool| assert!(theirs.values().any(holds), "{what} was compared");
    some("a set-user-id bit", &|found| found.mode & 0o4000 != 0);
    some("a group other than root", &|found| found.gid != 0);
    some("an extended attribute", &|found| !found.xattrs.is_empty());
    some("a symlink", &|found| found.link.is_some());
}

/// Beside what the recipe adds.
const OURS: [&str; 9] = [
    "/etc/machine-id",
    "/etc/fstab",
    "/etc/hostname",
    "/etc/resolv.conf",
    "/usr/lib/os-release",
    "/usr/lib/systemd/system/kiln-agent.service",
    "/usr/lib/systemd/system/emergency.service",
    "/usr/lib/systemd/system-shutdown",
    "/usr/lib/systemd/system-shutdown/kiln-agent",
];

/// File by file, so that a difference is one line.
fn assert_same(found: &Tree, expected: &Tree) {
    for (path, found) in found {
        assert_eq!(Some(found), expected.get(path), "{path}");
    }
    let missing: Vec<_> = expected.keys().filter(|path| !found.contains_key(*path)).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

/// What a tar says of its files.
fn as_tree(entries: &[tarball::Entry]) -> Tree {
    let by_path: BTreeMap<_, _> = entries.iter().map(|entry| (entry.path.as_str(), entry)).collect();
    let mut names: BTreeMap<&str, &str> = BTreeMap::new();
    let target_of = |entry: &tarball::Entry| match &entry.kind {
        Kind::Hardlink(target) => by_path[target.as_str()],
        Kind::Directory
        | Kind::File
        | Kind::Symlink(_)
        | Kind::CharDevice(..)
        | Kind::BlockDevice(..)
        | Kind::Fifo
        | Kind::Other(_) => by_path[entry.path.as_str()],
    };
    for (path, entry) in &by_path {
        names.entry(&target_of(entry).path).or_insert(path);
    }
    let found = |entry: &tarball::Entry| {
        // Another name of a file has that file's owner, mode and attributes.
        let file = target_of(entry);
        let (kind, link, device) = match &file.kind {
            Kind::Directory => (0o040_000, None, None),
            Kind::File => (0o100_000, None, None),
            Kind::Symlink(target) => (0o120_000, Some(target.clone()), None),
            Kind::CharDevice(major, minor) => (0o020_000, None, Some((*major, *minor))),
            Kind::BlockDevice(major, minor) => (0o060_000, None, Some((*major, *minor))),
            Kind::Fifo => (0o010_000, None, None),
            Kind::Hardlink(_) | Kind::Other(_) => panic!("{} is {:?}", file.path, file.kind),
        };
        Found {
            kind,
            mode: if kind == 0o120_000 { 0o777 } else { file.mode },
            uid: file.uid,
            gid: file.gid,
            xattrs: file.xattrs.clone(),
            link,
            device,
            first_name: names[file.path.as_str()].to_owned(),
        }
    };
    entries.iter().map(|entry| (entry.path.clone(), found(entry))).collect()
}

fn nothing_changed(built: &Built, temp: &Path, site: &Path) {
    let (before, cached) = (files_of(&built.folder), built.packages_tar.metadata().unwrap().modified().unwrap());
    std::fs::write(temp.join("site"), text(site)).unwrap();
    // A folder of no programs as PATH: whatever would be run is not found.
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "the_minimal_image_is_what_other_tools_expect", "--nocapture"])
        .env(CHILD, temp)
        .env("PATH", temp.join("initramfs/dev"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(files_of(&built.folder), before);
    assert_eq!(built.packages_tar.metadata().unwrap().modified().unwrap(), cached);
}

fn rebuild_in_child(temp: &Path) {
    let site = std::fs::read_to_string(temp.join("site")).unwrap();
    let options = BuildOptions {
        cache: cache(),
        progress: Progress::Silent,
        ..BuildOptions::new(recipe(), site, temp.join("agent"))
    };
    assert!(!build(&options).unwrap().changed);
}

fn a_full_disk_stops_a_build(temp: &Path) {
    let mut command = match namespace::as_root(&std::env::current_exe().unwrap()) {
        Ok(command) => command,
        Err(reason) => return eprintln!("skipped: a full disk needs a mount namespace: {reason}"),
    };
    let test = ["--exact", "the_minimal_image_is_what_other_tools_expect", "--nocapture"];
    let output = command.args(test).env(NO_ROOM, temp).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// In a mount namespace, so that what is mounted ends with the process.
fn build_without_room(temp: &Path) {
    let site = std::fs::read_to_string(temp.join("site")).unwrap();
    let small = temp.join("small");
    std::fs::create_dir(&small).unwrap();
    // Less than the root artifact, more than all that comes before it.
    namespace::tmpfs(&small, "size=30m");
    let names = |folder: &Path| -> Vec<String> {
        let entries = std::fs::read_dir(folder).into_iter().flatten();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    };
    let options = |site: PathBuf, cache: PathBuf| BuildOptions {
        cache,
        release: Some(77),
        progress: Progress::Silent,
        ..BuildOptions::new(recipe(), site, temp.join("agent"))
    };

    // The site's disk.
    let full = small.join("site");
    for house in ["offline", "online", "repo"] {
        std::fs::create_dir_all(&full).unwrap();
        run("cp", &["-a", text(&Path::new(&site).join(house)), text(&full)]);
    }
    let error = build(&options(full.clone(), cache())).unwrap_err();
    let BuildError::DiskFull { path } = &error else { panic!("{error}") };
    assert_eq!(path.parent().unwrap(), full.join("build/minimal/77"), "{error}");
    assert_eq!(names(&full.join("build/minimal")), [""; 0], "nothing is left behind");

    // The cache's disk, where the root is put together.
    std::fs::remove_dir_all(&full).unwrap();
    let cache_dir = small.join("cache");
    std::fs::create_dir(&cache_dir).unwrap();
    std::os::unix::fs::symlink(cache().join("base"), cache_dir.join("base")).unwrap();
    let error = build(&options(site.clone().into(), cache_dir.clone())).unwrap_err();
    let BuildError::DiskFullInTool { line, .. } = &error else { panic!("{error}") };
    assert!(line.contains("No space left on device") && error.to_string().contains("--cache"), "{error}");
    let mut left = names(&cache_dir);
    left.sort();
    assert_eq!(left, ["base", "lock"]);
    assert_eq!(names(&Path::new(&site).join("build/minimal")), ["1"]);
}

fn the_same_inputs_give_the_same_bytes(options: &BuildOptions, built: &Built) {
    let contents = |folder: &Path| {
        files_of(folder).into_iter().map(|(path, (bytes, _))| (path, bytes)).collect::<BTreeMap<_, _>>()
    };
    let before = contents(&built.folder);
    std::fs::remove_dir_all(&built.folder).unwrap();
    assert!(build(options).unwrap().changed);
    assert!(contents(&built.folder) == before);
}
