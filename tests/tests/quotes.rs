//! ICMP errors about flows with an IPv6 side: what becomes of them, byte by byte, by RFC 7915 as it is written there.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests: a panic with its place is what is wanted")]

use privatelink_tests::bench::{Bench, REDIRECT, both};
use privatelink_tests::packet::{ACK, Ip, Ip6, Mac, Packet, Packet6, SYN, addresses, addresses6, six};
use privatelink_tests::world::{CHECKED, UNCHECKED, World, dualstack, eventually};

const CLIENT: Ip6 = six(5);
const ENDPOINT: Ip6 = six(0x99);
const BALANCER: Ip6 = six(0x10);
const BALANCER4: Ip = [10, 0, 1, 10];

/// Each hook's program, in a world of its own.
fn benches() -> [Bench; 2] {
    both(|hook| World::dualstack(&dualstack(hook, UNCHECKED), &["t1", "t2"]))
}

/// A packet of either family.
#[derive(Clone, Debug)]
enum Either {
    Four(Packet),
    Six(Packet6),
}
use Either::{Four, Six};

impl Either {
    fn inner(&self) -> &Packet {
        match self {
            Four(packet) => packet,
            Six(packet) => &packet.inner,
        }
    }

    fn build(&self) -> Vec<u8> {
        match self {
            Four(packet) => packet.build(),
            Six(packet) => packet.build(),
        }
    }
}

/// A packet on its way: as it left, and what it was when it came.
struct Sent {
    name: &'static str,
    /// Where it arrived, and its bytes there.
    at: &'static str,
    arrived: Vec<u8>,
    /// Where it came from, and what it was there.
    home: &'static str,
    left: Either,
    counter: &'static str,
}

fn is_six(frame: &[u8]) -> bool {
    frame[12..14] == [0x86, 0xdd]
}

fn macs(frame: &[u8]) -> (Mac, Mac) {
    (frame[0..6].try_into().unwrap(), frame[6..12].try_into().unwrap())
}

/// What answers a packet that arrived.
fn reply(arrived: &[u8], flags: u8, payload: &[u8]) -> Either {
    let (from_mac, to_mac) = macs(arrived);
    let inner = Packet { from_mac, to_mac, payload: payload.to_vec(), ..Packet::tcp(flags) };
    if is_six(arrived) {
        let (from, from_port, to, to_port) = addresses6(arrived);
        let inner = Packet { from_port: to_port, to_port: from_port, protocol: arrived[20], ..inner };
        Six(Packet6::of(to, from, inner))
    } else {
        let (from, from_port, to, to_port) = addresses(arrived);
        let protocol = arrived[23];
        Four(Packet { from: to, from_port: to_port, to: from, to_port: from_port, protocol, ..inner })
    }
}

fn side(arrived: &[u8]) -> &'static str {
    let last = if is_six(arrived) { arrived[53] } else { arrived[33] };
    if last == 21 || last == 0x21 { "t1" } else { "t2" }
}

/// Packets of flows in every combination of families that has an IPv6 side, both ways: pending and established, TCP and UDP.
fn sent(bench: &Bench) -> Vec<Sent> {
    let mut all = Vec::new();
    let over = |six: bool, inner: Packet| match six {
        true => Six(Packet6::of(CLIENT, ENDPOINT, inner)),
        false => Four(inner),
    };
    for (six, to_port, counters) in [
        (true, 81, ["shop6 to_consumer_packets", "shop6 to_provider_packets"]),
        (true, 80, ["shop6 to_consumer_packets", "shop6 to_provider_packets"]),
        (false, 81, ["shop to_consumer_packets", "shop to_provider_packets"]),
    ] {
        let forth = |name, left: Either| {
            let arrived = bench.run("ca", &left.build()).1;
            Sent { name, at: side(&arrived), arrived, home: "ca", left, counter: counters[0] }
        };
        let back = |name, of: &Sent, left: Either| {
            let arrived = bench.run(of.at, &left.build()).1;
            Sent { name, at: "ca", arrived, home: of.at, left, counter: counters[1] }
        };
        let tcp = |flags, payload: &[u8]| {
            over(six, Packet { to_port, payload: payload.to_vec(), ..Packet::tcp(flags) })
        };
        let syn = forth("a SYN", tcp(SYN, b""));
        let answer = back("a SYN-ACK", &syn, reply(&syn.arrived, SYN | ACK, b""));
        assert_eq!(bench.run("ca", &tcp(ACK, b"").build()).0, REDIRECT);
        let data = forth("data", tcp(ACK, b"odd"));
        let data_back = back("data back", &syn, reply(&syn.arrived, ACK, b"even"));
        all.extend([syn, answer, data, data_back]);
        if to_port == 81 {
            let query = forth("a query", over(six, Packet { to_port, ..Packet::udp() }));
            let answer = back("an answer", &query, reply(&query.arrived, 0, b"answer"));
            all.extend([query, answer]);
        }
    }
    all
}

