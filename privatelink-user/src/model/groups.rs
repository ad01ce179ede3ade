//! Target groups: their targets, their attributes by AWS's names, and how health is measured.

use super::{Build, Protocol};
use crate::config::{Fields, Value};
use crate::ip::Family;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::time::Duration;

/// A target group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetGroup {
    /// The VPC of its targets.
    pub vpc: String,
    /// Its protocol.
    pub protocol: Protocol,
    /// The family of its targets' addresses (AWS: `IpAddressType`).
    pub ip_address_type: Family,
    /// The port of targets that do not say theirs.
    pub port: u16,
    /// Its targets.
    pub targets: Vec<Target>,
    /// How their health is measured.
    pub health_check: HealthCheck,
    /// What else is set.
    pub attributes: Attributes,
}

/// A target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Its address.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
    /// Its zone.
    pub zone: String,
    /// Its share of new flows, relative to the others.
    pub weight: u16,
}

/// How health is measured (AWS: target-group-health-checks).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// Whether it is.
    pub enabled: bool,
    /// What a target has to do.
    pub protocol: CheckProtocol,
    /// The port; none: the target's own.
    pub port: Option<u16>,
    /// Time between checks.
    pub interval: Duration,
    /// Time for one check.
    pub timeout: Duration,
    /// Successes in a row that make a target healthy.
    pub healthy_threshold: u8,
    /// Failures in a row that make a target unhealthy.
    pub unhealthy_threshold: u8,
}

/// What a healthy target does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CheckProtocol {
    /// It accepts a connection.
    Tcp,
    /// It answers a GET request.
    Http {
        /// Over TLS; its certificate is not verified.
        tls: bool,
        /// What is asked for.
        path: String,
        /// Status codes of success.
        matcher: Vec<RangeInclusive<u16>>,
    },
}

/// Attributes of a target group (AWS: edit-target-group-attributes, target-group-health).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// `deregistration_delay.timeout_seconds`: how long a deregistered target's flows may go on.
    pub deregistration_delay: Duration,
    /// `deregistration_delay.connection_termination.enabled`: whether they are cut at the end of it.
    pub cut_deregistered: bool,
    /// `target_health_state.unhealthy.connection_termination.enabled`: whether an unhealthy target's flows are cut.
    pub cut_unhealthy: bool,
    /// `target_health_state.unhealthy.draining_interval_seconds`: where they are not cut at once, when they are; zero: never.
    pub unhealthy_draining: Duration,
    /// `stickiness.enabled`: whether all flows of one source address go to one target.
    pub sticky: bool,
    /// `preserve_client_ip.enabled`: whether targets see the addresses of clients in the load balancer's own VPC.
    pub preserve_client_ip: bool,
    /// `proxy_protocol_v2.enabled`: whether targets are told who the client is.
    pub proxied: bool,
    /// `target_group_health.unhealthy_state_routing.minimum_healthy_targets`: with fewer, all targets get new flows.
    pub routing: Minimum,
    /// `target_group_health.dns_failover.minimum_healthy_targets`: with fewer, the zone is withdrawn from names.
    pub dns_failover: Minimum,
    /// `load_balancing.cross_zone.enabled`; none: as the load balancer has it.
    pub cross_zone: Option<bool>,
    /// `slow_start.duration_seconds`: how long a target that has become healthy takes to get its whole share; zero: no time.
    pub slow_start: Duration,
}

impl Attributes {
    /// AWS's defaults, which for what is deregistered depend on the protocol.
    fn default_for(protocol: Protocol) -> Self {
        Self {
            deregistration_delay: Duration::from_secs(300),
            cut_deregistered: protocol != Protocol::Tcp,
            cut_unhealthy: true,
            unhealthy_draining: Duration::ZERO,
            sticky: false,
            preserve_client_ip: protocol != Protocol::Tcp,
            proxied: false,
            routing: Minimum::default(),
            dns_failover: Minimum::default(),
            cross_zone: None,
            slow_start: Duration::ZERO,
        }
    }
}

/// How many healthy targets are enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Minimum {
    /// `count`.
    pub count: u32,
    /// `percentage` of all; none: off.
    pub percentage: Option<u32>,
}

