//! Maglev hashing (Eisenbud et al., NSDI '16, section 3.4), with weights.
//!
//! Every target fills the table in an order of its own; they take turns, a target with twice the weight twice as often. Removing
//! a target moves its own slots, and few others.

/// Table sizes to choose from: primes, so that every skip visits every slot. Few and large: a table of another size moves nearly all
/// new flows, so a target more or less should not be what makes one.
pub const SIZES: [u32; 2] = [16381, 65521];

/// One target's part in a table.
#[derive(Clone, Copy, Debug)]
pub struct Share {
    /// What a slot holds.
    pub target: u32,
    /// A hash of what stays the same about the target, so that every agent builds the same table.
    pub seed: u64,
    /// Relative weight, at least 1.
    pub weight: u32,
    /// Where the target has got to in its own order; zero to begin with.
    pub next: u32,
    /// What it has saved up towards its next turn; zero to begin with.
    pub credit: u32,
}

impl Share {
    /// A share that has not begun.
    pub const fn new(target: u32, seed: u64, weight: u32) -> Self {
        Self { target, seed, weight, next: 0, credit: 0 }
    }

    const fn slot(&self, size: u32) -> u32 {
        let offset = (self.seed >> 32) % size as u64;
        let skip = (self.seed & 0xffff_ffff) % (size as u64 - 1) + 1;
        #[allow(clippy::cast_possible_truncation, reason = "a remainder of a u32")]
        {
            ((offset + self.next as u64 * skip) % size as u64) as u32
        }
    }
}

/// The size of a table for this total of weights: a hundred slots for each unit, so that shares are exact to one percent, as far
/// as the largest size goes.
pub fn size(total_weight: u64) -> u32 {
    let wanted = total_weight.saturating_mul(100);
    SIZES.into_iter().find(|size| u64::from(*size) >= wanted).unwrap_or(SIZES[SIZES.len() - 1])
}

/// Fills `table`, whose length is one of [`SIZES`]. `free` marks slots that no one has; it is never a target.
/// Nothing is written where there is no share.
pub fn fill(table: &mut [u32], shares: &mut [Share], free: u32) {
    let (Ok(size), Some(heaviest)) =
        (u32::try_from(table.len()), shares.iter().map(|share| share.weight).max())
    else {
        return;
    };
    table.fill(free);
    let mut left = size;
    while left > 0 {
        for share in &mut *shares {
            share.credit += share.weight;
            while share.credit >= heaviest && left > 0 {
                share.credit -= heaviest;
                take(table, share, size, free);
                left -= 1;
            }
        }
    }
}

/// Takes the next free slot in the share's own order. There is one: the caller counts.
fn take(table: &mut [u32], share: &mut Share, size: u32, free: u32) {
    for _ in 0..size {
        let slot = share.slot(size) as usize;
        share.next += 1;
        if let Some(entry) = table.get_mut(slot)
            && *entry == free
        {
            *entry = share.target;
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{collections::BTreeMap, vec, vec::Vec};

    fn shares(weights: &[u32]) -> Vec<Share> {
        // The finaliser of splitmix64: real seeds are hashes, too.
        let seed = |id: usize| {
            let z = (id as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        };
        weights
            .iter()
            .enumerate()
            .map(|(id, weight)| Share::new(u32::try_from(id).expect("few"), seed(id), *weight))
            .collect()
    }

    fn table(mut shares: Vec<Share>, size: u32) -> Vec<u32> {
        let mut table = vec![0; size as usize];
        fill(&mut table, &mut shares, u32::MAX);
        table
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn every_target_gets_its_weight_to_one_percent(weights in prop::collection::vec(1u32..20, 1..30)) {
            let total: u64 = weights.iter().map(|weight| u64::from(*weight)).sum();
            let size = size(total);
            let mut held = BTreeMap::<u32, u32>::new();
            for target in table(shares(&weights), size) {
                *held.entry(target).or_default() += 1;
            }
            for (id, weight) in weights.iter().enumerate() {
                let expected = f64::from(size) * f64::from(*weight) / total as f64;
                let held = f64::from(held[&u32::try_from(id).expect("few")]);
                prop_assert!((held - expected).abs() <= f64::from(size) * 0.01 + 1.0, "{held} of {expected}");
            }
        }

        #[test]
        fn removing_one_of_n_targets_moves_its_own_flows_and_at_most_two_percent_besides(count in 2usize..120, gone in 0usize..120) {
            let gone = gone % count;
            let all = shares(&vec![1; count]);
            let mut rest = all.clone();
            let removed = rest.remove(gone).target;
            let size = size(count as u64);
            prop_assert_eq!(size, super::size(count as u64 - 1), "a table of another size would move them all");
            let (before, after) = (table(all, size), table(rest, size));
            let moved = before.iter().zip(&after).filter(|(a, b)| a != b && **a != removed).count();
            prop_assert!(moved * 100 <= before.len() * 2, "{moved} of {} moved besides", before.len());
            prop_assert!(!after.contains(&removed));
        }

        #[test]
        fn the_order_in_which_targets_are_listed_is_all_that_matters_beside_them(count in 1usize..10) {
            prop_assert_eq!(table(shares(&vec![3; count]), 1021), table(shares(&vec![3; count]), 1021));
        }
    }

    #[test]
    fn sizes_are_prime() {
        for size in SIZES {
            assert!((2..size).take_while(|it| it * it <= size).all(|it| size % it != 0), "{size}");
        }
    }

    #[test]
    fn a_table_without_targets_is_left_alone() {
        assert_eq!(table(Vec::new(), 251), vec![0; 251]);
    }
}
