//! Packets through the programs that the kernel runs (BPF_PROG_TEST_RUN): verdict, every byte of the output, and every counter. XDP's
//! and TCX's do the same.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests: a panic with its place is what is wanted")]

use privatelink_tests::bench::{
    BALANCER, CLIENT, DROP, ENDPOINT, PASS, REDIRECT, Segments, as_slice, each, opened, reply, side, tcx,
    translated, xdp,
};
use privatelink_tests::packet::{ACK, FIN, Ip, Mac, PSH, Packet, RST, SYN, addresses, arp, ethernet};
use privatelink_tests::world::{changes, eventually};

#[test]
fn a_tcp_connection_is_translated_both_ways_and_two_tenants_with_one_five_tuple_are_kept_apart() {
    each("", |bench| {
        let mut seen = Vec::new();
        for (consumer, interface) in [("shop", "ca"), ("bank", "cb")] {
            let syn = Packet::tcp(SYN);
            let out = bench.expect("SYN", interface, &syn.build(), REDIRECT, &as_slice(&opened(consumer)));
            let (from, nat, target, port) = addresses(&out);
            assert!(from == BALANCER && port == 8080 && nat >= 10240 && (target[3] == 21 || target[3] == 22));
            assert_eq!(out, translated(&syn, nat, target, &out), "{consumer}: the SYN at the target");
            seen.push((target, nat));
            let (forth, back) =
                (format!("{consumer} to_provider_packets"), format!("{consumer} to_consumer_packets"));

            let answer = reply(&out, SYN | ACK, b"");
            let got = bench.expect("SYN-ACK", side(target), &answer.build(), REDIRECT, &[(&back, 1)]);
            let mut expected =
                Packet { from: ENDPOINT, from_port: 80, to: CLIENT, to_port: 40000, ttl: 63, ..answer };
            (expected.to_mac, expected.from_mac) = (syn.from_mac, got[6..12].try_into().unwrap());
            assert_eq!(got, expected.build(), "{consumer}: the SYN-ACK at the consumer");

            let again = bench.expect("SYN again", interface, &syn.build(), REDIRECT, &[(&forth, 1)]);
            assert_eq!(again, out, "a retransmission goes the same way");

            let established = [(&*forth, 1), ("map pending", -2), ("map established", 2)];
            bench.expect("ACK", interface, &Packet::tcp(ACK).build(), REDIRECT, &established);
            let data = Packet { payload: b"GET / HTTP/1.1\r\n".to_vec(), ..Packet::tcp(ACK | PSH) };
            let got = bench.expect("data", interface, &data.build(), REDIRECT, &[(&forth, 1)]);
            assert_eq!(got, translated(&data, nat, target, &got));
            let odd = reply(&out, ACK | PSH, b"odd");
            bench.expect("data back", side(target), &odd.build(), REDIRECT, &[(&back, 1)]);
            bench.expect("FIN", interface, &Packet::tcp(FIN | ACK).build(), REDIRECT, &[(&forth, 1)]);
            bench.expect("late data", side(target), &odd.build(), REDIRECT, &[(&back, 1)]);
            bench.expect(
                "FIN back",
                side(target),
                &reply(&out, FIN | ACK, b"").build(),
                REDIRECT,
                &[(&back, 1)],
            );
            bench.expect("last ACK", interface, &Packet::tcp(ACK).build(), REDIRECT, &[(&forth, 1)]);
            let states: Vec<_> =
                bench.world.json("flows").as_array().unwrap().iter().map(|it| it["state"].clone()).collect();
            assert!(states.iter().all(|state| state == "closed"), "{states:?}");
        }
        assert_ne!(seen[0], seen[1], "two tenants never share a NAT port towards one target");
        let reopened = bench.run("ca", &Packet { seq: 9000, ..Packet::tcp(SYN) }.build());
        assert_eq!(reopened.0, REDIRECT, "a SYN opens a closed flow anew");
    });
}

