//! The configuration, impossible to get wrong: what is here refers to what exists, and lies where it may.

mod acceptance;
mod attachments;
mod balancers;
mod groups;
mod names;
mod rules;

use crate::config::{Fields, Problems, Reader, Value, nearest};
use crate::ip::Family;
use ipnet::IpNet;
use privatelink_common::limits::ENDPOINT_MTU;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Range;
use std::time::Duration;

pub use acceptance::{Acceptance, AutoAccept, EventType, Notification, Principal, Sink, account_of};
pub use attachments::{Attachment, AttachmentKind};
pub use balancers::{Listener, LoadBalancer};
pub use groups::{Attributes, CheckProtocol, HealthCheck, Minimum, Target, TargetGroup};
pub use names::{Dns, Forward, PrivateName, Resolver};
pub use rules::{Entry, Match, NetworkAcl, Rule, SecurityGroup, Source, Traffic};

/// A whole configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Model {
    /// Part of generated names.
    pub region: String,
    /// Whether the agent sets what XDP needs at the interfaces' other ends, where it can reach them.
    pub manage_peer_offloads: bool,
    /// Where packets are met, unless the VPC or the interface says otherwise.
    pub hook: Hook,
    /// When SYNs are answered with cookies.
    pub syn_cookies: SynCookies,
    /// What the VPCs' resolvers have in common.
    pub dns: Dns,
    /// Sizes of the tables.
    pub limits: Limits,
    /// By name.
    pub vpcs: BTreeMap<String, Vpc>,
    /// By name.
    pub attachments: BTreeMap<String, Attachment>,
    /// By name.
    pub security_groups: BTreeMap<String, SecurityGroup>,
    /// By name.
    pub network_acls: BTreeMap<String, NetworkAcl>,
    /// By name.
    pub target_groups: BTreeMap<String, TargetGroup>,
    /// By name.
    pub load_balancers: BTreeMap<String, LoadBalancer>,
    /// By name.
    pub services: BTreeMap<String, EndpointService>,
    /// By name.
    pub endpoints: BTreeMap<String, Endpoint>,
}

impl Model {
    /// The trunks, each with the hook that it is to have.
    pub fn trunks(&self) -> BTreeMap<&str, Hook> {
        let mut trunks = BTreeMap::new();
        for (vlan, hook) in self.vpcs.values().flat_map(|vpc| &vpc.vlans) {
            let own = self.vpcs.values().find_map(|vpc| vpc.interfaces.get(&vlan.trunk)).copied();
            let chosen = trunks.entry(vlan.trunk.as_str()).or_insert_with(|| own.unwrap_or_default());
            if *chosen == Hook::Auto {
                *chosen = *hook;
            }
        }
        trunks
    }
}

/// When SYNs to endpoints are answered with SYN cookies. One word for the whole host, since what a flood fills is the table of pending
/// flows, which all tenants share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SynCookies {
    /// Never.
    Off,
    /// Those of an endpoint that has more of them unconfirmed than its part of the pending flows.
    #[default]
    Auto,
    /// All of them.
    Always,
}

/// Sizes of the tables, in entries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Established flow entries; a flow has two.
    pub flows: u32,
    /// Pending flow entries; a flow has two.
    pub pending_flows: u32,
    /// The same of flows that are IPv6 on one side or on both.
    pub ipv6_flows: u32,
    /// Likewise.
    pub pending_ipv6_flows: u32,
    /// Endpoint addresses, and load balancer addresses.
    pub endpoints: u32,
    /// Targets.
    pub targets: u32,
    /// VPCs.
    pub vpcs: u32,
    /// Interfaces.
    pub interfaces: u32,
    /// Addresses of each other kind.
    pub addresses: u32,
    /// The kernel's interface indices must be below it.
    pub max_ifindex: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            flows: 1 << 20,
            pending_flows: 1 << 16,
            ipv6_flows: 1 << 18,
            pending_ipv6_flows: 1 << 15,
            endpoints: 4096,
            targets: 16384,
            vpcs: 1024,
            interfaces: 4096,
            addresses: 16384,
            max_ifindex: 65536,
        }
    }
}

/// A private address space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vpc {
    /// Twelve digits.
    pub account: String,
    /// Its networks, which do not overlap.
    pub cidrs: Vec<IpNet>,
    /// This host's ends of its interfaces, and where their packets are met.
    pub interfaces: BTreeMap<String, Hook>,
    /// Those that are tags on a trunk, and where the trunk's packets are met.
    pub vlans: BTreeMap<Vlan, Hook>,
    /// Its resolver, if it has one.
    pub dns: Option<Resolver>,
}

