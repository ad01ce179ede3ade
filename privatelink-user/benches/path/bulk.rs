//! One TCP stream between two VPCs of this host, over veth pairs whose ends are in namespaces of their own: by TCX with all that the
//! kernel's defaults leave to devices, by XDP with what it needs of the other ends, by the kernel's forwarding without NAT, and by
//! nftables with DNAT and masquerade.
//!
//! ```text
//!   iperf3 -c ─ eth0 ══ consumer [what is measured] provider ══ eth0 ─ iperf3 -s
//! ```

use crate::report::Report;
use crate::throughput::{ip, nft};
use crate::world::World;
use privatelink::model::Limits;
use privatelink::names::Names;
use privatelink::net::index_of;
use privatelink::plan::{self, Image, Known};
use privatelink::sys::{self, XdpMode};
use privatelink::{model, reconcile};
use privatelink_common::tables::{Interface, Neighbour, VpcAddress};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

const ROUNDS: usize = 15;

/// Two VPCs that do not overlap, so that the kernel can forward between them, too. The endpoint takes what the interfaces take, so that all have
/// the same MSS.
const CONFIG: &str = r#"
[vpcs.a]
account = "111122223333"
cidrs = ["10.1.0.0/16"]
interfaces = ["consumer"]
[vpcs.b]
account = "111122223333"
cidrs = ["10.2.0.0/16"]
interfaces = ["provider"]
[target_groups.g]
vpc = "b"
protocol = "tcp"
port = 5201
targets = [{ address = "10.2.0.21", zone = "a" }]
[load_balancers.l]
vpc = "b"
addresses = { a = "10.2.0.10" }
listeners = [{ protocol = "tcp", port = 5201, target_group = "g" }]
[endpoint_services.s]
load_balancers = ["l"]
acceptance_required = false
allowed_principals = ["*"]
[endpoints.e]
vpc = "a"
service = "s"
addresses = { a = "10.1.9.9" }
mtu = 9000
"#;

const RULES: &str = r#"
table ip bench {
    chain before {
        type nat hook prerouting priority dstnat
        ip daddr 10.3.9.9 tcp dport 5201 dnat to 10.2.0.21:5201
    }
    chain after {
        type nat hook postrouting priority srcnat
        oifname "provider" masquerade
    }
}
"#;

/// What is between the two pairs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Middle {
    Tcx,
    Xdp,
    Forwarding,
    Nftables,
}

const KINDS: [(Middle, &str); 4] = [
    (Middle::Tcx, "tcx"),
    (Middle::Xdp, "xdp"),
    (Middle::Forwarding, "forwarding"),
    (Middle::Nftables, "nftables"),
];

/// A process that holds a network namespace, which ends with it.
struct End(Child);

impl End {
    fn new() -> Self {
        let own = std::fs::read_link("/proc/thread-self/ns/net").unwrap();
        let mut command = Command::new("setpriv");
        let child = command.args(["--pdeathsig", "KILL", "unshare", "-n", "sleep", "3600"]).spawn().unwrap();
        let end = Self(child);
        // It has left this namespace when it has another.
        while std::fs::read_link(format!("/proc/{}/ns/net", end.0.id())).unwrap() == own {
            std::thread::sleep(Duration::from_millis(1));
        }
        end
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("setpriv");
        let pid = self.0.id().to_string();
        command.args(["--pdeathsig", "KILL", "nsenter", "-t", &pid, "-n", program]);
        command
    }

    fn run(&self, line: &str) -> Output {
        let output = self.command("sh").args(["-c", line]).output().unwrap();
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        output
    }

    /// A veth pair into it. What begins with the kernel's default, which may be `bbr`, stays paced when iperf3 asks for another congestion
    /// control, so that the figure would be the pacing timer's.
    fn plug(&self, name: &str, mac: &str, address: &str, gateway: &str) {
        ip(&format!("link add {name} type veth peer name eth0 address {mac} netns {}", self.0.id()));
        ip(&format!("addr add {gateway}/16 dev {name}"));
        ip(&format!("link set {name} up"));
        self.run(&format!(
            "sysctl -qw net.ipv4.tcp_congestion_control=reno && ip link set lo up && ip addr add {address}/16 dev eth0 && \
             ip link set eth0 up && ip route add default via {gateway}"
        ));
    }
}

