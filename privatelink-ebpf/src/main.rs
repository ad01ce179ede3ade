//! The XDP program `ingress`: hands every frame to [`privatelink_common::path::forward`], does what it says, and counts it once.
//! `captured` does the same, and hands packets over besides.
//!
//! This crate holds all of the dataplane's `unsafe`: in `frame`, where the verifier's bounds are, in `tables`, where the maps'
//! memory is, and the few helper calls here.
#![no_std]
#![no_main]

mod capture;
mod frame;
mod maps;
mod tables;

use aya_ebpf::{
    bindings::xdp_action, helpers::generated::bpf_ktime_get_coarse_ns, macros::xdp, programs::XdpContext,
};
use aya_log_ebpf::info;
use core::mem::offset_of;
use core::net::Ipv4Addr;
use frame::XdpFrame;
use privatelink_common::frame::Frame;
use privatelink_common::{
    limits::OUTCOMES,
    path,
    tables::Tables,
    verdict::{Action, Direction, DropReason, FlowEvent, PASSED, STEERED, Verdict},
    wire::{Ipv4Header, NETWORK, TRANSPORT},
};
use tables::KernelTables;
use zerocopy::big_endian::U16;

/// Runs for every frame that comes by an interface of ours.
#[xdp(frags)]
pub(crate) fn ingress(context: XdpContext) -> u32 {
    run::<false>(&context)
}

/// In the place of `ingress` while a capture runs.
#[xdp(frags)]
pub(crate) fn captured(context: XdpContext) -> u32 {
    run::<true>(&context)
}

#[inline(always)]
fn run<const CAPTURED: bool>(context: &XdpContext) -> u32 {
    let mut frame = XdpFrame::new(context.ctx);
    let ifindex = frame.ingress();
    if CAPTURED {
        capture::keep(&frame, ifindex);
    }
    let verdict = path::forward(&mut frame, &KernelTables, ifindex, now());
    if CAPTURED {
        capture::hand_over(&frame, Verdict::of(verdict));
    }
    act(&frame, verdict, ifindex)
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
fn act(frame: &XdpFrame, verdict: Result<Verdict, DropReason>, ifindex: u32) -> u32 {
    let verdict = match verdict {
        Ok(verdict) => verdict,
        Err(reason) => {
            report(frame, ifindex, reason.code());
            return count(frame, ifindex, reason.code(), xdp_action::XDP_DROP);
        }
    };
    match verdict.action() {
        Action::Forward { endpoint, direction, event, .. } => {
            count_forwarded(frame, endpoint, direction, event);
            xdp_action::XDP_REDIRECT
        }
        Action::Steer { .. } => count(frame, ifindex, STEERED, xdp_action::XDP_REDIRECT),
        Action::Pass => count(frame, ifindex, PASSED, xdp_action::XDP_PASS),
        Action::Answer(answer) => count(frame, ifindex, answer, back(ifindex)),
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
fn count(frame: &XdpFrame, ifindex: u32, outcome: u32, action: u32) -> u32 {
    let vpc = KernelTables.interface(ifindex).unwrap_or_default().vpc;
    if let Some(counter) = maps::OUTCOMES_BY_VPC.get_ptr_mut(u32::from(vpc) * OUTCOMES + outcome) {
        // SAFETY: the map returned a pointer to this CPU's own value, and XDP programs do not nest on a CPU.
        unsafe {
            (*counter).packets += 1;
            (*counter).bytes += frame.len() as u64;
        }
    }
    action
}

/// Tells user space about a dropped packet, where somebody listens; without one, the verifier removes this. What it says is taken
/// apart by privatelink-user's `drops`. Not inlined: the kernel bounds a function's stack.
#[inline(never)]
fn report(frame: &XdpFrame, ifindex: u32, reason: u32) {
    let Some(ip) = frame.read::<Ipv4Header>(NETWORK) else { return };
    let ports = frame.read::<[U16; 2]>(TRANSPORT).unwrap_or_default();
    let (source, destination) = (Ipv4Addr::from(ip.source), Ipv4Addr::from(ip.destination));
    info!(
        &frame.context(),
        "{} {} {} {:i}:{} {:i}:{}",
        reason,
        ifindex,
        ip.protocol,
        source,
        ports[0].get(),
        destination,
        ports[1].get()
    );
}

#[inline(always)]
fn count_forwarded(frame: &XdpFrame, endpoint: u32, direction: Direction, event: FlowEvent) {
    // The packet's own word for its length was checked, and is nearer than the frame's.
    let length = frame.read::<U16>(NETWORK + offset_of!(Ipv4Header, total_length)).unwrap_or_default();
    let length = NETWORK as u64 + u64::from(length.get());
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
