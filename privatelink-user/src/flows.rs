//! The flow tables, from outside: listing them, and removing flows that have ended.

use crate::maps::{CHUNK, Map, Maps, Plain};
use anyhow::Result;
use privatelink_common::path::state::State;
use privatelink_common::tables::{Course, Flow6, FlowKey, FlowKey6, Key, Stream, Width};
use privatelink_common::verdict::Direction;
use privatelink_common::wire::Ip;
use std::collections::{BTreeMap, BTreeSet};

/// Seconds since boot, by the clock that the path uses.
pub fn now() -> u32 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u32::try_from(time.tv_sec).unwrap_or(u32::MAX)
}

/// How long an entry has been idle. The path's clock may be a tick ahead.
pub fn idle(flow: &Course, now: u32) -> u32 {
    now.saturating_sub(flow.last_seen)
}

/// Whether a flow is over, though its entry stays for some time: its NAT port must not be another's yet.
pub fn is_over(flow: &Course) -> bool {
    State::from_number(flow.state).is_over()
}

/// A flow, whichever table has it: as the wide ones would have it.
fn wide<K: Key>(key: &K, flow: &K::Flow) -> (FlowKey6, Flow6) {
    let wide = FlowKey6 {
        source: key.source().widen(),
        destination: key.destination().widen(),
        source_port: key.source_port(),
        destination_port: key.destination_port(),
        vpc: key.vpc(),
        protocol: key.protocol(),
        reserved: 0,
    };
    let (source, destination) = (K::source_of(flow).widen(), K::destination_of(flow).widen());
    (wide, Flow6 { source, destination, course: **flow })
}

/// Wanted flows, up to a limit, by the entry of their first direction. Pending ones come after the established.
pub fn list(maps: &Maps, limit: usize, wanted: impl Fn(&Flow6) -> bool) -> Result<Vec<(FlowKey6, Flow6)>> {
    let mut flows = Vec::new();
    collect(&maps.established, limit, &wanted, &mut flows)?;
    collect(&maps.established6, limit, &wanted, &mut flows)?;
    collect(&maps.pending, limit, &wanted, &mut flows)?;
    collect(&maps.pending6, limit, &wanted, &mut flows)?;
    Ok(flows)
}

fn collect<K: Key<Flow: Plain> + Plain>(
    map: &Map<K, K::Flow>,
    limit: usize,
    wanted: &impl Fn(&Flow6) -> bool,
    flows: &mut Vec<(FlowKey6, Flow6)>,
) -> Result<()> {
    map.walk(CHUNK, |keys, values| {
        for (key, flow) in keys.iter().zip(values) {
            if flow.direction() != Direction::ToProvider || flows.len() >= limit {
                continue;
            }
            let (key, flow) = wide(key, flow);
            if wanted(&flow) {
                flows.push((key, flow));
            }
        }
    })
}

/// What a sweep has seen.
#[derive(Clone, Debug, Default)]
pub struct Survey {
    /// When it began, in seconds since boot; 0: there was none.
    pub began: u32,
    /// Entries that it removed.
    pub removed: usize,
    /// Flows of each target that has any, half-open ones included, by the load balancer's address that they come from.
    pub targets: BTreeMap<(u32, Ip), u32>,
    /// Flows of each endpoint that has any, half-open ones included, but not those that are over and only keep their NAT port.
    pub endpoints: BTreeMap<u32, u32>,
}

impl Survey {
    /// How many flows a target had, if that was counted after a second.
    pub fn of(&self, target: u32, after: u32) -> Option<u32> {
        (self.began > after).then(|| self.counts(target).sum())
    }

    /// How many NAT ports a target takes of the load balancer's address that it takes the most of.
    pub fn ports(&self, target: u32) -> u32 {
        self.counts(target).max().unwrap_or(0)
    }

    fn counts(&self, target: u32) -> impl Iterator<Item = u32> {
        self.targets.range((target, Ip([0; 16]))..=(target, Ip([255; 16]))).map(|(_, count)| *count)
    }

    fn count<K: Key>(&mut self, flow: &K::Flow) {
        if flow.direction() == Direction::ToProvider {
            *self.targets.entry((flow.target.into(), K::source_of(flow).widen())).or_default() += 1;
            if !is_over(flow) {
                *self.endpoints.entry(flow.endpoint.into()).or_default() += 1;
            }
        }
    }
}

/// Removes the flows that have ended: idle for longer than they may, in both directions, or of an endpoint's former generation.
/// Counts the others.
///
/// It reads the tables in chunks, holds no more than one of them, and no lock that the path would wait for.
pub fn sweep(maps: &Maps) -> Result<Survey> {
    let generations = generations(maps)?;
    let mut survey = Survey { began: now(), ..Survey::default() };
    sweep_table(&maps.established, &generations, &mut survey)?;
    sweep_table(&maps.established6, &generations, &mut survey)?;
    maps.pending.walk(CHUNK, |_, values| values.iter().for_each(|it| survey.count::<FlowKey>(it)))?;
    maps.pending6.walk(CHUNK, |_, values| values.iter().for_each(|it| survey.count::<FlowKey6>(it)))?;
    forget_streams(&maps.streams, &maps.pending, &maps.established)?;
    forget_streams(&maps.streams6, &maps.pending6, &maps.established6)?;
    Ok(survey)
}

