//! Flows whose two sides do not count the same, segment by segment.

use crate::memory::{CONFIG, Memory, RESET, interfaces, memory, on_the_host};
use etherparse::{PacketBuilder, SlicedPacket, TcpHeader, TcpOptionElement, TcpSlice, TransportSlice};
use privatelink::names::Names;
use privatelink::{model, plan};
use privatelink_common::limits::{COOKIE_LIFE, COOKIES_HOLD};
use privatelink_common::tables::{Endpoint, Interface};
use privatelink_common::wire::Ipv4;

pub(crate) const CLIENT: (Ipv4, u16) = ([10, 0, 1, 5], 1000);
pub(crate) const ENDPOINT: (Ipv4, u16) = ([10, 0, 9, 9], 80);
/// When it all happens, in seconds since boot.
pub(crate) const NOW: u32 = 5000;
/// The consumer's and the target's initial sequence numbers, both about to wrap.
const THERE: u32 = u32::MAX - 3;
const BACK: u32 = u32::MAX - 10;

use TcpOptionElement::{
    MaximumSegmentSize, Noop, SelectiveAcknowledgement, SelectiveAcknowledgementPermitted, Timestamp,
    WindowScale,
};

/// A consumer, an endpoint and its targets, whose SYNs are answered with cookies from the first on.
pub(crate) struct Cookies {
    memory: Memory,
    interfaces: Vec<Interface>,
}

/// What one segment says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Says {
    pub(crate) flags: &'static str,
    pub(crate) sequence: u32,
    pub(crate) acknowledgement: u32,
    window: u16,
    options: Vec<TcpOptionElement>,
    pub(crate) data: Vec<u8>,
}

pub(crate) fn says(flags: &'static str, sequence: u32, acknowledgement: u32, window: u16) -> Says {
    Says { flags, sequence, acknowledgement, window, options: vec![], data: vec![] }
}

impl Says {
    fn with(mut self, options: &[TcpOptionElement]) -> Self {
        self.options = options.to_vec();
        self
    }

    /// As [`read`] sees it.
    fn bare(mut self) -> Self {
        self.options.retain(|it| *it != Noop);
        self
    }

    pub(crate) fn data(mut self, data: &[u8]) -> Self {
        self.data = data.to_vec();
        self
    }

    fn frame(&self, from: (Ipv4, u16), to: (Ipv4, u16)) -> Vec<u8> {
        let mut header = TcpHeader::new(from.1, to.1, self.sequence, self.window);
        header.acknowledgment_number = self.acknowledgement;
        for flag in self.flags.chars() {
            match flag {
                'S' => header.syn = true,
                'F' => header.fin = true,
                'R' => header.rst = true,
                _ => header.ack = true,
            }
        }
        header.set_options(&self.options).unwrap();
        let builder = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]).ipv4(from.0, to.0, 64);
        let mut bytes = Vec::new();
        builder.tcp_header(header).write(&mut bytes, &self.data).unwrap();
        bytes
    }
}

/// Takes a frame apart, and checks its checksums by computing them anew.
pub(crate) fn read(frame: &[u8]) -> (Says, (Ipv4, u16), (Ipv4, u16)) {
    let packet = SlicedPacket::from_ethernet(frame).unwrap();
    let ip = packet.net.as_ref().unwrap().ipv4_ref().unwrap().header();
    let Some(TransportSlice::Tcp(tcp)) = &packet.transport else { panic!("no TCP") };
    assert_eq!(ip.header_checksum(), ip.to_header().calc_header_checksum(), "the IPv4 checksum");
    let sum = tcp.calc_checksum_ipv4(ip.source(), ip.destination()).unwrap();
    assert_eq!(tcp.checksum(), sum, "the TCP checksum");
    let flags = match (tcp.syn(), tcp.fin(), tcp.rst(), tcp.ack()) {
        (true, false, false, false) => "S",
        (true, false, false, true) => "SA",
        (false, false, false, true) => "A",
        (false, true, false, true) => "FA",
        (false, false, true, _) => "R",
        other => panic!("{other:?}"),
    };
    let options = tcp.options_iterator().map(Result::unwrap).filter(|it| *it != Noop).collect();
    let said = Says {
        flags,
        sequence: tcp.sequence_number(),
        acknowledgement: tcp.acknowledgment_number(),
        window: tcp.window_size(),
        options,
        data: TcpSlice::payload(tcp).to_vec(),
    };
    (said, (ip.source(), tcp.source_port()), (ip.destination(), tcp.destination_port()))
}

