//! What a tenant that opens flows beyond its limit, as fast as a CPU can, leaves of another tenant's traffic, against another CPU that
//! is as busy with something else: two may share a core.

use crate::flood::connects;
use crate::footprint::{beside, spin};
use crate::opening::{NOWHERE, configure};
use crate::report::Report;
use crate::throughput::{attached, links, translated};
use crate::world::{DROP, MAC, World, flow, key, segment, time};
use privatelink::model::Limits;
use privatelink_common::tables::{Address, ENDPOINT, Endpoint, VpcAddress};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const ROUNDS: usize = 15;
/// Connections that the other tenant opens in a round.
const TRIES: u32 = 40;

pub(crate) fn run(report: &mut Report) {
    let world = World::new(&Limits::default());
    configure(&world);
    links(&world);
    world.load.set(&0, &[1, 0]).unwrap();
    let _sink = attached(world.program("sink").fd().unwrap().as_fd(), "sink");
    let _ingress = attached(world.ingress.fd().unwrap().as_fd(), "in");
    let quiet = key(0, 17, 53);
    world.fill(&[(quiet, flow(&quiet, &translated(&quiet)))]);
    limit(&world);
    let (mut kept, mut opened) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let before = beside(&world, || spin(0.3)).1;
        let during = beside(&world, || refused(&world, 0.3)).1;
        kept.push(during / before);
        opened.push(connections(&world, u32::try_from(round).unwrap()));
    }
    report.add("fairness/traffic-kept", "ratio", kept);
    report.add("fairness/handshakes", "succeeded", opened);
}

/// Another endpoint, which may open no flow at all.
fn limit(world: &World) {
    let gate = Endpoint { generation: 1, open: 1, rate: 1, burst: 0, ..Endpoint::default() };
    world.maps.endpoints.set(&2, &gate).unwrap();
    let address = Address { endpoint: 2, balancer: 1, mac: MAC, kind: ENDPOINT, ..Address::default() };
    world.maps.addresses.set(&VpcAddress::ipv4(1, NOWHERE), &address).unwrap();
}

/// Opens flows that are all refused, for so many seconds.
fn refused(world: &World, seconds: f64) -> f64 {
    let (started, syn) = (Instant::now(), segment(NOWHERE, 80, |segment| segment.syn()));
    while started.elapsed().as_secs_f64() < seconds {
        time(&world.ingress, &syn, 1 << 16, DROP);
    }
    seconds
}

/// The share of the other tenant's connections that come to be meanwhile.
fn connections(world: &World, round: u32) -> f64 {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..1_000_000 {
                if done.load(Ordering::Relaxed) {
                    return;
                }
                refused(world, 0.01);
            }
        });
        let trip = Duration::from_millis(1);
        let count = (0..TRIES).filter(|client| connects(world, round * TRIES + client, trip)).count();
        done.store(true, Ordering::Relaxed);
        count as f64 / f64::from(TRIES)
    })
}