/// An interface that is tags on a trunk (IEEE 802.1Q).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Vlan {
    /// The trunk's name.
    pub trunk: String,
    /// The outer one of two tags, a service tag (802.1ad).
    pub service_vlan: Option<u16>,
    /// The inner tag, or the only one.
    pub vlan: u16,
}

impl fmt::Display for Vlan {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.service_vlan {
            Some(service) => write!(formatter, "{}@{service}.{}", self.trunk, self.vlan),
            None => write!(formatter, "{}@{}", self.trunk, self.vlan),
        }
    }
}

/// Where the packets of an interface are met.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Hook {
    /// Where nothing is lost, and XDP where it can be.
    #[default]
    Auto,
    /// XDP.
    Xdp,
    /// TCX.
    Tcx,
}

impl Hook {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Xdp => "xdp",
            Self::Tcx => "tcx",
        }
    }
}

/// The address of something in one zone: of either family, or one of each (AWS: `dualstack`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Addresses {
    /// Its IPv4 address.
    pub ipv4: Option<Ipv4Addr>,
    /// Its IPv6 address.
    pub ipv6: Option<Ipv6Addr>,
}

impl Addresses {
    /// Those that there are.
    pub fn iter(&self) -> impl Iterator<Item = IpAddr> + use<> {
        self.ipv4.map(IpAddr::V4).into_iter().chain(self.ipv6.map(IpAddr::V6))
    }

    /// The one of a family.
    pub fn of(&self, family: Family) -> Option<IpAddr> {
        self.iter().find(|address| Family::of(*address) == family)
    }

    /// The first one.
    pub fn first(&self) -> Option<IpAddr> {
        self.iter().next()
    }

    /// Which it has, by AWS's names (`IpAddressType`).
    pub fn kind(&self) -> &'static str {
        match (self.ipv4, self.ipv6) {
            (Some(_), Some(_)) => "dualstack",
            (_, Some(_)) => "ipv6",
            _ => "ipv4",
        }
    }

    /// Takes an address, unless there is one of its family.
    fn add(&mut self, address: IpAddr) -> bool {
        if self.of(Family::of(address)).is_some() {
            return false;
        }
        match address {
            IpAddr::V4(address) => self.ipv4 = Some(address),
            IpAddr::V6(address) => self.ipv6 = Some(address),
        }
        true
    }
}

/// Whether each has an address of a family, and there is one.
pub fn all_have<'a>(mut addresses: impl Iterator<Item = &'a Addresses>, family: Family) -> bool {
    addresses.all(|it| it.of(family).is_some())
}

/// Protocol of a listener or a target group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// Both, on one port.
    TcpUdp,
}

impl Protocol {
    /// IANA's numbers of it.
    pub fn numbers(self) -> &'static [u8] {
        match self {
            Self::Tcp => &[6],
            Self::Udp => &[17],
            Self::TcpUdp => &[6, 17],
        }
    }

    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::TcpUdp => "tcp_udp",
        }
    }
}

/// What a provider publishes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointService {
    /// The load balancers behind it.
    pub load_balancers: Vec<String>,
    /// Who may connect.
    pub allowed_principals: Vec<Principal>,
    /// How it treats them.
    pub acceptance: Acceptance,
    /// The families that endpoints may have addresses of.
    pub supported_ip_address_types: Vec<Family>,
    /// The name that it brings into consumers' VPCs, if any.
    pub private_name: Option<PrivateName>,
}

impl EndpointService {
    /// Whether whoever has this ARN may connect.
    pub fn permits(&self, arn: &str) -> bool {
        self.allowed_principals.iter().any(|principal| principal.covers(arn))
    }
}

/// What a consumer creates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The consumer's VPC.
    pub vpc: String,
    /// The service.
    pub service: String,
    /// Who created it: the ARN of somebody of the VPC's account.
    pub principal: String,
    /// Its address in each zone.
    pub addresses: BTreeMap<String, Addresses>,
    /// Whether it answers ICMP echo requests.
    pub ping: bool,
    /// How many flows each of its addresses may have; none: any number.
    pub max_flows: Option<u32>,
    /// How many new flows a second each of its addresses may open; 0: any number.
    pub new_flow_rate: u32,
    /// How many of these it may save up.
    pub new_flow_burst: u32,
    /// Largest IP packet that it carries, in bytes.
    pub mtu: u16,
    /// Whether it says by ICMP errors what it cannot forward.
    pub icmp_errors: bool,
    /// Whether its VPC knows the service by the name that it brings.
    pub private_dns_enabled: bool,
    /// The families of addresses that its names resolve to; none: all that it has.
    pub dns_record_ip_type: Option<Family>,
    /// Its security groups; none: any client of its VPC may come in.
    pub security_groups: Vec<String>,
}

