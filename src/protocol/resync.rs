//! The ledger of a background resync: which pages the newcomer still lacks.
//!
//! A page is settled when it was pushed behind the epochs, or when it travelled in an epoch as
//! dirty pages. Pushed pages are read while the guest runs, so a pushed page may be torn or too new
//! for the epoch before it; that is mended by the next epoch, in which it is dirty pages. Hence the
//! image is whole only with an epoch that is *captured after the last push was read*: see
//! [`Ledger::is_done`].
//!
//! A block of a disk is settled too when the newcomer's image is found to hold it already, by its
//! [hash](super::block_hashes). That needs no trust in what the image is and no common moment: a
//! block that was not written since the tracking of dirty pages began is the same on the survivor
//! before and after, and on the newcomer until it is pushed, which it is not before it was
//! compared; a block that was written travels, whatever was found of it.

use std::ops::Range;

use super::block_hashes::HASH_BLOCKS_MAX;
use super::layout::ImageLayout;
use super::mutant;
use super::pages::PageSet;

/// Memory, or a disk.
#[derive(Clone, Debug, Hash)]
struct Part {
    pages: Range<u64>,
    /// How many of them are left: with disks that is too long a row to count each time somebody
    /// asks.
    left: u64,
    /// Those from here on are not compared yet, and must not be pushed.
    unsure: Range<u64>,
    /// The newcomer's image of it was made just now: it has zeros, so what is a hole here needs no
    /// push.
    is_blank: bool,
}

/// The pages a newcomer still lacks, the push on its way, and the comparison.
#[derive(Clone, Debug, Hash)]
pub struct Ledger {
    left: PageSet,
    left_count: u64,
    parts: Vec<Part>,
    cursor: u64,
    pushing: bool,
    comparing: bool,
    /// Blocks that were compared, and how many of them were there already.
    compared: (u64, u64),
}

impl Ledger {
    /// A ledger for a newcomer that has none of the pages of `layout`; with `compare` it may have
    /// blocks of disks, which are compared before they are pushed.
    pub fn new(layout: &ImageLayout, compare: bool) -> Ledger {
        let pages = layout.pages();
        let part = |pages: Range<u64>, unsure| Part { left: pages.end - pages.start, unsure, pages, is_blank: false };
        let memory = part(0..layout.memory_pages(), 0..0);
        let disks = (0..layout.disks()).map(|disk| {
            let blocks = layout.blocks_of(disk);
            part(blocks.clone(), if compare { blocks } else { blocks.end..blocks.end })
        });
        let parts = std::iter::once(memory).chain(disks).collect();
        Ledger {
            left: PageSet::full(pages),
            left_count: pages,
            parts,
            cursor: 0,
            pushing: false,
            comparing: false,
            compared: (0, 0),
        }
    }

