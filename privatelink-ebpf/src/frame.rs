//! [`Frame`] over what the kernel hands to each hook: an XDP buffer, or a socket buffer.

use crate::maps::CHUNK;
use crate::vlan::{TAG, TAGS, Tagging, Tags, is_tag};
use aya_ebpf::{
    bindings::{
        __sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM,
        bpf_adj_room_mode::BPF_ADJ_ROOM_NET, xdp_md,
    },
    helpers::generated::{
        bpf_csum_diff, bpf_l4_csum_replace, bpf_loop, bpf_skb_adjust_room, bpf_skb_change_head,
        bpf_skb_change_proto, bpf_skb_change_tail, bpf_skb_load_bytes, bpf_skb_pull_data,
        bpf_skb_store_bytes, bpf_skb_vlan_pop, bpf_skb_vlan_push, bpf_xdp_adjust_head, bpf_xdp_adjust_tail,
        bpf_xdp_get_buff_len, bpf_xdp_load_bytes,
    },
    programs::{TcContext, XdpContext},
};
use core::ffi::c_void;
use core::mem::{MaybeUninit, offset_of, size_of};
use privatelink_common::checksum::fold;
use privatelink_common::frame::{Change, DIFFERENCE, Frame};
use privatelink_common::tables::Tag;
use privatelink_common::wire::{
    ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ethernet, ICMP, ICMPV6, IcmpError, Ipv4Header, Ipv6Header, NETWORK, TCP,
    TRANSPORT, TRANSPORT6, Tcp, Udp,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// A pointer to `offset`, if a `T` is there as a whole.
///
/// The comparison is between pointers, with the end on one side: that is the form from which the verifier learns how far the
/// packet reaches. `offset` is a constant at every call, once inlined.
#[inline(always)]
fn at<T>((data, end): (*mut u8, *mut u8), offset: usize) -> Option<*mut T> {
    let start = data.wrapping_add(offset);
    if start.wrapping_add(size_of::<T>()) > end {
        return None;
    }
    Some(start.cast())
}

/// The word of a packet at a pointer, wherever that is; the compiler, which does not know that the kernel's machines take words from
/// anywhere, would take its bytes one by one. (LLVM can be told so, but then does the same on the stack, where the verifier refuses it.)
macro_rules! load {
    ($word:literal, $from:expr) => {{
        let word: u64;
        core::arch::asm!(concat!("{word} = *(", $word, " *)({from} + 0)"), word = out(reg) word, from = in(reg) $from,
            options(pure, readonly, nostack, preserves_flags));
        word
    }};
}

/// Puts a word there.
macro_rules! store {
    ($word:literal, $to:expr, $value:expr) => {
        core::arch::asm!(concat!("*(", $word, " *)({to} + 0) = {word}"), word = in(reg) u64::from($value), to = in(reg) $to,
            options(nostack, preserves_flags))
    };
}

/// A field of a context that holds a pointer into the packet. It seems to be 32 bits, and the kernel replaces it by a load of the whole
/// pointer: the compiler, which would take the upper bits for zeros, must see neither.
macro_rules! pointer {
    ($context:expr, $field:expr) => {{
        let pointer: *mut u8;
        // SAFETY: the field is within the kernel's context, which outlives the program's run.
        unsafe {
            core::arch::asm!("{pointer} = *(u32 *)({context} + {field})", pointer = out(reg) pointer,
                context = in(reg) $context, field = const $field, options(readonly, nostack, preserves_flags));
        }
        pointer
    }};
}

/// A copy of the `T` at `offset`. By words of 32 bits, of which headers are made: longer ones would lie across fields, which then have to be
/// put together again. Only an address of IPv6 is longer.
#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "a word has as many bits as were loaded")]
fn read<T: FromBytes + Copy>(bounds: (*mut u8, *mut u8), offset: usize) -> Option<T> {
    let from: *const u8 = at::<T>(bounds, offset)?.cast();
    let mut value = MaybeUninit::<T>::uninit();
    let (to, size): (*mut u8, _) = (value.as_mut_ptr().cast(), size_of::<T>());
    // SAFETY: `at` proved that the bytes are within the frame; the words are within them and a `T`, and are all of it, of which any bytes
    // are one.
    unsafe {
        if size == 16 {
            to.cast::<u64>().write_unaligned(load!("u64", from));
            to.add(8).cast::<u64>().write_unaligned(load!("u64", from.add(8)));
            return Some(value.assume_init());
        }
        for at in 0..size / 4 {
            to.add(at * 4).cast::<u32>().write_unaligned(load!("u32", from.add(at * 4)) as u32);
        }
        if size & 2 != 0 {
            let at = size & !3;
            to.add(at).cast::<u16>().write_unaligned(load!("u16", from.add(at)) as u16);
        }
        if size & 1 != 0 {
            to.add(size - 1).write(from.add(size - 1).read());
        }
        Some(value.assume_init())
    }
}

/// Puts `value` at `offset`.
#[inline(always)]
fn write<T: IntoBytes + Immutable>(bounds: (*mut u8, *mut u8), offset: usize, value: &T) -> Option<()> {
    let to: *mut u8 = at::<T>(bounds, offset)?.cast();
    let (from, size): (*const u8, _) = (core::ptr::from_ref(value).cast(), size_of::<T>());
    // SAFETY: as above; `T` has no padding, so `value` is bytes as a whole.
    unsafe {
        if size == 16 {
            store!("u64", to, from.cast::<u64>().read_unaligned());
            store!("u64", to.add(8), from.add(8).cast::<u64>().read_unaligned());
            return Some(());
        }
        for at in 0..size / 4 {
            store!("u32", to.add(at * 4), from.add(at * 4).cast::<u32>().read_unaligned());
        }
        if size & 2 != 0 {
            let at = size & !3;
            store!("u16", to.add(at), from.add(at).cast::<u16>().read_unaligned());
        }
        if size & 1 != 0 {
            to.add(size - 1).write(from.add(size - 1).read());
        }
    }
    Some(())
}

/// Bytes that are summed at a time: as many as the helper takes on every kernel.
const CHUNK_SIZE: u32 = 512;

/// So many bytes of a frame, and a word more: what the last one is padded with.
pub(crate) type Chunk = [u32; CHUNK_SIZE as usize / 4 + 1];

/// A frame of which a helper copies bytes, wherever they are: in the linear part, or in others behind it.
trait Scattered {
    /// What helpers know it by.
    type Context;

    /// That of this frame.
    fn scattered(&self) -> *mut Self::Context;

    /// Copies `len` bytes at `offset` to `chunk`, and says whether it could.
    ///
    /// # Safety
    /// The context is a frame's of the program's run.
    unsafe fn load(context: *mut Self::Context, offset: u32, chunk: &mut Chunk, len: u32) -> bool;
}

/// A sum of bytes of a frame. Of its context, and not of the frame itself: the compiler would take that for changed by every helper from
/// there on, and the verifier would walk more ways.
struct Summing<F: Scattered> {
    context: *mut F::Context,
    offset: u32,
    /// Which of them is the last one, counted from zero.
    last: u32,
    /// Of the chunks so far; more than 32 bits where one could not be summed.
    sum: u64,
}

/// Sums `len` bytes at `offset`. The verifier walks what the helper is to repeat as if it came once, however many chunks there are.
#[inline(always)]
fn sum<F: Scattered>(frame: &F, offset: usize, len: u16) -> Option<u16> {
    let Some(last) = u32::from(len).checked_sub(1) else { return Some(0) };
    #[allow(clippy::cast_possible_truncation, reason = "an offset into the headers")]
    let mut summing = Summing::<F> { context: frame.scattered(), offset: offset as u32, last, sum: 0 };
    let (chunks, each) = (last / CHUNK_SIZE + 1, add::<F> as *const () as *mut c_void);
    // SAFETY: the helper calls `add` with what it is given, which outlives the call, and is nobody else's meanwhile.
    unsafe { bpf_loop(chunks, each, (&raw mut summing).cast(), 0) };
    u32::try_from(summing.sum).ok().map(fold)
}

/// Adds the chunk with this number. Returns 1 where nothing is to follow.
extern "C" fn add<F: Scattered>(number: u64, summing: *mut Summing<F>) -> u64 {
    // SAFETY: `sum` has asked for this call, with a pointer of its own.
    let summing = unsafe { &mut *summing };
    summing.sum = next(summing, number).unwrap_or(u64::MAX);
    (summing.sum > u32::MAX.into()).into()
}

#[inline(always)]
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a sum of 32 bits, or an error")]
fn next<F: Scattered>(summing: &Summing<F>, number: u64) -> Option<u64> {
    let chunk = CHUNK.get_ptr_mut(0)?;
    // SAFETY: the map returned a pointer to this CPU's own value, programs do not nest on a CPU, and nothing else refers to it.
    let chunk = unsafe { &mut *chunk };
    let before = number as u32 * CHUNK_SIZE;
    // Put in such a way that the verifier sees, too, that it is neither zero nor more than a chunk.
    let len = summing.last.checked_sub(before)?.min(CHUNK_SIZE - 1) + 1;
    *chunk.get_mut(len as usize / 4)? = 0;
    // SAFETY: `sum` has the context from the frame.
    unsafe { F::load(summing.context, summing.offset + before, chunk, len) }.then_some(())?;
    let (padded, seed) = (len.next_multiple_of(4), summing.sum as u32);
    // SAFETY: the helper reads so many bytes of the chunk, which has a word more than `len` says.
    Some(unsafe { bpf_csum_diff(core::ptr::null_mut(), 0, chunk.as_mut_ptr(), padded, seed) } as u64)
}

/// Bytes of a socket buffer that are moved towards its end.
struct Moving {
    context: *mut __sk_buff,
    offset: u32,
    /// How many of them are still to be moved.
    left: u32,
    by: u32,
}

/// Moves `len` bytes at `offset` so many bytes towards the end, where there is room, the last ones first. Walked by the verifier as
/// [`sum`] is.
#[inline(always)]
fn shift(context: *mut __sk_buff, offset: u32, len: u32, by: u32) -> Option<()> {
    let mut moving = Moving { context, offset, left: len, by };
    let (chunks, each) = (len.div_ceil(CHUNK_SIZE), shift_last as *const () as *mut c_void);
    // SAFETY: the helper calls `shift_last` with what it is given, which outlives the call, and is nobody else's meanwhile.
    unsafe { bpf_loop(chunks, each, (&raw mut moving).cast(), 0) };
    (moving.left == 0).then_some(())
}

/// Moves the last chunk. Returns 1 where nothing is to follow.
extern "C" fn shift_last(_: u64, moving: *mut Moving) -> u64 {
    // SAFETY: `shift` has asked for this call, with a pointer of its own.
    let moving = unsafe { &mut *moving };
    u64::from(shifted(moving).is_none())
}

#[inline(always)]
fn shifted(moving: &mut Moving) -> Option<()> {
    let chunk = CHUNK.get_ptr_mut(0)?.cast();
    // Put in such a way that the verifier sees, too, that it is neither zero nor more than a chunk.
    let len = moving.left.checked_sub(1)?.min(CHUNK_SIZE - 1) + 1;
    let left = moving.left - len;
    let from = moving.offset + left;
    // SAFETY: the helpers check the offsets; the map returned a pointer to this CPU's own value, which is longer than `len`, programs do not
    // nest on a CPU, and nothing else refers to it.
    let result = unsafe {
        bpf_skb_load_bytes(moving.context.cast(), from, chunk, len)
            | bpf_skb_store_bytes(moving.context, from + moving.by, chunk, len, 0)
    };
    (result == 0).then_some(())?;
    moving.left = left;
    Some(())
}

/// The frame that an XDP program was called for.
pub(crate) struct XdpFrame {
    context: *mut xdp_md,
}

impl XdpFrame {
    #[inline(always)]
    pub(crate) fn new(context: *mut xdp_md) -> Self {
        Self { context }
    }

    /// The context, for helpers.
    #[inline(always)]
    pub(crate) fn context(&self) -> XdpContext {
        XdpContext::new(self.context)
    }

    /// The kernel's index of the interface that it came by.
    #[inline(always)]
    pub(crate) fn ingress(&self) -> u32 {
        // SAFETY: the kernel's context outlives the program's run.
        unsafe { (&raw const (*self.context).ingress_ifindex).read_volatile() }
    }

    /// Where the packet's linear part begins and ends.
    #[inline(always)]
    fn bounds(&self) -> (*mut u8, *mut u8) {
        (
            pointer!(self.context, offset_of!(xdp_md, data)),
            pointer!(self.context, offset_of!(xdp_md, data_end)),
        )
    }
}

impl Scattered for XdpFrame {
    type Context = xdp_md;

    #[inline(always)]
    fn scattered(&self) -> *mut xdp_md {
        self.context
    }

    #[inline(always)]
    unsafe fn load(context: *mut xdp_md, offset: u32, chunk: &mut Chunk, len: u32) -> bool {
        // SAFETY: the helper checks the offset; `len` is not above what a chunk has, which the verifier sees to.
        unsafe { bpf_xdp_load_bytes(context, offset, chunk.as_mut_ptr().cast(), len) == 0 }
    }
}

impl Tagging for XdpFrame {
    #[inline(always)]
    fn by(&self) -> u32 {
        self.ingress()
    }

    #[inline(always)]
    fn tags(&self) -> Option<Tags> {
        let outer: Tag = self.read(TAGS)?;
        if !is_tag(outer) {
            return Some(Tags::default());
        }
        self.read(TAGS + TAG).map(|inner| Tags::of(outer, inner))?.alone(self.read(TAGS + 2 * TAG)?)
    }

    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, clippy::cast_possible_wrap, reason = "eight at most")]
    fn untag(&mut self, tags: Tags) -> Option<()> {
        let macs: [u8; TAGS] = self.read(0)?;
        let length = if tags.are_two() {
            self.write(2 * TAG, &macs)?;
            2 * TAG
        } else {
            self.write(TAG, &macs)?;
            TAG
        };
        // SAFETY: the helper checks the context and the amount; pointers into the packet are derived anew at every access.
        let result = unsafe { bpf_xdp_adjust_head(self.context, length as i32) };
        (result == 0).then_some(())
    }

    #[inline(always)]
    fn tag(&mut self, tags: Tags) -> Option<()> {
        if tags.are_two() {
            self.prepend(2 * TAG)?;
            let macs: [u8; TAGS] = self.read(2 * TAG)?;
            self.write(0, &macs)?;
            self.write(TAGS + TAG, &tags.inner)?;
        } else {
            self.prepend(TAG)?;
            let macs: [u8; TAGS] = self.read(TAG)?;
            self.write(0, &macs)?;
        }
        self.write(TAGS, &tags.outer)
    }
}

