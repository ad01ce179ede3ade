//! The first rule that matches decides, whichever words of the masks it is in, and where none does, the packet is denied.

use crate::input::Input;
use crate::world::{CLIENTS, Rule, World};
use privatelink_common::limits::RULE_WORDS;
use privatelink_common::path::rules::permits;
use zerocopy::big_endian::U16;

pub fn run(input: &[u8]) {
    let mut input = Input(input);
    let mut world = World::default();
    // A few in between others that match nothing.
    let mut rules = vec![Rule::default(); RULE_WORDS * 64];
    for _ in 0..input.below(16) {
        let at = usize::from(input.word()) % rules.len();
        let clients = input.byte();
        let (from, to) = (input.word(), input.word());
        rules[at] =
            Rule { allow: input.byte() & 1 != 0, clients, tcp: input.byte() & 1 != 0, ports: from..=to };
    }
    world.rules = rules;
    for _ in 0..8 {
        let (client, tcp, port) = (input.below(CLIENTS.len()), input.byte() & 1 != 0, input.word());
        let matches = |rule: &&Rule| rule.is_about(client) && rule.tcp == tcp && rule.ports.contains(&port);
        let expected = world.rules.iter().find(matches).is_some_and(|rule| rule.allow);
        let said = permits(&world, 1, &CLIENTS[client], if tcp { 6 } else { 17 }, U16::new(port));
        assert_eq!(said != 0, expected, "client {client}, tcp {tcp}, port {port}");
    }
}
