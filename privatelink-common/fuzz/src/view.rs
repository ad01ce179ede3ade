//! A frame as its headers say, read byte by byte: shares nothing with the path.

use crate::packet;
use privatelink_common::verdict::Answer;
use privatelink_common::wire::Ip;

/// An IP packet in a frame.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    pub frame: &'a [u8],
    pub is_ipv6: bool,
    pub from: Ip,
    pub to: Ip,
    pub protocol: u8,
    pub ttl: u8,
    /// Behind the network header, as long as that says.
    pub payload: &'a [u8],
    /// It is a part of a datagram.
    pub is_fragment: bool,
    /// It is a part other than the first.
    pub is_later: bool,
}

fn two(bytes: &[u8], at: usize) -> Option<usize> {
    Some(usize::from(*bytes.get(at)?) << 8 | usize::from(*bytes.get(at + 1)?))
}

impl<'a> View<'a> {
    /// The packet, if it is IPv4 without options or IPv6 without extension headers (but for that of a fragment) and as long as it says.
    pub fn of(frame: &'a [u8]) -> Option<Self> {
        match two(frame, 12)? {
            0x0800 if frame.get(14) == Some(&0x45) => {
                let bits = two(frame, 20)?;
                Some(Self {
                    frame,
                    is_ipv6: false,
                    from: Ip::from_ipv4(frame.get(26..30)?.try_into().ok()?),
                    to: Ip::from_ipv4(frame.get(30..34)?.try_into().ok()?),
                    protocol: *frame.get(23)?,
                    ttl: *frame.get(22)?,
                    payload: frame.get(34..14 + two(frame, 16)?)?,
                    is_fragment: bits & 0x3fff != 0,
                    is_later: bits & 0x1fff != 0,
                })
            }
            0x86dd if frame.get(14)? >> 4 == 6 => {
                let packet = Self {
                    frame,
                    is_ipv6: true,
                    from: Ip(frame.get(22..38)?.try_into().ok()?),
                    to: Ip(frame.get(38..54)?.try_into().ok()?),
                    protocol: *frame.get(20)?,
                    ttl: *frame.get(21)?,
                    payload: frame.get(54..54 + two(frame, 18)?)?,
                    is_fragment: false,
                    is_later: false,
                };
                Some(packet.behind_fragment_header())
            }
            _ => None,
        }
    }

    /// What an IPv6 fragment is a part of, as an IPv4 header has it.
    fn behind_fragment_header(self) -> Self {
        match self.payload {
            [protocol, _, a, b, _, _, _, _, payload @ ..] if self.protocol == 44 => {
                let bits = u16::from_be_bytes([*a, *b]);
                let (is_fragment, is_later) = (bits & 0xfff9 != 0, bits & 0xfff8 != 0);
                Self { protocol: *protocol, payload, is_fragment, is_later, ..self }
            }
            _ => self,
        }
    }

    pub fn has_ports(&self) -> bool {
        matches!(self.protocol, 6 | 17) && !self.is_later
    }

    pub fn ports(&self) -> (u16, u16) {
        let port = |at| two(self.payload, at).unwrap_or_default() as u16;
        (port(0), port(2))
    }

    pub fn flags(&self) -> u8 {
        if self.protocol == 6 { self.payload.get(13).copied().unwrap_or_default() } else { 0 }
    }

    /// The transport header as a whole, and what it carries; nothing where it is none.
    pub fn parts(&self) -> Option<(&'a [u8], &'a [u8])> {
        let length = match self.protocol {
            6 => usize::from(self.payload.get(12)? >> 4) * 4,
            17 => 8,
            _ => return None,
        };
        let least = if self.protocol == 6 { 20 } else { 8 };
        (length >= least && length <= self.payload.len()).then(|| self.payload.split_at(length))
    }

    /// Where in the transport header an option's value is, of the first such option.
    pub fn option(&self, kind: u8, length: u8) -> Option<usize> {
        let (header, _) = self.parts()?;
        let mut at = 20;
        while at < header.len() {
            let long = match header[at] {
                0 => return None,
                1 => 1,
                found => {
                    let long = *header.get(at + 1)?;
                    if found == kind && long == length && at + usize::from(long) <= header.len() {
                        return Some(at + 2);
                    }
                    usize::from(long)
                }
            };
            if long == 0 {
                return None;
            }
            at += long;
        }
        None
    }

    /// Whether it is a datagram, or the first fragment of one, that has no checksum.
    pub fn is_without_checksum(&self) -> bool {
        self.protocol == 17 && !self.is_later && self.payload.get(6..8) == Some(&[0, 0])
    }

