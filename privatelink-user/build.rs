//! Builds the eBPF object, which needs another toolchain than the rest: one that can build `core` for the kernel.
//!
//! Not `aya_build::build_ebpf`: it fixes the compiler's flags, and `-Ctarget-cpu=v3` must be among them.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};

const TARGET: &str = "bpfel-unknown-none";
const SOURCES: &str = "lib/rustlib/src/rust/library/core";

fn main() {
    let workspace = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default()).join("..");
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    for source in ["privatelink-ebpf", "privatelink-common"] {
        println!("cargo:rerun-if-changed={}", workspace.join(source).display());
    }
    for variable in ["PRIVATELINK_EBPF_TOOLCHAIN", "PRIVATELINK_EBPF_SKIP"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    let objects = ["privatelink", "captured", "bench"];
    if env::var_os("PRIVATELINK_EBPF_SKIP").is_some() {
        // For lints, which read this crate but run nothing of it.
        objects.iter().for_each(|object| write(&out.join(format!("{object}.bpf.o")), &[]));
        return;
    }
    let target_dir = out.join("ebpf");
    build(&workspace, &target_dir);
    for object in objects {
        let built = target_dir.join(TARGET).join("release").join(object);
        let bytes = fs::read(&built)
            .unwrap_or_else(|error| fail(&format!("cannot read {}: {error}", built.display())));
        write(&out.join(format!("{object}.bpf.o")), &bytes);
    }
}

fn write(path: &Path, bytes: &[u8]) {
    fs::write(path, bytes).unwrap_or_else(|error| fail(&format!("cannot write {}: {error}", path.display())));
}

fn fail(message: &str) -> ! {
    eprintln!("{message}");
    exit(1)
}

fn build(workspace: &Path, target_dir: &Path) {
    let mut cargo = toolchain();
    let linker = workspace.join("target/tools/bin/bpf-linker");
    let linker = if linker.exists() { linker.into_os_string() } else { OsString::from("bpf-linker") };
    let flags = format!(
        "-Ctarget-cpu=v3\x1f-Cdebuginfo=2\x1f-Clink-arg=--btf\x1f-Clinker={}",
        linker.to_string_lossy()
    );
    cargo
        .current_dir(workspace)
        .env("CARGO_ENCODED_RUSTFLAGS", flags)
        .args(["build", "--release", "--package", "privatelink-ebpf", "--bins", "--target", TARGET])
        .args(["-Z", "build-std=core", "--target-dir"])
        .arg(target_dir);
    match cargo.status() {
        Ok(status) if status.success() => {}
        Ok(status) => fail(&format!(
            "building the eBPF object failed ({status}); `cargo xtask setup` installs what it needs"
        )),
        Err(error) => {
            fail(&format!("cannot run {cargo:?}: {error}; `cargo xtask setup` installs what it needs"))
        }
    }
}

/// The first of: the toolchain that the environment names, a nightly with core's source, Debian's.
fn toolchain() -> Command {
    if let Ok(name) = env::var("PRIVATELINK_EBPF_TOOLCHAIN") {
        return rustup(&name);
    }
    let sysroot = Command::new("rustup").args(["run", "nightly", "rustc", "--print", "sysroot"]).output();
    if let Ok(output) = sysroot
        && output.status.success()
        && Path::new(String::from_utf8_lossy(&output.stdout).trim()).join(SOURCES).exists()
    {
        return rustup("nightly");
    }
    if Path::new("/usr").join(SOURCES).exists() && Path::new("/usr/bin/cargo").exists() {
        let mut cargo = clean("/usr/bin/cargo");
        // Debian's compiler is a stable one; this lets it build core, here and nowhere else.
        cargo.env("RUSTC", "/usr/bin/rustc").env("RUSTC_BOOTSTRAP", "1");
        return cargo;
    }
    fail("no toolchain can build core for the kernel: run `cargo xtask setup`")
}

fn rustup(name: &str) -> Command {
    let mut command = clean("rustup");
    command.args(["run", name, "cargo"]);
    command
}

/// A command without what the outer cargo set for itself.
fn clean(program: &str) -> Command {
    let mut command = Command::new(program);
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let ours = ["CARGO_HOME", "CARGO_NET_", "CARGO_REGISTRIES_", "CARGO_HTTP_"]
            .iter()
            .any(|kept| text.starts_with(kept));
        let theirs = text.starts_with("CARGO") || text.starts_with("RUSTC") || text.starts_with("RUSTDOC");
        if theirs && !ours || text == "RUSTFLAGS" || text == "RUSTUP_TOOLCHAIN" {
            command.env_remove(&name);
        }
    }
    command
}
