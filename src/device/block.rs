//! What a disk keeps its bytes in.

use std::io;

/// What became of something that was to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// Taken: a later read sees it.
    Accepted,
    /// No room, and nothing of it was taken: the device tries again at `kick` or at the guest's
    /// next notify. The guest waits.
    Full,
}

/// The inside of a disk. Offsets and lengths are in bytes, multiples of 512, and inside of
/// [`BlockBackend::bytes`].
///
/// A device calls from one thread of its own, one call at a time. **A pause of the machine waits
/// for a `write`, `discard` or `write_zeroes` that has begun**, so that it belongs completely to
/// the epoch before the pause or to the one after it: these three must not wait for a slow disk.
/// `read` and `flush` may; a pause does not wait for them, and they may run in the middle of one.
pub trait BlockBackend: Send + Sync {
    /// The disk's size in bytes: a multiple of 512 that never changes.
    fn bytes(&self) -> u64;

    /// The first byte at or behind `offset` that storage has something for, up to the end: what is
    /// before it are zeros without storage, a hole. Storage that does not know says `offset`.
    ///
    /// # Errors
    /// Whatever the storage met.
    fn next_data(&self, offset: u64) -> io::Result<u64> {
        Ok(offset)
    }

    /// The first byte behind `offset`, which storage has something for, that is in a hole, or the
    /// end. Storage that does not know says the end.
    ///
    /// # Errors
    /// Whatever the storage met.
    fn next_hole(&self, offset: u64) -> io::Result<u64> {
        let _ = offset;
        Ok(self.bytes())
    }

    /// Reads `into.len()` bytes at `offset`.
    ///
    /// # Errors
    /// Whatever the storage met; the guest is told of an I/O error.
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;

    /// Writes `from` at `offset`; it need not outlive a loss of power before the next flush.
    ///
    /// # Errors
    /// Whatever the storage met; the guest is told of an I/O error.
    fn write(&self, offset: u64, from: &[u8]) -> io::Result<Stored>;

    /// Returns when everything written before outlives a loss of power.
    ///
    /// # Errors
    /// Whatever the storage met; the guest is told of an I/O error.
    fn flush(&self) -> io::Result<()>;

    /// The guest has no use for `bytes` bytes at `offset` any more: they read as zeros from now on.
    /// (On every node alike: two images of one disk must stay equal.)
    ///
    /// # Errors
    /// Whatever the storage met; the guest is told of an I/O error.
    fn discard(&self, offset: u64, bytes: u64) -> io::Result<Stored>;

    /// Makes `bytes` bytes at `offset` zeros. With `may_unmap` the storage may give the space back.
    ///
    /// # Errors
    /// Whatever the storage met; the guest is told of an I/O error.
    fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> io::Result<Stored>;
}
