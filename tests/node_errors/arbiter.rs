//! What the arbiter says, and what it cannot write.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use mcd::control::status::State;

use super::environment::{Environment, FAILURE, Mount, REFUSED, fill_up, mount, run};
use super::etcd::{self, Etcd};
use super::process::Node;

/// Room for a record, its successor and little more.
const DISK_BYTES: u64 = 32 << 10;

fn small_disk(host: &Environment, fill: bool) -> Node {
    let mut node = host.primary_command(&[]);
    let fill = fill.then(|| host.arbiter().join("filler"));
    mount(&mut node.0, &[Mount::Small(host.arbiter(), DISK_BYTES)], fill);
    Node::start(node)
}

#[test]
fn a_full_arbiter_directory_starts_no_guest() {
    run("arbiter::a_full_arbiter_directory_starts_no_guest", |host| {
        small_disk(host, true).fails(FAILURE, &["no space left for arbiter record", "web.record", "make room"]);
        // Nothing is left in the way of the next one.
        // Its control socket answers before its guest starts.
        host.primary().wait_status("serving alone", |status| status.running && status.state == State::Solo);
    });
}

#[test]
fn a_full_arbiter_directory_prevents_protection_and_nothing_else() {
    run("arbiter::a_full_arbiter_directory_prevents_protection_and_nothing_else", |host| {
        let mut primary = small_disk(host, false);
        primary.wait_guest();
        // Its disk, seen from here.
        let root = PathBuf::from(format!("/proc/{}/root", primary.pid()));
        let arbiter = root.join(host.arbiter().strip_prefix("/").expect("an absolute path"));
        fill_up(&arbiter.join("filler")).expect("it is writable");

        let secondary = host.secondary(&[]);
        let alarmed = primary.wait_status("alarmed", |status| !status.alarms.is_empty());
        assert_eq!(alarmed.state, State::Resync, "{alarmed}");
        assert!(alarmed.running && !alarmed.protected && !alarmed.arbiter.reachable, "{alarmed}");
        assert!(alarmed.alarms.iter().any(|alarm| alarm.contains("no space left")), "{alarmed}");
        primary.wait_warning("MC_ARBITER_LOST");
        // Output is not held meanwhile: the newcomer's image is completed only when the pair can be
        // recorded.
        assert_eq!((alarmed.held_packets, secondary.status().state), (0, State::Resync));

        fs::remove_file(arbiter.join("filler")).expect("it is there");
        let well = primary.wait_state(State::Protected);
        assert!(well.alarms.is_empty() && well.arbiter.reachable, "{well}");
    });
}

#[test]
fn a_primary_is_refused_for_a_guest_on_record_elsewhere() {
    run("arbiter::a_primary_is_refused_for_a_guest_on_record_elsewhere", |host| {
        host.primary().kill();
        Node::start(host.primary_command(&[])).fails(REFUSED, &["guest 'web'", "running elsewhere", "mcd cold-start"]);
        let mut primary = Node::start(host.cold_start_command(&[]));
        primary.wait_guest();
        primary.assert_serves_alone();
        // An end in order is on record, so that the next start needs nobody's word.
        primary.terminate();
        primary.ends_well();
        let mut primary = host.primary();
        primary.quit();
        primary.ends_well();
        host.primary().assert_serves_alone();
    });
}

#[test]
fn an_arbiter_out_of_reach_starts_no_guest() {
    run("arbiter::an_arbiter_out_of_reach_starts_no_guest", |host| {
        let record = host.arbiter().join("web.record");
        fs::write(&record, "nonsense").expect("a file");
        Node::start(host.primary_command(&[])).fails(FAILURE, &["web.record is damaged", "restore it"]);
        fs::remove_file(&record).expect("a file");
        fs::remove_dir(host.arbiter()).expect("it is empty but for the record");
        Node::start(host.primary_command(&[])).fails(FAILURE, &["arbiter directory", "does not exist", "mount"]);
        fs::write(host.arbiter(), "").expect("a file");
        Node::start(host.primary_command(&[])).fails(FAILURE, &["arbiter"]);
    });
}

