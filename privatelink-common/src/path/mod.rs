//! The packet's way. [`forward`] is the order of it, a line a stage; each stage is a file of that name.

mod admit;
mod cookie;
mod first;
mod flow;
mod local;
mod nat;
mod options;
mod parse;
pub mod proxy;
mod reset;
mod rewrite;
mod segment;
pub mod stack;
pub mod state;
mod stream;

use crate::frame::Frame;
use crate::tables::{Flow, Interface, Tables};
use crate::verdict::{Answer, DropReason, FlowEvent, Verdict};
use crate::wire::RST;
use first::{Next, Step};
use parse::{Local, Packet, Parsed};
use stream::Carried;

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
        return from_stack(frame, tables, &from).result();
    }
    let packet = match parse::parse(frame, &from) {
        Parsed::Flow(packet) => packet,
        Parsed::Ip(packet) => return not_a_flow(frame, tables, &from, &packet).result(),
        Parsed::Arp => return arp(frame, tables, &from).result(),
        Parsed::Foreign => return Ok(Verdict::PASS),
    };
    if let Some(flow) = flow::established(tables, &packet, now) {
        return send(frame, tables, &packet, &flow, event(&packet));
    }
    let mut flow = Flow::default();
    let mut step = first::first(tables, &packet, now, false, &mut flow);
    if let Next::Confirm(endpoint) = step.next() {
        step = match cookie::check(frame, tables, &packet, endpoint) {
            0 => Step::reset(Answer::ResetNoFlow),
            _ => first::first(tables, &packet, now, true, &mut flow),
        };
    }
    match step.next() {
        Next::Pass => Ok(Verdict::PASS),
        Next::Send(event) => send(frame, tables, &packet, &flow, event),
        Next::Stack(interface) => stack::receive(frame, tables, interface),
        Next::Reset(answer) => reset(frame, &packet, answer).result(),
        Next::Confirm(_) => Err(DropReason::NoFlow),
        Next::Cookie(endpoint) => cookie::answer(frame, tables, &packet, endpoint, now).result(),
        Next::Drop(reason) => Err(DropReason::from_code(reason).unwrap_or(DropReason::Malformed)),
    }
}

// Not inlined, since the kernel bounds the stack of a function, and these have headers to put together.

#[inline(never)]
fn from_stack<F: Frame, T: Tables>(frame: &mut F, tables: &T, from: &Interface) -> Verdict {
    Verdict::of(stack::send(frame, tables, from))
}

#[inline(never)]
fn not_a_flow<F: Frame, T: Tables>(frame: &mut F, tables: &T, from: &Interface, packet: &Local) -> Verdict {
    Verdict::of(local::answer(frame, tables, from, packet))
}

#[inline(never)]
fn arp<F: Frame, T: Tables>(frame: &mut F, tables: &T, from: &Interface) -> Verdict {
    Verdict::of(local::arp(frame, tables, from))
}

#[inline(never)]
fn reset<F: Frame>(frame: &mut F, packet: &Packet, answer: u32) -> Verdict {
    Verdict::of(reset::reset(frame, packet, answer))
}

#[inline(always)]
fn send<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    packet: &Packet,
    flow: &Flow,
    event: FlowEvent,
) -> Result<Verdict, DropReason> {
    rewrite::rewrite(frame, packet, flow)?;
    if flow.is_shifted() {
        let carried =
            if packet.is_tcp { stream::carry(frame, tables, packet, flow) } else { Carried::Insert };
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
    if !tables.egress(flow.interface) {
        return Err(DropReason::NoInterface);
    }
    Ok(Verdict::forward(flow.interface, flow.endpoint, flow.direction(), event))
}

#[inline(always)]
fn event(packet: &Packet) -> FlowEvent {
    if packet.flags & RST == 0 { FlowEvent::None } else { FlowEvent::Reset }
}
