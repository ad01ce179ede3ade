//! The program that the kernel runs, packet by packet (BPF_PROG_TEST_RUN), and what it counts.

use crate::world::{World, changes};
use aya::programs::{TestRun, TestRunOptions, Xdp};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::fs::File;
use std::os::fd::AsFd;

pub const DROP: u32 = 1;
pub const PASS: u32 = 2;
pub const REDIRECT: u32 = 4;

/// A world and its program.
#[derive(Debug)]
pub struct Bench {
    pub world: World,
    program: Xdp,
}

impl Bench {
    /// The program of this world, in which an agent runs.
    pub fn of(world: World) -> Self {
        let pin = world.pins().join("programs/ingress");
        let program = Xdp::from_pin(pin, aya_obj::programs::XdpAttachType::Interface).unwrap();
        Self { world, program }
    }

    /// Runs the program on a frame that comes by an interface; returns the verdict and the frame as it leaves.
    pub fn run(&self, interface: &str, frame: &[u8]) -> (u32, Vec<u8>) {
        let namespace = File::open(format!("/run/netns/{}", self.world.namespace("dp"))).unwrap();
        std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
                    let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
                    let ifindex = rustix::net::netdevice::name_to_index(&socket, interface).unwrap();
                    let length = u32::try_from(frame.len()).unwrap();
                    let context: Vec<u8> =
                        [0, length, 0, ifindex, 0, 0].iter().flat_map(|it| it.to_ne_bytes()).collect();
                    let mut out = vec![0; 4096];
                    let mut options = TestRunOptions::new();
                    options.data_in = Some(frame);
                    options.data_out = Some(&mut out);
                    options.ctx_in = Some(&context);
                    let result = self.program.test_run(options).unwrap();
                    out.truncate(result.data_size_out as usize);
                    (result.return_value, out)
                })
                .join()
                .unwrap()
        })
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
