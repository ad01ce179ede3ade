//! The agent's interfaces: attached as they come, let go as they go, each by the hook that `hooks` chooses for it, and by another when
//! what is known of them has changed.

use super::Agent;
use super::vlans::carried;
use crate::features::{self, Features};
use crate::hooks::{self, Choice, Facts};
use crate::kernel::{Hook, Refused};
use crate::names::Kind;
use crate::net::{self, Namespaces, Peer};
use crate::plan::{Image, Place};
use crate::sockets::Sockets;
use crate::sys::{self, XdpMode};
use crate::{flows, model};
use anyhow::{Context, Result, ensure};
use log::{info, warn};
use privatelink_common::tables::{Interface, Mtu, Trunk};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// An interface of the configuration that is there.
#[derive(Clone, Debug)]
pub struct Attached {
    /// The kernel's index.
    pub ifindex: u32,
    /// What its driver can do, where the kernel says so.
    features: Option<Features>,
    /// The largest packet that it carries.
    own_mtu: u32,
    /// Whether its driver has refused the program.
    refused: bool,
    /// Whether the other end could not be mended.
    unmendable: bool,
    /// Whether it was a trunk when this was found out.
    pub(super) trunk: bool,
    /// By which features its driver takes tags off before XDP sees a frame.
    taken_tags: Vec<&'static str>,
    /// Where it belongs, as the path knows it.
    pub(super) place: Option<Place>,
    /// Whether its program is one for trunks.
    runs_as_trunk: bool,
    /// The hook that was chosen, and tried.
    pub choice: Option<Choice>,
    /// How the program is attached.
    pub hook: Option<Hook>,
    /// Its other end.
    pub peer: Peer,
    /// The largest IP packet that both ends take, in bytes, as the path knows it.
    pub mtu: Mtu,
    /// Why it is not attached.
    pub problem: Option<String>,
    /// When that is tried again.
    retry: Option<Retry>,
}

/// The pause before what has failed is tried again, which doubles each time.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest one.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// When something is tried again that others may have made possible meanwhile.
#[derive(Clone, Copy, Debug)]
struct Retry {
    at: Instant,
    pause: Duration,
}

impl Retry {
    fn after(before: Option<Self>) -> Self {
        let pause = before.map_or(FIRST_PAUSE, |before| LONGEST_PAUSE.min(before.pause * 2));
        Self { at: Instant::now() + pause, pause }
    }
}

impl Attached {
    /// What the other end lacks for the hook that is in place, and what mends it.
    pub fn remedy(&self) -> Option<String> {
        match self.hook {
            Some(Hook::Xdp(mode)) => self.peer.remedy(mode),
            Some(Hook::Tcx) | None => None,
        }
    }

    /// Looks at its other end, and at what its driver does with tags.
    pub(super) fn look(&mut self, name: &str, namespaces: &Namespaces) {
        if let Ok(peer) = net::peer(name, self.ifindex, self.trunk, namespaces) {
            self.peer = peer;
        }
        let tags = self.trunk.then(|| net::taken_tags(name, self.peer.kind));
        self.taken_tags = tags.unwrap_or_default();
    }

    fn is_due(&self) -> bool {
        self.retry.is_some_and(|retry| retry.at <= Instant::now())
    }

    fn is_veth(&self) -> bool {
        matches!(self.peer.kind, net::Kind::Veth(..))
    }

    fn is_mendable(&self, wish: model::Hook, manage: bool) -> bool {
        manage && wish != model::Hook::Tcx && !self.unmendable && self.peer.place.is_some()
    }

    /// Why XDP may not see the tags of its frames, if it is a trunk.
    fn veiled(&self, mendable: bool) -> Option<String> {
        if !self.trunk {
            return None;
        }
        // What generic mode gets may have come by another device.
        if !self.features.is_none_or(Features::runs) || self.refused {
            return Some("its driver cannot run XDP".into());
        }
        match self.taken_tags.as_slice() {
            [] if !mendable && self.peer.hides_tags() => {
                Some("its other end may keep tags beside the frames, where XDP does not see them".into())
            }
            [] => None,
            taken => Some(format!("its driver takes tags off before XDP sees them: {}", taken.join(" "))),
        }
    }

