//! A guest that writes to its disk, on two hosts that may die.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use mcd::control::Client;
use mcd::control::status::State;
use mcd::testbed::guest_client::GuestClient;
use mcd::testbed::namespaces::{HostName, Namespaces};
use mcd::testbed::nodes::{Node, NodeSettings, RunDir, StartAs};
use mcd::testbed::rng::Rng;
use mcd::testbed::wait::WAIT_MAX;
use serde_json::Value;

/// The last block is not whole.
pub const DISK_BYTES: u64 = (16 << 20) + 512;
/// Blocks the guest's background writer works on; the client's follow.
pub const RUN_BLOCKS: u64 = 256;
/// Blocks the client writes to, again and again.
pub const CLIENT_BLOCKS: u64 = 512;
/// Writes the client sends before it reads an answer.
pub const PIPELINED: u64 = 100;
/// How often a primary is killed, unless `MCD_DISK_ROUNDS` says otherwise.
pub const ROUNDS: u64 = 4;

/// A pair, the disk images of its hosts, and what the guest acknowledged.
pub struct DiskPair {
    pub namespaces: Namespaces,
    pub dir: RunDir,
    pub rng: Rng,
    pub primary: Node,
    pub secondary: Node,
    pub started: u32,
    /// When a node suspects its peer: a flag.
    pub suspicion: &'static str,
    /// The seed each of the client's blocks was written with last; 0 before the first.
    pub written: Vec<u64>,
    pub next_seed: u64,
    /// Blocks that the guest's background writer works on.
    pub run_blocks: u64,
    pub newcomers_killed: u64,
    /// Blocks that newcomers did not have to be sent.
    pub had_blocks: u64,
}

pub fn image(dir: &RunDir, host: HostName) -> PathBuf {
    dir.path().join(if host == HostName::A { "a.img" } else { "b.img" })
}

/// A node that is killed is missed at once, by its sockets. One that a busy test host lets stand
/// still is not to be, unless a test wants it.
pub const NEVER_SUSPECT: &str = "--heartbeat-timeout-ms=20000";
pub const SUSPECT: &str = "--heartbeat-timeout-ms=2000";

pub fn settings(dir: &RunDir, host: HostName, suspicion: &str) -> NodeSettings {
    let disk = format!("--disk={}", image(dir, host).display());
    NodeSettings {
        program: vec![env!("CARGO_BIN_EXE_mcd").into()],
        memory_mib: 32,
        interval_ms: 10,
        flags: vec![disk, "--heartbeat-interval-ms=200".into(), suspicion.into()],
        ..NodeSettings::default()
    }
}

impl DiskPair {
    pub fn start(seed: u64, suspicion: &'static str) -> DiskPair {
        DiskPair::with_disk(seed, suspicion, DISK_BYTES, RUN_BLOCKS)
    }

    /// With a disk of so many bytes, and so many blocks before the client's.
    pub fn with_disk(seed: u64, suspicion: &'static str, disk_bytes: u64, run_blocks: u64) -> DiskPair {
        let namespaces = Namespaces::new().expect("namespaces");
        let dir = RunDir::new().expect("a directory");
        let disk = std::fs::File::create(image(&dir, HostName::A)).expect("an image");
        disk.set_len(disk_bytes).expect("its size");
        let node = |role, host, name| {
            let settings = settings(&dir, host, suspicion);
            Node::start(role, host, name, &settings, &namespaces, &dir).expect("a node")
        };
        let mut primary = node(StartAs::Primary, HostName::A, "n0");
        primary.wait_status("run the guest", |status| status.running).unwrap();
        let secondary = node(StartAs::Secondary, HostName::B, "n1");
        primary.wait_status("be protected", |status| status.protected).unwrap();
        let written = vec![0; CLIENT_BLOCKS as usize];
        DiskPair {
            namespaces,
            dir,
            rng: Rng::new(seed),
            primary,
            secondary,
            started: 2,
            suspicion,
            written,
            next_seed: 1,
            run_blocks,
            newcomers_killed: 0,
            had_blocks: 0,
        }
    }

