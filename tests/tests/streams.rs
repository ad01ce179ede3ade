//! Connections whose two sides do not count the same: opened by SYN cookies, or begun with the Proxy Protocol's header.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests: a panic with its place is what is wanted")]

use privatelink_tests::world::{CHECKED, UNCHECKED, World, config, dualstack, eventually};
use std::hash::Hasher;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

const ENDS: [&str; 4] = ["ca", "cb", "t1", "t2"];
const GREETING: &[u8] = b"220 who speaks first\r\n";
const ENDPOINT: &str = "10.0.9.9:80";
/// An IPv6 client's way to IPv4 targets and to IPv6 ones, and an IPv4 client's to IPv6 targets.
const WIDE: [&str; 3] = ["[fd00::99]:80", "[fd00::99]:81", "10.0.9.9:81"];
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

/// A server that speaks first, reads until the client closes its side, says what it has read, and sends as much back. It repeats the first
/// `header` bytes behind its greeting.
fn greeter(stream: &mut TcpStream, header: usize) -> std::io::Result<()> {
    stream.write_all(GREETING)?;
    let mut first = vec![0; header];
    stream.read_exact(&mut first)?;
    stream.write_all(&first)?;
    let mut read = Vec::new();
    stream.read_to_end(&mut read)?;
    stream.write_all(&hash(&read).to_le_bytes())?;
    stream.write_all(&bytes(7, MUCH))
}

/// Serves on port 8080 of both targets, for as long as the test lives.
fn serve(world: &World, header: usize) {
    serve_at(world, "[::]:8080", header);
}

fn serve_at(world: &World, address: &'static str, header: usize) {
    for target in ["t1", "t2"] {
        let (ready, is_ready) = std::sync::mpsc::channel();
        world.thread(target, move || {
            let listener = TcpListener::bind(address).unwrap();
            ready.send(()).unwrap();
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                std::thread::spawn(move || greeter(&mut stream, header));
            }
        });
        is_ready.recv().unwrap();
    }
}

