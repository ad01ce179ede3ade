//! Proxy Protocol version 2 (haproxy's proxy-protocol.txt, AWS's edit-target-group-attributes): who the client is, told to the target
//! by a hundred bytes at the head of the stream, or of a flow's first datagram.
//!
//! The bytes are put before what the consumer sends with its first sequence number: the ACK of the handshake, or its first data, and
//! again as often as that comes again, until the target has acknowledged them. From there on the two sides count differently.

use super::parse::Packet;
use super::stream::consumers;
use crate::checksum::{address, delta, fold, update, word};
use crate::frame::{Change, Frame};
use crate::tables::{Flow, FlowKey, HEADER_SENT, Tables, VpcEndpointId};
use crate::wire::{Ethernet, Ipv4, Ipv4Header, NETWORK, TCP, TRANSPORT, Tcp, Udp};
use core::mem::offset_of;
use zerocopy::{
    Immutable, IntoBytes,
    big_endian::{U16, U32},
};

/// How long the header is, always.
pub const LENGTH: u16 = 100;

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Castagnoli's polynomial, reflected (RFC 9260, appendix A).
const POLYNOMIAL: u32 = 0x82f6_3b78;
/// TCP flags that the header's segment is given and looked at for.
const PUSH: u8 = 0x08;
const URGENT: u8 = 0x20;

/// The header that a health check's connection begins with: it is the load balancer's own (`LOCAL`), and says nothing of a client.
pub const LOCAL: [u8; 16] = [13, 10, 13, 10, 0, 13, 10, 81, 85, 73, 84, 10, 0x20, 0, 0, 0];

/// The header of a flow, up to what fills it up.
#[derive(Clone, Copy, Debug, IntoBytes, Immutable)]
#[repr(C)]
struct Header {
    signature: [u8; 12],
    /// Version 2, `PROXY`.
    command: u8,
    /// IPv4, and TCP or UDP.
    family: u8,
    /// Of what follows.
    length: U16,
    source: Ipv4,
    destination: Ipv4,
    source_port: U16,
    destination_port: U16,
    /// PP2_TYPE_CRC32C, of four bytes.
    checksum_type: [u8; 3],
    checksum: U32,
}

/// Where the checksum is.
const CHECKSUM: usize = offset_of!(Header, checksum);
/// Where PP2_TYPE_AWS or the padding begins.
const TAIL: usize = size_of::<Header>();

/// What a byte does to the CRC.
const STEPS: [u32; 256] = steps();

const fn steps() -> [u32; 256] {
    let mut steps = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        #[allow(clippy::cast_possible_truncation, reason = "below 256")]
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = (crc >> 1) ^ (POLYNOMIAL & (crc & 1).wrapping_neg());
            bit += 1;
        }
        steps[byte] = crc;
        byte += 1;
    }
    steps
}

#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "the lowest byte is meant")]
const fn step(crc: u32, byte: u8) -> u32 {
    (crc >> 8) ^ STEPS[(crc as u8 ^ byte) as usize]
}

/// Puts the header into the frame, where `at` says, piece by piece: as a whole it would take too much of the kernel's stack. Returns the
/// sum of its words.
#[inline(always)]
fn put<F: Frame>(frame: &mut F, at: usize, key: &FlowKey, id: &VpcEndpointId) -> Option<u32> {
    let header = Header {
        signature: SIGNATURE,
        command: 0x21,
        family: if key.protocol == TCP { 0x11 } else { 0x12 },
        length: U16::new(LENGTH - 16),
        source: key.source,
        destination: key.destination,
        source_port: key.source_port,
        destination_port: key.destination_port,
        checksum_type: [3, 0, 4],
        checksum: U32::ZERO,
    };
    frame.write(at, &header)?;
    frame.write(at + TAIL, &[0u8; 32])?;
    frame.write(at + TAIL + 32, &[0u8; 33])?;
    if id.text[0] == 0 {
        frame.write(at + TAIL, &[4u8, 0, 62])?;
    } else {
        frame.write(at + TAIL, &[0xeau8, 0, 23, 1])?;
        frame.write(at + TAIL + 4, &id.text)?;
        frame.write(at + TAIL + 26, &[4u8, 0, 36])?;
    }
    let (mut crc, mut sum) = (u32::MAX, 0);
    for index in 0..usize::from(LENGTH / 2) {
        let pair = frame.read::<[u8; 2]>(at + index * 2)?;
        crc = step(step(crc, pair[0]), pair[1]);
        sum += word(pair);
    }
    let crc = U32::new(!crc);
    frame.write(at + CHECKSUM, &crc)?;
    // It lies across the words (RFC 1071, 2 (B)).
    Some(sum + u32::from(fold(address(crc.to_bytes())).swap_bytes()))
}

