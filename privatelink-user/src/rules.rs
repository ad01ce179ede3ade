//! Compiles sets of rules into what the path looks up: which rules an address matches, and which a protocol and a port match.

use crate::ip;
use crate::maps::{AddressRuleKey, PortRuleKey};
use crate::model::{Match, Model, NetworkAcl, SecurityGroup, Source};
use ipnet::IpNet;
use privatelink_common::limits::RULE_WORDS;
use privatelink_common::tables::{RuleAddress, RuleMask, RulePort, RulePorts};
use std::collections::{BTreeMap, BTreeSet};
use zerocopy::big_endian::{U16, U32};

/// One rule of a set; the first that matches decides, and where none does, the packet is denied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Whether it allows.
    pub allow: bool,
    /// Protocol and ports.
    pub what: Match,
    /// Where the other side is.
    pub networks: Vec<IpNet>,
    /// What the configuration calls it.
    pub said: String,
}

/// A set of rules, compiled.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Compiled {
    /// For `rules_by_address`.
    pub by_address: BTreeMap<AddressRuleKey, RuleMask>,
    /// For `rules_by_port`.
    pub by_port: BTreeMap<PortRuleKey, RulePorts>,
}

/// The rules of security groups, one after the other. `members`: whether groups as sources mean their members; to what comes from
/// another VPC they mean nothing, since an address there is not the one here.
pub fn of_groups(model: &Model, groups: &[String], members: bool) -> Vec<Line> {
    let of = |name: &String| -> Option<(String, &SecurityGroup)> {
        Some((name.clone(), model.security_groups.get(name)?))
    };
    let line = |name: &String, number: usize, rule: &crate::model::Rule| {
        let networks = rule.sources.iter().flat_map(|source| match source {
            Source::Network(network) => vec![*network],
            Source::Group(name) if members => {
                model.security_groups.get(name).map(|group| group.members.clone()).unwrap_or_default()
            }
            Source::Group(_) => Vec::new(),
        });
        let sources: Vec<_> = rule.sources.iter().map(ToString::to_string).collect();
        Line {
            allow: true,
            what: rule.what.clone(),
            networks: networks.collect(),
            said: format!(
                "security group {name}, rule {}: {} from {}",
                number + 1,
                rule.what,
                sources.join(", ")
            ),
        }
    };
    let rules = groups.iter().filter_map(of).flat_map(|(name, group)| {
        group
            .ingress
            .iter()
            .enumerate()
            .map(move |(number, rule)| line(&name, number, rule))
            .collect::<Vec<_>>()
    });
    rules.collect()
}

/// One direction of a network ACL.
pub fn of_acl(name: &str, acl: &NetworkAcl, ingress: bool) -> Vec<Line> {
    let (entries, direction, preposition) =
        if ingress { (&acl.ingress, "ingress", "from") } else { (&acl.egress, "egress", "to") };
    let line = |(number, entry): (&u32, &crate::model::Entry)| {
        let action = if entry.allow { "allow" } else { "deny" };
        Line {
            allow: entry.allow,
            what: entry.what.clone(),
            networks: vec![entry.cidr],
            said: format!(
                "network ACL {name}, {direction} rule {number}: {action} {} {preposition} {}",
                entry.what, entry.cidr
            ),
        }
    };
    entries.iter().map(line).collect()
}

fn set_bit(mask: &mut RuleMask, index: usize) {
    if let Some(word) = mask.get_mut(index / 64) {
        *word |= 1 << (index % 64);
    }
}

fn mask(lines: &[Line], matches: impl Fn(&Line) -> bool) -> RuleMask {
    let mut mask = [0; RULE_WORDS];
    lines
        .iter()
        .enumerate()
        .filter(|(_, line)| matches(line))
        .for_each(|(index, _)| set_bit(&mut mask, index));
    mask
}

/// Compiles a set, whose number is `set`.
pub fn compile(set: u32, lines: &[Line]) -> Compiled {
    let mut compiled = Compiled::default();
    let mut networks: BTreeSet<IpNet> = lines.iter().flat_map(|line| line.networks.iter().copied()).collect();
    // In the tables, IPv4 lies within ::/0, which says nothing about it.
    networks.insert(IpNet::new_assert(std::net::Ipv4Addr::UNSPECIFIED.into(), 0));
    for network in networks {
        let matched = mask(lines, |line| line.networks.iter().any(|it| it.contains(&network)));
        let of =
            RuleAddress { set: U32::new(set), address: ip::entry(network.network()).0, reserved: [0; 4] };
        let before = if network.network().is_ipv4() { 96 } else { 0 };
        let bits = 32 + before + u32::from(network.prefix_len());
        compiled.by_address.insert(AddressRuleKey { bits, of }, matched);
    }
    let allows = mask(lines, |line| line.allow);
    for protocol in [1, 6, 17, 58] {
        let about: Vec<_> =
            lines.iter().filter(|line| line.what.traffic.numbers().contains(&protocol)).collect();
        let mut starts: BTreeSet<u32> =
            about.iter().map(|line| u32::from(*line.what.ports.start())).collect();
        starts.extend(about.iter().map(|line| u32::from(*line.what.ports.end()) + 1));
        let ends = starts.iter().skip(1).map(|end| end - 1);
        for (from, to) in starts.iter().copied().zip(ends) {
            let matched = mask(lines, |line| {
                let ports = u32::from(*line.what.ports.start())..=u32::from(*line.what.ports.end());
                line.what.traffic.numbers().contains(&protocol) && ports.contains(&from)
            });
            if matched == [0; RULE_WORDS] {
                continue;
            }
            for (port, bits) in prefixes(from, to) {
                let of = RulePort { set: U32::new(set), protocol, reserved: 0, port: U16::new(port) };
                compiled
                    .by_port
                    .insert(PortRuleKey { bits: 48 + bits, of }, RulePorts { rules: matched, allows });
            }
        }
    }
    compiled
}

/// The fewest prefixes of 16 bits that cover the ports from one to another.
fn prefixes(mut from: u32, to: u32) -> Vec<(u16, u32)> {
    let mut prefixes = Vec::new();
    while from <= to {
        let mut size = if from == 0 { 1 << 16 } else { 1 << from.trailing_zeros().min(16) };
        while from + size - 1 > to {
            size /= 2;
        }
        #[allow(clippy::cast_possible_truncation, reason = "not above the last port")]
        prefixes.push((from as u16, 16 - size.trailing_zeros()));
        from += size;
    }
    prefixes
}
