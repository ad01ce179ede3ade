//! What of a configuration will not work, though nothing of it is a mistake: where nobody gets in, or nothing is behind.

use crate::model::{Endpoint, LoadBalancer, Model, NetworkAcl, account_of};
use crate::rules::{self, Line};
use ipnet::IpNet;
use privatelink_common::limits::{DNS, NAT_PORT_FIRST};
use privatelink_common::wire::{TCP, UDP};
use serde::Serialize;
use std::net::IpAddr;
use std::ops::RangeInclusive;

/// Ports that hosts send from (RFC 6056; Linux begins at 32768, others at 1024).
const EPHEMERAL: RangeInclusive<u16> = 1024..=u16::MAX;

/// Something that will not work.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What it is about: kind and name.
    pub resource: String,
    /// What will not work.
    pub finding: String,
    /// How to mend it.
    pub remedy: String,
}

/// Looks at a whole configuration.
pub fn analyze(model: &Model) -> Vec<Finding> {
    let mut analysis = Analysis { model, found: Vec::new() };
    analysis.vpcs();
    analysis.target_groups();
    analysis.load_balancers();
    analysis.services();
    analysis.security_groups();
    analysis.resolvers();
    analysis.network_acls();
    analysis.endpoints();
    analysis.found
}

struct Analysis<'a> {
    model: &'a Model,
    found: Vec<Finding>,
}

/// Whether two networks have an address in common.
fn meet(one: &IpNet, other: &IpNet) -> bool {
    one.contains(other) || other.contains(one)
}

/// Whether rules let anything in from one of the networks to one of the ports: the first that is about all of a network decides for
/// it, and one that is about a part of it may.
fn allow(lines: &[Line], networks: &[IpNet], protocol: u8, ports: &RangeInclusive<u16>) -> bool {
    let about = |line: &&Line| {
        line.what.traffic.numbers().contains(&protocol)
            && line.what.ports.start() <= ports.end()
            && ports.start() <= line.what.ports.end()
    };
    networks.iter().any(|network| {
        for line in lines.iter().filter(about) {
            let whole = line.what.ports.start() <= ports.start() && ports.end() <= line.what.ports.end();
            let covers = whole && line.networks.iter().any(|it| it.contains(network));
            match (line.allow, covers, line.networks.iter().any(|it| meet(it, network))) {
                (true, _, true) => return true,
                (false, true, _) => return false,
                _ => {}
            }
        }
        false
    })
}

fn only(address: IpAddr) -> [IpNet; 1] {
    [IpNet::from(address)]
}

fn protocol_name(protocol: u8) -> &'static str {
    if protocol == 6 { "tcp" } else { "udp" }
}

