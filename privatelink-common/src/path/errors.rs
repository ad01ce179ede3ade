//! ICMP errors about packets that we have sent (RFC 792; RFC 5508, section 4): each goes to the side that the packet came from, as
//! if its own peer had sent it.
//!
//! An error is believed if what it holds is the beginning of a packet of a flow: addresses, ports and protocol as we have sent them, and
//! a TCP segment's number one that is in flight (RFC 5927, 4.1). Who sent the error does not count, since routers have any address.

use super::parse::Packet;
use super::rewrite::{IpTail, Macs, ONE_HOP, Ports, port_change};
use super::rules::{self, Way};
use super::state::State;
use super::{sequence, stack};
use crate::checksum::{address, delta, update, update_udp, word};
use crate::frame::Frame;
use crate::limits::STACK_PORTS;
use crate::tables::{Entry, Flow, FlowKey, Flows, Key, RESOLVER, Tables, VpcAddress};
use crate::verdict::{Direction, DropReason, FlowEvent, Verdict};
use crate::wire::{
    DESTINATION_UNREACHABLE, FRAGMENT_OFFSET, ICMP, IcmpError, Ipv4, Ipv4Header, NETWORK, PARAMETER_PROBLEM,
    TCP, TIME_EXCEEDED, TRANSPORT, Tcp, UDP, Udp,
};
use core::mem::{offset_of, size_of};
use zerocopy::{
    FromBytes, Immutable, IntoBytes,
    big_endian::{U16, U32},
};

/// Where the header of the packet begins that the error is about.
const INNER: usize = TRANSPORT + size_of::<IcmpError>();
/// Where its transport header begins.
const INNER_TRANSPORT: usize = INNER + size_of::<Ipv4Header>();

/// The checksum, source and destination of an IPv4 header.
#[derive(Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct InnerTail([u8; 2], Ipv4, Ipv4);

/// The eight bytes of transport header that every error holds.
#[derive(Clone, Copy, FromBytes)]
#[repr(C)]
struct InnerTransport {
    source_port: U16,
    destination_port: U16,
    /// TCP's.
    sequence: U32,
}

/// What an error is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Found {
    /// No flow that is alive.
    Nothing = 0,
    /// A segment that its flow does not have in flight.
    OutOfWindow = 1,
    /// A packet of a flow.
    Flow = 2,
}

/// Whether the packet is an ICMP error that is passed on. Source quench is not (RFC 6633), nor is a redirect.
#[inline(always)]
pub(super) fn is_error<F: Frame>(frame: &F, packet: &Packet<FlowKey>) -> bool {
    packet.key.protocol == ICMP
        && matches!(
            frame.read::<u8>(TRANSPORT),
            Some(DESTINATION_UNREACHABLE | TIME_EXCEEDED | PARAMETER_PROBLEM)
        )
}

/// Passes an error on. Not inlined: the kernel bounds a function's stack.
#[inline(never)]
pub(super) fn pass_on<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    packet: &Packet<FlowKey>,
    now: u32,
    flow: &mut Flow,
) -> Verdict {
    Verdict::of(translate(frame, tables, packet, now, flow))
}

#[inline(always)]
fn translate<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    packet: &Packet<FlowKey>,
    now: u32,
    flow: &mut Flow,
) -> Result<Verdict, DropReason> {
    let Some(ours) = tables.address(&VpcAddress::ipv4(packet.key.vpc, packet.key.destination)) else {
        return Ok(Verdict::PASS);
    };
    if tables.address(&VpcAddress::ipv4(packet.key.vpc, packet.key.source)).is_some() {
        return Err(DropReason::SpoofedSource);
    }
    let outer = frame.read::<Ipv4Header>(NETWORK).ok_or(DropReason::Malformed)?;
    let inner = frame.read::<Ipv4Header>(INNER).ok_or(DropReason::IcmpMalformed)?;
    let transport = frame.read::<InnerTransport>(INNER_TRANSPORT).ok_or(DropReason::IcmpMalformed)?;
    let held = usize::from(outer.total_length.get()).wrapping_sub(INNER_TRANSPORT - NETWORK);
    if held < size_of::<InnerTransport>() || held > 0xffff || inner.version_ihl != 0x45 {
        return Err(DropReason::IcmpMalformed);
    }
    if inner.source != packet.key.destination {
        return Err(DropReason::IcmpForged);
    }
    if ours.is_resolver() || ours.stack != 0 && STACK_PORTS.contains(&transport.source_port.get()) {
        if ours.kind != RESOLVER && enters(tables, &packet.key) == 0 {
            return Err(DropReason::NetworkAcl);
        }
        return stack::receive(frame, tables, ours.stack);
    }
    if inner.fragment.get() & FRAGMENT_OFFSET != 0 {
        return Err(DropReason::IcmpNoFlow);
    }
    let key = FlowKey {
        source: inner.destination,
        destination: inner.source,
        source_port: transport.destination_port,
        destination_port: transport.source_port,
        vpc: packet.key.vpc,
        protocol: inner.protocol,
        reserved: 0,
    };
    match find(tables, &key, now, transport.sequence.get(), flow) {
        Found::Nothing => return Err(DropReason::IcmpNoFlow),
        Found::OutOfWindow => return Err(DropReason::IcmpOutOfWindow),
        Found::Flow => {}
    }
    if lets(tables, &packet.key, flow) == 0 {
        return Err(DropReason::NetworkAcl);
    }
    if outer.ttl <= 1 {
        return Err(DropReason::TtlExpired);
    }
    let mtu = tables.mtu(flow.interface);
    if mtu != 0 && u32::from(outer.total_length.get()) > mtu {
        return Err(DropReason::TooBig);
    }
    if flow.is_shifted() {
        let key = consumers(&key, flow);
        if sequence::restore::<F, T, FlowKey, TRANSPORT, INNER_TRANSPORT>(frame, tables, &key, flow, held)
            == 0
        {
            return Err(DropReason::IcmpMalformed);
        }
    }
    let change = rewrite_inner(frame, &inner, held, &key, flow).ok_or(DropReason::IcmpMalformed)?;
    rewrite_outer(frame, &outer, flow, change).ok_or(DropReason::Malformed)?;
    let verdict =
        Verdict::forward(flow.interface, flow.endpoint.into(), flow.direction(), FlowEvent::None, false);
    verdict.leaving(tables.egress(flow.interface))
}

