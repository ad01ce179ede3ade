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
/// Returns how many entries were removed.
///
/// It reads the table in chunks, holds no more than one of them, and no lock that the path would wait for.
pub fn sweep(maps: &Maps) -> Result<usize> {
    let generations = generations(maps)?;
    let mut removed = Ok(0);
    maps.established.walk(CHUNK, |keys, values| {
        let now = now();
        for (key, flow) in keys.iter().zip(values).filter(|(_, flow)| looks_over(flow, now, &generations)) {
            if let Ok(count) = &mut removed {
                match end(maps, key, flow, &generations) {
                    Ok(ended) => *count += ended,
                    Err(error) => removed = Err(error),
                }
            }
        }
    })?;
    removed
}

/// Removes both directions of a flow whose one direction looks over, if the other does too. Returns how many entries went.
fn end(maps: &Maps, key: &FlowKey, flow: &Flow, generations: &[u32]) -> Result<usize> {
    let (now, peer_key) = (now(), key.mirror(flow));
    let peer = maps.established.get(&peer_key)?.filter(|peer| peer_key.mirror(peer) == *key);
    if peer.is_some_and(|peer| !looks_over(&peer, now, generations)) {
        return Ok(0);
    }
    let mut removed = 0;
    for key in [Some(*key), peer.map(|_| peer_key)].into_iter().flatten() {
        let Some(taken) = maps.established.remove(&key)? else { continue };
        if !looks_over(&taken, now, generations) {
            // A packet brought it to life in between. Someone else may have opened it anew meanwhile; theirs is as good.
            let _ = maps.established.insert(&key, &taken);
            break;
        }
        removed += 1;
    }
    Ok(removed)
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