impl Frame for XdpFrame {
    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "a frame's length")]
    fn len(&self) -> usize {
        // SAFETY: the helper reads the context it is given, which is the kernel's own.
        unsafe { bpf_xdp_get_buff_len(self.context) as usize }
    }

    /// The helper, which counts fragments too, is a call that most frames can do without.
    #[inline(always)]
    fn holds(&self, len: usize) -> bool {
        let (data, end) = self.bounds();
        len <= end as usize - data as usize || len <= self.len()
    }

    #[inline(always)]
    fn read<T: FromBytes + Copy>(&self, offset: usize) -> Option<T> {
        read(self.bounds(), offset)
    }

    #[inline(always)]
    fn write<T: IntoBytes + Immutable>(&mut self, offset: usize, value: &T) -> Option<()> {
        write(self.bounds(), offset, value)
    }

    #[inline(always)]
    fn sum(&self, offset: usize, len: u16) -> Option<u16> {
        sum(self, offset, len)
    }

    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, clippy::cast_possible_wrap, reason = "a frame's length")]
    fn truncate(&mut self, len: usize) -> Option<()> {
        let excess = self.len().checked_sub(len)?;
        // SAFETY: the helper checks the context and the amount; pointers into the packet are derived anew at every access.
        let result = unsafe { bpf_xdp_adjust_tail(self.context, -(excess as i32)) };
        (result == 0).then_some(())
    }

    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, clippy::cast_possible_wrap, reason = "a frame's length")]
    fn extend(&mut self, len: usize) -> Option<()> {
        let missing = len.checked_sub(self.len())?;
        // SAFETY: as above.
        let result = unsafe { bpf_xdp_adjust_tail(self.context, missing as i32) };
        (result == 0).then_some(())
    }

    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, clippy::cast_possible_wrap, reason = "twenty")]
    fn change_family(&mut self, to_ipv6: bool) -> Option<()> {
        let by = if to_ipv6 { -(DIFFERENCE as i32) } else { DIFFERENCE as i32 };
        // SAFETY: as above.
        let result = unsafe { bpf_xdp_adjust_head(self.context, by) };
        (result == 0).then_some(())
    }

    #[inline(always)]
    fn move_payload(&mut self, by: i32) -> Option<()> {
        // SAFETY: as above.
        let result = unsafe { bpf_xdp_adjust_head(self.context, -by) };
        (result == 0).then_some(())
    }

    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, clippy::cast_possible_wrap, reason = "a header's length")]
    fn prepend(&mut self, len: usize) -> Option<()> {
        // SAFETY: as above.
        let result = unsafe { bpf_xdp_adjust_head(self.context, -(len as i32)) };
        (result == 0).then_some(())
    }

    /// Twice a number that only the kernel knows cancels out, which neither the compiler nor the verifier can see.
    #[inline(always)]
    fn blur(&self, number: u64) -> u64 {
        let (once, again) = (u64::from(self.ingress()), u64::from(self.ingress()));
        number ^ (once << 32 | once) ^ (again << 32 | again)
    }
}

