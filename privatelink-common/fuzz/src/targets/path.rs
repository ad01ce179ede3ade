//! Sequences of packets, while time passes, entries are evicted and the configuration changes: whatever happens, a packet goes only
//! where its endpoint leads, a target's answer only to the consumer that the target was asked by, and every established flow is a pair.

use super::build;
use crate::input::Input;
use crate::packet::{Packet, Packet6, arp};
use crate::view::{View, check_answer, check_forwarded};
use crate::world::{
    ADDRESSES, BALANCERS, CLIENTS, CONSUMERS, DATAGRAMS, NOTHING, PAYMENTS, PORT, PORT6, PRESERVED, PROXIED,
    Pair, SLOTS, STACK, TARGET_PORT, TARGETS, World, vpc_of,
};
use privatelink_common::limits::OUTCOMES;
use privatelink_common::tables::{Course, FlowKey, FlowKey6, Key, Neighbour, VpcAddress, Width};
use privatelink_common::verdict::{Action, Direction, FlowEvent};
use privatelink_common::wire::Ip;
use std::fmt::Debug;
use std::hash::Hash;

/// A bound on how long one input takes.
const STEPS: usize = 200;

pub fn run(input: &[u8]) {
    let mut input = Input(input);
    let mut game = Game { world: World::default(), now: 1000, sent: Vec::new(), last: None };
    for _ in 0..STEPS {
        if input.is_empty() {
            return;
        }
        game.step(&mut input);
        check_pairs(&game.world.narrow);
        check_pairs(&game.world.wide);
    }
}

struct Game {
    world: World,
    now: u32,
    /// Frames that were sent on, the latest last: by which interface, as they left.
    sent: Vec<(u16, Vec<u8>)>,
    /// The frame before this one, as it came.
    last: Option<(u16, Vec<u8>)>,
}

impl Game {
    fn step(&mut self, input: &mut Input<'_>) {
        match input.byte() % 16 {
            0..=3 => {
                let (slot, frame) = (input.of(&[1, 2, 6, 1, 3]), invent(input));
                self.send(slot, frame);
            }
            4..=7 => self.answer(input),
            8 => self.complain(input),
            9 => {
                let (slot, length) = (input.of(&SLOTS).0, usize::from(input.byte()));
                let frame = input.bytes(length).to_vec();
                self.send(slot, frame);
            }
            10 => self.mutate(input),
            11 => self.now += u32::from(input.word()) >> (input.byte() & 15),
            12 if input.byte() & 1 == 0 => self.world.narrow.evict(input.below(16)),
            12 => self.world.wide.evict(input.below(16)),
            13 => self.configure(input),
            14 => self.repeat(input),
            _ => self.message(input),
        }
    }

    /// What a target or a consumer says to a frame that it got.
    fn answer(&mut self, input: &mut Input<'_>) {
        let Some((slot, got)) = self.pick(input) else { return };
        let Some(view) = View::of(&got).filter(View::has_ports) else { return };
        let answer = Packet {
            from_port: view.ports().1,
            to_port: view.ports().0,
            from_mac: got[..6].try_into().unwrap(),
            to_mac: got[6..12].try_into().unwrap(),
            protocol: view.protocol,
            seq: acknowledged(&view),
            tcp_options: options(input),
            payload: input.bytes(4).to_vec(),
            ..Packet::tcp(flags(input))
        };
        self.send(slot, build(view.to, view.from, &answer));
    }

    /// An ICMP error about a frame that was sent on.
    fn complain(&mut self, input: &mut Input<'_>) {
        let Some((slot, got)) = self.pick(input) else { return };
        let Some(view) = View::of(&got) else { return };
        let mut body = [&input.long().to_be_bytes()[..], &got[14..]].concat();
        body.truncate(12 + usize::from(input.byte() & 63));
        let frame = if view.is_ipv6 {
            Packet6::of(TARGETS[3].0, view.from.0, Packet::tcp(0)).icmp(input.of(&[1, 2, 3]), &body)
        } else {
            let to = view.from.ipv4();
            Packet { from: [10, 0, 3, 3], to, ..Packet::tcp(0) }.icmp(input.of(&[3, 11, 12]), &body)
        };
        self.send(slot, frame);
    }

