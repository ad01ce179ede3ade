//! What `analyze` finds in configurations that are right and will not work.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test: a panic with its place is what is wanted")]

use privatelink::{analyze, model};

const WORKS: &str = r#"
[vpcs.shop]
account = "111122223333"
cidrs = ["10.0.0.0/16"]
interfaces = ["ca"]
dns = { inbound = [{ address = "10.0.3.53", security_groups = ["dns"] }] }
[vpcs.payments]
account = "999900001111"
cidrs = ["10.0.0.0/16"]
interfaces = ["t1"]
[security_groups.web]
vpc = "shop"
members = ["10.0.1.5"]
ingress = [{ protocol = "tcp", ports = "80", sources = ["10.0.1.0/24", "web"] }]
[security_groups.dns]
vpc = "shop"
ingress = [
  { protocol = "udp", ports = "53", sources = ["10.0.0.0/16"] },
  { protocol = "tcp", ports = "53", sources = ["10.0.0.0/16"] },
]
[security_groups.edge]
vpc = "payments"
ingress = [{ protocol = "tcp", ports = "1-1023", sources = ["10.0.0.0/8"] }]
[network_acls.endpoints]
vpc = "shop"
subnets = ["10.0.9.0/24"]
ingress = [{ rule = 1, action = "allow", protocol = "tcp", ports = "80", cidr = "10.0.0.0/16" }]
egress = [{ rule = 1, action = "allow", protocol = "tcp", ports = "1024-65535", cidr = "10.0.0.0/16" }]
[network_acls.targets]
vpc = "payments"
subnets = ["10.0.1.16/28"]
ingress = [{ rule = 1, action = "allow", protocol = "tcp", ports = "8080", cidr = "10.0.1.10" }]
egress = [{ rule = 1, action = "allow", protocol = "tcp", ports = "2048-65535", cidr = "10.0.1.10" }]
[target_groups.web]
vpc = "payments"
protocol = "tcp"
port = 8080
targets = [{ address = "10.0.1.21", zone = "a" }]
[load_balancers.edge]
vpc = "payments"
addresses = { a = "10.0.1.10" }
security_groups = ["edge"]
listeners = [{ protocol = "tcp", port = 80, target_group = "web" }]
[endpoint_services.payments]
load_balancers = ["edge"]
allowed_principals = ["111122223333"]
[endpoints.shop]
vpc = "shop"
service = "payments"
security_groups = ["web"]
addresses = { a = "10.0.9.9" }
"#;

/// What is said of a configuration, and how to mend it.
fn found(text: &str) -> Vec<String> {
    let findings = analyze::analyze(&model::parse(text, "analyze.toml").unwrap());
    findings.into_iter().map(|it| format!("{}: {} ({})", it.resource, it.finding, it.remedy)).collect()
}

#[test]
fn a_configuration_that_works_has_no_findings() {
    assert_eq!(found(WORKS), Vec::<String>::new());
}

#[test]
fn each_thing_that_will_not_work_is_found_alone_with_a_remedy() {
    let cases = [
        ("interfaces = [\"ca\"]", "interfaces = []", "vpc shop: it has no interface"),
        ("zone = \"a\" }", "zone = \"b\" }", "load_balancer edge: the zone a has no target of web"),
        ("targets = [{ address = \"10.0.1.21\", zone = \"a\" }]", "", "target_group web: it has no targets"),
        (
            "sources = [\"10.0.1.0/24\", \"web\"]",
            "sources = [\"10.7.0.0/24\"]",
            "endpoint shop: its security groups let no client of its VPC come to the listener tcp/80",
        ),
        ("ports = \"80\", sources", "ports = \"81\", sources", "allow tcp/80 in web"),
        ("members = [\"10.0.1.5\"]", "", "security_group web: it is a source of rules, and has no members"),
        (
            "1-1023",
            "81-1023",
            "load_balancer edge: its security groups let nobody come to its listener tcp/80",
        ),
        (
            "allowed_principals = [\"111122223333\"]",
            "allowed_principals = [\"444455556666\"]",
            "endpoint shop: arn:aws:iam::111122223333:root may not connect",
        ),
        (
            "ports = \"80\", cidr",
            "ports = \"443\", cidr",
            "endpoint shop: the network ACL endpoints lets nobody come",
        ),
        (
            "ports = \"1024-65535\", cidr = \"10.0.0.0/16\"",
            "ports = \"80\", cidr = \"10.0.0.0/16\"",
            "endpoint shop: the network ACL endpoints lets no answer of 10.0.9.9 over tcp out",
        ),
        (
            "ports = \"8080\"",
            "ports = \"8081\"",
            "load_balancer edge: the network ACL targets denies packets to its target 10.0.1.21:8080",
        ),
        (
            "{ protocol = \"udp\", ports = \"53\"",
            "{ protocol = \"udp\", ports = \"5353\"",
            "vpc shop: the security groups of 10.0.3.53 let nobody ask there by udp (allow udp/53 in dns)",
        ),
        ("2048-65535", "80-81", "load_balancer edge: the network ACL targets denies answers of its target"),
    ];
    for (right, wrong, said) in cases {
        assert!(WORKS.contains(right), "{right}");
        let found = found(&WORKS.replacen(right, wrong, 1));
        assert!(found.len() == 1 && found[0].contains(said), "{wrong}: {found:?}");
    }
}

#[test]
fn what_nobody_uses_is_found() {
    let unused =
        WORKS.replace("security_groups = [\"edge\"]\n", "").replace("[endpoints.shop]", "[endpoints.other]");
    let unused = unused
        .replace("load_balancers = [\"edge\"]", "load_balancers = []")
        .replace("addresses = { a = \"10.0.9.9\" }\n", "addresses = {}\n");
    let unused = &unused[..unused.find("[endpoints").unwrap()];
    let found = found(unused);
    for said in [
        "load_balancer edge: no service is in front of it",
        "endpoint_service payments: it has no load balancer",
        "security_group edge: nothing is in it",
    ] {
        assert!(found.iter().any(|it| it.contains(said)), "{said}: {found:?}");
    }
}
