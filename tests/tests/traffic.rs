//! Real clients and servers in real namespaces.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests: a panic with its place is what is wanted")]

use privatelink_tests::world::{CHECKED, UNCHECKED, World, binary, config, eventually};
use serde_json::Value;
use std::io::{BufRead, BufReader, Write};
use std::net::UdpSocket;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

/// What goes before the usual configuration's tables, for all interfaces to have one hook.
const XDP: &str = "hook = \"xdp\"\n";
const TCX: &str = "hook = \"tcx\"\n";

fn states(world: &World) -> Vec<String> {
    world
        .json("targets")
        .as_array()
        .unwrap()
        .iter()
        .map(|it| it["state"].as_str().unwrap().to_owned())
        .collect()
}

fn attached(world: &World, interface: &str) -> Option<Value> {
    let status = world.json("status");
    let row = status[0]["interfaces"].as_array()?.iter().find(|it| it["interface"] == interface)?.clone();
    (row["state"] == "attached").then_some(row)
}

/// Requests one after the other until told to stop; the loop fails at the first that fails, and prints how many succeeded.
const LOAD: &str = "n=0; while [ ! -e $0 ] && [ $n -lt 100000 ]; do curl -sSf --max-time 5 -o /dev/null http://10.0.9.9/ || exit 1; \
                    n=$((n+1)); done; [ $n -gt 10 ]";

/// Runs `work` while both consumers send requests, of which none may fail.
fn under_load(world: &mut World, work: impl FnOnce(&mut World)) {
    let stop = world.dir.path().join("stop").display().to_string();
    let loads = ["ca", "cb"].map(|consumer| world.spawn(consumer, "sh", &["-c", LOAD, &stop]));
    eventually("the load runs", || {
        let flows: u64 =
            world.json("endpoints").as_array()?.iter().filter_map(|it| it["new_flows"].as_u64()).sum();
        (flows > 20).then_some(())
    });
    work(world);
    std::fs::write(&stop, "").unwrap();
    for load in loads {
        assert!(world.finished(load), "a request failed");
    }
}

#[test]
fn two_consumers_with_the_same_address_and_port_fetch_at_once_and_a_dead_target_is_noticed() {
    let mut world = World::new(&config("", CHECKED));
    let first = world.serve("t1");
    world.serve("t2");
    eventually("both targets are healthy", || states(&world).iter().all(|it| it == "healthy").then_some(()));
    let line = "curl -sSf --max-time 20 --local-port 40000 -o /dev/null http://10.0.9.9/large";
    let both = ["ca", "cb"].map(|consumer| world.spawn(consumer, "sh", &["-c", line]));
    for child in both {
        assert!(world.finished(child), "20 MiB from one source port, twice at once");
    }
    world.kill(first);
    eventually("the death is noticed", || states(&world).contains(&"unhealthy".to_owned()).then_some(()));
    for _ in 0..20 {
        assert_eq!(world.fetch("ca", ""), "t2");
    }
    let pings = world.json("drops");
    assert_eq!(pings.as_array().unwrap().iter().filter(|it| it["vpc"] == "bank").count(), 0, "{pings}");
}

