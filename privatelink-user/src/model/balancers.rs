//! Network load balancers: their addresses and their listeners.

use super::{Addresses, Build, Protocol, all_have};
use crate::config::{Fields, Value, nearest};
use crate::ip::Family;
use privatelink_common::limits::TCP_CLOSED;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

/// A network load balancer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadBalancer {
    /// Its VPC.
    pub vpc: String,
    /// Its address in each zone.
    pub addresses: BTreeMap<String, Addresses>,
    /// More addresses that targets see as the source, by zone: as many more flows as each has ports.
    pub secondary_addresses: BTreeMap<String, Vec<IpAddr>>,
    /// Whether clients inside its own VPC may use it, too.
    pub serves_own_vpc: bool,
    /// How long a NAT port is not used again after both sides have closed its flow.
    pub port_reuse_delay: Duration,
    /// Whether an address uses the targets of every zone.
    pub cross_zone: bool,
    /// Its listeners.
    pub listeners: Vec<Listener>,
    /// Its security groups; none: anybody may come in who has come that far.
    pub security_groups: Vec<String>,
    /// Whether they are about what comes from endpoints, too, with the consumer's address as the source.
    pub enforce_on_privatelink: bool,
}

impl LoadBalancer {
    /// Its addresses in every zone.
    pub fn every_address(&self) -> impl Iterator<Item = IpAddr> {
        let secondary = self.secondary_addresses.values().flatten().copied();
        self.addresses.values().flat_map(Addresses::iter).chain(secondary)
    }

    /// Its addresses of a family in a zone, the first one first.
    pub fn of(&self, zone: &str, family: Family) -> Vec<IpAddr> {
        let first = self.addresses.get(zone).and_then(|it| it.of(family));
        let more = self.secondary_addresses.get(zone).into_iter().flatten().copied();
        first.into_iter().chain(more.filter(|it| Family::of(*it) == family)).collect()
    }

    /// Whether it has addresses of a family in every zone.
    pub fn has(&self, family: Family) -> bool {
        all_have(self.addresses.values(), family)
    }
}

/// A listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listener {
    /// Its protocol.
    pub protocol: Protocol,
    /// Its port.
    pub port: u16,
    /// Where it sends new flows.
    pub target_group: String,
    /// Idle timeout of TCP flows.
    pub tcp_idle_timeout: Duration,
}

impl Build<'_, '_> {
    /// Up to seven more addresses in zones that have one (AWS: secondary_ips.auto_assigned.per_subnet).
    fn secondary(
        &mut self,
        fields: &mut Fields<'_, '_>,
        vpc: Option<&String>,
        primary: &BTreeMap<String, Addresses>,
        name: &str,
    ) -> BTreeMap<String, Vec<IpAddr>> {
        let mut secondary = BTreeMap::new();
        let Some(value) = fields.get("secondary_addresses") else { return secondary };
        let Some(pairs) = self.reader.table(value) else { return secondary };
        for (zone, place, list) in pairs.pairs() {
            if !primary.contains_key(&zone) {
                let message = format!("the load balancer has no address in the zone \"{zone}\"");
                self.reader.problem(place, message, nearest(&zone, primary.keys().map(String::as_str)));
            }
            let items = self.reader.list(list);
            let mut addresses = Vec::new();
            for item in items {
                let Some(address) = self.address(item, vpc) else { continue };
                let family = Family::of(address);
                if primary.get(&zone).is_some_and(|first| first.of(family).is_none()) {
                    let message =
                        format!("the load balancer has no first {family} address in the zone \"{zone}\"");
                    self.reader.problem(item.span(), message, None);
                }
                if addresses.iter().filter(|it| Family::of(**it) == family).count() == 7 {
                    let message = format!("a zone has seven secondary {family} addresses at most");
                    self.reader.problem(item.span(), message, None);
                }
                if let Some(vpc) = vpc {
                    self.own(
                        item.span(),
                        vpc,
                        address,
                        format!("the load balancer \"{name}\" in zone \"{zone}\""),
                    );
                }
                addresses.push(address);
            }
            secondary.insert(zone, addresses);
        }
        secondary
    }

