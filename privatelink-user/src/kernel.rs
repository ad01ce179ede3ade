//! The programs, the pins and the links: loading, adopting, attaching, taking away. The only module that names aya's programs.

use crate::maps::Maps;
use crate::model::Limits;
use crate::resize;
use crate::sys::{self, XdpMode};
use anyhow::{Context, Result, anyhow, bail, ensure};
use aya::maps::{MapData, PerfEventArray};
use aya::programs::{ProgramInfo, SchedClassifier, Xdp};
use aya::{Ebpf, EbpfLoader};
use aya_log::EbpfLogger;
use log::info;
use privatelink_common::capture::Watch;
use privatelink_common::limits::{LAYOUT, OUTCOMES};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use zerocopy::IntoBytes;

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/privatelink.bpf.o"));

/// What the links have while a capture runs.
static CAPTURED: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/captured.bpf.o"));

/// What the pin of a TCX link has behind the interface's name.
const TCX_LINK: &str = ":tcx";

/// Where maps of other sizes are until they are in use.
const BESIDE: &str = "maps_new";

/// Where maps that have been replaced are until they are removed.
const FORMER: &str = "maps_old";

/// What is pinned below one directory, held by one agent.
#[derive(Debug)]
pub struct Kernel {
    dir: PathBuf,
    /// Where the maps are pinned: `maps`, or beside it until a change of sizes is done.
    place: PathBuf,
    /// The maps of other sizes that these were filled from, and when.
    before: Option<(Maps, u32)>,
    programs: Programs,
    /// The programs of the links that are pinned, by their pins.
    links: BTreeMap<PathBuf, Program>,
    /// Whether the maps were there before.
    pub adopted: bool,
    _lock: File,
}

/// The programs of one object, which share its maps, as far as they are needed.
#[derive(Debug)]
struct Programs {
    object: Ebpf,
    loaded: BTreeMap<Program, OwnedFd>,
    /// What adds to counters.
    account: OwnedFd,
}

/// Where a program meets the packets of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// Before the kernel makes socket buffers of them.
    Xdp(XdpMode),
    /// Behind that, where frames may be larger than the MTU and checksums still to be completed.
    Tcx,
}

impl Hook {
    /// Its program for an interface that is a trunk, or is not.
    pub const fn program(self, trunk: bool) -> Program {
        match (self, trunk) {
            (Self::Xdp(_), false) => Program::Xdp,
            (Self::Xdp(_), true) => Program::XdpTrunk,
            (Self::Tcx, false) => Program::Tcx,
            (Self::Tcx, true) => Program::TcxTrunk,
        }
    }
}

/// The hooks at which an interface may have a link; XDP's mode does not matter to its pin.
const HOOKS: [Hook; 2] = [Hook::Xdp(XdpMode::Native), Hook::Tcx];

/// The programs. Each is loaded when an interface is to have it, since the kernel takes most of a second to verify one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Program {
    /// XDP's.
    Xdp,
    /// TCX's.
    Tcx,
    /// XDP's for trunks.
    XdpTrunk,
    /// TCX's for trunks.
    TcxTrunk,
}

impl Program {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Xdp, Self::Tcx, Self::XdpTrunk, Self::TcxTrunk];

    /// Its name, and its pin's.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Xdp => "ingress",
            Self::Tcx => "ingress_tcx",
            Self::XdpTrunk => "ingress_trunk",
            Self::TcxTrunk => "ingress_tcx_trunk",
        }
    }

    /// The name of the program that stands in its place while a capture runs.
    const fn captured(self) -> &'static str {
        match self {
            Self::Xdp => "captured",
            Self::Tcx => "captured_tcx",
            Self::XdpTrunk => "captured_trunk",
            Self::TcxTrunk => "captured_tcx_trunk",
        }
    }

    /// Where it meets packets; XDP's mode does not matter to a program.
    const fn hook(self) -> Hook {
        match self {
            Self::Xdp | Self::XdpTrunk => Hook::Xdp(XdpMode::Native),
            Self::Tcx | Self::TcxTrunk => Hook::Tcx,
        }
    }
}

/// What the program says of packets that it drops: values of aya-log's `AYA_LOG_LEVEL`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Drops {
    /// It only counts them.
    Counted = 0,
    /// It names each of them, too.
    Named = 3,
}

/// Why the program could not be attached.
#[derive(Debug)]
pub enum Refused {
    /// The kernel does not take the program.
    Program(anyhow::Error),
    /// The driver cannot run it.
    Native(std::io::Error),
    /// Anything else.
    Other(anyhow::Error),
}

