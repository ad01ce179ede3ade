//! Proofs, from outside: the built binary in network namespaces of its own, and packets built by code that shares nothing with the
//! path under test.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests: a panic with its place is what is wanted")]

pub mod bench;
pub mod capture;
pub mod packet;
pub mod pcapng;
pub mod switch;
pub mod wire;
pub mod world;
