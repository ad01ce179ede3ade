//! ICMP errors about packets that were sent on: one that is passed on goes to the sender of that packet alone, speaks of the packet as it
//! was sent, and is as right as it came. One about a segment that was acknowledged is not.

use super::build;
use crate::input::Input;
use crate::packet::{ACK, Packet, SYN};
use crate::view::View;
use crate::world::{ADDRESSES, BANK, CLIENTS, DATAGRAMS, PAYMENTS, PORT, PROXIED, SHOP, World, vpc_of};
use privatelink_common::verdict::{Action, Direction, DropReason};

pub fn run(input: &[u8]) {
    let mut input = Input(input);
    let world = World::default();
    let mut sent = Vec::new();
    // The same connection of two tenants, half-open or whole.
    for slot in [1, 2] {
        let mut packet = if input.byte() & 1 == 0 {
            Packet { to_port: input.of(&[PORT, PROXIED]), seq: input.long(), ..Packet::tcp(SYN) }
        } else {
            Packet { to_port: PORT + DATAGRAMS, ..Packet::udp() }
        };
        packet.from_port = 1000 + u16::from(input.byte() & 3);
        let frame = build(CLIENTS[0], ADDRESSES[0], &packet);
        let (verdict, after) = world.send(slot, &frame, 1000);
        let Ok(Action::Forward { interface, .. }) = verdict.map(|it| it.action()) else { continue };
        let is_answered = input.byte() & 1 == 1;
        let (there, back) = (packet.seq, input.long());
        // What nobody has acknowledged is in flight; where a number is zero, which is one that is not known, either is right.
        let numbers = [there, there.wrapping_add(1), back, back.wrapping_add(1)];
        let acknowledged = match packet.flags {
            SYN => numbers.iter().all(|it| *it != 0).then_some(true),
            _ => Some(false),
        };
        sent.push((
            slot,
            frame,
            interface,
            after.clone(),
            if is_answered { acknowledged } else { Some(false) },
        ));
        if is_answered {
            let left = View::of(&after).unwrap();
            let (from_port, to_port) = (left.ports().1, left.ports().0);
            let (flags, ack) = (SYN | ACK, there.wrapping_add(1));
            let answer = Packet { from_port, to_port, flags, seq: back, ack, ..packet.clone() };
            let answer = build(left.to, left.from, &answer);
            let (verdict, arrived) = world.send(interface, &answer, 1000);
            if let Ok(Action::Forward { interface: to, .. }) = verdict.map(|it| it.action()) {
                sent.push((interface, answer, to, arrived, acknowledged));
            }
            let (flags, seq, ack) = (ACK, there.wrapping_add(1), back.wrapping_add(1));
            let confirmed = build(CLIENTS[0], ADDRESSES[0], &Packet { flags, seq, ack, ..packet });
            let (verdict, arrived) = world.send(slot, &confirmed, 1000);
            if let Ok(Action::Forward { interface: to, .. }) = verdict.map(|it| it.action()) {
                sent.push((slot, confirmed, to, arrived, Some(false)));
            }
        }
    }
    for _ in 0..8 {
        if sent.is_empty() || input.is_empty() {
            return;
        }
        let (slot, original, left_by, about, acknowledged) = sent[input.below(sent.len())].clone();
        let view = View::of(&about).unwrap();
        let choice = input.byte();
        let (kind, code) = (input.of(&[3, 11, 12, 4, 5, 0]), input.byte() & 15);
        // Unused, or an MTU; and the packet as it left, cut off and perhaps tampered with.
        let mut body = [&input.long().to_be_bytes()[..], &about[14..]].concat();
        body.truncate(4 + usize::from(input.byte()) % 64);
        let mut is_true = body.len() >= 4 + 28;
        if choice & 1 == 1 {
            let (at, value) = (4 + usize::from(input.byte() % 44), input.byte());
            if let Some(byte) = body.get_mut(at).filter(|byte| **byte != value) {
                *byte = value;
                is_true = false;
            }
        }
        let router = [10, 0, 3, input.byte()];
        let error =
            Packet { from: router, to: view.from.ipv4(), ttl: input.of(&[64, 2, 1]), ..Packet::tcp(0) };
        let mut frame = error.icmp_code(kind, code, &body);
        if choice & 2 == 2 {
            // Wrong as it comes.
            frame[36] ^= 1;
        }
        let by = if choice & 0x1c == 4 { input.of(&[1, 2, 3, 4, 6]) } else { left_by };
        let (verdict, after) = world.send(by, &frame, 1000);
        let is_at_home = vpc_of(by) == vpc_of(left_by);
        let Ok(Action::Forward { interface, direction, endpoint, .. }) = verdict.map(|it| it.action()) else {
            let is_late = verdict == Err(DropReason::IcmpOutOfWindow);
            let was_in_flight = is_true && is_at_home && acknowledged == Some(false);
            assert!(!is_late || !was_in_flight, "{original:02x?} is in flight");
            continue;
        };
        assert!(!is_true || !is_at_home || acknowledged != Some(true), "{original:02x?} was acknowledged");
        assert!([3, 11, 12].contains(&kind) && error.ttl > 1, "{kind}");
        let (came, left) = (View::of(&frame).unwrap(), View::of(&after).unwrap());
        assert_eq!(left.is_sound(), came.is_sound(), "{frame:02x?} became {after:02x?}");
        assert_eq!((left.protocol, left.ttl, left.payload.len()), (1, error.ttl - 1, came.payload.len()));
        assert_eq!((&left.payload[..2], &left.payload[4..6]), (&[kind, code][..], &body[..2]));
        let mtu = |bytes: &[u8]| u16::from_be_bytes([bytes[0], bytes[1]]);
        let (said, told) = (mtu(&body[2..]), mtu(&left.payload[6..]));
        // What took the Proxy Protocol's header along has so much less room.
        let with_header = (kind, code) == (3, 4) && direction == Direction::ToConsumer && said > 100;
        assert!(told == said || with_header && told == said - 100, "{said} became {told}");
        let consumer = if endpoint == 1 { SHOP } else { BANK };
        let (here, there) = (vpc_of(by).unwrap(), vpc_of(interface).unwrap());
        match direction {
            Direction::ToProvider => assert_eq!((here, there), (consumer, PAYMENTS)),
            Direction::ToConsumer => assert_eq!((here, there), (PAYMENTS, consumer)),
        }
        // What both tenants are sent looks the same.
        if !is_true || here != vpc_of(left_by).unwrap() {
            continue;
        }
        // It goes where the packet came from, and speaks of what was sent there.
        let of = View::of(&original).unwrap();
        assert!(direction == Direction::ToProvider || interface == slot, "{interface} {slot}");
        assert_eq!((left.from, left.to), (of.to, of.from));
        let held = &left.payload[8..];
        assert_eq!(held[12..20], original[26..34], "its addresses");
        assert_eq!(held[20..24], original[34..38], "its ports");
        assert_eq!(held[24..28], original[38..42], "the rest");
    }
}
