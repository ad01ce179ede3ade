//! Applies one direction's rewrite to the frame: addresses, ports, and both checksums by what they change (RFC 1624).

use super::parse::Packet;
use crate::checksum::{update, update_udp};
use crate::frame::Frame;
use crate::tables::{Flow, FlowKey};
use crate::verdict::DropReason;
use crate::wire::{Ipv4, Ipv4Header, Mac, NETWORK, TRANSPORT, Tcp, Udp};
use core::mem::offset_of;
use zerocopy::{Immutable, IntoBytes, big_endian::U16};

/// Destination and source of an Ethernet header.
#[derive(Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct Macs(Mac, Mac);

/// The checksum, source and destination of an IPv4 header.
#[derive(Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct IpTail([u8; 2], Ipv4, Ipv4);

/// Source and destination port.
#[derive(Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct Ports(U16, U16);

/// Rewrites `frame`, whose headers are those in `packet`.
#[inline(always)]
pub(super) fn rewrite<F: Frame>(
    frame: &mut F,
    packet: &Packet<FlowKey>,
    flow: &Flow,
) -> Result<(), DropReason> {
    let address_delta = u32::from(flow.address_delta);
    let delta = address_delta + u32::from(flow.port_delta);
    let (at, checksum) = if packet.is_tcp {
        (TRANSPORT + offset_of!(Tcp, checksum), update(packet.checksum, delta))
    } else {
        (TRANSPORT + offset_of!(Udp, checksum), update_udp(packet.checksum, delta))
    };
    let ip_checksum = update(packet.ip_checksum, address_delta);
    write(frame, flow, at, ip_checksum, checksum).ok_or(DropReason::Malformed)
}

#[inline(always)]
fn write<F: Frame>(
    frame: &mut F,
    flow: &Flow,
    checksum_at: usize,
    ip_checksum: [u8; 2],
    checksum: [u8; 2],
) -> Option<()> {
    frame.write(0, &Macs(flow.destination_mac, flow.source_mac))?;
    let tail = IpTail(ip_checksum, flow.source, flow.destination);
    frame.write(NETWORK + offset_of!(Ipv4Header, checksum), &tail)?;
    frame.write(TRANSPORT, &Ports(flow.source_port, flow.destination_port))?;
    frame.write(checksum_at, &checksum)
}