fn sweep_table<K: Key<Flow: Plain> + Plain>(
    map: &Map<K, K::Flow>,
    generations: &[u16],
    survey: &mut Survey,
) -> Result<()> {
    let mut failed = Ok(());
    map.walk(CHUNK, |keys, values| {
        let now = now();
        for (key, flow) in keys.iter().zip(values) {
            let over = looks_over(flow, now, generations);
            match if over { end(map, key, flow, generations) } else { Ok(None) } {
                Ok(None) => survey.count::<K>(flow),
                Ok(Some(removed)) => survey.removed += removed,
                Err(error) => failed = Err(error),
            }
        }
    })?;
    failed
}

/// Removes the streams whose flows are gone: the path removes those of flows that it ends itself, but not of pending ones, which the
/// kernel may evict at any time.
fn forget_streams<K: Key<Flow: Plain> + Plain>(
    streams: &Map<K, Stream>,
    pending: &Map<K, K::Flow>,
    established: &Map<K, K::Flow>,
) -> Result<()> {
    // In this order, since a flow enters `established` before it leaves `pending`.
    let has_flow =
        |key: &K| -> Result<bool> { Ok(pending.get(key)?.is_some() || established.get(key)?.is_some()) };
    let mut result = Ok(());
    streams.walk(CHUNK, |keys, _| {
        for key in keys {
            let forget = || -> Result<()> {
                if !has_flow(key)?
                    && let Some(taken) = streams.remove(key)?
                    && has_flow(key)?
                {
                    // A flow was opened in between. If it has brought its own, that one is as good, or better.
                    let _ = streams.insert(key, &taken);
                }
                Ok(())
            };
            if result.is_ok() {
                result = forget();
            }
        }
    })?;
    result
}

/// Removes both directions of a flow whose one direction looks over, if the other does too. Returns how many entries went; nothing
/// where the flow lives on.
fn end<K: Key<Flow: Plain> + Plain>(
    map: &Map<K, K::Flow>,
    key: &K,
    flow: &K::Flow,
    generations: &[u16],
) -> Result<Option<usize>> {
    let (now, peer_key) = (now(), key.mirror(flow));
    let peer = map.get(&peer_key)?.filter(|peer| peer_key.mirror(peer) == *key);
    if peer.is_some_and(|peer| !looks_over(&peer, now, generations)) {
        return Ok(None);
    }
    let mut removed = 0;
    for key in [Some(*key), peer.map(|_| peer_key)].into_iter().flatten() {
        let Some(taken) = map.remove(&key)? else { continue };
        if !looks_over(&taken, now, generations) {
            // A packet brought it to life in between. Someone else may have opened it anew meanwhile; theirs is as good.
            let _ = map.insert(&key, &taken);
            return Ok(None);
        }
        removed += 1;
    }
    Ok(Some(removed))
}

fn looks_over(flow: &Course, now: u32, generations: &[u16]) -> bool {
    idle(flow, now) > flow.patience() + 2
        || generations.get(usize::from(flow.endpoint)) != Some(&flow.generation)
}

fn generations(maps: &Maps) -> Result<Vec<u16>> {
    let mut generations = Vec::new();
    maps.endpoints
        .walk(CHUNK, |_, values| generations.extend(values.iter().map(|endpoint| endpoint.generation)))?;
    Ok(generations)
}

/// Removes every flow that goes by one of these slots, before the slots may be given to another interface.
pub fn forget_slots(maps: &Maps, slots: &BTreeSet<u16>) -> Result<()> {
    forget(&maps.established, slots)?;
    forget(&maps.pending, slots)?;
    forget(&maps.established6, slots)?;
    forget(&maps.pending6, slots)?;
    let mut gone = Vec::new();
    maps.callers.walk(CHUNK, |keys, callers| {
        let by = keys
            .iter()
            .zip(callers)
            .filter(|(key, caller)| slots.contains(&caller.interface) || slots.contains(&key.vpc));
        gone.extend(by.map(|(key, _)| *key));
    })?;
    gone.iter().try_for_each(|key| maps.callers.delete(key))
}

fn forget<K: Key<Flow: Plain> + Plain>(map: &Map<K, K::Flow>, slots: &BTreeSet<u16>) -> Result<()> {
    let mut gone = Vec::new();
    map.walk(CHUNK, |keys, values| {
        let uses = |flow: &Course| slots.contains(&flow.interface) || slots.contains(&flow.seen_interface);
        let by = keys.iter().zip(values).filter(|(_, flow)| uses(flow));
        gone.extend(by.flat_map(|(key, flow)| [*key, key.mirror(flow)]));
    })?;
    gone.iter().try_for_each(|key| map.delete(key))
}
