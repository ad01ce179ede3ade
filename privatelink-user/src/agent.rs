//! The agent: the one owner of everything that is written. Everything else sends it messages; it answers, and looks around twice a
//! second by itself.

use crate::api::{Failure, Reply, Request};
use crate::health::{self, Health, Observed, Sockets};
use crate::kernel::Kernel;
use crate::maps::Maps;
use crate::model::{self, Model};
use crate::names::{Kind, Names};
use crate::neighbours::{Heard, Neighbours};
use crate::net::{self, Peer, Stack};
use crate::plan::{self, Check, Image, Place};
use crate::sys::XdpMode;
use crate::{flows, listing, reconcile};
use anyhow::{Context, Result};
use log::{error, info, warn};
use privatelink_common::tables::{Interface, Neighbour, VpcAddress};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};

/// How often the agent looks around.
const TICK: Duration = Duration::from_millis(500);
/// How long a neighbour is believed before it is asked again.
const FRESH: Duration = Duration::from_secs(5);
/// How often the interfaces' other ends are looked at.
const PEERS: Duration = Duration::from_secs(5);
/// How often the maps are compared with what they should be, even when nothing happens.
const RESYNC: Duration = Duration::from_secs(60);

/// What the agent hears.
#[derive(Debug)]
pub enum Event {
    /// A request, and where its reply goes.
    Request(Request, oneshot::Sender<Reply>),
    /// A health check's result.
    Observed(Observed),
    /// A neighbour.
    Heard(Heard),
    /// Apply the same file again.
    Reload,
    /// Stop.
    Stop,
}

/// An interface that the program is attached to.
#[derive(Clone, Debug)]
pub struct Attached {
    /// The kernel's index.
    pub ifindex: u32,
    /// How.
    pub mode: Option<XdpMode>,
    /// Its other end.
    pub peer: Peer,
    /// Why it is not attached.
    pub problem: Option<String>,
}

/// Everything that the agent knows.
pub struct Agent {
    /// The pins.
    pub kernel: Kernel,
    /// The maps.
    pub maps: Arc<Maps>,
    /// Where they are pinned.
    pub pin_dir: PathBuf,
    /// The file that was applied last.
    pub config: PathBuf,
    /// What it says.
    pub model: Model,
    /// Numbers of names.
    pub names: Names,
    /// What the maps contain.
    pub image: Image,
    /// Interfaces that are there.
    pub links: BTreeMap<String, Attached>,
    /// Targets' health.
    pub health: BTreeMap<u32, Health>,
    /// Why the last check of a target failed, and when its state changed.
    pub reasons: BTreeMap<u32, String>,
    /// When the agent started.
    pub started: Instant,
    stacks: BTreeMap<String, (Stack, Sockets)>,
    watched: BTreeMap<u32, (Check, tokio::task::JoinHandle<()>)>,
    neighbours: Neighbours,
    confirmed: BTreeMap<VpcAddress, Instant>,
    asked: BTreeMap<VpcAddress, Instant>,
    runtime: tokio::runtime::Handle,
    results: mpsc::Sender<Observed>,
    peers_at: Instant,
    resync_at: Instant,
}

/// What the agent is given to start with.
pub struct Parts {
    /// The pins.
    pub kernel: Kernel,
    /// Where they are.
    pub pin_dir: PathBuf,
    /// The configuration's file.
    pub config: PathBuf,
    /// Its contents.
    pub model: Model,
    /// Where checks run.
    pub runtime: tokio::runtime::Handle,
    /// Where their results go.
    pub results: mpsc::Sender<Observed>,
    /// Where neighbours are reported.
    pub heard: mpsc::Sender<Heard>,
}

impl Agent {
    /// Takes over what the maps contain, and makes it what the configuration says.
    pub fn start(parts: Parts) -> Result<Self> {
        let maps = Arc::new(parts.kernel.maps()?);
        let image = reconcile::actual(&maps)?;
        let names = Names::read(&maps.names.entries()?);
        let health = image.targets.iter().map(|(id, target)| (*id, Health::new(target.state))).collect();
        let now = Instant::now();
        let mut agent = Self {
            kernel: parts.kernel,
            maps,
            pin_dir: parts.pin_dir,
            config: parts.config,
            model: parts.model.clone(),
            names,
            image,
            links: BTreeMap::new(),
            health,
            reasons: BTreeMap::new(),
            started: now,
            stacks: BTreeMap::new(),
            watched: BTreeMap::new(),
            neighbours: Neighbours::new(parts.heard)?,
            confirmed: BTreeMap::new(),
            asked: BTreeMap::new(),
            runtime: parts.runtime,
            results: parts.results,
            peers_at: now,
            resync_at: now + RESYNC,
        };
        agent.apply(parts.model)?;
        Ok(agent)
    }

