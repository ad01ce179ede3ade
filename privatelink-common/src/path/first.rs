//! A packet of no established flow: of one that is opening, the first of one, or not ours. The slow path.

use super::admit::Door;
use super::flow::{self, Pending};
use super::nat::{self, Refusal};
use super::parse::Packet;
use super::rules;
use super::sequence::Numbers;
use super::state::State;
use crate::tables::{COOKIE, Course, Entry, Flow, FlowKey, Flows, Key, SHIFTED, Tables, VpcAddress};
use crate::verdict::{Answer, DropReason, FlowEvent, Verdict};
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
    /// Give it to the VPC's resolver, behind this interface.
    Resolver(u16),
    /// Answer it with RST; holds [`Answer::code`].
    Reset(u32),
    /// Drop it; holds [`DropReason::code`].
    Drop(u32),
    /// Its TTL ends at this endpoint.
    Expired(u32),
    /// It belongs to no flow.
    Unknown,
    /// It belongs to an established flow, which is to [`heed`] it.
    Heed,
    /// Answer it with a SYN cookie of this endpoint.
    Cookie(u32),
    /// See whether it bears a right SYN cookie of this endpoint, and ask again.
    Confirm(u32),
    /// It may open a flow. It is not the last word.
    Admitted,
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

    /// [`Next::Resolver`].
    pub(super) const fn resolver(interface: u16) -> Self {
        Self(11 | (interface as u64) << 32)
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

    /// [`Next::Heed`].
    pub(super) const HEED: Self = Self(12);

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

    /// [`Next::Admitted`].
    pub(super) const ADMITTED: Self = Self(10);

    /// [`Next::Other`].
    pub(super) const OTHER: Self = Self(9);

    /// A RST for a segment, unless it is one itself: a RST is never answered (RFC 9293, 3.10.7.1).
    #[inline(always)]
    pub(super) const fn reset_segment<K: Key>(packet: &Packet<K>, answer: Answer) -> Self {
        if packet.flags & RST != 0 { Self::drop(DropReason::NoFlow) } else { Self::reset(answer) }
    }

    /// As a part of the path returns it.
    #[inline(always)]
    pub(super) const fn as_verdict(self) -> Verdict {
        Verdict::from_word(self.0)
    }

    /// What [`Step::as_verdict`] was made from.
    #[inline(always)]
    pub(super) const fn of_verdict(verdict: Verdict) -> Self {
        Self(verdict.word())
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
            9 => Next::Other,
            10 => Next::Admitted,
            11 => Next::Resolver(held as u16),
            12 => Next::Heed,
            _ => Next::Pass,
        }
    }
}

/// What is known of a packet of no flow of the tables at hand.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Standing {
    /// It belongs to none of the others, too.
    pub asked: bool,
    /// It bears a right SYN cookie.
    pub confirmed: bool,
}

/// Memory for the other direction of a packet's flow, its key and its entry, for the door that it was opened by, and for the packet's own
/// numbers.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Peer<K: Key> {
    pub key: K,
    pub flow: K::Flow,
    pub door: Door,
    pub numbers: Numbers,
}

/// Decides about a packet of a flow that is opening, has been cut, or that network ACLs are to be asked about, and puts that flow into the
/// room. [`Next::Unknown`]: it belongs to none.
///
/// Not inlined, as are admission and opening, since the kernel bounds the stack of a function; each returns one register and writes into
/// memory that the host lends, since the kernel does not let a function return a pointer to its own.
#[inline(never)]
pub(super) fn known<T: Tables>(
    tables: &T,
    packet: &Packet<FlowKey>,
    now: u32,
    flow: &mut Flow,
    peer: &mut Peer<FlowKey>,
) -> Step {
    is_known(tables, packet, now, flow, peer)
}

