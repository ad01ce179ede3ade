//! Security groups and network ACLs, on real traffic.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test: a panic with its place is what is wanted")]

use privatelink_tests::bench::{CLIENT, DROP, ENDPOINT, REDIRECT, each, reply, side};
use privatelink_tests::packet::{ACK, FIN, Packet, RST, SYN, addresses};
use privatelink_tests::world::{CHECKED, UNCHECKED, World, config, eventually};

/// The usual configuration with rules: `groups` for the endpoint of the VPC shop, `edge` for the load balancer.
fn with(groups: &str, edge: &str, rules: &str) -> String {
    config("", UNCHECKED)
        .replace("[endpoints.shop]", &format!("[endpoints.shop]\n{groups}"))
        .replace("[load_balancers.edge]", &format!("[load_balancers.edge]\n{edge}"))
        + rules
}

const WEB: &str = r#"
[security_groups.web]
vpc = "shop"
ingress = [{ protocol = "tcp", ports = "80", sources = ["10.0.7.0/24", "clients"] }]
[security_groups.clients]
vpc = "shop"
members = ["10.0.1.5"]
ingress = []
"#;

fn passes(world: &World, end: &str) -> bool {
    world.shell(end, "curl -s --max-time 1 http://10.0.9.9/ || true").starts_with('t')
}

fn explain(world: &World, vpc: &str) -> String {
    let told = world.privatelink(&["explain", "--from", vpc, "tcp", "10.0.1.5:40001", "10.0.9.9:80"]);
    String::from_utf8_lossy(&told.stdout).into_owned()
}

