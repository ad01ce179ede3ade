//! Packets that are not what a workload usually sends, through the programs that the kernel runs: every byte of what comes of them. XDP's
//! and TCX's do the same.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests: a panic with its place is what is wanted")]

use privatelink_tests::bench::{
    BALANCER, Bench, CLIENT, DROP, ENDPOINT, REDIRECT, Segments, as_slice, both, each, opened, reply, side,
    translated,
};
use privatelink_tests::packet::{ACK, Packet, SYN, addresses};
use privatelink_tests::world::{UNCHECKED, World, changes, config, eventually};

/// Sets the MTU of both ends of a link, and waits until the path knows it.
fn set_mtu(bench: &Bench, link: &str, mtu: u32) {
    bench.world.shell("dp", &format!("ip link set {link} mtu {mtu}"));
    bench.world.shell(link, &format!("ip link set eth0 mtu {mtu}"));
    eventually("the agent has followed the MTU", || {
        let status = bench.world.json("status");
        let rows = status[0]["interfaces"].as_array()?.clone();
        rows.iter().any(|row| row["interface"] == link && row["mtu"] == mtu).then_some(())
    });
}

/// The ICMP error about `sent` that comes from the address it was sent to: the header of `sent`, and eight bytes of what follows.
fn error_about(sent: &Packet, kind: u8, code: u8, mtu: u16) -> Vec<u8> {
    let [a, b] = mtu.to_be_bytes();
    let quoted = if sent.protocol == 6 { 14..54 } else { 14..42 };
    let body = [&[0, 0, a, b][..], &sent.build()[quoted]].concat();
    let (from, to, from_mac, to_mac) = (sent.to, sent.from, sent.to_mac, sent.from_mac);
    Packet { from, to, from_mac, to_mac, tos: 0xc0, id: 0, fragment: 0, ttl: 64, ..sent.clone() }
        .icmp_code(kind, code, &body)
}

/// An open connection of the shop's; returns its SYN as the target got it.
fn connect(bench: &Bench) -> Vec<u8> {
    let out = bench.run("ca", &Packet::tcp(SYN).build()).1;
    let (.., target, _) = addresses(&out);
    assert_eq!(bench.run(side(target), &reply(&out, SYN | ACK, b"").build()).0, REDIRECT);
    assert_eq!(bench.run("ca", &Packet::tcp(ACK).build()).0, REDIRECT);
    out
}

