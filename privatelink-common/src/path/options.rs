//! TCP options: what a SYN offers, and the numbers in the others that are shifted with their flow's.
//!
//! The TCP header is at `AT`. As many options as Linux ever sends are looked at, padding included; what is behind them is left as it is.

use crate::checksum::{address, delta, fold, word};
use crate::frame::{Change, Frame};
use crate::wire::Tcp;
use core::mem::offset_of;
use zerocopy::big_endian::{U16, U32};

/// How far into a TCP header the options are.
const OPTIONS: usize = size_of::<Tcp>();
/// SACK blocks that fit into a header.
const BLOCKS: usize = 4;

const END: u8 = 0;
const PADDING: u8 = 1;
const MSS: u8 = 2;
const WINDOW_SCALE: u8 = 3;
const SACK_PERMITTED: u8 = 4;
const SACK: u8 = 5;
const TIMESTAMPS: u8 = 8;
const FAST_OPEN: u8 = 34;
/// Experiments (RFC 6994), by which Linux asks for TCP Fast Open where nobody has answered the other.
const EXPERIMENT: u8 = 254;

/// Where [`find`] puts the cookie of TCP Fast Open (RFC 7413): in the place of an option that is no longer used (RFC 6247).
const FAST_OPEN_PLACE: u8 = 6;

/// The longest such option.
const FAST_OPEN_LENGTH: usize = 20;

/// [`Offer::bits`]: the window scale, or that there is none.
pub(super) const SCALE: u8 = 0x0f;
/// [`Offer::bits`]: SACK is permitted.
pub(super) const SACK_OK: u8 = 0x10;
/// [`Offer::bits`]: there are timestamps.
pub(super) const STAMPED: u8 = 0x20;

/// What the options of a segment offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Offer {
    /// The MSS; 0: it does not say.
    pub mss: u32,
    /// [`SCALE`], [`SACK_OK`] and [`STAMPED`].
    pub bits: u32,
    /// The sender's timestamp, if there is one.
    pub stamp: u32,
    /// The timestamp that it echoes, likewise.
    pub echo: u32,
}

impl Offer {
    /// The power of two that the sender's windows are multiplied by (RFC 7323, 2.2), if it scales them.
    #[inline(always)]
    pub(super) const fn scale(bits: u8) -> Option<u8> {
        match bits & SCALE {
            SCALE => None,
            scale => Some(scale),
        }
    }
}

/// Length of the options, in bytes: up to 40.
#[inline(always)]
fn length<F: Frame, const AT: usize>(frame: &F) -> usize {
    let offset = frame.read::<u8>(AT + offset_of!(Tcp, data_offset)).unwrap_or_default();
    (usize::from(offset >> 4) * 4).saturating_sub(size_of::<Tcp>())
}

/// A walk through the options.
#[derive(Clone, Copy, Debug)]
struct Walk {
    /// Where it is.
    at: u64,
    /// Where the options are.
    end: u64,
    /// One more than the places of those with numbers from 2 to 8, 0 for none, a byte for each.
    found: u64,
}

/// Finds the options: [`Walk::found`]. Not inlined, since it is long.
///
/// The steps are written out, and each forgets what the verifier has learnt, or it would follow every combination of options there is.
#[inline(never)]
fn find<F: Frame, const AT: usize>(frame: &F) -> u64 {
    let mut walk = Walk { at: 0, end: length::<F, AT>(frame) as u64, found: 0 };
    // As many as twelve.
    let _ =
        four::<F, AT>(frame, &mut walk) && four::<F, AT>(frame, &mut walk) && four::<F, AT>(frame, &mut walk);
    walk.found
}

#[inline(always)]
fn four<F: Frame, const AT: usize>(frame: &F, walk: &mut Walk) -> bool {
    step::<F, AT>(frame, walk)
        && step::<F, AT>(frame, walk)
        && step::<F, AT>(frame, walk)
        && step::<F, AT>(frame, walk)
}

/// One option; says whether others may follow.
#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "a place within the options")]
fn step<F: Frame, const AT: usize>(frame: &F, walk: &mut Walk) -> bool {
    (walk.at, walk.found) = (frame.blur(walk.at) & 63, frame.blur(walk.found));
    if walk.at >= walk.end {
        return false;
    }
    let kind = frame.read::<u8>(AT + OPTIONS + walk.at as usize).unwrap_or(END);
    if kind == END {
        return false;
    }
    let long = match kind {
        PADDING => 1,
        _ => u64::from(frame.read::<u8>(AT + OPTIONS + walk.at as usize + 1).unwrap_or(0)),
    };
    if long == 0 || walk.at + long > walk.end {
        return false;
    }
    let kind = if matches!(kind, FAST_OPEN | EXPERIMENT) { FAST_OPEN_PLACE } else { kind };
    if (MSS..=TIMESTAMPS).contains(&kind) {
        // Of one that comes twice, the last counts, as with Linux.
        let place = (u64::from(kind - MSS) * 8) & 63;
        walk.found = walk.found & !(0xff << place) | (walk.at + 1) << place;
    }
    walk.at += long;
    true
}

/// Where the value of an option is and how long the option is as a whole; nothing where [`find`] has not found it.
#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "six bits")]
fn option<F: Frame, const AT: usize>(frame: &F, found: u64, kind: u8) -> Option<(usize, u8)> {
    let place = (found >> ((kind - MSS) * 8)) as usize & 63;
    let long = frame.read::<u8>(AT + OPTIONS + place)?;
    (place != 0).then_some((AT + OPTIONS + place + 1, long))
}

