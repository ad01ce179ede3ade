//! What a program does, once the path has decided: what the two hooks call it, and what is counted.

use crate::frame::{SkbFrame, XdpFrame};
use crate::hold::hold;
use crate::maps;
use crate::tables::{Exit, XdpExit, interface};
use crate::vlan::{self, Tagging};
use aya_ebpf::{
    EbpfContext,
    bindings::{
        tcx_action_base::{TCX_DROP, TCX_NEXT, TCX_REDIRECT},
        xdp_action,
    },
    helpers::generated::{bpf_ktime_get_coarse_ns, bpf_redirect},
    programs::{TcContext, XdpContext},
};
use aya_log_ebpf::info;
use core::mem::offset_of;
use core::net::{Ipv4Addr, Ipv6Addr};
use privatelink_common::{
    frame::Frame,
    held::{Account, OUTCOME, TO_CONSUMER, TO_PROVIDER},
    limits::OUTCOMES,
    verdict::{Action, Direction, DropReason, FRAGMENT_EARLY, FlowEvent, PASSED, STEERED, Verdict},
    wire::{Ipv4Header, Ipv6Header, NETWORK, TRANSPORT, TRANSPORT6},
};
use zerocopy::big_endian::U16;

/// What differs between the hooks, once the path has decided.
pub(crate) trait Host: Frame + Tagging {
    /// The context of its programs.
    type Context: EbpfContext;
    /// What its programs return.
    type Action;
    /// The frame goes on to whoever is next.
    const PASS: Self::Action;
    /// The frame ends here.
    const DROP: Self::Action;
    /// The frame leaves by the redirect that was set up.
    const REDIRECT: Self::Action;

    /// The context, for helpers.
    fn log_context(&self) -> Self::Context;

    /// Sends the frame back where it came from.
    fn back(&self, ifindex: u32) -> Self::Action;

    /// How many packets, and how many bytes in all, a frame of `length` is on the wire.
    fn on_the_wire(&self, length: u64) -> (u64, u64);
}

impl Host for XdpFrame {
    type Context = XdpContext;
    type Action = u32;
    const PASS: u32 = xdp_action::XDP_PASS;
    const DROP: u32 = xdp_action::XDP_DROP;
    const REDIRECT: u32 = xdp_action::XDP_REDIRECT;

    #[inline(always)]
    fn log_context(&self) -> XdpContext {
        self.context()
    }

    /// By a redirect, since a veth wakes its other end after XDP_TX only if that end has an XDP program of its own, but after a
    /// redirect also where it has GRO; XDP_TX for an interface that is not in `egress` yet.
    #[inline(always)]
    fn back(&self, ifindex: u32) -> u32 {
        let slot = interface(ifindex).unwrap_or_default().slot;
        if XdpExit(self.context().ctx).leave(slot).is_some() {
            xdp_action::XDP_REDIRECT
        } else {
            xdp_action::XDP_TX
        }
    }

    #[inline(always)]
    fn on_the_wire(&self, length: u64) -> (u64, u64) {
        (1, length)
    }
}

impl Host for SkbFrame {
    type Context = TcContext;
    type Action = i32;
    const PASS: i32 = TCX_NEXT;
    const DROP: i32 = TCX_DROP;
    const REDIRECT: i32 = TCX_REDIRECT;

    #[inline(always)]
    fn log_context(&self) -> TcContext {
        self.context()
    }

    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "the helper returns an action")]
    fn back(&self, _: u32) -> i32 {
        // SAFETY: the helper checks the index.
        unsafe { bpf_redirect(self.ingress(), 0) as i32 }
    }

    #[inline(always)]
    fn on_the_wire(&self, length: u64) -> (u64, u64) {
        self.wire(length)
    }
}

/// Seconds since boot. The coarse clock is a few milliseconds behind and costs a fraction of the exact one.
#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "136 years after boot")]
pub(crate) fn now() -> u32 {
    // SAFETY: the helper takes no arguments and only reads the clock.
    let nanoseconds = unsafe { bpf_ktime_get_coarse_ns() };
    (nanoseconds / 1_000_000_000) as u32
}

/// Does what the path has decided about a frame that came by `ifindex`, an index in `interfaces`; from a trunk, it may have had tags.
#[inline(always)]
pub(crate) fn act<H: Host>(
    frame: &mut H,
    verdict: Result<Verdict, DropReason>,
    ifindex: u32,
    trunk: bool,
) -> H::Action {
    let verdict = match verdict {
        Ok(verdict) => verdict,
        Err(reason) => {
            report(frame, ifindex, reason.code());
            count(frame, ifindex, reason.code());
            return H::DROP;
        }
    };
    if verdict.is_tagged() {
        return if send_tagged(frame, verdict, ifindex) { H::REDIRECT } else { H::DROP };
    }
    match verdict.action() {
        Action::Forward { endpoint, direction, event, ipv6, .. } => {
            count_forwarded(size(frame, ipv6), endpoint, direction, event);
            H::REDIRECT
        }
        Action::Steer { .. } => {
            count(frame, ifindex, STEERED);
            H::REDIRECT
        }
        Action::Hold => {
            let outcome = hold(frame, ifindex);
            if outcome != FRAGMENT_EARLY {
                report(frame, ifindex, outcome);
            }
            count(frame, ifindex, outcome);
            H::DROP
        }
        Action::Pass => {
            count(frame, ifindex, PASSED);
            if !trunk || vlan::back(frame) { H::PASS } else { H::DROP }
        }
        Action::Answer(answer) => {
            count(frame, ifindex, answer);
            if !trunk || vlan::back(frame) { frame.back(ifindex) } else { H::DROP }
        }
    }
}

