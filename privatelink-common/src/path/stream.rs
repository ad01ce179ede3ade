//! What the two sides of a TCP flow count differently: sequence and acknowledgement numbers, SACK blocks, timestamps and windows are
//! shifted for as long as the flow lives.
//!
//! Only flows that are marked ([`crate::tables::SHIFTED`]) come here; the others do not pay for it.

use super::options::{self, Numbers};
use super::parse::Packet;
use crate::checksum::{address, delta, fold, word};
use crate::frame::{Change, Frame};
use crate::tables::{COOKIE, Flow, FlowKey, Stream, Tables, UNANSWERED};
use crate::verdict::Direction;
use crate::wire::{ACK, RST, SYN, TRANSPORT, Tcp};
use core::mem::offset_of;
use zerocopy::{
    Immutable, IntoBytes,
    big_endian::{U16, U32},
};

/// What is done to the numbers of one segment.
#[derive(Clone, Copy, Debug)]
struct Shift {
    /// Added to the sequence number.
    sequence: u32,
    /// Added to what is acknowledged: by the number, and by SACK blocks.
    acknowledgement: u32,
    /// Added to the sender's timestamp.
    stamp: u32,
    /// Added to the timestamp that it echoes.
    echo: u32,
    /// The power of two that the window is multiplied by.
    window: i32,
}

/// Sequence, acknowledgement, data offset and flags, and window of a TCP header.
#[derive(Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct Changed(U32, U32, [u8; 2], U16);

/// What is to be done with a segment whose flow is shifted. Each is a function of its own, called by the path, since the kernel bounds
/// the stack of a chain of calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub(super) enum Carried {
    /// It has been shifted.
    Done = 0,
    /// It is to become the path's SYN to the target.
    Ask = 1,
    /// It is the target's SYN-ACK, of which the consumer is to be told.
    Tell = 2,
    /// What its flow counts by is gone, or the target speaks of a connection that the consumer does not know.
    Unknown = 3,
    /// It is shorter than it should be.
    Malformed = 4,
}

/// Carries a segment, whose addresses have been rewritten, from one side's counting into the other's. Not inlined, since few flows
/// need it.
#[inline(never)]
pub(super) fn carry<F: Frame, T: Tables>(frame: &mut F, tables: &T, packet: &Packet, flow: &Flow) -> Carried {
    let Some(stream) = tables.stream(&consumers(packet, flow)) else { return Carried::Unknown };
    let Some(tcp) = frame.read::<Tcp>(TRANSPORT) else { return Carried::Malformed };
    let waiting = stream.marks & UNANSWERED != 0;
    let by = match flow.direction() {
        Direction::ToProvider if waiting && tcp.flags & RST == 0 => return Carried::Ask,
        Direction::ToProvider => to_provider(&stream),
        Direction::ToConsumer if is_greeting(&tcp, flow) => return Carried::Tell,
        Direction::ToConsumer if !waiting => to_consumer(&stream),
        Direction::ToConsumer if tcp.flags & RST != 0 => refused(&tcp, &stream),
        Direction::ToConsumer => return Carried::Unknown,
    };
    shift(frame, &tcp, &by).map_or(Carried::Malformed, |()| Carried::Done)
}

/// Whether this is a target's answer to a SYN of the path's.
#[inline(always)]
fn is_greeting(tcp: &Tcp, flow: &Flow) -> bool {
    flow.way & COOKIE != 0 && tcp.flags & (SYN | ACK) == SYN | ACK
}

/// The key of the consumer's packets of a flow.
#[inline(always)]
pub(super) fn consumers(packet: &Packet, flow: &Flow) -> FlowKey {
    match flow.direction() {
        Direction::ToProvider => packet.key,
        Direction::ToConsumer => packet.key.mirror(flow),
    }
}

#[inline(always)]
fn to_provider(stream: &Stream) -> Shift {
    Shift {
        sequence: stream.forward,
        acknowledgement: stream.backward.wrapping_neg(),
        stamp: 0,
        echo: stream.timestamps.wrapping_neg(),
        window: stream.consumer_window.into(),
    }
}

#[inline(always)]
fn to_consumer(stream: &Stream) -> Shift {
    Shift {
        sequence: stream.backward,
        acknowledgement: stream.forward.wrapping_neg(),
        stamp: stream.timestamps,
        echo: 0,
        window: stream.target_window.into(),
    }
}

/// A RST that answers the path's SYN counts as the next byte that the consumer expects, or it would not be believed (RFC 5961, 3.2).
#[inline(always)]
fn refused(tcp: &Tcp, stream: &Stream) -> Shift {
    let sequence = stream.cookie.wrapping_add(1).wrapping_sub(tcp.sequence.get());
    Shift { sequence, acknowledgement: 0, stamp: 0, echo: 0, window: 0 }
}

/// Shifts the numbers of the segment whose header is `tcp`.
#[inline(always)]
fn shift<F: Frame>(frame: &mut F, tcp: &Tcp, by: &Shift) -> Option<()> {
    let sequence = U32::new(tcp.sequence.get().wrapping_add(by.sequence));
    let acknowledgement = match tcp.flags & ACK {
        0 => tcp.acknowledgement,
        _ => U32::new(tcp.acknowledgement.get().wrapping_add(by.acknowledgement)),
    };
    let window = U16::new(scaled(tcp.window.get(), by.window));
    let mut change: u32 = delta(
        address(tcp.sequence.to_bytes())
            + address(tcp.acknowledgement.to_bytes())
            + word(tcp.window.to_bytes()),
        address(sequence.to_bytes()) + address(acknowledgement.to_bytes()) + word(window.to_bytes()),
    )
    .into();
    if tcp.data_offset > 5 << 4 && by.acknowledgement | by.stamp | by.echo != 0 {
        let numbers = Numbers { sack: by.acknowledgement, stamp: by.stamp, echo: by.echo };
        #[allow(clippy::cast_possible_truncation, reason = "a sum of a few folded words")]
        {
            change += options::shift(frame, tcp, &numbers) as u32;
        }
    }
    let changed = Changed(sequence, acknowledgement, [tcp.data_offset, tcp.flags], window);
    frame.write(TRANSPORT + offset_of!(Tcp, sequence), &changed)?;
    let change = Change { pseudo: 0, header: fold(change) };
    frame.change_checksum(TRANSPORT + offset_of!(Tcp, checksum), tcp.checksum, true, change)
}

/// A window in another scale: rounded down, and as large as it can be written.
#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "not above what it is compared with")]
pub(super) fn scaled(window: u16, by: i32) -> u16 {
    let window = u32::from(window);
    match by {
        // Fourteen is the largest scale that there is (RFC 7323, 2.3).
        0.. => (window << (by & 15)).min(0xffff) as u16,
        _ => (window >> (-by & 15)) as u16,
    }
}
