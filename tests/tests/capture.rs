//! `privatelink capture` on real traffic: what it writes, what it leaves out, and that nothing of it stays.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests: a panic with its place is what is wanted")]

use privatelink_tests::capture::{self, Capture, file, written};
use privatelink_tests::packet::{Packet, addresses};
use privatelink_tests::pcapng::Record;
use privatelink_tests::world::{UNCHECKED, World, binary, changes, config, dualstack, eventually};
use std::io::{BufRead, BufReader, Read};
use std::process::Command;

fn is_as_before(world: &World) -> bool {
    capture::is_as_before(world, &[])
}

fn is_captured(world: &World) -> bool {
    capture::is_captured(world, &[])
}

/// The usual configuration, where the interfaces whose other ends are `by_tcx` have that hook.
fn mixed(by_tcx: &[&str]) -> String {
    by_tcx.iter().fold(config("", UNCHECKED), |config, name| {
        config.replace(&format!("\"{name}\""), &format!("{{ name = \"{name}\", hook = \"tcx\" }}"))
    })
}

/// TCP over IPv4, and what it carries.
fn segment(record: &Record) -> Option<&[u8]> {
    let bytes = &record.bytes;
    (bytes[12..14] == [8, 0] && bytes[23] == 6).then(|| &bytes[34 + usize::from(bytes[46] >> 4) * 4..])
}

fn served(config: &str) -> World {
    let mut world = World::new(config);
    world.serve("t1");
    world.serve("t2");
    world
}

#[test]
fn a_fragment_that_comes_before_its_first_is_shown_as_held_and_goes_on_while_a_capture_runs() {
    let world = World::new(&config("", UNCHECKED));
    let path = file(&world).display().to_string();
    let capture = Capture::start(&world, &["--write", &path, "--endpoint", "shop", "--count", "2"]);
    assert!(is_captured(&world), "the capture's program is in place");
    let (ready, is_ready) = std::sync::mpsc::channel();
    let target = |name| {
        let ready = ready.clone();
        world.thread(name, move || {
            let socket = std::net::UdpSocket::bind("0.0.0.0:8080").unwrap();
            socket.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
            ready.send(Vec::new()).unwrap();
            let mut message = vec![0; 4096];
            let length = socket.recv(&mut message).unwrap_or(0);
            message.truncate(length);
            let _ = ready.send(message);
        })
    };
    let _targets = [target("t1"), target("t2")];
    (0..2).for_each(|_| assert!(is_ready.recv().unwrap().is_empty()));
    let sent = Packet { payload: vec![7; 2000], fragment: 0, ..Packet::udp() };
    let bytes = sent.build()[34..].to_vec();
    let part = |fragment, bytes: &[u8]| Packet { fragment, ..sent.clone() }.ipv4(bytes);
    let frames = [part(172, &bytes[1376..]), part(0x2000, &bytes[..1376])];
    let send = move || {
        let interface = pnet_datalink::interfaces().into_iter().find(|it| it.name == "eth0").unwrap();
        let channel = pnet_datalink::channel(&interface, pnet_datalink::Config::default());
        let Ok(pnet_datalink::Channel::Ethernet(mut sender, _)) = channel else { panic!("no channel") };
        frames.iter().for_each(|frame| sender.send_to(frame, None).unwrap().unwrap());
    };
    world.thread("ca", send).join().unwrap();
    assert_eq!(is_ready.recv().unwrap(), sent.payload, "it arrives whole");
    let (status, said) = capture.end();
    assert!(status.success(), "{said}");
    let records = written(&world);
    let comments: Vec<_> = records.iter().map(|it| it.comment.as_str()).collect();
    assert_eq!(comments.len(), 3, "one as it came, and one as it came and as it left: {comments:?}");
    assert!(comments[0].contains("fragment_early: held"), "{comments:?}");
    assert!(comments[1..].iter().all(|it| it.contains("forwarded")), "{comments:?}");
}

