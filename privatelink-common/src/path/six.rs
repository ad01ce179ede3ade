//! Frames of IPv6, and flows that are IPv6 on one side or on both: the same stages in the same order, over the wide tables.
//!
//! What these flows need of memory is lent by the host, since it is more than a function of the kernel may have on its stack.

use super::first::{self, Next, Peer, Standing, Step};
use super::hop::Passage;
use super::parse::{Packet, fault};
use super::quote::{self, Quote};
use super::report::report6;
use super::sequence::Numbers;
use super::{admit, flow, fragment, hop, neighbour, reset, stack, translate};
use crate::checksum::Delta;
use crate::frame::Frame;
use crate::tables::{Flow6, FlowKey, FlowKey6, FragmentKey, Interface, Key, Tables};
use crate::verdict::{DropReason, FlowEvent, Verdict};
use crate::wire::{
    ADVERTISEMENT, Ethernet, FRAGMENT_OFFSET6, FRAGMENT6, FragmentHeader, Icmp, Ip, Ipv6Header, NETWORK,
    SOLICITATION, SYN, TCP, TRANSPORT6, Tcp, UDP, Udp,
};
use core::mem::offset_of;
use zerocopy::big_endian::U16;

/// The part of the path's room that is for wide flows.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Wide {
    packet: Packet<FlowKey6>,
    pub(super) flow: Flow6,
    pub(super) peer: Peer<FlowKey6>,
    pub(super) quote: Quote,
    fragment: FragmentKey,
}

/// Of an IPv4 packet, the narrow tables have been asked; an IPv6 packet can be in no others.
const ASKED: Standing = Standing { asked: true, confirmed: false };

/// An IPv6 frame, as far as the path knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Parsed6 {
    /// A TCP segment or UDP datagram whose headers are whole and agree with each other.
    Flow,
    /// Any other packet with a whole IPv6 header; why it is refused if it is for us, whatever else it is.
    Other(Option<DropReason>),
    /// Not IPv6, or too short to be.
    Foreign,
}

/// A [`Parsed6`] in one register: a fault's code or 0, or one of the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kind(u64);

impl Kind {
    const FLOW: Self = Self(1 << 32);
    const FOREIGN: Self = Self(2 << 32);

    /// What it says.
    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "a code")]
    pub(super) const fn parsed(self) -> Parsed6 {
        match self {
            Self::FLOW => Parsed6::Flow,
            Self::FOREIGN => Parsed6::Foreign,
            Self(code) => Parsed6::Other(DropReason::from_code(code as u32)),
        }
    }
}

/// Reads the headers of an IPv6 frame that came by `from`; those of a segment or datagram into `packet`. Not inlined, nor are most of
/// those below: the kernel bounds a function's stack.
#[inline(never)]
fn parse<F: Frame, T: Tables>(frame: &F, tables: &T, from: &Interface, now: u32, room: &mut Wide) -> Kind {
    let Some(ip) = frame.read::<Ipv6Header>(NETWORK) else { return Kind::FOREIGN };
    if ip.version_class_label.get() >> 28 != 6 {
        return Kind::FOREIGN;
    }
    match transport(frame, tables, &ip, (from, now), room) {
        Ok(true) => Kind::FLOW,
        Ok(false) => Kind(0),
        Err(fault) => Kind(fault as u64),
    }
}