fn connect(to: &str) -> TcpStream {
    let stream = TcpStream::connect_timeout(&to.parse::<SocketAddr>().unwrap(), PATIENCE).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// A whole conversation: the greeting, megabytes there, half a connection, megabytes back.
/// Returns the header that the server has read, and the client's own port.
fn converse(header: usize) -> (Vec<u8>, u16) {
    converse_with(ENDPOINT, header)
}

fn converse_with(to: &str, header: usize) -> (Vec<u8>, u16) {
    let mut stream = connect(to);
    let mut greeting = [0; GREETING.len()];
    stream.read_exact(&mut greeting).unwrap();
    assert_eq!(greeting, GREETING);
    let mut first = vec![0; header];
    stream.read_exact(&mut first).unwrap();
    let sent = bytes(3, MUCH);
    stream.write_all(&sent).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut heard = [0; 8];
    stream.read_exact(&mut heard).unwrap();
    assert_eq!(u64::from_le_bytes(heard), hash(&sent), "what the server has read");
    let mut back = Vec::new();
    stream.read_to_end(&mut back).unwrap();
    assert!(back == bytes(7, MUCH), "{} bytes came back, of {MUCH}", back.len());
    (first, stream.local_addr().unwrap().port())
}

fn count(world: &World, what: &str) -> u64 {
    world.state().get(what).copied().unwrap_or(0)
}

#[test]
fn a_connection_opened_by_a_cookie_carries_megabytes_both_ways_also_where_the_server_speaks_first() {
    let world = World::new(&config("syn_cookies = \"always\"\n", UNCHECKED));
    serve(&world, 0);
    for timestamps in ["1", "0"] {
        world.shell("ca", &format!("sysctl -qw net.ipv4.tcp_timestamps={timestamps}"));
        world.thread("ca", || converse(0)).join().unwrap();
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

#[test]
fn cookies_open_connections_with_an_ipv6_side_which_carry_megabytes_both_ways() {
    let world = World::dualstack(&dualstack("syn_cookies = \"always\"\n", UNCHECKED), &ENDS);
    serve(&world, 0);
    for timestamps in ["1", "0"] {
        world.shell("ca", &format!("sysctl -qw net.ipv4.tcp_timestamps={timestamps}"));
        for to in WIDE {
            world.thread("ca", move || converse_with(to, 0)).join().unwrap();
        }
    }
    assert_eq!(count(&world, "shop syn_cookie"), 6, "each SYN was answered by the path");
    assert_eq!((count(&world, "shop new_flows"), count(&world, "shop6 new_flows")), (2, 4));
    assert_eq!(count(&world, "map streams6"), 6, "what the sides count differently is kept");
    assert_eq!(count(&world, "map established6"), 12);
    let attempt = |to: &str| -> std::io::Result<usize> {
        let mut stream = TcpStream::connect_timeout(&to.parse().unwrap(), PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.read(&mut [0; 1])
    };
    for target in ["t1", "t2"] {
        world.shell(
            target,
            "nft 'add table inet f; add chain inet f in { type filter hook input priority 0; }; \
             add rule inet f in tcp dport 8080 reject with tcp reset'",
        );
    }
    for to in WIDE {
        let error = world.thread("ca", move || attempt(to).unwrap_err().kind()).join().unwrap();
        assert_eq!(error, ErrorKind::ConnectionReset, "{to}: nobody listens");
    }
}

/// A configuration whose targets are told who the client is.
fn proxied(extra: &str, checks: &str) -> String {
    config(extra, &format!("{checks} }}\nproxy_protocol_v2 = {{ enabled = true"))
}

/// Both hooks, with and without SYN cookies. By TCX, segments are yet to be cut, and their checksums yet to be completed.
fn each_hook() -> [String; 4] {
    [("xdp", "auto"), ("xdp", "always"), ("tcx", "auto"), ("tcx", "always")]
        .map(|(hook, cookies)| format!("hook = \"{hook}\"\nsyn_cookies = \"{cookies}\"\n"))
}

/// CRC32C, bit by bit (RFC 9260, appendix A).
fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        for bit in 0..8 {
            let carry = (crc ^ u32::from(byte >> bit)) & 1;
            crc = crc >> 1 ^ if carry == 1 { 0x82f6_3b78 } else { 0 };
        }
    }
    !crc
}

/// The header that a target should get of a client of the endpoint `shop`.
fn expected(world: &World, port: u16, family: u8, listener: u16) -> Vec<u8> {
    let endpoints = world.json("endpoints");
    let row = endpoints.as_array().unwrap().iter().find(|it| it["endpoint"] == "shop").unwrap().clone();
    let id = row["id"].as_str().unwrap().to_owned();
    assert!(id.len() == 22 && id.starts_with("vpce-"), "{id}");
    let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21".to_vec();
    header.extend([family, 0, 84, 10, 0, 1, 5, 10, 0, 9, 9]);
    header.extend(port.to_be_bytes());
    header.extend(listener.to_be_bytes());
    header.extend([3, 0, 4, 0, 0, 0, 0, 0xea, 0, 23, 1]);
    header.extend(id.as_bytes());
    header.extend([4, 0, 36]);
    header.resize(100, 0);
    let crc = crc32c(&header).to_be_bytes();
    header[31..35].copy_from_slice(&crc);
    header
}

#[test]
fn targets_read_the_header_once_and_then_every_byte_also_where_it_was_lost_on_its_way() {
    for extra in each_hook() {
        let world = World::new(&proxied(&extra, UNCHECKED));
        serve(&world, 100);
        let (header, port) = world.thread("ca", || converse(100)).join().unwrap();
        assert_eq!(header, expected(&world, port, 0x11, 80), "{extra}");
        // The first two segments that carry it are dropped at the target, and one segment of 97 each way, always the same ones.
        let lossy = |dropped: &str| {
            format!(
                "nft 'add table ip f; add chain ip f in {{ type filter hook input priority 0; }}; {dropped} \
                 add rule ip f in tcp flags ack numgen inc mod 97 3 drop'"
            )
        };
        for target in ["t1", "t2"] {
            world.shell(
                target,
                &lossy("add rule ip f in tcp dport 8080 ip length 140-164 quota until 300 bytes drop;"),
            );
        }
        world.shell("ca", &lossy(""));
        let (header, port) = world.thread("ca", || converse(100)).join().unwrap();
        assert_eq!(header, expected(&world, port, 0x11, 80), "{extra}, lost and sent again");
        let dropped = world.shell("t1", "nft list table ip f") + &world.shell("t2", "nft list table ip f");
        assert!(dropped.contains("bytes used"), "none was dropped: {extra} {dropped}");
    }
}

/// A client that speaks before it hears: its first segment has data. Returns the header that the server has read, and the client's port.
fn hasty() -> (Vec<u8>, u16) {
    let mut stream = connect(ENDPOINT);
    let sent = bytes(3, 1000);
    stream.write_all(&sent).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut before = [0; GREETING.len() + 100 + 8];
    stream.read_exact(&mut before).unwrap();
    assert_eq!(before[GREETING.len() + 100..], hash(&sent).to_le_bytes(), "what the server has read");
    let mut back = Vec::new();
    stream.read_to_end(&mut back).unwrap();
    assert!(back == bytes(7, MUCH), "{} bytes came back, of {MUCH}", back.len());
    (before[GREETING.len()..][..100].to_vec(), stream.local_addr().unwrap().port())
}

/// By TCX, with SYN cookies as they are said.
fn by_tcx(cookies: &str) -> String {
    format!("hook = \"tcx\"\nsyn_cookies = \"{cookies}\"\n")
}

/// Has the targets' devices complete checksums, as physical ones do: from where they are told to begin.
fn completing(world: World) -> World {
    for target in ["t1", "t2"] {
        world.shell("dp", &format!("ethtool -K {target} tx off"));
    }
    world
}

#[test]
fn a_device_that_completes_checksums_finds_where_they_begin_behind_the_header() {
    for cookies in ["auto", "always"] {
        let world = completing(World::dualstack(&proxied6(&by_tcx(cookies), UNCHECKED), &ENDS));
        serve(&world, 100);
        for to in WIDE {
            world.thread("ca", move || converse_with(to, 100)).join().unwrap();
        }
        let world = completing(World::new(&proxied(&by_tcx(cookies), UNCHECKED)));
        serve(&world, 100);
        let (header, port) = world.thread("ca", || converse(100)).join().unwrap();
        assert_eq!(header, expected(&world, port, 0x11, 80), "{cookies}");
    }
    let world = completing(World::new(&proxied(&by_tcx("off"), UNCHECKED)));
    serve(&world, 100);
    // The ACK of the handshake is lost, so that the first data takes the header along.
    world.shell(
        "ca",
        "nft 'add table ip f; add chain ip f out { type filter hook output priority 0; }; \
         add rule ip f out tcp dport 80 tcp flags & (syn | ack | psh) == ack quota until 60 bytes drop'",
    );
    let count = "nft 'add table ip f; add chain ip f in { type filter hook input priority 0; }; \
                 add rule ip f in tcp dport 8080 ip length 1152 counter'";
    for target in ["t1", "t2"] {
        world.shell(target, count);
    }
    let (header, port) = world.thread("ca", hasty).join().unwrap();
    assert_eq!(header, expected(&world, port, 0x11, 80));
    let counted = ["t1", "t2"].map(|target| world.shell(target, "nft list table ip f"));
    assert!(
        counted.concat().contains("packets 1 bytes 1152"),
        "a header and data in one segment: {counted:?}"
    );

    let hear = answer(&world, "0.0.0.0:8080");
    for length in [0, 1, 511, 512, 513, 1024, 1300] {
        let message = bytes(5, length);
        let asked = message.clone();
        let ask = move || {
            let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.connect("10.0.9.9:53").unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket.send(&asked).unwrap();
            socket.recv(&mut [0; 64]).unwrap();
            socket.local_addr().unwrap().port()
        };
        let port = world.thread("ca", ask).join().unwrap();
        assert_eq!(hear.recv().unwrap(), [expected(&world, port, 0x12, 53), message].concat());
    }
}

/// The header of an IPv6 client of the endpoint `shop`.
fn expected6(world: &World, port: u16, listener: u16) -> Vec<u8> {
    let six = |last: u8| [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last];
    let id = expected(world, port, 0x11, listener)[39..61].to_vec();
    let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21\x21\0\x54".to_vec();
    header.extend(six(5));
    header.extend(six(0x99));
    header.extend(port.to_be_bytes());
    header.extend(listener.to_be_bytes());
    header.extend([3, 0, 4, 0, 0, 0, 0, 0xea, 0, 23, 1]);
    header.extend(id);
    header.extend([4, 0, 12]);
    header.resize(100, 0);
    let crc = crc32c(&header).to_be_bytes();
    header[55..59].copy_from_slice(&crc);
    header
}

/// The same as [`proxied`], of both families.
fn proxied6(extra: &str, checks: &str) -> String {
    dualstack(extra, &format!("{checks} }}\nproxy_protocol_v2 = {{ enabled = true"))
}

#[test]
fn targets_of_either_family_read_the_header_of_a_client_of_either_and_then_every_byte() {
    for extra in each_hook() {
        let world = World::dualstack(&proxied6(&extra, UNCHECKED), &ENDS);
        serve(&world, 100);
        for lossy in [false, true] {
            if lossy {
                // The first segments that carry it are dropped at the target, and one segment of 97 each way, always the same ones.
                for (end, first) in [("t1", true), ("t2", true), ("ca", false)] {
                    let quota =
                        "add rule inet f in tcp dport 8080 meta length 140-184 quota until 300 bytes drop;";
                    let dropped = if first { quota } else { "" };
                    world.shell(
                        end,
                        &format!(
                            "nft 'add table inet f; add chain inet f in {{ type filter hook input priority 0; }}; \
                             {dropped} add rule inet f in tcp flags ack numgen inc mod 97 3 drop'"
                        ),
                    );
                }
            }
            for to in WIDE {
                let (header, port) = world.thread("ca", move || converse_with(to, 100)).join().unwrap();
                let listener = if to.ends_with('0') { 80 } else { 81 };
                let wanted = match to.starts_with('[') {
                    true => expected6(&world, port, listener),
                    false => expected(&world, port, 0x11, listener),
                };
                assert_eq!(header, wanted, "{to} {extra} {lossy}");
            }
        }
    }
}

/// Answers each datagram at both targets, and says what was in it.
fn answer(world: &World, address: &'static str) -> std::sync::mpsc::Receiver<Vec<u8>> {
    let (heard, hear) = std::sync::mpsc::channel();
    for target in ["t1", "t2"] {
        let (ready, is_ready) = std::sync::mpsc::channel();
        let heard = heard.clone();
        world.thread(target, move || {
            let socket = std::net::UdpSocket::bind(address).unwrap();
            ready.send(()).unwrap();
            let mut message = [0; 2000];
            while let Ok((length, from)) = socket.recv_from(&mut message) {
                heard.send(message[..length].to_vec()).unwrap();
                socket.send_to(b"answer", from).unwrap();
            }
        });
        is_ready.recv().unwrap();
    }
    hear
}

#[test]
fn the_first_datagram_of_a_flow_brings_the_header_over_ipv6_too() {
    let world = World::dualstack(&proxied6("", UNCHECKED), &ENDS);
    let hear = answer(&world, "[::]:8080");
    for (from, to) in [("[::]:5555", "[fd00::99]:81"), ("0.0.0.0:5555", "10.0.9.9:81")] {
        let work = move || {
            let socket = std::net::UdpSocket::bind(from).unwrap();
            socket.connect(to).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            for message in ["one", "two"] {
                socket.send(message.as_bytes()).unwrap();
                socket.recv(&mut [0; 64]).unwrap();
            }
        };
        world.thread("ca", work).join().unwrap();
        let mut header = hear.recv().unwrap();
        assert_eq!(header.split_off(100), b"one", "{to}");
        if to.starts_with('[') {
            let mut wanted = expected6(&world, 5555, 81);
            wanted[13] = 0x22;
            wanted[55..59].fill(0);
            let crc = crc32c(&wanted).to_be_bytes();
            wanted[55..59].copy_from_slice(&crc);
            assert_eq!(header, wanted);
        } else {
            assert_eq!(header, expected(&world, 5555, 0x12, 81));
        }
        assert_eq!(hear.recv().unwrap(), b"two", "{to}");
    }
}

#[test]
fn nginx_and_haproxy_learn_the_client_from_the_header_and_health_checks_bring_one_of_their_own() {
    let checks = format!("protocol = \"http\", path = \"/up\", {CHECKED}");
    // Port 80 leads to the servers' IPv4 addresses, port 81 to their IPv6 ones.
    let mut world = World::dualstack(&proxied6("", &checks), &ENDS);
    let dir = world.dir.path().to_owned();
    let nginx = dir.join("nginx.conf");
    let place = dir.display();
    let log = "'$proxy_protocol_addr:$proxy_protocol_port $proxy_protocol_server_addr:$proxy_protocol_server_port $uri'";
    std::fs::write(dir.join("index.html"), "nginx").unwrap();
    std::fs::write(dir.join("up"), "").unwrap();
    std::fs::write(dir.join("large"), bytes(9, MUCH)).unwrap();
    std::fs::write(
        &nginx,
        format!(
            "daemon off; master_process off; pid {place}/pid; error_log stderr error; events {{}} http {{ \
             log_format who {log}; access_log {place}/who.log who; client_body_temp_path {place}/1; proxy_temp_path {place}/2; \
             fastcgi_temp_path {place}/3; uwsgi_temp_path {place}/4; scgi_temp_path {place}/5; \
             server {{ listen 8080 proxy_protocol; listen [::]:8080 proxy_protocol; root {place}; location /take {{ \
             client_max_body_size 0; client_body_in_file_only on; proxy_pass http://127.0.0.1:8081; }} }} \
             server {{ listen 127.0.0.1:8081; location / {{ client_max_body_size 0; return 200 taken; }} }} }}"
        ),
    )
    .unwrap();
    let haproxy = dir.join("haproxy.conf");
    std::fs::write(
        &haproxy,
        "defaults\n mode http\n timeout client 20s\n timeout server 20s\n timeout connect 5s\nfrontend f\n bind :::8080 v4v6 accept-proxy\n \
         http-request return status 200 content-type text/plain lf-string \"haproxy %[src]:%[src_port] %[dst]:%[dst_port]\"\n",
    )
    .unwrap();
    world.shell("t1", "ip link set lo up");
    world.spawn("t1", "nginx", &["-c", &nginx.display().to_string()]);
    world.spawn("t2", "haproxy", &["-db", "-f", &haproxy.display().to_string()]);
    eventually("all targets are healthy, which takes a header", || {
        world.json("targets").as_array()?.iter().all(|it| it["state"] == "healthy").then_some(())
    });
    for (number, to) in ["10.0.9.9:80"].into_iter().chain(WIDE).enumerate() {
        let (host, listener) = to.rsplit_once(':').unwrap();
        let client = if host.starts_with('[') { "fd00::5" } else { "10.0.1.5" };
        let server = host.trim_matches(['[', ']']);
        let (mut by_nginx, mut by_haproxy) = (false, false);
        let first = 42000 + u16::try_from(number).unwrap() * 100;
        for port in first..first + 20 {
            let line = format!("curl -gsSf --max-time 5 --local-port {port} http://{to}/");
            match world.shell("ca", &line).as_str() {
                "nginx" => {
                    let line = format!("{client}:{port} {server}:{listener} /index.html");
                    eventually("nginx has logged the client", || {
                        std::fs::read_to_string(dir.join("who.log")).unwrap().contains(&line).then_some(())
                    });
                    by_nginx = true;
                }
                other => {
                    assert_eq!(other, format!("haproxy {client}:{port} {server}:{listener}"));
                    by_haproxy = true;
                }
            }
        }
        assert!(by_nginx && by_haproxy, "both were reached by {to}");
        nginx_gives_and_takes(&world, to);
    }
}

/// Megabytes, each way, of which nginx and the client have every byte.
fn nginx_gives_and_takes(world: &World, to: &str) {
    let (dir, sent) = (world.dir.path(), bytes(9, MUCH));
    let got = dir.join("got");
    let place = dir.display();
    let fetched = (0..20).any(|_| {
        world.shell("ca", &format!("curl -gsSf --max-time 20 -o {place}/got http://{to}/large"));
        std::fs::read(&got).unwrap() == sent
    });
    assert!(fetched, "the file by {to}");
    let taken = (0..20).any(|_| {
        let line = format!(
            "curl -gsS --max-time 20 -H Expect: --data-binary @{place}/large http://{to}/take || true"
        );
        world.shell("ca", &line) == "taken"
    });
    assert!(taken, "nginx was sent the file by {to}");
    let bodies = std::fs::read_dir(dir.join("1")).unwrap().map(|entry| entry.unwrap().path());
    let bodies: Vec<_> = bodies.collect();
    assert!(bodies.iter().all(|body| std::fs::read(body).unwrap() == sent), "{to}: {bodies:?}");
    assert!(!bodies.is_empty());
    bodies.iter().for_each(|body| std::fs::remove_file(body).unwrap());
}

#[test]
fn haproxy_takes_the_header_off_and_has_every_byte_of_megabytes_both_ways_behind_it() {
    for hook in ["xdp", "tcx"] {
        let mut world = World::dualstack(&proxied6(&format!("hook = \"{hook}\"\n"), UNCHECKED), &ENDS);
        let file = world.dir.path().join("haproxy.conf");
        std::fs::write(
            &file,
            "defaults\n mode tcp\n timeout client 30s\n timeout server 30s\n timeout connect 5s\n\
             listen l\n bind :::8080 v4v6 accept-proxy\n server s 127.0.0.1:8081\n",
        )
        .unwrap();
        for target in ["t1", "t2"] {
            world.shell(target, "ip link set lo up");
            world.spawn(target, "haproxy", &["-db", "-f", &file.display().to_string()]);
            eventually("HAProxy listens", || {
                (!world.shell(target, "ss -Hltn sport = :8080").is_empty()).then_some(())
            });
        }
        // A header that was left before the first byte would be one of those that are compared.
        serve_at(&world, "127.0.0.1:8081", 0);
        for to in [ENDPOINT].into_iter().chain(WIDE) {
            world.thread("ca", move || converse_with(to, 0)).join().unwrap();
        }
    }
}

/// Whether a socket of this namespace has bytes to send and may not: its peer's window is zero, and says so when it is asked again and
/// again, in ever longer intervals.
fn is_stalled(world: &World, name: &str) -> bool {
    let told = world.shell(name, "ss -Htnoi state connected");
    let (asks, backoff) = (told.contains("timer:(persist,"), told.split_once("backoff:"));
    let backoff = backoff.and_then(|(_, rest)| rest.split_whitespace().next()?.parse::<u32>().ok());
    // The last part of a timer is how many questions no one has answered.
    asks && told.contains(",0)") && backoff.is_some_and(|backoff| backoff >= 2)
}

/// Waits to be told to go on.
type Gate = std::sync::mpsc::Receiver<()>;

/// A server with little room that reads `header` bytes, stops until it may go on, says what it has read, and sends as much back.
fn reluctant(world: &World, header: usize, gate: Gate) -> std::thread::JoinHandle<Vec<u8>> {
    let (ready, is_ready) = std::sync::mpsc::channel();
    let server = world.thread("t1", move || {
        let listener = TcpListener::bind("[::]:8080").unwrap();
        nix::sys::socket::setsockopt(&listener, nix::sys::socket::sockopt::RcvBuf, &4096).unwrap();
        ready.send(()).unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        let mut first = vec![0; header];
        stream.read_exact(&mut first).unwrap();
        gate.recv().unwrap();
        let mut read = Vec::new();
        stream.read_to_end(&mut read).unwrap();
        stream.write_all(&hash(&read).to_le_bytes()).unwrap();
        stream.write_all(&bytes(7, SOME)).unwrap();
        first
    });
    is_ready.recv().unwrap();
    server
}

/// More than buffers hold.
const SOME: usize = 4 << 20;

/// Sends as much as it can at once, and stops before it reads what comes back until it may.
fn patient(world: &World, to: &'static str, gate: Gate) -> std::thread::JoinHandle<u16> {
    world.thread("ca", move || {
        let (mut stream, sent) = (connect(to), bytes(3, SOME));
        stream.write_all(&sent).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        gate.recv().unwrap();
        let mut heard = [0; 8];
        stream.read_exact(&mut heard).unwrap();
        assert_eq!(u64::from_le_bytes(heard), hash(&sent), "what the server has read, {to}");
        let mut back = Vec::new();
        stream.read_to_end(&mut back).unwrap();
        assert!(back == bytes(7, SOME), "{} bytes came back, of {SOME}, {to}", back.len());
        stream.local_addr().unwrap().port()
    })
}

/// A connection that stands still for a while each way, since nobody reads. Returns the header, and the client's port.
fn stall(world: &World, to: &'static str, header: usize) -> (Vec<u8>, u16) {
    let ((may_read, server_gate), (may_hear, client_gate)) =
        (std::sync::mpsc::channel(), std::sync::mpsc::channel());
    let server = reluctant(world, header, server_gate);
    let client = patient(world, to, client_gate);
    eventually("the server's window is zero", || is_stalled(world, "ca").then_some(()));
    may_read.send(()).unwrap();
    eventually("the client's window is zero", || is_stalled(world, "t1").then_some(()));
    may_hear.send(()).unwrap();
    (server.join().unwrap(), client.join().unwrap())
}

#[test]
fn who_stops_reading_until_the_window_is_zero_and_then_reads_on_has_every_byte() {
    for extra in each_hook() {
        let headers = if extra.contains("always") { &[100, 0][..] } else { &[100] };
        for header in headers.iter().copied() {
            let config = if header == 0 { dualstack(&extra, UNCHECKED) } else { proxied6(&extra, UNCHECKED) };
            let config = config
                .replace(r#", { address = "10.0.1.22", zone = "a" }"#, "")
                .replace(r#", { address = "fd00::22", zone = "a" }"#, "");
            let world = World::dualstack(&config, &ENDS);
            world.shell("ca", "sysctl -qw net.ipv4.tcp_rmem='4096 8192 8192'");
            for to in [ENDPOINT, "[fd00::99]:80"] {
                let (read, port) = stall(&world, to, header);
                let wanted = match (header, to) {
                    (0, _) => Vec::new(),
                    (_, ENDPOINT) => expected(&world, port, 0x11, 80),
                    _ => expected6(&world, port, 80),
                };
                assert_eq!(read, wanted, "{extra} {to}");
            }
            let cookies = count(&world, "shop syn_cookie") + count(&world, "shop6 syn_cookie");
            assert_eq!(cookies, if extra.contains("always") { 2 } else { 0 }, "{extra}");
        }
    }
}

#[test]
fn the_first_datagram_of_a_flow_brings_the_header_and_the_others_do_not() {
    let world = World::new(&proxied("", UNCHECKED));
    let hear = answer(&world, "0.0.0.0:8080");
    world
        .thread("ca", || {
            let socket = std::net::UdpSocket::bind("0.0.0.0:5555").unwrap();
            socket.connect("10.0.9.9:53").unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            for message in ["one", "two", "three"] {
                socket.send(message.as_bytes()).unwrap();
                socket.recv(&mut [0; 64]).unwrap();
            }
        })
        .join()
        .unwrap();
    assert_eq!(hear.recv().unwrap(), [expected(&world, 5555, 0x12, 53), b"one".to_vec()].concat());
    assert_eq!(hear.recv().unwrap(), b"two");
    assert_eq!(hear.recv().unwrap(), b"three");
}
