//! Every input that ever broke a target, and the packets of real captures, in every test run.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests: a panic with its place is what is wanted")]

use privatelink_fuzz::{TARGETS, seeds, target};
use std::fs;
use std::path::Path;

#[test]
fn no_input_that_ever_broke_a_target_breaks_it_again() {
    let crashes = Path::new(env!("CARGO_MANIFEST_DIR")).join("crashes");
    for dir in fs::read_dir(crashes).unwrap().map(|it| it.unwrap().path()).filter(|it| it.is_dir()) {
        let name = dir.file_name().unwrap().to_str().unwrap().to_owned();
        let run = target(&name).unwrap_or_else(|| panic!("crashes/{name} is no target's"));
        for file in fs::read_dir(&dir).unwrap() {
            let path = file.unwrap().path();
            eprintln!("{}", path.display());
            run(&fs::read(path).unwrap());
        }
    }
}

#[test]
fn every_target_holds_for_packets_that_were_captured_and_for_the_shortest_inputs() {
    assert!(seeds("parse").len() > 20 && seeds("path").len() > 1, "there are captures");
    for (name, run) in TARGETS {
        for seed in seeds(name) {
            run(&seed);
        }
        for byte in 0..=255 {
            run(&[byte; 64]);
        }
        run(&[]);
    }
}
