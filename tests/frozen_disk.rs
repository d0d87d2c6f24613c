//! The primary's disk does not answer: its image is on a file system that is frozen, and whoever
//! writes to it waits.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use mcd::control::status::Role;
use mcd::testbed::guest_client::GuestClient;
use mcd::testbed::namespaces::{HostName, Namespaces, find_tool};
use mcd::testbed::nodes::{Node, NodeSettings, RunDir, StartAs};
use mcd::testbed::require::{NODE_DEVICES, with_rights};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

const DISK_BYTES: u64 = 8 << 20;
/// Blocks that the guest writes to all the time.
const RUN_BLOCKS: u64 = 128;

/// An ext4 file system in a file, mounted where only the calling thread and its children see it.
struct LoopMount(PathBuf);

impl LoopMount {
    /// `None` where this user may not mount one.
    fn new(dir: &Path) -> Option<LoopMount> {
        unshare(CloneFlags::CLONE_NEWNS).ok()?;
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).ok()?;
        let (image, at) = (dir.join("ext4.img"), dir.join("ext4"));
        File::create(&image).and_then(|file| file.set_len(8 * DISK_BYTES)).expect("an image");
        fs::create_dir(&at).expect("a directory");
        let run = |tool: &str, arguments: &[&Path]| {
            let mut command = Command::new(find_tool(tool)?);
            let done = command.args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).status().ok()?;
            done.success().then_some(())
        };
        run("mkfs.ext4", &[Path::new("-q"), Path::new("-F"), &image])?;
        run("mount", &[Path::new("-o"), Path::new("loop"), &image, &at])?;
        Some(LoopMount(at))
    }

    fn freeze(&self) -> Frozen {
        let script = "fsfreeze --freeze \"$1\" && echo frozen && read -r _; fsfreeze --unfreeze \"$1\"";
        let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
        let mut command = Command::new("sh");
        command.args(["-c", script, "sh"]).arg(&self.0).env("PATH", path);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("a shell");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("a pipe")).read_line(&mut line).expect("a line");
        let frozen = Frozen(child);
        assert_eq!(line, "frozen\n");
        frozen
    }
}

impl Drop for LoopMount {
    fn drop(&mut self) {
        // It ends with the mount namespace at the latest.
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// A frozen file system. A process of its own unfreezes it when its input is closed: when this
/// value is dropped, and also when the test is killed.
struct Frozen(Child);

impl Drop for Frozen {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// A protected guest that writes to its disk, the primary's image on the file system to freeze.
struct Pair {
    primary: Node,
    secondary: Node,
    guest: GuestClient,
    disk: LoopMount,
    _namespaces: Namespaces,
    _dir: RunDir,
}

/// Runs `body` on a thread with mounts of its own, where loop devices can be mounted.
fn with_frozen_disk(name: &str, stall_max_ms: u64, body: impl FnOnce(&mut Pair) + Send) {
    with_rights(name, NODE_DEVICES, || {
        let on_its_thread = || {
            let dir = RunDir::new().unwrap();
            let Some(disk) = LoopMount::new(dir.path()) else {
                println!("skipped: this user may mount no loop device");
                return;
            };
            body(&mut Pair::start(dir, disk, stall_max_ms));
        };
        std::thread::scope(|scope| {
            let ended = scope.spawn(on_its_thread).join();
            ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        });
    });
}

impl Pair {
    fn start(dir: RunDir, disk: LoopMount, stall_max_ms: u64) -> Pair {
        let namespaces = Namespaces::new().unwrap();
        let images = [disk.0.join("a.img"), dir.path().join("b.img")];
        for image in &images {
            File::create(image).and_then(|file| file.set_len(DISK_BYTES)).expect("an image");
        }
        let start = |role, host, name, image: &Path| {
            let disk = format!("--disk={}", image.display());
            let stall_max = format!("--stall-max-ms={stall_max_ms}");
            let heartbeats = ["--heartbeat-interval-ms=100", "--heartbeat-timeout-ms=1000"].map(str::to_owned);
            let settings = NodeSettings {
                program: vec![env!("CARGO_BIN_EXE_mcd").into()],
                memory_mib: 32,
                interval_ms: 10,
                flags: [disk, stall_max].into_iter().chain(heartbeats).collect(),
                ..NodeSettings::default()
            };
            Node::start(role, host, name, &settings, &namespaces, &dir).unwrap()
        };
        let mut primary = start(StartAs::Primary, HostName::A, "n0", &images[0]);
        primary.wait_status("run the guest", |status| status.running).unwrap();
        let secondary = start(StartAs::Secondary, HostName::B, "n1", &images[1]);
        primary.wait_status("be protected", |status| status.protected).unwrap();
        let mut guest = GuestClient::connect(&namespaces.lan).unwrap();
        assert_eq!(guest.ask(&format!("DISK RUN {RUN_BLOCKS} 2000")).unwrap(), "+OK");
        Pair { primary, secondary, guest, disk, _namespaces: namespaces, _dir: dir }
    }
}

#[test]
fn a_disk_frozen_for_less_than_stall_max_causes_no_takeover() {
    let name = "a_disk_frozen_for_less_than_stall_max_causes_no_takeover";
    with_frozen_disk(name, 60_000, |pair| {
        let before = pair.primary.status().unwrap();
        let frozen = pair.disk.freeze();
        // Several heartbeat timeouts: a node without heartbeats would be given up meanwhile.
        let end = Instant::now() + Duration::from_secs(5);
        while Instant::now() < end {
            let primary = pair.primary.status().expect("query-status is answered while the disk hangs");
            assert!(primary.role == Role::Primary && primary.generation == before.generation, "{primary}");
            let secondary = pair.secondary.status().expect("a status");
            assert!(secondary.role == Role::Secondary && !secondary.running, "{secondary}");
            std::thread::park_timeout(Duration::from_millis(20));
        }
        drop(frozen);
        assert_eq!(pair.guest.ask(&format!("DISK WRITE {RUN_BLOCKS} 5")).unwrap(), "+OK");
        let committed = pair.primary.status().unwrap().epochs.committed;
        let after = pair.primary.wait_status("commit again", |status| status.epochs.committed > committed + 3).unwrap();
        assert!(after.protected && after.generation == before.generation, "{after}");
    });
}

#[test]
fn a_disk_frozen_for_longer_than_stall_max_causes_one_orderly_takeover() {
    let name = "a_disk_frozen_for_longer_than_stall_max_causes_one_orderly_takeover";
    with_frozen_disk(name, 3_000, |pair| {
        let before = pair.primary.status().unwrap();
        let frozen = pair.disk.freeze();
        let taken = pair.secondary.wait_status("take over", |s| s.running && s.takeover.is_some()).unwrap();
        assert_eq!(taken.generation, before.generation + 1, "{taken}");
        // The old primary reports that it lost the guest while its disk still hangs.
        let old = pair.primary.wait_status("give the guest up", |status| status.role != Role::Primary).unwrap();
        assert!(!old.protected, "{old}");
        assert_eq!(pair.guest.ask("SET key value").unwrap(), "+OK");
        drop(frozen);
        // Its disk answers again, and the old primary still does not run the guest.
        let old = pair.primary.wait_status("answer", |_| true).unwrap();
        assert!(old.role != Role::Primary && !old.running, "{old}");
        let new = pair.secondary.status().unwrap();
        assert!(new.role == Role::Primary && new.running, "{new}");
        assert_eq!(pair.guest.get("key").unwrap().as_deref(), Some("value"));
    });
}
