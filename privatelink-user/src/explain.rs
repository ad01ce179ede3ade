//! Runs the real packet path over the live tables, without a packet, and tells every question that it asks and the answer it gets.
//! Nothing is written: what the path would install is only told.

use crate::config::nearest;
use crate::flows;
use crate::ip::{self, with_port};
use crate::live::{Copied, Live};
use crate::maps::Maps;
use crate::names::{Kind, Names};
use anyhow::{Context, Result, bail};
use etherparse::PacketBuilder;
use privatelink_common::frame::{DIFFERENCE, SliceFrame};
use privatelink_common::path::{self, Room};
use privatelink_common::tables::{
    Address, Bucket, CallerRate, Course, Datagram, ENDPOINT, Egress, Endpoint, Face, Flow, Flow6, FlowKey,
    FlowKey6, Flows, FragmentKey, Handshake, InsertError, Interface, Key, Listener, ListenerKey, Mtu,
    Neighbour, Pressure, RESOLVER, RESOLVER_ENDPOINT, RuleAddress, RulePort, Stream, Subnet, Tables, Target,
    TargetEvent, VpcAddress, VpcEndpointId, Width, Words,
};
use privatelink_common::verdict::{Action, Direction};
use privatelink_common::wire::Mac;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

/// What is to be explained.
#[derive(Clone, Debug)]
pub struct Question {
    /// The VPC that the packet would come from.
    pub vpc: String,
    /// `tcp` or `udp`.
    pub protocol: String,
    /// Source.
    pub from: SocketAddr,
    /// Destination.
    pub to: SocketAddr,
}

/// The live tables, which only answer.
struct Narrator<'a> {
    live: Live<'a>,
    names: &'a Names,
    /// What the configuration calls the rules of each set.
    rules: &'a BTreeMap<u32, Vec<String>>,
    /// How endpoints stand with their services, by name.
    connections: &'a BTreeMap<String, String>,
    interface: Interface,
    told: RefCell<Vec<String>>,
}

impl Narrator<'_> {
    fn tell<T>(&self, what: String, answer: Option<T>, describe: impl FnOnce(&T) -> String) -> Option<T> {
        let told = answer.as_ref().map_or_else(|| "no".to_owned(), describe);
        self.told.borrow_mut().push(format!("{what}: {told}"));
        answer
    }

    fn flow<K: Key>(&self, kind: &str, key: &K, flow: Option<Copied<K::Flow>>) -> Option<Copied<K::Flow>> {
        let what = format!(
            "{kind} flow {} -> {} in {}",
            with_port(key.source().widen(), key.source_port()),
            with_port(key.destination().widen(), key.destination_port()),
            self.names.name(Kind::Vpc, key.vpc().into())
        );
        self.tell(what, flow, |Copied(flow)| {
            let course: &Course = flow;
            let endpoint = self.names.name(Kind::Endpoint, course.endpoint.into());
            let target = self.names.name(Kind::Target, course.target.into());
            format!(
                "yes, {}, of endpoint {endpoint} to target {target}",
                path::state::State::from_number(course.state).name()
            )
        })
    }
}

/// The tables of one width, which only answer.
macro_rules! flows {
    ($key:ty, $flow:ty) => {
        impl Flows<$key> for Narrator<'_> {
            type Entry = Copied<$flow>;

            fn established(&self, key: &$key) -> Option<Copied<$flow>> {
                self.flow("established", key, self.live.established(key))
            }

            fn pending(&self, key: &$key) -> Option<Copied<$flow>> {
                self.flow("pending", key, self.live.pending(key))
            }

            fn establish(&self, _: &$key, _: &$flow) -> Result<(), InsertError> {
                self.told.borrow_mut().push("would establish the flow".into());
                Ok(())
            }

            fn claim(&self, key: &$key, flow: &$flow) -> Result<(), InsertError> {
                if flow.direction() == Direction::ToConsumer {
                    let (port, to, target) = (key.destination_port, key.destination, key.source);
                    let (to, target) = (ip::shown(to.widen()), ip::shown(target.widen()));
                    self.told
                        .borrow_mut()
                        .push(format!("would claim NAT port {port} of {to} towards {target}"));
                }
                Ok(())
            }

            fn remove_established(&self, _: &$key) {
                self.told.borrow_mut().push("would forget that flow: it has ended".into());
            }

            fn remove_pending(&self, _: &$key) {}

            fn stream(&self, key: &$key) -> Option<Stream> {
                self.live.stream(key)
            }

            fn set_stream(&self, _: &$key, _: &Stream) -> Result<(), InsertError> {
                Ok(())
            }

            fn remove_stream(&self, _: &$key) {}
        }
    };
}

