//! What the two sides of a TCP flow count differently: sequence and acknowledgement numbers, SACK blocks, timestamps and windows are
//! shifted for as long as the flow lives.
//!
//! The TCP header is at `AT`, behind a header of the family that the segment goes to. Only flows that are marked
//! ([`crate::tables::SHIFTED`]) come here; the others do not pay for it.

use super::options::{self, Numbers};
use super::parse::Packet;
use super::proxy::LENGTH;
use super::state::State;
use crate::checksum::{address, delta, fold, word};
use crate::frame::{Change, Frame};
use crate::tables::{COOKIE, Course, Flows, GREETED, HEADER_DUE, HEADER_SENT, Key, Stream, UNANSWERED};
use crate::verdict::Direction;
use crate::wire::{ACK, Ipv4Header, Ipv6Header, NETWORK, RST, SYN, TRANSPORT, Tcp};
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
    /// Added to the acknowledgement number.
    acknowledgement: u32,
    /// Added to both ends of SACK blocks.
    sack: u32,
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
    /// It has been shifted, and takes the Proxy Protocol's header along.
    Insert = 5,
    /// It is the SYN-ACK of a target that is going to be sent a header.
    Greet = 6,
    /// There is no room for what its flow counts by.
    Full = 7,
    /// The target would take it for what comes before the Proxy Protocol's header.
    Ahead = 8,
}

/// Carries a segment, whose addresses have been rewritten, from one side's counting into the other's. Not inlined, since few flows
/// need it.
#[inline(never)]
pub(super) fn carry<F: Frame, T: Flows<K>, K: Key, const AT: usize>(
    frame: &mut F,
    tables: &T,
    packet: &Packet<K>,
    flow: &K::Flow,
) -> Carried {
    let Some(tcp) = frame.read::<Tcp>(AT) else { return Carried::Malformed };
    let key = consumers(packet, flow);
    if opens(&tcp, flow) {
        return begin::<F, T, K, AT>(frame, tables, &key, flow, &tcp);
    }
    let Some(mut stream) = tables.stream(&key) else { return Carried::Unknown };
    let waiting = stream.marks & UNANSWERED != 0;
    let mut carried = Carried::Done;
    let by = match flow.direction() {
        Direction::ToProvider if waiting && tcp.flags & RST == 0 => return Carried::Ask,
        Direction::ToProvider if stream.forward != 0 && tcp.flags & SYN != 0 => return Carried::Ahead,
        Direction::ToProvider => {
            let mut by = to_provider(&stream);
            if stream.marks & HEADER_DUE != 0 {
                (by.sequence, carried) = header::<F, AT>(frame, &tcp, &stream);
            }
            if carried == Carried::Ahead {
                return carried;
            }
            by
        }
        Direction::ToConsumer if is_greeting(&tcp, flow) => return told(&tcp, &stream),
        Direction::ToConsumer if waiting && tcp.flags & RST != 0 => refused(&tcp, &stream),
        Direction::ToConsumer if waiting => return Carried::Unknown,
        Direction::ToConsumer if tcp.flags & SYN != 0 => return greeted(tables, &key, &tcp, &stream),
        Direction::ToConsumer => {
            let mut by = to_consumer(&stream);
            if stream.marks & (HEADER_DUE | GREETED) == HEADER_DUE | GREETED && tcp.flags & ACK != 0 {
                by.acknowledgement = acknowledged(tables, &key, &tcp, &mut stream);
            } else if stream.marks & HEADER_DUE != 0 {
                // It is about a connection of before this one, of which no byte was shifted.
                by.acknowledgement = 0;
            }
            by
        }
    };
    shift::<F, AT>(frame, &tcp, &by).map_or(Carried::Malformed, |()| carried)
}

/// Whether this is the consumer's SYN.
#[inline(always)]
fn opens(tcp: &Tcp, flow: &Course) -> bool {
    tcp.flags & (SYN | ACK | RST) == SYN
        && flow.direction() == Direction::ToProvider
        && flow.way & COOKIE == 0
}

