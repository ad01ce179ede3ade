//! What outlives the machine's restart: the connections that people have decided about, and the events that nobody has taken yet. One
//! file, each change a transaction.

use crate::connections::{Book, Connection, Event};
use crate::model::Sink;
use anyhow::{Context, Result};
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

/// A connection's id, and the connection as JSON.
const CONNECTIONS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("connections");
/// A service's name, and its id.
const SERVICES: TableDefinition<'_, &str, &str> = TableDefinition::new("services");
/// A service's name, and what has become of the name that it brings as JSON.
const DOMAINS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("domains");
/// A number that grows, and a delivery as JSON.
const OUTBOX: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("outbox");
/// How many deliveries wait at most.
const WAITING: u64 = 10_000;

/// An event for somebody.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delivery {
    /// What.
    pub event: Event,
    /// To whom.
    pub sink: Sink,
}

/// The file.
#[derive(Debug)]
pub struct Store(Database);

impl Store {
    /// Opens the file in a directory, and makes both where they are not.
    pub fn open(dir: &Path) -> Result<Self> {
        let mut builder = DirBuilder::new();
        builder
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .with_context(|| format!("cannot make {}", dir.display()))?;
        let path = dir.join("state.redb");
        let database = Database::create(&path).map_err(|error| match error {
            DatabaseError::DatabaseAlreadyOpen => {
                anyhow::anyhow!(
                    "another agent uses {}: give this one a --state-dir of its own",
                    path.display()
                )
            }
            other => anyhow::Error::from(other).context(format!("cannot open {}", path.display())),
        })?;
        let write = database.begin_write()?;
        write.open_table(CONNECTIONS)?;
        write.open_table(SERVICES)?;
        write.open_table(DOMAINS)?;
        write.open_table(OUTBOX)?;
        write.commit()?;
        Ok(Self(database))
    }

    /// What was written last.
    pub fn book(&self) -> Result<Book> {
        let (read, mut book) = (self.0.begin_read()?, Book::default());
        for entry in read.open_table(CONNECTIONS)?.iter()? {
            let (id, connection) = entry?;
            let connection: Connection = serde_json::from_slice(connection.value())
                .with_context(|| format!("the state of {} cannot be read", id.value()))?;
            book.connections.insert(id.value().to_owned(), connection);
        }
        for entry in read.open_table(SERVICES)?.iter()? {
            let (name, id) = entry?;
            book.services.insert(name.value().to_owned(), id.value().to_owned());
        }
        for entry in read.open_table(DOMAINS)?.iter()? {
            let (service, domain) = entry?;
            let domain = serde_json::from_slice(domain.value())
                .with_context(|| format!("the state of {} cannot be read", service.value()))?;
            book.domains.insert(service.value().to_owned(), domain);
        }
        Ok(book)
    }

    /// Replaces the book, and adds deliveries: both or neither. Returns how many old deliveries had to make room.
    pub fn write(&self, before: &Book, book: &Book, deliveries: &[Delivery]) -> Result<u64> {
        let write = self.0.begin_write()?;
        {
            let mut table = write.open_table(CONNECTIONS)?;
            for id in before.connections.keys().filter(|id| !book.connections.contains_key(*id)) {
                table.remove(id.as_str())?;
            }
            let changed = book.connections.iter().filter(|(id, it)| before.connections.get(*id) != Some(it));
            for (id, connection) in changed {
                table.insert(id.as_str(), serde_json::to_vec(connection)?.as_slice())?;
            }
            let mut table = write.open_table(SERVICES)?;
            for name in before.services.keys().filter(|name| !book.services.contains_key(*name)) {
                table.remove(name.as_str())?;
            }
            for (name, id) in &book.services {
                table.insert(name.as_str(), id.as_str())?;
            }
            let mut table = write.open_table(DOMAINS)?;
            for name in before.domains.keys().filter(|name| !book.domains.contains_key(*name)) {
                table.remove(name.as_str())?;
            }
            for (name, domain) in
                book.domains.iter().filter(|(name, it)| before.domains.get(*name) != Some(it))
            {
                table.insert(name.as_str(), serde_json::to_vec(domain)?.as_slice())?;
            }
        }
        let forgotten = {
            let mut table = write.open_table(OUTBOX)?;
            let next = table.last()?.map_or(0, |(number, _)| number.value() + 1);
            for (number, delivery) in (next..).zip(deliveries) {
                table.insert(number, serde_json::to_vec(delivery)?.as_slice())?;
            }
            let first = (next + deliveries.len() as u64).saturating_sub(WAITING);
            table.extract_from_if(..first, |_, _| true)?.count() as u64
        };
        write.commit()?;
        Ok(forgotten)
    }

