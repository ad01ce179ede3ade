//! Packet headers as types: byte order and layout, no behaviour. Alignment is one, since nothing aligns them in a frame.

use core::mem::size_of;
use network_types::{
    arp::ArpHdr,
    eth::EthHdr,
    ip::{Ipv4Hdr, Ipv6Hdr},
    udp::UdpHdr,
};
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    big_endian::{U16, U32},
};

/// An IPv4 address in network byte order, as people read it.
pub type Ipv4 = [u8; 4];
/// An IPv6 address, likewise.
pub type Ipv6 = [u8; 16];
/// A link-layer address.
pub type Mac = [u8; 6];

/// An address of either family in network byte order: an IPv6 address, or an IPv4 address as the IPv6 address that is mapped to it,
/// `::ffff:a.b.c.d` (RFC 4291, 2.5.5.2). No packet has such an address: the path refuses it.
///
/// Aligned, so that it is compared and copied in two words.
#[derive(Clone, Copy, Debug, Default, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(8))]
pub struct Ip(pub Ipv6);

/// What an IPv4 address is mapped by, as the third of four words.
const MAPPED: u32 = u32::from_ne_bytes([0, 0, 0xff, 0xff]);

/// The TTL or hop limit of what the path sends of its own: what Linux sends with.
pub const HOPS: u8 = 64;

impl Ip {
    /// An IPv4 address.
    #[inline(always)]
    pub const fn from_ipv4(address: Ipv4) -> Self {
        Self::from_words([0, zerocopy::transmute!([MAPPED, u32::from_ne_bytes(address)])])
    }

    /// Two words in the machine's own byte order.
    #[inline(always)]
    pub const fn from_words(words: [u64; 2]) -> Self {
        zerocopy::transmute!(words)
    }

    /// The same words.
    #[inline(always)]
    pub const fn words(self) -> [u64; 2] {
        zerocopy::transmute!(self)
    }

    /// Whether this is an IPv4 address.
    #[inline(always)]
    pub const fn is_ipv4(self) -> bool {
        let [network, host] = self.words();
        let [mapped, _]: [u32; 2] = zerocopy::transmute!(host);
        network == 0 && mapped == MAPPED
    }

    /// Whether this may be one host's address on a link: neither the unspecified one, a loopback one nor one of many hosts (RFC 1122, 3.2.1.3;
    /// RFC 4291, 2.5.2, 2.5.3 and 2.7).
    #[inline(always)]
    pub const fn is_host(self) -> bool {
        let [network, host] = self.words();
        if self.is_ipv4() {
            let [first, ..] = self.ipv4();
            return !matches!(first, 0 | 127 | 224..);
        }
        let is_special = network == 0 && u64::from_be(host) <= 1;
        !is_special && network.to_ne_bytes()[0] != 0xff
    }

    /// The last four bytes: the whole of an IPv4 address.
    #[inline(always)]
    pub const fn ipv4(self) -> Ipv4 {
        let [_, host] = self.words();
        let [_, address]: [u32; 2] = zerocopy::transmute!(host);
        address.to_ne_bytes()
    }
}

impl PartialEq for Ip {
    #[inline(always)]
    fn eq(&self, other: &Self) -> bool {
        self.words() == other.words()
    }
}

impl Eq for Ip {}

impl core::hash::Hash for Ip {
    fn hash<H: core::hash::Hasher>(&self, state: &mut H) {
        self.words().hash(state);
    }
}

/// Where the network header starts in an untagged frame.
pub const NETWORK: usize = EthHdr::LEN;
/// Where the transport header starts behind an IPv4 header without options.
pub const TRANSPORT: usize = NETWORK + Ipv4Hdr::LEN;
/// Where the transport header starts behind an IPv6 header without extension headers.
pub const TRANSPORT6: usize = NETWORK + Ipv6Hdr::LEN;

/// EtherType of IPv4.
pub const ETHERTYPE_IPV4: u16 = 0x0800;
/// EtherType of IPv6.
pub const ETHERTYPE_IPV6: u16 = 0x86dd;
/// EtherType of ARP.
pub const ETHERTYPE_ARP: u16 = 0x0806;
/// EtherType of a VLAN tag (IEEE 802.1Q), which is a customer's where there are two.
pub const ETHERTYPE_VLAN: u16 = 0x8100;
/// EtherType of a service VLAN tag (IEEE 802.1ad).
pub const ETHERTYPE_SERVICE_VLAN: u16 = 0x88a8;
/// IANA protocol number of ICMP.
pub const ICMP: u8 = 1;
/// IANA protocol number of TCP.
pub const TCP: u8 = 6;
/// IANA protocol number of UDP.
pub const UDP: u8 = 17;
/// IANA protocol number of IPv6's fragment header.
pub const FRAGMENT6: u8 = 44;
/// IANA protocol number of ICMPv6.
pub const ICMPV6: u8 = 58;

