//! What `privatelink capture` asks of the program: each packet as it came and as it leaves, with what becomes of it.
//!
//! Only the program `captured` comes here, which stands in the links for `ingress` for as long as a capture runs: off, this costs
//! nothing. XDP programs do not nest on a CPU, so what is kept for each CPU is still that of the same packet when the path is done
//! with it.

use crate::frame::XdpFrame;
use crate::tables::KernelTables;
use aya_ebpf::{
    EbpfContext,
    bindings::BPF_F_CURRENT_CPU,
    btf_maps::{Array, PerCpuArray, PerfEventByteArray},
    helpers::generated::{bpf_get_prandom_u32, bpf_ktime_get_ns, bpf_perf_event_output, bpf_xdp_load_bytes},
    macros::btf_map,
};
use core::hint::black_box;
use core::mem::size_of;
use privatelink_common::capture::{ENDPOINTS, End, Event, FORWARDED, HEADER, Missed, Watch};
use privatelink_common::frame::Frame;
use privatelink_common::tables::{ENDPOINT, Entry, FlowKey, Tables, VpcAddress};
use privatelink_common::verdict::{Action, PASSED, STEERED, Verdict};
use privatelink_common::wire::{Ipv4, TCP, UDP};
use zerocopy::big_endian::U16;

/// What is asked for: a constant that who loads the program writes, so that the verifier removes what is not asked for.
#[unsafe(no_mangle)]
static WATCH: Watch = zerocopy::transmute!([0u8; size_of::<Watch>()]);

#[btf_map(name = "events")]
static EVENTS: PerfEventByteArray = PerfEventByteArray::new();
#[btf_map(name = "kept")]
static KEPT: PerCpuArray<Kept, 1> = PerCpuArray::new();
#[btf_map(name = "missed")]
static MISSED: PerCpuArray<Missed, 1> = PerCpuArray::new();
/// When the second began, and how many packets were captured in it. Two CPUs at once may count one packet for two.
#[btf_map(name = "second")]
static SECOND: Array<[u64; 2], 1> = Array::new();

/// What is kept of a packet while the path has it.
#[repr(C, align(8))]
struct Kept {
    event: Event,
    /// How it begins as it leaves.
    after: [u8; HEADER],
    /// 1: there is a packet.
    there: u64,
}

/// Reads one of the constants that the loader has written, which the compiler must not take for zero.
macro_rules! asked {
    ($($field:tt)+) => {
        // SAFETY: a place within a static.
        unsafe { (&raw const WATCH.$($field)+).read_volatile() }
    };
}

#[inline(always)]
fn kept() -> Option<&'static mut Kept> {
    let kept = KEPT.get_ptr_mut(0)?;
    // SAFETY: the map returned a pointer to this CPU's own value, which outlives the run, and XDP programs do not nest on a CPU.
    Some(unsafe { &mut *kept })
}

#[inline(always)]
fn clock() -> u64 {
    // SAFETY: the helper takes no arguments and only reads the clock.
    unsafe { bpf_ktime_get_ns() }
}

/// Keeps how a packet came. Not inlined, like the other one: the kernel bounds a function's stack.
#[inline(never)]
pub(crate) fn keep(frame: &XdpFrame, ifindex: u32) {
    let Some(kept) = kept() else { return };
    kept.there = 0;
    let sample = asked!(sample);
    // SAFETY: the helper takes no arguments.
    if sample > 1 && unsafe { bpf_get_prandom_u32() } % sample != 0 {
        return;
    }
    let Some(from) = KernelTables.interface(ifindex).filter(|from| from.vpc != 0) else { return };
    let event = &mut kept.event;
    (event.vpc, event.slot) = (from.vpc, from.slot);
    (event.length, event.header_length) = read(frame, &mut event.header);
    (event.endpoint, event.target, event.peer_vpc, event.peer_slot) = (0, 0, 0, 0);
    // A RST takes the flow that it belongs to away.
    belong(event);
    event.entered = clock();
    kept.there = 1;
}

/// Hands over a packet, how it leaves, and the path's verdict.
#[inline(never)]
pub(crate) fn hand_over(frame: &XdpFrame, verdict: Verdict) {
    let (Some(kept), Some(missed)) = (kept(), MISSED.get_ptr_mut(0)) else { return };
    if kept.there == 0 {
        return;
    }
    kept.there = 0;
    let event = &mut kept.event;
    event.left = clock();
    // A flow's first packet belongs to it only by now.
    belong(event);
    let is_dropped = conclude(event, verdict);
    (event.left_length, _) = read(frame, &mut kept.after);
    if asked!(dropped) != 0 && !is_dropped || !is_chosen(event, &kept.after) {
        return;
    }
    // SAFETY: the map returned a pointer to this CPU's own value.
    let missed = unsafe { &mut *missed };
    if !take_token(event.left) {
        missed.rate += 1;
        return;
    }
    let bytes = u64::from(event.left_length.min(asked!(snaplen)) & 0xf_ffff);
    let flags = bytes << 32 | BPF_F_CURRENT_CPU;
    let (map, event) = ((&raw const EVENTS).cast_mut().cast(), (&raw mut *event).cast());
    // SAFETY: the context is the kernel's own, the map is one, and the event as long as stated.
    let result = unsafe {
        bpf_perf_event_output(frame.context().as_ptr(), map, flags, event, size_of::<Event>() as u64)
    };
    if result != 0 {
        missed.room += 1;
    }
}

