//! What may happen to a packet, each with the one name that counters, commands, metrics and tests use.

use crate::tables::Egress;

/// Declares a fieldless enum whose variants have a code, a name and a meaning, all written once.
macro_rules! words {
    ($(#[$meta:meta])* $name:ident { $($(#[doc = $doc:literal])+ $variant:ident = $code:literal => $word:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u64)]
        pub enum $name { $($(#[doc = $doc])+ $variant = $code,)+ }

        impl $name {
            /// Every variant, in the order of the codes.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// Index of the counter, within one VPC's [`crate::limits::OUTCOMES`].
            #[inline(always)]
            pub const fn code(self) -> u32 { self as u32 }

            /// The variant with this code.
            #[inline(always)]
            pub const fn from_code(code: u32) -> Option<Self> {
                match code { $($code => Some(Self::$variant),)+ _ => None }
            }

            /// The word for it everywhere outside this program.
            pub const fn name(self) -> &'static str { match self { $(Self::$variant => $word),+ } }

            /// What it means, as a sentence for the operator.
            pub const fn meaning(self) -> &'static str { match self { $(Self::$variant => concat!($($doc),+)),+ } }
        }
    };
}

words! {
    /// An answer that the path itself sends back where the packet came from.
    Answer {
        /// An ARP request for an endpoint's, a load balancer's or a resolver's address.
        ArpReply = 2 => "arp_reply",
        /// An ICMP or ICMPv6 echo request to an endpoint address with `ping = true`.
        EchoReply = 3 => "echo_reply",
        /// A TCP segment that neither opens a flow nor belongs to one: answered with RST.
        ResetNoFlow = 4 => "reset_no_flow",
        /// A new TCP flow for which there is no registered target: answered with RST.
        ResetNoTarget = 5 => "reset_no_target",
        /// A new TCP flow for which no NAT port is free: answered with RST (AWS: PortAllocationErrorCount).
        ResetNoPort = 6 => "reset_no_port",
        /// A TCP flow that was about to be established while the table is full: answered with RST.
        ResetTableFull = 7 => "reset_table_full",
        /// A segment of a TCP flow that was cut, since its target is unhealthy or deregistered, or its endpoint rejected: answered with RST.
        ResetTerminated = 8 => "reset_terminated",
        /// A SYN to an endpoint that is flooded with them: answered with a SYN cookie, and not remembered.
        SynCookie = 9 => "syn_cookie",
        /// A right SYN cookie of an endpoint that may not open another flow now: answered with RST.
        ResetQuota = 10 => "reset_quota",
        /// A packet, of IPv4 one with DF, that is larger than the endpoint or the next interface takes: answered with an ICMP error that says what is.
        FragmentationNeeded = 12 => "fragmentation_needed",
        /// A packet whose TTL ends here: answered with an ICMP error.
        TimeExceeded = 13 => "time_exceeded",
        /// A neighbour solicitation for an endpoint's, a load balancer's or a resolver's IPv6 address.
        NeighbourAdvertisement = 14 => "neighbour_advertisement",
    }
}

words! {
    /// Why a packet was dropped. The error type of the path.
    DropReason {
        /// Headers that contradict themselves or the packet's length.
        Malformed = 16 => "malformed",
        /// A fragment of a packet that is not UDP, to or from one of our addresses.
        Fragment = 17 => "fragment",
        /// IP options, to or from one of our addresses.
        IpOptions = 18 => "ip_options",
        /// The sender claims an address that is ours: an endpoint's, a load balancer's or a resolver's.
        SpoofedSource = 19 => "spoofed_source",
        /// A packet to an endpoint or a resolver from an address outside the VPC's CIDRs.
        SourceOutsideVpc = 20 => "source_outside_vpc",
        /// No listener has this port and protocol; silent, as on AWS.
        NoListener = 21 => "no_listener",
        /// A RST or a datagram that belongs to no flow.
        NoFlow = 22 => "no_flow",
        /// A new connection to a load balancer's address from the provider's side; only consumers open flows.
        ProviderInitiated = 23 => "provider_initiated",
        /// ICMP or ICMPv6 other than an answered echo request, neighbour discovery and an error about a flow; or such an error that has no meaning in the family that it would go to.
        IcmpUnsupported = 24 => "icmp_unsupported",
        /// A protocol other than TCP, UDP, ICMP and ICMPv6.
        ProtocolUnsupported = 25 => "protocol_unsupported",
        /// A new flow of an endpoint whose connection the provider has not accepted.
        EndpointClosed = 26 => "endpoint_closed",
        /// A new UDP flow for which there is no registered target.
        NoTarget = 27 => "no_target",
        /// The link-layer address of a target, or of who is to hear from a resolver, is not known.
        NoNextHop = 28 => "no_next_hop",
        /// A new UDP flow for which no NAT port is free.
        NoNatPort = 29 => "no_nat_port",
        /// The flow tables have no room for this flow; flows that are established live on.
        FlowTableFull = 30 => "flow_table_full",
        /// The interface that the packet should leave by is gone.
        NoInterface = 31 => "no_interface",
        /// A new flow of an endpoint that has opened as many this second as it may.
        EndpointRate = 32 => "endpoint_rate",
        /// A new flow of an endpoint that has as many flows as it may.
        EndpointFull = 33 => "endpoint_full",
        /// A packet that would open a flow, or asks at a resolver's inbound address, and that the security groups there do not allow; silent, as on AWS.
        SecurityGroup = 34 => "security_group",
        /// The same of the load balancer's security groups.
        LoadBalancerSecurityGroup = 35 => "load_balancer_security_group",
        /// A packet that a network ACL of either side denies.
        NetworkAcl = 36 => "network_acl",
        /// IPv6 extension headers, to or from one of our addresses.
        ExtensionHeader = 40 => "extension_header",
        /// An IPv4 datagram without a UDP checksum that would have to become IPv6, where it must have one, and of which none can be
        /// computed: one in fragments, or one that a device has yet to cut.
        UdpChecksumMissing = 41 => "udp_checksum_missing",
        /// A packet larger than the endpoint or the next interface takes, where no ICMP error can or may say so.
        TooBig = 48 => "too_big",
        /// A packet whose TTL ends here, where no ICMP error may say so.
        TtlExpired = 49 => "ttl_expired",
        /// An ICMP error that does not hold the header, and eight bytes of what follows, of a packet such as we send.
        IcmpMalformed = 50 => "icmp_malformed",
        /// An ICMP error about a packet that was not sent from the address that the error came to.
        IcmpForged = 51 => "icmp_forged",
        /// An ICMP error about a packet of no flow.
        IcmpNoFlow = 52 => "icmp_no_flow",
        /// A later fragment whose first one has not come, was refused, or is forgotten.
        FragmentUnknown = 53 => "fragment_unknown",
        /// A later fragment that overlaps another, came twice, or is not of its datagram's size.
        FragmentOverlap = 54 => "fragment_overlap",
        /// A first fragment smaller than what every link can carry.
        FragmentTiny = 55 => "fragment_tiny",
        /// A fragment for which the table of fragmented datagrams has no room, or what holds those that come before their first.
        FragmentTableFull = 56 => "fragment_table_full",
        /// An ICMP error about a TCP segment that is not in flight: one that was not sent, or that was acknowledged.
        IcmpOutOfWindow = 57 => "icmp_out_of_window",
        /// A datagram that is to take the Proxy Protocol's header along, in fragments or yet to be cut into datagrams, where the header has no place.
        NoHeaderRoom = 58 => "no_header_room",
        /// A question to a resolver from an address that had not asked lately, of which there were as many this second as may be.
        ResolverRate = 59 => "resolver_rate",
        /// A segment that would come to its target before the Proxy Protocol's header: a SYN with data, what comes before the target has answered, or before the stream's first byte.
        AheadOfHeader = 60 => "ahead_of_header",
        /// A packet in a link-layer broadcast or multicast to which there would be an answer, which there may not be then (RFC 1122, 3.2.2).
        LinkLayerGroup = 61 => "link_layer_group",
    }
}

/// Which way a packet of a flow goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Direction {
    /// From the consumer, to a target.
    ToProvider = 0,
    /// From a target, back to the consumer.
    ToConsumer = 1,
}

/// What a forwarded packet did to its flow, beyond belonging to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum FlowEvent {
    /// Nothing that is counted.
    None = 0,
    /// It opened the flow.
    Opened = 1,
    /// It carried a RST.
    Reset = 2,
}

/// What the path decided about a packet that it does not drop. The frame has been changed accordingly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Not ours; untouched.
    Pass,
    /// A packet of a flow, rewritten; to be sent out of `interface`.
    Forward {
        /// Slot of the interface to leave by.
        interface: u16,
        /// Endpoint to account to.
        endpoint: u32,
        /// Which way.
        direction: Direction,
        /// What to count beside packets and bytes.
        event: FlowEvent,
        /// Whether it leaves as IPv6.
        ipv6: bool,
    },
    /// Between a VPC and its own stack; to be sent out of `interface`.
    Steer {
        /// Slot of the interface to leave by.
        interface: u16,
    },
    /// The frame has become the answer; to be sent back out of the interface it came by. Holds [`Answer::code`].
    Answer(u32),
    /// A later fragment that comes before the first of its datagram; untouched. To be held, where there is somebody who does, until
    /// that one has come, and then to go the same way again; where not, it is a [`DropReason::FragmentUnknown`].
    Hold,
}

/// A part of the path that a host may keep apart from the rest. The kernel's verifier goes through a function again for each way in which
/// a program comes to it, but only once through one that it is to verify by itself, and which therefore may take nothing for granted but
/// the frame and the room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// What a VPC's own stack sends.
    Stack,
    /// ARP.
    Arp,
    /// An IPv4 packet that is neither a segment nor a datagram, or not a whole one.
    Aside,
    /// An ICMP error over IPv4.
    Error,
    /// A packet of no established flow that is IPv4 on both sides, or one for which its rewrite is not all that there is to do.
    Slow,
    /// An IPv4 packet that may belong to a flow whose other side is IPv6.
    Translated,
    /// Which wide flow it is that a packet belongs to, or opens.
    FindWide,
    /// A frame of IPv6.
    Wide,
    /// A packet whose two sides count differently.
    Carry,
    /// The same of a wide flow.
    CarryWide,
}

