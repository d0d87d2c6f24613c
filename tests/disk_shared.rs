//! A guest whose disk is on storage that both hosts share: nothing of an epoch is there before it
//! is committed, nothing committed is lost, and only the holder of the disk's lock writes.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;

use mcd::control::status::{NodeStatus, Role, State};
use mcd::testbed::guest_client::GuestClient;
use mcd::testbed::namespaces::{HostName, Namespaces};
use mcd::testbed::nodes::{Node, NodeSettings, RunDir, StartAs};
use mcd::testbed::require::{NODE_DEVICES, number_from_environment, with_rights};
use mcd::testbed::rng::Rng;
use nix::sys::signal::Signal;

/// The last block is not whole.
const DISK_BYTES: u64 = (8 << 20) + 512;
/// Blocks the guest's background writer works on; the client's follow.
const RUN_BLOCKS: u64 = 128;
/// Blocks the client writes to, again and again.
const CLIENT_BLOCKS: u64 = 64;
/// Writes the client sends before it reads an answer.
const PIPELINED: u64 = 30;
/// How often a primary is killed, unless `MCD_SHARED_ROUNDS` says otherwise.
const ROUNDS: u64 = 4;
/// A node that is killed is missed at once, by its sockets. One that a busy test host lets stand
/// still is not to be, unless a test wants it.
const NEVER_SUSPECT: &str = "--heartbeat-timeout-ms=20000";
const SUSPECT: &str = "--heartbeat-timeout-ms=2000";

/// A pair, the image that both hosts use, and what the guest acknowledged.
struct SharedDiskPair {
    namespaces: Namespaces,
    dir: RunDir,
    rng: Rng,
    primary: Node,
    secondary: Node,
    started: u32,
    /// When a node suspects its peer: a flag.
    suspicion: &'static str,
    /// The seed each of the client's blocks was written with last; 0 before the first.
    written: Vec<u64>,
    next_seed: u64,
}

fn image(dir: &RunDir) -> PathBuf {
    dir.path().join("shared.img")
}

fn settings(dir: &RunDir, suspicion: &str, mode: &str) -> NodeSettings {
    let disk = format!("--disk={}{mode}", image(dir).display());
    NodeSettings {
        program: vec![env!("CARGO_BIN_EXE_mcd").into()],
        memory_mib: 32,
        interval_ms: 10,
        flags: vec![disk, "--heartbeat-interval-ms=200".into(), suspicion.into()],
        ..NodeSettings::default()
    }
}

impl SharedDiskPair {
    fn start(seed: u64, suspicion: &'static str) -> SharedDiskPair {
        let namespaces = Namespaces::new().expect("namespaces");
        let dir = RunDir::new().expect("a directory");
        File::create(image(&dir)).and_then(|file| file.set_len(DISK_BYTES)).expect("an image");
        let node = |role, host, name| {
            let settings = settings(&dir, suspicion, ",mode=shared");
            Node::start(role, host, name, &settings, &namespaces, &dir).expect("a node")
        };
        let mut primary = node(StartAs::Primary, HostName::A, "n0");
        primary.wait_status("run the guest", |status| status.running).unwrap();
        let secondary = node(StartAs::Secondary, HostName::B, "n1");
        primary.wait_status("be protected", |status| status.protected).unwrap();
        let written = vec![0; CLIENT_BLOCKS as usize];
        SharedDiskPair {
            namespaces,
            dir,
            rng: Rng::new(seed),
            primary,
            secondary,
            started: 2,
            suspicion,
            written,
            next_seed: 1,
        }
    }

    fn node(&mut self, role: StartAs, host: HostName, mode: &str) -> Node {
        let name = format!("n{}", self.started);
        self.started += 1;
        let settings = settings(&self.dir, self.suspicion, mode);
        Node::start(role, host, &name, &settings, &self.namespaces, &self.dir).expect("a node")
    }

    /// Sends writes, kills the primary when some are acknowledged, and waits for the rest, which
    /// its new primary acknowledges. What is acknowledged is in the image already, whoever wrote
    /// it.
    fn write_and_kill(&mut self, guest: &mut GuestClient) {
        let mut sent = Vec::new();
        for _ in 0..PIPELINED {
            let (block, seed) = (self.rng.below(CLIENT_BLOCKS), self.next_seed);
            self.next_seed += 1;
            guest.send(&format!("DISK WRITE {} {seed}", RUN_BLOCKS + block)).unwrap();
            sent.push((block, seed));
        }
        let killed_at = self.rng.below(PIPELINED) as usize;
        for (number, (block, seed)) in sent.into_iter().enumerate() {
            if number == killed_at {
                // Right after the answer before it, or in the middle of this one.
                std::thread::park_timeout(Duration::from_micros(self.rng.below(20_000)));
                self.primary.kill().expect("a process to kill");
            }
            assert_eq!(guest.line().unwrap(), "+OK");
            self.written[block as usize] = seed;
            let there = self.seed_in_image(RUN_BLOCKS + block);
            assert!(there >= seed, "block {block} was acknowledged with seed {seed}, and the image has {there}");
        }
    }

