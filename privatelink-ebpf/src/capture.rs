//! What `privatelink capture` asks of the programs: each packet as it came and as it leaves, with what becomes of it.
//!
//! Programs of neither hook nest on a CPU, so what is kept for each CPU is still that of the same packet when the path is done with it.

use crate::act::Host;
use crate::frame::{SkbFrame, XdpFrame};
use crate::maps::{CAME, TRUNKS};
use crate::tables::{KernelTables, XdpExit, interface};
use crate::vlan::Tags;
use aya_ebpf::{
    EbpfContext,
    bindings::{__sk_buff, BPF_F_CURRENT_CPU},
    btf_maps::{Array, PerCpuArray, PerfEventByteArray},
    helpers::generated::{
        bpf_get_prandom_u32, bpf_ktime_get_ns, bpf_perf_event_output, bpf_skb_load_bytes, bpf_xdp_load_bytes,
    },
    macros::btf_map,
};
use core::hint::black_box;
use core::mem::{offset_of, size_of};
use privatelink_common::capture::{ENDPOINTS, Event, FORWARDED, HEADER, Missed, Watch};
use privatelink_common::tables::{ENDPOINT, Entry, FlowKey6, Flows, Key, Tables, Tag, VpcAddress};
use privatelink_common::verdict::{Action, FRAGMENT_EARLY, PASSED, STEERED, Verdict};
use privatelink_common::wire::{
    ADVERTISEMENT, ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, ICMPV6, Ip, Ipv4, Ipv6, SOLICITATION, TCP,
    TRANSPORT, TRANSPORT6, UDP,
};
use zerocopy::big_endian::U16;

/// What is asked for: a constant that who loads the programs writes, so that the verifier removes what is not asked for.
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
    /// Its addresses, ports and protocol on the side that is looked at.
    side: FlowKey6,
    /// 1: there is a packet.
    there: u64,
    /// What the path says of it.
    verdict: u64,
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
    // SAFETY: the map returned a pointer to this CPU's own value, which outlives the run, and programs do not nest on a CPU.
    Some(unsafe { &mut *kept })
}

#[inline(always)]
fn clock() -> u64 {
    // SAFETY: the helper takes no arguments and only reads the clock.
    unsafe { bpf_ktime_get_ns() }
}

/// What a capture needs of a frame.
pub(crate) trait Watched: Host {
    /// Copies the frame's first bytes to `to`; says whether it did.
    ///
    /// # Safety
    ///
    /// There is room for `length` bytes.
    unsafe fn copy(&self, to: *mut u8, length: u32) -> bool;

    /// Bytes of payload in each segment that a device is yet to cut it into; 0: it is one packet.
    fn segment(&self) -> u16;

    /// Its tags that are not among its bytes.
    fn hidden(&self) -> Tags;
}

impl Watched for XdpFrame {
    #[inline(always)]
    unsafe fn copy(&self, to: *mut u8, length: u32) -> bool {
        // SAFETY: the caller has the room, and the helper checks the frame.
        unsafe { bpf_xdp_load_bytes(self.context().ctx, 0, to.cast(), length) == 0 }
    }

    #[inline(always)]
    fn segment(&self) -> u16 {
        0
    }

    #[inline(always)]
    fn hidden(&self) -> Tags {
        Tags::default()
    }
}

impl Watched for SkbFrame {
    #[inline(always)]
    unsafe fn copy(&self, to: *mut u8, length: u32) -> bool {
        // SAFETY: as above.
        unsafe { bpf_skb_load_bytes(self.context().as_ptr().cast(), 0, to.cast(), length) == 0 }
    }

    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "16 bits, as a word of the context")]
    fn segment(&self) -> u16 {
        self.word(offset_of!(__sk_buff, gso_size)) as u16
    }

    #[inline(always)]
    fn hidden(&self) -> Tags {
        let outer = if self.is_tagged() { self.beside() } else { Tag::default() };
        Tags { outer, inner: Tag::default() }
    }
}

/// Keeps how a packet came.
#[inline(always)]
pub(crate) fn keep<W: Watched>(frame: &W, ifindex: u32) {
    if let Some(kept) = kept() {
        let Tags { outer, inner } = frame.hidden();
        kept.event.tags = [outer, inner];
    }
    note(frame, ifindex);
}

/// Keeps how a packet came of whose frame [`enter`](crate::vlan::enter) has taken the tags off.
#[inline(always)]
pub(crate) fn keep_entered<W: Watched>(frame: &W, ifindex: u32) {
    if let Some(kept) = kept() {
        // SAFETY: the map returned a pointer to this CPU's own value, which outlives the run.
        let Tags { outer, inner } =
            CAME.get_ptr_mut(0).map(|came| unsafe { (*came).tags }).unwrap_or_default();
        kept.event.tags = [outer, inner];
    }
    note(frame, ifindex);
}

