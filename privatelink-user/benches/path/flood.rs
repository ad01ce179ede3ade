//! A flood of SYNs from spoofed sources, ten times the size of `pending` a second, and what it leaves of real connections: of those that
//! are established, all; of new ones, those whose handshake is quicker than the flood goes round.

use crate::opening::{SERVICE, configure};
use crate::report::Report;
use crate::throughput::{attached, links, rate_of};
use crate::world::{REDIRECT, World, flow, key, segment};
use aya::programs::{TestRun, TestRunOptions};
use privatelink::model::Limits;
use privatelink_common::limits::COOKIES_SHARE;
use privatelink_common::tables::{Endpoint, Flow, FlowKey};
use privatelink_common::wire::{ACK, SYN};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use zerocopy::big_endian::U16;

const ROUNDS: usize = 5;
/// Real connections tried in a round.
const TRIES: u32 = 40;
/// Connections that were there before.
const OLD: u32 = 10_000;
const PERIOD: Duration = Duration::from_millis(100);

pub(crate) fn run(report: &mut Report) {
    // Small, so that one CPU can send ten times its size.
    let limits = Limits { pending_flows: 16384, ..Limits::default() };
    let world = World::new(&limits);
    configure(&world);
    links(&world);
    world.load.set(&0, &[1 << 24, 1]).unwrap();
    let _sink = attached(world.program("sink").fd().unwrap().as_fd(), "sink");
    let _ingress = attached(world.ingress.fd().unwrap().as_fd(), "in");
    let old: Vec<(FlowKey, Flow)> = (0..OLD)
        .map(|number| {
            let key = key(number, 17, 53);
            (key, flow(&key, &FlowKey { source: [11, 0, 0, 1], ..key }))
        })
        .collect();
    world.fill(&old);
    let mut rates = Vec::new();
    for milliseconds in [1, 10, 50, 100] {
        let mut succeeded = Vec::new();
        for round in 0..ROUNDS {
            let number = u32::try_from(round).unwrap() * 1000 + milliseconds;
            let (rate, share) = under_flood(
                &world,
                limits.pending_flows,
                number,
                Duration::from_millis(milliseconds.into()),
                connects,
            );
            rates.push(rate);
            succeeded.push(share);
        }
        report.add(&format!("syn-flood/handshakes-of-{milliseconds}-ms"), "succeeded", succeeded);
    }
    // As `syn_cookies = "auto"` sets it.
    let cookies = limits.pending_flows / 2 / COOKIES_SHARE;
    world
        .maps
        .endpoints
        .set(&1, &Endpoint { generation: 1, open: 1, cookies, ..Endpoint::default() })
        .unwrap();
    for milliseconds in [10, 100] {
        let shares = (0..ROUNDS).map(|round| {
            let number = u32::try_from(round + 10).unwrap() * 1000 + milliseconds;
            let trip = Duration::from_millis(milliseconds.into());
            under_flood(&world, limits.pending_flows, number, trip, connects_by_cookie).1
        });
        let row = format!("syn-flood/cookies/handshakes-of-{milliseconds}-ms");
        report.add(&row, "succeeded", shares.collect());
    }
    report.add("syn-flood/rate", "pending sizes a second", rates);
    let left = old.iter().filter(|(key, _)| world.maps.established.get(key).unwrap().is_some()).count();
    report.add("syn-flood/established-kept", "ratio", vec![left as f64 / f64::from(OLD)]);
    assert_eq!(left, OLD as usize, "a flood took established flows away");
}

/// The flood's rate in sizes of `pending` a second, and the share of connections that could be opened meanwhile.
fn under_flood(
    world: &World,
    size: u32,
    number: u32,
    trip: Duration,
    connects: impl Fn(&World, u32, Duration) -> bool + Sync,
) -> (f64, f64) {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let clients = scope.spawn(|| {
            // On the flood's own CPU: the kernel's LRU keeps a few entries of each CPU apart, and one without a flood keeps its own.
            // The flood has filled the table by then.
            std::thread::sleep(PERIOD * 3);
            let opened = (0..TRIES).filter(|client| connects(world, number * TRIES + client, trip)).count();
            done.store(true, Ordering::Relaxed);
            opened as f64 / f64::from(TRIES)
        });
        let (started, mut sent) = (Instant::now(), 0u32);
        while !done.load(Ordering::Relaxed) && sent < 1 << 30 {
            rate_of(world, "flood", size);
            sent += size;
            let due = PERIOD * (sent / size);
            std::thread::sleep(due.saturating_sub(started.elapsed()));
        }
        let rate = f64::from(sent / size) / started.elapsed().as_secs_f64();
        (rate, clients.join().unwrap())
    })
}