    /// ARP, neighbour discovery and echo.
    fn message(&mut self, input: &mut Input<'_>) {
        let slot = input.of(&SLOTS).0;
        let (from, to) = (input.of(&CLIENTS), input.of(&[ADDRESSES[0], BALANCERS[0], CLIENTS[1]]));
        let (from6, to6) = (CLIENTS[2].0, input.of(&[ADDRESSES[1], BALANCERS[2]]).0);
        let packet = Packet { from: from.ipv4(), to: to.ipv4(), ..Packet::tcp(0) };
        let frame = match input.byte() & 3 {
            0 => arp(
                1 + u16::from(input.byte() & 1),
                packet.from_mac,
                packet.from,
                [0; 6],
                packet.to,
                [255; 6],
            ),
            1 => Packet6::of(from6, to6, packet).icmp(input.of(&[128, 129, 1, 2]), input.bytes(12)),
            2 => {
                let body = [&[0; 4][..], &to6, &[1, 1, 2, 1, 1, 1, 1, 1]].concat();
                Packet6::of(from6, to6, Packet { ttl: 255, ..packet }).icmp(input.of(&[135, 136]), &body)
            }
            _ => packet.icmp(input.of(&[8, 0, 3]), input.bytes(12)),
        };
        self.send(slot, frame);
    }

    /// The sender of a frame that was sent on speaks again.
    fn repeat(&mut self, input: &mut Input<'_>) {
        let Some((slot, mut frame)) = self.last.clone() else { return };
        let at = if frame.get(12) == Some(&0x86) { 67 } else { 47 };
        if let Some(byte) = frame.get_mut(at) {
            *byte = flags(input);
        }
        self.send(slot, frame);
    }

    fn pick(&self, input: &mut Input<'_>) -> Option<(u16, Vec<u8>)> {
        let back = input.below(8);
        self.sent.iter().rev().nth(back).or(self.sent.last()).cloned()
    }

    fn mutate(&mut self, input: &mut Input<'_>) {
        let Some((mut slot, mut frame)) = self.last.clone() else { return };
        for _ in 0..1 + input.below(3) {
            let (at, value) = (usize::from(input.byte()), input.byte());
            if let Some(byte) = frame.get_mut(at) {
                *byte = value;
            }
        }
        match input.byte() {
            0..32 => frame.truncate(usize::from(input.byte())),
            32..64 => slot = input.of(&SLOTS).0,
            _ => {}
        }
        self.send(slot, frame);
    }