/// Keeps the rest. Not inlined, like the others below: the kernel bounds a function's stack.
#[inline(never)]
fn note<W: Watched>(frame: &W, ifindex: u32) {
    let Some(kept) = kept() else { return };
    kept.there = 0;
    let sample = asked!(sample);
    // SAFETY: the helper takes no arguments.
    if sample > 1 && unsafe { bpf_get_prandom_u32() } % sample != 0 {
        return;
    }
    let Some(from) = interface(ifindex).filter(|from| from.vpc != 0) else { return };
    let event = &mut kept.event;
    (event.vpc, event.slot) = (from.vpc, from.slot);
    (event.length, event.header_length) = read(frame, &mut event.header);
    event.segment = frame.segment();
    event.left_tags = [Tag::default(); 2];
    (event.endpoint, event.target, event.peer_vpc, event.peer_slot) = (0, 0, 0, 0);
    // A RST takes the flow that it belongs to away.
    belong(kept);
    kept.event.entered = clock();
    kept.there = 1;
}

/// Hands over a packet, how it leaves, and the path's verdict, which is returned. It goes by memory, of which the kernel's verifier knows
/// nothing, so that it goes through what follows once, and not once for each verdict and way to it.
#[inline(always)]
pub(crate) fn hand_over<W: Watched>(frame: &W, verdict: Verdict) -> Verdict {
    if let Some(kept) = kept() {
        kept.verdict = verdict.word();
    }
    tell(frame);
    kept().map_or(Verdict::PASS, |kept| Verdict::from_word(kept.verdict))
}

#[inline(never)]
fn tell<W: Watched>(frame: &W) {
    let (Some(kept), Some(missed)) = (kept(), MISSED.get_ptr_mut(0)) else { return };
    if kept.there == 0 {
        return;
    }
    kept.there = 0;
    kept.event.left = clock();
    // A flow's first packet belongs to it only by now.
    belong(kept);
    let is_dropped = conclude(&mut kept.event, Verdict::from_word(kept.verdict));
    (kept.event.left_length, _) = read(frame, &mut kept.after);
    if asked!(dropped) != 0 && !is_dropped || !is_chosen(kept) {
        return;
    }
    // SAFETY: the map returned a pointer to this CPU's own value.
    let missed = unsafe { &mut *missed };
    let event = &mut kept.event;
    if !take_token(event.left) {
        missed.rate += 1;
        return;
    }
    let bytes = u64::from(event.left_length.min(asked!(snaplen)) & 0xffff);
    let flags = bytes << 32 | BPF_F_CURRENT_CPU;
    let (map, event) = ((&raw const EVENTS).cast_mut().cast(), (&raw mut *event).cast());
    // SAFETY: the context is the kernel's own, the map is one, and the event as long as stated.
    let result = unsafe {
        bpf_perf_event_output(frame.log_context().as_ptr(), map, flags, event, size_of::<Event>() as u64)
    };
    if result != 0 {
        missed.room += 1;
    }
}

/// Copies the beginning of a frame; returns the lengths of the frame and of the copy.
#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "a frame's length")]
fn read<W: Watched>(frame: &W, header: &mut [u8; HEADER]) -> (u32, u32) {
    let length = frame.len() as u32;
    // The comparison is with the number that the helper gets, whatever the compiler knows of it: so the verifier learns its bounds.
    let copied = black_box(length.min(HEADER as u32));
    if copied == 0 || copied > HEADER as u32 {
        return (length, 0);
    }
    // SAFETY: the header has room for so much.
    let done = unsafe { frame.copy(header.as_mut_ptr(), copied) };
    (length, if done { copied } else { 0 })
}

/// The tags that are put on a frame as it leaves by the interface with this slot.
#[inline(always)]
fn tags(verdict: Verdict, slot: u16) -> [Tag; 2] {
    let trunk = TRUNKS.get(slot.into()).filter(|_| verdict.is_tagged());
    trunk.map_or([Tag::default(); 2], |trunk| [trunk.outer, trunk.inner])
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
            event.left_tags = tags(verdict, interface);
        }
        Action::Steer { interface } => {
            (event.outcome, event.peer_slot, event.peer_vpc) = (STEERED, interface, event.vpc);
            event.left_tags = tags(verdict, interface);
        }
        Action::Answer(code) => {
            (event.outcome, event.peer_slot, event.peer_vpc) = (code, event.slot, event.vpc);
            event.left_tags = event.tags;
        }
        Action::Pass => event.outcome = PASSED,
        Action::Hold => event.outcome = FRAGMENT_EARLY,
    }
    false
}

/// Four bytes of a header; which, is a constant at every call.
#[inline(always)]
fn four(header: &[u8; HEADER], at: usize) -> Ipv4 {
    [header[at], header[at + 1], header[at + 2], header[at + 3]]
}

#[inline(always)]
fn address(header: &[u8; HEADER], at: usize) -> Ip {
    let words = [four(header, at), four(header, at + 4), four(header, at + 8), four(header, at + 12)];
    let address: Ipv6 = zerocopy::transmute!(words);
    Ip(address)
}

