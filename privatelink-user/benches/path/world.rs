//! What the parts share: pinned maps and programs of their own, and flows to fill them with.

use aya::maps::ProgramArray;
use aya::programs::{SchedClassifier, TestRun, TestRunOptions, Xdp};
use aya::{Ebpf, EbpfLoader};
use privatelink::kernel::{self, Drops, Kernel, Program};
use privatelink::maps::{Map, Maps};
use privatelink::model::Limits;
use privatelink::{flows, sys};
use privatelink_common::checksum::{address, delta};
use privatelink_common::tables::{Course, Endpoint, Flow, FlowKey, Interface};
use std::path::PathBuf;
use zerocopy::big_endian::U16;

pub(crate) const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub(crate) const DROP: u32 = 1;
pub(crate) const PASS: u32 = 2;
pub(crate) const REDIRECT: u32 = 4;

/// Pins that are gone when it is dropped.
pub(crate) struct Pins(pub PathBuf);

impl Drop for Pins {
    fn drop(&mut self) {
        let _ = kernel::remove(&self.0.join("bench"));
        let _ = kernel::remove(&self.0);
    }
}

/// The programs and their maps, and the programs that it is compared with.
pub(crate) struct World {
    pub maps: Maps,
    pub ingress: Xdp,
    pub tcx: SchedClassifier,
    pub object: Ebpf,
    pub floor_flows: Map<FlowKey, Flow>,
    pub floor_egress: Map<u32, [u32; 2]>,
    pub load: Map<u32, [u32; 2]>,
    _kernel: Kernel,
    _pins: Pins,
}

impl World {
    /// Moves this process into a network namespace of its own, which ends with it.
    pub(crate) fn enter() {
        sys::new_network_namespace().expect("a network namespace needs root");
    }

    pub(crate) fn new(limits: &Limits) -> Self {
        let pins = Pins(format!("/sys/fs/bpf/privatelink-bench-{}", std::process::id()).into());
        let mut kernel = Kernel::open(&pins.0, limits, Drops::Counted).expect("loading programs needs root");
        for program in [Program::Xdp, Program::Tcx] {
            kernel.load(program).unwrap();
        }
        let maps = kernel.maps().unwrap();
        let bench = pins.0.join("bench/maps");
        std::fs::create_dir_all(&bench).unwrap();
        let mut loader = EbpfLoader::new();
        for map in ["floor_flows", "floor_egress", "load"] {
            loader.map_pin_path(map, bench.join(map));
        }
        let object = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/bench.bpf.o"));
        let mut object = loader.load(object).unwrap();
        for (_, program) in object.programs_mut() {
            let program: &mut Xdp = program.try_into().unwrap();
            program.load().unwrap();
        }
        let world = Self {
            floor_flows: Map::open(&bench, "floor_flows").unwrap(),
            floor_egress: Map::open(&bench, "floor_egress").unwrap(),
            load: Map::open(&bench, "load").unwrap(),
            ingress: Xdp::from_pin(
                pins.0.join("programs/ingress"),
                aya_obj::programs::XdpAttachType::Interface,
            )
            .unwrap(),
            tcx: SchedClassifier::from_pin(pins.0.join("programs/ingress_tcx")).unwrap(),
            maps,
            object,
            _kernel: kernel,
            _pins: pins,
        };
        // A test run comes by the namespace's loopback, whose index is 1.
        world.maps.interfaces.set(&1, &Interface { vpc: 1, slot: 1, stack: 0, fits: 1500 }).unwrap();
        world.maps.egress.set(&1, &[1, 0]).unwrap();
        world.floor_egress.set(&1, &[1, 0]).unwrap();
        world.maps.endpoints.set(&1, &Endpoint { generation: 1, open: 1, ..Endpoint::default() }).unwrap();
        world
    }

    pub(crate) fn program(&self, name: &str) -> &Xdp {
        self.object.program(name).unwrap().try_into().unwrap()
    }

    /// [`time`] of a program that gets its packet back with a TTL as high as before.
    pub(crate) fn again(&mut self, name: &str, packet: &[u8], repeat: u32, expected: u32) -> f64 {
        let subject = if name == "ingress" { &self.ingress } else { self.program(name) };
        let subject = subject.fd().unwrap().try_clone().unwrap();
        let mut map = ProgramArray::try_from(self.object.map_mut("subject").unwrap()).unwrap();
        map.set(0, &subject, 0).unwrap();
        time(self.program("again"), packet, repeat, expected)
    }

