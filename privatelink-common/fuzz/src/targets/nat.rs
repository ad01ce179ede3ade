//! What a target gets is what the consumer sent with other addresses, and what comes back is the answer with the first ones, whatever
//! the families of both sides.

use super::build;
use crate::input::Input;
use crate::packet::{ACK, Packet, SYN};
use crate::view::{View, check_forwarded};
use crate::world::{ADDRESSES, BALANCERS, BANK, DATAGRAMS, PORT, PORT6, SHOP, TARGET_PORT, TARGETS, World};
use privatelink_common::verdict::{Action, Direction, FlowEvent};
use privatelink_common::wire::Ip;

pub fn run(input: &[u8]) {
    let mut input = Input(input);
    let world = World::default();
    let (slot, vpc) = input.of(&[(1, SHOP), (2, BANK)]);
    let (is_tcp, family, port) = (input.byte() & 1 == 0, input.below(2), input.of(&[PORT, PORT6]));
    let mut sent = if is_tcp { Packet::tcp(SYN) } else { Packet::udp() };
    sent.to_port = if is_tcp { port } else { port + DATAGRAMS };
    // Any address of the VPC that is nobody's.
    let (third, last) = (input.byte() & 7, input.byte());
    let v6 = [0xfd, 0, 0, 0, 0, 0, 0, 0, 7, 7, 7, 7, 7, third, 7, last];
    let client = [Ip::from_ipv4([10, 0, third, last]), Ip(v6)][family];
    sent.from_port = input.word();
    (sent.seq, sent.window, sent.id, sent.tos) = (input.long(), input.word(), input.word(), input.byte());
    sent.no_checksum = !is_tcp && family == 0 && input.byte() & 1 == 1;
    sent.ttl = 2 + input.byte() % 254;
    if is_tcp {
        sent.tcp_options =
            input.bytes(4 * usize::from(input.0.first().copied().unwrap_or_default() % 11)).to_vec();
        sent.tcp_options.truncate(sent.tcp_options.len() / 4 * 4);
    }
    let length = input.below(100);
    sent.payload = input.bytes(length).to_vec();
    let before = build(client, ADDRESSES[family], &sent);
    let (verdict, after) = world.send(slot, &before, 1000);
    let Ok(Action::Forward { interface, endpoint, direction, event, .. }) = verdict.map(|it| it.action())
    else {
        // The target without a link-layer address.
        assert_eq!(verdict.expect_err("sent on or dropped").name(), "no_next_hop");
        return;
    };
    let number = u32::from(vpc) + [0, 3][family];
    assert_eq!((endpoint, direction, event), (number, Direction::ToProvider, FlowEvent::Opened));
    let left = View::of(&after).expect("a packet");
    let (nat, target_port) = left.ports();
    assert!(BALANCERS.contains(&left.from) && nat >= 2048, "{left:02x?}");
    assert!(TARGETS.contains(&left.to) && target_port == TARGET_PORT, "{left:02x?}");
    assert_eq!(left.is_ipv6, port == PORT6, "the target's family");
    check_forwarded(&before, &after, false);

    let answer = Packet {
        from_port: target_port,
        to_port: nat,
        to_mac: after[6..12].try_into().unwrap(),
        from_mac: after[..6].try_into().unwrap(),
        flags: SYN | ACK,
        seq: input.long(),
        payload: input.bytes(20).to_vec(),
        no_checksum: sent.no_checksum && !left.is_ipv6,
        ..sent.clone()
    };
    let answer = build(left.to, left.from, &answer);
    let (verdict, back) = world.send(interface, &answer, 1000);
    let Ok(Action::Forward { interface, endpoint, direction, .. }) = verdict.map(|it| it.action()) else {
        panic!("the answer: {verdict:?}");
    };
    assert_eq!((interface, endpoint, direction), (slot, number, Direction::ToConsumer));
    assert_eq!(back[..6], sent.from_mac, "it goes to where the consumer is");
    let back_view = View::of(&back).expect("a packet");
    assert_eq!((back_view.from, back_view.to), (ADDRESSES[family], client));
    assert_eq!(back_view.ports(), (sent.to_port, sent.from_port));
    check_forwarded(&answer, &back, false);
}
