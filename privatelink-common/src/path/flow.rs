//! Finds the flow that a packet belongs to, and keeps it true: its state, its time, and the way back to the consumer.
//!
//! Entries of `established` are used in place, without copying them first, so the path never frees one that another CPU may be
//! using: it removes a flow only when the flow has been over, or idle, for whole seconds. Entries of `pending` may be evicted at
//! any time; they are copied, and then believed only if the other direction's entry points back at them.
//!
//! Both pairs of tables have the same code; `K` is the key of the one at hand.

use super::cookie::{self, Happened};
use super::first::Peer;
use super::parse::Packet;
use super::rules;
use super::sequence::{self, Numbers};
use super::state::State;
use super::stream::consumers;
use crate::limits::{TCP_CLOSED, TCP_OPENING, TCP_RESET_ECHO};
use crate::tables::{COOKIE, Course, Entry, Flows, Key, Tables, TargetEvent, VpcAddress, Width};
use crate::verdict::Direction::ToProvider;
use crate::wire::{ACK, FIN, RST, SYN};

/// The established flow of a packet. Nearly every packet changes nothing about its flow, and is done here.
#[inline(always)]
pub(super) fn established<K: Key, T: Tables + Flows<K>>(
    tables: &T,
    packet: &Packet<K>,
    now: u32,
    numbers: impl Fn() -> Option<Numbers>,
) -> Option<K::Flow> {
    let entry = tables.established(&packet.key)?;
    let flow = entry.flow();
    is_alive(tables, packet, &entry, &flow, now, numbers).then_some(flow)
}

/// The same, into `flow`.
#[inline(always)]
pub(super) fn established_into<K: Key, T: Tables + Flows<K>>(
    tables: &T,
    packet: &Packet<K>,
    now: u32,
    flow: &mut K::Flow,
    numbers: impl Fn() -> Option<Numbers>,
) -> bool {
    let Some(entry) = tables.established(&packet.key) else { return false };
    *flow = entry.flow();
    is_alive(tables, packet, &entry, flow, now, numbers)
}

/// Whether the packet belongs to the flow of this entry, of which `flow` is a copy; brings the entry up to date. The packet's numbers are
/// read when the flow is known: the kernel bounds the stack, where they would wait for that.
#[inline(always)]
fn is_alive<K: Key, T: Tables + Flows<K>>(
    tables: &T,
    packet: &Packet<K>,
    entry: &<T as Flows<K>>::Entry,
    flow: &K::Flow,
    now: u32,
    numbers: impl Fn() -> Option<Numbers>,
) -> bool {
    let current = tables.endpoint(flow.endpoint.into()).generation == flow.generation;
    let known = flow.direction() != ToProvider
        || (flow.seen_mac == packet.source_mac && flow.seen_interface == packet.interface);
    let settled = flow.last_seen == now && known && packet.flags & (SYN | FIN | RST) == 0;
    if !(current && settled) {
        let is_idle = now.wrapping_sub(flow.last_seen) > flow.patience();
        if current
            && !is_idle
            && packet.flags & RST != 0
            && let Some(numbers) = numbers()
            && !may_reset(tables, packet, flow, numbers)
        {
            // It changes nothing here. What it does to its receiver, that one knows best: the slow path sends it on.
            return false;
        }
        match maintain(tables, packet, entry, flow, now) {
            Upkeep::Alive => {}
            Upkeep::Over => {
                remove(tables, packet);
                return false;
            }
            Upkeep::Terminated | Upkeep::Asked => return false,
        }
    }
    if sequence::counts(packet)
        && let Some(numbers) = numbers()
    {
        sequence::follow(numbers, entry, flow);
    }
    true
}

/// Whether a RST is one that its receiver may believe. Not inlined: the kernel bounds a function's stack.
#[inline(never)]
fn may_reset<K: Key, T: Tables + Flows<K>>(
    tables: &T,
    packet: &Packet<K>,
    flow: &K::Flow,
    numbers: Numbers,
) -> bool {
    let peer = tables.established(&packet.key.mirror(flow));
    peer.is_none_or(|peer| sequence::is_reset(numbers, flow, peer.acknowledged()))
}

/// How a flow stands after it was brought up to date.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum Upkeep {
    /// The packet belongs to it.
    Alive = 0,
    /// It is over; the packet is one of no flow.
    Over = 1,
    /// It was cut; the packet is to be answered by a RST.
    Terminated = 2,
    /// It goes on if network ACLs let the packet through, which the slow path asks them, and then [`heed`]s it.
    Asked = 3,
}

