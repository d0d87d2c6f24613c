//! The `file:` arbiter among processes, and on a disk that is full.

use mcd::arbiter::file::FileArbiter;
use mcd::arbiter::{Arbiter, ArbiterError, Swap};
use mcd::protocol::record::Record;
use mcd::protocol::types::{Generation, GuestName, InstanceId};
use mcd::testbed::require::with_rights;
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// Tells a racer where to race, and who it is.
const RACE_DIRECTORY: &str = "MCD_TEST_RACE_DIRECTORY";
const RACE_INSTANCE: &str = "MCD_TEST_RACE_INSTANCE";

/// The generation at which a race is over.
const LAST: u64 = 10_000;

fn guest() -> GuestName {
    GuestName::new("raced").unwrap()
}

/// Not a test of its own: the process that [`each_generation_is_won_once`] starts several times.
#[test]
fn racer() {
    let (Ok(directory), Ok(instance)) = (std::env::var(RACE_DIRECTORY), std::env::var(RACE_INSTANCE)) else { return };
    let me = InstanceId(instance.parse().unwrap());
    let mut arbiter = FileArbiter::new(directory, &guest());
    let mut wins = String::new();
    loop {
        let stands = arbiter.read().unwrap();
        let new = stands.map_or_else(|| Record::first(me), |record| record.next_solo(me));
        if new.generation > Generation(LAST) {
            break;
        }
        if arbiter.swap(stands.as_ref(), &new).unwrap() == Swap::Won {
            wins.push_str(&format!("won {}\n", new.generation.0));
        }
    }
    io::stdout().write_all(wins.as_bytes()).unwrap();
}

fn start_racer(directory: &Path, instance: u32) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "racer", "--nocapture"])
        .env(RACE_DIRECTORY, directory)
        .env(RACE_INSTANCE, instance.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

#[test]
fn each_generation_is_won_once() {
    // In memory where there is such a directory: on a disk the race is the same and only fsync
    // takes longer.
    let directory = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let racers: Vec<_> = (1..=3).map(|instance| start_racer(directory.path(), instance)).collect();
    let mut winners = BTreeMap::new();
    for (number, racer) in racers.into_iter().enumerate() {
        let output = racer.wait_with_output().unwrap();
        assert!(output.status.success(), "racer {number}");
        for line in String::from_utf8(output.stdout).unwrap().lines() {
            if let Some(generation) = line.strip_prefix("won ") {
                let before = winners.insert(generation.parse::<u64>().unwrap(), number);
                assert_eq!(before, None, "generation {generation} was won twice");
            }
        }
    }
    assert_eq!(winners.keys().copied().collect::<Vec<_>>(), (1..=LAST).collect::<Vec<_>>());
    let last = FileArbiter::new(directory.path(), &guest()).read().unwrap().unwrap();
    assert_eq!(last.generation, Generation(LAST));
    assert_eq!(last.owner, InstanceId(winners[&LAST] as u128 + 1));
}

/// Runs `test`, the body of the test `name`, on a thread with a tiny disk of its own.
fn on_a_tiny_disk(name: &str, test: impl FnOnce(&Path) + Send) {
    use nix::mount::{MsFlags, mount};
    use nix::sched::{CloneFlags, unshare};
    let mount_at = |disk: &Path| {
        unshare(CloneFlags::CLONE_NEWNS)?;
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
        mount(Some("tmpfs"), disk, Some("tmpfs"), MsFlags::empty(), Some("size=64k"))
    };
    with_rights(name, &[], || {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let directory = tempfile::tempdir().unwrap();
                mount_at(directory.path()).expect("who may make namespaces may mount a tmpfs in one");
                test(directory.path());
                // So that the directory can be removed.
                nix::mount::umount(directory.path()).unwrap();
            });
        });
    });
}

#[test]
fn a_full_disk_leaves_the_old_record() {
    on_a_tiny_disk("a_full_disk_leaves_the_old_record", |disk| {
        let first = Record::first(InstanceId(1));
        let second = first.next_solo(InstanceId(2));
        let mut arbiter = FileArbiter::new(disk, &guest());
        assert_eq!(arbiter.swap(None, &first).unwrap(), Swap::Won);
        let filler = disk.join("filler");
        let mut file = std::fs::File::create(&filler).unwrap();
        while file.write_all(&[1; 4096]).is_ok() {}

        let error = arbiter.swap(Some(&first), &second).unwrap_err();
        assert!(matches!(error, ArbiterError::Full { .. }), "{error}");
        assert!(error.to_string().starts_with("no space left") && !error.to_string().contains('\n'));
        assert_eq!(arbiter.read().unwrap(), Some(first));
        assert!(!disk.join("raced.record.new").exists());

        std::fs::remove_file(filler).unwrap();
        drop(file);
        assert_eq!(arbiter.swap(Some(&first), &second).unwrap(), Swap::Won);
        assert_eq!(arbiter.read().unwrap(), Some(second));
        // The thread that works for the arbiter lives in this namespace too; without it the disk
        // can go.
    });
}
