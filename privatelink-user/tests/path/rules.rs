//! Security groups and network ACLs.

use crate::memory::{DUALSTACK, Memory, interfaces, memory, on_the_host};
use ipnet::IpNet;
use privatelink::ip;
use privatelink::model::{Match, Traffic};
use privatelink::names::Names;
use privatelink::plan::Image;
use privatelink::rules::{self, Line};
use privatelink::{model, plan};
use privatelink_common::path::rules::permits;
use proptest::prelude::*;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::sync::LazyLock;
use zerocopy::big_endian::U16;

/// A number that no set of the configuration has.
const SET: u32 = 1000;

fn compiled(config: &str) -> Image {
    let model = model::parse(config, "rules.toml").unwrap();
    let known = plan::Known::connected(&model);
    plan::compile(&model, &mut Names::default(), &known, |_| "stack".into()).unwrap()
}

/// What a person would do: read the rules from the first to the last.
fn naive(lines: &[Line], address: IpAddr, protocol: u8, port: u16) -> bool {
    let matches = |line: &&Line| {
        line.what.traffic.numbers().contains(&protocol)
            && (!matches!(protocol, 6 | 17) || line.what.ports.contains(&port))
            && line.networks.iter().any(|network| network.contains(&address))
    };
    lines.iter().find(matches).is_some_and(|line| line.allow)
}

fn traffic() -> impl Strategy<Value = Traffic> {
    prop_oneof![
        Just(Traffic::All),
        Just(Traffic::Tcp),
        Just(Traffic::Tcp),
        Just(Traffic::Udp),
        Just(Traffic::Icmp),
        Just(Traffic::Icmpv6)
    ]
}

fn ports() -> impl Strategy<Value = RangeInclusive<u16>> {
    let port = || prop_oneof![Just(0), Just(1), 78..83u16, Just(u16::MAX), any::<u16>()];
    (port(), port()).prop_map(|(one, other)| one.min(other)..=one.max(other))
}

fn address() -> impl Strategy<Value = IpAddr> {
    let four = (0..4u8, 0..8u8).prop_map(|(net, host)| IpAddr::from([10, 0, net, host]));
    let six = (0..2u16, 0..8u16).prop_map(|(net, host)| IpAddr::from([0xfd00, 0, 0, net, 0, 0, 0, host]));
    prop_oneof![four, six]
}

fn network() -> impl Strategy<Value = IpNet> {
    let near = |address: IpAddr| {
        let most: u8 = if address.is_ipv4() { 32 } else { 128 };
        (most - 11..=most).prop_map(move |bits| IpNet::new(address, bits).unwrap().trunc())
    };
    let all = ["0.0.0.0/0", "::/0"].map(|all| all.parse::<IpNet>().unwrap());
    prop_oneof![address().prop_flat_map(near), proptest::sample::select(all.to_vec())]
}

fn line() -> impl Strategy<Value = Line> {
    let parts = (any::<bool>(), traffic(), ports(), proptest::collection::vec(network(), 0..4));
    parts.prop_map(|(allow, traffic, ports, networks)| {
        let ports = if matches!(traffic, Traffic::Tcp | Traffic::Udp) { ports } else { 0..=u16::MAX };
        Line { allow, what: Match { traffic, ports }, networks, said: String::new() }
    })
}

/// A SYN or a datagram of a client to the endpoint of its family.
fn first_packet(client: IpAddr, protocol: u8, port: u16) -> Vec<u8> {
    let builder = etherparse::PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    let endpoint = [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x99];
    let builder = match client {
        IpAddr::V4(client) => builder.ipv4(client.octets(), [10, 0, 9, 9], 64),
        IpAddr::V6(client) => builder.ipv6(client.octets(), endpoint, 64),
    };
    let mut bytes = Vec::new();
    if protocol == 6 {
        builder.tcp(1000, port, 7, 100).syn().write(&mut bytes, &[]).unwrap();
    } else {
        builder.udp(1000, port).write(&mut bytes, b"x").unwrap();
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn compiled_rules_say_what_reading_them_one_by_one_says(
        lines in prop_oneof![proptest::collection::vec(line(), 0..12), proptest::collection::vec(line(), 60..140)],
        packets in proptest::collection::vec((address(), proptest::sample::select(vec![1, 6, 17, 58u8]), ports()), 1..40),
    ) {
        let compiled = rules::compile(SET, &lines);
        let mut tables = compiled_memory();
        tables.image.rules_by_address = compiled.by_address;
        tables.image.rules_by_port = compiled.by_port;
        for (address, protocol, ports) in packets {
            let port = if matches!(protocol, 6 | 17) { *ports.start() } else { 0 };
            let said = permits(&tables, SET, &ip::entry(address), protocol, U16::new(port));
            prop_assert_eq!(said != 0, naive(&lines, address, protocol, port), "{} {} {}", address, protocol, port);
        }
    }

    #[test]
    fn the_path_lets_in_whom_the_rules_of_the_endpoint_let_in(
        lines in proptest::collection::vec(line(), 0..12),
        client in address(),
        (protocol, port) in proptest::sample::select(vec![(6, 80), (6, 81), (17, 81u16)]),
    ) {
        prop_assume!(IpNet::new("fd00::".parse().unwrap(), 64).unwrap().contains(&client) || client.is_ipv4());
        let compiled = rules::compile(SET, &lines);
        let mut tables = compiled_memory();
        tables.image.rules_by_address = compiled.by_address;
        tables.image.rules_by_port = compiled.by_port;
        tables.image.endpoints.values_mut().for_each(|gate| gate.rules = SET);
        tables.interface.set(interfaces(&tables.image)[0]);
        let (verdict, _) = on_the_host(&tables, &first_packet(client, protocol, port), 1000);
        prop_assert_eq!(verdict, if naive(&lines, client, protocol, port) { 4 } else { 1 });
    }
}

/// Both families, and every target reachable.
fn compiled_memory() -> Memory {
    memory(IMAGE.clone())
}

static IMAGE: LazyLock<Image> = LazyLock::new(|| {
    let reachable = |text: &str| {
        let gone =
            [", { address = \"10.0.1.23\", zone = \"a\" }", ", { address = \"fd00::17\", zone = \"a\" }"];
        gone.iter().fold(text.to_owned(), |text, gone| text.replace(gone, ""))
    };
    compiled(&reachable(DUALSTACK))
});
