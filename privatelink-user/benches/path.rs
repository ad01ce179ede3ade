//! An established flow through `ingress`, against the floor program of privatelink-ebpf/src/bench.rs, by BPF_PROG_TEST_RUN.
//!
//! Every flow rewrites its packet into the next flow's, in random order, so one run of many repeats walks through all of them.
//! A figure is what a program takes beyond an empty one, in the same round; rounds alternate.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    missing_docs,
    reason = "a benchmark, which talks to a person"
)]

use aya::programs::{TestRun, TestRunOptions, Xdp};
use aya::{Ebpf, EbpfLoader};
use privatelink::kernel::{self, Kernel};
use privatelink::maps::Map;
use privatelink::{flows, model::Limits};
use privatelink_common::checksum::{address, delta};
use privatelink_common::tables::{Endpoint, Flow, FlowKey, Interface};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::Instant;
use zerocopy::big_endian::U16;

const ROUNDS: usize = 15;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

struct Pins(PathBuf);

impl Drop for Pins {
    fn drop(&mut self) {
        let _ = kernel::remove(&self.0.join("bench"));
        let _ = kernel::remove(&self.0);
    }
}

/// The flow with this number: a client of its own, one endpoint.
fn key(number: u32) -> FlowKey {
    let [_, a, b, c] = number.to_be_bytes();
    FlowKey {
        source: [10, a, b, c],
        destination: [10, 255, 9, 9],
        source_port: U16::new(40000),
        destination_port: U16::new(80),
        vpc: 1,
        protocol: 6,
        reserved: 0,
    }
}

fn flow(from: &FlowKey, to: &FlowKey) -> Flow {
    Flow {
        source: to.source,
        destination: to.destination,
        source_port: to.source_port,
        destination_port: to.destination_port,
        address_delta: delta(address(from.source), address(to.source)),
        destination_mac: [2, 0, 0, 0, 0, 2],
        source_mac: MAC,
        seen_mac: MAC,
        seen_interface: 1,
        interface: 1,
        peer_vpc: 1,
        endpoint: 1,
        generation: 1,
        last_seen: flows::now(),
        idle_timeout: u16::MAX,
        state: 3,
        ..Flow::default()
    }
}

/// A cycle through all numbers below `count`, in random order.
fn cycle(count: u32) -> Vec<u32> {
    let mut order: Vec<u32> = (0..count).collect();
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    for last in (1..order.len()).rev() {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        order.swap(last, usize::try_from(seed % (last as u64 + 1)).unwrap());
    }
    order
}

fn packet() -> Vec<u8> {
    let builder = etherparse::PacketBuilder::ethernet2(MAC, [2, 0, 0, 0, 0, 2]).ipv4(
        [10, 0, 0, 0],
        [10, 255, 9, 9],
        64,
    );
    let mut bytes = Vec::new();
    builder.tcp(40000, 80, 1, 100).ack(1).write(&mut bytes, &[]).unwrap();
    bytes
}

/// Nanoseconds a packet.
fn time(program: &Xdp, repeat: u32, expected: u32) -> f64 {
    let (packet, mut out) = (packet(), vec![0; 2048]);
    let mut options = TestRunOptions::new();
    options.data_in = Some(&packet);
    options.data_out = Some(&mut out);
    options.repeat = repeat;
    let started = Instant::now();
    let result = program.test_run(options).unwrap();
    assert_eq!(result.return_value, expected, "the program does not do what is to be measured");
    started.elapsed().as_nanos() as f64 / f64::from(repeat)
}

fn load<'a>(object: &'a mut Ebpf, name: &str) -> &'a Xdp {
    let program: &mut Xdp = object.program_mut(name).unwrap().try_into().unwrap();
    program.load().unwrap();
    program
}