/// An ICMP error in both families: type, code and the word behind the checksum.
type Error = (u8, u8, [u8; 4]);

/// ICMPv6 errors, and what they are in ICMP (RFC 7915, 5.2).
const TO_FOUR: [(Error, Option<Error>); 25] = [
    ((1, 0, [0; 4]), Some((3, 1, [0; 4]))),
    ((1, 1, [0; 4]), Some((3, 10, [0; 4]))),
    ((1, 2, [0; 4]), Some((3, 1, [0; 4]))),
    ((1, 3, [0; 4]), Some((3, 1, [0; 4]))),
    ((1, 4, [0; 4]), Some((3, 3, [0; 4]))),
    ((1, 5, [0; 4]), None),
    ((1, 4, [9, 0, 0, 0]), Some((3, 3, [0; 4]))),
    ((2, 0, [0, 0, 0x05, 0x78]), Some((3, 4, [0, 0, 0x05, 0x64]))),
    ((2, 0, [0, 0, 0x23, 0x28]), Some((3, 4, [0, 0, 0x05, 0xc8]))),
    ((2, 0, [0xff, 0xff, 0xff, 0xff]), Some((3, 4, [0, 0, 0x05, 0xc8]))),
    ((2, 0, [0, 0, 0, 7]), Some((3, 4, [0, 0, 0, 68]))),
    ((3, 0, [0; 4]), Some((11, 0, [0; 4]))),
    ((3, 1, [0; 4]), Some((11, 1, [0; 4]))),
    ((4, 0, [0, 0, 0, 0]), Some((12, 0, [0, 0, 0, 0]))),
    ((4, 0, [0, 0, 0, 1]), Some((12, 0, [1, 0, 0, 0]))),
    ((4, 0, [0, 0, 0, 2]), None),
    ((4, 0, [0, 0, 0, 5]), Some((12, 0, [2, 0, 0, 0]))),
    ((4, 0, [0, 0, 0, 6]), Some((12, 0, [9, 0, 0, 0]))),
    ((4, 0, [0, 0, 0, 7]), Some((12, 0, [8, 0, 0, 0]))),
    ((4, 0, [0, 0, 0, 23]), Some((12, 0, [12, 0, 0, 0]))),
    ((4, 0, [0, 0, 0, 24]), Some((12, 0, [16, 0, 0, 0]))),
    ((4, 0, [0, 0, 0, 40]), None),
    ((4, 0, [1, 0, 0, 0]), None),
    ((4, 1, [0, 0, 0, 6]), Some((3, 2, [0; 4]))),
    ((4, 2, [0, 0, 0, 40]), None),
];

