//! ICMP errors about packets of wide flows: over IPv6, and between the families. [`super::errors`] has what makes an error one that is
//! believed, which is the same here.
//!
//! Between the families, the error and the header that it holds are translated by RFC 7915, 4.2, 4.3, 5.2 and 5.3; what has no
//! translation there is dropped. What both headers lose or gain in length is taken from, or given to, the front of the frame, so that what
//! the error holds behind them stays as it is.

use super::errors::{self, Found};
use super::parse::{FRAGMENT, addresses};
use super::rewrite::port_change;
use super::rules::{self, Way};
use super::six::Wide;
use super::{sequence, stack};
use crate::checksum::{delta, finish, ip, sum, update, update_udp, word};
use crate::frame::{DIFFERENCE, Frame};
use crate::limits::STACK_PORTS;
use crate::tables::{Flow6, FlowKey6, Interface, RESOLVER, Tables, VpcAddress};
use crate::verdict::{DropReason, FlowEvent, Verdict};
use crate::wire::{
    DESTINATION_UNREACHABLE, DESTINATION_UNREACHABLE6, DONT_FRAGMENT, ETHERTYPE_IPV4, ETHERTYPE_IPV6,
    Ethernet, FRAGMENT_OFFSET, FRAGMENT_OFFSET6, FRAGMENT6, FRAGMENTATION_NEEDED, FragmentHeader, ICMP,
    ICMPV6, IcmpError, Ip, Ipv4Header, Ipv6Header, NETWORK, PACKET_TOO_BIG, PARAMETER_PROBLEM,
    PARAMETER_PROBLEM6, TCP, TIME_EXCEEDED, TIME_EXCEEDED6, TRANSPORT, TRANSPORT6, Tcp, UDP, Udp,
};
use core::mem::{offset_of, size_of};
use zerocopy::{
    FromBytes, Immutable, IntoBytes,
    big_endian::{U16, U32},
};

/// Where the header of the packet begins that an error over IPv4 is about, and the transport header behind it.
const INNER: usize = TRANSPORT + size_of::<IcmpError>();
const INNER_TRANSPORT: usize = INNER + size_of::<Ipv4Header>();
/// The same over IPv6.
const INNER6: usize = TRANSPORT6 + size_of::<IcmpError>();
const INNER_TRANSPORT6: usize = INNER6 + size_of::<Ipv6Header>();
/// Where it is if the error is about a first fragment.
const INNER_PIECE6: usize = INNER_TRANSPORT6 + size_of::<FragmentHeader>();

/// The bytes of transport header that every error holds.
const LEAST: u16 = 8;
/// What two IPv6 headers are longer by than two IPv4 headers.
#[allow(clippy::cast_possible_truncation, reason = "forty")]
const BOTH: u16 = 2 * DIFFERENCE as u16;
/// Half of that, which is what a change of the family alone does not move.
#[allow(clippy::cast_possible_truncation, clippy::cast_possible_wrap, reason = "twenty")]
const MOVED: i32 = DIFFERENCE as i32;
/// The largest IPv4 packet that others may fragment further on (RFC 7915, 5.1).
const MAY_BE_FRAGMENTED: u16 = 1260;
/// What every link of IPv6 carries (RFC 8200, 5), and every link of IPv4 (RFC 791, 3.2).
const LOWEST_MTU6: u32 = 1280;
const LOWEST_MTU: u32 = 68;

/// What an error says, of either family.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Quote {
    /// The key of what answers the packet that the error is about.
    key: FlowKey6,
    /// Who sent the error.
    source: Ip,
    /// To whom it was sent.
    destination: Ip,
    /// Its length, from the network header on.
    length: u16,
    /// How much it holds of what follows the header of the packet that it is about.
    held: u16,
    /// The length of what followed that header once.
    payload: u16,
    /// Bits about fragments of that header, where it is one of IPv4.
    fragment: u16,
    /// Of a TCP segment, its sequence number.
    number: U32,
    /// The slot of the interface that the error came by.
    interface: u16,
    /// Type and code.
    kind: u8,
    code: u8,
    /// Hop limit and traffic class of the error.
    ttl: u8,
    class: u8,
    /// Those of the packet that it is about.
    inner_ttl: u8,
    inner_class: u8,
    /// Whether it is an error over IPv4.
    from_ipv4: bool,
    /// Whether it is one over IPv6 about a first fragment.
    piece: bool,
}

