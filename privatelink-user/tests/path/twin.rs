//! Both programs and the host run the same path: 20,000 random, mutated and truncated frames get the same verdict and the same bytes
//! from each. It proves the glue and the compiler, not the logic.

use crate::memory::{CONFIG, DUALSTACK, Memory, Pins, decide, in_the_kernel, interfaces, memory, neighbours};
use crate::tags::{Tags, tagged};
use aya::programs::{SchedClassifier, TestRun, TestRunOptions, TestRunResult, Xdp};
use privatelink::kernel::{Drops, Kernel, Program};
use privatelink::maps::Maps;
use privatelink::names::Names;
use privatelink::plan::{self, Image};
use privatelink::{flows, model, reconcile};
use privatelink_common::tables::{Bucket, Tag};
use privatelink_common::verdict::Action;
use privatelink_common::wire::Ipv4;
use std::path::Path;

const FRAMES: usize = 20_000;

/// Small enough for some of the frames to be too large.
const MTU: u32 = 100;
/// The Proxy Protocol's, which a flow's first datagram takes along.
const HEADER: u32 = 100;

/// xorshift64*: the same frames in every run.
struct Random(u64);

impl Random {
    fn next(&mut self, below: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        usize::try_from(self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33).unwrap() % below
    }
    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.next(choices.len())]
    }
}

/// A frame that may or may not make sense, from few enough addresses and ports that flows come about.
fn invent(random: &mut Random) -> Vec<u8> {
    let builder = etherparse::PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    let addresses =
        [[10, 0, 1, 5], [10, 0, 1, 6], [10, 0, 9, 9], [10, 0, 1, 10], [10, 0, 1, 21], [10, 1, 0, 1]];
    let (from, to) =
        (random.of(&addresses), random.of(&[[10, 0, 9, 9], [10, 0, 9, 9], [10, 0, 1, 10], [10, 0, 1, 5]]));
    let (from_port, to_port) =
        (random.of(&[1000, 1001, 1002, 8080]), random.of(&[80, 80, 80, 81, 2000, 20000]));
    let mut bytes = Vec::new();
    let payload = vec![0x5a; random.next(160).saturating_sub(120)];
    let ttl = random.of(&[64, 64, 64, 64, 2, 1, 0]);
    match random.next(12) {
        0 => {
            let arp = etherparse::ArpPacket::new(
                etherparse::ArpHardwareId::ETHERNET,
                etherparse::EtherType::IPV4,
                etherparse::ArpOperation(u16::try_from(random.next(3)).unwrap()),
                &[2, 0, 0, 0, 0, 1],
                &from,
                &[0; 6],
                &to,
            );
            builder.arp(arp.unwrap()).write(&mut bytes).unwrap();
        }
        1 => builder.ipv4(from, to, 9).icmpv4_echo_request(7, 9).write(&mut bytes, &payload).unwrap(),
        2..=4 => builder.ipv4(from, to, ttl).udp(from_port, to_port).write(&mut bytes, &payload).unwrap(),
        _ => {
            let mut tcp = builder.ipv4(from, to, ttl).tcp(from_port, to_port, 7, 100);
            tcp = tcp.options_raw(&options(random)).unwrap();
            for flag in [random.next(6), random.next(9)] {
                tcp = match flag {
                    0 => tcp.fin(),
                    1 => tcp.rst(),
                    2 => tcp.ack(3),
                    3 => tcp.psh(),
                    _ => tcp.syn(),
                };
            }
            tcp.write(&mut bytes, &payload).unwrap();
        }
    }
    bytes
}

/// TCP options that make sense at times: an MSS at the front, at an odd place, and whatever comes.
fn options(random: &mut Random) -> Vec<u8> {
    match random.next(4) {
        0 => vec![2, 4, random.of(&[0, 1, 5, 6, 0xff]), 0xb4],
        1 => vec![1, 2, 4, 0x22, 0x33, 3, 3, 7],
        2 => (0..random.next(10) * 4).map(|_| random.of(&[0, 1, 2, 2, 4, 4, 5, 34, 0xff])).collect(),
        _ => Vec::new(),
    }
}

