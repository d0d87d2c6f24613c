//! Comparing a run of blocks by their hashes: each node hashes its own, and one of them lays the
//! two side by side.
//!
//! Two blocks with the same hash are taken for equal, by [verify](super::verify) and by a
//! [resync](super::resync). So the hash must be resistant to collisions, also to those that
//! somebody makes on purpose: 256 bits, not a CRC.

use std::ops::Range;

/// Bytes in the hash of a block.
pub const HASH_BYTES: usize = 32;
/// The hash of a block's content.
pub type BlockHash = [u8; HASH_BYTES];
/// Most blocks that are hashed at once: 1 MiB of a disk. A takeover waits at most for so many to be
/// read.
pub const HASH_BLOCKS_MAX: u64 = 256;

/// The comparison of one run of blocks, which both nodes hash.
#[derive(Clone, Debug, Hash)]
pub struct Comparison {
    ticket: u64,
    run: Range<u64>,
    own: Option<Result<Vec<BlockHash>, String>>,
    theirs: Option<Vec<BlockHash>>,
}

impl Comparison {
    /// Of the blocks with the indexes `run`; `ticket` tells this one's own hashes from those of one
    /// before it.
    pub fn new(ticket: u64, run: Range<u64>) -> Comparison {
        Comparison { ticket, run, own: None, theirs: None }
    }

    /// The blocks.
    pub fn run(&self) -> Range<u64> {
        self.run.clone()
    }

    /// True if hashes with this ticket are for this comparison.
    pub fn is(&self, ticket: u64) -> bool {
        self.ticket == ticket
    }

    fn fits(&self, hashes: &[BlockHash]) -> bool {
        hashes.len() as u64 == self.run.end - self.run.start
    }

    /// Takes this node's hashes, or in words why there are none. A failure is
    /// reported once the peer's hashes are there too: they are in flight.
    pub fn take_own(&mut self, hashes: Result<Vec<BlockHash>, String>) {
        self.own = Some(match hashes {
            Ok(hashes) if !self.fits(&hashes) => Err("blocks are missing".into()),
            other => other,
        });
    }

    /// Takes the peer's hashes, of the blocks from `first` on; false if they are not those asked
    /// for.
    pub fn take_theirs(&mut self, first: u64, hashes: Vec<BlockHash>) -> bool {
        let fits = first == self.run.start && self.fits(&hashes) && self.theirs.is_none();
        if fits {
            self.theirs = Some(hashes);
        }
        fits
    }

    /// The indexes of the blocks that differ, rising, once both nodes have answered.
    pub fn differing(&self) -> Option<Result<Vec<u64>, String>> {
        let (own, theirs) = (self.own.as_ref()?, self.theirs.as_ref()?);
        Some(own.as_ref().map_err(Clone::clone).map(|own| {
            let both = self.run.clone().zip(own.iter().zip(theirs));
            both.filter(|(_, (own, theirs))| own != theirs).map(|(index, _)| index).collect()
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_hashes_asked_for_are_compared() {
        let hashes = |values: &[u8]| values.iter().map(|value| [*value; HASH_BYTES]).collect::<Vec<_>>();
        let mut both = Comparison::new(7, 100..103);
        assert!(both.is(7) && !both.is(6));
        both.take_own(Ok(hashes(&[1, 2, 3])));
        assert_eq!(both.differing(), None);
        for (first, theirs) in [(99, &[1, 2, 3][..]), (100, &[1, 2]), (100, &[1, 2, 3, 4]), (100, &[])] {
            assert!(!both.take_theirs(first, hashes(theirs)), "{first} {theirs:?}");
        }
        assert!(both.take_theirs(100, hashes(&[1, 9, 8])));
        assert!(!both.take_theirs(100, hashes(&[1, 2, 3])), "once");
        assert_eq!(both.differing(), Some(Ok(vec![101, 102])));
        both.take_own(Ok(hashes(&[1, 2])));
        assert!(matches!(both.differing(), Some(Err(_))), "own hashes that do not fit");
        both.take_own(Err("the disk is broken".into()));
        assert_eq!(both.differing(), Some(Err("the disk is broken".into())));
    }
}
