//! What the agent tells: every listing is an array of objects.

use crate::agent::Agent;
use crate::api::{Asked, Chosen, Failure, Reply};
use crate::config::nearest;
use crate::connections::{Connection, State};
use crate::dns::entries::{balancer_name, endpoint_name, endpoints_domain};
use crate::dns::{Entry, Resolver, Standing};
use crate::domains::{Domain, State as Verification};
use crate::explain::mac;
use crate::ip::{self, with_port};
use crate::kernel::{Hook, Program};
use crate::maps::Maps;
use crate::model::Addresses;
use crate::names::{Kind, Names};
use crate::plan::{Image, Place};
use crate::sys::XdpMode;
use crate::{explain, flows, health, model, zones};
use anyhow::{Context, Result, ensure};
use privatelink_common::limits::OUTCOMES;
use privatelink_common::path::state::State as FlowState;
use privatelink_common::tables::{
    Address, BALANCER, Counter, Course, EndpointCounters, Flow6, Target, UNHEALTHY, VpcAddress,
};
use privatelink_common::verdict::Direction;
use privatelink_common::verdict::{Answer, DropReason, FRAGMENT_EARLY, PASSED, STEERED};
use privatelink_common::wire::Ip;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

/// The name of an outcome's counter.
fn outcome(code: u32) -> Option<&'static str> {
    match code {
        PASSED => Some("passed"),
        STEERED => Some("steered"),
        FRAGMENT_EARLY => Some("fragment_early"),
        _ => Answer::from_code(code)
            .map(Answer::name)
            .or_else(|| DropReason::from_code(code).map(DropReason::name)),
    }
}

/// Every counter of every VPC that is not zero; VPC 0 is what came by no VPC's interface.
fn outcomes(agent: &Agent) -> Result<Vec<(String, u32, Counter)>> {
    let mut rows = Vec::new();
    let vpcs = agent.image.names.keys().filter(|key| key.kind == Kind::Vpc as u32).map(|key| key.id);
    for vpc in std::iter::once(0).chain(vpcs) {
        let name = if vpc == 0 { "-".into() } else { agent.names.name(Kind::Vpc, vpc) };
        for code in (0..OUTCOMES).filter(|code| outcome(*code).is_some()) {
            let values = agent.maps.outcomes.get(vpc * OUTCOMES + code)?;
            let sum = values.iter().fold(Counter::default(), |sum, it| Counter {
                packets: sum.packets + it.packets,
                bytes: sum.bytes + it.bytes,
            });
            if sum.packets > 0 {
                rows.push((name.clone(), code, sum));
            }
        }
    }
    Ok(rows)
}

/// Drops, by VPC and reason.
pub fn drops(agent: &Agent) -> Result<Value> {
    let rows = outcomes(agent)?.into_iter().filter_map(|(vpc, code, counter)| {
        let reason = DropReason::from_code(code)?;
        let (packets, bytes, meaning) = (counter.packets, counter.bytes, reason.meaning().trim());
        Some(json!({ "vpc": vpc, "reason": reason.name(), "packets": packets, "bytes": bytes, "meaning": meaning }))
    });
    Ok(rows.collect())
}

/// The agent, the program, the interfaces, the maps, the counters.
pub fn status(agent: &Agent) -> Result<Value> {
    let programs = agent.kernel.programs().map(|it| program(agent, it)).collect::<Result<Vec<_>>>()?;
    let interfaces = interfaces(agent);
    let outcomes = outcomes(agent)?.into_iter().map(|(vpc, code, counter)| {
        json!({ "vpc": vpc, "outcome": outcome(code), "packets": counter.packets, "bytes": counter.bytes })
    });
    Ok(json!([{
        "agent": {
            "version": env!("CARGO_PKG_VERSION"), "pid": std::process::id(), "config": agent.config,
            "pin_dir": agent.pin_dir, "adopted": agent.kernel.adopted,
            "uptime_seconds": agent.started.elapsed().as_secs(),
        },
        "interfaces": interfaces,
        "programs": programs,
        "problems": problems(agent)?,
        "resolvers": agent.resolvers.iter().map(|(vpc, it)| resolver(vpc, it)).collect::<Vec<_>>(),
        "maps": maps(agent)?,
        "outcomes": outcomes.collect::<Vec<_>>(),
    }]))
}