#[test]
fn a_capture_has_packets_as_they_came_and_as_they_left_with_the_verdict_and_not_those_of_another_tenant() {
    let world = served(&config("", UNCHECKED));
    let path = file(&world).display().to_string();
    let capture = Capture::start(&world, &["--write", &path, "--endpoint", "shop"]);
    assert!(is_captured(&world), "the capture's program is in place");
    world.shell("cb", "curl -sS --max-time 5 --local-port 40000 http://10.0.9.9/");
    let target = world.shell("ca", "curl -sS --max-time 5 --local-port 40000 http://10.0.9.9/");
    world.shell("ca", "curl -sS --max-time 1 --local-port 40001 http://10.0.9.9:81/ || true");
    world.shell(
        "ca",
        "curl -sS --max-time 1 --local-port 40002 -X POST telnet://10.0.9.9:80 </dev/null || true",
    );
    capture.signal("-INT");
    let (status, said) = capture.end();
    assert!(status.success() && said.starts_with("captured "), "{status} {said}");
    assert!(is_as_before(&world), "the agent's program is back when the capture has ended");

    let records = written(&world);
    let of_bank = records.iter().any(|it| it.interface == "cb" || it.comment.contains("bank"));
    assert!(!of_bank, "{records:?}");
    let (client, endpoint, balancer) = ([10, 0, 1, 5], [10, 0, 9, 9], [10, 0, 1, 10]);
    let tcp: Vec<_> = records.iter().filter(|it| it.bytes[12..14] == [8, 0]).collect();
    let at = tcp
        .iter()
        .position(|it| addresses(&it.bytes) == (client, 40000, endpoint, 80) && it.bytes[47] == 2)
        .expect("the SYN as it came");
    let (came, left) = (tcp[at], tcp[at + 1]);
    let (from, nat, to, port) = addresses(&left.bytes);
    assert_eq!((from, port), (balancer, 8080), "the SYN as it left");
    assert_eq!((came.interface.as_str(), came.outbound), ("ca", false));
    assert_eq!((left.interface.as_str(), left.outbound), (target.as_str(), true));
    assert!(came.bytes.len() == came.length && came.length == left.length, "{came:?} {left:?}");
    // Options and payload are as they were.
    assert_eq!(came.bytes[54..], left.bytes[54..]);
    for record in [came, left] {
        let expected = format!("target web/10.0.1.{}:8080", if target == "t1" { 21 } else { 22 });
        assert!(record.comment.starts_with("forwarded") && record.comment.ends_with(&expected), "{record:?}");
        assert!(record.comment.contains("vpc shop, endpoint shop/a"), "{record:?}");
    }
    let answer = tcp
        .iter()
        .find(|it| addresses(&it.bytes) == (to, 8080, balancer, nat))
        .expect("the answer as it came");
    assert_eq!((answer.interface.as_str(), answer.outbound), (target.as_str(), false));
    assert!(
        tcp.iter().any(|it| it.outbound && addresses(&it.bytes) == (endpoint, 80, client, 40000)),
        "and as it left"
    );
    let body = |it: &&&Record| it.bytes.ends_with(target.as_bytes());
    assert_eq!(tcp.iter().filter(body).count(), 2, "the page, twice");
    let refused: Vec<_> = tcp.iter().filter(|it| addresses(&it.bytes).1 == 40001).collect();
    assert!(!refused.is_empty(), "{records:?}");
    for record in refused {
        assert!(record.comment.starts_with("dropped: no_listener") && !record.outbound, "{record:?}");
    }

    // What others read it with agrees.
    let read = world.shell("dp", &format!("tcpdump -nr {path} 2>/dev/null"));
    assert_eq!(read.lines().count(), records.len(), "{read}");
    let line = format!("10.0.1.10.{nat} > 10.0.1.{}.8080: Flags [S]", to[3]);
    assert!(read.contains("10.0.1.5.40000 > 10.0.9.9.80: Flags [S]") && read.contains(&line), "{read}");
    assert!(!read.contains("incorrect"), "{read}");
}

