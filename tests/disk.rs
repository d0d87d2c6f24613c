//! A guest that writes to its disk, on hosts that die: what it was told is durable is there afterwards, and the images are equal in the end.

mod rights;

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use mcd::checkpoint::stamp::Stamp;
use mcd::control::Client;
use mcd::control::status::{NodeStatus, State};
use mcd::demo::fabric::{Fabric, GUEST_IPV4, HostName};
use mcd::demo::nodes::{Node, NodeSettings, RunDir, StartAs};
use mcd::demo::rng::Rng;
use nix::sys::signal::Signal;
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(60);
/// The last block is not whole.
const DISK_BYTES: u64 = (16 << 20) + 512;
/// Blocks the guest's background writer works on; the client's follow.
const RUN_BLOCKS: u64 = 256;
/// Blocks the client writes to, again and again.
const CLIENT_BLOCKS: u64 = 512;
/// Writes the client sends before it reads an answer.
const PIPELINED: u64 = 100;
/// How often a primary is killed, unless `MCD_DISK_ROUNDS` says otherwise.
const ROUNDS: u64 = 4;

/// A client of the guest, on one connection for ever.
struct Guest {
    to: TcpStream,
    from: BufReader<TcpStream>,
}

impl Guest {
    fn connect(fabric: &Fabric) -> Guest {
        let to = fabric.lan.run(|| TcpStream::connect((GUEST_IPV4, 6379))).expect("the client's network");
        let to = to.expect("a connection");
        to.set_read_timeout(Some(PATIENCE)).expect("a time-out");
        to.set_nodelay(true).expect("an option");
        let from = BufReader::new(to.try_clone().expect("a descriptor"));
        Guest { to, from }
    }

    fn send(&mut self, command: &str) {
        self.to.write_all(format!("{command}\r\n").as_bytes()).expect("the connection lives");
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.from.read_line(&mut line).expect("an answer");
        assert!(line.ends_with("\r\n"), "the connection ended");
        line.trim_end().to_owned()
    }

    fn ask(&mut self, command: &str) -> String {
        self.send(command);
        self.line()
    }
}

/// A pair, the disk images of its hosts, and what the guest acknowledged.
struct World {
    fabric: Fabric,
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
    newcomers_killed: u64,
    /// Blocks that newcomers did not have to be sent.
    had_blocks: u64,
}

fn image(dir: &RunDir, host: HostName) -> PathBuf {
    dir.path().join(if host == HostName::A { "a.img" } else { "b.img" })
}

/// A node that is killed is missed at once, by its sockets. One that a busy test host lets stand still is not to be, unless a test wants it.
const NEVER_SUSPECT: &str = "--heartbeat-timeout-ms=20000";
const SUSPECT: &str = "--heartbeat-timeout-ms=2000";

fn settings(dir: &RunDir, host: HostName, suspicion: &str) -> NodeSettings {
    let disk = format!("--disk={}", image(dir, host).display());
    NodeSettings {
        program: vec![env!("CARGO_BIN_EXE_mcd").into()],
        memory_mib: 32,
        interval_ms: 10,
        flags: vec![disk, "--heartbeat-interval-ms=200".into(), suspicion.into()],
        ..NodeSettings::default()
    }
}

impl World {
    fn start(seed: u64, suspicion: &'static str) -> World {
        let fabric = Fabric::new().expect("namespaces");
        let dir = RunDir::new().expect("a directory");
        let disk = std::fs::File::create(image(&dir, HostName::A)).expect("an image");
        disk.set_len(DISK_BYTES).expect("its size");
        let node = |role, host, name| {
            let settings = settings(&dir, host, suspicion);
            Node::start(role, host, name, &settings, &fabric, &dir).expect("a node")
        };
        let mut primary = node(StartAs::Primary, HostName::A, "n0");
        wait_for(&mut primary, "run the guest", |status| status.running);
        let secondary = node(StartAs::Secondary, HostName::B, "n1");
        wait_for(&mut primary, "be protected", |status| status.protected);
        let written = vec![0; CLIENT_BLOCKS as usize];
        World {
            fabric,
            dir,
            rng: Rng::new(seed),
            primary,
            secondary,
            started: 2,
            suspicion,
            written,
            next_seed: 1,
            newcomers_killed: 0,
            had_blocks: 0,
        }
    }

