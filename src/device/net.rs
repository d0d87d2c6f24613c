//! What a network device is plugged into.

use std::io;
use std::os::fd::RawFd;

/// What became of a frame the guest sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transmit {
    /// Taken (sent, held or dropped): the guest gets its buffer back.
    Accepted,
    /// No room: the frame stays in the guest's queue, and the device tries again at the guest's next notify or at `kick_net`.
    Full,
}

/// The outside of a network device. Frames are Ethernet frames without any virtio header.
pub trait NetBackend: Send + Sync {
    /// Takes a frame from the guest. Called from a vCPU thread or the device thread, never from both at once; it must not block.
    fn transmit(&self, frame: &[u8]) -> Transmit;
    /// Puts one frame for the guest into `buf` and returns its length; `None` if there is none now. Never blocks.
    ///
    /// # Errors
    /// Whatever the backend met; the device tries again a little later.
    fn receive(&self, buf: &mut [u8]) -> io::Result<Option<usize>>;
    /// Readable (as `poll` has it) when [`NetBackend::receive`] may return a frame. Stays the same and open as long as the device.
    fn readable_fd(&self) -> RawFd;
}
