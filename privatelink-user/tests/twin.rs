//! The kernel and the host run the same path: 20,000 random, mutated and truncated frames get the same verdict and the same bytes
//! from both. It proves the glue and the compiler, not the logic.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    reason = "a test: a panic with its place is what is wanted"
)]

use aya::programs::{TestRun, TestRunOptions, Xdp};
use privatelink::kernel::{self, Drops, Kernel};
use privatelink::maps::{Maps, PrefixKey};
use privatelink::names::Names;
use privatelink::plan::{self, Image};
use privatelink::{flows, model, reconcile};
use privatelink_common::frame::SliceFrame;
use privatelink_common::path;
use privatelink_common::tables::{
    Address, Balancer, Endpoint, Entry, Flow, FlowKey, InsertError, Interface, Listener, ListenerKey,
    Neighbour, Tables, Target, VpcAddress,
};
use privatelink_common::verdict::{Action, Answer};
use privatelink_common::wire::{Ipv4, Mac};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::path::PathBuf;
use std::rc::Rc;

const FRAMES: usize = 20_000;
const CONFIG: &str = r#"
[limits]
flows = 65536
[vpcs.a]
account = "111122223333"
cidrs = ["10.0.0.0/16"]
interfaces = ["a"]
[vpcs.b]
account = "111122223333"
cidrs = ["10.0.0.0/16"]
interfaces = ["b"]
[target_groups.g]
vpc = "b"
protocol = "tcp_udp"
port = 8080
targets = [{ address = "10.0.1.21", zone = "a" }, { address = "10.0.1.22", zone = "a" }, { address = "10.0.1.23", zone = "a" }]
[load_balancers.l]
vpc = "b"
addresses = { a = "10.0.1.10" }
listeners = [{ protocol = "tcp_udp", port = 80, target_group = "g" }]
[endpoint_services.s]
load_balancers = ["l"]
acceptance_required = false
allowed_principals = ["*"]
[endpoints.e]
vpc = "a"
service = "s"
addresses = { a = "10.0.9.9" }
"#;

/// The tables, in memory.
struct Memory {
    image: Image,
    interface: Cell<Interface>,
    neighbours: HashMap<VpcAddress, Neighbour>,
    established: RefCell<HashMap<FlowKey, Rc<Cell<Flow>>>>,
    pending: RefCell<HashMap<FlowKey, Rc<Cell<Flow>>>>,
}

struct Shared(Rc<Cell<Flow>>);

impl Shared {
    fn change(&self, change: impl FnOnce(&mut Flow)) {
        let mut flow = self.0.get();
        change(&mut flow);
        self.0.set(flow);
    }
}

impl Entry for Shared {
    fn flow(&self) -> Flow {
        self.0.get()
    }
    fn set_last_seen(&self, now: u32) {
        self.change(|flow| flow.last_seen = now);
    }
    fn set_state(&self, state: u8, idle_timeout: u16) {
        self.change(|flow| (flow.state, flow.idle_timeout) = (state, idle_timeout));
    }
    fn set_seen(&self, mac: Mac, interface: u16) {
        self.change(|flow| (flow.seen_mac, flow.seen_interface) = (mac, interface));
    }
    fn set_next_hop(&self, mac: Mac, interface: u16) {
        self.change(|flow| (flow.destination_mac, flow.interface) = (mac, interface));
    }
}

fn insert(
    map: &RefCell<HashMap<FlowKey, Rc<Cell<Flow>>>>,
    key: &FlowKey,
    flow: &Flow,
) -> Result<(), InsertError> {
    if map.borrow().contains_key(key) {
        return Err(InsertError::Exists);
    }
    map.borrow_mut().insert(*key, Rc::new(Cell::new(*flow)));
    Ok(())
}

impl Tables for Memory {
    type Entry = Shared;

