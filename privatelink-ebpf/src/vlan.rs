//! VLAN tags (IEEE 802.1Q and 802.1ad): taken off as a frame comes in, so that the path sees it without, and put on as it leaves. To
//! the path, tags on a trunk are an interface like any other, with an entry of its own in `interfaces`.

use crate::maps::{CAME, TRUNKS, VLANS};
use core::mem::size_of;
use privatelink_common::frame::Frame;
use privatelink_common::tables::{Tag, Trunk, VlanKey};
use privatelink_common::wire::{ETHERTYPE_SERVICE_VLAN, ETHERTYPE_VLAN, Mac};

/// Where tags are: behind the link-layer addresses.
pub(crate) const TAGS: usize = 2 * size_of::<Mac>();
/// Bytes of a tag.
pub(crate) const TAG: usize = size_of::<Tag>();

/// A frame's tags: none, one, or two of which the outer one is a service tag.
#[derive(Clone, Copy, Default)]
pub(crate) struct Tags {
    /// The outer one, or the only one.
    pub(crate) outer: Tag,
    /// The inner one.
    pub(crate) inner: Tag,
}

/// What a tag begins with.
#[inline(always)]
fn ethertype([a, b, ..]: Tag) -> u16 {
    u16::from_be_bytes([a, b])
}

/// The VLAN that a tag names.
#[inline(always)]
fn vlan([.., c, d]: Tag) -> u16 {
    u16::from_be_bytes([c, d]) & 0xfff
}

/// Whether a tag begins here.
#[inline(always)]
pub(crate) fn is_tag(bytes: Tag) -> bool {
    matches!(ethertype(bytes), ETHERTYPE_VLAN | ETHERTYPE_SERVICE_VLAN)
}

impl Tags {
    /// A tag, and what follows it, be it another one or not.
    #[inline(always)]
    pub(crate) fn of(outer: Tag, inner: Tag) -> Self {
        Self { outer, inner: if is_tag(inner) { inner } else { [0; TAG] } }
    }

    /// These, unless what follows two of them is yet another one.
    #[inline(always)]
    pub(crate) fn alone(self, next: [u8; 2]) -> Option<Self> {
        let [a, b] = next;
        (!self.are_two() || !is_tag([a, b, 0, 0])).then_some(self)
    }

    /// Whether there is one at all.
    #[inline(always)]
    pub(crate) fn is_empty(self) -> bool {
        self.outer == [0; TAG]
    }

    /// Whether there are two.
    #[inline(always)]
    pub(crate) fn are_two(self) -> bool {
        self.inner != [0; TAG]
    }

    /// As a frame that comes by `ifindex` is known by; nothing where no interface has tags of these kinds in this order.
    #[inline(always)]
    fn key(self, ifindex: u32) -> Option<VlanKey> {
        let (outer, inner) = (vlan(self.outer), vlan(self.inner));
        let (service_vlan, vlan) = match (ethertype(self.outer), ethertype(self.inner)) {
            (ETHERTYPE_VLAN, 0) => (0, outer),
            (ETHERTYPE_SERVICE_VLAN, 0) => (outer, 0),
            (ETHERTYPE_SERVICE_VLAN, ETHERTYPE_VLAN) => (outer, inner),
            _ => return None,
        };
        Some(VlanKey { ifindex, service_vlan, vlan })
    }
}

/// A frame that can have tags.
pub(crate) trait Tagging: Frame {
    /// The kernel's index of the interface that it came by.
    fn by(&self) -> u32;
    /// The tags that it has; nothing where they are more than two, or no frame follows them.
    fn tags(&self) -> Option<Tags>;
    /// Takes these off, which it has.
    fn untag(&mut self, tags: Tags) -> Option<()>;
    /// Puts these on.
    fn tag(&mut self, tags: Tags) -> Option<()>;
}

/// How a frame came, and the tags that were taken off it.
///
/// In memory of a map's while the path has it: a function's stack is bounded, and of what is there the kernel's verifier knows nothing, so
/// that it goes each way once.
#[derive(Clone, Copy)]
pub(crate) struct Came {
    ifindex: u32,
    /// What was taken off.
    pub(crate) tags: Tags,
}

/// Takes the tags off a frame, if they stand for an interface; a tag that says nothing but a priority (VLAN 0) changes nothing about what it
/// came by. Returns the index in `interfaces` of what it came by; 0: the tags stand for nothing, and are where they were.
///
/// Not inlined, as the others: the kernel bounds a function's stack.
#[inline(never)]
pub(crate) fn enter<F: Tagging>(frame: &mut F) -> u32 {
    if find(frame).is_none() {
        return 0;
    }
    ifindex()
}

#[inline(always)]
fn find<F: Tagging>(frame: &mut F) -> Option<()> {
    let came = CAME.get_ptr_mut(0)?;
    let (tags, mut ifindex) = (frame.tags()?, frame.by());
    if !tags.is_empty() {
        let key = tags.key(ifindex)?;
        if (key.service_vlan, key.vlan) != (0, 0) {
            // SAFETY: copied at once; the agent replaces a value by one update, which the kernel makes a new entry.
            ifindex = *unsafe { VLANS.get(key) }?;
        }
        frame.untag(tags)?;
    }
    // SAFETY: the map returned a pointer to this CPU's own value, which outlives the run, and programs do not nest on a CPU.
    unsafe { *came = Came { ifindex, tags } };
    Some(())
}

/// What the frame at hand came by, as [`enter`] has found.
#[inline(always)]
pub(crate) fn ifindex() -> u32 {
    // SAFETY: as above.
    CAME.get_ptr_mut(0).map_or(0, |came| unsafe { (&raw const (*came).ifindex).read_volatile() })
}

/// Puts the tags of the interface with this slot on a frame. Says whether it could.
#[inline(always)]
pub(crate) fn leave<F: Tagging>(frame: &mut F, slot: u16) -> bool {
    let Some(&Trunk { outer, inner, .. }) = TRUNKS.get(slot.into()) else { return false };
    frame.tag(Tags { outer, inner }).is_some()
}

/// Puts the tags on that [`enter`] has taken off the frame at hand, if it had some. Says whether it could.
#[inline(never)]
pub(crate) fn back<F: Tagging>(frame: &mut F) -> bool {
    let Some(came) = CAME.get_ptr_mut(0) else { return false };
    // SAFETY: as above.
    let tags = unsafe { (*came).tags };
    tags.is_empty() || frame.tag(tags).is_some()
}
