//! The packet's way. [`forward`] is the order of it, a line a stage; each stage is a file of that name.

mod admit;
mod cookie;
mod errors;
mod first;
mod flow;
mod fragment;
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
use crate::tables::{Flow, FlowKey, Interface, Key, Tables};
use crate::verdict::{Answer, DropReason, FlowEvent, Verdict};
use crate::wire::RST;
use first::{Next, Standing};
use hop::{Correction, Passage};
use parse::{Network, Packet, Transport};
use report::Report;
use stream::Carried;

/// What the path remembers of a packet of no established flow while it decides about it, in memory that the host lends it: more than a
/// function of the kernel may have on its stack.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Room {
    packet: Packet<FlowKey>,
    flow: Flow,
    peer: first::Peer<FlowKey>,
    wide: six::Wide,
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
    let Some(from) = tables.interface(ifindex).filter(|from| from.vpc != 0) else { return Ok(Verdict::PASS) };
    if from.stack != 0 {
        let verdict = if parse::is_ipv6(frame) {
            six::from_stack(frame, tables, &from, now)
        } else {
            from_stack(frame, tables, &from, now)
        };
        return verdict.result();
    }
    let mut packet = match parse::network(frame, &from) {
        Network::Ipv4(packet) => packet,
        Network::Arp => return arp(frame, tables, &from).result(),
        Network::Ipv6 => return six::forward(frame, tables, &from, now).result(),
        Network::Foreign => return Ok(Verdict::PASS),
    };
    match parse::transport(frame, tables, &from, now, &mut packet) {
        Transport::Flow => {}
        Transport::Other(None) if errors::is_error(frame, &packet) => {
            return match errors::pass_on(frame, tables, &packet, now).result() {
                Err(DropReason::IcmpNoFlow) => six::error(frame, tables, &from, now).result(),
                decided => decided,
            };
        }
        Transport::Other(fault) => return not_a_flow(frame, tables, &packet, fault).result(),
    }
    if let Some(flow) = flow::established(tables, &packet, now, || sequence::read(frame))
        && !packet.special
        && !flow.is_shifted()
    {
        rewrite::rewrite(frame, &packet, &flow, Correction::default())?;
        return leave(tables, &flow, event(&packet));
    }
    // From here on in the room, too: of what is there the kernel's verifier knows nothing, so that it goes each way once.
    let verdict = tables.room(|room| {
        room.packet = packet;
        slow(frame, tables, now, room)
    });
    verdict.unwrap_or(Err(DropReason::Malformed))
}

/// The slow path: a packet of no established flow that is IPv4 on both sides, or one for which its rewrite is not all that there is to
/// do.
#[inline(always)]
fn slow<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    now: u32,
    room: &mut Room,
) -> Result<Verdict, DropReason> {
    let Room { packet, flow, peer, wide } = room;
    let packet: &Packet<FlowKey> = packet;
    let mut standing = Standing::default();
    sequence::note(frame, &mut peer.numbers);
    wide.peer.numbers = peer.numbers;
    let mut next = first::known(tables, packet, now, flow, peer).next();
    if next == Next::Unknown && first::is_shared(tables, packet) {
        next = six::ask(tables, packet, now, wide).next();
        match next {
            Next::Send(event) => {
                let report = |frame: &mut F, mtu| report::report(frame, packet, Report::of(mtu));
                return six::send(frame, tables, event, now, wide, report).result();
            }
            Next::Other => (next, standing.asked) = (Next::Unknown, true),
            _ => {}
        }
    }
    if next == Next::Unknown {
        next = admit::admit(tables, packet, now, standing, &mut peer.door).next();
    }
    if let Next::Confirm(endpoint) = next {
        standing.confirmed = true;
        next = match cookie::check(frame, tables, packet, endpoint) {
            0 => Next::Reset(Answer::ResetNoFlow.code()),
            _ => admit::admit(tables, packet, now, standing, &mut peer.door).next(),
        };
    }
    if next == Next::Admitted {
        next = first::open(tables, packet, now, standing, flow, peer).next();
    }
    match next {
        Next::Pass | Next::Other | Next::Unknown | Next::Admitted => Ok(Verdict::PASS),
        Next::Send(event) => send(frame, tables, packet, flow, event, now),
        Next::Stack(interface) => stack::deliver(frame, tables, packet, interface),
        Next::Resolver(interface) => stack::hear(frame, tables, packet, interface),
        Next::Reset(answer) => reset(frame, packet, answer).result(),
        Next::Expired(endpoint) => match hop::pass(frame, tables, packet, endpoint, 0, now).passage() {
            Passage::Ends(verdict) => verdict.result(),
            Passage::Onward(_) | Passage::Piece | Passage::Report(_) => Err(DropReason::TtlExpired),
        },
        Next::Confirm(_) => Err(DropReason::NoFlow),
        Next::Cookie(endpoint) => cookie::answer(frame, tables, packet, endpoint, now).result(),
        Next::Drop(reason) => Err(DropReason::from_code(reason).unwrap_or(DropReason::Malformed)),
    }
}

