//! IPv6 packets that belong to no flow: neighbour discovery for our own addresses (RFC 4861) and echo are answered in place, the rest
//! that is for us is refused by name.

use super::fragment;
use super::parse::addresses;
use super::rules::{self, Way};
use crate::checksum::{delta, finish, fold, ip, sum, update, word};
use crate::frame::Frame;
use crate::tables::{ENDPOINT, Interface, Tables, VpcAddress};
use crate::verdict::{Answer, DropReason, Verdict};
use crate::wire::{
    ADVERTISEMENT, ALL_NODES, ECHO_REPLY6, ECHO_REQUEST6, Ethernet, HOPS, ICMPV6, Icmp, Ip, Ipv6, Ipv6Header,
    Mac, NEIGHBOUR_HOP_LIMIT, NETWORK, NeighbourMessage, NeighbourOption, OVERRIDE, SOLICITED,
    SOURCE_LINK_LAYER, TARGET_LINK_LAYER, TRANSPORT6, UNSPECIFIED, multicast_mac, solicited_node,
};
use core::mem::offset_of;
use zerocopy::{
    FromBytes, Immutable, IntoBytes,
    big_endian::{U16, U32},
};

/// How many bytes of options a solicitation may have, in units of eight: more than any host sends.
const OPTIONS: usize = 8;
const MESSAGE: usize = size_of::<NeighbourMessage>();
const UNIT: usize = size_of::<NeighbourOption>();
/// A whole advertisement with its option.
const ADVERTISED: usize = TRANSPORT6 + MESSAGE + UNIT;
/// Where a packet's source address is.
const SOURCE: usize = NETWORK + offset_of!(Ipv6Header, source);
/// Where its destination address is.
const DESTINATION: usize = NETWORK + offset_of!(Ipv6Header, destination);
/// Where the address is that a message is about.
const TARGET: usize = TRANSPORT6 + offset_of!(NeighbourMessage, target);

/// [`answer`]: an echo request that rules have still to allow.
const ECHO: Verdict = Verdict::answer(Answer::EchoReply as u32);

/// Decides about a packet that is neither TCP nor UDP nor neighbour discovery, as [`examine`] does, and answers an echo request.
///
/// Three functions, called one after the other, that are not inlined: the kernel bounds the stack of a chain of them.
#[inline(always)]
pub(super) fn answer<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    from: &Interface,
    fault: u32,
) -> Result<Verdict, DropReason> {
    let examined = examine(frame, tables, from, fault);
    if examined != ECHO {
        return examined.result();
    }
    if let Some(reason) = DropReason::from_code(forbidden(frame, tables, from)) {
        return Err(reason);
    }
    echo_reply(frame, tables, from).result()
}

/// Decides about a packet that is neither TCP nor UDP nor neighbour discovery; `fault` is the code of why it is refused if it is for us,
/// or 0. Not inlined, nor are those below: the kernel bounds the stack of a function.
#[inline(never)]
fn examine<F: Frame, T: Tables>(frame: &F, tables: &T, from: &Interface, fault: u32) -> Verdict {
    Verdict::of(decide(frame, tables, from, DropReason::from_code(fault)))
}

#[inline(always)]
fn decide<F: Frame, T: Tables>(
    frame: &F,
    tables: &T,
    from: &Interface,
    fault: Option<DropReason>,
) -> Result<Verdict, DropReason> {
    let destination = frame.read::<Ip>(DESTINATION).ok_or(DropReason::Malformed)?;
    let Some(address) = tables.address(&VpcAddress::new(from.vpc, destination)) else {
        return Ok(Verdict::PASS);
    };
    let source = frame.read::<Ip>(SOURCE).ok_or(DropReason::Malformed)?;
    let source = VpcAddress::new(from.vpc, source);
    if let Some(fault) = fault {
        return fragment::refuse(tables, &address, &source, fault);
    }
    if tables.address(&source).is_some() {
        return Err(DropReason::SpoofedSource);
    }
    let icmp = frame.read::<Icmp>(TRANSPORT6).ok_or(DropReason::Malformed)?;
    let length = frame.read::<U16>(NETWORK + offset_of!(Ipv6Header, payload_length)).unwrap_or_default();
    if usize::from(length.get()) < size_of::<Icmp>() {
        return Err(DropReason::Malformed);
    }
    let echo = icmp.kind == ECHO_REQUEST6 && icmp.code == 0;
    if !echo || address.kind != ENDPOINT || address.ping == 0 {
        return Err(DropReason::IcmpUnsupported);
    }
    if !tables.in_vpc(&source) {
        return Err(DropReason::SourceOutsideVpc);
    }
    if tables.endpoint(address.endpoint).open == 0 {
        return Err(DropReason::EndpointClosed);
    }
    Ok(ECHO)
}

