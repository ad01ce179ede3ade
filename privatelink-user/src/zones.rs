//! Which zones are fit for traffic. One whose listener has no healthy target still serves those who ask for its address (fail-open);
//! AWS withdraws it from the endpoint's names (target-group-health-checks).

use crate::plan::Image;
use privatelink_common::tables::{HEALTHY, ListenerKey, UNCHECKED};
use privatelink_common::wire::UDP;
use std::collections::BTreeMap;
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

/// A listener as people write it: `tcp/443`.
pub fn listener(key: &ListenerKey) -> String {
    format!("{}/{}", if key.protocol == UDP { "udp" } else { "tcp" }, key.port)
}
