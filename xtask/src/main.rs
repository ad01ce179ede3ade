//! `cargo xtask`: everything that a person does to this repository. Each command sets up what it needs by itself.
#![allow(clippy::print_stdout, reason = "a tool that talks to a person")]

mod demo;
mod lint;
mod setup;
mod test;

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
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
    /// Run all tests; the ones in namespaces need root.
    Test,
    /// Measure the packet path against a floor program, in the same minute. Needs root.
    Bench {
        /// Write the figures there: an array of {name, unit, median, min, max, rounds}.
        #[arg(long)]
        json: Option<PathBuf>,
    },
    /// Format, lint, licences, and who may import whom.
    Lint,
    /// What CI runs: lint, then test.
    Ci,
}

fn main() -> ExitCode {
    let task = Cli::parse().command;
    let result = match task {
        Task::Setup => setup::everything(),
        Task::Build => build().map(drop),
        Task::Demo => demo::demo(),
        Task::Test => test::test(),
        Task::Bench { json } => bench(json.as_deref()),
        Task::Lint => lint::lint(),
        Task::Ci => lint::lint().and_then(|()| test::test()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
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

fn bench(json: Option<&Path>) -> Result<()> {
    setup::toolchain()?;
    let mut command = cargo();
    command.args(["bench", "--package", "privatelink-user", "--bench", "path", "--"]);
    if let Some(path) = json {
        command.arg("--json").arg(std::path::absolute(path)?);
    }
    run(&mut command)
}