#[test]
fn a_syn_cookie_opens_a_flow_for_who_answers_it_in_its_own_vpc_and_the_numbers_are_shifted() {
    each("syn_cookies = \"always\"\n", |bench| {
        let number = |frame: &[u8], at: usize| u32::from_be_bytes(frame[at..at + 4].try_into().unwrap());
        let mss = |mss: u16| [&[2, 4][..], &mss.to_be_bytes()].concat();
        let syn = Packet { tcp_options: mss(1400), ..Packet::tcp(SYN) };
        let out = bench.expect("SYN", "ca", &syn.build(), REDIRECT, &[("shop syn_cookie", 1)]);
        let cookie = number(&out, 38);
        let answer = Packet {
            from: ENDPOINT,
            to: CLIENT,
            from_port: 80,
            to_port: 40000,
            from_mac: syn.to_mac,
            to_mac: syn.from_mac,
            id: 0,
            window: 0,
            seq: cookie,
            ack: 1001,
            tcp_options: mss(1460),
            ..Packet::tcp(SYN | ACK)
        };
        assert_eq!(out, answer.build());

        let ack = |ack| Packet { seq: 1001, ack, window: 500, ..Packet::tcp(ACK) };
        let reset = |vpc: &str| format!("{vpc} reset_no_flow");
        for (name, interface, vpc, wrong) in [
            ("no cookie", "ca", "shop", ack(cookie)),
            ("of another port", "ca", "shop", Packet { from_port: 40001, ..ack(cookie.wrapping_add(1)) }),
            ("of the same five-tuple in another VPC", "cb", "bank", ack(cookie.wrapping_add(1))),
        ] {
            bench.expect(name, interface, &wrong.build(), REDIRECT, &[(&reset(vpc), 1)]);
        }
        let right = ack(cookie.wrapping_add(1));
        let mut moved = opened("shop");
        moved.push(("map streams".into(), 1));
        let out = bench.expect("ACK", "ca", &right.build(), REDIRECT, &as_slice(&moved));
        let (_, nat, target, _) = addresses(&out);
        // The largest of the sizes that a cookie tells apart which the consumer can take.
        let asked =
            Packet { seq: 1000, ack: 0, id: 0, ttl: 65, flags: SYN, tcp_options: mss(1380), ..right.clone() };
        assert_eq!(out, translated(&asked, nat, target, &out), "the SYN at the target");

        let to_consumer = [("shop to_consumer_packets", 1)];
        let greeting = Packet { seq: 5_000_000, ack: 1001, window: 900, ..reply(&out, SYN | ACK, b"") };
        let told = bench.expect("SYN-ACK", side(target), &greeting.build(), REDIRECT, &to_consumer);
        let consumers = |packet: Packet, frame: &[u8]| Packet {
            from: ENDPOINT,
            from_port: 80,
            to: CLIENT,
            to_port: 40000,
            to_mac: syn.from_mac,
            from_mac: frame[6..12].try_into().unwrap(),
            ..packet
        };
        let byte = Packet { seq: cookie, flags: ACK, id: 0, payload: vec![0], ..greeting.clone() };
        assert_eq!(told, consumers(byte, &told).build(), "the window, and a byte that is answered at once");

        let established = [("shop to_provider_packets", 1), ("map pending", -2), ("map established", 2)];
        let data = Packet { payload: b"hello".to_vec(), ..right };
        let out = bench.expect("data", "ca", &data.build(), REDIRECT, &established);
        let shifted = Packet { ack: 5_000_001, ..data };
        assert_eq!(out, translated(&shifted, nat, target, &out));
        let back = Packet { seq: 5_000_001, ack: 1006, ..reply(&out, ACK | PSH, b"odd") };
        let got = bench.expect("data back", side(target), &back.build(), REDIRECT, &to_consumer);
        let shifted = Packet { seq: cookie.wrapping_add(1), ttl: 63, ..back };
        assert_eq!(got, consumers(shifted, &got).build());
    });
}