#[test]
fn packets_are_chosen_by_either_side_and_cut_and_counted() {
    let world = served(&config("", UNCHECKED));
    let path = file(&world).display().to_string();
    // Both directions of one connection of one of two tenants with the same addresses, by what the consumer sees of it.
    let choice = ["--vpc", "bank", "--from", "10.0.1.5:40000", "--to", "10.0.9.9:80", "--protocol", "tcp"];
    let capture = Capture::start(&world, &[&["-w", &path, "--snaplen", "60"][..], &choice].concat());
    for consumer in ["ca", "cb"] {
        for port in [40000, 40001] {
            world.shell(consumer, &format!("curl -sS --max-time 5 --local-port {port} http://10.0.9.9/"));
        }
    }
    capture.signal("-TERM");
    assert!(capture.end().0.success());
    let records = written(&world);
    assert!(records.iter().any(|it| it.interface == "cb" && it.outbound), "{records:?}");
    for record in &records {
        assert!(record.interface != "ca" && record.comment.contains("endpoint bank/a"), "{record:?}");
        assert_eq!(record.bytes.len(), record.length.min(60));
        let (_, from, _, to) = addresses(&record.bytes);
        assert!(![from, to].contains(&40001), "{record:?}");
    }

    let mut capture = Capture::start(&world, &["--count", "3", "--protocol", "tcp"]);
    let stdout = capture.child.stdout.take().unwrap();
    world.fetch("ca", "");
    let lines: Vec<_> = BufReader::new(stdout).lines().map(Result::unwrap).collect();
    assert_eq!(lines.len(), 3, "{lines:?}");
    assert!(lines[0].contains(" ca tcp 10.0.1.5:") && lines[0].contains("[S] => t"), "{lines:?}");
    assert!(lines.iter().all(|it| it.contains(": forwarded, vpc ")), "{lines:?}");
    assert!(capture.end().1.starts_with("captured 3 packets"));

    let capture = Capture::start(&world, &["--rate", "5", "--duration", "3s", "--dropped"]);
    world.shell("ca", "bash -c 'for i in $(seq 300); do echo x > /dev/udp/10.0.9.9/99; done'");
    let (status, said) = capture.end();
    assert!(
        status.success() && said.contains("more came above the rate of 5 a second, 0 found no room"),
        "{said}"
    );
    let number = |text: &str| text.split_whitespace().find_map(|it| it.parse::<u64>().ok()).unwrap();
    let (captured, more) = said.split_once(';').unwrap();
    assert!((1..=20).contains(&number(captured)), "{said}");
    assert_eq!(number(captured) + number(more), 300, "{said}");
}

#[test]
fn a_sample_is_about_one_packet_in_so_many_each_as_it_came_and_as_it_left() {
    let world = World::new(&config("hook = \"tcx\"\n", UNCHECKED));
    let path = file(&world).display().to_string();
    let ping = "ping -f -q -c 4000 -W 5 10.0.9.9";
    for (sample, least, most) in [("1/1", 4000, 4000), ("4", 700, 1300), ("1/100000000", 0, 10)] {
        let arguments = ["--write", &path, "--rate", "1000000", "--protocol", "icmp", "--sample", sample];
        let capture = Capture::start(&world, &arguments);
        let before = world.state();
        let told = world.shell("ca", ping);
        assert!(told.contains("4000 packets transmitted, 4000 received"), "{told}");
        let moved = changes(&before, &world.state());
        assert!(moved.contains(&("shop echo_reply".into(), 4000)), "all of them are counted: {moved:?}");
        capture.signal("-INT");
        let (status, said) = capture.end();
        assert!(status.success() && said.contains("; 0 more came above the rate"), "{said}");
        let records = written(&world);
        // Of 4000, one in four by chance are 1000, and by 11 deviations fewer or more never.
        assert!((2 * least..=2 * most).contains(&records.len()), "{sample}: {} records", records.len());
        assert!(said.starts_with(&format!("captured {} packets", records.len() / 2)), "{said}");
        for pair in records.chunks(2) {
            let [question, reply] = pair else { panic!("one side alone: {pair:?}") };
            assert!(!question.outbound && reply.outbound, "{pair:?}");
            assert_eq!((question.bytes[34], reply.bytes[34]), (8, 0));
            assert_eq!(question.bytes[38..42], reply.bytes[38..42], "the same one");
        }
    }
}

