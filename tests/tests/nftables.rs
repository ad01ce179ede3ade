//! The path and the kernel's own NAT (nftables, with the same mapping, and told to lower the MSS) make the same packets of the same
//! packets: addresses, ports, TTL, MSS, checksums and payload. The link-layer addresses aside, which are each router's own business, and
//! the NAT port, which nftables is told.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests: a panic with its place is what is wanted")]

use pnet_datalink::{Channel, Config, DataLinkReceiver, DataLinkSender, channel, interfaces};
use privatelink_tests::packet::{
    ACK, FIN, Ip, Ip6, Mac, PSH, Packet, RST, SYN, addresses, addresses6, checksum, six,
};
use privatelink_tests::pcapng;
use privatelink_tests::world::{UNCHECKED, World, config, dualstack};
use std::collections::BTreeMap;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const CLIENT: Ip = [10, 0, 1, 5];
const ENDPOINT: Ip = [10, 0, 9, 9];
const BALANCER: Ip = [10, 0, 1, 10];
const TARGET: Ip = [10, 0, 1, 21];
const PORT: u16 = 8080;
/// The same over IPv6.
const CLIENT6: Ip6 = six(5);
const ENDPOINT6: Ip6 = six(0x99);
const BALANCER6: Ip6 = six(0x10);
const TARGET6: Ip6 = six(0x21);

/// One end of a link, on which frames are sent and heard as they are.
struct Wire {
    sender: Box<dyn DataLinkSender>,
    receiver: Box<dyn DataLinkReceiver>,
    mac: Mac,
}

impl Wire {
    fn open(world: &World, namespace: &str) -> Self {
        let work = || {
            let interface = interfaces().into_iter().find(|it| it.name == "eth0").unwrap();
            let config = Config { read_timeout: Some(Duration::from_millis(100)), ..Config::default() };
            let Ok(Channel::Ethernet(sender, receiver)) = channel(&interface, config) else {
                panic!("no channel")
            };
            Self { sender, receiver, mac: interface.mac.unwrap().octets() }
        };
        world.thread(namespace, work).join().unwrap()
    }

    /// Sends a frame; returns what comes out at the other wire from this source.
    fn carry(&mut self, frame: &[u8], to: &mut Self, source: &[u8]) -> Vec<u8> {
        self.sender.send_to(frame, None).unwrap().unwrap();
        let until = Instant::now() + Duration::from_secs(20);
        while Instant::now() < until {
            let Ok(got) = to.receiver.next() else { continue };
            let is_it = got.len() > 53 - 20 * usize::from(got[12] == 8)
                && got[12..14] == frame[12..14]
                && source_of(got) == source
                && number_of(got) == number_of(frame);
            if is_it {
                return got.to_vec();
            }
        }
        panic!("nothing comes of {frame:02x?}");
    }
}

/// A NAT between a client and a target.
struct Nat {
    client: Wire,
    target: Wire,
    /// Where the client sends to, and the target.
    gateways: [Mac; 2],
}

impl Nat {
    fn carry(&mut self, step: &Step, nat: u16) -> Vec<u8> {
        let six = is_ipv6(&step.frame);
        if step.from_client {
            let frame = with_macs(&step.frame, self.gateways[0], self.client.mac);
            let source: &[u8] = if six { &BALANCER6 } else { &BALANCER };
            return self.client.carry(&frame, &mut self.target, source);
        }
        let frame = if six {
            readdressed6(&step.frame, (TARGET6, PORT, BALANCER6, nat))
        } else {
            readdressed(&step.frame, (TARGET, PORT, BALANCER, nat))
        };
        let frame = with_macs(&frame, self.gateways[1], self.target.mac);
        let source: &[u8] = if six { &ENDPOINT6 } else { &ENDPOINT };
        self.target.carry(&frame, &mut self.client, source)
    }
}

fn is_ipv6(frame: &[u8]) -> bool {
    frame[12..14] == [0x86, 0xdd]
}

