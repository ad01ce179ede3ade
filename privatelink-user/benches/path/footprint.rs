//! What the agent and the flow tables take of memory, and what a sweep of two million flows takes of time.

use crate::report::Report;
use crate::throughput::{attached, ip, links, rate, translated};
use crate::world::{Pins, World, flow, key};
use privatelink::flows;
use privatelink::model::Limits;
use privatelink_common::tables::{Course, Flow, FlowKey, Key};
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

const ROUNDS: usize = 3;
const FLOWS: u32 = 2_000_000;

const CONFIG: &str = r#"
[vpcs.shop]
account = "111122223333"
cidrs = ["10.0.0.0/16"]
interfaces = ["plb-shop"]
[vpcs.payments]
account = "999900001111"
cidrs = ["10.0.0.0/16"]
interfaces = ["plb-pay"]
[target_groups.web]
vpc = "payments"
protocol = "tcp"
port = 8080
targets = [{ address = "10.0.1.21", zone = "a" }, { address = "10.0.1.22", zone = "a" }]
[load_balancers.edge]
vpc = "payments"
addresses = { a = "10.0.1.10" }
listeners = [{ protocol = "tcp", port = 80, target_group = "web" }]
[endpoint_services.payments]
load_balancers = ["edge"]
acceptance_required = false
allowed_principals = ["*"]
[endpoints.shop]
vpc = "shop"
service = "payments"
addresses = { a = "10.0.9.9" }
"#;

pub(crate) fn run(report: &mut Report) {
    agent(report);
    for (name, flows) in [("1M", 1 << 20), ("4M", 1 << 22), ("16M", 1 << 24)] {
        let world = World::new(&Limits { flows: 2 * flows, ..Limits::default() });
        let bytes = world.maps.established.memory().unwrap() as f64;
        report.add(&format!("memory/flows/{name}"), "MiB", vec![bytes / f64::from(1 << 20)]);
    }
    let limits = Limits { flows: 1 << 22, ..Limits::default() };
    let world = World::new(&limits);
    let entry = world.maps.established.memory().unwrap() as f64 / f64::from(limits.flows);
    report.add("memory/flow", "bytes", vec![2.0 * entry]);
    let entry = world.maps.pending.memory().unwrap() as f64 / f64::from(limits.pending_flows);
    report.add("memory/pending-flow", "bytes", vec![2.0 * entry]);
    sweep(report, &world);
}

/// The resident memory of an agent with default limits, whose interfaces are there, so that it has loaded a program, when it is ready.
fn agent(report: &mut Report) {
    for name in ["plb-shop", "plb-pay"] {
        ip(&format!("link add {name} type veth peer name {name}-end"));
        ip(&format!("link set {name} up"));
    }
    let pins = Pins(format!("/sys/fs/bpf/privatelink-bench-agent-{}", std::process::id()).into());
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("privatelink.toml");
    std::fs::write(&config, CONFIG).unwrap();
    let mut agent = Command::new(env!("CARGO_BIN_EXE_privatelink"))
        .args(["run", "--detach-on-exit", "--config"])
        .arg(&config)
        .arg("--pin-dir")
        .arg(&pins.0)
        .arg("--runtime-dir")
        .arg(dir.path())
        .arg("--state-dir")
        .arg(dir.path())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(agent.stderr.take().unwrap()).lines().map_while(Result::ok);
    let ready = lines.take(100).any(|line| line.contains("ready"));
    let status = std::fs::read_to_string(format!("/proc/{}/status", agent.id())).unwrap_or_default();
    let pid = agent.id().to_string();
    let stopped = Command::new("kill").args(["-TERM", &pid]).status().unwrap().success();
    let ended = agent.wait().unwrap();
    assert!(ready && stopped && ended.success(), "the agent did not run: {ended}");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    let kib: f64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    report.add("memory/agent-resident", "MiB", vec![kib / 1024.0]);
}