/// The same of both families.
fn invent_dualstack(random: &mut Random) -> Vec<u8> {
    if random.next(4) == 0 {
        return invent(random);
    }
    let builder = etherparse::PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    let mapped = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 1, 5];
    let (client, endpoint, balancer) = (six(5), six(0x99), six(0xa));
    let from = random.of(&[client, client, six(6), endpoint, balancer, six(0x15), OUTSIDE, mapped]);
    let to = random.of(&[endpoint, endpoint, endpoint, balancer, client, mapped]);
    let (from_port, to_port) =
        (random.of(&[1000, 1001, 1002, 8080]), random.of(&[80, 80, 81, 81, 82, 1500, 20000]));
    let hops = random.of(&[64, 64, 64, 255, 255, 255, 2, 1, 0]);
    let payload = vec![0x5a; random.next(160).saturating_sub(120)];
    let mut bytes = Vec::new();
    match random.next(12) {
        0 | 1 => {
            let source = random.of(&[client, client, [0; 16], balancer]);
            let target = random.of(&[endpoint, endpoint, balancer, client, mapped]);
            let kind = random.of(&[135, 135, 135, 136]);
            let options = random.of(&[0usize, 1, 1, 2, 9]);
            bytes = discovery(source, target, kind, hops, options);
        }
        2 => builder.ipv6(from, to, hops).icmpv6_echo_request(7, 9).write(&mut bytes, &payload).unwrap(),
        3 => {
            // An extension header, or a protocol that no one has.
            builder.ipv6(from, to, hops).udp(from_port, to_port).write(&mut bytes, &payload).unwrap();
            bytes[20] = random.of(&[0, 43, 44, 50, 51, 59, 60, 132, 135]);
        }
        4 | 5 => builder.ipv6(from, to, hops).udp(from_port, to_port).write(&mut bytes, &payload).unwrap(),
        6 | 7 => {
            let tcp = builder.ipv4([10, 0, 1, 5], [10, 0, 9, 9], 64).tcp(from_port, to_port, 7, 100);
            let tcp = tcp.options_raw(&options(random)).unwrap();
            let tcp = if random.next(2) == 0 { tcp.syn() } else { tcp.ack(3) };
            tcp.write(&mut bytes, &payload).unwrap();
        }
        _ => {
            let mut tcp = builder.ipv6(from, to, hops).tcp(from_port, to_port, 7, 100);
            tcp = tcp.options_raw(&options(random)).unwrap();
            for flag in [random.next(6), random.next(9)] {
                tcp = match flag {
                    0 => tcp.fin(),
                    1 => tcp.rst(),
                    2 => tcp.ack(3),
                    3 => tcp.psh(),
                    _ => tcp.syn(),
                };
            }
            tcp.write(&mut bytes, &payload).unwrap();
        }
    }
    bytes
}

/// Questions to a resolver and its answers, of both families, among others.
fn invent_resolver(random: &mut Random) -> Vec<u8> {
    if random.next(4) == 0 {
        return invent_dualstack(random);
    }
    let builder = etherparse::PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    let says = random.next(3) == 0;
    let (near, far) = if says {
        (random.of(&[53, 53, 1500, 54]), random.of(&[1000, 1001, 53]))
    } else {
        (random.of(&[53, 53, 53, 1500, 54, 80]), random.of(&[1000, 1001, 53]))
    };
    let (from_port, to_port) = if says { (near, far) } else { (far, near) };
    let mut bytes = Vec::new();
    let with_ip = if random.next(2) == 0 {
        let client = random.of(&[[10, 0, 1, 5], [10, 0, 1, 6], [10, 0, 1, 7], [10, 1, 0, 1], [10, 0, 9, 9]]);
        let resolver = random.of(&[[10, 0, 0, 2], [169, 254, 169, 253], [10, 0, 0, 3]]);
        let (from, to) = if says { (resolver, client) } else { (client, resolver) };
        builder.ipv4(from, to, 64)
    } else {
        let client = random.of(&[six(5), six(6), six(0x99)]);
        let everywhere = [0xfd, 0, 0x0e, 0xc2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0x53];
        let resolver = random.of(&[six(0x53), everywhere, six(0x54)]);
        let (from, to) = if says { (resolver, client) } else { (client, resolver) };
        builder.ipv6(from, to, 64)
    };
    match random.next(3) {
        0 => with_ip.tcp(from_port, to_port, 7, 100).syn().write(&mut bytes, &[]).unwrap(),
        _ => with_ip.udp(from_port, to_port).write(&mut bytes, &[0x5a; 20]).unwrap(),
    }
    bytes
}

