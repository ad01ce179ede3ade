//! UDP datagrams in fragments (RFC 791, 3.2; RFC 8200, 4.5). The first fragment goes the way of any packet, and leaves behind which ports it had; later
//! ones, which have none, follow it. Those that come before it cannot be placed; they are held outside the path until it has come, and
//! then judged as if they came only now.
//!
//! No later fragment begins before byte 48 of its datagram, so none can change the ports that the first was admitted with (RFC 1858,
//! RFC 3128). All but the last must have the first one's size, which makes overlap a matter of a bit for each.

use super::parse::Packet;
use super::translate;
use crate::checksum::{Delta, delta, word};
use crate::frame::Frame;
use crate::limits::{FRAGMENT_TIMEOUT, SMALLEST_FRAGMENT};
use crate::tables::{Address, Datagram, FlowKey, FlowKey6, FragmentKey, Key, Tables, VpcAddress};
use crate::verdict::{DropReason, Verdict};
use crate::wire::{
    ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ethernet, FRAGMENT_OFFSET, FRAGMENT_OFFSET6, FRAGMENT6, FragmentHeader,
    Ip, Ipv4Header, Ipv6Header, MORE_FRAGMENTS, MORE_FRAGMENTS6, NETWORK, TCP, TRANSPORT, TRANSPORT6, UDP,
    Udp,
};
use core::mem::{offset_of, size_of};
use zerocopy::big_endian::{U16, U32};

/// Where the identifications are.
const ID: usize = NETWORK + offset_of!(Ipv4Header, id);
const ID6: usize = TRANSPORT6 + offset_of!(FragmentHeader, id);
/// Where the transport header begins behind a fragment header.
pub(super) const BEHIND: usize = TRANSPORT6 + size_of::<FragmentHeader>();

/// A fragment, in words that both families have.
#[derive(Clone, Copy, Debug)]
struct Piece {
    /// [`MORE_FRAGMENTS`] and the offset, as IPv4 has them.
    bits: u16,
    /// Its length.
    payload: u16,
    /// The longest that its datagram may be.
    most: u32,
}

/// How many bytes an IPv4 header has.
#[allow(clippy::cast_possible_truncation, reason = "twenty")]
const HEADER: u16 = size_of::<Ipv4Header>() as u16;
/// How many a fragment header has.
#[allow(clippy::cast_possible_truncation, reason = "eight")]
const HEADER6: u16 = size_of::<FragmentHeader>() as u16;

#[inline(always)]
fn key(ip: &Ipv4Header, vpc: u16) -> FragmentKey {
    FragmentKey {
        source: Ip::from_ipv4(ip.source),
        destination: Ip::from_ipv4(ip.destination),
        id: U32::new(ip.id.get().into()),
        vpc,
        protocol: ip.protocol,
        reserved: 0,
    }
}

/// The key of a fragment over IPv6, but for its VPC. Written where it is to be, since it is long.
#[inline(always)]
fn key6<F: Frame>(frame: &F, fragment: &FragmentHeader, key: &mut FragmentKey) -> Option<()> {
    key.source = frame.read(NETWORK + offset_of!(Ipv6Header, source))?;
    key.destination = frame.read(NETWORK + offset_of!(Ipv6Header, destination))?;
    (key.id, key.protocol, key.reserved) = (fragment.id, fragment.next_header, 0);
    Some(())
}

/// What a fragment header says, as IPv4 has it.
#[inline(always)]
pub(super) const fn bits(fragment: u16) -> u16 {
    let more = if fragment & MORE_FRAGMENTS6 == 0 { 0 } else { MORE_FRAGMENTS };
    more | (fragment & FRAGMENT_OFFSET6) >> 3
}

/// The other way round.
#[inline(always)]
pub(super) const fn bits6(fragment: u16) -> u16 {
    let more = if fragment & MORE_FRAGMENTS == 0 { 0 } else { MORE_FRAGMENTS6 };
    more | (fragment & FRAGMENT_OFFSET) << 3
}

/// What a fragment has of a UDP header.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ports {
    /// Source port.
    pub source_port: U16,
    /// Destination port.
    pub destination_port: U16,
    /// Checksum, as stored; of a later fragment, none.
    pub checksum: [u8; 2],
}

