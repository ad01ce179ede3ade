//! Sequence numbers: which ICMP errors and RSTs are believed for them, and in whose numbers an error speaks.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests: a panic with its place is what is wanted")]

use privatelink_tests::bench::{Bench, DROP, REDIRECT, Segments, both, each, reply, side};
use privatelink_tests::packet::{ACK, FIN, Packet, Packet6, RST, SYN, addresses, addresses6, checksum, six};
use privatelink_tests::world::{UNCHECKED, World, config, dualstack};

/// The target's initial sequence number.
const BACK: u32 = 5000;

/// A connection of the shop's.
struct Connection<'a> {
    bench: &'a Bench,
    /// The consumer's initial sequence number.
    first: u32,
    /// Its SYN, as the target got it.
    syn: Vec<u8>,
}

fn number(frame: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(frame[at..at + 4].try_into().unwrap())
}

/// So many bytes of data.
fn data(count: usize) -> Vec<u8> {
    (1..=250).cycle().take(count).collect()
}

/// The error about a frame that arrived, of whose packet so many bytes are held, from its receiver.
fn error(arrived: &[u8], held: usize) -> Vec<u8> {
    let (from, _, to, _) = addresses(arrived);
    let macs = (arrived[..6].try_into().unwrap(), arrived[6..12].try_into().unwrap());
    let about = Packet { from: to, to: from, from_mac: macs.0, to_mac: macs.1, ..Packet::tcp(0) };
    let held = held.min(arrived.len() - 14);
    about.icmp_code(3, 4, &[&[0, 0, 5, 0], &arrived[14..14 + held]].concat())
}

/// What its sender should get of it: the packet as it left there, one hop on. The link-layer addresses are those of `out`.
fn restored(left: &Packet, held: usize, out: &[u8]) -> Vec<u8> {
    let original = Packet { ttl: left.ttl - 1, ..left.clone() }.build()[14..].to_vec();
    let macs = (out[..6].try_into().unwrap(), out[6..12].try_into().unwrap());
    let about =
        Packet { from: left.to, to: left.from, to_mac: macs.0, from_mac: macs.1, ttl: 63, ..Packet::tcp(0) };
    about.icmp_code(3, 4, &[&[0, 0, 5, 0], &original[..held.min(original.len())]].concat())
}

impl<'a> Connection<'a> {
    fn begin(bench: &'a Bench, first: u32) -> Self {
        let from_port = u16::try_from(first % 50000).unwrap();
        let (verdict, syn) = bench.run("ca", &Packet { from_port, seq: first, ..Packet::tcp(SYN) }.build());
        assert_eq!(verdict, REDIRECT);
        Self { bench, first, syn }
    }

    fn open(bench: &'a Bench, first: u32) -> Self {
        let it = Self::begin(bench, first);
        it.back(SYN | ACK, 0, 1, b"");
        it.forth(ACK, 1, 1, b"");
        it
    }

    /// A segment of the consumer's, by offsets from both initial numbers, as the target gets it.
    fn forth(&self, flags: u8, seq: u32, ack: u32, payload: &[u8]) -> Vec<u8> {
        let (seq, ack) = (self.first.wrapping_add(seq), BACK.wrapping_add(ack));
        let from_port = u16::try_from(self.first % 50000).unwrap();
        let packet = Packet { from_port, seq, ack, payload: payload.to_vec(), ..Packet::tcp(flags) };
        let (verdict, arrived) = self.bench.run("ca", &packet.build());
        assert_eq!(verdict, REDIRECT, "{flags:#x}");
        arrived
    }

    /// A segment of the target's, likewise.
    fn back(&self, flags: u8, seq: u32, ack: u32, payload: &[u8]) -> Vec<u8> {
        let (seq, ack) = (BACK.wrapping_add(seq), self.first.wrapping_add(ack));
        let packet = Packet { seq, ack, ..reply(&self.syn, flags, payload) };
        let (verdict, arrived) = self.bench.run(self.at(), &packet.build());
        assert_eq!(verdict, REDIRECT, "{flags:#x}");
        arrived
    }

