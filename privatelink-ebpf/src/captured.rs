//! The programs `captured` (XDP), `captured_tcx` (sched_cls), and their like for trunks, `captured_trunk` and `captured_tcx_trunk`, which
//! stand in the links in the place of `ingress` and its like while a capture runs: they do the same, and hand packets over besides. They
//! are an object of their own, so that those others are compiled as if there were no captures.
#![no_std]
#![no_main]
// For one instruction that Rust has no other word for: see tables.
#![feature(asm_experimental_arch)]

mod act;
mod capture;
mod frame;
mod hold;
mod maps;
mod parts;
mod tables;
mod vlan;

use act::{act, now};
use aya_ebpf::{
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};
use capture::{Watched, hand_over, keep, keep_entered};
use frame::{SkbFrame, XdpFrame};
use privatelink_common::{path, verdict::Verdict};
use tables::{KernelTables, TcxExit, XdpExit};

#[xdp(frags)]
pub(crate) fn captured(context: XdpContext) -> u32 {
    let mut frame = XdpFrame::new(context.ctx);
    let ifindex = frame.ingress();
    keep(&frame, ifindex);
    let verdict = path::forward(&mut frame, &KernelTables(XdpExit(context.ctx)), ifindex, now());
    let verdict = hand_over(&frame, Verdict::of(verdict));
    act(&mut frame, verdict.result(), ifindex, false)
}

#[xdp(frags)]
pub(crate) fn captured_trunk(context: XdpContext) -> u32 {
    let mut frame = XdpFrame::new(context.ctx);
    let ifindex = vlan::enter(&mut frame);
    if ifindex == 0 {
        let ifindex = frame.ingress();
        return pass(&mut frame, ifindex);
    }
    keep_entered(&frame, ifindex);
    let verdict = path::forward(&mut frame, &KernelTables(XdpExit(context.ctx)), ifindex, now());
    let verdict = hand_over(&frame, Verdict::of(verdict));
    act(&mut frame, verdict.result(), vlan::ifindex(), true)
}

#[classifier]
pub(crate) fn captured_tcx(context: TcContext) -> i32 {
    let mut frame = SkbFrame::new(context.skb.skb);
    let ifindex = frame.ingress();
    keep(&frame, ifindex);
    let verdict = if frame.is_tagged() {
        Ok(Verdict::PASS)
    } else {
        path::forward(&mut frame, &KernelTables(TcxExit(context.skb.skb)), ifindex, now())
    };
    let verdict = hand_over(&frame, Verdict::of(verdict));
    act(&mut frame, verdict.result(), ifindex, false)
}

#[classifier]
pub(crate) fn captured_tcx_trunk(context: TcContext) -> i32 {
    let mut frame = SkbFrame::bare(context.skb.skb);
    let ifindex = vlan::enter(&mut frame);
    if ifindex == 0 {
        let ifindex = frame.ingress();
        return pass(&mut frame, ifindex);
    }
    let mut frame = SkbFrame::new(context.skb.skb);
    keep_entered(&frame, ifindex);
    let tables = KernelTables(TcxExit(context.skb.skb));
    let verdict = path::forward(&mut frame, &tables, ifindex, now());
    let verdict = hand_over(&frame, Verdict::of(verdict));
    act(&mut frame, verdict.result(), vlan::ifindex(), true)
}

/// What becomes of a frame whose tags stand for nothing.
#[inline(always)]
fn pass<W: Watched>(frame: &mut W, ifindex: u32) -> W::Action {
    keep(frame, ifindex);
    hand_over(frame, Verdict::PASS);
    act(frame, Ok(Verdict::PASS), ifindex, false)
}
