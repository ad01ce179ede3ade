//! Frames that really come by an interface to which the TCX program is attached: what a test run cannot make.

use crate::memory::{CONFIG, Pins};
use privatelink::kernel::{Drops, Hook, Kernel};
use privatelink::maps::Maps;
use privatelink::names::Names;
use privatelink::net::index_of;
use privatelink::plan::{self, Image, Known};
use privatelink::{model, reconcile, sys};
use privatelink_common::limits::OUTCOMES;
use privatelink_common::tables::{Interface, Neighbour, VpcAddress};
use privatelink_common::verdict::{DropReason, PASSED};
use socket2::{Domain, Protocol, Socket, Type};
use std::os::fd::AsFd;
use std::process::Command;
use std::time::{Duration, Instant};

fn ip(line: &str) {
    assert!(Command::new("ip").args(line.split_whitespace()).status().unwrap().success(), "ip {line}");
}

/// A segment that opens a flow, from the endpoint's VPC; with a VLAN tag, if there is one.
fn syn(port: u16, tag: &[u8]) -> Vec<u8> {
    let builder = etherparse::PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    let mut frame = Vec::new();
    builder
        .ipv4([10, 0, 1, 5], [10, 0, 9, 9], 64)
        .tcp(port, 80, 7, 100)
        .syn()
        .write(&mut frame, &[])
        .unwrap();
    [&frame[..12], tag, &frame[12..]].concat()
}

/// Waits until a counter has this value.
fn counted(maps: &Maps, outcome: u32, vpc: u16, expected: u64) {
    let until = Instant::now() + Duration::from_secs(10);
    let count = || -> u64 {
        let index = u32::from(vpc) * OUTCOMES + outcome;
        maps.outcomes.get(index).unwrap().iter().map(|counter| counter.packets).sum()
    };
    while count() != expected {
        assert!(Instant::now() < until, "outcome {outcome} was counted {} times, not {expected}", count());
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn by_tcx_a_vlan_is_not_ours_and_an_interface_that_is_gone_is_a_reason_to_drop() {
    // A thread of its own, whose network namespace ends with it.
    std::thread::spawn(|| {
        sys::new_network_namespace().unwrap();
        for (name, far) in [("a", "far-a"), ("b", "far-b")] {
            ip(&format!("link add name {name} type veth peer name {far}"));
            for end in [name, far] {
                std::fs::write(format!("/proc/sys/net/ipv6/conf/{end}/disable_ipv6"), "1").unwrap();
                ip(&format!("link set dev {end} up"));
            }
        }
        let pins = Pins(format!("/sys/fs/bpf/plt-live-{}", std::process::id()).into());
        let model = model::parse(CONFIG, "live.toml").unwrap();
        let mut kernel = Kernel::open(&pins.0, &model.limits, Drops::Counted).unwrap();
        let maps = kernel.maps().unwrap();
        let mut names = Names::default();
        let image = plan::compile(&model, &mut names, &Known::connected(&model), |_| "stack".into()).unwrap();
        reconcile::apply(&maps, &Image::default(), &image).unwrap();
        for name in ["a", "b"] {
            let (place, ifindex) = (image.interfaces[name], index_of(name).unwrap());
            let entry = Interface { vpc: place.vpc, slot: place.slot, stack: 0, fits: 0 };
            maps.interfaces.set(&ifindex, &entry).unwrap();
            maps.egress_tcx.set(&place.slot.into(), &ifindex).unwrap();
            kernel.attach(name, ifindex, Hook::Tcx, false).unwrap();
        }
        let (from, to) = (image.interfaces["a"], image.interfaces["b"]);
        for last in 21..=23 {
            let hop = Neighbour { mac: [2; 6], interface: to.slot };
            maps.neighbours.set(&VpcAddress::ipv4(to.vpc, [10, 0, 1, last]), &hop).unwrap();
        }
        let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(0))).unwrap();
        sys::bind_to_frames(socket.as_fd(), index_of("far-a").unwrap()).unwrap();
        let send = |frame: &[u8]| socket.send(frame).map(drop).unwrap();
        let opened = || maps.pending.count().unwrap() / 2;

        send(&syn(1000, &[]));
        let until = Instant::now() + Duration::from_secs(10);
        while opened() != 1 {
            assert!(Instant::now() < until, "no flow was opened");
        }
        send(&syn(1001, &[0x81, 0x00, 0x00, 0x05]));
        counted(&maps, PASSED, from.vpc, 1);
        assert_eq!(opened(), 1, "what has a tag opens nothing");
        ip("link del dev b");
        send(&syn(1000, &[]));
        counted(&maps, DropReason::NoInterface.code(), from.vpc, 1);
    })
    .join()
    .unwrap();
}
