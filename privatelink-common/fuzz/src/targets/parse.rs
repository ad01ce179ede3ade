//! Any frame, by any interface: what is passed is untouched, what is sent on is what a plain reading of its headers says it may be.

use crate::input::Input;
use crate::view::{View, check_answer, check_forwarded};
use crate::world::{DATAGRAMS, PROXIED, SLOTS, World};
use privatelink_common::verdict::Action;

pub fn run(input: &[u8]) {
    let mut input = Input(input);
    let (slot, vpc) = input.of(&SLOTS);
    let frame = input.0;
    let (result, after) = World::default().send(slot, frame, 1000);
    let Ok(verdict) = result else { return };
    match verdict.action() {
        Action::Hold => {
            assert_eq!(after, frame);
            let came = View::of(frame).expect("a whole header");
            let is_later6 =
                came.is_ipv6 && came.protocol == 44 && (came.payload[2], came.payload[3] >> 3) != (0, 0);
            assert!(came.is_later || is_later6, "only fragments are held, and only later ones: {came:02x?}");
        }
        Action::Pass => assert_eq!(after, frame, "passed by {slot} in {vpc}"),
        Action::Forward { .. } => {
            let came = View::of(frame).expect("a whole packet without options or extension headers");
            assert!(came.has_ports() && came.parts().is_some(), "{came:02x?}");
            let is_proxied = [PROXIED, PROXIED + DATAGRAMS].contains(&came.ports().1);
            check_forwarded(frame, &after, is_proxied);
        }
        Action::Steer { .. } => assert_eq!(after[12..], frame[12..], "only the link-layer addresses change"),
        Action::Answer(code) => check_answer(code, frame, &after),
    }
}
