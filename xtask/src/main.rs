//! `cargo xtask`: everything that a person does to this repository. Each command sets up what it needs by itself.
#![allow(clippy::print_stdout, reason = "a tool that talks to a person")]

mod demo;
mod fuzz;
mod lint;
mod setup;
mod test;

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// Builds, tests and shows privatelink.
#[derive(Debug, Parser)]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Install what building, testing and the demo need.
    Setup,
    /// Build the release binary.
    Build,
    /// Show the main job on real traffic, in namespaces that are removed afterwards.
    Demo,
    /// Run all tests; those that load programs or make namespaces need root.
    Test {
        /// Only tests whose names contain one of these.
        filters: Vec<String>,
    },
    /// Look for inputs for which something does not hold that must, guided by coverage. What is found is kept, and replayed by `test`.
    Fuzz {
        /// Only these targets; `privatelink-common/fuzz/src/targets` has them.
        targets: Vec<String>,
        /// How long for each target.
        #[arg(long, default_value_t = fuzz::SECONDS)]
        seconds: u32,
        /// Where random numbers begin; 0: somewhere else each time.
        #[arg(long, default_value_t = fuzz::SEED)]
        seed: u32,
    },
    /// Measure the packet path, the agent and the tables, each against something in the same minute. Needs root.
    Bench {
        /// Only these parts: established, new-flow, udp-pps, bulk, syn-flood, footprint.
        parts: Vec<String>,
        /// Write the figures there: an array of {name, unit, median, min, max, rounds}.
        #[arg(long)]
        json: Option<PathBuf>,
    },
    /// Format, lint, licences, and who may import whom.
    Lint,
    /// What CI runs: lint, then fuzz for a while, then test.
    Ci,
}

fn main() -> ExitCode {
    let task = match Cli::try_parse() {
        Ok(cli) => cli.command,
        Err(error) => {
            // Nobody may be reading.
            let _ = error.print();
            return if error.use_stderr() { 64.into() } else { ExitCode::SUCCESS };
        }
    };
    let result = match task {
        Task::Setup => setup::everything(),
        Task::Build => build().map(drop),
        Task::Demo => demo::demo(),
        Task::Test { filters } => test::test(&filters),
        Task::Fuzz { targets, seconds, seed } => fuzz::fuzz(&targets, seconds, seed),
        Task::Bench { parts, json } => bench(&parts, json.as_deref()),
        Task::Lint => lint::lint(),
        Task::Ci => lint::lint()
            .and_then(|()| fuzz::fuzz(&[], fuzz::SECONDS, fuzz::SEED))
            .and_then(|()| test::test(&[])),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            error.downcast_ref::<Lack>().map_or(ExitCode::FAILURE, Lack::exit)
        }
    }
}

/// What this machine or this user cannot do, as opposed to what is wrong with the repository.
#[derive(Debug)]
pub(crate) enum Lack {
    /// Something is missing that cannot be installed from here; sysexits' EX_UNAVAILABLE.
    Software(String),
    /// Root; sysexits' EX_NOPERM.
    Privilege(String),
}

impl Lack {
    fn exit(&self) -> ExitCode {
        match self {
            Self::Software(_) => 69.into(),
            Self::Privilege(_) => 77.into(),
        }
    }
}

impl fmt::Display for Lack {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Software(what) | Self::Privilege(what)) = self;
        formatter.write_str(what)
    }
}

impl std::error::Error for Lack {}

/// Whether this is root.
pub(crate) fn is_root() -> Result<bool> {
    Ok(Command::new("id").arg("-u").output().context("cannot run id")?.stdout == b"0\n")
}

/// The repository.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_owned).unwrap_or_default()
}

/// The cargo that runs this.
pub(crate) fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root());
    cargo
}

/// Runs a command to its end; an error where it fails.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot run {command:?}"))?;
    ensure!(status.success(), "{command:?} failed ({status})");
    Ok(())
}

/// Builds the release binary, and returns where it is.
pub(crate) fn build() -> Result<PathBuf> {
    setup::toolchain()?;
    run(cargo().args(["build", "--release", "--package", "privatelink-user"]))?;
    Ok(root().join("target/release/privatelink"))
}

fn bench(parts: &[String], json: Option<&Path>) -> Result<()> {
    setup::toolchain()?;
    setup::install(&["nftables", "iproute2", "ethtool", "iperf3"])?;
    if !is_root()? {
        return Err(Lack::Privilege("the benchmark loads programs, which needs root".into()).into());
    }
    let mut command = cargo();
    command.args(["bench", "--package", "privatelink-user", "--bench", "path", "--"]).args(parts);
    if let Some(path) = json {
        command.arg("--json").arg(std::path::absolute(path)?);
    }
    run(&mut command)
}
