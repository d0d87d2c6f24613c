//! Verifying the disks of a protected guest while it runs: each run of blocks is compared as it was
//! at one committed epoch.
//!
//! ```text
//!   Idle ── preserve the next run ─▶ Preserving ── an epoch is cut ─▶ Hashing ── both nodes' hashes ─▶ Idle … Done
//! ```
//!
//! The primary reads a preserved run as it was at the cut, whatever the guest writes meanwhile. The
//! question to the secondary follows that epoch on the same connection, and is answered in order,
//! behind that epoch and before the next one. So both hash the same epoch, and a difference is one.
//! Each run has an epoch of its own; one run is on its way at a time, so a verify takes what an
//! epoch leaves free.

use std::ops::Range;

use super::block_hashes::HASH_BLOCKS_MAX;
use super::layout::ImageLayout;
use super::types::EpochId;

/// Most ranges of differing blocks that are reported for one disk; of the others only their blocks
/// are counted.
pub const RANGES_MAX: usize = 16;

/// How a verify ended, if it did.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// It goes on.
    Running,
    /// Every block was compared.
    Done,
    /// It could not be finished.
    Failed(String),
}

/// What was found of one disk.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DiskFindings {
    /// The disk's number in the machine's shape.
    pub disk: usize,
    /// Its blocks.
    pub blocks: u64,
    /// How many of them were compared.
    pub compared: u64,
    /// How many of those differ.
    pub different: u64,
    /// The first ranges of blocks that differ, by their numbers on the disk, rising.
    pub ranges: Vec<Range<u64>>,
    first_index: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Stage {
    Idle,
    Preserving(Range<u64>),
    Hashing,
}

/// One verify, from its start to its result.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Verify {
    disks: Vec<DiskFindings>,
    /// The one of `disks` that is being compared.
    at: usize,
    stage: Stage,
    epochs: Option<(EpochId, EpochId)>,
    outcome: Outcome,
}

impl Verify {
    /// Of the disks with these numbers.
    pub fn new(layout: &ImageLayout, disks: &[usize]) -> Verify {
        let findings = disks.iter().map(|disk| {
            let indexes = layout.blocks_of(*disk);
            let (blocks, first_index) = (indexes.end - indexes.start, indexes.start);
            DiskFindings { disk: *disk, blocks, compared: 0, different: 0, ranges: Vec::new(), first_index }
        });
        Verify { disks: findings.collect(), at: 0, stage: Stage::Idle, epochs: None, outcome: Outcome::Running }
    }

    /// What was found so far.
    pub fn disks(&self) -> &[DiskFindings] {
        &self.disks
    }

    /// The first and the last epoch of which blocks were compared.
    pub fn epochs(&self) -> Option<(EpochId, EpochId)> {
        self.epochs
    }

    /// How it ended, if it did.
    pub fn outcome(&self) -> &Outcome {
        &self.outcome
    }

    /// True until it has a result.
    pub fn is_running(&self) -> bool {
        self.outcome == Outcome::Running
    }

    /// The next run of blocks, which is to be preserved with the next epoch that is cut; `None`
    /// while one is under way, and after the last.
    pub fn next_run(&mut self) -> Option<Range<u64>> {
        if !self.is_running() || self.stage != Stage::Idle {
            return None;
        }
        while self.disks.get(self.at).is_some_and(|disk| disk.compared >= disk.blocks) {
            self.at += 1;
        }
        let Some(disk) = self.disks.get(self.at) else {
            self.outcome = Outcome::Done;
            return None;
        };
        let first = disk.first_index + disk.compared;
        let run = first..first + HASH_BLOCKS_MAX.min(disk.blocks - disk.compared);
        self.stage = Stage::Preserving(run.clone());
        Some(run)
    }

    /// Epoch `id` was cut: the run that is preserved as of it, if one is, is to be hashed.
    pub fn cut(&mut self, id: EpochId) -> Option<Range<u64>> {
        if !self.is_running() {
            return None;
        }
        match std::mem::replace(&mut self.stage, Stage::Hashing) {
            Stage::Preserving(run) => {
                let first = self.epochs.map_or(id, |(first, _)| first);
                self.epochs = Some((first, id));
                Some(run)
            }
            other => {
                self.stage = other;
                None
            }
        }
    }

