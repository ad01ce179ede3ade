//! The command line: what is typed, and what is printed.

use crate::agent::{self, Agent, Event, Parts};
use crate::api::{self, Asked, Chosen, Failure, Request};
use crate::kernel::{self, Drops, Kernel};
use crate::names::Kind;
use crate::net::Stack;
use crate::store::Store;
use crate::{capture, flows, held, model};
use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use log::{error, info, warn};
use privatelink_common::path::state::State;
use serde_json::Value;
use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

/// AWS PrivateLink for any Linux host, on eBPF/XDP.
#[derive(Debug, Parser)]
#[command(name = "privatelink", version)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    places: Places,
}

#[derive(Args, Debug)]
struct Places {
    /// Where the agent's control socket is.
    #[arg(long, global = true, default_value = "/run/privatelink")]
    runtime_dir: PathBuf,
    /// Where programs, links and maps are pinned.
    #[arg(long, global = true, default_value = "/sys/fs/bpf/privatelink")]
    pin_dir: PathBuf,
    /// Where the agent keeps what outlives a restart of the machine: accepted connections, events that nobody has taken.
    #[arg(long, global = true, default_value = "/var/lib/privatelink")]
    state_dir: PathBuf,
}

#[derive(Debug, Args)]
struct Format {
    /// Print JSON: an array of objects.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent, in the network namespace that holds the interfaces.
    Run {
        /// The configuration.
        #[arg(long)]
        config: PathBuf,
        /// Take everything away on SIGTERM, instead of leaving forwarding in place.
        #[arg(long)]
        detach_on_exit: bool,
        /// Log dropped packets one by one, with the reason, as far as the log keeps up.
        #[arg(long)]
        log_drops: bool,
    },
    /// Validate a configuration: all of its problems, with line, column and the nearest spelling.
    Check {
        /// The configuration.
        file: PathBuf,
    },
    /// Look for what of a configuration will not work though nothing of it is a mistake, and how to mend it.
    Analyze {
        /// The configuration.
        file: PathBuf,
        #[command(flatten)]
        format: Format,
    },
    /// Show what `apply` would change.
    Plan {
        /// The configuration.
        file: PathBuf,
        #[command(flatten)]
        format: Format,
    },
    /// Make the kernel agree with a configuration.
    Apply {
        /// The configuration.
        file: PathBuf,
        #[command(flatten)]
        format: Format,
    },
    /// Show the agent, the program, the interfaces, the maps and the counters.
    Status(Format),
    /// List endpoint services.
    Services(Format),
    /// List endpoints, an address a row, with their counters.
    Endpoints(Format),
    /// Accept an endpoint's connection, also one that was rejected or has expired.
    Accept {
        /// The endpoint, by name or id.
        endpoint: String,
        #[command(flatten)]
        format: Format,
    },
    /// Reject an endpoint's connection, also one that was accepted: its flows end by RST to both sides.
    Reject {
        /// The endpoint, by name or id.
        endpoint: String,
        #[command(flatten)]
        format: Format,
    },
    /// List the names of VPCs that have a resolver, and to what they resolve.
    Names {
        /// Only those of this VPC.
        vpc: Option<String>,
        #[command(flatten)]
        format: Format,
    },
    /// Look up now whether the provider owns its service's private DNS name.
    Verify {
        /// The endpoint service, by name or id.
        service: String,
        #[command(flatten)]
        format: Format,
    },
    /// List targets, with their health and where they are.
    Targets(Format),
    /// List flows.
    Flows {
        /// At most so many.
        #[arg(long, default_value_t = 100_000)]
        limit: usize,
        /// Only those of an endpoint: ENDPOINT or ENDPOINT/ZONE.
        #[arg(long)]
        endpoint: Option<String>,
        /// Only those to a target: ADDRESS or ADDRESS:PORT.
        #[arg(long)]
        target: Option<String>,
        /// Only those in a state: opening, answered, established, consumer_closed, provider_closed, closed, reset or terminated.
        #[arg(long, value_parser = state)]
        state: Option<String>,
        /// Only those that were opened at least so long ago, such as 10s or 5m.
        #[arg(long, value_parser = humantime::parse_duration)]
        older_than: Option<Duration>,
        #[command(flatten)]
        format: Format,
    },
    /// List dropped packets, by VPC and reason.
    Drops(Format),
    /// Run the packet path over the live tables, without a packet, and tell what each stage asks and decides.
    Explain {
        /// The VPC that the packet would come from.
        #[arg(long = "from")]
        vpc: String,
        /// tcp or udp.
        protocol: String,
        /// Source address and port.
        source: SocketAddr,
        /// Destination address and port.
        destination: SocketAddr,
        #[command(flatten)]
        format: Format,
    },
    /// Show packets as they come and as they leave, with what becomes of them; or write them to a pcapng file.
    ///
    /// A packet is chosen if all that is asked for is true of one of its sides: as it came, in the VPC that it came from, or as it
    /// left, in the VPC that it goes to. Times are UTC.
    Capture(capture::Options),
    /// What `capture` starts: puts the programs back when its input ends.
    #[command(hide = true)]
    EndCapture {
        /// The capture's programs, by their kernel-wide identifiers.
        programs: Vec<u32>,
    },
    /// Remove every program, link, map and stack of this pin directory.
    Detach,
}

