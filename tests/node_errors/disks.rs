//! Disk images that are not there, in use, of another size or another guest, not whole, or without
//! room.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use mcd::checkpoint::stamp::{Stamp, StampState, stamp_path};
use mcd::control::status::State;
use mcd::device::image::RawImage;
use mcd::protocol::types::{EpochId, Generation, GuestName};

use super::environment::{Environment, FAILURE, HOST, Mount, REFUSED, USAGE, mount, run};
use super::process::Node;

const DISK_BYTES: u64 = 8 << 20;

/// An image of so many bytes that are not zero.
fn image(host: &Environment, name: &str, bytes: u64) -> PathBuf {
    let path = host.path(name);
    fs::write(&path, vec![0xa5; bytes as usize]).expect("an image");
    path
}

fn flag(path: &Path, rest: &str) -> String {
    format!("--disk={}{rest}", path.display())
}

fn stamp(image: &Path, guest: &str, state: StampState) {
    let at = EpochId { generation: Generation(9), epoch: 4 };
    Stamp::now(&GuestName::new(guest).expect("a name"), at, state).write(image).expect("a stamp");
}

fn state(image: &Path) -> Option<StampState> {
    Stamp::read(image).expect("a stamp").map(|stamp| stamp.state)
}

fn primary(host: &Environment, flags: &[&str]) -> Node {
    let mut node = Node::start(host.primary_command(flags));
    node.wait_guest();
    node
}

#[test]
fn a_guest_does_not_start_from_a_missing_locked_or_partial_image() {
    run("disks::a_guest_does_not_start_from_a_missing_locked_or_partial_image", |host| {
        let start = |flags: &[&str]| Node::start(host.primary_command(flags));
        let disk = image(host, "p.img", DISK_BYTES);
        let missing = flag(&host.path("none.img"), "");
        start(&[&missing]).fails(HOST, &["there is no disk image", "truncate"]);
        let locked = RawImage::open(&disk, false).expect("an image");
        start(&[&flag(&disk, "")]).fails(HOST, &["p.img is in use"]);
        drop(locked);
        stamp(&disk, "web", StampState::Filling);
        start(&[&flag(&disk, "")]).fails(REFUSED, &["p.img is not started from", "not whole", "--force-disk"]);
        stamp(&disk, "web", StampState::Applying);
        start(&[&flag(&disk, "")]).fails(REFUSED, &["a secondary's, at g9/4", "--force-disk"]);
        stamp(&disk, "mail", StampState::Whole);
        start(&[&flag(&disk, "")]).fails(REFUSED, &["belongs to guest 'mail'", "--force-disk"]);
        fs::write(stamp_path(&disk), "what?").expect("a file");
        start(&[&flag(&disk, "")]).fails(HOST, &["p.img.mcd is no stamp"]);
        // Nothing of it was put on record, and a person may insist.
        let mut node = primary(host, &[&flag(&disk, ""), "--force-disk"]);
        node.quit();
        node.ends_well();
        let stamp = Stamp::read(&disk).expect("a stamp").expect("there is one");
        assert_eq!((stamp.guest.as_str(), stamp.at.generation, stamp.state), ("web", Generation(2), StampState::Whole));
    });
}

#[test]
fn an_image_that_is_not_raw_is_refused_unless_the_operator_insists() {
    run("disks::an_image_that_is_not_raw_is_refused_unless_the_operator_insists", |host| {
        let start = |flags: &[&str]| Node::start(host.primary_command(flags));
        for (name, magic, at, is) in [
            ("a.qcow2", "QFI\u{fb}", 0, "a qcow2 image"),
            ("a.vmdk", "KDMV", 0, "a VMDK image"),
            ("a.vhdx", "vhdxfile", 0, "a VHDX image"),
            ("a.vdi", "\u{7f}\u{10}\u{da}\u{be}", 0x40, "a VDI image"),
        ] {
            let mut bytes = vec![0; 65536];
            let magic: Vec<u8> = magic.chars().map(|c| c as u8).collect();
            bytes[at..at + magic.len()].copy_from_slice(&magic);
            let path = host.path(name);
            fs::write(&path, &bytes).expect("a file");
            for rest in ["", ",ro", ",mode=shared"] {
                let parts = [is, "qemu-img convert -O raw", ",format=raw"];
                start(&[&flag(&path, rest)]).fails(USAGE, &parts);
                host.secondary(&[&flag(&path, rest)]).fails(USAGE, &parts);
            }
            assert!(fs::read(&path).expect("a file") == bytes, "it was not touched");
        }
        // Too long or too short to be a disk: still the format is what is wrong.
        let path = host.path("a.xz");
        fs::write(&path, b"\xfd7zXZ\0 and so on").expect("a file");
        start(&[&flag(&path, "")]).fails(USAGE, &["a compressed file", "unxz"]);
        let mut node = primary(host, &[&flag(&host.path("a.qcow2"), ",format=raw")]);
        node.quit();
        node.ends_well();
    });
}

