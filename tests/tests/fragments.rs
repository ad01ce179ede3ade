//! Datagrams in fragments of flows with an IPv6 side, byte by byte (RFC 8200, 4.5; RFC 7915, 4.1 and 5.1.1), and from real hosts.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests: a panic with its place is what is wanted")]

use privatelink_tests::bench::{Bench, REDIRECT, both};
use privatelink_tests::packet::{Ip, Ip6, Mac, Packet, Packet6, SYN, addresses, addresses6, six};
use privatelink_tests::world::{UNCHECKED, World, dualstack};

const CLIENT: Ip6 = six(5);
const ENDPOINT: Ip6 = six(0x99);
const BALANCER: Ip6 = six(0x10);
const CLIENT4: Ip = [10, 0, 1, 5];
const ENDPOINT4: Ip = [10, 0, 9, 9];

/// Each hook's program, in a world of its own.
fn benches() -> [Bench; 2] {
    both(|hook| World::dualstack(&dualstack(hook, UNCHECKED), &["t1", "t2"]))
}

fn macs(frame: &[u8]) -> (Mac, Mac) {
    (frame[0..6].try_into().unwrap(), frame[6..12].try_into().unwrap())
}

fn payload(length: usize) -> Vec<u8> {
    (0..=250).cycle().take(length).collect()
}

/// A datagram of so many bytes.
fn datagram(length: usize) -> Packet {
    Packet { payload: payload(length), to_port: 81, ..Packet::udp() }
}

/// The fragments of a packet over IPv6, each with `size` bytes of its payload.
fn fragments(whole: &Packet6, id: u32, size: usize) -> Vec<Vec<u8>> {
    let bytes = whole.build()[54..].to_vec();
    let count = bytes.chunks(size).count();
    let fragment = |(number, part): (usize, &[u8])| {
        whole.fragment(id, u16::try_from(number * size).unwrap(), number + 1 < count, part)
    };
    bytes.chunks(size).enumerate().map(fragment).collect()
}

/// The same over IPv4.
fn fragments4(whole: &Packet, size: usize) -> Vec<Vec<u8>> {
    let bytes = whole.build()[34..].to_vec();
    let count = bytes.chunks(size).count();
    let fragment = |(number, part): (usize, &[u8])| {
        let more = if number + 1 < count { 0x2000 } else { 0 };
        Packet { fragment: more | u16::try_from(number * size / 8).unwrap(), ..whole.clone() }.ipv4(part)
    };
    bytes.chunks(size).enumerate().map(fragment).collect()
}

fn opened(consumer: &str) -> [(String, i64); 3] {
    [
        (format!("{consumer} to_provider_packets"), 1),
        (format!("{consumer} new_flows"), 1),
        ("map pending6".into(), 2),
    ]
}

fn slice(moved: &[(String, i64)]) -> Vec<(&str, i64)> {
    moved.iter().map(|(key, by)| (key.as_str(), *by)).collect()
}

fn side(target: Ip6) -> &'static str {
    if target[15] == 0x21 { "t1" } else { "t2" }
}

/// Source and destination of a first fragment over IPv6, and its identification.
fn heads6(frame: &[u8]) -> (Ip6, u16, Ip6, u16, u32) {
    let mut unwrapped = frame.to_vec();
    unwrapped.drain(54..62);
    let (from, from_port, to, to_port) = addresses6(&unwrapped);
    (from, from_port, to, to_port, u32::from_be_bytes(frame[58..62].try_into().unwrap()))
}

