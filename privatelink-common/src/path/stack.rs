//! Traffic between a VPC and its own stack: the network namespace in which the agent's sockets (health checks, the resolver) have the
//! load balancer's and the resolver's addresses. It is routed, not translated; nothing of it can reach another VPC.

use super::local::arp_reply;
use super::neighbour::advertise;
use super::parse::{self, Network, Packet, Transport};
use super::rules::{self, Way};
use crate::frame::Frame;
use crate::limits::{DNS, NEW_CALLERS, STACK_PORTS};
use crate::tables::{
    Address, BALANCER, CallerRate, FlowKey6, Interface, Key, Neighbour, RESOLVER, Tables, VpcAddress, Width,
};
use crate::verdict::{Answer, DropReason, Verdict};
use crate::wire::{Arp, ICMPV6, Ip, Ipv6Header, Mac, NETWORK, SOLICITATION, TRANSPORT6, UNSPECIFIED};
use core::mem::offset_of;
use zerocopy::{Immutable, IntoBytes};

/// The link-layer address of every stack's end of its link. Each stack is alone on its link, so one address serves all.
pub const STACK_MAC: Mac = [0x02, 0x70, 0x6c, 0, 0, 1];
/// What a stack believes to be its neighbour, whatever the address.
pub const ROUTER_MAC: Mac = [0x02, 0x70, 0x6c, 0, 0, 2];

/// Destination and source of an Ethernet header.
#[derive(Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct Macs(Mac, Mac);

/// An IPv4 packet that the stack sends: from a load balancer's or a resolver's address, to a neighbour that the agent knows, or to who
/// has asked the resolver.
#[inline(always)]
pub fn send<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    from: &Interface,
    now: u32,
) -> Result<Verdict, DropReason> {
    let mut packet = match parse::network(frame, from) {
        Network::Ipv4(packet) => packet,
        Network::Arp => return neighbour(frame),
        Network::Ipv6 | Network::Foreign => return Err(DropReason::ProtocolUnsupported),
    };
    match parse::transport(frame, tables, from, now, &mut packet) {
        Transport::Flow if packet.later => return Err(DropReason::Fragment),
        Transport::Flow => {}
        Transport::Other(fault) => return Err(fault.unwrap_or(DropReason::ProtocolUnsupported)),
    }
    route(frame, tables, &packet)
}

/// The same of an IPv6 packet. Not inlined, since the kernel bounds the stack of a function.
#[inline(never)]
pub(super) fn route6<F: Frame, T: Tables>(frame: &mut F, tables: &T, packet: &Packet<FlowKey6>) -> Verdict {
    Verdict::of(route(frame, tables, packet))
}

/// Sends a packet on to whom it is for.
#[inline(always)]
fn route<F: Frame, T: Tables, K: Key>(
    frame: &mut F,
    tables: &T,
    packet: &Packet<K>,
) -> Result<Verdict, DropReason> {
    let key = &packet.key;
    let source = tables
        .address(&VpcAddress::new(key.vpc(), key.source().widen()))
        .filter(|source| may_send(source, key.source_port().get()))
        .ok_or(DropReason::SpoofedSource)?;
    let destination = VpcAddress::new(key.vpc(), key.destination().widen());
    let hop = match tables.neighbour(&destination) {
        None if source.is_resolver() => {
            caller(tables, &VpcAddress::new(packet.interface, destination.address))
        }
        known => known,
    };
    let hop = hop.ok_or(DropReason::NoNextHop)?;
    // A resolver's own addresses are in no subnet, as on AWS: network ACLs cannot keep a VPC from its names.
    if source.kind != RESOLVER && rules::crosses(tables, &Way::of(key)) == 0 {
        return Err(DropReason::NetworkAcl);
    }
    frame.write(0, &Macs(hop.mac, source.mac)).ok_or(DropReason::Malformed)?;
    leave(tables, hop.interface)
}

/// Whether the stack may send from this address and port: only resolvers have a port that others begin to talk to.
#[inline(always)]
fn may_send(source: &Address, port: u16) -> bool {
    let asks = STACK_PORTS.contains(&port);
    source.is_resolver() && (asks || port == DNS) || source.kind == BALANCER && asks
}

/// Where the last question from an address came from. An entry may be evicted, and its memory another VPC's, while it is read; so it is
/// believed only if a second look finds the same.
#[inline(always)]
fn caller<T: Tables>(tables: &T, address: &VpcAddress) -> Option<Neighbour> {
    let first = tables.caller(address)?;
    tables.caller(address).filter(|second| *second == first)
}

