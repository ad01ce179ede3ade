//! Names, as real tools see them: `dig` and `curl` in consumers' and providers' namespaces, dnsmasq as their own name server.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test: a panic with its place is what is wanted")]

use privatelink_tests::bench::{CLIENT, DROP, REDIRECT, both};
use privatelink_tests::packet::{ACK, Ip, Mac, Packet, SYN, arp, question};
use privatelink_tests::world::{CHECKED, UNCHECKED, World, config, dualstack, eventually};
use serde_json::Value;
use std::io::Read;
use std::net::{TcpStream, UdpSocket};
use std::time::Duration;

/// Questions go to the resolver by either of its addresses.
const RESOLVER: &str = "10.0.0.2";
const EVERYWHERE: &str = "169.254.169.253";

/// The usual configuration, but that the second target's host is in `shop`, for a name server; every VPC has a resolver, both
/// endpoints have the service's name, and `bank`'s is at another address.
fn named(extra: &str, service: &str, shop: &str) -> String {
    config(extra, UNCHECKED)
        .replace(r#"interfaces = ["ca"]"#, &format!("interfaces = [\"ca\", \"t2\"]\ndns = {shop}"))
        .replace(r#"interfaces = ["cb"]"#, "interfaces = [\"cb\"]\ndns = true")
        .replace(r#"interfaces = ["t1", "t2"]"#, "interfaces = [\"t1\"]\ndns = true")
        .replace(r#", { address = "10.0.1.22", zone = "a" }"#, "")
        .replace(
            "acceptance_required",
            &format!("private_dns_name = \"api.example.com\"\n{service}\nacceptance_required"),
        )
        .replace(
            "[endpoints.bank]",
            "private_dns_enabled = true\n[endpoints.bank]\nprivate_dns_enabled = true",
        )
        .replace(
            "vpc = \"bank\"\nservice = \"payments\"\naddresses = { a = \"10.0.9.9\" }",
            "vpc = \"bank\"\nservice = \"payments\"\naddresses = { a = \"10.0.9.10\" }",
        )
}

const UNVERIFIED: &str = "private_dns_name_verification = false";
const UPSTREAM: &str = r#"{ upstreams = ["10.0.1.22"] }"#;

/// What `dig` prints, whether or not it got an answer.
fn dig(world: &World, end: &str, question: &str) -> String {
    world.shell(end, &format!("dig +tries=1 +time=3 {question} || true"))
}

/// The records of an answer, in order.
fn short(world: &World, end: &str, question: &str) -> Vec<String> {
    let text = dig(world, end, &format!("+short {question}"));
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

/// The names of one kind that something has.
fn names(world: &World, of: &str, kind: &str) -> Vec<Value> {
    let rows = world.json("names");
    rows.as_array().unwrap().iter().filter(|row| row["of"] == of && row["kind"] == kind).cloned().collect()
}

fn name(world: &World, of: &str, kind: &str) -> String {
    names(world, of, kind)[0]["name"].as_str().unwrap().to_owned()
}

/// A name server with these options, on a port, until the world ends.
fn serve_names(world: &mut World, end: &str, port: &str, options: &[&str]) -> usize {
    let usual =
        ["-k", "-p", port, "--no-resolv", "--no-hosts", "--user=root", "--pid-file", "--conf-file=/dev/null"];
    let server = world.spawn(end, "dnsmasq", &[&usual[..], options].concat());
    eventually("the name server listens", || {
        (!world.shell(end, &format!("ss -Hlun sport = :{port}")).is_empty()).then_some(())
    });
    server
}

/// Fetches by name: curl asks the resolver that its own /etc/resolv.conf names.
fn fetch(world: &World, end: &str, url: &str) -> String {
    let file = world.dir.path().join("resolv.conf");
    std::fs::write(&file, format!("nameserver {RESOLVER}\noptions timeout:2\n")).unwrap();
    let line = format!("mount --bind {} /etc/resolv.conf && curl -sS --max-time 5 {url}", file.display());
    world.shell(end, &format!("unshare -m sh -c '{line}'"))
}

fn drops(world: &World, vpc: &str, reason: &str) -> u64 {
    let rows = world.json("drops");
    let row = rows.as_array().unwrap().iter().find(|row| row["vpc"] == vpc && row["reason"] == reason);
    row.map_or(0, |row| row["packets"].as_u64().unwrap())
}

/// A counter of a VPC's resolver.
fn counted(world: &World, vpc: &str, what: &str) -> u64 {
    let rows = world.json("status")[0]["resolvers"].clone();
    rows.as_array().unwrap().iter().find(|row| row["vpc"] == vpc).unwrap()[what].as_u64().unwrap()
}

#[test]
fn each_of_two_tenants_that_overlap_gets_its_own_answers_by_either_hook_and_reaches_the_service_by_name() {
    for hook in ["xdp", "tcx"] {
        let mut world = World::new(&named(&format!("hook = \"{hook}\""), UNVERIFIED, "true"));
        world.serve("t1");
        world.shell("ca", &format!("ip route add {EVERYWHERE} dev eth0"));
        for (end, of, address) in [("ca", "shop", "10.0.9.9"), ("cb", "bank", "10.0.9.10")] {
            let (all, zone) = (name(&world, of, "endpoint"), name(&world, of, "endpoint_zone"));
            assert!(all.starts_with("vpce-") && all.ends_with(".local-1.vpce.privatelink.internal"), "{all}");
            assert_eq!(zone, all.replacen('.', "-a.", 1));
            for name in [all.as_str(), &all.to_uppercase(), &zone, "api.example.com"] {
                for way in ["", "+tcp", "+noedns"] {
                    assert_eq!(
                        short(&world, end, &format!("@{RESOLVER} {way} {name}")),
                        [address],
                        "{hook} {way}"
                    );
                }
            }
            let back = short(&world, end, &format!("@{RESOLVER} -x {address}"));
            assert_eq!(back, [format!("{zone}.")], "and the address has a name");
            assert_eq!(fetch(&world, end, "http://api.example.com/"), "t1");
            assert_eq!(fetch(&world, end, &format!("http://{all}/")), "t1");
        }
        assert_eq!(short(&world, "ca", &format!("@{EVERYWHERE} api.example.com")), ["10.0.9.9"]);
        let others = name(&world, "bank", "endpoint");
        assert!(
            dig(&world, "ca", &format!("@{RESOLVER} {others}")).contains("NXDOMAIN"),
            "it is not this VPC's"
        );
        let balancer = name(&world, "edge", "load_balancer");
        assert!(balancer.starts_with("edge-") && balancer.ends_with(".elb.local-1.privatelink.internal"));
        assert_eq!(short(&world, "t1", &format!("@{RESOLVER} {balancer}")), ["10.0.1.10"]);
        assert_eq!(short(&world, "t1", &format!("@{RESOLVER} a.{balancer}")), ["10.0.1.10"]);
        assert!(dig(&world, "ca", &format!("@{RESOLVER} {balancer}")).contains("NXDOMAIN"));
        let endpoints = world.json("endpoints");
        let row = endpoints.as_array().unwrap().iter().find(|row| row["endpoint"] == "shop").unwrap();
        assert_eq!(row["dns_names"][2], "api.example.com");
    }
}

#[test]
fn an_answer_says_for_how_long_it_holds_and_what_is_not_there_is_told_apart_from_what_is_not_ours() {
    let world = World::new(&named("", UNVERIFIED, "true"));
    let asked = |question: &str| dig(&world, "ca", &format!("@{RESOLVER} {question}"));
    let answer = asked("api.example.com");
    assert!(
        answer.contains("status: NOERROR") && answer.contains("api.example.com.\t60\tIN\tA\t10.0.9.9"),
        "{answer}"
    );
    assert!(answer.contains("flags: qr rd ra;") && answer.contains("udp: 1232"), "{answer}");
    let authority = "\t60\tIN\tSOA\t";
    for kind in ["AAAA", "TXT", "HTTPS", "MX"] {
        let nothing = asked(&format!("api.example.com {kind}"));
        assert!(nothing.contains("status: NOERROR") && nothing.contains("ANSWER: 0"), "{nothing}");
        assert!(nothing.contains(&format!("api.example.com.{authority}")), "{nothing}");
    }
    let nobody = asked("www.api.example.com");
    assert!(
        nobody.contains("status: NXDOMAIN") && nobody.contains(&format!("api.example.com.{authority}")),
        "{nobody}"
    );
    assert!(asked("www.example.com").contains("status: REFUSED"), "there is nobody to ask");
    assert!(asked("-x 10.0.9.77").contains("status: REFUSED"));
    assert!(asked("-c CH -t TXT version.bind").contains("status: REFUSED"));
    assert!(asked("+opcode=NOTIFY api.example.com").contains("status: NOTIMP"));
    assert!(asked("+edns=1 +noednsnegotiation api.example.com").contains("status: BADVERS"));
}

#[test]
fn what_is_not_ours_is_asked_of_the_vpcs_own_name_server_from_within_the_vpc() {
    for hook in ["xdp", "tcx"] {
        let mut world = World::new(&named(&format!("hook = \"{hook}\""), UNVERIFIED, UPSTREAM));
        let log = world.dir.path().join("dnsmasq.log");
        let text = "x".repeat(250);
        let large = format!("--txt-record=large.test,{}", vec![text.as_str(); 15].join(","));
        let facility = format!("--log-facility={}", log.display());
        let options = ["--address=/www.test/10.0.7.7", "--log-queries=extra", &facility, &large];
        let server = serve_names(&mut world, "t2", "53", &options);
        eventually("the name server's link-layer address is known", || {
            (!world.json("status")[0]["problems"].to_string().contains("name server")).then_some(())
        });
        for way in ["", "+tcp", "+noedns"] {
            assert_eq!(
                short(&world, "ca", &format!("@{RESOLVER} {way} www.test")),
                ["10.0.7.7"],
                "{hook} {way}"
            );
        }
        assert_eq!(
            short(&world, "ca", &format!("@{RESOLVER} api.example.com")),
            ["10.0.9.9"],
            "ours stays ours"
        );
        assert!(
            dig(&world, "ca", &format!("@{RESOLVER} www.nowhere")).contains("REFUSED"),
            "as the server says"
        );
        let asked = std::fs::read_to_string(&log).unwrap();
        assert!(asked.contains("10.0.0.2/") && !asked.contains("10.0.1.5/"), "the resolver asks: {asked}");
        let answer = dig(&world, "ca", &format!("+ignore @{RESOLVER} large.test TXT"));
        assert!(answer.contains("flags: qr tc") || answer.contains(" tc "), "{answer}");
        let answer = dig(&world, "ca", &format!("@{RESOLVER} large.test TXT"));
        assert_eq!(answer.matches(text.as_str()).count(), 15, "by TCP: {answer}");
        assert!(
            dig(&world, "cb", &format!("@{RESOLVER} www.test")).contains("REFUSED"),
            "not in the other VPC"
        );
        assert!(counted(&world, "shop", "forwarded") >= 5);
        world.kill(server);
        assert!(dig(&world, "ca", &format!("@{RESOLVER} www.test")).contains("SERVFAIL"), "nobody answers");
        assert!(counted(&world, "shop", "failed") > 0);
    }
}

#[test]
fn rules_forward_domains_from_the_outbound_address_and_questions_come_in_by_the_inbound_one() {
    let shop = r#"{ inbound = ["10.0.3.53"], outbound = ["10.0.3.54"],
        forward = [{ domain = "corp.example", to = ["10.0.1.22:5353"] }, { domain = "example.com", to = ["10.0.1.22"] }] }"#
        .replace('\n', " ");
    let mut world = World::new(&named("", UNVERIFIED, &shop));
    let log = world.dir.path().join("dnsmasq.log");
    let facility = format!("--log-facility={}", log.display());
    serve_names(
        &mut world,
        "t2",
        "5353",
        &["--address=/corp.example/10.0.7.1", "--log-queries=extra", &facility],
    );
    serve_names(&mut world, "t2", "53", &["--address=/example.com/10.0.7.2"]);
    eventually("the name server answers", || {
        (short(&world, "ca", &format!("@{RESOLVER} www.corp.example")) == ["10.0.7.1"]).then_some(())
    });
    let asked = std::fs::read_to_string(&log).unwrap();
    assert!(asked.contains("10.0.3.54/") && !asked.contains("10.0.0.2/"), "{asked}");
    assert_eq!(short(&world, "ca", &format!("@{RESOLVER} www.example.com")), ["10.0.7.2"]);
    assert_eq!(
        short(&world, "ca", &format!("@{RESOLVER} api.example.com")),
        ["10.0.9.9"],
        "the longer name is ours"
    );
    assert_eq!(short(&world, "ca", "@10.0.3.53 api.example.com"), ["10.0.9.9"]);
    assert!(dig(&world, "ca", &format!("@{RESOLVER} elsewhere.test")).contains("REFUSED"));
    assert!(
        dig(&world, "ca", "@10.0.3.54 api.example.com").contains("no servers could be reached"),
        "it only asks"
    );
}

#[test]
fn name_servers_beyond_the_vpcs_router_are_asked_and_one_that_is_dead_does_not_keep_the_next_from_answering()
{
    let shop = r#"{ upstreams = ["192.0.2.53", "198.51.100.53"], gateway = "10.0.1.22" }"#;
    let mut world = World::new(&named("", UNVERIFIED, shop));
    // The router is a name server, too, by an address that is not on the link.
    world.shell("t2", "ip addr add 198.51.100.53/32 dev eth0");
    serve_names(
        &mut world,
        "t2",
        "53",
        &["--listen-address=198.51.100.53", "--bind-interfaces", "--address=/www.test/10.0.7.7"],
    );
    let question = format!("@{RESOLVER} www.test");
    eventually("the second one answers", || (short(&world, "ca", &question) == ["10.0.7.7"]).then_some(()));
    assert_eq!(counted(&world, "shop", "failed"), 0);
}

#[test]
fn a_name_is_there_while_its_endpoint_is_available_and_gone_when_the_provider_rejects_it() {
    let mut world = World::new(&named("", UNVERIFIED, UPSTREAM).replace("acceptance_required = false", ""));
    serve_names(&mut world, "t2", "53", &["--address=/example.com/192.0.2.7"]);
    let decide = |world: &World, decision: &str| {
        let output = world.privatelink(&[decision, "shop"]);
        assert!(output.status.success(), "{output:?}");
    };
    let resolves = |world: &World| short(world, "ca", &format!("@{RESOLVER} api.example.com"));
    eventually("the public name is seen until then", || (resolves(&world) == ["192.0.2.7"]).then_some(()));
    let row = names(&world, "shop", "private")[0].clone();
    assert_eq!(
        (&row["standing"], &row["why"]),
        (&"absent".into(), &"the endpoint is pendingAcceptance".into())
    );
    let generated = name(&world, "shop", "endpoint");
    assert_eq!(
        short(&world, "ca", &format!("@{RESOLVER} {generated}")),
        ["10.0.9.9"],
        "it has its address already"
    );
    decide(&world, "accept");
    assert_eq!(resolves(&world), ["10.0.9.9"]);
    decide(&world, "reject");
    assert_eq!(resolves(&world), ["192.0.2.7"]);
    decide(&world, "accept");
    assert_eq!(resolves(&world), ["10.0.9.9"]);
    let without = named("", UNVERIFIED, UPSTREAM)
        .replace("private_dns_enabled = true\n[endpoints.bank]", "[endpoints.bank]");
    assert_eq!(world.apply(&without).0, Some(0));
    assert_eq!(resolves(&world), ["192.0.2.7"], "the consumer may do without it");
}

#[test]
fn a_zone_without_a_healthy_target_is_withdrawn_and_where_no_zone_has_one_all_are_there() {
    let text = config("", &format!("protocol = \"http\", path = \"/up\", {CHECKED}"))
        .replace(r#"interfaces = ["ca"]"#, "interfaces = [\"ca\"]\ndns = true")
        .replace(r#"{ address = "10.0.1.22", zone = "a" }"#, r#"{ address = "10.0.1.22", zone = "b" }"#)
        .replace(r#"{ a = "10.0.1.10" }"#, r#"{ a = "10.0.1.10", b = "10.0.1.11" }"#)
        .replace(r#"{ a = "10.0.9.9" }"#, r#"{ a = "10.0.9.9", b = "10.0.9.19" }"#);
    let mut world = World::bare(&text);
    world.serve("t1");
    world.serve("t2");
    world.start(&[]);
    let (all, [a, b]) = (name(&world, "shop", "endpoint"), {
        let zones = names(&world, "shop", "endpoint_zone");
        [0, 1].map(|at: usize| zones[at]["name"].as_str().unwrap().to_owned())
    });
    let resolves = |world: &World, name: &str| short(world, "ca", &format!("@{RESOLVER} {name}"));
    let until = |world: &World, what: &str, addresses: &[&str]| {
        eventually(what, || (resolves(world, &all) == addresses).then_some(()));
    };
    let healthy = |world: &World, count: usize| {
        eventually("the targets' health is known", || {
            let rows = world.json("targets");
            let healthy = rows.as_array()?.iter().filter(|row| row["state"] == "healthy").count();
            (healthy == count).then_some(())
        });
    };
    healthy(&world, 2);
    until(&world, "both zones are there", &["10.0.9.19", "10.0.9.9"]);
    world.set_up("t2", false);
    until(&world, "the zone is withdrawn", &["10.0.9.9"]);
    assert_eq!((resolves(&world, &a), resolves(&world, &b)), (vec!["10.0.9.9".to_owned()], vec![]));
    let nothing = dig(&world, "ca", &format!("@{RESOLVER} {b}"));
    assert!(
        nothing.contains("status: NOERROR") && nothing.contains("SOA"),
        "the name is there, without an address: {nothing}"
    );
    assert_eq!(names(&world, "shop", "endpoint_zone")[1]["why"], "the zone b has too few healthy targets");
    world.set_up("t1", false);
    until(&world, "no zone is fit, so all are there", &["10.0.9.19", "10.0.9.9"]);
    world.set_up("t1", true);
    world.set_up("t2", true);
    healthy(&world, 2);
    until(&world, "both are there again", &["10.0.9.19", "10.0.9.9"]);
}

#[test]
fn a_provider_proves_by_a_record_that_a_name_is_its_own_and_who_has_it_keeps_it_when_the_record_is_lost() {
    let ask = "[dns]\nverification_servers = [\"127.0.0.1:5353\"]";
    let mut world = World::bare(&named(ask, "", "true"));
    world.shell("dp", "ip link set lo up");
    world.start(&[]);
    let state = |world: &World| world.json("services")[0].clone();
    let resolves = |world: &World, end: &str| short(world, end, &format!("@{RESOLVER} api.example.com"));
    let verify = |world: &World| world.privatelink(&["verify", "payments", "--json"]);
    assert_eq!(state(&world)["private_dns_name_state"], "pendingVerification");
    assert!(resolves(&world, "ca").is_empty(), "not before it is verified");
    let output = verify(&world);
    assert!(!output.status.success(), "nobody can say: {output:?}");
    let (record, value) = {
        let row = state(&world);
        (row["txt_record"].as_str().unwrap().to_owned(), row["txt_value"].as_str().unwrap().to_owned())
    };
    assert!(record.starts_with('_') && record.ends_with(".api.example.com") && value.starts_with("vpce:"));
    let problems = world.json("status")[0]["problems"].to_string();
    assert!(problems.contains(&record) && problems.contains(&value), "{problems}");
    let other = serve_names(
        &mut world,
        "dp",
        "5353",
        &["--local=/example.com/", "--txt-record=api.example.com,something else"],
    );
    assert!(verify(&world).status.success());
    assert_eq!(state(&world)["private_dns_name_state"], "pendingVerification", "another record says nothing");
    world.kill(other);
    let server = serve_names(
        &mut world,
        "dp",
        "5353",
        &["--txt-record=other.example.com,x", &format!("--txt-record={record},{value}")],
    );
    eventually("the record is found", || {
        (state(&world)["private_dns_name_state"] == "verified").then_some(())
    });
    assert_eq!(resolves(&world, "ca"), ["10.0.9.9"]);

    world.kill(server);
    let late =
        named(ask, "", "true").replace("[endpoints.bank]\nprivate_dns_enabled = true", "[endpoints.bank]");
    assert_eq!(world.apply(&late).0, Some(0));
    assert_eq!(resolves(&world, "cb"), [""; 0]);
    serve_names(&mut world, "dp", "5353", &["--local=/example.com/"]);
    let output = verify(&world);
    assert!(String::from_utf8_lossy(&output.stdout).contains("\"failed\""), "{output:?}");
    assert_eq!(resolves(&world, "ca"), ["10.0.9.9"], "who has it keeps it");
    assert_eq!(world.apply(&named(ask, "", "true")).0, Some(0));
    assert_eq!(resolves(&world, "cb"), [""; 0], "nobody else gets it");
    world.stop();
    world.run(&[]);
    assert_eq!(state(&world)["txt_record"], record.as_str(), "the record stays the same");
    eventually("the resolver is back", || (resolves(&world, "ca") == ["10.0.9.9"]).then_some(()));
}

#[test]
fn while_no_agent_runs_nobody_answers_and_the_next_one_knows_the_same_names() {
    let mut world = World::new(&named("", UNVERIFIED, "true"));
    world.serve("t1");
    let all = name(&world, "shop", "endpoint");
    let question = format!("@{RESOLVER} {all}");
    assert_eq!(short(&world, "ca", &question), ["10.0.9.9"]);
    world.kill_agent();
    assert!(dig(&world, "ca", &question).contains("no servers could be reached"));
    assert_eq!(world.fetch("ca", ""), "t1", "but connections go on");
    world.run(&[]);
    eventually("the resolver is back", || (short(&world, "ca", &question) == ["10.0.9.9"]).then_some(()));
    let (status, said) = world.apply(
        &named("", UNVERIFIED, "false")
            .replace("private_dns_enabled = true\n[endpoints.bank]", "[endpoints.bank]"),
    );
    assert_eq!(status, Some(0), "{said}");
    assert!(
        dig(&world, "ca", &question).contains("no servers could be reached"),
        "the VPC has no resolver any more"
    );
    assert_eq!(short(&world, "cb", &format!("@{RESOLVER} api.example.com")), ["10.0.9.10"], "the other has");
}

#[test]
fn dualstack_endpoints_have_both_kinds_of_address_and_the_resolver_hears_over_ipv6() {
    let text = dualstack("", UNCHECKED)
        .replace(r#"interfaces = ["ca"]"#, "interfaces = [\"ca\"]\ndns = { inbound = [\"fd00::53\"] }");
    let world = World::dualstack(&text, &["ca", "cb", "t1", "t2"]);
    world.shell("ca", "ip -6 route add fd00:ec2::253 dev eth0");
    let all = name(&world, "shop", "endpoint");
    for server in ["fd00:ec2::253", "fd00::53", RESOLVER] {
        for way in ["", "+tcp"] {
            assert_eq!(
                short(&world, "ca", &format!("@{server} {way} {all} AAAA")),
                ["fd00::99"],
                "{server} {way}"
            );
            assert_eq!(
                short(&world, "ca", &format!("@{server} {way} {all} A")),
                ["10.0.9.9"],
                "{server} {way}"
            );
        }
    }
    let zone = name(&world, "shop", "endpoint_zone");
    assert_eq!(short(&world, "ca", "@fd00:ec2::253 -x fd00::99"), [format!("{zone}.")]);
    let one = text.replace("[endpoints.bank]", "dns_record_ip_type = \"ipv6\"\n[endpoints.bank]");
    assert_eq!(world.apply(&one).0, Some(0));
    assert_eq!(short(&world, "ca", &format!("@{RESOLVER} {all} AAAA")), ["fd00::99"]);
    assert_eq!(short(&world, "ca", &format!("@{RESOLVER} {all} A")), [""; 0], "as the endpoint says");
}

#[test]
fn a_name_server_of_ipv6_is_asked_from_the_outbound_address_of_its_family() {
    let text = dualstack("", UNCHECKED)
        .replace(
            r#"interfaces = ["ca"]"#,
            "interfaces = [\"ca\", \"t2\"]\ndns = { upstreams = [\"fd00::22\"], outbound = [\"fd00::54\"] }",
        )
        .replace(r#"interfaces = ["t1", "t2"]"#, r#"interfaces = ["t1"]"#)
        .replace(r#", { address = "10.0.1.22", zone = "a" }"#, "")
        .replace(r#", { address = "fd00::22", zone = "a" }"#, "");
    let mut world = World::dualstack(&text, &["ca", "cb", "t1", "t2"]);
    let log = world.dir.path().join("dnsmasq.log");
    let facility = format!("--log-facility={}", log.display());
    serve_names(&mut world, "t2", "53", &["--address=/www.test/fd00::77", "--log-queries=extra", &facility]);
    for way in ["", "+tcp"] {
        let question = format!("@{RESOLVER} {way} www.test AAAA");
        eventually("the name server answers", || {
            (short(&world, "ca", &question) == ["fd00::77"]).then_some(())
        });
    }
    assert!(std::fs::read_to_string(&log).unwrap().contains("fd00::54/"));
}

#[test]
fn whoever_is_not_of_the_vpc_or_wants_something_else_of_the_resolver_is_dropped_by_name() {
    let world = World::new(&named("", UNVERIFIED, "true"));
    world.shell("ca", "ip addr add 192.168.7.7/32 dev eth0");
    let outside = dig(&world, "ca", &format!("-b 192.168.7.7 @{RESOLVER} api.example.com"));
    assert!(outside.contains("no servers could be reached"), "{outside}");
    assert!(drops(&world, "shop", "source_outside_vpc") > 0);
    world.shell("ca", "ip addr add 10.0.9.9/32 dev eth0");
    dig(&world, "ca", &format!("-b 10.0.9.9 @{RESOLVER} api.example.com"));
    assert!(drops(&world, "shop", "spoofed_source") > 0);
    dig(&world, "ca", &format!("-p 54 @{RESOLVER} api.example.com"));
    assert!(drops(&world, "shop", "no_listener") > 0);
    assert!(!world.shell("ca", &format!("ping -c 1 -W 1 {RESOLVER} || true")).contains("1 received"));
    assert_eq!(counted(&world, "shop", "questions"), 0, "nothing of that came to the resolver");
}

#[test]
fn a_tenant_that_asks_from_ever_more_addresses_is_bounded_and_nobody_else_is_forgotten() {
    let text = named("", UNVERIFIED, "true");
    for bench in both(|hook| World::new(&(hook.to_owned() + &text))) {
        let ask = |interface: &str, from: [u8; 4]| {
            let question = Packet { from, to: OWN, payload: question("api.example.com"), ..Packet::udp() };
            bench.run(interface, &question.build()).0
        };
        assert_eq!((ask("ca", CLIENT), ask("cb", CLIENT)), (REDIRECT, REDIRECT));
        // A second may end meanwhile, but not two.
        let forged = (0..3000u16).map(|number| number.to_be_bytes()).map(|[a, b]| [10, 0, 64 + a, b]);
        let refused = forged.into_iter().find(|from| ask("ca", *from) == DROP);
        assert!(refused.is_some(), "all were heard");
        assert_eq!(drops(&bench.world, "shop", "resolver_rate"), 1);
        assert_eq!(ask("ca", CLIENT), REDIRECT, "who has asked before is heard");
        assert_eq!(ask("cb", [10, 0, 1, 77]), REDIRECT, "another tenant's new client is heard");
        assert_eq!(drops(&bench.world, "bank", "resolver_rate"), 0);
    }
}

/// What every stack's end of its link has, and what it believes its router to have.
const STACK: Mac = [0x02, 0x70, 0x6c, 0, 0, 1];
const ROUTER: Mac = [0x02, 0x70, 0x6c, 0, 0, 2];
const OWN: Ip = [10, 0, 0, 2];

#[test]
fn a_question_goes_to_the_stack_and_its_answer_to_where_it_came_from_byte_for_byte() {
    let text = named("", UNVERIFIED, "true");
    for bench in both(|hook| World::new(&(hook.to_owned() + &text))) {
        let interfaces = bench.world.json("status")[0]["interfaces"].clone();
        let own =
            |row: &&Value| row["vpc"] == "shop" && row["interface"].as_str().unwrap().starts_with("pls");
        let stack = interfaces.as_array().unwrap().iter().find(own).unwrap()["interface"].as_str().unwrap();
        let resolver = |to: Ip| {
            let asked = arp(1, [2, 1, 1, 1, 1, 1], CLIENT, [0; 6], to, [0xff; 6]);
            let told = bench.expect("ARP", "ca", &asked, REDIRECT, &[("shop arp_reply", 1)]);
            let mac: Mac = told[6..12].try_into().unwrap();
            assert_eq!(told[..42], arp(2, mac, to, [2, 1, 1, 1, 1, 1], CLIENT, [2, 1, 1, 1, 1, 1]));
            mac
        };
        let (mac, everywhere) = (resolver(OWN), resolver([169, 254, 169, 253]));
        assert_ne!(mac, everywhere);

        let question = Packet { to: OWN, payload: question("api.example.com"), ..Packet::udp() };
        let steered = |packet: &Packet| Packet { to_mac: STACK, from_mac: ROUTER, ..packet.clone() }.build();
        let remembered = [("shop steered", 1), ("map callers", 1)];
        let out = bench.expect("a question", "ca", &question.build(), REDIRECT, &remembered);
        assert_eq!(out, steered(&question));
        let moved = Packet { from_mac: [2, 1, 1, 1, 1, 7], ..question.clone() };
        bench.expect("from another place", "ca", &moved.build(), REDIRECT, &[("shop steered", 1)]);
        let mut syn = Packet { to: OWN, to_port: 53, ..Packet::tcp(SYN) };
        for flags in [SYN, ACK] {
            syn.flags = flags;
            let out = bench.expect("a segment", "ca", &syn.build(), REDIRECT, &[("shop steered", 1)]);
            assert_eq!(out[..12], steered(&syn)[..12]);
        }
        bench.expect("a question", "ca", &moved.build(), REDIRECT, &[("shop steered", 1)]);

        let answer = Packet {
            from: OWN,
            from_port: 53,
            to: CLIENT,
            to_port: 40000,
            from_mac: STACK,
            to_mac: ROUTER,
            ..question.clone()
        };
        let out = bench.expect("its answer", stack, &answer.build(), REDIRECT, &[("shop steered", 1)]);
        assert_eq!(out, Packet { to_mac: moved.from_mac, from_mac: mac, ..answer.clone() }.build());

        let refused = |what: &str, by: &str, packet: &Packet, reason: &str| {
            let frame = packet.build();
            let out = bench.expect(what, by, &frame, DROP, &[(reason, 1)]);
            assert_eq!(out, frame, "{what}");
        };
        let outside = Packet { from: [192, 168, 7, 7], ..question.clone() };
        refused("from outside", "ca", &outside, "shop source_outside_vpc");
        let spoofed = Packet { from: [169, 254, 169, 253], ..question.clone() };
        refused("in the resolver's name", "ca", &spoofed, "shop spoofed_source");
        for port in [0, 52, 54, 80, 1023, 2048] {
            refused(
                "to another port",
                "ca",
                &Packet { to_port: port, ..question.clone() },
                "shop no_listener",
            );
        }
        let stranger = Packet { to: [10, 0, 1, 99], ..answer.clone() };
        refused("to who has not asked", stack, &stranger, "shop no_next_hop");
        let others = Packet { from_port: 54, ..answer.clone() };
        refused("from another port", stack, &others, "shop spoofed_source");
        let endpoint = Packet { from: [10, 0, 9, 9], ..answer.clone() };
        refused("from the endpoint's address", stack, &endpoint, "shop spoofed_source");
        let piece = Packet { fragment: 0x0003, ..question.clone() };
        refused("a later fragment", "ca", &piece, "shop fragment_unknown");
        let echo = question.icmp(8, b"ping");
        bench.refused("an echo request", "ca", &echo, "shop icmp_unsupported");

        // Whoever forges the name server's address does not get what is for it.
        assert_eq!(bench.world.apply(&named("", UNVERIFIED, UPSTREAM)).0, Some(0));
        eventually("the name server's link-layer address is known", || {
            (!bench.world.json("status")[0]["problems"].to_string().contains("name server")).then_some(())
        });
        let redirected = |by: &str, packet: &Packet| {
            let (verdict, out) = bench.run(by, &packet.build());
            assert_eq!(verdict, REDIRECT);
            out
        };
        redirected("ca", &Packet { from: [10, 0, 1, 22], ..question.clone() });
        let to_server = Packet { to: [10, 0, 1, 22], to_port: 53, from_port: 1500, ..answer.clone() };
        let out = redirected(stack, &to_server);
        let lladdr = out[..6].iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":");
        assert!(
            bench.world.shell("t2", "ip link show eth0").contains(&lladdr),
            "{lladdr} is not the server's"
        );
        let reply = Packet { from: [10, 0, 1, 22], from_port: 53, to_port: 1500, ..question.clone() };
        assert_eq!(redirected("t2", &reply), steered(&reply));
        let elsewhere = Packet { from: [192, 0, 2, 53], ..reply.clone() };
        assert_eq!(redirected("t2", &elsewhere), steered(&elsewhere), "name servers may be anywhere");
    }
}

#[test]
fn a_peered_vpc_knows_an_endpoint_by_its_generated_names_and_not_by_the_private_one() {
    let text = named("", UNVERIFIED, "true");
    let (head, tail) = text.split_once("[vpcs.bank]").unwrap();
    let tail = tail.replacen("10.0.0.0/16", "10.1.0.0/16", 1).replace("10.0.9.10", "10.1.9.10");
    let text = format!("{head}[vpcs.bank]{tail}");
    let world = World::new(&text);
    world.shell("cb", "ip addr flush dev eth0 && ip addr add 10.1.1.5/16 dev eth0");
    let all = name(&world, "shop", "endpoint");
    let question = format!("@10.1.0.2 {all}");
    assert!(dig(&world, "cb", &question).contains("NXDOMAIN"), "nothing attaches the two yet");
    let peered = format!("{text}[attachments.both]\nkind = \"peering\"\nvpcs = [\"shop\", \"bank\"]\n");
    let (status, said) = world.apply(&peered);
    assert_eq!(status, Some(0), "{said}");
    assert_eq!(short(&world, "cb", &question), ["10.0.9.9"]);
    assert_eq!(short(&world, "cb", "@10.1.0.2 api.example.com"), ["10.1.9.10"], "its own endpoint's");
}

#[test]
fn network_acls_keep_nobody_from_the_resolvers_own_address_and_hold_at_the_inbound_one() {
    let acl = "[network_acls.closed]\nvpc = \"shop\"\nsubnets = [\"10.0.1.0/24\"]\ningress = []\negress = []\n[endpoints.shop]";
    let shop = r#"{ inbound = ["10.0.3.53"] }"#;
    let world = World::new(&named("", UNVERIFIED, shop).replace("[endpoints.shop]", acl));
    for way in ["", "+tcp"] {
        assert_eq!(short(&world, "ca", &format!("@{RESOLVER} {way} api.example.com")), ["10.0.9.9"]);
    }
    assert!(dig(&world, "ca", "@10.0.3.53 api.example.com").contains("no servers could be reached"));
    assert!(drops(&world, "shop", "network_acl") > 0);
    let open = named("", UNVERIFIED, shop);
    assert_eq!(world.apply(&open).0, Some(0));
    assert_eq!(short(&world, "ca", "@10.0.3.53 api.example.com"), ["10.0.9.9"]);
}

#[test]
fn security_groups_of_an_inbound_address_say_who_may_ask_there_and_at_no_other() {
    let shop = r#"{ inbound = [{ address = "10.0.3.53", security_groups = ["dns"] }, "10.0.3.54"] }"#;
    let group = |sources: &str| {
        let rule =
            |protocol| format!(r#"{{ protocol = "{protocol}", ports = "53", sources = ["{sources}"] }}"#);
        format!("[security_groups.dns]\nvpc = \"shop\"\ningress = [{}, {}]\n", rule("udp"), rule("tcp"))
    };
    let text = |sources: &str| named("", UNVERIFIED, shop) + &group(sources);
    let world = World::new(&text("10.0.2.0/24"));
    let asked = |server: &str| {
        ["", "+tcp"].map(|way| short(&world, "ca", &format!("{way} @{server} api.example.com")).concat())
    };
    let lost = |answers: [String; 2]| answers.iter().all(|answer| !answer.contains("10.0.9.9"));
    assert!(lost(asked("10.0.3.53")));
    let before = drops(&world, "shop", "security_group");
    assert!(before > 1);
    for server in [RESOLVER, "10.0.3.54"] {
        assert_eq!(asked(server), ["10.0.9.9"; 2], "{server}");
    }
    assert_eq!(drops(&world, "shop", "security_group"), before);
    let told = world.privatelink(&["explain", "--from", "shop", "udp", "10.0.1.5:40001", "10.0.3.53:53"]);
    let told = String::from_utf8_lossy(&told.stdout).into_owned();
    assert!(told.contains("no rule matches") && told.contains("security_group"), "{told}");
    assert_eq!(world.apply(&text("10.0.1.5")).0, Some(0));
    assert_eq!(asked("10.0.3.53"), ["10.0.9.9"; 2], "whom a rule lets in is answered");
    let (code, said) =
        world.apply(&text("10.0.1.5").replace("vpc = \"shop\"\ningress", "vpc = \"bank\"\ningress"));
    assert_eq!(code, Some(65));
    assert!(said.contains("the security group \"dns\" is in the VPC \"bank\""), "{said}");
}

#[test]
fn clients_beyond_an_attachments_own_interface_ask_the_inbound_address_and_reach_what_it_says() {
    for hook in ["xdp", "tcx"] {
        let line = |cidrs: &str| {
            format!(
                "[attachments.line]\nkind = \"direct_connect\"\nvpcs = [\"shop\"]\ncidrs = [{cidrs}]\ninterfaces = [\"cb\"]\n"
            )
        };
        let usual = named(&format!("hook = \"{hook}\""), UNVERIFIED, r#"{ inbound = ["10.0.3.53"] }"#);
        let (before, after) = usual.split_once("[vpcs.bank]").unwrap();
        let after = after.split_once("[vpcs.payments]").unwrap().1.split_once("[endpoints.bank]").unwrap().0;
        let text = format!("{before}[vpcs.payments]{after}{}", line("\"172.16.0.0/16\""));
        let mut world = World::new(&text);
        world.serve("t1");
        world.shell(
            "cb",
            "ip addr flush dev eth0 && ip addr add 172.16.0.5/16 dev eth0 && ip route add 10.0.0.0/16 dev eth0 && \
             ip addr add 172.17.0.5/32 dev eth0 && ip addr add 10.0.1.5/32 dev eth0",
        );
        let generated = name(&world, "shop", "endpoint");
        for (way, name) in
            ["", "+tcp", "+noedns"].iter().flat_map(|way| [(way, "api.example.com"), (way, &generated)])
        {
            let question = format!("{way} @10.0.3.53 {name}");
            let from = |address: &str, end| short(&world, end, &format!("-b {address} {question}"));
            assert_eq!(from("172.16.0.5", "cb"), ["10.0.9.9"], "{hook} {question}");
            assert_eq!(from("10.0.1.5", "ca"), ["10.0.9.9"], "the VPC's own clients get theirs as before");
        }
        assert_eq!(world.shell("cb", "curl -sS --max-time 5 http://10.0.9.9/"), "t1");
        let outside = drops(&world, "line", "source_outside_vpc");
        for address in ["172.17.0.5", "10.0.1.5"] {
            let said = dig(&world, "cb", &format!("-b {address} @10.0.3.53 api.example.com"));
            assert!(said.contains("no servers could be reached"), "not in the name of others: {said}");
        }
        assert_eq!(drops(&world, "line", "source_outside_vpc"), outside + 2);
        let own = dig(&world, "cb", &format!("-b 172.16.0.5 @{RESOLVER} api.example.com"));
        assert!(own.contains("no servers could be reached"), "the VPC's own resolver is its own: {own}");
    }
}

#[test]
fn a_peered_vpcs_clients_ask_the_inbound_address_of_the_other_for_all_that_it_knows() {
    let text = named("", UNVERIFIED, r#"{ inbound = ["10.0.3.53"] }"#);
    let (head, tail) = text.split_once("[vpcs.bank]").unwrap();
    let tail = tail.replacen("10.0.0.0/16", "10.1.0.0/16", 1).replace("10.0.9.10", "10.1.9.10");
    let text = format!("{head}[vpcs.bank]{tail}");
    let world = World::new(&text);
    world.shell(
        "cb",
        "ip addr flush dev eth0 && ip addr add 10.1.1.5/16 dev eth0 && ip route add 10.0.0.0/16 dev eth0",
    );
    let question = "@10.0.3.53 api.example.com";
    assert!(
        dig(&world, "cb", question).contains("no servers could be reached"),
        "nothing attaches the two yet"
    );
    let peered = format!("{text}[attachments.both]\nkind = \"peering\"\nvpcs = [\"shop\", \"bank\"]\n");
    assert_eq!(world.apply(&peered).0, Some(0));
    // The client's kernel may still be about to give up its question before where that address is.
    eventually("the other VPC's endpoint is known", || {
        (short(&world, "cb", question) == ["10.0.9.9"]).then_some(())
    });
    assert_eq!(short(&world, "cb", &format!("+tcp {question}")), ["10.0.9.9"]);
    assert_eq!(short(&world, "cb", "@10.1.0.2 api.example.com"), ["10.1.9.10"], "its own");
}

#[test]
fn a_client_that_asks_too_much_or_nonsense_does_not_keep_the_resolver_from_answering() {
    let world = World::new(&named("", UNVERIFIED, "{ max_queries_per_second = 50 }"));
    let question = question("api.example.com");
    let answers = world.thread("ca", move || {
        let socket = UdpSocket::bind("10.0.1.5:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        for _ in 0..400 {
            socket.send_to(&question, (RESOLVER, 53)).unwrap();
        }
        let mut buffer = [0; 512];
        (0..400).take_while(|_| socket.recv(&mut buffer).is_ok()).count()
    });
    let answers = answers.join().unwrap();
    assert!((1..400).contains(&answers), "{answers} of 400");
    assert!(counted(&world, "shop", "limited") > 0);
    let nonsense = world.thread("ca", || {
        let socket = UdpSocket::bind("10.0.1.5:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        let mut longest = 0;
        for length in 1..40usize {
            socket.send_to(&vec![0x5a; length], (RESOLVER, 53)).unwrap();
            let mut buffer = [0; 2048];
            if let Ok(answered) = socket.recv(&mut buffer) {
                assert!(answered <= length, "no more comes back than was sent");
                longest = longest.max(answered);
            }
        }
        longest
    });
    assert!(nonsense.join().unwrap() <= 12);
    // Connections that say nothing: as many as one client may have, and more.
    let silent = world.thread("ca", || {
        let mut streams: Vec<TcpStream> =
            (0..12).map(|_| TcpStream::connect((RESOLVER, 53)).unwrap()).collect();
        let ended = |stream: &mut TcpStream| {
            stream.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
            stream.read(&mut [0]).is_ok_and(|length| length == 0)
        };
        streams.iter_mut().filter_map(|stream| ended(stream).then_some(())).count()
    });
    assert_eq!(silent.join().unwrap(), 4, "beyond eight, they are closed");
    eventually("the client is answered again", || {
        (short(&world, "ca", &format!("@{RESOLVER} +tcp api.example.com")) == ["10.0.9.9"]).then_some(())
    });
}