#[test]
fn iperf3_and_datagrams_go_through() {
    let mut world = World::new(&config("", UNCHECKED));
    for target in ["t1", "t2"] {
        world.spawn(target, "iperf3", &["-s", "-p", "8080"]);
        eventually("iperf3 listens", || {
            (!world.shell(target, "ss -Hltn sport = :8080").is_empty()).then_some(())
        });
    }
    // iperf3 opens two connections, which may go to two targets: one of them only, by taking the other away.
    let one = config("", UNCHECKED).replace(r#", { address = "10.0.1.22", zone = "a" }"#, "");
    let (code, said) = world.apply(&one.replace("port = 53", "port = 80"));
    assert_eq!(code, Some(0), "{said}");
    let tcp: Value =
        serde_json::from_str(&world.shell("ca", "iperf3 -J -c 10.0.9.9 -p 80 -t 2 -C reno")).unwrap();
    assert!(tcp["end"]["sum_received"]["bytes"].as_u64().unwrap() > 1_000_000, "{tcp}");
    let udp: Value =
        serde_json::from_str(&world.shell("cb", "iperf3 -J -u -b 20M -l 1200 -c 10.0.9.9 -p 80 -t 2"))
            .unwrap();
    assert!(udp["end"]["sum"]["packets"].as_u64().unwrap() > 1000, "{udp}");
    assert!(udp["end"]["sum"]["lost_percent"].as_f64().unwrap() < 50.0, "{udp}");
}

#[test]
fn applying_under_load_loses_nothing() {
    let mut world = World::new(&config("", UNCHECKED));
    world.serve("t1");
    world.serve("t2");
    under_load(&mut world, |world| {
        let usual = config("", UNCHECKED);
        let more = usual.clone()
            + "[endpoints.more]\nvpc = \"shop\"\nservice = \"payments\"\naddresses = { a = \"10.0.9.10\" }\n";
        for _ in 0..5 {
            for next in [&more, &usual.replace("zone = \"a\" }]", "zone = \"a\", weight = 3 }]"), &usual] {
                let (code, said) = world.apply(next);
                assert_eq!(code, Some(0), "{said}");
            }
        }
    });
    let said = world.apply(&config("", UNCHECKED)).1;
    assert_eq!(said.trim(), "none", "the same again changes nothing");
}

#[test]
fn the_agent_killed_and_started_again_loses_no_connection() {
    killed_and_started_again(XDP);
}

#[test]
fn the_agent_killed_and_started_again_loses_no_connection_by_tcx() {
    killed_and_started_again(TCX);
}

fn killed_and_started_again(hook: &str) {
    let mut world = World::new(&config(hook, UNCHECKED));
    world.serve("t1");
    world.serve("t2");
    let long = "curl -sSf --max-time 60 --limit-rate 4M -o /dev/null http://10.0.9.9/large";
    let long = world.spawn("ca", "sh", &["-c", long]);
    eventually("the long transfer runs", || (!world.json("flows").as_array()?.is_empty()).then_some(()));
    under_load(&mut world, |world| {
        world.kill_agent();
        for _ in 0..20 {
            world.fetch("cb", "");
        }
        world.start(&[]);
        assert_eq!(world.json("status")[0]["agent"]["adopted"], true);
        for _ in 0..20 {
            world.fetch("cb", "");
        }
    });
    assert!(world.finished(long), "a transfer that began before went on to its end");
}

#[test]
fn tables_get_other_sizes_with_the_next_agent_and_no_connection_is_lost() {
    other_sizes(XDP);
}

#[test]
fn tables_get_other_sizes_with_the_next_agent_and_no_connection_is_lost_by_tcx() {
    other_sizes(TCX);
}

fn other_sizes(hook: &str) {
    let sized =
        |flows: u32| config(&format!("{hook}[limits]\nflows = {flows}\npending_flows = 1024\n"), UNCHECKED);
    let size = |world: &World| {
        let status = world.json("status");
        let rows = status[0]["maps"].as_array().unwrap().clone();
        rows.into_iter().find(|row| row["map"] == "established").unwrap()["size"].as_u64().unwrap()
    };
    let mut world = World::new(&sized(4096));
    world.serve("t1");
    world.serve("t2");
    let long = "curl -sSf --max-time 120 --limit-rate 1M -o /dev/null http://10.0.9.9/large";
    let transfers: Vec<_> = ["ca", "ca", "cb", "cb"].map(|it| world.spawn(it, "sh", &["-c", long])).into();
    eventually("the transfers run", || (world.json("flows").as_array()?.len() >= 4).then_some(()));
    let counted = world.state()["shop new_flows"];
    for flows in [65536, 512] {
        std::fs::write(world.config(), sized(flows)).unwrap();
        assert_eq!(world.stop(), Some(0));
        world.start(&[]);
        assert_eq!(size(&world), u64::from(flows));
        assert!(world.said().contains("the sizes that [limits] says"), "{}", world.said());
        assert!(!world.fetch("ca", "").is_empty());
    }
    // An agent that was killed just before it put the new maps in the old ones' place.
    world.kill_agent();
    std::fs::rename(world.pins().join("maps"), world.pins().join("maps_new")).unwrap();
    world.start(&[]);
    assert!(!world.pins().join("maps_new").exists());
    assert_eq!(world.state()["shop new_flows"], counted + 2, "the counters went along");
    assert_eq!(
        world.json("flows").as_array().unwrap().iter().filter(|it| it["state"] == "established").count(),
        4
    );
    std::fs::write(world.config(), sized(2)).unwrap();
    assert_eq!(world.stop(), Some(0));
    let refused = world.privatelink(&["run", "--config", &world.config().display().to_string()]);
    assert_eq!(refused.status.code(), Some(69));
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("established") && said.contains("limits.flows makes room for 2"), "{said}");
    for transfer in transfers {
        assert!(world.finished(transfer), "a transfer was cut off");
    }
}

