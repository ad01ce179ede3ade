//! Which hook each interface gets: the one that its configuration asks for, as far as no packet is lost by it.
//!
//! Whatever TCX sends out leaves like any packet of this host. What a native XDP program redirects is lost at an interface whose driver
//! does not take it, as a veth's does only while its other end has GRO or a program. So an interface from which packets may go to such a
//! one does not run XDP natively, whatever its configuration says.
//!
//! Nor does a trunk run XDP in any mode while the tags of its frames may be beside them when XDP sees them (VLAN offloads): such a frame
//! would be another VPC's.

use crate::kernel::Hook;
use crate::model::{self, Model};
use crate::sys::XdpMode;
use std::collections::{BTreeMap, BTreeSet};

/// What is known of an interface that is there.
#[derive(Clone, Debug)]
pub struct Facts {
    /// What its configuration asks for.
    pub wish: model::Hook,
    /// Its VPC; of a trunk, those of its VLANs, too; of a stack, those whose clients its resolver hears.
    pub vpcs: BTreeSet<u16>,
    /// Whether it leads to the VPC's own stack.
    pub stack: bool,
    /// Whether its driver can run the program, and send back what it answers.
    pub native: bool,
    /// Whether it takes what native programs redirect to it, or will when its other end is mended.
    pub takes: bool,
    /// Why packets from there cannot be trusted to be what XDP needs, if so.
    pub unfit: Option<String>,
    /// Of a trunk, why XDP may not see the tags of its frames, if so: it would take them for another VPC's.
    pub veiled: Option<String>,
}

/// An interface's hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The hook.
    pub hook: Hook,
    /// Why, as the end of a sentence.
    pub why: String,
}

/// Pairs of VPCs whose interfaces packets may go between, each both ways; a pair of one with itself is one that serves itself.
pub fn connections(model: &Model, id: impl Fn(&str) -> Option<u16>) -> BTreeSet<(u16, u16)> {
    let mut pairs = BTreeSet::new();
    let mut connect = |one: &str, other: &str| {
        if let (Some(one), Some(other)) = (id(one), id(other)) {
            pairs.extend([(one, other), (other, one)]);
        }
    };
    for endpoint in model.endpoints.values() {
        let balancers = model.services.get(&endpoint.service).map(|service| &service.load_balancers);
        let balancers = balancers.into_iter().flatten().filter_map(|name| model.load_balancers.get(name));
        let mut spaces = model.reached_from(&endpoint.vpc);
        spaces.insert(endpoint.vpc.clone());
        for balancer in balancers {
            spaces.iter().for_each(|space| connect(space, &balancer.vpc));
        }
    }
    for balancer in model.load_balancers.values().filter(|balancer| balancer.serves_own_vpc) {
        connect(&balancer.vpc, &balancer.vpc);
    }
    pairs
}

/// The VPCs whose clients the resolver of each hears beside its own.
pub fn heard(model: &Model, id: impl Fn(&str) -> Option<u16>) -> BTreeMap<u16, BTreeSet<u16>> {
    let hears = |vpc: &model::Vpc| vpc.dns.as_ref().is_some_and(|resolver| !resolver.inbound.is_empty());
    let of = |name: &String| {
        Some((id(name)?, model.reached_from(name).iter().filter_map(|space| id(space)).collect()))
    };
    model.vpcs.iter().filter(|(_, vpc)| hears(vpc)).filter_map(|(name, _)| of(name)).collect()
}

