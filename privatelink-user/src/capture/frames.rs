//! The bytes of captured packets: as they came, as they left, and what they are.

use super::tap::Packet;
use crate::ip;
use privatelink_common::capture::FORWARDED;
use privatelink_common::frame::DIFFERENCE;
use privatelink_common::path::proxy;
use privatelink_common::tables::Tag;
use privatelink_common::verdict::Answer;
use privatelink_common::wire::{
    ADVERTISEMENT, ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, ETHERTYPE_SERVICE_VLAN, ETHERTYPE_VLAN,
    ICMP, ICMPV6, Ip, NETWORK, SOLICITATION, TCP, TRANSPORT, TRANSPORT6, UDP,
};

/// Where VLAN tags are in a frame, and what follows them.
const TAGS: usize = 12;

/// Bytes of a tag.
const TAG: usize = size_of::<Tag>();

/// Puts tags on a frame that had `length` bytes without; returns how many it has with them.
fn tag(bytes: &mut Vec<u8>, length: u32, tags: [Tag; 2]) -> u32 {
    let tags: Vec<u8> = tags.into_iter().filter(|tag| *tag != Tag::default()).flatten().collect();
    let at = bytes.len().min(TAGS);
    let length = length.saturating_add(u32::try_from(tags.len()).unwrap_or(u32::MAX));
    bytes.splice(at..at, tags);
    length
}

/// The bytes of a packet as it came, and how many it had: its beginning was kept, the rest is what left, unless the path has cut it off.
pub(super) fn as_it_came(packet: &Packet) -> (Vec<u8>, u32) {
    let event = &packet.event;
    let kept = (event.header_length as usize).min(event.header.len());
    let mut bytes = event.header[..kept].to_vec();
    if let Some(moved) = moved(packet) {
        bytes
            .extend(kept.checked_add_signed(moved).and_then(|at| packet.bytes.get(at..)).unwrap_or_default());
    }
    let length = tag(&mut bytes, event.length, event.tags);
    (bytes, length)
}

/// By how many bytes the payload has moved, if it left with the packet: by the difference of two headers, or by what the Proxy Protocol
/// puts before it.
fn moved(packet: &Packet) -> Option<isize> {
    let event = &packet.event;
    let answers = event.outcome != FORWARDED && Answer::from_code(event.outcome).is_some();
    if answers && event.outcome != Answer::EchoReply.code() {
        return None;
    }
    let by = isize::try_from(i64::from(event.left_length) - i64::from(event.length)).ok()?;
    let difference = DIFFERENCE.cast_signed();
    [0, difference, -difference, proxy::LENGTH.cast_signed().into()].contains(&by).then_some(by)
}

/// The bytes of a packet as it left, and how many it had, if it left.
pub(super) fn as_it_left(packet: &Packet) -> Option<(Vec<u8>, u32)> {
    let (event, mut bytes) = (&packet.event, packet.bytes.clone());
    let length = tag(&mut bytes, event.left_length, event.left_tags);
    (event.peer_slot != 0).then_some((bytes, length))
}

/// The headers of a frame, however much of it there is: what is missing is zero. Where they are is said as if there were no tags.
#[derive(Clone, Copy)]
struct Headers<'a> {
    frame: &'a [u8],
    /// Bytes of tags before them.
    tags: usize,
}

impl<'a> Headers<'a> {
    fn of(frame: &'a [u8]) -> Self {
        let bare = Self { frame, tags: 0 };
        let is_tag = |at| matches!(bare.two(at), ETHERTYPE_VLAN | ETHERTYPE_SERVICE_VLAN);
        let count = (0..2).take_while(|count| is_tag(TAGS + count * TAG)).count();
        Self { frame, tags: count * TAG }
    }

    /// Whether it reaches so far.
    fn holds(self, length: usize) -> bool {
        self.frame.len() >= self.tags + length
    }

    fn byte(self, at: usize) -> u8 {
        self.frame.get(self.tags + at).copied().unwrap_or_default()
    }

    /// The VLANs that it is in, the outer one first.
    fn vlans(self) -> Vec<String> {
        let bare = Self { tags: 0, ..self };
        let tags = (TAGS..TAGS + self.tags).step_by(TAG);
        tags.map(|at| (bare.two(at + 2) & 0xfff).to_string()).collect()
    }

