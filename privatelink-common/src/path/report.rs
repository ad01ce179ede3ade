//! Turns a packet into the ICMP error about it (RFC 792), in place, from the address that it was sent to.

use super::parse::Packet;
use crate::checksum::{address, finish, word};
use crate::frame::Frame;
use crate::verdict::{Answer, DropReason, Verdict};
use crate::wire::{
    DESTINATION_UNREACHABLE, Ethernet, FRAGMENTATION_NEEDED, ICMP, IcmpError, Ipv4Header, NETWORK,
    TIME_EXCEEDED, TRANSPORT,
};
use core::mem::size_of;
use zerocopy::big_endian::U16;

/// Bytes of what an error holds of the packet that it is about: its header, and eight bytes of what follows.
const QUOTED: usize = size_of::<Ipv4Header>() + 8;

/// Bytes that come in front of the packet: another header, and ICMP's.
const FRONT: usize = size_of::<Ipv4Header>() + size_of::<IcmpError>();
/// Length of the whole frame.
const FRAME: usize = NETWORK + FRONT + QUOTED;
/// Length of the IP packet in it.
#[allow(clippy::cast_possible_truncation, reason = "56")]
const LENGTH: u16 = (FRONT + QUOTED) as u16;

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
    frame.truncate(FRAME)?;
    frame.write(0, &Ethernet { destination: ethernet.source, source: ethernet.destination, ..ethernet })?;
    frame.write(NETWORK, &header(packet))?;
    // The words of a header whose checksum is right sum to nothing; of one whose is not, the error is wrong as well.
    let [a, b] = frame.read::<[[u8; 4]; 2]>(NETWORK + FRONT + size_of::<Ipv4Header>())?;
    let held = address(a) + address(b);
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
    let fixed = word([0x45, TOS]) + word(LENGTH.to_be_bytes()) + word([TTL, ICMP]);
    Ipv4Header {
        version_ihl: 0x45,
        tos: TOS,
        total_length: U16::new(LENGTH),
        id: U16::ZERO,
        fragment: U16::ZERO,
        ttl: TTL,
        protocol: ICMP,
        checksum: finish(fixed + address(source) + address(destination)),
        source,
        destination,
    }
}