impl Quote {
    /// What has the place of an identification where the header has none, as [`super::translate`] has it.
    #[inline(always)]
    const fn id(&self) -> U16 {
        let [_, _, a, b] = self.number.to_bytes();
        U16::from_bytes([a, b])
    }

    /// How the error came, to rules.
    #[inline(always)]
    const fn way(&self) -> Way {
        Way {
            vpc: self.key.vpc,
            source: self.source,
            destination: self.destination,
            protocol: if self.from_ipv4 { ICMP } else { ICMPV6 },
            port: U16::ZERO,
        }
    }
}

/// Two addresses of an IPv6 header.
#[derive(Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct Addresses(Ip, Ip);

/// The transport header's first bytes.
#[derive(Clone, Copy, FromBytes)]
#[repr(C)]
struct Start {
    source_port: U16,
    destination_port: U16,
    number: U32,
}

/// Source and destination port.
#[derive(Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct Ports(U16, U16);

/// Whether an ICMPv6 type is an error that is passed on (RFC 4443, 3).
#[inline(always)]
pub(super) const fn is_error6(kind: u8) -> bool {
    matches!(kind, DESTINATION_UNREACHABLE6 | PACKET_TOO_BIG | TIME_EXCEEDED6 | PARAMETER_PROBLEM6)
}

/// Passes an error over IPv6 on. Not inlined, nor are most of those below: the kernel bounds a function's stack.
#[inline(never)]
pub(super) fn pass_on6<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    from: &Interface,
    now: u32,
    room: &mut Wide,
) -> Verdict {
    read6(frame, &mut room.quote);
    pass_on(frame, tables, from, now, room)
}

/// Passes an error over IPv4 on that is about none of the narrow flows.
#[inline(never)]
pub(super) fn pass_on4<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    from: &Interface,
    now: u32,
    room: &mut Wide,
) -> Verdict {
    read4(frame, &mut room.quote);
    pass_on(frame, tables, from, now, room)
}

#[inline(always)]
fn pass_on<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    from: &Interface,
    now: u32,
    room: &mut Wide,
) -> Verdict {
    let Wide { quote, flow, .. } = room;
    (quote.key.vpc, quote.interface) = (from.vpc, from.slot);
    let Some(ours) = tables.address(&VpcAddress::new(from.vpc, quote.destination)) else {
        return Verdict::PASS;
    };
    if tables.address(&VpcAddress::new(from.vpc, quote.source)).is_some() {
        return Verdict::of(Err(DropReason::SpoofedSource));
    }
    if quote.held < LEAST {
        return Verdict::of(Err(DropReason::IcmpMalformed));
    }
    if quote.key.destination != quote.destination {
        return Verdict::of(Err(DropReason::IcmpForged));
    }
    if ours.stack != 0 && STACK_PORTS.contains(&quote.key.destination_port.get()) {
        if ours.kind != RESOLVER && enters(tables, quote) == 0 {
            return Verdict::of(Err(DropReason::NetworkAcl));
        }
        return Verdict::of(stack::receive(frame, tables, ours.stack));
    }
    if quote.fragment & FRAGMENT_OFFSET != 0 {
        return Verdict::of(Err(DropReason::IcmpNoFlow));
    }
    match find(tables, &quote.key, now, quote.number.get(), flow) {
        Found::Nothing => return Verdict::of(Err(DropReason::IcmpNoFlow)),
        Found::OutOfWindow => return Verdict::of(Err(DropReason::IcmpOutOfWindow)),
        Found::Flow => {}
    }
    if lets(tables, quote, flow) == 0 {
        return Verdict::of(Err(DropReason::NetworkAcl));
    }
    if quote.ttl <= 1 {
        return Verdict::of(Err(DropReason::TtlExpired));
    }
    let to_ipv4 = flow.source.is_ipv4();
    let mtu = tables.mtu(flow.interface);
    if mtu != 0 && length(quote, to_ipv4) > mtu {
        return Verdict::of(Err(DropReason::TooBig));
    }
    if flow.is_shifted() && restore(frame, tables, quote, flow) == 0 {
        return Verdict::of(Err(DropReason::IcmpMalformed));
    }
    let written = match (quote.from_ipv4, to_ipv4) {
        (false, false) => rewrite(frame, quote, flow),
        // What it holds has a header that has no place on the other side.
        (false, true) if quote.piece => Verdict::of(Err(DropReason::IcmpUnsupported)),
        (false, true) => to_icmp(frame, tables, quote, flow),
        (true, false) => to_icmp6(frame, tables, quote, flow),
        (true, true) => Verdict::of(Err(DropReason::IcmpNoFlow)),
    };
    if written != Verdict::PASS {
        return written;
    }
    let verdict =
        Verdict::forward(flow.interface, flow.endpoint.into(), flow.direction(), FlowEvent::None, !to_ipv4);
    Verdict::of(verdict.leaving(tables.egress(flow.interface)))
}

