//! The kernel and the host run the same path: 20,000 random, mutated and truncated frames get the same verdict and the same bytes
//! from both. It proves the glue and the compiler, not the logic.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    reason = "a test: a panic with its place is what is wanted"
)]

use aya::programs::{TestRun, TestRunOptions, Xdp};
use privatelink::kernel::{self, Kernel};
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
use privatelink_common::verdict::Action;
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

fn on_the_host(memory: &Memory, frame: &[u8]) -> (u32, Vec<u8>) {
    let mut bytes = frame.to_vec();
    let mut frame = SliceFrame::new(&mut bytes);
    let action = match path::forward(&mut frame, memory, 1, flows::now()) {
        Err(_) => 1,
        Ok(verdict) => match verdict.action() {
            Action::Pass => 2,
            Action::Forward { .. } | Action::Steer { .. } | Action::Answer(_) => 4,
        },
    };
    (action, frame.as_bytes().to_vec())
}

fn in_the_kernel(program: &Xdp, frame: &[u8]) -> (u32, Vec<u8>) {
    let mut out = vec![0; 2048];
    let mut options = TestRunOptions::new();
    options.data_in = Some(frame);
    options.data_out = Some(&mut out);
    let result = program.test_run(options).unwrap();
    out.truncate(result.data_size_out as usize);
    (result.return_value, out)
}

#[test]
fn the_kernel_and_the_host_agree_on_every_frame() {
    let pins = Pins(format!("/sys/fs/bpf/plt-twin-{}", std::process::id()).into());
    let model = model::parse(CONFIG, "twin.toml").unwrap();
    let kernel = Kernel::open(&pins.0, &model.limits).expect("loading programs needs root");
    let maps: Maps = kernel.maps().unwrap();
    let mut names = Names::default();
    let image = plan::compile(&model, &mut names, &Default::default(), |_| "stack".into()).unwrap();
    reconcile::apply(&maps, &Image::default(), &image).unwrap();
    let mut neighbours = HashMap::new();
    let b = image.interfaces["b"];
    // The third target's link-layer address stays unknown.
    for (last, mac) in [(21, [6; 6]), (22, [8; 6])] {
        let (key, hop) = (VpcAddress::new(b.vpc, [10, 0, 1, last]), Neighbour { mac, interface: b.slot });
        maps.neighbours.set(&key, &hop).unwrap();
        neighbours.insert(key, hop);
    }
    for place in image.interfaces.values() {
        // Nothing leaves: a test run returns the verdict. The loopback interface stands for all of them.
        maps.egress.set(&place.slot.into(), &[1, 0]).unwrap();
    }
    let interfaces: Vec<_> = image
        .interfaces
        .values()
        .map(|place| Interface { vpc: place.vpc, slot: place.slot, stack: place.stack.into(), reserved: 0 })
        .collect();
    let memory = Memory {
        image,
        interface: Cell::default(),
        neighbours,
        established: RefCell::default(),
        pending: RefCell::default(),
    };
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
        let (host, kernel) = (on_the_host(&memory, &frame), in_the_kernel(&program, &frame));
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
