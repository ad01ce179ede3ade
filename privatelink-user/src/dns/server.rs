//! A VPC's resolver: its sockets inside the VPC's stack, and how much it does at a time.
//!
//! Everything is bounded: questions a second from one address and from all, questions that wait for other name servers, connections,
//! how long they may be silent. What is beyond a bound is dropped or refused, and counted.

use super::answer::{Judged, Question, Rules, Transport, judge};
use super::forward::{Place, forward, read, write};
use super::view::{View, key_of};
use crate::ip::Family;
use crate::model;
use crate::sockets::{Kind, Sockets};
use anyhow::Result;
use hickory_proto::op::ResponseCode;
use log::{info, warn};
use privatelink_common::limits::DNS;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinHandle;

/// Questions of one VPC that wait for other name servers: each has a socket, and the stack has 1024 ports.
const FORWARDED: usize = 256;
/// The same of one address, so that one that asks whom nobody answers does not take them all.
const FORWARDED_EACH: u32 = 64;
/// Connections of one VPC.
const CONNECTIONS: usize = 128;
/// Connections of one address.
const CONNECTIONS_EACH: u32 = 8;
/// How long a connection may be silent (RFC 7766, 6.2.3: a few seconds).
const SILENCE: Duration = Duration::from_secs(10);
/// Addresses that are told apart in a second; all others share what one may ask.
const ADDRESSES: usize = 4096;
/// All addresses together may ask so many times what one may.
const TOGETHER: u32 = 16;
/// The longest question that comes by a datagram, in bytes: far longer than any.
const LONGEST: usize = 4096;
/// How long until what could not be opened is tried again: at first soon, since a resolver that was changed may still hold its sockets.
const AGAIN: Duration = Duration::from_millis(10);
/// How long at most, and after which it is said.
const LATER: Duration = Duration::from_secs(1);

/// What a resolver has done.
#[derive(Debug, Default)]
#[allow(missing_docs, reason = "each is a word of `status`, described in docs/operations.md")]
pub struct Counters {
    pub questions: AtomicU64,
    pub answered: AtomicU64,
    pub forwarded: AtomicU64,
    pub refused: AtomicU64,
    pub malformed: AtomicU64,
    pub limited: AtomicU64,
    pub failed: AtomicU64,
}

