//! Frames: a header of 20 bytes, and a payload.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 4 | magic, `MCD1` |
//! | 4 | 2 | version of the protocol |
//! | 6 | 2 | kind ([`FrameKind`]) |
//! | 8 | 4 | bytes of payload |
//! | 12 | 4 | CRC32C of the payload |
//! | 16 | 4 | reserved, zero |
//!
//! Magic and version stay where they are in every version to come, so that two versions can always
//! tell each other apart.

use super::block_hashes;
use super::codec;
use super::error::WireError;
use crate::protocol::messages::{Message, PROTOCOL_VERSION};
use std::fmt;
use std::io::{self, IoSlice, Read, Write};

/// The first four bytes of every frame.
pub const MAGIC: [u8; 4] = *b"MCD1";

/// Bytes in a frame's header.
pub const HEADER_BYTES: usize = 20;

/// What a reader takes from the connection at once while it does not know how long the next frame
/// is, in bytes.
const READ_AHEAD_BYTES: usize = 64 * 1024;

/// What a frame's payload is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum FrameKind {
    /// One encoded [`Message`].
    Message = 1,
    /// A chunk of encoded pages, part of an epoch.
    Pages = 2,
    /// A chunk of encoded pages behind the epochs: clean pages of a resync.
    Background = 3,
    /// Machine state, part of an epoch. A state longer than the cap goes in several frames.
    State = 4,
    /// Nothing: bytes that make the kernel notice that those before them were lost (see
    /// [`LinkWatch`](super::LinkWatch)). Readers pass over it.
    Probe = 5,
    /// Hashes of blocks of a disk (see [`block_hashes`]): a secondary's answer.
    Hashes = 6,
}

impl FrameKind {
    /// Every kind.
    pub const ALL: [FrameKind; 6] = [
        FrameKind::Message,
        FrameKind::Pages,
        FrameKind::Background,
        FrameKind::State,
        FrameKind::Probe,
        FrameKind::Hashes,
    ];

    /// Most bytes of payload in a frame of this kind.
    pub const fn bytes_max(self) -> usize {
        match self {
            FrameKind::Message => 1024,
            FrameKind::Pages | FrameKind::Background => 1024 * 1024,
            FrameKind::State => 4 * 1024 * 1024,
            // So that no other frame becomes one by a byte that is damaged: none of them is empty.
            FrameKind::Probe => 0,
            FrameKind::Hashes => block_hashes::BYTES_MAX,
        }
    }

    fn from_number(number: u16) -> Option<FrameKind> {
        FrameKind::ALL.into_iter().find(|kind| *kind as u16 == number)
    }
}

impl fmt::Display for FrameKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            FrameKind::Message => "message",
            FrameKind::Pages => "pages",
            FrameKind::Background => "background",
            FrameKind::State => "state",
            FrameKind::Probe => "probe",
            FrameKind::Hashes => "hashes",
        })
    }
}

/// A header that was checked, all but the check sum.
#[derive(Clone, Copy)]
struct Header {
    kind: FrameKind,
    length: usize,
    crc: u32,
}

impl Header {
    fn for_payload(kind: FrameKind, payload: &[u8]) -> Result<Header, WireError> {
        check_length(kind, payload.len())?;
        Ok(Header { kind, length: payload.len(), crc: crc32c::crc32c(payload) })
    }

    fn encode(self) -> [u8; HEADER_BYTES] {
        let [m0, m1, m2, m3] = MAGIC;
        let [v0, v1] = PROTOCOL_VERSION.to_le_bytes();
        let [k0, k1] = (self.kind as u16).to_le_bytes();
        // The length is capped far below 4 GiB.
        let [l0, l1, l2, l3] = (self.length as u32).to_le_bytes();
        let [c0, c1, c2, c3] = self.crc.to_le_bytes();
        [m0, m1, m2, m3, v0, v1, k0, k1, l0, l1, l2, l3, c0, c1, c2, c3, 0, 0, 0, 0]
    }

    fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Header, WireError> {
        let [m0, m1, m2, m3, v0, v1, k0, k1, l0, l1, l2, l3, c0, c1, c2, c3, reserved @ ..] = *bytes;
        let magic = [m0, m1, m2, m3];
        if magic != MAGIC {
            return Err(WireError::NotMcd { magic });
        }
        let theirs = u16::from_le_bytes([v0, v1]);
        if theirs != PROTOCOL_VERSION {
            return Err(WireError::OtherVersion { theirs, ours: PROTOCOL_VERSION });
        }
        let number = u16::from_le_bytes([k0, k1]);
        let kind = FrameKind::from_number(number).ok_or(WireError::UnknownKind(number))?;
        let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        check_length(kind, length)?;
        if reserved != [0; 4] {
            return Err(WireError::Malformed { what: "frame header: its reserved bytes are not zero" });
        }
        Ok(Header { kind, length, crc: u32::from_le_bytes([c0, c1, c2, c3]) })
    }
}

