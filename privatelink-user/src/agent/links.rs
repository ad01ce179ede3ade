//! The agent's interfaces: attached as they come, let go as they go, and all in the same mode, since frames that one program
//! redirects natively can leave only by an interface whose driver takes them.

use super::Agent;
use crate::kernel::Refused;
use crate::names::Kind;
use crate::net::{self, Peer};
use crate::plan::{Image, Place};
use crate::probe::Sockets;
use crate::sys::{self, XdpMode};
use crate::{features, flows};
use anyhow::Result;
use log::{info, warn};
use privatelink_common::tables::{Interface, Mtu};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

/// An interface of the configuration that is there.
#[derive(Clone, Debug)]
pub struct Attached {
    /// The kernel's index.
    pub ifindex: u32,
    /// Whether its driver can run the program.
    pub native: bool,
    /// How the program is attached.
    pub mode: Option<XdpMode>,
    /// Its other end.
    pub peer: Peer,
    /// The largest IP packet that both ends take, in bytes, as the path knows it.
    pub mtu: Mtu,
    /// Why it is not attached.
    pub problem: Option<String>,
}

/// Whether an interface's driver can run the program and take what others redirect to it. Of a veth, the latter depends on its other
/// end, which may change; kernels that do not say find out when the program is attached.
fn is_native(name: &str, ifindex: u32) -> bool {
    let Ok(features) = features::of(ifindex) else { return true };
    features.runs() && (features.takes() || net::is_veth(name).unwrap_or(false))
}

impl Agent {
    /// Takes the program off interfaces that the image does not have, or has elsewhere, and forgets the flows that go by them before
    /// their slots can become another's.
    pub(super) fn leave(&mut self, image: &Image) -> Result<()> {
        let was: BTreeMap<String, Place> = self.image.interfaces.clone();
        for interface in self.kernel.links()? {
            let stays = image.interfaces.get(&interface);
            if stays.is_some() && was.get(&interface).is_none_or(|place| Some(place) == stays) {
                continue;
            }
            self.kernel.detach(&interface)?;
            if let Some(attached) = self.links.remove(&interface) {
                self.maps.interfaces.set(&attached.ifindex, &Interface::default())?;
            }
        }
        let slots = |names: &BTreeMap<_, _>| -> BTreeSet<u16> {
            let of_kind = names
                .keys()
                .filter(|key: &&privatelink_common::tables::NameKey| key.kind == Kind::Interface as u32);
            of_kind.filter_map(|key| u16::try_from(key.id).ok()).collect()
        };
        let moved =
            was.iter().filter(|(name, place)| image.interfaces.get(*name).is_some_and(|now| now != *place));
        let mut gone: BTreeSet<u16> =
            slots(&self.image.names).difference(&slots(&image.names)).copied().collect();
        gone.extend(moved.map(|(_, place)| place.slot));
        for slot in &gone {
            self.maps.egress.delete(&(*slot).into())?;
            self.maps.mtus.set(&(*slot).into(), &0)?;
        }
        if !gone.is_empty() {
            flows::forget_slots(&self.maps, &gone)?;
        }
        for (vpc, (stack, _)) in std::mem::take(&mut self.stacks) {
            if image.interfaces.contains_key(&stack.link) {
                let sockets = Sockets::new(stack.namespace.clone());
                self.stacks.insert(vpc, (stack, sockets));
            } else {
                stack.remove()?;
            }
        }
        Ok(())
    }

    /// Attaches the program to interfaces that have come, and notices those that have gone.
    pub(super) fn enter(&mut self) -> Result<()> {
        let mut pending = self.find_links()?;
        // An interface whose driver turns out not to be able puts all of them into the other mode: once more, at most.
        for _ in 0..2 {
            if self.choose_mode() {
                pending = self.links.keys().cloned().collect();
            }
            for name in std::mem::take(&mut pending) {
                self.attach(&name);
            }
        }
        self.follow_mtus()
    }

    /// Takes note of interfaces that are new, and of those that are gone; returns the new ones' names.
    fn find_links(&mut self) -> Result<Vec<String>> {
        let mut new = Vec::new();
        for name in self.image.interfaces.keys().cloned().collect::<Vec<_>>() {
            let index = net::index_of(&name);
            if index == self.links.get(&name).map(|attached| attached.ifindex) {
                continue;
            }
            if let Some(gone) = self.links.remove(&name) {
                info!("{name} is gone");
                self.maps.interfaces.set(&gone.ifindex, &Interface::default())?;
            }
            let Some(ifindex) = index else { continue };
            let native = is_native(&name, ifindex);
            let peer = Peer::default();
            let attached = Attached { ifindex, native, mode: None, peer, mtu: 0, problem: None };
            self.links.insert(name.clone(), attached);
            self.peers_at = Instant::now();
            new.push(name);
        }
        Ok(new)
    }

