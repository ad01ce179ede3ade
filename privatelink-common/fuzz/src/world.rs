//! The path's tables in memory: two consumers and a provider who all use the same addresses of both families, small enough to be full
//! soon.

use privatelink_common::frame::SliceFrame;
use privatelink_common::limits::RULE_WORDS;
use privatelink_common::path::{self, Room};
use privatelink_common::tables::{
    Address, BALANCER, Balancer, Bucket, CallerRate, Course, Datagram, ENDPOINT, Egress, Endpoint, Entry,
    Face, Flow, Flow6, FlowKey, FlowKey6, Flows, FragmentKey, Handshake, InsertError, Interface, Listener,
    ListenerKey, Mtu, Neighbour, Pressure, RuleAddress, RulePort, Stream, Subnet, Tables, Target,
    TargetEvent, VpcAddress, VpcEndpointId, Words,
};
use privatelink_common::verdict::{DropReason, Verdict};
use privatelink_common::wire::{Ip, Mac, TCP, UDP};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::{DerefMut, RangeInclusive};
use std::rc::Rc;

/// The consumers' VPCs, and the provider's.
pub const SHOP: u16 = 1;
pub const BANK: u16 = 2;
pub const PAYMENTS: u16 = 3;

/// Each interface's VPC, by its slot, which is also its kernel's index; the last is the provider's stack.
pub const SLOTS: [(u16, u16); 6] =
    [(1, SHOP), (2, BANK), (3, PAYMENTS), (4, PAYMENTS), (6, SHOP), (STACK, PAYMENTS)];
/// The slot of the provider's stack.
pub const STACK: u16 = 5;

const fn four(third: u8, last: u8) -> Ip {
    Ip::from_ipv4([10, 0, third, last])
}

const fn six(last: u8) -> Ip {
    Ip([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last])
}

/// Consumers, of either family.
pub const CLIENTS: [Ip; 4] = [four(1, 5), four(1, 6), six(5), six(6)];
/// Both endpoints' addresses.
pub const ADDRESSES: [Ip; 2] = [four(9, 9), six(0x99)];
/// The load balancer's addresses: of IPv4 its own and a secondary one, and of IPv6.
pub const BALANCERS: [Ip; 3] = [four(1, 10), four(1, 11), six(0x10)];
/// Targets, by their numbers less one; the link-layer address of the last of a family is not known.
pub const TARGETS: [Ip; 6] = [four(1, 21), four(1, 22), four(1, 23), six(0x21), six(0x22), six(0x23)];
pub const TARGET_PORT: u16 = 8080;

/// The listeners: IPv4 targets, IPv6 ones, ones that are told who the client is, and ones that see the client as it is.
pub const PORT: u16 = 80;
pub const PORT6: u16 = 81;
pub const PROXIED: u16 = 82;
pub const PRESERVED: u16 = 83;
/// What a listener of datagrams lies above the one of segments.
pub const DATAGRAMS: u16 = 1000;

/// The consumer's VPC of an endpoint's address: those of the consumers, and those that stand for the provider's own clients.
pub const CONSUMERS: [(u32, u16); 6] =
    [(1, SHOP), (2, BANK), (3, PAYMENTS), (4, SHOP), (5, BANK), (6, PAYMENTS)];

/// Entries that fit.
const ESTABLISHED: usize = 24;
const PENDING: usize = 16;
const STREAMS: usize = 12;
const DATAGRAMS_AT_A_TIME: usize = 8;

/// A set of rules that nothing matches, so that it denies everything.
pub const NOTHING: u32 = 9;

/// Free bytes in front of a frame and behind it, as the kernel has them (XDP_PACKET_HEADROOM).
const HEADROOM: usize = 256;

/// A pair of flow tables.
pub struct Pair<K, F> {
    pub established: RefCell<HashMap<K, Rc<Cell<F>>>>,
    pub pending: RefCell<HashMap<K, Rc<Cell<F>>>>,
    /// The keys of `pending`, the one used least recently first.
    order: RefCell<VecDeque<K>>,
}

