//! Snapshot files that a guest is not started from, and snapshots that are not taken. Nothing is
//! claimed, and nothing runs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicBool;

use mcd::checkpoint::snapshot::{self, SavedCpu, SnapshotHead, SnapshotId};
use mcd::machine::{CpuModel, GuestRam, cpu_maker, host_cpu};
use mcd::protocol::machine_shape::{DiskShape, MachineShape};
use mcd::protocol::types::{EpochId, Generation, GuestName};
use serde_json::json;

use super::environment::{Environment, FAILURE, HOST, REFUSED, run};
use super::process::{Node, WAIT_MAX};

const USAGE: i32 = 2;
const MEMORY_BYTES: u64 = 16 << 20;

/// A head that fits this host and guest `web`.
fn head() -> SnapshotHead {
    let guest = host_cpu(CpuModel::Host).expect("KVM").own_guest();
    SnapshotHead {
        id: SnapshotId(7),
        guest: GuestName::new("web").expect("a name"),
        at: EpochId { generation: Generation(5), epoch: 17 },
        taken_s: 1,
        stopped: false,
        shape: MachineShape::bare(MEMORY_BYTES, 1, [2, 0, 0, 0, 0, 1]),
        cpu: SavedCpu { model: CpuModel::Host, maker: cpu_maker(), guest },
        build: "0.0.1".to_owned(),
    }
}

/// A whole file of a guest that never ran.
fn file(host: &Environment, head: &SnapshotHead) -> PathBuf {
    let path = host.path("web.snap");
    let memory = GuestRam::new(head.shape.memory_bytes).expect("memory");
    memory.write(0x1000, b"not zeros").expect("memory");
    snapshot::write(&path, head, &memory, b"no state", &AtomicBool::new(false)).expect("written");
    path
}

fn restore(host: &Environment, path: &Path, more: &[&str]) -> Node {
    let flag = format!("--restore={}", path.display());
    Node::start(host.primary_command(&[&[flag.as_str()], more].concat()))
}

fn nothing_was_claimed(host: &Environment) {
    let records: Vec<_> = fs::read_dir(host.arbiter()).expect("a directory").flatten().collect();
    let text = records.iter().filter_map(|record| fs::read_to_string(record.path()).ok()).collect::<String>();
    assert!(!text.contains("solo"), "{text}");
}

#[test]
fn a_guest_does_not_start_from_a_damaged_snapshot() {
    run("snapshots::a_guest_does_not_start_from_a_damaged_snapshot", |host| {
        restore(host, &host.path("none.snap"), &[]).fails(USAGE, &["cannot read snapshot", "none.snap"]);
        restore(host, &host.arbiter(), &[]).fails(USAGE, &["is no snapshot of mcd"]);
        let path = file(host, &head());
        let bytes = fs::read(&path).expect("a file");
        let cut = host.path("cut.snap");
        fs::write(&cut, &bytes[..bytes.len() - 1]).expect("a file");
        restore(host, &cut, &[]).fails(USAGE, &["cut.snap was cut off", "take another copy"]);
        let damaged = host.path("damaged.snap");
        let mut other = bytes.clone();
        *other.last_mut().expect("bytes") ^= 1;
        fs::write(&damaged, &other).expect("a file");
        restore(host, &damaged, &[]).fails(USAGE, &["damaged.snap is damaged", "check sum"]);
        let older = host.path("older.snap");
        let mut other = bytes.clone();
        other[8] = 0;
        fs::write(&older, &other).expect("a file");
        restore(host, &older, &[]).fails(USAGE, &["older.snap is of format 0.", "the release of mcd that wrote it"]);
        // Whole, and yet no state of a machine: known before the guest is claimed.
        restore(host, &path, &[]).fails(HOST, &["web.snap", "state", "cut off"]);
        nothing_was_claimed(host);
    });
}

#[test]
fn a_snapshot_is_refused_where_host_or_flags_differ() {
    run("snapshots::a_snapshot_is_refused_where_host_or_flags_differ", |host| {
        let path = file(host, &head());
        let with = |flag: &str, parts: &[&str]| restore(host, &path, &[flag]).fails(USAGE, parts);
        with("--memory=32M", &["--memory 32M contradicts snapshot", "16 MiB", "leave it out"]);
        with("--cpus=2", &["--cpus 2 contradicts", "1 vCPUs"]);
        with("--mac=02:00:00:00:00:02", &["--mac contradicts", "02:00:00:00:00:01"]);
        with("--cpu=baseline", &["--cpu contradicts", "--cpu host"]);
        with("--guest=mail", &["--guest mail contradicts", "guest 'web'"]);
        with("--kernel=/boot/vmlinuz", &["--kernel and --restore contradict each other"]);
        with("--guest-gateway=10.0.0.1", &["--guest-gateway and --restore"]);
        restore(host, &path, &["--disk=/dev/null"]).fails(HOST, &["/dev/null is neither"]);
        let mut other = head();
        other.cpu.maker = *b"SomebodyElse";
        other.cpu.guest.digest ^= 1;
        let parts = ["taken on a CPU of SomebodyElse", "other CPU features"];
        restore(host, &file(host, &other), &[]).fails(HOST, &parts);
        let mut other = head();
        other.cpu.guest.tsc_khz *= 2;
        if !host_cpu(CpuModel::Host).expect("KVM").tsc_scales {
            restore(host, &file(host, &other), &[]).fails(HOST, &["has a TSC of", "cannot scale it"]);
        }
        nothing_was_claimed(host);
    });
}

