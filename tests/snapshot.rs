//! A guest that works for clients is saved to a file, ends, and goes on from the file: alone, as a
//! pair, with a disk.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mcd::checkpoint::snapshot::SnapshotReader;
use mcd::checkpoint::stamp::Stamp;
use mcd::control::status::State;
use mcd::testbed::guest_client::GuestClient;
use mcd::testbed::namespaces::{HostName, Namespaces};
use mcd::testbed::nodes::{Node, NodeSettings, RunDir, StartAs};
use mcd::testbed::require::{NODE_DEVICES, with_rights};
use mcd::testbed::wait::WAIT_MAX;
use serde_json::Value;

const REFUSED: Option<i32> = Some(4);
/// Writes acknowledged before the snapshot, and again after it.
const SOME_WRITES: u64 = 300;

/// A client that writes key after key, each when the one before is acknowledged.
struct Writer {
    acknowledged: Arc<AtomicU64>,
    enough: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Writer {
    fn start(namespaces: &Namespaces) -> Writer {
        let mut guest = GuestClient::connect(&namespaces.lan).unwrap();
        let (acknowledged, enough) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (count, end) = (acknowledged.clone(), enough.clone());
        let thread = std::thread::spawn(move || {
            for number in 0.. {
                if end.load(Ordering::Acquire) {
                    break;
                }
                assert_eq!(guest.ask(&format!("SET key{number} value{number}")).unwrap(), "+OK");
                count.store(number + 1, Ordering::Release);
            }
        });
        Writer { acknowledged, enough, thread }
    }

    fn count(&self) -> u64 {
        self.acknowledged.load(Ordering::Acquire)
    }

    /// Waits for more of them; how many there are then.
    fn wait_more(&self) -> u64 {
        let (wanted, deadline) = (self.count() + SOME_WRITES, Instant::now() + WAIT_MAX);
        while self.count() < wanted {
            assert!(!self.thread.is_finished() && Instant::now() < deadline, "no more writes than {}", self.count());
            std::thread::park_timeout(Duration::from_millis(2));
        }
        self.count()
    }

    /// Ends it; it must have met no error.
    fn end(self) -> u64 {
        self.enough.store(true, Ordering::Release);
        self.thread.join().expect("every write was acknowledged");
        self.acknowledged.load(Ordering::Acquire)
    }
}

/// The guest has the keys of the writes up to some moment, all of them and none of a later one; how
/// many.
fn keys(guest: &mut GuestClient, written: u64) -> u64 {
    let held = (0..written).take_while(|number| guest.get(&format!("key{number}")).unwrap().is_some()).count() as u64;
    for number in 0..written {
        let value = (number < held).then(|| format!("value{number}"));
        assert_eq!(guest.get(&format!("key{number}")).unwrap(), value, "key{number} of {held}");
    }
    held
}

struct Hosts {
    namespaces: Namespaces,
    dir: RunDir,
    started: u32,
    cpus: u8,
    /// Each host's own image of the guest's disk.
    disk: bool,
}

impl Hosts {
    fn new(cpus: u8, disk: bool) -> Hosts {
        let (namespaces, dir) = (Namespaces::new().expect("namespaces"), RunDir::new().expect("a directory"));
        Hosts { namespaces, dir, started: 0, cpus, disk }
    }

    fn image(&self, host: HostName) -> PathBuf {
        self.dir.path().join(if host == HostName::A { "a.img" } else { "b.img" })
    }

    fn file(&self) -> PathBuf {
        self.dir.path().join("web.snap")
    }

    fn node(&mut self, role: StartAs, host: HostName, boot_flags: &[String]) -> Node {
        let mut flags: Vec<String> =
            ["--heartbeat-interval-ms=200", "--heartbeat-timeout-ms=20000"].map(str::to_owned).into();
        if self.disk {
            flags.push(format!("--disk={}", self.image(host).display()));
        }
        let settings = NodeSettings {
            program: vec![env!("CARGO_BIN_EXE_mcd").into()],
            memory_mib: 32,
            cpus: self.cpus,
            interval_ms: 10,
            flags,
            boot_flags: boot_flags.to_vec(),
            ..NodeSettings::default()
        };
        let name = format!("n{}", self.started);
        self.started += 1;
        Node::start(role, host, &name, &settings, &self.namespaces, &self.dir).expect("a node")
    }

