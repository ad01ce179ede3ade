//! Where targets are: ARP (RFC 826) on the provider's interfaces. Every message that is heard counts, not only answers to ours, so a
//! target that moves and says so is followed at once; one that says nothing is asked again every few seconds.

use crate::sys;
use anyhow::{Context, Result};
use privatelink_common::wire::{Arp, Ethernet, Ipv4, Mac, NETWORK};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use tokio::sync::mpsc;
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

/// The agent's ear and voice.
#[derive(Clone, Debug)]
pub struct Neighbours(Arc<OwnedFd>);

impl Neighbours {
    /// Opens the socket, and reports to `heard` what it hears.
    pub fn new(heard: mpsc::Sender<Heard>) -> Result<Self> {
        let socket = Arc::new(sys::arp_socket().context("cannot listen for ARP")?);
        let listener = Arc::clone(&socket);
        std::thread::spawn(move || {
            let mut frame = [0; 2048];
            while let Ok((length, ifindex)) = sys::receive_frame(listener.as_fd(), &mut frame) {
                let Some(said) = parse(&frame[..length], ifindex) else { continue };
                if heard.blocking_send(said).is_err() {
                    return;
                }
            }
        });
        Ok(Self(socket))
    }

    /// Asks on an interface where `target` is, on behalf of `sender`.
    pub fn ask(&self, ifindex: u32, sender: Ipv4, sender_mac: Mac, target: Ipv4) -> Result<()> {
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
        let frame = [ethernet.as_bytes(), arp.as_bytes()].concat();
        Ok(sys::send_frame(self.0.as_fd(), ifindex, &frame)?)
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