impl Default for Minimum {
    fn default() -> Self {
        Self { count: 1, percentage: None }
    }
}

impl Minimum {
    /// Whether so many healthy targets of so many are enough.
    pub fn are_enough(&self, healthy: usize, all: usize) -> bool {
        let percent = self.percentage.unwrap_or(0) as usize;
        healthy >= self.count as usize && healthy * 100 >= percent * all
    }
}

/// A path of an HTTP request: what may stand in a request's first line.
fn path(text: &str) -> Option<String> {
    let legal = |byte: u8| byte.is_ascii_graphic();
    (text.starts_with('/') && text.len() <= 1024 && text.bytes().all(legal)).then(|| text.to_owned())
}

/// `200`, `200-299` or several of them with commas.
fn matcher(text: &str) -> Option<Vec<RangeInclusive<u16>>> {
    let code = |text: &str| text.trim().parse().ok().filter(|code| (200..=599).contains(code));
    let range = |part: &str| match part.split_once('-') {
        Some((from, to)) => Some(code(from)?..=code(to)?).filter(|range| !range.is_empty()),
        None => code(part).map(|code| code..=code),
    };
    text.split(',').map(range).collect()
}

impl Build<'_, '_> {
    pub(super) fn target_groups(&mut self, root: &mut Fields<'_, '_>) {
        for (name, _, mut fields) in root.named(self.reader, "target_groups") {
            let vpc = self.vpc_of(&mut fields);
            let protocol = fields.need(self.reader, "protocol").and_then(|value| self.protocol(value));
            let port = fields.need(self.reader, "port").and_then(|value| self.port(value));
            let family = fields.get("ip_address_type");
            let family = family.and_then(|value| {
                self.reader.parsed(value, "an IP address type: ipv4 or ipv6", Family::from_name)
            });
            let ip_address_type = family.unwrap_or(Family::Ipv4);
            let health_check = self.health_check(&mut fields);
            let mut targets: Vec<Target> = Vec::new();
            let listed = fields.get("targets").map(|list| self.reader.list(list)).unwrap_or_default();
            for item in listed {
                let Some(target) = self.target(item, vpc.as_ref(), port) else { continue };
                let family = Family::of(target.address);
                if family != ip_address_type {
                    let message = format!(
                        "{} is {family}, but the targets of this group are {ip_address_type}",
                        target.address
                    );
                    let help = format!(
                        "write ip_address_type = \"{}\", or put it into a group of its own",
                        family.name()
                    );
                    self.reader.problem(item.span(), message, Some(help));
                }
                if targets.iter().any(|other| (other.address, other.port) == (target.address, target.port)) {
                    let message =
                        format!("{} is in this group already", SocketAddr::new(target.address, target.port));
                    self.reader.problem(item.span(), message, None);
                    continue;
                }
                targets.push(target);
            }
            let (vpc, protocol, port) =
                (vpc.unwrap_or_default(), protocol.unwrap_or(Protocol::Tcp), port.unwrap_or(1));
            let attributes = self.attributes(protocol, &mut fields);
            fields.finish(self.reader);
            let group =
                TargetGroup { vpc, protocol, ip_address_type, port, targets, health_check, attributes };
            self.model.target_groups.insert(name, group);
        }
    }

    fn target(&mut self, item: &Value<'_>, vpc: Option<&String>, default: Option<u16>) -> Option<Target> {
        let mut fields = self.reader.table(item)?;
        let at = fields.need(self.reader, "address");
        let address = at.and_then(|value| self.target_address(value, vpc));
        let zone = fields.need(self.reader, "zone").and_then(|value| self.zone(value));
        let port = fields.get("port").and_then(|value| self.port(value)).or(default);
        let weight = fields.get("weight").and_then(|value| self.reader.number(value, 1..=1000)).unwrap_or(1);
        fields.finish(self.reader);
        if let (Some(at), Some(address), Some(vpc)) = (at, address, vpc) {
            self.own(at.span(), vpc, address, "a target".into());
        }
        Some(Target { address: address?, port: port?, zone: zone?, weight: u16::try_from(weight).ok()? })
    }