/// Whether network ACLs let an error come in that is for a VPC's own stack. Not inlined, nor is the next: the kernel bounds a function's
/// stack.
#[inline(never)]
fn enters<T: Tables>(tables: &T, key: &FlowKey) -> u64 {
    rules::crosses(tables, &Way::of(key))
}

/// Whether they let one through that is about a flow.
#[inline(never)]
fn lets<T: Tables>(tables: &T, key: &FlowKey, flow: &Flow) -> u64 {
    rules::lets_error::<FlowKey, T>(tables, &Way::of(key), flow).into()
}

/// Puts the entry of a flow that is alive into `flow`: it, and the one of the direction that the packet in the error went, map to
/// each other. A segment left with the sequence number `number`.
#[inline(always)]
pub(super) fn find<K: Key, T: Tables + Flows<K>>(
    tables: &T,
    key: &K,
    now: u32,
    number: u32,
    flow: &mut K::Flow,
) -> Found {
    let (entry, established) = match tables.established(key) {
        Some(entry) => (entry, true),
        None => match tables.pending(key) {
            Some(entry) => (entry, false),
            None => return Found::Nothing,
        },
    };
    *flow = entry.flow();
    let peer_key = key.mirror(flow);
    let peer = if established { tables.established(&peer_key) } else { tables.pending(&peer_key) };
    let Some(peer) = peer.map(|peer| peer.flow()) else { return Found::Nothing };
    let silent = now.wrapping_sub(flow.last_seen).min(now.wrapping_sub(peer.last_seen));
    let is_alive = peer_key.mirror(&peer) == *key
        && silent <= flow.patience()
        && flow.state != State::Terminated as u8
        && tables.endpoint(flow.endpoint.into()).generation == flow.generation;
    if !is_alive {
        return Found::Nothing;
    }
    if key.protocol() == TCP && !sequence::is_true(tables, &consumers(key, flow), flow, number, peer.sent) {
        return Found::OutOfWindow;
    }
    Found::Flow
}

/// The key of the consumer's packets of a flow, of which `flow` is the entry with this key.
#[inline(always)]
pub(super) fn consumers<K: Key>(key: &K, flow: &K::Flow) -> K {
    match flow.direction() {
        Direction::ToProvider => *key,
        Direction::ToConsumer => key.mirror(flow),
    }
}

/// Gives the packet in the error back the addresses and ports that it came to us with. Returns what that changes of the ICMP checksum.
#[inline(always)]
fn rewrite_inner<F: Frame>(
    frame: &mut F,
    inner: &Ipv4Header,
    held: usize,
    key: &FlowKey,
    flow: &Flow,
) -> Option<u32> {
    let (addresses, ports) = (u32::from(flow.address_delta), port_change(key, flow));
    let checksum = update(inner.checksum, addresses);
    let mut change = addresses + ports + u32::from(delta(word(inner.checksum), word(checksum)));
    let tail = InnerTail(checksum, flow.destination, flow.source);
    frame.write(INNER + offset_of!(Ipv4Header, checksum), &tail)?;
    frame.write(INNER_TRANSPORT, &Ports(flow.destination_port, flow.source_port))?;
    let at = match inner.protocol {
        UDP => INNER_TRANSPORT + offset_of!(Udp, checksum),
        // The header may be cut off before its checksum.
        TCP if held >= offset_of!(Tcp, checksum) + 2 => INNER_TRANSPORT + offset_of!(Tcp, checksum),
        _ => return Some(change),
    };
    let stored = frame.read::<[u8; 2]>(at)?;
    let updated = if inner.protocol == UDP {
        update_udp(stored, addresses + ports)
    } else {
        update(stored, addresses + ports)
    };
    change += u32::from(delta(word(stored), word(updated)));
    frame.write(at, &updated)?;
    Some(change)
}

/// Makes it an error that the flow's other end has sent, whoever has: the networks behind the endpoint and the load balancer stay
/// unknown to each other.
#[inline(always)]
fn rewrite_outer<F: Frame>(frame: &mut F, outer: &Ipv4Header, flow: &Flow, change: u32) -> Option<()> {
    let at = TRANSPORT + offset_of!(IcmpError, checksum);
    let checksum = update(frame.read::<[u8; 2]>(at)?, change);
    frame.write(at, &checksum)?;
    let moved = delta(
        address(outer.source) + address(outer.destination),
        address(flow.source) + address(flow.destination),
    );
    let checksum = update(outer.checksum, u32::from(moved) + ONE_HOP);
    let tail = IpTail(outer.ttl.wrapping_sub(1), ICMP, checksum, flow.source, flow.destination);
    frame.write(NETWORK + offset_of!(Ipv4Header, ttl), &tail)?;
    frame.write(0, &Macs(flow.destination_mac, flow.source_mac))
}
