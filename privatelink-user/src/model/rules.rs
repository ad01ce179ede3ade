//! Security groups and network ACLs, as they are written.

use super::Build;
use crate::config::{Fields, Value};
use ipnet::IpNet;
use privatelink_common::limits::RULE_WORDS;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::ops::RangeInclusive;

/// The groups that one thing may be in (AWS: 5, and 16 on request).
const GROUPS: usize = 16;

/// What a rule is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Traffic {
    /// Everything.
    All,
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP: echo requests, since nothing else of it is for us.
    Icmp,
    /// The same over IPv6.
    Icmpv6,
}

impl Traffic {
    const ALL: [Self; 5] = [Self::All, Self::Tcp, Self::Udp, Self::Icmp, Self::Icmpv6];

    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Icmp => "icmp",
            Self::Icmpv6 => "icmpv6",
        }
    }

    /// IANA's numbers of it.
    pub fn numbers(self) -> &'static [u8] {
        match self {
            Self::All => &[1, 6, 17, 58],
            Self::Tcp => &[6],
            Self::Udp => &[17],
            Self::Icmp => &[1],
            Self::Icmpv6 => &[58],
        }
    }

    fn has_ports(self) -> bool {
        matches!(self, Self::Tcp | Self::Udp)
    }
}

/// Ports, and where the other side is: what both kinds of rules have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Match {
    /// The protocol.
    pub traffic: Traffic,
    /// Destination ports; all of them for a protocol that has none.
    pub ports: RangeInclusive<u16>,
}

impl fmt::Display for Match {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.traffic.name())?;
        match (self.traffic.has_ports(), self.ports.start(), self.ports.end()) {
            (false, ..) => Ok(()),
            (true, from, to) if from == to => write!(formatter, "/{from}"),
            (true, from, to) => write!(formatter, "/{from}-{to}"),
        }
    }
}

/// Where a packet may come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A network.
    Network(IpNet),
    /// The members of a group.
    Group(String),
}

impl fmt::Display for Source {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Network(network) => network.fmt(formatter),
            Self::Group(name) => formatter.write_str(name),
        }
    }
}

/// What a security group lets in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// What.
    pub what: Match,
    /// From where.
    pub sources: Vec<Source>,
}

/// A security group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SecurityGroup {
    /// Its VPC.
    pub vpc: String,
    /// The addresses that are meant where it is a source.
    pub members: Vec<IpNet>,
    /// What it lets in.
    pub ingress: Vec<Rule>,
}

/// An entry of a network ACL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Whether it allows.
    pub allow: bool,
    /// What.
    pub what: Match,
    /// Where the other side is.
    pub cidr: IpNet,
}

/// A network ACL. Both directions end with an entry that denies everything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkAcl {
    /// Its VPC.
    pub vpc: String,
    /// The subnets that it is about.
    pub subnets: Vec<IpNet>,
    /// What may enter them, by number: the first that matches decides.
    pub ingress: BTreeMap<u32, Entry>,
    /// What may leave them.
    pub egress: BTreeMap<u32, Entry>,
}

impl Build<'_, '_> {
    pub(super) fn security_groups(&mut self, root: &mut Fields<'_, '_>) {
        let listed = root.named(self.reader, "security_groups");
        let names: BTreeSet<String> = listed.iter().map(|(name, ..)| name.clone()).collect();
        let mut references = Vec::new();
        for (name, _, mut fields) in listed {
            let vpc = self.vpc_of(&mut fields).unwrap_or_default();
            let members = fields.get("members").map(|value| self.networks(value)).unwrap_or_default();
            let mut ingress = Vec::new();
            let items = fields.need(self.reader, "ingress").map(|list| self.reader.list(list));
            for item in items.unwrap_or_default() {
                ingress.extend(self.rule(item, &names, &vpc, &mut references));
            }
            fields.finish(self.reader);
            self.model.security_groups.insert(name, SecurityGroup { vpc, members, ingress });
        }
        for (span, name, vpc) in references {
            let Some(group) = self.model.security_groups.get(&name).filter(|group| group.vpc != vpc) else {
                continue;
            };
            let message = format!("the security group \"{name}\" is in the VPC \"{}\"", group.vpc);
            self.reader.problem(span, message, None);
        }
    }

