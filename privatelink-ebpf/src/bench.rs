//! Programs that the benchmark compares `ingress` with: `empty`, and `floor`, which is the least that any NAT must do: parse, one hash
//! lookup, rewrite, redirect. It checks nothing that it does not need in order to load.
#![no_std]
#![no_main]

use aya_ebpf::{
    bindings::xdp_action,
    btf_maps::{DevMapHash, HashMap},
    macros::{btf_map, xdp},
    programs::XdpContext,
};
use core::mem::size_of;
use privatelink_common::checksum::update;
use privatelink_common::tables::{Flow, FlowKey};
use privatelink_common::wire::{Ethernet, Ipv4Header, Tcp};

#[btf_map(name = "floor_flows")]
static FLOWS: HashMap<FlowKey, Flow, 1048576> = HashMap::new();
#[btf_map(name = "floor_egress")]
static EGRESS: DevMapHash<64> = DevMapHash::new();

/// The headers of a TCP segment without IP options.
#[repr(C)]
struct Headers {
    ethernet: Ethernet,
    ip: Ipv4Header,
    tcp: Tcp,
}

/// What a test run costs by itself.
#[xdp(frags)]
pub(crate) fn empty(_context: XdpContext) -> u32 {
    xdp_action::XDP_DROP
}

/// The least.
#[xdp(frags)]
pub(crate) fn floor(context: XdpContext) -> u32 {
    nat(&context).unwrap_or(xdp_action::XDP_PASS)
}

#[inline(always)]
fn nat(context: &XdpContext) -> Option<u32> {
    let start = context.data() as *mut u8;
    if start.wrapping_add(size_of::<Headers>()) > context.data_end() as *mut u8 {
        return None;
    }
    // SAFETY: the comparison above proved that the headers are within the frame; their types have an alignment of one.
    let headers = unsafe { &mut *start.cast::<Headers>() };
    if headers.ethernet.ethertype.get() != 0x0800
        || headers.ip.version_ihl != 0x45
        || headers.ip.protocol != 6
    {
        return None;
    }
    let key = FlowKey {
        source: headers.ip.source,
        destination: headers.ip.destination,
        source_port: headers.tcp.source_port,
        destination_port: headers.tcp.destination_port,
        vpc: 1,
        protocol: headers.ip.protocol,
        reserved: 0,
    };
    // SAFETY: nothing else writes to this map while the benchmark runs.
    let flow = unsafe { FLOWS.get(key) }?;
    headers.ethernet.destination = flow.destination_mac;
    headers.ethernet.source = flow.source_mac;
    headers.ip.source = flow.source;
    headers.ip.destination = flow.destination;
    headers.tcp.source_port = flow.source_port;
    headers.tcp.destination_port = flow.destination_port;
    headers.ip.checksum = update(headers.ip.checksum, flow.address_delta.into());
    headers.tcp.checksum =
        update(headers.tcp.checksum, u32::from(flow.address_delta) + u32::from(flow.port_delta));
    EGRESS.redirect(flow.interface.into(), 0).ok()
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

/// The kernel grants helpers by licence; those used here need a GPL-compatible one.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
