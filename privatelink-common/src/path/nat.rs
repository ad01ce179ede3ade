//! Opens a flow: chooses the target, claims a NAT port, and installs both directions.
//!
//! The claim is the insertion of the reverse entry, which fails where the key is taken: no lock, no bitmap. `established` is asked
//! before (most ports in use are there) and after (a flow may have moved there in between; it enters before it leaves `pending`).
//! Where a load balancer's IPv4 address has flows of both widths, a port is one flow's all the same: whoever has claimed it in its own
//! tables then looks into the others, and lets go of it if it is there.

use super::admit::Door;
use super::first::Peer;
use super::parse::Packet;
use super::sequence;
use super::state::State;
use crate::checksum::delta;
use crate::limits::{NAT_PORT_COUNT, NAT_PORT_FIRST, NAT_PROBES, UDP_IDLE};
use crate::tables::{
    BALANCER, Course, Face, Flows, InsertError, Key, Neighbour, Tables, Target, TargetEvent, VpcAddress,
    Width,
};
use crate::verdict::Direction;
use zerocopy::big_endian::U16;

/// Why a flow was not opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Refusal {
    /// The listener's target group is empty.
    NoTarget,
    /// The target's link-layer address is not known.
    NoNextHop,
    /// No NAT port is free among those tried.
    NoNatPort,
    /// The pending flows have no room.
    Full,
}

/// Mixes 64 bits so that every bit of the input moves every bit of the output (the finaliser of MurmurHash3).
#[inline(always)]
const fn mix(mut hash: u64) -> u64 {
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ (hash >> 33)
}

/// Hash of a flow: addresses, ports and protocol as AWS has it, and the VPC, since addresses alone do not tell tenants apart.
#[inline(always)]
fn flow_hash<K: Key>(key: &K) -> u64 {
    let addresses = key.source().bits().rotate_left(32) ^ key.destination().bits();
    let ports = (u64::from(key.source_port().get()) << 16) | u64::from(key.destination_port().get());
    let rest = (ports << 24) | (u64::from(key.vpc()) << 8) | u64::from(key.protocol());
    mix(mix(addresses) ^ rest)
}

/// The slot of the listener's table: by the flow, or by its source alone where sources stick to their targets.
#[inline(always)]
#[allow(
    clippy::cast_possible_truncation,
    reason = "the upper half is taken on purpose: the lower chooses the port"
)]
fn slot<K: Key>(key: &K, hash: u64, door: &Door) -> u32 {
    let source = (u64::from(key.vpc()) << 32) ^ key.source().bits();
    let by = if door.listener.sticky == 0 { hash } else { mix(source) };
    (by >> 32) as u32 % door.listener.slots
}

/// Which of the load balancer's addresses the flow leaves from: bits that choose neither the port nor the slot alone.
#[inline(always)]
const fn pick(hash: u64) -> usize {
    (hash >> 16) as usize & 7
}

/// Chooses where the flow of `packet` goes, through the door that it was admitted by, and puts the entries of both directions into
/// `forward` and `peer`, but for the port. `marks` are those of [`Course::way`].
#[inline(always)]
pub(super) fn choose<K: Key, T: Tables>(
    tables: &T,
    packet: &Packet<K>,
    now: u32,
    marks: u8,
    forward: &mut K::Flow,
    peer: &mut Peer<K>,
) -> Result<(), Refusal> {
    let door = &peer.door;
    let hash = flow_hash(&packet.key);
    if door.listener.slots == 0 {
        return Err(Refusal::NoTarget);
    }
    let slot = slot(&packet.key, hash, door);
    let id = tables.slot(door.listener.table, slot).ok_or(Refusal::NoTarget)?;
    let target = tables.target(id).filter(|target| target.vpc != 0).ok_or(Refusal::NoTarget)?;
    let to_ipv4 = target.address.is_ipv4();
    if K::WIDE == (to_ipv4 && packet.key.is_ipv4()) {
        // While a listener's target group becomes one of the other family.
        return Err(Refusal::NoTarget);
    }
    let source = tables.source(door.address.balancer, to_ipv4, pick(hash)).ok_or(Refusal::NoTarget)?;
    let mut balancer = tables.face(source).ok_or(Refusal::NoTarget)?;
    if preserves(packet, door, &target) {
        balancer.address = packet.key.source().widen();
    }
    let hop = tables.neighbour(&VpcAddress::new(target.vpc, target.address)).ok_or(Refusal::NoNextHop)?;

    *forward = to_provider(packet, door, &balancer, &target, &hop);
    peer.flow = to_consumer(packet, door, &balancer, &target);
    #[allow(clippy::cast_possible_truncation, reason = "targets have numbers of 16 bits")]
    {
        (forward.target, peer.flow.target) = (id as u16, id as u16);
    }
    (forward.way, peer.flow.way) = (forward.way | marks, peer.flow.way | marks);
    (forward.opened, peer.flow.opened) = (now, now);
    (forward.last_seen, peer.flow.last_seen) = (now, now);
    Ok(())
}

