//! [`Tables`] over the kernel's maps.

use crate::maps::{
    ADDRESSES, BALANCERS, BUCKETS, CALLER_RATES, CALLERS_BY_ADDRESS, EGRESS, EGRESS_TCX, ENDPOINTS,
    ESTABLISHED, ESTABLISHED6, FENCE, FRAGMENTS, IDENTIFICATION, INTERFACES, LISTENERS, MTUS, NEIGHBOURS,
    PENDING, PENDING6, PREFIXES, PRESSURES, ROOM, RULES_BY_ADDRESS, RULES_BY_PORT, STREAMS, STREAMS6,
    SUBNETS, TABLES, TARGET_COUNTERS, TARGETS, TRUNKS, VPC_ENDPOINT_IDS,
};
use crate::parts::Parts;
use aya_ebpf::{
    bindings::{
        __sk_buff, BPF_ANY, BPF_NOEXIST, iphdr, ipv6hdr, tcphdr, tcx_action_base::TCX_REDIRECT, xdp_action,
        xdp_md,
    },
    btf_maps::lpm_trie::Key,
    helpers::generated::{
        bpf_check_mtu, bpf_redirect, bpf_tcp_raw_check_syncookie_ipv4, bpf_tcp_raw_check_syncookie_ipv6,
        bpf_tcp_raw_gen_syncookie_ipv4, bpf_tcp_raw_gen_syncookie_ipv6,
    },
};
use privatelink_common::{
    frame::Frame,
    limits::RULE_WORDS,
    path::Room,
    tables::{
        Address, Balancer, Bucket, CallerRate, Datagram, Egress, Endpoint, Entry, Face, Flow, Flow6, FlowKey,
        FlowKey6, Flows, FragmentKey, Handshake, InsertError, Interface, Listener, ListenerKey, Mtu,
        Neighbour, Prefix, Pressure, RuleAddress, RulePort, Stream, Subnet, Tables, Target, TargetEvent,
        Trunk, VpcAddress, VpcEndpointId, Words,
    },
    verdict::{Part, Verdict},
    wire::{Ip, Ipv4Header, Ipv6Header, Mac, TCP, Tcp},
};
use zerocopy::big_endian::{U16, U32};

/// Length of a TCP header without options.
const TCP_LENGTH: u32 = 20;

/// Linux's EEXIST.
const EXISTS: i32 = -17;

/// How frames leave by a slot, which each hook does in a way of its own.
pub(crate) trait Exit: Parts {
    /// Sets the redirect up, if there is such an interface.
    fn leave(&self, slot: u16) -> Option<Egress>;
}

/// The trunk that an interface is on, if it is tags on one.
#[inline(always)]
fn trunk(slot: u16) -> Option<&'static Trunk> {
    TRUNKS.get(slot.into()).filter(|trunk| trunk.ifindex != 0)
}

/// XDP's way out: the map `egress`.
pub(crate) struct XdpExit(pub *mut xdp_md);

impl Exit for XdpExit {
    #[inline(always)]
    fn leave(&self, slot: u16) -> Option<Egress> {
        let redirected = |slot: u16| EGRESS.redirect(slot.into(), 0) == Ok(xdp_action::XDP_REDIRECT);
        if redirected(slot) {
            return Some(Egress::PLAIN);
        }
        redirected(trunk(slot)?.slot).then_some(Egress::TAGGED)
    }
}

/// TCX's way out: the map `egress_tcx`, since a map of devices belongs to XDP programs alone.
pub(crate) struct TcxExit(pub *mut __sk_buff);

impl Exit for TcxExit {
    #[inline(always)]
    fn leave(&self, slot: u16) -> Option<Egress> {
        match EGRESS_TCX.get(slot.into()).copied().filter(|ifindex| *ifindex != 0) {
            Some(ifindex) => self.redirect(ifindex).then_some(Egress::PLAIN),
            None => self.redirect(trunk(slot)?.ifindex).then_some(Egress::TAGGED),
        }
    }
}

impl TcxExit {
    #[inline(always)]
    fn redirect(&self, ifindex: u32) -> bool {
        let mut mtu = 0;
        // The kernel takes a vanished interface out of `egress`, but not out of an array, and would lose the frame uncounted. This is
        // the helper that says whether there is one with this index.
        // SAFETY: the helpers check the context and the index, and `mtu` outlives the call.
        let known = unsafe { bpf_check_mtu(self.0.cast(), ifindex, &raw mut mtu, 0, 0) } >= 0;
        // SAFETY: as above.
        known && unsafe { bpf_redirect(ifindex, 0) } == i64::from(TCX_REDIRECT)
    }
}

