//! Who may open a flow, and to what: the door that a first packet stands before.
//!
//! What is refused is a [`Step`], one word that is defined as a whole, whatever it says: the kernel's verifier does not let the
//! compiler move a part of a result that nothing has set.

use super::cookie::{self, Happened};
use super::first::{Standing, Step};
use super::parse::Packet;
use super::rules::{self, Way};
use crate::limits::{DNS, STACK_PORTS};
use crate::tables::{
    Address, BALANCER, Bucket, Endpoint, Key, Listener, ListenerKey, RESOLVER, Tables, VpcAddress, Width,
};
use crate::verdict::{Answer, DropReason};
use crate::wire::{ACK, FIN, RST, SYN};

/// An endpoint's listener, open for the packet at hand.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Door {
    /// The endpoint's address.
    pub address: Address,
    /// The listener behind it.
    pub listener: Listener,
    /// The endpoint's generation.
    pub generation: u16,
}

/// Judges a packet that belongs to no flow of the tables at hand. What it may come in by goes into `door`.
#[inline(always)]
pub(super) fn admit<K: Key, T: Tables>(
    tables: &T,
    packet: &Packet<K>,
    now: u32,
    standing: Standing,
    door: &mut Door,
) -> Step {
    match approach(tables, packet, standing, door) {
        Step::ADMITTED => {}
        step => return step,
    }
    match is_allowed(tables, packet, door) {
        Step::ADMITTED => enter(tables, packet, now, standing, door),
        step => step,
    }
}

// Three functions that are not inlined: the kernel bounds the stack of each.

/// Finds the door that a packet stands before.
#[inline(never)]
fn approach<K: Key, T: Tables>(tables: &T, packet: &Packet<K>, standing: Standing, door: &mut Door) -> Step {
    if packet.later {
        return Step::drop(DropReason::FragmentUnknown);
    }
    match find(tables, packet, standing) {
        Ok(found) => {
            *door = found;
            Step::ADMITTED
        }
        Err(step) => step,
    }
}

#[inline(always)]
fn find<K: Key, T: Tables>(tables: &T, packet: &Packet<K>, standing: Standing) -> Result<Door, Step> {
    let key = &packet.key;
    let Some(address) = tables.address(&VpcAddress::new(key.vpc(), key.destination().widen())) else {
        return Err(Step::PASS);
    };
    if address.dualstack != 0 && !standing.asked {
        return Err(Step::OTHER);
    }
    let source = VpcAddress::new(key.vpc(), key.source().widen());
    if tables.address(&source).is_some() {
        return Err(Step::drop(DropReason::SpoofedSource));
    }
    if address.is_resolver() {
        return Err(to_resolver(tables, packet, &address, &source));
    }
    if address.kind == BALANCER && (address.endpoint == 0 || !is_first(packet, &address)) {
        return Err(from_provider(packet, &address));
    }
    if !tables.in_vpc(&source) {
        return Err(Step::drop(DropReason::SourceOutsideVpc));
    }
    let endpoint = tables.endpoint(address.endpoint);
    if endpoint.open == 0 {
        return Err(closed(packet));
    }
    if packet.ttl <= 1 {
        return Err(Step::expired(address.endpoint));
    }
    let wanted = ListenerKey {
        balancer: address.balancer,
        port: key.destination_port(),
        protocol: key.protocol(),
        reserved: 0,
    };
    let Some(listener) = tables.listener(&wanted) else {
        let late = address.kind == BALANCER && !is_syn(packet);
        return Err(if late { from_provider(packet, &address) } else { Step::drop(DropReason::NoListener) });
    };
    if K::WIDE && key.is_ipv4() && listener.ipv6 == 0 {
        return Err(Step::OTHER);
    }
    Ok(Door { address, listener, generation: endpoint.generation })
}

/// Whether security groups and network ACLs let the packet in. A load balancer's groups are about the consumer's own address, and about
/// clients of its own VPC by what stands for their endpoint.
#[inline(never)]
fn is_allowed<K: Key, T: Tables>(tables: &T, packet: &Packet<K>, door: &Door) -> Step {
    let (own, endpoint) = (door.address.kind == BALANCER, tables.endpoint(door.address.endpoint));
    let way = Way::of(&packet.key);
    if rules::permits(tables, endpoint.rules, &way.source, way.protocol, way.port) == 0 {
        let of_endpoint = DropReason::SecurityGroup;
        return Step::drop(if own { DropReason::LoadBalancerSecurityGroup } else { of_endpoint });
    }
    if !own && rules::permits(tables, door.listener.rules, &way.source, way.protocol, way.port) == 0 {
        return Step::drop(DropReason::LoadBalancerSecurityGroup);
    }
    if endpoint.acls != 0 && rules::crosses(tables, &way) == 0 {
        return Step::drop(DropReason::NetworkAcl);
    }
    Step::ADMITTED
}

/// Whether the endpoint may open another flow now, and whether this packet is one that opens one.
#[inline(never)]
fn enter<K: Key, T: Tables>(
    tables: &T,
    packet: &Packet<K>,
    now: u32,
    Standing { confirmed, .. }: Standing,
    door: &Door,
) -> Step {
    let (id, listener) = (door.address.endpoint, &door.listener);
    let endpoint = tables.endpoint(id);
    if packet.is_tcp() && !is_syn(packet) && !confirmed {
        return late(tables, packet, listener, id, &endpoint, now);
    }
    if endpoint.full != 0 {
        return over(DropReason::EndpointFull, confirmed);
    }
    if is_syn(packet) && cookie::concerns(tables, id, &endpoint, now, Happened::Syn) {
        return Step::cookie(cookie::of(id, listener, K::WIDE));
    }
    if endpoint.rate != 0 && !take_token(tables, id, &endpoint, now) {
        return over(DropReason::EndpointRate, confirmed);
    }
    Step::ADMITTED
}