    /// An address in the group's VPC, or in a network that an attachment of the VPC leads to by a gateway.
    fn target_address(&mut self, value: &Value<'_>, vpc: Option<&String>) -> Option<IpAddr> {
        let beyond = value.get_ref().as_str().and_then(|text| text.parse().ok());
        if let (Some(vpc), Some(address)) = (vpc, beyond)
            && self.model.gateway(vpc, address).is_some()
        {
            return Some(address);
        }
        self.address(value, vpc)
    }

    fn health_check(&mut self, fields: &mut Fields<'_, '_>) -> HealthCheck {
        let mut check = HealthCheck {
            enabled: true,
            protocol: CheckProtocol::Tcp,
            port: None,
            interval: Duration::from_secs(30),
            timeout: Duration::from_secs(10),
            healthy_threshold: 5,
            unhealthy_threshold: 2,
        };
        let Some(value) = fields.get("health_check") else { return check };
        let Some(mut fields) = self.reader.table(value) else { return check };
        check.protocol = self.check_protocol(&mut fields);
        if matches!(check.protocol, CheckProtocol::Http { tls: false, .. }) {
            check.timeout = Duration::from_secs(6);
        }
        check.enabled = fields.get("enabled").and_then(|value| self.reader.boolean(value)).unwrap_or(true);
        check.port = fields.get("port").and_then(|value| self.port(value));
        if let Some(interval) = fields.get("interval").and_then(|value| self.duration(value, 5..=300)) {
            check.interval = interval;
            check.timeout = check.timeout.min(interval);
        }
        if let Some(value) = fields.get("timeout")
            && let Some(timeout) = self.duration(value, 2..=120)
        {
            check.timeout = timeout;
            if timeout > check.interval {
                self.reader.problem(value.span(), "the timeout is longer than the interval", None);
            }
        }
        for (name, threshold) in [
            ("healthy_threshold", &mut check.healthy_threshold),
            ("unhealthy_threshold", &mut check.unhealthy_threshold),
        ] {
            if let Some(number) = fields.get(name).and_then(|value| self.reader.number(value, 2..=10)) {
                *threshold = u8::try_from(number).unwrap_or(*threshold);
            }
        }
        fields.finish(self.reader);
        check
    }

    fn check_protocol(&mut self, fields: &mut Fields<'_, '_>) -> CheckProtocol {
        let known = |text: &str| ["tcp", "http", "https"].contains(&text).then(|| text.to_owned());
        let protocol = fields.get("protocol").and_then(|value| {
            self.reader.parsed(value, "a health check's protocol: tcp, http or https", known)
        });
        let (asked, accepted) = (fields.get("path"), fields.get("matcher"));
        let what = "a path: up to 1024 printable characters, of which / is the first";
        let asked_path = asked.and_then(|value| self.reader.parsed(value, what, path));
        let what = "a list of status codes from 200 to 599, such as 200,204 or 200-399";
        let codes = accepted.and_then(|value| self.reader.parsed(value, what, matcher));
        match protocol.as_deref() {
            Some(protocol @ ("http" | "https")) => CheckProtocol::Http {
                tls: protocol == "https",
                path: asked_path.unwrap_or_else(|| "/".into()),
                matcher: codes.unwrap_or_else(|| vec![200..=399]),
            },
            _ => {
                for value in [asked, accepted].into_iter().flatten() {
                    let help = Some("write protocol = \"http\" or \"https\" beside it".into());
                    self.reader.problem(value.span(), "a TCP check sends no request", help);
                }
                CheckProtocol::Tcp
            }
        }
    }