impl Endpoint {
    /// The account that it belongs to.
    pub fn account(&self) -> &str {
        account_of(&self.principal)
    }
}

/// Reads a configuration; all of its problems at once.
pub fn parse(text: &str, file: &str) -> Result<Model, Problems> {
    let mut reader = Reader::new(file, text);
    let document = reader.document();
    let mut root = Fields::new(document.get_ref(), 0..0);
    let mut build = Build {
        reader: &mut reader,
        model: Model::default(),
        places: Vec::new(),
        trunks: BTreeMap::new(),
        owners: BTreeMap::new(),
        asked: Vec::new(),
        limits: 0..0,
    };
    build.top(&mut root);
    build.dns(&mut root);
    let resolvers = build.vpcs(&mut root);
    build.attachments(&mut root);
    build.security_groups(&mut root);
    build.resolvers(resolvers);
    build.network_acls(&mut root);
    build.target_groups(&mut root);
    build.load_balancers(&mut root);
    build.services(&mut root);
    build.endpoints(&mut root);
    build.name_servers();
    build.sizes();
    let model = build.model;
    root.finish(&mut reader);
    reader.finish(model)
}

fn account(text: &str) -> Option<String> {
    (text.len() == 12 && text.bytes().all(|b| b.is_ascii_digit())).then(|| text.to_owned())
}

/// Whether a network is one that hosts may have addresses of; of IPv6, global unicast or unique local.
fn is_private_or_global(cidr: &IpNet) -> bool {
    let IpNet::V6(net) = cidr else { return true };
    let [first, ..] = net.network().octets();
    first & 0xe0 == 0x20 && net.prefix_len() >= 3 || first & 0xfe == 0xfc && net.prefix_len() >= 7
}

/// An interface, as a VPC names it.
enum Place {
    Device(String),
    Vlan(Vlan),
}

impl Place {
    /// The device that its packets come by.
    fn device(&self) -> &str {
        match self {
            Self::Device(name) => name,
            Self::Vlan(vlan) => &vlan.trunk,
        }
    }

    /// As a sentence begins with it.
    fn called(&self) -> String {
        match self {
            Self::Device(name) => format!("the interface \"{name}\""),
            Self::Vlan(Vlan { trunk, service_vlan: None, vlan }) => format!("VLAN {vlan} of \"{trunk}\""),
            Self::Vlan(Vlan { trunk, service_vlan: Some(service), vlan }) => {
                format!("VLAN {vlan} in service VLAN {service} of \"{trunk}\"")
            }
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device(name) => formatter.write_str(name),
            Self::Vlan(vlan) => vlan.fmt(formatter),
        }
    }
}

/// Whether this may be a zone's name, which becomes the end of a DNS label that has 32 characters before it.
fn is_zone(text: &str) -> bool {
    let legal = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    (1..=31).contains(&text.len()) && text.chars().all(legal)
}

struct Build<'r, 't> {
    reader: &'r mut Reader<'t>,
    model: Model,
    /// Interfaces that are taken.
    places: Vec<(String, String)>,
    /// Hooks that a VPC asks for, by device.
    trunks: BTreeMap<String, (Hook, String)>,
    /// Addresses that are taken, and what for.
    owners: BTreeMap<(String, IpAddr), String>,
    /// Name servers and gateways that resolvers ask.
    asked: Vec<names::Asked>,
    /// Where the limits are set.
    limits: Range<usize>,
}