#[inline(never)]
fn find<T: Tables>(tables: &T, key: &FlowKey6, now: u32, number: u32, flow: &mut Flow6) -> Found {
    errors::find(tables, key, now, number, flow)
}

/// Whether network ACLs let an error come in that is for a VPC's own stack. Not inlined, as above, nor is the next.
#[inline(never)]
fn enters<T: Tables>(tables: &T, quote: &Quote) -> u64 {
    rules::crosses(tables, &quote.way())
}

/// Whether they let one through that is about a flow.
#[inline(never)]
fn lets<T: Tables>(tables: &T, quote: &Quote, flow: &Flow6) -> u64 {
    rules::lets_error::<FlowKey6, T>(tables, &quote.way(), flow).into()
}

/// Gives a segment whose flow's sides count differently back the numbers that it was sent with. Not inlined, as above.
#[inline(never)]
fn restore<F: Frame, T: Tables>(frame: &mut F, tables: &T, quote: &Quote, flow: &Flow6) -> u64 {
    let (key, held) = (errors::consumers(&quote.key, flow), quote.held.into());
    if quote.from_ipv4 {
        sequence::restore::<F, T, FlowKey6, TRANSPORT, INNER_TRANSPORT>(frame, tables, &key, flow, held)
    } else {
        sequence::restore::<F, T, FlowKey6, TRANSPORT6, INNER_TRANSPORT6>(frame, tables, &key, flow, held)
    }
}

/// How long the error will be.
#[inline(always)]
fn length(quote: &Quote, to_ipv4: bool) -> u32 {
    match (quote.from_ipv4, to_ipv4) {
        (false, true) => u32::from(quote.length).saturating_sub(BOTH.into()),
        (true, false) => u32::from(quote.length) + u32::from(BOTH),
        _ => quote.length.into(),
    }
}

/// Reads an error over IPv6. It holds nothing where it does not hold the beginning of a packet such as we send.
#[inline(never)]
fn read6<F: Frame>(frame: &F, quote: &mut Quote) {
    *quote = Quote::default();
    let mut read = || -> Option<()> {
        let outer = frame.read::<Ipv6Header>(NETWORK)?;
        (quote.source, quote.destination) = (Ip(outer.source), Ip(outer.destination));
        (quote.ttl, quote.class) = (outer.hop_limit, class(&outer));
        quote.length = outer.payload_length.get().checked_add(LENGTH6)?;
        let error = frame.read::<[u8; 2]>(TRANSPORT6)?;
        (quote.kind, quote.code) = (error[0], error[1]);
        let inner = frame.read::<Ipv6Header>(INNER6)?;
        if inner.version_class_label.get() >> 28 != 6 {
            return None;
        }
        (quote.key.source, quote.key.destination) = (Ip(inner.destination), Ip(inner.source));
        (quote.key.protocol, quote.payload) = (inner.next_header, inner.payload_length.get());
        (quote.inner_ttl, quote.inner_class) = (inner.hop_limit, class(&inner));
        if inner.next_header == FRAGMENT6 {
            let header = frame.read::<FragmentHeader>(INNER_TRANSPORT6)?;
            quote.piece = header.fragment.get() & FRAGMENT_OFFSET6 == 0;
            quote.key.protocol = header.next_header;
        }
        if quote.piece {
            start(quote, frame.read(INNER_PIECE6)?);
            quote.held = outer.payload_length.get().checked_sub(BEFORE_PIECE6)?;
        } else {
            start(quote, frame.read(INNER_TRANSPORT6)?);
            quote.held = outer.payload_length.get().checked_sub(BEFORE6)?;
        }
        Some(())
    };
    let _ = read();
}

