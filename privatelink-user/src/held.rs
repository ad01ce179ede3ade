//! Fragments of UDP datagrams that come before the first of their datagram. XDP can hold no frame, so the programs hand them over, as
//! many as [`privatelink_common::limits`] says, and a thread of the agent holds them: as soon as the first one has come, which the
//! programs remember in `fragments`, they go through the real path over the live tables, and out by a packet socket; if it has not come
//! after a second, they are dropped.
//!
//! What has become of them is counted by the program `account`, where all packets are counted.

mod shelf;

use crate::flows;
use crate::kernel::Kernel;
use crate::live::Live;
use crate::maps::{CHUNK, Maps};
use crate::sys;
use anyhow::{Context, Result};
use aya::maps::MapData;
use aya::maps::perf::{PerfEvent, PerfEventArrayBuffer};
use log::error;
use privatelink_common::frame::{DIFFERENCE, SliceFrame};
use privatelink_common::held::{Account, Held, OUTCOME, TO_CONSUMER, TO_PROVIDER};
use privatelink_common::limits::{FRAGMENT_TIMEOUT, FRAGMENTED_DATAGRAMS, OUTCOMES};
use privatelink_common::path::{self, fragment};
use privatelink_common::tables::Trunk;
use privatelink_common::verdict::{Action, Direction, DropReason};
use privatelink_common::wire::{FragmentHeader, Ipv4Header, Ipv6Header, NETWORK, TRANSPORT6};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use shelf::{Fragment, Shelf};
use socket2::{Domain, Socket, Type};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};
use zerocopy::{FromBytes, IntoBytes};

/// Room of each CPU for fragments on their way here, in pages, a power of two: what several VPCs may have on their way at a time. Less
/// where there are many CPUs, but always more than one VPC may have.
fn pages(cpus: usize) -> usize {
    let fair = (4096 / cpus.max(1)).clamp(128, 256);
    1 << fair.ilog2()
}

/// Starts to hold what the programs hand over, for as long as the process lives.
pub fn start(kernel: &Kernel, maps: Arc<Maps>) -> Result<()> {
    let (account, mut held) = kernel.held()?;
    let cpus = aya::util::online_cpus().map_err(|(_, error)| error)?;
    // What was on its way to another agent is gone. Nothing is handed over while there are no buffers.
    let handed = maps.held_rates.filled()?;
    let taken: BTreeMap<u32, u64> = handed.into_iter().map(|(vpc, rate)| (vpc, rate.handed)).collect();
    taken.iter().try_for_each(|(vpc, bytes)| maps.held_taken.set(vpc, bytes))?;
    let (pages, mut buffers) = (pages(cpus.len()), Vec::new());
    for cpu in cpus {
        buffers.push(held.open(cpu, Some(pages)).context("cannot make a buffer for fragments")?);
    }
    let (shelf, sockets, counted) = (Shelf::default(), BTreeMap::new(), BTreeMap::new());
    let mut holder = Holder { maps, account, buffers, taken, shelf, sockets, asked: None, counted };
    std::thread::spawn(move || {
        if let Err(error) = holder.run() {
            error!("fragments that come before their first are dropped from now on: {error:#}");
        }
    });
    Ok(())
}

/// Who holds them.
struct Holder {
    maps: Arc<Maps>,
    account: OwnedFd,
    buffers: Vec<PerfEventArrayBuffer<MapData>>,
    /// Bytes that have come, by VPC, as the programs count them.
    taken: BTreeMap<u32, u64>,
    shelf: Shelf,
    /// A socket for each interface that something was sent by, so that none fills another's.
    sockets: BTreeMap<u32, Socket>,
    /// When the table of first fragments was looked through, and why those of the time were not in it.
    asked: Option<(Instant, DropReason)>,
    /// What is to be counted: packets and bytes, by the counters' kind and index.
    counted: BTreeMap<(u32, u32), (u64, u64)>,
}

impl Holder {
    fn run(&mut self) -> Result<()> {
        loop {
            self.wait()?;
            self.take_in()?;
            let now = Instant::now();
            for key in self.shelf.due(now) {
                if fragment::known(&Live::new(&self.maps), &key, flows::now()).is_some() {
                    self.shelf.take(&key).into_iter().for_each(|it| self.put_through(it));
                } else {
                    let gone = self.shelf.leave(&key, now);
                    let reason = if gone.is_empty() { DropReason::FragmentUnknown } else { self.why(now)? };
                    gone.iter().for_each(|it| self.drop(it, reason));
                }
            }
            self.count()?;
        }
    }