/// Adds to a word that other CPUs add to, too, without losing what they add; returns what was there before.
///
/// # Safety
///
/// `word` is a pointer to an aligned word that a map lookup returned in this run.
#[inline(always)]
pub(crate) unsafe fn fetch_add(word: *mut u64, by: u64) -> u64 {
    let before;
    // SAFETY: the caller has the word.
    unsafe {
        core::arch::asm!("{value} = atomic_fetch_add((u64 *)({word} + 0), {value})",
            value = inout(reg) by => before, word = in(reg) word);
    }
    before
}

/// The maps of this object.
pub(crate) struct KernelTables<E>(pub E);

/// An interface by the kernel's index.
#[inline(always)]
pub(crate) fn interface(ifindex: u32) -> Option<Interface> {
    INTERFACES.get(ifindex).copied()
}

/// An entry of a flow table, in the map's own memory.
///
/// Other CPUs may read and write it meanwhile, as they may with any map value: fields are aligned integers or bytes, every access
/// below is one plain load or store of one field, and `privatelink_common::path::flow` says why a mixture does no harm. The memory
/// itself belongs to the map, which outlives the program's run.
pub(crate) struct FlowEntry<F>(*mut F);

/// The tables of one width: their key and value, their maps, and the value's words.
macro_rules! flows {
    ($key:ty, $flow:ty, $established:ident, $pending:ident, $streams:ident, $($word:literal)+) => {
        impl Entry<$flow> for FlowEntry<$flow> {
            #[inline(always)]
            fn flow(&self) -> $flow {
                let words = self.0.cast::<u64>();
                // Loads of words, spelled out: a copy of this size becomes a loop over bytes, which takes longer than the lookup.
                // Volatile, so that they stay what they are.
                // SAFETY: the pointer is one that a map lookup returned in this run, to so many words with an alignment of eight.
                let word = |index: usize| unsafe { words.add(index).read_volatile() };
                zerocopy::transmute!([$(word($word)),+])
            }

            #[inline(always)]
            fn acknowledged(&self) -> u32 {
                // SAFETY: as above.
                unsafe { (*self.0).course.acknowledged }
            }

            #[inline(always)]
            fn set_last_seen(&self, now: u32) {
                // SAFETY: as above.
                unsafe { (*self.0).course.last_seen = now };
            }

            #[inline(always)]
            fn set_ended(&self, state: u8, idle_timeout: u16, now: u32) {
                // SAFETY: as above.
                unsafe {
                    (*self.0).course.state = state;
                    (*self.0).course.idle_timeout = idle_timeout;
                    (*self.0).course.last_seen = now;
                }
            }

            #[inline(always)]
            fn set_state(&self, state: u8, idle_timeout: u16) {
                // SAFETY: as above.
                unsafe { ((*self.0).course.state, (*self.0).course.idle_timeout) = (state, idle_timeout) };
            }

            #[inline(always)]
            fn set_seen(&self, mac: Mac, interface: u16) {
                // SAFETY: as above.
                unsafe { ((*self.0).course.seen_mac, (*self.0).course.seen_interface) = (mac, interface) };
            }

            #[inline(always)]
            fn set_next_hop(&self, mac: Mac, interface: u16) {
                // SAFETY: as above.
                unsafe { ((*self.0).course.destination_mac, (*self.0).course.interface) = (mac, interface) };
            }

            #[inline(always)]
            fn set_numbers(&self, sent: u32, acknowledged: u32) {
                // SAFETY: as above.
                unsafe { ((*self.0).course.sent, (*self.0).course.acknowledged) = (sent, acknowledged) };
            }
        }

        impl<E: Exit> Flows<$key> for KernelTables<E> {
            type Entry = FlowEntry<$flow>;

            #[inline(always)]
            fn established(&self, key: &$key) -> Option<FlowEntry<$flow>> {
                $established.get_ptr_mut(key).map(FlowEntry)
            }

            #[inline(always)]
            fn pending(&self, key: &$key) -> Option<FlowEntry<$flow>> {
                $pending.get_ptr_mut(key).map(FlowEntry)
            }

            #[inline(always)]
            fn establish(&self, key: &$key, flow: &$flow) -> Result<(), InsertError> {
                inserted($established.insert(key, flow, BPF_NOEXIST.into()))
            }

            #[inline(always)]
            fn claim(&self, key: &$key, flow: &$flow) -> Result<(), InsertError> {
                inserted($pending.insert(key, flow, BPF_NOEXIST.into()))
            }

            #[inline(always)]
            fn remove_established(&self, key: &$key) {
                // That it is gone already is what was wanted.
                let _ = $established.remove(key);
            }

            #[inline(always)]
            fn remove_pending(&self, key: &$key) {
                let _ = $pending.remove(key);
            }

            #[inline(always)]
            fn stream(&self, key: &$key) -> Option<Stream> {
                // SAFETY: copied at once; every change is a new entry, and the kernel frees the old one when this run has ended.
                unsafe { $streams.get(key) }.copied()
            }

            #[inline(always)]
            fn set_stream(&self, key: &$key, stream: &Stream) -> Result<(), InsertError> {
                inserted($streams.insert(key, stream, BPF_ANY.into()))
            }

            #[inline(always)]
            fn remove_stream(&self, key: &$key) {
                let _ = $streams.remove(key);
            }
        }
    };
}

