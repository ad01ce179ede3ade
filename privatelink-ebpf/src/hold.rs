//! Later fragments that come before the first of their datagram go to the agent, which holds them: XDP can hold no frame.

use crate::act::Host;
use crate::maps::{HELD, HELD_RATES, HELD_TAKEN};
use crate::tables::{fetch_add, interface};
use aya_ebpf::{
    EbpfContext,
    bindings::BPF_F_CURRENT_CPU,
    helpers::generated::{bpf_ktime_get_coarse_ns, bpf_perf_event_output},
};
use core::mem::size_of;
use privatelink_common::held::{Held, LONGEST};
use privatelink_common::limits::{HELD_BURST, HELD_ON_THE_WAY, HELD_WINDOW};
use privatelink_common::tables::HeldRate;
use privatelink_common::verdict::{DropReason, FRAGMENT_EARLY};

/// Linux's ENOENT: there is no buffer, and so no agent.
const NOBODY: i64 = -2;

/// Hands a frame that came by `ifindex`, an index in `interfaces`, to the agent. Returns the code of what is to be counted. Not inlined: it
/// is needed seldom, and the kernel bounds a function's stack.
#[inline(never)]
#[allow(clippy::cast_possible_truncation, reason = "a frame's length")]
pub(crate) fn hold<H: Host>(frame: &H, ifindex: u32) -> u32 {
    let vpc = interface(ifindex).unwrap_or_default().vpc;
    let length = frame.len() as u32;
    let Some(rate) = HELD_RATES.get_ptr_mut(vpc.into()).filter(|rate| length <= LONGEST && take_token(*rate))
    else {
        return DropReason::FragmentTableFull.code();
    };
    let length = u64::from(length);
    // SAFETY: the map returned an aligned pointer to its own memory, which outlives the run.
    let add = |by| unsafe { fetch_add(&raw mut (*rate).handed, by) };
    let taken = HELD_TAKEN.get(vpc.into()).copied().unwrap_or_default();
    if add(length).wrapping_sub(taken) + length > HELD_ON_THE_WAY {
        add(length.wrapping_neg());
        return DropReason::FragmentTableFull.code();
    }
    let mut held = Held { ifindex, length: length as u32, vpc, reserved: [0; 3] };
    let flags = (length & 0xffff) << 32 | BPF_F_CURRENT_CPU;
    let (map, held) = ((&raw const HELD).cast_mut().cast(), (&raw mut held).cast());
    // SAFETY: the context is the kernel's own, the map is one, and what is told is as long as stated.
    let result = unsafe {
        bpf_perf_event_output(frame.log_context().as_ptr(), map, flags, held, size_of::<Held>() as u64)
    };
    if result as i64 != 0 {
        add(length.wrapping_neg());
    }
    match result as i64 {
        0 => FRAGMENT_EARLY,
        NOBODY => DropReason::FragmentUnknown.code(),
        _ => DropReason::FragmentTableFull.code(),
    }
}

/// Takes one of those that a VPC may have held in this window.
#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "windows are compared with those that have just been")]
fn take_token(rate: *mut HeldRate) -> bool {
    // SAFETY: the helper takes no arguments and only reads the clock.
    let now = (unsafe { bpf_ktime_get_coarse_ns() } >> HELD_WINDOW) as u32;
    // SAFETY: the map returned a pointer to its own memory, which outlives the run; other CPUs may write to these two words, too, which
    // mixes two counts of about the same size.
    let [window, count] = unsafe { [&mut (*rate).window, &mut (*rate).count] };
    if *window != now {
        (*window, *count) = (now, 0);
    }
    *count += 1;
    *count <= HELD_BURST
}