#[test]
fn a_capture_that_is_killed_leaves_nothing_behind_at_either_hook_and_one_that_nobody_reads_ends() {
    let world = served(&mixed(&["ca", "t1"]));
    let mut capture = Capture::start(&world, &[]);
    capture.child.kill().unwrap();
    eventually("the program is back", || is_as_before(&world).then_some(()));

    let capture = Capture::start(&world, &[]);
    let guard = capture.guard().to_string();
    assert!(Command::new("kill").args(["-KILL", &guard]).status().unwrap().success());
    capture.signal("-KILL");
    assert!(!world.fetch("ca", "").is_empty(), "packets go on with the capture's program");
    eventually("the agent puts the program back", || is_as_before(&world).then_some(()));
    assert!(world.said().contains("a capture has died on 5 interfaces"), "{}", world.said());

    let mut capture = Capture::start(&world, &["-w", "-"]);
    drop(capture.child.stdout.take());
    let (status, said) = capture.end();
    assert!(status.success(), "{status} {said}");
    assert!(is_as_before(&world));
}

#[test]
fn a_capture_needs_no_agent_and_goes_on_with_the_program_of_the_next_one() {
    let mut world = served(&config("", UNCHECKED));
    world.kill_agent();
    let path = file(&world).display().to_string();
    let mut capture = Capture::start(&world, &["-w", &path, "--protocol", "tcp"]);
    assert!(!world.fetch("ca", "").is_empty());
    world.start(&[]);
    let mut line = String::new();
    capture.said.read_line(&mut line).unwrap();
    assert!(line.contains("an agent has put another program in place"), "{line}");
    assert!(!is_as_before(&world));
    assert!(!world.fetch("cb", "").is_empty());
    let second = world.privatelink(&["capture", "--duration", "1s"]);
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert_eq!(second.status.code(), Some(69), "{said}");
    assert!(said.contains("another capture runs"), "{said}");
    capture.signal("-TERM");
    let (status, said) = capture.end();
    assert!(status.success(), "{said}");
    let records = written(&world);
    for interface in ["ca", "cb"] {
        assert!(records.iter().any(|it| it.interface == interface), "{interface}: {records:?}");
    }
    assert!(is_as_before(&world));
}

#[test]
fn what_does_not_exist_cannot_be_captured() {
    let world = World::new(&config("", UNCHECKED));
    for (arguments, advice) in [
        (["--endpoint", "shp"], "there is no endpoint \"shp\""),
        (["--vpc", "shopp"], "did you mean \"shop\"?"),
        (["--from", "10.0.1:80"], "ADDRESS:PORT"),
        (["--to", "::"], "ADDRESS:PORT"),
        (["--protocol", "sctp"], "tcp, udp, icmp or icmpv6"),
        (["--sample", "1/0"], "1/N"),
    ] {
        let output = world.privatelink(&[&["capture"][..], &arguments].concat());
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(64), "{said}");
        assert!(said.contains(advice), "{said}");
    }
    assert_eq!(
        world.privatelink(&["capture", "--pin-dir", "/nonexistent"]).status.code(),
        Some(64),
        "given twice"
    );
    let elsewhere = Command::new(binary()).args(["capture", "--pin-dir", "/nonexistent"]).output().unwrap();
    assert_eq!(elsewhere.status.code(), Some(69), "{elsewhere:?}");
}

