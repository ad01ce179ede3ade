//! What the maps should contain, as targets come, go, fail and recover: pure functions of what is known.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test: a panic with its place is what is wanted")]

use privatelink::flows::Survey;
use privatelink::ip;
use privatelink::model::{self, Model};
use privatelink::names::{Kind, Names};
use privatelink::plan::{self, Image, Known};
use privatelink_common::tables::{DRAINING, HEALTHY, INITIAL, Target, UNHEALTHY, VpcAddress};
use privatelink_common::wire::Ip;
use std::collections::BTreeMap;

const TARGETS: [&str; 4] = [
    r#"{ address = "10.0.1.21", zone = "a" }"#,
    r#"{ address = "10.0.1.22", zone = "a" }"#,
    r#"{ address = "10.0.1.23", zone = "b" }"#,
    r#"{ address = "10.0.1.24", zone = "b" }"#,
];

fn config(attributes: &str, targets: &[&str]) -> Model {
    let text = format!(
        r#"
[vpcs.shop]
account = "111122223333"
cidrs = ["10.0.0.0/16"]
interfaces = ["a"]
[vpcs.pay]
account = "111122223333"
cidrs = ["10.0.0.0/16"]
interfaces = ["b"]
[target_groups.web]
vpc = "pay"
protocol = "tcp"
port = 8080
targets = [{}]
{attributes}
[load_balancers.edge]
vpc = "pay"
addresses = {{ a = "10.0.1.10", b = "10.0.1.11" }}
listeners = [{{ protocol = "tcp", port = 80, target_group = "web" }}]
[load_balancers.other]
vpc = "pay"
addresses = {{ a = "10.0.1.12" }}
listeners = [{{ protocol = "tcp", port = 80, target_group = "web" }}]
[endpoint_services.s]
load_balancers = ["edge", "other"]
acceptance_required = false
allowed_principals = ["*"]
[endpoints.e]
vpc = "shop"
service = "s"
addresses = {{ a = "10.0.9.9", b = "10.0.9.10" }}
"#,
        targets.join(", ")
    );
    model::parse(&text, "plan.toml").unwrap()
}

/// An agent's knowledge, without an agent.
struct Mind {
    names: Names,
    image: Image,
    health: BTreeMap<u32, u16>,
    survey: Survey,
    before: Model,
}

impl Mind {
    fn new(model: &Model) -> Self {
        let mut mind = Self {
            names: Names::default(),
            image: Image::default(),
            health: BTreeMap::new(),
            survey: Survey::default(),
            before: model.clone(),
        };
        mind.see(model, 1000);
        mind
    }

    fn see(&mut self, model: &Model, now: u32) {
        let known = Known {
            now,
            targets: self.image.targets.clone(),
            addresses: self.image.addresses.clone(),
            health: self.health.clone(),
            before: Some(&self.before),
            flows: self.survey.clone(),
            ..Known::connected(model)
        };
        self.image = plan::compile(model, &mut self.names, &known, |_| "stack".into()).unwrap();
        self.before = model.clone();
    }

    fn id(&self, last: u8) -> u32 {
        self.names.id(Kind::Target, &format!("web/10.0.1.{last}:8080")).unwrap()
    }

    fn target(&self, last: u8) -> Target {
        self.image.targets[&self.id(last)]
    }

    fn set(&mut self, states: &[(u8, u16)]) {
        for (last, state) in states {
            let id = self.id(*last);
            self.health.insert(id, *state);
        }
    }

    /// The hundredths of a zone's table that each target has.
    fn shares(&self, zone: &str) -> BTreeMap<u8, usize> {
        let table = self
            .image
            .tables
            .iter()
            .find(|(id, _)| self.names.name(Kind::Table, **id).starts_with(&format!("web/{zone}/")));
        let mut shares = BTreeMap::<u8, usize>::new();
        let (_, table) = table.unwrap();
        for target in table {
            *shares.entry(self.image.targets[target].address.0[15]).or_default() += 1;
        }
        shares
            .into_iter()
            .map(|(target, slots)| (target, (slots * 100 + table.len() / 2) / table.len()))
            .collect()
    }
}

#[test]
fn a_zone_has_its_healthy_targets_or_all_of_them_where_too_few_are_healthy() {
    let model = config("", &TARGETS);
    let mut mind = Mind::new(&model);
    assert_eq!(mind.shares("a"), BTreeMap::from([(21, 50), (22, 50)]), "none is known yet, so all");
    mind.set(&[(21, HEALTHY), (22, UNHEALTHY), (23, UNHEALTHY), (24, UNHEALTHY)]);
    mind.see(&model, 1010);
    assert_eq!(mind.shares("a"), BTreeMap::from([(21, 100)]));
    assert_eq!(mind.shares("b"), BTreeMap::from([(23, 50), (24, 50)]), "fail-open");
    assert_eq!(mind.target(22).cut, 1010, "an unhealthy target's flows are cut");
    assert_eq!(mind.target(23).cut, 0, "but not where it gets new ones");
    mind.set(&[(22, HEALTHY)]);
    mind.see(&model, 1020);
    assert_eq!((mind.target(22).cut, mind.target(22).since, mind.target(21).since), (0, 1020, 1010));
}