/// [`Ports`] or a reason in one register: a verdict that drops, or zero and three words.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header(u64);

impl Header {
    #[inline(always)]
    fn of(result: Result<Ports, DropReason>) -> Self {
        match result {
            Ok(ports) => {
                let [a, b] = ports.source_port.to_bytes();
                let [c, d] = ports.destination_port.to_bytes();
                let [e, f] = ports.checksum;
                Self(u64::from_le_bytes([0, 0, a, b, c, d, e, f]))
            }
            Err(reason) => Self(Verdict::of(Err(reason)).word()),
        }
    }

    /// What it says.
    #[inline(always)]
    pub(super) fn result(self) -> Result<Ports, DropReason> {
        Verdict::from_word(self.0 & 0xffff_ffff_0000_00ff).result()?;
        let [_, _, a, b, c, d, e, f] = self.0.to_le_bytes();
        let (source_port, destination_port) = (U16::from_bytes([a, b]), U16::from_bytes([c, d]));
        Ok(Ports { source_port, destination_port, checksum: [e, f] })
    }
}

/// The ports of a UDP fragment: its own, if it is the first, or those that the first left behind.
///
/// Not inlined, and in one register: the kernel bounds a function's stack.
#[inline(never)]
pub(super) fn header<F: Frame, T: Tables>(frame: &F, tables: &T, vpc: u16, now: u32) -> Header {
    Header::of(ports(frame, tables, vpc, now))
}

#[inline(always)]
fn ports<F: Frame, T: Tables>(frame: &F, tables: &T, vpc: u16, now: u32) -> Result<Ports, DropReason> {
    let ip = frame.read::<Ipv4Header>(NETWORK).ok_or(DropReason::Malformed)?;
    // No packet is longer than its length field can say.
    let payload = ip.total_length.get().wrapping_sub(HEADER);
    let piece = Piece { bits: ip.fragment.get(), payload, most: 0xffff - u32::from(HEADER) };
    place::<F, T, TRANSPORT>(frame, tables, &key(&ip, vpc), piece, now)
}

/// The same of a fragment over IPv6, whose packet's payload is so long; `key` has its VPC, and gets the rest.
#[inline(never)]
pub(super) fn header6<F: Frame, T: Tables>(
    frame: &F,
    tables: &T,
    key: &mut FragmentKey,
    payload: u16,
    now: u32,
) -> Header {
    Header::of(ports6(frame, tables, key, payload, now))
}

#[inline(always)]
fn ports6<F: Frame, T: Tables>(
    frame: &F,
    tables: &T,
    key: &mut FragmentKey,
    payload: u16,
    now: u32,
) -> Result<Ports, DropReason> {
    let fragment = frame.read::<FragmentHeader>(TRANSPORT6).ok_or(DropReason::Malformed)?;
    if fragment.next_header != UDP {
        return Err(DropReason::Fragment);
    }
    let payload = payload.checked_sub(HEADER6).ok_or(DropReason::Malformed)?;
    let piece = Piece { bits: bits(fragment.fragment.get()), payload, most: 0xffff };
    key6(frame, &fragment, key).ok_or(DropReason::Malformed)?;
    let ports = place::<F, T, BEHIND>(frame, tables, key, piece, now)?;
    // A datagram without a checksum is to be discarded (RFC 8200, 8.1).
    if piece.bits & FRAGMENT_OFFSET == 0 && ports.checksum == [0; 2] {
        return Err(DropReason::Malformed);
    }
    Ok(ports)
}

/// The ports of a fragment whose transport header, if it has one, is at `AT`.
#[inline(always)]
fn place<F: Frame, T: Tables, const AT: usize>(
    frame: &F,
    tables: &T,
    key: &FragmentKey,
    Piece { bits, payload, most }: Piece,
    now: u32,
) -> Result<Ports, DropReason> {
    let more = bits & MORE_FRAGMENTS != 0;
    let offset = (bits & FRAGMENT_OFFSET) << 3;
    // Offsets count eight bytes.
    if payload == 0 || more && payload % 8 != 0 || u32::from(offset) + u32::from(payload) > most {
        return Err(DropReason::Malformed);
    }
    if offset != 0 {
        return follow(tables, key, payload, offset, more, now);
    }
    if payload < SMALLEST_FRAGMENT {
        return Err(DropReason::FragmentTiny);
    }
    let udp = frame.read::<Udp>(AT).ok_or(DropReason::Malformed)?;
    if udp.length.get() <= payload {
        return Err(DropReason::Malformed);
    }
    let Udp { source_port, destination_port, checksum, .. } = udp;
    Ok(Ports { source_port, destination_port, checksum })
}

