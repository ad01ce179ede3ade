//! Links and network namespaces: the VPCs' own stacks, and what XDP needs of an interface's other end.

use crate::features;
use crate::plan::hash;
use crate::sys::{self, Feature, XdpMode};
use anyhow::{Context, Result, ensure};
use privatelink_common::limits::STACK_PORTS;
use privatelink_common::path::stack::STACK_MAC;
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkXdp, XdpAttached};
use rtnetlink::{Handle, LinkUnspec, LinkVeth, RouteMessageBuilder, new_connection};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

/// Where named network namespaces are, by iproute2's convention.
const NAMESPACES: &str = "/run/netns";
/// The stack's end of its link.
const INNER: &str = "pls0";

/// The stacks' router: whatever the address, the path answers for it. One router, and not a neighbour for each destination, since all
/// network namespaces share one table of neighbours, which somebody who forges addresses could fill.
const ROUTER: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 1);
const ROUTER6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// The kernel's index of an interface in the calling thread's network namespace.
pub fn index_of(interface: &str) -> Option<u32> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None).ok()?;
    rustix::net::netdevice::name_to_index(socket, interface).ok()
}

/// The name of an interface in the calling thread's network namespace.
pub fn name_of(ifindex: u32) -> Option<String> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None).ok()?;
    rustix::net::netdevice::index_to_name(socket, ifindex).ok()
}

/// Runs `work` on a thread of its own, inside a network namespace, and waits for it.
pub fn inside<T: Send>(namespace: &Path, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let file = File::open(namespace).with_context(|| format!("cannot open {}", namespace.display()))?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
                .with_context(|| format!("cannot enter {}", namespace.display()))?;
            work()
        });
        thread.join().map_err(|_| anyhow::anyhow!("a thread inside {} panicked", namespace.display()))?
    })
}

/// Runs netlink requests in the calling thread's network namespace.
fn netlink<T>(work: impl AsyncFnOnce(Handle) -> Result<T>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (connection, handle, _) = new_connection().context("cannot open a netlink socket")?;
        let connection = tokio::spawn(connection);
        let result = work(handle).await;
        connection.abort();
        result
    })
}

/// Makes the directory of named namespaces a shared mount, as iproute2 does before its first namespace: were it done later, what is
/// mounted there by then would be mounted twice, and could not be removed.
fn share_namespaces() -> Result<()> {
    use rustix::mount::{MountPropagationFlags, mount_bind_recursive, mount_change};
    fs::create_dir_all(NAMESPACES)?;
    let shared = MountPropagationFlags::SHARED | MountPropagationFlags::REC;
    if mount_change(NAMESPACES, shared).is_err() {
        mount_bind_recursive(NAMESPACES, NAMESPACES)?;
        mount_change(NAMESPACES, shared)?;
    }
    Ok(())
}

/// A VPC's own stack: a network namespace whose only link leads into the dataplane.
#[derive(Clone, Debug)]
pub struct Stack {
    /// Its namespace.
    pub namespace: PathBuf,
    /// This host's end of its link.
    pub link: String,
}

impl Stack {
    /// The stack of a VPC, for the agent that has `pin_dir`.
    pub fn of(pin_dir: &Path, vpc: &str) -> Self {
        let id = hash(&[b"stack", pin_dir.as_os_str().as_encoded_bytes(), vpc.as_bytes()]) >> 32;
        Self {
            namespace: Path::new(NAMESPACES).join(format!("privatelink-{id:08x}")),
            link: format!("pls{id:08x}"),
        }
    }

    /// Makes it, as far as it is not there, with `addresses` as its own.
    pub fn ensure(&self, addresses: &[IpAddr]) -> Result<()> {
        if !self.namespace.exists() || inside(&self.namespace, || Ok(())).is_err() {
            self.make_namespace()?;
        }
        if index_of(&self.link).is_none() {
            self.make_link()?;
        }
        let addresses = addresses.to_vec();
        inside(&self.namespace, move || configure(&addresses))
    }