    /// Whether the checksums are right, computed over the whole; None where there is nothing to compute.
    pub fn is_sound(&self) -> Option<bool> {
        if self.is_fragment {
            return Some(self.is_ipv6 || packet::checksum(&[&self.frame[14..34]]) == 0);
        }
        // UDP's own length, which may be less than what the packet has.
        let length = if self.protocol == 17 { two(self.payload, 4)? } else { self.payload.len() };
        let payload = self.payload.get(..length)?;
        let words = (length as u32).to_be_bytes();
        let (from, to) = if self.is_ipv6 {
            (self.from.0.to_vec(), self.to.0.to_vec())
        } else {
            (self.from.ipv4().to_vec(), self.to.ipv4().to_vec())
        };
        let pseudo = [&from[..], &to, &words, &[0, 0, 0, self.protocol]].concat();
        let network = self.is_ipv6 || packet::checksum(&[&self.frame[14..34]]) == 0;
        let transport = match self.protocol {
            6 if length >= 20 => packet::checksum(&[&pseudo, payload]) == 0,
            17 if length >= 8 && payload[6..8] == [0, 0] => !self.is_ipv6,
            17 if length >= 8 => packet::checksum(&[&pseudo, payload]) == 0,
            1 if !self.is_ipv6 && length >= 4 => packet::checksum(&[payload]) == 0,
            58 if self.is_ipv6 && length >= 4 => packet::checksum(&[&pseudo, payload]) == 0,
            _ => return None,
        };
        Some(network && transport)
    }
}

/// Whether a frame's checksums are right; None of anything else.
pub fn is_sound(frame: &[u8]) -> Option<bool> {
    View::of(frame)?.is_sound()
}

/// What a router and NAT may change of a packet, and no more. `shifted`: the path counts for one of the two sides, so that what the
/// segment carries is all that has to stay.
pub fn check_forwarded(frame: &[u8], after: &[u8], shifted: bool) {
    let (came, left) = (View::of(frame).expect("a packet"), View::of(after).expect("a packet still"));
    assert_eq!(came.protocol, left.protocol);
    if came.is_sound() == Some(true) {
        assert_eq!(left.is_sound(), Some(true), "{frame:02x?} became {after:02x?}");
    }
    if came.is_without_checksum() {
        let gets_one = left.is_ipv6;
        assert_eq!(left.is_without_checksum(), !gets_one, "{frame:02x?} became {after:02x?}");
        assert!(!gets_one || left.is_sound() == Some(true), "{frame:02x?} became {after:02x?}");
    }
    assert_eq!((came.is_fragment, came.is_later), (left.is_fragment, left.is_later));
    if came.is_later {
        assert_eq!(came.ttl - 1, left.ttl);
        assert_eq!(came.payload, left.payload, "a later fragment has nothing to rewrite");
        return;
    }
    if shifted {
        return check_shifted(&came, &left);
    }
    assert_eq!(came.ttl - 1, left.ttl, "a hop");
    let (expected, mut found) = (came.payload.to_vec(), left.payload.to_vec());
    assert_eq!(expected.len(), found.len());
    // Ports and the checksum.
    let at = if came.protocol == 6 { 16 } else { 6 };
    found[..4].copy_from_slice(&expected[..4]);
    found[at..at + 2].copy_from_slice(&expected[at..at + 2]);
    // A SYN's MSS may be lowered.
    if came.flags() & 2 != 0
        && let Some(at) = came.option(2, 4)
        && found[at..at + 2] < expected[at..at + 2]
    {
        found[at..at + 2].copy_from_slice(&expected[at..at + 2]);
    }
    assert_eq!(found, expected, "{frame:02x?} became {after:02x?}");
    check_network(&came, &left);
}

/// What a segment or datagram carries comes as it is, behind the header that the Proxy Protocol may put before it.
fn check_shifted(came: &View<'_>, left: &View<'_>) {
    let ((_, carried), (_, kept)) = (came.parts().expect("a header"), left.parts().expect("a header"));
    let is_of_paths_own = (left.flags() ^ came.flags()) & 7 != 0;
    if is_of_paths_own {
        // A SYN in the place of what the consumer has said too early, or a word about the target's window.
        assert!(kept.len() <= 1, "{left:02x?}");
        return;
    }
    assert!(kept.ends_with(carried), "{came:02x?} became {left:02x?}");
    let before = &kept[..kept.len() - carried.len()];
    assert!(before.is_empty() || before.len() == 100, "{} bytes", before.len());
    assert!(before.is_empty() || before.starts_with(b"\r\n\r\n\0\r\nQUIT\n"), "{before:02x?}");
}