impl Counters {
    /// Each with its name.
    pub fn each(&self) -> [(&'static str, u64); 7] {
        let read = |it: &AtomicU64| it.load(Ordering::Relaxed);
        [
            ("questions", read(&self.questions)),
            ("answered", read(&self.answered)),
            ("forwarded", read(&self.forwarded)),
            ("refused", read(&self.refused)),
            ("malformed", read(&self.malformed)),
            ("limited", read(&self.limited)),
            ("failed", read(&self.failed)),
        ]
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// Counts what addresses ask in a second.
#[derive(Debug)]
struct Limiter {
    rate: u32,
    since: Instant,
    all: u32,
    each: HashMap<IpAddr, u32>,
}

impl Limiter {
    fn new(rate: u32, now: Instant) -> Self {
        Self { rate, since: now, all: 0, each: HashMap::new() }
    }

    /// Whether an address may ask once more.
    fn admits(&mut self, address: IpAddr, now: Instant) -> bool {
        if now.duration_since(self.since) >= Duration::from_secs(1) {
            (self.since, self.all) = (now, 0);
            self.each.clear();
        }
        let known = self.each.contains_key(&address) || self.each.len() < ADDRESSES;
        let others = IpAddr::from([0; 4]);
        let own = self.each.entry(if known { address } else { others }).or_default();
        if *own >= self.rate || self.all >= self.rate.saturating_mul(TOGETHER) {
            return false;
        }
        *own += 1;
        self.all += 1;
        true
    }
}

/// Places that addresses take, each so many at most.
#[derive(Debug)]
struct Places {
    most: u32,
    taken: Mutex<HashMap<IpAddr, u32>>,
}

impl Places {
    fn new(most: u32) -> Arc<Self> {
        Arc::new(Self { most, taken: Mutex::default() })
    }

    fn take(self: &Arc<Self>, of: IpAddr) -> Option<Seat> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let own = taken.get(&of).copied().unwrap_or(0);
        if own >= self.most {
            return None;
        }
        taken.insert(of, own + 1);
        Some(Seat { places: Arc::clone(self), of })
    }
}

/// One of an address's places, for as long as it is held.
#[derive(Debug)]
struct Seat {
    places: Arc<Places>,
    of: IpAddr,
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut taken = self.places.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = taken.get_mut(&self.of) {
            *own -= 1;
            if *own == 0 {
                taken.remove(&self.of);
            }
        }
    }
}

/// Whom a rule asks.
#[derive(Debug)]
struct Servers {
    list: Vec<(SocketAddr, Place)>,
    /// The place of the one that answered last.
    good: AtomicUsize,
}

/// The place of a question that waits: its address's and the VPC's.
type Waiting = (Seat, OwnedSemaphorePermit);

/// What all of a resolver's tasks share.
#[derive(Debug)]
struct Shared {
    vpc: String,
    view: RwLock<Arc<View>>,
    rules: Rules,
    servers: Vec<Servers>,
    counters: Counters,
    /// Sockets that are open.
    open: AtomicUsize,
    limiter: Mutex<Limiter>,
    waiting: Arc<Semaphore>,
    connections: Arc<Semaphore>,
    /// Questions of an address that wait.
    asking: Arc<Places>,
    /// Connections of an address.
    connected: Arc<Places>,
}

impl Shared {
    fn view(&self) -> Arc<View> {
        Arc::clone(&self.view.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// What is to be done with a message; nothing of one that is beyond what its sender may ask.
    fn hear(&self, bytes: &[u8], from: IpAddr, over: Transport) -> Option<Judged> {
        count(&self.counters.questions);
        let admitted =
            self.limiter.lock().unwrap_or_else(PoisonError::into_inner).admits(from, Instant::now());
        if !admitted {
            count(&self.counters.limited);
            return None;
        }
        let judged = judge(bytes, over, &self.view(), &self.rules);
        match &judged {
            Judged::Answer(_, ResponseCode::Refused) => count(&self.counters.refused),
            Judged::Answer(_, ResponseCode::FormErr | ResponseCode::NotImp | ResponseCode::BADVERS)
            | Judged::Malformed => count(&self.counters.malformed),
            Judged::Answer(..) => count(&self.counters.answered),
            Judged::Forward(_) => {}
        }
        Some(judged)
    }

    /// What other name servers say; that nobody answers, where nobody does.
    async fn ask(&self, question: &Question, over: Transport, _waiting: Waiting) -> Vec<u8> {
        let Some(servers) = self.servers.get(question.rule) else { return question.failure() };
        match forward(question, &servers.list, servers.good.load(Ordering::Relaxed), over).await {
            Ok((reply, place)) => {
                servers.good.store(place, Ordering::Relaxed);
                count(&self.counters.forwarded);
                reply
            }
            Err(error) => {
                log::debug!("the resolver of {}: {error:#}", self.vpc);
                count(&self.counters.failed);
                question.failure()
            }
        }
    }

    /// Takes one of the places of questions that wait.
    fn permit(&self, of: IpAddr) -> Option<Waiting> {
        let own = self.asking.take(of);
        let permit = own.and_then(|own| Some((own, Arc::clone(&self.waiting).try_acquire_owned().ok()?)));
        if permit.is_none() {
            count(&self.counters.failed);
        }
        permit
    }
}

/// A resolver that runs, until it is dropped.
#[derive(Debug)]
pub struct Resolver {
    /// What the configuration says of it.
    pub model: model::Resolver,
    shared: Arc<Shared>,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Resolver {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Resolver {
    /// Starts the resolver of a VPC, whose stack's sockets these are.
    pub fn start(
        runtime: &Handle,
        vpc: &str,
        model: &model::Resolver,
        sockets: &Sockets,
        view: View,
    ) -> Self {
        let rules = model.rules.iter().enumerate().map(|(at, rule)| (key_of(&rule.domain), at)).collect();
        let servers = model.rules.iter().map(|rule| servers(model, rule, sockets)).collect();
        let shared = Arc::new(Shared {
            vpc: vpc.to_owned(),
            view: RwLock::new(Arc::new(view)),
            rules,
            servers,
            counters: Counters::default(),
            open: AtomicUsize::new(0),
            limiter: Mutex::new(Limiter::new(model.rate, Instant::now())),
            waiting: Arc::new(Semaphore::new(FORWARDED)),
            connections: Arc::new(Semaphore::new(CONNECTIONS)),
            asking: Places::new(FORWARDED_EACH),
            connected: Places::new(CONNECTIONS_EACH),
        });
        let mut tasks = Vec::new();
        for address in model.listens().map(|it| SocketAddr::new(it, DNS)) {
            tasks.push(runtime.spawn(datagrams(Arc::clone(&shared), sockets.clone(), address)));
            tasks.push(runtime.spawn(connections(Arc::clone(&shared), sockets.clone(), address)));
        }
        Self { model: model.clone(), shared, tasks }
    }

    /// Whether all of its tasks live: they end only where one panics.
    pub fn is_running(&self) -> bool {
        !self.tasks.iter().any(JoinHandle::is_finished)
    }

    /// Whether it hears at all of its addresses.
    pub fn listens(&self) -> bool {
        self.shared.open.load(Ordering::Relaxed) == self.tasks.len()
    }

    /// Replaces the names.
    pub fn show(&self, view: View) {
        *self.shared.view.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(view);
    }

    /// What it has done.
    pub fn counters(&self) -> &Counters {
        &self.shared.counters
    }
}

/// Whom a rule asks, and from which addresses.
fn servers(model: &model::Resolver, rule: &model::Forward, sockets: &Sockets) -> Servers {
    let place = |to: &SocketAddr| {
        let source = model.source(rule, Family::of(to.ip()))?;
        Some((*to, Place::Stack(sockets.clone(), source)))
    };
    Servers { list: rule.to.iter().filter_map(place).collect(), good: AtomicUsize::new(0) }
}

/// Opens a socket, as often as it takes.
async fn opened<T>(
    shared: &Shared,
    sockets: &Sockets,
    (kind, address): (Kind, SocketAddr),
    make: impl Fn(socket2::Socket) -> std::io::Result<T>,
) -> T {
    let (mut wait, mut said) = (AGAIN, false);
    loop {
        let result: Result<T> = match sockets.open(kind, address).await {
            Ok(socket) => make(socket).map_err(Into::into),
            Err(error) => Err(error),
        };
        match result {
            Ok(socket) => {
                shared.open.fetch_add(1, Ordering::Relaxed);
                if said {
                    info!("the resolver of {} listens at {address}", shared.vpc);
                }
                return socket;
            }
            Err(error) if !said && wait >= LATER => {
                warn!("the resolver of {} cannot listen at {address} yet: {error:#}", shared.vpc);
                said = true;
            }
            Err(_) => {}
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(LATER);
    }
}

/// Answers what comes by datagrams.
async fn datagrams(shared: Arc<Shared>, sockets: Sockets, address: SocketAddr) {
    let wanted = (Kind::Datagrams, address);
    let socket = opened(&shared, &sockets, wanted, |socket| UdpSocket::from_std(socket.into())).await;
    let socket = Arc::new(socket);
    let mut buffer = vec![0; LONGEST];
    loop {
        // An error is about a datagram that was sent, and was told then.
        let Ok((length, from)) = socket.recv_from(&mut buffer).await else {
            tokio::task::yield_now().await;
            continue;
        };
        match shared.hear(&buffer[..length], from.ip(), Transport::Udp) {
            Some(Judged::Answer(bytes, _)) => send(&socket, &bytes, from),
            Some(Judged::Forward(question)) => match shared.permit(from.ip()) {
                None => send(&socket, &question.failure(), from),
                Some(permit) => {
                    // Who waits does not keep the socket from being closed.
                    let (shared, socket) = (Arc::clone(&shared), Arc::downgrade(&socket));
                    drop(tokio::spawn(async move {
                        let reply = shared.ask(&question, Transport::Udp, permit).await;
                        if let Some(socket) = socket.upgrade() {
                            send(&socket, &reply, from);
                        }
                    }));
                }
            },
            Some(Judged::Malformed) | None => {}
        }
    }
}

/// Sends an answer, if there is room for it; a client that gets none asks again.
fn send(socket: &UdpSocket, bytes: &[u8], to: SocketAddr) {
    if let Err(error) = socket.try_send_to(bytes, to) {
        log::debug!("an answer to {to} is lost: {error}");
    }
}

/// Takes connections, as many as there may be.
async fn connections(shared: Arc<Shared>, sockets: Sockets, address: SocketAddr) {
    let wanted = (Kind::Listener, address);
    let listener = opened(&shared, &sockets, wanted, |socket| TcpListener::from_std(socket.into())).await;
    loop {
        let Ok(permit) = Arc::clone(&shared.connections).acquire_owned().await else { return };
        let Ok((stream, from)) = listener.accept().await else {
            // Out of descriptors, most likely: those who are here will go.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let Some(seat) = shared.connected.take(from.ip()) else {
            count(&shared.counters.limited);
            continue;
        };
        let shared = Arc::clone(&shared);
        drop(tokio::spawn(async move {
            // What ends a connection is the client's affair.
            let _ = converse(&shared, stream, from.ip()).await;
            drop((seat, permit));
        }));
    }
}

/// Answers what comes by a connection, one question after the other, until it is silent for too long.
async fn converse(shared: &Shared, mut stream: TcpStream, from: IpAddr) -> Result<()> {
    loop {
        let Some(message) = tokio::time::timeout(SILENCE, read(&mut stream)).await?? else { return Ok(()) };
        let reply = match shared.hear(&message, from, Transport::Tcp) {
            Some(Judged::Answer(bytes, _)) => bytes,
            Some(Judged::Forward(question)) => match shared.permit(from) {
                None => question.failure(),
                Some(permit) => shared.ask(&question, Transport::Tcp, permit).await,
            },
            Some(Judged::Malformed) | None => return Ok(()),
        };
        tokio::time::timeout(SILENCE, write(&mut stream, &reply)).await??;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_asks_too_much_does_not_take_what_others_may_ask() {
        let now = Instant::now();
        let mut limiter = Limiter::new(3, now);
        let address = |last: u8| IpAddr::from([10, 0, 1, last]);
        assert_eq!((0..9).filter(|_| limiter.admits(address(1), now)).count(), 3);
        assert!(limiter.admits(address(2), now));
        assert!(limiter.admits(address(1), now + Duration::from_secs(1)), "the next second is another");
    }

    #[test]
    fn an_address_has_as_many_places_as_any_other_and_gives_them_back() {
        let places = Places::new(2);
        let address = |last: u8| IpAddr::from([10, 0, 1, last]);
        let (one, two) = (places.take(address(1)), places.take(address(1)));
        assert!(one.is_some() && two.is_some() && places.take(address(1)).is_none());
        assert!(places.take(address(2)).is_some());
        drop(one);
        assert!(places.take(address(1)).is_some());
        drop(two);
        assert!(
            places.taken.lock().is_ok_and(|taken| taken.is_empty()),
            "nothing is remembered of who has none"
        );
    }

    #[test]
    fn what_is_remembered_of_addresses_is_bounded_as_is_what_they_may_ask_together() {
        let now = Instant::now();
        let mut limiter = Limiter::new(1000, now);
        let many = (0..100_000u32).map(|it| IpAddr::from(it.to_be_bytes()));
        let admitted = many.filter(|address| limiter.admits(*address, now)).count();
        assert!(limiter.each.len() <= ADDRESSES + 1);
        assert!(admitted <= ADDRESSES + 1000, "{admitted}");
        let mut limiter = Limiter::new(2, now);
        let many = (0..100u32).map(|it| IpAddr::from(it.to_be_bytes()));
        assert_eq!(many.filter(|address| limiter.admits(*address, now)).count(), 32);
    }
}
