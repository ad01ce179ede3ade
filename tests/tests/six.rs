//! IPv6, and the two families on the two sides of a flow: packets byte by byte, and real clients and servers.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests: a panic with its place is what is wanted")]

use privatelink_tests::bench::{Bench, DROP, PASS, REDIRECT, Segments, both};
use privatelink_tests::packet::{
    ACK, FIN, Ip, Ip6, Mac, PSH, Packet, Packet6, RST, SYN, addresses, addresses6, six,
};
use privatelink_tests::world::{CHECKED, UNCHECKED, World, changes, dualstack, eventually};
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

const ENDS: [&str; 4] = ["ca", "cb", "t1", "t2"];
const CLIENT: Ip6 = six(5);
const ENDPOINT: Ip6 = six(0x99);
const BALANCER: Ip6 = six(0x10);
const CLIENT4: Ip = [10, 0, 1, 5];
const ENDPOINT4: Ip = [10, 0, 9, 9];
const BALANCER4: Ip = [10, 0, 1, 10];

/// Each hook's program, in a world of its own.
fn benches() -> [Bench; 2] {
    both(|hook| World::dualstack(&dualstack(hook, UNCHECKED), &["t1", "t2"]))
}

/// A packet after a hop.
fn hop(inner: &Packet) -> Packet {
    Packet { ttl: inner.ttl - 1, ..inner.clone() }
}

/// A client's packet over IPv6 to a port of the endpoint.
fn client(port: u16, inner: Packet) -> Packet6 {
    Packet6::of(CLIENT, ENDPOINT, Packet { to_port: port, ..inner })
}

/// The link-layer addresses of a frame that leaves, for what is expected of it.
fn macs(frame: &[u8]) -> (Mac, Mac) {
    (frame[0..6].try_into().unwrap(), frame[6..12].try_into().unwrap())
}

fn side(last: u8) -> &'static str {
    if last == 0x21 || last == 21 { "t1" } else { "t2" }
}

/// The counters that a flow's first packet moves.
fn opened(counted: &str, map: &str) -> [(String, i64); 3] {
    [
        (format!("{counted} to_provider_packets"), 1),
        (format!("{counted} new_flows"), 1),
        (format!("map {map}"), 2),
    ]
}

fn slice(moved: &[(String, i64)]) -> Vec<(&str, i64)> {
    moved.iter().map(|(key, by)| (key.as_str(), *by)).collect()
}

#[test]
fn an_ipv6_connection_is_translated_both_ways_and_two_tenants_with_one_prefix_are_kept_apart() {
    for bench in benches() {
        let mut seen = Vec::new();
        for (consumer, interface) in [("shop6", "ca"), ("bank6", "cb")] {
            let syn = Packet6 { class: 0xb8, ..client(81, Packet::tcp(SYN)) };
            let out =
                bench.expect("SYN", interface, &syn.build(), REDIRECT, &slice(&opened(consumer, "pending6")));
            let (_, nat, target, _) = addresses6(&out);
            assert!(nat >= 2048 && (target == six(0x21) || target == six(0x22)));
            let (to_mac, from_mac) = macs(&out);
            let inner = Packet { from_port: nat, to_port: 8080, to_mac, from_mac, ..hop(&syn.inner) };
            let at_target = Packet6 { from: BALANCER, to: target, inner, ..syn };
            assert_eq!(out, at_target.build(), "{consumer}: the SYN at the target");
            seen.push((target, nat));

            let side = side(target[15]);
            let (forth, back) =
                (format!("{consumer} to_provider_packets"), format!("{consumer} to_consumer_packets"));
            let inner = Packet {
                from_port: 8080,
                to_port: nat,
                from_mac: to_mac,
                to_mac: from_mac,
                ..Packet::tcp(SYN | ACK)
            };
            let answer = Packet6::of(target, BALANCER, inner);
            let got = bench.expect("SYN-ACK", side, &answer.build(), REDIRECT, &[(&back, 1)]);
            let (to_mac, from_mac) = (syn.inner.from_mac, macs(&got).1);
            let inner = Packet { from_port: 81, to_port: 40000, to_mac, from_mac, ..hop(&answer.inner) };
            assert_eq!(
                got,
                Packet6::of(ENDPOINT, CLIENT, inner).build(),
                "{consumer}: the SYN-ACK at the consumer"
            );

            let established = [(&*forth, 1), ("map pending6", -2), ("map established6", 2)];
            let ack = client(81, Packet::tcp(ACK)).build();
            bench.expect("ACK", interface, &ack, REDIRECT, &established);
            let data =
                client(81, Packet { payload: b"GET / HTTP/1.1\r\n".to_vec(), ..Packet::tcp(ACK | PSH) });
            let got = bench.expect("data", interface, &data.build(), REDIRECT, &[(&forth, 1)]);
            let (to_mac, from_mac) = macs(&got);
            let inner = Packet { from_port: nat, to_port: 8080, to_mac, from_mac, ..hop(&data.inner) };
            assert_eq!(got, Packet6::of(BALANCER, target, inner).build());
            bench.expect(
                "FIN",
                interface,
                &client(81, Packet::tcp(FIN | ACK)).build(),
                REDIRECT,
                &[(&forth, 1)],
            );
            let fin = Packet6 { inner: Packet { flags: FIN | ACK, ..answer.inner }, ..answer };
            bench.expect("FIN back", side, &fin.build(), REDIRECT, &[(&back, 1)]);
        }
        assert_ne!(seen[0], seen[1], "two tenants never share a NAT port towards one target");
        let flows = bench.world.json("flows");
        let flow = &flows.as_array().unwrap()[0];
        assert_eq!(
            (flow["client"].as_str(), flow["state"].as_str()),
            (Some("[fd00::5]:40000"), Some("closed"))
        );
        assert_eq!(flow["endpoint_address"], "[fd00::99]:81");
    }
}

