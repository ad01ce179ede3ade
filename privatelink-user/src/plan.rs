//! What the maps should contain: a pure function of the configuration, the numbers that names have, and measured health.

use crate::connections::State;
use crate::flows::Survey;
use crate::ip::{self, Family};
use crate::maps::{AddressRuleKey, PortRuleKey, PrefixKey};
use crate::model::{self, Hook, Listener, LoadBalancer, Model, SynCookies, TargetGroup};
use crate::names::{Kind, Names};
use crate::rules::{self, Line};
use anyhow::{Context, Result, ensure};
use ipnet::IpNet;
use privatelink_common::limits::{COOKIES_SHARE, ENDPOINT_MTU, RULE_ENTRIES, TCP_CLOSED, UDP_IDLE};
use privatelink_common::plan::maglev::{Share, fill, size};
use privatelink_common::tables::{
    Address, BALANCER, Balancer, DRAINING, ENDPOINT, Face, HEALTHY, INITIAL, ListenerKey, NameKey, Prefix,
    RESOLVER, RESOLVER_ENDPOINT, RuleMask, RulePorts, Subnet, Target, UNCHECKED, UNHEALTHY, VpcAddress,
    VpcEndpointId,
};
use privatelink_common::tables::{Listener as ListenerEntry, Name};
use privatelink_common::wire::{Ip, Mac, UDP};
use siphasher::sip::SipHasher13;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::Hasher;
use std::net::{IpAddr, SocketAddr};
use zerocopy::big_endian::{U16, U32};

/// The wanted contents of every map that the configuration decides.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(
    missing_docs,
    reason = "named as the maps are, but for `hooks`, by interface, and `name_servers`; described in privatelink_common::tables. VLANs are by their names"
)]
pub struct Image {
    pub interfaces: BTreeMap<String, Place>,
    pub vlans: BTreeMap<String, Vlan>,
    pub hooks: BTreeMap<String, Hook>,
    pub prefixes: BTreeMap<PrefixKey, u32>,
    pub rules_by_address: BTreeMap<AddressRuleKey, RuleMask>,
    pub rules_by_port: BTreeMap<PortRuleKey, RulePorts>,
    pub subnets: BTreeMap<PrefixKey, Subnet>,
    /// What the configuration calls the rules of a set; not in a map.
    pub rules: BTreeMap<u32, Vec<String>>,
    pub addresses: BTreeMap<VpcAddress, Address>,
    pub endpoints: BTreeMap<u32, Gate>,
    pub balancers: BTreeMap<u32, Balancer>,
    pub listeners: BTreeMap<ListenerKey, ListenerEntry>,
    pub tables: BTreeMap<u32, Vec<u32>>,
    pub targets: BTreeMap<u32, Target>,
    pub vpc_endpoint_ids: BTreeMap<u32, VpcEndpointId>,
    pub names: BTreeMap<NameKey, Name>,
    pub name_servers: BTreeMap<VpcAddress, NextHop>,
}

/// Who is asked for the link-layer address of somebody that the path is to reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NextHop {
    /// The address that is asked for: its own, or the router's.
    pub address: Ip,
    /// Who asks.
    pub asker: Face,
}

/// What an endpoint lets through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gate {
    /// Whether its account may connect.
    pub open: bool,
    /// Whether it has as many flows as it may.
    pub full: bool,
    /// New flows a second; 0: any number.
    pub rate: u32,
    /// How many of these it may save up.
    pub burst: u32,
    /// For how many seconds closed flows keep their NAT ports.
    pub hold: u32,
    /// Largest IP packet, in bytes.
    pub mtu: u16,
    /// Whether it sends ICMP errors.
    pub errors: bool,
    /// When SYN cookies begin: [`privatelink_common::tables::Endpoint::cookies`].
    pub cookies: u32,
    /// The rules of its security groups; 0: there are none.
    pub rules: u32,
    /// Whether there are network ACLs in its VPC or in the provider's.
    pub acls: bool,
}

/// Where an interface belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its VPC.
    pub vpc: u16,
    /// Its slot.
    pub slot: u16,
    /// Whether it leads to the VPC's stack.
    pub stack: bool,
}