flows!(FlowKey, Flow);
flows!(FlowKey6, Flow6);

impl Tables for Narrator<'_> {
    fn room<R>(&self, work: impl FnOnce(&mut Room) -> R) -> Option<R> {
        self.live.room(work)
    }

    fn fence(&self) {}

    fn interface(&self, _: u32) -> Option<Interface> {
        Some(self.interface)
    }

    fn bucket(&self, endpoint: u32) -> Option<Bucket> {
        let bucket = self.live.bucket(endpoint);
        if let Some(bucket) = bucket {
            let text =
                format!("new flows that the endpoint may open this second: {} at its last", bucket.tokens);
            self.told.borrow_mut().push(text);
        }
        bucket
    }

    fn set_bucket(&self, _: u32, _: Bucket) {}

    fn vpc_endpoint_id(&self, endpoint: u32) -> VpcEndpointId {
        self.told.borrow_mut().push("puts the Proxy Protocol's header before the first data".into());
        self.live.vpc_endpoint_id(endpoint)
    }

    fn pressure(&self, endpoint: u32) -> Option<Pressure> {
        self.tell("unconfirmed SYNs of the endpoint".into(), self.live.pressure(endpoint), |it| {
            let cookies = if flows::now() < it.until { "; they are answered with cookies" } else { "" };
            format!("{} in the last second that had some{cookies}", it.unconfirmed)
        })
    }

    fn set_pressure(&self, _: u32, _: Pressure) {}

    fn syn_cookie(&self, _: &Handshake) -> Option<u32> {
        self.told.borrow_mut().push("would answer with a SYN cookie, and remember nothing".into());
        Some(0)
    }

    fn is_syn_cookie(&self, _: &Handshake, _: u32) -> bool {
        false
    }

    fn datagram(&self, _: &FragmentKey) -> Option<Datagram> {
        None
    }

    fn set_datagram(&self, _: &FragmentKey, _: &Datagram) -> Result<(), InsertError> {
        Ok(())
    }

    fn next_identification(&self) -> u32 {
        0
    }

    fn count(&self, _: u32, _: TargetEvent) {}

    fn endpoint(&self, endpoint: u32) -> Endpoint {
        let found = self.live.endpoint(endpoint);
        let name = self.names.name(Kind::Endpoint, endpoint);
        let word = if found.open == 0 { "closed" } else { "open" };
        let standing = name.split('/').next().and_then(|name| self.connections.get(name));
        let standing = standing.map(|it| format!(", {it}")).unwrap_or_default();
        let generation = found.generation;
        self.told.borrow_mut().push(format!("endpoint {name}: {word}{standing}, generation {generation}"));
        found
    }

    fn address(&self, address: &VpcAddress) -> Option<Address> {
        let what = format!(
            "{} is ours in {}",
            ip::shown(address.address),
            self.names.name(Kind::Vpc, address.vpc.into())
        );
        self.tell(what, self.live.address(address), |found| match found.kind {
            ENDPOINT => format!("yes, endpoint {}", self.names.name(Kind::Endpoint, found.endpoint)),
            RESOLVER | RESOLVER_ENDPOINT => "yes, the VPC's resolver".into(),
            _ => format!("yes, load balancer {}", self.names.name(Kind::Balancer, found.balancer)),
        })
    }

    fn in_vpc(&self, address: &VpcAddress) -> bool {
        let found = self.live.in_vpc(address).then_some(());
        let what = format!(
            "{} is within the CIDRs of {}",
            ip::shown(address.address),
            self.names.name(Kind::Vpc, address.vpc.into())
        );
        self.tell(what, found, |_| "yes".into()).is_some()
    }

    fn rules_of_address(&self, address: &RuleAddress) -> Option<impl Words> {
        self.live.rules_of_address(address)
    }

    fn rules_of_port(&self, port: &RulePort) -> Option<impl Words> {
        self.live.rules_of_port(port)
    }

    fn ruled(&self, set: u32, rule: impl FnOnce() -> Option<u32>) {
        let said = self.rules.get(&set);
        let told = match rule() {
            Some(rule) => said.and_then(|said| said.get(rule as usize)).cloned(),
            None => Some("no rule matches, so it is denied".into()),
        };
        self.told.borrow_mut().push(format!("rules: {}", told.unwrap_or_default()));
    }

    fn subnet(&self, address: &VpcAddress) -> Option<Subnet> {
        let found = self.live.subnet(address);
        if let Some(found) = found {
            let name = self.names.name(Kind::Subnet, found.id);
            self.told.borrow_mut().push(format!("{} is in the subnet {name}", ip::shown(address.address)));
        }
        found
    }

    fn source(&self, balancer: u32, to_ipv4: bool, pick: usize) -> Option<u32> {
        self.live.source(balancer, to_ipv4, pick)
    }

    fn face(&self, balancer: u32) -> Option<Face> {
        let what = format!("load balancer {}", self.names.name(Kind::Balancer, balancer));
        self.tell(what, self.live.face(balancer), |found| format!("targets see {}", ip::shown(found.address)))
    }

    fn listener(&self, key: &ListenerKey) -> Option<Listener> {
        let protocol = if key.protocol == 6 { "tcp" } else { "udp" };
        let what =
            format!("listener {protocol}/{} of {}", key.port, self.names.name(Kind::Balancer, key.balancer));
        self.tell(what, self.live.listener(key), |found| {
            format!(
                "yes, Maglev table {} of {} slots",
                self.names.name(Kind::Table, found.table),
                found.slots
            )
        })
    }

    fn slot(&self, table: u32, slot: u32) -> Option<u32> {
        self.tell(format!("slot {slot}"), self.live.slot(table, slot), |target| {
            format!("target {}", self.names.name(Kind::Target, *target))
        })
    }

    fn target(&self, target: u32) -> Option<Target> {
        self.live.target(target)
    }

    fn neighbour(&self, address: &VpcAddress) -> Option<Neighbour> {
        let what = format!("next hop of {}", ip::shown(address.address));
        self.tell(what, self.live.neighbour(address), |found| {
            format!("{} by {}", mac(found.mac), self.names.name(Kind::Interface, found.interface.into()))
        })
    }

    fn caller(&self, address: &VpcAddress) -> Option<Neighbour> {
        self.live.caller(address)
    }

    fn set_caller(&self, _: &VpcAddress, _: &Neighbour) {}

    fn caller_rate(&self, interface: u16) -> Option<CallerRate> {
        self.live.caller_rate(interface)
    }

    fn set_caller_rate(&self, _: u16, _: CallerRate) {}

    fn mtu(&self, interface: u16) -> Mtu {
        self.live.mtu(interface)
    }

    fn egress(&self, interface: u16) -> Option<Egress> {
        let what = format!("interface {}", self.names.name(Kind::Interface, interface.into()));
        self.tell(what, self.live.egress(interface), |_| "is there".into())
    }
}