    pub fn node(&mut self, role: StartAs, host: HostName) -> Node {
        let name = format!("n{}", self.started);
        self.started += 1;
        let settings = settings(&self.dir, host, self.suspicion);
        Node::start(role, host, &name, &settings, &self.namespaces, &self.dir).expect("a node")
    }

    /// Sends writes, kills the primary when some are acknowledged, and waits for the rest, which
    /// its new primary acknowledges.
    pub fn write_and_kill(&mut self, guest: &mut GuestClient) {
        let mut sent = Vec::new();
        for _ in 0..PIPELINED {
            let (block, seed) = (self.rng.below(CLIENT_BLOCKS), self.next_seed);
            self.next_seed += 1;
            guest.send(&format!("DISK WRITE {} {seed}", self.run_blocks + block)).unwrap();
            sent.push((block, seed));
        }
        let killed_at = self.rng.below(PIPELINED) as usize;
        for (number, (block, seed)) in sent.into_iter().enumerate() {
            if number == killed_at {
                self.primary.kill().expect("a process to kill");
            }
            assert_eq!(guest.line().unwrap(), "+OK");
            self.written[block as usize] = seed;
        }
    }

    /// Every acknowledged write is there, and nothing is torn.
    pub fn check(&self, guest: &mut GuestClient) {
        for (block, seed) in (self.run_blocks..).zip(&self.written) {
            assert_eq!(guest.ask(&format!("DISK READ {block}")).unwrap(), format!(":{seed}"), "block {block}");
        }
        // Some hundred of them, if there are many.
        for block in (0..self.run_blocks).step_by((self.run_blocks / RUN_BLOCKS) as usize) {
            let answer = guest.ask(&format!("DISK READ {block}")).unwrap();
            assert!(answer.starts_with(':'), "block {block}: {answer}");
        }
    }

    /// The new primary goes on; a newcomer joins it where the primary died, with the image it left.
    /// Some newcomers die on the way, and leave theirs.
    pub fn protect_again(&mut self) {
        self.secondary.wait_status("take over", |status| status.running && status.takeover.is_some()).unwrap();
        self.primary.wait_ended().unwrap();
        let newcomer = self.node(StartAs::Secondary, self.primary.host());
        let survivor = std::mem::replace(&mut self.secondary, newcomer);
        self.primary = survivor;
        if self.rng.below(4) == 0 {
            self.primary.wait_status("fill a newcomer", |status| status.state != State::Solo).unwrap();
            // A moment that nobody chose, inside a resync of some 100 ms.
            std::thread::park_timeout(Duration::from_micros(self.rng.below(100_000)));
            self.secondary.kill().expect("a process to kill");
            self.secondary.wait_ended().unwrap();
            self.newcomers_killed += 1;
            self.primary.wait_status("go on alone", |status| status.state == State::Solo).unwrap();
            self.secondary = self.node(StartAs::Secondary, self.secondary.host());
        }
        self.primary.wait_status("be protected", |status| status.protected).unwrap();
        self.had_blocks += self.blocks_the_newcomer_had();
    }

    /// Both images are the same at every committed epoch, while the guest writes.
    pub fn compare(&mut self) {
        let verified = verify_online(&self.primary, &[]);
        assert_eq!(verified.status.code(), Some(0), "{verified:?}");
    }

