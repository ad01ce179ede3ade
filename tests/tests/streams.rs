//! Connections whose two sides do not count the same: opened by SYN cookies.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests: a panic with its place is what is wanted")]

use privatelink_tests::world::{UNCHECKED, World, config, eventually};
use std::hash::Hasher;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

const GREETING: &[u8] = b"220 who speaks first\r\n";
const ENDPOINT: &str = "10.0.9.9:80";
/// Bytes that go each way.
const MUCH: usize = 24 << 20;
const PATIENCE: Duration = Duration::from_secs(30);

/// Bytes that no two places have in common for long.
fn bytes(seed: u64, count: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(count + 8);
    while bytes.len() < count {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend((state >> 16).to_le_bytes());
    }
    bytes.truncate(count);
    bytes
}

fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = std::hash::DefaultHasher::new();
    hasher.write(bytes);
    hasher.finish()
}

/// A server that speaks first, reads until the client closes its side, says what it has read, and sends as much back.
fn greeter(stream: &mut TcpStream) -> std::io::Result<()> {
    stream.write_all(GREETING)?;
    let mut read = Vec::new();
    stream.read_to_end(&mut read)?;
    stream.write_all(&hash(&read).to_le_bytes())?;
    stream.write_all(&bytes(7, MUCH))
}

/// Serves on port 8080 of both targets, for as long as the test lives.
fn serve(world: &World) {
    for target in ["t1", "t2"] {
        let (ready, is_ready) = std::sync::mpsc::channel();
        world.thread(target, move || {
            let listener = TcpListener::bind("0.0.0.0:8080").unwrap();
            ready.send(()).unwrap();
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                std::thread::spawn(move || greeter(&mut stream));
            }
        });
        is_ready.recv().unwrap();
    }
}

fn connect() -> TcpStream {
    let stream = TcpStream::connect_timeout(&ENDPOINT.parse::<SocketAddr>().unwrap(), PATIENCE).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// A whole conversation: the greeting, megabytes there, half a connection, megabytes back.
fn converse() {
    let mut stream = connect();
    let mut greeting = [0; GREETING.len()];
    stream.read_exact(&mut greeting).unwrap();
    assert_eq!(greeting, GREETING);
    let sent = bytes(3, MUCH);
    stream.write_all(&sent).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut heard = [0; 8];
    stream.read_exact(&mut heard).unwrap();
    assert_eq!(u64::from_le_bytes(heard), hash(&sent), "what the server has read");
    let mut back = Vec::new();
    stream.read_to_end(&mut back).unwrap();
    assert!(back == bytes(7, MUCH), "{} bytes came back, of {MUCH}", back.len());
}

fn count(world: &World, what: &str) -> u64 {
    world.state().get(what).copied().unwrap_or(0)
}

#[test]
fn a_connection_opened_by_a_cookie_carries_megabytes_both_ways_also_where_the_server_speaks_first() {
    let world = World::new(&config("syn_cookies = \"always\"\n", UNCHECKED));
    serve(&world);
    for timestamps in ["1", "0"] {
        world.shell("ca", &format!("sysctl -qw net.ipv4.tcp_timestamps={timestamps}"));
        world.thread("ca", converse).join().unwrap();
    }
    assert_eq!(count(&world, "shop syn_cookie"), 2, "each SYN was answered by the path");
    assert_eq!(count(&world, "shop new_flows"), 2);
    assert_eq!(count(&world, "map streams"), 2, "what the sides count differently is kept");
}

#[test]
fn a_connection_that_a_cookie_opened_to_a_closed_port_is_reset() {
    let world = World::new(&config("syn_cookies = \"always\"\n", UNCHECKED));
    let attempt = || -> std::io::Result<usize> {
        let mut stream = TcpStream::connect_timeout(&ENDPOINT.parse().unwrap(), PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.read(&mut [0; 1])
    };
    let error = world.thread("ca", move || attempt().unwrap_err().kind()).join().unwrap();
    assert_eq!(error, ErrorKind::ConnectionReset);
    eventually("the stream of the flow that did not come about is swept", || {
        (count(&world, "map streams") == 0).then_some(())
    });
}
