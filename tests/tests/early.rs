//! Fragments that come before the first of their datagram, between real hosts: they arrive, and nobody is the worse for those that are
//! sent to do harm.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests: a panic with its place is what is wanted")]

use pnet_datalink::{Channel, Config, DataLinkSender, channel, interfaces};
use privatelink_tests::bench::{Bench, DROP};
use privatelink_tests::packet::{Ip, Ip6, Mac, Packet, Packet6, six};
use privatelink_tests::world::{UNCHECKED, World, changes, config, dualstack, eventually};
use std::net::{SocketAddr, UdpSocket};
use std::ops::Range;
use std::sync::mpsc::{Receiver, channel as queue};
use std::time::{Duration, Instant};

const CLIENT: Ip = [10, 0, 1, 5];
const CLIENT6: Ip6 = six(5);
const ENDPOINT: Ip = [10, 0, 9, 9];
const ENDPOINT6: Ip6 = six(0x99);
const PORT: u16 = 40000;
/// Bytes of a datagram in each fragment: between the families, they become larger by 28.
const SIZE: usize = 1376;

/// One end of a link, on which frames are sent as they are.
struct Sender {
    channel: Box<dyn DataLinkSender>,
    mac: Mac,
    id: u16,
}

impl Sender {
    fn open(world: &World, namespace: &str) -> Self {
        world.thread(namespace, Self::here).join().unwrap()
    }

    /// In the namespace of the calling thread.
    fn here() -> Self {
        let interface = interfaces().into_iter().find(|it| it.name == "eth0").unwrap();
        let Ok(Channel::Ethernet(channel, _)) = channel(&interface, Config::default()) else {
            panic!("no channel")
        };
        Self { channel, mac: interface.mac.unwrap().octets(), id: 100 }
    }

    /// The fragments of a datagram.
    fn fragments(&mut self, from: SocketAddr, to: SocketAddr, payload: &[u8]) -> Vec<Vec<u8>> {
        self.id += 1;
        let (payload, from_mac, id) = (payload.to_vec(), self.mac, self.id);
        let (from_port, to_port) = (from.port(), to.port());
        let inner = Packet { from_port, to_port, payload, from_mac, id, fragment: 0, ..Packet::udp() };
        match (from, to) {
            (SocketAddr::V4(from), SocketAddr::V4(to)) => {
                let whole = Packet { from: from.ip().octets(), to: to.ip().octets(), ..inner };
                let part = |at: Range<usize>, more, bytes: &[u8]| {
                    let fragment = u16::try_from(at.start / 8).unwrap() | if more { 0x2000 } else { 0 };
                    Packet { fragment, ..whole.clone() }.ipv4(bytes)
                };
                cut(&whole.build()[34..], part)
            }
            (SocketAddr::V6(from), SocketAddr::V6(to)) => {
                let whole = Packet6::of(from.ip().octets(), to.ip().octets(), inner);
                let part = |at: Range<usize>, more, bytes: &[u8]| {
                    whole.fragment(id.into(), u16::try_from(at.start).unwrap(), more, bytes)
                };
                cut(&whole.build()[54..], part)
            }
            _ => panic!("{from} and {to} are of different families"),
        }
    }

    fn send(&mut self, frames: &[Vec<u8>]) {
        frames.iter().for_each(|frame| self.channel.send_to(frame, None).unwrap().unwrap());
    }
}

fn cut(bytes: &[u8], part: impl Fn(Range<usize>, bool, &[u8]) -> Vec<u8>) -> Vec<Vec<u8>> {
    let pieces = (0..).step_by(SIZE).zip(bytes.chunks(SIZE));
    pieces.map(|(at, piece)| part(at..at + piece.len(), at + piece.len() < bytes.len(), piece)).collect()
}

/// An order of so many things: backwards, or one of many.
fn order(number: usize, seed: usize) -> Vec<usize> {
    let mut order: Vec<_> = (0..number).rev().collect();
    let mut state = seed * 2_654_435_761;
    for at in (1..number).filter(|_| seed > 0) {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        order.swap(at, (state >> 33) % (at + 1));
    }
    order
}

fn shuffled(frames: &[Vec<u8>], seed: usize) -> Vec<Vec<u8>> {
    order(frames.len(), seed).into_iter().map(|at| frames[at].clone()).collect()
}

fn payload(length: usize) -> Vec<u8> {
    (0..=250).cycle().take(length).collect()
}

/// A target that answers each datagram with the same bytes backwards, in fragments that come in another order each time, the first one
/// last to begin with.
fn answer_backwards(world: &World, name: &str, any: &'static str) {
    let (ready, is_ready) = queue();
    world.thread(name, move || {
        let socket = UdpSocket::bind((any, 8080)).unwrap();
        let mut sender = Sender::here();
        ready.send(()).unwrap();
        let mut message = vec![0; 65536];
        for seed in 0.. {
            let Ok((length, to)) = socket.recv_from(&mut message) else { return };
            message[..length].reverse();
            // The address that the load balancer's packets come to.
            let by = UdpSocket::bind((any, 0)).unwrap();
            by.connect(to).unwrap();
            let from = SocketAddr::new(by.local_addr().unwrap().ip(), 8080);
            let frames = sender.fragments(from, to, &message[..length]);
            sender.send(&shuffled(&frames, seed));
        }
    });
    is_ready.recv().unwrap();
}

