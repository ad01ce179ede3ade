//! Fuzzing by libFuzzer, with the stable compiler: what cargo-fuzz asks of a nightly one is its sanitizers, which find nothing in safe
//! code; the coverage that guides the fuzzer is a pass of LLVM's.

use crate::{Lack, cargo, root, run, setup};
use anyhow::{Context, Result, anyhow, ensure};
use std::fs;
use std::process::Command;
use std::sync::Mutex;

/// Every target, as in `privatelink-common/fuzz`.
const TARGETS: [&str; 10] =
    ["path", "parse", "nat", "fragments", "errors", "neighbour", "streams", "checksum", "maglev", "rules"];

/// How long each is fuzzed unless something else is asked for, in seconds: CI does so.
pub(crate) const SECONDS: u32 = 30;

/// Where random numbers begin unless something else is asked for: the same in every run of CI, so that what it finds is new in what is
/// tested, and not in the weather.
pub(crate) const SEED: u32 = 1;

/// What makes LLVM count which edges are taken and what is compared.
const COVERAGE: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares";

/// Fuzzes each of `targets`, or all, for so many seconds; an error where one breaks.
pub(crate) fn fuzz(targets: &[String], seconds: u32, seed: u32) -> Result<()> {
    setup::install(&["g++"])?;
    let triple = host()?;
    let target_dir = root().join("target/fuzz");
    run(cargo()
        .env("RUSTFLAGS", COVERAGE)
        .args(["build", "--package", "privatelink-fuzz", "--features", "libfuzzer", "--profile", "fuzz"])
        // With a target named, the flags are not those of build scripts.
        .args(["--target", &triple, "--target-dir"])
        .arg(&target_dir))?;
    let fuzzer = target_dir.join(&triple).join("fuzz/fuzz");
    let chosen: Vec<&str> =
        if targets.is_empty() { TARGETS.into() } else { targets.iter().map(String::as_str).collect() };
    if let Some(unknown) = chosen.iter().find(|it| !TARGETS.contains(it)) {
        return Err(Lack::Software(format!(
            "there is no target {unknown}; there are {}",
            TARGETS.join(", ")
        ))
        .into());
    }
    let (waiting, cpus) = (Mutex::new(chosen.into_iter()), std::thread::available_parallelism()?);
    let next = || waiting.lock().map_or(None, |mut it| it.next());
    let work = || -> Result<()> {
        while let Some(target) = next() {
            println!("xtask: fuzzing {target} for {seconds} s");
            one(&fuzzer, target, seconds, seed)?;
        }
        Ok(())
    };
    // One on each CPU; the others end what they are at where one breaks.
    let results: Vec<_> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..cpus.get()).map(|_| scope.spawn(work)).collect();
        workers.into_iter().map(std::thread::ScopedJoinHandle::join).collect()
    });
    results.into_iter().try_for_each(|result| result.map_err(|_| anyhow!("a fuzzing thread has panicked"))?)
}

fn one(fuzzer: &std::path::Path, target: &str, seconds: u32, seed: u32) -> Result<()> {
    let corpus = root().join("target/fuzz/corpus").join(target);
    let crashes = root().join("privatelink-common/fuzz/crashes").join(target);
    if seed == SEED {
        // What earlier runs have found would lead this one elsewhere than it goes on another machine.
        let _ = fs::remove_dir_all(&corpus);
    }
    for dir in [&corpus, &crashes] {
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    }
    let status = Command::new(fuzzer)
        .env("PRIVATELINK_FUZZ", target)
        .env("PRIVATELINK_FUZZ_SEEDS", &corpus)
        .env("RUST_BACKTRACE", "0")
        .arg(&corpus)
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-seed={seed}"))
        .arg(format!("-artifact_prefix={}/", crashes.display()))
        .args(["-max_len=1500", "-timeout=10", "-print_final_stats=1", "-verbosity=0"])
        .status()
        .with_context(|| format!("cannot run {}", fuzzer.display()))?;
    ensure!(
        status.success(),
        "{target} is broken by an input, which is in {}: commit it with the repair, and `cargo xtask test` replays it from then on",
        crashes.display()
    );
    // An empty directory is nothing to keep.
    let _ = fs::remove_dir(&crashes);
    Ok(())
}

fn host() -> Result<String> {
    let output = Command::new("rustc").arg("-vV").output().context("cannot run rustc")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let triple = text.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc names no host")?;
    Ok(triple.to_owned())
}
