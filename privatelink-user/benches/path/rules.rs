//! What security groups and network ACLs add to the admission of a new flow, by BPF_PROG_TEST_RUN: five groups of 60 rules, and an ACL of 40
//! for the clients' subnet and another for the endpoint's, while so many other endpoints have as many rules of their own.
//!
//! The packet is one that has no next hop, so that nothing changes and it can be run again and again.

use crate::opening::{SERVICE, configure};
use crate::report::Report;
use crate::world::{DROP, World, segment, time};
use ipnet::IpNet;
use privatelink::maps::PrefixKey;
use privatelink::model::{Limits, Match, Traffic};
use privatelink::rules::{self, Line};
use privatelink_common::tables::{Endpoint, Prefix, Subnet};
use privatelink_common::wire::Ip;
use zerocopy::big_endian::U32;

const ROUNDS: usize = 15;
const GROUPS: u8 = 5;
const RULES: u8 = 60;
const ENTRIES: u8 = 40;

pub(crate) fn run(report: &mut Report) {
    let world = World::new(&Limits::default());
    configure(&world);
    let mut next = 1;
    for others in [0, 16, 128, 512] {
        while next <= others {
            write(&world, 1000 + next, &groups());
            next += 1;
        }
        measure(report, &world, others);
    }
}

fn line(allow: bool, port: u16, network: [u8; 4], bits: u8) -> Line {
    let what = Match { traffic: Traffic::Tcp, ports: port..=port.saturating_add(7) };
    let networks = vec![IpNet::new(network.into(), bits).unwrap().trunc()];
    Line { allow, what, networks, said: String::new() }
}

/// Every rule has a network and ports of its own; only the last is about the client.
fn groups() -> Vec<Line> {
    let rule = |group: u8, number: u8| {
        line(true, 1000 + u16::from(group) * 600 + u16::from(number) * 10, [10, 100 + group, number, 0], 24)
    };
    let mut lines: Vec<_> =
        (0..GROUPS).flat_map(|group| (0..RULES).map(move |number| rule(group, number))).collect();
    lines.pop();
    lines.push(line(true, 81, [10, 0, 0, 0], 16));
    lines
}

fn acl() -> Vec<Line> {
    let mut lines: Vec<_> = (1..ENTRIES)
        .map(|number| line(false, 2000 + u16::from(number) * 10, [10, 200, number, 0], 24))
        .collect();
    lines.push(line(true, 81, [10, 0, 0, 0], 8));
    lines
}

fn write(world: &World, set: u32, lines: &[Line]) {
    let compiled = rules::compile(set, lines);
    compiled.by_address.iter().for_each(|(key, value)| world.maps.rules_by_address.set(key, value).unwrap());
    compiled.by_port.iter().for_each(|(key, value)| world.maps.rules_by_port.set(key, value).unwrap());
}

fn measure(report: &mut Report, world: &World, others: u32) {
    write(world, 1, &groups());
    write(world, 2, &acl());
    for (id, network, bits) in [(1, [10, 0, 0, 0], 16), (2, [10, 255, 0, 0], 16)] {
        let prefix = Prefix { vpc: U32::new(1), address: Ip::from_ipv4(network).0 };
        let subnet = Subnet { id, ingress: 2, egress: 2 };
        world.maps.subnets.set(&PrefixKey { bits: 128 + bits, prefix }, &subnet).unwrap();
    }
    let open = Endpoint { generation: 1, open: 1, ..Endpoint::default() };
    let kinds = [
        ("none", open),
        ("groups", Endpoint { rules: 1, ..open }),
        ("groups-and-acls", Endpoint { rules: 1, acls: 1, ..open }),
    ];
    let mut figures = [const { Vec::new() }; 3];
    let packet = segment(SERVICE, 81, |segment| segment.syn());
    for round in 0..=ROUNDS {
        let empty = time(world.program("empty"), &packet, 1 << 20, DROP);
        for ((_, endpoint), figures) in kinds.iter().zip(&mut figures) {
            world.maps.endpoints.set(&1, endpoint).unwrap();
            let took = time(&world.ingress, &packet, 1 << 18, DROP) - empty;
            if round > 0 {
                figures.push(took);
            }
        }
    }
    let [none, groups, acls] = figures;
    let added = |with: &[f64]| with.iter().zip(&none).map(|(with, without)| with - without).collect();
    report.add(&format!("rules/{others}-others/without/ns"), "ns", none.clone());
    report.add(&format!("rules/{others}-others/groups/added"), "ns", added(&groups));
    report.add(&format!("rules/{others}-others/groups-and-acls/added"), "ns", added(&acls));
}
