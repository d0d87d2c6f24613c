//! Guest memory populated ahead of use, by several threads, after a look at what the host has free.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use nix::errno::Errno;

use super::host_memory::{self, Available};
use super::memory::{GuestRam, HostAddress, MemoryError};
use crate::protocol::pages::PAGE_BYTES;

/// Bytes populated in one call to the host: small enough that progress is seen, and a multiple of a
/// huge page.
const CHUNK_BYTES: usize = 64 << 20;

/// How many threads are worth their while here: beyond a few the host's own locks are the limit.
pub fn prefault_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(8)
}

impl GuestRam {
    /// Makes the host give every page now, with `threads` threads, so that neither the guest nor an
    /// apply pays for first touches later. `progress` is called from all of them with the bytes
    /// that are done, in no particular order; the highest is what counts.
    ///
    /// # Errors
    /// [`MemoryError::HostMemory`] and [`MemoryError::GroupMemory`] if less memory is available
    /// than the guest has: nothing was touched then; [`MemoryError::Prefault`] if the host cannot
    /// give it after all.
    pub fn prefault(&self, threads: usize, progress: impl Fn(u64) + Sync) -> Result<(), MemoryError> {
        let (wanted_bytes, available) = (self.bytes(), host_memory::available());
        match available.filter(|available| available.bytes < wanted_bytes) {
            Some(Available { bytes, group: None }) => {
                return Err(MemoryError::HostMemory { wanted_bytes, available_bytes: bytes });
            }
            Some(Available { bytes, group: Some(group) }) => {
                return Err(MemoryError::GroupMemory { wanted_bytes, available_bytes: bytes, group });
            }
            None => {}
        }
        let chunks = self.chunks();
        let (next, done_bytes) = (AtomicUsize::new(0), AtomicU64::new(0));
        let (failed, reason) = (AtomicBool::new(false), Mutex::new(None));
        std::thread::scope(|scope| {
            for _ in 0..threads.clamp(1, chunks.len().max(1)) {
                scope.spawn(|| {
                    while let Some((address, bytes)) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) {
                        if failed.load(Ordering::Relaxed) {
                            return;
                        }
                        if let Err(errno) = populate(*address, *bytes) {
                            failed.store(true, Ordering::Relaxed);
                            reason.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).get_or_insert(errno);
                            return;
                        }
                        let bytes = *bytes as u64;
                        progress(done_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes);
                    }
                });
            }
        });
        match reason.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()) {
            Some(reason) => Err(MemoryError::Prefault { reason }),
            None => Ok(()),
        }
    }

    /// All of guest memory in pieces of at most [`CHUNK_BYTES`].
    fn chunks(&self) -> Vec<(HostAddress, usize)> {
        let mut chunks = Vec::new();
        for region in self.regions() {
            let region_bytes = region.pages as usize * PAGE_BYTES;
            for offset in (0..region_bytes).step_by(CHUNK_BYTES) {
                let address = HostAddress(region.host.0.wrapping_add(offset));
                chunks.push((address, CHUNK_BYTES.min(region_bytes - offset)));
            }
        }
        chunks
    }
}

/// Populates one piece of a mapping of guest memory.
fn populate(address: HostAddress, bytes: usize) -> Result<(), Errno> {
    loop {
        // SAFETY: the range lies in one mapping of ours (`chunks` made it so). MADV_HUGEPAGE is
        // advice only, so its result does not matter; MADV_POPULATE_WRITE faults pages in without
        // changing their content.
        let result = unsafe {
            libc::madvise(address.0.cast(), bytes, libc::MADV_HUGEPAGE);
            libc::madvise(address.0.cast(), bytes, libc::MADV_POPULATE_WRITE)
        };
        match Errno::result(result) {
            Err(Errno::EINTR) => {}
            other => return other.map(drop),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::memory::MEMORY_BYTES_MAX;

    #[test]
    fn all_memory_is_populated_once_and_keeps_its_content() {
        let bytes = 3 * CHUNK_BYTES as u64 - 4096;
        let ram = GuestRam::new(bytes).expect("map");
        ram.write(4096, b"abc").expect("write");
        let (calls, highest) = (AtomicU64::new(0), AtomicU64::new(0));
        ram.prefault(4, |done| {
            calls.fetch_add(1, Ordering::SeqCst);
            highest.fetch_max(done, Ordering::SeqCst);
        })
        .expect("prefault");
        assert_eq!((calls.into_inner(), highest.into_inner()), (3, bytes));
        let mut read = [0; 4];
        ram.read(4096, &mut read).expect("read");
        assert_eq!(&read, b"abc\0");
    }

    #[test]
    fn more_memory_than_the_host_has_is_refused_untouched() {
        let Some(available) = host_memory::available().filter(|one| one.bytes < MEMORY_BYTES_MAX) else { return };
        let ram = GuestRam::new(MEMORY_BYTES_MAX).expect("map");
        let error = ram.prefault(2, |_| panic!("memory was touched")).expect_err("too much");
        assert!(available.bytes > 0 && error.to_string().contains("to have 1048576 MiB of memory"), "{error}");
    }
}
