//! The main job, on real traffic: two consumers with the same addresses, one provider with the same addresses again.

use crate::{Lack, build, is_root, run, setup};
use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

const NAMESPACES: [&str; 5] = ["pld-host", "pld-shop", "pld-bank", "pld-pay1", "pld-pay2"];
const PINS: &str = "/sys/fs/bpf/privatelink-demo";

const CONFIG: &str = r#"manage_peer_offloads = true

[vpcs.shop]                          # three VPCs, one and the same address space
account    = "111122223333"
cidrs      = ["10.0.0.0/16"]
interfaces = ["pld-shop"]

[vpcs.bank]
account    = "444455556666"
cidrs      = ["10.0.0.0/16"]
interfaces = ["pld-bank"]

[vpcs.payments]
account    = "999900001111"
cidrs      = ["10.0.0.0/16"]
interfaces = ["pld-pay1", "pld-pay2"]

[target_groups.web]
vpc          = "payments"
protocol     = "tcp"
port         = 8080
targets      = [{ address = "10.0.1.21", zone = "a" }, { address = "10.0.1.22", zone = "a" }]
health_check = { interval = "5s", timeout = "2s", healthy_threshold = 2, unhealthy_threshold = 2 }

[load_balancers.edge]
vpc       = "payments"
addresses = { a = "10.0.1.10" }
listeners = [{ protocol = "tcp", port = 80, target_group = "web" }]

[endpoint_services.payments]
load_balancers      = ["edge"]
acceptance_required = false
allowed_principals  = ["*"]

[endpoints.shop-to-payments]
vpc       = "shop"
service   = "payments"
addresses = { a = "10.0.9.9" }

[endpoints.bank-to-payments]
vpc       = "bank"
service   = "payments"
addresses = { a = "10.0.9.9" }
"#;

/// Set by an interrupt, which then ends the demo instead of killing it.
static INTERRUPTED: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);

/// What the demo made, and takes away again however it ends.
struct World {
    binary: PathBuf,
    dir: tempfile::TempDir,
    children: Vec<Child>,
}

impl Drop for World {
    fn drop(&mut self) {
        for child in &mut self.children {
            // It may be dead already, which is as good.
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = Command::new("nsenter")
            .arg("--net=/run/netns/pld-host")
            .arg(&self.binary)
            .args(["detach", "--pin-dir", PINS])
            .stdout(Stdio::null())
            .status();
        remove_namespaces();
    }
}

fn remove_namespaces() {
    for namespace in NAMESPACES.iter().filter(|it| Path::new("/run/netns").join(it).exists()) {
        let _ = Command::new("ip").args(["netns", "del", namespace]).status();
    }
}

fn title(text: &str) {
    println!("\n\x1b[1m## {text}\x1b[0m");
}

/// A command inside a namespace, which does not outlive this process.
fn inside(namespace: &str, program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", "nsenter"])
        .arg(format!("--net=/run/netns/{namespace}"))
        .arg(program);
    command
}

/// Runs a command line inside a namespace, after showing it.
fn show(namespace: &str, line: &str) -> Result<()> {
    println!("{namespace}$ {line}");
    run(inside(namespace, "sh").args(["-c", line]))?;
    not_interrupted()
}

fn not_interrupted() -> Result<()> {
    ensure!(!INTERRUPTED.load(Ordering::Relaxed), "interrupted");
    Ok(())
}

fn quiet(program: &str, arguments: &str) -> Result<()> {
    run(Command::new(program).args(arguments.split_whitespace()))
}

/// Shows it all.
pub(crate) fn demo() -> Result<()> {
    setup::everything()?;
    if !is_root()? {
        return Err(Lack::Privilege(
            "the demo makes network namespaces and loads programs, which needs root".into(),
        )
        .into());
    }
    let binary = build()?;
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&INTERRUPTED)).context("cannot wait for signals")?;
    }
    let started = Instant::now();
    // What a demo that was interrupted has left.
    if Path::new(PINS).exists() {
        run(Command::new(&binary).args(["detach", "--pin-dir", PINS]))?;
    }
    remove_namespaces();
    let dir = tempfile::tempdir().context("cannot make a temporary directory")?;
    let mut world = World { binary, dir, children: Vec::new() };
    world.networks()?;
    world.servers()?;
    world.agent()?;
    world.traffic()?;
    world.failure()?;
    world.tables()?;
    drop(world);
    println!("\nAll removed, after {} s.", started.elapsed().as_secs());
    Ok(())
}

impl World {
    fn networks(&self) -> Result<()> {
        title("Three private networks with the same addresses, and nothing between them");
        for namespace in NAMESPACES {
            quiet("ip", &format!("netns add {namespace}"))?;
        }
        let ends = [
            ("pld-shop", "10.0.1.5"),
            ("pld-bank", "10.0.1.5"),
            ("pld-pay1", "10.0.1.21"),
            ("pld-pay2", "10.0.1.22"),
        ];
        for (name, address) in ends {
            quiet("ip", &format!("link add {name} netns pld-host type veth peer name eth0 netns {name}"))?;
            quiet("ip", &format!("-n {name} addr add {address}/16 dev eth0"))?;
            quiet("ip", &format!("-n {name} link set eth0 up"))?;
            quiet("ip", &format!("-n pld-host link set {name} up"))?;
            println!("{name}: {address}/16");
        }
        Ok(())
    }

