//! Which names a VPC has, and to what they resolve: a function of the configuration, the connections and the targets' health.

use crate::connections::{Book, Connection, State};
use crate::ip::{self, Family};
use crate::model::{Addresses, Endpoint, LoadBalancer, Model};
use crate::names::{Kind as Numbered, Names};
use crate::plan::{Image, hash};
use crate::zones;
use privatelink_common::tables::VpcAddress;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// What a name is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// An endpoint's, for all of its zones.
    Endpoint,
    /// An endpoint's, for one zone.
    EndpointZone,
    /// The one that a service brings.
    Private,
    /// A load balancer's, for all of its zones.
    LoadBalancer,
    /// A load balancer's, for one zone.
    LoadBalancerZone,
    /// An address's.
    Reverse,
}

impl Kind {
    /// The word for it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Endpoint => "endpoint",
            Self::EndpointZone => "endpoint_zone",
            Self::Private => "private",
            Self::LoadBalancer => "load_balancer",
            Self::LoadBalancerZone => "load_balancer_zone",
            Self::Reverse => "reverse",
        }
    }
}

/// What becomes of questions for a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// They are answered.
    Answered,
    /// The name exists, and has no address, for this reason.
    Withdrawn(String),
    /// The name is not ours, for this reason.
    Absent(String),
}

/// A name of a VPC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The VPC.
    pub vpc: String,
    /// The name, in lower case and without a dot at its end; it may begin with `*.`.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// The endpoint or the load balancer that it belongs to.
    pub of: String,
    /// To what it resolves.
    pub addresses: Vec<IpAddr>,
    /// The name that it points to, of [`Kind::Reverse`].
    pub pointer: Option<String>,
    /// Whether it does.
    pub standing: Standing,
}

/// What names follow from.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// The configuration.
    pub model: &'a Model,
    /// The connections, and the generated ids.
    pub book: &'a Book,
    /// What the maps contain.
    pub image: &'a Image,
    /// Numbers of names.
    pub names: &'a Names,
}

/// The domain of all endpoints' names.
pub fn endpoints_domain(model: &Model) -> String {
    format!("{}.vpce.{}", model.region, model.dns.domain)
}

/// The domain of all load balancers' names.
pub fn balancers_domain(model: &Model) -> String {
    format!("elb.{}.{}", model.region, model.dns.domain)
}

/// `id-SUFFIX`: what an endpoint's names begin with (AWS: eight characters of base 36). Made of the id, so that it stays the same.
fn label(id: &str) -> String {
    const DIGITS: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";
    let mut rest = hash(&[b"dns", id.as_bytes()]);
    let mut label = format!("{id}-");
    for _ in 0..8 {
        #[allow(clippy::cast_possible_truncation, reason = "below 36")]
        label.push(char::from(DIGITS[(rest % 36) as usize]));
        rest /= 36;
    }
    label
}

/// A load balancer's label (AWS: `NAME-` and sixteen hexadecimal digits), which has room for 63 characters.
fn balancer_label(name: &str) -> String {
    let id = hash(&[b"load balancer", name.as_bytes()]);
    let short: String = name.chars().take(46).collect();
    format!("{}-{id:016x}", short.to_ascii_lowercase())
}

/// An endpoint's name for all zones, or for one.
pub fn endpoint_name(model: &Model, book: &Book, connection: &Connection, zone: Option<&str>) -> String {
    let service = book.services.get(&connection.service).map(String::as_str).unwrap_or_default();
    let zone = zone.map(|zone| format!("-{}", zone.to_ascii_lowercase())).unwrap_or_default();
    format!("{}{zone}.{service}.{}", label(&connection.id), endpoints_domain(model))
}

/// A load balancer's name for all zones, or for one.
pub fn balancer_name(model: &Model, name: &str, zone: Option<&str>) -> String {
    let zone = zone.map(|zone| format!("{}.", zone.to_ascii_lowercase())).unwrap_or_default();
    format!("{zone}{}.{}", balancer_label(name), balancers_domain(model))
}

