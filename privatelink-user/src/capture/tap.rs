//! The programs of a capture in the links: put there, read, and taken out again, however the capture ends.

use super::{lock, missed};
use crate::kernel::{self, Program};
use crate::sys;
use anyhow::{Context, Result, ensure};
use aya::maps::perf::{PerfEvent, PerfEventArray, PerfEventArrayBuffer};
use aya::maps::{MapData, PerCpuArray};
use privatelink_common::capture::{Event, Missed, Watch};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use zerocopy::FromBytes;

/// Room for each CPU, in pages, a power of two: less where there are many CPUs, but always some of the largest frames.
fn pages(cpus: usize) -> usize {
    let fair = (16384 / cpus.max(1)).clamp(64, 2048);
    1 << fair.ilog2()
}

/// One packet: what is told of it, and its bytes as it left, cut to the snapshot length.
#[derive(Clone, Debug)]
pub(super) struct Packet {
    pub(super) event: Event,
    pub(super) bytes: Vec<u8>,
}

/// A program, and the one that it replaces.
struct Stand {
    replaced: Program,
    /// The program that is pinned, and that links have while there is no capture.
    base: OwnedFd,
    base_id: u32,
    program: OwnedFd,
    id: u32,
}

/// A capture that runs.
pub(super) struct Tap {
    pin_dir: PathBuf,
    stands: Vec<Stand>,
    snaplen: u32,
    buffers: Vec<PerfEventArrayBuffer<MapData>>,
    missed: PerCpuArray<MapData, [u64; 2]>,
    guard: Child,
    _lock: File,
}

fn id(program: BorrowedFd<'_>) -> Result<u32> {
    Ok(sys::program_ids(program).context("cannot ask for the program")?.0)
}

/// The kernel-wide identifiers of a capture's programs, in the order of [`Program::ALL`]; 0: it has none in the place of that one.
pub(super) type Ids = [u32; Program::ALL.len()];

/// Gives every link that has one of these programs the one that is pinned. Without its pin, no link is to have it: an agent that starts
/// puts it there before its links get it.
pub(super) fn put_back(pin_dir: &Path, ids: Ids) -> Result<()> {
    let bases = kernel::open_programs(pin_dir)?;
    for (replaced, id) in Program::ALL.into_iter().zip(ids) {
        // Without it, nothing has it.
        let (Ok(program), Some(base)) = (sys::program_by_id(id), bases.get(&replaced)) else { continue };
        exchange(pin_dir, replaced, &program, base).context("cannot put the program back")?;
    }
    Ok(())
}

/// Gives every link that has the program `old` in the place of `replaced`, or is it, `new`.
fn exchange(pin_dir: &Path, replaced: Program, old: &OwnedFd, new: &OwnedFd) -> Result<()> {
    for link in kernel::open_links(pin_dir, replaced)? {
        sys::exchange_program(link.as_fd(), old.as_fd(), new.as_fd())?;
    }
    Ok(())
}

/// Starts the process that puts the programs back when this one has ended, however that was. It is in a group of its own, so that a
/// terminal's interrupt does not reach it.
fn guard(pin_dir: &Path, ids: Ids) -> Result<Child> {
    let mut command = Command::new("/proc/self/exe");
    command.arg0("privatelink").arg("end-capture").args(ids.map(|id| id.to_string()));
    command.arg("--pin-dir").arg(pin_dir);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).process_group(0);
    command.spawn().context("cannot start the process that ends the capture")
}

/// What [`guard`] runs: waits for the end of its input.
pub(super) fn stand_by(pin_dir: &Path, ids: Ids) -> Result<()> {
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink())
        .context("cannot wait for the capture's end")?;
    put_back(pin_dir, ids)
}

/// Waits a moment for those who hold the lock only to look.
fn wait_for_lock(pin_dir: &Path) -> Result<File> {
    let until = Instant::now() + Duration::from_secs(1);
    loop {
        if let Some(lock) = lock(pin_dir)? {
            return Ok(lock);
        }
        ensure!(Instant::now() < until, "another capture runs on {}", pin_dir.display());
        std::thread::sleep(Duration::from_millis(10));
    }
}