    fn two(self, at: usize) -> u16 {
        u16::from_be_bytes([self.byte(at), self.byte(at + 1)])
    }

    fn address(self, at: usize) -> Ip {
        Ip(std::array::from_fn(|index| self.byte(at + index)))
    }

    fn ipv4(self, at: usize) -> Ip {
        Ip::from_ipv4(std::array::from_fn(|index| self.byte(at + index)))
    }

    /// Source, destination, protocol, and where the transport header is, if it is there.
    fn ip(self) -> Option<(Ip, Ip, u8, Option<usize>)> {
        match self.two(TAGS) {
            ETHERTYPE_IPV4 => {
                let is_whole = self.byte(NETWORK) == 0x45 && self.two(NETWORK + 6) & 0x1fff == 0;
                let transport = is_whole.then_some(TRANSPORT);
                Some((self.ipv4(26), self.ipv4(30), self.byte(23), transport))
            }
            ETHERTYPE_IPV6 => Some((self.address(22), self.address(38), self.byte(20), Some(TRANSPORT6))),
            _ => None,
        }
    }
}

/// Whether the transport checksum of a frame of `length` bytes is only the sum of the pseudo header, since a device is to complete it.
/// One of a whole packet is the same once in 65535 times.
pub(super) fn is_unfinished(frame: &[u8], length: u32) -> bool {
    let headers = Headers::of(frame);
    let Some((source, destination, protocol, Some(transport))) = headers.ip() else { return false };
    let at = match protocol {
        TCP => transport + 16,
        UDP => transport + 6,
        _ => return false,
    };
    if !headers.holds(at + 2) || protocol == UDP && headers.two(at) == 0 {
        return false;
    }
    let is_ipv4 = source.is_ipv4();
    let stored = if is_ipv4 { headers.two(NETWORK + 2) } else { headers.two(NETWORK + 4) };
    let before = if is_ipv4 { transport - NETWORK } else { 0 };
    let carried = match usize::from(stored) {
        // Larger than a header can say.
        0 => (length as usize).saturating_sub(headers.tags + transport),
        stored => stored.saturating_sub(before),
    };
    let words = |address: Ip| -> u64 {
        let bytes = ip::bytes(ip::shown(address));
        bytes.chunks(2).map(|pair| u64::from(u16::from_be_bytes([pair[0], pair[1]]))).sum()
    };
    let sum = words(source) + words(destination) + u64::from(protocol) + carried as u64;
    // Sums of 16-bit words in one's complement are remainders, where zero has two forms.
    sum % 0xffff == u64::from(headers.two(at)) % 0xffff
}

/// A frame, in a few words.
pub(super) fn summary(frame: &[u8]) -> String {
    let headers = Headers::of(frame);
    let vlans = headers.vlans().join(".");
    if vlans.is_empty() { untagged(headers) } else { format!("vlan {vlans} {}", untagged(headers)) }
}