    /// Why the first fragment of those that are dropped is not known: it has not come, or others have pushed it out of the table meanwhile.
    fn why(&mut self, now: Instant) -> Result<DropReason> {
        match self.asked {
            Some((at, reason)) if now.saturating_duration_since(at) < ASKED_EVERY => Ok(reason),
            _ => {
                let reason = if is_crowded(&self.maps)? {
                    DropReason::FragmentTableFull
                } else {
                    DropReason::FragmentUnknown
                };
                self.asked = Some((now, reason));
                Ok(reason)
            }
        }
    }

    /// Waits until something comes, or is to be looked for.
    fn wait(&self) -> Result<()> {
        let pause = self.shelf.next().map(|at| at.saturating_duration_since(Instant::now()));
        let pause = pause.map(Timespec::try_from).transpose()?;
        let mut fds: Vec<_> = self.buffers.iter().map(|it| PollFd::new(it, PollFlags::IN)).collect();
        match poll(&mut fds, pause.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error).context("cannot wait for fragments"),
        }
    }

    /// Takes over what has gathered.
    fn take_in(&mut self) -> Result<()> {
        let mut came: Vec<Fragment> = Vec::new();
        for buffer in &mut self.buffers {
            buffer.for_each(|event| {
                // What is lost has been counted by the program.
                if let PerfEvent::Sample { head, tail } = event {
                    came.extend(read(&[head, tail].concat()));
                }
            });
        }
        let mut vpcs = BTreeSet::new();
        for Fragment { held, .. } in &came {
            let taken = self.taken.entry(held.vpc.into()).or_default();
            *taken += u64::from(held.length);
            vpcs.insert(u32::from(held.vpc));
        }
        for vpc in vpcs {
            self.maps.held_taken.set(&vpc, self.taken.get(&vpc).unwrap_or(&0))?;
        }
        for mut fragment in came {
            let (vpc, frame) = (fragment.held.vpc, SliceFrame::new(&mut fragment.frame));
            let refused = match fragment::datagram(&frame, vpc) {
                Some(key) => {
                    self.shelf.add(key, fragment).err().map(|it| (it, DropReason::FragmentTableFull))
                }
                None => Some((fragment, DropReason::Malformed)),
            };
            if let Some((fragment, reason)) = refused {
                self.drop(&fragment, reason);
            }
        }
        Ok(())
    }

    /// Sends a fragment whose first has come the way that the path says.
    fn put_through(&mut self, fragment: Fragment) {
        if let Err(reason) = self.forward(&fragment) {
            self.drop(&fragment, reason);
        }
    }

    fn forward(&mut self, Fragment { held, frame, .. }: &Fragment) -> Result<(), DropReason> {
        let interface = self.maps.interfaces.get(&held.ifindex).ok().flatten().unwrap_or_default();
        if interface.vpc != held.vpc {
            // Its interface has become another VPC's meanwhile, where there may be such a datagram, too.
            return Err(DropReason::NoInterface);
        }
        let mut bytes = [&[0; ROOM][..], frame].concat();
        let end = bytes.len();
        let mut frame = SliceFrame::within(&mut bytes, ROOM, end).ok_or(DropReason::Malformed)?;
        let verdict = path::forward(&mut frame, &Live::new(&self.maps), held.ifindex, flows::now())?;
        let Action::Forward { interface, endpoint, direction, ipv6, .. } = verdict.action() else {
            return Err(DropReason::FragmentUnknown);
        };
        self.send(interface, frame.as_bytes())?;
        let of = match direction {
            Direction::ToProvider => TO_PROVIDER,
            Direction::ToConsumer => TO_CONSUMER,
        };
        self.add((of, endpoint), length(frame.as_bytes(), ipv6));
        Ok(())
    }

    /// Sends a frame by the interface with this slot, with the tags that it has there.
    fn send(&mut self, slot: u16, frame: &[u8]) -> Result<(), DropReason> {
        let (ifindex, tags) = exit(&self.maps, slot).ok_or(DropReason::NoInterface)?;
        let (macs, rest) = frame.split_at_checked(MACS).ok_or(DropReason::Malformed)?;
        let frame = [macs, &tags, rest].concat();
        let socket = match self.sockets.entry(ifindex) {
            Entry::Occupied(entry) => entry.into_mut(),
            // Of no protocol, so that it hears nothing.
            Entry::Vacant(entry) => entry
                .insert(Socket::new(Domain::PACKET, Type::RAW, None).map_err(|_| DropReason::NoInterface)?),
        };
        sys::send_frame(socket.as_fd(), ifindex, &frame).or_else(|error| {
            let reason = unsent(&error);
            if reason == Some(DropReason::NoInterface) {
                self.sockets.remove(&ifindex);
            }
            reason.map_or(Ok(()), Err)
        })
    }

    fn drop(&mut self, fragment: &Fragment, reason: DropReason) {
        let index = u32::from(fragment.held.vpc) * OUTCOMES + reason.code();
        self.add((OUTCOME, index), fragment.frame.len() as u64);
    }

    fn add(&mut self, counter: (u32, u32), length: u64) {
        let (packets, bytes) = self.counted.entry(counter).or_default();
        (*packets, *bytes) = (*packets + 1, *bytes + length);
    }

    /// Has the program count what has become of them.
    fn count(&mut self) -> Result<()> {
        for ((of, index), (packets, bytes)) in std::mem::take(&mut self.counted) {
            let account = Account { packets, bytes, of, index };
            sys::run_program(self.account.as_fd(), account.as_bytes()).context("cannot count fragments")?;
        }
        Ok(())
    }
}

