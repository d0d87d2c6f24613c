//! Where everything of a guest's image is in one row of pages: its memory, then the blocks of each
//! disk it can write.
//!
//! ```text
//!  index  0 ……………… memory_pages │ blocks of the first such disk │ blocks of the next …
//! ```
//!
//! So a disk is more pages to whoever counts, sends, stages or checks them. A block has the size of
//! a page; the last one of a disk whose size is no multiple of it is filled up with zeros. A disk
//! the guest can only read takes no room: it never differs.

use std::ops::Range;

use super::machine_shape::MachineShape;
use super::pages::PAGE_BYTES;

/// What is behind a page index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A page of guest memory: its index there.
    Memory(u64),
    /// A block of a disk.
    Block {
        /// The disk's number in the machine's shape.
        disk: usize,
        /// The block's number on the disk.
        block: u64,
    },
}

/// The pages of one machine's image. Indexes are dense from 0.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ImageLayout {
    memory_pages: u64,
    /// For each disk of the shape the indexes of its blocks, rising; empty if it has none.
    disks: Vec<Range<u64>>,
    /// Those of disks whose storage both nodes share.
    shared: Vec<Range<u64>>,
    pages: u64,
}

impl ImageLayout {
    /// The layout of a machine of `shape`.
    pub fn of(shape: &MachineShape) -> ImageLayout {
        let memory_pages = shape.memory_bytes / PAGE_BYTES as u64;
        let mut pages = memory_pages;
        let disks = shape.disks.iter().map(|disk| {
            let first = pages;
            let blocks = if disk.read_only { 0 } else { disk.bytes.div_ceil(PAGE_BYTES as u64) };
            // Seven disks of any size do not reach the end of a u64: a block is 4096 bytes.
            pages = pages.saturating_add(blocks);
            first..pages
        });
        let disks: Vec<_> = disks.collect();
        let shared = shape.disks.iter().zip(&disks).filter(|(disk, _)| disk.shared);
        let shared = shared.map(|(_, blocks)| blocks.clone()).collect();
        ImageLayout { memory_pages, disks, shared, pages }
    }

    /// Pages of the whole image.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Pages of guest memory.
    pub fn memory_pages(&self) -> u64 {
        self.memory_pages
    }

    /// The indexes of the blocks of disk number `disk`, rising; none if it has none.
    pub fn blocks_of(&self, disk: usize) -> Range<u64> {
        self.disks.get(disk).cloned().unwrap_or(self.pages..self.pages)
    }

    /// Disks of the shape, with those that have no blocks.
    pub fn disks(&self) -> usize {
        self.disks.len()
    }

    /// The disk all of whose blocks `run` are; `None` for an empty run, and for one that is not all
    /// on one disk.
    pub fn disk_of(&self, run: &Range<u64>) -> Option<usize> {
        let on = |blocks: &Range<u64>| blocks.contains(&run.start) && run.end <= blocks.end;
        self.disks.iter().position(on).filter(|_| !run.is_empty())
    }

    /// The indexes of the blocks of disks whose storage both nodes share: a newcomer has them
    /// already.
    pub fn shared(&self) -> &[Range<u64>] {
        &self.shared
    }

    /// True if `index` is of a disk whose storage both nodes share.
    pub fn is_shared(&self, index: u64) -> bool {
        self.shared.iter().any(|blocks| blocks.contains(&index))
    }

    /// What is behind `index`; `None` beyond the image's end.
    pub fn place(&self, index: u64) -> Option<Place> {
        if index < self.memory_pages {
            return Some(Place::Memory(index));
        }
        let (disk, blocks) = self.disks.iter().enumerate().find(|(_, blocks)| blocks.contains(&index))?;
        Some(Place::Block { disk, block: index - blocks.start })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::machine_shape::DiskShape;

    #[test]
    fn every_index_has_one_place_and_read_only_disks_have_none() {
        let disk = |bytes, read_only| DiskShape { bytes, read_only, shared: false, serial: [0; 20] };
        let mut shape = MachineShape::bare(8192, 1, [2, 0, 0, 0, 0, 1]);
        shape.disks = vec![disk(4096 + 512, false), disk(1 << 30, true), disk(8192, false)];
        let layout = ImageLayout::of(&shape);
        assert_eq!((layout.memory_pages(), layout.pages()), (2, 6));
        let block = |disk, block| Some(Place::Block { disk, block });
        let places =
            [Some(Place::Memory(0)), Some(Place::Memory(1)), block(0, 0), block(0, 1), block(2, 0), block(2, 1)];
        for (index, place) in (0..).zip(places) {
            assert_eq!(layout.place(index), place);
        }
        assert_eq!((layout.place(6), layout.place(u64::MAX)), (None, None));
        assert_eq!((layout.blocks_of(0), layout.blocks_of(2)), (2..4, 4..6));
        assert!(!layout.is_shared(2) && layout.shared().is_empty());
        shape.disks[2].shared = true;
        let layout = ImageLayout::of(&shape);
        assert_eq!((layout.is_shared(3), layout.is_shared(4), layout.is_shared(5)), (false, true, true));
        assert!(layout.blocks_of(1).is_empty() && layout.blocks_of(9).is_empty());
        let runs = [2..4, 3..4, 4..6, 1..3, 3..5, 5..7, 3..3, 0..1, 6..7, 2..u64::MAX];
        let disks = runs.map(|run| layout.disk_of(&run));
        assert_eq!(disks, [Some(0), Some(0), Some(2), None, None, None, None, None, None, None]);
    }
}
