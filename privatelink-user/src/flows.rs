//! The flow tables, from outside: listing them, and removing flows that have ended.

use crate::maps::Maps;
use anyhow::Result;
use privatelink_common::tables::{Flow, FlowKey};
use privatelink_common::verdict::Direction;
use std::collections::BTreeSet;

/// Entries that are read at once.
const CHUNK: u32 = 4096;

/// Seconds since boot, by the clock that the path uses.
pub fn now() -> u32 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u32::try_from(time.tv_sec).unwrap_or(u32::MAX)
}

/// How long an entry has been idle. The path's clock may be a tick ahead.
pub fn idle(flow: &Flow, now: u32) -> u32 {
    now.saturating_sub(flow.last_seen)
}

/// Every flow, by the entry of its first direction. `pending` ones come after the established.
pub fn list(maps: &Maps, limit: usize) -> Result<Vec<(FlowKey, Flow, bool)>> {
    let mut flows = Vec::new();
    for (map, established) in [(&maps.established, true), (&maps.pending, false)] {
        map.walk(CHUNK, |keys, values| {
            for (key, flow) in keys.iter().zip(values) {
                if flow.direction == Direction::ToProvider as u8 && flows.len() < limit {
                    flows.push((*key, *flow, established));
                }
            }
        })?;
    }
    Ok(flows)
}

/// Removes the flows that have ended: idle for longer than they may, in both directions, or of an endpoint's former generation.
/// Returns how many entries are left and how many were removed.
///
/// What looks ended is looked at once more when it is taken out; should a packet have brought it to life in between, it is put back.
pub fn sweep(maps: &Maps) -> Result<(usize, usize)> {
    let (mut seen, mut removed) = (0, 0);
    let mut ended = Vec::new();
    let generations = generations(maps)?;
    maps.established.walk(CHUNK, |keys, values| {
        seen += keys.len();
        let now = now();
        let over = keys.iter().zip(values).filter(|(_, flow)| looks_over(flow, now, &generations));
        ended.extend(over.map(|(key, flow)| (*key, *flow)));
    })?;
    for (key, flow) in ended {
        let now = now();
        let stale = generations.get(flow.endpoint as usize) != Some(&flow.generation);
        let other = maps.established.get(&key.mirror(&flow))?;
        if !stale && other.is_some_and(|other| idle(&other, now) <= u32::from(other.idle_timeout)) {
            continue;
        }
        let Some(taken) = maps.established.remove(&key)? else { continue };
        if !looks_over(&taken, now, &generations) {
            // Someone else may have opened it anew meanwhile; theirs is as good.
            let _ = maps.established.insert(&key, &taken);
            continue;
        }
        removed += 1;
    }
    Ok((seen - removed, removed))
}

fn looks_over(flow: &Flow, now: u32, generations: &[u32]) -> bool {
    idle(flow, now) > u32::from(flow.idle_timeout).saturating_add(2)
        || generations.get(flow.endpoint as usize) != Some(&flow.generation)
}

fn generations(maps: &Maps) -> Result<Vec<u32>> {
    let mut generations = Vec::new();
    maps.endpoints
        .walk(CHUNK, |_, values| generations.extend(values.iter().map(|endpoint| endpoint.generation)))?;
    Ok(generations)
}

/// Removes every flow that goes by one of these slots, before the slots may be given to another interface.
pub fn forget_slots(maps: &Maps, slots: &BTreeSet<u16>) -> Result<()> {
    for map in [&maps.established, &maps.pending] {
        let mut gone = Vec::new();
        map.walk(CHUNK, |keys, values| {
            let uses = |flow: &Flow| slots.contains(&flow.interface) || slots.contains(&flow.seen_interface);
            let by = keys.iter().zip(values).filter(|(_, flow)| uses(flow));
            gone.extend(by.flat_map(|(key, flow)| [*key, key.mirror(flow)]));
        })?;
        for key in gone {
            map.delete(&key)?;
        }
    }
    Ok(())
}
