//! What one client may take of HTTP and the agent API, on real sockets: an address of 127.0.0.0/8 is a client.

use crate::common::*;
use axum::Router;
use axum::body::Body;
use axum::routing::{get, post};
use hyper::StatusCode;
use kiln_server::http::{Limits, serve_tcp};
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::time::timeout;

/// A connection from one of this host's loopback addresses.
async fn connect(from: &str, to: SocketAddr, receive_buffer: Option<u32>) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    if let Some(bytes) = receive_buffer {
        socket.set_recv_buffer_size(bytes).unwrap();
    }
    socket.bind(format!("{from}:0").parse().unwrap()).unwrap();
    timeout(PATIENCE, socket.connect(to)).await.expect("it is not even accepted").unwrap()
}

/// Whether the server closed it; anything it says meanwhile is passed over.
async fn is_closed(stream: &mut TcpStream) -> bool {
    let mut sink = tokio::io::sink();
    matches!(timeout(PATIENCE, tokio::io::copy(stream, &mut sink)).await, Ok(Ok(_) | Err(_)))
}

/// Reads what is there without waiting; none: the connection is closed.
fn drain(stream: &TcpStream, buffer: &mut [u8]) -> Option<usize> {
    match stream.try_read(buffer) {
        Ok(0) => None,
        Ok(n) => Some(n),
        Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => Some(0),
        Err(_) => None,
    }
}

#[tokio::test]
async fn one_greedy_address_does_not_keep_others_from_http_and_the_agent_api() {
    let site = TestSite::new();
    let limits = "max_connections = 12\nmax_per_address = 4\n";
    let config = std::fs::read_to_string(site.path().join("kiln.toml")).unwrap();
    let config = config.replace("[http]\n", &format!("[http]\n{limits}"));
    let config = config.replace("[agent_api]\n", &format!("[agent_api]\n{limits}"));
    std::fs::write(site.path().join("kiln.toml"), config).unwrap();
    let big = vec![7; 8 << 20];
    let hash = kiln_release::hex::sha256(&big);
    std::fs::write(site.path().join("repo/a").join(&hash), &big).unwrap();
    let server = Server::start(&site).await;
    let request = format!("GET /a/{hash} HTTP/1.1\r\nHost: kiln\r\n\r\n");

    // 60 downloads that nobody reads, and 60 handshakes that never begin: four each are held, the others closed.
    let (mut downloads, mut handshakes) = (Vec::new(), Vec::new());
    for _ in 0..60 {
        let mut stream = connect("127.0.0.2", server.http, None).await;
        let _ = stream.write_all(request.as_bytes()).await;
        downloads.push(stream);
        handshakes.push(connect("127.0.0.2", server.agent, None).await);
    }
    for stream in downloads[4..].iter_mut().chain(&mut handshakes[4..]) {
        assert!(is_closed(stream).await, "the fifth is let go");
    }
    // Everybody else is served: by HTTP whole, and a machine's report.
    let other = connect("127.0.0.3", server.http, None).await;
    let answer = call(other, "GET", &format!("/a/{hash}"), &[], vec![]).await;
    assert_eq!((answer.status, answer.body.len()), (StatusCode::OK, big.len()));
    let mut agent = Agent::new(1, &site.manifest(1));
    let report = agent.healthy();
    agent.send(&server, &report).await;
    // The four go on; and who ends one may begin another.
    let mut buffer = vec![0; 64 << 10];
    downloads[0].read_exact(&mut buffer[..1000]).await.unwrap();
    assert!(buffer.starts_with(b"HTTP/1.1 200 OK"));
    drop(downloads);
    let begun = Instant::now();
    loop {
        let mut again = connect("127.0.0.2", server.http, None).await;
        let _ = again.write_all(request.as_bytes()).await;
        if again.read_exact(&mut buffer[..15]).await.is_ok() {
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "what ended is still counted");
    }
    let log = std::fs::read_to_string(site.path().join("log")).unwrap();
    assert_eq!(log.matches("[http] max_per_address").count(), 1, "said once: {log}");
}

/// A server of its own, with short deadlines.
async fn serve(limits: Limits) -> (SocketAddr, watch::Sender<bool>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let endless = || async {
        let pieces = futures_util::stream::repeat_with(|| Ok::<_, std::io::Error>(vec![7_u8; 64 << 10]));
        Body::from_stream(pieces)
    };
    let held = || async {
        tokio::time::sleep(Duration::from_secs(3)).await;
        "held"
    };
    let slow_reader = |body: Body| async move {
        match axum::body::to_bytes(body, 1 << 20).await {
            Ok(bytes) => bytes.len().to_string(),
            Err(error) => error.to_string(),
        }
    };
    let router = Router::new()
        .route("/endless", get(endless))
        .route("/held", get(held))
        .route("/length", post(slow_reader))
        .route("/", get(|| async { "short" }));
    let (stop, stopped) = watch::channel(false);
    tokio::spawn(serve_tcp(listener, router, limits, stopped));
    (address, stop)
}

