//! The path's tables in memory: two consumers and a provider who all use the same addresses, small enough to be full soon.

use privatelink_common::frame::SliceFrame;
use privatelink_common::path;
use privatelink_common::tables::{
    Address, BALANCER, Balancer, Bucket, ENDPOINT, Endpoint, Entry, Face, Flow, FlowKey, InsertError,
    Interface, Listener, ListenerKey, Neighbour, Tables, Target, TargetEvent, VpcAddress,
};
use privatelink_common::verdict::{DropReason, Verdict};
use privatelink_common::wire::{Ipv4, Mac, TCP, UDP};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
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

pub const CLIENTS: [Ipv4; 2] = [[10, 0, 1, 5], [10, 0, 1, 6]];
pub const ADDRESS: Ipv4 = [10, 0, 9, 9];
/// The load balancer's address, and its secondary one.
pub const BALANCERS: [Ipv4; 2] = [[10, 0, 1, 10], [10, 0, 1, 11]];
/// Targets; the link-layer address of the last is not known.
pub const TARGETS: [Ipv4; 3] = [[10, 0, 1, 21], [10, 0, 1, 22], [10, 0, 1, 23]];
pub const TARGET_PORT: u16 = 8080;

/// The consumer's VPC of an endpoint: those of the consumers, and the one that stands for the provider's own clients.
pub const CONSUMERS: [(u32, u16); 3] = [(1, SHOP), (2, BANK), (3, PAYMENTS)];

/// Entries that fit.
const ESTABLISHED: usize = 24;
const PENDING: usize = 16;

type Entries = RefCell<HashMap<FlowKey, Rc<Cell<Flow>>>>;

pub struct World {
    pub established: Entries,
    pub pending: Entries,
    /// The keys of `pending`, the one used least recently first.
    pub order: RefCell<VecDeque<FlowKey>>,
    pub endpoints: BTreeMap<u32, Endpoint>,
    pub targets: BTreeMap<u32, Target>,
    pub neighbours: BTreeMap<VpcAddress, Neighbour>,
    /// What the listener's table holds.
    pub slots: Vec<u32>,
    pub gone: BTreeSet<u16>,
    bucket: Cell<Bucket>,
}

impl Default for World {
    fn default() -> Self {
        let endpoint = Endpoint { generation: 1, open: 1, full: 0, rate: 0, burst: 0, hold: 60 };
        let target =
            |address| Target { address, port: TARGET_PORT.into(), vpc: PAYMENTS, ..Target::default() };
        let hop = |last: u8, interface| {
            (VpcAddress::new(PAYMENTS, [10, 0, 1, last]), Neighbour { mac: [2, 0, 0, 0, 3, last], interface })
        };
        Self {
            established: RefCell::default(),
            pending: RefCell::default(),
            order: RefCell::default(),
            endpoints: CONSUMERS.map(|(id, _)| (id, endpoint)).into(),
            targets: (1..).zip(TARGETS.map(target)).collect(),
            neighbours: [hop(21, 3), hop(22, 4)].into(),
            slots: vec![1, 2, 1, 2, 3],
            gone: BTreeSet::new(),
            bucket: Cell::default(),
        }
    }
}

pub struct Shared(Rc<Cell<Flow>>);

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
}

/// The VPC behind a slot.
pub fn vpc_of(slot: u16) -> Option<u16> {
    SLOTS.iter().find(|(number, _)| *number == slot).map(|(_, vpc)| *vpc)
}

impl World {
    /// Sends a frame by an interface; returns what the path says, and the frame as it is then.
    pub fn send(&self, slot: u16, frame: &[u8], now: u32) -> (Result<Verdict, DropReason>, Vec<u8>) {
        let mut bytes = frame.to_vec();
        let mut frame = SliceFrame::new(&mut bytes);
        let verdict = path::forward(&mut frame, self, slot.into(), now);
        (verdict, frame.as_bytes().to_vec())
    }

    /// The entry of a key, in either table.
    pub fn flow(&self, key: &FlowKey) -> Option<Flow> {
        let established = self.established.borrow().get(key).map(|it| it.get());
        established.or_else(|| self.pending.borrow().get(key).map(|it| it.get()))
    }