impl Build<'_, '_> {
    fn top(&mut self, root: &mut Fields<'_, '_>) {
        let legal = |text: &str| names::region(text);
        let what = "a region's name: 1 to 32 lower-case letters, digits and -";
        let region = root.get("region").and_then(|value| self.reader.parsed(value, what, legal));
        self.model.region = region.unwrap_or_else(|| "local-1".into());
        let manage = root.get("manage_peer_offloads").and_then(|value| self.reader.boolean(value));
        self.model.manage_peer_offloads = manage.unwrap_or(false);
        self.model.hook = self.hook(root).unwrap_or_default();
        let known = |text: &str| match text {
            "off" => Some(SynCookies::Off),
            "auto" => Some(SynCookies::Auto),
            "always" => Some(SynCookies::Always),
            _ => None,
        };
        let cookies = root.get("syn_cookies");
        let cookies = cookies.and_then(|value| self.reader.parsed(value, "off, auto or always", known));
        self.model.syn_cookies = cookies.unwrap_or_default();
        let Some(value) = root.get("limits") else { return };
        let Some(mut fields) = self.reader.table(value) else { return };
        self.limits = value.span();
        let limits = &mut self.model.limits;
        for (name, limit, most) in [
            ("flows", &mut limits.flows, 1 << 26),
            ("pending_flows", &mut limits.pending_flows, 1 << 24),
            ("ipv6_flows", &mut limits.ipv6_flows, 1 << 26),
            ("pending_ipv6_flows", &mut limits.pending_ipv6_flows, 1 << 24),
            ("endpoints", &mut limits.endpoints, 65534),
            ("targets", &mut limits.targets, 65534),
            ("vpcs", &mut limits.vpcs, 65534),
            ("interfaces", &mut limits.interfaces, 65534),
            ("addresses", &mut limits.addresses, 1 << 22),
            ("max_ifindex", &mut limits.max_ifindex, 1 << 24),
        ] {
            if let Some(number) = fields.get(name).and_then(|value| self.reader.number(value, 2..=most)) {
                *limit = number;
            }
        }
        fields.finish(self.reader);
    }

    /// The VPCs without their resolvers; returns what is written of these.
    fn vpcs<'v, 'a>(&mut self, root: &mut Fields<'v, 'a>) -> Vec<(String, &'v Value<'a>)> {
        let mut resolvers = Vec::new();
        for (name, place, mut fields) in root.named(self.reader, "vpcs") {
            let owner = fields.need(self.reader, "account");
            let owner =
                owner.and_then(|value| self.reader.parsed(value, "an account: twelve digits", account));
            let cidrs = self.cidrs(&mut fields);
            let (interfaces, vlans) = self.interfaces(&name, &mut fields);
            let dns = fields.get("dns");
            fields.finish(self.reader);
            if cidrs.is_empty() {
                self.reader.problem(place, format!("the VPC \"{name}\" has no CIDR"), None);
            }
            let vpc = Vpc { account: owner.unwrap_or_default(), cidrs, interfaces, vlans, dns: None };
            self.model.vpcs.insert(name.clone(), vpc);
            resolvers.extend(dns.map(|value| (name, value)));
        }
        resolvers
    }

    fn hook(&mut self, fields: &mut Fields<'_, '_>) -> Option<Hook> {
        let value = fields.get("hook")?;
        self.reader.parsed(value, "a hook: auto, xdp or tcx", |text| {
            [Hook::Auto, Hook::Xdp, Hook::Tcx].into_iter().find(|hook| hook.name() == text)
        })
    }

    fn cidrs(&mut self, fields: &mut Fields<'_, '_>) -> Vec<IpNet> {
        let mut cidrs: Vec<IpNet> = Vec::new();
        let Some(list) = fields.need(self.reader, "cidrs") else { return cidrs };
        for item in self.reader.list(list) {
            let parse = |text: &str| text.parse::<IpNet>().ok();
            let what = "a network such as 10.0.0.0/16 or fd00:1:2:3::/64";
            let Some(cidr) = self.reader.parsed(item, what, parse) else { continue };
            if !is_private_or_global(&cidr) {
                let message = format!("{cidr} is neither within 2000::/3 nor within fc00::/7");
                let help = "write a network of global unicast or unique local addresses";
                self.reader.problem(item.span(), message, Some(help.into()));
                continue;
            }
            if cidr.trunc() != cidr {
                let help = format!("write {}", cidr.trunc());
                self.reader.problem(item.span(), format!("{cidr} has bits beyond its prefix"), Some(help));
            }
            match cidrs.iter().find(|other| other.contains(&cidr) || cidr.contains(*other)) {
                Some(other) => self.reader.problem(item.span(), format!("{cidr} overlaps {other}"), None),
                None => cidrs.push(cidr),
            }
        }
        cidrs
    }

