//! Any frame, by any interface: what is passed is untouched, what is sent on is what a plain reading of its headers says it may be.

use super::is_sound;
use crate::input::Input;
use crate::world::{SLOTS, World};
use privatelink_common::verdict::Action;

pub fn run(input: &[u8]) {
    let mut input = Input(input);
    let (slot, vpc) = input.of(&SLOTS);
    let frame = input.0;
    let (result, after) = World::default().send(slot, frame, 1000);
    assert!(after.len() <= frame.len(), "the path never adds to a frame");
    let Ok(verdict) = result else { return };
    match verdict.action() {
        Action::Pass => assert_eq!(after, frame, "passed by {slot} in {vpc}"),
        Action::Forward { .. } => {
            assert_eq!(
                (&frame[12..15], frame[20] & 0x3f, frame[21]),
                (&[8, 0, 0x45][..], 0, 0),
                "whole IPv4 without options"
            );
            let total = usize::from(u16::from_be_bytes([frame[16], frame[17]]));
            let header = match frame[23] {
                6 => usize::from(frame[46] >> 4) * 4,
                17 => 8,
                other => panic!("protocol {other} was forwarded"),
            };
            assert!(total + 14 <= frame.len() && header >= 8 && 20 + header <= total, "{frame:02x?}");
            assert_eq!(after.len(), frame.len());
            if is_sound(frame) == Some(true) {
                assert_eq!(is_sound(&after), Some(true), "{frame:02x?} became {after:02x?}");
            }
        }
        Action::Steer { .. } => assert_eq!(after[12..], frame[12..], "only the link-layer addresses change"),
        Action::Answer(_) => assert!(after.len() >= 42),
    }
}
