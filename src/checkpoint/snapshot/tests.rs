use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::AtomicBool;

use super::*;
use crate::machine::{CpuModel, GuestRam};
use crate::protocol::cpu::{GuestCpu, HostCpu};
use crate::protocol::machine_shape::{DiskShape, MachineShape};
use crate::protocol::pages::PAGE_BYTES;
use crate::protocol::types::{EpochId, Generation, GuestName};

const PAGES: u64 = 700;

fn head() -> SnapshotHead {
    let mut shape = MachineShape::bare(PAGES * PAGE_BYTES as u64, 2, [2, 0, 0, 0, 0, 9]);
    let serial = *b"data-1\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    shape.disks = vec![DiskShape { bytes: 0x8000_0000, read_only: false, shared: false, serial }];
    SnapshotHead {
        id: SnapshotId(0x0001_0203_0405_0607_0809_0a0b_0c0d_0e0f),
        guest: GuestName::new("web-1").expect("a name"),
        at: EpochId { generation: Generation(7), epoch: 300 },
        taken_s: 0x6553_f100,
        stopped: true,
        shape,
        cpu: SavedCpu {
            model: CpuModel::Baseline,
            maker: *b"GenuineIntel",
            guest: GuestCpu { digest: 0x1122_3344_5566_7788, tsc_khz: 2_100_000 },
        },
        build: "0.1.0".to_owned(),
    }
}

/// Memory of which every third page is not zeros: some compress, some do not.
fn memory() -> GuestRam {
    let memory = GuestRam::new(PAGES * PAGE_BYTES as u64).expect("memory");
    let mut seed = 1u32;
    for index in (0..PAGES).step_by(3) {
        let mut page = [index as u8 | 1; PAGE_BYTES];
        if index % 2 == 0 {
            for byte in &mut page {
                seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                *byte = (seed >> 24) as u8;
            }
        }
        memory.write_page(index, &page).expect("a page");
    }
    memory
}

fn state() -> Vec<u8> {
    (0..5000u32).map(|n| (n * 7) as u8).collect()
}

/// A directory and a good snapshot in it.
fn written() -> (tempfile::TempDir, PathBuf, Vec<u8>) {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("web.snap");
    let written = write(&path, &head(), &memory(), &state(), &AtomicBool::new(false)).expect("written");
    let bytes = fs::read(&path).expect("a file");
    assert_eq!(written, Written { pages: PAGES.div_ceil(3), bytes: bytes.len() as u64 });
    (directory, path, bytes)
}

/// What is wrong with a file of these bytes; `None` if nothing.
fn verdict(path: &Path, bytes: &[u8]) -> Option<SnapshotError> {
    fs::write(path, bytes).expect("a file");
    SnapshotReader::open(path).and_then(SnapshotReader::check).err()
}

#[test]
fn the_front_of_version_1() {
    let hex: String = head().encode().iter().map(|byte| format!("{byte:02x}")).collect();
    let expected = [
        "4d43442d534e4150", // MCD-SNAP
        "0100",
        "0300",
        "7c000000",
        "f847c762",
        "83e2e8b0",
        "0f0e0d0c0b0a09080706050403020100",
        "05",
        "7765622d31",
        "0700000000000000",
        "2c01000000000000",
        "00f1536500000000",
        "01",
        "01",
        "47656e75696e65496e74656c",
        "8877665544332211",
        "200b2000",
        "05",
        "302e312e30",
        "00c02b0000000000",
        "02",
        "020000000009",
        "00",
        "01",
        "0000008000000000",
        "00",
        "646174612d310000000000000000000000000000",
    ];
    assert_eq!(hex, expected.concat());
}