    fn attributes(&mut self, protocol: Protocol, fields: &mut Fields<'_, '_>) -> Attributes {
        let mut it = Attributes::default_for(protocol);
        self.group(fields, "deregistration_delay", |build, fields| {
            build.seconds(fields, "timeout_seconds", 0..=3600, &mut it.deregistration_delay);
            build.group(fields, "connection_termination", |build, fields| {
                build.switch(fields, "enabled", &mut it.cut_deregistered);
            });
        });
        self.group(fields, "target_health_state", |build, fields| {
            build.group(fields, "unhealthy", |build, fields| {
                build.group(fields, "connection_termination", |build, fields| {
                    build.switch(fields, "enabled", &mut it.cut_unhealthy);
                });
                let at = fields.get("draining_interval_seconds").map(Value::span);
                build.seconds(fields, "draining_interval_seconds", 0..=360_000, &mut it.unhealthy_draining);
                if let Some(at) = at.filter(|_| it.cut_unhealthy && !it.unhealthy_draining.is_zero()) {
                    let help = "write connection_termination.enabled = false beside it";
                    let message = "an unhealthy target drains only where its flows are not cut at once";
                    build.reader.problem(at, message, Some(help.into()));
                }
            });
        });
        self.group(fields, "target_group_health", |build, fields| {
            build.minimum(fields, "unhealthy_state_routing", &mut it.routing);
            // No name leads to a zone that is failing open, unless all do (AWS: target-group-health).
            it.dns_failover = it.routing;
            let at = fields.get("dns_failover").map(Value::span);
            build.minimum(fields, "dns_failover", &mut it.dns_failover);
            let (names, routing) = (it.dns_failover, it.routing);
            if let Some(at) =
                at.filter(|_| names.count < routing.count || names.percentage < routing.percentage)
            {
                let message = "dns_failover wants fewer healthy targets than unhealthy_state_routing";
                build.reader.problem(at, message, Some("write as many, or more".into()));
            }
        });
        self.group(fields, "load_balancing", |build, fields| {
            build.group(fields, "cross_zone", |build, fields| it.cross_zone = build.cross_zone(fields));
        });
        self.group(fields, "stickiness", |build, fields| {
            build.switch(fields, "enabled", &mut it.sticky);
            if let Some(value) = fields.get("type") {
                let known = |text: &str| (text == "source_ip").then_some(());
                build.reader.parsed(value, "a kind of stickiness: source_ip", known);
            }
        });
        self.group(fields, "preserve_client_ip", |build, fields| {
            build.switch(fields, "enabled", &mut it.preserve_client_ip);
        });
        self.group(fields, "proxy_protocol_v2", |build, fields| {
            build.switch(fields, "enabled", &mut it.proxied);
        });
        self.group(fields, "slow_start", |build, fields| {
            build.seconds(fields, "duration_seconds", 0..=900, &mut it.slow_start);
        });
        it
    }

    /// A table that may be missing, and whose fields `read` takes.
    fn group(
        &mut self,
        fields: &mut Fields<'_, '_>,
        name: &'static str,
        read: impl FnOnce(&mut Self, &mut Fields<'_, '_>),
    ) {
        let Some(value) = fields.get(name) else { return };
        let Some(mut below) = self.reader.table(value) else { return };
        read(self, &mut below);
        below.finish(self.reader);
    }

    fn minimum(&mut self, fields: &mut Fields<'_, '_>, name: &'static str, to: &mut Minimum) {
        self.group(fields, name, |build, fields| {
            build.group(fields, "minimum_healthy_targets", |build, fields| {
                build.amount(fields, "count", 1..=65535, |count| to.count = count);
                build.amount(fields, "percentage", 1..=100, |part| to.percentage = Some(part));
            });
        });
    }

    fn amount(
        &mut self,
        fields: &mut Fields<'_, '_>,
        name: &'static str,
        range: RangeInclusive<u32>,
        set: impl FnOnce(u32),
    ) {
        if let Some(number) = fields.get(name).and_then(|value| self.reader.number(value, range)) {
            set(number);
        }
    }

    fn seconds(
        &mut self,
        fields: &mut Fields<'_, '_>,
        name: &'static str,
        range: RangeInclusive<u32>,
        to: &mut Duration,
    ) {
        self.amount(fields, name, range, |seconds| *to = Duration::from_secs(seconds.into()));
    }

    fn switch(&mut self, fields: &mut Fields<'_, '_>, name: &'static str, to: &mut bool) {
        *to = fields.get(name).and_then(|value| self.reader.boolean(value)).unwrap_or(*to);
    }

    fn cross_zone(&mut self, fields: &mut Fields<'_, '_>) -> Option<bool> {
        let value = fields.get("enabled")?;
        if value.get_ref().as_str() == Some("use_load_balancer_configuration") {
            return None;
        }
        self.reader.boolean(value)
    }
}