    /// Handles events until it is told to stop.
    pub fn run(&mut self, events: &Receiver<Event>) {
        let mut tick = Instant::now();
        loop {
            match events.recv_timeout(tick.saturating_duration_since(Instant::now())) {
                Ok(Event::Stop) | Err(RecvTimeoutError::Disconnected) => return,
                Ok(event) => self.handle(event),
                Err(RecvTimeoutError::Timeout) => {
                    tick = Instant::now() + TICK;
                    if let Err(error) = self.look_around() {
                        error!("{error:#}");
                    }
                }
            }
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Request(request, reply) => self.request(request, reply),
            Event::Observed(observed) => self.observe(observed),
            Event::Heard(heard) => {
                if let Err(error) = self.hear(heard) {
                    error!("{error:#}");
                }
            }
            Event::Reload => {
                let path = self.config.clone();
                match read(&path).and_then(|model| self.apply(model).map_err(Failure::kernel)) {
                    Ok(changes) => info!("applied {}: {changes} changes", path.display()),
                    Err(failure) => {
                        warn!("{} is not applied: {}", path.display(), failure.message)
                    }
                }
            }
            Event::Stop => {}
        }
    }

    fn request(&mut self, request: Request, reply: oneshot::Sender<Reply>) {
        let answer = match request {
            Request::Apply { path, text } => self.apply_text(path, &text),
            Request::Plan { path, text } => self.plan_text(&path, &text),
            Request::Flows { limit } => {
                let (maps, names) = (Arc::clone(&self.maps), self.names.clone());
                std::thread::spawn(move || {
                    // Whoever asked may have gone.
                    let _ = reply.send(listing::flows(&maps, &names, limit).map_err(Failure::kernel));
                });
                return;
            }
            Request::Status => listing::status(self).map_err(Failure::kernel),
            Request::Services => Ok(listing::services(self)),
            Request::Endpoints => listing::endpoints(self).map_err(Failure::kernel),
            Request::Targets => listing::targets(self).map_err(Failure::kernel),
            Request::Drops => listing::drops(self).map_err(Failure::kernel),
            Request::Explain(question) => listing::explain(self, &question).map_err(Failure::kernel),
        };
        let _ = reply.send(answer);
    }

    fn apply_text(&mut self, path: PathBuf, text: &str) -> Reply {
        let model = model::parse(text, &path.to_string_lossy()).map_err(Failure::config)?;
        let before = self.image.clone();
        self.apply(model).map_err(Failure::kernel)?;
        self.config = path;
        Ok(listing::difference(&before, &self.image, &self.names))
    }

    fn plan_text(&mut self, path: &Path, text: &str) -> Reply {
        let model = model::parse(text, &path.to_string_lossy()).map_err(Failure::config)?;
        let mut names = self.names.clone();
        let image = self.compile(&model, &mut names).map_err(Failure::kernel)?;
        Ok(listing::difference(&self.image, &image, &names))
    }

    fn compile(&self, model: &Model, names: &mut Names) -> Result<Image> {
        let health = self.health.iter().map(|(id, health)| (*id, health.state)).collect();
        plan::compile(model, names, &health, |vpc| Stack::of(&self.pin_dir, vpc).link)
    }

    /// Makes it so. Returns how many entries changed.
    fn apply(&mut self, model: Model) -> Result<usize> {
        anyhow::ensure!(
            model.limits == self.model.limits,
            "[limits] cannot change while the agent runs: the tables' sizes are fixed when they are made"
        );
        let mut names = self.names.clone();
        let image = self.compile(&model, &mut names)?;
        self.make_stacks(&model)?;
        self.leave(&image)?;
        let changes = reconcile::apply(&self.maps, &self.image, &image)?;
        self.forget_neighbours(&image)?;
        (self.model, self.image) = (model, image);
        let entries: Vec<_> = self.image.names.iter().map(|(key, name)| (*key, *name)).collect();
        self.names = Names::read(&entries);
        self.health.retain(|id, _| self.image.targets.contains_key(id));
        self.enter()?;
        self.watch();
        self.ask_neighbours();
        Ok(changes)
    }