/// Counts a frame, and puts the tags on that it leaves with. Says whether it could. Not inlined, so that frames without any do not pay.
#[inline(never)]
fn send_tagged<H: Host>(frame: &mut H, verdict: Verdict, ifindex: u32) -> bool {
    let (interface, size) = match verdict.action() {
        Action::Forward { interface, ipv6, .. } => (interface, size(frame, ipv6)),
        Action::Steer { interface } => (interface, frame.on_the_wire(frame.len() as u64)),
        Action::Pass | Action::Answer(_) | Action::Hold => return false,
    };
    if !vlan::leave(frame, interface) {
        add(size, ifindex, DropReason::TooBig.code());
        return false;
    }
    // Asked again, rather than kept: where there is no endpoint, the compiler may spill what was never set, which the verifier refuses.
    match verdict.action() {
        Action::Forward { endpoint, direction, event, .. } => {
            count_forwarded(size, endpoint, direction, event);
        }
        _ => add(size, ifindex, STEERED),
    }
    true
}

#[inline(always)]
fn count<H: Host>(frame: &H, ifindex: u32, outcome: u32) {
    add(frame.on_the_wire(frame.len() as u64), ifindex, outcome);
}

#[inline(always)]
fn add(size: (u64, u64), ifindex: u32, outcome: u32) {
    let vpc = interface(ifindex).unwrap_or_default().vpc;
    add_to(size, u32::from(vpc) * OUTCOMES + outcome);
}

#[inline(always)]
fn add_to((packets, bytes): (u64, u64), index: u32) {
    if let Some(counter) = maps::OUTCOMES_BY_VPC.get_ptr_mut(index) {
        // SAFETY: the map returned a pointer to this CPU's own value, and programs of neither hook nest on a CPU.
        unsafe {
            (*counter).packets += packets;
            (*counter).bytes += bytes;
        }
    }
}

/// Tells user space about a dropped packet, where somebody listens; without one, the verifier removes this. What it says is taken
/// apart by privatelink-user's `drops`. Not inlined: the kernel bounds a function's stack.
#[inline(never)]
fn report<H: Host>(frame: &H, ifindex: u32, reason: u32) {
    let Some(ip) = frame.read::<Ipv4Header>(NETWORK) else { return };
    if ip.version_ihl >> 4 == 6 {
        return report6(frame, ifindex, reason);
    }
    let ports = frame.read::<[U16; 2]>(TRANSPORT).unwrap_or_default();
    let (source, destination) = (Ipv4Addr::from(ip.source), Ipv4Addr::from(ip.destination));
    info!(
        &frame.log_context(),
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

/// The same of an IPv6 packet.
#[inline(never)]
fn report6<H: Host>(frame: &H, ifindex: u32, reason: u32) {
    let Some(ip) = frame.read::<Ipv6Header>(NETWORK) else { return };
    let ports = frame.read::<[U16; 2]>(TRANSPORT6).unwrap_or_default();
    let (source, destination) = (Ipv6Addr::from(ip.source), Ipv6Addr::from(ip.destination));
    info!(
        &frame.log_context(),
        "{} {} {} {:i}:{} {:i}:{}",
        reason,
        ifindex,
        ip.next_header,
        source,
        ports[0].get(),
        destination,
        ports[1].get()
    );
}

/// How many packets, and how many bytes in all, a frame that is forwarded is on the wire, without its tags.
#[inline(always)]
fn size<H: Host>(frame: &H, ipv6: bool) -> (u64, u64) {
    // The packet's own word for its length was checked, and is nearer than the frame's.
    let length = if ipv6 {
        let payload = frame.read::<U16>(NETWORK + offset_of!(Ipv6Header, payload_length)).unwrap_or_default();
        TRANSPORT6 as u64 + u64::from(payload.get())
    } else {
        let total = frame.read::<U16>(NETWORK + offset_of!(Ipv4Header, total_length)).unwrap_or_default();
        (NETWORK + frame.ip_length(total.get())) as u64
    };
    frame.on_the_wire(length)
}

#[inline(always)]
fn count_forwarded((packets, bytes): (u64, u64), endpoint: u32, direction: Direction, event: FlowEvent) {
    let Some(counters) = maps::COUNTERS.get_ptr_mut(endpoint) else { return };
    // SAFETY: as in `count`.
    let counters = unsafe { &mut *counters };
    match direction {
        Direction::ToProvider => {
            counters.to_provider_packets += packets;
            counters.to_provider_bytes += bytes;
        }
        Direction::ToConsumer => {
            counters.to_consumer_packets += packets;
            counters.to_consumer_bytes += bytes;
        }
    }
    match event {
        FlowEvent::None => {}
        FlowEvent::Opened => counters.new_flows += 1,
        FlowEvent::Reset => counters.resets += 1,
    }
}

/// Counts what the agent says.
#[allow(dead_code, reason = "the programs of a capture are never asked to")]
#[inline(always)]
pub(crate) fn account(&Account { packets, bytes, of, index }: &Account) {
    match of {
        OUTCOME => add_to((packets, bytes), index),
        TO_PROVIDER => count_forwarded((packets, bytes), index, Direction::ToProvider, FlowEvent::None),
        TO_CONSUMER => count_forwarded((packets, bytes), index, Direction::ToConsumer, FlowEvent::None),
        _ => {}
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
