//! What the guest wrote to its disks in the open epoch, and in the one on its way: the disks' part
//! of I5.
//!
//! The journal keeps whole blocks as they are after each write, so an epoch holds each block once,
//! with its content at the capture. What the journal holds is bounded: a write that finds no room
//! waits, and the epoch is cut at once to make some.

use std::collections::BTreeMap;
use std::mem;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam::atomic::AtomicCell;
use parking_lot::{Mutex, RwLock, RwLockReadGuard};

use super::copy_before_write::CopyBeforeWrite;
use crate::protocol::pages::PAGE_BYTES;
use crate::protocol::types::EpochId;

/// The content of a block.
pub type Block = [u8; PAGE_BYTES];

/// Bytes a block costs in the journal: its content and what it takes to find it.
pub const BLOCK_COST_BYTES: u64 = PAGE_BYTES as u64 + ZERO_COST_BYTES;
/// Bytes a block of zeros costs.
pub const ZERO_COST_BYTES: u64 = 64;

/// What the journal tells the driver; called from a disk's thread, so it must not block.
pub trait JournalListener: Send + Sync {
    /// A write found the journal full.
    fn journal_full(&self);
}

/// Blocks by their index in the image's row, each with its content.
#[derive(Clone, Debug, Default)]
pub struct BlockSet {
    /// Where in `bytes` a block is; `None` if it is all zeros.
    slots: BTreeMap<u64, Option<usize>>,
    bytes: Vec<u8>,
}

impl BlockSet {
    /// How many blocks there are.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// The blocks' indexes, rising.
    pub fn indexes(&self) -> impl Iterator<Item = u64> + '_ {
        self.slots.keys().copied()
    }

    /// The blocks, by rising index.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &Block)> {
        self.slots.iter().map(|(index, slot)| (*index, self.content(*slot)))
    }

    fn content(&self, slot: Option<usize>) -> &Block {
        const ZEROS: Block = [0; PAGE_BYTES];
        slot.and_then(|at| self.bytes.get(at..)).and_then(|rest| rest.first_chunk()).unwrap_or(&ZEROS)
    }

    /// Sets a block's content; `None` is zeros.
    pub(super) fn put(&mut self, index: u64, content: Option<&Block>) {
        let slot = self.slots.entry(index).or_default();
        match (content, *slot) {
            // Its old room is lost until the epoch is cut; a block is seldom written and then
            // discarded in one epoch.
            (None, _) => *slot = None,
            (Some(content), Some(at)) => {
                if let Some(room) = self.bytes.get_mut(at..at + PAGE_BYTES) {
                    room.copy_from_slice(content);
                }
            }
            (Some(content), None) => {
                *slot = Some(self.bytes.len());
                self.bytes.extend_from_slice(content);
            }
        }
    }

    /// The content of block `index`, if it is in the set.
    pub(super) fn get(&self, index: u64) -> Option<&Block> {
        self.slots.get(&index).map(|slot| self.content(*slot))
    }

    /// The blocks, by rising index; `None` is zeros.
    pub(super) fn slots(&self) -> impl Iterator<Item = (u64, Option<&Block>)> {
        self.slots.iter().map(|(index, slot)| (*index, slot.map(|_| self.content(*slot))))
    }

    pub(super) fn cost_bytes(&self) -> u64 {
        self.bytes.len() as u64 + self.slots.len() as u64 * ZERO_COST_BYTES
    }

    fn clear(&mut self) {
        self.slots.clear();
        self.bytes.clear();
    }
}

/// What becomes of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JournalMode {
    /// Nothing is written: this node does not run the guest.
    Closed,
    /// It goes to the image and nowhere else.
    Pass,
    /// It goes to the image, and its blocks travel in the open epoch.
    Keep,
}

#[derive(Default)]
struct Kept {
    open: Arc<BlockSet>,
    taken: Option<(EpochId, Arc<BlockSet>)>,
    /// An empty set whose memory was used before: memory touched for the first time costs the host
    /// more than the copy.
    spare: Option<Arc<BlockSet>>,
    /// Room promised to writes under way.
    reserved_bytes: u64,
    full_reported: bool,
    was_full: bool,
}

impl Kept {
    fn used_bytes(&self) -> u64 {
        let taken = self.taken.as_ref().map_or(0, |(_, blocks)| blocks.cost_bytes());
        self.open.cost_bytes() + taken + self.reserved_bytes
    }

    /// The epoch on its way will not arrive: its blocks belong to the open one, unless they were
    /// written again.
    fn put_back(&mut self) {
        let Some((_, taken)) = self.taken.take() else { return };
        let open = Arc::make_mut(&mut self.open);
        for (index, slot) in &taken.slots {
            if !open.slots.contains_key(index) {
                open.put(*index, slot.map(|_| taken.content(*slot)));
            }
        }
    }

    fn forget(&mut self) {
        let was_full = self.was_full;
        *self = Kept { reserved_bytes: self.reserved_bytes, was_full, ..Kept::default() };
    }
}

/// How full a journal is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct JournalFigures {
    /// Bytes of the open epoch and of the one on its way.
    pub bytes: u64,
    /// How often a write found no room.
    pub full_times: u64,
}