#[test]
fn a_datagram_in_fragments_over_ipv6_arrives_as_it_was_sent_and_so_does_its_answer() {
    for bench in benches() {
        let mut ids = std::collections::BTreeSet::new();
        for (round, (consumer, interface)) in [("shop6", "ca"), ("bank6", "cb")].into_iter().enumerate() {
            // Both tenants send the same: addresses, ports and identification.
            let query = Packet6::of(CLIENT, ENDPOINT, datagram(4000));
            let pieces = fragments(&query, 0xdead_0007, 1448);
            let first = bench.expect("first", interface, &pieces[0], REDIRECT, &slice(&opened(consumer)));
            let (_, nat, target, _, id) = heads6(&first);
            assert!(ids.insert((target, id)), "datagrams of two tenants are never mistaken for one");
            let (to_mac, from_mac) = macs(&first);
            let inner =
                Packet { from_port: nat, to_port: 8080, ttl: 63, to_mac, from_mac, ..query.inner.clone() };
            let expected = fragments(&Packet6::of(BALANCER, target, inner), id, 1448);
            assert_eq!(first, expected[0], "{consumer}");
            // An error about it comes back in the sender's own words.
            let router = Packet { to_mac: from_mac, from_mac: to_mac, ..Packet::tcp(0) };
            let error = |held: &[u8]| [&1280u32.to_be_bytes()[..], &held[14..14 + 64]].concat();
            let complaint = Packet6::of(six(0x77), BALANCER, router).icmp(2, &error(&first));
            let back = format!("{consumer} to_consumer_packets");
            let out = bench.expect("too big", side(target), &complaint, REDIRECT, &[(&back, 1)]);
            let (to_mac, from_mac) = macs(&out);
            let inner = Packet { ttl: 63, ..query.inner.clone() };
            let held = fragments(&Packet6::of(CLIENT, ENDPOINT, inner), id, 1448);
            let teller = Packet { to_mac, from_mac, ttl: 63, ..Packet::tcp(0) };
            assert_eq!(out, Packet6::of(ENDPOINT, CLIENT, teller).icmp(2, &error(&held[0])), "{consumer}");
            let forth = format!("{consumer} to_provider_packets");
            for number in [[1, 2], [2, 1]][round] {
                let out = bench.expect("later", interface, &pieces[number], REDIRECT, &[(&forth, 1)]);
                assert_eq!(out, expected[number], "{consumer} {number}");
            }
            let inner = Packet {
                from_port: 8080,
                to_port: nat,
                payload: vec![9; 3000],
                from_mac: to_mac,
                to_mac: from_mac,
                ..Packet::udp()
            };
            let answer = Packet6::of(target, BALANCER, inner);
            let back = format!("{consumer} to_consumer_packets");
            let established = [(back.as_str(), 1), ("map pending6", -2), ("map established6", 2)];
            let pieces = fragments(&answer, 1, 1448);
            let out = bench.expect("answer", side(target), &pieces[0], REDIRECT, &established);
            let (to_mac, from_mac) = macs(&out);
            let inner =
                Packet { from_port: 81, to_port: 40000, ttl: 63, to_mac, from_mac, ..answer.inner.clone() };
            let expected = fragments(&Packet6::of(ENDPOINT, CLIENT, inner), heads6(&out).4, 1448);
            assert_eq!(out, expected[0]);
            for number in [2, 1] {
                let out = bench.expect("its rest", side(target), &pieces[number], REDIRECT, &[(&back, 1)]);
                assert_eq!(out, expected[number], "{consumer} {number}");
            }
        }
    }
}

#[test]
fn a_datagram_in_fragments_changes_its_family_on_its_way_and_back() {
    for bench in benches() {
        // Of 1400 bytes each: 28 more fit.
        let query = Packet { id: 77, fragment: 0, ttl: 60, tos: 0xb8, ..datagram(4000) };
        let pieces = fragments4(&query, 1376);
        let first = bench.expect("first", "ca", &pieces[0], REDIRECT, &slice(&opened("shop")));
        let (_, nat, target, _, id) = heads6(&first);
        let (to_mac, from_mac) = macs(&first);
        let inner = Packet { from_port: nat, to_port: 8080, ttl: 59, to_mac, from_mac, ..query.clone() };
        let at_target = Packet6 { class: 0xb8, ..Packet6::of(BALANCER, target, inner) };
        assert!(id < 0x10000, "{id:#x} is one that IPv4 has");
        let expected = fragments(&at_target, id, 1376);
        assert_eq!(first, expected[0]);
        for number in [2, 1] {
            let out =
                bench.expect("later", "ca", &pieces[number], REDIRECT, &[("shop to_provider_packets", 1)]);
            assert_eq!(out, expected[number], "{number}");
        }
        let inner = Packet {
            from_port: 8080,
            to_port: nat,
            payload: payload(3000),
            from_mac: to_mac,
            to_mac: from_mac,
            ..Packet::udp()
        };
        let answer = Packet6 { class: 0x28, ..Packet6::of(target, BALANCER, inner) };
        let pieces = fragments(&answer, 0x1234_5678, 1448);
        let established = [("shop to_consumer_packets", 1), ("map pending6", -2), ("map established6", 2)];
        let out = bench.expect("answer", side(target), &pieces[0], REDIRECT, &established);
        assert_eq!(addresses(&out), (ENDPOINT4, 81, CLIENT4, 40000));
        let (to_mac, from_mac) = macs(&out);
        let id = u16::from_be_bytes([out[18], out[19]]);
        let at_client = Packet {
            from: ENDPOINT4,
            to: CLIENT4,
            from_port: 81,
            to_port: 40000,
            ttl: 63,
            tos: 0x28,
            id,
            to_mac,
            from_mac,
            ..answer.inner.clone()
        };
        let expected = fragments4(&at_client, 1448);
        assert_eq!(out, expected[0]);
        for number in [2, 1] {
            let moved = [("shop to_consumer_packets", 1)];
            let out = bench.expect("its rest", side(target), &pieces[number], REDIRECT, &moved);
            assert_eq!(out, expected[number], "{number}");
        }
        let full = Packet { id: 78, fragment: 0, ..datagram(4000) };
        let pieces = fragments4(&full, 1480);
        let told = [("shop fragmentation_needed", 1)];
        let out = bench.expect("28 bytes more do not fit", "ca", &pieces[0], REDIRECT, &told);
        assert_eq!(out[34..42], [&[3, 4, out[36], out[37], 0, 0][..], &1472u16.to_be_bytes()].concat());
        let without = Packet { id: 79, fragment: 0, no_checksum: true, ..datagram(4000) };
        let pieces = fragments4(&without, 1376);
        bench.refused("without a checksum", "ca", &pieces[0], "shop udp_checksum_missing");
        bench.held("nor does the rest go on", "ca", &pieces[1], "shop");
    }
}

