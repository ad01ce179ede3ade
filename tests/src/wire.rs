//! A tap device of the agent's namespace, and the test at its other end: every byte that is on the wire, tags included.

use crate::packet::{self, Ip, Ip6, Mac, Packet, Packet6};
use crate::world::{World, eventually};
use std::os::unix::net::UnixDatagram;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// A tag's EtherType, and what stands behind it: priority, drop eligibility, VLAN.
pub type Tag = (u16, u16);

/// A customer's tag, or an only one (IEEE 802.1Q).
pub const C: u16 = 0x8100;
/// A service tag (IEEE 802.1ad).
pub const S: u16 = 0x88a8;

/// A host that answers when it is asked where it is.
#[derive(Clone, Debug)]
pub struct Host {
    pub tags: Vec<Tag>,
    pub address: Ip,
    pub address6: Ip6,
    pub mac: Mac,
}

/// A device's other end.
#[derive(Debug)]
pub struct Wire {
    socket: UnixDatagram,
    frames: Receiver<Vec<u8>>,
    hosts: Arc<Mutex<Vec<Host>>>,
}

/// A frame with tags, from the outside in.
pub fn tagged(frame: &[u8], tags: &[Tag]) -> Vec<u8> {
    let tags: Vec<u8> = tags
        .iter()
        .flat_map(|(kind, control)| [kind.to_be_bytes(), control.to_be_bytes()].concat())
        .collect();
    [&frame[..12], &tags, &frame[12..]].concat()
}

/// A frame's tags, and the frame without them.
pub fn untagged(frame: &[u8]) -> (Vec<Tag>, Vec<u8>) {
    let (mut tags, mut rest) = (Vec::new(), &frame[12..]);
    while let [a, b, c, d, behind @ ..] = rest
        && [C, S].contains(&u16::from_be_bytes([*a, *b]))
    {
        tags.push((u16::from_be_bytes([*a, *b]), u16::from_be_bytes([*c, *d])));
        rest = behind;
    }
    (tags, [&frame[..12], rest].concat())
}

/// What a host says to a frame that asks where it is.
fn answer(frame: &[u8], hosts: &[Host]) -> Option<Vec<u8>> {
    let (tags, plain) = untagged(frame);
    let asker: Mac = plain[6..12].try_into().ok()?;
    let of = |host: &&Host| host.tags == tags;
    if plain[12..14] == [8, 6] && plain[20..22] == [0, 1] {
        let host = hosts.iter().filter(of).find(|host| host.address == plain[38..42])?;
        let from = plain[28..32].try_into().ok()?;
        return Some(tagged(&packet::arp(2, host.mac, host.address, asker, from, asker), &tags));
    }
    if plain[12..14] == [0x86, 0xdd] && plain.get(54) == Some(&135) {
        let host = hosts.iter().filter(of).find(|host| host.address6 == plain[62..78])?;
        let inner = Packet { from_mac: host.mac, to_mac: asker, ttl: 255, ..Packet::tcp(0) };
        let to = plain[22..38].try_into().ok()?;
        let body = [&[0x60, 0, 0, 0][..], &host.address6, &[2, 1], &host.mac].concat();
        return Some(tagged(&Packet6::of(host.address6, to, inner).icmp(136, &body), &tags));
    }
    None
}

/// Whether a frame asks where somebody is, or is said to all by whoever is there.
fn is_question(frame: &[u8]) -> bool {
    let plain = untagged(frame).1;
    plain[12..14] == [8, 6] && plain[20..22] == [0, 1]
        || plain[12..14] == [0x86, 0xdd] && plain.get(54) == Some(&135)
}

fn hear(socket: &UnixDatagram, hosts: &Mutex<Vec<Host>>, heard: &Sender<Vec<u8>>) {
    let mut frame = vec![0; 70_000];
    while let Ok(length) = socket.recv(&mut frame) {
        let frame = &frame[..length];
        if let Some(answer) = answer(frame, &hosts.lock().unwrap()) {
            let _ = socket.send(&answer);
        }
        if !is_question(frame) && heard.send(frame.to_vec()).is_err() {
            return;
        }
    }
}

impl Wire {
    /// Makes a tap device.
    pub fn new(world: &mut World, device: &str) -> Self {
        let [theirs, ours] = ["device", "test"].map(|end| world.dir.path().join(format!("{device}.{end}")));
        let socket = UnixDatagram::bind(&ours).unwrap();
        let tap = format!("TUN,tun-type=tap,tun-name={device},iff-no-pi,iff-up");
        let other = format!("UNIX-SENDTO:{},bind={}", ours.display(), theirs.display());
        world.spawn("dp", "socat", &["-b", "70000", &tap, &other]);
        eventually("the tap device is there", || socket.connect(&theirs).ok());
        eventually("it is up", || {
            world.shell("dp", &format!("ip link show {device} up || true")).contains("UP").then_some(())
        });
        let hosts = Arc::<Mutex<Vec<Host>>>::default();
        let (sender, frames) = channel();
        let (listening, known) = (socket.try_clone().unwrap(), Arc::clone(&hosts));
        std::thread::spawn(move || hear(&listening, &known, &sender));
        Self { socket, frames, hosts }
    }

    /// Puts a host there.
    pub fn add(&self, host: &Host) {
        self.hosts.lock().unwrap().push(host.clone());
    }

    pub fn send(&self, frame: &[u8]) {
        assert_eq!(self.socket.send(frame).unwrap(), frame.len());
    }

    /// The next frame that is no question where somebody is.
    pub fn next(&self, what: &str) -> Vec<u8> {
        self.frames.recv_timeout(Duration::from_secs(10)).unwrap_or_else(|_| panic!("no frame: {what}"))
    }

    /// The next frame of which this is true; those before it are lost.
    pub fn find(&self, what: &str, mut wanted: impl FnMut(&[u8]) -> bool) -> Vec<u8> {
        let until = Instant::now() + Duration::from_secs(10);
        loop {
            let frame = self.next(what);
            if wanted(&frame) {
                return frame;
            }
            assert!(Instant::now() < until, "no such frame: {what}");
        }
    }

    /// Nothing has come that was not taken.
    pub fn is_silent(&self, what: &str) {
        if let Ok(frame) = self.frames.try_recv() {
            panic!("{what}: a frame that nobody waits for: {frame:02x?}");
        }
    }
}
