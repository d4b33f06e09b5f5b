//! Downloads from servers that mean no good, over real sockets. What differs from the agent's own patience is the scale.

use super::*;
use crate::disk::worker::Worker;
use crate::facts;
use crate::testing::from_files;
use crate::testing::web::{self, Happened};
use std::collections::BTreeMap;
use std::net::TcpStream as Socket;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::mpsc::Receiver;
use tokio::runtime::{Builder, Runtime};

/// The agent's, thirty times as fast.
const QUICK: Patience = Patience {
    answer: Duration::from_millis(400),
    gap: Duration::from_millis(500),
    rate: 8 * 1024,
    window: Duration::from_secs(1),
    tries: 4,
    cap: None,
};
/// For servers that mean well: no host is so slow that it counts. A try that brings as much as [`QUICK`] wants counts here, too.
const STEADY: Patience = Patience {
    answer: Duration::from_secs(20),
    gap: Duration::from_secs(20),
    rate: 1024,
    window: Duration::from_secs(8),
    ..QUICK
};
/// What a loaded host may take longer.
const SLACK: Duration = Duration::from_secs(6);

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

fn content(length: usize) -> (Vec<u8>, Expected) {
    let bytes: Vec<u8> = (0..length).map(|n| u8::try_from(n % 251).unwrap()).collect();
    let expected = Expected { what: crate::error::ROOT, sha256: hex::sha256(&bytes), length: length as u64 };
    (bytes, expected)
}

fn download(expected: &Expected, to: Option<&Path>) -> Download {
    let download = Download::new(expected.clone(), to, &Arc::default()).unwrap();
    Download { patience: STEADY, ..download }
}

fn documents(base: &str, patience: Patience) -> Documents<'_> {
    Documents { patience, ..Documents::of(base) }
}

/// One way to keep a client busy, without ever giving it what it asked for.
type Attack = fn(&mut Socket) -> std::io::Result<()>;

fn head(stream: &mut Socket, rest: &str) -> std::io::Result<()> {
    stream.write_all(format!("HTTP/1.1 200 OK\r\n{rest}\r\n").as_bytes())
}

fn for_ever(stream: &mut Socket, bytes: &[u8]) -> std::io::Result<()> {
    let many = bytes.repeat(65_536 / bytes.len());
    loop {
        stream.write_all(&many)?;
    }
}

fn drip(stream: &mut Socket, bytes: &[u8]) -> std::io::Result<()> {
    loop {
        stream.write_all(bytes)?;
        std::thread::sleep(Duration::from_millis(50)); // the attack itself
    }
}

/// So many of them, the first, never come to a body.
const HEADS: usize = 6;
const ATTACKS: [(&str, Attack, &[&str]); 13] = [
    ("says nothing", |_| park(), &["server-unreachable"]),
    ("drips its head", |s| drip(s, b"H"), &["server-unreachable"]),
    (
        "has endless fields",
        |s| head(s, "A: b").and_then(|()| for_ever(s, b"Abcdef: ghijkl\r\n")),
        &["server-unreachable"],
    ),
    (
        "has one endless field",
        |s| s.write_all(b"HTTP/1.1 200 OK\r\nA: ").and_then(|()| for_ever(s, b"x")),
        &["server-unreachable"],
    ),
    (
        "has more fields than anybody needs",
        |s| head(s, &"A: b\r\n".repeat(HEADERS + 1)).and_then(|()| park()),
        &["server-unreachable"],
    ),
    ("goes on with 100", |s| for_ever(s, b"HTTP/1.1 100 Continue\r\n\r\n"), &["server-unreachable"]),
    ("stops after its head", |s| head(s, "Content-Length: 1000000\r\n").and_then(|()| park()), &["transfer-stalled"]),
    ("drips its body", |s| head(s, "Content-Length: 1000000\r\n").and_then(|()| drip(s, b"x")), &["transfer-too-slow"]),
    (
        "drips chunks",
        |s| head(s, "Transfer-Encoding: chunked\r\n").and_then(|()| drip(s, b"1\r\nx\r\n")),
        &["transfer-too-slow"],
    ),
    (
        "never ends its chunks",
        |s| {
            let chunk = format!("1000\r\n{}\r\n", "x".repeat(0x1000));
            head(s, "Transfer-Encoding: chunked\r\n").and_then(|()| for_ever(s, chunk.as_bytes()))
        },
        &["transfer-too-long", "root-length-mismatch"],
    ),
    (
        "never ends what is said of a chunk",
        |s| head(s, "Transfer-Encoding: chunked\r\n\r\n1;").and_then(|()| for_ever(s, b"abcdefgh")),
        &["server-unreachable"],
    ),
    (
        "never ends without a length",
        |s| head(s, "").and_then(|()| for_ever(s, b"x")),
        &["transfer-too-long", "root-length-mismatch"],
    ),
    (
        "promises more than is signed",
        |s| head(s, "Content-Length: 99999999999\r\n").and_then(|()| for_ever(s, b"x")),
        &["transfer-too-long", "root-length-mismatch"],
    ),
];

