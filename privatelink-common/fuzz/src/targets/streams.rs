//! Connections that the path counts for: by SYN cookies, with the Proxy Protocol's header, with any options. What one side sends reaches
//! the other as it is, checksums are right, and numbers that are given back are those that were sent.

use super::build;
use crate::input::Input;
use crate::packet::{ACK, PSH, Packet, SYN};
use crate::view::{View, check_answer, check_forwarded};
use crate::world::{ADDRESSES, CLIENTS, PORT, PROXIED, World};
use privatelink_common::verdict::{Action, Answer, Direction};

const STEPS: usize = 24;

pub fn run(input: &[u8]) {
    let mut input = Input(input);
    let mut world = World::default();
    let with_cookies = input.byte() & 1 == 1;
    if with_cookies {
        world.endpoints.get_mut(&1).unwrap().cookies = 1;
    }
    let port = input.of(&[PROXIED, PROXIED, PORT]);
    let consumer = Packet { to_port: port, from_port: 1000, seq: input.long(), ..Packet::tcp(SYN) };
    let mut target: Option<(u16, Vec<u8>)> = None;
    // What each side has last been sent.
    let mut heard: Option<Vec<u8>> = None;
    for step in 0..STEPS {
        if input.is_empty() {
            return;
        }
        let from_consumer = step == 0 || target.is_none() || input.byte() & 1 == 0;
        let mut packet = consumer.clone();
        let (slot, from, to) = if from_consumer {
            (1, CLIENTS[0], ADDRESSES[0])
        } else {
            let (slot, got) = target.as_ref().unwrap();
            let got = View::of(got).unwrap();
            (packet.from_port, packet.to_port) = (got.ports().1, got.ports().0);
            (*slot, got.to, got.from)
        };
        packet.flags = match (step, input.byte()) {
            (0, _) => SYN,
            (_, choice @ 0..32) => choice & 0x3f,
            (_, 32..96) if !from_consumer => SYN | ACK,
            (_, 96..128) => ACK | PSH,
            _ => ACK,
        };
        // Numbers that follow from what was heard, or others.
        let last = if from_consumer { heard.as_ref() } else { target.as_ref().map(|it| &it.1) };
        if let Some(view) = last.and_then(|it| View::of(it)) {
            let number = |at: usize| u32::from_be_bytes(view.payload[at..at + 4].try_into().unwrap());
            let apart = u32::from(input.byte() & 3);
            if step > 0 {
                packet.seq =
                    if view.flags() & ACK != 0 { number(8).wrapping_add(apart) } else { input.long() };
                packet.ack = number(4).wrapping_add(u32::from(input.byte() & 3));
            }
        }
        packet.window = input.word();
        packet.tcp_options = options(&mut input);
        let length = if packet.flags & SYN == 0 { input.below(40) } else { 0 };
        packet.payload = input.bytes(length).to_vec();
        let frame = build(from, to, &packet);
        let (verdict, after) = world.send(slot, &frame, 1000);
        let Ok(verdict) = verdict else { continue };
        match verdict.action() {
            Action::Forward { interface, direction, .. } => {
                check_forwarded(&frame, &after, port == PROXIED || with_cookies);
                if direction == Direction::ToProvider {
                    target = Some((interface, after));
                } else {
                    heard = Some(after);
                }
            }
            Action::Answer(code) => {
                check_answer(code, &frame, &after);
                if code == Answer::SynCookie.code() {
                    assert!(with_cookies && packet.flags & (SYN | ACK) == SYN);
                    heard = Some(after);
                }
            }
            Action::Pass | Action::Steer { .. } | Action::Hold => panic!("{verdict:?}"),
        }
    }
}

/// Options as hosts send them, or any bytes.
fn options(input: &mut Input<'_>) -> Vec<u8> {
    let mut options = Vec::new();
    for _ in 0..input.below(6) {
        match input.byte() & 7 {
            0 => options.extend([2, 4, 5, input.byte()]),
            1 => options.extend([3, 3, input.byte()]),
            2 => options.extend([4, 2]),
            3 => options
                .extend([&[8, 10][..], &input.long().to_be_bytes(), &input.long().to_be_bytes()].concat()),
            4 => options
                .extend([&[5, 10][..], &input.long().to_be_bytes(), &input.long().to_be_bytes()].concat()),
            5 => options.push(1),
            _ => options.extend(input.bytes(3)),
        }
    }
    options.truncate(40);
    options.resize(options.len().next_multiple_of(4), input.byte() & 1);
    options
}