/// Where the data of a packet begins.
#[inline(always)]
fn data<F: Frame>(frame: &F, packet: &Packet<FlowKey>) -> Option<usize> {
    let long = match packet.is_tcp() {
        true => usize::from(frame.read::<Tcp>(TRANSPORT)?.data_offset >> 4) * 4,
        false => size_of::<Udp>(),
    };
    // The mask, which changes nothing, is the bound that the verifier sees.
    Some(TRANSPORT + (long & 63))
}

/// Makes room for the header before the data of a packet. Returns 1, or 0 where there is none. Not inlined: the kernel bounds a
/// function's stack.
#[inline(never)]
pub(super) fn make_room<F: Frame>(frame: &mut F, packet: &Packet<FlowKey>) -> u64 {
    moved(frame, packet).map_or(0, |()| 1)
}

#[inline(always)]
fn moved<F: Frame>(frame: &mut F, packet: &Packet<FlowKey>) -> Option<()> {
    let end = data(frame, packet)?;
    let (ethernet, mut ip) = (frame.read::<Ethernet>(0)?, frame.read::<Ipv4Header>(NETWORK)?);
    let total = ip.total_length;
    ip.total_length = U16::new(total.get().checked_add(LENGTH)?);
    ip.checksum = update(ip.checksum, delta(word(total.to_bytes()), word(ip.total_length.to_bytes())).into());
    frame.prepend(LENGTH.into())?;
    frame.write(0, &ethernet)?;
    frame.write(NETWORK, &ip)?;
    // At most fifteen words of header.
    for index in 0..15 {
        let at = TRANSPORT + index * 4;
        if at < end {
            let word = frame.read::<[u8; 4]>(at + usize::from(LENGTH))?;
            frame.write(at, &word)?;
        }
    }
    Some(())
}

/// Puts the header where there is room for it now, in a packet whose addresses and numbers are the target's already. Returns 1, or 0
/// where the packet is shorter than it should be. Not inlined, as above.
#[inline(never)]
pub(super) fn fill<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    packet: &Packet<FlowKey>,
    flow: &Flow,
) -> u64 {
    let key = consumers(packet, flow);
    let id = tables.vpc_endpoint_id(flow.endpoint.into());
    let sum = data(frame, packet).and_then(|at| put(frame, at, &key, &id));
    let filled = sum.and_then(|sum| if packet.is_tcp() { segment(frame, sum) } else { datagram(frame, sum) });
    filled.map_or(0, |()| 1)
}

/// Brings the TCP header up to date, now that words of this `sum` are in the data.
#[inline(always)]
fn segment<F: Frame>(frame: &mut F, sum: u32) -> Option<()> {
    let mut tcp = frame.read::<Tcp>(TRANSPORT)?;
    let length = frame.read::<U16>(NETWORK + offset_of!(Ipv4Header, total_length))?.get();
    let old = word([tcp.data_offset, tcp.flags]) + word(tcp.urgent.to_bytes());
    tcp.flags |= PUSH;
    if tcp.flags & URGENT != 0 {
        tcp.urgent = U16::new(tcp.urgent.get().saturating_add(LENGTH));
    }
    let new = word([tcp.data_offset, tcp.flags]) + word(tcp.urgent.to_bytes());
    let before = word(length.wrapping_sub(LENGTH).to_be_bytes());
    frame.write(TRANSPORT, &tcp)?;
    let pseudo = delta(before, word(length.to_be_bytes()));
    let change = Change { pseudo, header: fold(u32::from(delta(old, new)) + sum) };
    frame.change_checksum(TRANSPORT + offset_of!(Tcp, checksum), tcp.checksum, true, change)
}

