//! The packet path on the host, against the kernel's, and at its limits.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    reason = "tests: a panic with its place is what is wanted"
)]

mod capacity;
mod heads;
mod live;
mod memory;
mod rules;
mod streams;
mod tags;
mod time;
mod twin;