    fn configure(&mut self, input: &mut Input<'_>) {
        let id = 1 + input.below(6) as u32;
        let endpoint = self.world.endpoints.get_mut(&id).unwrap();
        match input.below(17) {
            0 => endpoint.generation += 1,
            1 => endpoint.open ^= 1,
            2 => endpoint.full ^= 1,
            3 => (endpoint.rate, endpoint.burst) = (input.byte().into(), input.byte().into()),
            4 => self.world.targets.get_mut(&id).unwrap().cut = self.now,
            5 => {
                let hop = Neighbour { mac: [2, 7, 7, 7, 7, input.byte()], interface: input.of(&[3, 4]) };
                self.world.neighbours.insert(VpcAddress::new(PAYMENTS, input.of(&TARGETS)), hop);
            }
            6 => drop(self.world.neighbours.remove(&VpcAddress::new(PAYMENTS, input.of(&TARGETS)))),
            7 => {
                let slot = input.of(&SLOTS).0;
                if !self.world.gone.remove(&slot) {
                    self.world.gone.insert(slot);
                }
            }
            8 => {
                let table = input.below(2);
                let target = |it: &u8| u32::from(it & 3) + if it & 3 == 0 { 0 } else { 3 * table as u32 };
                self.world.slots[table] = input.bytes(5).iter().map(target).collect();
            }
            9 => endpoint.cookies = input.of(&[0, 1, 3]),
            10 => endpoint.errors ^= 1,
            11 => {
                (endpoint.mtu, endpoint.reserve) = (input.of(&[0, 68, 100, 1280, 9000]), input.byte().into())
            }
            12 => {
                (endpoint.acls, endpoint.rules) = (u16::from(input.byte() & 1), input.of(&[0, 0, 1, NOTHING]))
            }
            13 => self.world.listener_rules = input.of(&[0, 0, 1, NOTHING]),
            14 => {
                self.world.subnet_rules = [input.of(&[0, 0, 1, NOTHING]), input.of(&[0, 0, 1, NOTHING])];
                self.world.allows = u64::from(input.byte()) << 56 | u64::from(input.byte());
            }
            15 => drop(self.world.mtus.insert(input.of(&SLOTS).0, input.of(&[0, 68, 100, 1280, 9000]))),
            _ => endpoint.hold = u32::from(input.byte()),
        }
    }

    fn send(&mut self, slot: u16, frame: Vec<u8>) {
        let vpc = vpc_of(slot).unwrap();
        let (result, after) = self.world.send(slot, &frame, self.now);
        self.last = Some((slot, frame.clone()));
        let verdict = match result {
            Ok(verdict) => verdict,
            Err(reason) => {
                assert!(reason.code() < OUTCOMES, "{reason:?} has no counter");
                return;
            }
        };
        match verdict.action() {
            Action::Hold => assert_eq!(after, frame, "what is held is untouched"),
            Action::Pass => {
                assert_eq!(after, frame, "what is passed is untouched");
                let to_group = View::of(&frame).is_some_and(|it| it.is_ipv6 && it.to.0[0] == 0xff);
                assert!(slot != STACK || to_group, "a stack's packets go to its neighbours or nowhere");
            }
            Action::Steer { interface } => {
                assert_eq!(vpc_of(interface), Some(vpc), "a VPC's stack is that VPC's alone");
                assert_eq!(after[12..], frame[12..], "only the link-layer addresses change");
            }
            Action::Answer(code) => check_answer(code, &frame, &after),
            Action::Forward { interface, endpoint, direction, ipv6, event } => {
                let rules = [self.world.endpoints[&endpoint].rules, self.world.listener_rules];
                // A load balancer that serves its own VPC has its groups in the place of the endpoint's.
                let asked = if [3, 6].contains(&endpoint) { &rules[..1] } else { &rules };
                assert!(event != FlowEvent::Opened || !asked.contains(&NOTHING), "no rule lets this flow in");
                let (_, consumer) = *CONSUMERS.iter().find(|(id, _)| *id == endpoint).expect("an endpoint");
                let to = vpc_of(interface).expect("an interface");
                let (from_vpc, to_vpc) = match direction {
                    Direction::ToProvider => (consumer, PAYMENTS),
                    Direction::ToConsumer => (PAYMENTS, consumer),
                };
                assert_eq!(
                    (vpc, to),
                    (from_vpc, to_vpc),
                    "endpoint {endpoint} connects {consumer} and {PAYMENTS}"
                );
                let (came, left) = (View::of(&frame).expect("a packet"), View::of(&after).expect("a packet"));
                assert_eq!(left.is_ipv6, ipv6);
                if matches!(came.protocol, 1 | 58) {
                    // Between the families, the header inside changes its length.
                    let is_as_long = left.payload.len() == came.payload.len();
                    assert!(is_as_long || left.is_ipv6 != came.is_ipv6, "{after:02x?}");
                    let protocol = if ipv6 { 58 } else { 1 };
                    assert_eq!((left.protocol, left.ttl), (protocol, came.ttl - 1));
                    assert!(came.is_sound() != Some(true) || left.is_sound() == Some(true), "{after:02x?}");
                    return;
                }
                self.check_flow(vpc, consumer, direction, &came, &left);
                self.sent.push((interface, after));
                if self.sent.len() > 16 {
                    self.sent.remove(0);
                }
            }
        }
    }

