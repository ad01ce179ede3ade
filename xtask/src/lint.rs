//! Formatting, clippy, licences, and who may import whom.
//!
//! Licences are read from `cargo metadata` here, rather than by cargo-deny: building that takes longer than everything else that CI
//! does, and its database of advisories is not in a package registry.

use crate::{cargo, root, run, setup};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::fs;
use std::process::Command;

/// Licences that Apache-2.0 code may be shipped with, and those of build-time tools.
const LICENCES: [&str; 14] = [
    "Apache-2.0",
    "MIT",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "Zlib",
    "Unicode-3.0",
    "Unlicense",
    "CC0-1.0",
    "0BSD",
    "BSL-1.0",
    "Apache-2.0 WITH LLVM-exception",
    "MIT-0",
    "MPL-2.0",
];

/// Which of our crates a crate may know.
const CRATES: [(&str, &[&str]); 5] = [
    ("privatelink-common", &[]),
    ("privatelink-ebpf", &["privatelink-common"]),
    ("privatelink-user", &["privatelink-common"]),
    ("privatelink-tests", &["privatelink-common"]),
    ("xtask", &[]),
];

/// Everything.
pub(crate) fn lint() -> Result<()> {
    setup::toolchain()?;
    run(cargo().args(["fmt", "--all", "--check"]))?;
    let host = [
        "clippy",
        "-p",
        "privatelink-common",
        "-p",
        "privatelink-user",
        "-p",
        "privatelink-tests",
        "-p",
        "xtask",
    ];
    // The object itself is not needed to lint its loader.
    run(cargo().env("PRIVATELINK_EBPF_SKIP", "1").args(host).args([
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ]))?;
    kernel_clippy()?;
    let metadata = metadata()?;
    licences(&metadata)?;
    crates(&metadata)?;
    modules()
}

/// Clippy on the eBPF crate, for the kernel's target: with the toolchain that can build core for it.
fn kernel_clippy() -> Result<()> {
    let arguments = [
        "clippy",
        "-p",
        "privatelink-ebpf",
        "--bins",
        "--release",
        "--target",
        "bpfel-unknown-none",
        "-Z",
        "build-std=core",
    ];
    let mut command = if setup::nightly_has_source() {
        let mut command = Command::new("rustup");
        command.args(["run", "nightly", "cargo"]);
        command
    } else {
        setup::install(&["rust-web-clippy"])?;
        let mut command = Command::new("/usr/bin/cargo-clippy");
        // Debian's own, not rustup's, which cargo would find first.
        command.env("PATH", "/usr/bin:/bin").env("CARGO", "/usr/bin/cargo").env("RUSTC", "/usr/bin/rustc");
        command.env("RUSTC_BOOTSTRAP", "1").env_remove("RUSTUP_TOOLCHAIN");
        command
    };
    command.current_dir(root()).args(arguments).args([
        "--target-dir",
        "target/lint-ebpf",
        "--",
        "-D",
        "warnings",
    ]);
    run(&mut command)
}

fn metadata() -> Result<Value> {
    let output =
        cargo().args(["metadata", "--format-version", "1"]).output().context("cannot run cargo metadata")?;
    ensure!(output.status.success(), "cargo metadata failed: {}", String::from_utf8_lossy(&output.stderr));
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn packages(metadata: &Value) -> impl Iterator<Item = &Value> {
    metadata["packages"].as_array().into_iter().flatten()
}

fn licences(metadata: &Value) -> Result<()> {
    for package in packages(metadata) {
        let (name, licence) = (&package["name"], package["license"].as_str().unwrap_or("none"));
        let one = |it: &str| LICENCES.contains(&it.trim().trim_matches(['(', ')']));
        let either = |it: &str| it.split(" OR ").flat_map(|it| it.split('/')).any(one);
        ensure!(
            licence.split(" AND ").all(either),
            "{name} has the licence {licence}, which is not in xtask's list"
        );
    }
    Ok(())
}

fn crates(metadata: &Value) -> Result<()> {
    for (name, allowed) in CRATES {
        let package =
            packages(metadata).find(|it| it["name"] == name).with_context(|| format!("no package {name}"))?;
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let other = dependency["name"].as_str().unwrap_or_default();
            let ours = CRATES.iter().any(|(name, _)| *name == other);
            ensure!(!ours || allowed.contains(&other), "{name} must not know {other}");
        }
    }
    Ok(())
}

/// `path` and `plan` meet in `tables`, and nowhere else; user space reaches maps and programs by one module each.
fn modules() -> Result<()> {
    let rules = [
        ("privatelink-common/src/path", "crate::plan"),
        ("privatelink-common/src/plan", "crate::path"),
        ("privatelink-common/src", "aya"),
    ];
    for (dir, forbidden) in rules {
        for entry in fs::read_dir(root().join(dir))? {
            let path = entry?.path();
            if path.extension().is_none_or(|it| it != "rs") {
                continue;
            }
            let text = fs::read_to_string(&path)?;
            let uses =
                text.lines().find(|line| line.trim_start().starts_with("use ") && line.contains(forbidden));
            ensure!(uses.is_none(), "{} must not use {forbidden}", path.display());
        }
    }
    for entry in fs::read_dir(root().join("privatelink-user/src"))? {
        let path = entry?.path();
        let text = fs::read_to_string(&path)?;
        let module = path.file_stem().map(|it| it.to_string_lossy().into_owned()).unwrap_or_default();
        ensure!(
            module == "kernel" || !text.contains("aya::programs"),
            "only kernel.rs names aya's programs, not {module}"
        );
        ensure!(module == "sys" || !text.contains("unsafe {"), "only sys.rs has unsafe code, not {module}");
    }
    Ok(())
}
