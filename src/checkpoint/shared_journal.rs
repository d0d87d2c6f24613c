//! Disks on storage that both nodes share: what the guest writes is held like its packets, and
//! reads see it.
//!
//! ```text
//!  guest ── write ─▶ SharedGate ──▶ held (whole blocks) ── committed ─▶ writing thread ─▶ shared image, synced
//!        ◀─ read ────────┘ held blocks first, newest wins; the image for the rest            │
//!        ◀─ flush ──────────────── when all that was written before it is there ◀────────────┘
//! ```
//!
//! Which of it may go out, and when, is said by [`shared_disk`](crate::protocol::shared_disk). A
//! node that runs the guest alone writes through at once; after it lost its peer it first writes
//! what is still held, and until then the guest's writes wait.

use std::io;
use std::mem;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex, RwLock};

use super::disk::{Change, cost_bytes, read_block};
use super::journal::{Block, BlockSet};
use crate::device::block::{BlockBackend, Stored};
use crate::device::shared_image::SharedImage;
use crate::protocol::pages::PAGE_BYTES;
use crate::protocol::shared_disk::{HeldWrites, Layer};
use crate::protocol::types::ConnId;
use crate::protocol::types::EpochId;

const BLOCK_BYTES: u64 = PAGE_BYTES as u64;

/// What held writes tell the driver. Called from disks' threads and the writing thread, so it must
/// not block.
pub trait SharedListener: Send + Sync {
    /// A write found no room, or a flush waits: the sooner the epoch is cut, the better.
    fn cut_wanted(&self);
    /// The image has the writes of every epoch up to `through`, for good.
    fn written(&self, through: EpochId);
    /// The image has all that was written before the newcomer on this connection was tracked for.
    fn synced(&self, conn: ConnId);
    /// Writes that found no room may find some now.
    fn has_room(&self);
    /// The storage does not take writes (why), or takes them again.
    fn fault(&self, why: Option<String>);
}

/// What becomes of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Nothing is written: this node does not run the guest.
    Closed,
    /// It goes to the image at once.
    Pass,
    /// It is held.
    Hold,
}

impl Layer for Arc<BlockSet> {
    fn is_empty(&self) -> bool {
        BlockSet::is_empty(self)
    }

    fn add_older(&mut self, older: Arc<BlockSet>) {
        if self.is_empty() {
            *self = older;
            return;
        }
        let open = Arc::make_mut(self);
        for (index, content) in older.slots() {
            if open.get(index).is_none() {
                open.put(index, content);
            }
        }
    }
}

#[derive(Default)]
pub(super) struct Held {
    pub(super) writes: HeldWrites<Arc<BlockSet>>,
    /// A newcomer waits for the image to have what was written before.
    pub(super) sync_for: Option<ConnId>,
    pub(super) closed: bool,
    full_reported: bool,
    was_full: bool,
}

impl Held {
    fn cost_bytes(&self) -> u64 {
        self.writes.newest_first().map(|layer| layer.cost_bytes()).sum()
    }

    /// True once if a write found no room.
    pub(super) fn take_was_full(&mut self) -> bool {
        mem::take(&mut self.was_full)
    }
}

/// The held writes of all disks of one machine that are on shared storage.
pub struct SharedJournal {
    bytes_max: u64,
    pub(super) listener: Box<dyn SharedListener>,
    /// Held for reading as long as a write takes, so that a change of mode finds none half done.
    mode: RwLock<Mode>,
    pub(super) held: Mutex<Held>,
    /// There may be something to write, or it is over.
    pub(super) work: Condvar,
    /// Something was written, or it is over.
    pub(super) done: Condvar,
}

impl SharedJournal {
    /// A closed journal of at most `bytes_max` bytes.
    pub fn new(bytes_max: u64, listener: Box<dyn SharedListener>) -> Arc<SharedJournal> {
        Arc::new(SharedJournal {
            bytes_max,
            listener,
            mode: RwLock::new(Mode::Closed),
            held: Mutex::default(),
            work: Condvar::new(),
            done: Condvar::new(),
        })
    }

    /// The guest runs here alone: what is held may go out, all of it, and what follows goes to the
    /// image at once.
    pub fn alone(&self) {
        let mut mode = self.mode.write();
        *mode = Mode::Pass;
        let mut held = self.held.lock();
        held.writes.alone();
        held.sync_for = None;
        self.work.notify_all();
    }

    /// From now on writes are held, for the newcomer on `conn`; it is told of once the image has
    /// all that was written before.
    pub fn hold(&self, conn: ConnId) {
        let mut mode = self.mode.write();
        *mode = Mode::Hold;
        self.held.lock().sync_for = Some(conn);
        self.work.notify_all();
    }

