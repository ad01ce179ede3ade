//! `privatelink capture`: packets as they came and as they left, with what became of them, as lines or as a pcapng file.
//!
//! It works on what is pinned, by itself, with or without an agent. The links get programs that do what the agent's do and hand
//! packets over besides, and the agent's back at the end: from a process that only waits for this one's, and if that is killed, too,
//! from the agent (`Kernel::reclaim`). A lock on the directory of programs says that a capture runs.

mod frames;
mod pcapng;
mod tap;

use crate::ip;
use crate::maps::{self, Maps};
use crate::names::{Kind, Names};
use anyhow::{Context, Result, ensure};
use clap::Args;
use frames::{as_it_came, as_it_left, is_unfinished, summary};
use pcapng::{Record, Way, Writer};
use privatelink_common::capture::{ENDPOINTS, End, Event, FORWARDED, Missed, SNAPLEN, Watch};
use privatelink_common::limits::LAYOUT;
use privatelink_common::verdict::{Answer, DropReason, FRAGMENT_EARLY, PASSED, STEERED};
use privatelink_common::wire::{ICMP, ICMPV6, TCP, UDP};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::time::{ClockId, clock_gettime};
use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufWriter, ErrorKind, IsTerminal, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tap::{Packet, Tap};
use zerocopy::big_endian::U16;

/// How long packets gather before they are read.
const PAUSE: Duration = Duration::from_millis(20);

/// How often it looks whether the agent has changed something.
const LOOK: Duration = Duration::from_secs(1);

/// How long it waits for an agent that is putting another program in place.
const PATIENCE: Duration = Duration::from_secs(10);

/// A packet is in its CPU's buffer by so long after its time, in nanoseconds.
const SETTLED: u64 = 1_000_000;

/// What is to be captured; what is not given chooses none out.
#[derive(Args, Clone, Debug, Default)]
pub struct Options {
    /// Write a pcapng file, for Wireshark and tcpdump; `-` is stdout.
    #[arg(short, long, value_name = "FILE")]
    pub write: Option<PathBuf>,
    /// Only packets of an endpoint: ENDPOINT or ENDPOINT/ZONE.
    #[arg(long)]
    pub endpoint: Option<String>,
    /// Only packets that come from a VPC or go to it.
    #[arg(long)]
    pub vpc: Option<String>,
    /// Only tcp, udp, icmp or icmpv6.
    #[arg(long, value_parser = protocol)]
    pub protocol: Option<u8>,
    /// Only packets between this and --to, either way: ADDRESS, ADDRESS:PORT, [IPV6]:PORT or :PORT.
    #[arg(long, value_parser = end, value_name = "END")]
    pub from: Option<End>,
    /// Only packets between this and --from, either way.
    #[arg(long, value_parser = end, value_name = "END")]
    pub to: Option<End>,
    /// Only packets that are dropped.
    #[arg(long)]
    pub dropped: bool,
    /// Look at one packet in N, by chance.
    #[arg(long, value_parser = sample, default_value = "1/1", value_name = "1/N")]
    pub sample: u32,
    /// Capture at most so many packets a second; what exceeds it is counted.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    pub rate: u32,
    /// Capture at most so many bytes of a packet.
    #[arg(long, default_value_t = SNAPLEN, value_parser = clap::value_parser!(u32).range(14..=i64::from(SNAPLEN)))]
    pub snaplen: u32,
    /// End after so many packets.
    #[arg(long)]
    pub count: Option<u64>,
    /// End after so long, such as 10s or 5m.
    #[arg(long, value_parser = humantime::parse_duration)]
    pub duration: Option<Duration>,
}

/// What is asked for cannot be.
#[derive(Debug)]
pub struct Unusable(String);

impl std::fmt::Display for Unusable {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl std::error::Error for Unusable {}

fn unknown<'a>(what: &str, name: &str, known: impl Iterator<Item = &'a str>) -> anyhow::Error {
    let nearest = crate::config::nearest(name, known).map_or(String::new(), |it| format!(": {it}"));
    Unusable(format!("there is no {what} \"{name}\"{nearest}")).into()
}

