//! Who may bring which name: AWS's states of a private DNS name's verification, as pure functions of what was looked up.
//!
//! ```text
//!   (service) ──▶ pendingVerification ──found──▶ verified ──lost──▶ failed ──found──▶ verified
//!                          └──────not found within a day──────────▶ failed
//! ```
//!
//! What is lost stays with the endpoints that had it; others do not get it.

use crate::connections::{Book, State as Connected};
use crate::model::Model;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// For how many seconds a record that is not there is waited for.
const WAIT: u64 = 86400;

/// The state of a verification, by AWS's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum State {
    /// The record is not there yet.
    PendingVerification,
    /// It is there.
    Verified,
    /// It has not come, or is there no more.
    Failed,
}

impl State {
    /// As AWS writes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::PendingVerification => "pendingVerification",
            Self::Verified => "verified",
            Self::Failed => "failed",
        }
    }
}

/// What has become of a service's private DNS name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Domain {
    /// The name; of a wildcard, too.
    pub name: String,
    /// The label of the TXT record, below the domain: `_` and twenty letters and digits.
    pub record: String,
    /// The record's text.
    pub value: String,
    /// The state.
    pub state: State,
    /// When it came into this state, in seconds since 1970.
    pub since: u64,
    /// The endpoints, by id, that have the name.
    pub granted: BTreeSet<String>,
}

impl Domain {
    fn new(name: &str, now: u64) -> Result<Self> {
        Ok(Self {
            name: name.to_owned(),
            record: format!("_{}", token()?),
            value: format!("vpce:{}", token()?),
            state: State::PendingVerification,
            since: now,
            granted: BTreeSet::new(),
        })
    }

    /// Whether an endpoint may have the name.
    pub fn permits(&self, endpoint: &str) -> bool {
        self.state == State::Verified || self.granted.contains(endpoint)
    }

    /// Takes note of a look: whether the record was there.
    fn look(&mut self, found: bool, now: u64) {
        let next = match self.state {
            _ if found => State::Verified,
            State::Verified => State::Failed,
            State::PendingVerification if now.saturating_sub(self.since) >= WAIT => State::Failed,
            same => same,
        };
        if next != self.state {
            (self.state, self.since) = (next, now);
        }
    }

    /// In how many seconds after the last look the record is looked up again: soon while the provider has just been asked for it.
    pub fn interval(&self, now: u64) -> u64 {
        let waited = now.saturating_sub(self.since);
        match self.state {
            State::Verified => 3600,
            State::PendingVerification | State::Failed => (waited / 10).clamp(5, 600),
        }
    }
}

/// Twenty letters and digits that nobody can guess.
fn token() -> Result<String> {
    const DIGITS: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";
    let mut token = String::new();
    while token.len() < 20 {
        let mut random = [0; 32];
        getrandom::fill(&mut random).context("there is no randomness")?;
        // What is beyond the last whole multiple would make some of them more likely.
        let digits = random.iter().filter(|byte| **byte < 252).map(|byte| DIGITS[usize::from(byte % 36)]);
        token.extend(digits.map(char::from));
    }
    token.truncate(20);
    Ok(token)
}

impl Book {
    /// Takes note of the configuration: of names that have come, have gone, or are others now; and of who has them.
    pub fn settle_domains(&mut self, model: &Model, now: u64) -> Result<()> {
        let wanted =
            |service: &str| model.services.get(service)?.private_name.as_ref().filter(|it| it.verified);
        self.domains.retain(|service, domain| wanted(service).is_some_and(|it| it.name == domain.name));
        for service in model
            .services
            .keys()
            .filter(|service| !self.domains.contains_key(*service))
            .cloned()
            .collect::<Vec<_>>()
        {
            if let Some(name) = wanted(&service) {
                self.domains.insert(service, Domain::new(&name.name, now)?);
            }
        }
        self.grant(model);
        Ok(())
    }

    /// Gives verified names to the endpoints that ask for them and are available; those that ask no more lose them.
    pub fn grant(&mut self, model: &Model) {
        for (service, domain) in &mut self.domains {
            let asks = |endpoint: &str| {
                model
                    .endpoints
                    .get(endpoint)
                    .is_some_and(|it| it.private_dns_enabled && it.service == *service)
            };
            let asking =
                self.connections.values().filter(|it| it.state == Connected::Available && asks(&it.endpoint));
            let asking: BTreeSet<String> = asking.map(|it| it.id.clone()).collect();
            domain.granted = match domain.state {
                State::Verified => asking,
                _ => domain.granted.intersection(&asking).cloned().collect(),
            };
        }
    }

    /// Takes note of a look at a service's record; of one that has another name by now, none is taken.
    pub fn looked(&mut self, model: &Model, service: &str, name: &str, found: bool, now: u64) {
        if let Some(domain) = self.domains.get_mut(service).filter(|domain| domain.name == name) {
            domain.look(found, now);
        }
        self.grant(model);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test: a panic with its place is what is wanted")]
mod tests {
    use super::*;

    fn after(looks: &[(bool, u64)]) -> State {
        let mut domain = Domain::new("api.example", 1000).unwrap();
        looks.iter().for_each(|(found, now)| domain.look(*found, *now));
        domain.state
    }

    #[test]
    fn a_record_verifies_a_name_and_its_loss_or_a_day_without_it_makes_it_fail() {
        assert_eq!(after(&[]), State::PendingVerification);
        assert_eq!(after(&[(false, 1005)]), State::PendingVerification);
        assert_eq!(after(&[(false, 1005), (true, 1010)]), State::Verified);
        assert_eq!(after(&[(true, 1010), (false, 5000)]), State::Failed);
        assert_eq!(after(&[(true, 1010), (false, 5000), (true, 6000)]), State::Verified);
        assert_eq!(after(&[(false, 1000 + WAIT)]), State::Failed);
    }

    #[test]
    fn a_lost_name_stays_with_whom_had_it() {
        let mut domain = Domain::new("api.example", 1000).unwrap();
        assert!(!domain.permits("vpce-1"));
        domain.look(true, 1001);
        assert!(domain.permits("vpce-1") && domain.permits("vpce-2"));
        domain.granted.insert("vpce-1".into());
        domain.look(false, 1002);
        assert!(domain.permits("vpce-1") && !domain.permits("vpce-2"));
    }

    #[test]
    fn tokens_are_such_as_a_label_may_be_and_never_the_same() {
        let (one, other) = (token().unwrap(), token().unwrap());
        assert!(one != other && one.len() == 20);
        assert!(one.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit()));
    }
}