impl Cookies {
    fn new(cookies: u32) -> Self {
        Self::of(cookies, CONFIG)
    }

    /// The same, with targets that are told who the client is.
    pub(crate) fn proxied(cookies: u32) -> Self {
        Self::of(cookies, &CONFIG.replace("port = 8080", "port = 8080\nproxy_protocol_v2.enabled = true"))
    }

    fn of(cookies: u32, config: &str) -> Self {
        let two = config.replace(", { address = \"10.0.1.23\", zone = \"a\" }", "");
        let model = model::parse(&two, "streams.toml").unwrap();
        let image =
            plan::compile(&model, &mut Names::default(), &plan::Known::connected(&model), |_| "stack".into())
                .unwrap();
        let (interfaces, memory) = (interfaces(&image), memory(image));
        memory.limits.set(Endpoint { hold: 60, cookies, ..Endpoint::default() });
        Self { memory, interfaces }
    }

    /// From the consumer's side: what becomes of it, and the frame as it leaves.
    pub(crate) fn forth(&self, now: u32, segment: &Says) -> (u32, Vec<u8>) {
        self.memory.interface.set(self.interfaces[0]);
        on_the_host(&self.memory, &segment.frame(CLIENT, ENDPOINT), now)
    }

    /// From the target that got `there`.
    pub(crate) fn back(&self, there: &[u8], segment: &Says) -> (u32, Vec<u8>) {
        let (_, from, to) = read(there);
        self.memory.interface.set(self.interfaces[1]);
        on_the_host(&self.memory, &segment.frame(to, from), NOW)
    }

    /// The cookie that a SYN with these options is answered with, and the whole answer.
    fn cookie(&self, options: &[TcpOptionElement]) -> (u32, Says) {
        let (verdict, out) = self.forth(NOW, &says("S", THERE, 0, 64240).with(options));
        assert_eq!(verdict, RESET, "it is answered");
        let (answer, from, to) = read(&out);
        assert_eq!((from, to), (ENDPOINT, CLIENT));
        assert_eq!(
            self.memory.pending.borrow().len() + self.memory.streams.borrow().len(),
            0,
            "it is not kept"
        );
        assert_eq!((answer.flags, answer.acknowledgement, answer.window), ("SA", THERE.wrapping_add(1), 0));
        (answer.sequence, answer)
    }

    /// Opens a connection with these options on either side; returns the SYN at the target, the segment that tells the consumer, and the
    /// cookie.
    fn open(&self, offered: &[TcpOptionElement], answered: &[TcpOptionElement]) -> (Vec<u8>, Says, u32) {
        let (cookie, answer) = self.cookie(offered);
        let stamp = answer.options.iter().find_map(|it| match it {
            Timestamp(stamp, _) => Some(*stamp),
            _ => None,
        });
        let stamps: Vec<_> =
            stamp.map(|stamp| vec![Noop, Noop, Timestamp(70_001, stamp)]).unwrap_or_default();
        let ack = says("A", THERE.wrapping_add(1), cookie.wrapping_add(1), 501).with(&stamps);
        let (verdict, syn) = self.forth(NOW, &ack);
        assert_eq!(verdict, 4);
        let greeting = says("SA", BACK, THERE.wrapping_add(1), 65160).with(answered);
        let (verdict, told) = self.back(&syn, &greeting);
        assert_eq!(verdict, 4);
        let (told, from, to) = read(&told);
        assert_eq!((from, to), (ENDPOINT, CLIENT));
        (syn, told, cookie)
    }
}

/// What Linux offers.
fn usual(mss: u16) -> Vec<TcpOptionElement> {
    vec![
        MaximumSegmentSize(mss),
        SelectiveAcknowledgementPermitted,
        Timestamp(70_000, 0),
        Noop,
        WindowScale(8),
    ]
}

/// What Linux answers.
fn answered(scale: u8) -> Vec<TcpOptionElement> {
    vec![
        MaximumSegmentSize(8960),
        SelectiveAcknowledgementPermitted,
        Timestamp(u32::MAX - 5, 70_001),
        Noop,
        WindowScale(scale),
    ]
}