    fn interface(&self, _: u32) -> Option<Interface> {
        Some(self.interface.get())
    }
    fn established(&self, key: &FlowKey) -> Option<Shared> {
        self.established.borrow().get(key).cloned().map(Shared)
    }
    fn pending(&self, key: &FlowKey) -> Option<Shared> {
        self.pending.borrow().get(key).cloned().map(Shared)
    }
    fn establish(&self, key: &FlowKey, flow: &Flow) -> Result<(), InsertError> {
        insert(&self.established, key, flow)
    }
    fn claim(&self, key: &FlowKey, flow: &Flow) -> Result<(), InsertError> {
        insert(&self.pending, key, flow)
    }
    fn remove_established(&self, key: &FlowKey) {
        self.established.borrow_mut().remove(key);
    }
    fn remove_pending(&self, key: &FlowKey) {
        self.pending.borrow_mut().remove(key);
    }
    fn endpoint(&self, endpoint: u32) -> Endpoint {
        let open = self.image.endpoints.get(&endpoint).copied().unwrap_or(false);
        Endpoint { generation: open.into(), open: open.into() }
    }
    fn address(&self, address: &VpcAddress) -> Option<Address> {
        self.image.addresses.get(address).copied()
    }
    fn in_vpc(&self, address: &VpcAddress) -> bool {
        let within = |key: &PrefixKey| {
            let shift = 64 - key.bits;
            let network = |it: Ipv4| u32::from_be_bytes(it) >> shift;
            key.prefix.vpc.get() == u32::from(address.vpc)
                && network(key.prefix.address) == network(address.address)
        };
        self.image.prefixes.keys().any(within)
    }
    fn balancer(&self, balancer: u32) -> Option<Balancer> {
        self.image.balancers.get(&balancer).copied()
    }
    fn listener(&self, key: &ListenerKey) -> Option<Listener> {
        self.image.listeners.get(key).copied()
    }
    fn slot(&self, table: u32, slot: u32) -> Option<u32> {
        self.image.tables.get(&table)?.get(slot as usize).copied()
    }
    fn target(&self, target: u32) -> Option<Target> {
        self.image.targets.get(&target).copied()
    }
    fn neighbour(&self, address: &VpcAddress) -> Option<Neighbour> {
        self.neighbours.get(address).copied()
    }
    fn egress(&self, interface: u16) -> bool {
        self.image.interfaces.values().any(|place| place.slot == interface)
    }
}

/// xorshift64*: the same frames in every run.
struct Random(u64);

impl Random {
    fn next(&mut self, below: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        usize::try_from(self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33).unwrap() % below
    }
    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.next(choices.len())]
    }
}

/// A frame that may or may not make sense, from few enough addresses and ports that flows come about.
fn invent(random: &mut Random) -> Vec<u8> {
    let builder = etherparse::PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    let addresses =
        [[10, 0, 1, 5], [10, 0, 1, 6], [10, 0, 9, 9], [10, 0, 1, 10], [10, 0, 1, 21], [10, 1, 0, 1]];
    let (from, to) =
        (random.of(&addresses), random.of(&[[10, 0, 9, 9], [10, 0, 9, 9], [10, 0, 1, 10], [10, 0, 1, 5]]));
    let (from_port, to_port) =
        (random.of(&[1000, 1001, 1002, 8080]), random.of(&[80, 80, 80, 81, 2000, 20000]));
    let mut bytes = Vec::new();
    let payload = vec![0x5a; random.next(40)];
    match random.next(12) {
        0 => {
            let arp = etherparse::ArpPacket::new(
                etherparse::ArpHardwareId::ETHERNET,
                etherparse::EtherType::IPV4,
                etherparse::ArpOperation(u16::try_from(random.next(3)).unwrap()),
                &[2, 0, 0, 0, 0, 1],
                &from,
                &[0; 6],
                &to,
            );
            builder.arp(arp.unwrap()).write(&mut bytes).unwrap();
        }
        1 => builder.ipv4(from, to, 9).icmpv4_echo_request(7, 9).write(&mut bytes, &payload).unwrap(),
        2..=4 => builder.ipv4(from, to, 64).udp(from_port, to_port).write(&mut bytes, &payload).unwrap(),
        _ => {
            let mut tcp = builder.ipv4(from, to, 64).tcp(from_port, to_port, 7, 100);
            for flag in [random.next(6), random.next(9)] {
                tcp = match flag {
                    0 => tcp.fin(),
                    1 => tcp.rst(),
                    2 => tcp.ack(3),
                    3 => tcp.psh(),
                    _ => tcp.syn(),
                };
            }
            tcp.write(&mut bytes, &payload).unwrap();
        }
    }
    bytes
}

/// The answer to a frame that was forwarded.
fn answer(random: &mut Random, frame: &[u8]) -> Vec<u8> {
    let part = |at: usize| -> Ipv4 { frame[at..at + 4].try_into().unwrap() };
    let port = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
    let builder = etherparse::PacketBuilder::ethernet2([2, 0, 0, 0, 0, 3], [2, 0, 0, 0, 0, 4]).ipv4(
        part(30),
        part(26),
        64,
    );
    let mut bytes = Vec::new();
    if frame[23] == 17 {
        builder.udp(port(36), port(34)).write(&mut bytes, b"answer").unwrap();
        return bytes;
    }
    let tcp = builder.tcp(port(36), port(34), 5, 100);
    let tcp = match random.next(8) {
        0 => tcp.rst(),
        1 => tcp.fin().ack(1),
        2 | 3 => tcp.ack(1),
        _ => tcp.syn().ack(1),
    };
    tcp.write(&mut bytes, &[]).unwrap();
    bytes
}