/// Copies the beginning of a frame; returns the lengths of the frame and of the copy.
#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "a frame's length")]
fn read(frame: &XdpFrame, header: &mut [u8; HEADER]) -> (u32, u32) {
    let length = frame.len() as u32;
    // The comparison is with the number that the helper gets, whatever the compiler knows of it: so the verifier learns its bounds.
    let copied = black_box(length.min(HEADER as u32));
    if copied == 0 || copied > HEADER as u32 {
        return (length, 0);
    }
    let to = header.as_mut_ptr().cast();
    // SAFETY: the header has room for so much, and the helper checks the frame.
    let result = unsafe { bpf_xdp_load_bytes(frame.context().ctx, 0, to, copied) };
    (length, if result == 0 { copied } else { 0 })
}

/// Notes what became of the packet; says whether it is dropped.
#[inline(always)]
fn conclude(event: &mut Event, verdict: Verdict) -> bool {
    let verdict = match verdict.result() {
        Ok(verdict) => verdict,
        Err(reason) => {
            event.outcome = reason.code();
            return true;
        }
    };
    match verdict.action() {
        Action::Forward { interface, endpoint, .. } => {
            (event.outcome, event.peer_slot, event.endpoint) = (FORWARDED, interface, endpoint);
        }
        Action::Steer { interface } => {
            (event.outcome, event.peer_slot, event.peer_vpc) = (STEERED, interface, event.vpc);
        }
        Action::Answer(code) => {
            (event.outcome, event.peer_slot, event.peer_vpc) = (code, event.slot, event.vpc);
        }
        Action::Pass => event.outcome = PASSED,
    }
    false
}

/// The addresses, ports and protocol of a packet, as far as it has them.
#[derive(Clone, Copy)]
struct Tuple {
    source: Ipv4,
    destination: Ipv4,
    ports: [U16; 2],
    protocol: u8,
}

#[inline(always)]
fn tuple(header: &[u8; HEADER]) -> Option<Tuple> {
    let four = |at: usize| [header[at], header[at + 1], header[at + 2], header[at + 3]];
    match [header[12], header[13]] {
        [0x08, 0x00] => {
            let protocol = header[23];
            let has_ports = header[14] == 0x45 && (protocol == TCP || protocol == UDP);
            let ports = if has_ports { zerocopy::transmute!(four(34)) } else { [U16::ZERO; 2] };
            Some(Tuple { source: four(26), destination: four(30), ports, protocol })
        }
        [0x08, 0x06] => {
            Some(Tuple { source: four(28), destination: four(38), ports: [U16::ZERO; 2], protocol: 0 })
        }
        _ => None,
    }
}

/// Notes the flow that the packet belongs to, if there is one, or else the endpoint whose address it has.
#[inline(always)]
fn belong(event: &mut Event) {
    let Some(tuple) = tuple(&event.header) else { return };
    let key = FlowKey {
        source: tuple.source,
        destination: tuple.destination,
        source_port: tuple.ports[0],
        destination_port: tuple.ports[1],
        vpc: event.vpc,
        protocol: tuple.protocol,
        reserved: 0,
    };
    let entry = KernelTables.established(&key).or_else(|| KernelTables.pending(&key));
    if let Some(entry) = entry {
        let flow = entry.flow();
        (event.endpoint, event.target, event.peer_vpc) = (flow.endpoint, flow.target, flow.peer_vpc);
    }
    for address in [tuple.destination, tuple.source] {
        if event.endpoint == 0 {
            let found = KernelTables.address(&VpcAddress::new(event.vpc, address));
            event.endpoint = found.filter(|it| it.kind == ENDPOINT).map_or(0, |it| it.endpoint);
        }
    }
}

/// Whether the packet is one that is asked for: on one of its sides, as it came or as it leaves.
#[inline(always)]
fn is_chosen(event: &Event, after: &[u8; HEADER]) -> bool {
    if asked!(endpoints[0]) != 0 && !is_of_endpoint(event.endpoint) {
        return false;
    }
    matches_side(event.vpc, &event.header) || event.peer_slot != 0 && matches_side(event.peer_vpc, after)
}

#[inline(always)]
fn is_of_endpoint(endpoint: u32) -> bool {
    (0..ENDPOINTS).any(|index| endpoint != 0 && asked!(endpoints[index]) == endpoint)
}

/// Whether one side of a packet has all that is asked for.
#[inline(always)]
fn matches_side(vpc: u16, header: &[u8; HEADER]) -> bool {
    if asked!(vpc) != 0 && asked!(vpc) != vpc {
        return false;
    }
    let (protocol, from, to) = (asked!(protocol), asked!(ends[0]), asked!(ends[1]));
    if protocol == 0 && from == End::default() && to == End::default() {
        return true;
    }
    let Some(tuple) = tuple(header) else { return false };
    if protocol != 0 && protocol != tuple.protocol {
        return false;
    }
    let (source, destination) = ((tuple.source, tuple.ports[0]), (tuple.destination, tuple.ports[1]));
    is_end(&from, source) && is_end(&to, destination) || is_end(&from, destination) && is_end(&to, source)
}

#[inline(always)]
fn is_end(wanted: &End, (address, port): (Ipv4, U16)) -> bool {
    (wanted.address == [0; 4] || wanted.address == address)
        && (wanted.port == U16::ZERO || wanted.port == port)
}

/// Takes one of this second's packets.
#[inline(always)]
fn take_token(now: u64) -> bool {
    let Some(second) = SECOND.get_ptr_mut(0) else { return false };
    // SAFETY: the map returned a pointer to its own memory, which outlives the run; other CPUs may write there too, which mixes two
    // counts of about the same size.
    let [began, count] = unsafe { &mut *second };
    if now.wrapping_sub(*began) >= 1_000_000_000 {
        (*began, *count) = (now, 0);
    }
    *count += 1;
    *count <= u64::from(asked!(rate))
}