    fn check_flow(&self, vpc: u16, consumer: u16, direction: Direction, came: &View<'_>, left: &View<'_>) {
        let service = if direction == Direction::ToProvider { came.ports().1 } else { left.ports().0 };
        let counted = self.world.endpoints.values().any(|it| it.cookies != 0)
            || !self.world.streams.borrow().is_empty();
        let shifted = came.has_ports() && (service % DATAGRAMS == PROXIED || came.protocol == 6 && counted);
        check_forwarded(came.frame, left.frame, shifted);
        check_addresses(consumer, direction, came, left);
        // A RST takes its flow along, and a later fragment has no ports.
        if direction == Direction::ToProvider && came.has_ports() && came.flags() & 4 == 0 {
            self.check_way_back(vpc, came, left);
        }
    }

    /// Whoever answers what leaves here is led back to who sent it, and to nobody else: the NAT port is this flow's alone.
    fn check_way_back(&self, vpc: u16, came: &View<'_>, left: &View<'_>) {
        let own = key(vpc, came);
        let reverse = FlowKey6 {
            source: left.to,
            destination: left.from,
            source_port: left.ports().1.into(),
            destination_port: left.ports().0.into(),
            vpc: PAYMENTS,
            protocol: left.protocol,
            reserved: 0,
        };
        if came.is_ipv6 || left.is_ipv6 {
            let back = self.world.wide.flow(&reverse).expect("there is a way back");
            assert_eq!(reverse.mirror(&back), own, "the way back leads elsewhere");
        } else {
            let (reverse, own) = (narrow(&reverse), narrow(&own));
            let back = self.world.narrow.flow(&reverse).expect("there is a way back");
            assert_eq!(reverse.mirror(&back), own, "the way back leads elsewhere");
        }
    }
}

fn key(vpc: u16, view: &View<'_>) -> FlowKey6 {
    FlowKey6 {
        source: view.from,
        destination: view.to,
        source_port: view.ports().0.into(),
        destination_port: view.ports().1.into(),
        vpc,
        protocol: view.protocol,
        reserved: 0,
    }
}

fn narrow(key: &FlowKey6) -> FlowKey {
    key.other().expect("IPv4")
}

/// Both directions of every established flow are there, and are each other's.
fn check_pairs<K: Key + Eq + Hash + Debug>(pair: &Pair<K, K::Flow>) {
    for (key, flow) in &*pair.established.borrow() {
        let flow = flow.get();
        let mirror = key.mirror(&flow);
        let other = pair.established.borrow().get(&mirror).map(|it| it.get());
        let other = other.unwrap_or_else(|| panic!("{key:?} has no other direction"));
        assert_eq!(mirror.mirror(&other), *key, "{key:?} and {mirror:?} are no pair");
        let (flow, other): (&Course, &Course) = (&flow, &other);
        assert_ne!(flow.direction(), other.direction());
        assert_eq!((flow.endpoint, flow.target), (other.endpoint, other.target));
        assert!(
            K::WIDE != (key.source().widen().is_ipv4() && mirror.source().widen().is_ipv4()),
            "its width"
        );
    }
}

