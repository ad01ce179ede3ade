//! Tenants with equal addresses who mean ill: what they forge goes nowhere, is counted under their own name, and nobody else notices.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test: a panic with its place is what is wanted")]

use pnet_datalink::{Channel, Config, channel, interfaces};
use privatelink_tests::bench::{BALANCER, Bench, CLIENT, ENDPOINT, PASS, REDIRECT, both, each, reply, side};
use privatelink_tests::packet::{
    ACK, Ip, Ip6, Mac, PSH, Packet, Packet6, RST, SYN, addresses, addresses6, arp, question, six,
};
use privatelink_tests::world::{UNCHECKED, World, changes, config, dualstack, eventually};
use std::collections::BTreeMap;
use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// A tenant's connection, as its SYN arrived at the target.
fn connect(bench: &Bench, interface: &str) -> Vec<u8> {
    let (verdict, at_target) = bench.run(interface, &Packet::tcp(SYN).build());
    assert_eq!(verdict, REDIRECT);
    let (.., target, _) = addresses(&at_target);
    assert_eq!(bench.run(side(target), &reply(&at_target, SYN | ACK, &[]).build()).0, REDIRECT);
    assert_eq!(bench.run(interface, &Packet::tcp(ACK).build()).0, REDIRECT);
    at_target
}

fn packet((from, from_port): (Ip, u16), (to, to_port): (Ip, u16), flags: u8) -> Packet {
    Packet { from, from_port, to, to_port, ..Packet::tcp(flags) }
}

/// Whether the connection goes on, both ways.
fn goes_on(bench: &Bench, interface: &str, at_target: &[u8]) {
    let data = Packet { payload: b"GET /".to_vec(), ..Packet::tcp(ACK | PSH) };
    assert_eq!(bench.run(interface, &data.build()).0, REDIRECT);
    let (.., target, _) = addresses(at_target);
    assert_eq!(bench.run(side(target), &reply(at_target, ACK, b"answer").build()).0, REDIRECT);
}

/// Nothing has been counted since `before` but in what begins with `of`, and in the table of who has asked a resolver, which is one for
/// all.
fn only(bench: &Bench, before: &BTreeMap<String, u64>, of: &str) {
    let moved = changes(before, &bench.world.state());
    let others = moved.into_iter().filter(|(key, _)| !key.starts_with(of) && key != "map callers");
    assert_eq!(others.collect::<Vec<_>>(), [], "nobody else's counters have moved");
}

