//! Packets, byte by byte, with checksums computed over the whole: no header types, no incremental updates.

pub type Mac = [u8; 6];
pub type Ip = [u8; 4];
pub type Ip6 = [u8; 16];

pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const PSH: u8 = 8;
pub const ACK: u8 = 16;

/// RFC 1071, as it is written there: big-endian words, carries folded at the end.
pub fn checksum(parts: &[&[u8]]) -> u16 {
    let bytes: Vec<u8> = parts.concat();
    let mut sum = 0u64;
    for pair in bytes.chunks(2) {
        sum += u64::from(pair[0]) * 256 + u64::from(*pair.get(1).unwrap_or(&0));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}

/// A frame that is described, and built at the end.
#[derive(Clone, Debug)]
pub struct Packet {
    pub from_mac: Mac,
    pub to_mac: Mac,
    pub from: Ip,
    pub to: Ip,
    pub from_port: u16,
    pub to_port: u16,
    pub protocol: u8,
    pub flags: u8,
    pub seq: u32,
    pub ack: u32,
    pub window: u16,
    /// DSCP and ECN.
    pub tos: u8,
    pub ttl: u8,
    pub id: u16,
    pub fragment: u16,
    pub options: Vec<u8>,
    /// TCP options, in whole words.
    pub tcp_options: Vec<u8>,
    pub payload: Vec<u8>,
    /// UDP without a checksum.
    pub no_checksum: bool,
}

impl Packet {
    pub fn tcp(flags: u8) -> Self {
        Self {
            from_mac: [2, 1, 1, 1, 1, 1],
            to_mac: [2, 9, 9, 9, 9, 9],
            from: [10, 0, 1, 5],
            to: [10, 0, 9, 9],
            from_port: 40000,
            to_port: 80,
            protocol: 6,
            flags,
            seq: 1000,
            ack: if flags & ACK == 0 { 0 } else { 77 },
            window: 64240,
            tos: 0,
            ttl: 64,
            id: 0x1234,
            fragment: 0x4000,
            options: Vec::new(),
            tcp_options: Vec::new(),
            payload: Vec::new(),
            no_checksum: false,
        }
    }

    pub fn udp() -> Self {
        Self { protocol: 17, to_port: 53, payload: b"query".to_vec(), ..Self::tcp(0) }
    }

    fn transport(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(self.from_port.to_be_bytes());
        bytes.extend(self.to_port.to_be_bytes());
        let at = if self.protocol == 6 {
            bytes.extend(self.seq.to_be_bytes());
            bytes.extend(self.ack.to_be_bytes());
            let header = u8::try_from(5 + self.tcp_options.len() / 4).unwrap();
            bytes.extend([header << 4, self.flags]);
            bytes.extend(self.window.to_be_bytes());
            bytes.extend([0; 4]);
            bytes.extend(&self.tcp_options);
            16
        } else {
            bytes.extend(u16::try_from(8 + self.payload.len()).unwrap().to_be_bytes());
            bytes.extend([0; 2]);
            6
        };
        bytes.extend(&self.payload);
        let length = u16::try_from(bytes.len()).unwrap().to_be_bytes();
        if !self.no_checksum {
            let sum = checksum(&[&self.from, &self.to, &[0, self.protocol], &length, &bytes]);
            let sum = if sum == 0 && self.protocol == 17 { 0xffff } else { sum };
            bytes[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        }
        bytes
    }

    pub fn ipv4(&self, payload: &[u8]) -> Vec<u8> {
        let header = 20 + self.options.len();
        let mut bytes = vec![0x40 | u8::try_from(header / 4).unwrap(), self.tos];
        bytes.extend(u16::try_from(header + payload.len()).unwrap().to_be_bytes());
        bytes.extend(self.id.to_be_bytes());
        bytes.extend(self.fragment.to_be_bytes());
        bytes.extend([self.ttl, self.protocol, 0, 0]);
        bytes.extend(self.from);
        bytes.extend(self.to);
        bytes.extend(&self.options);
        let sum = checksum(&[&bytes]).to_be_bytes();
        bytes[10..12].copy_from_slice(&sum);
        bytes.extend(payload);
        ethernet(self.to_mac, self.from_mac, 0x0800, &bytes)
    }

    pub fn build(&self) -> Vec<u8> {
        self.ipv4(&self.transport())
    }

    /// ICMP with this type and a body.
    pub fn icmp(&self, kind: u8, body: &[u8]) -> Vec<u8> {
        self.icmp_code(kind, 0, body)
    }

    /// ICMP with this type, code and body.
    pub fn icmp_code(&self, kind: u8, code: u8, body: &[u8]) -> Vec<u8> {
        let mut bytes = vec![kind, code, 0, 0];
        bytes.extend(body);
        let sum = checksum(&[&bytes]).to_be_bytes();
        bytes[2..4].copy_from_slice(&sum);
        Self { protocol: 1, ..self.clone() }.ipv4(&bytes)
    }
}

/// An IPv6 packet, described in the same way: ports, flags and payload are those of `inner`, whose addresses do not matter.
#[derive(Clone, Debug)]
pub struct Packet6 {
    pub from: Ip6,
    pub to: Ip6,
    pub class: u8,
    pub inner: Packet,
}

impl Packet6 {
    pub fn of(from: Ip6, to: Ip6, inner: Packet) -> Self {
        Self { from, to, class: 0, inner }
    }

    fn transport(&self) -> Vec<u8> {
        let mut bytes = self.inner.transport();
        let at = if self.inner.protocol == 6 { 16 } else { 6 };
        bytes[at..at + 2].fill(0);
        if !self.inner.no_checksum {
            let sum = self.checksum(self.inner.protocol, &bytes);
            bytes[at..at + 2].copy_from_slice(&(if sum == 0 { 0xffff } else { sum }).to_be_bytes());
        }
        bytes
    }

    /// With the pseudo header of RFC 8200, 8.1, as it is written there.
    fn checksum(&self, protocol: u8, bytes: &[u8]) -> u16 {
        let length = u32::try_from(bytes.len()).unwrap().to_be_bytes();
        checksum(&[&self.from, &self.to, &length, &[0, 0, 0, protocol], bytes])
    }

    pub fn ipv6(&self, next: u8, payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0x60 | self.class >> 4, self.class << 4, 0, 0];
        bytes.extend(u16::try_from(payload.len()).unwrap().to_be_bytes());
        bytes.extend([next, self.inner.ttl]);
        bytes.extend(self.from);
        bytes.extend(self.to);
        bytes.extend(payload);
        ethernet(self.inner.to_mac, self.inner.from_mac, 0x86dd, &bytes)
    }

    pub fn build(&self) -> Vec<u8> {
        self.ipv6(self.inner.protocol, &self.transport())
    }

    /// A fragment with these bytes of the packet, at this offset (RFC 8200, 4.5).
    pub fn fragment(&self, id: u32, offset: u16, more: bool, bytes: &[u8]) -> Vec<u8> {
        let header =
            [&[self.inner.protocol, 0][..], &(offset | u16::from(more)).to_be_bytes(), &id.to_be_bytes()];
        self.ipv6(44, &[&header.concat(), bytes].concat())
    }

    /// ICMPv6 with this type and a body.
    pub fn icmp(&self, kind: u8, body: &[u8]) -> Vec<u8> {
        self.icmp_code(kind, 0, body)
    }

    /// ICMPv6 with this type, code and body.
    pub fn icmp_code(&self, kind: u8, code: u8, body: &[u8]) -> Vec<u8> {
        let mut bytes = vec![kind, code, 0, 0];
        bytes.extend(body);
        let sum = self.checksum(58, &bytes).to_be_bytes();
        bytes[2..4].copy_from_slice(&sum);
        self.ipv6(58, &bytes)
    }
}

/// fd00:: with this last byte.
pub const fn six(last: u8) -> Ip6 {
    [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]
}

/// The parts of a TCP or UDP frame over IPv6 that a test wants to look at.
pub fn addresses6(frame: &[u8]) -> (Ip6, u16, Ip6, u16) {
    let port = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
    (frame[22..38].try_into().unwrap(), port(54), frame[38..54].try_into().unwrap(), port(56))
}

pub fn ethernet(to: Mac, from: Mac, kind: u16, payload: &[u8]) -> Vec<u8> {
    [&to[..], &from, &kind.to_be_bytes(), payload].concat()
}

pub fn arp(operation: u16, from_mac: Mac, from: Ip, to_mac: Mac, to: Ip, frame_to: Mac) -> Vec<u8> {
    let body = [&[0, 1, 8, 0, 6, 4][..], &operation.to_be_bytes(), &from_mac, &from, &to_mac, &to].concat();
    ethernet(frame_to, from_mac, 0x0806, &body)
}

/// The parts of a TCP or UDP frame that a test wants to look at.
pub fn addresses(frame: &[u8]) -> (Ip, u16, Ip, u16) {
    let port = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
    (frame[26..30].try_into().unwrap(), port(34), frame[30..34].try_into().unwrap(), port(36))
}

/// A DNS question for an IPv4 address (RFC 1035, 4.1).
pub fn question(name: &str) -> Vec<u8> {
    let mut bytes = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        bytes.push(u8::try_from(label.len()).unwrap());
        bytes.extend(label.as_bytes());
    }
    bytes.extend([0, 0, 1, 0, 1]);
    bytes
}

#[test]
fn the_checksum_is_that_of_a_known_header() {
    // The example that RFC 1071's readers use: 45 00 00 73 00 00 40 00 40 11 b8 61 c0 a8 00 01 c0 a8 00 c7.
    let header = [0x45, 0, 0, 0x73, 0, 0, 0x40, 0, 0x40, 0x11, 0, 0, 0xc0, 0xa8, 0, 1, 0xc0, 0xa8, 0, 0xc7];
    assert_eq!(checksum(&[&header]), 0xb861);
}
