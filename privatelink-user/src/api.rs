//! The control socket: a line of JSON each way. Whatever comes in that is not a request is answered with an error, and nothing more.

use crate::agent::Event;
use crate::config::Problems;
use crate::explain;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fs::File;
use std::io::{BufRead, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixListener;
use tokio::sync::oneshot;

/// The longest request, in bytes.
const LONGEST: u64 = 32 << 20;

/// How long the command line waits for the agent, which answers within moments unless something is wrong with it.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the command line asks.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case")]
#[allow(missing_docs, reason = "named as the commands are; described in the command line's help")]
pub enum Request {
    Status,
    Services,
    Endpoints,
    Targets,
    Flows(Chosen),
    Drops,
    Plan { path: PathBuf, text: String },
    Apply { path: PathBuf, text: String },
    Accept { endpoint: String },
    Reject { endpoint: String },
    Names { vpc: Option<String> },
    Verify { service: String },
    Explain(Asked),
}

/// Which flows are asked for; what is not given chooses none out.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Chosen {
    /// At most so many.
    pub limit: usize,
    /// `ENDPOINT` or `ENDPOINT/ZONE`.
    pub endpoint: Option<String>,
    /// `ADDRESS` or `ADDRESS:PORT`.
    pub target: Option<String>,
    /// A state's word.
    pub state: Option<String>,
    /// Opened at least so many seconds ago.
    pub older_than: Option<u32>,
}

/// What is to be explained, as text.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Asked {
    /// The VPC.
    pub vpc: String,
    /// `tcp` or `udp`.
    pub protocol: String,
    /// Source.
    pub from: std::net::SocketAddr,
    /// Destination.
    pub to: std::net::SocketAddr,
}

impl From<&Asked> for explain::Question {
    fn from(asked: &Asked) -> Self {
        let (vpc, protocol) = (asked.vpc.clone(), asked.protocol.clone());
        Self { vpc, protocol, from: asked.from, to: asked.to }
    }
}

/// What went wrong, and the exit status that says so.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Failure {
    /// 64 usage, 65 configuration, 69 kernel or agent, 77 privilege.
    pub code: u8,
    /// In words.
    pub message: String,
}

impl Failure {
    /// The configuration is wrong.
    #[must_use]
    pub fn config(problems: Problems) -> Self {
        Self { code: 65, message: problems.report(false) }
    }

    /// What was asked for makes no sense.
    #[must_use]
    pub fn usage(error: anyhow::Error) -> Self {
        Self { code: 64, message: format!("{error:#}") }
    }

    /// The kernel or the agent cannot do it.
    #[must_use]
    pub fn kernel(error: anyhow::Error) -> Self {
        Self { code: 69, message: format!("{error:#}") }
    }
}

/// An answer: a JSON value, an array for listings.
pub type Reply = Result<Value, Failure>;

/// Takes a runtime directory, and makes it where it is not; it is ours for as long as what is returned.
pub fn take(runtime_dir: &Path) -> Result<File> {
    std::fs::create_dir_all(runtime_dir).with_context(|| format!("cannot make {}", runtime_dir.display()))?;
    let lock = File::open(runtime_dir).with_context(|| format!("cannot open {}", runtime_dir.display()))?;
    anyhow::ensure!(
        lock.try_lock().is_ok(),
        "another agent uses {}: stop it, or choose another --runtime-dir",
        runtime_dir.display()
    );
    Ok(lock)
}

/// Listens at `path`, readable and writable by root alone; in a directory that was taken, a socket that is there is a dead agent's.
pub fn listen(path: &Path) -> Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot replace {}", path.display()));
        }
        _ => {}
    }
    let listener =
        UnixListener::bind(path).with_context(|| format!("cannot listen at {}", path.display()))?;
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    Ok(listener)
}

/// Answers whoever connects.
pub async fn serve(listener: UnixListener, events: Sender<Event>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => drop(tokio::spawn(converse(stream, events.clone()))),
            // Out of descriptors, most likely: those who are here will go.
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

async fn converse(stream: tokio::net::UnixStream, events: Sender<Event>) {
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    loop {
        let mut line = Vec::new();
        match (&mut reader).take(LONGEST).read_until(b'\n', &mut line).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let reply = answer(&line, &events).await;
        let mut text = serde_json::to_vec(&reply).unwrap_or_default();
        text.push(b'\n');
        if writer.write_all(&text).await.is_err() {
            return;
        }
    }
}

async fn answer(line: &[u8], events: &Sender<Event>) -> Reply {
    let request = serde_json::from_slice(line)
        .map_err(|error| Failure { code: 64, message: format!("this is not a request: {error}") })?;
    let (reply, answer) = oneshot::channel();
    let stopping = || Failure { code: 69, message: "the agent is stopping".into() };
    events.send(Event::Request(request, reply)).map_err(|_| stopping())?;
    answer.await.map_err(|_| stopping())?
}

/// Asks the agent whose runtime directory this is.
pub fn ask(runtime_dir: &Path, request: &Request) -> Reply {
    ask_within(runtime_dir, request, PATIENCE)
}

fn ask_within(runtime_dir: &Path, request: &Request, patience: Duration) -> Reply {
    let path = runtime_dir.join("control.sock");
    let stream =
        UnixStream::connect(&path).map_err(|error| match error.kind() {
            ErrorKind::PermissionDenied => {
                let message = format!("this needs root: only root may ask the agent at {}", path.display());
                Failure { code: 77, message }
            }
            _ => Failure::kernel(anyhow::Error::from(error).context(format!(
                "no agent answers at {} (what it loaded goes on without it)",
                path.display()
            ))),
        })?;
    let reply = talk(stream, request, patience).map_err(|error| {
        let what = match error.kind() {
            // What a time that has run out is called depends on who waited.
            ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                let message = format!(
                    "the agent at {} has not answered within {patience:?}: it hangs, or has much to do, and may still do what was asked",
                    path.display()
                );
                return Failure { code: 69, message };
            }
            _ => "cannot ask the agent",
        };
        Failure::kernel(anyhow::Error::from(error).context(what))
    })?;
    serde_json::from_str(&reply).context("the agent answers something else").map_err(Failure::kernel)?
}

/// A request and its reply, where nothing is waited for longer than the patience lasts.
fn talk(mut stream: UnixStream, request: &Request, patience: Duration) -> std::io::Result<String> {
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut reply = String::new();
    std::io::BufReader::new(stream).read_line(&mut reply)?;
    Ok(reply)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test: a panic with its place is what is wanted")]
mod tests {
    use super::*;

    #[test]
    fn an_agent_that_does_not_answer_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let _silent = std::os::unix::net::UnixListener::bind(dir.path().join("control.sock")).unwrap();
        let failure = ask_within(dir.path(), &Request::Status, Duration::from_millis(20)).unwrap_err();
        assert_eq!(failure.code, 69);
        assert!(failure.message.contains("has not answered within 20ms"), "{}", failure.message);
    }
}
