//! Who may open a flow, and to what: the door that a first packet stands before.

use super::parse::Packet;
use crate::limits::STACK_PORTS;
use crate::tables::{Address, BALANCER, Bucket, Endpoint, Listener, ListenerKey, Tables, VpcAddress};
use crate::verdict::{Answer, DropReason};
use crate::wire::{ACK, FIN, RST, SYN};

/// What a first packet is to become.
#[derive(Clone, Copy, Debug)]
pub(super) enum Admission {
    /// A flow through this door.
    Open(Door),
    /// Not addressed to us.
    NotOurs,
    /// A packet for the VPC's own stack, behind this interface.
    Stack(u16),
    /// A RST.
    Reset(Answer),
}

/// An endpoint's listener, open for the packet at hand.
#[derive(Clone, Copy, Debug)]
pub(super) struct Door {
    /// The endpoint's address.
    pub address: Address,
    /// The listener behind it.
    pub listener: Listener,
    /// The endpoint's generation.
    pub generation: u32,
}

/// Judges a packet that belongs to no flow.
#[inline(always)]
pub(super) fn admit<T: Tables>(tables: &T, packet: &Packet, now: u32) -> Result<Admission, DropReason> {
    let key = &packet.key;
    let Some(address) = tables.address(&VpcAddress::new(key.vpc, key.destination)) else {
        return Ok(Admission::NotOurs);
    };
    let source = VpcAddress::new(key.vpc, key.source);
    if tables.address(&source).is_some() {
        return Err(DropReason::SpoofedSource);
    }
    if address.kind == BALANCER {
        return from_provider(packet, &address);
    }
    if !tables.in_vpc(&source) {
        return Err(DropReason::SourceOutsideVpc);
    }
    let endpoint = tables.endpoint(address.endpoint);
    if endpoint.open == 0 {
        return Err(DropReason::EndpointClosed);
    }
    let wanted = ListenerKey {
        balancer: address.balancer,
        port: key.destination_port,
        protocol: key.protocol,
        reserved: 0,
    };
    let listener = tables.listener(&wanted).ok_or(DropReason::NoListener)?;
    if packet.is_tcp && packet.flags & (SYN | ACK | FIN | RST) != SYN {
        return stray(packet);
    }
    if endpoint.full != 0 {
        return Err(DropReason::EndpointFull);
    }
    if endpoint.rate != 0 && !take_token(tables, address.endpoint, &endpoint, now) {
        return Err(DropReason::EndpointRate);
    }
    Ok(Admission::Open(Door { address, listener, generation: endpoint.generation }))
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
        bucket = Bucket { filled: now, tokens };
    }
    let left = bucket.tokens.checked_sub(1);
    tables.set_bucket(id, Bucket { tokens: left.unwrap_or(0), ..bucket });
    left.is_some()
}

/// A packet to a load balancer's address that belongs to no flow: an answer to the VPC's own stack, a late segment of a flow that
/// has ended, or somebody on the provider's side who has no business here.
#[inline(always)]
fn from_provider(packet: &Packet, address: &Address) -> Result<Admission, DropReason> {
    if address.stack != 0 && STACK_PORTS.contains(&packet.key.destination_port.get()) {
        return Ok(Admission::Stack(address.stack));
    }
    if !packet.is_tcp {
        return Err(DropReason::NoFlow);
    }
    if packet.flags & (SYN | ACK | RST) == SYN {
        return Err(DropReason::ProviderInitiated);
    }
    stray(packet)
}

/// A TCP segment that neither opens a flow nor belongs to one. A RST is never answered (RFC 9293, 3.10.7.1).
#[inline(always)]
fn stray(packet: &Packet) -> Result<Admission, DropReason> {
    if packet.flags & RST != 0 { Err(DropReason::NoFlow) } else { Ok(Admission::Reset(Answer::ResetNoFlow)) }
}