/// A link-layer address, as people write it.
pub fn mac(mac: Mac) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

fn vpc(names: &Names, question: &Question) -> Result<u32> {
    names.id(Kind::Vpc, &question.vpc).with_context(|| {
        let help = nearest(&question.vpc, names.all(Kind::Vpc).map(|(_, name)| name));
        let help = help.map(|help| format!(": {help}")).unwrap_or_default();
        format!("there is no VPC \"{}\"{help}", question.vpc)
    })
}

/// The packet that is asked about, behind as much room as the path may need in front of it.
fn packet(question: &Question, room: usize) -> Result<Vec<u8>> {
    let builder = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    let builder = match (question.from.ip(), question.to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => builder.ipv4(from.octets(), to.octets(), 64),
        (IpAddr::V6(from), IpAddr::V6(to)) => builder.ipv6(from.octets(), to.octets(), 64),
        (from, to) => bail!("{from} and {to} are of different families: no packet has both"),
    };
    let mut bytes = vec![0; room];
    let (from, to) = (question.from.port(), question.to.port());
    match question.protocol.as_str() {
        "tcp" => builder.tcp(from, to, 1, 64240).syn().write(&mut bytes, &[])?,
        "udp" => builder.udp(from, to).write(&mut bytes, &[])?,
        other => bail!("the protocol is tcp or udp, not {other}"),
    }
    Ok(bytes)
}