    /// Another node runs the guest, or this one ends: nothing more goes out, what is held is
    /// forgotten, and who waits for a flush gets an error. A write to the image that is under way
    /// goes on.
    pub fn close(&self) {
        let mut mode = self.mode.write();
        *mode = Mode::Closed;
        let mut held = self.held.lock();
        held.writes.discard();
        held.closed = true;
        self.work.notify_all();
        self.done.notify_all();
    }

    /// Epoch `id` ends here; what of it travels. Call it while the machine is paused.
    pub fn cut(&self, id: EpochId) -> Arc<BlockSet> {
        let mut held = self.held.lock();
        held.full_reported = false;
        Arc::clone(held.writes.cut(id))
    }

    /// The epoch on its way will not arrive.
    pub fn put_back(&self) {
        self.held.lock().writes.put_back();
    }

    /// Epoch `id` is committed.
    pub fn committed(&self, id: EpochId) {
        let mut held = self.held.lock();
        held.writes.committed(id);
        // An epoch without writes ends no wait by itself.
        self.done.notify_all();
        self.work.notify_all();
    }

    /// Writes of epochs up to `through` may go out.
    pub fn write_through(&self, through: EpochId) {
        self.held.lock().writes.may_go(through);
        self.work.notify_all();
    }

    /// Waits until the image has all that may go out, or for `timeout`; true if it has all that was
    /// held.
    pub fn drain(&self, timeout: Duration) -> bool {
        let deadline = std::time::Instant::now() + timeout;
        let mut held = self.held.lock();
        while held.writes.due().next().is_some()
            && !held.closed
            && !self.done.wait_until(&mut held, deadline).timed_out()
        {}
        held.writes.is_empty()
    }

    /// Bytes held.
    pub fn used_bytes(&self) -> u64 {
        self.held.lock().cost_bytes()
    }

    /// True if a change that costs so much finds room; if not, the epoch is wanted to be cut.
    fn has_room_for(&self, bytes: u64, mode: Mode) -> bool {
        let mut held = self.held.lock();
        let used = held.cost_bytes();
        // Alone, an older write that is still held must not follow a newer one into the image.
        let fits = used == 0 || (mode == Mode::Hold && used.saturating_add(bytes) <= self.bytes_max);
        if fits {
            return true;
        }
        held.was_full = true;
        let tell = mode == Mode::Hold && !mem::replace(&mut held.full_reported, true);
        drop(held);
        if tell {
            self.listener.cut_wanted();
        }
        false
    }
}

/// One disk of a machine, before its shared image.
pub struct SharedGate {
    image: Arc<SharedImage>,
    journal: Arc<SharedJournal>,
    /// Index of the disk's first block in the image's row.
    first_index: u64,
}

impl SharedGate {
    /// A gate before `image`, whose blocks begin at index `first_index`.
    pub fn new(image: Arc<SharedImage>, journal: Arc<SharedJournal>, first_index: u64) -> SharedGate {
        SharedGate { image, journal, first_index }
    }

    fn change(
        &self,
        offset: u64,
        bytes: u64,
        change: &Change<'_>,
        apply: impl FnOnce(&SharedImage) -> io::Result<Stored>,
    ) -> io::Result<Stored> {
        // One disk's thread writes at a time to this disk, but others to theirs: the bound may be
        // passed by a piece of each.
        let mode = self.journal.mode.read();
        if *mode == Mode::Closed {
            return Err(io::Error::other("this node does not run the guest"));
        }
        let end = offset.checked_add(bytes).filter(|end| *end <= self.image.bytes());
        let Some(end) = end else { return Err(io::ErrorKind::InvalidInput.into()) };
        if bytes == 0 {
            return Ok(Stored::Accepted);
        }
        if !self.journal.has_room_for(cost_bytes(offset, end, change), *mode) {
            return Ok(Stored::Full);
        }
        match *mode {
            Mode::Hold => self.hold(offset, end, change),
            _ => apply(&self.image),
        }
    }

