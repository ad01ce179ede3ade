//! The XDP program `ingress`: hands every frame to [`privatelink_common::path::forward`], does what it says, and counts it once.
//!
//! This crate holds all of the dataplane's `unsafe`: in `frame`, where the verifier's bounds are, in `tables`, where the maps'
//! memory is, and the few helper calls here.
#![no_std]
#![no_main]

mod frame;
mod maps;
mod tables;

use aya_ebpf::{
    bindings::xdp_action, helpers::generated::bpf_ktime_get_coarse_ns, macros::xdp, programs::XdpContext,
};
use frame::XdpFrame;
use privatelink_common::frame::Frame;
use privatelink_common::{
    limits::OUTCOMES,
    path,
    tables::Tables,
    verdict::{Action, Direction, DropReason, FlowEvent, PASSED, STEERED, Verdict},
};
use tables::KernelTables;

/// Runs for every frame that comes by an interface of ours.
#[xdp(frags)]
pub(crate) fn ingress(context: XdpContext) -> u32 {
    let mut frame = XdpFrame::new(context.ctx);
    let ifindex = frame.ingress();
    let length = frame.len() as u64;
    let verdict = path::forward(&mut frame, &KernelTables, ifindex, now());
    act(verdict, ifindex, length)
}

/// Seconds since boot. The coarse clock is a few milliseconds behind and costs a fraction of the exact one.
#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "136 years after boot")]
fn now() -> u32 {
    // SAFETY: the helper takes no arguments and only reads the clock.
    let nanoseconds = unsafe { bpf_ktime_get_coarse_ns() };
    (nanoseconds / 1_000_000_000) as u32
}

#[inline(always)]
fn act(verdict: Result<Verdict, DropReason>, ifindex: u32, length: u64) -> u32 {
    let verdict = match verdict {
        Ok(verdict) => verdict,
        Err(reason) => return count(ifindex, reason.code(), length, xdp_action::XDP_DROP),
    };
    match verdict.action() {
        Action::Forward { endpoint, direction, event, .. } => {
            count_forwarded(endpoint, direction, event, length);
            xdp_action::XDP_REDIRECT
        }
        Action::Steer { .. } => count(ifindex, STEERED, length, xdp_action::XDP_REDIRECT),
        Action::Pass => count(ifindex, PASSED, length, xdp_action::XDP_PASS),
        Action::Answer(answer) => count(ifindex, answer, length, back(ifindex)),
    }
}

/// Sends the frame back where it came from. By a redirect, since a veth wakes its other end after XDP_TX only if that end has an XDP
/// program of its own, but after a redirect also where it has GRO; XDP_TX for an interface that is not in `egress` yet.
#[inline(always)]
fn back(ifindex: u32) -> u32 {
    let slot = KernelTables.interface(ifindex).unwrap_or_default().slot;
    if KernelTables.egress(slot) { xdp_action::XDP_REDIRECT } else { xdp_action::XDP_TX }
}

#[inline(always)]
fn count(ifindex: u32, outcome: u32, length: u64, action: u32) -> u32 {
    let vpc = KernelTables.interface(ifindex).unwrap_or_default().vpc;
    if let Some(counter) = maps::OUTCOMES_BY_VPC.get_ptr_mut(u32::from(vpc) * OUTCOMES + outcome) {
        // SAFETY: the map returned a pointer to this CPU's own value, and XDP programs do not nest on a CPU.
        unsafe {
            (*counter).packets += 1;
            (*counter).bytes += length;
        }
    }
    action
}

#[inline(always)]
fn count_forwarded(endpoint: u32, direction: Direction, event: FlowEvent, length: u64) {
    let Some(counters) = maps::COUNTERS.get_ptr_mut(endpoint) else { return };
    // SAFETY: as in `count`.
    let counters = unsafe { &mut *counters };
    match direction {
        Direction::ToProvider => {
            counters.to_provider_packets += 1;
            counters.to_provider_bytes += length;
        }
        Direction::ToConsumer => {
            counters.to_consumer_packets += 1;
            counters.to_consumer_bytes += length;
        }
    }
    match event {
        FlowEvent::None => {}
        FlowEvent::Opened => counters.new_flows += 1,
        FlowEvent::Reset => counters.resets += 1,
    }
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    // The verifier refuses a program in which this is reachable.
    loop {}
}

/// The kernel grants helpers by licence; those used here need a GPL-compatible one.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