    /// The seed in block `block` of the image as any host sees it now.
    fn seed_in_image(&self, block: u64) -> u64 {
        let mut word = [0; 8];
        File::open(image(&self.dir))
            .and_then(|file| file.read_exact_at(&mut word, block * 4096 + 16))
            .expect("an image");
        u64::from_le_bytes(word)
    }

    /// Every acknowledged write is there, nothing is torn, and the image has what the guest sees.
    fn check(&mut self, guest: &mut GuestClient) {
        assert_eq!(guest.ask("DISK RUN 0 0").unwrap(), "+OK");
        // Its answer comes when the image has all that was written before.
        let seed = self.next_seed;
        self.next_seed += 1;
        assert_eq!(guest.ask(&format!("DISK WRITE {RUN_BLOCKS} {seed}")).unwrap(), "+OK");
        self.written[0] = seed;
        for (block, seed) in (RUN_BLOCKS..).zip(&self.written) {
            assert_eq!(guest.ask(&format!("DISK READ {block}")).unwrap(), format!(":{seed}"), "block {block}");
        }
        for block in 0..RUN_BLOCKS + CLIENT_BLOCKS {
            let answer = guest.ask(&format!("DISK READ {block}")).unwrap();
            assert_eq!(answer, format!(":{}", self.seed_in_image(block)), "block {block}");
        }
    }

    /// The new primary goes on; a newcomer joins it where the primary died.
    fn protect_again(&mut self) {
        self.secondary.wait_status("take over", |status| status.running && status.takeover.is_some()).unwrap();
        self.primary.wait_ended().unwrap();
        let newcomer = self.node(StartAs::Secondary, self.primary.host(), ",mode=shared");
        let survivor = std::mem::replace(&mut self.secondary, newcomer);
        self.primary = survivor;
        self.primary.wait_status("be protected", |status| status.protected).unwrap();
    }
}

impl Drop for SharedDiskPair {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for node in [&mut self.primary, &mut self.secondary] {
                let status = node.status().map(|status| status.to_string()).unwrap_or_default();
                let ended = node.ended();
                eprintln!("---- {} ({ended:?}):\n{status}\n{}\n----", node.name(), node.log_tail(30));
            }
        }
    }
}

#[test]
fn acknowledged_writes_are_in_the_shared_image_whoever_dies() {
    with_rights("acknowledged_writes_are_in_the_shared_image_whoever_dies", NODE_DEVICES, || {
        let rounds = number_from_environment("MCD_SHARED_ROUNDS").unwrap_or(ROUNDS);
        let seed =
            number_from_environment("MCD_DISK_SEED").unwrap_or_else(|| getrandom::u64().expect("a random number"));
        println!("{rounds} rounds, MCD_DISK_SEED={seed}");
        let mut pair = SharedDiskPair::start(seed, NEVER_SUSPECT);
        let mut guest = GuestClient::connect(&pair.namespaces.lan).unwrap();
        for _ in 0..rounds {
            assert_eq!(guest.ask(&format!("DISK RUN {RUN_BLOCKS} 1000")).unwrap(), "+OK");
            pair.write_and_kill(&mut guest);
            pair.check(&mut guest);
            pair.protect_again();
        }
        // A planned end: the guest goes on at the secondary, and at last is shut down, with writes
        // that nobody flushed.
        pair.primary.quit().unwrap();
        pair.secondary.wait_status("take over", |status| status.running).unwrap();
        assert_eq!(guest.ask(&format!("DISK RUN {RUN_BLOCKS} 1000")).unwrap(), "+OK");
        pair.check(&mut guest);
        pair.secondary.quit().unwrap();
        // It starts again on either host.
        let host = pair.primary.host();
        pair.primary = pair.node(StartAs::Primary, host, ",mode=shared");
        pair.primary.wait_status("run the guest", |status| status.running).unwrap();
        let mut guest = GuestClient::connect(&pair.namespaces.lan).unwrap();
        pair.check(&mut guest);
        drop(guest);
        // After both hosts died, too, but only if an operator says so.
        pair.primary.kill().expect("a process to kill");
        pair.primary.wait_ended().unwrap();
        let mut refused = pair.node(StartAs::Primary, host.other(), ",mode=shared");
        refused.wait_ended().unwrap();
        assert!(refused.log_tail(3).contains("use `mcd cold-start`"), "{}", refused.log_tail(3));
        pair.primary = pair.node(StartAs::ColdStart, host.other(), ",mode=shared");
        pair.primary.wait_status("run the guest", |status| status.running).unwrap();
        let mut guest = GuestClient::connect(&pair.namespaces.lan).unwrap();
        pair.check(&mut guest);
    });
}