/// A VPC's resolver: where it is, and what it has done since the agent started or its configuration changed.
fn resolver(vpc: &str, resolver: &Resolver) -> Value {
    let mut row = json!({ "vpc": vpc, "addresses": resolver.model.listens().collect::<Vec<_>>() });
    for (name, count) in resolver.counters().each() {
        row[name] = count.into();
    }
    row
}

/// Says that there is no such thing, and what it may have been meant to be.
fn unknown<'n>(what: &str, name: &str, known: impl Iterator<Item = &'n str>) -> String {
    let help = nearest(name, known).map(|help| format!(": {help}")).unwrap_or_default();
    format!("there is no {what} \"{name}\"{help}")
}

/// The names of VPCs that have a resolver, or of one of them.
pub fn names(agent: &Agent, vpc: Option<&str>) -> Result<Value> {
    if let Some(vpc) = vpc {
        let known = agent.model.vpcs.get(vpc);
        let known =
            known.with_context(|| unknown("VPC", vpc, agent.model.vpcs.keys().map(String::as_str)))?;
        ensure!(known.dns.is_some(), "the VPC \"{vpc}\" has no resolver: write dns = true at [vpcs.{vpc}]");
    }
    let row = |entry: &Entry| {
        let (standing, why) = match &entry.standing {
            Standing::Answered => ("answered", None),
            Standing::Withdrawn(why) => ("withdrawn", Some(why)),
            Standing::Absent(why) => ("absent", Some(why)),
        };
        let addresses = entry.addresses.iter().map(ToString::to_string);
        let resolves_to: Vec<_> = addresses.chain(entry.pointer.clone()).collect();
        json!({
            "vpc": entry.vpc, "name": entry.name, "kind": entry.kind.name(), "of": entry.of, "resolves_to": resolves_to,
            "standing": standing, "why": why,
        })
    };
    let entries = agent.entries();
    Ok(entries.iter().filter(|entry| vpc.is_none_or(|vpc| entry.vpc == vpc)).map(row).collect())
}

/// One of the programs.
fn program(agent: &Agent, program: Program) -> Result<Value> {
    let (name, program) = (program.name(), agent.kernel.program_info(program)?);
    let runs = program.run_count();
    let average =
        if runs == 0 { Value::Null } else { json!(program.run_time().as_nanos() / u128::from(runs)) };
    Ok(json!({
        "program": name, "id": program.id(), "tag": format!("{:016x}", program.tag()),
        "verified_instructions": program.verified_instruction_count(),
        "runs": runs, "nanoseconds_a_packet": average,
    }))
}

/// What an operator should look at, a sentence each.
fn problems(agent: &Agent) -> Result<Vec<String>> {
    let mut problems: Vec<_> = agent.store.failure().into_iter().collect();
    // A trunk's problems are those of its VLANs.
    for (name, place) in &agent.image.interfaces {
        let row = interface(agent, name, name, *place);
        match (row["state"].as_str(), row["problem"].as_str()) {
            (_, Some(problem)) => problems.push(format!("interface {name}: {problem}")),
            (Some("waiting"), None) => problems.push(format!("interface {name} is not there")),
            _ => {}
        }
    }
    for (id, target) in &agent.image.targets {
        let name = agent.names.name(Kind::Target, *id);
        let errors = agent.target_counters(*id)?.port_allocation_errors;
        if errors > 0 {
            problems.push(format!("target {name}: {errors} flows found no NAT port; more targets or secondary addresses make room"));
        }
        if target.state == UNHEALTHY {
            problems.push(format!("target {name} is unhealthy"));
        }
        if agent.maps.neighbours.get(&VpcAddress::new(target.vpc, target.address))?.is_none() {
            problems.push(format!("target {name} does not answer ARP or neighbour solicitations"));
        }
    }
    for (key, hop) in &agent.image.name_servers {
        if agent.maps.neighbours.get(key)?.is_none() {
            let (server, asked) = (ip::shown(key.address), ip::shown(hop.address));
            let vpc = agent.names.name(Kind::Vpc, key.vpc.into());
            problems.push(format!(
                "name server {server} of {vpc}: {asked} does not answer ARP or neighbour solicitations"
            ));
        }
    }
    let deaf = agent.resolvers.iter().filter(|(_, resolver)| !resolver.listens());
    problems
        .extend(deaf.map(|(vpc, _)| format!("the resolver of {vpc} cannot listen at all of its addresses")));
    problems
        .extend(agent.book.domains.iter().filter_map(|(service, domain)| unverified(agent, service, domain)));
    for (id, _) in agent.image.endpoints.iter().filter(|(_, gate)| gate.full) {
        problems
            .push(format!("endpoint {} has as many flows as it may", agent.names.name(Kind::Endpoint, *id)));
    }
    for it in agent.book.connections.values() {
        let (name, what) = (&it.endpoint, it.state);
        problems.extend(match what {
            State::PendingAcceptance => {
                Some(format!("endpoint {name} waits for acceptance: privatelink accept {name}"))
            }
            State::Expired => {
                Some(format!("endpoint {name} was not accepted in time: privatelink accept {name}"))
            }
            State::Failed => {
                Some(format!("endpoint {name} is of a principal that may not connect, {}", it.principal))
            }
            _ => None,
        });
    }
    for (balancer, faults) in zones::faults(&agent.image) {
        let name = agent.names.name(Kind::Balancer, balancer);
        problems
            .extend(faults.iter().map(|(key, fault)| format!("{} of {name} {fault}", zones::listener(key))));
    }
    Ok(problems)
}