/// An end, as it is typed: `ADDRESS`, `ADDRESS:PORT`, `[ADDRESS]:PORT` or `:PORT`.
pub fn end(text: &str) -> Result<End, String> {
    let both = |end: SocketAddr| (Some(end.ip()), end.port());
    let found = match (text.parse::<IpAddr>(), text.strip_prefix(':')) {
        (Ok(address), _) => Some((Some(address), 0)),
        (_, Some(port)) => port.parse().ok().map(|port| (None, port)),
        _ => text.parse().ok().map(both),
    };
    // The unspecified IPv6 address stands for none.
    let found = found.filter(|(address, _)| *address != Some(IpAddr::V6(Ipv6Addr::UNSPECIFIED)));
    let (address, port) =
        found.ok_or_else(|| format!("\"{text}\" is not ADDRESS, ADDRESS:PORT, [ADDRESS]:PORT or :PORT"))?;
    Ok(End { address: address.map(ip::entry).unwrap_or_default(), port: U16::new(port), reserved: [0; 3] })
}

/// A protocol, as it is typed.
pub fn protocol(text: &str) -> Result<u8, String> {
    match text {
        "tcp" => Ok(TCP),
        "udp" => Ok(UDP),
        "icmp" => Ok(ICMP),
        "icmpv6" => Ok(ICMPV6),
        other => Err(format!("the protocol is tcp, udp, icmp or icmpv6, not {other}")),
    }
}

/// `1/N`, as it is typed; or N alone.
pub fn sample(text: &str) -> Result<u32, String> {
    let number = text.strip_prefix("1/").unwrap_or(text).parse().ok().filter(|it| *it > 0);
    number.ok_or_else(|| format!("\"{text}\" is not 1/N"))
}

impl Options {
    /// As the programs understand it.
    fn watch(&self, names: &Names) -> Result<Watch> {
        let mut endpoints = [0; ENDPOINTS];
        if let Some(wanted) = &self.endpoint {
            let is = |name: &str| {
                name == wanted || name.split_once('/').is_some_and(|(endpoint, _)| endpoint == wanted)
            };
            let found: Vec<u32> =
                names.all(Kind::Endpoint).filter(|(_, name)| is(name)).map(|(id, _)| id).collect();
            if found.is_empty() {
                return Err(unknown("endpoint", wanted, names.all(Kind::Endpoint).map(|(_, name)| name)));
            }
            ensure!(
                found.len() <= ENDPOINTS,
                "{wanted} has more than {ENDPOINTS} addresses: choose one as ENDPOINT/ZONE"
            );
            endpoints[..found.len()].copy_from_slice(&found);
        }
        let vpc = match &self.vpc {
            None => 0,
            Some(vpc) => names
                .id(Kind::Vpc, vpc)
                .ok_or_else(|| unknown("VPC", vpc, names.all(Kind::Vpc).map(|(_, name)| name)))?,
        };
        Ok(Watch {
            sample: self.sample,
            rate: self.rate,
            snaplen: self.snaplen,
            endpoints,
            ends: [self.from.unwrap_or_default(), self.to.unwrap_or_default()],
            vpc: u16::try_from(vpc)?,
            protocol: self.protocol.unwrap_or(0),
            dropped: self.dropped.into(),
        })
    }
}

/// What a capture writes to.
enum Sink {
    /// A line a packet.
    Lines(BufWriter<std::io::Stdout>),
    /// A file.
    Pcapng {
        writer: Writer<BufWriter<Box<dyn Write>>>,
        interfaces: HashMap<u16, u32>,
        snaplen: usize,
        to_file: bool,
    },
}

