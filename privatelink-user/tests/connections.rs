//! What becomes of connections as configurations change and providers decide: AWS's states, as pure functions.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test: a panic with its place is what is wanted")]

use privatelink::connections::{Book, Event, State};
use privatelink::model::{self, EventType, Model};

const SHOP: &str = "arn:aws:iam::111122223333:root";

/// A service with these attributes, and endpoints of one VPC, each by its name and what else it has.
fn config(service: &str, endpoints: &[(&str, &str)]) -> Model {
    let mut text = format!(
        r#"
[vpcs.shop]
account = "111122223333"
cidrs = ["10.0.0.0/16"]
interfaces = ["a"]
[vpcs.pay]
account = "999900001111"
cidrs = ["10.0.0.0/16"]
interfaces = ["b"]
[load_balancers.edge]
vpc = "pay"
addresses = {{ a = "10.0.1.10" }}
listeners = []
[load_balancers.other]
vpc = "pay"
addresses = {{ a = "10.0.1.11" }}
listeners = []
[endpoint_services.t]
load_balancers = ["other"]
allowed_principals = ["*"]
[endpoint_services.s]
load_balancers = ["edge"]
{service}
"#
    );
    for (index, (name, more)) in endpoints.iter().enumerate() {
        let service = if more.contains("service") { "" } else { "service = \"s\"" };
        text += &format!(
            "[endpoints.{name}]\nvpc = \"shop\"\n{service}\naddresses = {{ a = \"10.0.9.{}\" }}\n{more}\n",
            index + 1
        );
    }
    model::parse(&text, "connections.toml").unwrap_or_else(|problems| panic!("{}", problems.report(false)))
}

const ALLOWED: &str = "allowed_principals = [\"111122223333\"]";

fn settle(book: &mut Book, model: &Model, now: u64) -> Vec<EventType> {
    let events = book.settle(model, now).unwrap();
    let types = events.iter().map(|it: &Event| it.event).collect();
    book.opened(now);
    types
}

fn state(book: &Book, endpoint: &str) -> State {
    book.of(endpoint).unwrap().state
}

#[test]
fn a_connection_waits_for_the_provider_who_may_reject_it_and_change_its_mind() {
    let (model, mut book) = (config(ALLOWED, &[("e", "")]), Book::default());
    assert_eq!(settle(&mut book, &model, 1), [EventType::Connect]);
    assert_eq!(state(&book, "e"), State::PendingAcceptance);
    assert!(settle(&mut book, &model, 2).is_empty(), "nothing happens twice");
    let id = book.of("e").unwrap().id.clone();
    assert!(id.len() == 22 && id.strip_prefix("vpce-").unwrap().bytes().all(|it| it.is_ascii_hexdigit()));
    let accepted = book.accept(&id, 3).unwrap();
    assert_eq!(
        (accepted[0].event, accepted[0].vpc_endpoint_owner.as_str()),
        (EventType::Accept, "111122223333")
    );
    assert_eq!(state(&book, "e"), State::Pending);
    assert!(book.opened(3) && state(&book, "e") == State::Available);
    assert!(book.accept("e", 4).unwrap().is_empty(), "it is accepted already");
    assert_eq!(book.reject("e", 5).unwrap()[0].event, EventType::Reject);
    assert_eq!(state(&book, "e"), State::Rejected);
    assert!(settle(&mut book, &model, 6).is_empty() && state(&book, "e") == State::Rejected);
    assert_eq!(book.accept("e", 7).unwrap().len(), 1, "a rejected one may be accepted");
    let error = book.accept("f", 8).unwrap_err().to_string();
    assert!(error.contains("there is no endpoint \"f\""), "{error}");
}

#[test]
fn a_principal_that_is_not_allowed_has_no_connection_and_one_that_is_allowed_no_more_keeps_it() {
    let (nobody, everybody) = (
        config("", &[("e", "")]),
        config("allowed_principals = [\"*\"]\nacceptance_required = false", &[("e", "")]),
    );
    let mut book = Book::default();
    assert!(settle(&mut book, &nobody, 1).is_empty(), "the provider does not hear of it");
    assert_eq!(state(&book, "e"), State::Failed);
    assert!(book.accept("e", 1).is_err(), "nor can it accept it");
    assert_eq!(settle(&mut book, &everybody, 2), [EventType::Connect]);
    assert_eq!(state(&book, "e"), State::Available);
    assert!(settle(&mut book, &nobody, 3).is_empty() && state(&book, "e") == State::Available);
    assert_eq!(settle(&mut book, &config("auto_reject = true", &[("e", "")]), 4), [EventType::Reject]);
    assert_eq!(state(&book, "e"), State::Rejected);
}