/// The frame that a TCX program was called for. It may be one of 64 KiB that a device has yet to cut into segments (GSO), and its
/// transport checksum may be one that a device has yet to complete.
pub(crate) struct SkbFrame {
    context: *mut __sk_buff,
}

impl SkbFrame {
    /// The frame as it is.
    #[inline(always)]
    pub(crate) fn bare(context: *mut __sk_buff) -> Self {
        Self { context }
    }

    /// The frame, with its headers where they can be read: only they need to be in the linear part.
    #[inline(always)]
    pub(crate) fn new(context: *mut __sk_buff) -> Self {
        let frame = Self::bare(context);
        if frame.is_ipv6() {
            frame.pull(TRANSPORT6 + size_of::<Tcp>());
            if frame.read::<u8>(NETWORK + offset_of!(Ipv6Header, next_header)) == Some(ICMPV6) {
                // An error holds the headers of another packet; a message of neighbour discovery is shorter.
                frame.pull(TRANSPORT6 + size_of::<IcmpError>() + size_of::<Ipv6Header>() + size_of::<Tcp>());
            }
            return frame;
        }
        frame.pull(TRANSPORT + size_of::<Tcp>());
        if frame.read::<u8>(NETWORK + offset_of!(Ipv4Header, protocol)) == Some(ICMP) {
            // An error holds the headers of another packet.
            frame.pull(TRANSPORT + size_of::<IcmpError>() + size_of::<Ipv4Header>() + size_of::<Tcp>());
        }
        frame
    }

