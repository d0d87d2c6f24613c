//! The output buffer: hold, seal, release, discard.

use crate::port::VNET_HEADER_BYTES;
use crate::queue::{FrameQueue, QUEUE_FRAME_BYTES_MAX};
use std::collections::VecDeque;
use std::io;
use thiserror::Error;

/// Longest frame a buffer takes, in bytes: a virtio-net header, an Ethernet header with a VLAN tag,
/// and the largest IP packet.
pub const FRAME_BYTES_MAX: usize = VNET_HEADER_BYTES + 14 + 4 + 65_535;

const _: () = assert!(FRAME_BYTES_MAX <= QUEUE_FRAME_BYTES_MAX);

/// What a buffer may hold at most. Both bounds hold at all times; the one met first counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most bytes of frames.
    pub bytes_max: usize,
    /// Most frames.
    pub packets_max: usize,
}

/// Why a packet was not taken. The packet is the caller's still.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum PushError {
    /// The buffer holds all that its limits allow; try again after a release.
    #[error("output buffer full: it holds {packets} packets, {bytes} bytes; wait for a release")]
    Full {
        /// Packets held.
        packets: usize,
        /// Bytes held.
        bytes: usize,
    },
    /// The frame is longer than the buffer would ever take; drop it.
    #[error("frame of {bytes} bytes is longer than the {bytes_max} an output buffer takes; drop it")]
    TooLarge {
        /// Bytes in the frame.
        bytes: usize,
        /// Most bytes in a frame of this buffer.
        bytes_max: usize,
    },
    /// A frame without a single byte is no packet; drop it.
    #[error("a frame of 0 bytes is no packet; drop it")]
    Empty,
}

/// Why an epoch was not sealed. Nothing changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("cannot seal epoch {epoch}: epoch {newest} is sealed already, and epochs only rise")]
pub struct SealError {
    /// The epoch asked for.
    pub epoch: u64,
    /// The newest sealed one.
    pub newest: u64,
}

/// Why a buffer was not restarted. Nothing changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("cannot restart: {packets} sealed packets are held; release or discard them first")]
pub struct RestartError {
    /// Sealed packets that are held.
    pub packets: usize,
}

/// A release that the sink ended early. What it took before is gone from the buffer; the packet it
/// failed on and all after it stay, in order, and are released by the next call.
#[derive(Debug, Error)]
#[error("release stopped after {} packets: {source}", released.packets)]
pub struct ReleaseError {
    /// What was released before the failure.
    pub released: Released,
    /// The sink's error.
    pub source: io::Error,
}

impl ReleaseError {
    /// True if the sink only has no room now: call again when it is writable.
    pub fn would_block(&self) -> bool {
        self.source.kind() == io::ErrorKind::WouldBlock
    }
}

/// What a seal closed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sealed {
    /// Packets in the epoch.
    pub packets: usize,
    /// Their bytes.
    pub bytes: usize,
}

/// What a release let go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Released {
    /// Packets the sink took.
    pub packets: usize,
    /// Their bytes.
    pub bytes: usize,
}

/// What a discard dropped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Discarded {
    /// Packets dropped, sealed and open.
    pub packets: usize,
    /// Their bytes.
    pub bytes: usize,
}

/// A sealed epoch that has packets left.
#[derive(Debug)]
struct SealedEpoch {
    epoch: u64,
    packets: usize,
}

/// Holds a guest's packets until their epoch is committed. See the crate's page for the four verbs.
///
/// Invariant I4 (in order, once): a packet leaves by exactly one of [`release`](Self::release),
/// [`First::take`] and [`discard`](Self::discard), and releases leave in the order of the pushes.
#[derive(Debug)]
pub struct OutputBuffer {
    limits: Limits,
    /// Every packet held: those of sealed epochs first, then the open ones.
    frames: FrameQueue,
    held: Sealed,
    open: Sealed,
    /// Sealed epochs with packets left, oldest first. An epoch without packets leaves no entry, so
    /// this is bounded by `packets_max`.
    sealed: VecDeque<SealedEpoch>,
    newest_sealed: Option<u64>,
}

impl OutputBuffer {
    /// An empty buffer with nothing sealed. Memory is taken as packets come and kept for later
    /// ones; it stays within about 4/3 of `limits.bytes_max`, and 4 bytes per packet.
    pub fn new(limits: Limits) -> OutputBuffer {
        OutputBuffer {
            limits,
            frames: FrameQueue::default(),
            held: Sealed::default(),
            open: Sealed::default(),
            sealed: VecDeque::new(),
            newest_sealed: None,
        }
    }

