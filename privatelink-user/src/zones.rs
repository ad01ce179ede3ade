//! Which zones are fit for traffic. One whose listener has no healthy target still serves those who ask for its address (fail-open);
//! AWS withdraws it from the endpoint's names (target-group-health-checks).

use crate::model::{self, Model, TargetGroup};
use crate::names::{Kind, Names};
use crate::plan::{Image, target_name};
use privatelink_common::tables::{HEALTHY, ListenerKey, UNCHECKED};
use privatelink_common::wire::UDP;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// Why a listener is not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It has no target in the zone.
    Empty,
    /// None of its targets is healthy.
    Unhealthy,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Empty => "has no target",
            Self::Unhealthy => "has no healthy target, so that all of them get new flows",
        })
    }
}

/// What is wrong, by the load balancer's address. Health that is not measured is not missed.
pub fn faults(image: &Image) -> BTreeMap<u32, Vec<(ListenerKey, Fault)>> {
    let fit = |id: &u32| image.targets.get(id).is_some_and(|it| [HEALTHY, UNCHECKED].contains(&it.state));
    let tables: BTreeMap<u32, bool> =
        image.tables.iter().map(|(id, slots)| (*id, slots.iter().any(fit))).collect();
    let mut faults = BTreeMap::<u32, Vec<_>>::new();
    for (key, listener) in &image.listeners {
        let fault = match (listener.slots, tables.get(&listener.table)) {
            (0, _) | (_, None) => Fault::Empty,
            (_, Some(false)) => Fault::Unhealthy,
            (_, Some(true)) => continue,
        };
        faults.entry(key.balancer).or_default().push((*key, fault));
    }
    faults
}

/// Zones that names do not lead to, by the load balancer's address: those where one of the listeners' groups has too few healthy targets
/// (AWS: target-group-health, `dns_failover`).
pub fn withdrawn(model: &Model, image: &Image, names: &Names) -> BTreeSet<u32> {
    let mut withdrawn = BTreeSet::new();
    for (name, balancer) in &model.load_balancers {
        for zone in balancer.addresses.keys() {
            let Some(id) = names.id(Kind::Balancer, &format!("{name}/{zone}")) else { continue };
            let has_too_few = |listener: &model::Listener| {
                let group = model.target_groups.get(&listener.target_group);
                group.is_none_or(|group| {
                    let zone = (!group.attributes.cross_zone.unwrap_or(balancer.cross_zone))
                        .then_some(zone.as_str());
                    let (healthy, all) = healthy(&listener.target_group, group, zone, image, names);
                    !group.attributes.dns_failover.are_enough(healthy, all)
                })
            };
            if balancer.listeners.iter().any(has_too_few) {
                withdrawn.insert(id);
            }
        }
    }
    withdrawn
}

/// How many targets of a group, or of one of its zones, are healthy, and how many there are.
fn healthy(
    name: &str,
    group: &TargetGroup,
    zone: Option<&str>,
    image: &Image,
    names: &Names,
) -> (usize, usize) {
    let is_fit = |target: &&model::Target| {
        let id = names.id(Kind::Target, &target_name(name, target));
        id.and_then(|id| image.targets.get(&id)).is_some_and(|it| [HEALTHY, UNCHECKED].contains(&it.state))
    };
    let targets = || group.targets.iter().filter(|target| zone.is_none_or(|zone| target.zone == zone));
    (targets().filter(is_fit).count(), targets().count())
}

/// A listener as people write it: `tcp/443`.
pub fn listener(key: &ListenerKey) -> String {
    format!("{}/{}", if key.protocol == UDP { "udp" } else { "tcp" }, key.port)
}