impl<K, F> Default for Pair<K, F> {
    fn default() -> Self {
        Self { established: RefCell::default(), pending: RefCell::default(), order: RefCell::default() }
    }
}

impl<K: Copy + Eq + Hash, F: Copy> Pair<K, F> {
    /// The entry of a key, in either table.
    pub fn flow(&self, key: &K) -> Option<F> {
        let established = self.established.borrow().get(key).map(|it| it.get());
        established.or_else(|| self.pending.borrow().get(key).map(|it| it.get()))
    }

    /// Takes an entry of `pending` away, as an eviction does.
    pub fn evict(&self, index: usize) {
        if let Some(key) = self.order.borrow_mut().remove(index) {
            self.pending.borrow_mut().remove(&key);
        }
    }

    fn touch(&self, key: &K) {
        let mut order = self.order.borrow_mut();
        order.retain(|it| it != key);
        order.push_back(*key);
    }

    fn establish(&self, key: &K, flow: &F) -> Result<(), InsertError> {
        let mut entries = self.established.borrow_mut();
        if entries.contains_key(key) {
            return Err(InsertError::Exists);
        }
        if entries.len() >= ESTABLISHED {
            return Err(InsertError::Full);
        }
        entries.insert(*key, Rc::new(Cell::new(*flow)));
        Ok(())
    }

    fn claim(&self, key: &K, flow: &F) -> Result<(), InsertError> {
        if self.pending.borrow().contains_key(key) {
            return Err(InsertError::Exists);
        }
        if self.pending.borrow().len() >= PENDING {
            self.evict(0);
        }
        self.pending.borrow_mut().insert(*key, Rc::new(Cell::new(*flow)));
        self.touch(key);
        Ok(())
    }

    fn forget(&self, key: &K) {
        self.pending.borrow_mut().remove(key);
        self.order.borrow_mut().retain(|it| it != key);
    }
}

pub struct World {
    pub narrow: Pair<FlowKey, Flow>,
    pub wide: Pair<FlowKey6, Flow6>,
    pub streams: RefCell<HashMap<FlowKey, Stream>>,
    pub streams6: RefCell<HashMap<FlowKey6, Stream>>,
    datagrams: RefCell<HashMap<FragmentKey, Datagram>>,
    pub endpoints: BTreeMap<u32, Endpoint>,
    pub targets: BTreeMap<u32, Target>,
    pub neighbours: BTreeMap<VpcAddress, Neighbour>,
    /// What the listeners' tables hold: of IPv4 targets, and of IPv6 ones.
    pub slots: [Vec<u32>; 2],
    pub mtus: BTreeMap<u16, Mtu>,
    /// The sets of rules of the load balancer's security groups, of the subnets that network ACLs are about, and of what rules allow.
    pub listener_rules: u32,
    pub subnet_rules: [u32; 2],
    pub allows: u64,
    pub gone: BTreeSet<u16>,
    room: RefCell<Room>,
    bucket: Cell<Bucket>,
    pressures: RefCell<HashMap<u32, Pressure>>,
    identification: Cell<u32>,
    callers: RefCell<HashMap<VpcAddress, Neighbour>>,
    caller_rates: RefCell<HashMap<u16, CallerRate>>,
    /// What every set of rules is.
    pub rules: Vec<Rule>,
}