    fn node(&mut self, role: StartAs, host: HostName) -> Node {
        let name = format!("n{}", self.started);
        self.started += 1;
        let settings = settings(&self.dir, host, self.suspicion);
        Node::start(role, host, &name, &settings, &self.fabric, &self.dir).expect("a node")
    }

    /// Sends writes, kills the primary when some are acknowledged, and waits for the rest, which its heir acknowledges.
    fn write_and_kill(&mut self, guest: &mut Guest) {
        let mut sent = Vec::new();
        for _ in 0..PIPELINED {
            let (block, seed) = (self.rng.below(CLIENT_BLOCKS), self.next_seed);
            self.next_seed += 1;
            guest.send(&format!("DISK WRITE {} {seed}", RUN_BLOCKS + block));
            sent.push((block, seed));
        }
        let killed_at = self.rng.below(PIPELINED) as usize;
        for (number, (block, seed)) in sent.into_iter().enumerate() {
            if number == killed_at {
                self.primary.kill().expect("a process to kill");
            }
            assert_eq!(guest.line(), "+OK");
            self.written[block as usize] = seed;
        }
    }

    /// Every acknowledged write is there, and nothing is torn.
    fn check(&self, guest: &mut Guest) {
        for (block, seed) in (RUN_BLOCKS..).zip(&self.written) {
            assert_eq!(guest.ask(&format!("DISK READ {block}")), format!(":{seed}"), "block {block}");
        }
        for block in 0..RUN_BLOCKS {
            let answer = guest.ask(&format!("DISK READ {block}"));
            assert!(answer.starts_with(':'), "block {block}: {answer}");
        }
    }

    /// The heir goes on; a newcomer joins it where the primary died, with the image it left. Some newcomers die on the way, and leave theirs.
    fn protect_again(&mut self) {
        wait_for(&mut self.secondary, "take over", |status| status.running && status.takeover.is_some());
        wait_ended(&mut self.primary);
        let newcomer = self.node(StartAs::Secondary, self.primary.host());
        let survivor = std::mem::replace(&mut self.secondary, newcomer);
        self.primary = survivor;
        if self.rng.below(4) == 0 {
            wait_for(&mut self.primary, "fill a newcomer", |status| status.state != State::Solo);
            // A moment that nobody chose, inside a resync of some 100 ms.
            std::thread::park_timeout(Duration::from_micros(self.rng.below(100_000)));
            self.secondary.kill().expect("a process to kill");
            wait_ended(&mut self.secondary);
            self.newcomers_killed += 1;
            wait_for(&mut self.primary, "go on alone", |status| status.state == State::Solo);
            self.secondary = self.node(StartAs::Secondary, self.secondary.host());
        }
        wait_for(&mut self.primary, "be protected", |status| status.protected);
        self.had_blocks += self.blocks_the_newcomer_had();
    }

    /// Both images are the same at every committed epoch, while the guest writes.
    fn compare(&mut self) {
        let verified = verify_online(&self.primary, &[]);
        assert_eq!(verified.status.code(), Some(0), "{verified:?}");
    }

    /// The nodes compare their images: equal, and then not, because somebody wrote to the secondary's behind its back.
    fn verify_while_the_guest_writes(&mut self) {
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
        // As the runbook says: the secondary is ended, and gets what its image lacks when it comes back.
        quit(&mut self.secondary);
        wait_for(&mut self.primary, "go on alone", |status| status.state == State::Solo);
        assert!(says(&verify_online(&self.primary, &[]), "not protected"));
        self.secondary = self.node(StartAs::Secondary, self.secondary.host());
        wait_for(&mut self.primary, "be protected", |status| status.protected);
        let had = self.blocks_the_newcomer_had();
        // All but what was spoilt and what the guest writes.
        assert!((blocks - RUN_BLOCKS - CLIENT_BLOCKS - 3..=blocks - 3).contains(&had), "{had}");
        let verified = verify_online(&self.primary, &[]);
        assert_eq!(verified.status.code(), Some(0), "{verified:?}");
    }