/// What is to be done so that a service's name is verified.
fn unverified(agent: &Agent, service: &str, domain: &Domain) -> Option<String> {
    let (name, of) = (&domain.name, domain.name.strip_prefix("*.").unwrap_or(&domain.name));
    if domain.state == Verification::Verified {
        return None;
    }
    let failure = agent.looked.get(service).and_then(|(_, failure)| failure.as_ref());
    let failure = failure.map(|failure| format!("; {failure}")).unwrap_or_default();
    Some(if agent.model.dns.verification_servers.is_empty() {
        format!(
            "service {service}: whether {name} is the provider's cannot be asked: [dns] has no verification_servers"
        )
    } else {
        format!(
            "service {service}: the name {name} is {}; it wants the TXT record {}.{of} \"{}\"{failure}",
            domain.state.name(),
            domain.record,
            domain.value
        )
    })
}

/// Every interface, VLANs among them, by its name.
fn interfaces(agent: &Agent) -> Vec<Value> {
    let devices = agent.image.interfaces.iter().map(|(name, place)| (name, (name, *place)));
    let vlans = agent.image.vlans.iter().map(|(name, vlan)| (name, (&vlan.tags.trunk, vlan.place)));
    let all: BTreeMap<_, _> = devices.chain(vlans).collect();
    all.into_iter().map(|(name, (device, place))| interface(agent, name, device, place)).collect()
}

/// The name of a VPC, which a trunk may not have.
fn vpc_name(names: &Names, vpc: u16) -> String {
    if vpc == 0 { "-".into() } else { names.name(Kind::Vpc, vpc.into()) }
}

fn interface(agent: &Agent, name: &str, device: &str, place: Place) -> Value {
    let attached = agent.links.get(device);
    let state = match attached {
        None => "waiting",
        Some(attached) if attached.problem.is_some() => "failed",
        Some(_) => "attached",
    };
    let (hook, mode) = match attached.and_then(|it| it.hook) {
        None => (None, None),
        Some(Hook::Tcx) => (Some("tcx"), None),
        Some(Hook::Xdp(XdpMode::Native)) => (Some("xdp"), Some("native")),
        Some(Hook::Xdp(XdpMode::Generic)) => (Some("xdp"), Some("generic")),
    };
    let problem = attached.and_then(|it| it.problem.clone().or_else(|| it.remedy()));
    let choice = attached.and_then(|it| it.choice.as_ref());
    let mtu = attached.and_then(|_| agent.maps.mtus.get(&place.slot.into()).ok().flatten());
    json!({
        "interface": name, "vpc": vpc_name(&agent.names, place.vpc), "state": state, "hook": hook, "mode": mode,
        "why": choice.map(|it| it.why.clone()),
        "ifindex": attached.map(|it| it.ifindex), "mtu": mtu.filter(|it| *it > 0),
        "peer_lacks": attached.map(|it| it.peer.lacks.clone()), "problem": problem,
    })
}