/// Brings a flow, of whose entry `flow` is a copy, up to date by a packet: its time, where the target and the consumer are, its state.
/// Not inlined, as above.
#[inline(never)]
fn maintain<K: Key, T: Tables + Flows<K>>(
    tables: &T,
    packet: &Packet<K>,
    entry: &<T as Flows<K>>::Entry,
    flow: &K::Flow,
    now: u32,
) -> Upkeep {
    if flow.state == State::Terminated as u8 {
        let over = now.wrapping_sub(flow.last_seen) > u32::from(flow.idle_timeout) || opens(packet, flow);
        return if over { Upkeep::Over } else { Upkeep::Terminated };
    }
    let endpoint = tables.endpoint(flow.endpoint.into());
    if endpoint.generation != flow.generation {
        return terminate(tables, packet, entry, flow, now);
    }
    if flow.last_seen != now {
        if now.wrapping_sub(flow.last_seen) > flow.patience() && idle(tables, packet, flow, now) {
            return Upkeep::Over;
        }
        if is_cut(tables, flow) {
            return terminate(tables, packet, entry, flow, now);
        }
        if flow.direction() == ToProvider {
            follow_target::<K, T>(tables, entry, flow);
        }
    }
    // What network ACLs may deny changes nothing before they are asked: neither the flow's time, nor its state.
    if endpoint.acls != 0 && (flow.last_seen != now || packet.flags & (SYN | FIN | RST) != 0) {
        return Upkeep::Asked;
    }
    if take(tables, packet, entry, flow, now) { Upkeep::Alive } else { Upkeep::Over }
}

/// Brings a flow up to date by a packet that network ACLs have let through, and that [`established`] has left to be asked about; or by a
/// RST that changes nothing. Returns 0 where the flow is over, and the packet one of none. Not inlined, as above.
#[inline(never)]
pub(super) fn heed<K: Key, T: Tables + Flows<K>>(
    tables: &T,
    packet: &Packet<K>,
    flow: &K::Flow,
    now: u32,
    numbers: Numbers,
) -> u32 {
    let Some(entry) = tables.established(&packet.key) else { return 0 };
    if packet.flags & RST != 0 && !may_reset(tables, packet, flow, numbers) {
        entry.set_last_seen(now);
        return 1;
    }
    if !take(tables, packet, &entry, flow, now) {
        return 0;
    }
    if sequence::counts(packet) {
        sequence::follow(numbers, &entry, flow);
    }
    1
}

/// Takes a packet as the flow's: its time, where its consumer is, its state. Says no where the packet opens another flow in this one's
/// place.
#[inline(always)]
fn take<K: Key, T: Tables + Flows<K>>(
    tables: &T,
    packet: &Packet<K>,
    entry: &<T as Flows<K>>::Entry,
    flow: &K::Flow,
    now: u32,
) -> bool {
    if flow.last_seen != now {
        if flow.state == State::Reset as u8 && packet.flags & (SYN | RST) == 0 {
            doubt(tables, packet, entry, flow, now);
        }
        entry.set_last_seen(now);
    }
    if flow.direction() == ToProvider {
        follow_consumer(tables, packet, entry, flow);
    }
    packet.flags & (SYN | FIN | RST) == 0 || advance(tables, packet, entry, flow)
}

/// A segment long after a RST: whoever sends it has not believed the RST, or not sent it.
#[inline(always)]
fn doubt<K: Key, T: Flows<K>>(tables: &T, packet: &Packet<K>, entry: &T::Entry, flow: &K::Flow, now: u32) {
    let Some(peer) = tables.established(&packet.key.mirror(flow)) else { return };
    let silent = now.wrapping_sub(flow.last_seen).min(now.wrapping_sub(peer.flow().last_seen));
    if silent >= TCP_RESET_ECHO {
        entry.set_state(State::Established as u8, flow.idle_timeout);
        peer.set_state(State::Established as u8, flow.idle_timeout);
    }
}

/// Whether the agent has cut this flow's target since it was opened. Asked once a second.
#[inline(always)]
fn is_cut<T: Tables>(tables: &T, flow: &Course) -> bool {
    tables.target(flow.target.into()).is_some_and(|target| target.cut != 0 && target.cut >= flow.opened)
}

/// Ends a flow whose target is cut or whose endpoint is revoked, in place: its memory stays its own until it has been silent for a while. The mark is older than this second, so that
/// the next packet, too, comes to [`maintain`]. UDP has no way to be told, and its next datagram may as well open another flow.
#[inline(always)]
fn terminate<K: Key, T: Flows<K>>(
    tables: &T,
    packet: &Packet<K>,
    entry: &T::Entry,
    flow: &K::Flow,
    now: u32,
) -> Upkeep {
    if !packet.is_tcp() {
        return Upkeep::Over;
    }
    let (state, before) = (State::Terminated as u8, now.wrapping_sub(1));
    if let Some(peer) = tables.established(&packet.key.mirror(flow)) {
        peer.set_ended(state, TCP_CLOSED, before);
    }
    entry.set_ended(state, TCP_CLOSED, before);
    if opens(packet, flow) { Upkeep::Over } else { Upkeep::Terminated }
}