    fn interfaces(
        &mut self,
        vpc: &str,
        fields: &mut Fields<'_, '_>,
    ) -> (BTreeMap<String, Hook>, BTreeMap<Vlan, Hook>) {
        let (mut interfaces, mut vlans) = (BTreeMap::new(), BTreeMap::new());
        let usual = self.hook(fields).unwrap_or(self.model.hook);
        let Some(list) = fields.need(self.reader, "interfaces") else { return (interfaces, vlans) };
        for item in self.reader.list(list) {
            let Some((interface, hook)) = self.interface(item) else { continue };
            let (name, hook) = (interface.to_string(), hook.unwrap_or(usual));
            if let Some((_, owner)) = self.places.iter().find(|(taken, _)| *taken == name) {
                let message = format!("{} belongs to the VPC \"{owner}\" already", interface.called());
                self.reader.problem(item.span(), message, None);
                continue;
            }
            self.places.push((name, vpc.to_owned()));
            self.one_hook(item, interface.device(), hook, vpc);
            match interface {
                Place::Device(name) => drop(interfaces.insert(name, hook)),
                Place::Vlan(vlan) => drop(vlans.insert(vlan, hook)),
            }
        }
        (interfaces, vlans)
    }

    /// A device has one program, so that what is asked for it and for each of its VLANs is the same; `auto` leaves it to the others.
    fn one_hook(&mut self, item: &Value<'_>, device: &str, hook: Hook, vpc: &str) {
        if hook == Hook::Auto {
            return;
        }
        let (first, of) = self.trunks.entry(device.to_owned()).or_insert_with(|| (hook, vpc.to_owned()));
        if *first != hook {
            let message = format!(
                "the hook of \"{device}\" is {} here and {} for the VPC \"{of}\"",
                hook.name(),
                first.name()
            );
            let help = "a trunk and all of its VLANs have one hook";
            self.reader.problem(item.span(), message, Some(help.into()));
        }
    }

    /// An interface: its name, or a table with more about it.
    fn interface(&mut self, item: &Value<'_>) -> Option<(Place, Option<Hook>)> {
        if !item.get_ref().is_table() {
            return Some((Place::Device(self.interface_name(item)?), None));
        }
        let mut fields = self.reader.table(item)?;
        let of_trunk = ["trunk", "vlan", "service_vlan"].map(|name| fields.get(name).is_some());
        let place = if of_trunk.contains(&true) {
            self.vlan(&mut fields).map(Place::Vlan)
        } else {
            let name = fields.need(self.reader, "name");
            name.and_then(|value| self.interface_name(value)).map(Place::Device)
        };
        let hook = self.hook(&mut fields);
        fields.finish(self.reader);
        Some((place?, hook))
    }