fn maps(agent: &Agent) -> Result<Vec<Value>> {
    let (image, maps) = (&agent.image, &agent.maps);
    let rows = [
        ("prefixes", image.prefixes.len(), maps.prefixes.info()?, maps.prefixes.memory()?),
        (
            "rules_by_address",
            image.rules_by_address.len(),
            maps.rules_by_address.info()?,
            maps.rules_by_address.memory()?,
        ),
        (
            "rules_by_port",
            image.rules_by_port.len(),
            maps.rules_by_port.info()?,
            maps.rules_by_port.memory()?,
        ),
        ("subnets", image.subnets.len(), maps.subnets.info()?, maps.subnets.memory()?),
        ("addresses", image.addresses.len(), maps.addresses.info()?, maps.addresses.memory()?),
        ("endpoints", image.endpoints.len(), maps.endpoints.info()?, maps.endpoints.memory()?),
        ("balancers", image.balancers.len(), maps.balancers.info()?, maps.balancers.memory()?),
        ("listeners", image.listeners.len(), maps.listeners.info()?, maps.listeners.memory()?),
        ("tables", image.tables.len(), maps.tables.info()?, maps.tables.memory()?),
        ("targets", image.targets.len(), maps.targets.info()?, maps.targets.memory()?),
        ("neighbours", maps.neighbours.keys()?.len(), maps.neighbours.info()?, maps.neighbours.memory()?),
        ("callers", maps.callers.count()?, maps.callers.info()?, maps.callers.memory()?),
        ("established", maps.established.count()?, maps.established.info()?, maps.established.memory()?),
        ("pending", maps.pending.count()?, maps.pending.info()?, maps.pending.memory()?),
        ("established6", maps.established6.count()?, maps.established6.info()?, maps.established6.memory()?),
        ("pending6", maps.pending6.count()?, maps.pending6.info()?, maps.pending6.memory()?),
        ("streams", maps.streams.count()?, maps.streams.info()?, maps.streams.memory()?),
        ("streams6", maps.streams6.count()?, maps.streams6.info()?, maps.streams6.memory()?),
        ("names", image.names.len(), maps.names.info()?, maps.names.memory()?),
    ];
    Ok(rows
        .into_iter()
        .map(|(name, used, info, bytes)| {
            json!({ "map": name, "id": info.id, "used": used, "size": info.max_entries, "bytes": bytes })
        })
        .collect())
}

/// What is published.
pub fn services(agent: &Agent) -> Value {
    published(agent, |_| true)
}

/// One of them.
pub fn service(agent: &Agent, service: &str) -> Value {
    published(agent, |name| name == service)
}

fn published(agent: &Agent, wanted: impl Fn(&str) -> bool) -> Value {
    let model = &agent.model;
    let row = |(name, service): (&String, &crate::model::EndpointService)| {
        let endpoints = model.endpoints.values().filter(|endpoint| endpoint.service == *name).count();
        let balancers = service.load_balancers.iter().filter_map(|it| model.load_balancers.get(it));
        let zones: std::collections::BTreeSet<_> = balancers.flat_map(|it| it.addresses.keys()).collect();
        let id = agent.book.services.get(name);
        let service_name = id.map(|id| format!("com.amazonaws.vpce.{}.{id}", model.region));
        let types: Vec<_> = service.supported_ip_address_types.iter().map(|it| it.name()).collect();
        let private = service.private_name.as_ref();
        let domain = agent.book.domains.get(name);
        let state = private.map(|_| domain.map_or("unchecked", |it| it.state.name()));
        let record = domain.zip(private).map(|(it, private)| format!("{}.{}", it.record, private.domain()));
        let base = id.map(|id| format!("{id}.{}", endpoints_domain(model)));
        json!({
            "service": name, "id": id, "service_name": service_name, "load_balancers": service.load_balancers, "zones": zones,
            "supported_ip_address_types": types, "acceptance_required": service.acceptance.required, "endpoints": endpoints,
            "base_endpoint_dns_name": base, "private_dns_name": private.map(|it| &it.name), "private_dns_name_state": state,
            "txt_record": record, "txt_value": domain.map(|it| &it.value),
        })
    };
    model.services.iter().filter(|(name, _)| wanted(name)).map(row).collect()
}

