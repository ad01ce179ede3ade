//! Security groups and network ACLs: what the configuration's rules, which the agent has compiled, say of a packet.
//!
//! A set of rules is two lookups of the longest prefix: the rules that an address matches, and those that a protocol and a port match,
//! as bits. The lowest bit of both is the first rule that matches, however many rules there are.

use super::parse::Packet;
use crate::limits::RULE_WORDS;
use crate::tables::{Endpoint, Key, RuleAddress, RulePort, Subnet, Tables, VpcAddress, Width, Words};
use crate::verdict::DropReason;
use crate::wire::{ICMP, ICMPV6, Ip};
use zerocopy::big_endian::{U16, U32};

/// A packet, as rules see it: on either side of its translation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Way {
    pub vpc: u16,
    pub source: Ip,
    pub destination: Ip,
    pub protocol: u8,
    /// Destination port; zero where the protocol has none.
    pub port: U16,
}

impl Way {
    /// Of a packet as it came.
    #[inline(always)]
    pub(super) fn of<K: Key>(key: &K) -> Self {
        Self {
            vpc: key.vpc(),
            source: key.source().widen(),
            destination: key.destination().widen(),
            protocol: key.protocol(),
            port: key.destination_port(),
        }
    }

    /// Of an ICMP error as it leaves, about a flow of which `flow` is the entry that goes the same way.
    #[inline(always)]
    fn error<K: Key>(flow: &K::Flow) -> Self {
        let source = K::source_of(flow).widen();
        Self {
            vpc: flow.peer_vpc,
            source,
            destination: K::destination_of(flow).widen(),
            protocol: if source.is_ipv4() { ICMP } else { ICMPV6 },
            port: U16::ZERO,
        }
    }

    /// Of a packet as it leaves.
    #[inline(always)]
    fn rewritten<K: Key>(key: &K, flow: &K::Flow) -> Self {
        Self {
            vpc: flow.peer_vpc,
            source: K::source_of(flow).widen(),
            destination: K::destination_of(flow).widen(),
            protocol: key.protocol(),
            port: flow.destination_port,
        }
    }
}

/// Whether the first rule of a set that matches what comes from, or goes to, `address` allows it; where none matches, it is denied. Set
/// 0 allows everything. Not inlined: the kernel bounds a function's stack.
#[inline(never)]
#[allow(clippy::cast_possible_truncation, reason = "few words")]
pub fn permits<T: Tables>(tables: &T, set: u32, address: &Ip, protocol: u8, port: U16) -> u64 {
    if set == 0 {
        return 1;
    }
    let address = RuleAddress { set: U32::new(set), address: address.0, reserved: [0; 4] };
    let Some(from) = tables.rules_of_address(&address) else {
        tables.ruled(set, || None);
        return 0;
    };
    let port = RulePort { set: U32::new(set), protocol, reserved: 0, port };
    let Some(to) = tables.rules_of_port(&port) else {
        tables.ruled(set, || None);
        return 0;
    };
    for index in 0..RULE_WORDS {
        let both = from.word(index) & to.word(index);
        if both != 0 {
            tables.ruled(set, || Some(index as u32 * 64 + both.trailing_zeros()));
            return u64::from(to.word(RULE_WORDS + index) & both & both.wrapping_neg() != 0);
        }
    }
    tables.ruled(set, || None);
    0
}

/// Whether a packet may leave the subnet of its source and enter that of its destination: network ACLs are about what goes from one to
/// the other. Not inlined, as above.
#[inline(never)]
pub(super) fn crosses<T: Tables>(tables: &T, way: &Way) -> u64 {
    let subnet =
        |address| -> Subnet { tables.subnet(&VpcAddress::new(way.vpc, address)).unwrap_or_default() };
    let (from, to) = (subnet(way.source), subnet(way.destination));
    if from.id == to.id || permits(tables, from.egress, &way.destination, way.protocol, way.port) == 0 {
        return u64::from(from.id == to.id);
    }
    permits(tables, to.ingress, &way.source, way.protocol, way.port)
}

/// Whether an echo request may come in, and its answer leave. Without ports, rules are about the protocol alone.
#[inline(always)]
pub(super) fn answers<T: Tables>(tables: &T, endpoint: &Endpoint, way: &Way) -> Result<(), DropReason> {
    let way = Way { port: U16::ZERO, ..*way };
    if permits(tables, endpoint.rules, &way.source, way.protocol, way.port) == 0 {
        return Err(DropReason::SecurityGroup);
    }
    let back = Way { source: way.destination, destination: way.source, ..way };
    if endpoint.acls != 0 && (crosses(tables, &way) == 0 || crosses(tables, &back) == 0) {
        return Err(DropReason::NetworkAcl);
    }
    Ok(())
}

/// Whether network ACLs let a packet of a flow through, on both sides. They are stateless: a flow that they have let in is nothing to
/// them.
#[inline(always)]
pub(super) fn lets<K: Key, T: Tables>(tables: &T, packet: &Packet<K>, flow: &K::Flow) -> bool {
    crosses(tables, &Way::of(&packet.key)) != 0 && leaves(tables, packet, flow)
}

/// The same of an ICMP error about a flow, which came by `way`: it is a packet like any other to them.
#[inline(always)]
pub(super) fn lets_error<K: Key, T: Tables>(tables: &T, way: &Way, flow: &K::Flow) -> bool {
    tables.endpoint(flow.endpoint.into()).acls == 0
        || crosses(tables, way) != 0 && crosses(tables, &Way::error::<K>(flow)) != 0
}

/// The same of the side that a packet leaves to.
#[inline(always)]
pub(super) fn leaves<K: Key, T: Tables>(tables: &T, packet: &Packet<K>, flow: &K::Flow) -> bool {
    crosses(tables, &Way::rewritten(&packet.key, flow)) != 0
}
