//! The program of a capture in the links' place: put there, read, and taken out again, however the capture ends.

use super::{lock, missed};
use crate::kernel;
use crate::sys;
use anyhow::{Context, Result, ensure};
use aya::maps::perf::{PerfEvent, PerfEventArray, PerfEventArrayBuffer};
use aya::maps::{MapData, PerCpuArray};
use privatelink_common::capture::{Event, Missed, Watch};
use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use zerocopy::FromBytes;

/// Room for each CPU, in pages, a power of two: less where there are many CPUs, but always some of the largest frames.
fn pages(cpus: usize) -> usize {
    let fair = (16384 / cpus.max(1)).clamp(64, 512);
    1 << fair.ilog2()
}

/// One packet: what is told of it, and its bytes as it left, cut to the snapshot length.
#[derive(Clone, Debug)]
pub(super) struct Packet {
    pub(super) event: Event,
    pub(super) bytes: Vec<u8>,
}

/// A capture that runs.
pub(super) struct Tap {
    pin_dir: PathBuf,
    /// The program that is pinned, and that links have while there is no capture.
    base: OwnedFd,
    base_id: u32,
    program: OwnedFd,
    id: u32,
    snaplen: u32,
    buffers: Vec<PerfEventArrayBuffer<MapData>>,
    missed: PerCpuArray<MapData, [u64; 2]>,
    guard: Child,
    _lock: File,
}

fn pinned(pin_dir: &Path) -> Result<OwnedFd> {
    let pin = pin_dir.join("programs/ingress");
    sys::open_pin(&pin).with_context(|| format!("there is no program at {}", pin.display()))
}

/// The links that are pinned.
fn links(pin_dir: &Path) -> Result<Vec<OwnedFd>> {
    let entries = fs::read_dir(pin_dir.join("links")).context("cannot list the links")?;
    // One that is gone by now needs nothing.
    Ok(entries.filter_map(|entry| sys::open_pin(&entry.ok()?.path()).ok()).collect())
}

/// Gives every link that has the program `id` the one that is pinned.
pub(super) fn put_back(pin_dir: &Path, id: u32) -> Result<()> {
    // Without it, nothing has it.
    let Ok(program) = sys::program_by_id(id) else { return Ok(()) };
    let base = pinned(pin_dir)?;
    for link in links(pin_dir)? {
        sys::exchange_program(link.as_fd(), program.as_fd(), base.as_fd())
            .context("cannot put the program back")?;
    }
    Ok(())
}

/// Starts the process that puts the program back when this one has ended, however that was. It is in a group of its own, so that a
/// terminal's interrupt does not reach it.
fn guard(pin_dir: &Path, id: u32) -> Result<Child> {
    let mut command = Command::new("/proc/self/exe");
    command.arg0("privatelink").args(["end-capture", &id.to_string(), "--pin-dir"]).arg(pin_dir);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).process_group(0);
    command.spawn().context("cannot start the process that ends the capture")
}

/// What [`guard`] runs: waits for the end of its input.
pub(super) fn stand_by(pin_dir: &Path, id: u32) -> Result<()> {
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink())
        .context("cannot wait for the capture's end")?;
    put_back(pin_dir, id)
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
    /// Loads the program, and puts it into the place of the one that is pinned.
    pub(super) fn open(pin_dir: &Path, watch: &Watch) -> Result<Self> {
        let lock = wait_for_lock(pin_dir)?;
        let base = pinned(pin_dir)?;
        let (base_id, maps) = sys::program_ids(base.as_fd()).context("cannot ask for the program")?;
        ensure!(uses(&maps, pin_dir)?, "an agent is changing the sizes of the tables: try again");
        let (program, mut object) = kernel::load_watching(pin_dir, watch)?;
        let (id, _) = sys::program_ids(program.as_fd()).context("cannot ask for the program")?;
        let mut events = PerfEventArray::try_from(object.take_map("events").context("no events")?)?;
        let mut buffers = Vec::new();
        let cpus = aya::util::online_cpus().map_err(|(_, error)| error)?;
        let pages = pages(cpus.len());
        for cpu in cpus {
            buffers.push(events.open(cpu, Some(pages)).context("cannot make a buffer")?);
        }
        let missed = PerCpuArray::try_from(object.take_map("missed").context("no counters")?)?;
        let guard = guard(pin_dir, id)?;
        let (pin_dir, snaplen) = (pin_dir.to_owned(), watch.snaplen);
        let tap = Self { pin_dir, base, base_id, program, id, snaplen, buffers, missed, guard, _lock: lock };
        tap.take_links()?;
        Ok(tap)
    }

    /// Takes the links that have the program that is pinned: at the beginning all of them, later those that have come.
    pub(super) fn take_links(&self) -> Result<()> {
        for link in links(&self.pin_dir)? {
            sys::exchange_program(link.as_fd(), self.base.as_fd(), self.program.as_fd())
                .context("cannot put the capture's program in place")?;
        }
        Ok(())
    }

    /// Whether the program that is pinned is still the one that this one replaces.
    pub(super) fn is_current(&self) -> Result<bool> {
        let (id, _) =
            sys::program_ids(pinned(&self.pin_dir)?.as_fd()).context("cannot ask for the program")?;
        Ok(id == self.base_id)
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

    /// Puts the pinned program back.
    pub(super) fn close(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        drop(self.guard.stdin.take());
        // The guard may have been killed.
        if self.guard.wait().is_ok_and(|status| status.success()) {
            Ok(())
        } else {
            put_back(&self.pin_dir, self.id)
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