/// Whether the packet is a consumer's SYN, which opens a flow where the one that it belongs to is over.
#[inline(always)]
fn opens<K: Key>(packet: &Packet<K>, flow: &Course) -> bool {
    packet.flags & (SYN | ACK | RST) == SYN && flow.direction() == ToProvider
}

/// Whether the other direction has been silent for as long, too.
#[inline(always)]
fn idle<K: Key, T: Flows<K>>(tables: &T, packet: &Packet<K>, flow: &K::Flow, now: u32) -> bool {
    match tables.established(&packet.key.mirror(flow)) {
        Some(peer) => now.wrapping_sub(peer.flow().last_seen) > flow.patience(),
        None => true,
    }
}

/// Removes both directions; the packet at hand is then one of no flow. Not inlined, as above.
#[inline(never)]
pub(super) fn remove<K: Key, T: Tables + Flows<K>>(tables: &T, packet: &Packet<K>) {
    let Some(entry) = tables.established(&packet.key) else { return };
    let flow = entry.flow();
    let peer_key = packet.key.mirror(&flow);
    if tables.established(&peer_key).is_some_and(|peer| peer_key.mirror(&peer.flow()) == packet.key) {
        tables.remove_established(&peer_key);
    }
    tables.remove_established(&packet.key);
    forget_stream(tables, packet, &flow);
}

/// What the two sides of a flow count differently goes with it.
#[inline(always)]
fn forget_stream<K: Key, T: Flows<K>>(tables: &T, packet: &Packet<K>, flow: &K::Flow) {
    if flow.is_shifted() {
        tables.remove_stream(&consumers(packet, flow));
    }
}

/// Takes over where the target is reached now: it may have moved, and only the agent hears of it.
#[inline(always)]
fn follow_target<K: Key, T: Tables + Flows<K>>(tables: &T, entry: &<T as Flows<K>>::Entry, flow: &K::Flow) {
    if let Some(hop) = tables.neighbour(&VpcAddress::new(flow.peer_vpc, K::destination_of(flow).widen()))
        && (hop.mac != flow.destination_mac || hop.interface != flow.interface)
    {
        entry.set_next_hop(hop.mac, hop.interface);
    }
}

/// Replies go where requests come from: when the consumer moves to another interface or link-layer address, the other direction
/// follows at once.
#[inline(always)]
fn follow_consumer<K: Key, T: Flows<K>>(tables: &T, packet: &Packet<K>, entry: &T::Entry, flow: &K::Flow) {
    if flow.seen_mac == packet.source_mac && flow.seen_interface == packet.interface {
        return;
    }
    entry.set_seen(packet.source_mac, packet.interface);
    if let Some(peer) = tables.established(&packet.key.mirror(flow)) {
        peer.set_next_hop(packet.source_mac, packet.interface);
    }
}

/// Follows a segment that changes the flow's state. Says no where the segment opens another flow in this one's place.
#[inline(always)]
fn advance<K: Key, T: Tables + Flows<K>>(
    tables: &T,
    packet: &Packet<K>,
    entry: &<T as Flows<K>>::Entry,
    flow: &K::Flow,
) -> bool {
    let state = State::from_number(flow.state);
    let direction = flow.direction();
    if opens(packet, flow) && state.is_over() {
        return false;
    }
    let next = state.after(direction, packet.flags);
    if next != state {
        #[allow(clippy::cast_possible_truncation, reason = "the agent sets no more than 600")]
        let hold = tables.endpoint(flow.endpoint.into()).hold as u16;
        let idle_timeout = next.idle_timeout(flow.idle_timeout, hold);
        entry.set_state(next as u8, idle_timeout);
        if let Some(peer) = tables.established(&packet.key.mirror(flow)) {
            peer.set_state(next as u8, idle_timeout);
        }
    }
    true
}

/// What the pending flows say about a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Pending {
    /// It belongs to none.
    Miss = 0,
    /// It belongs to one, which may just have become established.
    Hit = 1,
    /// It would have established its flow, but there is no room.
    Full = 2,
    /// It belongs to one, and a network ACL denies it.
    Denied = 3,
}

