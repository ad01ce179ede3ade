//! The maps that the programs use, as the path's tables in user space. Of what the path writes, they take the one thing that a fragment of a
//! datagram changes whose first has come: that it has come, too.

use crate::maps::{AddressRuleKey, Maps, PortRuleKey, PrefixKey};
use privatelink_common::path::Room;
use privatelink_common::tables::{
    Address, Balancer, Bucket, CallerRate, Course, Datagram, Egress, Endpoint, Entry, Face, Flow, Flow6,
    FlowKey, FlowKey6, Flows, FragmentKey, Handshake, InsertError, Interface, Listener, ListenerKey, Mtu,
    Neighbour, Prefix, Pressure, RuleAddress, RuleMask, RulePort, RulePorts, Stream, Subnet, Tables, Target,
    TargetEvent, VpcAddress, VpcEndpointId, Words,
};
use privatelink_common::wire::Mac;
use std::cell::RefCell;
use std::ops::Deref;
use zerocopy::big_endian::U32;

/// The live tables.
pub struct Live<'a> {
    maps: &'a Maps,
    room: RefCell<Room>,
}

impl<'a> Live<'a> {
    /// Those of these maps.
    pub fn new(maps: &'a Maps) -> Self {
        Self { maps, room: RefCell::default() }
    }
}

/// A value of `rules_by_address`.
struct Mask(RuleMask);

impl Words for Mask {
    fn word(&self, index: usize) -> u64 {
        self.0.get(index).copied().unwrap_or_default()
    }
}

/// A value of `rules_by_port`.
struct Ports(RulePorts);

impl Words for Ports {
    fn word(&self, index: usize) -> u64 {
        self.0.rules.iter().chain(&self.0.allows).nth(index).copied().unwrap_or_default()
    }
}

/// An entry that is a copy, so that nothing reaches the map.
pub struct Copied<F>(pub F);

impl<F: Copy + Deref<Target = Course>> Entry<F> for Copied<F> {
    fn flow(&self) -> F {
        self.0
    }
    fn acknowledged(&self) -> u32 {
        self.0.acknowledged
    }
    fn set_numbers(&self, _: u32, _: u32) {}
    fn set_last_seen(&self, _: u32) {}
    fn set_ended(&self, _: u8, _: u16, _: u32) {}
    fn set_state(&self, _: u8, _: u16) {}
    fn set_seen(&self, _: Mac, _: u16) {}
    fn set_next_hop(&self, _: Mac, _: u16) {}
}

/// The tables of one width, into which nothing is inserted.
macro_rules! flows {
    ($key:ty, $flow:ty, $established:ident, $pending:ident, $streams:ident) => {
        impl Flows<$key> for Live<'_> {
            type Entry = Copied<$flow>;

            fn established(&self, key: &$key) -> Option<Copied<$flow>> {
                self.maps.$established.get(key).ok().flatten().map(Copied)
            }

            fn pending(&self, key: &$key) -> Option<Copied<$flow>> {
                self.maps.$pending.get(key).ok().flatten().map(Copied)
            }

            fn establish(&self, _: &$key, _: &$flow) -> Result<(), InsertError> {
                Err(InsertError::Full)
            }

            fn claim(&self, _: &$key, _: &$flow) -> Result<(), InsertError> {
                Err(InsertError::Full)
            }

            fn remove_established(&self, _: &$key) {}

            fn remove_pending(&self, _: &$key) {}

            fn stream(&self, key: &$key) -> Option<Stream> {
                self.maps.$streams.get(key).ok().flatten()
            }

            fn set_stream(&self, _: &$key, _: &Stream) -> Result<(), InsertError> {
                Err(InsertError::Full)
            }

            fn remove_stream(&self, _: &$key) {}
        }
    };
}

flows!(FlowKey, Flow, established, pending, streams);
flows!(FlowKey6, Flow6, established6, pending6, streams6);

/// An address as the tries of a VPC's networks know it.
fn within(address: &VpcAddress) -> PrefixKey {
    let prefix = Prefix { vpc: U32::new(address.vpc.into()), address: address.address.0 };
    PrefixKey { bits: 160, prefix }
}