    fn make_namespace(&self) -> Result<()> {
        share_namespaces().with_context(|| format!("cannot prepare {NAMESPACES}"))?;
        File::create(&self.namespace).with_context(|| format!("cannot make {}", self.namespace.display()))?;
        let made = std::thread::scope(|scope| {
            let thread = scope.spawn(|| -> Result<()> {
                sys::new_network_namespace().context("cannot make a network namespace")?;
                rustix::mount::mount_bind("/proc/thread-self/ns/net", &self.namespace)
                    .with_context(|| format!("cannot mount {}", self.namespace.display()))
            });
            thread.join().map_err(|_| anyhow::anyhow!("the thread that makes a namespace panicked"))?
        });
        if made.is_err() {
            let _ = fs::remove_file(&self.namespace);
        }
        made
    }

    /// Half a link would be taken for a whole one by the next agent, so none is left.
    fn make_link(&self) -> Result<()> {
        let made = self.join();
        if made.is_err() {
            let _ = self.remove_link();
            let strange = inside(&self.namespace, || Ok(index_of(INNER).is_some()))?;
            ensure!(
                !strange,
                "{} has a link to elsewhere: these pins belong to another network namespace, so start the agent there, or choose \
                 another --pin-dir",
                self.namespace.display()
            );
        }
        made
    }

    fn join(&self) -> Result<()> {
        let namespace = File::open(&self.namespace)?;
        let inner = format!("{}i", self.link);
        netlink(async |handle| {
            handle
                .link()
                .add(LinkVeth::new(&self.link, &inner).build())
                .execute()
                .await
                .context("cannot make a veth")?;
            let index = index_of(&inner).context("the veth's other end is not there")?;
            let message = LinkUnspec::new_with_index(index)
                .setns_by_fd(namespace.as_raw_fd())
                .name(INNER)
                .address(STACK_MAC.to_vec())
                .build();
            handle.link().set(message).execute().await.context("cannot move the veth's other end")?;
            let message = LinkUnspec::new_with_name(&self.link).up().build();
            handle.link().set(message).execute().await.context("cannot set the veth up")
        })?;
        quiet(&self.link);
        Ok(())
    }

    fn remove_link(&self) -> Result<()> {
        let Some(index) = index_of(&self.link) else { return Ok(()) };
        netlink(async |handle| Ok(handle.link().del(index).execute().await?)).context("cannot remove a veth")
    }

    /// Takes it away.
    pub fn remove(&self) -> Result<()> {
        self.remove_link()?;
        if self.namespace.exists() {
            let _ = rustix::mount::unmount(&self.namespace, rustix::mount::UnmountFlags::DETACH);
            fs::remove_file(&self.namespace)
                .with_context(|| format!("cannot remove {}", self.namespace.display()))?;
        }
        Ok(())
    }
}

/// The kernel's IPv6 would send router solicitations into the dataplane, which has no use for them.
fn quiet(interface: &str) {
    let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6"), "1");
}

/// Lets the stack's link have IPv6 addresses, without any of what a host does with a link by itself: no addresses of its own making, no
/// questions whether others have its addresses or whether there are routers.
fn allow_ipv6() -> Result<()> {
    let settings = [
        ("addr_gen_mode", "1"),
        ("accept_dad", "0"),
        ("accept_ra", "0"),
        ("router_solicitations", "0"),
        ("disable_ipv6", "0"),
    ];
    for (name, value) in settings {
        fs::write(format!("/proc/sys/net/ipv6/conf/{INNER}/{name}"), value)
            .with_context(|| format!("cannot set net.ipv6.conf.{INNER}.{name} in the stack"))?;
    }
    Ok(())
}