/// What a target gets over IPv4 of a client's packet over IPv6, by RFC 7915, 5.1.
fn over_ipv4(sent: &Packet6, nat: u16, target: Ip, frame: &[u8]) -> Vec<u8> {
    let (to_mac, from_mac) = macs(frame);
    let large = 20 + 20 + sent.inner.payload.len() > 1260;
    let mut expected = Packet {
        from: BALANCER4,
        to: target,
        from_port: nat,
        to_port: 8080,
        to_mac,
        from_mac,
        id: 0,
        fragment: if large { 0x4000 } else { 0 },
        ..hop(&sent.inner)
    };
    if !large {
        // Told apart by the lower half of the sequence number, or by a datagram's checksum as it came.
        let bytes = sent.build();
        expected.id = u16::from_be_bytes([bytes[60], bytes[61]]);
    }
    let mut frame = expected.build();
    if sent.class != 0 {
        frame[15] = sent.class;
        let sum = privatelink_tests::packet::checksum(&[&frame[14..24], &[0, 0], &frame[26..34]]);
        frame[24..26].copy_from_slice(&sum.to_be_bytes());
    }
    frame
}

#[test]
fn an_ipv6_client_is_served_by_ipv4_targets() {
    for bench in benches() {
        let syn = Packet6 { class: 0x28, ..client(80, Packet { ttl: 61, ..Packet::tcp(SYN) }) };
        let out = bench.expect("SYN", "ca", &syn.build(), REDIRECT, &slice(&opened("shop6", "pending6")));
        let (_, nat, target, _) = addresses(&out);
        assert_eq!(out, over_ipv4(&syn, nat, target, &out), "the SYN at the target");

        let (to_mac, from_mac) = macs(&out);
        let back = Packet {
            from: target,
            to: BALANCER4,
            from_port: 8080,
            to_port: nat,
            from_mac: to_mac,
            to_mac: from_mac,
            ttl: 63,
            ..Packet::tcp(SYN | ACK)
        };
        let moved = [("shop6 to_consumer_packets", 1)];
        let got = bench.expect("SYN-ACK", side(target[3]), &back.build(), REDIRECT, &moved);
        let (to_mac, from_mac) = (syn.inner.from_mac, macs(&got).1);
        let inner = Packet { from_port: 80, to_port: 40000, to_mac, from_mac, ..hop(&back) };
        assert_eq!(got, Packet6::of(ENDPOINT, CLIENT, inner).build(), "the SYN-ACK at the consumer");

        let established = [("shop6 to_provider_packets", 1), ("map pending6", -2), ("map established6", 2)];
        bench.expect("ACK", "ca", &client(80, Packet::tcp(ACK)).build(), REDIRECT, &established);
        for length in [1, 1220, 1221, 1400] {
            let data = client(80, Packet { payload: vec![7; length], ..Packet::tcp(ACK | PSH) });
            let got =
                bench.expect("data", "ca", &data.build(), REDIRECT, &[("shop6 to_provider_packets", 1)]);
            assert_eq!(got, over_ipv4(&data, nat, target, &got), "{length} bytes");
            let data = Packet { payload: vec![9; length], flags: ACK | PSH, ..back.clone() };
            let got = bench.expect("data back", side(target[3]), &data.build(), REDIRECT, &moved);
            let inner = Packet { from_port: 80, to_port: 40000, to_mac, from_mac, ..hop(&data) };
            assert_eq!(got, Packet6::of(ENDPOINT, CLIENT, inner).build(), "{length} bytes back");
        }
        let late = Packet { to_port: nat.wrapping_add(1).max(2048), ..back };
        bench.expect(
            "of no flow",
            side(target[3]),
            &late.build(),
            REDIRECT,
            &[("payments reset_no_flow", 1)],
        );
    }
}

#[test]
fn an_ipv4_client_is_served_by_ipv6_targets() {
    for bench in benches() {
        let sent = |inner: Packet| Packet { to_port: 81, ..inner };
        let syn = Packet { ttl: 61, ..sent(Packet::tcp(SYN)) };
        let out = bench.expect("SYN", "ca", &syn.build(), REDIRECT, &slice(&opened("shop", "pending6")));
        let (_, nat, target, _) = addresses6(&out);
        let at_target = |sent: &Packet, frame: &[u8]| {
            let (to_mac, from_mac) = macs(frame);
            let inner = Packet { from_port: nat, to_port: 8080, to_mac, from_mac, ..hop(sent) };
            Packet6::of(BALANCER, target, inner).build()
        };
        assert_eq!(out, at_target(&syn, &out), "the SYN at the target");
        let (to_mac, from_mac) = macs(&out);
        let back = Packet {
            from_port: 8080,
            to_port: nat,
            from_mac: to_mac,
            to_mac: from_mac,
            ..Packet::tcp(SYN | ACK)
        };
        let back = Packet6::of(target, BALANCER, back);
        let moved = [("shop to_consumer_packets", 1)];
        let got = bench.expect("SYN-ACK", side(target[15]), &back.build(), REDIRECT, &moved);
        assert_eq!(got[12..15], [8, 0, 0x45]);
        assert_eq!(addresses(&got), (ENDPOINT4, 81, CLIENT4, 40000));
        let mut expected =
            Packet { from: ENDPOINT4, to: CLIENT4, from_port: 81, to_port: 40000, ..hop(&back.inner) };
        (expected.to_mac, expected.from_mac) = macs(&got);
        (expected.fragment, expected.id) = (0, u16::from_be_bytes([got[40], got[41]]));
        assert_eq!(got, expected.build(), "the SYN-ACK at the consumer");
        let established = [("shop to_provider_packets", 1), ("map pending6", -2), ("map established6", 2)];
        bench.expect("ACK", "ca", &sent(Packet::tcp(ACK)).build(), REDIRECT, &established);
        let data = sent(Packet { payload: vec![7; 999], ..Packet::tcp(ACK | PSH) });
        let got = bench.expect("data", "ca", &data.build(), REDIRECT, &[("shop to_provider_packets", 1)]);
        assert_eq!(got, at_target(&data, &got));

        let query = Packet { to_port: 81, ..Packet::udp() };
        let out = bench.expect("query", "cb", &query.build(), REDIRECT, &slice(&opened("bank", "pending6")));
        let (_, nat, target, _) = addresses6(&out);
        let (to_mac, from_mac) = macs(&out);
        let inner = Packet { from_port: nat, to_port: 8080, to_mac, from_mac, ..hop(&query) };
        assert_eq!(out, Packet6::of(BALANCER, target, inner).build(), "the query at the target");
    }
}

