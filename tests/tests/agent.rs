//! What the agent and its commands refuse, what they say of it, and what it leaves as it was.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests: a panic with its place is what is wanted")]

use privatelink_tests::world::{UNCHECKED, World, binary, config, eventually};
use std::path::PathBuf;
use std::process::Command;

/// A file system of its own for what the agent keeps, so that it can be full.
struct Small(PathBuf);

impl Small {
    fn new(world: &World) -> Self {
        let dir = world.dir.path().join("state");
        std::fs::create_dir(&dir).unwrap();
        let mount = ["-t", "tmpfs", "-o", "size=8m", "tmpfs"];
        assert!(Command::new("mount").args(mount).arg(&dir).status().unwrap().success());
        Self(dir)
    }

    /// Takes all of the room that is left.
    fn fill(&self) {
        let error = std::fs::write(self.0.join("rest"), vec![1; 8 << 20]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    }

    fn empty(&self) {
        std::fs::remove_file(self.0.join("rest")).unwrap();
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        // Behind the agent, which ends with its world, only its name goes.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// The usual configuration without the bank.
fn without_bank() -> String {
    let usual = config("", UNCHECKED);
    let (before, rest) = usual.split_once("[vpcs.bank]").unwrap();
    let (_, after) = rest.split_once("[vpcs.payments]").unwrap();
    let (after, _) = after.split_once("[endpoints.bank]").unwrap();
    format!("{before}[vpcs.payments]{after}")
}

/// The same with so many more endpoints that a full state directory cannot hold them.
fn larger_without_bank() -> String {
    let one = |number: u32| {
        let address = format!("10.0.{}.{}", 100 + number / 200, 1 + number % 200);
        format!(
            "[endpoints.more{number}]\nvpc = \"shop\"\nservice = \"payments\"\naddresses = {{ a = \"{address}\" }}\n"
        )
    };
    without_bank() + &(0..600).map(one).collect::<String>()
}

#[test]
fn a_configuration_that_cannot_be_kept_takes_nothing_from_anybody() {
    let mut world = World::bare(&config("", UNCHECKED));
    let state = Small::new(&world);
    world.start(&[]);
    world.serve("t1");
    world.serve("t2");
    let long = "curl -sSf --max-time 60 --limit-rate 4M -o /dev/null http://10.0.9.9/large";
    let long = world.spawn("cb", "sh", &["-c", long]);
    eventually("the bank's transfer runs", || (!world.json("flows").as_array()?.is_empty()).then_some(()));
    let before = world.json("endpoints").as_array().unwrap().len();
    state.fill();
    let (code, said) = world.apply(&larger_without_bank());
    assert_eq!(code, Some(69), "{said}");
    assert_eq!(world.json("endpoints").as_array().unwrap().len(), before);
    assert!(world.finished(long), "the bank's interface and flows stay as they are");
    world.kill_agent();
    std::fs::write(world.config(), larger_without_bank()).unwrap();
    let refused = world.privatelink(&["run", "--config", &world.config().display().to_string()]);
    assert_eq!(refused.status.code(), Some(69), "{refused:?}");
    assert!(world.shell("dp", "ip link").contains("pls"), "the stack stays: {refused:?}");
}

#[test]
fn a_state_directory_that_was_full_is_written_again_when_it_has_room() {
    let mut world = World::bare(&config("", UNCHECKED));
    let state = Small::new(&world);
    world.start(&[]);
    let problems = |world: &World| world.json("status")[0]["problems"].to_string();
    state.fill();
    for _ in 0..2 {
        let (code, said) = world.apply(&larger_without_bank());
        assert_eq!(code, Some(69), "{said}");
        assert!(said.contains("cannot write") && said.contains("state.redb"), "{said}");
        assert!(!said.contains("Previous I/O"), "{said}");
    }
    assert!(problems(&world).contains("cannot write"), "{}", problems(&world));
    assert!(world.said().contains("cannot write"), "{}", world.said());
    state.empty();
    let (code, said) = world.apply(&larger_without_bank());
    assert_eq!(code, Some(0), "{said}");
    assert!(!problems(&world).contains("cannot write"), "{}", problems(&world));
    let kept = world.json("endpoints").as_array().unwrap().len();
    world.kill_agent();
    std::fs::write(world.config(), larger_without_bank()).unwrap();
    world.start(&[]);
    assert_eq!(world.json("endpoints").as_array().unwrap().len(), kept);
}

/// Tells the agent to read its file again, and waits until it has said that it does not apply it.
fn refused_again(world: &World, why: &str) {
    let before = world.said().len();
    world.signal("-HUP");
    eventually("the agent says what it does not apply", || {
        let said = world.said()[before..].to_owned();
        (said.contains("is not applied") && said.contains(why)).then_some(())
    });
}

#[test]
fn a_file_without_a_vpc_and_one_that_cannot_be_read_twice_take_nothing_away() {
    let world = World::new(&config("", UNCHECKED));
    let before = world.json("endpoints");
    let empty = world.dir.path().join("empty.toml");
    std::fs::write(&empty, "# nothing\n").unwrap();
    for verb in ["check", "plan", "apply"] {
        let output = world.privatelink(&[verb, &empty.display().to_string()]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(65), "{verb}: {said}");
        assert!(said.contains("has no VPC"), "{verb}: {said}");
    }
    std::fs::write(world.config(), "").unwrap();
    refused_again(&world, "has no VPC");
    let next = world.dir.path().join("next.toml");
    std::fs::write(&next, config("", UNCHECKED)).unwrap();
    let mut command = world.command(&["apply", "/dev/stdin"]);
    let applied = command.stdin(std::fs::File::open(&next).unwrap()).output().unwrap();
    assert!(applied.status.success(), "{applied:?}");
    refused_again(&world, "no regular file");
    assert_eq!(world.json("endpoints"), before);
}

#[test]
fn an_agent_that_wants_what_another_has_is_refused_before_it_loads_anything() {
    let mut world = World::new(&config("", UNCHECKED));
    let of = |name: &str| world.dir.path().join(name).display().to_string();
    let pins = format!("{}-second", world.pins().display());
    for (run, state, option) in [("run", "other", "--runtime-dir"), ("other", "state", "--state-dir")] {
        let mut second = world.inside("dp", "timeout");
        second.arg("20").arg(binary()).args(["run", "--config"]).arg(world.config());
        second.args(["--pin-dir", &pins, "--runtime-dir", &of(run), "--state-dir", &of(state)]);
        let output = second.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let left = std::fs::exists(&pins).unwrap();
        let _ = Command::new(binary()).args(["detach", "--pin-dir", &pins]).output();
        assert_eq!(output.status.code(), Some(69), "{said}");
        assert!(said.contains("another agent uses") && said.contains(option), "{said}");
        assert!(!left, "it has left pins");
    }
    assert!(world.json("status").is_array(), "the first one is asked as before");
    world.kill_agent();
    world.start(&[]);
    assert!(world.json("status").is_array(), "a dead agent's socket is replaced");
}

#[test]
fn an_agent_keeps_no_memory_of_what_it_has_loaded() {
    let world = World::new(&config("", UNCHECKED));
    let pid = world.json("status")[0]["agent"]["pid"].as_u64().unwrap();
    eventually("what was loaded last is given back", || {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        (kib < 64 << 10).then_some(())
    });
}

#[test]
fn what_is_asked_of_nobody_is_refused_with_the_nearest_name_and_what_needs_root_says_so() {
    let mut world = World::bare(&config("", UNCHECKED));
    world.start(&["--detach-on-exit"]);
    for (line, part) in [
        ("flows --endpoint shpo", "there is no endpoint \"shpo\": did you mean \"shop\"?"),
        ("flows --target 10.0.1.23", "there is no target \"10.0.1.23\""),
        ("names shpo", "there is no VPC \"shpo\": did you mean \"shop\"?"),
        ("names nothing-like-it", "there is no VPC \"nothing-like-it\"\n"),
        (
            "explain --from shpo tcp 10.0.1.5:1 10.0.9.9:80",
            "there is no VPC \"shpo\": did you mean \"shop\"?",
        ),
        ("explain --from shop tcp 10.0.1.5:1 [fd00::9]:80", "no packet has both"),
        ("explain --from shop icmp 10.0.1.5:1 10.0.9.9:80", "tcp or udp"),
    ] {
        let output = world.privatelink(&line.split(' ').collect::<Vec<_>>());
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(64), "{line}: {said}");
        assert!(said.contains(part), "{line}: {said}");
    }
    for line in ["flows --endpoint shop", "flows --endpoint shop/a", "flows --target 10.0.1.21:8080"] {
        let output = world.privatelink(&line.split(' ').collect::<Vec<_>>());
        assert_eq!(String::from_utf8_lossy(&output.stdout), "none\n", "{line}: {output:?}");
    }
    let run = world.dir.path().join("run").display().to_string();
    let nobody = ["--reuid", "65534", "--regid", "65534", "--clear-groups"];
    let mut status = Command::new("setpriv");
    let status = status.args(nobody).arg(binary()).args(["status", "--runtime-dir", &run]).output().unwrap();
    assert_eq!(status.status.code(), Some(77), "{status:?}");
    assert!(String::from_utf8_lossy(&status.stderr).contains("needs root"), "{status:?}");
    assert_eq!(world.stop(), Some(0));
    assert!(world.said().contains("what it loaded is taken away"), "{}", world.said());
    assert!(!world.said().contains("goes on"), "{}", world.said());
    let again = world.privatelink(&["detach"]);
    assert!(String::from_utf8_lossy(&again.stdout).starts_with("nothing is pinned"), "{again:?}");
}

#[test]
fn what_goes_is_called_by_the_name_that_it_had() {
    let world = World::new(&config("", UNCHECKED));
    let file = world.dir.path().join("next.toml");
    std::fs::write(&file, without_bank()).unwrap();
    let plan = world.privatelink(&["plan", &file.display().to_string()]);
    let plan = String::from_utf8(plan.stdout).unwrap();
    let (code, applied) = world.apply(&without_bank());
    assert_eq!(code, Some(0), "{applied}");
    for said in [plan, applied] {
        assert!(said.contains("cb in bank") && said.contains("endpoint 10.0.9.9 in bank"), "{said}");
        assert!(!said.contains('#'), "{said}");
    }
}

#[test]
fn flows_that_are_over_do_not_count_against_an_endpoint() {
    let text = config("", UNCHECKED).replace("[endpoints.shop]", "[endpoints.shop]\nmax_flows = 3");
    let mut world = World::new(&text);
    world.serve("t1");
    world.serve("t2");
    for _ in 0..3 {
        assert!(!world.fetch("ca", "").is_empty());
    }
    eventually("a sweep has seen the flows", || {
        let targets = world.json("targets");
        let flows: u64 = targets.as_array()?.iter().filter_map(|it| it["flows"].as_u64()).sum();
        (flows == 3).then_some(())
    });
    let endpoints = world.json("endpoints");
    let shop = endpoints.as_array().unwrap().iter().find(|it| it["endpoint"] == "shop").unwrap();
    assert_eq!((&shop["active_flows"], &shop["full"]), (&0.into(), &false.into()));
    assert_eq!(world.json("flows").as_array().unwrap().len(), 3, "they are there all the same");
    assert!(!world.fetch("ca", "").is_empty());
}

#[test]
fn an_agent_whose_pins_would_end_with_its_mount_namespace_warns_of_that() {
    let vpc = "[vpcs.shop]\naccount = \"111122223333\"\ncidrs = [\"10.0.0.0/16\"]\ninterfaces = [\"ca\"]\n";
    let world = World::bare(vpc);
    let log = world.dir.path().join("second.log");
    let mut agent = Command::new("setpriv");
    agent.args(["--pdeathsig", "KILL", "ip", "netns", "exec", &world.namespace("dp")]);
    agent.arg(binary()).args(["run", "--config"]).arg(world.config()).args(world.places());
    let mut agent = agent.stderr(std::fs::File::create(&log).unwrap()).spawn().unwrap();
    let said = || std::fs::read_to_string(&log).unwrap();
    eventually("the agent is ready", || said().contains("privatelink: ready").then_some(()));
    let (warned, left) = (said(), world.pins().exists());
    agent.kill().unwrap();
    agent.wait().unwrap();
    assert!(warned.contains("no bpffs is mounted") && warned.contains("nsenter --net="), "{warned}");
    assert!(!left, "nobody else sees what it has pinned");
}
