//! Every map of the dataplane: key, value, who writes it, who reads it, and what happens when it is full; and [`Tables`], the
//! trait by which the path reaches them: the other of the two seams between the path and its host.
//!
//! Addresses of the flow tables are as wide as their families need; all others are of either family, an IPv4 address being
//! `::ffff:a.b.c.d`.
//!
//! The layouts are an interface: people read them with `bpftool map dump`. Ports and lengths from the wire are big-endian types;
//! bare integers are in the machine's order. No type has padding: the derives refuse it.

use crate::checksum;
use crate::frame::Frame;
use crate::limits::RULE_WORDS;
use crate::path::{self, Room};
use crate::verdict::{Direction, Part, Verdict};
use crate::wire::{Ip, Ipv4, Ipv6, Mac};
use core::mem::size_of;
use core::ops::{Deref, DerefMut};
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout,
    big_endian::{U16, U32},
};

macro_rules! table {
    ($(#[$meta:meta])* $name:ident, $size:expr, align $align:literal, { $($(#[$field_meta:meta])* $field:ident: $type:ty,)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C, align($align))]
        pub struct $name { $($(#[$field_meta])* pub $field: $type,)+ }
        const _: () = assert!(size_of::<$name>() == $size);
    };
}

table! {
    /// Value of `interfaces`, an array by the kernel's interface index; and, behind those, by [`VlanKey`]'s value.
    /// Written by the agent, read for every packet. An index beyond the array cannot be attached.
    Interface, 8, align 4, {
        /// The VPC that the interface belongs to; 0: none, its packets pass.
        vpc: u16,
        /// Slot in `egress`, a hash of devices by which XDP programs send, and in `egress_tcx`, an array of interface indices (0: none) by
        /// which TCX programs do; both are written by the agent. The same for as long as the configuration names the interface.
        slot: u16,
        /// 1: the dataplane's end of a VPC's own stack.
        stack: u16,
        /// A packet of so many bytes fits through every endpoint and every interface; 0: not known.
        fits: u16,
    }
}

/// Value of `mtus`, an array by slot: the largest IP packet that both ends of the interface take, in bytes; 0: not known.
/// Written by the agent, read for SYNs and for packets larger than [`Interface::fits`]. As large as `egress`.
pub type Mtu = u32;

table! {
    /// Key of `vlans`, a sparse hash: the tags that frames of a trunk come with (IEEE 802.1Q). Its value is the index in `interfaces` of
    /// what they stand for. Written by the agent, read for tagged frames. As large as `egress`.
    VlanKey, 8, align 4, {
        /// The kernel's index of the trunk.
        ifindex: u32,
        /// The outer tag's VLAN, where that is a service tag (802.1ad); 0: there is none.
        service_vlan: u16,
        /// The VLAN of the only tag, or of the one behind the service tag; 0: there is none.
        vlan: u16,
    }
}

/// A tag as it stands in a frame, between the link-layer addresses and the EtherType: an EtherType of its own, and priority, drop
/// eligibility and VLAN in 3, 1 and 12 bits; zeros: none.
pub type Tag = [u8; 4];

table! {
    /// Value of `trunks`, an array by slot: how frames leave by an interface that is tags on a trunk; such a slot is neither in `egress` nor
    /// in `egress_tcx`. Written by the agent, read for frames that find no interface there. As large as `egress`.
    Trunk, 16, align 4, {
        /// The kernel's index of the trunk; 0: the slot is no such interface, or the trunk is gone.
        ifindex: u32,
        /// The trunk's own slot.
        slot: u16,
        /// Zero.
        reserved: u16,
        /// The outer tag.
        outer: Tag,
        /// The inner one, if there are two.
        inner: Tag,
    }
}

table! {
    /// Key of `addresses` and `neighbours`: an address within a VPC; and of `callers`, see [`Neighbour`].
    VpcAddress, 24, align 8, {
        /// The address.
        address: Ip,
        /// Its VPC.
        vpc: u16,
        /// Zero.
        reserved: [u16; 3],
    }
}

/// [`Address::kind`]: an endpoint's address, in its consumer's VPC.
pub const ENDPOINT: u8 = 1;
/// [`Address::kind`]: a load balancer's address, in its provider's VPC.
pub const BALANCER: u8 = 2;
/// [`Address::kind`]: an address that every resolver of such a VPC has, out of reach of network ACLs.
pub const RESOLVER: u8 = 3;
/// [`Address::kind`]: an inbound or outbound address of a resolver, which is a host's like any other.
pub const RESOLVER_ENDPOINT: u8 = 4;

table! {
    /// Value of `addresses`, a hash: the addresses that exist only here.
    /// Written by the agent, read for a flow's first packet, ARP, neighbour discovery and ICMP. Full: the configuration is refused.
    Address, 24, align 4, {
        /// The endpoint, whose counters, quotas and generation apply; of a [`BALANCER`] that serves its own VPC, the one that stands
        /// for that; 0: there is none.
        endpoint: u32,
        /// The load balancer's address that serves it, or that it is: index of `balancers`.
        balancer: u32,
        /// Slot of the VPC's stack, for a [`BALANCER`] and a resolver; 0: it has none.
        stack: u16,
        /// What ARP and neighbour discovery answer, and the source of what leaves from this address.
        mac: Mac,
        /// [`ENDPOINT`], [`BALANCER`], [`RESOLVER`] or [`RESOLVER_ENDPOINT`].
        kind: u8,
        /// 1: ICMP echo requests are answered.
        ping: u8,
        /// 1: the load balancer has IPv6 addresses, so that flows of this address, if it is an IPv4 address, may be in the wide tables.
        dualstack: u16,
        /// Of a [`RESOLVER_ENDPOINT`], the rules of its security groups, by which questions may come in; 0: any may.
        rules: u32,
    }
}

impl Address {
    /// Whether it is a resolver's.
    #[inline(always)]
    pub const fn is_resolver(&self) -> bool {
        self.kind == RESOLVER || self.kind == RESOLVER_ENDPOINT
    }
}

table! {
    /// Key of `prefixes`, a longest-prefix-match trie: a VPC's CIDRs. The prefix length counts the VPC's 32 bits.
    /// Written by the agent, read for a flow's first packet. Full: the configuration is refused.
    Prefix, 20, align 4, {
        /// The VPC.
        vpc: U32,
        /// The network. Of an IPv4 network, the prefix is longer by the 96 bits before it.
        address: Ipv6,
    }
}

table! {
    /// Key of `rules_by_address`, a longest-prefix-match trie: an address, or a network of them, in a set of rules. The prefix length
    /// counts the set's 32 bits. Sets never change: what is said otherwise is another set. Written by the agent, read for a flow's first
    /// packet, and for network ACLs once a second after it. Full: the configuration is refused.
    RuleAddress, 24, align 4, {
        /// The set.
        set: U32,
        /// The network: the other side's, be it the source or the destination. IPv4 as in `prefixes`.
        address: Ipv6,
        /// Zero, so that the value, which the kernel puts behind the key, is aligned.
        reserved: [u8; 4],
    }
}

/// Value of `rules_by_address`: the rules that the address matches, a bit each; the lowest is the first.
pub type RuleMask = [u64; RULE_WORDS];

table! {
    /// Key of `rules_by_port`, a longest-prefix-match trie: a protocol, and a range of destination ports that is a prefix, in a set of
    /// rules. The prefix length counts the 48 bits before the port. Written and read as `rules_by_address` is.
    RulePort, 8, align 4, {
        /// The set.
        set: U32,
        /// TCP, UDP, ICMP or ICMPv6.
        protocol: u8,
        /// Zero.
        reserved: u8,
        /// The port; 0 for ICMP and ICMPv6.
        port: U16,
    }
}

table! {
    /// Value of `rules_by_port`.
    RulePorts, 128, align 8, {
        /// The rules that the protocol and the port match, a bit each.
        rules: RuleMask,
        /// The rules of the set that allow; the others deny.
        allows: RuleMask,
    }
}

table! {
    /// Value of `subnets`, a longest-prefix-match trie by [`Prefix`], of the networks that network ACLs are about. Written by the agent,
    /// read for what endpoints that have [`Endpoint::acls`] forward. Full: the configuration is refused.
    Subnet, 12, align 4, {
        /// Its number; 0: no network ACL is about it.
        id: u32,
        /// The rules by which packets may enter it.
        ingress: u32,
        /// The rules by which packets may leave it.
        egress: u32,
    }
}

table! {
    /// Value of `endpoints`, an array by endpoint: one address (one zone) of an endpoint.
    /// Written by the agent, read for every packet of a flow. Full: the configuration is refused.
    Endpoint, 32, align 4, {
        /// Flows that were admitted under another generation are judged anew. It counts on, and leaves 0 out, which is that of none: after
        /// so many changes no flow is left that was admitted under the same one.
        generation: u16,
        /// Largest IP packet that it carries, in bytes; 0: any.
        mtu: u16,
        /// 1: new flows are admitted.
        open: u16,
        /// 1: it has as many flows as it may, and no new ones are admitted.
        full: u16,
        /// How many new flows a second it may open; 0: any number.
        rate: u32,
        /// How many of these it may save up.
        burst: u32,
        /// For how many seconds a TCP flow that both sides have closed keeps its entries, and with them its NAT port.
        hold: u32,
        /// 1: it says by ICMP errors what it cannot forward.
        errors: u16,
        /// 1: there are network ACLs in its VPC or in the provider's.
        acls: u16,
        /// The rules of its security groups, by which clients' packets may enter; 0: any may.
        rules: u32,
        /// SYNs that its consumers may leave unconfirmed in a second before the path answers with SYN cookies, and one more; 0: it
        /// never does.
        cookies: u32,
    }
}

table! {
    /// Value of `pressures`, an array by endpoint: what decides about SYN cookies. Written by the path, in two steps, as are `buckets`:
    /// two CPUs at once may count one SYN for two.
    Pressure, 12, align 4, {
        /// The second that is counted, since boot.
        second: u32,
        /// SYNs less confirmed flows in this second.
        unconfirmed: u32,
        /// SYNs are answered with cookies before this second.
        until: u32,
    }
}

table! {
    /// Value of `buckets`, an array by endpoint: the token bucket of its new flows, and the ICMP errors that it has sent. Written by the
    /// path, which reads and writes it in two steps: two CPUs at once may take one token for two flows.
    Bucket, 16, align 4, {
        /// When it was last filled, in seconds since boot.
        filled: u32,
        /// New flows that it has left.
        tokens: u32,
        /// When it last sent an ICMP error, in seconds since boot.
        errors_at: u32,
        /// How many it sent in that second.
        errors: u32,
    }
}

table! {
    /// Value of `balancers`, an array: one address (one zone) of a load balancer.
    /// Written by the agent, read for a flow's first packet. Full: the configuration is refused.
    Balancer, 88, align 8, {
        /// What targets see as the source.
        address: Ip,
        /// The provider's VPC.
        vpc: u16,
        /// The source of what leaves from this address.
        mac: Mac,
        /// The IPv4 addresses that new flows may leave from, as indices of `balancers`: of the zone's first one and its secondary
        /// ones, over and over; 0: there is none.
        sources: [u32; 8],
        /// The IPv6 addresses, likewise.
        sources6: [u32; 8],
    }
}

/// How a load balancer's address looks to targets: the part of a [`Balancer`] that a packet needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Face {
    /// The address.
    pub address: Ip,
    /// Its link-layer address.
    pub mac: Mac,
}

impl Balancer {
    /// How it looks to targets.
    #[inline(always)]
    pub const fn face(&self) -> Face {
        Face { address: self.address, mac: self.mac }
    }

    /// The address, as an index of `balancers`, that a new flow to a target of one family leaves from: `pick`, of which the lowest three
    /// bits count, chooses.
    #[inline(always)]
    pub fn source(&self, to_ipv4: bool, pick: usize) -> Option<u32> {
        let sources = if to_ipv4 { &self.sources } else { &self.sources6 };
        sources.get(pick & 7).copied().filter(|source| *source != 0)
    }
}

table! {
    /// Key of `listeners`, a hash.
    ListenerKey, 8, align 4, {
        /// Index of `balancers`.
        balancer: u32,
        /// The port.
        port: U16,
        /// [`crate::wire::TCP`] or [`crate::wire::UDP`].
        protocol: u8,
        /// Zero.
        reserved: u8,
    }
}

table! {
    /// Value of `listeners`. Written by the agent, read for a flow's first packet. Full: the configuration is refused.
    Listener, 20, align 4, {
        /// Index of `tables`, the Maglev table that chooses the target.
        table: u32,
        /// Size of that table, a prime; 0: there is no target.
        slots: u32,
        /// Idle timeout of its flows, in seconds.
        idle_timeout: u16,
        /// 1: the target is chosen by the source address alone.
        sticky: u8,
        /// 1: targets see the client's own address and port, where the client is in the load balancer's VPC.
        preserve: u8,
        /// 1: its targets have IPv6 addresses.
        ipv6: u8,
        /// 1: targets are told who the client is by the Proxy Protocol.
        proxied: u8,
        /// Zero.
        reserved: u16,
        /// The rules of the load balancer's security groups, by which what endpoints' clients send may enter; 0: any may.
        rules: u32,
    }
}

/// [`Target::state`]: checked for the first time.
pub const INITIAL: u16 = 1;
/// [`Target::state`]: its health checks succeed.
pub const HEALTHY: u16 = 2;
/// [`Target::state`]: its health checks fail.
pub const UNHEALTHY: u16 = 3;
/// [`Target::state`]: its health is not checked.
pub const UNCHECKED: u16 = 4;
/// [`Target::state`]: deregistered; it gets no new flows, and is forgotten when it has none left.
pub const DRAINING: u16 = 5;

table! {
    /// Value of `targets`, an array by target. Written by the agent, read for a flow's first packet.
    /// Full: the configuration is refused.
    Target, 40, align 8, {
        /// Its address.
        address: Ip,
        /// Its port.
        port: U16,
        /// Its VPC; 0: no such target.
        vpc: u16,
        /// Its measured health, which only the agent reads, as it does what follows but `cut`: it outlives the agent here.
        state: u16,
        /// 1: its flows are cut when its deregistration delay is over.
        terminate: u16,
        /// When it came into this state, in seconds since boot.
        since: u32,
        /// When its deregistration delay is over, in seconds since boot; 0: it is not deregistered.
        until: u32,
        /// Its flows that were opened by then have ended, in seconds since boot; 0: none.
        cut: u32,
        /// Zero.
        reserved: u32,
    }
}

table! {
    /// Value of `neighbours`, a hash by [`VpcAddress`]: where a target, or a name server that a resolver asks, is reached.
    /// Written by the agent (ARP, neighbour discovery), read for a flow's first packet and once a second after it. Full: the configuration is refused.
    ///
    /// Also the value of `callers`, an LRU hash by [`VpcAddress`], whose `vpc` is the slot of the resolver's stack there: where the last
    /// question to that resolver from this address came from, and so where its answer goes, unless the agent knows better. Written by the
    /// path, read for what a resolver says; the agent removes what names a slot that is gone. Full: who has asked least recently goes,
    /// and asks again.
    Neighbour, 8, align 4, {
        /// Link-layer address.
        mac: Mac,
        /// Slot of the interface behind which it is.
        interface: u16,
    }
}

table! {
    /// What a packet of a flow's direction needs beside its new addresses.
    Course, 56, align 4, {
        /// New source port.
        source_port: U16,
        /// New destination port.
        destination_port: U16,
        /// What the new addresses change of a checksum.
        address_delta: u16,
        /// The endpoint's generation that admitted the flow.
        generation: u16,
        /// New destination link-layer address.
        destination_mac: Mac,
        /// New source link-layer address.
        source_mac: Mac,
        /// Source link-layer address that the packets of this direction come with.
        seen_mac: Mac,
        /// Slot of the interface that they come by.
        seen_interface: u16,
        /// Slot of the interface to leave by.
        interface: u16,
        /// The VPC that the packet goes to.
        peer_vpc: u16,
        /// The endpoint that it is accounted to.
        endpoint: u16,
        /// The target that was chosen.
        target: u16,
        /// When the flow was opened, in seconds since boot.
        opened: u32,
        /// When the last packet of this direction was seen, in seconds since boot.
        last_seen: u32,
        /// Seconds without a packet in either direction after which the flow has ended.
        idle_timeout: u16,
        /// [`crate::path::state::State`].
        state: u8,
        /// [`crate::verdict::Direction`] in the lowest bit; [`SHIFTED`] and [`COOKIE`].
        way: u8,
        /// The sequence number behind the last byte that packets of this direction had, as they come (RFC 9293, 3.3.1: SND.NXT of who
        /// sends them), SYN and FIN not counted; 0: not known.
        sent: u32,
        /// The highest acknowledgement number that they had; 0: not known.
        acknowledged: u32,
    }
}

/// [`Flow::way`]: the two sides do not count the same; its [`Stream`] says by how much they differ.
pub const SHIFTED: u8 = 0x80;
/// [`Flow::way`]: the path answered the consumer's SYN itself, by a SYN cookie. Such a flow is [`SHIFTED`], too.
pub const COOKIE: u8 = 0x40;

impl Course {
    /// Which way packets of this entry go.
    #[inline(always)]
    pub const fn direction(&self) -> Direction {
        if self.way & 1 == Direction::ToProvider as u8 {
            Direction::ToProvider
        } else {
            Direction::ToConsumer
        }
    }

    /// Whether its packets need more than a rewrite of addresses.
    #[inline(always)]
    pub const fn is_shifted(&self) -> bool {
        self.way & SHIFTED != 0
    }
}

table! {
    /// Value of `streams` and `streams6`, sparse hashes by the key of the consumer's packets: what the two sides of a TCP flow count
    /// differently. Written by the path as the flow opens; it goes with the flow, and what an evicted flow has left goes with the
    /// next sweep. Full: the new flow is refused.
    Stream, 32, align 4, {
        /// What the target counts the consumer's bytes higher by.
        forward: u32,
        /// What the consumer counts the target's bytes higher by.
        backward: u32,
        /// What the consumer sees the target's timestamps higher by (RFC 7323).
        timestamps: u32,
        /// The consumer's initial sequence number: the one that the target has acknowledged, if it has answered.
        initial: u32,
        /// The initial sequence number that the consumer's SYN was answered with: the path's own, or the target's.
        cookie: u32,
        /// The timestamp that it answered with.
        stamp: u32,
        /// The consumer's MSS, as the cookie tells it.
        mss: u16,
        /// What the consumer offered beside, as the low bits of a cookie's timestamp tell it.
        offer: u8,
        /// [`UNANSWERED`] and others.
        marks: u8,
        /// The power of two that the target's windows are multiplied by.
        target_window: i8,
        /// The power of two that the consumer's windows are multiplied by.
        consumer_window: i8,
        /// Zero.
        reserved: u16,
    }
}

/// [`Stream::marks`]: the target has not answered the path's SYN, so [`Stream::backward`] is not known.
pub const UNANSWERED: u8 = 1;
/// [`Stream::marks`]: the target has not acknowledged the Proxy Protocol's header, which is [`Stream::forward`] bytes long.
pub const HEADER_DUE: u8 = 2;
/// [`Stream::marks`]: it has been sent the header.
pub const HEADER_SENT: u8 = 4;
/// [`Stream::marks`]: where the target begins to count is known, from its SYN-ACK. Until then, nothing of the stream goes to it.
pub const GREETED: u8 = 8;

table! {
    /// Value of `vpc_endpoint_ids`, an array by endpoint: what the Proxy Protocol's header calls it. Written by the agent, read where a
    /// header is made.
    VpcEndpointId, 24, align 1, {
        /// `vpce-` and seventeen hexadecimal digits; zeros: it has none.
        text: [u8; 22],
        /// Zero.
        reserved: [u8; 2],
    }
}

/// Addresses as a pair of flow tables has them.
pub trait Width: Copy {
    /// As one of either family.
    fn widen(self) -> Ip;
    /// The part of an address that these tables keep.
    fn of(address: Ip) -> Self;
    /// The sum of its words, for a checksum.
    fn sum(self) -> u32;
    /// What of it goes into a hash.
    fn bits(self) -> u64;
}

impl Width for Ipv4 {
    #[inline(always)]
    fn widen(self) -> Ip {
        Ip::from_ipv4(self)
    }

    #[inline(always)]
    fn of(address: Ip) -> Self {
        address.ipv4()
    }

    #[inline(always)]
    fn sum(self) -> u32 {
        checksum::address(self)
    }

    #[inline(always)]
    fn bits(self) -> u64 {
        u32::from_ne_bytes(self).into()
    }
}

impl Width for Ip {
    #[inline(always)]
    fn widen(self) -> Ip {
        self
    }

    #[inline(always)]
    fn of(address: Ip) -> Self {
        address
    }

    #[inline(always)]
    fn sum(self) -> u32 {
        checksum::ip(self)
    }

    #[inline(always)]
    fn bits(self) -> u64 {
        let [network, host] = self.words();
        network.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ host
    }
}

/// The key of a pair of flow tables: what the path needs of it, whichever they are.
pub trait Key: Copy + Default + PartialEq {
    /// The tables' addresses.
    type Address: Width;
    /// The tables' value.
    type Flow: Copy + Default + Deref<Target = Course> + DerefMut;
    /// The key of the other pair of tables.
    type Other: Key;
    /// Whether these are the wide ones.
    const WIDE: bool;

    /// Source address.
    fn source(&self) -> Self::Address;
    /// Destination address.
    fn destination(&self) -> Self::Address;
    /// Source port.
    fn source_port(&self) -> U16;
    /// Destination port.
    fn destination_port(&self) -> U16;
    /// The VPC that the packet comes from.
    fn vpc(&self) -> u16;
    /// [`crate::wire::TCP`] or [`crate::wire::UDP`].
    fn protocol(&self) -> u8;
    /// Whether the packet is IPv4.
    fn is_ipv4(&self) -> bool;
    /// The key of the other direction: what the peer's answer to a packet rewritten by `flow` looks like when it arrives.
    fn mirror(&self, flow: &Self::Flow) -> Self;
    /// The key that the packet has in the other pair of tables, if it can be there.
    fn other(&self) -> Option<Self::Other>;
    /// A value with these new addresses.
    fn flow(source: Self::Address, destination: Self::Address, course: Course) -> Self::Flow;
    /// The new source address of a value.
    fn source_of(flow: &Self::Flow) -> Self::Address;
    /// The new destination address of a value.
    fn destination_of(flow: &Self::Flow) -> Self::Address;
}

/// The key and the value of a pair of flow tables.
macro_rules! flows {
    ($(#[$key_meta:meta])* $key:ident, $key_size:expr, $(#[$flow_meta:meta])* $flow:ident, $flow_size:expr, of $address:ty, beside $other:ident) => {
        table! {
            $(#[$key_meta])*
            $key, $key_size, align 8, {
                /// Source address.
                source: $address,
                /// Destination address.
                destination: $address,
                /// Source port.
                source_port: U16,
                /// Destination port.
                destination_port: U16,
                /// The VPC that the packet comes from.
                vpc: u16,
                /// [`crate::wire::TCP`] or [`crate::wire::UDP`].
                protocol: u8,
                /// Zero.
                reserved: u8,
            }
        }

        table! {
            $(#[$flow_meta])*
            $flow, $flow_size, align 8, {
                /// New source address.
                source: $address,
                /// New destination address.
                destination: $address,
                /// The rest, which is reached as if it were here.
                course: Course,
            }
        }

        impl Deref for $flow {
            type Target = Course;

            #[inline(always)]
            fn deref(&self) -> &Course {
                &self.course
            }
        }

        impl DerefMut for $flow {
            #[inline(always)]
            fn deref_mut(&mut self) -> &mut Course {
                &mut self.course
            }
        }

        impl Key for $key {
            type Address = $address;
            type Flow = $flow;
            type Other = $other;
            const WIDE: bool = size_of::<$address>() == size_of::<Ip>();

            #[inline(always)]
            fn source(&self) -> $address {
                self.source
            }

            #[inline(always)]
            fn destination(&self) -> $address {
                self.destination
            }

            #[inline(always)]
            fn source_port(&self) -> U16 {
                self.source_port
            }

            #[inline(always)]
            fn destination_port(&self) -> U16 {
                self.destination_port
            }

            #[inline(always)]
            fn vpc(&self) -> u16 {
                self.vpc
            }

            #[inline(always)]
            fn protocol(&self) -> u8 {
                self.protocol
            }

            #[inline(always)]
            fn is_ipv4(&self) -> bool {
                self.source.widen().is_ipv4()
            }

            #[inline(always)]
            fn mirror(&self, flow: &$flow) -> Self {
                Self {
                    source: flow.destination,
                    destination: flow.source,
                    source_port: flow.destination_port,
                    destination_port: flow.source_port,
                    vpc: flow.peer_vpc,
                    protocol: self.protocol,
                    reserved: 0,
                }
            }

            #[inline(always)]
            fn other(&self) -> Option<$other> {
                self.is_ipv4().then(|| $other {
                    source: Width::of(self.source.widen()),
                    destination: Width::of(self.destination.widen()),
                    source_port: self.source_port,
                    destination_port: self.destination_port,
                    vpc: self.vpc,
                    protocol: self.protocol,
                    reserved: 0,
                })
            }

            #[inline(always)]
            fn flow(source: $address, destination: $address, course: Course) -> $flow {
                $flow { source, destination, course }
            }

            #[inline(always)]
            fn source_of(flow: &$flow) -> $address {
                flow.source
            }

            #[inline(always)]
            fn destination_of(flow: &$flow) -> $address {
                flow.destination
            }
        }
    };
}

flows! {
    /// Key of `established` (a preallocated hash) and `pending` (LRU): one direction of a flow that is IPv4 on both sides, as its
    /// packets arrive.
    FlowKey, 16,
    /// Value of `established` and `pending`: everything that a packet of this direction needs. 64 bytes, one cache line of its own.
    ///
    /// Written by the path; the agent only ever removes entries. `pending` full: the entry least recently used goes, and its half
    /// that stays is worthless by the pair check. `established` full: the new flow is refused, the others live on.
    Flow, 64, of Ipv4, beside FlowKey6
}

flows! {
    /// Key of `established6` and `pending6`: the same of a flow that is IPv6 on one side or on both. Where a flow is translated, the
    /// packets of one direction are IPv4.
    FlowKey6, 40,
    /// Value of `established6` and `pending6`, written as those of the narrow tables are. Packets leave with the family of the new
    /// addresses.
    Flow6, 88, of Ip, beside FlowKey
}

table! {
    /// Value of `endpoint_counters`, an array by endpoint and CPU. Written by the path, read by the agent.
    EndpointCounters, 48, align 8, {
        /// Packets to the provider.
        to_provider_packets: u64,
        /// Bytes to the provider, Ethernet headers included, padding not.
        to_provider_bytes: u64,
        /// Packets to the consumer.
        to_consumer_packets: u64,
        /// Bytes to the consumer, Ethernet headers included, padding not.
        to_consumer_bytes: u64,
        /// Flows opened.
        new_flows: u64,
        /// Packets with RST, either way.
        resets: u64,
    }
}

table! {
    /// Value of `target_counters`, an array by target and CPU: what its new flows met. Written by the path, read by the agent.
    TargetCounters, 32, align 8, {
        /// TCP flows opened.
        opened: u64,
        /// TCP flows that it answered with SYN-ACK.
        answered: u64,
        /// TCP flows that it answered with RST.
        refused: u64,
        /// Flows that found no NAT port towards it (AWS: PortAllocationErrorCount).
        port_allocation_errors: u64,
    }
}

/// What a new flow met at its target: which of [`TargetCounters`] it adds to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetEvent {
    /// [`TargetCounters::opened`]
    Opened,
    /// [`TargetCounters::answered`]
    Answered,
    /// [`TargetCounters::refused`]
    Refused,
    /// [`TargetCounters::port_allocation_errors`]
    PortAllocationError,
}

table! {
    /// Value of `outcomes`, an array by VPC, outcome and CPU. Written by the path, read by the agent.
    Counter, 16, align 8, {
        /// Packets.
        packets: u64,
        /// Bytes, Ethernet headers included.
        bytes: u64,
    }
}

table! {
    /// Key of `names`, a hash: which name an identifier stands for. Written and read by the agent, for whom it is the only memory
    /// of what the other maps' numbers mean.
    NameKey, 8, align 4, {
        /// What kind of thing it is.
        kind: u32,
        /// Its identifier within the kind.
        id: u32,
    }
}

/// Value of `names`: UTF-8, filled up with zeros.
pub type Name = [u8; 160];

table! {
    /// Key of `fragments`, an LRU hash: a datagram that comes in fragments, as it arrives (RFC 791, 3.2; RFC 8200, 4.5).
    FragmentKey, 40, align 8, {
        /// Source address.
        source: Ip,
        /// Destination address.
        destination: Ip,
        /// Identification, of which IPv4 has the lower half.
        id: U32,
        /// The VPC that it comes from.
        vpc: u16,
        /// [`crate::wire::UDP`].
        protocol: u8,
        /// Zero.
        reserved: u8,
    }
}

table! {
    /// Value of `fragments`. Written and read by the path. Full: the datagram least recently seen goes, and what is left of it is
    /// dropped.
    Datagram, 24, align 8, {
        /// Source port, which only the first fragment has.
        source_port: U16,
        /// Destination port, likewise.
        destination_port: U16,
        /// The identification that it leaves with, likewise.
        id: U32,
        /// Which fragments have come, the lowest bit for the first. Two CPUs at once may forget one.
        seen: u64,
        /// When the first fragment came, in seconds since boot.
        at: u32,
        /// Bytes that each fragment but the last has.
        size: u16,
        /// Zero.
        reserved: u16,
    }
}

table! {
    /// Value of `held_rates`, an array by VPC: the fragments that it has had held. Written and read by the path's host; what is in the
    /// window, in two steps: two CPUs at once may count one for two.
    ///
    /// `held_taken`, an array by VPC, has how many bytes of these the agent has taken over, which writes it.
    ///
    /// Beside it, `held` is an array of the kernel's buffers by CPU, by which these fragments go to the agent; while there is no agent, it
    /// is empty.
    HeldRate, 16, align 8, {
        /// The window that is counted: the time since boot, in units of 2 to the power of [`crate::limits::HELD_WINDOW`] nanoseconds.
        window: u32,
        /// How many in it.
        count: u32,
        /// Bytes that were handed over.
        handed: u64,
    }
}

table! {
    /// Value of `caller_rates`, an array by the slot of a resolver's stack: addresses that had not asked there lately. In two steps, as above.
    CallerRate, 8, align 4, {
        /// The second that is counted, since boot.
        second: u32,
        /// How many in it.
        count: u32,
    }
}

/// Why an entry could not be inserted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InsertError {
    /// The key is taken.
    Exists,
    /// The table has no room.
    Full,
}

/// The memory of one flow entry. Entries are shared between CPUs: every method is one read or one write, and a reader may see
/// another CPU's writes in part.
pub trait Entry<F> {
    /// A copy of it.
    fn flow(&self) -> F;
    /// [`Course::acknowledged`].
    fn acknowledged(&self) -> u32;
    /// Replaces [`Course::last_seen`].
    fn set_last_seen(&self, now: u32);
    /// Replaces [`Course::state`], [`Course::idle_timeout`] and [`Course::last_seen`].
    fn set_ended(&self, state: u8, idle_timeout: u16, now: u32);
    /// Replaces [`Course::state`] and [`Course::idle_timeout`].
    fn set_state(&self, state: u8, idle_timeout: u16);
    /// Replaces [`Course::seen_mac`] and [`Course::seen_interface`].
    fn set_seen(&self, mac: Mac, interface: u16);
    /// Replaces [`Course::destination_mac`] and [`Course::interface`].
    fn set_next_hop(&self, mac: Mac, interface: u16);
    /// Replaces [`Course::sent`] and [`Course::acknowledged`].
    fn set_numbers(&self, sent: u32, acknowledged: u32);
}

/// What a SYN cookie is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Handshake {
    /// The consumer's address.
    pub source: Ip,
    /// The endpoint, rather than its address, which another VPC may have, too; and, in the topmost bits, the consumer's MSS.
    pub endpoint: u32,
    /// The consumer's port.
    pub source_port: U16,
    /// The listener's port.
    pub destination_port: U16,
    /// The consumer's initial sequence number.
    pub initial: u32,
}

/// Words of a value that is too large to be copied.
pub trait Words {
    /// One of them; zero where there is none.
    fn word(&self, index: usize) -> u64;
}

/// The flow tables of one width: `established`, `pending` and `streams`, or `established6`, `pending6` and `streams6`.
pub trait Flows<K: Key> {
    /// A flow entry's memory.
    type Entry: Entry<K::Flow>;

    /// An established flow.
    fn established(&self, key: &K) -> Option<Self::Entry>;
    /// A pending flow.
    fn pending(&self, key: &K) -> Option<Self::Entry>;
    /// Inserts into the established, unless the key is taken.
    fn establish(&self, key: &K, flow: &K::Flow) -> Result<(), InsertError>;
    /// Inserts into the pending, unless the key is taken.
    fn claim(&self, key: &K, flow: &K::Flow) -> Result<(), InsertError>;
    /// Removes from the established, if it is there.
    fn remove_established(&self, key: &K);
    /// Removes from the pending, if it is there.
    fn remove_pending(&self, key: &K);
    /// What the two sides of a flow count differently, by the key of the consumer's packets.
    fn stream(&self, key: &K) -> Option<Stream>;
    /// Replaces or inserts it.
    fn set_stream(&self, key: &K, stream: &Stream) -> Result<(), InsertError>;
    /// Removes it, if it is there.
    fn remove_stream(&self, key: &K);
}

/// How a packet leaves by a slot. A word, as a verdict is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Egress(pub u64);

impl Egress {
    /// As it is.
    pub const PLAIN: Self = Self(0);
    /// With tags, which the host puts on: the slot has a [`Trunk`].
    pub const TAGGED: Self = Self(1);
}

/// What the path may look up, claim or install.
pub trait Tables: Flows<FlowKey> + Flows<FlowKey6> {
    /// Lends the path memory, which no one else uses until `work` returns; it does not ask for it twice at a time. What is in it is not
    /// defined, and stays until the packet at hand is done with.
    fn room<R>(&self, work: impl FnOnce(&mut Room) -> R) -> Option<R>;
    /// Goes through a part of the path; a host may do so by a function of its own, of which its verifier needs to know no more than this
    /// says. The same frame goes on.
    #[inline(never)]
    fn part<F: Frame>(&self, part: Part, frame: &mut F, room: &mut Room) -> Verdict
    where
        Self: Sized,
    {
        path::run(part, frame, self, room)
    }
    /// Orders what this CPU has written before what it reads next: of two CPUs that each write and then look for the other's, one sees it.
    fn fence(&self);
    /// An interface by the kernel's index.
    fn interface(&self, ifindex: u32) -> Option<Interface>;
    /// The current state of an endpoint; one that does not exist is closed, and of generation 0, which none ever has.
    fn endpoint(&self, endpoint: u32) -> Endpoint;
    /// An address that exists only here.
    fn address(&self, address: &VpcAddress) -> Option<Address>;
    /// Whether the address is within the VPC's CIDRs.
    fn in_vpc(&self, address: &VpcAddress) -> bool;
    /// The rules of a set that an address matches: a [`RuleMask`].
    fn rules_of_address(&self, address: &RuleAddress) -> Option<impl Words>;
    /// The rules of a set that a protocol and a port match: [`RulePorts`].
    fn rules_of_port(&self, port: &RulePort) -> Option<impl Words>;
    /// Hears which rule of a set has decided; none: no rule matches.
    #[inline(always)]
    fn ruled(&self, _set: u32, _rule: impl FnOnce() -> Option<u32>) {}
    /// The subnet of an address, if a network ACL is about it.
    fn subnet(&self, address: &VpcAddress) -> Option<Subnet>;
    /// Which of a load balancer's addresses a new flow leaves from: [`Balancer::source`].
    fn source(&self, balancer: u32, to_ipv4: bool, pick: usize) -> Option<u32>;
    /// How a load balancer's address looks to targets.
    fn face(&self, balancer: u32) -> Option<Face>;
    /// A listener.
    fn listener(&self, key: &ListenerKey) -> Option<Listener>;
    /// The target in one slot of a Maglev table.
    fn slot(&self, table: u32, slot: u32) -> Option<u32>;
    /// A target.
    fn target(&self, target: u32) -> Option<Target>;
    /// Where a target is reached.
    fn neighbour(&self, address: &VpcAddress) -> Option<Neighbour>;
    /// Where the last question to a resolver from this address came from.
    fn caller(&self, address: &VpcAddress) -> Option<Neighbour>;
    /// Remembers it. One that cannot be remembered asks again.
    fn set_caller(&self, address: &VpcAddress, caller: &Neighbour);
    /// How many have asked lately at the resolver whose stack has this slot, that had not before.
    fn caller_rate(&self, interface: u16) -> Option<CallerRate>;
    /// Replaces it.
    fn set_caller_rate(&self, interface: u16, rate: CallerRate);
    /// The token bucket of an endpoint.
    fn bucket(&self, endpoint: u32) -> Option<Bucket>;
    /// Replaces it.
    fn set_bucket(&self, endpoint: u32, bucket: Bucket);
    /// What an endpoint is called.
    fn vpc_endpoint_id(&self, endpoint: u32) -> VpcEndpointId;
    /// How hard an endpoint's listeners are pressed by SYNs.
    fn pressure(&self, endpoint: u32) -> Option<Pressure>;
    /// Replaces it.
    fn set_pressure(&self, endpoint: u32, pressure: Pressure);
    /// A SYN cookie, where the kernel makes them.
    fn syn_cookie(&self, of: &Handshake) -> Option<u32>;
    /// Whether [`Tables::syn_cookie`] made this cookie of this handshake within the last minutes.
    fn is_syn_cookie(&self, of: &Handshake, cookie: u32) -> bool;
    /// A datagram whose first fragment has come.
    fn datagram(&self, key: &FragmentKey) -> Option<Datagram>;
    /// Remembers it, instead of what was known of one with this key.
    fn set_datagram(&self, key: &FragmentKey, datagram: &Datagram) -> Result<(), InsertError>;
    /// An identification that no other datagram of the last 2^32 has, and whose lower half none of the last 65536; two CPUs at once may get
    /// the same.
    fn next_identification(&self) -> u32;
    /// Counts what a new flow met at its target.
    fn count(&self, target: u32, event: TargetEvent);
    /// The largest IP packet that can leave by this slot, in bytes; 0: not known.
    fn mtu(&self, interface: u16) -> Mtu;
    /// How a packet leaves by this slot, if there is such an interface; in the kernel, this is where the redirect is set up.
    fn egress(&self, interface: u16) -> Option<Egress>;
}

impl VpcAddress {
    /// `address` in `vpc`.
    #[inline(always)]
    pub const fn new(vpc: u16, address: Ip) -> Self {
        Self { address, vpc, reserved: [0; 3] }
    }

    /// The IPv4 address `address` in `vpc`.
    #[inline(always)]
    pub const fn ipv4(vpc: u16, address: Ipv4) -> Self {
        Self::new(vpc, Ip::from_ipv4(address))
    }
}