/// Bytes of an IPv4 header and of an IPv6 header.
#[allow(clippy::cast_possible_truncation, reason = "twenty")]
const LENGTH: u16 = size_of::<Ipv4Header>() as u16;
#[allow(clippy::cast_possible_truncation, reason = "forty")]
const LENGTH6: u16 = size_of::<Ipv6Header>() as u16;
/// Bytes in front of the transport header that an error holds, behind the network header; over IPv4, with the network header.
#[allow(clippy::cast_possible_truncation, reason = "less than a hundred")]
const BEFORE6: u16 = (INNER_TRANSPORT6 - TRANSPORT6) as u16;
#[allow(clippy::cast_possible_truncation, reason = "less than a hundred")]
const BEFORE_PIECE6: u16 = (INNER_PIECE6 - TRANSPORT6) as u16;
#[allow(clippy::cast_possible_truncation, reason = "less than a hundred")]
const BEFORE: u16 = (INNER_TRANSPORT - NETWORK) as u16;

/// The same over IPv4.
#[inline(never)]
fn read4<F: Frame>(frame: &F, quote: &mut Quote) {
    *quote = Quote { from_ipv4: true, ..Quote::default() };
    let mut read = || -> Option<()> {
        let outer = frame.read::<Ipv4Header>(NETWORK)?;
        (quote.source, quote.destination) = (Ip::from_ipv4(outer.source), Ip::from_ipv4(outer.destination));
        (quote.ttl, quote.class, quote.length) = (outer.ttl, outer.tos, outer.total_length.get());
        let error = frame.read::<[u8; 2]>(TRANSPORT)?;
        (quote.kind, quote.code) = (error[0], error[1]);
        let inner = frame.read::<Ipv4Header>(INNER)?;
        if inner.version_ihl != 0x45 {
            return None;
        }
        quote.key.source = Ip::from_ipv4(inner.destination);
        quote.key.destination = Ip::from_ipv4(inner.source);
        (quote.key.protocol, quote.fragment) = (inner.protocol, inner.fragment.get() & FRAGMENT);
        quote.payload = inner.total_length.get().wrapping_sub(LENGTH);
        (quote.inner_ttl, quote.inner_class) = (inner.ttl, inner.tos);
        start(quote, frame.read(INNER_TRANSPORT)?);
        quote.held = quote.length.checked_sub(BEFORE)?;
        Some(())
    };
    let _ = read();
}

/// Notes the ports, the other way round.
#[inline(always)]
fn start(quote: &mut Quote, start: Start) {
    quote.key.source_port = start.destination_port;
    quote.key.destination_port = start.source_port;
    quote.number = start.number;
}

/// The traffic class of a header.
#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "eight bits")]
fn class(header: &Ipv6Header) -> u8 {
    (header.version_class_label.get() >> 20) as u8
}

/// Gives the transport header at `AT` of the packet in the error back the ports that it came to us with. Returns what that changes of the
/// sum of the words from there on.
#[inline(never)]
fn transport<F: Frame, const AT: usize>(frame: &mut F, quote: &Quote, flow: &Flow6) -> u64 {
    let (addresses, ports) = (u32::from(flow.address_delta), port_change(&quote.key, flow));
    if frame.write(AT, &Ports(flow.destination_port, flow.source_port)).is_none() {
        return FAILED;
    }
    let is_udp = quote.key.protocol == UDP;
    let at = match quote.key.protocol {
        UDP => AT + offset_of!(Udp, checksum),
        // The header may be cut off before its checksum.
        TCP if usize::from(quote.held) >= offset_of!(Tcp, checksum) + 2 => AT + offset_of!(Tcp, checksum),
        _ => return ports.into(),
    };
    let Some(stored) = frame.read::<[u8; 2]>(at) else { return FAILED };
    let change = addresses + ports;
    let updated = if is_udp { update_udp(stored, change) } else { update(stored, change) };
    if frame.write(at, &updated).is_none() {
        return FAILED;
    }
    u64::from(ports + u32::from(delta(word(stored), word(updated))))
}

