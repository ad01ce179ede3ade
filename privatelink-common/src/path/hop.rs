//! What the path does to a packet as a router on its way: it counts the hop, refuses what is too large, and lowers the MSS.

use super::parse::{FRAGMENT, Packet};
use super::report::{Report, report};
use super::{fragment, proxy};
use crate::checksum::{Delta, delta, word};
use crate::frame::{DIFFERENCE, Frame};
use crate::limits::{ICMP_ERRORS, LOWEST_MSS, TCP_OPTIONS};
use crate::tables::{Bucket, Endpoint, Flow, Flow6, FlowKey, FlowKey6, Key, Tables};
use crate::verdict::{DropReason, Verdict};
use crate::wire::{
    FRAGMENT6, FragmentHeader, Ipv4Header, Ipv6Header, NETWORK, SYN, TRANSPORT, TRANSPORT6, Tcp,
};
use core::mem::offset_of;
use zerocopy::big_endian::U16;

/// TCP options (RFC 9293, 3.1).
const END: u8 = 0;
const NOTHING: u8 = 1;
const MAXIMUM_SEGMENT_SIZE: u8 = 2;

/// Bytes of IPv4 and TCP headers, which an MSS does not count (RFC 6691).
const HEADERS: u32 = 40;
/// Bytes of IPv6 and TCP headers, likewise.
const HEADERS6: u32 = 60;
/// What every link of IPv6 carries (RFC 8200, 5).
const LOWEST_MTU6: u32 = 1280;
/// Bytes of an IPv6 header.
const LENGTH6: u16 = 40;
/// What a packet becomes longer by between the families, and a fragment.
#[allow(clippy::cast_possible_truncation, reason = "twenty")]
const LONGER: u32 = DIFFERENCE as u32;
#[allow(clippy::cast_possible_truncation, reason = "eight more")]
const LONGER_PIECE: u32 = LONGER + size_of::<FragmentHeader>() as u32;

/// What changes of a packet's checksums beside what its flow says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Correction {
    /// Of the transport header's.
    pub transport: Delta,
    /// Of the IPv4 header's.
    pub network: Delta,
}

/// Whether a packet goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Passage {
    /// It does, and what was changed of it changes its checksums so.
    Onward(Correction),
    /// It does not.
    Ends(Verdict),
    /// It does, as a fragment.
    Piece,
    /// It does not, and its sender is to be told: it is larger than this, or, where this is 0, its hop limit has ended.
    Report(u16),
}

/// A [`Passage`] in one register: a verdict, whose lowest byte is below the three that begin the others.
#[derive(Clone, Copy, Debug)]
pub(super) struct Toll(u64);

impl Toll {
    const ONWARD: u64 = 0xff;
    const REPORT: u64 = 0xfe;
    const PIECE: u64 = 0xfd;

    #[inline(always)]
    const fn onward(correction: Correction) -> Self {
        Self(Self::ONWARD | (correction.transport as u64) << 32 | (correction.network as u64) << 48)
    }

    #[inline(always)]
    fn report(mtu: u32) -> Self {
        Self(Self::REPORT | u64::from(mtu) << 32)
    }

    #[inline(always)]
    fn ends(result: Result<Verdict, DropReason>) -> Self {
        Self(Verdict::of(result).word())
    }

    /// What it says.
    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "cut out at its own width")]
    pub(super) const fn passage(self) -> Passage {
        match self.0 & 0xff {
            Self::ONWARD => {
                let (transport, network) = ((self.0 >> 32) as Delta, (self.0 >> 48) as Delta);
                Passage::Onward(Correction { transport, network })
            }
            Self::REPORT => Passage::Report((self.0 >> 32) as u16),
            Self::PIECE => Passage::Piece,
            _ => Passage::Ends(Verdict::from_word(self.0)),
        }
    }
}