impl Sink {
    fn new(options: &Options) -> Result<Self> {
        let Some(path) = &options.write else { return Ok(Self::Lines(BufWriter::new(std::io::stdout()))) };
        let to_file = path.as_os_str() != "-";
        let to: Box<dyn Write> = if to_file {
            // Packets are their senders' secrets.
            let mut options = File::options();
            options.write(true).create(true).truncate(true).mode(0o600);
            Box::new(options.open(path).with_context(|| format!("cannot write {}", path.display()))?)
        } else {
            Box::new(std::io::stdout())
        };
        if !to_file && std::io::stdout().is_terminal() {
            let advice = "a terminal cannot show a pcapng file: send it to a pipe, or leave out --write";
            return Err(Unusable(advice.into()).into());
        }
        let writer = Writer::new(BufWriter::new(to), options.snaplen)?;
        Ok(Self::Pcapng { writer, interfaces: HashMap::new(), snaplen: options.snaplen as usize, to_file })
    }

    fn write(&mut self, packet: &Packet, names: &Names, clock: u64) -> std::io::Result<()> {
        let event = &packet.event;
        let ((came, came_length), left) = (as_it_came(packet), as_it_left(packet));
        match self {
            Self::Lines(to) => {
                let mut line = format!("{} ", time_of_day(clock.wrapping_add(event.entered)));
                let _ = write!(line, "{} {}", names.name(Kind::Interface, event.slot.into()), summary(&came));
                if let Some((bytes, _)) = left.filter(|(bytes, _)| *bytes != came) {
                    let interface = names.name(Kind::Interface, event.peer_slot.into());
                    let _ = write!(line, " => {interface} {}", summary(&bytes));
                }
                let _ = writeln!(line, ": {}", verdict(event, names));
                to.write_all(line.as_bytes())
            }
            Self::Pcapng { writer, interfaces, snaplen, .. } => {
                let comment = verdict(event, names);
                let mut record = |slot: u16, vpc: u16, time: u64, bytes: &[u8], length: u32, way: Way| {
                    let interface = match interfaces.get(&slot) {
                        Some(interface) => *interface,
                        None => {
                            let description = format!("VPC {}", names.name(Kind::Vpc, vpc.into()));
                            let number =
                                writer.interface(&names.name(Kind::Interface, slot.into()), &description)?;
                            interfaces.insert(slot, number);
                            number
                        }
                    };
                    let (time, unfinished) = (clock.wrapping_add(time), is_unfinished(bytes, length));
                    let bytes = &bytes[..bytes.len().min(*snaplen)];
                    let segmented = event.segment != 0;
                    let comment = comment.as_str();
                    writer.packet(&Record {
                        interface,
                        time,
                        bytes,
                        length,
                        way,
                        unfinished,
                        segmented,
                        comment,
                    })
                };
                record(event.slot, event.vpc, event.entered, &came, came_length, Way::Inbound)?;
                let Some((bytes, length)) = left else { return Ok(()) };
                record(event.peer_slot, event.peer_vpc, event.left, &bytes, length, Way::Outbound)
            }
        }
    }

    /// Whether it goes to a pipe that nobody reads any more, which the pipe tells before it is written to.
    fn is_abandoned(&self) -> bool {
        let stdout = std::io::stdout();
        let mut asked = [PollFd::new(&stdout, PollFlags::empty())];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        let goes_there = !matches!(self, Self::Pcapng { to_file: true, .. });
        goes_there && poll(&mut asked, Some(&at_once)).is_ok() && asked[0].revents().contains(PollFlags::ERR)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        match self {
            Self::Lines(to) => to.flush(),
            Self::Pcapng { writer, .. } => writer.flush(),
        }
    }
}

