//! The data connection's writing thread: encodes epochs and background pages and sends them, in the order they were handed over.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use crossbeam::channel::{Sender as Queue, unbounded};

use super::capture::{Capture, CapturePool};
use crate::machine::memory::GuestRam;
use crate::protocol::messages::Message;
use crate::protocol::pages::PAGE_BYTES;
use crate::protocol::primary::ConnId;
use crate::wire::WireError;
use crate::wire::frame::{FrameKind, PAYLOAD_BYTES_MAX};
use crate::wire::link::{LinkHandle, LinkWriter};
use crate::wire::pages::{Compress, PageEncoder};

/// Pages encoded into one frame.
const PAGES_PER_FRAME: usize = 128;

/// Something to send.
pub enum SenderJob {
    /// A small message.
    Message(Message),
    /// An epoch.
    Epoch(Box<Capture>),
    /// Background pages, read when they are sent.
    Push(Vec<u64>),
}

/// What became of a job.
#[derive(Debug)]
pub enum SenderReport {
    /// A push was read and handed to the network; with the bytes it took.
    Pushed(u64),
    /// The connection does not take any more.
    Failed(String),
}

/// The thread's handle. Dropping it lets what was handed over leave, then ends the connection.
pub struct Sender {
    conn: ConnId,
    jobs: Option<Queue<SenderJob>>,
    thread: Option<JoinHandle<()>>,
    handle: LinkHandle,
    epoch_bytes: Arc<AtomicU64>,
}

impl Sender {
    /// Starts the thread for connection `conn`. `report` is called from it.
    pub fn start(
        conn: ConnId,
        writer: LinkWriter,
        memory: GuestRam,
        compress: Compress,
        pool: CapturePool,
        report: impl Fn(SenderReport) + Send + 'static,
    ) -> std::io::Result<Sender> {
        let (jobs, queue) = unbounded();
        let handle = writer.handle();
        let epoch_bytes = Arc::new(AtomicU64::new(0));
        let mut stream =
            Stream { writer, memory, encoder: PageEncoder::new(compress), pool, payload: Vec::new(), epoch_bytes: epoch_bytes.clone() };
        let thread = std::thread::Builder::new().name("mcd-send".into()).spawn(move || {
            for job in queue {
                match stream.send(job) {
                    Ok(Some(done)) => report(done),
                    Ok(None) => {}
                    Err(error) => {
                        report(SenderReport::Failed(error.to_string()));
                        break;
                    }
                }
            }
            stream.writer.handle().shutdown();
        })?;
        Ok(Sender { conn, jobs: Some(jobs), thread: Some(thread), handle, epoch_bytes })
    }

    /// The connection it writes to.
    pub fn conn(&self) -> ConnId {
        self.conn
    }

    /// Hands over a job. The protocol bounds what is on its way, so this queue stays short.
    pub fn submit(&self, job: SenderJob) {
        if let Some(jobs) = &self.jobs {
            // If the thread is gone it has reported why.
            let _ = jobs.send(job);
        }
    }

    /// Wire bytes of the epoch sent last.
    pub fn last_epoch_bytes(&self) -> u64 {
        self.epoch_bytes.load(Ordering::Relaxed)
    }

    /// Ends the connection now; what is still queued is lost.
    pub fn abort(mut self) {
        self.handle.shutdown();
        self.finish();
    }

    fn finish(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.finish();
    }
}

struct Stream {
    writer: LinkWriter,
    memory: GuestRam,
    encoder: PageEncoder,
    pool: CapturePool,
    payload: Vec<u8>,
    epoch_bytes: Arc<AtomicU64>,
}

impl Stream {
    fn send(&mut self, job: SenderJob) -> Result<Option<SenderReport>, WireError> {
        match job {
            SenderJob::Message(message) => self.writer.send(&message).map(|_| None),
            SenderJob::Epoch(capture) => {
                let sent = self.epoch(&capture);
                self.pool.put(capture);
                sent.map(|()| None)
            }
            SenderJob::Push(pages) => self.push(&pages).map(|bytes| Some(SenderReport::Pushed(bytes))),
        }
    }

    fn epoch(&mut self, capture: &Capture) -> Result<(), WireError> {
        let id = capture.id;
        let mut digest = 0;
        let mut bytes = 0;
        self.writer.queue_message(&Message::EpochBegin { id, completes_resync: capture.completes_resync })?;
        let pages = capture.pages.chunks(PAGES_PER_FRAME).zip(capture.bytes.chunks(PAGES_PER_FRAME * PAGE_BYTES));
        for (indexes, contents) in pages {
            self.payload.clear();
            for (index, content) in indexes.iter().zip(contents.chunks_exact(PAGE_BYTES)) {
                self.encoder.encode(*index, content, &mut self.payload);
            }
            digest = crc32c::crc32c_append(digest, &self.payload);
            bytes += self.payload.len() as u64;
            self.writer.queue_frame(FrameKind::Pages, &self.payload)?;
        }
        for part in capture.state.chunks(PAYLOAD_BYTES_MAX) {
            digest = crc32c::crc32c_append(digest, part);
            bytes += part.len() as u64;
            self.writer.queue_frame(FrameKind::State, part)?;
        }
        // Before the last byte leaves, so that it is known when the ack comes.
        self.epoch_bytes.store(bytes, Ordering::Relaxed);
        let (pages, state_bytes) = (capture.pages.len() as u64, capture.state.len() as u64);
        self.writer.queue_message(&Message::EpochEnd { id, pages, state_bytes, digest })?;
        self.writer.flush()
    }

    fn push(&mut self, pages: &[u64]) -> Result<u64, WireError> {
        let mut bytes = 0;
        let mut page = [0; PAGE_BYTES];
        for indexes in pages.chunks(PAGES_PER_FRAME) {
            self.payload.clear();
            for index in indexes {
                // The ledger knows only pages the guest has.
                if self.memory.read_page(*index, &mut page).is_ok() {
                    self.encoder.encode(*index, &page, &mut self.payload);
                }
            }
            bytes += self.payload.len() as u64;
            self.writer.queue_frame(FrameKind::Background, &self.payload)?;
        }
        self.writer.flush()?;
        Ok(bytes)
    }
}
