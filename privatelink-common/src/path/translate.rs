//! Applies one direction's rewrite to a frame of a wide flow. Where the flow has another family on its other side, the network header is
//! made anew by the rules of RFC 7915; checksums change by what addresses and ports change, since the two pseudo headers differ in
//! nothing else (and an IPv4 address adds nothing by being mapped). A datagram without a checksum gets one first, where it becomes IPv6.
//! The hop is counted, as [`super::hop`] has allowed.

use super::fragment::{self, BEHIND};
use super::parse::Packet;
use super::rewrite::port_change;
use crate::checksum::{Delta, address, finish, finish_udp, fold, sum, word};
use crate::frame::{Change, Frame};
use crate::tables::{Flow6, FlowKey6, Key};
use crate::verdict::DropReason;
use crate::wire::{
    ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ethernet, FRAGMENT6, FragmentHeader, Ip, Ipv4Header, Ipv6Header, Mac,
    NETWORK, TRANSPORT, TRANSPORT6, Tcp, UDP, Udp,
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

/// Whether a packet of a wide flow is a datagram without a checksum. It comes over IPv4 then, and must have one over IPv6.
#[inline(always)]
pub(super) fn is_unsummed(packet: &Packet<FlowKey6>) -> bool {
    packet.checksum == [0; 2] && !packet.is_tcp() && packet.key.is_ipv4()
}

/// Gives such a datagram, which is whole, the checksum that its sender has left out (RFC 7915, 4.5): from there on it is like any other.
/// Says whether one could be computed.
///
/// Not inlined, and into the room, of which the kernel's verifier knows nothing: it goes on as one way with those that had a checksum.
#[inline(never)]
pub(super) fn complete<F: Frame>(frame: &mut F, packet: &mut Packet<FlowKey6>) -> bool {
    let mut complete = || -> Option<()> {
        let ip = frame.read::<Ipv4Header>(NETWORK)?;
        let length = frame.read::<Udp>(TRANSPORT)?.length;
        let pseudo = address(ip.source) + address(ip.destination) + word([0, UDP]) + word(length.to_bytes());
        packet.checksum = finish_udp(pseudo + u32::from(frame.sum(TRANSPORT, length.get())?));
        frame.write_summed(TRANSPORT + offset_of!(Udp, checksum), &packet.checksum)
    };
    complete().is_some()
}

/// Rewrites `frame`, whose headers are those in `packet`, but for a change that `correction` makes of the transport checksum.
#[inline(always)]
pub(super) fn rewrite<F: Frame>(
    frame: &mut F,
    packet: &Packet<FlowKey6>,
    flow: &Flow6,
    correction: Delta,
) -> Result<(), DropReason> {
    let (from_ipv4, to_ipv4) = (packet.key.is_ipv4(), flow.source.is_ipv4());
    let header = fold(port_change(&packet.key, flow) + u32::from(correction));
    let change = Change { pseudo: flow.address_delta, header };
    let ports = Ports(flow.source_port, flow.destination_port);
    let written = match (from_ipv4, to_ipv4) {
        (false, false) => write(frame, packet.key.protocol, packet, flow)
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

/// The same of a fragment, whose identification is the one to leave with already (RFC 7915, 4.1 and 5.1.1). Only the first has a transport
/// header.
#[inline(always)]
pub(super) fn rewrite_piece<F: Frame>(
    frame: &mut F,
    packet: &Packet<FlowKey6>,
    flow: &Flow6,
) -> Result<(), DropReason> {
    let (from_ipv4, to_ipv4) = (packet.key.is_ipv4(), flow.source.is_ipv4());
    let headers = match (from_ipv4, to_ipv4) {
        (false, false) => piece(frame, packet, flow),
        (true, false) => piece_to_ipv6(frame, flow),
        (false, true) => piece_to_ipv4(frame, flow),
        (true, true) => false,
    };
    if !headers {
        return Err(DropReason::Malformed);
    }
    if packet.later {
        return Ok(());
    }
    let ports = Ports(flow.source_port, flow.destination_port);
    let change = Change { pseudo: flow.address_delta, header: fold(port_change(&packet.key, flow)) };
    let written = if to_ipv4 {
        transport::<F, TRANSPORT>(frame, packet, &ports, change)
    } else {
        transport::<F, BEHIND>(frame, packet, &ports, change)
    };
    written.ok_or(DropReason::Malformed)
}

/// IPv6 on both sides. Not inlined, nor are those below: the kernel bounds a function's stack.
#[inline(never)]
fn piece<F: Frame>(frame: &mut F, packet: &Packet<FlowKey6>, flow: &Flow6) -> bool {
    write(frame, FRAGMENT6, packet, flow).is_some()
}

#[inline(never)]
fn piece_to_ipv6<F: Frame>(frame: &mut F, flow: &Flow6) -> bool {
    let mut write = || -> Option<()> {
        let ip = frame.read::<Ipv4Header>(NETWORK)?;
        let fragment = FragmentHeader {
            next_header: ip.protocol,
            reserved: 0,
            fragment: U16::new(fragment::bits6(ip.fragment.get())),
            id: U32::new(ip.id.get().into()),
        };
        frame.change_family(true)?;
        frame.move_payload(MORE.into())?;
        let length = ip.total_length.get().wrapping_sub(20).checked_add(MORE)?;
        header6(frame, &ip, length, FRAGMENT6, flow)?;
        frame.write_summed(TRANSPORT6, &fragment)
    };
    write().is_some()
}

/// Bytes of a fragment header.
#[allow(clippy::cast_possible_truncation, reason = "eight")]
const MORE: u16 = size_of::<FragmentHeader>() as u16;

#[inline(never)]
fn piece_to_ipv4<F: Frame>(frame: &mut F, flow: &Flow6) -> bool {
    let mut write = || -> Option<()> {
        let fragment = frame.read::<FragmentHeader>(TRANSPORT6)?;
        let ip = frame.read::<Ipv6Header>(NETWORK)?;
        frame.change_family(false)?;
        frame.move_payload(-i32::from(MORE))?;
        let about = About {
            length: ip.payload_length.get().checked_add(20)?.checked_sub(MORE)?,
            protocol: fragment.next_header,
            id: fragment::lower(fragment.id),
            fragment: fragment::bits(fragment.fragment.get()),
        };
        header4(frame, &ip, &about, flow)
    };
    write().is_some()
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
fn write<F: Frame>(frame: &mut F, next: u8, packet: &Packet<FlowKey6>, flow: &Flow6) -> Option<()> {
    frame.write(0, &Macs(flow.destination_mac, flow.source_mac))?;
    let hop = Hop(next, packet.ttl.wrapping_sub(1));
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
    frame.change_family(true)?;
    header6(frame, &ip, ip.total_length.get().wrapping_sub(20), ip.protocol, flow)
}

/// Writes the headers in front of what was behind `ip`.
#[inline(always)]
fn header6<F: Frame>(
    frame: &mut F,
    ip: &Ipv4Header,
    length: u16,
    next_header: u8,
    flow: &Flow6,
) -> Option<()> {
    let header = Ipv6Header {
        version_class_label: U32::new(6 << 28 | u32::from(ip.tos) << 20),
        payload_length: U16::new(length),
        next_header,
        hop_limit: ip.ttl.wrapping_sub(1),
        source: flow.source.0,
        destination: flow.destination.0,
    };
    frame.write(0, &ethernet(flow, ETHERTYPE_IPV6))?;
    frame.write_summed(NETWORK, &header)
}

/// An IPv4 header for an IPv6 one (RFC 7915, 5.1). What may be fragmented is told apart by a word that is another one with every packet
/// of a flow: the lower half of a segment's sequence number, or a datagram's checksum.
#[inline(always)]
fn to_ipv4<F: Frame>(frame: &mut F, flow: &Flow6) -> Option<()> {
    let ip = frame.read::<Ipv6Header>(NETWORK)?;
    let id = frame.read::<U16>(TRANSPORT6 + offset_of!(Udp, checksum))?;
    let length = ip.payload_length.get().checked_add(20)?;
    let small = length <= MAY_BE_FRAGMENTED;
    let about = About {
        length,
        protocol: ip.next_header,
        id: if small { id } else { U16::ZERO },
        fragment: if small { 0 } else { DONT_FRAGMENT },
    };
    frame.change_family(false)?;
    header4(frame, &ip, &about, flow)
}

/// What an IPv4 header says that is not in the IPv6 header.
#[derive(Clone, Copy)]
struct About {
    length: u16,
    protocol: u8,
    id: U16,
    fragment: u16,
}

/// Writes the headers in front of what was behind `ip`.
#[inline(always)]
fn header4<F: Frame>(frame: &mut F, ip: &Ipv6Header, about: &About, flow: &Flow6) -> Option<()> {
    #[allow(clippy::cast_possible_truncation, reason = "the traffic class is eight bits")]
    let mut header = Ipv4Header {
        version_ihl: 0x45,
        tos: (ip.version_class_label.get() >> 20) as u8,
        total_length: U16::new(about.length),
        id: about.id,
        fragment: U16::new(about.fragment),
        ttl: ip.hop_limit.wrapping_sub(1),
        protocol: about.protocol,
        checksum: [0; 2],
        source: flow.source.ipv4(),
        destination: flow.destination.ipv4(),
    };
    header.checksum = finish(sum(header.as_bytes().first_chunk::<20>()?));
    frame.write(0, &ethernet(flow, ETHERTYPE_IPV4))?;
    frame.write_summed(NETWORK, &header)
}