    /// How many blocks the newest newcomer had already, as the primary's log says.
    fn blocks_the_newcomer_had(&self) -> u64 {
        let log = self.primary.log_tail(100);
        let line = log.lines().rfind(|line| line.contains("MC_DISKS_COMPARED")).expect(&log);
        let words: Vec<_> = line.split_whitespace().collect();
        let at = words.iter().position(|word| *word == "has").expect(line);
        words[at + 1].parse().expect(line)
    }

    fn verify(&self) -> Output {
        verify(&image(&self.dir, HostName::A), &image(&self.dir, HostName::B))
    }
}

impl Drop for World {
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

fn verify(one: &Path, other: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mcd")).args(["disk", "verify"]).args([one, other]).output().expect("mcd runs")
}

fn verify_online(node: &Node, flags: &[&str]) -> Output {
    let control = format!("--control={}", node.control().display());
    let mut command = Command::new(env!("CARGO_BIN_EXE_mcd"));
    command.args(["disk", "verify", &control]).args(flags).output().expect("mcd runs")
}

fn quit(node: &mut Node) {
    let mut client = Client::connect(node.control(), PATIENCE).expect("a control socket");
    client.execute("quit", Value::Null, PATIENCE).expect("quit");
    wait_ended(node);
}

fn wait_ended(node: &mut Node) {
    let deadline = Instant::now() + PATIENCE;
    while node.ended().is_none() {
        assert!(Instant::now() < deadline, "{} does not end:\n{}", node.name(), node.log_tail(20));
        std::thread::park_timeout(Duration::from_millis(2));
    }
}

fn wait_for(node: &mut Node, what: &str, done: impl Fn(&NodeStatus) -> bool) -> NodeStatus {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = node.status()
            && done(&status)
        {
            return status;
        }
        assert!(node.ended().is_none(), "{} ended and did not {what}:\n{}", node.name(), node.log_tail(20));
        assert!(Instant::now() < deadline, "{} did not {what}:\n{}", node.name(), node.log_tail(20));
        // A status is asked for again and again; this only keeps the asking from taking a core.
        std::thread::park_timeout(Duration::from_millis(2));
    }
}

fn from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

fn says(output: &Output, part: &str) -> bool {
    [&output.stdout, &output.stderr].into_iter().any(|text| String::from_utf8_lossy(text).contains(part))
}

#[test]
fn acknowledged_writes_outlive_hosts_and_the_images_are_equal() {
    rights::run("acknowledged_writes_outlive_hosts_and_the_images_are_equal", &["/dev/kvm", "/dev/net/tun"], || {
        let rounds = from_environment("MCD_DISK_ROUNDS").unwrap_or(ROUNDS);
        let seed = from_environment("MCD_DISK_SEED").unwrap_or_else(|| getrandom::u64().expect("a random number"));
        println!("{rounds} rounds, MCD_DISK_SEED={seed}");
        let mut world = World::start(seed, NEVER_SUSPECT);
        let mut guest = Guest::connect(&world.fabric);
        for round in 1..=rounds {
            assert_eq!(guest.ask(&format!("DISK RUN {RUN_BLOCKS} 2000")), "+OK");
            world.write_and_kill(&mut guest);
            world.check(&mut guest);
            world.protect_again();
            world.compare();
            if round % 50 == 0 || round == rounds {
                let (newcomers, writes) = (world.newcomers_killed, world.next_seed - 1);
                let had_percent = world.had_blocks * 100 / (round * DISK_BYTES.div_ceil(4096));
                println!(
                    "{round} primaries and {newcomers} newcomers killed, {writes} acknowledged writes there, \
                     {round} comparisons without a difference; newcomers had {had_percent} % of the blocks"
                );
            }
        }
        // A node that runs keeps its image for itself.
        assert!(says(&world.verify(), "is in use"));
        world.verify_while_the_guest_writes();
        assert_eq!(guest.ask("DISK RUN 0 0"), "+OK");
        // Whatever was answered is committed, so the secondary has every write; and there are no more.
        quit(&mut world.secondary);
        quit(&mut world.primary);
        let verified = world.verify();
        assert!(verified.status.success() && says(&verified, "equal"), "{verified:?}");
        restarts(&mut world);
    });
}