#[test]
fn frames_that_devices_are_to_finish_are_captured_whole_and_marked_and_the_hook_may_change_meanwhile() {
    let world = served(&config("hook = \"tcx\"", UNCHECKED));
    let path = file(&world).display().to_string();
    let capture = Capture::start(
        &world,
        &["--write", &path, "--rate", "100000", "--to", "10.0.9.9:80", "--protocol", "tcp"],
    );
    assert!(is_captured(&world));
    world.shell(
        "ca",
        "curl -sS --max-time 9 --local-port 40000 -o /dev/null -r 0-3000000 http://10.0.9.9/large",
    );
    let (code, said) = world.apply(&config("hook = \"xdp\"", UNCHECKED));
    assert_eq!(code, Some(0), "{said}");
    eventually("the capture has the other hook's links, too", || is_captured(&world).then_some(()));
    world.shell("ca", "curl -sS --max-time 9 --local-port 40001 http://10.0.9.9/");
    capture.signal("-INT");
    let (status, said) = capture.end();
    assert!(status.success() && said.ends_with(" 0 found no room\n"), "{status} {said}");
    assert!(is_as_before(&world), "both hooks' programs are back");

    let records = written(&world);
    let large: Vec<_> = records.iter().filter(|it| it.segmented).collect();
    assert!(large.iter().any(|it| it.length > 20000), "segments that are yet to be cut");
    assert!(large.iter().all(|it| it.unfinished && it.length > 1514), "their checksums are, too");
    assert!(records.iter().any(|it| it.unfinished && !it.segmented), "as are those of shorter ones");
    // Every byte of the file is there twice, once by each side.
    let carried = |outbound: bool| -> usize {
        let sides = records.iter().filter(|it| it.outbound == outbound && it.length > 1000);
        sides.filter_map(segment).map(<[u8]>::len).sum()
    };
    assert!(
        carried(true) > 2_900_000 && carried(true) == carried(false),
        "{} {}",
        carried(true),
        carried(false)
    );
    let of_the_other_hook =
        records.iter().filter(|it| segment(it).is_some() && addresses(&it.bytes).1 == 40001);
    assert!(of_the_other_hook.count() >= 3);
    for pair in records.windows(2).filter(|it| it[1].outbound && it[0].length > 1000) {
        assert_eq!((pair[0].length, segment(&pair[0])), (pair[1].length, segment(&pair[1])));
    }
}

#[test]
fn packets_of_either_family_are_chosen_by_their_addresses_and_shown_as_translated() {
    for hook in ["xdp", "tcx"] {
        let config = dualstack(&format!("hook = \"{hook}\""), UNCHECKED);
        let mut world = World::dualstack(&config, &["ca", "cb", "t1", "t2"]);
        world.serve("t1");
        world.serve("t2");
        let path = file(&world).display().to_string();
        // Port 80 leads to IPv4 targets, port 81 to IPv6 ones.
        let choices =
            [["--from", "[fd00::5]:40000", "--vpc", "shop"], ["--to", "[fd00::99]:81", "--protocol", "tcp"]];
        let mut records = Vec::new();
        for (round, choice) in choices.iter().enumerate() {
            let capture = Capture::start(&world, &[&["-w", &path][..], choice].concat());
            for (consumer, from, to) in
                [("ca", 40000, 80), ("cb", 40000, 80), ("ca", 40001, 80), ("ca", 40002, 81)]
            {
                // A port is not free again at once.
                let (from, url) = (from + 10 * round, format!("http://[fd00::99]:{to}/large"));
                let line = format!("curl -gsS --max-time 9 --local-port {from} -o /dev/null -r 0-9999 {url}");
                world.shell(consumer, &line);
            }
            capture.signal("-INT");
            assert!(capture.end().0.success());
            let captured = written(&world);
            let read = world.shell("dp", &format!("tcpdump -nr {path} 2>/dev/null"));
            assert_eq!(read.lines().count(), captured.len(), "{read}");
            let syn = format!("IP6 fd00::5.{} > fd00::99.{}: Flags [S]", 40000 + 12 * round, 80 + round);
            assert!(read.contains(&syn), "{read}");
            records.extend(captured);
        }
        let is_ipv6 = |it: &Record| it.bytes[12..14] == [0x86, 0xdd];
        let mut kinds = std::collections::BTreeSet::new();
        for pair in records.chunks(2) {
            let [came, left] = pair else { panic!("{hook}: one side alone: {pair:?}") };
            assert!(!came.outbound && left.outbound, "{hook}: {pair:?}");
            assert!(came.interface != "cb" && left.interface != "cb", "{hook}: {pair:?}");
            assert!(
                came.comment.contains("endpoint shop/a") && came.comment.contains("target web"),
                "{came:?}"
            );
            assert!([came, left].iter().all(|it| it.length == it.bytes.len()), "{hook}: {pair:?}");
            let payload = |it: &Record| {
                let at = if is_ipv6(it) { 54 } else { 34 };
                it.bytes[at + usize::from(it.bytes[at + 12] >> 4) * 4..].to_vec()
            };
            assert!(payload(came) == payload(left), "{hook}: {pair:?}");
            kinds.insert((came.interface == "ca", is_ipv6(came), is_ipv6(left), payload(came).len() > 1000));
        }
        for kind in [(true, true, false, false), (false, false, true, true), (true, true, true, false)] {
            assert!(kinds.contains(&kind), "{hook}: {kind:?} of {kinds:?}");
        }
        let mut capture =
            Capture::start(&world, &["--protocol", "icmpv6", "--to", "fd00::99", "--count", "1"]);
        world.shell("ca", "ip -6 neigh flush dev eth0 && curl -gsS --max-time 9 http://[fd00::99]:81/");
        let mut line = String::new();
        capture.child.stdout.take().unwrap().read_to_string(&mut line).unwrap();
        assert!(line.contains(", neighbour fd00::99 => ca icmpv6 fd00::99 > "), "{line}");
        assert!(line.contains("answered: neighbour_advertisement: ") && line.contains("shop/a"), "{line}");
    }
}