/// The name of an address (RFC 1035, 3.5; RFC 3596, 2.5).
pub fn reverse_name(address: IpAddr) -> String {
    let mut name = String::new();
    match address {
        IpAddr::V4(address) => {
            address.octets().iter().rev().for_each(|byte| name += &format!("{byte}."));
            name + "in-addr.arpa"
        }
        IpAddr::V6(address) => {
            address
                .octets()
                .iter()
                .rev()
                .for_each(|byte| name += &format!("{:x}.{:x}.", byte & 15, byte >> 4));
            name + "ip6.arpa"
        }
    }
}

/// A zone of something that has addresses: whether it is fit for traffic, and which of them names resolve to.
struct Zone<'a> {
    name: &'a str,
    addresses: &'a Addresses,
    family: Option<Family>,
    fit: bool,
}

impl Zone<'_> {
    fn shown(&self) -> impl Iterator<Item = IpAddr> + use<> {
        let family = self.family;
        self.addresses.iter().filter(move |it| family.is_none_or(|family| Family::of(*it) == family))
    }
}

/// Every name of every VPC that has a resolver.
pub fn entries(facts: &Facts<'_>) -> Vec<Entry> {
    let unfit = zones::withdrawn(facts.model, facts.image, facts.names);
    let mut entries = Vec::new();
    let resolves = |vpc: &str| facts.model.vpcs.get(vpc).is_some_and(|vpc| vpc.dns.is_some());
    for (name, endpoint) in &facts.model.endpoints {
        let Some(connection) = facts.book.of(name).filter(|it| it.state.exists()) else { continue };
        // Whoever reaches the endpoint from an attached VPC knows it by its generated names, which on AWS are public.
        let mut spaces = facts.model.reached_from(&endpoint.vpc);
        spaces.insert(endpoint.vpc.clone());
        spaces.retain(|space| resolves(space));
        if spaces.is_empty() {
            continue;
        }
        let mut own = Vec::new();
        of_endpoint(facts, &unfit, name, endpoint, connection, &mut own);
        for vpc in spaces {
            let known = own.iter().filter(|it| vpc == endpoint.vpc || it.kind != Kind::Private);
            entries.extend(known.map(|it| Entry { vpc: vpc.clone(), ..it.clone() }));
        }
    }
    for (name, balancer) in facts.model.load_balancers.iter().filter(|(_, it)| resolves(&it.vpc)) {
        of_balancer(facts, &unfit, name, balancer, &mut entries);
    }
    entries
}

fn of_endpoint(
    facts: &Facts<'_>,
    unfit: &BTreeSet<u32>,
    name: &str,
    endpoint: &Endpoint,
    connection: &Connection,
    entries: &mut Vec<Entry>,
) {
    let vpc = facts.names.id(Numbered::Vpc, &endpoint.vpc).and_then(|id| u16::try_from(id).ok()).unwrap_or(0);
    let is_fit = |addresses: &Addresses| {
        let entry = |address| facts.image.addresses.get(&VpcAddress::new(vpc, ip::entry(address)));
        addresses.iter().all(|address| entry(address).is_some_and(|it| !unfit.contains(&it.balancer)))
    };
    let zones = zones(&endpoint.addresses, endpoint.dns_record_ip_type, |_, addresses| is_fit(addresses));
    let called = |zone: Option<&str>| endpoint_name(facts.model, facts.book, connection, zone);
    let of = Owner { vpc: &endpoint.vpc, name, kinds: [Kind::Endpoint, Kind::EndpointZone] };
    add(&of, &zones, called, entries);
    let private = endpoint.private_dns_enabled.then(|| facts.model.services.get(&endpoint.service)).flatten();
    let Some(private) = private.and_then(|it| it.private_name.as_ref()) else { return };
    let standing = match facts.book.domains.get(&endpoint.service).filter(|_| private.verified) {
        _ if connection.state != State::Available => {
            Standing::Absent(format!("the endpoint is {}", connection.state.name()))
        }
        Some(domain) if !domain.permits(&connection.id) => {
            Standing::Absent(format!("the service's name is {}", domain.state.name()))
        }
        _ => Standing::Answered,
    };
    let addresses = if standing == Standing::Answered { fit(&zones) } else { Vec::new() };
    entries.push(of.entry(private.name.clone(), Kind::Private, addresses, standing));
}

