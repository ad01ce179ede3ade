//! Targets come, go, drain, fail and recover, under real traffic.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests: a panic with its place is what is wanted")]

use privatelink_tests::world::{CHECKED, UNCHECKED, World, config, eventually};
use serde_json::Value;
use std::time::{Duration, Instant};

const FIRST: &str = "10.0.1.21";

/// The usual configuration, with attributes for its target group.
fn with(attributes: &str, checks: &str) -> String {
    config("", checks).replace("port = 8080\n", &format!("port = 8080\n{attributes}\n"))
}

/// Without the first target.
fn without_first(config: &str) -> String {
    config.replace(r#"{ address = "10.0.1.21", zone = "a" }, "#, "")
}

fn apply(world: &World, config: &str) {
    let (code, said) = world.apply(config);
    assert_eq!(code, Some(0), "{said}");
}

/// The row of the first target, if it is listed.
fn first(world: &World) -> Option<Value> {
    world.json("targets").as_array()?.iter().find(|row| row["address"] == FIRST).cloned()
}

fn state(world: &World) -> Option<String> {
    Some(first(world)?["state"].as_str()?.to_owned())
}

/// Starts slow transfers until one goes to the first target, and returns those that do and those that do not.
fn transfers(world: &mut World, rate: &str) -> (Vec<usize>, Vec<usize>) {
    let (mut to_first, mut others) = (Vec::new(), Vec::new());
    for port in 42_000..42_040 {
        let line = format!(
            "exec curl -sSf --max-time 60 --limit-rate {rate} --local-port {port} -o /dev/null http://10.0.9.9/large"
        );
        let child = world.spawn("ca", "sh", &["-c", &line]);
        // By its own port: a flow that is just being established may be missing from one listing.
        let target = eventually("the transfer has begun", || {
            let flows = world.json("flows");
            let client = format!("10.0.1.5:{port}");
            let flow = flows
                .as_array()?
                .iter()
                .find(|flow| flow["client"] == client && flow["state"] == "established")?;
            flow["target"].as_str().map(str::to_owned)
        });
        if target.starts_with(FIRST) {
            to_first.push(child)
        } else {
            others.push(child)
        }
        if to_first.len() >= 2 && !others.is_empty() {
            return (to_first, others);
        }
    }
    panic!("forty flows, and not two went to one target of two")
}

fn served(world: &World, times: usize) -> Vec<String> {
    (0..times).map(|_| world.fetch("ca", "")).collect()
}

fn counted(world: &World, what: &str) -> u64 {
    world.state().get(what).copied().unwrap_or(0)
}

#[test]
fn a_deregistered_target_drains_and_its_transfers_survive_a_delay_that_is_longer() {
    let usual = with("deregistration_delay.timeout_seconds = 60", UNCHECKED);
    let mut world = World::new(&usual);
    world.serve("t1");
    world.serve("t2");
    let (to_first, others) = transfers(&mut world, "3M");
    apply(&world, &without_first(&usual));
    let row = first(&world).expect("it is listed while it drains");
    assert_eq!(
        (row["state"].as_str(), row["reason"].as_str()),
        (Some("draining"), Some("Target.DeregistrationInProgress"))
    );
    assert!(served(&world, 20).iter().all(|who| who == "t2"), "it gets no new flows");
    std::fs::write(world.config(), without_first(&usual)).unwrap();
    world.kill_agent();
    world.start(&[]);
    assert_eq!(state(&world).as_deref(), Some("draining"), "also for the next agent");
    for child in to_first.into_iter().chain(others) {
        assert!(world.finished(child), "a transfer was cut off");
    }
    assert_eq!(counted(&world, "shop reset_terminated"), 0);
    apply(&world, &usual);
    assert_eq!(state(&world).as_deref(), Some("unavailable"), "it may come back at once");
    eventually("it gets flows again", || served(&world, 10).contains(&"t1".to_owned()).then_some(()));
}

#[test]
fn a_drain_that_ends_with_termination_resets_both_sides_and_the_target_is_forgotten() {
    let usual = with(
        "deregistration_delay.timeout_seconds = 2\nderegistration_delay.connection_termination.enabled = true",
        UNCHECKED,
    );
    let mut world = World::new(&usual);
    world.serve("t1");
    world.serve("t2");
    let (to_first, others) = transfers(&mut world, "1M");
    apply(&world, &without_first(&usual));
    for child in to_first {
        assert!(!world.finished(child), "it was to be cut off");
    }
    assert!(counted(&world, "shop reset_terminated") + counted(&world, "payments reset_terminated") > 0);
    eventually("the target's side is told, too", || {
        world.shell("t1", "ss -Htn state established").is_empty().then_some(())
    });
    for child in others {
        assert!(world.finished(child), "a transfer from the other target was cut off");
    }
}

#[test]
fn an_unhealthy_targets_flows_are_reset_and_it_is_told_in_awss_words() {
    let checks = r#"protocol = "http", path = "/up", matcher = "200", interval = "5s", timeout = "2s", healthy_threshold = 2, unhealthy_threshold = 2"#;
    let mut world = World::new(&with("", checks));
    world.serve("t1");
    world.serve("t2");
    eventually("both are healthy", || {
        let rows = world.json("targets");
        rows.as_array()?.iter().all(|row| row["state"] == "healthy").then_some(())
    });
    let (to_first, _) = transfers(&mut world, "500k");
    world.set_up("t1", false);
    eventually("it is unhealthy", || (state(&world)? == "unhealthy").then_some(()));
    let row = first(&world).unwrap();
    assert_eq!(row["reason"], "Target.FailedHealthChecks");
    let problems = world.json("status")[0]["problems"].to_string();
    assert!(problems.contains("target web/10.0.1.21:8080 is unhealthy"), "{problems}");
    assert!(row["description"].as_str().unwrap().contains("404"), "{row}");
    for child in to_first {
        assert!(!world.finished(child), "its flows were to be reset");
    }
    assert!(served(&world, 20).iter().all(|who| who == "t2"));
    let zone = |world: &World| world.json("endpoints")[0]["zone_health"].as_str().map(str::to_owned);
    assert_eq!(zone(&world).as_deref(), Some("healthy"), "the other target is there");
    world.set_up("t2", false);
    eventually("all are unhealthy, so all get new flows", || {
        served(&world, 5).contains(&"t1".to_owned()).then_some(())
    });
    assert_eq!(zone(&world).as_deref(), Some("unhealthy"));
    let problems = world.json("status")[0]["problems"].to_string();
    assert!(problems.contains("tcp/80 of edge/a has no healthy target"), "{problems}");
    world.set_up("t1", true);
    eventually("it is healthy again", || (state(&world)? == "healthy").then_some(()));
}

#[test]
fn https_checks_believe_any_certificate_and_a_wrong_status_is_a_failure() {
    let checks = |matcher: &str| {
        format!(
            r#"protocol = "https", port = 8443, path = "/up", matcher = "{matcher}", interval = "5s", timeout = "2s""#
        )
    };
    let mut world = World::new(&with("", &checks("200")));
    world.serve("t1");
    world.serve("t2");
    eventually("it is healthy", || (state(&world)? == "healthy").then_some(()));
    apply(&world, &with("", &checks("204")));
    eventually("it is unhealthy", || (state(&world)? == "unhealthy").then_some(()));
    assert!(first(&world).unwrap()["description"].as_str().unwrap().contains("200"));
}

#[test]
fn a_sticky_source_stays_with_its_target_and_flows_can_be_asked_for_by_what_they_are() {
    let mut world = World::new(&with("stickiness.enabled = true", UNCHECKED));
    world.serve("t1");
    world.serve("t2");
    let who = served(&world, 20);
    assert!(who.iter().all(|it| *it == who[0]), "{who:?}");
    let count = |arguments: &[&str]| {
        let output = world.privatelink(&[&["flows", "--json"], arguments].concat());
        serde_json::from_slice::<Value>(&output.stdout).unwrap().as_array().unwrap().len()
    };
    let all = count(&[]);
    assert!(all >= 20);
    assert_eq!(count(&["--endpoint", "shop"]), all);
    assert_eq!(count(&["--endpoint", "bank/a"]), 0);
    assert_eq!(count(&["--target", "10.0.1.21:8080"]) + count(&["--target", "10.0.1.22"]), all);
    assert_eq!(count(&["--older-than", "1h"]), 0);
    assert_eq!(world.privatelink(&["flows", "--state", "establishd"]).status.code(), Some(64));
}

#[test]
fn every_target_is_replaced_under_load_and_no_request_fails() {
    let usual = config("", UNCHECKED);
    let mut world = World::new(&usual);
    world.serve("t1");
    world.serve("t2");
    let load = world.beside("ca", "wrk", &["-t", "1", "-c", "16", "-d", "12", "http://10.0.9.9/"]);
    let second = r#", { address = "10.0.1.22", zone = "a" }"#;
    eventually("the load runs", || (world.json("flows").as_array()?.len() >= 16).then_some(()));
    for _ in 0..3 {
        for next in [without_first(&usual), usual.clone(), usual.replace(second, ""), usual.clone()] {
            apply(&world, &next);
            served(&world, 3);
        }
    }
    let said = load.join().unwrap();
    assert!(said.contains("requests in"), "{said}");
    assert!(!said.contains("Socket errors") && !said.contains("Non-2xx"), "{said}");
}

/// How long a target's failure may take to be noticed: as many checks as the threshold says, and the last one's timeout.
const NOTICED: Duration = Duration::from_secs(2 * 5 + 2);

#[test]
fn a_target_that_is_killed_stopped_or_unplugged_is_noticed_within_the_configured_time() {
    let checks = format!(r#"protocol = "http", {CHECKED}"#);
    let mut world = World::new(&config("", &checks));
    let mut server = world.serve("t1");
    world.serve("t2");
    let healthy = |world: &World| eventually("it is healthy", || (state(world)? == "healthy").then_some(()));
    let noticed = |world: &mut World, what: &str, fail: &mut dyn FnMut(&mut World)| {
        healthy(world);
        let began = Instant::now();
        fail(world);
        eventually(what, || (state(world)? == "unhealthy").then_some(()));
        // A second for what lies between a check's end and our question.
        assert!(began.elapsed() < NOTICED + Duration::from_secs(1), "{what}: after {:?}", began.elapsed());
    };
    noticed(&mut world, "a killed server is noticed", &mut |world| world.kill(server));
    server = world.serve("t1");
    let send = |world: &World, signal: &str| {
        world.shell("dp", &format!("kill {signal} {}", world.pid(server)));
    };
    noticed(&mut world, "a stopped server is noticed", &mut |world| send(world, "-STOP"));
    send(&world, "-CONT");
    noticed(&mut world, "an unplugged interface is noticed", &mut |world| {
        world.shell("t1", "ip link set eth0 down");
    });
}

#[test]
fn a_target_that_refuses_connections_is_noticed_long_before_its_next_check() {
    let slow = r#"interval = "300s", timeout = "2s""#;
    let mut world = World::bare(&config("", slow));
    let server = world.serve("t1");
    world.serve("t2");
    world.start(&[]);
    eventually("both are healthy", || {
        let rows = world.json("targets");
        rows.as_array()?.iter().all(|row| row["state"] == "healthy").then_some(())
    });
    world.kill(server);
    let line = "curl -sS --max-time 2 http://10.0.9.9/ || true";
    eventually("it is unhealthy", || {
        world.shell("ca", line);
        (state(&world)? == "unhealthy").then_some(())
    });
    assert!(first(&world).unwrap()["description"].as_str().unwrap().contains("refused"));
    assert!(served(&world, 20).iter().all(|who| who == "t2"));
}

#[test]
fn an_endpoint_at_its_limits_opens_no_more_flows_and_the_other_tenant_does_not_notice() {
    let limited = config("", UNCHECKED)
        .replace("[endpoints.bank]", "max_new_flows_per_second = 2\nnew_flow_burst = 5\n[endpoints.bank]");
    let mut world = World::new(&limited);
    world.serve("t1");
    world.serve("t2");
    let flood = world.beside(
        "ca",
        "sh",
        &["-c", "for n in $(seq 60); do curl -s --max-time 1 -o /dev/null http://10.0.9.9/ & done; wait"],
    );
    let bank: Vec<String> = (0..50).map(|_| world.fetch("cb", "")).collect();
    assert!(bank.iter().all(|it| !it.is_empty()));
    flood.join().unwrap();
    let state = world.state();
    assert!(state["shop endpoint_rate"] >= 30, "{state:?}");
    assert!(!state.contains_key("bank endpoint_rate"), "{state:?}");
    let full = config("", UNCHECKED).replace("[endpoints.bank]", "max_flows = 3\n[endpoints.bank]");
    apply(&world, &full);
    let long = "for n in 1 2 3; do curl -s --max-time 20 --limit-rate 20k -o /dev/null http://10.0.9.9/large & done; wait";
    let held = world.beside("ca", "sh", &["-c", long]);
    let line = "curl -sS --max-time 1 -o /dev/null http://10.0.9.9/ || true";
    eventually("it is full", || {
        world.shell("ca", line);
        world.state().get("shop endpoint_full").copied()
    });
    assert!(!world.fetch("cb", "").is_empty());
    held.join().unwrap();
}

/// The usual configuration, where the load balancer is there for its own VPC, too; `attributes` are the target group's.
fn serving_own_vpc(attributes: &str) -> String {
    config("", UNCHECKED)
        .replace("vpc = \"payments\"\naddresses", "vpc = \"payments\"\nserves_own_vpc = true\naddresses")
        .replace("[load_balancers.edge]", &format!("{attributes}\n[load_balancers.edge]"))
}

#[test]
fn a_load_balancer_may_serve_its_own_vpc_too_its_targets_included() {
    let mut world = World::new(&serving_own_vpc("preserve_client_ip.enabled = false"));
    world.serve("t1");
    world.serve("t2");
    let fetch = |world: &World| world.shell("t2", "curl -sSf --max-time 5 http://10.0.1.10/");
    let who: std::collections::BTreeSet<String> = (0..30).map(|_| fetch(&world)).collect();
    assert_eq!(who.len(), 2, "both targets, of which one is the client itself: {who:?}");
    let rows = world.json("endpoints");
    let row =
        rows.as_array().unwrap().iter().find(|row| row["endpoint"] == "load_balancer:edge").unwrap().clone();
    assert_eq!((row["vpc"].as_str(), row["new_flows"].as_u64()), (Some("payments"), Some(30)));
    assert!(!world.fetch("ca", "").is_empty());
    let silent = world.shell("t2", "curl -sS --max-time 1 http://10.0.1.10:81/ || true");
    assert!(silent.is_empty(), "a port without a listener stays silent");
    assert!(counted(&world, "payments no_listener") > 0);
    apply(&world, &config("", UNCHECKED));
    let refused = world.shell("t2", "curl -sS --max-time 1 http://10.0.1.10/ || true");
    assert!(refused.is_empty());
    assert!(counted(&world, "payments provider_initiated") > 0);
}

#[test]
fn targets_see_the_clients_of_the_load_balancers_own_vpc_as_they_are_and_those_of_endpoints_not() {
    // Both balancers' addresses lead to one target, so that a client's port can be taken twice.
    let two = serving_own_vpc("").replace(
        "[endpoint_services.payments]",
        "[load_balancers.other]\nvpc = \"payments\"\nserves_own_vpc = true\naddresses = { a = \"10.0.1.30\" }\n\
         listeners = [{ protocol = \"tcp\", port = 80, target_group = \"web\" }]\n[endpoint_services.payments]",
    );
    let two = two.replace(", { address = \"10.0.1.22\", zone = \"a\" }", "");
    let mut world = World::bare(&two);
    // The VPC's own network, on which a target reaches the clients that it sees.
    world.shell("dp", "ip link add vpc type bridge && ip link set t1 master vpc && ip link set t2 master vpc && ip link set vpc up");
    world.start(&[]);
    world.serve("t1");
    // So that its port is free again at once, whichever side closes first.
    world.shell("t2", "sysctl -qw net.ipv4.tcp_max_tw_buckets=0");
    let ask = |world: &World, end: &str, at: &str, port: u16| {
        world.shell(
            end,
            &format!("curl -sSf -H 'Connection: close' --max-time 5 --local-port {port} http://{at}/client"),
        )
    };
    assert_eq!(ask(&world, "t2", "10.0.1.10", 40001), "10.0.1.22:40001");
    let other = ask(&world, "t2", "10.0.1.30", 40001);
    assert!(
        other.starts_with("10.0.1.22:") && !other.ends_with(":40001"),
        "another port for the same client: {other}"
    );
    let own = ask(&world, "t1", "10.0.1.10", 40002);
    assert!(own.starts_with("10.0.1.10:"), "no packet comes to a target from its own address: {own}");
    let endpoint = ask(&world, "ca", "10.0.9.9", 40003);
    assert!(endpoint.starts_with("10.0.1.10:"), "{endpoint}");
    let large = world.shell("t2", "curl -sSf --max-time 20 http://10.0.1.10/large | wc -c");
    assert_eq!(large.trim(), (20 << 20).to_string());
}

#[test]
fn secondary_addresses_carry_flows_and_health_checks_as_well() {
    let more = config("", CHECKED).replace(
        "addresses = { a = \"10.0.1.10\" }",
        "addresses = { a = \"10.0.1.10\" }\nsecondary_addresses = { a = [\"10.0.1.11\"] }",
    );
    let mut world = World::new(&more);
    world.serve("t1");
    world.serve("t2");
    eventually("both are healthy, one of them checked from the second address", || {
        let rows = world.json("targets");
        rows.as_array()?.iter().all(|row| row["state"] == "healthy").then_some(())
    });
    assert!(served(&world, 30).iter().all(|who| !who.is_empty()));
    let flows = world.json("flows");
    let sources: std::collections::BTreeSet<&str> =
        flows.as_array().unwrap().iter().filter_map(|flow| flow["nat"].as_str()?.split(':').next()).collect();
    assert_eq!(sources, ["10.0.1.10", "10.0.1.11"].into());
}