/// Opens the flow that was chosen: claims a port for it, and installs both directions.
#[inline(always)]
pub(super) fn open<K: Key, T: Tables + Flows<K> + Flows<K::Other>>(
    tables: &T,
    packet: &Packet<K>,
    forward: &mut K::Flow,
    peer: &mut Peer<K>,
) -> Result<(), Refusal> {
    if let Err(refusal) = claim_port(tables, packet, forward, peer) {
        if refusal == Refusal::NoNatPort {
            tables.count(forward.target.into(), TargetEvent::PortAllocationError);
        }
        return Err(refusal);
    }
    sequence::begin(packet, peer.numbers, forward);
    match tables.claim(&packet.key, forward) {
        Ok(()) => {
            if packet.is_tcp() {
                tables.count(forward.target.into(), TargetEvent::Opened);
            }
            Ok(())
        }
        Err(_) => {
            tables.remove_pending(&peer.key);
            Err(Refusal::Full)
        }
    }
}

/// Whether the target sees the client as it is: a client of the load balancer's own VPC and of the target's family, unless it is the
/// target itself, which takes no packet from its own address.
#[inline(always)]
fn preserves<K: Key>(packet: &Packet<K>, door: &Door, target: &Target) -> bool {
    let client = packet.key.source().widen();
    door.listener.preserve != 0
        && door.address.kind == BALANCER
        && target.address != client
        && target.address.is_ipv4() == client.is_ipv4()
}

/// Claims a port. Where the client's address is preserved, so is its port, if it can be: where the client uses it towards this target
/// already, by another of the load balancer's addresses, it gets another one.
#[inline(always)]
fn claim_port<K: Key, T: Tables + Flows<K> + Flows<K::Other>>(
    tables: &T,
    packet: &Packet<K>,
    forward: &mut K::Flow,
    peer: &mut Peer<K>,
) -> Result<(), Refusal> {
    let hash = flow_hash(&packet.key);
    // A consumer may have the load balancer's address in a VPC of its own: that does not make the port its own, too.
    let own_vpc = peer.door.address.kind == BALANCER;
    let same = K::source_of(forward).widen() == packet.key.source().widen();
    // Both are asked, whatever the first says: the verifier follows the probes below once for each way to them.
    let preserved = own_vpc & same;
    let shared = peer.door.address.dualstack != 0;
    #[allow(clippy::cast_possible_truncation, reason = "only the lower bits choose the port")]
    let (start, step) = (hash as u32 % NAT_PORT_COUNT, stride((hash >> 24) as u32));
    #[allow(clippy::cast_possible_truncation, reason = "an offset is below NAT_PORT_COUNT")]
    let at = |offset: u32| U16::new(NAT_PORT_FIRST + offset as u16);
    let mut offset = start;
    let mut port = if preserved { packet.key.source_port() } else { at(offset) };
    for _ in 0..NAT_PROBES {
        forward.source_port = port;
        peer.key = packet.key.mirror(forward);
        let key = &peer.key;
        if tables.established(key).is_none() {
            match tables.claim(key, &peer.flow) {
                Ok(()) if tables.established(key).is_none() && !(shared && is_taken(tables, key)) => {
                    return Ok(());
                }
                Ok(()) => tables.remove_pending(key),
                Err(InsertError::Exists) => {}
                Err(InsertError::Full) => return Err(Refusal::Full),
            }
        }
        offset += step;
        if offset >= NAT_PORT_COUNT {
            offset -= NAT_PORT_COUNT;
        }
        port = at(offset);
    }
    Err(Refusal::NoNatPort)
}