/// Runs the command line; returns the exit status.
pub fn main() -> u8 {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // A closed pipe is not an error of ours.
            let _ = error.print();
            return if error.use_stderr() { 64 } else { 0 };
        }
    };
    match dispatch(cli) {
        Ok(()) => 0,
        Err(failure) => {
            let _ = writeln!(std::io::stderr(), "{}", failure.message.trim_end());
            failure.code
        }
    }
}

fn dispatch(cli: Cli) -> Result<(), Failure> {
    let places = cli.places;
    let ask = |request| api::ask(&places.runtime_dir, &request);
    match cli.command {
        Command::Run { config, detach_on_exit, log_drops } => {
            let drops = if log_drops { Drops::Named } else { Drops::Counted };
            run(&places, &config, detach_on_exit, drops)
        }
        Command::Check { file } => check(&file),
        Command::Analyze { file, format } => analyze(&file, &format),
        Command::Plan { file, format } => print(
            ask(Request::Plan { text: text(&file)?, path: absolute(&file) })?,
            &["change", "kind", "what"],
            &format,
        ),
        Command::Apply { file, format } => print(
            ask(Request::Apply { text: text(&file)?, path: absolute(&file) })?,
            &["change", "kind", "what"],
            &format,
        ),
        Command::Status(format) => status(ask(Request::Status)?, &format),
        Command::Services(format) => print(ask(Request::Services)?, SERVICES, &format),
        Command::Names { vpc, format } => print(ask(Request::Names { vpc })?, NAMES, &format),
        Command::Verify { service, format } => {
            print(ask(Request::Verify { service })?, PRIVATE_NAME, &format)
        }
        Command::Endpoints(format) => print(ask(Request::Endpoints)?, ENDPOINTS, &format),
        Command::Accept { endpoint, format } => {
            print(ask(Request::Accept { endpoint })?, CONNECTION, &format)
        }
        Command::Reject { endpoint, format } => {
            print(ask(Request::Reject { endpoint })?, CONNECTION, &format)
        }
        Command::Targets(format) => print(ask(Request::Targets)?, TARGETS, &format),
        Command::Flows { limit, endpoint, target, state, older_than, format } => {
            let older_than = older_than.map(|it| u32::try_from(it.as_secs()).unwrap_or(u32::MAX));
            let chosen = Chosen { limit, endpoint, target, state, older_than };
            print(ask(Request::Flows(chosen))?, FLOWS, &format)
        }
        Command::Drops(format) => {
            print(ask(Request::Drops)?, &["vpc", "reason", "packets", "bytes", "meaning"], &format)
        }
        Command::Explain { vpc, protocol, source, destination, format } => {
            let asked = Asked { vpc, protocol, from: source, to: destination };
            print(ask(Request::Explain(asked))?, &["step", "says"], &format)
        }
        Command::Capture(asked) => watch(&places.pin_dir, &asked),
        Command::EndCapture { programs } => {
            capture::stand_by(&places.pin_dir, &programs).map_err(Failure::kernel)
        }
        Command::Detach => detach(&places.pin_dir),
    }
}

const SERVICES: &[&str] = &[
    "service",
    "id",
    "load_balancers",
    "zones",
    "acceptance_required",
    "private_dns_name",
    "private_dns_name_state",
    "endpoints",
];
const PRIVATE_NAME: &[&str] =
    &["service", "private_dns_name", "private_dns_name_state", "txt_record", "txt_value"];