/// The consumer's SYN goes as it is, but for what would have its target take data that comes before the header (RFC 7413), and says where
/// its stream begins.
#[inline(always)]
fn begin<F: Frame, T: Flows<K>, K: Key, const AT: usize>(
    frame: &mut F,
    tables: &T,
    key: &K,
    flow: &Course,
    tcp: &Tcp,
) -> Carried {
    if !is_empty::<F, AT>(frame, tcp) {
        return Carried::Ahead;
    }
    if options::forget_fast_open::<F, AT>(frame) == 0 {
        return Carried::Malformed;
    }
    if flow.state != State::Opening as u8 {
        return Carried::Done;
    }
    let stream = Stream {
        forward: LENGTH.into(),
        initial: tcp.sequence.get(),
        marks: HEADER_DUE,
        ..Stream::default()
    };
    tables.set_stream(key, &stream).map_or(Carried::Full, |()| Carried::Done)
}

/// The target's SYN-ACK says where its stream begins, whatever SYNs it has seen: only from there on is it known where the header belongs.
/// One that begins another connection than the last is owed a header of its own.
#[inline(always)]
fn greeted<K: Key, T: Flows<K>>(tables: &T, key: &K, tcp: &Tcp, stream: &Stream) -> Carried {
    if tcp.flags & ACK == 0 {
        return Carried::Unknown;
    }
    let (initial, cookie) = (tcp.acknowledgement.get().wrapping_sub(1), tcp.sequence.get());
    if stream.marks & GREETED != 0 && stream.initial == initial && stream.cookie == cookie {
        return Carried::Greet;
    }
    let stream =
        Stream { forward: LENGTH.into(), initial, cookie, marks: HEADER_DUE | GREETED, ..Stream::default() };
    tables.set_stream(key, &stream).map_or(Carried::Full, |()| Carried::Greet)
}

/// A target's answer to a SYN of the path's is one if it acknowledges that SYN, and not one of a connection of before.
#[inline(always)]
fn told(tcp: &Tcp, stream: &Stream) -> Carried {
    match tcp.acknowledgement.get().wrapping_sub(stream.initial) {
        1 => Carried::Tell,
        _ => Carried::Unknown,
    }
}

/// The largest window that there is (RFC 7323, 2.3).
const WINDOW: u32 = 1 << 30;

/// What is added to the sequence number of a segment while the header is due, and what else is to be done with it.
///
/// A segment with the stream's first number takes the header along. So does a probe, which has the number before that one, and is
/// sent where nothing has been said: what it asks is answered by the header's acknowledgement as well. Whatever else begins before the
/// header's end stays here, or a consumer could write a header of its own.
#[inline(always)]
fn header<F: Frame, const AT: usize>(frame: &F, tcp: &Tcp, stream: &Stream) -> (u32, Carried) {
    let offset = tcp.sequence.get().wrapping_sub(stream.initial.wrapping_add(1));
    match offset {
        _ if tcp.flags & RST != 0 && stream.marks & HEADER_SENT == 0 => (0, Carried::Done),
        _ if tcp.flags & RST != 0 => (stream.forward, Carried::Done),
        _ if stream.marks & GREETED == 0 => (0, Carried::Ahead),
        // It is yet to be cut into segments, each of which would take the header along. Where the target has not been sent it, the
        // first segment comes again by itself.
        0 if is_yet_to_be_cut::<F, AT>(frame) => match stream.marks & HEADER_SENT {
            0 => (0, Carried::Unknown),
            _ => (stream.forward, Carried::Done),
        },
        0 => (0, Carried::Insert),
        u32::MAX if is_empty::<F, AT>(frame, tcp) => (1, Carried::Insert),
        1..WINDOW => (stream.forward, Carried::Done),
        _ => (0, Carried::Ahead),
    }
}

/// Whether a device will make several segments of this one.
#[inline(always)]
fn is_yet_to_be_cut<F: Frame, const AT: usize>(frame: &F) -> bool {
    let total = length::<F, AT>(frame);
    frame.largest(total) < u32::from(total)
}

/// The length of the packet.
#[inline(always)]
fn length<F: Frame, const AT: usize>(frame: &F) -> u16 {
    if AT == TRANSPORT {
        return frame.read::<U16>(NETWORK + offset_of!(Ipv4Header, total_length)).unwrap_or_default().get();
    }
    let payload = frame.read::<U16>(NETWORK + offset_of!(Ipv6Header, payload_length)).unwrap_or_default();
    payload.get().saturating_add(40)
}

