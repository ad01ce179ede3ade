//! Packets that are not what a workload usually sends, through the program that the kernel runs: every byte of what comes of them.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests: a panic with its place is what is wanted")]

use privatelink_tests::bench::{BALANCER, Bench, CLIENT, ENDPOINT, REDIRECT, reply, side};
use privatelink_tests::packet::{ACK, Packet, SYN, addresses};
use privatelink_tests::world::eventually;

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
    let bench = Bench::new("");
    let mut port = 41000;
    for (mtu, mss, expected) in
        [(1500, 1460, 1460), (1500, 65495, 1460), (1300, 1460, 1260), (1300, 536, 536)]
    {
        bench.world.shell("dp", &format!("ip link set ca mtu {mtu}"));
        // What only the other end takes less of counts as well.
        bench.world.shell("ca", &format!("ip link set eth0 mtu {mtu}"));
        eventually("the agent has followed the MTU", || {
            let status = bench.world.json("status");
            let rows = status[0]["interfaces"].as_array()?.clone();
            rows.iter().any(|row| row["interface"] == "ca" && row["mtu"] == mtu).then_some(())
        });
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
                ..syn.clone()
            };
            assert_eq!((verdict, out.clone()), (REDIRECT, at_target.build()), "SYN, {mss} {name} at {mtu}");

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
                ..answer
            };
            assert_eq!((verdict, out), (REDIRECT, at_client.build()), "SYN-ACK, {mss} {name} at {mtu}");
        }
    }
}

#[test]
fn a_syn_without_an_mss_gets_none_and_one_whose_options_lie_is_left_as_it_is() {
    let bench = Bench::new("");
    let lies: [&[u8]; 6] =
        [&[], &[3, 0, 2, 4], &[3, 1, 2, 4], &[8, 255, 2, 4], &[2, 4, 0, 0], &[1, 1, 1, 1, 1, 1, 2, 4]];
    for (number, options) in lies.iter().enumerate() {
        let from_port = 42000 + u16::try_from(number).unwrap();
        let syn = Packet { tcp_options: options.to_vec(), from_port, ..Packet::tcp(SYN) };
        let (verdict, out) = bench.run("ca", &syn.build());
        assert_eq!((verdict, &out[54..]), (REDIRECT, *options), "{options:?}");
    }
}

#[test]
fn an_endpoints_own_mtu_lowers_the_mss_too() {
    let bench = Bench::new("");
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
}