#[test]
fn an_interface_that_vanishes_and_comes_back_is_attached_again() {
    vanishes_and_comes_back(XDP);
}

#[test]
fn an_interface_that_vanishes_and_comes_back_is_attached_again_by_tcx() {
    vanishes_and_comes_back(TCX);
}

fn vanishes_and_comes_back(hook: &str) {
    let mut world = World::new(&config(hook, UNCHECKED));
    world.serve("t1");
    world.serve("t2");
    assert!(!world.fetch("ca", "").is_empty());
    let host = world.namespace("dp");
    assert!(Command::new("ip").args(["-n", &host, "link", "del", "ca"]).status().unwrap().success());
    eventually("it is missed", || attached(&world, "ca").is_none().then_some(()));
    world.plug("ca", "10.0.1.5");
    eventually("it is attached", || attached(&world, "ca"));
    eventually("its other end is ready", || {
        let whole = world.shell("ca", "ethtool -k eth0").contains("tx-checksumming: off");
        (whole || hook == TCX).then_some(())
    });
    eventually("it works", || Some(world.fetch("ca", "")).filter(|it| !it.is_empty()));
}

#[test]
fn a_target_that_changes_its_link_layer_address_is_followed_by_the_connections_that_it_has() {
    let mut world = World::new(&config("", UNCHECKED));
    world.serve("t1");
    world.serve("t2");
    let line = "curl -sSf --max-time 60 --limit-rate 5M -o /dev/null http://10.0.9.9/large";
    let loads: Vec<_> = (0..6).map(|_| world.spawn("ca", "sh", &["-c", line])).collect();
    eventually("the transfers run", || (world.json("flows").as_array()?.len() >= 6).then_some(()));
    for (target, mac) in [("t1", "02:aa:00:00:00:21"), ("t2", "02:aa:00:00:00:22")] {
        world.shell(target, &format!("ip link set eth0 address {mac}"));
    }
    eventually("the agent knows", || {
        let targets = world.json("targets");
        targets
            .as_array()?
            .iter()
            .all(|it| it["mac"].as_str().is_some_and(|mac| mac.starts_with("02:aa")))
            .then_some(())
    });
    for load in loads {
        assert!(world.finished(load), "a transfer ended early");
    }
}

#[test]
fn a_wrong_file_changes_nothing_and_says_everything() {
    let world = World::new(&config("", UNCHECKED));
    let before = world.json("endpoints");
    let wrong = config("", UNCHECKED)
        .replace("service = \"payments\"", "service = \"payment\"")
        .replace("ping", "pong")
        + "[endpoint.x]\n";
    let (code, said) = world.apply(&wrong);
    assert_eq!(code, Some(65), "{said}");
    for part in [
        "no endpoint service \"payment\"",
        "did you mean \"payments\"?",
        "unknown key \"endpoint\"",
        "next.toml:",
    ] {
        assert!(said.contains(part), "{part} in {said}");
    }
    let whole = config("", UNCHECKED);
    // Each cut is inside a token, so that what is left cannot happen to be a file of its own.
    for token in ["10.0.1.22", "load_balancers = [", "acceptance_required", "10.0.9.9"] {
        let half = &whole[..whole.rfind(token).unwrap() + 4];
        let (code, said) = world.apply(half);
        assert_eq!(code, Some(65), "cut in {token}: {said}");
    }
    let missing = world.privatelink(&["apply", "/nonexistent.toml"]);
    assert_eq!(missing.status.code(), Some(65));
    std::fs::write(world.config(), "vpcs = 3").unwrap();
    world.signal("-HUP");
    eventually("the agent says that it does not apply the file", || {
        world.said().contains("is not applied").then_some(())
    });
    assert_eq!(world.json("endpoints"), before);
}

