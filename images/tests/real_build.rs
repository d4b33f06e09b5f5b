//! The shipped `minimal` recipe built for real, and looked at with other people's tools: fsck.erofs, veritysetup, a PE
//! reader, cpio, modprobe, and the kernel's own erofs against mmdebstrap's tar.
#![allow(clippy::unwrap_used)]

mod common;
mod tree;

use kiln_images::recipe::Recipe;
use kiln_images::tarball::{self, Kind};
use kiln_images::{BuildOptions, Built, Progress, build, publish};
use kiln_release::pe::Uki;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::SystemTime;
use tree::{Found, Mounted, walk};

/// Set for the child that builds again where no program can be found.
const CHILD: &str = "KILN_TEST_REBUILD";

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
    owners_and_modes(&built, temp.path());

    nothing_changed(&built, temp.path(), &site.path);
    the_same_inputs_give_the_same_bytes(&options, &built);
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
            assert!(Path::new(line.trim()).exists(), "{module} needs {line}");
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

/// Every file of the mounted image is as mmdebstrap's tar has it, but for those that make it a Kiln image.
fn owners_and_modes(built: &Built, temp: &Path) {
    let mounted = match Mounted::new(&built.folder.join("root"), temp) {
        Ok(mounted) => mounted,
        Err(reason) => return eprintln!("skipped: comparing the mounted image with the tar needs {reason}"),
    };
    let recipe = Recipe::load(&recipe()).unwrap();
    let tar = std::fs::read(&built.packages_tar).unwrap();
    let entries = tarball::entries(&tar).unwrap();
    let by_path: BTreeMap<_, _> = entries.iter().map(|entry| (entry.path.as_str(), entry)).collect();
    let found: BTreeMap<String, Found> = walk(&mounted.path);
    assert!(found.len() > 1000);

    let ours = |path: &str| {
        path.starts_with("/etc/systemd/system/")
            || path.starts_with("/usr/lib/kiln")
            || recipe.files.iter().any(|file| file.path.starts_with(path))
            || [
                "/etc/machine-id",
                "/etc/fstab",
                "/etc/hostname",
                "/etc/resolv.conf",
                "/usr/lib/os-release",
                "/usr/lib/systemd/system/kiln-agent.service",
                "/usr/lib/systemd/system/emergency.service",
            ]
            .contains(&path)
    };
    for (path, found) in &found {
        let Some(entry) = by_path.get(path.as_str()).filter(|_| !ours(path)) else {
            assert!(ours(path), "{path} is in the image and in nobody's list");
            assert_eq!((found.uid, found.gid, found.xattrs.len()), (0, 0, 0), "{path}");
            continue;
        };
        // Another name of a file has that file's owner and mode.
        let entry = match &entry.kind {
            Kind::Hardlink(target) => by_path[target.as_str()],
            Kind::Directory | Kind::File | Kind::Symlink(_) | Kind::Special(_) => entry,
        };
        assert_eq!((found.uid, found.gid), (entry.uid, entry.gid), "owner of {path}");
        assert_eq!(found.xattrs, entry.xattrs, "extended attributes of {path}");
        match &entry.kind {
            Kind::Symlink(target) => assert_eq!(found.link.as_ref(), Some(target), "{path}"),
            Kind::File => {
                assert_eq!(found.mode, entry.mode, "mode of {path}");
                assert!(found.content.as_deref() == Some(&tar[entry.data.clone()]), "content of {path}");
            }
            Kind::Directory | Kind::Hardlink(_) | Kind::Special(_) => {
                assert_eq!(found.mode, entry.mode, "mode of {path}");
            }
        }
    }
    for entry in &entries {
        let emptied = ["/dev/", "/proc/", "/sys/", "/run/", "/tmp/", "/boot/"];
        let left_out = recipe.exclude.iter().any(|place| match place.strip_suffix('*') {
            Some(start) => entry.path.starts_with(start),
            None => format!("{}/", entry.path).starts_with(&format!("{place}/")),
        });
        let expected = !left_out && !emptied.iter().any(|start| entry.path.starts_with(start));
        assert_eq!(found.contains_key(&entry.path), expected, "{}", entry.path);
    }
    assert!(found.values().any(|found| found.mode & 0o4000 != 0), "a set-user-id bit was compared");
    assert!(found.values().any(|found| found.gid != 0), "a group other than root was compared");
    assert!(found.values().any(|found| !found.xattrs.is_empty()), "an extended attribute was compared");
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

fn the_same_inputs_give_the_same_bytes(options: &BuildOptions, built: &Built) {
    let contents = |folder: &Path| {
        files_of(folder).into_iter().map(|(path, (bytes, _))| (path, bytes)).collect::<BTreeMap<_, _>>()
    };
    let before = contents(&built.folder);
    std::fs::remove_dir_all(&built.folder).unwrap();
    assert!(build(options).unwrap().changed);
    assert!(contents(&built.folder) == before);
}