fn mutate(random: &mut Random, frame: &mut Vec<u8>) {
    for _ in 0..random.next(3) {
        let at = random.next(frame.len());
        frame[at] = u8::try_from(random.next(256)).unwrap();
    }
    if random.next(8) == 0 {
        frame.truncate(14 + random.next(frame.len() - 13));
    }
}

struct Pins(PathBuf);

impl Drop for Pins {
    fn drop(&mut self) {
        kernel::remove(&self.0).unwrap();
    }
}

fn on_the_host(memory: &Memory, frame: &[u8], now: u32) -> (u32, Vec<u8>) {
    let mut bytes = frame.to_vec();
    let mut frame = SliceFrame::new(&mut bytes);
    let action = match path::forward(&mut frame, memory, 1, now) {
        Err(_) => 1,
        Ok(verdict) => match verdict.action() {
            Action::Pass => 2,
            Action::Answer(code) if code != Answer::ArpReply.code() && code != Answer::EchoReply.code() => {
                RESET
            }
            Action::Forward { .. } | Action::Steer { .. } | Action::Answer(_) => 4,
        },
    };
    (action, frame.as_bytes().to_vec())
}

/// What [`on_the_host`] says of a frame that has become a RST; the kernel sends it like any other.
const RESET: u32 = 5;

fn in_the_kernel(program: &Xdp, frame: &[u8]) -> (u32, Vec<u8>) {
    let mut out = vec![0; 2048];
    let mut options = TestRunOptions::new();
    options.data_in = Some(frame);
    options.data_out = Some(&mut out);
    let result = program.test_run(options).unwrap();
    out.truncate(result.data_size_out as usize);
    (result.return_value, out)
}

/// Where the targets are; the third one's link-layer address stays unknown.
fn neighbours(image: &Image) -> HashMap<VpcAddress, Neighbour> {
    let place = image.interfaces["b"];
    let hop = |last: u8| {
        let neighbour = Neighbour { mac: [last & 0xfe; 6], interface: place.slot };
        (VpcAddress::new(place.vpc, [10, 0, 1, last]), neighbour)
    };
    [21, 22].into_iter().map(hop).collect()
}

/// The interfaces `a`, `b` and the stack's, in this order.
fn interfaces(image: &Image) -> Vec<Interface> {
    let places = image.interfaces.values();
    places.map(|it| Interface { vpc: it.vpc, slot: it.slot, stack: it.stack.into(), reserved: 0 }).collect()
}

fn memory(image: Image) -> Memory {
    Memory {
        neighbours: neighbours(&image),
        image,
        interface: Cell::default(),
        established: RefCell::default(),
        pending: RefCell::default(),
    }
}

/// A packet of the one connection that the tests about time have.
fn segment(from: (Ipv4, u16), to: (Ipv4, u16), flags: &str) -> Vec<u8> {
    let builder =
        etherparse::PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]).ipv4(from.0, to.0, 64);
    let mut bytes = Vec::new();
    if flags == "udp" {
        builder.udp(from.1, to.1).write(&mut bytes, b"x").unwrap();
        return bytes;
    }
    let tcp = builder.tcp(from.1, to.1, 7, 100);
    let tcp = flags.chars().fold(tcp, |tcp, flag| match flag {
        'S' => tcp.syn(),
        'F' => tcp.fin(),
        'R' => tcp.rst(),
        _ => tcp.ack(3),
    });
    tcp.write(&mut bytes, &[]).unwrap();
    bytes
}