const NAMES: &[&str] = &["vpc", "name", "kind", "of", "resolves_to", "why"];
const CONNECTION: &[&str] = &["endpoint", "id", "vpc", "principal", "service", "state"];

const ENDPOINTS: &[&str] = &[
    "endpoint",
    "id",
    "vpc",
    "service",
    "zone",
    "address",
    "state",
    "zone_health",
    "active_flows",
    "new_flows",
    "to_provider_bytes",
    "to_consumer_bytes",
    "resets",
];
const RESOLVERS: &[&str] =
    &["vpc", "addresses", "questions", "answered", "forwarded", "refused", "malformed", "limited", "failed"];
const PROGRAMS: &[&str] = &["program", "id", "tag", "verified_instructions", "runs", "nanoseconds_a_packet"];
const TARGETS: &[&str] = &[
    "target_group",
    "vpc",
    "zone",
    "address",
    "port",
    "weight",
    "state",
    "since_seconds",
    "flows",
    "nat_ports",
    "port_allocation_errors",
    "mac",
    "interface",
    "reason",
    "description",
];
const FLOWS: &[&str] = &[
    "vpc",
    "protocol",
    "client",
    "endpoint_address",
    "nat",
    "target",
    "endpoint",
    "state",
    "idle_seconds",
    "age_seconds",
];

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// A file's text; what is larger than any configuration is not read.
fn text(path: &Path) -> Result<String, Failure> {
    let wrong =
        |message: String| Failure { code: 65, message: format!("cannot read {}: {message}", path.display()) };
    let size = std::fs::metadata(path).map_err(|error| wrong(error.to_string()))?.len();
    if size > 16 << 20 {
        return Err(wrong(format!("{size} bytes is more than any configuration")));
    }
    let bytes = std::fs::read(path).map_err(|error| wrong(error.to_string()))?;
    String::from_utf8(bytes)
        .map_err(|error| wrong(format!("not UTF-8 from byte {} on", error.utf8_error().valid_up_to())))
}

fn check(file: &Path) -> Result<(), Failure> {
    let colour = std::io::stderr().is_terminal();
    let report = |problems: crate::config::Problems| Failure { code: 65, message: problems.report(colour) };
    let text = text(file)?;
    model::parse(&text, &file.to_string_lossy()).map_err(report)?;
    let model = agent::next(file, &text)?;
    let (vpcs, services) = (model.vpcs.len(), model.services.len());
    let endpoints: usize = model.endpoints.values().map(|it| it.addresses.len()).sum();
    say(&format!(
        "{}: good: {vpcs} VPCs, {services} endpoint services, {endpoints} endpoint addresses\n",
        file.display()
    ))
}

fn analyze(file: &Path, format: &Format) -> Result<(), Failure> {
    let model = model::parse(&text(file)?, &file.to_string_lossy()).map_err(Failure::config)?;
    let findings = crate::analyze::analyze(&model);
    let count = findings.len();
    let rows = serde_json::to_value(findings).map_err(|error| Failure::kernel(error.into()))?;
    print(rows, &["resource", "finding", "remedy"], format)?;
    if count == 0 {
        return Ok(());
    }
    let message = format!("{} in {}", crate::config::count(count, "finding"), file.display());
    Err(Failure { code: 1, message })
}

/// Prints; a closed pipe is a clean exit.
fn say(text: &str) -> Result<(), Failure> {
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure { code: 69, message: format!("cannot print: {error}") })
        }
        _ => Ok(()),
    }
}

fn cell(value: Option<&Value>) -> String {
    match value {
        None | Some(Value::Null) => "-".into(),
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(items)) => items.iter().map(|it| cell(Some(it))).collect::<Vec<_>>().join(" "),
        Some(other) => other.to_string(),
    }
}

fn table(rows: &Value, columns: &[&str]) -> String {
    let mut table = comfy_table::Table::new();
    table
        .load_style(comfy_table::presets::NOTHING)
        .set_content_arrangement(comfy_table::ContentArrangement::Dynamic);
    table.set_header(columns.iter().map(|name| name.replace('_', " ").to_uppercase()));
    for row in rows.as_array().into_iter().flatten() {
        table.add_row(columns.iter().map(|name| cell(row.get(name))));
    }
    format!("{table}\n")
}