#[test]
fn a_cookies_answer_offers_what_the_consumer_offers_and_the_target_is_asked_for_the_same() {
    for (mss, told) in [(9000, 1460), (1460, 1460), (1459, 1380), (1300, 1300), (900, 536)] {
        let cookies = Cookies::new(1);
        let (_, answer) = cookies.cookie(&usual(mss));
        let [
            MaximumSegmentSize(1460),
            SelectiveAcknowledgementPermitted,
            Timestamp(stamp, 70_000),
            WindowScale(7),
        ] = answer.options[..]
        else {
            panic!("{:?}", answer.options)
        };
        assert_eq!(stamp / 64, NOW, "a clock");
        let (syn, ..) = cookies.open(&usual(mss), &answered(7));
        let expected = [
            MaximumSegmentSize(told),
            SelectiveAcknowledgementPermitted,
            Timestamp(70_001, 0),
            WindowScale(8),
        ];
        // A SYN's window is not scaled.
        assert_eq!(read(&syn).0, says("S", THERE, 0, u16::MAX).with(&expected));
    }
    for offered in
        [vec![], vec![MaximumSegmentSize(1400)], vec![MaximumSegmentSize(1400), WindowScale(8), Noop]]
    {
        let cookies = Cookies::new(1);
        let (_, answer) = cookies.cookie(&offered);
        assert_eq!(answer.options, [MaximumSegmentSize(1460)], "nothing that would have to be remembered");
        let (syn, told, cookie) = cookies.open(&offered, &[MaximumSegmentSize(1460)]);
        let mss = if offered.is_empty() { 536 } else { 1380 };
        assert_eq!(read(&syn).0, says("S", THERE, 0, 501).with(&[MaximumSegmentSize(mss)]));
        assert_eq!(told, says("A", cookie, THERE.wrapping_add(1), 65160).data(&[0]));
    }
}

#[test]
fn numbers_sack_blocks_timestamps_and_windows_are_shifted_either_way_with_right_checksums() {
    for (scale, window, shown) in
        [(Some(7), 1000, 1000), (Some(3), 1000, 62), (Some(9), 65000, 65535), (None, 1000, 7)]
    {
        let cookies = Cookies::new(1);
        let mut greeting = answered(scale.unwrap_or(0));
        if scale.is_none() {
            greeting.truncate(3);
        }
        let (syn, told, cookie) = cookies.open(&usual(1460), &greeting);
        let stamp = (NOW * 64) | 0x38;
        let expected =
            says("A", cookie, THERE.wrapping_add(1), 65160 >> 7).with(&[Timestamp(stamp, 70_001)]).data(&[0]);
        assert_eq!(told, expected, "a byte that it has, so that it answers at once");

        let there = |offset: u32| THERE.wrapping_add(offset);
        let (given, own) =
            (|offset: u32| cookie.wrapping_add(offset), |offset: u32| BACK.wrapping_add(offset));
        let blocks = |at: fn(u32, u32) -> u32, base: u32| {
            SelectiveAcknowledgement(
                (at(base, 100), at(base, 200)),
                [Some((at(base, 300), at(base, 400))), None, None],
            )
        };
        let at: fn(u32, u32) -> u32 = u32::wrapping_add;
        // Odd places, too: an option may begin anywhere.
        for padding in [vec![Noop, Noop], vec![Noop], vec![]] {
            let options = |stamps, blocks| [&padding[..], &[stamps, Noop, blocks]].concat();
            let said = says("A", there(1), given(50), 400)
                .with(&options(Timestamp(70_005, stamp + 9), blocks(at, cookie)))
                .data(b"odd");
            let (verdict, out) = cookies.forth(NOW, &said);
            assert_eq!(verdict, 4);
            // One that scales nothing takes windows as they are written.
            let expected = says("A", there(1), own(50), if scale.is_none() { 65535 } else { 400 })
                .with(&[Timestamp(70_005, (u32::MAX - 5).wrapping_add(9)), blocks(at, BACK)])
                .data(b"odd");
            assert_eq!(read(&out).0, expected);

            let answer = says("A", own(50), there(4), window)
                .with(&options(Timestamp(4, 70_005), blocks(at, THERE)))
                .data(b"data");
            let (verdict, out) = cookies.back(&syn, &answer);
            assert_eq!(verdict, 4);
            let expected = says("A", given(50), there(4), shown)
                .with(&[Timestamp(stamp + 10, 70_005), blocks(at, THERE)])
                .data(b"data");
            assert_eq!(read(&out).0, expected);
        }
        let (_, out) = cookies.back(&syn, &says("FA", own(54), there(4), window));
        assert_eq!(read(&out).0, says("FA", given(54), there(4), shown));
        let (_, out) = cookies.forth(NOW, &says("R", there(4), 0, 0));
        assert_eq!(read(&out).0, says("R", there(4), 0, 0));
    }
}