/// ICMP errors, and what they are in ICMPv6 (RFC 7915, 4.2).
const TO_SIX: [(Error, Option<Error>); 31] = [
    ((3, 0, [0; 4]), Some((1, 0, [0; 4]))),
    ((3, 1, [0; 4]), Some((1, 0, [0; 4]))),
    ((3, 2, [0; 4]), Some((4, 1, [0, 0, 0, 6]))),
    ((3, 3, [0; 4]), Some((1, 4, [0; 4]))),
    ((3, 3, [0, 7, 0, 0]), Some((1, 4, [0; 4]))),
    ((3, 4, [0, 0, 0x05, 0x78]), Some((2, 0, [0, 0, 0x05, 0x8c]))),
    ((3, 4, [0, 0, 0x02, 0x40]), Some((2, 0, [0, 0, 0x05, 0]))),
    ((3, 4, [0, 0, 0xff, 0xff]), Some((2, 0, [0, 0, 0x05, 0xdc]))),
    ((3, 4, [0, 0, 0, 0]), Some((2, 0, [0, 0, 0x05, 0]))),
    ((3, 5, [0; 4]), Some((1, 0, [0; 4]))),
    ((3, 8, [0; 4]), Some((1, 0, [0; 4]))),
    ((3, 9, [0; 4]), Some((1, 1, [0; 4]))),
    ((3, 10, [0; 4]), Some((1, 1, [0; 4]))),
    ((3, 11, [0; 4]), Some((1, 0, [0; 4]))),
    ((3, 12, [0; 4]), Some((1, 0, [0; 4]))),
    ((3, 13, [0; 4]), Some((1, 1, [0; 4]))),
    ((3, 14, [0; 4]), None),
    ((3, 15, [0; 4]), Some((1, 1, [0; 4]))),
    ((3, 16, [0; 4]), None),
    ((11, 0, [0; 4]), Some((3, 0, [0; 4]))),
    ((11, 1, [0; 4]), Some((3, 1, [0; 4]))),
    ((12, 0, [0, 0, 0, 0]), Some((4, 0, [0, 0, 0, 0]))),
    ((12, 0, [1, 0, 0, 0]), Some((4, 0, [0, 0, 0, 1]))),
    ((12, 0, [3, 0, 0, 0]), Some((4, 0, [0, 0, 0, 4]))),
    ((12, 0, [4, 0, 0, 0]), None),
    ((12, 0, [8, 0, 0, 0]), Some((4, 0, [0, 0, 0, 7]))),
    ((12, 2, [9, 0, 0, 0]), Some((4, 0, [0, 0, 0, 6]))),
    ((12, 0, [10, 0, 0, 0]), None),
    ((12, 0, [12, 0, 0, 0]), Some((4, 0, [0, 0, 0, 8]))),
    ((12, 0, [19, 0, 0, 0]), Some((4, 0, [0, 0, 0, 24]))),
    ((12, 1, [0; 4]), None),
];

/// The error about what arrived, which holds so many bytes behind its header, from its receiver or from a router whose address nobody on
/// the other side may know.
fn error(arrived: &[u8], (kind, code, word): Error, held: usize, from_router: bool) -> Vec<u8> {
    let (to_mac, from_mac) = (macs(arrived).1, macs(arrived).0);
    let inner = Packet { to_mac, from_mac, tos: 0xc0, ..Packet::tcp(0) };
    let header = if is_six(arrived) { 40 } else { 20 };
    let body = [&word[..], &arrived[14..(14 + header + held).min(arrived.len())]].concat();
    if is_six(arrived) {
        let (to, _, from, _) = addresses6(arrived);
        let from = if from_router { six(0xee) } else { from };
        Packet6 { class: 0x60, ..Packet6::of(from, to, inner) }.icmp_code(kind, code, &body)
    } else {
        let (to, _, from, _) = addresses(arrived);
        let from = if from_router { [203, 0, 113, 9] } else { from };
        Packet { from, to, ..inner }.icmp_code(kind, code, &body)
    }
}

/// The error that the sender should get, about the packet as it left, one hop on. `out` is what it did get, for what cannot be known.
fn expected(sent: &Sent, (kind, code, word): Error, held: usize, out: &[u8]) -> Vec<u8> {
    let held = held.min(sent.arrived.len() - if is_six(&sent.arrived) { 54 } else { 34 });
    let (to_mac, from_mac) = macs(out);
    let across = is_six(&sent.arrived) != matches!(sent.left, Six(_));
    let about = Packet { to_mac, from_mac, ttl: 63, ..Packet::tcp(0) };
    let class = if is_six(&sent.arrived) { 0x60 } else { 0xc0 };
    match &sent.left {
        Six(left) => {
            let inner = Packet { ttl: left.inner.ttl - 1, ..left.inner.clone() };
            let original = Packet6 { inner, ..left.clone() }.build();
            let body = [&word[..], &original[14..54 + held]].concat();
            Packet6 { class, ..Packet6::of(left.to, left.from, about) }.icmp_code(kind, code, &body)
        }
        Four(left) => {
            let mut original = Packet { ttl: left.ttl - 1, ..left.clone() };
            let mut about = Packet { from: left.to, to: left.from, tos: class, ..about };
            if across {
                let id = |at: usize| u16::from_be_bytes([sent.arrived[at], sent.arrived[at + 1]]);
                (original.id, original.fragment) = (id(60), 0);
                (about.id, about.fragment) = (u16::from_be_bytes([out[18], out[19]]), 0);
            }
            let body = [&word[..], &original.build()[14..34 + held]].concat();
            about.icmp_code(kind, code, &body)
        }
    }
}