/// The code of why rules do not let an echo request in, or its answer out; or 0.
#[inline(never)]
fn forbidden<F: Frame, T: Tables>(frame: &F, tables: &T, from: &Interface) -> u32 {
    let malformed = DropReason::Malformed.code();
    let Some(source) = frame.read::<Ip>(SOURCE) else { return malformed };
    let Some(destination) = frame.read::<Ip>(DESTINATION) else { return malformed };
    let address = tables.address(&VpcAddress::new(from.vpc, destination)).unwrap_or_default();
    let endpoint = tables.endpoint(address.endpoint);
    let way = Way { vpc: from.vpc, source, destination, protocol: ICMPV6, port: U16::ZERO };
    rules::answers(tables, &endpoint, &way).map_or_else(DropReason::code, |()| 0)
}

/// The reply, from the endpoint that was asked.
#[inline(never)]
fn echo_reply<F: Frame, T: Tables>(frame: &mut F, tables: &T, from: &Interface) -> Verdict {
    let mac = frame
        .read::<Ip>(DESTINATION)
        .and_then(|destination| tables.address(&VpcAddress::new(from.vpc, destination)))
        .map(|address| address.mac);
    match mac.and_then(|mac| reply(frame, mac)) {
        Some(()) => ECHO,
        None => Verdict::of(Err(DropReason::Malformed)),
    }
}

/// Swapping the addresses leaves the checksum as it is; the type's change is all that it sees.
#[inline(always)]
fn reply<F: Frame>(frame: &mut F, mac: Mac) -> Option<()> {
    let icmp = frame.read::<Icmp>(TRANSPORT6)?;
    let ethernet = frame.read::<Ethernet>(0)?;
    frame.write(0, &Ethernet { destination: ethernet.source, source: mac, ..ethernet })?;
    let (source, destination) = (frame.read::<Ip>(SOURCE)?, frame.read::<Ip>(DESTINATION)?);
    frame.write(SOURCE, &destination)?;
    frame.write(DESTINATION, &source)?;
    frame.write(NETWORK + offset_of!(Ipv6Header, hop_limit), &HOPS)?;
    let change = delta(word([ECHO_REQUEST6, 0]), word([ECHO_REPLY6, 0]));
    let checksum = update(icmp.checksum, change.into());
    frame.write(TRANSPORT6, &Icmp { kind: ECHO_REPLY6, code: 0, checksum })
}

/// Someone says where an address is: not one of ours, of which only we may say that. What is for the agent's questions goes on to it.
#[inline(never)]
pub(super) fn advertisement<F: Frame, T: Tables>(frame: &F, tables: &T, from: &Interface) -> Verdict {
    let Some(told) = frame.read::<Ip>(TARGET) else { return Verdict::PASS };
    let Some(source) = frame.read::<Ip>(SOURCE) else { return Verdict::PASS };
    let ours = |address: Ip| tables.address(&VpcAddress::new(from.vpc, address)).is_some();
    if !told.is_ipv4() && ours(told) || ours(source) {
        return Verdict::of(Err(DropReason::SpoofedSource));
    }
    Verdict::PASS
}

