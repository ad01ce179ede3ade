//! VPCs that are VLANs of a trunk: byte by byte as it is on the wire, by either hook, and real clients and servers.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests: a panic with its place is what is wanted")]

use privatelink_tests::packet::{
    ACK, Ip, Ip6, Mac, Packet, Packet6, SYN, addresses, addresses6, arp, ethernet, six,
};
use privatelink_tests::wire::{C, Host, S, Tag, Wire, tagged, untagged};
use privatelink_tests::world::{World, changes, eventually};
use serde_json::Value;

const CLIENT: Ip = [10, 0, 1, 5];
const ENDPOINT: Ip = [10, 0, 9, 9];
const BALANCER: Ip = [10, 0, 1, 10];

/// The consumers: VPC, device, tags.
const CONSUMERS: [(&str, &str, &[Tag]); 3] =
    [("shop", "trunk", &[(C, 120)]), ("bank", "trunk", &[(S, 200), (C, 120)]), ("plain", "plain", &[])];

/// The targets: last byte of the address, listener's port, device, tags.
const TARGETS: [(u8, u16, &str, &[Tag]); 3] = [
    (21, 80, "trunk", &[(C, 300)]),
    (22, 81, "side", &[]),
    (23, 82, "other", &[(S, 400), (C, 300)]),
];