    fn at(&self) -> &'static str {
        side(addresses(&self.syn).2)
    }

    /// An error about a packet that arrived, as if its sequence number had been another.
    fn complain(&self, arrived: &[u8], number: u32, is_believed: bool, name: &str) {
        let mut about = arrived.to_vec();
        about[38..42].copy_from_slice(&number.to_be_bytes());
        let is_back = arrived[26..30] == [10, 0, 9, 9];
        let (at, vpc) = if is_back { ("ca", "shop") } else { (self.at(), "payments") };
        let frame = error(&about, 28);
        let name = format!("{name}: {number} of {}", self.first);
        if !is_believed {
            return self.bench.refused(&name, at, &frame, &format!("{vpc} icmp_out_of_window"));
        }
        let counter = if is_back { "shop to_provider_packets" } else { "shop to_consumer_packets" };
        let out = self.bench.expect(&name, at, &frame, REDIRECT, &[(counter, 1)]);
        assert_eq!(out[66..70], about[38..42], "{name}: the number stays");
    }

    fn state(&self) -> String {
        let port = format!(":{}", self.first % 50000);
        let flows = self.bench.world.json("flows");
        let of = |flow: &&serde_json::Value| flow["client"].as_str().unwrap().ends_with(&port);
        flows.as_array().unwrap().iter().find(of).unwrap()["state"].as_str().unwrap().to_owned()
    }
}

#[test]
fn an_error_is_believed_about_what_is_in_flight_and_about_nothing_else() {
    each("", |bench| {
        // One of them begins again at zero on its way.
        for first in [41_000, u32::MAX - 150] {
            let it = Connection::begin(bench, first);
            let at = |offset: u32| first.wrapping_add(offset);
            it.complain(&it.syn, first, true, "a SYN that nobody has answered");
            it.complain(&it.syn, at(1), false, "not sent");
            it.complain(&it.syn, at(1 << 31), false, "nothing like it");
            let answer = it.back(SYN | ACK, 0, 1, b"");
            it.complain(&answer, BACK, true, "a SYN-ACK");
            it.complain(&answer, BACK + 1, false, "not sent");
            it.complain(&it.syn, first, false, "a SYN that was answered");
            it.forth(ACK, 1, 1, b"");
            it.complain(&answer, BACK, false, "a SYN-ACK that was answered");
            let sent = it.forth(ACK, 1, 1, &data(100));
            it.forth(ACK, 101, 1, &data(100));
            // What comes late or again moves nothing.
            it.forth(ACK, 51, 1, &data(50));
            for offset in [1, 101, 200, 201] {
                it.complain(&sent, at(offset), true, "in flight");
            }
            it.back(ACK, 1, 101, b"");
            for (offset, is_believed) in [
                (0, false),
                (1, false),
                (100, false),
                (101, true),
                (150, true),
                (201, true),
                (202, false),
                (1 << 31, false),
                (0xffff_0000, false),
            ] {
                it.complain(&sent, at(offset), is_believed, "after half of it");
            }
            let sent = it.back(ACK, 1, 101, &data(50));
            it.complain(&sent, BACK + 1, true, "the target's");
            it.complain(&sent, BACK + 51, true, "the target's");
            it.complain(&sent, BACK, false, "the target's");
            it.complain(&sent, BACK + 52, false, "the target's");
            // A consumer that has said nothing more, and has everything.
            let silent = it.forth(ACK, 201, 51, b"");
            it.complain(&sent, BACK + 51, true, "what follows");
            it.complain(&sent, BACK + 50, false, "acknowledged");
            it.back(ACK, 51, 201, b"");
            it.complain(&silent, at(201), true, "a segment without data");
            it.complain(&silent, at(200), false, "a segment without data");
            if !bench.is_xdp() {
                // Three segments that are one frame yet.
                let from_port = u16::try_from(first % 50000).unwrap();
                let (seq, ack, payload) = (at(201), BACK + 51, data(3000));
                let large = Packet { from_port, seq, ack, payload, ..Packet::tcp(ACK) }.build();
                assert_eq!(bench.run_segments("ca", &large, Segments(3, 1000)).0, REDIRECT);
                it.complain(&silent, at(2201), true, "the last of three");
                it.complain(&silent, at(3202), false, "behind the last of three");
            }
        }
    });
}

#[test]
fn who_acknowledges_what_was_never_sent_makes_no_error_unbelievable() {
    let bench = Bench::new("");
    let it = Connection::open(&bench, 41_000);
    let sent = it.forth(ACK, 1, 1, &data(100));
    it.back(ACK, 1, 90_000, b"");
    it.complain(&sent, 41_001, true, "in flight");
}