/// Answers a question for one of our addresses, also where it asks whether anybody has it (RFC 4862, 5.4): then it learns that.
#[inline(always)]
pub(super) fn solicitation<F: Frame, T: Tables>(frame: &mut F, tables: &T, from: &Interface) -> Verdict {
    match wanted(frame, tables, from) {
        NOBODY => Verdict::PASS,
        SPOOFED => Verdict::of(Err(DropReason::SpoofedSource)),
        mac => {
            let [a, b, c, d, e, f, ..] = mac.to_ne_bytes();
            advertise(frame, [a, b, c, d, e, f])
        }
    }
}

/// What [`wanted`] says where the address is none of ours, or where the sender claims one of them; no link-layer address is either.
const NOBODY: u64 = 0;
const SPOOFED: u64 = 1 << 48;

/// The link-layer address that a question is for, in one register.
#[inline(never)]
fn wanted<F: Frame, T: Tables>(frame: &F, tables: &T, from: &Interface) -> u64 {
    let Some(wanted) = frame.read::<Ip>(TARGET) else { return NOBODY };
    let Some(source) = frame.read::<Ip>(SOURCE) else { return NOBODY };
    if wanted.is_ipv4() {
        return NOBODY;
    }
    if tables.address(&VpcAddress::new(from.vpc, source)).is_some() {
        return SPOOFED;
    }
    let Some(address) = tables.address(&VpcAddress::new(from.vpc, wanted)) else { return NOBODY };
    let [a, b, c, d, e, f] = address.mac;
    u64::from_ne_bytes([a, b, c, d, e, f, 0, 1])
}

/// Turns a solicitation into the advertisement that says `mac`, if it is one by RFC 4861, 7.1.1.
#[inline(always)]
pub(super) fn advertise<F: Frame>(frame: &mut F, mac: Mac) -> Verdict {
    let fault = validate(frame);
    if fault != 0 {
        return Verdict::of(Err(DropReason::from_code(fault).unwrap_or(DropReason::Malformed)));
    }
    if !write(frame, mac) {
        return Verdict::of(Err(DropReason::Malformed));
    }
    Verdict::answer(Answer::NeighbourAdvertisement.code())
}

/// The code of what is wrong with a solicitation, or 0: its hop limit, code, target, addresses, options, lengths and checksum.
#[inline(never)]
fn validate<F: Frame>(frame: &F) -> u32 {
    let Some(Ipv6Start(_, payload, _, hop_limit)) = frame.read::<Ipv6Start>(NETWORK) else {
        return DropReason::Malformed.code();
    };
    let length = usize::from(payload.get());
    if hop_limit != NEIGHBOUR_HOP_LIMIT || length < MESSAGE || length % UNIT != 0 || !is_addressed(frame) {
        return DropReason::Malformed.code();
    }
    let units = (length - MESSAGE) / UNIT;
    if units > OPTIONS {
        return DropReason::IcmpUnsupported.code();
    }
    let sum = addresses::<F, NETWORK>(frame) + word(payload.to_bytes()) + word([0, ICMPV6]) + message(frame);
    match options(frame, units, is_probe(frame)) {
        BROKEN => DropReason::Malformed.code(),
        options if fold(sum + options) == 0xffff => 0,
        _ => DropReason::Malformed.code(),
    }
}

/// Whether a solicitation is about an address of one host, and, where it asks whether anybody has that, went to the group of it.
#[inline(never)]
fn is_addressed<F: Frame>(frame: &F) -> bool {
    let Some(target) = frame.read::<Ip>(TARGET) else { return false };
    let Some(code) = frame.read::<u8>(TRANSPORT6 + offset_of!(Icmp, code)) else { return false };
    if code != 0 || target.0[0] == 0xff {
        return false;
    }
    !is_probe(frame) || frame.read::<Ip>(DESTINATION).is_some_and(|destination| is_for(frame, destination))
}

/// Whether a solicitation asks whether anybody has an address.
#[inline(always)]
fn is_probe<F: Frame>(frame: &F) -> bool {
    frame.read::<Ip>(SOURCE) == Some(Ip(UNSPECIFIED))
}

/// The sum of a message's words, without its options; anything where it is not whole.
#[inline(never)]
fn message<F: Frame>(frame: &F) -> u32 {
    let start = frame.read::<[u8; 8]>(TRANSPORT6).map_or(0, |start| sum(&start));
    start + frame.read::<Ip>(TARGET).map_or(0, ip)
}

