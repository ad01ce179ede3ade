//! The packet's way. [`forward`] is the order of it, a line a stage; each stage is a file of that name.

mod admit;
mod errors;
mod first;
mod flow;
mod fragment;
mod hop;
mod local;
mod nat;
mod parse;
mod report;
mod reset;
mod rewrite;
pub mod stack;
pub mod state;

use crate::frame::Frame;
use crate::tables::{Flow, Interface, Tables};
use crate::verdict::{DropReason, FlowEvent, Verdict};
use crate::wire::RST;
use first::Next;
use hop::{Correction, Passage};
use parse::{Packet, Parsed};

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
        return from_stack(frame, tables, &from, now).result();
    }
    let mut packet = Packet::default();
    match parse::parse(frame, tables, &from, now, &mut packet) {
        Parsed::Flow => {}
        Parsed::Ip(None) if errors::is_error(frame, &packet) => {
            return errors::pass_on(frame, tables, &packet, now).result();
        }
        Parsed::Ip(fault) => return not_a_flow(frame, tables, &packet, fault).result(),
        Parsed::Arp => return arp(frame, tables, &from).result(),
        Parsed::Foreign => return Ok(Verdict::PASS),
    }
    if let Some(flow) = flow::established(tables, &packet, now) {
        return send(frame, tables, &packet, &flow, event(&packet), now);
    }
    let mut flow = Flow::default();
    match first::first(tables, &packet, now, &mut flow).next() {
        Next::Pass => Ok(Verdict::PASS),
        Next::Send(event) => send(frame, tables, &packet, &flow, event, now),
        Next::Stack(interface) => stack::receive(frame, tables, interface),
        Next::Reset(answer) => reset(frame, &packet, answer).result(),
        Next::Expired(endpoint) => match hop::pass(frame, tables, &packet, endpoint, 0, now).passage() {
            Passage::Ends(verdict) => verdict.result(),
            Passage::Onward(_) => Err(DropReason::TtlExpired),
        },
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
    packet: &Packet,
    fault: Option<DropReason>,
) -> Verdict {
    Verdict::of(local::answer(frame, tables, packet, fault))
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
    now: u32,
) -> Result<Verdict, DropReason> {
    let mut correction = Correction::default();
    if packet.special {
        correction = match hop::pass(frame, tables, packet, flow.endpoint, flow.interface, now).passage() {
            Passage::Onward(correction) => correction,
            Passage::Ends(verdict) => return verdict.result(),
        };
    }
    rewrite::rewrite(frame, packet, flow, correction)?;
    if !tables.egress(flow.interface) {
        return Err(DropReason::NoInterface);
    }
    Ok(Verdict::forward(flow.interface, flow.endpoint, flow::direction_of(flow), event))
}

#[inline(always)]
fn event(packet: &Packet) -> FlowEvent {
    if packet.flags & RST == 0 { FlowEvent::None } else { FlowEvent::Reset }
}
