//! XDP, TCX, and both at once, over ordinary veths.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests: a panic with its place is what is wanted")]

use nix::sys::socket::sockopt::{RcvBuf, UdpGsoSegment};
use privatelink_tests::capture::{self, Capture};
use privatelink_tests::world::{CHECKED, UNCHECKED, World, binary, config, dualstack, eventually};
use serde_json::Value;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

/// The usual configuration, of an agent that leaves other ends alone.
fn plain(extra: &str) -> String {
    config(extra, UNCHECKED).replace("manage_peer_offloads = true", "")
}

fn rows(world: &World) -> Vec<Value> {
    world.json("status")[0]["interfaces"].as_array().unwrap().clone()
}

/// Hook and mode of an interface.
fn hook_of(world: &World, name: &str) -> String {
    let row = rows(world).into_iter().find(|row| row["interface"] == name).unwrap();
    format!("{} {}", row["hook"].as_str().unwrap_or("-"), row["mode"].as_str().unwrap_or("-"))
}

fn hooks(world: &World) -> Vec<String> {
    ["ca", "cb", "t1", "t2"].map(|name| hook_of(world, name)).into()
}

/// `length` bytes that repeat nowhere near.
fn noise(length: usize, mut seed: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        bytes.extend(seed.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Lets the targets send back what they get, each connection as a whole.
fn mirror(world: &World) {
    mirror_at(world, "0.0.0.0:8080");
}

fn mirror_at(world: &World, address: &'static str) {
    for target in ["t1", "t2"] {
        let (ready, is_ready) = std::sync::mpsc::channel();
        world.thread(target, move || {
            let listener = TcpListener::bind(address).unwrap();
            ready.send(()).unwrap();
            for stream in listener.incoming().take(1000).flatten() {
                std::thread::spawn(move || {
                    let (mut stream, mut all) = (stream, Vec::new());
                    stream.read_to_end(&mut all).unwrap();
                    stream.write_all(&all).unwrap();
                });
            }
        });
        is_ready.recv().unwrap();
    }
}

/// Sends bytes there and gets them back.
fn there_and_back(world: &World, consumer: &str, length: usize) {
    there_and_back_by(world, consumer, "10.0.9.9:80", length);
}

fn there_and_back_by(world: &World, consumer: &str, address: &'static str, length: usize) {
    let worker = world.thread(consumer, move || {
        let sent = noise(length, 0x9e37_79b9_7f4a_7c15);
        let patience = Duration::from_secs(20);
        let mut stream = TcpStream::connect_timeout(&address.parse().unwrap(), patience).unwrap();
        stream.set_read_timeout(Some(patience)).unwrap();
        stream.set_write_timeout(Some(patience)).unwrap();
        stream.write_all(&sent).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut got = Vec::new();
        stream.read_to_end(&mut got).unwrap();
        assert!(got == sent, "{} bytes came back of {length}, or others", got.len());
    });
    worker.join().unwrap();
}

fn endpoint(world: &World, name: &str, count: &str) -> u64 {
    let rows = world.json("endpoints");
    rows.as_array().unwrap().iter().find(|row| row["endpoint"] == name).unwrap()[count].as_u64().unwrap()
}

/// What an endpoint's address with this port has counted of what went to the provider.
fn of_address(world: &World, address: &str, what: &str) -> u64 {
    let (address, rows) = (address.parse::<SocketAddr>().unwrap().ip().to_string(), world.json("endpoints"));
    let of = |row: &&Value| row["endpoint"] == "shop" && row["address"] == address;
    rows.as_array().unwrap().iter().find(of).unwrap()[format!("to_provider_{what}")].as_u64().unwrap()
}

#[test]
fn ordinary_veths_carry_files_both_ways_by_tcx_with_no_setting_at_all_and_count_what_is_on_the_wire() {
    const LENGTH: u64 = 32 << 20;
    let mut world = World::bare(&plain(""));
    world.start(&[]);
    assert_eq!(hooks(&world), ["tcx -"; 4]);
    mirror(&world);
    there_and_back(&world, "ca", LENGTH.try_into().unwrap());
    for way in ["to_provider", "to_consumer"] {
        let packets = endpoint(&world, "shop", &format!("{way}_packets"));
        let bytes = endpoint(&world, "shop", &format!("{way}_bytes"));
        assert!((LENGTH..LENGTH * 11 / 10).contains(&bytes), "{way}: {bytes} bytes for {LENGTH}");
        assert!(
            (bytes / 1514..bytes / 1000).contains(&packets),
            "{way}: {packets} packets for {bytes} bytes"
        );
    }
    let features = world.shell("ca", "ethtool -k eth0");
    assert!(features.contains("tx-checksumming: on") && features.contains("tcp-segmentation-offload: on"));
}

#[test]
fn ordinary_veths_carry_files_both_ways_by_tcx_over_ipv6_and_between_the_families() {
    const LENGTH: usize = 16 << 20;
    let config = dualstack("", UNCHECKED).replace("manage_peer_offloads = true", "");
    let world = World::dualstack(&config, &["ca", "cb", "t1", "t2"]);
    assert_eq!(hooks(&world), ["tcx -"; 4]);
    mirror_at(&world, "[::]:8080");
    // Two tenants, of one address; two families on either side.
    for consumer in ["ca", "cb"] {
        for address in ["10.0.9.9:80", "10.0.9.9:81", "[fd00::99]:80", "[fd00::99]:81"] {
            there_and_back_by(&world, consumer, address, LENGTH);
        }
    }
    for address in ["10.0.9.9", "fd00::99"] {
        let (bytes, rows) = (2 * LENGTH as u64, world.json("endpoints"));
        let of = |row: &&Value| row["endpoint"] == "shop" && row["address"] == address;
        let row = rows.as_array().unwrap().iter().find(of).unwrap();
        for way in ["to_provider", "to_consumer"] {
            let count = |what| row[format!("{way}_{what}")].as_u64().unwrap();
            assert!((bytes..bytes * 11 / 10).contains(&count("bytes")), "{address} {way}: {row}");
            assert!(count("packets") > bytes / 1514, "{address} {way}: segments count, not frames: {row}");
        }
    }
    let features = world.shell("ca", "ethtool -k eth0");
    assert!(features.contains("tx-checksumming: on") && features.contains("tcp-segmentation-offload: on"));

    for target in ["t1", "t2"] {
        let (ready, is_ready) = std::sync::mpsc::channel();
        world.thread(target, move || {
            let (socket, mut bytes) = (UdpSocket::bind("[::]:8080").unwrap(), [0; 2048]);
            ready.send(()).unwrap();
            while let Ok((length, from)) = socket.recv_from(&mut bytes) {
                socket.send_to(&bytes[..length], from).unwrap();
            }
        });
        is_ready.recv().unwrap();
    }
    for (own, address) in [("0.0.0.0:0", "10.0.9.9:81"), ("[::]:0", "[fd00::99]:81")] {
        let worker = world.thread("ca", move || {
            let (socket, mut got) = (UdpSocket::bind(own).unwrap(), [0; 2048]);
            socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            socket.connect(address).unwrap();
            for length in [0, 1, 1200, 1440] {
                let sent = noise(length, 7);
                socket.send(&sent).unwrap();
                let length = socket.recv(&mut got).unwrap();
                assert!(got[..length] == sent, "{length} bytes from {address}");
            }
        });
        worker.join().unwrap();
    }
}

/// Puts down what datagrams come to both targets, in their order at each.
fn note_datagrams(world: &World) -> Receiver<Vec<u8>> {
    let (heard, hear) = channel();
    for target in ["t1", "t2"] {
        let ((ready, is_ready), heard) = (channel(), heard.clone());
        world.thread(target, move || {
            let (socket, mut bytes) = (UdpSocket::bind("[::]:8080").unwrap(), [0; 2048]);
            nix::sys::socket::setsockopt(&socket, RcvBuf, &(1 << 20)).unwrap();
            ready.send(()).unwrap();
            while let Ok(length) = socket.recv(&mut bytes) {
                if heard.send(bytes[..length].to_vec()).is_err() {
                    return;
                }
            }
        });
        is_ready.recv().unwrap();
    }
    hear
}

#[test]
fn datagrams_that_a_socket_leaves_to_its_device_to_cut_arrive_each_as_it_is_and_count_as_so_many() {
    let world = World::new(&plain(""));
    leave_to_device(&world, &note_datagrams(&world), "10.0.9.9:53", 42);
    let world = World::dualstack(
        &dualstack("", UNCHECKED).replace("manage_peer_offloads = true", ""),
        &["ca", "cb", "t1", "t2"],
    );
    let hear = note_datagrams(&world);
    leave_to_device(&world, &hear, "[fd00::99]:81", 62);
    leave_to_device(&world, &hear, "10.0.9.9:81", 62);
}

/// Sends much at once from a socket that is to cut it into datagrams, of which each has headers of so many bytes when it leaves.
fn leave_to_device(world: &World, hear: &Receiver<Vec<u8>>, address: &'static str, header: u64) {
    const SIZE: usize = 1200;
    const COUNT: usize = 40;
    assert_eq!(hooks(world), ["tcx -"; 4]);
    let path = capture::file(world).display().to_string();
    let capture = Capture::start(world, &["--write", &path, "--protocol", "udp"]);
    let before = ["packets", "bytes"].map(|what| of_address(world, address, what));
    let sent = noise(COUNT * SIZE + 500, 11);
    let all = sent.clone();
    let send = move || {
        let own = if address.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" };
        let socket = UdpSocket::bind(own).unwrap();
        nix::sys::socket::setsockopt(&socket, UdpGsoSegment, &i32::try_from(SIZE).unwrap()).unwrap();
        socket.connect(address).unwrap();
        // The first one of a flow that a target is to be chosen for, and one that belongs to a flow.
        (0..2).for_each(|_| assert_eq!(socket.send(&all).unwrap(), all.len()));
    };
    world.thread("ca", send).join().unwrap();
    for number in 0..2 {
        for part in sent.chunks(SIZE) {
            let got = hear.recv_timeout(Duration::from_secs(10));
            let got = got.unwrap_or_else(|_| panic!("{address}: {}", world.json("drops")));
            assert!(got == part, "{address} {number}: {} bytes of {}", got.len(), part.len());
        }
    }
    let (packets, bytes) = (2 * (COUNT as u64 + 1), 2 * sent.len() as u64);
    let [before_packets, before_bytes] = before;
    assert_eq!(of_address(world, address, "packets") - before_packets, packets, "{address}");
    assert_eq!(of_address(world, address, "bytes") - before_bytes, bytes + packets * header, "{address}");
    capture.signal("-INT");
    assert!(capture.end().0.success());
    let records = capture::written(world);
    let whole = records.iter().filter(|it| it.segmented && it.length > sent.len());
    assert_eq!(whole.count(), 4, "each send was one frame there, as it came and as it left");
    let features = world.shell("ca", "ethtool -k eth0");
    assert!(features.contains("tx-udp-segmentation: on"), "{features}");
}

#[test]
fn iperf3_and_datagrams_go_through_by_tcx() {
    let one =
        plain("").replace(r#", { address = "10.0.1.22", zone = "a" }"#, "").replace("port = 53", "port = 80");
    let mut world = World::new(&one);
    world.spawn("t1", "iperf3", &["-s", "-p", "8080"]);
    eventually("iperf3 listens", || (!world.shell("t1", "ss -Hltn sport = :8080").is_empty()).then_some(()));
    let run = |line: &str| -> Value { serde_json::from_str(&world.shell("ca", line)).unwrap() };
    for way in ["", "-R"] {
        let tcp = run(&format!("iperf3 -J -c 10.0.9.9 -p 80 -t 1 -C reno {way}"));
        assert!(tcp["end"]["sum_received"]["bytes"].as_u64().unwrap() > 10_000_000, "{tcp}");
    }
    for way in ["", "-R"] {
        let sent = endpoint(&world, "shop", "to_provider_packets");
        let udp = run(&format!("iperf3 -J -u -b 40M -l 1200 -c 10.0.9.9 -p 80 -t 1 {way}"));
        let packets = udp["end"]["sum"]["packets"].as_u64().unwrap();
        assert!(packets > 1000 && udp["end"]["sum"]["lost_percent"].as_f64().unwrap() < 50.0, "{udp}");
        let counted = endpoint(&world, "shop", "to_provider_packets") - sent;
        assert!(way == "-R" || counted >= packets, "{counted} packets for {packets}");
    }
}

#[test]
fn a_checksum_that_the_sender_leaves_to_its_device_is_right_where_a_device_completes_it() {
    let mut world =
        World::bare(&plain("").replace(r#"protocol = "udp", port = 53"#, r#"protocol = "udp", port = 80"#));
    // Whatever leaves by these is completed before, and the far end believes nothing but the sum.
    for name in ["ca", "cb", "t1", "t2"] {
        world.shell("dp", &format!("ethtool -K {name} tx off"));
    }
    world.start(&[]);
    assert_eq!(hooks(&world), ["tcx -"; 4]);
    mirror(&world);
    there_and_back(&world, "ca", 4 << 20);
    let (ready, is_ready) = std::sync::mpsc::channel();
    for target in ["t1", "t2"] {
        let ready = ready.clone();
        world.thread(target, move || {
            let socket = std::net::UdpSocket::bind("0.0.0.0:8080").unwrap();
            ready.send(()).unwrap();
            let mut message = [0; 2048];
            for _ in 0..1000 {
                let Ok((length, from)) = socket.recv_from(&mut message) else { return };
                socket.send_to(&message[..length], from).unwrap();
            }
        });
    }
    is_ready.iter().take(2).for_each(drop);
    let echoed = world.thread("cb", || {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.connect("10.0.9.9:80").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let round = |length: &usize| {
            let (sent, mut got) = (noise(*length, 7), [0; 2048]);
            socket.send(&sent).unwrap();
            socket.recv(&mut got).is_ok_and(|received| got[..received] == sent[..])
        };
        (0..200).filter(round).count()
    });
    assert_eq!(echoed.join().unwrap(), 200);
    let none = plain("")
        .replace(r#"{ address = "10.0.1.21", zone = "a" }, { address = "10.0.1.22", zone = "a" }"#, "");
    let (code, said) = world.apply(&none);
    assert_eq!(code, Some(0), "{said}");
    let refused = world.shell("ca", "curl -sS --max-time 5 http://10.0.9.9/ 2>&1 || true");
    assert!(refused.contains("(7)"), "a RST comes at once: {refused}");
}

/// Makes a far end fit for XDP.
fn prepare(world: &World, name: &str) {
    world.shell(name, "ethtool -K eth0 gro on tx off");
}

#[test]
fn xdp_is_left_aloud_where_it_would_lose_what_it_sends_to_an_ordinary_veth_and_taken_up_when_that_hears() {
    let mixed =
        plain("").replace(r#"interfaces = ["ca"]"#, r#"interfaces = [{ name = "ca", hook = "xdp" }]"#);
    let mut world = World::bare(&mixed);
    prepare(&world, "ca");
    prepare(&world, "cb");
    world.serve("t1");
    world.serve("t2");
    world.start(&[]);
    assert_eq!(hooks(&world), ["tcx -"; 4]);
    let said = world.said();
    assert!(
        said.contains("ca is attached by TCX, though its hook is xdp: t1 does not take what XDP"),
        "{said}"
    );
    for consumer in ["ca", "cb"] {
        assert!(["t1", "t2"].contains(&&*world.fetch(consumer, "")));
    }
    // With GRO, they hear what XDP redirects; what they send has unfinished checksums still.
    let long = "curl -sSf --max-time 60 --limit-rate 4M http://10.0.9.9/large | cksum";
    let long = ["ca", "cb"].map(|consumer| world.beside(consumer, "sh", &["-c", long]));
    eventually("the transfers run", || (world.json("flows").as_array()?.len() >= 2).then_some(()));
    for target in ["t1", "t2"] {
        world.shell(target, "ethtool -K eth0 gro on");
    }
    let both = ["xdp native", "xdp native", "tcx -", "tcx -"];
    eventually("the consumers' side runs XDP", || (hooks(&world) == both).then_some(()));
    for consumer in ["ca", "cb"] {
        assert!(["t1", "t2"].contains(&&*world.fetch(consumer, "")), "by XDP there, by TCX back");
    }
    for target in ["t1", "t2"] {
        world.shell(target, "ethtool -K eth0 gro off");
    }
    eventually("all are back", || (hooks(&world) == ["tcx -"; 4]).then_some(()));
    let sums: Vec<String> = long.into_iter().map(|it| it.join().unwrap()).collect();
    let whole = world.shell("t1", &format!("cksum < {}/t1/large", world.dir.path().display()));
    assert!(sums.iter().all(|sum| *sum == whole), "{sums:?} of {whole}");
}

#[test]
fn interfaces_change_their_hook_and_keep_their_connections() {
    let hooked = |hook: &str| format!("hook = \"{hook}\"\n{}", config("", UNCHECKED));
    let mut world = World::new(&hooked("xdp"));
    world.serve("t1");
    world.serve("t2");
    let long = "curl -sSf --max-time 60 --limit-rate 3M http://10.0.9.9/large | cksum";
    let long = ["ca", "ca", "cb"].map(|consumer| world.beside(consumer, "sh", &["-c", long]));
    eventually("the transfers run", || (world.json("flows").as_array()?.len() >= 3).then_some(()));
    let look = |world: &World, mode: &str| {
        assert_eq!(hooks(world), [mode; 4]);
        let pins: Vec<_> = std::fs::read_dir(world.pins().join("links")).unwrap().collect();
        assert_eq!(pins.len(), 5, "one for each, and the stack's: {pins:?}");
        assert!(["t1", "t2"].contains(&&*world.fetch("cb", "")));
    };
    for (hook, mode) in [("tcx", "tcx -"), ("xdp", "xdp native")] {
        let (code, said) = world.apply(&hooked(hook));
        assert_eq!(code, Some(0), "{said}");
        assert!(said.contains("hook") && said.contains("for ca"), "{said}");
        look(&world, mode);
    }
    world.kill_agent();
    std::fs::write(world.config(), hooked("tcx")).unwrap();
    world.start(&[]);
    look(&world, "tcx -");
    let links = world.shell("dp", "bpftool link");
    let program = world.json("status")[0]["programs"][1]["id"].as_u64().unwrap();
    assert_eq!(links.matches(&format!("prog {program} ")).count(), 4, "{links}");
    assert_eq!(world.json("status")[0]["agent"]["adopted"], true);
    assert!(world.json("flows").as_array().unwrap().len() >= 3, "the transfers still run");
    let sums: Vec<String> = long.into_iter().map(|it| it.join().unwrap()).collect();
    let whole = world.shell("t1", &format!("cksum < {}/t1/large", world.dir.path().display()));
    assert!(sums.iter().all(|sum| *sum == whole), "{sums:?} of {whole}");
    assert_eq!(world.stop(), Some(0));
    world.privatelink(&["detach"]);
    eventually("nothing holds the program", || {
        let shown = world.shell("dp", &format!("bpftool prog show id {program} 2>&1 || true"));
        (!shown.contains("ingress_tcx")).then_some(())
    });
}

#[test]
fn health_checks_go_by_tcx_where_the_targets_are_ordinary_veths() {
    let mut world = World::new(&config("", CHECKED).replace("manage_peer_offloads = true", ""));
    let states = |world: &World| -> Vec<String> {
        let targets = world.json("targets");
        targets.as_array().unwrap().iter().map(|it| it["state"].as_str().unwrap().to_owned()).collect()
    };
    let first = world.serve("t1");
    world.serve("t2");
    eventually("both are healthy", || (states(&world) == ["healthy", "healthy"]).then_some(()));
    let of_stack: Vec<_> = rows(&world)
        .into_iter()
        .filter(|row| row["interface"].as_str().unwrap().starts_with("pls"))
        .collect();
    assert!(of_stack.len() == 1 && of_stack[0]["hook"] == "tcx", "{of_stack:?}");
    world.kill(first);
    eventually("one is not", || (states(&world) == ["unhealthy", "healthy"]).then_some(()));
    let told = world.privatelink(&["explain", "--from", "shop", "tcp", "10.0.1.5:40001", "10.0.9.9:80"]);
    let told = String::from_utf8_lossy(&told.stdout).into_owned();
    assert!(told.contains("forwarded: 10.0.1.10:") && told.contains("by t2"), "{told}");
}

#[test]
fn what_is_not_ours_goes_on_to_the_next_program_at_the_hook_and_what_is_does_not() {
    let mut world = World::new(&plain(""));
    world.serve("t1");
    world.serve("t2");
    // Another agent, for which all of it is strange.
    let (dir, pins) = (world.dir.path().join("next"), format!("{}-next", world.pins().display()));
    std::fs::create_dir(&dir).unwrap();
    let config = dir.join("next.toml");
    let vpc =
        "account = \"111122223333\"\ncidrs = [\"10.0.0.0/16\"]\ninterfaces = [\"ca\"]\nhook = \"tcx\"\n";
    std::fs::write(&config, format!("[vpcs.next]\n{vpc}")).unwrap();
    let places = ["--runtime-dir".into(), dir.display().to_string(), "--pin-dir".into(), pins];
    let run = ["run", "--detach-on-exit", "--config"].map(str::to_owned);
    let run: Vec<_> = run.into_iter().chain([config.display().to_string()]).chain(places.clone()).collect();
    let run: Vec<_> = run.iter().map(String::as_str).collect();
    let agent = world.spawn("dp", &binary().display().to_string(), &run);
    let next = |arguments: &[&str]| {
        let output = world.inside("dp", binary()).args(arguments).args(&places).output().unwrap();
        serde_json::from_slice::<Value>(&output.stdout).ok()
    };
    eventually("the other agent is attached", || {
        (next(&["status", "--json"])?[0]["interfaces"][0]["hook"] == "tcx").then_some(())
    });
    let passed = || {
        let status = next(&["status", "--json"]).unwrap();
        let outcomes = status[0]["outcomes"].as_array().unwrap().clone();
        let rows = outcomes.iter().filter(|row| row["outcome"] == "passed");
        rows.map(|row| row["packets"].as_u64().unwrap()).sum::<u64>()
    };
    let before = passed();
    assert!(!world.fetch("ca", "").is_empty());
    assert_eq!(passed(), before, "what is ours does not come to it");
    world.shell("ca", "ip neigh add 10.0.1.77 lladdr 02:00:00:00:00:77 dev eth0 nud permanent");
    let strange = world.thread("ca", || {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        (0..3).filter(|_| socket.send_to(b"strange", "10.0.1.77:7").is_ok()).count()
    });
    assert_eq!(strange.join().unwrap(), 3);
    eventually("what is not ours comes to it", || (passed() >= before + 3).then_some(()));
    let pid = world.pid(agent).to_string();
    assert!(std::process::Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    assert!(world.finished(agent), "it takes its own away");
    assert!(!world.fetch("ca", "").is_empty(), "and leaves ours");
}

#[test]
fn an_interface_that_cannot_run_xdp_is_attached_otherwise_and_who_sends_to_it_by_tcx_until_it_is_gone() {
    for (hook, expected, said) in [
        ("auto", "tcx -", "bridge is attached by TCX: its driver cannot run XDP"),
        ("xdp", "xdp generic", "bridge runs XDP in generic mode, which is slower"),
    ] {
        let usual = config("", UNCHECKED);
        let bridge = format!("interfaces = [{{ name = \"bridge\", hook = \"{hook}\" }}]");
        let mut world = World::bare(&usual.replace("interfaces = [\"ca\"]", &bridge));
        let line = "ip link add bridge type bridge forward_delay 0 && ip link set bridge up promisc on && ip link set ca master bridge";
        world.shell("dp", line);
        world.shell("ca", "ethtool -K eth0 tx off");
        world.serve("t1");
        world.serve("t2");
        world.start(&[]);
        let now = |world: &World| ["bridge", "cb", "t1", "t2"].map(|name| hook_of(world, name));
        assert_eq!(now(&world), [expected, "xdp native", "tcx -", "tcx -"]);
        assert!(world.said().contains(said), "{}", world.said());
        assert!(world.said().contains("t1 is attached by TCX: bridge does not take"), "{}", world.said());
        for consumer in ["ca", "cb"] {
            assert!(!world.fetch(consumer, "").is_empty());
        }
        world.kill_agent();
        world.start(&[]);
        assert!(!world.fetch("ca", "").is_empty(), "adopted as it was");
        let (code, said) = world.apply(&usual.replace("interfaces = [\"ca\"]", "interfaces = []"));
        assert_eq!(code, Some(0), "{said}");
        assert_eq!([hook_of(&world, "t1"), hook_of(&world, "t2")], ["xdp native"; 2]);
        assert!(!world.fetch("cb", "").is_empty());
    }
}

#[test]
fn jumbo_frames_of_9000_bytes_go_through_by_either_hook_and_are_no_more_than_that() {
    const LENGTH: u64 = 32 << 20;
    for (hook, mode) in [("xdp", "xdp native"), ("tcx", "tcx -")] {
        let mut world = World::bare(&format!("hook = \"{hook}\"\n{}", config("", UNCHECKED)));
        for name in ["ca", "cb", "t1", "t2"] {
            world.shell("dp", &format!("ip link set {name} mtu 9000"));
            world.shell(name, "ip link set eth0 mtu 9000");
        }
        world.start(&[]);
        assert_eq!(hooks(&world), [mode; 4]);
        mirror(&world);
        there_and_back(&world, "ca", LENGTH.try_into().unwrap());
        for way in ["to_provider", "to_consumer"] {
            let packets = endpoint(&world, "shop", &format!("{way}_packets"));
            let bytes = endpoint(&world, "shop", &format!("{way}_bytes"));
            assert!((LENGTH..LENGTH * 11 / 10).contains(&bytes), "{hook} {way}: {bytes} bytes for {LENGTH}");
            assert!(
                (bytes / 9014..bytes / 4000).contains(&packets),
                "{hook} {way}: {packets} packets for {bytes} bytes"
            );
        }
    }
}
