//! The system calls that no library offers as safe functions, each behind one that is. All of this crate's `unsafe` is here.

use socket2::Socket;
use std::ffi::CString;
use std::io::{Error, Result};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use tokio::io::unix::AsyncFd;

/// Commands of bpf(2), from the kernel's `enum bpf_cmd`.
#[derive(Clone, Copy, Debug)]
#[repr(i64)]
pub enum Command {
    /// BPF_MAP_CREATE
    Create = 0,
    /// BPF_MAP_LOOKUP_ELEM
    Lookup = 1,
    /// BPF_MAP_UPDATE_ELEM
    Update = 2,
    /// BPF_MAP_DELETE_ELEM
    Delete = 3,
    /// BPF_MAP_GET_NEXT_KEY
    NextKey = 4,
    /// BPF_OBJ_PIN
    Pin = 6,
    /// BPF_OBJ_GET
    Get = 7,
    /// BPF_PROG_TEST_RUN
    TestRun = 10,
    /// BPF_PROG_GET_FD_BY_ID
    ProgramById = 13,
    /// BPF_MAP_GET_FD_BY_ID
    MapById = 14,
    /// BPF_OBJ_GET_INFO_BY_FD
    Info = 15,
    /// BPF_MAP_LOOKUP_AND_DELETE_ELEM
    LookupAndDelete = 21,
    /// BPF_MAP_LOOKUP_BATCH
    LookupBatch = 24,
    /// BPF_MAP_UPDATE_BATCH
    UpdateBatch = 26,
    /// BPF_LINK_CREATE
    LinkCreate = 28,
    /// BPF_LINK_UPDATE
    LinkUpdate = 29,
    /// BPF_LINK_DETACH
    LinkDetach = 34,
}

/// The attributes of bpf(2), as 64-bit words: every member used here is at a multiple of four bytes.
#[derive(Clone, Copy, Default)]
#[repr(C, align(8))]
struct Attributes([u32; 32]);

impl Attributes {
    fn set(mut self, index: usize, value: u32) -> Self {
        self.0[index] = value;
        self
    }

    fn set_long(mut self, index: usize, value: u64) -> Self {
        let [a, b, c, d, e, f, g, h] = value.to_ne_bytes();
        self.0[index] = u32::from_ne_bytes([a, b, c, d]);
        self.0[index + 1] = u32::from_ne_bytes([e, f, g, h]);
        self
    }

    fn pointer<T>(self, index: usize, pointer: *const T) -> Self {
        self.set_long(index, pointer as usize as u64)
    }
}

fn fd_word(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

fn bpf(command: Command, attributes: &mut Attributes) -> Result<i32> {
    // SAFETY: the attributes are initialised and as long as stated; every pointer in them was put there by a function below, from a
    // slice that it holds for the call, and whose length it checked against the map's.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command as i64, attributes, size_of::<Attributes>()) };
    if result < 0 { Err(Error::last_os_error()) } else { i32::try_from(result).map_err(Error::other) }
}

fn owned(result: i32) -> OwnedFd {
    // SAFETY: the kernel just returned it as a new descriptor.
    unsafe { OwnedFd::from_raw_fd(result) }
}

fn path(path: &Path) -> Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(Error::other)
}

/// Opens what is pinned at `at`.
pub fn open_pin(at: &Path) -> Result<OwnedFd> {
    let at = path(at)?;
    bpf(Command::Get, &mut Attributes::default().pointer(0, at.as_ptr())).map(owned)
}

/// Pins a BPF object at `at`.
pub fn pin(fd: BorrowedFd<'_>, at: &Path) -> Result<()> {
    let at = path(at)?;
    bpf(Command::Pin, &mut Attributes::default().pointer(0, at.as_ptr()).set(2, fd_word(fd))).map(drop)
}

/// Creates an array of 32-bit numbers that may stand inside a map of maps beside arrays of other sizes (`BPF_F_INNER_MAP`).
pub fn create_table(size: u32) -> Result<OwnedFd> {
    const ARRAY: u32 = 2;
    const INNER_MAP: u32 = 1 << 12;
    let attributes = Attributes::default().set(0, ARRAY).set(1, 4).set(2, 4).set(3, size).set(4, INNER_MAP);
    bpf(Command::Create, &mut { attributes }).map(owned)
}

