//! The packet path, the agent and the tables, each figure against something that ran in the same minute.
//!
//! Each part happens in a network namespace of its own, so nothing of it is left when it ends.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::cast_possible_truncation,
    missing_docs,
    reason = "a benchmark, which talks to a person"
)]

mod bulk;
mod established;
mod fairness;
mod flood;
mod footprint;
mod opening;
mod report;
mod rules;
mod throughput;
mod world;

use report::Report;
use std::path::PathBuf;
use world::World;

/// A part of the benchmark.
type Part = fn(&mut Report);

/// What is measured, by the name that chooses it.
const PARTS: [(&str, Part); 8] = [
    ("established", established::run),
    ("new-flow", opening::run),
    ("rules", rules::run),
    ("udp-pps", throughput::run),
    ("bulk", bulk::run),
    ("syn-flood", flood::run),
    ("fairness", fairness::run),
    ("footprint", footprint::run),
];

fn main() {
    let mut arguments = std::env::args().skip(1);
    let (mut json, mut chosen) = (None, Vec::new());
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--json" => json = Some(PathBuf::from(arguments.next().expect("--json needs a file"))),
            // What cargo passes to every benchmark.
            "--bench" => {}
            name => chosen.push(name.to_owned()),
        }
    }
    let mut report = Report::default();
    for (name, run) in PARTS {
        if chosen.is_empty() || chosen.iter().any(|it| it == name) {
            World::enter();
            run(&mut report);
        }
    }
    if let Some(path) = json {
        report.write(&path);
    }
}
