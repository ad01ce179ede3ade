//! Who may open a flow, and to what: the door that a first packet stands before.
//!
//! What is refused is a [`Step`], one word that is defined as a whole, whatever it says: the kernel's verifier does not let the
//! compiler move a part of a result that nothing has set.

use super::cookie::{self, Happened};
use super::first::{Standing, Step};
use super::parse::Packet;
use crate::limits::STACK_PORTS;
use crate::tables::{
    Address, BALANCER, Bucket, Endpoint, Key, Listener, ListenerKey, Tables, VpcAddress, Width,
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
    pub generation: u32,
}

/// Judges a packet that belongs to no flow of the tables at hand. What it may
/// come in by goes into `door`.
///
/// Not inlined: the kernel bounds a function's stack.
#[inline(never)]
pub(super) fn admit<K: Key, T: Tables>(
    tables: &T,
    packet: &Packet<K>,
    now: u32,
    standing: Standing,
    door: &mut Door,
) -> Step {
    if packet.later {
        return Step::drop(DropReason::FragmentUnknown);
    }
    match judge(tables, packet, now, standing) {
        Ok(admitted) => {
            *door = admitted;
            Step::ADMITTED
        }
        Err(step) => step,
    }
}

#[inline(always)]
fn judge<K: Key, T: Tables>(
    tables: &T,
    packet: &Packet<K>,
    now: u32,
    Standing { asked, confirmed }: Standing,
) -> Result<Door, Step> {
    let key = &packet.key;
    let Some(address) = tables.address(&VpcAddress::new(key.vpc(), key.destination().widen())) else {
        return Err(Step::PASS);
    };
    if address.dualstack != 0 && !asked {
        return Err(Step::OTHER);
    }
    let source = VpcAddress::new(key.vpc(), key.source().widen());
    if tables.address(&source).is_some() {
        return Err(Step::drop(DropReason::SpoofedSource));
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
    if packet.is_tcp() && !is_syn(packet) && !confirmed {
        return Err(late(tables, packet, &listener, address.endpoint, &endpoint, now));
    }
    if endpoint.full != 0 {
        return Err(over(DropReason::EndpointFull, confirmed));
    }
    if is_syn(packet) && cookie::concerns(tables, address.endpoint, &endpoint, now, Happened::Syn) {
        return Err(Step::cookie(cookie::of(address.endpoint, &listener, K::WIDE)));
    }
    if endpoint.rate != 0 && !take_token(tables, address.endpoint, &endpoint, now) {
        return Err(over(DropReason::EndpointRate, confirmed));
    }
    Ok(Door { address, listener, generation: endpoint.generation })
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

/// Whether a packet to a load balancer's address is for a socket of the VPC's own stack.
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
    Step::reset_segment(packet, Answer::ResetNoFlow)
}