#[test]
fn what_is_written_is_read_back() {
    let (directory, path, _) = written();
    let names: Vec<_> = fs::read_dir(&directory).expect("list").flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(names, ["web.snap"]);
    assert_eq!(fs::metadata(&path).expect("a file").permissions().mode() & 0o777, 0o600);
    let reader = SnapshotReader::open(&path).expect("a snapshot");
    assert_eq!(*reader.head(), head());
    let (from, to) = (memory(), GuestRam::new(PAGES * PAGE_BYTES as u64).expect("memory"));
    assert_eq!(reader.load(&to).expect("whole"), state());
    let (mut ours, mut theirs) = ([0; PAGE_BYTES], [0; PAGE_BYTES]);
    for index in 0..PAGES {
        from.read_page(index, &mut ours).expect("a page");
        to.read_page(index, &mut theirs).expect("a page");
        assert!(ours == theirs, "page {index}");
    }
}

#[test]
fn a_file_that_was_cut_off_anywhere_is_known_as_such() {
    let (_directory, path, bytes) = written();
    // Where each part ends: preface, head, every frame's header and payload.
    let mut bounds = vec![0, 8, PREFACE_BYTES, PREFACE_BYTES + head().encode().len() - PREFACE_BYTES];
    let mut at = head().encode().len();
    while at < bytes.len() {
        let length = u32::from_le_bytes(bytes[at + 8..at + 12].try_into().expect("a length")) as usize;
        bounds.extend([at + 20, at + 20 + length]);
        at += 20 + length;
    }
    assert_eq!(bounds.pop(), Some(bytes.len()));
    assert!(bounds.len() > 8);
    let near = bounds.iter().flat_map(|at| [at.saturating_sub(1), *at, at + 1]);
    for cut in near.chain((0..bytes.len()).step_by(10_007)) {
        let error = verdict(&path, &bytes[..cut]).unwrap_or_else(|| panic!("cut at {cut}"));
        let known = matches!(error, SnapshotError::CutOff { .. })
            || (cut < 8 && matches!(error, SnapshotError::NotASnapshot { .. }));
        assert!(known && !error.to_string().contains('\n'), "cut at {cut}: {error}");
    }
    let longer = [&bytes[..], &[0; 30]].concat();
    assert!(matches!(verdict(&path, &longer), Some(SnapshotError::Damaged { .. })));
    let twice = [&bytes[..], &bytes[head().encode().len()..]].concat();
    assert!(matches!(verdict(&path, &twice), Some(SnapshotError::Damaged { .. })));
    assert!(verdict(&path, &bytes).is_none());
}

#[test]
fn a_byte_that_is_not_what_it_was_is_found_wherever_it_is() {
    let (_directory, path, bytes) = written();
    let front = head().encode().len();
    let frames = front..front + 200;
    let end = bytes.len() - 200..bytes.len();
    for at in (0..front).chain(frames).chain((0..bytes.len()).step_by(4001)).chain(end) {
        for flip in [0x01, 0x80] {
            let mut damaged = bytes.clone();
            damaged[at] ^= flip;
            let error = verdict(&path, &damaged).unwrap_or_else(|| panic!("byte {at} with {flip:#x}"));
            assert!(!error.to_string().contains('\n') && !matches!(error, SnapshotError::Read { .. }), "{at}: {error}");
        }
    }
}

#[test]
fn frames_that_are_whole_but_not_what_was_written_are_found() {
    let (_directory, path, bytes) = written();
    let front = head().encode().len();
    let mut frames = Vec::new();
    let mut at = front;
    while at < bytes.len() {
        let length = u32::from_le_bytes(bytes[at + 8..at + 12].try_into().expect("a length")) as usize;
        frames.push(&bytes[at..at + 20 + length]);
        at += 20 + length;
    }
    let count = frames.len();
    let build = |order: &[usize]| {
        let mut file = bytes[..front].to_vec();
        order.iter().for_each(|n| file.extend_from_slice(frames[*n]));
        file
    };
    let all: Vec<usize> = (0..count).collect();
    assert!(verdict(&path, &build(&all)).is_none());
    for lost in 0..count {
        let order: Vec<usize> = all.iter().copied().filter(|n| *n != lost).collect();
        assert!(verdict(&path, &build(&order)).is_some(), "frame {lost} is missing");
        let mut swapped = all.clone();
        swapped.swap(lost, (lost + 1) % count);
        assert!(verdict(&path, &build(&swapped)).is_some(), "frame {lost} is elsewhere");
        let twice: Vec<usize> = all.iter().flat_map(|n| if *n == lost { vec![*n, *n] } else { vec![*n] }).collect();
        assert!(verdict(&path, &build(&twice)).is_some(), "frame {lost} is there twice");
    }
}