/// Opens a connection whose round trip takes so long; says whether it came to be.
pub(crate) fn connects(world: &World, client: u32, trip: Duration) -> bool {
    let [_, _, a, b] = client.to_be_bytes();
    let mut syn = segment(SERVICE, 80, |segment| segment.syn());
    (syn[26], syn[27], syn[28], syn[29]) = (10, 200, a, b);
    let Some(there) = through(world, &syn) else { return false };
    std::thread::sleep(trip);
    let port = |at: usize| u16::from_be_bytes([there[at], there[at + 1]]);
    let address = |at: usize| -> [u8; 4] { there[at..at + 4].try_into().unwrap() };
    let mut answer = segment(address(26), port(34), |segment| segment.syn().ack(2));
    answer[26..30].copy_from_slice(&address(30));
    answer[34..36].copy_from_slice(&there[36..38]);
    if through(world, &answer).is_none() {
        return false;
    }
    std::thread::sleep(trip);
    let mut confirmation = segment(SERVICE, 80, |segment| segment.ack(2));
    confirmation[26..30].copy_from_slice(&syn[26..30]);
    let key = FlowKey {
        source: [10, 200, a, b],
        destination: SERVICE,
        source_port: U16::new(40000),
        destination_port: U16::new(80),
        vpc: 1,
        protocol: 6,
        reserved: 0,
    };
    through(world, &confirmation).is_some() && world.maps.established.get(&key).unwrap().is_some()
}

/// The same where the path answers with SYN cookies: the consumer's two round trips, of which the first ends at the path, and the second
/// at the target.
fn connects_by_cookie(world: &World, client: u32, trip: Duration) -> bool {
    let [_, _, a, b] = client.to_be_bytes();
    let source = [10, 200, a, b];
    let from_client = |mut frame: Vec<u8>| {
        frame[26..30].copy_from_slice(&source);
        run_ingress(world, &frame)
    };
    let number = |frame: &[u8], at: usize| u32::from_be_bytes(frame[at..at + 4].try_into().unwrap());
    let answer = from_client(segment(SERVICE, 80, |segment| segment.syn()));
    if answer[47] != SYN | ACK || number(&answer, 42) != 2 {
        return false;
    }
    std::thread::sleep(trip);
    let cookie = number(&answer, 38);
    let ack = |acknowledgement: u32| {
        let mut frame = segment(SERVICE, 80, |segment| segment.ack(acknowledgement));
        frame[38..42].copy_from_slice(&2u32.to_be_bytes());
        frame
    };
    let there = from_client(ack(cookie.wrapping_add(1)));
    if there[47] != SYN {
        return false;
    }
    std::thread::sleep(trip);
    let port = |at: usize| u16::from_be_bytes([there[at], there[at + 1]]);
    let mut greeting = segment(there[26..30].try_into().unwrap(), port(34), |it| it.syn().ack(2));
    greeting[26..30].copy_from_slice(&there[30..34]);
    greeting[34..36].copy_from_slice(&there[36..38]);
    run_ingress(world, &greeting);
    from_client(ack(cookie.wrapping_add(1)));
    let key = FlowKey {
        source,
        destination: SERVICE,
        source_port: U16::new(40000),
        destination_port: U16::new(80),
        vpc: 1,
        protocol: 6,
        reserved: 0,
    };
    world.maps.established.get(&key).unwrap().is_some()
}

/// The frame as the program leaves it.
fn run_ingress(world: &World, frame: &[u8]) -> Vec<u8> {
    let mut out = vec![0; 2048];
    let mut options = TestRunOptions::new();
    options.data_in = Some(frame);
    options.data_out = Some(&mut out);
    let result = world.ingress.test_run(options).unwrap();
    out.truncate(result.data_size_out as usize);
    out
}

/// The frame as it leaves, if it was forwarded as it is, and not answered.
fn through(world: &World, frame: &[u8]) -> Option<Vec<u8>> {
    let mut out = vec![0; 2048];
    let mut options = TestRunOptions::new();
    options.data_in = Some(frame);
    options.data_out = Some(&mut out);
    let result = world.ingress.test_run(options).unwrap();
    out.truncate(result.data_size_out as usize);
    (result.return_value == REDIRECT && out[47] == frame[47]).then_some(out)
}