#[test]
fn an_error_about_a_flow_with_an_ipv6_side_reaches_the_sender_in_its_own_family_and_holds_the_packet_as_it_was_sent()
 {
    for bench in benches() {
        let mut ids = std::collections::BTreeSet::new();
        for sent in sent(&bench) {
            let across = is_six(&sent.arrived) != matches!(sent.left, Six(_));
            let table = if is_six(&sent.arrived) { &TO_FOUR[..] } else { &TO_SIX[..] };
            for (number, (said, meant)) in table.iter().enumerate() {
                let meant = if across { *meant } else { Some(*said) };
                let name = format!("{} {:?} {said:?}", sent.name, sent.left.inner().to_port);
                let frame = error(&sent.arrived, *said, 8, false);
                let Some(meant) = meant else {
                    let vpc = if sent.at == "ca" { "shop" } else { "payments" };
                    bench.refused(&name, sent.at, &frame, &format!("{vpc} icmp_unsupported"));
                    continue;
                };
                let out = if number < 2 {
                    bench.expect(&name, sent.at, &frame, REDIRECT, &[(sent.counter, 1)])
                } else {
                    bench.run(sent.at, &frame).1
                };
                assert_eq!(out, expected(&sent, meant, 8, &out), "{name}");
                let left = sent.left.build();
                if sent.home == "ca" {
                    assert_eq!(out[..6], left[6..12], "{name}: to whom it goes");
                }
                if across && !is_six(&out) {
                    assert!(
                        ids.insert(out[18..20].to_vec()),
                        "{name}: each has an identification of its own"
                    );
                }
            }
            if across && !is_six(&sent.arrived) {
                // A router that does not say which MTU, about a packet that was larger than any guess.
                let mut frame = error(&sent.arrived, (3, 4, [0; 4]), 8, false);
                frame[44..46].copy_from_slice(&2000_u16.to_be_bytes());
                let out = bench.run(sent.at, &frame).1;
                assert_eq!(out[58..62], [0, 0, 0x05, 0xdc], "1492, and 20, and what the link takes");
            }
            // Not 17: half of a checksum stays as it is.
            for held in [8, 9, 16, 18, 19, 20, 60] {
                for from_router in [false, true] {
                    let (said, meant) = table[4];
                    let meant = if across { meant.unwrap() } else { said };
                    let out = bench.run(sent.at, &error(&sent.arrived, said, held, from_router)).1;
                    let name = format!("{} {held} bytes, {:?}", sent.name, sent.left);
                    assert_eq!(out, expected(&sent, meant, held, &out), "{name}");
                }
            }
        }
    }
}