/// Lets packets of 9000 bytes go everywhere.
fn widen(world: &World) {
    for end in ENDS {
        world.shell(end, "ip link set eth0 mtu 9000");
        world.shell("dp", &format!("ip link set {end} mtu 9000"));
    }
    eventually("the path knows that they carry more", || {
        let status = world.json("status");
        let rows = status[0]["interfaces"].as_array()?;
        let ours = rows.iter().filter(|row| !row["interface"].as_str().unwrap().starts_with("pls"));
        ours.map(|row| row["mtu"].as_u64()).all(|mtu| mtu == Some(9000)).then_some(())
    });
}

/// Endpoints whose packets may be as large as that, too.
fn wide(extra: &str) -> String {
    let addresses = r#"addresses = { a = ["10.0.9.9", "fd00::99"] }"#;
    dualstack(extra, UNCHECKED).replace(addresses, &format!("{addresses}\nmtu = 9000"))
}

/// The same packet with a word in its payload that makes a checksum of zero, which is sent as all ones.
fn zeroed(packet: &Packet, frame: impl Fn(&Packet) -> Vec<u8>, at: usize) -> Packet {
    let blank = Packet { payload: vec![0; 2], ..packet.clone() };
    let frame = frame(&Packet { no_checksum: false, ..blank.clone() });
    Packet { payload: frame[at..at + 2].to_vec(), ..blank }
}

#[test]
fn a_datagram_without_a_checksum_gets_one_where_it_becomes_ipv6() {
    for bench in both(|hook| World::dualstack(&wide(hook), &["t1", "t2"])) {
        widen(&bench.world);
        let query = Packet { to_port: 81, no_checksum: true, tos: 0xb8, ..Packet::udp() };
        let out =
            bench.expect("a query", "ca", &query.build(), REDIRECT, &slice(&opened("shop", "pending6")));
        let (_, nat, target, _) = addresses6(&out);
        let (to_mac, from_mac) = macs(&out);
        let at_target = |sent: &Packet| {
            let inner =
                Packet { from_port: nat, to_port: 8080, to_mac, from_mac, no_checksum: false, ..hop(sent) };
            Packet6 { class: 0xb8, ..Packet6::of(BALANCER, target, inner) }
        };
        assert_eq!(out, at_target(&query).build(), "the query at the target");
        let moved = [("shop to_provider_packets", 1)];
        // What is summed at a time ends within them, or with them; the frame of a test by TCX is one of a page at most.
        let mut lengths = vec![0, 1, 2, 3, 4, 5, 503, 504, 505, 1015, 1016, 1017, 1452, 1472, 3000];
        if bench.is_xdp() {
            lengths.extend([3501, 4095, 8951, 8952]);
        }
        for length in lengths {
            for byte in [None, Some(0), Some(0xff)] {
                let bytes = (0..=250).cycle().map(|it| byte.unwrap_or(it));
                let sent = Packet { payload: bytes.take(length).collect(), ..query.clone() };
                let got = bench.run("ca", &sent.build());
                assert!(got == (REDIRECT, at_target(&sent).build()), "{length} bytes of {byte:?}");
            }
        }
        let at_both =
            [zeroed(&query, Packet::build, 40), zeroed(&query, |packet| at_target(packet).build(), 60)];
        for sent in &at_both {
            let got = bench.expect("a sum of zero", "ca", &sent.build(), REDIRECT, &moved);
            assert_eq!(got, at_target(sent).build());
        }
        assert_eq!(at_target(&at_both[1]).build()[60..62], [0xff; 2], "it was one");

        // Bytes that the packet has, and the datagram has not, are in no sum.
        let [long, expected] = [query.build()[34..].to_vec(), at_target(&query).build()[54..].to_vec()]
            .map(|bytes| [&bytes[..], b"behind it"].concat());
        let got = bench.expect("more behind it", "ca", &query.ipv4(&long), REDIRECT, &moved);
        assert_eq!(got, at_target(&query).ipv6(17, &expected));

        // Each segment that a device were to make of it would need a checksum of its own.
        if !bench.is_xdp() {
            let before = bench.world.state();
            let many = Packet { payload: vec![5; 3000], ..query };
            assert_eq!(bench.run_segments("ca", &many.build(), Segments(3, 1000)).0, DROP);
            let moved = changes(&before, &bench.world.state());
            assert_eq!(moved, [("shop udp_checksum_missing".to_owned(), 3)]);
        }
    }
}

/// A socket of a consumer's, whose datagrams are the test's.
struct Client(UnixDatagram);

impl Client {
    /// By socat, which sets any option of a socket.
    fn new(world: &mut World, address: &str) -> Self {
        let [theirs, ours] = ["client", "test"].map(|end| world.dir.path().join(end));
        let socket = UnixDatagram::bind(&ours).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let here = format!("UNIX-SENDTO:{},bind={}", ours.display(), theirs.display());
        world.spawn("ca", "socat", &["-b", "70000", address, &here]);
        eventually("the client is there", || socket.connect(&theirs).ok());
        Self(socket)
    }