#[test]
fn jumbo_frames_tags_and_proxy_protocol_headers_are_captured_as_they_are() {
    let proxied = format!("{UNCHECKED} }}\nproxy_protocol_v2 = {{ enabled = true");
    let config = |hook: &str| config(&format!("hook = \"{hook}\""), &proxied);
    let mut world = World::bare(&config("tcx"));
    for name in ["ca", "cb", "t1", "t2"] {
        world.shell("dp", &format!("ip link set {name} mtu 9000"));
        world.shell(name, "ip link set eth0 mtu 9000");
    }
    world.start(&[]);
    for target in ["t1", "t2"] {
        world.spawn(target, "socat", &["-u", "UDP-RECV:8080", "OPEN:/dev/null"]);
        eventually("socat listens", || {
            (!world.shell(target, "ss -Hlun sport = :8080").is_empty()).then_some(())
        });
    }
    let path = file(&world).display().to_string();
    for hook in ["tcx", "xdp"] {
        let (code, said) = world.apply(&config(hook));
        assert_eq!(code, Some(0), "{said}");
        let capture = Capture::start(&world, &["-w", &path]);
        world.shell("ca", "dd if=/dev/urandom bs=8000 count=1 iflag=fullblock status=none | socat -u -b 9000 - UDP:10.0.9.9:53,sourceport=40000");
        // A tag of VLAN 77, which by TCX is no part of the frame.
        let frame = r"\377\377\377\377\377\377\2\1\1\1\1\1\201\0\0\115\10\0tagged";
        world.shell("cb", &format!("printf '{frame}%60s' | socat -u - INTERFACE:eth0"));
        capture.signal("-INT");
        assert!(capture.end().0.success());
        let records = written(&world);
        let at =
            records.iter().position(|it| it.length > 8000 && it.interface == "ca").expect("the datagram");
        let (came, left) = (&records[at], &records[at + 1]);
        assert_eq!((came.length, came.bytes.len()), (8042, 8042), "{hook}: it lies in more than one buffer");
        if hook == "tcx" {
            // Only the first datagram of a flow has the header before it.
            assert_eq!((left.length, left.bytes.len(), left.outbound), (8142, 8142, true));
            assert_eq!(left.bytes[42..54], *b"\r\n\r\n\0\r\nQUIT\n");
        }
        let at = left.length - 8000;
        assert!(
            came.bytes[42..] == left.bytes[at..],
            "{hook}: the payload, behind what the path has put there"
        );
        let tagged = records.iter().find(|it| it.interface == "cb" && it.bytes[12..14] == [0x81, 0]);
        let tagged = tagged.unwrap_or_else(|| panic!("{hook}: {records:?}"));
        assert_eq!((&tagged.bytes[14..24], tagged.length), (&b"\0\x4d\x08\0tagged"[..], 84), "{hook}");
        assert!(tagged.comment.starts_with("passed"), "{tagged:?}");
    }
}
