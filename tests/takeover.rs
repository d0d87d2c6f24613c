//! Real nodes, unmodified clients, and a host that dies under them.

use std::io::Read;
use std::process::{Child, Command, Stdio};

use mcd::control::status::{NodeStatus, State};
use mcd::testbed::namespaces::{GUEST_IPV4, HostName, Namespaces, find_tool};
use mcd::testbed::nodes::{Node, NodeSettings, RunDir, StartAs};
use mcd::testbed::require::{NODE_DEVICES, with_rights};

/// Epochs a pair commits before its primary is killed: enough that the benchmark is in the middle
/// of something.
const EPOCHS_BETWEEN_KILLS: u64 = 300;
const REQUESTS: &str = "20000";

/// Runs `body`, the body of the test `name`, where there are KVM, namespaces and redis-tools.
fn with_redis_tools(name: &str, body: impl FnOnce()) {
    if let Some(tool) = ["redis-cli", "redis-benchmark"].into_iter().find(|tool| find_tool(tool).is_none()) {
        println!("skipped: {tool} is not installed: make setup");
        return;
    }
    with_rights(name, NODE_DEVICES, body);
}

struct Pair {
    namespaces: Namespaces,
    settings: NodeSettings,
    dir: RunDir,
    primary: Node,
    secondary: Node,
    started: u32,
}

impl Pair {
    fn start(cpus: u8) -> Pair {
        let namespaces = Namespaces::new().expect("namespaces");
        let settings = NodeSettings {
            program: vec![env!("CARGO_BIN_EXE_mcd").into()],
            memory_mib: 64,
            cpus,
            interval_ms: 10,
            // A node that is killed is missed at once, by its sockets. One that a busy test host
            // freezes is not to be.
            flags: ["--heartbeat-interval-ms=200", "--heartbeat-timeout-ms=20000"].map(str::to_owned).to_vec(),
            ..NodeSettings::default()
        };
        let dir = RunDir::new().expect("a directory");
        let mut primary =
            Node::start(StartAs::Primary, HostName::A, "n0", &settings, &namespaces, &dir).expect("a primary");
        primary.wait_status("run the guest", |status| status.running).unwrap();
        let secondary =
            Node::start(StartAs::Secondary, HostName::B, "n1", &settings, &namespaces, &dir).expect("a secondary");
        let mut pair = Pair { namespaces, settings, dir, primary, secondary, started: 2 };
        pair.wait_protected();
        pair
    }

    fn wait_protected(&mut self) -> NodeStatus {
        self.primary.wait_status("be protected", |status| status.protected).unwrap()
    }

    /// Kills the primary, and protects the guest again where it goes on.
    fn kill_and_protect_again(&mut self) {
        let host = self.primary.host();
        self.primary.kill().expect("a process to kill");
        let status =
            self.secondary.wait_status("take over", |status| status.running && status.takeover.is_some()).unwrap();
        let takeover = status.takeover.expect("it was waited for");
        assert!(takeover.clock_forward_ms > 0.0 && takeover.clock_behind_ms == 0.0, "{takeover:?}");
        // The tap is free once the dead process is gone.
        self.primary.wait_ended().unwrap();
        let name = format!("n{}", self.started);
        self.started += 1;
        let newcomer = Node::start(StartAs::Secondary, host, &name, &self.settings, &self.namespaces, &self.dir);
        let survivor = std::mem::replace(&mut self.secondary, newcomer.expect("a newcomer"));
        self.primary = survivor;
        self.wait_protected();
    }

    fn client(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = self.namespaces.lan.command(find_tool(program).expect("checked above"));
        command.args(["-h", &GUEST_IPV4.to_string()]).args(arguments);
        command
    }

    fn redis_cli(&self, arguments: &[&str]) -> String {
        let output = self.client("redis-cli", arguments).output().expect("redis-cli runs");
        assert!(output.status.success(), "redis-cli {arguments:?}: {output:?}");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// Waits until so many more epochs are committed, or the client has ended.
    fn commit_epochs(&mut self, more: u64, client: &mut Child) -> bool {
        let before = self.primary.status().expect("a status").epochs.committed;
        let mut ended = false;
        self.primary
            .wait_status("commit epochs", |status| {
                ended = client.try_wait().expect("a child").is_some();
                ended || status.epochs.committed >= before + more
            })
            .unwrap();
        !ended
    }
}

/// Runs redis-benchmark while primaries are killed; its counter must be exact afterwards. Gives
/// back how many were killed.
fn benchmark_survives(pair: &mut Pair, arguments: &[&str]) -> u32 {
    pair.redis_cli(&["FLUSHALL"]);
    let mut all = vec!["-t", "ping,set,get,incr", "-c", "20", "-n", REQUESTS, "--csv"];
    all.extend(arguments);
    let mut benchmark =
        pair.client("redis-benchmark", &all).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it runs");
    let mut kills = 0;
    while kills < 3 && pair.commit_epochs(EPOCHS_BETWEEN_KILLS, &mut benchmark) {
        pair.kill_and_protect_again();
        kills += 1;
    }
    let status = benchmark.wait().expect("a child");
    let (mut out, mut err) = (String::new(), String::new());
    benchmark.stdout.take().expect("a pipe").read_to_string(&mut out).expect("text");
    benchmark.stderr.take().expect("a pipe").read_to_string(&mut err).expect("text");
    assert!(status.success(), "redis-benchmark failed: {status}\n{out}\n{err}");
    assert!(!format!("{out}{err}").to_lowercase().contains("err"), "redis-benchmark met an error:\n{out}\n{err}");
    for test in ["PING_INLINE", "PING_MBULK", "SET", "GET", "INCR"] {
        assert!(out.contains(&format!("\"{test}\"")), "{test} is missing:\n{out}");
    }
    assert_eq!(pair.redis_cli(&["GET", "counter:__rand_int__"]), REQUESTS, "every INCR counted exactly once");
    kills
}

#[test]
fn an_unmodified_benchmark_does_not_notice_that_hosts_die() {
    with_redis_tools("an_unmodified_benchmark_does_not_notice_that_hosts_die", || {
        let mut pair = Pair::start(1);
        let kills = benchmark_survives(&mut pair, &[]);
        assert!(kills >= 1, "the benchmark ended before a primary was killed");
        benchmark_survives(&mut pair, &["-P", "16"]);
        let status = pair.wait_protected();
        assert_eq!(status.state, State::Protected);
    });
}

#[test]
fn two_vcpus_and_a_guest_that_writes_all_the_time_survive_as_well() {
    with_redis_tools("two_vcpus_and_a_guest_that_writes_all_the_time_survive_as_well", || {
        let mut pair = Pair::start(2);
        assert_eq!(pair.redis_cli(&["DIRTY", "500", "20000"]), "OK");
        for round in 1..=3 {
            let value = format!("value {round}");
            assert_eq!(pair.redis_cli(&["SET", "key", &value]), "OK");
            pair.kill_and_protect_again();
            assert_eq!(pair.redis_cli(&["GET", "key"]), value);
            assert_eq!(pair.redis_cli(&["INCR", "rounds"]), round.to_string());
        }
    });
}