fn park() -> std::io::Result<()> {
    loop {
        std::thread::park();
    }
}

/// A server for each attack; its URL.
fn attackers() -> Vec<(&'static str, String, &'static [&'static str])> {
    let serve = |attack: Attack| {
        web::serve(move |_, _, stream| {
            // It ends with the connection, which is what the client is to see to.
            let _ = attack(stream);
        })
    };
    ATTACKS.into_iter().map(|(name, attack, kinds)| (name, serve(attack).0, kinds)).collect()
}

#[test]
fn a_server_without_ranges_has_the_time_that_the_whole_takes() {
    let (bytes, expected) = content(400_000);
    let (all, first) = (bytes.clone(), bytes);
    let (breaks, _hear) = web::serve(move |_, _, stream| {
        let _ = head(stream, "Content-Length: 400000\r\n").and_then(|()| stream.write_all(&first[..399_000]));
    });
    // 8 s; what was left is due after 7, the whole after 397.
    let patience = Patience { answer: Duration::from_secs(3), window: Duration::from_secs(1), ..STEADY };
    let (slow, _hear) = web::serve(move |_, _, stream| {
        let _ = head(stream, "Content-Length: 400000\r\n");
        for piece in all.chunks(5_000) {
            std::thread::sleep(Duration::from_millis(100)); // the slow link itself
            if stream.write_all(piece).is_err() {
                return;
            }
        }
    });
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("root");
    let mut download = Download { patience, ..download(&expected, Some(&path)) };
    runtime().block_on(async {
        assert_eq!(download.run(&breaks).await.unwrap_err().kind(), "server-unreachable");
        assert_eq!(download.received, 399_000);
        download.run(&slow).await.unwrap();
    });
    assert_eq!(hex::sha256(&std::fs::read(&path).unwrap()), expected.sha256);
}

#[test]
fn every_attack_ends_in_time_with_a_typed_reason() {
    let servers = attackers();
    let (_, expected) = content(400_000);
    let tried = servers.into_iter().enumerate().map(|(n, (name, url, kinds))| {
        let expected = expected.clone();
        // Which reason it is must not depend on when this host lets the server's thread run.
        let most = Duration::from_secs(4);
        let patience = if n < HEADS { QUICK } else { Patience { answer: most, gap: most, window: most, ..QUICK } };
        std::thread::spawn(move || {
            runtime().block_on(async {
                let begun = Instant::now();
                let error = documents(&url, patience).get("metadata/timestamp.json", 16 << 10).await.unwrap_err();
                assert!(kinds.contains(&error.kind()), "a server that {name}: {error} ({})", error.kind());
                let took = begun.elapsed();
                assert!(took < patience.deadline(16 << 10) + SLACK, "a server that {name} took {took:?}");

                let begun = Instant::now();
                let mut download = Download { patience, ..download(&expected, None) };
                let error = download.run(&url).await.unwrap_err();
                assert!(kinds.contains(&error.kind()), "a server that {name}: {error} ({})", error.kind());
                let took = begun.elapsed();
                assert!(took < patience.deadline(expected.length) + SLACK, "a server that {name} took {took:?}");
            });
        })
    });
    let tried: Vec<_> = tried.collect();
    for thread in tried {
        thread.join().unwrap();
    }
}

#[test]
fn a_transfer_has_an_end_of_its_own() {
    let begun = Instant::now();
    let never = std::future::pending::<Result<()>>();
    let error = runtime().block_on(in_time(&QUICK, "u", 8 * 1024, begun, never)).unwrap_err();
    assert_eq!(error.kind(), "transfer-too-slow");
    let expected = 2 * QUICK.answer + QUICK.window + Duration::from_secs(1);
    assert!((expected..expected + SLACK).contains(&begun.elapsed()), "{:?}", begun.elapsed());
    assert_eq!(PATIENCE.deadline(33_100_000).as_secs(), 20 + 30 + 4040, "as the documents say: 68 minutes");
    assert_eq!(PATIENCE.deadline(256 << 10).as_secs(), 20 + 30 + 32, "metadata");
}

/// Memory is measured in a process of its own, which this test starts: all others would be counted as well.
#[test]
fn no_server_makes_the_agent_hold_more_than_it_means_to() {
    const URLS: &str = "KILN_TEST_HOSTILE_SERVERS";
    if let Ok(urls) = std::env::var(URLS) {
        let (_, expected) = content(400_000);
        let (before, program) = (facts::own_memory().unwrap().peak_bytes, from_files());
        for url in urls.split(' ') {
            runtime().block_on(async {
                documents(url, QUICK).get("metadata/timestamp.json", 16 << 10).await.unwrap_err();
                let mut download = Download { patience: QUICK, ..download(&expected, None) };
                download.run(url).await.unwrap_err();
            });
        }
        let grown =
            (facts::own_memory().unwrap().peak_bytes - before).saturating_sub(from_files().saturating_sub(program));
        assert!(grown < 1 << 20, "{grown} bytes more than before");
        println!("grown by {grown} bytes");
        return;
    }
    let urls: Vec<String> = attackers().into_iter().map(|(_, url, _)| url).collect();
    let name = "fetch::tests::no_server_makes_the_agent_hold_more_than_it_means_to";
    let mut again = Command::new(std::env::current_exe().unwrap());
    again.args(["--exact", name, "--nocapture"]).env(URLS, urls.join(" "));
    let done = again.output().unwrap();
    let said = String::from_utf8_lossy(&done.stdout);
    println!("{said}");
    assert!(done.status.success() && said.contains("grown by"), "{said}{}", String::from_utf8_lossy(&done.stderr));
}

/// Serves the file's ranges, `at_once` bytes a connection.
fn breaks_off_after(file: Vec<u8>, at_once: usize) -> (String, Receiver<Happened>) {
    web::serve(move |_, from, stream| {
        let from = usize::try_from(from).unwrap();
        let rest = &file[from..];
        let head = web::head(from, file.len());
        let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&rest[..at_once.min(rest.len())]));
    })
}

