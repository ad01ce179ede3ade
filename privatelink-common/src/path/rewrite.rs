//! Applies one direction's rewrite to the frame: addresses, ports, the TTL, and both checksums by what they change (RFC 1624).

use super::hop::Correction;
use super::parse::Packet;
use crate::checksum::{delta, fold, update, word};
use crate::frame::{Change, Frame};
use crate::tables::{Course, Flow, FlowKey, Key};
use crate::verdict::DropReason;
use crate::wire::{Ipv4, Ipv4Header, Mac, NETWORK, TRANSPORT, Tcp, Udp};
use core::mem::offset_of;
use zerocopy::{Immutable, IntoBytes, big_endian::U16};

/// Destination and source of an Ethernet header.
#[derive(Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct Macs(pub Mac, pub Mac);

/// The TTL, protocol, checksum, source and destination of an IPv4 header.
#[derive(Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct IpTail(pub u8, pub u8, pub [u8; 2], pub Ipv4, pub Ipv4);

/// What a TTL that is one less changes of a checksum, whatever it is.
pub(super) const ONE_HOP: u32 = delta(word([1, 0]), word([0, 0])) as u32;

/// Source and destination port.
#[derive(Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct Ports(pub U16, pub U16);

/// What new ports change of a checksum: a sum of words that is not folded yet.
#[inline(always)]
pub(super) fn port_change<K: Key>(key: &K, flow: &Course) -> u32 {
    let gone = |port: U16| u32::from(!u16::from_ne_bytes(port.to_bytes()));
    let come = |port: U16| word(port.to_bytes());
    gone(key.source_port())
        + gone(key.destination_port())
        + come(flow.source_port)
        + come(flow.destination_port)
}

/// Rewrites `frame`, whose headers are those in `packet`, but for what `correction` says of them. Of a fragment, only the first has ports
/// and a checksum.
#[inline(always)]
pub(super) fn rewrite<F: Frame>(
    frame: &mut F,
    packet: &Packet<FlowKey>,
    flow: &Flow,
    correction: Correction,
) -> Result<(), DropReason> {
    write(frame, packet, flow, correction).ok_or(DropReason::Malformed)
}

#[inline(always)]
fn write<F: Frame>(
    frame: &mut F,
    packet: &Packet<FlowKey>,
    flow: &Flow,
    correction: Correction,
) -> Option<()> {
    frame.write(0, &Macs(flow.destination_mac, flow.source_mac))?;
    let hop = u32::from(flow.address_delta) + ONE_HOP + u32::from(correction.network);
    let ip_checksum = update(packet.ip_checksum, hop);
    let tail =
        IpTail(packet.ttl.wrapping_sub(1), packet.key.protocol, ip_checksum, flow.source, flow.destination);
    frame.write(NETWORK + offset_of!(Ipv4Header, ttl), &tail)?;
    if packet.later {
        return Some(());
    }
    frame.write(TRANSPORT, &Ports(flow.source_port, flow.destination_port))?;
    let at = if packet.is_tcp() { offset_of!(Tcp, checksum) } else { offset_of!(Udp, checksum) };
    let change = Change {
        pseudo: flow.address_delta,
        header: fold(port_change(&packet.key, flow) + u32::from(correction.transport)),
    };
    frame.change_checksum(TRANSPORT + at, packet.checksum, packet.is_tcp(), change)
}
