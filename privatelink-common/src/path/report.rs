//! Turns a packet into the ICMP error about it (RFC 792; RFC 4443, section 3), in place, from the address that it was sent to.

use super::parse::{Packet, addresses, is_for_many};
use crate::checksum::{address, finish, sum, word};
use crate::frame::Frame;
use crate::tables::FlowKey;
use crate::verdict::{Answer, DropReason, Verdict};
use crate::wire::{
    DESTINATION_UNREACHABLE, Ethernet, FRAGMENT6, FRAGMENTATION_NEEDED, FragmentHeader, HOPS, ICMP, ICMPV6,
    IcmpError, Ip, Ipv4Header, Ipv6Header, NETWORK, PACKET_TOO_BIG, TCP, TIME_EXCEEDED, TIME_EXCEEDED6,
    TRANSPORT, TRANSPORT6, Tcp, Udp,
};
use core::mem::{offset_of, size_of};
use zerocopy::{
    Immutable, IntoBytes,
    big_endian::{U16, U32},
};

/// Bytes of what an error holds of the packet that it is about: its header, and all of the transport header without options. Eight bytes of
/// that would do (RFC 792), but a frame cannot be cut off before a checksum that is still to be completed.
const fn quoted<Header>(is_tcp: bool) -> usize {
    size_of::<Header>() + if is_tcp { size_of::<Tcp>() } else { size_of::<Udp>() }
}

/// Bytes that come in front of the packet: another header, and ICMP's.
const FRONT: usize = size_of::<Ipv4Header>() + size_of::<IcmpError>();
/// Internetwork control, which RFC 1812 asks for in errors (4.3.2.5).
const TOS: u8 = 0xc0;

/// What is reported.
#[derive(Clone, Copy, Debug)]
pub(super) struct Report {
    kind: u8,
    code: u8,
    mtu: u16,
    answer: u32,
}

impl Report {
    /// The TTL has ended (in transit).
    pub(super) const TIME_EXCEEDED: Self =
        Self { kind: TIME_EXCEEDED, code: 0, mtu: 0, answer: Answer::TimeExceeded.code() };

    /// What [`super::hop::Passage::Report`] says of an IPv4 packet.
    #[inline(always)]
    pub(super) const fn of(mtu: u16) -> Self {
        if mtu == 0 { Self::TIME_EXCEEDED } else { Self::fragmentation_needed(mtu) }
    }

    /// The packet is larger than `mtu`.
    pub(super) const fn fragmentation_needed(mtu: u16) -> Self {
        let (kind, code) = (DESTINATION_UNREACHABLE, FRAGMENTATION_NEEDED);
        Self { kind, code, mtu, answer: Answer::FragmentationNeeded.code() }
    }
}

/// Answers the packet with an error. Not inlined: the kernel bounds a function's stack.
#[inline(never)]
pub(super) fn report<F: Frame>(frame: &mut F, packet: &Packet<FlowKey>, report: Report) -> Verdict {
    if is_for_many(frame) {
        return Verdict::of(Err(DropReason::LinkLayerGroup));
    }
    Verdict::of(match write(frame, packet, report) {
        Some(()) => Ok(Verdict::answer(report.answer)),
        None => Err(DropReason::Malformed),
    })
}

#[inline(always)]
fn write<F: Frame>(frame: &mut F, packet: &Packet<FlowKey>, report: Report) -> Option<()> {
    let ethernet = frame.read::<Ethernet>(0)?;
    frame.prepend(FRONT)?;
    frame.truncate(NETWORK + FRONT + quoted::<Ipv4Header>(packet.is_tcp()))?;
    frame.write(0, &Ethernet { destination: ethernet.source, source: ethernet.destination, ..ethernet })?;
    frame.write(NETWORK, &header(packet))?;
    // The words of a header whose checksum is right sum to nothing; of one whose is not, the error is wrong as well.
    let at = NETWORK + FRONT + size_of::<Ipv4Header>();
    let held =
        if packet.is_tcp() { sum(&frame.read::<[u8; 20]>(at)?) } else { sum(&frame.read::<[u8; 8]>(at)?) };
    let mtu = U16::new(report.mtu);
    let own = word([report.kind, report.code]) + word(mtu.to_bytes());
    let error = IcmpError {
        kind: report.kind,
        code: report.code,
        checksum: finish(own + held),
        unused: U16::ZERO,
        mtu,
    };
    frame.write(TRANSPORT, &error)
}

