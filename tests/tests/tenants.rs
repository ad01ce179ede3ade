//! Tenants with equal addresses who mean ill: what they forge goes nowhere, is counted under their own name, and nobody else notices.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test: a panic with its place is what is wanted")]

use privatelink_tests::bench::{BALANCER, Bench, CLIENT, ENDPOINT, PASS, REDIRECT, each, reply, side};
use privatelink_tests::packet::{ACK, Ip, PSH, Packet, RST, SYN, addresses, arp};
use privatelink_tests::world::changes;

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

        let after = bench.world.state();
        let others = changes(&before, &after).into_iter().filter(|(key, _)| !key.starts_with("shop "));
        assert_eq!(others.collect::<Vec<_>>(), [], "nobody else's counters have moved");
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

        let after = bench.world.state();
        let others = changes(&before, &after).into_iter().filter(|(key, _)| !key.starts_with("payments "));
        assert_eq!(others.collect::<Vec<_>>(), [], "no consumer's counters have moved");
        goes_on(bench, "cb", &at_target);
    });
}
