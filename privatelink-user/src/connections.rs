//! The connections of endpoints to their services: AWS's states and transitions, as pure functions of what was decided and what the
//! configuration says.
//!
//! ```text
//!   (endpoint) ──▶ pendingAcceptance ──accept──▶ pending ──▶ available ──removed──▶ deleting ──▶ deleted ──▶ (forgotten)
//!        │                │    └──────age──▶ expired ──accept──▶ pending      any ──removed──▶ deleting
//!        │                └──reject──▶ rejected ──accept──▶ pending           available ──reject──▶ rejected
//!        ├── needs no acceptance ──▶ pending
//!        └── principal not allowed ──▶ failed ── allowed ──▶ (as if it were added)
//! ```
//!
//! `pending` lasts until the maps say so. A rejected or expired connection may be accepted all the same; AWS does not say.

use crate::domains::Domain;
use crate::model::{EndpointService, EventType, Model};
use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Seconds that a removed endpoint's flows are answered with RST.
const DELETING: u64 = privatelink_common::limits::TCP_CLOSED as u64;
/// Seconds that a deleted connection is still listed.
const DELETED: u64 = 3600;

/// A connection's state (AWS: concepts#endpoint-states), by the names that the wire has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum State {
    /// The provider has to decide.
    PendingAcceptance,
    /// It is accepted, and about to be opened.
    Pending,
    /// Traffic passes.
    Available,
    /// The provider does not want it.
    Rejected,
    /// Nobody has decided in time.
    Expired,
    /// Its principal may not connect. Nothing of it exists.
    Failed,
    /// Its endpoint is removed; what is left of its flows is being told.
    Deleting,
    /// It is over.
    Deleted,
}

impl State {
    /// As AWS writes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::PendingAcceptance => "pendingAcceptance",
            Self::Pending => "pending",
            Self::Available => "available",
            Self::Rejected => "rejected",
            Self::Expired => "expired",
            Self::Failed => "failed",
            Self::Deleting => "deleting",
            Self::Deleted => "deleted",
        }
    }

    /// Whether traffic passes, or is about to.
    pub const fn is_open(self) -> bool {
        matches!(self, Self::Pending | Self::Available)
    }

    /// Whether there is an endpoint with addresses.
    pub const fn exists(self) -> bool {
        !matches!(self, Self::Failed | Self::Deleting | Self::Deleted)
    }

    /// Whether there is no endpoint any more, or never was.
    pub const fn is_gone(self) -> bool {
        matches!(self, Self::Deleting | Self::Deleted)
    }
}

/// What an endpoint has with its service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connection {
    /// `vpce-` and 17 hexadecimal digits.
    pub id: String,
    /// The endpoint's name.
    pub endpoint: String,
    /// The endpoint's VPC.
    pub vpc: String,
    /// Who connects: an ARN.
    pub principal: String,
    /// The service's name.
    pub service: String,
    /// Its state.
    pub state: State,
    /// When it came into this state, in seconds since 1970.
    pub since: u64,
    /// When it came to be, in seconds since 1970.
    pub created: u64,
}

/// Something that a provider may want to hear of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Event {
    /// What.
    pub event: EventType,
    /// When, in seconds since 1970.
    pub time: u64,
    /// The service's name.
    pub service: String,
    /// The service's id.
    pub service_id: String,
    /// The endpoint's name.
    pub endpoint: String,
    /// The endpoint's id.
    pub vpc_endpoint_id: String,
    /// The account that it belongs to.
    pub vpc_endpoint_owner: String,
    /// The connection's state by then.
    pub vpc_endpoint_state: State,
}

/// Every connection, and the services' ids.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Book {
    /// By id.
    pub connections: BTreeMap<String, Connection>,
    /// The services' ids, by name.
    pub services: BTreeMap<String, String>,
    /// The verified names of services, by the service's name.
    pub domains: BTreeMap<String, Domain>,
}

/// An id as AWS forms them: a prefix, and 17 hexadecimal digits that no other has.
fn id(prefix: &str) -> Result<String> {
    let mut random = [0; 9];
    getrandom::fill(&mut random)?;
    let digits: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("{prefix}-{}", &digits[..17]))
}