/// Targets see the load balancer, or a client of its own VPC; consumers see their endpoint.
fn check_addresses(consumer: u16, direction: Direction, came: &View<'_>, left: &View<'_>) {
    let own: &[Ip] = if consumer == PAYMENTS { &BALANCERS } else { &ADDRESSES };
    match direction {
        Direction::ToProvider => {
            assert!(own.contains(&came.to), "the consumer asked its endpoint: {came:02x?}");
            let is_preserved = consumer == PAYMENTS && left.from == came.from;
            assert!(is_preserved || BALANCERS.contains(&left.from), "{left:02x?}");
            assert!(TARGETS.contains(&left.to), "{left:02x?}");
            if left.has_ports() {
                assert!(is_preserved || left.ports().0 >= 2048, "{left:02x?}");
                assert_eq!(left.ports().1, TARGET_PORT);
            }
        }
        Direction::ToConsumer => {
            assert!(TARGETS.contains(&came.from), "{came:02x?}");
            assert!(consumer == PAYMENTS || BALANCERS.contains(&came.to), "{came:02x?}");
            assert!(own.contains(&left.from), "the consumer hears its endpoint: {left:02x?}");
            if came.has_ports() {
                assert_eq!(came.ports().0, TARGET_PORT);
            }
        }
    }
}

/// The number that follows what was heard.
fn acknowledged(view: &View<'_>) -> u32 {
    view.payload.get(8..12).map_or(0, |it| u32::from_be_bytes(it.try_into().unwrap()))
}

fn flags(input: &mut Input<'_>) -> u8 {
    match input.byte() {
        it @ 0..64 => it,
        64..128 => 0x12,
        128..192 => 0x10,
        _ => 0x02,
    }
}

fn options(input: &mut Input<'_>) -> Vec<u8> {
    match input.byte() & 7 {
        0 => vec![2, 4, 35, 0],
        1 => [&[2, 4, 5, 180, 4, 2, 8, 10][..], &input.long().to_be_bytes(), &[0; 4], &[1, 3, 3, 7]].concat(),
        2 => {
            let mut options =
                input.bytes(usize::from(input.0.first().copied().unwrap_or_default() & 40)).to_vec();
            options.resize(options.len().next_multiple_of(4), 0);
            options
        }
        _ => Vec::new(),
    }
}

/// A packet from few enough addresses and ports that flows come about.
fn invent(input: &mut Input<'_>) -> Vec<u8> {
    let choice = input.byte();
    let is_tcp = choice & 1 == 0;
    let mut packet = if is_tcp { Packet::tcp(flags(input)) } else { Packet::udp() };
    let family = input.byte();
    let six = usize::from(family & 1);
    let strangers = [Ip::from_ipv4([10, 1, 0, 1]), Ip([0x20; 16])];
    let from = input.of(&[CLIENTS[2 * six], CLIENTS[2 * six + 1], TARGETS[3 * six], strangers[six]]);
    let to = input.of(&[ADDRESSES[six], ADDRESSES[six], BALANCERS[2 * six], BALANCERS[1], CLIENTS[1]]);
    packet.from_port = input.of(&[1000, 1001, 1002, 1003, TARGET_PORT]);
    packet.to_port = match choice >> 1 & 7 {
        0 => input.word(),
        1 => PORT6,
        2 => PROXIED,
        3 => PRESERVED,
        _ => PORT,
    };
    packet.to_port = if is_tcp { packet.to_port } else { packet.to_port.wrapping_add(DATAGRAMS) };
    packet.ttl = input.of(&[64, 64, 64, 64, 64, 64, 2, 1]);
    packet.tos = family & 0xf0;
    packet.payload = input.bytes(usize::from(choice >> 4)).to_vec();
    if family & 0x0e == 0x0e {
        packet.payload.resize(64 * usize::from(input.byte() & 31), 7);
    }
    if is_tcp {
        packet.tcp_options = options(input);
    } else if six == 0 && family & 0x0e == 2 {
        packet.fragment = input.of(&[0x2000, 0x2006, 0x0006, 0x000c]);
        packet.payload.resize(40, 9);
    }
    packet.no_checksum = !is_tcp && choice >> 7 == 1;
    packet.from_mac[5] = input.of(&[1, 1, 1, 2]);
    build(from, to, &packet)
}
