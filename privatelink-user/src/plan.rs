//! What the maps should contain: a pure function of the configuration, the numbers that names have, and measured health.

use crate::maps::PrefixKey;
use crate::model::{Listener, LoadBalancer, Model, TargetGroup};
use crate::names::{Kind, Names};
use anyhow::{Context, Result};
use privatelink_common::limits::UDP_IDLE;
use privatelink_common::plan::maglev::{Share, fill, size};
use privatelink_common::tables::{
    Address, BALANCER, Balancer, ENDPOINT, HEALTHY, INITIAL, ListenerKey, NameKey, Prefix, Target, UNCHECKED,
    VpcAddress,
};
use privatelink_common::tables::{Listener as ListenerEntry, Name};
use privatelink_common::wire::{Mac, UDP};
use siphasher::sip::SipHasher13;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::Hasher;
use std::net::Ipv4Addr;
use zerocopy::big_endian::{U16, U32};

/// The wanted contents of every map that the configuration decides.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "named as the maps are; described in privatelink_common::tables")]
pub struct Image {
    pub interfaces: BTreeMap<String, Place>,
    pub prefixes: BTreeMap<PrefixKey, u32>,
    pub addresses: BTreeMap<VpcAddress, Address>,
    /// Whether each endpoint is open.
    pub endpoints: BTreeMap<u32, bool>,
    pub balancers: BTreeMap<u32, Balancer>,
    pub listeners: BTreeMap<ListenerKey, ListenerEntry>,
    pub tables: BTreeMap<u32, Vec<u32>>,
    pub targets: BTreeMap<u32, Target>,
    pub names: BTreeMap<NameKey, Name>,
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

/// What the agent checks about a target, and from where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// The VPC's name.
    pub vpc: String,
    /// The load balancer's address that the check comes from.
    pub source: Ipv4Addr,
    /// Where it goes.
    pub address: Ipv4Addr,
    /// Its port.
    pub port: u16,
    /// How.
    pub how: crate::model::HealthCheck,
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
pub fn mac(vpc: &str, address: Ipv4Addr) -> Mac {
    let [a, b, c, d, e, ..] = hash(&[b"mac", vpc.as_bytes(), &address.octets()]).to_be_bytes();
    [0x02, a, b, c, d, e]
}

/// A target's name.
pub fn target_name(group: &str, target: &crate::model::Target) -> String {
    format!("{group}/{}:{}", target.address, target.port)
}

/// The name of the slot that leads to a VPC's stack.
pub fn stack_name(vpc: &str) -> String {
    format!("stack/{vpc}")
}

/// Computes the image. `names` gains numbers for what is new; `health` holds the measured states by target.
pub fn compile(
    model: &Model,
    names: &mut Names,
    health: &BTreeMap<u32, u16>,
    stack_link: impl Fn(&str) -> String,
) -> Result<Image> {
    let mut plan = Plan { model, names, used: BTreeSet::new(), image: Image::default(), health };
    plan.vpcs(stack_link)?;
    plan.targets()?;
    plan.balancers()?;
    plan.endpoints()?;
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
    image: Image,
    health: &'a BTreeMap<u32, u16>,
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
                let prefix = Prefix { vpc: U32::new(id.into()), address: cidr.network().octets() };
                let bits = 32 + u32::from(cidr.prefix_len());
                self.image.prefixes.insert(PrefixKey { bits, prefix }, 1);
            }
            for interface in &vpc.interfaces {
                let slot = self.small(Kind::Interface, interface)?;
                self.image.interfaces.insert(interface.clone(), Place { vpc: id, slot, stack: false });
            }
            if self.model.load_balancers.values().any(|balancer| balancer.vpc == *name) {
                let slot = self.small(Kind::Interface, &stack_name(name))?;
                self.image.interfaces.insert(stack_link(name), Place { vpc: id, slot, stack: true });
            }
        }
        Ok(())
    }

    fn targets(&mut self) -> Result<()> {
        for (name, group) in &self.model.target_groups {
            let vpc = self.small(Kind::Vpc, &group.vpc)?;
            for target in &group.targets {
                let id = self.id(Kind::Target, &target_name(name, target))?;
                let state = if group.health_check.enabled {
                    self.health.get(&id).copied().filter(|state| *state != UNCHECKED).unwrap_or(INITIAL)
                } else {
                    UNCHECKED
                };
                let (address, port) = (target.address.octets(), U16::new(target.port));
                self.image.targets.insert(id, Target { address, port, vpc, state, reserved: 0 });
            }
        }
        Ok(())
    }

    fn balancers(&mut self) -> Result<()> {
        for (name, balancer) in &self.model.load_balancers {
            let vpc = self.small(Kind::Vpc, &balancer.vpc)?;
            let stack = self.small(Kind::Interface, &stack_name(&balancer.vpc))?;
            for (zone, address) in &balancer.addresses {
                let id = self.id(Kind::Balancer, &format!("{name}/{zone}"))?;
                let mac = mac(&balancer.vpc, *address);
                self.image.balancers.insert(id, Balancer { address: address.octets(), vpc, mac });
                let entry =
                    Address { endpoint: 0, balancer: id, stack, mac, kind: BALANCER, ping: 0, reserved: 0 };
                self.image.addresses.insert(VpcAddress::new(vpc, address.octets()), entry);
                for listener in &balancer.listeners {
                    self.listener(id, zone, balancer, listener)?;
                }
            }
        }
        Ok(())
    }

    fn listener(&mut self, balancer: u32, zone: &str, of: &LoadBalancer, listener: &Listener) -> Result<()> {
        let zone = if of.cross_zone { "*" } else { zone };
        let (table, slots) = self.table(&listener.target_group, zone)?;
        for &protocol in listener.protocol.numbers() {
            let key = ListenerKey { balancer, port: U16::new(listener.port), protocol, reserved: 0 };
            let tcp_idle = u16::try_from(listener.tcp_idle_timeout.as_secs())?;
            let idle_timeout = if protocol == UDP { UDP_IDLE } else { tcp_idle };
            self.image.listeners.insert(key, ListenerEntry { table, slots, idle_timeout, reserved: 0 });
        }
        Ok(())
    }

    /// The Maglev table of a group's targets in a zone, and its size; 0 where there is no target.
    fn table(&mut self, name: &str, zone: &str) -> Result<(u32, u32)> {
        let group =
            self.model.target_groups.get(name).context("a target group that the model does not have")?;
        let mut shares = self.shares(name, group, zone)?;
        let slots = size(shares.iter().map(|share| u64::from(share.weight)).sum());
        if shares.is_empty() {
            return Ok((0, 0));
        }
        // The size is part of the name, so that a table never changes its size under a listener that counts on it.
        let id = self.id(Kind::Table, &format!("{name}/{zone}/{slots}"))?;
        self.image.tables.entry(id).or_insert_with(|| {
            let mut table = vec![0; slots as usize];
            fill(&mut table, &mut shares, u32::MAX);
            table
        });
        Ok((id, slots))
    }

    /// The targets that get new flows: the healthy ones, or all of them where none is healthy (AWS: fail-open).
    fn shares(&mut self, name: &str, group: &TargetGroup, zone: &str) -> Result<Vec<Share>> {
        let (mut healthy, mut all) = (Vec::new(), Vec::new());
        for target in group.targets.iter().filter(|target| zone == "*" || target.zone == zone) {
            let id = self.id(Kind::Target, &target_name(name, target))?;
            let seed = hash(&[b"maglev", &target.address.octets(), &target.port.to_be_bytes()]);
            let share = Share::new(id, seed, target.weight.into());
            all.push(share);
            if self.image.targets.get(&id).is_some_and(|it| it.state == HEALTHY || it.state == UNCHECKED) {
                healthy.push(share);
            }
        }
        Ok(if healthy.is_empty() { all } else { healthy })
    }

    fn endpoints(&mut self) -> Result<()> {
        for (name, endpoint) in &self.model.endpoints {
            let vpc = self.small(Kind::Vpc, &endpoint.vpc)?;
            let service = self
                .model
                .services
                .get(&endpoint.service)
                .context("a service that the model does not have")?;
            let account =
                self.model.vpcs.get(&endpoint.vpc).map(|vpc| vpc.account.as_str()).unwrap_or_default();
            for (zone, address) in &endpoint.addresses {
                let full = format!("{name}/{zone}");
                let id = self.id(Kind::Endpoint, &full)?;
                let in_zone = |it: &&String| {
                    self.model
                        .load_balancers
                        .get(*it)
                        .is_some_and(|balancer| balancer.addresses.contains_key(zone))
                };
                let balancers: Vec<_> = service.load_balancers.iter().filter(in_zone).cloned().collect();
                // One load balancer for each of an endpoint's addresses, the same one for good (AWS: create-endpoint-service).
                let chosen = hash(&[b"balancer", full.as_bytes()]) % balancers.len().max(1) as u64;
                let balancer = balancers
                    .get(usize::try_from(chosen)?)
                    .context("a zone that the service does not have")?;
                let balancer = self.id(Kind::Balancer, &format!("{balancer}/{zone}"))?;
                let (mac, ping) = (mac(&endpoint.vpc, *address), endpoint.ping.into());
                let entry =
                    Address { endpoint: id, balancer, stack: 0, mac, kind: ENDPOINT, ping, reserved: 0 };
                self.image.addresses.insert(VpcAddress::new(vpc, address.octets()), entry);
                self.image.endpoints.insert(id, service.admits(account));
            }
        }
        Ok(())
    }
}

/// The health checks that the configuration asks for, by target. A group that no listener uses is not checked (AWS: `unused`).
pub fn checks(model: &Model, names: &Names) -> BTreeMap<u32, Check> {
    let mut checks = BTreeMap::new();
    for (name, group) in model.target_groups.iter().filter(|(_, group)| group.health_check.enabled) {
        let uses = |balancer: &&LoadBalancer| balancer.listeners.iter().any(|it| it.target_group == *name);
        let Some(balancer) = model.load_balancers.values().find(uses) else { continue };
        for target in &group.targets {
            let source = balancer.addresses.get(&target.zone).or_else(|| balancer.addresses.values().next());
            let (Some(&source), Some(id)) = (source, names.id(Kind::Target, &target_name(name, target)))
            else {
                continue;
            };
            let (vpc, how) = (group.vpc.clone(), group.health_check.clone());
            let port = how.port.unwrap_or(target.port);
            checks.insert(id, Check { vpc, source, address: target.address, port, how });
        }
    }
    checks
}
