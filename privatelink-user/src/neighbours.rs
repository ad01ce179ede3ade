//! Where targets are: ARP (RFC 826) and neighbour discovery (RFC 4861) on the provider's interfaces. Every message that is heard counts,
//! not only answers to ours, so a target that moves and says so is followed at once; one that says nothing is asked again every few
//! seconds.

use crate::sys;
use anyhow::Result;
use log::warn;
use privatelink_common::checksum::{finish, sum};
use privatelink_common::tables::{Tag, VlanKey};
use privatelink_common::wire::{
    ADVERTISEMENT, Arp, ETHERTYPE_ARP, ETHERTYPE_IPV6, ETHERTYPE_SERVICE_VLAN, ETHERTYPE_VLAN, Ethernet,
    ICMPV6, Ip, Ipv6, Ipv6Header, Mac, NEIGHBOUR_HOP_LIMIT, NETWORK, NeighbourMessage, NeighbourOption,
    SOLICITATION, SOURCE_LINK_LAYER, TARGET_LINK_LAYER, TRANSPORT6, UNSPECIFIED, multicast_mac,
    solicited_node,
};
use socket2::{Domain, Protocol, SockFilter, Socket, Type};
use std::collections::{BTreeMap, BTreeSet};
use std::mem::offset_of;
use std::os::fd::AsFd;
use std::sync::Arc;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use zerocopy::big_endian::{U16, U32};
use zerocopy::{FromBytes, IntoBytes};

/// Someone said where an address is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heard {
    /// What the message came by: the interface, and the tags if it had some.
    pub by: VlanKey,
    /// The address.
    pub address: Ip,
    /// Where it is.
    pub mac: Mac,
}

/// A classic filter (packet(7)): ARP and neighbour discovery, but for what this host sends. Neighbour discovery is IPv6 that has passed
/// no router, ICMPv6, type 135 or 136. The kernel keeps the outer tag of a frame beside it; where there are two, the inner one is
/// before the EtherType.
fn filter() -> [SockFilter; 18] {
    const LOAD_BYTE: u16 = 0x30;
    const LOAD_HALF: u16 = 0x28;
    // From so many bytes behind X.
    const LOAD_BYTE_BEHIND: u16 = 0x50;
    const LOAD_HALF_BEHIND: u16 = 0x48;
    const SET_X: u16 = 0x01;
    const JUMP_IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    // SKF_AD_OFF + SKF_AD_PKTTYPE: what stands there is PACKET_OUTGOING, 4, for what leaves.
    const PACKET_TYPE: u32 = 0xffff_f000 + 4;
    [
        SockFilter::new(LOAD_BYTE, 0, 0, PACKET_TYPE),
        SockFilter::new(JUMP_IF_EQUAL, 15, 0, 4),
        SockFilter::new(SET_X, 0, 0, 0),
        SockFilter::new(LOAD_HALF, 0, 0, 12),
        SockFilter::new(JUMP_IF_EQUAL, 0, 1, ETHERTYPE_VLAN.into()),
        SockFilter::new(SET_X, 0, 0, 4),
        SockFilter::new(LOAD_HALF_BEHIND, 0, 0, 12),
        SockFilter::new(JUMP_IF_EQUAL, 8, 0, ETHERTYPE_ARP.into()),
        SockFilter::new(JUMP_IF_EQUAL, 0, 8, ETHERTYPE_IPV6.into()),
        SockFilter::new(LOAD_BYTE_BEHIND, 0, 0, 20),
        SockFilter::new(JUMP_IF_EQUAL, 0, 6, ICMPV6.into()),
        SockFilter::new(LOAD_BYTE_BEHIND, 0, 0, 21),
        SockFilter::new(JUMP_IF_EQUAL, 0, 4, NEIGHBOUR_HOP_LIMIT.into()),
        SockFilter::new(LOAD_BYTE_BEHIND, 0, 0, 54),
        SockFilter::new(JUMP_IF_EQUAL, 1, 0, SOLICITATION.into()),
        SockFilter::new(JUMP_IF_EQUAL, 0, 1, ADVERTISEMENT.into()),
        SockFilter::new(RETURN, 0, 0, 2048),
        SockFilter::new(RETURN, 0, 0, 0),
    ]
}

