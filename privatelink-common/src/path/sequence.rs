//! Sequence numbers of TCP flows (RFC 9293, 3.4): how far each side has sent, and how far it has acknowledged what the other has.
//!
//! Each direction's entry notes both as its packets have them, so that a packet writes to its own entry alone. What is in flight in a
//! direction is what its packets have sent and the other direction's have not acknowledged; an ICMP error is about that, or it is forged or
//! late (RFC 5927, 4.1), and so is a RST.
//!
//! A number that is zero is one that nobody knows yet. One flow in four billion has it, and is believed more than others for a moment.

use super::parse::Packet;
use super::proxy::LENGTH;
use crate::checksum::{address, delta, update, word};
use crate::frame::Frame;
use crate::tables::{COOKIE, Course, Entry, Flows, HEADER_DUE, Key, Stream};
use crate::verdict::Direction;
use crate::wire::{
    ACK, DESTINATION_UNREACHABLE, FRAGMENTATION_NEEDED, IcmpError, Ipv4Header, NETWORK, PACKET_TOO_BIG, RST,
    SYN, TRANSPORT, Tcp,
};
use core::mem::{offset_of, size_of};
use zerocopy::{
    FromBytes,
    big_endian::{U16, U32},
};

/// How far what a SYN or a SYN-ACK begins may reach before it is acknowledged: their windows are not scaled (RFC 7323, 2.2).
const FIRST_WINDOW: u32 = 0xffff;

/// The later one of two numbers. Without a branch, since the kernel's verifier would go each way of it.
#[inline(always)]
#[allow(clippy::cast_possible_wrap, clippy::cast_sign_loss, reason = "the sign is which one is ahead")]
const fn later(known: u32, heard: u32) -> u32 {
    let ahead = heard.wrapping_sub(known);
    let is_ahead = !((ahead as i32) >> 31) as u32;
    known.wrapping_add(ahead & is_ahead)
}

/// How far a segment sends and what it acknowledges, in one register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub(super) struct Numbers(u64);