#[test]
fn a_reset_ends_a_flow_in_either_table() {
    each("", |bench| {
        let out = bench.run("ca", &Packet::tcp(SYN).build()).1;
        let (.., target, _) = addresses(&out);
        let refused = reply(&out, RST | ACK, b"").build();
        let moved = [("shop to_consumer_packets", 1), ("shop resets", 1), ("map pending", -2)];
        bench.expect("connection refused", side(target), &refused, REDIRECT, &moved);
        bench.refused("once only", side(target), &refused, "payments no_flow");
    });
}

#[test]
fn udp_is_translated_and_a_missing_checksum_stays_missing() {
    each("", |bench| {
        for no_checksum in [false, true] {
            let query = Packet { no_checksum, from_port: 5000 + u16::from(no_checksum), ..Packet::udp() };
            let out = bench.expect("query", "cb", &query.build(), REDIRECT, &as_slice(&opened("bank")));
            let (_, nat, target, _) = addresses(&out);
            assert_eq!(out, translated(&query, nat, target, &out));
            let answer = Packet { no_checksum, ..reply(&out, 0, b"answer") };
            let moved = [("bank to_consumer_packets", 1), ("map pending", -2), ("map established", 2)];
            let got = bench.expect("answer", side(target), &answer.build(), REDIRECT, &moved);
            let mut expected = Packet {
                from: ENDPOINT,
                from_port: 53,
                to: CLIENT,
                to_port: query.from_port,
                ttl: 63,
                ..answer
            };
            (expected.to_mac, expected.from_mac) = (query.from_mac, got[6..12].try_into().unwrap());
            assert_eq!(got, expected.build());
        }
    });
}

#[test]
fn a_segment_of_no_flow_is_answered_with_the_reset_that_the_rfc_asks_for() {
    each("", |bench| {
        let stray =
            |flags, payload: &[u8]| Packet { payload: payload.to_vec(), ack: 77, ..Packet::tcp(flags) };
        for (name, sent, seq, ack, flags) in [
            ("an ACK", stray(ACK, b""), 77, 0, RST),
            ("data with ACK", stray(ACK | PSH, b"late"), 77, 0, RST),
            ("SYN-ACK", stray(SYN | ACK, b""), 77, 0, RST),
            ("data without ACK", stray(PSH, b"late"), 0, 1004, RST | ACK),
            ("FIN with data", stray(FIN, b"odd"), 0, 1004, RST | ACK),
            ("nothing at all", stray(0, b""), 0, 1000, RST | ACK),
        ] {
            let out = bench.expect(name, "ca", &sent.build(), REDIRECT, &[("shop reset_no_flow", 1)]);
            let reset = Packet {
                from: sent.to,
                to: sent.from,
                from_port: sent.to_port,
                to_port: sent.from_port,
                from_mac: sent.to_mac,
                to_mac: sent.from_mac,
                id: 0,
                window: 0,
                seq,
                ack,
                ..Packet::tcp(flags)
            };
            assert_eq!(out, reset.build(), "{name}");
        }
        bench.refused("a RST", "ca", &stray(RST, b"").build(), "shop no_flow");
        bench.refused("a RST-ACK", "ca", &stray(RST | ACK, b"").build(), "shop no_flow");
    });
}

