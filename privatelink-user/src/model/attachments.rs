//! Attachments: which other networks reach a VPC's endpoints, and which ones a VPC's targets may be in.

use super::{Build, Model, Resolver, Vpc};
use crate::config::Fields;
use ipnet::IpNet;
use std::collections::BTreeSet;
use std::net::IpAddr;

/// What attaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachmentKind {
    /// Two VPCs with each other. It is not transitive.
    Peering,
    /// VPCs and networks, all with each other.
    TransitGateway,
    /// A network beyond a VPN.
    Vpn,
    /// A network beyond a line.
    DirectConnect,
}

impl AttachmentKind {
    const ALL: [Self; 4] = [Self::Peering, Self::TransitGateway, Self::Vpn, Self::DirectConnect];

    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Peering => "peering",
            Self::TransitGateway => "transit_gateway",
            Self::Vpn => "vpn",
            Self::DirectConnect => "direct_connect",
        }
    }
}

/// An attachment. One with interfaces of its own is an address space of its own, too: a [`Vpc`] of the same name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// What it is.
    pub kind: AttachmentKind,
    /// The VPCs that it attaches.
    pub vpcs: Vec<String>,
    /// The networks outside of this host that it leads to.
    pub cidrs: Vec<IpNet>,
    /// Whether these come by interfaces of its own, and not by those of the VPCs.
    pub own_interfaces: bool,
    /// The router in its one VPC behind which targets in these networks are.
    pub gateway: Option<IpAddr>,
}

impl Attachment {
    /// The address spaces whose clients it brings to each other's endpoints.
    fn spaces<'a>(&'a self, name: &'a String) -> impl Iterator<Item = &'a String> {
        self.vpcs.iter().chain(self.own_interfaces.then_some(name))
    }
}

impl Model {
    /// The other address spaces that reach a VPC's endpoints.
    pub fn reached_from(&self, vpc: &str) -> BTreeSet<String> {
        let of = self.attachments.iter().filter(|(_, it)| it.vpcs.iter().any(|it| it == vpc));
        of.flat_map(|(name, it)| it.spaces(name)).filter(|it| *it != vpc).cloned().collect()
    }

    /// The other address spaces whose clients ask a VPC's resolver at one of its addresses.
    pub fn asks(&self, vpc: &str, resolver: &Resolver, address: IpAddr) -> BTreeSet<String> {
        if resolver.inbound.contains(&address) { self.reached_from(vpc) } else { BTreeSet::new() }
    }

    /// The networks outside of a VPC whose packets come by its own interfaces.
    pub fn networks_beyond(&self, vpc: &str) -> impl Iterator<Item = IpNet> {
        let attached =
            move |it: &&super::Attachment| !it.own_interfaces && it.vpcs.iter().any(|it| it == vpc);
        self.attachments.values().filter(attached).flat_map(|it| it.cidrs.iter().copied())
    }

    /// The router that leads from a VPC to an address outside of it.
    pub fn gateway(&self, vpc: &str, address: IpAddr) -> Option<IpAddr> {
        let leads = |it: &&Attachment| {
            it.vpcs.iter().any(|it| it == vpc)
                && it.cidrs.iter().any(|cidr| cidr.contains(&address))
                && it.gateway.is_some_and(|gateway| gateway.is_ipv4() == address.is_ipv4())
        };
        self.attachments.values().find(leads)?.gateway
    }
}