impl From<anyhow::Error> for Refused {
    fn from(error: anyhow::Error) -> Self {
        Self::Other(error)
    }
}

/// An agent has this directory already.
#[derive(Debug)]
pub struct Held(PathBuf);

impl std::fmt::Display for Held {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "another agent uses {}: stop it, or choose another --pin-dir", self.0.display())
    }
}

impl std::error::Error for Held {}

/// The sizes of the maps that the configuration chooses.
fn sizes(limits: &Limits) -> [(&'static str, &'static str, u32); 31] {
    [
        // What is tags on a trunk comes behind what has an index of the kernel's.
        ("interfaces", "max_ifindex", limits.max_ifindex.saturating_add(limits.interfaces)),
        ("egress", "interfaces", limits.interfaces),
        ("mtus", "interfaces", limits.interfaces),
        ("caller_rates", "interfaces", limits.interfaces),
        ("egress_tcx", "interfaces", limits.interfaces),
        ("vlans", "interfaces", limits.interfaces),
        ("trunks", "interfaces", limits.interfaces),
        ("prefixes", "addresses", limits.addresses),
        ("subnets", "addresses", limits.addresses),
        ("addresses", "addresses", limits.addresses),
        ("endpoints", "endpoints", limits.endpoints),
        ("balancers", "endpoints", limits.endpoints),
        ("listeners", "addresses", limits.addresses),
        ("tables", "targets", limits.targets),
        ("targets", "targets", limits.targets),
        ("neighbours", "addresses", limits.addresses),
        ("established", "flows", limits.flows),
        ("pending", "pending_flows", limits.pending_flows),
        ("established6", "ipv6_flows", limits.ipv6_flows),
        ("pending6", "pending_ipv6_flows", limits.pending_ipv6_flows),
        ("streams", "flows", limits.flows / 2),
        ("streams6", "ipv6_flows", limits.ipv6_flows / 2),
        ("counters", "endpoints", limits.endpoints),
        ("target_counters", "targets", limits.targets),
        ("buckets", "endpoints", limits.endpoints),
        ("pressures", "endpoints", limits.endpoints),
        ("vpc_endpoint_ids", "endpoints", limits.endpoints),
        ("outcomes", "vpcs", limits.vpcs.saturating_mul(OUTCOMES)),
        ("held_rates", "vpcs", limits.vpcs),
        ("held_taken", "vpcs", limits.vpcs),
        ("names", "addresses", limits.addresses.saturating_mul(4)),
    ]
}

/// Mounts a bpffs for `dir` where there is none, and makes the directory.
pub fn prepare_dir(dir: &Path) -> Result<()> {
    let root = Path::new("/sys/fs/bpf");
    let mount_at = if dir.starts_with(root) { root } else { dir };
    fs::create_dir_all(mount_at).with_context(|| format!("cannot make {}", mount_at.display()))?;
    let kind = rustix::fs::statfs(mount_at)
        .with_context(|| format!("cannot look at {}", mount_at.display()))?
        .f_type;
    if kind as u64 != 0xcafe_4a11 {
        let none = rustix::mount::MountFlags::empty();
        rustix::mount::mount("bpf", mount_at, "bpf", none, None)
            .with_context(|| format!("cannot mount a bpffs at {}", mount_at.display()))?;
    }
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))
}

impl Kernel {
    /// Takes `dir`, adopts what is pinned there or loads it anew, and replaces the program of every link that is pinned.
    pub fn open(dir: &Path, limits: &Limits, drops: Drops) -> Result<Self> {
        prepare_dir(dir)?;
        let lock = File::open(dir).with_context(|| format!("cannot open {}", dir.display()))?;
        if lock.try_lock().is_err() {
            return Err(Held(dir.to_owned()).into());
        }
        settle(dir)?;
        for sub in ["maps", "programs", "links"] {
            fs::create_dir_all(dir.join(sub))
                .with_context(|| format!("cannot make {}/{sub}", dir.display()))?;
        }
        let (pinned, beside) = (dir.join("maps"), dir.join(BESIDE));
        let found = check(&pinned, limits)?;
        let place = if found == Found::OtherSizes { beside } else { pinned.clone() };
        fs::create_dir_all(&place).with_context(|| format!("cannot make {}", place.display()))?;
        let programs = load(&place, limits, drops)?;
        let maps = Maps::open(&place)?;
        if found != Found::Ours {
            maps.layout.set(&0, &LAYOUT)?;
        }
        let mut before = None;
        if found == Found::OtherSizes {
            let old = Maps::open(&pinned)?;
            let began = resize::carry(&old, &maps).inspect_err(|_| {
                let _ = remove_pins(&place);
            })?;
            before = Some((old, began));
        }
        let adopted = found != Found::Nothing;
        let (dir, links) = (dir.to_owned(), BTreeMap::new());
        let mut kernel = Self { dir, place, programs, links, adopted, before, _lock: lock };
        // Links may have those of the agent before, and a capture puts back what is pinned.
        for program in Program::ALL {
            if kernel.program_pin(program).exists() {
                kernel.load(program)?;
            }
        }
        Ok(kernel)
    }

