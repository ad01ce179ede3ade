//! The programs `ingress` (XDP) and `ingress_tcx` (sched_cls), and their like for trunks, `ingress_trunk` and `ingress_tcx_trunk`: each
//! hands every frame to [`privatelink_common::path::forward`], does what it says, and counts it once.
//!
//! This crate holds all of the dataplane's `unsafe`: in `frame`, where the verifier's bounds are, in `tables`, where the maps'
//! memory is, and in the few helper calls of `act` and `capture`.
#![no_std]
#![no_main]
// For one instruction that Rust has no other word for: see tables.
#![feature(asm_experimental_arch)]

mod act;
mod frame;
mod hold;
mod maps;
mod parts;
mod tables;
mod vlan;

use act::{act, now};
use aya_ebpf::{
    bindings::tcx_action_base::TCX_NEXT,
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};
use frame::{SkbFrame, XdpFrame};
use privatelink_common::{frame::Frame, path, verdict::Verdict};
use tables::{KernelTables, TcxExit, XdpExit};

/// Runs for every frame that comes by an interface of ours, before the kernel has made a socket buffer of it.
#[xdp(frags)]
pub(crate) fn ingress(context: XdpContext) -> u32 {
    let mut frame = XdpFrame::new(context.ctx);
    let ifindex = frame.ingress();
    let verdict = path::forward(&mut frame, &KernelTables(XdpExit(context.ctx)), ifindex, now());
    act(&mut frame, verdict, ifindex, false)
}

/// Runs in its place where the interface is a trunk: a program of its own, so that frames of others are not asked for tags.
#[xdp(frags)]
pub(crate) fn ingress_trunk(context: XdpContext) -> u32 {
    let mut frame = XdpFrame::new(context.ctx);
    let ifindex = vlan::enter(&mut frame);
    if ifindex == 0 {
        let ifindex = frame.ingress();
        return act(&mut frame, Ok(Verdict::PASS), ifindex, false);
    }
    let verdict = path::forward(&mut frame, &KernelTables(XdpExit(context.ctx)), ifindex, now());
    act(&mut frame, verdict, vlan::ifindex(), true)
}

/// Runs for every frame that comes by an interface of ours whose other end leaves checksums and segments to its device.
#[classifier]
pub(crate) fn ingress_tcx(context: TcContext) -> i32 {
    let mut frame = SkbFrame::new(context.skb.skb);
    let ifindex = frame.ingress();
    if frame.is_tagged() {
        // To XDP, the tag is a part of the frame, and such a frame is none of ours.
        return act(&mut frame, Ok(Verdict::PASS), ifindex, false);
    }
    let verdict = path::forward(&mut frame, &KernelTables(TcxExit(context.skb.skb)), ifindex, now());
    act(&mut frame, verdict, ifindex, false)
}

/// Runs for no packet, but where the agent asks for it: adds to a counter what has become of fragments that were held. Such a run has the
/// CPU for itself, as that for a packet has.
#[classifier]
pub(crate) fn account(context: TcContext) -> i32 {
    if let Some(account) = SkbFrame::bare(context.skb.skb).read(0) {
        act::account(&account);
    }
    TCX_NEXT
}

/// Runs in its place where the interface is a trunk.
#[classifier]
pub(crate) fn ingress_tcx_trunk(context: TcContext) -> i32 {
    let mut frame = SkbFrame::bare(context.skb.skb);
    let ifindex = vlan::enter(&mut frame);
    if ifindex == 0 {
        let ifindex = frame.ingress();
        return act(&mut frame, Ok(Verdict::PASS), ifindex, false);
    }
    let mut frame = SkbFrame::new(context.skb.skb);
    let tables = KernelTables(TcxExit(context.skb.skb));
    let verdict = path::forward(&mut frame, &tables, ifindex, now());
    act(&mut frame, verdict, vlan::ifindex(), true)
}