#[test]
fn nothing_is_in_the_image_before_its_epoch_is_committed() {
    with_rights("nothing_is_in_the_image_before_its_epoch_is_committed", NODE_DEVICES, || {
        let mut pair = SharedDiskPair::start(1, NEVER_SUSPECT);
        let mut guest = GuestClient::connect(&pair.namespaces.lan).unwrap();
        assert_eq!(guest.ask(&format!("DISK WRITE {RUN_BLOCKS} 5")).unwrap(), "+OK");
        assert_eq!(pair.seed_in_image(RUN_BLOCKS), 5);
        // Nothing is committed any more; the guest runs on and writes.
        pair.secondary.signal(Signal::SIGSTOP).expect("it lives");
        guest.send(&format!("DISK WRITE {RUN_BLOCKS} 6")).unwrap();
        pair.primary.wait_status("hold the write", |status| status.held_disk_bytes >= 4096).unwrap();
        assert_eq!(pair.seed_in_image(RUN_BLOCKS), 5, "held, not written");
        pair.secondary.signal(Signal::SIGCONT).expect("it lives");
        assert_eq!(guest.line().unwrap(), "+OK");
        assert_eq!(pair.seed_in_image(RUN_BLOCKS), 6);
        // Once more, and the primary dies with it: the new primary does it again.
        pair.secondary.signal(Signal::SIGSTOP).expect("it lives");
        guest.send(&format!("DISK WRITE {RUN_BLOCKS} 7")).unwrap();
        pair.primary.wait_status("hold the write", |status| status.held_disk_bytes >= 4096).unwrap();
        pair.primary.kill().expect("a process to kill");
        pair.primary.wait_ended().unwrap();
        assert_eq!(pair.seed_in_image(RUN_BLOCKS), 6, "it died with its primary");
        pair.secondary.signal(Signal::SIGCONT).expect("it lives");
        assert_eq!(guest.line().unwrap(), "+OK");
        assert_eq!(pair.seed_in_image(RUN_BLOCKS), 7);
        pair.written[0] = 7;
        pair.next_seed = 8;
        pair.check(&mut guest);
    });
}

#[test]
fn a_new_primary_waits_for_the_disk_lock_and_a_frozen_primary_writes_nothing_more() {
    let name = "a_new_primary_waits_for_the_disk_lock_and_a_frozen_primary_writes_nothing_more";
    with_rights(name, NODE_DEVICES, || {
        let mut pair = SharedDiskPair::start(1, SUSPECT);
        let mut guest = GuestClient::connect(&pair.namespaces.lan).unwrap();
        assert_eq!(guest.ask(&format!("DISK RUN {RUN_BLOCKS} 2000")).unwrap(), "+OK");
        pair.primary.signal(Signal::SIGSTOP).expect("it lives");
        let locked = |status: &NodeStatus| status.alarms.iter().any(|alarm| alarm.starts_with("MC_DISK_LOCKED"));
        let status = pair.secondary.wait_status("find the disk locked", locked).unwrap();
        assert!(!status.running && status.state == State::Takeover, "{status}");
        assert!(pair.secondary.log_tail(20).contains("MC_DISK_LOCKED"), "{}", pair.secondary.log_tail(20));
        // It finds out that it lost, and lets go.
        pair.primary.signal(Signal::SIGCONT).expect("it lives");
        pair.primary.wait_status("be fenced", |status| status.role == Role::Fenced).unwrap();
        let status = pair.secondary.wait_status("take over", |status| status.running).unwrap();
        assert!(!locked(&status));
        pair.check(&mut guest);
        let before = std::fs::read(image(&pair.dir)).expect("an image");
        pair.primary.quit().unwrap();
        assert!(std::fs::read(image(&pair.dir)).expect("an image") == before, "the old primary wrote");
        // Dead, it has no lock either.
        let newcomer = { pair.node(StartAs::Secondary, pair.primary.host(), ",mode=shared") };
        pair.primary = std::mem::replace(&mut pair.secondary, newcomer);
        pair.primary.wait_status("be protected", |status| status.protected).unwrap();
        pair.primary.signal(Signal::SIGSTOP).expect("it lives");
        pair.secondary.wait_status("find the disk locked", locked).unwrap();
        pair.primary.kill().expect("a process to kill");
        pair.secondary.wait_status("take over", |status| status.running).unwrap();
        pair.check(&mut guest);
    });
}

#[test]
fn nodes_that_do_not_agree_on_the_storage_are_no_pair() {
    with_rights("nodes_that_do_not_agree_on_the_storage_are_no_pair", NODE_DEVICES, || {
        let mut pair = SharedDiskPair::start(1, NEVER_SUSPECT);
        pair.secondary.quit().unwrap();
        pair.primary.wait_status("go on alone", |status| status.state == State::Solo).unwrap();
        let mut guest = GuestClient::connect(&pair.namespaces.lan).unwrap();
        assert_eq!(guest.ask(&format!("DISK WRITE {RUN_BLOCKS} 3")).unwrap(), "+OK");
        assert_eq!(pair.seed_in_image(RUN_BLOCKS), 3);
        for (role, mode, part) in [
            (StartAs::Secondary, "", "is in use"),
            (StartAs::Secondary, ".other", "is replicated here and shared at the primary"),
            (StartAs::Primary, ",mode=shared", "has shared image"),
        ] {
            let mut refused = pair.node(role, HostName::B, mode);
            refused.wait_ended().unwrap();
            assert!(refused.log_tail(3).contains(part), "{part}: {}", refused.log_tail(3));
        }
        pair.written[0] = 3;
        pair.next_seed = 4;
        pair.check(&mut guest);
    });
}