#[inline(always)]
fn ports(header: &[u8; HEADER], at: usize) -> [U16; 2] {
    zerocopy::transmute!(four(header, at))
}

/// Reads the addresses, ports and protocol of a packet, as far as it has them; zeros for the others. Who is asked for takes the place of
/// the destination in ARP and neighbour discovery.
#[inline(always)]
fn read_side(header: &[u8; HEADER], vpc: u16, side: &mut FlowKey6) {
    (side.vpc, side.protocol, side.reserved) = (vpc, 0, 0);
    (side.source_port, side.destination_port) = (U16::ZERO, U16::ZERO);
    let protocol = match u16::from_be_bytes([header[12], header[13]]) {
        ETHERTYPE_IPV4 => {
            side.source = Ip::from_ipv4(four(header, 26));
            side.destination = Ip::from_ipv4(four(header, 30));
            let is_whole = header[14] == 0x45 && header[20] & 0x1f == 0 && header[21] == 0;
            if is_whole && (header[23] == TCP || header[23] == UDP) {
                [side.source_port, side.destination_port] = ports(header, TRANSPORT);
            }
            header[23]
        }
        ETHERTYPE_IPV6 => {
            (side.source, side.destination) = (address(header, 22), address(header, 38));
            let protocol = header[20];
            if protocol == TCP || protocol == UDP {
                [side.source_port, side.destination_port] = ports(header, TRANSPORT6);
            } else if protocol == ICMPV6 && matches!(header[TRANSPORT6], SOLICITATION | ADVERTISEMENT) {
                side.destination = address(header, TRANSPORT6 + 8);
            }
            protocol
        }
        ETHERTYPE_ARP => {
            side.source = Ip::from_ipv4(four(header, 28));
            side.destination = Ip::from_ipv4(four(header, 38));
            0
        }
        _ => {
            (side.source, side.destination) = (Ip::default(), Ip::default());
            0
        }
    };
    side.protocol = protocol;
}

/// Notes the flow that the packet belongs to, if there is one, or else the endpoint whose address it has.
#[inline(always)]
fn belong(kept: &mut Kept) {
    let Kept { event, side, .. } = kept;
    read_side(&event.header, event.vpc, side);
    let side: &FlowKey6 = side;
    // It only looks something up, which needs no context.
    let tables = KernelTables(XdpExit(core::ptr::null_mut()));
    if let Some(key) = side.other()
        && let Some(entry) = tables.established(&key).or_else(|| tables.pending(&key))
    {
        let flow = entry.flow();
        (event.endpoint, event.target, event.peer_vpc) =
            (flow.endpoint.into(), flow.target.into(), flow.peer_vpc);
    } else if let Some(entry) = tables.established(side).or_else(|| tables.pending(side)) {
        let flow = entry.flow();
        (event.endpoint, event.target, event.peer_vpc) =
            (flow.endpoint.into(), flow.target.into(), flow.peer_vpc);
    }
    for address in [side.destination, side.source] {
        if event.endpoint == 0 {
            let found = tables.address(&VpcAddress::new(event.vpc, address));
            event.endpoint = found.filter(|it| it.kind == ENDPOINT).map_or(0, |it| it.endpoint);
        }
    }
}

/// Whether the packet is one that is asked for: on one of its sides, as it came or as it leaves.
#[inline(always)]
fn is_chosen(kept: &mut Kept) -> bool {
    let Kept { event, after, side, .. } = kept;
    if asked!(endpoints[0]) != 0 && !is_of_endpoint(event.endpoint) {
        return false;
    }
    read_side(&event.header, event.vpc, side);
    if matches(side) {
        return true;
    }
    if event.peer_slot == 0 {
        return false;
    }
    read_side(after, event.peer_vpc, side);
    matches(side)
}

#[inline(always)]
fn is_of_endpoint(endpoint: u32) -> bool {
    (0..ENDPOINTS).any(|index| endpoint != 0 && asked!(endpoints[index]) == endpoint)
}

/// Whether one side of a packet has all that is asked for.
#[inline(always)]
fn matches(side: &FlowKey6) -> bool {
    let is_of_vpc = asked!(vpc) == 0 || asked!(vpc) == side.vpc;
    let is_of_protocol = asked!(protocol) == 0 || asked!(protocol) == side.protocol;
    let (source, destination) = ((side.source, side.source_port), (side.destination, side.destination_port));
    let is_between = is_end::<0>(source) && is_end::<1>(destination);
    is_of_vpc && is_of_protocol && (is_between || is_end::<0>(destination) && is_end::<1>(source))
}

#[inline(always)]
fn is_end<const INDEX: usize>((address, port): (Ip, U16)) -> bool {
    let (wanted, wanted_port) = (asked!(ends[INDEX].address), asked!(ends[INDEX].port));
    (wanted == Ip::default() || wanted == address) && (wanted_port == U16::ZERO || wanted_port == port)
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
