//! Small UDP datagrams through veth, on one CPU: made by an XDP program in live frames, through the program under test on the first
//! veth pair, counted by an XDP program at the far end of the second.
//!
//! ```text
//!   generate (live frames) ──▶ gen ══ in [program under test] ──redirect──▶ out ══ sink [counts, drops]
//! ```

use crate::report::Report;
use crate::world::{World, flow, key};
use aya::maps::PerCpuArray;
use aya::programs::{TestRun, TestRunAttrs, TestRunOptions};
use privatelink::model::Limits;
use privatelink::net::index_of;
use privatelink::sys::{self, Feature, XdpMode};
use privatelink_common::tables::{FlowKey, Interface};
use std::os::fd::{AsFd, OwnedFd};
use std::process::Command;
use std::time::Instant;
use zerocopy::big_endian::U16;

const ROUNDS: usize = 15;
const BATCH: u32 = 64;
/// Smallest Ethernet frame, without its checksum.
const FRAME: [u8; 60] = [0; 60];

const RULES: &str = r#"
table ip bench {
    chain before {
        type nat hook prerouting priority dstnat
        ip daddr 10.255.9.9 udp dport 53 dnat to 192.168.0.2:8080
    }
    chain after {
        type nat hook postrouting priority srcnat
        oifname "out" masquerade
    }
}
"#;

/// What is between the two pairs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Middle {
    Ingress,
    Minimal,
    Redirect,
    Nftables,
}

pub(crate) fn ip(line: &str) {
    let status = Command::new("ip").args(line.split_whitespace()).status().unwrap();
    assert!(status.success(), "ip {line}");
}

pub(crate) fn run(report: &mut Report) {
    let world = World::new(&Limits::default());
    links(&world);
    for (name, count) in [("1", 1u32), ("32k", 1 << 15)] {
        let flows: Vec<_> = (0..count).map(|number| key(number, 17, 53)).collect();
        world.fill(&flows.iter().map(|key| (*key, flow(key, &translated(key)))).collect::<Vec<_>>());
        measure(report, &world, name, count);
    }
}

/// What a NAT makes of a packet.
pub(crate) fn translated(key: &FlowKey) -> FlowKey {
    FlowKey {
        source: [192, 168, 0, 1],
        destination: [192, 168, 0, 2],
        destination_port: U16::new(8080),
        ..*key
    }
}

/// Makes the two pairs, and pins this thread to one CPU, on which all of it then runs.
pub(crate) fn links(world: &World) {
    let mut cpus = rustix::thread::CpuSet::new();
    cpus.set(0);
    rustix::thread::sched_setaffinity(None, &cpus).unwrap();
    ip("link set lo up");
    ip("link add gen type veth peer name in address 02:00:00:00:00:02");
    ip("link add out type veth peer name sink address 02:00:00:00:00:03");
    for name in ["gen", "in", "out", "sink"] {
        std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1").unwrap();
        ip(&format!("link set {name} up"));
    }
    ip("addr add 10.0.0.1/8 dev in");
    ip("addr add 192.168.0.1/24 dev out");
    ip("neigh add 192.168.0.2 lladdr 02:00:00:00:00:03 dev out nud permanent");
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
    let [out, input, generator] = ["out", "in", "gen"].map(|name| index_of(name).unwrap());
    world.maps.egress.set(&1, &[out, 0]).unwrap();
    world.maps.interfaces.set(&input, &Interface { vpc: 1, slot: 1, stack: 0, fits: 1500 }).unwrap();
    world.floor_egress.set(&1, &[out, 0]).unwrap();
    world.floor_egress.set(&2, &[generator, 0]).unwrap();
}

pub(crate) fn nft(rules: &str) {
    use std::io::Write;
    let mut child =
        Command::new("nft").args(["-f", "-"]).stdin(std::process::Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(rules.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "nft refuses the rules");
}

/// Puts something between the pairs, until what it returns is dropped.
fn attach(world: &World, middle: Middle) -> Option<OwnedFd> {
    let fd = match middle {
        Middle::Ingress => world.ingress.fd(),
        Middle::Minimal => world.program("minimal").fd(),
        Middle::Redirect => world.program("redirect").fd(),
        Middle::Nftables => {
            nft(RULES);
            // Without a program of its own, `in` receives redirected frames only with GRO.
            sys::set_feature("in", Feature::Gro, true).unwrap();
            return None;
        }
    };
    Some(attached(fd.unwrap().as_fd(), "in"))
}

pub(crate) fn attached(program: std::os::fd::BorrowedFd<'_>, interface: &str) -> OwnedFd {
    sys::attach_xdp(program, index_of(interface).unwrap(), XdpMode::Native).unwrap()
}

fn detach(middle: Middle) {
    if middle == Middle::Nftables {
        sys::set_feature("in", Feature::Gro, false).unwrap();
        nft("flush ruleset");
    }
}

fn arrived(world: &World) -> u64 {
    let map: PerCpuArray<_, u64> = world.object.map("arrived").unwrap().try_into().unwrap();
    map.get(&0, 0).unwrap().iter().sum()
}

/// Sends `packets`, and returns how many million of them arrived a second.
pub(crate) fn rate(world: &World, packets: u32) -> f64 {
    rate_of(world, "generate", packets)
}

/// The same for what another program makes.
pub(crate) fn rate_of(world: &World, generator: &str, packets: u32) -> f64 {
    let before = arrived(world);
    let mut options = TestRunOptions::new();
    options.data_in = Some(&FRAME);
    options.repeat = packets;
    options.attrs = TestRunAttrs::new().xdp_live_frames(BATCH);
    let started = Instant::now();
    world.program(generator).test_run(options).unwrap();
    let elapsed = started.elapsed();
    let count = arrived(world) - before;
    assert!(
        f64::from(packets) * 0.99 < count as f64,
        "only {count} of {packets} packets arrived: this would not measure the path"
    );
    count as f64 / elapsed.as_secs_f64() / 1e6
}

fn measure(report: &mut Report, world: &World, name: &str, count: u32) {
    let kinds = [
        (Middle::Ingress, "ingress", 1 << 20),
        (Middle::Minimal, "minimal-nat", 1 << 20),
        (Middle::Redirect, "redirect", 1 << 20),
        (Middle::Nftables, "nftables", 1 << 18),
    ];
    world.load.set(&0, &[count, 0]).unwrap();
    let _sink = attached(world.program("sink").fd().unwrap().as_fd(), "sink");
    let mut figures = [Vec::new(), Vec::new(), Vec::new(), Vec::new()];
    for round in 0..=ROUNDS {
        // There and back, so that none is always the first after a change of the machine's mood.
        let mut turns: Vec<_> = kinds.iter().zip(&mut figures).collect();
        if round % 2 == 1 {
            turns.reverse();
        }
        for ((middle, _, packets), figures) in turns {
            let link = attach(world, *middle);
            // Once through all flows, so that connection tracking and caches know them.
            rate(world, count.max(BATCH));
            let figure = rate(world, *packets);
            drop(link);
            detach(*middle);
            if round > 0 {
                figures.push(figure);
            }
        }
    }
    let [ours, others @ ..] = &figures;
    for ((_, other, _), theirs) in kinds[1..].iter().zip(others) {
        let ratios = ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs).collect();
        report.add(&format!("udp-pps/{name}/over-{other}"), "ratio", ratios);
    }
    for ((_, kind, _), figures) in kinds.iter().zip(figures.clone()) {
        report.add(&format!("udp-pps/{name}/{kind}"), "Mpps", figures);
    }
}