#[test]
fn a_byte_for_each_connection_is_no_progress() {
    let (bytes, expected) = content(400_000);
    let (url, _hear) = breaks_off_after(bytes, 1);
    runtime().block_on(async {
        let mut download = download(&expected, None);
        for n in 1..STEADY.tries {
            let error = download.run(&url).await.unwrap_err();
            assert_eq!((error.kind(), download.tries()), ("server-unreachable", n), "{error}");
        }
        for n in STEADY.tries..STEADY.tries + 3 {
            let error = download.run(&url).await.unwrap_err();
            // The pause that follows is as long as that many failures in a row deserve: it does not begin anew.
            assert_eq!((error.kind(), download.tries()), ("transfer-no-progress", n), "{error}");
        }
    });
}

#[test]
fn a_link_that_breaks_again_and_again_is_gone_on_with() {
    let (bytes, expected) = content(100_000);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("root");
    let (url, hear) = breaks_off_after(bytes.clone(), 9000);
    runtime().block_on(async {
        let mut download = download(&expected, Some(&path));
        let mut broken = 0;
        while let Err(error) = download.run(&url).await {
            assert_eq!((error.kind(), download.tries()), ("server-unreachable", 1), "each brought it on: {error}");
            broken += 1;
        }
        assert_eq!(broken, 11);
        download.into_file().unwrap().keep();
    });
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
    let asked: Vec<u64> =
        hear.try_iter().filter_map(|h| if let Happened::Asked(_, from) = h { Some(from) } else { None }).collect();
    assert_eq!(asked, (0..12).map(|n| n * 9000).collect::<Vec<u64>>(), "no byte came twice");
}