    #[inline(always)]
    fn is_ipv6(&self) -> bool {
        self.read::<Ethernet>(0).is_some_and(|ethernet| ethernet.ethertype.get() == ETHERTYPE_IPV6)
    }

    /// Moves so many bytes into the linear part, with what options there are, if they are not there.
    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "the length of headers")]
    fn pull(&self, headers: usize) {
        let (data, end) = self.bounds();
        let (linear, len) = (end as usize - data as usize, self.len());
        /// As many as TCP may have.
        const OPTIONS: usize = 40;
        if linear < headers && linear < len {
            // SAFETY: the helper checks the context and the length; where it fails, the path reads less.
            unsafe { bpf_skb_pull_data(self.context, (headers + OPTIONS).min(len) as u32) };
        }
    }

    /// The context, for helpers.
    #[inline(always)]
    pub(crate) fn context(&self) -> TcContext {
        TcContext::new(self.context)
    }

    /// A word of the context. Volatile, since the kernel replaces it by a load of its own: the compiler must not widen it.
    #[inline(always)]
    pub(crate) fn word(&self, offset: usize) -> u32 {
        // SAFETY: the offsets below are those of aligned words of the context, which outlives the program's run.
        unsafe { self.context.cast::<u8>().add(offset).cast::<u32>().read_volatile() }
    }

    /// The kernel's index of the interface that it came by.
    #[inline(always)]
    pub(crate) fn ingress(&self) -> u32 {
        self.word(offset_of!(__sk_buff, ifindex))
    }

    /// Whether it has a VLAN tag: the kernel keeps the outer one beside the frame.
    #[inline(always)]
    pub(crate) fn is_tagged(&self) -> bool {
        self.word(offset_of!(__sk_buff, vlan_present)) != 0
    }

    /// The tag that the kernel keeps beside the frame, where there is one.
    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "16 bits each")]
    pub(crate) fn beside(&self) -> Tag {
        let [a, b] = (self.word(offset_of!(__sk_buff, vlan_proto)) as u16).to_ne_bytes();
        let [c, d] = (self.word(offset_of!(__sk_buff, vlan_tci)) as u16).to_be_bytes();
        [a, b, c, d]
    }

    /// Puts a tag around the frame, and around those that it has.
    #[inline(always)]
    fn push(&mut self, [a, b, c, d]: Tag) -> Option<()> {
        let (ethertype, control) = (u16::from_ne_bytes([a, b]), u16::from_be_bytes([c, d]));
        // SAFETY: as in `add_to_checksum`.
        let result = unsafe { bpf_skb_vlan_push(self.context, ethertype, control) };
        (result == 0).then_some(())
    }

    /// Takes the outer tag off.
    #[inline(always)]
    fn pop(&mut self) -> Option<()> {
        // SAFETY: as in `add_to_checksum`.
        let result = unsafe { bpf_skb_vlan_pop(self.context) };
        (result == 0).then_some(())
    }

    /// How many packets, and how many bytes in all, a frame of `length` is on the wire.
    #[inline(always)]
    pub(crate) fn wire(&self, length: u64) -> (u64, u64) {
        let size = u64::from(self.word(offset_of!(__sk_buff, gso_size)));
        if size == 0 {
            return (1, length);
        }
        let headers = self.headers();
        // What comes from a virtual machine may not say how many segments it is.
        let segments = match u64::from(self.word(offset_of!(__sk_buff, gso_segs))) {
            0 => length.saturating_sub(headers).div_ceil(size).max(1),
            segments => segments,
        };
        (segments, length + (segments - 1) * headers)
    }

    /// Bytes that every segment begins with; nothing for what is not the path's.
    #[inline(always)]
    fn headers(&self) -> u64 {
        match self.read::<Ethernet>(0).map(|ethernet| ethernet.ethertype.get()) {
            Some(ETHERTYPE_IPV4) => self.transport::<TRANSPORT>(offset_of!(Ipv4Header, protocol)),
            Some(ETHERTYPE_IPV6) => self.transport::<TRANSPORT6>(offset_of!(Ipv6Header, next_header)),
            _ => 0,
        }
    }

    /// Bytes to the end of a transport header at `AT`; the network header says at `protocol` what it is.
    #[inline(always)]
    fn transport<const AT: usize>(&self, protocol: usize) -> u64 {
        if self.read::<u8>(NETWORK + protocol) != Some(TCP) {
            return (AT + size_of::<Udp>()) as u64;
        }
        let words = self.read::<u8>(AT + offset_of!(Tcp, data_offset)).unwrap_or_default() >> 4;
        AT as u64 + u64::from(words) * 4
    }

    /// Where the packet's linear part begins and ends.
    #[inline(always)]
    fn bounds(&self) -> (*mut u8, *mut u8) {
        (
            pointer!(self.context, offset_of!(__sk_buff, data)),
            pointer!(self.context, offset_of!(__sk_buff, data_end)),
        )
    }

    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "a frame's length")]
    fn change_tail(&mut self, len: usize) -> Option<()> {
        // SAFETY: the helper checks the context and the length; pointers into the packet are derived anew at every access.
        let result = unsafe { bpf_skb_change_tail(self.context, len as u32, 0) };
        (result == 0).then_some(())
    }

    /// Adds `difference` to a transport checksum, unless it is one that is still to be completed and `flags` do not say that this is
    /// about the pseudo header.
    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "an offset into the headers")]
    fn add_to_checksum(&mut self, offset: usize, difference: u64, flags: u32) -> Option<()> {
        // SAFETY: the helper checks the context and the offset; pointers into the packet are derived anew at every access.
        let result =
            unsafe { bpf_l4_csum_replace(self.context, offset as u32, 0, difference, u64::from(flags)) };
        (result == 0).then_some(())
    }
}