#[test]
fn a_snapshot_is_refused_where_disk_images_differ() {
    run("snapshots::a_snapshot_is_refused_where_disk_images_differ", |host| {
        let mut with_disk = head();
        with_disk.stopped = true;
        with_disk.shape.disks = vec![DiskShape { bytes: 1 << 20, read_only: false, shared: false, serial: [b'a'; 20] }];
        let path = file(host, &with_disk);
        let image = host.path("p.img");
        let flag = |rest: &str| format!("--disk={}{rest}", image.display());
        restore(host, &path, &[]).fails(HOST, &["the guest has 1 disks", "given 0 times"]);
        fs::write(&image, vec![1; 1 << 19]).expect("an image");
        restore(host, &path, &[&flag("")]).fails(HOST, &["p.img has 524288 bytes", "1048576"]);
        fs::write(&image, vec![1; 1 << 20]).expect("an image");
        restore(host, &path, &[&flag(",ro")]).fails(HOST, &["is read-only here", "the snapshot's disk writable"]);
        restore(host, &path, &[&flag(",serial=b")]).fails(HOST, &["another serial"]);
        let parts = ["p.img has no stamp", "when the snapshot was taken, at g5/17"];
        restore(host, &path, &[&flag("")]).fails(REFUSED, &parts);
        restore(host, &path, &[&flag(""), "--force-disk"]).fails(REFUSED, &parts);
        nothing_was_claimed(host);
    });
}

#[test]
fn a_disk_that_is_only_read_needs_no_stop() {
    run("snapshots::a_disk_that_is_only_read_needs_no_stop", |host| {
        let image = host.path("ro.img");
        fs::write(&image, vec![1; 1 << 20]).expect("an image");
        let flag = |rest: &str| format!("--disk={},ro{rest}", image.display());
        let mut node = Node::start(host.primary_command(&[&flag(",serial=abc")]));
        node.wait_guest();
        let path = host.path("web.snap");
        let (file, control) = (path.display().to_string(), host.path("p.sock").display().to_string());
        let (code, _, said) = mcd(&["snapshot", "save", &file, "--control", &control]);
        assert_eq!(code, Some(0), "{said}");
        node.kill();
        // It was never stopped: only a person's word that it is dead lets it go on.
        restore(host, &path, &[&flag("")]).fails(REFUSED, &["on record as running elsewhere", "mcd cold-start"]);
        let (mut command, control) = host.cold_start_command(&[]);
        command.args([format!("--restore={}", path.display()), flag("")]);
        let mut node = Node::start((command, control));
        node.wait_guest();
        node.assert_serves_alone();
        node.quit();
        node.ends_well();
    });
}

fn mcd(words: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_mcd")).args(words).output().expect("mcd runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn snapshot_commands_that_cannot_be_carried_out_are_refused() {
    run("snapshots::snapshot_commands_that_cannot_be_carried_out_are_refused", |host| {
        let node = host.primary();
        let control = host.path("p.sock").display().to_string();
        let refused = |file: &Path, part: &str| {
            let file = file.display().to_string();
            let (code, _, said) = mcd(&["snapshot", "save", &file, "--control", &control]);
            assert!(code == Some(FAILURE) && said.contains(part) && said.lines().count() == 1, "{code:?}: {said}");
        };
        refused(&host.path("no/where.snap"), "cannot create snapshot");
        refused(&host.arbiter(), "is no file");
        refused(Path::new("/dev/full"), "is no file");
        let mut client = node.client();
        for arguments in [json!({}), json!({"path": "here.snap"}), json!({"path": "/x", "stop": 1}), json!({"path": 3})]
        {
            client.execute("mc-snapshot", arguments, WAIT_MAX).expect_err("no such arguments");
        }
        // Each was refused at no cost to the guest; a good one replaces what is there, and leaves
        // nothing else.
        node.wait_status("running", |status| status.running);
        let good = host.path("good.snap");
        fs::write(&good, "an older file").expect("a file");
        let name = good.display().to_string();
        let (code, said, _) = mcd(&["snapshot", "save", &name, "--control", &control]);
        assert!(code == Some(0) && said.contains("the guest goes on"), "{said}");
        assert!(!host.path("good.snap.partial").exists());
        let (code, said, _) = mcd(&["snapshot", "info", &name]);
        assert!(code == Some(0) && said.contains("guest      web, g1/0") && said.contains("whole: "), "{said}");
        node.assert_serves_alone();
        let (code, _, said) = mcd(&["snapshot", "save", &name]);
        assert!(code == Some(USAGE) && said.contains("--guest NAME"), "{said}");
        let (code, _, said) = mcd(&["snapshot", "restore", &name, "--memory=1G"]);
        assert!(code == Some(USAGE) && said.contains("--memory 1G contradicts"), "{said}");
        let (code, _, said) = mcd(&["snapshot", "restore", &name]);
        assert!(code == Some(USAGE) && said.contains("--tap NAME is missing"), "{said}");
    });
}
