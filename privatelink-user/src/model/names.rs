//! DNS: the names that are generated, the VPCs' resolvers, and the names that providers bring.

use super::{Addresses, Build, EndpointService, all_have};
use crate::config::{Fields, Value};
use crate::ip::Family;
use ipnet::IpNet;
use privatelink_common::limits::DNS;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::Range;

/// Where every VPC's resolver is, beside an address of its own (AWS: VPC user guide, "Amazon DNS server").
const LINK_LOCAL: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 253);
/// The same for VPCs that have IPv6.
const UNIQUE_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x253);
/// AWS's limit for a network interface.
const QUERIES: u32 = 1024;

/// What all VPCs have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dns {
    /// The end of generated names.
    pub domain: String,
    /// Who is asked whether a provider owns the name that it brings.
    pub verification_servers: Vec<SocketAddr>,
}

impl Default for Dns {
    fn default() -> Self {
        // A top-level domain that is nobody's (ICANN, 2024).
        Self { domain: "privatelink.internal".into(), verification_servers: Vec::new() }
    }
}

/// A VPC's resolver.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resolver {
    /// Its own addresses.
    pub addresses: Vec<IpAddr>,
    /// More addresses that it answers at (AWS: inbound endpoints).
    pub inbound: Vec<IpAddr>,
    /// The security groups of those that have any; at the others, anybody may ask who reaches them.
    pub inbound_groups: BTreeMap<IpAddr, Vec<String>>,
    /// Addresses that questions leave from which a rule forwards (AWS: outbound endpoints).
    pub outbound: Vec<IpAddr>,
    /// Who is asked about names that are not ours, the longest domains first; the last one's may be empty, which is all names.
    pub rules: Vec<Forward>,
    /// The router to name servers outside the VPC's CIDRs, one of each family at most.
    pub gateway: Vec<IpAddr>,
    /// Questions that it takes from one address in a second.
    pub rate: u32,
}

/// Where questions about a domain go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forward {
    /// The domain, in lower case; empty: all.
    pub domain: String,
    /// The name servers, in the order in which they are asked.
    pub to: Vec<SocketAddr>,
}

impl Resolver {
    /// Every address of it.
    pub fn every_address(&self) -> impl Iterator<Item = IpAddr> {
        self.addresses.iter().chain(&self.inbound).chain(&self.outbound).copied()
    }

    /// Where it listens.
    pub fn listens(&self) -> impl Iterator<Item = IpAddr> {
        self.addresses.iter().chain(&self.inbound).copied()
    }

    /// Whether `other` does the same: who may ask is not its affair, but the path's.
    pub fn does_as(&self, other: &Self) -> bool {
        let any = |it: &Self| Self { inbound_groups: BTreeMap::new(), ..it.clone() };
        any(self) == any(other)
    }

    /// The address that a question leaves from which `rule` forwards to a name server of a family. One of the VPC's own CIDRs, since the
    /// answer has to find its way.
    pub fn source(&self, rule: &Forward, family: Family) -> Option<IpAddr> {
        let own =
            self.addresses.iter().filter(|it| ![LINK_LOCAL.into(), IpAddr::V6(UNIQUE_LOCAL)].contains(it));
        let outbound = self.outbound.iter().filter(|_| !rule.domain.is_empty());
        let any = self.outbound.iter();
        outbound.chain(own).chain(any).copied().find(|it| Family::of(*it) == family)
    }
}

/// The name that a service brings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrivateName {
    /// In lower case; it may begin with `*.`.
    pub name: String,
    /// Whether the provider has to prove that the domain is its own.
    pub verified: bool,
}

impl PrivateName {
    /// The domain whose owner is asked.
    pub fn domain(&self) -> &str {
        self.name.strip_prefix("*.").unwrap_or(&self.name)
    }
}