    fn vlan(&mut self, fields: &mut Fields<'_, '_>) -> Option<Vlan> {
        let trunk = fields.need(self.reader, "trunk").and_then(|value| self.interface_name(value));
        let mut tag = |value: &Value<'_>| {
            // 0 and 4095 are not VLANs (IEEE 802.1Q, table 9-2).
            self.reader.number(value, 1..=4094).and_then(|number| u16::try_from(number).ok())
        };
        let service_vlan = fields.get("service_vlan").map(&mut tag);
        let vlan = fields.get("vlan").map(tag);
        if vlan.is_none() {
            fields.need(self.reader, "vlan");
        }
        Some(Vlan {
            trunk: trunk?,
            service_vlan: service_vlan.map_or(Some(None), |it| it.map(Some))?,
            vlan: vlan??,
        })
    }

    fn interface_name(&mut self, value: &Value<'_>) -> Option<String> {
        let legal = |text: &str| {
            let fits = !text.is_empty() && text.len() <= 15 && text != "." && text != "..";
            (fits && !text.contains(['/', ':', '@']) && !text.contains(char::is_whitespace))
                .then(|| text.to_owned())
        };
        self.reader.parsed(value, "an interface's name: 1 to 15 bytes", legal)
    }

    fn protocol(&mut self, value: &Value<'_>) -> Option<Protocol> {
        self.reader.parsed(value, "a protocol: tcp, udp or tcp_udp", |text| match text {
            "tcp" => Some(Protocol::Tcp),
            "udp" => Some(Protocol::Udp),
            "tcp_udp" => Some(Protocol::TcpUdp),
            _ => None,
        })
    }

    fn port(&mut self, value: &Value<'_>) -> Option<u16> {
        self.reader.number(value, 1..=65535).and_then(|port| u16::try_from(port).ok())
    }

    fn duration(&mut self, value: &Value<'_>, range: std::ops::RangeInclusive<u64>) -> Option<Duration> {
        let parse = |text: &str| humantime::parse_duration(text).ok();
        let duration = self.reader.parsed(value, "a duration such as 10s or 5m", parse)?;
        if duration.subsec_nanos() != 0 || !range.contains(&duration.as_secs()) {
            let message = format!("expected whole seconds from {}s to {}s", range.start(), range.end());
            self.reader.problem(value.span(), message, None);
            return None;
        }
        Some(duration)
    }

    /// A reference to something that exists.
    fn reference(&mut self, value: &Value<'_>, what: &str, names: &BTreeSet<String>) -> Option<String> {
        let name = self.reader.string(value)?;
        if !names.contains(&name) {
            let help = nearest(&name, names.iter().map(String::as_str));
            self.reader.problem(value.span(), format!("there is no {what} \"{name}\""), help);
            return None;
        }
        Some(name)
    }

    fn vpc_of(&mut self, fields: &mut Fields<'_, '_>) -> Option<String> {
        let names = self.model.vpcs.keys().cloned().collect();
        let value = fields.need(self.reader, "vpc")?;
        self.reference(value, "VPC", &names)
    }

    /// An address that a workload of the VPC could have.
    fn address(&mut self, value: &Value<'_>, vpc: Option<&String>) -> Option<IpAddr> {
        let address = self.reader.parsed(value, "an IPv4 or IPv6 address", |text| text.parse().ok())?;
        let Some((name, vpc)) = vpc.and_then(|name| self.model.vpcs.get_key_value(name)) else {
            return Some(address);
        };
        let Some(cidr) = vpc.cidrs.iter().find(|cidr| cidr.contains(&address)) else {
            let cidrs: Vec<_> = vpc.cidrs.iter().map(ToString::to_string).collect();
            let message = format!("{address} is outside the VPC \"{name}\" ({})", cidrs.join(", "));
            self.reader.problem(value.span(), message, None);
            return None;
        };
        let message = match cidr {
            IpNet::V4(net)
                if net.prefix_len() < 31
                    && [net.network(), net.broadcast()].map(IpAddr::V4).contains(&address) =>
            {
                format!("{address} is the network's or the broadcast address of {cidr}")
            }
            IpNet::V6(net) if net.prefix_len() < 127 && address == net.network() => {
                format!("{address} is the address of every router of {cidr} (RFC 4291, 2.6.1)")
            }
            _ => return Some(address),
        };
        self.reader.problem(value.span(), message, None);
        None
    }

    /// Takes an address for `what`; an address of a VPC has one owner.
    fn own(&mut self, span: Range<usize>, vpc: &str, address: IpAddr, what: String) {
        match self.owners.get(&(vpc.to_owned(), address)) {
            Some(owner) if *owner == what && what.starts_with("a target") => {}
            Some(owner) => {
                let message = format!("{address} belongs to {owner} already");
                self.reader.problem(span, message, None);
            }
            None => {
                self.owners.insert((vpc.to_owned(), address), what);
            }
        }
    }

    fn zone(&mut self, value: &Value<'_>) -> Option<String> {
        let legal = |text: &str| is_zone(text).then(|| text.to_owned());
        self.reader.parsed(value, "a zone's name: 1 to 31 letters, digits, - and _", legal)
    }

    /// An address for each zone, or one of each family; the same families in every zone.
    fn addresses(
        &mut self,
        fields: &mut Fields<'_, '_>,
        vpc: Option<&String>,
        what: &str,
    ) -> BTreeMap<String, Addresses> {
        let mut addresses = BTreeMap::<String, Addresses>::new();
        let Some(value) = fields.need(self.reader, "addresses") else { return addresses };
        let Some(pairs) = self.reader.table(value) else { return addresses };
        if pairs.pairs().next().is_none() {
            self.reader.problem(value.span(), "expected an address for at least one zone", None);
        }
        for (zone, place, value) in pairs.pairs() {
            if !is_zone(&zone) {
                let message = format!("\"{zone}\" is not a zone's name: 1 to 31 letters, digits, - and _");
                self.reader.problem(place, message, None);
            }
            let Some(here) = self.pair(value, vpc, &format!("{what} in zone \"{zone}\"")) else { continue };
            if let Some((other, first)) = addresses.iter().next()
                && first.kind() != here.kind()
            {
                let message =
                    format!("the zone \"{zone}\" is {}, but \"{other}\" is {}", here.kind(), first.kind());
                let help = "give every zone addresses of the same families";
                self.reader.problem(value.span(), message, Some(help.into()));
            }
            addresses.insert(zone, here);
        }
        addresses
    }

    /// One address, or a list of one of each family.
    fn pair(&mut self, value: &Value<'_>, vpc: Option<&String>, what: &str) -> Option<Addresses> {
        let items = if value.get_ref().is_array() { self.reader.list(value) } else { vec![value] };
        if items.is_empty() {
            self.reader.problem(value.span(), "expected an address, or one of each family", None);
        }
        let mut addresses = Addresses::default();
        for item in items {
            let Some(address) = self.address(item, vpc) else { continue };
            if let Some(vpc) = vpc {
                self.own(item.span(), vpc, address, what.to_owned());
            }
            if !addresses.add(address) {
                let message = format!(
                    "expected one address of each family: {address} is the second {} one",
                    Family::of(address)
                );
                self.reader.problem(item.span(), message, None);
            }
        }
        addresses.first().map(|_| addresses)
    }

    fn services(&mut self, root: &mut Fields<'_, '_>) {
        let mut used: BTreeMap<String, String> = BTreeMap::new();
        let names = self.model.load_balancers.keys().cloned().collect();
        for (name, _, mut fields) in root.named(self.reader, "endpoint_services") {
            let mut load_balancers = Vec::new();
            let listed = fields
                .need(self.reader, "load_balancers")
                .map(|list| self.reader.list(list))
                .unwrap_or_default();
            for item in listed {
                let Some(balancer) = self.reference(item, "load balancer", &names) else { continue };
                if let Some(other) = used.insert(balancer.clone(), name.clone()) {
                    let message =
                        format!("the load balancer \"{balancer}\" is behind the service \"{other}\" already");
                    self.reader.problem(item.span(), message, None);
                }
                load_balancers.push(balancer);
            }
            let acceptance = self.acceptance(&mut fields);
            let allowed_principals = self.principals(&mut fields);
            let supported_ip_address_types = self.supported(&mut fields, &load_balancers);
            let private_name = self.private_name(&mut fields);
            fields.finish(self.reader);
            let service = EndpointService {
                load_balancers,
                allowed_principals,
                acceptance,
                supported_ip_address_types,
                private_name,
            };
            self.model.services.insert(name, service);
        }
    }

    /// The families that a service's endpoints may have: those that all of its load balancers have in every zone (AWS:
    /// create-endpoint-service), and of these IPv4 unless it says otherwise.
    fn supported(&mut self, fields: &mut Fields<'_, '_>, load_balancers: &[String]) -> Vec<Family> {
        let Some(value) = fields.get("supported_ip_address_types") else { return vec![Family::Ipv4] };
        let mut supported = Vec::new();
        for item in self.reader.list(value) {
            let Some(family) =
                self.reader.parsed(item, "an IP address type: ipv4 or ipv6", Family::from_name)
            else {
                continue;
            };
            let without = load_balancers.iter().find(|name| {
                self.model
                    .load_balancers
                    .get(*name)
                    .is_some_and(|it| !all_have(it.addresses.values(), family))
            });
            if let Some(name) = without {
                let message = format!("the load balancer \"{name}\" has no {family} addresses");
                self.reader.problem(item.span(), message, None);
            }
            supported.push(family);
        }
        if supported.is_empty() {
            self.reader.problem(value.span(), "expected at least one of \"ipv4\" and \"ipv6\"", None);
        }
        supported
    }

    fn endpoints(&mut self, root: &mut Fields<'_, '_>) {
        let names = self.model.services.keys().cloned().collect();
        for (name, _, mut fields) in root.named(self.reader, "endpoints") {
            let vpc = self.vpc_of(&mut fields);
            let service = fields.need(self.reader, "service");
            let service = service.and_then(|value| self.reference(value, "endpoint service", &names));
            let at = fields.get("addresses").map(Value::span).unwrap_or_default();
            let addresses = self.addresses(&mut fields, vpc.as_ref(), &format!("the endpoint \"{name}\""));
            let principal = self.creator(&mut fields, vpc.as_ref());
            let ping = fields.get("ping").and_then(|value| self.reader.boolean(value)).unwrap_or(true);
            let icmp_errors =
                fields.get("icmp_errors").and_then(|value| self.reader.boolean(value)).unwrap_or(true);
            let mut amount =
                |name| fields.get(name).and_then(|value| self.reader.number(value, 1..=100_000_000));
            let max_flows = amount("max_flows");
            let new_flow_rate = amount("max_new_flows_per_second").unwrap_or(0);
            let new_flow_burst = amount("new_flow_burst").unwrap_or(new_flow_rate);
            let mtu = fields.get("mtu").and_then(|value| self.reader.number(value, 576..=65535));
            let mtu = mtu.and_then(|mtu| u16::try_from(mtu).ok()).unwrap_or(ENDPOINT_MTU);
            let security_groups = self.groups(&mut fields, vpc.as_ref());
            let (vpc, service) = (vpc.unwrap_or_default(), service.unwrap_or_default());
            let private_dns_enabled = self.private_dns_enabled(&mut fields, &vpc, &service);
            let dns_record_ip_type = self.record_type(&mut fields, &addresses);
            fields.finish(self.reader);
            self.zones(&service, &addresses, at);
            let endpoint = Endpoint {
                vpc,
                service,
                principal,
                addresses,
                ping,
                max_flows,
                new_flow_rate,
                new_flow_burst,
                mtu,
                icmp_errors,
                private_dns_enabled,
                dns_record_ip_type,
                security_groups,
            };
            self.model.endpoints.insert(name, endpoint);
        }
    }

    /// An endpoint has addresses only in zones that its service is in.
    fn zones(&mut self, service: &str, addresses: &BTreeMap<String, Addresses>, at: Range<usize>) {
        let Some(published) = self.model.services.get(service) else { return };
        let supported = &published.supported_ip_address_types;
        let has = |family: &Family| addresses.values().any(|it| it.of(*family).is_some());
        for family in Family::ALL.into_iter().filter(|it| has(it) && !supported.contains(it)) {
            let message = format!("the service \"{service}\" does not support {family} addresses");
            let help = format!("write supported_ip_address_types with \"{}\" at the service", family.name());
            self.reader.problem(at.clone(), message, Some(help));
        }
        let balancers =
            published.load_balancers.iter().filter_map(|name| self.model.load_balancers.get(name));
        let zones: BTreeSet<&str> =
            balancers.flat_map(|it| it.addresses.keys().map(String::as_str)).collect();
        for zone in addresses.keys().filter(|zone| !zones.contains(zone.as_str())) {
            let message = format!("the service \"{service}\" does not support the zone \"{zone}\"");
            self.reader.problem(at.clone(), message, nearest(zone, zones.iter().copied()));
        }
    }

    /// Every resource has room in its table.
    fn sizes(&mut self) {
        let model = &self.model;
        let sum = |lengths: &mut dyn Iterator<Item = usize>| lengths.sum::<usize>();
        let secondary = |it: &LoadBalancer| it.secondary_addresses.values().map(Vec::len).sum::<usize>();
        let first = |it: &BTreeMap<String, Addresses>| it.values().map(|it| it.iter().count()).sum::<usize>();
        let balancers =
            sum(&mut model.load_balancers.values().map(|it| first(&it.addresses) + secondary(it)));
        let own = |it: &LoadBalancer| if it.serves_own_vpc { first(&it.addresses) } else { 0 };
        let also = |vpc: &str| model.reached_from(vpc).len();
        let elsewhere = sum(&mut model.endpoints.values().map(|it| first(&it.addresses) * also(&it.vpc)));
        let endpoints = sum(&mut model.endpoints.values().map(|it| first(&it.addresses)))
            + sum(&mut model.load_balancers.values().map(own));
        let targets = sum(&mut model.target_groups.values().map(|it| it.targets.len()));
        // Each has its slot, and so has a trunk, which may be nobody's.
        let interfaces = self.places.len() + model.vpcs.len() + model.trunks().len();
        let resolvers = || model.vpcs.values().filter_map(|it| it.dns.as_ref());
        let resolving = sum(&mut resolvers().map(|it| it.every_address().count()));
        let servers = |it: &Resolver| it.rules.iter().map(|rule| rule.to.len()).sum::<usize>();
        let asked = sum(&mut resolvers().map(servers));
        let limits = &model.limits;
        let uses = [
            ("vpcs", model.vpcs.len() + 1, limits.vpcs),
            ("interfaces", interfaces + 1, limits.interfaces),
            ("endpoints", endpoints.max(balancers), limits.endpoints),
            ("targets", targets, limits.targets),
            (
                "addresses",
                (endpoints + elsewhere + balancers + resolving).max(targets + asked),
                limits.addresses,
            ),
        ];
        for (name, used, limit) in uses {
            if used > limit as usize {
                let message =
                    format!("the configuration needs room for {used} in limits.{name}, which is {limit}");
                self.reader.problem(self.limits.clone(), message, Some(format!("raise limits.{name}")));
            }
        }
    }
}