/// An [`Action`], as one word: kind, direction and event, interface, endpoint or answer, from the lowest byte on.
///
/// One word, as [`DropReason`] is one, so that the two halves of the path's `Result` lie over each other and no part of it is ever
/// undefined: the compiler may read ahead of a branch, the kernel's verifier does not allow it to read what nothing has set.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Verdict(u64);

impl Verdict {
    /// [`Action::Pass`].
    pub const PASS: Self = Self(0);
    /// [`Action::Hold`].
    pub const HOLD: Self = Self(Self::HELD);
    /// What the path says to itself of a packet that may belong to a flow.
    pub(crate) const FLOW: Self = Self(7);
    const GO_ON: u64 = 6;
    const FORWARD: u64 = 1;
    const STEER: u64 = 2;
    const ANSWER: u64 = 3;
    const DROP: u64 = 4;
    const HELD: u64 = 5;
    const TAGGED: u32 = 12;

    /// What the path says to itself of a packet with which a part of it goes on.
    #[inline(always)]
    pub(crate) const fn go_on(part: Part) -> Self {
        Self(Self::GO_ON | (part as u64) << 32)
    }

    /// The part that goes on, if it says so.
    #[inline(always)]
    pub(crate) const fn part(self) -> Option<Part> {
        const fn is(word: u64, part: Part) -> bool {
            word == Verdict::go_on(part).0
        }
        match self.0 {
            word if word & 0xff != Self::GO_ON => None,
            word if is(word, Part::Slow) => Some(Part::Slow),
            word if is(word, Part::Translated) => Some(Part::Translated),
            word if is(word, Part::Wide) => Some(Part::Wide),
            word if is(word, Part::Error) => Some(Part::Error),
            word if is(word, Part::Arp) => Some(Part::Arp),
            word if is(word, Part::Stack) => Some(Part::Stack),
            _ => Some(Part::Aside),
        }
    }

