//! The programs of a capture in the links: put there, read, and taken out again, however the capture ends.

use super::{lock, missed};
use crate::kernel::{self, Hook};
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

/// A hook's program, and the one that it replaces.
struct Stand {
    hook: Hook,
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

/// Gives every link that has one of the programs `ids`, in the order of [`Hook::BOTH`], the one that is pinned.
pub(super) fn put_back(pin_dir: &Path, ids: [u32; 2]) -> Result<()> {
    for (hook, id) in Hook::BOTH.into_iter().zip(ids) {
        // Without it, nothing has it.
        let Ok(program) = sys::program_by_id(id) else { continue };
        let base = kernel::open_program(pin_dir, hook)?;
        for link in kernel::open_links(pin_dir, hook)? {
            sys::exchange_program(link.as_fd(), program.as_fd(), base.as_fd())
                .context("cannot put the program back")?;
        }
    }
    Ok(())
}

/// Starts the process that puts the programs back when this one has ended, however that was. It is in a group of its own, so that a
/// terminal's interrupt does not reach it.
fn guard(pin_dir: &Path, ids: [u32; 2]) -> Result<Child> {
    let mut command = Command::new("/proc/self/exe");
    command.arg0("privatelink").arg("end-capture").args(ids.map(|id| id.to_string()));
    command.arg("--pin-dir").arg(pin_dir);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).process_group(0);
    command.spawn().context("cannot start the process that ends the capture")
}

/// What [`guard`] runs: waits for the end of its input.
pub(super) fn stand_by(pin_dir: &Path, ids: [u32; 2]) -> Result<()> {
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
        let bases =
            [kernel::open_program(pin_dir, Hook::BOTH[0])?, kernel::open_program(pin_dir, Hook::BOTH[1])?];
        for base in &bases {
            let (_, maps) = sys::program_ids(base.as_fd()).context("cannot ask for the program")?;
            ensure!(uses(&maps, pin_dir)?, "an agent is changing the sizes of the tables: try again");
        }
        let (programs, mut object) = kernel::load_watching(pin_dir, watch)?;
        let mut stands = Vec::new();
        for (hook, base) in Hook::BOTH.into_iter().zip(bases) {
            let (base_id, program) = (id(base.as_fd())?, programs.of(hook).try_clone_to_owned()?);
            stands.push(Stand { hook, base, base_id, id: id(program.as_fd())?, program });
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
        for Stand { hook, base, program, .. } in &self.stands {
            for link in kernel::open_links(&self.pin_dir, *hook)? {
                sys::exchange_program(link.as_fd(), base.as_fd(), program.as_fd())
                    .context("cannot put the capture's program in place")?;
            }
        }
        Ok(())
    }

    /// Whether the programs that are pinned are still those that these replace.
    pub(super) fn is_current(&self) -> Result<bool> {
        for stand in &self.stands {
            if id(kernel::open_program(&self.pin_dir, stand.hook)?.as_fd())? != stand.base_id {
                return Ok(false);
            }
        }
        Ok(true)
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

/// The programs' identifiers, in the order of [`Hook::BOTH`].
fn ids(stands: &[Stand]) -> [u32; 2] {
    let id = |index: usize| stands.get(index).map_or(0, |stand| stand.id);
    [id(0), id(1)]
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
