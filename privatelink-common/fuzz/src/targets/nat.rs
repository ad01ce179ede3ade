//! What a target gets is what the consumer sent with other addresses, and what comes back is the answer with the first ones.

use crate::input::Input;
use crate::packet::{ACK, Packet, SYN, addresses};
use crate::world::{ADDRESS, BALANCERS, BANK, SHOP, TARGET_PORT, TARGETS, World};
use privatelink_common::verdict::{Action, Direction, FlowEvent};

pub fn run(input: &[u8]) {
    let mut input = Input(input);
    let world = World::default();
    let (slot, vpc) = input.of(&[(1, SHOP), (2, BANK)]);
    let is_tcp = input.byte() & 1 == 0;
    let mut sent = if is_tcp { Packet::tcp(SYN) } else { Packet { to_port: 53, ..Packet::udp() } };
    // Any address of the VPC that is nobody's.
    sent.from = [10, 0, input.byte() & 7, input.byte()];
    sent.to = ADDRESS;
    sent.from_port = input.word();
    sent.seq = input.long();
    sent.window = input.word();
    sent.id = input.word();
    sent.no_checksum = !is_tcp && input.byte() & 1 == 1;
    let length = input.below(100);
    sent.payload = input.bytes(length).to_vec();
    let before = sent.build();
    let (verdict, after) = world.send(slot, &before, 1000);
    let Ok(Action::Forward { interface, endpoint, direction, event }) = verdict.map(|it| it.action()) else {
        // The target without a link-layer address.
        assert_eq!(verdict.unwrap_err().name(), "no_next_hop");
        return;
    };
    assert_eq!((endpoint, direction, event), (vpc.into(), Direction::ToProvider, FlowEvent::Opened));
    let (from, nat, to, port) = addresses(&after);
    assert!(BALANCERS.contains(&from) && nat >= 2048 && TARGETS.contains(&to) && port == TARGET_PORT);
    assert_eq!(interface, if to == TARGETS[0] { 3 } else { 4 });
    let macs = |frame: &[u8]| (frame[..6].try_into().unwrap(), frame[6..12].try_into().unwrap());
    let (to_mac, from_mac) = macs(&after);
    let ttl = after[22];
    let expected = Packet { from, from_port: nat, to, to_port: port, to_mac, from_mac, ttl, ..sent.clone() };
    assert_same(&after, &expected.build());

    let answer = Packet {
        from: to,
        from_port: port,
        to: from,
        to_port: nat,
        from_mac: to_mac,
        to_mac: from_mac,
        flags: SYN | ACK,
        seq: input.long(),
        payload: input.bytes(20).to_vec(),
        ..sent.clone()
    };
    let (verdict, back) = world.send(interface, &answer.build(), 1000);
    let Ok(Action::Forward { interface, endpoint, direction, .. }) = verdict.map(|it| it.action()) else {
        panic!("the answer: {verdict:?}");
    };
    assert_eq!((interface, endpoint, direction), (slot, vpc.into(), Direction::ToConsumer));
    let (to_mac, from_mac) = macs(&back);
    assert_eq!(to_mac, sent.from_mac, "it goes to where the consumer is");
    let expected = Packet {
        from: sent.to,
        from_port: sent.to_port,
        to: sent.from,
        to_port: sent.from_port,
        to_mac,
        from_mac,
        ttl: back[22],
        ..answer
    };
    assert_same(&back, &expected.build());
}

/// Equal but for which of the two zeros of one's complement a TCP or IPv4 checksum is.
fn assert_same(frame: &[u8], expected: &[u8]) {
    let mut frame = frame.to_vec();
    for at in [24, if expected[23] == 6 { 50 } else { 40 }] {
        if frame[at..at + 2] == [0xff, 0xff] && expected[at..at + 2] == [0, 0] {
            frame[at..at + 2].copy_from_slice(&[0, 0]);
        }
    }
    assert_eq!(frame, expected);
}
