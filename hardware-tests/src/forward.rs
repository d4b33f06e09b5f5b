//! The web page on the host's loopback: a socket opened outside, accepted inside.

use std::io::copy;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;

/// The listener that came in as standard input, if one did.
pub fn listener_from_stdin() -> Option<TcpListener> {
    let listener = TcpListener::from(std::io::stdin().as_fd().try_clone_to_owned().ok()?);
    listener.local_addr().is_ok().then_some(listener)
}

/// Accepts for ever and copies to `to` in the lab's network.
pub fn spawn(listener: TcpListener, to: (std::net::Ipv4Addr, u16)) {
    std::thread::spawn(move || {
        for client in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || {
                let Ok(server) = TcpStream::connect(to) else { return };
                let (Ok(client_in), Ok(server_in)) = (client.try_clone(), server.try_clone()) else { return };
                let back = std::thread::spawn(move || pump(server_in, client));
                pump(client_in, server);
                let _ = back.join();
            });
        }
    });
}

/// Copies one direction; its end is passed on.
fn pump(mut from: TcpStream, mut to: TcpStream) {
    let _ = copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Write);
}
