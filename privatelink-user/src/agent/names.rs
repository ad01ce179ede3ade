//! The VPCs' resolvers: started and stopped with their VPCs, shown what has changed; and whether providers own the names that they bring.

use super::acceptance::unix_time;
use super::{Agent, Event};
use crate::api::{Failure, Reply};
use crate::dns::entries::{Facts, balancers_domain, endpoints_domain, entries};
use crate::dns::verify::verify;
use crate::dns::{Entry, Resolver, View};
use crate::listing;
use anyhow::{Context, Result, anyhow};
use log::{error, info, warn};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// A look at the record that says whose a name is.
#[derive(Debug)]
pub struct Looked {
    /// The service that brings the name.
    pub service: String,
    /// The name.
    pub name: String,
    /// Whether the record is there, if anybody could say.
    pub found: Result<bool>,
    /// Who wants to hear of it.
    pub asked: Option<oneshot::Sender<Reply>>,
}

impl Agent {
    /// Every name of every VPC that has a resolver.
    pub fn entries(&self) -> Vec<Entry> {
        entries(&Facts { model: &self.model, book: &self.book, image: &self.image, names: &self.names })
    }

    /// Starts and stops resolvers as the configuration has them, and shows them the names as they are.
    pub(super) fn follow_names(&mut self) {
        let vpcs = &self.model.vpcs;
        self.resolvers.retain(|vpc, running| {
            let wanted = vpcs.get(vpc).and_then(|it| it.dns.as_ref());
            running.is_running() && wanted.is_some_and(|wanted| wanted.does_as(&running.model))
        });
        if vpcs.values().all(|vpc| vpc.dns.is_none()) {
            return;
        }
        let entries = self.entries();
        let domains = [endpoints_domain(&self.model), balancers_domain(&self.model)];
        for (name, vpc) in &self.model.vpcs {
            let Some(wanted) = &vpc.dns else { continue };
            let view = View::new(entries.iter().filter(|entry| entry.vpc == *name), &domains);
            if let Some(running) = self.resolvers.get(name) {
                running.show(view);
            } else if let Some((_, sockets)) = self.stacks.get(name) {
                let resolver = Resolver::start(&self.runtime, name, wanted, sockets, view);
                self.resolvers.insert(name.clone(), resolver);
            }
        }
    }

    /// Starts those again that have come to grief.
    pub(super) fn look_at_resolvers(&mut self) {
        if let Some((vpc, _)) = self.resolvers.iter().find(|(_, resolver)| !resolver.is_running()) {
            error!("the resolver of {vpc} has ended, and is started again");
            self.follow_names();
        }
    }

    /// Looks records up whose time has come.
    pub(super) fn look_at_domains(&mut self) {
        if self.book.domains.is_empty() || self.model.dns.verification_servers.is_empty() {
            return;
        }
        let (now, unix) = (Instant::now(), unix_time());
        let due = |service: &String, interval: u64| {
            self.looked
                .get(service)
                .is_none_or(|(at, _)| now.duration_since(*at) >= Duration::from_secs(interval))
        };
        let due: Vec<String> = self
            .book
            .domains
            .iter()
            .filter(|(service, domain)| due(service, domain.interval(unix)))
            .map(|(service, _)| service.clone())
            .collect();
        due.iter().for_each(|service| self.look_up(service, None));
        let domains = &self.book.domains;
        self.looked.retain(|service, _| domains.contains_key(service));
    }

    fn look_up(&mut self, service: &str, asked: Option<oneshot::Sender<Reply>>) {
        let Some(domain) = self.book.domains.get(service).cloned() else { return };
        self.looked.entry(service.to_owned()).or_insert((Instant::now(), None)).0 = Instant::now();
        let (servers, events, service) =
            (self.model.dns.verification_servers.clone(), self.events.clone(), service.to_owned());
        self.runtime.spawn(async move {
            let of = domain.name.strip_prefix("*.").unwrap_or(&domain.name);
            let found = verify(&servers, &domain.record, of, &domain.value).await;
            // The agent may be stopping.
            let _ = events.send(Event::Looked(Looked { service, name: domain.name, found, asked }));
        });
    }

    pub(super) fn take_look(&mut self, Looked { service, name, found, asked }: Looked) {
        let reply = self.note_look(&service, &name, found);
        let failure = reply.as_ref().err().map(|failure| failure.message.clone());
        if let Some((_, before)) = self.looked.get_mut(&service)
            && *before != failure
        {
            if let Some(failure) = &failure {
                warn!("{failure}");
            }
            *before = failure;
        }
        if let Some(asked) = asked {
            // Whoever asked may have gone.
            let _ = asked.send(reply);
        }
    }

    fn note_look(&mut self, service: &str, name: &str, found: Result<bool>) -> Reply {
        let found =
            found.with_context(|| format!("nobody can say whose {name} is")).map_err(Failure::kernel)?;
        let state = |agent: &Self| agent.book.domains.get(service).map(|it| it.state);
        let before = state(self);
        let mut book = self.book.clone();
        book.looked(&self.model, service, name, found, unix_time());
        self.keep(book, &[], &[]).map_err(Failure::kernel)?;
        if let Some(after) = state(self).filter(|after| Some(*after) != before) {
            info!("the private DNS name of the service {service}, {name}, is {}", after.name());
            self.follow_names();
        }
        Ok(listing::service(self, service))
    }

    /// Looks a service's record up now (AWS: StartVpcEndpointServicePrivateDnsVerification), and then replies.
    pub(super) fn verify(&mut self, service: &str, reply: oneshot::Sender<Reply>) {
        let by_id = |(_, id): &(&String, &String)| id.as_str() == service;
        let name = self.book.services.iter().find(by_id).map_or(service, |(name, _)| name).to_owned();
        let refused = if !self.model.services.contains_key(&name) {
            Some(anyhow!("there is no endpoint service \"{service}\""))
        } else if !self.book.domains.contains_key(&name) {
            Some(anyhow!("the service \"{name}\" has no private DNS name that would be verified"))
        } else if self.model.dns.verification_servers.is_empty() {
            Some(anyhow!("there is nobody to ask: [dns] has no verification_servers"))
        } else {
            None
        };
        match refused {
            Some(error) => _ = reply.send(Err(Failure::usage(error))),
            None => self.look_up(&name, Some(reply)),
        }
    }
}