    /// Fills both flow tables. `next` says into which packet a flow's packet is rewritten.
    pub(crate) fn fill(&self, flows: &[(FlowKey, Flow)]) {
        for chunk in flows.chunks(4096) {
            let (keys, values): (Vec<_>, Vec<_>) = chunk.iter().copied().unzip();
            self.maps.established.fill(&keys, &values).unwrap();
            self.floor_flows.fill(&keys, &values).unwrap();
        }
    }
}

/// The key of the flow with this number: a client of its own, one endpoint.
pub(crate) fn key(number: u32, protocol: u8, port: u16) -> FlowKey {
    let [_, a, b, c] = number.to_be_bytes();
    FlowKey {
        source: [10, a, b, c],
        destination: [10, 255, 9, 9],
        source_port: U16::new(40000),
        destination_port: U16::new(port),
        vpc: 1,
        protocol,
        reserved: 0,
    }
}

/// A flow of `from`'s packets, which it rewrites into what `to` is the key of.
pub(crate) fn flow(from: &FlowKey, to: &FlowKey) -> Flow {
    Flow {
        source: to.source,
        destination: to.destination,
        course: Course {
            source_port: to.source_port,
            destination_port: to.destination_port,
            address_delta: delta(
                address(from.source) + address(from.destination),
                address(to.source) + address(to.destination),
            ),
            destination_mac: [2, 0, 0, 0, 0, 2],
            source_mac: MAC,
            seen_mac: MAC,
            seen_interface: 1,
            interface: 1,
            peer_vpc: 1,
            endpoint: 1,
            generation: 1,
            last_seen: flows::now(),
            idle_timeout: u16::MAX,
            state: 3,
            ..Course::default()
        },
    }
}

/// Nanoseconds a run of a program on a packet, which `expected` must come of; by the kernel's clock, since the call itself may wait
/// for the kernel's other work.
pub(crate) fn time(program: &Xdp, packet: &[u8], repeat: u32, expected: u32) -> f64 {
    let mut out = vec![0; 2048];
    let mut options = TestRunOptions::new();
    options.data_in = Some(packet);
    options.data_out = Some(&mut out);
    options.repeat = repeat;
    let result = program.test_run(options).unwrap();
    assert_eq!(result.return_value, expected, "the program does not do what is to be measured");
    result.duration.as_nanos() as f64
}

/// How often a packet can be forwarded before its TTL ends.
const HOPS: u32 = 254;

/// [`time`] of a program that forwards what it is given. Its output is its next input, so it runs as often as the TTL allows, and then
/// begins anew with the packet that `begin` makes for the number of the run. Each beginning takes the kernel milliseconds, which are not
/// part of the figure.
pub(crate) fn time_forwarding(program: &Xdp, repeat: u32, begin: impl Fn(u32) -> Vec<u8>) -> f64 {
    let mut sum = 0.0;
    for first in (0..repeat).step_by(HOPS as usize) {
        let runs = HOPS.min(repeat - first);
        sum += time(program, &begin(first), runs, REDIRECT) * f64::from(runs);
    }
    sum / f64::from(repeat)
}

/// A TCP segment from 10.0.0.0:40000.
pub(crate) fn segment(
    to: [u8; 4],
    port: u16,
    set: impl FnOnce(
        etherparse::PacketBuilderStep<etherparse::TcpHeader>,
    ) -> etherparse::PacketBuilderStep<etherparse::TcpHeader>,
) -> Vec<u8> {
    segment_from([10, 0, 0, 0], to, port, set)
}

/// A TCP segment from an address's port 40000, with the highest TTL.
pub(crate) fn segment_from(
    from: [u8; 4],
    to: [u8; 4],
    port: u16,
    set: impl FnOnce(
        etherparse::PacketBuilderStep<etherparse::TcpHeader>,
    ) -> etherparse::PacketBuilderStep<etherparse::TcpHeader>,
) -> Vec<u8> {
    let builder = etherparse::PacketBuilder::ethernet2(MAC, [2, 0, 0, 0, 0, 2]).ipv4(from, to, 255);
    let mut bytes = Vec::new();
    set(builder.tcp(40000, port, 1, 100)).write(&mut bytes, &[]).unwrap();
    bytes
}