    /// Holds the blocks from `offset` to `end` as they are with the change.
    fn hold(&self, offset: u64, end: u64, change: &Change<'_>) -> io::Result<Stored> {
        // Read before anything is held: a change whose rest cannot be read is not done at all.
        let mut edges = Vec::with_capacity(2);
        for number in offset / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES) {
            let start = number * BLOCK_BYTES;
            if offset <= start && start + BLOCK_BYTES <= end {
                continue;
            }
            let mut block = [0; PAGE_BYTES];
            self.read_block(number, &mut block)?;
            let (from, to) = (offset.max(start), end.min(start + BLOCK_BYTES));
            let room = block.get_mut(index_of(from - start)..index_of(to - start));
            match (change, room) {
                (Change::Zeros, Some(room)) => room.fill(0),
                (Change::Write(bytes), Some(room)) => {
                    let bytes = bytes.get(index_of(from - offset)..index_of(to - offset));
                    room.copy_from_slice(bytes.ok_or(io::ErrorKind::InvalidInput)?);
                }
                (_, None) => return Err(io::ErrorKind::InvalidInput.into()),
            }
            edges.push((number, block));
        }
        let mut held = self.journal.held.lock();
        let open = Arc::make_mut(held.writes.open());
        for number in offset.div_ceil(BLOCK_BYTES)..end / BLOCK_BYTES {
            let content = match change {
                Change::Zeros => None,
                Change::Write(bytes) => {
                    bytes.get(index_of(number * BLOCK_BYTES - offset)..).and_then(<[u8]>::first_chunk)
                }
            };
            open.put(self.first_index + number, content);
        }
        edges.iter().for_each(|(number, block)| open.put(self.first_index + number, Some(block)));
        Ok(Stored::Accepted)
    }

    /// Reads block `number` as the guest sees it.
    fn read_block(&self, number: u64, into: &mut Block) -> io::Result<()> {
        let held = self.journal.held.lock();
        if let Some(block) = find(&held, self.first_index + number) {
            into.copy_from_slice(block);
            return Ok(());
        }
        drop(held);
        read_block(&*self.image, number, into)
    }

    /// Fills what is held of the bytes from `offset` on; the ranges of `into` that are not.
    fn read_held(&self, offset: u64, into: &mut [u8]) -> Vec<std::ops::Range<usize>> {
        let held = self.journal.held.lock();
        let mut missing: Vec<std::ops::Range<usize>> = Vec::new();
        let mut at = 0;
        while at < into.len() {
            let place = offset + at as u64;
            let inside = index_of(place % BLOCK_BYTES);
            let length = (PAGE_BYTES - inside).min(into.len() - at);
            let block = find(&held, self.first_index + place / BLOCK_BYTES);
            match (block.and_then(|block| block.get(inside..inside + length)), into.get_mut(at..at + length)) {
                (Some(from), Some(room)) => room.copy_from_slice(from),
                _ => match missing.last_mut() {
                    Some(last) if last.end == at => last.end += length,
                    _ => missing.push(at..at + length),
                },
            }
            at += length;
        }
        missing
    }
}

/// The newest content of block `index` that is held.
fn find(held: &Held, index: u64) -> Option<&Block> {
    held.writes.newest_first().find_map(|layer| layer.get(index))
}

/// Positions inside of a request fit.
fn index_of(position: u64) -> usize {
    usize::try_from(position).unwrap_or(usize::MAX)
}

impl BlockBackend for SharedGate {
    fn bytes(&self) -> u64 {
        self.image.bytes()
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        // In this order: what is held no more when it is looked for is in the image by then, and
        // only this thread writes this disk.
        for range in self.read_held(offset, into) {
            let at = offset + range.start as u64;
            self.image.read(at, into.get_mut(range).unwrap_or_default())?;
        }
        Ok(())
    }

    fn write(&self, offset: u64, from: &[u8]) -> io::Result<Stored> {
        self.change(offset, from.len() as u64, &Change::Write(from), |image| image.write(offset, from))
    }

    fn flush(&self) -> io::Result<()> {
        let journal = &*self.journal;
        let mut held = journal.held.lock();
        let Some(target) = held.writes.flush_target() else {
            drop(held);
            // What was written through before, if anything was.
            return self.image.flush();
        };
        if target.needs_cut {
            drop(held);
            journal.listener.cut_wanted();
            held = journal.held.lock();
        }
        while !held.closed && !held.writes.is_flushed(target) {
            journal.done.wait(&mut held);
        }
        if held.closed { Err(io::Error::other("this node does not run the guest any more")) } else { Ok(()) }
    }

    fn discard(&self, offset: u64, bytes: u64) -> io::Result<Stored> {
        self.change(offset, bytes, &Change::Zeros, |image| image.discard(offset, bytes))
    }

    fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> io::Result<Stored> {
        self.change(offset, bytes, &Change::Zeros, |image| image.write_zeroes(offset, bytes, may_unmap))
    }
}

#[cfg(test)]
mod tests;