/// What [`transport`] says where the frame is shorter than it should be.
const FAILED: u64 = u64::MAX;

/// [`transport`] of a frame that has it.
#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "a sum of a few folded words")]
const fn changed(change: u64) -> Option<u32> {
    if change == FAILED { None } else { Some(change as u32) }
}

/// A stage's outcome in one register: [`Verdict::PASS`] where all was written.
#[inline(always)]
fn outcome(written: Option<()>) -> Verdict {
    Verdict::of(written.map(|()| Verdict::PASS).ok_or(DropReason::IcmpMalformed))
}

/// IPv6 on both sides: the packet in the error gets the addresses and ports back that it came to us with, and the error becomes one that
/// the flow's other end has sent.
#[inline(never)]
fn rewrite<F: Frame>(frame: &mut F, quote: &Quote, flow: &Flow6) -> Verdict {
    let mut write = || -> Option<()> {
        let change = changed(match quote.piece {
            true => transport::<F, INNER_PIECE6>(frame, quote, flow),
            false => transport::<F, INNER_TRANSPORT6>(frame, quote, flow),
        })?;
        frame.write(INNER6 + offset_of!(Ipv6Header, source), &Addresses(flow.destination, flow.source))?;
        let moved = delta(ip(quote.source) + ip(quote.destination), ip(flow.source) + ip(flow.destination));
        let change = change + u32::from(flow.address_delta) + u32::from(moved);
        let at = TRANSPORT6 + offset_of!(IcmpError, checksum);
        let checksum = update(frame.read::<[u8; 2]>(at)?, change);
        frame.write(at, &checksum)?;
        frame.write(NETWORK + offset_of!(Ipv6Header, source), &Addresses(flow.source, flow.destination))?;
        let hop = [ICMPV6, quote.ttl.wrapping_sub(1)];
        frame.write_summed(NETWORK + offset_of!(Ipv6Header, next_header), &hop)?;
        ethernet(frame, flow, ETHERTYPE_IPV6)
    };
    outcome(write())
}

#[inline(always)]
fn ethernet<F: Frame>(frame: &mut F, flow: &Flow6, ethertype: u16) -> Option<()> {
    let (destination, source) = (flow.destination_mac, flow.source_mac);
    frame.write(0, &Ethernet { destination, source, ethertype: U16::new(ethertype) })
}

/// An error over IPv6 about a flow whose other side is IPv4 (RFC 7915, 5.2 and 5.3).
#[inline(never)]
fn to_icmp<F: Frame, T: Tables>(frame: &mut F, tables: &T, quote: &Quote, flow: &Flow6) -> Verdict {
    let said = frame.read::<U32>(TRANSPORT6 + offset_of!(IcmpError, unused)).unwrap_or_default();
    let (near, far) = (known(tables.mtu(flow.interface)), known(tables.mtu(quote.interface)));
    #[allow(clippy::cast_possible_truncation, reason = "twenty")]
    let meaning = meaning(quote, said.get(), near.min(far.saturating_sub(DIFFERENCE as u32)));
    if meaning == NONE {
        return Verdict::of(Err(DropReason::IcmpUnsupported));
    }
    #[allow(clippy::cast_possible_truncation, reason = "the lower half")]
    let id = tables.next_identification() as u16;
    outcome(icmp(frame, quote, flow, id, meaning))
}