fn config(hook: &str) -> String {
    let mut text = format!("hook = \"{hook}\"\n");
    let vpc = |name: &str, account: &str, interfaces: &str| {
        format!(
            "[vpcs.{name}]\naccount = \"{account}\"\ncidrs = [\"10.0.0.0/16\", \"fd00::/64\"]\ninterfaces = [{interfaces}]\n"
        )
    };
    text += &vpc("shop", "111122223333", r#"{ trunk = "trunk", vlan = 120 }"#);
    text += &vpc("bank", "444455556666", r#"{ trunk = "trunk", service_vlan = 200, vlan = 120 }"#);
    text += &vpc("plain", "777788889999", r#""plain""#);
    let provider = r#"{ trunk = "trunk", vlan = 300 }, "side", { trunk = "other", service_vlan = 400, vlan = 300 }"#;
    text += &vpc("payments", "999900001111", provider);
    let mut listeners = Vec::new();
    for (last, port, ..) in TARGETS {
        for (family, address, port) in [("ipv4", format!("10.0.1.{last}"), port), ("ipv6", format!("fd00::{last}"), port + 10)] {
            text += &format!(
                "[target_groups.{family}-{last}]\nvpc = \"payments\"\nprotocol = \"tcp_udp\"\nip_address_type = \"{family}\"\n\
                 port = 8080\ntargets = [{{ address = \"{address}\", zone = \"a\" }}]\nhealth_check = {{ enabled = false }}\n"
            );
            let protocol = if family == "ipv6" { "tcp_udp" } else { "tcp" };
            listeners.push(format!(
                "{{ protocol = \"{protocol}\", port = {port}, target_group = \"{family}-{last}\" }}"
            ));
        }
    }
    text += &format!(
        "[load_balancers.edge]\nvpc = \"payments\"\naddresses = {{ a = [\"10.0.1.10\", \"fd00::10\"] }}\nlisteners = [{}]\n",
        listeners.join(", ")
    );
    text += "[endpoint_services.payments]\nload_balancers = [\"edge\"]\nacceptance_required = false\nallowed_principals = [\"*\"]\n\
             supported_ip_address_types = [\"ipv4\", \"ipv6\"]\n";
    for (name, ..) in CONSUMERS {
        text += &format!(
            "[endpoints.{name}]\nvpc = \"{name}\"\nservice = \"payments\"\naddresses = {{ a = [\"10.0.9.9\", \"fd00::99\"] }}\n"
        );
    }
    text
}

/// Every device is a tap; what passes on the trunk is bridged to one more.
struct Lan {
    world: World,
    trunk: Wire,
    other: Wire,
    plain: Wire,
    side: Wire,
    beyond: Wire,
}

fn host(last: u8, tags: &[Tag]) -> Host {
    Host {
        tags: tags.to_vec(),
        address: [10, 0, 1, last],
        // As the address is written.
        address6: six(last / 10 * 16 + last % 10),
        mac: [2, 5, 5, 5, 5, last],
    }
}

impl Lan {
    fn new(config: &str) -> Self {
        let mut world = World::bare(config);
        let [trunk, other, plain, side, beyond] =
            ["trunk", "other", "plain", "side", "beyond"].map(|device| Wire::new(&mut world, device));
        world.shell(
            "dp",
            "ip link add bridge type bridge forward_delay 0 mcast_snooping 0 && ip link set bridge up && \
             ip link set trunk master bridge && ip link set beyond master bridge",
        );
        let mut lan = Self { world, trunk, other, plain, side, beyond };
        for (last, _, device, tags) in TARGETS {
            lan.wire(device).add(&host(last, tags));
        }
        lan.world.start(&[]);
        lan
    }

    fn wire(&self, device: &str) -> &Wire {
        match device {
            "trunk" => &self.trunk,
            "other" => &self.other,
            "plain" => &self.plain,
            "side" => &self.side,
            _ => panic!("no device {device}"),
        }
    }
}

/// By each hook.
fn each(check: impl Fn(&Lan)) {
    for (hook, shown) in [("tcx", "tcx"), ("xdp", "xdp")] {
        let lan = Lan::new(&config(hook));
        for row in lan.world.json("status")[0]["interfaces"].as_array().unwrap() {
            if !row["interface"].as_str().unwrap().starts_with("pls") {
                assert_eq!(row["hook"], shown, "{row}");
            }
        }
        check(&lan);
    }
}

/// With the priority that a host has given its frames.
fn prior(tags: &[Tag]) -> Vec<Tag> {
    tags.iter().map(|(kind, vlan)| (*kind, vlan | 0xb000)).collect()
}

fn macs(frame: &[u8]) -> (Mac, Mac) {
    (frame[0..6].try_into().unwrap(), frame[6..12].try_into().unwrap())
}

#[test]
fn tags_are_rewritten_on_the_way_across_and_back_whatever_each_side_has() {
    each(|lan| {
        let mut ports = Vec::new();
        for (consumer, device, tags) in CONSUMERS {
            for (last, to_port, target_device, target_tags) in TARGETS {
                let what = format!("{consumer} to {last}");
                let before = lan.world.state();
                let syn = Packet { to_port, ..Packet::tcp(SYN) };
                lan.wire(device).send(&tagged(&syn.build(), &prior(tags)));
                let (got, frame) = untagged(&lan.wire(target_device).next(&what));
                assert_eq!(got, target_tags, "{what}: a priority is its own trunk's");
                let (.., nat, target, _) = {
                    let (from, nat, target, port) = addresses(&frame);
                    assert_eq!((from, port), (BALANCER, 8080), "{what}");
                    ((), nat, target, ())
                };
                let at_target = Packet {
                    from: BALANCER,
                    from_port: nat,
                    to: [10, 0, 1, last],
                    to_port: 8080,
                    to_mac: [2, 5, 5, 5, 5, last],
                    from_mac: macs(&frame).1,
                    ttl: 63,
                    ..syn.clone()
                };
                assert_eq!((target, frame), (at_target.to, at_target.build()), "{what}");

                let answer = Packet {
                    from: at_target.to,
                    to: BALANCER,
                    from_port: 8080,
                    to_port: nat,
                    from_mac: at_target.to_mac,
                    to_mac: at_target.from_mac,
                    ..Packet::tcp(SYN | ACK)
                };
                lan.wire(target_device).send(&tagged(&answer.build(), &prior(target_tags)));
                let (got, frame) = untagged(&lan.wire(device).next(&what));
                let at_client = Packet {
                    from: ENDPOINT,
                    from_port: to_port,
                    to: CLIENT,
                    to_port: syn.from_port,
                    to_mac: syn.from_mac,
                    from_mac: macs(&frame).1,
                    ttl: 63,
                    ..answer
                };
                assert_eq!((got.as_slice(), frame), (tags, at_client.build()), "{what}: the answer");

                // The rest of the connection is in the established table.
                let ack = Packet { to_port, payload: b"hello".to_vec(), ..Packet::tcp(ACK) };
                lan.wire(device).send(&tagged(&ack.build(), tags));
                let frame = lan.wire(target_device).next(&what);
                let expected = Packet { flags: ACK, ack: 77, payload: b"hello".to_vec(), ..at_target };
                assert_eq!(frame, tagged(&expected.build(), target_tags), "{what}: the data");
                let moved = changes(&before, &lan.world.state());
                for (count, by) in [("to_provider_packets", 2), ("to_consumer_packets", 1), ("new_flows", 1)] {
                    assert!(moved.contains(&(format!("{consumer} {count}"), by)), "{what}: {moved:?}");
                }
                ports.push((nat, target));
            }
        }
        // All of them had the same five-tuple for each target.
        ports.sort_unstable();
        ports.dedup();
        assert_eq!(ports.len(), CONSUMERS.len() * TARGETS.len());
        [&lan.trunk, &lan.other, &lan.plain, &lan.side, &lan.beyond].map(|wire| wire.is_silent("at the end"));
    });
}

#[test]
fn ipv6_and_a_change_of_the_family_keep_the_tags_right() {
    const CLIENT6: Ip6 = six(5);
    each(|lan| {
        for (consumer, device, tags) in CONSUMERS {
            for (last, port, target_device, target_tags) in TARGETS {
                let host = host(last, target_tags);
                // IPv6 to IPv6, IPv6 to IPv4, IPv4 to IPv6.
                for (number, (six_in, six_out)) in [(true, true), (true, false), (false, true)].into_iter().enumerate() {
                    let what = format!("{consumer} to {last}, {six_in} {six_out}");
                    let to_port = if six_out { port + 10 } else { port };
                    let from_port = 41000 + u16::try_from(number).unwrap();
                    let syn = Packet { to_port, from_port, ..Packet::tcp(SYN) };
                    let sent = if six_in { Packet6::of(CLIENT6, six(0x99), syn.clone()).build() } else { syn.build() };
                    lan.wire(device).send(&tagged(&sent, tags));
                    let (got, frame) = untagged(&lan.wire(target_device).next(&what));
                    assert_eq!(got, target_tags, "{what}");
                    let (to_mac, from_mac) = macs(&frame);
                    let nat = if six_out {
                        let (from, nat, to, to_port) = addresses6(&frame);
                        assert_eq!((from, to, to_port), (six(0x10), host.address6, 8080), "{what}");
                        nat
                    } else {
                        let (from, nat, to, to_port) = addresses(&frame);
                        assert_eq!((from, to, to_port), (BALANCER, host.address, 8080), "{what}");
                        nat
                    };
                    let answer = Packet {
                        from: host.address,
                        to: BALANCER,
                        from_port: 8080,
                        to_port: nat,
                        from_mac: to_mac,
                        to_mac: from_mac,
                        ..Packet::tcp(SYN | ACK)
                    };
                    let sent = if six_out {
                        Packet6::of(host.address6, six(0x10), answer.clone()).build()
                    } else {
                        answer.build()
                    };
                    lan.wire(target_device).send(&tagged(&sent, target_tags));
                    let (got, frame) = untagged(&lan.wire(device).next(&what));
                    assert_eq!(got, tags, "{what}: the answer");
                    let expected = Packet {
                        from: ENDPOINT,
                        to: CLIENT,
                        from_port: to_port,
                        to_port: from_port,
                        from_mac: macs(&frame).1,
                        to_mac: syn.from_mac,
                        ttl: 63,
                        ..answer
                    };
                    let expected = if six_in {
                        Packet6::of(six(0x99), CLIENT6, expected).build()
                    } else {
                        // A translated header has an identification of its own.
                        let id = u16::from_be_bytes([frame[18], frame[19]]);
                        let fragment = u16::from_be_bytes([frame[20], frame[21]]);
                        Packet { id, fragment, ..expected }.build()
                    };
                    assert_eq!(frame, expected, "{what}: the answer");
                }
            }
        }
    });
}

#[test]
fn answers_leave_with_the_tags_that_their_questions_came_with() {
    each(|lan| {
        for (consumer, device, tags) in CONSUMERS {
            let tags = prior(tags);
            let (wire, mac) = (lan.wire(device), [2, 1, 1, 1, 1, 1]);
            let ask = |what: &str, frame: &[u8]| {
                wire.send(&tagged(frame, &tags));
                let (got, frame) = untagged(&wire.next(&format!("{what} of {consumer}")));
                assert_eq!(got, tags, "{what} of {consumer}");
                frame
            };
            let reply = ask("ARP", &arp(1, mac, CLIENT, [0; 6], ENDPOINT, [0xff; 6]));
            let ours: Mac = reply[6..12].try_into().unwrap();
            assert_eq!(reply, arp(2, ours, ENDPOINT, mac, CLIENT, mac));
            let group = [&[0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff][..], &six(0x99)[13..]].concat();
            let inner = Packet { ttl: 255, ..Packet::tcp(0) };
            let body = [&[0; 4][..], &six(0x99), &[1, 1], &mac].concat();
            let solicitation = Packet6::of(six(5), group.try_into().unwrap(), inner).icmp(135, &body);
            let advertisement = ask("neighbour discovery", &solicitation);
            assert_eq!((advertisement[54], &advertisement[62..78]), (136, &six(0x99)[..]));
            assert_eq!(advertisement[80..86], advertisement[6..12], "it says where it is");
            let echo = Packet::tcp(0);
            let reply = ask("an echo", &echo.icmp(8, b"\x00\x01\x00\x01abcdefgh"));
            let back = Packet { from: ENDPOINT, to: CLIENT, from_mac: echo.to_mac, to_mac: echo.from_mac, ..echo };
            assert_eq!(reply[34..], back.icmp(0, b"\x00\x01\x00\x01abcdefgh")[34..]);
            let reset = ask("a segment of no flow", &Packet::tcp(ACK).build());
            assert_eq!((reset[47] & 4, addresses(&reset).0), (4, ENDPOINT));
            let old = Packet { ttl: 1, ..Packet::tcp(SYN) };
            let error = ask("a SYN without hops", &old.build());
            assert_eq!((error[23], error[34], &error[26..30], &error[30..34]), (1, 11, &ENDPOINT[..], &CLIENT[..]));
            assert_eq!(error[42..62], old.build()[14..34], "it holds the header");
            let old6 = Packet6::of(six(5), six(0x99), old);
            let error = ask("an IPv6 SYN without hops", &old6.build());
            assert_eq!((error[20], error[54], &error[38..54]), (58, 3, &six(5)[..]));
        }
        [&lan.trunk, &lan.other, &lan.plain, &lan.side, &lan.beyond].map(|wire| wire.is_silent("at the end"));
    });
}

#[test]
fn what_is_nobodys_or_nothing_of_ours_passes_with_the_tags_that_it_came_with() {
    each(|lan| {
        let syn = Packet::tcp(SYN).build();
        let strange = Packet { to: [10, 0, 1, 77], to_mac: [2, 7, 7, 7, 7, 7], ..Packet::udp() }.build();
        let announced = arp(1, [2, 1, 1, 1, 1, 1], CLIENT, [0; 6], [10, 0, 1, 78], [0xff; 6]);
        let other = ethernet([2, 7, 7, 7, 7, 7], [2, 1, 1, 1, 1, 1], 0x88cc, b"something else entirely");
        // Of interfaces: what is to none of our addresses.
        for (vpc, tags) in [("shop", vec![(C, 0x7078)]), ("bank", vec![(S, 0xf0c8), (C, 0x3078)])] {
            for (what, frame) in [("a datagram", &strange), ("a question", &announced), ("another EtherType", &other)] {
                let (sent, before) = (tagged(frame, &tags), lan.world.state());
                lan.trunk.send(&sent);
                if what != "a question" {
                    assert_eq!(lan.beyond.next(what), sent, "{what} of {vpc}");
                }
                eventually("it is counted", || {
                    let moved = changes(&before, &lan.world.state());
                    (moved == [(format!("{vpc} passed"), 1)]).then_some(())
                });
            }
        }
        // Of nobody: even what would be ours on another VLAN.
        let nobodys: [&[Tag]; 9] = [
            &[],
            &[(C, 0)],
            &[(C, 121)],
            &[(C, 4095)],
            &[(S, 120)],
            &[(S, 201), (C, 120)],
            &[(C, 200), (C, 120)],
            &[(C, 200), (S, 120)],
            &[(S, 200), (C, 120), (C, 5)],
        ];
        for tags in nobodys {
            for frame in [&syn, &strange] {
                let (sent, before) = (tagged(frame, tags), lan.world.state());
                lan.trunk.send(&sent);
                assert_eq!(lan.beyond.next("nobody's"), sent, "{tags:?}");
                eventually("it is counted", || {
                    (changes(&before, &lan.world.state()) == [("- passed".to_owned(), 1)]).then_some(())
                });
            }
        }
        // A frame that ends within its tags.
        for length in 14..22 {
            let sent = &tagged(&syn, &[(S, 200), (C, 120)])[..length];
            let before = lan.world.state();
            lan.trunk.send(sent);
            eventually("it is counted", || (!changes(&before, &lan.world.state()).is_empty()).then_some(()));
            let moved = changes(&before, &lan.world.state());
            assert!(moved.iter().all(|(what, _)| what.ends_with("passed")), "{length}: {moved:?}");
        }
    });
}

#[test]
fn the_trunk_itself_may_be_a_vpcs_and_a_priority_without_a_vlan_is_no_tag() {
    each(|lan| {
        let with = |hook: &str| {
            let named = r#"interfaces = ["plain", "trunk"]"#;
            config(hook).replace(r#"interfaces = ["plain"]"#, named)
        };
        let hook = lan.world.json("status")[0]["interfaces"][0]["hook"].as_str().unwrap().to_owned();
        let tagged_shop = Packet { from_port: 42000, ..Packet::tcp(SYN) };
        lan.trunk.send(&tagged(&tagged_shop.build(), &[(C, 120)]));
        lan.trunk.next("before");
        let (code, said) = lan.world.apply(&with(&hook));
        assert_eq!(code, Some(0), "{said}");
        assert!(said.contains("trunk in plain"), "{said}");
        for (number, tags) in [vec![], vec![(C, 0)], vec![(C, 0xe000)], vec![(S, 0x2000)]].into_iter().enumerate() {
            let from_port = 43000 + u16::try_from(number).unwrap();
            let (syn, before) = (Packet { from_port, to_port: 81, ..Packet::tcp(SYN) }, lan.world.state());
            lan.trunk.send(&tagged(&syn.build(), &tags));
            let frame = lan.side.next("of the trunk itself");
            let (from, nat, target, _) = addresses(&frame);
            assert_eq!((from, target), (BALANCER, [10, 0, 1, 22]), "{tags:?}");
            assert!(changes(&before, &lan.world.state()).contains(&("plain new_flows".into(), 1)));
            let answer = Packet {
                from: target,
                to: from,
                from_port: 8080,
                to_port: nat,
                from_mac: macs(&frame).0,
                to_mac: macs(&frame).1,
                ..Packet::tcp(SYN | ACK)
            };
            lan.side.send(&answer.build());
            let frame = lan.trunk.next("back");
            assert_eq!((untagged(&frame).0, addresses(&frame).3), (vec![], from_port), "{tags:?}");
            let question = arp(1, [2, 1, 1, 1, 1, 1], CLIENT, [0; 6], ENDPOINT, [0xff; 6]);
            lan.trunk.send(&tagged(&question, &tags));
            assert_eq!(untagged(&lan.trunk.next("ARP")).0, tags, "answers have the same priority");
        }
        let again = Packet { flags: SYN, ..tagged_shop };
        lan.trunk.send(&tagged(&again.build(), &[(C, 120)]));
        assert_eq!(untagged(&lan.trunk.next("the VLANs go on")).0, [(C, 300)]);
        let (code, said) = lan.world.apply(&config(&hook));
        assert_eq!(code, Some(0), "{said}");
        let before = lan.world.state();
        lan.trunk.send(&Packet { from_port: 44000, ..Packet::tcp(SYN) }.build());
        lan.beyond.next("nobody's again");
        assert_eq!(changes(&before, &lan.world.state()), [("- passed".to_owned(), 1)]);
        lan.trunk.send(&tagged(&again.build(), &[(C, 120)]));
        assert_eq!(untagged(&lan.trunk.next("the VLANs go on")).0, [(C, 300)]);
    });
}

fn rows(world: &World) -> Vec<Value> {
    world.json("status")[0]["interfaces"].as_array().unwrap().clone()
}