    pub(super) fn load_balancers(&mut self, root: &mut Fields<'_, '_>) {
        for (name, _, mut fields) in root.named(self.reader, "load_balancers") {
            let vpc = self.vpc_of(&mut fields);
            let addresses =
                self.addresses(&mut fields, vpc.as_ref(), &format!("the load balancer \"{name}\""));
            let port_reuse_delay =
                fields.get("port_reuse_delay").and_then(|value| self.duration(value, 1..=600));
            let port_reuse_delay = port_reuse_delay.unwrap_or(Duration::from_secs(TCP_CLOSED.into()));
            let serves_own_vpc =
                fields.get("serves_own_vpc").and_then(|value| self.reader.boolean(value)).unwrap_or(false);
            let secondary_addresses = self.secondary(&mut fields, vpc.as_ref(), &addresses, &name);
            let cross_zone =
                fields.get("cross_zone").and_then(|value| self.reader.boolean(value)).unwrap_or(false);
            let mut listeners: Vec<Listener> = Vec::new();
            let listed =
                fields.need(self.reader, "listeners").map(|list| self.reader.list(list)).unwrap_or_default();
            for item in listed {
                let Some(listener) = self.listener(item, vpc.as_ref(), &addresses) else { continue };
                let same = |other: &&Listener| {
                    let shared = |number| listener.protocol.numbers().contains(number);
                    other.port == listener.port && other.protocol.numbers().iter().any(shared)
                };
                if let Some(other) = listeners.iter().find(same) {
                    let message =
                        format!("port {} has a listener for {} already", other.port, other.protocol.name());
                    self.reader.problem(item.span(), message, None);
                }
                listeners.push(listener);
            }
            let security_groups = self.groups(&mut fields, vpc.as_ref());
            let enforce = fields.get("enforce_security_groups_on_privatelink");
            let enforce = enforce.and_then(|value| self.reader.boolean(value)).unwrap_or(true);
            fields.finish(self.reader);
            let balancer = LoadBalancer {
                vpc: vpc.unwrap_or_default(),
                addresses,
                secondary_addresses,
                serves_own_vpc,
                port_reuse_delay,
                cross_zone,
                listeners,
                security_groups,
                enforce_on_privatelink: enforce,
            };
            self.model.load_balancers.insert(name, balancer);
        }
    }

    fn listener(
        &mut self,
        item: &Value<'_>,
        vpc: Option<&String>,
        addresses: &BTreeMap<String, Addresses>,
    ) -> Option<Listener> {
        let mut fields = self.reader.table(item)?;
        let protocol = fields.need(self.reader, "protocol").and_then(|value| self.protocol(value));
        let port = fields.need(self.reader, "port").and_then(|value| self.port(value));
        let names = self.model.target_groups.keys().cloned().collect();
        let value = fields.need(self.reader, "target_group");
        let target_group = value.and_then(|value| self.reference(value, "target group", &names));
        let idle = fields.get("tcp_idle_timeout").and_then(|value| self.duration(value, 60..=6000));
        fields.finish(self.reader);
        let (protocol, target_group) = (protocol?, target_group?);
        let group = self.model.target_groups.get(&target_group)?;
        let span = value.map(Value::span).unwrap_or_default();
        if !protocol.numbers().iter().all(|number| group.protocol.numbers().contains(number)) {
            let (has, wants) = (group.protocol.name(), protocol.name());
            let message =
                format!("the target group \"{target_group}\" is {has}; a {wants} listener cannot use it");
            self.reader.problem(span.clone(), message, None);
        }
        let family = group.ip_address_type;
        if !all_have(addresses.values(), family) {
            let message = format!(
                "the targets of \"{target_group}\" are {family}, but the load balancer has no {family} addresses"
            );
            let help = format!("give it an {family} address in every zone: targets see it as the source");
            self.reader.problem(span.clone(), message, Some(help));
        }
        let takes_ipv6 = addresses.values().any(|it| it.ipv6.is_some());
        if protocol != Protocol::Tcp && takes_ipv6 && family == Family::Ipv4 {
            let message = format!(
                "a {} listener of a load balancer with IPv6 addresses cannot use \"{target_group}\", whose targets are IPv4",
                protocol.name()
            );
            let help = "datagrams are not translated to IPv4, as on AWS";
            self.reader.problem(span.clone(), message, Some(help.into()));
        }
        if vpc.is_some_and(|vpc| !group.vpc.is_empty() && *vpc != group.vpc) {
            let message = format!("the target group \"{target_group}\" is in the VPC \"{}\"", group.vpc);
            self.reader.problem(span, message, Some("a load balancer and its targets share a VPC".into()));
        }
        let tcp_idle_timeout = idle.unwrap_or(Duration::from_secs(350));
        Some(Listener { protocol, port: port?, target_group, tcp_idle_timeout })
    }
}
