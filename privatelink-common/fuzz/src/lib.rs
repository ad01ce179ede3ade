//! What must hold for any input. A target is a function that panics where it does not.
//!
//! `cargo xtask fuzz` looks for such inputs, guided by coverage; what it finds is put into `crashes/TARGET/`, from where
//! `tests/replay.rs` replays it in every test run, as it does with the packets of `tests/captures`.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests: a panic with its place is what is wanted")]
#![allow(clippy::cast_possible_truncation, reason = "numbers are cut out of random ones")]

use std::fs;
use std::path::Path;

pub mod input;
#[path = "../../../tests/src/packet.rs"]
pub mod packet;
#[path = "../../../tests/src/pcapng.rs"]
pub mod pcapng;
pub mod targets;
pub mod view;
pub mod world;

/// Panics where what must hold does not.
pub type Target = fn(&[u8]);

/// All of them.
pub const TARGETS: [(&str, Target); 10] = [
    ("parse", targets::parse::run),
    ("nat", targets::nat::run),
    ("fragments", targets::fragments::run),
    ("errors", targets::errors::run),
    ("neighbour", targets::neighbour::run),
    ("streams", targets::streams::run),
    ("checksum", targets::checksum::run),
    ("maglev", targets::maglev::run),
    ("rules", targets::rules::run),
    ("path", targets::path::run),
];

/// The target of this name.
pub fn target(name: &str) -> Option<Target> {
    TARGETS.into_iter().find(|(target, _)| *target == name).map(|(_, run)| run)
}

/// A connection that is opened, used and closed from both sides, in the words of the target `path`.
const CONNECTION: [&[u8]; 8] = [
    &[0, 0, 8, 200, 0, 0, 0, 0, 0, 7, 0],
    &[5, 0, 7, 0, 0, 0, 0, 100],
    &[5, 0, 7, 0, 0, 0, 0, 150],
    &[5, 0, 7, 1, 2, 3, 4, 150],
    &[11, 0, 1, 0],
    &[5, 0, 7, 0, 0, 0, 0, 17],
    &[5, 0, 7, 0, 0, 0, 0, 17],
    &[5, 0, 7, 0, 0, 0, 0, 150],
];

/// Inputs that a target may begin with: the packets of `tests/captures`, and a connection.
pub fn seeds(target: &str) -> Vec<Vec<u8>> {
    let captures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/captures");
    let mut seeds = Vec::new();
    for file in fs::read_dir(captures).unwrap() {
        let records = pcapng::read(&fs::read(file.unwrap().path()).unwrap());
        let frames = records.iter().filter(|it| !it.outbound).map(|it| {
            let of_provider = it.comment.contains("vpc payments");
            (if of_provider { 2 } else { 0 }, it.bytes.as_slice())
        });
        match target {
            "parse" => seeds.extend(frames.map(|(slot, bytes)| [&[slot], bytes].concat())),
            "path" => seeds.push(
                frames
                    .filter(|(_, bytes)| bytes.len() < 256)
                    .flat_map(|(slot, bytes)| [&[9, slot, bytes.len() as u8], bytes].concat())
                    .collect(),
            ),
            _ => {}
        }
    }
    if target == "path" {
        seeds.push(CONNECTION.concat());
    }
    seeds
}
