//! A network that loses packets from a chosen moment on, as the agent sees it: nothing comes, and nothing says so.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};

/// Passes requests on to `to` and answers back, but for paths that begin with `silent_at`: their first bytes come,
/// then nothing for ever. Returns its base URL.
pub fn http(to: &'static str, silent_at: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            std::thread::spawn(move || one_request(client, to, silent_at));
        }
    });
    url
}

/// One request per connection: the answer is said to close, so that none slips through on a kept one.
fn one_request(client: TcpStream, to: &str, silent_at: &str) {
    let mut reader = BufReader::new(client.try_clone().unwrap());
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if !matches!(reader.read_line(&mut head), Ok(1..)) {
            return;
        }
    }
    let path = head.split_whitespace().nth(1).unwrap_or_default().to_owned();
    let mut server = TcpStream::connect(to).unwrap();
    let request = head.replacen("\r\n", "\r\nConnection: close\r\n", 1);
    server.write_all(request.as_bytes()).unwrap();
    let mut client = client;
    if path.starts_with(silent_at) {
        let mut first = vec![0; 1024];
        let n = server.read(&mut first).unwrap();
        let _ = client.write_all(&first[..n]);
        loop {
            std::thread::park();
        }
    }
    let _ = std::io::copy(&mut server, &mut client);
}

/// An address whose packets leave and are lost: the far end of the cable belongs to nobody.
pub fn address() -> &'static str {
    for line in [
        "link add void0 type veth peer name void1",
        "addr add 10.99.0.1/24 dev void0",
        "link set void0 up",
        "link set void1 up",
        "neigh add 10.99.0.9 lladdr 02:00:00:00:00:09 dev void0",
    ] {
        kiln_lab::command::run("ip", line.split_whitespace()).unwrap();
    }
    "10.99.0.9"
}