fn print(rows: Value, columns: &[&str], format: &Format) -> Result<(), Failure> {
    if format.json {
        return say(&format!("{rows:#}\n"));
    }
    if rows.as_array().is_some_and(Vec::is_empty) {
        return say("none\n");
    }
    say(&table(&rows, columns))
}

fn status(rows: Value, format: &Format) -> Result<(), Failure> {
    if format.json {
        return say(&format!("{rows:#}\n"));
    }
    let status = &rows[0];
    let mut text = String::new();
    for (name, value) in status["agent"].as_object().into_iter().flatten() {
        text += &format!("agent {}: {}\n", name.replace('_', " "), cell(Some(value)));
    }
    for problem in status["problems"].as_array().into_iter().flatten() {
        text += &format!("problem: {}\n", cell(Some(problem)));
    }
    text += "\n";
    text += &table(&status["interfaces"], &["interface", "vpc", "state", "hook", "mode", "why", "problem"]);
    text += "\n";
    text += &table(&status["programs"], PROGRAMS);
    text += "\n";
    if status["resolvers"].as_array().is_some_and(|rows| !rows.is_empty()) {
        text += &table(&status["resolvers"], RESOLVERS);
        text += "\n";
    }
    text += &table(&status["maps"], &["map", "id", "used", "size", "bytes"]);
    text += "\n";
    text += &table(&status["outcomes"], &["vpc", "outcome", "packets", "bytes"]);
    say(&text)
}

/// A flow's state, as it is typed.
fn state(text: &str) -> Result<String, String> {
    if State::ALL.iter().any(|state| state.name() == text) {
        return Ok(text.to_owned());
    }
    let help = crate::config::nearest(text, State::ALL.iter().map(|state| state.name()));
    Err(help.unwrap_or_else(|| "there is no such state".into()))
}

fn privileged() -> Result<(), Failure> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    Err(Failure {
        code: 77,
        message: "this needs root: it loads programs and attaches them to interfaces".into(),
    })
}

fn run(places: &Places, config: &Path, detach_on_exit: bool, drops: Drops) -> Result<(), Failure> {
    log_to_stderr();
    let model = model::parse(&text(config)?, &config.to_string_lossy()).map_err(Failure::config)?;
    privileged()?;
    let _lock = api::take(&places.runtime_dir).map_err(Failure::kernel)?;
    let store = Store::open(&places.state_dir).map_err(Failure::kernel)?;
    warn_of_private_mounts(&places.pin_dir);
    // Behind all that another agent may have: a start that is refused leaves nothing in the kernel.
    let kernel = Kernel::open(&places.pin_dir, &model.limits, drops).map_err(Failure::kernel)?;
    serve(places, config, model, store, kernel, drops).map_err(Failure::kernel)?;
    if !detach_on_exit {
        info!("stopped; what it loaded goes on");
        return Ok(());
    }
    info!("stopped; what it loaded is taken away");
    detach(&places.pin_dir)
}

/// Warns where the bpffs that the agent is about to mount is seen by nobody else, and ends with the agent and all that is pinned there.
fn warn_of_private_mounts(pin_dir: &Path) {
    const BPFFS: u64 = 0xcafe_4a11;
    let there = pin_dir.ancestors().find(|it| it.exists()).and_then(|it| rustix::fs::statfs(it).ok());
    let is_mounted = there.is_some_and(|it| it.f_type as u64 == BPFFS);
    let mounts = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/mnt")).ok();
    if is_mounted || mounts("self") == mounts("1") {
        return;
    }
    warn!(
        "no bpffs is mounted for {}, and one that is mounted now is gone with this mount namespace: when the agent ends, forwarding does, \
         too. `ip netns exec` makes such a namespace; `nsenter --net=/run/netns/NAME` does not, nor does systemd's NetworkNamespacePath= with PrivateMounts=no",
        pin_dir.display()
    );
}

/// The least time between two sweeps; a sweep that takes long waits longer, so that sweeping takes a tenth of a CPU at most.
const SWEEP: Duration = Duration::from_secs(5);

/// The agent's log: a line a message, on stderr, whether or not anybody reads it. `RUST_LOG` chooses the level.
fn log_to_stderr() {
    let default = env_logger::Env::default().default_filter_or("info");
    let line = |formatter: &mut env_logger::fmt::Formatter, record: &log::Record<'_>| {
        writeln!(formatter, "privatelink: {}", record.args())
    };
    // It is refused only where there is one already.
    let _ = env_logger::Builder::from_env(default).format(line).try_init();
}