#[test]
fn a_reset_out_of_the_window_is_forwarded_and_leaves_the_flow_as_it_is() {
    each("", |bench| {
        let it = Connection::open(bench, 42_000);
        it.forth(ACK, 1, 1, &data(100));
        it.back(ACK, 1, 51, &data(30));
        for offset in [0, 50, 102 + 1, 1 << 20, 1 << 31] {
            it.forth(RST | ACK, offset, 1, b"");
            assert_eq!(it.state(), "established", "the consumer's, {offset}");
        }
        for offset in [0, 33, 1 << 31] {
            it.back(RST, offset, 51, b"");
            assert_eq!(it.state(), "established", "the target's, {offset}");
        }
        it.forth(FIN | ACK, 101, 31, b"");
        // It follows the FIN, and counts it.
        it.forth(RST, 102, 31, b"");
        assert_eq!(it.state(), "reset");
        let it = Connection::open(bench, 43_000);
        it.back(RST, 1, 1, b"");
        assert_eq!(it.state(), "reset", "the target's next number");
    });
}

/// The checksum of a quoted segment that is held as a whole is right for the addresses that it is quoted with.
fn is_sound(quoted: &[u8]) -> bool {
    let length = u16::try_from(quoted.len() - 20).unwrap().to_be_bytes();
    checksum(&[&quoted[12..20], &[0, 6], &length, &quoted[20..]]) == 0
}

#[test]
fn an_error_about_a_flow_whose_sides_count_differently_speaks_in_the_numbers_of_who_gets_it() {
    for (cookies, proxied) in [(false, true), (true, false), (true, true)] {
        let extra = if cookies { "syn_cookies = \"always\"\n" } else { "" };
        let proxy = if proxied {
            format!("{UNCHECKED} }}\nproxy_protocol_v2 = {{ enabled = true")
        } else {
            UNCHECKED.into()
        };
        for bench in both(|hook| World::new(&config(&format!("{hook}{extra}"), &proxy))) {
            speaks_in_the_numbers_of_who_gets_it(&bench, cookies, proxied);
        }
    }
}

fn speaks_in_the_numbers_of_who_gets_it(bench: &Bench, cookies: bool, proxied: bool) {
    let name = format!("cookies {cookies}, header {proxied}");
    let first = 44_000_u32;
    let segment = |flags, seq, ack, payload: &[u8]| Packet {
        seq,
        ack,
        payload: payload.to_vec(),
        ..Packet::tcp(flags)
    };
    let forth = |packet: &Packet| bench.run("ca", &packet.build()).1;
    let syn = segment(SYN, first, 0, b"");
    let mut arrived = forth(&syn);
    // What the consumer believes to be the target's initial number.
    let mut told = BACK;
    if cookies {
        told = number(&arrived, 38);
        let confirmed = segment(ACK, first + 1, told.wrapping_add(1), b"");
        arrived = forth(&confirmed);
        // The path's own SYN stands for the consumer's word that it has heard.
        let out = bench.run(side(addresses(&arrived).2), &error(&arrived, 28)).1;
        assert_eq!(number(&out, 66), first + 1, "{name}: the path's SYN");
    } else {
        let out = bench.run(side(addresses(&arrived).2), &error(&arrived, 40)).1;
        assert_eq!(out, restored(&syn, 40, &out), "{name}: the SYN");
    }
    let at = side(addresses(&arrived).2);
    let back = |flags, seq, ack, payload: &[u8]| Packet { seq, ack, ..reply(&arrived, flags, payload) };
    let answer = back(SYN | ACK, BACK, first + 1, b"");
    assert_eq!(bench.run(at, &answer.build()).0, REDIRECT, "{name}");
    let hello = segment(ACK, first + 1, told.wrapping_add(1), b"");
    let header = forth(&hello);
    let shift = if proxied { 100 } else { 0 };
    assert_eq!((number(&header, 38), header.len()), (first + 1, 54 + shift as usize), "{name}");
    // What took the header along is the consumer's first segment.
    let out = bench.run(at, &error(&header, 28)).1;
    assert_eq!(out[66..70], (first + 1).to_be_bytes(), "{name}: with the header");
    assert_eq!(number(&out, 38), 1280 - shift, "{name}: what fits without it");
    assert_eq!(bench.run(at, &back(ACK, BACK + 1, first + 1 + shift, b"").build()).0, REDIRECT);

    forth(&segment(ACK, first + 1, told.wrapping_add(1), b"heard"));
    let there = segment(ACK, first + 6, told.wrapping_add(1), b"odd");
    let there_arrived = forth(&there);
    assert_eq!(number(&there_arrived, 38), first + 6 + shift, "{name}");
    let here = back(ACK, BACK + 1, first + 6 + shift, b"even");
    let here_arrived = bench.run(at, &here.build()).1;
    assert_eq!((number(&here_arrived, 38), number(&here_arrived, 42)), (told.wrapping_add(1), first + 6));
    for (sent, arrived, by) in [(&there, &there_arrived, at), (&here, &here_arrived, "ca")] {
        // Not where a number or the checksum is cut off: what is left of it stays as it is.
        for held in [28, 32, 33, 34, 36, 38, 40, arrived.len() - 14] {
            let frame = error(arrived, held);
            let (verdict, out) = bench.run(by, &frame);
            assert_eq!(verdict, REDIRECT, "{name}: {held} bytes");
            assert_eq!(out, restored(sent, held, &out), "{name}: {held} bytes of {by}");
        }
        let whole = bench.run(by, &error(arrived, arrived.len())).1;
        assert!(is_sound(&whole[42..]), "{name}: its own checksum");
        // The numbers of its own side are not those that it left with.
        for (by_how_much, verdict) in [(u32::MAX, DROP), (5, DROP), (3, REDIRECT)] {
            let mut about = arrived.clone();
            about[38..42].copy_from_slice(&number(arrived, 38).wrapping_add(by_how_much).to_be_bytes());
            assert_eq!(bench.run(by, &error(&about, 28)).0, verdict, "{name}: {by_how_much} from {by}");
        }
    }
}