/// Opens a map by its kernel-wide identifier.
pub fn map_by_id(id: u32) -> Result<OwnedFd> {
    bpf(Command::MapById, &mut Attributes::default().set(0, id)).map(owned)
}

/// What the kernel says of a map: `struct bpf_map_info`, as far as it is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct MapInfo {
    /// `enum bpf_map_type`.
    pub kind: u32,
    /// Kernel-wide identifier.
    pub id: u32,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value.
    pub value_size: u32,
    /// Capacity.
    pub max_entries: u32,
    /// Creation flags.
    pub flags: u32,
}

/// Asks what a map is.
pub fn map_info(map: BorrowedFd<'_>) -> Result<MapInfo> {
    let mut info = MapInfo::default();
    let length = u32::try_from(size_of::<MapInfo>()).map_err(Error::other)?;
    bpf(
        Command::Info,
        &mut Attributes::default().set(0, fd_word(map)).set(1, length).pointer(2, &raw mut info),
    )?;
    Ok(info)
}

/// One of the commands on one element; no key stands for the beginning of a walk, and no value for none. `value` must be as long as the map's values are for user space.
pub fn element(
    command: Command,
    map: BorrowedFd<'_>,
    key: &[u8],
    value: &mut [u8],
    flags: u64,
) -> Result<()> {
    let key = if key.is_empty() { std::ptr::null() } else { key.as_ptr() };
    let value = if value.is_empty() { std::ptr::null() } else { value.as_mut_ptr().cast_const() };
    let mut attributes =
        Attributes::default().set(0, fd_word(map)).pointer(2, key).pointer(4, value).set_long(6, flags);
    bpf(command, &mut attributes).map(drop)
}

/// Reads up to as many elements as the slices have room for, from where `cursor` points on; `None` is the beginning. Returns how
/// many were read, and whether that was the last of them.
pub fn lookup_batch(
    map: BorrowedFd<'_>,
    cursor: &mut Option<u64>,
    keys: &mut [u8],
    values: &mut [u8],
    room: u32,
) -> Result<(u32, bool)> {
    let from = *cursor;
    let mut to = 0u64;
    let start = from.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    let mut attributes = Attributes::default()
        .pointer(0, start)
        .pointer(2, &raw mut to)
        .pointer(4, keys.as_mut_ptr())
        .pointer(6, values.as_mut_ptr())
        .set(8, room)
        .set(9, fd_word(map));
    let result = bpf(Command::LookupBatch, &mut attributes);
    *cursor = Some(to);
    match result {
        Ok(_) => Ok((attributes.0[8], false)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok((attributes.0[8], true)),
        Err(error) => Err(error),
    }
}

/// Writes `count` elements at once. For maps of maps this is also what makes the kernel wait only once for running programs.
pub fn update_batch(map: BorrowedFd<'_>, keys: &[u8], values: &[u8], count: u32) -> Result<()> {
    let mut attributes = Attributes::default()
        .pointer(4, keys.as_ptr())
        .pointer(6, values.as_ptr())
        .set(8, count)
        .set(9, fd_word(map));
    bpf(Command::UpdateBatch, &mut attributes).map(drop)
}

/// How an XDP program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum XdpMode {
    /// By the driver (XDP_FLAGS_DRV_MODE).
    Native = 1 << 2,
    /// Behind the driver, for those without XDP of their own (XDP_FLAGS_SKB_MODE).
    Generic = 1 << 1,
}

/// `BPF_XDP` of `enum bpf_attach_type`.
const ATTACH_XDP: u32 = 37;

/// Attaches a program to an interface of the caller's network namespace; dropping the link, unless it is pinned, detaches it.
pub fn attach_xdp(program: BorrowedFd<'_>, ifindex: u32, mode: XdpMode) -> Result<OwnedFd> {
    let attributes = Attributes::default().set(0, fd_word(program)).set(1, ifindex).set(2, ATTACH_XDP);
    bpf(Command::LinkCreate, &mut attributes.set(3, mode as u32)).map(owned)
}

/// `BPF_TCX_INGRESS` of `enum bpf_attach_type`.
const ATTACH_TCX: u32 = 46;

