//! The capture: all that happens between pause and resume, and nothing that could happen before or
//! after.

use crossbeam::queue::ArrayQueue;
use std::sync::Arc;

use super::dirty_pages::DirtyPages;
use super::journal::{BlockSet, DiskJournal};
use super::shared_journal::SharedJournal;
use crate::machine::{Machine, MachineError};
use crate::protocol::pages::PAGE_BYTES;
use crate::protocol::types::EpochId;

/// Pages whose room is touched before the first capture, so that a usual epoch never waits for the
/// host's memory (never-touched memory costs 11 µs a page, 50 times the copy).
const WARM_PAGES: usize = 4096;
/// Bytes in a huge page.
const HUGE_BYTES: usize = 2 << 20;
/// Captures kept for reuse: one being filled, one being sent.
const POOLED: usize = 2;

/// An epoch, copied out of the machine.
#[derive(Debug, Default)]
pub struct Capture {
    /// Its name.
    pub id: EpochId,
    /// The image is whole with it.
    pub completes_resync: bool,
    /// Page indexes, rising.
    pub pages: Vec<u64>,
    /// The pages' bytes, in the order of `pages`.
    pub bytes: Vec<u8>,
    /// The blocks of disks, whose indexes follow those of memory.
    pub blocks: Option<Arc<BlockSet>>,
    /// The blocks of disks on shared storage.
    pub shared: Option<Arc<BlockSet>>,
    /// The machine's saved state.
    pub state: Vec<u8>,
}

impl Capture {
    /// How many pages and blocks it holds.
    pub fn pages_total(&self) -> u64 {
        let blocks = [&self.blocks, &self.shared].into_iter().flatten().map(|blocks| blocks.len());
        (self.pages.len() + blocks.sum::<usize>()) as u64
    }

    fn clear(&mut self) {
        self.blocks = None;
        self.shared = None;
        self.pages.clear();
        self.bytes.clear();
        self.state.clear();
        self.completes_resync = false;
    }

    fn warm(&mut self, pages: usize) {
        self.bytes.reserve_exact(pages * PAGE_BYTES);
        advise_huge(&mut self.bytes);
        // Writing is what makes the host give the memory; capacity alone does not.
        self.bytes.resize(pages * PAGE_BYTES, 1);
        self.pages.resize(pages, 1);
        self.state.resize(64 << 10, 1);
        self.clear();
    }
}

/// Asks for huge pages under a buffer that is not touched yet: a copy of scattered pages into small
/// ones waits for the address translation of each. It is advice only; without it the copy takes
/// longer.
fn advise_huge(buffer: &mut Vec<u8>) {
    let spare = buffer.spare_capacity_mut();
    let skip = spare.as_ptr().align_offset(HUGE_BYTES);
    let Some(aligned) = spare.get_mut(skip..) else { return };
    // SAFETY: the range is the buffer's own memory, from a page boundary on; the advice changes
    // none of its content.
    unsafe { libc::madvise(aligned.as_mut_ptr().cast(), aligned.len(), libc::MADV_HUGEPAGE) };
}

/// Captures to fill again and again.
#[derive(Clone)]
pub struct CapturePool {
    free: Arc<ArrayQueue<Box<Capture>>>,
}

impl Default for CapturePool {
    fn default() -> Self {
        CapturePool { free: Arc::new(ArrayQueue::new(POOLED)) }
    }
}

impl CapturePool {
    /// Makes the pool ready. It takes a while: not for a thread that somebody waits for.
    pub fn warm(&self) {
        for _ in self.free.len()..POOLED {
            let mut capture = Box::<Capture>::default();
            capture.warm(WARM_PAGES);
            self.put(capture);
        }
    }

    /// An empty capture.
    pub fn get(&self) -> Box<Capture> {
        let mut capture = self.free.pop().unwrap_or_default();
        capture.clear();
        capture
    }

    /// Gives a capture back.
    pub fn put(&self, mut capture: Box<Capture>) {
        // The journal wants its blocks' room back.
        (capture.blocks, capture.shared) = (None, None);
        // More than the pool keeps: the memory goes back to the host.
        let _ = self.free.push(capture);
    }
}

/// Copies epoch `id` out of the paused machine. If it fails, the dirty pages it had read is still
/// in the book, and what its disks' journal held is on its way as far as the journal knows: put
/// both back.
pub fn capture(
    machine: &mut Machine,
    dirty: &mut DirtyPages,
    journal: &DiskJournal,
    shared: Option<&SharedJournal>,
    id: EpochId,
    into: &mut Capture,
) -> Result<(), MachineError> {
    into.id = id;
    journal.cut(id);
    into.shared = shared.map(|shared| shared.cut(id));
    // Guest memory stands still since the pause, while the vCPU threads go on reading their own
    // state: copying meanwhile costs nothing, and no part of saving writes guest memory.
    let taken = dirty.take(id, |set| machine.collect_dirty(set))?;
    into.pages.extend(taken.iter());
    machine.memory().copy_pages(taken, &mut into.bytes);
    into.blocks = Some(journal.taken());
    machine.save(&mut into.state)
}