#[inline(always)]
fn icmp<F: Frame>(frame: &mut F, quote: &Quote, flow: &Flow6, id: u16, meaning: u64) -> Option<()> {
    let before = sum6(frame);
    let change = changed(transport::<F, INNER_TRANSPORT6>(frame, quote, flow))?;
    let stored = frame.read::<[u8; 2]>(TRANSPORT6 + offset_of!(IcmpError, checksum))?;
    frame.change_family(false)?;
    frame.move_payload(-MOVED)?;
    // The header in the error sums to nothing, since its checksum is right.
    let (mut error, after) = error(meaning);
    error.checksum = update(stored, change + u32::from(delta(without(before, stored), after)));
    frame.write_summed(TRANSPORT, &error)?;
    (headers(frame, quote, flow, id)).then_some(())
}

/// The sum of the words of an error over IPv6 and of its pseudo header (RFC 8200, 8.1), up to the transport header that it holds, its
/// checksum among them; anything where it is shorter.
#[inline(never)]
fn sum6<F: Frame>(frame: &F) -> u32 {
    let eight = |at| frame.read::<[u8; 8]>(at).map_or(0, |bytes| sum(&bytes));
    let payload = frame.read::<[u8; 2]>(NETWORK + offset_of!(Ipv6Header, payload_length));
    addresses::<F, NETWORK>(frame)
        + addresses::<F, INNER6>(frame)
        + eight(TRANSPORT6)
        + eight(INNER6)
        + word(payload.unwrap_or_default())
        + word([0, ICMPV6])
}

/// The same over IPv4, without a pseudo header.
#[inline(never)]
fn sum4<F: Frame>(frame: &F) -> u32 {
    let inner = frame.read::<[u8; 20]>(INNER).map_or(0, |bytes| sum(&bytes));
    inner + frame.read::<[u8; 8]>(TRANSPORT).map_or(0, |bytes| sum(&bytes))
}

/// The sum of `before` without the checksum that is one of its words.
#[inline(always)]
fn without(before: u32, checksum: [u8; 2]) -> u32 {
    before + u32::from(!u16::from_ne_bytes(checksum))
}

/// The header of an error, but for its checksum, and the sum of its words.
#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "cut out at its own width")]
fn error(meaning: u64) -> (IcmpError, u32) {
    let (kind, code) = ((meaning >> 40) as u8, (meaning >> 32) as u8);
    let [a, b, c, d] = (meaning as u32).to_be_bytes();
    let (unused, mtu) = (U16::from_bytes([a, b]), U16::from_bytes([c, d]));
    let sum = word([kind, code]) + word([a, b]) + word([c, d]);
    (IcmpError { kind, code, checksum: [0; 2], unused, mtu }, sum)
}

/// Writes the headers in front of an error over IPv4, and the one in it.
#[inline(never)]
fn headers<F: Frame>(frame: &mut F, quote: &Quote, flow: &Flow6, id: u16) -> bool {
    let mut write = || -> Option<()> {
        ethernet(frame, flow, ETHERTYPE_IPV4)?;
        let about = [quote.inner_class, quote.key.protocol, quote.inner_ttl];
        let length = quote.payload.checked_add(LENGTH)?;
        put::<F, INNER>(frame, about, length, quote.id(), &[flow.destination, flow.source])?;
        let about = [quote.class, ICMP, quote.ttl.wrapping_sub(1)];
        let length = quote.length.checked_sub(BOTH)?;
        put::<F, NETWORK>(frame, about, length, U16::new(id), &[flow.source, flow.destination])
    };
    write().is_some()
}

/// Puts an IPv4 header at `AT`, by RFC 7915, 5.1: of a type of service, protocol and TTL.
#[inline(always)]
fn put<F: Frame, const AT: usize>(
    frame: &mut F,
    [tos, protocol, ttl]: [u8; 3],
    length: u16,
    id: U16,
    [source, destination]: &[Ip; 2],
) -> Option<()> {
    let small = length <= MAY_BE_FRAGMENTED;
    let mut header = Ipv4Header {
        version_ihl: 0x45,
        tos,
        total_length: U16::new(length),
        id: if small { id } else { U16::ZERO },
        fragment: U16::new(if small { 0 } else { DONT_FRAGMENT }),
        ttl,
        protocol,
        checksum: [0; 2],
        source: source.ipv4(),
        destination: destination.ipv4(),
    };
    header.checksum = finish(sum(header.as_bytes().first_chunk::<20>()?));
    frame.write_summed(AT, &header)
}

