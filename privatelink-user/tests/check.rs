//! What `check` says of a file: everything, at the right place, whatever the file.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test: a panic with its place is what is wanted")]

use privatelink::model::{self, Hook};
use proptest::prelude::*;

const WRONG: &str = include_str!("check/wrong.toml");
/// What is said of it, checked by hand: line and column point at the value or the key that is wrong.
const SAID: &str = include_str!("check/wrong.txt");

const RIGHT: &str = r#"
manage_peer_offloads = true
[limits]
flows = 65536
[vpcs.shop]
account = "111122223333"
cidrs = ["10.0.0.0/16", "10.1.0.0/16"]
interfaces = ["ca", { name = "cb", hook = "tcx" }]
hook = "xdp"
[vpcs.payments]
account = "999900001111"
cidrs = ["10.0.0.0/16"]
interfaces = ["t1", { trunk = "t2", vlan = 300 }, { trunk = "t2", service_vlan = 4094, vlan = 1, hook = "tcx" }]
[target_groups.web]
vpc = "payments"
protocol = "tcp_udp"
port = 8080
targets = [{ address = "10.0.1.21", zone = "a", weight = 3 }, { address = "10.0.1.22", zone = "b", port = 81 }]
health_check = { protocol = "http", path = "/up", matcher = "200,204-206", interval = "10s", timeout = "5s", healthy_threshold = 3, unhealthy_threshold = 3 }
deregistration_delay.timeout_seconds = 30
deregistration_delay.connection_termination.enabled = true
target_health_state.unhealthy.connection_termination.enabled = false
target_health_state.unhealthy.draining_interval_seconds = 60
target_group_health.unhealthy_state_routing.minimum_healthy_targets = { count = 2, percentage = 50 }
stickiness = { enabled = true, type = "source_ip" }
load_balancing.cross_zone.enabled = "use_load_balancer_configuration"
slow_start.duration_seconds = 30
[load_balancers.edge]
vpc = "payments"
addresses = { a = "10.0.1.10", b = "10.0.1.11" }
cross_zone = true
listeners = [{ protocol = "tcp_udp", port = 80, target_group = "web", tcp_idle_timeout = "60s" }]
[endpoint_services.payments]
load_balancers = ["edge"]
acceptance_required = false
allowed_principals = ["111122223333", "arn:aws:iam::444455556666:root", "*"]
[endpoints.shop]
vpc = "shop"
service = "payments"
addresses = { a = "10.0.9.9", b = "10.1.9.9" }
ping = false
mtu = 1400
"#;

#[test]
fn every_kind_of_mistake_is_reported_at_once_with_its_line_and_column() {
    let said = model::parse(WRONG, "wrong.toml").unwrap_err().to_string();
    if std::env::var_os("PRIVATELINK_WRITE_GOLDEN").is_some() {
        std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/check/wrong.txt"), &said).unwrap();
    }
    assert_eq!(said, SAID);
}

#[test]
fn the_report_shows_the_line_and_marks_the_place() {
    let text = "region = 7\n";
    let report = model::parse(text, "one.toml").unwrap_err().report(false);
    for part in ["one.toml:1:10", "region = 7", "expected a string, found a whole number", "1 problem in"] {
        assert!(report.contains(part), "{part} in:\n{report}");
    }
}

#[test]
fn a_right_file_is_right_and_has_the_defaults_of_aws() {
    let model = model::parse(RIGHT, "right.toml").unwrap();
    assert_eq!((model.region.as_str(), model.endpoints["shop"].mtu), ("local-1", 1400));
    assert_eq!(model.vpcs["shop"].interfaces["ca"], Hook::Xdp, "the VPC's");
    assert_eq!(model.vpcs["shop"].interfaces["cb"], Hook::Tcx, "its own");
    assert_eq!(model.vpcs["payments"].interfaces["t1"], Hook::Auto, "by default");
    let vlans: Vec<_> = model.vpcs["payments"].vlans.keys().map(ToString::to_string).collect();
    assert_eq!(vlans, ["t2@300", "t2@4094.1"]);
    assert_eq!(model.trunks().into_iter().collect::<Vec<_>>(), [("t2", Hook::Tcx)], "what any of them says");
    let top = model::parse(&format!("hook = \"tcx\"\n{RIGHT}"), "right.toml").unwrap();
    assert_eq!(top.vpcs["payments"].interfaces["t1"], Hook::Tcx, "the file's");
    assert_eq!(top.vpcs["shop"].interfaces["ca"], Hook::Xdp, "the VPC's goes before it");
    let plain = RIGHT.replace(", tcp_idle_timeout = \"60s\"", "");
    let plain = plain.split("health_check").next().unwrap().to_owned()
        + plain.split_once("slow_start.duration_seconds = 30\n").unwrap().1;
    let model = model::parse(&plain, "right.toml").unwrap();
    let check = model.target_groups["web"].health_check.clone();
    assert_eq!((check.interval.as_secs(), check.timeout.as_secs()), (30, 10));
    assert_eq!((check.healthy_threshold, check.unhealthy_threshold), (5, 2));
    let attributes = &model.target_groups["web"].attributes;
    assert_eq!(attributes.deregistration_delay.as_secs(), 300);
    assert!(attributes.cut_unhealthy && attributes.cut_deregistered, "of a group that has UDP");
    assert!(
        attributes.preserve_client_ip
            && !attributes.sticky
            && attributes.cross_zone.is_none()
            && attributes.routing.count == 1
            && attributes.dns_failover == attributes.routing
    );
    assert_eq!(model.load_balancers["edge"].listeners[0].tcp_idle_timeout.as_secs(), 350);
    let model = model::parse(&RIGHT.replace("mtu = 1400", ""), "right.toml").unwrap();
    assert_eq!(model.endpoints["shop"].mtu, 8500);
}

