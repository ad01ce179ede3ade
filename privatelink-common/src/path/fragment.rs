//! UDP datagrams in fragments (RFC 791, 3.2). The first fragment goes the way of any packet, and leaves behind which ports it had; later
//! ones, which have none, follow it. Those that come before it cannot be placed, and are dropped: nothing is held.
//!
//! No later fragment begins before byte 48 of its datagram, so none can change the ports that the first was admitted with (RFC 1858,
//! RFC 3128). All but the last must have the first one's size, which makes overlap a matter of a bit for each.

use super::parse::Packet;
use crate::checksum::{Delta, delta, word};
use crate::frame::Frame;
use crate::limits::{FRAGMENT_TIMEOUT, SMALLEST_FRAGMENT};
use crate::tables::{Datagram, FlowKey, FragmentKey, Tables};
use crate::verdict::{DropReason, Verdict};
use crate::wire::{FRAGMENT_OFFSET, Ipv4Header, MORE_FRAGMENTS, NETWORK, TRANSPORT, Udp};
use core::mem::{offset_of, size_of};
use zerocopy::big_endian::U16;

/// Length of an IPv4 header.
#[allow(clippy::cast_possible_truncation, reason = "20")]
const HEADER: u16 = size_of::<Ipv4Header>() as u16;

/// Where the identification is.
const ID: usize = NETWORK + offset_of!(Ipv4Header, id);

#[inline(always)]
fn key(ip: &Ipv4Header, vpc: u16) -> FragmentKey {
    let (source, destination) = (ip.source, ip.destination);
    FragmentKey { source, destination, id: ip.id, vpc, protocol: ip.protocol, reserved: [0; 3] }
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
    let payload = ip.total_length.get().wrapping_sub(HEADER);
    let (bits, more) = (ip.fragment.get(), ip.fragment.get() & MORE_FRAGMENTS != 0);
    let offset = (bits & FRAGMENT_OFFSET) << 3;
    // Offsets count eight bytes, and no packet is longer than its length field can say.
    let end = u32::from(offset) + u32::from(payload) + u32::from(HEADER);
    if payload == 0 || more && payload % 8 != 0 || end > 0xffff {
        return Err(DropReason::Malformed);
    }
    if offset != 0 {
        return follow(tables, &key(&ip, vpc), payload, offset, more, now);
    }
    if payload < SMALLEST_FRAGMENT {
        return Err(DropReason::FragmentTiny);
    }
    let udp = frame.read::<Udp>(TRANSPORT).ok_or(DropReason::Malformed)?;
    if udp.length.get() <= payload {
        return Err(DropReason::Malformed);
    }
    let Udp { source_port, destination_port, checksum, .. } = udp;
    Ok(Ports { source_port, destination_port, checksum })
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
    let fresh = |it: &Datagram| now.wrapping_sub(it.at) <= FRAGMENT_TIMEOUT;
    let mut datagram = tables.datagram(key).filter(fresh).ok_or(DropReason::FragmentUnknown)?;
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
    let id = if packet.later {
        tables.datagram(&key).ok_or(DropReason::FragmentUnknown)?.id
    } else {
        let id = U16::new(tables.next_identification());
        let datagram = Datagram {
            source_port: packet.key.source_port,
            destination_port: packet.key.destination_port,
            id,
            size: ip.total_length.get().wrapping_sub(HEADER),
            seen: 1,
            at: now,
            reserved: 0,
        };
        tables.set_datagram(&key, &datagram).map_err(|_| DropReason::FragmentTableFull)?;
        id
    };
    frame.write(ID, &id).ok_or(DropReason::Malformed)?;
    Ok(delta(word(key.id.to_bytes()), word(id.to_bytes())))
}
