//! Trunks in the twin: each of the interfaces is tags on one, which the host's path never sees.

use privatelink::maps::Maps;
use privatelink_common::tables::{Interface, Tag, Trunk, VlanKey};
use privatelink_common::verdict::Action;

/// The trunk's own slot, which no interface has.
const SLOT: u16 = 4000;
/// Where in `interfaces` those begin that are tags.
const FIRST: u32 = 65536;

/// How a test run knows tags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tags {
    /// The program is none for trunks.
    None,
    /// They are bytes of the frame.
    InFrame,
    /// The outer one is beside the frame: it can neither be given to a test run nor be seen behind one.
    Beside,
}

/// The tags that an interface is, by its slot.
fn of(slot: u16) -> Vec<Tag> {
    let [a, b] = (100 + slot).to_be_bytes();
    let (service, customer) = ([0x88, 0xa8, 0, 200], [0x81, 0, a, b]);
    if slot.is_multiple_of(2) { vec![service, customer] } else { vec![customer] }
}

fn key(tags: &[Tag]) -> VlanKey {
    let vlan = |tag: Tag| u16::from_be_bytes([tag[2], tag[3]]);
    let (service_vlan, vlan) = match *tags {
        [outer, inner] => (vlan(outer), vlan(inner)),
        _ => (0, vlan(tags[0])),
    };
    VlanKey { ifindex: 1, service_vlan, vlan }
}

impl Tags {
    /// Makes the interfaces tags on the loopback interface, by which frames of a test run come.
    pub(crate) fn set_up(self, maps: &Maps, interfaces: &[Interface]) {
        if self == Self::None {
            return;
        }
        maps.egress.set(&SLOT.into(), &[1, 0]).unwrap();
        for interface in interfaces {
            let (slot, tags) = (interface.slot, of(interface.slot));
            let inner = tags.get(1).copied().unwrap_or_default();
            let trunk = Trunk { ifindex: 1, slot: SLOT, reserved: 0, outer: tags[0], inner };
            maps.trunks.set(&slot.into(), &trunk).unwrap();
            maps.egress.delete(&slot.into()).unwrap();
            maps.egress_tcx.set(&slot.into(), &0).unwrap();
            maps.vlans.set(&key(&tags), &(FIRST + u32::from(slot))).unwrap();
            maps.interfaces.set(&(FIRST + u32::from(slot)), interface).unwrap();
        }
    }

    /// Whether a frame can be given tags: one that is too short behind them, or has some already, is none of the path's.
    pub(crate) fn take(self, frame: &[u8]) -> bool {
        self != Self::InFrame || frame.len() >= 18 && !matches!(frame[12..14], [0x81, 0] | [0x88, 0xa8])
    }

    /// The tags with which a frame comes by an interface, with a priority.
    pub(crate) fn came(self, interface: Interface, priority: u8) -> Vec<Tag> {
        let with_priority = |[a, b, c, d]: Tag| [a, b, c | priority << 5, d];
        match self {
            Self::InFrame => of(interface.slot).into_iter().map(with_priority).collect(),
            Self::None | Self::Beside => Vec::new(),
        }
    }

    /// The tags with which a frame is seen behind the program: of what is dropped, they were taken off.
    pub(crate) fn left(self, action: Option<Action>, came: &[Tag]) -> Vec<Tag> {
        match (self, action) {
            (Self::InFrame, Some(Action::Forward { interface, .. } | Action::Steer { interface })) => {
                of(interface)
            }
            (Self::Beside, Some(Action::Forward { interface, .. } | Action::Steer { interface })) => {
                of(interface).split_off(1)
            }
            (Self::InFrame, Some(Action::Pass | Action::Answer(_))) => came.to_vec(),
            _ => Vec::new(),
        }
    }
}

/// A frame with tags.
pub(crate) fn tagged(frame: &[u8], tags: &[Tag]) -> Vec<u8> {
    [&frame[..12], &tags.concat(), &frame[12..]].concat()
}
