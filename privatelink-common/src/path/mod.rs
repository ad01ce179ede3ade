//! The packet's way. [`forward`] is the order of it, a line a stage; each stage is a file of that name.

mod admit;
mod cookie;
mod errors;
mod first;
mod flow;
pub mod fragment;
mod hop;
mod local;
mod nat;
mod neighbour;
mod options;
mod parse;
pub mod proxy;
mod quote;
mod report;
mod reset;
mod rewrite;
pub mod rules;
mod segment;
mod sequence;
mod six;
pub mod stack;
pub mod state;
mod stream;
mod translate;

use crate::frame::Frame;
use crate::tables::{Flow, FlowKey, Flows, Interface, Key, Tables};
use crate::verdict::{Answer, DropReason, FlowEvent, Part, Verdict};
use crate::wire::{RST, TRANSPORT};
use first::{Next, Standing, Step};
use hop::{Correction, Passage};
use parse::{Network, Packet, Transport};
use report::Report;
use stream::Carried;

/// What the path remembers of a packet of no established flow while it decides about it, in memory that the host lends it: more than a
/// function of the kernel may have on its stack.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Room {
    from: Interface,
    packet: Packet<FlowKey>,
    flow: Flow,
    peer: first::Peer<FlowKey>,
    wide: six::Wide,
    /// Why the packet is refused if it is for us, a [`DropReason::code`], or 0.
    fault: u32,
    /// Seconds since boot.
    now: u32,
    /// Whether the wide tables have been asked about a packet that may belong to a flow of either width.
    asked: bool,
}

/// Goes through a part of the path: says what is to become of `frame`, which is in `room` as far as it is known.
#[inline(always)]
pub fn run<F: Frame, T: Tables>(part: Part, frame: &mut F, tables: &T, room: &mut Room) -> Verdict {
    let now = room.now;
    match part {
        Part::Stack if parse::is_ipv6(frame) => six::from_stack(frame, tables, room, now),
        Part::Stack => Verdict::of(stack::send(frame, tables, &room.from, now)),
        Part::Arp => Verdict::of(local::arp(frame, tables, &room.from)),
        Part::Aside => {
            Verdict::of(local::answer(frame, tables, &room.packet, DropReason::from_code(room.fault)))
        }
        Part::Error => match errors::pass_on(frame, tables, &room.packet, now, &mut room.flow).result() {
            Err(DropReason::IcmpNoFlow) => quote::pass_on4(frame, tables, &room.from, now, &mut room.wide),
            decided => Verdict::of(decided),
        },
        Part::Slow => Verdict::of(slow(frame, tables, now, room)),
        Part::Translated => Verdict::of(translated(frame, tables, now, room)),
        Part::FindWide => six::find(frame, tables, now, &mut room.wide).as_verdict(),
        Part::Wide => Verdict::of(six::forward(frame, tables, now, room)),
        Part::Carry => carried(carry::<F, T, FlowKey, TRANSPORT>(frame, tables, &room.packet, &room.flow)),
        Part::CarryWide => six::carry(frame, tables, &room.wide),
    }
}

/// What is to become of `frame`, which came in by the interface `ifindex` at `now`, seconds since boot.
///
/// On `Ok`, the frame is as it should leave; on `Err`, it is to be dropped for that reason. The caller counts, once.
#[inline(always)]
pub fn forward<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    ifindex: u32,
    now: u32,
) -> Result<Verdict, DropReason> {
    let mut verdict = begin(frame, tables, ifindex, now);
    for _ in 0..PARTS {
        let Some(part) = verdict.part() else { break };
        let decided = tables.room(|room| tables.part(part, frame, room));
        verdict = decided.unwrap_or(Verdict::of(Err(DropReason::Malformed)));
    }
    verdict.result()
}

/// As many parts go on with a packet, one after the other: [`Part::Slow`], [`Part::Translated`], and again the first.
const PARTS: u32 = 3;