    fn ask(&self, sent: &[u8]) -> Vec<u8> {
        self.0.send(sent).unwrap();
        let mut got = vec![0; 70000];
        let length = self.0.recv(&mut got).unwrap_or_else(|error| panic!("{} bytes: {error}", sent.len()));
        got.truncate(length);
        got
    }
}

#[test]
fn real_clients_that_leave_out_their_datagrams_checksums_are_heard_by_ipv6_targets() {
    for hook in ["tcx", "xdp"] {
        let mut world = World::dualstack(&wide(&format!("hook = \"{hook}\"")), &["t1", "t2"]);
        widen(&world);
        for target in ["t1", "t2"] {
            let (ready, is_ready) = std::sync::mpsc::channel();
            world.thread(target, move || {
                let (socket, mut bytes) = (std::net::UdpSocket::bind("[::]:8080").unwrap(), [0; 9000]);
                ready.send(()).unwrap();
                while let Ok((length, from)) = socket.recv_from(&mut bytes) {
                    bytes[..length].reverse();
                    socket.send_to(&bytes[..length], from).unwrap();
                }
            });
            is_ready.recv().unwrap();
        }
        let client = Client::new(&mut world, "UDP:10.0.9.9:81,so-no-check=1");
        for length in [1, 5, 1000, 1472, 8951] {
            let sent: Vec<u8> = (0..=250).cycle().take(length).collect();
            let mut got = client.ask(&sent);
            got.reverse();
            assert!(got == sent, "{length} bytes by {hook}");
        }
        // Of a datagram in fragments, there is never the whole; so that these have room to grow, they are smaller than the links take.
        world.shell("ca", "ip link set eth0 mtu 8900");
        let before = world.state();
        client.0.send(&[0; 20000]).unwrap();
        let fragments =
            [("shop fragment_unknown".to_owned(), 2), ("shop udp_checksum_missing".to_owned(), 1)];
        eventually("all of its fragments are counted", || {
            let moved = changes(&before, &world.state());
            fragments.iter().all(|it| moved.contains(it)).then_some(())
        });
    }
}

#[test]
fn ipv4_on_both_sides_stays_in_the_narrow_tables_of_a_dualstack_load_balancer() {
    for bench in benches() {
        bench.expect("SYN", "ca", &Packet::tcp(SYN).build(), REDIRECT, &slice(&opened("shop", "pending")));
        bench.refused(
            "unlisted port",
            "ca",
            &Packet { to_port: 82, ..Packet::tcp(SYN) }.build(),
            "shop no_listener",
        );
        let stray = [("shop reset_no_flow", 1)];
        bench.expect(
            "a stray ACK",
            "ca",
            &Packet { from_port: 9, ..Packet::tcp(ACK) }.build(),
            REDIRECT,
            &stray,
        );
    }
}

/// A neighbour solicitation with options.
fn solicitation(from: Ip6, target: Ip6, options: &[u8]) -> (Packet6, Vec<u8>) {
    let mut group = six(0);
    group[..13].copy_from_slice(&[0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff]);
    group[13..].copy_from_slice(&target[13..]);
    let inner =
        Packet { to_mac: [0x33, 0x33, 0xff, target[13], target[14], target[15]], ttl: 255, ..Packet::tcp(0) };
    (Packet6::of(from, group, inner), [&[0; 4][..], &target, options].concat())
}

const ME: Mac = [2, 1, 1, 1, 1, 1];
const MY_OPTION: [u8; 8] = [1, 1, 2, 1, 1, 1, 1, 1];

#[test]
fn neighbour_solicitations_for_our_addresses_are_answered_and_probes_are_told_that_the_address_is_taken() {
    for bench in benches() {
        let nonce = [14, 1, 1, 2, 3, 4, 5, 6];
        for (interface, vpc, from, target) in
            [("ca", "shop", CLIENT, ENDPOINT), ("t1", "payments", six(0x21), BALANCER)]
        {
            let answered = [(&*format!("{vpc} neighbour_advertisement"), 1)];
            for options in [&MY_OPTION[..], &[], &[MY_OPTION, nonce].concat()] {
                let (packet, body) = solicitation(from, target, options);
                let out =
                    bench.expect("a question", interface, &packet.icmp(135, &body), REDIRECT, &answered);
                let mac = macs(&out).1;
                assert_eq!(mac[0] & 3, 2, "locally administered, unicast");
                let inner = Packet { to_mac: ME, from_mac: mac, ttl: 255, ..Packet::tcp(0) };
                let body = [&[0x60, 0, 0, 0][..], &target, &[2, 1], &mac].concat();
                assert_eq!(
                    out,
                    Packet6::of(target, from, inner).icmp(136, &body),
                    "solicited, and to be believed"
                );
            }
            for options in [&[][..], &nonce] {
                let (packet, body) = solicitation([0; 16], target, options);
                let out = bench.expect("a probe", interface, &packet.icmp(135, &body), REDIRECT, &answered);
                let mac = macs(&out).1;
                let mut all = six(1);
                (all[0], all[1]) = (0xff, 2);
                let inner =
                    Packet { to_mac: [0x33, 0x33, 0, 0, 0, 1], from_mac: mac, ttl: 255, ..Packet::tcp(0) };
                let body = [&[0x20, 0, 0, 0][..], &target, &[2, 1], &mac].concat();
                assert_eq!(out, Packet6::of(target, all, inner).icmp(136, &body), "to all nodes");
            }
        }
    }
}