/// What became of a packet, in words.
fn verdict(event: &Event, names: &Names) -> String {
    let mut text = match event.outcome {
        FORWARDED => "forwarded".into(),
        PASSED => "passed to this host, unchanged".into(),
        STEERED => "steered between the VPC and its own stack".into(),
        FRAGMENT_EARLY => "fragment_early: held until the first fragment of its datagram comes".into(),
        code => match (DropReason::from_code(code), Answer::from_code(code)) {
            (Some(reason), _) => format!("dropped: {}: {}", reason.name(), reason.meaning().trim()),
            (_, Some(answer)) => format!("answered: {}: {}", answer.name(), answer.meaning().trim()),
            _ => format!("outcome {code}, which this version does not know"),
        },
    };
    let _ = write!(text, "{}vpc {}", separator(&text), names.name(Kind::Vpc, event.vpc.into()));
    if event.endpoint != 0 {
        let _ = write!(text, ", endpoint {}", names.name(Kind::Endpoint, event.endpoint));
    }
    if event.target != 0 {
        let _ = write!(text, ", target {}", names.name(Kind::Target, event.target));
    }
    text
}

fn separator(text: &str) -> &'static str {
    if text.ends_with('.') { " " } else { ", " }
}

/// UTC, to the microsecond.
fn time_of_day(nanoseconds: u64) -> String {
    let (seconds, rest) = (nanoseconds / 1_000_000_000, nanoseconds % 1_000_000_000);
    let (hours, minutes, seconds) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{hours:02}:{minutes:02}:{seconds:02}.{:06}", rest / 1000)
}

fn nanoseconds(clock: ClockId) -> u64 {
    let time = clock_gettime(clock);
    time.tv_sec.unsigned_abs() * 1_000_000_000 + time.tv_nsec.unsigned_abs()
}

/// A capture from its beginning to its end.
struct Capture<'a> {
    pin_dir: &'a Path,
    options: &'a Options,
    names: Names,
    /// None while an agent puts another program in place.
    tap: Option<Tap>,
    sink: Sink,
    /// Packets that have been read and may still be followed by older ones of another CPU.
    waiting: Vec<Packet>,
    written: u64,
    /// What programs missed that are no more.
    missed: Missed,
    /// When to look again for what the agent has changed.
    look_at: Instant,
    /// When there was a program last.
    had: Instant,
}

/// How a capture goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Go,
    End,
}

/// Captures until the count, the time, a signal or the reader ends it. Says on stderr what it did.
pub fn run(pin_dir: &Path, options: &Options) -> Result<()> {
    let mut capture = Capture::open(pin_dir, options)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(capture.follow());
    result.and(capture.close())
}

/// Waits for the end of the capture that started this process, and puts the pinned programs into the place of its, which are named by
/// their kernel-wide identifiers in the order of [`Program::ALL`](crate::kernel::Program::ALL); 0 stands for none.
pub fn stand_by(pin_dir: &Path, programs: &[u32]) -> Result<()> {
    tap::stand_by(pin_dir, programs.try_into().context("one identifier for each program")?)
}

/// The lock of whoever may change which program the links have; None where a capture has it.
pub fn lock(pin_dir: &Path) -> Result<Option<File>> {
    let dir = pin_dir.join("programs");
    let file = File::open(&dir).with_context(|| format!("cannot open {}", dir.display()))?;
    Ok(file.try_lock().is_ok().then_some(file))
}

fn missed(parts: impl Iterator<Item = Missed>) -> Missed {
    parts.fold(Missed::default(), |sum, it| Missed { rate: sum.rate + it.rate, room: sum.room + it.room })
}

/// Refuses maps of another version.
fn names(pin_dir: &Path) -> Result<Names> {
    let dir = pin_dir.join("maps");
    let maps = Maps::open(&dir)
        .with_context(|| format!("nothing that can be captured is at {}", pin_dir.display()))?;
    let layout = maps.layout.get(&0)?.unwrap_or(0);
    ensure!(
        layout == LAYOUT,
        "the maps in {} have layout {layout}, this version uses {LAYOUT}",
        dir.display()
    );
    Ok(Names::read(&maps::names(&dir)?))
}

