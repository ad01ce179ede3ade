//! Both programs and the host run the same path: 20,000 random, mutated and truncated frames get the same verdict and the same bytes
//! from each. It proves the glue and the compiler, not the logic.

use crate::memory::{CONFIG, Pins, in_the_kernel, interfaces, memory, neighbours, on_the_host};
use aya::programs::{SchedClassifier, TestRun, TestRunOptions, TestRunResult, Xdp};
use privatelink::kernel::{Drops, Kernel};
use privatelink::maps::Maps;
use privatelink::names::Names;
use privatelink::plan::{self, Image};
use privatelink::{flows, model, reconcile};
use privatelink_common::tables::Bucket;
use privatelink_common::wire::Ipv4;
use std::path::Path;

const FRAMES: usize = 20_000;

/// Small enough for some of the frames to be too large.
const MTU: u32 = 90;

/// xorshift64*: the same frames in every run.
struct Random(u64);

impl Random {
    fn next(&mut self, below: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        usize::try_from(self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33).unwrap() % below
    }
    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.next(choices.len())]
    }
}

/// A frame that may or may not make sense, from few enough addresses and ports that flows come about.
fn invent(random: &mut Random) -> Vec<u8> {
    let builder = etherparse::PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    let addresses =
        [[10, 0, 1, 5], [10, 0, 1, 6], [10, 0, 9, 9], [10, 0, 1, 10], [10, 0, 1, 21], [10, 1, 0, 1]];
    let (from, to) =
        (random.of(&addresses), random.of(&[[10, 0, 9, 9], [10, 0, 9, 9], [10, 0, 1, 10], [10, 0, 1, 5]]));
    let (from_port, to_port) =
        (random.of(&[1000, 1001, 1002, 8080]), random.of(&[80, 80, 80, 81, 2000, 20000]));
    let mut bytes = Vec::new();
    let payload = vec![0x5a; random.next(40)];
    let ttl = random.of(&[64, 64, 64, 64, 2, 1, 0]);
    match random.next(12) {
        0 => {
            let arp = etherparse::ArpPacket::new(
                etherparse::ArpHardwareId::ETHERNET,
                etherparse::EtherType::IPV4,
                etherparse::ArpOperation(u16::try_from(random.next(3)).unwrap()),
                &[2, 0, 0, 0, 0, 1],
                &from,
                &[0; 6],
                &to,
            );
            builder.arp(arp.unwrap()).write(&mut bytes).unwrap();
        }
        1 => builder.ipv4(from, to, 9).icmpv4_echo_request(7, 9).write(&mut bytes, &payload).unwrap(),
        2..=4 => builder.ipv4(from, to, ttl).udp(from_port, to_port).write(&mut bytes, &payload).unwrap(),
        _ => {
            let mut tcp = builder.ipv4(from, to, ttl).tcp(from_port, to_port, 7, 100);
            // Options that make sense at times: an MSS at the front, at an odd place, and whatever comes.
            let options: Vec<u8> = match random.next(4) {
                0 => vec![2, 4, random.of(&[0, 1, 5, 6, 0xff]), 0xb4],
                1 => vec![1, 2, 4, 0x22, 0x33, 3, 3, 7],
                2 => (0..random.next(10) * 4).map(|_| random.of(&[0, 1, 2, 2, 4, 4, 5, 0xff])).collect(),
                _ => Vec::new(),
            };
            tcp = tcp.options_raw(&options).unwrap();
            for flag in [random.next(6), random.next(9)] {
                tcp = match flag {
                    0 => tcp.fin(),
                    1 => tcp.rst(),
                    2 => tcp.ack(3),
                    3 => tcp.psh(),
                    _ => tcp.syn(),
                };
            }
            tcp.write(&mut bytes, &payload).unwrap();
        }
    }
    bytes
}

