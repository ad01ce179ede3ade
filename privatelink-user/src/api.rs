//! The control socket: a line of JSON each way. Whatever comes in that is not a request is answered with an error, and nothing more.

use crate::agent::Event;
use crate::config::Problems;
use crate::explain;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::oneshot;

/// The longest request, in bytes.
const LONGEST: u64 = 32 << 20;

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
            Err(_) => tokio::time::sleep(std::time::Duration::from_millis(100)).await,
        }
    }
}

async fn converse(stream: UnixStream, events: Sender<Event>) {
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
    use std::io::{BufRead, Write};
    let path = runtime_dir.join("control.sock");
    let talk = || -> Result<Reply> {
        let mut stream = std::os::unix::net::UnixStream::connect(&path).with_context(|| {
            format!("no agent answers at {} (what it loaded goes on without it)", path.display())
        })?;
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        stream.write_all(&line).context("cannot ask the agent")?;
        let mut reply = String::new();
        std::io::BufReader::new(stream).read_line(&mut reply).context("the agent does not answer")?;
        serde_json::from_str(&reply).context("the agent answers something else")
    };
    talk().map_err(Failure::kernel)?
}
