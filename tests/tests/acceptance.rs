//! Who may connect: a provider accepts, rejects and hears of connections, on real traffic.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test: a panic with its place is what is wanted")]

use privatelink_tests::world::{UNCHECKED, World, config, eventually};
use serde_json::Value;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::time::Duration;

/// The usual configuration, whose provider decides about each connection; `more` is the service's.
fn held(more: &str) -> String {
    config("", UNCHECKED).replace("acceptance_required = false", more)
}

fn states(world: &World) -> Vec<String> {
    let rows = world.json("endpoints");
    rows.as_array().unwrap().iter().map(|row| row["state"].as_str().unwrap().to_owned()).collect()
}

fn decide(world: &World, decision: &str, endpoint: &str) -> Value {
    let output = world.privatelink(&[decision, endpoint, "--json"]);
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice::<Value>(&output.stdout).unwrap()[0].clone()
}

fn passes(world: &World, end: &str) -> bool {
    world.shell(end, "curl -s --max-time 1 http://10.0.9.9/ || true").starts_with('t')
}

#[test]
fn nothing_passes_before_the_provider_accepts_and_a_rejected_connections_flows_are_reset_on_both_sides() {
    let mut world = World::new(&held(""));
    world.serve("t1");
    world.serve("t2");
    assert_eq!(states(&world), ["pendingAcceptance", "pendingAcceptance"]);
    let problems = world.json("status")[0]["problems"].to_string();
    assert!(problems.contains("privatelink accept shop"), "{problems}");
    assert!(!passes(&world, "ca"));
    assert!(
        world.shell("ca", "ip neigh show 10.0.9.9").contains("lladdr"),
        "the address exists all the same"
    );
    assert!(world.state()["shop endpoint_closed"] > 0);
    let accepted = decide(&world, "accept", "shop");
    assert_eq!(
        (accepted["state"].as_str(), accepted["endpoint"].as_str()),
        (Some("available"), Some("shop"))
    );
    assert!(passes(&world, "ca") && !passes(&world, "cb"), "one of them, by the next packet");

    let ends = |world: &World, end: &str| {
        world.shell(end, "ss -Htn state established '( sport = :8080 or dport = :80 )'")
    };
    let client = world.spawn(
        "ca",
        "curl",
        &["-s", "--limit-rate", "200k", "-o", "/dev/null", "http://10.0.9.9/large"],
    );
    eventually("the transfer runs", || (!ends(&world, "ca").is_empty()).then_some(()));
    assert_eq!(decide(&world, "reject", accepted["id"].as_str().unwrap())["state"], "rejected");
    assert!(!world.finished(client), "the transfer was to be reset");
    eventually("the target was reset, too", || {
        ["t1", "t2"].iter().all(|end| ends(&world, end).is_empty()).then_some(())
    });
    assert!(world.state()["shop reset_terminated"] > 0 && !passes(&world, "ca"));
    decide(&world, "accept", "shop");
    assert!(passes(&world, "ca"), "it may be accepted again");
}

#[test]
fn decisions_outlive_the_agent_and_its_pins() {
    let mut world = World::new(&held(""));
    world.serve("t1");
    world.serve("t2");
    let id = decide(&world, "accept", "bank")["id"].clone();
    decide(&world, "reject", "shop");
    assert_eq!(world.stop(), Some(0));
    assert!(world.privatelink(&["detach"]).status.success());
    world.start(&[]);
    assert_eq!(states(&world), ["available", "rejected"]);
    assert_eq!(world.json("endpoints")[0]["id"], id);
    eventually("the target is reached", || passes(&world, "cb").then_some(()));
    assert!(!passes(&world, "ca"));
}

#[test]
fn a_principal_that_is_not_allowed_meets_nothing_at_all() {
    let other = held("acceptance_required = false").replace("\"111122223333\", ", "");
    let mut world = World::new(&other);
    world.serve("t1");
    world.serve("t2");
    assert_eq!(states(&world), ["available", "failed"]);
    assert!(passes(&world, "cb") && !passes(&world, "ca"));
    let neighbour = world.shell("ca", "ip neigh show 10.0.9.9");
    assert!(!neighbour.contains("lladdr"), "as if nobody had the address: {neighbour}");
    let output = world.privatelink(&["accept", "shop"]);
    assert_eq!(output.status.code(), Some(64), "the provider has never heard of it: {output:?}");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("is not among the allowed principals of payments"), "{said}");
}

#[test]
fn events_come_to_a_command_and_a_webhook_though_they_fail_first_and_the_agent_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let (log, ready) = (dir.path().join("log"), dir.path().join("ready"));
    let script = dir.path().join("take");
    let text =
        format!("#!/bin/sh\ntest -e {} || exit 1\ncat >> {}\necho >> {1}\n", ready.display(), log.display());
    std::fs::write(&script, text).unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let notifications = format!(
        "notifications = [{{ command = [\"{}\"] }}, {{ webhook = \"http://127.0.0.1:8099/events\", events = [\"Accept\"] }}]",
        script.display()
    );
    let mut world = World::bare(&held(&notifications));
    world.shell("dp", "ip link set lo up");
    world.start(&[]);
    decide(&world, "accept", "bank");
    eventually("the command is asked again", || world.said().contains("is asked again").then_some(()));
    world.signal("-KILL");
    world.stop();
    std::fs::write(&ready, "").unwrap();
    let posted = world.thread("dp", || {
        let listener = TcpListener::bind("127.0.0.1:8099").unwrap();
        let answer = |status: &str| {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            let (mut text, mut buffer) = (String::new(), [0; 4096]);
            while !text.ends_with('}') {
                let length = stream.read(&mut buffer).unwrap();
                assert!(length > 0, "no whole request: {text}");
                text += &String::from_utf8_lossy(&buffer[..length]);
            }
            write!(stream, "HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").unwrap();
            text
        };
        [answer("500 Not now"), answer("204 Thanks")]
    });
    world.start(&[]);
    let [first, second] = posted.join().unwrap();
    let body =
        |text: &str| -> Value { serde_json::from_str(text.split_once("\r\n\r\n").unwrap().1).unwrap() };
    assert_eq!(body(&first), body(&second), "what was not taken comes again");
    assert!(first.starts_with("POST /events HTTP/1.1\r\n"), "{first}");
    assert_eq!(body(&second)["event"], "Accept");
    assert_eq!(
        (&body(&second)["endpoint"], &body(&second)["vpcEndpointState"]),
        (&"bank".into(), &"pending".into())
    );
    let heard = eventually("all events are taken", || {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        (text.lines().count() == 3).then_some(text)
    });
    let events: Vec<Value> = heard.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let told = |event: &str, endpoint: &str| {
        events.iter().any(|it| it["event"] == event && it["endpoint"] == endpoint)
    };
    assert!(told("Connect", "bank") && told("Connect", "shop") && told("Accept", "bank"), "{heard}");
}