#[test]
fn until_the_target_has_answered_whatever_the_consumer_says_asks_it_again() {
    let cookies = Cookies::new(1);
    let (cookie, _) = cookies.cookie(&usual(1460));
    let ack = says("A", THERE.wrapping_add(1), cookie.wrapping_add(1), 501);
    let (_, first) = cookies.forth(NOW, &ack);
    for again in [
        ack.clone(),
        ack.clone().data(b"early"),
        says("A", THERE, cookie.wrapping_add(1), 501),
        says("FA", THERE.wrapping_add(1), cookie.wrapping_add(1), 501),
    ] {
        assert_eq!(cookies.forth(NOW, &again), (4, first.clone()), "{again:?}");
    }
    let (verdict, _) = cookies.back(&first, &says("A", 99, 98, 10));
    assert_eq!(verdict, 1, "of a connection that the consumer knows nothing of");
    let (verdict, out) = cookies.back(&first, &says("RA", 0, THERE.wrapping_add(1), 0));
    assert_eq!(verdict, 4);
    assert_eq!(read(&out).0.sequence, cookie.wrapping_add(1), "a refusal that the consumer believes");
    assert!(cookies.memory.pending.borrow().is_empty());
}

#[test]
fn only_the_right_cookie_opens_a_flow_and_only_within_its_life() {
    let cookies = Cookies::new(1);
    let (cookie, _) = cookies.cookie(&usual(1460));
    let right = says("A", THERE.wrapping_add(1), cookie.wrapping_add(1), 501);
    for wrong in [
        Says { acknowledgement: cookie, ..right.clone() },
        Says { sequence: THERE, ..right.clone() },
        Says { flags: "SA", ..right.clone() },
        Says { flags: "FA", ..right.clone() },
    ] {
        assert_eq!(cookies.forth(NOW, &wrong).0, RESET, "{wrong:?}");
    }
    assert_eq!(cookies.forth(NOW + COOKIES_HOLD + COOKIE_LIFE, &right).0, RESET, "too late");
    assert!(cookies.memory.pending.borrow().is_empty());
    cookies.memory.most_streams.set(0);
    assert_eq!(cookies.forth(NOW, &right).0, RESET, "there is no room");
    cookies.memory.most_streams.set(1);
    cookies.memory.limits.set(Endpoint { cookies: 1, full: 1, ..Endpoint::default() });
    assert_eq!(cookies.forth(NOW, &right).0, RESET, "the endpoint is full");
    cookies.memory.limits.set(Endpoint { cookies: 1, rate: 1, burst: 1, ..Endpoint::default() });
    assert_eq!(cookies.forth(NOW, &right).0, 4);
    cookies.memory.pending.borrow_mut().clear();
    assert_eq!(cookies.forth(NOW, &right).0, RESET, "a token is taken by what opens a flow");
    assert_eq!(cookies.forth(NOW, &says("S", 1, 0, 1)).0, RESET, "and not by a SYN");
}

#[test]
fn a_consumer_that_begins_anew_gets_another_cookie_and_a_flow_that_ends_takes_its_numbers_along() {
    let cookies = Cookies::new(1);
    let (cookie, _) = cookies.cookie(&usual(1460));
    let ack = says("A", THERE.wrapping_add(1), cookie.wrapping_add(1), 501);
    assert_eq!(cookies.forth(NOW, &ack).0, 4);
    assert_eq!(cookies.forth(NOW, &says("S", 77, 0, 64240)).0, RESET);
    assert!(cookies.memory.pending.borrow().is_empty(), "the one that had begun is given up");
    cookies.memory.streams.borrow_mut().clear();
    let (syn, ..) = cookies.open(&usual(1460), &answered(7));
    let last = says("FA", THERE.wrapping_add(1), cookie.wrapping_add(1), 501);
    assert_eq!(cookies.forth(NOW, &last).0, 4);
    assert_eq!(cookies.back(&syn, &says("FA", BACK.wrapping_add(1), THERE.wrapping_add(2), 501)).0, 4);
    assert_eq!(cookies.memory.streams.borrow().len(), 1);
    assert_eq!(cookies.forth(NOW + 61, &says("A", 5, 5, 5)).0, RESET);
    assert_eq!(cookies.memory.streams.borrow().len() + cookies.memory.established.borrow().len(), 0);
}

