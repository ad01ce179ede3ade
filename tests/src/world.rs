//! Two consumers with the same addresses, a provider with the same addresses again, and the built binary between them.

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

static WORLDS: AtomicU32 = AtomicU32::new(0);

/// The namespaces of a world, the agent's first.
const ENDS: [(&str, &str); 4] =
    [("ca", "10.0.1.5"), ("cb", "10.0.1.5"), ("t1", "10.0.1.21"), ("t2", "10.0.1.22")];

/// A world, which is gone when it is dropped.
#[derive(Debug)]
pub struct World {
    id: String,
    pub dir: tempfile::TempDir,
    agent: Option<Child>,
    children: Vec<Child>,
}

/// The usual configuration; `extra` goes before its tables, `checks` is the target group's health check.
pub fn config(extra: &str, checks: &str) -> String {
    format!(
        r#"manage_peer_offloads = true
{extra}
[vpcs.shop]
account = "111122223333"
cidrs = ["10.0.0.0/16"]
interfaces = ["ca"]
[vpcs.bank]
account = "444455556666"
cidrs = ["10.0.0.0/16"]
interfaces = ["cb"]
[vpcs.payments]
account = "999900001111"
cidrs = ["10.0.0.0/16"]
interfaces = ["t1", "t2"]
[target_groups.web]
vpc = "payments"
protocol = "tcp_udp"
port = 8080
targets = [{{ address = "10.0.1.21", zone = "a" }}, {{ address = "10.0.1.22", zone = "a" }}]
health_check = {{ {checks} }}
[load_balancers.edge]
vpc = "payments"
addresses = {{ a = "10.0.1.10" }}
listeners = [{{ protocol = "tcp", port = 80, target_group = "web" }}, {{ protocol = "udp", port = 53, target_group = "web" }}]
[endpoint_services.payments]
load_balancers = ["edge"]
acceptance_required = false
allowed_principals = ["111122223333", "arn:aws:iam::444455556666:root"]
[endpoints.shop]
vpc = "shop"
service = "payments"
addresses = {{ a = "10.0.9.9" }}
[endpoints.bank]
vpc = "bank"
service = "payments"
addresses = {{ a = "10.0.9.9" }}
"#
    )
}