impl Scattered for SkbFrame {
    type Context = __sk_buff;

    #[inline(always)]
    fn scattered(&self) -> *mut __sk_buff {
        self.context
    }

    #[inline(always)]
    unsafe fn load(context: *mut __sk_buff, offset: u32, chunk: &mut Chunk, len: u32) -> bool {
        // SAFETY: as of `XdpFrame`.
        unsafe { bpf_skb_load_bytes(context.cast(), offset, chunk.as_mut_ptr().cast(), len) == 0 }
    }
}

impl Tagging for SkbFrame {
    #[inline(always)]
    fn by(&self) -> u32 {
        self.ingress()
    }

    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "16 bits each")]
    fn tags(&self) -> Option<Tags> {
        if !self.is_tagged() {
            return Some(Tags::default());
        }
        self.pull(TAGS + 2 * TAG);
        self.read(TAGS).map(|inner| Tags::of(self.beside(), inner))?.alone(self.read(TAGS + TAG)?)
    }

    /// The inner tag comes to be beside the frame when the outer one goes.
    #[inline(always)]
    fn untag(&mut self, tags: Tags) -> Option<()> {
        self.pop()?;
        if tags.are_two() { self.pop() } else { Some(()) }
    }

    #[inline(always)]
    fn tag(&mut self, tags: Tags) -> Option<()> {
        if tags.are_two() {
            self.push(tags.inner)?;
        }
        self.push(tags.outer)
    }
}