/// An error over IPv4 about a flow whose other side is IPv6 (RFC 7915, 4.2 and 4.3).
#[inline(never)]
fn to_icmp6<F: Frame, T: Tables>(frame: &mut F, tables: &T, quote: &Quote, flow: &Flow6) -> Verdict {
    let said = frame.read::<U32>(TRANSPORT + offset_of!(IcmpError, unused)).unwrap_or_default();
    let (near, far) = (known(tables.mtu(flow.interface)), known(tables.mtu(quote.interface)));
    #[allow(clippy::cast_possible_truncation, reason = "twenty")]
    let meaning = meaning6(quote, said.get(), near.min(far.saturating_add(DIFFERENCE as u32)));
    if meaning == NONE {
        return Verdict::of(Err(DropReason::IcmpUnsupported));
    }
    outcome(icmp6(frame, quote, flow, meaning))
}

#[inline(always)]
fn icmp6<F: Frame>(frame: &mut F, quote: &Quote, flow: &Flow6, meaning: u64) -> Option<()> {
    let before = sum4(frame);
    let change = changed(transport::<F, INNER_TRANSPORT>(frame, quote, flow))?;
    let stored = frame.read::<[u8; 2]>(TRANSPORT + offset_of!(IcmpError, checksum))?;
    let payload = payload6(quote)?;
    let inner = sum(&inner6(quote));
    // Both headers have the same two addresses; the first one's are in the pseudo header.
    let addresses = ip(flow.source) + ip(flow.destination);
    let (mut error, own) = error(meaning);
    let after = own + inner + 2 * addresses + word(payload.to_be_bytes()) + word([0, ICMPV6]);
    error.checksum = update(stored, change + u32::from(delta(without(before, stored), after)));
    frame.change_family(true)?;
    frame.move_payload(MOVED)?;
    frame.write_summed(TRANSPORT6, &error)?;
    headers6(frame, quote, flow).then_some(())
}

/// What an IPv6 header says of the length of an error that came over IPv4.
#[inline(always)]
fn payload6(quote: &Quote) -> Option<u16> {
    quote.length.checked_add(BOTH)?.checked_sub(LENGTH6)
}

/// The beginning of the header in such an error.
#[inline(always)]
fn inner6(quote: &Quote) -> [u8; 8] {
    start6(quote.inner_class, quote.payload, quote.key.protocol, quote.inner_ttl)
}

/// Writes the headers in front of an error over IPv6, and the one in it.
#[inline(never)]
fn headers6<F: Frame>(frame: &mut F, quote: &Quote, flow: &Flow6) -> bool {
    let mut write = || -> Option<()> {
        ethernet(frame, flow, ETHERTYPE_IPV6)?;
        let outer = start6(quote.class, payload6(quote)?, ICMPV6, quote.ttl.wrapping_sub(1));
        frame.write_summed(NETWORK, &outer)?;
        let addresses = NETWORK + offset_of!(Ipv6Header, source);
        frame.write_summed(addresses, &Addresses(flow.source, flow.destination))?;
        frame.write_summed(INNER6, &inner6(quote))?;
        let addresses = INNER6 + offset_of!(Ipv6Header, source);
        frame.write_summed(addresses, &Addresses(flow.destination, flow.source))
    };
    write().is_some()
}

/// The part of an IPv6 header before its addresses.
#[inline(always)]
fn start6(class: u8, payload: u16, next_header: u8, ttl: u8) -> [u8; 8] {
    let [a, b, c, d] = (6 << 28 | u32::from(class) << 20).to_be_bytes();
    let [e, f] = payload.to_be_bytes();
    [a, b, c, d, e, f, next_header, ttl]
}

#[inline(always)]
const fn known(mtu: u32) -> u32 {
    if mtu == 0 { 0xffff } else { mtu }
}

/// What an error means in the other family, in one register: the type and the code above the word behind the checksum; or that it has no
/// meaning there.
const NONE: u64 = 0;