impl Book {
    /// The connection of an endpoint that there is, by the endpoint's name or id.
    pub fn of(&self, endpoint: &str) -> Option<&Connection> {
        let by_name = |it: &&Connection| it.endpoint == endpoint && !it.state.is_gone();
        self.connections.get(endpoint).or_else(|| self.connections.values().find(by_name))
    }

    /// The state of each endpoint that there is, and its id.
    pub fn states(&self) -> BTreeMap<String, (State, String)> {
        let there = self.connections.values().filter(|it| !it.state.is_gone());
        there.map(|it| (it.endpoint.clone(), (it.state, it.id.clone()))).collect()
    }

    /// Takes note of the configuration: of endpoints that have come, have gone, or need no decision any more.
    pub fn settle(&mut self, model: &Model, now: u64) -> Result<Vec<Event>> {
        let mut events = Vec::new();
        self.services.retain(|name, _| model.services.contains_key(name));
        for name in model
            .services
            .keys()
            .filter(|name| !self.services.contains_key(*name))
            .cloned()
            .collect::<Vec<_>>()
        {
            self.services.insert(name, id("vpce-svc")?);
        }
        self.remove(model, now, &mut events);
        self.add(model, now, &mut events)?;
        self.age(model, now);
        self.settle_domains(model, now)?;
        Ok(events)
    }

    /// Ends the connections of endpoints that are in the configuration no more, or lead elsewhere, which makes them others (AWS has no
    /// way to change it).
    fn remove(&mut self, model: &Model, now: u64, events: &mut Vec<Event>) {
        let stays = |it: &Connection| {
            model
                .endpoints
                .get(&it.endpoint)
                .is_some_and(|endpoint| (&endpoint.service, &endpoint.vpc) == (&it.service, &it.vpc))
        };
        let gone = |it: &&Connection| !it.state.is_gone() && !stays(it);
        let gone: Vec<String> = self.connections.values().filter(gone).map(|it| it.id.clone()).collect();
        for id in gone {
            // Of one that failed, nobody has heard.
            let told = self.connections.get(&id).is_some_and(|it| it.state != State::Failed);
            self.enter(&id, State::Deleting, now, told.then_some(EventType::Delete), events);
        }
    }