#[test]
fn fragments_over_ipv6_that_overlap_come_too_early_twice_or_too_small_are_dropped_by_name() {
    for bench in benches() {
        let whole = Packet6::of(CLIENT, ENDPOINT, datagram(4000));
        let pieces = fragments(&whole, 9, 1448);
        bench.held("without its first", "ca", &pieces[1], "shop");
        assert_eq!(bench.run("ca", &pieces[0]).0, REDIRECT);
        bench.held("of another datagram", "ca", &fragments(&whole, 0x1_0009, 1448)[1], "shop");
        bench.held("of another tenant's", "cb", &pieces[1], "bank");
        for (name, from) in [("from outside", [0xfe; 16]), ("in our name", ENDPOINT)] {
            let stranger = fragments(&Packet6 { from, ..whole.clone() }, 10, 1448);
            bench.refused(name, "ca", &stranger[1], "shop fragment_unknown");
        }
        let at = |offset: u16, more, length: usize| whole.fragment(9, offset, more, &vec![3; length]);
        for (name, frame, reason) in [
            ("into the first one's bytes", at(8, true, 1448), "fragment_overlap"),
            ("into the first one's end", at(1440, true, 1448), "fragment_overlap"),
            ("behind a gap that is no fragment's", at(1456, true, 1448), "fragment_overlap"),
            ("longer than the first", at(1448, true, 1456), "fragment_overlap"),
            ("shorter, and not the last", at(1448, true, 1440), "fragment_overlap"),
            ("further than any", at(65160, false, 500), "malformed"),
            ("not in units of eight", at(0, true, 1441), "malformed"),
            ("empty", at(1448, false, 0), "malformed"),
            ("tiny", at(0, true, 40), "fragment_tiny"),
        ] {
            bench.refused(name, "ca", &frame, &format!("shop {reason}"));
        }
        assert_eq!(bench.run("ca", &pieces[1]).0, REDIRECT);
        bench.refused("twice", "ca", &pieces[1], "shop fragment_overlap");
        assert_eq!(bench.run("ca", &pieces[2]).0, REDIRECT);
        let mut short = fragments(&whole, 12, 1448)[0].clone();
        short[66..68].copy_from_slice(&1448_u16.to_be_bytes());
        bench.refused("a UDP length that ends in the first", "ca", &short, "shop malformed");
        let without = Packet6 { inner: Packet { no_checksum: true, ..whole.inner.clone() }, ..whole.clone() };
        bench.refused("without a checksum", "ca", &fragments(&without, 13, 1448)[0], "shop malformed");
        let elsewhere = Packet6 { to: six(8), ..whole.clone() };
        bench.refused("to another", "ca", &fragments(&elsewhere, 9, 1448)[0], "shop passed");
        bench.refused("its rest", "ca", &fragments(&elsewhere, 9, 1448)[1], "shop passed");
        let unlisted = Packet6::of(CLIENT, ENDPOINT, Packet { to_port: 82, ..datagram(4000) });
        bench.refused("to no listener", "ca", &fragments(&unlisted, 14, 1448)[0], "shop no_listener");
        for protocol in [6, 58, 132] {
            let other = Packet6 { inner: Packet { protocol, ..whole.inner.clone() }, ..whole.clone() };
            bench.refused("not UDP", "ca", &other.fragment(15, 0, true, &[0; 1448]), "shop fragment");
            bench.refused("not UDP, later", "ca", &other.fragment(15, 1448, false, &[0; 8]), "shop fragment");
        }
        let expiring = Packet6 { inner: Packet { ttl: 1, ..whole.inner.clone() }, ..whole.clone() };
        assert_eq!(bench.run("ca", &fragments(&whole, 16, 1448)[0]).0, REDIRECT);
        bench.refused("at its last hop", "ca", &fragments(&expiring, 16, 1448)[1], "shop ttl_expired");
    }
}