#[test]
fn what_does_not_belong_is_dropped_by_name_or_passed_untouched() {
    each("", |bench| {
        let tcp = Packet::tcp(SYN);
        let with = |change: fn(&mut Packet)| {
            let mut packet = tcp.clone();
            change(&mut packet);
            packet.build()
        };
        bench.refused("unlisted port", "ca", &with(|it| it.to_port = 81), "shop no_listener");
        bench.refused(
            "listener of the other protocol",
            "ca",
            &with(|it| it.to_port = 53),
            "shop no_listener",
        );
        bench.refused(
            "outside the VPC",
            "ca",
            &with(|it| it.from = [10, 1, 0, 1]),
            "shop source_outside_vpc",
        );
        bench.refused(
            "from the endpoint's own address",
            "ca",
            &with(|it| it.from = ENDPOINT),
            "shop spoofed_source",
        );
        bench.refused(
            "a load balancer's address in another VPC",
            "ca",
            &with(|it| it.to = BALANCER),
            "shop passed",
        );
        bench.refused("another address", "ca", &with(|it| it.to = [10, 0, 9, 8]), "shop passed");
        bench.refused("a first fragment", "ca", &with(|it| it.fragment = 0x2000), "shop fragment");
        bench.refused("a later fragment", "ca", &with(|it| it.fragment = 5), "shop fragment");
        bench.refused("options", "ca", &with(|it| it.options = vec![1, 1, 1, 0]), "shop ip_options");
        bench.refused("GRE", "ca", &with(|it| it.protocol = 47), "shop protocol_unsupported");
        let provider = |from: Ip, to: Ip, to_port| Packet { from, to, to_port, ..Packet::tcp(SYN) }.build();
        let target = [10, 0, 1, 21];
        bench.refused(
            "the provider opens",
            "t1",
            &provider(target, BALANCER, 80),
            "payments provider_initiated",
        );
        bench.refused(
            "the load balancer's address, forged",
            "t1",
            &provider(BALANCER, BALANCER, 80),
            "payments spoofed_source",
        );
        let before = bench.world.state();
        let (verdict, _) = bench.run("t1", &provider(target, ENDPOINT, 80));
        assert_eq!(
            (verdict, changes(&before, &bench.world.state())),
            (PASS, vec![]),
            "a consumer's endpoint is nothing here"
        );
        let datagram = Packet { from: target, to: BALANCER, to_port: 20000, ..Packet::udp() }.build();
        bench.refused("a datagram of no flow", "t1", &datagram, "payments no_flow");

        let vlan =
            ethernet(tcp.to_mac, tcp.from_mac, 0x8100, &[&[0, 5, 8, 0][..], &tcp.build()[14..]].concat());
        bench.refused("a VLAN tag", "ca", &vlan, "shop passed");
        bench.refused("IPv6", "ca", &ethernet(tcp.to_mac, tcp.from_mac, 0x86dd, &[0x60; 60]), "shop passed");
        bench.refused("an ICMP error about nothing", "ca", &tcp.icmp(3, &[0; 32]), "shop icmp_malformed");
    });
}

#[test]
fn arp_and_echo_are_answered_in_the_path() {
    each("", |bench| {
        let (me, all, nobody): (Mac, Mac, Mac) = ([2, 1, 1, 1, 1, 1], [255; 6], [0; 6]);
        for (interface, vpc, from, to) in
            [("ca", "shop", CLIENT, ENDPOINT), ("t1", "payments", [10, 0, 1, 21], BALANCER)]
        {
            let request = arp(1, me, from, nobody, to, all);
            let out =
                bench.expect("a request", interface, &request, REDIRECT, &[(&format!("{vpc} arp_reply"), 1)]);
            let mac: Mac = out[6..12].try_into().unwrap();
            assert_eq!(mac[0] & 3, 2, "locally administered, unicast");
            assert_eq!(out, arp(2, mac, to, me, from, me));
            bench.refused(
                "claiming it",
                interface,
                &arp(1, me, to, nobody, to, all),
                &format!("{vpc} spoofed_source"),
            );
            bench.refused(
                "claiming it by reply",
                interface,
                &arp(2, me, to, me, from, all),
                &format!("{vpc} spoofed_source"),
            );
        }
        bench.refused("for another", "ca", &arp(1, me, CLIENT, nobody, [10, 0, 1, 6], all), "shop passed");
        let ping = Packet::tcp(0);
        let body = [0x12, 0x34, 0, 1, b'h', b'i', b'!'];
        let out = bench.expect("echo", "ca", &ping.icmp(8, &body), REDIRECT, &[("shop echo_reply", 1)]);
        let mut pong = Packet { from: ENDPOINT, to: CLIENT, to_mac: ping.from_mac, ..ping };
        pong.from_mac = out[6..12].try_into().unwrap();
        assert_eq!(out, pong.icmp(0, &body));
        for ttl in [1, 2, 255] {
            let ping = Packet { ttl, ..Packet::tcp(0) };
            assert_eq!(bench.run("ca", &ping.icmp(8, &body)).1, out, "the reply has hops of its own");
        }
    });
}