#[test]
fn a_newcomer_refuses_images_that_do_not_match_the_guests_disks() {
    run("disks::a_newcomer_refuses_images_that_do_not_match_the_guests_disks", |host| {
        let disk = image(host, "p.img", DISK_BYTES);
        let primary = primary(host, &[&flag(&disk, ",serial=one")]);
        host.secondary(&[]).fails(HOST, &["the guest has 1 disks", "given 0 times"]);
        let small = image(host, "small.img", DISK_BYTES - 512);
        stamp(&small, "web", StampState::Whole);
        host.secondary(&[&flag(&small, "")]).fails(HOST, &["small.img has 8388096 bytes", "the guest's disk 8388608"]);
        host.secondary(&[&flag(&small, ",ro")]).fails(HOST, &["is read-only here and writable at the primary"]);
        host.secondary(&[&flag(&disk, "")]).fails(HOST, &["p.img is in use"]);
        let nowhere = flag(&host.path("no/where.img"), "");
        host.secondary(&[&nowhere]).fails(HOST, &["cannot use disk image", "no/where.img"]);
        let other = image(host, "s.img", DISK_BYTES);
        stamp(&other, "mail", StampState::Whole);
        host.secondary(&[&flag(&other, "")]).fails(REFUSED, &["s.img belongs to guest 'mail'", "--force-disk"]);
        assert_eq!(state(&other), Some(StampState::Whole), "nothing was overwritten");
        let mut node = host.secondary(&[&flag(&other, ""), "--force-disk"]);
        node.wait_line("protected in g");
        node.quit();
        node.ends_well();
        assert_eq!(state(&other), Some(StampState::Whole));
        assert!(fs::read(&other).expect("an image") == fs::read(&disk).expect("an image"));
        primary.assert_serves_alone();
    });
}

#[test]
fn a_newcomer_does_not_write_over_what_was_never_its_guests() {
    run("disks::a_newcomer_does_not_write_over_what_was_never_its_guests", |host| {
        let disk = image(host, "p.img", DISK_BYTES);
        let precious = image(host, "precious.img", DISK_BYTES);
        let parts = ["precious.img has no stamp and is not empty", "--force-disk"];
        // Before there is a primary, and while there is one.
        host.secondary(&[&flag(&precious, "")]).fails(REFUSED, &parts);
        let primary = primary(host, &[&flag(&disk, "")]);
        host.secondary(&[&flag(&precious, "")]).fails(REFUSED, &parts);
        assert!(fs::read(&precious).expect("an image").iter().all(|byte| *byte == 0xa5));
        assert_eq!(state(&precious), None, "it was not stamped either");
        primary.assert_serves_alone();
        // An empty file is what an operator prepares, and an image of the guest's own is a base.
        let empty = host.path("empty.img");
        File::create(&empty).and_then(|file| file.set_len(DISK_BYTES)).expect("an image");
        for _ in 0..2 {
            let mut node = host.secondary(&[&flag(&empty, "")]);
            node.wait_line("protected in g");
            node.quit();
            node.ends_well();
            primary.wait_status("alone", |status| status.state == State::Solo);
        }
        let mut node = host.secondary(&[&flag(&precious, ""), "--force-disk"]);
        node.wait_line("protected in g");
    });
}

#[test]
fn a_sparse_disk_of_a_tebibyte_is_filled_without_reading_its_holes() {
    run("disks::a_sparse_disk_of_a_tebibyte_is_filled_without_reading_its_holes", |host| {
        let (disk, made) = (host.path("p.img"), host.path("made.img"));
        let file = File::create(&disk).expect("an image");
        file.set_len(1 << 40).expect("room for nothing");
        for at in [0, 1 << 30, (1 << 40) - 512] {
            file.write_all_at(&[0xa5; 512], at).expect("written");
        }
        let mut primary = primary(host, &[&flag(&disk, "")]);
        let mut node = host.secondary(&[&flag(&made, "")]);
        node.wait_line("protected in g");
        primary.quit();
        primary.ends_well();
        node.wait_status("running", |status| status.running);
        let file = File::open(&made).expect("an image");
        for (at, byte) in [(0, 0xa5), (512, 0), (1 << 29, 0), (1 << 30, 0xa5), ((1 << 40) - 512, 0xa5)] {
            let mut read = [1; 512];
            file.read_exact_at(&mut read, at).expect("read");
            assert_eq!(read, [byte; 512], "{at}");
        }
        assert!(file.metadata().expect("metadata").blocks() * 512 < 1 << 20, "it has holes where the other has");
    });
}

/// A loop device over a file of so many bytes, if this host has such devices.
struct LoopDevice(PathBuf);