#[test]
fn a_first_fragment_that_ends_here_is_reported_with_its_ports() {
    for bench in benches() {
        let inner = Packet { ttl: 1, ..datagram(4000) };
        let sent = fragments(&Packet6::of(CLIENT, ENDPOINT, inner), 5, 1448);
        let out = bench.expect("expired", "ca", &sent[0], REDIRECT, &[("shop time_exceeded", 1)]);
        let (to_mac, from_mac) = (macs(&sent[0]).1, macs(&sent[0]).0);
        let about = Packet6::of(ENDPOINT, CLIENT, Packet { to_mac, from_mac, ..Packet::tcp(0) });
        assert_eq!(out, about.icmp(3, &[&[0; 4], &sent[0][14..70]].concat()));
    }
}

#[test]
fn a_whole_packet_with_a_fragment_header_is_like_any_other() {
    for bench in benches() {
        for (interface, consumer, inner) in
            [("ca", "shop6", Packet { to_port: 81, ..Packet::tcp(SYN) }), ("cb", "bank6", datagram(100))]
        {
            let sent = Packet6::of(CLIENT, ENDPOINT, inner);
            let atomic = sent.fragment(1, 0, false, &sent.build()[54..]);
            let out = bench.expect("atomic", interface, &atomic, REDIRECT, &slice(&opened(consumer)));
            assert_eq!(out, bench.run(interface, &sent.build()).1, "{consumer}");
            assert_eq!(out.len(), sent.build().len());
        }
        let solicitation = Packet6::of(CLIENT, ENDPOINT, Packet { ttl: 255, protocol: 58, ..Packet::tcp(0) });
        let body = solicitation.icmp(135, &[&[0; 4][..], &ENDPOINT].concat());
        let atomic = solicitation.fragment(1, 0, false, &body[54..]);
        bench.refused("neighbour discovery (RFC 6980)", "ca", &atomic, "shop fragment");
        let elsewhere = Packet6::of(CLIENT, six(8), Packet::tcp(SYN));
        let atomic = elsewhere.fragment(1, 0, false, &elsewhere.build()[54..]);
        bench.refused("to another", "ca", &atomic, "shop passed");
    }
}

#[test]
fn real_hosts_send_large_datagrams_over_ipv6_and_get_large_answers() {
    let world = World::dualstack(&dualstack("", UNCHECKED), &["ca", "cb", "t1", "t2"]);
    for target in ["t1", "t2"] {
        let (ready, is_ready) = std::sync::mpsc::channel();
        world.thread(target, move || {
            let socket = std::net::UdpSocket::bind("[::]:8080").unwrap();
            ready.send(()).unwrap();
            let mut message = vec![0; 65536];
            while let Ok((length, from)) = socket.recv_from(&mut message) {
                message[..length].reverse();
                socket.send_to(&message[..length], from).unwrap();
            }
        });
        is_ready.recv().unwrap();
    }
    // Between the families, fragments of 1500 bytes grow too large for the links, unless they take more.
    for link in ["ca", "cb", "t1", "t2"] {
        world.shell("dp", &format!("ip link set {link} mtu 1600"));
        world.shell(link, &format!("ip link set eth0 mtu {}", if link == "ca" { 1500 } else { 1600 }));
    }
    for endpoint in ["fd00::99", "10.0.9.9"] {
        let work = move || {
            let any = if endpoint.contains(':') { "[::]:0" } else { "0.0.0.0:0" };
            let socket = std::net::UdpSocket::bind(any).unwrap();
            socket.set_read_timeout(Some(std::time::Duration::from_secs(5))).unwrap();
            socket.connect((endpoint, 81)).unwrap();
            for length in [100, 1452, 1453, 4000, 9000, 40000] {
                let sent = payload(length);
                let mut got = vec![0; 65536];
                let mut answer = None;
                for _ in 0..5 {
                    socket.send(&sent).unwrap();
                    if let Ok(length) = socket.recv(&mut got) {
                        answer = Some(length);
                        break;
                    }
                }
                got.truncate(answer.unwrap_or_else(|| panic!("{length} bytes to {endpoint} had no answer")));
                got.reverse();
                assert!(got == sent, "{length} bytes to {endpoint}");
            }
        };
        world.thread("ca", work).join().unwrap();
    }
}