/// Two million flows, both directions; as if the load balancer had an address for each.
fn many() -> Vec<(FlowKey, Flow)> {
    let one = |number| {
        let forward = key(number, 17, 53);
        let [_, a, b, c] = forward.source;
        let there = flow(&forward, &FlowKey { source: [11, a, b, c], ..translated(&forward) });
        let back = forward.mirror(&there);
        let answer = FlowKey {
            source: forward.destination,
            destination: forward.source,
            source_port: forward.destination_port,
            destination_port: forward.source_port,
            ..back
        };
        [(forward, there), (back, flow(&back, &answer))]
    };
    (0..FLOWS).flat_map(one).collect()
}

/// How long a sweep takes that finds nothing and one that removes everything, and what it leaves of the traffic, against another
/// CPU that is as busy with something else: two may share a core.
fn sweep(report: &mut Report, world: &World) {
    links(world);
    world.load.set(&0, &[1, 0]).unwrap();
    let _sink = attached(world.program("sink").fd().unwrap().as_fd(), "sink");
    let _ingress = attached(world.ingress.fd().unwrap().as_fd(), "in");
    let flows = many();
    let (mut idle, mut whole) = (Vec::new(), Vec::new());
    let (mut kept, mut removing) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        fill(world, &flows, flows::now());
        let before = beside(world, || spin(1.0)).1;
        let (seconds, during) = beside(world, || sweeping(world, 0));
        idle.push(seconds * 1e3);
        kept.push(during / before);
        fill(world, &flows, 1);
        let (seconds, during) = beside(world, || sweeping(world, flows.len() - 2));
        whole.push(seconds * 1e3);
        removing.push(during / before);
    }
    report.add("sweep/2M/nothing-ended", "ms", idle);
    report.add("sweep/2M/all-ended", "ms", whole);
    report.add("sweep/2M/nothing-ended/traffic-kept", "ratio", kept);
    report.add("sweep/2M/all-ended/traffic-kept", "ratio", removing);
}

/// All but the first flow, which the traffic keeps alive, were last seen at `seen`.
fn fill(world: &World, flows: &[(FlowKey, Flow)], seen: u32) {
    let (seen, now) = (seen.min(flows::now()), flows::now());
    let at = |index: usize| if index < 2 { now } else { seen };
    let aged = |(index, (key, flow)): (usize, &(FlowKey, Flow))| {
        let idle_timeout = if seen == now { u16::MAX } else { 0 };
        (
            *key,
            Flow {
                course: Course {
                    last_seen: at(index),
                    idle_timeout: if index < 2 { u16::MAX } else { idle_timeout },
                    ..flow.course
                },
                ..*flow
            },
        )
    };
    let flows: Vec<_> = flows.iter().enumerate().map(aged).collect();
    for chunk in flows.chunks(4096) {
        let (keys, values): (Vec<_>, Vec<_>) = chunk.iter().copied().unzip();
        world.maps.established.fill(&keys, &values).unwrap();
    }
}

/// Sweeps, and returns the seconds that it took.
fn sweeping(world: &World, ended: usize) -> f64 {
    let started = Instant::now();
    let removed = flows::sweep(&world.maps).unwrap().removed;
    assert_eq!(removed, ended, "the sweep removed what it should not, or left what it should remove");
    started.elapsed().as_secs_f64()
}

/// Does nothing useful for so many seconds.
pub(crate) fn spin(seconds: f64) -> f64 {
    let started = Instant::now();
    while started.elapsed().as_secs_f64() < seconds {
        std::hint::black_box(0);
    }
    seconds
}

/// Does `work` on another CPU while packets flow. Returns what it returns, and the rate meanwhile.
pub(crate) fn beside(world: &World, work: impl FnOnce() -> f64 + Send) -> (f64, f64) {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            let mut cpus = rustix::thread::CpuSet::new();
            cpus.set(1);
            // On a machine with one CPU, they share it.
            let _ = rustix::thread::sched_setaffinity(None, &cpus);
            let result = work();
            done.store(true, Ordering::Relaxed);
            result
        });
        let mut rates = Vec::new();
        while !done.load(Ordering::Relaxed) && rates.len() < 10_000 {
            rates.push(rate(world, 1 << 17));
        }
        let mean = rates.iter().sum::<f64>() / rates.len() as f64;
        (worker.join().unwrap(), mean)
    })
}