impl Analysis<'_> {
    fn add(&mut self, resource: String, finding: impl Into<String>, remedy: impl Into<String>) {
        self.found.push(Finding { resource, finding: finding.into(), remedy: remedy.into() });
    }

    fn vpcs(&mut self) {
        for (name, _) in
            self.model.vpcs.iter().filter(|(_, vpc)| vpc.interfaces.is_empty() && vpc.vlans.is_empty())
        {
            let finding = "it has no interface, so that nobody is in it";
            self.add(format!("vpc {name}"), finding, "write this host's ends of its interfaces");
        }
    }

    fn target_groups(&mut self) {
        for (name, group) in &self.model.target_groups {
            let of = |it: &LoadBalancer| it.listeners.iter().any(|listener| listener.target_group == *name);
            if !self.model.load_balancers.values().any(of) {
                self.add(
                    format!("target_group {name}"),
                    "no listener uses it",
                    "remove it, or give it a listener",
                );
            } else if group.targets.is_empty() {
                let finding = "it has no targets: TCP is answered with RST, UDP is dropped";
                self.add(format!("target_group {name}"), finding, "register targets");
            }
        }
    }

    fn load_balancers(&mut self) {
        for (name, balancer) in &self.model.load_balancers {
            let resource = format!("load_balancer {name}");
            let published = self.model.services.values().any(|it| it.load_balancers.contains(name));
            if !published && !balancer.serves_own_vpc {
                self.add(
                    resource.clone(),
                    "no service is in front of it",
                    "publish it, or let it serve its own VPC",
                );
            }
            if balancer.listeners.is_empty() {
                self.add(resource.clone(), "it has no listeners", "write some");
            }
            for listener in &balancer.listeners {
                let Some(group) = self.model.target_groups.get(&listener.target_group) else { continue };
                if group.attributes.cross_zone.unwrap_or(balancer.cross_zone) || group.targets.is_empty() {
                    continue;
                }
                let empty = |zone: &&String| !group.targets.iter().any(|target| target.zone == **zone);
                for zone in balancer.addresses.keys().filter(empty) {
                    let finding = format!(
                        "the zone {zone} has no target of {}, so that its listener {} serves nobody there",
                        listener.target_group, listener.port
                    );
                    self.add(
                        resource.clone(),
                        finding,
                        "register a target in this zone, or switch cross_zone on",
                    );
                }
            }
            self.groups_of_balancer(name, balancer);
            self.targets_behind(name, balancer);
        }
    }

    /// Whether a load balancer's groups let anybody come to its listeners.
    fn groups_of_balancer(&mut self, name: &str, balancer: &LoadBalancer) {
        let enforced = balancer.serves_own_vpc || balancer.enforce_on_privatelink;
        if balancer.security_groups.is_empty() || !enforced {
            return;
        }
        let lines = rules::of_groups(self.model, &balancer.security_groups, balancer.serves_own_vpc);
        let anywhere = ["0.0.0.0/0", "::/0"].map(|all| all.parse().unwrap_or_default());
        for (port, protocol) in ports_of(balancer) {
            if !allow(&lines, &anywhere, protocol, &(port..=port)) {
                let protocol = protocol_name(protocol);
                let finding =
                    format!("its security groups let nobody come to its listener {protocol}/{port}");
                let remedy = format!(
                    "allow {protocol}/{port} from the consumers' networks in {}, or switch enforce_security_groups_on_privatelink off",
                    balancer.security_groups.join(" or ")
                );
                self.add(format!("load_balancer {name}"), finding, remedy);
            }
        }
    }

    /// Whether network ACLs let a load balancer and its targets speak with each other.
    fn targets_behind(&mut self, name: &str, balancer: &LoadBalancer) {
        for listener in &balancer.listeners {
            let Some(group) = self.model.target_groups.get(&listener.target_group) else { continue };
            for target in &group.targets {
                for &protocol in listener.protocol.numbers() {
                    let sources: Vec<_> = balancer
                        .every_address()
                        .filter(|it| it.is_ipv4() == target.address.is_ipv4())
                        .collect();
                    let forth = sources.iter().find_map(|source| {
                        self.denied(
                            &balancer.vpc,
                            *source,
                            target.address,
                            protocol,
                            &(target.port..=target.port),
                        )
                    });
                    let back = sources.iter().find_map(|source| {
                        let nat = NAT_PORT_FIRST..=u16::MAX;
                        self.denied(&balancer.vpc, target.address, *source, protocol, &nat)
                    });
                    for (acl, what) in forth
                        .map(|it| (it, "packets to"))
                        .into_iter()
                        .chain(back.map(|it| (it, "answers of")))
                    {
                        let finding = format!(
                            "the network ACL {acl} denies {what} its target {}:{}",
                            target.address, target.port
                        );
                        let remedy = format!(
                            "allow {}/{} to the target, and {NAT_PORT_FIRST}-65535 back from it, in {acl}",
                            protocol_name(protocol),
                            target.port
                        );
                        self.add(format!("load_balancer {name}"), finding, remedy);
                    }
                }
            }
        }
    }

    /// The network ACL that denies all packets from one address to another, if one does.
    fn denied(
        &self,
        vpc: &str,
        from: IpAddr,
        to: IpAddr,
        protocol: u8,
        ports: &RangeInclusive<u16>,
    ) -> Option<String> {
        let of = |address: IpAddr| self.subnet(vpc, address);
        let (source, destination) = (of(from), of(to));
        if source.map(|(_, _, subnet)| subnet) == destination.map(|(_, _, subnet)| subnet) {
            return None;
        }
        let leaves = |(name, acl, _): &(&String, &NetworkAcl, IpNet)| {
            allow(&rules::of_acl(name, acl, false), &only(to), protocol, ports)
        };
        let enters = |(name, acl, _): &(&String, &NetworkAcl, IpNet)| {
            allow(&rules::of_acl(name, acl, true), &only(from), protocol, ports)
        };
        let denies = source.filter(|it| !leaves(it)).or_else(|| destination.filter(|it| !enters(it)));
        denies.map(|(name, ..)| name.clone())
    }

    /// The subnet of an address that a network ACL is about.
    fn subnet(&self, vpc: &str, address: IpAddr) -> Option<(&String, &NetworkAcl, IpNet)> {
        let of_vpc = self.model.network_acls.iter().filter(|(_, acl)| acl.vpc == vpc);
        let mut subnets =
            of_vpc.flat_map(|(name, acl)| acl.subnets.iter().map(move |subnet| (name, acl, *subnet)));
        subnets.find(|(_, _, subnet)| subnet.contains(&address))
    }

    fn services(&mut self) {
        for (name, service) in &self.model.services {
            let resource = format!("endpoint_service {name}");
            if service.load_balancers.is_empty() {
                self.add(resource.clone(), "it has no load balancer", "name one");
            }
            if service.allowed_principals.is_empty() {
                self.add(resource, "nobody may connect to it", "write allowed_principals");
            }
        }
    }

    fn security_groups(&mut self) {
        for (name, group) in &self.model.security_groups {
            let resource = format!("security_group {name}");
            let of_endpoint = self.model.endpoints.values().any(|it| it.security_groups.contains(name));
            let of_balancer = self.model.load_balancers.values().any(|it| it.security_groups.contains(name));
            let is_source = self.model.security_groups.values().flat_map(|it| &it.ingress).any(|rule| {
                rule.sources
                    .iter()
                    .any(|source| matches!(source, crate::model::Source::Group(it) if it == name))
            });
            let resolvers = self.model.vpcs.values().filter_map(|vpc| vpc.dns.as_ref());
            let of_inbound =
                resolvers.flat_map(|it| it.inbound_groups.values().flatten()).any(|it| it == name);
            let is_used = of_endpoint || of_balancer || of_inbound;
            if !is_used && !is_source {
                self.add(
                    resource.clone(),
                    "nothing is in it",
                    "remove it, or name it at an endpoint, a load balancer or an inbound address",
                );
            }
            if is_source && group.members.is_empty() {
                let finding = "it is a source of rules, and has no members";
                self.add(resource.clone(), finding, "write its members, the addresses of clients");
            }
            let lines = rules::of_groups(self.model, std::slice::from_ref(name), true);
            if is_used && lines.iter().all(|line| line.networks.is_empty()) {
                self.add(resource, "it lets nobody in", "write rules with sources");
            }
        }
    }

    /// Whether anybody may ask at resolvers' inbound addresses.
    fn resolvers(&mut self) {
        let anywhere = ["0.0.0.0/0", "::/0"].map(|all| all.parse().unwrap_or_default());
        for (name, vpc) in &self.model.vpcs {
            for (address, groups) in vpc.dns.iter().flat_map(|resolver| &resolver.inbound_groups) {
                let lines = rules::of_groups(self.model, groups, true);
                for protocol in [UDP, TCP] {
                    if allow(&lines, &anywhere, protocol, &(DNS..=DNS)) {
                        continue;
                    }
                    let word = protocol_name(protocol);
                    let finding = format!("the security groups of {address} let nobody ask there by {word}");
                    let remedy = format!("allow {word}/{DNS} in {}", groups.join(" or "));
                    self.add(format!("vpc {name}"), finding, remedy);
                }
            }
        }
    }

    fn network_acls(&mut self) {
        for (name, acl) in &self.model.network_acls {
            let resource = format!("network_acl {name}");
            if acl.subnets.is_empty() {
                self.add(resource.clone(), "it is about no subnet", "write its subnets");
            }
            for (direction, entries) in [("ingress", &acl.ingress), ("egress", &acl.egress)] {
                if !entries.values().any(|entry| entry.allow) {
                    let finding = format!("its {direction} allows nothing");
                    self.add(
                        resource.clone(),
                        finding,
                        "write a rule with action = \"allow\": both directions need one",
                    );
                }
            }
        }
    }

    fn endpoints(&mut self) {
        for (name, endpoint) in &self.model.endpoints {
            let resource = format!("endpoint {name}");
            let Some(service) = self.model.services.get(&endpoint.service) else { continue };
            if !service.permits(&endpoint.principal) {
                let finding =
                    format!("{} may not connect to {}: it is failed", endpoint.principal, endpoint.service);
                let remedy =
                    format!("the provider allows {} in allowed_principals", account_of(&endpoint.principal));
                self.add(resource.clone(), finding, remedy);
            }
            let balancers = service.load_balancers.iter().filter_map(|it| self.model.load_balancers.get(it));
            let mut ports: Vec<_> = balancers.flat_map(ports_of).collect();
            ports.sort_unstable();
            ports.dedup();
            self.doors(&resource, endpoint, &ports);
        }
    }

    /// Whether anybody gets to the listeners by an endpoint's groups, and by the network ACLs of its VPC.
    fn doors(&mut self, resource: &str, endpoint: &Endpoint, ports: &[(u16, u8)]) {
        let Some(vpc) = self.model.vpcs.get(&endpoint.vpc) else { return };
        let lines = rules::of_groups(self.model, &endpoint.security_groups, true);
        for &(port, protocol) in ports {
            let (word, exactly) = (protocol_name(protocol), port..=port);
            if !endpoint.security_groups.is_empty() && !allow(&lines, &vpc.cidrs, protocol, &exactly) {
                let finding = format!(
                    "its security groups let no client of its VPC come to the listener {word}/{port}"
                );
                let remedy = format!("allow {word}/{port} in {}", endpoint.security_groups.join(" or "));
                self.add(resource.into(), finding, remedy);
            }
        }
        for address in endpoint.addresses.values().flat_map(crate::model::Addresses::iter) {
            let Some((name, acl, _)) = self.subnet(&endpoint.vpc, address) else { continue };
            let (ingress, egress) = (rules::of_acl(name, acl, true), rules::of_acl(name, acl, false));
            let name = name.clone();
            for &(port, protocol) in ports {
                let word = protocol_name(protocol);
                if !allow(&ingress, &vpc.cidrs, protocol, &(port..=port)) {
                    let finding = format!(
                        "the network ACL {name} lets nobody come from another subnet to {address} {word}/{port}"
                    );
                    self.add(
                        resource.into(),
                        finding,
                        format!("allow {word}/{port} in the ingress of {name}"),
                    );
                }
                if !allow(&egress, &vpc.cidrs, protocol, &EPHEMERAL) {
                    let finding =
                        format!("the network ACL {name} lets no answer of {address} over {word} out");
                    self.add(
                        resource.into(),
                        finding,
                        format!("allow {word}/1024-65535 in the egress of {name}: it is stateless"),
                    );
                }
            }
        }
    }
}

/// The listeners of a load balancer: port and protocol.
fn ports_of(balancer: &LoadBalancer) -> Vec<(u16, u8)> {
    let numbers = |it: &crate::model::Listener| {
        let port = it.port;
        it.protocol.numbers().iter().map(move |protocol| (port, *protocol)).collect::<Vec<_>>()
    };
    balancer.listeners.iter().flat_map(numbers).collect()
}