/// Attaches a sched_cls program behind those that are attached to what comes by an interface, likewise.
pub fn attach_tcx(program: BorrowedFd<'_>, ifindex: u32) -> Result<OwnedFd> {
    let attributes = Attributes::default().set(0, fd_word(program)).set(1, ifindex).set(2, ATTACH_TCX);
    bpf(Command::LinkCreate, &mut { attributes }).map(owned)
}

/// Whether the kernel has TCX (Linux 6.6 on): only such a one looks for the interface, of which there is none with this index.
pub fn has_tcx(program: BorrowedFd<'_>) -> bool {
    let nowhere = i32::MAX.cast_unsigned();
    attach_tcx(program, nowhere).is_err_and(|error| error.raw_os_error() == Some(libc::ENODEV))
}

/// Puts another program in the place of a link's, without a packet in between that meets neither.
pub fn replace_program(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> Result<()> {
    bpf(Command::LinkUpdate, &mut Attributes::default().set(0, fd_word(link)).set(1, fd_word(program)))
        .map(drop)
}

/// The same, if the link still has the program `old` (`BPF_F_REPLACE`) and its interface is still there; says whether that was so.
pub fn exchange_program(link: BorrowedFd<'_>, old: BorrowedFd<'_>, new: BorrowedFd<'_>) -> Result<bool> {
    const REPLACE: u32 = 4;
    let attributes =
        Attributes::default().set(0, fd_word(link)).set(1, fd_word(new)).set(2, REPLACE).set(3, fd_word(old));
    match bpf(Command::LinkUpdate, &mut { attributes }) {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EPERM | libc::ENOLINK)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Takes a link's program off its interface at once: a pin that is removed may let go of it only later.
pub fn detach_link(link: BorrowedFd<'_>) -> Result<()> {
    bpf(Command::LinkDetach, &mut Attributes::default().set(0, fd_word(link))).map(drop)
}

/// `struct bpf_link_info` of an XDP or TCX link, as words.
fn link_info(link: BorrowedFd<'_>) -> Result<[u32; 16]> {
    let mut info = [0u32; 16];
    let length = u32::try_from(size_of_val(&info)).map_err(Error::other)?;
    bpf(
        Command::Info,
        &mut Attributes::default().set(0, fd_word(link)).set(1, length).pointer(2, info.as_mut_ptr()),
    )?;
    Ok(info)
}

/// The interface that an XDP or TCX link is attached to; 0 where the interface is gone.
pub fn link_ifindex(link: BorrowedFd<'_>) -> Result<u32> {
    link_info(link).map(|info| info[4])
}

/// The kernel-wide identifier of the program that a link has.
pub fn link_program(link: BorrowedFd<'_>) -> Result<u32> {
    link_info(link).map(|info| info[2])
}

/// A program's kernel-wide identifier, and those of its maps. `struct bpf_prog_info`.
pub fn program_ids(program: BorrowedFd<'_>) -> Result<(u32, Vec<u32>)> {
    let (mut info, mut maps) = (Attributes::default(), [0u32; 64]);
    info = info.set(13, u32::try_from(maps.len()).map_err(Error::other)?).pointer(14, maps.as_mut_ptr());
    let length = u32::try_from(size_of_val(&info)).map_err(Error::other)?;
    bpf(
        Command::Info,
        &mut Attributes::default().set(0, fd_word(program)).set(1, length).pointer(2, &raw mut info),
    )?;
    let count = (info.0[13] as usize).min(maps.len());
    Ok((info.0[1], maps[..count].to_vec()))
}

/// Runs a sched_cls program once, on a frame of these bytes, of which there are as many as an Ethernet header has at least.
pub fn run_program(program: BorrowedFd<'_>, frame: &[u8]) -> Result<()> {
    let length = u32::try_from(frame.len()).map_err(Error::other)?;
    let attributes = Attributes::default().set(0, fd_word(program)).set(2, length).pointer(4, frame.as_ptr());
    bpf(Command::TestRun, &mut { attributes }).map(drop)
}

/// Opens a program by its kernel-wide identifier.
pub fn program_by_id(id: u32) -> Result<OwnedFd> {
    bpf(Command::ProgramById, &mut Attributes::default().set(0, id)).map(owned)
}

/// Device features that one ioctl reads and one sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    /// Generic receive offload, which gives a veth the NAPI that XDP redirects into.
    Gro,
    /// Transmit checksum offload, which leaves packets with checksums that XDP cannot complete.
    TxChecksum,
}

#[repr(C)]
struct EthtoolValue {
    command: u32,
    data: u32,
}

#[repr(C)]
struct EthtoolRequest {
    name: [u8; libc::IFNAMSIZ],
    value: *mut u32,
    unused: [u8; 16],
}

fn ethtool(interface: &str, command: u32, data: u32) -> Result<u32> {
    let mut value = EthtoolValue { command, data };
    ethtool_ioctl(interface, (&raw mut value).cast())?;
    Ok(value.data)
}

/// What every request begins with is its command; `value` is as long as that command says.
fn ethtool_ioctl(interface: &str, value: *mut u32) -> Result<()> {
    let mut request = EthtoolRequest { name: [0; libc::IFNAMSIZ], value, unused: [0; 16] };
    if interface.len() >= libc::IFNAMSIZ {
        return Err(Error::from_raw_os_error(libc::ENAMETOOLONG));
    }
    request.name[..interface.len()].copy_from_slice(interface.as_bytes());
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None)?;
    // SAFETY: the request is laid out as `struct ifreq`, the name ends with a zero, and callers hold what `value` points to.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), 0x8946, &raw mut request) };
    if result < 0 { Err(Error::last_os_error()) } else { Ok(()) }
}