/// The answer to a frame that was forwarded.
fn answer(random: &mut Random, frame: &[u8]) -> Vec<u8> {
    let part = |at: usize| -> Ipv4 { frame[at..at + 4].try_into().unwrap() };
    let port = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
    let builder = etherparse::PacketBuilder::ethernet2([2, 0, 0, 0, 0, 3], [2, 0, 0, 0, 0, 4]).ipv4(
        part(30),
        part(26),
        64,
    );
    let mut bytes = Vec::new();
    if frame[23] == 17 {
        builder.udp(port(36), port(34)).write(&mut bytes, b"answer").unwrap();
        return bytes;
    }
    let tcp = builder.tcp(port(36), port(34), 5, 100);
    let tcp = match random.next(8) {
        0 => tcp.rst(),
        1 => tcp.fin().ack(1),
        2 | 3 => tcp.ack(1),
        _ => tcp.syn().ack(1),
    };
    tcp.write(&mut bytes, &[]).unwrap();
    bytes
}

/// An ICMP error about a frame that was forwarded, from whoever got it.
fn complaint(random: &mut Random, frame: &[u8]) -> Vec<u8> {
    let to: Ipv4 = frame[26..30].try_into().unwrap();
    let from = random.of(&[[10, 0, 1, 21], [10, 0, 1, 5], [10, 7, 7, 7], frame[30..34].try_into().unwrap()]);
    let builder = etherparse::PacketBuilder::ethernet2([2, 0, 0, 0, 0, 3], [2, 0, 0, 0, 0, 4]);
    let held = (14 + random.of(&[20, 27, 28, 28, 28, 38, 40, 60])).min(frame.len());
    let (kind, code) = (random.of(&[3, 3, 11, 12, 4, 5]), random.of(&[0, 3, 4]));
    let mut bytes = Vec::new();
    builder
        .ipv4(from, to, random.of(&[64, 64, 1]))
        .icmpv4_raw(kind, code, [0, 0, 5, 0])
        .write(&mut bytes, &frame[14..held])
        .unwrap();
    bytes
}

fn mutate(random: &mut Random, frame: &mut Vec<u8>) {
    for _ in 0..random.next(3) {
        let at = random.next(frame.len());
        frame[at] = u8::try_from(random.next(256)).unwrap();
    }
    if random.next(8) == 0 {
        frame.truncate(14 + random.next(frame.len() - 13));
    }
}

#[test]
fn xdp_and_the_host_agree_on_every_frame() {
    for (config, name) in configs() {
        agree(&format!("xdp-{name}"), &config, by_xdp, [1, 2, 4], |_| true);
    }
}

#[test]
fn tcx_and_the_host_agree_on_every_frame() {
    // A test run refuses to make socket buffers of frames that are too short for the IP header that they promise.
    let whole = |frame: &[u8]| match frame[12..14] {
        [0x08, 0x00] => frame.len() >= 34,
        [0x86, 0xdd] => frame.len() >= 54,
        _ => true,
    };
    let open = |dir: &Path| SchedClassifier::from_pin(dir.join("ingress_tcx")).unwrap();
    for (config, name) in configs() {
        agree(&format!("tcx-{name}"), &config, open, [2, u32::MAX, 7], whole);
    }
}

fn by_xdp(dir: &Path) -> Xdp {
    Xdp::from_pin(dir.join("ingress"), aya_obj::programs::XdpAttachType::Interface).unwrap()
}