    fn servers(&mut self) -> Result<()> {
        title("Two nginx targets in the provider's network");
        for name in ["pld-pay1", "pld-pay2"] {
            let dir = self.dir.path().join(name);
            fs::create_dir_all(dir.join("html"))?;
            fs::write(dir.join("html/index.html"), format!("hello from {name}\n"))?;
            let dir = dir.display();
            let config = format!(
                "daemon off; master_process off; pid {dir}/pid; error_log stderr error; events {{}} http {{ access_log off; \
                 client_body_temp_path {dir}/t1; proxy_temp_path {dir}/t2; fastcgi_temp_path {dir}/t3; uwsgi_temp_path {dir}/t4; \
                 scgi_temp_path {dir}/t5; server {{ listen 8080; root {dir}/html; }} }}"
            );
            let file = self.dir.path().join(format!("{name}.conf"));
            fs::write(&file, config)?;
            let mut nginx = inside(name, "nginx");
            nginx.arg("-c").arg(&file);
            self.children.push(nginx.spawn().context("cannot start nginx")?);
            println!("{name}: nginx on port 8080");
        }
        Ok(())
    }

    fn places(&self) -> String {
        let dir = self.dir.path().display();
        format!("--runtime-dir {dir}/run --pin-dir {PINS} --state-dir {dir}/state")
    }

    fn agent(&mut self) -> Result<()> {
        title("The agent, with this configuration");
        println!("{CONFIG}");
        let file = self.dir.path().join("privatelink.toml");
        fs::write(&file, CONFIG)?;
        let mut agent = inside("pld-host", &self.binary);
        agent.args(["run", "--config"]).arg(&file);
        agent.args(self.places().split_whitespace());
        println!("pld-host$ privatelink run --config privatelink.toml");
        self.children.push(agent.spawn().context("cannot start the agent")?);
        self.await_targets("both targets are healthy", |states| states.iter().all(|state| state == "healthy"))
    }

    fn targets(&self) -> Result<Vec<String>> {
        let mut command = Command::new(&self.binary);
        let output = command.args(["targets", "--json"]).args(self.places().split_whitespace()).output()?;
        let rows: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let states =
            rows.as_array().into_iter().flatten().filter_map(|row| row["state"].as_str().map(str::to_owned));
        Ok(states.collect())
    }

    fn await_targets(&self, what: &str, good: impl Fn(&[String]) -> bool) -> Result<()> {
        let until = Instant::now() + Duration::from_secs(30);
        while Instant::now() < until {
            not_interrupted()?;
            let states = self.targets()?;
            if !states.is_empty() && good(&states) {
                println!("{what}");
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        bail!("not within 30 s: {what}; the targets are {:?}", self.targets()?)
    }

    fn privatelink(&self, line: &str) -> Result<()> {
        println!("$ privatelink {line}");
        run(Command::new(&self.binary).args(line.split_whitespace()).args(self.places().split_whitespace()))
    }

    fn traffic(&self) -> Result<()> {
        title("Both consumers fetch a page from the same address, each in its own network");
        for consumer in ["pld-shop", "pld-bank"] {
            show(consumer, "curl -sS --max-time 5 http://10.0.9.9/")?;
        }
        title("At the same moment, from the same source address and the same source port");
        let line = "curl -sS --max-time 5 --local-port 40000 http://10.0.9.9/";
        let mut pair = Vec::new();
        for consumer in ["pld-shop", "pld-bank"] {
            println!("{consumer}$ {line}");
            let mut curl = inside(consumer, "sh");
            curl.args(["-c", line]);
            pair.push(curl.spawn().context("cannot start curl")?);
        }
        for mut curl in pair {
            ensure!(curl.wait()?.success(), "a request failed");
        }
        self.privatelink("flows")
    }

    fn failure(&mut self) -> Result<()> {
        title("One target dies");
        let target = self.children.first_mut().context("no target")?;
        println!("$ kill {}   # the nginx of pld-pay1", target.id());
        target.kill()?;
        target.wait()?;
        self.await_targets("the agent has noticed", |states| {
            states.iter().any(|state| state == "unhealthy")
        })?;
        self.privatelink("targets")?;
        for _ in 0..3 {
            show("pld-shop", "curl -sS --max-time 5 http://10.0.9.9/")?;
        }
        Ok(())
    }

    fn tables(&self) -> Result<()> {
        title("What does not belong is dropped, and counted");
        let _ = show("pld-shop", "curl -sS --max-time 1 http://10.0.9.9:81/ || true");
        let _ = show("pld-pay2", "curl -sS --max-time 1 http://10.0.1.10/ || true");
        self.privatelink("drops")?;
        self.privatelink("explain --from bank tcp 10.0.1.5:40001 10.0.9.9:80")?;
        title("The maps are there to look at");
        println!("$ bpftool map dump pinned {PINS}/maps/established | head -24");
        let output = Command::new("bpftool")
            .args(["map", "dump", "pinned"])
            .arg(format!("{PINS}/maps/established"))
            .output()?;
        for line in String::from_utf8_lossy(&output.stdout).lines().take(24) {
            println!("{line}");
        }
        Ok(())
    }
}