#[test]
fn the_same_holds_for_flows_with_an_ipv6_side() {
    for bench in both(|hook| World::dualstack(&dualstack(hook, UNCHECKED), &["t1", "t2"])) {
        for (over_six, to_port) in [(true, 81), (true, 80), (false, 81)] {
            let forth = |flags, seq, ack, payload: &[u8]| {
                let packet = Packet { to_port, seq, ack, payload: payload.to_vec(), ..Packet::tcp(flags) };
                let frame = match over_six {
                    true => Packet6::of(six(5), six(0x99), packet).build(),
                    false => packet.build(),
                };
                bench.run("ca", &frame)
            };
            let syn = forth(SYN, 1000, 0, b"").1;
            let is_six = syn[12..14] == [0x86, 0xdd];
            let at = if [0x21, 21].contains(&syn[if is_six { 53 } else { 33 }]) { "t1" } else { "t2" };
            let back = |flags, seq, ack, payload: &[u8]| {
                let macs = (syn[..6].try_into().unwrap(), syn[6..12].try_into().unwrap());
                let inner = Packet { from_mac: macs.0, to_mac: macs.1, seq, ack, ..Packet::tcp(flags) };
                let inner = Packet { payload: payload.to_vec(), ..inner };
                let frame = if is_six {
                    let (from, from_port, to, to_port) = addresses6(&syn);
                    Packet6::of(to, from, Packet { from_port: to_port, to_port: from_port, ..inner }).build()
                } else {
                    let (from, from_port, to, to_port) = addresses(&syn);
                    Packet { from: to, to: from, from_port: to_port, to_port: from_port, ..inner }.build()
                };
                bench.run(at, &frame)
            };
            assert_eq!(back(SYN | ACK, BACK, 1001, b"").0, REDIRECT);
            assert_eq!(forth(ACK, 1001, BACK + 1, b"").0, REDIRECT);
            let there = forth(ACK, 1001, BACK + 1, b"four").1;
            let here = back(ACK, BACK + 1, 1001, b"five5").1;
            for (arrived, by, first, length) in [(there, at, 1001, 4), (here, "ca", BACK + 1, 5)] {
                let is_six = arrived[12..14] == [0x86, 0xdd];
                let vpc = if by == "ca" { "shop" } else { "payments" };
                for (offset, is_believed) in
                    [(0, true), (length, true), (u32::MAX, false), (length + 1, false), (1 << 31, false)]
                {
                    let mut about = arrived.clone();
                    let place = if is_six { 58 } else { 38 };
                    about[place..place + 4].copy_from_slice(&u32::wrapping_add(first, offset).to_be_bytes());
                    let frame = if is_six {
                        let (from, _, to, _) = addresses6(&about);
                        Packet6::of(to, from, Packet::tcp(0)).icmp_code(
                            1,
                            4,
                            &[&[0; 4], &about[14..62]].concat(),
                        )
                    } else {
                        error(&about, 28)
                    };
                    let name = format!("{by} port {to_port}, {offset}");
                    if is_believed {
                        assert_eq!(bench.run(by, &frame).0, REDIRECT, "{name}");
                    } else {
                        bench.refused(&name, by, &frame, &format!("{vpc} icmp_out_of_window"));
                    }
                }
            }
        }
    }
}
