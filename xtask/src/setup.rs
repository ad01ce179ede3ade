//! Installs what is missing, and says so. By package name only; nothing is done where nothing is missing.

use crate::{Lack, cargo, is_root, root, run};
use anyhow::{Context, Result};
use std::path::Path;
use std::process::{Command, Stdio};

/// Building core for the kernel, where no nightly of rustup's has its source.
const COMPILER: [&str; 3] = ["rustc-web", "cargo-web", "rust-web-src"];
/// Building bpf-linker.
const LLVM: [&str; 5] = ["llvm-22-dev", "libpolly-22-dev", "libzstd-dev", "zlib1g-dev", "g++"];
/// What tests and the demo run.
const TOOLS: [&str; 20] = [
    "bpftool",
    "nginx-light",
    "curl",
    "iperf3",
    "ethtool",
    "iproute2",
    "iputils-ping",
    "procps",
    "tcpdump",
    "socat",
    "util-linux",
    "openssl",
    "socat",
    "wrk",
    "haproxy",
    "nftables",
    "traceroute",
    "iputils-tracepath",
    "bind9-dnsutils",
    "dnsmasq-base",
];

/// The linker of eBPF objects, and the version that fits LLVM 22.
const LINKER: &str = "bpf-linker@0.13.0";

/// Everything.
pub(crate) fn everything() -> Result<()> {
    toolchain()?;
    tools()
}

/// What building needs.
pub(crate) fn toolchain() -> Result<()> {
    if !nightly_has_source() {
        install(&COMPILER)?;
    }
    if linker_is_there() {
        return Ok(());
    }
    install(&LLVM)?;
    println!("xtask: building {LINKER} into target/tools, once");
    run(cargo()
        .env("LLVM_PREFIX", "/usr/lib/llvm-22")
        .args(["install", LINKER, "--locked", "--no-default-features", "--features", "llvm-22", "--root"])
        .arg(root().join("target/tools")))
}

/// What tests and the demo need.
pub(crate) fn tools() -> Result<()> {
    install(&TOOLS)
}

fn linker_is_there() -> bool {
    root().join("target/tools/bin/bpf-linker").exists()
}

pub(crate) fn nightly_has_source() -> bool {
    let output = Command::new("rustup").args(["run", "nightly", "rustc", "--print", "sysroot"]).output();
    output.is_ok_and(|output| {
        let sysroot = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        output.status.success() && Path::new(&sysroot).join("lib/rustlib/src/rust/library/core").exists()
    })
}

fn is_installed(package: &str) -> bool {
    let query = Command::new("dpkg-query")
        .args(["-W", "-f", "${db:Status-Status}", package])
        .stderr(Stdio::null())
        .output();
    query.is_ok_and(|output| output.stdout == b"installed")
}

pub(crate) fn install(packages: &[&str]) -> Result<()> {
    let missing: Vec<_> = packages.iter().filter(|package| !is_installed(package)).copied().collect();
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing.join(" ");
    if !Path::new("/usr/bin/apt-get").exists() {
        return Err(Lack::Software(format!(
            "this system has no apt-get; what Debian calls {list} is missing: install it by this system's own means"
        ))
        .into());
    }
    if !is_root()? {
        return Err(Lack::Privilege(format!(
            "these packages are missing, and installing them needs root: apt-get install {list}"
        ))
        .into());
    }
    println!("xtask: installing {list}");
    let apt = |arguments: &[&str]| {
        let mut apt = Command::new("apt-get");
        // Packages with a service (nginx) must not start it.
        apt.env("DEBIAN_FRONTEND", "noninteractive")
            .env("RUNLEVEL", "1")
            .arg("-q")
            .args(arguments)
            .stdout(Stdio::null());
        run(&mut apt)
    };
    apt(&["update"])?;
    apt(&[&["install", "-y", "--no-install-recommends"], missing.as_slice()].concat())
        .with_context(|| format!("cannot install {list}"))
}
