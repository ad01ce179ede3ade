//! Every capacity and time of the path, each with its reason. Times are whole seconds.

use core::ops::Range;

/// Layout of the pinned maps. It changes whenever a key or a value changes its meaning; an agent refuses maps of another layout.
pub const LAYOUT: u32 = 14;

/// First of the source ports that the load balancer uses towards targets, up to 65535: [`NAT_PORT_COUNT`] ports, which AWS's 55,000
/// flows for each target and load balancer address fit into (edit-target-group-attributes).
pub const NAT_PORT_FIRST: u16 = 2048;

/// How many NAT ports there are.
pub const NAT_PORT_COUNT: u32 = 65536 - NAT_PORT_FIRST as u32;

/// Ports of a load balancer's or a resolver's address that belong to the sockets of the VPC's own stack (health checks, questions to other
/// name servers).
pub const STACK_PORTS: Range<u16> = 1024..2048;

/// The port that resolvers listen at (RFC 1035, 4.2).
pub const DNS: u16 = 53;

/// How many addresses that have asked a resolver are remembered: an answer takes milliseconds, so that these are many clients at a time.
pub const CALLERS: usize = 32768;

/// How many of these may be new in a second at one resolver, so that nobody who forges sources has all of those of others forgotten while
/// they wait for their answers: it takes one half a minute.
pub const NEW_CALLERS: u32 = 1024;

/// How many NAT ports are tried before a new flow is refused. Bounded, because the kernel bounds a program's length; at this many
/// AWS's 55,000 flows, which take 87 % of the ports, leave one chance in about ten thousand that none is found.
pub const NAT_PROBES: u32 = 64;

/// TCP idle timeout unless the listener sets its own (AWS: `tcp.idle_timeout.seconds`).
pub const TCP_IDLE: u16 = 350;

/// UDP idle timeout, fixed (AWS: network-load-balancers, connection idle timeout).
pub const UDP_IDLE: u16 = 120;

/// How long a TCP flow may take to open. Linux gives a connecting client up to about two minutes, but it keeps retransmitting its
/// SYN, and each one refreshes the flow.
pub const TCP_OPENING: u16 = 60;

/// How long both directions are kept after both sides sent FIN, unless the load balancer sets its own: Linux's TIME_WAIT, so that a
/// NAT port is not used again while its target still remembers the last connection from it. Also how long a flow that was cut is kept.
pub const TCP_CLOSED: u16 = 60;

/// How long a flow is kept after a RST that nothing contradicts. As long as a closed one: the RST may be forged or out of its window,
/// and then one side speaks again.
pub const TCP_RESET: u16 = 60;

/// How long both sides must have been silent after a RST for a segment to contradict it: longer than anything is on its way.
pub const TCP_RESET_ECHO: u32 = 2;

/// The largest IP packet that an endpoint carries unless it sets its own, in bytes (AWS: vpc-limits-endpoints).
pub const ENDPOINT_MTU: u16 = 8500;

/// For how many seconds later fragments may follow their first (RFC 791 suggests 15; Linux waits 30).
pub const FRAGMENT_TIMEOUT: u32 = 30;

/// Datagrams in fragments that are remembered at a time.
pub const FRAGMENTED_DATAGRAMS: usize = 8192;

/// For how many seconds a later fragment that has come before its first is held. Two ways that packets take differ by milliseconds.
pub const HELD_FOR: u32 = 1;

/// Later fragments that a VPC may have held in a window of [`HELD_WINDOW`]: what the largest datagrams that come backwards have, eleven at
/// once; nearly 8000 a second, which costs the agent a tenth of a CPU.
pub const HELD_BURST: u32 = 512;

/// How long such a window is: 2 to the power of this, in nanoseconds; 67 ms.
pub const HELD_WINDOW: u32 = 26;

/// Bytes of them that may be on their way to the agent at a time, of a VPC: a part of what the buffers have room for, so that none can
/// fill these, however long the agent does not come to read.
pub const HELD_ON_THE_WAY: u64 = 256 << 10;

/// Fragments that are held at a time, of a VPC and in all.
pub const HELD_FRAGMENTS: [usize; 2] = [512, 4096];

/// Bytes of them, likewise.
pub const HELD_BYTES: [usize; 2] = [1 << 20, 8 << 20];

/// The least that a first fragment carries: what fits into the 68 bytes that every link can carry (RFC 791, 3.2) with the shortest header.
pub const SMALLEST_FRAGMENT: u16 = 48;

/// How many ICMP errors an endpoint sends in a second, to both sides together: many enough for every host behind it to learn an MTU soon,
/// few enough to be of no use to somebody who wants them sent to another.
pub const ICMP_ERRORS: u32 = 100;

/// The lowest that an MSS is set to: what every IPv4 link can carry, 68 bytes (RFC 791, 3.2), without headers.
pub const LOWEST_MSS: u16 = 28;

/// How many TCP options are looked through for the MSS, those that do nothing included. Every usual system sends the MSS first; each more
/// is thousands of instructions to the kernel's verifier.
pub const TCP_OPTIONS: u32 = 6;

/// For how many seconds an endpoint's SYNs are answered with cookies after the last second that asked for it: longer than a flood
/// takes a breath, so that it does not fill `pending` anew each time.
pub const COOKIES_HOLD: u32 = 10;

/// For how many seconds more the path believes cookies: the kernel's live for two minutes (MAX_SYNCOOKIE_AGE).
pub const COOKIE_LIFE: u32 = 120;

/// The part of the flows that `pending` holds which an endpoint's unconfirmed SYNs may take in a second before SYN cookies are
/// switched on for it by `auto`.
pub const COOKIES_SHARE: u32 = 8;

/// The MSS that a SYN cookie's SYN-ACK announces: the target's is not known yet, and Ethernet's fits nearly everywhere.
pub const COOKIE_MSS: u16 = 1460;

/// Entries of each of the two tables of rules; they take memory only where there are rules.
pub const RULE_ENTRIES: u32 = 1 << 20;

/// Rules of a set are bits of so many words: 512 rules, which five security groups of 60 (AWS's quotas) fit into, and one of 100 more.
pub const RULE_WORDS: usize = 8;

/// Outcomes that can be counted for a VPC; the counters' index is `vpc * OUTCOMES + outcome`.
pub const OUTCOMES: u32 = 64;
