//! Turns a packet into the ICMP error about it (RFC 792), in place, from the address that it was sent to.

use super::parse::Packet;
use crate::checksum::{address, finish, sum, word};
use crate::frame::Frame;
use crate::verdict::{Answer, DropReason, Verdict};
use crate::wire::{
    DESTINATION_UNREACHABLE, Ethernet, FRAGMENTATION_NEEDED, ICMP, IcmpError, Ipv4Header, NETWORK,
    TIME_EXCEEDED, TRANSPORT, Tcp, Udp,
};
use core::mem::size_of;
use zerocopy::big_endian::U16;

/// Bytes of what an error holds of the packet that it is about: its header, and all of the transport header without options. Eight bytes of
/// that would do (RFC 792), but a frame cannot be cut off before a checksum that is still to be completed.
const fn quoted(is_tcp: bool) -> usize {
    size_of::<Ipv4Header>() + if is_tcp { size_of::<Tcp>() } else { size_of::<Udp>() }
}

/// Bytes that come in front of the packet: another header, and ICMP's.
const FRONT: usize = size_of::<Ipv4Header>() + size_of::<IcmpError>();
/// What Linux sends with.
const TTL: u8 = 64;
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

    /// The packet is larger than `mtu`.
    pub(super) const fn fragmentation_needed(mtu: u16) -> Self {
        let (kind, code) = (DESTINATION_UNREACHABLE, FRAGMENTATION_NEEDED);
        Self { kind, code, mtu, answer: Answer::FragmentationNeeded.code() }
    }
}

/// Answers the packet with an error. Not inlined: the kernel bounds a function's stack.
#[inline(never)]
pub(super) fn report<F: Frame>(frame: &mut F, packet: &Packet, report: Report) -> Verdict {
    Verdict::of(match write(frame, packet, report) {
        Some(()) => Ok(Verdict::answer(report.answer)),
        None => Err(DropReason::Malformed),
    })
}

#[inline(always)]
fn write<F: Frame>(frame: &mut F, packet: &Packet, report: Report) -> Option<()> {
    let ethernet = frame.read::<Ethernet>(0)?;
    frame.prepend(FRONT)?;
    frame.truncate(NETWORK + FRONT + quoted(packet.is_tcp()))?;
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
fn header(packet: &Packet) -> Ipv4Header {
    let (source, destination) = (packet.key.destination, packet.key.source);
    #[allow(clippy::cast_possible_truncation, reason = "less than a hundred")]
    let length = (FRONT + quoted(packet.is_tcp())) as u16;
    let fixed = word([0x45, TOS]) + word(length.to_be_bytes()) + word([TTL, ICMP]);
    Ipv4Header {
        version_ihl: 0x45,
        tos: TOS,
        total_length: U16::new(length),
        id: U16::ZERO,
        fragment: U16::ZERO,
        ttl: TTL,
        protocol: ICMP,
        checksum: finish(fixed + address(source) + address(destination)),
        source,
        destination,
    }
}