/// How often the whole table is looked through, at most.
const ASKED_EVERY: Duration = Duration::from_secs(1);
/// Places of the table that each CPU may have aside for itself (`LOCAL_FREE_TARGET` in the kernel's bpf_lru_list.c).
const ASIDE: usize = 128;

/// Whether `fragments` has no place left but those of datagrams that may still be followed. The kernel makes room in it by itself, and does
/// not say so.
fn is_crowded(maps: &Maps) -> Result<bool> {
    let (cpus, now) = (sys::possible_cpus().context("cannot learn how many CPUs there are")?, flows::now());
    let full = FRAGMENTED_DATAGRAMS.saturating_sub(cpus * ASIDE).max(FRAGMENTED_DATAGRAMS / 2);
    let mut recent = 0;
    maps.fragments.walk(CHUNK, |_, known| {
        recent += known.iter().filter(|it| now.wrapping_sub(it.at) <= FRAGMENT_TIMEOUT).count();
    })?;
    Ok(recent >= full)
}

/// By how much a frame may grow at its front: a header of the other family, and a fragment header.
const ROOM: usize = DIFFERENCE + size_of::<FragmentHeader>();
/// Bytes of both link-layer addresses, behind which tags are.
const MACS: usize = 12;

/// Takes a sample apart; the kernel fills it up to eight bytes.
fn read(sample: &[u8]) -> Option<Fragment> {
    let (held, frame) = Held::read_from_prefix(sample).ok()?;
    let frame = frame.get(..held.length as usize)?.to_vec();
    Some(Fragment { held, frame, came: Instant::now() })
}

/// How frames leave by a slot: the kernel's index of a device, and the tags that they have there.
fn exit(maps: &Maps, slot: u16) -> Option<(u32, Vec<u8>)> {
    let plain = maps.egress_tcx.get(&slot.into()).ok().flatten().filter(|ifindex| *ifindex != 0);
    if let Some(ifindex) = plain {
        return Some((ifindex, Vec::new()));
    }
    let Trunk { ifindex, outer, inner, .. } = maps.trunks.get(&slot.into()).ok().flatten()?;
    let tags: Vec<_> = [outer, inner].into_iter().filter(|tag| *tag != [0; 4]).collect();
    (ifindex != 0).then(|| (ifindex, tags.concat()))
}

/// Why a frame was not sent; nothing where the interface has lost it, which counts it itself.
fn unsent(error: &io::Error) -> Option<DropReason> {
    match error.raw_os_error() {
        Some(libc::ENOBUFS) => None,
        Some(libc::EMSGSIZE) => Some(DropReason::TooBig),
        // What was sent before is still on its way.
        Some(libc::EAGAIN) => Some(DropReason::FragmentTableFull),
        _ => Some(DropReason::NoInterface),
    }
}

/// Bytes that count of a frame that is forwarded: what the packet's own header says, as the programs have it.
fn length(frame: &[u8], ipv6: bool) -> u64 {
    let behind = frame.get(NETWORK..).unwrap_or_default();
    let length = if ipv6 {
        let ip = Ipv6Header::read_from_prefix(behind);
        ip.map_or(0, |(ip, _)| TRANSPORT6 + usize::from(ip.payload_length.get()))
    } else {
        Ipv4Header::read_from_prefix(behind).map_or(0, |(ip, _)| NETWORK + usize::from(ip.total_length.get()))
    };
    length as u64
}