/// Bytes of a feature's name.
const FEATURE_NAME: usize = 32;

/// The names of all features that this kernel has, in their order (`ETHTOOL_GSSET_INFO`, `ETHTOOL_GSTRINGS`).
fn feature_names(interface: &str) -> Result<Vec<String>> {
    /// `ETH_SS_FEATURES`
    const FEATURES: u32 = 4;
    let mut count = [0x37, 0, 1 << FEATURES, 0, 0];
    ethtool_ioctl(interface, count.as_mut_ptr())?;
    let room = count[4] as usize * FEATURE_NAME / 4;
    let mut strings = vec![0; 3 + room];
    (strings[0], strings[1], strings[2]) = (0x1b, FEATURES, count[4]);
    ethtool_ioctl(interface, strings.as_mut_ptr())?;
    let bytes: Vec<u8> = strings[3..].iter().flat_map(|word| word.to_ne_bytes()).collect();
    let text = |name: &[u8]| String::from_utf8_lossy(name).trim_end_matches('\0').to_owned();
    Ok(bytes.chunks(FEATURE_NAME).map(text).collect())
}

/// Which of these features, by the kernel's names, are on for an interface of the calling thread's network namespace
/// (`ETHTOOL_GFEATURES`). One that this kernel does not know is off.
pub fn active(interface: &str, features: &[&'static str]) -> Result<Vec<&'static str>> {
    let names = feature_names(interface)?;
    let blocks = names.len().div_ceil(32);
    // For each block of 32 features: available, requested, active, never changed.
    let mut state = vec![0; 2 + 4 * blocks];
    (state[0], state[1]) = (0x3a, u32::try_from(blocks).map_err(Error::other)?);
    ethtool_ioctl(interface, state.as_mut_ptr())?;
    let is_on = |name: &&&str| {
        let bit = names.iter().position(|it| it == **name);
        bit.is_some_and(|bit| state[2 + 4 * (bit / 32) + 2] >> (bit % 32) & 1 != 0)
    };
    Ok(features.iter().filter(is_on).copied().collect())
}

/// Switches a feature off, by the kernel's name (`ETHTOOL_SFEATURES`).
pub fn switch_off(interface: &str, feature: &str) -> Result<()> {
    let names = feature_names(interface)?;
    let bit = names.iter().position(|it| it == feature).ok_or(std::io::ErrorKind::NotFound)?;
    let blocks = names.len().div_ceil(32);
    // For each block of 32 features: which are meant, and which of these are to be on.
    let mut wanted = vec![0; 2 + 2 * blocks];
    (wanted[0], wanted[1]) = (0x3b, u32::try_from(blocks).map_err(Error::other)?);
    wanted[2 + 2 * (bit / 32)] = 1 << (bit % 32);
    ethtool_ioctl(interface, wanted.as_mut_ptr())
}

/// Whether a feature is on, for an interface of the calling thread's network namespace (`ETHTOOL_GGRO`, `ETHTOOL_GTXCSUM`).
pub fn feature(interface: &str, feature: Feature) -> Result<bool> {
    let command = match feature {
        Feature::Gro => 0x2b,
        Feature::TxChecksum => 0x16,
    };
    ethtool(interface, command, 0).map(|value| value != 0)
}

/// Switches a feature (`ETHTOOL_SGRO`, `ETHTOOL_STXCSUM`).
pub fn set_feature(interface: &str, feature: Feature, on: bool) -> Result<()> {
    let command = match feature {
        Feature::Gro => 0x2c,
        Feature::TxChecksum => 0x17,
    };
    ethtool(interface, command, on.into()).map(drop)
}

/// The MTU of an interface of the calling thread's network namespace, in bytes (`SIOCGIFMTU`, netdevice(7)).
pub fn mtu(interface: &str) -> Result<u32> {
    #[repr(C)]
    struct Request {
        name: [u8; libc::IFNAMSIZ],
        mtu: libc::c_int,
        unused: [u8; 20],
    }
    let mut request = Request { name: [0; libc::IFNAMSIZ], mtu: 0, unused: [0; 20] };
    if interface.len() >= libc::IFNAMSIZ {
        return Err(Error::from_raw_os_error(libc::ENAMETOOLONG));
    }
    request.name[..interface.len()].copy_from_slice(interface.as_bytes());
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None)?;
    // SAFETY: the request is laid out and as long as `struct ifreq`, the name ends with a zero.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFMTU, &raw mut request) };
    if result < 0 { Err(Error::last_os_error()) } else { u32::try_from(request.mtu).map_err(Error::other) }
}

/// `AF_PACKET`, as it stands in an address.
const PACKET: u16 = 17;
/// The length of such an address.
const ADDRESS: libc::socklen_t = 20;
const _: () = assert!(size_of::<libc::sockaddr_ll>() == ADDRESS as usize && libc::AF_PACKET == PACKET as i32);
/// `ETH_P_ALL`, as sockets want it.
const EVERYTHING: u16 = 0x0003_u16.to_be();

/// Binds a packet socket (packet(7)) to an interface, whose every frame it then hears before a bridge or the like takes it.
pub fn bind_to_frames(socket: BorrowedFd<'_>, ifindex: u32) -> Result<()> {
    let address = libc::sockaddr_ll {
        sll_family: PACKET,
        sll_protocol: EVERYTHING,
        sll_ifindex: ifindex.cast_signed(),
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    // SAFETY: the address is there, and as long as stated.
    let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), ADDRESS) };
    if result < 0 { Err(Error::last_os_error()) } else { Ok(()) }
}

