//! Tells providers what happens to their connections: each event at least once to each who wants it, across restarts. What nobody takes is
//! offered again, ever more rarely; those who take do not wait for those who do not.

use crate::connections::Event;
use crate::model::Sink;
use crate::store::{Delivery, Store};
use anyhow::{Context, Result, ensure};
use log::{info, warn};
use std::collections::BTreeMap;
use std::io::Write;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a program or a web server may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// The first pause before an event is offered again; each next one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

/// Delivers what is in the store, each time something comes, until whoever sends that is gone. Each who wants events has a thread for as
/// long as some wait, and hears of them in their order.
pub fn deliver(store: &Arc<Store>, news: &Receiver<()>) {
    let mut workers = BTreeMap::<Sink, JoinHandle<()>>::new();
    loop {
        workers.retain(|_, worker| !worker.is_finished());
        match store.waiting() {
            Ok(waiting) => {
                for (_, Delivery { sink, .. }) in waiting {
                    workers.entry(sink.clone()).or_insert_with(|| {
                        let store = Arc::clone(store);
                        std::thread::spawn(move || empty(&store, &sink))
                    });
                }
            }
            Err(error) => warn!("cannot read the events that wait: {error:#}"),
        }
        // A worker may have found nothing left just before something came.
        let wait = if workers.is_empty() { LONGEST_PAUSE } else { FIRST_PAUSE };
        if news.recv_timeout(wait) == Err(RecvTimeoutError::Disconnected) {
            return;
        }
    }
}

/// Offers one of them every event that waits for it, until none is left.
fn empty(store: &Store, sink: &Sink) {
    let mut pause = FIRST_PAUSE;
    loop {
        let next = store.waiting().map(|waiting| waiting.into_iter().find(|(_, it)| it.sink == *sink));
        let (number, event) = match next {
            Ok(Some((number, delivery))) => (number, delivery.event),
            Ok(None) => return,
            Err(error) => return warn!("cannot read the events that wait: {error:#}"),
        };
        match offer(&event, sink).and_then(|()| store.delivered(number)) {
            Ok(()) => pause = FIRST_PAUSE,
            Err(error) => {
                warn!(
                    "{} did not take the {:?} of {}, and is asked again in {pause:?}: {error:#}",
                    name(sink),
                    event.event,
                    event.endpoint
                );
                std::thread::sleep(pause);
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
    }
}

fn name(sink: &Sink) -> String {
    match sink {
        Sink::Command(words) => words.join(" "),
        Sink::Webhook(address) => address.clone(),
    }
}

/// Every event is in the log, whoever else hears of it.
pub fn log(event: &Event) {
    info!(
        "{:?}: endpoint {} ({}) of the account {}, service {}, is {}",
        event.event,
        event.endpoint,
        event.vpc_endpoint_id,
        event.vpc_endpoint_owner,
        event.service,
        event.vpc_endpoint_state.name()
    );
}

fn offer(event: &Event, sink: &Sink) -> Result<()> {
    let text = serde_json::to_vec(event)?;
    match sink {
        Sink::Command(words) => run(words, &text),
        Sink::Webhook(address) => post(address, &text),
    }
}

/// Runs a program, which says by its exit status whether it took the event.
fn run(words: &[String], text: &[u8]) -> Result<()> {
    let (program, arguments) = words.split_first().context("no program")?;
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::inherit())
        .spawn()
        .with_context(|| format!("cannot run {program}"))?;
    // A program that does not read what it is told may still say that it took it.
    let _ = child.stdin.take().map(|mut input| input.write_all(text));
    let until = Instant::now() + PATIENCE;
    while Instant::now() < until {
        if let Some(status) = child.try_wait()? {
            ensure!(status.success(), "{status}");
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    end(&mut child)?;
    anyhow::bail!("not done within {PATIENCE:?}")
}

fn end(child: &mut Child) -> Result<()> {
    child.kill()?;
    child.wait()?;
    Ok(())
}

/// Posts to a web server, which says by a status of 2xx that it took the event.
fn post(address: &str, text: &[u8]) -> Result<()> {
    use tokio_rustls::rustls::crypto::ring::default_provider;
    use ureq::tls::{RootCerts, TlsConfig, TlsProvider};
    let tls = TlsConfig::builder()
        .provider(TlsProvider::Rustls)
        .unversioned_rustls_crypto_provider(Arc::new(default_provider()))
        .root_certs(RootCerts::PlatformVerifier)
        .build();
    let agent =
        ureq::Agent::config_builder().timeout_global(Some(PATIENCE)).max_redirects(0).tls_config(tls).build();
    let response = agent.new_agent().post(address).header("content-type", "application/json").send(text)?;
    ensure!(response.status().is_success(), "{}", response.status());
    Ok(())
}