fn serve(
    places: &Places,
    config: &Path,
    model: model::Model,
    store: Store,
    mut kernel: Kernel,
    drops: Drops,
) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let (events, received) = channel();
    let (results, mut observed) = tokio::sync::mpsc::channel(1024);
    let (heard_sender, mut heard) = tokio::sync::mpsc::channel(1024);
    let (to_agent, also_to_agent, own) = (events.clone(), events.clone(), events.clone());
    runtime.spawn(async move {
        while let Some(it) = observed.recv().await {
            let _ = to_agent.send(Event::Observed(it));
        }
    });
    runtime.spawn(async move {
        while let Some(it) = heard.recv().await {
            let _ = also_to_agent.send(Event::Heard(it));
        }
    });
    if drops == Drops::Named {
        let words = crate::drops::Words::new(kernel.maps()?, &model.limits);
        runtime.spawn(crate::drops::follow(kernel.drops(words)?));
    }
    let store = Arc::new(store);
    let (news, told) = channel();
    let outbox = Arc::clone(&store);
    std::thread::spawn(move || crate::events::deliver(&outbox, &told));
    let (pin_dir, config) = (places.pin_dir.clone(), absolute(config));
    let handle = runtime.handle().clone();
    let parts = Parts {
        kernel,
        pin_dir,
        config,
        model,
        runtime: handle,
        results,
        heard: heard_sender,
        store,
        news,
        events: own,
    };
    let mut agent = Agent::start(parts)?;
    held::start(&agent.kernel, Arc::clone(&agent.maps))?;
    let socket = places.runtime_dir.join("control.sock");
    let listener = runtime.block_on(async { api::listen(&socket) })?;
    runtime.spawn(api::serve(listener, events.clone()));
    let (maps, swept) = (Arc::clone(&agent.maps), events.clone());
    runtime.block_on(async { signals(events) })?;
    std::thread::spawn(move || {
        loop {
            let started = Instant::now();
            let result = flows::sweep(&maps);
            if let Err(error) = &result {
                error!("cannot sweep the flows: {error:#}");
            }
            if result.is_ok_and(|survey| swept.send(Event::Swept(survey)).is_err()) {
                return;
            }
            std::thread::sleep(SWEEP.max(started.elapsed() * 9));
        }
    });
    info!("ready");
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    agent.run(&received);
    let _ = std::fs::remove_file(&socket);
    Ok(())
}

/// Turns signals into events.
fn signals(events: Sender<Event>) -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut hangup, mut terminate, mut interrupt) =
        (signal(SignalKind::hangup())?, signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::spawn(async move {
        loop {
            let event = tokio::select! {
                _ = hangup.recv() => Event::Reload,
                _ = terminate.recv() => Event::Stop,
                _ = interrupt.recv() => Event::Stop,
            };
            if events.send(event).is_err() {
                return;
            }
        }
    });
    Ok(())
}

fn watch(pin_dir: &Path, options: &capture::Options) -> Result<(), Failure> {
    privileged()?;
    capture::run(pin_dir, options).map_err(|error| match error.downcast_ref::<capture::Unusable>() {
        Some(_) => Failure { code: 64, message: error.to_string() },
        None => Failure::kernel(error),
    })
}

fn detach(pin_dir: &Path) -> Result<(), Failure> {
    privileged()?;
    let work = || -> Result<usize> {
        if let Ok(dir) = std::fs::File::open(pin_dir) {
            anyhow::ensure!(dir.try_lock().is_ok(), "an agent uses {}: stop it first", pin_dir.display());
        }
        // Whatever the other maps are: the names say which stacks there are.
        let entries = crate::maps::names(&pin_dir.join("maps")).unwrap_or_default();
        let removed = kernel::remove(pin_dir)?;
        for (key, name) in entries {
            let name = String::from_utf8_lossy(&name);
            if key.kind == Kind::Interface as u32
                && let Some(vpc) = name.trim_end_matches('\0').strip_prefix("stack/")
            {
                Stack::of(pin_dir, vpc).remove()?;
            }
        }
        Ok(removed)
    };
    let removed = work().map_err(Failure::kernel)?;
    if removed == 0 {
        return say(&format!("nothing is pinned at {}\n", pin_dir.display()));
    }
    say(&format!("removed {removed} pins from {}\n", pin_dir.display()))
}
