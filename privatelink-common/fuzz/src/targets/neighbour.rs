//! Neighbour discovery and ARP of any content: only right questions for our addresses are answered, only with the address's own
//! link-layer address, and nobody else may claim one.

use crate::input::Input;
use crate::packet::{Packet, Packet6, arp};
use crate::view::{View, check_answer};
use crate::world::{ADDRESSES, BALANCERS, CLIENTS, PAYMENTS, SLOTS, STACK, World, vpc_of};
use privatelink_common::verdict::Action;
use privatelink_common::wire::Ip;

fn is_ours(vpc: u16, address: Ip) -> bool {
    if vpc == PAYMENTS { BALANCERS.contains(&address) } else { ADDRESSES.contains(&address) }
}

pub fn run(input: &[u8]) {
    let mut input = Input(input);
    let world = World::default();
    let slot = input.of(&SLOTS).0;
    let vpc = vpc_of(slot).unwrap();
    let target = input.of(&[ADDRESSES[1], BALANCERS[2], CLIENTS[2], ADDRESSES[0], Ip([0xff; 16])]);
    let unspecified = Ip([0; 16]);
    let from = input.of(&[CLIENTS[2], unspecified, ADDRESSES[1], BALANCERS[2]]);
    let [.., a, b, c] = target.0;
    let group = Ip([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, a, b, c]);
    let to = input.of(&[group, target, Ip([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1])]);
    let kind = input.of(&[135, 135, 135, 136, 133]);
    let ttl = input.of(&[255, 255, 255, 64]);
    let mut frame = if input.byte() & 7 == 7 {
        let four = |it: Ip| it.ipv4();
        let operation = 1 + u16::from(input.byte() & 3);
        arp(
            operation,
            [2, 1, 1, 1, 1, 1],
            four(CLIENTS[0]),
            [0; 6],
            input.of(&[four(ADDRESSES[0]), four(BALANCERS[0])]),
            [255; 6],
        )
    } else {
        let length = usize::from(input.byte() % 88);
        let options =
            if input.byte() & 1 == 0 { vec![1, 1, 2, 1, 1, 1, 1, 1] } else { input.bytes(length).to_vec() };
        let body = [&[0; 4][..], &target.0, &options].concat();
        Packet6::of(from.0, to.0, Packet { ttl, ..Packet::udp() }).icmp(kind, &body)
    };
    // A few bytes tampered with.
    for _ in 0..input.below(3) {
        let (at, value) = (usize::from(input.byte()), input.byte());
        if let Some(byte) = frame.get_mut(at) {
            *byte = value;
        }
    }
    let (verdict, after) = world.send(slot, &frame, 1000);
    let Ok(verdict) = verdict else { return };
    match verdict.action() {
        Action::Pass => {
            assert_eq!(after, frame);
            // An advertisement of our address, or one that claims to come from it, goes nowhere.
            if let Some(view) = View::of(&frame)
                && view.protocol == 58
                && view.payload.len() >= 24
                && view.payload[0] == 136
                && slot != STACK
                // No host takes a packet from or to an IPv4 address.
                && !view.from.is_ipv4()
                && !view.to.is_ipv4()
            {
                let told = Ip(view.payload[8..24].try_into().unwrap());
                assert!(told.is_ipv4() || !is_ours(vpc, told), "{view:02x?}");
                assert!(!is_ours(vpc, view.from), "{view:02x?}");
            }
        }
        Action::Answer(code) => {
            check_answer(code, &frame, &after);
            let mac: [u8; 6] = after[6..12].try_into().unwrap();
            if frame[12..14] == [8, 6] {
                assert!(slot == STACK || mac[..3] == [2, 0, 0], "{mac:?}");
                return;
            }
            let came = View::of(&frame).unwrap();
            if came.protocol != 58 {
                return;
            }
            if came.payload[0] == 128 {
                // Tampered with so that it became an echo request, which is as answerable.
                assert_eq!(View::of(&after).unwrap().payload[0], 129);
                return;
            }
            assert_eq!((came.payload[0], came.payload[1], came.ttl), (135, 0, 255));
            assert_eq!(came.is_sound(), Some(true), "only a right question is answered");
            let asked = Ip(came.payload[8..24].try_into().unwrap());
            if slot != STACK {
                assert!(is_ours(vpc, asked), "{asked:?}");
                assert_eq!(mac, [2, 0, 0, vpc as u8, 9, asked.0[15]]);
            }
            assert_eq!(View::of(&after).unwrap().payload[26..32], mac, "the option says the same");
        }
        other => panic!("{other:?}"),
    }
}