/// An interface's socket, and who listens to it.
#[derive(Debug)]
struct Ear {
    socket: Arc<Socket>,
    listener: JoinHandle<()>,
}

impl Drop for Ear {
    fn drop(&mut self) {
        self.listener.abort();
    }
}

/// The agent's ears, one at each interface, and its voice.
///
/// Each hears the frames as they come in: an interface that is a bridge's port has none left for those who only ask for one
/// protocol.
#[derive(Debug)]
pub struct Neighbours {
    runtime: Handle,
    heard: mpsc::Sender<Heard>,
    ears: BTreeMap<u32, Ear>,
}

impl Neighbours {
    /// Reports to `heard`, from tasks of `runtime`, what is heard.
    pub fn new(runtime: Handle, heard: mpsc::Sender<Heard>) -> Self {
        Self { runtime, heard, ears: BTreeMap::new() }
    }

    /// Listens on these interfaces, and on no others.
    pub fn listen(&mut self, interfaces: &BTreeSet<u32>) {
        self.ears.retain(|ifindex, ear| interfaces.contains(ifindex) && !ear.listener.is_finished());
        for &ifindex in interfaces {
            if self.ears.contains_key(&ifindex) {
                continue;
            }
            match self.open(ifindex) {
                Ok(ear) => drop(self.ears.insert(ifindex, ear)),
                // It may be gone by now; the next look around tries again, or does not find it any more.
                Err(error) => warn!("cannot listen for neighbours on the interface {ifindex}: {error:#}"),
            }
        }
    }

    fn open(&self, ifindex: u32) -> Result<Ear> {
        // Of no protocol, so that nothing comes before the filter is there.
        let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(0)))?;
        socket.attach_filter(&filter())?;
        sys::tell_tags(socket.as_fd())?;
        socket.set_nonblocking(true)?;
        sys::bind_to_frames(socket.as_fd(), ifindex)?;
        let socket = Arc::new(socket);
        let listener = self.runtime.spawn(listen(Arc::clone(&socket), ifindex, self.heard.clone()));
        Ok(Ear { socket, listener })
    }

    /// Asks on an interface, by these tags if there are some, where `target` is, on behalf of `sender`, which is of the same family. An
    /// interface that nobody listens on is not asked.
    pub fn ask(&self, by: VlanKey, sender: Ip, sender_mac: Mac, target: Ip) -> Result<()> {
        let Some(ear) = self.ears.get(&by.ifindex) else { return Ok(()) };
        let mut frame = if target.is_ipv4() {
            request(sender, sender_mac, target)
        } else {
            solicitation(sender.0, sender_mac, target.0)
        };
        let behind_macs = offset_of!(Ethernet, ethertype);
        frame.splice(behind_macs..behind_macs, tags(by.service_vlan, by.vlan).concat());
        ear.socket.send(&frame)?;
        Ok(())
    }
}

/// Reports what comes to a socket, until its interface is gone or nobody wants to hear.
async fn listen(socket: Arc<Socket>, ifindex: u32, heard: mpsc::Sender<Heard>) {
    let Ok(socket) = sys::watched(socket) else { return };
    let mut frame = [0; 2048];
    while let Ok(mut ready) = socket.readable().await {
        let received = ready.try_io(|socket| sys::receive_tagged(socket.as_fd(), &mut frame));
        match received {
            Ok(Ok((length, tag))) => {
                let Some((by, plain)) = untag(ifindex, tag, &frame[..length]) else { continue };
                let Some((address, mac)) = parse(&plain) else { continue };
                if heard.send(Heard { by, address, mac }).await.is_err() {
                    return;
                }
            }
            // Said once each time the interface goes down.
            Ok(Err(error)) if error.kind() == std::io::ErrorKind::NetworkDown => {}
            Ok(Err(_)) => return,
            Err(_would_block) => {}
        }
    }
}

