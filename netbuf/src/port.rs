//! Where packets enter and leave a host.

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

/// Bytes of the virtio-net header (virtio 1.2, 5.1.6) in front of each frame of a port that has
/// them.
pub const VNET_HEADER_BYTES: usize = 12;

/// One non-blocking port for Ethernet frames. A frame has no header in front of it, or in some
/// ports a virtio-net header, always.
///
/// Frames may be sent and received by several threads at once.
pub trait PacketPort: Send + Sync {
    /// Sends one frame whole, or not at all.
    ///
    /// # Errors
    /// `WouldBlock` if there is no room now; any other error says that this frame cannot be sent
    /// (for a tap: it is down).
    fn send(&self, frame: &[u8]) -> io::Result<()>;

    /// Receives one frame into `buf` and returns its length. A frame longer than `buf` is cut: give
    /// room for [`FRAME_BYTES_MAX`](crate::FRAME_BYTES_MAX).
    ///
    /// # Errors
    /// `WouldBlock` if no frame is waiting; any other error says that the port is broken.
    fn recv(&self, buf: &mut [u8]) -> io::Result<usize>;

    /// A descriptor that polls readable when a frame waits. It belongs to the port: never close it
    /// or read from it.
    fn as_raw_fd(&self) -> RawFd;

    /// True if a virtio-net header of [`VNET_HEADER_BYTES`] is in front of every frame, sent or
    /// received. What is sent may then lack its checksum, or be a large TCP segment that is yet to
    /// be cut, as its header says.
    fn has_headers(&self) -> bool {
        false
    }

    /// From now on frames received may lack their checksum, as their header says, or may not. Means
    /// nothing to a port without headers. Frames that wait already stay as they are.
    ///
    /// # Errors
    /// What the system says; frames then stay as they were.
    fn receive_unchecked(&self, allowed: bool) -> io::Result<()> {
        let _ = allowed;
        Ok(())
    }
}

/// One end of a pair of ports inside a process, for tests: what one end sends, the other receives.
#[derive(Debug)]
pub struct MemoryPort {
    fd: OwnedFd,
}

impl MemoryPort {
    /// Makes a pair. Each direction holds what a socket's send buffer holds (about 200 KiB); then a
    /// send would block.
    ///
    /// # Errors
    /// Those of `socketpair(2)`.
    pub fn pair() -> io::Result<(MemoryPort, MemoryPort)> {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let (a, b) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        Ok((MemoryPort { fd: a }, MemoryPort { fd: b }))
    }
}

impl PacketPort for MemoryPort {
    fn send(&self, frame: &[u8]) -> io::Result<()> {
        // A peer that is gone must give an error, not a signal.
        let sent = send(self.fd.as_raw_fd(), frame, MsgFlags::MSG_NOSIGNAL)?;
        if sent == frame.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    fn recv(&self, buf: &mut [u8]) -> io::Result<usize> {
        match recv(self.fd.as_raw_fd(), buf, MsgFlags::empty())? {
            // Frames are never empty: this is the end of the stream.
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            length => Ok(length),
        }
    }

    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_cross_whole_and_in_order() {
        let (a, b) = MemoryPort::pair().unwrap();
        let mut buf = [0; 2000];
        assert_eq!(b.recv(&mut buf).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        a.send(&[1; 1514]).unwrap();
        a.send(&[2; 60]).unwrap();
        assert_eq!(b.recv(&mut buf).unwrap(), 1514);
        assert_eq!(b.recv(&mut buf).unwrap(), 60);
        assert_eq!(&buf[..60], &[2; 60]);
        b.send(&[3]).unwrap();
        assert_eq!(a.recv(&mut buf).unwrap(), 1);
    }

    #[test]
    fn a_full_port_would_block_and_a_lost_peer_is_an_error() {
        let (a, b) = MemoryPort::pair().unwrap();
        let error = loop {
            if let Err(error) = a.send(&[0; 1514]) {
                break error;
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        drop(a);
        let mut buf = [0; 2000];
        while b.recv(&mut buf).is_ok() {}
        assert_eq!(b.recv(&mut buf).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(b.send(&[0; 60]).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