    /// A rule; groups that it refers to are remembered with their place and its VPC.
    fn rule(
        &mut self,
        item: &Value<'_>,
        names: &BTreeSet<String>,
        vpc: &str,
        references: &mut Vec<(std::ops::Range<usize>, String, String)>,
    ) -> Option<Rule> {
        let mut fields = self.reader.table(item)?;
        let what = self.matches(&mut fields);
        let mut sources = Vec::new();
        let listed =
            fields.need(self.reader, "sources").map(|value| self.reader.list(value)).unwrap_or_default();
        for value in listed {
            let text = self.reader.string(value)?;
            if text.contains(['.', ':', '/']) {
                sources.extend(self.network(value).map(Source::Network));
            } else if let Some(name) = self.reference(value, "security group", names) {
                references.push((value.span(), name.clone(), vpc.to_owned()));
                sources.push(Source::Group(name));
            }
        }
        fields.finish(self.reader);
        Some(Rule { what: what?, sources })
    }

    /// A network, or an address.
    fn network(&mut self, value: &Value<'_>) -> Option<IpNet> {
        let parse =
            |text: &str| text.parse::<IpNet>().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from));
        let network = self.reader.parsed(value, "a network or an address", parse)?;
        if network.trunc() != network {
            let help = format!("write {}", network.trunc());
            self.reader.problem(value.span(), format!("{network} has bits beyond its prefix"), Some(help));
        }
        Some(network)
    }

    fn networks(&mut self, list: &Value<'_>) -> Vec<IpNet> {
        let items = self.reader.list(list);
        items.into_iter().filter_map(|item| self.network(item)).collect()
    }

    fn matches(&mut self, fields: &mut Fields<'_, '_>) -> Option<Match> {
        let protocol = fields.need(self.reader, "protocol");
        let written = fields.get("ports");
        let known = |text: &str| Traffic::ALL.into_iter().find(|it| it.name() == text);
        let traffic = protocol.and_then(|value| {
            self.reader.parsed(value, "a protocol: tcp, udp, icmp, icmpv6 or all", known)
        })?;
        if !traffic.has_ports() {
            if let Some(value) = written {
                let message = format!("{} has no ports", traffic.name());
                self.reader.problem(
                    value.span(),
                    message,
                    Some("write a rule for tcp, and one for udp".into()),
                );
            }
            return Some(Match { traffic, ports: 0..=u16::MAX });
        }
        let value = fields.need(self.reader, "ports")?;
        let parse = |text: &str| {
            let (from, to) = text.split_once('-').unwrap_or((text, text));
            let ports = from.trim().parse().ok()?..=to.trim().parse().ok()?;
            (!ports.is_empty()).then_some(ports)
        };
        let what = "a port such as \"443\", or a range of them such as \"8000-8080\"";
        self.reader.parsed(value, what, parse).map(|ports| Match { traffic, ports })
    }

    /// The security groups that something in a VPC is in.
    pub(super) fn groups(&mut self, fields: &mut Fields<'_, '_>, vpc: Option<&String>) -> Vec<String> {
        let Some(value) = fields.get("security_groups") else { return Vec::new() };
        let names = self.model.security_groups.keys().cloned().collect();
        let mut groups = Vec::new();
        for item in self.reader.list(value) {
            let Some(name) = self.reference(item, "security group", &names) else { continue };
            let of = self.model.security_groups.get(&name).map(|group| group.vpc.clone()).unwrap_or_default();
            if vpc.is_some_and(|vpc| *vpc != of) {
                let message = format!("the security group \"{name}\" is in the VPC \"{of}\"");
                self.reader.problem(item.span(), message, None);
            }
            if groups.contains(&name) {
                self.reader.problem(item.span(), format!("\"{name}\" is there twice"), None);
            } else {
                groups.push(name);
            }
        }
        let rules: usize = groups.iter().map(|name| self.model.security_groups[name].ingress.len()).sum();
        if groups.is_empty() {
            let help = "leave it out, and any client of the VPC may come in";
            self.reader.problem(value.span(), "expected at least one security group", Some(help.into()));
        }
        if groups.len() > GROUPS {
            self.reader.problem(value.span(), format!("expected {GROUPS} security groups at most"), None);
        }
        if rules > RULE_WORDS * 64 {
            let message = format!("these groups have {rules} rules; there may be {} in all", RULE_WORDS * 64);
            self.reader.problem(value.span(), message, None);
        }
        groups
    }

    pub(super) fn network_acls(&mut self, root: &mut Fields<'_, '_>) {
        for (name, _, mut fields) in root.named(self.reader, "network_acls") {
            let vpc = self.vpc_of(&mut fields);
            let listed =
                fields.need(self.reader, "subnets").map(|value| self.reader.list(value)).unwrap_or_default();
            let mut subnets: Vec<IpNet> = Vec::new();
            for item in listed {
                let Some(subnet) = self.network(item) else { continue };
                let within = |vpc: &String| {
                    self.model
                        .vpcs
                        .get(vpc)
                        .is_some_and(|it| it.cidrs.iter().any(|cidr| cidr.contains(&subnet)))
                };
                if let Some(vpc) = vpc.as_ref().filter(|vpc| !within(vpc)) {
                    let message = format!("{subnet} is outside the VPC \"{vpc}\"");
                    self.reader.problem(item.span(), message, None);
                }
                let others = self.model.network_acls.iter().filter(|(_, it)| Some(&it.vpc) == vpc.as_ref());
                let taken = others
                    .flat_map(|(name, it)| it.subnets.iter().map(move |subnet| (name.clone(), *subnet)))
                    .chain(subnets.iter().map(|subnet| (name.clone(), *subnet)))
                    .find(|(_, other)| other.contains(&subnet) || subnet.contains(other));
                if let Some((owner, other)) = taken {
                    let message = format!("{subnet} overlaps {other} of the network ACL \"{owner}\"");
                    self.reader.problem(item.span(), message, Some("a subnet has one network ACL".into()));
                }
                subnets.push(subnet);
            }
            let ingress = self.entries(&mut fields, "ingress");
            let egress = self.entries(&mut fields, "egress");
            fields.finish(self.reader);
            let acl = NetworkAcl { vpc: vpc.unwrap_or_default(), subnets, ingress, egress };
            self.model.network_acls.insert(name, acl);
        }
    }

    fn entries(&mut self, fields: &mut Fields<'_, '_>, direction: &'static str) -> BTreeMap<u32, Entry> {
        let mut entries = BTreeMap::new();
        let Some(value) = fields.need(self.reader, direction) else { return entries };
        for item in self.reader.list(value) {
            let Some(mut fields) = self.reader.table(item) else { continue };
            let number = fields.need(self.reader, "rule").and_then(|it| self.reader.number(it, 1..=32766));
            let action = fields.need(self.reader, "action").and_then(|value| {
                self.reader.parsed(value, "an action: allow or deny", |text| match text {
                    "allow" => Some(true),
                    "deny" => Some(false),
                    _ => None,
                })
            });
            let what = self.matches(&mut fields);
            let cidr = fields.need(self.reader, "cidr").and_then(|value| self.network(value));
            fields.finish(self.reader);
            let (Some(number), Some(allow), Some(what), Some(cidr)) = (number, action, what, cidr) else {
                continue;
            };
            if entries.insert(number, Entry { allow, what, cidr }).is_some() {
                self.reader.problem(item.span(), format!("{direction} has a rule {number} already"), None);
            }
        }
        if entries.len() > RULE_WORDS * 64 {
            let message =
                format!("{direction} has {} rules; there may be {}", entries.len(), RULE_WORDS * 64);
            self.reader.problem(value.span(), message, None);
        }
        entries
    }
}