impl Default for World {
    fn default() -> Self {
        let endpoint = Endpoint { generation: 1, open: 1, hold: 60, errors: 1, ..Endpoint::default() };
        let target =
            |address| Target { address, port: TARGET_PORT.into(), vpc: PAYMENTS, ..Target::default() };
        let hop = |at: usize, interface| {
            let mac = [2, 0, 0, 0, 3, at as u8];
            (VpcAddress::new(PAYMENTS, TARGETS[at]), Neighbour { mac, interface })
        };
        Self {
            narrow: Pair::default(),
            wide: Pair::default(),
            streams: RefCell::default(),
            streams6: RefCell::default(),
            datagrams: RefCell::default(),
            endpoints: CONSUMERS.map(|(id, _)| (id, endpoint)).into(),
            targets: (1..).zip(TARGETS.map(target)).collect(),
            neighbours: [hop(0, 3), hop(1, 4), hop(3, 3), hop(4, 4)].into(),
            slots: [vec![1, 2, 1, 2, 3], vec![4, 5, 4, 5, 6]],
            mtus: SLOTS.map(|(slot, _)| (slot, 9000)).into(),
            listener_rules: 0,
            subnet_rules: [0; 2],
            allows: u64::MAX,
            gone: BTreeSet::new(),
            room: RefCell::default(),
            bucket: Cell::default(),
            pressures: RefCell::default(),
            identification: Cell::default(),
            callers: RefCell::default(),
            caller_rates: RefCell::default(),
            rules: Vec::new(),
        }
    }
}

pub struct Shared<F>(Rc<Cell<F>>);

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

/// The VPC behind a slot.
pub fn vpc_of(slot: u16) -> Option<u16> {
    SLOTS.iter().find(|(number, _)| *number == slot).map(|(_, vpc)| *vpc)
}

/// What stands for the kernel's cookie.
fn cookie(of: &Handshake) -> u32 {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    (hasher.finish() >> 32) as u32
}

impl World {
    /// Sends a frame by an interface; returns what the path says, and the frame as it is then.
    pub fn send(&self, slot: u16, frame: &[u8], now: u32) -> (Result<Verdict, DropReason>, Vec<u8>) {
        let mut bytes = [&[0xa5; HEADROOM][..], frame, &[0x5a; HEADROOM]].concat();
        let end = bytes.len() - HEADROOM;
        let mut frame = SliceFrame::within(&mut bytes, HEADROOM, end).unwrap();
        let verdict = path::forward(&mut frame, self, slot.into(), now);
        (verdict, frame.as_bytes().to_vec())
    }

    /// A packet of so many bytes fits everywhere.
    fn fits(&self) -> u16 {
        // An interface's that is not known is 0, and so is what fits then.
        let of_interfaces = self.mtus.values().copied();
        let of_endpoints = self.endpoints.values().map(|it| u32::from(it.mtu)).filter(|it| *it != 0);
        of_interfaces.chain(of_endpoints).min().and_then(|it| it.try_into().ok()).unwrap_or_default()
    }
}

/// A rule: the clients that it is about, a bit each, and ports of one protocol.
#[derive(Clone, Debug)]
pub struct Rule {
    pub allow: bool,
    pub clients: u8,
    pub tcp: bool,
    pub ports: RangeInclusive<u16>,
}

impl Default for Rule {
    fn default() -> Self {
        Self { allow: true, clients: 0, tcp: true, ports: 0..=0 }
    }
}

impl Rule {
    pub fn is_about(&self, client: usize) -> bool {
        self.clients >> client & 1 != 0
    }
}

/// Bits, the first one lowest.
struct Mask(Vec<u64>);

impl Words for Mask {
    fn word(&self, index: usize) -> u64 {
        self.0.get(index).copied().unwrap_or_default()
    }
}

fn mask(bits: impl Iterator<Item = bool>) -> Mask {
    let mut words = vec![0; RULE_WORDS];
    bits.enumerate().filter(|(_, is)| *is).for_each(|(at, _)| words[at / 64] |= 1 << (at % 64));
    Mask(words)
}