#[test]
fn cookies_begin_with_more_unconfirmed_syns_than_are_allowed_and_end_some_time_after_the_last_such_second() {
    let cookies = Cookies::new(10);
    let syn = |client: u8, now: u32| {
        cookies.memory.interface.set(cookies.interfaces[0]);
        let frame = says("S", 1, 0, 64240).frame(([10, 0, 2, client], 1000), ENDPOINT);
        on_the_host(&cookies.memory, &frame, now).0
    };
    let confirm = |client: u8, now: u32| {
        // Both sides of a handshake that goes as it should.
        let from = ([10, 0, 2, client], 1000);
        cookies.memory.interface.set(cookies.interfaces[0]);
        let (_, there) = on_the_host(&cookies.memory, &says("S", 1, 0, 1).frame(from, ENDPOINT), now);
        cookies.back(&there, &says("SA", 5, 2, 1));
        cookies.memory.interface.set(cookies.interfaces[0]);
        on_the_host(&cookies.memory, &says("A", 2, 6, 1).frame(from, ENDPOINT), now).0
    };
    for client in 0..30 {
        assert_eq!((syn(client, NOW), confirm(client, NOW)), (4, 4), "confirmed ones do not count");
    }
    for client in 30..60 {
        assert_eq!(syn(client, NOW + 1 + u32::from(client) / 8), 4, "nor do those of another second");
    }
    let flood: Vec<u32> = (100..120).map(|client| syn(client, NOW + 20)).collect();
    assert_eq!(flood, [[4; 9].as_slice(), &[RESET; 11]].concat());
    assert_eq!(syn(200, NOW + 19 + COOKIES_HOLD), RESET);
    assert_eq!(syn(201, NOW + 20 + COOKIES_HOLD), 4);
    cookies.memory.limits.set(Endpoint::default());
    for client in 0..100 {
        assert_eq!(syn(client, NOW + 50), 4, "nothing where cookies are off");
    }
}

