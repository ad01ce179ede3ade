//! `privatelink capture`, as a process beside the test, and what the links have while it runs.

use crate::pcapng::{self, Record};
use crate::world::{World, binary};
use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};

/// A capture that runs; it ends with the test.
#[derive(Debug)]
pub struct Capture {
    pub child: Child,
    pub said: BufReader<ChildStderr>,
}

impl Capture {
    /// Starts one, and waits until it captures.
    pub fn start(world: &World, arguments: &[&str]) -> Self {
        let mut command = world.inside("dp", binary());
        command.arg("capture").arg("--pin-dir").arg(world.pins()).args(arguments);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut said = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        said.read_line(&mut line).unwrap();
        assert_eq!(line, "capturing\n");
        Self { child, said }
    }

    pub fn signal(&self, signal: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
    }

    /// Waits for its end; returns its exit status and what it said.
    pub fn end(mut self) -> (ExitStatus, String) {
        let mut said = String::new();
        self.said.read_to_string(&mut said).unwrap();
        (self.child.wait().unwrap(), said)
    }

    /// The process that it started.
    pub fn guard(&self) -> u32 {
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

/// Where a world's captures are written to.
pub fn file(world: &World) -> PathBuf {
    world.dir.path().join("capture.pcapng")
}

/// What is written there.
pub fn written(world: &World) -> Vec<Record> {
    pcapng::read(&fs::read(file(world)).unwrap())
}

fn bpftool(arguments: &[&str], path: PathBuf) -> Value {
    let output = Command::new("bpftool").arg("-j").args(arguments).arg("pinned").arg(path).output().unwrap();
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"))
}

/// For each link, whether it has the program of its hook that is pinned: that for trunks, if its interface is one of these.
fn are_as_before(world: &World, trunks: &[&str]) -> Vec<bool> {
    let links = fs::read_dir(world.pins().join("links")).unwrap().map(|it| it.unwrap());
    let has = |link: fs::DirEntry| {
        let name = link.file_name().into_string().unwrap();
        let (interface, hook) = name.strip_suffix(":tcx").map_or((&*name, ""), |it| (it, "_tcx"));
        let trunk = if trunks.contains(&interface) { "_trunk" } else { "" };
        let program = world.pins().join("programs").join(format!("ingress{hook}{trunk}"));
        bpftool(&["link", "show"], link.path())["prog_id"] == bpftool(&["prog", "show"], program)["id"]
    };
    links.map(has).collect()
}

/// Whether every link has the program that is pinned; of these trunks, that for trunks.
pub fn is_as_before(world: &World, trunks: &[&str]) -> bool {
    are_as_before(world, trunks).iter().all(|it| *it)
}

/// Whether no link has.
pub fn is_captured(world: &World, trunks: &[&str]) -> bool {
    let links = are_as_before(world, trunks);
    !links.is_empty() && !links.iter().any(|it| *it)
}
