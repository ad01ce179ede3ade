pub mod checksum;
pub mod errors;
pub mod fragments;
pub mod maglev;
pub mod nat;
pub mod neighbour;
pub mod parse;
pub mod path;
pub mod rules;
pub mod streams;

use crate::packet::{Packet, Packet6};
use privatelink_common::wire::Ip;

/// A packet from one address to another; of IPv6 where one of them is, so that an IPv4 address among them is one that no packet has.
pub fn build(from: Ip, to: Ip, packet: &Packet) -> Vec<u8> {
    if from.is_ipv4() && to.is_ipv4() {
        return Packet { from: from.ipv4(), to: to.ipv4(), ..packet.clone() }.build();
    }
    Packet6::of(from.0, to.0, packet.clone()).build()
}