/// An interface that is tags on a trunk, and where it belongs. Each trunk is an interface, too; one that no VPC names belongs to VPC 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vlan {
    /// The tags.
    pub tags: model::Vlan,
    /// Where it belongs.
    pub place: Place,
}

impl Image {
    /// Where everything belongs that is an interface of a VPC's.
    pub fn places(&self) -> impl Iterator<Item = (&String, Place)> {
        let devices = self.interfaces.iter().map(|(name, place)| (name, *place));
        devices.chain(self.vlans.iter().map(|(name, vlan)| (name, vlan.place))).filter(|(_, it)| it.vpc != 0)
    }

    /// The VLANs of a trunk.
    pub fn vlans_of<'a>(&'a self, trunk: &'a str) -> impl Iterator<Item = &'a Vlan> {
        self.vlans.values().filter(move |vlan| vlan.tags.trunk == trunk)
    }
}

/// What the agent checks about a target, and from where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// The VPC's name.
    pub vpc: String,
    /// The load balancer's address that the check comes from.
    pub source: IpAddr,
    /// Where it goes.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
    /// How.
    pub how: crate::model::HealthCheck,
    /// Whether it begins with the Proxy Protocol's header.
    pub proxied: bool,
}

/// A stable hash of some words.
pub fn hash(words: &[&[u8]]) -> u64 {
    let mut hasher = SipHasher13::new();
    for word in words {
        hasher.write_usize(word.len());
        hasher.write(word);
    }
    hasher.finish()
}

/// The link-layer address of an address that exists only here: locally administered, and the same on every host and after every
/// restart, since it is made of the VPC's name and the address alone.
pub fn mac(vpc: &str, address: IpAddr) -> Mac {
    let [a, b, c, d, e, ..] = hash(&[b"mac", vpc.as_bytes(), &ip::bytes(address)]).to_be_bytes();
    [0x02, a, b, c, d, e]
}

/// A network of a VPC, for the maps.
fn prefix_key(vpc: u16, network: &IpNet) -> PrefixKey {
    let prefix = Prefix { vpc: U32::new(vpc.into()), address: ip::entry(network.network()).0 };
    let before = if network.network().is_ipv4() { 96 } else { 0 };
    PrefixKey { bits: 32 + before + u32::from(network.prefix_len()), prefix }
}

/// A target's name.
pub fn target_name(group: &str, target: &crate::model::Target) -> String {
    format!("{group}/{}", SocketAddr::new(target.address, target.port))
}

/// The name of one address of an endpoint: its own and the zone's, and of an IPv6 address, that it is one.
pub fn endpoint_name(endpoint: &str, zone: &str, address: IpAddr) -> String {
    format!("{endpoint}/{zone}{}", if address.is_ipv6() { "/ipv6" } else { "" })
}

/// The name under which a load balancer's flows from its own VPC are counted; no endpoint can have it.
pub fn own_name(load_balancer: &str, zone: &str, address: IpAddr) -> String {
    endpoint_name(&format!("load_balancer:{load_balancer}"), zone, address)
}

/// The name of the slot that leads to a VPC's stack.
pub fn stack_name(vpc: &str) -> String {
    format!("stack/{vpc}")
}

/// The VPC of a slot of this name, if it leads to a stack.
pub fn stack_vpc(name: &str) -> Option<&str> {
    name.strip_prefix("stack/")
}

/// What is known beside the configuration.
#[derive(Debug, Default)]
pub struct Known<'a> {
    /// Seconds since boot.
    pub now: u32,
    /// Targets as they are.
    pub targets: BTreeMap<u32, Target>,
    /// Addresses as they are.
    pub addresses: BTreeMap<VpcAddress, Address>,
    /// Measured states.
    pub health: BTreeMap<u32, u16>,
    /// How endpoints stand with their services, and their ids. One that is not here has no address.
    pub connections: BTreeMap<String, (State, String)>,
    /// The configuration before, which says how long targets that are in it no more may drain.
    pub before: Option<&'a Model>,
    /// How many flows targets have.
    pub flows: Survey,
    /// Tables that were computed before.
    pub memo: RefCell<Memo>,
}

impl Known<'_> {
    /// Nothing, but that every endpoint's connection is available.
    pub fn connected(model: &Model) -> Self {
        let standing = |name: &String| (State::Available, format!("vpce-0{:016x}", hash(&[name.as_bytes()])));
        let connections = model.endpoints.keys().map(|name| (name.clone(), standing(name))).collect();
        Self { connections, ..Self::default() }
    }
}