/// A message of neighbour discovery with so many units of options.
fn discovery(source: [u8; 16], target: [u8; 16], kind: u8, hops: u8, units: usize) -> Vec<u8> {
    let mut group = [0; 16];
    (group[0], group[1], group[11], group[12]) = (0xff, 2, 1, 0xff);
    group[13..].copy_from_slice(&target[13..]);
    let mut body = vec![0; 4];
    body.extend(target);
    for _ in 0..units {
        body.extend([if source == [0; 16] { 14 } else { 1 }, 1, 2, 0, 0, 0, 0, 1]);
    }
    let mut bytes = Vec::new();
    etherparse::PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [0x33, 0x33, 0xff, 0, 0, 1])
        .ipv6(source, group, hops)
        .icmpv6_raw(kind, 0, body[..4].try_into().unwrap())
        .write(&mut bytes, &body[4..])
        .unwrap();
    bytes
}

/// The answer to a frame that was forwarded.
fn answer(random: &mut Random, frame: &[u8]) -> Vec<u8> {
    let port = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
    let builder = etherparse::PacketBuilder::ethernet2([2, 0, 0, 0, 0, 3], [2, 0, 0, 0, 0, 4]);
    let (builder, protocol, from_port, to_port) = if frame[12..14] == [8, 0] {
        let part = |at: usize| -> Ipv4 { frame[at..at + 4].try_into().unwrap() };
        (builder.ipv4(part(30), part(26), 64), frame[23], port(36), port(34))
    } else {
        let part = |at: usize| -> [u8; 16] { frame[at..at + 16].try_into().unwrap() };
        (builder.ipv6(part(38), part(22), 64), frame[20], port(56), port(54))
    };
    let mut bytes = Vec::new();
    if protocol == 17 {
        builder.udp(from_port, to_port).write(&mut bytes, b"answer").unwrap();
        return bytes;
    }
    let tcp = builder.tcp(from_port, to_port, 5, 100);
    let tcp = match random.next(8) {
        0 => tcp.rst(),
        1 => tcp.fin().ack(1),
        2 | 3 => tcp.ack(1),
        _ => tcp.syn().ack(1),
    };
    tcp.write(&mut bytes, &[]).unwrap();
    bytes
}

/// An ICMP error about a frame that was forwarded, from whoever got it.
fn complaint(random: &mut Random, frame: &[u8]) -> Vec<u8> {
    if frame[12..14] == [0x86, 0xdd] {
        return complaint6(random, frame);
    }
    let to: Ipv4 = frame[26..30].try_into().unwrap();
    let from = random.of(&[[10, 0, 1, 21], [10, 0, 1, 5], [10, 7, 7, 7], frame[30..34].try_into().unwrap()]);
    let builder = etherparse::PacketBuilder::ethernet2([2, 0, 0, 0, 0, 3], [2, 0, 0, 0, 0, 4]);
    let held = (14 + random.of(&[20, 27, 28, 28, 28, 38, 40, 60])).min(frame.len());
    let (kind, code) = (random.of(&[3, 3, 11, 12, 4, 5]), random.of(&[0, 3, 4]));
    let mut bytes = Vec::new();
    builder
        .ipv4(from, to, random.of(&[64, 64, 1]))
        .icmpv4_raw(kind, code, [0, 0, 5, 0])
        .write(&mut bytes, &frame[14..held])
        .unwrap();
    bytes
}