#[test]
fn what_is_no_neighbour_solicitation_or_claims_what_is_ours_is_refused() {
    for bench in benches() {
        let (good, body) = solicitation(CLIENT, ENDPOINT, &MY_OPTION);
        let far = Packet6 { inner: Packet { ttl: 254, ..good.inner.clone() }, ..good.clone() };
        bench.refused("one that passed a router", "ca", &far.icmp(135, &body), "shop malformed");
        let mut wrong = good.icmp(135, &body);
        wrong[57] ^= 1;
        bench.refused("a wrong checksum", "ca", &wrong, "shop malformed");
        let with = |options: &[u8]| {
            let (packet, body) = solicitation(CLIENT, ENDPOINT, options);
            packet.icmp(135, &body)
        };
        bench.refused("an option without a length", "ca", &with(&[1, 0, 2, 1, 1, 1, 1, 1]), "shop malformed");
        bench.refused("an option that is cut off", "ca", &with(&[1, 2, 2, 1, 1, 1, 1, 1]), "shop malformed");
        bench.refused("half an option", "ca", &with(&[1, 1, 2, 1]), "shop malformed");
        bench.refused(
            "more options than anyone has",
            "ca",
            &with(&[14, 1, 0, 0, 0, 0, 0, 0].repeat(9)),
            "shop icmp_unsupported",
        );
        let (probe, body) = solicitation([0; 16], ENDPOINT, &MY_OPTION);
        bench.refused("a probe that names its sender", "ca", &probe.icmp(135, &body), "shop malformed");
        let (probe, body) = solicitation([0; 16], ENDPOINT, &[]);
        let direct = Packet6 { to: ENDPOINT, ..probe };
        bench.refused("a probe to one host", "ca", &direct.icmp(135, &body), "shop malformed");
        let (other, body) = solicitation(CLIENT, six(6), &MY_OPTION);
        bench.refused("for another", "ca", &other.icmp(135, &body), "shop passed");
        let (forged, body) = solicitation(ENDPOINT, six(6), &MY_OPTION);
        bench.refused("in the endpoint's name", "ca", &forged.icmp(135, &body), "shop spoofed_source");
        let claim = [&[0x20, 0, 0, 0][..], &ENDPOINT, &[2, 1], &ME].concat();
        bench.refused("a claim to be the endpoint", "ca", &good.icmp(136, &claim), "shop spoofed_source");
        let claim = [&[0x20, 0, 0, 0][..], &CLIENT, &[2, 1], &ME].concat();
        bench.refused("what a host says of itself", "ca", &good.icmp(136, &claim), "shop passed");
    }
}

#[test]
fn echo_is_answered_and_what_does_not_belong_is_dropped_by_name_or_passed_untouched() {
    for bench in benches() {
        let ping = client(80, Packet::tcp(0));
        let body = [0x12, 0x34, 0, 1, b'h', b'i', b'!'];
        let out = bench.expect("echo", "ca", &ping.icmp(128, &body), REDIRECT, &[("shop echo_reply", 1)]);
        let inner = Packet { to_mac: ME, from_mac: macs(&out).1, ..Packet::tcp(0) };
        assert_eq!(out, Packet6::of(ENDPOINT, CLIENT, inner).icmp(129, &body));
        for ttl in [1, 255] {
            let ping = client(80, Packet { ttl, ..Packet::tcp(0) });
            assert_eq!(bench.run("ca", &ping.icmp(128, &body)).1, out, "the reply has hops of its own");
        }
        bench.refused("an error about nothing", "ca", &ping.icmp(1, &[0; 52]), "shop icmp_malformed");
        bench.refused("other ICMPv6", "ca", &ping.icmp(130, &[0; 44]), "shop icmp_unsupported");

        let syn = client(81, Packet::tcp(SYN));
        let from = |from: Ip6| Packet6 { from, ..syn.clone() }.build();
        let mut mapped = [0; 16];
        mapped[10..].copy_from_slice(&[0xff, 0xff, 10, 0, 1, 5]);
        let mut link_local = six(5);
        link_local[..2].copy_from_slice(&[0xfe, 0x80]);
        bench.refused("an IPv4 address in disguise", "ca", &from(mapped), "shop malformed");
        bench.refused("outside the VPC", "ca", &from([0xfd; 16]), "shop source_outside_vpc");
        bench.refused("link-local", "ca", &from(link_local), "shop source_outside_vpc");
        bench.refused("from the endpoint's own address", "ca", &from(ENDPOINT), "shop spoofed_source");
        mapped[12..].copy_from_slice(&ENDPOINT4);
        bench.refused(
            "to an IPv4 address in disguise",
            "ca",
            &Packet6 { to: mapped, ..syn.clone() }.build(),
            "shop malformed",
        );
        bench.refused(
            "to another address",
            "ca",
            &Packet6 { to: six(8), ..syn.clone() }.build(),
            "shop passed",
        );
        bench.refused("unlisted port", "ca", &client(82, Packet::tcp(SYN)).build(), "shop no_listener");
        bench.refused(
            "datagrams to a listener for TCP",
            "ca",
            &client(80, Packet::udp()).build(),
            "shop no_listener",
        );
        let without = client(81, Packet { no_checksum: true, ..Packet::udp() });
        bench.refused("a datagram without a checksum", "ca", &without.build(), "shop malformed");
        for (next, reason) in [
            (0, "extension_header"),
            (43, "extension_header"),
            (50, "protocol_unsupported"),
            (51, "extension_header"),
            (59, "protocol_unsupported"),
            (60, "extension_header"),
            (132, "protocol_unsupported"),
            (135, "extension_header"),
            (254, "extension_header"),
        ] {
            let frame = syn.ipv6(next, &[6, 0, 0, 0, 0, 0, 0, 0]);
            bench.refused(&format!("next header {next}"), "ca", &frame, &format!("shop {reason}"));
            let elsewhere = Packet6 { to: six(8), ..syn.clone() }.ipv6(next, &[6, 0, 0, 0, 0, 0, 0, 0]);
            bench.refused(&format!("next header {next} to another"), "ca", &elsewhere, "shop passed");
        }
        let provider = |inner| Packet6::of(six(0x21), BALANCER, inner).build();
        bench.refused("the provider opens", "t1", &provider(Packet::tcp(SYN)), "payments provider_initiated");
        bench.refused(
            "a datagram of no flow",
            "t1",
            &provider(Packet { to_port: 20000, ..Packet::udp() }),
            "payments no_flow",
        );
    }
}

