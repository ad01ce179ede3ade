//! A packet of no established flow: of one that is opening, the first of one, or not ours. The slow path.

use super::Room;
use super::admit::admit;
use super::flow::{self, Pending};
use super::nat::{self, Refusal};
use super::parse::Packet;
use super::state::State;
use crate::tables::{COOKIE, Entry, Flow, SHIFTED, Tables};
use crate::verdict::{Answer, DropReason, FlowEvent};
use crate::wire::RST;

/// What is to be done with the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// It is not ours.
    Pass,
    /// Send it as the flow says.
    Send(FlowEvent),
    /// Give it to the VPC's stack, behind this interface.
    Stack(u16),
    /// Answer it with RST; holds [`Answer::code`].
    Reset(u32),
    /// Drop it; holds [`DropReason::code`].
    Drop(u32),
    /// Its TTL ends at this endpoint.
    Expired(u32),
    /// It belongs to no flow.
    Unknown,
    /// Answer it with a SYN cookie of this endpoint.
    Cookie(u32),
    /// See whether it bears a right SYN cookie of this endpoint, and ask again.
    Confirm(u32),
}

/// A [`Next`] in one register: kind in the lower half, what it holds in the upper.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Step(u64);

impl Step {
    /// [`Next::Pass`].
    pub(super) const PASS: Self = Self(0);

    /// [`Next::Send`].
    pub(super) const fn send(event: FlowEvent) -> Self {
        Self(1 | (event as u64) << 32)
    }

    /// [`Next::Stack`].
    pub(super) const fn stack(interface: u16) -> Self {
        Self(2 | (interface as u64) << 32)
    }

    /// [`Next::Reset`].
    pub(super) const fn reset(answer: Answer) -> Self {
        Self(3 | (answer as u64) << 32)
    }

    /// [`Next::Drop`].
    pub(super) const fn drop(reason: DropReason) -> Self {
        Self(4 | (reason as u64) << 32)
    }

    /// [`Next::Unknown`].
    pub(super) const UNKNOWN: Self = Self(6);

    /// [`Next::Expired`].
    pub(super) const fn expired(endpoint: u32) -> Self {
        Self(5 | (endpoint as u64) << 32)
    }

    /// [`Next::Cookie`].
    #[inline(always)]
    pub(super) const fn cookie(endpoint: u32) -> Self {
        Self(7 | (endpoint as u64) << 32)
    }

    /// [`Next::Confirm`].
    #[inline(always)]
    pub(super) const fn confirm(endpoint: u32) -> Self {
        Self(8 | (endpoint as u64) << 32)
    }

    /// A RST for a segment, unless it is one itself: a RST is never answered (RFC 9293, 3.10.7.1).
    #[inline(always)]
    pub(super) const fn reset_segment(packet: &Packet, answer: Answer) -> Self {
        if packet.flags & RST != 0 { Self::drop(DropReason::NoFlow) } else { Self::reset(answer) }
    }

    /// What it says.
    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "each part is cut out at its own width")]
    pub(super) const fn next(self) -> Next {
        let held = (self.0 >> 32) as u32;
        match self.0 as u32 {
            1 if held == FlowEvent::None as u32 => Next::Send(FlowEvent::None),
            1 if held == FlowEvent::Opened as u32 => Next::Send(FlowEvent::Opened),
            1 => Next::Send(FlowEvent::Reset),
            2 => Next::Stack(held as u16),
            3 => Next::Reset(held),
            4 => Next::Drop(held),
            5 => Next::Expired(held),
            6 => Next::Unknown,
            7 => Next::Cookie(held),
            8 => Next::Confirm(held),
            _ => Next::Pass,
        }
    }
}

/// Decides about a packet of a flow that is opening, has been cut, or needs more than a rewrite, and puts that flow into `flow`. [`Next::Unknown`]: it belongs to none.
///
/// Not inlined, as is what follows it, since the kernel bounds the stack of a function; both return one register and write into the
/// caller's memory, since the kernel does not let a function return a pointer to its own.
#[inline(never)]
pub(super) fn known<T: Tables>(tables: &T, packet: &Packet, now: u32, flow: &mut Flow) -> Step {
    match flow::pending(tables, packet, now, flow) {
        Pending::Hit => return Step::send(super::event(packet)),
        Pending::Full => return table_full(packet),
        Pending::Miss => {}
    }
    // It may be one that was cut, or another CPU may have moved it from one table to the other between the two lookups.
    let Some(entry) = tables.established(&packet.key) else { return Step::UNKNOWN };
    *flow = entry.flow();
    if flow.state == State::Terminated as u8 {
        return Step::reset_segment(packet, Answer::ResetTerminated);
    }
    Step::send(super::event(packet))
}

/// Decides about a packet of no flow, and puts the flow that it opens, if any, into the room. One that is `confirmed` bears a right SYN
/// cookie, and opens a flow as a SYN does.
#[inline(never)]
pub(super) fn unknown<T: Tables>(
    tables: &T,
    packet: &Packet,
    now: u32,
    confirmed: bool,
    room: &mut Room,
) -> Step {
    let door = match admit(tables, packet, now, confirmed) {
        Ok(door) => door,
        Err(step) => return step,
    };
    let proxied = door.listener.proxied != 0;
    let marks = match (packet.is_tcp, confirmed, proxied) {
        (true, true, _) => SHIFTED | COOKIE,
        (true, false, true) => SHIFTED,
        _ => 0,
    };
    match nat::open(tables, packet, &door, now, marks, room) {
        Ok(()) => {
            // Of datagrams, the first alone takes the header.
            room.flow.way |= if proxied { SHIFTED } else { 0 };
            Step::send(FlowEvent::Opened)
        }
        Err(refusal) => refuse(packet, refusal, confirmed),
    }
}

/// What a flow that could not be opened gets: TCP is told at once, UDP has no word for it. A consumer whose SYN was answered does not
/// send it again, and so is told of everything.
#[inline(always)]
fn refuse(packet: &Packet, refusal: Refusal, confirmed: bool) -> Step {
    match (refusal, packet.is_tcp) {
        (Refusal::NoNextHop, _) if confirmed => Step::reset(Answer::ResetNoTarget),
        (Refusal::Full, _) if confirmed => Step::reset(Answer::ResetTableFull),
        (Refusal::NoTarget, true) => Step::reset(Answer::ResetNoTarget),
        (Refusal::NoTarget, false) => Step::drop(DropReason::NoTarget),
        (Refusal::NoNatPort, true) => Step::reset(Answer::ResetNoPort),
        (Refusal::NoNatPort, false) => Step::drop(DropReason::NoNatPort),
        (Refusal::NoNextHop, _) => Step::drop(DropReason::NoNextHop),
        (Refusal::Full, _) => Step::drop(DropReason::FlowTableFull),
    }
}

#[inline(always)]
fn table_full(packet: &Packet) -> Step {
    if packet.is_tcp { Step::reset(Answer::ResetTableFull) } else { Step::drop(DropReason::FlowTableFull) }
}
