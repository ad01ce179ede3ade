//! The agent: the one owner of everything that is written. Everything else sends it messages; it answers, and looks around twice a
//! second by itself.

mod acceptance;
mod links;
mod names;
mod next_hops;
mod passive;
mod vlans;

use acceptance::unix_time;
pub use links::Attached;
pub use names::Looked;

use crate::api::{Chosen, Failure, Reply, Request};
use crate::connections::Book;
use crate::flows::{self, Survey};
use crate::health::{self, Health};
use crate::kernel::Kernel;
use crate::maps::Maps;
use crate::model::{self, Model};
use crate::names::{Kind, Names};
use crate::neighbours::{Heard, Neighbours};
use crate::net::Stack;
use crate::plan::{self, Check, Image, Known};
use crate::probe::{self, Observed};
use crate::sockets::Sockets;
use crate::store::Store;
use crate::{dns, listing, reconcile, sys};
use anyhow::{Context, Result};
use log::{error, info, warn};
use privatelink_common::tables::{DRAINING, VpcAddress};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};

/// How often the agent looks around.
const TICK: Duration = Duration::from_millis(500);
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
    /// What a sweep of the flows has seen.
    Swept(Survey),
    /// A look at the record that says whose a name is.
    Looked(Looked),
    /// Apply the same file again.
    Reload,
    /// Stop.
    Stop,
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
    /// What the path was told of VLANs, by slot.
    vlans: BTreeMap<u16, vlans::Told>,
    /// Targets' health.
    pub health: BTreeMap<u32, Health>,
    /// Why the last check of a target failed, and when its state changed.
    pub reasons: BTreeMap<u32, String>,
    /// How many flows targets have, by the last sweep.
    pub survey: Survey,
    /// How endpoints stand with their services.
    pub book: Book,
    /// What outlives a restart of the machine.
    pub store: Arc<Store>,
    news: Sender<()>,
    /// When the agent started.
    pub started: Instant,
    /// Whether the kernel can attach programs by TCX.
    has_tcx: bool,
    /// The largest packet that fits through every interface and endpoint, as the path knows it.
    fits: u16,
    streaks: BTreeMap<u32, passive::Streak>,
    memo: RefCell<plan::Memo>,
    stacks: BTreeMap<String, (Stack, Sockets)>,
    watched: BTreeMap<u32, (Check, tokio::task::JoinHandle<()>)>,
    neighbours: Neighbours,
    /// The VPCs' resolvers, by VPC.
    pub resolvers: BTreeMap<String, dns::Resolver>,
    /// When each service's record was looked up last, and why nobody could say what it is, if so.
    pub looked: BTreeMap<String, (Instant, Option<String>)>,
    events: std::sync::mpsc::Sender<Event>,
    confirmed: BTreeMap<VpcAddress, Instant>,
    asked: BTreeMap<VpcAddress, Instant>,
    runtime: tokio::runtime::Handle,
    results: mpsc::Sender<Observed>,
    peers_at: Instant,
    resync_at: Instant,
    /// The second in which the image was last made anew because of the time.
    refreshed: u32,
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
    /// What outlives a restart of the machine.
    pub store: Arc<Store>,
    /// Who delivers events is told here that there are some.
    pub news: Sender<()>,
    /// Where the agent's own tasks tell it something.
    pub events: Sender<Event>,
}

