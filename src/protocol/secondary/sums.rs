//! What a secondary tells of its disks: the sums of blocks, when its primary asks for them. And what its primary tells it: how far it is.

use std::ops::Range;

use super::{Action, Phase, Secondary};
use crate::protocol::layout::ImageLayout;
use crate::protocol::messages::features;
use crate::protocol::mutant;
use crate::protocol::sums::{BlockSum, SUM_BLOCKS_MAX};
use crate::protocol::types::Instant;

impl Secondary {
    /// The primary asks for sums. It asks for one run of blocks at a time, so no peer can make this node do more than that.
    pub(super) fn sum_blocks(&mut self, now: Instant, first: u64, count: u32) {
        match self.summable(first, u64::from(count)) {
            Ok((disk, _)) if self.is_all_to_come(disk) => {
                let conn = self.data;
                self.actions.extend(conn.map(|conn| Action::SendSums { conn, first, sums: Vec::new() }));
            }
            Ok((_, run)) => {
                self.summing = Some(first);
                self.actions.push_back(Action::Sum { run });
            }
            Err(why) => self.lose_primary(now, why),
        }
    }

    /// An image that was made just now has nothing that a comparison could find, until it is whole.
    fn is_all_to_come(&self, disk: usize) -> bool {
        (self.phase == Phase::Syncing || mutant::is("made-for-ever")) && self.made.get(disk) == Some(&true)
    }

    /// The blocks asked for, and the disk they are on.
    fn summable(&self, first: u64, count: u64) -> Result<(usize, Range<u64>), &'static str> {
        if !self.has_sums() || !matches!(self.phase, Phase::Syncing | Phase::Paired) {
            return Err("it asked for sums of blocks out of turn");
        }
        if self.summing.is_some() {
            return Err("it asked for sums of blocks again before it had them");
        }
        let run = first..first.saturating_add(count);
        let layout = self.welcome.as_ref().map(|welcome| ImageLayout::of(&welcome.shape));
        let disk = layout.and_then(|layout| layout.disk_of(&run).filter(|_| !layout.is_shared(first)));
        match disk {
            Some(disk) if count <= SUM_BLOCKS_MAX => Ok((disk, run)),
            _ => Err("it asked for sums of blocks that no disk has"),
        }
    }

    fn has_sums(&self) -> bool {
        self.welcome.as_ref().is_some_and(|welcome| welcome.features & self.config.features & features::DISK_SUMS != 0)
    }

    pub(super) fn summed(&mut self, first: u64, sums: Vec<BlockSum>) {
        if let (Some(_), Some(conn)) = (self.summing.take_if(|summing| *summing == first), self.data) {
            self.actions.push_back(Action::SendSums { conn, first, sums });
        }
    }

    pub(super) fn resync_left(&mut self, now: Instant, left: Vec<u64>) {
        if self.has_sums() {
            self.resync_left = left;
        } else {
            self.lose_primary(now, "it told of a resync in words that were not agreed on");
        }
    }

    /// How many pages there are and how many this newcomer still lacks, as its primary said last: of memory, then of each disk. None before
    /// it has said so, and when the image is whole.
    pub fn resync(&self) -> Option<Vec<(u64, u64)>> {
        if self.phase != Phase::Syncing || self.resync_left.is_empty() {
            return None;
        }
        let layout = ImageLayout::of(&self.welcome.as_ref()?.shape);
        let disks = (0..layout.disks()).map(|disk| layout.blocks_of(disk)).map(|blocks| blocks.end - blocks.start);
        let totals = std::iter::once(layout.memory_pages()).chain(disks);
        Some(totals.zip(&self.resync_left).map(|(total, left)| (total, total.min(*left))).collect())
    }
}