/// A packet to an address of the VPC's resolver: a question from within the VPC, or the answer of another name server, which may be
/// anywhere; the stack's sockets know whom they have asked. Neither security groups nor network ACLs apply to its own addresses, as on AWS
/// (VPC user guide, "Control subnet traffic with network ACLs"); to inbound and outbound ones network ACLs do, and to what comes to an
/// inbound one its security groups.
#[inline(always)]
fn to_resolver<K: Key, T: Tables>(
    tables: &T,
    packet: &Packet<K>,
    address: &Address,
    source: &VpcAddress,
) -> Step {
    let is_question = packet.key.destination_port().get() == DNS;
    if is_question && !tables.in_vpc(source) {
        return Step::drop(DropReason::SourceOutsideVpc);
    }
    let (protocol, port) = (packet.key.protocol(), packet.key.destination_port());
    if is_question && rules::permits(tables, address.rules, &source.address, protocol, port) == 0 {
        return Step::drop(DropReason::SecurityGroup);
    }
    if !is_question && !is_for_stack(packet, address) {
        return Step::drop(DropReason::NoListener);
    }
    if address.kind == RESOLVER { Step::resolver(address.stack) } else { Step::stack(address.stack) }
}

/// What comes to an endpoint that is closed: somebody who wants a connection hears nothing, as on AWS; somebody who believes in one that
/// was open is told.
#[inline(always)]
fn closed<K: Key>(packet: &Packet<K>) -> Step {
    if packet.is_tcp() && packet.flags & SYN == 0 {
        return Step::reset_segment(packet, Answer::ResetTerminated);
    }
    Step::drop(DropReason::EndpointClosed)
}

/// What becomes of a segment of no flow that is not a SYN: an ACK may bear a SYN cookie.
#[inline(always)]
fn late<K: Key, T: Tables>(
    tables: &T,
    packet: &Packet<K>,
    listener: &Listener,
    id: u32,
    endpoint: &Endpoint,
    now: u32,
) -> Step {
    if is_ack(packet) && cookie::concerns(tables, id, endpoint, now, Happened::Ack) {
        return Step::confirm(cookie::of(id, listener, K::WIDE));
    }
    Step::reset_segment(packet, Answer::ResetNoFlow)
}

/// What a flow beyond a quota gets. A consumer whose SYN was answered does not send it again, and so is told.
#[inline(always)]
fn over(reason: DropReason, confirmed: bool) -> Step {
    if confirmed { Step::reset(Answer::ResetQuota) } else { Step::drop(reason) }
}

#[inline(always)]
fn is_syn<K: Key>(packet: &Packet<K>) -> bool {
    packet.is_tcp() && packet.flags & (SYN | ACK | FIN | RST) == SYN
}

#[inline(always)]
fn is_ack<K: Key>(packet: &Packet<K>) -> bool {
    packet.is_tcp() && packet.flags & (SYN | ACK | FIN | RST) == ACK
}

/// Takes a token for one new flow. The bucket is filled once a second, since that is the path's clock.
#[inline(always)]
fn take_token<T: Tables>(tables: &T, id: u32, endpoint: &Endpoint, now: u32) -> bool {
    let Some(mut bucket) = tables.bucket(id) else { return false };
    if bucket.filled != now {
        let saved =
            u64::from(endpoint.rate) * u64::from(now.wrapping_sub(bucket.filled)) + u64::from(bucket.tokens);
        #[allow(clippy::cast_possible_truncation, reason = "not above the burst")]
        let tokens = saved.min(endpoint.burst.into()) as u32;
        bucket = Bucket { filled: now, tokens, ..bucket };
    }
    let left = bucket.tokens.checked_sub(1);
    tables.set_bucket(id, Bucket { tokens: left.unwrap_or(0), ..bucket });
    left.is_some()
}

/// Whether a packet to a load balancer that serves its own VPC may open a flow: it is neither for the VPC's stack nor a segment of a
/// connection, but for an ACK, which may bear a SYN cookie.
#[inline(always)]
fn is_first<K: Key>(packet: &Packet<K>, address: &Address) -> bool {
    !is_for_stack(packet, address) && (!packet.is_tcp() || is_syn(packet) || is_ack(packet))
}

/// Whether a packet to a load balancer's or a resolver's address is for a socket of the VPC's own stack that has asked for it.
#[inline(always)]
fn is_for_stack<K: Key>(packet: &Packet<K>, address: &Address) -> bool {
    address.stack != 0 && STACK_PORTS.contains(&packet.key.destination_port().get())
}

/// A packet to a load balancer's address that belongs to no flow: an answer to the VPC's own stack, a late segment of a flow that
/// has ended, or somebody on the provider's side who has no business here.
#[inline(always)]
fn from_provider<K: Key>(packet: &Packet<K>, address: &Address) -> Step {
    if is_for_stack(packet, address) {
        return Step::stack(address.stack);
    }
    if !packet.is_tcp() {
        return Step::drop(DropReason::NoFlow);
    }
    if packet.flags & (SYN | ACK | RST) == SYN {
        return Step::drop(DropReason::ProviderInitiated);
    }
    if !packet.key.source().widen().is_host() {
        return Step::drop(DropReason::NoFlow);
    }
    Step::reset_segment(packet, Answer::ResetNoFlow)
}
