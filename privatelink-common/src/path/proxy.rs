//! Proxy Protocol version 2 (haproxy's proxy-protocol.txt, AWS's edit-target-group-attributes): who the client is, told to the target
//! by a hundred bytes at the head of the stream, or of a flow's first datagram.
//!
//! The bytes are put before what the consumer sends with its first sequence number: the ACK of the handshake, or its first data, and
//! again as often as that comes again, until the target has acknowledged them. From there on the two sides count differently.

use super::parse::Packet;
use super::stream::consumers;
use crate::checksum::{address, delta, fold, update, word};
use crate::frame::{Change, Frame};
use crate::tables::{Course, Flows, HEADER_SENT, Key, Tables, VpcEndpointId, Width};
use crate::wire::{Ip, Ipv4, Ipv4Header, Ipv6Header, NETWORK, TCP, TRANSPORT, Tcp, Udp};
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

/// What the header begins with.
#[derive(Clone, Copy, Debug, IntoBytes, Immutable)]
#[repr(C)]
struct Start {
    signature: [u8; 12],
    /// Version 2, `PROXY`.
    command: u8,
    /// IPv4 or IPv6, and TCP or UDP.
    family: u8,
    /// Of what follows.
    length: U16,
}

/// What is behind the addresses: PP2_TYPE_CRC32C, of four bytes.
#[derive(Clone, Copy, Debug, IntoBytes, Immutable)]
#[repr(C)]
struct Checksum(U16, U16, [u8; 3], U32);

/// Where the addresses begin, and the ports where these are IPv4's or IPv6's.
const ADDRESSES: usize = size_of::<Start>();
const PORTS: usize = ADDRESSES + 2 * size_of::<Ipv4>();
const PORTS6: usize = ADDRESSES + 2 * size_of::<Ip>();
/// How far behind the ports the checksum is, and what follows it.
const CHECKSUM: usize = 7;
const TAIL: usize = CHECKSUM + size_of::<U32>();

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

/// Puts the header into the frame, where `at` says, piece by piece: as a whole it would take too much of the kernel's stack. The client's
/// addresses are those of its own family, whichever the target's is. Returns the sum of its words.
#[inline(always)]
fn put<F: Frame, K: Key>(frame: &mut F, at: usize, key: &K, id: &VpcEndpointId) -> Option<u32> {
    if key.is_ipv4() {
        let addresses = (key.source().widen().ipv4(), key.destination().widen().ipv4());
        frame.write(at + ADDRESSES, &addresses.0)?;
        frame.write(at + ADDRESSES + size_of::<Ipv4>(), &addresses.1)?;
        put_rest::<F, K, PORTS>(frame, at, key, id)
    } else {
        frame.write(at + ADDRESSES, &key.source().widen())?;
        frame.write(at + ADDRESSES + size_of::<Ip>(), &key.destination().widen())?;
        put_rest::<F, K, PORTS6>(frame, at, key, id)
    }
}

#[inline(always)]
fn put_rest<F: Frame, K: Key, const PORTS_AT: usize>(
    frame: &mut F,
    at: usize,
    key: &K,
    id: &VpcEndpointId,
) -> Option<u32> {
    let over = if PORTS_AT == PORTS { 0x10 } else { 0x20 };
    let start = Start {
        signature: SIGNATURE,
        command: 0x21,
        family: over | if key.protocol() == TCP { 1 } else { 2 },
        length: U16::new(LENGTH - 16),
    };
    frame.write(at, &start)?;
    let ports = Checksum(key.source_port(), key.destination_port(), [3, 0, 4], U32::ZERO);
    frame.write(at + PORTS_AT, &ports)?;
    let tail = at + PORTS_AT + TAIL;
    frame.write(tail, &[0u8; 32])?;
    if PORTS_AT == PORTS {
        frame.write(tail + 32, &[0u8; LENGTH as usize - PORTS - TAIL - 32])?;
    } else {
        frame.write(tail + 32, &[0u8; LENGTH as usize - PORTS6 - TAIL - 32])?;
    }
    #[allow(clippy::cast_possible_truncation, reason = "less than a hundred")]
    let left = LENGTH as u8 - (PORTS_AT + TAIL) as u8 - 3;
    if id.text[0] == 0 {
        frame.write(tail, &[4u8, 0, left])?;
    } else {
        frame.write(tail, &[0xeau8, 0, 23, 1])?;
        frame.write(tail + 4, &id.text)?;
        frame.write(tail + 26, &[4u8, 0, left - 26])?;
    }
    let (mut crc, mut sum) = (u32::MAX, 0);
    for index in 0..usize::from(LENGTH / 2) {
        let pair = frame.read::<[u8; 2]>(at + index * 2)?;
        crc = step(step(crc, pair[0]), pair[1]);
        sum += word(pair);
    }
    let crc = U32::new(!crc);
    frame.write(at + PORTS_AT + CHECKSUM, &crc)?;
    // It lies across the words (RFC 1071, 2 (B)).
    Some(sum + u32::from(fold(address(crc.to_bytes())).swap_bytes()))
}

