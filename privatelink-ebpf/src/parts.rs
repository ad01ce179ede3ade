//! The parts of the path as functions of their own, for each hook. They are global functions to the kernel (their names are
//! exported): its verifier goes through each of them once, whatever comes before, and takes nothing for granted but the types of
//! their arguments (since Linux 5.6; Documentation/bpf/verifier.rst).

use crate::frame::{SkbFrame, XdpFrame};
use crate::tables::{KernelTables, TcxExit, XdpExit};
use aya_ebpf::bindings::{__sk_buff, xdp_md};
use privatelink_common::{
    path::{self, Room},
    verdict::{DropReason, Part, Verdict},
};

/// The parts of a hook's programs.
pub(crate) trait Parts {
    /// Goes through a part of the path for the frame of the program at hand.
    fn part(&self, part: Part, room: &mut Room) -> Verdict;
}

macro_rules! parts {
    ($exit:ident, $context:ty, $frame:expr, { $($part:ident: $name:ident,)+ }) => {
        $(
            #[unsafe(no_mangle)]
            #[inline(never)]
            extern "C" fn $name(context: *mut $context, room: *mut Room) -> u64 {
                // SAFETY: the verifier lets only memory through that is large enough for a room, or nothing. It is the caller's, which
                // has lent it and does not use it meanwhile.
                let Some(room) = (unsafe { room.as_mut() }) else {
                    return Verdict::of(Err(DropReason::Malformed)).word();
                };
                path::run(Part::$part, &mut $frame(context), &KernelTables($exit(context)), room).word()
            }
        )+

        impl Parts for $exit {
            #[inline(always)]
            fn part(&self, part: Part, room: &mut Room) -> Verdict {
                Verdict::from_word(match part {
                    $(Part::$part => $name(self.0, room),)+
                })
            }
        }
    };
}

parts!(XdpExit, xdp_md, XdpFrame::new, {
    Stack: stack_xdp,
    Arp: arp_xdp,
    Aside: aside_xdp,
    Error: error_xdp,
    Slow: slow_xdp,
    Translated: translated_xdp,
    FindWide: find_wide_xdp,
    Wide: wide_xdp,
    Carry: carry_xdp,
    CarryWide: carry_wide_xdp,
});
parts!(TcxExit, __sk_buff, SkbFrame::bare, {
    Stack: stack_tcx,
    Arp: arp_tcx,
    Aside: aside_tcx,
    Error: error_tcx,
    Slow: slow_tcx,
    Translated: translated_tcx,
    FindWide: find_wide_tcx,
    Wide: wide_tcx,
    Carry: carry_tcx,
    CarryWide: carry_wide_tcx,
});