    /// After every link has this agent's program: ends a change of sizes, if there was one. Says whether there was.
    pub fn finish(&mut self) -> Result<bool> {
        let Some((old, began)) = self.before.take() else { return Ok(false) };
        resize::catch_up(&old, &self.maps()?, began)?;
        let (pinned, former) = (self.dir.join("maps"), self.dir.join(FORMER));
        fs::rename(&pinned, &former).context("cannot put the old maps aside")?;
        fs::rename(&self.place, &pinned).context("cannot put the new maps in place")?;
        self.place = pinned;
        remove_pins(&former)?;
        Ok(true)
    }

    fn program_pin(&self, program: Program) -> PathBuf {
        self.dir.join("programs").join(program.name())
    }

    /// Replaces a program's pin, by one exchange of names, so that there is always one to open.
    fn pin_program(&self, program: Program) -> Result<()> {
        let old = self.program_pin(program);
        let new = old.with_file_name(format!("{}_new", program.name()));
        let _ = fs::remove_file(&new);
        sys::pin(self.program(program)?, &new).context("cannot pin a program")?;
        fs::rename(&new, &old).context("cannot pin a program")
    }

    fn program(&self, program: Program) -> Result<BorrowedFd<'_>> {
        let loaded = self.programs.loaded.get(&program);
        loaded.map(AsFd::as_fd).with_context(|| format!("the program {} is not loaded", program.name()))
    }

    /// Loads a program, if it is not loaded yet.
    pub fn load(&mut self, program: Program) -> Result<()> {
        if !self.programs.loaded.contains_key(&program) {
            self.programs.load(program)?;
            self.pin_program(program)?;
        }
        Ok(())
    }

    /// Whether the kernel can attach programs by TCX.
    pub fn has_tcx(&self) -> bool {
        sys::has_tcx(self.programs.account.as_fd())
    }

    /// Where the programs name what they drop, which is the same place for all; handed to `log`. There is one such listener.
    pub fn drops<T: log::Log>(&mut self, log: T) -> Result<EbpfLogger<T>> {
        EbpfLogger::init_with_logger(&mut self.programs.object, log).context("cannot listen to the programs")
    }

    /// The maps.
    pub fn maps(&self) -> Result<Maps> {
        Maps::open(&self.place)
    }

    /// The program that adds to counters what has become of fragments that were held, and where those come out.
    pub fn held(&self) -> Result<(OwnedFd, PerfEventArray<MapData>)> {
        let account = self.programs.account.try_clone().context("no more descriptors")?;
        let map = MapData::from_pin(self.place.join("held")).context("cannot open the map held")?;
        Ok((account, PerfEventArray::try_from(aya::maps::Map::PerfEventArray(map))?))
    }

    /// The programs that are loaded.
    pub fn programs(&self) -> impl Iterator<Item = Program> {
        self.programs.loaded.keys().copied()
    }

    /// What the kernel says of a program.
    pub fn program_info(&self, program: Program) -> Result<ProgramInfo> {
        Ok(ProgramInfo::from_pin(self.program_pin(program))?)
    }

    fn link_pin(&self, interface: &str, hook: Hook) -> PathBuf {
        // A bpffs refuses names with dots, which VLAN devices have; an interface's name has no `+` in practice, and no `:` at all.
        let name = interface.replace('.', "+");
        self.dir.join("links").join(match hook {
            Hook::Xdp(_) => name,
            Hook::Tcx => name + TCX_LINK,
        })
    }

    /// Attaches a hook's program to an interface, which is a `trunk` or is not, or gives the link that is there the program of this agent. The other hook's link, if
    /// there is one, is taken away when this one is in place, so that every packet meets one of them. A link of the other XDP mode
    /// is replaced, and packets in between meet no program.
    pub fn attach(&mut self, interface: &str, ifindex: u32, hook: Hook, trunk: bool) -> Result<(), Refused> {
        let kind = hook.program(trunk);
        self.load(kind).map_err(Refused::Program)?;
        let (pin, program) = (self.link_pin(interface, hook), self.program(kind)?);
        if !adopt(&pin, interface, ifindex, hook, program)? {
            let link = link(interface, ifindex, hook, program)?;
            sys::pin(link.as_fd(), &pin).with_context(|| format!("cannot pin {}", pin.display()))?;
        }
        self.links.insert(pin, kind);
        let other = if hook == Hook::Tcx { Hook::Xdp(XdpMode::Native) } else { Hook::Tcx };
        self.remove_link(interface, other)?;
        Ok(())
    }

    /// Gives the links that a capture has left without an end their program back; leaves those alone that a capture has. Returns how
    /// many there were.
    pub fn reclaim(&self) -> Result<usize> {
        let Some(_lock) = crate::capture::lock(&self.dir)? else { return Ok(0) };
        let mut reclaimed = 0;
        for (pin, program) in &self.links {
            // One that is gone by now needs nothing.
            let Ok(link) = sys::open_pin(pin) else { continue };
            reclaimed += usize::from(give_back(link.as_fd(), self.program(*program)?)?);
        }
        Ok(reclaimed)
    }

    /// Takes the links away that are on interfaces which have another's name by now, as an interface has no place for a second one. `names`
    /// has the interfaces' names, by their indices.
    pub fn leave_renamed(&mut self, names: &BTreeMap<u32, &str>) -> Result<()> {
        for entry in fs::read_dir(self.dir.join("links")).context("cannot list the links")? {
            let pin = entry?.path();
            // One that is gone by now needs nothing.
            let Ok(link) = sys::open_pin(&pin) else { continue };
            let name = sys::link_ifindex(link.as_fd()).ok().and_then(|index| names.get(&index));
            let is_own = |name: &&str| HOOKS.iter().any(|hook| self.link_pin(name, *hook) == pin);
            if let Some(name) = name.filter(|name| !is_own(name)) {
                info!("{name} had another name before: the link that it has from then is taken away");
                sys::detach_link(link.as_fd()).context("cannot take a link away")?;
                self.remove_pin(&pin)?;
            }
        }
        Ok(())
    }

    /// Whether the link by which an interface was attached is still pinned and there; which program it has, [`Self::reclaim`] sees to.
    pub fn has_link(&self, interface: &str, ifindex: u32, hook: Hook) -> bool {
        let link = sys::open_pin(&self.link_pin(interface, hook));
        link.and_then(|link| sys::link_ifindex(link.as_fd())).is_ok_and(|attached| attached == ifindex)
    }

    /// Takes the programs off an interface.
    pub fn detach(&mut self, interface: &str) -> Result<()> {
        self.remove_link(interface, Hook::Xdp(XdpMode::Native))?;
        self.remove_link(interface, Hook::Tcx)
    }

    fn remove_link(&mut self, interface: &str, hook: Hook) -> Result<()> {
        self.remove_pin(&self.link_pin(interface, hook))
    }

    fn remove_pin(&mut self, pin: &Path) -> Result<()> {
        self.links.remove(pin);
        match fs::remove_file(pin) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(error).context("cannot remove a link's pin")
            }
            _ => Ok(()),
        }
    }

    /// The interfaces whose links are pinned.
    pub fn links(&self) -> Result<BTreeSet<String>> {
        let mut names = BTreeSet::new();
        for entry in fs::read_dir(self.dir.join("links")).context("cannot list the links")? {
            let name = entry?.file_name().to_string_lossy().replace('+', ".");
            names.insert(name.strip_suffix(TCX_LINK).unwrap_or(&name).to_owned());
        }
        Ok(names)
    }
}