    /// The nodes compare their images: equal, and then not, because somebody wrote to the
    /// secondary's behind its back.
    pub fn verify_while_the_guest_writes(&mut self) {
        let blocks = DISK_BYTES.div_ceil(4096);
        let verified = verify_online(&self.primary, &[]);
        assert_eq!(verified.status.code(), Some(0), "{verified:?}");
        assert!(says(&verified, &format!("disk 0: {blocks} of {blocks} blocks")), "{verified:?}");
        assert!(says(&verified, "\nequal\n"), "{verified:?}");
        // Blocks that the guest does not write; the last one is not whole.
        let spoilt = File::options().write(true).open(image(&self.dir, self.secondary.host())).expect("an image");
        for offset in [4096 * 3001, 4096 * 3002 + 4095, DISK_BYTES - 1] {
            spoilt.write_all_at(&[0xff], offset).expect("a byte");
        }
        let verified = verify_online(&self.primary, &["--disk=0"]);
        assert_eq!(verified.status.code(), Some(1), "{verified:?}");
        for part in ["3 differ", "  blocks 3001 to 3002\n", &format!("  block {}\n", blocks - 1), "\nDIFFERENT\n"] {
            assert!(says(&verified, part), "{part} in {verified:?}");
        }
        let json = verify_online(&self.primary, &["--json"]);
        let json: Value = serde_json::from_slice(&json.stdout).expect("JSON");
        assert_eq!((&json["state"], &json["disks"][0]["different"]), (&Value::from("different"), &Value::from(3)));
        for flag in ["--disk=1", "--disk=no-such-serial"] {
            let refused = verify_online(&self.primary, &[flag]);
            assert_eq!(refused.status.code(), Some(2), "{refused:?}");
            assert!(says(&refused, "no such disk"), "{refused:?}");
        }
        let refused = verify_online(&self.secondary, &[]);
        assert_eq!(refused.status.code(), Some(2), "{refused:?}");
        assert!(says(&refused, "ask the primary"), "{refused:?}");
        // As the runbook says: the secondary is ended, and gets what its image lacks when it comes
        // back.
        self.secondary.quit().unwrap();
        self.primary.wait_status("go on alone", |status| status.state == State::Solo).unwrap();
        assert!(says(&verify_online(&self.primary, &[]), "not protected"));
        self.secondary = self.node(StartAs::Secondary, self.secondary.host());
        self.primary.wait_status("be protected", |status| status.protected).unwrap();
        let had = self.blocks_the_newcomer_had();
        // All but what was spoilt and what the guest writes.
        assert!((blocks - RUN_BLOCKS - CLIENT_BLOCKS - 3..=blocks - 3).contains(&had), "{had}");
        let verified = verify_online(&self.primary, &[]);
        assert_eq!(verified.status.code(), Some(0), "{verified:?}");
    }

    /// How many blocks the newest newcomer had already, as the primary's log says.
    pub fn blocks_the_newcomer_had(&self) -> u64 {
        let log = self.primary.log_tail(100);
        let line = log.lines().rfind(|line| line.contains("MC_DISKS_COMPARED")).expect(&log);
        let words: Vec<_> = line.split_whitespace().collect();
        let at = words.iter().position(|word| *word == "has").expect(line);
        words[at + 1].parse().expect(line)
    }

    pub fn verify(&self) -> Output {
        verify(&image(&self.dir, HostName::A), &image(&self.dir, HostName::B))
    }
}

impl Drop for DiskPair {
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

pub fn verify(one: &Path, other: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mcd")).args(["disk", "verify"]).args([one, other]).output().expect("mcd runs")
}

pub fn verify_online(node: &Node, flags: &[&str]) -> Output {
    let control = format!("--control={}", node.control().display());
    let mut command = Command::new(env!("CARGO_BIN_EXE_mcd"));
    command.args(["disk", "verify", &control]).args(flags).output().expect("mcd runs")
}

/// Starts a comparison that cannot end yet, and waits until it has begun.
pub fn start_verify(node: &Node) -> Child {
    let control = format!("--control={}", node.control().display());
    let mut command = Command::new(env!("CARGO_BIN_EXE_mcd"));
    let command = command.args(["disk", "verify", &control]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut verify = command.spawn().expect("mcd runs");
    let mut client = Client::connect(node.control(), WAIT_MAX).expect("a control socket");
    let mut begun = || client.execute("mc-query-disk-verify", Value::Null, WAIT_MAX).is_ok();
    while !begun() && verify.try_wait().expect("a child").is_none() {
        std::thread::park_timeout(Duration::from_millis(2));
    }
    verify
}

pub fn says(output: &Output, part: &str) -> bool {
    [&output.stdout, &output.stderr].into_iter().any(|text| String::from_utf8_lossy(text).contains(part))
}
