//! Frames of IPv6, and flows that are IPv6 on one side or on both: the same stages in the same order, over the wide tables.
//!
//! What these flows need of memory is lent by the host, since it is more than a function of the kernel may have on its stack.

use super::first::{self, Next, Peer, Standing, Step};
use super::hop::Passage;
use super::parse::{Packet, fault};
use super::quote::{self, Quote};
use super::report::report6;
use super::sequence::Numbers;
use super::{Room, admit, cookie, flow, fragment, hop, neighbour, proxy, reset, stack, translate};
use crate::checksum::Delta;
use crate::frame::Frame;
use crate::tables::{Flow6, FlowKey, FlowKey6, FragmentKey, Interface, Key, Tables};
use crate::verdict::{Answer, DropReason, FlowEvent, Part, Verdict};
use crate::wire::{
    ADVERTISEMENT, Ethernet, FRAGMENT_OFFSET6, FRAGMENT6, FragmentHeader, Icmp, Ip, Ipv6Header, NETWORK,
    SOLICITATION, SYN, TCP, TRANSPORT, TRANSPORT6, Tcp, UDP, Udp,
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
#[inline(always)]
pub(super) fn forward<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    now: u32,
    room: &mut Room,
) -> Result<Verdict, DropReason> {
    match read(frame, tables, &room.from, now, &mut room.wide) {
        Ok(Verdict::FLOW) => {}
        decided => return decided,
    }
    match Step::of_verdict(tables.part(Part::FindWide, frame, room)).next() {
        Next::Send(event) => {
            send(frame, tables, event, now, room, |frame, _: &Room, mtu| report6(frame, mtu))
        }
        next => end(frame, tables, now, &room.wide, next),
    }
}

/// Reads an IPv6 frame into the room, if it is one that may belong to a flow: [`Verdict::FLOW`]. Decides about any other.
#[inline(always)]
pub(super) fn read<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    from: &Interface,
    now: u32,
    room: &mut Wide,
) -> Result<Verdict, DropReason> {
    fragment::unwrap(frame, tables, from.vpc);
    match parse(frame, tables, from, now, room).parsed() {
        Parsed6::Flow => Ok(Verdict::FLOW),
        Parsed6::Other(fault) => local(frame, tables, from, fault, now, room),
        Parsed6::Foreign => Ok(Verdict::PASS),
    }
}

