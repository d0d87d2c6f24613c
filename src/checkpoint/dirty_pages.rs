//! Which pages are dirty, and of which epoch: no page whose transfer failed is ever forgotten (I5).
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
    /// No dirty pages, for a machine of `pages` pages.
    pub fn new(pages: u64) -> DirtyPages {
        DirtyPages { pending: PageSet::empty(pages), taken: PageSet::empty(pages), epoch: None }
    }

    /// Reads the log while the guest runs. What it had is part of the next take.
    ///
    /// # Errors
    /// What `read_log` says; what it added by then is kept.
    pub fn collect<E>(&mut self, read_log: impl FnOnce(&mut PageSet) -> Result<(), E>) -> Result<(), E> {
        read_log(&mut self.pending)
    }

    /// Pages the machine has.
    pub fn pages_max(&self) -> u64 {
        self.pending.len_pages()
    }

    /// Most pages that a take would have now, but for those that the log would add.
    pub fn pending_max(&self) -> u64 {
        (self.pending.count() + self.taken.count()).min(self.pending.len_pages())
    }

    /// Takes the dirty pages of epoch `id`: all that `read_log` adds, all that were collected
    /// before, and all that were put back. Nothing is allocated.
    ///
    /// # Errors
    /// What `read_log` says. The pages that it added by then, and those of an epoch still on its
    /// way, are part of the next take.
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

    /// The epoch is committed: its dirty pages are safe elsewhere.
    pub fn committed(&mut self, id: EpochId) {
        if self.epoch == Some(id) {
            self.taken.clear();
            self.epoch = None;
        }
    }

    /// The epoch on its way will not arrive: its dirty pages belong to the next one.
    pub fn put_back(&mut self) {
        if self.epoch.take().is_some() {
            self.pending.union_with(&self.taken);
            self.taken.clear();
        }
    }

    /// Forgets everything: the newcomer that would have got these pages is gone.
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
    fn the_dirty_pages_of_a_failed_send_are_in_the_next_epoch() {
        let mut book = DirtyPages::new(100);
        assert_eq!(take(&mut book, 0, &[1, 2]), [1, 2]);
        book.put_back();
        assert_eq!(take(&mut book, 1, &[3]), [1, 2, 3]);
        book.committed(id(0)); // a late ack of another epoch changes nothing
        assert_eq!(take(&mut book, 2, &[]), [1, 2, 3]);
        book.committed(id(2));
        assert_eq!(take(&mut book, 3, &[9]), [9]);
    }

    #[test]
    fn pages_collected_before_are_part_of_the_next_take() {
        let mut book = DirtyPages::new(100);
        let mut collect = |page: u64, result: Result<(), &str>| {
            let collected = book.collect(|set| {
                set.insert(page);
                result
            });
            assert_eq!(collected, result);
        };
        collect(4, Ok(()));
        collect(5, Err("interrupted"));
        assert_eq!(book.pending_max(), 2);
        assert_eq!(take(&mut book, 0, &[6]), [4, 5, 6]);
        assert_eq!(book.pending_max(), 3, "until they are committed they may have to travel again");
        book.committed(id(0));
        assert_eq!(book.pending_max(), 0);
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
