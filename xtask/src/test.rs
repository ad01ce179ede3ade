//! All tests, and their sum.

use crate::{Lack, build, cargo, is_root, setup};
use anyhow::{Context, Result, ensure};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

/// What needs no privilege.
const PLAIN: [&str; 16] = [
    "--package",
    "privatelink-common",
    "--package",
    "privatelink-fuzz",
    "--package",
    "privatelink-user",
    "--lib",
    "--test",
    "check",
    "--test",
    "plan",
    "--test",
    "connections",
    "--test",
    "analyze",
    "--no-fail-fast",
];
/// The host's tests, with those that load programs.
const HOST: [&str; 7] = [
    "--package",
    "privatelink-common",
    "--package",
    "privatelink-fuzz",
    "--package",
    "privatelink-user",
    "--no-fail-fast",
];
/// The built binary, in namespaces.
const OUTSIDE: [&str; 3] = ["--package", "privatelink-tests", "--no-fail-fast"];

/// Runs the host's tests, then those in namespaces: all of them, or those whose names contain one of `filters`.
pub(crate) fn test(filters: &[String]) -> Result<()> {
    setup::everything()?;
    let binary = build()?;
    let cargo_test = |packages: &[&str]| {
        let mut command = cargo();
        command
            .args(["test", "--release"])
            .args(packages)
            .arg("--")
            .args(filters)
            .env("PRIVATELINK_BIN", &binary);
        command
    };
    let (mut passed, mut failed) = (0, 0);
    let mut count = |command: &mut Command| -> Result<()> {
        let (more, worse) = count(command)?;
        (passed, failed) = (passed + more, failed + worse);
        Ok(())
    };
    let root = is_root()?;
    if root {
        count(&mut cargo_test(&HOST))?;
        // Two at a time, however many processors there are: they wait more than they work, and what they wait for has limits.
        count(cargo_test(&OUTSIDE).arg("--test-threads=2").current_dir(crate::root()))?;
    } else {
        count(&mut cargo_test(&PLAIN))?;
    }
    println!("\n{passed} passed, {failed} failed");
    ensure!(failed == 0, "{failed} tests failed");
    if !root {
        let rest = "the other tests load programs and make network namespaces, which needs root";
        return Err(Lack::Privilege(rest.into()).into());
    }
    ensure!(passed > 0, "no test has such a name");
    Ok(())
}

/// Runs a test command, shows what it prints, and adds up its `test result:` lines.
fn count(command: &mut Command) -> Result<(u32, u32)> {
    let mut child =
        command.stdout(Stdio::piped()).spawn().with_context(|| format!("cannot run {command:?}"))?;
    let (mut passed, mut failed) = (0, 0);
    for line in BufReader::new(child.stdout.take().context("no output")?).lines() {
        let line = line?;
        println!("{line}");
        let Some(result) = line.strip_prefix("test result: ") else { continue };
        let number = |what: &str| -> u32 {
            let part = result.split([';', '.']).find(|part| part.trim_end().ends_with(what));
            part.and_then(|part| part.split_whitespace().next()).and_then(|it| it.parse().ok()).unwrap_or(0)
        };
        passed += number("passed");
        failed += number("failed");
    }
    let status = child.wait()?;
    // A crate that does not compile, or a test process that dies, has no result line.
    if !status.success() && failed == 0 {
        failed = 1;
    }
    Ok((passed, failed))
}