/// The same over IPv6.
fn complaint6(random: &mut Random, frame: &[u8]) -> Vec<u8> {
    let part = |at: usize| -> [u8; 16] { frame[at..at + 16].try_into().unwrap() };
    let from = random.of(&[six(0x15), six(5), OUTSIDE, part(38)]);
    let builder = etherparse::PacketBuilder::ethernet2([2, 0, 0, 0, 0, 3], [2, 0, 0, 0, 0, 4]);
    let held = (14 + random.of(&[40, 47, 48, 48, 48, 58, 60, 80])).min(frame.len());
    let (kind, code) = (random.of(&[1, 1, 2, 3, 4, 4, 5]), random.of(&[0, 1, 2, 3, 4]));
    let rest = random.of(&[[0; 4], [0, 0, 5, 0], [0, 0, 5, 220], [0, 0, 0, 6], [0, 0, 0, 40]]);
    let mut bytes = Vec::new();
    builder
        .ipv6(from, part(22), random.of(&[64, 64, 1]))
        .icmpv6_raw(kind, code, rest)
        .write(&mut bytes, &frame[14..held])
        .unwrap();
    bytes
}

/// An address of the VPCs'.
const fn six(last: u8) -> [u8; 16] {
    [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]
}

/// An address of neither.
const OUTSIDE: [u8; 16] = [0xfd, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5];

/// Where a piece of a datagram is, and its bytes: few pieces, so that they meet.
fn part_of(random: &mut Random) -> (usize, Vec<u8>, bool) {
    let to_port = random.of(&[80, 81]);
    let datagram = [&[3, 232, 0, to_port, 0, 200, 0x12, 0x34][..], &[0x5a; 192]].concat();
    let size = random.of(&[48, 48, 56]);
    let at = random.next(4) * size;
    let end = (at + size).min(datagram.len());
    (at, datagram[at..end].to_vec(), end < datagram.len())
}

/// A piece of a datagram: few datagrams, so that they meet.
fn piece(random: &mut Random) -> Vec<u8> {
    let (from, to) = (
        random.of(&[[10, 0, 1, 5], [10, 0, 1, 6]]),
        random.of(&[[10, 0, 9, 9], [10, 0, 9, 9], [10, 0, 1, 5]]),
    );
    let (at, part, is_followed) = part_of(random);
    let mut header = etherparse::Ipv4Header::new(
        u16::try_from(part.len()).unwrap(),
        64,
        etherparse::IpNumber::UDP,
        from,
        to,
    )
    .unwrap();
    header.dont_fragment = false;
    header.identification = u16::try_from(random.next(4)).unwrap();
    header.more_fragments = is_followed;
    header.fragment_offset = etherparse::IpFragOffset::try_new(u16::try_from(at / 8).unwrap()).unwrap();
    header.header_checksum = header.calc_header_checksum();
    let mut bytes = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0];
    header.write(&mut bytes).unwrap();
    bytes.extend_from_slice(&part);
    bytes
}

/// The same over IPv6, and at times a whole datagram with a fragment header (RFC 6946).
fn piece6(random: &mut Random) -> Vec<u8> {
    let (from, to) = (random.of(&[six(5), six(6)]), random.of(&[six(0x99), six(0x99), six(5)]));
    let (at, part, is_followed) = part_of(random);
    let (at, is_followed) = if random.next(16) == 0 { (0, false) } else { (at, is_followed) };
    let place = u16::try_from(at).unwrap() | u16::from(is_followed);
    let id = u32::try_from(random.next(4)).unwrap() * random.of(&[1, 0x1_0001]);
    let length = u16::try_from(8 + part.len()).unwrap();
    let protocol = random.of(&[17, 17, 17, 17, 17, 6, 58]);
    [
        &[2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x86, 0xdd, 0x60, 0, 0, 0][..],
        &length.to_be_bytes(),
        &[44, 64],
        &from,
        &to,
        &[protocol, 0],
        &place.to_be_bytes(),
        &id.to_be_bytes(),
        &part,
    ]
    .concat()
}