/// Sends a frame by an interface from a packet socket that is bound to none, without waiting.
pub fn send_frame(socket: BorrowedFd<'_>, ifindex: u32, frame: &[u8]) -> Result<()> {
    let address = libc::sockaddr_ll {
        sll_family: PACKET,
        sll_protocol: 0,
        sll_ifindex: ifindex.cast_signed(),
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    // SAFETY: the frame and the address are there, each as long as stated.
    let result = unsafe {
        let (bytes, to) = (frame.as_ptr().cast(), (&raw const address).cast());
        libc::sendto(socket.as_raw_fd(), bytes, frame.len(), libc::MSG_DONTWAIT, to, ADDRESS)
    };
    if result < 0 { Err(Error::last_os_error()) } else { Ok(()) }
}

/// Asks a packet socket to tell the tags that frames came with, which the kernel keeps beside them (`PACKET_AUXDATA`, packet(7)).
pub fn tell_tags(socket: BorrowedFd<'_>) -> Result<()> {
    const LENGTH: libc::socklen_t = 4;
    let on: libc::c_int = 1;
    // SAFETY: the option's value is an integer, which is there and as long as stated.
    let result = unsafe {
        let (level, option) = (libc::SOL_PACKET, libc::PACKET_AUXDATA);
        libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const on).cast(), LENGTH)
    };
    if result < 0 { Err(Error::last_os_error()) } else { Ok(()) }
}

