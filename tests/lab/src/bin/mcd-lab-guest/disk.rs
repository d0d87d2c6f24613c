//! Measures a disk through its file system.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;

use crate::guest_report::{DiskSpeed, Operations};

const MIB: usize = 1 << 20;
/// A small operation, and what reads past the page cache must be aligned to.
const PIECE_BYTES: usize = 4096;

/// Measures the disk that `directory` is on with a file of `mib` MiB, and prints what it found.
pub fn measure(directory: &Path, mib: u32, operations: u32) -> io::Result<()> {
    let path = directory.join("speed");
    let result = measure_file(&path, u64::from(mib.max(1)), operations);
    fs::remove_file(&path)?;
    println!("{}", serde_json::to_string(&result?).map_err(io::Error::other)?);
    Ok(())
}

fn measure_file(path: &Path, mib: u64, operations: u32) -> io::Result<DiskSpeed> {
    let (mut random, mut buffer) = (Random(1), aligned(MIB));
    let bytes = mib * MIB as u64;
    let file = File::create(path)?;
    let began = Instant::now();
    for at in 0..mib {
        // Nothing that could be packed, and no two pieces alike.
        random.fill(buffer.bytes());
        file.write_all_at(buffer.bytes(), at * MIB as u64)?;
    }
    file.sync_all()?;
    let write_mib_s = mib as f64 / began.elapsed().as_secs_f64();

    let mut places = Random(2);
    let mut place = || places.next() % (bytes / PIECE_BYTES as u64) * PIECE_BYTES as u64;
    let mut times = Vec::new();
    for _ in 0..operations {
        let (at, began) = (place(), Instant::now());
        let piece = buffer.bytes().get_mut(..PIECE_BYTES).unwrap_or_default();
        random.fill(piece);
        file.write_all_at(piece, at)?;
        file.sync_data()?;
        times.push(began.elapsed());
    }
    let sync_write = summary(&mut times);
    drop(file);

    let file = OpenOptions::new().read(true).custom_flags(OFlag::O_DIRECT.bits()).open(path)?;
    let began = Instant::now();
    for at in 0..mib {
        file.read_exact_at(buffer.bytes(), at * MIB as u64)?;
    }
    let read_mib_s = mib as f64 / began.elapsed().as_secs_f64();
    for _ in 0..operations {
        let (at, began) = (place(), Instant::now());
        file.read_exact_at(buffer.bytes().get_mut(..PIECE_BYTES).unwrap_or_default(), at)?;
        times.push(began.elapsed());
    }
    Ok(DiskSpeed { write_mib_s, read_mib_s, sync_write, random_read: summary(&mut times) })
}

/// Takes the times and hashes them up.
fn summary(times: &mut Vec<Duration>) -> Operations {
    times.sort();
    let us = |part: usize| times.get(times.len() * part / 100).map_or(0, |time| time.as_micros() as u64);
    let total: Duration = times.iter().sum();
    let per_s = times.len() as f64 / total.as_secs_f64().max(1e-9);
    let summary = Operations { count: times.len() as u64, per_s, p50_us: us(50), p99_us: us(99) };
    times.clear();
    summary
}

/// Bytes that begin at a multiple of [`PIECE_BYTES`] in memory.
struct Aligned {
    all: Vec<u8>,
    from: usize,
    length: usize,
}

fn aligned(length: usize) -> Aligned {
    let all = vec![0; length + PIECE_BYTES];
    let from = all.as_ptr().align_offset(PIECE_BYTES);
    Aligned { all, from, length }
}

impl Aligned {
    fn bytes(&mut self) -> &mut [u8] {
        self.all.get_mut(self.from..self.from + self.length).unwrap_or_default()
    }
}

/// Xorshift: quick, and nothing that packs.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        for word in bytes.chunks_mut(8) {
            let next = self.next().to_le_bytes();
            word.copy_from_slice(next.get(..word.len()).unwrap_or_default());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_measured_and_left_as_it_was() {
        // Not in /tmp, which may be a file system that cannot read past the page cache.
        let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let speed = measure_file(&directory.path().join("file"), 2, 10).unwrap();
        assert!(speed.write_mib_s > 0.0 && speed.read_mib_s > 0.0, "{speed:?}");
        assert_eq!([speed.sync_write.count, speed.random_read.count], [10; 2]);
        assert!(speed.sync_write.p50_us <= speed.sync_write.p99_us);
        measure(directory.path(), 1, 1).unwrap();
        assert!(!directory.path().join("speed").exists());
    }

    #[test]
    fn percentiles_are_of_the_sorted_times() {
        let mut times: Vec<_> = (1..=100).rev().map(Duration::from_micros).collect();
        let all = summary(&mut times);
        assert_eq!((all.count, all.p50_us, all.p99_us, times.len()), (100, 51, 100, 0));
        assert_eq!(summary(&mut times).p50_us, 0);
    }
}
