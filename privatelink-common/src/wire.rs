//! Packet headers as types: byte order and layout, no behaviour. Alignment is one, since nothing aligns them in a frame.

use core::mem::size_of;
use network_types::{arp::ArpHdr, eth::EthHdr, ip::Ipv4Hdr, udp::UdpHdr};
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    big_endian::{U16, U32},
};

/// An IPv4 address in network byte order, as people read it.
pub type Ipv4 = [u8; 4];
/// A link-layer address.
pub type Mac = [u8; 6];

/// Where the network header starts in an untagged frame.
pub const NETWORK: usize = EthHdr::LEN;
/// Where the transport header starts behind an IPv4 header without options.
pub const TRANSPORT: usize = NETWORK + Ipv4Hdr::LEN;

/// EtherType of IPv4.
pub const ETHERTYPE_IPV4: u16 = 0x0800;
/// EtherType of ARP.
pub const ETHERTYPE_ARP: u16 = 0x0806;
/// IANA protocol number of ICMP.
pub const ICMP: u8 = 1;
/// IANA protocol number of TCP.
pub const TCP: u8 = 6;
/// IANA protocol number of UDP.
pub const UDP: u8 = 17;

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

/// In [`Ipv4Header::fragment`]: this is not the last fragment.
pub const MORE_FRAGMENTS: u16 = 0x2000;
/// In [`Ipv4Header::fragment`]: where in the whole it belongs, in units of eight bytes.
pub const FRAGMENT_OFFSET: u16 = 0x1fff;
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