/// A datagram whose first fragment has come, and not too long ago.
#[inline(always)]
pub fn known<T: Tables>(tables: &T, key: &FragmentKey, now: u32) -> Option<Datagram> {
    tables.datagram(key).filter(|it| now.wrapping_sub(it.at) <= FRAGMENT_TIMEOUT)
}

/// The ports of a later fragment, which is noted as seen.
#[inline(always)]
fn follow<T: Tables>(
    tables: &T,
    key: &FragmentKey,
    payload: u16,
    offset: u16,
    more: bool,
    now: u32,
) -> Result<Ports, DropReason> {
    let mut datagram = known(tables, key, now).ok_or(DropReason::FragmentUnknown)?;
    let place = u32::from(offset.checked_div(datagram.size).unwrap_or(u16::MAX));
    let sized = payload == datagram.size || payload < datagram.size && !more;
    let bit = 1u64 << (place & 63);
    let fits = sized && place < 64 && offset.checked_rem(datagram.size) == Some(0);
    if !fits || datagram.seen & bit != 0 {
        return Err(DropReason::FragmentOverlap);
    }
    datagram.seen |= bit;
    tables.set_datagram(key, &datagram).map_err(|_| DropReason::FragmentTableFull)?;
    let (source_port, destination_port) = (datagram.source_port, datagram.destination_port);
    Ok(Ports { source_port, destination_port, checksum: [0; 2] })
}

/// What becomes of a packet from `source` to one of our addresses that is refused for `fault`, unless it is a later fragment whose first
/// may be still to come: from within the VPC, and to where fragments are forwarded at all.
#[inline(always)]
pub(super) fn refuse<T: Tables>(
    tables: &T,
    address: &Address,
    source: &VpcAddress,
    fault: DropReason,
) -> Result<Verdict, DropReason> {
    let is_early = fault == DropReason::FragmentUnknown && !address.is_resolver();
    if is_early && tables.address(source).is_none() && tables.in_vpc(source) {
        return Ok(Verdict::HOLD);
    }
    Err(fault)
}

/// The datagram that a frame from `vpc`, which was held, is a fragment of.
pub fn datagram<F: Frame>(frame: &F, vpc: u16) -> Option<FragmentKey> {
    match frame.read::<Ethernet>(0)?.ethertype.get() {
        ETHERTYPE_IPV4 => Some(key(&frame.read(NETWORK)?, vpc)),
        ETHERTYPE_IPV6 => {
            let mut of = FragmentKey { vpc, ..FragmentKey::default() };
            key6(frame, &frame.read(TRANSPORT6)?, &mut of)?;
            Some(of)
        }
        _ => None,
    }
}

/// Makes a fragment ready to leave: its datagram gets an identification of its own, since those of different senders become those of
/// one, and may be the same (RFC 6864, 5.3). Remembers a first one. Returns what that changes of the IPv4 checksum.
#[inline(always)]
pub(super) fn identify<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    packet: &Packet<FlowKey>,
    ip: &Ipv4Header,
    now: u32,
) -> Result<Delta, DropReason> {
    let key = key(ip, packet.key.vpc);
    let id = lower(identification(tables, packet, &key, ip.total_length.get().wrapping_sub(HEADER), now)?);
    frame.write(ID, &id).ok_or(DropReason::Malformed)?;
    Ok(delta(word(ip.id.to_bytes()), word(id.to_bytes())))
}