/// Whether there is such a VPC, and such a packet.
pub fn check(names: &Names, question: &Question) -> Result<()> {
    vpc(names, question)?;
    packet(question, 0).map(drop)
}

/// Explains what would become of a first packet (a SYN, for TCP).
pub fn explain(
    maps: &Maps,
    names: &Names,
    rules: &BTreeMap<u32, Vec<String>>,
    connections: &BTreeMap<String, String>,
    question: &Question,
) -> Result<Vec<String>> {
    let interface =
        Interface { vpc: u16::try_from(vpc(names, question)?)?, slot: 0, stack: 0, fits: u16::MAX };
    let live = Live::new(maps);
    let narrator = Narrator { live, names, rules, connections, interface, told: RefCell::default() };
    // For the longest that the path puts in front of a packet, which is longer than a header of the other family.
    let room = usize::from(path::proxy::LENGTH).max(DIFFERENCE);
    let mut bytes = packet(question, room)?;
    let end = bytes.len();
    let mut frame = SliceFrame::within(&mut bytes, room, end).context("no frame")?;
    let result = path::forward(&mut frame, &narrator, 0, flows::now());
    let mut told = narrator.told.into_inner();
    told.push(match result {
        Err(reason) => format!("dropped: {}: {}", reason.name(), reason.meaning().trim()),
        Ok(verdict) => match verdict.action() {
            Action::Pass => "passed to this host's stack, untouched: the address is not ours".into(),
            Action::Hold => "held until the first fragment of its datagram comes".into(),
            Action::Steer { .. } => "handed to the VPC's own stack".into(),
            Action::Answer(code) => match privatelink_common::verdict::Answer::from_code(code) {
                Some(answer) => format!("answered: {}: {}", answer.name(), answer.meaning().trim()),
                None => "answered".into(),
            },
            Action::Forward { interface, .. } => sent(&frame, names, interface),
        },
    });
    Ok(told)
}

fn sent(frame: &SliceFrame<'_>, names: &Names, interface: u16) -> String {
    let ends = etherparse::SlicedPacket::from_ethernet(frame.as_bytes()).ok().and_then(|packet| {
        let (from, to): (IpAddr, IpAddr) = match packet.net? {
            etherparse::NetSlice::Ipv4(ip) => {
                (ip.header().source_addr().into(), ip.header().destination_addr().into())
            }
            etherparse::NetSlice::Ipv6(ip) => {
                (ip.header().source_addr().into(), ip.header().destination_addr().into())
            }
            etherparse::NetSlice::Arp(_) => return None,
        };
        let (from_port, to_port) = match packet.transport? {
            etherparse::TransportSlice::Tcp(tcp) => (tcp.source_port(), tcp.destination_port()),
            etherparse::TransportSlice::Udp(udp) => (udp.source_port(), udp.destination_port()),
            _ => return None,
        };
        Some(format!("{} -> {}", SocketAddr::new(from, from_port), SocketAddr::new(to, to_port)))
    });
    let by = names.name(Kind::Interface, interface.into());
    format!("forwarded: {} by {by}", ends.unwrap_or_default())
}