impl LoopDevice {
    fn over(host: &Environment, name: &str, bytes: u64) -> Option<LoopDevice> {
        let file = host.path(name);
        File::create(&file).and_then(|file| file.set_len(bytes)).expect("a file");
        let output = Command::new("losetup").args(["--find", "--show"]).arg(&file).output().ok()?;
        let device = String::from_utf8(output.stdout).ok()?.trim().to_owned();
        if !output.status.success() || device.is_empty() {
            eprintln!("skipped: this host gives no loop devices");
            return None;
        }
        // Its stamp lies beside the path, so that is not in /dev.
        let link = host.path(&format!("{name}.device"));
        std::os::unix::fs::symlink(device, &link).expect("a link");
        Some(LoopDevice(link))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let device = fs::canonicalize(&self.0).expect("a device");
        let detached = Command::new("losetup").arg("--detach").arg(device).status();
        assert!(detached.expect("losetup runs").success());
    }
}

#[test]
fn a_larger_device_is_used_in_part_and_a_smaller_one_refused() {
    run("disks::a_larger_device_is_used_in_part_and_a_smaller_one_refused", |host| {
        let Some(large) = LoopDevice::over(host, "large", DISK_BYTES + (1 << 20)) else { return };
        let Some(small) = LoopDevice::over(host, "small", DISK_BYTES / 2) else { return };
        let disk = image(host, "p.img", DISK_BYTES);
        let mut primary = primary(host, &[&flag(&disk, "")]);
        let parts = ["small.device is a device of 4194304 bytes", "has 8388608", "at least that many"];
        host.secondary(&[&flag(&small.0, "")]).fails(HOST, &parts);
        let mut node = host.secondary(&[&flag(&large.0, "")]);
        node.wait_line("protected in g");
        let written = fs::read(host.path("large")).expect("a file");
        let (used, rest) = written.split_at(DISK_BYTES as usize);
        assert!(used == fs::read(&disk).expect("an image") && rest.iter().all(|byte| *byte == 0));
        // The guest's disk keeps its size where it runs next, also from a new start there.
        primary.quit();
        primary.ends_well();
        node.wait_status("running", |status| status.running);
        node.quit();
        node.ends_well();
        assert_eq!(Stamp::read(&large.0).expect("a stamp").and_then(|stamp| stamp.disk_bytes), Some(DISK_BYTES));
        let mut node = Node::start(host.primary_command(&[&flag(&large.0, "")]));
        node.wait_line("the guest's disk is smaller than its device");
        let mut back = host.secondary(&[&flag(&disk, "")]);
        back.wait_line("protected in g");
    });
}

#[test]
fn a_secondary_creates_its_image_and_stamps_it_as_partial() {
    run("disks::a_secondary_creates_its_image_and_stamps_it_as_partial", |host| {
        let (disk, made) = (image(host, "p.img", DISK_BYTES), host.path("made.img"));
        let read_only = image(host, "ro.img", 4096);
        let flags = [flag(&read_only, ",ro"), flag(&disk, "")];
        let mut primary = primary(host, &[&flags[0], &flags[1]]);
        let mut node = host.secondary(&[&flags[0], &flag(&made, "")]);
        node.wait_line("protected in g");
        assert_eq!(fs::metadata(&made).expect("an image").len(), DISK_BYTES);
        assert_eq!(Stamp::read(&read_only).expect("none"), None, "what nobody writes needs no stamp");
        node.kill();
        // The stamp of a whole image is written behind the image; what was killed before that has
        // the one of a part.
        assert!(matches!(state(&made), Some(StampState::Applying | StampState::Filling)));
        primary.wait_status("alone", |status| status.state == State::Solo);
        primary.quit();
        primary.ends_well();
        let start = host.primary_command(&[&flags[0], &flag(&made, "")]);
        Node::start(start).fails(REFUSED, &["made.img is not started from", "--force-disk"]);
    });
}

#[test]
fn a_full_image_file_system_ends_the_secondary_and_not_the_guest() {
    run("disks::a_full_image_file_system_ends_the_secondary_and_not_the_guest", |host| {
        let disk = image(host, "p.img", DISK_BYTES);
        let primary = primary(host, &[&flag(&disk, "")]);
        let small = host.path("small");
        fs::create_dir(&small).expect("a directory");
        let (mut command, control) = host.secondary_command(&[&flag(&small.join("s.img"), "")]);
        mount(&mut command, &[Mount::Small(small, DISK_BYTES / 2)], None);
        Node::start((command, control)).fails(FAILURE, &["its image is spoilt", "No space left", "disk 0"]);
        primary.wait_status("alone", |status| status.state == State::Solo);
        primary.assert_serves_alone();
        // With room it goes well: what failed was the image, not the pair.
        let roomy = host.path("roomy.img");
        File::create(&roomy).and_then(|file| file.set_len(DISK_BYTES)).expect("an image");
        let mut node = host.secondary(&[&flag(&roomy, "")]);
        node.wait_line("protected in g");
    });
}
