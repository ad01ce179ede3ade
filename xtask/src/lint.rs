//! Formatting, clippy, licences, and who may import whom.
//!
//! Licences are read from `cargo metadata` here, rather than by cargo-deny: building that takes longer than everything else that CI
//! does, and its database of advisories is not in a package registry.

use crate::{cargo, root, run, setup};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Licences that code may have which is linked with ours or builds it, and why.
const LICENCES: [(&str, &str); 15] = [
    ("Apache-2.0", "our own"),
    ("Apache-2.0 WITH LLVM-exception", "asks for less than our own"),
    ("MIT", "asks for its notice to be kept"),
    ("MIT-0", "asks for nothing"),
    ("BSD-2-Clause", "asks for its notice to be kept"),
    ("BSD-3-Clause", "asks for its notice to be kept, and for its name not to be used"),
    ("ISC", "asks for its notice to be kept"),
    ("Zlib", "asks not to be misrepresented"),
    ("Unicode-3.0", "asks for its notice to be kept with tables of characters"),
    ("Unlicense", "asks for nothing"),
    ("CC0-1.0", "asks for nothing"),
    ("0BSD", "asks for nothing"),
    ("BSL-1.0", "asks for its notice to be kept in source"),
    ("NCSA", "asks for its notice to be kept; the fuzzer's, which is in nothing that we ship"),
    ("MPL-2.0", "asks for changes to its own files, of which we make none"),
];

/// Which of our crates a crate may know.
const CRATES: [(&str, &[&str]); 6] = [
    ("privatelink-common", &[]),
    ("privatelink-fuzz", &["privatelink-common"]),
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
        "privatelink-fuzz",
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

/// Of what is built for Linux; dependencies name crates for other systems, too.
fn metadata() -> Result<Value> {
    let platform = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let output = cargo()
        .args(["metadata", "--format-version", "1", "--filter-platform", &platform])
        .output()
        .context("cannot run cargo metadata")?;
    ensure!(output.status.success(), "cargo metadata failed: {}", String::from_utf8_lossy(&output.stderr));
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn packages(metadata: &Value) -> impl Iterator<Item = &Value> {
    metadata["packages"].as_array().into_iter().flatten()
}

fn licences(metadata: &Value) -> Result<()> {
    for package in packages(metadata) {
        let (name, licence) = (&package["name"], package["license"].as_str().unwrap_or("none"));
        let one = |it: &str| LICENCES.iter().any(|(name, _)| *name == it.trim().trim_matches(['(', ')']));
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
    let rules: [(&str, &str, &[&str]); 7] = [
        ("privatelink-common/src/path", "crate::plan", &[]),
        ("privatelink-common/src/plan", "crate::path", &[]),
        ("privatelink-common/src/plan", "super::super::path", &[]),
        ("privatelink-common/src", "aya::", &[]),
        ("privatelink-user/src", "aya::programs", &["kernel.rs"]),
        ("privatelink-user/src", "unsafe {", &["sys.rs"]),
        ("privatelink-user/src", "Command::Update", &["maps.rs", "sys.rs"]),
    ];
    for (dir, forbidden, except) in rules {
        for path in sources(&root().join(dir))? {
            let excepted = except.iter().any(|name| path.ends_with(name));
            let text = fs::read_to_string(&path)?;
            let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
            let uses = code.filter(|line| line.contains(forbidden)).count();
            ensure!(excepted || uses == 0, "{} must not use {forbidden}", path.display());
        }
    }
    Ok(())
}

/// The source files below a directory.
fn sources(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            files.extend(sources(&path)?);
        } else if path.extension().is_some_and(|it| it == "rs") {
            files.push(path);
        }
    }
    Ok(files)
}
