//! Every input that ever broke a target, and the packets of real captures, in every test run; and by name what was found so.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests: a panic with its place is what is wanted")]

use privatelink_common::verdict::{Action, Answer};
use privatelink_fuzz::packet::{ACK, Packet, SYN};
use privatelink_fuzz::targets::build;
use privatelink_fuzz::view::{View, check_answer, check_forwarded};
use privatelink_fuzz::world::{ADDRESSES, BALANCERS, CLIENTS, DATAGRAMS, PORT, PROXIED, World};
use privatelink_fuzz::{TARGETS, seeds, target};
use std::fs;
use std::path::Path;

#[test]
fn no_input_that_ever_broke_a_target_breaks_it_again() {
    let crashes = Path::new(env!("CARGO_MANIFEST_DIR")).join("crashes");
    for dir in fs::read_dir(crashes).unwrap().map(|it| it.unwrap().path()).filter(|it| it.is_dir()) {
        let name = dir.file_name().unwrap().to_str().unwrap().to_owned();
        let run = target(&name).unwrap_or_else(|| panic!("crashes/{name} is no target's"));
        for file in fs::read_dir(&dir).unwrap() {
            let path = file.unwrap().path();
            eprintln!("{}", path.display());
            run(&fs::read(path).unwrap());
        }
    }
}

#[test]
fn every_target_holds_for_packets_that_were_captured_and_for_the_shortest_inputs() {
    assert!(seeds("parse").len() > 20 && seeds("path").len() > 1, "there are captures");
    for (name, run) in TARGETS {
        for seed in seeds(name) {
            run(&seed);
        }
        for byte in 0..=255 {
            run(&[byte; 64]);
        }
        run(&[]);
    }
}

/// What the path makes of a packet that it sends on.
fn forwarded(world: &World, slot: u16, frame: &[u8]) -> (u16, Vec<u8>) {
    let (verdict, after) = world.send(slot, frame, 1000);
    match verdict.map(|it| it.action()) {
        Ok(Action::Forward { interface, .. }) => (interface, after),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_icmp_error_over_ipv6_is_an_ipv6_frame_to_the_link_layer_address_that_the_packet_came_from() {
    for packet in [Packet::tcp(SYN), Packet { to_port: PORT + DATAGRAMS, ..Packet::udp() }] {
        let frame = build(CLIENTS[2], ADDRESSES[1], &Packet { ttl: 1, ..packet });
        let (verdict, after) = World::default().send(1, &frame, 1000);
        assert_eq!(verdict.unwrap().action(), Action::Answer(Answer::TimeExceeded.code()));
        assert_eq!((&after[..6], &after[6..14]), (&frame[6..12], &[&frame[..6], &[0x86, 0xdd]].concat()[..]));
        check_answer(Answer::TimeExceeded.code(), &frame, &after);
    }
}

#[test]
fn a_consumer_whose_address_is_the_load_balancers_own_elsewhere_has_no_say_in_its_nat_port() {
    // Ports from 1024 to 2047 are those that the provider's health checks come from.
    for (balancer, from_port) in [(0, 1024), (0, 1500), (1, 2047), (1, 0)] {
        for last in 0..50 {
            let packet = Packet { from_port, id: last, seq: last.into(), ..Packet::tcp(SYN) };
            let (_, after) =
                forwarded(&World::default(), 1, &build(BALANCERS[balancer], ADDRESSES[0], &packet));
            assert!(View::of(&after).unwrap().ports().0 >= 2048, "{after:02x?}");
        }
    }
}

#[test]
fn options_that_come_twice_leave_what_a_segment_carries_alone() {
    let world = World::default();
    let consumer = Packet { to_port: PROXIED, ..Packet::tcp(SYN) };
    let (target, syn) = forwarded(&world, 1, &build(CLIENTS[0], ADDRESSES[0], &consumer));
    let syn = View::of(&syn).unwrap();
    let sack = |number: u8| [&[5, 10][..], &[number; 8]].concat();
    // Where both places overlap there is a number that would be a length.
    let tcp_options = [&[1, 1][..], &sack(7), &sack(40), &[1, 1]].concat();
    let (from_port, to_port) = (syn.ports().1, syn.ports().0);
    let answer = Packet { from_port, to_port, seq: 5000, ack: 1001, ..Packet::tcp(SYN | ACK) };
    forwarded(&world, target, &build(syn.to, syn.from, &answer));
    let heard = Packet { ack: 5001, seq: 1001, flags: ACK, ..consumer };
    forwarded(&world, 1, &build(CLIENTS[0], ADDRESSES[0], &heard));
    let data = Packet { flags: ACK, seq: 5001, ack: 1101, tcp_options, payload: vec![0x55; 200], ..answer };
    let frame = build(syn.to, syn.from, &data);
    let (_, after) = forwarded(&world, target, &frame);
    check_forwarded(&frame, &after, true);
    let (header, payload) = View::of(&after).unwrap().parts().unwrap();
    assert_eq!((payload, &header[24..32]), (&[0x55; 200][..], &[7; 8][..]));
    let block = 0x2828_2828_u32 - 100;
    assert_eq!(header[34..42], [block.to_be_bytes(), block.to_be_bytes()].concat(), "the last is shifted");
}

#[test]
fn the_reply_to_an_echo_request_of_zeros_has_the_zero_that_is_right_there() {
    let packet = Packet { from: CLIENTS[0].ipv4(), to: ADDRESSES[0].ipv4(), ..Packet::tcp(0) };
    for body in [&[0; 4][..], &[0; 60], &[0, 1, 0, 2]] {
        let frame = packet.icmp(8, body);
        let (verdict, after) = World::default().send(1, &frame, 1000);
        assert_eq!(verdict.unwrap().action(), Action::Answer(Answer::EchoReply.code()));
        assert_eq!(View::of(&after).unwrap().is_sound(), Some(true), "{after:02x?}");
    }
}
