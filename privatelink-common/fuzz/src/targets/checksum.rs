//! An incremental update is what computing the checksum again gives.

use crate::input::Input;
use crate::packet;
use privatelink_common::checksum::{address, delta, finish, sum, update, update_udp, word};

pub fn run(input: &[u8]) {
    let mut input = Input(input);
    let mut bytes = [0; 40];
    let given = input.bytes(40);
    bytes[..given.len()].copy_from_slice(given);
    assert_eq!(finish(sum(&bytes)), packet::checksum(&[&bytes]).to_be_bytes(), "the sum of {bytes:02x?}");

    let before = packet::checksum(&[&bytes]).to_be_bytes();
    let (mut now, mut change) = (bytes, 0);
    // An address and a port, as the path changes them, in one update.
    let at = input.below(8) * 4;
    let new = input.long().to_be_bytes();
    let old: [u8; 4] = bytes[at..at + 4].try_into().unwrap();
    now[at..at + 4].copy_from_slice(&new);
    change += u32::from(delta(address(old), address(new)));
    let new = input.word().to_be_bytes();
    change += u32::from(delta(word([bytes[36], bytes[37]]), word(new)));
    now[36..38].copy_from_slice(&new);

    let (updated, again) = (update(before, change), packet::checksum(&[&now]).to_be_bytes());
    // The two zeros of one's complement are the same number.
    let zero = |it: [u8; 2]| it == [0, 0] || it == [0xff, 0xff];
    assert!(
        updated == again || zero(updated) && zero(again),
        "{bytes:02x?} {now:02x?}: {updated:?} {again:?}"
    );
    let udp = update_udp(before, change);
    assert!((udp == [0, 0]) == (before == [0, 0]), "{before:?} by {change:#x} gives {udp:?}");
}