/// A name of at least `labels` parts, in lower case (RFC 1035, 2.3.1; underscores are usual all the same).
fn domain(text: &str, labels: usize) -> Option<String> {
    let text = text.strip_suffix('.').unwrap_or(text);
    let legal = |label: &str| {
        let known = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_".contains(&byte);
        (1..=63).contains(&label.len())
            && label.bytes().all(known)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let count = text.split('.').count();
    (text.len() <= 253 && count >= labels && text.split('.').all(legal)).then(|| text.to_owned())
}

/// A region, which is a label of generated names.
pub(super) fn region(text: &str) -> Option<String> {
    domain(text, 1).filter(|it| it.len() <= 32 && it == text && !it.contains(['.', '_']))
}

/// The address of a name server, with or without a port.
fn server(text: &str) -> Option<SocketAddr> {
    let plain = || text.parse::<IpAddr>().ok().map(|address| SocketAddr::new(address, DNS));
    plain()
        .or_else(|| text.parse().ok())
        .filter(|it| it.port() != 0 && !it.ip().is_unspecified() && !it.ip().is_multicast())
}

/// A name server of the file, to be looked at when all addresses are known.
pub(super) type Asked = (Range<usize>, String, IpAddr);

impl Build<'_, '_> {
    /// What all VPCs have in common.
    pub(super) fn dns(&mut self, root: &mut Fields<'_, '_>) {
        let Some(mut fields) = root.get("dns").and_then(|value| self.reader.table(value)) else { return };
        // Room for what is put before it.
        let parse = |text: &str| domain(text, 1).filter(|it| it.len() <= 100);
        let what = "a domain of lower-case letters, digits and -, at most 100 characters";
        let value = fields.get("domain").and_then(|value| self.reader.parsed(value, what, parse));
        if let Some(value) = value {
            self.model.dns.domain = value;
        }
        if let Some(value) = fields.get("verification_servers") {
            self.model.dns.verification_servers = self.servers(value).into_iter().map(|(_, it)| it).collect();
        }
        fields.finish(self.reader);
    }

    fn servers(&mut self, value: &Value<'_>) -> Vec<(Range<usize>, SocketAddr)> {
        let mut servers = Vec::new();
        for item in self.reader.list(value) {
            let what = "a name server's address, such as 10.0.5.53 or [fd00::53]:5353";
            servers.extend(self.reader.parsed(item, what, server).map(|it| (item.span(), it)));
        }
        servers
    }

    /// The VPCs' resolvers, when their networks and their security groups are known.
    pub(super) fn resolvers(&mut self, written: Vec<(String, &Value<'_>)>) {
        for (vpc, value) in written {
            let resolver = self.resolver(&vpc, value);
            if let Some(vpc) = self.model.vpcs.get_mut(&vpc) {
                vpc.dns = resolver;
            }
        }
    }

    /// The resolver of a VPC: `true`, or a table with more about it.
    fn resolver(&mut self, vpc: &str, value: &Value<'_>) -> Option<Resolver> {
        let fields = if value.get_ref().is_table() {
            Some(self.reader.table(value)?)
        } else if self.reader.boolean(value)? {
            None
        } else {
            return None;
        };
        let addresses = self.own_addresses(vpc);
        let who = format!("the resolver of the VPC \"{vpc}\"");
        for address in &addresses {
            self.own(value.span(), vpc, *address, who.clone());
        }
        let mut resolver = Resolver { addresses, rate: QUERIES, ..Resolver::default() };
        let Some(mut fields) = fields else { return Some(resolver) };
        self.inbound(&mut fields, vpc, &who, &mut resolver);
        if let Some(value) = fields.get("outbound") {
            for item in self.reader.list(value) {
                self.own_address(item, vpc, &who, &mut resolver.outbound);
            }
        }
        resolver.gateway = self.gateway(&mut fields, vpc);
        let rate = fields.get("max_queries_per_second");
        resolver.rate = rate.and_then(|it| self.reader.number(it, 1..=1_000_000)).unwrap_or(QUERIES);
        self.rules(&mut fields, vpc, &mut resolver);
        fields.finish(self.reader);
        Some(resolver)
    }

    /// The addresses that every resolver of a VPC like this has: the third one of its first IPv4 network, where that has one to spare.
    fn own_addresses(&self, vpc: &str) -> Vec<IpAddr> {
        let cidrs = self.model.vpcs.get(vpc).map(|it| it.cidrs.as_slice()).unwrap_or_default();
        let primary = cidrs.iter().find_map(|cidr| if let IpNet::V4(net) = cidr { Some(net) } else { None });
        let mut addresses = Vec::new();
        if let Some(net) = primary {
            let third = Ipv4Addr::from(u32::from(net.network()).wrapping_add(2));
            if net.contains(&third) && third != net.broadcast() {
                addresses.push(third.into());
            }
            addresses.push(LINK_LOCAL.into());
        }
        if cidrs.iter().any(|cidr| matches!(cidr, IpNet::V6(_))) {
            addresses.push(UNIQUE_LOCAL.into());
        }
        addresses
    }

    /// Where the resolver listens beside its own addresses: an address, or a table of one and of its security groups.
    fn inbound(&mut self, fields: &mut Fields<'_, '_>, vpc: &str, who: &str, resolver: &mut Resolver) {
        let Some(value) = fields.get("inbound") else { return };
        for item in self.reader.list(value) {
            if !item.get_ref().is_table() {
                self.own_address(item, vpc, who, &mut resolver.inbound);
                continue;
            }
            let Some(mut fields) = self.reader.table(item) else { continue };
            let address = fields.need(self.reader, "address");
            let address = address.and_then(|it| self.own_address(it, vpc, who, &mut resolver.inbound));
            let groups = self.groups(&mut fields, Some(&vpc.to_owned()));
            fields.finish(self.reader);
            if let Some(address) = address.filter(|_| !groups.is_empty()) {
                resolver.inbound_groups.insert(address, groups);
            }
        }
    }

    /// An address of the VPC that is the resolver's, beside `others`.
    fn own_address(
        &mut self,
        item: &Value<'_>,
        vpc: &str,
        who: &str,
        others: &mut Vec<IpAddr>,
    ) -> Option<IpAddr> {
        let address = self.address(item, Some(&vpc.to_owned()))?;
        self.own(item.span(), vpc, address, who.to_owned());
        if others.contains(&address) {
            self.reader.problem(item.span(), format!("{address} is there twice"), None);
        }
        others.push(address);
        Some(address)
    }

    /// One address, or one of each family.
    fn gateway(&mut self, fields: &mut Fields<'_, '_>, vpc: &str) -> Vec<IpAddr> {
        let mut addresses: Vec<IpAddr> = Vec::new();
        let Some(value) = fields.get("gateway") else { return addresses };
        let items = if value.get_ref().is_array() { self.reader.list(value) } else { vec![value] };
        for item in items {
            let Some(address) = self.address(item, Some(&vpc.to_owned())) else { continue };
            let family = Family::of(address);
            if addresses.iter().any(|it| Family::of(*it) == family) {
                let message =
                    format!("expected one address of each family: {address} is the second {family} one");
                self.reader.problem(item.span(), message, None);
            }
            self.asked.push((item.span(), vpc.to_owned(), address));
            addresses.push(address);
        }
        addresses
    }

    fn rules(&mut self, fields: &mut Fields<'_, '_>, vpc: &str, resolver: &mut Resolver) {
        let mut rules: Vec<(Forward, Vec<Range<usize>>)> = Vec::new();
        let listed = fields.get("forward").map(|value| self.reader.list(value)).unwrap_or_default();
        for item in listed {
            let Some(mut rule) = self.reader.table(item) else { continue };
            let name = rule.need(self.reader, "domain");
            let what = "a domain of lower-case letters, digits, - and _";
            let name = name.and_then(|value| self.reader.parsed(value, what, |text| domain(text, 1)));
            let to = rule.need(self.reader, "to").map(|value| self.servers(value)).unwrap_or_default();
            rule.finish(self.reader);
            let Some(name) = name else { continue };
            if rules.iter().any(|(rule, _)| rule.domain == name) {
                self.reader.problem(item.span(), format!("there are two rules for {name}"), None);
            }
            let (places, to) = to.into_iter().unzip();
            rules.push((Forward { domain: name, to }, places));
        }
        if let Some(value) = fields.get("upstreams") {
            let (places, to) = self.servers(value).into_iter().unzip();
            rules.push((Forward { domain: String::new(), to }, places));
        }
        for (rule, places) in &rules {
            for (server, place) in rule.to.iter().zip(places) {
                self.reachable(vpc, resolver, rule, server.ip(), place);
            }
        }
        resolver.rules = rules.into_iter().map(|(rule, _)| rule).filter(|rule| !rule.to.is_empty()).collect();
        resolver.rules.sort_by_key(|rule| std::cmp::Reverse(labels(&rule.domain)));
    }

    /// A name server is in the VPC, or behind its gateway; and there is an address to ask it from.
    fn reachable(
        &mut self,
        vpc: &str,
        resolver: &Resolver,
        rule: &Forward,
        server: IpAddr,
        place: &Range<usize>,
    ) {
        let family = Family::of(server);
        if resolver.source(rule, family).is_none() {
            let message =
                format!("the resolver has no {family} address in the VPC \"{vpc}\" to ask {server} from");
            let help = "write one in \"outbound\"";
            self.reader.problem(place.clone(), message, Some(help.into()));
        }
        let cidrs = self.model.vpcs.get(vpc).map(|it| it.cidrs.as_slice()).unwrap_or_default();
        let inside = cidrs.iter().any(|cidr| cidr.contains(&server));
        if !inside && !resolver.gateway.iter().any(|it| Family::of(*it) == family) {
            let message = format!("{server} is outside the VPC \"{vpc}\"");
            let help = "write the address of the VPC's router in \"gateway\"";
            self.reader.problem(place.clone(), message, Some(help.into()));
        }
        self.asked.push((place.clone(), vpc.to_owned(), server));
    }

    /// Name servers and gateways are hosts of the VPC: what is ours answers no questions of the resolver.
    pub(super) fn name_servers(&mut self) {
        for (place, vpc, address) in std::mem::take(&mut self.asked) {
            let owner = self.owners.get(&(vpc, address)).filter(|owner| !owner.starts_with("a target"));
            if let Some(owner) = owner {
                let message = format!("{address} belongs to {owner}, which the resolver cannot ask");
                self.reader.problem(place, message, None);
            }
        }
    }

    /// The name that a service brings.
    pub(super) fn private_name(&mut self, fields: &mut Fields<'_, '_>) -> Option<PrivateName> {
        let verify = fields.get("private_dns_name_verification");
        let verified = verify.and_then(|value| self.reader.boolean(value)).unwrap_or(true);
        let value = fields.get("private_dns_name")?;
        let what = "a name such as api.example.com or *.example.com: lower-case letters, digits, - and _";
        let parse = |text: &str| {
            let wildcard = text.strip_prefix("*.");
            let name = domain(wildcard.unwrap_or(text), 2)?;
            Some(if wildcard.is_some() { format!("*.{name}") } else { name })
        };
        let name = self.reader.parsed(value, what, parse)?;
        let ours = &self.model.dns.domain;
        if name.strip_suffix(ours.as_str()).is_some_and(|rest| rest.is_empty() || rest.ends_with('.')) {
            let message = format!("{name} is among the names that are generated, below {ours}");
            self.reader.problem(value.span(), message, None);
        }
        Some(PrivateName { name, verified })
    }

    /// Whether an endpoint's VPC knows the service by the name that it brings; the reasons why it cannot are AWS's.
    pub(super) fn private_dns_enabled(
        &mut self,
        fields: &mut Fields<'_, '_>,
        vpc: &str,
        service: &str,
    ) -> bool {
        fields.refuse(self.reader, "private_dns", "write \"private_dns_enabled\", as AWS does");
        let Some(value) = fields.get("private_dns_enabled") else { return false };
        if !self.reader.boolean(value).unwrap_or(false) {
            return false;
        }
        let (Some(of), Some(home)) = (self.model.services.get(service), self.model.vpcs.get(vpc)) else {
            return true;
        };
        let brings = |it: &EndpointService| it.private_name.as_ref().map(|it| it.name.clone());
        let Some(name) = brings(of) else {
            let message = format!("the service \"{service}\" does not provide a private DNS name");
            self.reader.problem(value.span(), message, None);
            return true;
        };
        let has_resolver = home.dns.is_some();
        let mut others =
            self.model.endpoints.iter().filter(|(_, it)| it.vpc == vpc && it.private_dns_enabled);
        let conflict = others
            .find(|(_, it)| self.model.services.get(&it.service).and_then(brings).as_ref() == Some(&name));
        let conflict = conflict.map(|(other, _)| other.clone());
        if !has_resolver {
            let message = format!("the VPC \"{vpc}\" has no resolver");
            let help = format!("write dns = true at [vpcs.{vpc}]");
            self.reader.problem(value.span(), message, Some(help));
        }
        if let Some(other) = conflict {
            let message = format!("the endpoint \"{other}\" has {name} in the VPC \"{vpc}\" already");
            self.reader.problem(value.span(), message, None);
        }
        true
    }
}

impl Build<'_, '_> {
    /// The family of addresses that an endpoint's names resolve to (AWS: `DnsRecordIpType`), of those that it has; none: all of them.
    pub(super) fn record_type(
        &mut self,
        fields: &mut Fields<'_, '_>,
        addresses: &BTreeMap<String, Addresses>,
    ) -> Option<Family> {
        let value = fields.get("dns_record_ip_type")?;
        let known = |text: &str| match text {
            "dualstack" => Some(None),
            other => Family::from_name(other).map(Some),
        };
        let what = "a record IP type: ipv4, ipv6 or dualstack";
        let wanted = self.reader.parsed(value, what, known)?;
        let has = |family: Family| all_have(addresses.values(), family);
        let lacking =
            Family::ALL.into_iter().find(|it| wanted.is_none_or(|wanted| wanted == *it) && !has(*it));
        if let Some(family) = lacking {
            self.reader.problem(value.span(), format!("the endpoint has no {family} addresses"), None);
        }
        wanted
    }
}

/// How many labels a name has.
fn labels(domain: &str) -> usize {
    domain.split('.').filter(|label| !label.is_empty()).count()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test: a panic with its place is what is wanted")]
mod tests {
    use super::*;

    #[test]
    fn a_domain_is_one_that_can_be_asked_for() {
        for good in ["corp.example", "example.", "_x.a-b.example", "1.example"] {
            assert!(domain(good, 1).is_some(), "{good}");
        }
        let long = format!("{}.example", "x".repeat(64));
        for bad in
            ["", ".", "a..b", "A.example", "-a.example", "a-.example", "*.example", "a b.example", &long]
        {
            assert!(domain(bad, 1).is_none(), "{bad}");
        }
        assert!(domain("localhost", 2).is_none());
    }

    #[test]
    fn a_name_server_has_a_port_of_its_own_or_the_usual_one() {
        assert_eq!(server("10.0.5.53").unwrap().to_string(), "10.0.5.53:53");
        assert_eq!(server("fd00::53").unwrap().to_string(), "[fd00::53]:53");
        assert_eq!(server("[fd00::53]:5353").unwrap().to_string(), "[fd00::53]:5353");
        for bad in ["dns.example", "10.0.5.53:0", "0.0.0.0", "224.0.0.251", "10.0.5"] {
            assert!(server(bad).is_none(), "{bad}");
        }
    }
}