impl Numbers {
    /// Those of a segment with so many bytes of data. A frame that a device has yet to cut into segments has the data of all of them.
    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "as far as sequence numbers count")]
    pub(super) const fn of(tcp: &Tcp, data: usize) -> Self {
        let sent = tcp.sequence.get().wrapping_add(data as u32);
        Self(sent as u64 | (tcp.acknowledgement.get() as u64) << 32)
    }

    /// The number behind its last byte.
    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "the lower half")]
    const fn sent(self) -> u32 {
        self.0 as u32
    }

    /// What it acknowledges, where it has the flag for that.
    #[inline(always)]
    const fn acknowledged(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// An IPv4 header and a TCP header, which are behind each other.
#[derive(Clone, Copy, FromBytes)]
#[repr(C)]
struct Headers(Ipv4Header, Tcp);

/// The numbers of a segment over IPv4 whose headers are whole and agree with each other.
#[inline(always)]
pub(super) fn read<F: Frame>(frame: &F) -> Option<Numbers> {
    let Headers(ip, tcp) = frame.read::<Headers>(NETWORK)?;
    let headers = size_of::<Ipv4Header>() + usize::from(tcp.data_offset >> 4) * 4;
    Some(Numbers::of(&tcp, frame.ip_length(ip.total_length.get()).wrapping_sub(headers)))
}

/// Puts them into `numbers`; none where there is no such segment. Not inlined, so that the kernel's verifier goes on in one way.
#[inline(never)]
pub(super) fn note<F: Frame>(frame: &F, numbers: &mut Numbers) {
    *numbers = read(frame).unwrap_or_default();
}

/// Whether the numbers of an established flow's packet are worth following: a datagram has none, and a SYN or a RST may be anybody's, and
/// says nothing of how far a side has come.
#[inline(always)]
pub(super) const fn counts<K: Key>(packet: &Packet<K>) -> bool {
    packet.flags & (ACK | SYN | RST) == ACK
}

/// Follows a segment of an established flow, of whose entry `flow` is a copy. Most move one of the numbers on; to ask whether this one does
/// would take as long as to write both.
#[inline(always)]
pub(super) fn follow<F, E: Entry<F>>(numbers: Numbers, entry: &E, flow: &Course) {
    entry.set_numbers(later(flow.sent, numbers.sent()), later(flow.acknowledged, numbers.acknowledged()));
}

/// Notes a packet of a flow that is opening in `flow`. A SYN says where its side begins, however often it did before.
#[inline(always)]
pub(super) fn begin<K: Key>(packet: &Packet<K>, numbers: Numbers, flow: &mut Course) {
    if !packet.is_tcp() {
        return;
    }
    let is_known = packet.flags & SYN == 0 && flow.sent != 0;
    flow.sent = if is_known { later(flow.sent, numbers.sent()) } else { numbers.sent() };
    if packet.flags & ACK != 0 {
        flow.acknowledged = numbers.acknowledged();
    }
}

/// Whether a segment with this number can be in flight, where its side has `sent` so far and the other has `acknowledged` so much.
///
/// A segment without data has the number that is sent next. A FIN counts as a byte that is not in what was sent, so that one more may be
/// acknowledged. Who acknowledges more lies, or what was noted is not true any more: then it is as if nothing were known.
#[inline(always)]
const fn is_in_flight(number: u32, sent: u32, acknowledged: u32) -> bool {
    const MOST: u32 = i32::MAX as u32;
    let before = sent.wrapping_sub(number);
    match (sent, acknowledged, sent.wrapping_sub(acknowledged)) {
        (0, ..) => true,
        (_, 0, _) => before <= FIRST_WINDOW,
        (.., flight @ 0..=MOST) => before <= flight,
        (.., u32::MAX) => false,
        _ => true,
    }
}

/// Whether a RST may come from who it says (RFC 5961, 3.2), by its `numbers`: of a flow's direction whose entry is `flow`, where the other side has
/// `acknowledged` so much of it. What it counts by is known of no flow whose sides count differently.
#[inline(always)]
pub(super) fn is_reset(numbers: Numbers, flow: &Course, acknowledged: u32) -> bool {
    // One that follows a FIN counts it.
    let most = flow.sent.wrapping_add(1);
    flow.is_shifted()
        || flow.sent == 0
        || acknowledged == 0
        || is_in_flight(numbers.sent(), most, acknowledged)
}

/// Whether an error about a segment may be true that left with this `number`, and whose side had `sent` so far; `answers` is the entry of
/// what answers it, and `key` the key of the consumer's packets.
#[inline(always)]
pub(super) fn is_true<K: Key, T: Flows<K>>(
    tables: &T,
    key: &K,
    answers: &Course,
    number: u32,
    sent: u32,
) -> bool {
    if !answers.is_shifted() {
        return is_in_flight(number, sent, answers.acknowledged);
    }
    let Some(stream) = tables.stream(key) else { return false };
    let acknowledged = match answers.acknowledged {
        0 => 0,
        known => original(&stream, answers, known),
    };
    is_in_flight(original(&stream, answers, number), sent, acknowledged)
}

/// What a side called a number of its own that the other side knows as `number`; `answers` is the entry of the other side's packets.
///
/// The Proxy Protocol's header belongs to what the consumer sent first. The path's own SYN to a target speaks for what the consumer said
/// when its own was long acknowledged.
#[inline(always)]
fn original(stream: &Stream, answers: &Course, number: u32) -> u32 {
    if answers.direction() == Direction::ToProvider {
        return number.wrapping_sub(stream.backward);
    }
    let first = stream.initial.wrapping_add(1);
    match number.wrapping_sub(first) {
        u32::MAX if answers.way & COOKIE == 0 => stream.initial,
        u32::MAX => first,
        behind if behind < stream.forward => first,
        _ => number.wrapping_sub(stream.forward),
    }
}

/// What a segment's sender said it acknowledges, where it left with `number`.
#[inline(always)]
fn acknowledged(stream: &Stream, answers: &Course, number: u32) -> u32 {
    match answers.direction() {
        Direction::ToProvider => number.wrapping_add(stream.forward),
        Direction::ToConsumer => number.wrapping_add(stream.backward),
    }
}

/// Gives the segment at `AT` in an error, of which so many bytes are `held`, back the numbers that its sender gave it, and brings its
/// checksum and the one of the message at `ICMP` up to date. Returns 1, or 0 where there is no such segment.
///
/// Windows, timestamps and SACK blocks stay as the other side knows them: nobody looks at them. Not inlined: few flows need it.
#[inline(never)]
pub(super) fn restore<F: Frame, T: Flows<K>, K: Key, const ICMP: usize, const AT: usize>(
    frame: &mut F,
    tables: &T,
    key: &K,
    answers: &Course,
    held: usize,
) -> u64 {
    let Some(stream) = tables.stream(key) else { return 0 };
    write::<F, ICMP, AT>(frame, &stream, answers, held).map_or(0, |()| 1)
}

#[inline(always)]
fn write<F: Frame, const ICMP: usize, const AT: usize>(
    frame: &mut F,
    stream: &Stream,
    answers: &Course,
    held: usize,
) -> Option<()> {
    let at = AT + offset_of!(Tcp, sequence);
    let left = frame.read::<U32>(at)?;
    let number = U32::new(original(stream, answers, left.get()));
    frame.write(at, &number)?;
    let mut change = u32::from(delta(address(left.to_bytes()), address(number.to_bytes())));
    let has_header = stream.marks & HEADER_DUE != 0 && answers.direction() == Direction::ToConsumer;
    if has_header && number.get() == stream.initial.wrapping_add(1) {
        change += shorten::<F, ICMP>(frame)?;
    }
    if held >= END_OF_ACKNOWLEDGEMENT {
        change += acknowledgement::<F, AT>(frame, stream, answers, held)?;
    }
    if held >= END_OF_CHECKSUM {
        let at = AT + offset_of!(Tcp, checksum);
        let stored = frame.read::<[u8; 2]>(at)?;
        let updated = update(stored, change);
        frame.write(at, &updated)?;
        change += u32::from(delta(word(stored), word(updated)));
    }
    let at = ICMP + offset_of!(IcmpError, checksum);
    let checksum = update(frame.read::<[u8; 2]>(at)?, change);
    frame.write(at, &checksum)
}

/// Lowers the MTU that an error says, which is about a segment that left with the Proxy Protocol's header, by that. Returns what it changes of
/// a checksum.
#[inline(always)]
fn shorten<F: Frame, const ICMP: usize>(frame: &mut F) -> Option<u32> {
    let error = frame.read::<IcmpError>(ICMP)?;
    let too_big = if ICMP == TRANSPORT {
        [error.kind, error.code] == [DESTINATION_UNREACHABLE, FRAGMENTATION_NEEDED]
    } else {
        error.kind == PACKET_TOO_BIG
    };
    // An old router does not say which (RFC 1191, 5).
    if !too_big || error.mtu.get() <= LENGTH {
        return Some(0);
    }
    let mtu = U16::new(error.mtu.get() - LENGTH);
    frame.write(ICMP + offset_of!(IcmpError, mtu), &mtu)?;
    Some(delta(word(error.mtu.to_bytes()), word(mtu.to_bytes())).into())
}

/// How much of a TCP header holds what it acknowledges, its flags, and its checksum.
const END_OF_ACKNOWLEDGEMENT: usize = offset_of!(Tcp, acknowledgement) + 4;
const END_OF_FLAGS: usize = offset_of!(Tcp, flags) + 1;
const END_OF_CHECKSUM: usize = offset_of!(Tcp, checksum) + 2;

/// The same of what the segment acknowledges; of a SYN-ACK, that is a SYN, which both sides count the same. Returns what it changes of a
/// checksum.
#[inline(always)]
fn acknowledgement<F: Frame, const AT: usize>(
    frame: &mut F,
    stream: &Stream,
    answers: &Course,
    held: usize,
) -> Option<u32> {
    let flags = if held < END_OF_FLAGS { ACK } else { frame.read::<u8>(AT + offset_of!(Tcp, flags))? };
    if flags & (SYN | ACK) != ACK {
        return Some(0);
    }
    let at = AT + offset_of!(Tcp, acknowledgement);
    let left = frame.read::<U32>(at)?;
    let said = U32::new(acknowledged(stream, answers, left.get()));
    frame.write(at, &said)?;
    Some(delta(address(left.to_bytes()), address(said.to_bytes())).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_neither_sent_nor_unacknowledged_is_not_in_flight() {
        for base in [1, 5000, 0x7fff_ff00, 0xffff_ff00] {
            let at = |offset: u32| u32::wrapping_add(base, offset);
            // 1000 bytes were sent, 600 of them are acknowledged.
            let in_flight = |offset| is_in_flight(at(offset), at(1000), at(600));
            assert!([600, 601, 999, 1000].into_iter().all(in_flight), "{base}");
            assert!(![599, 1001, 0, 1 << 31, u32::MAX].into_iter().any(in_flight), "{base}");
            // All of it, and all and a FIN.
            assert!(is_in_flight(at(1000), at(1000), at(1000)) && !is_in_flight(at(999), at(1000), at(1000)));
            assert!(!is_in_flight(at(1000), at(1000), at(1001)), "{base}");
            // More than was sent: somebody lies.
            assert!(is_in_flight(at(7), at(1000), at(5000)), "{base}");
        }
    }

    #[test]
    fn what_is_not_known_refuses_nothing_and_a_side_that_was_not_answered_has_sent_a_window_at_most() {
        assert!(is_in_flight(77, 0, 0) && is_in_flight(77, 0, 5));
        assert!(is_in_flight(1000, 1000, 0) && is_in_flight(900, 1000, 0));
        assert!(!is_in_flight(1001, 1000, 0) && !is_in_flight(1000_u32.wrapping_sub(0x1_0000), 1000, 0));
    }

    proptest! {
        #[test]
        fn the_later_number_is_the_one_that_is_less_than_half_of_them_ahead(known: u32, ahead: u32) {
            let heard = known.wrapping_add(ahead);
            prop_assert_eq!(later(known, heard), if ahead < 1 << 31 { heard } else { known });
        }

        #[test]
        fn what_was_restored_is_what_was_sent(
            initial: u32, backward: u32, forward in prop_oneof![Just(0_u32), Just(100)], data in 0_u32..1 << 20, target: u32,
        ) {
            let stream = Stream { initial, backward, forward, ..Stream::default() };
            let answers = |way| Course { way, ..Course::default() };
            let consumers = initial.wrapping_add(1).wrapping_add(data);
            let left = if data == 0 { consumers } else { consumers.wrapping_add(forward) };
            let to_consumer = answers(Direction::ToConsumer as u8);
            prop_assert_eq!(original(&stream, &to_consumer, left), consumers);
            prop_assert_eq!(original(&stream, &to_consumer, initial), initial, "its SYN");
            let to_provider = answers(Direction::ToProvider as u8);
            prop_assert_eq!(original(&stream, &to_provider, target.wrapping_add(backward)), target);
        }
    }
}
