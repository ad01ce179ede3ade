//! Programs that the benchmark compares `ingress` with, or feeds it by.
//!
//! `empty` is what a test run costs by itself. `floor` is the least that any NAT must do: parse, one hash lookup, rewrite, redirect;
//! it checks nothing that it does not need in order to load. `redirect` does not even look. `generate` makes small UDP datagrams of
//! as many flows as it is told, and `sink` counts what arrives.
#![no_std]
#![no_main]

use aya_ebpf::{
    bindings::xdp_action,
    btf_maps::{Array, DevMapHash, HashMap, PerCpuArray, ProgramArray},
    macros::{btf_map, xdp},
    programs::XdpContext,
};
use core::mem::size_of;
use privatelink_common::checksum::{address, finish, update, word};
use privatelink_common::tables::{Flow, FlowKey};
use privatelink_common::wire::{Ethernet, Ipv4, Ipv4Header, SYN, TCP, Tcp, UDP, Udp};
use zerocopy::big_endian::{U16, U32};

#[btf_map(name = "floor_flows")]
static FLOWS: HashMap<FlowKey, Flow, 1048576> = HashMap::new();
/// Slots as in the dataplane's `egress`: 1 is where a NAT sends to, 2 where datagrams are made.
#[btf_map(name = "floor_egress")]
static EGRESS: DevMapHash<64> = DevMapHash::new();
/// How many flows `generate` makes, a power of two, and the one that is next.
#[btf_map(name = "load")]
static LOAD: Array<[u32; 2], 1> = Array::new();
/// The program that `again` goes on with.
#[btf_map(name = "subject")]
static SUBJECT: ProgramArray<1> = ProgramArray::new();
/// What `sink` has counted.
#[btf_map(name = "arrived")]
static ARRIVED: PerCpuArray<u64, 1> = PerCpuArray::new();

/// What generated datagrams are sent to.
const SERVICE: Ipv4 = [10, 255, 9, 9];

/// What generated frames begin with.
const ETHERNET: Ethernet =
    Ethernet { destination: [2, 0, 0, 0, 0, 2], source: [2, 0, 0, 0, 0, 1], ethertype: U16::new(0x0800) };

#[repr(C)]
struct Headers<T> {
    ethernet: Ethernet,
    ip: Ipv4Header,
    transport: T,
}

/// What a test run costs by itself.
#[xdp(frags)]
pub(crate) fn empty(_context: XdpContext) -> u32 {
    xdp_action::XDP_DROP
}

/// Gives a packet its TTL back and another byte that was sent, and goes on with another program: what that one forwards, it can be given
/// again and again, as what follows.
#[xdp(frags)]
pub(crate) fn again(mut context: XdpContext) -> u32 {
    let Some(headers) = headers::<Tcp>(&mut context) else { return xdp_action::XDP_ABORTED };
    headers.ip.ttl = 64;
    headers.transport.sequence = U32::new(headers.transport.sequence.get().wrapping_add(1));
    // SAFETY: the context is the program's own.
    unsafe { SUBJECT.tail_call(&context, 0) };
    xdp_action::XDP_ABORTED
}

/// The least, for TCP.
#[xdp(frags)]
pub(crate) fn floor(mut context: XdpContext) -> u32 {
    tcp(&mut context).unwrap_or(xdp_action::XDP_PASS)
}

/// The least, for UDP.
#[xdp(frags)]
pub(crate) fn minimal(mut context: XdpContext) -> u32 {
    udp(&mut context).unwrap_or(xdp_action::XDP_PASS)
}

/// Sends on whatever comes.
#[xdp(frags)]
pub(crate) fn redirect(_context: XdpContext) -> u32 {
    EGRESS.redirect(1, 0).unwrap_or(xdp_action::XDP_DROP)
}

/// Counts and drops.
#[xdp(frags)]
pub(crate) fn sink(_context: XdpContext) -> u32 {
    if let Some(count) = ARRIVED.get_ptr_mut(0) {
        // SAFETY: the map returned a pointer to this CPU's own value.
        unsafe { *count += 1 };
    }
    xdp_action::XDP_DROP
}

/// Makes a datagram of the next flow out of the frame that it is given.
#[xdp(frags)]
pub(crate) fn generate(mut context: XdpContext) -> u32 {
    datagram(&mut context).unwrap_or(xdp_action::XDP_DROP)
}

#[inline(always)]
fn headers<T>(context: &mut XdpContext) -> Option<&mut Headers<T>> {
    let start = context.data() as *mut u8;
    if start.wrapping_add(size_of::<Headers<T>>()) > context.data_end() as *mut u8 {
        return None;
    }
    // SAFETY: the comparison above proved that the headers are within the frame; their types have an alignment of one, and any bytes
    // are valid for them. No other reference into the frame exists.
    Some(unsafe { &mut *start.cast::<Headers<T>>() })
}

#[inline(always)]
fn tcp(context: &mut XdpContext) -> Option<u32> {
    let headers = headers::<Tcp>(context)?;
    if headers.ethernet.ethertype.get() != 0x0800
        || headers.ip.version_ihl != 0x45
        || headers.ip.protocol != TCP
    {
        return None;
    }
    let flow = lookup(&headers.ip, headers.transport.source_port, headers.transport.destination_port)?;
    translate(&mut headers.ethernet, &mut headers.ip, flow);
    let ports = ports(&headers.transport.source_port, &headers.transport.destination_port, flow);
    headers.transport.source_port = flow.source_port;
    headers.transport.destination_port = flow.destination_port;
    headers.transport.checksum = update(headers.transport.checksum, u32::from(flow.address_delta) + ports);
    EGRESS.redirect(flow.interface.into(), 0).ok()
}