/// Brings the UDP header up to date, likewise.
#[inline(always)]
fn datagram<F: Frame>(frame: &mut F, sum: u32) -> Option<()> {
    let mut udp = frame.read::<Udp>(TRANSPORT)?;
    let length = U16::new(udp.length.get().checked_add(LENGTH)?);
    // Its length is in the header and in the pseudo-header.
    let longer = delta(word(udp.length.to_bytes()), word(length.to_bytes()));
    udp.length = length;
    frame.write(TRANSPORT, &udp)?;
    let change = Change { pseudo: longer, header: fold(u32::from(longer) + sum) };
    frame.change_checksum(TRANSPORT + offset_of!(Udp, checksum), udp.checksum, false, change)
}

/// Remembers that the target has been sent the header, so that a RST which follows counts it. Not inlined, as above.
#[inline(never)]
pub(super) fn sent<T: Tables>(tables: &T, packet: &Packet<FlowKey>, flow: &Flow) {
    let key = consumers(packet, flow);
    let Some(mut stream) = tables.stream(&key).filter(|it| it.marks & HEADER_SENT == 0) else { return };
    stream.marks |= HEADER_SENT;
    // It was there a moment ago. If it is not now, neither is the flow.
    let _ = tables.set_stream(&key, &stream);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::SliceFrame;
    use std::format;
    use std::string::String;

    fn hexadecimal(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn header(key: &FlowKey, id: &VpcEndpointId) -> [u8; LENGTH as usize] {
        let mut bytes = [0xff; LENGTH as usize];
        let sum = put(&mut SliceFrame::new(&mut bytes), 0, key, id).expect("there is room");
        assert_eq!(fold(sum), fold(crate::checksum::sum(&bytes)), "the sum of its words");
        bytes
    }

    fn crc32c(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(u32::MAX, |crc, byte| step(crc, *byte))
    }

    fn key(protocol: u8) -> FlowKey {
        FlowKey {
            source: [172, 31, 7, 113],
            destination: [172, 31, 10, 31],
            source_port: U16::new(51442),
            destination_port: U16::new(80),
            protocol,
            ..FlowKey::default()
        }
    }

    #[test]
    fn the_header_is_the_one_that_was_captured_from_an_aws_load_balancer() {
        let id = VpcEndpointId { text: *b"vpce-08d2bf15fac5001c9", reserved: [0; 2] };
        let captured = "0d0a0d0a000d0a515549540a21110054ac1f0771ac1f0a1fc8f20050030004e8d6892dea001701767063652d30386432626631356661633530303163390400\
                        24";
        let expected = format!("{captured}{}", "00".repeat(36));
        assert_eq!(hexadecimal(&header(&key(TCP), &id)), expected.replace(' ', ""));
    }

    #[test]
    fn without_an_endpoint_there_is_padding_in_place_of_its_name_and_datagrams_say_that_they_are_some() {
        let bytes = header(&key(17), &VpcEndpointId::default());
        assert_eq!(bytes[12..16], [0x21, 0x12, 0, 84]);
        assert_eq!(bytes[35..38], [4, 0, 62]);
        assert_eq!(bytes[38..], [0; 62]);
        let mut blank = bytes;
        blank[31..35].fill(0);
        assert_eq!(bytes[31..35], crc32c(&blank).to_be_bytes());
        assert_eq!(crc32c(b"123456789"), 0xe306_9283, "the check value of the polynomial");
    }
}
