//! Makes the maps agree with an image: the differences, in an order in which no packet meets a reference to nothing.
//!
//! What is new goes in from the far end (targets, tables, balancers, listeners, endpoints, addresses), so that whatever a packet
//! finds leads somewhere; what is old goes out the other way.

use crate::maps::{Map, Maps, Plain};
use crate::plan::{Gate, Image};
use crate::sys;
use anyhow::Result;
use privatelink_common::tables::{Address, Bucket, Endpoint, EndpointCounters, Pressure};
use std::collections::BTreeMap;
use std::fmt::Debug;

/// Reads what the kernel has of an image. Interfaces are not part of it: the kernel's own list of links is; nor are VLANs, which come and go with them.
pub fn actual(maps: &Maps) -> Result<Image> {
    let open = maps.endpoints.filled()?.into_iter().filter(|(_, endpoint)| endpoint.open != 0);
    let mut image = Image {
        interfaces: BTreeMap::new(),
        vlans: BTreeMap::new(),
        hooks: BTreeMap::new(),
        prefixes: maps.prefixes.entries()?.into_iter().collect(),
        rules_by_address: maps.rules_by_address.entries()?.into_iter().collect(),
        rules_by_port: maps.rules_by_port.entries()?.into_iter().collect(),
        subnets: maps.subnets.entries()?.into_iter().collect(),
        rules: BTreeMap::new(),
        addresses: maps.addresses.entries()?.into_iter().collect(),
        endpoints: open.map(|(id, it)| (id, gate(&it))).collect(),
        balancers: maps.balancers.filled()?,
        listeners: maps.listeners.entries()?.into_iter().collect(),
        tables: BTreeMap::new(),
        targets: maps.targets.filled()?,
        vpc_endpoint_ids: maps.vpc_endpoint_ids.filled()?,
        names: maps.names.entries()?.into_iter().collect(),
        name_servers: BTreeMap::new(),
    };
    for index in 0..maps.tables.info()?.max_entries {
        if let Some(table) = maps.tables.get(index)? {
            image.tables.insert(index, table.read()?);
        }
    }
    Ok(image)
}

fn gate(endpoint: &Endpoint) -> Gate {
    let Endpoint { rate, burst, hold, mtu, cookies, rules, .. } = *endpoint;
    let (open, full) = (endpoint.open != 0, endpoint.full != 0);
    let (errors, acls) = (endpoint.errors != 0, endpoint.acls != 0);
    Gate { open, full, rate, burst, hold, mtu, errors, cookies, rules, acls }
}

/// Writes the difference between `from`, which the kernel has, and `to`. Returns how many entries changed.
pub fn apply(maps: &Maps, from: &Image, to: &Image) -> Result<usize> {
    let mut changes = 0;
    changes += put(&maps.names, &from.names, &to.names)?;
    changes += put(&maps.prefixes, &from.prefixes, &to.prefixes)?;
    changes += put(&maps.rules_by_address, &from.rules_by_address, &to.rules_by_address)?;
    changes += put(&maps.rules_by_port, &from.rules_by_port, &to.rules_by_port)?;
    changes += put(&maps.subnets, &from.subnets, &to.subnets)?;
    changes += put(&maps.targets, &from.targets, &to.targets)?;
    let swapped = to.tables.iter().filter(|(id, table)| from.tables.get(id) != Some(table));
    let swapped: Vec<_> = swapped.map(|(id, table)| (*id, table.clone())).collect();
    maps.tables.set(&swapped)?;
    changes += swapped.len();
    changes += put(&maps.balancers, &from.balancers, &to.balancers)?;
    changes += put(&maps.vpc_endpoint_ids, &from.vpc_endpoint_ids, &to.vpc_endpoint_ids)?;
    changes += put(&maps.listeners, &from.listeners, &to.listeners)?;
    changes += endpoints(maps, from, to)?;
    changes += put(&maps.addresses, &from.addresses, &to.addresses)?;

    changes += drop_old(&from.addresses, &to.addresses, |key| maps.addresses.delete(key))?;
    changes += drop_old(&from.listeners, &to.listeners, |key| maps.listeners.delete(key))?;
    changes += drop_old(&from.balancers, &to.balancers, |key| maps.balancers.set(key, &Default::default()))?;
    changes += drop_old(&from.tables, &to.tables, |key| maps.tables.delete(*key))?;
    changes += drop_old(&from.vpc_endpoint_ids, &to.vpc_endpoint_ids, |key| {
        maps.vpc_endpoint_ids.set(key, &Default::default())
    })?;
    changes += drop_old(&from.targets, &to.targets, |key| maps.targets.set(key, &Default::default()))?;
    changes += drop_old(&from.subnets, &to.subnets, |key| maps.subnets.delete(key))?;
    changes += old_rules(maps, from, to)?;
    changes += drop_old(&from.prefixes, &to.prefixes, |key| maps.prefixes.delete(key))?;
    changes += drop_old(&from.names, &to.names, |key| maps.names.delete(key))?;
    Ok(changes)
}