    /// [`Action::Forward`].
    #[inline(always)]
    pub const fn forward(
        interface: u16,
        endpoint: u32,
        direction: Direction,
        event: FlowEvent,
        ipv6: bool,
    ) -> Self {
        let flags = direction as u64 | (event as u64) << 1 | (ipv6 as u64) << 3;
        Self(Self::FORWARD | flags << 8 | (interface as u64) << 16 | (endpoint as u64) << 32)
    }

    /// [`Action::Steer`].
    #[inline(always)]
    pub const fn steer(interface: u16) -> Self {
        Self(Self::STEER | (interface as u64) << 16)
    }

    /// The same, of a packet that leaves so; none where it cannot.
    #[inline(always)]
    pub fn leaving(self, how: Option<Egress>) -> Result<Self, DropReason> {
        let Some(Egress(tagged)) = how else { return Err(DropReason::NoInterface) };
        Ok(Self(self.0 | tagged << Self::TAGGED))
    }

    /// Whether tags are still to be put on it.
    #[inline(always)]
    pub const fn is_tagged(self) -> bool {
        self.0 >> Self::TAGGED & 1 != 0
    }

    /// [`Action::Answer`], by its [`Answer::code`].
    #[inline(always)]
    pub const fn answer(code: u32) -> Self {
        Self(Self::ANSWER | (code as u64) << 32)
    }