#[test]
fn a_consumer_that_forges_sources_answers_errors_and_arp_meets_its_own_endpoint_alone() {
    each("", |bench| {
        let at_target = connect(bench, "cb");
        let (_, nat, target, port) = addresses(&at_target);
        let before = bench.world.state();

        let passed = |name: &str, packet: Packet| bench.refused(name, "ca", &packet.build(), "shop passed");
        passed("a SYN to a target", packet((CLIENT, 40000), (target, port), SYN));
        passed("a SYN to the load balancer", packet((CLIENT, 40000), (BALANCER, 80), SYN));
        for flags in [SYN | ACK, ACK, RST, RST | ACK] {
            passed("an answer as the target gives it", packet((target, port), (BALANCER, nat), flags));
            passed("an answer as the consumer gets it", packet((ENDPOINT, 80), (CLIENT, 40000), flags));
        }

        let dropped = |name: &str, packet: Packet, reason: &str| {
            bench.refused(name, "ca", &packet.build(), &format!("shop {reason}"));
        };
        dropped(
            "the endpoint's own address",
            packet((ENDPOINT, 40000), (ENDPOINT, 80), SYN),
            "spoofed_source",
        );
        for source in [[192, 168, 0, 5], [127, 0, 0, 1], [0, 0, 0, 0], [255, 255, 255, 255]] {
            dropped(
                "an address of elsewhere",
                packet((source, 40000), (ENDPOINT, 80), SYN),
                "source_outside_vpc",
            );
        }
        dropped("a port without a listener", packet((CLIENT, 40000), (ENDPOINT, 22), SYN), "no_listener");
        dropped("a RST of the other's connection", Packet::tcp(RST), "no_flow");

        let data = Packet { payload: b"DELETE /".to_vec(), ..Packet::tcp(ACK | PSH) }.build();
        let out = bench.expect("data of the other's", "ca", &data, REDIRECT, &[("shop reset_no_flow", 1)]);
        assert_eq!(addresses(&out), (ENDPOINT, 80, CLIENT, 40000), "who sent it is told, and nobody else");

        let quoted = packet((ENDPOINT, 80), (CLIENT, 40000), ACK).build();
        let error = [&[0; 4][..], &quoted[14..42]].concat();
        let error = Packet { protocol: 1, ..packet((CLIENT, 0), (ENDPOINT, 0), 0) }.icmp_code(3, 3, &error);
        bench.refused("an error about the other's connection", "ca", &error, "shop icmp_no_flow");

        let everybody = [0xff; 6];
        let claim = arp(2, [2, 1, 1, 1, 1, 1], ENDPOINT, [2, 9, 9, 9, 9, 9], CLIENT, everybody);
        bench.refused("ARP that claims the endpoint", "ca", &claim, "shop spoofed_source");

        for kind in [0, 4, 5, 13, 15, 17, 30] {
            let message = packet((CLIENT, 0), (ENDPOINT, 0), 0).icmp(kind, &[0; 24]);
            bench.refused("ICMP that nobody answers", "ca", &message, "shop icmp_unsupported");
            let message = packet((CLIENT, 0), (target, 0), 0).icmp(kind, &[0; 24]);
            bench.refused("the same to a target", "ca", &message, "shop passed");
        }
        let echo = packet((ENDPOINT, 0), (ENDPOINT, 0), 0).icmp(8, b"ping");
        bench.refused("an echo request in the endpoint's name", "ca", &echo, "shop spoofed_source");

        only(bench, &before, "shop ");
        goes_on(bench, "cb", &at_target);
    });
}

#[test]
fn a_provider_that_scans_its_consumers_finds_none_of_them() {
    each("", |bench| {
        let at_target = connect(bench, "cb");
        let (_, nat, target, port) = addresses(&at_target);
        let other = if target[3] == 21 { [10, 0, 1, 22] } else { [10, 0, 1, 21] };
        let before = bench.world.state();

        let refused = |name: &str, packet: Packet, reason: &str| {
            bench.refused(name, "t1", &packet.build(), &format!("payments {reason}"));
        };
        for to in [(CLIENT, 22), (CLIENT, 40000), (ENDPOINT, 80)] {
            let probe = packet((target, port), to, SYN).build();
            assert_eq!(
                bench.run("t1", &probe),
                (PASS, probe.clone()),
                "what is in the consumers' VPCs is nothing here"
            );
        }
        for to_port in [80, 1, nat.wrapping_add(1).max(2048)] {
            let probe = packet((other, 5000), (BALANCER, to_port), SYN);
            refused("a SYN to the load balancer", probe, "provider_initiated");
        }
        refused(
            "a SYN to the flow's port",
            packet((other, port), (BALANCER, nat), SYN),
            "provider_initiated",
        );
        let datagram = Packet { from: target, to: BALANCER, from_port: port, to_port: nat, ..Packet::udp() };
        refused("a datagram to the flow's port", datagram, "no_flow");
        for (from, from_port) in [(other, port), (target, port + 1)] {
            let probe = packet((from, from_port), (BALANCER, nat), ACK).build();
            let out = bench.expect("another's ACK", "t1", &probe, REDIRECT, &[("payments reset_no_flow", 1)]);
            assert_eq!(addresses(&out), (BALANCER, nat, from, from_port), "it is the one that is told");
        }

        for to in [CLIENT, ENDPOINT] {
            let (echo, query) = (
                packet((target, 0), (to, 0), 0).icmp(8, b"ping"),
                Packet { from: target, to, ..Packet::udp() }.build(),
            );
            let asked = arp(1, [2, 1, 1, 1, 1, 1], target, [0; 6], to, [0xff; 6]);
            for probe in [echo, query, asked] {
                assert_eq!(bench.run("t1", &probe), (PASS, probe.clone()), "nor by another protocol");
            }
        }
        let echo = packet((other, 0), (BALANCER, 0), 0).icmp(8, b"ping");
        bench.refused("an echo request to the load balancer", "t1", &echo, "payments icmp_unsupported");
        let quoted = packet((BALANCER, nat.wrapping_add(1)), (target, port), ACK).build();
        let error = [&[0; 4][..], &quoted[14..42]].concat();
        let error = packet((target, 0), (BALANCER, 0), 0).icmp_code(3, 3, &error);
        bench.refused("an error about a flow that is guessed", "t1", &error, "payments icmp_no_flow");

        only(bench, &before, "payments ");
        goes_on(bench, "cb", &at_target);
    });
}