impl Build<'_, '_> {
    pub(super) fn attachments(&mut self, root: &mut Fields<'_, '_>) {
        let mut told = BTreeSet::new();
        for (name, place, mut fields) in root.named(self.reader, "attachments") {
            let kind = fields.need(self.reader, "kind").and_then(|value| {
                let what = "a kind: peering, transit_gateway, vpn or direct_connect";
                let known = |text: &str| AttachmentKind::ALL.into_iter().find(|it| it.name() == text);
                self.reader.parsed(value, what, known)
            });
            let names = self.model.vpcs.keys().cloned().collect();
            let listed = fields.need(self.reader, "vpcs");
            let at = listed.map_or(place.clone(), |it| it.span());
            let mut vpcs: Vec<String> = Vec::new();
            for item in listed.map(|list| self.reader.list(list)).unwrap_or_default() {
                let Some(vpc) = self.reference(item, "VPC", &names) else { continue };
                if vpcs.contains(&vpc) {
                    self.reader.problem(item.span(), format!("\"{vpc}\" is there twice"), None);
                } else {
                    vpcs.push(vpc);
                }
            }
            let has_cidrs = fields.get("cidrs").map(|it| it.span());
            let cidrs = if has_cidrs.is_some() { self.cidrs(&mut fields) } else { Vec::new() };
            let own = fields.get("interfaces").map(|it| it.span());
            let interfaces = own.clone().map(|_| self.interfaces(&name, &mut fields));
            let only = if vpcs.len() == 1 { vpcs.first() } else { None };
            let gateway = fields.get("gateway");
            let address = gateway.and_then(|value| self.address(value, only));
            fields.finish(self.reader);
            let Some(kind) = kind else { continue };
            let is_peering = kind == AttachmentKind::Peering;
            let mut wrong =
                |span: std::ops::Range<usize>, message: String| self.reader.problem(span, message, None);
            if is_peering && vpcs.len() != 2 {
                wrong(at.clone(), "a peering attaches two VPCs".into());
            }
            if let Some(span) = has_cidrs.clone().filter(|_| is_peering) {
                wrong(span, "a peering leads to no network outside of its two VPCs".into());
            }
            if has_cidrs.is_none() && matches!(kind, AttachmentKind::Vpn | AttachmentKind::DirectConnect) {
                wrong(place.clone(), format!("\"cidrs\" is missing: a {} leads to networks", kind.name()));
            }
            if let Some(span) = own.clone().filter(|_| has_cidrs.is_none()) {
                wrong(span, "interfaces of its own need \"cidrs\": the networks that come by them".into());
            }
            if own.is_some() && self.model.vpcs.contains_key(&name) {
                wrong(place.clone(), format!("\"{name}\" is a VPC's name already"));
            }
            if let Some(value) = gateway.filter(|_| own.is_some() || vpcs.len() != 1 || cidrs.is_empty()) {
                let message =
                    "a gateway is that of one VPC, to networks that are reached by the VPC's own interfaces";
                wrong(value.span(), message.into());
            }
            let attachment =
                Attachment { kind, vpcs, cidrs, own_interfaces: own.is_some(), gateway: address };
            if let Some((interfaces, vlans)) = interfaces.filter(|_| !self.model.vpcs.contains_key(&name)) {
                let cidrs = attachment.cidrs.clone();
                self.model.vpcs.insert(
                    name.clone(),
                    Vpc { account: String::new(), cidrs, interfaces, vlans, dns: None },
                );
            }
            self.model.attachments.insert(name, attachment);
            self.disjoint(&at, &mut told);
        }
    }

    /// Whoever is attached to several networks can tell them apart. `told` is what has been said.
    fn disjoint(&mut self, at: &std::ops::Range<usize>, told: &mut BTreeSet<[(String, IpNet); 2]>) {
        for vpc in self.model.vpcs.keys() {
            let mut known: BTreeSet<(String, IpNet)> = BTreeSet::new();
            let mut add = |owner: &str, cidrs: &[IpNet]| {
                known.extend(cidrs.iter().map(|cidr| (owner.to_owned(), *cidr)));
            };
            let of = |name: &String| self.model.vpcs.get(name).map(|it| it.cidrs.clone()).unwrap_or_default();
            add(vpc, &of(vpc));
            for (name, attachment) in &self.model.attachments {
                if attachment.spaces(name).any(|it| it == vpc) {
                    attachment.vpcs.iter().for_each(|other| add(other, &of(other)));
                    add(name, &attachment.cidrs);
                }
            }
            let known: Vec<_> = known.into_iter().collect();
            for (index, one) in known.iter().enumerate() {
                for other in &known[index + 1..] {
                    let ((owner, cidr), (another, it)) = (one, other);
                    let overlap = owner != another && (it.contains(cidr) || cidr.contains(it));
                    if overlap && told.insert([one.clone(), other.clone()]) {
                        let message = format!(
                            "{cidr} of \"{owner}\" overlaps {it} of \"{another}\", so that \"{vpc}\" cannot tell them apart"
                        );
                        self.reader.problem(at.clone(), message, None);
                    }
                }
            }
        }
    }
}