#[test]
fn a_server_without_ranges_is_read_from_the_beginning_and_one_that_lies_about_them_is_refused() {
    let (bytes, expected) = content(100_000);
    let whole = bytes.clone();
    let (part, _hear) = breaks_off_after(bytes, 60_000);
    let (no_ranges, _hear) = web::serve(move |_, _, stream| {
        let _ = head(stream, &format!("Content-Length: {}\r\n", whole.len())).and_then(|()| stream.write_all(&whole));
    });
    let (liar, _hear) = web::serve(|_, _, stream| {
        let head =
            "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 7-99999/100000\r\nContent-Length: 99993\r\n\r\n";
        let _ = stream.write_all(head.as_bytes());
    });
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("root");
    runtime().block_on(async {
        let mut download = download(&expected, Some(&path));
        download.run(&part).await.unwrap_err();
        let error = download.run(&liar).await.unwrap_err();
        assert!(error.to_string().contains("asked for bytes from 60000"), "{error}");
        download.run(&no_ranges).await.unwrap();
        drop(download);
    });
    assert!(!path.exists(), "what nobody kept is gone");
}

#[test]
fn what_does_not_verify_is_fetched_anew_and_leaves_nothing() {
    let (bytes, expected) = content(100_000);
    let mut wrong = bytes.clone();
    wrong[50_000] ^= 1;
    let ((good, _), (bad, hear)) = (breaks_off_after(bytes.clone(), usize::MAX), breaks_off_after(wrong, usize::MAX));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("root");
    runtime().block_on(async {
        let mut download = download(&expected, Some(&path));
        for n in 1..=2 {
            let error = download.run(&bad).await.unwrap_err();
            assert_eq!((error.kind(), download.tries()), ("root-hash-mismatch", n));
            assert_eq!(std::fs::metadata(&path).unwrap().len(), 0);
        }
        download.run(&good).await.unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
    });
    assert!(hear.try_iter().all(|h| !matches!(h, Happened::Asked(_, 1..))), "none of its bytes was gone on with");
}

#[test]
fn a_transfer_that_nobody_waits_for_closes_its_connection() {
    let (_, expected) = content(100_000);
    let (url, hear) = web::serve(|_, _, stream| {
        let _ = head(stream, "Content-Length: 100000\r\n").and_then(|()| stream.write_all(b"x")).and_then(|()| park());
    });
    let path = format!("/a/{}", expected.sha256);
    runtime().block_on(async {
        let mut download = Download::new(expected, None, &Arc::default()).unwrap();
        let mut running = Box::pin(download.run(&url));
        let (arrived, patience) = (|h: &Happened| *h == Happened::Asked(path.clone(), 0), Duration::from_secs(10));
        // Until the server has been asked, and then no longer.
        while timeout(Duration::from_millis(20), &mut running).await.is_err() {
            if hear.try_iter().any(|h| arrived(&h)) {
                break;
            }
        }
        drop(running);
        // The runtime must turn for the connection's task to end.
        let gone =
            tokio::task::spawn_blocking(move || web::wait(&hear, patience, |h| *h == Happened::Gone(path.clone())));
        gone.await.unwrap();
    });
}

