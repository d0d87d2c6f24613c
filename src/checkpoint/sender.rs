//! The data connection's writing thread: encodes epochs and background pages and sends them, in the
//! order they were handed over.
//!
//! A small epoch that nothing waits before is sent by the thread that captured it: that saves a
//! wake-up on the way of every commit.

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender as Queue, bounded, unbounded};
use parking_lot::Mutex;
use thiserror::Error;

use super::capture::Capture;
use super::capture_pool::CapturePool;
use super::image::{GuestImage, ImagePageError};
use super::journal::BlockSet;
use super::packing::{Packer, Packing};
use crate::protocol::messages::Message;
use crate::protocol::pages::PAGE_BYTES;
use crate::protocol::types::ConnId;
use crate::wire::{FrameBatch, FrameKind, LinkCloser, LinkWriter, WireError};

/// Pages encoded into one frame.
const PAGES_PER_FRAME: usize = 128;

/// Bytes gathered before they are written.
const BATCH_BYTES_MAX: usize = 1 << 20;

/// Bytes of memory in an epoch that its capturing thread may send itself: they fit the socket's
/// buffer when that is empty, so sending never blocks.
const DIRECT_BYTES_MAX: usize = 256 << 10;

/// Something to send.
pub enum SenderJob {
    /// A small message.
    Message(Message),
    /// An epoch.
    Epoch(Box<Capture>),
    /// Background pages, read when they are sent.
    Push(Vec<u64>),
    /// A frame that says nothing.
    Probe,
}

/// What became of a job.
#[derive(Debug)]
pub enum SenderReport {
    /// A push was read and handed to the network; with the bytes it took.
    Pushed(u64),
    /// The connection does not take any more.
    Failed(String),
}