fn check_length(kind: FrameKind, bytes: usize) -> Result<(), WireError> {
    let bytes_max = kind.bytes_max();
    if bytes <= bytes_max { Ok(()) } else { Err(WireError::TooLarge { kind, bytes, bytes_max }) }
}

/// A frame that arrived whole and undamaged, lent by [`FrameReader::read`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// What the payload is.
    pub kind: FrameKind,
    /// The payload.
    pub payload: &'a [u8],
}

impl Frame<'_> {
    /// The message in a frame of kind `Message`.
    ///
    /// # Errors
    /// [`WireError::Malformed`] if the frame is of another kind or the message breaks the format.
    pub fn message(&self) -> Result<Message, WireError> {
        match self.kind {
            FrameKind::Message => codec::decode_message(self.payload),
            _ => Err(WireError::Malformed { what: "conversation: a message was due, and other bytes came" }),
        }
    }
}

/// Reads frames from a byte stream.
///
/// One buffer serves all frames and grows to the largest that came, at most the largest cap. A read
/// that times out loses nothing: the next call goes on where it stopped.
#[derive(Debug)]
pub struct FrameReader<R> {
    source: R,
    /// The bytes `start..end` came and were not yet given out; the vector's length is what may be
    /// read into.
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// Bytes at `start` of the frame that was lent last; they go with the next call.
    lent: usize,
}

impl<R: Read> FrameReader<R> {
    /// A reader at the start of a stream.
    pub fn new(source: R) -> FrameReader<R> {
        FrameReader { source, buffer: vec![0; READ_AHEAD_BYTES], start: 0, end: 0, lent: 0 }
    }

    /// The stream.
    pub fn source(&self) -> &R {
        &self.source
    }

    /// The same, to change how it is read.
    pub fn source_mut(&mut self) -> &mut R {
        &mut self.source
    }

    /// The next frame. Blocks as the stream does.
    ///
    /// # Errors
    /// Any [`WireError`]. Only after a timeout may the reader be used again.
    pub fn read(&mut self) -> Result<Frame<'_>, WireError> {
        self.start += std::mem::take(&mut self.lent);
        let header = loop {
            match self.pending().first_chunk::<HEADER_BYTES>() {
                Some(bytes) => break Header::decode(bytes)?,
                None => self.fill(HEADER_BYTES)?,
            }
        };
        let whole = HEADER_BYTES + header.length;
        while self.end - self.start < whole {
            self.fill(whole)?;
        }
        self.lent = whole;
        let payload = self.pending().get(HEADER_BYTES..whole).unwrap_or_default();
        let computed = crc32c::crc32c(payload);
        if computed != header.crc {
            let (kind, bytes, announced) = (header.kind, header.length, header.crc);
            return Err(WireError::Damaged { kind, bytes, computed, announced });
        }
        Ok(Frame { kind: header.kind, payload })
    }

    fn pending(&self) -> &[u8] {
        self.buffer.get(self.start..self.end).unwrap_or_default()
    }

    /// Reads once, towards `want` pending bytes.
    ///
    /// A long frame is read to its end and no further, so that the frame after it starts at the
    /// front of the buffer and is never moved. Short ones come many at a time.
    fn fill(&mut self, want: usize) -> Result<(), WireError> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.start + want > self.buffer.len() {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        if want > self.buffer.len() {
            self.buffer.resize(want, 0);
        }
        let limit = (self.start + want.max(READ_AHEAD_BYTES)).min(self.buffer.len());
        let room = self.buffer.get_mut(self.end..limit).unwrap_or_default();
        match self.source.read(room) {
            Ok(0) if self.start == self.end => Err(WireError::Closed),
            Ok(0) => Err(WireError::ClosedMidFrame { have: self.end - self.start, want }),
            Ok(count) => {
                self.end += count;
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(error) => Err(WireError::Io(error)),
        }
    }
}

/// Frames put together in one buffer, to be written at once: the page, state and message frames of
/// an epoch.
///
/// ```
/// use mcd::wire::{FrameBatch, FrameKind};
///
/// let mut batch = FrameBatch::new();
/// batch.push(FrameKind::State, b"state")?;
/// batch.build(FrameKind::Pages, |payload| payload.extend_from_slice(b"encoded in place"))?;
/// assert_eq!(batch.as_bytes().len(), 20 + 5 + 20 + 16);
/// # Ok::<(), mcd::wire::WireError>(())
/// ```
#[derive(Debug, Default)]
pub struct FrameBatch {
    bytes: Vec<u8>,
}

