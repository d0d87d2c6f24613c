//! The ledger of a background resync: which pages the newcomer still lacks.
//!
//! A page is settled when it was pushed behind the epochs, or when it travelled in an epoch as dirt. Pushed pages are read
//! while the guest runs, so a pushed page may be torn or too new for the epoch before it; that is mended by the next epoch, in which
//! it is dirt. Hence the image is whole only with an epoch that is *captured after the last push was read*: see [`Ledger::is_done`].

use super::mutant;
use super::pages::PageSet;

/// The pages a newcomer still lacks, and the push on its way.
#[derive(Clone, Debug, Hash)]
pub struct Ledger {
    left: PageSet,
    /// How many pages are in `left`: with disks that is too long a row to count each time somebody asks.
    left_count: u64,
    cursor: u64,
    pushing: bool,
}

impl Ledger {
    /// A ledger for a newcomer that has none of `pages` pages.
    pub fn new(pages: u64) -> Ledger {
        Ledger { left: PageSet::full(pages), left_count: pages, cursor: 0, pushing: false }
    }

    /// Takes the next pages to push, at most `pages_max`; `None` while a push is on its way or when none is left.
    pub fn next_push(&mut self, pages_max: usize) -> Option<Vec<u64>> {
        if self.pushing {
            return None;
        }
        let batch: Vec<u64> = self.left.iter_from(self.cursor).take(pages_max).collect();
        let last = *batch.last()?;
        for page in &batch {
            self.settle(*page);
        }
        self.cursor = last + 1;
        if mutant::is("push-skips-a-page") {
            self.settle(self.cursor);
        }
        self.pushing = true;
        Some(batch)
    }

    /// The push on its way has been read from memory and handed to the link.
    pub fn pushed(&mut self) {
        self.pushing = false;
    }

    /// These pages travel in an epoch: they need no push.
    pub fn travelled(&mut self, dirt: &PageSet) {
        self.left_count -= self.left.subtract(dirt);
    }

    /// This page travels in an epoch, or is on its way: it needs no push.
    pub fn settle(&mut self, page: u64) {
        if self.left.contains(page) {
            self.left.remove(page);
            self.left_count -= 1;
        }
    }

    /// The newcomer has these pages already.
    pub fn has(&mut self, pages: std::ops::Range<u64>) {
        self.left_count -= self.left.remove_range(pages);
    }

    /// True when an epoch captured now makes the image whole.
    pub fn is_done(&self) -> bool {
        (!self.pushing || mutant::is("done-while-pushing")) && self.left_count == 0
    }

    /// Pages that still have to be pushed.
    pub fn pages_left(&self) -> u64 {
        self.left_count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_is_pushed_once_or_travels() {
        let mut ledger = Ledger::new(1000);
        let mut dirt = PageSet::empty(1000);
        for page in (0..1000).step_by(7) {
            dirt.insert(page);
        }
        let first = ledger.next_push(100).unwrap();
        assert_eq!(first.len(), 100);
        assert!(ledger.next_push(100).is_none(), "one push at a time");
        ledger.travelled(&dirt);
        ledger.pushed();
        let mut seen: Vec<u64> = first;
        while let Some(batch) = ledger.next_push(64) {
            assert!(!ledger.is_done(), "a push that is being read is not done");
            assert!(batch.iter().all(|p| !dirt.contains(*p)));
            seen.extend(batch);
            ledger.pushed();
            assert_eq!(ledger.pages_left(), ledger.left.count());
        }
        assert!(ledger.is_done());
        seen.extend(dirt.iter());
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen, (0..1000).collect::<Vec<_>>());
    }
}
