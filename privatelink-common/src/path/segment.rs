//! A TCP segment of the path's own, in place of the frame at hand.

use crate::checksum::{address, finish, ip, word};
use crate::frame::Frame;
use crate::wire::{Ethernet, Ip, Ipv4, Ipv4Header, Ipv6Header, NETWORK, TCP, TRANSPORT, TRANSPORT6, Tcp};
use core::mem::offset_of;
use zerocopy::{
    Immutable, IntoBytes,
    big_endian::{U16, U32},
};

/// What Linux sends with.
const TTL: u8 = 64;

/// A segment to be sent, between the addresses and ports of the frame at hand.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment {
    /// Whether it goes back to where the frame came from.
    pub back: bool,
    /// Its flags.
    pub flags: u8,
    /// Its window, as it is written.
    pub window: u16,
    /// Its sequence number.
    pub sequence: u32,
    /// What it acknowledges.
    pub acknowledgement: u32,
    /// Its options, of which the first `words` are there.
    pub options: [U32; 5],
    /// How many of the options' words are there.
    pub words: u32,
    /// Bytes of data, zeros: none or one.
    pub data: u32,
}

/// The options of a SYN: MSS, and what else `bits` offers (see [`super::options::Offer`]).
#[inline(always)]
pub(super) fn offer(mss: u16, bits: u8, scale: u8, stamp: u32, echo: u32) -> ([U32; 5], u32) {
    use super::options::{Offer, SACK_OK, STAMPED};
    let first = U32::new(0x0204_0000 | u32::from(mss));
    if bits & STAMPED == 0 {
        return ([first, U32::ZERO, U32::ZERO, U32::ZERO, U32::ZERO], 1);
    }
    // SACK permitted, or padding; timestamps; padding and the window's scale, or padding.
    let second = if bits & SACK_OK == 0 { 0x0101_080a } else { 0x0402_080a };
    let last = if Offer::scale(bits).is_some() { 0x0103_0300 | u32::from(scale) } else { 0x0101_0101 };
    ([first, U32::new(second), U32::new(stamp), U32::new(echo), U32::new(last)], 5)
}

/// Timestamps alone, as segments after the SYN have them; none where they were not offered.
#[inline(always)]
pub(super) fn stamps(bits: u8, stamp: u32, echo: u32) -> ([U32; 5], u32) {
    let words = [U32::new(0x0101_080a), U32::new(stamp), U32::new(echo), U32::ZERO, U32::ZERO];
    (words, if bits & super::options::STAMPED == 0 { 0 } else { 3 })
}

/// Makes the frame the segment, whose TCP header is to be at `AT`, as that of the frame is. Returns 1, or 0 where there is no room. Not
/// inlined: the kernel bounds a function's stack.
#[inline(never)]
pub(super) fn put<F: Frame, const AT: usize>(frame: &mut F, segment: &Segment) -> u64 {
    put_all::<F, AT>(frame, segment).map_or(0, |()| 1)
}

#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "at most 41 bytes")]
fn put_all<F: Frame, const AT: usize>(frame: &mut F, segment: &Segment) -> Option<()> {
    let mut ethernet = frame.read::<Ethernet>(0)?;
    let [mut source_port, mut destination_port] = frame.read::<[U16; 2]>(AT)?;
    if segment.back {
        (ethernet.source, ethernet.destination) = (ethernet.destination, ethernet.source);
        (source_port, destination_port) = (destination_port, source_port);
    }
    let words = (segment.words as usize).min(5);
    let length = size_of::<Tcp>() + words * 4 + (segment.data & 1) as usize;
    // Each is written as soon as it is whole, since what waits lies on the stack.
    let addresses = match AT {
        TRANSPORT6 => ip6::<F>(frame, segment.back, length as u16)?,
        _ => ip4::<F>(frame, segment.back, length as u16)?,
    };
    frame.write(0, &ethernet)?;
    let pseudo = addresses + word([0, TCP]) + word((length as u16).to_be_bytes());
    let mut total = tcp_header::<F, AT>(frame, segment, words as u8, source_port, destination_port)?;
    for index in 0..5 {
        if index < words {
            total += address(segment.options[index].to_bytes());
            frame.write(AT + size_of::<Tcp>() + index * 4, &segment.options[index])?;
        }
    }
    if segment.data & 1 == 1 {
        frame.write(AT + size_of::<Tcp>() + words * 4, &0u8)?;
    }
    frame.set_checksum(AT + offset_of!(Tcp, checksum), pseudo, total)
}

/// Makes room for so much behind an IPv4 header, which is written. Returns the sum of its addresses.
#[inline(always)]
fn ip4<F: Frame>(frame: &mut F, back: bool, length: u16) -> Option<u32> {
    let [mut source, mut destination] = frame.read::<[Ipv4; 2]>(NETWORK + offset_of!(Ipv4Header, source))?;
    if back {
        (source, destination) = (destination, source);
    }
    frame.resize(TRANSPORT + usize::from(length))?;
    #[allow(clippy::cast_possible_truncation, reason = "twenty")]
    let total = size_of::<Ipv4Header>() as u16 + length;
    let addresses = address(source) + address(destination);
    let fixed = word([0x45, 0]) + word(total.to_be_bytes()) + word([0x40, 0]) + word([TTL, TCP]);
    let ip = Ipv4Header {
        version_ihl: 0x45,
        tos: 0,
        total_length: U16::new(total),
        id: U16::ZERO,
        fragment: U16::new(0x4000),
        ttl: TTL,
        protocol: TCP,
        checksum: finish(fixed + addresses),
        source,
        destination,
    };
    frame.write(NETWORK, &ip)?;
    Some(addresses)
}

/// The part of an IPv6 header before its addresses.
#[derive(Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct Ipv6Start(U32, U16, u8, u8);

/// Where the addresses are.
const SOURCE: usize = NETWORK + offset_of!(Ipv6Header, source);
const DESTINATION: usize = NETWORK + offset_of!(Ipv6Header, destination);

/// The same of an IPv6 header.
#[inline(always)]
fn ip6<F: Frame>(frame: &mut F, back: bool, length: u16) -> Option<u32> {
    let (mut source, mut destination) = (frame.read::<Ip>(SOURCE)?, frame.read::<Ip>(DESTINATION)?);
    if back {
        (source, destination) = (destination, source);
    }
    frame.resize(TRANSPORT6 + usize::from(length))?;
    frame.write(NETWORK, &Ipv6Start(U32::new(6 << 28), U16::new(length), TCP, TTL))?;
    frame.write(SOURCE, &source)?;
    frame.write(DESTINATION, &destination)?;
    Some(ip(source) + ip(destination))
}

/// Writes the TCP header, without a checksum, and returns the sum of its words.
#[inline(always)]
fn tcp_header<F: Frame, const AT: usize>(
    frame: &mut F,
    segment: &Segment,
    words: u8,
    source_port: U16,
    destination_port: U16,
) -> Option<u32> {
    let offset = (5 + words) << 4;
    let tcp = Tcp {
        source_port,
        destination_port,
        sequence: U32::new(segment.sequence),
        acknowledgement: U32::new(segment.acknowledgement),
        data_offset: offset,
        flags: segment.flags,
        window: U16::new(segment.window),
        checksum: [0; 2],
        urgent: U16::ZERO,
    };
    frame.write(AT, &tcp)?;
    let numbers = address(tcp.sequence.to_bytes()) + address(tcp.acknowledgement.to_bytes());
    let ports = word(source_port.to_bytes()) + word(destination_port.to_bytes());
    Some(ports + numbers + word([offset, segment.flags]) + word(tcp.window.to_bytes()))
}