fn mutate(random: &mut Random, frame: &mut Vec<u8>) {
    for _ in 0..random.next(3) {
        let at = random.next(frame.len());
        frame[at] = u8::try_from(random.next(256)).unwrap();
    }
    if random.next(8) == 0 {
        frame.truncate(14 + random.next(frame.len() - 13));
    }
}

/// What a round of frames came to.
struct Outcome {
    /// Entries of flows, at most at a time.
    narrow: usize,
    wide: usize,
    /// Frames that left with another family than they came with.
    translated: usize,
    /// Fragments of IPv6 that were sent on.
    pieces: usize,
    /// ICMPv6 errors that were, whichever family they came with.
    complaints: usize,
    /// Connections with an IPv6 side whose sides do not count the same.
    streams6: usize,
    /// Addresses that have asked a resolver.
    callers: usize,
    /// Frames that a stack has sent to somebody.
    told: usize,
}

#[test]
fn xdp_and_the_host_agree_on_every_frame() {
    for (config, name) in configs() {
        check_ipv4(name, &compare(&format!("xdp-{name}"), &config, invent, &xdp()));
    }
}

#[test]
fn tcx_and_the_host_agree_on_every_frame() {
    for (config, name) in configs() {
        check_ipv4(name, &compare(&format!("tcx-{name}"), &config, invent, &tcx()));
    }
}

#[test]
fn xdp_and_the_host_agree_on_every_frame_of_either_family_and_of_both() {
    check_dualstack(&compare("xdp6", DUALSTACK, invent_dualstack, &xdp()));
    let outcome = compare("xdp6-ruled", &ruled(DUALSTACK), invent_dualstack, &xdp());
    assert!(outcome.wide > 0 && outcome.translated > 0, "flows came about");
}

#[test]
fn tcx_and_the_host_agree_on_every_frame_of_either_family_and_of_both() {
    check_dualstack(&compare("tcx6", DUALSTACK, invent_dualstack, &tcx()));
}

#[test]
fn both_programs_and_the_host_agree_on_what_targets_of_either_family_are_told_of_clients_of_either() {
    let config = DUALSTACK.replace("port = 8080", "port = 8080\nproxy_protocol_v2.enabled = true");
    let outcomes = [
        compare("xdp6-proxied", &config, invent_dualstack, &xdp()),
        compare("tcx6-proxied", &config, invent_dualstack, &tcx()),
    ];
    for outcome in outcomes {
        check_dualstack(&outcome);
        assert!(outcome.streams6 > 4, "{} connections have a header", outcome.streams6);
    }
}

#[test]
fn programs_for_trunks_do_what_the_host_does_behind_tags_and_put_on_those_of_the_other_side() {
    let xdp = Host { program: Program::XdpTrunk, tags: Tags::InFrame, ..xdp() };
    check_dualstack(&compare("xdp6-trunk", DUALSTACK, invent_dualstack, &xdp));
    let tcx = Host { program: Program::TcxTrunk, tags: Tags::Beside, ..tcx() };
    check_dualstack(&compare("tcx6-trunk", DUALSTACK, invent_dualstack, &tcx));
}