flows!(FlowKey, Flow, ESTABLISHED, PENDING, STREAMS, 0 1 2 3 4 5 6 7);
flows!(FlowKey6, Flow6, ESTABLISHED6, PENDING6, STREAMS6, 0 1 2 3 4 5 6 7 8 9 10);

/// What an insertion returned.
#[inline(always)]
fn inserted(result: Result<(), i32>) -> Result<(), InsertError> {
    result.map_err(|error| if error == EXISTS { InsertError::Exists } else { InsertError::Full })
}

/// The words of a map's value, in the map's own memory.
struct MapWords(*const u64, usize);

impl Words for MapWords {
    #[inline(always)]
    fn word(&self, index: usize) -> u64 {
        if index >= self.1 {
            return 0;
        }
        // SAFETY: the pointer is one that a map lookup returned in this run, to so many words with an alignment of eight; the kernel
        // frees a removed value when this run has ended, and the agent never changes one.
        unsafe { self.0.add(index).read() }
    }
}

/// The headers that the kernel's helpers take a handshake from; no packet has them.
#[inline(always)]
fn ip(of: &Handshake) -> Ipv4Header {
    Ipv4Header {
        version_ihl: 0x45,
        tos: 0,
        total_length: U16::ZERO,
        id: U16::ZERO,
        fragment: U16::ZERO,
        ttl: 0,
        protocol: TCP,
        checksum: [0; 2],
        source: of.source.ipv4(),
        destination: of.endpoint.to_ne_bytes(),
    }
}

/// The same of a consumer with an IPv6 address.
#[inline(always)]
fn ip6(of: &Handshake) -> Ipv6Header {
    Ipv6Header {
        version_class_label: U32::new(6 << 28),
        payload_length: U16::ZERO,
        next_header: TCP,
        hop_limit: 0,
        source: of.source.0,
        destination: Ip::from_ipv4(of.endpoint.to_ne_bytes()).0,
    }
}

#[inline(always)]
fn tcp(of: &Handshake, sequence: u32, acknowledgement: u32) -> Tcp {
    Tcp {
        source_port: of.source_port,
        destination_port: of.destination_port,
        sequence: U32::new(sequence),
        acknowledgement: U32::new(acknowledgement),
        data_offset: 5 << 4,
        flags: 0,
        window: U16::ZERO,
        checksum: [0; 2],
        urgent: U16::ZERO,
    }
}

impl<E: Exit> Tables for KernelTables<E> {
    #[inline(always)]
    fn room<R>(&self, work: impl FnOnce(&mut Room) -> R) -> Option<R> {
        let room = ROOM.get_ptr_mut(0)?;
        // SAFETY: the map returned a pointer to this CPU's own value, programs of neither hook nest on a CPU, and the path does not
        // ask twice at a time: nothing else refers to it.
        Some(work(unsafe { &mut *room }))
    }

    #[inline(always)]
    fn part<F: Frame>(&self, part: Part, _: &mut F, room: &mut Room) -> Verdict {
        self.0.part(part, room)
    }