/// The tags of a VLAN, as they stand in a frame that has no priority, from the outside in; none where there is no VLAN.
pub fn tags(service_vlan: u16, vlan: u16) -> Vec<Tag> {
    let tag = |(ethertype, vlan): (u16, u16)| {
        let ([a, b], [c, d]) = (ethertype.to_be_bytes(), vlan.to_be_bytes());
        [a, b, c, d]
    };
    let both = [(ETHERTYPE_SERVICE_VLAN, service_vlan), (ETHERTYPE_VLAN, vlan)];
    both.into_iter().filter(|(_, vlan)| *vlan != 0).map(tag).collect()
}

/// What a frame came by, and the frame without its tags, of which the outer one is beside it; nothing where no interface has such ones.
fn untag(ifindex: u32, beside: Option<Tag>, frame: &[u8]) -> Option<(VlanKey, Vec<u8>)> {
    let parts = |[a, b, c, d]: Tag| (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]) & 0xfff);
    let (macs, rest) = frame.split_at_checked(offset_of!(Ethernet, ethertype))?;
    let inner = rest.first_chunk().map(|tag| parts(*tag)).filter(|(kind, _)| *kind == ETHERTYPE_VLAN);
    let (service_vlan, vlan) = match (beside.map(parts), inner) {
        (None, None) => (0, 0),
        (Some((ETHERTYPE_VLAN, vlan)), None) => (0, vlan),
        (Some((ETHERTYPE_SERVICE_VLAN, service)), Some((_, vlan))) => (service, vlan),
        _ => return None,
    };
    let rest = if inner.is_some() { &rest[size_of::<Tag>()..] } else { rest };
    Some((VlanKey { ifindex, service_vlan, vlan }, [macs, rest].concat()))
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

/// What a frame says of an address, if it is about one.
fn parse(frame: &[u8]) -> Option<(Ip, Mac)> {
    let (ethernet, _) = Ethernet::read_from_prefix(frame).ok()?;
    match ethernet.ethertype.get() {
        ETHERTYPE_ARP => parse_arp(frame),
        ETHERTYPE_IPV6 => parse_discovery(frame),
        _ => None,
    }
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
    fn tags_say_by_what_a_frame_came_and_any_that_no_interface_has_make_it_nobodys() {
        const SERVICE: Tag = [0x88, 0xa8, 0x60, 200];
        const CUSTOMER: Tag = [0x81, 0, 0x20, 120];
        let frame = request(Ip(SENDER), HOST, Ip(TARGET));
        let with = |tag: Tag| [&frame[..12], &tag, &frame[12..]].concat();
        let by = |service_vlan, vlan| Some((VlanKey { ifindex: 7, service_vlan, vlan }, frame.clone()));
        assert_eq!(untag(7, None, &frame), by(0, 0));
        assert_eq!(untag(7, Some([0x81, 0, 0xe0, 0]), &frame), by(0, 0), "a priority is no VLAN");
        assert_eq!(untag(7, Some(CUSTOMER), &frame), by(0, 120));
        assert_eq!(untag(7, Some(SERVICE), &with(CUSTOMER)), by(200, 120));
        for (beside, frame) in [
            (Some(SERVICE), frame.clone()),
            (Some(CUSTOMER), with(CUSTOMER)),
            (None, with(CUSTOMER)),
            (None, frame[..11].to_vec()),
        ] {
            assert_eq!(untag(7, beside, &frame), None, "{beside:02x?} {frame:02x?}");
        }
        assert_eq!(tags(200, 120).concat(), [0x88, 0xa8, 0, 200, 0x81, 0, 0, 120]);
        assert_eq!((tags(0, 120).concat(), tags(0, 0)), (vec![0x81, 0, 0, 120], vec![]));
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