    /// Native, if every driver can. Says whether that has changed.
    fn choose_mode(&mut self) -> bool {
        let without: Vec<&str> =
            self.links.iter().filter(|(_, it)| !it.native).map(|(name, _)| name.as_str()).collect();
        let mode = if without.is_empty() { XdpMode::Native } else { XdpMode::Generic };
        if mode == self.mode {
            return false;
        }
        match mode {
            XdpMode::Native => info!("every interface can run XDP natively again"),
            XdpMode::Generic => warn!(
                "every interface runs XDP in generic mode, which is slower, since {} cannot run it natively",
                without.join(", ")
            ),
        }
        self.mode = mode;
        true
    }

    fn attach(&mut self, name: &str) {
        let (Some(place), Some(attached)) = (self.image.interfaces.get(name), self.links.get(name)) else {
            return;
        };
        let (ifindex, mode) = (attached.ifindex, self.mode);
        let result = self.prepare(*place, ifindex).map_err(Refused::Other);
        let result = result.and_then(|()| self.kernel.attach(name, ifindex, mode));
        let Some(attached) = self.links.get_mut(name) else { return };
        (attached.mode, attached.problem) = match result {
            Ok(()) => (Some(mode), None),
            Err(Refused::Native(error)) => {
                attached.native = false;
                (None, Some(format!("cannot attach natively: {error}")))
            }
            Err(Refused::Other(error)) => (None, Some(format!("{error:#}"))),
        };
        if let Some(problem) = &attached.problem {
            warn!("{name}: {problem}");
        }
    }

    /// Tells the path about an interface, before it sees a packet from there.
    fn prepare(&self, place: Place, ifindex: u32) -> Result<()> {
        let limit = self.model.limits.max_ifindex;
        anyhow::ensure!(
            ifindex < limit,
            "its index {ifindex} is not below limits.max_ifindex, {limit}: raise it"
        );
        self.maps.egress.set(&place.slot.into(), &[ifindex, 0])?;
        self.maps.interfaces.set(&ifindex, &self.entry(place))
    }

    fn entry(&self, place: Place) -> Interface {
        Interface { vpc: place.vpc, slot: place.slot, stack: place.stack.into(), fits: self.fits }
    }

    /// The largest packet that fits through everything.
    fn fits(&self) -> u16 {
        let known = |name: &String| self.image.interfaces.get(name).is_some_and(|place| !place.stack);
        let links = self.links.iter().filter(|(name, _)| known(name)).map(|(_, attached)| attached.mtu);
        let endpoints = self.image.endpoints.values().map(|gate| gate.mtu.into());
        let least = links.chain(endpoints).min().unwrap_or(0);
        u16::try_from(least).unwrap_or(u16::MAX)
    }

    /// Tells the path the interfaces' MTUs, as they change.
    fn follow_mtus(&mut self) -> Result<()> {
        for (name, attached) in &mut self.links {
            let Some(place) = self.image.interfaces.get(name) else { continue };
            // One that is just going is missed by the next look at the links.
            let Ok(own) = sys::mtu(name) else { continue };
            let mtu = attached.peer.mtu.map_or(own, |peer| peer.min(own));
            if mtu != attached.mtu {
                self.maps.mtus.set(&place.slot.into(), &mtu)?;
                attached.mtu = mtu;
            }
        }
        let fits = self.fits();
        if fits != self.fits {
            self.fits = fits;
            for (name, attached) in &self.links {
                let Some(place) = self.image.interfaces.get(name) else { continue };
                self.maps.interfaces.set(&attached.ifindex, &self.entry(*place))?;
            }
        }
        Ok(())
    }

    pub(super) fn look_at_peers(&mut self) {
        for (name, attached) in &mut self.links {
            if self.image.interfaces.get(name).is_none_or(|place| place.stack) {
                continue;
            }
            let native = self.mode == XdpMode::Native;
            let Ok(peer) = net::peer(name, attached.ifindex, native, self.model.manage_peer_offloads) else {
                continue;
            };
            if peer != attached.peer
                && let Some(remedy) = peer.remedy()
            {
                warn!("{name}: packets will be lost at its other end: {remedy}");
            }
            attached.peer = peer;
        }
    }
}
