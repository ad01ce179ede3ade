//! Where targets and name servers are reached: asked by ARP and neighbour solicitations, kept fresh, and followed when they move.

use super::Agent;
use crate::ip;
use crate::names::Kind;
use crate::neighbours::Heard;
use crate::plan::{Image, NextHop};
use anyhow::Result;
use privatelink_common::tables::{Balancer, Neighbour, VpcAddress};
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
            for (name, place) in &self.image.interfaces {
                let Some(attached) = self.links.get(name).filter(|_| place.vpc == wanted.vpc && !place.stack)
                else {
                    continue;
                };
                // An interface that is down or just going cannot be asked; the next tick tries again.
                let _ = self.neighbours.ask(attached.ifindex, asker.address, asker.mac, address);
            }
        }
    }

    pub(super) fn hear(&mut self, heard: Heard) -> Result<()> {
        let by = self.links.iter().find(|(_, attached)| attached.ifindex == heard.ifindex);
        let Some(place) =
            by.and_then(|(name, _)| self.image.interfaces.get(name)).filter(|place| !place.stack)
        else {
            return Ok(());
        };
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