#[inline(always)]
fn header(packet: &Packet<FlowKey>) -> Ipv4Header {
    let (source, destination) = (packet.key.destination, packet.key.source);
    #[allow(clippy::cast_possible_truncation, reason = "less than a hundred")]
    let length = (FRONT + quoted::<Ipv4Header>(packet.is_tcp())) as u16;
    let fixed = word([0x45, TOS]) + word(length.to_be_bytes()) + word([HOPS, ICMP]);
    Ipv4Header {
        version_ihl: 0x45,
        tos: TOS,
        total_length: U16::new(length),
        id: U16::ZERO,
        fragment: U16::ZERO,
        ttl: HOPS,
        protocol: ICMP,
        checksum: finish(fixed + address(source) + address(destination)),
        source,
        destination,
    }
}

/// Answers an IPv6 packet with an error: what [`super::hop::Passage::Report`] says of it.
#[inline(never)]
pub(super) fn report6<F: Frame>(frame: &mut F, mtu: u16) -> Verdict {
    if is_for_many(frame) {
        return Verdict::of(Err(DropReason::LinkLayerGroup));
    }
    let (kind, answer) = if mtu == 0 {
        (TIME_EXCEEDED6, Answer::TimeExceeded)
    } else {
        (PACKET_TOO_BIG, Answer::FragmentationNeeded)
    };
    Verdict::of(match write6(frame, kind, mtu) {
        Some(()) => Ok(Verdict::answer(answer.code())),
        None => Err(DropReason::Malformed),
    })
}

/// Bytes that come in front of an IPv6 packet.
const FRONT6: usize = size_of::<Ipv6Header>() + size_of::<IcmpError>();
/// Where a packet's source address is.
const SOURCE: usize = NETWORK + offset_of!(Ipv6Header, source);
/// Where its destination address is.
const DESTINATION: usize = NETWORK + offset_of!(Ipv6Header, destination);

/// The part of an IPv6 header before its addresses.
#[derive(Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct Ipv6Start(U32, U16, u8, u8);

#[inline(always)]
fn write6<F: Frame>(frame: &mut F, kind: u8, mtu: u16) -> Option<()> {
    let next = frame.read::<u8>(NETWORK + offset_of!(Ipv6Header, next_header))?;
    let quoted = size_of::<Ipv6Header>() + behind(next);
    // Both headers have the same two addresses, and so has the pseudo header.
    let addresses = addresses::<F, NETWORK>(frame);
    let held = addresses + held6(frame, next);
    #[allow(clippy::cast_possible_truncation, reason = "less than a hundred")]
    let length = U16::new((size_of::<IcmpError>() + quoted) as u16);
    let mtu = U16::new(mtu);
    let own =
        addresses + word(length.to_bytes()) + word([0, ICMPV6]) + word([kind, 0]) + word(mtu.to_bytes());
    let error = IcmpError { kind, code: 0, checksum: finish(own + held), unused: U16::ZERO, mtu };
    frame.prepend(FRONT6)?;
    frame.truncate(NETWORK + FRONT6 + quoted)?;
    // First, since the error lies where the frame's own header was.
    turn6(frame).then_some(())?;
    frame.write(NETWORK, &Ipv6Start(U32::new(6 << 28), length, ICMPV6, HOPS))?;
    frame.write(TRANSPORT6, &error)
}

/// Bytes of what follows an IPv6 header that an error holds: as above, and of a fragment its own header, too.
#[inline(always)]
const fn behind(next_header: u8) -> usize {
    match next_header {
        TCP => size_of::<Tcp>(),
        FRAGMENT6 => size_of::<FragmentHeader>() + size_of::<Udp>(),
        _ => size_of::<Udp>(),
    }
}

/// The sum of what an error holds of a packet, but for its addresses.
#[inline(never)]
fn held6<F: Frame>(frame: &F, next_header: u8) -> u32 {
    let start = frame.read::<[u8; 8]>(NETWORK).map_or(0, |start| sum(&start));
    let rest = match next_header {
        TCP => frame.read::<[u8; 20]>(TRANSPORT6).map_or(0, |header| sum(&header)),
        FRAGMENT6 => frame.read::<[u8; 16]>(TRANSPORT6).map_or(0, |headers| sum(&headers)),
        _ => frame.read::<[u8; 8]>(TRANSPORT6).map_or(0, |header| sum(&header)),
    };
    start + rest
}

/// Addresses what is in front of a packet to whom the packet came from. Says whether it could. The link-layer addresses come first, since
/// what is in front reaches into where they were.
#[inline(never)]
fn turn6<F: Frame>(frame: &mut F) -> bool {
    let mut turn = || -> Option<()> {
        let ethernet = frame.read::<Ethernet>(FRONT6)?;
        frame
            .write(0, &Ethernet { destination: ethernet.source, source: ethernet.destination, ..ethernet })?;
        let source = frame.read::<Ip>(FRONT6 + DESTINATION)?;
        let destination = frame.read::<Ip>(FRONT6 + SOURCE)?;
        frame.write(SOURCE, &source)?;
        frame.write(DESTINATION, &destination)
    };
    turn().is_some()
}