/// Decides whether a packet may go on as its flow says, and makes a SYN ready for the way.
///
/// Not inlined, and in one register: the kernel bounds a function's stack.
#[inline(never)]
pub(super) fn pass<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    packet: &Packet<FlowKey>,
    flow: &Flow,
    now: u32,
) -> Toll {
    let endpoint = u32::from(flow.endpoint);
    let Some(ip) = frame.read::<Ipv4Header>(NETWORK) else {
        return Toll::ends(Err(DropReason::Malformed));
    };
    if packet.ttl <= 1 {
        return Toll::ends(expired(frame, tables, packet, endpoint, now).result());
    }
    let gate = tables.endpoint(endpoint);
    let mut mtu = known(gate.mtu.into()).min(known(tables.mtu(flow.interface)));
    let length = ip.total_length.get();
    if proxy::is_due(packet, flow) {
        if ip.fragment.get() & FRAGMENT != 0 || frame.largest(length) < length.into() {
            return Toll::ends(Err(DropReason::NoHeaderRoom));
        }
        mtu = mtu.saturating_sub(proxy::LENGTH.into());
    }
    if frame.largest(length) > mtu {
        return Toll::ends(too_big(frame, tables, packet, endpoint, mtu, now));
    }
    if ip.fragment.get() & FRAGMENT != 0 {
        return match fragment::identify(frame, tables, packet, &ip, now) {
            Ok(network) => Toll::onward(Correction { network, transport: 0 }),
            Err(reason) => Toll::ends(Err(reason)),
        };
    }
    if packet.flags & SYN == 0 {
        return Toll::onward(Correction::default());
    }
    let mtu = mtu.min(known(tables.mtu(packet.interface)));
    let transport = clamp::<F, TRANSPORT>(frame, mtu.saturating_sub(HEADERS));
    #[allow(clippy::cast_possible_truncation, reason = "a delta")]
    Toll::onward(Correction { transport: transport as Delta, network: 0 })
}

/// The same for a packet of a wide flow, of which one side has the longer headers at least. Its length changes where its family does.
/// What is to be reported of it is the caller's to say.
#[inline(never)]
pub(super) fn pass6<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    packet: &Packet<FlowKey6>,
    flow: &Flow6,
    now: u32,
) -> Toll {
    if packet.ttl <= 1 {
        // Nothing is said of later fragments (RFC 1122, 3.2.2).
        return match packet.later {
            true => Toll::ends(Err(DropReason::TtlExpired)),
            false => expired6(tables, flow.endpoint.into(), now),
        };
    }
    let gate = tables.endpoint(flow.endpoint.into());
    let mut mtu = known(gate.mtu.into()).min(known(tables.mtu(flow.interface)));
    let from_ipv4 = packet.key.is_ipv4();
    let (length, fragment) = shape(frame, packet);
    let is_piece = fragment & FRAGMENT != 0;
    if proxy::is_due(packet, flow) {
        if is_piece || frame.largest(length) < length.into() {
            return Toll::ends(Err(DropReason::NoHeaderRoom));
        }
        mtu = mtu.saturating_sub(proxy::LENGTH.into());
    }
    // What the sender may send.
    let longer = if is_piece { LONGER_PIECE } else { LONGER };
    let fits = match (from_ipv4, flow.source.is_ipv4()) {
        (true, false) => mtu.saturating_sub(longer),
        (false, true) => mtu.saturating_add(longer),
        _ => mtu,
    };
    if frame.largest(length) > fits {
        if packet.later || !may_report(tables, flow.endpoint.into(), &gate, now) {
            return Toll::ends(Err(DropReason::TooBig));
        }
        // What a sender of datagrams is told becomes the size of its fragments, which will have a header more.
        let is_cut = from_ipv4 && !flow.source.is_ipv4() && !packet.is_tcp();
        let told = if is_cut { mtu.saturating_sub(LONGER_PIECE) } else { fits };
        return Toll::report(if from_ipv4 { told } else { told.max(LOWEST_MTU6) });
    }
    if is_piece {
        return Toll(Toll::PIECE);
    }
    if packet.flags & SYN == 0 {
        return Toll::onward(Correction::default());
    }
    let mtu = mtu.min(known(tables.mtu(packet.interface)));
    let most = mtu.saturating_sub(HEADERS6);
    let transport =
        if from_ipv4 { clamp::<F, TRANSPORT>(frame, most) } else { clamp::<F, TRANSPORT6>(frame, most) };
    #[allow(clippy::cast_possible_truncation, reason = "a delta")]
    Toll::onward(Correction { transport: transport as Delta, network: 0 })
}

/// Length of the packet, and its bits about fragments, as IPv4 has them.
#[inline(always)]
fn shape<F: Frame>(frame: &F, packet: &Packet<FlowKey6>) -> (u16, u16) {
    if packet.key.is_ipv4() {
        let ip = frame.read::<Ipv4Header>(NETWORK);
        return ip.map_or((0, FRAGMENT), |ip| (ip.total_length.get(), ip.fragment.get()));
    }
    let payload = frame.read::<U16>(NETWORK + offset_of!(Ipv6Header, payload_length)).unwrap_or_default();
    let next = frame.read::<u8>(NETWORK + offset_of!(Ipv6Header, next_header));
    let fragment = match frame.read::<U16>(TRANSPORT6 + offset_of!(FragmentHeader, fragment)) {
        Some(it) if next == Some(FRAGMENT6) => fragment::bits(it.get()),
        _ => 0,
    };
    (payload.get().saturating_add(LENGTH6), fragment)
}