#[test]
fn a_packet_cut_off_anywhere_or_lying_about_any_length_is_never_forwarded_and_always_accounted_once() {
    each("", |bench| {
        let whole = Packet { payload: b"0123456789".to_vec(), ..Packet::tcp(SYN) }.build();
        let once = |name: &str, frame: &[u8]| {
            let before = bench.world.state();
            let (verdict, _) = bench.run("ca", frame);
            let moved = changes(&before, &bench.world.state());
            assert!(matches!(&moved[..], [(_, 1)]), "{name}: {moved:?}");
            assert!(verdict == DROP || verdict == PASS, "{name}: verdict {verdict}");
        };
        // A test run refuses to make socket buffers of frames that are too short for the IP header that they promise.
        let shortest = if bench.is_xdp() { 14 } else { 34 };
        for length in shortest..whole.len() {
            once(&format!("cut to {length}"), &whole[..length]);
        }
        let lies: [(&str, usize, Vec<u8>); 4] = [
            ("header length", 14, (0x40..=0x4f).filter(|it| *it != 0x45).collect()),
            ("total length", 17, (0..40).chain(51..=255).collect()),
            ("data offset", 46, (0..5).chain(8..16).map(|it| it << 4).collect()),
            ("version", 14, vec![0x05, 0x15, 0x65, 0xf5]),
        ];
        for (name, at, values) in lies {
            for value in values {
                let mut frame = whole.clone();
                frame[at] = value;
                once(&format!("{name} {value:#x}"), &frame);
            }
        }
        let datagram = Packet::udp().build();
        for length in (0..8).chain(14..=255) {
            let mut frame = datagram.clone();
            frame[39] = length;
            once(&format!("UDP length {length}"), &frame);
        }
        let mut padded = Packet::tcp(SYN).build();
        padded.resize(60, 0xee);
        assert_eq!(bench.run("ca", &padded).0, REDIRECT, "Ethernet's padding is nobody's business");
    });
}

#[test]
fn a_full_table_refuses_the_new_flow_and_keeps_the_old() {
    each("[limits]\nflows = 4\n", |bench| {
        let connect = |port: u16| {
            let at = |flags| Packet { from_port: port, ..Packet::tcp(flags) };
            let out = bench.run("ca", &at(SYN).build()).1;
            let (.., target, _) = addresses(&out);
            assert_eq!(bench.run(side(target), &reply(&out, SYN | ACK, b"").build()).0, REDIRECT);
            (at(ACK), out, side(target))
        };
        let mut old = Vec::new();
        for port in [1001, 1002] {
            let (ack, out, side) = connect(port);
            assert_eq!(bench.run("ca", &ack.build()).0, REDIRECT);
            old.push((ack, out, side));
        }
        let (ack, ..) = connect(1003);
        let before = bench.world.state();
        let (verdict, reset) = bench.run("ca", &ack.build());
        let moved = changes(&before, &bench.world.state());
        assert_eq!(moved, vec![("map pending".into(), -2), ("shop reset_table_full".into(), 1)]);
        assert_eq!((verdict, reset.len(), reset[47]), (REDIRECT, 54, RST), "the consumer is told");
        for (ack, out, side) in old {
            assert_eq!(bench.run("ca", &ack.build()).0, REDIRECT, "the established live on");
            assert_eq!(bench.run(side, &reply(&out, ACK, b"data").build()).0, REDIRECT);
        }
    });
}

