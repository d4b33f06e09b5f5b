//! A repository in an attacker's hands: its files over HTTP, as they lie there, or as the attacker likes.

use super::door::Door;
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How metadata is served; artifacts always are as they lie there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// As it lies there.
    Honest,
    /// timestamp.json never ends.
    Endless,
    /// Nothing comes after the headers.
    Silent,
    /// A byte of timestamp.json each second: never long silence, and never enough.
    Drip,
}

/// A running file server.
pub struct Files {
    /// Its base URL.
    pub url: String,
    way: Arc<Mutex<Way>>,
    /// Bytes of endless files that were taken off its hands.
    pub endless: Arc<AtomicU64>,
    /// Paths that were asked for.
    pub asked: Arc<Mutex<BTreeSet<String>>>,
    _door: Door,
}

impl Files {
    /// Serves the folder until it is dropped.
    pub fn serve_at(at: SocketAddr, root: PathBuf) -> Self {
        let way = Arc::new(Mutex::new(Way::Honest));
        let endless = Arc::new(AtomicU64::new(0));
        let asked = Arc::new(Mutex::new(BTreeSet::new()));
        let (how, sent, paths) = (Arc::clone(&way), Arc::clone(&endless), Arc::clone(&asked));
        let door = Door::open(at, move |stream| {
            let way = *how.lock().unwrap();
            // A client that goes away in the middle is no concern of this server's.
            let _ = answer(&root, stream, way, &sent, &paths);
        });
        Self { url: format!("http://{}", door.address), way, endless, asked, _door: door }
    }

    /// The same on a free loopback port.
    pub fn serve(root: PathBuf) -> Self {
        Self::serve_at(([127, 0, 0, 1], 0).into(), root)
    }

    /// Serves differently from now on.
    pub fn way(&self, way: Way) {
        *self.way.lock().unwrap() = way;
    }
}

fn answer(
    root: &Path,
    stream: TcpStream,
    way: Way,
    sent: &AtomicU64,
    asked: &Mutex<BTreeSet<String>>,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut request = String::new();
    reader.read_line(&mut request)?;
    let mut line = String::new();
    while reader.read_line(&mut line)? > 2 {
        line.clear();
    }
    let path = request.split(' ').nth(1).unwrap_or_default();
    asked.lock().unwrap().insert(path.to_owned());
    let path = path.trim_start_matches('/');
    let timestamp = path.ends_with("timestamp.json");
    let (status, body) = match std::fs::read(root.join(path)) {
        Ok(body) => ("200 OK", body),
        Err(_) => ("404 Not Found", Vec::new()),
    };
    let mut stream = reader.into_inner();
    if timestamp && way == Way::Endless {
        stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")?;
        loop {
            stream.write_all(&[b' '; 4096])?;
            sent.fetch_add(4096, Ordering::Relaxed);
        }
    }
    let length = body.len();
    stream
        .write_all(format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n").as_bytes())?;
    if timestamp && way == Way::Silent {
        // Until the client has had enough.
        return std::io::copy(&mut stream, &mut std::io::sink()).map(drop);
    }
    if timestamp && way == Way::Drip {
        for byte in body {
            stream.write_all(&[byte])?;
            // The pause is the attack.
            std::thread::sleep(Duration::from_secs(1));
        }
        return Ok(());
    }
    stream.write_all(&body)
}