    fn make_stacks(&mut self, model: &Model) -> Result<()> {
        for vpc in model.vpcs.keys() {
            let balancers = model.load_balancers.values().filter(|balancer| balancer.vpc == *vpc);
            let addresses: Vec<_> =
                balancers.flat_map(|balancer| balancer.addresses.values().copied()).collect();
            if addresses.is_empty() {
                continue;
            }
            let stack = Stack::of(&self.pin_dir, vpc);
            stack
                .ensure(&addresses)
                .with_context(|| format!("cannot make the stack of the VPC \"{vpc}\""))?;
            if !self.stacks.contains_key(vpc) {
                let sockets = Sockets::new(stack.namespace.clone());
                self.stacks.insert(vpc.clone(), (stack, sockets));
            }
        }
        Ok(())
    }

    /// Takes the program off interfaces that the image does not have, or has elsewhere, and forgets the flows that go by them before
    /// their slots can become another's.
    fn leave(&mut self, image: &Image) -> Result<()> {
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
    fn enter(&mut self) -> Result<()> {
        let wanted: Vec<_> =
            self.image.interfaces.iter().map(|(name, place)| (name.clone(), *place)).collect();
        for (name, place) in wanted {
            let index = net::index_of(&name);
            if index == self.links.get(&name).map(|attached| attached.ifindex) {
                continue;
            }
            if let Some(gone) = self.links.remove(&name) {
                info!("{name} is gone");
                self.maps.interfaces.set(&gone.ifindex, &Interface::default())?;
            }
            let Some(ifindex) = index else { continue };
            let attached = self.attach(&name, place, ifindex);
            if let Some(problem) = &attached.problem {
                warn!("{name}: {problem}");
            }
            self.links.insert(name, attached);
            self.peers_at = Instant::now();
        }
        Ok(())
    }

    fn attach(&self, name: &str, place: Place, ifindex: u32) -> Attached {
        let attach = || -> Result<XdpMode> {
            let limit = self.model.limits.max_ifindex;
            anyhow::ensure!(
                ifindex < limit,
                "its index {ifindex} is not below limits.max_ifindex, {limit}: raise it"
            );
            let entry =
                Interface { vpc: place.vpc, slot: place.slot, stack: place.stack.into(), reserved: 0 };
            self.maps.egress.set(&place.slot.into(), &[ifindex, 0])?;
            self.maps.interfaces.set(&ifindex, &entry)?;
            self.kernel.attach(name, ifindex)
        };
        let (mode, problem) = match attach() {
            Ok(mode) => (Some(mode), None),
            Err(error) => (None, Some(format!("{error:#}"))),
        };
        Attached { ifindex, mode, peer: Peer::default(), problem }
    }

    fn look_around(&mut self) -> Result<()> {
        self.enter()?;
        self.ask_neighbours();
        let now = Instant::now();
        if now >= self.peers_at {
            self.peers_at = now + PEERS;
            self.look_at_peers();
        }
        if now >= self.resync_at {
            self.resync_at = now + RESYNC;
            let interfaces = std::mem::take(&mut self.image.interfaces);
            let actual = reconcile::actual(&self.maps);
            self.image.interfaces = interfaces;
            let mended = reconcile::apply(&self.maps, &actual?, &self.image)?;
            if mended > 0 {
                warn!("mended {mended} entries that someone else had changed");
            }
        }
        Ok(())
    }

    fn look_at_peers(&mut self) {
        for (name, attached) in &mut self.links {
            if self.image.interfaces.get(name).is_none_or(|place| place.stack) {
                continue;
            }
            let Ok(peer) = net::peer(name, self.model.manage_peer_offloads) else { continue };
            if peer != attached.peer
                && let Some(remedy) = peer.remedy()
            {
                warn!("{name}: packets will be lost at its other end: run `{remedy}`");
            }
            attached.peer = peer;
        }
    }

    /// The targets' addresses, each with the load balancer's address and link-layer address that asks for it.
    fn wanted_neighbours(&self) -> BTreeMap<VpcAddress, privatelink_common::tables::Balancer> {
        let targets = self.image.targets.values();
        let asker = |vpc| self.image.balancers.values().find(|balancer| balancer.vpc == vpc).copied();
        targets.filter_map(|it| Some((VpcAddress::new(it.vpc, it.address), asker(it.vpc)?))).collect()
    }

    fn ask_neighbours(&mut self) {
        let now = Instant::now();
        for (wanted, asker) in self.wanted_neighbours() {
            let fresh = self.confirmed.get(&wanted).is_some_and(|at| now.duration_since(*at) < FRESH);
            let asked =
                self.asked.get(&wanted).is_some_and(|at| now.duration_since(*at) < Duration::from_secs(1));
            if fresh || asked {
                continue;
            }
            self.asked.insert(wanted, now);
            for (name, place) in &self.image.interfaces {
                let Some(attached) = self.links.get(name).filter(|_| place.vpc == wanted.vpc && !place.stack)
                else {
                    continue;
                };
                // An interface that is down or just going cannot be asked; the next tick tries again.
                let _ = self.neighbours.ask(attached.ifindex, asker.address, asker.mac, wanted.address);
            }
        }
    }

    fn hear(&mut self, heard: Heard) -> Result<()> {
        let by = self.links.iter().find(|(_, attached)| attached.ifindex == heard.ifindex);
        let Some(place) =
            by.and_then(|(name, _)| self.image.interfaces.get(name)).filter(|place| !place.stack)
        else {
            return Ok(());
        };
        let key = VpcAddress::new(place.vpc, heard.address);
        if !self.wanted_neighbours().contains_key(&key) {
            return Ok(());
        }
        let neighbour = Neighbour { mac: heard.mac, interface: place.slot };
        if self.maps.neighbours.get(&key)? != Some(neighbour) {
            self.maps.neighbours.set(&key, &neighbour)?;
        }
        self.confirmed.insert(key, Instant::now());
        Ok(())
    }

    fn forget_neighbours(&mut self, image: &Image) -> Result<()> {
        let wanted: BTreeSet<_> =
            image.targets.values().map(|it| VpcAddress::new(it.vpc, it.address)).collect();
        for key in self.maps.neighbours.keys()?.into_iter().filter(|key| !wanted.contains(key)) {
            self.maps.neighbours.delete(&key)?;
        }
        self.confirmed.retain(|key, _| wanted.contains(key));
        self.asked.retain(|key, _| wanted.contains(key));
        Ok(())
    }

    /// Starts the checks that are wanted, and ends those that are not.
    fn watch(&mut self) {
        let wanted = plan::checks(&self.model, &self.names);
        self.watched.retain(|id, (check, task)| {
            let stays = wanted.get(id) == Some(check);
            if !stays {
                task.abort();
            }
            stays
        });
        for (id, check) in wanted {
            let Some((_, sockets)) = self.stacks.get(&check.vpc).filter(|_| !self.watched.contains_key(&id))
            else {
                continue;
            };
            let task =
                self.runtime.spawn(health::watch(id, check.clone(), sockets.clone(), self.results.clone()));
            self.watched.insert(id, (check, task));
        }
    }

    fn observe(&mut self, observed: Observed) {
        let Some((check, _)) = self.watched.get(&observed.target) else { return };
        let initial = Health::new(privatelink_common::tables::INITIAL);
        let health = self.health.entry(observed.target).or_insert(initial);
        let before = health.state;
        health.observe(observed.result.is_ok(), &check.how);
        let after = health.state;
        match observed.result {
            Ok(()) => self.reasons.remove(&observed.target),
            Err(reason) => self.reasons.insert(observed.target, reason),
        };
        if before == after {
            return;
        }
        let name = self.names.name(Kind::Target, observed.target);
        info!("target {name} is {}, was {}", health::name(after), health::name(before));
        if let Err(error) = self.apply(self.model.clone()) {
            error!("{error:#}");
        }
    }

    /// Targets that are checked.
    pub fn is_watched(&self, target: u32) -> bool {
        self.watched.contains_key(&target)
    }
}

/// Reads and checks a file.
pub fn read(path: &Path) -> Result<Model, Failure> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Failure { code: 65, message: format!("cannot read {}: {error}", path.display()) })?;
    model::parse(&text, &path.to_string_lossy()).map_err(Failure::config)
}