// Not inlined, since the kernel bounds the stack of a function, and these have headers to put together.

#[inline(never)]
fn from_stack<F: Frame, T: Tables>(frame: &mut F, tables: &T, from: &Interface, now: u32) -> Verdict {
    Verdict::of(stack::send(frame, tables, from, now))
}

#[inline(never)]
fn not_a_flow<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    packet: &Packet<FlowKey>,
    fault: Option<DropReason>,
) -> Verdict {
    Verdict::of(local::answer(frame, tables, packet, fault))
}

#[inline(never)]
fn arp<F: Frame, T: Tables>(frame: &mut F, tables: &T, from: &Interface) -> Verdict {
    Verdict::of(local::arp(frame, tables, from))
}

#[inline(never)]
fn reset<F: Frame>(frame: &mut F, packet: &Packet<FlowKey>, answer: u32) -> Verdict {
    Verdict::of(reset::reset(frame, packet, answer))
}

#[inline(always)]
fn send<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    packet: &Packet<FlowKey>,
    flow: &Flow,
    event: FlowEvent,
    now: u32,
) -> Result<Verdict, DropReason> {
    let mut correction = Correction::default();
    if packet.special {
        correction =
            match hop::pass(frame, tables, packet, flow.endpoint.into(), flow.interface, now).passage() {
                Passage::Onward(correction) => correction,
                Passage::Piece => Correction::default(),
                Passage::Ends(verdict) => return verdict.result(),
                Passage::Report(mtu) => return report::report(frame, packet, Report::of(mtu)).result(),
            };
    }
    rewrite::rewrite(frame, packet, flow, correction)?;
    if flow.is_shifted() {
        let carried =
            if packet.is_tcp() { stream::carry(frame, tables, packet, flow) } else { Carried::Insert };
        match carried {
            Carried::Done => {}
            Carried::Ask => _ = cookie::ask_target(frame, tables, packet, flow).result()?,
            Carried::Tell => {
                cookie::hear_target(frame, tables, packet, flow).result()?;
                cookie::tell_consumer(frame, tables, packet, flow).result()?;
            }
            Carried::Greet if stream::greet(frame) == 0 => return Err(DropReason::Malformed),
            Carried::Greet => {}
            Carried::Insert
                if proxy::make_room(frame, packet) == 0 || proxy::fill(frame, tables, packet, flow) == 0 =>
            {
                return Err(DropReason::Malformed);
            }
            Carried::Insert => proxy::sent(tables, packet, flow),
            Carried::Full => return Err(DropReason::FlowTableFull),
            Carried::Unknown => return Err(DropReason::NoFlow),
            Carried::Malformed => return Err(DropReason::Malformed),
        }
    }
    leave(tables, flow, event)
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