#[test]
fn a_configuration_that_vanishes_or_is_half_written_while_it_is_read_changes_nothing() {
    let mut world = World::new(&config("", UNCHECKED));
    world.serve("t1");
    world.serve("t2");
    let (before, whole) = (world.json("endpoints"), config("", UNCHECKED));
    under_load(&mut world, |world| {
        for round in 0..30 {
            let said = world.said().lines().count();
            match round % 3 {
                0 => std::fs::remove_file(world.config()).unwrap(),
                1 => std::fs::write(world.config(), &whole[..whole.len() * (round + 1) / 32]).unwrap(),
                _ => std::fs::write(world.config(), &whole).unwrap(),
            }
            world.signal("-HUP");
            eventually("the agent has read the file", || (world.said().lines().count() > said).then_some(()));
        }
    });
    assert!(world.said().contains("No such file"), "{}", world.said());
    let names = |value: &Value| -> Vec<(Value, Value)> {
        value.as_array().unwrap().iter().map(|it| (it["endpoint"].clone(), it["state"].clone())).collect()
    };
    assert_eq!(names(&world.json("endpoints")), names(&before));
}

/// Sends `count` datagrams from port 5555, one after the other answer, and returns how many came back as they were.
fn echo(count: u32, tag: &'static str) -> usize {
    let socket = UdpSocket::bind("0.0.0.0:5555").unwrap();
    socket.connect("10.0.9.9:53").unwrap();
    socket.set_read_timeout(Some(std::time::Duration::from_secs(5))).unwrap();
    let round = |number: &u32| {
        let message = format!("{tag} {number}");
        socket.send(message.as_bytes()).unwrap();
        let mut answer = [0; 64];
        socket.recv(&mut answer).is_ok_and(|length| answer[..length] == *message.as_bytes())
    };
    (0..count).filter(round).count()
}

#[test]
fn datagrams_of_two_consumers_from_one_address_and_port_come_back_to_the_one_who_sent_them() {
    let world = World::new(&config("", UNCHECKED));
    for target in ["t1", "t2"] {
        let (ready, is_ready) = std::sync::mpsc::channel();
        world.thread(target, move || {
            let socket = UdpSocket::bind("0.0.0.0:8080").unwrap();
            ready.send(()).unwrap();
            let mut message = [0; 64];
            for _ in 0..10_000 {
                let Ok((length, from)) = socket.recv_from(&mut message) else { return };
                socket.send_to(&message[..length], from).unwrap();
            }
        });
        is_ready.recv().unwrap();
    }
    let shop = world.thread("ca", || echo(500, "shop"));
    let bank = world.thread("cb", || echo(500, "bank"));
    assert_eq!((shop.join().unwrap(), bank.join().unwrap()), (500, 500));
    let flows = world.json("flows");
    assert_eq!(flows.as_array().unwrap().len(), 2, "one flow each: {flows}");
}

#[test]
fn a_drop_is_named_in_the_log_when_asked_and_everything_is_taken_away_at_the_end_when_asked() {
    for hook in [XDP, TCX] {
        let mut world = World::bare(&config(hook, UNCHECKED));
        world.start(&["--log-drops", "--detach-on-exit"]);
        let refused =
            world.shell("ca", "curl -sS --max-time 1 --local-port 41000 http://10.0.9.9:81/ || true");
        assert!(refused.is_empty(), "{refused}");
        eventually("the drop is named", || {
            world.said().contains("dropped no_listener: ca tcp 10.0.1.5:41000 > 10.0.9.9:81").then_some(())
        });
        assert_eq!(world.stop(), Some(0));
        assert!(!world.pins().exists(), "the pins are gone");
        let links = world.shell("dp", "ip -d link");
        assert!(!links.contains("xdp") && !links.contains("pls"), "{links}");
    }
}

