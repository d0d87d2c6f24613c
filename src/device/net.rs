//! What a network device is plugged into.

use std::io;
use std::os::fd::RawFd;

/// Bytes of the virtio-net header (virtio 1.2, 5.1.6) that a backend with offloads has in front of
/// every frame.
pub const NET_HEADER_BYTES: usize = 12;

/// What became of a frame the guest sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transmit {
    /// Taken (sent, held or dropped): the guest gets its buffer back.
    Accepted,
    /// No room: the frame stays in the guest's queue, and the device tries again at the guest's
    /// next notify or at `kick_net`.
    Full,
}

/// Work on frames that one side may leave to the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// A frame from the guest may lack its checksum; its header says where it goes.
    pub checksum: bool,
    /// A frame from the guest may be a TCP segment larger than the wire's, over IPv4 or IPv6; its
    /// header says how to cut it.
    pub segmentation: bool,
    /// A frame to the guest may lack its checksum.
    pub guest_checksum: bool,
}

impl Offloads {
    /// No work is left to anybody.
    pub const NONE: Offloads = Offloads { checksum: false, segmentation: false, guest_checksum: false };
}

/// The outside of a network device.
///
/// Frames are Ethernet frames. If the backend can carry any [`Offloads`], each has a header of
/// [`NET_HEADER_BYTES`] in front, in both directions and also while none are agreed on; the header
/// of a frame from the guest names no work that was not agreed on.
pub trait NetBackend: Send + Sync {
    /// Takes a frame from the guest. Called from a vCPU thread or the device thread, never from
    /// both at once; it must not block.
    fn transmit(&self, frame: &[u8]) -> Transmit;
    /// Puts one frame for the guest into `buf` and returns its length; `None` if there is none now.
    /// Never blocks.
    ///
    /// # Errors
    /// Whatever the backend met; the device tries again a little later.
    fn receive(&self, buf: &mut [u8]) -> io::Result<Option<usize>>;
    /// Readable (as `poll` has it) when [`NetBackend::receive`] may return a frame. Stays the same
    /// and open as long as the device.
    fn readable_fd(&self) -> RawFd;

    /// What it can carry. Never changes. The devices of both nodes must offer a guest the same.
    fn offloads(&self) -> Offloads {
        Offloads::NONE
    }
    /// The driver has agreed to these and no others, or was reset. Called with every reset and
    /// restore; it must not block.
    fn agreed(&self, offloads: Offloads) {
        let _ = offloads;
    }
}