    fn add(&mut self, model: &Model, now: u64, events: &mut Vec<Event>) -> Result<()> {
        for (name, endpoint) in &model.endpoints {
            let Some(service) = model.services.get(&endpoint.service) else { continue };
            let permitted = service.permits(&endpoint.principal);
            let before = self.of(name).map(|it| (it.id.clone(), it.state));
            let (id, state) = match before {
                Some(before) => before,
                None => (self.create(model, name, now)?, State::Failed),
            };
            let at_once = || self.needs_no_acceptance(service, &endpoint.service, model, name);
            match state {
                State::Failed if permitted => {
                    let next = if at_once() { State::Pending } else { State::PendingAcceptance };
                    self.enter(&id, next, now, Some(EventType::Connect), events);
                }
                State::PendingAcceptance | State::Expired if permitted && at_once() => {
                    self.enter(&id, State::Pending, now, Some(EventType::Accept), events);
                }
                State::PendingAcceptance | State::Pending | State::Available
                    if !permitted && service.acceptance.auto_reject =>
                {
                    self.enter(&id, State::Rejected, now, Some(EventType::Reject), events);
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn create(&mut self, model: &Model, name: &str, now: u64) -> Result<String> {
        let id = id("vpce")?;
        let endpoint = model.endpoints.get(name);
        let of =
            |part: fn(&crate::model::Endpoint) -> &String| endpoint.map(part).cloned().unwrap_or_default();
        let connection = Connection {
            id: id.clone(),
            endpoint: name.to_owned(),
            vpc: of(|it| &it.vpc),
            principal: of(|it| &it.principal),
            service: of(|it| &it.service),
            state: State::Failed,
            since: now,
            created: now,
        };
        self.connections.insert(id.clone(), connection);
        Ok(id)
    }

    /// Whether a connection is accepted without anybody being asked: the service asks nobody, or not for this account as long as it
    /// has no more connections than it may.
    fn needs_no_acceptance(
        &self,
        service: &EndpointService,
        name: &str,
        model: &Model,
        endpoint: &str,
    ) -> bool {
        if !service.acceptance.required {
            return true;
        }
        let account = |endpoint: &str| model.endpoints.get(endpoint).map(|it| it.account().to_owned());
        let Some(wanted) = account(endpoint) else { return false };
        let Some(rule) = service.acceptance.auto_accept.iter().find(|it| it.account == wanted) else {
            return false;
        };
        let same = |it: &&Connection| {
            it.service == name && it.state.is_open() && account(&it.endpoint).as_ref() == Some(&wanted)
        };
        rule.connection_limit
            .is_none_or(|limit| self.connections.values().filter(same).count() < limit as usize)
    }

    /// Moves on what only waits for time. Returns whether anything did.
    pub fn age(&mut self, model: &Model, now: u64) -> bool {
        let before = self.connections.len();
        self.connections.retain(|_, it| it.state != State::Deleted || now.saturating_sub(it.since) < DELETED);
        let mut changed = self.connections.len() != before;
        for it in self.connections.values_mut() {
            let waited = now.saturating_sub(it.since);
            let patience =
                model.services.get(&it.service).map(|service| service.acceptance.timeout.as_secs());
            let next = match it.state {
                State::PendingAcceptance if patience.is_some_and(|patience| waited >= patience) => {
                    State::Expired
                }
                State::Deleting if waited >= DELETING => State::Deleted,
                _ => continue,
            };
            (it.state, it.since, changed) = (next, now, true);
        }
        changed
    }

    /// The provider accepts a connection.
    pub fn accept(&mut self, endpoint: &str, now: u64) -> Result<Vec<Event>> {
        let (id, state) = self.decidable(endpoint)?;
        let mut events = Vec::new();
        if !state.is_open() {
            self.enter(&id, State::Pending, now, Some(EventType::Accept), &mut events);
        }
        Ok(events)
    }

    /// The provider rejects a connection, whether or not it was accepted.
    pub fn reject(&mut self, endpoint: &str, now: u64) -> Result<Vec<Event>> {
        let (id, state) = self.decidable(endpoint)?;
        let mut events = Vec::new();
        if state != State::Rejected {
            self.enter(&id, State::Rejected, now, Some(EventType::Reject), &mut events);
        }
        Ok(events)
    }

    fn decidable(&self, endpoint: &str) -> Result<(String, State)> {
        let Some(it) = self.of(endpoint) else {
            let there = self.connections.values().filter(|it| !it.state.is_gone());
            let names = there.map(|it| it.endpoint.as_str());
            let help =
                crate::config::nearest(endpoint, names).map(|help| format!(": {help}")).unwrap_or_default();
            bail!("there is no endpoint \"{endpoint}\"{help}");
        };
        if it.state == State::Failed {
            let (principal, service) = (&it.principal, &it.service);
            bail!(
                "the endpoint \"{endpoint}\" is of {principal}, who is not among the allowed principals of {service}"
            );
        }
        if it.state.is_gone() {
            bail!("the endpoint \"{endpoint}\" is {}", it.state.name());
        }
        Ok((it.id.clone(), it.state))
    }

    /// The maps say that what was pending is open. Returns whether anything was.
    pub fn opened(&mut self, now: u64) -> bool {
        let pending: Vec<_> = self.connections.values_mut().filter(|it| it.state == State::Pending).collect();
        let any = !pending.is_empty();
        for it in pending {
            (it.state, it.since) = (State::Available, now);
        }
        any
    }

    fn enter(&mut self, id: &str, state: State, now: u64, event: Option<EventType>, events: &mut Vec<Event>) {
        let Some(it) = self.connections.get_mut(id) else { return };
        (it.state, it.since) = (state, now);
        let Some(event) = event else { return };
        events.push(Event {
            event,
            time: now,
            service: it.service.clone(),
            service_id: self.services.get(&it.service).cloned().unwrap_or_default(),
            endpoint: it.endpoint.clone(),
            vpc_endpoint_id: it.id.clone(),
            vpc_endpoint_owner: crate::model::account_of(&it.principal).to_owned(),
            vpc_endpoint_state: state,
        });
    }
}