    #[inline(always)]
    fn fence(&self) {
        let Some(word) = FENCE.get_ptr_mut(0) else { return };
        // An instruction that changes memory and says what was there before is a full barrier on every architecture
        // (Documentation/bpf/standardization/instruction-set.rst, "Atomic operations"; the kernel's JITs use the ordered forms).
        // SAFETY: the map returned a pointer to this CPU's own word.
        unsafe { fetch_add(word, 1) };
    }

    #[inline(always)]
    fn interface(&self, ifindex: u32) -> Option<Interface> {
        interface(ifindex)
    }

    #[inline(always)]
    fn endpoint(&self, endpoint: u32) -> Endpoint {
        ENDPOINTS.get(endpoint).copied().unwrap_or_default()
    }

    #[inline(always)]
    fn address(&self, address: &VpcAddress) -> Option<Address> {
        // SAFETY: copied at once; the agent replaces an address by one update, which the kernel makes a new entry.
        unsafe { ADDRESSES.get(address) }.copied()
    }

    #[inline(always)]
    fn in_vpc(&self, address: &VpcAddress) -> bool {
        let prefix = Prefix { vpc: U32::new(address.vpc.into()), address: address.address.0 };
        PREFIXES.get(&Key::new(160, prefix)).is_some()
    }

    #[inline(always)]
    fn rules_of_address(&self, address: &RuleAddress) -> Option<impl Words> {
        let found = RULES_BY_ADDRESS.get(&Key::new(160, *address))?;
        Some(MapWords(core::ptr::from_ref(found).cast(), RULE_WORDS))
    }

    #[inline(always)]
    fn rules_of_port(&self, port: &RulePort) -> Option<impl Words> {
        let found = RULES_BY_PORT.get(&Key::new(64, *port))?;
        Some(MapWords(core::ptr::from_ref(found).cast(), 2 * RULE_WORDS))
    }

    #[inline(always)]
    fn subnet(&self, address: &VpcAddress) -> Option<Subnet> {
        let prefix = Prefix { vpc: U32::new(address.vpc.into()), address: address.address.0 };
        SUBNETS.get(&Key::new(160, prefix)).copied()
    }

    #[inline(always)]
    fn source(&self, balancer: u32, to_ipv4: bool, pick: usize) -> Option<u32> {
        BALANCERS.get(balancer)?.source(to_ipv4, pick)
    }

    #[inline(always)]
    fn face(&self, balancer: u32) -> Option<Face> {
        BALANCERS.get(balancer).map(Balancer::face)
    }

    #[inline(always)]
    fn listener(&self, key: &ListenerKey) -> Option<Listener> {
        // SAFETY: as for `address`.
        unsafe { LISTENERS.get(key) }.copied()
    }

    #[inline(always)]
    fn slot(&self, table: u32, slot: u32) -> Option<u32> {
        TABLES.get_value(table, &slot).copied()
    }

    #[inline(always)]
    fn target(&self, target: u32) -> Option<Target> {
        TARGETS.get(target).copied()
    }

    #[inline(always)]
    fn neighbour(&self, address: &VpcAddress) -> Option<Neighbour> {
        // SAFETY: as for `address`.
        unsafe { NEIGHBOURS.get(address) }.copied()
    }

    #[inline(always)]
    fn caller(&self, address: &VpcAddress) -> Option<Neighbour> {
        // SAFETY: copied at once. It may be evicted, and its memory another's, meanwhile: the path looks twice.
        unsafe { CALLERS_BY_ADDRESS.get(address) }.copied()
    }

    #[inline(always)]
    fn set_caller(&self, address: &VpcAddress, caller: &Neighbour) {
        let _ = CALLERS_BY_ADDRESS.insert(address, caller, BPF_ANY.into());
    }

    #[inline(always)]
    fn caller_rate(&self, interface: u16) -> Option<CallerRate> {
        CALLER_RATES.get(interface.into()).copied()
    }

    #[inline(always)]
    fn set_caller_rate(&self, interface: u16, rate: CallerRate) {
        let Some(place) = CALLER_RATES.get_ptr_mut(interface.into()) else { return };
        // SAFETY: as for `set_bucket`.
        unsafe { *place = rate };
    }

    #[inline(always)]
    fn bucket(&self, endpoint: u32) -> Option<Bucket> {
        BUCKETS.get(endpoint).copied()
    }

    #[inline(always)]
    fn set_bucket(&self, endpoint: u32, bucket: Bucket) {
        let Some(place) = BUCKETS.get_ptr_mut(endpoint) else { return };
        // SAFETY: the map returned a pointer to its own memory, which outlives the run; other CPUs may write there too, and a mixture
        // of two buckets is a bucket.
        unsafe { *place = bucket };
    }