/// Where the data of a packet begins.
#[inline(always)]
fn data<F: Frame, const AT: usize>(frame: &F, is_tcp: bool) -> Option<usize> {
    let long = match is_tcp {
        true => usize::from(frame.read::<Tcp>(AT)?.data_offset >> 4) * 4,
        false => size_of::<Udp>(),
    };
    // The mask, which changes nothing, is the bound that the verifier sees.
    Some(AT + (long & 63))
}

/// Where a header says how long the packet is, or what follows it.
const fn length_at(at: usize) -> usize {
    match at {
        TRANSPORT => NETWORK + offset_of!(Ipv4Header, total_length),
        _ => NETWORK + offset_of!(Ipv6Header, payload_length),
    }
}

/// Makes room for the header before the data of a packet, whose transport header is at `AT`. Returns 1, or 0 where there is none. Not
/// inlined: the kernel bounds a function's stack.
#[inline(never)]
pub(super) fn make_room<F: Frame, const AT: usize>(frame: &mut F, is_tcp: bool) -> u64 {
    moved::<F, AT>(frame, is_tcp).map_or(0, |()| 1)
}

#[inline(always)]
fn moved<F: Frame, const AT: usize>(frame: &mut F, is_tcp: bool) -> Option<()> {
    let end = data::<F, AT>(frame, is_tcp)?;
    let before = frame.read::<U16>(const { length_at(AT) })?;
    let after = U16::new(before.get().checked_add(LENGTH)?);
    if AT == TRANSPORT {
        let at = NETWORK + offset_of!(Ipv4Header, checksum);
        let checksum = frame.read::<[u8; 2]>(at)?;
        let longer = delta(word(before.to_bytes()), word(after.to_bytes()));
        frame.write(at, &update(checksum, longer.into()))?;
        frame.write(const { length_at(AT) }, &after)?;
    } else {
        frame.write_summed(const { length_at(AT) }, &after)?;
    }
    frame.insert::<AT>(end, LENGTH.into())
}

/// Whether this is the first datagram of a flow, which takes the header along.
#[inline(always)]
pub(super) fn is_due<K: Key>(packet: &Packet<K>, flow: &Course) -> bool {
    !packet.is_tcp() && flow.is_shifted()
}

/// Puts the header where there is room for it now, in a packet whose addresses and numbers are the target's already. Returns 1, or 0
/// where the packet is shorter than it should be. Not inlined, as above.
#[inline(never)]
pub(super) fn fill<F: Frame, T: Tables, K: Key, const AT: usize>(
    frame: &mut F,
    tables: &T,
    packet: &Packet<K>,
    flow: &K::Flow,
) -> u64 {
    // What goes to the target is the consumer's.
    let id = tables.vpc_endpoint_id(flow.endpoint.into());
    let is_tcp = packet.is_tcp();
    let sum = data::<F, AT>(frame, is_tcp).and_then(|at| put(frame, at, &packet.key, &id));
    let filled = sum.and_then(|sum| match is_tcp {
        true => segment::<F, AT>(frame, sum),
        false => datagram::<F, AT>(frame, sum),
    });
    filled.map_or(0, |()| 1)
}

