//! A run of blocks that can be read as it was when an epoch was cut, while the guest goes on
//! writing.
//!
//! The first write to a preserved block keeps what was there before, ahead of the write itself. A
//! reader reads the image first and asks for what was kept then: if nothing was, no write had begun
//! before the image was read. One run is preserved at a time, so what is kept is bounded.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;

use parking_lot::Mutex;
use thiserror::Error;

use super::journal::Block;
use crate::protocol::block_hashes::HASH_BLOCKS_MAX;
use crate::protocol::pages::PAGE_BYTES;
use crate::protocol::types::EpochId;

/// Why a preserved block cannot be read.
#[derive(Debug, Error)]
pub enum PreservedError {
    /// It is not preserved, or not any more.
    #[error("block {0} is not preserved as of that epoch")]
    NotPreserved(u64),
    /// What it was could not be kept before it was written over.
    #[error("what was in block {index} could not be kept before it was written over: {kind}")]
    NotKept {
        /// The block.
        index: u64,
        /// What the storage said.
        kind: io::ErrorKind,
    },
}

/// What was in a block before the first write to it.
type Before = Result<Box<Block>, io::ErrorKind>;

struct Preserved {
    run: Range<u64>,
    /// The epoch it was preserved with; before that it may change.
    at: Option<EpochId>,
    kept: BTreeMap<u64, Before>,
}

/// Preserves blocks.
#[derive(Default)]
pub struct CopyBeforeWrite {
    preserved: Mutex<Option<Preserved>>,
}

impl CopyBeforeWrite {
    /// The next cut preserves the blocks with the indexes `run`, of which the first
    /// [`HASH_BLOCKS_MAX`] count; those preserved before are released.
    pub fn preserve(&self, run: Range<u64>) {
        let end = run.end.min(run.start.saturating_add(HASH_BLOCKS_MAX));
        *self.preserved.lock() = Some(Preserved { run: run.start..end, at: None, kept: BTreeMap::new() });
    }

    /// Nothing is preserved any more.
    pub fn release(&self) {
        *self.preserved.lock() = None;
    }

    /// What was preserved with epoch `as_of` is preserved no longer.
    pub fn release_of(&self, as_of: EpochId) {
        self.preserved.lock().take_if(|preserved| preserved.at == Some(as_of));
    }

    /// Epoch `id` is cut. No write is under way.
    pub fn cut(&self, id: EpochId) {
        if let Some(preserved) = self.preserved.lock().as_mut() {
            preserved.at.get_or_insert(id);
        }
    }

    /// These blocks are about to be written: keeps what is in those that are preserved, as `read`
    /// reads it.
    pub fn about_to_write(&self, blocks: Range<u64>, read: impl Fn(u64, &mut Block) -> io::Result<()>) {
        let mut preserved = self.preserved.lock();
        let Some(Preserved { run, at: Some(_), kept }) = preserved.as_mut() else { return };
        for index in blocks.start.max(run.start)..blocks.end.min(run.end) {
            kept.entry(index).or_insert_with(|| {
                let mut block = Box::new([0; PAGE_BYTES]);
                // The guest's write is not to fail for it.
                read(index, &mut block).map(|()| block).map_err(|error| error.kind())
            });
        }
    }

    /// Puts what block `index` was when epoch `as_of` was cut into `block`, which holds what was
    /// read of the image before this call.
    ///
    /// # Errors
    /// [`PreservedError`].
    pub fn as_it_was(&self, index: u64, as_of: EpochId, block: &mut Block) -> Result<(), PreservedError> {
        let preserved = self.preserved.lock();
        let of_then = |preserved: &&Preserved| preserved.at == Some(as_of) && preserved.run.contains(&index);
        match preserved.as_ref().filter(of_then).map(|preserved| preserved.kept.get(&index)) {
            None => Err(PreservedError::NotPreserved(index)),
            Some(None) => Ok(()),
            Some(Some(Ok(before))) => {
                *block = **before;
                Ok(())
            }
            Some(Some(Err(kind))) => Err(PreservedError::NotKept { index, kind: *kind }),
        }
    }
}
