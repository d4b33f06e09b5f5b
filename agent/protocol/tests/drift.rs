//! The kernel's tables against a release, as they look on a real machine.

use kiln_protocol::{Difference, DriftKind, Usage, drift};

fn what(differences: &[Difference]) -> Vec<&str> {
    differences.iter().map(|d| d.what.as_str()).collect()
}

fn strings(list: &[&str]) -> Vec<String> {
    list.iter().map(|text| (*text).to_owned()).collect()
}

#[test]
fn modules_are_known_by_either_spelling() {
    let loaded = "dm_verity 69632 1 - Live 0x0\nevil 16384 0 - Live 0x0 (OE)\nvirtio_net 1 2 - Live 0x0\n";
    let found = drift::modules(loaded, &strings(&["dm-verity", "virtio_net"]));
    assert_eq!(what(&found), ["evil"]);
    assert_eq!(found[0].text, "kernel module evil is loaded; the release has none of that name");
}

const MOUNTS: &str = "\
22 1 253:0 / / ro,relatime - erofs /dev/dm-0 ro,user_xattr,acl
23 22 0:5 / /dev rw,nosuid shared:2 - devtmpfs devtmpfs rw,mode=0755
24 22 0:20 / /proc rw,nosuid,nodev,noexec shared:3 - proc proc rw
25 22 0:21 / /sys rw,nosuid,nodev,noexec shared:4 - sysfs sysfs rw
26 25 0:22 / /sys/fs/cgroup rw,nosuid,nodev,noexec shared:5 - cgroup2 cgroup2 rw
27 22 0:23 / /run rw,nosuid,nodev shared:6 - tmpfs tmpfs rw,mode=0755
28 23 0:24 / /dev/shm rw,nosuid,nodev shared:7 - tmpfs tmpfs rw
29 22 0:23 /machine-id /etc/machine-id ro,nosuid,nodev - tmpfs tmpfs rw,mode=0755
30 22 0:25 / /tmp rw,nosuid,nodev,noexec shared:8 - tmpfs tmpfs rw,size=32768k
31 27 0:26 / /run/credentials/systemd-journald.service ro,nosuid,nodev,noexec - ramfs none rw
";

#[test]
fn mounts_are_those_declared_and_barred_as_declared() {
    assert_eq!(drift::mounts(MOUNTS, &["/tmp"], &[], &[]), []);
    let more =
        format!("{MOUNTS}40 22 8:1 / /mnt/a\\040b rw - ext4 /dev/sda1 rw\n41 22 0:9 / /usr/bin rw - tmpfs none rw\n");
    let found = drift::mounts(&more, &["/tmp"], &[], &[]);
    assert_eq!(what(&found), ["/mnt/a b", "/usr/bin"]);
    assert_eq!(what(&drift::mounts(&more, &["/tmp"], &[], &strings(&["/mnt/a b"]))), ["/usr/bin"]);
    let open = MOUNTS.replace("/tmp rw,nosuid,nodev,noexec", "/tmp rw,nosuid,nodev");
    assert_eq!(drift::mounts(&open, &["/tmp"], &[], &[])[0].text, "/tmp is mounted without noexec");
    assert_eq!(drift::mounts(&open, &["/tmp"], &strings(&["/tmp"]), &[]), [], "its allow-list's guard judges");
    assert_eq!(
        drift::mounts(MOUNTS, &["/tmp", "/srv"], &[], &[])[0].text,
        "/srv is not mounted; the release says a tmpfs"
    );
    let loose = MOUNTS.replace("/ / ro,relatime - erofs /dev/dm-0 ro", "/ / rw,relatime - ext4 /dev/sda1 rw");
    assert_eq!(what(&drift::mounts(&loose, &["/tmp"], &[], &[])), ["/"]);
}

#[test]
fn listeners_are_told_by_protocol_and_port() {
    let tcp = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
               0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 812 1\n\
               1: 0100007F:0016 0100007F:9999 01 00000000:00000000 00:00000000 00000000     0        0 813 1\n\
               2: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 814 1\n";
    let found = drift::listeners(tcp, "tcp", &strings(&["tcp/22"]));
    assert_eq!(found.iter().map(|l| (l.what.as_str(), l.inode)).collect::<Vec<_>>(), [("tcp/8080", 812)]);
    let told = drift::listener(&found[0], Some("nc (pid 7)"));
    assert_eq!(told.text, "nc (pid 7) listens on tcp/8080, which the release does not declare");
    let udp = "sl local\n 1: 00000000:0044 00000000:0000 07 0:0 0:0 0 0 0 5\n 2: 00000000:B000 00000000:0000 07 0:0 0:0 0 0 0 6\n\
               3: 00000000:0045 00000000:0000 07 0:0 0:0 0 0 0 7\n";
    let found = drift::listeners(udp, "udp", &strings(&["udp/68"]));
    assert_eq!(found.iter().map(|l| l.what.as_str()).collect::<Vec<_>>(), ["udp/69"], "client ports are no services");
}

#[test]
fn users_and_services_are_the_releases() {
    let found = drift::users(&strings(&["mallory:0", "root:0"]), &strings(&["daemon:1", "root:0"]));
    assert_eq!(what(&found), ["mallory:0", "daemon:1"]);
    assert_eq!(found[0].kind, DriftKind::User);
    let running = strings(&["kiln-agent.service", "getty@tty1.service", "run-u7.service", "ssh@.service"]);
    let found = drift::services(&running, &strings(&["kiln-agent.service", "getty@.service"]));
    assert_eq!(what(&found), ["run-u7.service", "ssh@.service"]);
}

#[test]
fn one_value_and_what_turned() {
    assert_eq!(drift::value(DriftKind::Kernel, "kernel", "6.12", "6.12"), None);
    let kernel = drift::value(DriftKind::Kernel, "kernel", "6.12", "6.13\n").into_iter().collect::<Vec<_>>();
    assert_eq!(kernel[0].text, "kernel is \"6.13\\n\"; the release says \"6.12\"");
    let unit = vec![drift::foreign(DriftKind::Unit, "x", "x\u{7}")];
    assert_eq!(unit[0].text, "x", "no control character reaches a console");
    let (came, went) = drift::turned(&kernel, &unit);
    assert_eq!((came[0].kind, went[0].kind), (DriftKind::Unit, DriftKind::Kernel));
}

#[test]
fn kills_and_throttling_are_told_once_each() {
    let events = |kills: u64| format!("low 0\nhigh 3\nmax 9\noom 1\noom_kill {kills}\noom_group_kill 0\n");
    let cpu = |periods: u64, throttled: u64| format!("usage_usec 5\nnr_periods {periods}\nnr_throttled {throttled}\n");
    let (usage, told) = Usage::default().look("web.service", &events(0), &cpu(100, 10));
    assert_eq!(told, []);
    let (usage, told) = usage.look("web.service", &events(2), &cpu(200, 90));
    assert_eq!(told.len(), 2);
    assert_eq!(told[0], (true, "web.service: 2 process(es) killed at its memory limit".into()));
    assert_eq!(told[1].1, "web.service: held back by its CPU limit in 80 of 100 periods");
    let (usage, told) = usage.look("web.service", &events(2), &cpu(200, 90));
    assert_eq!(told, [], "nothing new");
    // Restarted: its counters begin at 0.
    let (_, told) = usage.look("web.service", &events(1), &cpu(50, 0));
    assert_eq!(told.len(), 2);
}