#[test]
fn roles_and_users_are_allowed_by_their_arn_and_an_account_covers_all_of_its_own() {
    let role = "principal = \"arn:aws:iam::111122223333:role/deploy\"";
    let endpoints =
        [("root", ""), ("role", role), ("user", "principal = \"arn:aws:iam::111122223333:user/eve\"")];
    let allows = |who: &str| {
        let model = config(&format!("allowed_principals = [\"{who}\"]"), &endpoints);
        let mut book = Book::default();
        settle(&mut book, &model, 1);
        ["root", "role", "user"].map(|it| state(&book, it) == State::PendingAcceptance)
    };
    assert_eq!(allows(SHOP), [true; 3]);
    assert_eq!(allows("arn:aws:iam::111122223333:role/deploy"), [false, true, false]);
    assert_eq!(allows("999900001111"), [false; 3]);
}

#[test]
fn accounts_on_the_list_are_accepted_at_once_up_to_their_limit() {
    let service =
        format!("{ALLOWED}\nauto_accept = [{{ account = \"111122223333\", connection_limit = 2 }}]");
    let (model, mut book) = (config(&service, &[("a", ""), ("b", ""), ("c", "")]), Book::default());
    assert_eq!(settle(&mut book, &model, 1).len(), 3);
    let states = |book: &Book| ["a", "b", "c"].map(|it| state(book, it));
    assert_eq!(states(&book), [State::Available, State::Available, State::PendingAcceptance]);
    book.reject("a", 2).unwrap();
    assert_eq!(settle(&mut book, &model, 2), [EventType::Accept], "there is room for one more");
    assert_eq!(states(&book), [State::Rejected, State::Available, State::Available]);
}

#[test]
fn a_decision_that_nobody_takes_expires_and_may_still_be_taken() {
    let model = config(&format!("{ALLOWED}\nacceptance_timeout = \"1h\""), &[("e", "")]);
    let mut book = Book::default();
    settle(&mut book, &model, 1000);
    assert!(!book.age(&model, 4599) && book.age(&model, 4600));
    assert_eq!(state(&book, "e"), State::Expired);
    book.accept("e", 5000).unwrap();
    assert_eq!(state(&book, "e"), State::Pending);
}

#[test]
fn a_removed_endpoint_is_deleted_and_one_of_the_same_name_is_another() {
    let (with, without) = (config(ALLOWED, &[("e", "")]), config(ALLOWED, &[]));
    let mut book = Book::default();
    settle(&mut book, &with, 1);
    let first = book.of("e").unwrap().id.clone();
    book.accept("e", 2).unwrap();
    assert_eq!(settle(&mut book, &without, 100), [EventType::Delete]);
    assert_eq!(state(&book, &first), State::Deleting);
    assert!(book.accept(&first, 101).unwrap_err().to_string().contains("is deleting"));
    assert_eq!(settle(&mut book, &with, 102), [EventType::Connect]);
    let second = book.of("e").unwrap();
    assert!(second.id != first && second.state == State::PendingAcceptance, "nobody has accepted this one");
    assert!(book.age(&with, 160) && state(&book, &first) == State::Deleted);
    assert!(book.age(&with, 160 + 3600) && !book.connections.contains_key(&first));
    let elsewhere = config(ALLOWED, &[("e", "service = \"t\"")]);
    assert_eq!(
        settle(&mut book, &elsewhere, 5000),
        [EventType::Delete, EventType::Connect],
        "another service, another endpoint"
    );
}

#[test]
fn ids_stay_the_same_and_differ_from_each_other() {
    let (model, mut book) = (config(ALLOWED, &[("a", ""), ("b", "")]), Book::default());
    settle(&mut book, &model, 1);
    let before = book.clone();
    settle(&mut book, &model, 2);
    assert_eq!(book, before);
    assert_ne!(book.of("a").unwrap().id, book.of("b").unwrap().id);
    let service = &book.services["s"];
    assert!(service.len() == 26 && service.starts_with("vpce-svc-"), "{service}");
    assert_ne!(*service, book.services["t"]);
}