    /// Holds `frame` in the open epoch.
    ///
    /// # Errors
    /// [`PushError::Full`] if a limit is reached (keep the packet and try again after a release),
    /// [`PushError::TooLarge`] or [`PushError::Empty`] if it can never be taken.
    pub fn push(&mut self, frame: &[u8]) -> Result<(), PushError> {
        let bytes_max = FRAME_BYTES_MAX.min(self.limits.bytes_max);
        if frame.is_empty() {
            return Err(PushError::Empty);
        }
        if frame.len() > bytes_max {
            return Err(PushError::TooLarge { bytes: frame.len(), bytes_max });
        }
        if self.held.packets >= self.limits.packets_max || frame.len() > self.limits.bytes_max - self.held.bytes {
            return Err(PushError::Full { packets: self.held.packets, bytes: self.held.bytes });
        }
        self.frames.push_back(frame);
        for count in [&mut self.held, &mut self.open] {
            count.packets += 1;
            count.bytes += frame.len();
        }
        Ok(())
    }

    /// Closes the open epoch under the number `epoch` and opens the next one. An epoch may be
    /// empty, and numbers may be skipped.
    ///
    /// # Errors
    /// [`SealError`] if `epoch` is not above the newest sealed one.
    pub fn seal(&mut self, epoch: u64) -> Result<Sealed, SealError> {
        if let Some(newest) = self.newest_sealed
            && epoch <= newest
        {
            return Err(SealError { epoch, newest });
        }
        self.newest_sealed = Some(epoch);
        let closed = std::mem::take(&mut self.open);
        if closed.packets > 0 {
            self.sealed.push_back(SealedEpoch { epoch, packets: closed.packets });
        }
        Ok(closed)
    }

    /// Gives every packet of the sealed epochs up to and with `through` to `sink`, in order. Open
    /// packets are never given.
    ///
    /// `through` need not have been sealed: all sealed epochs up to it are released.
    ///
    /// # Errors
    /// [`ReleaseError`] if the sink failed; see there for what is gone and what stays.
    pub fn release(
        &mut self,
        through: u64,
        mut sink: impl FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<Released, ReleaseError> {
        let mut released = Released::default();
        while let Some(first) = self.first(through) {
            let bytes = first.frame().len();
            if let Err(source) = sink(first.frame()) {
                return Err(ReleaseError { released, source });
            }
            first.take();
            released.packets += 1;
            released.bytes += bytes;
        }
        Ok(released)
    }

    /// The first packet that a release through `through` would give, to be released one at a time:
    /// look at it, send it, and [`take`](First::take) it. Dropped untaken, it stays first. With
    /// this a caller can ask before each packet whether it still may.
    pub fn first(&mut self, through: u64) -> Option<First<'_>> {
        let releasable = self.sealed.front().is_some_and(|oldest| oldest.epoch <= through);
        releasable.then_some(First { buffer: self })
    }

    /// Drops every packet, sealed and open: they never happened. Epoch numbers go on rising; see
    /// [`restart`](Self::restart).
    pub fn discard(&mut self) -> Discarded {
        let dropped = Discarded { packets: self.held.packets, bytes: self.held.bytes };
        self.frames.clear();
        self.sealed.clear();
        self.held = Sealed::default();
        self.open = Sealed::default();
        dropped
    }

    /// Begins a new generation: epoch numbers may start from 0 again. Open packets stay and belong
    /// to the epoch sealed next.
    ///
    /// # Errors
    /// [`RestartError`] if sealed packets are held, because their numbers would mix with the new
    /// ones.
    pub fn restart(&mut self) -> Result<(), RestartError> {
        if !self.sealed.is_empty() {
            return Err(RestartError { packets: self.held.packets - self.open.packets });
        }
        self.newest_sealed = None;
        Ok(())
    }

    /// Packets of the open epoch.
    pub fn open_packets(&self) -> usize {
        self.open.packets
    }

    /// Bytes of the open epoch's packets.
    pub fn open_bytes(&self) -> usize {
        self.open.bytes
    }

    /// All packets held, sealed and open.
    pub fn held_packets(&self) -> usize {
        self.held.packets
    }

    /// Bytes of all packets held, sealed and open.
    pub fn held_bytes(&self) -> usize {
        self.held.bytes
    }

    /// True if no packet is held.
    pub fn is_empty(&self) -> bool {
        self.held.packets == 0
    }

    /// The newest epoch sealed since the start or the last restart.
    pub fn newest_sealed(&self) -> Option<u64> {
        self.newest_sealed
    }

    /// The oldest sealed epoch that has packets left.
    pub fn oldest_held(&self) -> Option<u64> {
        self.sealed.front().map(|oldest| oldest.epoch)
    }