impl Tables for Live<'_> {
    fn room<R>(&self, work: impl FnOnce(&mut Room) -> R) -> Option<R> {
        Some(work(&mut self.room.borrow_mut()))
    }

    fn fence(&self) {}

    fn interface(&self, ifindex: u32) -> Option<Interface> {
        self.maps.interfaces.get(&ifindex).ok().flatten()
    }

    fn bucket(&self, endpoint: u32) -> Option<Bucket> {
        self.maps.buckets.get(&endpoint).ok().flatten()
    }

    fn set_bucket(&self, _: u32, _: Bucket) {}

    fn vpc_endpoint_id(&self, endpoint: u32) -> VpcEndpointId {
        self.maps.vpc_endpoint_ids.get(&endpoint).ok().flatten().unwrap_or_default()
    }

    fn pressure(&self, endpoint: u32) -> Option<Pressure> {
        self.maps.pressures.get(&endpoint).ok().flatten()
    }

    fn set_pressure(&self, _: u32, _: Pressure) {}

    fn syn_cookie(&self, _: &Handshake) -> Option<u32> {
        None
    }

    fn is_syn_cookie(&self, _: &Handshake, _: u32) -> bool {
        false
    }

    fn datagram(&self, key: &FragmentKey) -> Option<Datagram> {
        self.maps.fragments.get(key).ok().flatten()
    }

    /// As the programs do: one of two that come at once may be forgotten.
    fn set_datagram(&self, key: &FragmentKey, datagram: &Datagram) -> Result<(), InsertError> {
        self.maps.fragments.set(key, datagram).map_err(|_| InsertError::Full)
    }

    fn next_identification(&self) -> u32 {
        self.maps.identification.get(&0).ok().flatten().unwrap_or_default()
    }

    fn count(&self, _: u32, _: TargetEvent) {}

    fn endpoint(&self, endpoint: u32) -> Endpoint {
        self.maps.endpoints.get(&endpoint).ok().flatten().unwrap_or_default()
    }

    fn address(&self, address: &VpcAddress) -> Option<Address> {
        self.maps.addresses.get(address).ok().flatten()
    }

    fn in_vpc(&self, address: &VpcAddress) -> bool {
        self.maps.prefixes.get(&within(address)).is_ok_and(|it| it.is_some())
    }

    fn rules_of_address(&self, address: &RuleAddress) -> Option<impl Words> {
        self.maps.rules_by_address.get(&AddressRuleKey { bits: 160, of: *address }).ok().flatten().map(Mask)
    }

    fn rules_of_port(&self, port: &RulePort) -> Option<impl Words> {
        self.maps.rules_by_port.get(&PortRuleKey { bits: 64, of: *port }).ok().flatten().map(Ports)
    }

    fn subnet(&self, address: &VpcAddress) -> Option<Subnet> {
        self.maps.subnets.get(&within(address)).ok().flatten()
    }

    fn source(&self, balancer: u32, to_ipv4: bool, pick: usize) -> Option<u32> {
        self.maps.balancers.get(&balancer).ok().flatten()?.source(to_ipv4, pick)
    }

    fn face(&self, balancer: u32) -> Option<Face> {
        self.maps.balancers.get(&balancer).ok().flatten().as_ref().map(Balancer::face)
    }

    fn listener(&self, key: &ListenerKey) -> Option<Listener> {
        self.maps.listeners.get(key).ok().flatten()
    }

    fn slot(&self, table: u32, slot: u32) -> Option<u32> {
        self.maps.tables.get(table).ok().flatten().and_then(|table| table.get(slot).ok().flatten())
    }

    fn target(&self, target: u32) -> Option<Target> {
        self.maps.targets.get(&target).ok().flatten()
    }

    fn neighbour(&self, address: &VpcAddress) -> Option<Neighbour> {
        self.maps.neighbours.get(address).ok().flatten()
    }

    fn caller(&self, address: &VpcAddress) -> Option<Neighbour> {
        self.maps.callers.get(address).ok().flatten()
    }

    fn set_caller(&self, _: &VpcAddress, _: &Neighbour) {}

    fn caller_rate(&self, interface: u16) -> Option<CallerRate> {
        self.maps.caller_rates.get(&interface.into()).ok().flatten()
    }

    fn set_caller_rate(&self, _: u16, _: CallerRate) {}

    fn mtu(&self, interface: u16) -> Mtu {
        self.maps.mtus.get(&interface.into()).ok().flatten().unwrap_or_default()
    }

    fn egress(&self, interface: u16) -> Option<Egress> {
        let slot = interface.into();
        let trunk = || self.maps.trunks.get(&slot).ok().flatten().filter(|trunk| trunk.ifindex != 0);
        let plain = self.maps.egress.get(&slot).ok().flatten().map(|_| Egress::PLAIN);
        plain.or_else(|| trunk().map(|_| Egress::TAGGED))
    }
}