/// Reads what a segment's options offer. Not inlined, since it is long.
#[inline(never)]
pub(super) fn read<F: Frame, const AT: usize>(frame: &F, offer: &mut Offer) {
    let found = find::<F, AT>(frame);
    *offer = Offer { mss: 0, bits: SCALE.into(), stamp: 0, echo: 0 };
    if let Some((at, 4)) = option::<F, AT>(frame, found, MSS) {
        offer.mss = frame.read::<U16>(at).map_or(0, |it| it.get().into());
    }
    if let Some((at, 3)) = option::<F, AT>(frame, found, WINDOW_SCALE) {
        // Fourteen at most, whatever it says (RFC 7323, 2.3).
        offer.bits = frame.read::<u8>(at).map_or(0, |it| u32::from(it).min(14));
    }
    if let Some((_, 2)) = option::<F, AT>(frame, found, SACK_PERMITTED) {
        offer.bits |= u32::from(SACK_OK);
    }
    if let Some((at, 10)) = option::<F, AT>(frame, found, TIMESTAMPS) {
        let [stamp, echo] = frame.read::<[U32; 2]>(at).unwrap_or_default();
        (offer.stamp, offer.echo) = (stamp.get(), echo.get());
        offer.bits |= u32::from(STAMPED);
    }
}

/// What is added to the numbers in options.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Numbers {
    /// To both ends of every SACK block (RFC 2018).
    pub sack: u32,
    /// To the sender's timestamp.
    pub stamp: u32,
    /// To the timestamp that it echoes.
    pub echo: u32,
}

/// Shifts the numbers in a segment's options; returns what that does to its checksum, in one word. Not inlined, since it is long.
#[inline(never)]
pub(super) fn shift<F: Frame, const AT: usize>(frame: &mut F, numbers: &Numbers) -> u64 {
    let (found, mut change) = (find::<F, AT>(frame), 0u32);
    if let Some((at, 10)) = option::<F, AT>(frame, found, TIMESTAMPS) {
        change += pair(frame, at, numbers.stamp, numbers.echo);
    }
    if let Some((at, long)) = option::<F, AT>(frame, found, SACK) {
        for block in 0..BLOCKS {
            if block * 8 + 10 <= usize::from(long) {
                change += pair(frame, at + block * 8, numbers.sack, numbers.sack);
            }
        }
    }
    change.into()
}

/// Lowers the MSS of a SYN to what `most` says, if it is above it; returns what that does to the checksum. Not inlined, since it is long.
#[inline(never)]
pub(super) fn clamp<F: Frame, const AT: usize>(frame: &mut F, most: u16) -> u64 {
    let Some((at, 4)) = option::<F, AT>(frame, find::<F, AT>(frame), MSS) else { return 0 };
    let Some(old) = frame.read::<U16>(at).filter(|old| old.get() > most) else { return 0 };
    let new = U16::new(most);
    if frame.write(at, &new).is_none() {
        return 0;
    }
    let change = delta(word(old.to_bytes()), word(new.to_bytes()));
    u64::from(if at & 1 == 0 { change } else { change.swap_bytes() })
}

/// Takes what asks for TCP Fast Open (RFC 7413) out of a SYN. Returns 1, or 0 where it cannot. Not inlined, since it is long.
#[inline(never)]
pub(super) fn forget_fast_open<F: Frame, const AT: usize>(frame: &mut F) -> u64 {
    let Some((value, long)) = option::<F, AT>(frame, find::<F, AT>(frame), FAST_OPEN_PLACE) else { return 1 };
    let at = value - 2;
    let mut change = 0u32;
    for place in (0..FAST_OPEN_LENGTH).filter(|place| *place < usize::from(long)) {
        let Some(old) = frame.read::<u8>(at + place) else { return 0 };
        if frame.write(at + place, &PADDING).is_none() {
            return 0;
        }
        let pair = |byte| if (at + place) & 1 == 0 { word([byte, 0]) } else { word([0, byte]) };
        change += u32::from(delta(pair(old), pair(PADDING)));
    }
    let at = AT + offset_of!(Tcp, checksum);
    let Some(checksum) = frame.read::<[u8; 2]>(at) else { return 0 };
    let change = Change { pseudo: 0, header: fold(change) };
    frame.change_checksum(at, checksum, true, change).map_or(0, |()| 1)
}

/// The MSS of a SYN; 0 where it does not say. Not inlined, since it is long.
#[inline(never)]
pub(super) fn mss<F: Frame, const AT: usize>(frame: &F) -> u64 {
    let Some((at, 4)) = option::<F, AT>(frame, find::<F, AT>(frame), MSS) else { return 0 };
    frame.read::<U16>(at).map_or(0, |it| it.get().into())
}

/// Adds to two numbers that follow each other.
#[inline(always)]
fn pair<F: Frame>(frame: &mut F, at: usize, first: u32, second: u32) -> u32 {
    let Some(old) = frame.read::<[U32; 2]>(at) else { return 0 };
    let new = [U32::new(old[0].get().wrapping_add(first)), U32::new(old[1].get().wrapping_add(second))];
    let sum = |it: [U32; 2]| address(it[0].to_bytes()) + address(it[1].to_bytes());
    if frame.write(at, &new).is_none() {
        return 0;
    }
    let change = delta(sum(old), sum(new));
    // A number at an odd place lies across the checksum's words (RFC 1071, 2 (B)).
    u32::from(if at & 1 == 0 { change } else { change.swap_bytes() })
}