    /// The limits it was made with.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Drops the oldest packet, which must be of a sealed epoch.
    fn pop_sealed(&mut self) {
        let bytes = self.frames.front().map_or(0, <[u8]>::len);
        let Some(oldest) = self.sealed.front_mut() else { return };
        oldest.packets -= 1;
        if oldest.packets == 0 {
            self.sealed.pop_front();
        }
        self.frames.pop_front();
        self.held.packets -= 1;
        self.held.bytes -= bytes;
        assert!(self.held.packets >= self.open.packets, "I4: a release took an open packet");
    }
}

/// The first packet to release, lent by [`OutputBuffer::first`].
#[derive(Debug)]
#[must_use = "the packet stays in the buffer until it is taken"]
pub struct First<'a> {
    buffer: &'a mut OutputBuffer,
}

impl First<'_> {
    /// The packet.
    pub fn frame(&self) -> &[u8] {
        self.buffer.frames.front().unwrap_or_default()
    }

    /// The epoch that produced it.
    pub fn epoch(&self) -> u64 {
        self.buffer.oldest_held().unwrap_or_default()
    }

    /// Removes it from the buffer: it is out.
    pub fn take(self) {
        self.buffer.pop_sealed();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buffer() -> OutputBuffer {
        OutputBuffer::new(Limits { bytes_max: 100, packets_max: 4 })
    }

    fn released(buffer: &mut OutputBuffer, through: u64) -> Vec<Vec<u8>> {
        let mut out = Vec::new();
        let counted = buffer
            .release(through, |frame| {
                out.push(frame.to_vec());
                Ok(())
            })
            .unwrap();
        assert_eq!(counted.packets, out.len());
        out
    }

    #[test]
    fn open_packets_never_leave() {
        let mut buffer = buffer();
        buffer.push(b"open").unwrap();
        assert!(released(&mut buffer, u64::MAX).is_empty());
        assert!(buffer.first(u64::MAX).is_none());
        assert_eq!(buffer.seal(3), Ok(Sealed { packets: 1, bytes: 4 }));
        assert!(released(&mut buffer, 2).is_empty());
        assert_eq!(released(&mut buffer, 3), [b"open".to_vec()]);
        assert!(released(&mut buffer, 3).is_empty());
    }

    #[test]
    fn limits_hold_and_say_so() {
        let mut buffer = buffer();
        assert_eq!(buffer.push(&[0; 101]), Err(PushError::TooLarge { bytes: 101, bytes_max: 100 }));
        assert_eq!(buffer.push(&[]), Err(PushError::Empty));
        buffer.push(&[0; 60]).unwrap();
        assert_eq!(buffer.push(&[0; 41]), Err(PushError::Full { packets: 1, bytes: 60 }));
        for _ in 0..3 {
            buffer.push(&[0; 1]).unwrap();
        }
        assert_eq!(buffer.push(&[0; 1]), Err(PushError::Full { packets: 4, bytes: 63 }));
        assert_eq!(buffer.discard(), Discarded { packets: 4, bytes: 63 });
        assert!(buffer.is_empty());
        buffer.push(&[0; 100]).unwrap();
        let mut wide = OutputBuffer::new(Limits { bytes_max: usize::MAX, packets_max: usize::MAX });
        wide.push(&[0; FRAME_BYTES_MAX]).unwrap();
        assert!(matches!(wide.push(&[0; FRAME_BYTES_MAX + 1]), Err(PushError::TooLarge { .. })));
    }

    #[test]
    fn a_failing_sink_loses_and_doubles_nothing() {
        let mut buffer = buffer();
        for n in 0..3u8 {
            buffer.push(&[n]).unwrap();
        }
        buffer.seal(0).unwrap();
        let mut out = Vec::new();
        let error = buffer
            .release(0, |frame| {
                if out.len() == 1 {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                out.push(frame.to_vec());
                Ok(())
            })
            .unwrap_err();
        assert!(error.would_block());
        assert_eq!(error.released, Released { packets: 1, bytes: 1 });
        assert_eq!(released(&mut buffer, 0), [vec![1], vec![2]]);
    }

    #[test]
    fn epochs_only_rise_until_a_restart() {
        let mut buffer = buffer();
        buffer.seal(7).unwrap();
        assert_eq!(buffer.seal(7), Err(SealError { epoch: 7, newest: 7 }));
        buffer.push(b"x").unwrap();
        buffer.seal(9).unwrap();
        assert_eq!(buffer.restart(), Err(RestartError { packets: 1 }));
        assert_eq!(buffer.oldest_held(), Some(9));
        let first = buffer.first(9).unwrap();
        assert_eq!((first.epoch(), first.frame()), (9, b"x".as_slice()));
        first.take();
        buffer.push(b"open over the restart").unwrap();
        buffer.restart().unwrap();
        assert_eq!(buffer.newest_sealed(), None);
        buffer.seal(0).unwrap();
        assert_eq!(released(&mut buffer, 0).len(), 1);
    }
}