#[test]
fn both_programs_and_the_host_agree_on_what_becomes_of_questions_to_a_resolver_and_of_its_answers() {
    let config = DUALSTACK
        .replace(r#"interfaces = ["a"]"#, "interfaces = [\"a\"]\ndns = { inbound = [\"fd00::53\"] }");
    let outcomes = [
        compare("xdp-resolver", &config, invent_resolver, &xdp()),
        compare("tcx-resolver", &config, invent_resolver, &tcx()),
    ];
    for outcome in outcomes {
        assert!(outcome.callers > 4, "{} clients have asked", outcome.callers);
        assert!(outcome.told > 30, "{} answers found their way", outcome.told);
    }
}

fn check_ipv4(name: &str, outcome: &Outcome) {
    let Outcome { narrow, wide, .. } = outcome;
    assert!(*narrow > 0 && *wide == 0, "{name}: {narrow} and {wide} flows came about");
}

fn check_dualstack(outcome: &Outcome) {
    assert!(outcome.narrow > 0 && outcome.wide > 0, "flows of both widths came about");
    assert!(outcome.translated > 400, "{} frames were translated", outcome.translated);
    assert!(outcome.pieces > 50, "{} fragments of IPv6 were forwarded", outcome.pieces);
    assert!(outcome.complaints > 20, "{} ICMPv6 errors were forwarded", outcome.complaints);
}

/// A hook, as a test run knows it.
struct Host<P> {
    /// Its program, among the pinned ones.
    open: fn(&Path) -> P,
    /// What the program returns for what it drops, passes and redirects.
    actions: [u32; 3],
    /// Whether a test run takes such a frame.
    takes: fn(&[u8]) -> bool,
    /// Which of the pinned programs it is.
    program: Program,
    /// How it knows tags.
    tags: Tags,
}

fn xdp() -> Host<Xdp> {
    let open = |pin: &Path| Xdp::from_pin(pin, aya_obj::programs::XdpAttachType::Interface).unwrap();
    Host { open, actions: [1, 2, 4], takes: |_| true, program: Program::Xdp, tags: Tags::None }
}

fn tcx() -> Host<SchedClassifier> {
    // A test run refuses to make socket buffers of frames that are too short for the IP header that they promise.
    let takes = |frame: &[u8]| match frame[12..14] {
        [0x08, 0x00] => frame.len() >= 34,
        [0x86, 0xdd] => frame.len() >= 54,
        _ => true,
    };
    let open = |pin: &Path| SchedClassifier::from_pin(pin).unwrap();
    Host { open, actions: [2, u32::MAX, 7], takes, program: Program::Tcx, tags: Tags::None }
}

/// Targets that are told who the client is, clients that may not come in, and all others.
fn configs() -> [(String, &'static str); 3] {
    let proxied = CONFIG.replace("port = 8080", "port = 8080\nproxy_protocol_v2.enabled = true");
    [(CONFIG.to_owned(), "plain"), (proxied, "proxied"), (ruled(CONFIG), "ruled")]
}

/// The same with rules, by which some of the clients may come in with some of their packets.
fn ruled(config: &str) -> String {
    config
        .replace("service = \"s\"\n", "service = \"s\"\nsecurity_groups = [\"clients\"]\n")
        .replace("vpc = \"b\"\naddresses", "vpc = \"b\"\nsecurity_groups = [\"edge\"]\naddresses")
        + &if config.contains("fd00") { RULES.to_owned() } else { RULES.replace(", \"fd00::80/121\"", "") }
}

const RULES: &str = r#"
[security_groups.clients]
vpc = "a"
members = ["10.0.1.6", "fd00::6"]
ingress = [
  { protocol = "tcp", ports = "80-90", sources = ["10.0.1.4/31", "fd00::/64"] },
  { protocol = "all", sources = ["clients"] },
]
[security_groups.edge]
vpc = "b"
ingress = [
  { protocol = "tcp", ports = "80-81", sources = ["0.0.0.0/0", "::/0"] },
  { protocol = "udp", ports = "0-80", sources = ["10.0.1.6"] },
]
[network_acls.consumer]
vpc = "a"
subnets = ["10.0.9.0/24", "fd00::80/121"]
ingress = [
  { rule = 10, action = "deny", protocol = "udp", ports = "81", cidr = "0.0.0.0/0" },
  { rule = 20, action = "allow", protocol = "all", cidr = "0.0.0.0/0" },
  { rule = 30, action = "allow", protocol = "tcp", ports = "1-81", cidr = "::/0" },
]
egress = [
  { rule = 10, action = "deny", protocol = "tcp", ports = "1001", cidr = "0.0.0.0/0" },
  { rule = 20, action = "allow", protocol = "all", cidr = "10.0.0.0/16" },
  { rule = 21, action = "allow", protocol = "all", cidr = "fd00::/64" },
]
[network_acls.provider]
vpc = "b"
subnets = ["10.0.1.22/32"]
ingress = [{ rule = 1, action = "allow", protocol = "tcp", ports = "8080", cidr = "10.0.1.10/32" }]
egress = [{ rule = 1, action = "allow", protocol = "tcp", ports = "2048-65535", cidr = "10.0.1.10/32" }]
"#;

/// What a program returns for a frame, and the frame as the path leaves it, and with the tags that it is seen to have then.
fn on_the_host(memory: &Memory, frame: &[u8], tags: Tags, came: &[Tag]) -> ((u32, Vec<u8>), Vec<u8>) {
    let (action, frame) = decide(memory, frame, flows::now());
    let returned = match action {
        None | Some(Action::Hold) => 1,
        Some(Action::Pass) => 2,
        Some(Action::Forward { .. } | Action::Steer { .. } | Action::Answer(_)) => 4,
    };
    let left = tagged(&frame, &tags.left(action, came));
    ((returned, frame), left)
}

/// Hands the same frames to the hook's program and to the host.
fn compare<P>(name: &str, config: &str, invent: fn(&mut Random) -> Vec<u8>, hook: &Host<P>) -> Outcome
where
    P: for<'a> TestRun<Opts<'a> = TestRunOptions<'a>, Result = TestRunResult>,
{
    let pins = Pins(format!("/sys/fs/bpf/plt-twin-{name}-{}", std::process::id()).into());
    let model = model::parse(config, "twin.toml").unwrap();
    let mut kernel =
        Kernel::open(&pins.0, &model.limits, Drops::Counted).expect("loading programs needs root");
    kernel.load(hook.program).unwrap();
    let maps: Maps = kernel.maps().unwrap();
    let mut names = Names::default();
    let image =
        plan::compile(&model, &mut names, &plan::Known::connected(&model), |vpc| format!("stack-{vpc}"))
            .unwrap();
    reconcile::apply(&maps, &Image::default(), &image).unwrap();
    for (key, hop) in neighbours(&image) {
        maps.neighbours.set(&key, &hop).unwrap();
    }
    let mtu = if config.contains("proxy_protocol_v2") { MTU + HEADER } else { MTU };
    for place in image.interfaces.values() {
        // Nothing leaves: a test run returns the verdict. The loopback interface stands for all of them.
        maps.egress.set(&place.slot.into(), &[1, 0]).unwrap();
        maps.mtus.set(&place.slot.into(), &mtu).unwrap();
        maps.egress_tcx.set(&place.slot.into(), &1).unwrap();
    }
    let slots: Vec<u16> = image.interfaces.values().map(|place| place.slot).collect();
    let interfaces = interfaces(&image);
    let memory = memory(image);
    memory.mtus.borrow_mut().extend(slots.into_iter().map(|slot| (slot, mtu)));
    hook.tags.set_up(&maps, &interfaces);
    let program = (hook.open)(&pins.0.join("programs").join(hook.program.name()));

    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let (mut sent, mut verdicts, mut translated, mut told) = (Vec::<Vec<u8>>::new(), [0usize; 5], 0, 0);
    let (mut pieces, mut complaints, mut narrow, mut wide) = (0, 0, 0, 0);
    for number in 0..FRAMES {
        if number % 64 == 0 {
            // ICMP errors are counted by the second, and the two clocks are not one.
            memory.bucket.set(Bucket::default());
            for id in memory.image.endpoints.keys() {
                maps.buckets.set(id, &Bucket::default()).unwrap();
            }
        }
        let (mut frame, interface) = match random.next(4) {
            0 if !sent.is_empty() => {
                let chosen = sent[random.next(sent.len())].clone();
                let frame = match random.next(2) {
                    0 => complaint(&mut random, &chosen),
                    _ => answer(&mut random, &chosen),
                };
                (frame, interfaces[random.of(&[1, 1, 1, 1, 0])])
            }
            1 if random.next(3) == 0 => {
                let wide = config.contains("fd00") && random.next(2) == 0;
                (if wide { piece6(&mut random) } else { piece(&mut random) }, interfaces[0])
            }
            _ => (
                invent(&mut random),
                if random.next(5) == 0 { random.of(&interfaces) } else { interfaces[0] },
            ),
        };
        if random.next(3) == 0 {
            mutate(&mut random, &mut frame);
        }
        if !(hook.takes)(&frame) || !hook.tags.take(&frame) {
            continue;
        }
        maps.interfaces.set(&1, &interface).unwrap();
        memory.interface.set(interface);
        let came = hook.tags.came(interface, u8::try_from(number % 8).unwrap());
        let (host, left) = on_the_host(&memory, &frame, hook.tags, &came);
        let mut kernel = in_the_kernel(&program, &tagged(&frame, &came));
        kernel.0 = [1, 2, 4][hook.actions.iter().position(|action| *action == kernel.0).unwrap()];
        let wanted = (host.0, left);
        assert_eq!(wanted, kernel, "frame {number}: {frame:02x?} in VPC {}", interface.vpc);
        verdicts[host.0 as usize] += 1;
        narrow = narrow.max(memory.established.borrow().len());
        wide = wide.max(memory.established6.borrow().len());
        told += usize::from(host.0 == 4 && interface.stack != 0);
        if host.0 == 4 && frame.get(12..14) != host.1.get(12..14) {
            translated += 1;
        }
        let is_ipv6 = host.0 == 4 && host.1.len() >= 58 && host.1[12..14] == [0x86, 0xdd];
        pieces += usize::from(is_ipv6 && host.1[20] == 44);
        // One that has come, and not one that answers.
        let complains = matches!((frame.get(23), frame.get(20)), (Some(1), _) | (_, Some(58)));
        complaints += usize::from(is_ipv6 && host.1[20] == 58 && host.1[54] < 128 && complains);
        let ipv4 = host.1.len() >= 38 && host.1[12..14] == [8, 0] && matches!(host.1[23], 6 | 17);
        let ipv6 = host.1.len() >= 58 && host.1[12..14] == [0x86, 0xdd] && matches!(host.1[20], 6 | 17);
        if host.0 == 4 && (ipv4 || ipv6) {
            sent.push(host.1);
        }
        if sent.len() > 64 {
            sent.remove(0);
        }
    }
    let (last, last_wide) = (memory.established.borrow().len(), memory.established6.borrow().len());
    assert_eq!(last, maps.established.keys().unwrap().len(), "established entries");
    assert_eq!(last_wide, maps.established6.keys().unwrap().len(), "established entries of wide flows");
    assert!(
        verdicts[1] > FRAMES / 20 && verdicts[2] > FRAMES / 20 && verdicts[4] > FRAMES / 20,
        "{verdicts:?} is no test of much"
    );
    assert_eq!(memory.streams.borrow().len(), maps.streams.keys().unwrap().len(), "streams");
    let callers = memory.callers.borrow().len();
    assert_eq!(callers, maps.callers.keys().unwrap().len(), "callers");
    let streams6 = memory.streams6.borrow().len();
    assert_eq!(streams6, maps.streams6.keys().unwrap().len(), "streams of wide flows");
    Outcome { narrow, wide, translated, pieces, complaints, streams6, callers, told }
}