/// What [`options`] says of options that are none.
const BROKEN: u32 = u32::MAX;

/// The sum of so many units of options, each of which has a length, and ends where the next one begins; a probe has none that names its
/// sender.
#[inline(never)]
fn options<F: Frame>(frame: &F, units: usize, probe: bool) -> u32 {
    let (mut sum, mut next) = (0, 0);
    for unit in 0..OPTIONS {
        if unit == units {
            break;
        }
        let Some(option) = frame.read::<NeighbourOption>(TRANSPORT6 + MESSAGE + unit * UNIT) else {
            return BROKEN;
        };
        sum += words::<UNIT>(&option);
        if unit == next {
            if option.length == 0 || probe && option.kind == SOURCE_LINK_LAYER {
                return BROKEN;
            }
            next += usize::from(option.length);
        }
    }
    if next == units { sum } else { BROKEN }
}

/// Whether a solicitation went to the group that its target belongs to.
#[inline(never)]
fn is_for<F: Frame>(frame: &F, destination: Ip) -> bool {
    frame.read::<Ipv6>(TARGET).is_some_and(|target| destination == Ip(solicited_node(&target)))
}

/// Writes the advertisement over the solicitation. Says whether it could.
#[inline(never)]
fn write<F: Frame>(frame: &mut F, mac: Mac) -> bool {
    advertised(frame, mac).is_some()
}

/// The advertisement (RFC 4861, 7.2.4): to who asked, or to all where that has no address yet.
#[inline(always)]
fn advertised<F: Frame>(frame: &mut F, mac: Mac) -> Option<()> {
    let length = U16::new(32);
    let source = frame.read::<Ip>(SOURCE)?;
    let probe = source == Ip(UNSPECIFIED);
    let to = if probe { Ip(ALL_NODES) } else { source };
    let target = frame.read::<Ip>(TARGET)?;
    let flags = U32::new(if probe { OVERRIDE } else { SOLICITED | OVERRIDE });
    let option = NeighbourOption { kind: TARGET_LINK_LAYER, length: 1, mac };
    let kind = word([ADVERTISEMENT, 0]);
    let message = kind + words::<4>(&flags) + ip(target) + words::<UNIT>(&option);
    let checksum = finish(pseudo(target, to, length) + message);
    if frame.len() < ADVERTISED {
        frame.extend(ADVERTISED)?;
    } else {
        frame.truncate(ADVERTISED)?;
    }
    let icmp = Icmp { kind: ADVERTISEMENT, code: 0, checksum };
    frame.write(TRANSPORT6, &AdvertisementStart(icmp, flags))?;
    frame.write(TRANSPORT6 + MESSAGE, &option)?;
    frame.write(NETWORK, &Ipv6Start(U32::new(6 << 28), length, ICMPV6, NEIGHBOUR_HOP_LIMIT))?;
    frame.write(SOURCE, &target)?;
    frame.write(DESTINATION, &to)?;
    let ethernet = frame.read::<Ethernet>(0)?;
    let destination = if probe { multicast_mac(&ALL_NODES) } else { ethernet.source };
    frame.write(0, &Ethernet { destination, source: mac, ..ethernet })
}

/// The part of an advertisement before its target, which is the solicitation's.
#[derive(Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct AdvertisementStart(Icmp, U32);

/// The part of an IPv6 header before its addresses.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Ipv6Start(U32, U16, u8, u8);

/// The sum of an ICMPv6 message's pseudo header (RFC 8200, 8.1).
#[inline(always)]
fn pseudo(source: Ip, destination: Ip, length: U16) -> u32 {
    ip(source) + ip(destination) + word(length.to_bytes()) + word([0, ICMPV6])
}

#[inline(always)]
fn words<const N: usize>(header: &(impl IntoBytes + Immutable)) -> u32 {
    match header.as_bytes().first_chunk::<N>() {
        Some(bytes) => sum(bytes),
        None => 0,
    }
}