/// Every address of every endpoint, with its counters.
pub fn endpoints(agent: &Agent) -> Result<Value> {
    let mut active = BTreeMap::<u32, u64>::new();
    let mut count = |flow: &Course| {
        if flow.direction() == Direction::ToProvider && !flows::is_over(flow) {
            *active.entry(flow.endpoint.into()).or_default() += 1;
        }
    };
    agent.maps.established.walk(4096, |_, values| values.iter().for_each(|flow| count(flow)))?;
    agent.maps.established6.walk(4096, |_, values| values.iter().for_each(|flow| count(flow)))?;
    let faults = zones::faults(&agent.image);
    let unfit = |it: &&Address| faults.contains_key(&it.balancer);
    let unfit: BTreeSet<u32> = agent.image.addresses.values().filter(unfit).map(|it| it.endpoint).collect();
    let mut rows = Vec::new();
    for (name, endpoint) in &agent.model.endpoints {
        for (zone, address) in each(&endpoint.addresses) {
            let full = crate::plan::endpoint_name(name, zone, address);
            let connection = agent.book.of(name);
            let about = About {
                name,
                id: connection.map(|it| it.id.as_str()),
                vpc: &endpoint.vpc,
                service: Some(&endpoint.service),
                state: connection.map_or("", |it| it.state.name()),
                dns_names: dns_names(agent, endpoint, connection, zone),
            };
            rows.push(endpoint_row(agent, &full, &about, zone, address, (&active, &unfit))?);
        }
    }
    for (name, balancer) in agent.model.load_balancers.iter().filter(|(_, it)| it.serves_own_vpc) {
        for (zone, address) in each(&balancer.addresses) {
            let full = crate::plan::own_name(name, zone, address);
            let shown = full.split('/').next().unwrap_or(&full);
            let dns_names =
                [None, Some(zone.as_str())].map(|zone| balancer_name(&agent.model, name, zone)).to_vec();
            let (vpc, state) = (&balancer.vpc, "available");
            let about = About { name: shown, id: None, vpc, service: None, state, dns_names };
            rows.push(endpoint_row(agent, &full, &about, zone, address, (&active, &unfit))?);
        }
    }
    Ok(Value::Array(rows))
}

/// The addresses of all zones, each with its zone.
fn each(zones: &BTreeMap<String, Addresses>) -> impl Iterator<Item = (&String, IpAddr)> {
    zones.iter().flat_map(|(zone, addresses)| addresses.iter().map(move |address| (zone, address)))
}

/// The names of an endpoint, for all zones, for one, and the one that its service brings, whether or not its VPC has a resolver.
fn dns_names(
    agent: &Agent,
    endpoint: &model::Endpoint,
    connection: Option<&Connection>,
    zone: &str,
) -> Vec<String> {
    let Some(connection) = connection.filter(|it| it.state.exists()) else { return Vec::new() };
    let called = |zone| endpoint_name(&agent.model, &agent.book, connection, zone);
    let service = agent.model.services.get(&endpoint.service).filter(|_| endpoint.private_dns_enabled);
    let private = service.and_then(|it| it.private_name.as_ref()).map(|it| it.name.clone());
    [called(None), called(Some(zone))].into_iter().chain(private).collect()
}

/// A connection, after a decision.
pub fn connection(agent: &Agent, endpoint: &str) -> Value {
    let row = |it: &crate::connections::Connection| {
        json!({
            "endpoint": it.endpoint, "id": it.id, "vpc": it.vpc, "principal": it.principal, "service": it.service,
            "state": it.state.name(),
        })
    };
    agent.book.of(endpoint).map(row).into_iter().collect()
}

/// What stands beside an endpoint's address.
struct About<'a> {
    name: &'a str,
    id: Option<&'a str>,
    vpc: &'a str,
    service: Option<&'a str>,
    state: &'a str,
    dns_names: Vec<String>,
}