/// The network header: what is not said elsewhere stays, and what is translated says the same (RFC 7915).
fn check_network(came: &View<'_>, left: &View<'_>) {
    let class = |it: &View<'_>| match it.is_ipv6 {
        true => it.frame[14] << 4 | it.frame[15] >> 4,
        false => it.frame[15],
    };
    assert_eq!(class(came), class(left), "traffic class");
    match (came.is_ipv6, left.is_ipv6) {
        (false, false) => {
            if !came.is_fragment {
                assert_eq!(came.frame[18..20], left.frame[18..20], "identification");
            }
            assert_eq!(
                (&came.frame[16..18], &came.frame[20..22]),
                (&left.frame[16..18], &left.frame[20..22])
            );
            assert_eq!(came.frame[34 + came.payload.len()..], left.frame[34 + left.payload.len()..]);
        }
        (true, true) => {
            assert_eq!(came.frame[14..18], left.frame[14..18], "class and label");
            assert_eq!(came.payload.len(), left.payload.len());
        }
        (false, true) => {
            assert_eq!((left.frame[15] & 0x0f, left.frame[16], left.frame[17]), (0, 0, 0), "no flow label");
        }
        (true, false) => {
            if came.is_fragment {
                return;
            }
            let whole = left.frame[20..22] == [0x40, 0];
            assert!(
                whole || left.frame[20..22] == [0, 0] && left.payload.len() <= 1240,
                "DF where it is large"
            );
        }
    }
}

/// What the path answers: the packet that it makes is a right one, to who has asked.
pub fn check_answer(code: u32, frame: &[u8], after: &[u8]) {
    let answer = Answer::from_code(code).expect("an answer");
    let probed = answer == Answer::NeighbourAdvertisement && frame[22..38] == [0; 16];
    let to: &[u8] = if probed { &[0x33, 0x33, 0, 0, 0, 1] } else { &frame[6..12] };
    assert_eq!(&after[..6], to, "{answer:?}: {frame:02x?} became {after:02x?}");
    if answer == Answer::ArpReply {
        assert_eq!((after.len(), &after[20..22], &after[38..42]), (frame.len(), &[0, 2][..], &frame[28..32]));
        return;
    }
    let (came, left) = (View::of(frame).expect("a packet"), View::of(after).expect("an answer"));
    if answer == Answer::NeighbourAdvertisement {
        assert_eq!((left.is_sound(), left.ttl, left.protocol), (Some(true), 255, 58), "{after:02x?}");
        assert_eq!((left.payload[0], left.payload.len()), (136, 32));
        assert_eq!(
            (left.from.0, &left.payload[8..24]),
            (came.payload[8..24].try_into().unwrap(), &came.payload[8..24])
        );
        return;
    }
    assert_eq!((left.from, left.to), (came.to, came.from), "{answer:?}");
    match answer {
        Answer::EchoReply => {
            assert_eq!(left.payload[4..], came.payload[4..]);
            assert!(came.is_sound() != Some(true) || left.is_sound() == Some(true), "{after:02x?}");
        }
        Answer::FragmentationNeeded | Answer::TimeExceeded => {
            let held = &left.payload[8..];
            assert_eq!(*held, frame[14..14 + held.len()], "the beginning of the packet");
            let header_is_right = came.is_ipv6 || packet::checksum(&[&frame[14..34]]) == 0;
            assert!(!header_is_right || left.is_sound() == Some(true), "{after:02x?}");
        }
        Answer::SynCookie => {
            assert_eq!((left.is_sound(), left.flags()), (Some(true), 0x12), "{after:02x?}");
            assert_eq!(left.ports(), (came.ports().1, came.ports().0));
            let number =
                |it: &View<'_>, at: usize| u32::from_be_bytes(it.payload[at..at + 4].try_into().unwrap());
            assert_eq!(number(&left, 8), number(&came, 4).wrapping_add(1));
        }
        _ => {
            assert!(answer.name().starts_with("reset"), "{answer:?}");
            assert_eq!(came.flags() & 4, 0, "a RST is never answered");
            assert_eq!((left.is_sound(), left.flags() & 4), (Some(true), 4), "{after:02x?}");
            assert_eq!(left.ports(), (came.ports().1, came.ports().0));
        }
    }
}
