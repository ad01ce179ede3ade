//! What becomes of the programs' links when others hold interfaces, rename them, take programs away, or have left things behind.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests: a panic with its place is what is wanted")]

use privatelink_tests::capture::{Capture, is_as_before, is_captured};
use privatelink_tests::world::{CHECKED, UNCHECKED, World, config, eventually};
use serde_json::Value;
use std::io::BufRead;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// What goes before the usual configuration's tables, for all interfaces to have one hook, and what its links' pins end with.
const HOOKS: [(&str, &str); 2] = [("hook = \"xdp\"\n", ""), ("hook = \"tcx\"\n", ":tcx")];

fn served(config: &str) -> World {
    let mut world = World::new(config);
    world.serve("t1");
    world.serve("t2");
    world
}

fn row(world: &World, interface: &str) -> Value {
    let status = world.json("status");
    let rows = status[0]["interfaces"].as_array().unwrap();
    rows.iter().find(|row| row["interface"] == interface).unwrap().clone()
}

/// Waits until an interface is attached, and is what the kernel has by this index.
fn attached(world: &World, interface: &str, ifindex: u64) {
    eventually(&format!("{interface} is attached as {ifindex}"), || {
        let row = row(world, interface);
        (row["state"] == "attached" && row["hook"].is_string() && row["ifindex"] == ifindex).then_some(())
    });
}

fn ifindex(world: &World, interface: &str) -> u64 {
    row(world, interface)["ifindex"].as_u64().unwrap()
}

fn pin(world: &World, interface: &str, suffix: &str) -> PathBuf {
    world.pins().join("links").join(format!("{interface}{suffix}"))
}

fn pins(world: &World) -> usize {
    std::fs::read_dir(world.pins().join("links")).unwrap().count()
}

fn new_flows(world: &World, endpoint: &str) -> u64 {
    let rows = world.json("endpoints");
    let row = rows.as_array().unwrap().iter().find(|row| row["endpoint"] == endpoint).unwrap();
    row["new_flows"].as_u64().unwrap()
}

#[test]
fn an_interface_that_another_xdp_program_held_is_attached_when_that_is_gone_and_named_once_meanwhile() {
    let world = served(&config(HOOKS[0].0, UNCHECKED));
    let index = ifindex(&world, "ca");
    world.shell("dp", "ip link set ca name away");
    eventually("it is missed", || (row(&world, "ca")["state"] == "waiting").then_some(()));
    let (link, program) = (pin(&world, "ca", ""), world.pins().join("programs/ingress"));
    world.shell("dp", &format!("bpftool link detach pinned {}", link.display()));
    let hold = format!("bpftool net attach xdpdrv pinned {} dev away", program.display());
    world.shell("dp", &format!("{hold} && ip link set away name ca"));
    eventually("what is in the way is shown", || {
        row(&world, "ca")["problem"].as_str()?.contains("another XDP program is attached to ca").then_some(())
    });
    world.shell("dp", "bpftool net detach xdpdrv dev ca");
    attached(&world, "ca", index);
    assert!(!world.fetch("ca", "").is_empty());
    assert_eq!(world.said().matches("another XDP program").count(), 1, "{}", world.said());
}

#[test]
fn interfaces_that_take_each_others_names_while_they_are_up_are_attached_as_what_they_are_called() {
    for (hook, suffix) in HOOKS {
        let world = served(&config(hook, UNCHECKED));
        let [shop, bank] = ["ca", "cb"].map(|name| ifindex(&world, name));
        let links = pins(&world);
        assert!(!world.fetch("ca", "").is_empty());
        world.shell(
            "dp",
            "ip link set dev ca name swap && ip link set dev cb name ca && ip link set dev swap name cb",
        );
        attached(&world, "ca", bank);
        attached(&world, "cb", shop);
        let before = new_flows(&world, "bank");
        assert!(!world.fetch("ca", "").is_empty(), "what was the shop's is the bank's");
        assert_eq!(new_flows(&world, "bank"), before + 1);
        assert!(!world.fetch("cb", "").is_empty());
        assert!(pin(&world, "ca", suffix).exists() && pins(&world) == links, "one link for each");
        // The name that it had is nobody's.
        world.shell("dp", "ip link del cb && ip link set dev ca name cb");
        attached(&world, "cb", bank);
        assert!(!world.fetch("cb", "").is_empty());
        assert_eq!(pins(&world), links - 1);
    }
}