impl<'a> Capture<'a> {
    fn open(pin_dir: &'a Path, options: &'a Options) -> Result<Self> {
        let names = names(pin_dir)?;
        let watch = options.watch(&names)?;
        let sink = Sink::new(options)?;
        let tap = Some(Tap::open(pin_dir, &watch)?);
        let (waiting, missed, now) = (Vec::new(), Missed::default(), Instant::now());
        Ok(Self {
            pin_dir,
            options,
            names,
            tap,
            sink,
            waiting,
            written: 0,
            missed,
            look_at: now + LOOK,
            had: now,
        })
    }

    fn close(mut self) -> Result<()> {
        self.leave()?;
        let (written, Missed { rate, room }) = (self.written, self.missed);
        let limit = self.options.rate;
        say(&format!(
            "captured {written} packets; {rate} more came above the rate of {limit} a second, {room} found no room"
        ));
        Ok(())
    }

    /// Takes the program out of the links' place.
    fn leave(&mut self) -> Result<()> {
        let Some(mut tap) = self.tap.take() else { return Ok(()) };
        tap.read(&mut self.waiting);
        self.missed = missed([self.missed, tap.missed()?].into_iter());
        tap.close()
    }

    async fn follow(&mut self) -> Result<()> {
        use tokio::signal::unix::{SignalKind, signal};
        let (mut terminate, mut interrupt) =
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let until = self.options.duration.map(|it| Instant::now() + it);
        let mut pause = tokio::time::interval(PAUSE);
        say("capturing");
        loop {
            let ends = tokio::select! {
                _ = terminate.recv() => true,
                _ = interrupt.recv() => true,
                _ = pause.tick() => until.is_some_and(|it| Instant::now() >= it),
            };
            match self.read(ends) {
                Ok(Next::Go) if !ends => {}
                Ok(_) => return Ok(()),
                // Whoever reads has read enough.
                Err(error)
                    if error
                        .downcast_ref::<std::io::Error>()
                        .is_some_and(|it| it.kind() == ErrorKind::BrokenPipe) =>
                {
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Writes what has gathered: all of it at the end, before that only what nothing older can follow.
    fn read(&mut self, all: bool) -> Result<Next> {
        let (began, real) = (nanoseconds(ClockId::Monotonic), nanoseconds(ClockId::Realtime));
        if Instant::now() >= self.look_at && !all {
            self.keep_up()?;
        }
        if let Some(tap) = &mut self.tap {
            tap.read(&mut self.waiting);
        }
        self.waiting.sort_by_key(|packet| packet.event.entered);
        let settled = |packet: &Packet| all || packet.event.left + SETTLED < began;
        let ready = self.waiting.iter().position(|packet| !settled(packet)).unwrap_or(self.waiting.len());
        let packets: Vec<Packet> = self.waiting.drain(..ready).collect();
        for packet in packets {
            if self.options.count.is_some_and(|count| self.written >= count) {
                break;
            }
            self.sink.write(&packet, &self.names, real.wrapping_sub(began))?;
            self.written += 1;
        }
        self.sink.flush()?;
        let done = self.options.count.is_some_and(|count| self.written >= count);
        Ok(if done || self.sink.is_abandoned() { Next::End } else { Next::Go })
    }

    /// Looks for names and interfaces that are new, and for a program that an agent has put in place meanwhile.
    fn keep_up(&mut self) -> Result<()> {
        let started = Instant::now();
        self.names = names(self.pin_dir)?;
        // Many names take long to read: a tenth of a CPU at most. Programs take longer to load, and are loaded for an agent that is still
        // giving its own to the links, which are to be taken back soon.
        self.look_at = started + LOOK.max(started.elapsed() * 10);
        if let Some(tap) = &self.tap {
            if tap.is_current()? {
                return tap.take_links();
            }
            self.leave()?;
            self.had = Instant::now();
        }
        match Tap::open(self.pin_dir, &self.options.watch(&self.names)?) {
            Ok(tap) => {
                self.tap = Some(tap);
                say("an agent has put another program in place; its packets are captured from here on");
                Ok(())
            }
            Err(_) if self.had.elapsed() < PATIENCE => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// On stderr, whether or not anybody reads it.
fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}