/// By how much it is longer than the deadline for a header tells one from the other, also where a host stops for some seconds.
const IDLE: Duration = Duration::from_secs(12);

fn quick() -> Limits {
    Limits { min_rate: 20 << 10, header: Duration::from_millis(700), idle: IDLE, ..Limits::default() }
}

#[tokio::test]
async fn a_client_that_hardly_reads_is_dropped_and_one_that_reads_steadily_is_not() {
    // Longer than a loaded host stops for: what nobody reads meanwhile is the steady one's, too.
    let (address, _stop) = serve(Limits { rate_window: Duration::from_secs(4), ..quick() }).await;
    let download = async || {
        let mut stream = connect("127.0.0.1", address, Some(16 << 10)).await;
        stream.write_all(b"GET /endless HTTP/1.1\r\nHost: kiln\r\n\r\n").await.unwrap();
        stream
    };
    let (silent, trickle, steady) = (download().await, download().await, download().await);
    let begun = Instant::now();
    let mut buffer = vec![0; 64 << 10];
    let mut steady_took = 0;
    let mut ticks = tokio::time::interval(Duration::from_millis(50));
    // Several windows long: what is in the buffers counts as taken at first.
    while begun.elapsed() < Duration::from_secs(13) {
        ticks.tick().await;
        // Some 2 KiB/s, and at most 320 KiB/s.
        drain(&trickle, &mut buffer[..100]);
        steady_took += drain(&steady, &mut buffer[..16 << 10]).expect("it reads steadily");
    }
    assert!(steady_took > 200 << 10, "{steady_took}");
    // The server is at the end of these two; what is left in the buffers can still be read.
    for mut stream in [silent, trickle] {
        assert!(is_closed(&mut stream).await, "it was not dropped");
    }
    let mut steady = steady;
    assert!(timeout(Duration::from_millis(100), is_closed(&mut steady)).await.is_err(), "it goes on for ever");
}

#[tokio::test]
async fn a_request_must_arrive_in_time_and_an_answer_may_be_waited_for() {
    let (address, _stop) = serve(quick()).await;
    let begun = Instant::now();
    let closed = async |send: &'static [&'static str], pause: u64| {
        // The server's time may begin before this side knows that it is connected.
        let begun = Instant::now();
        let mut stream = connect("127.0.0.1", address, None).await;
        for piece in send {
            if stream.write_all(piece.as_bytes()).await.is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
        let mut text = String::new();
        let _ = timeout(PATIENCE, stream.read_to_string(&mut text)).await.expect("it is never closed");
        (begun.elapsed(), text)
    };
    let drip = &["G", "E", "T", " ", "/", " ", "H", "T", "T", "P", "/", "1", ".", "1", "\r", "\n", "H", "o", "s", "t"];
    let ((nothing, _), (half, _), (dripped, text), (held, held_text), (idle, idle_text)) = tokio::join!(
        closed(&[], 0),
        closed(&["GET / HTTP/1.1\r\n"], 0),
        closed(drip, 100),
        closed(&["GET /held HTTP/1.1\r\nHost: kiln\r\nConnection: close\r\n\r\n"], 0),
        // Between two requests there is more time than for one.
        closed(&["GET / HTTP/1.1\r\nHost: k\r\n\r\n", "GET / HTTP/1.1\r\nHost: k\r\n\r\n"], 1200),
    );
    let header = quick().header..IDLE;
    assert!(header.contains(&nothing) && header.contains(&half), "{nothing:?} {half:?}");
    assert!(header.contains(&dripped) && !text.contains("200 OK"), "{dripped:?} {text}");
    assert!(held >= Duration::from_secs(3) && held_text.ends_with("held"), "{held:?} {held_text}");
    assert_eq!(idle_text.matches("200 OK").count(), 2, "{idle_text}");
    assert!(idle >= Duration::from_millis(1200) + IDLE, "{idle:?}");
    assert!(begun.elapsed() < PATIENCE);
    // A second request's header has its deadline, too; and a body is no header.
    let mut stream = connect("127.0.0.1", address, None).await;
    stream.write_all(b"POST /length HTTP/1.1\r\nHost: k\r\nContent-Length: 4\r\n\r\n").await.unwrap();
    for _ in 0..4 {
        tokio::time::sleep(Duration::from_millis(400)).await;
        stream.write_all(b"x").await.unwrap();
    }
    let mut buffer = [0; 1000];
    let n = stream.read(&mut buffer).await.unwrap();
    assert!(buffer[..n].ends_with(b"4"), "{}", String::from_utf8_lossy(&buffer[..n]));
    let begun = Instant::now();
    stream.write_all(b"GET / HTT").await.unwrap();
    assert!(is_closed(&mut stream).await && begun.elapsed() < IDLE, "{:?}", begun.elapsed());
}