/// The hop limit of a packet of a wide flow ends here. Not inlined, as above.
#[inline(never)]
pub(super) fn expired6<T: Tables>(tables: &T, endpoint: u32, now: u32) -> Toll {
    if may_report(tables, endpoint, &tables.endpoint(endpoint), now) {
        return Toll::report(0);
    }
    Toll::ends(Err(DropReason::TtlExpired))
}

#[inline(always)]
const fn known(mtu: u32) -> u32 {
    if mtu == 0 { u32::MAX } else { mtu }
}

/// The TTL ends here (RFC 1812, 5.3.1): for the sender, this is the endpoint's hop, or the load balancer's.
#[inline(never)]
pub(super) fn expired<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    packet: &Packet<FlowKey>,
    endpoint: u32,
    now: u32,
) -> Verdict {
    // Nothing is said of later fragments (RFC 1122, 3.2.2).
    if packet.later || !may_report(tables, endpoint, &tables.endpoint(endpoint), now) {
        return Verdict::of(Err(DropReason::TtlExpired));
    }
    report(frame, packet, Report::TIME_EXCEEDED)
}

/// The packet does not fit where it has to go next (RFC 1191, section 4). One that may be fragmented is not: its sender is to know, too, and
/// sends fragments that fit from then on.
#[inline(always)]
fn too_big<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    packet: &Packet<FlowKey>,
    endpoint: u32,
    mtu: u32,
    now: u32,
) -> Result<Verdict, DropReason> {
    if packet.later || !may_report(tables, endpoint, &tables.endpoint(endpoint), now) {
        return Err(DropReason::TooBig);
    }
    #[allow(clippy::cast_possible_truncation, reason = "smaller than a packet")]
    let mtu = mtu as u16;
    report(frame, packet, Report::fragmentation_needed(mtu)).result()
}

/// Whether the endpoint may send one more ICMP error this second; counts it if so.
#[inline(always)]
fn may_report<T: Tables>(tables: &T, id: u32, endpoint: &Endpoint, now: u32) -> bool {
    let Some(bucket) = tables.bucket(id).filter(|_| endpoint.errors != 0) else { return false };
    let sent = if bucket.errors_at == now { bucket.errors } else { 0 };
    if sent >= ICMP_ERRORS {
        return false;
    }
    tables.set_bucket(id, Bucket { errors_at: now, errors: sent + 1, ..bucket });
    true
}

/// Lowers the MSS that a SYN announces to `most`, and returns what that changes of the TCP checksum. A SYN without the option gets
/// none: its sender is sent 536 bytes at most (RFC 9293, 3.7.1). The TCP header is at `AT`.
///
/// Not inlined, as above; a register's worth, since a narrower result would have to be widened by the caller.
#[inline(never)]
fn clamp<F: Frame, const AT: usize>(frame: &mut F, most: u32) -> u64 {
    let Some((at, announced)) = find::<F, AT>(frame) else { return 0 };
    #[allow(clippy::cast_possible_truncation, reason = "not above what 16 bits hold")]
    let most = (most.min(0xffff) as u16).max(LOWEST_MSS);
    if u16::from_be_bytes(announced) <= most || frame.write(AT + at, &most.to_be_bytes()).is_none() {
        return 0;
    }
    // At an odd place, the two bytes belong to two words of the sum, the other way round.
    let sum = |[a, b]: [u8; 2]| if at % 2 == 0 { word([a, b]) } else { word([b, a]) };
    delta(sum(announced), sum(most.to_be_bytes())).into()
}

/// Where in the TCP header the MSS is, and which.
#[inline(always)]
fn find<F: Frame, const AT: usize>(frame: &F) -> Option<(usize, [u8; 2])> {
    let offset = frame.read::<u8>(AT + offset_of!(Tcp, data_offset))?;
    let header = usize::from(offset >> 4) * 4;
    let mut at = size_of::<Tcp>();
    for _ in 0..TCP_OPTIONS {
        if at + 4 > header {
            return None;
        }
        let [kind, length, a, b] = frame.read::<[u8; 4]>(AT + at)?;
        let skip = match kind {
            END => return None,
            NOTHING => 1,
            MAXIMUM_SEGMENT_SIZE if length == 4 => return Some((at + 2, [a, b])),
            _ if length < 2 => return None,
            _ => usize::from(length),
        };
        if at + skip > header {
            return None;
        }
        // No header is longer than 60 bytes. The mask makes every way to get here look the same to the kernel's verifier.
        at = (at + skip) & 63;
    }
    None
}
