//! SYN cookies: a flooded endpoint's SYNs are answered without remembering them, and only who answers that opens a flow.
//!
//! ```text
//!   consumer                          path                             target
//!   SYN ─────────────────────────────▶ │
//!   ◀──────── SYN-ACK: cookie, window 0 │
//!   ACK of the cookie ────────────────▶ │ SYN with the consumer's number ────▶
//!                                       │ ◀────────────────────────────SYN-ACK
//!   ◀── a byte it has; the target's window
//!   ACK, with data if it has some ────▶ │ ACK ───────────────────────────────▶
//! ```
//!
//! The window of zero keeps the consumer from sending what could only be dropped. The byte that tells it of the target's window lies
//! before what it expects, where the SYN was: every side answers such a segment at once (RFC 9293, 3.10.7.4), so that a target that
//! speaks first hears that it may. Whatever the consumer says before the target has answered becomes the SYN again, so that a lost one
//! is repeated by keepalives and probes of the window.
//!
//! The cookie is the kernel's. It says who shook hands with which endpoint, and the consumer's MSS, roughly, by being one of a few that are
//! tried. What else the consumer offered is in the low bits of the timestamp that it echoes; one without timestamps gets neither a
//! window's scale nor SACK, as with the kernel's own cookies.
//!
//! The TCP header is at `AT`: of what the consumer is answered, behind a header of its own family; of what goes on, behind one of the family
//! that it goes to.

use super::options::{self, Offer, SCALE, STAMPED};
use super::parse::{Packet, is_for_many};
use super::proxy;
use super::segment::{self, Segment};
use super::state::State;
use super::stream::{consumers, scaled};
use crate::frame::{DIFFERENCE, Frame};
use crate::limits::{COOKIE_LIFE, COOKIE_MSS, COOKIES_HOLD};
use crate::tables::{
    Endpoint, Flows, GREETED, HEADER_DUE, Handshake, InsertError, Key, Listener, Stream, Tables, UNANSWERED,
    Width,
};
use crate::verdict::{Answer, DropReason, Verdict};
use crate::wire::{ACK, SYN, Tcp};
use core::mem::offset_of;
use zerocopy::big_endian::U32;

/// The values of a consumer's MSS that a cookie tells apart; one without the option has the first (RFC 9293, 3.7.1).
const MSS: [u16; 4] = [536, 1300, 1380, 1460];
/// The power of two that the path promises to multiply windows by: a flow's windows are put into it.
const WINDOW_SCALE: u8 = 7;
/// How far a cookie's MSS lies above the endpoint's number, of which there are fewer than 2^20.
const MSS_AT: u32 = 30;
/// Ticks a second of the timestamps in cookies, whose low bits are the consumer's offer.
const TICKS: u32 = 64;

/// What happened at an endpoint whose SYNs may be answered with cookies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Happened {
    /// A SYN came.
    Syn = 0,
    /// A consumer confirmed its flow.
    Confirmed = 1,
    /// An ACK of no flow came.
    Ack = 2,
}

/// [`of`]: its targets are sent the Proxy Protocol's header.
const PROXIED: u32 = 1 << 31;

/// [`of`]: the flow is to be a wide one.
const WIDE: u32 = 1 << 30;
/// What an IPv6 header is longer by than an IPv4 header.
#[allow(clippy::cast_possible_truncation, reason = "twenty")]
const LONGER: u16 = DIFFERENCE as u16;

/// An endpoint's number, which is far below 2^30, whether the listener's targets are sent a header, and whether one side has the longer
/// headers.
#[inline(always)]
pub(super) const fn of(endpoint: u32, listener: &Listener, wide: bool) -> u32 {
    let marks = if wide { WIDE } else { 0 };
    if listener.proxied != 0 { endpoint | marks | PROXIED } else { endpoint | marks }
}

/// Counts what happened, and says whether cookies concern it: a SYN is to be answered with one, an ACK may bear one.
#[inline(always)]
pub(super) fn concerns<T: Tables>(
    tables: &T,
    id: u32,
    endpoint: &Endpoint,
    now: u32,
    happened: Happened,
) -> bool {
    endpoint.cookies != 0 && count(tables, id, endpoint.cookies, now, happened) != 0
}

