//! All tests, and their sum.

use crate::{build, cargo, root, setup};
use anyhow::{Context, Result, ensure};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

/// Runs the host's tests, then those in namespaces.
pub(crate) fn test() -> Result<()> {
    setup::everything()?;
    let binary = build()?;
    let id = Command::new("id").arg("-u").output().context("cannot run id")?;
    ensure!(id.stdout == b"0\n", "the tests make network namespaces and load programs, which needs root");
    let host = [
        "test",
        "--release",
        "--package",
        "privatelink-common",
        "--package",
        "privatelink-user",
        "--no-fail-fast",
    ];
    let (mut passed, mut failed) = count(cargo().args(host))?;
    let outside =
        ["test", "--release", "--package", "privatelink-tests", "--no-fail-fast", "--", "--test-threads=1"];
    let (more, worse) = count(cargo().args(outside).env("PRIVATELINK_BIN", binary).current_dir(root()))?;
    passed += more;
    failed += worse;
    println!("\n{passed} passed, {failed} failed");
    ensure!(failed == 0 && passed > 0, "{failed} tests failed");
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
