//! Taking frames out of descriptor chains and putting them in, without trusting the guest.
//!
//! A chain may loop, point outside memory, be empty, claim gigabytes, or mix readable and writable buffers wrongly. All of that
//! ends in a [`ChainError`]: the work done on a chain is bounded by the queue's size and the frame's cap before it is looked at.

use thiserror::Error;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT};
use vm_memory::{Bytes, GuestMemory};

/// How a guest broke the rules of a queue.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum ChainError {
    /// The driver's index claims more buffers than the queue has, or the ring is not in memory.
    #[error("the available ring makes no sense")]
    Ring,
    /// The chain has no end: it loops, is longer than the queue, or goes on outside the table.
    #[error("a descriptor chain has no end")]
    Endless,
    /// No buffer at all, or one of zero bytes.
    #[error("a descriptor chain has an empty buffer")]
    Empty,
    /// A buffer the device cannot use in this queue.
    #[error("a descriptor chain has a buffer of the wrong direction")]
    Direction,
    /// A buffer that is not all in memory.
    #[error("a descriptor chain points outside memory")]
    Outside,
    /// More bytes than any frame has.
    #[error("a descriptor chain is longer than any frame")]
    TooLong,
}

/// Takes the next chain off `queue`; `None` if the driver has put no more.
pub(super) fn pop<'m, M: GuestMemory>(
    queue: &mut Queue,
    mem: &'m M,
) -> Result<Option<DescriptorChain<&'m M>>, ChainError> {
    Ok(queue.iter(mem).map_err(|_| ChainError::Ring)?.next())
}

/// Appends the bytes of a chain of readable buffers to `into`, at most `bytes_max` of them.
pub(super) fn gather<M: GuestMemory>(
    mem: &M,
    chain: DescriptorChain<&M>,
    into: &mut Vec<u8>,
    bytes_max: usize,
) -> Result<(), ChainError> {
    let mut unfinished = true;
    for descriptor in chain {
        if descriptor.is_write_only() {
            return Err(ChainError::Direction);
        }
        let length = descriptor.len() as usize;
        if length == 0 {
            return Err(ChainError::Empty);
        }
        let start = into.len();
        let end = start.checked_add(length).filter(|end| *end <= bytes_max).ok_or(ChainError::TooLong)?;
        into.resize(end, 0);
        let target = into.get_mut(start..end).ok_or(ChainError::TooLong)?;
        mem.read_slice(target, descriptor.addr()).map_err(|_| ChainError::Outside)?;
        unfinished = descriptor.has_next();
    }
    finish(unfinished, into.is_empty())
}

/// What became of a frame that was to go into a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scatter {
    /// It is in, whole: this many bytes were written.
    Written(u32),
    /// The chain is too small for it; nothing that matters was written.
    TooSmall,
}

/// Writes `bytes` into a chain of writable buffers.
pub(super) fn scatter<M: GuestMemory>(
    mem: &M,
    chain: DescriptorChain<&M>,
    bytes: &[u8],
) -> Result<Scatter, ChainError> {
    let mut left = bytes;
    let (mut unfinished, mut any) = (true, false);
    for descriptor in chain {
        if !descriptor.is_write_only() {
            return Err(ChainError::Direction);
        }
        if descriptor.len() == 0 {
            return Err(ChainError::Empty);
        }
        any = true;
        let (now, rest) = left.split_at(left.len().min(descriptor.len() as usize));
        mem.write_slice(now, descriptor.addr()).map_err(|_| ChainError::Outside)?;
        left = rest;
        unfinished = descriptor.has_next();
        if left.is_empty() {
            // The rest of the chain is not touched, so it does not matter what it says.
            return Ok(Scatter::Written(u32::try_from(bytes.len()).unwrap_or(u32::MAX)));
        }
    }
    finish(unfinished, !any)?;
    Ok(Scatter::TooSmall)
}

/// The iterator ends alike after the last buffer and after a broken link; only the last buffer says which it was.
fn finish(unfinished: bool, empty: bool) -> Result<(), ChainError> {
    match (empty, unfinished) {
        (true, _) => Err(ChainError::Empty),
        (false, true) => Err(ChainError::Endless),
        (false, false) => Ok(()),
    }
}