    /// Both halves of a stage's result in one register, which is all that a function of the kernel can return.
    #[inline(always)]
    pub fn of(result: Result<Self, DropReason>) -> Self {
        match result {
            Ok(verdict) => verdict,
            Err(reason) => Self(Self::DROP | (reason as u64) << 32),
        }
    }

    /// The result that [`Verdict::of`] was made from.
    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "cut out at its own width")]
    pub fn result(self) -> Result<Self, DropReason> {
        if self.0 & 0xff != Self::DROP {
            return Ok(self);
        }
        Err(DropReason::from_code((self.0 >> 32) as u32).unwrap_or(DropReason::Malformed))
    }

    /// The word.
    #[inline(always)]
    pub const fn word(self) -> u64 {
        self.0
    }

    /// The verdict with this word, which [`Verdict::word`] returned.
    #[inline(always)]
    pub const fn from_word(word: u64) -> Self {
        Self(word)
    }

    /// What it says.
    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "each part is cut out at its own width")]
    pub const fn action(self) -> Action {
        let (interface, upper) = ((self.0 >> 16) as u16, (self.0 >> 32) as u32);
        match self.0 & 0xff {
            Self::FORWARD => {
                let direction =
                    if self.0 >> 8 & 1 == 0 { Direction::ToProvider } else { Direction::ToConsumer };
                let event = match self.0 >> 9 & 3 {
                    0 => FlowEvent::None,
                    1 => FlowEvent::Opened,
                    _ => FlowEvent::Reset,
                };
                Action::Forward { interface, endpoint: upper, direction, event, ipv6: self.0 >> 11 & 1 != 0 }
            }
            Self::STEER => Action::Steer { interface },
            Self::ANSWER => Action::Answer(upper),
            Self::HELD => Action::Hold,
            _ => Action::Pass,
        }
    }
}

impl core::fmt::Debug for Verdict {
    fn fmt(&self, formatter: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.action().fmt(formatter)
    }
}

/// Counter of packets that were passed, within one VPC's [`crate::limits::OUTCOMES`].
pub const PASSED: u32 = 0;
/// Counter of packets between a VPC and its own stack, likewise.
pub const STEERED: u32 = 1;
/// Counter of later fragments that are held, since they have come before the first of their datagram, likewise. What becomes of them
/// then is counted, too.
pub const FRAGMENT_EARLY: u32 = 15;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::OUTCOMES;
    use std::collections::BTreeSet;
    use std::format;

    #[test]
    fn the_readme_has_every_reason_with_its_meaning() {
        let rows =
            DropReason::ALL.iter().map(|it| format!("| `{}` | {} |\n", it.name(), it.meaning().trim()));
        let table = format!("| reason | meaning |\n|---|---|\n{}\n", rows.collect::<std::string::String>());
        assert!(include_str!("../../README.md").contains(&table), "the README should have\n{table}");
    }

    #[test]
    fn every_outcome_has_its_own_counter_and_name() {
        let mut codes = BTreeSet::from([PASSED, STEERED, FRAGMENT_EARLY]);
        let mut names = BTreeSet::from(["passed", "steered", "fragment_early"]);
        let answers = Answer::ALL.iter().map(|a| (a.code(), a.name()));
        let drops = DropReason::ALL.iter().map(|r| (r.code(), r.name()));
        for (code, name) in answers.chain(drops) {
            assert!(
                codes.insert(code) && code < OUTCOMES,
                "{name} shares or exceeds the counters with {code}"
            );
            assert!(names.insert(name), "{name} is used twice");
        }
    }
}
