//! A table holds targets alone, each as often as its weight says.

use crate::input::Input;
use privatelink_common::plan::maglev::{SIZES, Share, fill, size};

pub fn run(input: &[u8]) {
    let mut input = Input(input);
    let count = 1 + input.below(12);
    let share = |(id, seed, weight): (u32, u64, u32)| Share::new(id, seed, weight);
    let given: Vec<_> = (0..count as u32)
        .map(|id| {
            let seed = u64::from(input.long()) << 32 | u64::from(input.long());
            (id, seed, 1 + u32::from(input.word()) % 1000)
        })
        .collect();
    let total: u64 = given.iter().map(|(_, _, weight)| u64::from(*weight)).sum();
    let length = size(total);
    assert!(SIZES.contains(&length));
    let mut table = vec![0; length as usize];
    fill(&mut table, &mut given.iter().copied().map(share).collect::<Vec<_>>(), u32::MAX);
    let mut counts = vec![0u64; count];
    for target in table {
        counts[target as usize] += 1;
    }
    for (id, _, weight) in given {
        let exact = u64::from(length) * u64::from(weight) / total;
        let apart = counts[id as usize].abs_diff(exact);
        assert!(
            apart <= count as u64 + 2,
            "target {id} of weight {weight} in {total} has {} of {length}",
            counts[id as usize]
        );
    }
}