#[test]
fn minimum_healthy_targets_are_a_count_or_a_percentage() {
    let minimum = "target_group_health.unhealthy_state_routing.minimum_healthy_targets";
    for (attribute, healthy, expected) in [
        (format!("{minimum}.count = 2"), 2, 2),
        (format!("{minimum}.count = 3"), 2, 4),
        (format!("{minimum}.percentage = 50"), 2, 2),
        (format!("{minimum}.percentage = 51"), 2, 4),
        (String::new(), 1, 1),
    ] {
        let model = config(&format!("{attribute}\nload_balancing.cross_zone.enabled = true"), &TARGETS);
        let mut mind = Mind::new(&model);
        let state = |place: u8| if place < healthy { HEALTHY } else { UNHEALTHY };
        mind.set(&[(21, state(0)), (22, state(1)), (23, state(2)), (24, state(3))]);
        mind.see(&model, 1010);
        assert_eq!(mind.shares("*").len(), expected, "{attribute}");
    }
}

#[test]
fn a_group_may_cross_zones_though_its_load_balancer_does_not() {
    let mind = Mind::new(&config("load_balancing.cross_zone.enabled = true", &TARGETS));
    assert_eq!(mind.shares("*"), BTreeMap::from([(21, 25), (22, 25), (23, 25), (24, 25)]));
    assert_eq!(mind.image.tables.len(), 1);
}

#[test]
fn a_target_that_has_become_healthy_starts_slowly() {
    let model = config("slow_start.duration_seconds = 100", &TARGETS[..2]);
    let mut mind = Mind::new(&model);
    mind.set(&[(21, HEALTHY), (22, UNHEALTHY)]);
    mind.see(&model, 1000);
    mind.set(&[(22, HEALTHY)]);
    mind.see(&model, 2000);
    assert_eq!(mind.shares("a")[&22], 1, "one hundredth of its weight, and the other all of its own");
    assert!(plan::is_timed(&model, &mind.image));
    mind.see(&model, 2050);
    assert_eq!(mind.shares("a")[&22], 33, "half of its weight against a whole one");
    mind.see(&model, 2100);
    assert_eq!(mind.shares("a")[&22], 50);
}

#[test]
fn a_deregistered_target_drains_is_cut_if_so_configured_and_keeps_its_number_while_it_has_flows() {
    let attributes = "deregistration_delay.timeout_seconds = 60\nderegistration_delay.connection_termination.enabled = true";
    let (both, one) = (config(attributes, &TARGETS[..2]), config(attributes, &TARGETS[..1]));
    let mut mind = Mind::new(&both);
    let id = mind.id(22);
    mind.survey.began = 1001;
    mind.survey.targets.insert((id, Ip::from_ipv4([10, 0, 1, 10])), 3);
    mind.see(&one, 2000);
    let target = mind.target(22);
    assert_eq!((target.state, target.since, target.until, target.cut), (DRAINING, 2000, 2060, 0));
    assert_eq!(mind.shares("a"), BTreeMap::from([(21, 100)]));
    mind.see(&one, 2059);
    assert_eq!(mind.target(22).cut, 0);
    mind.see(&one, 2060);
    assert_eq!(mind.target(22).cut, 2060);
    mind.survey.began = 2065;
    mind.see(&one, 2066);
    assert!(mind.image.targets.contains_key(&id), "it has flows, as the sweep has counted");
    mind.survey.targets.clear();
    mind.see(&one, 2070);
    assert!(!mind.image.targets.contains_key(&id), "it has none");
    assert!(!plan::is_timed(&one, &mind.image));
    mind.see(&both, 2080);
    assert_eq!(mind.target(22).state, INITIAL);
}

#[test]
fn an_unhealthy_target_may_drain_before_its_flows_are_cut() {
    let attributes = "target_health_state.unhealthy.connection_termination.enabled = false\n\
                      target_health_state.unhealthy.draining_interval_seconds = 30";
    let model = config(attributes, &TARGETS[..2]);
    let mut mind = Mind::new(&model);
    mind.set(&[(21, HEALTHY), (22, UNHEALTHY)]);
    mind.see(&model, 1000);
    assert!(plan::is_timed(&model, &mind.image));
    mind.see(&model, 1029);
    assert_eq!(mind.target(22).cut, 0);
    mind.see(&model, 1030);
    assert_eq!(mind.target(22).cut, 1030);
}

