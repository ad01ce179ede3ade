//! What outlives the machine's restart: the connections that people have decided about, and the events that nobody has taken yet. One
//! file, each change a transaction.

use crate::connections::{Book, Connection, Event};
use crate::model::Sink;
use anyhow::{Context, Result};
use log::{error, info};
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

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
pub struct Store {
    path: PathBuf,
    file: Mutex<Opened>,
}

/// What there is of the file: it is closed when something has failed, since redb takes nothing more until it is opened again.
#[derive(Debug, Default)]
struct Opened {
    database: Option<Database>,
    /// Why the last write failed, if it did.
    failure: Option<String>,
}

impl Opened {
    /// Lets `work` use the database, which is opened first where it is closed.
    fn using<T>(&mut self, path: &Path, work: impl FnOnce(&Database) -> Result<T>) -> Result<T> {
        let database = match self.database.take() {
            Some(database) => database,
            None => open(path)?,
        };
        let result = work(&database);
        self.database = result.is_ok().then_some(database);
        result
    }

    /// Takes note of what has become of a write, and says so where it is news.
    fn note(&mut self, path: &Path, failure: Option<String>) {
        match &failure {
            Some(failure) if self.failure.is_none() => error!("{failure}"),
            None if self.failure.is_some() => info!("{} is written again", path.display()),
            _ => {}
        }
        self.failure = failure;
    }
}

/// Opens the file, and makes it and its tables where they are not.
fn open(path: &Path) -> Result<Database> {
    let database = Database::create(path).map_err(|error| match error {
        DatabaseError::DatabaseAlreadyOpen => {
            anyhow::anyhow!("another agent uses {}: give this one a --state-dir of its own", path.display())
        }
        other => anyhow::Error::from(other).context(format!("cannot open {}", path.display())),
    })?;
    let write = database.begin_write()?;
    write.open_table(CONNECTIONS)?;
    write.open_table(SERVICES)?;
    write.open_table(DOMAINS)?;
    write.open_table(OUTBOX)?;
    write.commit()?;
    Ok(database)
}

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
        let opened = Opened { database: Some(open(&path)?), failure: None };
        Ok(Self { path, file: Mutex::new(opened) })
    }

    /// Why the last write failed, if it did.
    pub fn failure(&self) -> Option<String> {
        self.file().failure.clone()
    }

    /// A panic elsewhere does not make the file worse than it is.
    fn file(&self) -> MutexGuard<'_, Opened> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reading<T>(&self, work: impl FnOnce(&Database) -> Result<T>) -> Result<T> {
        self.file().using(&self.path, work)
    }

    fn writing<T>(&self, work: impl FnOnce(&Database) -> Result<T>) -> Result<T> {
        let mut file = self.file();
        let result = file.using(&self.path, work);
        let result = result.with_context(|| format!("cannot write {}", self.path.display()));
        file.note(&self.path, result.as_ref().err().map(|error| format!("{error:#}")));
        result
    }

    /// What was written last.
    pub fn book(&self) -> Result<Book> {
        self.reading(book)
    }

    /// Replaces the book, and adds deliveries: both or neither. Returns how many old deliveries had to make room.
    pub fn write(&self, before: &Book, book: &Book, deliveries: &[Delivery]) -> Result<u64> {
        self.writing(|database| write(database, before, book, deliveries))
    }

    /// The deliveries that nobody has taken, in the order in which they came.
    pub fn waiting(&self) -> Result<Vec<(u64, Delivery)>> {
        self.reading(waiting)
    }

    /// A delivery has been taken.
    pub fn delivered(&self, number: u64) -> Result<()> {
        self.writing(|database| {
            let write = database.begin_write()?;
            write.open_table(OUTBOX)?.remove(number)?;
            write.commit()?;
            Ok(())
        })
    }
}

/// [`Store::book`].
fn book(database: &Database) -> Result<Book> {
    let (read, mut book) = (database.begin_read()?, Book::default());
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

/// [`Store::write`].
fn write(database: &Database, before: &Book, book: &Book, deliveries: &[Delivery]) -> Result<u64> {
    let write = database.begin_write()?;
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
        for (name, domain) in book.domains.iter().filter(|(name, it)| before.domains.get(*name) != Some(it)) {
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

/// [`Store::waiting`].
fn waiting(database: &Database) -> Result<Vec<(u64, Delivery)>> {
    let mut waiting = Vec::new();
    for entry in database.begin_read()?.open_table(OUTBOX)?.iter()? {
        let (number, delivery) = entry?;
        waiting.push((
            number.value(),
            serde_json::from_slice(delivery.value()).context("a delivery cannot be read")?,
        ));
    }
    Ok(waiting)
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
        assert_eq!(store.failure(), None);
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
