//! What the path does to a packet as a router on its way.

use crate::checksum::{delta, word};
use crate::frame::Frame;
use crate::limits::{LOWEST_MSS, TCP_OPTIONS};
use crate::tables::Tables;
use crate::wire::Tcp;
use core::mem::offset_of;

/// TCP options (RFC 9293, 3.1).
const END: u8 = 0;
const NOTHING: u8 = 1;
const MAXIMUM_SEGMENT_SIZE: u8 = 2;

/// Bytes of IPv4 and TCP headers, which an MSS does not count (RFC 6691).
pub(super) const HEADERS: u32 = 40;
/// Bytes of IPv6 and TCP headers, likewise.
pub(super) const HEADERS6: u32 = 60;

/// Lowers the MSS that a SYN announces to what `endpoint` and the interfaces of both sides can carry. A SYN without the option gets
/// none: its sender is sent 536 bytes at most (RFC 9293, 3.7.1). The TCP header is at `AT`, and `HEADERS` are the longest that the
/// segments of this flow have on either side.
///
/// Returns what that changes of the TCP checksum, a delta in a register of its own; not inlined: the kernel bounds a function's stack.
#[inline(never)]
pub(super) fn clamp<F: Frame, T: Tables, const AT: usize, const HEADERS: u32>(
    frame: &mut F,
    tables: &T,
    seen_interface: u16,
    interface: u16,
    endpoint: u32,
) -> u64 {
    let Some((at, announced)) = find::<F, AT>(frame) else { return 0 };
    let endpoint = tables.endpoint(endpoint);
    let known = |mtu: u32| if mtu == 0 { u32::MAX } else { mtu };
    let mtu = known(endpoint.mtu.into())
        .min(known(tables.mtu(seen_interface)))
        .min(known(tables.mtu(interface)))
        .saturating_sub(HEADERS + u32::from(endpoint.reserve));
    #[allow(clippy::cast_possible_truncation, reason = "not above what 16 bits hold")]
    let most = (mtu.min(0xffff) as u16).max(LOWEST_MSS);
    if u16::from_be_bytes(announced) <= most || frame.write(AT + at, &most.to_be_bytes()).is_none() {
        return 0;
    }
    // At an odd place, the two bytes belong to two words of the sum, the other way round.
    let sum = |[a, b]: [u8; 2]| if at % 2 == 0 { word([a, b]) } else { word([b, a]) };
    delta(sum(announced), sum(most.to_be_bytes())).into()
}

/// Where in the TCP header the MSS is, and which.
#[inline(always)]
fn find<F: Frame, const AT: usize>(frame: &F) -> Option<(usize, [u8; 2])> {
    let offset = frame.read::<u8>(AT + offset_of!(Tcp, data_offset))?;
    let header = usize::from(offset >> 4) * 4;
    let mut at = size_of::<Tcp>();
    for _ in 0..TCP_OPTIONS {
        if at + 4 > header {
            return None;
        }
        // No header is longer than 60 bytes; the mask says so to the kernel's verifier.
        at &= 63;
        let [kind, length, a, b] = frame.read::<[u8; 4]>(AT + at)?;
        match kind {
            END => return None,
            NOTHING => at += 1,
            MAXIMUM_SEGMENT_SIZE if length == 4 => return Some((at + 2, [a, b])),
            _ if length < 2 => return None,
            _ => at += usize::from(length),
        }
    }
    None
}