/// Why a job could not be done.
#[derive(Debug, Error)]
enum SendError {
    #[error("{0}")]
    Wire(#[from] WireError),
    #[error("a page for the newcomer cannot be read: {0}")]
    Read(#[from] ImagePageError),
}

/// The way to the thread, for every thread that has something to send.
#[derive(Clone)]
pub struct SenderQueue {
    jobs: Queue<SenderJob>,
    /// Jobs handed over and not done: nothing overtakes them.
    pending: Arc<AtomicUsize>,
    stream: Arc<Mutex<Stream>>,
    closer: LinkCloser,
}

impl SenderQueue {
    /// Hands over a job. The protocol bounds what is in flight, so this queue stays short.
    pub fn submit(&self, job: SenderJob) {
        self.pending.fetch_add(1, Ordering::SeqCst);
        if self.jobs.send(job).is_err() {
            // The thread is gone, and has reported why.
            self.pending.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Sends an epoch, from this thread if it is small and nothing waits before it. `captured` is
    /// called when nothing that is submitted from then on can overtake the epoch, and before the
    /// peer can have it.
    pub fn epoch(&self, capture: Box<Capture>, captured: impl FnOnce()) {
        let small = capture.bytes.len() <= DIRECT_BYTES_MAX && capture.blocks_are_few();
        if let Some(mut stream) = self.stream.try_lock().filter(|_| small)
            && self.pending.load(Ordering::SeqCst) == 0
            && !self.closer.has_unsent()
        {
            captured();
            // If it fails, the reading end or the next job sees the same.
            let _ = stream.send(SenderJob::Epoch(capture));
            return;
        }
        self.submit(SenderJob::Epoch(capture));
        captured();
    }
}

/// The thread's handle. Dropping it lets what was handed over leave, then ends the connection.
pub struct Sender {
    conn: ConnId,
    queue: Option<SenderQueue>,
    thread: Option<JoinHandle<()>>,
    /// Nothing is ever sent here: it ends with the thread.
    ended: Receiver<()>,
    closer: LinkCloser,
    epoch_bytes: Arc<AtomicU64>,
}

impl Sender {
    /// Starts the thread for connection `conn`. It calls `on_start` first, which may give it
    /// another priority, and `report` later.
    ///
    /// # Errors
    /// If the host gives no thread.
    pub fn start(
        conn: ConnId,
        (writer, closer): (LinkWriter, LinkCloser),
        image: GuestImage,
        packing: Packing,
        pool: CapturePool,
        on_start: impl FnOnce() + Send + 'static,
        report: impl Fn(SenderReport) + Send + 'static,
    ) -> std::io::Result<Sender> {
        let (jobs, queue) = unbounded();
        let epoch_bytes = Arc::new(AtomicU64::new(0));
        let stream = Arc::new(Mutex::new(Stream {
            writer,
            image,
            packer: Packer::new(packing),
            pool,
            batch: FrameBatch::new(),
            epoch_bytes: epoch_bytes.clone(),
        }));
        let pending = Arc::new(AtomicUsize::new(0));
        let (mine, done) = (Arc::clone(&stream), Arc::clone(&pending));
        let end = closer.clone();
        let (ends, ended) = bounded::<()>(0);
        let thread = std::thread::Builder::new().name("mcd-send".into()).spawn(move || {
            on_start();
            for job in queue {
                let sent = mine.lock().send(job);
                done.fetch_sub(1, Ordering::SeqCst);
                match sent {
                    Ok(Some(done)) => report(done),
                    Ok(None) => {}
                    Err(error) => {
                        report(SenderReport::Failed(error.to_string()));
                        break;
                    }
                }
            }
            end.shutdown();
            drop(ends);
        })?;
        let queue = SenderQueue { jobs, pending, stream, closer: closer.clone() };
        Ok(Sender { conn, queue: Some(queue), thread: Some(thread), ended, closer, epoch_bytes })
    }

    /// The connection it writes to.
    pub fn conn(&self) -> ConnId {
        self.conn
    }

    /// The way to the thread. Whoever keeps it past the handle's end keeps the thread.
    pub fn queue(&self) -> Option<SenderQueue> {
        self.queue.clone()
    }

    /// Hands over a job.
    pub fn submit(&self, job: SenderJob) {
        if let Some(queue) = &self.queue {
            queue.submit(job);
        }
    }

    /// Sends a probe, unless something waits to be sent anyway.
    pub fn probe(&self) {
        if let Some(queue) = self.queue.as_ref().filter(|queue| queue.pending.load(Ordering::SeqCst) == 0) {
            queue.submit(SenderJob::Probe);
        }
    }

    /// Wire bytes of the epoch sent last.
    pub fn last_epoch_bytes(&self) -> u64 {
        self.epoch_bytes.load(Ordering::Relaxed)
    }

    /// Ends the connection once what was handed over is out, or after `limit`: a peer that takes
    /// nothing holds nobody up. False if something was lost.
    pub fn finish_within(mut self, limit: Duration) -> bool {
        self.queue = None;
        let in_time = self.ended.recv_timeout(limit) != Err(RecvTimeoutError::Timeout);
        if !in_time {
            self.closer.shutdown();
            // It ends by itself: its next write fails.
            self.thread = None;
        }
        in_time
    }
}

impl Drop for Sender {
    /// Ends the connection now; what is still queued is lost.
    fn drop(&mut self) {
        self.queue = None;
        if let Some(thread) = self.thread.take() {
            self.closer.shutdown();
            let _ = thread.join();
        }
    }
}

struct Stream {
    writer: LinkWriter,
    image: GuestImage,
    packer: Packer,
    pool: CapturePool,
    batch: FrameBatch,
    epoch_bytes: Arc<AtomicU64>,
}

impl Stream {
    fn send(&mut self, job: SenderJob) -> Result<Option<SenderReport>, SendError> {
        match job {
            SenderJob::Message(message) => Ok(self.writer.write_message(&message).map(|()| None)?),
            SenderJob::Epoch(capture) => {
                let sent = self.epoch(&capture);
                self.pool.put(capture);
                sent?;
                Ok(None)
            }
            SenderJob::Probe => Ok(self.writer.write(FrameKind::Probe, &[]).map(|()| None)?),
            SenderJob::Push(pages) => self.push(&pages).map(|bytes| Some(SenderReport::Pushed(bytes))),
        }
    }

    fn epoch(&mut self, capture: &Capture) -> Result<(), WireError> {
        let id = capture.id;
        let before = self.writer.bytes_written();
        let mut digest = 0;
        self.batch.clear();
        self.batch.push_message(&Message::EpochBegin { id, completes_resync: capture.completes_resync })?;
        let (pages, _) = capture.bytes.as_chunks::<PAGE_BYTES>();
        for (indexes, contents) in capture.pages.chunks(PAGES_PER_FRAME).zip(pages.chunks(PAGES_PER_FRAME)) {
            let encoder = self.packer.encoder();
            digest = self.batch.build(FrameKind::Pages, |payload| {
                let start = payload.len();
                for (index, content) in indexes.iter().zip(contents) {
                    encoder.encode(*index, content, payload);
                }
                crc32c::crc32c_append(digest, &payload[start..])
            })?;
            self.flush_if_large()?;
        }
        for blocks in [&capture.blocks, &capture.shared].into_iter().flatten() {
            digest = self.blocks(blocks, digest)?;
        }
        for part in capture.state.chunks(FrameKind::State.bytes_max()) {
            digest = crc32c::crc32c_append(digest, part);
            self.batch.push(FrameKind::State, part)?;
            self.flush_if_large()?;
        }
        let (pages, state_bytes) = (capture.pages_total(), capture.state.len() as u64);
        self.batch.push_message(&Message::EpochEnd { id, pages, state_bytes, digest })?;
        // Before the last byte leaves, so that it is known when the ack comes.
        let bytes = self.writer.bytes_written() - before + self.batch.as_bytes().len() as u64;
        self.epoch_bytes.store(bytes, Ordering::Relaxed);
        self.flush()
    }

    /// The blocks of disks in the epoch; the digest with them.
    fn blocks(&mut self, blocks: &BlockSet, mut digest: u32) -> Result<u32, WireError> {
        let mut rest = blocks.iter().peekable();
        while rest.peek().is_some() {
            let encoder = self.packer.encoder();
            digest = self.batch.build(FrameKind::Pages, |payload| {
                let start = payload.len();
                for (index, content) in rest.by_ref().take(PAGES_PER_FRAME) {
                    encoder.encode(index, content, payload);
                }
                crc32c::crc32c_append(digest, &payload[start..])
            })?;
            self.flush_if_large()?;
        }
        Ok(digest)
    }

    fn push(&mut self, pages: &[u64]) -> Result<u64, SendError> {
        let before = self.writer.bytes_written();
        let mut page = [0; PAGE_BYTES];
        for indexes in pages.chunks(PAGES_PER_FRAME) {
            let (encoder, image) = (self.packer.encoder(), &self.image);
            let read: Result<(), ImagePageError> = self.batch.build(FrameKind::Background, |payload| {
                for index in indexes {
                    // Without the page the newcomer's image would lack it and nobody would know.
                    image.read(*index, &mut page)?;
                    encoder.encode(*index, &page, payload);
                }
                Ok(())
            })?;
            read?;
            self.flush_if_large()?;
        }
        self.flush()?;
        Ok(self.writer.bytes_written() - before)
    }

    /// Small epochs leave in one write; large ones leave while the rest is being encoded.
    fn flush_if_large(&mut self) -> Result<(), WireError> {
        if self.batch.as_bytes().len() < BATCH_BYTES_MAX { Ok(()) } else { self.flush() }
    }

    fn flush(&mut self) -> Result<(), WireError> {
        let start = Instant::now();
        let written = self.writer.write_batch(&self.batch);
        self.packer.wrote(self.batch.as_bytes().len(), start.elapsed());
        self.batch.clear();
        written
    }
}