/// Gives the stack that the calling thread is in its addresses, its route and the ports that the path steers to it.
fn configure(addresses: &[IpAddr]) -> Result<()> {
    let has_ipv6 = addresses.iter().any(IpAddr::is_ipv6);
    if has_ipv6 {
        allow_ipv6()?
    } else {
        quiet(INNER)
    }
    let range = format!("{} {}", STACK_PORTS.start, STACK_PORTS.end - 1);
    fs::write("/proc/sys/net/ipv4/ip_local_port_range", range).context("cannot set the stack's ports")?;
    // A port whose connection to a name server has ended would else not be used towards it for a minute. A kernel without it does without.
    let _ = fs::write("/proc/sys/net/ipv4/tcp_tw_reuse", "1");
    let index = index_of(INNER).context("the stack has no link")?;
    let addresses = addresses.to_vec();
    netlink(async |handle| {
        for name in ["lo", INNER] {
            let message = LinkUnspec::new_with_name(name).up().build();
            handle.link().set(message).execute().await.context("cannot set the stack's link up")?;
        }
        forget(&handle, index, &addresses).await.context("cannot take old addresses from the stack")?;
        for address in addresses {
            let length = if address.is_ipv6() { 128 } else { 32 };
            let request = handle.address().add(index, address, length).replace();
            request.execute().await.with_context(|| format!("cannot give the stack {address}"))?;
        }
        let route =
            RouteMessageBuilder::<Ipv4Addr>::new().output_interface(index).gateway(ROUTER).onlink().build();
        handle.route().add(route).replace().execute().await.context("cannot give the stack its route")?;
        if has_ipv6 {
            let route = RouteMessageBuilder::<Ipv6Addr>::new()
                .output_interface(index)
                .gateway(ROUTER6)
                .onlink()
                .build();
            let added = handle.route().add(route).replace().execute().await;
            added.context("cannot give the stack its IPv6 route")?;
        }
        Ok(())
    })?;
    sys::set_feature(INNER, Feature::TxChecksum, false)
        .context("cannot switch the stack's checksum offload off")?;
    // A veth that was given GRO while it was down has no NAPI after it came up, and drops what is redirected to it: so off, then on.
    sys::set_feature(INNER, Feature::Gro, false).context("cannot switch the stack's GRO off")?;
    sys::set_feature(INNER, Feature::Gro, true).context("cannot switch the stack's GRO on")
}

/// Takes away the addresses that are the stack's no more: they may be somebody else's in the VPC, whom the stack is to reach.
async fn forget(handle: &Handle, index: u32, addresses: &[IpAddr]) -> Result<()> {
    use futures_util::TryStreamExt;
    let there: Vec<_> = handle.address().get().set_link_index_filter(index).execute().try_collect().await?;
    for message in there {
        let is = |it: &AddressAttribute| matches!(it, AddressAttribute::Address(address) if addresses.contains(address));
        if !message.attributes.iter().any(is) {
            handle.address().del(message).execute().await?;
        }
    }
    Ok(())
}

/// What kind of link an interface is, as far as it matters for its other end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// One end of a pair; holds the other end's index, and the identifier of its namespace (none: this one).
    Veth(u32, Option<i32>),
    /// A virtual machine's, or a program's.
    Tun,
    /// Any other.
    #[default]
    Other,
}

/// What was found out about an interface's other end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// What kind of link leads there.
    pub kind: Kind,
    /// Of a veth: the namespace's path, and the interface's name in it, where the namespace was found.
    pub place: Option<(PathBuf, String)>,
    /// What native XDP lacks there; empty: nothing, or nothing that can be seen.
    pub lacks: Vec<&'static str>,
    /// Its MTU in bytes, where the namespace was found: what is larger, it drops.
    pub mtu: Option<u32>,
}

/// The NAPI of a veth's other end.
const GRO: &str = "gro on";
/// Whole checksums.
const NO_TX: &str = "tx off";
/// Tags in the frames, rather than beside them.
const NO_TAGS: &str = "tx-vlan-hw-insert off";
/// The same of service tags.
const NO_SERVICE_TAGS: &str = "tx-vlan-stag-hw-insert off";
/// The features that keep tags beside what a device sends, and what a veth's other end lacks for them.
const TAGS_BESIDE: [(&str, &str); 2] =
    [("tx-vlan-hw-insert", NO_TAGS), ("tx-vlan-stag-hw-insert", NO_SERVICE_TAGS)];
