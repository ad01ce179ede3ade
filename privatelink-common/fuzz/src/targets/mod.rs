pub mod checksum;
pub mod maglev;
pub mod nat;
pub mod parse;
pub mod path;

use crate::packet;

/// Whether the checksums of an IPv4 packet with TCP or UDP are right, computed over the whole; None of anything else.
pub fn is_sound(frame: &[u8]) -> Option<bool> {
    let ip = frame.get(14..34)?;
    let total = usize::from(u16::from_be_bytes([ip[2], ip[3]]));
    if frame[12..14] != [8, 0] || ip[0] != 0x45 {
        return None;
    }
    let payload = frame.get(34..14 + total)?;
    let at = match ip[9] {
        6 => 16,
        17 => 6,
        _ => return None,
    };
    // UDP's own length, which may be less than what the packet has.
    let length = if ip[9] == 17 {
        usize::from(u16::from_be_bytes([*payload.get(4)?, *payload.get(5)?]))
    } else {
        payload.len()
    };
    let payload = payload.get(..length)?;
    let stored = payload.get(at..at + 2)?;
    if ip[9] == 17 && stored == [0, 0] {
        return Some(packet::checksum(&[ip]) == 0);
    }
    let words = (length as u16).to_be_bytes();
    let sum = packet::checksum(&[&ip[12..20], &[0, ip[9]], &words, payload]);
    Some(packet::checksum(&[ip]) == 0 && sum == 0)
}