/// Whether a flow of the other width has the port that was just claimed. Of two that claim it at once, one sees the other: perhaps both.
/// The pending are asked first, since a flow enters the established before it leaves them. Not inlined: the kernel bounds a function's
/// stack.
#[inline(never)]
fn is_taken<K: Key, T: Tables + Flows<K::Other>>(tables: &T, key: &K) -> bool {
    let Some(key) = key.other() else { return false };
    tables.fence();
    tables.pending(&key).is_some() || tables.established(&key).is_some()
}

/// A step that visits every port before it comes back: [`NAT_PORT_COUNT`] is 2^11 * 31, so any step of the form 62n + 1 is coprime.
#[inline(always)]
const fn stride(hash: u32) -> u32 {
    hash % (NAT_PORT_COUNT / 62) * 62 + 1
}

#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "endpoints have numbers of 16 bits")]
fn to_provider<K: Key>(
    packet: &Packet<K>,
    door: &Door,
    balancer: &Face,
    target: &Target,
    hop: &Neighbour,
) -> K::Flow {
    let key = &packet.key;
    let (source, destination) = (K::Address::of(balancer.address), K::Address::of(target.address));
    let course = Course {
        source_port: U16::ZERO,
        destination_port: target.port,
        address_delta: delta(key.source().sum() + key.destination().sum(), source.sum() + destination.sum()),
        destination_mac: hop.mac,
        source_mac: balancer.mac,
        seen_mac: packet.source_mac,
        seen_interface: packet.interface,
        interface: hop.interface,
        peer_vpc: target.vpc,
        endpoint: door.address.endpoint as u16,
        generation: door.generation,
        target: 0,
        opened: 0,
        last_seen: 0,
        idle_timeout: idle_timeout(packet, door),
        state: State::Opening as u8,
        way: Direction::ToProvider as u8,
        sent: 0,
        acknowledged: 0,
    };
    K::flow(source, destination, course)
}

#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "as above")]
fn to_consumer<K: Key>(packet: &Packet<K>, door: &Door, balancer: &Face, target: &Target) -> K::Flow {
    let key = &packet.key;
    let (source, destination) = (K::Address::of(balancer.address), K::Address::of(target.address));
    let course = Course {
        source_port: key.destination_port(),
        destination_port: key.source_port(),
        address_delta: delta(source.sum() + destination.sum(), key.source().sum() + key.destination().sum()),
        destination_mac: packet.source_mac,
        source_mac: door.address.mac,
        seen_mac: packet.source_mac,
        seen_interface: 0,
        interface: packet.interface,
        peer_vpc: key.vpc(),
        endpoint: door.address.endpoint as u16,
        generation: door.generation,
        target: 0,
        opened: 0,
        last_seen: 0,
        idle_timeout: idle_timeout(packet, door),
        state: State::Opening as u8,
        way: Direction::ToConsumer as u8,
        sent: 0,
        acknowledged: 0,
    };
    K::flow(key.destination(), key.source(), course)
}

#[inline(always)]
fn idle_timeout<K: Key>(packet: &Packet<K>, door: &Door) -> u16 {
    if packet.is_tcp() { door.listener.idle_timeout } else { UDP_IDLE }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec;

    #[test]
    fn every_stride_visits_every_port() {
        for hash in [0, 1, 5, 1000, NAT_PORT_COUNT / 62 - 1, u32::MAX] {
            let (step, mut seen, mut offset) = (stride(hash), vec![false; NAT_PORT_COUNT as usize], 0);
            assert!(step < NAT_PORT_COUNT, "one subtraction brings the offset back");
            for _ in 0..NAT_PORT_COUNT {
                seen[offset as usize] = true;
                offset = (offset + step) % NAT_PORT_COUNT;
            }
            assert!(seen.into_iter().all(|it| it), "step {step}");
        }
    }
}