const CLIENT6: Ip6 = six(5);
const ENDPOINT6: Ip6 = six(0x99);
const BALANCER6: Ip6 = six(0x10);
const ME: Mac = [2, 1, 1, 1, 1, 1];

/// Each hook's program, in a world with both families.
fn dualstack_benches() -> [Bench; 2] {
    both(|hook| World::dualstack(&dualstack(hook, UNCHECKED), &["t1", "t2"]))
}

fn packet6((from, from_port): (Ip6, u16), (to, to_port): (Ip6, u16), flags: u8) -> Packet6 {
    Packet6::of(from, to, Packet { from_port, to_port, ..Packet::tcp(flags) })
}

/// The interface of a target with IPv6.
fn side6(target: Ip6) -> &'static str {
    if target[15] == 0x21 { "t1" } else { "t2" }
}

/// What a target sends back over IPv6.
fn reply6(at_target: &[u8], flags: u8, payload: &[u8]) -> Vec<u8> {
    let (from, from_port, to, to_port) = addresses6(at_target);
    let inner = Packet { from_port: to_port, to_port: from_port, ..Packet::tcp(flags) };
    let macs = |at: usize| -> Mac { at_target[at..at + 6].try_into().unwrap() };
    let inner = Packet { from_mac: macs(0), to_mac: macs(6), payload: payload.to_vec(), ..inner };
    Packet6::of(to, from, inner).build()
}

/// A tenant's connection over IPv6, as its SYN arrived at the target.
fn connect6(bench: &Bench, interface: &str) -> Vec<u8> {
    let (client, endpoint) = ((CLIENT6, 40000), (ENDPOINT6, 81));
    let (verdict, at_target) = bench.run(interface, &packet6(client, endpoint, SYN).build());
    assert_eq!(verdict, REDIRECT);
    let (.., target, _) = addresses6(&at_target);
    assert_eq!(bench.run(side6(target), &reply6(&at_target, SYN | ACK, b"")).0, REDIRECT);
    assert_eq!(bench.run(interface, &packet6(client, endpoint, ACK).build()).0, REDIRECT);
    at_target
}

fn goes_on6(bench: &Bench, interface: &str, at_target: &[u8]) {
    let mut data = packet6((CLIENT6, 40000), (ENDPOINT6, 81), ACK | PSH);
    data.inner.payload = b"GET /".to_vec();
    assert_eq!(bench.run(interface, &data.build()).0, REDIRECT);
    let (.., target, _) = addresses6(at_target);
    assert_eq!(bench.run(side6(target), &reply6(at_target, ACK, b"answer")).0, REDIRECT);
}

/// A message of neighbour discovery, to a group or a host.
fn discovery(from: Ip6, to: Ip6, kind: u8, body: &[u8]) -> Vec<u8> {
    let to_mac =
        if to[0] == 0xff { [0x33, 0x33, to[12], to[13], to[14], to[15]] } else { [2, 9, 9, 9, 9, 9] };
    let inner = Packet { to_mac, ttl: 255, ..Packet::tcp(0) };
    Packet6::of(from, to, inner).icmp(kind, body)
}