/// One packet: when, whether from the consumer, its flags, and what becomes of it.
type Step = (u32, bool, &'static str, u32);

/// The opening of a connection.
const OPEN: [Step; 3] = [(1000, true, "S", 4), (1000, false, "SA", 4), (1000, true, "A", 4)];

/// Plays a connection.
fn play(steps: &[Step]) {
    let two = CONFIG.replace(", { address = \"10.0.1.23\", zone = \"a\" }", "");
    let model = model::parse(&two, "time.toml").unwrap();
    let image =
        plan::compile(&model, &mut Names::default(), &Default::default(), |_| "stack".into()).unwrap();
    let (interfaces, memory) = (interfaces(&image), memory(image));
    let (client, endpoint) = (([10, 0, 1, 5], 1000), ([10, 0, 9, 9], 80));
    let (mut target, mut nat) = (([0; 4], 0), ([0; 4], 0));
    for (second, consumer, flags, expected) in steps {
        let frame = if *consumer { segment(client, endpoint, flags) } else { segment(target, nat, flags) };
        memory.interface.set(interfaces[usize::from(!consumer)]);
        let (verdict, out) = on_the_host(&memory, &frame, *second);
        assert_eq!(verdict, *expected, "{flags} at {second} s of {steps:?}");
        if *consumer && verdict == 4 {
            let port = |at: usize| u16::from_be_bytes([out[at], out[at + 1]]);
            nat = (out[26..30].try_into().unwrap(), port(34));
            target = (out[30..34].try_into().unwrap(), port(36));
        }
    }
}

fn play_after_opening(steps: &[Step]) {
    play(&[&OPEN[..], steps].concat());
}

#[test]
fn a_tcp_flow_that_idled_out_is_answered_with_a_reset_on_either_side() {
    play_after_opening(&[
        (1350, true, "A", 4),
        (1700, false, "A", 4),
        (2050, true, "A", 4),
        (2401, true, "A", RESET),
    ]);
    play_after_opening(&[(1351, false, "A", RESET), (1351, true, "A", RESET)]);
    // One direction that speaks is enough for both to live.
    play_after_opening(&[(1300, true, "A", 4), (1600, true, "A", 4), (1900, false, "A", 4)]);
}

#[test]
fn a_closed_flow_is_kept_for_a_minute_and_a_reset_one_for_seconds() {
    play_after_opening(&[
        (1001, true, "FA", 4),
        (1340, false, "A", 4),
        (1341, false, "FA", 4),
        (1402, true, "A", RESET),
    ]);
    play_after_opening(&[(1001, false, "RA", 4), (1003, true, "A", 4), (1006, true, "A", RESET)]);
    play_after_opening(&[
        (1001, true, "FA", 4),
        (1001, false, "FA", 4),
        (1002, true, "S", 4),
        (1002, false, "SA", 4),
    ]);
}

#[test]
fn a_handshake_that_takes_over_a_minute_is_forgotten_and_udp_lives_for_two() {
    play(&[(1000, true, "S", 4), (1060, false, "SA", 4), (1121, true, "A", RESET)]);
    play(&[
        (1000, true, "udp", 4),
        (1119, false, "udp", 4),
        (1239, true, "udp", 4),
        (1300, false, "udp", 4),
        (1421, false, "udp", 1),
    ]);
}

#[test]
fn the_kernel_and_the_host_agree_on_every_frame() {
    let pins = Pins(format!("/sys/fs/bpf/plt-twin-{}", std::process::id()).into());
    let model = model::parse(CONFIG, "twin.toml").unwrap();
    let kernel = Kernel::open(&pins.0, &model.limits, Drops::Counted).expect("loading programs needs root");
    let maps: Maps = kernel.maps().unwrap();
    let mut names = Names::default();
    let image = plan::compile(&model, &mut names, &Default::default(), |_| "stack".into()).unwrap();
    reconcile::apply(&maps, &Image::default(), &image).unwrap();
    for (key, hop) in neighbours(&image) {
        maps.neighbours.set(&key, &hop).unwrap();
    }
    for place in image.interfaces.values() {
        // Nothing leaves: a test run returns the verdict. The loopback interface stands for all of them.
        maps.egress.set(&place.slot.into(), &[1, 0]).unwrap();
    }
    let interfaces = interfaces(&image);
    let memory = memory(image);
    let program =
        Xdp::from_pin(pins.0.join("programs/ingress"), aya_obj::programs::XdpAttachType::Interface).unwrap();

    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let (mut sent, mut verdicts) = (Vec::<Vec<u8>>::new(), [0; 5]);
    for number in 0..FRAMES {
        let (mut frame, interface) = match random.next(4) {
            0 if !sent.is_empty() => {
                let chosen = random.next(sent.len());
                (answer(&mut random, &sent[chosen].clone()), interfaces[1])
            }
            _ => (
                invent(&mut random),
                if random.next(5) == 0 { random.of(&interfaces) } else { interfaces[0] },
            ),
        };
        if random.next(3) == 0 {
            mutate(&mut random, &mut frame);
        }
        maps.interfaces.set(&1, &interface).unwrap();
        memory.interface.set(interface);
        let (mut host, kernel) =
            (on_the_host(&memory, &frame, flows::now()), in_the_kernel(&program, &frame));
        host.0 = host.0.min(4);
        assert_eq!(host, kernel, "frame {number}: {frame:02x?} in VPC {}", interface.vpc);
        verdicts[host.0 as usize] += 1;
        if host.0 == 4 && host.1.len() >= 38 && host.1[12..14] == [8, 0] && matches!(host.1[23], 6 | 17) {
            sent.push(host.1);
        }
        if sent.len() > 64 {
            sent.remove(0);
        }
    }
    assert!(
        verdicts[1] > 1000 && verdicts[2] > 1000 && verdicts[4] > 1000,
        "{verdicts:?} is no test of much"
    );
    assert_eq!(
        memory.established.borrow().len(),
        maps.established.keys().unwrap().len(),
        "established entries"
    );
    assert!(!memory.established.borrow().is_empty(), "flows came about");
}
