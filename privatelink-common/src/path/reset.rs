//! Turns a TCP segment into the RST that answers it (RFC 9293, 3.10.7.1), in place.

use super::parse::Packet;
use crate::checksum::{address, finish, sum, word};
use crate::frame::Frame;
use crate::verdict::{DropReason, Verdict};
use crate::wire::{ACK, Ethernet, FIN, Ipv4Header, NETWORK, RST, SYN, TCP, TRANSPORT, Tcp};
use core::mem::offset_of;
use zerocopy::{
    IntoBytes,
    big_endian::{U16, U32},
};

const LENGTH: u16 = 40;
/// What Linux sends with.
const TTL: u8 = 64;

/// Answers the segment with a RST, to be counted as `answer`, a [`crate::verdict::Answer::code`].
#[inline(always)]
pub(super) fn reset<F: Frame>(frame: &mut F, packet: &Packet, answer: u32) -> Result<Verdict, DropReason> {
    write(frame, packet).ok_or(DropReason::Malformed)?;
    Ok(Verdict::answer(answer))
}

#[inline(always)]
fn write<F: Frame>(frame: &mut F, packet: &Packet) -> Option<()> {
    let ethernet = frame.read::<Ethernet>(0)?;
    let ip = frame.read::<Ipv4Header>(NETWORK)?;
    let tcp = frame.read::<Tcp>(TRANSPORT)?;
    frame.truncate(NETWORK + usize::from(LENGTH))?;
    frame.write(0, &Ethernet { destination: ethernet.source, source: ethernet.destination, ..ethernet })?;
    frame.write(NETWORK, &ip_header(packet))?;
    let segment = segment(&ip, &tcp);
    frame.write(TRANSPORT, &segment)?;
    let pseudo = address(packet.key.source) + address(packet.key.destination);
    let lengths = word([0, TCP]) + word((LENGTH - 20).to_be_bytes());
    frame.set_checksum(TRANSPORT + offset_of!(Tcp, checksum), pseudo + lengths, words::<20>(&segment))
}

#[inline(always)]
fn ip_header(packet: &Packet) -> Ipv4Header {
    let mut header = Ipv4Header {
        version_ihl: 0x45,
        tos: 0,
        total_length: U16::new(LENGTH),
        id: U16::ZERO,
        fragment: U16::new(0x4000),
        ttl: TTL,
        protocol: TCP,
        checksum: [0; 2],
        source: packet.key.destination,
        destination: packet.key.source,
    };
    header.checksum = finish(words::<20>(&header));
    header
}

/// Sequence and acknowledgement as the RFC has them: a segment with ACK is answered from its acknowledgement, one without is
/// acknowledged as a whole, SYN and FIN included. The checksum is still to be put there.
#[inline(always)]
fn segment(ip: &Ipv4Header, tcp: &Tcp) -> Tcp {
    let header = u32::from(tcp.data_offset >> 4) * 4;
    let data = u32::from(ip.total_length.get()).wrapping_sub(20 + header);
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