/// Whether an IPv4 packet is to an address whose load balancer is dualstack, so that it may belong to a flow of either width. The wide
/// tables are asked before such a packet is judged: they open what has an IPv6 target, and leave the rest to the narrow ones.
#[inline(never)]
pub(super) fn is_shared<T: Tables>(tables: &T, packet: &Packet<FlowKey>) -> bool {
    let destination = VpcAddress::ipv4(packet.key.vpc, packet.key.destination);
    tables.address(&destination).is_some_and(|address| address.dualstack != 0)
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
        Pending::Denied => return Step::drop(DropReason::NetworkAcl),
        Pending::Full => return table_full(packet),
        Pending::Miss => {}
    }
    // It may be one that was cut, or another CPU may have moved it from one table to the other between the two lookups.
    let Some(entry) = tables.established(&packet.key) else { return Step::UNKNOWN };
    *flow = entry.flow();
    if flow.state == State::Terminated as u8 {
        return Step::reset_segment(packet, Answer::ResetTerminated);
    }
    // What is denied leaves no trace of its time, so that the next packet is asked about, too.
    if tables.endpoint(flow.endpoint.into()).acls != 0 && !rules::lets(tables, packet, flow) {
        return Step::drop(DropReason::NetworkAcl);
    }
    Step::HEED
}

/// Goes on with a packet of an established flow, after [`Next::Heed`].
#[inline(always)]
pub(super) fn heed<K: Key, T: Tables + Flows<K>>(
    tables: &T,
    packet: &Packet<K>,
    flow: &K::Flow,
    now: u32,
    numbers: Numbers,
) -> Step {
    if flow::heed(tables, packet, flow, now, numbers) == 0 {
        flow::remove(tables, packet);
        return Step::UNKNOWN;
    }
    Step::send(super::event(packet))
}

/// Opens the flow of a packet that was admitted.
#[inline(always)]
pub(super) fn open<K: Key, T: Tables + Flows<K> + Flows<K::Other>>(
    tables: &T,
    packet: &Packet<K>,
    now: u32,
    standing: Standing,
    flow: &mut K::Flow,
    peer: &mut Peer<K>,
) -> Step {
    match choose(tables, packet, now, standing.confirmed, flow, peer) {
        Step::ADMITTED
            if tables.endpoint(flow.endpoint.into()).acls != 0 && !rules::leaves(tables, packet, flow) =>
        {
            Step::drop(DropReason::NetworkAcl)
        }
        Step::ADMITTED => install(tables, packet, standing.confirmed, flow, peer),
        step => step,
    }
}

/// Chooses where the flow of a packet goes that was admitted.
#[inline(never)]
fn choose<K: Key, T: Tables>(
    tables: &T,
    packet: &Packet<K>,
    now: u32,
    confirmed: bool,
    flow: &mut K::Flow,
    peer: &mut Peer<K>,
) -> Step {
    let proxied = peer.door.listener.proxied != 0;
    let marks = match (packet.is_tcp(), confirmed, proxied) {
        (true, true, _) => SHIFTED | COOKIE,
        (true, false, true) => SHIFTED,
        _ => 0,
    };
    match nat::choose(tables, packet, now, marks, flow, peer) {
        Ok(()) => Step::ADMITTED,
        Err(refusal) => refuse(packet, refusal, confirmed),
    }
}

/// Opens the flow that was chosen.
#[inline(never)]
fn install<K: Key, T: Tables + Flows<K> + Flows<K::Other>>(
    tables: &T,
    packet: &Packet<K>,
    confirmed: bool,
    flow: &mut K::Flow,
    peer: &mut Peer<K>,
) -> Step {
    match nat::open(tables, packet, flow, peer) {
        Ok(()) => {
            // Of datagrams, the first alone takes the header.
            let course: &mut Course = flow;
            course.way |= if peer.door.listener.proxied != 0 { SHIFTED } else { 0 };
            Step::send(FlowEvent::Opened)
        }
        Err(refusal) => refuse(packet, refusal, confirmed),
    }
}

/// What a flow that could not be opened gets: TCP is told at once, UDP has no word for it. A consumer whose SYN was answered does not
/// send it again, and so is told of everything.
#[inline(always)]
fn refuse<K: Key>(packet: &Packet<K>, refusal: Refusal, confirmed: bool) -> Step {
    match (refusal, packet.is_tcp()) {
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
fn table_full<K: Key>(packet: &Packet<K>) -> Step {
    if packet.is_tcp() { Step::reset(Answer::ResetTableFull) } else { Step::drop(DropReason::FlowTableFull) }
}
