//! Full port ranges and full tables.

use crate::memory::{CONFIG, DUALSTACK, Memory, Pins, RESET, interfaces, memory, on_the_host};
use crate::time::segment;
use privatelink::kernel::{Drops, Kernel};
use privatelink::model::Limits;
use privatelink::names::Names;
use privatelink::{flows, model, plan};
use privatelink_common::limits::NAT_PORT_COUNT;
use privatelink_common::tables::{Course, Endpoint, Flow, FlowKey, Key, TargetEvent};
use privatelink_common::verdict::Direction;
use privatelink_common::wire::{Ip, Ipv4};
use zerocopy::big_endian::U16;

/// What AWS allows a target for each of the load balancer's addresses.
const AWS: usize = 55_000;

/// Two consumers' worth of an endpoint whose service has one target.
fn one_target() -> Memory {
    with_addresses("")
}

fn with_addresses(secondary: &str) -> Memory {
    let one = CONFIG
        .replace("listeners =", &format!("{secondary}\nlisteners ="))
        .replace(", { address = \"10.0.1.22\", zone = \"a\" }", "")
        .replace(", { address = \"10.0.1.23\", zone = \"a\" }", "");
    let model = model::parse(&one, "one.toml").unwrap();
    let image =
        plan::compile(&model, &mut Names::default(), &plan::Known::connected(&model), |_| "stack".into())
            .unwrap();
    let first = interfaces(&image)[0];
    let memory = memory(image);
    memory.interface.set(first);
    memory
}

/// Opens flows of as many clients as are needed until `enough` are open, and returns how many were refused.
fn open(memory: &Memory, flags: &str, enough: usize) -> usize {
    let mut refused = 0;
    for client in 0..u32::try_from(enough).unwrap() * 2 {
        if memory.pending.borrow().len() / 2 == enough {
            return refused;
        }
        let [_, a, b, c] = client.to_be_bytes();
        let frame = segment(([10, 0, b | 0x80, c], 1000 + u16::from(a)), ([10, 0, 9, 9], 80), flags);
        let (verdict, _) = on_the_host(memory, &frame, 1000);
        let expected = if flags == "udp" { 1 } else { RESET };
        assert!([4, expected].contains(&verdict), "{verdict}");
        refused += usize::from(verdict != 4);
    }
    panic!("only {} flows", memory.pending.borrow().len() / 2)
}

#[test]
fn a_target_takes_fifty_five_thousand_flows_and_each_has_a_port_of_its_own() {
    for flags in ["S", "udp"] {
        let memory = one_target();
        let refused = open(&memory, flags, AWS);
        assert!(refused <= AWS / 1000, "{refused} of {AWS} flows were refused");
        let pending = memory.pending.borrow();
        let ports: std::collections::BTreeSet<u16> = pending
            .values()
            .map(|flow| flow.get())
            .filter(|flow| flow.direction() == Direction::ToProvider)
            .map(|flow| flow.source_port.get())
            .collect();
        assert_eq!(ports.len(), AWS);
    }
}

#[test]
fn flows_of_both_families_to_one_ipv4_target_never_share_a_nat_port() {
    const EACH: usize = 25_000;
    let one = DUALSTACK
        .replace(", { address = \"10.0.1.22\", zone = \"a\" }", "")
        .replace(", { address = \"10.0.1.23\", zone = \"a\" }", "");
    let model = model::parse(&one, "one.toml").unwrap();
    let image =
        plan::compile(&model, &mut Names::default(), &plan::Known::connected(&model), |_| "stack".into())
            .unwrap();
    let first = interfaces(&image)[0];
    let memory = memory(image);
    memory.interface.set(first);
    for client in 0..u16::try_from(EACH).unwrap() {
        let [a, b] = client.to_be_bytes();
        let four = segment(([10, 0, a | 0x80, b], 1000), ([10, 0, 9, 9], 80), "S");
        let mut from = [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, a, b];
        let mut six = Vec::new();
        let to = Ip([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x99]).0;
        from[12] = 1;
        etherparse::PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2])
            .ipv6(from, to, 64)
            .tcp(1000, 80, 7, 100)
            .syn()
            .write(&mut six, &[])
            .unwrap();
        for frame in [four, six] {
            let (verdict, _) = on_the_host(&memory, &frame, 1000);
            assert!([4, RESET].contains(&verdict), "{verdict}");
        }
    }
    let narrow = memory.pending.borrow();
    let narrow = narrow.values().map(|it| it.get()).filter(|it| it.direction() == Direction::ToProvider);
    let narrow: std::collections::BTreeSet<u16> = narrow.map(|it| it.source_port.get()).collect();
    let wide = memory.pending6.borrow();
    let wide = wide.values().map(|it| it.get()).filter(|it| it.direction() == Direction::ToProvider);
    let wide: std::collections::BTreeSet<u16> = wide.map(|it| it.source_port.get()).collect();
    assert!(narrow.len() + wide.len() > 2 * EACH - 50, "{} and {} flows", narrow.len(), wide.len());
    assert!(narrow.is_disjoint(&wide), "{} ports are two flows'", narrow.intersection(&wide).count());
}