/// A row about an endpoint's address; how many flows each has, and which are in zones that are not fit.
fn endpoint_row(
    agent: &Agent,
    full: &str,
    about: &About<'_>,
    zone: &str,
    address: IpAddr,
    (active, unfit): (&BTreeMap<u32, u64>, &BTreeSet<u32>),
) -> Result<Value> {
    // One that failed has no number, and nothing is counted for it.
    let id = agent.names.id(Kind::Endpoint, full).unwrap_or(0);
    let sum =
        agent.maps.counters.get(id)?.iter().fold(EndpointCounters::default(), |sum, it| EndpointCounters {
            to_provider_packets: sum.to_provider_packets + it.to_provider_packets,
            to_provider_bytes: sum.to_provider_bytes + it.to_provider_bytes,
            to_consumer_packets: sum.to_consumer_packets + it.to_consumer_packets,
            to_consumer_bytes: sum.to_consumer_bytes + it.to_consumer_bytes,
            new_flows: sum.new_flows + it.new_flows,
            resets: sum.resets + it.resets,
        });
    let gate = agent.image.endpoints.get(&id).copied().unwrap_or_default();
    Ok(json!({
        "endpoint": about.name, "id": about.id, "vpc": about.vpc, "service": about.service, "zone": zone,
        "address": address.to_string(), "dns_names": about.dns_names, "state": about.state, "full": gate.full,
        "zone_health": if unfit.contains(&id) { "unhealthy" } else { "healthy" },
        "active_flows": active.get(&id).unwrap_or(&0),
        "to_provider_packets": sum.to_provider_packets, "to_provider_bytes": sum.to_provider_bytes,
        "to_consumer_packets": sum.to_consumer_packets, "to_consumer_bytes": sum.to_consumer_bytes,
        "new_flows": sum.new_flows, "resets": sum.resets,
    }))
}

/// Every target, with its health, what it has to do, and where it is; deregistered ones for as long as they drain.
pub fn targets(agent: &Agent) -> Result<Value> {
    let mut rows = Vec::new();
    let mut registered = BTreeSet::new();
    for (name, group) in &agent.model.target_groups {
        for target in &group.targets {
            let Some(id) = agent.names.id(Kind::Target, &crate::plan::target_name(name, target)) else {
                continue;
            };
            let Some(entry) = agent.image.targets.get(&id) else { continue };
            registered.insert(id);
            let used = agent.is_watched(id) || !group.health_check.enabled;
            let health = health::describe(entry.state, used, agent.reasons.get(&id));
            let (zone, weight) = (Some(target.zone.as_str()), Some(target.weight));
            rows.push(target_row(agent, id, entry, &health, zone, weight)?);
        }
    }
    for (id, entry) in agent.image.targets.iter().filter(|(id, _)| !registered.contains(id)) {
        let health = health::describe(entry.state, true, None);
        rows.push(target_row(agent, *id, entry, &health, None, None)?);
    }
    Ok(Value::Array(rows))
}

fn target_row(
    agent: &Agent,
    id: u32,
    entry: &Target,
    health: &health::Description,
    zone: Option<&str>,
    weight: Option<u16>,
) -> Result<Value> {
    let name = agent.names.name(Kind::Target, id);
    let group = name.rsplit_once('/').map_or(name.as_str(), |(group, _)| group);
    let hop = agent.maps.neighbours.get(&VpcAddress::new(entry.vpc, entry.address))?;
    Ok(json!({
        "target_group": group, "vpc": agent.names.name(Kind::Vpc, entry.vpc.into()), "zone": zone,
        "address": ip::shown(entry.address).to_string(), "port": entry.port.get(), "weight": weight,
        "state": health.state, "reason": health.reason, "description": health.description,
        "since_seconds": flows::now().saturating_sub(entry.since),
        "flows": agent.survey.of(id, 0), "nat_ports": agent.survey.ports(id),
        "port_allocation_errors": agent.target_counters(id)?.port_allocation_errors,
        "mac": hop.map(|hop| mac(hop.mac)),
        "interface": hop.map(|hop| agent.names.name(Kind::Interface, hop.interface.into())),
    }))
}

