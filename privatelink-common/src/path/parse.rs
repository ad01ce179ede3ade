//! What kind of frame this is: the first stage. It reads, and decides nothing about whose the packet is.

use super::fragment;
use crate::checksum;
use crate::frame::Frame;
use crate::tables::{FlowKey, Interface, Key, Tables};
use crate::verdict::DropReason;
use crate::wire::{
    ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ethernet, FRAGMENT_OFFSET, ICMPV6, Ip, Ipv4Header,
    Ipv6Header, MORE_FRAGMENTS, Mac, NETWORK, SYN, TCP, TRANSPORT, Tcp, UDP, Udp,
};
use core::mem::offset_of;
use zerocopy::{FromBytes, big_endian::U16};

/// A frame, as far as its Ethernet header says.
#[derive(Clone, Copy, Debug)]
pub(super) enum Network {
    /// An IPv4 packet with at least 20 bytes of header: its addresses and its protocol; [`transport`] completes it.
    Ipv4(Packet<FlowKey>),
    /// An ARP message.
    Arp,
    /// IPv6, which is [`super::six`]'s.
    Ipv6,
    /// Anything else: VLAN tags, frames too short for the header that their type promises.
    Foreign,
}

/// An IPv4 packet, as far as the path knows them.
#[derive(Clone, Copy, Debug)]
pub(super) enum Transport {
    /// A TCP segment or UDP datagram whose headers are whole and agree with each other; or a fragment of a datagram, with the ports of
    /// the first.
    Flow,
    /// Any other, and why it is refused if it is for us, whatever else it is.
    Other(Option<DropReason>),
}

/// Both headers, which are behind each other, but for the first one's destination: without that, what follows is in words of 32 bits.
#[derive(Clone, Copy, FromBytes)]
#[repr(C)]
struct Headers {
    source: Mac,
    ethertype: U16,
    ip: Ipv4Header,
}

/// The first eight bytes of an IPv4 header: version and length, TOS, the packet's length, identification, fragment offset.
#[derive(Clone, Copy, FromBytes)]
#[repr(C)]
struct IpHead(u8, u8, U16, U16, U16);

/// A TCP segment or UDP datagram.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Packet<K> {
    /// Its flow's key in this direction.
    pub key: K,
    /// Who sent the frame.
    pub source_mac: Mac,
    /// Slot of the interface that it came by.
    pub interface: u16,
    /// TCP flags; zero for UDP.
    pub flags: u8,
    /// Time to live or hop limit, as it came.
    pub ttl: u8,
    /// Whether it is a fragment other than the first.
    pub later: bool,
    /// Whether to rewrite it is not all that there is to do: [`super::hop`].
    pub special: bool,
    /// Transport checksum as stored.
    pub checksum: [u8; 2],
    /// IPv4 checksum as stored; zero for IPv6.
    pub ip_checksum: [u8; 2],
}

/// DF is the sender's business; MF and the offset are what makes a fragment (RFC 791; RFC 3514 is a joke).
pub(super) const FRAGMENT: u16 = MORE_FRAGMENTS | FRAGMENT_OFFSET;

impl<K: Key> Packet<K> {
    /// Whether this is TCP.
    #[inline(always)]
    pub(super) fn is_tcp(&self) -> bool {
        self.key.protocol() == TCP
    }

    /// The same packet, as the other pair of tables knows it.
    #[inline(always)]
    pub(super) fn other(&self) -> Option<Packet<K::Other>> {
        let Self { source_mac, interface, flags, ttl, later, checksum, ip_checksum, .. } = *self;
        // It may become longer on its way to the other family.
        let (key, special) = (self.key.other()?, true);
        Some(Packet { key, source_mac, interface, flags, ttl, later, special, checksum, ip_checksum })
    }
}

/// Why an IPv6 packet whose header says this of what follows is refused, if it is for us. Extension headers are not walked: hosts have
/// no use for them towards a service, and what is behind them could be anywhere.
///
/// | next header | |
/// |---|---|
/// | 6 TCP, 17 UDP | flows |
/// | 58 ICMPv6 | echo, neighbour discovery |
/// | 44 fragment | of UDP: flows; else [`DropReason::Fragment`] |
/// | 0 hop-by-hop options, 43 routing, 60 destination options, 51 authentication, 135 mobility, 139 host identity, 140 shim6, 253 and 254 experiments (RFC 7045) | [`DropReason::ExtensionHeader`] |
/// | 50 encapsulated payload, 59 nothing, all others | [`DropReason::ProtocolUnsupported`] |
#[inline(always)]
pub(super) const fn fault(next_header: u8) -> Option<DropReason> {
    match next_header {
        ICMPV6 => None,
        44 => Some(DropReason::Fragment),
        0 | 43 | 60 | 51 | 135 | 139 | 140 | 253 | 254 => Some(DropReason::ExtensionHeader),
        _ => Some(DropReason::ProtocolUnsupported),
    }
}

/// The sum of both addresses of an IPv6 header at `AT`, for a checksum; anything where there is none. Not inlined: the kernel bounds a
/// function's stack.
#[inline(never)]
pub(super) fn addresses<F: Frame, const AT: usize>(frame: &F) -> u32 {
    let sum = |at| frame.read::<Ip>(at).map_or(0, checksum::ip);
    sum(AT + offset_of!(Ipv6Header, source)) + sum(AT + offset_of!(Ipv6Header, destination))
}