impl FrameBatch {
    /// An empty batch.
    pub fn new() -> FrameBatch {
        FrameBatch::default()
    }

    /// Forgets the frames and keeps the memory.
    pub fn clear(&mut self) {
        self.bytes.clear();
    }

    /// The frames' bytes, headers and all.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Adds a frame with this payload.
    ///
    /// # Errors
    /// [`WireError::TooLarge`]; the batch is then as before.
    pub fn push(&mut self, kind: FrameKind, payload: &[u8]) -> Result<(), WireError> {
        let header = Header::for_payload(kind, payload)?;
        self.bytes.extend_from_slice(&header.encode());
        self.bytes.extend_from_slice(payload);
        Ok(())
    }

    /// Adds a message.
    ///
    /// # Errors
    /// As [`FrameBatch::push`]; no message is as long as that.
    pub fn push_message(&mut self, message: &Message) -> Result<(), WireError> {
        self.build(FrameKind::Message, |payload| codec::encode_message(message, payload))
    }

    /// Adds a frame whose payload `append` writes in place, at the end of the vector it is given.
    /// It must leave alone what is there before. Gives back what `append` returns.
    ///
    /// # Errors
    /// As [`FrameBatch::push`].
    pub fn build<T>(&mut self, kind: FrameKind, append: impl FnOnce(&mut Vec<u8>) -> T) -> Result<T, WireError> {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; HEADER_BYTES]);
        let value = append(&mut self.bytes);
        let header = match self.bytes.get(start + HEADER_BYTES..) {
            Some(payload) => Header::for_payload(kind, payload),
            None => Err(WireError::Malformed { what: "batch: what was there before is gone" }),
        };
        match header {
            Ok(header) => {
                if let Some(space) = self.bytes.get_mut(start..start + HEADER_BYTES) {
                    space.copy_from_slice(&header.encode());
                }
                Ok(value)
            }
            Err(error) => {
                self.bytes.truncate(start);
                Err(error)
            }
        }
    }
}

/// Writes frames to a byte stream that blocks.
///
/// A write that failed may have left half a frame on the stream; from then on every write fails.
#[derive(Debug)]
pub struct FrameWriter<W> {
    sink: W,
    scratch: FrameBatch,
    broken: bool,
    bytes_written: u64,
}

impl<W: Write> FrameWriter<W> {
    /// A writer at the start of a stream.
    pub fn new(sink: W) -> FrameWriter<W> {
        FrameWriter { sink, scratch: FrameBatch::new(), broken: false, bytes_written: 0 }
    }

    /// The stream.
    pub fn sink(&self) -> &W {
        &self.sink
    }

    /// Bytes written so far, headers and all.
    pub fn bytes_written(&self) -> u64 {
        self.bytes_written
    }

    /// Writes one frame, header and payload in one system call if the stream takes them.
    ///
    /// # Errors
    /// [`WireError::TooLarge`], with nothing written; [`WireError::Io`] for the stream's.
    pub fn write(&mut self, kind: FrameKind, payload: &[u8]) -> Result<(), WireError> {
        let header = Header::for_payload(kind, payload)?.encode();
        self.write_slices(&mut [IoSlice::new(&header), IoSlice::new(payload)])
    }

    /// Writes one message.
    ///
    /// # Errors
    /// [`WireError::Io`] for the stream's.
    pub fn write_message(&mut self, message: &Message) -> Result<(), WireError> {
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.clear();
        let result = scratch.push_message(message).and_then(|()| self.write_batch(&scratch));
        self.scratch = scratch;
        result
    }

    /// Writes all frames of a batch, as one run of bytes.
    ///
    /// # Errors
    /// [`WireError::Io`] for the stream's.
    pub fn write_batch(&mut self, batch: &FrameBatch) -> Result<(), WireError> {
        self.write_slices(&mut [IoSlice::new(batch.as_bytes())])
    }

    fn write_slices(&mut self, mut slices: &mut [IoSlice<'_>]) -> Result<(), WireError> {
        if self.broken {
            return Err(WireError::Io(io::ErrorKind::BrokenPipe.into()));
        }
        // Drops empty slices, which would look like a stream that takes nothing.
        IoSlice::advance_slices(&mut slices, 0);
        while !slices.is_empty() {
            match self.sink.write_vectored(slices) {
                Ok(0) => return Err(self.break_off(io::ErrorKind::WriteZero.into())),
                Ok(count) => {
                    self.bytes_written += count as u64;
                    IoSlice::advance_slices(&mut slices, count);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.break_off(error)),
            }
        }
        Ok(())
    }

    fn break_off(&mut self, error: io::Error) -> WireError {
        self.broken = true;
        WireError::Io(error)
    }
}