/// A multicast group of the link: all nodes, or an address's own.
fn group(of: Option<Ip6>) -> Ip6 {
    let mut group = six(1);
    (group[0], group[1]) = (0xff, 2);
    if let Some(of) = of {
        (group[11], group[12]) = (1, 0xff);
        group[13..].copy_from_slice(&of[13..]);
    }
    group
}

/// What is said of an address: flags, the address, and who says that it has it, by an option of this kind.
fn told(flags: u8, of: Ip6, kind: u8) -> Vec<u8> {
    [&[flags, 0, 0, 0][..], &of, &[kind, 1], &ME].concat()
}

#[test]
fn a_consumer_that_forges_over_ipv6_takes_nobodys_address_and_nobodys_connection() {
    for bench in &dualstack_benches() {
        let at_target = connect6(bench, "cb");
        let (_, nat, target, port) = addresses6(&at_target);
        let before = bench.world.state();
        let refused = |name: &str, frame: &[u8], reason: &str| {
            bench.refused(name, "ca", frame, &format!("shop {reason}"));
        };

        let all = group(None);
        refused(
            "an advertisement",
            &discovery(CLIENT6, all, 136, &told(0x20, ENDPOINT6, 2)),
            "spoofed_source",
        );
        refused(
            "one to the client",
            &discovery(CLIENT6, six(6), 136, &told(0x60, ENDPOINT6, 2)),
            "spoofed_source",
        );
        refused(
            "one from the endpoint",
            &discovery(ENDPOINT6, all, 136, &told(0x20, six(6), 2)),
            "spoofed_source",
        );
        let question = discovery(ENDPOINT6, group(Some(six(6))), 135, &told(0, six(6), 1));
        refused("a solicitation from the endpoint", &question, "spoofed_source");
        for kind in [133, 134, 137] {
            let message = discovery(CLIENT6, ENDPOINT6, kind, &told(0, ENDPOINT6, 2));
            refused("a router's message, or a redirect, to the endpoint", &message, "icmp_unsupported");
        }
        let question = discovery(CLIENT6, group(Some(BALANCER6)), 135, &told(0, BALANCER6, 1));
        refused("a solicitation for the load balancer", &question, "passed");

        for to in [(target, port), (BALANCER6, 81), (BALANCER6, nat)] {
            refused("a SYN to the provider's side", &packet6((CLIENT6, 40000), to, SYN).build(), "passed");
        }
        for flags in [SYN | ACK, ACK, RST] {
            let answer = packet6((target, port), (BALANCER6, nat), flags).build();
            refused("an answer as the target gives it", &answer, "passed");
        }
        let syn = |from: Ip6, to_port: u16| packet6((from, 40000), (ENDPOINT6, to_port), SYN).build();
        refused("the endpoint's own address", &syn(ENDPOINT6, 81), "spoofed_source");
        let mut elsewhere = CLIENT6;
        elsewhere[1] = 1;
        refused("an address of elsewhere", &syn(elsewhere, 81), "source_outside_vpc");
        refused("no address", &syn([0; 16], 81), "source_outside_vpc");
        let mut mapped = [0; 16];
        mapped[10..].copy_from_slice(&[0xff, 0xff, 10, 0, 1, 5]);
        refused("an IPv4 address in an IPv6 one", &syn(mapped, 81), "malformed");
        refused("a port without a listener", &syn(CLIENT6, 22), "no_listener");
        let own = |flags| packet6((CLIENT6, 40000), (ENDPOINT6, 81), flags).build();
        refused("a RST of the other's connection", &own(RST), "no_flow");
        let out =
            bench.expect("data of the other's", "ca", &own(ACK), REDIRECT, &[("shop reset_no_flow", 1)]);
        assert_eq!(addresses6(&out), (ENDPOINT6, 81, CLIENT6, 40000), "who sent it is told, and nobody else");
        let quoted = packet6((ENDPOINT6, 81), (CLIENT6, 40000), ACK).build();
        for (kind, code) in [(1, 4), (2, 0), (3, 0)] {
            let error = [&[0, 0, 5, 0][..], &quoted[14..62]].concat();
            let error = packet6((CLIENT6, 0), (ENDPOINT6, 0), 0).icmp_code(kind, code, &error);
            refused("an error about the other's connection", &error, "icmp_no_flow");
        }
        let echo = packet6((CLIENT6, 0), (BALANCER6, 0), 0).icmp(128, b"ping");
        refused("an echo request to the load balancer", &echo, "passed");

        only(bench, &before, "shop");
        goes_on6(bench, "cb", &at_target);
    }
}