#[test]
fn when_every_port_is_taken_tcp_gets_a_reset_and_udp_is_dropped_and_no_flow_is_harmed() {
    let memory = one_target();
    // The hash finds the last ports only by luck, so the rest is taken by hand.
    open(&memory, "S", AWS);
    let some = *memory
        .pending
        .borrow()
        .iter()
        .find(|(_, it)| it.get().direction() == Direction::ToConsumer)
        .unwrap()
        .0;
    let taken: Vec<FlowKey> =
        (0..=u16::MAX).map(|port| FlowKey { destination_port: U16::new(port), ..some }).collect();
    for key in taken {
        memory.established.borrow_mut().entry(key).or_default();
        memory.established.borrow_mut().entry(FlowKey { protocol: 17, ..key }).or_default();
    }
    let before = memory.pending.borrow().len();
    for (flags, expected) in [("S", RESET), ("udp", 1)] {
        let frame = segment(([10, 0, 1, 77], 7), ([10, 0, 9, 9], 80), flags);
        assert_eq!(on_the_host(&memory, &frame, 1000).0, expected, "{flags}");
    }
    assert_eq!(memory.pending.borrow().len(), before, "what was tried was let go again");
    let errors = memory.counted.borrow().iter().filter(|it| **it == TargetEvent::PortAllocationError).count();
    assert!(errors >= 2, "each is counted at the target: {errors}");
    assert!(NAT_PORT_COUNT as usize > AWS);
}

#[test]
fn an_endpoint_opens_as_many_flows_a_second_as_it_may_and_saves_up_no_more_than_its_burst() {
    let memory = one_target();
    memory.limits.set(Endpoint { rate: 10, burst: 25, ..Endpoint::default() });
    let clients = std::cell::Cell::new(0u16);
    let opened = |second: u32, tries: usize| {
        let attempt = |_: &usize| {
            clients.set(clients.get() + 1);
            let [a, b] = clients.get().to_be_bytes();
            let frame = segment(([10, 0, a | 0x80, b], 1000), ([10, 0, 9, 9], 80), "S");
            let (verdict, out) = on_the_host(&memory, &frame, second);
            assert!(verdict == 4 || verdict == 1 && out == frame, "what is refused is dropped as it is");
            verdict == 4
        };
        (0..tries).filter(attempt).count()
    };
    assert_eq!(opened(1000, 100), 25, "the burst");
    assert_eq!(opened(1000, 5), 0);
    assert_eq!(opened(1001, 100), 10, "a second's worth");
    assert_eq!(opened(1003, 7), 7);
    assert_eq!(opened(1004, 100), 13 + 10, "what was left, and a second's worth");
    assert_eq!(opened(2000, 100), 25, "and never more than the burst");
    memory.limits.set(Endpoint { full: 1, ..Endpoint::default() });
    assert_eq!(opened(3000, 5), 0, "a full endpoint opens none");
    memory.limits.set(Endpoint::default());
    assert_eq!(opened(3001, 100), 100, "one without limits opens any number");
}