/// What tables were computed from, and what came of it: the same again costs nothing.
pub type Memo = BTreeMap<u32, (Vec<(u32, u64, u32)>, Vec<u32>)>;

/// Computes the image. `names` gains numbers for what is new.
pub fn compile(
    model: &Model,
    names: &mut Names,
    known: &Known<'_>,
    stack_link: impl Fn(&str) -> String,
) -> Result<Image> {
    let (used, routed, image) = (BTreeSet::new(), BTreeSet::new(), Image::default());
    let mut plan = Plan { model, names, used, routed, image, known };
    plan.vpcs(stack_link)?;
    plan.subnets()?;
    plan.targets()?;
    plan.drain();
    plan.balancers()?;
    plan.endpoints()?;
    plan.resolvers()?;
    plan.cut()?;
    let used = plan.used;
    let mut image = plan.image;
    image.names =
        names.entries()?.into_iter().filter(|(key, _)| used.contains(&(key.kind, key.id))).collect();
    Ok(image)
}

struct Plan<'a> {
    model: &'a Model,
    names: &'a mut Names,
    used: BTreeSet<(u32, u32)>,
    /// Targets that get new flows.
    routed: BTreeSet<u32>,
    image: Image,
    known: &'a Known<'a>,
}

impl Plan<'_> {
    fn id(&mut self, kind: Kind, name: &str) -> Result<u32> {
        let limits = &self.model.limits;
        let limit = match kind {
            Kind::Vpc => limits.vpcs,
            Kind::Interface => limits.interfaces,
            Kind::Endpoint | Kind::Balancer => limits.endpoints,
            Kind::Table => limits.targets,
            Kind::Target => limits.targets,
            Kind::Rules => RULE_ENTRIES,
            Kind::Subnet => limits.addresses,
        };
        let id = self.names.assign(kind, name, limit)?;
        self.used.insert((kind as u32, id));
        Ok(id)
    }

    fn small(&mut self, kind: Kind, name: &str) -> Result<u16> {
        Ok(u16::try_from(self.id(kind, name)?)?)
    }

    fn vpcs(&mut self, stack_link: impl Fn(&str) -> String) -> Result<()> {
        for (name, vpc) in &self.model.vpcs {
            let id = self.small(Kind::Vpc, name)?;
            for cidr in &vpc.cidrs {
                self.image.prefixes.insert(prefix_key(id, cidr), 1);
            }
            for cidr in self.model.networks_beyond(name) {
                self.image.prefixes.insert(prefix_key(id, &cidr), 1);
            }
            for (interface, hook) in &vpc.interfaces {
                let slot = self.small(Kind::Interface, interface)?;
                self.image.hooks.insert(interface.clone(), *hook);
                self.image.interfaces.insert(interface.clone(), Place { vpc: id, slot, stack: false });
            }
            for tags in vpc.vlans.keys() {
                let (name, tags) = (tags.to_string(), tags.clone());
                let slot = self.small(Kind::Interface, &name)?;
                let place = Place { vpc: id, slot, stack: false };
                self.image.vlans.insert(name, Vlan { tags, place });
            }
            if vpc.dns.is_some() || self.model.load_balancers.values().any(|balancer| balancer.vpc == *name) {
                let slot = self.small(Kind::Interface, &stack_name(name))?;
                self.image.interfaces.insert(stack_link(name), Place { vpc: id, slot, stack: true });
            }
        }
        for (trunk, hook) in self.model.trunks() {
            let slot = self.small(Kind::Interface, trunk)?;
            self.image.hooks.insert(trunk.into(), hook);
            let nobodys = Place { vpc: 0, slot, stack: false };
            self.image.interfaces.entry(trunk.into()).or_insert(nobodys);
        }
        Ok(())
    }

    /// The number of a set of rules, which is compiled unless it is there already. It is named after its contents, so that what says the
    /// same is one set, and a set never changes.
    fn rules(&mut self, lines: &[Line]) -> Result<u32> {
        let said = format!("{lines:?}");
        let [one, other] = [b"one", b"two"].map(|seed| hash(&[seed, said.as_bytes()]));
        let id = self.id(Kind::Rules, &format!("{one:016x}{other:016x}"))?;
        if !self.image.rules.contains_key(&id) {
            let compiled = rules::compile(id, lines);
            self.image.rules_by_address.extend(compiled.by_address);
            self.image.rules_by_port.extend(compiled.by_port);
            self.image.rules.insert(id, lines.iter().map(|line| line.said.clone()).collect());
            let used = self.image.rules_by_address.len().max(self.image.rules_by_port.len());
            ensure!(
                used <= RULE_ENTRIES as usize,
                "the rules of security groups and network ACLs need more than {RULE_ENTRIES} entries"
            );
        }
        Ok(id)
    }

    /// The rules of security groups, which need not be; `members` as in [`rules::of_groups`].
    fn groups(&mut self, groups: &[String], members: bool) -> Result<u32> {
        if groups.is_empty() {
            return Ok(0);
        }
        let lines = rules::of_groups(self.model, groups, members);
        self.rules(&lines)
    }

    fn subnets(&mut self) -> Result<()> {
        for (name, acl) in &self.model.network_acls {
            let vpc = self.small(Kind::Vpc, &acl.vpc)?;
            let ingress = self.rules(&rules::of_acl(name, acl, true))?;
            let egress = self.rules(&rules::of_acl(name, acl, false))?;
            for subnet in &acl.subnets {
                let id = self.id(Kind::Subnet, &format!("{}/{subnet}", acl.vpc))?;
                let entry = Subnet { id, ingress, egress };
                self.image.subnets.insert(prefix_key(vpc, subnet), entry);
                // Who reaches the VPC's endpoints from elsewhere enters its subnets, too.
                for space in self.model.reached_from(&acl.vpc) {
                    let space = self.small(Kind::Vpc, &space)?;
                    self.image.subnets.insert(prefix_key(space, subnet), entry);
                }
            }
        }
        Ok(())
    }

    /// Whether there are network ACLs in a VPC.
    fn has_acls(&self, vpc: &str) -> bool {
        self.model.network_acls.values().any(|acl| acl.vpc == vpc)
    }

    fn targets(&mut self) -> Result<()> {
        for (name, group) in &self.model.target_groups {
            let vpc = self.small(Kind::Vpc, &group.vpc)?;
            for target in &group.targets {
                let id = self.id(Kind::Target, &target_name(name, target))?;
                let measured = self.known.health.get(&id).copied();
                let state = if group.health_check.enabled {
                    measured.filter(|state| [HEALTHY, UNHEALTHY].contains(state)).unwrap_or(INITIAL)
                } else {
                    UNCHECKED
                };
                let before = self.known.targets.get(&id).filter(|before| before.state == state);
                let since = before.map_or(self.known.now, |before| before.since);
                let (address, port) = (ip::entry(target.address), U16::new(target.port));
                let entry = Target { address, port, vpc, state, since, ..Target::default() };
                self.image.targets.insert(id, entry);
            }
        }
        Ok(())
    }

    /// Keeps the targets that are deregistered for as long as they have flows, so that no other target gets their numbers.
    fn drain(&mut self) {
        for (id, before) in &self.known.targets {
            let in_use = self.used.contains(&(Kind::Vpc as u32, before.vpc.into()));
            if self.image.targets.contains_key(id) || !in_use {
                continue;
            }
            let mut target = *before;
            if target.state != DRAINING {
                let (delay, cut) = self.delay(*id);
                (target.state, target.since, target.cut) = (DRAINING, self.known.now, 0);
                target.until = self.known.now.saturating_add(delay);
                target.terminate = cut.into();
            }
            if self.known.now >= target.until && target.terminate == 1 {
                target.cut = target.until;
            }
            if self.known.flows.of(*id, target.since) != Some(0) {
                self.used.insert((Kind::Target as u32, *id));
                self.image.targets.insert(*id, target);
            }
        }
    }

    /// For how many seconds the flows of a target that was deregistered may go on, and whether they are cut then.
    fn delay(&self, id: u32) -> (u32, bool) {
        let name = self.names.name(Kind::Target, id);
        let group = name.rsplit_once('/').map(|(group, _)| group);
        let group = group.and_then(|group| self.known.before?.target_groups.get(group));
        group.map_or((300, false), |group| {
            let delay = group.attributes.deregistration_delay.as_secs();
            (u32::try_from(delay).unwrap_or(u32::MAX), group.attributes.cut_deregistered)
        })
    }

    /// Cuts the flows of unhealthy targets, unless they get new ones because too few are healthy (AWS: fail-open).
    fn cut(&mut self) -> Result<()> {
        for (name, group) in &self.model.target_groups {
            for target in &group.targets {
                let id = self.id(Kind::Target, &target_name(name, target))?;
                let routed = self.routed.contains(&id);
                let Some(entry) =
                    self.image.targets.get_mut(&id).filter(|it| it.state == UNHEALTHY && !routed)
                else {
                    continue;
                };
                let draining = u32::try_from(group.attributes.unhealthy_draining.as_secs())?;
                let at = entry.since.saturating_add(draining).max(1);
                if group.attributes.cut_unhealthy || draining > 0 && self.known.now >= at {
                    entry.cut = at;
                }
            }
        }
        Ok(())
    }

    fn balancers(&mut self) -> Result<()> {
        for (name, balancer) in &self.model.load_balancers {
            let vpc = self.small(Kind::Vpc, &balancer.vpc)?;
            let stack = self.small(Kind::Interface, &stack_name(&balancer.vpc))?;
            for (zone, addresses) in &balancer.addresses {
                // The zone's own number is that of its first address, whose number its listeners and endpoints go by.
                let id = self.id(Kind::Balancer, &format!("{name}/{zone}"))?;
                let mut faces = Vec::new();
                let mut sources = [[0; 8]; 2];
                for (family, sources) in Family::ALL.into_iter().zip(&mut sources) {
                    let mut ids = Vec::new();
                    for address in balancer.of(zone, family) {
                        let own = format!("{name}/{zone}/{address}");
                        let is_zones = addresses.first() == Some(address);
                        let id = if is_zones { id } else { self.id(Kind::Balancer, &own)? };
                        ids.push(id);
                        faces.push((id, address));
                    }
                    if !ids.is_empty() {
                        *sources = std::array::from_fn(|place| ids[place % ids.len()]);
                    }
                }
                let [sources, sources6] = sources;
                for (face, address) in faces {
                    let mac = mac(&balancer.vpc, address);
                    let entry = Balancer { address: ip::entry(address), vpc, mac, sources, sources6 };
                    self.image.balancers.insert(face, entry);
                    let served = balancer.serves_own_vpc && addresses.iter().any(|it| it == address);
                    let endpoint = if served { self.own_endpoint(name, zone, address, balancer)? } else { 0 };
                    let entry = Address {
                        endpoint,
                        balancer: id,
                        stack,
                        mac,
                        kind: BALANCER,
                        ping: 0,
                        dualstack: addresses.ipv6.is_some().into(),
                        rules: 0,
                    };
                    self.image.addresses.insert(VpcAddress::new(vpc, ip::entry(address)), entry);
                }
                for listener in &balancer.listeners {
                    self.listener(id, zone, balancer, listener)?;
                }
            }
        }
        Ok(())
    }

    /// The addresses of the VPCs' resolvers, and how their name servers are reached.
    fn resolvers(&mut self) -> Result<()> {
        for (name, vpc) in &self.model.vpcs {
            let Some(resolver) = &vpc.dns else { continue };
            let id = self.small(Kind::Vpc, name)?;
            let stack = self.small(Kind::Interface, &stack_name(name))?;
            for address in resolver.every_address() {
                let own = resolver.addresses.contains(&address);
                let (mac, kind) = (mac(name, address), if own { RESOLVER } else { RESOLVER_ENDPOINT });
                let groups = resolver.inbound_groups.get(&address).map(Vec::as_slice).unwrap_or_default();
                let entry =
                    Address { stack, mac, kind, rules: self.groups(groups, true)?, ..Address::default() };
                self.image.addresses.insert(VpcAddress::new(id, ip::entry(address)), entry);
                // Attached networks ask at inbound addresses (AWS: Route 53 Resolver, "inbound endpoints"); the resolver's own are the
                // VPC's alone.
                for space in self.model.asks(name, resolver, address) {
                    let space = self.small(Kind::Vpc, &space)?;
                    self.image.addresses.insert(VpcAddress::new(space, ip::entry(address)), entry);
                }
            }
            for (rule, server) in
                resolver.rules.iter().flat_map(|rule| rule.to.iter().map(move |it| (rule, it.ip())))
            {
                let family = Family::of(server);
                let inside = vpc.cidrs.iter().any(|cidr| cidr.contains(&server));
                let gateway = resolver.gateway.iter().find(|it| Family::of(**it) == family);
                let next = gateway.filter(|_| !inside).copied().unwrap_or(server);
                let Some(asks) = resolver.source(rule, family) else { continue };
                let asker = Face { address: ip::entry(asks), mac: mac(name, asks) };
                let hop = NextHop { address: ip::entry(next), asker };
                self.image.name_servers.insert(VpcAddress::new(id, ip::entry(server)), hop);
            }
        }
        Ok(())
    }

    /// What stands for the endpoint where a load balancer serves its own VPC.
    fn own_endpoint(
        &mut self,
        name: &str,
        zone: &str,
        address: IpAddr,
        balancer: &LoadBalancer,
    ) -> Result<u32> {
        let id = self.id(Kind::Endpoint, &own_name(name, zone, address))?;
        let hold = u32::try_from(balancer.port_reuse_delay.as_secs())?;
        let rules = self.groups(&balancer.security_groups, true)?;
        let acls = self.has_acls(&balancer.vpc);
        self.image.endpoints.insert(
            id,
            Gate {
                rules,
                acls,
                open: true,
                hold,
                mtu: ENDPOINT_MTU,
                errors: true,
                cookies: cookies(self.model),
                ..Gate::default()
            },
        );
        Ok(id)
    }

    fn listener(&mut self, balancer: u32, zone: &str, of: &LoadBalancer, listener: &Listener) -> Result<()> {
        let group = &self.model.target_groups.get(&listener.target_group);
        let attributes = group.map(|group| &group.attributes);
        let cross_zone = attributes.and_then(|it| it.cross_zone).unwrap_or(of.cross_zone);
        let sticky = attributes.is_some_and(|it| it.sticky).into();
        let preserve = attributes.is_some_and(|it| it.preserve_client_ip).into();
        let ipv6 = group.is_some_and(|group| group.ip_address_type == Family::Ipv6).into();
        let proxied = attributes.is_some_and(|it| it.proxied).into();
        let zone = if cross_zone { "*" } else { zone };
        let rules = if of.enforce_on_privatelink { self.groups(&of.security_groups, false)? } else { 0 };
        let (table, slots) = self.table(&listener.target_group, zone)?;
        for &protocol in listener.protocol.numbers() {
            let key = ListenerKey { balancer, port: U16::new(listener.port), protocol, reserved: 0 };
            let tcp_idle = u16::try_from(listener.tcp_idle_timeout.as_secs())?;
            let idle_timeout = if protocol == UDP { UDP_IDLE } else { tcp_idle };
            let entry = ListenerEntry {
                table,
                slots,
                idle_timeout,
                sticky,
                preserve,
                ipv6,
                proxied,
                reserved: 0,
                rules,
            };
            self.image.listeners.insert(key, entry);
        }
        Ok(())
    }

    /// The Maglev table of a group's targets in a zone, and its size; 0 where there is no target.
    fn table(&mut self, name: &str, zone: &str) -> Result<(u32, u32)> {
        let group =
            self.model.target_groups.get(name).context("a target group that the model does not have")?;
        let (mut shares, weight) = self.shares(name, group, zone)?;
        let slots = size(weight);
        if shares.is_empty() {
            return Ok((0, 0));
        }
        // The size is part of the name, so that a table never changes its size under a listener that counts on it.
        let id = self.id(Kind::Table, &format!("{name}/{zone}/{slots}"))?;
        if !self.image.tables.contains_key(&id) {
            let of = shares.iter().map(|share| (share.target, share.seed, share.weight)).collect();
            let table = self
                .known
                .memo
                .borrow()
                .get(&id)
                .filter(|(shares, _)| *shares == of)
                .map(|(_, table)| table.clone());
            let table = table.unwrap_or_else(|| {
                let mut table = vec![0; slots as usize];
                fill(&mut table, &mut shares, u32::MAX);
                self.known.memo.borrow_mut().insert(id, (of, table.clone()));
                table
            });
            self.image.tables.insert(id, table);
        }
        Ok((id, slots))
    }

    /// The targets that get new flows, and the sum of their weights: the healthy ones, or all of them where too few are (AWS:
    /// fail-open). Shares are in hundredths of a weight, of which a target that is starting slowly has fewer.
    fn shares(&mut self, name: &str, group: &TargetGroup, zone: &str) -> Result<(Vec<Share>, u64)> {
        let (mut healthy, mut all) = (Vec::new(), Vec::new());
        let (mut healthy_weight, mut weight) = (0, 0);
        for target in group.targets.iter().filter(|target| zone == "*" || target.zone == zone) {
            let id = self.id(Kind::Target, &target_name(name, target))?;
            let seed = hash(&[b"maglev", &ip::bytes(target.address), &target.port.to_be_bytes()]);
            let Some(entry) = self.image.targets.get(&id) else { continue };
            all.push(Share::new(id, seed, u32::from(target.weight) * 100));
            weight += u64::from(target.weight);
            if entry.state == HEALTHY || entry.state == UNCHECKED {
                let part = started(entry, group, self.known.now);
                healthy.push(Share::new(id, seed, u32::from(target.weight) * part));
                healthy_weight += u64::from(target.weight);
            }
        }
        let enough = group.attributes.routing.are_enough(healthy.len(), all.len());
        let (shares, weight) = if enough { (healthy, healthy_weight) } else { (all, weight) };
        self.routed.extend(shares.iter().map(|share| share.target));
        Ok((shares, weight))
    }

    /// One load balancer for each of an endpoint's addresses, and the same one for as long as it is there (AWS:
    /// create-endpoint-service): the one that it has, or the one that is nearest to it by a hash of both names.
    fn chosen(&self, endpoint: u32, name: &str, candidates: &[(String, u32)]) -> Option<u32> {
        let has = self
            .known
            .addresses
            .values()
            .find(|address| address.endpoint == endpoint)
            .map(|address| address.balancer);
        if let Some(has) = has.filter(|has| candidates.iter().any(|(_, id)| id == has)) {
            return Some(has);
        }
        let near =
            |(balancer, _): &&(String, u32)| hash(&[b"balancer", name.as_bytes(), balancer.as_bytes()]);
        candidates.iter().max_by_key(near).map(|(_, id)| *id)
    }

    fn endpoints(&mut self) -> Result<()> {
        for (name, endpoint) in &self.model.endpoints {
            let vpc = self.small(Kind::Vpc, &endpoint.vpc)?;
            let service = self
                .model
                .services
                .get(&endpoint.service)
                .context("a service that the model does not have")?;
            let Some((state, called)) = self.known.connections.get(name).filter(|(state, _)| state.exists())
            else {
                continue;
            };
            for (zone, address) in
                endpoint.addresses.iter().flat_map(|(zone, it)| it.iter().map(move |it| (zone, it)))
            {
                let full = endpoint_name(name, zone, address);
                let id = self.id(Kind::Endpoint, &full)?;
                let in_zone = |it: &&String| {
                    self.model
                        .load_balancers
                        .get(*it)
                        .is_some_and(|balancer| balancer.addresses.contains_key(zone))
                };
                let balancers: Vec<_> = service.load_balancers.iter().filter(in_zone).cloned().collect();
                let mut candidates = Vec::new();
                for balancer in balancers {
                    candidates
                        .push((balancer.clone(), self.id(Kind::Balancer, &format!("{balancer}/{zone}"))?));
                }
                let balancer =
                    self.chosen(id, &full, &candidates).context("a zone that the service does not have")?;
                let text = called.as_bytes().first_chunk().copied().unwrap_or_default();
                self.image.vpc_endpoint_ids.insert(id, VpcEndpointId { text, reserved: [0; 2] });
                let (mac, ping) = (mac(&endpoint.vpc, address), endpoint.ping.into());
                let of = self.names.name(Kind::Balancer, balancer);
                let of = of.split('/').next().and_then(|name| self.model.load_balancers.get(name));
                let dualstack = of.is_some_and(|it| it.has(Family::Ipv6)).into();
                let entry = Address {
                    endpoint: id,
                    balancer,
                    stack: 0,
                    mac,
                    kind: ENDPOINT,
                    ping,
                    dualstack,
                    rules: 0,
                };
                self.image.addresses.insert(VpcAddress::new(vpc, ip::entry(address)), entry);
                for space in self.model.reached_from(&endpoint.vpc) {
                    let space = self.small(Kind::Vpc, &space)?;
                    self.image.addresses.insert(VpcAddress::new(space, ip::entry(address)), entry);
                }
                let has = self.known.flows.endpoints.get(&id).copied().unwrap_or(0);
                let full = endpoint.max_flows.is_some_and(|most| has >= most);
                let (rate, burst) = (endpoint.new_flow_rate, endpoint.new_flow_burst);
                let hold = of.map_or(TCP_CLOSED.into(), |it| it.port_reuse_delay.as_secs());
                let (open, hold) = (state.is_open(), u32::try_from(hold)?);
                let (mtu, errors, cookies) = (endpoint.mtu, endpoint.icmp_errors, cookies(self.model));
                let rules = self.groups(&endpoint.security_groups, true)?;
                let spaces = self.model.reached_from(&endpoint.vpc);
                let acls = self.has_acls(&endpoint.vpc)
                    || spaces.iter().any(|space| self.has_acls(space))
                    || of.is_some_and(|it| self.has_acls(&it.vpc));
                let gate = Gate { open, full, rate, burst, hold, mtu, errors, cookies, rules, acls };
                self.image.endpoints.insert(id, gate);
            }
        }
        Ok(())
    }
}