/// Chooses for all interfaces at once.
pub fn choose(
    interfaces: &BTreeMap<String, Facts>,
    connections: &BTreeSet<(u16, u16)>,
    has_tcx: bool,
) -> BTreeMap<String, Choice> {
    let mut deaf = BTreeMap::<u16, &str>::new();
    for (name, facts) in interfaces.iter().filter(|(_, facts)| !facts.takes) {
        for vpc in &facts.vpcs {
            deaf.entry(*vpc).or_insert(name);
        }
    }
    let blocker = |from: &Facts| {
        let mut vpcs = from.vpcs.iter();
        if from.stack {
            return vpcs.find_map(|vpc| deaf.get(vpc).copied());
        }
        let mut to = vpcs.flat_map(|vpc| connections.range((*vpc, 0)..=(*vpc, u16::MAX)));
        to.find_map(|(_, to)| deaf.get(to).copied())
    };
    let fallback = if has_tcx { Hook::Tcx } else { Hook::Xdp(XdpMode::Generic) };
    let one = |facts: &Facts| {
        let (hook, why) = by_itself(facts, has_tcx, fallback);
        if let (Hook::Xdp(_), Some(veiled)) = (hook, &facts.veiled) {
            return (Hook::Tcx, veiled.clone());
        }
        match blocker(facts).filter(|_| hook == Hook::Xdp(XdpMode::Native)) {
            Some(deaf) => (fallback, format!("{deaf} does not take what XDP redirects to it")),
            None => (hook, why),
        }
    };
    let choice = |(hook, why)| Choice { hook, why };
    interfaces.iter().map(|(name, facts)| (name.clone(), choice(one(facts)))).collect()
}