#[test]
fn a_stray_segment_over_ipv6_is_answered_with_the_reset_that_the_rfc_asks_for() {
    for bench in benches() {
        for (name, flags, payload, seq, ack, answer) in [
            ("an ACK", ACK, &b""[..], 77, 0, RST),
            ("data with ACK", ACK | PSH, b"late", 77, 0, RST),
            ("data without ACK", PSH, b"late", 0, 1004, RST | ACK),
            ("FIN with data", FIN, b"odd", 0, 1004, RST | ACK),
        ] {
            let sent = client(81, Packet { payload: payload.to_vec(), ack: 77, ..Packet::tcp(flags) });
            let out = bench.expect(name, "ca", &sent.build(), REDIRECT, &[("shop reset_no_flow", 1)]);
            let (to_mac, from_mac) = (sent.inner.from_mac, sent.inner.to_mac);
            let reset = Packet {
                from_port: 81,
                to_port: 40000,
                to_mac,
                from_mac,
                window: 0,
                seq,
                ack,
                ..Packet::tcp(answer)
            };
            assert_eq!(out, Packet6::of(ENDPOINT, CLIENT, reset).build(), "{name}");
        }
        bench.refused("a RST", "ca", &client(81, Packet::tcp(RST)).build(), "shop no_flow");
    }
}

#[test]
fn an_ipv6_packet_cut_off_anywhere_or_lying_about_any_length_is_never_forwarded_and_always_accounted_once() {
    for bench in benches() {
        let whole = client(81, Packet { payload: b"0123456789".to_vec(), ..Packet::tcp(SYN) }).build();
        let once = |name: &str, frame: &[u8]| {
            let before = bench.world.state();
            let (verdict, _) = bench.run("ca", frame);
            let moved = changes(&before, &bench.world.state());
            assert!(matches!(&moved[..], [(_, 1)]), "{name}: {moved:?}");
            assert!(verdict == DROP || verdict == PASS, "{name}: verdict {verdict}");
        };
        // A test run makes no socket buffer of less than an IP header.
        let least = if bench.is_xdp() { 14 } else { 54 };
        for length in least..whole.len() {
            once(&format!("cut to {length}"), &whole[..length]);
        }
        let lies: [(&str, usize, Vec<u8>); 3] = [
            ("version", 14, vec![0x00, 0x40, 0x50, 0x70, 0xf0]),
            ("payload length", 19, (0..20).chain(31..=255).collect()),
            ("data offset", 66, (0..5).chain(8..16).map(|it| it << 4).collect()),
        ];
        for (name, at, values) in lies {
            for value in values {
                let mut frame = whole.clone();
                frame[at] = value;
                once(&format!("{name} {value:#x}"), &frame);
            }
        }
        let (probe, body) = solicitation(CLIENT, ENDPOINT, &MY_OPTION);
        let question = probe.icmp(135, &body);
        for length in least..question.len() {
            once(&format!("a question cut to {length}"), &question[..length]);
        }
    }
}

/// What a consumer gets from a port of its endpoint.
fn fetch(world: &World, consumer: &str, host: &str, port: u16) -> String {
    world.shell(consumer, &format!("curl -gsS --max-time 5 'http://{host}:{port}/'"))
}

#[test]
fn real_clients_of_both_families_reach_servers_of_both_and_health_is_checked_over_ipv6() {
    let mut world = World::dualstack(&dualstack("", CHECKED), &ENDS);
    let first = world.serve("t1");
    world.serve("t2");
    let states = |world: &World| -> Vec<String> {
        let targets = world.json("targets");
        targets.as_array().unwrap().iter().map(|it| it["state"].as_str().unwrap().to_owned()).collect()
    };
    eventually("all targets are healthy", || states(&world).iter().all(|it| it == "healthy").then_some(()));
    for consumer in ["ca", "cb"] {
        for host in ["10.0.9.9", "[fd00::99]"] {
            for port in [80, 81] {
                assert!(
                    ["t1", "t2"].contains(&&*fetch(&world, consumer, host, port)),
                    "{consumer} {host} {port}"
                );
            }
        }
        world.shell(consumer, "ping -6 -c 2 -W 2 fd00::99");
    }
    // The same source port from the same address, twenty megabytes at once, in every combination.
    let line = |host: &str, port: u16, local: u16| {
        format!("curl -gsSf --max-time 30 --local-port {local} -o /dev/null 'http://{host}:{port}/large'")
    };
    for (host, port, local) in [("[fd00::99]", 81, 40001), ("[fd00::99]", 80, 40002), ("10.0.9.9", 81, 40003)]
    {
        let both = ["ca", "cb"].map(|it| world.spawn(it, "sh", &["-c", &line(host, port, local)]));
        for child in both {
            assert!(world.finished(child), "20 MiB from {host}:{port}");
        }
    }
    let explained =
        world.privatelink(&["explain", "--from", "shop", "tcp", "[fd00::5]:41000", "[fd00::99]:80"]);
    let said = String::from_utf8_lossy(&explained.stdout).into_owned();
    for part in ["fd00::99 is ours in shop", "fd00::5 is within the CIDRs", "forwarded: 10.0.1.10:"] {
        assert!(said.contains(part), "{part} in:\n{said}");
    }
    let chosen = world.privatelink(&["flows", "--json", "--target", "fd00::21", "--endpoint", "shop"]);
    let chosen: serde_json::Value = serde_json::from_slice(&chosen.stdout).unwrap();
    assert!(chosen.as_array().unwrap().iter().all(|it| it["target"] == "[fd00::21]:8080"), "{chosen}");
    world.kill(first);
    eventually("the death is noticed over both families", || {
        (states(&world).iter().filter(|it| *it == "unhealthy").count() == 2).then_some(())
    });
    for (host, port) in [("[fd00::99]", 81), ("[fd00::99]", 80), ("10.0.9.9", 81)] {
        assert_eq!(fetch(&world, "ca", host, port), "t2");
    }
}

