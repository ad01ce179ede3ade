//! Other sizes for the tables, without losing what is in them: the next agent makes new maps beside the old ones, carries over what
//! matters, puts its program in the old one's place, and carries over what has come meanwhile.
//!
//! What the configuration decides is not carried: the agent writes it anyway.

use crate::flows;
use crate::maps::{CHUNK, Map, Maps, PerCpu, Plain};
use anyhow::{Result, ensure};
use privatelink_common::tables::{Key, Stream};

/// Carries everything over. Returns when it began, in seconds since boot, for [`catch_up`].
pub fn carry(from: &Maps, to: &Maps) -> Result<u32> {
    let began = flows::now();
    hash("names", "addresses", &from.names, &to.names)?;
    hash("addresses", "addresses", &from.addresses, &to.addresses)?;
    hash("neighbours", "addresses", &from.neighbours, &to.neighbours)?;
    array("targets", "targets", &from.targets, &to.targets)?;
    array("endpoints", "endpoints", &from.endpoints, &to.endpoints)?;
    counters(&from.counters, &to.counters)?;
    counters(&from.target_counters, &to.target_counters)?;
    counters(&from.outcomes, &to.outcomes)?;
    room("established", "flows", from.established.count()?, &to.established)?;
    room("pending", "pending_flows", from.pending.count()?, &to.pending)?;
    room("established6", "ipv6_flows", from.established6.count()?, &to.established6)?;
    room("pending6", "pending_ipv6_flows", from.pending6.count()?, &to.pending6)?;
    room("streams", "flows", from.streams.count()?, &to.streams)?;
    room("streams6", "ipv6_flows", from.streams6.count()?, &to.streams6)?;
    copy(&from.streams, &to.streams)?;
    copy(&from.streams6, &to.streams6)?;
    copy(&from.established, &to.established)?;
    copy(&from.pending, &to.pending)?;
    copy(&from.established6, &to.established6)?;
    copy(&from.pending6, &to.pending6)?;
    catch_up(from, to, began)?;
    Ok(began)
}

/// Carries over the flows that were established since `began`.
pub fn catch_up(from: &Maps, to: &Maps, began: u32) -> Result<()> {
    streams(&from.streams, &to.streams, &recent(&from.established, &to.established, began)?)?;
    streams(&from.streams6, &to.streams6, &recent(&from.established6, &to.established6, began)?)
}

fn streams<K: Plain>(from: &Map<K, Stream>, to: &Map<K, Stream>, keys: &[K]) -> Result<()> {
    for key in keys {
        if let Some(stream) = from.get(key)? {
            to.set(key, &stream)?;
        }
    }
    Ok(())
}

/// Carries over those of one table; returns their keys. One that is there already is as good, or better.
fn recent<K: Key<Flow: Plain> + Plain>(
    from: &Map<K, K::Flow>,
    to: &Map<K, K::Flow>,
    began: u32,
) -> Result<Vec<K>> {
    let mut recent: Vec<(K, K::Flow)> = Vec::new();
    from.walk(CHUNK, |keys, values| {
        let since = keys.iter().zip(values).filter(|(_, flow)| flow.last_seen.saturating_add(1) >= began);
        recent.extend(since.map(|(key, flow)| (*key, *flow)));
    })?;
    recent.retain(|(key, flow)| to.insert(key, flow).is_ok());
    Ok(recent.into_iter().map(|(key, _)| key).collect())
}

fn room<K: Plain, V: Plain>(name: &str, limit: &str, used: usize, to: &Map<K, V>) -> Result<()> {
    let size = to.info()?.max_entries;
    ensure!(
        used <= size as usize,
        "the table {name} has {used} entries; limits.{limit} makes room for {size}: raise it"
    );
    Ok(())
}

fn copy<K: Plain, V: Plain>(from: &Map<K, V>, to: &Map<K, V>) -> Result<()> {
    let mut result = Ok(());
    from.walk(CHUNK, |keys, values| {
        if result.is_ok() && !keys.is_empty() {
            result = to.fill(keys, values);
        }
    })?;
    result
}

fn hash<K: Plain, V: Plain>(name: &str, limit: &str, from: &Map<K, V>, to: &Map<K, V>) -> Result<()> {
    let entries = from.entries()?;
    room(name, limit, entries.len(), to)?;
    entries.iter().try_for_each(|(key, value)| to.set(key, value))
}

/// What is set of an array, by the index.
fn array<V: Plain + Default + PartialEq>(
    name: &str,
    limit: &str,
    from: &Map<u32, V>,
    to: &Map<u32, V>,
) -> Result<()> {
    let entries = from.filled()?;
    let last = entries.keys().next_back().map_or(0, |key| *key as usize + 1);
    room(name, limit, last, to)?;
    entries.iter().try_for_each(|(key, value)| to.set(key, value))
}

/// Counters of what both have room for; the others have nothing that they could be of.
fn counters<V: Plain + Default + PartialEq>(from: &PerCpu<V>, to: &PerCpu<V>) -> Result<()> {
    for index in 0..from.info()?.max_entries.min(to.info()?.max_entries) {
        let values = from.get(index)?;
        if values.iter().any(|value| *value != V::default()) {
            to.set_each(index, &values)?;
        }
    }
    Ok(())
}