/// Not inlined: the kernel bounds a function's stack.
#[inline(never)]
fn count<T: Tables>(tables: &T, id: u32, cookies: u32, now: u32, happened: Happened) -> u64 {
    let Some(mut pressure) = tables.pressure(id) else { return 0 };
    if happened == Happened::Ack {
        let last = pressure.until.saturating_add(COOKIE_LIFE);
        return u64::from(pressure.until != 0 && now < last);
    }
    if pressure.second != now {
        (pressure.second, pressure.unconfirmed) = (now, 0);
    }
    if happened == Happened::Confirmed {
        pressure.unconfirmed = pressure.unconfirmed.saturating_sub(1);
    } else {
        pressure.unconfirmed += 1;
    }
    if pressure.unconfirmed >= cookies {
        pressure.until = now + COOKIES_HOLD;
    }
    tables.set_pressure(id, pressure);
    u64::from(happened == Happened::Syn && now < pressure.until)
}

/// Turns a SYN into the SYN-ACK that bears the cookie. Not inlined: the kernel bounds a function's stack.
#[inline(never)]
pub(super) fn answer<F: Frame, T: Tables, K: Key, const AT: usize>(
    frame: &mut F,
    tables: &T,
    packet: &Packet<K>,
    endpoint: u32,
    now: u32,
) -> Verdict {
    Verdict::of(answered::<F, T, K, AT>(frame, tables, packet, endpoint, now))
}

#[inline(always)]
fn answered<F: Frame, T: Tables, K: Key, const AT: usize>(
    frame: &mut F,
    tables: &T,
    packet: &Packet<K>,
    endpoint: u32,
    now: u32,
) -> Result<Verdict, DropReason> {
    if is_for_many(frame) {
        return Err(DropReason::LinkLayerGroup);
    }
    let at = AT + offset_of!(Tcp, sequence);
    let initial = frame.read::<U32>(at).ok_or(DropReason::Malformed)?.get();
    let mut offer = Offer { mss: 0, bits: 0, stamp: 0, echo: 0 };
    options::read::<F, AT>(frame, &mut offer);
    let bits = offered(&offer);
    let sequence = bake(tables, packet, endpoint, initial, offer.mss);
    if sequence == NONE {
        return Err(DropReason::FlowTableFull);
    }
    #[allow(clippy::cast_possible_truncation, reason = "a sequence number")]
    let sequence = sequence as u32;
    let longer = if endpoint & WIDE == 0 { 0 } else { LONGER };
    let header = if endpoint & PROXIED == 0 { 0 } else { proxy::LENGTH };
    let mss = COOKIE_MSS - longer - header;
    let stamp = now.wrapping_mul(TICKS) | u32::from(bits);
    let (options, words) = segment::offer(mss, bits, WINDOW_SCALE, stamp, offer.stamp);
    let acknowledgement = initial.wrapping_add(1);
    let flags = SYN | ACK;
    put::<F, AT>(
        frame,
        &Segment { back: true, flags, window: 0, sequence, acknowledgement, options, words, data: 0 },
    )?;
    Ok(Verdict::answer(Answer::SynCookie.code()))
}

/// What [`bake`] returns where the kernel makes no cookies.
const NONE: u64 = u64::MAX;

/// The cookie of a SYN. Not inlined, as above: it takes headers together.
#[inline(never)]
fn bake<T: Tables, K: Key>(tables: &T, packet: &Packet<K>, endpoint: u32, initial: u32, mss: u32) -> u64 {
    tables.syn_cookie(&handshake(packet, endpoint, initial, nearest(mss))).map_or(NONE, u64::from)
}

/// What of an offer fits into a timestamp's low bits: everything, or nothing where there are no timestamps.
#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "six bits")]
const fn offered(offer: &Offer) -> u8 {
    if offer.bits & STAMPED as u32 == 0 { SCALE } else { offer.bits as u8 & 0x3f }
}

/// Which of [`MSS`] is the largest that is not above the consumer's.
#[inline(always)]
fn nearest(mss: u32) -> u32 {
    let fits = |it: u16| u32::from(u32::from(it) <= mss);
    fits(MSS[1]) + fits(MSS[2]) + fits(MSS[3])
}