/// Takes sets of rules out that nothing refers to any more, when no program runs that has read a reference to one.
fn old_rules(maps: &Maps, from: &Image, to: &Image) -> Result<usize> {
    if from.rules_by_address.keys().all(|key| to.rules_by_address.contains_key(key))
        && from.rules_by_port.keys().all(|key| to.rules_by_port.contains_key(key))
    {
        return Ok(0);
    }
    sys::wait_for_programs();
    let changes =
        drop_old(&from.rules_by_address, &to.rules_by_address, |key| maps.rules_by_address.delete(key))?;
    Ok(changes + drop_old(&from.rules_by_port, &to.rules_by_port, |key| maps.rules_by_port.delete(key))?)
}

fn put<K: Plain + Ord + Debug, V: Plain + PartialEq>(
    map: &Map<K, V>,
    from: &BTreeMap<K, V>,
    to: &BTreeMap<K, V>,
) -> Result<usize> {
    let mut changes = 0;
    for (key, value) in to.iter().filter(|(key, value)| from.get(key) != Some(value)) {
        map.set(key, value)?;
        changes += 1;
    }
    Ok(changes)
}

fn drop_old<K: Ord, V>(
    from: &BTreeMap<K, V>,
    to: &BTreeMap<K, V>,
    mut drop: impl FnMut(&K) -> Result<()>,
) -> Result<usize> {
    let mut changes = 0;
    for key in from.keys().filter(|key| !to.contains_key(key)) {
        drop(key)?;
        changes += 1;
    }
    Ok(changes)
}

/// Opens and closes endpoints. Whatever ends an endpoint's flows (it closes, it is another's now, it leads elsewhere) moves its
/// generation on, and every flow is judged anew by its next packet.
fn endpoints(maps: &Maps, from: &Image, to: &Image) -> Result<usize> {
    let balancer = |image: &Image| -> BTreeMap<u32, Address> {
        image.addresses.values().filter(|it| it.endpoint != 0).map(|it| (it.endpoint, *it)).collect()
    };
    let (before, after) = (balancer(from), balancer(to));
    let mut changes = 0;
    for id in
        from.endpoints.keys().chain(to.endpoints.keys()).copied().collect::<std::collections::BTreeSet<_>>()
    {
        let (was, is) = (from.endpoints.get(&id), to.endpoints.get(&id).copied().unwrap_or_default());
        let moved = match (before.get(&id), after.get(&id)) {
            (Some(before), Some(after)) => before.balancer != after.balancer,
            _ => false,
        };
        let judged_anew = was.is_some_and(|was| was.open) != is.open || moved;
        if !judged_anew && was.copied().unwrap_or_default() == is {
            continue;
        }
        let generation = maps.endpoints.get(&id)?.unwrap_or_default().generation;
        let generation = if judged_anew { generation.wrapping_add(1).max(1) } else { generation };
        if was.is_none() {
            maps.counters.set_all(id, &EndpointCounters::default())?;
            maps.buckets.set(&id, &Bucket::default())?;
            maps.pressures.set(&id, &Pressure::default())?;
        }
        let Gate { rate, burst, hold, mtu, cookies, rules, .. } = is;
        let (open, full) = (is.open.into(), is.full.into());
        let (errors, acls) = (is.errors.into(), is.acls.into());
        let entry = Endpoint { generation, mtu, open, full, rate, burst, hold, errors, acls, rules, cookies };
        maps.endpoints.set(&id, &entry)?;
        changes += 1;
    }
    Ok(changes)
}