#[test]
fn a_flood_of_half_open_flows_evicts_only_half_open_flows() {
    each("syn_cookies = \"off\"\n[limits]\npending_flows = 64\n", |bench| {
        let at = |port: u16, flags| Packet { from_port: port, ..Packet::tcp(flags) };
        let out = bench.run("ca", &at(1000, SYN).build()).1;
        let (.., target, _) = addresses(&out);
        let side_of_old = side(target);
        assert_eq!(bench.run(side_of_old, &reply(&out, SYN | ACK, b"").build()).0, REDIRECT);
        assert_eq!(bench.run("ca", &at(1000, ACK).build()).0, REDIRECT);
        let half_open = bench.run("cb", &at(1001, SYN).build()).1;
        let before = bench.world.state();
        for port in 2000..2300 {
            assert_eq!(bench.run("ca", &at(port, SYN).build()).0, REDIRECT, "the flood itself goes through");
        }
        let moved = changes(&before, &bench.world.state());
        let moved_by = |name: &str| moved.iter().find(|(key, _)| key == name).map_or(0, |(_, by)| *by);
        assert_eq!((moved_by("shop new_flows"), moved_by("map established")), (300, 0), "{moved:?}");
        assert!(bench.world.state()["map pending"] <= 64, "{moved:?}");
        assert_eq!(
            bench.run("ca", &at(1000, ACK).build()).0,
            REDIRECT,
            "the established flow lives on, this way"
        );
        assert_eq!(bench.run(side_of_old, &reply(&out, ACK, b"data").build()).0, REDIRECT, "and that way");
        // Which half-open flows the kernel chooses is its own affair: the answer either still finds its flow, whole, or is refused.
        let (.., target, _) = addresses(&half_open);
        let before = bench.world.state();
        assert_eq!(bench.run(side(target), &reply(&half_open, SYN | ACK, b"").build()).0, REDIRECT);
        let moved = changes(&before, &bench.world.state());
        let allowed = ["bank to_consumer_packets", "payments reset_no_flow"];
        let legal = |key: &str| allowed.contains(&key) || key == "map pending";
        assert!(moved.iter().all(|(key, _)| legal(key)) && moved.iter().any(|(_, by)| *by == 1), "{moved:?}");
        assert_eq!(
            bench.run("cb", &at(1001, SYN).build()).0,
            REDIRECT,
            "the client's retransmission opens another"
        );
    });
}

#[test]
fn a_frame_that_is_yet_to_be_cut_into_segments_counts_as_what_it_will_be_on_the_wire() {
    tcx("", |bench| {
        let counted = |what: &str| {
            let rows = bench.world.json("endpoints");
            let row = rows.as_array().unwrap().iter().find(|row| row["endpoint"] == "shop").unwrap();
            row[what].as_u64().unwrap()
        };
        let out = bench.run("ca", &Packet::tcp(SYN).build()).1;
        let (.., target, _) = addresses(&out);
        bench.run(side(target), &reply(&out, SYN | ACK, b"").build());
        bench.run("ca", &Packet::tcp(ACK).build());
        let (packets, bytes) = (counted("to_provider_packets"), counted("to_provider_bytes"));
        // 14 + 20 + 20 bytes of headers, and segments of 1000, 1000 and 500.
        let data = Packet { payload: vec![7; 2500], ..Packet::tcp(ACK | PSH) }.build();
        for (round, segments) in [(1, Segments(3, 1000)), (2, Segments(0, 1000))] {
            assert_eq!(bench.run_segments("ca", &data, segments).0, REDIRECT);
            assert_eq!(counted("to_provider_packets") - packets, 3 * round);
            assert_eq!(counted("to_provider_bytes") - bytes, (3 * 54 + 2500) * round);
        }
        let mut big = data.clone();
        big[16..18].fill(0);
        assert_eq!(bench.run("ca", &big).0, DROP, "no length");
        assert_eq!(bench.run_segments("ca", &big, Segments(3, 1000)).0, REDIRECT, "one beyond 65535 bytes");
        assert_eq!(counted("to_provider_bytes") - bytes, (3 * 54 + 2500) * 3);
        let bytes = counted("to_provider_bytes");
        let datagrams = Packet { payload: vec![7; 2500], ..Packet::udp() }.build();
        assert_eq!(bench.run_segments("ca", &datagrams, Segments(3, 1000)).0, REDIRECT);
        assert_eq!(counted("to_provider_packets") - packets, 12);
        assert_eq!(counted("to_provider_bytes") - bytes, 3 * 42 + 2500);
        let unlisted = Packet { payload: vec![7; 2500], to_port: 81, ..Packet::udp() }.build();
        let before = bench.world.state();
        assert_eq!(bench.run_segments("ca", &unlisted, Segments(3, 1000)).0, DROP);
        assert_eq!(changes(&before, &bench.world.state()), [("shop no_listener".to_owned(), 3)]);
        let stray = Packet { payload: vec![7; 2500], from_port: 999, ..Packet::tcp(ACK) }.build();
        let before = bench.world.state();
        let (verdict, reset) = bench.run_segments("ca", &stray, Segments(3, 1000));
        assert_eq!((verdict, reset.len()), (REDIRECT, 54));
        assert_eq!(changes(&before, &bench.world.state()), [("shop reset_no_flow".to_owned(), 1)]);
    });
}