    /// Takes an entry of `pending` away, as an eviction does.
    pub fn evict(&self, index: usize) {
        if let Some(key) = self.order.borrow_mut().remove(index) {
            self.pending.borrow_mut().remove(&key);
        }
    }

    fn touch(&self, key: &FlowKey) {
        let mut order = self.order.borrow_mut();
        order.retain(|it| it != key);
        order.push_back(*key);
    }
}

impl Tables for World {
    type Entry = Shared;

    fn interface(&self, ifindex: u32) -> Option<Interface> {
        let slot = u16::try_from(ifindex).ok()?;
        let vpc = vpc_of(slot)?;
        Some(Interface { vpc, slot, stack: (slot == STACK).into(), reserved: 0 })
    }
    fn established(&self, key: &FlowKey) -> Option<Shared> {
        self.established.borrow().get(key).cloned().map(Shared)
    }
    fn pending(&self, key: &FlowKey) -> Option<Shared> {
        let entry = self.pending.borrow().get(key).cloned()?;
        self.touch(key);
        Some(Shared(entry))
    }
    fn establish(&self, key: &FlowKey, flow: &Flow) -> Result<(), InsertError> {
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
    fn claim(&self, key: &FlowKey, flow: &Flow) -> Result<(), InsertError> {
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
    fn remove_established(&self, key: &FlowKey) {
        self.established.borrow_mut().remove(key);
    }
    fn remove_pending(&self, key: &FlowKey) {
        self.pending.borrow_mut().remove(key);
        self.order.borrow_mut().retain(|it| it != key);
    }
    fn endpoint(&self, endpoint: u32) -> Endpoint {
        self.endpoints.get(&endpoint).copied().unwrap_or_default()
    }
    fn address(&self, address: &VpcAddress) -> Option<Address> {
        let mac = [2, 0, 0, address.vpc as u8, 9, address.address[3]];
        let (endpoint, balancer, stack, kind, ping) = match (address.vpc, address.address) {
            (SHOP, ADDRESS) => (1, 1, 0, ENDPOINT, 1),
            (BANK, ADDRESS) => (2, 1, 0, ENDPOINT, 0),
            (PAYMENTS, it) if it == BALANCERS[0] => (3, 1, STACK, BALANCER, 0),
            (PAYMENTS, it) if it == BALANCERS[1] => (0, 2, STACK, BALANCER, 0),
            _ => return None,
        };
        Some(Address { endpoint, balancer, stack, mac, kind, ping, reserved: 0 })
    }
    fn in_vpc(&self, address: &VpcAddress) -> bool {
        address.address[..2] == [10, 0] && (SHOP..=PAYMENTS).contains(&address.vpc)
    }
    fn source(&self, balancer: u32, pick: usize) -> Option<u32> {
        (balancer == 1).then(|| [1, 2, 1, 2, 1, 2, 1, 2][pick & 7])
    }
    fn face(&self, balancer: u32) -> Option<Face> {
        let address = *BALANCERS.get(balancer.checked_sub(1)? as usize)?;
        let mac = [2, 0, 0, 3, 9, address[3]];
        Some(Balancer { address, vpc: PAYMENTS, mac, sources: [0; 8] }.face())
    }
    fn listener(&self, key: &ListenerKey) -> Option<Listener> {
        let sticky = match (key.balancer, key.protocol, key.port.get()) {
            (1, TCP, 80) => 0,
            (1, UDP, 53) => 1,
            _ => return None,
        };
        Some(Listener { table: 1, slots: self.slots.len() as u32, idle_timeout: 350, sticky })
    }
    fn slot(&self, table: u32, slot: u32) -> Option<u32> {
        self.slots.get(slot as usize).copied().filter(|_| table == 1)
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
    fn count(&self, _: u32, _: TargetEvent) {}
    fn egress(&self, interface: u16) -> bool {
        vpc_of(interface).is_some() && !self.gone.contains(&interface)
    }
}