/// The fast path, and for all that is not done there the part that goes on with what is in the room: [`Verdict::go_on`].
///
/// Not inlined, so that what it needs of the kernel's stack, whose size is bounded for a chain of calls, is free again for that part.
#[inline(never)]
fn begin<F: Frame, T: Tables>(frame: &mut F, tables: &T, ifindex: u32, now: u32) -> Verdict {
    let Some(from) = tables.interface(ifindex).filter(|from| from.vpc != 0) else { return Verdict::PASS };
    if from.stack != 0 {
        return go_on(tables, Part::Stack, now, |room| room.from = from);
    }
    let mut packet = match parse::network(frame, &from) {
        Network::Ipv4(packet) => packet,
        Network::Arp => return go_on(tables, Part::Arp, now, |room| room.from = from),
        Network::Ipv6 => return go_on(tables, Part::Wide, now, |room| room.from = from),
        Network::Foreign => return Verdict::PASS,
    };
    match parse::transport(frame, tables, &from, now, &mut packet) {
        Transport::Flow => {}
        Transport::Other(None) if errors::is_error(frame, &packet) => {
            return go_on(tables, Part::Error, now, |room| (room.from, room.packet) = (from, packet));
        }
        Transport::Other(fault) => {
            let fault = fault.map_or(0, DropReason::code);
            return go_on(tables, Part::Aside, now, |room| (room.packet, room.fault) = (packet, fault));
        }
    }
    if let Some(flow) = flow::established(tables, &packet, now, || sequence::read(frame))
        && !packet.special
        && !flow.is_shifted()
    {
        let rewritten = rewrite::rewrite(frame, &packet, &flow, Correction::default());
        return Verdict::of(rewritten.and_then(|()| leave(tables, &flow, event(&packet))));
    }
    go_on(tables, Part::Slow, now, |room| room.packet = packet)
}

/// Goes on with a part of the path, for which `fill` puts into the room what is known.
#[inline(always)]
fn go_on<T: Tables>(tables: &T, part: Part, now: u32, fill: impl FnOnce(&mut Room)) -> Verdict {
    let filled = tables.room(|room| {
        (room.now, room.asked) = (now, false);
        fill(room);
    });
    filled.map_or(Verdict::of(Err(DropReason::Malformed)), |()| Verdict::go_on(part))
}

#[inline(always)]
fn slow<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    now: u32,
    room: &mut Room,
) -> Result<Verdict, DropReason> {
    let mut standing = Standing { asked: room.asked, confirmed: false };
    let mut next = Next::Unknown;
    if !room.asked {
        sequence::note(frame, &mut room.peer.numbers);
        room.wide.peer.numbers = room.peer.numbers;
        next = first::known(tables, &room.packet, now, &mut room.flow, &mut room.peer).next();
        if next == Next::Heed {
            next = first::heed(tables, &room.packet, &room.flow, now, room.peer.numbers).next();
        }
        let shared = next == Next::Unknown && first::is_shared(tables, &room.packet);
        if shared && six::widen(&room.packet, &mut room.wide) {
            return Ok(Verdict::go_on(Part::Translated));
        }
    }
    let Room { packet, flow, peer, .. } = room;
    if next == Next::Unknown {
        next = admit::admit(tables, packet, now, standing, &mut peer.door).next();
    }
    if let Next::Confirm(endpoint) = next {
        standing.confirmed = true;
        next = match cookie::check::<F, T, FlowKey, TRANSPORT>(frame, tables, packet, endpoint) {
            0 => Next::Reset(Answer::ResetNoFlow.code()),
            _ => admit::admit(tables, packet, now, standing, &mut peer.door).next(),
        };
    }
    if next == Next::Admitted {
        next = first::open(tables, packet, now, standing, flow, peer).next();
    }
    match next {
        Next::Send(event) => send(frame, tables, room, event, now),
        next => end(frame, tables, packet, next, now),
    }
}

/// Whether an IPv4 packet belongs to a flow whose other side is IPv6, or opens one. If not, the narrow tables go on with it.
#[inline(always)]
fn translated<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    now: u32,
    room: &mut Room,
) -> Result<Verdict, DropReason> {
    match Step::of_verdict(tables.part(Part::FindWide, frame, room)).next() {
        Next::Send(event) => six::send(frame, tables, event, now, room, |frame, room, mtu| {
            report::report(frame, &room.packet, Report::of(mtu))
        }),
        Next::Other => {
            room.asked = true;
            Ok(Verdict::go_on(Part::Slow))
        }
        next => end(frame, tables, &room.packet, next, now),
    }
}