impl Frame for SkbFrame {
    #[inline(always)]
    fn len(&self) -> usize {
        self.word(offset_of!(__sk_buff, len)) as usize
    }

    #[inline(always)]
    fn read<T: FromBytes + Copy>(&self, offset: usize) -> Option<T> {
        read(self.bounds(), offset)
    }

    #[inline(always)]
    fn write<T: IntoBytes + Immutable>(&mut self, offset: usize, value: &T) -> Option<()> {
        write(self.bounds(), offset, value)
    }

    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "an offset into the headers and their length")]
    fn write_summed<T: IntoBytes + Immutable>(&mut self, offset: usize, value: &T) -> Option<()> {
        let (from, len) = (core::ptr::from_ref(value).cast(), size_of::<T>() as u32);
        let flags = BPF_F_RECOMPUTE_CSUM.into();
        // SAFETY: the helper checks the context and the offset, and reads `value`, which is bytes as a whole.
        let result = unsafe { bpf_skb_store_bytes(self.context, offset as u32, from, len, flags) };
        (result == 0).then_some(())
    }

    #[inline(always)]
    fn ip_length(&self, stored: u16) -> usize {
        if stored == 0 && self.word(offset_of!(__sk_buff, gso_size)) != 0 {
            return self.len() - NETWORK;
        }
        stored.into()
    }

    /// By the helper, which alone knows whether the checksum is complete.
    #[inline(always)]
    fn change_checksum(&mut self, offset: usize, _: [u8; 2], is_tcp: bool, change: Change) -> Option<()> {
        let udp = if is_tcp { 0 } else { BPF_F_MARK_MANGLED_0 };
        self.add_to_checksum(offset, change.pseudo.into(), udp | BPF_F_PSEUDO_HDR)?;
        self.add_to_checksum(offset, change.header.into(), udp)
    }

    /// What a checksum that is still to be completed begins with is put there, and the helper is asked to make of it what a complete
    /// one is: it does so only where that is wanted.
    #[inline(always)]
    fn set_checksum(&mut self, offset: usize, pseudo: u32, rest: u32) -> Option<()> {
        let begun = fold(pseudo);
        self.write(offset, &begun.to_ne_bytes())?;
        self.add_to_checksum(offset, u64::from(fold(pseudo + rest)) + u64::from(begun), 0)
    }

    #[inline(always)]
    fn sum(&self, offset: usize, len: u16) -> Option<u16> {
        (self.word(offset_of!(__sk_buff, gso_size)) == 0).then_some(())?;
        sum(self, offset, len)
    }

    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "shorter than a packet")]
    fn largest(&self, length: u16) -> u32 {
        match self.word(offset_of!(__sk_buff, gso_size)) {
            0 => length.into(),
            size => (self.headers() as u32).saturating_sub(NETWORK as u32) + size,
        }
    }

    /// At the end, and what follows is moved there: where a checksum begins that is still to be completed, no helper moves.
    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "a frame's length")]
    fn insert<const AT: usize>(&mut self, at: usize, len: usize) -> Option<()> {
        let end = self.len();
        let follows = end.checked_sub(at)?;
        self.extend(end + len)?;
        shift(self.context, at as u32, follows as u32, len as u32)
    }

    /// At the end, as above.
    #[inline(always)]
    fn resize(&mut self, len: usize) -> Option<()> {
        self.change_tail(len)
    }

    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "a header's length")]
    fn prepend(&mut self, len: usize) -> Option<()> {
        // SAFETY: as in `add_to_checksum`.
        let result = unsafe { bpf_skb_change_head(self.context, len as u32, 0) };
        (result == 0).then_some(())
    }

    #[inline(always)]
    fn move_payload(&mut self, by: i32) -> Option<()> {
        // SAFETY: as in `add_to_checksum`.
        let result = unsafe { bpf_skb_adjust_room(self.context, by, BPF_ADJ_ROOM_NET, 0) };
        (result == 0).then_some(())
    }

    /// The helper also makes one packet of what was to be cut into segments.
    #[inline(always)]
    fn truncate(&mut self, len: usize) -> Option<()> {
        // A shorter one would be made longer.
        self.holds(len).then_some(())?;
        self.change_tail(len)
    }

    #[inline(always)]
    fn extend(&mut self, len: usize) -> Option<()> {
        // A longer one would be made shorter.
        (self.len() <= len).then_some(())?;
        self.change_tail(len)
    }

    /// The helper also tells the kernel what the frame is now, and into which segments it is to be cut.
    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "an EtherType")]
    fn change_family(&mut self, to_ipv6: bool) -> Option<()> {
        let ethertype = if to_ipv6 { ETHERTYPE_IPV6 } else { ETHERTYPE_IPV4 };
        // SAFETY: as in `add_to_checksum`.
        let result = unsafe { bpf_skb_change_proto(self.context, ethertype.to_be(), 0) };
        (result == 0).then_some(())
    }

    /// Twice a number that only the kernel knows cancels out, which neither the compiler nor the verifier can see.
    #[inline(always)]
    fn blur(&self, number: u64) -> u64 {
        let (once, again) = (u64::from(self.ingress()), u64::from(self.ingress()));
        number ^ (once << 32 | once) ^ (again << 32 | again)
    }
}
