//! When flows end.

use crate::memory::{CONFIG, Memory, RESET, interfaces, memory, on_the_host};
use privatelink::names::Names;
use privatelink::{model, plan};
use privatelink_common::tables::{Endpoint, Interface};
use privatelink_common::wire::Ipv4;

/// A packet of the one connection that the tests about time have.
pub(crate) fn segment(from: (Ipv4, u16), to: (Ipv4, u16), flags: &str) -> Vec<u8> {
    let builder =
        etherparse::PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]).ipv4(from.0, to.0, 64);
    let mut bytes = Vec::new();
    if flags == "udp" {
        builder.udp(from.1, to.1).write(&mut bytes, b"x").unwrap();
        return bytes;
    }
    let tcp = builder.tcp(from.1, to.1, 7, 100);
    let tcp = flags.chars().fold(tcp, |tcp, flag| match flag {
        'S' => tcp.syn(),
        'F' => tcp.fin(),
        'R' => tcp.rst(),
        _ => tcp.ack(3),
    });
    tcp.write(&mut bytes, &[]).unwrap();
    bytes
}

/// One packet: when, whether from the consumer, its flags, and what becomes of it.
type Step = (u32, bool, &'static str, u32);

/// The opening of a connection.
const OPEN: [Step; 3] = [(1000, true, "S", 4), (1000, false, "SA", 4), (1000, true, "A", 4)];

/// A connection through tables of its own.
struct Connection {
    memory: Memory,
    interfaces: Vec<Interface>,
    /// The target and the load balancer's address, as the first packet left.
    target: (Ipv4, u16),
    nat: (Ipv4, u16),
}

impl Connection {
    fn new() -> Self {
        let two = CONFIG.replace(", { address = \"10.0.1.23\", zone = \"a\" }", "");
        let model = model::parse(&two, "time.toml").unwrap();
        let image =
            plan::compile(&model, &mut Names::default(), &plan::Known::connected(&model), |_| "stack".into())
                .unwrap();
        let (interfaces, memory) = (interfaces(&image), memory(image));
        Self { memory, interfaces, target: ([0; 4], 0), nat: ([0; 4], 0) }
    }

    /// Sends packets, and checks what becomes of each.
    fn play(&mut self, steps: &[Step]) {
        let (client, endpoint) = (([10, 0, 1, 5], 1000), ([10, 0, 9, 9], 80));
        for (second, consumer, flags, expected) in steps {
            let (from, to) = if *consumer { (client, endpoint) } else { (self.target, self.nat) };
            self.memory.interface.set(self.interfaces[usize::from(!consumer)]);
            let (verdict, out) = on_the_host(&self.memory, &segment(from, to, flags), *second);
            assert_eq!(verdict, *expected, "{flags} at {second} s of {steps:?}");
            if *consumer && verdict == 4 {
                let port = |at: usize| u16::from_be_bytes([out[at], out[at + 1]]);
                self.nat = (out[26..30].try_into().unwrap(), port(34));
                self.target = (out[30..34].try_into().unwrap(), port(36));
            }
        }
    }

    /// Cuts every target's flows that were opened by a second.
    fn cut(&mut self, second: u32) {
        self.memory.image.targets.values_mut().for_each(|target| target.cut = second);
    }
}

/// Plays a connection.
fn play(steps: &[Step]) {
    Connection::new().play(steps);
}

fn play_after_opening(steps: &[Step]) {
    play(&[&OPEN[..], steps].concat());
}

#[test]
fn a_tcp_flow_that_idled_out_is_answered_with_a_reset_on_either_side() {
    play_after_opening(&[
        (1350, true, "A", 4),
        (1700, false, "A", 4),
        (2050, true, "A", 4),
        (2401, true, "A", RESET),
    ]);
    play_after_opening(&[(1351, false, "A", RESET), (1351, true, "A", RESET)]);
    // One direction that speaks is enough for both to live.
    play_after_opening(&[(1300, true, "A", 4), (1600, true, "A", 4), (1900, false, "A", 4)]);
}

#[test]
fn a_closed_flow_and_a_reset_one_are_kept_for_a_minute() {
    play_after_opening(&[
        (1001, true, "FA", 4),
        (1340, false, "A", 4),
        (1341, false, "FA", 4),
        (1402, true, "A", RESET),
    ]);
    play_after_opening(&[(1001, false, "RA", 4), (1001, true, "A", 4), (1062, true, "A", RESET)]);
    play_after_opening(&[
        (1001, true, "FA", 4),
        (1001, false, "FA", 4),
        (1002, true, "S", 4),
        (1002, false, "SA", 4),
    ]);
}

#[test]
fn a_handshake_may_be_repeated_crossed_or_begun_anew() {
    // Retransmissions, and a SYN whose client has chosen another initial sequence number: the path does not ask.
    play(&[
        (1000, true, "S", 4),
        (1001, true, "S", 4),
        (1001, false, "SA", 4),
        (1002, false, "SA", 4),
        (1002, true, "S", 4),
        (1002, true, "A", 4),
        (1003, false, "SA", 4),
        (1003, true, "A", 4),
    ]);
    // Simultaneous open (RFC 9293, 3.5): both send SYN, and both answer it.
    play(&[
        (1000, true, "S", 4),
        (1000, false, "S", 4),
        (1000, true, "SA", 4),
        (1000, false, "SA", 4),
        (1001, true, "A", 4),
    ]);
    // A connection to a port that its client has just used, closed or reset.
    let again = [(1002, true, "S", 4), (1002, false, "SA", 4), (1002, true, "A", 4), (1003, false, "A", 4)];
    play_after_opening(&[&[(1001, true, "FA", 4), (1001, false, "FA", 4)], &again[..]].concat());
    play_after_opening(&[&[(1001, true, "RA", 4)], &again[..]].concat());
}

#[test]
fn half_a_connection_carries_data_for_as_long_as_its_idle_timeout_allows_and_keepalives_keep_all_of_it() {
    play_after_opening(&[
        (1001, true, "FA", 4),
        (1340, false, "A", 4),
        (1600, true, "A", 4),
        (1900, false, "A", 4),
        (2200, false, "FA", 4),
    ]);
    let keepalives: Vec<Step> = (1..20).map(|turn| (1000 + turn * 300, turn % 2 == 0, "A", 4)).collect();
    play_after_opening(&keepalives);
}

#[test]
fn a_reset_that_one_side_contradicts_is_not_believed() {
    // Forged in the consumer's name: the consumer goes on, minutes later too.
    play_after_opening(&[
        (1001, true, "R", 4),
        (1004, true, "A", 4),
        (1300, true, "A", 4),
        (1600, false, "A", 4),
    ]);
    // Out of the target's window: the target goes on.
    play_after_opening(&[(1001, true, "RA", 4), (1003, false, "A", 4), (1350, true, "A", 4)]);
    // What was on its way contradicts nothing.
    play_after_opening(&[
        (1001, true, "RA", 4),
        (1001, false, "A", 4),
        (1002, false, "A", 4),
        (1063, false, "A", RESET),
    ]);
    // And a consumer that begins anew has believed it.
    play_after_opening(&[
        (1001, false, "RA", 4),
        (1001, true, "S", 4),
        (1001, false, "SA", 4),
        (1001, true, "A", 4),
    ]);
}

#[test]
fn a_handshake_that_takes_over_a_minute_is_forgotten_and_udp_lives_for_two() {
    play(&[(1000, true, "S", 4), (1060, false, "SA", 4), (1121, true, "A", RESET)]);
    play(&[
        (1000, true, "udp", 4),
        (1119, false, "udp", 4),
        (1239, true, "udp", 4),
        (1300, false, "udp", 4),
        (1421, false, "udp", 1),
    ]);
}

#[test]
fn a_cut_connection_is_reset_on_both_sides_until_the_consumer_opens_another() {
    let mut connection = Connection::new();
    connection.play(&OPEN);
    connection.cut(1000);
    connection.play(&[
        (1001, true, "A", RESET),
        (1001, true, "A", RESET),
        (1002, false, "A", RESET),
        (1003, false, "RA", 1),
        (1030, false, "FA", RESET),
        (1031, true, "S", 4),
        (1031, false, "SA", 4),
        (1031, true, "A", 4),
        (1033, true, "A", 4),
    ]);
    let mut connection = Connection::new();
    connection.cut(999);
    connection.play(&[&OPEN[..], &[(1005, true, "A", 4), (1006, false, "A", 4)]].concat());
}

#[test]
fn a_cut_flow_of_datagrams_goes_on_as_another_flow_and_its_old_target_is_not_heard() {
    let mut connection = Connection::new();
    connection.play(&[(1000, true, "udp", 4), (1000, false, "udp", 4)]);
    let old = (connection.target, connection.nat);
    connection.cut(1000);
    connection.play(&[(1001, true, "udp", 4), (1001, false, "udp", 4), (1003, true, "udp", 4)]);
    let flows = connection.memory.established.borrow();
    assert_eq!(flows.len(), 2, "the old flow is gone");
    assert!(flows.values().all(|flow| flow.get().opened == 1001), "{old:?}");
}

#[test]
fn a_closed_flow_keeps_its_port_for_as_long_as_the_load_balancer_says() {
    let mut connection = Connection::new();
    connection.memory.limits.set(Endpoint { hold: 5, ..Endpoint::default() });
    let close = [(1001, true, "FA", 4), (1001, false, "FA", 4)];
    connection.play(&[&OPEN[..], &close, &[(1005, true, "A", 4), (1011, true, "A", RESET)]].concat());
}

/// The rules that are set in place of whatever says otherwise.
fn rules(connection: &mut Connection, config: &str) {
    let model = model::parse(config, "rules.toml").unwrap();
    let known = plan::Known::connected(&model);
    let image = plan::compile(&model, &mut Names::default(), &known, |_| "stack".into()).unwrap();
    let old = &mut connection.memory.image;
    (old.rules_by_address, old.rules_by_port) = (image.rules_by_address, image.rules_by_port);
    (old.subnets, old.endpoints, old.listeners) = (image.subnets, image.endpoints, image.listeners);
}

/// Denies what the consumer's client gets from the endpoint.
const NOTHING_BACK: &str = r#"
[network_acls.clients]
vpc = "a"
subnets = ["10.0.1.0/24"]
ingress = [{ rule = 1, action = "deny", protocol = "tcp", ports = "1000", cidr = "10.0.9.0/24" }]
egress = [{ rule = 1, action = "allow", protocol = "all", cidr = "0.0.0.0/0" }]
"#;

#[test]
fn a_tracked_flow_survives_a_security_group_that_lets_nobody_in() {
    let mut connection = Connection::new();
    connection.play(&OPEN);
    let closed = CONFIG.replace("service = \"s\"\n", "service = \"s\"\nsecurity_groups = [\"none\"]\n");
    rules(&mut connection, &(closed + "[security_groups.none]\nvpc = \"a\"\ningress = []\n"));
    connection.play(&[(1001, true, "A", 4), (1001, false, "A", 4), (1400, true, "A", 1)]);
}

#[test]
fn a_network_acl_stops_the_flows_that_it_denies_within_a_second_and_lets_them_go_on_when_it_is_gone() {
    let mut connection = Connection::new();
    connection.play(&OPEN);
    connection.play(&[(1001, false, "A", 4)]);
    rules(&mut connection, &format!("{CONFIG}{NOTHING_BACK}"));
    connection.play(&[
        (1002, true, "A", 4),
        (1002, false, "A", 1),
        (1002, false, "A", 1),
        (1003, true, "A", 4),
    ]);
    rules(&mut connection, CONFIG);
    connection.play(&[(1004, false, "A", 4), (1004, true, "A", 4)]);
}

#[test]
fn a_network_acl_that_denies_the_way_back_stops_the_answer_to_the_first_packet() {
    let mut connection = Connection::new();
    rules(&mut connection, &format!("{CONFIG}{NOTHING_BACK}"));
    connection.play(&[(1000, true, "S", 4), (1000, false, "SA", 1)]);
}

#[test]
fn a_network_acl_of_the_providers_decides_about_what_goes_to_targets_and_what_comes_from_them() {
    let acl = |ingress: &str, egress: &str| {
        format!(
            "{CONFIG}[network_acls.targets]\nvpc = \"b\"\nsubnets = [\"10.0.1.16/28\"]\ningress = [{ingress}]\negress = [{egress}]\n"
        )
    };
    let to_targets =
        r#"{ rule = 1, action = "allow", protocol = "tcp", ports = "8080", cidr = "10.0.1.10" }"#;
    let from_targets =
        r#"{ rule = 1, action = "allow", protocol = "tcp", ports = "2048-65535", cidr = "10.0.1.10" }"#;
    let (open, lost) =
        ([(1000, true, "S", 4), (1000, false, "SA", 4)], [(1000, true, "S", 4), (1000, false, "SA", 1)]);
    for (ingress, egress, steps) in [
        (to_targets, from_targets, &open[..]),
        ("", from_targets, &[(1000, true, "S", 1)][..]),
        (to_targets, "", &lost[..]),
    ] {
        let mut connection = Connection::new();
        rules(&mut connection, &acl(ingress, egress));
        connection.play(steps);
    }
}