fn source_of(frame: &[u8]) -> &[u8] {
    if is_ipv6(frame) { &frame[22..38] } else { &frame[26..30] }
}

/// What a packet is known again by: IPv4's identification, or IPv6's flow label.
fn number_of(frame: &[u8]) -> &[u8] {
    if is_ipv6(frame) { &frame[16..18] } else { &frame[18..20] }
}

/// A packet of a conversation; the target's are still to be addressed to where the client's come from.
#[derive(Clone)]
struct Step {
    from_client: bool,
    frame: Vec<u8>,
}

fn with_macs(frame: &[u8], to: Mac, from: Mac) -> Vec<u8> {
    [&to[..], &from, &frame[12..]].concat()
}

/// The packet with other addresses and ports, and checksums computed over the whole.
fn readdressed(frame: &[u8], (from, from_port, to, to_port): (Ip, u16, Ip, u16)) -> Vec<u8> {
    let mut frame = frame.to_vec();
    frame[26..30].copy_from_slice(&from);
    frame[30..34].copy_from_slice(&to);
    frame[34..36].copy_from_slice(&from_port.to_be_bytes());
    frame[36..38].copy_from_slice(&to_port.to_be_bytes());
    frame[24..26].fill(0);
    let sum = checksum(&[&frame[14..34]]).to_be_bytes();
    frame[24..26].copy_from_slice(&sum);
    let at = if frame[23] == 6 { 50 } else { 40 };
    if frame[23] == 17 && frame[at..at + 2] == [0, 0] {
        return frame;
    }
    frame[at..at + 2].fill(0);
    let sum = match transport_sum(&frame) {
        0 if frame[23] == 17 => 0xffff,
        sum => sum,
    };
    frame[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    frame
}

/// The same over IPv6, where UDP always has a checksum.
fn readdressed6(frame: &[u8], (from, from_port, to, to_port): (Ip6, u16, Ip6, u16)) -> Vec<u8> {
    let mut frame = frame.to_vec();
    frame[22..38].copy_from_slice(&from);
    frame[38..54].copy_from_slice(&to);
    frame[54..56].copy_from_slice(&from_port.to_be_bytes());
    frame[56..58].copy_from_slice(&to_port.to_be_bytes());
    let at = if frame[20] == 6 { 70 } else { 60 };
    frame[at..at + 2].fill(0);
    let sum = match transport_sum6(&frame) {
        0 => 0xffff,
        sum => sum,
    };
    frame[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    frame
}

fn transport_sum6(frame: &[u8]) -> u16 {
    let length = [&[0, 0][..], &frame[18..20], &[0, 0, 0, frame[20]]].concat();
    let end = 54 + usize::from(u16::from_be_bytes([frame[18], frame[19]]));
    checksum(&[&frame[22..54], &length, &frame[54..end]])
}

/// The checksum over TCP or UDP and the pseudo-header; of a packet that has its own, zero.
fn transport_sum(frame: &[u8]) -> u16 {
    let end = 14 + usize::from(u16::from_be_bytes([frame[16], frame[17]]));
    let length = u16::try_from(end - 34).unwrap().to_be_bytes();
    checksum(&[&frame[26..34], &[0, frame[23]], &length, &frame[34..end]])
}

/// What is to be the same: everything but the link-layer addresses. Checksums must be right.
fn comparable(frame: &[u8]) -> Vec<u8> {
    if is_ipv6(frame) {
        let end = 54 + usize::from(u16::from_be_bytes([frame[18], frame[19]]));
        assert_eq!(transport_sum6(frame), 0, "the checksum: {frame:02x?}");
        return [&[0; 12], &frame[12..end]].concat();
    }
    let end = 14 + usize::from(u16::from_be_bytes([frame[16], frame[17]]));
    let mut frame = frame[..end].to_vec();
    assert_eq!(checksum(&[&frame[14..34]]), 0, "the IPv4 checksum: {frame:02x?}");
    if frame[23] == 1 {
        assert_eq!(checksum(&[&frame[34..]]), 0, "ICMP's checksum: {frame:02x?}");
    } else if !(frame[23] == 17 && frame[40..42] == [0, 0]) {
        assert_eq!(transport_sum(&frame), 0, "the checksum: {frame:02x?}");
    }
    frame[..12].fill(0);
    frame
}

/// Namespaces beside a world's: a router with nftables, a client and a target without addresses of their own.
struct Router(Vec<String>);

impl Router {
    fn new(world: &World) -> Self {
        let this = Self(["nf", "nc", "ns"].iter().map(|name| world.namespace(name)).collect());
        let [router, client, target] = [&this.0[0], &this.0[1], &this.0[2]];
        for namespace in &this.0 {
            run(&["ip", "netns", "add", namespace]);
        }
        for (name, end, address) in [("c", client, CLIENT), ("s", target, TARGET)] {
            let address = address.map(|it| it.to_string()).join(".");
            let line = |line: &str| run(&line.split_whitespace().collect::<Vec<_>>());
            line(&format!("ip link add {name} netns {router} type veth peer name eth0 netns {end}"));
            for (namespace, link) in [(router, name), (end, "eth0")] {
                line(&format!("ip netns exec {namespace} sysctl -qw net.ipv6.conf.all.disable_ipv6=1"));
                line(&format!("ip -n {namespace} link set {link} up"));
            }
            let mac = mac_of(world, end, "eth0").map(|it| format!("{it:02x}")).join(":");
            line(&format!("ip -n {router} route add {address} dev {name}"));
            line(&format!("ip -n {router} neigh add {address} lladdr {mac} dev {name} nud permanent"));
        }
        for (name, end, address) in [("c", client, "fd00::5"), ("s", target, "fd00::21")] {
            let mac = mac_of(world, end, "eth0").map(|it| format!("{it:02x}")).join(":");
            world.shell(
                "nf",
                &format!(
                    "sysctl -qw net.ipv6.conf.all.forwarding=1 net.ipv6.conf.{name}.disable_ipv6=0 && \
                     ip route add {address} dev {name} && \
                     ip neigh add {address} lladdr {mac} dev {name} nud permanent"
                ),
            );
        }
        // A route must have a source that is the router's.
        run(&["ip", "-n", router, "addr", "add", "192.0.2.1/32", "dev", "c"]);
        world.shell(
            "nf",
            "sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.c.rp_filter=0 net.ipv4.conf.s.rp_filter=0 \
             net.netfilter.nf_conntrack_tcp_be_liberal=1",
        );
        world.shell(
            "nf",
            "nft 'table ip nat {
                chain pre { type nat hook prerouting priority -100;
                    iifname c ip daddr 10.0.9.9 tcp dport 80 dnat to 10.0.1.21:8080;
                    iifname c ip daddr 10.0.9.9 udp dport 53 dnat to 10.0.1.21:8080; };
                chain post { type nat hook postrouting priority 100; };
                chain mss { type filter hook forward priority 0;
                    tcp flags syn tcp option maxseg size set rt mtu; }; }
            table ip6 nat {
                chain pre { type nat hook prerouting priority -100;
                    iifname c ip6 daddr fd00::99 tcp dport 81 dnat to [fd00::21]:8080;
                    iifname c ip6 daddr fd00::99 udp dport 81 dnat to [fd00::21]:8080; };
                chain post { type nat hook postrouting priority 100; };
                chain mss { type filter hook forward priority 0;
                    tcp flags syn tcp option maxseg size set rt mtu; }; }'",
        );
        this
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        for namespace in &self.0 {
            let _ = Command::new("ip").args(["netns", "del", namespace]).stderr(Stdio::null()).status();
        }
    }
}

fn run(line: &[&str]) {
    assert!(Command::new(line[0]).args(&line[1..]).status().unwrap().success(), "{line:?}");
}

fn mac_of(world: &World, namespace: &str, link: &str) -> Mac {
    let name = namespace.rsplit('-').next().unwrap();
    let text = world
        .shell(name, &format!("cat /sys/class/net/{link}/address 2>/dev/null || ip -o link show {link}"));
    let text = text.split_whitespace().rev().find(|it| it.len() == 17 && *it != "ff:ff:ff:ff:ff:ff").unwrap();
    let bytes: Vec<u8> = text.split(':').map(|it| u8::from_str_radix(it, 16).unwrap()).collect();
    bytes.try_into().unwrap()
}

/// The path's hooks.
const HOOKS: [&str; 2] = ["xdp", "tcx"];

/// Both of them, and what they are told of one another.
struct Pair {
    world: World,
    _router: Router,
    path: Nat,
    nftables: Nat,
    /// The NAT port of each conversation, by family, protocol and client's port.
    ports: BTreeMap<(bool, u8, u16), u16>,
}

impl Pair {
    fn new(hook: &str) -> Self {
        let one = config(&format!("hook = \"{hook}\""), UNCHECKED)
            .replace(r#", { address = "10.0.1.22", zone = "a" }"#, "");
        Self::of(World::new(&one))
    }

    fn dualstack(hook: &str) -> Self {
        let one = dualstack(&format!("hook = \"{hook}\""), UNCHECKED)
            .replace(r#", { address = "10.0.1.22", zone = "a" }"#, "")
            .replace(r#", { address = "fd00::22", zone = "a" }"#, "");
        Self::of(World::dualstack(&one, &["ca", "t1"]))
    }

    fn of(world: World) -> Self {
        for end in ["ca", "t1"] {
            // The namespaces' own stacks answer ARP, and say nothing to the packets of others.
            world.shell(
                end,
                "nft 'table ip f { chain in { type filter hook input priority 0; policy drop; }; }
                    table ip6 f { chain in { type filter hook input priority 0;
                        meta l4proto { tcp, udp } drop; }; }'",
            );
        }
        let endpoint =
            world.shell("ca", "ip neigh flush dev eth0; (echo > /dev/udp/10.0.9.9/9) 2>/dev/null; true");
        assert!(endpoint.is_empty());
        let gateway = |end: &str, address: &str| {
            let line = format!("bash -c 'echo x > /dev/udp/{address}/1024'; ip neigh show {address}");
            let text = privatelink_tests::world::eventually("the path answers ARP", || {
                let text = world.shell(end, &line);
                text.contains("lladdr").then_some(text)
            });
            let mac = text.split_whitespace().find(|it| it.len() == 17).unwrap().to_owned();
            let bytes: Vec<u8> = mac.split(':').map(|it| u8::from_str_radix(it, 16).unwrap()).collect();
            Mac::try_from(bytes).unwrap()
        };
        let gateways = [gateway("ca", "10.0.9.9"), gateway("t1", "10.0.1.10")];
        let path = Nat { client: Wire::open(&world, "ca"), target: Wire::open(&world, "t1"), gateways };
        let router = Router::new(&world);
        let gateways = [mac_of(&world, &router.0[0], "c"), mac_of(&world, &router.0[0], "s")];
        let nftables = Nat { client: Wire::open(&world, "nc"), target: Wire::open(&world, "ns"), gateways };
        Self { world, _router: router, path, nftables, ports: BTreeMap::new() }
    }

    /// Sends a packet through both, and compares what comes out; returns what the path makes of it.
    fn compare(&mut self, name: &str, client_port: u16, step: &Step) -> Vec<u8> {
        let six = is_ipv6(&step.frame);
        let flow = (six, step.frame[if six { 20 } else { 23 }], client_port);
        let nat = self.ports.get(&flow).copied();
        let by_path = self.path.carry(step, nat.unwrap_or(0));
        let nat = nat.unwrap_or_else(|| {
            let port = if six { addresses6(&by_path).1 } else { addresses(&by_path).1 };
            let protocol = if flow.1 == 6 { "tcp" } else { "udp" };
            let (table, address) = if six { ("ip6", "[fd00::10]") } else { ("ip", "10.0.1.10") };
            let rule = format!(
                "nft add rule {table} nat post {protocol} sport {client_port} snat to {address}:{port}"
            );
            self.world.shell("nf", &rule);
            self.ports.insert(flow, port);
            port
        });
        let by_nftables = self.nftables.carry(step, nat);
        assert_eq!(comparable(&by_path), comparable(&by_nftables), "{name}");
        by_path
    }

    /// The target complains about a packet that it got from either, as a host does; compares what the client hears.
    fn complain(&mut self, name: &str, id: u16, got: &[u8], (kind, code, rest): (u8, u8, [u8; 4])) {
        let packet = Packet { from: TARGET, to: BALANCER, id, ..Packet::tcp(0) };
        let error = packet.icmp_code(kind, code, &[&rest, &got[14..]].concat());
        let by = |nat: &mut Nat| {
            let frame = with_macs(&error, nat.gateways[1], nat.target.mac);
            comparable(&nat.target.carry(&frame, &mut nat.client, &ENDPOINT))
        };
        let (by_path, by_nftables) = (by(&mut self.path), by(&mut self.nftables));
        assert_eq!(by_path, by_nftables, "{name}");
        assert_eq!((&by_path[30..34], &by_path[54..58]), (&CLIENT[..], &CLIENT[..]), "{name}");
    }
}

fn client(packet: Packet) -> Step {
    Step { from_client: true, frame: packet.build() }
}

fn target(packet: Packet) -> Step {
    let packet = Packet { from: TARGET, from_port: PORT, to: BALANCER, to_port: 1, ..packet };
    Step { from_client: false, frame: packet.build() }
}

/// A TCP connection: opened, used both ways, and closed or reset.
fn connection(port: u16, payload: &[u8], ends_by_reset: bool) -> Vec<Step> {
    let (ours, theirs) = (0x1000_0000 * u32::from(port % 16), 0xffff_fff0_u32);
    let length = u32::try_from(payload.len()).unwrap();
    let packet = |id: u16, flags, seq: u32, ack: u32, payload: &[u8]| Packet {
        from_port: port,
        id: port ^ id,
        seq,
        ack,
        payload: payload.to_vec(),
        // An MSS that is too large here, or one that is not; never at an odd place, where nftables gets the checksum wrong.
        tcp_options: match (flags & SYN, port % 3) {
            (0, _) => Vec::new(),
            (_, 0) => vec![2, 4, 0x23, 0, 1, 3, 3, 7],
            (_, 1) => vec![3, 3, 7, 1, 2, 4, 0x23, 0],
            _ => vec![2, 4, 5, 0],
        },
        ttl: [64, 255, 2][usize::from(port % 3)],
        ..Packet::tcp(flags)
    };
    let (seq, ack) = (ours + 1, theirs.wrapping_add(1));
    let mut steps = vec![
        client(packet(1, SYN, ours, 0, &[])),
        target(packet(2, SYN | ACK, theirs, seq, &[])),
        client(packet(3, ACK, seq, ack, &[])),
        client(packet(4, ACK | PSH, seq, ack, payload)),
        target(packet(5, ACK | PSH, ack, seq + length, payload)),
    ];
    let (seq, ack) = (seq + length, ack.wrapping_add(length));
    if ends_by_reset {
        steps.push(target(packet(6, RST, ack, seq, &[])));
        return steps;
    }
    steps.extend([
        client(packet(6, FIN | ACK, seq, ack, &[])),
        target(packet(7, FIN | ACK, ack, seq + 1, &[])),
        client(packet(8, ACK, seq + 1, ack.wrapping_add(1), &[])),
    ]);
    steps
}

/// A datagram and its answer.
fn exchange(port: u16, payload: &[u8], no_checksum: bool) -> Vec<Step> {
    let packet = |id: u16| Packet {
        from_port: port,
        id: port ^ id,
        payload: payload.to_vec(),
        no_checksum,
        ..Packet::udp()
    };
    vec![
        client(Packet { to_port: 53, ..packet(1) }),
        target(packet(2)),
        client(Packet { to_port: 53, ..packet(3) }),
    ]
}

#[test]
fn the_path_and_nftables_make_the_same_packets_of_the_same_packets() {
    HOOKS.into_iter().for_each(packets);
}

fn packets(hook: &str) {
    let mut pair = Pair::new(hook);
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    for number in 0..24 {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let payload: Vec<u8> =
            (0..random >> 54).map(|it| u8::try_from(random >> (it % 48) & 0xff).unwrap()).collect();
        let port = 40000 + number;
        let steps = match number % 4 {
            0 => connection(port, &payload, false),
            1 => connection(port, &payload, true),
            2 => exchange(port, &payload, false),
            _ => exchange(port, &payload, number % 8 == 3),
        };
        for (at, step) in steps.iter().enumerate() {
            pair.compare(&format!("packet {at} of conversation {number}"), port, step);
        }
    }
    // Checksums about zero, which UDP writes in another way: as they come, and then, by what the NAT changes of them, as they leave.
    let (came, left) = (summed(0, 0x1234), pair.compare("a datagram", SUMMED, &summed(0, 0x1234)));
    let sum = |frame: &[u8]| u32::from(u16::from_be_bytes([frame[40], frame[41]]));
    let shift = u16::try_from((sum(&came.frame) + 0xffff - sum(&left)) % 0xffff).unwrap();
    let mut zeros = 0;
    for (number, middle) in (1..).zip((0..64_u16).map(|_| 0).chain((0..64).map(|_| shift))) {
        let step = summed(number, middle.wrapping_add(number % 64).wrapping_sub(32));
        let out = pair.compare(&format!("datagram {number}"), SUMMED, &step);
        zeros += u32::from(out[40..42] == [0xff, 0xff]);
    }
    assert!(zeros > 0, "a checksum became zero");
}

/// The client's port of datagrams whose checksum is chosen.
const SUMMED: u16 = 50000;

/// A datagram with this checksum, if there is one.
fn summed(id: u16, wanted: u16) -> Step {
    let packet = Packet {
        to_port: 53,
        from_port: SUMMED,
        payload: vec![1, 2, 0, 0],
        id,
        no_checksum: false,
        ..Packet::udp()
    };
    let mut step = client(packet);
    let sum = u32::from(u16::from_be_bytes([step.frame[40], step.frame[41]])) + u32::from(!wanted);
    let rest = u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap_or(1);
    let at = step.frame.len() - 2;
    step.frame[at..].copy_from_slice(&rest.to_be_bytes());
    step.frame = readdressed(&step.frame, (CLIENT, SUMMED, ENDPOINT, 53));
    step
}

/// The same conversation over IPv6; its packets are told apart by their flow labels.
fn over_ipv6(steps: Vec<Step>) -> Vec<Step> {
    let translate = |step: Step| {
        let old = step.frame;
        let length = u16::try_from(old.len() - 34).unwrap().to_be_bytes();
        let mut frame =
            [&old[..12], &[0x86, 0xdd, 0x6a, 0xb0], &old[18..20], &length, &[old[23], old[22]]].concat();
        frame.extend([0; 32]);
        frame.extend(&old[34..]);
        let (from_port, to_port) = (u16::from_be_bytes([old[34], old[35]]), 81);
        let ends = if step.from_client {
            (CLIENT6, from_port, ENDPOINT6, to_port)
        } else {
            (TARGET6, PORT, BALANCER6, 1)
        };
        Step { frame: readdressed6(&frame, ends), ..step }
    };
    steps.into_iter().map(translate).collect()
}

#[test]
fn the_path_and_nftables_make_the_same_packets_of_the_same_packets_over_ipv6() {
    HOOKS.into_iter().for_each(packets6);
}

fn packets6(hook: &str) {
    let mut pair = Pair::dualstack(hook);
    for number in 0..9_u16 {
        let (port, payload) = (40000 + number, vec![0x5a; 100 * usize::from(number)]);
        let steps = match number % 3 {
            0 => connection(port, &payload, false),
            1 => exchange(port, &payload, false),
            _ => connection(port, &payload, true),
        };
        for (at, step) in over_ipv6(steps).iter().enumerate() {
            pair.compare(&format!("packet {at} of conversation {number}"), port, step);
        }
    }
}

#[test]
fn the_path_and_nftables_tell_a_client_the_same_of_what_a_target_complains_about() {
    HOOKS.into_iter().for_each(complaints);
}

fn complaints(hook: &str) {
    let mut pair = Pair::new(hook);
    let errors =
        [(3, 3, [0; 4]), (3, 4, [0, 0, 5, 0]), (11, 1, [0; 4]), (12, 0, [20, 0, 0, 0]), (3, 13, [0; 4])];
    for (number, steps) in (0..).zip([
        connection(40000, b"segment", false),
        exchange(40001, b"datagram", false),
        exchange(40002, b"", true),
    ]) {
        let port = 40000 + number;
        for (at, step) in (0..).zip(&steps[..3]) {
            let name = format!("packet {at} of conversation {number}");
            let out = pair.compare(&name, port, step);
            for (which, error) in (0..).zip(errors.into_iter().filter(|_| step.from_client)) {
                pair.complain(
                    &format!("error {which} about {name}"),
                    1000 * number + 100 * at + which,
                    &out,
                    error,
                );
            }
        }
    }
}

#[test]
fn the_path_and_nftables_make_the_same_packets_of_those_that_were_captured() {
    for hook in HOOKS {
        let [compared, _] = captured(&mut Pair::new(hook), "http", "endpoint shop-to-payments/a");
        assert!(compared >= 10, "{compared} packets are no test of much");
        let compared = captured(&mut Pair::dualstack(hook), "dualstack", "endpoint shop/a");
        assert!(compared.iter().all(|it| *it >= 10), "of both families: {compared:?}");
    }
}

/// Compares what becomes of an endpoint's segments in a capture, as far as they do not change their family. Returns how many there were
/// over IPv4, and over IPv6.
fn captured(pair: &mut Pair, capture: &str, endpoint: &str) -> [usize; 2] {
    let file = format!("{}/captures/{capture}.pcapng", env!("CARGO_MANIFEST_DIR"));
    let records = pcapng::read(&std::fs::read(file).unwrap());
    let mut compared = [0; 2];
    // Both sides of a packet follow one another.
    for sides in records.windows(2) {
        let [came, left] = sides else { continue };
        let sides = (ports(&came.bytes), ports(&left.bytes));
        let (Some(([from, _], six)), Some(([_, to], same))) = sides else { continue };
        if came.outbound || !left.outbound || six != same || !came.comment.contains(endpoint) {
            continue;
        }
        let from_client = came.comment.contains("vpc shop");
        let client_port = if from_client { from } else { to };
        compared[usize::from(six)] += 1;
        let number: usize = compared.iter().sum();
        let step = Step { from_client, frame: numbered(&came.bytes, u16::try_from(number).unwrap()) };
        pair.compare(&format!("packet {number} of {capture}"), client_port, &step);
    }
    compared
}

/// A segment's ports, and whether it goes over IPv6.
fn ports(frame: &[u8]) -> Option<([u16; 2], bool)> {
    let six = is_ipv6(frame);
    let (protocol, at) = if six { (20, 54) } else { (23, 34) };
    let is_tcp = frame.len() >= at + 20 && (six || frame[12..14] == [8, 0]) && frame[protocol] == 6;
    let port = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
    is_tcp.then(|| ([port(at), port(at + 2)], six))
}

/// The packet with a number of its own, by which it is known again.
fn numbered(frame: &[u8], number: u16) -> Vec<u8> {
    let (six, mut frame) = (is_ipv6(frame), frame.to_vec());
    let at = if six { 16 } else { 18 };
    frame[at..at + 2].copy_from_slice(&number.to_be_bytes());
    if six { readdressed6(&frame, addresses6(&frame)) } else { readdressed(&frame, addresses(&frame)) }
}