#[test]
fn one_that_is_forged_unrelated_cut_off_or_at_its_last_hop_is_dropped_by_name_and_a_wrong_one_stays_wrong() {
    for bench in benches() {
        for sent in sent(&bench).into_iter().filter(|it| it.name == "a SYN") {
            let over_six = is_six(&sent.arrived);
            // Where the network header, the message and the packet in it begin.
            let (message, inner, transport) = if over_six { (54, 62, 102) } else { (34, 42, 62) };
            let good = error(&sent.arrived, if over_six { (1, 4, [0; 4]) } else { (3, 3, [0; 4]) }, 8, false);
            let changed = |at: usize, byte: u8| {
                let mut frame = good.clone();
                frame[at] = byte;
                frame
            };
            let refused = |name: &str, frame: &[u8], reason: &str| {
                bench.refused(name, sent.at, frame, &format!("payments {reason}"));
            };
            for held in [0, 1, 7] {
                refused("cut off", &error(&sent.arrived, (3, 0, [0; 4]), held, false), "icmp_malformed");
            }
            refused("another version inside", &changed(inner, 0x55), "icmp_malformed");
            let (source, destination) =
                if over_six { (inner + 23, inner + 39) } else { (inner + 15, inner + 19) };
            refused("sent by another", &changed(source, 0x11), "icmp_forged");
            refused("sent to another", &changed(destination, 0x77), "icmp_no_flow");
            let protocol = if over_six { inner + 6 } else { inner + 9 };
            refused("another protocol", &changed(protocol, 17), "icmp_no_flow");
            refused("no protocol of ours", &changed(protocol, 47), "icmp_no_flow");
            refused("another port", &changed(transport + 1, good[transport + 1] ^ 1), "icmp_no_flow");
            if over_six {
                refused("a fragment", &changed(protocol, 44), "icmp_no_flow");
                refused("another error", &changed(message, 100), "icmp_unsupported");
                refused("a router advertisement", &changed(message, 134), "icmp_unsupported");
            } else {
                refused("a later fragment", &changed(inner + 7, 9), "icmp_no_flow");
            }
            refused("at its last hop", &changed(if over_six { 21 } else { 22 }, 1), "ttl_expired");
            let (from, to) = if over_six { (22..38, 38..54) } else { (26..30, 30..34) };
            let mut spoofed = good.clone();
            spoofed.copy_within(to, from.start);
            refused("in our name", &spoofed, "spoofed_source");
            let large = error(&[&sent.arrived[..], &[0; 1500]].concat(), (3, 3, [0; 4]), 1500, false);
            refused("larger than it could be", &large, "too_big");
            // The same in the wrong VPC is about nothing.
            let verdict = bench.run("cb", &good);
            assert_eq!((verdict.0, &verdict.1), (2, &good), "in another VPC");

            let right = bench.run(sent.at, &good).1;
            let mut out = bench.run(sent.at, &changed(message + 2, good[message + 2] ^ 0x40)).1;
            let at = if is_six(&out) { 56 } else { 36 };
            assert_ne!(out[at..at + 2], right[at..at + 2], "a wrong checksum");
            out[at..at + 2].copy_from_slice(&right[at..at + 2]);
            if !is_six(&out) {
                // Identifications are counted on.
                out[18..20].copy_from_slice(&right[18..20]);
                out[24..26].copy_from_slice(&right[24..26]);
            }
            assert_eq!(out, right);
        }
        let client = Packet6::of(CLIENT, ENDPOINT, Packet::tcp(0));
        let own = Packet6::of(ENDPOINT, CLIENT, Packet { from_port: 81, to_port: 40000, ..Packet::tcp(ACK) });
        bench.refused(
            "in another tenant's VPC",
            "cb",
            &client.icmp_code(1, 4, &[&[0; 4], &own.build()[14..62]].concat()),
            "bank icmp_no_flow",
        );
    }
}

#[test]
fn an_error_about_a_packet_of_a_health_check_over_ipv6_goes_to_the_vpcs_own_stack() {
    for bench in benches() {
        let check =
            Packet6::of(BALANCER, six(0x21), Packet { from_port: 1500, to_port: 8080, ..Packet::tcp(SYN) });
        let about = Packet6::of(six(0x21), BALANCER, Packet::tcp(0));
        for kind in [1, 2, 3, 4] {
            let frame = about.icmp_code(kind, 0, &[&[0; 4], &check.build()[14..62]].concat());
            let out = bench.expect("about a check", "t1", &frame, REDIRECT, &[("payments steered", 1)]);
            assert_eq!(out[12..], frame[12..], "as it is");
        }
        let check = Packet {
            from: BALANCER4,
            to: [10, 0, 1, 21],
            from_port: 1500,
            to_port: 8080,
            ..Packet::tcp(SYN)
        };
        let about = Packet { from: [10, 0, 1, 21], to: BALANCER4, ..Packet::tcp(0) };
        let frame = about.icmp_code(3, 3, &[&[0; 4], &check.build()[14..42]].concat());
        let out = bench.expect("over IPv4", "t1", &frame, REDIRECT, &[("payments steered", 1)]);
        assert_eq!(out[12..], frame[12..], "as it is");
    }
}