    /// The run was compared, and these of its blocks differ, by rising index.
    pub fn compared(&mut self, run: &Range<u64>, differing: &[u64]) {
        self.stage = Stage::Idle;
        let Some(disk) = self.disks.get_mut(self.at) else { return };
        disk.compared += run.end - run.start;
        disk.different += differing.len() as u64;
        for block in differing.iter().map(|index| index - disk.first_index) {
            let count = disk.ranges.len();
            match disk.ranges.last_mut() {
                Some(range) if range.end == block => range.end += 1,
                _ if count < RANGES_MAX => disk.ranges.push(block..block + 1),
                _ => {}
            }
        }
    }

    /// It cannot go on, unless it is over already.
    pub fn fail(&mut self, why: &str) {
        if self.is_running() {
            self.outcome = Outcome::Failed(why.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::machine_shape::{DiskShape, MachineShape};
    use crate::protocol::types::Generation;

    fn id(epoch: u64) -> EpochId {
        EpochId { generation: Generation(2), epoch }
    }

    fn layout() -> ImageLayout {
        let disk =
            |blocks: u64, read_only| DiskShape { bytes: blocks * 4096, read_only, serial: [0; 20], shared: false };
        let mut shape = MachineShape::bare(8192, 1, [2, 0, 0, 0, 0, 1]);
        shape.disks = vec![disk(300, false), disk(9, true), disk(1, false)];
        ImageLayout::of(&shape)
    }

    #[test]
    fn every_block_is_compared_once_as_of_an_epoch() {
        let mut verify = Verify::new(&layout(), &[0, 1, 2]);
        let mut runs = Vec::new();
        for epoch in 0.. {
            let Some(run) = verify.next_run() else { break };
            assert_eq!(verify.next_run(), None, "one at a time");
            assert_eq!(verify.cut(id(epoch)), Some(run.clone()));
            assert_eq!(verify.cut(id(epoch + 1)), None, "preserved once");
            verify.compared(&run, &[]);
            runs.push(run);
        }
        assert_eq!(runs, [2..258, 258..302, 302..303]);
        assert_eq!((verify.outcome(), verify.epochs()), (&Outcome::Done, Some((id(0), id(2)))));
        let counts: Vec<_> = verify.disks().iter().map(|disk| (disk.blocks, disk.compared, disk.different)).collect();
        assert_eq!(counts, [(300, 300, 0), (0, 0, 0), (1, 1, 0)]);
    }

    #[test]
    fn differences_are_ranges_and_no_more_are_kept_than_a_person_reads() {
        let mut verify = Verify::new(&layout(), &[0]);
        let run = verify.next_run().expect("a run");
        verify.cut(id(0));
        // Blocks 5 to 7, and the last of the run, with which the next run goes on.
        verify.compared(&run, &[7, 8, 9, 257]);
        let run = verify.next_run().expect("a run");
        verify.cut(id(1));
        let every_second: Vec<u64> = run.clone().step_by(2).collect();
        verify.compared(&run, &every_second);
        let disk = &verify.disks()[0];
        assert_eq!(disk.different, 4 + 22);
        assert_eq!(disk.ranges[..3], [5..8, 255..257, 258..259]);
        assert_eq!(disk.ranges.len(), RANGES_MAX);
    }

    #[test]
    fn a_result_stays() {
        let mut verify = Verify::new(&layout(), &[2]);
        verify.next_run();
        verify.fail("the secondary is gone");
        verify.fail("another reason");
        assert_eq!(verify.cut(id(4)), None);
        assert_eq!(verify.next_run(), None);
        assert_eq!(verify.outcome(), &Outcome::Failed("the secondary is gone".into()));
        let mut nothing = Verify::new(&layout(), &[]);
        assert_eq!((nothing.next_run(), nothing.outcome()), (None, &Outcome::Done));
        nothing.fail("too late");
        assert_eq!(nothing.outcome(), &Outcome::Done);
    }
}
