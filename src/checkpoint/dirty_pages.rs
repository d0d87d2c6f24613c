//! Which pages are dirty pages, and whose dirty pages it is: no page whose transfer failed is ever
//! forgotten (I5).
//!
//! Reading the dirty log clears it. From that moment the only memory of a page having changed is
//! here: first in `taken`, the dirty pages of the epoch on its way, until that epoch is committed;
//! or, if its transfer fails, back in `pending`, which is part of the next epoch.

use crate::protocol::pages::PageSet;
use crate::protocol::types::EpochId;

/// The dirty pages of the epoch on its way, and what has to travel again.
#[derive(Debug)]
pub struct DirtyPages {
    pending: PageSet,
    taken: PageSet,
    epoch: Option<EpochId>,
}

impl DirtyPages {
    /// An empty book for a machine of `pages` pages.
    pub fn new(pages: u64) -> DirtyPages {
        DirtyPages { pending: PageSet::empty(pages), taken: PageSet::empty(pages), epoch: None }
    }

    /// Takes the dirty pages of epoch `id`: all that `read_log` adds, and all that was put back.
    /// Nothing is allocated.
    ///
    /// If an epoch is still on its way, or `read_log` fails after it cleared part of the log, that
    /// dirty pages stays in the book and is part of the next take.
    pub fn take<E>(
        &mut self,
        id: EpochId,
        read_log: impl FnOnce(&mut PageSet) -> Result<(), E>,
    ) -> Result<&PageSet, E> {
        self.put_back();
        let read = read_log(&mut self.pending);
        read?;
        std::mem::swap(&mut self.pending, &mut self.taken);
        self.pending.clear();
        self.epoch = Some(id);
        Ok(&self.taken)
    }

    /// The dirty pages of the epoch on its way.
    pub fn taken(&self) -> &PageSet {
        &self.taken
    }

    /// The epoch is committed: its dirty pages is safe elsewhere.
    pub fn committed(&mut self, id: EpochId) {
        if self.epoch == Some(id) {
            self.taken.clear();
            self.epoch = None;
        }
    }

    /// The epoch on its way will not arrive: its dirty pages belongs to the next one.
    pub fn put_back(&mut self) {
        if self.epoch.take().is_some() {
            self.pending.union_with(&self.taken);
            self.taken.clear();
        }
    }

    /// Forgets everything: the newcomer this dirty pages was for is gone.
    pub fn forget(&mut self) {
        self.pending.clear();
        self.taken.clear();
        self.epoch = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::types::Generation;

    fn id(epoch: u64) -> EpochId {
        EpochId { generation: Generation(1), epoch }
    }

    fn take(book: &mut DirtyPages, epoch: u64, dirty: &[u64]) -> Vec<u64> {
        let set = book.take::<()>(id(epoch), |set| {
            dirty.iter().for_each(|page| set.insert(*page));
            Ok(())
        });
        set.unwrap().iter().collect()
    }

    #[test]
    fn the_dirt_of_a_failed_send_is_in_the_next_epoch() {
        let mut book = DirtyPages::new(100);
        assert_eq!(take(&mut book, 0, &[1, 2]), [1, 2]);
        book.put_back();
        assert_eq!(take(&mut book, 1, &[3]), [1, 2, 3]);
        book.committed(id(0)); // a late word about another epoch changes nothing
        assert_eq!(take(&mut book, 2, &[]), [1, 2, 3]);
        book.committed(id(2));
        assert_eq!(take(&mut book, 3, &[9]), [9]);
    }

    #[test]
    fn a_log_that_fails_half_way_loses_nothing() {
        let mut book = DirtyPages::new(100);
        let failed = book.take(id(0), |set| {
            set.insert(7);
            Err("interrupted")
        });
        assert_eq!(failed.err(), Some("interrupted"));
        assert_eq!(take(&mut book, 0, &[8]), [7, 8]);
    }
}
