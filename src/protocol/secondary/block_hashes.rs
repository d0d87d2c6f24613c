//! What a secondary tells of its disks: the hashes of blocks, when its primary asks for them. And
//! what its primary tells it: how far it is.

use std::ops::Range;

use super::{Action, Phase, Secondary};
use crate::protocol::block_hashes::{BlockHash, HASH_BLOCKS_MAX};
use crate::protocol::layout::ImageLayout;
use crate::protocol::messages::features;
use crate::protocol::mutant;
use crate::protocol::peer_loss::PeerFault;
use crate::protocol::types::Instant;

impl Secondary {
    /// The primary asks for hashes. It asks for one run of blocks at a time, so no peer can make
    /// this node do more than that.
    pub(super) fn hash_blocks(&mut self, now: Instant, first: u64, count: u32) {
        match self.hashable(first, u64::from(count)) {
            Ok((disk, _)) if self.is_all_to_come(disk) => {
                let conn = self.data;
                self.actions.extend(conn.map(|conn| Action::SendHashes { conn, first, hashes: Vec::new() }));
            }
            Ok((_, run)) => {
                self.hashing = Some(first);
                self.actions.push_back(Action::HashBlocks { run });
            }
            Err(fault) => self.lose_primary(now, fault.into()),
        }
    }

    /// An image that was made just now has nothing that a comparison could find, until it is whole.
    fn is_all_to_come(&self, disk: usize) -> bool {
        (self.phase == Phase::Syncing || mutant::is("made-for-ever")) && self.made.get(disk) == Some(&true)
    }

    /// The blocks asked for, and the disk they are on.
    fn hashable(&self, first: u64, count: u64) -> Result<(usize, Range<u64>), PeerFault> {
        if !self.has_hashes() || !matches!(self.phase, Phase::Syncing | Phase::Paired) {
            return Err(PeerFault::HashesOutOfTurn);
        }
        if self.hashing.is_some() {
            return Err(PeerFault::HashesAgain);
        }
        let run = first..first.saturating_add(count);
        let layout = self.welcome.as_ref().map(|welcome| ImageLayout::of(&welcome.shape));
        let disk = layout.and_then(|layout| layout.disk_of(&run).filter(|_| !layout.is_shared(first)));
        match disk {
            Some(disk) if count <= HASH_BLOCKS_MAX => Ok((disk, run)),
            _ => Err(PeerFault::NoSuchBlocks),
        }
    }

    fn has_hashes(&self) -> bool {
        self.welcome
            .as_ref()
            .is_some_and(|welcome| welcome.features & self.config.features & features::DISK_HASHES != 0)
    }

    pub(super) fn hashed(&mut self, first: u64, hashes: Vec<BlockHash>) {
        if let (Some(_), Some(conn)) = (self.hashing.take_if(|hashing| *hashing == first), self.data) {
            self.actions.push_back(Action::SendHashes { conn, first, hashes });
        }
    }

    pub(super) fn resync_left(&mut self, now: Instant, left: Vec<u64>) {
        if self.has_hashes() {
            self.resync_left = left;
        } else {
            self.lose_primary(now, PeerFault::FeatureNotAgreed.into());
        }
    }

    /// How many pages there are and how many this newcomer still lacks, as its primary said last:
    /// of memory, then of each disk. None before it has said so, and when the image is whole.
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

#[cfg(test)]
mod tests {
    use crate::protocol::messages::Message;
    use crate::protocol::record::Record;
    use crate::protocol::secondary::test_support::{DATA, NEW, OLD, ask, commit, message, syncing, take};
    use crate::protocol::secondary::{Action, Input, Phase};

    #[test]
    fn an_image_made_just_now_is_not_summed_until_it_is_whole() {
        let mut node = syncing([false, true]);
        commit(&mut node, 1, false);
        let nothing = Action::SendHashes { conn: DATA, first: 7, hashes: Vec::new() };
        for _ in 0..2 {
            assert_eq!(ask(&mut node, 7), std::slice::from_ref(&nothing), "and nothing is being hashed");
        }
        assert_eq!(ask(&mut node, 4), [Action::HashBlocks { run: 4..7 }], "the other disk was there");
        let hashes = vec![[9; 32]; 3];
        let answer = take(&mut node, Input::BlocksHashed { first: 4, hashes: hashes.clone() });
        assert_eq!(answer, [Action::SendHashes { conn: DATA, first: 4, hashes }]);
    }

    #[test]
    fn a_whole_image_is_summed_whoever_made_it() {
        let mut node = syncing([true, true]);
        commit(&mut node, 1, true);
        let record = Record::first(OLD).next_paired(OLD, NEW);
        message(&mut node, DATA, Message::Paired { record });
        commit(&mut node, 2, false);
        assert_eq!((node.phase(), ask(&mut node, 7)), (Phase::Paired, vec![Action::HashBlocks { run: 7..10 }]));
    }

    #[test]
    fn blocks_that_no_disk_has_are_not_asked_for() {
        for (first, count) in [(3, 3), (5, 3), (4, 0), (8, 3), (10, 1), (u64::MAX, 3)] {
            let mut node = syncing([true, false]);
            let actions = message(&mut node, DATA, Message::HashBlocks { first, count });
            assert!(actions.contains(&Action::Close { conn: DATA }), "{first} {count}: {actions:?}");
        }
        let mut node = syncing([false, false]);
        ask(&mut node, 4);
        assert!(ask(&mut node, 4).contains(&Action::Close { conn: DATA }), "asked again too early");
    }
}