    fn primary(&mut self, host: HostName) -> Node {
        let mut node = self.node(StartAs::Primary, host, &[]);
        node.wait_status("run the guest", |status| status.running).unwrap();
        node
    }

    /// A node whose guest goes on from the file.
    fn restored(&mut self, host: HostName) -> Node {
        let flag = format!("--restore={}", self.file().display());
        let mut node = self.node(StartAs::Primary, host, &[flag]);
        node.wait_status("run the guest from its snapshot", |status| status.running).unwrap();
        node
    }

    /// A node that must not start from the file, and says why.
    #[track_caller]
    fn not_restored(&mut self, host: HostName, code: Option<i32>, parts: &[&str]) {
        let flag = format!("--restore={}", self.file().display());
        let mut node = self.node(StartAs::Primary, host, &[flag]);
        node.wait_ended().unwrap();
        let last = node.log_tail(1);
        assert_eq!(node.ended().and_then(|status| status.code()), code, "{last}");
        parts.iter().for_each(|part| assert!(last.contains(part), "`{part}` is missing in: {last}"));
    }

    fn save(&self, node: &Node, more: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mcd"));
        command.args(["snapshot", "save"]).arg(self.file()).arg("--control").arg(node.control()).args(more);
        command.output().expect("mcd runs")
    }
}

#[track_caller]
fn good(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[track_caller]
fn refused(output: &Output, part: &str) {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains(part) && said.lines().count() == 1, "{output:?}");
}

fn info(file: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mcd")).args(["snapshot", "info", "--json"]).arg(file).output().expect("mcd runs")
}

#[test]
fn a_guest_goes_on_from_a_snapshot_that_was_taken_under_load() {
    with_rights("a_guest_goes_on_from_a_snapshot_that_was_taken_under_load", NODE_DEVICES, || {
        let mut hosts = Hosts::new(1, false);
        let mut node = hosts.primary(HostName::A);
        let writer = Writer::start(&hosts.namespaces);
        let before = writer.wait_more();
        let said = good(&hosts.save(&node, &[]));
        let after = writer.count();
        assert!(said.contains("the guest goes on"), "{said}");
        // The writer's connection is as it was.
        writer.wait_more();
        let written = writer.end();
        node.quit().unwrap();
        let told: Value = serde_json::from_str(&good(&info(&hosts.file()))).expect("JSON");
        assert_eq!((&told["guest"], &told["whole"], &told["stopped"]), (&"demo".into(), &true.into(), &false.into()));
        assert_eq!(told["memory"], 32 << 20);
        // On the other host, and twice: what a life did is not in the file.
        for round in 0..2 {
            let mut node = hosts.restored(HostName::B);
            let mut guest = GuestClient::connect(&hosts.namespaces.lan).unwrap();
            let held = keys(&mut guest, written);
            assert!((before..=after + 1).contains(&held), "{held} keys, {before} to {after} acknowledged");
            assert_eq!(guest.get("life").unwrap(), None);
            assert_eq!(guest.ask("SET life 1").unwrap(), "+OK");
            if round == 1 {
                // It can be protected as any other.
                let mut secondary = hosts.node(StartAs::Secondary, HostName::A, &[]);
                node.wait_status("be protected", |status| status.protected).unwrap();
                node.kill().expect("a process to kill");
                secondary.wait_status("take over", |status| status.running).unwrap();
                assert_eq!(keys(&mut guest, written), held);
            } else {
                drop(guest);
                node.quit().unwrap();
            }
        }
    });
}

#[test]
fn a_protected_pair_is_saved_and_goes_on_as_one() {
    with_rights("a_protected_pair_is_saved_and_goes_on_as_one", NODE_DEVICES, || {
        let mut hosts = Hosts::new(2, false);
        let mut primary = hosts.primary(HostName::A);
        let mut secondary = hosts.node(StartAs::Secondary, HostName::B, &[]);
        primary.wait_status("be protected", |status| status.protected).unwrap();
        let writer = Writer::start(&hosts.namespaces);
        let before = writer.wait_more();
        refused(&hosts.save(&secondary, &[]), "ask the primary");
        good(&hosts.save(&primary, &[]));
        let after = writer.count();
        assert_eq!(primary.wait_status("answer", |_| true).unwrap().state, State::Protected);
        writer.wait_more();
        // The epochs that were committed meanwhile and since are whole: the new primary has every
        // write that was acknowledged.
        primary.kill().expect("a process to kill");
        secondary.wait_status("take over", |status| status.running).unwrap();
        writer.wait_more();
        let written = writer.end();
        let mut guest = GuestClient::connect(&hosts.namespaces.lan).unwrap();
        assert_eq!(keys(&mut guest, written), written);
        primary.wait_ended().unwrap();
        // While it runs there, nobody else has it.
        hosts.not_restored(HostName::A, REFUSED, &["'demo' is on record as running elsewhere"]);
        assert_eq!(keys(&mut guest, written), written);
        drop(guest);
        secondary.quit().unwrap();
        let _node = hosts.restored(HostName::A);
        let held = keys(&mut GuestClient::connect(&hosts.namespaces.lan).unwrap(), written);
        assert!((before..=after + 1).contains(&held), "{held} keys, {before} to {after} acknowledged");
    });
}

#[test]
fn a_guest_with_a_disk_is_stopped_with_its_snapshot_and_needs_its_images() {
    with_rights("a_guest_with_a_disk_is_stopped_with_its_snapshot_and_needs_its_images", NODE_DEVICES, || {
        let mut hosts = Hosts::new(1, true);
        let image = hosts.image(HostName::A);
        std::fs::File::create(&image).and_then(|file| file.set_len(8 << 20)).expect("an image");
        let mut primary = hosts.primary(HostName::A);
        let mut secondary = hosts.node(StartAs::Secondary, HostName::B, &[]);
        primary.wait_status("be protected", |status| status.protected).unwrap();
        let mut guest = GuestClient::connect(&hosts.namespaces.lan).unwrap();
        for block in 0..50 {
            assert_eq!(guest.ask(&format!("DISK WRITE {block} {}", block + 7)).unwrap(), "+OK");
        }
        assert_eq!(guest.ask("DISK RUN 64 1000").unwrap(), "+OK");
        refused(&hosts.save(&primary, &[]), "--stop");
        let said = good(&hosts.save(&primary, &["--stop"]));
        assert!(said.contains("the guest is stopped"), "{said}");
        // The node has ended in order, and nobody takes over a guest that was stopped.
        for node in [&mut primary, &mut secondary] {
            node.wait_ended().unwrap();
            assert_eq!(node.ended().and_then(|status| status.code()), Some(0), "{}", node.log_tail(5));
        }
        let head = SnapshotReader::open(&hosts.file()).expect("a snapshot").head().clone();
        let stamp = Stamp::read(&image).expect("a stamp").expect("there is one");
        assert_eq!(stamp.snapshot, Some(head.id));
        let at_that_moment = std::fs::read(&image).expect("an image");
        // The secondary's image is of its last epoch, not of the snapshot.
        hosts.not_restored(HostName::B, REFUSED, &["b.img", "when the snapshot was taken", &head.at.to_string()]);
        let mut node = hosts.restored(HostName::A);
        let mut guest = GuestClient::connect(&hosts.namespaces.lan).unwrap();
        for block in 0..50 {
            let answer = guest.ask(&format!("DISK READ {block}")).unwrap();
            assert!(answer.starts_with(':'), "block {block}: {answer}");
        }
        assert_eq!(guest.ask("DISK RUN 0 0").unwrap(), "+OK");
        assert_eq!(guest.ask("DISK WRITE 60 99").unwrap(), "+OK");
        drop(guest);
        node.quit().unwrap();
        // It has lived on since: its disk and the file do not fit any more.
        let stamp = Stamp::read(&image).expect("a stamp").expect("there is one");
        assert_eq!(stamp.snapshot, None);
        let parts = ["a.img", &stamp.at.to_string(), &head.at.to_string()];
        hosts.not_restored(HostName::A, REFUSED, &parts);
        assert!(std::fs::read(&image).expect("an image") != at_that_moment);
        // From the image alone it starts as ever.
        let mut node = hosts.primary(HostName::A);
        assert_eq!(GuestClient::connect(&hosts.namespaces.lan).unwrap().ask("DISK READ 60").unwrap(), ":99");
        node.quit().unwrap();
    });
}