/// The features that keep tags beside what a device receives.
const TAGS_TAKEN: [&str; 2] = ["rx-vlan-hw-parse", "rx-vlan-stag-hw-parse"];

impl Peer {
    /// What a program attached in this mode lacks: only a native one needs a NAPI.
    pub fn lacking(&self, mode: XdpMode) -> Vec<&'static str> {
        self.lacks.iter().copied().filter(|lack| mode == XdpMode::Native || *lack != GRO).collect()
    }

    /// Whether frames that native programs redirect there are lost.
    pub fn is_deaf(&self) -> bool {
        self.lacks.contains(&GRO)
    }

    /// Whether tags may be beside the frames that come from there.
    pub fn hides_tags(&self) -> bool {
        let hides = |lack: &&str| [NO_TAGS, NO_SERVICE_TAGS].contains(lack);
        matches!(self.kind, Kind::Veth(..)) && (self.place.is_none() || self.lacks.iter().any(hides))
    }

    /// What mends it.
    pub fn remedy(&self, mode: XdpMode) -> Option<String> {
        let lacks = self.lacking(mode);
        if lacks.is_empty() {
            return None;
        }
        let lacks = lacks.join(" ");
        let index = if let Kind::Veth(index, _) = self.kind { index } else { 0 };
        Some(match &self.place {
            Some((namespace, name)) => {
                format!("run `nsenter --net={} ethtool -K {name} {lacks}`", namespace.display())
            }
            None => format!(
                "in its other end's network namespace, run `ethtool -K NAME {lacks}` for the interface with index {index}"
            ),
        })
    }

    /// Sets what it lacks, where it can be reached: so that it takes what native programs redirect to it, and where it `sends` to an
    /// XDP program, also so that this can use what it gets.
    pub fn mend(&mut self, sends: bool) -> Result<()> {
        let wanted: Vec<_> = self.lacks.iter().copied().filter(|lack| sends || *lack == GRO).collect();
        let Some((namespace, name)) = self.place.clone().filter(|_| !wanted.is_empty()) else {
            return Ok(());
        };
        inside(&namespace, || {
            for lack in &wanted {
                let feature = TAGS_BESIDE.into_iter().find(|(_, it)| it == lack);
                let result = match (*lack, feature) {
                    (_, Some((feature, _))) => sys::switch_off(&name, feature),
                    (GRO, _) => sys::set_feature(&name, Feature::Gro, true),
                    _ => sys::set_feature(&name, Feature::TxChecksum, false),
                };
                result.with_context(|| format!("cannot set {lack} for {name}"))?;
            }
            Ok(())
        })?;
        self.lacks.retain(|lack| !wanted.contains(lack));
        Ok(())
    }
}

/// Looks at an interface's other end. A native program needs a NAPI there, which GRO or a program of its own brings; it can be seen
/// from here. Any XDP program needs whole checksums, which can be seen only there; and that of a trunk needs tags in the frames.
pub fn peer(interface: &str, ifindex: u32, is_trunk: bool, namespaces: &Namespaces) -> Result<Peer> {
    let kind = kind(interface)?;
    let Kind::Veth(index, namespace_id) = kind else { return Ok(Peer { kind, ..Peer::default() }) };
    let unseen = || {
        let deaf = features::of(ifindex).is_ok_and(|features| !features.takes(0));
        Peer { kind, lacks: if deaf { vec![GRO] } else { Vec::new() }, ..Peer::default() }
    };
    let Some(namespace) = namespaces.find(namespace_id) else { return Ok(unseen()) };
    let path = namespace.clone();
    inside(&namespace, move || {
        let Some(name) = name_of(index) else { return Ok(unseen()) };
        let mut lacks = Vec::new();
        if !sys::feature(&name, Feature::Gro)? && !has_xdp(&name)? {
            lacks.push(GRO);
        }
        if sys::feature(&name, Feature::TxChecksum)? {
            lacks.push(NO_TX);
        }
        if is_trunk {
            let beside = sys::active(&name, &TAGS_BESIDE.map(|(feature, _)| feature))?;
            lacks.extend(TAGS_BESIDE.into_iter().filter(|(it, _)| beside.contains(it)).map(|(_, lack)| lack));
        }
        let mtu = sys::mtu(&name).ok();
        Ok(Peer { kind, place: Some((path, name)), lacks, mtu })
    })
}

