//! Turns a TCP segment into the RST that answers it (RFC 9293, 3.10.7.1), in place.

use super::parse::{Packet, addresses, is_for_many};
use crate::checksum::{address, finish, sum, word};
use crate::frame::Frame;
use crate::tables::FlowKey;
use crate::verdict::{DropReason, Verdict};
use crate::wire::{
    ACK, Ethernet, FIN, HOPS, Ip, Ipv4Header, Ipv6Header, NETWORK, RST, SYN, TCP, TRANSPORT, TRANSPORT6, Tcp,
};
use core::mem::offset_of;
use zerocopy::{
    Immutable, IntoBytes,
    big_endian::{U16, U32},
};

/// The length of a RST.
const LENGTH: u16 = 20;
/// Answers the segment with a RST, to be counted as `answer`, a [`crate::verdict::Answer::code`].
#[inline(always)]
pub(super) fn reset<F: Frame>(
    frame: &mut F,
    packet: &Packet<FlowKey>,
    answer: u32,
) -> Result<Verdict, DropReason> {
    if is_for_many(frame) {
        return Err(DropReason::LinkLayerGroup);
    }
    write(frame, packet).ok_or(DropReason::Malformed)?;
    Ok(Verdict::answer(answer))
}

/// The same over IPv6. Not inlined, since the kernel bounds the stack of a function.
#[inline(never)]
pub(super) fn reset6<F: Frame>(frame: &mut F, answer: u32) -> Verdict {
    if is_for_many(frame) {
        return Verdict::of(Err(DropReason::LinkLayerGroup));
    }
    let result = write6(frame).ok_or(DropReason::Malformed);
    Verdict::of(result.map(|()| Verdict::answer(answer)))
}

#[inline(always)]
fn write<F: Frame>(frame: &mut F, packet: &Packet<FlowKey>) -> Option<()> {
    let ethernet = frame.read::<Ethernet>(0)?;
    let ip = frame.read::<Ipv4Header>(NETWORK)?;
    let tcp = frame.read::<Tcp>(TRANSPORT)?;
    frame.truncate(TRANSPORT + usize::from(LENGTH))?;
    frame.write(0, &Ethernet { destination: ethernet.source, source: ethernet.destination, ..ethernet })?;
    frame.write(NETWORK, &ip_header(packet))?;
    let segment = segment(ip.total_length.get().wrapping_sub(20), &tcp);
    frame.write(TRANSPORT, &segment)?;
    let addresses = address(packet.key.source) + address(packet.key.destination);
    frame.set_checksum(TRANSPORT + offset_of!(Tcp, checksum), pseudo(addresses), words::<20>(&segment))
}

/// The sum of a RST's pseudo header, whose addresses sum to `addresses`.
#[inline(always)]
fn pseudo(addresses: u32) -> u32 {
    addresses + word([0, TCP]) + word(LENGTH.to_be_bytes())
}

/// The part of an IPv6 header before its addresses.
#[derive(Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct Ipv6Start(U32, U16, u8, u8);

const SOURCE: usize = NETWORK + offset_of!(Ipv6Header, source);
const DESTINATION: usize = NETWORK + offset_of!(Ipv6Header, destination);

#[inline(always)]
fn write6<F: Frame>(frame: &mut F) -> Option<()> {
    let addresses = addresses::<F, NETWORK>(frame);
    let length = frame.read::<U16>(NETWORK + offset_of!(Ipv6Header, payload_length))?;
    let tcp = frame.read::<Tcp>(TRANSPORT6)?;
    let segment = segment(length.get(), &tcp);
    frame.truncate(TRANSPORT6 + usize::from(LENGTH))?;
    frame.write(TRANSPORT6, &segment)?;
    frame.set_checksum(TRANSPORT6 + offset_of!(Tcp, checksum), pseudo(addresses), words::<20>(&segment))?;
    turn(frame).then_some(())
}

/// Turns the headers before the segment round. Says whether it could.
#[inline(never)]
fn turn<F: Frame>(frame: &mut F) -> bool {
    let mut turn = || -> Option<()> {
        let (source, destination) = (frame.read::<Ip>(SOURCE)?, frame.read::<Ip>(DESTINATION)?);
        frame.write(SOURCE, &destination)?;
        frame.write(DESTINATION, &source)?;
        frame.write(NETWORK, &Ipv6Start(U32::new(6 << 28), U16::new(LENGTH), TCP, HOPS))?;
        let ethernet = frame.read::<Ethernet>(0)?;
        frame.write(0, &Ethernet { destination: ethernet.source, source: ethernet.destination, ..ethernet })
    };
    turn().is_some()
}

#[inline(always)]
fn ip_header(packet: &Packet<FlowKey>) -> Ipv4Header {
    let mut header = Ipv4Header {
        version_ihl: 0x45,
        tos: 0,
        total_length: U16::new(20 + LENGTH),
        id: U16::ZERO,
        fragment: U16::new(0x4000),
        ttl: HOPS,
        protocol: TCP,
        checksum: [0; 2],
        source: packet.key.destination,
        destination: packet.key.source,
    };
    header.checksum = finish(words::<20>(&header));
    header
}

/// Sequence and acknowledgement as the RFC has them: a segment with ACK is answered from its acknowledgement, one without is
/// acknowledged as a whole, SYN and FIN included. `length` is that of the segment that is answered. The checksum is still to be put
/// there.
#[inline(always)]
fn segment(length: u16, tcp: &Tcp) -> Tcp {
    let header = u32::from(tcp.data_offset >> 4) * 4;
    let data = u32::from(length).wrapping_sub(header);
    let controls = u32::from(tcp.flags & SYN != 0) + u32::from(tcp.flags & FIN != 0);
    let (sequence, acknowledgement, flags) = if tcp.flags & ACK != 0 {
        (tcp.acknowledgement, U32::ZERO, RST)
    } else {
        let end = tcp.sequence.get().wrapping_add(data).wrapping_add(controls);
        (U32::ZERO, U32::new(end), RST | ACK)
    };
    Tcp {
        source_port: tcp.destination_port,
        destination_port: tcp.source_port,
        sequence,
        acknowledgement,
        data_offset: 5 << 4,
        flags,
        window: U16::ZERO,
        checksum: [0; 2],
        urgent: U16::ZERO,
    }
}

#[inline(always)]
fn words<const N: usize>(header: &(impl IntoBytes + zerocopy::Immutable)) -> u32 {
    match header.as_bytes().first_chunk::<N>() {
        Some(bytes) => sum(bytes),
        None => 0,
    }
}
