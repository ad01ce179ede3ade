//! An established flow through `ingress`, against the floor program of privatelink-ebpf/src/bench.rs, by BPF_PROG_TEST_RUN.
//!
//! Every flow rewrites its packet into the next flow's, in random order, so one run of many repeats walks through all of them; before
//! each, another program gives the packet its TTL back.
//! A figure is what a program takes beyond an empty one, in the same round; rounds alternate.

use crate::report::Report;
use crate::world::{DROP, REDIRECT, World, flow, key, segment};
use privatelink::model::Limits;

const ROUNDS: usize = 25;

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

pub(crate) fn run(report: &mut Report) {
    let mut world = World::new(&Limits::default());
    for (name, count) in [("1", 1u32), ("1k", 1 << 10), ("64k", 1 << 16), ("512k", 1 << 19)] {
        let order = cycle(count);
        let keys: Vec<_> = order.iter().map(|number| key(*number, 6, 80)).collect();
        let next = keys.iter().cycle().skip(1);
        let flows: Vec<_> = keys.iter().zip(next).map(|(from, to)| (*from, flow(from, to))).collect();
        world.fill(&flows);
        measure(report, &mut world, name, count);
    }
}

fn measure(report: &mut Report, world: &mut World, name: &str, count: u32) {
    let repeat = count.max(1 << 20);
    let packet = segment([10, 255, 9, 9], 80, |segment| segment.ack(1));
    let (mut net, mut floors, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        let empty = world.again("empty", &packet, 1 << 20, DROP);
        let mut programs = [("floor", 0.0), ("ingress", 0.0)];
        // In turns, so that neither is always the one whose memory is warm.
        for turn in [round % 2, 1 - round % 2] {
            let (program, took) = &mut programs[turn];
            *took = world.again(program, &packet, repeat, REDIRECT) - empty;
        }
        let [(_, floor), (_, ours)] = programs;
        // The first round warms up.
        if round > 0 {
            net.push(ours);
            floors.push(floor);
            ratios.push(ours / floor);
        }
    }
    report.add(&format!("established/tcp/{name}/over-floor"), "ratio", ratios);
    report.add(&format!("established/tcp/{name}/ingress"), "ns", net);
    report.add(&format!("established/tcp/{name}/floor"), "ns", floors);
}