#[test]
fn an_endpoints_address_keeps_its_load_balancer_when_another_comes() {
    let model = config("", &TARGETS);
    let mut mind = Mind::new(&model);
    let of = |image: &Image| image.addresses.values().find(|it| it.endpoint == 1).unwrap().balancer;
    let before = of(&mind.image);
    // The other one alone, and then both again: it stays with what it got.
    let name = mind.names.name(Kind::Balancer, before);
    let (kept, gone) = if name.starts_with("edge") { ("other", "edge") } else { ("edge", "other") };
    let mut only = model.clone();
    let service = only.services.get_mut("s").unwrap();
    service.load_balancers.retain(|it| it == kept);
    if gone == "edge" {
        only.endpoints.get_mut("e").unwrap().addresses.retain(|zone, _| zone == "a");
    }
    mind.see(&only, 1001);
    let moved = of(&mind.image);
    assert_ne!(moved, before);
    mind.see(&model, 1002);
    assert_eq!(of(&mind.image), moved);
}

#[test]
fn a_dualstack_load_balancer_has_sources_of_each_family_and_each_address_of_an_endpoint_is_one_of_its_own() {
    let dualstack = r#"
[vpcs.shop]
account = "111122223333"
cidrs = ["10.0.0.0/16", "fd00::/64"]
interfaces = ["a"]
[target_groups.web]
vpc = "shop"
protocol = "tcp"
ip_address_type = "ipv6"
port = 8080
targets = [{ address = "fd00::21", zone = "a" }]
[load_balancers.edge]
vpc = "shop"
addresses = { a = ["10.0.1.10", "fd00::10"] }
secondary_addresses = { a = ["fd00::11", "10.0.1.11", "fd00::12"] }
listeners = [{ protocol = "tcp", port = 80, target_group = "web" }]
[endpoint_services.s]
load_balancers = ["edge"]
acceptance_required = false
allowed_principals = ["*"]
supported_ip_address_types = ["ipv4", "ipv6"]
[endpoints.e]
vpc = "shop"
service = "s"
addresses = { a = ["10.0.9.9", "fd00::99"] }
"#;
    let model = model::parse(dualstack, "dualstack.toml").unwrap();
    let mind = Mind::new(&model);
    let zone = mind.names.id(Kind::Balancer, "edge/a").unwrap();
    let shown = |sources: [u32; 8]| -> std::collections::BTreeSet<String> {
        sources.iter().map(|id| ip::shown(mind.image.balancers[id].address).to_string()).collect()
    };
    for balancer in mind.image.balancers.values() {
        assert_eq!(shown(balancer.sources).into_iter().collect::<Vec<_>>(), ["10.0.1.10", "10.0.1.11"]);
        assert_eq!(
            shown(balancer.sources6).into_iter().collect::<Vec<_>>(),
            ["fd00::10", "fd00::11", "fd00::12"]
        );
    }
    let (four, six) =
        (mind.names.id(Kind::Endpoint, "e/a").unwrap(), mind.names.id(Kind::Endpoint, "e/a/ipv6").unwrap());
    assert_ne!(four, six);
    for (address, endpoint) in [("10.0.9.9", four), ("fd00::99", six)] {
        let key = VpcAddress::new(1, ip::entry(address.parse().unwrap()));
        let entry = mind.image.addresses[&key];
        assert_eq!((entry.endpoint, entry.balancer, entry.dualstack), (endpoint, zone, 1), "{address}");
    }
    let listener = mind.image.listeners.iter().next().unwrap();
    assert_eq!((listener.0.balancer, listener.1.ipv6), (zone, 1));
}

#[test]
fn vlans_have_slots_of_their_own_and_a_trunk_that_no_vpc_names_is_nobodys() {
    let compile = |first: &str, second: &str, names: &mut Names| {
        let vpc = |name: &str, interfaces: &str| {
            format!(
                "[vpcs.{name}]\naccount = \"111122223333\"\ncidrs = [\"10.0.0.0/16\"]\ninterfaces = [{interfaces}]\n"
            )
        };
        let text = vpc("first", first) + &vpc("second", second);
        let model = model::parse(&text, "vlans.toml").unwrap();
        plan::compile(&model, names, &Known::connected(&model), |_| "stack".into()).unwrap()
    };
    let mut names = Names::default();
    let tags =
        r#"{ trunk = "eth1", vlan = 120 }, { trunk = "eth1", service_vlan = 200, vlan = 120, hook = "tcx" }"#;
    let image = compile(tags, r#"{ trunk = "eth1", vlan = 121 }"#, &mut names);
    assert_eq!(image.vlans.keys().collect::<Vec<_>>(), ["eth1@120", "eth1@121", "eth1@200.120"]);
    assert_eq!((image.interfaces["eth1"].vpc, image.hooks["eth1"]), (0, model::Hook::Tcx));
    let slots = image.vlans.values().map(|vlan| vlan.place.slot).chain([image.interfaces["eth1"].slot]);
    assert_eq!(slots.collect::<std::collections::BTreeSet<_>>().len(), 4);
    assert_eq!(image.places().count(), 3, "of VPCs");
    let named = compile(tags, r#""eth1", { trunk = "eth1", vlan = 121 }"#, &mut names);
    assert_eq!(named.vlans, image.vlans);
    assert_eq!(
        (named.interfaces["eth1"].slot, named.interfaces["eth1"].vpc),
        (image.interfaces["eth1"].slot, image.vlans["eth1@121"].place.vpc)
    );
}
