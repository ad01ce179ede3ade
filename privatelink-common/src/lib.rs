//! The packet path of privatelink, and the tables it reads.
//!
//! One implementation with two hosts: the XDP program (`privatelink-ebpf`) and ordinary processes (tests, `privatelink explain`).
//! Nothing here allocates, panics by design, or knows whether it runs in the kernel.
//!
//! ```text
//! words   limits  verdict            what may happen to a packet, and its names
//! bytes   frame  wire  checksum      how headers are read and changed
//! tables  tables                     every map's key and value; the trait by which the path reaches them
//! path    path/*                     the packet's way, in order: start at path::forward
//! plan    plan/*                     what fills the tables (Maglev)
//! beside  capture  held              what is told of packets to those who watch, and to who holds some
//! ```
//!
//! Glossary (AWS's words): a *VPC* is one private address space; a *consumer* has an *endpoint*, an address in its VPC;
//! a *provider* publishes an *endpoint service* behind a *load balancer*, whose *listeners* send new flows to the *targets* of a
//! *target group*. A *flow* is one connection (TCP) or exchange (UDP): two table entries, one a direction. The *stack* of a VPC
//! is the network namespace in which the agent itself opens sockets inside that VPC.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

pub mod capture;
pub mod checksum;
pub mod frame;
pub mod held;
pub mod limits;
pub mod path;
pub mod plan;
pub mod tables;
pub mod verdict;
pub mod wire;