/// Targets that are told who the client is, and others.
fn configs() -> [(String, &'static str); 2] {
    let proxied = CONFIG.replace("port = 8080", "port = 8080\nproxy_protocol_v2.enabled = true");
    [(CONFIG.to_owned(), "plain"), (proxied, "proxied")]
}

/// Hands the same frames to both; `actions` is what the program returns for what it drops, passes and redirects.
/// Frames that `takes` says no to are left out.
fn agree<P>(
    name: &str,
    config: &str,
    open: impl Fn(&Path) -> P,
    actions: [u32; 3],
    takes: impl Fn(&[u8]) -> bool,
) where
    P: for<'a> TestRun<Opts<'a> = TestRunOptions<'a>, Result = TestRunResult>,
{
    let pins = Pins(format!("/sys/fs/bpf/plt-twin-{name}-{}", std::process::id()).into());
    let model = model::parse(config, "twin.toml").unwrap();
    let kernel = Kernel::open(&pins.0, &model.limits, Drops::Counted).expect("loading programs needs root");
    let maps: Maps = kernel.maps().unwrap();
    let mut names = Names::default();
    let image =
        plan::compile(&model, &mut names, &plan::Known::connected(&model), |_| "stack".into()).unwrap();
    reconcile::apply(&maps, &Image::default(), &image).unwrap();
    for (key, hop) in neighbours(&image) {
        maps.neighbours.set(&key, &hop).unwrap();
    }
    for place in image.interfaces.values() {
        // Nothing leaves: a test run returns the verdict. The loopback interface stands for all of them.
        maps.egress.set(&place.slot.into(), &[1, 0]).unwrap();
        maps.mtus.set(&place.slot.into(), &MTU).unwrap();
        maps.egress_tcx.set(&place.slot.into(), &1).unwrap();
    }
    let slots: Vec<u16> = image.interfaces.values().map(|place| place.slot).collect();
    let interfaces = interfaces(&image);
    let memory = memory(image);
    memory.mtus.borrow_mut().extend(slots.into_iter().map(|slot| (slot, MTU)));
    let program = open(&pins.0.join("programs"));

    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let (mut sent, mut verdicts) = (Vec::<Vec<u8>>::new(), [0usize; 5]);
    for number in 0..FRAMES {
        if number % 64 == 0 {
            // ICMP errors are counted by the second, and the two clocks are not one.
            memory.bucket.set(Bucket::default());
            for id in memory.image.endpoints.keys() {
                maps.buckets.set(id, &Bucket::default()).unwrap();
            }
        }
        let (mut frame, interface) = match random.next(4) {
            0 if !sent.is_empty() => {
                let chosen = sent[random.next(sent.len())].clone();
                let frame = match random.next(3) {
                    0 => complaint(&mut random, &chosen),
                    _ => answer(&mut random, &chosen),
                };
                (frame, interfaces[random.of(&[1, 1, 1, 1, 0])])
            }
            _ => (
                invent(&mut random),
                if random.next(5) == 0 { random.of(&interfaces) } else { interfaces[0] },
            ),
        };
        if random.next(3) == 0 {
            mutate(&mut random, &mut frame);
        }
        if !takes(&frame) {
            continue;
        }
        maps.interfaces.set(&1, &interface).unwrap();
        memory.interface.set(interface);
        let (mut host, mut kernel) =
            (on_the_host(&memory, &frame, flows::now()), in_the_kernel(&program, &frame));
        host.0 = host.0.min(4);
        kernel.0 = [1, 2, 4][actions.iter().position(|action| *action == kernel.0).unwrap()];
        assert_eq!(host, kernel, "frame {number}: {frame:02x?} in VPC {}", interface.vpc);
        verdicts[host.0 as usize] += 1;
        if host.0 == 4 && host.1.len() >= 38 && host.1[12..14] == [8, 0] && matches!(host.1[23], 6 | 17) {
            sent.push(host.1);
        }
        if sent.len() > 64 {
            sent.remove(0);
        }
    }
    assert!(
        verdicts[1] > FRAMES / 20 && verdicts[2] > FRAMES / 20 && verdicts[4] > FRAMES / 20,
        "{verdicts:?} is no test of much"
    );
    assert_eq!(
        memory.established.borrow().len(),
        maps.established.keys().unwrap().len(),
        "established entries"
    );
    assert!(!memory.established.borrow().is_empty(), "flows came about");
    assert_eq!(memory.streams.borrow().len(), maps.streams.keys().unwrap().len(), "streams");
}
