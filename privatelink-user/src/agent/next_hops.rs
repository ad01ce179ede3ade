//! Where targets and name servers are reached: asked by ARP and neighbour solicitations, kept fresh, and followed when they move.

use super::Agent;
use super::vlans::key;
use crate::ip;
use crate::names::Kind;
use crate::neighbours::Heard;
use crate::plan::{Image, NextHop, Place};
use anyhow::Result;
use privatelink_common::tables::{Balancer, Neighbour, VlanKey, VpcAddress};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// How long a neighbour is believed before it is asked again.
const FRESH: Duration = Duration::from_secs(5);

impl Agent {
    /// Whom the path is to reach, and who asks for whose link-layer address so that it can: targets by a load balancer, name servers by
    /// their VPC's resolver; or for a gateway's instead.
    fn wanted_neighbours(&self) -> BTreeMap<VpcAddress, NextHop> {
        let targets = self.image.targets.values();
        let asker = |vpc, ipv4| {
            let mut balancers = self.image.balancers.values();
            balancers.find(|it| it.vpc == vpc && it.address.is_ipv4() == ipv4).map(Balancer::face)
        };
        let targets = targets.filter_map(|it| {
            let vpc = self.names.name(Kind::Vpc, it.vpc.into());
            let gateway = self.model.gateway(&vpc, ip::shown(it.address)).map(ip::entry);
            let asker = asker(it.vpc, it.address.is_ipv4())?;
            let address = gateway.unwrap_or(it.address);
            Some((VpcAddress::new(it.vpc, it.address), NextHop { address, asker }))
        });
        let name_servers = self.image.name_servers.iter().map(|(key, hop)| (*key, *hop));
        name_servers.chain(targets).collect()
    }

    pub(super) fn ask_neighbours(&mut self) {
        let now = Instant::now();
        for (wanted, NextHop { address, asker }) in self.wanted_neighbours() {
            let fresh = self.confirmed.get(&wanted).is_some_and(|at| now.duration_since(*at) < FRESH);
            let asked =
                self.asked.get(&wanted).is_some_and(|at| now.duration_since(*at) < Duration::from_secs(1));
            if fresh || asked {
                continue;
            }
            self.asked.insert(wanted, now);
            for by in self.ways_into(wanted.vpc) {
                // An interface that is down or just going cannot be asked; the next tick tries again.
                let _ = self.neighbours.ask(by, asker.address, asker.mac, address);
            }
        }
    }

    /// The interfaces of a VPC that are there.
    fn ways_into(&self, vpc: u16) -> Vec<VlanKey> {
        let places = self.image.interfaces.iter().filter(|(_, place)| place.vpc == vpc && !place.stack);
        let devices = places.filter_map(|(name, _)| {
            let ifindex = self.links.get(name)?.ifindex;
            Some(VlanKey { ifindex, service_vlan: 0, vlan: 0 })
        });
        let vlans = self.image.vlans.values().filter(|vlan| vlan.place.vpc == vpc);
        let vlans = vlans.filter_map(|vlan| Some(key(vlan, self.links.get(&vlan.tags.trunk)?.ifindex)));
        devices.chain(vlans).collect()
    }

    /// Where whoever sends by this is, if that is an interface of a VPC's.
    fn place_of(&self, by: VlanKey) -> Option<Place> {
        let (name, _) = self.links.iter().find(|(_, attached)| attached.ifindex == by.ifindex)?;
        let place = if (by.service_vlan, by.vlan) == (0, 0) {
            *self.image.interfaces.get(name)?
        } else {
            self.image.vlans_of(name).find(|vlan| key(vlan, by.ifindex) == by)?.place
        };
        (!place.stack).then_some(place)
    }

    pub(super) fn hear(&mut self, heard: Heard) -> Result<()> {
        let Some(place) = self.place_of(heard.by) else { return Ok(()) };
        let neighbour = Neighbour { mac: heard.mac, interface: place.slot };
        let wanted = self.wanted_neighbours().into_iter();
        let behind = wanted.filter(|(key, hop)| key.vpc == place.vpc && hop.address == heard.address);
        for (key, _) in behind {
            if self.maps.neighbours.get(&key)? != Some(neighbour) {
                self.maps.neighbours.set(&key, &neighbour)?;
            }
            self.confirmed.insert(key, Instant::now());
        }
        Ok(())
    }

    pub(super) fn forget_neighbours(&mut self, image: &Image) -> Result<()> {
        let targets = image.targets.values().map(|it| VpcAddress::new(it.vpc, it.address));
        let wanted: BTreeSet<_> = targets.chain(image.name_servers.keys().copied()).collect();
        for key in self.maps.neighbours.keys()?.into_iter().filter(|key| !wanted.contains(key)) {
            self.maps.neighbours.delete(&key)?;
        }
        self.confirmed.retain(|key, _| wanted.contains(key));
        self.asked.retain(|key, _| wanted.contains(key));
        Ok(())
    }
}
