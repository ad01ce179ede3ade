//! Packets to our own addresses that belong to no flow: ARP and ICMP echo are answered in place, the rest is refused by name.

use super::fragment;
use super::parse::Packet;
use super::rules::{self, Way};
use crate::checksum::{delta, update, word};
use crate::frame::Frame;
use crate::tables::{ENDPOINT, FlowKey, Interface, Tables, VpcAddress};
use crate::verdict::{Answer, DropReason, Verdict};
use crate::wire::{Arp, Ethernet, HOPS, ICMP, Icmp, Ipv4Header, Mac, NETWORK, TRANSPORT};
use core::mem::offset_of;
use zerocopy::{Immutable, IntoBytes, big_endian::U16};

const REQUEST: u16 = 1;
const REPLY: u16 = 2;
const ECHO_REQUEST: u8 = 8;
const ECHO_REPLY: u8 = 0;

/// Answers an ARP request for one of our addresses (RFC 826).
#[inline(always)]
pub(super) fn arp<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    from: &Interface,
) -> Result<Verdict, DropReason> {
    let Some(arp) = frame.read::<Arp>(NETWORK) else { return Ok(Verdict::PASS) };
    if arp.hardware.get() != 1 || arp.protocol.get() != 0x0800 || arp.lengths != [6, 4] {
        return Ok(Verdict::PASS);
    }
    if tables.address(&VpcAddress::ipv4(from.vpc, arp.sender)).is_some() {
        return Err(DropReason::SpoofedSource);
    }
    if arp.operation.get() != REQUEST {
        return Ok(Verdict::PASS);
    }
    let Some(address) = tables.address(&VpcAddress::ipv4(from.vpc, arp.target)) else {
        return Ok(Verdict::PASS);
    };
    arp_reply(frame, &arp, address.mac).ok_or(DropReason::Malformed)?;
    Ok(Verdict::answer(Answer::ArpReply.code()))
}

/// Turns the request into the reply that says `mac`.
#[inline(always)]
pub(super) fn arp_reply<F: Frame>(frame: &mut F, request: &Arp, mac: Mac) -> Option<()> {
    let ethernet = frame.read::<Ethernet>(0)?;
    frame.write(0, &Ethernet { destination: ethernet.source, source: mac, ..ethernet })?;
    let reply = Arp {
        operation: U16::new(REPLY),
        sender_mac: mac,
        sender: request.target,
        target_mac: request.sender_mac,
        target: request.sender,
        ..*request
    };
    frame.write(NETWORK, &reply)
}

/// Answers an ICMP echo request (RFC 792), and refuses whatever else is for us.
#[inline(always)]
pub(super) fn answer<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    packet: &Packet<FlowKey>,
    fault: Option<DropReason>,
) -> Result<Verdict, DropReason> {
    let Some(address) = tables.address(&VpcAddress::ipv4(packet.key.vpc, packet.key.destination)) else {
        return Ok(Verdict::PASS);
    };
    let source = VpcAddress::ipv4(packet.key.vpc, packet.key.source);
    if let Some(fault) = fault {
        return fragment::refuse(tables, &address, &source, fault);
    }
    if tables.address(&source).is_some() {
        return Err(DropReason::SpoofedSource);
    }
    if packet.key.protocol != ICMP {
        return Err(DropReason::ProtocolUnsupported);
    }
    let icmp = frame.read::<Icmp>(TRANSPORT).ok_or(DropReason::Malformed)?;
    let total = frame.read::<U16>(NETWORK + offset_of!(Ipv4Header, total_length)).unwrap_or_default();
    if frame.ip_length(total.get()) < TRANSPORT - NETWORK + size_of::<Icmp>() {
        return Err(DropReason::Malformed);
    }
    let echo = icmp.kind == ECHO_REQUEST && icmp.code == 0;
    if !echo || address.kind != ENDPOINT || address.ping == 0 {
        return Err(DropReason::IcmpUnsupported);
    }
    if !tables.in_vpc(&source) {
        return Err(DropReason::SourceOutsideVpc);
    }
    let endpoint = tables.endpoint(address.endpoint);
    if endpoint.open == 0 {
        return Err(DropReason::EndpointClosed);
    }
    rules::answers(tables, &endpoint, &Way::of(&packet.key))?;
    echo_reply(frame, packet, &icmp, address.mac).ok_or(DropReason::Malformed)?;
    Ok(Verdict::answer(Answer::EchoReply.code()))
}

/// An IPv4 header from its TTL on.
#[derive(Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct Tail([u8; 2], [u8; 2], [u8; 4], [u8; 4]);

/// Swapping the addresses leaves the IPv4 checksum as it is, but the reply has hops of its own; the type's change is all that the ICMP
/// checksum sees.
#[inline(always)]
fn echo_reply<F: Frame>(frame: &mut F, packet: &Packet<FlowKey>, icmp: &Icmp, mac: Mac) -> Option<()> {
    let ethernet = frame.read::<Ethernet>(0)?;
    frame.write(0, &Ethernet { destination: ethernet.source, source: mac, ..ethernet })?;
    let hops = delta(word([packet.ttl, ICMP]), word([HOPS, ICMP]));
    let checksum = update(packet.ip_checksum, hops.into());
    let tail = Tail([HOPS, ICMP], checksum, packet.key.destination, packet.key.source);
    frame.write(NETWORK + offset_of!(Ipv4Header, ttl), &tail)?;
    let change = delta(word([ECHO_REQUEST, 0]), word([ECHO_REPLY, 0]));
    let checksum = match update(icmp.checksum, change.into()) {
        // Nothing but zeros in a reply without number and data: of the two zeros, only this one is then right (RFC 1624, 3).
        [0, 0] => [0xff; 2],
        checksum => checksum,
    };
    frame.write(TRANSPORT, &Icmp { kind: ECHO_REPLY, code: 0, checksum })
}
