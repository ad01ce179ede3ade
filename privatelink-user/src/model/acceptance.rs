//! Who may connect, who decides, and who hears of it.

use super::{Build, account};
use crate::config::{Fields, Value};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// How long the provider has to decide, where the configuration does not say: AWS does not, either.
const ACCEPTANCE_TIMEOUT: Duration = Duration::from_secs(7 * 86400);

/// Who may connect (AWS: allowed principals).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Principal {
    /// `*`
    Everybody,
    /// An account's root: everybody in it.
    Account(String),
    /// A role or a user, as an ARN.
    Identity(String),
}

/// An account whose connections are accepted at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AutoAccept {
    /// Twelve digits.
    pub account: String,
    /// How many of its connections; none: any number.
    pub connection_limit: Option<u32>,
}

/// What has happened to a connection (AWS: VPC endpoint connection notifications).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum EventType {
    /// An endpoint wants to connect, or does.
    Connect,
    /// The provider has accepted it.
    Accept,
    /// The provider has rejected it.
    Reject,
    /// The endpoint is removed.
    Delete,
}

impl EventType {
    /// Every type.
    pub const ALL: [Self; 4] = [Self::Connect, Self::Accept, Self::Reject, Self::Delete];
}

/// Where events go.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sink {
    /// A program and its arguments; the event comes on its standard input, as JSON.
    Command(Vec<String>),
    /// An address that the event is posted to, as JSON.
    Webhook(String),
}

/// A connection notification.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notification {
    /// What is told.
    pub events: Vec<EventType>,
    /// To whom.
    pub sink: Sink,
}

/// How a service treats those who want to connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Acceptance {
    /// Whether the provider decides about each connection.
    pub required: bool,
    /// For whom it does not.
    pub auto_accept: Vec<AutoAccept>,
    /// Whether a connection ends when its principal is allowed no more.
    pub auto_reject: bool,
    /// How long the provider has.
    pub timeout: Duration,
    /// Who hears of it.
    pub notifications: Vec<Notification>,
}

/// The account in an ARN (`arn:aws:iam::ACCOUNT:…`).
pub fn account_of(arn: &str) -> &str {
    arn.split(':').nth(4).unwrap_or_default()
}

/// `arn:aws:iam::ACCOUNT:root`, or a role or user without a path, as AWS wants them.
fn arn(text: &str) -> Option<(String, &str)> {
    let (id, who) = text.strip_prefix("arn:aws:iam::")?.split_once(':')?;
    let named = |kind| {
        let name: &str = who.strip_prefix(kind)?;
        let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"+=,.@_-".contains(&byte);
        (!name.is_empty() && name.len() <= 64 && name.bytes().all(legal)).then_some(who)
    };
    let who = if who == "root" { who } else { named("role/").or_else(|| named("user/"))? };
    Some((account(id)?, who))
}

fn principal(text: &str) -> Option<Principal> {
    if text == "*" {
        return Some(Principal::Everybody);
    }
    match arn(text) {
        Some((account, "root")) => Some(Principal::Account(account)),
        Some(_) => Some(Principal::Identity(text.to_owned())),
        None => account(text).map(Principal::Account),
    }
}

impl Principal {
    /// Whether it covers whoever has this ARN.
    pub fn covers(&self, arn: &str) -> bool {
        match self {
            Self::Everybody => true,
            Self::Account(account) => account == account_of(arn),
            Self::Identity(identity) => identity == arn,
        }
    }
}

impl Build<'_, '_> {
    pub(super) fn principals(&mut self, fields: &mut Fields<'_, '_>) -> Vec<Principal> {
        let listed = fields.get("allowed_principals").map(|list| self.reader.list(list)).unwrap_or_default();
        let what = "a principal: *, a twelve-digit account, or arn:aws:iam::ACCOUNT:root, :role/NAME or :user/NAME (without a path)";
        listed.into_iter().filter_map(|item| self.reader.parsed(item, what, principal)).collect()
    }