/// The transport header behind an IPv6 header. Says no where the protocol has no ports.
#[inline(always)]
fn transport<F: Frame, T: Tables>(
    frame: &F,
    tables: &T,
    ip: &Ipv6Header,
    (from, now): (&Interface, u32),
    Wide { packet, peer, fragment, .. }: &mut Wide,
) -> Result<bool, DropReason> {
    let payload = usize::from(ip.payload_length.get());
    // An IPv4 address is one only in the tables: on the wire it would be a way round them (RFC 6890, table 20).
    let source = frame.read::<Ip>(NETWORK + offset_of!(Ipv6Header, source)).ok_or(DropReason::Malformed)?;
    let destination =
        frame.read::<Ip>(NETWORK + offset_of!(Ipv6Header, destination)).ok_or(DropReason::Malformed)?;
    if source.is_ipv4() || destination.is_ipv4() || !frame.holds(TRANSPORT6 + payload) {
        return Err(DropReason::Malformed);
    }
    let (source_port, destination_port, flags, checksum) = match ip.next_header {
        TCP => {
            let tcp = frame.read::<Tcp>(TRANSPORT6).ok_or(DropReason::Malformed)?;
            let header = usize::from(tcp.data_offset >> 4) * 4;
            if header < size_of::<Tcp>() || header > payload {
                return Err(DropReason::Malformed);
            }
            peer.numbers = Numbers::of(&tcp, payload - header);
            (tcp.source_port, tcp.destination_port, tcp.flags, tcp.checksum)
        }
        UDP => {
            let udp = frame.read::<Udp>(TRANSPORT6).ok_or(DropReason::Malformed)?;
            let length = usize::from(udp.length.get());
            // A datagram without a checksum is to be discarded (RFC 8200, 8.1).
            if length < size_of::<Udp>() || length > payload || udp.checksum == [0; 2] {
                return Err(DropReason::Malformed);
            }
            (udp.source_port, udp.destination_port, 0, udp.checksum)
        }
        FRAGMENT6 => {
            let length = ip.payload_length.get();
            fragment.vpc = from.vpc;
            let udp = fragment::header6(frame, tables, fragment, length, now).result()?;
            (udp.source_port, udp.destination_port, 0, udp.checksum)
        }
        other => return fault(other).map_or(Ok(false), Err),
    };
    let is_piece = ip.next_header == FRAGMENT6;
    packet.key = FlowKey6 {
        source,
        destination,
        source_port,
        destination_port,
        vpc: from.vpc,
        protocol: if is_piece { UDP } else { ip.next_header },
        reserved: 0,
    };
    packet.source_mac = frame.read::<Ethernet>(0).ok_or(DropReason::Malformed)?.source;
    packet.interface = from.slot;
    #[allow(clippy::cast_possible_truncation, reason = "not above what 16 bits hold")]
    let length = (TRANSPORT6 - NETWORK + payload).min(0xffff) as u16;
    packet.ttl = ip.hop_limit;
    packet.special = flags & SYN != 0 || ip.hop_limit <= 1 || length > from.fits || is_piece;
    (packet.flags, packet.later) = (flags, is_piece && is_later(frame));
    (packet.checksum, packet.ip_checksum) = (checksum, [0; 2]);
    Ok(true)
}

/// Whether a fragment is another than the first.
#[inline(always)]
fn is_later<F: Frame>(frame: &F) -> bool {
    let fragment = frame.read::<U16>(TRANSPORT6 + offset_of!(FragmentHeader, fragment)).unwrap_or_default();
    fragment.get() & FRAGMENT_OFFSET6 != 0
}

/// What is to become of an IPv6 frame.
#[inline(never)]
pub(super) fn forward<F: Frame, T: Tables>(frame: &mut F, tables: &T, from: &Interface, now: u32) -> Verdict {
    let verdict = tables.room(|room| decide(frame, tables, from, now, &mut room.wide));
    Verdict::of(verdict.unwrap_or(Err(DropReason::Malformed)))
}

#[inline(always)]
fn decide<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    from: &Interface,
    now: u32,
    room: &mut Wide,
) -> Result<Verdict, DropReason> {
    fragment::unwrap(frame, tables, from.vpc);
    match parse(frame, tables, from, now, room).parsed() {
        Parsed6::Flow => {}
        Parsed6::Other(fault) => return local(frame, tables, from, fault, now, room),
        Parsed6::Foreign => return Ok(Verdict::PASS),
    }
    match find(tables, now, room).next() {
        Next::Pass | Next::Other | Next::Unknown | Next::Admitted => Ok(Verdict::PASS),
        Next::Send(event) => {
            let report = |frame: &mut F, mtu| report6(frame, mtu);
            send(frame, tables, event, now, room, report).result()
        }
        Next::Expired(endpoint) => match hop::expired6(tables, endpoint, now).passage() {
            Passage::Report(mtu) => report6(frame, mtu).result(),
            Passage::Ends(verdict) => verdict.result(),
            Passage::Onward(_) | Passage::Piece => Err(DropReason::TtlExpired),
        },
        Next::Stack(interface) => stack::deliver(frame, tables, &room.packet, interface),
        Next::Resolver(interface) => stack::hear(frame, tables, &room.packet, interface),
        Next::Reset(answer) => reset::reset6(frame, answer).result(),
        Next::Cookie(_) | Next::Confirm(_) => Err(DropReason::NoFlow),
        Next::Drop(reason) => Err(DropReason::from_code(reason).unwrap_or(DropReason::Malformed)),
    }
}

/// A packet that is neither a segment nor a datagram, or not a whole one.
#[inline(always)]
fn local<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    from: &Interface,
    fault: Option<DropReason>,
    now: u32,
    room: &mut Wide,
) -> Result<Verdict, DropReason> {
    if fault.is_none()
        && let Some(icmp) = frame.read::<Icmp>(TRANSPORT6)
    {
        match icmp.kind {
            SOLICITATION => return neighbour::solicitation(frame, tables, from).result(),
            ADVERTISEMENT => return neighbour::advertisement(frame, tables, from).result(),
            kind if quote::is_error6(kind) => {
                return quote::pass_on6(frame, tables, from, now, room).result();
            }
            _ => {}
        }
    }
    neighbour::answer(frame, tables, from, fault.map_or(0, DropReason::code))
}

