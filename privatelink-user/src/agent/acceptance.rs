//! What the provider decides, and what becomes of it: first it is written, then it takes effect, then it is told.

use super::Agent;
use crate::api::{Failure, Reply};
use crate::connections::{Book, Event};
use crate::model::Model;
use crate::store::Delivery;
use crate::{events, listing};
use anyhow::Result;
use log::{error, warn};
use std::time::SystemTime;

/// Seconds since 1970.
pub(super) fn unix_time() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |it| it.as_secs())
}

impl Agent {
    /// Lets `decision` change an endpoint's connection; answers with the connection as it is then.
    pub(super) fn decide(
        &mut self,
        endpoint: &str,
        decision: fn(&mut Book, &str, u64) -> Result<Vec<Event>>,
    ) -> Reply {
        let mut book = self.book.clone();
        let events = decision(&mut book, endpoint, unix_time()).map_err(Failure::usage)?;
        let deliveries = self.deliveries(&self.model, &events);
        self.keep(book, &events, &deliveries).map_err(Failure::kernel)?;
        self.refresh();
        Ok(listing::connection(self, endpoint))
    }

    /// Who wants to hear of these events, by a configuration; of a service that is not in it any more, by the one before.
    pub(super) fn deliveries(&self, model: &Model, events: &[Event]) -> Vec<Delivery> {
        let mut deliveries = Vec::new();
        for event in events {
            let service =
                model.services.get(&event.service).or_else(|| self.model.services.get(&event.service));
            let wanted = service.into_iter().flat_map(|service| &service.acceptance.notifications);
            let wanted = wanted.filter(|it| it.events.contains(&event.event));
            deliveries.extend(wanted.map(|it| Delivery { event: event.clone(), sink: it.sink.clone() }));
        }
        deliveries
    }

    /// Writes what has become of connections, and who is to hear of it.
    pub(super) fn keep(&mut self, book: Book, events: &[Event], deliveries: &[Delivery]) -> Result<()> {
        if book == self.book {
            return Ok(());
        }
        let forgotten = self.store.write(&self.book, &book, deliveries)?;
        if forgotten > 0 {
            warn!("{forgotten} events that nobody has taken are forgotten");
        }
        self.book = book;
        events.iter().for_each(events::log);
        if self.news.send(()).is_err() {
            error!("nobody delivers events");
        }
        Ok(())
    }

    /// The maps are as the book says: what was accepted is available.
    pub(super) fn open_pending(&mut self) -> Result<()> {
        let mut book = self.book.clone();
        let opened = book.opened(unix_time());
        book.grant(&self.model);
        if opened || book != self.book {
            self.keep(book, &[], &[])?;
        }
        Ok(())
    }
}