/// A lower bound, which no fast host breaks: half a MiB at a quarter a second, for a slot and for a file as UKIs are.
#[test]
fn a_prefetch_takes_no_more_of_the_link_than_it_may() {
    let (bytes, expected) = content(512 << 10);
    let files = [(format!("a/{}", expected.sha256), bytes.clone())].into();
    let (http, _hear) = web::honest(files, BTreeMap::new());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let disk = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    let slot = disk.try_clone().unwrap();
    let put: Put = Box::new(move |at, bytes| {
        let written = slot.write_all_at(&bytes, 4096 + at).map_err(AgentError::system("writing"));
        Box::pin(std::future::ready(written))
    });
    let uki = dir.path().join("next.efi");
    let onto = Download::onto(expected.clone(), put, &Arc::default());
    for download in [onto, Download::new(expected, Some(&uki), &Arc::default()).unwrap()] {
        let mut download = download.capped(Some(256 << 10));
        let begun = Instant::now();
        runtime().block_on(download.run(&http)).unwrap();
        assert!(begun.elapsed() >= Duration::from_millis(1900), "{:?}", begun.elapsed());
        if let Some(file) = download.into_file() {
            assert!(std::fs::read(file.path()).unwrap() == bytes);
        }
    }
    let mut got = vec![0; bytes.len()];
    disk.read_exact_at(&mut got, 4096).unwrap();
    assert!(got == bytes);
}

/// The disk's thread hangs, and a report goes out meanwhile: one thread has the runtime.
#[test]
fn a_slot_that_hangs_holds_up_nothing_and_what_was_dropped_in_its_turn_is_written_anew() {
    let (bytes, expected) = content((3 << 20) + 5000);
    let path = format!("/a/{}", expected.sha256);
    let (http, hear) = web::honest([(path[1..].to_owned(), bytes.clone())].into(), BTreeMap::new());
    let slot = tempfile::tempfile().unwrap();
    let (go, wait) = std::sync::mpsc::channel::<()>();
    let (begins, mut begun) = tokio::sync::mpsc::unbounded_channel();
    let worker = Worker::new("sda", (slot.try_clone().unwrap(), wait));
    let put: Put = Box::new(move |at, bytes| {
        let (worker, begins) = (worker.clone(), begins.clone());
        Box::pin(async move {
            let write = move |(slot, wait): &mut (File, Receiver<()>)| {
                begins.send(()).unwrap();
                // The channel's end is what is waited for.
                assert!(wait.recv().is_err());
                slot.write_all_at(&bytes, at)
            };
            let written = worker.run("writing a slot", Duration::from_secs(60), write).await?;
            written.map_err(AgentError::system("writing"))
        })
    });
    runtime().block_on(async {
        let mut download = Download::onto(expected, put, &Arc::default());
        tokio::select! {
            _ = download.run(&http) => panic!("it hangs"),
            began = begun.recv() => assert!(began.is_some()),
        }
        drop(go);
        download.run(&http).await.unwrap();
    });
    let mut got = vec![0; bytes.len()];
    slot.read_exact_at(&mut got, 0).unwrap();
    assert!(got == bytes && slot.metadata().unwrap().len() == bytes.len() as u64);
    assert_eq!(hear.try_iter().filter(|h| *h == Happened::Asked(path.clone(), 0)).count(), 2, "from its beginning");
}

/// As a UKI that is wrong on the disk is fetched anew.
#[test]
fn one_server_gives_what_those_before_it_lack_refuse_or_alter() {
    let (bytes, expected) = content(100_000);
    let path = format!("a/{}", expected.sha256);
    let serve = |files: BTreeMap<String, Vec<u8>>| web::honest(files, BTreeMap::new()).0;
    let (empty, honest) = (serve(BTreeMap::new()), serve([(path.clone(), bytes.clone())].into()));
    let lying = serve([(path, vec![7; bytes.len()])].into());
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let nobody = format!("http://{nobody}");
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("uki");
    runtime().block_on(async {
        let mut all = download(&expected, Some(&to));
        all.run_any(&[nobody.clone(), empty.clone(), lying.clone(), honest]).await.unwrap();
        assert!(std::fs::read(&to).unwrap() == bytes);
        let error = download(&expected, None).run_any(&[empty, lying, nobody]).await.unwrap_err();
        assert_eq!(error.kind(), "root-hash-mismatch", "{error}");
        let error = download(&expected, None).run_any(&[]).await.unwrap_err();
        assert_eq!(error.kind(), "server-not-found");
    });
}