/// The features by which a device takes the tags off what it receives, as far as they are on or cannot be asked for. A veth, whose other
/// end decides, and a tap device have them without any effect.
pub fn taken_tags(interface: &str, kind: Kind) -> Vec<&'static str> {
    match kind {
        Kind::Other => sys::active(interface, &TAGS_TAKEN).unwrap_or_else(|_| TAGS_TAKEN.to_vec()),
        Kind::Veth(..) | Kind::Tun => Vec::new(),
    }
}

fn attributes(interface: &str) -> Result<Vec<LinkAttribute>> {
    netlink(async |handle| {
        use futures_util::TryStreamExt;
        let mut links = handle.link().get().match_name(interface.to_owned()).execute();
        Ok(links.try_next().await?.context("no such link")?.attributes)
    })
}

/// The largest packet that an interface carries.
pub fn mtu(interface: &str) -> Result<u32> {
    let mtu = attributes(interface)?.into_iter();
    let mtu = mtu.filter_map(|it| if let LinkAttribute::Mtu(mtu) = it { Some(mtu) } else { None }).next();
    mtu.context("the kernel does not say how much it carries")
}

fn kind(interface: &str) -> Result<Kind> {
    let (mut index, mut namespace, mut kind) = (None, None, None);
    for attribute in attributes(interface)? {
        match attribute {
            LinkAttribute::Link(it) => index = Some(it),
            LinkAttribute::LinkNetNsId(it) => namespace = Some(it),
            LinkAttribute::LinkInfo(parts) => {
                kind = parts
                    .into_iter()
                    .find_map(|it| if let LinkInfo::Kind(it) = it { Some(it) } else { None });
            }
            _ => {}
        }
    }
    Ok(match (kind, index) {
        (Some(InfoKind::Veth), Some(index)) => Kind::Veth(index, namespace),
        (Some(InfoKind::Tun), _) => Kind::Tun,
        _ => Kind::Other,
    })
}

fn attached(interface: &str) -> Result<XdpAttached> {
    let attributes = attributes(interface)?;
    let xdp =
        attributes.into_iter().find_map(|it| if let LinkAttribute::Xdp(xdp) = it { Some(xdp) } else { None });
    let how = xdp
        .into_iter()
        .flatten()
        .find_map(|it| if let LinkXdp::Attached(how) = it { Some(how) } else { None });
    Ok(how.unwrap_or(XdpAttached::None))
}

fn has_xdp(interface: &str) -> Result<bool> {
    Ok(attached(interface)? != XdpAttached::None)
}

/// How the program on an interface is attached.
pub fn xdp_mode(interface: &str) -> XdpMode {
    match attached(interface) {
        Ok(XdpAttached::SocketBuffer) => XdpMode::Generic,
        _ => XdpMode::Native,
    }
}

/// The network namespaces that have names, by the identifiers that this one has for them.
#[derive(Debug)]
pub struct Namespaces(BTreeMap<i32, PathBuf>);

impl Namespaces {
    /// Those that are there.
    pub fn read() -> Result<Self> {
        let entries = fs::read_dir(NAMESPACES).into_iter().flatten().flatten();
        let names: Vec<_> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        netlink(async |handle| {
            let mut found = BTreeMap::new();
            for name in names {
                let id = handle.link().get_netns_id(name.clone()).execute().await.ok().flatten();
                if let Some(id) = id {
                    found.insert(id, Path::new(NAMESPACES).join(name));
                }
            }
            Ok(Self(found))
        })
    }

    /// The path of the one with this identifier; none: this one.
    fn find(&self, id: Option<i32>) -> Option<PathBuf> {
        match id {
            None => Some("/proc/thread-self/ns/net".into()),
            Some(id) => self.0.get(&id).cloned(),
        }
    }
}