#[test]
fn what_an_other_end_lacks_is_reported_with_the_command_that_mends_it_even_where_no_one_can_look() {
    let plain = config("", UNCHECKED).replace("manage_peer_offloads = true", "hook = \"xdp\"");
    let mut world = World::bare(&plain.replace("interfaces = [\"cb\"]", "interfaces = [\"cb\", \"cx\"]"));
    // A namespace without a name.
    let hidden = world.spawn("dp", "unshare", &["-n", "sleep", "600"]);
    let (pid, host) = (world.pid(hidden), world.namespace("dp"));
    eventually("the namespace is there", || {
        let own = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net")).ok();
        let apart = std::fs::read_link(format!("/run/netns/{host}")).ok();
        (own(&pid.to_string()) != own("self") && own(&pid.to_string()) != apart).then_some(())
    });
    world.shell("dp", &format!("ip link add cx type veth peer name eth0 netns {pid} && ip link set cx up"));
    world.shell("dp", &format!("nsenter -t {pid} -n ip link set eth0 up"));
    world.run(&[]);
    let problem = |world: &World, name: &str| {
        let status = world.json("status");
        let rows = status[0]["interfaces"].as_array().unwrap().clone();
        rows.into_iter().find(|row| row["interface"] == name).map(|row| row["problem"].clone()).unwrap()
    };
    let remedy =
        eventually("the other end's lack is reported", || Some(problem(&world, "ca").as_str()?.to_owned()));
    assert!(world.said().contains(&remedy), "and was said when it was attached:\n{}", world.said());
    let command = remedy.split('`').nth(1).unwrap();
    assert!(command.contains("ethtool -K eth0 gro on tx off"), "{command}");
    world.shell("dp", command);
    eventually("the mended end is seen", || problem(&world, "ca").is_null().then_some(()));
    let unseen = problem(&world, "cx");
    assert!(unseen.as_str().unwrap().contains("gro on"), "{unseen}");
    world.shell("dp", &format!("nsenter -t {pid} -n ethtool -K eth0 gro on"));
    eventually("that end is seen to be mended, too", || problem(&world, "cx").is_null().then_some(()));
}

#[test]
fn a_second_agent_a_foreign_map_and_garbage_on_the_socket_are_refused() {
    let mut world = World::new(&config("", UNCHECKED));
    let second = world.privatelink(&["run", "--config", &world.config().display().to_string()]);
    assert_eq!(second.status.code(), Some(69), "{second:?}");
    assert!(String::from_utf8_lossy(&second.stderr).contains("another agent"), "{second:?}");

    let mut socket = UnixStream::connect(world.dir.path().join("run/control.sock")).unwrap();
    for garbage in [&b"\xff\xfe\x00\n"[..], b"{\"command\":\"nothing\"}\n", b"[[[[\n", b"\n"] {
        socket.write_all(garbage).unwrap();
        let mut line = String::new();
        BufReader::new(socket.try_clone().unwrap()).read_line(&mut line).unwrap();
        assert!(line.contains("Err"), "{line}");
    }
    assert!(world.json("status").is_array(), "the agent is none the worse");

    world.kill_agent();
    let pin = world.pins().join("maps/targets");
    std::fs::remove_file(&pin).unwrap();
    let line =
        format!("bpftool map create {} type array key 4 value 64 entries 16384 name foreign", pin.display());
    world.shell("dp", &line);
    let refused = world.privatelink(&["run", "--config", &world.config().display().to_string()]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(69), "{said}");
    assert!(said.contains("maps/targets") && said.contains("detach"), "{said}");
}

#[test]
fn the_command_line_keeps_its_promises() {
    let run = |arguments: &[&str]| Command::new(binary()).args(arguments).output().unwrap();
    assert_eq!(run(&["nonsense"]).status.code(), Some(64));
    assert_eq!(run(&["--help"]).status.code(), Some(0));
    assert_eq!(run(&["check", "/nonexistent"]).status.code(), Some(65));
    assert_eq!(run(&["flows", "--runtime-dir", "/nonexistent"]).status.code(), Some(69));
    let mut closed = Command::new(binary()).arg("--help").stdout(Stdio::piped()).spawn().unwrap();
    drop(closed.stdout.take());
    assert_eq!(closed.wait().unwrap().code(), Some(0), "a closed pipe is a clean exit");
}
