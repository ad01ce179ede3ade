//! VPCs that are VLANs of a trunk: byte by byte as it is on the wire, by either hook, and real clients and servers.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests: a panic with its place is what is wanted")]

use privatelink_tests::capture::{Capture, file, is_as_before, is_captured, written};
use privatelink_tests::packet::{
    ACK, Ip, Ip6, Mac, Packet, Packet6, SYN, addresses, addresses6, arp, ethernet, six,
};
use privatelink_tests::pcapng::Record;
use privatelink_tests::switch::{Port, Switch};
use privatelink_tests::wire::{C, Host, S, Tag, Wire, tagged, untagged};
use privatelink_tests::world::{CHECKED, UNCHECKED, World, changes, eventually};
use serde_json::Value;
use std::io::{BufRead, Read};

const CLIENT: Ip = [10, 0, 1, 5];
const ENDPOINT: Ip = [10, 0, 9, 9];
const BALANCER: Ip = [10, 0, 1, 10];

/// The consumers: VPC, device, tags.
const CONSUMERS: [(&str, &str, &[Tag]); 3] =
    [("shop", "trunk", &[(C, 120)]), ("bank", "trunk", &[(S, 200), (C, 120)]), ("plain", "plain", &[])];

/// The targets: last byte of the address, listener's port, device, tags.
const TARGETS: [(u8, u16, &str, &[Tag]); 3] =
    [(21, 80, "trunk", &[(C, 300)]), (22, 81, "side", &[]), (23, 82, "other", &[(S, 400), (C, 300)])];