#[inline(always)]
fn udp(context: &mut XdpContext) -> Option<u32> {
    let headers = headers::<Udp>(context)?;
    if headers.ethernet.ethertype.get() != 0x0800
        || headers.ip.version_ihl != 0x45
        || headers.ip.protocol != UDP
    {
        return None;
    }
    let flow = lookup(&headers.ip, headers.transport.source_port, headers.transport.destination_port)?;
    translate(&mut headers.ethernet, &mut headers.ip, flow);
    let ports = ports(&headers.transport.source_port, &headers.transport.destination_port, flow);
    headers.transport.source_port = flow.source_port;
    headers.transport.destination_port = flow.destination_port;
    if headers.transport.checksum != [0; 2] {
        headers.transport.checksum =
            update(headers.transport.checksum, u32::from(flow.address_delta) + ports);
    }
    EGRESS.redirect(flow.interface.into(), 0).ok()
}

#[inline(always)]
fn lookup(ip: &Ipv4Header, source_port: U16, destination_port: U16) -> Option<&'static Flow> {
    let key = FlowKey {
        source: ip.source,
        destination: ip.destination,
        source_port,
        destination_port,
        vpc: 1,
        protocol: ip.protocol,
        reserved: 0,
    };
    // SAFETY: nothing else writes to this map while the benchmark runs.
    unsafe { FLOWS.get(key) }
}

/// What the new ports change of a checksum.
#[inline(always)]
fn ports(source: &U16, destination: &U16, flow: &Flow) -> u32 {
    let gone = |port: &U16| u32::from(!u16::from_ne_bytes(port.to_bytes()));
    let come = |port: U16| word(port.to_bytes());
    gone(source) + gone(destination) + come(flow.source_port) + come(flow.destination_port)
}

#[inline(always)]
fn translate(ethernet: &mut Ethernet, ip: &mut Ipv4Header, flow: &Flow) {
    ethernet.destination = flow.destination_mac;
    ethernet.source = flow.source_mac;
    ip.source = flow.source;
    ip.destination = flow.destination;
    ip.checksum = update(ip.checksum, flow.address_delta.into());
}

#[inline(always)]
fn datagram(context: &mut XdpContext) -> Option<u32> {
    let headers = headers::<Udp>(context)?;
    let source = next_source()?;
    headers.ethernet = ETHERNET;
    // 46 bytes of IP packet, which fill the smallest Ethernet frame.
    let fixed = word([0x45, 0]) + word([0, 46]) + word([64, UDP]);
    headers.ip = Ipv4Header {
        version_ihl: 0x45,
        tos: 0,
        total_length: U16::new(46),
        id: U16::ZERO,
        fragment: U16::ZERO,
        ttl: 64,
        protocol: UDP,
        checksum: finish(fixed + address(source) + address(SERVICE)),
        source,
        destination: SERVICE,
    };
    headers.transport = Udp {
        source_port: U16::new(40000),
        destination_port: U16::new(53),
        length: U16::new(26),
        checksum: [0; 2],
    };
    EGRESS.redirect(2, 0).ok()
}

/// Makes a SYN of the next spoofed source out of the frame that it is given.
#[xdp(frags)]
pub(crate) fn flood(mut context: XdpContext) -> u32 {
    syn(&mut context).unwrap_or(xdp_action::XDP_DROP)
}

#[inline(always)]
fn syn(context: &mut XdpContext) -> Option<u32> {
    let headers = headers::<Tcp>(context)?;
    let source = next_source()?;
    headers.ethernet = ETHERNET;
    let fixed = word([0x45, 0]) + word([0, 40]) + word([64, TCP]);
    headers.ip = Ipv4Header {
        version_ihl: 0x45,
        tos: 0,
        total_length: U16::new(40),
        id: U16::ZERO,
        fragment: U16::ZERO,
        ttl: 64,
        protocol: TCP,
        checksum: finish(fixed + address(source) + address(SERVICE)),
        source,
        destination: SERVICE,
    };
    headers.transport = Tcp {
        source_port: U16::new(40000),
        destination_port: U16::new(80),
        sequence: U32::ZERO,
        acknowledgement: U32::ZERO,
        data_offset: 5 << 4,
        flags: SYN,
        window: U16::new(1000),
        checksum: [0; 2],
        urgent: U16::ZERO,
    };
    EGRESS.redirect(2, 0).ok()
}

/// The source addresses come in the order of a linear congruence, which visits each of them once before it comes back.
#[inline(always)]
fn next_source() -> Option<Ipv4> {
    let load = LOAD.get_ptr_mut(0)?;
    // SAFETY: only this program writes here, and the benchmark runs it on one CPU.
    let flow = unsafe {
        let [flows, next] = *load;
        (*load)[1] = next.wrapping_mul(1_664_525).wrapping_add(1_013_904_223) & flows.wrapping_sub(1);
        next
    };
    let [_, a, b, c] = flow.to_be_bytes();
    Some([10, a, b, c])
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

/// The kernel grants helpers by licence; those used here need a GPL-compatible one.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