/// Whether a segment has no data.
#[inline(always)]
fn is_empty<F: Frame, const AT: usize>(frame: &F, tcp: &Tcp) -> bool {
    usize::from(length::<F, AT>(frame)) == AT - NETWORK + usize::from(tcp.data_offset >> 4) * 4
}

/// What is added to what the target acknowledges: nothing of the header is the consumer's, so that a part of it counts as nothing.
#[inline(always)]
fn acknowledged<K: Key, T: Flows<K>>(tables: &T, key: &K, tcp: &Tcp, stream: &mut Stream) -> u32 {
    let first = stream.initial.wrapping_add(1);
    let heard = tcp.acknowledgement.get().wrapping_sub(first);
    // Less than nothing is of before the stream (RFC 9293, 3.4).
    if heard < stream.forward {
        return heard.wrapping_neg();
    }
    if heard < 1 << 31 {
        stream.marks &= !(HEADER_DUE | HEADER_SENT);
        // It was there a moment ago. If it is not now, neither is the flow.
        let _ = tables.set_stream(key, stream);
    }
    stream.forward.wrapping_neg()
}

/// The target's SYN-ACK: acknowledges a SYN, which is not shifted, and leaves the consumer's first segment room for the header. Not
/// inlined, as above.
#[inline(never)]
pub(super) fn greet<F: Frame, const AT: usize>(frame: &mut F) -> u64 {
    let Some(tcp) = frame.read::<Tcp>(AT) else { return 0 };
    let mss = options::mss::<F, AT>(frame);
    #[allow(clippy::cast_possible_truncation, reason = "an MSS, and a folded sum")]
    let mut change = options::clamp::<F, AT>(frame, (mss as u16).saturating_sub(LENGTH)) as u32;
    let window = U16::new(tcp.window.get().saturating_sub(LENGTH));
    change += u32::from(delta(word(tcp.window.to_bytes()), word(window.to_bytes())));
    let change = Change { pseudo: 0, header: fold(change) };
    let written = frame
        .write(AT + offset_of!(Tcp, window), &window)
        .and_then(|()| frame.change_checksum(AT + offset_of!(Tcp, checksum), tcp.checksum, true, change));
    written.map_or(0, |()| 1)
}

/// Whether this is a target's answer to a SYN of the path's.
#[inline(always)]
fn is_greeting(tcp: &Tcp, flow: &Course) -> bool {
    flow.way & COOKIE != 0 && tcp.flags & (SYN | ACK) == SYN | ACK
}

/// The key of the consumer's packets of a flow.
#[inline(always)]
pub(super) fn consumers<K: Key>(packet: &Packet<K>, flow: &K::Flow) -> K {
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
        sack: stream.backward.wrapping_neg(),
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
        sack: stream.forward.wrapping_neg(),
        stamp: stream.timestamps,
        echo: 0,
        window: stream.target_window.into(),
    }
}

/// A RST that answers the path's SYN counts as the next byte that the consumer expects, or it would not be believed (RFC 5961, 3.2).
#[inline(always)]
fn refused(tcp: &Tcp, stream: &Stream) -> Shift {
    let sequence = stream.cookie.wrapping_add(1).wrapping_sub(tcp.sequence.get());
    Shift { sequence, acknowledgement: 0, sack: 0, stamp: 0, echo: 0, window: 0 }
}

/// Shifts the numbers of the segment whose header is `tcp`.
#[inline(always)]
fn shift<F: Frame, const AT: usize>(frame: &mut F, tcp: &Tcp, by: &Shift) -> Option<()> {
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
    if tcp.data_offset > 5 << 4 && by.sack | by.stamp | by.echo != 0 {
        let numbers = Numbers { sack: by.sack, stamp: by.stamp, echo: by.echo };
        #[allow(clippy::cast_possible_truncation, reason = "a sum of a few folded words")]
        {
            change += options::shift::<F, AT>(frame, &numbers) as u32;
        }
    }
    let changed = Changed(sequence, acknowledgement, [tcp.data_offset, tcp.flags], window);
    frame.write(AT + offset_of!(Tcp, sequence), &changed)?;
    let change = Change { pseudo: 0, header: fold(change) };
    frame.change_checksum(AT + offset_of!(Tcp, checksum), tcp.checksum, true, change)
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
