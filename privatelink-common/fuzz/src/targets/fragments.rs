//! A datagram in fragments arrives as the same datagram, or in part, and never as another: whatever is sent twice, in another order, in
//! other sizes, by another tenant, or too late.

use crate::input::Input;
use crate::packet::Packet;
use crate::view::{View, check_forwarded};
use crate::world::{ADDRESSES, BALANCERS, DATAGRAMS, PORT, TARGETS, World};
use privatelink_common::frame::SliceFrame;
use privatelink_common::path::fragment::{datagram, known};
use privatelink_common::verdict::Action;
use std::collections::{BTreeMap, HashMap};

/// The bytes of a datagram's payload that have arrived, by where they belong.
type Arrived = BTreeMap<usize, u8>;

/// Sends a frame of a tenant's; keeps it if it is to be held, and what has arrived of it.
fn send(
    world: &World,
    frame: &[u8],
    tenant: u16,
    now: u32,
    held: &mut Vec<(u16, Vec<u8>)>,
    arrived: &mut HashMap<(u16, [u8; 2]), Arrived>,
) {
    let fragment = u16::from_be_bytes([frame[20], frame[21]]);
    let (verdict, after) = world.send(tenant, frame, now);
    let Ok(verdict) = verdict else { return };
    let endpoint = match verdict.action() {
        Action::Forward { endpoint, .. } => endpoint,
        Action::Hold => {
            assert!(fragment & 0x1fff != 0 && after == frame, "a later fragment, and untouched");
            held.push((tenant, after));
            return;
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(endpoint, u32::from(tenant));
    check_forwarded(frame, &after, false);
    let left = View::of(&after).expect("a packet");
    assert!(BALANCERS.contains(&left.from) && TARGETS.contains(&left.to));
    if fragment == 0 {
        return;
    }
    // What the target puts together: the identification is all that tells datagrams from one address apart.
    let place = usize::from(u16::from_be_bytes([after[20], after[21]]) & 0x1fff) * 8;
    let of = arrived.entry((tenant, after[18..20].try_into().unwrap())).or_default();
    for (at, byte) in (place..).zip(left.payload) {
        let before = of.insert(at, *byte);
        assert!(before.is_none() || fragment & 0x1fff == 0, "byte {at} of a datagram arrived twice");
    }
}

pub fn run(input: &[u8]) {
    let mut input = Input(input);
    let world = World::default();
    let mut now = 1000;
    // Both tenants' datagrams are of the same addresses, ports and identification; what they carry says whose they are.
    let whole = |tenant: u16| {
        let packet = Packet { to: ADDRESSES[0].ipv4(), to_port: PORT + DATAGRAMS, ..Packet::udp() };
        let payload = (0..400u16).map(|at| (at as u8).wrapping_mul(31) ^ (tenant as u8) << 7).collect();
        Packet { payload, ..packet }.build()[34..].to_vec()
    };
    let sent = [whole(1), whole(2)];
    let mut arrived: HashMap<(u16, [u8; 2]), Arrived> = HashMap::new();
    let mut held: Vec<(u16, Vec<u8>)> = Vec::new();
    for _ in 0..40 {
        if input.is_empty() {
            break;
        }
        let tenant = 1 + u16::from(input.byte() & 1);
        let choice = input.byte();
        let size = input.of(&[48, 56, 64, 200, 8, 408]);
        // One in order and of one size, or any.
        let (offset, length) = if choice & 3 == 0 {
            (usize::from(input.byte() & 63) * 8, usize::from(input.byte()))
        } else {
            (input.below(9) * size, size)
        };
        let bytes = sent[usize::from(tenant) - 1].get(offset..).unwrap_or_default();
        let bytes = &bytes[..bytes.len().min(length)];
        let more = if offset + bytes.len() < 408 || choice & 0x80 != 0 { 0x2000 } else { 0 };
        let fragment = more | (offset / 8) as u16;
        let id = u16::from(choice >> 2 & 1);
        let frame =
            Packet { protocol: 17, to: ADDRESSES[0].ipv4(), id, fragment, ..Packet::udp() }.ipv4(bytes);
        send(&world, &frame, tenant, now, &mut held, &mut arrived);
        // Those that are held go again when their first has come, as the agent has it.
        let has_come = |(tenant, frame): &(u16, Vec<u8>)| {
            let key = datagram(&SliceFrame::new(&mut frame.clone()), *tenant).expect("a fragment");
            known(&world, &key, now).is_some()
        };
        let (again, still) = held.drain(..).partition(has_come);
        held = still;
        for (tenant, frame) in Vec::from_iter(again) {
            let before = held.len();
            send(&world, &frame, tenant, now, &mut held, &mut arrived);
            assert_eq!(held.len(), before, "nothing is held whose first has come");
        }
        held.truncate(16);
        if choice & 0x40 != 0 {
            now += u32::from(input.byte() & 31);
        }
    }
    let ids = |tenant| arrived.keys().filter(move |it| it.0 == tenant).map(|it| it.1);
    assert!(
        ids(1).all(|id| !ids(2).any(|other| other == id)),
        "two tenants' datagrams have one identification"
    );
    for ((tenant, _), bytes) in &arrived {
        for (at, byte) in bytes.iter().filter(|(at, _)| **at >= 8) {
            assert_eq!(*byte, sent[usize::from(*tenant) - 1][*at], "byte {at} of tenant {tenant}");
        }
    }
}