/// What comes to a socket with the clients' port.
fn listen(world: &World, name: &str, any: &'static str) -> Receiver<Vec<u8>> {
    let (sender, receiver) = queue();
    let (ready, is_ready) = queue();
    world.thread(name, move || {
        let socket = UdpSocket::bind((any, PORT)).unwrap();
        ready.send(()).unwrap();
        let mut message = vec![0; 65536];
        while let Ok(length) = socket.recv(&mut message) {
            if sender.send(message[..length].to_vec()).is_err() {
                return;
            }
        }
    });
    is_ready.recv().unwrap();
    receiver
}

/// Sends a datagram in an order, and waits for the answer.
fn ask(sender: &mut Sender, heard: &Receiver<Vec<u8>>, ends: [SocketAddr; 2], length: usize, seed: usize) {
    let sent = payload(length);
    let frames = sender.fragments(ends[0], ends[1], &sent);
    sender.send(&shuffled(&frames, seed));
    let what = format!("{length} bytes to {}, order {seed}", ends[1]);
    let mut got = heard.recv_timeout(Duration::from_secs(10)).unwrap_or_else(|_| panic!("no answer: {what}"));
    got.reverse();
    assert!(got == sent, "{what}");
}

fn narrow(port: u16) -> [SocketAddr; 2] {
    [SocketAddr::from((CLIENT, PORT)), SocketAddr::from((ENDPOINT, port))]
}

fn arrives_whole(world: &World, ends: [SocketAddr; 2], target: &'static str, client: &'static str) {
    for name in ["t1", "t2"] {
        answer_backwards(world, name, target);
    }
    let heard = listen(world, "ca", client);
    let mut sender = Sender::open(world, "ca");
    let before = world.state();
    let mut pieces = 0;
    for (length, seed) in [(4000, 0), (2000, 0), (20_000, 0), (20_000, 1), (40_000, 2), (9000, 3), (9000, 4)]
    {
        ask(&mut sender, &heard, ends, length, seed);
        pieces += i64::try_from((length + 8).div_ceil(SIZE)).unwrap();
    }
    let suffix = if ends[0].is_ipv6() { "shop6" } else { "shop" };
    eventually("every fragment has been forwarded once, either way", || {
        let moved = changes(&before, &world.state());
        let count = |key: &str| moved.iter().find(|it| it.0 == key).map_or(0, |it| it.1);
        let both = ["to_provider_packets", "to_consumer_packets"].map(|it| count(&format!("{suffix} {it}")));
        let held = [count("shop fragment_early"), count("payments fragment_early")];
        let lost = moved.iter().any(|(key, _)| key.contains("unknown") || key.contains("full"));
        assert!(!lost, "{moved:?}");
        (both == [pieces; 2] && held.iter().all(|held| *held > 5)).then_some(())
    });
}

#[test]
fn datagrams_arrive_whole_and_so_do_their_answers_in_whatever_order_their_fragments_come() {
    for hook in ["xdp", "tcx"] {
        let hook = format!("hook = \"{hook}\"");
        let world = World::new(&config(&hook, UNCHECKED));
        arrives_whole(&world, narrow(53), "0.0.0.0", "0.0.0.0");
        let ends = ["ca", "cb", "t1", "t2"];
        let world = World::dualstack(&dualstack(&hook, UNCHECKED), &ends);
        let wide = [SocketAddr::from((CLIENT6, PORT)), SocketAddr::from((ENDPOINT6, 81))];
        arrives_whole(&world, wide, "::", "::");
        let world = World::dualstack(&dualstack(&hook, UNCHECKED), &ends);
        arrives_whole(&world, narrow(81), "::", "0.0.0.0");
    }
}

/// Processor time that a process has taken.
fn consumed(pid: u64) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks = |at: usize| fields[at].parse::<u64>().unwrap();
    Duration::from_millis((ticks(11) + ticks(12)) * 10)
}

/// Sends later fragments for a while, each of another datagram; returns how many.
fn flood(sender: &mut Sender, lasting: Duration) -> u64 {
    let frame = sender.fragments(narrow(53)[0], narrow(53)[1], &payload(4000))[1].clone();
    let until = Instant::now() + lasting;
    let numbers = (0..=u16::MAX).cycle().take_while(|_| Instant::now() < until);
    numbers.fold(0, |sent, number| {
        // The IPv4 checksum is nothing that the path looks at.
        let mut frame = frame.clone();
        frame[18..20].copy_from_slice(&number.to_be_bytes());
        sender.send(&[frame]);
        sent + 1
    })
}

