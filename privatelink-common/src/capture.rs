//! What a capture asks of the kernel ([`Watch`]), and what it is told of each packet ([`Event`]).

use crate::tables::Tag;
use crate::wire::Ip;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, big_endian::U16};

/// How much of a packet is kept from before the path changes it: more than all headers that it may change, with TCP's options.
pub const HEADER: usize = 128;

/// How many of an endpoint's addresses a capture can be limited to.
pub const ENDPOINTS: usize = 16;

/// The most that is handed over of a packet: with what is told of it, no more than what a record of the kernel's buffers can hold, which
/// says its length in 16 bits. Frames that are yet to be cut into segments may be longer.
pub const SNAPLEN: u32 = 65_000;

/// [`Event::outcome`]: the packet belongs to a flow, and was sent on.
pub const FORWARDED: u32 = u32::MAX;

/// What is to be captured: a constant of the programs. Whatever is zero is not asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Watch {
    /// Only packets with one of these addresses and ports on a side, and the other one across.
    pub ends: [End; 2],
    /// One packet in so many is looked at, by chance; 0 and 1: each.
    pub sample: u32,
    /// How many packets a second are captured at most.
    pub rate: u32,
    /// How many bytes of a packet are captured at most, not above [`SNAPLEN`].
    pub snaplen: u32,
    /// Only packets of these endpoints' addresses.
    pub endpoints: [u32; ENDPOINTS],
    /// Only packets that come from this VPC or go to it.
    pub vpc: u16,
    /// Only packets of this IANA protocol.
    pub protocol: u8,
    /// 1: only packets that were dropped.
    pub dropped: u8,
}

/// An address, a port, or both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct End {
    /// The address, of either family.
    pub address: Ip,
    /// The port.
    pub port: U16,
    /// Zero.
    pub reserved: [u16; 3],
}

/// One packet and what became of it. The packet follows as it left, cut to [`Watch::snaplen`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(8))]
pub struct Event {
    /// When it came, in nanoseconds of the monotonic clock.
    pub entered: u64,
    /// When the path was done with it.
    pub left: u64,
    /// Bytes as it came, from the Ethernet header on, without `tags`.
    pub length: u32,
    /// Bytes as it left, without `left_tags`.
    pub left_length: u32,
    /// The outcome's code, as in `outcomes`, or [`FORWARDED`].
    pub outcome: u32,
    /// How many bytes of `header` are the packet's.
    pub header_length: u32,
    /// The endpoint's address that it belongs to; 0: none.
    pub endpoint: u32,
    /// The target of its flow; 0: it belongs to none.
    pub target: u32,
    /// The VPC that it came from.
    pub vpc: u16,
    /// Slot of the interface that it came by.
    pub slot: u16,
    /// The VPC that it goes to.
    pub peer_vpc: u16,
    /// Slot of the interface that it leaves by; 0: it leaves by none.
    pub peer_slot: u16,
    /// Bytes of payload in each segment that a device is yet to cut the frame into; 0: it is one packet.
    pub segment: u16,
    /// Zero.
    pub reserved: [u16; 3],
    /// VLAN tags that it came with and the path does not see, the outer one first; zeros: there is none.
    pub tags: [Tag; 2],
    /// Those that are put on it as it leaves.
    pub left_tags: [Tag; 2],
    /// How it began as it came, without those tags.
    pub header: [u8; HEADER],
}

/// What was not captured, an array's value by CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(8))]
pub struct Missed {
    /// Packets beyond [`Watch::rate`].
    pub rate: u64,
    /// Packets that the buffer had no room for.
    pub room: u64,
}
