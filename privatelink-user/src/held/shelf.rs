//! What is held, within bounds, and when to look for whose first fragment has come.

use privatelink_common::held::Held;
use privatelink_common::limits::{HELD_BYTES, HELD_FOR, HELD_FRAGMENTS};
use privatelink_common::tables::FragmentKey;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

/// How long after a fragment has come its first is looked for again; each time twice as long.
const FIRST_PAUSE: Duration = Duration::from_micros(500);
/// But not longer than this.
const LONGEST_PAUSE: Duration = Duration::from_millis(50);
/// How long a fragment is held.
const PATIENCE: Duration = Duration::from_secs(HELD_FOR as u64);

/// A fragment that is held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fragment {
    /// What the program says of it.
    pub(super) held: Held,
    /// The frame.
    pub(super) frame: Vec<u8>,
    /// When it came.
    pub(super) came: Instant,
}

/// The fragments of a datagram, in the order in which they have come.
#[derive(Debug)]
struct Waiting {
    fragments: VecDeque<Fragment>,
    /// When to look again.
    look: Instant,
    pause: Duration,
}

/// How much there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Load {
    fragments: usize,
    bytes: usize,
}

impl Load {
    /// Whether so many bytes more fit; the first bound is a VPC's, the second that of all.
    fn fits(self, bytes: usize, bound: usize) -> bool {
        self.fragments < HELD_FRAGMENTS[bound] && self.bytes + bytes <= HELD_BYTES[bound]
    }

    fn add(&mut self, bytes: usize) {
        (self.fragments, self.bytes) = (self.fragments + 1, self.bytes + bytes);
    }

    fn remove(&mut self, bytes: usize) {
        (self.fragments, self.bytes) = (self.fragments - 1, self.bytes - bytes);
    }
}

/// All that is held.
#[derive(Debug, Default)]
pub(super) struct Shelf {
    datagrams: BTreeMap<FragmentKey, Waiting>,
    /// The same, by when to look for them.
    looks: BTreeSet<(Instant, FragmentKey)>,
    all: Load,
    by_vpc: BTreeMap<u16, Load>,
}

impl Shelf {
    /// Holds a fragment of a datagram, for which is looked at once; not, if there is no room.
    pub(super) fn add(&mut self, key: FragmentKey, fragment: Fragment) -> Result<(), Fragment> {
        let (size, now) = (fragment.frame.len(), fragment.came);
        let load = self.by_vpc.entry(key.vpc).or_default();
        if !load.fits(size, 0) || !self.all.fits(size, 1) {
            return Err(fragment);
        }
        load.add(size);
        self.all.add(size);
        let fresh = || Waiting { fragments: VecDeque::new(), look: now, pause: FIRST_PAUSE };
        let waiting = self.datagrams.entry(key).or_insert_with(fresh);
        waiting.fragments.push_back(fragment);
        self.looks.remove(&(waiting.look, key));
        waiting.look = now;
        self.looks.insert((now, key));
        Ok(())
    }

    /// When to look next; not at all, if nothing is held.
    pub(super) fn next(&self) -> Option<Instant> {
        self.looks.first().map(|(at, _)| *at)
    }

    /// The datagrams to look for now.
    pub(super) fn due(&self, now: Instant) -> Vec<FragmentKey> {
        self.looks.iter().take_while(|(at, _)| *at <= now).map(|(_, key)| *key).collect()
    }

    /// Gives out the fragments of a datagram.
    pub(super) fn take(&mut self, key: &FragmentKey) -> Vec<Fragment> {
        let Some(waiting) = self.datagrams.remove(key) else { return Vec::new() };
        self.looks.remove(&(waiting.look, *key));
        waiting.fragments.iter().for_each(|it| self.release(key.vpc, it));
        waiting.fragments.into()
    }

    /// Leaves a datagram until later, since its first fragment has not come. Gives out what has been held for long enough.
    pub(super) fn leave(&mut self, key: &FragmentKey, now: Instant) -> Vec<Fragment> {
        let Some(waiting) = self.datagrams.get_mut(key) else { return Vec::new() };
        let is_old = |it: &Fragment| now.saturating_duration_since(it.came) >= PATIENCE;
        let old = waiting.fragments.iter().take_while(|it| is_old(it)).count();
        if old == waiting.fragments.len() {
            return self.take(key);
        }
        let gone: Vec<_> = waiting.fragments.drain(..old).collect();
        self.looks.remove(&(waiting.look, *key));
        let end = waiting.fragments.front().map_or(now, |it| it.came) + PATIENCE;
        waiting.look = (now + waiting.pause).min(end);
        waiting.pause = (waiting.pause * 2).min(LONGEST_PAUSE);
        self.looks.insert((waiting.look, *key));
        gone.iter().for_each(|it| self.release(key.vpc, it));
        gone
    }

