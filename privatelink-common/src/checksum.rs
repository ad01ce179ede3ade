//! The Internet checksum (RFC 1071) and its incremental update (RFC 1624).
//!
//! Sixteen-bit words are taken in the machine's own byte order and put back in it, so nothing is ever swapped: the sum is
//! independent of byte order (RFC 1071, section 2 (B)). A [`Delta`] is therefore only good on the machine that computed it.

use crate::wire::Ip;

/// What a change of words does to a one's complement sum: the `~m + m'` of RFC 1624 (eqn. 3), folded to sixteen bits.
pub type Delta = u16;

/// Folds carries until the sum fits sixteen bits. Two folds are enough for any 32-bit sum.
#[inline(always)]
pub const fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    #[allow(clippy::cast_possible_truncation, reason = "two folds of a 32-bit sum leave at most 0xffff")]
    {
        sum as u16
    }
}

/// Sum of the two words of an address.
#[inline(always)]
pub const fn address(bytes: [u8; 4]) -> u32 {
    let word = u32::from_ne_bytes(bytes);
    (word & 0xffff) + (word >> 16)
}

/// Sum of the eight words of an address of either family. What an IPv4 address is mapped by adds nothing: it is 0xffff, a zero of one's
/// complement.
#[inline(always)]
pub const fn ip(address: Ip) -> u32 {
    let [network, host] = address.words();
    long(network) + long(host)
}

/// Sum of the four words in a longer one.
#[inline(always)]
const fn long(word: u64) -> u32 {
    let folded = (word & 0xffff_ffff) + (word >> 32);
    #[allow(clippy::cast_possible_truncation, reason = "each part is cut out at its own width")]
    let (upper, lower) = ((folded >> 16) as u32, (folded & 0xffff) as u32);
    upper + lower
}

/// Sum of one word.
#[inline(always)]
pub const fn word(bytes: [u8; 2]) -> u32 {
    u16::from_ne_bytes(bytes) as u32
}

/// The delta of replacing words that sum to `old` by words that sum to `new`. Each may be the sum of up to 2^15 words.
#[inline(always)]
pub const fn delta(old: u32, new: u32) -> Delta {
    fold(!fold(old) as u32 + fold(new) as u32)
}

/// A stored checksum after the change that `delta` stands for (or the sum of several): `~(~HC + ~m + m')`.
#[inline(always)]
pub const fn update(stored: [u8; 2], delta: u32) -> [u8; 2] {
    (!fold(!u16::from_ne_bytes(stored) as u32 + delta)).to_ne_bytes()
}

/// The same for UDP, where zero means "no checksum" and stays zero, and a computed zero is sent as all ones (RFC 768).
#[inline(always)]
pub const fn update_udp(stored: [u8; 2], delta: u32) -> [u8; 2] {
    match (stored, update(stored, delta)) {
        ([0, 0], _) => [0, 0],
        (_, [0, 0]) => [0xff, 0xff],
        (_, updated) => updated,
    }
}

/// The checksum of words that sum to `sum`, ready to be stored.
#[inline(always)]
pub const fn finish(sum: u32) -> [u8; 2] {
    (!fold(sum)).to_ne_bytes()
}

/// The same for UDP, where a computed zero is sent as all ones (RFC 768).
#[inline(always)]
pub const fn finish_udp(sum: u32) -> [u8; 2] {
    match finish(sum) {
        [0, 0] => [0xff, 0xff],
        checksum => checksum,
    }
}

/// Sum of all words of `bytes`, an odd one padded with zero.
#[inline(always)]
pub fn sum<const N: usize>(bytes: &[u8; N]) -> u32 {
    sum_all(bytes)
}

/// The same of up to 65535 bytes.
#[inline(always)]
pub fn sum_all(bytes: &[u8]) -> u32 {
    let mut sum = 0;
    for pair in bytes.chunks(2) {
        sum += match pair {
            [a, b] => word([*a, *b]),
            [a] => word([*a, 0]),
            _ => 0,
        };
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// RFC 1071, section 4.1, as written there.
    fn reference(bytes: &[u8]) -> u16 {
        let mut sum = 0u64;
        for pair in bytes.chunks(2) {
            sum += u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0));
        }
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !u16::try_from(sum).expect("folded")
    }

    proptest! {
        #[test]
        fn an_update_equals_computing_the_checksum_again(mut bytes: [u8; 40], at in 0usize..9, new: [u8; 4]) {
            let before = reference(&bytes).to_be_bytes();
            let old: [u8; 4] = bytes[at * 4..at * 4 + 4].try_into().expect("four bytes");
            bytes[at * 4..at * 4 + 4].copy_from_slice(&new);
            let after = reference(&bytes);
            let updated = u16::from_be_bytes(update(before, delta(address(old), address(new)).into()));
            // The two zeros of one's complement are the same number.
            prop_assert!(updated == after || (updated ^ after) == 0xffff && (after == 0 || after == 0xffff));
        }

        #[test]
        fn a_sum_equals_the_reference(bytes: [u8; 37]) {
            prop_assert_eq!(u16::from_be_bytes(finish(sum(&bytes))), reference(&bytes));
        }

        #[test]
        fn a_udp_checksum_never_becomes_zero_and_zero_stays(stored: [u8; 2], change: u16) {
            let updated = update_udp(stored, change.into());
            prop_assert_eq!(updated == [0, 0], stored == [0, 0]);
        }
    }
}