#[test]
fn each_secondary_address_of_the_load_balancer_takes_as_many_flows_again() {
    let memory =
        with_addresses("secondary_addresses = { a = [\"10.0.1.11\", \"10.0.1.12\", \"10.0.1.13\"] }");
    let refused = open(&memory, "S", 4 * AWS);
    assert!(refused <= 4 * AWS / 500, "{refused} were refused");
    let pending = memory.pending.borrow();
    let mut ports = std::collections::BTreeMap::<Ipv4, u32>::new();
    for flow in pending.values().map(|it| it.get()).filter(|it| it.direction() == Direction::ToProvider) {
        *ports.entry(flow.source).or_default() += 1;
    }
    assert_eq!(ports.len(), 4, "{ports:?}");
    assert!(ports.values().all(|count| *count <= NAT_PORT_COUNT), "{ports:?}");
}

/// An entry of the flow with this number, in one direction or the other.
fn entry(number: u32, direction: Direction, idle: u32, generation: u16) -> (FlowKey, Flow) {
    let [_, a, b, c] = number.to_be_bytes();
    let client = FlowKey {
        source: [10, a, b, c],
        destination: [10, 255, 9, 9],
        source_port: U16::new(40000),
        destination_port: U16::new(80),
        vpc: 1,
        protocol: 6,
        reserved: 0,
    };
    let flow = Flow {
        source: [11, a, b, c],
        destination: [10, 0, 0, 1],
        course: Course {
            source_port: U16::new(50000),
            destination_port: U16::new(8080),
            peer_vpc: 2,
            endpoint: 1,
            generation,
            last_seen: flows::now() - idle,
            // What is old may be so for no time at all, and what is not for ever.
            idle_timeout: if idle == 0 { u16::MAX } else { 0 },
            way: direction as u8,
            ..Course::default()
        },
    };
    if direction == Direction::ToProvider {
        return (client, flow);
    }
    let back = Flow {
        source: client.destination,
        destination: client.source,
        course: Course {
            source_port: client.destination_port,
            destination_port: client.source_port,
            peer_vpc: 1,
            ..flow.course
        },
    };
    (client.mirror(&flow), back)
}

#[test]
fn a_sweep_of_half_a_million_flows_removes_exactly_those_that_have_ended() {
    const FLOWS: u32 = 500_000;
    let pins = Pins(format!("/sys/fs/bpf/plt-sweep-{}", std::process::id()).into());
    let kernel =
        Kernel::open(&pins.0, &Limits::default(), Drops::Counted).expect("loading programs needs root");
    let maps = kernel.maps().unwrap();
    maps.endpoints.set(&1, &Endpoint { generation: 7, open: 1, ..Endpoint::default() }).unwrap();
    let old = 10;
    // Of each four flows, one lives, one is idle both ways, one only in one, and one is of a former generation.
    let flow = |number: u32| {
        let (there, back, generation) = match number % 4 {
            0 => (0, 0, 7),
            1 => (old, old, 7),
            2 => (old, 0, 7),
            _ => (0, 0, 6),
        };
        [
            entry(number, Direction::ToProvider, there, generation),
            entry(number, Direction::ToConsumer, back, generation),
        ]
    };
    let entries: Vec<_> = (0..FLOWS).flat_map(flow).collect();
    for chunk in entries.chunks(4096) {
        let (keys, values): (Vec<_>, Vec<_>) = chunk.iter().copied().unzip();
        maps.established.fill(&keys, &values).unwrap();
    }
    let survey = flows::sweep(&maps).unwrap();
    assert_eq!(survey.removed, FLOWS as usize);
    assert_eq!(survey.targets.values().sum::<u32>(), FLOWS / 2, "and it has counted the others");
    let mut left = std::collections::BTreeSet::new();
    maps.established.walk(4096, |keys, _| left.extend(keys.iter().copied())).unwrap();
    let expected: std::collections::BTreeSet<_> =
        (0..FLOWS).filter(|number| matches!(number % 4, 0 | 2)).flat_map(flow).map(|(key, _)| key).collect();
    assert!(left == expected, "{} entries are left, {} expected", left.len(), expected.len());
    assert_eq!(flows::sweep(&maps).unwrap().removed, 0, "and nothing twice");
}