/// Receives from such a socket, without waiting: how long the frame is, and the tag that it came with, as it would stand in a frame.
pub fn receive_tagged(socket: BorrowedFd<'_>, frame: &mut [u8]) -> Result<(usize, Option<[u8; 4]>)> {
    /// What a tag that names no EtherType has.
    const VLAN: u16 = 0x8100;
    const TOLD: libc::c_uint = 20;
    const _: () = assert!(size_of::<libc::tpacket_auxdata>() == TOLD as usize);
    let mut control = [0u64; 16];
    let mut part = libc::iovec { iov_base: frame.as_mut_ptr().cast(), iov_len: frame.len() };
    // SAFETY: all zeros are an empty header.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    (header.msg_iov, header.msg_iovlen) = (&raw mut part, 1);
    (header.msg_control, header.msg_controllen) = (control.as_mut_ptr().cast(), size_of_val(&control));
    // SAFETY: the header points to `frame` and to `control`, each as long as stated.
    let received = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_DONTWAIT) };
    let Ok(received) = usize::try_from(received) else { return Err(Error::last_os_error()) };
    // SAFETY: the kernel has filled in the header and what it points to, which are walked by its own macros; what it says of a packet is
    // copied, since nothing says that it is aligned.
    let told = unsafe {
        let mut told = None;
        let mut message = libc::CMSG_FIRSTHDR(&raw const header);
        while let Some(found) = message.as_ref() {
            let length = libc::CMSG_LEN(TOLD) as usize;
            let is_it = (found.cmsg_level, found.cmsg_type) == (libc::SOL_PACKET, libc::PACKET_AUXDATA);
            if is_it && found.cmsg_len >= length {
                told = Some(libc::CMSG_DATA(message).cast::<libc::tpacket_auxdata>().read_unaligned());
            }
            message = libc::CMSG_NXTHDR(&raw const header, message);
        }
        told
    };
    let told = told.filter(|it| it.tp_status & libc::TP_STATUS_VLAN_VALID != 0);
    let tag = told.map(|it| {
        let named = it.tp_status & libc::TP_STATUS_VLAN_TPID_VALID != 0;
        let [a, b] = if named { it.tp_vlan_tpid } else { VLAN }.to_be_bytes();
        let [c, d] = it.tp_vlan_tci.to_be_bytes();
        [a, b, c, d]
    });
    Ok((received, tag))
}

/// A socket that the runtime watches.
pub fn watched(socket: Arc<Socket>) -> Result<AsyncFd<Arc<Socket>>> {
    // SAFETY: the socket is shared, so that it stays open, and the same, for as long as it is watched.
    unsafe { AsyncFd::register(socket) }.map_err(Error::from)
}

/// Lets a socket that is bound to an address share its port with sockets that are connected elsewhere: the port is chosen when it
/// connects (`IP_BIND_ADDRESS_NO_PORT`, ip(7)).
pub fn choose_port_late(socket: BorrowedFd<'_>) -> Result<()> {
    const LENGTH: libc::socklen_t = 4;
    const _: () = assert!(size_of::<libc::c_int>() == LENGTH as usize);
    let on: libc::c_int = 1;
    // SAFETY: the option's value is an integer, which is there and as long as stated.
    let result = unsafe {
        let (level, option) = (libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT);
        libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const on).cast(), LENGTH)
    };
    if result < 0 { Err(Error::last_os_error()) } else { Ok(()) }
}

/// Returns when no program runs that ran before: membarrier(2) waits for the end of every read-side section of the kernel's, and a program
/// is one. Where the kernel cannot (CPUs without ticks), after far longer than a program may run.
pub fn wait_for_programs() {
    const GLOBAL: i64 = 1;
    // SAFETY: the call takes two numbers, and touches no memory of ours.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, GLOBAL, 0) };
    if result != 0 {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

/// Gives memory back to the kernel that has been freed and that the allocator keeps.
pub fn give_back_memory() {
    // SAFETY: the call takes a number, and touches only what is free.
    unsafe { libc::malloc_trim(0) };
}

/// How many CPUs the kernel may ever have: the number of values that a per-CPU map returns for a key.
pub fn possible_cpus() -> Result<usize> {
    aya::util::nr_cpus().map_err(|(_, error)| error)
}

/// For callers that keep a descriptor as a number (netlink attributes).
pub fn raw(fd: &impl AsFd) -> RawFd {
    fd.as_fd().as_raw_fd()
}

/// Moves the calling thread into a new network namespace.
pub fn new_network_namespace() -> Result<()> {
    // SAFETY: only the network namespace is unshared, not the table of descriptors.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.map_err(Error::from)
}
