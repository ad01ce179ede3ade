//! Sockets inside the VPCs' own stacks. A socket stays in the network namespace that it was opened in, whoever uses it.

use crate::sys;
use anyhow::{Context, Result, anyhow};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use socket2::{Domain, Socket, Type};
use std::fs::File;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use tokio::sync::{mpsc, oneshot};

/// What a socket is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// To connect by TCP.
    Connection,
    /// To be connected to by TCP.
    Listener,
    /// Datagrams.
    Datagrams,
}

/// How many connections wait until somebody takes them.
const WAITING: i32 = 128;

type Asked = (Kind, SocketAddr, oneshot::Sender<Result<Socket>>);

/// Opens sockets inside a stack, for whoever asks: a thread that lives there.
#[derive(Clone, Debug)]
pub struct Sockets(mpsc::UnboundedSender<Asked>);

impl Sockets {
    /// The sockets of the stack in this namespace.
    pub fn new(namespace: PathBuf) -> Self {
        let (sender, mut receiver) = mpsc::unbounded_channel::<Asked>();
        std::thread::spawn(move || {
            let entered = enter(&namespace);
            while let Some((kind, address, reply)) = receiver.blocking_recv() {
                let socket = match &entered {
                    Ok(()) => open(kind, address),
                    Err(error) => Err(anyhow!("cannot enter {}: {error}", namespace.display())),
                };
                // Whoever asked may have gone.
                let _ = reply.send(socket);
            }
        });
        Self(sender)
    }

    /// A socket with this address; port 0 is any that is free.
    pub async fn open(&self, kind: Kind, address: SocketAddr) -> Result<Socket> {
        let (reply, answer) = oneshot::channel();
        self.0.send((kind, address, reply)).ok().context("the stack's thread is gone")?;
        answer.await.context("the stack's thread is gone")?
    }
}

fn enter(namespace: &Path) -> Result<()> {
    let file = File::open(namespace)?;
    Ok(move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))?)
}

/// Opens a socket in the calling thread's network namespace.
pub fn open(kind: Kind, address: SocketAddr) -> Result<Socket> {
    let of = if kind == Kind::Datagrams { Type::DGRAM } else { Type::STREAM };
    let socket = Socket::new(Domain::for_address(address), of, None)?;
    match kind {
        // A port for each target, not for each check: closed connections hold theirs for a minute.
        Kind::Connection => sys::choose_port_late(socket.as_fd())?,
        Kind::Listener => socket.set_reuse_address(true)?,
        Kind::Datagrams => {}
    }
    socket.bind(&address.into()).with_context(|| format!("cannot have {address}"))?;
    if kind == Kind::Listener {
        socket.listen(WAITING)?;
    }
    socket.set_nonblocking(true)?;
    Ok(socket)
}
