//! Single packets through the programs that the kernel runs, and what they change.

use crate::packet::{Ip, Mac, Packet, addresses};
use crate::world::{UNCHECKED, World, changes, config, eventually};
use aya::programs::{SchedClassifier, TestRun, TestRunOptions, Xdp};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::fs::File;
use std::os::fd::AsFd;

pub const DROP: u32 = 1;
pub const PASS: u32 = 2;
pub const REDIRECT: u32 = 4;
pub const CLIENT: Ip = [10, 0, 1, 5];
pub const ENDPOINT: Ip = [10, 0, 9, 9];
pub const BALANCER: Ip = [10, 0, 1, 10];

/// A program of one of the hooks.
#[derive(Debug)]
enum Program {
    Xdp(Xdp),
    Tcx(SchedClassifier),
}

/// A world and one of its programs.
#[derive(Debug)]
pub struct Bench {
    pub world: World,
    program: Program,
}

/// How a frame is to be cut into segments: how many, and how long.
#[derive(Clone, Copy, Debug, Default)]
pub struct Segments(pub u32, pub u32);

/// Checks the same of each program, in a world of its own.
pub fn each(extra: &str, check: impl Fn(&Bench)) {
    xdp(extra, &check);
    tcx(extra, &check);
}

/// Makes a world for each program, of what is to stand before everything else in its configuration.
pub fn both(world: impl Fn(&str) -> World) -> [Bench; 2] {
    [Bench::xdp(world("")), Bench::tcx(world(BY_TCX))]
}

/// An agent loads TCX's program where an interface is to have it.
const BY_TCX: &str = "hook = \"tcx\"\n";

pub fn xdp(extra: &str, check: impl Fn(&Bench)) {
    check(&Bench::new(extra));
}

pub fn tcx(extra: &str, check: impl Fn(&Bench)) {
    check(&Bench::tcx(World::new(&(BY_TCX.to_owned() + &config(extra, UNCHECKED)))));
}

