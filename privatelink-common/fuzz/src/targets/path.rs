//! Sequences of packets, while time passes, entries are evicted and the configuration changes: whatever happens, a packet goes only
//! where its endpoint leads, a target's answer only to the consumer that the target was asked by, and every established flow is a pair.

use super::is_sound;
use crate::input::Input;
use crate::packet::{Packet, addresses, arp};
use crate::world::{
    ADDRESS, BALANCERS, CLIENTS, CONSUMERS, PAYMENTS, SLOTS, STACK, TARGET_PORT, TARGETS, World, vpc_of,
};
use privatelink_common::limits::OUTCOMES;
use privatelink_common::tables::{FlowKey, Neighbour, VpcAddress};
use privatelink_common::verdict::{Action, Answer, Direction};
use privatelink_common::wire::{Ipv4, RST};

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
        game.check_pairs();
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
            0..=4 => {
                let (slot, frame) = (input.of(&[1, 2, 6, 1, 3]), invent(input));
                self.send(slot, frame);
            }
            5..=8 => self.answer(input),
            9 => {
                let (slot, length) = (input.of(&SLOTS).0, usize::from(input.byte()));
                let frame = input.bytes(length).to_vec();
                self.send(slot, frame);
            }
            10 => self.mutate(input),
            11 => self.now += u32::from(input.word()) >> (input.byte() & 15),
            12 => self.world.evict(input.below(16)),
            13 => self.configure(input),
            14 => self.repeat(input),
            _ => {
                let (from, to) = (input.of(&CLIENTS), input.of(&[ADDRESS, BALANCERS[0], CLIENTS[1]]));
                let slot = input.of(&SLOTS).0;
                let packet = Packet { from, to, ..Packet::tcp(0) };
                let frame = match input.byte() & 1 {
                    0 => arp(1 + u16::from(input.byte() & 1), packet.from_mac, from, [0; 6], to, [255; 6]),
                    _ => packet.icmp(input.of(&[8, 0, 3]), input.bytes(12)),
                };
                self.send(slot, frame);
            }
        }
    }

    /// What a target or a consumer says to a frame that it got.
    fn answer(&mut self, input: &mut Input<'_>) {
        let Some((slot, got)) = self.pick(input) else { return };
        let (from, from_port, to, to_port) = addresses(&got);
        let answer = Packet {
            from: to,
            from_port: to_port,
            to: from,
            to_port: from_port,
            from_mac: got[..6].try_into().unwrap(),
            to_mac: got[6..12].try_into().unwrap(),
            protocol: got[23],
            payload: input.bytes(4).to_vec(),
            ..Packet::tcp(flags(input))
        };
        self.send(slot, answer.build());
    }

    /// The sender of a frame that was sent on speaks again.
    fn repeat(&mut self, input: &mut Input<'_>) {
        let Some((slot, mut frame)) = self.last.clone().filter(|(_, frame)| frame.len() >= 54) else {
            return;
        };
        frame[47] = flags(input);
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
        let id = 1 + input.below(3) as u32;
        let endpoint = self.world.endpoints.get_mut(&id).unwrap();
        match input.below(10) {
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
            8 => self.world.slots = input.bytes(5).iter().map(|it| u32::from(it & 3)).collect(),
            _ => endpoint.hold = u32::from(input.byte()),
        }
    }

    fn send(&mut self, slot: u16, frame: Vec<u8>) {
        let vpc = vpc_of(slot).unwrap();
        let (result, after) = self.world.send(slot, &frame, self.now);
        assert!(after.len() <= frame.len(), "the path never adds to a frame");
        self.last = Some((slot, frame.clone()));
        let verdict = match result {
            Ok(verdict) => verdict,
            Err(reason) => {
                assert!(reason.code() < OUTCOMES, "{reason:?} has no counter");
                return;
            }
        };
        match verdict.action() {
            Action::Pass => {
                assert_eq!(after, frame, "what is passed is untouched");
                assert_ne!(slot, STACK, "a stack's packets go to its neighbours or nowhere");
            }
            Action::Steer { interface } => {
                assert_eq!(vpc_of(interface), Some(vpc), "a VPC's stack is that VPC's alone");
                assert_eq!(after[12..], frame[12..], "only the link-layer addresses change");
            }
            Action::Answer(code) => {
                let answer = Answer::from_code(code).expect("an answer");
                let is_reset = answer.name().starts_with("reset");
                assert!(!is_reset || frame[47] & RST == 0, "a RST is never answered");
                assert!(!is_reset || is_sound(&after) == Some(true), "{answer:?} {after:02x?}");
                if is_reset {
                    let (from, from_port, to, to_port) = addresses(&frame);
                    assert_eq!(addresses(&after), (to, to_port, from, from_port));
                }
            }
            Action::Forward { interface, endpoint, direction, .. } => {
                check_bytes(&frame, &after);
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
                check_addresses(consumer, direction, addresses(&frame), addresses(&after));
                if direction == Direction::ToProvider && (frame[23] != 6 || frame[47] & RST == 0) {
                    self.check_way_back(vpc, &frame, &after);
                }
                self.sent.push((interface, after));
                if self.sent.len() > 16 {
                    self.sent.remove(0);
                }
            }
        }
    }

    /// Whoever answers what leaves here is led back to who sent it, and to nobody else: the NAT port is this flow's alone.
    fn check_way_back(&self, vpc: u16, frame: &[u8], after: &[u8]) {
        let key =
            |vpc, (source, source_port, destination, destination_port): (Ipv4, u16, Ipv4, u16)| FlowKey {
                source,
                destination,
                source_port: source_port.into(),
                destination_port: destination_port.into(),
                vpc,
                protocol: frame[23],
                reserved: 0,
            };
        let (own, left) = (key(vpc, addresses(frame)), key(PAYMENTS, addresses(after)));
        let reverse = FlowKey {
            source: left.destination,
            destination: left.source,
            source_port: left.destination_port,
            destination_port: left.source_port,
            ..left
        };
        let back = self.world.flow(&reverse).expect("there is a way back");
        assert_eq!(reverse.mirror(&back), own, "the way back of {own:?} leads elsewhere");
    }

    /// Both directions of every established flow are there, and are each other's.
    fn check_pairs(&self) {
        for (key, flow) in &*self.world.established.borrow() {
            let mirror = key.mirror(&flow.get());
            let other = self.world.established.borrow().get(&mirror).map(|it| it.get());
            let other = other.unwrap_or_else(|| panic!("{key:?} has no other direction"));
            assert_eq!(mirror.mirror(&other), *key, "{key:?} and {mirror:?} are no pair");
            assert_ne!(flow.get().direction, other.direction);
            assert_eq!((flow.get().endpoint, flow.get().target), (other.endpoint, other.target));
        }
    }
}

