//! Where targets are: ARP (RFC 826) and neighbour discovery (RFC 4861) on the provider's interfaces. Every message that is heard counts,
//! not only answers to ours, so a target that moves and says so is followed at once; one that says nothing is asked again every few
//! seconds.

use crate::sys;
use anyhow::{Context, Result};
use privatelink_common::checksum::{finish, sum};
use privatelink_common::wire::{
    ADVERTISEMENT, Arp, ETHERTYPE_ARP, ETHERTYPE_IPV6, Ethernet, ICMPV6, Ip, Ipv6, Ipv6Header, Mac,
    NEIGHBOUR_HOP_LIMIT, NETWORK, NeighbourMessage, NeighbourOption, SOLICITATION, SOURCE_LINK_LAYER,
    TARGET_LINK_LAYER, TRANSPORT6, UNSPECIFIED, multicast_mac, solicited_node,
};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use tokio::sync::mpsc;
use zerocopy::big_endian::{U16, U32};
use zerocopy::{FromBytes, IntoBytes};

/// Someone said where an address is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heard {
    /// The interface that the message came by.
    pub ifindex: u32,
    /// The address.
    pub address: Ip,
    /// Where it is.
    pub mac: Mac,
}

/// The agent's ears and voice.
#[derive(Clone, Debug)]
pub struct Neighbours {
    arp: Arc<OwnedFd>,
    discovery: Arc<OwnedFd>,
}

impl Neighbours {
    /// Opens the sockets, and reports to `heard` what they hear.
    pub fn new(heard: mpsc::Sender<Heard>) -> Result<Self> {
        let arp = Arc::new(sys::arp_socket().context("cannot listen for ARP")?);
        let discovery = Arc::new(sys::discovery_socket().context("cannot listen for neighbour discovery")?);
        listen(&arp, heard.clone(), parse_arp);
        listen(&discovery, heard, parse_discovery);
        Ok(Self { arp, discovery })
    }

    /// Asks on an interface where `target` is, on behalf of `sender`, which is of the same family.
    pub fn ask(&self, ifindex: u32, sender: Ip, sender_mac: Mac, target: Ip) -> Result<()> {
        if target.is_ipv4() {
            let frame = request(sender, sender_mac, target);
            return Ok(sys::send_frame(self.arp.as_fd(), ifindex, &frame)?);
        }
        let frame = solicitation(sender.0, sender_mac, target.0);
        Ok(sys::send_frame(self.discovery.as_fd(), ifindex, &frame)?)
    }
}

/// Hears what a socket hears, on a thread of its own.
fn listen(socket: &Arc<OwnedFd>, heard: mpsc::Sender<Heard>, parse: fn(&[u8]) -> Option<(Ip, Mac)>) {
    let listener = Arc::clone(socket);
    std::thread::spawn(move || {
        let mut frame = [0; 2048];
        while let Ok((length, ifindex)) = sys::receive_frame(listener.as_fd(), &mut frame) {
            let Some((address, mac)) = parse(&frame[..length]) else { continue };
            if heard.blocking_send(Heard { ifindex, address, mac }).is_err() {
                return;
            }
        }
    });
}

/// An ARP request.
fn request(sender: Ip, sender_mac: Mac, target: Ip) -> Vec<u8> {
    let ethernet =
        Ethernet { destination: [0xff; 6], source: sender_mac, ethertype: U16::new(ETHERTYPE_ARP) };
    let arp = Arp {
        hardware: U16::new(1),
        protocol: U16::new(0x0800),
        lengths: [6, 4],
        operation: U16::new(1),
        sender_mac,
        sender: sender.ipv4(),
        target_mac: [0; 6],
        target: target.ipv4(),
    };
    [ethernet.as_bytes(), arp.as_bytes()].concat()
}

/// A neighbour solicitation, to the group of whoever has the address.
fn solicitation(sender: Ipv6, sender_mac: Mac, target: Ipv6) -> Vec<u8> {
    let group = solicited_node(&target);
    let ethernet = Ethernet {
        destination: multicast_mac(&group),
        source: sender_mac,
        ethertype: U16::new(ETHERTYPE_IPV6),
    };
    let mut message =
        NeighbourMessage { kind: SOLICITATION, code: 0, checksum: [0; 2], flags: U32::ZERO, target };
    let option = NeighbourOption { kind: SOURCE_LINK_LAYER, length: 1, mac: sender_mac };
    let header = Ipv6Header {
        version_class_label: U32::new(6 << 28),
        payload_length: U16::new(32),
        next_header: ICMPV6,
        hop_limit: NEIGHBOUR_HOP_LIMIT,
        source: sender,
        destination: group,
    };
    message.checksum = finish(total(&header, &[message.as_bytes(), option.as_bytes()].concat()));
    [ethernet.as_bytes(), header.as_bytes(), message.as_bytes(), option.as_bytes()].concat()
}

