//! Where targets are: ARP (RFC 826) on the provider's interfaces. Every message that is heard counts, not only answers to ours, so a
//! target that moves and says so is followed at once; one that says nothing is asked again every few seconds.

use crate::sys;
use anyhow::Result;
use log::warn;
use privatelink_common::wire::{Arp, Ethernet, Ipv4, Mac, NETWORK};
use socket2::{Domain, Protocol, SockFilter, Socket, Type};
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd;
use std::sync::Arc;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use zerocopy::{FromBytes, IntoBytes, big_endian::U16};

/// Someone said where an address is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heard {
    /// The interface that the message came by.
    pub ifindex: u32,
    /// The address.
    pub address: Ipv4,
    /// Where it is.
    pub mac: Mac,
}

/// A classic filter (packet(7)): ARP, but for what this host sends.
fn filter() -> [SockFilter; 6] {
    const LOAD_BYTE: u16 = 0x30;
    const LOAD_HALF: u16 = 0x28;
    const JUMP_IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    // SKF_AD_OFF + SKF_AD_PKTTYPE: what stands there is PACKET_OUTGOING, 4, for what leaves.
    const PACKET_TYPE: u32 = 0xffff_f000 + 4;
    [
        SockFilter::new(LOAD_BYTE, 0, 0, PACKET_TYPE),
        SockFilter::new(JUMP_IF_EQUAL, 3, 0, 4),
        SockFilter::new(LOAD_HALF, 0, 0, 12),
        SockFilter::new(JUMP_IF_EQUAL, 0, 1, 0x0806),
        SockFilter::new(RETURN, 0, 0, 2048),
        SockFilter::new(RETURN, 0, 0, 0),
    ]
}

/// An interface's socket, and who listens to it.
#[derive(Debug)]
struct Ear {
    socket: Arc<Socket>,
    listener: JoinHandle<()>,
}

impl Drop for Ear {
    fn drop(&mut self) {
        self.listener.abort();
    }
}

/// The agent's ears, one at each interface, and its voice.
///
/// Each hears the frames as they come in: an interface that is a bridge's port has none left for those who only ask for ARP.
#[derive(Debug)]
pub struct Neighbours {
    runtime: Handle,
    heard: mpsc::Sender<Heard>,
    ears: BTreeMap<u32, Ear>,
}

impl Neighbours {
    /// Reports to `heard`, from tasks of `runtime`, what is heard.
    pub fn new(runtime: Handle, heard: mpsc::Sender<Heard>) -> Self {
        Self { runtime, heard, ears: BTreeMap::new() }
    }

    /// Listens on these interfaces, and on no others.
    pub fn listen(&mut self, interfaces: &BTreeSet<u32>) {
        self.ears.retain(|ifindex, ear| interfaces.contains(ifindex) && !ear.listener.is_finished());
        for &ifindex in interfaces {
            if self.ears.contains_key(&ifindex) {
                continue;
            }
            match self.open(ifindex) {
                Ok(ear) => drop(self.ears.insert(ifindex, ear)),
                // It may be gone by now; the next look around tries again, or does not find it any more.
                Err(error) => warn!("cannot listen for ARP on the interface {ifindex}: {error:#}"),
            }
        }
    }

    fn open(&self, ifindex: u32) -> Result<Ear> {
        // Of no protocol, so that nothing comes before the filter is there.
        let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(0)))?;
        socket.attach_filter(&filter())?;
        socket.set_nonblocking(true)?;
        sys::bind_to_frames(socket.as_fd(), ifindex)?;
        let socket = Arc::new(socket);
        let listener = self.runtime.spawn(listen(Arc::clone(&socket), ifindex, self.heard.clone()));
        Ok(Ear { socket, listener })
    }

    /// Asks on an interface where `target` is, on behalf of `sender`. An interface that nobody listens on is not asked.
    pub fn ask(&self, ifindex: u32, sender: Ipv4, sender_mac: Mac, target: Ipv4) -> Result<()> {
        let Some(ear) = self.ears.get(&ifindex) else { return Ok(()) };
        let ethernet = Ethernet { destination: [0xff; 6], source: sender_mac, ethertype: U16::new(0x0806) };
        let arp = Arp {
            hardware: U16::new(1),
            protocol: U16::new(0x0800),
            lengths: [6, 4],
            operation: U16::new(1),
            sender_mac,
            sender,
            target_mac: [0; 6],
            target,
        };
        ear.socket.send(&[ethernet.as_bytes(), arp.as_bytes()].concat())?;
        Ok(())
    }
}

/// Reports what comes to a socket, until its interface is gone or nobody wants to hear.
async fn listen(socket: Arc<Socket>, ifindex: u32, heard: mpsc::Sender<Heard>) {
    let Ok(socket) = sys::watched(socket) else { return };
    let mut frame = [0; 2048];
    while let Ok(mut ready) = socket.readable().await {
        let received = ready.try_io(|socket| {
            use std::io::Read;
            socket.get_ref().as_ref().read(&mut frame)
        });
        match received {
            Ok(Ok(length)) => {
                let Some(said) = parse(&frame[..length], ifindex) else { continue };
                if heard.send(said).await.is_err() {
                    return;
                }
            }
            // Said once each time the interface goes down.
            Ok(Err(error)) if error.kind() == std::io::ErrorKind::NetworkDown => {}
            Ok(Err(_)) => return,
            Err(_would_block) => {}
        }
    }
}

/// What a message says of its sender, if it can be believed: a unicast address, and the same in both headers.
fn parse(frame: &[u8], ifindex: u32) -> Option<Heard> {
    let (ethernet, _) = Ethernet::read_from_prefix(frame).ok()?;
    let (arp, _) = Arp::read_from_prefix(frame.get(NETWORK..)?).ok()?;
    let shaped = arp.hardware.get() == 1 && arp.protocol.get() == 0x0800 && arp.lengths == [6, 4];
    let unicast = arp.sender_mac[0] & 1 == 0 && arp.sender_mac != [0; 6] && arp.sender != [0; 4];
    (shaped && unicast && arp.sender_mac == ethernet.source).then_some(Heard {
        ifindex,
        address: arp.sender,
        mac: arp.sender_mac,
    })
}
