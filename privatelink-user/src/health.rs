//! Target health: what is concluded from checks, and the checks themselves, made from the load balancer's address inside the VPC.

use crate::model::HealthCheck;
use crate::plan::Check;
use crate::sys;
use anyhow::{Context, Result};
use privatelink_common::tables::{HEALTHY, INITIAL, UNHEALTHY};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// What checks have shown of one target.
///
/// ```text
///   initial ── one success ──▶ healthy ── unhealthy_threshold failures in a row ──▶ unhealthy
///   initial ── unhealthy_threshold failures in a row ──▶ unhealthy ── healthy_threshold successes in a row ──▶ healthy
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Health {
    /// [`INITIAL`], [`HEALTHY`] or [`UNHEALTHY`].
    pub state: u16,
    /// Results in a row that speak against the state.
    against: u8,
}

impl Health {
    /// A target in this state, as far as is known.
    pub fn new(state: u16) -> Self {
        Self { state, against: 0 }
    }

    /// Takes one result into account. A new target is healthy after one success (AWS: target-group-health-checks).
    pub fn observe(&mut self, success: bool, how: &HealthCheck) {
        let (other, threshold) = match (self.state, success) {
            (INITIAL, true) => (HEALTHY, 1),
            (UNHEALTHY, true) => (HEALTHY, how.healthy_threshold),
            (INITIAL | HEALTHY, false) => (UNHEALTHY, how.unhealthy_threshold),
            _ => {
                self.against = 0;
                return;
            }
        };
        self.against += 1;
        if self.against >= threshold {
            *self = Self::new(other);
        }
    }
}

/// The word for a target's state (AWS).
pub fn name(state: u16) -> &'static str {
    match state {
        HEALTHY => "healthy",
        UNHEALTHY => "unhealthy",
        privatelink_common::tables::UNCHECKED => "unavailable",
        _ => "initial",
    }
}

/// A check's result.
#[derive(Debug)]
pub struct Observed {
    /// The target.
    pub target: u32,
    /// What went wrong, if anything.
    pub result: Result<(), String>,
}

/// Opens sockets inside a stack, for whoever asks: a thread that lives there.
#[derive(Clone, Debug)]
pub struct Sockets(mpsc::UnboundedSender<(Ipv4Addr, oneshot::Sender<Result<socket2::Socket>>)>);

impl Sockets {
    /// The sockets of the stack in this namespace.
    pub fn new(namespace: PathBuf) -> Self {
        let (sender, mut receiver) =
            mpsc::unbounded_channel::<(Ipv4Addr, oneshot::Sender<Result<socket2::Socket>>)>();
        std::thread::spawn(move || {
            let entered = std::fs::File::open(&namespace).map_err(anyhow::Error::from).and_then(|file| {
                let kind = Some(rustix::thread::LinkNameSpaceType::Network);
                Ok(rustix::thread::move_into_link_name_space(file.as_fd(), kind)?)
            });
            while let Some((source, reply)) = receiver.blocking_recv() {
                let socket = match &entered {
                    Ok(()) => open(source),
                    Err(error) => Err(anyhow::anyhow!("cannot enter {}: {error}", namespace.display())),
                };
                // Whoever asked may have gone.
                let _ = reply.send(socket);
            }
        });
        Self(sender)
    }

    async fn tcp(&self, source: Ipv4Addr) -> Result<socket2::Socket> {
        let (reply, answer) = oneshot::channel();
        self.0.send((source, reply)).ok().context("the stack's thread is gone")?;
        answer.await.context("the stack's thread is gone")?
    }
}

fn open(source: Ipv4Addr) -> Result<socket2::Socket> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
    // A port for each target, not for each check: closed connections hold theirs for a minute.
    sys::choose_port_late(socket.as_fd())?;
    socket.bind(&SocketAddr::from((source, 0)).into())?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Checks one target for as long as the task lives. The first check comes at once; the later ones are spread by the target's number.
pub async fn watch(target: u32, check: Check, sockets: Sockets, results: mpsc::Sender<Observed>) {
    let mut wait = Duration::ZERO;
    loop {
        tokio::time::sleep(wait).await;
        wait = check.how.interval - check.how.interval / 10 * (target % 5) / 10;
        let result = match tokio::time::timeout(check.how.timeout, connect(&check, &sockets)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(format!("{error:#}")),
            Err(_) => Err(format!("no connection within {}", humantime::format_duration(check.how.timeout))),
        };
        if results.send(Observed { target, result }).await.is_err() {
            return;
        }
    }
}

async fn connect(check: &Check, sockets: &Sockets) -> Result<()> {
    let socket = sockets.tcp(check.source).await?;
    let socket = tokio::net::TcpSocket::from_std_stream(socket.into());
    let to = SocketAddrV4::new(check.address, check.port);
    socket.connect(to.into()).await.with_context(|| format!("cannot connect to {to}"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn how() -> HealthCheck {
        HealthCheck {
            enabled: true,
            port: None,
            interval: Duration::from_secs(5),
            timeout: Duration::from_secs(2),
            healthy_threshold: 3,
            unhealthy_threshold: 2,
        }
    }

    fn after(state: u16, results: &[bool]) -> u16 {
        let mut health = Health::new(state);
        results.iter().for_each(|success| health.observe(*success, &how()));
        health.state
    }

    #[test]
    fn every_transition_takes_its_threshold_in_a_row() {
        assert_eq!(after(INITIAL, &[true]), HEALTHY);
        assert_eq!(after(INITIAL, &[false]), INITIAL);
        assert_eq!(after(INITIAL, &[false, false]), UNHEALTHY);
        assert_eq!(after(HEALTHY, &[false, true, false]), HEALTHY, "a success starts the count again");
        assert_eq!(after(HEALTHY, &[false, false]), UNHEALTHY);
        assert_eq!(after(UNHEALTHY, &[true, true]), UNHEALTHY);
        assert_eq!(after(UNHEALTHY, &[true, true, false, true, true]), UNHEALTHY);
        assert_eq!(after(UNHEALTHY, &[true, true, true]), HEALTHY);
    }
}