    fn release(&mut self, vpc: u16, fragment: &Fragment) {
        let size = fragment.frame.len();
        self.all.remove(size);
        if let Some(load) = self.by_vpc.get_mut(&vpc) {
            load.remove(size);
            if load.fragments == 0 {
                self.by_vpc.remove(&vpc);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::big_endian::U32;

    fn key(vpc: u16, id: u32) -> FragmentKey {
        FragmentKey { vpc, id: U32::new(id), ..FragmentKey::default() }
    }

    fn fragment(number: u8, length: usize, came: Instant) -> Fragment {
        Fragment { held: Held::default(), frame: vec![number; length], came }
    }

    /// What it takes when nobody takes anything out: how much fits until it says no.
    fn fill(shelf: &mut Shelf, vpc: u16, length: usize, now: Instant) -> usize {
        let add = |id: &u32| shelf.add(key(vpc, *id), fragment(0, length, now)).is_ok();
        (0..u32::MAX).take_while(add).count()
    }

    #[test]
    fn fragments_of_a_datagram_come_out_in_the_order_in_which_they_came_and_leave_nothing() {
        let (mut shelf, now) = (Shelf::default(), Instant::now());
        for number in [3, 1, 2] {
            shelf.add(key(1, 7), fragment(number, 100, now)).unwrap();
            shelf.add(key(2, 7), fragment(number, 100, now)).unwrap();
        }
        assert_eq!(shelf.due(now), [key(1, 7), key(2, 7)].map(|it| it).to_vec());
        let numbers: Vec<u8> = shelf.take(&key(1, 7)).iter().map(|it| it.frame[0]).collect();
        assert_eq!(numbers, [3, 1, 2]);
        assert_eq!(shelf.take(&key(1, 7)), [], "another tenant's are not given out");
        assert_eq!(shelf.take(&key(2, 7)).len(), 3);
        assert_eq!((shelf.next(), shelf.all, shelf.by_vpc.len()), (None, Load::default(), 0));
    }

    #[test]
    fn a_vpc_takes_its_part_and_all_together_no_more_than_there_is() {
        for (length, part, all) in [(100, 512, 4096), (4096, 256, 2048), (65_000, 16, 129)] {
            let (mut shelf, now) = (Shelf::default(), Instant::now());
            assert_eq!(fill(&mut shelf, 1, length, now), part, "{length}");
            let others: usize = (2..40).map(|vpc| fill(&mut shelf, vpc, length, now)).sum();
            assert_eq!(part + others, all, "{length}");
            assert_eq!(shelf.take(&key(1, 0)).len(), 1);
            assert_eq!(fill(&mut shelf, 1, length, now), 1, "its place is free again");
        }
    }

    #[test]
    fn a_first_fragment_is_looked_for_less_and_less_often_for_a_second() {
        let (mut shelf, start) = (Shelf::default(), Instant::now());
        shelf.add(key(1, 7), fragment(1, 100, start)).unwrap();
        let later = start + Duration::from_millis(300);
        let (mut looks, mut late) = (0, false);
        loop {
            let now = shelf.next().unwrap();
            assert_eq!(shelf.due(now), [key(1, 7)]);
            looks += 1;
            let gone = shelf.leave(&key(1, 7), now);
            if !gone.is_empty() {
                assert_eq!(
                    (gone.len(), gone[0].frame[0], now),
                    (1, 1, start + PATIENCE),
                    "the old one alone"
                );
                break;
            }
            if now >= later && !late {
                late = true;
                shelf.add(key(1, 7), fragment(2, 100, now)).unwrap();
            }
        }
        assert!((20..40).contains(&looks), "{looks} looks");
        let end = shelf.next().unwrap() + PATIENCE;
        assert_eq!(shelf.leave(&key(1, 7), end)[0].frame[0], 2);
        assert_eq!((shelf.next(), shelf.all), (None, Load::default()));
    }
}
