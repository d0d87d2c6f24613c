//! A first-in, first-out queue of byte frames that does not allocate per frame.
//!
//! Frames lie one after another in blocks of a fixed size, each with its length in front; a frame
//! never straddles two blocks, so that it can be lent out as one slice. Emptied blocks are kept and
//! used again: after the first burst the queue allocates nothing.

use std::collections::VecDeque;

/// Bytes in a block. Four times the largest frame, so that at most a quarter of a block is lost at
/// its end.
const BLOCK_BYTES: usize = 256 * 1024;

/// Bytes of the length in front of each frame.
const LENGTH_BYTES: usize = size_of::<u32>();

/// Longest frame a block can hold; [`FrameQueue::push_back`] takes no longer one.
pub(crate) const QUEUE_FRAME_BYTES_MAX: usize = BLOCK_BYTES - LENGTH_BYTES;

/// The queue.
#[derive(Debug, Default)]
pub(crate) struct FrameQueue {
    /// Blocks with frames, oldest first. Only the last one is written to, and none is empty.
    blocks: VecDeque<Vec<u8>>,
    /// Bytes of the first block that were consumed already.
    consumed: usize,
    /// Empty blocks, to be used again.
    spare: Vec<Vec<u8>>,
}

impl FrameQueue {
    /// Adds a frame of at most [`QUEUE_FRAME_BYTES_MAX`] bytes at the end.
    pub(crate) fn push_back(&mut self, frame: &[u8]) {
        assert!(frame.len() <= QUEUE_FRAME_BYTES_MAX, "the caller caps frames");
        let need = LENGTH_BYTES + frame.len();
        let fits = self.blocks.back().is_some_and(|block| BLOCK_BYTES - block.len() >= need);
        if !fits {
            self.blocks.push_back(self.spare.pop().unwrap_or_else(|| Vec::with_capacity(BLOCK_BYTES)));
        }
        if let Some(block) = self.blocks.back_mut() {
            block.extend_from_slice(&(frame.len() as u32).to_le_bytes());
            block.extend_from_slice(frame);
        }
    }

    /// The oldest frame.
    pub(crate) fn front(&self) -> Option<&[u8]> {
        let rest = self.blocks.front()?.get(self.consumed..)?;
        let (length, rest) = rest.split_first_chunk::<LENGTH_BYTES>()?;
        rest.get(..u32::from_le_bytes(*length) as usize)
    }

    /// Drops the oldest frame.
    pub(crate) fn pop_front(&mut self) {
        let Some(length) = self.front().map(<[u8]>::len) else { return };
        self.consumed += LENGTH_BYTES + length;
        let done = self.blocks.front().is_some_and(|block| block.len() == self.consumed);
        if done && let Some(block) = self.blocks.pop_front() {
            self.consumed = 0;
            self.keep(block);
        }
    }

    /// Drops every frame.
    pub(crate) fn clear(&mut self) {
        self.consumed = 0;
        while let Some(block) = self.blocks.pop_front() {
            self.keep(block);
        }
    }

    fn keep(&mut self, mut block: Vec<u8>) {
        block.clear();
        self.spare.push(block);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_out_whole_and_in_order_over_many_blocks() {
        let mut queue = FrameQueue::default();
        let frame = |n: usize| vec![n as u8; n * 997 % 60_000];
        for n in 0..100 {
            queue.push_back(&frame(n));
        }
        for n in 0..100 {
            assert_eq!(queue.front(), Some(frame(n).as_slice()), "frame {n}");
            queue.pop_front();
        }
        assert_eq!(queue.front(), None);
        queue.pop_front();
    }

    #[test]
    fn a_steady_flow_uses_the_same_blocks_again() {
        let mut queue = FrameQueue::default();
        for _ in 0..10_000 {
            queue.push_back(&[7; 1514]);
            queue.push_back(&[8; 60]);
            queue.pop_front();
            queue.pop_front();
        }
        assert_eq!(queue.blocks.len() + queue.spare.len(), 1);
        queue.push_back(&[0; QUEUE_FRAME_BYTES_MAX]);
        queue.push_back(&[]);
        queue.clear();
        assert_eq!(queue.front(), None);
        assert_eq!(queue.spare.len(), 2);
    }
}