/// Whether a frame was sent to more than one host of its link, so that nothing in it may be answered.
#[inline(always)]
pub(super) fn is_for_many<F: Frame>(frame: &F) -> bool {
    frame.read::<u8>(offset_of!(Ethernet, destination)).is_some_and(|it| it & 1 != 0)
}

/// Whether a frame says that it is IPv6.
#[inline(always)]
pub(super) fn is_ipv6<F: Frame>(frame: &F) -> bool {
    frame.read::<Ethernet>(0).is_some_and(|it| it.ethertype.get() == ETHERTYPE_IPV6)
}

/// Reads the headers of a frame that came by `from` as far as the network's.
///
/// A packet is made of what is known of it, and not of zeros: to clear so many bytes is a call of a function in the kernel's programs.
#[inline(always)]
pub(super) fn network<F: Frame>(frame: &F, from: &Interface) -> Network {
    let Some(ethertype) = frame.read::<U16>(offset_of!(Ethernet, ethertype)) else { return Network::Foreign };
    match ethertype.get() {
        ETHERTYPE_IPV4 => {}
        ETHERTYPE_ARP => return Network::Arp,
        ETHERTYPE_IPV6 => return Network::Ipv6,
        _ => return Network::Foreign,
    }
    let headers = frame.read::<Headers>(offset_of!(Ethernet, source));
    let Some(Headers { source, ip, .. }) = headers else { return Network::Foreign };
    if ip.version_ihl >> 4 != 4 {
        return Network::Foreign;
    }
    Network::Ipv4(Packet {
        key: FlowKey {
            source: ip.source,
            destination: ip.destination,
            source_port: U16::ZERO,
            destination_port: U16::ZERO,
            vpc: from.vpc,
            protocol: ip.protocol,
            reserved: 0,
        },
        source_mac: source,
        interface: from.slot,
        flags: 0,
        ttl: ip.ttl,
        later: false,
        special: false,
        checksum: [0; 2],
        ip_checksum: ip.checksum,
    })
}

/// Reads the transport header of `packet`.
///
/// Into the caller's memory, and each field as soon as it is known: what is put together at the end waits on the stack, which the
/// kernel bounds.
#[inline(always)]
pub(super) fn transport<F: Frame, T: Tables>(
    frame: &F,
    tables: &T,
    from: &Interface,
    now: u32,
    packet: &mut Packet<FlowKey>,
) -> Transport {
    match ports(frame, tables, from, now, packet) {
        Ok(true) => Transport::Flow,
        Ok(false) => Transport::Other(None),
        Err(fault) => Transport::Other(Some(fault)),
    }
}

/// The same; says no where the protocol has no ports.
#[inline(always)]
fn ports<F: Frame, T: Tables>(
    frame: &F,
    tables: &T,
    from: &Interface,
    now: u32,
    packet: &mut Packet<FlowKey>,
) -> Result<bool, DropReason> {
    let IpHead(version_ihl, _, total_length, _, fragment) =
        frame.read::<IpHead>(NETWORK).ok_or(DropReason::Malformed)?;
    if version_ihl != 0x45 {
        return Err(if version_ihl > 0x45 { DropReason::IpOptions } else { DropReason::Malformed });
    }
    let (protocol, fragment) = (packet.key.protocol, fragment.get() & FRAGMENT);
    if fragment != 0 && protocol != UDP {
        return Err(DropReason::Fragment);
    }
    let total = frame.ip_length(total_length.get());
    if total < TRANSPORT - NETWORK || !frame.holds(NETWORK + total) {
        return Err(DropReason::Malformed);
    }
    packet.special = packet.ttl <= 1 || total_length.get() > from.fits || fragment != 0;
    packet.later = fragment & FRAGMENT_OFFSET != 0;
    let payload = total - (TRANSPORT - NETWORK);
    match protocol {
        TCP => {
            let tcp = frame.read::<Tcp>(TRANSPORT).ok_or(DropReason::Malformed)?;
            let header = usize::from(tcp.data_offset >> 4) * 4;
            if header < size_of::<Tcp>() || header > payload {
                return Err(DropReason::Malformed);
            }
            (packet.key.source_port, packet.key.destination_port) = (tcp.source_port, tcp.destination_port);
            (packet.flags, packet.checksum) = (tcp.flags, tcp.checksum);
            packet.special |= tcp.flags & SYN != 0;
        }
        UDP if fragment != 0 => {
            let udp = fragment::header(frame, tables, from.vpc, now).result()?;
            (packet.key.source_port, packet.key.destination_port) = (udp.source_port, udp.destination_port);
            packet.checksum = udp.checksum;
        }
        UDP => {
            let udp = frame.read::<Udp>(TRANSPORT).ok_or(DropReason::Malformed)?;
            let length = usize::from(udp.length.get());
            if length < size_of::<Udp>() || length > payload {
                return Err(DropReason::Malformed);
            }
            (packet.key.source_port, packet.key.destination_port) = (udp.source_port, udp.destination_port);
            packet.checksum = udp.checksum;
        }
        _ => return Ok(false),
    }
    Ok(true)
}