#[test]
fn a_flood_of_fragments_without_a_first_is_bounded_and_does_no_harm_to_another_tenant() {
    const LASTING: Duration = Duration::from_secs(2);
    let world = World::new(&config("", UNCHECKED));
    for name in ["t1", "t2"] {
        answer_backwards(&world, name, "0.0.0.0");
    }
    let heard = listen(&world, "cb", "0.0.0.0");
    let (mut sender, mut flooding) = (Sender::open(&world, "cb"), Sender::open(&world, "ca"));
    let agent = world.json("status")[0]["agent"]["pid"].as_u64().unwrap();
    let (before, began, took) = (world.state(), Instant::now(), consumed(agent));
    let mut sent = flood(&mut flooding, LASTING);
    let took = consumed(agent).saturating_sub(took);
    let second = std::thread::spawn(move || flood(&mut flooding, LASTING));
    let mut exchanged = 0u32;
    while !second.is_finished() {
        // Of two fragments, so that nobody sends more of them than is a tenant's part.
        ask(&mut sender, &heard, narrow(53), 2000, 0);
        exchanged += 1;
    }
    sent += second.join().unwrap();
    let lasted = began.elapsed();
    let count = |moved: &[(String, i64)], key: &str| {
        moved.iter().find(|it| it.0 == key).map_or(0, |it| it.1.unsigned_abs())
    };
    let mut last = Vec::new();
    let moved = eventually("what was held is dropped", || {
        let moved = changes(&before, &world.state());
        let is_over = std::mem::replace(&mut last, moved.clone()) == moved;
        is_over.then_some(moved)
    });
    let of = |key: &str| count(&moved, key);
    let early = of("shop fragment_early");
    let (unknown, full) = (of("shop fragment_unknown"), of("shop fragment_table_full"));
    eprintln!(
        "{sent} sent, {early} held, {unknown} unknown, {full} without room; {exchanged} exchanged; {took:?} for the first"
    );
    assert!(sent > 20_000 && exchanged > 5, "{sent} of a flood, {exchanged} exchanged");
    // Two CPUs at once may count one for two.
    let windows = u64::try_from(lasted.as_millis()).unwrap() / 67 + 2;
    assert!(early > 512 && early <= windows * 2 * 512, "{early} held of {sent}");
    assert!(unknown >= 512 && full > sent / 2 && unknown + full <= sent + early, "{moved:?}");
    assert!(took < LASTING / 4, "the agent took {took:?}");
    assert!(of("bank fragment_early") >= u64::from(exchanged), "{moved:?}");
    assert_eq!((of("bank fragment_unknown"), of("bank fragment_table_full")), (0, 0), "{moved:?}");
    assert_eq!(of("shop to_provider_packets"), 0);
}

#[test]
fn a_fragment_whose_first_others_have_pushed_out_of_the_table_is_counted_as_one_without_room() {
    const PLACES: u64 = 8192;
    let world = World::new(&config("", UNCHECKED));
    let mut sender = Sender::open(&world, "ca");
    let frames = sender.fragments(narrow(53)[0], narrow(53)[1], &payload(2000));
    let forwarded = || world.state().get("shop to_provider_packets").copied().unwrap_or(0);
    let dropped = |reason: &str| world.state().get(&format!("shop {reason}")).copied().unwrap_or(0);
    sender.send(&frames[..1]);
    eventually("the first fragment is forwarded", || (forwarded() == 1).then_some(()));
    let mut numbers = (0..u16::MAX).filter(|number| number.to_be_bytes() != frames[0][18..20]);
    eventually("more first fragments follow than there are places", || {
        for number in numbers.by_ref().take(500) {
            let mut frame = frames[0].clone();
            frame[18..20].copy_from_slice(&number.to_be_bytes());
            sender.send(&[frame]);
        }
        (forwarded() > PLACES * 5 / 4).then_some(())
    });
    sender.send(&frames[1..]);
    eventually("what follows the first is held and dropped", || {
        (dropped("fragment_table_full") == 1).then_some(())
    });
    assert_eq!((dropped("fragment_early"), dropped("fragment_unknown")), (1, 0));
}

#[test]
fn without_an_agent_a_fragment_that_comes_early_is_unknown_and_the_next_agent_holds_them_again() {
    let mut bench = Bench::new("");
    let mut sender = Sender::open(&bench.world, "ca");
    let frames = sender.fragments(narrow(53)[0], narrow(53)[1], &payload(4000));
    bench.world.kill_agent();
    assert_eq!(bench.run("ca", &frames[1]).0, DROP);
    bench.world.start(&[]);
    let state = bench.world.state();
    assert_eq!((state.get("shop fragment_early"), state["shop fragment_unknown"]), (None, 1));
    bench = Bench::xdp(bench.world);
    bench.held("held again", "ca", &frames[1], "shop");
}
