//! What kind of frame this is: the first stage. It reads, and decides nothing about whose the packet is.

use crate::frame::Frame;
use crate::tables::{FlowKey, Interface};
use crate::verdict::DropReason;
use crate::wire::{
    ETHERTYPE_ARP, ETHERTYPE_IPV4, Ethernet, Ipv4, Ipv4Header, Mac, NETWORK, SYN, TCP, TRANSPORT, Tcp, UDP,
    Udp,
};

/// A frame, as far as the path knows frames.
#[derive(Clone, Copy, Debug)]
pub(super) enum Parsed {
    /// A TCP segment or UDP datagram whose headers are whole and agree with each other.
    Flow(Packet),
    /// Any other IPv4 packet with at least 20 bytes of header.
    Ip(Local),
    /// An ARP message.
    Arp,
    /// Anything else: VLAN tags, IPv6, frames too short for the header that their type promises.
    Foreign,
}

/// A TCP segment or UDP datagram.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packet {
    /// Its flow's key in this direction.
    pub key: FlowKey,
    /// Who sent the frame.
    pub source_mac: Mac,
    /// Slot of the interface that it came by.
    pub interface: u16,
    /// TCP flags; zero for UDP.
    pub flags: u8,
    /// Time to live, as it came.
    pub ttl: u8,
    /// Length of the IP packet.
    pub length: u16,
    /// Whether to rewrite it is not all that there is to do: [`super::hop`].
    pub special: bool,
    /// Whether this is TCP.
    pub is_tcp: bool,
    /// Transport checksum as stored.
    pub checksum: [u8; 2],
    /// IPv4 checksum as stored.
    pub ip_checksum: [u8; 2],
}

/// An IPv4 packet that belongs to no flow, whatever it is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Local {
    /// Source address.
    pub source: Ipv4,
    /// Destination address.
    pub destination: Ipv4,
    /// Who sent the frame.
    pub source_mac: Mac,
    /// IANA protocol number.
    pub protocol: u8,
    /// Why it is refused if it is for us, whatever else it is.
    pub fault: Option<DropReason>,
}

/// DF is the sender's business; the reserved bit, MF and the offset are what makes a fragment (RFC 791; RFC 3514 is a joke).
const FRAGMENT: u16 = 0x3fff;

/// Reads the headers of a frame that came by `from`.
#[inline(always)]
pub(super) fn parse<F: Frame>(frame: &F, from: &Interface) -> Parsed {
    let Some(ethernet) = frame.read::<Ethernet>(0) else { return Parsed::Foreign };
    match ethernet.ethertype.get() {
        ETHERTYPE_IPV4 => {}
        ETHERTYPE_ARP => return Parsed::Arp,
        _ => return Parsed::Foreign,
    }
    let Some(ip) = frame.read::<Ipv4Header>(NETWORK) else { return Parsed::Foreign };
    if ip.version_ihl >> 4 != 4 {
        return Parsed::Foreign;
    }
    match transport(frame, &ethernet, &ip, from) {
        Ok(Some(packet)) => Parsed::Flow(packet),
        Ok(None) => Parsed::Ip(local(&ethernet, &ip, None)),
        Err(fault) => Parsed::Ip(local(&ethernet, &ip, Some(fault))),
    }
}

#[inline(always)]
fn local(ethernet: &Ethernet, ip: &Ipv4Header, fault: Option<DropReason>) -> Local {
    Local {
        source: ip.source,
        destination: ip.destination,
        source_mac: ethernet.source,
        protocol: ip.protocol,
        fault,
    }
}

/// The transport header behind an IPv4 header; nothing where the protocol has no ports.
#[inline(always)]
fn transport<F: Frame>(
    frame: &F,
    ethernet: &Ethernet,
    ip: &Ipv4Header,
    from: &Interface,
) -> Result<Option<Packet>, DropReason> {
    if ip.version_ihl != 0x45 {
        return Err(if ip.version_ihl > 0x45 { DropReason::IpOptions } else { DropReason::Malformed });
    }
    if ip.fragment.get() & FRAGMENT != 0 {
        return Err(DropReason::Fragment);
    }
    let total = frame.ip_length(ip.total_length.get());
    if total < TRANSPORT - NETWORK || !frame.holds(NETWORK + total) {
        return Err(DropReason::Malformed);
    }
    let payload = total - (TRANSPORT - NETWORK);
    let (source_port, destination_port, flags, checksum) = match ip.protocol {
        TCP => {
            let tcp = frame.read::<Tcp>(TRANSPORT).ok_or(DropReason::Malformed)?;
            let header = usize::from(tcp.data_offset >> 4) * 4;
            if header < size_of::<Tcp>() || header > payload {
                return Err(DropReason::Malformed);
            }
            (tcp.source_port, tcp.destination_port, tcp.flags, tcp.checksum)
        }
        UDP => {
            let udp = frame.read::<Udp>(TRANSPORT).ok_or(DropReason::Malformed)?;
            let length = usize::from(udp.length.get());
            if length < size_of::<Udp>() || length > payload {
                return Err(DropReason::Malformed);
            }
            (udp.source_port, udp.destination_port, 0, udp.checksum)
        }
        _ => return Ok(None),
    };
    let key = FlowKey {
        source: ip.source,
        destination: ip.destination,
        source_port,
        destination_port,
        vpc: from.vpc,
        protocol: ip.protocol,
        reserved: 0,
    };
    let (source_mac, interface, ip_checksum) = (ethernet.source, from.slot, ip.checksum);
    let (is_tcp, ttl, length) = (ip.protocol == TCP, ip.ttl, ip.total_length.get());
    let special = flags & SYN != 0 || ttl <= 1 || length > from.fits;
    Ok(Some(Packet {
        key,
        source_mac,
        interface,
        flags,
        ttl,
        length,
        special,
        is_tcp,
        checksum,
        ip_checksum,
    }))
}