/// Network ACLs of subnets of a VPC that let these protocols in and out.
fn acl(vpc: &str, subnets: &str, protocols: &[&str]) -> String {
    let mut rules = Vec::new();
    for (protocol, cidr) in protocols.iter().flat_map(|it| [(it, "0.0.0.0/0"), (it, "::/0")]) {
        let ports = if protocol.starts_with("icmp") { "" } else { r#"ports = "0-65535", "# };
        let rule = rules.len() + 1;
        rules.push(format!(
            r#"{{ rule = {rule}, action = "allow", protocol = "{protocol}", {ports}cidr = "{cidr}" }}"#
        ));
    }
    let rules = rules.join(", ");
    format!(
        "[network_acls.{vpc}]\nvpc = \"{vpc}\"\nsubnets = [{subnets}]\ningress = [{rules}]\negress = [{rules}]\n"
    )
}

#[test]
fn an_error_passes_the_network_acls_of_the_side_that_it_comes_from_and_of_the_one_that_it_goes_to() {
    let all = ["tcp", "udp", "icmp", "icmpv6"];
    let with = |consumers: &[&str], providers: &[&str]| {
        dualstack("", UNCHECKED)
            + &acl("shop", r#""10.0.1.0/24", "fd00::5/128""#, consumers)
            + &acl("payments", r#""10.0.1.20/30", "fd00::20/123""#, providers)
    };
    for bench in benches() {
        let apply = |consumers: &[&str], providers: &[&str]| {
            let (code, said) = bench.world.apply(&with(consumers, providers));
            assert_eq!(code, Some(0), "{said}");
        };
        // Flows with an IPv6 side, and one without.
        let mut all_sent = sent(&bench);
        let left = Four(Packet { from_port: 40001, ..Packet::tcp(SYN) });
        let arrived = bench.run("ca", &left.build()).1;
        let (at, counter) = (side(&arrived), "shop to_consumer_packets");
        all_sent.push(Sent { name: "a SYN over IPv4", at, arrived, home: "ca", left, counter });
        let error = |sent: &Sent| {
            let said = if is_six(&sent.arrived) { (1, 4, [0; 4]) } else { (3, 3, [0; 4]) };
            error(&sent.arrived, said, 8, false)
        };
        for (consumers, providers) in [(&all[..2], &all[..]), (&all[..], &all[..2])] {
            apply(consumers, providers);
            for sent in &all_sent {
                let vpc = if sent.at == "ca" { "shop" } else { "payments" };
                let name = format!("{} {:?} {consumers:?}", sent.name, sent.left);
                bench.refused(&name, sent.at, &error(sent), &format!("{vpc} network_acl"));
            }
        }
        let check = |about: [&[u8]; 2]| [&[0; 4], about[0], about[1]].concat();
        let own = Packet { from: BALANCER4, to: [10, 0, 1, 21], from_port: 1500, ..Packet::tcp(SYN) }.build();
        let about = Packet { from: [10, 0, 1, 21], to: BALANCER4, ..Packet::tcp(0) };
        let checks = about.icmp_code(3, 3, &check([&own[14..34], &own[34..42]]));
        bench.refused("about a health check", "t1", &checks, "payments network_acl");
        let own = Packet6::of(BALANCER, six(0x21), Packet { from_port: 1500, ..Packet::tcp(SYN) }).build();
        let about = Packet6::of(six(0x21), BALANCER, Packet::tcp(0));
        let checks6 = about.icmp_code(1, 4, &check([&own[14..54], &own[54..62]]));
        bench.refused("about one over IPv6", "t1", &checks6, "payments network_acl");
        apply(&all, &all);
        for sent in &all_sent {
            bench.expect(sent.name, sent.at, &error(sent), REDIRECT, &[(sent.counter, 1)]);
        }
        for frame in [checks, checks6] {
            bench.expect("about a health check", "t1", &frame, REDIRECT, &[("payments steered", 1)]);
        }
    }
}

#[test]
fn a_client_of_either_family_learns_that_nobody_listens_at_an_ipv6_target() {
    let mut world = World::dualstack(&dualstack("", CHECKED), &["ca", "cb", "t1", "t2"]);
    world.serve("t1");
    world.serve("t2");
    eventually("all targets are healthy", || {
        world.json("targets").as_array()?.iter().all(|it| it["state"] == "healthy").then_some(())
    });
    // A datagram to a target where nobody listens: the port is TCP's alone.
    for endpoint in ["10.0.9.9", "fd00::99"] {
        let refused = world.thread("ca", move || {
            let socket =
                std::net::UdpSocket::bind(if endpoint.contains(':') { "[::]:0" } else { "0.0.0.0:0" })
                    .unwrap();
            socket.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
            socket.connect((endpoint, 81)).unwrap();
            socket.send(b"anyone?").unwrap();
            socket.recv(&mut [0; 9]).unwrap_err().kind()
        });
        assert_eq!(refused.join().unwrap(), std::io::ErrorKind::ConnectionRefused, "{endpoint}");
    }
}