macro_rules! header {
    ($(#[$meta:meta])* $name:ident, $size:expr, { $($(#[$field_meta:meta])* $field:ident: $type:ty,)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
        #[repr(C)]
        pub struct $name { $($(#[$field_meta])* pub $field: $type,)+ }
        const _: () = assert!(size_of::<$name>() == $size);
    };
}

header! {
    /// Ethernet II.
    Ethernet, EthHdr::LEN, {
        /// Destination address.
        destination: Mac,
        /// Source address.
        source: Mac,
        /// What follows.
        ethertype: U16,
    }
}

header! {
    /// ARP for IPv4 over Ethernet (RFC 826).
    Arp, ArpHdr::LEN, {
        /// 1: Ethernet.
        hardware: U16,
        /// 0x0800: IPv4.
        protocol: U16,
        /// 6 and 4, as one number.
        lengths: [u8; 2],
        /// 1: request, 2: reply.
        operation: U16,
        /// Sender's link-layer address.
        sender_mac: Mac,
        /// Sender's protocol address.
        sender: Ipv4,
        /// Wanted link-layer address.
        target_mac: Mac,
        /// Wanted protocol address.
        target: Ipv4,
    }
}

header! {
    /// IPv4 without options (RFC 791).
    Ipv4Header, Ipv4Hdr::LEN, {
        /// Version (4) and header length in words.
        version_ihl: u8,
        /// DSCP and ECN.
        tos: u8,
        /// Length of header and payload.
        total_length: U16,
        /// Identification.
        id: U16,
        /// Reserved, DF, MF and the fragment offset.
        fragment: U16,
        /// Time to live.
        ttl: u8,
        /// IANA protocol number.
        protocol: u8,
        /// Header checksum, as stored.
        checksum: [u8; 2],
        /// Source address.
        source: Ipv4,
        /// Destination address.
        destination: Ipv4,
    }
}

header! {
    /// IPv6 without extension headers (RFC 8200).
    Ipv6Header, Ipv6Hdr::LEN, {
        /// Version (6), traffic class and flow label.
        version_class_label: U32,
        /// Length of what follows this header.
        payload_length: U16,
        /// IANA protocol number of what follows.
        next_header: u8,
        /// Hop limit.
        hop_limit: u8,
        /// Source address.
        source: Ipv6,
        /// Destination address.
        destination: Ipv6,
    }
}

header! {
    /// The fragment header of IPv6 (RFC 8200, 4.5).
    FragmentHeader, 8, {
        /// What the first fragment begins with behind it.
        next_header: u8,
        /// Zero.
        reserved: u8,
        /// Offset in units of eight bytes, in the upper thirteen bits, and [`MORE_FRAGMENTS6`].
        fragment: U16,
        /// Identification.
        id: U32,
    }
}

header! {
    /// A neighbour solicitation or advertisement without options (RFC 4861, 4.3 and 4.4).
    NeighbourMessage, 24, {
        /// 135: solicitation, 136: advertisement.
        kind: u8,
        /// Zero.
        code: u8,
        /// Checksum, as stored.
        checksum: [u8; 2],
        /// Of an advertisement: [`SOLICITED`] and [`OVERRIDE`].
        flags: U32,
        /// The address that is asked for, or told of.
        target: Ipv6,
    }
}

header! {
    /// An option of neighbour discovery that holds a link-layer address, or as much of any other one (RFC 4861, 4.6).
    NeighbourOption, 8, {
        /// 1: of the sender, 2: of the target.
        kind: u8,
        /// Length in units of eight bytes.
        length: u8,
        /// The address.
        mac: Mac,
    }
}

header! {
    /// TCP without options (RFC 9293).
    Tcp, 20, {
        /// Source port.
        source_port: U16,
        /// Destination port.
        destination_port: U16,
        /// Sequence number.
        sequence: U32,
        /// Acknowledgement number.
        acknowledgement: U32,
        /// Header length in words, in the upper four bits.
        data_offset: u8,
        /// CWR ECE URG ACK PSH RST SYN FIN.
        flags: u8,
        /// Window.
        window: U16,
        /// Checksum, as stored.
        checksum: [u8; 2],
        /// Urgent pointer.
        urgent: U16,
    }
}

header! {
    /// UDP (RFC 768).
    Udp, UdpHdr::LEN, {
        /// Source port.
        source_port: U16,
        /// Destination port.
        destination_port: U16,
        /// Length of header and payload.
        length: U16,
        /// Checksum, as stored; zero: none was computed.
        checksum: [u8; 2],
    }
}

header! {
    /// An ICMP error (RFC 792), before what it holds of the packet that it is about.
    IcmpError, 8, {
        /// Type.
        kind: u8,
        /// Code.
        code: u8,
        /// Checksum, as stored.
        checksum: [u8; 2],
        /// Zero.
        unused: U16,
        /// Next-hop MTU of [`FRAGMENTATION_NEEDED`] (RFC 1191, section 4).
        mtu: U16,
    }
}

header! {
    /// The part of ICMP that every message has (RFC 792).
    Icmp, 4, {
        /// Type.
        kind: u8,
        /// Code.
        code: u8,
        /// Checksum, as stored.
        checksum: [u8; 2],
    }
}

/// ICMP type.
pub const DESTINATION_UNREACHABLE: u8 = 3;
/// ICMP type.
pub const TIME_EXCEEDED: u8 = 11;
/// ICMP type.
pub const PARAMETER_PROBLEM: u8 = 12;
/// Code of [`DESTINATION_UNREACHABLE`].
pub const FRAGMENTATION_NEEDED: u8 = 4;

/// ICMPv6 type (RFC 4443).
pub const DESTINATION_UNREACHABLE6: u8 = 1;
/// ICMPv6 type (RFC 4443).
pub const PACKET_TOO_BIG: u8 = 2;
/// ICMPv6 type (RFC 4443).
pub const TIME_EXCEEDED6: u8 = 3;
/// ICMPv6 type (RFC 4443).
pub const PARAMETER_PROBLEM6: u8 = 4;

/// In [`Ipv4Header::fragment`]: this is not the last fragment.
pub const MORE_FRAGMENTS: u16 = 0x2000;
/// In [`Ipv4Header::fragment`]: where in the whole it belongs, in units of eight bytes.
pub const FRAGMENT_OFFSET: u16 = 0x1fff;
/// In [`FragmentHeader::fragment`]: this is not the last fragment.
pub const MORE_FRAGMENTS6: u16 = 1;
/// In [`FragmentHeader::fragment`]: where in the whole it belongs, in bytes.
pub const FRAGMENT_OFFSET6: u16 = 0xfff8;
/// In [`Ipv4Header::fragment`]: the packet must not be fragmented.
pub const DONT_FRAGMENT: u16 = 0x4000;

/// TCP flag.
pub const FIN: u8 = 0x01;
/// TCP flag.
pub const SYN: u8 = 0x02;
/// TCP flag.
pub const RST: u8 = 0x04;
/// TCP flag.
pub const ACK: u8 = 0x10;

/// ICMPv6 type (RFC 4443).
pub const ECHO_REQUEST6: u8 = 128;
/// ICMPv6 type (RFC 4443).
pub const ECHO_REPLY6: u8 = 129;
/// ICMPv6 type (RFC 4861).
pub const SOLICITATION: u8 = 135;
/// ICMPv6 type (RFC 4861).
pub const ADVERTISEMENT: u8 = 136;
/// Flag of an advertisement: it answers a solicitation of its destination.
pub const SOLICITED: u32 = 1 << 30;
/// Flag of an advertisement: what it says replaces what is known.
pub const OVERRIDE: u32 = 1 << 29;
/// [`NeighbourOption::kind`]: the sender's link-layer address.
pub const SOURCE_LINK_LAYER: u8 = 1;
/// [`NeighbourOption::kind`]: the target's link-layer address.
pub const TARGET_LINK_LAYER: u8 = 2;
/// What every message of neighbour discovery has: it has passed no router.
pub const NEIGHBOUR_HOP_LIMIT: u8 = 255;
/// The unspecified address.
pub const UNSPECIFIED: Ipv6 = [0; 16];
/// All nodes of the link.
pub const ALL_NODES: Ipv6 = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];

/// The multicast address that an address is asked for by (RFC 4291, 2.7.1).
pub const fn solicited_node(address: &Ipv6) -> Ipv6 {
    let [.., a, b, c] = *address;
    [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, a, b, c]
}

/// The link-layer address of a multicast address (RFC 2464, 7).
#[inline(always)]
pub const fn multicast_mac(address: &Ipv6) -> Mac {
    let [.., a, b, c, d] = *address;
    [0x33, 0x33, a, b, c, d]
}
