//! Interfaces that are tags on a trunk: the path is told of them as their trunks come and go, and forgets them with these.

use super::Agent;
use super::links::Attached;
use crate::neighbours::tags;
use crate::net::Namespaces;
use crate::plan::{Image, Vlan};
use anyhow::Result;
use privatelink_common::tables::{Interface, Mtu, Tag, Trunk, VlanKey};
use std::collections::{BTreeMap, BTreeSet};

/// What the path is told of an interface that is tags on a trunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Told {
    key: VlanKey,
    entry: Interface,
    trunk: Trunk,
    mtu: Mtu,
}

/// The largest IP packet that fits on a VLAN, in bytes: a device's MTU does not count the first tag.
pub(super) fn carried(vlan: &Vlan, mtu: Mtu) -> Mtu {
    let second = if vlan.tags.service_vlan.is_some() { 4 } else { 0 };
    mtu.saturating_sub(second)
}

/// The tags of a VLAN as a frame that comes by the interface `ifindex` has them.
pub(super) fn key(vlan: &Vlan, ifindex: u32) -> VlanKey {
    VlanKey { ifindex, service_vlan: vlan.tags.service_vlan.unwrap_or(0), vlan: vlan.tags.vlan }
}

impl Agent {
    /// Whether an interface has VLANs of ours.
    pub(super) fn is_trunk(&self, name: &str) -> bool {
        self.image.vlans_of(name).next().is_some()
    }

    /// The index in `interfaces` of the interface with this slot, if it is tags on a trunk: behind those that are devices.
    fn index(&self, slot: u16) -> u32 {
        self.model.limits.max_ifindex + u32::from(slot)
    }

    /// Looks again at interfaces that have become trunks, or are none any more, and tells the path of those that are another VPC's by
    /// now, or nobody's.
    pub(super) fn follow_trunks(&mut self) -> Result<()> {
        let changed = |(name, attached): (&String, &Attached)| attached.trunk != self.is_trunk(name);
        if self.links.iter().any(changed) {
            let namespaces = Namespaces::read()?;
            let trunks: BTreeSet<_> = self.image.vlans.values().map(|vlan| vlan.tags.trunk.clone()).collect();
            for (name, attached) in &mut self.links {
                if attached.trunk != trunks.contains(name) {
                    attached.trunk = !attached.trunk;
                    attached.look(name, &namespaces);
                }
            }
        }
        let moved = |(name, attached): (&String, &Attached)| {
            attached.place.is_some() && attached.place.as_ref() != self.image.interfaces.get(name)
        };
        let moved: Vec<_> = self.links.iter().filter(|it| moved(*it)).map(|(name, _)| name.clone()).collect();
        moved.iter().try_for_each(|name| self.prepare(name))
    }

    /// Makes the path forget the VLANs that the image does not have, or has elsewhere. Returns the slots of the latter.
    pub(super) fn leave_vlans(&mut self, image: &Image) -> Result<Vec<u16>> {
        let mut stays = BTreeSet::new();
        let mut moved = Vec::new();
        for (name, vlan) in &image.vlans {
            if self.image.vlans.get(name).is_none_or(|was| was == vlan) {
                stays.insert(self.index(vlan.place.slot));
            } else {
                moved.push(vlan.place.slot);
            }
        }
        for (key, index) in self.maps.vlans.entries()? {
            if !stays.contains(&index) {
                self.maps.vlans.delete(&key)?;
                self.maps.interfaces.set(&index, &Interface::default())?;
            }
        }
        self.vlans.retain(|slot, _| stays.contains(&(self.model.limits.max_ifindex + u32::from(*slot))));
        Ok(moved)
    }

    /// Tells the path of the VLANs whose trunks are there, and makes it forget those whose trunks are gone.
    pub(super) fn follow_vlans(&mut self) -> Result<()> {
        let wanted = self.wanted_vlans();
        let (index, maps) = (|slot| self.index(slot), &self.maps);
        for (slot, told) in &self.vlans {
            let wanted = wanted.get(slot);
            if wanted.is_none_or(|wanted| wanted.key != told.key) {
                maps.vlans.delete(&told.key)?;
            }
            if wanted.is_none() {
                maps.interfaces.set(&index(*slot), &Interface::default())?;
                maps.trunks.set(&(*slot).into(), &Trunk::default())?;
            }
        }
        for (slot, wanted) in wanted.iter().filter(|(slot, wanted)| self.vlans.get(slot) != Some(wanted)) {
            maps.mtus.set(&(*slot).into(), &wanted.mtu)?;
            maps.interfaces.set(&index(*slot), &wanted.entry)?;
            maps.trunks.set(&(*slot).into(), &wanted.trunk)?;
            maps.vlans.set(&wanted.key, &index(*slot))?;
        }
        self.vlans = wanted;
        Ok(())
    }

    fn wanted_vlans(&self) -> BTreeMap<u16, Told> {
        let told = |vlan: &Vlan| {
            let attached = self.links.get(&vlan.tags.trunk)?;
            let trunk = self.image.interfaces.get(&vlan.tags.trunk)?;
            let key = key(vlan, attached.ifindex);
            let tags: Vec<Tag> = tags(key.service_vlan, key.vlan);
            let [outer, inner] = [0, 1].map(|it| tags.get(it).copied().unwrap_or_default());
            let trunk = Trunk { ifindex: attached.ifindex, slot: trunk.slot, reserved: 0, outer, inner };
            let (entry, mtu) = (self.entry(vlan.place), carried(vlan, attached.mtu));
            Some((vlan.place.slot, Told { key, entry, trunk, mtu }))
        };
        self.image.vlans.values().filter_map(told).collect()
    }
}