/// Remembers where a question to the resolver behind `interface` came from: by that slot and not by the VPC, since who reaches a
/// resolver from an attached network is in another address space than the resolver is. Returns the code of why it is not remembered, or 0.
/// Not inlined: the kernel bounds a function's stack.
#[inline(never)]
fn remember<T: Tables, K: Key>(tables: &T, packet: &Packet<K>, interface: u16, now: u32) -> u32 {
    let key = &packet.key;
    if key.destination_port().get() != DNS {
        return 0;
    }
    let address = VpcAddress::new(interface, key.source().widen());
    if tables.caller(&address).is_none() && !may_be_new(tables, interface, now) {
        return DropReason::ResolverRate.code();
    }
    let caller = Neighbour { mac: packet.source_mac, interface: packet.interface };
    tables.set_caller(&address, &caller);
    0
}

/// Whether one more may ask at a resolver this second that had not before.
#[inline(always)]
fn may_be_new<T: Tables>(tables: &T, interface: u16, now: u32) -> bool {
    let mut rate = tables.caller_rate(interface).unwrap_or_default();
    if rate.second != now {
        rate = CallerRate { second: now, count: 0 };
    }
    rate.count = rate.count.saturating_add(1);
    tables.set_caller_rate(interface, rate);
    rate.count <= NEW_CALLERS
}

/// A packet for the resolver's own address, behind `interface`.
#[inline(always)]
pub(super) fn hear<F: Frame, T: Tables, K: Key>(
    frame: &mut F,
    tables: &T,
    packet: &Packet<K>,
    interface: u16,
    now: u32,
) -> Result<Verdict, DropReason> {
    match DropReason::from_code(remember(tables, packet, interface, now)) {
        Some(reason) => Err(reason),
        None => receive(frame, tables, interface),
    }
}

/// An answer to the stack behind `interface`, or a question to one of its other addresses, if network ACLs let it come so far.
#[inline(always)]
pub(super) fn deliver<F: Frame, T: Tables, K: Key>(
    frame: &mut F,
    tables: &T,
    packet: &Packet<K>,
    interface: u16,
    now: u32,
) -> Result<Verdict, DropReason> {
    if rules::crosses(tables, &Way::of(&packet.key)) == 0 {
        return Err(DropReason::NetworkAcl);
    }
    hear(frame, tables, packet, interface, now)
}

/// A packet for the stack behind `interface`.
#[inline(always)]
pub fn receive<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    interface: u16,
) -> Result<Verdict, DropReason> {
    frame.write(0, &Macs(STACK_MAC, ROUTER_MAC)).ok_or(DropReason::Malformed)?;
    leave(tables, interface)
}

#[inline(always)]
fn leave<T: Tables>(tables: &T, interface: u16) -> Result<Verdict, DropReason> {
    Verdict::steer(interface).leaving(tables.egress(interface))
}

/// The path is the stack's router, so it answers for every address.
#[inline(always)]
fn neighbour<F: Frame>(frame: &mut F) -> Result<Verdict, DropReason> {
    let arp = frame.read::<Arp>(NETWORK).ok_or(DropReason::Malformed)?;
    if arp.operation.get() != 1 || arp.sender == arp.target || arp.sender == [0; 4] {
        return Err(DropReason::ProtocolUnsupported);
    }
    arp_reply(frame, &arp, ROUTER_MAC).ok_or(DropReason::Malformed)?;
    Ok(Verdict::answer(Answer::ArpReply.code()))
}

/// The same for IPv6. What the kernel tells to groups (its multicast memberships) is of no interest to anyone.
#[inline(never)]
pub(super) fn message<F: Frame>(frame: &mut F) -> Verdict {
    let unsupported = Verdict::of(Err(DropReason::ProtocolUnsupported));
    let Some(ip) = frame.read::<Ipv6Header>(NETWORK) else { return unsupported };
    let Some(source) = frame.read::<Ip>(NETWORK + offset_of!(Ipv6Header, source)) else { return unsupported };
    let Some(kind) = frame.read::<u8>(TRANSPORT6) else { return unsupported };
    if ip.next_header == ICMPV6 && kind == SOLICITATION && source != Ip(UNSPECIFIED) {
        return advertise(frame, ROUTER_MAC);
    }
    if ip.destination[0] == 0xff { Verdict::PASS } else { unsupported }
}
