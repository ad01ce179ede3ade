//! A new flow through `ingress`, by BPF_PROG_TEST_RUN, and what of it is which step.
//!
//! The steps are those of the program itself: packets that end at one stage after the other, each without being changed, so that it
//! can be run again and again. Only the last stage opens flows: its target is the endpoint's own address, so every packet that it
//! rewrites is the first of another flow.

use crate::report::Report;
use crate::world::{DROP, MAC, PASS, World, key, segment, segment_from, time, time_forwarding};
use aya::programs::Xdp;
use privatelink::maps::PrefixKey;
use privatelink::model::Limits;
use privatelink_common::tables::{
    Address, Balancer, ENDPOINT, Flow, FlowKey, HEALTHY, Listener, ListenerKey, Neighbour, Prefix, Target,
    VpcAddress,
};
use zerocopy::big_endian::{U16, U32};

const ROUNDS: usize = 15;
/// Flows that one run opens: few enough that a NAT port is nearly always free at the first try.
const FLOWS: u32 = 4096;
const SLOTS: u32 = 251;
pub(crate) const SERVICE: [u8; 4] = [10, 255, 9, 9];
pub(crate) const NOWHERE: [u8; 4] = [10, 255, 9, 8];

pub(crate) fn run(report: &mut Report) {
    let world = World::new(&Limits::default());
    configure(&world);
    measure(report, &world);
    evicting(report, &world);
}

/// One endpoint with two listeners: port 80, whose target is reached, and port 81, whose target is not.
pub(crate) fn configure(world: &World) {
    let maps = &world.maps;
    let network = PrefixKey { bits: 40, prefix: Prefix { vpc: U32::new(1), address: [10, 0, 0, 0] } };
    maps.prefixes.set(&network, &1).unwrap();
    let address = Address { endpoint: 1, balancer: 1, mac: MAC, kind: ENDPOINT, ..Address::default() };
    maps.addresses.set(&VpcAddress::new(1, SERVICE), &address).unwrap();
    maps.balancers.set(&1, &Balancer { address: [10, 0, 0, 77], vpc: 1, mac: MAC, sources: [1; 8] }).unwrap();
    let target = Target { address: SERVICE, port: U16::new(80), vpc: 1, state: HEALTHY, ..Target::default() };
    maps.targets.set(&1, &target).unwrap();
    maps.targets.set(&2, &Target { address: NOWHERE, ..target }).unwrap();
    let whole = |target| vec![target; SLOTS as usize];
    maps.tables.set(&[(1, whole(1)), (2, whole(2))]).unwrap();
    for (port, table) in [(80, 1), (81, 2)] {
        let listener = ListenerKey { balancer: 1, port: U16::new(port), protocol: 6, reserved: 0 };
        maps.listeners
            .set(&listener, &Listener { table, slots: SLOTS, idle_timeout: 350, ..Listener::default() })
            .unwrap();
    }
    maps.neighbours
        .set(&VpcAddress::new(1, SERVICE), &Neighbour { mac: [2, 0, 0, 0, 0, 2], interface: 1 })
        .unwrap();
}

fn measure(report: &mut Report, world: &World) {
    let (mut steps, mut total) = ([Vec::new(), Vec::new(), Vec::new(), Vec::new()], Vec::new());
    let syn = |to, port| segment(to, port, |segment| segment.syn());
    for round in 0..=ROUNDS {
        let empty = time(world.program("empty"), &syn(SERVICE, 80), 1 << 20, DROP);
        let reset = segment(SERVICE, 80, |segment| segment.rst());
        let ends = [
            time(&world.ingress, &syn(NOWHERE, 80), 1 << 18, PASS) - empty,
            time(&world.ingress, &reset, 1 << 18, DROP) - empty,
            time(&world.ingress, &syn(SERVICE, 81), 1 << 18, DROP) - empty,
            opened(world, &world.ingress) - empty,
        ];
        if round > 0 {
            total.push(ends[3]);
            let mut before = 0.0;
            for (step, end) in steps.iter_mut().zip(ends) {
                step.push(end - before);
                before = end;
            }
        }
    }
    report.add("new-flow/tcp/ns", "ns", total);
    for (name, step) in ["miss", "admission", "target", "claim"].iter().zip(steps) {
        report.add(&format!("new-flow/tcp/step/{name}"), "ns", step);
    }
}

/// The same while `pending` is full, so that every new flow evicts two entries.
fn evicting(report: &mut Report, world: &World) {
    let room = Limits::default().pending_flows;
    let keys: Vec<FlowKey> = (0..room).map(|number| key(number, 17, 9)).collect();
    let mut figures = Vec::new();
    for round in 0..=ROUNDS {
        for chunk in keys.chunks(4096) {
            world.maps.pending.fill(chunk, &vec![Flow::default(); chunk.len()]).unwrap();
        }
        let empty = time(world.program("empty"), &segment(SERVICE, 80, |it| it.syn()), 1 << 20, DROP);
        let ours = opened(world, &world.ingress) - empty;
        if round > 0 {
            figures.push(ours);
        }
    }
    report.add("new-flow/tcp/pending-full/ns", "ns", figures);
}

/// Nanoseconds a flow opened. The flows are forgotten afterwards.
fn opened(world: &World, ingress: &Xdp) -> f64 {
    let client = |run: u32| {
        let [.., a, b] = run.to_be_bytes();
        segment_from([10, 1, a, b], SERVICE, 80, |segment| segment.syn())
    };
    let figure = time_forwarding(ingress, FLOWS, client);
    let mut ours = Vec::new();
    let of_endpoint = |flow: &Flow| flow.endpoint == 1;
    world
        .maps
        .pending
        .walk(4096, |keys, flows| {
            ours.extend(keys.iter().zip(flows).filter(|(_, it)| of_endpoint(it)).map(|(key, _)| *key));
        })
        .unwrap();
    assert!(ours.len() >= FLOWS as usize, "{} entries: not every packet opened a flow", ours.len());
    ours.iter().for_each(|key| world.maps.pending.delete(key).unwrap());
    figure
}