/// The options of a SYN that announces an MSS, at an even or an odd place among others, or not at all.
fn options(mss: u16) -> [(&'static str, Vec<u8>); 5] {
    let [a, b] = mss.to_be_bytes();
    [
        ("first", vec![2, 4, a, b, 4, 2, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8, 1, 3, 3, 7]),
        ("last", vec![4, 2, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8, 3, 3, 7, 1, 2, 4, a, b]),
        ("at an odd place", vec![1, 2, 4, a, b, 3, 3, 7]),
        ("behind the end of the options", vec![1, 0, 2, 4, a, b, 0, 0]),
        ("of another length", vec![2, 5, a, b, 0, 1, 1, 1]),
    ]
}

/// The same options with another MSS, where there is one that counts.
fn lowered(name: &str, mss: u16, to: u16) -> Vec<u8> {
    let counts = !matches!(name, "behind the end of the options" | "of another length");
    options(if counts && to < mss { to } else { mss }).into_iter().find(|(it, _)| *it == name).unwrap().1
}

#[test]
fn the_mss_of_both_handshakes_segments_is_lowered_to_what_both_sides_can_carry_wherever_it_stands() {
    each("", |bench| {
        let mut port = 41000;
        for (mtu, mss, expected) in
            [(1500, 1460, 1460), (1500, 65495, 1460), (1300, 1460, 1260), (1300, 536, 536)]
        {
            set_mtu(bench, "ca", mtu);
            for (name, options) in options(mss) {
                port += 1;
                let syn = Packet { tcp_options: options, from_port: port, ..Packet::tcp(SYN) };
                let (verdict, out) = bench.run("ca", &syn.build());
                let (_, nat, target, _) = addresses(&out);
                let at_target = Packet {
                    from: BALANCER,
                    from_port: nat,
                    to: target,
                    to_port: 8080,
                    to_mac: out[0..6].try_into().unwrap(),
                    from_mac: out[6..12].try_into().unwrap(),
                    tcp_options: lowered(name, mss, expected),
                    ttl: 63,
                    ..syn.clone()
                };
                assert_eq!(
                    (verdict, out.clone()),
                    (REDIRECT, at_target.build()),
                    "SYN, {mss} {name} at {mtu}"
                );

                let answer = Packet { tcp_options: syn.tcp_options.clone(), ..reply(&out, SYN | ACK, b"") };
                let (verdict, out) = bench.run(side(target), &answer.build());
                let at_client = Packet {
                    from: ENDPOINT,
                    from_port: 80,
                    to: CLIENT,
                    to_port: port,
                    to_mac: syn.from_mac,
                    from_mac: out[6..12].try_into().unwrap(),
                    tcp_options: lowered(name, mss, expected),
                    ttl: 63,
                    ..answer
                };
                assert_eq!((verdict, out), (REDIRECT, at_client.build()), "SYN-ACK, {mss} {name} at {mtu}");
            }
        }
    });
}

#[test]
fn a_syn_without_an_mss_gets_none_and_one_whose_options_lie_is_left_as_it_is() {
    each("", |bench| {
        let lies: [&[u8]; 6] =
            [&[], &[3, 0, 2, 4], &[3, 1, 2, 4], &[8, 255, 2, 4], &[2, 4, 0, 0], &[1, 1, 1, 1, 1, 1, 2, 4]];
        for (number, options) in lies.iter().enumerate() {
            let from_port = 42000 + u16::try_from(number).unwrap();
            let syn = Packet { tcp_options: options.to_vec(), from_port, ..Packet::tcp(SYN) };
            let (verdict, out) = bench.run("ca", &syn.build());
            assert_eq!((verdict, &out[54..]), (REDIRECT, *options), "{options:?}");
        }
    });
}

#[test]
fn an_endpoints_own_mtu_lowers_the_mss_too() {
    each("", |bench| {
        let small = std::fs::read_to_string(bench.world.config()).unwrap().replacen(
            "addresses = { a = \"10.0.9.9\" }",
            "addresses = { a = \"10.0.9.9\" }\nmtu = 1000",
            1,
        );
        let (code, said) = bench.world.apply(&small);
        assert_eq!(code, Some(0), "{said}");
        for (interface, expected) in [("ca", 1000 - 40), ("cb", 1460_u16)] {
            let syn = Packet { tcp_options: vec![2, 4, 0xff, 0xff], ..Packet::tcp(SYN) };
            let out = bench.run(interface, &syn.build()).1;
            assert_eq!(out[56..58], expected.to_be_bytes(), "{interface}");
        }
    });
}

#[test]
fn a_packet_whose_ttl_ends_is_answered_from_the_address_that_it_was_sent_to_on_either_side() {
    each("", |bench| {
        for ttl in [0, 1] {
            for sent in [Packet { ttl, ..Packet::tcp(SYN) }, Packet { ttl, ..Packet::udp() }] {
                // A traceroute's port may be any.
                for to_port in [sent.to_port, 33434] {
                    let sent = Packet { to_port, ..sent.clone() };
                    let out =
                        bench.expect("expired", "ca", &sent.build(), REDIRECT, &[("shop time_exceeded", 1)]);
                    assert_eq!(out, error_about(&sent, 11, 0, 0), "TTL {ttl} {sent:?}");
                }
            }
        }
        let syn = connect(bench);
        let (.., target, _) = addresses(&syn);
        assert_eq!(syn[22], 63, "one hop");
        let data = Packet { ttl: 1, payload: vec![7; 100], ..Packet::tcp(ACK) };
        let out = bench.expect("of a flow", "ca", &data.build(), REDIRECT, &[("shop time_exceeded", 1)]);
        assert_eq!(out, error_about(&data, 11, 0, 0));
        let back = Packet { ttl: 1, ..reply(&syn, ACK, b"x") };
        let out =
            bench.expect("back", side(target), &back.build(), REDIRECT, &[("payments time_exceeded", 1)]);
        assert_eq!(out, error_about(&back, 11, 0, 0));
        let last = Packet { ttl: 2, ..Packet::tcp(ACK) };
        assert_eq!(bench.run("ca", &last.build()).1[22], 1, "the next hop's business");
    });
}

#[test]
fn what_does_not_fit_is_answered_with_the_mtu_whether_or_not_it_may_be_fragmented_and_later_fragments_are_dropped()
 {
    each("", |bench| {
        let syn = connect(bench);
        let (_, nat, target, _) = addresses(&syn);
        set_mtu(bench, "ca", 1300);
        // Towards the consumer, whose interface takes less than the target's.
        let sized = |length: usize| Packet { payload: vec![5; length - 40], ..reply(&syn, ACK, b"") };
        let fits = sized(1300);
        bench.expect("it fits", side(target), &fits.build(), REDIRECT, &[("shop to_consumer_packets", 1)]);
        let large = sized(1301);
        let out = bench.expect(
            "one more",
            side(target),
            &large.build(),
            REDIRECT,
            &[("payments fragmentation_needed", 1)],
        );
        assert_eq!(out, error_about(&large, 3, 4, 1300));
        let may = Packet { fragment: 0, ..large.clone() };
        let told = [("payments fragmentation_needed", 1)];
        let out = bench.expect("it may be fragmented", side(target), &may.build(), REDIRECT, &told);
        assert_eq!(out, error_about(&may, 3, 4, 1300));
        // Towards the target, whose interface takes less than the endpoint.
        set_mtu(bench, "ca", 1500);
        set_mtu(bench, side(target), 1400);
        let data = Packet { payload: vec![5; 1361], ..Packet::tcp(ACK) };
        let out = bench.expect("forth", "ca", &data.build(), REDIRECT, &[("shop fragmentation_needed", 1)]);
        assert_eq!(out, error_about(&data, 3, 4, 1400));
        // Endpoints may keep silent, as AWS's do.
        let usual = std::fs::read_to_string(bench.world.config()).unwrap();
        let silent = usual.replace(
            "addresses = { a = \"10.0.9.9\" }",
            "addresses = { a = \"10.0.9.9\" }\nicmp_errors = false",
        );
        assert_eq!(bench.world.apply(&silent).0, Some(0));
        bench.refused("silently", "ca", &data.build(), "shop too_big");
        bench.refused("silently, too", "ca", &Packet { ttl: 1, ..data }.build(), "shop ttl_expired");
        let small =
            usual.replace("addresses = { a = \"10.0.9.9\" }", "addresses = { a = \"10.0.9.9\" }\nmtu = 600");
        assert_eq!(bench.world.apply(&small).0, Some(0));
        let data = Packet { payload: vec![5; 561], ..Packet::tcp(ACK) };
        let out = bench.expect(
            "the endpoint's own",
            "ca",
            &data.build(),
            REDIRECT,
            &[("shop fragmentation_needed", 1)],
        );
        assert_eq!(out, error_about(&data, 3, 4, 600));
        let data = Packet { payload: vec![5; 560], ..data };
        let out = bench.expect("it fits", "ca", &data.build(), REDIRECT, &[("shop to_provider_packets", 1)]);
        let expected = translated(&data, nat, target, &out);
        assert_eq!(out, expected);
    });
}

#[test]
fn an_endpoint_sends_a_hundred_icmp_errors_a_second_at_most_and_its_neighbour_is_none_the_worse() {
    each("", |bench| {
        let before = bench.world.state();
        let expiring = Packet { ttl: 1, ..Packet::tcp(SYN) }.build();
        let mut verdicts = [0u32; 5];
        for _ in 0..1000 {
            verdicts[bench.run("ca", &expiring).0 as usize] += 1;
        }
        let moved = changes(&before, &bench.world.state());
        let by = |name: &str| moved.iter().find(|(key, _)| key == name).map_or(0, |(_, by)| *by);
        let (sent, dropped) = (by("shop time_exceeded"), by("shop ttl_expired"));
        assert_eq!((sent + dropped, moved.len()), (1000, 2), "{moved:?}");
        assert_eq!((i64::from(verdicts[4]), i64::from(verdicts[1])), (sent, dropped));
        assert!(sent >= 100 && sent % 100 == 0 || dropped > 0, "{moved:?}");
        assert_eq!(bench.run("cb", &expiring).0, REDIRECT, "each has errors of its own");
        let first =
            bench.expect("a new flow", "ca", &Packet::tcp(SYN).build(), REDIRECT, &as_slice(&opened("shop")));
        assert_eq!(first[22], 63);
        assert!(dropped > 0 && verdicts[DROP as usize] > 0);
    });
}

/// What stands between two ends: a packet as it left, and what it was when it came.
struct Sent {
    name: &'static str,
    /// Where it arrived, and its bytes there.
    at: &'static str,
    arrived: Vec<u8>,
    /// Where it came from, and its bytes there.
    home: &'static str,
    left: Packet,
    counter: &'static str,
}

/// Packets of every kind, both ways: pending and established, TCP and UDP, with a checksum and without.
fn sent(bench: &Bench) -> Vec<Sent> {
    let mut all = Vec::new();
    let to_provider = |name, left: Packet| {
        let arrived = bench.run("ca", &left.build()).1;
        let at = side(addresses(&arrived).2);
        Sent { name, at, arrived, home: "ca", left, counter: "shop to_consumer_packets" }
    };
    let back = |name, of: &Sent, left: Packet| {
        let arrived = bench.run(of.at, &left.build()).1;
        Sent { name, at: "ca", arrived, home: of.at, left, counter: "shop to_provider_packets" }
    };
    let syn = to_provider("a SYN", Packet::tcp(SYN));
    let answer = back("a SYN-ACK", &syn, reply(&syn.arrived, SYN | ACK, b""));
    assert_eq!(bench.run("ca", &Packet::tcp(ACK).build()).0, REDIRECT);
    let data = to_provider("data", Packet { payload: b"odd".to_vec(), ..Packet::tcp(ACK) });
    let data_back = back("data back", &syn, reply(&syn.arrived, ACK, b"even"));
    all.extend([syn, answer, data, data_back]);
    for no_checksum in [false, true] {
        let from_port = 5000 + u16::from(no_checksum);
        let query = to_provider("a query", Packet { no_checksum, from_port, ..Packet::udp() });
        let answer = back("an answer", &query, Packet { no_checksum, ..reply(&query.arrived, 0, b"answer") });
        all.extend([query, answer]);
    }
    all
}

#[test]
fn an_icmp_error_reaches_whoever_sent_the_packet_as_if_it_came_from_its_own_peer_and_holds_the_packet_as_it_was_sent()
 {
    each("", |bench| {
        for sent in sent(bench) {
            let (from, _, to, _) = addresses(&sent.arrived);
            for (kind, code, word) in [
                (3, 3, [0; 4]),
                (3, 1, [0; 4]),
                (3, 4, [0, 0, 0x05, 0x14]),
                (11, 0, [0; 4]),
                (12, 0, [9, 0, 0, 0]),
            ] {
                // Not 37: half of a checksum stays as it is.
                for held in [28, 29, 36, 38, 40, sent.arrived.len() - 14] {
                    // From the peer itself, and from a router whose address nobody on the other side may know.
                    for source in [to, [10, 0, 77, 1], [203, 0, 113, 9]] {
                        let held = held.min(sent.arrived.len() - 14);
                        let about = Packet { from: source, to: from, tos: 0xc0, ..Packet::tcp(0) };
                        let frame =
                            about.icmp_code(kind, code, &[&word[..], &sent.arrived[14..14 + held]].concat());
                        let name = format!("{} {kind}/{code} with {held} bytes from {source:?}", sent.name);
                        // Each is counted alike; to look takes longer than the flow lives.
                        let out = if source == to && held == 28 {
                            bench.expect(&name, sent.at, &frame, REDIRECT, &[(sent.counter, 1)])
                        } else {
                            let (verdict, out) = bench.run(sent.at, &frame);
                            assert_eq!(verdict, REDIRECT, "{name}");
                            out
                        };
                        let mut original = sent.left.build()[14..].to_vec();
                        // As it left: one hop on.
                        original[8] -= 1;
                        let checksum = Packet { ttl: sent.left.ttl - 1, ..sent.left.clone() }.build();
                        original[10..12].copy_from_slice(&checksum[24..26]);
                        let expected = Packet {
                            from: sent.left.to,
                            to: sent.left.from,
                            ttl: 63,
                            to_mac: sent.left.from_mac,
                            from_mac: out[6..12].try_into().unwrap(),
                            ..about
                        };
                        let expected =
                            expected.icmp_code(kind, code, &[&word[..], &original[..held]].concat());
                        assert_eq!(out[6..], expected[6..], "{name}");
                        if sent.home == "ca" {
                            assert_eq!(out[..6], expected[..6], "{name}");
                        }
                    }
                }
            }
        }
    });
}

#[test]
fn an_icmp_error_that_is_forged_unrelated_or_cut_off_is_dropped_by_its_own_name_and_a_wrong_one_stays_wrong()
{
    each("", |bench| {
        let syn = connect(bench);
        let (from, nat, target, _) = addresses(&syn);
        let at = side(target);
        let about = Packet { from: target, to: from, ..Packet::tcp(0) };
        let error = |kind, held: &[u8]| about.icmp_code(kind, 3, &[&[0; 4], held].concat());
        let held = &syn[14..42];
        let changed = |at: usize, byte: u8| {
            let mut held = held.to_vec();
            held[at] = byte;
            error(3, &held)
        };
        for length in [0, 1, 19, 20, 24, 27] {
            bench.refused("cut off", at, &error(3, &held[..length]), "payments icmp_malformed");
        }
        bench.refused("options inside", at, &changed(0, 0x46), "payments icmp_malformed");
        bench.refused("IPv6 inside", at, &changed(0, 0x65), "payments icmp_malformed");
        bench.refused("sent by another", at, &changed(15, from[3] + 1), "payments icmp_forged");
        bench.refused("sent to another", at, &changed(19, target[3] + 9), "payments icmp_no_flow");
        bench.refused("another protocol", at, &changed(9, 17), "payments icmp_no_flow");
        bench.refused("no protocol of ours", at, &changed(9, 47), "payments icmp_no_flow");
        bench.refused(
            "another port",
            at,
            &changed(21, u8::try_from(nat & 0xff).unwrap() ^ 1),
            "payments icmp_no_flow",
        );
        bench.refused("a later fragment", at, &changed(7, 9), "payments icmp_no_flow");
        bench.refused("source quench", at, &error(4, held), "payments icmp_unsupported");
        bench.refused("a redirect", at, &error(5, held), "payments icmp_unsupported");
        bench.refused(
            "at its last hop",
            at,
            &Packet { ttl: 1, ..about.clone() }.icmp_code(3, 3, &[&[0; 4], held].concat()),
            "payments ttl_expired",
        );
        let spoofed = Packet { from, ..about.clone() };
        bench.refused(
            "in our name",
            at,
            &spoofed.icmp_code(3, 3, &[&[0; 4], held].concat()),
            "payments spoofed_source",
        );
        let large = [held, &[0; 1500]].concat();
        bench.refused("larger than it could be", at, &error(3, &large), "payments too_big");
        // The same in the wrong VPC is about nothing.
        let foreign = Packet { from: CLIENT, to: ENDPOINT, ..Packet::tcp(0) };
        let own =
            Packet { from: ENDPOINT, from_port: 80, to: CLIENT, to_port: 40000, ..Packet::tcp(ACK) }.build();
        bench.refused(
            "in another tenant's VPC",
            "cb",
            &foreign.icmp_code(3, 3, &[&[0; 4], &own[14..42]].concat()),
            "bank icmp_no_flow",
        );
        // A checksum that was wrong is as wrong as it was.
        let mut wrong = error(3, held);
        wrong[36] ^= 0x40;
        let right = bench.run(at, &error(3, held)).1;
        let mut out = bench.expect("wrong", at, &wrong, REDIRECT, &[("shop to_consumer_packets", 1)]);
        assert_ne!(out[36..38], right[36..38]);
        out[36..38].copy_from_slice(&right[36..38]);
        assert_eq!(out, right);
    });
}

/// The fragments of a packet, each with `size` bytes of its payload.
fn fragments(whole: &Packet, size: usize) -> Vec<Vec<u8>> {
    let bytes = whole.build()[34..].to_vec();
    let count = bytes.chunks(size).count();
    let fragment = |(number, part): (usize, &[u8])| {
        let more = if number + 1 < count { 0x2000 } else { 0 };
        let fragment = more | u16::try_from(number * size / 8).unwrap();
        Packet { fragment, ..whole.clone() }.ipv4(part)
    };
    bytes.chunks(size).enumerate().map(fragment).collect()
}

fn identification(frame: &[u8]) -> u16 {
    u16::from_be_bytes([frame[18], frame[19]])
}

fn datagram(id: u16, length: usize) -> Packet {
    let payload = (0..=250).cycle().take(length).collect();
    Packet { payload, id, fragment: 0, ..Packet::udp() }
}

#[test]
fn a_datagram_in_fragments_opens_a_flow_and_arrives_as_it_was_sent_in_any_order() {
    each("", |bench| {
        let mut ids = std::collections::BTreeSet::new();
        for (round, (consumer, interface)) in [("shop", "ca"), ("bank", "cb")].into_iter().enumerate() {
            // Both tenants send the same: addresses, ports and identification.
            let query = datagram(7, 4000);
            let pieces = fragments(&query, 1480);
            let first = bench.expect("first", interface, &pieces[0], REDIRECT, &as_slice(&opened(consumer)));
            let (_, nat, target, _) = addresses(&first);
            let id = identification(&first);
            assert!(ids.insert((target, id)), "datagrams of two tenants are never mistaken for one");
            let expected = Packet { id, ..query.clone() };
            let expected =
                Packet { from: BALANCER, from_port: nat, to: target, to_port: 8080, ttl: 63, ..expected };
            let expected = fragments(&expected, 1480);
            assert_eq!(first[12..], expected[0][12..], "{consumer}");
            let forth = format!("{consumer} to_provider_packets");
            for number in [[1, 2], [2, 1]][round] {
                let out = bench.expect("later", interface, &pieces[number], REDIRECT, &[(&forth, 1)]);
                assert_eq!(out[..12], first[..12], "it goes the same way");
                assert_eq!(out[12..], expected[number][12..], "{consumer} {number}");
            }
            // And the answer, which establishes the flow.
            let answer = Packet { payload: vec![9; 3000], id: 77, fragment: 0, ..reply(&first, 0, b"") };
            let back = format!("{consumer} to_consumer_packets");
            let established = [(back.as_str(), 1), ("map pending", -2), ("map established", 2)];
            let pieces = fragments(&answer, 1480);
            let out = bench.expect("answer", side(target), &pieces[0], REDIRECT, &established);
            let at_client = Packet {
                from: ENDPOINT,
                from_port: 53,
                to: CLIENT,
                to_port: 40000,
                ttl: 63,
                ..answer.clone()
            };
            let expected = fragments(&Packet { id: identification(&out), ..at_client }, 1480);
            assert_eq!(out[12..], expected[0][12..]);
            for number in [2, 1] {
                let out = bench.expect("its rest", side(target), &pieces[number], REDIRECT, &[(&back, 1)]);
                assert_eq!(out[12..], expected[number][12..], "{consumer} {number}");
            }
        }
    });
}

#[test]
fn fragments_that_overlap_come_too_early_twice_or_too_small_are_dropped_by_name() {
    each("", |bench| {
        let whole = datagram(9, 4000);
        let pieces = fragments(&whole, 1480);
        bench.held("without its first", "ca", &pieces[1], "shop");
        assert_eq!(bench.run("ca", &pieces[0]).0, REDIRECT);
        bench.held("of another datagram", "ca", &fragments(&datagram(10, 4000), 1480)[1], "shop");
        bench.held("of another tenant's", "cb", &pieces[1], "bank");
        for (name, from) in [("from outside", [10, 1, 1, 5]), ("in our name", ENDPOINT)] {
            let stranger = fragments(&Packet { from, ..datagram(10, 4000) }, 1480);
            bench.refused(name, "ca", &stranger[1], "shop fragment_unknown");
        }
        let at = |fragment: u16, length: usize| Packet { fragment, ..whole.clone() }.ipv4(&vec![3; length]);
        for (name, frame) in [
            ("into the first one's bytes", at(0x2000 | 1, 1480)),
            ("into the first one's end", at(0x2000 | 184, 1480)),
            ("behind a gap that is no fragment's", at(0x2000 | 186, 1480)),
            ("longer than the first", at(0x2000 | 185, 1488)),
            ("shorter, and not the last", at(0x2000 | 185, 1472)),
            ("further than any", at(185 * 44, 500)),
        ] {
            let reason = if name == "further than any" { "shop malformed" } else { "shop fragment_overlap" };
            bench.refused(name, "ca", &frame, reason);
        }
        assert_eq!(bench.run("ca", &pieces[1]).0, REDIRECT);
        bench.refused("twice", "ca", &pieces[1], "shop fragment_overlap");
        assert_eq!(bench.run("ca", &pieces[2]).0, REDIRECT);
        bench.refused("tiny", "ca", &fragments(&datagram(11, 400), 40)[0], "shop fragment_tiny");
        bench.held("its rest", "ca", &fragments(&datagram(11, 400), 40)[1], "shop");
        bench.refused("not in units of eight", "ca", &at(0x2000, 1481), "shop malformed");
        bench.refused("empty", "ca", &at(0x2000 | 185, 0), "shop malformed");
        let mut short = fragments(&datagram(12, 4000), 1480)[0].clone();
        short[38..40].copy_from_slice(&1480_u16.to_be_bytes());
        bench.refused("a UDP length that ends in the first", "ca", &short, "shop malformed");
        let refused = Packet { to_port: 54, ..datagram(13, 4000) };
        bench.refused("to no listener", "ca", &fragments(&refused, 1480)[0], "shop no_listener");
        bench.held("its rest", "ca", &fragments(&refused, 1480)[1], "shop");
        bench.refused(
            "to another",
            "ca",
            &Packet { fragment: 185, to: [10, 0, 9, 8], ..whole.clone() }.ipv4(&[0; 100]),
            "shop passed",
        );
        let expiring = Packet { ttl: 1, ..datagram(9, 4000) };
        bench.refused("at its last hop", "ca", &fragments(&expiring, 1480)[2], "shop fragment_overlap");
        let again = fragments(&datagram(9, 4000), 1480);
        assert_eq!(bench.run("ca", &again[0]).0, REDIRECT, "an identification comes again");
        bench.refused("at its last hop", "ca", &fragments(&expiring, 1480)[1], "shop ttl_expired");
        for protocol in [6, 1, 47] {
            let frame = Packet { protocol, fragment: 0x2000, ..whole.clone() }.ipv4(&[0; 1480]);
            bench.refused("not UDP", "ca", &frame, "shop fragment");
        }
    });
}

#[test]
fn every_row_of_the_page_about_packets_is_so() {
    each("", |bench| {
        let (tcp, elsewhere) = (Packet::tcp(SYN), [10, 0, 9, 8]);
        for (name, protocol) in
            [("IGMP", 2), ("GRE", 47), ("ESP", 50), ("AH", 51), ("SCTP", 132), ("the last", 255)]
        {
            let packet = |to| Packet { protocol, to, ..tcp.clone() }.ipv4(&[0x55; 40]);
            bench.refused(name, "ca", &packet(ENDPOINT), "shop protocol_unsupported");
            bench.refused(
                name,
                "t1",
                &Packet { from: [10, 0, 1, 21], protocol, to: BALANCER, ..tcp.clone() }.ipv4(&[0; 40]),
                "payments protocol_unsupported",
            );
            bench.refused(name, "ca", &packet(elsewhere), "shop passed");
        }
        for (name, to) in [
            ("multicast", [224, 0, 0, 251]),
            ("broadcast", [255; 4]),
            ("the network's broadcast", [10, 0, 255, 255]),
        ] {
            bench.refused(name, "ca", &Packet { to, ..Packet::udp() }.build(), "shop passed");
        }
        let dhcp = Packet { from: [0; 4], to: [255; 4], from_port: 68, to_port: 67, ..Packet::udp() };
        bench.refused("DHCP", "ca", &dhcp.build(), "shop passed");
        for (name, options) in [
            ("strict source route", vec![137, 7, 4, 10, 0, 9, 9, 0]),
            ("loose source route", vec![131, 7, 4, 10, 0, 9, 9, 0]),
            ("router alert", vec![148, 4, 0, 0]),
        ] {
            bench.refused(name, "ca", &Packet { options, ..tcp.clone() }.build(), "shop ip_options");
        }
        for from in [
            [0, 0, 0, 0],
            [0, 1, 2, 3],
            [127, 0, 0, 1],
            [224, 0, 0, 1],
            [239, 1, 1, 1],
            [240, 0, 0, 1],
            [255; 4],
        ] {
            bench.refused(
                "a martian",
                "ca",
                &Packet { from, ..tcp.clone() }.build(),
                "shop source_outside_vpc",
            );
            bench.refused(
                "a martian's datagram",
                "ca",
                &Packet { from, ..Packet::udp() }.build(),
                "shop source_outside_vpc",
            );
            bench.refused(
                "a martian's ping",
                "ca",
                &Packet { from, ..tcp.clone() }.icmp(8, &[0; 8]),
                "shop source_outside_vpc",
            );
            bench.refused(
                "a martian at the provider's",
                "t1",
                &Packet { from, to: BALANCER, ..tcp.clone() }.build(),
                "payments provider_initiated",
            );
        }
        bench.refused(
            "land",
            "ca",
            &Packet { from: ENDPOINT, from_port: 80, ..tcp.clone() }.build(),
            "shop spoofed_source",
        );
        bench.refused("port 0", "ca", &Packet { to_port: 0, ..tcp.clone() }.build(), "shop no_listener");
        bench.refused("port 0", "ca", &Packet { to_port: 0, ..Packet::udp() }.build(), "shop no_listener");
        let out = bench.expect(
            "from port 0",
            "cb",
            &Packet { from_port: 0, ..Packet::udp() }.build(),
            REDIRECT,
            &as_slice(&opened("bank")),
        );
        let (_, nat, target, _) = addresses(&out);
        assert_eq!(out, translated(&Packet { from_port: 0, ..Packet::udp() }, nat, target, &out));
        for (kind, name) in [
            (0, "echo reply"),
            (4, "source quench"),
            (5, "redirect"),
            (9, "router advertisement"),
            (13, "timestamp"),
        ] {
            bench.refused(name, "ca", &tcp.icmp(kind, &[0; 32]), "shop icmp_unsupported");
        }
    });
}

#[test]
fn a_wrong_checksum_stays_as_wrong_as_it_was() {
    each("", |bench| {
        connect(bench);
        for (name, sent) in
            [("TCP", Packet { payload: b"odd".to_vec(), ..Packet::tcp(ACK) }), ("UDP", Packet::udp())]
        {
            let right = bench.run("ca", &sent.build()).1;
            let transport = if name == "TCP" { 50 } else { 40 };
            for at in [24, 25, transport, transport + 1] {
                let mut frame = sent.build();
                frame[at] ^= 0x11;
                let (verdict, out) = bench.run("ca", &frame);
                let differs: Vec<usize> = (0..out.len()).filter(|it| out[*it] != right[*it]).collect();
                assert_eq!(verdict, REDIRECT, "{name} {at}");
                assert!(
                    !differs.is_empty() && differs.iter().all(|it| it / 2 == at / 2),
                    "{name} {at}: {differs:?}"
                );
            }
        }
    });
}

#[test]
fn a_first_datagram_goes_only_where_the_proxy_protocols_header_has_room_and_otherwise_opens_nothing() {
    let proxied = format!("{UNCHECKED} }}\nproxy_protocol_v2 = {{ enabled = true");
    for bench in both(|hook| World::new(&config(hook, &proxied))) {
        let sized = |port: u16, length: usize| Packet {
            from_port: port,
            payload: vec![7; length - 28],
            fragment: 0x4000,
            ..Packet::udp()
        };
        let large = sized(41000, 1401);
        let told =
            bench.expect("too large", "ca", &large.build(), REDIRECT, &[("shop fragmentation_needed", 1)]);
        assert_eq!(told, error_about(&large, 3, 4, 1400), "the largest that fits with the header");
        let silent = Packet { fragment: 0, ..large.clone() };
        let told = [("shop fragmentation_needed", 1)];
        let out = bench.expect("too large, and may be fragmented", "ca", &silent.build(), REDIRECT, &told);
        assert_eq!(out, error_about(&silent, 3, 4, 1400));
        let piece = Packet { from_port: 41000, ..datagram(9, 4000) };
        bench.refused("in fragments", "ca", &fragments(&piece, 1480)[0], "shop no_header_room");
        if !bench.is_xdp() {
            let before = bench.world.state();
            let many = sized(41000, 1028).build();
            assert_eq!(bench.run_segments("ca", &many, Segments(2, 500)).0, DROP);
            let after = bench.world.state();
            assert_eq!(changes(&before, &after), [("shop no_header_room".to_owned(), 2)], "yet to be cut");
        }
        // The next one opens the flow, with the header, and others follow without it, whatever they are.
        let fits = sized(41000, 1400);
        let out =
            bench.expect("as large as can be", "ca", &fits.build(), REDIRECT, &as_slice(&opened("shop")));
        assert_eq!((out.len(), &out[42..54]), (14 + 1500, &b"\r\n\r\n\0\r\nQUIT\n"[..]));
        assert_eq!(out[142..], fits.payload[..]);
        let forth = [("shop to_provider_packets", 1)];
        let out = bench.expect("another", "ca", &sized(41000, 1500).build(), REDIRECT, &forth);
        assert_eq!((out.len(), &out[42..]), (14 + 1500, &[7; 1472][..]));
        bench.expect("in fragments", "ca", &fragments(&piece, 1480)[0], REDIRECT, &forth);
    }
}

#[test]
fn nothing_is_answered_that_came_to_many_hosts_of_a_link_or_from_what_is_no_host() {
    each("", |bench| {
        let target = addresses(&connect(bench)).2;
        let late = Packet { from: target, to: BALANCER, from_port: 999, ..Packet::tcp(ACK) };
        let answered = [("payments reset_no_flow", 1)];
        bench.expect("a segment of no flow", side(target), &late.build(), REDIRECT, &answered);
        for to_mac in [[0xff; 6], [1, 0, 0x5e, 0, 0, 1], [0x33, 0x33, 0, 0, 0, 1]] {
            let many = Packet { to_mac, ..late.clone() };
            bench.refused("a segment of no flow", side(target), &many.build(), "payments link_layer_group");
            let last = Packet { to_mac, ttl: 1, ..Packet::tcp(ACK) };
            bench.refused("without more hops", "ca", &last.build(), "shop link_layer_group");
        }
        for from in [[0, 0, 0, 0], [127, 0, 0, 1], [224, 0, 0, 1], [239, 1, 1, 1], [240, 0, 0, 1], [255; 4]] {
            let strange = Packet { from, ..late.clone() };
            bench.refused("of no host", side(target), &strange.build(), "payments no_flow");
        }
    });
}

#[test]
fn no_byte_comes_to_a_target_before_the_proxy_protocols_header() {
    let proxied = format!("{UNCHECKED} }}\nproxy_protocol_v2 = {{ enabled = true");
    for bench in both(|hook| World::new(&config(hook, &proxied))) {
        // What would have the target take data with the SYN is taken out of it, at even and at odd places.
        for (port, kind, cookie, before) in [
            (1u16, 34, 0u8, 0),
            (2, 34, 8, 0),
            (3, 34, 8, 1),
            (4, 34, 16, 1),
            (5, 254, 2, 0),
            (6, 254, 18, 1),
        ] {
            let options = |kind: u8| {
                let length = 2 + cookie;
                let ours: Vec<u8> = if kind == 1 {
                    vec![1; length.into()]
                } else {
                    [&[kind, length][..], &vec![7; cookie.into()]].concat()
                };
                let mut all = [&[2, 4, 2, 88][..], &vec![1; before], &ours].concat();
                all.resize(all.len().next_multiple_of(4), 1);
                all
            };
            let asks = Packet { from_port: port, tcp_options: options(kind), ..Packet::tcp(SYN) };
            let (verdict, out) = bench.run("ca", &asks.build());
            let (_, nat, target, _) = addresses(&out);
            assert_eq!(verdict, REDIRECT);
            let plain = Packet { tcp_options: options(1), ..asks };
            assert_eq!(out, translated(&plain, nat, target, &out), "{cookie} bytes");
        }
        let said = |seq, flags| Packet { seq, payload: b"mine".to_vec(), ..Packet::tcp(flags) };
        let refused = |seq, flags, name| {
            bench.expect(name, "ca", &said(seq, flags).build(), DROP, &[("shop ahead_of_header", 1)]);
        };
        let syn = bench.run("ca", &Packet::tcp(SYN).build()).1;
        refused(1000, SYN, "with the SYN");
        refused(1001, ACK, "before the target has answered");
        let at = side(addresses(&syn).2);
        let greeting = Packet { ack: 1001, ..reply(&syn, SYN | ACK, b"") };
        assert_eq!(bench.run(at, &greeting.build()).0, REDIRECT);
        let acknowledged = Packet { seq: 1001, ..Packet::tcp(ACK) };
        assert_eq!(bench.run("ca", &acknowledged.build()).1.len(), 54 + 100, "it takes the header along");
        for seq in [1000, 997, 901, 900, 1, 1001 + (1 << 30)] {
            refused(seq, ACK, "before the first byte");
        }
        refused(1001, SYN | ACK, "a SYN-ACK");
        // Another SYN does not say where the target's stream begins.
        assert_eq!(bench.run("ca", &Packet { seq: 900, ..Packet::tcp(SYN) }.build()).0, REDIRECT);
        refused(901, ACK, "after another SYN");
        let (verdict, out) = bench.run("ca", &said(1001, ACK).build());
        assert_eq!(
            (verdict, &out[38..42], &out[54..66]),
            (REDIRECT, &1001u32.to_be_bytes()[..], &b"\r\n\r\n\0\r\nQUIT\n"[..])
        );
        assert_eq!(out[154..], b"mine"[..]);
    }
}

#[test]
fn what_is_to_no_address_of_ours_is_passed_untouched_whatever_it_is() {
    each("", |bench| {
        let elsewhere = Packet { to: [10, 0, 9, 8], ..Packet::tcp(SYN) };
        let quoted = &Packet::tcp(ACK).build()[14..54];
        let datagram = Packet { payload: vec![7; 100], ..elsewhere.clone() };
        for (name, frame) in [
            ("an echo request", elsewhere.icmp(8, &[0; 8])),
            ("an ICMP error", elsewhere.icmp(3, &[&[0; 4], quoted].concat())),
            ("source quench", elsewhere.icmp(4, &[&[0; 4], quoted].concat())),
            ("a redirect", elsewhere.icmp(5, &[&[0; 4], quoted].concat())),
            ("IP options", Packet { options: vec![1; 4], ..elsewhere.clone() }.build()),
            (
                "source routing",
                Packet { options: vec![131, 7, 4, 10, 0, 9, 9, 0], ..elsewhere.clone() }.build(),
            ),
            ("a source of ours", Packet { from: ENDPOINT, ..elsewhere.clone() }.build()),
            ("a martian", Packet { from: [127, 0, 0, 1], ..elsewhere.clone() }.build()),
            ("at its last hop", Packet { ttl: 1, ..elsewhere.clone() }.build()),
            ("no hop left", Packet { ttl: 0, ..elsewhere.clone() }.build()),
            ("too large", Packet { payload: vec![7; 1461], ..elsewhere.clone() }.build()),
            ("no port", Packet { from_port: 0, to_port: 0, ..elsewhere.clone() }.build()),
            ("a fragment", Packet { protocol: 6, fragment: 0x2000, ..elsewhere.clone() }.ipv4(&[0; 64])),
            ("SCTP", Packet { protocol: 132, ..elsewhere.clone() }.ipv4(&[0; 64])),
            ("a lying UDP length", {
                let mut frame = Packet { protocol: 17, ..datagram }.build();
                frame[38..40].copy_from_slice(&9000_u16.to_be_bytes());
                frame
            }),
        ] {
            bench.refused(name, "ca", &frame, "shop passed");
        }
    });
}

#[test]
fn headers_that_contradict_the_packet_are_malformed() {
    each("", |bench| {
        let changed = |of: &Packet, at: usize, to: &[u8]| {
            let mut frame = of.build();
            frame[at..at + to.len()].copy_from_slice(to);
            frame
        };
        let (tcp, udp) = (Packet::tcp(SYN), Packet { payload: vec![7; 20], ..Packet::udp() });
        for (name, frame) in [
            ("a header of four words", changed(&tcp, 14, &[0x44])),
            ("a total length beyond the frame", changed(&tcp, 16, &41_u16.to_be_bytes())),
            ("a total length within the headers", changed(&tcp, 16, &39_u16.to_be_bytes())),
            ("a TCP header of four words", changed(&tcp, 46, &[0x40])),
            ("a TCP header beyond the packet", changed(&tcp, 46, &[0x60])),
            ("a UDP length beyond the packet", changed(&udp, 38, &29_u16.to_be_bytes())),
            ("a UDP length within its header", changed(&udp, 38, &7_u16.to_be_bytes())),
        ] {
            bench.refused(name, "ca", &frame, "shop malformed");
        }
    });
}

#[test]
fn an_endpoint_without_ping_answers_no_echo_request() {
    let silent = config("", UNCHECKED).replace("[endpoints.shop]\n", "[endpoints.shop]\nping = false\n");
    for bench in both(|hook| World::new(&(hook.to_owned() + &silent))) {
        let echo = Packet::tcp(0).icmp(8, b"\0\x01\0\x01ping");
        bench.refused("to the endpoint", "ca", &echo, "shop icmp_unsupported");
        assert_eq!(bench.run("cb", &echo).0, REDIRECT, "the other tenant's answers");
    }
}