/// The sum of an ICMPv6 message with its pseudo header (RFC 8200, 8.1).
fn total(header: &Ipv6Header, message: &[u8]) -> u32 {
    let words = message.chunks(2).map(|pair| sum(&[pair[0], pair.get(1).copied().unwrap_or(0)]));
    let pseudo = sum(&header.source) + sum(&header.destination) + sum(&[0, ICMPV6]);
    pseudo + sum(&header.payload_length.to_bytes()) + words.sum::<u32>()
}

/// What a message says of its sender, if it can be believed: a unicast address, and the same in both headers.
fn parse_arp(frame: &[u8]) -> Option<(Ip, Mac)> {
    let (ethernet, _) = Ethernet::read_from_prefix(frame).ok()?;
    let (arp, _) = Arp::read_from_prefix(frame.get(NETWORK..)?).ok()?;
    let shaped = arp.hardware.get() == 1 && arp.protocol.get() == 0x0800 && arp.lengths == [6, 4];
    let said = shaped && arp.sender != [0; 4] && is_host(arp.sender_mac) && arp.sender_mac == ethernet.source;
    said.then_some((Ip::from_ipv4(arp.sender), arp.sender_mac))
}

fn is_host(mac: Mac) -> bool {
    mac[0] & 1 == 0 && mac != [0; 6]
}

/// What an advertisement says of its target, or a solicitation of its sender, if it can be believed: valid (RFC 4861, 7.1), and the same
/// link-layer address in both headers.
fn parse_discovery(frame: &[u8]) -> Option<(Ip, Mac)> {
    let (ethernet, _) = Ethernet::read_from_prefix(frame).ok()?;
    let (header, _) = Ipv6Header::read_from_prefix(frame.get(NETWORK..)?).ok()?;
    let end = TRANSPORT6 + usize::from(header.payload_length.get());
    let bytes = frame.get(TRANSPORT6..end)?;
    let (message, options) = NeighbourMessage::read_from_prefix(bytes).ok()?;
    let valid = header.version_class_label.get() >> 28 == 6
        && header.next_header == ICMPV6
        && header.hop_limit == NEIGHBOUR_HOP_LIMIT
        && message.code == 0
        && message.target[0] != 0xff
        && finish(total(&header, bytes)) == [0; 2];
    let (address, kind) = match message.kind {
        ADVERTISEMENT => (message.target, TARGET_LINK_LAYER),
        SOLICITATION => (header.source, SOURCE_LINK_LAYER),
        _ => return None,
    };
    let mac = link_layer_address(options, kind)?;
    let said =
        valid && address != UNSPECIFIED && !Ip(address).is_ipv4() && is_host(mac) && mac == ethernet.source;
    said.then_some((Ip(address), mac))
}

/// The link-layer address among options, each of which has a length.
fn link_layer_address(mut options: &[u8], kind: u8) -> Option<Mac> {
    let mut found = None;
    while !options.is_empty() {
        let (option, _) = NeighbourOption::read_from_prefix(options).ok()?;
        options = options.get(usize::from(option.length) * 8..).filter(|_| option.length != 0)?;
        if option.kind == kind && option.length == 1 {
            found = Some(option.mac);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: Mac = [2, 0, 0, 0, 0, 5];
    const SENDER: Ipv6 = [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5];
    const TARGET: Ipv6 = [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x12, 0x34, 0x56];

    #[test]
    fn a_solicitation_goes_to_the_group_of_its_target_and_tells_of_its_sender() {
        let frame = solicitation(SENDER, HOST, TARGET);
        assert_eq!(frame[..6], [0x33, 0x33, 0xff, 0x12, 0x34, 0x56]);
        assert_eq!(parse_discovery(&frame), Some((Ip(SENDER), HOST)));
    }

    #[test]
    fn what_is_not_valid_is_not_believed() {
        let frame = solicitation(SENDER, HOST, TARGET);
        for at in 0..frame.len() {
            // The destination's link-layer address, the type (which the socket has chosen), the traffic class and the flow label.
            let says_nothing = at < 6 || (12..14).contains(&at) || (15..18).contains(&at);
            let mut other = frame.clone();
            other[at] ^= 0x40;
            assert!(says_nothing || parse_discovery(&other).is_none(), "byte {at}");
        }
        for length in 0..frame.len() {
            assert_eq!(parse_discovery(&frame[..length]), None, "{length} bytes");
        }
    }
}