/// A fencing script; written by another process, for a file that a thread writes while another
/// starts a process cannot be run.
fn fence(host: &Environment, body: &str) -> String {
    let path = host.path("fence");
    let mut install = Command::new("install");
    install.args(["-m", "755", "/dev/stdin"]).arg(&path).stdin(Stdio::piped());
    let mut install = install.spawn().expect("install is there");
    write!(install.stdin.take().expect("a pipe"), "#!/bin/sh\n{body}\n").expect("it reads");
    assert!(install.wait().expect("it ends").success());
    format!("--arbiter=command:{}", path.display())
}

#[test]
fn a_fencing_script_decides_a_takeover() {
    run("arbiter::a_fencing_script_decides_a_takeover", |host| {
        let who = fence(host, "exit 1");
        Node::start(host.primary_command(&[&who])).fails(REFUSED, &["running elsewhere", "so says command:"]);
        fence(host, "echo the switch is mute; exit 2");
        Node::start(host.primary_command(&[&who])).fails(FAILURE, &["out of reach", "the switch is mute"]);
        // The operator's own word asks no script.
        let mut primary = Node::start(host.cold_start_command(&[&who]));
        primary.wait_guest();
        let mut secondary = host.secondary(&[&who]);
        primary.wait_state(State::Protected);
        // Nobody but the primary itself can tell the secondary that they are a pair.
        secondary.wait_status("protected", |status| status.protected);
        // While nobody knows, nobody runs the guest; and what that means is on the screen.
        primary.kill();
        let waiting = secondary.wait_status("alarmed", |status| !status.alarms.is_empty());
        assert!(!waiting.running && waiting.state == State::Suspecting && !waiting.arbiter.reachable, "{waiting}");
        assert!(waiting.alarms.iter().any(|alarm| alarm.contains("the switch is mute")), "{waiting}");
        secondary.wait_line("MC_ARBITER_LOST");
        let asked = host.path("asked");
        fence(host, &format!("echo $1 $2 > {}; exit 0", asked.display()));
        let alone = secondary.wait_status("running", |status| status.running);
        assert!(alone.takeover.is_some() && alone.alarms.is_empty() && alone.generation == 3, "{alone}");
        assert_eq!(fs::read_to_string(asked).expect("it was asked"), "takeover web\n");
    });
}

#[test]
fn an_unreachable_etcd_raises_an_alarm_and_its_record_decides_a_takeover() {
    run("arbiter::an_unreachable_etcd_raises_an_alarm_and_its_record_decides_a_takeover", |host| {
        if !etcd::installed() {
            return;
        }
        let directory = etcd::directory();
        let etcd = Etcd::alone(directory.path());
        let who = format!("--arbiter=etcd:{}/test", etcd.url);
        let more = [who.as_str(), "--arbiter-timeout-ms=1000"];
        let mut primary = Node::start(host.primary_command(&more));
        primary.wait_guest();
        let secondary = host.secondary(&more);
        primary.wait_state(State::Protected);
        etcd.signal(nix::sys::signal::Signal::SIGSTOP);
        for node in [&primary, &secondary] {
            let alarmed = node.wait_status("alarmed", |status| !status.alarms.is_empty());
            assert!(alarmed.protected && !alarmed.arbiter.reachable && alarmed.arbiter.kind == "etcd", "{alarmed}");
        }
        primary.wait_warning("MC_ARBITER_LOST");
        etcd.signal(nix::sys::signal::Signal::SIGCONT);
        for node in [&primary, &secondary] {
            node.wait_status("well", |status| status.alarms.is_empty() && status.arbiter.reachable);
        }
        primary.kill();
        let alone = secondary.wait_status("running", |status| status.running);
        assert!(alone.takeover.is_some() && alone.generation == 3, "{alone}");
        Node::start(host.primary_command(&more)).fails(REFUSED, &["running elsewhere", "g3"]);
    });
}