fn of_balancer(
    facts: &Facts<'_>,
    unfit: &BTreeSet<u32>,
    name: &str,
    balancer: &LoadBalancer,
    entries: &mut Vec<Entry>,
) {
    let number = |zone: &str| facts.names.id(Numbered::Balancer, &format!("{name}/{zone}"));
    let zones =
        zones(&balancer.addresses, None, |zone, _| number(zone).is_some_and(|id| !unfit.contains(&id)));
    let called = |zone: Option<&str>| balancer_name(facts.model, name, zone);
    let of = Owner { vpc: &balancer.vpc, name, kinds: [Kind::LoadBalancer, Kind::LoadBalancerZone] };
    add(&of, &zones, called, entries);
}

/// The zones of something. Where none is fit, all are (AWS: target-group-health, fail-open).
fn zones<'a>(
    addresses: &'a BTreeMap<String, Addresses>,
    family: Option<Family>,
    is_fit: impl Fn(&str, &Addresses) -> bool,
) -> Vec<Zone<'a>> {
    let zone = |(name, addresses): (&'a String, &'a Addresses)| Zone {
        name,
        addresses,
        family,
        fit: is_fit(name, addresses),
    };
    let mut zones: Vec<_> = addresses.iter().map(zone).collect();
    if zones.iter().all(|zone| !zone.fit) {
        zones.iter_mut().for_each(|zone| zone.fit = true);
    }
    zones
}

fn fit(zones: &[Zone<'_>]) -> Vec<IpAddr> {
    zones.iter().filter(|zone| zone.fit).flat_map(Zone::shown).collect()
}

/// Whose names they are.
struct Owner<'a> {
    vpc: &'a str,
    name: &'a str,
    /// What the name for all zones is, and what those of one are.
    kinds: [Kind; 2],
}

impl Owner<'_> {
    fn entry(&self, name: String, kind: Kind, addresses: Vec<IpAddr>, standing: Standing) -> Entry {
        let (vpc, of) = (self.vpc.to_owned(), self.name.to_owned());
        Entry { vpc, name, kind, of, addresses, pointer: None, standing }
    }
}

/// The generated names: for all zones, for each, and of each address.
fn add(
    of: &Owner<'_>,
    zones: &[Zone<'_>],
    called: impl Fn(Option<&str>) -> String,
    entries: &mut Vec<Entry>,
) {
    let [all, one] = of.kinds;
    entries.push(of.entry(called(None), all, fit(zones), Standing::Answered));
    for zone in zones {
        let name = called(Some(zone.name));
        for address in zone.addresses.iter() {
            let reverse = of.entry(reverse_name(address), Kind::Reverse, Vec::new(), Standing::Answered);
            entries.push(Entry { pointer: Some(name.clone()), ..reverse });
        }
        entries.push(if zone.fit {
            of.entry(name, one, zone.shown().collect(), Standing::Answered)
        } else {
            let why = format!("the zone {} has too few healthy targets", zone.name);
            of.entry(name, one, Vec::new(), Standing::Withdrawn(why))
        });
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test: a panic with its place is what is wanted")]
mod tests {
    use super::*;

    #[test]
    fn an_addresss_name_is_that_of_the_rfcs() {
        assert_eq!(reverse_name("10.0.9.8".parse().unwrap()), "8.9.0.10.in-addr.arpa");
        // RFC 3596, 2.5.
        assert_eq!(
            reverse_name("4321:0:1:2:3:4:567:89ab".parse().unwrap()),
            "b.a.9.8.7.6.5.0.4.0.0.0.3.0.0.0.2.0.0.0.1.0.0.0.0.0.0.0.1.2.3.4.ip6.arpa"
        );
    }

    #[test]
    fn generated_labels_fit_and_stay_the_same() {
        let id = "vpce-0123456789abcdef0";
        assert_eq!(label(id), label(id));
        assert_ne!(label(id), label("vpce-0123456789abcdef1"));
        assert_eq!(label(id).len(), 31);
        assert_eq!(balancer_label(&"X".repeat(63)).len(), 63);
        assert_ne!(balancer_label(&"x".repeat(62)), balancer_label(&"x".repeat(63)), "the whole name counts");
    }
}