/// The journal of all disks of one machine.
pub struct DiskJournal {
    bytes_max: u64,
    listener: Box<dyn JournalListener>,
    /// What becomes of the writes that begin now.
    mode: AtomicCell<JournalMode>,
    /// Held for reading as long as a write takes, so that a journal begins to keep writes between
    /// two of them.
    under_way: RwLock<()>,
    kept: Mutex<Kept>,
    copy_before_write: CopyBeforeWrite,
    full_times: AtomicU64,
}

/// Room in the journal for a write that is under way. Dropping it gives back what was not used.
pub struct Reservation<'a> {
    journal: &'a DiskJournal,
    bytes: u64,
}

impl Reservation<'_> {
    /// Keeps the content of block `index` after the write; `None` is zeros.
    pub fn keep(&self, index: u64, content: Option<&Block>) {
        Arc::make_mut(&mut self.journal.kept.lock().open).put(index, content);
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        self.journal.kept.lock().reserved_bytes -= self.bytes;
    }
}

impl DiskJournal {
    /// A closed journal of at most `bytes_max` bytes.
    pub fn new(bytes_max: u64, listener: Box<dyn JournalListener>) -> Arc<DiskJournal> {
        let (mode, under_way) = (AtomicCell::new(JournalMode::Closed), RwLock::new(()));
        Arc::new(DiskJournal {
            bytes_max,
            listener,
            mode,
            under_way,
            kept: Mutex::default(),
            copy_before_write: CopyBeforeWrite::default(),
            full_times: AtomicU64::new(0),
        })
    }

    /// From now on the disks' writes are treated so, and what was kept is forgotten. Waits for
    /// writes under way.
    pub fn set_mode(&self, mode: JournalMode) {
        let _none_under_way = self.under_way.write();
        self.enter(mode);
    }

    /// From now on no write is kept, and what was kept is forgotten. Does not wait for writes under
    /// way: each ends as it began.
    pub fn stop(&self, mode: JournalMode) {
        debug_assert_ne!(mode, JournalMode::Keep, "a write under way would be lost to the epochs");
        self.enter(mode);
    }

    fn enter(&self, mode: JournalMode) {
        self.mode.store(mode);
        self.copy_before_write.release();
        self.kept.lock().forget();
    }

    /// What becomes of a write that begins now. The write is under way while the guard lives.
    pub fn begin_write(&self) -> (JournalMode, RwLockReadGuard<'_, ()>) {
        let under_way = self.under_way.read();
        (self.mode.load(), under_way)
    }

    /// Room for a write of `bytes` bytes of cost; `None` if there is not so much. A journal that is
    /// empty takes any.
    pub fn reserve(&self, bytes: u64) -> Option<Reservation<'_>> {
        let mut kept = self.kept.lock();
        let used = kept.used_bytes();
        if used == 0 || used.saturating_add(bytes) <= self.bytes_max {
            kept.reserved_bytes += bytes;
            return Some(Reservation { journal: self, bytes });
        }
        kept.was_full = true;
        self.full_times.fetch_add(1, Ordering::Relaxed);
        let tell = !mem::replace(&mut kept.full_reported, true);
        drop(kept);
        if tell {
            self.listener.journal_full();
        }
        None
    }

    /// Epoch `id` ends here; what is written from now on belongs to the next. Call it while the
    /// machine is paused; nothing is allocated or copied, unless an epoch before it did not arrive.
    pub fn cut(&self, id: EpochId) {
        let mut kept = self.kept.lock();
        kept.put_back();
        let next = kept.spare.take().unwrap_or_default();
        let blocks = mem::replace(&mut kept.open, next);
        kept.taken = Some((id, blocks));
        kept.full_reported = false;
        self.copy_before_write.cut(id);
    }

    /// Preserves blocks at a cut.
    pub fn copy_before_write(&self) -> &CopyBeforeWrite {
        &self.copy_before_write
    }

    /// The blocks of the epoch on its way.
    pub fn taken(&self) -> Arc<BlockSet> {
        self.kept.lock().taken.as_ref().map(|(_, blocks)| Arc::clone(blocks)).unwrap_or_default()
    }

    /// Epoch `id` is committed: its blocks are safe elsewhere.
    pub fn committed(&self, id: EpochId) {
        let mut kept = self.kept.lock();
        if let Some((_, mut blocks)) = kept.taken.take_if(|(taken, _)| *taken == id)
            && let Some(set) = Arc::get_mut(&mut blocks)
        {
            set.clear();
            kept.spare = Some(blocks);
        }
    }

    /// The epoch on its way will not arrive.
    pub fn put_back(&self) {
        self.kept.lock().put_back();
    }

    /// True once after a write found no room.
    pub fn take_was_full(&self) -> bool {
        mem::take(&mut self.kept.lock().was_full)
    }

    /// How full it is.
    pub fn figures(&self) -> JournalFigures {
        JournalFigures { bytes: self.used_bytes(), full_times: self.full_times.load(Ordering::Relaxed) }
    }

    /// Bytes of the open epoch and of the one on its way.
    pub fn used_bytes(&self) -> u64 {
        self.kept.lock().used_bytes()
    }
}