impl Agent {
    /// Takes over what the maps contain, and makes it what the configuration says.
    pub fn start(parts: Parts) -> Result<Self> {
        let maps = Arc::new(parts.kernel.maps()?);
        let image = reconcile::actual(&maps)?;
        let names = Names::read(&maps.names.entries()?);
        let health = image.targets.iter().map(|(id, target)| (*id, Health::new(target.state))).collect();
        let (now, has_tcx) = (Instant::now(), parts.kernel.has_tcx());
        let stacks = stacks(&names, &parts.pin_dir);
        let mut agent = Self {
            kernel: parts.kernel,
            maps,
            pin_dir: parts.pin_dir,
            config: parts.config,
            model: parts.model.clone(),
            names,
            image,
            links: BTreeMap::new(),
            vlans: BTreeMap::new(),
            has_tcx,
            fits: 0,
            health,
            reasons: BTreeMap::new(),
            started: now,
            stacks,
            watched: BTreeMap::new(),
            neighbours: Neighbours::new(parts.runtime.clone(), parts.heard),
            resolvers: BTreeMap::new(),
            looked: BTreeMap::new(),
            events: parts.events,
            confirmed: BTreeMap::new(),
            asked: BTreeMap::new(),
            runtime: parts.runtime,
            results: parts.results,
            peers_at: now,
            resync_at: now + RESYNC,
            refreshed: 0,
            survey: Survey::default(),
            book: parts.store.book()?,
            store: parts.store,
            news: parts.news,
            memo: RefCell::default(),
            streaks: BTreeMap::new(),
        };
        agent.apply(parts.model)?;
        if agent.kernel.finish()? {
            info!("the tables have the sizes that [limits] says, and the flows that they had");
        }
        // Loading takes many times what is kept of it.
        sys::give_back_memory();
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
            Event::Swept(survey) => {
                self.survey = survey;
                if self.model.endpoints.values().any(|endpoint| endpoint.max_flows.is_some()) {
                    self.refresh();
                }
            }
            Event::Looked(looked) => self.take_look(looked),
            Event::Reload => {
                let path = self.config.clone();
                match reread(&path).and_then(|model| self.apply(model).map_err(Failure::kernel)) {
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
            Request::Flows(chosen) => match listing::sensible(self, &chosen) {
                Ok(()) => return self.list_flows(chosen, reply),
                Err(error) => Err(Failure::usage(error)),
            },
            Request::Verify { service } => return self.verify(&service, reply),
            Request::Status => listing::status(self).map_err(Failure::kernel),
            Request::Services => Ok(listing::services(self)),
            Request::Endpoints => listing::endpoints(self).map_err(Failure::kernel),
            Request::Targets => listing::targets(self).map_err(Failure::kernel),
            Request::Drops => listing::drops(self).map_err(Failure::kernel),
            Request::Accept { endpoint } => self.decide(&endpoint, Book::accept),
            Request::Reject { endpoint } => self.decide(&endpoint, Book::reject),
            Request::Names { vpc } => listing::names(self, vpc.as_deref()).map_err(Failure::usage),
            Request::Explain(question) => listing::explain(self, &question),
        };
        let _ = reply.send(answer);
    }

    /// Lists flows, on a thread of its own: there may be millions.
    fn list_flows(&self, chosen: Chosen, reply: oneshot::Sender<Reply>) {
        let (maps, names) = (Arc::clone(&self.maps), self.names.clone());
        std::thread::spawn(move || {
            // Whoever asked may have gone.
            let _ = reply.send(listing::flows(&maps, &names, &chosen).map_err(Failure::kernel));
        });
    }

    fn apply_text(&mut self, path: PathBuf, text: &str) -> Reply {
        let model = next(&path, text)?;
        let (before, were) = (self.image.clone(), self.names.clone());
        self.apply(model).map_err(Failure::kernel)?;
        self.config = path;
        Ok(listing::difference((&before, &were), (&self.image, &self.names)))
    }

    fn plan_text(&mut self, path: &Path, text: &str) -> Reply {
        let model = next(path, text)?;
        let mut names = self.names.clone();
        let mut book = self.book.clone();
        book.settle(&model, unix_time()).map_err(Failure::kernel)?;
        let image = self.compile(&model, &book, &mut names).map_err(Failure::kernel)?;
        Ok(listing::difference((&self.image, &self.names), (&image, &names)))
    }

    fn compile(&self, model: &Model, book: &Book, names: &mut Names) -> Result<Image> {
        let known = Known {
            now: flows::now(),
            targets: self.image.targets.clone(),
            addresses: self.image.addresses.clone(),
            health: self.health.iter().map(|(id, health)| (*id, health.state)).collect(),
            connections: book.states(),
            before: Some(&self.model),
            flows: self.survey.clone(),
            memo: RefCell::new(std::mem::take(&mut *self.memo.borrow_mut())),
        };
        let image = plan::compile(model, names, &known, |vpc| Stack::of(&self.pin_dir, vpc).link);
        *self.memo.borrow_mut() = known.memo.take();
        image
    }

    /// Makes it so. Returns how many entries changed. What may refuse comes first, so that a refusal takes nothing from anybody.
    fn apply(&mut self, model: Model) -> Result<usize> {
        anyhow::ensure!(
            model.limits == self.model.limits,
            "[limits] cannot change while the agent runs: start it again, which keeps the flows"
        );
        let mut names = self.names.clone();
        let mut book = self.book.clone();
        let events = book.settle(&model, unix_time())?;
        let image = self.compile(&model, &book, &mut names)?;
        let deliveries = self.deliveries(&model, &events);
        let ready = self.make_stacks(&model).and_then(|()| self.keep(book, &events, &deliveries));
        if let Err(error) = ready {
            self.put_back_stacks();
            return Err(error);
        }
        self.leave(&image)?;
        let changes = self.update(image)?;
        self.model = model;
        self.open_pending()?;
        let entered = self.enter();
        self.watch();
        self.follow_names();
        self.ask_neighbours();
        entered.and(Ok(changes))
    }

    /// Makes the maps agree with an image of the same VPCs, interfaces and stacks. Returns how many entries changed.
    fn update(&mut self, image: Image) -> Result<usize> {
        let changes = reconcile::apply(&self.maps, &self.image, &image)?;
        self.forget_neighbours(&image)?;
        self.image = image;
        let entries: Vec<_> = self.image.names.iter().map(|(key, name)| (*key, *name)).collect();
        self.names = Names::read(&entries);
        self.health.retain(|id, _| self.image.targets.get(id).is_some_and(|target| target.state != DRAINING));
        self.reasons.retain(|id, _| self.image.targets.contains_key(id));
        Ok(changes)
    }

    /// The same configuration, with what is known by now of its targets.
    fn refresh(&mut self) {
        let mut names = self.names.clone();
        let image = self.compile(&self.model, &self.book, &mut names);
        let result = image.and_then(|image| self.update(image)).and_then(|_| self.open_pending());
        if let Err(error) = result {
            error!("{error:#}");
        }
        self.follow_names();
    }

    fn make_stacks(&mut self, model: &Model) -> Result<()> {
        for (vpc, it) in &model.vpcs {
            let balancers = model.load_balancers.values().filter(|balancer| balancer.vpc == *vpc);
            let mut addresses: Vec<_> = balancers.flat_map(model::LoadBalancer::every_address).collect();
            addresses.extend(it.dns.iter().flat_map(model::Resolver::every_address));
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

    /// The stacks are again as the configuration has them that goes on, since another was refused.
    fn put_back_stacks(&mut self) {
        let model = self.model.clone();
        let mut result = self.make_stacks(&model);
        // Not by the image's interfaces, which are none before the first configuration is applied.
        let names = &self.names;
        let is_new = |vpc: &str| names.id(Kind::Interface, &plan::stack_name(vpc)).is_none();
        for (_, (stack, _)) in self.stacks.extract_if(.., |vpc, _| is_new(vpc)) {
            result = result.and(stack.remove());
        }
        if let Err(error) = result {
            error!("{error:#}");
        }
    }

    fn look_around(&mut self) -> Result<()> {
        let loaded = self.kernel.programs().count();
        self.enter()?;
        if self.kernel.programs().count() != loaded {
            sys::give_back_memory();
        }
        self.ask_neighbours();
        self.look_at_targets()?;
        self.look_at_resolvers();
        self.look_at_domains();
        let now = Instant::now();
        if plan::is_timed(&self.model, &self.image) && flows::now() != self.refreshed {
            self.refreshed = flows::now();
            self.refresh();
        }
        let mut book = self.book.clone();
        if book.age(&self.model, unix_time()) {
            self.keep(book, &[], &[])?;
            self.refresh();
        }
        if now >= self.peers_at {
            self.peers_at = now + PEERS;
            self.look_at_peers();
            self.look_at_links();
            let reclaimed = self.kernel.reclaim()?;
            if reclaimed > 0 {
                warn!("a capture has died on {reclaimed} interfaces; they have the program back");
            }
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
                self.runtime.spawn(probe::watch(id, check.clone(), sockets.clone(), self.results.clone()));
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
        self.refresh();
    }

    /// Targets that are checked.
    pub fn is_watched(&self, target: u32) -> bool {
        self.watched.contains_key(&target)
    }
}

/// The stacks that the agent before has left, by VPC: those that are not wanted any more are removed as if this one had made them.
fn stacks(names: &Names, pin_dir: &Path) -> BTreeMap<String, (Stack, Sockets)> {
    let vpcs = names.all(Kind::Interface).filter_map(|(_, name)| plan::stack_vpc(name));
    let of = |vpc: &str| {
        let stack = Stack::of(pin_dir, vpc);
        let sockets = Sockets::new(stack.namespace.clone());
        (vpc.to_owned(), (stack, sockets))
    };
    vpcs.map(of).collect()
}

/// A configuration that is to come after another. One without a VPC would take away everything, and is an empty file far more often than
/// it is meant.
pub fn next(path: &Path, text: &str) -> Result<Model, Failure> {
    let model = model::parse(text, &path.to_string_lossy()).map_err(Failure::config)?;
    if model.vpcs.is_empty() {
        let advice = "to take everything away, stop the agent and run `privatelink detach`";
        let message = format!("{} has no VPC: {advice}", path.display());
        return Err(Failure { code: 65, message });
    }
    Ok(model)
}

/// Reads and checks the file that was applied last. What was read from a pipe or a descriptor is not there any more, and below /dev and
/// /proc the agent would find its own.
fn reread(path: &Path) -> Result<Model, Failure> {
    let wrong =
        |message: &str| Failure { code: 65, message: format!("cannot read {}: {message}", path.display()) };
    let is_file = std::fs::metadata(path).map_err(|error| wrong(&error.to_string()))?.is_file();
    if !is_file || path.starts_with("/dev") || path.starts_with("/proc") {
        return Err(wrong(
            "it is no regular file: SIGHUP reads what was applied last, so apply a file first",
        ));
    }
    let text = std::fs::read_to_string(path).map_err(|error| wrong(&error.to_string()))?;
    next(path, &text)
}