#[test]
fn an_endpoints_security_group_lets_its_clients_in_by_the_next_packet_and_nobody_else() {
    let mut world = World::new(&with(r#"security_groups = ["web"]"#, "", WEB));
    world.serve("t1");
    world.serve("t2");
    assert!(passes(&world, "ca"), "a member of the group that is a source");
    assert!(passes(&world, "cb"), "an endpoint without groups lets in any client of its VPC");
    let ping = "ping -c 1 -W 1 10.0.9.9 > /dev/null 2>&1 && echo answered || echo lost";
    assert_eq!(world.shell("ca", ping).trim(), "lost", "no rule is about ICMP");
    assert_eq!(world.shell("cb", ping).trim(), "answered");
    let before = world.state();
    let others = WEB.replace("members = [\"10.0.1.5\"]", "members = [\"10.0.1.6\"]");
    let (code, said) = world.apply(&with(r#"security_groups = ["web"]"#, "", &others));
    assert_eq!(code, Some(0), "{said}");
    assert!(!passes(&world, "ca") && passes(&world, "cb"));
    let dropped = |state: &std::collections::BTreeMap<String, u64>| {
        state.get("shop security_group").copied().unwrap_or_default()
    };
    assert!(dropped(&world.state()) > dropped(&before));
    let told = explain(&world, "shop");
    assert!(told.contains("no rule matches") && told.contains("security_group"), "{told}");
    world.apply(&with(r#"security_groups = ["web"]"#, "", WEB));
    let told = explain(&world, "shop");
    assert!(told.contains("security group web, rule 1: tcp/80 from 10.0.7.0/24, clients"), "{told}");
    assert!(passes(&world, "ca"));
}

#[test]
fn a_load_balancers_security_group_is_about_the_consumers_own_address_unless_it_is_told_not_to_be() {
    let rules = r#"
[security_groups.edge]
vpc = "payments"
members = ["10.0.1.5"]
ingress = [
  { protocol = "tcp", ports = "1-79", sources = ["0.0.0.0/0"] },
  { protocol = "tcp", ports = "80", sources = ["edge"] },
]
"#;
    let mut world = World::new(&with("", r#"security_groups = ["edge"]"#, rules));
    world.serve("t1");
    world.serve("t2");
    assert!(
        !passes(&world, "ca"),
        "a member of the provider's group has the same address, and is somebody else"
    );
    assert!(world.state()["shop load_balancer_security_group"] > 0);
    let off = "security_groups = [\"edge\"]\nenforce_security_groups_on_privatelink = false";
    world.apply(&with("", off, rules));
    assert!(passes(&world, "ca"));
    world.apply(&with(
        "",
        r#"security_groups = ["edge"]"#,
        &rules.replace("\"edge\"] }", "\"10.0.1.5/32\"] }"),
    ));
    assert!(passes(&world, "ca"));
}

/// A network ACL of the consumer's subnet, with what its clients get.
fn acl(ingress: &str) -> String {
    format!(
        r#"
[network_acls.clients]
vpc = "shop"
subnets = ["10.0.1.0/24"]
ingress = [{ingress}]
egress = [{{ rule = 100, action = "allow", protocol = "all", cidr = "0.0.0.0/0" }}]
"#
    )
}

const ALL_BACK: &str =
    r#"{ rule = 100, action = "allow", protocol = "tcp", ports = "1024-65535", cidr = "0.0.0.0/0" }"#;
const NONE_BACK: &str =
    r#"{ rule = 90, action = "deny", protocol = "tcp", ports = "1-65535", cidr = "10.0.9.9" }"#;

#[test]
fn a_transfer_survives_a_security_group_that_would_not_let_it_in_and_halts_while_a_network_acl_denies_it() {
    let mut world = World::new(&with("", "", &acl(ALL_BACK)));
    world.serve("t1");
    world.serve("t2");
    let client =
        world.spawn("ca", "curl", &["-s", "--limit-rate", "2M", "-o", "/dev/null", "http://10.0.9.9/large"]);
    let bytes = |world: &World| world.state()["shop to_consumer_packets"];
    let before = bytes(&world);
    eventually("the transfer runs", || (bytes(&world) > before + 20).then_some(()));
    let closed = "security_groups = [\"none\"]";
    let none = "[security_groups.none]\nvpc = \"shop\"\ningress = []\n";
    world.apply(&with(closed, "", &format!("{}{none}", acl(ALL_BACK))));
    let before = bytes(&world);
    eventually("the transfer goes on", || (bytes(&world) > before + 20).then_some(()));
    assert!(!passes(&world, "ca"), "another connection does not come about");
    world.apply(&with("", "", &acl(&format!("{NONE_BACK}, {ALL_BACK}"))));
    let denied = |world: &World| world.state().get("payments network_acl").copied().unwrap_or_default();
    eventually("the network ACL has denied packets", || (denied(&world) > 3).then_some(()));
    let halted = bytes(&world);
    let seen = denied(&world);
    eventually("it denies all there are", || (denied(&world) > seen + 1).then_some(()));
    assert_eq!(bytes(&world), halted);
    world.apply(&with("", "", &acl(ALL_BACK)));
    eventually("the transfer goes on again", || (bytes(&world) > halted + 20).then_some(()));
    assert!(world.finished(client), "and ends well");
}

#[test]
fn a_network_acl_between_a_load_balancer_and_its_targets_is_about_health_checks_too() {
    let rules = r#"
[network_acls.targets]
vpc = "payments"
subnets = ["10.0.1.22/32"]
ingress = [{ rule = 100, action = "allow", protocol = "tcp", ports = "1-79", cidr = "0.0.0.0/0" }]
egress = [{ rule = 100, action = "allow", protocol = "all", cidr = "0.0.0.0/0" }]
"#;
    let config = config("", CHECKED) + rules;
    let mut world = World::new(&config);
    world.serve("t1");
    world.serve("t2");
    let states = |world: &World| -> Vec<String> {
        let rows = world.json("targets");
        rows.as_array().unwrap().iter().map(|row| row["state"].as_str().unwrap().to_owned()).collect()
    };
    eventually("one target is healthy and the other is not", || {
        (states(&world) == ["healthy", "unhealthy"]).then_some(())
    });
    assert!(world.state()["payments network_acl"] > 0);
    assert_eq!(world.fetch("ca", "/").trim(), "t1");
}

#[test]
fn what_rules_deny_is_dropped_untouched_and_counted_once_on_each_hook() {
    let rules = r#"
[security_groups.web]
vpc = "shop"
ingress = [
  { protocol = "tcp", ports = "80", sources = ["10.0.1.5"] },
  { protocol = "udp", ports = "50-60", sources = ["10.0.0.0/16"] },
]
[network_acls.clients]
vpc = "shop"
subnets = ["10.0.9.0/24"]
ingress = [
  { rule = 5, action = "deny", protocol = "udp", ports = "53", cidr = "10.0.1.6" },
  { rule = 10, action = "allow", protocol = "all", cidr = "10.0.0.0/16" },
]
egress = [{ rule = 10, action = "allow", protocol = "all", cidr = "10.0.0.0/16" }]
"#;
    each("", |bench| {
        let (code, said) = bench.world.apply(&with(r#"security_groups = ["web"]"#, "", rules));
        assert_eq!(code, Some(0), "{said}");
        let from = |last: u8| [10, 0, 1, last];
        let syn = |last: u8| Packet { from: from(last), to: ENDPOINT, ..Packet::tcp(SYN) }.build();
        let datagram =
            |last: u8| Packet { from: from(last), to: ENDPOINT, to_port: 53, ..Packet::udp() }.build();
        assert_eq!(CLIENT, from(5));
        assert_eq!(bench.run("ca", &syn(5)).0, REDIRECT, "the rule is about this client");
        bench.refused("another client's SYN", "ca", &syn(6), "shop security_group");
        assert_eq!(bench.run("ca", &datagram(5)).0, REDIRECT);
        bench.refused("a denied datagram", "ca", &datagram(6), "shop network_acl");
        assert_eq!(bench.run("cb", &syn(6)).0, REDIRECT, "the other tenant has no such rules");
        let outside = Packet { from: [192, 168, 0, 5], to: ENDPOINT, ..Packet::tcp(SYN) }.build();
        assert_eq!(bench.run("ca", &outside).0, DROP);
    });
}

#[test]
fn a_segment_that_a_network_acl_denies_neither_ends_a_flow_nor_opens_it() {
    each("", |bench| {
        let apply = |ingress: &str| {
            let (code, said) = bench.world.apply(&with("", "", &acl(ingress)));
            assert_eq!(code, Some(0), "{said}");
        };
        let denied = format!("{NONE_BACK}, {ALL_BACK}");
        let state = || {
            let flows = bench.world.json("flows");
            flows[0]["state"].as_str().unwrap().to_owned()
        };
        let client = |flags, ack| Packet { seq: 5001, ack, ..Packet::tcp(flags) }.build();
        let at_target = bench.run("ca", &Packet { seq: 5000, ..Packet::tcp(SYN) }.build()).1;
        let target = side(addresses(&at_target).2);
        let back = |flags, seq| Packet { seq, ack: 5001, ..reply(&at_target, flags, b"") }.build();

        apply(&denied);
        for flags in [RST | ACK, SYN | ACK] {
            bench.refused("of a flow that opens", target, &back(flags, 1000), "payments network_acl");
            assert_eq!(state(), "opening");
        }
        apply(ALL_BACK);
        assert_eq!(bench.run(target, &back(SYN | ACK, 1000)).0, REDIRECT);
        assert_eq!(bench.run("ca", &client(ACK, 1001)).0, REDIRECT);
        assert_eq!(bench.run(target, &back(ACK, 1001)).0, REDIRECT);
        assert_eq!(state(), "established");

        apply(&denied);
        for flags in [RST, RST | ACK, FIN | ACK] {
            bench.refused("of one that is established", target, &back(flags, 1001), "payments network_acl");
            assert_eq!(state(), "established");
        }
        apply(ALL_BACK);
        let forged = back(RST, 900_000_000);
        bench.expect(
            "one that cannot be right",
            target,
            &forged,
            REDIRECT,
            &[("shop to_consumer_packets", 1), ("shop resets", 1)],
        );
        assert_eq!(state(), "established");
        for (flags, left) in [(FIN | ACK, "provider_closed"), (RST, "reset")] {
            assert_eq!(bench.run(target, &back(flags, 1001)).0, REDIRECT);
            assert_eq!(state(), left, "what they let through does what it says");
        }
        let again = Packet { seq: 9000, ..Packet::tcp(SYN) }.build();
        assert_eq!(bench.run("ca", &again).0, REDIRECT);
        assert_eq!(state(), "opening", "and the client opens another by the same port");
    });
}