#[test]
fn a_host_that_wants_an_endpoints_address_learns_that_it_is_taken() {
    let world = World::dualstack(&dualstack("", UNCHECKED), &ENDS);
    world.shell("ca", "sysctl -qw net.ipv6.conf.eth0.accept_dad=1 net.ipv6.conf.eth0.dad_transmits=1");
    world.shell("ca", "ip addr add fd00::77/64 dev eth0");
    // With a nonce (RFC 7527) and without: then the answer is longer than the probe.
    for nonce in [1, 0] {
        world.shell("ca", &format!("sysctl -qw net.ipv6.conf.eth0.enhanced_dad={nonce}"));
        world.shell("ca", "ip addr add fd00::99/64 dev eth0");
        eventually("the probe for the endpoint's address has failed", || {
            world.shell("ca", "ip -6 addr show dev eth0 dadfailed").contains("fd00::99").then_some(())
        });
        world.shell("ca", "ip addr del fd00::99/64 dev eth0");
    }
    eventually("the one for a free address has not", || {
        world.shell("ca", "ip -6 addr show dev eth0 -tentative").contains("fd00::77").then_some(())
    });
}

#[test]
fn a_dropped_ipv6_packet_is_named_in_the_log_when_asked() {
    let mut world = World::dualstack(&dualstack("", UNCHECKED), &ENDS);
    assert_eq!(world.stop(), Some(0));
    world.start(&["--log-drops"]);
    let refused =
        world.shell("ca", "curl -gsS --max-time 1 --local-port 41000 'http://[fd00::99]:82/' || true");
    assert!(refused.is_empty(), "{refused}");
    eventually("the drop is named", || {
        world.said().contains("dropped no_listener: ca tcp [fd00::5]:41000 > [fd00::99]:82").then_some(())
    });
}