/// Attaches a program to an interface.
fn link(interface: &str, ifindex: u32, hook: Hook, program: BorrowedFd<'_>) -> Result<OwnedFd, Refused> {
    let mode = match hook {
        Hook::Xdp(mode) => mode,
        Hook::Tcx => {
            let link = sys::attach_tcx(program, ifindex);
            return Ok(link.with_context(|| format!("cannot attach to {interface} by TCX"))?);
        }
    };
    sys::attach_xdp(program, ifindex, mode).map_err(|error| match (error.kind(), mode) {
        (ErrorKind::ResourceBusy, _) => Refused::Other(anyhow!(
            "another XDP program is attached to {interface}: take it away, `ip link show {interface}` names it"
        )),
        (_, XdpMode::Native) => Refused::Native(error),
        (_, XdpMode::Generic) => Refused::Other(anyhow!(error).context(format!("cannot attach to {interface}"))),
    })
}

/// Takes over the link that is pinned at `pin`, if it is one to this interface and of this mode; removes it if not.
fn adopt(pin: &Path, interface: &str, ifindex: u32, hook: Hook, program: BorrowedFd<'_>) -> Result<bool> {
    let Ok(link) = sys::open_pin(pin) else { return Ok(false) };
    let is_ours = sys::link_ifindex(link.as_fd()).is_ok_and(|attached| attached == ifindex);
    let is_so = match hook {
        Hook::Xdp(mode) => crate::net::xdp_mode(interface) == mode,
        Hook::Tcx => true,
    };
    if is_ours && is_so {
        sys::replace_program(link.as_fd(), program)
            .with_context(|| format!("cannot replace the program on {interface}"))?;
        return Ok(true);
    }
    fs::remove_file(pin).with_context(|| format!("cannot remove {}", pin.display()))?;
    Ok(false)
}

