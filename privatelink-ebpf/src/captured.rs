//! The programs `captured` (XDP) and `captured_tcx` (sched_cls), which stand in the links in the place of `ingress` and `ingress_tcx` while
//! a capture runs: they do the same, and hand packets over besides. They are an object of their own, so that those others are compiled as
//! if there were no captures.
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
#[allow(dead_code, reason = "trunks are not captured")]
mod tables;
#[allow(dead_code, reason = "trunks are not captured")]
mod vlan;

use act::{act, now};
use aya_ebpf::{
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};
use capture::{hand_over, keep};
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
