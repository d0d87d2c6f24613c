//! What can be wrong with what a peer sends.

use super::frame::FrameKind;
use std::io;
use thiserror::Error;

/// Why a frame could not be read, written or understood. After any of these but a read's timeout
/// the connection is of no more use.
#[derive(Debug, Error)]
pub enum WireError {
    /// The peer closed the connection between two frames.
    #[error("the peer closed the connection")]
    Closed,
    /// The connection ended inside a frame.
    #[error("the connection ended in the middle of a frame: {have} of {want} bytes came")]
    ClosedMidFrame {
        /// Bytes of the frame that came.
        have: usize,
        /// Bytes the frame has, as far as is known (the header, while that is incomplete).
        want: usize,
    },
    /// What came does not begin as a frame does.
    #[error("the peer does not speak mcd: a frame began with {:02x?}; check the address and port", magic)]
    NotMcd {
        /// The four bytes in the place of the magic number.
        magic: [u8; 4],
    },
    /// The peer speaks another version of the protocol.
    #[error(
        "the peer speaks version {theirs} of the protocol, this node version {ours}: run the same mcd release on both"
    )]
    OtherVersion {
        /// The peer's version.
        theirs: u16,
        /// Ours.
        ours: u16,
    },
    /// A frame of a kind that this version does not have.
    #[error("the peer sent a frame of the unknown kind {0}")]
    UnknownKind(u16),
    /// A frame longer than its kind allows.
    #[error("a {kind} frame of {bytes} bytes is over the {bytes_max} allowed")]
    TooLarge {
        /// The kind.
        kind: FrameKind,
        /// Bytes of payload it announced or was given.
        bytes: usize,
        /// Most bytes of payload for the kind.
        bytes_max: usize,
    },
    /// The payload is not what was sent.
    #[error(
        "a {kind} frame of {bytes} bytes arrived damaged: its CRC32C is {computed:08x}, the header says {announced:08x}"
    )]
    Damaged {
        /// The kind.
        kind: FrameKind,
        /// Bytes of payload.
        bytes: usize,
        /// The check sum of what arrived.
        computed: u32,
        /// The check sum the header carries.
        announced: u32,
    },
    /// The header or the message inside breaks the format.
    #[error("the peer sent a malformed {what}")]
    Malformed {
        /// What is malformed.
        what: &'static str,
    },
    /// A chunk of pages breaks the format.
    #[error("the peer sent a bad chunk of pages: {0}")]
    Page(#[from] PageError),
    /// The system's word on the connection: reset, timed out, broken pipe …
    #[error("the connection failed: {0}")]
    Io(#[source] io::Error),
}

impl WireError {
    /// True if a read found nothing within the time set for it. The reader may be called again and
    /// goes on where it was.
    pub fn is_timeout(&self) -> bool {
        matches!(self, WireError::Io(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut))
    }

    /// True if the peer spoke what no node of this version says: asking it again would not help.
    pub fn is_foreign(&self) -> bool {
        use WireError::{Malformed, NotMcd, OtherVersion, TooLarge, UnknownKind};
        matches!(self, NotMcd { .. } | OtherVersion { .. } | UnknownKind(_) | TooLarge { .. } | Malformed { .. })
    }

    /// True if the connection is simply gone (closed, reset, broken), as against a peer that sent
    /// something wrong.
    pub fn is_disconnect(&self) -> bool {
        matches!(self, WireError::Closed | WireError::ClosedMidFrame { .. } | WireError::Io(_)) && !self.is_timeout()
    }
}

/// What can be wrong with a chunk of encoded pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum PageError {
    /// The chunk ends inside a record.
    #[error("it ends inside a record")]
    Truncated,
    /// A record of a kind that this version does not have.
    #[error("page {index} has the unknown kind {kind}")]
    UnknownKind {
        /// The page.
        index: u64,
        /// The kind's number.
        kind: u8,
    },
    /// A page the guest does not have.
    #[error("page {index} is beyond the guest's {pages} pages")]
    OutOfRange {
        /// The page.
        index: u64,
        /// Pages the guest has.
        pages: u64,
    },
    /// A length that the record's kind cannot have.
    #[error("page {index} of kind {kind} has a record of {bytes} bytes")]
    BadLength {
        /// The page.
        index: u64,
        /// The kind's number.
        kind: u8,
        /// Bytes in the record.
        bytes: usize,
    },
    /// Compressed bytes that do not expand to one whole page.
    #[error("page {index} does not expand to a page")]
    BadLz4 {
        /// The page.
        index: u64,
    },
}