/// From how many unconfirmed SYNs of an endpoint in a second on the path answers with cookies.
fn cookies(model: &Model) -> u32 {
    match model.syn_cookies {
        SynCookies::Off => 0,
        // A flow has two entries.
        SynCookies::Auto => (model.limits.pending_flows / 2 / COOKIES_SHARE).max(2),
        SynCookies::Always => 1,
    }
}

/// How many hundredths of its weight a healthy target has by now.
fn started(target: &Target, group: &TargetGroup, now: u32) -> u32 {
    let duration = group.attributes.slow_start.as_secs();
    let elapsed = u64::from(now.saturating_sub(target.since));
    if target.state != HEALTHY || elapsed >= duration {
        return 100;
    }
    u32::try_from(elapsed * 100 / duration).unwrap_or(100).max(1)
}

/// Whether the image changes by itself as time goes on: while targets drain or start slowly.
pub fn is_timed(model: &Model, image: &Image) -> bool {
    let attributes = || model.target_groups.values().map(|group| &group.attributes);
    let draining = attributes().any(|it| !it.unhealthy_draining.is_zero());
    let starting = attributes().any(|it| !it.slow_start.is_zero());
    image.targets.values().any(|target| match target.state {
        DRAINING => true,
        UNHEALTHY => draining,
        HEALTHY => starting,
        _ => false,
    })
}

