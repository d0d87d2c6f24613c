//! Taking bytes out of descriptor chains and putting them in, without trusting the guest.
//!
//! Frames go in and out in one piece ([`gather`], [`scatter`]). Larger requests are described first
//! ([`buffers`]: one look at the descriptors, which a guest may change at any time) and then moved
//! piece by piece ([`Stream`]).
//!
//! A chain may loop, point outside memory, be empty, claim gigabytes, or mix readable and writable
//! buffers wrongly. All of that ends in a [`ChainError`]. Every chain is walked by [`Walk`], which
//! looks at no more descriptors than the queue has, and follows an indirect table (at most
//! [`INDIRECT_DESCRIPTORS_MAX`] descriptors of it) only where the driver has agreed to those: a
//! table may name 65,535 descriptors, and a device's lock is held during a walk.

use thiserror::Error;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

/// Bytes of a descriptor.
const DESCRIPTOR_BYTES: u32 = 16;
/// Most descriptors of an indirect table that are looked at.
const INDIRECT_DESCRIPTORS_MAX: u16 = 256;

/// How a guest broke the rules of a queue.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub(super) enum ChainError {
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
    /// An indirect table where there must be none, or one that is no table.
    #[error("a descriptor chain has a wrong indirect table")]
    Indirect,
    /// Too few bytes for a request.
    #[error("a descriptor chain is too short for a request")]
    TooShort,
}

/// Takes the next chain off `queue`: its first descriptor. `None` if the driver has put no more.
pub(super) fn pop<M: GuestMemory>(queue: &mut Queue, mem: &M) -> Result<Option<u16>, ChainError> {
    Ok(queue.iter(mem).map_err(|_| ChainError::Ring)?.next().map(|chain| chain.head_index()))
}

/// Appends the bytes of the chain of readable buffers at `head` to `into`, at most `bytes_max` of
/// them.
pub(super) fn gather<M: GuestMemory>(
    mem: &M,
    queue: &Queue,
    head: u16,
    into: &mut Vec<u8>,
    bytes_max: usize,
) -> Result<(), ChainError> {
    let mut walk = Walk::new(mem, queue, head, false);
    while let Some(descriptor) = walk.next()? {
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
    }
    Ok(())
}

/// What became of a frame that was to go into a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scatter {
    /// It is in, whole: this many bytes were written.
    Written(u32),
    /// The chain is too small for it; nothing that matters was written.
    TooSmall,
}

/// Writes `bytes` into the chain of writable buffers at `head`.
pub(super) fn scatter<M: GuestMemory>(mem: &M, queue: &Queue, head: u16, bytes: &[u8]) -> Result<Scatter, ChainError> {
    let mut left = bytes;
    let mut walk = Walk::new(mem, queue, head, false);
    while let Some(descriptor) = walk.next()? {
        if !descriptor.is_write_only() {
            return Err(ChainError::Direction);
        }
        if descriptor.len() == 0 {
            return Err(ChainError::Empty);
        }
        let (now, rest) = left.split_at(left.len().min(descriptor.len() as usize));
        mem.write_slice(now, descriptor.addr()).map_err(|_| ChainError::Outside)?;
        left = rest;
        if left.is_empty() {
            // The rest of the chain is not touched, so it does not matter what it says.
            return Ok(Scatter::Written(u32::try_from(bytes.len()).unwrap_or(u32::MAX)));
        }
    }
    Ok(Scatter::TooSmall)
}

/// One buffer, all in guest memory.
#[derive(Clone, Copy, Debug)]
struct Buffer {
    address: u64,
    bytes: u32,
}

/// The buffers of one chain as a row of bytes, moved from front to back.
#[derive(Debug, Default)]
pub(super) struct Stream {
    buffers: Vec<Buffer>,
    /// Where the first byte is that was not moved: a buffer and an offset in it.
    at: usize,
    offset: u32,
}

impl Stream {
    /// How many bytes were not moved.
    pub(super) fn bytes_left(&self) -> u64 {
        let left: u64 = self.buffers.iter().skip(self.at).map(|buffer| u64::from(buffer.bytes)).sum();
        left - u64::from(self.offset)
    }

    /// Fills `into` from guest memory.
    pub(super) fn read<M: GuestMemory>(&mut self, mem: &M, into: &mut [u8]) -> Result<(), ChainError> {
        let mut left = into;
        while !left.is_empty() {
            let (address, bytes) = self.step(left.len())?;
            let (now, rest) = left.split_at_mut(bytes);
            mem.read_slice(now, address).map_err(|_| ChainError::Outside)?;
            left = rest;
        }
        Ok(())
    }

    /// Writes `from` to guest memory.
    pub(super) fn write<M: GuestMemory>(&mut self, mem: &M, from: &[u8]) -> Result<(), ChainError> {
        let mut left = from;
        while !left.is_empty() {
            let (address, bytes) = self.step(left.len())?;
            let (now, rest) = left.split_at(bytes);
            mem.write_slice(now, address).map_err(|_| ChainError::Outside)?;
            left = rest;
        }
        Ok(())
    }

