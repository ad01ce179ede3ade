//! [`Frame`] over an XDP buffer.

use aya_ebpf::{
    bindings::xdp_md,
    helpers::generated::{bpf_xdp_adjust_head, bpf_xdp_adjust_tail, bpf_xdp_get_buff_len},
    programs::XdpContext,
};
use core::mem::size_of;
use privatelink_common::frame::Frame;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// The frame that the program was called for.
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
        // SAFETY: the kernel's context outlives the program's run. The reads are volatile because the kernel replaces them by loads
        // of pointers: the compiler must neither widen them nor pass their results between functions as the integers they seem.
        let (data, end) = unsafe {
            let context = &*self.context;
            ((&raw const context.data).read_volatile(), (&raw const context.data_end).read_volatile())
        };
        (data as usize as *mut u8, end as usize as *mut u8)
    }

    /// A pointer to `offset`, if a `T` is there as a whole.
    ///
    /// The comparison is between pointers, with the end on one side: that is the form from which the verifier learns how far the
    /// packet reaches. `offset` is a constant once inlined, or a number that is masked just before.
    #[inline(always)]
    fn at<T>(&self, offset: usize) -> Option<*mut T> {
        let (data, end) = self.bounds();
        let start = data.wrapping_add(offset);
        if start.wrapping_add(size_of::<T>()) > end {
            return None;
        }
        Some(start.cast())
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
        // SAFETY: `at` proved that the bytes are within the frame; any bytes are a `T`.
        self.at::<T>(offset).map(|at| unsafe { at.read_unaligned() })
    }

    #[inline(always)]
    fn write<T: IntoBytes + Immutable>(&mut self, offset: usize, value: &T) -> Option<()> {
        let at = self.at::<T>(offset)?;
        // SAFETY: `at` proved that the bytes are within the frame; `T` has no padding, so `value` is bytes as a whole.
        unsafe { core::ptr::copy_nonoverlapping(core::ptr::from_ref(value), at, 1) };
        Some(())
    }

    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, clippy::cast_possible_wrap, reason = "a frame's length")]
    fn truncate(&mut self, len: usize) -> Option<()> {
        let excess = self.len().checked_sub(len)?;
        // SAFETY: the helper checks the context and the amount; pointers into the packet are derived anew at every access.
        let result = unsafe { bpf_xdp_adjust_tail(self.context, -(excess as i32)) };
        (result == 0).then_some(())
    }

    /// Twice a number that only the kernel knows cancels out, which neither the compiler nor the verifier can see.
    #[inline(always)]
    fn blur(&self, number: u64) -> u64 {
        let (once, again) = (u64::from(self.ingress()), u64::from(self.ingress()));
        number ^ (once << 32 | once) ^ (again << 32 | again)
    }

    #[inline(always)]
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_possible_wrap,
        reason = "less than a frame's length"
    )]
    fn grow(&mut self, by: usize) -> Option<()> {
        // SAFETY: as above.
        let result = unsafe { bpf_xdp_adjust_head(self.context, -(by as i32)) };
        (result == 0).then_some(())
    }
}
