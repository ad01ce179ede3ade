//! The path's tables in memory, and the path over them.

use aya::programs::{TestRun, TestRunOptions, TestRunResult};
use privatelink::kernel;
use privatelink::maps::{AddressRuleKey, PortRuleKey, PrefixKey};
use privatelink::plan::Image;
use privatelink_common::frame::SliceFrame;
use privatelink_common::path::{self, Room};
use privatelink_common::tables::{
    Address, Balancer, Bucket, CallerRate, Course, Datagram, Egress, Endpoint, Entry, Face, Flow, Flow6,
    FlowKey, FlowKey6, Flows, FragmentKey, Handshake, InsertError, Interface, Listener, ListenerKey, Mtu,
    Neighbour, Pressure, RuleAddress, RulePort, Stream, Subnet, Tables, Target, TargetEvent, VpcAddress,
    VpcEndpointId, Words,
};
use privatelink_common::verdict::{Action, Answer, Verdict};
use privatelink_common::wire::{Ip, Mac};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::ops::DerefMut;
use std::path::PathBuf;
use std::rc::Rc;

pub(crate) const CONFIG: &str = r#"
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

/// Both families on both sides: port 80 leads to IPv4 targets, port 81 to IPv6 ones.
pub(crate) const DUALSTACK: &str = r#"
[limits]
flows = 65536
ipv6_flows = 65536
[vpcs.a]
account = "111122223333"
cidrs = ["10.0.0.0/16", "fd00::/64"]
interfaces = ["a"]
[vpcs.b]
account = "111122223333"
cidrs = ["10.0.0.0/16", "fd00::/64"]
interfaces = ["b"]
[target_groups.g]
vpc = "b"
protocol = "tcp"
port = 8080
targets = [{ address = "10.0.1.21", zone = "a" }, { address = "10.0.1.22", zone = "a" }, { address = "10.0.1.23", zone = "a" }]
[target_groups.g6]
vpc = "b"
protocol = "tcp_udp"
ip_address_type = "ipv6"
port = 8080
targets = [{ address = "fd00::15", zone = "a" }, { address = "fd00::16", zone = "a" }, { address = "fd00::17", zone = "a" }]
[load_balancers.l]
vpc = "b"
addresses = { a = ["10.0.1.10", "fd00::a"] }
listeners = [{ protocol = "tcp", port = 80, target_group = "g" }, { protocol = "tcp_udp", port = 81, target_group = "g6" }]
[endpoint_services.s]
load_balancers = ["l"]
acceptance_required = false
allowed_principals = ["*"]
supported_ip_address_types = ["ipv4", "ipv6"]
[endpoints.e]
vpc = "a"
service = "s"
addresses = { a = ["10.0.9.9", "fd00::99"] }
"#;

/// The tables, in memory.
pub(crate) struct Memory {
    pub image: Image,
    pub interface: Cell<Interface>,
    neighbours: HashMap<VpcAddress, Neighbour>,
    pub callers: RefCell<HashMap<VpcAddress, Neighbour>>,
    pub caller_rates: RefCell<HashMap<u16, CallerRate>>,
    pub established: RefCell<HashMap<FlowKey, Rc<Cell<Flow>>>>,
    pub pending: RefCell<HashMap<FlowKey, Rc<Cell<Flow>>>>,
    pub established6: RefCell<HashMap<FlowKey6, Rc<Cell<Flow6>>>>,
    pub pending6: RefCell<HashMap<FlowKey6, Rc<Cell<Flow6>>>>,
    room: RefCell<Room>,
    /// What the endpoint may do; its generation and whether it is open are the image's.
    pub limits: Cell<Endpoint>,
    pub bucket: Cell<Bucket>,
    pub streams: RefCell<HashMap<FlowKey, Stream>>,
    pub streams6: RefCell<HashMap<FlowKey6, Stream>>,
    pub most_streams: Cell<usize>,
    pub pressure: Cell<Pressure>,
    pub counted: RefCell<Vec<TargetEvent>>,
    pub datagrams: RefCell<HashMap<FragmentKey, Datagram>>,
    identification: Cell<u32>,
    /// By slot.
    pub mtus: RefCell<HashMap<u16, Mtu>>,
}

/// What stands for the kernel's cookie.
fn cookie(of: &Handshake) -> u32 {
    let mut hasher = std::hash::DefaultHasher::new();
    of.hash(&mut hasher);
    (hasher.finish() >> 32) as u32
}

