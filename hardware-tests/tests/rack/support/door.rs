//! A listener that can be closed: what stood in the place of the boot server gives the place back.

use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// Open until it is dropped; then its connections are cut as well.
pub struct Door {
    /// Where it listens.
    pub address: SocketAddr,
    open: Arc<Mutex<Option<Vec<TcpStream>>>>,
    accepts: Option<JoinHandle<()>>,
}

impl Door {
    /// Each connection is served in a thread of its own.
    pub fn open(at: SocketAddr, serve: impl Fn(TcpStream) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind(at).unwrap_or_else(|e| panic!("{at}: {e}"));
        let address = listener.local_addr().unwrap();
        let open = Arc::new(Mutex::new(Some(Vec::new())));
        let (connections, serve) = (Arc::clone(&open), Arc::new(serve));
        let accepts = std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                match &mut *connections.lock().unwrap() {
                    Some(connections) => connections.push(stream.try_clone().unwrap()),
                    None => return,
                }
                let serve = Arc::clone(&serve);
                std::thread::spawn(move || serve(stream));
            }
        });
        Self { address, open, accepts: Some(accepts) }
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        // Where a thread panicked the test has failed already.
        let Ok(mut open) = self.open.lock() else { return };
        for connection in open.take().unwrap_or_default() {
            let _ = connection.shutdown(Shutdown::Both);
        }
        drop(open);
        // Its own knock ends the wait for the next connection.
        let knocked = TcpStream::connect(self.address).is_ok();
        if let Some(accepts) = self.accepts.take().filter(|_| knocked) {
            let _ = accepts.join();
        }
    }
}
