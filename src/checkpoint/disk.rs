//! The guest's disks: writes pass to the image, or pass and travel in their epoch too.
//!
//! ```text
//!  guest ── write ─▶ DiskGate ──▶ image (at once, so that reads and flushes are the local storage's)
//!                        └─ each block touched, whole ─▶ journal of the open epoch ─▶ capture, send, stage, apply
//! ```
//!
//! A write that touches only a part of a block reads the rest back. That reads no slow disk: the
//! host's page cache had to read the block for the write itself.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::journal::{BLOCK_COST_BYTES, Block, DiskJournal, JournalMode, Reservation, ZERO_COST_BYTES};
use crate::device::block::{BlockBackend, Stored};
use crate::protocol::pages::PAGE_BYTES;

const BLOCK_BYTES: u64 = PAGE_BYTES as u64;

/// One disk of a machine, before its image.
pub struct DiskGate {
    image: Arc<dyn BlockBackend>,
    journal: Arc<DiskJournal>,
    /// Index of the disk's first block in the image's row; `None` for a disk that does not travel.
    first_index: Option<u64>,
}

/// What a change does to the bytes it touches.
pub(super) enum Change<'a> {
    Write(&'a [u8]),
    Zeros,
}

impl DiskGate {
    /// A gate before `image`, whose blocks have the indexes `blocks` (none: the guest cannot write
    /// it).
    pub fn new(image: Arc<dyn BlockBackend>, journal: Arc<DiskJournal>, blocks: Range<u64>) -> DiskGate {
        DiskGate { image, journal, first_index: (!blocks.is_empty()).then_some(blocks.start) }
    }

    /// Makes a change to the image by `apply` and keeps what it touched, if that travels.
    fn change(
        &self,
        offset: u64,
        bytes: u64,
        change: &Change<'_>,
        apply: impl FnOnce(&dyn BlockBackend) -> io::Result<Stored>,
    ) -> io::Result<Stored> {
        let (mode, _under_way) = self.journal.begin_write();
        let first_index = match (mode, self.first_index) {
            (JournalMode::Closed, _) => return Err(io::Error::other("this node does not run the guest")),
            (JournalMode::Keep, Some(first_index)) if bytes > 0 => first_index,
            (JournalMode::Keep | JournalMode::Pass, _) => return apply(&*self.image),
        };
        let end = offset.checked_add(bytes).filter(|end| *end <= self.image.bytes());
        let Some(end) = end else { return Err(io::ErrorKind::InvalidInput.into()) };
        let Some(reserve) = self.journal.reserve(cost_bytes(offset, end, change)) else { return Ok(Stored::Full) };
        let blocks = first_index + offset / BLOCK_BYTES..first_index + end.div_ceil(BLOCK_BYTES);
        self.journal
            .copy_before_write()
            .about_to_write(blocks, |index, into| read_block(&*self.image, index - first_index, into));
        match apply(&*self.image) {
            Ok(Stored::Accepted) => {}
            Ok(Stored::Full) => return Ok(Stored::Full),
            Err(error) => {
                // Part of it may be in the image: what is there now travels, so that the images
                // stay equal if the storage lets us.
                let kept = self.keep(&reserve, first_index, offset, end, None);
                tracing::debug!(?kept, "after a failed write");
                return Err(error);
            }
        }
        self.keep(&reserve, first_index, offset, end, Some(change))?;
        Ok(Stored::Accepted)
    }

    /// Keeps the blocks from `offset` to `end` as they are now; `change` says what is in those it
    /// covers completely.
    fn keep(
        &self,
        reserve: &Reservation<'_>,
        first_index: u64,
        offset: u64,
        end: u64,
        change: Option<&Change<'_>>,
    ) -> io::Result<()> {
        for number in offset / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES) {
            let start = number * BLOCK_BYTES;
            let is_whole = offset <= start && start + BLOCK_BYTES <= end;
            let (index, at) =
                (first_index + number, usize::try_from(start.saturating_sub(offset)).unwrap_or(usize::MAX));
            match change {
                Some(Change::Zeros) if is_whole => reserve.keep(index, None),
                Some(Change::Write(from)) if is_whole => {
                    let content = from.get(at..).and_then(|rest| rest.first_chunk());
                    reserve.keep(index, Some(content.ok_or(io::ErrorKind::InvalidInput)?));
                }
                _ => {
                    let mut block = [0; PAGE_BYTES];
                    read_block(&*self.image, number, &mut block)?;
                    reserve.keep(index, Some(&block));
                }
            }
        }
        Ok(())
    }
}

/// The most a change can cost in the journal.
pub(super) fn cost_bytes(offset: u64, end: u64, change: &Change<'_>) -> u64 {
    let blocks = end.div_ceil(BLOCK_BYTES) - offset / BLOCK_BYTES;
    match change {
        Change::Write(_) => blocks * BLOCK_COST_BYTES,
        // At most the first and the last are not zeros throughout.
        Change::Zeros => blocks * ZERO_COST_BYTES + 2 * BLOCK_COST_BYTES,
    }
}

/// Reads block `number` of an image; what is beyond its end is zeros.
pub fn read_block(image: &dyn BlockBackend, number: u64, into: &mut Block) -> io::Result<()> {
    let start = number.checked_mul(BLOCK_BYTES).ok_or(io::ErrorKind::InvalidInput)?;
    let length = block_length(image, start)?;
    let (inside, beyond) = into.split_at_mut(length);
    beyond.fill(0);
    image.read(start, inside)
}

/// Bytes of the block at offset `start` that are inside the image.
fn block_length(image: &dyn BlockBackend, start: u64) -> io::Result<usize> {
    let left = image.bytes().checked_sub(start).filter(|left| *left > 0).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(usize::try_from(left).unwrap_or(usize::MAX).min(PAGE_BYTES))
}

impl BlockBackend for DiskGate {
    fn bytes(&self) -> u64 {
        self.image.bytes()
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.image.read(offset, into)
    }

    fn write(&self, offset: u64, from: &[u8]) -> io::Result<Stored> {
        self.change(offset, from.len() as u64, &Change::Write(from), |image| image.write(offset, from))
    }

    fn flush(&self) -> io::Result<()> {
        self.image.flush()
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