#[inline(always)]
fn handshake<K: Key>(packet: &Packet<K>, endpoint: u32, initial: u32, mss: u32) -> Handshake {
    Handshake {
        source: packet.key.source().widen(),
        endpoint: endpoint & ((1 << MSS_AT) - 1) | mss << MSS_AT,
        source_port: packet.key.source_port(),
        destination_port: packet.key.destination_port(),
        initial,
    }
}

/// Whether an ACK bears a right cookie: 1, or 0. If it does, what it says of its consumer is remembered for the flow that it opens; where
/// there is no room for that, it is as wrong as any. Not inlined, as above.
#[inline(never)]
pub(super) fn check<F: Frame, T: Tables + Flows<K>, K: Key, const AT: usize>(
    frame: &F,
    tables: &T,
    packet: &Packet<K>,
    endpoint: u32,
) -> u64 {
    let Some(tcp) = frame.read::<Tcp>(AT) else { return 0 };
    let (initial, cookie) = (tcp.sequence.get().wrapping_sub(1), tcp.acknowledgement.get().wrapping_sub(1));
    // The likeliest first.
    for index in [3, 2, 1, 0] {
        if tables.is_syn_cookie(&handshake(packet, endpoint, initial, index), cookie) {
            let due = if endpoint & PROXIED == 0 { 0 } else { HEADER_DUE | GREETED };
            let begun = begin::<F, T, K, AT>(frame, tables, packet, &tcp, MSS[index as usize], due);
            return begun.map_or(0, |()| 1);
        }
    }
    0
}

#[inline(always)]
fn begin<F: Frame, T: Flows<K>, K: Key, const AT: usize>(
    frame: &F,
    tables: &T,
    packet: &Packet<K>,
    tcp: &Tcp,
    mss: u16,
    due: u8,
) -> Result<(), InsertError> {
    let mut offer = Offer { mss: 0, bits: 0, stamp: 0, echo: 0 };
    options::read::<F, AT>(frame, &mut offer);
    #[allow(clippy::cast_possible_truncation, reason = "six bits")]
    let bits = if offer.bits & u32::from(STAMPED) == 0 { SCALE } else { offer.echo as u8 & 0x3f };
    let stream = Stream {
        initial: tcp.sequence.get().wrapping_sub(1),
        cookie: tcp.acknowledgement.get().wrapping_sub(1),
        stamp: offer.echo,
        mss,
        offer: bits,
        marks: UNANSWERED | due,
        forward: if due == 0 { 0 } else { proxy::LENGTH.into() },
        ..Stream::default()
    };
    tables.set_stream(&packet.key, &stream)
}

/// Turns whatever the consumer says before the target has answered into the SYN that the target is asked by; its addresses have been
/// rewritten.
#[inline(never)]
pub(super) fn ask_target<F: Frame, T: Flows<K>, K: Key, const AT: usize>(
    frame: &mut F,
    tables: &T,
    packet: &Packet<K>,
    flow: &K::Flow,
) -> Verdict {
    Verdict::of(asked::<F, T, K, AT>(frame, tables, packet, flow).map(|()| Verdict::PASS))
}

#[inline(always)]
fn asked<F: Frame, T: Flows<K>, K: Key, const AT: usize>(
    frame: &mut F,
    tables: &T,
    packet: &Packet<K>,
    flow: &K::Flow,
) -> Result<(), DropReason> {
    let stream = tables.stream(&consumers(packet, flow)).ok_or(DropReason::NoFlow)?;
    let tcp = frame.read::<Tcp>(AT).ok_or(DropReason::Malformed)?;
    let mut offer = Offer { mss: 0, bits: 0, stamp: 0, echo: 0 };
    options::read::<F, AT>(frame, &mut offer);
    let scale = Offer::scale(stream.offer).unwrap_or(0);
    let (options, words) = segment::offer(stream.mss, stream.offer, scale, offer.stamp, 0);
    // A SYN's window is never scaled (RFC 7323, 2.2).
    let window = scaled(tcp.window.get(), scale.into());
    let sequence = stream.initial;
    put::<F, AT>(
        frame,
        &Segment { back: false, flags: SYN, window, sequence, acknowledgement: 0, options, words, data: 0 },
    )
}