    /// Who creates an endpoint: somebody of its VPC's account, its root by default.
    pub(super) fn creator(&mut self, fields: &mut Fields<'_, '_>, vpc: Option<&String>) -> String {
        let owner =
            vpc.and_then(|vpc| self.model.vpcs.get(vpc)).map(|vpc| vpc.account.clone()).unwrap_or_default();
        let root = format!("arn:aws:iam::{owner}:root");
        let Some(value) = fields.get("principal") else { return root };
        let what = "an ARN: arn:aws:iam::ACCOUNT:root, :role/NAME or :user/NAME (without a path)";
        let Some(text) = self.reader.parsed(value, what, |text| arn(text).map(|_| text.to_owned())) else {
            return root;
        };
        if account_of(&text) != owner && !owner.is_empty() {
            let message =
                format!("the endpoint's VPC belongs to the account {owner}, not {}", account_of(&text));
            self.reader.problem(value.span(), message, None);
        }
        text
    }

    pub(super) fn acceptance(&mut self, fields: &mut Fields<'_, '_>) -> Acceptance {
        let required = fields.get("acceptance_required").and_then(|value| self.reader.boolean(value));
        let auto_reject = fields.get("auto_reject").and_then(|value| self.reader.boolean(value));
        let timeout =
            fields.get("acceptance_timeout").and_then(|value| self.duration(value, 1..=365 * 86400));
        let listed = fields.get("auto_accept").map(|list| self.reader.list(list)).unwrap_or_default();
        let auto_accept = listed.into_iter().filter_map(|item| self.auto_accept(item)).collect();
        let listed = fields.get("notifications").map(|list| self.reader.list(list)).unwrap_or_default();
        let notifications = listed.into_iter().filter_map(|item| self.notification(item)).collect();
        Acceptance {
            required: required.unwrap_or(true),
            auto_accept,
            auto_reject: auto_reject.unwrap_or(false),
            timeout: timeout.unwrap_or(ACCEPTANCE_TIMEOUT),
            notifications,
        }
    }

    fn auto_accept(&mut self, item: &Value<'_>) -> Option<AutoAccept> {
        let mut fields = self.reader.table(item)?;
        let who = fields.need(self.reader, "account");
        let account = who.and_then(|value| self.reader.parsed(value, "an account: twelve digits", account));
        let connection_limit =
            fields.get("connection_limit").and_then(|value| self.reader.number(value, 1..=1_000_000));
        fields.finish(self.reader);
        Some(AutoAccept { account: account?, connection_limit })
    }

    fn notification(&mut self, item: &Value<'_>) -> Option<Notification> {
        let mut fields = self.reader.table(item)?;
        let chosen = fields.get("events").map(|list| self.reader.list(list));
        let what = "an event: Connect, Accept, Reject or Delete";
        let parse = |text: &str| EventType::ALL.into_iter().find(|event| format!("{event:?}") == text);
        let events = chosen.map_or(EventType::ALL.to_vec(), |items| {
            items.into_iter().filter_map(|item| self.reader.parsed(item, what, parse)).collect()
        });
        let program = fields.get("command").map(|list| self.reader.list(list));
        let program: Option<Vec<String>> =
            program.map(|words| words.into_iter().filter_map(|word| self.reader.string(word)).collect());
        let what = "an address such as https://example.com/path";
        let web = |text: &str| {
            let url: hyper::Uri = text.parse().ok()?;
            (matches!(url.scheme_str(), Some("http" | "https")) && url.host().is_some())
                .then(|| text.to_owned())
        };
        let webhook = fields.get("webhook").and_then(|value| self.reader.parsed(value, what, web));
        fields.finish(self.reader);
        let sink = match (program, webhook) {
            (Some(words), None) if words.first().is_some_and(|program| program.starts_with('/')) => {
                Sink::Command(words)
            }
            (None, Some(address)) => Sink::Webhook(address),
            _ => {
                let message = "expected either a command, a list that begins with a program's absolute path, or a webhook";
                self.reader.problem(item.span(), message, None);
                return None;
            }
        };
        Some(Notification { events, sink })
    }
}