    /// Takes the last byte off: its address.
    pub(super) fn take_last(&mut self) -> Result<GuestAddress, ChainError> {
        let last = self.buffers.last_mut().ok_or(ChainError::TooShort)?;
        // No buffer is empty and every one lies in memory, so neither of these can wrap.
        last.bytes -= 1;
        let address = GuestAddress(last.address + u64::from(last.bytes));
        if last.bytes == 0 {
            self.buffers.pop();
        }
        Ok(address)
    }

    /// The next bytes that lie together, at most `most`, which is not 0.
    fn step(&mut self, most: usize) -> Result<(GuestAddress, usize), ChainError> {
        let buffer = self.buffers.get(self.at).ok_or(ChainError::TooShort)?;
        let most = u32::try_from(most).unwrap_or(u32::MAX);
        let bytes = most.min(buffer.bytes - self.offset);
        let address = GuestAddress(buffer.address + u64::from(self.offset));
        self.offset += bytes;
        if self.offset == buffer.bytes {
            self.at += 1;
            self.offset = 0;
        }
        Ok((address, bytes as usize))
    }
}

/// What the driver gives to a request, and the room it gives for the answer.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    /// For the device to read.
    pub(super) readable: Stream,
    /// For the device to write; behind the readable ones.
    pub(super) writable: Stream,
}

/// Looks at the chain that begins at `head`, which may be an indirect table if the driver has
/// agreed to those. What comes back lies in memory, has no empty buffer, and has its readable
/// buffers first.
pub(super) fn buffers<M: GuestMemory>(
    mem: &M,
    queue: &Queue,
    head: u16,
    indirect_agreed: bool,
) -> Result<Buffers, ChainError> {
    let mut found = Buffers::default();
    let mut walk = Walk::new(mem, queue, head, indirect_agreed);
    while let Some(descriptor) = walk.next()? {
        add_buffer(mem, &descriptor, &mut found)?;
    }
    Ok(found)
}

/// The descriptors of one chain, from its head on.
struct Walk<'m, M> {
    mem: &'m M,
    table: Table,
    /// The next one, if the last was not the chain's end.
    next: Option<u16>,
    /// How many more the chain may have.
    left: u16,
}

impl<M: GuestMemory> Walk<'_, M> {
    fn new<'m>(mem: &'m M, queue: &Queue, head: u16, indirect_allowed: bool) -> Walk<'m, M> {
        let table = Table { address: queue.desc_table(), descriptors: queue.size(), indirect_allowed };
        Walk { mem, left: table.descriptors, table, next: Some(head) }
    }

    /// The next descriptor that is a buffer; `None` behind the last.
    fn next(&mut self) -> Result<Option<Descriptor>, ChainError> {
        while let Some(index) = self.next {
            self.left = self.left.checked_sub(1).ok_or(ChainError::Endless)?;
            let descriptor = self.table.get(self.mem, index)?;
            if descriptor.refers_to_indirect_table() {
                self.table = self.table.enter(self.mem, &descriptor)?;
                (self.next, self.left) = (Some(0), self.table.descriptors.min(INDIRECT_DESCRIPTORS_MAX));
                continue;
            }
            self.next = descriptor.has_next().then(|| descriptor.next());
            return Ok(Some(descriptor));
        }
        Ok(None)
    }
}

/// A table of descriptors.
struct Table {
    address: u64,
    descriptors: u16,
    /// A descriptor of it may name another table.
    indirect_allowed: bool,
}

impl Table {
    fn get<M: GuestMemory>(&self, mem: &M, index: u16) -> Result<Descriptor, ChainError> {
        if index >= self.descriptors {
            return Err(ChainError::Endless);
        }
        let offset = u64::from(index) * u64::from(DESCRIPTOR_BYTES);
        let address = self.address.checked_add(offset).ok_or(ChainError::Outside)?;
        mem.read_obj(GuestAddress(address)).map_err(|_| ChainError::Outside)
    }

    /// The table that `descriptor` names.
    fn enter<M: GuestMemory>(&self, mem: &M, descriptor: &Descriptor) -> Result<Table, ChainError> {
        let bytes = descriptor.len();
        if !self.indirect_allowed || descriptor.has_next() || bytes == 0 || !bytes.is_multiple_of(DESCRIPTOR_BYTES) {
            return Err(ChainError::Indirect);
        }
        if !mem.check_range(descriptor.addr(), bytes as usize, Permissions::Read) {
            return Err(ChainError::Outside);
        }
        let descriptors = u16::try_from(bytes / DESCRIPTOR_BYTES).unwrap_or(u16::MAX);
        Ok(Table { address: descriptor.addr().0, descriptors, indirect_allowed: false })
    }
}

fn add_buffer<M: GuestMemory>(mem: &M, descriptor: &Descriptor, found: &mut Buffers) -> Result<(), ChainError> {
    let bytes = descriptor.len();
    if bytes == 0 {
        return Err(ChainError::Empty);
    }
    let (stream, access) = match descriptor.is_write_only() {
        true => (&mut found.writable, Permissions::Write),
        false if !found.writable.buffers.is_empty() => return Err(ChainError::Direction),
        false => (&mut found.readable, Permissions::Read),
    };
    if !mem.check_range(descriptor.addr(), bytes as usize, access) {
        return Err(ChainError::Outside);
    }
    stream.buffers.push(Buffer { address: descriptor.addr().0, bytes });
    Ok(())
}
