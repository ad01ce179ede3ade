//! A packet of no established flow: of one that is opening, the first of one, or not ours. The slow path.

use super::Room;
use super::admit::{Door, admit};
use super::flow::{self, Pending};
use super::nat::{self, Refusal};
use super::parse::Packet;
use super::state::State;
use crate::tables::{Entry, FlowKey, Flows, Key, Tables};
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
    /// Ask the other pair of flow tables.
    Other,
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

    /// A flow may be opened. It is not the last word.
    pub(super) const ADMITTED: Self = Self(8);

    /// [`Next::Other`].
    pub(super) const OTHER: Self = Self(7);

    /// A RST for a segment, unless it is one itself: a RST is never answered (RFC 9293, 3.10.7.1).
    #[inline(always)]
    pub(super) const fn reset_segment<K>(packet: &Packet<K>, answer: Answer) -> Self {
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
            7 => Next::Other,
            _ => Next::Pass,
        }
    }
}

/// Memory for the other direction of a packet's flow, its key and its entry, and for the door that it was opened by.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Peer<K: Key> {
    pub key: K,
    pub flow: K::Flow,
    pub door: Door,
}

/// Decides about a packet of a flow that is opening, or has been cut, and puts that flow into the room. [`Next::Unknown`]: it belongs to
/// none.
///
/// Not inlined, as are admission and opening, since the kernel bounds the stack of a function; each returns one register and writes into
/// memory that the host lends, since the kernel does not let a function return a pointer to its own.
#[inline(never)]
pub(super) fn known<T: Tables>(tables: &T, packet: &Packet<FlowKey>, now: u32, room: &mut Room) -> Step {
    is_known(tables, packet, now, &mut room.flow, &mut room.peer)
}

/// Decides about a packet of no flow, and puts the flow that it opens, if any, into the room.
///
/// An IPv4 packet to an address whose load balancer is dualstack may belong to a flow of either width. It asks the narrow tables first,
/// then the wide ones, which open what has an IPv6 target, and comes back with `asked` if it is to open a narrow flow.
#[inline(always)]
pub(super) fn unknown<T: Tables>(
    tables: &T,
    packet: &Packet<FlowKey>,
    now: u32,
    asked: bool,
    room: &mut Room,
) -> Step {
    is_unknown(tables, packet, now, asked, &mut room.flow, &mut room.peer)
}

/// [`known`] over either pair of tables.
#[inline(always)]
pub(super) fn is_known<K: Key, T: Tables + Flows<K>>(
    tables: &T,
    packet: &Packet<K>,
    now: u32,
    flow: &mut K::Flow,
    peer: &mut Peer<K>,
) -> Step {
    match flow::pending(tables, packet, now, flow, peer) {
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

/// [`unknown`] over either pair of tables.
#[inline(always)]
pub(super) fn is_unknown<K: Key, T: Tables + Flows<K> + Flows<K::Other>>(
    tables: &T,
    packet: &Packet<K>,
    now: u32,
    asked: bool,
    flow: &mut K::Flow,
    peer: &mut Peer<K>,
) -> Step {
    match admit(tables, packet, now, asked, &mut peer.door) {
        Step::ADMITTED => open(tables, packet, now, flow, peer),
        step => step,
    }
}

/// Opens the flow of a packet that was admitted.
#[inline(never)]
fn open<K: Key, T: Tables + Flows<K> + Flows<K::Other>>(
    tables: &T,
    packet: &Packet<K>,
    now: u32,
    flow: &mut K::Flow,
    peer: &mut Peer<K>,
) -> Step {
    match nat::open(tables, packet, now, flow, peer) {
        Ok(()) => Step::send(FlowEvent::Opened),
        Err(refusal) => refuse(packet, refusal),
    }
}

/// What a flow that could not be opened gets: TCP is told at once, UDP has no word for it.
#[inline(always)]
fn refuse<K>(packet: &Packet<K>, refusal: Refusal) -> Step {
    match (refusal, packet.is_tcp) {
        (Refusal::NoTarget, true) => Step::reset(Answer::ResetNoTarget),
        (Refusal::NoTarget, false) => Step::drop(DropReason::NoTarget),
        (Refusal::NoNatPort, true) => Step::reset(Answer::ResetNoPort),
        (Refusal::NoNatPort, false) => Step::drop(DropReason::NoNatPort),
        (Refusal::NoNextHop, _) => Step::drop(DropReason::NoNextHop),
        (Refusal::Full, _) => Step::drop(DropReason::FlowTableFull),
    }
}

#[inline(always)]
fn table_full<K>(packet: &Packet<K>) -> Step {
    if packet.is_tcp { Step::reset(Answer::ResetTableFull) } else { Step::drop(DropReason::FlowTableFull) }
}