#[test]
fn a_provider_that_scans_over_ipv6_finds_no_consumer() {
    for bench in &dualstack_benches() {
        let at_target = connect6(bench, "cb");
        let (_, nat, target, port) = addresses6(&at_target);
        let other = if target[15] == 0x21 { six(0x22) } else { six(0x21) };
        let before = bench.world.state();
        let udp = |from: (Ip6, u16), to: (Ip6, u16)| {
            let inner = Packet { from_port: from.1, to_port: to.1, ..Packet::udp() };
            Packet6::of(from.0, to.0, inner).build()
        };
        for to in [CLIENT6, ENDPOINT6] {
            for probe in [
                packet6((target, port), (to, 22), SYN).build(),
                packet6((target, port), (to, 40000), ACK).build(),
                udp((target, port), (to, 53)),
                packet6((target, 0), (to, 0), 0).icmp(128, b"ping"),
                discovery(target, group(Some(to)), 135, &told(0, to, 1)),
            ] {
                assert_eq!(bench.run("t1", &probe), (PASS, probe.clone()), "there is nobody here");
            }
        }
        let refused = |name: &str, frame: &[u8], reason: &str| {
            bench.refused(name, "t1", frame, &format!("payments {reason}"));
        };
        for to_port in [81, 1, nat] {
            let probe = packet6((other, port), (BALANCER6, to_port), SYN).build();
            refused("a SYN to the load balancer", &probe, "provider_initiated");
        }
        refused("a datagram to the flow's port", &udp((target, port), (BALANCER6, nat)), "no_flow");
        let echo = packet6((other, 0), (BALANCER6, 0), 0).icmp(128, b"ping");
        refused("an echo request to the load balancer", &echo, "icmp_unsupported");
        let claim = discovery(other, group(None), 136, &told(0x20, BALANCER6, 2));
        refused("an advertisement that claims it", &claim, "spoofed_source");
        let quoted = packet6((BALANCER6, nat.wrapping_add(1)), (target, port), ACK).build();
        let error = [&[0; 4][..], &quoted[14..62]].concat();
        let error = packet6((target, 0), (BALANCER6, 0), 0).icmp_code(1, 4, &error);
        refused("an error about a flow that is guessed", &error, "icmp_no_flow");

        only(bench, &before, "payments ");
        goes_on6(bench, "cb", &at_target);
    }
}