#[test]
fn other_versions_and_other_files_are_told_apart() {
    let (directory, path, bytes) = written();
    let with = |at: usize, value: u16, valid: bool| {
        let mut other = bytes.clone();
        other[at..at + 2].copy_from_slice(&value.to_le_bytes());
        if valid {
            let crc = crc32c::crc32c(&other[..20]);
            other[20..24].copy_from_slice(&crc.to_le_bytes());
        }
        verdict(&path, &other).expect("an error").to_string()
    };
    let ours = format!("this mcd reads 1.{}", crate::protocol::messages::PROTOCOL_VERSION);
    for (at, value, valid, theirs) in
        [(8, 2, true, "format 2."), (8, 9, false, "format 9."), (10, 1, true, "format 1.1")]
    {
        let error = with(at, value, valid);
        assert!(error.contains(theirs) && error.contains(&ours) && error.contains("that wrote it"), "{error}");
    }
    for other in [&b"what?"[..], b"", b"\x7fELF and a good deal more than twenty-four bytes"] {
        assert!(matches!(verdict(&path, other), Some(SnapshotError::NotASnapshot { .. })));
    }
    assert!(matches!(SnapshotReader::open(directory.path()), Err(SnapshotError::NotASnapshot { .. })));
    assert!(matches!(SnapshotReader::open(&directory.path().join("none")), Err(SnapshotError::Read { .. })));
}

#[test]
fn a_snapshot_that_cannot_be_written_leaves_what_was_there() {
    let (directory, path, bytes) = written();
    let cancelled = AtomicBool::new(true);
    let error = write(&path, &head(), &memory(), &state(), &cancelled).expect_err("cancelled");
    assert!(matches!(error, SnapshotError::Cancelled { .. }));
    assert!(fs::read(&path).expect("a file") == bytes, "the old one was touched");
    assert_eq!(fs::read_dir(&directory).expect("list").count(), 1);
    let go = AtomicBool::new(false);
    let nowhere = directory.path().join("no/web.snap");
    let error = write(&nowhere, &head(), &memory(), &state(), &go).expect_err("no directory");
    assert!(error.to_string().contains("cannot create") && error.to_string().contains("no/web.snap"), "{error}");
    let other = fs::File::create(directory.path().join("web.snap.partial")).expect("a file");
    other.lock().expect("locked");
    let error = write(&path, &head(), &memory(), &state(), &go).expect_err("another writes it").to_string();
    assert!(error.contains("cannot lock") && directory.path().join("web.snap.partial").exists(), "{error}");
    // A crash leaves the file, not the lock.
    drop(other);
    write(&path, &head(), &memory(), &state(), &go).expect("written");
    assert!(fs::read(&path).expect("a file") == bytes);
    let error = write(directory.path(), &head(), &memory(), &state(), &go).expect_err("a directory");
    assert!(matches!(error, SnapshotError::NotAFile { .. }));
    let error = write(&path, &head(), &memory(), &vec![0; 4 << 20], &go).expect_err("too much");
    assert!(matches!(error, SnapshotError::StateTooLarge { .. }));
}

#[test]
fn a_host_with_another_cpu_is_told_so() {
    let path = Path::new("web.snap");
    let guest = head().cpu.guest;
    let host = HostCpu { digest: guest.digest, tsc_khz: guest.tsc_khz, tsc_scales: false };
    head().check_cpu(path, host).expect("the same");
    let error = head().check_cpu(path, HostCpu { digest: 1, ..host }).expect_err("another").to_string();
    assert!(error.contains("a CPU of GenuineIntel") && error.contains("other CPU features"), "{error}");
    let error = head().check_cpu(path, HostCpu { tsc_khz: 3_000_000, ..host }).expect_err("faster").to_string();
    assert!(error.contains("3000000 kHz") && error.contains("2100000 kHz") && !error.contains('\n'), "{error}");
}