impl Tap {
    /// Loads the programs, and puts them into the place of those that are pinned.
    pub(super) fn open(pin_dir: &Path, watch: &Watch) -> Result<Self> {
        let lock = wait_for_lock(pin_dir)?;
        let mut bases = kernel::open_programs(pin_dir)?;
        for base in bases.values() {
            let (_, maps) = sys::program_ids(base.as_fd()).context("cannot ask for the program")?;
            ensure!(uses(&maps, pin_dir)?, "an agent is changing the sizes of the tables: try again");
        }
        let (programs, mut object) = kernel::load_watching(pin_dir, watch, bases.keys().copied())?;
        let mut stands = Vec::new();
        for (replaced, program) in programs {
            let base = bases.remove(&replaced).context("it is not pinned")?;
            let (base_id, id) = (id(base.as_fd())?, id(program.as_fd())?);
            stands.push(Stand { replaced, base, base_id, program, id });
        }
        let mut events = PerfEventArray::try_from(object.take_map("events").context("no events")?)?;
        let mut buffers = Vec::new();
        let cpus = aya::util::online_cpus().map_err(|(_, error)| error)?;
        let pages = pages(cpus.len());
        for cpu in cpus {
            buffers.push(events.open(cpu, Some(pages)).context("cannot make a buffer")?);
        }
        let missed = PerCpuArray::try_from(object.take_map("missed").context("no counters")?)?;
        let guard = guard(pin_dir, ids(&stands))?;
        let (pin_dir, snaplen) = (pin_dir.to_owned(), watch.snaplen);
        let tap = Self { pin_dir, stands, snaplen, buffers, missed, guard, _lock: lock };
        tap.take_links()?;
        Ok(tap)
    }

    /// Takes the links that have a program that is pinned: at the beginning all of them, later those that have come.
    pub(super) fn take_links(&self) -> Result<()> {
        for Stand { replaced, base, program, .. } in &self.stands {
            exchange(&self.pin_dir, *replaced, base, program)
                .context("cannot put the capture's program in place")?;
        }
        Ok(())
    }

    /// Whether the programs that are pinned are still those that these replace.
    pub(super) fn is_current(&self) -> Result<bool> {
        let pinned = kernel::open_programs(&self.pin_dir)?;
        let pinned = pinned.iter().map(|(program, pinned)| Ok((*program, id(pinned.as_fd())?)));
        let replaced = self.stands.iter().map(|stand| (stand.replaced, stand.base_id));
        Ok(pinned.collect::<Result<Vec<_>>>()? == replaced.collect::<Vec<_>>())
    }

    /// The packets that have gathered, CPU after CPU.
    pub(super) fn read(&mut self, packets: &mut Vec<Packet>) {
        for buffer in &mut self.buffers {
            buffer.for_each(|event| {
                if let PerfEvent::Sample { head, tail } = event {
                    packets.extend(packet(head, tail, self.snaplen));
                }
            });
        }
    }

    /// What was not captured so far.
    pub(super) fn missed(&self) -> Result<Missed> {
        let values = self.missed.get(&0, 0)?;
        Ok(missed(values.iter().map(|[rate, room]| Missed { rate: *rate, room: *room })))
    }

    /// Puts the pinned programs back.
    pub(super) fn close(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        drop(self.guard.stdin.take());
        // The guard may have been killed.
        if self.guard.wait().is_ok_and(|status| status.success()) {
            Ok(())
        } else {
            put_back(&self.pin_dir, ids(&self.stands))
        }
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        if self.guard.stdin.is_some() {
            // The agent does it where this fails.
            let _ = self.end();
        }
    }
}

fn ids(stands: &[Stand]) -> Ids {
    Program::ALL.map(|program| stands.iter().find(|it| it.replaced == program).map_or(0, |stand| stand.id))
}

/// Whether a program with these maps uses those that are pinned.
fn uses(maps: &[u32], pin_dir: &Path) -> Result<bool> {
    let pin = pin_dir.join("maps/established");
    let pinned = sys::open_pin(&pin).with_context(|| format!("cannot open the map {}", pin.display()))?;
    Ok(maps.contains(&sys::map_info(pinned.as_fd())?.id))
}

/// Takes a sample apart; the kernel fills it up to eight bytes.
fn packet(head: &[u8], tail: &[u8], snaplen: u32) -> Option<Packet> {
    let whole;
    let bytes = if tail.is_empty() {
        head
    } else {
        whole = [head, tail].concat();
        &whole
    };
    let (event, bytes) = Event::read_from_prefix(bytes).ok()?;
    let bytes = bytes.get(..event.left_length.min(snaplen) as usize)?;
    Some(Packet { event, bytes: bytes.to_vec() })
}