/// Gives a link its program, if it has another one. Says whether it had.
fn give_back(link: BorrowedFd<'_>, own: BorrowedFd<'_>) -> Result<bool> {
    let (id, _) = sys::program_ids(own).context("cannot ask for the program")?;
    let Ok(found) = sys::link_program(link) else { return Ok(false) };
    let Some(other) = sys::program_by_id(found).ok().filter(|_| found != id) else { return Ok(false) };
    sys::exchange_program(link, other.as_fd(), own).context("cannot replace the program")
}

/// What is pinned already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    /// Nothing.
    Nothing,
    /// Maps that can be used as they are.
    Ours,
    /// Maps of this version that have other sizes.
    OtherSizes,
}

/// Looks for maps that this version can use. None at all is fine; others are refused, not guessed at.
fn check(maps: &Path, limits: &Limits) -> Result<Found> {
    let present: Vec<_> = Maps::NAMES.into_iter().filter(|name| maps.join(name).exists()).collect();
    if present.is_empty() {
        return Ok(Found::Nothing);
    }
    let advice = "run `privatelink detach` with this --pin-dir to take them away with their flows, or choose another --pin-dir";
    if let Some(missing) = Maps::NAMES.into_iter().find(|name| !present.contains(name)) {
        bail!("the maps pinned in {} are not all there ({missing} is missing): {advice}", maps.display());
    }
    let opened =
        Maps::open(maps).with_context(|| format!("the pinned maps are of another version: {advice}"))?;
    let layout = opened.layout.get(&0)?.unwrap_or(0);
    ensure!(
        layout == LAYOUT,
        "the maps pinned in {} have layout {layout}, this version uses {LAYOUT}: {advice}",
        maps.display()
    );
    for (name, _, wanted) in sizes(limits) {
        let fd = sys::open_pin(&maps.join(name))?;
        if sys::map_info(fd.as_fd())?.max_entries != wanted {
            return Ok(Found::OtherSizes);
        }
    }
    Ok(Found::Ours)
}

/// Makes what the programs share, their maps: the pinned ones where they are, else new ones, pinned.
fn load(maps: &Path, limits: &Limits, drops: Drops) -> Result<Programs> {
    let level = drops as u8;
    let mut loader = EbpfLoader::new();
    loader.override_global("AYA_LOG_LEVEL", &level, true);
    for (name, _, size) in sizes(limits) {
        loader.map_max_entries(name, size);
    }
    for name in Maps::NAMES {
        loader.map_pin_path(name, maps.join(name));
    }
    let mut object = loader.load(OBJECT).context("cannot create the maps")?;
    let account = load_classifier(&mut object, "account")?;
    Ok(Programs { object, loaded: BTreeMap::new(), account })
}

const NO_PROGRAM: &str = "the object has no such program";

fn refused(name: &str) -> String {
    format!("the kernel refuses the program {name}")
}

/// Loads a sched_cls program.
fn load_classifier(object: &mut Ebpf, name: &str) -> Result<OwnedFd> {
    let found: &mut SchedClassifier = object.program_mut(name).context(NO_PROGRAM)?.try_into()?;
    found.load().with_context(|| refused(name))?;
    Ok(found.fd()?.as_fd().try_clone_to_owned()?)
}