/// Nothing changes but addresses, ports and checksums, and checksums that were right are right.
fn check_bytes(frame: &[u8], after: &[u8]) {
    assert_eq!(after.len(), frame.len());
    // The TTL aside, and the IPv4 checksum with it.
    assert_eq!((&after[12..22], after[23]), (&frame[12..22], frame[23]));
    let rest = if frame[23] == 6 { 52 } else { 42 };
    assert_eq!(after[rest..], frame[rest..], "the payload");
    if frame[23] == 6 {
        assert_eq!(after[40..50], frame[40..50], "sequence numbers, flags and window");
    }
    if is_sound(frame) == Some(true) {
        assert_eq!(is_sound(after), Some(true), "{frame:02x?} became {after:02x?}");
    }
}

/// Targets see the load balancer, consumers see their endpoint.
fn check_addresses(
    consumer: u16,
    direction: Direction,
    came: (Ipv4, u16, Ipv4, u16),
    left: (Ipv4, u16, Ipv4, u16),
) {
    let address = if consumer == PAYMENTS { BALANCERS[0] } else { ADDRESS };
    match direction {
        Direction::ToProvider => {
            assert_eq!(came.2, address, "the consumer asked its endpoint");
            assert!(BALANCERS.contains(&left.0) && left.1 >= 2048, "{left:?}");
            assert!(TARGETS.contains(&left.2) && left.3 == TARGET_PORT, "{left:?}");
        }
        Direction::ToConsumer => {
            assert!(
                TARGETS.contains(&came.0) && came.1 == TARGET_PORT && BALANCERS.contains(&came.2),
                "{came:?}"
            );
            assert_eq!(left.0, address, "the consumer hears its endpoint");
            assert!([80, 53].contains(&left.1), "{left:?}");
        }
    }
}

fn flags(input: &mut Input<'_>) -> u8 {
    match input.byte() {
        it @ 0..64 => it,
        64..128 => 0x12,
        128..192 => 0x10,
        _ => 0x02,
    }
}

/// A packet from few enough addresses and ports that flows come about.
fn invent(input: &mut Input<'_>) -> Vec<u8> {
    let choice = input.byte();
    let mut packet = if choice & 1 == 0 { Packet::tcp(flags(input)) } else { Packet::udp() };
    packet.from = input.of(&[CLIENTS[0], CLIENTS[1], TARGETS[0], [10, 1, 0, 1]]);
    packet.to = input.of(&[ADDRESS, ADDRESS, BALANCERS[0], BALANCERS[1], CLIENTS[1]]);
    packet.from_port = input.of(&[1000, 1001, 1002, 1003, TARGET_PORT]);
    packet.to_port = match choice >> 1 & 7 {
        0 => input.word(),
        1 => 81,
        _ if choice & 1 == 0 => 80,
        _ => 53,
    };
    packet.payload = input.bytes(usize::from(choice >> 4)).to_vec();
    packet.no_checksum = choice & 1 == 1 && choice >> 7 == 1;
    packet.from_mac[5] = input.of(&[1, 1, 1, 2]);
    packet.build()
}