#[test]
fn a_jumbo_frame_in_several_buffers_is_translated_and_answered_like_any_other() {
    xdp("", |bench| {
        let jumbo = std::fs::read_to_string(bench.world.config())
            .unwrap()
            .replace("addresses = { a = \"10.0.9.9\" }", "addresses = { a = \"10.0.9.9\" }\nmtu = 9000");
        let (code, said) = bench.world.apply(&jumbo);
        assert_eq!(code, Some(0), "{said}");
        for end in ["ca", "cb", "t1", "t2"] {
            bench.world.shell(end, "ip link set eth0 mtu 9000");
            bench.world.shell("dp", &format!("ip link set {end} mtu 9000"));
        }
        eventually("the path knows that they carry more", || {
            let status = bench.world.json("status");
            let rows = status[0]["interfaces"].as_array()?;
            let ours = rows.iter().filter(|row| !row["interface"].as_str().unwrap().starts_with("pls"));
            ours.map(|row| row["mtu"].as_u64()).all(|mtu| mtu == Some(9000)).then_some(())
        });
        let out = bench.run("ca", &Packet::tcp(SYN).build()).1;
        let (_, nat, target, _) = addresses(&out);
        bench.run(side(target), &reply(&out, SYN | ACK, b"").build());
        bench.run("ca", &Packet::tcp(ACK).build());
        let payload: Vec<u8> = (0..=250).cycle().take(8960).collect();
        let jumbo = Packet { payload: payload.clone(), ..Packet::tcp(ACK | PSH) };
        let moved = [("shop to_provider_packets", 1)];
        let got = bench.expect("a jumbo frame", "ca", &jumbo.build(), REDIRECT, &moved);
        assert_eq!(got, translated(&jumbo, nat, target, &got));
        let back = reply(&out, ACK | PSH, &payload);
        bench.expect("one back", side(target), &back.build(), REDIRECT, &[("shop to_consumer_packets", 1)]);
        let stray = Packet { payload, from_port: 999, ..Packet::tcp(ACK) };
        let out = bench.expect("a stray one", "ca", &stray.build(), REDIRECT, &[("shop reset_no_flow", 1)]);
        let reset = Packet {
            from: stray.to,
            to: stray.from,
            from_port: stray.to_port,
            to_port: stray.from_port,
            from_mac: stray.to_mac,
            to_mac: stray.from_mac,
            id: 0,
            window: 0,
            seq: 77,
            ack: 0,
            payload: Vec::new(),
            ..Packet::tcp(RST)
        };
        assert_eq!(out, reset.build(), "nothing of the other buffers is left");
        let mut cut = jumbo.build();
        cut.truncate(9000);
        bench.refused("a jumbo frame cut off", "ca", &cut, "shop malformed");
    });
}