/// The same of a fragment that comes over IPv4 and is to leave over IPv6. Returns the code of a reason, or 0. Not inlined, nor is the next:
/// the kernel bounds a function's stack.
#[inline(never)]
pub(super) fn identify4<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    packet: &Packet<FlowKey6>,
    now: u32,
) -> u32 {
    let mut identify = || -> Result<(), DropReason> {
        // There would have to be one, and the datagram is not here as a whole (RFC 7915, 4.5): nothing of it goes on.
        if !packet.later && translate::is_unsummed(packet) {
            return Err(DropReason::UdpChecksumMissing);
        }
        let ip = frame.read::<Ipv4Header>(NETWORK).ok_or(DropReason::Malformed)?;
        let key = key(&ip, packet.key.vpc);
        let id = identification(tables, packet, &key, ip.total_length.get().wrapping_sub(HEADER), now)?;
        frame.write_summed(ID, &lower(id)).ok_or(DropReason::Malformed)
    };
    identify().map_or_else(DropReason::code, |()| 0)
}

/// The same of one that comes over IPv6, by the key that [`header6`] has left.
#[inline(never)]
pub(super) fn identify6<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    packet: &Packet<FlowKey6>,
    key: &FragmentKey,
    now: u32,
) -> u32 {
    let mut identify = || -> Result<(), DropReason> {
        let payload = frame.read::<U16>(NETWORK + offset_of!(Ipv6Header, payload_length)).unwrap_or_default();
        let id = identification(tables, packet, key, payload.get().wrapping_sub(HEADER6), now)?;
        frame.write_summed(ID6, &id).ok_or(DropReason::Malformed)
    };
    identify().map_or_else(DropReason::code, |()| 0)
}

/// The half of an identification that IPv4 has.
#[inline(always)]
pub(super) fn lower(id: U32) -> U16 {
    let [_, _, a, b] = id.to_bytes();
    U16::from_bytes([a, b])
}

/// The identification that a fragment's datagram leaves with; of a first one, whose length is `size`, a fresh one, which is remembered.
#[inline(always)]
fn identification<K: Key, T: Tables>(
    tables: &T,
    packet: &Packet<K>,
    key: &FragmentKey,
    size: u16,
    now: u32,
) -> Result<U32, DropReason> {
    if packet.later {
        return Ok(tables.datagram(key).ok_or(DropReason::FragmentUnknown)?.id);
    }
    let id = U32::new(tables.next_identification());
    let datagram = Datagram {
        source_port: packet.key.source_port(),
        destination_port: packet.key.destination_port(),
        id,
        seen: 1,
        at: now,
        size,
        reserved: 0,
    };
    tables.set_datagram(key, &datagram).map_err(|_| DropReason::FragmentTableFull)?;
    Ok(id)
}

/// Takes the fragment header out of a whole segment or datagram to one of our addresses that has one all the same (RFC 6946): from there
/// on, it is like any other. Neighbour discovery has none (RFC 6980). Not inlined, as above.
#[inline(never)]
pub(super) fn unwrap<F: Frame, T: Tables>(frame: &mut F, tables: &T, vpc: u16) {
    if frame.read::<u8>(NETWORK + offset_of!(Ipv6Header, next_header)) == Some(FRAGMENT6) {
        let _ = unwrapped(frame, tables, vpc);
    }
}

#[inline(always)]
fn unwrapped<F: Frame, T: Tables>(frame: &mut F, tables: &T, vpc: u16) -> Option<()> {
    let fragment = frame.read::<FragmentHeader>(TRANSPORT6)?;
    let whole = bits(fragment.fragment.get()) == 0 && matches!(fragment.next_header, TCP | UDP);
    let destination = frame.read::<Ip>(NETWORK + offset_of!(Ipv6Header, destination))?;
    if !whole || tables.address(&VpcAddress::new(vpc, destination)).is_none() {
        return None;
    }
    let (ethernet, ip) = (frame.read::<Ethernet>(0)?, frame.read::<Ipv6Header>(NETWORK)?);
    if ip.version_class_label.get() >> 28 != 6 {
        return None;
    }
    let payload_length = U16::new(ip.payload_length.get().checked_sub(HEADER6)?);
    frame.move_payload(-i32::from(HEADER6))?;
    frame.write(0, &ethernet)?;
    frame.write_summed(NETWORK, &Ipv6Header { payload_length, next_header: fragment.next_header, ..ip })
}