/// Reads a text, and checks that whatever is said of it is about a place inside it.
fn read(text: &str) {
    let Err(problems) = model::parse(text, "any.toml") else { return };
    assert!(!problems.problems.is_empty());
    for problem in &problems.problems {
        let before =
            text.get(..problem.span.start).expect("the place is inside the file, between characters");
        assert!(text.get(problem.span.clone()).is_some(), "{problem:?} is inside the file");
        let lines: Vec<&str> = before.split('\n').collect();
        assert_eq!(problem.line, lines.len(), "{problem:?}");
        assert_eq!(problem.column, lines.last().unwrap().chars().count() + 1, "{problem:?}");
        assert!(!problem.message.is_empty());
    }
    assert!(problems.report(false).contains("any.toml:"));
}

#[test]
fn a_file_cut_off_anywhere_is_refused_or_read_but_never_a_panic() {
    for (cut, _) in RIGHT.char_indices() {
        read(&RIGHT[..cut]);
    }
}

/// Pieces that mean something to the format or to the reader.
const PIECES: [&str; 22] = [
    "[",
    "]",
    "{",
    "}",
    "\"",
    "=",
    ",",
    ".",
    "\n",
    "\"\"",
    "0",
    "-1",
    "1e9",
    "true",
    "'''",
    "\"\\u0000\"",
    "é",
    "10.0.0.0/33",
    "::1",
    "vpcs",
    "[vpcs.shop]",
    "\u{feff}",
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn a_file_with_anything_done_to_it_is_answered_with_places_inside_it(
        changes in prop::collection::vec((any::<prop::sample::Index>(), 0usize..12, 0..PIECES.len(), any::<bool>()), 1..6)
    ) {
        let mut text = RIGHT.to_owned();
        for (at, length, piece, insert) in changes {
            let places: Vec<usize> = text.char_indices().map(|(place, _)| place).collect();
            if places.is_empty() {
                break;
            }
            let index = at.index(places.len());
            let from = places[index];
            let to = if insert { from } else { places.get(index + length).copied().unwrap_or(text.len()) };
            text.replace_range(from..to, PIECES[piece]);
        }
        read(&text);
    }

    #[test]
    fn any_text_at_all_is_answered(text in "\\PC{0,200}") {
        read(&text);
    }
}

#[test]
fn a_resolver_is_where_aws_has_it_and_asks_from_an_address_that_its_answers_find() {
    let dns = r#"dns = { upstreams = ["10.0.5.53"], inbound = ["10.0.3.53"], outbound = ["10.0.3.54", "fd00::54"],
        gateway = "10.0.0.1", forward = [{ domain = "example", to = ["192.0.2.53:5353"] }, { domain = "corp.example.", to = ["fd00::53"] }] }"#;
    let text = RIGHT
        .replacen(
            r#"cidrs = ["10.0.0.0/16", "10.1.0.0/16"]"#,
            r#"cidrs = ["fd00::/64", "10.0.0.0/16", "10.1.0.0/16"]"#,
            1,
        )
        .replace("hook = \"xdp\"\n", &format!("hook = \"xdp\"\n{}\n", dns.replace('\n', " ")));
    let model = model::parse(&text, "right.toml").unwrap();
    let resolver = model.vpcs["shop"].dns.clone().unwrap();
    let addresses: Vec<String> = resolver.listens().map(|it| it.to_string()).collect();
    assert_eq!(addresses, ["10.0.0.2", "169.254.169.253", "fd00:ec2::253", "10.0.3.53"]);
    let asks = |rule: usize| {
        let rule = &resolver.rules[rule];
        let source = resolver.source(rule, privatelink::ip::Family::of(rule.to[0].ip())).unwrap();
        format!("{} {} from {source}", rule.domain, rule.to[0])
    };
    assert_eq!(asks(0), "corp.example [fd00::53]:53 from fd00::54", "the longest first");
    assert_eq!(asks(1), "example 192.0.2.53:5353 from 10.0.3.54");
    assert_eq!(asks(2), " 10.0.5.53:53 from 10.0.0.2", "by the resolver's own address");
    assert_eq!(resolver.rate, 1024);
    assert!(model.vpcs["payments"].dns.is_none(), "not unless it is asked for");
    let tiny = RIGHT.replacen(
        "cidrs = [\"10.0.0.0/16\", ",
        "dns = true\ncidrs = [\"10.9.0.0/31\", \"10.0.0.0/16\", ",
        1,
    );
    let model = model::parse(&tiny, "right.toml").unwrap();
    let addresses: Vec<String> =
        model.vpcs["shop"].dns.as_ref().unwrap().listens().map(|it| it.to_string()).collect();
    assert_eq!(addresses, ["169.254.169.253"], "a network of two addresses has none to spare");
}