/// What becomes of an IPv4 packet that is not sent on.
#[inline(always)]
fn end<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    packet: &Packet<FlowKey>,
    next: Next,
    now: u32,
) -> Result<Verdict, DropReason> {
    match next {
        Next::Pass | Next::Other | Next::Unknown | Next::Heed | Next::Admitted | Next::Send(_) => {
            Ok(Verdict::PASS)
        }
        Next::Stack(interface) => stack::deliver(frame, tables, packet, interface, now),
        Next::Resolver(interface) => stack::hear(frame, tables, packet, interface, now),
        Next::Reset(answer) => reset(frame, packet, answer).result(),
        Next::Expired(endpoint) => hop::expired(frame, tables, packet, endpoint, now).result(),
        Next::Confirm(_) => Err(DropReason::NoFlow),
        Next::Cookie(endpoint) => {
            cookie::answer::<F, T, FlowKey, TRANSPORT>(frame, tables, packet, endpoint, now).result()
        }
        Next::Drop(reason) => Err(DropReason::from_code(reason).unwrap_or(DropReason::Malformed)),
    }
}

/// Not inlined, since the kernel bounds the stack of a function, and this has headers to put together.
#[inline(never)]
fn reset<F: Frame>(frame: &mut F, packet: &Packet<FlowKey>, answer: u32) -> Verdict {
    Verdict::of(reset::reset(frame, packet, answer))
}

#[inline(always)]
fn send<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    room: &mut Room,
    event: FlowEvent,
    now: u32,
) -> Result<Verdict, DropReason> {
    let (packet, flow) = (&room.packet, &room.flow);
    let mut correction = Correction::default();
    let is_due = proxy::is_due(packet, flow);
    if packet.special || is_due {
        let ended = match hop::pass(frame, tables, packet, flow, now).passage() {
            Passage::Onward(change) => Ok(change),
            Passage::Piece => Ok(Correction::default()),
            Passage::Ends(verdict) => Err(verdict),
            Passage::Report(mtu) => Err(report::report(frame, packet, Report::of(mtu))),
        };
        correction = match ended {
            Ok(correction) => correction,
            Err(verdict) => {
                if is_due {
                    flow::forget(tables, packet, flow);
                }
                return verdict.result();
            }
        };
    }
    rewrite::rewrite(frame, packet, flow, correction)?;
    if flow.is_shifted() {
        tables.part(Part::Carry, frame, room).result()?;
    }
    leave(tables, &room.flow, event)
}

/// What [`carry`] says, in one register: [`Verdict::PASS`] where the packet goes on.
#[inline(always)]
fn carried(result: Result<(), DropReason>) -> Verdict {
    Verdict::of(result.map(|()| Verdict::PASS))
}

/// Carries a packet whose flow is shifted, and whose addresses have been rewritten, from one side's counting into the other's. Its transport
/// header is at `AT`, behind a header of the family that it goes to.
#[inline(always)]
fn carry<F: Frame, T: Tables + Flows<K>, K: Key, const AT: usize>(
    frame: &mut F,
    tables: &T,
    packet: &Packet<K>,
    flow: &K::Flow,
) -> Result<(), DropReason> {
    let is_tcp = packet.is_tcp();
    let carried =
        if is_tcp { stream::carry::<F, T, K, AT>(frame, tables, packet, flow) } else { Carried::Insert };
    match carried {
        Carried::Done => {}
        Carried::Ask => _ = cookie::ask_target::<F, T, K, AT>(frame, tables, packet, flow).result()?,
        Carried::Tell => {
            cookie::hear_target::<F, T, K, AT>(frame, tables, packet, flow).result()?;
            cookie::tell_consumer::<F, T, K, AT>(frame, tables, packet, flow).result()?;
        }
        Carried::Greet if stream::greet::<F, AT>(frame) == 0 => return Err(DropReason::Malformed),
        Carried::Greet => {}
        Carried::Insert
            if proxy::make_room::<F, AT>(frame, is_tcp) == 0
                || proxy::fill::<F, T, K, AT>(frame, tables, packet, flow) == 0 =>
        {
            return Err(DropReason::Malformed);
        }
        Carried::Insert => proxy::sent(tables, packet, flow),
        Carried::Full => return Err(DropReason::FlowTableFull),
        Carried::Ahead => return Err(DropReason::AheadOfHeader),
        Carried::Unknown => return Err(DropReason::NoFlow),
        Carried::Malformed => return Err(DropReason::Malformed),
    }
    Ok(())
}

#[inline(always)]
fn leave<T: Tables>(tables: &T, flow: &Flow, event: FlowEvent) -> Result<Verdict, DropReason> {
    let verdict = Verdict::forward(flow.interface, flow.endpoint.into(), flow.direction(), event, false);
    verdict.leaving(tables.egress(flow.interface))
}

#[inline(always)]
fn event<K: Key>(packet: &Packet<K>) -> FlowEvent {
    if packet.flags & RST == 0 { FlowEvent::None } else { FlowEvent::Reset }
}