/// Notes what the target counts by, from its SYN-ACK. Not inlined, as above.
#[inline(never)]
pub(super) fn hear_target<F: Frame, T: Flows<K>, K: Key, const AT: usize>(
    frame: &F,
    tables: &T,
    packet: &Packet<K>,
    flow: &K::Flow,
) -> Verdict {
    Verdict::of(heard::<F, T, K, AT>(frame, tables, packet, flow).map(|()| Verdict::PASS))
}

#[inline(always)]
fn heard<F: Frame, T: Flows<K>, K: Key, const AT: usize>(
    frame: &F,
    tables: &T,
    packet: &Packet<K>,
    flow: &K::Flow,
) -> Result<(), DropReason> {
    if flow.state >= State::Established as u8 {
        return Ok(());
    }
    let key = consumers(packet, flow);
    let mut stream = tables.stream(&key).ok_or(DropReason::NoFlow)?;
    let tcp = frame.read::<Tcp>(AT).ok_or(DropReason::Malformed)?;
    let mut offer = Offer { mss: 0, bits: 0, stamp: 0, echo: 0 };
    options::read::<F, AT>(frame, &mut offer);
    learn(&mut stream, tcp.sequence.get(), &offer);
    tables.set_stream(&key, &stream).map_err(|_| DropReason::FlowTableFull)
}

/// Turns the target's SYN-ACK into the segment that tells the consumer its window; its addresses have been rewritten. Not inlined, as
/// above.
#[inline(never)]
pub(super) fn tell_consumer<F: Frame, T: Flows<K>, K: Key, const AT: usize>(
    frame: &mut F,
    tables: &T,
    packet: &Packet<K>,
    flow: &K::Flow,
) -> Verdict {
    Verdict::of(told::<F, T, K, AT>(frame, tables, packet, flow).map(|()| Verdict::PASS))
}

#[inline(always)]
fn told<F: Frame, T: Flows<K>, K: Key, const AT: usize>(
    frame: &mut F,
    tables: &T,
    packet: &Packet<K>,
    flow: &K::Flow,
) -> Result<(), DropReason> {
    let stream = tables.stream(&consumers(packet, flow)).ok_or(DropReason::NoFlow)?;
    let tcp = frame.read::<Tcp>(AT).ok_or(DropReason::Malformed)?;
    let mut offer = Offer { mss: 0, bits: 0, stamp: 0, echo: 0 };
    options::read::<F, AT>(frame, &mut offer);
    let scale = Offer::scale(stream.offer).map_or(0, |_| WINDOW_SCALE);
    let (options, words) = segment::stamps(stream.offer, stream.stamp, offer.echo);
    let (sequence, acknowledgement) = (stream.cookie, stream.initial.wrapping_add(1));
    let window = tcp.window.get() >> scale;
    put::<F, AT>(
        frame,
        &Segment { back: false, flags: ACK, window, sequence, acknowledgement, options, words, data: 1 },
    )
}

/// What a target's SYN-ACK says of how it counts.
#[inline(always)]
#[allow(clippy::cast_possible_truncation, clippy::cast_possible_wrap, reason = "scales are at most 14")]
fn learn(stream: &mut Stream, initial: u32, offer: &Offer) {
    stream.backward = stream.cookie.wrapping_sub(initial);
    stream.timestamps =
        if offer.bits & u32::from(STAMPED) == 0 { 0 } else { stream.stamp.wrapping_sub(offer.stamp) };
    (stream.target_window, stream.consumer_window) =
        match (Offer::scale(stream.offer), Offer::scale(offer.bits as u8)) {
            (Some(_), Some(target)) => (target as i8 - WINDOW_SCALE as i8, 0),
            // A target that scales nothing takes the consumer's windows as they are written, too.
            (Some(consumer), None) => (-(WINDOW_SCALE as i8), consumer as i8),
            (None, _) => (0, 0),
        };
    stream.marks &= !UNANSWERED;
}

#[inline(always)]
fn put<F: Frame, const AT: usize>(frame: &mut F, segment: &Segment) -> Result<(), DropReason> {
    match segment::put::<F, AT>(frame, segment) {
        0 => Err(DropReason::Malformed),
        _ => Ok(()),
    }
}
