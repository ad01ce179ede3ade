//! What real tools see of an endpoint as a hop: traceroutes, path MTUs, errors, fragments.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests: a panic with its place is what is wanted")]

use privatelink_tests::world::{UNCHECKED, World, config, dualstack, eventually};
use std::io::ErrorKind;
use std::net::UdpSocket;

/// A listener for datagrams at each of the ports that tracepath goes through.
fn ports(group: &str) -> String {
    (44444..44460)
        .map(|port| format!("{{ protocol = \"udp\", port = {port}, target_group = \"{group}\" }}, "))
        .collect()
}

/// The usual configuration with one target, and listeners for tracepath.
fn one_target() -> String {
    config("", UNCHECKED)
        .replace(r#", { address = "10.0.1.22", zone = "a" }"#, "")
        .replace("listeners = [", &format!("listeners = [{}", ports("web")))
}

#[test]
fn a_traceroute_shows_the_endpoint_and_then_the_target_behind_its_address() {
    let world = World::new(&one_target());
    let traced = world.shell("ca", "traceroute -n -T -p 80 -q 1 -w 2 -m 4 10.0.9.9");
    let hops: Vec<&str> = traced.lines().skip(1).filter_map(|line| line.split_whitespace().nth(1)).collect();
    assert_eq!(hops, ["10.0.9.9", "10.0.9.9"], "{traced}");
    let traced = world.shell("ca", "tracepath -n -m 4 -p 44444 10.0.9.9");
    assert!(traced.contains("reached") && traced.contains("pmtu 1500"), "{traced}");
    assert!(!traced.contains("10.0.1."), "nothing of the provider's network is shown: {traced}");
}

#[test]
fn a_traceroute_over_ipv6_shows_the_same_whichever_family_the_target_has() {
    for hook in ["xdp", "tcx"] {
        let config = dualstack(&format!("hook = \"{hook}\""), UNCHECKED)
            .replace(r#", { address = "10.0.1.22", zone = "a" }"#, "")
            .replace(r#", { address = "fd00::22", zone = "a" }"#, "")
            .replace("listeners = [", &format!("listeners = [{}", ports("web6")));
        let world = World::dualstack(&config, &["ca", "t1"]);
        // Port 80 leads to an IPv4 target, port 81 to an IPv6 one; nothing listens there.
        for port in [80, 81] {
            let traced = world.shell("ca", &format!("traceroute -6 -n -T -p {port} -q 1 -w 2 -m 4 fd00::99"));
            let hops: Vec<&str> =
                traced.lines().skip(1).filter_map(|line| line.split_whitespace().nth(1)).collect();
            assert_eq!(hops, ["fd00::99", "fd00::99"], "{hook} {port}: {traced}");
        }
        let traced = world.shell("ca", "tracepath -6 -n -m 4 -p 44444 fd00::99");
        assert!(traced.contains("reached") && traced.contains("pmtu 1500"), "{hook}: {traced}");
        assert!(!traced.contains("fd00::10") && !traced.contains("fd00::21"), "nor is that: {traced}");
    }
}

#[test]
fn a_client_learns_at_once_that_no_one_listens_at_a_datagrams_target() {
    let world = World::new(&one_target());
    let refused = world.thread("ca", || {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
        socket.connect("10.0.9.9:53").unwrap();
        socket.send(b"anyone?").unwrap();
        socket.recv(&mut [0; 16]).unwrap_err().kind()
    });
    assert_eq!(refused.join().unwrap(), ErrorKind::ConnectionRefused);
}

#[test]
fn a_transfer_survives_an_mtu_that_shrinks_below_what_it_has_agreed_on() {
    let mut world = World::new(&one_target());
    world.serve("t1");
    let whole = world.shell("t1", &format!("sha256sum < {}", world.dir.path().join("t1/large").display()));
    let line = "curl -sSf --max-time 100 --limit-rate 3M http://10.0.9.9/large | sha256sum";
    let transfer = world.beside("ca", "sh", &["-c", line]);
    eventually("the transfer runs", || {
        let flows = world.json("flows");
        (flows.as_array()?.iter().any(|it| it["state"] == "established")).then_some(())
    });
    world.shell("dp", "ip link set ca mtu 1300");
    world.shell("ca", "ip link set eth0 mtu 1300");
    eventually("the target has learnt the MTU from the load balancer", || {
        world.shell("t1", "ss -Htni sport = :8080").contains("pmtu:1300").then_some(())
    });
    let route = world.shell("t1", "ip route get 10.0.1.10");
    assert!(route.contains("mtu 1300"), "{route}");
    assert_eq!(transfer.join().unwrap(), whole);
    let counted = world.state();
    assert!(counted["payments fragmentation_needed"] > 0, "{counted:?}");
}

#[test]
fn answers_of_a_name_server_come_through_in_fragments() {
    let mut world = World::new(&one_target());
    let text = "x".repeat(250);
    let record = format!("--txt-record=large.test,{}", vec![text.as_str(); 15].join(","));
    world.spawn(
        "t1",
        "dnsmasq",
        &[
            "-k",
            "-p",
            "8080",
            "--no-resolv",
            "--no-hosts",
            "--edns-packet-max=4096",
            "--user=root",
            "--pid-file",
            "--conf-file=/dev/null",
            &record,
        ],
    );
    eventually("the name server listens", || {
        (!world.shell("t1", "ss -Hlun sport = :8080").is_empty()).then_some(())
    });
    for consumer in ["ca", "cb", "ca"] {
        let answer = world
            .shell(consumer, "dig +bufsize=4096 +ignore +tries=1 +time=5 @10.0.9.9 -p 53 large.test TXT");
        assert_eq!(answer.matches(text.as_str()).count(), 15, "{answer}");
        assert!(answer.contains("MSG SIZE  rcvd: 3"), "{answer}");
    }
    assert!(!world.json("drops").to_string().contains("fragment"), "{}", world.json("drops"));
}