/// Brings the TCP header up to date, now that words of this `sum` are in the data.
#[inline(always)]
fn segment<F: Frame, const AT: usize>(frame: &mut F, sum: u32) -> Option<()> {
    let mut tcp = frame.read::<Tcp>(AT)?;
    let length = frame.read::<U16>(const { length_at(AT) })?.get();
    let old = word([tcp.data_offset, tcp.flags]) + word(tcp.urgent.to_bytes());
    tcp.flags |= PUSH;
    if tcp.flags & URGENT != 0 {
        tcp.urgent = U16::new(tcp.urgent.get().saturating_add(LENGTH));
    }
    let new = word([tcp.data_offset, tcp.flags]) + word(tcp.urgent.to_bytes());
    let before = word(length.wrapping_sub(LENGTH).to_be_bytes());
    frame.write(AT, &tcp)?;
    let pseudo = delta(before, word(length.to_be_bytes()));
    let change = Change { pseudo, header: fold(u32::from(delta(old, new)) + sum) };
    frame.change_checksum(AT + offset_of!(Tcp, checksum), tcp.checksum, true, change)
}

/// Brings the UDP header up to date, likewise.
#[inline(always)]
fn datagram<F: Frame, const AT: usize>(frame: &mut F, sum: u32) -> Option<()> {
    let mut udp = frame.read::<Udp>(AT)?;
    let length = U16::new(udp.length.get().checked_add(LENGTH)?);
    // Its length is in the header and in the pseudo-header.
    let longer = delta(word(udp.length.to_bytes()), word(length.to_bytes()));
    udp.length = length;
    frame.write(AT, &udp)?;
    let change = Change { pseudo: longer, header: fold(u32::from(longer) + sum) };
    frame.change_checksum(AT + offset_of!(Udp, checksum), udp.checksum, false, change)
}

/// Remembers that the target has been sent the header, so that a RST which follows counts it. Not inlined, as above.
#[inline(never)]
pub(super) fn sent<K: Key, T: Flows<K>>(tables: &T, packet: &Packet<K>, flow: &K::Flow) {
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
    use crate::tables::{FlowKey, FlowKey6};
    use crate::wire::Ip;
    use std::format;
    use std::string::String;

    fn hexadecimal(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn header(key: &impl Key, id: &VpcEndpointId) -> [u8; LENGTH as usize] {
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
    fn a_client_with_an_ipv6_address_gets_as_long_a_header_and_one_without_the_same_whichever_table_has_its_flow()
     {
        let id = VpcEndpointId { text: *b"vpce-08d2bf15fac5001c9", reserved: [0; 2] };
        let narrow = key(TCP);
        assert_eq!(header(&narrow.other().expect("an IPv4 key has one"), &id), header(&narrow, &id));
        let (source, destination) = (Ip([0xfd; 16]), Ip([0xfe; 16]));
        let wide = FlowKey6 {
            source,
            destination,
            source_port: U16::new(0x1234),
            protocol: TCP,
            ..FlowKey6::default()
        };
        for (id, tail) in [(id, [0xea, 0, 23, 1]), (VpcEndpointId::default(), [4, 0, 38, 0])] {
            let bytes = header(&wide, &id);
            assert_eq!(bytes[12..16], [0x21, 0x21, 0, 84]);
            assert_eq!(
                (&bytes[16..32], &bytes[32..48], &bytes[48..52]),
                (&[0xfd; 16][..], &[0xfe; 16][..], &[0x12, 0x34, 0, 0][..])
            );
            assert_eq!((&bytes[52..55], &bytes[59..63]), (&[3, 0, 4][..], &tail[..]));
            let mut blank = bytes;
            blank[55..59].fill(0);
            assert_eq!(bytes[55..59], crc32c(&blank).to_be_bytes());
        }
        assert_eq!(header(&wide, &id)[85..88], [4, 0, 12]);
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