/// The devices that are trunks.
const TRUNKS: [&str; 2] = ["trunk", "other"];

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
    let provider =
        r#"{ trunk = "trunk", vlan = 300 }, "side", { trunk = "other", service_vlan = 400, vlan = 300 }"#;
    text += &vpc("payments", "999900001111", provider);
    let mut listeners = Vec::new();
    for (last, port, ..) in TARGETS {
        for (family, address, port) in
            [("ipv4", format!("10.0.1.{last}"), port), ("ipv6", format!("fd00::{last}"), port + 10)]
        {
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

    /// Nothing has come that nobody waited for.
    fn is_silent(&self) {
        for wire in [&self.trunk, &self.other, &self.plain, &self.side] {
            wire.is_silent("at the end");
        }
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
    for hook in ["tcx", "xdp"] {
        let lan = Lan::new(&config(hook));
        for row in lan.world.json("status")[0]["interfaces"].as_array().unwrap() {
            if !row["interface"].as_str().unwrap().starts_with("pls") {
                assert_eq!(row["hook"], hook, "{row}");
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
                let (_, nat, target, _) = addresses(&frame);
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
                for (count, by) in [("to_provider_packets", 2), ("to_consumer_packets", 1), ("new_flows", 1)]
                {
                    assert!(moved.contains(&(format!("{consumer} {count}"), by)), "{what}: {moved:?}");
                }
                ports.push((nat, target));
            }
        }
        // All of them had the same five-tuple for each target.
        ports.sort_unstable();
        ports.dedup();
        assert_eq!(ports.len(), CONSUMERS.len() * TARGETS.len());
        lan.is_silent();
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
                for (number, (six_in, six_out)) in
                    [(true, true), (true, false), (false, true)].into_iter().enumerate()
                {
                    let what = format!("{consumer} to {last}, {six_in} {six_out}");
                    let to_port = if six_out { port + 10 } else { port };
                    let from_port = 41000 + u16::try_from(number).unwrap();
                    let syn = Packet { to_port, from_port, ..Packet::tcp(SYN) };
                    let sent = if six_in {
                        Packet6::of(CLIENT6, six(0x99), syn.clone()).build()
                    } else {
                        syn.build()
                    };
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

/// What is larger than a page is in several buffers by either hook, as it comes from a tap device.
#[test]
fn a_datagram_without_a_checksum_gets_one_between_tags_in_however_many_buffers_it_is() {
    each(|lan| {
        for device in ["trunk", "other", "plain", "side"] {
            lan.world.shell("dp", &format!("ip link set {device} mtu 9100"));
        }
        lan.world.shell("dp", "ip link set bridge mtu 9100 && ip link set beyond mtu 9100");
        eventually("the path knows that they carry more", || {
            let status = lan.world.json("status");
            let rows = status[0]["interfaces"].as_array()?;
            let ours = rows.iter().filter(|row| !row["interface"].as_str().unwrap().starts_with("pls"));
            ours.map(|row| row["mtu"].as_u64()).all(|mtu| mtu >= Some(9000)).then_some(())
        });
        for (consumer, device, tags) in CONSUMERS {
            for (last, port, target_device, target_tags) in TARGETS {
                for length in [1, 1472, 5001, 8451] {
                    let what = format!("{consumer} to {last}, {length} bytes");
                    let payload = (0..=250).cycle().take(length).collect();
                    let sent = Packet { to_port: port + 10, no_checksum: true, payload, ..Packet::udp() };
                    lan.wire(device).send(&tagged(&sent.build(), tags));
                    let (got, frame) = untagged(&lan.wire(target_device).next(&what));
                    assert_eq!(got, target_tags, "{what}");
                    let (_, nat, target, _) = addresses6(&frame);
                    let (to_mac, from_mac) = macs(&frame);
                    let inner = Packet {
                        from_port: nat,
                        to_port: 8080,
                        ttl: 63,
                        to_mac,
                        from_mac,
                        no_checksum: false,
                        ..sent
                    };
                    assert!(frame == Packet6::of(six(0x10), target, inner).build(), "{what}");
                }
            }
        }
    });
}

#[test]
fn a_fragment_that_comes_before_its_first_follows_it_with_the_tags_of_the_other_side() {
    /// Bytes of the datagram in the first.
    const SIZE: u16 = 1376;
    each(|lan| {
        for (consumer, device, tags) in CONSUMERS {
            for (last, port, target_device, target_tags) in TARGETS {
                for six_in in [true, false] {
                    let what = format!("{consumer} to {last}, IPv6: {six_in}");
                    let from_port = if six_in { 42000 } else { 42001 };
                    let payload = vec![7; 2000];
                    let inner = Packet {
                        to_port: port + 10,
                        from_port,
                        payload,
                        id: port,
                        fragment: 0,
                        ..Packet::udp()
                    };
                    let query = Packet6::of(six(5), six(0x99), inner.clone());
                    let (bytes6, bytes) = (query.build()[54..].to_vec(), inner.build()[34..].to_vec());
                    let size = usize::from(SIZE);
                    let sent = if six_in {
                        [
                            query.fragment(port.into(), 0, true, &bytes6[..size]),
                            query.fragment(port.into(), SIZE, false, &bytes6[size..]),
                        ]
                    } else {
                        let part = |fragment, bytes| Packet { fragment, ..inner.clone() }.ipv4(bytes);
                        [part(0x2000, &bytes[..size]), part(SIZE / 8, &bytes[size..])]
                    };
                    lan.wire(device).send(&tagged(&sent[1], tags));
                    lan.wire(device).send(&tagged(&sent[0], tags));
                    let got: [_; 2] = [0, 1].map(|_| untagged(&lan.wire(target_device).next(&what)));
                    let first = &got[0].1;
                    let ((to_mac, from_mac), id) = (macs(first), &first[58..62]);
                    let id = u32::from_be_bytes(id.try_into().unwrap());
                    let from_port = u16::from_be_bytes([first[62], first[63]]);
                    let inner = Packet { from_port, to_port: 8080, ttl: 63, to_mac, from_mac, ..inner };
                    let at_target = Packet6::of(six(0x10), host(last, target_tags).address6, inner);
                    let bytes = at_target.build()[54..].to_vec();
                    let pieces = [(0, true, &bytes[..size]), (SIZE, false, &bytes[size..])];
                    let expected = pieces.map(|(offset, more, part)| {
                        (target_tags.to_vec(), at_target.fragment(id, offset, more, part))
                    });
                    assert_eq!(got, expected, "{what}");
                }
            }
        }
        lan.is_silent();
        let outcomes = lan.world.json("status")[0]["outcomes"].to_string();
        assert!(outcomes.contains("fragment_early") && !outcomes.contains("fragment_unknown"), "{outcomes}");
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
            let back =
                Packet { from: ENDPOINT, to: CLIENT, from_mac: echo.to_mac, to_mac: echo.from_mac, ..echo };
            assert_eq!(reply[34..], back.icmp(0, b"\x00\x01\x00\x01abcdefgh")[34..]);
            let reset = ask("a segment of no flow", &Packet::tcp(ACK).build());
            assert_eq!((reset[47] & 4, addresses(&reset).0), (4, ENDPOINT));
            let old = Packet { ttl: 1, ..Packet::tcp(SYN) };
            let error = ask("a SYN without hops", &old.build());
            assert_eq!(
                (error[23], error[34], &error[26..30], &error[30..34]),
                (1, 11, &ENDPOINT[..], &CLIENT[..])
            );
            assert_eq!(error[42..62], old.build()[14..34], "it holds the header");
            let old6 = Packet6::of(six(5), six(0x99), old);
            let error = ask("an IPv6 SYN without hops", &old6.build());
            assert_eq!((error[20], error[54], &error[38..54]), (58, 3, &six(5)[..]));
        }
        lan.is_silent();
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
            for (what, frame) in
                [("a datagram", &strange), ("a question", &announced), ("another EtherType", &other)]
            {
                let (sent, before) = (tagged(frame, &tags), lan.world.state());
                lan.trunk.send(&sent);
                if what != "a question" {
                    lan.beyond.find(&format!("{what} of {vpc}"), |frame| frame == sent);
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
                lan.beyond.find(&format!("nobody's, {tags:?}"), |frame| frame == sent);
                eventually("it is counted", || {
                    (changes(&before, &lan.world.state()) == [("- passed".to_owned(), 1)]).then_some(())
                });
            }
        }
        // A frame that ends within its tags. The kernel drops one that ends before what follows the outer one by itself, behind XDP.
        let is_xdp = row(&lan.world, "trunk")["hook"] == "xdp";
        for length in if is_xdp { 14 } else { 20 }..22 {
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
        let hook = lan.world.json("status")[0]["interfaces"][0]["hook"].as_str().unwrap().to_owned();
        let tagged_shop = Packet { from_port: 42000, ..Packet::tcp(SYN) };
        lan.trunk.send(&tagged(&tagged_shop.build(), &[(C, 120)]));
        lan.trunk.next("before");
        let (code, said) = lan.world.apply(&with_trunk(&hook));
        assert_eq!(code, Some(0), "{said}");
        assert!(said.contains("trunk in plain"), "{said}");
        for (number, tags) in
            [vec![], vec![(C, 0)], vec![(C, 0xe000)], vec![(S, 0x2000)]].into_iter().enumerate()
        {
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
        let sent = Packet { from_port: 44000, ..Packet::tcp(SYN) }.build();
        lan.trunk.send(&sent);
        lan.beyond.find("nobody's again", |frame| frame == sent);
        assert_eq!(changes(&before, &lan.world.state()), [("- passed".to_owned(), 1)]);
        lan.trunk.send(&tagged(&again.build(), &[(C, 120)]));
        assert_eq!(untagged(&lan.trunk.next("the VLANs go on")).0, [(C, 300)]);
    });
}

/// How an interface is shown that is these tags on a device.
fn interface(device: &str, tags: &[Tag]) -> String {
    let vlans: Vec<_> = tags.iter().map(|(_, control)| (control & 0xfff).to_string()).collect();
    if vlans.is_empty() { device.to_owned() } else { format!("{device}@{}", vlans.join(".")) }
}

/// The same, where what is untagged on the trunk, or nobody's, belongs to a VPC.
fn with_trunk(hook: &str) -> String {
    config(hook).replace(r#"interfaces = ["plain"]"#, r#"interfaces = ["plain", "trunk"]"#)
}

#[test]
fn a_capture_has_every_frame_of_a_trunk_byte_by_byte_with_the_tags_that_it_came_and_left_with() {
    for hook in ["tcx", "xdp"] {
        let lan = Lan::new(&with_trunk(hook));
        let path = file(&lan.world).display().to_string();
        let capture = Capture::start(&lan.world, &["--write", &path]);
        assert!(is_captured(&lan.world, &TRUNKS), "{hook}: the capture's programs are in place");
        let mut wanted = Vec::new();
        for (consumer, device, tags) in CONSUMERS {
            let tags = prior(tags);
            let came = |frame: &[u8]| (interface(device, &tags), false, tagged(frame, &tags));
            for (last, port, target_device, target_tags) in TARGETS {
                for (number, six_in) in [true, false].into_iter().enumerate() {
                    let from_port = 41000 + u16::try_from(number).unwrap();
                    let syn = Packet { to_port: port, from_port, payload: vec![7; 300], ..Packet::tcp(SYN) };
                    let sent = if six_in { Packet6::of(six(5), six(0x99), syn).build() } else { syn.build() };
                    lan.wire(device).send(&tagged(&sent, &tags));
                    let left = lan.wire(target_device).next(&format!("{consumer} to {last}"));
                    wanted.push((came(&sent), "forwarded"));
                    wanted.push(((interface(target_device, target_tags), true, left), "forwarded"));
                }
            }
            let question = arp(1, [2, 1, 1, 1, 1, 1], CLIENT, [0; 6], ENDPOINT, [0xff; 6]);
            lan.wire(device).send(&tagged(&question, &tags));
            let answer = lan.wire(device).next("an answer");
            wanted.push((came(&question), "answered"));
            wanted.push(((interface(device, &tags), true, answer), "answered"));
            let refused = Packet { to_port: 7, ..Packet::tcp(SYN) }.build();
            lan.wire(device).send(&tagged(&refused, &tags));
            wanted.push((came(&refused), "dropped: no_listener"));
            let strange = Packet { to: [10, 0, 1, 77], to_mac: [2, 7, 7, 7, 7, 7], ..Packet::udp() }.build();
            lan.wire(device).send(&tagged(&strange, &tags));
            wanted.push((came(&strange), "passed"));
        }
        for tags in [vec![], vec![(C, 0xe000)], vec![(C, 121)], vec![(C, 200), (S, 120)], vec![(S, 1); 3]] {
            let frame = tagged(&Packet { to: [10, 0, 1, 77], ..Packet::tcp(SYN) }.build(), &tags);
            lan.trunk.send(&frame);
            lan.beyond.find("nobody's", |passed| passed == frame);
            wanted.push((("trunk".into(), false, frame), "passed"));
        }
        capture.signal("-INT");
        let (status, said) = capture.end();
        assert!(status.success() && said.ends_with(" 0 found no room\n"), "{status} {said}");
        assert!(is_as_before(&lan.world, &TRUNKS), "{hook}: each trunk has its own program back");
        let records = written(&lan.world);
        for ((interface, outbound, bytes), outcome) in wanted {
            let is = |it: &&Record| it.interface == interface && it.outbound == outbound && it.bytes == bytes;
            let record = records.iter().find(is);
            let record = record.unwrap_or_else(|| {
                panic!("{hook}: {outcome} {interface} {outbound} {bytes:02x?} is not among {records:#02x?}")
            });
            assert!(record.comment.starts_with(outcome) && record.length == bytes.len(), "{record:?}");
        }
        let read = lan.world.shell("dp", &format!("tcpdump -nr {path} 2>/dev/null"));
        assert_eq!(read.lines().count(), records.len(), "{read}");
    }
}

#[test]
fn a_capture_chooses_packets_of_a_trunk_by_what_is_behind_their_tags_and_names_them() {
    each(|lan| {
        let choice = ["--vpc", "bank", "--from", "10.0.1.5:41000", "--to", "10.0.9.9:82", "--snaplen", "70"];
        let mut capture = Capture::start(&lan.world, &[&choice[..], &["--count", "2"]].concat());
        let path = file(&lan.world).display().to_string();
        for ((consumer, device, tags), from_port) in
            CONSUMERS.into_iter().flat_map(|it| [(it, 41000), (it, 41001)])
        {
            let syn = Packet { from_port, to_port: 82, payload: vec![7; 100], ..Packet::tcp(SYN) }.build();
            lan.wire(device).send(&tagged(&syn, tags));
            let frame = untagged(&lan.other.next(consumer)).1;
            let (_, nat, to, _) = addresses(&frame);
            let (to_mac, from_mac) = macs(&frame);
            let answer = Packet {
                from: to,
                to: BALANCER,
                from_port: 8080,
                to_port: nat,
                from_mac: to_mac,
                to_mac: from_mac,
                ..Packet::tcp(SYN | ACK)
            };
            lan.other.send(&tagged(&answer.build(), &[(S, 400), (C, 300)]));
            lan.wire(device).next(consumer);
        }
        let mut lines = String::new();
        capture.child.stdout.take().unwrap().read_to_string(&mut lines).unwrap();
        assert!(capture.end().0.success());
        let lines: Vec<_> = lines.lines().collect();
        assert_eq!(lines.len(), 2, "{lines:?}");
        let there = "trunk@200.120 vlan 200.120 tcp 10.0.1.5:41000 > 10.0.9.9:82 [S] => other@400.300 vlan 400.300 tcp 10.0.1.10:";
        assert!(lines[0].contains(there), "{lines:?}");
        let back = " => trunk@200.120 vlan 200.120 tcp 10.0.9.9:82 > 10.0.1.5:41000 [S.]: forwarded";
        assert!(
            lines[1].contains(" other@400.300 vlan 400.300 tcp ") && lines[1].contains(back),
            "{lines:?}"
        );

        let capture = Capture::start(&lan.world, &["-w", &path, "--snaplen", "70", "--count", "1"]);
        let syn = Packet { from_port: 41002, payload: vec![7; 100], ..Packet::tcp(SYN) }.build();
        lan.trunk.send(&tagged(&syn, &[(C, 120)]));
        let left = lan.trunk.next("cut");
        assert!(capture.end().0.success());
        let records = written(&lan.world);
        let cut: Vec<_> = records.iter().map(|it| (it.length, it.bytes.clone())).collect();
        assert_eq!(
            cut,
            [(left.len(), tagged(&syn, &[(C, 120)])[..70].to_vec()), (left.len(), left[..70].to_vec())]
        );
    });
}

#[test]
fn nobody_on_another_vlan_or_on_the_trunk_itself_can_say_where_a_target_is() {
    each(|lan| {
        let mac_of = |address: &str| {
            let rows = lan.world.json("targets");
            let row = rows.as_array().unwrap().iter().find(|row| row["address"] == address).unwrap().clone();
            row["mac"].as_str().unwrap().to_owned()
        };
        assert_eq!(mac_of("10.0.1.21"), "02:05:05:05:05:15");
        let thief: Mac = [2, 6, 6, 6, 6, 6];
        let claim = arp(2, thief, [10, 0, 1, 21], [2, 1, 1, 1, 1, 1], BALANCER, [0xff; 6]);
        let elsewhere: [&[Tag]; 6] =
            [&[], &[(C, 0)], &[(C, 120)], &[(S, 300)], &[(S, 200), (C, 120)], &[(S, 200), (C, 300)]];
        for tags in elsewhere {
            lan.trunk.send(&tagged(&claim, tags));
        }
        // What is said on the target's own VLAN is heard, and after the rest.
        let inner = Packet { from_mac: thief, to_mac: [0x33, 0x33, 0, 0, 0, 1], ttl: 255, ..Packet::tcp(0) };
        let body = [&[0x20, 0, 0, 0][..], &six(0x21), &[2, 1], &thief].concat();
        let group = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
        let moved = Packet6::of(six(0x21), group, inner).icmp(136, &body);
        lan.trunk.send(&tagged(&moved, &[(C, 300)]));
        eventually("the target that moved is followed", || {
            (mac_of("fd00::21") == "02:06:06:06:06:06").then_some(())
        });
        assert_eq!(mac_of("10.0.1.21"), "02:05:05:05:05:15");
    });
}

/// The usual world, in which all but one end are ports of a switch, and the agent has its trunk.
struct Switched {
    world: World,
    switch: Option<Switch>,
}

const PORTS: [Port<'_>; 3] = [("ca", &[(C, 120)]), ("cb", &[(S, 200), (C, 120)]), ("t1", &[(C, 300)])];

fn switched(extra: &str, checks: &str) -> String {
    privatelink_tests::world::config(extra, checks)
        .replace(r#"["ca"]"#, r#"[{ trunk = "trunk", vlan = 120 }]"#)
        .replace(r#"["cb"]"#, r#"[{ trunk = "trunk", service_vlan = 200, vlan = 120 }]"#)
        .replace(r#"["t1", "t2"]"#, r#"[{ trunk = "trunk", vlan = 300 }, "t2"]"#)
}

impl Switched {
    fn bare(config: &str) -> Self {
        let mut switched = Self { world: World::bare(config), switch: None };
        switched.plug();
        switched
    }

    fn new(config: &str) -> Self {
        let mut switched = Self::bare(config);
        switched.world.start(&[]);
        switched
    }

    /// Makes the trunk, and the switch at its other end.
    fn plug(&mut self) {
        let line =
            "ip link add trunk type veth peer name uplink && ip link set uplink up && ip link set trunk up";
        self.world.shell("dp", line);
        self.switch = Some(Switch::new(&self.world, "dp", "uplink", &PORTS));
    }

    /// Everybody gets the whole of a large file, and gives one.
    fn carry(&self) {
        let whole = self.world.shell("t1", &format!("cksum < {}/t1/large", self.world.dir.path().display()));
        let get = "curl -sSf --max-time 60 http://10.0.9.9/large | cksum";
        let both = ["ca", "cb"].map(|consumer| self.world.beside(consumer, "sh", &["-c", get]));
        for sum in both.map(|it| it.join().unwrap()) {
            assert_eq!(sum, whole);
        }
    }
}

fn row(world: &World, name: &str) -> Value {
    let rows = world.json("status")[0]["interfaces"].as_array().unwrap().clone();
    rows.into_iter().find(|row| row["interface"] == name).unwrap_or_else(|| panic!("no interface {name}"))
}

fn hook_of(world: &World, name: &str) -> String {
    let row = row(world, name);
    format!("{} {}", row["hook"].as_str().unwrap_or("-"), row["mode"].as_str().unwrap_or("-"))
}

const VLANS: [&str; 3] = ["trunk@120", "trunk@200.120", "trunk@300"];

#[test]
fn tenants_of_one_address_fetch_files_over_one_trunk_by_either_hook_and_targets_behind_tags_are_checked() {
    for (manage, hook) in [(false, "tcx -"), (true, "xdp native")] {
        let config = switched("", CHECKED);
        let config = if manage { config } else { config.replace("manage_peer_offloads = true", "") };
        let mut switched = Switched::bare(&config);
        let first = switched.world.serve("t1");
        switched.world.serve("t2");
        switched.world.start(&[]);
        let world = &switched.world;
        for vlan in VLANS.into_iter().chain(["trunk"]) {
            assert_eq!(hook_of(world, vlan), hook, "{}", world.said());
        }
        let states = |world: &World| -> Vec<String> {
            let targets = world.json("targets");
            targets.as_array().unwrap().iter().map(|it| it["state"].as_str().unwrap().to_owned()).collect()
        };
        eventually("both are healthy", || (states(world) == ["healthy", "healthy"]).then_some(()));
        assert_eq!(world.json("targets")[0]["interface"], "trunk@300");
        let seen: std::collections::BTreeSet<String> =
            (0..40).map(|number| world.fetch(["ca", "cb"][number % 2], "")).collect();
        assert_eq!(seen.into_iter().collect::<Vec<_>>(), ["t1", "t2"], "also the one behind a tag");
        switched.carry();
        let told = switched.world.privatelink(&[
            "explain",
            "--from",
            "shop",
            "tcp",
            "10.0.1.5:40001",
            "10.0.9.9:80",
        ]);
        let told = String::from_utf8_lossy(&told.stdout).into_owned();
        assert!(told.contains("by trunk@300") || told.contains("by t2"), "{told}");
        let up = switched.world.shell("dp", "ethtool -k uplink");
        assert_eq!(up.contains("tx-vlan-offload: off") && up.contains("tx-vlan-stag-hw-insert: off"), manage);
        switched.world.kill(first);
        eventually("one is not", || (states(&switched.world) == ["unhealthy", "healthy"]).then_some(()));
    }
}

#[test]
fn large_segments_with_tags_beside_them_are_counted_as_what_is_on_the_wire() {
    let one = switched("", UNCHECKED)
        .replace("manage_peer_offloads = true", "")
        .replace(r#", { address = "10.0.1.22", zone = "a" }"#, "")
        .replace("port = 53", "port = 80");
    let mut switched = Switched::new(&one);
    let world = &mut switched.world;
    world.spawn("t1", "iperf3", &["-s", "-p", "8080"]);
    eventually("iperf3 listens", || (!world.shell("t1", "ss -Hltn sport = :8080").is_empty()).then_some(()));
    for (consumer, name) in [("ca", "shop"), ("cb", "bank")] {
        for (way, count) in [("", "to_provider"), ("-R", "to_consumer")] {
            let of = |world: &World, what: &str| {
                let rows = world.json("endpoints");
                let row =
                    rows.as_array().unwrap().iter().find(|row| row["endpoint"] == name).unwrap().clone();
                row[format!("{count}_{what}")].as_u64().unwrap()
            };
            let before = ["packets", "bytes"].map(|what| of(world, what));
            let line = format!("iperf3 -J -c 10.0.9.9 -p 80 -n 256M -C reno {way}");
            let told: Value = serde_json::from_str(&world.shell(consumer, &line)).unwrap();
            let received = told["end"]["sum_received"]["bytes"].as_u64().unwrap();
            assert!(received > 250_000_000, "{told}");
            let [packets, bytes] = [0, 1].map(|it| of(world, ["packets", "bytes"][it]) - before[it]);
            assert!((received..received * 12 / 10).contains(&bytes), "{name} {way}: {bytes} for {received}");
            assert!((bytes / 1514..bytes / 1000).contains(&packets), "{name} {way}: {packets} for {bytes}");
        }
    }
    let features = world.shell("dp", "ethtool -k uplink");
    assert!(features.contains("tx-vlan-offload: on") && features.contains("tcp-segmentation-offload: on"));
}

#[test]
fn a_trunk_that_vanishes_and_returns_gets_the_flows_of_all_its_vlans_back_and_so_does_one_whose_agent_is_killed()
 {
    let mut switched = Switched::bare(&switched("", UNCHECKED));
    switched.world.serve("t1");
    switched.world.serve("t2");
    switched.world.start(&[]);
    let long = "curl -sSf --max-time 90 --limit-rate 2M http://10.0.9.9/large | cksum";
    let long = ["ca", "ca", "cb", "cb"].map(|consumer| switched.world.beside(consumer, "sh", &["-c", long]));
    eventually("the transfers run", || (switched.world.json("flows").as_array()?.len() >= 4).then_some(()));
    switched.world.shell("dp", "ip link del trunk");
    eventually("it is seen to be gone", || {
        (row(&switched.world, "trunk@120")["state"] == "waiting").then_some(())
    });
    switched.plug();
    eventually("it is back", || (row(&switched.world, "trunk@120")["state"] == "attached").then_some(()));
    switched.world.kill_agent();
    let fetched = switched.world.fetch("cb", "");
    assert!(["t1", "t2"].contains(&&*fetched), "while no agent runs: {fetched}");
    switched.world.start(&[]);
    let sums: Vec<String> = long.into_iter().map(|it| it.join().unwrap()).collect();
    let whole =
        switched.world.shell("t1", &format!("cksum < {}/t1/large", switched.world.dir.path().display()));
    assert!(sums.iter().all(|sum| *sum == whole), "{sums:?} of {whole}");
}

#[test]
fn vlans_come_go_and_change_hands_while_others_of_the_trunk_go_on() {
    let config = switched("", UNCHECKED);
    let mut switched = Switched::bare(&config);
    switched.world.serve("t1");
    switched.world.serve("t2");
    switched.world.start(&[]);
    let long = "curl -sSf --max-time 60 --limit-rate 2M http://10.0.9.9/large | cksum";
    let long = switched.world.beside("cb", "sh", &["-c", long]);
    eventually("the transfer runs", || (!switched.world.json("flows").as_array()?.is_empty()).then_some(()));
    assert!(!switched.world.fetch("ca", "").is_empty());
    let apply = |config: &str| {
        let (code, said) = switched.world.apply(config);
        assert_eq!(code, Some(0), "{said}");
        said
    };
    let cannot = || {
        let said = switched.world.shell("ca", "curl -sS --max-time 1 http://10.0.9.9/ 2>&1 || true");
        assert!(said.contains("(28)") || said.contains("(7)"), "{said}");
    };
    let said = apply(&config.replace(r#"[{ trunk = "trunk", vlan = 120 }]"#, "[]"));
    assert!(said.contains("trunk@120 in shop"), "{said}");
    cannot();
    apply(&config.replace(
        r#"vlan = 120 }]
[vpcs.bank]"#,
        r#"vlan = 121 }]
[vpcs.bank]"#,
    ));
    cannot();
    apply(&config);
    assert!(!switched.world.fetch("ca", "").is_empty());
    // The VLAN of a VPC that has no endpoint.
    let other = "[vpcs.other]\naccount = \"111122223333\"\ncidrs = [\"10.0.0.0/16\"]\ninterfaces = [{ trunk = \"trunk\", vlan = 120 }]\n[vpcs.shop]";
    let moved = config.replace(r#"[{ trunk = "trunk", vlan = 120 }]"#, "[]").replace("[vpcs.shop]", other);
    apply(&moved);
    cannot();
    assert_eq!(row(&switched.world, "trunk@120")["vpc"], "other");
    apply(&config);
    assert!(!switched.world.fetch("ca", "").is_empty());
    let whole =
        switched.world.shell("t1", &format!("cksum < {}/t1/large", switched.world.dir.path().display()));
    assert_eq!(long.join().unwrap(), whole, "the other VLAN's transfer");
}

#[test]
fn xdp_is_not_for_a_trunk_whose_tags_it_may_not_see_whatever_is_asked_for_and_follows_what_changes() {
    let config = switched("hook = \"xdp\"", UNCHECKED).replace("manage_peer_offloads = true", "");
    let mut switched = Switched::bare(&config);
    let mend = "ethtool -K uplink gro on tx off && ethtool -K t2 gro on";
    switched.world.shell("dp", mend);
    switched.world.shell("t2", "ethtool -K eth0 gro on tx off");
    switched.world.serve("t1");
    switched.world.serve("t2");
    switched.world.start(&[]);
    let veiled = "its other end may keep tags beside the frames, where XDP does not see them";
    let world = &switched.world;
    assert_eq!(
        (hook_of(world, "trunk@120"), row(world, "trunk@120")["why"].as_str()),
        ("tcx -".into(), Some(veiled))
    );
    assert!(
        world.said().contains(&format!("trunk is attached by TCX, though its hook is xdp: {veiled}")),
        "{}",
        world.said()
    );
    assert!(!world.fetch("ca", "").is_empty() && !world.fetch("cb", "").is_empty());
    world.shell("dp", "ethtool -K uplink tx-vlan-hw-insert off");
    world.shell("dp", "ethtool -K uplink tx-vlan-stag-hw-insert off");
    eventually("XDP sees all tags", || (hook_of(&switched.world, "trunk@120") == "xdp native").then_some(()));
    assert!(!world.fetch("ca", "").is_empty() && !world.fetch("cb", "").is_empty());
    world.shell("dp", "ethtool -K uplink tx-vlan-stag-hw-insert on");
    eventually("service tags are hidden", || {
        (hook_of(&switched.world, "trunk@120") == "tcx -").then_some(())
    });
    assert!(!world.fetch("ca", "").is_empty() && !world.fetch("cb", "").is_empty());
}

#[test]
fn a_device_of_its_own_is_an_interface_like_any_other_by_tcx_since_its_driver_cannot_run_xdp() {
    let usual = privatelink_tests::world::config("", UNCHECKED);
    let mut world = World::bare(&usual.replace(r#"["ca"]"#, r#"["ca.120"]"#));
    // Named as a VLAN device is, and like one without XDP of its own.
    let line =
        "ip link add link ca name ca.120 type macvlan mode passthru && ip link set ca.120 up promisc on";
    world.shell("dp", line);
    world.serve("t1");
    world.serve("t2");
    world.start(&[]);
    let row = row(&world, "ca.120");
    assert_eq!((row["hook"].as_str(), row["why"].as_str()), (Some("tcx"), Some("its driver cannot run XDP")));
    assert!(
        world.said().contains("ca.120 is attached by TCX: its driver cannot run XDP"),
        "{}",
        world.said()
    );
    for consumer in ["ca", "cb"] {
        assert!(!world.fetch(consumer, "").is_empty());
    }
}

#[test]
fn a_second_tag_takes_four_bytes_of_the_trunks_mtu() {
    let mut switched = Switched::new(&switched("", UNCHECKED).replace("manage_peer_offloads = true", ""));
    for (vlan, mtu) in [("trunk", 1500), ("trunk@120", 1500), ("trunk@200.120", 1496), ("trunk@300", 1500)] {
        eventually("the MTU is known", || (row(&switched.world, vlan)["mtu"] == mtu).then_some(()));
    }
    let mut seen = Vec::new();
    for (consumer, mss) in [("ca", 1460), ("cb", 1456)] {
        let capture = "timeout 30 tcpdump -nlc 1 -i eth0 'tcp[tcpflags] & (tcp-syn|tcp-ack) == (tcp-syn|tcp-ack)' 2>/dev/null";
        let heard = switched.world.beside(consumer, "sh", &["-c", capture]);
        seen.push((heard, consumer, mss));
    }
    switched.world.serve("t1");
    switched.world.serve("t2");
    for (heard, consumer, mss) in seen {
        eventually("a handshake is seen", || {
            switched.world.fetch(consumer, "");
            heard.is_finished().then_some(())
        });
        let told = heard.join().unwrap();
        assert!(told.contains(&format!("mss {mss}")), "{consumer}: {told}");
    }
}

#[test]
fn drops_are_named_by_the_vlan_that_they_came_by() {
    let mut switched = Switched::bare(&switched("", UNCHECKED));
    switched.world.start(&["--log-drops"]);
    switched.world.shell("cb", "curl -sS --max-time 1 http://10.0.9.9:7777/ 2>&1 || true");
    let said = "dropped no_listener: trunk@200.120 tcp 10.0.1.5:";
    eventually("the log names it", || switched.world.said().contains(said).then_some(()));
}

#[test]
fn transfers_over_a_trunk_go_on_while_a_capture_of_it_runs_dies_and_is_cleared_away() {
    for (manage, hook) in [(false, "tcx -"), (true, "xdp native")] {
        let config = switched("", UNCHECKED);
        let config = if manage { config } else { config.replace("manage_peer_offloads = true", "") };
        let mut switched = Switched::new(&config);
        switched.world.serve("t1");
        switched.world.serve("t2");
        assert_eq!(hook_of(&switched.world, "trunk"), hook);
        let world = &switched.world;
        let mut capture = Capture::start(world, &[]);
        assert!(is_captured(world, &["trunk"]));
        switched.carry();
        capture.child.kill().unwrap();
        eventually("the programs are back", || is_as_before(world, &["trunk"]).then_some(()));

        let capture = Capture::start(world, &[]);
        let guard = capture.guard().to_string();
        assert!(std::process::Command::new("kill").args(["-KILL", &guard]).status().unwrap().success());
        capture.signal("-KILL");
        assert!(!world.fetch("ca", "").is_empty(), "packets go on with the capture's programs");
        eventually("the agent puts the programs back", || is_as_before(world, &["trunk"]).then_some(()));
        assert!(world.said().contains("a capture has died on 3 interfaces"), "{}", world.said());
        switched.carry();
    }
}

#[test]
fn a_capture_has_a_trunk_that_comes_while_it_runs() {
    let config = switched("", UNCHECKED);
    let vlan = r#"[{ trunk = "trunk", vlan = 120 }]"#;
    let without = privatelink_tests::world::config("", UNCHECKED)
        .replace(r#"["ca"]"#, "[]")
        .replace(r#"["cb"]"#, "[]")
        .replace(r#"["t1", "t2"]"#, r#"["t2"]"#)
        .replace(r#"{ address = "10.0.1.21", zone = "a" }, "#, "");
    let with = without.replacen("interfaces = []", &format!("interfaces = {vlan}"), 1);
    assert!(config.contains(vlan) && with.contains(vlan));
    let mut switched = Switched::new(&without);
    switched.world.serve("t2");
    let world = &switched.world;
    let path = file(world).display().to_string();
    let mut capture = Capture::start(world, &["--write", &path, "--protocol", "tcp", "--duration", "60s"]);
    let (code, said) = world.apply(&with);
    assert_eq!(code, Some(0), "{said}");
    let mut line = String::new();
    capture.said.read_line(&mut line).unwrap();
    assert!(line.contains("an agent has put another program in place"), "{line}");
    assert!(is_captured(world, &["trunk"]));
    assert_eq!(world.fetch("ca", ""), "t2");
    capture.signal("-INT");
    assert!(capture.end().0.success());
    assert!(is_as_before(world, &["trunk"]));
    let came = written(world).into_iter().find(|it| it.interface == "trunk@120" && !it.outbound);
    assert_eq!(came.unwrap().bytes[12..18], [0x81, 0, 0, 120, 8, 0]);
}
