//! The bytes of captured packets: as they came, as they left, and what they are.

use super::tap::Packet;
use crate::ip;
use privatelink_common::capture::FORWARDED;
use privatelink_common::frame::DIFFERENCE;
use privatelink_common::path::proxy;
use privatelink_common::verdict::Answer;
use privatelink_common::wire::{
    ADVERTISEMENT, ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, ICMP, ICMPV6, Ip, NETWORK, SOLICITATION,
    TCP, TRANSPORT, TRANSPORT6, UDP,
};

/// Where a VLAN tag is in a frame.
const TAG: usize = 12;

/// The bytes of a packet as it came, and how many it had: its beginning was kept, the rest is what left, unless the path has cut it off.
pub(super) fn as_it_came(packet: &Packet) -> (Vec<u8>, u32) {
    let event = &packet.event;
    let kept = (event.header_length as usize).min(event.header.len());
    let mut bytes = event.header[..kept].to_vec();
    if let Some(moved) = moved(packet) {
        bytes
            .extend(kept.checked_add_signed(moved).and_then(|at| packet.bytes.get(at..)).unwrap_or_default());
    }
    if event.tag_type == 0 || bytes.len() < TAG {
        return (bytes, event.length);
    }
    // The kernel has taken the tag out of the frame.
    bytes.splice(TAG..TAG, [event.tag_type, event.tag].into_iter().flat_map(u16::to_be_bytes));
    (bytes, event.length + 4)
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

/// The interface and the bytes with which a packet left, if it left.
pub(super) fn as_it_left(packet: &Packet) -> Option<(u16, &[u8])> {
    let event = &packet.event;
    (event.peer_slot != 0).then_some((event.peer_slot, packet.bytes.as_slice()))
}

/// The headers of a frame, however much of it there is: what is missing is zero.
#[derive(Clone, Copy)]
struct Headers<'a>(&'a [u8]);

impl Headers<'_> {
    fn byte(self, at: usize) -> u8 {
        self.0.get(at).copied().unwrap_or_default()
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
        match self.two(TAG) {
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
    let headers = Headers(frame);
    let Some((source, destination, protocol, Some(transport))) = headers.ip() else { return false };
    let at = match protocol {
        TCP => transport + 16,
        UDP => transport + 6,
        _ => return false,
    };
    if frame.len() < at + 2 || protocol == UDP && headers.two(at) == 0 {
        return false;
    }
    let is_ipv4 = source.is_ipv4();
    let stored = if is_ipv4 { headers.two(NETWORK + 2) } else { headers.two(NETWORK + 4) };
    let before = if is_ipv4 { transport - NETWORK } else { 0 };
    let carried = match usize::from(stored) {
        // Larger than a header can say.
        0 => (length as usize).saturating_sub(transport),
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
    let headers = Headers(frame);
    let Some((source, destination, protocol, transport)) = headers.ip() else {
        return match headers.two(TAG) {
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
    fn packets_are_named_by_their_addresses_ports_and_flags() {
        assert_eq!(summary(&segment(4)), "tcp 10.0.1.5:40000 > 10.0.9.9:80 []");
        assert!(summary(&segment(6)).starts_with("tcp [fdfd:"), "{}", summary(&segment(6)));
        assert_eq!(summary(&[0; 14]), "ethertype 0x0000");
    }
}