impl Drop for End {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) fn run(report: &mut Report) {
    let world = World::new(&Limits::default());
    let (client, server) = (End::new(), End::new());
    ip("link set lo up");
    client.plug("consumer", "02:00:00:00:00:0a", "10.1.0.5", "10.1.0.1");
    server.plug("provider", "02:00:00:00:00:0b", "10.2.0.21", "10.2.0.1");
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
    fill(&world);
    let mut listener = server.command("iperf3").arg("-s").stdout(Stdio::null()).spawn().unwrap();
    while server.run("ss -Hltn sport = :5201").stdout.is_empty() {
        std::thread::sleep(Duration::from_millis(10));
    }
    for mtu in [1500, 9000] {
        for name in ["consumer", "provider"] {
            ip(&format!("link set {name} mtu {mtu}"));
        }
        for end in [&client, &server] {
            end.run(&format!("ip link set eth0 mtu {mtu}"));
        }
        measure(report, &world, &client, &server, mtu);
    }
    listener.kill().unwrap();
    listener.wait().unwrap();
}

/// Writes what the agent would.
fn fill(world: &World) {
    let model = model::parse(CONFIG, "bench.toml").unwrap();
    let mut names = Names::default();
    let image = plan::compile(&model, &mut names, &Known::connected(&model), |_| "stack".into()).unwrap();
    reconcile::apply(&world.maps, &Image::default(), &image).unwrap();
    for name in ["consumer", "provider"] {
        let (place, ifindex) = (image.interfaces[name], index_of(name).unwrap());
        let entry = Interface { vpc: place.vpc, slot: place.slot, stack: 0, fits: 0 };
        world.maps.interfaces.set(&ifindex, &entry).unwrap();
        world.maps.egress.set(&place.slot.into(), &[ifindex, 0]).unwrap();
        world.maps.egress_tcx.set(&place.slot.into(), &ifindex).unwrap();
    }
    let place = image.interfaces["provider"];
    let hop = Neighbour { mac: [2, 0, 0, 0, 0, 0x0b], interface: place.slot };
    world.maps.neighbours.set(&VpcAddress::ipv4(place.vpc, [10, 2, 0, 21]), &hop).unwrap();
}

/// Puts something between the pairs, until what it returns is dropped.
fn attach(world: &World, middle: Middle, ends: [&End; 2]) -> Vec<OwnedFd> {
    let indices = ["consumer", "provider"].map(|name| index_of(name).unwrap());
    match middle {
        Middle::Tcx => {
            let program = world.tcx.fd().unwrap().as_fd();
            indices.map(|index| sys::attach_tcx(program, index).unwrap()).into()
        }
        Middle::Xdp => {
            let program = world.ingress.fd().unwrap().as_fd();
            ends.iter().for_each(|end| drop(end.run("ethtool -K eth0 gro on tx off")));
            indices.map(|index| sys::attach_xdp(program, index, XdpMode::Native).unwrap()).into()
        }
        Middle::Forwarding => Vec::new(),
        Middle::Nftables => {
            nft(RULES);
            Vec::new()
        }
    }
}

fn detach(middle: Middle, ends: [&End; 2]) {
    match middle {
        Middle::Xdp => ends.iter().for_each(|end| drop(end.run("ethtool -K eth0 gro off tx on tso on"))),
        Middle::Nftables => nft("flush ruleset"),
        Middle::Tcx | Middle::Forwarding => {}
    }
}

/// Gbit/s that arrive.
fn stream(client: &End, middle: Middle) -> f64 {
    let to = match middle {
        Middle::Tcx | Middle::Xdp => "10.1.9.9",
        Middle::Forwarding => "10.2.0.21",
        Middle::Nftables => "10.3.9.9",
    };
    let output = client.run(&format!("iperf3 -J -O 0.2 -t 1 -c {to}"));
    let result: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    result["end"]["sum_received"]["bits_per_second"].as_f64().unwrap() / 1e9
}

fn measure(report: &mut Report, world: &World, client: &End, server: &End, mtu: u32) {
    let mut figures = KINDS.map(|_| Vec::new());
    for round in 0..=ROUNDS {
        // There and back, so that none is always the first after a change of the machine's mood.
        let mut turns: Vec<_> = KINDS.iter().zip(&mut figures).collect();
        if round % 2 == 1 {
            turns.reverse();
        }
        for ((middle, _), figures) in turns {
            let links = attach(world, *middle, [client, server]);
            let figure = stream(client, *middle);
            drop(links);
            detach(*middle, [client, server]);
            if round > 0 {
                figures.push(figure);
            }
        }
    }
    let [tcx, xdp, forwarding, nftables] = &figures;
    for (name, ours, theirs) in [
        ("tcx/over-forwarding", tcx, forwarding),
        ("tcx/over-nftables", tcx, nftables),
        ("xdp/over-forwarding", xdp, forwarding),
    ] {
        let ratios = ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs).collect();
        report.add(&format!("bulk/{mtu}/{name}"), "ratio", ratios);
    }
    for ((_, kind), figures) in KINDS.iter().zip(figures) {
        report.add(&format!("bulk/{mtu}/{kind}"), "Gbit/s", figures);
    }
}