/// The same with both families: port 80 leads to IPv4 targets, port 81 to IPv6 ones.
pub fn dualstack(extra: &str, checks: &str) -> String {
    let udp = r#", { protocol = "udp", port = 53, target_group = "web" }"#;
    let six = r#", { protocol = "tcp_udp", port = 81, target_group = "web6" }"#;
    let group = format!(
        r#"[target_groups.web6]
vpc = "payments"
protocol = "tcp_udp"
ip_address_type = "ipv6"
port = 8080
targets = [{{ address = "fd00::21", zone = "a" }}, {{ address = "fd00::22", zone = "a" }}]
health_check = {{ {checks} }}
[load_balancers.edge]"#
    );
    config(extra, checks)
        .replace(r#"["10.0.0.0/16"]"#, r#"["10.0.0.0/16", "fd00::/64"]"#)
        .replace(udp, six)
        .replace("[load_balancers.edge]", &group)
        .replace(r#"{ a = "10.0.1.10" }"#, r#"{ a = ["10.0.1.10", "fd00::10"] }"#)
        .replace(r#"{ a = "10.0.9.9" }"#, r#"{ a = ["10.0.9.9", "fd00::99"] }"#)
        .replace(
            "acceptance_required",
            "supported_ip_address_types = [\"ipv4\", \"ipv6\"]\nacceptance_required",
        )
}

/// Health checks that leave packet counters alone.
pub const UNCHECKED: &str = "enabled = false";
/// Health checks as quick as they may be.
pub const CHECKED: &str =
    r#"interval = "5s", timeout = "2s", healthy_threshold = 2, unhealthy_threshold = 2"#;

fn ip(line: &str) {
    let status = Command::new("ip").args(line.split_whitespace()).status().unwrap();
    assert!(status.success(), "ip {line}");
}

/// Waits until `condition` gives something, and fails with `what` after a while.
pub fn eventually<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + Duration::from_secs(40);
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < until, "not within 40 s: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

pub fn binary() -> PathBuf {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/release/privatelink");
    std::env::var_os("PRIVATELINK_BIN").map_or(built, PathBuf::from)
}

/// Removes what a run that was killed has left: its process is gone, so no one else will.
fn remove_stale() {
    let owner = |name: &str| u32::from_str_radix(name.strip_prefix("plt-")?.split('-').next()?, 16).ok();
    let dead = |name: &str| owner(name).is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists());
    let names = |dir: &str| -> Vec<String> {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    };
    for name in names("/sys/fs/bpf").iter().filter(|name| dead(name)) {
        let _ = Command::new(binary()).args(["detach", "--pin-dir", &format!("/sys/fs/bpf/{name}")]).output();
    }
    for name in names("/run/netns").iter().filter(|name| dead(name)) {
        let _ = Command::new("ip").args(["netns", "del", name]).status();
    }
}

impl World {
    /// Makes the namespaces, starts the agent with this configuration, and waits until packets can flow.
    pub fn new(config: &str) -> Self {
        let mut world = Self::bare(config);
        world.start(&[]);
        world
    }

    /// Makes the namespaces, without an agent.
    pub fn bare(config: &str) -> Self {
        remove_stale();
        let id = format!("plt-{:x}-{:x}", std::process::id(), WORLDS.fetch_add(1, Ordering::Relaxed));
        let world = Self { id, dir: tempfile::tempdir().unwrap(), agent: None, children: Vec::new() };
        for name in ["dp"].into_iter().chain(ENDS.map(|(name, _)| name)) {
            ip(&format!("netns add {}", world.namespace(name)));
            world.shell(
                name,
                // Small buffers: a slow transfer is one that still needs packets, and not one that waits in the reader's kernel as a whole.
                "sysctl -qw net.ipv6.conf.default.disable_ipv6=1 net.ipv4.tcp_congestion_control=reno \
                 net.ipv4.tcp_rmem='4096 131072 524288'",
            );
        }
        for (name, address) in ENDS {
            world.plug(name, address);
        }
        fs::write(world.config(), config).unwrap();
        world
    }

    /// The same, where some ends have IPv6 addresses beside the others: fd00::5, fd00::21 and so on. Hosts with IPv6 say this and that
    /// to their link by themselves; what targets ask is put off until the test is over.
    pub fn dualstack(config: &str, ends: &[&str]) -> Self {
        let mut world = Self::bare(config);
        for (name, address) in ENDS.into_iter().filter(|(name, _)| ends.contains(name)) {
            let last = address.rsplit('.').next().unwrap();
            world.shell(
                name,
                &format!(
                    "sysctl -qw net.ipv6.conf.eth0.accept_ra=0 net.ipv6.neigh.eth0.delay_first_probe_time=600 \
                     net.ipv6.conf.eth0.disable_ipv6=0 && \
                     ip addr add fd00::{last}/64 dev eth0 nodad"
                ),
            );
        }
        world.start(&[]);
        world
    }

    /// Makes the link of one end.
    pub fn plug(&self, name: &str, address: &str) {
        let (host, end) = (self.namespace("dp"), self.namespace(name));
        ip(&format!("link add {name} netns {host} type veth peer name eth0 netns {end}"));
        ip(&format!("-n {end} addr add {address}/16 dev eth0"));
        ip(&format!("-n {end} link set eth0 up"));
        ip(&format!("-n {host} link set {name} up"));
    }

    pub fn namespace(&self, name: &str) -> String {
        format!("{}-{name}", self.id)
    }

    pub fn config(&self) -> PathBuf {
        self.dir.path().join("privatelink.toml")
    }

    pub fn pins(&self) -> PathBuf {
        Path::new("/sys/fs/bpf").join(&self.id)
    }

    /// Where this world's agent has what it has, as it is told.
    pub fn places(&self) -> Vec<String> {
        let run = self.dir.path().join("run").display().to_string();
        let (pins, state) =
            (self.pins().display().to_string(), self.dir.path().join("state").display().to_string());
        ["--runtime-dir", &run, "--pin-dir", &pins, "--state-dir", &state].map(str::to_owned).to_vec()
    }

    /// A command inside a namespace.
    pub fn inside(&self, name: &str, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("setpriv");
        // Whatever is started ends with the test that started it, also when that is killed.
        command.args(["--pdeathsig", "KILL", "nsenter"]);
        command.arg(format!("--net=/run/netns/{}", self.namespace(name))).arg(program);
        command
    }

    /// Runs a shell's line inside a namespace, and returns what it prints; fails where it fails.
    pub fn shell(&self, name: &str, line: &str) -> String {
        let output = self.inside(name, "sh").args(["-c", line]).output().unwrap();
        let (out, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{name}$ {line}\n{out}{error}");
        out.into_owned()
    }

    /// Starts something that ends with the world; returns its place among the children.
    pub fn spawn(&mut self, name: &str, program: &str, arguments: &[&str]) -> usize {
        let mut command = self.inside(name, program);
        self.children
            .push(command.args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
        self.children.len() - 1
    }

    pub fn kill(&mut self, child: usize) {
        self.children[child].kill().unwrap();
        self.children[child].wait().unwrap();
    }

    /// Waits for a child, and says whether it succeeded.
    pub fn finished(&mut self, child: usize) -> bool {
        self.children[child].wait().unwrap().success()
    }

    /// Makes a target's health check by HTTP fail, or succeed again; what else it serves goes on.
    pub fn set_up(&self, name: &str, up: bool) {
        let file = self.dir.path().join(name).join("up");
        if up { fs::write(file, "").unwrap() } else { fs::remove_file(file).unwrap() }
    }

    /// A web server on port 8080, and with TLS on 8443, that says which target it is.
    pub fn serve(&mut self, name: &str) -> usize {
        let dir = self.dir.path().join(name);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("index.html"), name).unwrap();
        fs::write(dir.join("large"), vec![b'x'; 20 << 20]).unwrap();
        fs::write(dir.join("up"), "").unwrap();
        let certificate = Command::new("openssl")
            .args([
                "req",
                "-x509",
                "-newkey",
                "rsa:2048",
                "-nodes",
                "-days",
                "1",
                "-subj",
                "/CN=nobody.invalid",
            ])
            .args(["-keyout", "key", "-out", "certificate"])
            .current_dir(&dir)
            .output()
            .unwrap();
        assert!(certificate.status.success(), "{certificate:?}");
        let dir = dir.display();
        let config = format!(
            "daemon off; master_process off; pid {dir}/pid; error_log stderr error; events {{}} http {{ access_log off; \
             client_body_temp_path {dir}/1; proxy_temp_path {dir}/2; fastcgi_temp_path {dir}/3; uwsgi_temp_path {dir}/4; \
             scgi_temp_path {dir}/5; server {{ listen 8080; listen [::]:8080; \
             listen 8443 ssl; listen [::]:8443 ssl; ssl_certificate {dir}/certificate; ssl_certificate_key {dir}/key; root {dir}; \
             location = /client {{ return 200 $remote_addr:$remote_port; }} }} }}"
        );
        let file = self.dir.path().join(format!("{name}.conf"));
        fs::write(&file, config).unwrap();
        let child = self.spawn(name, "nginx", &["-c", &file.display().to_string()]);
        eventually("nginx listens", || {
            let listening = self.shell(name, "ss -Hltn sport = :8080");
            (!listening.is_empty()).then_some(())
        });
        child
    }

    /// Starts the agent with these arguments, and waits until packets can flow.
    pub fn start(&mut self, arguments: &[&str]) {
        self.run(arguments);
        eventually("the targets' link-layer addresses are known", || {
            let targets = self.json("targets");
            targets.as_array()?.iter().all(|target| target["mac"].is_string()).then_some(())
        });
        eventually("every interface is attached, and its other end ready", || {
            let status = self.json("status");
            let ready = |row: &Value| row["state"] == "attached" && row["problem"].is_null();
            status[0]["interfaces"].as_array()?.iter().all(ready).then_some(())
        });
    }

    /// Starts the agent with these arguments, and waits until it says that it is ready.
    pub fn run(&mut self, arguments: &[&str]) {
        let log = fs::File::create(self.log()).unwrap();
        let mut command = self.inside("dp", binary());
        command
            .args(["run", "--config"])
            .arg(self.config())
            .args(self.places())
            .args(arguments)
            .stderr(log)
            .stdout(Stdio::null());
        self.agent = Some(command.spawn().unwrap());
        eventually("the agent is ready", || {
            let log = fs::read_to_string(self.log()).unwrap();
            assert!(self.agent.as_mut().unwrap().try_wait().unwrap().is_none(), "the agent ended:\n{log}");
            log.contains("privatelink: ready").then_some(())
        });
    }

    fn log(&self) -> PathBuf {
        self.dir.path().join("agent.log")
    }

    /// What the agent has said so far.
    pub fn said(&self) -> String {
        fs::read_to_string(self.log()).unwrap()
    }

    /// Runs `work` on a thread of its own inside a namespace.
    pub fn thread<T: Send + 'static>(
        &self,
        name: &str,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> std::thread::JoinHandle<T> {
        let namespace = fs::File::open(format!("/run/netns/{}", self.namespace(name))).unwrap();
        std::thread::spawn(move || {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            work()
        })
    }

    /// Runs a command inside a namespace beside the test; its thread returns what it prints.
    pub fn beside(&self, name: &str, program: &str, arguments: &[&str]) -> std::thread::JoinHandle<String> {
        let mut command = self.inside(name, program);
        command.args(arguments);
        std::thread::spawn(move || {
            let output = command.output().unwrap();
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
        })
    }

    /// The process of a child, for its namespaces.
    pub fn pid(&self, child: usize) -> u32 {
        self.children[child].id()
    }

    /// Tells the agent to stop, waits for it, and returns its exit status.
    pub fn stop(&mut self) -> Option<i32> {
        self.signal("-TERM");
        self.agent.take().unwrap().wait().unwrap().code()
    }

    pub fn signal(&self, signal: &str) {
        let pid = self.agent.as_ref().unwrap().id().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
    }

    /// kill -9.
    pub fn kill_agent(&mut self) {
        let mut agent = self.agent.take().unwrap();
        agent.kill().unwrap();
        agent.wait().unwrap();
    }

    /// A command of ours in the agent's namespace.
    pub fn command(&self, arguments: &[&str]) -> Command {
        self.command_at("dp", arguments)
    }

    fn command_at(&self, name: &str, arguments: &[&str]) -> Command {
        let mut command = self.inside(name, binary());
        command.args(arguments).args(self.places());
        command
    }

    /// Runs a command of ours in the agent's namespace.
    pub fn privatelink(&self, arguments: &[&str]) -> Output {
        self.privatelink_at("dp", arguments)
    }

    /// Runs a command of ours in one of the namespaces.
    pub fn privatelink_at(&self, name: &str, arguments: &[&str]) -> Output {
        self.command_at(name, arguments).output().unwrap()
    }

    pub fn json(&self, verb: &str) -> Value {
        let output = self.privatelink(&[verb, "--json"]);
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{verb}: {output:?}"))
    }

    /// Applies a configuration; returns the exit status and what it said.
    pub fn apply(&self, config: &str) -> (Option<i32>, String) {
        let file = self.dir.path().join("next.toml");
        fs::write(&file, config).unwrap();
        let output = self.privatelink(&["apply", &file.display().to_string()]);
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr),
        )
    }

    pub fn fetch(&self, consumer: &str, path: &str) -> String {
        self.shell(consumer, &format!("curl -sS --max-time 5 http://10.0.9.9/{path}"))
    }

    /// Everything that is counted, and how many entries the tables have. What passes in the provider's VPC is left out: the agent's
    /// own ARP is among it.
    pub fn state(&self) -> BTreeMap<String, u64> {
        let mut state = BTreeMap::new();
        let status = self.json("status")[0].clone();
        for row in status["outcomes"].as_array().unwrap() {
            let (vpc, outcome) = (row["vpc"].as_str().unwrap(), row["outcome"].as_str().unwrap());
            if (vpc, outcome) != ("payments", "passed") {
                state.insert(format!("{vpc} {outcome}"), row["packets"].as_u64().unwrap());
            }
        }
        for row in status["maps"].as_array().unwrap() {
            state.insert(format!("map {}", row["map"].as_str().unwrap()), row["used"].as_u64().unwrap());
        }
        for row in self.json("endpoints").as_array().unwrap() {
            for count in ["to_provider_packets", "to_consumer_packets", "new_flows", "resets"] {
                let ipv6 = row["address"].as_str().unwrap().contains(':');
                let name = row["endpoint"].as_str().unwrap().to_owned() + if ipv6 { "6" } else { "" };
                state.insert(format!("{name} {count}"), row[count].as_u64().unwrap());
            }
        }
        state
    }
}

/// What differs between two states; what is not in it has not changed.
pub fn changes(before: &BTreeMap<String, u64>, after: &BTreeMap<String, u64>) -> Vec<(String, i64)> {
    let keys: std::collections::BTreeSet<_> = before.keys().chain(after.keys()).collect();
    let value =
        |state: &BTreeMap<String, u64>, key| i64::try_from(state.get(key).copied().unwrap_or(0)).unwrap();
    let differences = keys.into_iter().map(|key| (key.clone(), value(after, key) - value(before, key)));
    differences.filter(|(_, change)| *change != 0).collect()
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the agent said:\n{}", fs::read_to_string(self.log()).unwrap_or_default());
        }
        for child in self.agent.iter_mut().chain(&mut self.children) {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = self.privatelink(&["detach"]);
        for name in ["dp"].into_iter().chain(ENDS.map(|(name, _)| name)) {
            let _ = Command::new("ip")
                .args(["netns", "del", &self.namespace(name)])
                .stderr(Stdio::null())
                .status();
        }
    }
}