#[test]
fn wide_flows_survive_the_agent_and_a_change_of_their_tables_size_and_end_with_their_endpoints() {
    let sized = |flows: u32| {
        dualstack(&format!("[limits]\nipv6_flows = {flows}\npending_ipv6_flows = 1024\n"), UNCHECKED)
    };
    let mut world = World::dualstack(&sized(4096), &ENDS);
    world.serve("t1");
    world.serve("t2");
    let line = |host: &str, port: u16| {
        format!("curl -gsSf --max-time 60 --limit-rate 3M -o /dev/null 'http://{host}:{port}/large'")
    };
    let transfers: Vec<_> = [("ca", "[fd00::99]", 81), ("cb", "[fd00::99]", 80), ("ca", "10.0.9.9", 81)]
        .map(|(consumer, host, port)| world.spawn(consumer, "sh", &["-c", &line(host, port)]))
        .into();
    let wide = |world: &World| world.state()["map established6"];
    eventually("the transfers run", || (wide(&world) >= 6).then_some(()));
    world.kill_agent();
    world.start(&[]);
    std::fs::write(world.config(), sized(8192)).unwrap();
    assert_eq!(world.stop(), Some(0));
    world.start(&[]);
    assert!(world.said().contains("the sizes that [limits] says"), "{}", world.said());
    assert_eq!(wide(&world), 6);
    for transfer in transfers {
        assert!(world.finished(transfer), "a transfer was cut off");
    }
    // Without its IPv6 address, an endpoint has no such flows, and the sweep takes them away.
    let (code, said) = world.apply(&sized(8192).replacen(r#"["10.0.9.9", "fd00::99"]"#, r#""10.0.9.9""#, 1));
    assert_eq!(code, Some(0), "{said}");
    let refused = world.shell("ca", "curl -gsS --max-time 1 'http://[fd00::99]:81/' || true");
    assert_eq!(refused, "");
    assert!(!fetch(&world, "ca", "10.0.9.9", 81).is_empty(), "and its IPv4 address serves on");
    eventually("the sweep has taken them away, and left the others", || {
        let flows = world.json("flows");
        let of =
            |vpc: &str| flows.as_array().unwrap().iter().filter(|it| it["vpc"] == vpc).collect::<Vec<_>>();
        let gone = of("shop").iter().all(|it| it["endpoint_address"] == "10.0.9.9:81");
        (gone && !of("shop").is_empty() && !of("bank").is_empty()).then_some(())
    });
}

/// The ICMPv6 error about `sent`, of a type and with this in the word behind its checksum, that comes from the address it was sent to.
fn error_about(sent: &Packet6, kind: u8, word: u32) -> Vec<u8> {
    let quoted = 54 + if sent.inner.protocol == 6 { 20 } else { 8 };
    let (from_mac, to_mac) = (sent.inner.to_mac, sent.inner.from_mac);
    let inner = Packet { from_mac, to_mac, ttl: 64, ..Packet::tcp(0) };
    let body = [&word.to_be_bytes()[..], &sent.build()[14..quoted]].concat();
    Packet6::of(sent.to, sent.from, inner).icmp(kind, &body)
}

#[test]
fn an_ipv6_packet_that_ends_here_or_is_too_large_is_reported_byte_by_byte() {
    for bench in benches() {
        // To targets of either family.
        for port in [80, 81] {
            let expiring = client(port, Packet { ttl: 1, ..Packet::tcp(SYN) });
            let told = bench.expect("SYN", "ca", &expiring.build(), REDIRECT, &[("shop time_exceeded", 1)]);
            assert_eq!(told, error_about(&expiring, 3, 0), "{port}");
            let syn = client(port, Packet { from_port: 42000, ..Packet::tcp(SYN) });
            assert_eq!(bench.run("ca", &syn.build()).0, REDIRECT);
            // What becomes IPv4 is twenty bytes shorter there.
            let fits = if port == 80 { 1520 } else { 1500 };
            for (length, told) in [(fits, false), (fits + 1, true)] {
                let payload = vec![7; length - 60];
                let data = client(port, Packet { from_port: 42000, payload, ..Packet::tcp(ACK) });
                let moved = if told { "shop fragmentation_needed" } else { "shop6 to_provider_packets" };
                let out = bench.expect("data", "ca", &data.build(), REDIRECT, &[(moved, 1)]);
                if told {
                    assert_eq!(out, error_about(&data, 2, u32::try_from(fits).unwrap()), "{port}");
                }
            }
        }
        let datagram = client(81, Packet { from_port: 42001, payload: vec![7; 1453], ..Packet::udp() });
        let moved = [("map pending6", 2), ("shop fragmentation_needed", 1)];
        let out = bench.expect("a datagram", "ca", &datagram.build(), REDIRECT, &moved);
        assert_eq!(out, error_about(&datagram, 2, 1500));
    }
}

#[test]
fn an_ipv4_packet_to_an_ipv6_target_must_leave_room_for_the_longer_header() {
    for bench in benches() {
        let sized = |length: usize, fragment: u16| Packet {
            to_port: 81,
            from_port: 42002,
            fragment,
            payload: vec![7; length - 28],
            ..Packet::udp()
        };
        assert_eq!(bench.run("ca", &sized(1480, 0x4000).build()).0, REDIRECT);
        let large = sized(1481, 0x4000);
        let out = bench.expect("data", "ca", &large.build(), REDIRECT, &[("shop fragmentation_needed", 1)]);
        let back = Packet {
            from: ENDPOINT4,
            to: CLIENT4,
            from_mac: large.to_mac,
            to_mac: large.from_mac,
            tos: 0xc0,
            id: 0,
            fragment: 0,
            ttl: 64,
            ..Packet::udp()
        };
        let told = |large: &Packet| {
            let body = [&[0, 0, 5, 0xc0][..], &large.build()[14..42]].concat();
            back.icmp_code(3, 4, &body)
        };
        assert_eq!(out, told(&large), "the largest fragment that fits");
        let may = sized(1481, 0);
        let out =
            bench.expect("without DF", "ca", &may.build(), REDIRECT, &[("shop fragmentation_needed", 1)]);
        assert_eq!(out, told(&may));
    }
}

#[test]
fn the_mss_is_lowered_over_ipv6_and_between_the_families() {
    for bench in benches() {
        let options = |mss: u16| [&[2, 4][..], &mss.to_be_bytes()].concat();
        let syn = |mss| Packet { tcp_options: options(mss), ..Packet::tcp(SYN) };
        // The longer of the two headers counts.
        for port in [80, 81] {
            let out = bench.run("ca", &client(port, syn(65000)).build()).1;
            let at = if port == 80 { 54 } else { 74 };
            assert_eq!(out[at..at + 4], options(1440), "{port}");
            let out = bench.run("cb", &client(port, syn(900)).build()).1;
            assert_eq!(out[at..at + 4], options(900), "{port}");
        }
        let out = bench.run("ca", &Packet { to_port: 81, ..syn(65000) }.build()).1;
        assert_eq!(out[74..78], options(1440));
    }
}

#[test]
fn what_ipv6_says_to_groups_and_to_others_is_passed_untouched() {
    for bench in benches() {
        let to = |to: Ip6, ttl: u8| Packet6::of(CLIENT, to, Packet { ttl, ..Packet::tcp(SYN) });
        let group = |last: u8| {
            let mut address = six(last);
            address[..2].copy_from_slice(&[0xff, 2]);
            address
        };
        let other = six(8);
        let datagram = |to_port, to| Packet6::of(CLIENT, to, Packet { to_port, ..Packet::udp() }).build();
        for (name, frame) in [
            ("a router solicitation", to(group(2), 255).icmp(133, &[0; 4])),
            ("a router advertisement", to(group(1), 255).icmp(134, &[0; 12])),
            ("a listener report", to(group(0x16), 1).icmp(143, &[0; 4])),
            ("DHCPv6", datagram(547, group(2))),
            ("mDNS", datagram(5353, group(0xfb))),
            ("an echo request", to(other, 64).icmp(128, &[0; 8])),
            ("an error", to(other, 64).icmp(1, &[&[0; 4][..], &to(CLIENT, 64).build()[14..74]].concat())),
            ("another message", to(other, 64).icmp(144, &[0; 8])),
            ("at its last hop", to(other, 1).build()),
            ("a martian", Packet6 { from: six(0).map(|_| 0), ..to(other, 64) }.build()),
            (
                "no port",
                Packet6::of(CLIENT, other, Packet { from_port: 0, to_port: 0, ..Packet::udp() }).build(),
            ),
        ] {
            bench.refused(name, "ca", &frame, "shop passed");
        }
    }
}

#[test]
fn of_ports_that_are_zero_over_ipv6_the_destination_is_no_listeners_and_the_source_is_anybodys() {
    for bench in benches() {
        for inner in [Packet::tcp(SYN), Packet::udp()] {
            let frame = client(0, inner).build();
            bench.refused("destination", "ca", &frame, "shop no_listener");
        }
        let frame = client(81, Packet { from_port: 0, ..Packet::udp() }).build();
        let out = bench.expect("source", "ca", &frame, REDIRECT, &slice(&opened("shop6", "pending6")));
        assert_eq!(addresses6(&out).0, BALANCER);
        let mut lying = client(81, Packet { payload: vec![7; 20], ..Packet::udp() }).build();
        for length in [7_u16, 29] {
            lying[58..60].copy_from_slice(&length.to_be_bytes());
            bench.refused("a UDP length that lies", "ca", &lying, "shop malformed");
        }
    }
}