/// Puts the pending flow of a packet, brought up to date by it, into `flow`.
#[inline(always)]
pub(super) fn pending<K: Key, T: Tables + Flows<K>>(
    tables: &T,
    packet: &Packet<K>,
    now: u32,
    flow: &mut K::Flow,
    peer: &mut Peer<K>,
) -> Pending {
    let Some(entry) = tables.pending(&packet.key) else { return Pending::Miss };
    *flow = entry.flow();
    peer.key = packet.key.mirror(flow);
    let Some(peer_entry) = tables.pending(&peer.key) else { return discard(tables, &packet.key) };
    peer.flow = peer_entry.flow();
    if peer.key.mirror(&peer.flow) != packet.key {
        return discard(tables, &packet.key);
    }
    let endpoint = tables.endpoint(flow.endpoint.into());
    let current = endpoint.generation == flow.generation && !begins_anew(packet, flow);
    let patience = if packet.is_tcp() { TCP_OPENING } else { flow.idle_timeout };
    let silent = now.wrapping_sub(flow.last_seen).min(now.wrapping_sub(peer.flow.last_seen));
    if !current || silent > u32::from(patience) {
        tables.remove_pending(&peer.key);
        return discard(tables, &packet.key);
    }
    if endpoint.acls != 0 && !rules::lets(tables, packet, flow) {
        return Pending::Denied;
    }
    let unanswered = flow.direction() != ToProvider && flow.state == State::Opening as u8;
    if packet.flags & RST != 0 {
        if unanswered {
            tables.count(flow.target.into(), TargetEvent::Refused);
        }
        tables.remove_pending(&peer.key);
        tables.remove_pending(&packet.key);
        return Pending::Hit;
    }
    sequence::begin(packet, peer.numbers, flow);
    if confirms(packet, flow) {
        if packet.is_tcp() {
            cookie::concerns(tables, flow.endpoint.into(), &endpoint, now, Happened::Confirmed);
        }
        return establish(tables, packet, flow, peer, now);
    }
    entry.set_last_seen(now);
    entry.set_numbers(flow.sent, flow.acknowledged);
    if packet.flags & (SYN | ACK) == SYN | ACK && unanswered {
        tables.count(flow.target.into(), TargetEvent::Answered);
        entry.set_state(State::Answered as u8, flow.idle_timeout);
        peer_entry.set_state(State::Answered as u8, flow.idle_timeout);
    }
    Pending::Hit
}

/// Whether the packet is a SYN of a consumer whose SYN the path has answered already: it wants another connection.
#[inline(always)]
fn begins_anew<K: Key>(packet: &Packet<K>, flow: &Course) -> bool {
    flow.way & COOKIE != 0 && opens(packet, flow)
}

/// Whether this packet makes the flow established: TCP's by the consumer's word after the target's, UDP's by the target's.
#[inline(always)]
fn confirms<K: Key>(packet: &Packet<K>, flow: &Course) -> bool {
    match (packet.is_tcp(), flow.direction() == ToProvider) {
        (true, true) => packet.flags & (SYN | ACK) == ACK && flow.state == State::Answered as u8,
        (false, false) => true,
        (true, false) | (false, true) => false,
    }
}

/// Half a pair is worth nothing: the other half was evicted, and its NAT port may be another tenant's by now.
#[inline(always)]
fn discard<K: Key, T: Flows<K>>(tables: &T, key: &K) -> Pending {
    tables.remove_pending(key);
    Pending::Miss
}

/// Takes a flow back that this packet has opened, and that cannot go the way it should: the next packet opens it again.
#[inline(never)]
pub(super) fn forget<K: Key, T: Flows<K>>(tables: &T, packet: &Packet<K>, flow: &K::Flow) -> u64 {
    tables.remove_pending(&packet.key.mirror(flow));
    tables.remove_pending(&packet.key);
    0
}

/// Moves both directions to `established`. They are inserted there before they leave `pending`, so that no one who claims a NAT
/// port finds it free in between.
#[inline(always)]
fn establish<K: Key, T: Flows<K>>(
    tables: &T,
    packet: &Packet<K>,
    flow: &mut K::Flow,
    peer: &mut Peer<K>,
    now: u32,
) -> Pending {
    flow.state = State::Established.after(flow.direction(), packet.flags) as u8;
    flow.last_seen = now;
    peer.flow.state = flow.state;
    if flow.direction() == ToProvider {
        (flow.seen_mac, flow.seen_interface) = (packet.source_mac, packet.interface);
        (peer.flow.destination_mac, peer.flow.interface) = (packet.source_mac, packet.interface);
    }
    let mut outcome = Pending::Hit;
    if tables.establish(&peer.key, &peer.flow).is_err() {
        outcome = Pending::Full;
    } else if tables.establish(&packet.key, flow).is_err() {
        tables.remove_established(&peer.key);
        outcome = Pending::Full;
    }
    tables.remove_pending(&packet.key);
    tables.remove_pending(&peer.key);
    outcome
}