/// A context of which only these words, by their index, are not zero.
fn context(words: &[(usize, u32)]) -> Vec<u8> {
    let mut context = vec![0u32; words.iter().map(|(index, _)| index + 1).max().unwrap()];
    words.iter().for_each(|(index, word)| context[*index] = *word);
    context.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

impl Bench {
    /// XDP's program.
    pub fn new(extra: &str) -> Self {
        Self::xdp(World::new(&config(extra, UNCHECKED)))
    }

    /// XDP's program of a world in which an agent runs.
    pub fn xdp(world: World) -> Self {
        let pin = world.pins().join("programs/ingress");
        let program = Xdp::from_pin(pin, aya_obj::programs::XdpAttachType::Interface).unwrap();
        Self { world, program: Program::Xdp(program) }
    }

    /// TCX's.
    pub fn tcx(world: World) -> Self {
        let program = SchedClassifier::from_pin(world.pins().join("programs/ingress_tcx")).unwrap();
        Self { world, program: Program::Tcx(program) }
    }

    pub fn is_xdp(&self) -> bool {
        matches!(self.program, Program::Xdp(_))
    }

    /// Runs the program on a frame that comes by an interface; returns the verdict, by XDP's numbers, and the frame as it leaves.
    pub fn run(&self, interface: &str, frame: &[u8]) -> (u32, Vec<u8>) {
        self.run_segments(interface, frame, Segments::default())
    }

    pub fn run_segments(
        &self,
        interface: &str,
        frame: &[u8],
        Segments(count, size): Segments,
    ) -> (u32, Vec<u8>) {
        let namespace = File::open(format!("/run/netns/{}", self.world.namespace("dp"))).unwrap();
        let work = || {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
            let ifindex = rustix::net::netdevice::name_to_index(&socket, interface).unwrap();
            let length = u32::try_from(frame.len()).unwrap();
            let mut out = vec![0; 16384];
            let mut options = TestRunOptions::new();
            options.data_in = Some(frame);
            options.data_out = Some(&mut out);
            let result = match &self.program {
                Program::Xdp(program) => {
                    // struct xdp_md: data_end, ingress_ifindex.
                    let context = context(&[(1, length), (3, ifindex), (5, 0)]);
                    options.ctx_in = Some(&context);
                    program.test_run(options)
                }
                Program::Tcx(program) => {
                    // struct __sk_buff: ifindex, gso_segs, gso_size.
                    let context = context(&[(10, ifindex), (41, count), (44, size), (47, 0)]);
                    options.ctx_in = Some(&context);
                    program.test_run(options)
                }
            };
            let result = result.unwrap();
            out.truncate(result.data_size_out as usize);
            let verdict = match (&self.program, result.return_value) {
                (Program::Xdp(_), verdict) => verdict,
                (Program::Tcx(_), 2) => DROP,
                (Program::Tcx(_), u32::MAX) => PASS,
                (Program::Tcx(_), 7) => REDIRECT,
                (Program::Tcx(_), other) => panic!("TCX has no use for {other}"),
            };
            (verdict, out)
        };
        std::thread::scope(|scope| scope.spawn(work).join().unwrap())
    }

    /// Runs a frame, and checks that exactly these counters moved, by one each unless said otherwise.
    pub fn expect(
        &self,
        name: &str,
        interface: &str,
        frame: &[u8],
        verdict: u32,
        moved: &[(&str, i64)],
    ) -> Vec<u8> {
        let before = self.world.state();
        let (got, out) = self.run(interface, frame);
        let after = self.world.state();
        let mut expected: Vec<_> = moved.iter().map(|(key, by)| ((*key).to_owned(), *by)).collect();
        expected.sort();
        assert_eq!(got, verdict, "{name}: verdict");
        assert_eq!(changes(&before, &after), expected, "{name}: counters");
        out
    }

    /// A frame that is dropped for a reason, or passed: untouched.
    pub fn refused(&self, name: &str, interface: &str, frame: &[u8], reason: &str) {
        let verdict = if reason.ends_with("passed") { PASS } else { DROP };
        let out = self.expect(name, interface, frame, verdict, &[(reason, 1)]);
        assert_eq!(out, frame, "{name}: bytes");
    }
}

impl Bench {
    /// A fragment of a datagram of which no first one comes: held, and dropped after a while.
    pub fn held(&self, name: &str, interface: &str, frame: &[u8], vpc: &str) {
        let before = self.world.state();
        assert_eq!(self.run(interface, frame), (DROP, frame.to_vec()), "{name}");
        let expected = [(format!("{vpc} fragment_early"), 1), (format!("{vpc} fragment_unknown"), 1)];
        eventually(&format!("{name}: held and dropped"), || {
            (changes(&before, &self.world.state()) == expected).then_some(())
        });
    }
}

pub fn opened(consumer: &str) -> Vec<(String, i64)> {
    vec![
        (format!("{consumer} to_provider_packets"), 1),
        (format!("{consumer} new_flows"), 1),
        ("map pending".into(), 2),
    ]
}

pub fn as_slice(moved: &[(String, i64)]) -> Vec<(&str, i64)> {
    moved.iter().map(|(key, by)| (key.as_str(), *by)).collect()
}

/// What a target gets of `sent`, when the load balancer's port is `nat`; link-layer addresses are taken from `frame`.
pub fn translated(sent: &Packet, nat: u16, target: Ip, frame: &[u8]) -> Vec<u8> {
    let mut expected = Packet { ttl: sent.ttl - 1, ..sent.clone() };
    (expected.from, expected.from_port, expected.to, expected.to_port) = (BALANCER, nat, target, 8080);
    (expected.to_mac, expected.from_mac) =
        (frame[0..6].try_into().unwrap(), frame[6..12].try_into().unwrap());
    expected.build()
}

/// The target's packet, on the way back.
pub fn reply(frame: &[u8], flags: u8, payload: &[u8]) -> Packet {
    let (from, from_port, to, to_port) = addresses(frame);
    let macs: (Mac, Mac) = (frame[0..6].try_into().unwrap(), frame[6..12].try_into().unwrap());
    Packet {
        from: to,
        from_port: to_port,
        to: from,
        to_port: from_port,
        from_mac: macs.0,
        to_mac: macs.1,
        payload: payload.to_vec(),
        protocol: frame[23],
        ..Packet::tcp(flags)
    }
}

/// The interface of a target.
pub fn side(target: Ip) -> &'static str {
    if target[3] == 21 { "t1" } else { "t2" }
}
