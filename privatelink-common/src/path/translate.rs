//! Applies one direction's rewrite to a frame of a wide flow. Where the flow has another family on its other side, the network header is
//! made anew by the rules of RFC 7915; checksums change by what addresses and ports change, since the two pseudo headers differ in
//! nothing else (and an IPv4 address adds nothing by being mapped). The hop is counted, as [`super::hop`] has allowed.

use super::parse::Packet;
use crate::checksum::{Delta, finish, fold, sum};
use crate::frame::{Change, Frame};
use crate::tables::{Flow6, FlowKey6, Key};
use crate::verdict::DropReason;
use crate::wire::{
    ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ethernet, Ip, Ipv4Header, Ipv6Header, Mac, NETWORK, TRANSPORT,
    TRANSPORT6, Tcp, Udp,
};
use core::mem::offset_of;
use zerocopy::{Immutable, IntoBytes, big_endian::U16, big_endian::U32};

/// The largest IPv4 packet that others may fragment further on; larger ones say that they may not (RFC 7915, 5.1).
const MAY_BE_FRAGMENTED: u16 = 1260;
const DONT_FRAGMENT: u16 = 0x4000;

/// Destination and source of an Ethernet header.
#[derive(Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct Macs(Mac, Mac);

/// Next header and hop limit of an IPv6 header.
#[derive(Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct Hop(u8, u8);

/// Source and destination of an IPv6 header.
#[derive(Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct Addresses(Ip, Ip);

/// Source and destination port.
#[derive(Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct Ports(U16, U16);

/// Rewrites `frame`, whose headers are those in `packet`, but for a change that `correction` makes of the transport checksum.
#[inline(always)]
pub(super) fn rewrite<F: Frame>(
    frame: &mut F,
    packet: &Packet<FlowKey6>,
    flow: &Flow6,
    correction: Delta,
) -> Result<(), DropReason> {
    let (from_ipv4, to_ipv4) = (packet.key.is_ipv4(), flow.source.is_ipv4());
    if from_ipv4 && !packet.is_tcp() && packet.checksum == [0; 2] {
        return Err(DropReason::UdpChecksumMissing);
    }
    let header = fold(u32::from(flow.port_delta) + u32::from(correction));
    let change = Change { pseudo: flow.address_delta, header };
    let ports = Ports(flow.source_port, flow.destination_port);
    let written = match (from_ipv4, to_ipv4) {
        (false, false) => write(frame, packet, flow)
            .and_then(|()| transport::<F, TRANSPORT6>(frame, packet, &ports, change)),
        (true, false) => {
            to_ipv6(frame, flow).and_then(|()| transport::<F, TRANSPORT6>(frame, packet, &ports, change))
        }
        (false, true) => {
            self::to_ipv4(frame, flow).and_then(|()| transport::<F, TRANSPORT>(frame, packet, &ports, change))
        }
        (true, true) => None,
    };
    written.ok_or(DropReason::Malformed)
}

/// Ports and checksum, of a transport header at `AT`: a constant, since the kernel's verifier follows no other offsets.
#[inline(always)]
fn transport<F: Frame, const AT: usize>(
    frame: &mut F,
    packet: &Packet<FlowKey6>,
    ports: &Ports,
    change: Change,
) -> Option<()> {
    frame.write(AT, ports)?;
    let at = if packet.is_tcp() { AT + offset_of!(Tcp, checksum) } else { AT + offset_of!(Udp, checksum) };
    frame.change_checksum(at, packet.checksum, packet.is_tcp(), change)
}

/// IPv6 on both sides.
#[inline(always)]
fn write<F: Frame>(frame: &mut F, packet: &Packet<FlowKey6>, flow: &Flow6) -> Option<()> {
    frame.write(0, &Macs(flow.destination_mac, flow.source_mac))?;
    let hop = Hop(packet.key.protocol, packet.ttl.wrapping_sub(1));
    frame.write_summed(NETWORK + offset_of!(Ipv6Header, next_header), &hop)?;
    frame.write_summed(NETWORK + offset_of!(Ipv6Header, source), &Addresses(flow.source, flow.destination))
}

#[inline(always)]
fn ethernet(flow: &Flow6, ethertype: u16) -> Ethernet {
    Ethernet { destination: flow.destination_mac, source: flow.source_mac, ethertype: U16::new(ethertype) }
}

/// An IPv6 header for an IPv4 one (RFC 7915, 4.1).
#[inline(always)]
fn to_ipv6<F: Frame>(frame: &mut F, flow: &Flow6) -> Option<()> {
    let ip = frame.read::<Ipv4Header>(NETWORK)?;
    let header = Ipv6Header {
        version_class_label: U32::new(6 << 28 | u32::from(ip.tos) << 20),
        payload_length: U16::new(ip.total_length.get().wrapping_sub(20)),
        next_header: ip.protocol,
        hop_limit: ip.ttl.wrapping_sub(1),
        source: flow.source.0,
        destination: flow.destination.0,
    };
    frame.change_family(true)?;
    frame.write(0, &ethernet(flow, ETHERTYPE_IPV6))?;
    frame.write_summed(NETWORK, &header)
}

/// An IPv4 header for an IPv6 one (RFC 7915, 5.1). What may be fragmented is told apart by a word that is another one with every packet
/// of a flow: the lower half of a segment's sequence number, or a datagram's checksum.
#[inline(always)]
fn to_ipv4<F: Frame>(frame: &mut F, flow: &Flow6) -> Option<()> {
    let ip = frame.read::<Ipv6Header>(NETWORK)?;
    let id = frame.read::<U16>(TRANSPORT6 + offset_of!(Udp, checksum))?;
    let total = ip.payload_length.get().checked_add(20)?;
    let small = total <= MAY_BE_FRAGMENTED;
    #[allow(clippy::cast_possible_truncation, reason = "the traffic class is eight bits")]
    let mut header = Ipv4Header {
        version_ihl: 0x45,
        tos: (ip.version_class_label.get() >> 20) as u8,
        total_length: U16::new(total),
        id: if small { id } else { U16::ZERO },
        fragment: U16::new(if small { 0 } else { DONT_FRAGMENT }),
        ttl: ip.hop_limit.wrapping_sub(1),
        protocol: ip.next_header,
        checksum: [0; 2],
        source: flow.source.ipv4(),
        destination: flow.destination.ipv4(),
    };
    header.checksum = finish(sum(header.as_bytes().first_chunk::<20>()?));
    frame.change_family(false)?;
    frame.write(0, &ethernet(flow, ETHERTYPE_IPV4))?;
    frame.write_summed(NETWORK, &header)
}