    /// Takes the next pages to push, at most `pages_max`; `None` while a push is on its way or when
    /// none is left that may be.
    pub fn next_push(&mut self, pages_max: usize) -> Option<Vec<u64>> {
        if self.pushing {
            return None;
        }
        let sure = self.parts.iter().flat_map(|part| {
            let end = if part.unsure.is_empty() { part.pages.end } else { part.unsure.start };
            let start = self.cursor.max(part.pages.start);
            self.left.iter_from(start).take_while(move |page| *page < end)
        });
        let batch: Vec<u64> = sure.take(pages_max).collect();
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

    /// Takes the next blocks to compare; `None` while some are being compared or when there are no
    /// more.
    pub fn next_comparison(&mut self) -> Option<Range<u64>> {
        if self.comparing {
            return None;
        }
        let part = self.parts.iter().find(|part| !part.unsure.is_empty() && !part.is_blank)?;
        let first = part.unsure.start;
        self.comparing = true;
        Some(first..part.unsure.end.min(first + HASH_BLOCKS_MAX))
    }

    /// The newcomer has these blocks, but for those that differ (rising): they need no push.
    pub fn compared(&mut self, run: &Range<u64>, differing: &[u64]) {
        let blocks = run.end - run.start;
        self.compared.0 += blocks;
        self.compared.1 += blocks.saturating_sub(differing.len() as u64);
        let mut differing = differing.iter().peekable();
        for block in run.clone() {
            let same = differing.next_if(|different| **different == block).is_none();
            if same || mutant::is("different-block-taken-for-equal") {
                self.settle(block);
            }
        }
        self.sure_until(run, run.end);
    }

    /// Takes the next blocks of which the newcomer has zeros, to look for holes among them; `None`
    /// while something is looked for or compared, or when there are no more.
    pub fn next_hole_search(&mut self) -> Option<Range<u64>> {
        if self.comparing {
            return None;
        }
        let part = self.parts.iter().find(|part| !part.unsure.is_empty() && part.is_blank)?;
        self.comparing = true;
        Some(part.unsure.clone())
    }

    /// The newcomer has made its image of the disk with these blocks just now.
    pub fn blank(&mut self, run: &Range<u64>) {
        self.comparing = false;
        if let Some(part) = self.parts.iter_mut().find(|part| part.unsure.start == run.start && !part.unsure.is_empty())
        {
            part.is_blank = true;
        }
    }

    /// Of the blocks `searched`, whose disk is blank at the newcomer, those in `holes` are zeros
    /// here too.
    pub fn found_holes(&mut self, searched: &Range<u64>, holes: &[Range<u64>]) {
        for hole in holes {
            let hole = hole.start.max(searched.start)..hole.end.min(searched.end);
            if !hole.is_empty() {
                let removed = self.left.remove_range(hole);
                self.left_count -= removed;
                if let Some(part) = self.parts.iter_mut().find(|part| part.pages.contains(&searched.start)) {
                    part.left -= removed;
                }
            }
        }
        self.sure_until(searched, searched.end);
    }

    /// The newcomer's image of the disk with these blocks is not worth a comparison: all of it is
    /// pushed.
    pub fn incomparable(&mut self, run: &Range<u64>) {
        self.sure_until(run, u64::MAX);
    }

    fn sure_until(&mut self, run: &Range<u64>, end: u64) {
        self.comparing = false;
        // A push may have gone ahead to another disk meanwhile.
        self.cursor = self.cursor.min(run.start);
        if let Some(part) = self.parts.iter_mut().find(|part| part.unsure.start == run.start && !part.unsure.is_empty())
        {
            part.unsure.start = end.min(part.unsure.end);
        }
    }

    /// These pages of memory travel in an epoch: they need no push.
    pub fn travelled(&mut self, dirty: &PageSet) {
        let removed = self.left.subtract(dirty);
        self.left_count -= removed;
        if let Some(memory) = self.parts.first_mut() {
            memory.left -= removed;
        }
    }

    /// This page travels in an epoch, or is on its way, or is there already: it needs no push.
    pub fn settle(&mut self, page: u64) {
        if self.left.contains(page) {
            self.left.remove(page);
            self.left_count -= 1;
            if let Some(part) = self.parts.iter_mut().find(|part| part.pages.contains(&page)) {
                part.left -= 1;
            }
        }
    }

    /// The newcomer has all pages of this disk already: they need neither a push nor a comparison.
    pub fn has(&mut self, pages: Range<u64>) {
        if let Some(part) = self.parts.iter_mut().find(|part| part.pages == pages) {
            part.left = 0;
            part.unsure = pages.end..pages.end;
            self.left_count -= self.left.remove_range(pages);
        }
    }

    /// True when an epoch captured now makes the image whole.
    pub fn is_done(&self) -> bool {
        (!self.pushing || mutant::is("done-while-pushing"))
            && self.left_count == 0
            && (!self.comparing || mutant::is("whole-while-comparing"))
    }

    /// Once every comparison is done, if there were any: how many blocks were compared, and how
    /// many of them the newcomer had already.
    pub fn comparisons(&self) -> Option<(u64, u64)> {
        let done = !self.comparing && self.parts.iter().all(|part| part.unsure.is_empty());
        Some(self.compared).filter(|(blocks, _)| done && *blocks > 0)
    }

    /// Pages that still have to be pushed.
    pub fn pages_left(&self) -> u64 {
        self.left_count
    }

    /// How many pages there are and how many are left: of memory, then of each disk of the shape.
    pub fn parts(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.parts.iter().map(|part| (part.pages.end - part.pages.start, part.left))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::machine_shape::{DiskShape, MachineShape};

    fn layout(memory_pages: u64, disks: &[u64]) -> ImageLayout {
        let mut shape = MachineShape::bare(memory_pages * 4096, 1, [2, 0, 0, 0, 0, 1]);
        let disk = |blocks: &u64| DiskShape { bytes: blocks * 4096, read_only: false, serial: [0; 20], shared: false };
        shape.disks = disks.iter().map(disk).collect();
        ImageLayout::of(&shape)
    }

    #[test]
    fn every_page_is_pushed_once_or_travels() {
        let mut ledger = Ledger::new(&layout(1000, &[]), true);
        let mut dirty = PageSet::empty(1000);
        for page in (0..1000).step_by(7) {
            dirty.insert(page);
        }
        let first = ledger.next_push(100).unwrap();
        assert_eq!(first.len(), 100);
        assert!(ledger.next_push(100).is_none(), "one push at a time");
        ledger.travelled(&dirty);
        ledger.pushed();
        let mut seen: Vec<u64> = first;
        while let Some(batch) = ledger.next_push(64) {
            assert!(!ledger.is_done(), "a push that is being read is not done");
            assert!(batch.iter().all(|p| !dirty.contains(*p)));
            seen.extend(batch);
            ledger.pushed();
            assert_eq!(ledger.pages_left(), ledger.left.count());
        }
        assert!(ledger.is_done());
        seen.extend(dirty.iter());
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen, (0..1000).collect::<Vec<_>>());
    }

    /// Pushes all that may be pushed.
    fn push_all(ledger: &mut Ledger) -> Vec<u64> {
        let mut pushed = Vec::new();
        while let Some(batch) = ledger.next_push(7) {
            pushed.extend(batch);
            ledger.pushed();
        }
        pushed
    }

    #[test]
    fn blocks_are_compared_before_they_are_pushed_and_those_that_differ_are_pushed() {
        // Memory 0..10, disks 10..310 and 310..315.
        let mut ledger = Ledger::new(&layout(10, &[300, 5]), true);
        assert_eq!(push_all(&mut ledger), (0..10).collect::<Vec<_>>(), "memory needs no comparison");
        assert!(!ledger.is_done());
        assert_eq!(ledger.next_comparison(), Some(10..266));
        assert_eq!(ledger.next_comparison(), None, "one at a time");
        assert!(push_all(&mut ledger).is_empty());
        // It travelled while it was compared, and was found different.
        ledger.settle(20);
        ledger.compared(&(10..266), &[20, 30, 265]);
        assert_eq!(push_all(&mut ledger), [30, 265]);
        let run = ledger.next_comparison().expect("the rest of the first disk");
        assert_eq!(run, 266..310);
        ledger.compared(&run, &[]);
        assert_eq!(ledger.next_comparison(), Some(310..315));
        assert!(!ledger.is_done());
        ledger.incomparable(&(310..315));
        assert_eq!((ledger.next_comparison(), ledger.comparisons()), (None, Some((300, 297))));
        assert_eq!(ledger.parts().collect::<Vec<_>>(), [(10, 0), (300, 0), (5, 5)]);
        assert_eq!(push_all(&mut ledger), (310..315).collect::<Vec<_>>());
        assert!(ledger.is_done() && ledger.pages_left() == 0);
    }

    #[test]
    fn a_comparison_on_its_way_keeps_the_image_from_being_whole() {
        let mut ledger = Ledger::new(&layout(1, &[2]), true);
        push_all(&mut ledger);
        let run = ledger.next_comparison().expect("a run");
        (1..3).for_each(|block| ledger.settle(block));
        assert!(ledger.pages_left() == 0 && !ledger.is_done());
        ledger.compared(&run, &[1, 2]);
        assert!(ledger.is_done(), "they travelled");
    }

    #[test]
    fn a_disk_that_the_newcomer_has_is_neither_pushed_nor_compared() {
        let mut ledger = Ledger::new(&layout(2, &[4, 3]), true);
        ledger.has(2..6);
        assert_eq!((ledger.pages_left(), ledger.parts().nth(1)), (5, Some((4, 0))));
        let run = ledger.next_comparison().expect("the other disk");
        assert_eq!(run, 6..9);
        ledger.compared(&run, &[7]);
        assert_eq!(push_all(&mut ledger), [0, 1, 7]);
        assert!(ledger.is_done());
    }

    #[test]
    fn a_push_that_went_ahead_comes_back() {
        // The first disk is compared while the second, which is not worth it, is pushed.
        let mut ledger = Ledger::new(&layout(1, &[4, 4]), true);
        ledger.parts[2].unsure = 9..9;
        assert_eq!(ledger.pages_left(), 9);
        let run = ledger.next_comparison().expect("a run");
        assert_eq!(push_all(&mut ledger), [0, 5, 6, 7, 8]);
        ledger.compared(&run, &[2]);
        assert_eq!(push_all(&mut ledger), [2]);
        assert!(ledger.is_done());
    }

    #[test]
    fn holes_of_a_blank_disk_need_no_push_and_the_rest_does() {
        let layout = layout(4, &[10]);
        let mut ledger = Ledger::new(&layout, true);
        assert_eq!(ledger.next_hole_search(), None, "nobody said that it is blank");
        let run = ledger.next_comparison().expect("a comparison");
        ledger.blank(&run);
        assert_eq!(ledger.next_comparison(), None, "there is nothing to compare with");
        assert_eq!(ledger.next_hole_search(), Some(4..14));
        assert_eq!((ledger.next_hole_search(), ledger.is_done()), (None, false));
        // It stopped half-way, and said more than it was asked.
        ledger.settle(6);
        ledger.found_holes(&(4..10), &[0..5, 6..8, 9..12]);
        assert_eq!(ledger.next_push(100), Some(vec![0, 1, 2, 3, 5, 8]));
        ledger.pushed();
        assert_eq!(ledger.next_hole_search(), Some(10..14));
        ledger.found_holes(&(10..14), &[11..12, 12..14]);
        assert_eq!(ledger.next_push(100), Some(vec![10]));
        assert!(!ledger.is_done());
        ledger.pushed();
        assert!(ledger.is_done());
        assert_eq!(ledger.parts().collect::<Vec<_>>(), [(4, 0), (10, 0)]);
    }
}
