use super::*;
use kiln_protocol::{LOG_TEXT, LogLine, LogSource};

fn writer(n: u8, boots: &[&str]) -> Writer {
    let machine = format!("00000000-0000-0000-0000-0000000000{n:02x}").parse().unwrap();
    Writer { machine, stranger: false, boots: boots.iter().map(|b| (*b).to_owned()).collect() }
}

fn batch(writer: &Writer, boot: &str, first: u64, texts: &[&str]) -> LogBatch {
    let line = |text: &&str| LogLine { source: LogSource::Kernel, level: 6, at_us: 1000, text: (*text).to_owned() };
    let lines = texts.iter().map(line).collect();
    LogBatch { boot_id: boot.into(), machine: writer.machine.clone(), first, at_us: 5_000_000, lines }
}

fn texts(logs: &Logs, writer: &Writer, boot: &str) -> Vec<(u64, String)> {
    logs.read(&writer.machine, boot).unwrap().1.into_iter().map(|k| (k.number, k.line.text)).collect()
}

fn on_disk(dir: &Path) -> u64 {
    let files = |dir: std::fs::DirEntry| std::fs::read_dir(dir.path()).unwrap().flatten();
    std::fs::read_dir(dir.join("logs")).unwrap().flatten().flat_map(files).map(|f| f.metadata().unwrap().len()).sum()
}

#[test]
fn a_lost_reply_loses_and_doubles_nothing_also_over_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let me = writer(1, &["a"]);
    let logs = Logs::open(dir.path(), TOTAL);
    assert_eq!(logs.append(&me, &batch(&me, "a", 0, &[]), 10_000).unwrap(), 0);
    assert_eq!(logs.append(&me, &batch(&me, "a", 0, &["0", "1"]), 10_000).unwrap(), 2);
    // Sent again, with one more; a server that was killed knows where it was.
    assert_eq!(logs.append(&me, &batch(&me, "a", 0, &["0", "1", "2"]), 10_500).unwrap(), 3);
    let again = Logs::open(dir.path(), TOTAL);
    assert_eq!(again.append(&me, &batch(&me, "a", 1, &["1", "2", "3"]), 9_900).unwrap(), 4);
    let expected: Vec<(u64, String)> = (0..4).map(|n| (n, n.to_string())).collect();
    assert_eq!(texts(&again, &me, "a"), expected);
    assert_eq!(again.read(&me.machine, "a").unwrap().0, Some(4_900), "the quickest batch sets the clock");
    // Half a line, as a power cut leaves it.
    let head = dir.path().join("logs").join(me.machine.as_str()).join("a.head");
    let mut text = std::fs::read(&head).unwrap();
    text.truncate(text.len() - 3);
    std::fs::write(&head, text).unwrap();
    let mended = Logs::open(dir.path(), TOTAL);
    assert_eq!(mended.append(&me, &batch(&me, "a", 4, &["4"]), 10_000).unwrap(), 5, "the half line is missing");
    assert_eq!(texts(&mended, &me, "a").iter().map(|l| l.0).collect::<Vec<_>>(), [0, 1, 2, 4]);
}

#[test]
fn a_hostile_agent_fills_no_disk_and_writes_one_line_for_each() {
    let dir = tempfile::tempdir().unwrap();
    let me = writer(1, &["a"]);
    let logs = Logs::open(dir.path(), TOTAL);
    let nasty = "\u{1}\n{\"n\":9,\"s\":\"agent\",\"p\":1,\"t\":0,\"m\":\"forged\"}\n".repeat(500);
    let many: Vec<&str> = vec![&nasty; 400];
    for n in 0..20 {
        logs.append(&me, &batch(&me, "a", n * 400, &many), 10_000).unwrap();
    }
    assert!(on_disk(dir.path()) <= file::BOOT_BYTES + (400 * 7 * LOG_TEXT as u64), "{}", on_disk(dir.path()));
    assert_eq!(logs.lock().bytes, on_disk(dir.path()));
    assert!(texts(&logs, &me, "a").iter().all(|(_, text)| text.starts_with('\u{1}') && text.len() <= LOG_TEXT));

    for bad in ["", "../../etc/x", "a/b", "a.head", &"x".repeat(65)] {
        assert!(matches!(logs.append(&me, &batch(&me, bad, 0, &["x"]), 0), Err(LogError::BootId)), "{bad}");
        assert!(matches!(logs.read(&me.machine, bad), Err(LogError::BootId)), "{bad}");
    }
    let stranger = Writer { stranger: true, ..writer(2, &["a"]) };
    for n in 0..2_000 {
        logs.append(&stranger, &batch(&stranger, "a", n, &[&"y".repeat(1000)]), 10_000).unwrap();
    }
    let kept = texts(&logs, &stranger, "a");
    assert!(kept[0].0 == 0 && kept.len() < 64, "its beginning is kept: {}", kept.len());
}

#[test]
fn the_beginning_and_the_newest_lines_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let me = writer(1, &["a"]);
    let logs = Logs::open(dir.path(), TOTAL);
    let long = "z".repeat(1000);
    for n in 0..4_000 {
        logs.append(&me, &batch(&me, "a", n, &[&long]), 10_000).unwrap();
    }
    let numbers: Vec<u64> = texts(&logs, &me, "a").iter().map(|l| l.0).collect();
    assert_eq!((numbers[0], *numbers.last().unwrap()), (0, 3_999));
    assert!(numbers.is_sorted() && numbers.len() < 1_100, "{}", numbers.len());
    let again = Logs::open(dir.path(), TOTAL);
    assert_eq!(again.append(&me, &batch(&me, "a", 4_000, &["next"]), 0).unwrap(), 4_001);
}

#[test]
fn old_boots_go_and_so_do_those_of_a_machine_that_is_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let logs = Logs::open(dir.path(), TOTAL);
    let mut me = writer(1, &["a", "b"]);
    for boot in ["a", "b"] {
        logs.append(&me, &batch(&me, boot, 0, &["x"]), 0).unwrap();
    }
    me.boots = vec!["b".into(), "c".into()];
    logs.append(&me, &batch(&me, "c", 0, &["x"]), 0).unwrap();
    assert_eq!([texts(&logs, &me, "a").len(), texts(&logs, &me, "b").len(), texts(&logs, &me, "c").len()], [0, 1, 1]);
    logs.forget(&me.machine);
    assert_eq!((texts(&logs, &me, "c").len(), logs.lock().bytes, on_disk(dir.path())), (0, 0, 0));

    // The site's bound: whoever was silent for longest goes.
    let small = Logs::open(dir.path(), 0);
    let long: Vec<String> = (0..400).map(|n| format!("{n:01000}")).collect();
    let long: Vec<&str> = long.iter().map(String::as_str).collect();
    for n in 1..=5 {
        let machine = writer(n, &["a"]);
        small.append(&machine, &batch(&machine, "a", 0, &long), i64::from(n)).unwrap();
    }
    assert!(on_disk(dir.path()) <= file::BOOT_BYTES);
    assert!(texts(&small, &writer(1, &[]), "a").is_empty() && !texts(&small, &writer(5, &[]), "a").is_empty());
}