macro_rules! flows {
    ($key:ty, $flow:ty, $pair:ident, $streams:ident) => {
        impl Flows<$key> for World {
            type Entry = Shared<$flow>;

            fn established(&self, key: &$key) -> Option<Shared<$flow>> {
                self.$pair.established.borrow().get(key).cloned().map(Shared)
            }
            fn pending(&self, key: &$key) -> Option<Shared<$flow>> {
                let entry = self.$pair.pending.borrow().get(key).cloned()?;
                self.$pair.touch(key);
                Some(Shared(entry))
            }
            fn establish(&self, key: &$key, flow: &$flow) -> Result<(), InsertError> {
                self.$pair.establish(key, flow)
            }
            fn claim(&self, key: &$key, flow: &$flow) -> Result<(), InsertError> {
                self.$pair.claim(key, flow)
            }
            fn remove_established(&self, key: &$key) {
                self.$pair.established.borrow_mut().remove(key);
            }
            fn remove_pending(&self, key: &$key) {
                self.$pair.forget(key);
            }
            fn stream(&self, key: &$key) -> Option<Stream> {
                self.$streams.borrow().get(key).copied()
            }
            fn set_stream(&self, key: &$key, stream: &Stream) -> Result<(), InsertError> {
                let mut streams = self.$streams.borrow_mut();
                if streams.len() >= STREAMS && !streams.contains_key(key) {
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

flows!(FlowKey, Flow, narrow, streams);
flows!(FlowKey6, Flow6, wide, streams6);

impl Tables for World {
    fn room<R>(&self, work: impl FnOnce(&mut Room) -> R) -> Option<R> {
        Some(work(&mut self.room.borrow_mut()))
    }
    fn fence(&self) {}
    fn interface(&self, ifindex: u32) -> Option<Interface> {
        let slot = u16::try_from(ifindex).ok()?;
        let vpc = vpc_of(slot)?;
        Some(Interface { vpc, slot, stack: (slot == STACK).into(), fits: self.fits() })
    }
    fn endpoint(&self, endpoint: u32) -> Endpoint {
        self.endpoints.get(&endpoint).copied().unwrap_or_default()
    }
    fn address(&self, address: &VpcAddress) -> Option<Address> {
        let mac = [2, 0, 0, address.vpc as u8, 9, address.address.0[15]];
        let family = ADDRESSES.iter().position(|it| *it == address.address);
        let balancer = BALANCERS.iter().position(|it| *it == address.address);
        // Both of a consumer's addresses lead to the load balancer's first, by which its listeners go.
        let (endpoint, balancer, stack, kind, ping) = match (address.vpc, family, balancer) {
            (vpc @ (SHOP | BANK), Some(family), _) => {
                (u32::from(vpc) + [0, 3][family], 1, 0, ENDPOINT, u8::from(vpc == SHOP))
            }
            (PAYMENTS, _, Some(at)) => ([3, 0, 6][at], [1, 2, 1][at], STACK, BALANCER, 0),
            _ => return None,
        };
        Some(Address { endpoint, balancer, stack, mac, kind, ping, dualstack: 1, rules: 0 })
    }
    fn in_vpc(&self, address: &VpcAddress) -> bool {
        let ours = match address.address.is_ipv4() {
            true => address.address.ipv4()[..2] == [10, 0],
            false => address.address.0[..8] == [0xfd, 0, 0, 0, 0, 0, 0, 0],
        };
        ours && (SHOP..=PAYMENTS).contains(&address.vpc)
    }
    fn rules_of_address(&self, address: &RuleAddress) -> Option<impl Words> {
        if !self.rules.is_empty() {
            let client = CLIENTS.iter().position(|it| it.0 == address.address)?;
            return Some(mask(self.rules.iter().map(|rule| rule.is_about(client))));
        }
        // One rule for every address of a network, and one for each few of them.
        let last = u32::from(address.address[15] & 7);
        (address.set.get() != NOTHING).then(|| Mask(vec![1 << 63 | 1 << last]))
    }
    fn rules_of_port(&self, port: &RulePort) -> Option<impl Words> {
        if !self.rules.is_empty() {
            let matches =
                |rule: &Rule| rule.tcp == (port.protocol == TCP) && rule.ports.contains(&port.port.get());
            let rules = mask(self.rules.iter().map(matches)).0;
            return Some(Mask([rules, mask(self.rules.iter().map(|rule| rule.allow)).0].concat()));
        }
        let rules = if port.protocol == TCP { u64::MAX } else { u64::MAX << 4 };
        let mut words = vec![0; 2 * RULE_WORDS];
        (words[0], words[RULE_WORDS]) = (rules & self.allows, u64::MAX);
        (port.set.get() != NOTHING).then_some(Mask(words))
    }
    fn subnet(&self, address: &VpcAddress) -> Option<Subnet> {
        let [ingress, egress] = self.subnet_rules;
        let id = 1 + u32::from(address.address.0[14]) % 3;
        (address.vpc == PAYMENTS || id != 1).then_some(Subnet { id, ingress, egress })
    }
    fn source(&self, balancer: u32, to_ipv4: bool, pick: usize) -> Option<u32> {
        let sources = if to_ipv4 { [1, 2, 1, 2, 1, 2, 1, 2] } else { [3; 8] };
        (balancer == 1).then(|| sources[pick & 7])
    }
    fn face(&self, balancer: u32) -> Option<Face> {
        let address = *BALANCERS.get(balancer.checked_sub(1)? as usize)?;
        let mac = [2, 0, 0, 3, 9, address.0[15]];
        Some(Balancer { address, vpc: PAYMENTS, mac, ..Balancer::default() }.face())
    }
    fn listener(&self, key: &ListenerKey) -> Option<Listener> {
        let port = match key.protocol {
            TCP => key.port.get(),
            UDP => key.port.get().checked_sub(DATAGRAMS)?,
            _ => return None,
        };
        let table = match (key.balancer, port) {
            (1, PORT | PROXIED | PRESERVED) => 1,
            (1, PORT6) => 2,
            _ => return None,
        };
        let slots = self.slots[table as usize - 1].len() as u32;
        let is = |it: bool| u8::from(it);
        Some(Listener {
            table,
            slots,
            idle_timeout: 350,
            sticky: is(key.protocol == UDP),
            preserve: is(port == PRESERVED),
            ipv6: is(table == 2),
            proxied: is(port == PROXIED),
            reserved: 0,
            rules: self.listener_rules,
        })
    }
    fn slot(&self, table: u32, slot: u32) -> Option<u32> {
        self.slots.get(table.checked_sub(1)? as usize)?.get(slot as usize).copied()
    }
    fn target(&self, target: u32) -> Option<Target> {
        self.targets.get(&target).copied()
    }
    fn neighbour(&self, address: &VpcAddress) -> Option<Neighbour> {
        self.neighbours.get(address).copied()
    }
    fn bucket(&self, _: u32) -> Option<Bucket> {
        Some(self.bucket.get())
    }
    fn set_bucket(&self, _: u32, bucket: Bucket) {
        self.bucket.set(bucket);
    }
    fn vpc_endpoint_id(&self, endpoint: u32) -> VpcEndpointId {
        let text = if endpoint == 1 { *b"vpce-0123456789abcdef0" } else { [0; 22] };
        VpcEndpointId { text, reserved: [0; 2] }
    }
    fn pressure(&self, endpoint: u32) -> Option<Pressure> {
        Some(self.pressures.borrow().get(&endpoint).copied().unwrap_or_default())
    }
    fn set_pressure(&self, endpoint: u32, pressure: Pressure) {
        self.pressures.borrow_mut().insert(endpoint, pressure);
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
        let mut datagrams = self.datagrams.borrow_mut();
        if datagrams.len() >= DATAGRAMS_AT_A_TIME && !datagrams.contains_key(key) {
            return Err(InsertError::Full);
        }
        datagrams.insert(*key, *datagram);
        Ok(())
    }
    fn next_identification(&self) -> u32 {
        let next = self.identification.get();
        self.identification.set(next.wrapping_add(1));
        next
    }
    fn count(&self, _: u32, _: TargetEvent) {}
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
        self.mtus.get(&interface).copied().unwrap_or_default()
    }
    fn egress(&self, interface: u16) -> Option<Egress> {
        (vpc_of(interface).is_some() && !self.gone.contains(&interface)).then_some(Egress::PLAIN)
    }
}