/// What becomes of an IPv6 packet that is not sent on.
#[inline(always)]
pub(super) fn end<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    now: u32,
    room: &Wide,
    next: Next,
) -> Result<Verdict, DropReason> {
    match next {
        Next::Pass | Next::Other | Next::Unknown | Next::Heed | Next::Admitted | Next::Send(_) => {
            Ok(Verdict::PASS)
        }
        Next::Expired(endpoint) => match hop::expired6(tables, endpoint, now).passage() {
            Passage::Report(mtu) => report6(frame, mtu).result(),
            Passage::Ends(verdict) => verdict.result(),
            Passage::Onward(_) | Passage::Piece => Err(DropReason::TtlExpired),
        },
        Next::Stack(interface) => stack::deliver(frame, tables, &room.packet, interface, now),
        Next::Resolver(interface) => stack::hear(frame, tables, &room.packet, interface, now),
        Next::Reset(answer) => reset::reset6(frame, answer).result(),
        Next::Cookie(endpoint) => {
            cookie::answer::<F, T, FlowKey6, TRANSPORT6>(frame, tables, &room.packet, endpoint, now).result()
        }
        Next::Confirm(_) => Err(DropReason::NoFlow),
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

/// Finds or opens the flow of the packet in the room. [`Next::Other`]: it is one of IPv4 on both sides.
#[inline(always)]
pub(super) fn find<F: Frame, T: Tables>(frame: &F, tables: &T, now: u32, room: &mut Wide) -> Step {
    if established(tables, now, room) {
        return Step::send(super::event(&room.packet));
    }
    let mut step = known(tables, now, room);
    if step == Step::HEED {
        step = first::heed(tables, &room.packet, &room.flow, now, room.peer.numbers);
    }
    if step != Step::UNKNOWN {
        return step;
    }
    let mut standing = Standing { asked: true, confirmed: false };
    step = admit::admit(tables, &room.packet, now, standing, &mut room.peer.door);
    if let Next::Confirm(endpoint) = step.next() {
        standing.confirmed = true;
        let packet = &room.packet;
        let checked = if packet.key.is_ipv4() {
            cookie::check::<F, T, FlowKey6, TRANSPORT>(frame, tables, packet, endpoint)
        } else {
            cookie::check::<F, T, FlowKey6, TRANSPORT6>(frame, tables, packet, endpoint)
        };
        step = match checked {
            0 => Step::reset(Answer::ResetNoFlow),
            _ => admit::admit(tables, &room.packet, now, standing, &mut room.peer.door),
        };
    }
    match step {
        Step::ADMITTED => first::open(tables, &room.packet, now, standing, &mut room.flow, &mut room.peer),
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

/// Puts an IPv4 packet into the room, as the wide tables know it. Says no where they cannot.
#[inline(never)]
pub(super) fn widen(packet: &Packet<FlowKey>, room: &mut Wide) -> bool {
    let Some(packet) = packet.other() else { return false };
    room.packet = packet;
    true
}

/// Sends the wide packet in the room by the wide flow in the room; `report` tells its sender why it cannot be.
#[inline(always)]
pub(super) fn send<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    event: FlowEvent,
    now: u32,
    room: &mut Room,
    report: impl FnOnce(&mut F, &Room, u16) -> Verdict,
) -> Result<Verdict, DropReason> {
    let Wide { packet, flow, fragment, .. } = &room.wide;
    let mut correction = 0;
    let is_due = proxy::is_due(packet, flow);
    if packet.special || is_due {
        let ended = match hop::pass6(frame, tables, packet, flow, now).passage() {
            Passage::Onward(change) => Ok(change.transport),
            Passage::Piece => {
                let code = match packet.key.is_ipv4() {
                    true => fragment::identify4(frame, tables, packet, now),
                    false => fragment::identify6(frame, tables, packet, fragment, now),
                };
                return match DropReason::from_code(code) {
                    Some(reason) => Err(reason),
                    None => leave_piece(frame, tables, event, &room.wide).result(),
                };
            }
            Passage::Ends(verdict) => Err(verdict),
            Passage::Report(mtu) => Err(report(frame, room, mtu)),
        };
        correction = match ended {
            Ok(correction) => correction,
            Err(verdict) => {
                if is_due {
                    flow::forget(tables, &room.wide.packet, &room.wide.flow);
                }
                return verdict.result();
            }
        };
    }
    if translate::is_unsummed(&room.wide.packet) && !translate::complete(frame, &mut room.wide.packet) {
        return Err(DropReason::UdpChecksumMissing);
    }
    let rewritten = rewrite(frame, correction, &room.wide);
    if rewritten != Verdict::PASS {
        return rewritten.result();
    }
    if room.wide.flow.is_shifted() {
        tables.part(Part::CarryWide, frame, room).result()?;
    }
    sent(tables, &room.wide.flow, event).result()
}

/// [`super::carry`] of the wide packet in the room, which has been rewritten; [`Verdict::PASS`] where it goes on.
#[inline(always)]
pub(super) fn carry<F: Frame, T: Tables>(frame: &mut F, tables: &T, room: &Wide) -> Verdict {
    let Wide { packet, flow, .. } = room;
    super::carried(if flow.source.is_ipv4() {
        super::carry::<F, T, FlowKey6, TRANSPORT>(frame, tables, packet, flow)
    } else {
        super::carry::<F, T, FlowKey6, TRANSPORT6>(frame, tables, packet, flow)
    })
}

/// [`translate::rewrite`]; [`Verdict::PASS`] where the packet goes on.
#[inline(never)]
fn rewrite<F: Frame>(frame: &mut F, correction: Delta, room: &Wide) -> Verdict {
    let rewritten = translate::rewrite(frame, &room.packet, &room.flow, correction);
    Verdict::of(rewritten.map(|()| Verdict::PASS))
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
    room: &mut Room,
    now: u32,
) -> Verdict {
    let Room { from, wide, .. } = room;
    match parse(frame, tables, from, now, wide).parsed() {
        Parsed6::Flow if wide.packet.later => Verdict::of(Err(DropReason::Fragment)),
        Parsed6::Flow => stack::route6(frame, tables, &wide.packet),
        Parsed6::Other(_) => stack::message(frame),
        Parsed6::Foreign => Verdict::of(Err(DropReason::ProtocolUnsupported)),
    }
}
