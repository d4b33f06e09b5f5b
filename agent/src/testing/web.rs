//! An HTTP server of the test's own words: for each request a closure says what goes out, byte by byte, and the test
//! hears when a client goes.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

/// What happened on a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Happened {
    /// This path was asked for, from this byte on.
    Asked(String, u64),
    /// The client closed the connection on which it had asked for this path.
    Gone(String),
}

/// Serves on a loopback port: `speak(path, from, stream)` for each connection, which has one request.
pub fn serve(speak: impl Fn(&str, u64, &mut TcpStream) + Send + Sync + 'static) -> (String, Receiver<Happened>) {
    serve_on(super::listen(), speak)
}

/// The same on a port that is open already.
fn serve_on(
    (listener, address): (TcpListener, SocketAddr),
    speak: impl Fn(&str, u64, &mut TcpStream) + Send + Sync + 'static,
) -> (String, Receiver<Happened>) {
    let url = format!("http://{address}");
    let (tell, hear) = channel();
    let speak = Arc::new(speak);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (tell, speak) = (tell.clone(), Arc::clone(&speak));
            std::thread::spawn(move || connection(stream, &tell, &*speak));
        }
    });
    (url, hear)
}

fn connection(mut stream: TcpStream, tell: &Sender<Happened>, speak: &dyn Fn(&str, u64, &mut TcpStream)) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let (mut head, mut from) = (String::new(), 0);
    while !head.ends_with("\r\n\r\n") {
        let begun = head.len();
        if !matches!(reader.read_line(&mut head), Ok(1..)) {
            return;
        }
        if let Some(range) = head[begun..].to_ascii_lowercase().strip_prefix("range: bytes=") {
            from = range.trim().trim_end_matches('-').parse().unwrap();
        }
    }
    let path = head.split_whitespace().nth(1).unwrap().to_owned();
    let _ = tell.send(Happened::Asked(path.clone(), from));
    let (gone, its_path) = (tell.clone(), path.clone());
    std::thread::spawn(move || {
        // The client sends nothing more: what ends this read is its going.
        let _ = reader.read(&mut [0]);
        let _ = gone.send(Happened::Gone(its_path));
    });
    speak(&path, from, &mut stream);
    let _ = stream.shutdown(std::net::Shutdown::Both);
}

/// Waits until something satisfies `wanted`; what comes before it is passed over.
#[track_caller]
pub fn wait(hear: &Receiver<Happened>, within: Duration, wanted: impl Fn(&Happened) -> bool) {
    let until = std::time::Instant::now() + within;
    loop {
        let left = until.saturating_duration_since(std::time::Instant::now());
        let happened = hear.recv_timeout(left).unwrap_or_else(|_| panic!("nothing of the kind within {within:?}"));
        if wanted(&happened) {
            return;
        }
    }
}

/// A door that the test opens: what waits at it is stopped, and nothing else.
#[derive(Default)]
pub struct Gate(Mutex<bool>, Condvar);

impl Gate {
    pub fn open(&self) {
        *self.0.lock().unwrap() = true;
        self.1.notify_all();
    }

    pub fn pass(&self) {
        let open = self.0.lock().unwrap();
        drop(self.1.wait_while(open, |open| !*open).unwrap());
    }
}

/// The head of an answer with the bytes of a file of `length` from there on.
pub fn head(from: usize, length: usize) -> String {
    let status = match from {
        0 => "200 OK".to_owned(),
        _ => format!("206 Partial Content\r\nContent-Range: bytes {from}-{}/{length}", length - 1),
    };
    format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n", length - from)
}

/// By path: how many of its bytes come at once, and what the rest waits for.
pub type Gates = BTreeMap<String, (usize, Arc<Gate>)>;

/// An honest server of `files`. Of a path that `gates` names, only so many bytes come until its gate is open.
pub fn honest(files: BTreeMap<String, Vec<u8>>, gates: Gates) -> (String, Receiver<Happened>) {
    honest_on(super::listen(), files, gates)
}

/// The same on a port that is open already.
pub fn honest_on(
    at: (TcpListener, SocketAddr),
    files: BTreeMap<String, Vec<u8>>,
    gates: Gates,
) -> (String, Receiver<Happened>) {
    serve_on(at, move |path, from, stream| {
        let Some(file) = files.get(&path[1..]) else {
            let _ = stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n");
            return;
        };
        let from = usize::try_from(from).unwrap();
        let rest = &file[from..];
        let head = head(from, file.len());
        let first = gates.get(path).map_or(rest.len(), |(bytes, _)| (*bytes).min(rest.len()));
        if stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&rest[..first])).is_err() {
            return;
        }
        if let Some((_, gate)) = gates.get(path) {
            gate.pass();
            let _ = stream.write_all(&rest[first..]);
        }
    })
}