/// Whether an address of an endpoint is of what was asked for: `ENDPOINT` or `ENDPOINT/ZONE`.
fn is_of(endpoint: &str, wanted: &str) -> bool {
    endpoint.strip_prefix(wanted).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Whether a target is what was asked for: `ADDRESS` or `ADDRESS:PORT`.
fn is_at(address: Ip, port: u16, wanted: &str) -> bool {
    let address = ip::shown(address);
    wanted.parse() == Ok(address) || wanted.parse() == Ok(SocketAddr::new(address, port))
}

/// Whether there is what flows are asked of; that there is no such endpoint is not that it has no flows.
pub fn sensible(agent: &Agent, chosen: &Chosen) -> Result<()> {
    if let Some(wanted) = &chosen.endpoint {
        // One that failed has no addresses, and is one all the same.
        let all = agent.names.all(Kind::Endpoint).map(|(_, name)| name);
        let all: Vec<_> = all.chain(agent.model.endpoints.keys().map(String::as_str)).collect();
        let known = all.iter().any(|name| is_of(name, wanted));
        ensure!(known, unknown("endpoint", wanted, all.into_iter()));
    }
    if let Some(wanted) = &chosen.target {
        let targets = agent.image.targets.values();
        let known = targets.clone().any(|it| is_at(it.address, it.port.get(), wanted));
        let all: Vec<_> = targets.map(|it| with_port(it.address, it.port).to_string()).collect();
        ensure!(known, unknown("target", wanted, all.iter().map(String::as_str)));
    }
    Ok(())
}

/// Flows, each once.
pub fn flows(maps: &Maps, names: &Names, chosen: &Chosen) -> Result<Value> {
    let now = flows::now();
    let wanted = |flow: &Flow6| {
        let endpoint = names.name(Kind::Endpoint, flow.endpoint.into());
        let of = |wanted: &String| is_of(&endpoint, wanted);
        let to = |wanted: &String| is_at(flow.destination, flow.destination_port.get(), wanted);
        chosen.endpoint.as_ref().is_none_or(of)
            && chosen.target.as_ref().is_none_or(to)
            && chosen.state.as_ref().is_none_or(|state| FlowState::from_number(flow.state).name() == state)
            && chosen.older_than.is_none_or(|seconds| now.saturating_sub(flow.opened) >= seconds)
    };
    let rows = flows::list(maps, chosen.limit, wanted)?.into_iter().map(|(key, flow)| {
        json!({
            "vpc": names.name(Kind::Vpc, key.vpc.into()),
            "protocol": if key.protocol == 6 { "tcp" } else { "udp" },
            "client": with_port(key.source, key.source_port).to_string(),
            "endpoint_address": with_port(key.destination, key.destination_port).to_string(),
            "nat": with_port(flow.source, flow.source_port).to_string(),
            "target": with_port(flow.destination, flow.destination_port).to_string(),
            "endpoint": names.name(Kind::Endpoint, flow.endpoint.into()),
            "state": FlowState::from_number(flow.state).name(),
            "idle_seconds": flows::idle(&flow, now), "age_seconds": now.saturating_sub(flow.opened),
        })
    });
    Ok(rows.collect())
}

/// What the path would do.
pub fn explain(agent: &Agent, asked: &Asked) -> Reply {
    explain::check(&agent.names, &asked.into()).map_err(Failure::usage)?;
    explained(agent, asked).map_err(Failure::kernel)
}

fn explained(agent: &Agent, asked: &Asked) -> Result<Value> {
    let connections = agent.book.connections.values().filter(|it| !it.state.is_gone());
    let standing = |it: &Connection| match it.state {
        State::PendingAcceptance | State::Rejected | State::Expired => {
            format!("{}: privatelink accept {} lets it in", it.state.name(), it.endpoint)
        }
        state => state.name().to_owned(),
    };
    let standing: BTreeMap<_, _> = connections.map(|it| (it.endpoint.clone(), standing(it))).collect();
    let mut steps =
        explain::explain(&agent.maps, &agent.names, &agent.image.rules, &standing, &asked.into())?;
    // Of an endpoint whose principal is not allowed, the path knows nothing.
    let failed = agent.model.endpoints.iter().find(|(name, endpoint)| {
        let here = endpoint.addresses.values().flat_map(Addresses::iter).any(|it| it == asked.to.ip());
        let state = agent.book.of(name).map(|it| it.state);
        endpoint.vpc == asked.vpc && here && state == Some(State::Failed)
    });
    if let Some((name, endpoint)) = failed {
        steps.insert(
            0,
            format!(
                "endpoint {name} would be {}, but {} is not among the allowed principals of {}",
                asked.to.ip(),
                endpoint.principal,
                endpoint.service
            ),
        );
    }
    Ok(steps
        .into_iter()
        .enumerate()
        .map(|(index, step)| json!({ "step": index + 1, "says": step }))
        .collect())
}

/// The difference between two images, each with its names, an entry a row.
pub fn difference((from, were): (&Image, &Names), (to, are): (&Image, &Names)) -> Value {
    let mut rows = Vec::new();
    let own = |it: &Address| if it.kind == BALANCER { "load balancer" } else { "endpoint" };
    let at = |names: &Names, key: &VpcAddress| {
        format!("{} in {}", ip::shown(key.address), names.name(Kind::Vpc, key.vpc.into()))
    };
    let places = |image: &Image| -> BTreeMap<String, Place> {
        image.places().map(|(name, place)| (name.clone(), place)).collect()
    };
    changes(&mut rows, "interface", (&places(from), were), (&places(to), are), |names, name, place| {
        format!("{name} in {}", vpc_name(names, place.vpc))
    });
    let chosen = |image: &Image| -> BTreeMap<String, model::Hook> {
        let chosen = image.hooks.iter().filter(|(_, hook)| **hook != model::Hook::Auto);
        chosen.map(|(name, hook)| (name.clone(), *hook)).collect()
    };
    changes(&mut rows, "hook", (&chosen(from), were), (&chosen(to), are), |_, name, hook| {
        format!("{} for {name}", hook.name())
    });
    changes(&mut rows, "address", (&from.addresses, were), (&to.addresses, are), |names, key, it| {
        format!("{} {}", own(it), at(names, key))
    });
    changes(&mut rows, "endpoint", (&from.endpoints, were), (&to.endpoints, are), |names, id, open| {
        format!("{} {}", names.name(Kind::Endpoint, *id), if open.open { "available" } else { "rejected" })
    });
    changes(&mut rows, "listener", (&from.listeners, were), (&to.listeners, are), |names, key, _| {
        let protocol = if key.protocol == 6 { "tcp" } else { "udp" };
        format!("{protocol}/{} of {}", key.port, names.name(Kind::Balancer, key.balancer))
    });
    changes(&mut rows, "target", (&from.targets, were), (&to.targets, are), |names, _, it| {
        format!("{} in {}", with_port(it.address, it.port), names.name(Kind::Vpc, it.vpc.into()))
    });
    changes(&mut rows, "table", (&from.tables, were), (&to.tables, are), |names, id, table| {
        format!("{} of {} slots", names.name(Kind::Table, *id), table.len())
    });
    let said = |image: &Image| -> BTreeMap<String, ()> {
        image.rules.values().flatten().map(|rule| (rule.clone(), ())).collect()
    };
    changes(&mut rows, "rule", (&said(from), were), (&said(to), are), |_, rule, ()| rule.clone());
    changes(&mut rows, "subnet", (&from.subnets, were), (&to.subnets, are), |names, _, subnet| {
        names.name(Kind::Subnet, subnet.id)
    });
    changes(&mut rows, "prefix", (&from.prefixes, were), (&to.prefixes, are), |names, key, _| {
        let vpc = names.name(Kind::Vpc, key.prefix.vpc.get());
        let network = Ip(key.prefix.address);
        let before = if network.is_ipv4() { 128 } else { 32 };
        format!("{}/{} of {vpc}", ip::shown(network), key.bits.saturating_sub(before))
    });
    Value::Array(rows)
}

/// The difference between two tables, each with its names: what is removed has names only in those from before.
fn changes<K: Ord, V: PartialEq>(
    rows: &mut Vec<Value>,
    kind: &str,
    (from, were): (&BTreeMap<K, V>, &Names),
    (to, are): (&BTreeMap<K, V>, &Names),
    what: impl Fn(&Names, &K, &V) -> String,
) {
    let mut row = |change: &str, key: &K, value: &V| {
        let names = if change == "remove" { were } else { are };
        rows.push(json!({ "change": change, "kind": kind, "what": what(names, key, value) }))
    };
    for (key, value) in to {
        match from.get(key) {
            None => row("add", key, value),
            Some(old) if old != value => row("change", key, value),
            Some(_) => {}
        }
    }
    from.iter().filter(|(key, _)| !to.contains_key(key)).for_each(|(key, value)| row("remove", key, value));
}