#[test]
fn a_program_that_someone_takes_off_an_interface_is_missed_and_put_there_again() {
    for (hook, suffix) in HOOKS {
        let world = served(&config(hook, UNCHECKED));
        let (index, links) = (ifindex(&world, "ca"), pins(&world));
        for line in ["bpftool link detach pinned", "rm"] {
            let before = world.said().lines().count();
            world.shell("dp", &format!("{line} {}", pin(&world, "ca", suffix).display()));
            eventually("it is missed", || {
                let said = world.said();
                said.lines()
                    .skip(before)
                    .any(|it| it.contains("ca: someone has taken its program away"))
                    .then_some(())
            });
            attached(&world, "ca", index);
            assert!(!world.fetch("ca", "").is_empty(), "{hook}, {line}");
            assert_eq!(pins(&world), links);
        }
        let said = world.said();
        assert_eq!(said.matches("someone has taken").count(), 2, "nothing else is missed:\n{said}");
    }
}

#[test]
fn a_capture_that_runs_when_an_agent_with_many_programs_starts_has_all_links_again_within_seconds() {
    const ENDS: [&str; 4] = ["ca", "cb", "t1", "t2"];
    let trunks = |hook: &str| {
        ENDS.iter().fold(config(hook, UNCHECKED), |config, name| {
            config.replace(&format!("\"{name}\""), &format!("{{ trunk = \"{name}\", vlan = 10 }}"))
        })
    };
    let [(xdp, _), (tcx, _)] = HOOKS;
    let mut world = World::new(&config(xdp, UNCHECKED));
    // Each needs another program; the links have the one that an agent which starts loads last.
    for next in [config(tcx, UNCHECKED), trunks(xdp), trunks(tcx)] {
        let (code, said) = world.apply(&next);
        assert_eq!(code, Some(0), "{said}");
    }
    std::fs::write(world.config(), trunks(tcx)).unwrap();
    world.kill_agent();
    let mut capture = Capture::start(&world, &[]);
    world.run(&[]);
    let ready = Instant::now();
    let mut line = String::new();
    capture.said.read_line(&mut line).unwrap();
    assert!(line.contains("an agent has put another program in place"), "{line}");
    eventually("the capture has all links", || is_captured(&world, &ENDS).then_some(()));
    let took = ready.elapsed();
    assert!(took < Duration::from_secs(15), "{took:?}");
    capture.signal("-TERM");
    assert!(capture.end().0.success());
    assert!(is_as_before(&world, &ENDS));
}

/// This host's ends of stacks.
fn stacks(world: &World, namespace: &str) -> Vec<String> {
    let links = world.shell(namespace, "ip -o link");
    let names = links.split_whitespace().filter(|word| word.starts_with("pls"));
    names.filter_map(|name| Some(name.split_once('@')?.0.to_owned())).collect()
}

#[test]
fn the_stack_of_a_vpc_that_left_the_configuration_while_no_agent_ran_is_taken_away_by_the_next_one() {
    let whole = config("", CHECKED);
    let mut world = World::new(&whole);
    let [link] = stacks(&world, "dp").try_into().unwrap();
    let namespace = PathBuf::from(link.replace("pls", "/run/netns/privatelink-"));
    assert!(namespace.exists());
    world.kill_agent();
    let shop = whole.find("[vpcs.shop]").unwrap()..whole.find("[vpcs.bank]").unwrap();
    std::fs::write(world.config(), &whole[shop]).unwrap();
    world.start(&[]);
    assert_eq!((stacks(&world, "dp"), namespace.exists()), (Vec::new(), false));
    let names = world.shell("dp", &format!("ls {}/links", world.pins().display()));
    assert_eq!(names.lines().count(), 1, "{names}");
}

#[test]
fn an_agent_in_another_network_namespace_than_its_pins_says_so_and_leaves_nothing_there() {
    let mut world = served(&config("", CHECKED));
    let [link] = stacks(&world, "dp").try_into().unwrap();
    world.kill_agent();
    for _ in 0..2 {
        let output = world.privatelink_at("ca", &["run", "--config", &world.config().display().to_string()]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(69), "{said}");
        assert!(said.contains("these pins belong to another network namespace"), "{said}");
        assert!(stacks(&world, "ca").is_empty());
    }
    world.start(&[]);
    assert_eq!(stacks(&world, "dp"), [link]);
    assert_eq!(world.json("status")[0]["agent"]["adopted"], true);
    assert!(!world.fetch("cb", "").is_empty());
}