/// What the resolver says to a question from a tenant's own address.
fn answer(world: &World, end: &str, name: &str) -> Vec<u8> {
    let asked = question(name);
    let ask = move || {
        let socket = UdpSocket::bind("10.0.1.5:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        socket.send_to(&asked, "10.0.0.2:53").unwrap();
        let mut bytes = vec![0; 512];
        let length = socket.recv(&mut bytes).unwrap();
        bytes.truncate(length);
        bytes
    };
    world.thread(end, ask).join().unwrap()
}

/// The usual configuration with resolvers, and with a name for the service that both consumers use; `principals` may connect.
fn named(principals: &str) -> String {
    config("", UNCHECKED)
        .replace(r#"interfaces = ["ca"]"#, "interfaces = [\"ca\"]\ndns = true")
        .replace(r#"interfaces = ["cb"]"#, "interfaces = [\"cb\"]\ndns = true")
        .replace(r#"["111122223333", "arn:aws:iam::444455556666:root"]"#, principals)
        .replace(
            "acceptance_required",
            "private_dns_name = \"api.example.com\"\nprivate_dns_name_verification = false\nacceptance_required",
        )
        .replace("service = \"payments\"\n", "service = \"payments\"\nprivate_dns_enabled = true\n")
}

/// A counter of a VPC's resolver.
fn counted(world: &World, vpc: &str, what: &str) -> u64 {
    let rows = world.json("status")[0]["resolvers"].clone();
    rows.as_array().unwrap().iter().find(|row| row["vpc"] == vpc).unwrap()[what].as_u64().unwrap()
}

#[test]
fn who_forges_questions_and_answers_to_resolvers_asks_nothing_and_learns_no_name_of_another_vpc() {
    let text = named(r#"["*"]"#);
    for bench in both(|hook| World::new(&(hook.to_owned() + &text))) {
        let bench = &bench;
        const OWN: Ip = [10, 0, 0, 2];
        let before = bench.world.state();
        let asked = |from: Ip, to: Ip, to_port: u16| Packet {
            from,
            to,
            to_port,
            payload: question("api.example.com"),
            ..Packet::udp()
        };
        let refused = |name: &str, packet: &Packet, reason: &str| {
            bench.refused(name, "ca", &packet.build(), &format!("shop {reason}"));
        };
        for from in [ENDPOINT, OWN, [169, 254, 169, 253]] {
            refused("a question in our name", &asked(from, OWN, 53), "spoofed_source");
        }
        for from in [[192, 168, 0, 5], [127, 0, 0, 1], [0, 0, 0, 0], [224, 0, 0, 1]] {
            refused("a question from elsewhere", &asked(from, OWN, 53), "source_outside_vpc");
        }
        for to_port in [0, 54, 1023, 2048, 5353] {
            refused("to another port", &asked(CLIENT, OWN, to_port), "no_listener");
        }
        refused("to the endpoint", &asked(CLIENT, ENDPOINT, 5353), "no_listener");
        assert_eq!(counted(&bench.world, "shop", "questions"), 0);

        // Answers that nobody asked for: no socket waits for them, and what comes as a question is none.
        let mut forged = question("api.example.com");
        forged[2] |= 0x80;
        let sent = forged.clone();
        let heard = bench.world.thread("ca", move || {
            let socket = UdpSocket::bind("10.0.1.5:53").unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
            for port in [53, 1024, 1500, 2047] {
                socket.send_to(&sent, ("10.0.0.2", port)).unwrap();
            }
            socket.recv(&mut [0; 512]).is_ok()
        });
        assert!(!heard.join().unwrap(), "nothing is said to them");
        eventually("the one that came to its port is none of its own", || {
            (counted(&bench.world, "shop", "malformed") == 1).then_some(())
        });
        only(bench, &before, "shop ");
        for what in ["questions", "answered", "forwarded", "refused", "malformed"] {
            assert_eq!(counted(&bench.world, "bank", what), 0, "the other's resolver has not noticed");
        }

        let names = bench.world.json("names");
        let of = |row: &&serde_json::Value| row["of"] == "bank" && row["kind"] == "endpoint";
        let theirs = names.as_array().unwrap().iter().find(of).unwrap()["name"].as_str().unwrap().to_owned();
        let nobodys =
            format!("{}.{}", "x".repeat(theirs.find('.').unwrap()), theirs.split_once('.').unwrap().1);
        let (theirs, nobodys) = (answer(&bench.world, "ca", &theirs), answer(&bench.world, "ca", &nobodys));
        let name = 12..12 + nobodys.iter().skip(12).position(|byte| *byte == 0).unwrap();
        let blank = |mut bytes: Vec<u8>| {
            bytes[name.clone()].fill(0);
            bytes
        };
        assert_eq!(blank(theirs), blank(nobodys), "a name of the other's is one that does not exist");
        assert_eq!(answer(&bench.world, "cb", "api.example.com")[3] & 15, 0, "which has it");
    }
}

#[test]
fn a_tenant_that_is_not_allowed_cannot_tell_the_service_from_one_that_does_not_exist() {
    let denied = named(r#"["111122223333"]"#);
    let absent = denied.split_once("[endpoints.bank]").unwrap().0.to_owned();
    for bench in both(|hook| World::new(&(hook.to_owned() + &denied))) {
        let at_target = connect(&bench, "ca");
        let probes = || {
            let mut told = Vec::new();
            let quoted = packet((ENDPOINT, 80), (CLIENT, 40000), ACK).build();
            let error = [&[0; 4][..], &quoted[14..42]].concat();
            for probe in [
                Packet::tcp(SYN).build(),
                Packet { to_port: 22, ..Packet::tcp(SYN) }.build(),
                Packet::tcp(ACK).build(),
                Packet::tcp(RST).build(),
                Packet::udp().build(),
                Packet { fragment: 0x2000, ..Packet::udp() }.build(),
                Packet { ttl: 1, ..Packet::tcp(SYN) }.build(),
                packet((ENDPOINT, 1), (ENDPOINT, 80), SYN).build(),
                packet((CLIENT, 0), (ENDPOINT, 0), 0).icmp(8, b"ping"),
                packet((CLIENT, 0), (ENDPOINT, 0), 0).icmp_code(3, 3, &error),
                Packet { protocol: 47, ..Packet::tcp(0) }.ipv4(&[0; 20]),
                arp(1, ME, CLIENT, [0; 6], ENDPOINT, [0xff; 6]),
                arp(1, ME, [0; 4], [0; 6], ENDPOINT, [0xff; 6]),
                arp(2, ME, ENDPOINT, ME, ENDPOINT, [0xff; 6]),
            ] {
                let before = bench.world.state();
                let (verdict, out) = bench.run("cb", &probe);
                told.push((verdict, out, changes(&before, &bench.world.state())));
            }
            told
        };
        let names = ["api.example.com", "www.api.example.com", "9.9.0.10.in-addr.arpa"];
        let answers = || names.map(|name| answer(&bench.world, "cb", name));
        let (found, said) = (probes(), answers());
        let told =
            bench.world.privatelink(&["explain", "--from", "bank", "tcp", "10.0.1.5:40001", "10.0.9.9:80"]);
        let told = String::from_utf8_lossy(&told.stdout).into_owned();
        assert!(
            told.contains("is not among the allowed principals of payments"),
            "the operator knows: {told}"
        );
        goes_on(&bench, "ca", &at_target);
        assert_eq!(answer(&bench.world, "ca", names[0])[3] & 15, 0, "who is allowed has the name");

        let (status, says) = bench.world.apply(&absent);
        assert_eq!(status, Some(0), "{says}");
        assert_eq!(probes(), found);
        assert_eq!(answers(), said);
        assert!(found.iter().all(|(verdict, ..)| *verdict == PASS), "nothing here is anybody's: {found:?}");
    }
}

/// Sends frames of forged flows and neighbours until it is told to stop; returns how many flows they would have opened.
fn flood(stop: &AtomicBool) -> u64 {
    let interface = interfaces().into_iter().find(|it| it.name == "eth0").unwrap();
    let Ok(Channel::Ethernet(mut sender, _)) = channel(&interface, Config::default()) else {
        panic!("no channel")
    };
    let mut flows = 0;
    for (round, [a, b]) in (0..=u16::MAX).cycle().map(u16::to_be_bytes).enumerate() {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let (from, mut from6) = ([10, 0, a, b], six(b));
        (from6[13], from6[14]) = (1, a);
        let from_port = 1024 + u16::try_from(round % 60000).unwrap();
        let from_mac = [2, 7, 7, 7, a, b];
        let syn = Packet { from, from_port, from_mac, ..Packet::tcp(SYN) };
        let syn6 = Packet6::of(from6, ENDPOINT6, Packet { to_port: 81, ..syn.clone() });
        let query = Packet { from_port, from_mac, to_port: 81, ..Packet::udp() };
        let query6 = Packet6::of(from6, ENDPOINT6, query);
        flows += 3;
        for frame in [
            syn.build(),
            syn6.build(),
            query6.build(),
            arp(1, from_mac, from, [0; 6], ENDPOINT, [0xff; 6]),
            arp(2, from_mac, from, from_mac, from, [0xff; 6]),
            arp(2, from_mac, ENDPOINT, from_mac, ENDPOINT, [0xff; 6]),
            discovery(from6, group(Some(ENDPOINT6)), 135, &told(0, ENDPOINT6, 1)),
            discovery(from6, group(None), 136, &told(0x20, from6, 2)),
            discovery(from6, group(None), 136, &told(0x20, ENDPOINT6, 2)),
        ] {
            // What its own queue has no room for is lost; it goes on.
            let _ = sender.send_to(&frame, None);
        }
    }
    flows
}

#[test]
fn one_tenants_flood_of_flows_and_neighbours_meets_its_own_quotas_while_the_other_is_served_all_the_same() {
    let quotas = "[endpoints.shop]\nmax_flows = 64\nmax_new_flows_per_second = 32";
    let text = dualstack("", UNCHECKED).replace("[endpoints.shop]", quotas);
    let mut world = World::dualstack(&text, &["t1", "t2"]);
    world.serve("t1");
    world.serve("t2");
    let slow = ["-s", "--limit-rate", "4M", "-o", "/dev/null", "http://10.0.9.9/large"];
    let transfer = world.spawn("cb", "curl", &slow);
    eventually("the transfer runs", || (world.state()["bank to_consumer_packets"] > 20).then_some(()));
    let before = world.state();
    let stop = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&stop);
    let flooding = world.thread("ca", move || flood(&told));
    let of = |key: &str| world.state().get(key).copied().unwrap_or(0) - before.get(key).copied().unwrap_or(0);
    eventually("the flood is beyond its quota", || (of("shop endpoint_rate") > 1000).then_some(()));
    const REQUESTS: i64 = 60;
    let line = format!(
        "for i in $(seq {REQUESTS}); do curl -sS --max-time 10 -o /dev/null -w '%{{http_code}} ' http://10.0.9.9/; done"
    );
    assert_eq!(world.shell("cb", &line).split_whitespace().filter(|code| *code == "200").count(), 60);
    stop.store(true, Ordering::Relaxed);
    let flows = flooding.join().unwrap();
    assert!(world.finished(transfer), "the connection of before has ended well");

    let moved: BTreeMap<_, _> = changes(&before, &world.state()).into_iter().collect();
    let of = |key: &str| moved.get(key).copied().unwrap_or(0);
    assert_eq!(of("bank new_flows"), REQUESTS);
    let told = [
        "bank to_provider_packets",
        "bank to_consumer_packets",
        "bank new_flows",
        "bank arp_reply",
        "bank passed",
    ];
    let banks =
        moved.keys().filter(|key| key.starts_with("bank")).filter(|key| !told.contains(&key.as_str()));
    assert_eq!(banks.collect::<Vec<_>>(), [""; 0], "nothing of the other's was refused");
    let opened = of("shop new_flows") + of("shop6 new_flows");
    assert!(opened > 0 && u64::try_from(opened * 20).unwrap() < flows, "{opened} of {flows}: {moved:?}");
    for reason in ["endpoint_rate", "spoofed_source"] {
        assert!(of(&format!("shop {reason}")) > 1000, "{reason}: {moved:?}");
    }
    assert!(of("map established") < 2 * 64 + 2 * REQUESTS, "{moved:?}");
}