/// What is behind the tags.
fn untagged(headers: Headers<'_>) -> String {
    let Some((source, destination, protocol, transport)) = headers.ip() else {
        return match headers.two(TAGS) {
            ETHERTYPE_ARP => {
                format!("arp {} > {}", ip::shown(headers.ipv4(28)), ip::shown(headers.ipv4(38)))
            }
            other => format!("ethertype {other:#06x}"),
        };
    };
    let addresses = format!("{} > {}", ip::shown(source), ip::shown(destination));
    let Some(transport) = transport else { return format!("protocol {protocol} {addresses}, a part") };
    let (from, to) = (
        ip::with_port(source, headers.two(transport)),
        ip::with_port(destination, headers.two(transport + 2)),
    );
    match protocol {
        TCP => {
            let names = [(2, 'S'), (1, 'F'), (4, 'R'), (8, 'P'), (16, '.')];
            let flags = headers.byte(transport + 13);
            let flags: String =
                names.iter().filter(|(bit, _)| flags & bit != 0).map(|(_, name)| *name).collect();
            format!("tcp {from} > {to} [{flags}]")
        }
        UDP => format!("udp {from} > {to}"),
        ICMP => format!("icmp {addresses}"),
        ICMPV6 => match headers.byte(transport) {
            SOLICITATION | ADVERTISEMENT => {
                let target = ip::shown(headers.address(transport + 8));
                format!("icmpv6 {addresses}, neighbour {target}")
            }
            _ => format!("icmpv6 {addresses}"),
        },
        other => format!("protocol {other} {addresses}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::PacketBuilder;

    fn segment(family: u8) -> Vec<u8> {
        let ethernet = PacketBuilder::ethernet2([2; 6], [4; 6]);
        let mut bytes = Vec::new();
        if family == 4 {
            let builder = ethernet.ipv4([10, 0, 1, 5], [10, 0, 9, 9], 64).tcp(40000, 80, 1, 1000);
            builder.write(&mut bytes, b"payload").unwrap();
        } else {
            let builder = ethernet.ipv6([0xfd; 16], [0xfc; 16], 64).tcp(40000, 80, 1, 1000);
            builder.write(&mut bytes, b"payload").unwrap();
        }
        bytes
    }

    fn tagged(family: u8) -> Vec<u8> {
        let mut frame = segment(family);
        let untagged = u32::try_from(frame.len()).unwrap();
        let tags = [[0x88, 0xa8, 0, 200], [0x81, 0, 0xe0, 120]];
        assert_eq!(tag(&mut frame, untagged, tags) as usize, frame.len());
        frame
    }

    fn put_pseudo_sum(frame: &mut [u8], family: u8) {
        let (addresses, at) = if family == 4 { (26..34, 50) } else { (22..54, 70) };
        let carried = u32::try_from(frame.len() - if family == 4 { 34 } else { 54 }).unwrap();
        let words = frame[addresses].chunks(2).map(|it| u32::from(u16::from_be_bytes([it[0], it[1]])));
        let mut sum: u32 = words.sum::<u32>() + 6 + carried;
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        frame[at..at + 2].copy_from_slice(&u16::try_from(sum).unwrap().to_be_bytes());
    }

    #[test]
    fn a_checksum_that_a_device_is_to_complete_is_told_from_one_that_is_complete() {
        for family in [4, 6] {
            let mut frame = segment(family);
            let length = u32::try_from(frame.len()).unwrap();
            assert!(!is_unfinished(&frame, length), "complete, IPv{family}");
            put_pseudo_sum(&mut frame, family);
            assert!(is_unfinished(&frame, length), "left to a device, IPv{family}");
            let header = frame.len() - b"payload".len();
            assert!(is_unfinished(&frame[..header], length), "and cut off behind its header");
            for short in 0..header {
                let of_short = is_unfinished(&frame[..short], length);
                assert!(!of_short || short >= header - 2, "{short} bytes have no checksum");
                assert!(!summary(&frame[..short]).is_empty());
            }
        }
        assert!(!is_unfinished(&[0; 60], 60));
    }

    #[test]
    fn tags_are_put_back_and_looked_behind_but_not_more_than_two() {
        for family in [4, 6] {
            let (mut bare, mut frame) = (segment(family), tagged(family));
            assert_eq!(frame[12..20], [0x88, 0xa8, 0, 200, 0x81, 0, 0xe0, 120]);
            assert_eq!(summary(&frame), format!("vlan 200.120 {}", summary(&bare)));
            let length = u32::try_from(frame.len()).unwrap();
            assert!(!is_unfinished(&frame, length));
            put_pseudo_sum(&mut bare, family);
            frame[20..].copy_from_slice(&bare[12..]);
            assert!(is_unfinished(&frame, length));
            for short in 0..bare.len() - b"payload".len() + 6 {
                assert!(!summary(&frame[..short]).is_empty() && !is_unfinished(&frame[..short], length));
            }
            tag(&mut frame, length, [[0x81, 0, 0, 7], [0; 4]]);
            assert_eq!(summary(&frame), "vlan 7.200 ethertype 0x8100");
        }
        let mut short = vec![1; 6];
        assert_eq!((tag(&mut short, 6, [[0x81, 0, 0, 1], [0; 4]]), short.len()), (10, 10));
    }

    #[test]
    fn packets_are_named_by_their_addresses_ports_and_flags() {
        assert_eq!(summary(&segment(4)), "tcp 10.0.1.5:40000 > 10.0.9.9:80 []");
        assert!(summary(&segment(6)).starts_with("tcp [fdfd:"), "{}", summary(&segment(6)));
        assert_eq!(summary(&[0; 14]), "ethertype 0x0000");
    }
}