    /// The deliveries that nobody has taken, in the order in which they came.
    pub fn waiting(&self) -> Result<Vec<(u64, Delivery)>> {
        let mut waiting = Vec::new();
        for entry in self.0.begin_read()?.open_table(OUTBOX)?.iter()? {
            let (number, delivery) = entry?;
            waiting.push((
                number.value(),
                serde_json::from_slice(delivery.value()).context("a delivery cannot be read")?,
            ));
        }
        Ok(waiting)
    }

    /// A delivery has been taken.
    pub fn delivered(&self, number: u64) -> Result<()> {
        let write = self.0.begin_write()?;
        write.open_table(OUTBOX)?.remove(number)?;
        write.commit()?;
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test: a panic with its place is what is wanted")]
mod tests {
    use super::*;
    use crate::connections::State;
    use crate::domains::Domain;
    use crate::model::EventType;

    fn connection(id: &str, state: State) -> Connection {
        Connection {
            id: id.into(),
            endpoint: "e".into(),
            vpc: "v".into(),
            principal: "arn:aws:iam::111122223333:root".into(),
            service: "s".into(),
            state,
            since: 1,
            created: 1,
        }
    }

    #[test]
    fn what_was_written_is_there_when_the_file_is_opened_again_and_only_one_may_open_it() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        assert!(Store::open(dir.path()).unwrap_err().to_string().contains("--state-dir"));
        let mut book = Book::default();
        book.connections.insert("vpce-1".into(), connection("vpce-1", State::Rejected));
        book.services.insert("s".into(), "vpce-svc-1".into());
        let domain = Domain {
            name: "api.example".into(),
            record: "_1".into(),
            value: "vpce:1".into(),
            state: crate::domains::State::Verified,
            since: 1,
            granted: ["vpce-1".to_owned()].into(),
        };
        book.domains.insert("s".into(), domain);
        let event = Event {
            event: EventType::Reject,
            time: 1,
            service: "s".into(),
            service_id: "vpce-svc-1".into(),
            endpoint: "e".into(),
            vpc_endpoint_id: "vpce-1".into(),
            vpc_endpoint_owner: "111122223333".into(),
            vpc_endpoint_state: State::Rejected,
        };
        let delivery = Delivery { event, sink: Sink::Webhook("http://127.0.0.1/".into()) };
        store.write(&Book::default(), &book, &[delivery.clone(), delivery.clone()]).unwrap();
        drop(store);
        let store = Store::open(dir.path()).unwrap();
        assert_eq!(store.book().unwrap(), book);
        assert_eq!(store.waiting().unwrap(), [(0, delivery.clone()), (1, delivery.clone())]);
        store.delivered(0).unwrap();
        store.write(&book, &Book::default(), &[]).unwrap();
        assert_eq!(
            (store.book().unwrap(), store.waiting().unwrap()),
            (Book::default(), vec![(1, delivery.clone())])
        );
        let many = vec![delivery; usize::try_from(WAITING).unwrap() + 5];
        assert_eq!(
            store.write(&Book::default(), &Book::default(), &many).unwrap(),
            6,
            "the oldest make room"
        );
        assert_eq!(store.waiting().unwrap().len(), usize::try_from(WAITING).unwrap());
    }
}
