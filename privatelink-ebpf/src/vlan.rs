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
    /// The tags that it has; nothing where they are more than two, or no frame follows them.
    fn tags(&self) -> Option<Tags>;
    /// Takes these off, which it has.
    fn untag(&mut self, tags: Tags) -> Option<()>;
    /// Puts these on.
    fn tag(&mut self, tags: Tags) -> Option<()>;
}

/// How a frame came.
#[derive(Clone, Copy)]
pub(crate) struct Came {
    /// The index in `interfaces` of what it came by.
    pub(crate) ifindex: u32,
    /// The tags that were taken off.
    tags: Tags,
}

impl Came {
    /// Without any that were taken off.
    #[inline(always)]
    pub(crate) fn plainly(ifindex: u32) -> Self {
        Self { ifindex, tags: Tags::default() }
    }
}

/// Takes the tags off a frame that came by `ifindex`, if they stand for an interface; a tag that says nothing but a priority (VLAN 0)
/// changes nothing about what it came by. Nothing: the tags stand for nothing, and are where they were.
///
/// How it came is told in memory of the map's, of which the kernel's verifier knows nothing, so that it goes on from here once. Not
/// inlined: the kernel bounds a function's stack.
#[inline(never)]
pub(crate) fn enter<F: Tagging>(frame: &mut F, ifindex: u32) -> Option<&'static Came> {
    let came = CAME.get_ptr_mut(0)?;
    let tags = frame.tags()?;
    let mut index = ifindex;
    if !tags.is_empty() {
        let key = tags.key(ifindex)?;
        if (key.service_vlan, key.vlan) != (0, 0) {
            // SAFETY: copied at once; the agent replaces a value by one update, which the kernel makes a new entry.
            index = *unsafe { VLANS.get(&key) }?;
        }
        frame.untag(tags)?;
    }
    // SAFETY: the map returned a pointer to this CPU's own value, which outlives the run, and programs do not nest on a CPU.
    unsafe {
        *came = Came { ifindex: index, tags };
        Some(&*came)
    }
}

/// Puts the tags of the interface with this slot on a frame. Says whether it could.
#[inline(never)]
pub(crate) fn leave<F: Tagging>(frame: &mut F, slot: u16) -> bool {
    let Some(&Trunk { outer, inner, .. }) = TRUNKS.get(slot.into()) else { return false };
    frame.tag(Tags { outer, inner }).is_some()
}

/// Puts the tags on that a frame came with, if it had some. Says whether it could.
#[inline(always)]
pub(crate) fn back<F: Tagging>(frame: &mut F, came: Came) -> bool {
    came.tags.is_empty() || put(frame, &came.tags)
}

#[inline(never)]
fn put<F: Tagging>(frame: &mut F, tags: &Tags) -> bool {
    frame.tag(*tags).is_some()
}