    fn facts(&self, wish: model::Hook, place: Place, vpcs: BTreeSet<u16>, manage: bool) -> Facts {
        let mendable = self.is_mendable(wish, manage);
        let takes = match self.peer.kind {
            _ if place.stack => true,
            // What an other end lacks for the XDP that was asked for is reported, and the others need not do without for it.
            net::Kind::Veth(..) => wish == model::Hook::Xdp || mendable || !self.peer.is_deaf(),
            _ => self.features.is_none_or(|features| features.takes(self.own_mtu)),
        };
        let runs = self.features.is_none_or(Features::runs) && !self.refused;
        Facts {
            wish,
            vpcs,
            stack: place.stack,
            veiled: self.veiled(mendable),
            native: runs && (takes || place.stack || self.is_veth()),
            takes,
            unfit: self.unfit(mendable, takes).filter(|_| !place.stack),
        }
    }

    /// Why XDP would not do for what comes from the other end.
    fn unfit(&self, mendable: bool, takes: bool) -> Option<String> {
        match self.peer.kind {
            _ if !self.features.is_none_or(Features::runs) || self.refused => {
                Some("its driver cannot run XDP".into())
            }
            net::Kind::Tun => Some("what comes from a tap device may have incomplete checksums".into()),
            net::Kind::Veth(..) if self.peer.place.is_none() => Some("its other end cannot be seen".into()),
            net::Kind::Veth(..) if !mendable && !self.peer.lacks.is_empty() => {
                Some(format!("its other end lacks what XDP needs: {}", self.peer.lacks.join(" ")))
            }
            net::Kind::Other if !takes => Some("its driver does not take what XDP redirects".into()),
            net::Kind::Veth(..) | net::Kind::Other => None,
        }
    }
}

