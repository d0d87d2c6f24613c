//! The demo as a person meets it: it ends well, and whatever ends it leaves nothing behind.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use mcd::control::Client;
use mcd::control::status::{NodeStatus, Role};
use mcd::testbed::wait::WAIT_MAX;
use mcd::testbed::{namespaces, require};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Whether this host can run the demo; else the test is skipped.
fn can_run() -> bool {
    let tool = || namespaces::find_tool("ip").map(drop).ok_or_else(|| "no command ip".to_owned());
    let able = require::devices(require::NODE_DEVICES).and_then(|()| require::namespaces()).and_then(|()| tool());
    if let Err(why) = &able {
        require::skip(require::REQUIRE_KVM, why);
    }
    able.is_ok()
}

fn demo(dir: &Path, flags: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mcd"));
    command.arg("demo").args(flags).env("TMPDIR", dir).stdin(Stdio::null()).stdout(Stdio::piped());
    command
}

/// Starts the demo and reads what it says until a line holds `part`. All it says is passed on, for
/// whoever reads of a failure.
fn start_and_wait_for(dir: &Path, flags: &[&str], part: &str) -> Child {
    let mut child = demo(dir, flags).stderr(Stdio::inherit()).spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut lines = lines.map(|line| line.unwrap()).inspect(|line| eprintln!("{line}"));
    assert!(lines.any(|line| line.contains(part)), "it ended without a word of `{part}`");
    // The rest is read too: a closed pipe is not what is tested here.
    std::thread::spawn(move || lines.for_each(drop));
    child
}

/// Processes, other than zombies, with `dir` in their command line: the nodes are told their files'
/// names.
fn processes_of(dir: &Path) -> Vec<(Pid, String)> {
    let dir = dir.to_str().unwrap();
    let entries = fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let path = entry.ok()?.path();
        let line = String::from_utf8_lossy(&fs::read(path.join("cmdline")).ok()?).replace('\0', " ");
        Some((Pid::from_raw(path.file_name()?.to_str()?.parse().ok()?), line))
    });
    entries.filter(|(_, line)| line.contains(dir)).collect()
}

/// One node of a demo.
struct Node {
    control: PathBuf,
    /// Its process and its memory holder process, which has the same command line.
    processes: Vec<Pid>,
}

impl Node {
    fn status(&self) -> Option<NodeStatus> {
        Client::connect(&self.control, WAIT_MAX).ok()?.status(WAIT_MAX).ok()
    }

    fn until(&self, reached: impl Fn(&NodeStatus) -> bool) {
        let deadline = Instant::now() + WAIT_MAX;
        while !self.status().is_some_and(|status| reached(&status)) {
            assert!(Instant::now() < deadline, "{}: {:?}", self.control.display(), self.status());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// The demo's nodes, the one that runs the guest first. On a busy machine that need not be the one
/// that booted it.
fn the_pair(dir: &Path) -> (Node, Node) {
    let deadline = Instant::now() + WAIT_MAX;
    loop {
        let mut nodes: Vec<Node> = Vec::new();
        for (pid, line) in processes_of(dir) {
            let mut words = line.split(' ').skip_while(|word| *word != "--control");
            let Some(control) = words.nth(1).map(PathBuf::from) else { continue };
            match nodes.iter_mut().find(|node| node.control == control) {
                Some(node) => node.processes.push(pid),
                None => nodes.push(Node { control, processes: vec![pid] }),
            }
        }
        nodes.sort_by_key(|node| node.status().is_none_or(|status| status.role != Role::Primary));
        if let Ok([primary, secondary]) = <[Node; 2]>::try_from(nodes)
            && [&primary, &secondary].iter().all(|node| node.status().is_some_and(|status| status.protected))
        {
            return (primary, secondary);
        }
        assert!(Instant::now() < deadline, "there is no protected pair");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn until_gone(dir: &Path) {
    let deadline = Instant::now() + WAIT_MAX;
    while let Some((_, process)) = processes_of(dir).first() {
        assert!(Instant::now() < deadline, "left behind: {process}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn end(mut child: Child, signal: Signal) -> ExitStatus {
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), signal).unwrap();
    child.wait().unwrap()
}

#[test]
fn no_client_notices_and_nothing_is_left_behind() {
    if !can_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let json = dir.path().join("report.json");
    let flags = ["--rounds=2", "--connections=6", "--cpus=2", "--dirty=200,2000", "--json", json.to_str().unwrap()];
    let output = demo(dir.path(), &flags).stderr(Stdio::piped()).output().unwrap();
    let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}\n{complained}");
    let report: serde_json::Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
    assert_eq!(report["ok"], true, "{report:#}");
    assert_eq!(report["rounds"].as_array().unwrap().len(), 2);
    assert_eq!(report["client"]["connections"], 7);
    assert_eq!(report["client"]["requests"], report["client"]["replies"]);
    for count in ["lost_writes", "wrong_replies", "resets", "silent"] {
        assert_eq!(report["client"][count], 0, "{count}");
    }
    for number in
        ["/client/acknowledged_writes", "/epochs/committed", "/epochs/pause_us/p50", "/latency_us/protected/p50"]
    {
        assert!(report.pointer(number).unwrap().as_u64().unwrap() > 0, "{number}");
    }
    until_gone(dir.path());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "more than the report is left");
}

#[test]
fn an_interrupt_ends_the_demo_and_leaves_nothing_behind() {
    if !can_run() {
        return;
    }
    for (signal, moment) in [(Signal::SIGINT, "nothing protects it yet"), (Signal::SIGTERM, "every reply is checked")] {
        let dir = tempfile::tempdir().unwrap();
        let child = start_and_wait_for(dir.path(), &["--rounds=100"], moment);
        assert_eq!(end(child, signal).code(), Some(130));
        until_gone(dir.path());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "files are left");
    }
}

#[test]
fn killing_the_demo_kills_its_nodes() {
    if !can_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let child = start_and_wait_for(dir.path(), &["--rounds=100"], "protected:");
    assert!(processes_of(dir.path()).len() >= 2);
    end(child, Signal::SIGKILL);
    until_gone(dir.path());
}

#[test]
fn the_demo_survives_a_takeover_that_it_did_not_cause() {
    if !can_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let json = dir.path().join("report.json");
    let flags = ["--rounds=1", "--connections=4", "--json", json.to_str().unwrap()];
    let mut child = start_and_wait_for(dir.path(), &flags, "every reply is checked");
    let (primary, secondary) = the_pair(dir.path());
    // It may be dead by the time it is to go on: the demo ends a primary that was given up.
    let tell = |signal| {
        for pid in &primary.processes {
            let _ = kill(*pid, signal);
        }
    };
    tell(Signal::SIGSTOP);
    secondary.until(|status| status.role == Role::Primary);
    // Now it must find out that it is no longer the one.
    tell(Signal::SIGCONT);
    assert!(child.wait().unwrap().success());
    let report: serde_json::Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
    assert_eq!(report["ok"], true, "{report:#}");
    assert_eq!(report["rounds"].as_array().unwrap().len(), 1);
    assert!(report["unplanned_takeovers"].as_u64().unwrap() >= 1, "{report:#}");
    until_gone(dir.path());
}