#[test]
fn a_secondary_that_was_given_up_joins_again_with_its_disk() {
    rights::run("a_secondary_that_was_given_up_joins_again_with_its_disk", &["/dev/kvm", "/dev/net/tun"], || {
        let mut world = World::start(1, SUSPECT);
        let mut guest = Guest::connect(&world.fabric);
        assert_eq!(guest.ask(&format!("DISK RUN {RUN_BLOCKS} 2000")), "+OK");
        let first = world.primary.status().expect("a status").peer;
        world.secondary.signal(Signal::SIGSTOP).expect("it lives");
        wait_for(&mut world.primary, "go on alone", |status| status.state == State::Solo);
        assert_eq!(guest.ask(&format!("DISK WRITE {RUN_BLOCKS} 5")), "+OK");
        world.written[0] = 5;
        world.secondary.signal(Signal::SIGCONT).expect("it lives");
        let status = wait_for(&mut world.primary, "be protected again", |status| status.protected);
        assert_ne!(status.peer, first, "under a new name");
        assert_eq!(guest.ask("DISK RUN 0 0"), "+OK");
        world.check(&mut guest);
        quit(&mut world.secondary);
        quit(&mut world.primary);
        let verified = world.verify();
        assert!(verified.status.success(), "{verified:?}");
    });
}

/// After both nodes ended, the guest starts from the newer image and from no other.
fn restarts(world: &mut World) {
    let (newer, older) = (world.primary.host(), world.secondary.host());
    let mut refused = world.node(StartAs::Primary, older);
    wait_ended(&mut refused);
    assert!(refused.log_tail(3).contains("the newest image is on the other host"), "{}", refused.log_tail(3));
    world.primary = world.node(StartAs::Primary, newer);
    wait_for(&mut world.primary, "run the guest", |status| status.running);
    let mut guest = Guest::connect(&world.fabric);
    world.check(&mut guest);
    assert_eq!(guest.ask(&format!("DISK WRITE {RUN_BLOCKS} 9")), "+OK");
    drop(guest);
    quit(&mut world.primary);
    let verified = world.verify();
    assert_eq!(verified.status.code(), Some(1), "{verified:?}");
    assert!(says(&verified, &format!("in block {RUN_BLOCKS}")), "{verified:?}");
    world.written[0] = 9;
    cold_starts(world, newer, older);
}

/// After both nodes died, the guest starts anew from the newest image and from no other.
fn cold_starts(world: &mut World, newer: HostName, older: HostName) {
    world.primary = world.node(StartAs::Primary, newer);
    let status = wait_for(&mut world.primary, "run the guest", |status| status.running);
    let deadline = Instant::now() + PATIENCE;
    while Stamp::read(&image(&world.dir, newer)).expect("a stamp").map(|stamp| stamp.at.generation.0)
        != Some(status.generation)
    {
        assert!(Instant::now() < deadline, "no stamp of generation {}", status.generation);
        std::thread::park_timeout(Duration::from_millis(2));
    }
    let mut guest = Guest::connect(&world.fabric);
    assert_eq!(guest.ask(&format!("DISK WRITE {RUN_BLOCKS} 11")), "+OK");
    world.written[0] = 11;
    drop(guest);
    world.primary.kill().expect("a process to kill");
    wait_ended(&mut world.primary);
    for (role, host, part) in [
        (StartAs::Primary, newer, "use `mcd cold-start`"),
        (StartAs::ColdStart, older, "the newest image is on the other host"),
    ] {
        let mut refused = world.node(role, host);
        wait_ended(&mut refused);
        assert!(refused.log_tail(3).contains(part), "{}", refused.log_tail(3));
    }
    world.primary = world.node(StartAs::ColdStart, newer);
    wait_for(&mut world.primary, "run the guest", |status| status.running);
    let mut guest = Guest::connect(&world.fabric);
    world.check(&mut guest);
}
