//! What a capture copies out of a machine, and the room for it.
//!
//! Memory that was never touched costs the host 11 µs a page, 50 times the copy, so the room is
//! made and touched before the pause; inside it nothing grows that could have grown before.

use std::sync::Arc;

use super::journal::BlockSet;
use crate::machine::{Machine, MachineError};
use crate::protocol::pages::{PAGE_BYTES, PageSet};
use crate::protocol::types::EpochId;

/// Bytes in a huge page.
const HUGE_BYTES: usize = 2 << 20;
/// Bytes of machine state for which a prepared capture has room.
const STATE_BYTES: usize = 64 << 10;

/// What epochs are cut from: a machine.
pub trait CaptureSource {
    /// Why something failed.
    type Error;

    /// Adds the pages written since the last call to `into`. **Reading clears**, even if it fails
    /// half way. The guest may run.
    ///
    /// # Errors
    /// What the host refuses.
    fn collect_dirty(&mut self, into: &mut PageSet) -> Result<(), Self::Error>;

    /// Appends the bytes of `pages`, by rising index. The guest is paused.
    fn copy_pages(&self, pages: &PageSet, into: &mut Vec<u8>);

    /// Appends the state beside memory. The guest is paused.
    ///
    /// # Errors
    /// What the host refuses.
    fn save(&mut self, into: &mut Vec<u8>) -> Result<(), Self::Error>;
}

impl CaptureSource for Machine {
    type Error = MachineError;

    fn collect_dirty(&mut self, into: &mut PageSet) -> Result<(), MachineError> {
        Machine::collect_dirty(self, into)
    }

    fn copy_pages(&self, pages: &PageSet, into: &mut Vec<u8>) {
        self.memory().copy_pages(pages, into);
    }

    fn save(&mut self, into: &mut Vec<u8>) -> Result<(), MachineError> {
        Machine::save(self, into)
    }
}

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
    growths: u64,
}

impl Capture {
    /// How many pages and blocks it holds.
    pub fn pages_total(&self) -> u64 {
        let blocks = [&self.blocks, &self.shared].into_iter().flatten().map(|blocks| blocks.len());
        (self.pages.len() + blocks.sum::<usize>()) as u64
    }

    /// True if what it holds of disks is a matter of some pages.
    pub fn blocks_are_few(&self) -> bool {
        const FEW: usize = 16;
        let blocks = [self.blocks.as_ref(), self.shared.as_ref()].into_iter().flatten();
        blocks.map(|blocks| blocks.len()).sum::<usize>() <= FEW
    }

    /// How often it was filled with more than it had room for, and so grew inside a pause.
    pub fn growths(&self) -> u64 {
        self.growths
    }

    /// For how many pages there is room that was touched already.
    pub fn room_pages(&self) -> usize {
        self.pages.capacity().min(self.bytes.capacity() / PAGE_BYTES)
    }

    /// Bytes of memory it keeps for pages.
    pub fn room_bytes(&self) -> u64 {
        (self.bytes.capacity() + self.pages.capacity() * size_of::<u64>()) as u64
    }

    /// Makes room for `pages` pages, and touches it; what it held is gone. It takes a while: not
    /// for a pause.
    pub fn make_room(&mut self, pages: usize) {
        self.clear();
        // Writing is what makes the host give the memory; capacity alone does not.
        if pages > self.room_pages() {
            self.bytes.reserve_exact(pages.saturating_mul(PAGE_BYTES));
            advise_huge(&mut self.bytes);
            self.bytes.resize(pages.saturating_mul(PAGE_BYTES), 1);
            self.pages.reserve_exact(pages);
            self.pages.resize(pages, 1);
        }
        if self.state.capacity() < STATE_BYTES {
            self.state.resize(STATE_BYTES, 1);
        }
        self.clear();
    }

    /// Sees to room for `pages` pages and not for more, as a vector that grows by itself would.
    pub(super) fn reserve(&mut self, pages: usize) {
        self.pages.reserve_exact(pages);
        self.bytes.reserve_exact(pages.saturating_mul(PAGE_BYTES));
    }

    /// Gives back the memory beyond the room for `pages` pages; what it held is gone.
    pub fn shrink_to(&mut self, pages: usize) {
        self.clear();
        self.bytes.shrink_to(pages.saturating_mul(PAGE_BYTES));
        self.pages.shrink_to(pages);
    }

    pub(super) fn clear(&mut self) {
        self.drop_blocks();
        self.pages.clear();
        self.bytes.clear();
        self.state.clear();
        self.completes_resync = false;
    }

    /// The journals want their blocks' room back.
    pub(super) fn drop_blocks(&mut self) {
        (self.blocks, self.shared) = (None, None);
    }

    /// Fills it, and counts if it had to grow for that.
    pub(super) fn fill<R>(&mut self, fill: impl FnOnce(&mut Capture) -> R) -> R {
        let room = |capture: &Capture| (capture.pages.capacity(), capture.bytes.capacity(), capture.state.capacity());
        let before = room(self);
        let filled = fill(self);
        self.growths += u64::from(room(self) != before);
        filled
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