    #[inline(always)]
    fn vpc_endpoint_id(&self, endpoint: u32) -> VpcEndpointId {
        VPC_ENDPOINT_IDS.get(endpoint).copied().unwrap_or_default()
    }

    #[inline(always)]
    fn pressure(&self, endpoint: u32) -> Option<Pressure> {
        PRESSURES.get(endpoint).copied()
    }

    #[inline(always)]
    fn set_pressure(&self, endpoint: u32, pressure: Pressure) {
        let Some(place) = PRESSURES.get_ptr_mut(endpoint) else { return };
        // SAFETY: as for `set_bucket`.
        unsafe { *place = pressure };
    }

    #[inline(always)]
    fn syn_cookie(&self, of: &Handshake) -> Option<u32> {
        let mut tcp = tcp(of, of.initial, 0);
        let tcp = (&raw mut tcp).cast::<tcphdr>();
        let cookie = if of.source.is_ipv4() {
            let mut ip = ip(of);
            // SAFETY: the helper reads the two headers, which are whole and live until it returns.
            unsafe { bpf_tcp_raw_gen_syncookie_ipv4((&raw mut ip).cast::<iphdr>(), tcp, TCP_LENGTH) }
        } else {
            let mut ip = ip6(of);
            // SAFETY: as above.
            unsafe { bpf_tcp_raw_gen_syncookie_ipv6((&raw mut ip).cast::<ipv6hdr>(), tcp, TCP_LENGTH) }
        };
        // The lower half is the cookie; an error is negative.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the lower half is meant")]
        (cookie >= 0).then_some(cookie as u32)
    }

    #[inline(always)]
    fn is_syn_cookie(&self, of: &Handshake, cookie: u32) -> bool {
        let mut tcp = tcp(of, of.initial.wrapping_add(1), cookie.wrapping_add(1));
        let tcp = (&raw mut tcp).cast::<tcphdr>();
        if of.source.is_ipv4() {
            let mut ip = ip(of);
            // SAFETY: as above.
            unsafe { bpf_tcp_raw_check_syncookie_ipv4((&raw mut ip).cast::<iphdr>(), tcp) == 0 }
        } else {
            let mut ip = ip6(of);
            // SAFETY: as above.
            unsafe { bpf_tcp_raw_check_syncookie_ipv6((&raw mut ip).cast::<ipv6hdr>(), tcp) == 0 }
        }
    }

    #[inline(always)]
    fn datagram(&self, key: &FragmentKey) -> Option<Datagram> {
        // SAFETY: copied at once. It may be evicted, and its memory another's, meanwhile: then it is that one's ports that a fragment
        // gets, which nobody at the other side waits for.
        unsafe { FRAGMENTS.get(key) }.copied()
    }

    #[inline(always)]
    fn set_datagram(&self, key: &FragmentKey, datagram: &Datagram) -> Result<(), InsertError> {
        inserted(FRAGMENTS.insert(key, datagram, 0))
    }

    #[inline(always)]
    fn next_identification(&self) -> u32 {
        let Some(count) = IDENTIFICATION.get_ptr_mut(0) else { return 0 };
        // SAFETY: the map returned an aligned pointer to its own memory, which outlives the run; other CPUs may write there too.
        unsafe {
            let next = count.read_volatile();
            count.write_volatile(next.wrapping_add(1));
            next
        }
    }

    #[inline(always)]
    fn count(&self, target: u32, event: TargetEvent) {
        let Some(counters) = TARGET_COUNTERS.get_ptr_mut(target) else { return };
        // SAFETY: the map returned a pointer to this CPU's own value, and programs of neither hook nest on a CPU.
        let counters = unsafe { &mut *counters };
        match event {
            TargetEvent::Opened => counters.opened += 1,
            TargetEvent::Answered => counters.answered += 1,
            TargetEvent::Refused => counters.refused += 1,
            TargetEvent::PortAllocationError => counters.port_allocation_errors += 1,
        }
    }

    #[inline(always)]
    fn mtu(&self, interface: u16) -> Mtu {
        MTUS.get(interface.into()).copied().unwrap_or_default()
    }

    #[inline(always)]
    fn egress(&self, interface: u16) -> Option<Egress> {
        self.0.leave(interface)
    }
}