#[inline(always)]
const fn means(kind: u8, code: u8, word: u32) -> u64 {
    (kind as u64) << 40 | (code as u64) << 32 | word as u64
}

/// What an ICMPv6 error means in ICMP (RFC 7915, 5.2), `said` being the word behind its checksum, and `most` the largest packet of IPv4
/// that fits into the next links of both sides.
#[inline(always)]
fn meaning(quote: &Quote, said: u32, most: u32) -> u64 {
    let unreachable = |code| means(DESTINATION_UNREACHABLE, code, 0);
    match (quote.kind, quote.code) {
        (DESTINATION_UNREACHABLE6, 0 | 2 | 3) => unreachable(1),
        (DESTINATION_UNREACHABLE6, 1) => unreachable(10),
        (DESTINATION_UNREACHABLE6, 4) => unreachable(3),
        (PACKET_TOO_BIG, _) => {
            #[allow(clippy::cast_possible_truncation, reason = "twenty")]
            let mtu = said.saturating_sub(DIFFERENCE as u32).min(most).max(LOWEST_MTU);
            means(DESTINATION_UNREACHABLE, FRAGMENTATION_NEEDED, mtu & 0xffff)
        }
        (TIME_EXCEEDED6, code) => means(TIME_EXCEEDED, code, 0),
        (PARAMETER_PROBLEM6, 0) => pointed(match said {
            0 => 0,
            1 => 1,
            4 | 5 => 2,
            6 => 9,
            7 => 8,
            8..=23 => 12,
            24..=39 => 16,
            _ => return NONE,
        }),
        (PARAMETER_PROBLEM6, 1) => unreachable(2),
        _ => NONE,
    }
}

/// A parameter problem whose pointer is this.
#[inline(always)]
const fn pointed(pointer: u32) -> u64 {
    means(PARAMETER_PROBLEM, 0, pointer << 24)
}

/// What an ICMP error means in ICMPv6 (RFC 7915, 4.2), likewise.
#[inline(always)]
fn meaning6(quote: &Quote, said: u32, most: u32) -> u64 {
    let unreachable = |code| means(DESTINATION_UNREACHABLE6, code, 0);
    let problem = |code, pointer| means(PARAMETER_PROBLEM6, code, pointer);
    match (quote.kind, quote.code) {
        (DESTINATION_UNREACHABLE, 0 | 1 | 5 | 6 | 7 | 8 | 11 | 12) => unreachable(0),
        #[allow(clippy::cast_possible_truncation, reason = "where the next header is")]
        (DESTINATION_UNREACHABLE, 2) => problem(1, offset_of!(Ipv6Header, next_header) as u32),
        (DESTINATION_UNREACHABLE, 3) => unreachable(4),
        (DESTINATION_UNREACHABLE, FRAGMENTATION_NEEDED) => {
            let said = match said & 0xffff {
                0 => plateau(quote.payload),
                said => said,
            };
            #[allow(clippy::cast_possible_truncation, reason = "twenty")]
            let mtu = (said + DIFFERENCE as u32).min(most).max(LOWEST_MTU6);
            means(PACKET_TOO_BIG, 0, mtu)
        }
        (DESTINATION_UNREACHABLE, 9 | 10 | 13 | 15) => unreachable(1),
        (TIME_EXCEEDED, code) => means(TIME_EXCEEDED6, code, 0),
        (PARAMETER_PROBLEM, 0 | 2) => problem(
            0,
            match said >> 24 {
                0 => 0,
                1 => 1,
                2 | 3 => 4,
                8 => 7,
                9 => 6,
                12..=15 => 8,
                16..=19 => 24,
                _ => return NONE,
            },
        ),
        _ => NONE,
    }
}

/// The MTU that is likely where a router has not said which (RFC 1191, 7.1): of a packet with such a payload.
#[inline(always)]
fn plateau(payload: u16) -> u32 {
    match u32::from(payload) + 20 {
        32001.. => 32000,
        17915..=32000 => 17914,
        8167..=17914 => 8166,
        4353..=8166 => 4352,
        2003..=4352 => 2002,
        1493..=2002 => 1492,
        _ => 0,
    }
}