/// A header as it begins, and what is behind it.
fn split(data: &[u8]) -> (&[u8], &[u8]) {
    let (header, rest) = data.split_at(100);
    assert_eq!(header[..16], *b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x54");
    (header, rest)
}

#[test]
fn the_proxy_protocols_header_is_at_the_head_of_the_stream_until_the_target_has_acknowledged_it() {
    let there = |offset: u32| THERE.wrapping_add(offset);
    let back = |offset: u32| BACK.wrapping_add(offset);
    let world = Cookies::proxied(0);
    let syn = says("S", THERE, 0, 64240).with(&usual(1460));
    let (verdict, at_target) = world.forth(NOW, &syn);
    assert_eq!((verdict, read(&at_target).0), (4, syn.bare()), "a SYN goes as it is");
    let greeting = says("SA", BACK, there(1), 65160).with(&usual(8960));
    let (_, out) = world.back(&at_target, &greeting);
    assert_eq!(
        read(&out).0,
        says("SA", BACK, there(1), 65060).with(&usual(8500 - 40 - 100)).bare(),
        "room for the header in what an endpoint carries"
    );

    // The handshake's ACK, and the first data, each as often as it comes; also a probe, which has the number before.
    for (sequence, data) in [(1, &b""[..]), (1, b"odd"), (1, b"first"), (0, b"")] {
        let said = says("A", there(sequence), back(1), 400).with(&[Noop, Noop, Timestamp(1, 2)]).data(data);
        let (verdict, out) = world.forth(NOW, &said);
        assert_eq!(verdict, 4);
        let got = read(&out).0;
        let (header, rest) = split(&got.data);
        assert_eq!(rest, data);
        assert_eq!(
            (header[16..20].to_vec(), header[20..24].to_vec()),
            (CLIENT.0.to_vec(), ENDPOINT.0.to_vec())
        );
        let expected = says("A", there(1), back(1), 400).with(&[Timestamp(1, 2)]).data(&got.data);
        assert_eq!(got, expected);
    }
    let (_, out) = world.forth(NOW, &says("A", there(4), back(1), 400).data(b"second"));
    assert_eq!(read(&out).0, says("A", there(104), back(1), 400).data(b"second"));
    for (acknowledged, heard) in [(1, 1), (50, 1), (100, 1)] {
        let (_, out) = world.back(&at_target, &says("A", back(1), there(acknowledged), 500));
        assert_eq!(
            read(&out).0,
            says("A", back(1), there(heard), 500),
            "a part of it is nothing of the consumer's"
        );
    }
    let blocks = |by: u32| SelectiveAcknowledgement((there(4 + by), there(10 + by)), [None; 3]);
    let (_, out) =
        world.back(&at_target, &says("A", back(1), there(1), 500).with(&[Noop, Noop, blocks(100)]));
    assert_eq!(read(&out).0, says("A", back(1), there(1), 500).with(&[blocks(0)]));
    let (_, out) = world.back(&at_target, &says("A", back(1), there(104), 500).data(b"answer"));
    assert_eq!(read(&out).0, says("A", back(1), there(4), 500).data(b"answer"));

    // It has been acknowledged, and is not sent again.
    for (sequence, data) in [(1, &b"odd"[..]), (0, b""), (10, b"third")] {
        let (_, out) = world.forth(NOW, &says("A", there(sequence), back(7), 400).data(data));
        assert_eq!(read(&out).0, says("A", there(sequence + 100), back(7), 400).data(data));
    }
    let (_, out) = world.forth(NOW, &says("FA", there(15), back(7), 400));
    assert_eq!(read(&out).0, says("FA", there(115), back(7), 400));
    let (_, out) = world.back(&at_target, &says("FA", back(7), there(116), 500));
    assert_eq!(read(&out).0, says("FA", back(7), there(16), 500));
    assert_eq!(world.memory.streams.borrow().len(), 1);
}

#[test]
fn a_connection_that_ends_before_its_first_byte_is_ended_by_the_number_that_the_target_expects() {
    let there = |offset: u32| THERE.wrapping_add(offset);
    for (said, expected) in [(false, 1), (true, 101)] {
        let world = Cookies::proxied(0);
        let (_, at_target) = world.forth(NOW, &says("S", THERE, 0, 64240));
        world.back(&at_target, &says("SA", BACK, there(1), 65160));
        if said {
            world.forth(NOW, &says("A", there(1), BACK.wrapping_add(1), 400));
        }
        let (_, out) = world.forth(NOW, &says("R", there(1), 0, 0));
        assert_eq!(read(&out).0, says("R", there(expected), 0, 0));
    }
    // One that only closes says the header first.
    let world = Cookies::proxied(0);
    let (_, at_target) = world.forth(NOW, &says("S", THERE, 0, 64240));
    world.back(&at_target, &says("SA", BACK, there(1), 65160));
    let (_, out) = world.forth(NOW, &says("FA", there(1), BACK.wrapping_add(1), 400));
    let got = read(&out).0;
    assert_eq!((got.flags, got.sequence, split(&got.data).1), ("FA", there(1), &b""[..]));
    let (_, out) = world.back(&at_target, &says("A", BACK.wrapping_add(1), there(102), 500));
    assert_eq!(read(&out).0.acknowledgement, there(2));
}

#[test]
fn a_cookies_connection_begins_with_the_header_too() {
    let world = Cookies::proxied(1);
    let (_, answer) = world.cookie(&[]);
    assert_eq!(answer.options, [MaximumSegmentSize(1360)], "room for the header");
    let (at_target, _, cookie) = world.open(&[], &[]);
    let there = |offset: u32| THERE.wrapping_add(offset);
    let (_, out) = world.forth(NOW, &says("A", there(1), cookie.wrapping_add(1), 400).data(b"hello"));
    let got = read(&out).0;
    assert_eq!((got.sequence, got.acknowledgement), (there(1), BACK.wrapping_add(1)));
    assert_eq!(split(&got.data).1, b"hello");
    let (_, out) = world.back(&at_target, &says("A", BACK.wrapping_add(1), there(106), 400).data(b"yes"));
    let got = read(&out).0;
    assert_eq!((got.sequence, got.acknowledgement), (cookie.wrapping_add(1), there(6)));
    let (_, out) = world.forth(NOW, &says("A", there(6), cookie.wrapping_add(4), 400).data(b"more"));
    let got = read(&out).0;
    assert_eq!((got.sequence, got.acknowledgement), (there(106), BACK.wrapping_add(4)));
}
