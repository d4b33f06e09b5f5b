//! A network that loses every packet from a chosen moment on.

use kiln_lab::command;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};

/// From now on no packet arrives anywhere in this test's network: a queue without room drops each.
pub fn begin() {
    command::run("tc", "qdisc replace dev lo root pfifo limit 0".split_whitespace()).unwrap();
}

/// Packets arrive again.
pub fn end() {
    command::run("tc", "qdisc del dev lo root".split_whitespace()).unwrap();
}

/// Passes requests on to `to` and answers back, until one asks for a path that begins with `at`: with it the loss
/// begins. Returns its base URL.
pub fn begins_at(to: &'static str, at: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        let mut lost = false;
        for client in listener.incoming().flatten() {
            lost = one_request(client, to, at, lost);
        }
    });
    url
}

/// One request per connection: the answer is said to close, so that none slips through on a kept one. Whether the loss
/// has begun: it does so once.
fn one_request(mut client: TcpStream, to: &str, at: &str, lost: bool) -> bool {
    let mut reader = BufReader::new(client.try_clone().unwrap());
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if !matches!(reader.read_line(&mut head), Ok(1..)) {
            return lost;
        }
    }
    let path = head.split_whitespace().nth(1).unwrap_or_default().to_owned();
    let begins = !lost && path.starts_with(at);
    if begins {
        begin();
    }
    let answer = || -> std::io::Result<()> {
        let mut server = TcpStream::connect(to)?;
        server.write_all(head.replacen("\r\n", "\r\nConnection: close\r\n", 1).as_bytes())?;
        std::io::copy(&mut server, &mut client).map(drop)
    };
    if begins {
        // The connection stays open, as one does whose other end is cut off.
        std::thread::spawn(move || {
            let _kept = (client, reader);
            loop {
                std::thread::park();
            }
        });
        return true;
    }
    let mut answer = answer;
    // A client that has gone is none of the proxy's business.
    let _ = answer();
    lost
}