/// A value of the tables of rules.
struct Mask(Vec<u64>);

impl Words for Mask {
    fn word(&self, index: usize) -> u64 {
        self.0.get(index).copied().unwrap_or_default()
    }
}

pub(crate) struct Shared<F>(Rc<Cell<F>>);

impl<F: Copy + DerefMut<Target = Course>> Shared<F> {
    fn change(&self, change: impl FnOnce(&mut Course)) {
        let mut flow = self.0.get();
        change(&mut flow);
        self.0.set(flow);
    }
}

impl<F: Copy + DerefMut<Target = Course>> Entry<F> for Shared<F> {
    fn flow(&self) -> F {
        self.0.get()
    }
    fn acknowledged(&self) -> u32 {
        self.0.get().acknowledged
    }
    fn set_last_seen(&self, now: u32) {
        self.change(|flow| flow.last_seen = now);
    }
    fn set_ended(&self, state: u8, idle_timeout: u16, now: u32) {
        self.change(|flow| (flow.state, flow.idle_timeout, flow.last_seen) = (state, idle_timeout, now));
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
    fn set_numbers(&self, sent: u32, acknowledged: u32) {
        self.change(|flow| (flow.sent, flow.acknowledged) = (sent, acknowledged));
    }
}

pub(crate) fn insert<K: Copy + Eq + Hash, F: Copy>(
    map: &RefCell<HashMap<K, Rc<Cell<F>>>>,
    key: &K,
    flow: &F,
) -> Result<(), InsertError> {
    if map.borrow().contains_key(key) {
        return Err(InsertError::Exists);
    }
    map.borrow_mut().insert(*key, Rc::new(Cell::new(*flow)));
    Ok(())
}

macro_rules! flows {
    ($key:ty, $flow:ty, $established:ident, $pending:ident, $streams:ident) => {
        impl Flows<$key> for Memory {
            type Entry = Shared<$flow>;

            fn established(&self, key: &$key) -> Option<Shared<$flow>> {
                self.$established.borrow().get(key).cloned().map(Shared)
            }
            fn pending(&self, key: &$key) -> Option<Shared<$flow>> {
                self.$pending.borrow().get(key).cloned().map(Shared)
            }
            fn establish(&self, key: &$key, flow: &$flow) -> Result<(), InsertError> {
                insert(&self.$established, key, flow)
            }
            fn claim(&self, key: &$key, flow: &$flow) -> Result<(), InsertError> {
                insert(&self.$pending, key, flow)
            }
            fn remove_established(&self, key: &$key) {
                self.$established.borrow_mut().remove(key);
            }
            fn remove_pending(&self, key: &$key) {
                self.$pending.borrow_mut().remove(key);
            }
            fn stream(&self, key: &$key) -> Option<Stream> {
                self.$streams.borrow().get(key).copied()
            }
            fn set_stream(&self, key: &$key, stream: &Stream) -> Result<(), InsertError> {
                let mut streams = self.$streams.borrow_mut();
                if streams.len() >= self.most_streams.get() && !streams.contains_key(key) {
                    return Err(InsertError::Full);
                }
                streams.insert(*key, *stream);
                Ok(())
            }
            fn remove_stream(&self, key: &$key) {
                self.$streams.borrow_mut().remove(key);
            }
        }
    };
}

flows!(FlowKey, Flow, established, pending, streams);
flows!(FlowKey6, Flow6, established6, pending6, streams6);

impl Tables for Memory {
    fn room<R>(&self, work: impl FnOnce(&mut Room) -> R) -> Option<R> {
        Some(work(&mut self.room.borrow_mut()))
    }
    fn fence(&self) {}
    fn interface(&self, _: u32) -> Option<Interface> {
        Some(self.interface.get())
    }
    fn endpoint(&self, endpoint: u32) -> Endpoint {
        let gate = self.image.endpoints.get(&endpoint).copied().unwrap_or_default();
        let open = gate.open.into();
        Endpoint {
            generation: open,
            open,
            mtu: gate.mtu,
            errors: gate.errors.into(),
            rules: gate.rules,
            acls: gate.acls.into(),
            ..self.limits.get()
        }
    }
    fn bucket(&self, _: u32) -> Option<Bucket> {
        Some(self.bucket.get())
    }
    fn set_bucket(&self, _: u32, bucket: Bucket) {
        self.bucket.set(bucket);
    }
    fn vpc_endpoint_id(&self, endpoint: u32) -> VpcEndpointId {
        self.image.vpc_endpoint_ids.get(&endpoint).copied().unwrap_or_default()
    }
    fn pressure(&self, _: u32) -> Option<Pressure> {
        Some(self.pressure.get())
    }
    fn set_pressure(&self, _: u32, pressure: Pressure) {
        self.pressure.set(pressure);
    }
    fn syn_cookie(&self, of: &Handshake) -> Option<u32> {
        Some(cookie(of))
    }
    fn is_syn_cookie(&self, of: &Handshake, it: u32) -> bool {
        cookie(of) == it
    }
    fn datagram(&self, key: &FragmentKey) -> Option<Datagram> {
        self.datagrams.borrow().get(key).copied()
    }
    fn set_datagram(&self, key: &FragmentKey, datagram: &Datagram) -> Result<(), InsertError> {
        self.datagrams.borrow_mut().insert(*key, *datagram);
        Ok(())
    }
    fn next_identification(&self) -> u32 {
        let next = self.identification.get();
        self.identification.set(next.wrapping_add(1));
        next
    }
    fn count(&self, _: u32, event: TargetEvent) {
        self.counted.borrow_mut().push(event);
    }
    fn address(&self, address: &VpcAddress) -> Option<Address> {
        self.image.addresses.get(address).copied()
    }
    fn in_vpc(&self, address: &VpcAddress) -> bool {
        let within = |key: &PrefixKey| {
            let shift = 160 - key.bits;
            let network = |it: [u8; 16]| u128::from_be_bytes(it).checked_shr(shift).unwrap_or(0);
            key.prefix.vpc.get() == u32::from(address.vpc)
                && network(key.prefix.address) == network(address.address.0)
        };
        self.image.prefixes.keys().any(within)
    }
    fn rules_of_address(&self, address: &RuleAddress) -> Option<impl Words> {
        let bits = |key: &RuleAddress| u128::from_be_bytes(key.address);
        let same = |key: &&AddressRuleKey| {
            let shift = 160 - key.bits;
            key.of.set == address.set
                && bits(&key.of).checked_shr(shift).unwrap_or(0)
                    == bits(address).checked_shr(shift).unwrap_or(0)
        };
        let longest = self.image.rules_by_address.keys().filter(same).max_by_key(|key| key.bits)?;
        Some(Mask(self.image.rules_by_address[longest].to_vec()))
    }
    fn rules_of_port(&self, port: &RulePort) -> Option<impl Words> {
        let same = |key: &&PortRuleKey| {
            let shift = 64 - key.bits;
            (key.of.set, key.of.protocol) == (port.set, port.protocol)
                && u32::from(key.of.port.get()) >> shift == u32::from(port.port.get()) >> shift
        };
        let longest = self.image.rules_by_port.keys().filter(same).max_by_key(|key| key.bits)?;
        let found = self.image.rules_by_port[longest];
        Some(Mask([found.rules, found.allows].concat()))
    }
    fn subnet(&self, address: &VpcAddress) -> Option<Subnet> {
        let bits = |address: [u8; 16]| u128::from_be_bytes(address);
        let same = |key: &&PrefixKey| {
            let shift = 160 - key.bits;
            key.prefix.vpc.get() == u32::from(address.vpc)
                && bits(key.prefix.address).checked_shr(shift) == bits(address.address.0).checked_shr(shift)
        };
        let longest = self.image.subnets.keys().filter(same).max_by_key(|key| key.bits)?;
        Some(self.image.subnets[longest])
    }
    fn source(&self, balancer: u32, to_ipv4: bool, pick: usize) -> Option<u32> {
        self.image.balancers.get(&balancer)?.source(to_ipv4, pick)
    }
    fn face(&self, balancer: u32) -> Option<Face> {
        self.image.balancers.get(&balancer).map(Balancer::face)
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
    fn caller(&self, address: &VpcAddress) -> Option<Neighbour> {
        self.callers.borrow().get(address).copied()
    }
    fn set_caller(&self, address: &VpcAddress, caller: &Neighbour) {
        self.callers.borrow_mut().insert(*address, *caller);
    }
    fn caller_rate(&self, interface: u16) -> Option<CallerRate> {
        Some(self.caller_rates.borrow().get(&interface).copied().unwrap_or_default())
    }
    fn set_caller_rate(&self, interface: u16, rate: CallerRate) {
        self.caller_rates.borrow_mut().insert(interface, rate);
    }
    fn mtu(&self, interface: u16) -> Mtu {
        self.mtus.borrow().get(&interface).copied().unwrap_or_default()
    }
    fn egress(&self, interface: u16) -> Option<Egress> {
        self.image.interfaces.values().any(|place| place.slot == interface).then_some(Egress::PLAIN)
    }
}

pub(crate) struct Pins(pub PathBuf);

impl Drop for Pins {
    fn drop(&mut self) {
        kernel::remove(&self.0).unwrap();
    }
}

/// Free bytes in front of a frame and behind it, as the kernel has them (XDP_PACKET_HEADROOM).
const HEADROOM: usize = 256;

/// What a program returns, and the frame as it leaves it.
pub(crate) fn on_the_host(memory: &Memory, frame: &[u8], now: u32) -> (u32, Vec<u8>) {
    let (action, frame) = decide(memory, frame, now);
    let returned = match action {
        None | Some(Action::Hold) => 1,
        Some(Action::Pass) => 2,
        Some(Action::Answer(code)) if !ANSWERS.map(Answer::code).contains(&code) => RESET,
        Some(Action::Forward { .. } | Action::Steer { .. } | Action::Answer(_)) => 4,
    };
    (returned, frame)
}

/// What is to become of a frame, if it is not dropped, and the frame as the path leaves it.
pub(crate) fn decide(memory: &Memory, frame: &[u8], now: u32) -> (Option<Action>, Vec<u8>) {
    let mut bytes = [&[0; HEADROOM][..], frame, &[0; HEADROOM]].concat();
    let end = bytes.len() - HEADROOM;
    let mut frame = SliceFrame::within(&mut bytes, HEADROOM, end).unwrap();
    let action = path::forward(&mut frame, memory, 1, now).ok().map(Verdict::action);
    (action, frame.as_bytes().to_vec())
}

/// Answers that are no RST.
const ANSWERS: [Answer; 3] = [Answer::ArpReply, Answer::EchoReply, Answer::NeighbourAdvertisement];

/// What [`on_the_host`] says of a frame that has become a RST; the kernel sends it like any other.
pub(crate) const RESET: u32 = 5;

/// What a program returns, and the frame as it leaves it.
pub(crate) fn in_the_kernel<P>(program: &P, frame: &[u8]) -> (u32, Vec<u8>)
where
    P: for<'a> TestRun<Opts<'a> = TestRunOptions<'a>, Result = TestRunResult>,
{
    let mut out = vec![0; 2048];
    let mut options = TestRunOptions::new();
    options.data_in = Some(frame);
    options.data_out = Some(&mut out);
    let result = program.test_run(options).unwrap();
    out.truncate(result.data_size_out as usize);
    (result.return_value, out)
}

/// Where the targets are; the third one's link-layer address stays unknown.
pub(crate) fn neighbours(image: &Image) -> HashMap<VpcAddress, Neighbour> {
    let place = image.interfaces["b"];
    let hop = |last: u8| {
        let neighbour = Neighbour { mac: [last & 0xfe; 6], interface: place.slot };
        let six = Ip([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]);
        [
            (VpcAddress::ipv4(place.vpc, [10, 0, 1, last]), neighbour),
            (VpcAddress::new(place.vpc, six), neighbour),
        ]
    };
    [21, 22].into_iter().flat_map(hop).collect()
}

/// The interfaces `a`, `b` and the stack's, in this order.
pub(crate) fn interfaces(image: &Image) -> Vec<Interface> {
    let places = image.interfaces.values();
    places.map(|it| Interface { vpc: it.vpc, slot: it.slot, stack: it.stack.into(), fits: 0 }).collect()
}

pub(crate) fn memory(image: Image) -> Memory {
    Memory {
        neighbours: neighbours(&image),
        callers: RefCell::default(),
        caller_rates: RefCell::default(),
        image,
        interface: Cell::default(),
        established: RefCell::default(),
        pending: RefCell::default(),
        established6: RefCell::default(),
        pending6: RefCell::default(),
        room: RefCell::default(),
        limits: Cell::new(Endpoint { hold: 60, ..Endpoint::default() }),
        bucket: Cell::default(),
        streams: RefCell::default(),
        streams6: RefCell::default(),
        most_streams: Cell::new(usize::MAX),
        pressure: Cell::default(),
        counted: RefCell::default(),
        datagrams: RefCell::default(),
        identification: Cell::default(),
        mtus: RefCell::default(),
    }
}