/// Loads an XDP program.
fn load_xdp(object: &mut Ebpf, name: &str) -> Result<OwnedFd> {
    let found: &mut Xdp = object.program_mut(name).context(NO_PROGRAM)?.try_into()?;
    found.load().with_context(|| refused(name))?;
    Ok(found.fd()?.as_fd().try_clone_to_owned()?)
}

/// Loads a program of a hook's.
fn load_program(object: &mut Ebpf, hook: Hook, name: &str) -> Result<OwnedFd> {
    match hook {
        Hook::Xdp(_) => load_xdp(object, name),
        Hook::Tcx => load_classifier(object, name),
    }
}

impl Programs {
    fn load(&mut self, program: Program) -> Result<()> {
        let loaded = load_program(&mut self.object, program.hook(), program.name())?;
        self.loaded.insert(program, loaded);
        Ok(())
    }
}

/// The programs of a capture that are to stand in the place of others, and the object with the maps that are their own.
pub type Watching = (Vec<(Program, OwnedFd)>, Ebpf);

/// Loads what hands over what `watch` asks for in the place of these programs, over the maps that are pinned below `dir`.
pub fn load_watching(dir: &Path, watch: &Watch, programs: impl Iterator<Item = Program>) -> Result<Watching> {
    let (level, maps) = (Drops::Counted as u8, dir.join("maps"));
    let mut loader = EbpfLoader::new();
    loader.override_global("AYA_LOG_LEVEL", &level, true).override_global("WATCH", watch.as_bytes(), true);
    for name in Maps::NAMES {
        loader.map_pin_path(name, maps.join(name));
    }
    let mut object = loader.load(CAPTURED).context("cannot create the capture's maps")?;
    let mut load = |program: Program| load_program(&mut object, program.hook(), program.captured());
    let loaded = programs.map(|program| Ok((program, load(program)?))).collect::<Result<_>>()?;
    Ok((loaded, object))
}

/// The links that are pinned below `dir` and can have a program.
pub fn open_links(dir: &Path, program: Program) -> Result<Vec<OwnedFd>> {
    let entries = fs::read_dir(dir.join("links")).context("cannot list the links")?;
    let by_tcx = program.hook() == Hook::Tcx;
    let is_of_hook = |path: &PathBuf| path.to_string_lossy().ends_with(TCX_LINK) == by_tcx;
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path())).filter(is_of_hook);
    // One that is gone by now needs nothing.
    Ok(paths.filter_map(|path| sys::open_pin(&path).ok()).collect())
}

/// The programs that are pinned below `dir`: those that an interface has needed.
pub fn open_programs(dir: &Path) -> Result<BTreeMap<Program, OwnedFd>> {
    let mut programs = BTreeMap::new();
    for program in Program::ALL {
        let pin = dir.join("programs").join(program.name());
        match sys::open_pin(&pin) {
            Ok(opened) => _ = programs.insert(program, opened),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => {
                return Err(error).with_context(|| format!("cannot open the program at {}", pin.display()));
            }
        }
    }
    Ok(programs)
}

/// Ends a change of sizes that was interrupted: forwards where the old maps had been put aside, back where they had not.
fn settle(dir: &Path) -> Result<()> {
    let (pinned, beside) = (dir.join("maps"), dir.join(BESIDE));
    if beside.exists() && !pinned.exists() {
        fs::rename(&beside, &pinned).context("cannot put the new maps in place")?;
    }
    remove_pins(&beside)?;
    remove_pins(&dir.join(FORMER)).map(drop)
}

/// Removes a directory of pins, if it is there. Returns how many there were.
fn remove_pins(dir: &Path) -> Result<usize> {
    let Ok(entries) = fs::read_dir(dir) else { return Ok(0) };
    let mut removed = 0;
    for entry in entries {
        let path = entry?.path();
        fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        removed += 1;
    }
    fs::remove_dir(dir).with_context(|| format!("cannot remove {}", dir.display()))?;
    Ok(removed)
}

/// Removes every pin below `dir`: links first, so that traffic stops before the maps go.
pub fn remove(dir: &Path) -> Result<usize> {
    let mut removed = 0;
    for sub in ["links", "programs", "maps", BESIDE, FORMER] {
        removed += remove_pins(&dir.join(sub))?;
    }
    if dir.exists() && fs::remove_dir(dir).is_err() {
        // The root of a bpffs of our own stays until it is unmounted.
        let _ = rustix::mount::unmount(dir, rustix::mount::UnmountFlags::empty());
    }
    Ok(removed)
}