fn summary(mut figures: Vec<f64>) -> (f64, f64, f64) {
    figures.sort_by(f64::total_cmp);
    (figures[figures.len() / 2], figures[0], figures[figures.len() - 1])
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let json_at = arguments.iter().position(|it| it == "--json").and_then(|at| arguments.get(at + 1));
    let pins = Pins(format!("/sys/fs/bpf/privatelink-bench-{}", std::process::id()).into());
    let ours = Kernel::open(&pins.0, &Limits::default()).expect("loading programs needs root");
    let maps = ours.maps().unwrap();
    let bench = pins.0.join("bench/maps");
    std::fs::create_dir_all(&bench).unwrap();
    let mut object = EbpfLoader::new()
        .map_pin_path("floor_flows", bench.join("floor_flows"))
        .map_pin_path("floor_egress", bench.join("floor_egress"))
        .load(aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/bench.bpf.o")))
        .unwrap();
    load(&mut object, "empty");
    load(&mut object, "floor");
    let floor_flows: Map<FlowKey, Flow> = Map::open(&bench, "floor_flows").unwrap();
    let floor_egress: Map<u32, [u32; 2]> = Map::open(&bench, "floor_egress").unwrap();
    let ingress = pins.0.join("programs/ingress");
    let ingress = Xdp::from_pin(ingress, aya_obj::programs::XdpAttachType::Interface).unwrap();
    maps.interfaces.set(&1, &Interface { vpc: 1, slot: 1, stack: 0, reserved: 0 }).unwrap();
    maps.egress.set(&1, &[1, 0]).unwrap();
    floor_egress.set(&1, &[1, 0]).unwrap();
    maps.endpoints.set(&1, &Endpoint { generation: 1, open: 1 }).unwrap();

    let mut rows = Vec::new();
    for (name, count) in [("1", 1u32), ("1k", 1 << 10), ("64k", 1 << 16), ("512k", 1 << 19)] {
        fill(&maps.established, &floor_flows, count);
        measure(&mut rows, name, count, &object, &ingress);
    }
    if let Some(path) = json_at {
        std::fs::write(Path::new(path), format!("{:#}\n", serde_json::Value::Array(rows))).unwrap();
    }
}

fn fill(ours: &Map<FlowKey, Flow>, floors: &Map<FlowKey, Flow>, count: u32) {
    let order = cycle(count);
    for chunk in (0..order.len()).collect::<Vec<_>>().chunks(4096) {
        let keys: Vec<_> = chunk.iter().map(|at| key(order[*at])).collect();
        let next = |at: usize| key(order[(at + 1) % order.len()]);
        let values: Vec<_> = chunk.iter().zip(&keys).map(|(at, from)| flow(from, &next(*at))).collect();
        ours.fill(&keys, &values).unwrap();
        floors.fill(&keys, &values).unwrap();
    }
}

fn measure(rows: &mut Vec<serde_json::Value>, name: &str, count: u32, object: &Ebpf, ingress: &Xdp) {
    let program = |name| <&Xdp>::try_from(object.program(name).unwrap()).unwrap();
    let repeat = count.max(1 << 21);
    let (mut net, mut floors, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        let empty = time(program("empty"), 1 << 21, 1);
        let floor = time(program("floor"), repeat, 4) - empty;
        let ours = time(ingress, repeat, 4) - empty;
        // The first round warms up.
        if round > 0 {
            net.push(ours);
            floors.push(floor);
            ratios.push(ours / floor);
        }
    }
    for (what, unit, figures) in
        [("over-floor", "ratio", ratios), ("ingress", "ns", net), ("floor", "ns", floors)]
    {
        let (median, min, max) = summary(figures);
        println!("established/tcp/{name}/{what}: {median:.2} {unit} ({min:.2} to {max:.2}, {ROUNDS} rounds)");
        let name = format!("established/tcp/{name}/{what}");
        rows.push(
            json!({ "name": name, "unit": unit, "median": median, "min": min, "max": max, "rounds": ROUNDS }),
        );
    }
}
