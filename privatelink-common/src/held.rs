//! What the programs and the agent tell each other about fragments that are held: each of them, to the agent ([`Held`]), and what has
//! become of them, back ([`Account`]).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The most that a frame may have to be held: with what is told of it, no more than what a record of the kernel's buffers can hold.
pub const LONGEST: u32 = 65_000;

/// A fragment that is to be held. Its frame follows, as the path saw it: without tags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(8))]
pub struct Held {
    /// The index in `interfaces` of what it came by.
    pub ifindex: u32,
    /// Bytes of the frame, not above [`LONGEST`].
    pub length: u32,
    /// The VPC that it came from.
    pub vpc: u16,
    /// Zero.
    pub reserved: [u16; 3],
}

/// [`Account::of`]: an index of `outcomes`.
pub const OUTCOME: u32 = 0;
/// [`Account::of`]: an index of `counters`, of packets to the provider.
pub const TO_PROVIDER: u32 = 1;
/// [`Account::of`]: an index of `counters`, of packets to the consumer.
pub const TO_CONSUMER: u32 = 2;

/// What the program `account` adds to a counter. Counters have a value for each CPU, which only programs can add to without losing what
/// others add meanwhile.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(8))]
pub struct Account {
    /// Packets.
    pub packets: u64,
    /// Bytes, Ethernet headers included.
    pub bytes: u64,
    /// [`OUTCOME`], [`TO_PROVIDER`] or [`TO_CONSUMER`].
    pub of: u32,
    /// Which counter.
    pub index: u32,
}
