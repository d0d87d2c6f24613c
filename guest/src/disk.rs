//! What `DISK` writes: blocks whose every word follows from a number, so that a torn or stale one
//! shows; and a writer that works in the background.

/// Bytes of a block.
pub const BLOCK_BYTES: usize = 4096;
/// Most writes per second that can be asked for.
pub const PER_SECOND_MAX: u64 = 1_000_000;
/// The first word of a block of ours.
const MAGIC: u64 = 0x6b63_6f6c_625f_6463;
/// An odd number whose product spreads a word's bits.
const SPREAD: u64 = 0x9E37_79B9_7F4A_7C15;
/// Added to the number of each background write, so that its seeds are no client's.
const RUN_SEEDS: u64 = 1 << 62;
/// Most writes in one step.
const BATCH_MAX: u64 = 16;
/// Writes that were missed for longer than this are not made up for.
const CATCH_UP_US: u64 = 100_000;

/// The content of a block.
pub type Block = [u8; BLOCK_BYTES];

/// Why a disk did not do what it was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskError {
    /// There is no disk, or none that can be written.
    None,
    /// The block is beyond its end.
    Beyond,
    /// It said so.
    Failed,
}

/// What a block holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nothing but zeros.
    Zeros,
    /// What was written to this block with this seed, every bit of it.
    Seed(u64),
    /// Something else.
    Strange,
}

fn word(block: u64, seed: u64, index: usize) -> u64 {
    match index {
        0 => MAGIC,
        1 => block,
        2 => seed,
        _ => (seed ^ block.rotate_left(32) ^ index as u64).wrapping_mul(SPREAD).rotate_left(29).wrapping_mul(SPREAD),
    }
}

/// Fills `into` with what belongs into block number `block` under `seed`.
pub fn fill(block: u64, seed: u64, into: &mut Block) {
    for (index, bytes) in into.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        *bytes = word(block, seed, index).to_le_bytes();
    }
}

/// What block number `block` holds, whose bytes are `from`.
pub fn content_of(block: u64, from: &Block) -> Content {
    let words = from.as_chunks::<8>().0;
    if words.iter().all(|bytes| *bytes == [0; 8]) {
        return Content::Zeros;
    }
    let seed = words.get(2).map_or(0, |bytes| u64::from_le_bytes(*bytes));
    let fits = words.iter().enumerate().all(|(index, bytes)| u64::from_le_bytes(*bytes) == word(block, seed, index));
    if fits { Content::Seed(seed) } else { Content::Strange }
}

/// The background writer: writes the first blocks of the disk in turn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Run {
    /// Blocks it writes, from the first on; 0 for none.
    pub blocks: u64,
    /// Writes per second.
    pub per_second: u64,
    /// Writes done, over all plans.
    pub written: u64,
    /// Writes that failed, over all plans.
    pub failed: u64,
    /// Writes of this plan, and since when.
    done: u64,
    since_us: u64,
}

impl Run {
    /// A new plan begins.
    pub fn ask(&mut self, blocks: u64, per_second: u64, now_us: u64) {
        let is_off = blocks == 0 || per_second == 0;
        let (blocks, per_second) = if is_off { (0, 0) } else { (blocks, per_second) };
        *self = Run { blocks, per_second, done: 0, since_us: now_us, ..*self };
    }

    /// Does by `write` what is due; microseconds until more is, if ever.
    pub fn step(&mut self, now_us: u64, mut write: impl FnMut(u64, u64) -> Result<(), DiskError>) -> Option<u64> {
        if self.blocks == 0 {
            return None;
        }
        let passed_us = now_us.saturating_sub(self.since_us);
        let due = (passed_us.saturating_mul(self.per_second) / 1_000_000).saturating_sub(self.done);
        for _ in 0..due.min(BATCH_MAX) {
            let block = (self.written + self.failed) % self.blocks;
            match write(block, RUN_SEEDS | self.written) {
                Ok(()) => self.written += 1,
                Err(_) => self.failed += 1,
            }
            self.done += 1;
        }
        if due > BATCH_MAX {
            if due.saturating_mul(1_000_000) / self.per_second > CATCH_UP_US {
                (self.since_us, self.done) = (now_us, 0);
            }
            return Some(0);
        }
        let next_us = (self.done + 1).saturating_mul(1_000_000).div_ceil(self.per_second);
        Some(next_us.saturating_sub(passed_us).max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_tells_whether_it_is_whole() {
        let mut block = [0; BLOCK_BYTES];
        assert_eq!(content_of(5, &block), Content::Zeros);
        fill(5, 77, &mut block);
        assert_eq!(content_of(5, &block), Content::Seed(77));
        assert_eq!(content_of(6, &block), Content::Strange, "it belongs elsewhere");
        let mut other = [0; BLOCK_BYTES];
        fill(5, 78, &mut other);
        block[2048..].copy_from_slice(&other[2048..]);
        assert_eq!(content_of(5, &block), Content::Strange, "torn");
        block = [0; BLOCK_BYTES];
        block[4095] = 1;
        assert_eq!(content_of(5, &block), Content::Strange);
    }

    #[test]
    fn the_background_writer_keeps_its_pace_and_turns() {
        let mut run = Run::default();
        let mut blocks = Vec::new();
        assert_eq!(run.step(0, |_, _| panic!("nobody asked")), None);
        run.ask(3, 1000, 0);
        assert_eq!(run.step(0, |_, _| panic!("nothing is due")), Some(1000));
        let mut write = |block, _| {
            blocks.push(block);
            Ok(())
        };
        assert_eq!(run.step(5_000, &mut write), Some(1000));
        assert_eq!(run.step(5_500, &mut write), Some(500));
        assert_eq!(run.step(40_000, &mut write), Some(0), "more than one step does");
        assert_eq!(run.written, 5 + BATCH_MAX);
        assert_eq!(blocks[..7], [0, 1, 2, 0, 1, 2, 0]);
        // After a long pause it does not make up for all of it.
        run.step(10_000_000, |_, _| Err(DiskError::Failed));
        assert_eq!((run.failed, run.step(10_000_000, |_, _| panic!("nothing is due"))), (BATCH_MAX, Some(1000)));
        run.ask(0, 5, 0);
        assert_eq!(run.step(99_000_000, |_, _| panic!("it is off")), None);
    }
}