/// An ICMP error over IPv4 about none of the narrow flows.
#[inline(never)]
pub(super) fn error<F: Frame, T: Tables>(frame: &mut F, tables: &T, from: &Interface, now: u32) -> Verdict {
    let verdict = tables.room(|room| quote::pass_on4(frame, tables, from, now, &mut room.wide));
    verdict.unwrap_or(Verdict::of(Err(DropReason::Malformed)))
}

/// Finds or opens the flow of the packet in the room.
#[inline(always)]
fn find<T: Tables>(tables: &T, now: u32, room: &mut Wide) -> Step {
    if established(tables, now, room) {
        return Step::send(super::event(&room.packet));
    }
    match known(tables, now, room) {
        Step::UNKNOWN => unknown(tables, now, room),
        step => step,
    }
}

#[inline(never)]
fn established<T: Tables>(tables: &T, now: u32, room: &mut Wide) -> bool {
    flow::established_into(tables, &room.packet, now, &mut room.flow, || Some(room.peer.numbers))
}

#[inline(never)]
fn known<T: Tables>(tables: &T, now: u32, room: &mut Wide) -> Step {
    first::is_known(tables, &room.packet, now, &mut room.flow, &mut room.peer)
}

#[inline(always)]
fn unknown<T: Tables>(tables: &T, now: u32, room: &mut Wide) -> Step {
    match admit::admit(tables, &room.packet, now, ASKED, &mut room.peer.door) {
        Step::ADMITTED => first::open(tables, &room.packet, now, ASKED, &mut room.flow, &mut room.peer),
        step => step,
    }
}

/// Whether an IPv4 packet belongs to a flow whose other side is IPv6, or opens one. [`Next::Other`]: to none.
#[inline(always)]
pub(super) fn ask<T: Tables>(tables: &T, packet: &Packet<FlowKey>, now: u32, room: &mut Wide) -> Step {
    if widen(packet, room) { find(tables, now, room) } else { Step::OTHER }
}

#[inline(never)]
fn widen(packet: &Packet<FlowKey>, room: &mut Wide) -> bool {
    let Some(packet) = packet.other() else { return false };
    room.packet = packet;
    true
}

/// Sends the packet in the room by the flow in the room; `report` tells its sender why it cannot be.
#[inline(always)]
pub(super) fn send<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    event: FlowEvent,
    now: u32,
    room: &Wide,
    report: impl FnOnce(&mut F, u16) -> Verdict,
) -> Verdict {
    let mut correction = 0;
    if room.packet.special {
        correction = match hop::pass6(frame, tables, &room.packet, &room.flow, now).passage() {
            Passage::Onward(correction) => correction.transport,
            Passage::Piece => {
                let Wide { packet, fragment, .. } = room;
                let code = match packet.key.is_ipv4() {
                    true => fragment::identify4(frame, tables, packet, now),
                    false => fragment::identify6(frame, tables, packet, fragment, now),
                };
                return match DropReason::from_code(code) {
                    Some(reason) => Verdict::of(Err(reason)),
                    None => leave_piece(frame, tables, event, room),
                };
            }
            Passage::Ends(verdict) => return verdict,
            Passage::Report(mtu) => return report(frame, mtu),
        };
    }
    leave(frame, tables, event, correction, room)
}

#[inline(never)]
fn leave<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    event: FlowEvent,
    correction: Delta,
    room: &Wide,
) -> Verdict {
    let (packet, flow) = (&room.packet, &room.flow);
    if let Err(reason) = translate::rewrite(frame, packet, flow, correction) {
        return Verdict::of(Err(reason));
    }
    sent(tables, flow, event)
}

/// The same of a fragment.
#[inline(never)]
fn leave_piece<F: Frame, T: Tables>(frame: &mut F, tables: &T, event: FlowEvent, room: &Wide) -> Verdict {
    if let Err(reason) = translate::rewrite_piece(frame, &room.packet, &room.flow) {
        return Verdict::of(Err(reason));
    }
    sent(tables, &room.flow, event)
}

#[inline(always)]
fn sent<T: Tables>(tables: &T, flow: &Flow6, event: FlowEvent) -> Verdict {
    let (direction, ipv6) = (flow.direction(), !flow.source.is_ipv4());
    let verdict = Verdict::forward(flow.interface, flow.endpoint.into(), direction, event, ipv6);
    Verdict::of(verdict.leaving(tables.egress(flow.interface)))
}

/// An IPv6 packet that a VPC's own stack sends.
#[inline(never)]
pub(super) fn from_stack<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    from: &Interface,
    now: u32,
) -> Verdict {
    let result = tables.room(|room| {
        let room = &mut room.wide;
        match parse(frame, tables, from, now, room).parsed() {
            Parsed6::Flow if room.packet.later => Err(DropReason::Fragment),
            Parsed6::Flow => stack::route6(frame, tables, &room.packet).result(),
            Parsed6::Other(_) => stack::message(frame).result(),
            Parsed6::Foreign => Err(DropReason::ProtocolUnsupported),
        }
    });
    Verdict::of(result.unwrap_or(Err(DropReason::Malformed)))
}