/// The address that a target is checked from: of its zone, or of any where the load balancer is not in it; secondary addresses take
/// turns with the first.
fn source(balancer: &LoadBalancer, target: &crate::model::Target, id: u32) -> Option<IpAddr> {
    let zones = &balancer.addresses;
    let (zone, _) = zones.get_key_value(&target.zone).or_else(|| zones.iter().next())?;
    let addresses = balancer.of(zone, Family::of(target.address));
    addresses.get(id as usize % addresses.len().max(1)).copied()
}

/// The health checks that the configuration asks for, by target. A group that no listener uses is not checked (AWS: `unused`).
pub fn checks(model: &Model, names: &Names) -> BTreeMap<u32, Check> {
    let mut checks = BTreeMap::new();
    for (name, group) in model.target_groups.iter().filter(|(_, group)| group.health_check.enabled) {
        let uses = |balancer: &&LoadBalancer| balancer.listeners.iter().any(|it| it.target_group == *name);
        let Some(balancer) = model.load_balancers.values().find(uses) else { continue };
        for target in &group.targets {
            let Some(id) = names.id(Kind::Target, &target_name(name, target)) else { continue };
            let Some(source) = source(balancer, target, id) else { continue };
            let (vpc, how) = (group.vpc.clone(), group.health_check.clone());
            let port = how.port.unwrap_or(target.port);
            let proxied = group.attributes.proxied;
            checks.insert(id, Check { vpc, source, address: target.address, port, how, proxied });
        }
    }
    checks
}