impl Agent {
    /// Takes the program off interfaces that the image does not have, or has elsewhere, and forgets the flows that go by them before
    /// their slots can become another's.
    pub(super) fn leave(&mut self, image: &Image) -> Result<()> {
        let was: BTreeMap<String, Place> = self.image.interfaces.clone();
        // A trunk that comes to be a VPC's, or nobody's, goes on as its VLANs do.
        let goes_on = |name: &str, was: &Place, now: &Place| {
            let is_trunk =
                self.image.vlans_of(name).next().is_some() && image.vlans_of(name).next().is_some();
            was == now || is_trunk && (was.vpc == 0 || now.vpc == 0)
        };
        for interface in self.kernel.links()? {
            let stays = image.interfaces.get(&interface);
            if let Some(stays) = stays
                && was.get(&interface).is_none_or(|place| goes_on(&interface, place, stays))
            {
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
        let mut gone: BTreeSet<u16> =
            slots(&self.image.names).difference(&slots(&image.names)).copied().collect();
        let mut emptied = BTreeSet::new();
        for (name, place) in &was {
            match image.interfaces.get(name) {
                Some(now) if now != place && goes_on(name, place, now) => {
                    if let Some(attached) = self.links.get(name) {
                        self.maps.interfaces.set(&attached.ifindex, &Interface::default())?;
                    }
                    emptied.insert(place.slot)
                }
                Some(now) if now != place => gone.insert(place.slot),
                _ => false,
            };
        }
        gone.extend(self.leave_vlans(image)?);
        for slot in &gone {
            self.maps.egress.delete(&(*slot).into())?;
            self.maps.mtus.set(&(*slot).into(), &0)?;
            self.maps.egress_tcx.set(&(*slot).into(), &0)?;
            self.maps.trunks.set(&(*slot).into(), &Trunk::default())?;
        }
        gone.extend(emptied);
        if !gone.is_empty() {
            flows::forget_slots(&self.maps, &gone)?;
        }
        for (vpc, (stack, _)) in std::mem::take(&mut self.stacks) {
            if image.interfaces.contains_key(&stack.link) {
                let sockets = Sockets::new(stack.namespace.clone());
                self.stacks.insert(vpc, (stack, sockets));
            } else {
                self.resolvers.remove(&vpc);
                stack.remove()?;
            }
        }
        Ok(())
    }

    /// Attaches the program to interfaces that have come, notices those that have gone, and moves those whose hook is another by now.
    pub(super) fn enter(&mut self) -> Result<()> {
        self.find_links()?;
        self.follow_trunks()?;
        self.follow_vlans()?;
        let mut refused = Ok(());
        // An interface whose driver turns out not to be able has another hook then: once more, at most.
        for _ in 0..2 {
            let mut chosen = self.choose_hooks();
            if chosen.is_empty() {
                break;
            }
            if let Err(error) = self.leave_renamed() {
                warn!("{error:#}");
            }
            // The path knows all of them before the first sends it something.
            chosen.retain(|name| match self.prepare(name) {
                Ok(()) => true,
                Err(error) => {
                    self.note(name, Some(format!("{error:#}")));
                    false
                }
            });
            for name in chosen {
                refused = self.attach(&name).and(refused);
            }
        }
        let of_tenants = |name: &String| self.image.interfaces.get(name).is_some_and(|place| !place.stack);
        let links = self.links.iter().filter(|(name, _)| of_tenants(name));
        self.neighbours.listen(&links.map(|(_, attached)| attached.ifindex).collect());
        self.follow_mtus()?;
        self.follow_vlans()?;
        refused
    }

    fn leave_renamed(&mut self) -> Result<()> {
        let names = self.links.iter().map(|(name, attached)| (attached.ifindex, name.as_str()));
        self.kernel.leave_renamed(&names.collect())
    }

    /// Takes note of interfaces that are new, and of those that are gone.
    fn find_links(&mut self) -> Result<()> {
        let mut namespaces = None;
        for (name, place) in self.image.interfaces.clone() {
            let index = net::index_of(&name);
            if index == self.links.get(&name).map(|attached| attached.ifindex) {
                continue;
            }
            if let Some(gone) = self.links.remove(&name) {
                info!("{name} is gone");
                self.maps.interfaces.set(&gone.ifindex, &Interface::default())?;
            }
            let Some(ifindex) = index else { continue };
            if namespaces.is_none() {
                namespaces = Some(Namespaces::read()?);
            }
            let mut attached = Attached {
                ifindex,
                features: features::of(ifindex).ok(),
                own_mtu: net::mtu(&name).unwrap_or_default(),
                refused: false,
                unmendable: false,
                trunk: false,
                taken_tags: Vec::new(),
                place: None,
                runs_as_trunk: false,
                choice: None,
                hook: None,
                peer: Peer::default(),
                mtu: 0,
                problem: None,
                retry: None,
            };
            if let Some(namespaces) = namespaces.as_ref().filter(|_| !place.stack) {
                attached.trunk = self.is_trunk(&name);
                attached.look(&name, namespaces);
            }
            self.links.insert(name, attached);
            self.peers_at = Instant::now();
        }
        Ok(())
    }

    fn wish(&self, name: &str) -> model::Hook {
        self.image.hooks.get(name).copied().unwrap_or_default()
    }

    /// Chooses every interface's hook, and returns the names of those to be attached by another than before, or by one that failed a while
    /// ago; those first that are attached already: what a new one cannot take, they stop sending before it is there.
    fn choose_hooks(&mut self) -> Vec<String> {
        let id = |vpc: &str| self.names.id(Kind::Vpc, vpc).and_then(|id| u16::try_from(id).ok());
        let connections = hooks::connections(&self.model, id);
        let heard = hooks::heard(&self.model, id);
        let manage = self.model.manage_peer_offloads;
        let facts = self.links.iter().filter_map(|(name, attached)| {
            let place = self.image.interfaces.get(name)?;
            let vlans = self.image.vlans_of(name).map(|vlan| vlan.place.vpc);
            let heard = heard.get(&place.vpc).into_iter().flatten().filter(|_| place.stack).copied();
            let vpcs = vlans.chain([place.vpc]).chain(heard).filter(|vpc| *vpc != 0).collect();
            Some((name.clone(), attached.facts(self.wish(name), *place, vpcs, manage)))
        });
        let choices = hooks::choose(&facts.collect(), &connections, self.has_tcx);
        let mut changed = Vec::new();
        for (name, choice) in choices {
            let Some(attached) = self.links.get_mut(&name) else { continue };
            let same = attached.choice.as_ref().map(|before| before.hook) == Some(choice.hook);
            let other_program = attached.hook.is_some() && attached.runs_as_trunk != attached.trunk;
            if !same || attached.is_due() || other_program && attached.problem.is_none() {
                changed.push((attached.hook.is_none(), name));
            }
            attached.choice = Some(choice);
        }
        changed.sort();
        changed.into_iter().map(|(_, name)| name).collect()
    }

    /// Attaches the program of an interface's hook to it, and takes note of what is in the way. Only that the kernel takes no such program
    /// is an error: all interfaces of this hook will have it.
    fn attach(&mut self, name: &str) -> Result<()> {
        let Some(attached) = self.links.get(name) else { return Ok(()) };
        let Some(Choice { hook, why }) = attached.choice.clone() else { return Ok(()) };
        let (before, ifindex, wish) = (attached.hook, attached.ifindex, self.wish(name));
        let trunk = attached.trunk;
        self.mend(name);
        if let Some(attached) = self.links.get_mut(name)
            && matches!(hook, Hook::Xdp(_))
            && attached.veiled(attached.is_mendable(wish, self.model.manage_peer_offloads)).is_some()
        {
            // What could not be mended chooses again.
            attached.choice = None;
            return Ok(());
        }
        let result = match hook {
            Hook::Tcx if !self.has_tcx => {
                Err(Refused::Other(anyhow::anyhow!("this kernel has no TCX, which Linux has from 6.6 on")))
            }
            _ => self.kernel.attach(name, ifindex, hook, trunk),
        };
        let Some(attached) = self.links.get_mut(name) else { return Ok(()) };
        let problem = match result {
            Ok(()) => {
                (attached.hook, attached.runs_as_trunk) = (Some(hook), trunk);
                None
            }
            Err(Refused::Program(error)) => {
                // To load it takes a second, and what it lacks does not come.
                (attached.problem, attached.retry) = (Some(format!("{error:#}")), None);
                return Err(error);
            }
            Err(Refused::Native(error)) => {
                attached.refused = true;
                Some(format!("cannot attach natively: {error}"))
            }
            Err(Refused::Other(error)) => Some(format!("{error:#}")),
        };
        match hook {
            _ if problem.is_some() || before == Some(hook) => {}
            Hook::Xdp(XdpMode::Native) if before.is_none() => {}
            Hook::Tcx if wish == model::Hook::Xdp => {
                warn!("{name} is attached by TCX, though its hook is xdp: {why}");
            }
            Hook::Tcx => info!("{name} is attached by TCX: {why}"),
            Hook::Xdp(XdpMode::Native) => info!("{name} is attached by XDP: {why}"),
            Hook::Xdp(XdpMode::Generic) => {
                warn!("{name} runs XDP in generic mode, which is slower: {why}");
            }
        }
        let remedy = attached.remedy().filter(|_| problem.is_none());
        if let Some(remedy) = remedy {
            warn!("{name}: packets will be lost at its other end: {remedy}");
        }
        self.note(name, problem);
        Ok(())
    }

    fn note(&mut self, name: &str, problem: Option<String>) {
        let Some(attached) = self.links.get_mut(name) else { return };
        if let Some(problem) = problem.as_ref().filter(|problem| attached.problem.as_ref() != Some(problem)) {
            warn!("{name}: {problem}");
        }
        attached.retry = problem.is_some().then(|| Retry::after(attached.retry));
        attached.problem = problem;
    }

    /// Tells the path about an interface, before it sees a packet from there.
    pub(super) fn prepare(&mut self, name: &str) -> Result<()> {
        let place = *self.image.interfaces.get(name).context("it belongs nowhere")?;
        let attached = self.links.get_mut(name).context("it is not there")?;
        attached.place = Some(place);
        let ifindex = attached.ifindex;
        let limit = self.model.limits.max_ifindex;
        ensure!(ifindex < limit, "its index {ifindex} is not below limits.max_ifindex, {limit}: raise it");
        self.maps.egress.set(&place.slot.into(), &[ifindex, 0])?;
        self.maps.egress_tcx.set(&place.slot.into(), &ifindex)?;
        self.maps.interfaces.set(&ifindex, &self.entry(place))
    }

    pub(super) fn entry(&self, place: Place) -> Interface {
        Interface { vpc: place.vpc, slot: place.slot, stack: place.stack.into(), fits: self.fits }
    }

    /// The largest packet that fits through everything.
    fn fits(&self) -> u16 {
        let known = |name: &String| self.image.interfaces.get(name).is_some_and(|place| !place.stack);
        let links = self.links.iter().filter(|(name, _)| known(name)).map(|(_, attached)| attached.mtu);
        let vlans = self.image.vlans.values();
        let vlans = vlans.filter_map(|vlan| Some(carried(vlan, self.links.get(&vlan.tags.trunk)?.mtu)));
        let links = links.chain(vlans);
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

    /// Sets what an interface's other end lacks, where that is wanted and possible.
    fn mend(&mut self, name: &str) {
        let (wish, manage) = (self.wish(name), self.model.manage_peer_offloads);
        let Some(attached) = self.links.get_mut(name) else { return };
        let Some(choice) = attached.choice.as_ref().filter(|_| attached.is_mendable(wish, manage)) else {
            return;
        };
        if let Err(error) = attached.peer.mend(matches!(choice.hook, Hook::Xdp(_))) {
            warn!("{name}: its other end cannot be prepared for XDP: {error:#}");
            attached.unmendable = true;
        }
    }

    /// Looks whether the links are as they were left, since a program that someone has taken away lets packets pass that are ours. What
    /// follows from that follows at the next look around.
    pub(super) fn look_at_links(&mut self) {
        let kernel = &self.kernel;
        let is_lost = |name: &str, attached: &Attached| {
            let lost = attached.hook.is_some_and(|hook| !kernel.has_link(name, attached.ifindex, hook));
            // One that is just going is missed by the next look at the links.
            lost && net::index_of(name) == Some(attached.ifindex)
        };
        for (name, attached) in &mut self.links {
            if is_lost(name, attached) {
                let problem = "someone has taken its program away";
                warn!("{name}: {problem}, which is attached again");
                (attached.hook, attached.choice) = (None, None);
                attached.problem = Some(problem.into());
            }
        }
    }

    /// Looks at the other ends again: they may have changed. What follows from that follows at the next look around.
    pub(super) fn look_at_peers(&mut self) {
        let Ok(namespaces) = Namespaces::read() else { return };
        for name in self.links.keys().cloned().collect::<Vec<_>>() {
            let Some(attached) = self.links.get(&name) else { continue };
            if self.image.interfaces.get(&name).is_none_or(|place| place.stack) {
                continue;
            }
            let before = attached.peer.clone();
            if let Some(attached) = self.links.get_mut(&name) {
                attached.look(&name, &namespaces);
                attached.own_mtu = net::mtu(&name).unwrap_or(attached.own_mtu);
            }
            self.mend(&name);
            let Some(attached) = self.links.get(&name) else { continue };
            if let Some(remedy) = attached.remedy().filter(|_| attached.peer != before) {
                warn!("{name}: packets will be lost at its other end: {remedy}");
            }
        }
    }
}
