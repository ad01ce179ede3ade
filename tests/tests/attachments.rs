//! Attachments, on real traffic: clients of attached networks, and targets beyond them.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test: a panic with its place is what is wanted")]

use privatelink_tests::world::{CHECKED, UNCHECKED, World, config, eventually};

/// The usual configuration, where the VPC bank has addresses of its own.
fn apart(more: &str) -> String {
    let bank = "account = \"444455556666\"\ncidrs = [\"10.0.0.0/16\"]";
    let usual = config("", UNCHECKED);
    assert!(usual.contains(bank));
    let (before, after) = usual.split_once("[endpoints.bank]").unwrap();
    before.replace(bank, &bank.replace("10.0.", "10.1."))
        + "[endpoints.bank]"
        + &after.replace("10.0.9.9", "10.1.9.9")
        + more
}

fn fetch(world: &World, end: &str, url: &str, more: &str) -> bool {
    world.shell(end, &format!("curl -s --max-time 1 {more} {url} || true")).starts_with('t')
}

fn outside(world: &World, vpc: &str) -> u64 {
    world.state().get(&format!("{vpc} source_outside_vpc")).copied().unwrap_or_default()
}

#[test]
fn clients_of_a_peered_vpc_reach_the_endpoints_of_the_other_from_their_own_addresses_alone() {
    let mut world = World::new(&apart(""));
    world.serve("t1");
    world.serve("t2");
    world.shell(
        "cb",
        "ip addr flush dev eth0 && ip addr add 10.1.1.5/16 dev eth0 && ip addr add 172.16.0.5/32 dev eth0 && \
         ip route add 10.0.0.0/16 dev eth0",
    );
    assert!(fetch(&world, "cb", "http://10.1.9.9/", ""), "its own endpoint");
    assert!(!fetch(&world, "cb", "http://10.0.9.9/", ""), "nothing attaches the two yet");
    let peering = "[attachments.both]\nkind = \"peering\"\nvpcs = [\"shop\", \"bank\"]\n";
    let (code, said) = world.apply(&apart(peering));
    assert_eq!(code, Some(0), "{said}");
    // The client's kernel may still be about to give up its question before where that address is.
    eventually("the endpoint of the other VPC answers", || {
        fetch(&world, "cb", "http://10.0.9.9/", "").then_some(())
    });
    assert!(fetch(&world, "ca", "http://10.0.9.9/", ""), "whose own clients come in as before");
    let before = outside(&world, "bank");
    assert!(!fetch(&world, "cb", "http://10.0.9.9/", "--interface 172.16.0.5"));
    assert!(outside(&world, "bank") > before, "an address that is not the peer's");
    world.shell("cb", "ip addr add 10.0.1.77/32 dev eth0");
    let before = outside(&world, "bank");
    assert!(!fetch(&world, "cb", "http://10.0.9.9/", "--interface 10.0.1.77"));
    assert!(outside(&world, "bank") > before, "nor may it claim one of the VPC that it is attached to");
    world.apply(&apart(""));
    assert!(!fetch(&world, "cb", "http://10.0.9.9/", ""));
}

#[test]
fn clients_beyond_a_vpn_come_by_the_vpcs_own_interface_and_get_their_answers_by_it() {
    let mut world = World::new(&config("", UNCHECKED));
    world.serve("t1");
    world.serve("t2");
    world.shell("ca", "ip addr add 192.168.7.5/32 dev eth0");
    let office = "--interface 192.168.7.5";
    assert!(!fetch(&world, "ca", "http://10.0.9.9/", office));
    assert!(outside(&world, "shop") > 0);
    let vpn = "[attachments.office]\nkind = \"vpn\"\nvpcs = [\"shop\"]\ncidrs = [\"192.168.7.0/24\"]\n";
    world.apply(&(config("", UNCHECKED) + vpn));
    assert!(fetch(&world, "ca", "http://10.0.9.9/", office));
    world.shell("cb", "ip addr add 192.168.7.5/32 dev eth0");
    assert!(!fetch(&world, "cb", "http://10.0.9.9/", office), "the other tenant has no such attachment");
}

#[test]
fn an_attachment_with_an_interface_of_its_own_is_an_address_space_that_reaches_the_endpoints() {
    let usual = apart("");
    let (before, after) = usual.split_once("[vpcs.bank]").unwrap();
    let (_, after) = after.split_once("[vpcs.payments]").unwrap();
    let (after, _) = after.split_once("[endpoints.bank]").unwrap();
    let line = "[attachments.line]\nkind = \"direct_connect\"\nvpcs = [\"shop\"]\ncidrs = [\"172.16.0.0/16\"]\ninterfaces = [\"cb\"]\n";
    let mut world = World::new(&format!("{before}[vpcs.payments]{after}{line}"));
    world.serve("t1");
    world.serve("t2");
    world.shell(
        "cb",
        "ip addr flush dev eth0 && ip addr add 172.16.0.5/16 dev eth0 && ip route add 10.0.9.0/24 dev eth0",
    );
    assert!(fetch(&world, "cb", "http://10.0.9.9/", ""));
    assert!(fetch(&world, "ca", "http://10.0.9.9/", ""));
    let told = world.privatelink(&["explain", "--from", "line", "tcp", "172.16.0.5:4000", "10.0.9.9:80"]);
    let told = String::from_utf8_lossy(&told.stdout).into_owned();
    assert!(told.contains("10.0.9.9 is ours in line: yes, endpoint shop/a"), "{told}");
}

#[test]
fn targets_on_premises_are_reached_and_checked_by_the_gateway_of_the_attachment() {
    let targets =
        r#"targets = [{ address = "10.0.1.21", zone = "a" }, { address = "10.0.1.22", zone = "a" }]"#;
    let usual = config("", CHECKED);
    assert!(usual.contains(targets));
    let line = "[attachments.line]\nkind = \"direct_connect\"\nvpcs = [\"payments\"]\ncidrs = [\"172.16.0.0/16\"]\ngateway = \"10.0.1.22\"\n";
    let beyond = usual.replace(targets, r#"targets = [{ address = "172.16.0.5", zone = "a" }]"#) + line;
    let mut world = World::bare(&beyond);
    world.shell("t2", "ip addr add 172.16.0.5/32 dev lo && ip link set lo up");
    world.start(&[]);
    world.serve("t2");
    eventually("the target is healthy", || (world.json("targets")[0]["state"] == "healthy").then_some(()));
    assert!(fetch(&world, "ca", "http://10.0.9.9/", ""));
    assert!(fetch(&world, "cb", "http://10.0.9.9/", ""));
}
