//! `privatelink capture` on real traffic: what it writes, what it leaves out, and that nothing of it stays.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests: a panic with its place is what is wanted")]

use privatelink_tests::packet::addresses;
use privatelink_tests::pcapng::{self, Record};
use privatelink_tests::world::{UNCHECKED, World, binary, config, eventually};
use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};

/// A capture that runs; it ends with the test.
struct Capture {
    child: Child,
    said: BufReader<ChildStderr>,
}

impl Capture {
    /// Starts one, and waits until it captures.
    fn start(world: &World, arguments: &[&str]) -> Self {
        let mut command = world.inside("dp", binary());
        command.arg("capture").arg("--pin-dir").arg(world.pins()).args(arguments);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut said = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        said.read_line(&mut line).unwrap();
        assert_eq!(line, "capturing\n");
        Self { child, said }
    }

    fn signal(&self, signal: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
    }

    /// Waits for its end; returns its exit status and what it said.
    fn end(mut self) -> (ExitStatus, String) {
        let mut said = String::new();
        self.said.read_to_string(&mut said).unwrap();
        (self.child.wait().unwrap(), said)
    }

    /// The process that it started.
    fn guard(&self) -> u32 {
        let pid = self.child.id();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        children.split_whitespace().next().unwrap().parse().unwrap()
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn file(world: &World) -> PathBuf {
    world.dir.path().join("capture.pcapng")
}

fn written(world: &World) -> Vec<Record> {
    pcapng::read(&fs::read(file(world)).unwrap())
}

fn bpftool(arguments: &[&str], path: PathBuf) -> Value {
    let output = Command::new("bpftool").arg("-j").args(arguments).arg("pinned").arg(path).output().unwrap();
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"))
}

/// Whether every interface has the program that is pinned.
fn is_as_before(world: &World) -> bool {
    let program = bpftool(&["prog", "show"], world.pins().join("programs/ingress"))["id"].clone();
    let has =
        |link: &str| bpftool(&["link", "show"], world.pins().join("links").join(link))["prog_id"] == program;
    ["ca", "cb", "t1", "t2"].into_iter().all(has)
}

fn served(config: &str) -> World {
    let mut world = World::new(config);
    world.serve("t1");
    world.serve("t2");
    world
}

#[test]
fn a_capture_has_packets_as_they_came_and_as_they_left_with_the_verdict_and_not_those_of_another_tenant() {
    let world = served(&config("", UNCHECKED));
    let path = file(&world).display().to_string();
    let capture = Capture::start(&world, &["--write", &path, "--endpoint", "shop"]);
    assert!(!is_as_before(&world), "the capture's program is in place");
    world.shell("cb", "curl -sS --max-time 5 --local-port 40000 http://10.0.9.9/");
    let target = world.shell("ca", "curl -sS --max-time 5 --local-port 40000 http://10.0.9.9/");
    world.shell("ca", "curl -sS --max-time 1 --local-port 40001 http://10.0.9.9:81/ || true");
    world.shell(
        "ca",
        "curl -sS --max-time 1 --local-port 40002 -X POST telnet://10.0.9.9:80 </dev/null || true",
    );
    capture.signal("-INT");
    let (status, said) = capture.end();
    assert!(status.success() && said.starts_with("captured "), "{status} {said}");
    assert!(is_as_before(&world), "the agent's program is back when the capture has ended");

    let records = written(&world);
    let of_bank = records.iter().any(|it| it.interface == "cb" || it.comment.contains("bank"));
    assert!(!of_bank, "{records:?}");
    let (client, endpoint, balancer) = ([10, 0, 1, 5], [10, 0, 9, 9], [10, 0, 1, 10]);
    let tcp: Vec<_> = records.iter().filter(|it| it.bytes[12..14] == [8, 0]).collect();
    let at = tcp
        .iter()
        .position(|it| addresses(&it.bytes) == (client, 40000, endpoint, 80) && it.bytes[47] == 2)
        .expect("the SYN as it came");
    let (came, left) = (tcp[at], tcp[at + 1]);
    let (from, nat, to, port) = addresses(&left.bytes);
    assert_eq!((from, port), (balancer, 8080), "the SYN as it left");
    assert_eq!((came.interface.as_str(), came.outbound), ("ca", false));
    assert_eq!((left.interface.as_str(), left.outbound), (target.as_str(), true));
    assert!(came.bytes.len() == came.length && came.length == left.length, "{came:?} {left:?}");
    // Options and payload are as they were.
    assert_eq!(came.bytes[54..], left.bytes[54..]);
    for record in [came, left] {
        let expected = format!("target web/10.0.1.{}:8080", if target == "t1" { 21 } else { 22 });
        assert!(record.comment.starts_with("forwarded") && record.comment.ends_with(&expected), "{record:?}");
        assert!(record.comment.contains("vpc shop, endpoint shop/a"), "{record:?}");
    }
    let answer = tcp
        .iter()
        .find(|it| addresses(&it.bytes) == (to, 8080, balancer, nat))
        .expect("the answer as it came");
    assert_eq!((answer.interface.as_str(), answer.outbound), (target.as_str(), false));
    assert!(
        tcp.iter().any(|it| it.outbound && addresses(&it.bytes) == (endpoint, 80, client, 40000)),
        "and as it left"
    );
    let body = |it: &&&Record| it.bytes.ends_with(target.as_bytes());
    assert_eq!(tcp.iter().filter(body).count(), 2, "the page, twice");
    let refused: Vec<_> = tcp.iter().filter(|it| addresses(&it.bytes).1 == 40001).collect();
    assert!(!refused.is_empty(), "{records:?}");
    for record in refused {
        assert!(record.comment.starts_with("dropped: no_listener") && !record.outbound, "{record:?}");
    }

    // What others read it with agrees.
    let read = world.shell("dp", &format!("tcpdump -nr {path} 2>/dev/null"));
    assert_eq!(read.lines().count(), records.len(), "{read}");
    let line = format!("10.0.1.10.{nat} > 10.0.1.{}.8080: Flags [S]", to[3]);
    assert!(read.contains("10.0.1.5.40000 > 10.0.9.9.80: Flags [S]") && read.contains(&line), "{read}");
    assert!(!read.contains("incorrect"), "{read}");
}

#[test]
fn packets_are_chosen_by_either_side_and_cut_and_counted() {
    let world = served(&config("", UNCHECKED));
    let path = file(&world).display().to_string();
    // Both directions of one connection of one of two tenants with the same addresses, by what the consumer sees of it.
    let choice = ["--vpc", "bank", "--from", "10.0.1.5:40000", "--to", "10.0.9.9:80", "--protocol", "tcp"];
    let capture = Capture::start(&world, &[&["-w", &path, "--snaplen", "60"][..], &choice].concat());
    for consumer in ["ca", "cb"] {
        for port in [40000, 40001] {
            world.shell(consumer, &format!("curl -sS --max-time 5 --local-port {port} http://10.0.9.9/"));
        }
    }
    capture.signal("-TERM");
    assert!(capture.end().0.success());
    let records = written(&world);
    assert!(records.iter().any(|it| it.interface == "cb" && it.outbound), "{records:?}");
    for record in &records {
        assert!(record.interface != "ca" && record.comment.contains("endpoint bank/a"), "{record:?}");
        assert_eq!(record.bytes.len(), record.length.min(60));
        let (_, from, _, to) = addresses(&record.bytes);
        assert!(![from, to].contains(&40001), "{record:?}");
    }

    let mut capture = Capture::start(&world, &["--count", "3", "--protocol", "tcp"]);
    let stdout = capture.child.stdout.take().unwrap();
    world.fetch("ca", "");
    let lines: Vec<_> = BufReader::new(stdout).lines().map(Result::unwrap).collect();
    assert_eq!(lines.len(), 3, "{lines:?}");
    assert!(lines[0].contains(" ca tcp 10.0.1.5:") && lines[0].contains("[S] => t"), "{lines:?}");
    assert!(lines.iter().all(|it| it.contains(": forwarded, vpc ")), "{lines:?}");
    assert!(capture.end().1.starts_with("captured 3 packets"));

    let capture = Capture::start(&world, &["--rate", "5", "--duration", "3s", "--dropped"]);
    world.shell("ca", "bash -c 'for i in $(seq 300); do echo x > /dev/udp/10.0.9.9/99; done'");
    let (status, said) = capture.end();
    assert!(
        status.success() && said.contains("more came above the rate of 5 a second, 0 found no room"),
        "{said}"
    );
    let number = |text: &str| text.split_whitespace().find_map(|it| it.parse::<u64>().ok()).unwrap();
    let (captured, more) = said.split_once(';').unwrap();
    assert!((1..=20).contains(&number(captured)), "{said}");
    assert_eq!(number(captured) + number(more), 300, "{said}");
}

#[test]
fn a_capture_that_is_killed_leaves_nothing_behind_and_one_that_nobody_reads_ends() {
    let world = served(&config("", UNCHECKED));
    let mut capture = Capture::start(&world, &[]);
    capture.child.kill().unwrap();
    eventually("the program is back", || is_as_before(&world).then_some(()));

    let capture = Capture::start(&world, &[]);
    let guard = capture.guard().to_string();
    assert!(Command::new("kill").args(["-KILL", &guard]).status().unwrap().success());
    capture.signal("-KILL");
    assert!(!world.fetch("ca", "").is_empty(), "packets go on with the capture's program");
    eventually("the agent puts the program back", || is_as_before(&world).then_some(()));
    assert!(world.said().contains("a capture has died on 5 interfaces"), "{}", world.said());

    let mut capture = Capture::start(&world, &["-w", "-"]);
    drop(capture.child.stdout.take());
    let (status, said) = capture.end();
    assert!(status.success(), "{status} {said}");
    assert!(is_as_before(&world));
}

#[test]
fn a_capture_needs_no_agent_and_goes_on_with_the_program_of_the_next_one() {
    let mut world = served(&config("", UNCHECKED));
    world.kill_agent();
    let path = file(&world).display().to_string();
    let mut capture = Capture::start(&world, &["-w", &path, "--protocol", "tcp"]);
    assert!(!world.fetch("ca", "").is_empty());
    world.start(&[]);
    let mut line = String::new();
    capture.said.read_line(&mut line).unwrap();
    assert!(line.contains("an agent has put another program in place"), "{line}");
    assert!(!is_as_before(&world));
    assert!(!world.fetch("cb", "").is_empty());
    let second = world.privatelink(&["capture", "--duration", "1s"]);
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert_eq!(second.status.code(), Some(69), "{said}");
    assert!(said.contains("another capture runs"), "{said}");
    capture.signal("-TERM");
    let (status, said) = capture.end();
    assert!(status.success(), "{said}");
    let records = written(&world);
    for interface in ["ca", "cb"] {
        assert!(records.iter().any(|it| it.interface == interface), "{interface}: {records:?}");
    }
    assert!(is_as_before(&world));
}

#[test]
fn what_does_not_exist_cannot_be_captured() {
    let world = World::new(&config("", UNCHECKED));
    for (arguments, advice) in [
        (["--endpoint", "shp"], "there is no endpoint \"shp\""),
        (["--vpc", "shopp"], "did you mean \"shop\"?"),
        (["--from", "10.0.1:80"], "ADDRESS:PORT"),
        (["--sample", "1/0"], "1/N"),
    ] {
        let output = world.privatelink(&[&["capture"][..], &arguments].concat());
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(64), "{said}");
        assert!(said.contains(advice), "{said}");
    }
    assert_eq!(
        world.privatelink(&["capture", "--pin-dir", "/nonexistent"]).status.code(),
        Some(64),
        "given twice"
    );
    let elsewhere = Command::new(binary()).args(["capture", "--pin-dir", "/nonexistent"]).output().unwrap();
    assert_eq!(elsewhere.status.code(), Some(69), "{elsewhere:?}");
}