/// The hook of an interface that does not regard the others.
fn by_itself(facts: &Facts, has_tcx: bool, fallback: Hook) -> (Hook, String) {
    let native = Hook::Xdp(XdpMode::Native);
    match (facts.wish, &facts.unfit) {
        (model::Hook::Tcx, _) => (Hook::Tcx, "the configuration says so".into()),
        (model::Hook::Xdp, _) if facts.native => (native, "the configuration says so".into()),
        (model::Hook::Xdp, _) => {
            (Hook::Xdp(XdpMode::Generic), "the configuration says XDP, which its driver cannot do".into())
        }
        (model::Hook::Auto, unfit) if !facts.native => {
            (fallback, unfit.clone().unwrap_or_else(|| "its driver cannot run XDP".into()))
        }
        (model::Hook::Auto, Some(unfit)) if has_tcx => (Hook::Tcx, unfit.clone()),
        (model::Hook::Auto, _) if facts.stack => (native, "it is the VPC's own stack's".into()),
        (model::Hook::Auto, _) => (native, "XDP has what it needs".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NATIVE: Hook = Hook::Xdp(XdpMode::Native);
    const GENERIC: Hook = Hook::Xdp(XdpMode::Generic);

    fn facts(wish: model::Hook, vpc: u16) -> Facts {
        Facts { wish, vpcs: [vpc].into(), stack: false, native: true, takes: true, unfit: None, veiled: None }
    }

    /// An ordinary veth, whose other end keeps its offloads.
    fn ordinary(vpc: u16) -> Facts {
        Facts { takes: false, unfit: Some("offloads".into()), ..facts(model::Hook::Auto, vpc) }
    }

    fn hooks(interfaces: &[(&str, Facts)], connections: &[(u16, u16)], has_tcx: bool) -> Vec<Hook> {
        let facts = interfaces.iter().map(|(name, facts)| ((*name).to_owned(), facts.clone())).collect();
        let both = connections.iter().flat_map(|(one, other)| [(*one, *other), (*other, *one)]).collect();
        let chosen = choose(&facts, &both, has_tcx);
        interfaces.iter().map(|(name, _)| chosen[*name].hook).collect()
    }

    #[test]
    fn each_gets_what_it_asks_for_where_nothing_is_lost_by_it() {
        use model::Hook::{Auto, Tcx, Xdp};
        let all = [("a", facts(Auto, 1)), ("b", facts(Xdp, 2)), ("c", facts(Tcx, 2)), ("d", facts(Auto, 3))];
        assert_eq!(hooks(&all, &[(1, 2), (3, 2)], true), [NATIVE, NATIVE, Hook::Tcx, NATIVE]);
    }

    #[test]
    fn whoever_can_send_to_one_that_does_not_hear_xdp_leaves_it_and_nobody_else() {
        let stack = |vpc| Facts { stack: true, ..facts(model::Hook::Auto, vpc) };
        let explicit = facts(model::Hook::Xdp, 3);
        let all = [
            ("ordinary", ordinary(2)),
            ("beside", facts(model::Hook::Auto, 2)),
            ("own-stack", stack(2)),
            ("consumer", facts(model::Hook::Auto, 1)),
            ("explicit", explicit),
            ("consumers-stack", stack(1)),
            ("far", facts(model::Hook::Auto, 4)),
        ];
        let tcx = Hook::Tcx;
        assert_eq!(
            hooks(&all, &[(1, 2), (3, 2), (1, 4)], true),
            [tcx, NATIVE, tcx, tcx, tcx, NATIVE, NATIVE]
        );
        assert_eq!(hooks(&all[..2], &[(2, 2)], true), [tcx, tcx], "a VPC that serves itself");
    }

    #[test]
    fn what_an_attachment_brings_to_endpoints_and_resolvers_may_be_sent_to_like_the_vpcs_own() {
        const ATTACHED: &str = r#"
[vpcs.shop]
account = "111122223333"
cidrs = ["10.0.0.0/16"]
interfaces = ["a"]
dns = { inbound = ["10.0.3.53"] }
[vpcs.payments]
account = "999900001111"
cidrs = ["10.0.0.0/16"]
interfaces = ["b"]
dns = true
[attachments.line]
kind = "vpn"
vpcs = ["shop"]
cidrs = ["172.16.0.0/16"]
interfaces = ["c"]
[target_groups.web]
vpc = "payments"
protocol = "tcp"
port = 80
[load_balancers.edge]
vpc = "payments"
addresses = { a = "10.0.1.10" }
listeners = [{ protocol = "tcp", port = 80, target_group = "web" }]
[endpoint_services.payments]
load_balancers = ["edge"]
[endpoints.shop]
vpc = "shop"
service = "payments"
addresses = { a = "10.0.9.9" }
"#;
        let model = model::parse(ATTACHED, "attached.toml").unwrap_or_default();
        let number = |name: &str| {
            ["shop", "payments", "line"].into_iter().zip(1..).find(|(it, _)| *it == name).map(|(_, it)| it)
        };
        assert_eq!(connections(&model, number), [(1, 2), (2, 1), (3, 2), (2, 3)].into());
        assert_eq!(heard(&model, number), [(1, [3].into())].into());
        let stack = Facts { stack: true, vpcs: [1, 3].into(), ..facts(model::Hook::Auto, 1) };
        let all = [("stack", stack), ("line", ordinary(3)), ("consumer", facts(model::Hook::Auto, 1))];
        assert_eq!(hooks(&all, &[], true), [Hook::Tcx, Hook::Tcx, NATIVE]);
    }

    #[test]
    fn a_trunk_whose_tags_xdp_may_not_see_has_tcx_and_one_of_many_vpcs_leaves_xdp_for_any_of_them() {
        use model::Hook::{Auto, Tcx, Xdp};
        let veiled = |wish| Facts { veiled: Some("offloads".into()), ..facts(wish, 1) };
        for has_tcx in [true, false] {
            for wish in [Auto, Xdp, Tcx] {
                assert_eq!(hooks(&[("a", veiled(wish))], &[], has_tcx), [Hook::Tcx], "{wish:?}");
            }
        }
        let trunk = Facts { vpcs: [0, 1, 3].into(), ..facts(Auto, 0) };
        let all = [("trunk", trunk), ("deaf", ordinary(2)), ("far", facts(Auto, 4))];
        assert_eq!(hooks(&all, &[(3, 2)], true), [Hook::Tcx, Hook::Tcx, NATIVE]);
        assert_eq!(hooks(&all, &[(4, 2)], true), [NATIVE, Hook::Tcx, Hook::Tcx]);
        let deaf = Facts { takes: false, ..all[0].1.clone() };
        assert_eq!(hooks(&[("trunk", deaf), ("far", facts(Auto, 4))], &[(4, 3)], true), [NATIVE, Hook::Tcx]);
    }

    #[test]
    fn a_kernel_without_tcx_runs_xdp_generically_where_it_must() {
        let bridge = Facts { native: false, takes: false, ..facts(model::Hook::Auto, 1) };
        let mut blind = ordinary(2);
        assert_eq!(
            hooks(&[("a", bridge.clone()), ("b", facts(model::Hook::Auto, 2))], &[(1, 2)], false),
            [GENERIC; 2]
        );
        blind.takes = true;
        assert_eq!(hooks(&[("b", blind)], &[], false), [NATIVE], "what it lacks is reported");
        assert_eq!(hooks(&[("a", Facts { wish: model::Hook::Xdp, ..bridge })], &[], true), [GENERIC]);
    }
}
